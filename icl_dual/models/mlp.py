"""Changes of MLPs that run beside the weights: y = W x + ΔW x, with ΔW as a product of thin factors.

The weights stay as they are, whatever their precision. What a change adds is computed in float32 at least.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.field_docs import document_fields
from icl_dual.models.backend import MlpPart
from icl_dual.models.journal import Undo
from icl_dual.models.tokenization import Tokens
from icl_dual.results import compare_by_value
from icl_dual.torch_utils import at_least_float32, linalg, to_list

if TYPE_CHECKING:
    from icl_dual.models.model import Model


@compare_by_value
@document_fields
class LowRank(NamedTuple):
    """A change of one matrix at every layer, ΔW = Σ_r left_r ⊗ right_r. ΔW itself is never computed."""

    left: Float[Tensor, "layer _ rank"]
    """What the change writes: by layer, d_out numbers for each rank."""
    right: Float[Tensor, "layer _ rank"]
    """What the change reads: by layer, d_in numbers for each rank."""

    def __repr__(self) -> str:
        n_layers, d_out, rank = self.left.shape
        return f"LowRank({n_layers} layers, {d_out} × {self.right.shape[1]}, rank {rank})"

    def act(self, layer: int, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Return ΔW x of one layer, in float32 at least."""
        return at_least_float32(x) @ self.right[layer] @ self.left[layer].mT

    def singular_values(self) -> Float[Tensor, "layer rank"]:
        """Return the singular values of ΔW by layer, in float64, largest first.

        Example:
            >>> change = LowRank(torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[2.0], [0.0], [0.0]]]))
            >>> change.singular_values()
            tensor([[10.]], dtype=torch.float64)
        """
        left, right = (linalg.qr(factor.double().cpu(), mode="r").R for factor in self)
        return linalg.svdvals(left @ right.mT)


@dataclass(frozen=True)
class MlpChanges:
    """Changes of the MLPs of all layers."""

    factors: Mapping[str, LowRank]
    """The changes of projections, by part: `gate`, `in` and `out`."""
    bias: Float[Tensor, "layer d_model"] | None = None
    """What is added to what the MLPs write: to the output of `bias_part`."""
    scale: Float[Tensor, "layer d_model"] | None = None
    """What is added to the scale of the norms after the MLPs."""
    query: Tokens | None = None
    """The only token ids that may run, at positions 0, 1, …; `None` for any."""
    model: str = ""
    """The name of the model that may run the query: momentum changes it. Empty without a query."""
    bias_part: MlpPart = "out"
    """The part to whose output the bias is added: the last one of the MLP."""

    def to(self, device: torch.device) -> "MlpChanges":
        """Return a copy of the changes on a device.

        How products of matrices round depends on where these lie in memory: a copy of a file's lies as fresh ones do.
        """
        copied = functools.partial(torch.Tensor.to, device=device, copy=True)
        factors = {part: LowRank(*map(copied, low_rank)) for part, low_rank in self.factors.items()}
        bias, scale = (None if change is None else copied(change) for change in (self.bias, self.scale))
        return replace(self, factors=factors, bias=bias, scale=scale)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the changes."""
        for low_rank in self.factors.values():
            yield from low_rank
        yield from (change for change in (self.bias, self.scale) if change is not None)

    def check(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " pos"], name: str, *, after_cache: bool
    ) -> None:
        """Check that a run is of the query, or of a part of it, at the query's positions.

        With a change of a norm's scale it must be of the whole, in one row: such a change may be 10⁷ times the scale.
        It would blow up the rounding by which a run in parts or of several rows differs, layer by layer.

        Args:
            tokens: the token ids that run.
            positions: their positions.
            name: the name of the model that runs them.
            after_cache: whether they may read tokens that ran before them.

        Raises:
            ValueError: it is of other tokens, at other positions, without the tokens before them, of another model, or
                of a part or of several rows where it must be of the whole in one row.
        """
        if self.query is None:
            return
        if name != self.model:
            raise ValueError(
                f"expected a run of {self.model!r}, which the patch was built for, got one of {name!r}: leave the "
                "`with` block that changes the model inside of the patch's, or build the patch inside of it"
            )
        first, last = int(positions[0]), int(positions[-1])
        part = torch.tensor(self.query[first : last + 1], device=tokens.device)
        has_prefix = first == 0 or after_cache
        if not (
            has_prefix and to_list(positions) == list(range(first, first + len(part))) and bool((tokens == part).all())
        ):
            raise ValueError(
                f"expected the query that the patch was built for, {list(self.query)} at positions 0 to "
                f"{len(self.query) - 1}, got {to_list(tokens)} at positions {to_list(positions)}: an exact patch is "
                "for one query at one position, build another one for this query"
            )
        if self.scale is not None and (len(part) < len(self.query) or len(tokens) > 1):
            raise ValueError(
                f"expected all {len(self.query)} tokens of the query in one run of one row, got {len(tokens)} at "
                f"positions {to_list(positions)}: the patch changes norms' scales so much that it is exact in this run "
                "alone, use model.run on [patch.query], or icl_dual.capture_each"
            )

    def apply(self, layer: int, part: MlpPart, x: Tensor, output: Tensor) -> Tensor | None:
        """Return a part's output with what its changes add to it; `None` where nothing changes."""
        terms: list[Tensor] = []
        if part in self.factors:
            terms.append(self.factors[part].act(layer, x))
        if part == self.bias_part and self.bias is not None:
            terms.append(self.bias[layer])
        if part == "scale" and self.scale is not None:
            terms.append(self.scale[layer] * x)
        return (output + functools.reduce(torch.add, terms)).to(output.dtype) if terms else None


def add_mlp_changes(model: "Model", changes: MlpChanges, undo: Undo) -> None:
    """Add changes of MLPs to every run, until the block ends. Inside the block the model has another fingerprint.

    A bias is added after the norm that follows the MLP, where there is one.
    """
    bias_part: MlpPart = "scale" if model.backend.mlp_form(0).shift == "scale" else "out"
    changes = replace(changes.to(model.device), bias_part=bias_part)
    undo.set(model, "mlp_changes", (*model.mlp_changes, changes))
