"""The SLURM engine, by submitit's local executor: real job processes, signals and requeues, without SLURM."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import submitit
from engine_runs import (
    DeviceLosingWorker,
    Events,
    check_device_losses,
    contents,
    plan_of,
    run_here,
    small_grid,
    worker_of,
)
from grid_cells import grid_of, save_tiny
from submitit.core.utils import FailedJobError

import icl_dual as icl
from icl_dual.grids import GridCell, GridError, Plan, PlannedCell, Resources, Results
from icl_dual.grids.engines.slurm import _Run, in_jobs, run_slurm
from icl_dual.grids.worker import Outcome


def signal_job(results: Results, n_cells: int, number: signal.Signals) -> threading.Thread:
    """Return a thread that sends a signal to the only job's process when the results have a number of cells."""

    def run() -> None:
        while len(results.finished()) < n_cells:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if "submitit.core._submit" in process.cmdline():
                os.kill(process.pid, number)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_job_that_is_preempted_is_requeued_and_goes_on(tmp_path: Path) -> None:
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=2)
    expected = run_here(grid, tmp_path / "here")
    worker, events, log = worker_of(grid, tmp_path / "slurm"), Events(), tmp_path / "logs"
    thread = signal_job(worker.results, 1, signal.SIGUSR2)
    summary = run_slurm(worker, plan_of(worker), events, cluster="local", logs=log)
    thread.join()
    assert set(summary.done) == {cell.id for cell in grid.cells()} == set(events.begun)
    assert contents(worker.results) == expected
    states = [outcome.state for outcome in events.ended]
    assert states[0] == "already done", "the first cell was finished before the job was requeued"
    assert states[-1] == "done"
    assert "Requeued job" in next(log.glob("*_log.err")).read_text() + next(log.glob("*_log.out")).read_text()


def test_a_job_that_loses_its_device_is_submitted_again_and_a_cell_that_loses_it_each_time_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)  # of the worker's module
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=1)
    worker = worker_of(grid, tmp_path / "slurm", DeviceLosingWorker, max_lost=2)
    check_device_losses(worker, run_slurm(worker, plan_of(worker), Events(), cluster="local", logs=tmp_path / "logs"))


class _JobHere:
    """A job that runs when its result is read, and is lost with its device."""

    job_id = "1"

    def __init__(self, run: Callable[[list[str]], list[Outcome]], cell_ids: list[str]) -> None:
        self.run, self.cell_ids = run, cell_ids

    def done(self) -> bool:
        return True

    def result(self) -> list[Outcome]:
        try:
            return self.run(self.cell_ids)
        except icl.DeviceLostError as error:
            raise FailedJobError(str(error)) from error


class _TwiceLosingWorker(DeviceLosingWorker):
    n_losing = 2


def test_cells_of_a_job_that_ended_are_not_run_again_and_their_losses_are_counted_by_cell(tmp_path: Path) -> None:
    """More losses in all than the limit of one cell: each cell comes to its own end."""
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=2)
    worker, events, submitted = worker_of(grid, tmp_path / "results", _TwiceLosingWorker, max_lost=2), Events(), []

    class Executor:
        parameters: ClassVar[dict[str, int]] = {}

        def map_array(self, run: Any, jobs: list[list[str]]) -> list[_JobHere]:
            submitted.extend(jobs)
            return [_JobHere(run, cell_ids) for cell_ids in jobs]

    cell_ids = [cell.id for cell in grid.cells()]
    run = _Run(submitit, worker, events, "slurm")
    run.submit(Executor(), [cell_ids])
    summary = run.outcomes()
    assert set(summary.failed) == {*cell_ids[:2]}
    assert all("got 2 workers lost in it" in failed.error for failed in summary.failed.values())
    assert set(summary.done) == {*cell_ids[2:]}
    assert sorted(outcome.id for outcome in events.ended) == sorted(cell_ids)
    assert submitted == [cell_ids, cell_ids, cell_ids, cell_ids[1:], cell_ids[1:]]


def test_jobs_have_neighbours_of_one_model_and_equal_needs() -> None:
    grid = grid_of(models=["first", "second"], seeds=[*range(5)])
    small, large = Resources(1, 0, None), Resources(2, 0, 10**9)

    def needs(cell: GridCell) -> Resources:
        return large if cell.cell.model == "second" else small

    cells = [PlannedCell(cell, needs(cell)) for cell in grid.cells()]
    jobs = in_jobs(cells, 4)
    assert [len(ids) for _, ids in jobs] == [4, 4, 2, 4, 4, 2]
    assert [resources for resources, _ in jobs] == [small] * 3 + [large] * 3
    assert [cell_id for _, ids in jobs for cell_id in ids] == [cell.id for cell in cells]


def test_without_slurm_or_with_unknown_parameters_nothing_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=1)
    worker, events = worker_of(grid, tmp_path / "slurm"), Events()
    monkeypatch.setenv("PATH", "")
    cells, logs = plan_of(worker), tmp_path / "logs"
    with pytest.raises(GridError, match=r'expected SLURM and parameters .*, got .*"srun".*: run on a machine with'):
        run_slurm(worker, cells, events, logs=logs)
    with pytest.raises(GridError, match=r"expected SLURM and parameters .*, got .*slurm_partitions"):
        run_slurm(worker, cells, events, cluster="local", logs=logs, slurm_partitions="gpu")
    assert not events.begun


def test_without_submitit_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(small_grid("gpt2", n_seeds=1), tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(GridError, match=r"expected submitit .*: pip install 'icl-dual\[slurm\]'"):
        run_slurm(worker, Plan((), 0, (), ()), Events())
