"""What `controls.py` says: metrics beside their controls, with intervals; against the best of each kind; in words."""

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
from icl_dual.controls import PAIRS
from icl_dual.intervals import Interval, Paired, average, bootstrap, paired_test, wilson

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
    "ICL on flipped labels": {"context": "flipped labels"},
    "ICL on random labels": {"context": "random labels"},
    "ICL on another task": {"context_task": "agnews"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ICL on another order": {"context": "reordered"},
    "both on flipped labels": {"context": "flipped labels", "finetuned_on": "context"},
    "FT on the label's loss": {"loss": "label"},
    "FT by one full-batch step": {"method": "full-batch"},
    "FT layer by layer (causal)": {"method": "layer-causal"},
    "FT of keys": {"trained": "key"},
    "FT of values": {"trained": "value"},
    "FT of all attention": {"trained": "attention"},
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


@dataclass(frozen=True)
class Score:
    """A row of a metric on one task: query by query, and its estimate."""

    values: Float[Tensor, "seed query"]
    interval: Interval
    counts: str = ""

    def format(self, metric: str) -> str:
        """As the metric's tables have it."""
        digits, scale = style(metric)
        return self.interval.format(digits, scale=scale, counts=self.counts)


Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Score]]]]
"""By metric, family, row, and task."""


def score(results: Results, metric: str, column: str | None = None) -> Score:
    """A metric of one task's seeds, or what stands beside it in the same comparisons (`column`)."""
    if metric != "Rec2FTP":
        values = by_query(results, column or metric)
        return Score(values, bootstrap(values))
    values = torch.stack([recalled(result.comparison, dealt=column is not None) for result in results])
    both, n = values.nansum().item(), int(values.isfinite().sum())
    return Score(values, wilson(both, n), f"{both:g}/{n}" if column is None else "")


def recalled(comparison: icl.Comparison, *, dealt: bool) -> Float[Tensor, " query"]:
    """Whether ICL makes each correction of finetuning; or how often, its answers dealt to the queries at random."""
    gold, found = comparison.gold, comparison.predictions
    corrected = (found["FT"] == gold) & (found["ZSL"] != gold)
    right = (found["ICL"] == gold).double()
    if dealt:
        right = found["ICL"].bincount(minlength=int(gold.max()) + 1).double()[gold] / len(gold)
    return right.where(corrected, torch.nan)


def scored(runs: Runs) -> Scores:
    """Every metric, of the claim, all controls and the variants."""
    tasks = list(runs[CLAIM])
    families: dict[str, Sequence[str]] = {"claim": (CLAIM,), "nulls": (), "models": tuple(MODELS)}
    families |= {"weights": tuple(WEIGHTS), "contexts": tuple(CONTEXTS), "variants": tuple(VARIANTS)}
    found = {}
    for metric, nulls in NULLS.items():
        found[metric] = {
            family: {row: {task: score(runs[row][task], metric) for task in tasks} for row in rows}
            for family, rows in families.items()
        }
        found[metric]["nulls"] = {
            row: {task: score(runs[CLAIM][task], metric, column) for task in tasks} for row, column in nulls.items()
        }
    return found


def control_table(scores: Scores) -> pd.DataFrame:
    """The table of all controls: a row for each metric and control, with intervals."""
    lines = []
    for metric, families in scores.items():
        for family, rows in families.items():
            for row, by_task in rows.items():
                texts = {TITLES[task]: found.format(metric) for task, found in by_task.items()}
                lines.append({"metric": metric, "kind": family, "what is compared": row} | texts)
                of_tasks = by_task.values()
                mean = average(*(found.interval for found in of_tasks))
                if metric != "Rec2FTP":
                    mean = bootstrap(*(found.values for found in of_tasks))
                lines[-1]["mean"] = Score(torch.empty(0, 0), mean).format(metric)
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Against:
    """A metric's score against the best control of a family, on one task's queries."""

    metric: str
    family: str
    task: str
    best: str
    paired: Paired

    @property
    def above(self) -> bool:
        """Whether the score is above the control's, 0 being outside of the difference's interval."""
        return self.paired.difference.low > 0


def against_best(scores: Scores) -> list[Against]:
    """Every score against the best control of each family, by task."""
    found = []
    for metric, families in scores.items():
        for family in FAMILIES:
            for task, claim in families["claim"][CLAIM].items():
                controls = {row: of[task] for row, of in families[family].items() if of[task].values.isfinite().any()}
                if controls:
                    best = max(controls, key=lambda row: controls[row].interval.value)
                    paired = paired_test(claim.values, controls[best].values)
                    found.append(Against(metric, family, task, best, paired))
    return found


def against_table(found: Sequence[Against]) -> pd.DataFrame:
    lines = []
    for one in found:
        digits, scale = style(one.metric)
        known = one.paired.difference.known
        lines.append(
            {
                "metric": one.metric,
                "task": TITLES[one.task],
                "controls": one.family,
                "best control": one.best,
                f"{CLAIM} minus it": one.paired.difference.format(digits, scale=scale),
                "p": f"{one.paired.p:.4f}" if known else "",
                "above": ("yes" if one.above else "no") if known else "",
            }
        )
    return pd.DataFrame(lines)


def claim_table(found: Sequence[Against]) -> pd.DataFrame:
    """On how many tasks each claim's score is above the best control of each family, and what that leaves of it."""
    lines = []
    for metric, claim in CLAIMS.items():
        texts, held = {}, []
        for family in FAMILIES:
            chosen = [one for one in found if (one.metric, one.family) == (metric, family)]
            above = [one.above for one in chosen if one.paired.difference.known]
            texts[family] = f"{sum(above)} of {len(above)}" if above else "undefined"
            held += [all(above)] if above else []
        verdict = "survives" if all(held) else "survives in part" if any(held) else "does not survive"
        lines.append({"claim": claim, "measured by": metric} | texts | {"verdict": verdict if held else "open"})
    return pd.DataFrame(lines)


def in_words(row: Mapping[str, str]) -> str:
    """What became of a claim, in plain words."""
    fates = {
        "survives": "This survives.",
        "survives in part": "This survives in part.",
        "does not survive": "This does not survive.",
        "open": "This stays open: finetuning corrects too few answers to tell.",
    }
    kept, lost, unknown = [], [], []
    for family, what in FAMILIES.items():
        above, _, n = row[family].partition(" of ")
        place = unknown if not n else kept if above == n else lost
        place.append(what if not n or above == n else f"{what} (above on {row[family]} tasks)")
    text = f"**{row['claim']}** ({row['measured by']}). {fates[row['verdict']]}"
    text += f" On every task the score is above {'; above '.join(kept)}." * bool(kept)
    text += f" It is not above {'; nor above '.join(lost)}." * bool(lost)
    return text + f" Too few queries to hold it against {'; or '.join(unknown)}." * bool(unknown and (kept or lost))


def order_table(orders: Mapping[str, Sequence[icl.OrderSensitivity]]) -> pd.DataFrame:
    """What the order of demonstrations changes, with intervals, and the range of accuracies over orders and seeds."""
    lines = []
    for task, results in orders.items():
        for measure in ("distance", "overlap", "overlap_cosine"):
            of_pairs = {pair: torch.stack([getattr(result, measure)[pair] for result in results]) for pair in PAIRS}
            texts = {pair: bootstrap(values.double()).format() for pair, values in of_pairs.items()}
            lines.append({"task": TITLES[task], "measure": measure.replace("_", " ")} | texts)
        ranges = {}
        for setting, pair in (("ICL", PAIRS[0]), ("FT", PAIRS[1])):
            found = 100 * torch.cat([result.accuracy[setting] for result in results])
            ranges[pair] = f"{found.min():.0f} to {found.max():.0f}"
        lines.append({"task": TITLES[task], "measure": "accuracies, per cent"} | ranges)
    return pd.DataFrame(lines).fillna("")


def accuracy_table(runs: Runs) -> pd.DataFrame:
    """Accuracies of the model and of those that have learned nothing, in per cent."""
    return pd.DataFrame(
        {"model": "trained" if row == CLAIM else row, "setting": name.split()[0]}
        | {TITLES[task]: bootstrap(by_query(found, name)).format(1, scale=100) for task, found in runs[row].items()}
        for row in (CLAIM, *MODELS)
        for name in ACCURACY_ROWS
    )


def rate_table(runs: Runs) -> pd.DataFrame:
    """The learning rates of every way of finetuning."""
    return pd.DataFrame(
        {"finetuning": row} | {TITLES[task]: f"{results[0].cell.lr:g}" for task, results in runs[row].items()}
        for row in (CLAIM, *(row for row in VARIANTS if row.startswith("FT")))
    )
