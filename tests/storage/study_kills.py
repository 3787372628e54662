"""Real studies that replace cells and are killed; a script, since killing needs processes without threads.

python study_kills.py FOLDER KILLS SEED: kill `run_study` on the tiny model before each time that it renames a folder,
then KILLS times with one process and KILLS times with two at once, half of them at random instants and half before a
random operation on files. The study lacks some cells, and replaces the others, which were saved without recordings.
Ends with an assertion error where anything finished was lost, or a result differs from that of a study that was never
stopped.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from kills import changes_files, start, stop, wait

import icl_dual as icl
from icl_dual.cells import RECORDINGS
from icl_dual.models import tiny_model
from icl_dual.storage import clean_scratch, finished_folders

ROWS = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
TASK = icl.Task("films", "Text: {text} Label:", ("bad", "good"), ROWS)
CELL = icl.Cell("tiny", "films", k=2, seed=1, lr=0.01, n_queries=3, replicas=0)
CELLS = (CELL, replace(CELL, context="flipped labels"))


def run(folder: Path, model: icl.Model, *, keep_recordings: bool = True) -> None:
    icl.run_study(CELLS, folder, tasks=[TASK], models=[model], keep_recordings=keep_recordings, progress=False)


def has_recordings(folder: Path) -> list[str]:
    """Return the names of the cells that are finished with their recordings."""
    return [cell.name for cell in CELLS if (folder / cell.name / RECORDINGS / "metadata.json").exists()]


def content(folder: Path) -> tuple[icl.CellResult, icl.Recordings | None]:
    """Return a cell without what differs from run to run: its folder and the seconds that it took."""
    result = icl.load_cell(folder)
    recordings = result.recordings() if (folder / RECORDINGS).exists() else None
    if recordings is not None:
        recordings = replace(recordings, metadata=_without_seconds(recordings.metadata))
    provenance = _without_seconds({"provenance": result.provenance})["provenance"]
    return replace(result, provenance=provenance, folder=Path()), recordings


def _without_seconds(metadata: dict) -> dict:
    return metadata | {"provenance": {**metadata["provenance"], "seconds": None}}


def count_events(work: Callable[[], None], is_counted: Callable[[str, tuple], bool]) -> int:
    """Return how often a piece of work, in a process of its own, does an operation on files that is counted."""
    reader, writer = os.pipe()

    def count() -> None:
        n_events = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal n_events
            n_events += is_counted(event, arguments)

        sys.addaudithook(hook)
        work()
        os.write(writer, str(n_events).encode())

    wait(start(count))
    return int(os.read(reader, 20))


def killed_before(index: int, work: Callable[[], None], is_counted: Callable[[str, tuple], bool]) -> None:
    """Run a piece of work, and kill the process before one of its operations on files, by its index."""
    remaining = index

    def hook(event: str, arguments: tuple) -> None:
        nonlocal remaining
        if is_counted(event, arguments):
            remaining -= 1
            if remaining < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()


def renames(event: str, arguments: tuple) -> bool:
    """Return whether an audit event is of a file or folder that gets another name."""
    return event == "os.rename"


class Kills:
    """Studies to kill, and the results that they are to have."""

    def __init__(self, root: Path, seed: int) -> None:
        self.folder, self.plain, self.whole = root / "killed", root / "plain", root / "whole"
        self.model, self.rng = tiny_model(), random.Random(seed)
        run(self.plain, self.model, keep_recordings=False)  # which also warms up
        started = time.perf_counter()
        run(self.whole, self.model)
        self.seconds = time.perf_counter() - started
        self.expected = {cell.name: content(self.whole / cell.name) for cell in CELLS}
        self.work = partial(run, self.folder, self.model)

    def begin(self, share_finished: float = 0.7) -> None:
        """Begin a study in which each cell is missing or, by a share, saved without recordings."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for cell in CELLS:
            if self.rng.random() < share_finished:
                shutil.copytree(self.plain / cell.name, self.folder / cell.name)

    def count(self, is_counted: Callable[[str, tuple], bool]) -> int:
        """Return how many operations on files a study does that replaces all of its cells."""
        self.begin(share_finished=1)
        return count_events(self.work, is_counted)

    def kill_before(self, index: int) -> None:
        """Replace all cells, and kill the process before it renames a file or folder, by the index of these times."""
        self.begin(share_finished=1)
        assert wait(start(partial(killed_before, index, self.work, renames))), "the study was done"
        assert [path.name for path in finished_folders(self.folder)] == [cell.name for cell in CELLS]
        for name in self.expected:
            self.check(name)

    def kill(self, n_processes: int, n_operations: int) -> bool:
        """Run the study in processes and kill them; return whether they were done before they were killed."""
        finished = [path.name for path in finished_folders(self.folder)]
        first = self.work
        if self.rng.random() < 0.5:
            first = partial(killed_before, self.rng.randrange(n_operations), self.work, changes_files)
        pids = [start(work) for work in (first, self.work)[:n_processes]]
        try:
            time.sleep(self.rng.uniform(0, 1.2 * self.seconds * n_processes))
            kept = has_recordings(self.folder)
        finally:
            was_killed = stop(pids)
        visible = [path.name for path in finished_folders(self.folder)]
        assert {*finished, *kept} <= {*visible} <= {*self.expected}, f"{finished} before, {visible} after"
        assert {*kept} <= {*has_recordings(self.folder)}, f"{kept} had recordings"
        for name in visible:
            self.check(name)
        return not any(was_killed)

    def check(self, name: str) -> None:
        """Check that a finished cell is that of a study that was never stopped, with or without its recordings."""
        (result, recordings), (expected, all_recordings) = content(self.folder / name), self.expected[name]
        assert result == expected, f"{name} differs"
        assert recordings is None or recordings == all_recordings, f"{name}: recordings differ"

    def finish(self) -> None:
        """Let the study go on to its end, and check that all is there and nothing else."""
        run(self.folder, self.model)
        assert has_recordings(self.folder) == [cell.name for cell in CELLS]
        for name in self.expected:
            self.check(name)
        clean_scratch(self.folder)
        assert {path.name for path in self.folder.iterdir()} == {*self.expected}, "scratch is left"


if __name__ == "__main__":
    torch.set_num_threads(1)
    n_kills = int(sys.argv[2])
    kills = Kills(Path(sys.argv[1]), int(sys.argv[3]))
    n_renames, n_operations, n_killed = kills.count(renames), kills.count(changes_files), 0
    for index in range(n_renames):
        kills.kill_before(index)
    for n_processes in (1, 2):
        target = n_killed + n_kills
        kills.begin()
        while n_killed < target:
            if kills.kill(n_processes, n_operations):
                kills.begin()
            else:
                n_killed += 1
        kills.finish()
    print(f"killed before each of {n_renames} renames, and {n_killed} times of 1 and of 2 processes")
