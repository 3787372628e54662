"""95 % intervals of means over queries, of shares, and of paired differences, on plain tables of numbers.

A table is `[seed query]`: the score of each query after each seed's demonstrations, NaN where it is undefined. All
seeds have the same queries, so the two are crossed, and a resample draws each on its own.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy  # `scipy.stats` takes a third of a second, and is loaded on first use
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import Count, Finite, Index, Seed, checked

MIN_QUERIES = 5
"""The fewest queries with an interval: of fewer, it would depend more on the method than on them."""

RESAMPLES = 2000
"""The number of bootstrap resamples."""

UNSTABLE = "†"
"""The mark of an estimate with a spread over replicas that exceeds its interval over queries."""

_TAILS = (0.025, 0.975)

Table = Float[Tensor | np.ndarray, "..."]
"""Scores `[seed query]`, NaN where undefined."""
Shifts = Float[Tensor | np.ndarray, "_ _"]
"""How far each replica of a seed's finetuning moves an estimate: `[seed replica]`."""
_Counts = Float[np.ndarray, "resample item"]


@checked
@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    """The estimate; NaN where undefined."""
    low: float
    """The interval's lower end; NaN where there is no interval."""
    high: float
    """The interval's upper end; NaN where there is no interval."""
    n_queries: int
    """The number of queries with a value; of several groups, the smallest."""
    n_seeds: int = 1
    """The number of seeds; of several groups, the smallest."""
    spread: float = float("nan")
    """The range of the estimate over replicas of the finetuning, which the interval includes (`widened`); NaN where it
    is not known."""
    unstable: bool = False
    """Whether the spread over replicas exceeds the width of the interval over queries alone."""

    @property
    def known(self) -> bool:
        """Return whether there is an interval."""
        return not (np.isnan(self.low) or np.isnan(self.high))

    @checked
    def format(self, digits: Index = 3, *, scale: Finite = 1.0, counts: str = "") -> str:
        """Return the estimate and its interval as text; a dagger (`UNSTABLE`) marks an unstable estimate.

        Args:
            digits: the number of digits after the point.
            scale: the factor of all numbers: 100 for per cent.
            counts: the counts of a share, which follow in brackets.

        Example:
            >>> Interval(0.152, 0.14, 0.163, n_queries=80).format()
            '0.152 [0.140, 0.163]'
            >>> Interval(0.152, float("nan"), float("nan"), n_queries=3).format()
            '0.152 (3 queries: no interval)'
            >>> Interval(float("nan"), float("nan"), float("nan"), n_queries=0).format()
            'undefined'
            >>> Interval(0.152, 0.14, 0.263, n_queries=80, spread=0.1, unstable=True).format()
            '0.152† [0.140, 0.263]'
        """
        value, low, high = (f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high))
        value += UNSTABLE if self.unstable else ""
        suffix = f" ({counts})" if counts else ""
        if np.isnan(self.value):
            return f"undefined{suffix}"
        if not self.known:
            counts = counts or f"{self.n_queries} {'query' if self.n_queries == 1 else 'queries'}"
            return f"{value} ({counts}: no interval)"
        return f"{value} [{low}, {high}]{suffix}"

    def __str__(self) -> str:
        return self.format()


@checked
class Paired(NamedTuple):
    """The difference of two scores of the same queries, with its interval and its test."""

    difference: Interval
    """The mean of the first less the mean of the second."""
    p: float
    """The two-sided p value; NaN where fewer than `MIN_QUERIES` queries have a score."""
    by_seed: tuple[float, ...]
    """The difference of each seed by itself; NaN where one of the two has no score."""

    def __str__(self) -> str:
        by_seed = ", ".join(f"{difference:.3f}" for difference in self.by_seed)
        return f"{self.difference}, p = {self.p:.4f}, by seed {by_seed}"


@checked
def bootstrap(*groups: Table, seed: Seed = 0, resamples: Count = RESAMPLES) -> Interval:
    """Return the mean over groups of each group's mean over its defined values, with a percentile bootstrap interval.

    A resample draws seeds with replacement and, independently, queries for all seeds together (the pigeonhole
    bootstrap; Owen, 2007), each group on its own. With one seed it is the ordinary bootstrap over queries. With several
    it overstates what varies by single pairs of seed and query, which is conservative; but of S seeds it sees only
    (S − 1)/S of the variance between seeds: where that is most of it, the interval of few seeds is too narrow.

    Args:
        groups: tables `[seed query]`, for example one for each task.
        seed: the seed of the resampling.
        resamples: the number of resamples; those in which a group has no defined value are left out.

    Returns:
        The mean, undefined where a group has no value; without an interval where fewer than `MIN_QUERIES` queries of a
        group have one.

    Raises:
        ValueError: no group is given, or one is no such table.
    """
    if not groups:
        raise ValueError("expected at least one group of values, got none: pass a table [seed query]")
    tables = [_table(group) for group in groups]
    n_queries = min(int((~np.isnan(table)).any(0).sum()) for table in tables)
    value = np.mean([_means(table, *(np.ones((1, n)) for n in table.shape)) for table in tables])
    low = high = np.nan
    if n_queries >= MIN_QUERIES:
        rng = np.random.default_rng(seed)
        means = np.mean(
            [_means(table, *(_resample_counts(n, resamples, rng) for n in table.shape)) for table in tables], axis=0
        )
        low, high = np.quantile(means[~np.isnan(means)], _TAILS)
    return Interval(float(value), float(low), float(high), n_queries, min(map(len, tables)))


@checked
def wilson(successes: float | int, n: int) -> Interval:
    """Return the share successes / n of n queries, with Wilson's score interval.

    Args:
        successes: the number of successes. It may be an expected number: a mean of values in [0, 1] varies no more than
            a share of that size, so the interval may then be too wide, but not too narrow.
        n: the number of queries. With 0 the share is undefined; with fewer than `MIN_QUERIES` it has no interval.

    Raises:
        ValueError: there are fewer successes than 0 or more than n.

    Example:
        >>> print(wilson(8, 10))
        0.800 [0.490, 0.943]
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected from 0 to n={n} successes, got {successes}: pass a count, not a share")
    share = successes / n if n else np.nan
    if n < MIN_QUERIES:
        return Interval(share, np.nan, np.nan, n)
    z = float(scipy.stats.norm.ppf(_TAILS[1]))
    centre, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side) / (1 + z**2 / n) for side in (-half, half))
    # Rounding must not keep the ends from the value of none or all.
    return Interval(share, float(low) if successes else 0.0, float(high) if successes < n else 1.0, n)


@checked
def mean_of_intervals(*estimates: Interval) -> Interval:
    """Return the mean of independent estimates, with the interval mean ± √Σ (end − value)² / n.

    This is the method of variance estimates recovery (Zou and Donner, 2008). It is for shares: the bootstrap of a share
    of 0 or 1 has no width. With an undefined estimate the mean is undefined; with one without interval it has none.

    Raises:
        ValueError: no estimate is given.
    """
    if not estimates:
        raise ValueError("expected at least one estimate, got none: pass an Interval for each task")
    value, low, high = np.array([(estimate.value, estimate.low, estimate.high) for estimate in estimates]).T
    mean, below, above = value.mean(), *(np.linalg.norm(end - value) / len(value) for end in (low, high))
    n_queries, n_seeds = (min(getattr(estimate, name) for estimate in estimates) for name in ("n_queries", "n_seeds"))
    return Interval(float(mean), float(mean - below), float(mean + above), n_queries, n_seeds)


@checked
def widened(interval: Interval, *shifts: Shifts) -> Interval:
    """Return an interval over queries, widened by what replicas of the finetuning change.

    A seed's replicas move its estimate down and up by the lowest and the highest of their shifts and 0, which is the
    run itself. Seeds and groups were finetuned apart, so their moves add up as independent errors do: the mean moves by
    the root of the sum of their squares.

    Args:
        interval: the interval over queries, of a mean over groups.
        shifts: by group, how far each seed's replicas move the estimate; NaN where a replica has no value, infinite
            where it diverged. A group without a value of any replica moves nothing; where no group has one, the
            interval is returned as it is.

    Example:
        >>> print(widened(Interval(0.15, 0.14, 0.16, n_queries=80), np.array([[0.002, 0.08, -0.01]])))
        0.150† [0.130, 0.240]
    """
    tables = [np.asarray(group, dtype=np.float64) for group in shifts]
    if all(np.isnan(table).all() for table in tables):  # of an empty table, too
        return interval
    below, above = (float(np.linalg.norm(_moves(tables, side))) for side in (-1, 1))
    spread, width = below + above, interval.high - interval.low
    return replace(
        interval,
        low=interval.low - below,
        high=interval.high + above,
        spread=spread,
        unstable=bool(np.isinf(spread) or spread > width),
    )


def _moves(tables: list[np.ndarray], side: int) -> Float[np.ndarray, " seed"]:
    """Return how far each group's seeds move the mean of all to one side, at least 0."""
    by_seed = [
        np.where(np.isinf(table).any(1), np.inf, np.nan_to_num(side * table).max(1, initial=0.0)) / len(table)
        for table in tables
    ]
    return np.concatenate(by_seed) / len(tables)


@checked
def paired_test(a: Table, b: Table, *, shifts: Shifts | None = None, seed: Seed = 0) -> Paired:
    """Return mean(a) − mean(b) on the same queries, with its interval and p of a permutation test.

    Means are over defined values, which may be of different queries (Rec2FTP of two finetunings). The interval is
    `bootstrap`'s, a and b resampled together. The test swaps the two scores of whole queries, all their seeds at once:
    its p does not generalise to other seeds.

    Args:
        a: scores `[seed query]`.
        b: scores of the same seeds and queries.
        shifts: how far each seed's replicas of the finetuning move the difference, by which its interval is widened
            (`widened`); none by default.
        seed: the seed of the resampling and of the swaps.

    Raises:
        ValueError: a or b is no such table, or they differ in shape.

    Example:
        >>> scores = np.arange(10.0)[None]
        >>> paired_test(scores + 1, scores).difference.value
        1.0
    """
    pair = [_table(values) for values in (a, b)]
    if pair[0].shape != pair[1].shape:
        got = f"{pair[0].shape} and {pair[1].shape}"
        raise ValueError(
            f"expected scores of the same seeds and queries, got shapes {got}: keep the seeds and queries of both"
        )
    n_queries = min(int((~np.isnan(table)).any(0).sum()) for table in pair)
    n_seeds, n_all = pair[0].shape
    value = np.subtract(*(_means(table, np.ones((1, n_seeds)), np.ones((1, n_all)))[0] for table in pair))
    by_seed = tuple(_mean(pair[0][row]) - _mean(pair[1][row]) for row in range(n_seeds))
    if n_queries < MIN_QUERIES:
        return Paired(Interval(float(value), np.nan, np.nan, n_queries, n_seeds), np.nan, by_seed)
    rng = np.random.default_rng(seed)
    resample_counts = [_resample_counts(n, RESAMPLES, rng) for n in (n_seeds, n_all)]
    differences = np.subtract(*(_means(table, *resample_counts) for table in pair))
    low, high = np.quantile(differences[~np.isnan(differences)], _TAILS)
    totals, counts = (np.concatenate([part(table) for table in pair]) for part in (_totals, _counts))

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> Any:
        indices = (x.astype(int), y.astype(int))
        n = [counts[index].sum(axis) for index in indices]
        means = [totals[index].sum(axis) / np.maximum(count, 1) for index, count in zip(indices, n, strict=True)]
        # A swap that leaves one of the two without scores shows no difference.
        return np.where(np.minimum(*n) > 0, means[0] - means[1], 0.0)

    test = scipy.stats.permutation_test(
        (np.arange(n_all, dtype=float), n_all + np.arange(n_all, dtype=float)),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        batch=1000,
        rng=rng,
    )
    interval = Interval(float(value), float(low), float(high), n_queries, n_seeds)
    return Paired(interval if shifts is None else widened(interval, shifts), float(test.pvalue), by_seed)


@checked
def over_seeds(a: Float[np.ndarray, "_"], b: Float[np.ndarray, "_"]) -> Paired:
    """Return the mean difference of runs of several seeds, pair by pair, with Student's interval and p of its test.

    Unlike `paired_test`, it generalises to other seeds: each seed's run is one observation.

    Args:
        a: a number for each seed's run.
        b: the number for each seed's other run, in the same order.

    Raises:
        ValueError: they are not of the same seeds.
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(
            f"expected numbers of the same seeds, one at least, got {len(a)} and {len(b)}: keep the seeds of both"
        )
    differences = a - b
    value, n = float(differences.mean()), len(differences)
    low = high = p = np.nan
    if n > 1:
        half = scipy.stats.t.ppf(_TAILS[1], n - 1) * scipy.stats.sem(differences)
        low, high = float(value - half), float(value + half)
        p = float(scipy.stats.ttest_rel(a, b).pvalue) if half else float(value == 0)
    return Paired(Interval(value, low, high, 1, n), p, tuple(differences.tolist()))


@checked
def proportion(values: Table) -> Interval:
    """Return the share of the defined values that is 1, with Wilson's interval for the number of queries with a value.

    A query counts once, however many seeds it has a value of, because these are not independent trials.
    """
    table = _table(values)
    distinct = int((~np.isnan(table)).any(0).sum())
    return replace(wilson(_mean(table) * distinct if distinct else 0.0, distinct), n_seeds=len(table))


def _table(values: Table) -> Float[np.ndarray, "seed query"]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"expected a table [seed query], got shape {table.shape}: for one seed, pass values[None]")
    return table


def _mean(values: Float[np.ndarray, "..."]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _totals(table: Float[np.ndarray, "seed query"]) -> Float[np.ndarray, " query"]:
    return np.where(np.isnan(table), 0.0, table).sum(0)


def _counts(table: Float[np.ndarray, "seed query"]) -> Float[np.ndarray, " query"]:
    return (~np.isnan(table)).sum(0).astype(np.float64)


def _resample_counts(n: int, resamples: Count, rng: np.random.Generator) -> _Counts:
    """Return how often each of n items is drawn in n draws with replacement, by resample."""
    items = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(items.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _means(
    table: Float[np.ndarray, "seed query"],
    seeds: Float[np.ndarray, "resample seed"],
    queries: Float[np.ndarray, "resample query"],
) -> Float[np.ndarray, " resample"]:
    """Return the mean over defined values, weighted by the counts of its seed and query; NaN where there is none."""
    defined = ~np.isnan(table)
    sums = (np.where(defined, table, 0.0), defined.astype(float))
    totals, numbers = ((queries @ values.T * seeds).sum(1) for values in sums)
    return np.divide(totals, numbers, out=np.full(len(totals), np.nan), where=numbers > 0)
