"""Changes of the residual stream that every run makes: a vector is added after a layer, at the token that predicts the
label."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.models.journal import Undo
from icl_dual.torch_utils import at_least_float32

if TYPE_CHECKING:
    from icl_dual.models.model import Model


@dataclass(frozen=True)
class StreamChange:
    """A vector that is added to the residual stream after one layer, at each row's token that predicts the label."""

    layer: int
    """The layer's index."""
    vector: Float[Tensor, " d_model"]
    """What is added."""

    def callback(
        self, tokens: Int[Tensor, "batch pos"], predicting: Int[Tensor, " row"] | None
    ) -> Callable[[int, Tensor], Tensor | None]:
        """Return what a run calls with each layer and the stream after it.

        Args:
            tokens: the token ids that run.
            predicting: the index of each row's token that predicts the label; empty where the rows have none, so that
                nothing is added. `None` for the last token of every row.
        """
        if predicting is None:
            predicting = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        rows = torch.arange(len(predicting), device=tokens.device)

        def add(layer: int, stream: Tensor) -> Tensor | None:
            if layer != self.layer or not len(rows):
                return None
            changed = stream.clone()
            changed[rows, predicting] = (at_least_float32(stream[rows, predicting]) + self.vector).to(stream.dtype)
            return changed

        return add


def has_norm_after_attention(model: "Model", layer: int) -> bool:
    """Return whether a layer's attention output passes a norm before it is added to the residual stream."""
    return any(name.startswith(f"blocks.{layer}.ln1_post.") for name in model.backend.hook_points)


def add_stream_change(model: "Model", change: StreamChange, undo: Undo) -> None:
    """Add a vector in every run, until the block ends. Inside the block the model has another fingerprint."""
    on_device = StreamChange(change.layer, change.vector.to(model.device))
    undo.set(model, "stream_changes", (*model.stream_changes, on_device))
