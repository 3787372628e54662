"""The comparison of in-context learning and finetuning, by all metrics of the catalogue → `Comparison`.

Attention to the demonstrations is compared by token, and by demonstration: the softmax over all their tokens, summed
within each.

SimAOU has a known flaw. Two updates of the same vector that are normalised first and then subtracted share that
vector, and so are alike (Deutch et al., 2024): with independent noise r of |r|² = 3|z|², SimAOU is 1/4. Hence the
cosine of the plain differences (SimAOU unnormalised, SimAMΔ), and nulls by the same formula of centred random updates
that are as long as those observed.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tabulate import tabulate
from torch import Tensor

from icl_dual.arguments import Seed, checked
from icl_dual.captures.capture import Capture
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.weight_delta import WeightDelta
from icl_dual.html_tables import Line, lines_table
from icl_dual.metrics.batch import Batch, random_streams
from icl_dual.metrics.catalogue import ABSENT, Metric, metrics
from icl_dual.metrics.formulas import Rec2FTP, rec2ftp
from icl_dual.metrics.stability import Stability
from icl_dual.recordings.recordings import SETTINGS, Recordings
from icl_dual.results import ROUNDING, check_axes, check_names, check_range, check_values
from icl_dual.scoring import Scoring
from icl_dual.statistics.frames import html_table
from icl_dual.statistics.intervals import (
    MIN_QUERIES,
    UNSTABLE,
    Interval,
    Shifts,
    Table,
    bootstrap,
    mean_of_intervals,
    paired_test,
    proportion,
    widened,
)
from icl_dual.storage import Saved
from icl_dual.torch_utils import to_list

KENDALL_QUERIES = 100
"""Attention to the demonstrations is compared on this many of the first queries, as the paper does."""

QUERIES_AT_ONCE = 64
"""The number of queries whose float64 copies the metrics hold at a time."""


SIGNIFICANT = 0.05
"""A verdict says above or below where p is smaller than this."""


def estimate(*groups: Table, of: str, shifts: Sequence[Shifts] = ()) -> Interval:
    """Return a metric of one task, or its mean over several, with the interval of its rule (`Metric.interval`).

    By the rule `proportion` (Rec2FTP, a share of few queries) the interval is Wilson's (`intervals.proportion`), also
    of the mean of several tasks (`intervals.mean_of_intervals`). By the rule `accuracy` it is Wilson's for one task's
    value of 0 or 1, to which the bootstrap would give no width. All others are `intervals.bootstrap`'s.

    Args:
        groups: tables `[seed query]`, one for each task.
        of: the metric's name; one that is not registered has the rule `bootstrap`.
        shifts: by task, how far each seed's replicas of the finetuning move the metric (`Comparison.shifts`), by which
            the interval is widened; without them, the interval is over queries and seeds alone.
    """
    metric = metrics().get(of)
    rule = "bootstrap" if metric is None else metric.interval
    if rule == "proportion":
        return _clipped(widened(mean_of_intervals(*(proportion(group) for group in groups)), *shifts), metric)
    interval = bootstrap(*groups)
    is_extreme = rule == "accuracy" and len(groups) == 1 and interval.value in (0.0, 1.0)
    return _clipped(widened(proportion(*groups) if is_extreme else interval, *shifts), metric)


def _clipped(interval: Interval, metric: Metric | None) -> Interval:
    """Return an interval that ends where the metric's range does: replicas may widen it beyond."""
    if metric is None or not interval.known:
        return interval
    least, largest = metric.range
    return replace(interval, low=max(interval.low, float(least)), high=min(interval.high, float(largest)))


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class Comparison(Saved):
    """In-context learning against finetuning on the same demonstrations, by the metrics of the catalogue."""

    gold: Int[Tensor, " query"]
    """The queries' label indices."""
    predictions: dict[str, Int[Tensor, " query"]]
    """By setting (ZSL, ICL, FT): each query's most probable label."""
    label_log_probs: dict[str, Float[Tensor, "query label"]]
    """By setting: the mean log-probability per token of each label word, in nats; recordings have none."""
    rec2ftp: Rec2FTP
    """The recall of finetuning's corrections by in-context learning."""
    per_layer: dict[str, Float[Tensor, "_ layer"]]
    """By metric: its value for each query and layer, NaN where undefined. SimAM is averaged over heads; Kendall and
    recall have the first queries only, and are absent where the recordings lack what they need."""
    per_query: dict[str, Float[Tensor, "_"]] = field(default_factory=dict[str, Tensor])
    """By registered metric with one value a query: its values, NaN where undefined. Those of predictions alone, such as
    accuracy, are not kept here: they follow from `predictions`."""
    stability: Stability | None = None
    """How far replicas of the finetuning move each metric; `None` where it was finetuned once."""
    scoring: Scoring = "mean"
    """The rule by which predictions follow from the label words' log-probabilities (`icl_dual.scoring`)."""

    def __post_init__(self) -> None:
        axes = check_axes(self)
        check_names("predictions", self.predictions, SETTINGS)
        if self.label_log_probs:
            check_names("label_log_probs", self.label_log_probs, SETTINGS)
        check_values(self, "gold", "predictions", low=0, high=axes.get("label", np.inf) - 1)
        check_values(self, "label_log_probs", high=ROUNDING)
        self._check_counts()
        for group in ("per_layer", "per_query"):
            for name, values in getattr(self, group).items():
                self._check_metric(name, f"{group}/{name}", values)
        partial = (name for name in self.per_layer if name in metrics() and metrics()[name].first_queries)
        if len(lengths := {len(self.per_layer[name]) for name in partial}) > 1:
            raise ValueError(
                f"expected per_layer with as many first queries for each metric of these, got {sorted(lengths)}: "
                "compare again"
            )
        if self.stability is not None and self.stability.n_queries > len(self.gold):
            raise ValueError(
                f"expected stability of at most as many queries as gold ({len(self.gold)}), got "
                f"{self.stability.n_queries}: take both from one run"
            )

    def _check_metric(self, name: str, path: str, values: Tensor) -> None:
        """Check that a metric has a value for each query, or for the first ones, and that all are in its range."""
        metric, n_queries = metrics().get(name), len(self.gold)
        is_partial = metric is None or metric.first_queries
        if len(values) > n_queries or (len(values) < n_queries and not is_partial):
            raise ValueError(
                f"expected {path} with {'at most ' * is_partial}as many queries as gold ({n_queries}), got "
                f"{len(values)}: take both from one run"
            )
        low, high = (-np.inf, np.inf) if metric is None else metric.range
        check_range(path, values, low=low - ROUNDING, high=high + ROUNDING, nan=True, infinite=True)

    def _check_counts(self) -> None:
        """Check that what follows from the queries' labels is what they give."""
        expected = rec2ftp(self.gold, *(self.predictions[setting] for setting in SETTINGS))
        if (self.rec2ftp.both, self.rec2ftp.finetuned) != (expected.both, expected.finetuned):
            raise ValueError(f"expected rec2ftp as predictions give it, {expected}, got {self.rec2ftp}: compare again")
        check_range("rec2ftp/random", self.rec2ftp.random, low=0, high=1, nan=True)
        for setting, log_probs in self.label_log_probs.items():
            if self.scoring == "mean" and not torch.equal(self.predictions[setting], log_probs.argmax(-1)):
                raise ValueError(
                    f"expected predictions/{setting} as the labels of the largest label_log_probs, got others: compare "
                    "again"
                )

    @property
    def accuracy(self) -> dict[str, float]:
        """Return the share of queries with the gold label as prediction, by setting."""
        return {name: (labels == self.gold).double().mean().item() for name, labels in self.predictions.items()}

    def by_query(self) -> dict[str, Float[Tensor, " query"]]:
        """Return each number over all layers together, query by query, NaN where undefined.

        It is whether a prediction is right, whether ICL makes a correction of FT (`formulas.recall`), or the mean of a
        metric over layers.
        """
        batch = Batch(gold=self.gold, predictions=self.predictions)
        from_predictions = {name: m.values(batch) for name, m in metrics().items() if m.from_predictions}
        per_query = {name: values.double() for name, values in self.per_query.items()}
        return from_predictions | per_query | {name: v.nanmean(1).double() for name, v in self.per_layer.items()}

    @checked
    def shifts(self, metric: str) -> Float[Tensor, "1 replica"]:
        """Return how far each replica of the finetuning moves a metric over all layers together; empty without any."""
        shifts = {} if self.stability is None else self.stability.shifts
        return shifts.get(metric, torch.empty(0, dtype=torch.float64))[None]

    def intervals(self) -> dict[str, Interval]:
        """Return each number over all layers together, with its 95 % interval over queries and replicas."""
        return {name: self._interval(name, values) for name, values in self.by_query().items()}

    @property
    def unstable(self) -> tuple[str, ...]:
        """Return the metrics with a spread over replicas that exceeds their interval over queries.

        A metric that another is held against, such as a random update's, is not among them.
        """
        return tuple(name for name, interval in self._held_intervals().items() if interval.unstable)

    def _held_intervals(self) -> dict[str, Interval]:
        """Return the intervals of the metrics that are no baselines of others."""
        baselines = {name for metric in metrics().values() for name in metric.baselines}
        return {name: interval for name, interval in self.intervals().items() if name not in baselines}

    def overall(self) -> pd.DataFrame:
        """Return the numbers over all layers together: metric, value, low and high (its 95 % interval), spread, n.

        The spread is the range over replicas of the finetuning, which the interval includes; n counts queries.
        """
        return pd.DataFrame(
            {"metric": name, "value": x.value, "low": x.low, "high": x.high, "spread": x.spread, "n": x.n_queries}
            for name, x in self.intervals().items()
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row for each number: metric, layer, value, low, high, spread, and the n queries it is a mean over.

        The layer is empty for all layers together; only these rows have low and high, the 95 % interval. The spread is
        the range over replicas of the finetuning.
        """
        rows: list[dict[str, Any]] = []
        for metric, values in self.by_query().items():
            interval = self._interval(metric, values)  # a query counts once, however many of its layers are defined
            numbers = {"value": values.nanmean().item(), "low": interval.low, "high": interval.high}
            numbers |= {"spread": interval.spread, "n": int(values.isfinite().sum())}
            rows.append({"metric": metric, "layer": None, **numbers})
            rows += self._layer_rows(metric)
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def _layer_rows(self, metric: str) -> list[dict[str, Any]]:
        """Return the rows of a metric's layers in `to_frame`."""
        if metric not in self.per_layer:
            return []
        values = self.per_layer[metric]
        spreads = [np.nan] * values.shape[1]
        if self.stability is not None and metric in self.stability.layer_shifts:
            low, high = self.stability.layer_range(metric)
            spreads = to_list(high - low)
        columns = zip(to_list(values.nanmean(0)), spreads, to_list(values.isfinite().sum(0)), strict=True)
        ends = {"low": np.nan, "high": np.nan}
        return [
            {"metric": metric, "layer": layer, "value": value, **ends, "spread": spread, "n": n}
            for layer, (value, spread, n) in enumerate(columns)
        ]

    def _interval(self, metric: str, values: Float[Tensor, " query"]) -> Interval:
        """Return a metric over all layers together with its interval over queries and replicas."""
        return estimate(values[None], of=metric, shifts=(self.shifts(metric),))

    def to_latex(self) -> str:
        """Return a LaTeX table (booktabs) of the numbers over all layers together, with their 95 % intervals."""
        rows = [(name, x.format(counts=self._counts(name)), x.n_queries) for name, x in self.intervals().items()]
        header = ("metric", "value [95 % interval]", "queries")
        table = tabulate(
            rows, header, tablefmt="latex_booktabs", disable_numparse=True, colalign=("left", "left", "right")
        )
        return table.replace("Δ", r"$\Delta$").replace(UNSTABLE, r"$^\dagger$")

    def summary(self) -> pd.DataFrame:
        """Return a row for each headline metric, with the baseline that it is held against and a verdict.

        Columns: metric, value, low, high, spread, unstable, n, baseline, baseline_value, p, verdict. p is two-sided, of
        `intervals.paired_test` between the metric and its first baseline on the same queries. It is not corrected for
        the number of tests. A verdict says where replicas of the finetuning overturn it, diverged, or leave the metric
        unstable.
        """
        values_by_name = self.by_query()
        headlines = [metric for metric in metrics().values() if metric.headline]
        return pd.DataFrame([self._summary_row(metric, values_by_name) for metric in headlines])

    def released(self) -> dict[str, Any]:
        """Return the metrics under the released scripts' names: Recall2FTP in per cent, the others as lists by layer.

        Means over queries are the scripts': a cosine with a zero vector counts as 0, and one undefined rank correlation
        leaves its layer undefined.
        """
        scores: dict[str, Any] = {"Recall2FTP": 100 * self.rec2ftp.value}
        for name, metric in metrics().items():
            if metric.released and name in self.per_layer:
                values = self.per_layer[name]
                scores[metric.released] = to_list((values.nan_to_num() if metric.released_zeros else values).mean(0))
        return scores

    def __repr__(self) -> str:
        settings = ", ".join(f"{name} accuracy={value:.3f}" for name, value in self.accuracy.items())
        by_rule = "" if self.scoring == "mean" else f" (scoring={self.scoring!r})"
        stability = self._stability_in_words()
        return f"Comparison({len(self.gold)} queries, {settings}{by_rule}, Rec2FTP={self.rec2ftp}, {stability})"

    def _repr_html_(self) -> str:
        headlines = [metric.name for metric in metrics().values() if metric.headline]
        lines = [
            Line(name, f"query={len(values)} layer={values.shape[1]}", "layer", to_list(values.double().nanmean(0)))
            for name, values in self.per_layer.items()
            if name in headlines
        ]
        by_layer = lines_table("By layer, mean over queries", lines) if lines else ""
        return f"{html_table(self._printed())}{by_layer}<p>{html.escape(self._stability_in_words())}</p>"

    def __str__(self) -> str:
        frame = self._printed()
        width = {name: max(len(name), *map(len, frame[name])) for name in frame.columns}
        texts = {name: frame[name].str.ljust(width[name]) for name in frame.columns}
        lines = pd.DataFrame(texts).to_string(index=False, header=[name.ljust(width[name]) for name in frame.columns])
        return "\n".join([*(line.strip() for line in lines.splitlines()), self._stability_in_words()])

    def _printed(self) -> pd.DataFrame:
        """Return `summary` as text."""
        rows: list[tuple[str, ...]] = []
        for row in self.summary().to_dict("records"):
            interval = Interval(*(row[name] for name in ("value", "low", "high", "n")), unstable=row["unstable"])
            absent = row["verdict"].startswith("absent")
            has_baseline = not np.isnan(row["baseline_value"])
            against = f"{row['baseline']} {row['baseline_value']:.3f}".strip() if has_baseline else ""
            text = "–" if absent else interval.format(counts=self._counts(row["metric"]))
            rows.append((row["metric"], text, against, row["verdict"]))
        return pd.DataFrame(rows, columns=["metric", "value [95 % interval]", "held against", "verdict"])

    def _stability_in_words(self) -> str:
        """Return how stable the metrics are over replicas of the finetuning."""
        if self.stability is None:
            return "stability not measured: finetuned once"
        n, diverged, over = len(self.stability.replicas), len(self.stability.diverged), "replicas of the finetuning"
        if diverged:
            return f"unstable: {diverged} of {n} {over} diverged"
        if self.unstable:
            return f"unstable{UNSTABLE} over {n} {over}: {', '.join(self.unstable)}"
        if not any(interval.known for interval in self._held_intervals().values()):
            return f"stability over {n} {over} unknown: fewer than {MIN_QUERIES} queries, so no interval"
        return f"stable over {n} {over}"

    def _counts(self, metric: str) -> str:
        return f"{self.rec2ftp.both}/{self.rec2ftp.finetuned}" if metric == "Rec2FTP" else ""

    def _summary_row(self, metric: Metric, values_by_name: dict[str, Tensor]) -> dict[str, Any]:
        row: dict[str, Any] = {"metric": metric.name, "value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
        row |= {"spread": np.nan, "unstable": False}
        row |= {"baseline": next(iter(metric.baselines), ""), "baseline_value": np.nan, "p": np.nan}
        if metric.name not in values_by_name:
            reasons = [ABSENT[name] for name in metric.needs] or ["the comparison was made without it (compare again)"]
            return row | {"verdict": f"absent: {reasons[0]}"}
        values = values_by_name[metric.name]
        interval = self._interval(metric.name, values)
        row |= {"value": interval.value, "low": interval.low, "high": interval.high, "spread": interval.spread}
        row |= {"unstable": interval.unstable, "n": interval.n_queries}
        if row["baseline"] in values_by_name:
            baseline, called = values_by_name[row["baseline"]], metrics()[row["baseline"]].called
        elif metric.null is not None:
            baseline, called = torch.full_like(values, metric.null), f"{metric.null:g}"
            row["baseline"] = ""  # which this comparison lacks
        else:
            lacking = f"its baseline {row['baseline']} is absent (compare again)" if row["baseline"] else "no baseline"
            return row | {"verdict": f"not tested: {lacking}"}
        n_shared = min(len(values), len(baseline))
        row |= {"baseline_value": baseline.nanmean().item()}
        shifts = self.shifts(metric.name)[0]
        if row["baseline"]:
            shifts = difference_of_shifts(shifts, self.shifts(row["baseline"])[0])
        values, baseline = values[:n_shared], baseline[:n_shared]
        return row | _verdict(metric, values, baseline, called, shifts, unstable=interval.unstable)

    @classmethod
    @checked
    def from_saved(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any], folder: str | PathLike[str]
    ) -> "Comparison":
        """Return the comparison of what `load_tensors` has read.

        A metric that the folder lacks is absent from the comparison; one that is not registered now is kept, after the
        others.

        Args:
            tensors: the tensors by name.
            metadata: the JSON values by name.
            folder: the folder that they were read from, for errors.

        Raises:
            AssetError: they are another result's.
        """
        # safetensors sorts its names: settings and metrics come back in the order of the tables.
        loaded = super().from_saved(tensors, metadata, folder)
        by_setting = {
            group: {name: values[name] for name in SETTINGS if name in values}
            for group in ("predictions", "label_log_probs")
            if (values := getattr(loaded, group)) is not None
        }
        return replace(
            loaded, **by_setting, per_layer=_in_order(loaded.per_layer), per_query=_in_order(loaded.per_query)
        )

    @classmethod
    def _upgraded(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what version 0.1 wrote, which has no entry for label log-probabilities where there are none."""
        return tensors, {"label_log_probs": {}, **metadata}


@checked
def compare(
    *,
    zero_shot: Capture,
    in_context: Capture,
    finetuned: Capture,
    delta: WeightDelta | None = None,
    steps: Sequence[int] | None = None,
    seed: Seed = 0,
) -> Comparison:
    """Compare in-context learning with finetuning, query by query and layer by layer.

    Args:
        zero_shot: a capture of the zero-shot prompts.
        in_context: a capture of the same queries behind their demonstrations.
        finetuned: a capture of the zero-shot prompts with the delta applied, or of a copy of the model, under the same
            name, that was finetuned by other means.
        delta: the finetuning on the same demonstrations. Without one, or with one that has no training queries,
            Kendall's τ and recall are absent.
        steps: for a control, with other demonstrations in context than were trained on: the training step that each of
            them corresponds to, −1 for none (`icl_dual.contexts.matching_training_steps`).
        seed: the seed of the random baselines.

    Raises:
        ValueError: the captures or the delta are of different models, queries or demonstrations, or lack a field; or a
            registered metric returns values that are not as it says.
    """
    comparison = compare_recordings(
        Recordings.of(zero_shot=zero_shot, in_context=in_context, finetuned=finetuned, delta=delta, steps=steps),
        seed=seed,
    )
    captures = {"ZSL": zero_shot, "ICL": in_context, "FT": finetuned}
    label_log_probs = {name: capture.label_log_probs.cpu() for name, capture in captures.items()}
    return replace(comparison, label_log_probs=label_log_probs, scoring=in_context.prompts.scoring)


@checked
def compare_recordings(
    recordings: Recordings, *, seed: Seed = 0, kendall_queries: int | None = KENDALL_QUERIES
) -> Comparison:
    """Compare in-context learning with finetuning from recordings, ours or the released code's, without any model.

    Args:
        recordings: for example what `load_recordings` reads.
        seed: the seed of the random baselines.
        kendall_queries: the number of first queries whose attention to the demonstrations is compared; `None` for all.

    Raises:
        ValueError: `kendall_queries` is below one, or a registered metric returns values that are not as it says.
    """
    n_queries = len(recordings.gold)
    if kendall_queries is None:
        kendall_queries = n_queries
    if kendall_queries < 1:
        raise ValueError(
            f"expected kendall_queries of at least 1, got {kendall_queries}: pass a number of queries, or None for all"
        )
    return _compare(recordings, metrics().values(), seed=seed, kendall_queries=kendall_queries)


def _compare(
    recordings: Recordings, chosen: Iterable[Metric], *, seed: int, kendall_queries: int = KENDALL_QUERIES
) -> Comparison:
    """Compare by some of the metrics, as far as the recordings have what each needs."""
    n_queries = len(recordings.gold)
    computed = {m.name: m for m in chosen if not m.from_predictions and not m.missing(recordings)}
    streams = random_streams(seed)
    values_by_name: dict[str, list[Tensor]] = {}
    for queries in torch.split(torch.arange(n_queries, device=recordings.gold.device), QUERIES_AT_ONCE):
        n_first = int((queries < kendall_queries).sum())
        batch = Batch.of(recordings, queries, n_first=n_first, seed=seed, streams=streams)
        for name, metric in computed.items():
            if n_first or not metric.first_queries:
                values_by_name.setdefault(name, []).append(metric.values(batch))
    values = {name: torch.cat(batches).cpu() for name, batches in values_by_name.items()}
    predictions = {setting: recordings.predictions[setting].cpu() for setting in SETTINGS}  # files sort them by name
    gold = recordings.gold.cpu()
    return Comparison(
        gold=gold,
        predictions=predictions,
        label_log_probs={},
        rec2ftp=rec2ftp(gold, predictions["ZSL"], predictions["ICL"], predictions["FT"]),
        per_layer={name: v for name, v in values.items() if computed[name].axes == "query layer"},
        per_query={name: v for name, v in values.items() if computed[name].axes == "query"},
    )


def difference_of_shifts(a: Float[Tensor, "*seed replica"], b: Float[Tensor, "*seed replica"]) -> Tensor:
    """Return how far each replica moves the difference of two metrics; infinite where it diverged for either."""
    return torch.where(a.isinf() | b.isinf(), torch.inf, a - b)


def with_stability(comparison: Comparison, replicas: Mapping[str, Recordings | str], *, seed: Seed = 0) -> Comparison:
    """Return a comparison that knows how far replicas of its finetuning move each metric.

    Args:
        comparison: the comparison of the finetuning itself.
        replicas: by replica, the recordings of its first queries with the replica's finetuned model; or, where it
            diverged, the error.
        seed: the seed of the random baselines, as in `compare`.

    Returns:
        The comparison, or the one given where there is no replica.
    """
    if not replicas:
        return comparison
    n_queries, unaffected = 0, [metric.name for metric in metrics().values() if not metric.from_finetuning]
    affected = [metric for metric in metrics().values() if metric.from_finetuning]
    values_by_replica: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]] | str] = {}
    for name, recordings in replicas.items():
        if isinstance(recordings, str):
            values_by_replica[name] = recordings
        else:
            replica = _compare(recordings, affected, seed=seed)
            n_queries, values_by_replica[name] = len(replica.gold), (replica.by_query(), replica.per_layer)
    stability = Stability.of(
        comparison.by_query(),
        comparison.per_layer,
        values_by_replica,
        n_queries=n_queries,
        unaffected=unaffected,
    )
    return replace(comparison, stability=stability)


def _verdict(
    metric: Metric,
    values: Float[Tensor, " query"],
    baseline: Float[Tensor, " query"],
    called: str,
    shifts: Float[Tensor, " replica"],
    *,
    unstable: bool,
) -> dict[str, Any]:
    """Return p of the paired test against the baseline, and what it means in words.

    Args:
        metric: the metric.
        values: its values.
        baseline: the values of what it is held against.
        called: what the verdict calls that.
        shifts: how far each replica of the finetuning moves the difference of both means.
        unstable: whether the metric is unstable over replicas.
    """
    if not values.isfinite().any():
        return {"p": np.nan, "verdict": f"undefined: {metric.undefined}"}
    test = paired_test(values[None], baseline[None])
    if np.isnan(test.p):
        n = test.difference.n_queries
        return {"p": test.p, "verdict": f"not tested: {n} {'query' if n == 1 else 'queries'}, fewer than {MIN_QUERIES}"}
    side = "not above" if test.p >= SIGNIFICANT else "above" if test.difference.value > 0 else "below"
    p = "p < .001" if test.p < 0.001 else f"p = {test.p:.3f}".replace("0.", ".")
    verdict = f"{side} {called} ({p})"
    overturned = int(((test.difference.value + shifts) * test.difference.value < 0).sum())
    if shifts.isinf().any():
        verdict += f", {int(shifts.isinf().sum())} of {len(shifts)} replicas diverged"
    elif side != "not above" and overturned:
        verdict += f", overturned in {overturned} of {len(shifts)} replicas"
    elif unstable:
        verdict += ", unstable"
    return {"p": test.p, "verdict": verdict}


def _in_order(values_by_name: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return values by metric in the order of the catalogue, with metrics that are not registered after the others."""
    names = dict.fromkeys((*metrics(), *values_by_name))
    return {name: values_by_name[name] for name in names if name in values_by_name}
