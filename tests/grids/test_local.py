import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from grid_cells import TASK, CopiedCells, content, grid_of, save_tiny

import icl_dual as icl
from icl_dual.grids import GridError, Outcome, Results, run_grid
from icl_dual.grids.claims import Claim
from icl_dual.grids.driver import Progress
from icl_dual.models import tiny_model

TESTS = Path(__file__).parents[1]


def test_one_process_runs_what_it_can_and_waits_for_what_others_compute(
    results: Results, copied: type[CopiedCells]
) -> None:
    grid = grid_of()
    ids = [cell.id for cell in grid.cells()]
    copied.failing = [ids[3]]
    claim = Claim(results.files, ids[0], 0, 60.0)
    assert claim.create()
    threading.Timer(1.0, claim.give_up).start()
    summary = run_grid(grid, results, models=[tiny_model()], progress=False)
    states = {outcome.id: outcome.state for outcome in summary.outcomes}
    assert states == dict.fromkeys(ids[:3], "done") | {ids[3]: "failed"}
    assert summary.outcomes[-1].id == ids[3] or copied.runs[-1] == ids[0]
    assert list(summary.failed) == [ids[3]]
    assert run_grid(grid, results, models=[tiny_model()], progress=False).outcomes == ()


def test_two_drivers_at_once_compute_each_cell_once(results: Results, copied: type[CopiedCells]) -> None:
    grid, model = grid_of(), tiny_model()
    options = {"models": [model], "progress": False}
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
    results, models = Results(tmp_path), [tiny_model()]
    with pytest.raises(GridError, match=r"expected cells that need at most the memory of this machine"):
        run_grid(grid_of(memory_gb=1e6), results, models=models, progress=False)
    with pytest.raises(GridError, match=r"expected processes that fit into .* got processes=100000 with 1.0 GB each"):
        run_grid(grid_of(memory_gb=1.0), results, models=models, progress=False, processes=100_000)
    with pytest.raises(GridError, match=r"options of the engine 'local', got .*unexpected keyword argument 'nodes'"):
        run_grid(grid_of(), results, models=models, progress=False, nodes=2)
    assert results.finished() == []


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
