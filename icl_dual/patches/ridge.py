"""Ridge regression from sums over rows: the memory does not grow with their number.

ΔW = argmin Σ_i ‖t_i − ΔW h_i‖² + λ ‖ΔW‖² = TᵀH (HᵀH + λI)⁻¹ needs HᵀH and TᵀH only, and both add up over rows.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import Count, Finite, checked
from icl_dual.field_docs import document_fields
from icl_dual.results import check_axes, check_range, check_values
from icl_dual.storage import Saved
from icl_dual.torch_utils import linalg

WELL_CONDITIONED = 1e-7
"""From this λ on, in units of tr(HᵀH), a Cholesky factorisation of HᵀH + λI loses less than 9 digits in float64."""

OVERSAMPLING = 8
"""How many random vectors more than the rank are taken to span the columns of a matrix."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class RidgeStatistics(Saved):
    """The sums over rows (h_i, t_i) that a ridge regression of t on h needs, in float64.

    Example:
        >>> H, T = torch.eye(2, dtype=torch.float64), torch.tensor([[2.0], [4.0]], dtype=torch.float64)
        >>> statistics = RidgeStatistics.empty(d_in=2, d_out=1).with_rows(H, T)
        >>> statistics.solve(1.0).round(decimals=9)
        tensor([[1., 2.]], dtype=torch.float64)
    """

    gram: Float[Tensor, "d_in d_in"]
    """HᵀH = Σ_i h_i ⊗ h_i."""
    cross: Float[Tensor, "d_out d_in"]
    """TᵀH = Σ_i t_i ⊗ h_i."""
    n_rows: int
    """The number of rows."""

    def __post_init__(self) -> None:
        check_axes(self)
        check_values(self, "n_rows", low=0)
        check_sums(self, "gram", "cross")

    def __repr__(self) -> str:
        return f"RidgeStatistics({self.n_rows} rows, {self.cross.shape[1]} → {self.cross.shape[0]})"

    @classmethod
    @checked
    def empty(cls, *, d_in: Count, d_out: Count) -> "RidgeStatistics":
        """Return the sums over no rows."""
        zeros = torch.zeros(d_in + d_out, d_in, dtype=torch.float64)
        return cls(zeros[:d_in], zeros[d_in:], 0)

    @checked
    def with_rows(self, h: Float[Tensor, "row d_in"], t: Float[Tensor, "row d_out"]) -> "RidgeStatistics":
        """Return the sums with more rows added.

        Args:
            h: what is regressed on.
            t: the targets.
        """
        h, t = (rows.detach().to(self.gram) for rows in (h, t))
        return replace(self, gram=self.gram + h.mT @ h, cross=self.cross + t.mT @ h, n_rows=self.n_rows + len(h))

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        """Return the sums over the rows of both.

        Raises:
            ValueError: their rows have other widths.
        """
        if self.cross.shape != other.cross.shape:
            raise ValueError(
                f"expected sums over rows of the same widths, got {self!r} and {other!r}: sum rows of one regression"
            )
        return RidgeStatistics(self.gram + other.gram, self.cross + other.cross, self.n_rows + other.n_rows)

    @checked
    def scaled_ridge(self, relative_ridge: Finite) -> float:
        """Return λ = relative_ridge · ‖HᵀH‖² / tr(HᵀH), which grows as HᵀH does; 0 where all h are zero."""
        trace = self.gram.trace().item()
        return relative_ridge * self.gram.square().sum().item() / trace if trace else 0.0

    @checked
    def solve(self, ridge: float) -> Float[Tensor, "d_out d_in"]:
        """Return ΔW = TᵀH (HᵀH + λI)⁻¹, in float64.

        Args:
            ridge: λ. With 0, ΔW is the least-squares solution, which must be the only one.

        Raises:
            ValueError: ridge is negative, infinite or NaN; or it is 0 and HᵀH is singular.
        """
        left, right = self._solution(ridge)
        return left @ right.mT

    @checked
    def factors(self, ridge: float) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "d_in rank"]]:
        """Return ΔW = left @ right.T as its singular directions, in float64, without computing ΔW.

        The rank is at most the number of rows. With fewer rows than outputs, that is what the cost depends on.

        Args:
            ridge: λ. With 0, ΔW is the least-squares solution, which must be the only one.

        Returns:
            left: the left singular vectors times the singular values, largest first.
            right: the right singular vectors.

        Raises:
            ValueError: ridge is negative, infinite or NaN; or it is 0 and HᵀH is singular.
        """
        return by_singular_value(*self._solution(ridge), self.n_rows)

    def _solution(self, ridge: float) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, "d_in k"]]:
        """Return ΔW as two factors of any kind."""
        if not 0 <= ridge < math.inf:
            raise ValueError(f"expected ridge (λ) as a finite number of at least 0, got {ridge}: pass a positive one")
        if ridge > WELL_CONDITIONED * self.gram.trace():
            outputs = range_of(self.cross, self.n_rows)  # (HᵀH + λI)⁻¹ acts on the other side of TᵀH
            system = self.gram + ridge * torch.eye(len(self.gram), dtype=self.gram.dtype)
            return outputs, torch.cholesky_solve(self.cross.mT @ outputs, linalg.cholesky(system))
        values, vectors = linalg.eigh(self.gram)
        rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
        in_rows = values > rounding  # in other directions TᵀH is rounding alone, which a small λ would blow up
        if ridge == 0 and not in_rows.all():
            raise ValueError(
                f"expected ridge (λ) above 0, as HᵀH of {self.n_rows} rows has rank {int(in_rows.sum())} and not "
                f"{len(values)}, got 0: pass a positive one, or add more rows"
            )
        return self.cross @ vectors[:, in_rows] / (values[in_rows] + ridge), vectors[:, in_rows]


def check_sums(result: Any, *fields: str) -> None:
    """Check that sums over rows, HᵀH as `gram` among them, are finite and in float64, and squares not below 0.

    Raises:
        ValueError: a sum is not finite or of another dtype, or HᵀH has a negative number on its diagonal.
    """
    for name in fields:
        if (dtype := getattr(result, name).dtype) != torch.float64:
            raise ValueError(f"expected {name} in float64, got {str(dtype).removeprefix('torch.')}: sum the rows again")
    check_values(result, *fields)
    check_range("the diagonal of gram", result.gram.diagonal(dim1=-2, dim2=-1), low=0)


def range_of(matrix: Float[Tensor, "d_out d_in"], rank: int) -> Float[Tensor, "d_out k"]:
    """Return orthonormal columns that span the columns of a matrix of rank at most `rank`.

    The product with random vectors spans them too (Halko et al. 2011, algorithm 4.1); the vectors are always the same.
    """
    d_out, d_in = matrix.shape
    if rank + OVERSAMPLING >= d_out:
        return torch.eye(d_out, dtype=matrix.dtype)
    generator = torch.Generator().manual_seed(0)
    return linalg.qr(matrix @ torch.randn(d_in, rank + OVERSAMPLING, dtype=matrix.dtype, generator=generator)).Q


def by_singular_value(
    left: Float[Tensor, "d_out k"], right: Float[Tensor, "d_in k"], rank: int
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "d_in rank"]]:
    """Return left @ right.T as left singular vectors times singular values, and right singular vectors.

    Args:
        left: one factor.
        right: the other one.
        rank: the largest number of directions to return, the leading ones.
    """
    left_basis, left_rest = linalg.qr(left)
    right_basis, right_rest = linalg.qr(right)
    U, S, Vh = linalg.svd(left_rest @ right_rest.mT, full_matrices=False)
    return (left_basis @ U * S)[:, :rank], (right_basis @ Vh.mT)[:, :rank]
