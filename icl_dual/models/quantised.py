"""Weights that are stored quantised: which of them can be read, and how they become plain matrices.

Hooks, finetuning and the exact split read W_K, W_V and W_O as matrices in floating point, which quantised layers do not
have. GGUF files are dequantised before they come here (`icl_dual.assets`). Checkpoints of bitsandbytes, in 4 or 8 bits,
are read by transformers and dequantised here; those of other methods are refused.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from icl_dual.models.backend import UnsupportedModelError
from icl_dual.type_guards import is_dict

BITSANDBYTES = "bitsandbytes"


def quantisation_method(folder: Path) -> str | None:
    """Return the method that a model folder's weights are quantised by; `None` where they are in floating point."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # transformers says what is wrong with it
    quantisation = settings.get("quantization_config") if is_dict(settings) else None
    if not quantisation:
        return None
    return str(quantisation.get("quant_method", quantisation) if is_dict(quantisation) else quantisation)


def check_dequantisable(name: str, folder: Path) -> None:
    """Raise an UnsupportedModelError where a folder's weights are quantised and cannot be dequantised here."""
    method = quantisation_method(folder)
    if method is None:
        return
    if method != BITSANDBYTES:
        raise UnsupportedModelError(
            f"{name}: expected weights in floating point, in a GGUF file or quantised by {BITSANDBYTES}, got weights "
            f"quantised by {method}: load the model it was made of, a GGUF file of it (which is dequantised), or "
            "dequantise it with transformers (model.dequantize()) and save that with save_pretrained"
        )
    if find_spec(BITSANDBYTES) is None:
        raise UnsupportedModelError(
            f"{name}: expected the package {BITSANDBYTES} for weights that it has quantised, got none: pip install "
            f"'icl-dual[{BITSANDBYTES}]'"
        )


def loading_options(folder: Path) -> dict[str, Any]:
    """Return what transformers needs to be told to load a folder's weights on the CPU, quantised or not."""
    return {} if quantisation_method(folder) is None else {"device_map": {"": "cpu"}}  # it would take the first GPU


def dequantised(name: str, hf_model: Any, dtype: torch.dtype) -> Any:
    """Return a model with its quantised layers as plain ones.

    Raises:
        UnsupportedModelError: a layer is quantised in a way that is not known here.
    """
    if not getattr(hf_model, "is_quantized", False):
        return hf_model
    plain: Any = dict(cast(Any, _plain_model(hf_model.config)).named_modules())
    for path, layer in list(hf_model.named_modules()):
        if type(layer).__module__.startswith(BITSANDBYTES):
            matrix = _matrix(f"{name}, {path}", layer).to(dtype)
            # GPT-2's own layers have transposed weights; bitsandbytes has linear layers in place of both.
            plain[path].weight = nn.Parameter(matrix.T.contiguous() if isinstance(plain[path], Conv1D) else matrix)
            plain[path].bias = layer.bias
            hf_model.set_submodule(path, plain[path])
    hf_model.hf_quantizer.remove_quantization_config(hf_model)
    for path, parameter in hf_model.named_parameters():
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{name}, {path}: expected quantised weights in linear layers alone, got others in {parameter.dtype}: "
                "load the model it was made of"
            )
        parameter.data = parameter.data.to(dtype)  # transformers leaves what is not quantised as it is stored
    return hf_model


def _matrix(name: str, layer: Any) -> Float[Tensor, "d_out d_in"]:
    """Return a quantised layer's weight: 8 bits are a number, 4 bits an index of a code, times scales.

    Not by bitsandbytes' own function: on a CPU, version 0.50.2 gives other matrices where rows are no multiple of the
    block (`tests/models/test_quantised.py`).
    """
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is not None and state.quant_type in ("nf4", "fp4"):
        packed = weight.data.view(torch.uint8).flatten()
        indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
        scales = state.absmax
        if state.nested:  # scales are quantised, too
            outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)
            scales = state.state2.code[scales.int()] * outer[: len(scales)] + state.offset
        values = state.code[indices] * scales.repeat_interleave(state.blocksize)[: len(indices)]
        return values.reshape(state.shape)
    if weight.dtype == torch.int8 and weight.SCB is not None:
        return weight.data * (weight.SCB[:, None] / 127)
    raise UnsupportedModelError(
        f"{name}: expected a layer of 4 bits (nf4, fp4) or of 8 bits, got {type(layer).__name__} with weights in "
        f"{weight.dtype}: load the model it was made of"
    )


def weight_sizes(folder: Path) -> dict[str, int]:
    """Return the number of numbers in each weight of a quantised folder's model once it is dequantised."""
    config = cast(Any, AutoConfig).from_pretrained(folder, trust_remote_code=False)
    delattr(config, "quantization_config")
    return {name: parameter.numel() for name, parameter in _plain_model(config).named_parameters()}


def _plain_model(config: PretrainedConfig) -> nn.Module:
    """Return the model of a configuration without its numbers."""
    with torch.device("meta"):
        return cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=False)
