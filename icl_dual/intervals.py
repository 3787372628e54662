"""95 % intervals of means over queries, of shares, and of paired differences, on plain tables of numbers.

A table is `[seed query]`: what one query scored behind one seed's demonstrations, NaN where that is undefined. All
seeds ask the same queries, so the two are crossed, and a resample draws each on its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor

MIN_QUERIES = 5
"""Fewer queries have no interval: it would say more of the method than of them."""

RESAMPLES = 2000
"""How many bootstrap resamples an interval's ends are percentiles of."""

_TAILS = (0.025, 0.975)

Table = Float[Tensor | np.ndarray, "_seed _query"]
_Counts = Float[np.ndarray, "resample item"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    """NaN where undefined."""
    low: float
    """NaN where there is no interval."""
    high: float
    n_queries: int
    """Over how many queries; of several groups, in the one with fewest."""
    n_seeds: int = 1
    """Over how many seeds, likewise."""

    @property
    def known(self) -> bool:
        """Whether there is an interval, and not only an estimate."""
        return not (np.isnan(self.low) or np.isnan(self.high))

    def format(self, digits: int = 3, *, scale: float = 1.0, counts: str = "") -> str:
        """`0.152 [0.140, 0.163]`, `0.152 (3 queries: no interval)`, or `undefined`.

        `scale` is 100 for per cent; `counts`, what the estimate is made of, stand behind it.
        """
        value, low, high = (f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high))
        behind = f" ({counts})" if counts else ""
        if np.isnan(self.value):
            return f"undefined{behind}"
        if not self.known:
            counts = counts or f"{self.n_queries} {'query' if self.n_queries == 1 else 'queries'}"
            return f"{value} ({counts}: no interval)"
        return f"{value} [{low}, {high}]{behind}"

    def __str__(self) -> str:
        return self.format()


class Paired(NamedTuple):
    """How two scores of the same queries differ."""

    difference: Interval
    p: float
    """Two-sided; NaN where there are fewer than `MIN_QUERIES`."""


def bootstrap(*groups: Table, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean over groups of each group's mean over its defined values, with a percentile bootstrap interval.

    A resample draws seeds with replacement and, independently, queries for all seeds together (the pigeonhole
    bootstrap; Owen, 2007), each group on its own. With one seed it is the ordinary bootstrap over queries. With several
    it overstates what varies by single pairs of seed and query, which is conservative; but of S seeds it sees only
    (S − 1)/S of the variance between seeds: where that is most of it, the interval of few seeds is too narrow.

    Args:
        groups: tables `[seed query]`, one a task, say.
        seed: of the resampling.
        resamples: how many; those in which a group has no defined value are left out.

    Returns:
        The mean, undefined where a group has no value; without interval where a group has fewer than `MIN_QUERIES`
        queries with one.

    Raises:
        ValueError: no group is given.
    """
    if not groups:
        raise ValueError("expected at least one group of values, got none")
    tables = [np.asarray(group, dtype=np.float64) for group in groups]
    n_queries = min(int((~np.isnan(table)).any(0).sum()) for table in tables)
    value = np.mean([_means(table, *(np.ones((1, n)) for n in table.shape)) for table in tables])
    low = high = np.nan
    if n_queries >= MIN_QUERIES:
        rng = np.random.default_rng(seed)
        means = np.mean([_means(table, *(_drawn(n, resamples, rng) for n in table.shape)) for table in tables], axis=0)
        low, high = np.quantile(means[~np.isnan(means)], _TAILS)
    return Interval(float(value), float(low), float(high), n_queries, min(map(len, tables)))


def wilson(successes: float | int, n: int) -> Interval:
    """The share successes / n of n queries, with Wilson's score interval.

    Args:
        successes: from 0 to n. It may be an expected number: a mean of values in [0, 1] varies no more than a share of
            that size, whose interval is then, if anything, too wide.
        n: of none, the share is undefined; of fewer than `MIN_QUERIES`, it has no interval.

    Raises:
        ValueError: there are fewer successes than 0 or more than n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected from 0 to n={n} successes, got {successes}")
    share = successes / n if n else np.nan
    if n < MIN_QUERIES:
        return Interval(share, np.nan, np.nan, n)
    z = float(stats.norm.ppf(_TAILS[1]))
    centre, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side) / (1 + z**2 / n) for side in (-half, half))
    # Rounding must not keep the ends from the value of none or all.
    return Interval(share, float(low) if successes else 0.0, float(high) if successes < n else 1.0, n)


def average(*estimates: Interval) -> Interval:
    """The mean of independent estimates; its ends are as far off as theirs together: mean ± √Σ (end − value)² / n.

    That is the method of variance estimates recovery (Zou and Donner, 2008). It is for shares: the bootstrap of one
    that is 0 or 1 has no width. An estimate that is undefined, or has no interval, leaves the mean so.

    Raises:
        ValueError: no estimate is given.
    """
    if not estimates:
        raise ValueError("expected at least one estimate, got none")
    value, low, high = np.array([(one.value, one.low, one.high) for one in estimates]).T
    mean, below, above = value.mean(), *(np.linalg.norm(end - value) / len(value) for end in (low, high))
    n_queries, n_seeds = (min(getattr(one, name) for one in estimates) for name in ("n_queries", "n_seeds"))
    return Interval(float(mean), float(mean - below), float(mean + above), n_queries, n_seeds)


def paired_test(a: Table, b: Table, *, seed: int = 0) -> Paired:
    """How a differs from b on the same queries: the mean of a − b, its interval, and p of a permutation test.

    The interval is `bootstrap`'s, of the differences, with seeds crossed with queries (conservative). The test averages
    each query's differences over seeds and flips signs: its p says nothing beyond these seeds.

    Args:
        a: scores `[seed query]`.
        b: scores of the same seeds and queries; where either is NaN, the pair is left out.
        seed: of the resampling and of the flips.

    Raises:
        ValueError: a and b differ in shape.
    """
    if a.shape != b.shape:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"expected scores of the same seeds and queries, got shapes {got}: keep what both have")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    difference = bootstrap(differences, seed=seed)
    if difference.n_queries < MIN_QUERIES:
        return Paired(difference, np.nan)
    by_query = np.nanmean(differences[:, ~np.isnan(differences).all(0)], axis=0)
    rng = np.random.default_rng(seed)
    test = stats.permutation_test(
        (by_query,), np.mean, permutation_type="samples", vectorized=True, n_resamples=9999, batch=1000, rng=rng
    )
    return Paired(difference, float(test.pvalue))


def _drawn(n: int, resamples: int, rng: np.random.Generator) -> _Counts:
    """How often each of n items is drawn in n draws with replacement."""
    items = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(items.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _means(
    table: Float[np.ndarray, "seed query"],
    seeds: Float[np.ndarray, "resample seed"],
    queries: Float[np.ndarray, "resample query"],
) -> Float[np.ndarray, " resample"]:
    """The mean over defined values, each counted as often as its seed times its query; NaN where there is none."""
    known = ~np.isnan(table)
    totals, numbers = ((queries @ of.T * seeds).sum(1) for of in (np.where(known, table, 0.0), known.astype(float)))
    return np.divide(totals, numbers, out=np.full(len(totals), np.nan), where=numbers > 0)
