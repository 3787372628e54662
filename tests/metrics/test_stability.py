"""The spread over replicas of the finetuning, against comparisons of each replica made by hand."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import icl_dual as icl
from icl_dual import experiment as experiment_module
from icl_dual.finetuning import REPLICAS, Noise
from icl_dual.finetuning.replicas import finetune_with_replicas, replica_settings
from icl_dual.metrics import catalogue
from icl_dual.metrics.catalogue import Metric, metrics
from icl_dual.metrics.comparison import with_stability
from icl_dual.metrics.formulas import rec2ftp
from icl_dual.metrics.stability import Stability
from icl_dual.prompts import Prompts

LR = 0.05
RANKS = 2e-3
"""Rounding orders equal scores of one token that occurs twice: at most a few pairs of ranks differ."""


@pytest.fixture(scope="module")
def precise(make_model: Callable[..., icl.Model]) -> icl.Model:
    """In float64, so that no rounding tells one way of finetuning from another."""
    return make_model("llama", torch.float64)


@pytest.fixture(scope="module")
def experiment(precise: icl.Model, prompts: Prompts) -> icl.Experiment:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_module, "REPLICA_QUERIES", 5)
        return icl.run_experiment(precise, prompts, lr=LR, replicas=3, progress=False)


def test_shifts_are_those_of_comparisons_of_each_replica(
    experiment: icl.Experiment, precise: icl.Model, task: icl.Task
) -> None:
    comparison = experiment.compare(seed=4)
    stability = comparison.stability
    assert stability is not None
    assert stability.n_queries == 5
    first = icl.build_prompts(precise, task, task.demonstrations(4, seed=1), task.queries(7)[:5])
    pair = {"zero_shot": icl.capture(precise, first.zero_shot(), progress=False)}
    pair |= {"in_context": icl.capture(precise, first, progress=False)}

    def compared(lr: float, noise: Noise | None) -> icl.Comparison:
        delta = icl.finetune(precise, first, lr=lr, noise=noise, progress=False)
        with delta.applied(precise):
            finetuned = icl.capture(precise, first.zero_shot(), progress=False)
        return icl.compare(
            zero_shot=pair["zero_shot"], in_context=pair["in_context"], finetuned=finetuned, delta=delta, seed=4
        )

    clean = compared(LR, None)
    settings = {"lr × 0.999": (LR * 0.999, None), "lr × 1.001, noise +1": (LR * 1.001, Noise(1))}
    settings |= {"lr × 1, noise -1": (LR, Noise(1, -(2**-9)))}
    assert stability.replicas == tuple(settings)
    for index, (lr, noise) in enumerate(settings.values()):
        replica = compared(lr, noise)
        for name, values in replica.by_query().items():
            expected = values.nanmean().item() - clean.by_query()[name].nanmean().item()
            accuracy = RANKS if name.startswith(("Kendall", "Top-")) else 1e-6
            assert stability.shifts[name][index].item() == pytest.approx(expected, abs=accuracy, nan_ok=True), name
        for name, values in replica.per_layer.items():
            expected_by_layer = values.nanmean(0) - clean.per_layer[name].nanmean(0)
            # In the first layer alone, a token that occurs twice has equal scores.
            n_tied = 1 if name.startswith(("Kendall", "Top-")) else 0
            torch.testing.assert_close(
                stability.layer_shifts[name][index][n_tied:],
                expected_by_layer.double()[n_tied:],
                atol=1e-6,
                rtol=0,
                equal_nan=True,
                msg=name,
            )
    assert stability.shifts["SimAOU"].abs().min() > 1e-4, "replicas differ by more than rounding"
    assert (stability.shifts["SimAM before FT"] == 0).all(), "it does not depend on the finetuning"


def test_every_metric_carries_its_spread_beside_the_interval_over_queries(experiment: icl.Experiment) -> None:
    comparison = experiment.compare()
    alone = replace(comparison, stability=None)
    assert comparison.stability is not None
    frame = comparison.to_frame().set_index(["metric", "layer"])
    for name, interval in comparison.intervals().items():
        shifts = [shift for shift in comparison.stability.shifts[name].tolist() if not math.isnan(shift)]
        below, above = max(0.0, *(-shift for shift in shifts), 0), max(0.0, *shifts, 0)
        assert interval.spread == pytest.approx(below + above if shifts else math.nan, nan_ok=True)
        least, largest = catalogue.metrics()[name].range
        low, high = alone.intervals()[name].low - below, alone.intervals()[name].high + above
        assert interval.low == pytest.approx(max(low, least), nan_ok=True)
        assert interval.high == pytest.approx(min(high, largest), nan_ok=True)
    low, high = comparison.stability.layer_range("SimAOU")
    assert frame.loc[("SimAOU", 1), "spread"] == pytest.approx((high - low)[1].item())
    overall = comparison.overall().set_index("metric")
    assert overall.loc["SimAOU", "spread"] == pytest.approx(comparison.intervals()["SimAOU"].spread)


def test_the_range_of_a_layer_includes_the_run_itself() -> None:
    by_layer = torch.tensor([[0.1, -0.2, torch.nan], [0.3, -0.1, torch.nan]])
    stability = Stability(("a", "b"), 3, {"x": torch.tensor([0.2, 0.1])}, {"x": by_layer})
    low, high = stability.layer_range("x")
    assert low.tolist() == pytest.approx([0, -0.2, 0])
    assert high.tolist() == pytest.approx([0.3, 0, 0])


def test_an_experiment_saves_its_replicas(experiment: icl.Experiment, tmp_path: Path) -> None:
    experiment.save(tmp_path / "experiment")
    loaded = icl.Experiment.load(tmp_path / "experiment").compare(seed=1)
    comparison = experiment.compare(seed=1)
    comparison.save(tmp_path / "comparison")
    for other in (loaded, icl.Comparison.load(tmp_path / "comparison")):
        assert other.stability is not None
        assert comparison.stability is not None
        assert other.stability.replicas == comparison.stability.replicas
        assert other.shifts("SimAOU").equal(comparison.shifts("SimAOU"))
        assert str(other) == str(comparison)
        assert other.to_frame().equals(comparison.to_frame())


def test_without_replicas_the_result_says_so(llama: icl.Model, prompts: Prompts) -> None:
    experiment = icl.run_experiment(llama, prompts, lr=LR, replicas=0, progress=False)
    comparison = experiment.compare()
    assert comparison.stability is None
    assert comparison.unstable == ()
    assert repr(comparison).endswith("stability not measured: finetuned once)")
    assert math.isnan(comparison.intervals()["SimAOU"].spread)
    only_terms = icl.run_experiment(llama, prompts, lr=LR, fields=icl.DECOMPOSE_FIELDS, progress=False)
    assert only_terms.replicas == {}, "nothing would read them"


def moved(
    comparison: icl.Comparison, shifts: Mapping[str, list[float]], diverged: tuple[str, ...] = ()
) -> icl.Comparison:
    """A comparison with replicas that move some metrics by given shifts, and others not at all."""
    n = len(next(iter(shifts.values())))
    all_shifts = {name: torch.zeros(n, dtype=torch.float64) for name in comparison.by_query()}
    all_shifts |= {name: torch.tensor(values, dtype=torch.float64) for name, values in shifts.items()}
    names = tuple(f"replica {index}" for index in range(n))
    return replace(comparison, stability=Stability(replicas=names, n_queries=5, shifts=all_shifts))


def test_a_cell_with_a_spread_beyond_its_interval_is_marked_everywhere(experiment: icl.Experiment) -> None:
    comparison = replace(experiment.compare(), stability=None)
    interval = comparison.intervals()["SimAOU"]
    width = interval.high - interval.low
    steady, unsteady = (moved(comparison, {"SimAOU": [0.0, factor * width]}) for factor in (0.9, 1.1))
    assert steady.unstable == ()
    assert repr(steady).endswith("stable over 2 replicas of the finetuning)")
    assert unsteady.unstable == ("SimAOU",)
    assert repr(unsteady).endswith("unstable† over 2 replicas of the finetuning: SimAOU)")
    assert str(unsteady).endswith("unstable† over 2 replicas of the finetuning: SimAOU")
    assert "unstable† over 2 replicas" in unsteady._repr_html_()
    row = next(line for line in str(unsteady).splitlines() if line.startswith("SimAOU"))
    assert f"{interval.value:.3f}†" in row
    assert f"{interval.value:.3f}$^\\dagger$" in unsteady.to_latex()
    baseline = moved(comparison, {"SimAOU random update": [0.0, 1.0]})
    assert baseline.unstable == (), "a baseline of its own is no metric of the cell"


def test_a_verdict_that_a_replica_overturns_says_so(experiment: icl.Experiment) -> None:
    n, zeros = 20, torch.zeros(20).long()
    after = 0.5 + 0.01 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    comparison = replace(
        experiment.compare(),
        gold=zeros,
        predictions={"ZSL": zeros, "ICL": zeros, "FT": zeros},
        label_log_probs={},
        rec2ftp=rec2ftp(zeros, zeros, zeros, zeros),
        per_layer={
            "SimAM after FT": after,
            "SimAM before FT": torch.full((n, 2), 0.4),
        },
        stability=None,
    )

    def verdict(shifts: dict[str, list[float]]) -> str:
        return str(moved(comparison, shifts).summary().set_index("metric").loc["SimAM after FT", "verdict"])

    above = "above its value before FT (p < .001)"
    assert verdict({"SimAM after FT": [-0.001, 0.001]}) == above
    assert verdict({"SimAM after FT": [-0.05, 0.02]}) == f"{above}, unstable"
    assert (
        verdict({"SimAM after FT": [-0.2, 0.02]})
        == "above its value before FT (p < .001), overturned in 1 of 2 replicas"
    )
    together = {"SimAM after FT": [-0.2, 0.02], "SimAM before FT": [-0.2, 0.02]}
    assert verdict(together) == f"{above}, unstable", "both move alike"
    diverged = verdict({"SimAM after FT": [-0.001, math.inf]})
    assert diverged == f"{above}, 1 of 2 replicas diverged"
    baseline = {"SimAM after FT": [0.0, math.inf], "SimAM before FT": [0.0, math.inf]}
    assert verdict(baseline) == f"{above}, 1 of 2 replicas diverged", "∞ − ∞ is no agreement"


def test_a_diverged_replica_leaves_the_cell_unstable(experiment: icl.Experiment) -> None:
    names = list(experiment.replica_names)
    partly = replace(
        experiment,
        replicas={name: experiment.replicas[name] for name in names[1:]},
        diverged={names[0]: "finetuning diverged at step 2 of 4"},
    )
    comparison = partly.compare()
    assert comparison.stability is not None
    assert comparison.stability.replicas == tuple(names)
    assert "SimAOU" in comparison.unstable
    assert comparison.shifts("SimAOU")[0].isinf().tolist() == [True, False, False], "in its place"
    intervals = comparison.intervals()
    assert (intervals["SimAOU"].low, intervals["SimAOU"].high) == (-1, 1), "all of its range"
    for name in ("ZSL accuracy", "ICL accuracy", "SimAM before FT", "SimAM random", "SimAOU random"):
        assert not intervals[name].unstable, "finetuning does not move it"
    assert repr(comparison).endswith("unstable: 1 of 3 replicas of the finetuning diverged)")
    assert comparison.stability.diverged == ("finetuning diverged at step 2 of 4",)


def test_a_replica_that_overflows_when_it_is_captured_is_one_that_diverged(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetuned = finetune_with_replicas(llama, prompts, lr=LR, replicas=2, progress=False)
    name = finetuned.names[1]
    huge = replace(finetuned.replicas[name], W_V=finetuned.replicas[name].W_V * 1e38)
    monkeypatch.setattr(
        experiment_module,
        "finetune_with_replicas",
        lambda *args, **options: replace(finetuned, replicas={**finetuned.replicas, name: huge}),
    )
    experiment = icl.run_experiment(llama, prompts, lr=LR, replicas=2, progress=False)
    assert list(experiment.replicas) == [finetuned.names[0]], "the other one is captured"
    comparison = experiment.compare()
    assert comparison.stability is not None
    (error,) = comparison.stability.diverged
    assert re.search("expected finite .*, got infinite .*, first .* layer 0", error)
    assert comparison.shifts("SimAOU")[0].isinf().tolist() == [False, True]


def test_metrics_that_finetuning_does_not_move_are_not_computed_for_replicas(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, computed = icl.run_experiment(llama, prompts, lr=LR, replicas=2, progress=False), list[str]()
    values = Metric.values

    def counted(metric: Metric, batch: Any) -> Any:
        computed.append(metric.name)
        return values(metric, batch)

    monkeypatch.setattr(Metric, "values", counted)
    comparison = experiment.compare()
    counts = {name: computed.count(name) for name, metric in metrics().items() if not metric.from_predictions}
    still = {name for name, metric in metrics().items() if not metric.from_finetuning}
    assert still >= {"SimAM before FT", "SimAM random", "SimAOU random", "Kendall random"}
    assert counts == {name: 1 if name in still else 3 for name in counts}
    first = icl.compare_recordings(experiment.recordings(), seed=0)
    for recordings in experiment.replicas.values():
        replica = icl.compare_recordings(recordings, seed=0)
        for name in still - {"ZSL accuracy", "ICL accuracy"}:
            assert torch.equal(replica.per_layer[name], first.per_layer[name]), name
    for name in still:
        assert (comparison.shifts(name) == 0).all(), name


def test_which_tokens_are_massive_depends_on_finetuning() -> None:
    """So that also the value before finetuning moves where it leaves these tokens out."""
    assert metrics()["SimAM before FT without massive tokens"].from_finetuning
    assert not metrics()["SimAM before FT"].from_finetuning


def test_baselines_of_replicas_draw_the_runs_own_numbers(precise: icl.Model, task: icl.Task) -> None:
    """Also where the longest query is not among the first ones, so that theirs are padded less."""
    queries = sorted(task.queries(7), key=lambda example: len(str(example.fields)))
    prompts = icl.build_prompts(precise, task, task.demonstrations(4, seed=1), queries)
    assert max(map(len, prompts.queries)) > max(map(len, prompts.queries[:5]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_module, "REPLICA_QUERIES", 5)
        comparison = icl.run_experiment(precise, prompts, lr=LR, replicas=2, progress=False).compare()
    for name in ("SimAM random", "SimAOU random", "Kendall random"):
        assert (comparison.shifts(name) == 0).all(), name
    assert comparison.shifts("SimAMΔ random").abs().max() < 0.02


def test_without_intervals_stability_is_unknown(precise: icl.Model, task: icl.Task) -> None:
    prompts = icl.build_prompts(precise, task, task.demonstrations(4, seed=1), task.queries(3))
    comparison = icl.run_experiment(precise, prompts, lr=LR, replicas=2, progress=False).compare()
    assert repr(comparison).endswith(
        "stability over 2 replicas of the finetuning unknown: fewer than 5 queries, so no interval)"
    )


def test_a_metric_registered_later_has_a_spread_too(experiment: icl.Experiment) -> None:
    metric = icl.register_metric(
        icl.Metric("size of FT's update", lambda b: (b.h_finetuned - b.h_zero_shot).norm(dim=-1))
    )
    try:
        comparison = experiment.compare()
        assert comparison.shifts(metric.name).abs().min() > 0
        assert comparison.intervals()[metric.name].spread > 0
    finally:
        catalogue.unregister_metric(metric.name)


def test_recordings_alone_have_no_replicas(experiment: icl.Experiment) -> None:
    comparison = icl.compare_recordings(experiment.recordings())
    assert comparison.stability is None
    assert with_stability(comparison, {}) is comparison


@pytest.mark.parametrize("jitter", [2**-9, 2**-24], ids=["bfloat16 weights", "float32 weights"])
def test_intervals_with_replicas_hold_the_truth_at_a_threshold(jitter: float) -> None:
    """SGD on x⁴ − x², whose two minima are told apart by a threshold of the rate, as a metric with two levels.

    A run steps over the ridge at 0 or does not, by its rate and by its weights. Both are known to their precision only:
    the truth is the metric, over all queries, of other weights and another rate within it.
    """
    rng = np.random.default_rng(0)

    def level(lr: np.ndarray, start: np.ndarray) -> np.ndarray:
        x = start.copy()
        for _ in range(40):
            x = x - lr * (4 * x**3 - 2 * x)
        return (x > 0).astype(float)

    def finetuned(lr: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return 0.15 + 0.5 * level(lr, 1.2 * (1 + noise))

    rates = np.linspace(0.2, 0.3, 20_000)
    levels = finetuned(rates, np.zeros_like(rates))
    thresholds = rates[1:][np.diff(levels) != 0]
    assert len(thresholds) == 1
    held = alone = 0
    for draw in range(200):
        lr = thresholds[0] * (1 + 3e-3 * rng.uniform(-1, 1))
        truth = finetuned(lr * (1 + 1e-3 * rng.uniform(-1, 1, 1)), jitter * rng.normal(size=1)).item()
        lrs, noises = zip(*replica_settings(lr, REPLICAS).values(), strict=True)
        directions = rng.normal(size=1 + REPLICAS)
        start_noise = [
            0 if noise is None else jitter * np.sign(noise.size) * directions[noise.seed] for noise in noises
        ]
        own, *replicas = finetuned(np.array([lr, *lrs]), np.array([0.0, *start_noise]))
        interval = icl.statistics.bootstrap(own + 0.1 * rng.normal(size=(1, 60)), seed=draw)
        wider = icl.statistics.widened(interval, np.array([replicas]) - own)
        alone += interval.low <= truth <= interval.high
        held += wider.low <= truth <= wider.high
    assert held >= 180
    assert alone < held, "intervals over queries alone hold it less often"
