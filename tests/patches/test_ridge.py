"""Ridge regression from sums, against least squares on the stacked rows."""

import numpy as np
import pytest
import torch
from helpers import draw, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.patches import RidgeStatistics


def stacked(h: torch.Tensor, t: torch.Tensor, ridge: float) -> torch.Tensor:
    """ΔW by least squares on the rows, with √λ·I below h and zeros below t."""
    n_in = h.shape[1]
    rows = np.vstack([h.numpy(), ridge**0.5 * np.eye(n_in)])
    targets = np.vstack([t.numpy(), np.zeros((n_in, t.shape[1]))])
    return torch.from_numpy(np.linalg.lstsq(rows, targets, rcond=None)[0].T)


def sums(h: torch.Tensor, t: torch.Tensor) -> RidgeStatistics:
    return RidgeStatistics.empty(d_in=h.shape[1], d_out=t.shape[1]).with_rows(h, t)


@given(seed=seeds, n_rows=st.sampled_from([0, 1, 5, 6, 7, 40]), ridge=st.sampled_from([1e-4, 0.1, 30.0]))
def test_the_solution_is_that_of_least_squares_on_stacked_rows(seed: int, n_rows: int, ridge: float) -> None:
    h, t = draw(seed, n_rows, 6), draw(seed + 1, n_rows, 4)
    torch.testing.assert_close(sums(h, t).solve(ridge), stacked(h, t, ridge), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(
    seed=seeds,
    n_rows=st.sampled_from([0, 1, 4, 9, 40]),
    d_out=st.sampled_from([3, 30]),
    ridge=st.sampled_from([1e-9, 1e-2, 30.0]),
)
def test_factors_are_the_singular_directions_of_the_solution(seed: int, n_rows: int, d_out: int, ridge: float) -> None:
    """Fewer rows than outputs or inputs, and more; a ridge at which HᵀH + λI is well conditioned, and one below."""
    h, t = draw(seed, n_rows, 20), draw(seed + 1, n_rows, d_out)
    left, right = sums(h, t).factors(ridge)
    rank = min(n_rows, d_out, 20)
    assert (left.shape, right.shape) == ((d_out, rank), (20, rank))
    expected, tolerance = stacked(h, t, ridge), 1e-9 if ridge > 1e-3 else 1e-6
    torch.testing.assert_close(left @ right.mT, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(right.mT @ right, torch.eye(rank, dtype=torch.float64))
    values = torch.linalg.svdvals(expected)[:rank]
    torch.testing.assert_close(left.mT @ left, values.square().diag(), rtol=tolerance, atol=1e-6)


@given(seeds)
def test_without_ridge_it_is_least_squares(seed: int) -> None:
    h, t = draw(seed, 40, 6), draw(seed + 1, 40, 4)
    expected = torch.from_numpy(np.linalg.lstsq(h.numpy(), t.numpy(), rcond=None)[0].T)
    torch.testing.assert_close(sums(h, t).solve(0), expected, rtol=1e-9, atol=1e-9)


@given(seed=seeds, at=st.integers(0, 9))
def test_sums_add_up_over_rows(seed: int, at: int) -> None:
    h, t = draw(seed, 9, 6), draw(seed + 1, 9, 4)
    whole, parts = sums(h, t), sums(h[:at], t[:at]) + sums(h[at:], t[at:])
    one_by_one = sums(h[:at], t[:at])
    for row in range(at, 9):
        one_by_one = one_by_one.with_rows(h[row : row + 1], t[row : row + 1])
    for other in (parts, one_by_one):
        assert other.n_rows == 9
        torch.testing.assert_close(other.gram, whole.gram)
        torch.testing.assert_close(other.cross, whole.cross)


def test_the_ridge_scales_with_the_rows() -> None:
    h, t = draw(0, 9, 6), draw(1, 9, 4)
    gram = h.mT @ h
    assert sums(h, t).scaled_ridge(0.5) == pytest.approx(0.5 * (gram @ gram).trace().item() / gram.trace().item())
    torch.testing.assert_close(
        sums(3 * h, 3 * t).solve(sums(3 * h, 3 * t).scaled_ridge(0.1)), sums(h, t).solve(sums(h, t).scaled_ridge(0.1))
    )
    assert RidgeStatistics.empty(d_in=6, d_out=4).scaled_ridge(0.1) == 0


@pytest.mark.parametrize("n_rows", [0, 1, 5])
def test_a_singular_system_without_ridge_is_refused(n_rows: int) -> None:
    message = f"expected ridge .* above 0, as HᵀH of {n_rows} rows has rank {n_rows} and not 6, got 0"
    with pytest.raises(ValueError, match=message):
        sums(draw(0, n_rows, 6), draw(1, n_rows, 4)).solve(0)


@pytest.mark.parametrize("ridge", [-1e-9, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("n_rows", [3, 40])
def test_a_ridge_that_is_negative_or_no_number_is_refused(ridge: float, n_rows: int) -> None:
    with pytest.raises(ValueError, match="expected ridge"):
        sums(draw(0, n_rows, 6), draw(1, n_rows, 4)).solve(ridge)


@pytest.mark.parametrize(("d_in", "d_out"), [(3, 1), (1, 1), (2, 3)])
def test_sums_over_rows_of_other_widths_do_not_add_up(d_in: int, d_out: int) -> None:
    statistics = RidgeStatistics.empty(d_in=2, d_out=1)
    with pytest.raises(ValueError, match=f"expected sums over rows of the same widths, got .* {d_in} → {d_out}"):
        _ = statistics + RidgeStatistics.empty(d_in=d_in, d_out=d_out)


def test_arguments_of_the_wrong_kind_or_width_are_refused() -> None:
    with pytest.raises(icl.ArgumentError, match="expected d_in"):
        RidgeStatistics.empty(d_in=0, d_out=4)
    statistics = RidgeStatistics.empty(d_in=6, d_out=4)
    with pytest.raises(icl.ArgumentError, match="expected t"):
        statistics.with_rows(draw(0, 3, 6), draw(1, 2, 4))
    with pytest.raises(icl.ArgumentError, match="expected relative_ridge"):
        statistics.scaled_ridge(float("nan"))
