from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_cells import TASK, grid_of

import icl_dual as icl
from icl_dual.grids import Failure, Grid, Results, run_grid, select
from icl_dual.grids.selection import Rule
from icl_dual.models import tiny_model


def selection_grid(**changes: Any) -> Grid:
    settings = {"controls": {}, "rates": [0.01, 0.5], "n_queries": 5, "split": "selection", "replicas": 2}
    return grid_of(**settings | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Results]:
    grid, results = selection_grid(), Results(tmp_path_factory.mktemp("selection"))
    assert not run_grid(grid, results, tasks=[TASK], models=[tiny_model()], progress=False).failed
    return grid, results


def cross_entropy(comparison: icl.Comparison) -> float:
    by_query = torch.nn.functional.cross_entropy(comparison.label_log_probs["FT"], comparison.gold)
    return by_query.item()


@pytest.mark.parametrize("by_seed", [False, True])
def test_the_best_rate_is_that_of_a_plain_search(run: tuple[Grid, Results], by_seed: bool) -> None:
    grid, results = run
    scores = {}
    for cell in grid.cells():
        comparison = results.load(cell.id).comparison
        scores[cell.cell.lr, cell.cell.seed] = (comparison.accuracy["FT"], cross_entropy(comparison))
    if by_seed:
        expected = max(scores, key=lambda key: (scores[key][0], -scores[key][1]))
    else:
        means = {
            lr: [sum(scores[lr, seed][i] for seed in grid.seeds) / len(grid.seeds) for i in (0, 1)]
            for lr in (0.01, 0.5)
        }
        expected = (max(means, key=lambda lr: (means[lr][0], -means[lr][1])), None)
    (choice,) = select(grid, results, rule="best", seeds=by_seed).choices
    assert (choice.lr, choice.seed) == expected
    if not by_seed:
        assert select(grid, results, rule="best").rates("tiny") == {"films": choice.lr}


def test_the_first_stable_rate_is_chosen(run: tuple[Grid, Results]) -> None:
    grid, results = run
    unstable = {cell.id: results.load(cell.id).comparison.unstable for cell in grid.cells()}
    (choice,) = select(grid, results, rule="stable", seeds=True).choices
    (best,) = select(grid, results, rule="best", seeds=True).choices
    chosen = replace(grid.cells()[0].cell, lr=choice.lr, seed=choice.seed or 0).name
    assert choice.best_lr == best.lr
    if any(not names for names in unstable.values()):
        assert not unstable[chosen]
    assert set(choice.unstable or ()) == set(unstable[chosen])


def test_a_rate_that_diverged_is_dropped_and_one_that_is_missing_is_an_error(run: tuple[Grid, Results]) -> None:
    grid, results = run
    more = selection_grid(rates=[0.01, 0.5, 9.0])
    with pytest.raises(icl.StudyError, match="got 2 of 6 that are not"):
        select(more, results, rule="best")
    new = {cell.id for cell in more.cells()} - {cell.id for cell in grid.cells()}
    for cell_id in new:
        results.record_failure(Failure(cell_id, "DivergedError: expected finite weights", "…", "host:1"))
    assert select(more, results, rule="best").choices == select(grid, results, rule="best").choices
    for cell_id in new:
        results.record_failure(Failure(cell_id, "MemoryError: ", "…", "host:1"))
    with pytest.raises(icl.StudyError, match="got 2 of 6 that are not"):
        select(more, results, rule="best")


@pytest.mark.parametrize(
    ("rule", "split"),
    [(rule, split) for rule in ("stable", "best", "paper-on-evaluation-data") for split in ("selection", "evaluation")],
)
def test_a_rule_is_of_one_kind_of_queries(rule: Rule, split: str, tmp_path: Path) -> None:
    fits = (rule == "paper-on-evaluation-data") == (split == "evaluation")
    message = "expected finished cells, got 4 of 4" if fits else f"for the rule '{rule}', got another"
    with pytest.raises(icl.StudyError, match=message):
        select(selection_grid(split=split), Results(tmp_path), rule=rule)


def test_cells_of_other_queries_under_the_same_ids_are_refused(run: tuple[Grid, Results]) -> None:
    _, results = run
    with pytest.raises(icl.SettingsError, match="split='evaluation'"):
        select(selection_grid(split="evaluation"), results, rule="paper-on-evaluation-data")


def test_stability_needs_replicas(tmp_path: Path) -> None:
    with pytest.raises(icl.StudyError, match="set replicas, or use the rule 'best'"):
        select(selection_grid(replicas=0), Results(tmp_path), rule="stable")
    with pytest.raises(icl.StudyError, match="with at least 5 queries for the rule 'stable', got n_queries=4"):
        select(selection_grid(n_queries=4), Results(tmp_path), rule="stable")
