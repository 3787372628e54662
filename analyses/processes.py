"""What benchmarks need of processes: scripts run as processes of their own, and the memory of this one."""

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from icl_dual.scripts.common import ScriptError


def run_child(script: str, *arguments: str, **environment: str) -> str:
    """Return what a script prints in a process of its own.

    Raises:
        ScriptError: it failed; gives the last line that it wrote.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **environment})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ScriptError(
            f"expected {shlex.join(map(str, command[1:]))} to end well, got {last.removeprefix('error: ')}"
        )
    return done.stdout


@contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """Yield a list of this process's resident memory in bytes: before, and then every two milliseconds."""
    import psutil  # an extra: only memory needs it

    process, done = psutil.Process(), threading.Event()
    memory = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(0.002):
            memory.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
