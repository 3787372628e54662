"""Runs of tiny grids by engines, and the run in one process that they are held against."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grid_cells import TASK, content, grid_of

import icl_dual as icl
from icl_dual.grids import Grid, Outcome, Plan, Results, Worker, plan


def small_grid(model: str, n_seeds: int, **changes: Any) -> Grid:
    """Return a grid of two cells a seed, which is planned with less memory than any node has."""
    return grid_of(models=[model], seeds=[*range(1, n_seeds + 1)], **{"memory_gb": 0.1, **changes})


def worker_of(grid: Grid, folder: Path, kind: Callable[..., Worker] = Worker, **options: Any) -> Worker:
    """Return a worker for the results in a folder, with one thread, which gives the same bits everywhere."""
    return kind(grid, Results(folder), tasks=[TASK], threads=1, **options)


def plan_of(worker: Worker) -> Plan:
    """Return the plan of a worker's grid."""
    return plan(worker.grid, worker.results, tasks=[task.name for task in worker.tasks])


class Events:
    """A report that keeps what it is told, and calls back."""

    def __init__(
        self, on_end: Callable[["Events"], None] | None = None, on_begin: Callable[["Events"], None] | None = None
    ) -> None:
        self.begun: list[str] = []
        self.ended: list[Outcome] = []
        self.on_end, self.on_begin = on_end, on_begin

    def begin(self, cell_id: str) -> None:
        self.begun.append(cell_id)
        if self.on_begin is not None:
            self.on_begin(self)

    def end(self, outcome: Outcome) -> None:
        self.ended.append(outcome)
        if self.on_end is not None:
            self.on_end(self)


def contents(results: Results) -> dict[str, icl.CellResult]:
    """Return the finished cells by id, without what differs from run to run."""
    return {cell_id: content(results.load(cell_id)) for cell_id in results.finished()}


def run_here(grid: Grid, folder: Path) -> dict[str, icl.CellResult]:
    """Run all cells of a grid in this process, and return them: what engines are held against."""
    threads = torch.get_num_threads()
    worker = worker_of(grid, folder)
    outcomes = [worker.run(cell.id) for cell in grid.cells()]
    torch.set_num_threads(threads)
    assert {outcome.state for outcome in outcomes} == {"done"}, outcomes
    return contents(worker.results)
