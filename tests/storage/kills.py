"""Processes that replace saved results and are killed; a script, since killing needs processes without threads.

python kills.py FOLDER KILLS SEED: kill at every operation on files of one replacement, then KILLS times at random
instants, with one process and with two at once. Ends with an assertion error where anything finished was lost.
"""

import importlib.util
import mmap
import os
import random
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

if __name__ == "__main__":  # the library's other modules take seconds to import, and none is needed
    package = types.ModuleType("icl_dual")
    package.__path__ = list(getattr(importlib.util.find_spec("icl_dual"), "submodule_search_locations", []))
    sys.modules["icl_dual"] = package

from icl_dual.storage import clean_scratch, finished_folders, load_tensors, save_tensors

NAMES = ("a", "b")


def save(folder: Path, writer: int, number: int) -> None:
    """Write a result that says, in its tensors and its metadata, which writer wrote it, and as which number."""
    save_tensors(folder, {"x": torch.full((50,), float(number))}, {"writer": writer, "number": number})


def load(folder: Path) -> tuple[int, int]:
    tensors, metadata = load_tensors(folder)
    assert torch.equal(tensors["x"], torch.full((50,), float(metadata["number"]))), "tensors of another result"
    return metadata["writer"], metadata["number"]


def start(work: Callable[[], None]) -> int:
    """Run a function in a process of its own; return the process's id."""
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait(pid)


def wait(pid: int) -> bool:
    """Wait for a process; return whether it was killed, and not done."""
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "an error in a process that writes"
    return os.WIFSIGNALED(status)


def check_folder(folder: Path) -> None:
    assert [path.name for path in finished_folders(folder)] == list(NAMES)


def changes_files(event: str, arguments: tuple) -> bool:
    """Return whether an audit event is of an operation that changes files or folders."""
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")


def kill_at_every_operation(folder: Path) -> int:
    """Kill a replacement before each operation that changes files, one after the other; return how many there are."""
    for name in NAMES:
        save(folder / name, 0, 0)
    for instant in range(1000):
        before, remaining = load(folder / "a"), instant

        def hook(event: str, arguments: tuple) -> None:
            nonlocal remaining
            if changes_files(event, arguments):
                remaining -= 1
                if remaining < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def replace(number: int = instant) -> None:
            sys.addaudithook(hook)
            save(folder / "a", 1, number)

        was_killed = wait(start(replace))
        check_folder(folder)
        assert load(folder / "a") in {before, (1, instant)}
        assert load(folder / "b") == (0, 0)
        if not was_killed:
            assert load(folder / "a") == (1, instant)
            return instant
    raise AssertionError("a replacement without an end")


def kill_at_random(folder: Path, kills: int, n_writers: int, rng: random.Random) -> None:
    """Kill processes that keep replacing, and check that no folder holds less than what was last reported finished."""
    finished = mmap.mmap(-1, 8 * n_writers * len(NAMES))

    def last_finished(writer: int, index: int) -> int:
        return struct.unpack_from("q", finished, 8 * (writer * len(NAMES) + index))[0]

    def keep_replacing(writer: int, number: int) -> None:
        while True:
            number += 1
            index = number % len(NAMES)
            save(folder / NAMES[index], writer, number)
            struct.pack_into("q", finished, 8 * (writer * len(NAMES) + index), number)

    for name in NAMES:
        save(folder / name, 0, 0)
    number = 0
    for _ in range(kills):
        pids = [start(partial(keep_replacing, writer, number)) for writer in range(n_writers)]
        time.sleep(rng.uniform(0.005, 0.1))
        survivors = pids[1:] if rng.random() < 0.5 else []
        for pid in pids:
            if pid not in survivors:
                kill(pid)
        for name in NAMES:  # read while the survivors write
            load(folder / name)
        for pid in survivors:
            kill(pid)
        check_folder(folder)
        for index, name in enumerate(NAMES):
            writer, saved = load(folder / name)
            assert saved >= last_finished(writer, index), f"{name}: {saved} of {writer} came back"
        number = max(last_finished(writer, index) for writer in range(n_writers) for index in range(len(NAMES))) + 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, n_kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    n_operations = kill_at_every_operation(root)
    for n_writers in (1, 2):
        kill_at_random(root, n_kills, n_writers, random.Random(seed))
    clean_scratch(root)
    assert sorted(path.name for path in root.iterdir()) == list(NAMES), "scratch is left"
    print(f"killed at each of {n_operations} operations, and at {n_kills} random instants of 1 and of 2 processes")
