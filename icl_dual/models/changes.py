"""Changes of attention's projections that run beside the weights: y = W x + ΔW x.

Weights in half precision would round a small change away. Beside them, it keeps its own precision.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

from jaxtyping import Float
from torch import Tensor

from icl_dual.models.backend import ProjectionDelta, ProjectionName
from icl_dual.models.journal import Undo
from icl_dual.torch_utils import at_least_float32

if TYPE_CHECKING:
    from icl_dual.models.model import Model

WeightChanges = Mapping[str, Float[Tensor, "layer *axes"]]
"""ΔW `[layer d_out d_in]` and Δb `[layer d_out]` by name: `W_K`, `b_K`, `W_V` and so on."""


@contextmanager
def changed_projections(model: "Model", changes: WeightChanges) -> Generator["Model"]:
    """Run a model with changed projections inside a `with` block, its weights left as they are.

    Every run adds ΔW x + Δb to the projections' outputs, computed in float32 at least. Inside the block the model has
    another fingerprint.

    Args:
        model: the model to run; one that `supports_projection_deltas`.
        changes: the change of each projection that changes.
    """
    with model.journal.block() as undo:
        add_changes(model, changes, undo)
        yield model


def add_changes(model: "Model", changes: WeightChanges, undo: Undo) -> None:
    """Add changes of projections to every run, until the block ends."""
    on_device = {name: change.to(model.device) for name, change in changes.items()}
    undo.set(model, "weight_changes", (*model.weight_changes, on_device))


def projection_deltas_of(changes: Mapping[str, Tensor | Sequence[Tensor]]) -> dict[ProjectionName, ProjectionDelta]:
    """Return the functions that compute ΔW x + Δb of each changed projection in float32 at least, for `Model.run`.

    Args:
        changes: by name and by layer, ΔW `[d_out d_in]` and Δb `[d_out]`; or those of several runs, `[run d_out d_in]`
            and `[run d_out]`, of which a batch has as many rows each, one run after the other. They are read when the
            functions are called.
    """

    def delta_of(layer: int, kind: ProjectionName, x: Tensor) -> Tensor:
        W = changes[f"W_{kind}"][layer]
        by_run = at_least_float32(x) if W.ndim == 2 else at_least_float32(x).reshape(len(W), -1, x.shape[-1])
        output = by_run @ W.mT
        if f"b_{kind}" in changes:
            output = output + changes[f"b_{kind}"][layer].unsqueeze(-2)
        return output.view(*x.shape[:-1], -1)

    return {kind: delta_of for kind in get_args(ProjectionName) if f"W_{kind}" in changes}
