"""Rates, and seeds, chosen from a grid by a rule on held-out queries, or by the paper's on the evaluation queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch

from icl_dual.arguments import Count, checked
from icl_dual.cells import CellResult, StudyError
from icl_dual.field_docs import document_fields
from icl_dual.grids.grid import Grid, GridCell
from icl_dual.grids.results import Results
from icl_dual.statistics import MIN_QUERIES

Rule = Literal["stable", "best", "paper-on-evaluation-data"]
"""How to choose. `stable`: by accuracy on held-out queries, the first with stable metrics. `best`: by accuracy on
held-out queries. `paper-on-evaluation-data`: by accuracy on the evaluation queries themselves, as the paper does, so
that the same queries choose a rate and measure it."""

CHECKED = 6
"""The most candidates with stability measured, from the best."""


class Choice(NamedTuple):
    """What was chosen for a model and a task."""

    model: str
    """The model's name."""
    task: str
    """The task's name."""
    k: int
    """The number of demonstrations."""
    protocol: str
    """The protocol."""
    precision: str
    """The precision."""
    control: str
    """The name of the control, or `plain`."""
    lr: float
    """The rate."""
    seed: int | None
    """The seed, where seeds were chosen as well."""
    accuracy: float
    """The accuracy after finetuning, a mean over the seeds that were not chosen."""
    cross_entropy: float
    """The cross-entropy of the gold label after finetuning, in nats, by which ties are decided."""
    unstable: tuple[str, ...] | None
    """The metrics that replicas of the finetuning move by more than their interval; `None` where not looked at."""
    best_lr: float
    """The rate with the best accuracy, which is another where it is unstable."""


@checked
@document_fields
@dataclass(frozen=True)
class Selection:
    """The rates, and seeds, that a rule chose from a grid."""

    rule: Rule
    """The rule."""
    choices: tuple[Choice, ...]
    """The choice for each model, task, k, protocol, precision and control."""

    @checked
    def rates(self, model: str) -> dict[str, float]:
        """Return the rate of each task for the plain cells of a model, as `Grid(rates=…)` takes them.

        Raises:
            StudyError: a task has several, by k, protocol or precision.
        """
        rates: dict[str, float] = {}
        for choice in self.choices:
            if (
                choice.model == model
                and choice.control == "plain"
                and rates.setdefault(choice.task, choice.lr) != choice.lr
            ):
                raise StudyError(
                    f"expected one rate for {model!r} on {choice.task!r}, got several by k, protocol or precision: "
                    "take them from choices"
                )
        return rates

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each choice."""
        return pd.DataFrame(list(self.choices))


@checked
def select(
    grid: Grid, results: Results, *, rule: Rule = "stable", seeds: bool = False, n_checked: Count = CHECKED
) -> Selection:
    """Choose the rate of each model and task from the finished cells of a grid.

    Candidates are ranked by accuracy after finetuning; ties go to the lower cross-entropy of the gold label. A cell
    that diverged drops its rate.

    Args:
        grid: the grid, with `split="selection"` for rules on held-out queries.
        results: its results.
        rule: how to choose.
        seeds: choose a seed together with the rate; by default a rate is ranked by its mean over all seeds.
        n_checked: the most candidates of which the stability is looked at, from the best. Where none of them is stable,
            the best is chosen, and is said to be unstable.

    Raises:
        StudyError: the rule does not fit the grid's queries, the grid has no replicas to judge stability by, or cells
            are neither finished nor diverged.
        SettingsError: a finished cell has other settings than the grid's cell of its id, such as another split.
        AssetError: a cell is damaged.
    """
    _check_rule(grid, rule)
    results.check_settings(grid.cells())
    candidates = _candidates(grid, results, seeds)
    return Selection(rule, tuple(_choose(ranked, rule, n_checked, seeds) for ranked in candidates))


def _check_rule(grid: Grid, rule: Rule) -> None:
    split = "evaluation" if rule == "paper-on-evaluation-data" else "selection"
    if {cell.cell.split for cell in grid.cells()} != {split}:
        raise StudyError(
            f"expected a grid with split={split!r} for the rule {rule!r}, got another: change split, which decides on "
            "which queries rates are chosen"
        )
    few = [n for cell in grid.cells() if (n := cell.cell.n_queries) is not None and n < MIN_QUERIES]
    if rule == "stable" and few:
        raise StudyError(
            f"expected a grid with at least {MIN_QUERIES} queries for the rule 'stable', got n_queries={few[0]}: with "
            "fewer there is no interval to be stable within"
        )
    if rule == "stable" and not all(cell.cell.replicas for cell in grid.cells()):
        raise StudyError(
            "expected a grid with replicas for the rule 'stable', got replicas=0: set replicas, or use the rule 'best'"
        )


class _Candidate(NamedTuple):
    cells: tuple[GridCell, ...]
    results: tuple[CellResult, ...]

    @property
    def accuracy(self) -> float:
        return sum(result.comparison.accuracy["FT"] for result in self.results) / len(self.results)

    @property
    def cross_entropy(self) -> float:
        return sum(map(_cross_entropy, self.results)) / len(self.results)

    @property
    def unstable(self) -> tuple[str, ...]:
        names = (name for result in self.results for name in _unstable(result))
        return tuple(dict.fromkeys(names))


def _unstable(result: CellResult) -> tuple[str, ...]:
    stability = result.comparison.stability
    diverged = ("diverged",) if stability is not None and len(stability.diverged) else ()
    return (*diverged, *result.comparison.unstable)


def _cross_entropy(result: CellResult) -> float:
    log_probs = result.comparison.label_log_probs["FT"].log_softmax(-1)
    return -log_probs[torch.arange(len(log_probs)), result.comparison.gold].mean().item()


def _candidates(grid: Grid, results: Results, by_seed: bool) -> list[list[_Candidate]]:
    """Return the candidates of each model, task, k, protocol, precision and control, from the best."""
    cells, failures = grid.cells(), results.failures()
    diverged = {name for name, failure in failures.items() if failure.error.startswith("DivergedError")}
    finished = set(results.finished())
    if missing := [cell.id for cell in cells if cell.id not in finished | diverged]:
        raise StudyError(
            f"expected finished cells, got {len(missing)} of {len(cells)} that are not, such as {missing[0]}: run the "
            "grid to its end first"
        )
    groups: dict[tuple[Any, ...], dict[tuple[float | None, int | None], list[GridCell]]] = {}
    for cell in cells:
        c = cell.cell
        key = (c.model, c.task, c.k, c.protocol, cell.precision, cell.control)
        groups.setdefault(key, {}).setdefault((c.lr, c.seed if by_seed else None), []).append(cell)
    ranked: list[list[_Candidate]] = []
    for key, by_candidate in groups.items():
        complete = [group for group in by_candidate.values() if not any(cell.id in diverged for cell in group)]
        if not complete:
            raise StudyError(f"expected a rate that does not diverge for {key}, got none: add lower rates")
        candidates = [_Candidate(tuple(group), tuple(results.load(cell.id) for cell in group)) for group in complete]
        ranked.append(sorted(candidates, key=lambda candidate: (-candidate.accuracy, candidate.cross_entropy)))
    return ranked


def _choose(ranked: Sequence[_Candidate], rule: Rule, n_checked: int, by_seed: bool) -> Choice:
    best, chosen, unstable = ranked[0], ranked[0], None
    if rule == "stable":
        unstable = best.unstable
        for candidate in ranked[:n_checked]:
            if not (of_candidate := candidate.unstable):
                chosen, unstable = candidate, of_candidate
                break
    cell = chosen.cells[0]
    c = cell.cell
    return Choice(
        c.model, c.task, c.k, c.protocol, cell.precision, cell.control, c.lr, c.seed if by_seed else None,
        chosen.accuracy, chosen.cross_entropy, unstable, best.cells[0].cell.lr,
    )  # fmt: skip
