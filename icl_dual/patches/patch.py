"""`Patch`: a change of a model's MLPs as a result, which can be saved, measured and applied for a while."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import checked
from icl_dual.field_docs import document_fields
from icl_dual.models import LowRank, MlpPart, Model
from icl_dual.models.journal import Undo, exclusive
from icl_dual.models.mlp import MlpChanges, add_mlp_changes
from icl_dual.models.precision import fingerprinted_precision
from icl_dual.results import check_axes, check_count, check_values
from icl_dual.storage import Saved
from icl_dual.torch_utils import to_list, vector_norm

CHANGED_PARTS: tuple[MlpPart, ...] = ("gate", "in", "out")
"""The parts of an MLP that have a matrix to change."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class Patch(Saved):
    """A change of a model's MLPs, as thin factors. It runs beside the weights, which stay as they are."""

    model: str
    """The name of the model."""
    fingerprint: str
    """The fingerprint of the model's weights that the patch was built for; it begins with their precision."""
    factors: dict[str, LowRank]
    """The changes of projections: `in` of the input projection, `gate` of the gate's, `out` of the down projection.
    All have the same rank, filled up with zeros where one needs less."""
    bias: Float[Tensor, "layer d_model"] | None
    """The change of the bias of the down projection; `None` where there is none."""
    scale: Float[Tensor, "layer d_model"] | None
    """The change of the scale of the norm after the MLP; `None` where there is none."""

    def __post_init__(self) -> None:
        if unknown := sorted(self.factors.keys() - {*CHANGED_PARTS}):
            raise ValueError(f"expected factors by some of {CHANGED_PARTS}, got {unknown}: leave these out")
        check_values(self, "factors", "bias", "scale")
        self._check_widths(check_axes(self))

    def _check_widths(self, axes: dict[str, int]) -> None:
        """Check that the factors of all parts, and the fields with an axis `d_model`, are of one MLP."""
        vectors = (name for name in ("bias", "scale", "stream") if getattr(self, name, None) is not None)
        widths = {"d_model": (next(vectors), axes["d_model"])} if "d_model" in axes else {}
        for part, low_rank in self.factors.items():
            written, read = ("d_model", "d_hidden") if part == "out" else ("d_hidden", "d_model")
            for side, width, factor in zip(low_rank._fields, (written, read), low_rank, strict=True):
                path, length = f"factors/{part}/{side}", factor.shape[1]
                source, expected = widths.setdefault(width, (path, length))
                check_count(f"elements of {width} in {path}", length, source, expected)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, {self.precision}, rank={self.rank}, norm={self.norm:.3g})"

    @property
    def precision(self) -> str:
        """The precision of the model that the patch was built for, e.g. `float32`."""
        return fingerprinted_precision(self.fingerprint)

    @property
    def norms(self) -> dict[str, Float[Tensor, " layer"]]:
        """The Frobenius norm of each change by layer: of `in`, `gate`, `out`, `bias` and `scale`, where they change."""
        norms = {part: vector_norm(low_rank.singular_values(), dim=-1) for part, low_rank in self.factors.items()}
        vectors = {"bias": self.bias, "scale": self.scale}
        return norms | {name: vector_norm(v.double().cpu(), dim=-1) for name, v in vectors.items() if v is not None}

    @property
    def norm(self) -> float:
        """The Frobenius norm of all changes of all layers together."""
        return vector_norm(torch.cat([*self.norms.values(), torch.zeros(1, dtype=torch.float64)])).item()

    @property
    def rank(self) -> int:
        """The largest rank of the change of a matrix."""
        ranks = [0]
        for low_rank in self.factors.values():
            values = low_rank.singular_values()
            rounding = max(low_rank.left.shape[1], low_rank.right.shape[1]) * torch.finfo(low_rank.left.dtype).eps
            ranks += to_list((values > values[:, :1] * rounding).sum(dim=-1))
        return max(ranks)

    @checked
    @contextmanager
    def applied(self, model: Model) -> Generator[Model]:
        """Yield the model with the patch; afterwards it is as it was, bit for bit, also after an exception.

        Each projection adds ΔW x to its output, in float32 at least. No weight is written.

        Raises:
            ValueError: the patch belongs to another model, to other weights of it, or to another precision. Runs inside
                the block raise one for a query that the patch does not fit.
        """
        with model.journal.block() as undo:
            _apply(model, self, undo)
            yield model

    def changes(self) -> MlpChanges:
        """Return the changes as a run of the model takes them."""
        return MlpChanges(self.factors, self.bias, self.scale)


@exclusive
def _apply(model: Model, patch: Patch, undo: Undo) -> None:
    """Add a patch to every run of a model, until the block ends."""
    check_model(model, patch.model, patch.fingerprint)
    add_mlp_changes(model, patch.changes(), undo)


def check_model(model: Model, name: str, fingerprint: str) -> None:
    """Check that a model is the one that a patch was built for.

    Args:
        model: the model.
        name: the name of the model that the patch was built for.
        fingerprint: the fingerprint of its weights.

    Raises:
        ValueError: it is another model, has other weights, or another precision.
    """
    if name != model.name:
        raise ValueError(
            f"expected a patch of {model.name!r}, got one of {name!r}: apply it to the model it was built for"
        )
    precision = fingerprinted_precision(fingerprint)
    if precision != model.precision:
        raise ValueError(
            f"expected a patch of {model.name!r} in the model's precision, {model.precision}, got one for "
            f"{precision}: build it again, or load the model in the patch's precision with dtype and arithmetic "
            "of icl_dual.load_model"
        )
    if fingerprint != (current := model.fingerprint()):
        raise ValueError(
            f"expected a patch of these weights of {model.name!r} (fingerprint {current}), got one of "
            f"{fingerprint}: is a delta or another patch applied, or was it built for another model?"
        )


def check_tokens(result: object, *fields: str) -> None:
    """Check that fields of a result hold token ids, at least one each.

    Raises:
        ValueError: a field has none, or a negative one; names the field.
    """
    check_values(result, *fields, low=0)
    for name in fields:
        if not getattr(result, name):
            raise ValueError(f"expected {name} with at least one token id, got none: take it from the prompt that ran")
