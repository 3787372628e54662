"""What `controls.py` says: metrics beside their controls, with intervals; against all of each kind; in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import icl_dual as icl
from icl_dual.metrics.comparison import difference_of_shifts, estimate
from icl_dual.order_sensitivity import PAIRS
from icl_dual.scripts.common import TITLES
from icl_dual.scripts.paper_tables import ACCURACY_ROWS, Results, by_query, by_replica, interval_of, style
from icl_dual.statistics import Interval, Paired, paired_test

CLAIM = "ICL and FT"
NULLS = {
    "SimAOU": {
        "paper's random baseline": "SimAOU random",
        "random update of FT's size": "SimAOU random update",
        "random updates for both": "SimAOU inflation null",
    },
    "SimAOU unnormalised": {"random update of FT's size": "SimAOU unnormalised random"},
    "SimAM after FT": {
        "paper's random baseline": "SimAM random",
        "random update of FT's size": "SimAM random update",
        "ICL and ZSL": "SimAM before FT",
    },
    "SimAM after FT without massive tokens": {
        "random update of FT's size": "SimAM random update without massive tokens",
        "ICL and ZSL": "SimAM before FT without massive tokens",
    },
    "SimAMΔ": {"random update of FT's size": "SimAMΔ random"},
    "SimAMΔ without massive tokens": {"random update of FT's size": "SimAMΔ random without massive tokens"},
    "Kendall": {"paper's random baseline": "Kendall random"},
    "Kendall on keys": {"paper's random baseline": "Kendall random"},
    "Rec2FTP": {"ICL's answers dealt at random": "Rec2FTP random"},
}
"""The paper's metrics and their corrected forms, each with the columns that a comparison itself holds beside it."""

MODELS: dict[str, dict[str, Any]] = {
    "untrained model": {"weights": "untrained"},
    "random attention and MLP": {"weights": "random-blocks"},
}
WEIGHTS: dict[str, dict[str, Any]] = {"random ΔW of FT's size": {"delta": "random"}}
CONTEXTS: dict[str, dict[str, Any]] = {
    "ICL on shuffled labels": {"context": "shuffled labels"},
    "ICL on random labels": {"context": "random labels"},
    "ICL on another task": {"context_task": "agnews"},
    "ICL on flipped labels": {"context": "flipped labels"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "both on flipped labels": {"context": "flipped labels", "finetuned_on": "context"},
    "ICL on another order": {"context": "reordered"},
    "FT on the label's loss": {"finetuning": icl.FinetuneConfig(loss="label")},
    "FT by one full-batch step": {"finetuning": icl.FinetuneConfig(method="full-batch")},
    "FT layer by layer (causal)": {"finetuning": icl.FinetuneConfig(method="layer-causal")},
    "FT of keys": {"finetuning": icl.FinetuneConfig(trained="key")},
    "FT of values": {"finetuning": icl.FinetuneConfig(trained="value")},
    "FT of all attention": {"finetuning": icl.FinetuneConfig(trained="attention")},
}
"""No controls, but what else could be compared: each row's cells differ from the claim's by these settings."""

FAMILIES = {
    "nulls": "what no update, or a random one, scores by the same formula",
    "models": "models that have learned nothing",
    "weights": "a random change of weights as large as finetuning's",
    "contexts": "contexts that are not what was finetuned on",
}
CLAIMS = {
    "SimAOU": "In-context learning moves attention outputs the way finetuning does",
    "SimAOU unnormalised": "The same of the updates themselves, not normalised first",
    "SimAM after FT": "In-context learning attends to the query as the finetuned model does",
    "SimAM after FT without massive tokens": "The same of the query's tokens without massive activations",
    "SimAMΔ": "In-context learning changes attention to the query as finetuning does",
    "SimAMΔ without massive tokens": "The same of the query's tokens without massive activations",
    "Kendall": "In-context learning attends to the demonstrations as finetuning does, by its queries",
    "Kendall on keys": "The same by keys, which is what attention scores",
    "Rec2FTP": "In-context learning makes the corrections that finetuning makes",
}

Runs = Mapping[str, Mapping[str, Results]]
"""By row of the table, then task: a result for each seed."""


def runs_of(results: Results) -> Runs:
    """Return finished cells, such as those of a grid with controls, by the row of the study that each is, and by task.

    The claim's cells are the plain ones. Variations that are no row of the study are rows of their own, by name.

    Raises:
        StudyError: the cells have several set-ups, or not every row has all tasks and seeds of the plain cells.
    """
    plain = icl.Cell(model="model", task="task", k=2, seed=1, lr=0.1)
    finetunings = {result.cell.finetuning for result in results if _varied(result.cell)[:-1] == _varied(plain)[:-1]}
    usual = finetunings.copy().pop() if len(finetunings) == 1 else plain.finetuning
    settings = {CLAIM: {}} | MODELS | WEIGHTS | CONTEXTS | VARIANTS
    names = {_varied(replace(plain, **of_row)): row for row, of_row in settings.items()}
    rows: dict[str, dict[str, list[icl.CellResult]]] = {row: {} for row in settings}
    for result in sorted(results, key=lambda result: (_place(result.cell.task), result.cell.seed)):
        cell = result.cell
        *others, finetuning = _varied(cell)
        key = (*others, plain.finetuning if finetuning == usual else finetuning)
        name = names.get(key) or " and ".join(cell.variation.values())
        rows.setdefault(name, {}).setdefault(cell.task, []).append(result)
    runs = {row: by_task for row, by_task in rows.items() if by_task}
    _check_complete(runs)
    return runs


def _varied(cell: icl.Cell) -> tuple:
    """What rows of the study differ in, but for the rate; the other task of a context may be any."""
    other_task = cell.context_task is not None
    return cell.weights, cell.context, other_task, cell.finetuned_on, cell.delta, cell.finetuning


def _place(task: str) -> tuple[int, str]:
    """Where a task is among the paper's, or after them."""
    return [*TITLES, task].index(task), task


def _check_complete(runs: Runs) -> None:
    """Every row must have the tasks and seeds of the claim, and all cells one set-up."""
    if CLAIM not in runs:
        raise icl.StudyError("expected plain cells, which controls are compared with, got none: run the whole grid")
    for name, values in _set_ups(runs).items():
        for of_key in values.values():
            if len(of_key) > 1:
                texts = sorted(map(str, of_key))
                raise icl.StudyError(
                    f"expected cells of one set-up, got {name} {' and '.join(texts)}: choose with --where "
                    f"{name}={texts[0]}"
                )
    seeds = {row: {task: [r.cell.seed for r in of] for task, of in by_task.items()} for row, by_task in runs.items()}
    for row, by_task in seeds.items():
        if by_task != seeds[CLAIM]:
            raise icl.StudyError(
                f"expected {row!r} with the tasks and seeds of the plain cells, {seeds[CLAIM]}, got {by_task}: run the "
                "grid to its end, or choose cells with --where"
            )


def _set_ups(runs: Runs) -> dict[str, dict[object, set[object]]]:
    """The values of each setting that must be one, by task or by row and task where it may differ between these."""
    values: dict[str, dict[object, set[object]]] = {}
    for row, by_task in runs.items():
        for task, results in by_task.items():
            for result in results:
                of_cell = {name: (task, getattr(result.cell, name)) for name in _FOR_A_TASK}
                of_cell |= {name: (None, getattr(result.cell, name)) for name in _FOR_ALL}
                of_cell |= {"lr": ((row, task), result.cell.lr), "precision": (None, precision_of(result))}
                for name, (key, value) in of_cell.items():
                    values.setdefault(name, {}).setdefault(key, set()).add(value)
    return values


_FOR_A_TASK = ("k", "n_queries", "source")
_FOR_ALL = ("model", "protocol", "balanced", "split", "reference_k_mismatch", "scoring")
"""The settings that must not differ within a task, and within a table."""


def precision_of(result: icl.CellResult) -> str:
    """The precision of a cell, as it was saved."""
    return result.provenance.get("precision", result.provenance["dtype"])


@dataclass(frozen=True)
class Score:
    """A metric of one task."""

    values: Float[Tensor, "seed query"]
    """Its value query by query."""
    shifts: Float[Tensor, "seed replica"]
    """How far replicas of the finetuning move its mean."""

    @classmethod
    def of(cls, results: Results, metric: str) -> "Score":
        """A metric of a task's cells."""
        return cls(by_query(results, metric), by_replica(results, metric))


Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Score]]]]
"""By metric, family, row, and task: scores query by query."""


def scored(runs: Runs) -> Scores:
    """Every metric, of the claim, all controls and the variants."""
    tasks = list(runs[CLAIM])
    families: dict[str, Sequence[str]] = {"claim": (CLAIM,), "nulls": (), "models": tuple(MODELS)}
    families |= {"weights": tuple(WEIGHTS), "contexts": tuple(CONTEXTS)}
    known = {row for rows in families.values() for row in rows}
    families["variants"] = [row for row in runs if row not in known and not row.startswith("k = ")]
    families = {family: [row for row in rows if row in runs] for family, rows in families.items()}
    scores = {}
    for metric, nulls in NULLS.items():
        scores[metric] = {
            family: {row: {task: Score.of(runs[row][task], metric) for task in tasks} for row in rows}
            for family, rows in families.items()
        }
        scores[metric]["nulls"] = {
            row: {task: Score.of(runs[CLAIM][task], column) for task in tasks} for row, column in nulls.items()
        }
    return scores


def text(interval: Interval, metric: str, counts: str = "") -> str:
    """An estimate as its metric's tables have it."""
    digits, scale = style(metric)
    return interval.format(digits, scale=scale, counts=counts)


def estimates(scores: Scores) -> pd.DataFrame:
    """Every estimate as numbers: metric, kind, row, task (`mean` for all), value, ends, spread, queries, counts."""
    lines = []
    for metric, families in scores.items():
        for family, rows in families.items():
            for row, by_task in rows.items():
                groups = {task: (score,) for task, score in by_task.items()} | {"mean": tuple(by_task.values())}
                for task, group in groups.items():
                    interval = estimate(
                        *(score.values for score in group), of=metric, shifts=[score.shifts for score in group]
                    )
                    counted = metric == "Rec2FTP" and family != "nulls" and task != "mean"
                    values = group[0].values
                    counts = f"{values.nansum():g}/{values.isfinite().sum():g}" if counted else ""
                    about = {"metric": metric, "kind": family, "what is compared": row, "task": task}
                    numbers = {name: getattr(interval, name) for name in ("value", "low", "high", "spread", "unstable")}
                    lines.append(about | numbers | {"queries": interval.n_queries, "counts": counts})
    return pd.DataFrame(lines)


def read_interval(row: Mapping[Any, Any]) -> Interval:
    """The estimate of a row of `estimates`; of a table by an older version, without a spread."""
    numbers = (row[name] for name in ("value", "low", "high", "queries"))
    return Interval(*numbers, unstable=bool(row.get("unstable", False)))


def control_table(estimates: pd.DataFrame) -> pd.DataFrame:
    """The table of all controls: a row for each metric and control, a column a task, with intervals."""
    formatted = estimates.assign(
        task=[TITLES.get(task, task) for task in map(str, estimates["task"])],
        text=[text(read_interval(row), row["metric"], row["counts"]) for row in estimates.to_dict("records")],
    )
    keys = ["metric", "kind", "what is compared"]
    table = formatted.pivot(index=keys, columns="task", values="text")
    in_order = pd.MultiIndex.from_frame(formatted[keys].drop_duplicates())
    return table.reindex(index=in_order, columns=formatted["task"].unique()).reset_index()


@dataclass(frozen=True)
class Against:
    """A metric's score against all controls of a family, on one task's queries."""

    metric: str
    family: str
    task: str
    paired: Mapping[str, Paired]
    """By control; those of too few queries are left out."""

    @property
    def closest(self) -> str:
        """The control that the score is least above of, by its interval."""
        return min(self.paired, key=lambda row: self.paired[row].difference.low)

    @property
    def above(self) -> bool:
        """Whether the score is above every control: the interval beyond 0, p < .05, and so in every single seed."""
        return all(
            one.difference.low > 0 and one.p < 0.05 and all(of_seed > 0 for of_seed in one.by_seed)
            for one in self.paired.values()
        )


def against(claim: Score, control: Score) -> Paired:
    """A score less a control's, replica by replica where both have as many replicas."""
    if claim.shifts.shape != control.shifts.shape:
        return paired_test(claim.values, control.values)
    shifts = difference_of_shifts(claim.shifts, control.shifts)
    return paired_test(claim.values, control.values, shifts=shifts)


def against_controls(scores: Scores) -> list[Against]:
    """Every score against every control, by family and task."""
    return [
        Against(
            metric,
            family,
            task,
            {
                row: paired
                for row, by_task in families[family].items()
                if (paired := against(claim, by_task[task])).difference.known
            },
        )
        for metric, families in scores.items()
        for family in FAMILIES
        if families[family]
        for task, claim in families["claim"][CLAIM].items()
    ]


def against_table(comparisons: Sequence[Against]) -> pd.DataFrame:
    """Each score against the control of each kind that comes closest to it."""
    lines = []
    for one in comparisons:
        about = {"metric": one.metric, "task": TITLES.get(one.task, one.task), "controls": one.family}
        if not one.paired:
            lines.append(about | {"closest": "too few queries"})
            continue
        paired = one.paired[one.closest]
        seeds = f"{sum(of_seed > 0 for of_seed in paired.by_seed)} of {len(paired.by_seed)}"
        difference = text(paired.difference, one.metric)
        lines.append(
            about
            | {"closest": one.closest, f"{CLAIM} minus it": difference, "p": f"{paired.p:.4f}", "seeds above": seeds}
            | {"above all": "yes" if one.above else "no"}
        )
    return pd.DataFrame(lines).fillna("")


def unstable_cells(runs: Runs, metric: str) -> str:
    """In how many of the claim's cells a metric is unstable over replicas of the finetuning."""
    comparisons = [result.comparison for results in runs[CLAIM].values() for result in results]
    measured = [comparison for comparison in comparisons if comparison.stability is not None]
    if not measured:
        return "not measured"
    return f"{sum(metric in comparison.unstable for comparison in measured)} of {len(measured)}"


def claim_table(comparisons: Sequence[Against], unstable: Mapping[str, str]) -> pd.DataFrame:
    """On how many tasks each claim's score is above all controls of each family, and what that leaves of it.

    `unstable` holds, by metric, in how many of the claim's cells it is unstable (`unstable_cells`). Families of which
    there is no control have no column; a claim cannot survive without them.
    """
    lines = []
    for metric, claim in CLAIMS.items():
        texts, fates = {}, set()
        for family in FAMILIES:
            chosen = [one for one in comparisons if (one.metric, one.family) == (metric, family)]
            if not chosen:
                fates.add("open")
                continue
            above = [one.above for one in chosen if one.paired]
            texts[family] = f"{sum(above)} of {len(chosen)}"
            if open_ones := len(chosen) - len(above):
                texts[family] += f" ({open_ones} open)"
            fates.add("lost" if not all(above) else "open" if open_ones else "kept")
        verdict = "survives"
        if "lost" in fates:
            verdict = "survives in part" if "kept" in fates else "does not survive"
        elif "open" in fates:
            verdict = "open"
        about = {"unstable cells": unstable[metric], "verdict": verdict}
        lines.append({"claim": claim, "measured by": metric} | texts | about)
    return pd.DataFrame(lines)


def in_words(row: Mapping[Any, str]) -> str:
    """What became of a claim, in plain words."""
    fates = {
        "survives": "This survives.",
        "survives in part": "This survives in part.",
        "does not survive": "This does not survive.",
        "open": "This stays open: too few queries tell.",
    }
    missing = [what for family, what in FAMILIES.items() if family not in row]
    if missing:
        fates["open"] = "This stays open."
    kept, lost, undecided = [], [], []
    for family, what in FAMILIES.items():
        if family not in row:
            continue
        counts, _, some_open = row[family].partition(" (")
        above, _, n = counts.partition(" of ")
        n_open = int(some_open.split()[0]) if some_open else 0
        if above == n:
            kept.append(what)
        elif int(above) + n_open == int(n):
            undecided.append(f"{what} (above on {counts} tasks, too few queries on the others)")
        else:
            lost.append(f"{what} (above on {counts} tasks)")
    sentences = f"**{row['claim']}** ({row['measured by']}). {fates[row['verdict']]}"
    sentences += f" On every task the score is above {'; above '.join(kept)}." * bool(kept)
    sentences += f" It is not above {'; nor above '.join(lost)}." * bool(lost)
    sentences += f" It is undecided whether it is above {'; or '.join(undecided)}." * bool(undecided)
    sentences += f" It was not compared with {'; nor with '.join(missing)}." * bool(missing)
    n_unstable, _, n_cells = row["unstable cells"].partition(" of ")
    if not n_cells:
        return sentences
    stable = "It is stable" if n_unstable == "0" else f"It is unstable in {row['unstable cells']} cells"
    return f"{sentences} {stable} over replicas of the finetuning."


def order_table(orders: Mapping[str, Sequence[icl.OrderSensitivity]]) -> pd.DataFrame:
    """What the order of demonstrations changes, with intervals, and the range of accuracies over orders and seeds."""
    lines = []
    for task, results in orders.items():
        for measure in ("distance", "overlap", "overlap_cosine"):
            of_pairs = {pair: torch.stack([getattr(result, measure)[pair] for result in results]) for pair in PAIRS}
            texts = {pair: estimate(values.double(), of=measure).format() for pair, values in of_pairs.items()}
            lines.append({"task": TITLES[task], "measure": measure.replace("_", " ")} | texts)
        ranges = {}
        for setting, pair in (("ICL", PAIRS[0]), ("FT", PAIRS[1])):
            accuracies = 100 * torch.cat([result.accuracy[setting] for result in results])
            ranges[pair] = f"{accuracies.min():.0f} to {accuracies.max():.0f}"
        lines.append({"task": TITLES[task], "measure": "accuracies, per cent"} | ranges)
    return pd.DataFrame(lines).fillna("")


def accuracy_table(runs: Runs) -> pd.DataFrame:
    """Accuracies of the model and of those that have learned nothing, in per cent."""
    return pd.DataFrame(
        {"model": "trained" if row == CLAIM else row, "setting": name.split()[0]}
        | {TITLES.get(task, task): text(interval_of(name, results), name) for task, results in runs[row].items()}
        for row in (CLAIM, *MODELS)
        if row in runs
        for name in ACCURACY_ROWS
    )


def rate_table(runs: Runs) -> pd.DataFrame:
    """The learning rates of every way of finetuning."""
    return pd.DataFrame(
        {"finetuning": row} | {TITLES.get(task, task): f"{results[0].cell.lr:g}" for task, results in runs[row].items()}
        for row in (CLAIM, *(row for row in VARIANTS if row.startswith("FT")))
        if row in runs
    )
