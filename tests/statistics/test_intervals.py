import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from icl_dual.metrics.comparison import estimate
from icl_dual.statistics.intervals import (
    MIN_QUERIES,
    Interval,
    Paired,
    bootstrap,
    mean_of_intervals,
    over_seeds,
    paired_test,
    widened,
    wilson,
)

Z = 1.959963984540054
SEEDS = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def crossed(seed: int, n_seeds: int, n_queries: int, *, of_seed: float, of_query: float = 1.0) -> np.ndarray:
    """Effects of seeds, of queries and of single pairs around a mean of 0."""
    rng = np.random.default_rng(seed)
    effects = of_seed * rng.normal(size=(n_seeds, 1)) + of_query * rng.normal(size=(1, n_queries))
    return effects + rng.normal(size=(n_seeds, n_queries))


def slow_bootstrap(groups: list[np.ndarray], resamples: int = 4000) -> tuple[float, float]:
    """Seeds and queries drawn one by one, and every value of a drawn pair put on a list."""
    rng = random.Random(0)
    means = []
    for _ in range(resamples):
        of_groups = []
        for table in groups:
            rows = [rng.randrange(table.shape[0]) for _ in range(table.shape[0])]
            columns = [rng.randrange(table.shape[1]) for _ in range(table.shape[1])]
            values = [table[row, column] for row in rows for column in columns if not math.isnan(table[row, column])]
            of_groups.append(sum(values) / len(values))
        means.append(sum(of_groups) / len(of_groups))
    means.sort()
    return means[round(0.025 * resamples)], means[round(0.975 * resamples)]


def assert_same(interval: Interval, low: float, high: float, tolerance: float = 0.05) -> None:
    """The same ends within Monte-Carlo error, a small part of the interval's width."""
    assert interval.low == pytest.approx(low, abs=tolerance * (high - low))
    assert interval.high == pytest.approx(high, abs=tolerance * (high - low))


@pytest.mark.parametrize("seed", range(3))
def test_one_seed_is_the_ordinary_percentile_bootstrap(seed: int) -> None:
    values = np.exp(normal(seed, 1, 20))  # skewed, so that the ends tell percentiles from the other methods
    expected = stats.bootstrap((values[0],), np.mean, method="percentile", n_resamples=20_000, rng=seed)
    interval = bootstrap(values, resamples=20_000)
    assert interval.value == pytest.approx(values.mean())
    assert_same(interval, *map(float, expected.confidence_interval))
    assert (interval.n_queries, interval.n_seeds, interval.known) == (20, 1, True)


def test_several_seeds_groups_and_undefined_values_are_as_drawn_one_by_one() -> None:
    groups = [crossed(1, 3, 8, of_seed=2), crossed(2, 2, 12, of_seed=0.5) + 3]
    groups[0][0, :3] = groups[1][:, 5] = np.nan
    interval = bootstrap(*groups, resamples=20_000)
    assert interval.value == pytest.approx(np.mean([np.nanmean(groups[0]), np.nanmean(groups[1])]))
    assert_same(interval, *slow_bootstrap(groups))
    assert (interval.n_queries, interval.n_seeds) == (8, 2)


def test_seeds_that_agree_narrow_nothing() -> None:
    once = normal(0, 1, 30)
    one, five = bootstrap(once, resamples=20_000), bootstrap(np.repeat(once, 5, axis=0), resamples=20_000)
    assert_same(five, one.low, one.high)


def test_seeds_alone_are_drawn_with_replacement() -> None:
    """Of two seeds, a quarter of resamples has the first alone, and a quarter the second."""
    interval = bootstrap(np.array([[0.0] * 9, [1.0] * 9]))
    assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)


def coverage(n_seeds: int, n_queries: int, of_seed: float) -> float:
    """How often the interval holds the mean, 0."""
    tables = (crossed(seed, n_seeds, n_queries, of_seed=of_seed) for seed in range(600))
    intervals = [bootstrap(table, seed=seed, resamples=500) for seed, table in enumerate(tables)]
    return sum(interval.low <= 0 <= interval.high for interval in intervals) / len(intervals)


def test_95_of_100_intervals_hold_the_mean() -> None:
    # Of 600, .95 is found as .93 to .97; percentiles of 40 queries are a little narrow.
    assert 0.92 <= coverage(1, 40, of_seed=0) <= 0.97
    assert 0.94 <= coverage(3, 40, of_seed=0) <= 0.99
    assert 0.93 <= coverage(3, 40, of_seed=0.1) <= 0.99


def test_of_few_seeds_that_differ_the_interval_is_too_narrow_as_documented() -> None:
    """Two seeds are the interval's ends where nothing else varies: the mean is between them half of the time."""
    assert 0.4 <= coverage(2, 100, of_seed=10) <= 0.6


@given(
    seed=SEEDS, n_seeds=st.integers(1, 4), n_queries=st.integers(5, 20), shift=st.floats(-9, 9), by=st.floats(0.1, 9)
)
@settings(max_examples=30, deadline=None)
def test_an_interval_shifts_and_scales_with_its_values_and_stays_within(
    seed: int, n_seeds: int, n_queries: int, shift: float, by: float
) -> None:
    values = normal(seed, n_seeds, n_queries)
    one, other = bootstrap(values, resamples=200), bootstrap(by * values + shift, resamples=200)
    for end in ("value", "low", "high"):
        assert getattr(other, end) == pytest.approx(by * getattr(one, end) + shift, abs=1e-9)
    assert values.min() <= one.low < one.high <= values.max()


@given(value=st.floats(-1, 1), n_seeds=st.integers(1, 4), n_queries=st.integers(5, 20))
@settings(max_examples=30, deadline=None)
def test_equal_values_have_no_width(value: float, n_seeds: int, n_queries: int) -> None:
    interval = bootstrap(np.full((n_seeds, n_queries), value), resamples=50)
    assert [interval.low, interval.high] == pytest.approx([value, value], abs=1e-12)
    assert interval.value == pytest.approx(value, abs=1e-12)


def test_draws_are_the_seeds_own_and_tensors_are_as_arrays() -> None:
    values = normal(0, 2, 30)
    assert bootstrap(values, seed=3) == bootstrap(torch.from_numpy(values), seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert paired_test(values, -values, seed=3) == paired_test(
        torch.from_numpy(values), torch.from_numpy(-values), seed=3
    )


def test_groups_are_drawn_independently() -> None:
    """The mean of a group and its mirror image would never vary if both drew the same queries."""
    values = normal(0, 1, 40)
    interval, alone = bootstrap(values, -values, resamples=20_000), bootstrap(values, resamples=20_000)
    assert interval.value == pytest.approx(0)
    assert interval.high - interval.low == pytest.approx((alone.high - alone.low) / math.sqrt(2), rel=0.05)


def test_a_query_without_a_defined_value_is_none() -> None:
    values = normal(0, 2, 7)
    values[:, 4:] = np.nan
    values[0, 4] = 1.0
    interval = bootstrap(values)
    assert (interval.n_queries, interval.known) == (5, True)
    assert interval.value == pytest.approx(np.nanmean(values))
    values[0, 4] = np.nan
    interval = bootstrap(values)
    assert (interval.n_queries, interval.known) == (4, False)
    assert interval.value == pytest.approx(values[:, :4].mean())


def test_resamples_in_which_a_group_has_no_value_are_left_out() -> None:
    values = np.full((2, 5), np.nan)
    values[0] = range(5)  # half of the resamples have the other seed, or it twice
    interval = bootstrap(values)
    assert 0 <= interval.low < interval.value == 2 < interval.high <= 4


@pytest.mark.parametrize("n", range(MIN_QUERIES + 1))
def test_too_few_queries_have_no_interval(n: int) -> None:
    values = np.ones((1, n))
    enough = n >= MIN_QUERIES
    for interval in (
        bootstrap(values),
        bootstrap(values, np.ones((3, 50))),
        wilson(n, n),
        paired_test(values, 0 * values)[0],
    ):
        assert interval.n_queries == n
        assert interval.known is enough
        assert math.isnan(interval.low) is math.isnan(interval.high) is not enough
        assert math.isnan(interval.value) if n == 0 else interval.value == 1
    assert math.isnan(paired_test(values, 0 * values).p) is not enough


@given(n=st.integers(MIN_QUERIES, 3000), data=st.data())
def test_wilson_is_scipys(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    interval, expected = wilson(successes, n), stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert (interval.value, interval.n_queries) == (successes / n, n)
    assert [interval.low, interval.high] == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


@given(n=st.integers(MIN_QUERIES, 300), share=st.floats(0.01, 0.99))
def test_wilsons_ends_are_the_shares_that_a_score_test_just_keeps(n: int, share: float) -> None:
    interval = wilson(share * n, n)
    for end in (interval.low, interval.high):
        assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n))
    assert interval.low < share < interval.high


def test_the_average_of_estimates() -> None:
    one, other = Interval(0.5, 0.2, 0.6, 8, 3), Interval(0.1, 0.1, 0.5, 9, 2)
    interval = mean_of_intervals(one, other)
    assert (interval.value, interval.n_queries, interval.n_seeds) == (pytest.approx(0.3), 8, 2)
    assert interval.low == pytest.approx(0.3 - 0.3 / 2)
    assert interval.high == pytest.approx(0.3 + math.hypot(0.1, 0.4) / 2)
    alone = mean_of_intervals(one)
    assert (alone.value, alone.low, alone.high) == pytest.approx((0.5, 0.2, 0.6))
    few = mean_of_intervals(one, wilson(1, 3))
    assert (few.value, few.known, few.n_queries) == (pytest.approx(5 / 12), False, 3)
    assert math.isnan(mean_of_intervals(one, wilson(0, 0)).value)


@pytest.mark.parametrize("shares", [(0.3, 0.5, 0.7), (0.05, 0.1, 0.1)])
def test_95_of_100_averages_of_shares_hold_the_mean(shares: tuple[float, ...]) -> None:
    sizes = (10, 20, 12)
    counts = np.random.default_rng(0).binomial(sizes, shares, size=(1000, 3)).tolist()
    intervals = [mean_of_intervals(*map(wilson, of, sizes)) for of in counts]
    held = sum(one.low <= sum(shares) / 3 <= one.high for one in intervals) / len(intervals)
    assert 0.92 <= held <= 0.98


@given(seed=SEEDS, n_seeds=st.integers(1, 3), n_queries=st.integers(5, 8), shift=st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_few_queries_have_the_exact_p_of_all_sign_flips(seed: int, n_seeds: int, n_queries: int, shift: float) -> None:
    a, b = normal(seed, n_seeds, n_queries) + shift, normal(seed + 1, n_seeds, n_queries)
    by_query = [sum(a[s, q] - b[s, q] for s in range(n_seeds)) / n_seeds for q in range(n_queries)]
    flipped = [
        abs(sum(sign * x for sign, x in zip(signs, by_query, strict=True)))
        for signs in itertools.product((1, -1), repeat=n_queries)
    ]
    extreme = sum(total >= abs(sum(by_query)) - 1e-12 for total in flipped)
    paired = paired_test(a, b)
    assert paired.p == pytest.approx(extreme / len(flipped))
    expected = bootstrap(a - b)
    ends = [(one.value, one.low, one.high) for one in (paired.difference, expected)]
    assert ends[0] == pytest.approx(ends[1]), "resampled together, as if their differences were"


def test_many_queries_have_a_students_p_and_pairing_tells_what_means_do_not() -> None:
    b = 10 * normal(1, 1, 80)
    a = b + 0.2 + normal(2, 1, 80)
    paired = paired_test(a, b)
    assert paired.p == pytest.approx(float(stats.ttest_rel(a[0], b[0]).pvalue), abs=0.02)
    assert paired.difference.high - paired.difference.low < 0.2 * (bootstrap(a).high - bootstrap(a).low)


def test_seeds_do_not_multiply_queries_in_a_test() -> None:
    a, b = normal(0, 1, 8), normal(1, 1, 8)
    assert paired_test(a, b).p == paired_test(np.repeat(a, 4, axis=0), np.repeat(b, 4, axis=0)).p


def test_a_paired_test_as_text() -> None:
    paired = Paired(Interval(0.1, 0.05, 0.2, 9, 2), 0.0123, (0.08, 0.12))
    assert str(paired) == "0.100 [0.050, 0.200], p = 0.0123, by seed 0.080, 0.120"


def test_equal_scores_do_not_differ() -> None:
    a = normal(0, 2, 9)
    assert paired_test(a, a).p == 1
    assert paired_test(a, a).difference == Interval(0.0, 0.0, 0.0, 9, 2)


def test_scores_of_other_queries_are_each_their_own_mean() -> None:
    """Rec2FTP of two finetunings is of the queries that each corrects."""
    a, b = normal(0, 2, 40), normal(1, 2, 40) - 1
    a[:, 30:], b[:, :15] = np.nan, np.nan
    paired = paired_test(a, b)
    assert paired.difference.value == pytest.approx(np.nanmean(a) - np.nanmean(b))
    assert paired.difference.n_queries == 25
    assert paired.by_seed == pytest.approx([np.nanmean(a[row]) - np.nanmean(b[row]) for row in range(2)])
    assert paired.p < 0.01
    assert paired.difference.low > 0
    # Drawn one by one: the same queries and seeds for both.
    rng, differences = np.random.default_rng(0), []
    for _ in range(2000):
        rows, columns = rng.integers(2, size=2), rng.integers(40, size=40)
        differences.append(np.nanmean(a[rows][:, columns]) - np.nanmean(b[rows][:, columns]))
    assert_same(paired.difference, *np.quantile(differences, (0.025, 0.975)), tolerance=0.1)


def test_both_are_undefined_for_the_same_queries_as_if_these_were_not_there() -> None:
    a, b = normal(0, 2, 12), normal(1, 2, 12)
    a[:, 9:], b[:, 9:] = np.nan, np.nan
    paired, expected = paired_test(a, b), paired_test(a[:, :9], b[:, :9])
    assert paired.difference.value == pytest.approx(expected.difference.value)
    assert paired.p == pytest.approx(expected.p, abs=0.02)  # one counts all swaps, the other draws them
    assert paired.difference.n_queries == 9


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_accuracy_of_none_or_all_is_not_certain(share: float) -> None:
    table = np.full((3, 20), share)
    assert estimate(table, of="ICL accuracy") == replace(wilson(20 * share, 20), n_seeds=3)
    assert estimate(table, of="SimAOU").low == share
    mixed = np.tile([0.0, 1.0], (1, 10))
    assert estimate(mixed, of="ICL accuracy") == bootstrap(mixed)


def test_a_recall_counts_a_query_once_for_all_seeds() -> None:
    table = np.full((2, 30), np.nan)
    table[0, :8], table[1, 4:10] = [1, 1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 0, 1]
    interval = estimate(table, of="Rec2FTP")
    assert (interval.value, interval.n_queries, interval.n_seeds) == (pytest.approx(10 / 14), 10, 2)
    expected = wilson(10 * 10 / 14, 10)
    assert (interval.low, interval.high) == (expected.low, expected.high)
    both = estimate(table, 1 - table, of="Rec2FTP")
    assert both.value == pytest.approx(0.5)
    assert both.low < interval.low or both.high - both.low < interval.high - interval.low
    assert math.isnan(estimate(np.full((1, 9), np.nan), of="Rec2FTP random").value)


@pytest.mark.parametrize(
    ("interval", "arguments", "expected"),
    [
        (Interval(0.1522, 0.14, 0.1634, 9), {}, "0.152 [0.140, 0.163]"),
        (Interval(1 / 3, 0.0615, 0.7923, 9), {"digits": 1, "scale": 100.0, "counts": "3/9"}, "33.3 [6.2, 79.2] (3/9)"),
        (Interval(-0.0002, -0.0001, 0.1, 9), {}, "0.000 [0.000, 0.100]"),
        (wilson(1, 3), {}, "0.333 (3 queries: no interval)"),
        (wilson(1, 1), {"digits": 0}, "1 (1 query: no interval)"),
        (wilson(1, 3), {"digits": 1, "scale": 100.0, "counts": "1/3"}, "33.3 (1/3: no interval)"),
        (wilson(0, 0), {}, "undefined"),
        (wilson(0, 0), {"counts": "0/0"}, "undefined (0/0)"),
    ],
)
def test_an_interval_as_text(interval: Interval, arguments: dict, expected: str) -> None:
    assert interval.format(**arguments) == expected
    if not arguments:
        assert str(interval) == expected


def test_what_a_caller_can_mend_is_said() -> None:
    with pytest.raises(ValueError, match="expected at least one group of values, got none"):
        bootstrap()
    with pytest.raises(ValueError, match="expected at least one estimate, got none"):
        mean_of_intervals()
    for successes in (-1, 4):
        with pytest.raises(ValueError, match=f"expected from 0 to n=3 successes, got {successes}"):
            wilson(successes, 3)
    with pytest.raises(ValueError, match=r"got shapes \(2, 7\) and \(2, 8\): keep the seeds and queries of both"):
        paired_test(normal(0, 2, 7), normal(0, 2, 8))
    for call in (lambda: bootstrap(normal(0, 9)), lambda: paired_test(normal(0, 9), normal(1, 9))):
        with pytest.raises(ValueError, match=r"expected a table \[seed query\], got shape \(9,\): .*values\[None\]"):
            call()


def test_runs_of_seeds_are_held_against_each_other_by_students_test():
    a, b = np.array([1.0, 2.0, 4.0, 4.0, 5.0]), np.array([0.5, 1.8, 3.0, 4.1, 4.0])
    paired = over_seeds(a, b)
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    assert (paired.difference.value, paired.difference.low, paired.difference.high) == pytest.approx(
        (np.mean(a - b), low, high)
    )
    assert paired.p == pytest.approx(test.pvalue)
    assert paired.by_seed == pytest.approx(tuple(a - b))
    assert over_seeds(a, a).p == 1.0
    assert over_seeds(a + 1, a).p == 0.0  # the same for every seed
    assert not over_seeds(a[:1], b[:1]).difference.known
    with pytest.raises(ValueError, match="expected numbers of the same seeds, one at least, got 5 and 4"):
        over_seeds(a, b[:4])


def test_students_interval_holds_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2000, 5))
    inside = 0
    for row in shared:
        difference = over_seeds(row + 0.3 + rng.normal(size=5), row).difference
        inside += difference.low <= 0.3 <= difference.high
    assert 0.93 < inside / 2000 < 0.97


def test_replicas_widen_an_interval_to_both_sides_by_their_farthest_shifts() -> None:
    interval = Interval(0.15, 0.14, 0.16, 80)
    wider = widened(interval, np.array([[0.002, 0.08, -0.01]]))
    assert (wider.low, wider.high, wider.spread) == pytest.approx((0.13, 0.24, 0.09))
    assert wider.unstable
    steady = widened(interval, np.array([[0.002, -0.001]]))
    assert (steady.low, steady.high) == pytest.approx((0.139, 0.162))
    assert not steady.unstable
    assert not interval.unstable, "it was finetuned once"
    assert widened(interval) == interval
    assert widened(interval, np.empty((2, 0))) == interval


def test_the_run_itself_is_one_of_the_replicas() -> None:
    wider = widened(Interval(0.5, 0.4, 0.6, 9), np.array([[0.3, 0.1]]))
    assert (wider.low, wider.high, wider.spread) == pytest.approx((0.4, 0.9, 0.3))


@given(seed=SEEDS, n_groups=st.integers(1, 3), n_seeds=st.integers(1, 4))
def test_moves_of_seeds_and_groups_add_up_as_independent_errors(seed: int, n_groups: int, n_seeds: int) -> None:
    shifts = normal(seed, n_groups, n_seeds, 3)
    wider = widened(Interval(0.0, -1.0, 1.0, 9), *shifts)
    up = [max(0.0, *by_replica) for group in shifts.tolist() for by_replica in group]
    down = [max(0.0, *(-shift for shift in by_replica)) for group in shifts.tolist() for by_replica in group]
    n = n_groups * n_seeds
    assert wider.high - 1 == pytest.approx(math.sqrt(sum((move / n) ** 2 for move in up)))
    assert -1 - wider.low == pytest.approx(math.sqrt(sum((move / n) ** 2 for move in down)))


def test_a_diverged_replica_leaves_no_bound_and_one_without_a_value_counts_as_none() -> None:
    interval = Interval(0.5, 0.4, 0.6, 9)
    diverged = widened(interval, np.array([[0.01, np.inf], [0.0, 0.0]]))
    assert (diverged.low, diverged.high, diverged.unstable) == (-math.inf, math.inf, True)
    assert diverged.format() == "0.500† [-inf, inf]"
    assert widened(interval, np.array([[np.nan, 0.1]])) == widened(interval, np.array([[0.1]]))
    assert widened(interval, np.array([[np.nan, np.nan]])) == interval, "nothing is known"


def test_a_group_without_replicas_keeps_its_share_of_the_mean() -> None:
    interval, replicas = Interval(0.5, 0.4, 0.6, 9), np.array([[0.5, 0.2]])
    wider = widened(interval, replicas, np.empty((1, 0)))
    assert (wider.low, wider.high, wider.spread) == pytest.approx((0.4, 0.85, 0.25))
    assert wider.unstable


def test_only_a_spread_beyond_the_interval_over_queries_is_unstable() -> None:
    interval = Interval(0.5, 0.4, 0.6, 9)
    assert not widened(interval, np.array([[0.19]])).unstable
    assert widened(interval, np.array([[0.21]])).unstable
