"""Runs of tiny grids by engines, and the run in one process that they are held against."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from grid_cells import TASK, content, grid_of

import icl_dual as icl
from icl_dual.grids import Grid, GridCell, Outcome, Plan, Results, Summary, Worker, plan
from icl_dual.study import CellRunner


def small_grid(model: str, n_seeds: int, **changes: Any) -> Grid:
    """Return a grid of two cells a seed, which is planned with less memory than any node has."""
    return grid_of(models=[model], seeds=[*range(1, n_seeds + 1)], **{"memory_gb": 0.1, **changes})


def worker_of(grid: Grid, folder: Path, kind: Callable[..., Worker] = Worker, **options: Any) -> Worker:
    """Return a worker for the results in a folder, with one thread, which gives the same bits everywhere."""
    return kind(grid, Results(folder), tasks=[TASK], threads=1, **options)


class SlowWorker(Worker):
    """A worker that takes two seconds for a cell at least: long enough for a node to be lost meanwhile."""

    def _runner_of(self, cell: GridCell) -> CellRunner:
        time.sleep(2)
        return super()._runner_of(cell)


class DeviceLosingWorker(Worker):
    """A worker that loses its device in the first cells of the grid, every time."""

    n_losing: ClassVar[int] = 1

    def _runner_of(self, cell: GridCell) -> CellRunner:
        if cell.id in [losing.id for losing in self.grid.cells()[: self.n_losing]]:
            raise icl.DeviceLostError("expected a device") from RuntimeError("CUDA error: device-side assert triggered")
        return super()._runner_of(cell)


def check_device_losses(worker: Worker, summary: Summary) -> None:
    """Check what came of a `DeviceLosingWorker`'s grid with `max_lost=2`."""
    losing_id, *other_ids = [cell.id for cell in worker.grid.cells()]
    assert set(summary.done) == set(other_ids)
    assert set(summary.failed) == {losing_id}
    error = summary.failed[losing_id].error
    assert "got 2 workers lost in it, one after the other (CUDA error: device-side assert triggered)" in error
    assert set(worker.results.failures()) == {losing_id}
    assert worker.results.claims() == {}


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
