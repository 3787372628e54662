import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers import slow_tau
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from icl_dual.statistics.ranks import kendall, spearman, spearman_with_sizes


def drawn(seed: int, n: int, distinct: int, rows: int = 6) -> torch.Tensor:
    """Rows of few distinct numbers, or of many: with ties, and without."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, distinct, (rows, n)) / 7 - 1)


def scipys(correlation: Any, a: torch.Tensor, b: torch.Tensor) -> list[float]:
    return [correlation(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(2, 20), distinct=st.sampled_from([1, 2, 4, 9, 10**6]))
def test_kendall_equals_counting_pairs(seed: int, n: int, distinct: int) -> None:
    a, b = drawn(seed, n, distinct), drawn(seed + 1, n, max(distinct, 2))
    for got, x, y in zip(kendall(a, b), a.numpy(), b.numpy(), strict=True):
        assert got.item() == pytest.approx(slow_tau(x, y), abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20), n=st.sampled_from([2, 31, 32, 33, 417, 1025]), distinct=st.sampled_from([3, 50, 10**9])
)
def test_kendall_equals_scipys(seed: int, n: int, distinct: int) -> None:
    a, b = drawn(seed, n, distinct), drawn(seed + 1, n, distinct)
    np.testing.assert_allclose(kendall(a, b).numpy(), scipys(stats.kendalltau, a, b), atol=1e-12)


@pytest.mark.parametrize("n", [2**15 - 1, 2**15, 50_000])
def test_kendall_of_long_rows_does_not_overflow(n: int) -> None:
    a, b = drawn(0, n, 10**9, rows=2), drawn(1, n, 10**9, rows=2)
    b = a + b / 4  # not far from sorted: most pairs agree
    np.testing.assert_allclose(kendall(a, b).numpy(), scipys(stats.kendalltau, a, b), atol=1e-12)


def test_kendall_is_never_beyond_one() -> None:
    """Square roots of counts of untied pairs round."""
    a = drawn(0, 12, 4, rows=3000)
    assert kendall(a, a).max() <= 1
    assert kendall(a, -a).min() >= -1


def test_kendall_by_hand() -> None:
    up = torch.arange(5.0).view(1, 1, 5)
    assert kendall(up, up**3).item() == pytest.approx(1.0)
    assert kendall(up, -up).item() == pytest.approx(-1.0)
    swapped = torch.tensor([[[1.0, 0.0, 2.0, 3.0, 4.0]]])
    assert kendall(up, swapped).item() == pytest.approx(0.8)  # one pair of ten disagrees


def test_kendall_keeps_the_batchs_shape_and_takes_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(3, 4, 7, 9), torch.randn(3, 4, 7, 9)
    expected = kendall(a, b)
    assert expected.shape == (3, 4, 7)
    monkeypatch.setattr(sys.modules["icl_dual.statistics.ranks"], "AT_ONCE", 20)
    assert torch.equal(kendall(a, b), expected)
    assert kendall(a[:0], b[:0]).shape == (0, 4, 7)
    for n in (0, 1):
        assert kendall(a[..., :n], b[..., :n]).isnan().all()


def test_what_is_missing_or_does_not_vary_has_no_correlation() -> None:
    a, b = torch.randn(4, 9), torch.randn(4, 9)
    a[0, 3], b[1, 0], a[2] = torch.nan, torch.nan, 5.0
    assert kendall(a, b).isnan().tolist() == [True, True, True, False]
    everything = torch.ones(4, 9, dtype=torch.bool)
    assert spearman(a[2:], b[2:], everything[2:]).isnan().tolist() == [True, False]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(3, 40),
    distinct=st.sampled_from([3, 9, 10**6]),
    hidden=st.sampled_from([0.0, 0.3]),
)
def test_spearman_equals_scipys_over_what_is_known(seed: int, n: int, distinct: int, hidden: float) -> None:
    a, b = drawn(seed, n, distinct), drawn(seed + 1, n, distinct)
    known = torch.from_numpy(np.random.default_rng(seed).random((6, n)) >= hidden)
    for got, x, y, seen in zip(spearman(a, b, known), a.numpy(), b.numpy(), known.numpy(), strict=True):
        if len({*x[seen]}) > 1 and len({*y[seen]}) > 1:
            found: Any = stats.spearmanr(x[seen], y[seen])
            assert got.item() == pytest.approx(found.statistic, abs=1e-12)
        else:
            assert got.isnan()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(3, 40),
    distinct=st.sampled_from([3, 9, 10**6]),
    hidden=st.sampled_from([0.0, 0.3]),
    shift=st.sampled_from([-10.0, -0.5, 0.0, 0.5]),
)
def test_spearman_with_sizes_equals_scipys(seed: int, n: int, distinct: int, hidden: float, shift: float) -> None:
    x = drawn(seed, n, distinct).double() + shift
    known = torch.from_numpy(np.random.default_rng(seed).random((6, n)) >= hidden)
    for got, row, seen in zip(spearman_with_sizes(x, known), x.numpy(), known.numpy(), strict=True):
        if len({*row[seen]}) > 1 and len({*np.abs(row[seen])}) > 1:
            found: Any = stats.spearmanr(row[seen], np.abs(row[seen]))
            assert got.item() == pytest.approx(found.statistic, abs=1e-12)
        else:
            assert got.isnan()


def test_spearman_with_sizes_tells_neighbouring_numbers_apart() -> None:
    """The largest and the smallest differences of floating-point numbers, and zeros of both signs."""
    just_above = np.nextafter(1.0, 2.0)
    rows = [[1.0, -just_above, 3.0], [-1.0, just_above, -3.0], [5e-324, -1e-323, 1e308], [0.0, -0.0, 1.0], [0.0, -1, 2]]
    x = torch.tensor(rows, dtype=torch.float64)
    got = spearman_with_sizes(x.expand(2, -1, -1), torch.ones(1, 1, 3, dtype=torch.bool))
    expected: list[Any] = [stats.spearmanr(row, np.abs(row)) for row in rows]
    assert got.shape == (2, 5)
    assert got.tolist() == [pytest.approx([found.statistic for found in expected])] * 2
    for n in (0, 1):
        assert spearman_with_sizes(x[:, :n], torch.ones(1, n, dtype=torch.bool)).isnan().all()
