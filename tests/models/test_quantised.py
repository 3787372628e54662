"""Weights that bitsandbytes has quantised, against a slow dequantisation of the numbers in the file."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

import icl_dual as icl
from icl_dual.models import loading, quantised

QUANTISATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def quantise(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Path]:
    """Save a tiny random model, quantised."""

    def save(architecture: str, quantisation: str, dtype: torch.dtype = torch.float32) -> Path:
        plain, folder = tmp_path / "plain", tmp_path / "quantised"
        make_hf_model(architecture).save_pretrained(plain)
        packed: Any = AutoModelForCausalLM.from_pretrained(
            plain,
            dtype=dtype,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(**QUANTISATIONS[quantisation]),
        )
        packed.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def slowly_dequantised(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return a weight from the numbers in its file, in float64: 4 bits are an index of a code, 8 bits a number."""
    packed = tensors[f"{name}.weight"]
    if f"{name}.SCB" in tensors:
        return packed.double() * tensors[f"{name}.SCB"].double()[:, None] / 127
    state_key = next(key for key in tensors if key.startswith(f"{name}.weight.quant_state."))
    state = json.loads(bytes(tensors[state_key].tolist()))
    scales = tensors[f"{name}.weight.absmax"]
    if "nested_blocksize" in state:
        nested = tensors[f"{name}.weight.nested_absmax"].double().repeat_interleave(state["nested_blocksize"])
        code = tensors[f"{name}.weight.nested_quant_map"].double()
        scales = code[scales.long()] * nested[: len(scales)] + state["nested_offset"]
    pairs = packed.flatten().long()
    indices = torch.stack([pairs // 16, pairs % 16], dim=1).flatten()
    code, scale = tensors[f"{name}.weight.quant_map"].double(), scales.double().repeat_interleave(state["blocksize"])
    return (code[indices] * scale[: len(indices)]).reshape(state["shape"])


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_quantised_weights_are_the_matrices_of_their_file(
    quantise: Callable[..., Path], make_hf_model: Callable[..., PreTrainedModel], quantisation: str
) -> None:
    """Rows of 32 and 48 numbers: blocks of 64 run over their ends."""
    folder = quantise("llama", quantisation)
    model, tensors = icl.load_model(str(folder)), load_file(folder / "model.safetensors")
    original = make_hf_model("llama").state_dict()
    state = model.wrapped.original_model.state_dict()
    state = {path.replace("_original_component.", ""): tensor.double() for path, tensor in state.items()}
    names = [key.removesuffix(".weight") for key in tensors if key.endswith("proj.weight")]
    assert len(names) == 7 * model.n_layers
    for name in names:
        got = next(tensor for path, tensor in state.items() if path.endswith(f"{name}.weight"))
        torch.testing.assert_close(got, slowly_dequantised(tensors, name), atol=1e-6, rtol=1e-6)
        unquantised = original[f"{name}.weight"]
        assert (got - unquantised).norm() < (0.01 if quantisation == "int8" else 0.15) * unquantised.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "opt"])
@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_a_quantised_model_runs_a_whole_cell(
    quantise: Callable[..., Path],
    make_hf_model: Callable[..., PreTrainedModel],
    task: icl.Task,
    architecture: str,
    quantisation: str,
) -> None:
    """Its logits are near those of the model that was quantised, so no layer is transposed or left out."""
    model, plain, tokens = (
        icl.load_model(str(quantise(architecture, quantisation))),
        make_hf_model(architecture),
        torch.arange(20)[None],
    )
    with torch.no_grad():
        got, expected = model.run(tokens), plain(tokens).logits
    assert torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1] > (
        0.99 if quantisation == "int8" else 0.9
    )
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(3))
    fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
    experiment = icl.run_experiment(model, prompts, lr=0.01, replicas=0, fields=fields, progress=False)
    assert experiment.delta.W_K.abs().max() > 0
    assert experiment.decompose().residual < 1e-5
    assert experiment.updates(progress=False).residual < 1e-4


def test_a_quantised_model_counts_the_weights_that_it_becomes(
    quantise: Callable[..., Path], make_hf_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantise("llama", "nf4")
    n_weights = make_hf_model("llama").num_parameters()
    assert loading._n_weights(folder) == n_weights
    monkeypatch.setattr(loading, "free_memory", lambda device: 4 * n_weights - 1)
    for device_map in (None, "auto"):
        with pytest.raises(MemoryError, match=r"weights in float32, got .*bfloat16"):
            icl.load_model(str(folder), device_map=device_map)


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_quantised_model_is_dequantised_on_the_cpu_into_the_dtype_asked_for(
    quantise: Callable[..., Path], quantisation: str, stored: torch.dtype
) -> None:
    """Also what is not quantised, which transformers leaves in the dtype that it is stored in."""
    folder = quantise("llama", quantisation, stored)
    assert quantised.loading_options(folder) == {"device_map": {"": "cpu"}}, "transformers would take the first GPU"
    for dtype in (torch.float32, torch.bfloat16):
        model = icl.load_model(str(folder), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.run(torch.arange(9)[None]).isfinite().all()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_of_other_methods_are_refused_before_they_are_read(tmp_path: Path, method: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}})
    )
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(icl.UnsupportedModelError, match=f"quantised by {method}.*dequantize"):
        icl.load_model(str(tmp_path))


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(icl.UnsupportedModelError, match=r"pip install 'icl-dual\[bitsandbytes\]'"):
        icl.load_model(str(tmp_path))


def test_a_layer_of_an_unknown_kind_is_refused(quantise: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantise("llama", "nf4")
    monkeypatch.setattr(QuantState, "quant_type", "int3", raising=False)
    monkeypatch.setattr(QuantState, "__setattr__", _all_but_the_type)
    with pytest.raises(icl.UnsupportedModelError, match=r"q_proj: expected a layer of 4 bits .* got Linear4bit"):
        icl.load_model(str(folder))


def _all_but_the_type(state: Any, name: str, value: Any) -> None:
    if name != "quant_type":
        object.__setattr__(state, name, value)


def test_quantised_weights_outside_of_linear_layers_are_refused(quantise: Callable[..., Path]) -> None:
    """Packed numbers would be read as weights."""
    hf_model: Any = AutoModelForCausalLM.from_pretrained(quantise("llama", "nf4"), device_map={"": "cpu"})
    packed = torch.zeros(32, dtype=torch.uint8)
    hf_model.model.norm.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(icl.UnsupportedModelError, match=r"model\.norm\.weight: expected .* got others in torch\.uint8"):
        quantised.dequantised("tiny", hf_model, torch.float32)


@pytest.mark.parametrize("quantisation", ["nf4", "fp4"])
def test_scales_that_are_quantised_have_scales_by_block(quantisation: str) -> None:
    """A matrix of more than one block of scales, which those of the tiny models do not fill."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = torch.randn(128, 192) * torch.linspace(1, 3, 128)[:, None]
    modules: Any = import_module("bitsandbytes.nn")
    parameter = modules.Params4bit(plain, requires_grad=False, compress_statistics=True, quant_type=quantisation)
    layer = modules.Linear4bit(192, 128, bias=False, compress_statistics=True, quant_type=quantisation)
    layer.weight = parameter.to("cpu")
    state = layer.weight.quant_state
    assert len(state.state2.absmax) == 2
    got = quantised._matrix("tiny", layer)
    by_row = (got - plain).norm(dim=1) / plain.norm(dim=1)
    assert by_row.max() < 0.2
