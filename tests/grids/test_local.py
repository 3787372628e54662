import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import DeviceLosingWorker, Events, check_device_losses, plan_of, small_grid, worker_of
from grid_cells import TASK, CopiedCells, content, grid_of, save_tiny

import icl_dual as icl
from icl_dual.grids import GridError, Outcome, Plan, Results, Summary, Worker, files, run_grid
from icl_dual.grids.claims import Claim
from icl_dual.grids.driver import Progress
from icl_dual.grids.engines.local import run_local
from icl_dual.models import tiny_model
from icl_dual.paper_tasks import unregister_task

TESTS = Path(__file__).parents[1]


def test_one_process_runs_what_it_can_and_waits_for_what_others_compute(
    local_results: Results, copied: type[CopiedCells]
) -> None:
    results = local_results
    grid = grid_of()
    ids = [cell.id for cell in grid.cells()]
    copied.failing = [ids[3]]
    claim = Claim(results.files, ids[0], 0, 60.0)
    assert claim.create()
    threading.Timer(1.0, claim.give_up).start()
    summary = run_grid(grid, results, tasks=[TASK], models=[tiny_model()], progress=False)
    states = {outcome.id: outcome.state for outcome in summary.outcomes}
    assert states == dict.fromkeys(ids[:3], "done") | {ids[3]: "failed"}
    assert summary.outcomes[-1].id == ids[3] or copied.runs[-1] == ids[0]
    assert list(summary.failed) == [ids[3]]
    assert run_grid(grid, results, tasks=[TASK], models=[tiny_model()], progress=False).outcomes == ()


def test_two_drivers_at_once_compute_each_cell_once(results: Results, copied: type[CopiedCells]) -> None:
    grid, model = grid_of(), tiny_model()
    options = {"tasks": [TASK], "models": [model], "progress": False}
    drivers = [threading.Thread(target=run_grid, args=(grid, results), kwargs=options) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(copied.runs) == sorted(cell.id for cell in grid.cells())
    assert len(results.finished()) == 4


def test_processes_have_the_cells_of_one_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    grid, results = grid_of(models=[save_tiny(tmp_path / "model")]), Results(tmp_path / "results")
    killed: list[int] = []

    def kill_a_worker() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            for info in results.claims().values():
                if (pid := info.owner.get("pid")) not in (None, os.getpid()):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    summary = run_grid(grid, results, tasks=[TASK], progress=False, processes=2, threads=1)
    killer.join()
    assert len(killed) == 1
    assert set(summary.done) == {cell.id for cell in grid.cells()}
    cells = [cell.cell for cell in grid.cells()]
    for of_study in icl.run_study(cells, tmp_path / "study", tasks=[TASK], progress=False):
        assert content(results.load(of_study.cell.name)) == content(of_study)


def test_processes_that_lose_their_device_are_replaced_and_a_cell_that_loses_it_each_time_fails(tmp_path: Path) -> None:
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=2)
    worker = worker_of(grid, tmp_path / "results", DeviceLosingWorker, max_lost=2)
    check_device_losses(worker, run_local(worker, plan_of(worker), Events(), processes=2, threads=1))


def test_a_killed_driver_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS), str(TESTS / "storage"), str(TESTS / "grids"), os.environ.get("PYTHONPATH", "")])
    script = TESTS / "grids" / "grid_kills.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "kills", "2", "0"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "killed 4 times" in done.stdout


def test_what_does_not_fit_the_machine_or_the_engine_is_refused(tmp_path: Path) -> None:
    results = Results(tmp_path)
    options: dict[str, Any] = {"tasks": [TASK], "models": [tiny_model()], "progress": False}
    with pytest.raises(GridError, match=r"expected cells that need at most the memory of this machine"):
        run_grid(grid_of(memory_gb=1e6), results, **options)
    with pytest.raises(GridError, match=r"expected processes that fit into .* got processes=100000 with 1.0 GB each"):
        run_grid(grid_of(memory_gb=1.0), results, processes=100_000, **options)
    with pytest.raises(GridError, match=r"options of the engine 'local', got .*unexpected keyword argument 'nodes'"):
        run_grid(grid_of(), results, nodes=2, **options)
    assert results.finished() == []


def test_storage_that_is_missing_or_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, s3_server: dict[str, Any], copied: type[CopiedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    options: dict[str, Any] = {"tasks": [TASK], "models": [tiny_model()], "progress": False}
    with pytest.raises(icl.AssetError, match=r"expected results at s3://no-such-bucket/grid, got .*bucket"):
        run_grid(grid_of(), Results("s3://no-such-bucket/grid", s3_server), **options)
    monkeypatch.setattr(files, "_create_locally", refuse)
    with pytest.raises(icl.AssetError, match=r"expected to write .*, got 'Permission denied': choose a path"):
        run_grid(grid_of(), Results(tmp_path), **options)
    assert copied.runs == []


def test_a_run_in_this_process_leaves_the_number_of_threads_as_it_was(
    tmp_path: Path, copied: type[CopiedCells]
) -> None:
    before = torch.get_num_threads()
    run_grid(grid_of(), Results(tmp_path), tasks=[TASK], models=[tiny_model()], progress=False, threads=before + 1)
    assert len(copied.runs) == 4
    assert torch.get_num_threads() == before


def test_registered_tasks_reach_other_processes_and_unknown_ones_are_refused_at_once(tmp_path: Path) -> None:
    workers = []

    def engine(worker: Worker, planned: Plan, report: object) -> Summary:
        workers.append(worker)
        return Summary(())

    grid, models = grid_of(), [tiny_model()]
    with pytest.raises(GridError, match=r"tasks: expected a task out of .*, got 'films'"):
        run_grid(grid, Results(tmp_path), models=models, progress=False)
    icl.register_task(TASK)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("icl_dual.grids.engines.local.run_local", engine)
            run_grid(grid, Results(tmp_path), models=models, progress=False)
    finally:
        unregister_task(TASK.name)
    assert workers[0].tasks == (TASK,)


def test_progress_counts_each_cell_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, 1, 0) as report:
        for cell_id in "ab":
            report.begin(cell_id)
        report.end(Outcome("a", "claimed"))
        report.end(Outcome("b", "failed"))
        report.end(Outcome("a", "done"))
        report.end(Outcome("a", "already done"))
        assert (report.bar.n, report.failed, report.running) == (3, 1, {})
    assert "0 running, 1 failed" in capsys.readouterr().err
