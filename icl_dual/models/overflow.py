"""Where activations first overflow: infinite or NaN values in a forward pass, mostly of half precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from icl_dual.models.backend import OnTensor
from icl_dual.models.model import Model
from icl_dual.torch_utils import is_half

ADVICE = {
    torch.float16: "load it with dtype=torch.bfloat16 or torch.float32, or with dtype=torch.float16, "
    "arithmetic=torch.float32",
    torch.bfloat16: "load it with dtype=torch.float32, or with dtype=torch.bfloat16, arithmetic=torch.float32",
}
"""What to do about an overflow, by the dtype of the computation."""


class NonFiniteError(ValueError):
    """A forward pass of the model itself, before any finetuning, has activations that are infinite or NaN."""


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element of a tensor is infinite or NaN. Reads the tensor once and writes nothing."""
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_activations(model: Model, run: Callable[..., Tensor]) -> None:
    """Check a forward pass layer by layer. It is for a pass whose result is not finite, to find where that began.

    Args:
        model: the model.
        run: repeats the pass, with the arguments `on_output` and `on_residual` of `Model.run`.

    Raises:
        NonFiniteError: an attention output, the residual stream after a layer, or the logits are infinite or NaN; names
            the first layer.
    """
    first: list[str] = []

    def check(name: str, tensor: Tensor) -> None:
        if not first and not is_finite(tensor):
            first.append(name)

    def check_layers(name: str) -> OnTensor:
        return lambda layer, tensor: check(f"{name} layer {layer}", tensor)

    with torch.no_grad():
        logits = run(
            on_output=check_layers("the attention output of"),
            on_residual=check_layers("the residual stream after"),
        )
    check("the logits", logits.amax())  # a model may mask tokens by a logit of −∞
    if first:
        advice = ADVICE.get(model.dtype, "check its weights, which may be damaged")
        largest = f", which ends at {torch.finfo(model.dtype).max:.3g}" if is_half(model.dtype) else ""
        raise NonFiniteError(
            f"{model.name} ({model.architecture}), computed in {str(model.dtype).removeprefix('torch.')}{largest}: "
            f"expected finite activations, got infinite or NaN values, first in {first[0]}: {advice}"
        )
