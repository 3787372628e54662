"""What `controls.py` says: metrics beside their controls, with intervals; against all of each kind; in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from common import TITLES
from jaxtyping import Float
from paper_tables import ACCURACY_ROWS, Results, by_query, style
from torch import Tensor

import icl_dual as icl
from icl_dual.metrics import estimate
from icl_dual.order_sensitivity import PAIRS
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
    "SimAMΔ": {"random update of FT's size": "SimAMΔ random"},
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
    "SimAMΔ": "The same of how attention changes",
    "Kendall": "In-context learning attends to the demonstrations as finetuning does, by its queries",
    "Kendall on keys": "The same by keys, which is what attention scores",
    "Rec2FTP": "In-context learning makes the corrections that finetuning makes",
}

Runs = Mapping[str, Mapping[str, Results]]
"""By row of the table, then task: a result for each seed."""


Table = Float[Tensor, "seed query"]
Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Table]]]]
"""By metric, family, row, and task: scores query by query."""


def scored(runs: Runs) -> Scores:
    """Every metric, of the claim, all controls and the variants."""
    tasks = list(runs[CLAIM])
    families: dict[str, Sequence[str]] = {"claim": (CLAIM,), "nulls": (), "models": tuple(MODELS)}
    families |= {"weights": tuple(WEIGHTS), "contexts": tuple(CONTEXTS), "variants": tuple(VARIANTS)}
    scores = {}
    for metric, nulls in NULLS.items():
        scores[metric] = {
            family: {row: {task: by_query(runs[row][task], metric) for task in tasks} for row in rows}
            for family, rows in families.items()
        }
        scores[metric]["nulls"] = {
            row: {task: by_query(runs[CLAIM][task], column) for task in tasks} for row, column in nulls.items()
        }
    return scores


def text(interval: Interval, metric: str, counts: str = "") -> str:
    """An estimate as its metric's tables have it."""
    digits, scale = style(metric)
    return interval.format(digits, scale=scale, counts=counts)


def estimates(scores: Scores) -> pd.DataFrame:
    """Every estimate as numbers: metric, kind, row, task (`mean` for all), value, low, high, queries, and counts."""
    lines = []
    for metric, families in scores.items():
        for family, rows in families.items():
            for row, by_task in rows.items():
                groups = {task: (values,) for task, values in by_task.items()} | {"mean": tuple(by_task.values())}
                for task, values in groups.items():
                    interval = estimate(*values, of=metric)
                    counted = metric == "Rec2FTP" and family != "nulls" and task != "mean"
                    counts = f"{values[0].nansum():g}/{values[0].isfinite().sum():g}" if counted else ""
                    about = {"metric": metric, "kind": family, "what is compared": row, "task": task}
                    numbers = {"value": interval.value, "low": interval.low, "high": interval.high}
                    lines.append(about | numbers | {"queries": interval.n_queries, "counts": counts})
    return pd.DataFrame(lines)


def control_table(estimates: pd.DataFrame) -> pd.DataFrame:
    """The table of all controls: a row for each metric and control, a column a task, with intervals."""
    formatted = estimates.assign(
        task=estimates["task"].map(lambda task: TITLES.get(task, task)),
        text=[
            text(Interval(row["value"], row["low"], row["high"], row["queries"]), row["metric"], row["counts"])
            for row in estimates.to_dict("records")
        ],
    )
    keys = ["metric", "kind", "what is compared"]
    table = formatted.pivot(index=keys, columns="task", values="text")
    return table.reindex(index=formatted[keys].drop_duplicates(), columns=formatted["task"].unique()).reset_index()


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
                if (paired := paired_test(claim, by_task[task])).difference.known
            },
        )
        for metric, families in scores.items()
        for family in FAMILIES
        for task, claim in families["claim"][CLAIM].items()
    ]


def against_table(comparisons: Sequence[Against]) -> pd.DataFrame:
    """Each score against the control of each kind that comes closest to it."""
    lines = []
    for one in comparisons:
        about = {"metric": one.metric, "task": TITLES[one.task], "controls": one.family}
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


def claim_table(comparisons: Sequence[Against]) -> pd.DataFrame:
    """On how many tasks each claim's score is above all controls of each family, and what that leaves of it."""
    lines = []
    for metric, claim in CLAIMS.items():
        texts, fates = {}, set()
        for family in FAMILIES:
            chosen = [one for one in comparisons if (one.metric, one.family) == (metric, family)]
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
        lines.append({"claim": claim, "measured by": metric} | texts | {"verdict": verdict})
    return pd.DataFrame(lines)


def in_words(row: Mapping[str, str]) -> str:
    """What became of a claim, in plain words."""
    fates = {
        "survives": "This survives.",
        "survives in part": "This survives in part.",
        "does not survive": "This does not survive.",
        "open": "This stays open: too few queries tell.",
    }
    kept, lost, undecided = [], [], []
    for family, what in FAMILIES.items():
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
    return sentences + f" It is undecided whether it is above {'; or '.join(undecided)}." * bool(undecided)


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
        | {TITLES[task]: text(estimate(by_query(results, name), of=name), name) for task, results in runs[row].items()}
        for row in (CLAIM, *MODELS)
        for name in ACCURACY_ROWS
    )


def rate_table(runs: Runs) -> pd.DataFrame:
    """The learning rates of every way of finetuning."""
    return pd.DataFrame(
        {"finetuning": row} | {TITLES[task]: f"{results[0].cell.lr:g}" for task, results in runs[row].items()}
        for row in (CLAIM, *(row for row in VARIANTS if row.startswith("FT")))
    )
