"""Real grids whose drivers are killed; a script, since killing needs processes without threads.

python grid_kills.py FOLDER KILLS SEED [PROCESSES]: run a grid of the tiny model into FOLDER, and kill the driver with
SIGKILL at KILLS random instants, with one driver and with two at once; then let it go on to its end. With PROCESSES,
the driver is a new interpreter with as many processes of the local engine. Ends with an assertion error where anything
finished is computed again or has changed, where more than the cells in flight are computed again, or where a result
differs from that of a study that was never stopped.
"""

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from grid_cells import TASK, content, grid_of, save_tiny, without_model_files
from kills import start, stop, wait

import icl_dual as icl
from icl_dual.grids import Grid, Results, run_grid
from icl_dual.grids.claims import claimed
from icl_dual.models import tiny_model
from icl_dual.study import CellRunner


class LoggedCells(CellRunner):
    """Writes the name of each cell that begins into a file."""

    log: Path

    def run(self, cell: icl.Cell, folder: str | os.PathLike[str]) -> icl.CellResult:
        with self.log.open("a") as file:
            file.write(f"{cell.name}\n")
        return super().run(cell, folder)


def run(grid: Grid, results: Results, models: list[icl.Model], processes: int = 1) -> None:
    from icl_dual.grids import worker

    LoggedCells.log = Path(results.files.url) / "log"
    worker.CellRunner = LoggedCells  # in processes of the engine, cells are not logged
    run_grid(grid, results, tasks=[TASK], models=models, progress=False, ttl=2.0, max_lost=1000, processes=processes)


def drive(folder: str, model: str, processes: str) -> None:
    """Run the grid in this interpreter, as a user does."""
    run(grid_of(models=[model]), Results(folder), [], int(processes))


class Kills:
    """A grid to kill, and the results that it is to have."""

    def __init__(self, root: Path, seed: int, processes: int) -> None:
        self.processes, self.rng = processes, random.Random(seed)
        self.results = Results(root / "results")
        root.mkdir(parents=True, exist_ok=True)
        self.model = save_tiny(root / "model") if processes else "tiny"
        self.models = [] if processes else [tiny_model()]
        self.grid = grid_of(models=[self.model])
        started = time.perf_counter()
        cells = [cell.cell for cell in self.grid.cells()]
        study = icl.run_study(cells, root / "study", tasks=[TASK], models=self.models, progress=False)
        self.seconds = time.perf_counter() - started + 12 * (processes > 0)
        self.expected = {result.cell.name: without_model_files(content(result)) for result in study}

    def begin(self) -> int:
        """Start a driver; return its process."""
        if self.processes:
            command = (
                f"import grid_kills; grid_kills.drive{(str(self.results.files.url), self.model, str(self.processes))}"
            )
            return subprocess.Popen([sys.executable, "-c", command]).pid
        return start(partial(run, self.grid, self.results, self.models))

    def kill(self, n_drivers: int) -> bool:
        """Start drivers and kill them; return whether they were killed, and not done."""
        before = self.stamps()
        pids = [self.begin() for _ in range(n_drivers)]
        time.sleep(self.rng.uniform(0, 1.1 * self.seconds))
        were_killed = any(stop(pids))
        after = self.stamps()
        assert before.items() <= after.items(), "a finished cell was written again"
        self.check()
        return were_killed

    def stamps(self) -> dict[str, int]:
        folder = Path(self.results.files.url) / "cells"
        return {name: (folder / name / "manifest.json").stat().st_mtime_ns for name in self.results.finished()}

    def check(self) -> None:
        for name in self.results.finished():
            assert without_model_files(content(self.results.load(name))) == self.expected[name], f"{name} differs"

    def finish(self, n_in_flight: int) -> None:
        """Let the grid go on to its end."""
        pid = self.begin()
        assert not wait(pid)
        assert set(self.results.finished()) == {*self.expected}
        assert self.results.failures() == {}
        self.check()
        cells = Path(self.results.files.url) / "cells"
        assert {path.name for path in cells.iterdir()} == {*self.expected}, "scratch is left"
        assert claimed(self.results.files) == {}
        log = Path(self.results.files.url) / "log"
        if log.exists():
            n_runs = len(log.read_text().splitlines())
            assert n_runs <= len(self.expected) + n_in_flight, f"{n_runs} runs of {len(self.expected)} cells"
            log.unlink()


if __name__ == "__main__":
    torch.set_num_threads(1)
    n_kills, n_killed = int(sys.argv[2]), 0
    kills = Kills(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    for n_drivers in (1,) if kills.processes else (1, 2):
        n_of_these, n_in_flight = 0, 0
        while n_of_these < n_kills:
            if kills.kill(n_drivers):
                n_of_these += 1
                n_in_flight += n_drivers
            else:
                kills.finish(n_in_flight)
                n_in_flight = 0
                for name in kills.results.finished():  # again from the start, or nearly
                    if kills.rng.random() < 0.8:
                        kills.results.remove(name)
        kills.finish(n_in_flight)
        n_killed += n_of_these
        for name in kills.results.finished():
            kills.results.remove(name)
    print(f"killed {n_killed} times; every cell is that of a study that was never stopped")
