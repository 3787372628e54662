"""Loading decoders: what comes of a folder, and what is refused."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import some_eta
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import icl_dual as icl
from icl_dual.assets import ModelFiles
from icl_dual.models import loading
from icl_dual.models.momentum_gpt2 import MomentumConfig, MomentumForCausalLM


@pytest.mark.parametrize("eta", [0.0, 0.6, "learned"])
def test_a_decoder_trained_with_momentum_loads_with_it(
    eta: float | str, task: icl.Task, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained: Any = MomentumForCausalLM(
            MomentumConfig(
                vocab_size=300, n_positions=512, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, eta=eta
            )
        ).eval()
    if eta == "learned":
        for layer, block in enumerate(trained.transformer.h):
            block.attn.eta_logit.data.copy_(some_eta()[layer].clamp_min(0.01).logit())
    trained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = icl.load_model(str(tmp_path))
    assert (model.momentum is None) == (eta == 0.0)
    tokens = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.run(tokens), trained(tokens).logits, atol=1e-4, rtol=1e-4)
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(4))
    zsl, in_context = (
        icl.capture(model, one, fields=icl.DECOMPOSE_FIELDS, progress=False) for one in (prompts.zero_shot(), prompts)
    )
    assert icl.decompose(model, zero_shot=zsl, in_context=in_context).residual < 1e-5
    if eta == 0.0:
        with icl.momentum_attention(model, 0.6):
            assert (model.run(tokens) - trained(tokens).logits).abs().max() > 0.1


def test_a_local_folder_loads_with_its_hash(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    hf_model = make_hf_model("llama")
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = icl.load_model(str(tmp_path))
    assert model.provenance.startswith("sha256:")
    assert (model.n_layers, model.n_heads, model.n_key_value_heads, model.d_head) == (3, 4, 2, 8)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.run(ids), hf_model(ids).logits)
    assert icl.load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(icl.UnsupportedModelError, match="expected a folder with a decoder-only language model"):
        icl.load_model(str(tmp_path))


def test_a_tokenizer_given_is_used_as_it_is_and_needs_no_files(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """TransformerLens would load it again from its files, without the token that was added in memory."""
    make_hf_model("llama").save_pretrained(tmp_path)
    in_memory = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), bos_token="<s>")
    in_memory.add_tokens(["<lab0>"])
    before = in_memory.special_tokens_map
    model = icl.load_model(str(tmp_path), tokenizer=in_memory)
    assert model.tokenizer is in_memory
    assert model.encode("<lab0>") == [len(tokenizer)]
    assert model.start_tokens == [], "its own template puts nothing in front"
    assert in_memory.special_tokens_map == before
    assert icl.control_model(model, "untrained", seed=1).tokenizer is in_memory


@pytest.mark.parametrize("damage", ["truncated", "a layer missing"])
def test_damaged_weights_are_refused_never_made_up(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str
) -> None:
    make_hf_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        kept = {name: tensor for name, tensor in load_file(weights).items() if ".layers.1." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(icl.AssetError, match=r"expected complete weights|got none for 9 of them"):
        icl.load_model(str(tmp_path))


def test_what_a_packaged_model_is_reaches_the_model_and_changes_neither_name_nor_provenance(
    make_hf_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_hf_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    files = ModelFiles(tmp_path, "sha256:1234", "Made-up-Instruct (Q4_1, dequantised)")
    monkeypatch.setattr("icl_dual.assets.model_files", lambda name, revision: files)
    model = icl.load_model("made-up")
    assert (model.name, model.provenance) == ("made-up", "sha256:1234")
    assert model.description == "Made-up-Instruct (Q4_1, dequantised)"
    assert repr(model).startswith("Model('made-up' = Made-up-Instruct (Q4_1, dequantised), LlamaForCausalLM, ")
    monkeypatch.undo()
    assert icl.load_model(str(tmp_path)).description == str(tmp_path)


RUNS_CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
Path("MARKER").touch()
class CustomConfig(PretrainedConfig):
    model_type = "custom"
class CustomModel(PreTrainedModel):
    config_class = CustomConfig
class CustomTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("place", ["model", "tokenizer", "model that transformers has"])
def test_a_models_code_is_neither_run_nor_offered(
    make_hf_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    make_hf_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    marker = tmp_path / "code_ran"
    (tmp_path / "custom.py").write_text(RUNS_CODE.replace("MARKER", marker.as_posix()))
    changes: dict[str, dict[str, Any]] = {
        "model": {"model_type": "custom", "architectures": ["CustomModel"]},
        "tokenizer": {
            "tokenizer_class": "CustomTokenizer",
            "auto_map": {"AutoTokenizer": [None, "custom.CustomTokenizer"]},
        },
        "model that transformers has": {},
    }
    file = tmp_path / ("tokenizer_config.json" if place == "tokenizer" else "config.json")
    auto_map = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map, **changes[place]}))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    if place == "model that transformers has":
        assert icl.load_model(str(tmp_path)).architecture == "LlamaForCausalLM"
    else:
        with pytest.raises(
            icl.UnsupportedModelError, match=r"classes that transformers has, .*'custom.Custom"
        ) as caught:
            icl.load_model(str(tmp_path))
        assert "trust_remote_code" not in str(caught.value)
        assert caught.value.__suppress_context__
    assert not marker.exists()


class _Opens:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_weights_that_run_code_are_refused_without_advice_to_run_it(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    hf_model = make_hf_model("llama")
    hf_model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save({**hf_model.state_dict(), "extra": _Opens(tmp_path / "code_ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(icl.AssetError, match=r"expected weights as tensors alone in .* as safetensors") as caught:
        icl.load_model(str(tmp_path))
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "code_ran").exists()


def test_a_model_that_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_weights = 10**6
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    blocks = [
        torch.zeros(n_weights // 4 + 3, dtype=torch.float16),
        torch.zeros(n_weights // 4, dtype=torch.float16),
        torch.zeros(1000, 250),
        torch.zeros(249_997),
    ]
    save_file({f"layers.{index}.w": block for index, block in enumerate(blocks)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(loading, "free_memory", lambda device: 4 * n_weights - 1)
    with pytest.raises(MemoryError, match=r"weights in float32, got .*bfloat16, arithmetic=torch\.float32"):
        icl.load_model(str(tmp_path))
    monkeypatch.setattr(loading, "free_memory", lambda device: 2 * n_weights - 1)
    with pytest.raises(MemoryError, match="use a model of at most"):
        icl.load_model(str(tmp_path), dtype=torch.bfloat16)
    with pytest.raises(MemoryError, match=r"dtype=torch\.float16, device_map='auto', which reads weights from"):
        icl.load_model(str(tmp_path), dtype=torch.bfloat16)
    save_file({"the same": torch.zeros(n_weights)}, tmp_path / "consolidated.safetensors")
    assert loading._n_weights(tmp_path) == n_weights


def test_copies_that_run_count_where_half_precision_is_computed_in_float32(
    few_layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of what is outside of blocks, and of the largest block, by transformers' own model."""
    hf_model: Any = AutoModelForCausalLM.from_pretrained(few_layers)
    n_weights, in_blocks, in_block = (
        sum(weight.numel() for weight in module.parameters())
        for module in (hf_model, hf_model.model.layers, hf_model.model.layers[0])
    )
    needed = 2 * n_weights + 4 * (n_weights - in_blocks + in_block)
    load = partial(icl.load_model, few_layers, dtype=torch.bfloat16)
    monkeypatch.setattr(loading, "free_memory", lambda device: needed)
    assert load(arithmetic=torch.float32).precision == "bfloat16 storage, float32 arithmetic"
    monkeypatch.setattr(loading, "free_memory", lambda device: needed - 1)
    message = "weights in bfloat16 storage, float32 arithmetic, got .*: load it with dtype=torch.bfloat16 and without"
    with pytest.raises(MemoryError, match=message):
        load(arithmetic=torch.float32)
    assert load().precision == "bfloat16"


def test_float32_weights_that_are_computed_with_as_they_are_need_no_copies(
    few_layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_bytes = 4 * loading._n_weights(Path(few_layers))
    monkeypatch.setattr(loading, "free_memory", lambda device: n_bytes)
    assert icl.load_model(few_layers, arithmetic=torch.float32).precision == "float32"
    monkeypatch.setattr(loading, "free_memory", lambda device: n_bytes - 1)
    with pytest.raises(MemoryError, match="weights in float32, got"):
        icl.load_model(few_layers, arithmetic=torch.float32)


def test_half_precision_is_advised_where_it_fits_with_the_copies_that_run(
    few_layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_half, half = 2 * loading._n_weights(Path(few_layers)), "load it with dtype=torch.bfloat16"
    with_copies = in_half + 4 * loading._n_copied(Path(few_layers))
    for free, advice in (
        (with_copies, f"{half}, arithmetic=torch.float32"),
        (with_copies - 1, f"{half} and without arithmetic"),
        (in_half, f"{half} and without arithmetic"),
        (in_half - 1, "use a model of at most"),
    ):
        monkeypatch.setattr(loading, "free_memory", lambda device, free=free: free)
        with pytest.raises(MemoryError, match=f"weights in float64, got .*: {advice}"):
            icl.load_model(few_layers, dtype=torch.float64)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match="expected a device that torch can use here, got"):
        icl.load_model(str(tmp_path / "nothing"), device=device)
