"""Every annotation of the library is checked at every call; tiny random models and made-up rows for the mechanics."""

from jaxtyping import install_import_hook

install_import_hook("icl_dual", "beartype.beartype")

import math  # noqa: E402 - the hook has to be in place before the library is imported
import os  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import hooked  # noqa: E402
import matplotlib as mpl  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    BitNetConfig,
    BitNetForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

import icl_dual as icl  # noqa: E402

mpl.use("Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub; the packaged model comes from the package index
torch.set_num_threads(1)  # tiny matrices: threads cost more than they do

VOCABULARY = 300
N_CTX = 512
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
}
_MLP: dict[str, Any] = {**_DECODER, "intermediate_size": 48}
_GQA: dict[str, Any] = {**_MLP, "num_key_value_heads": 2, "head_dim": 8}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": N_CTX}
WINDOW = 40
"""Shorter than the test prompts' demonstrations, longer than their queries."""
_HF_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_MLP)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(rotary_dim=4, **_GPT2)),
    "gptneo-window": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            attention_types=[[["global", "local", "global"], 1]],
            window_size=WINDOW,
            max_position_embeddings=N_CTX,
        )
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **_DECODER)),
    "xglm": lambda: XGLMForCausalLM(
        XGLMConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            ffn_dim=48,
            num_layers=3,
            attention_heads=4,
            max_position_embeddings=N_CTX,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GQA)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **_GQA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **_MLP)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GQA)),
    "gemma2-window": lambda: Gemma2ForCausalLM(
        Gemma2Config(sliding_window=WINDOW, attn_logit_softcapping=2.0, **_GQA)  # so low that it bends scores here
    ),
    "gemma3-window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_GQA
        )
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_MLP)),
    "gptoss-window": lambda: GptOssForCausalLM(
        GptOssConfig(
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
            **_GQA,
        )
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**_DECODER)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(num_key_value_heads=2, **_MLP)),
}
BRIDGED = tuple(_HF_MODELS)
ARCHITECTURES = BRIDGED + tuple(f"hooked-{name}" for name in hooked.CONVERTED if hooked.HookedTransformer)
"""Behind a bridge, and as `HookedTransformer`s where there is that class."""
_HF_MODELS |= {
    "falcon-alibi": lambda: FalconForCausalLM(FalconConfig(alibi=True, **_DECODER)),
    "mpt": lambda: MptForCausalLM(
        MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=VOCABULARY, max_seq_len=N_CTX)
    ),
    "olmo-clamped": lambda: OlmoForCausalLM(OlmoConfig(clip_qkv=0.2, **_MLP)),
    "bitnet": lambda: BitNetForCausalLM(BitNetConfig(num_key_value_heads=2, **_MLP)),
    "qwen3next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["full_attention"] * 3,
            **_GQA,
        )
    ),
    "deepseek2": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(
            kv_lora_rank=8,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            first_k_dense_replace=3,
            **_MLP,
        )
    ),
}
REFUSED = tuple(name for name in _HF_MODELS if name not in BRIDGED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the tables that tests generate into docs/")


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
            hf_model = _HF_MODELS[architecture.removeprefix("hooked-")]()
            for parameter in hf_model.parameters():
                if parameter.ndim == 2:
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
def llama(models_by_architecture: Callable[[str], icl.Model]) -> icl.Model:
    return models_by_architecture("llama")


def run_settings(model: icl.Model, prompts: icl.Prompts) -> dict[str, Any]:
    """A cell's captures and delta, as `icl.compare` takes them."""
    zsl, in_context = (icl.capture(model, one, progress=False) for one in (prompts.zero_shot(), prompts))
    delta = icl.finetune(model, prompts, lr=0.05, progress=False)
    with delta.applied(model):
        ft = icl.capture(model, prompts.zero_shot(), progress=False)
    return {"zsl": zsl, "icl": in_context, "ft": ft, "delta": delta}


_MOVING = {
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "neox": ("attention.query_key_value", "attention.dense"),
    "bloom": ("self_attention.query_key_value", "self_attention.dense"),
    "xglm": ("self_attn.v_proj", "self_attn.out_proj"),
}
"""The modules that make a tiny model's values and read its heads' outputs, where they are not Llama's."""


def past_sum(v: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Σ_{i<t} η^{t−i} v_i of values `[batch pos head d_head]`, token by token: m_t = η (m_{t−1} + v_{t−1})."""
    found = [torch.zeros_like(v[:, 0])]
    for t in range(1, v.shape[1]):
        found.append(eta[:, None].to(v) * (found[-1] + v[:, t - 1]))
    return torch.stack(found, dim=1)


def with_momentum(hf_model: Any, architecture: str, eta: torch.Tensor) -> list[torch.Tensor]:
    """Give a Hugging Face model momentum by `[layer head]`, in plain torch: what a model under `icl` is held against.

    Returns a list that collects each layer's attention output in every pass.
    """
    name = architecture.removeprefix("hooked-")
    values, output = _MOVING.get(name, ("self_attn.v_proj", "self_attn.o_proj"))
    n_heads, outputs = eta.shape[1], list[torch.Tensor]()
    seen: dict[int, torch.Tensor] = {}

    def read(layer: int, projected: torch.Tensor) -> None:
        if name == "gpt2":
            projected = projected.chunk(3, dim=-1)[2]
        elif name in ("neox", "bloom"):  # a head's query, key and value lie side by side
            projected = projected.unflatten(-1, (n_heads, 3, -1))[..., 2, :].flatten(2)
        by_head = projected.unflatten(-1, (-1, 8))
        seen[layer] = by_head.repeat_interleave(n_heads // by_head.shape[2], dim=2)

    def add(layer: int, z: torch.Tensor) -> tuple[torch.Tensor]:
        return (z + past_sum(seen.pop(layer), eta[layer]).flatten(2),)

    modules = {kind: [m for path, m in hf_model.named_modules() if path.endswith(kind)] for kind in (values, output)}
    for layer in range(len(eta)):
        modules[values][layer].register_forward_hook(lambda m, args, out, layer=layer: read(layer, out))
        modules[output][layer].register_forward_pre_hook(lambda m, args, layer=layer: add(layer, args[0]))
        modules[output][layer].register_forward_hook(lambda m, args, out: outputs.append(out))
    return outputs


def some_eta(n_layers: int = 3, n_heads: int = 4) -> torch.Tensor:
    """A different η at every layer and head; at one head none."""
    eta = 0.9 * torch.rand(n_layers, n_heads, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eta[1, 1] = 0.0
    return eta


def make_rows(n: int = 60) -> list[dict[str, object]]:
    words = ("good", "bad", "film", "so", "very")
    return [
        {"text": f"{' '.join(words[(i * j) % 5] for j in range(1, 2 + i % 4))} number {i}", "label": i % 2}
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def task() -> icl.Task:
    """Two classes, whose label words have several tokens in the tiny vocabulary, and as many between them."""
    return icl.Task("toy", "Text: {text} Label:", ("no", "perhaps"), make_rows())


@pytest.fixture(scope="session")
def reference_task() -> icl.Task:
    """The same rows by the reference protocol."""
    return icl.Task("toy", "Text: {text} Label:", ("no", "perhaps"), make_rows(), protocol="reference")


@pytest.fixture(scope="session")
def prompts(llama: icl.Model, task: icl.Task) -> icl.Prompts:
    return icl.build_prompts(llama, task, task.demonstrations(4, seed=1), task.queries(7))


def slow_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ-b by counting every pair."""
    agreement, ties_a, ties_b = 0, 0, 0
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    for i, j in pairs:
        agreement += int(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))
        ties_a += int(a[i] == a[j])
        ties_b += int(b[i] == b[j])
    both = (len(pairs) - ties_a) * (len(pairs) - ties_b)
    return agreement / math.sqrt(both) if both else math.nan
