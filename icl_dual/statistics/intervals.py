"""95 % intervals of means over queries, of shares, and of paired differences, on plain tables of numbers.

A table is `[seed query]`: what one query scored behind one seed's demonstrations, NaN where that is undefined. All
seeds ask the same queries, so the two are crossed, and a resample draws each on its own.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor

MIN_QUERIES = 5
"""Fewer queries have no interval: it would say more of the method than of them."""

RESAMPLES = 2000
"""How many bootstrap resamples an interval's ends are percentiles of."""

_TAILS = (0.025, 0.975)

Table = Float[Tensor | np.ndarray, "..."]
"""`[seed query]`."""
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
    by_seed: tuple[float, ...]
    """The difference of each seed by itself; NaN where one has no score."""

    def __str__(self) -> str:
        return f"{self.difference}, p = {self.p:.4f}, by seed {', '.join(f'{one:.3f}' for one in self.by_seed)}"


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
        ValueError: no group is given, or one is no such table.
    """
    if not groups:
        raise ValueError("expected at least one group of values, got none")
    tables = [_table(group) for group in groups]
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


def mean_of_intervals(*estimates: Interval) -> Interval:
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
    """How a differs from b on the same queries: mean(a) − mean(b), its interval, and p of a permutation test.

    Means are over defined values, which need not be the same queries' (Rec2FTP of two finetunings). The interval is
    `bootstrap`'s, a and b resampled together. The test swaps the two scores of whole queries, all their seeds at once:
    its p says nothing beyond these seeds.

    Args:
        a: scores `[seed query]`.
        b: scores of the same seeds and queries.
        seed: of the resampling and of the swaps.

    Raises:
        ValueError: a or b is no such table, or they differ in shape.
    """
    pair = [_table(values) for values in (a, b)]
    if pair[0].shape != pair[1].shape:
        got = f"{pair[0].shape} and {pair[1].shape}"
        raise ValueError(f"expected scores of the same seeds and queries, got shapes {got}: keep what both have")
    n_queries = min(int((~np.isnan(table)).any(0).sum()) for table in pair)
    n_seeds, n_all = pair[0].shape
    value = np.subtract(*(_means(table, np.ones((1, n_seeds)), np.ones((1, n_all)))[0] for table in pair))
    by_seed = tuple(_mean(pair[0][row]) - _mean(pair[1][row]) for row in range(n_seeds))
    if n_queries < MIN_QUERIES:
        return Paired(Interval(float(value), np.nan, np.nan, n_queries, n_seeds), np.nan, by_seed)
    rng = np.random.default_rng(seed)
    drawn = [_drawn(n, RESAMPLES, rng) for n in (n_seeds, n_all)]
    differences = np.subtract(*(_means(table, *drawn) for table in pair))
    low, high = np.quantile(differences[~np.isnan(differences)], _TAILS)
    totals, counts = (np.concatenate([part(table) for table in pair]) for part in (_totals, _counts))

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> Any:
        chosen = (x.astype(int), y.astype(int))
        n = [counts[one].sum(axis) for one in chosen]
        means = [totals[one].sum(axis) / np.maximum(of, 1) for one, of in zip(chosen, n, strict=True)]
        # A swap that leaves one without scores shows no difference.
        return np.where(np.minimum(*n) > 0, means[0] - means[1], 0.0)

    test = stats.permutation_test(
        (np.arange(n_all, dtype=float), n_all + np.arange(n_all, dtype=float)),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        batch=1000,
        rng=rng,
    )
    interval = Interval(float(value), float(low), float(high), n_queries, n_seeds)
    return Paired(interval, float(test.pvalue), by_seed)


def over_seeds(a: Float[np.ndarray, "_"], b: Float[np.ndarray, "_"]) -> Paired:
    """How runs that seeds have made differ, pair by pair: mean(a − b), Student's interval, and p of its test.

    Unlike `paired_test`, it speaks of seeds to come: each run of a seed is one observation.

    Args:
        a: a number of every seed's run.
        b: the same of the runs to hold against, in the same order.

    Raises:
        ValueError: they are not of the same seeds.
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(f"expected numbers of the same seeds, one at least, got {len(a)} and {len(b)}")
    differences = a - b
    value, n = float(differences.mean()), len(differences)
    low = high = p = np.nan
    if n > 1:
        half = stats.t.ppf(_TAILS[1], n - 1) * stats.sem(differences)
        low, high = float(value - half), float(value + half)
        p = float(stats.ttest_rel(a, b).pvalue) if half else float(value == 0)
    return Paired(Interval(value, low, high, 1, n), p, tuple(differences.tolist()))


def proportion(found: Table) -> Interval:
    """The share of all defined values that is 1, with Wilson's interval of as many queries as have one.

    A query counts once for it, however many seeds it has a value of: those of one query are no independent trials.
    """
    table = _table(found)
    distinct = int((~np.isnan(table)).any(0).sum())
    return replace(wilson(_mean(table) * distinct if distinct else 0.0, distinct), n_seeds=len(table))


def _table(values: Table) -> Float[np.ndarray, "seed query"]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"expected a table [seed query], got shape {table.shape}: of one seed's queries, values[None]")
    return table


def _mean(values: Float[np.ndarray, "..."]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _totals(table: Float[np.ndarray, "seed query"]) -> Float[np.ndarray, " query"]:
    return np.where(np.isnan(table), 0.0, table).sum(0)


def _counts(table: Float[np.ndarray, "seed query"]) -> Float[np.ndarray, " query"]:
    return (~np.isnan(table)).sum(0).astype(np.float64)


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
