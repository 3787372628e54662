"""Finetuned copies of a model: wrapped as the model is, and compared weight by weight."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import BlockBridge, TransformerBridge
from transformers import PreTrainedModel

from icl_dual.models.adapters import is_peft_model, load_adapter_weights
from icl_dual.models.bridge import boot
from icl_dual.models.hooked import is_hooked_transformer
from icl_dual.models.model import Model
from icl_dual.models.momentum_gpt2 import MomentumForCausalLM

SHAPE = (
    "architecture",
    "n_layers",
    "n_heads",
    "n_key_value_heads",
    "d_model",
    "d_head",
    "d_vocab",
    "dtype",
    "storage_dtype",
)
"""The attributes in which a finetuned copy agrees with its model."""


def wrap_finetuned(model: Model, tuned: object) -> Model:
    """Return a finetuned copy of a model as a `Model` of the same name, tokenizer and momentum.

    Args:
        model: the model before finetuning.
        tuned: a `Model`, which is returned as it is; a `TransformerBridge` or a `HookedTransformer`; or a Hugging Face
            model, of which a copy is wrapped.

    Raises:
        ValueError: tuned is of another class, architecture, shape, dtype or momentum; says which.
    """
    wrapped = _wrapped(model, tuned)
    for name in SHAPE:
        expected, got = getattr(model, name), getattr(wrapped, name)
        if got != expected:
            raise _mismatch(model, name, got)
    if type(wrapped.backend) is not type(model.backend):
        raise ValueError(
            f"expected tuned as a {type(model.wrapped).__name__}, as {model.name!r} is, got a "
            f"{type(wrapped.wrapped).__name__}, which keeps other weights: load both by the same class"
        )
    eta, eta_tuned = model.momentum, wrapped.momentum
    if (eta is None) != (eta_tuned is None) or (
        eta is not None and eta_tuned is not None and not torch.equal(eta, eta_tuned)
    ):
        raise ValueError(
            f"expected tuned with the momentum of {model!r}, got {wrapped!r}: finetune with the same η throughout"
        )
    return wrapped


def _wrapped(model: Model, tuned: Any) -> Model:
    options = {"name": model.name, "momentum": model.momentum, "tokenizer": model.tokenizer}
    if isinstance(tuned, Model):
        return tuned
    if isinstance(tuned, TransformerBridge) or is_hooked_transformer(tuned):
        return _with_arithmetic_of(model, tuned, options)
    if is_peft_model(tuned):
        raise ValueError(
            f"expected tuned as a model without adapters, got a {type(tuned).__name__}: merge them first "
            "(merge_and_unload), or pass the adapter's folder to icl_dual.WeightDelta.from_adapter"
        )
    if not isinstance(tuned, PreTrainedModel):
        raise ValueError(
            "expected tuned as an icl_dual.Model, a TransformerBridge or a Hugging Face PreTrainedModel, got "
            f"{type(tuned).__name__}: merge adapters first (merge_and_unload), or load a folder by icl_dual.load_model"
        )
    if any(isinstance(module, BlockBridge) for module in tuned.modules()):
        raise ValueError(
            f"expected tuned as a Hugging Face model that no bridge is around, got {type(tuned).__name__} within a "
            "TransformerBridge: pass the bridge, or the icl_dual.Model"
        )
    hf_model: Any = copy.deepcopy(tuned)  # booting replaces the modules of the model that it is given
    if isinstance(hf_model, MomentumForCausalLM):
        options["momentum"] = hf_model.eta if hf_model.eta.any() else None
        hf_model = hf_model.without_momentum()
    if (architecture := type(hf_model).__name__) != model.architecture:
        raise _mismatch(model, "architecture", architecture)
    hf_model.config.architectures = [architecture]
    device = torch.device("cpu") if model.offloaded else model.device  # there may be no room for both
    hf_model = nn.Module.to(hf_model.eval(), device)
    tokenizer = model.backend.tokenizer
    bridge = boot(model.architecture, hf_model, tokenizer, device, hf_model.dtype)
    return _with_arithmetic_of(model, bridge, options)


def wrap_adapter(model: Model, folder: Path, base: str | None) -> Model:
    """Return a `Model` of the weights that a saved adapter adds to a model, and zero elsewhere.

    Args:
        model: the model that the adapter belongs to.
        folder: the adapter's folder.
        base: the name under which the adapter knows the model; the model's own by default.

    Raises:
        ImportError: peft is not installed.
        AssetError: the folder holds no adapter, or a damaged one.
        UnsupportedModelError: the model is not behind a bridge.
        ValueError: the adapter does more than add matrices to weights, or belongs to another model; says how.
    """
    hf_model = load_adapter_weights(model, folder, base)
    hf_model.config.architectures = [model.architecture]
    bridge = boot(model.architecture, hf_model, model.backend.tokenizer, "cpu", hf_model.dtype)
    return Model(bridge, name=model.name)


def _with_arithmetic_of(model: Model, wrapped: Any, options: dict[str, Any]) -> Model:
    """Wrap a copy, to run in the model's arithmetic where its weights have the dtype of the model's."""
    is_same = next(wrapped.parameters()).dtype == model.storage_dtype
    return Model(wrapped, **options, arithmetic=model.backend.arithmetic if is_same else None)


def _mismatch(model: Model, name: str, got: object) -> ValueError:
    return ValueError(
        f"expected tuned to be a finetuned copy of {model.name!r}, with {name}={getattr(model, name)}, got {name}={got}"
        ": pass a copy of the same model, loaded with the same dtype"
    )


def weights_beyond_projections(model: Model) -> dict[str, nn.Parameter]:
    """Return every weight but those of attention's four projections, by its name in the model."""
    excluded = {id(parameter) for parameter in _projection_parameters(model)}
    original: Any = getattr(model.wrapped, "original_model", model.wrapped)
    named = original.named_parameters()
    return {name.replace("_original_component.", ""): weight for name, weight in named if id(weight) not in excluded}


def _projection_parameters(model: Model) -> Iterator[nn.Parameter]:
    """Yield the parameters of attention's projections, and the fused ones that a bridge has split them from."""
    for kind in ("Q", "K", "V", "O"):
        for W, b in model.projections(kind):
            yield W.parameter
            if b is not None:
                yield b.parameter
    for block in model.wrapped.blocks:
        fused = getattr(block.attn, "qkv", None)
        if fused is not None:
            yield from fused.parameters()
