"""Grids on Ray and submitit whose nodes, drivers and jobs are killed; a script, since each fault takes half a minute.

    python engine_faults.py ray-node FOLDER      24 cells on two nodes, one of which is killed in the middle
    python engine_faults.py ray-driver FOLDER N  24 cells on two nodes, whose driver is killed N times (kill -9), in as
                                                 many runs as it takes, each of which then goes on to its end
    python engine_faults.py ray-start FOLDER     a worker that cannot be read on its node
    python engine_faults.py slurm FOLDER         8 cells in two jobs, one of which is killed (kill -9)
    python engine_faults.py address              addresses at which no cluster answers

Prints what was measured, and ends with an assertion error where a cell is missing or is not that of a single process.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the helpers

import psutil
from engine_runs import Events, contents, plan_of, run_here, small_grid, worker_of
from grid_cells import save_tiny

from icl_dual import study
from icl_dual.grids import GridError, Results, Worker
from icl_dual.grids.claims import Claim
from icl_dual.grids.engines.ray import OBJECT_STORE_BYTES, run_ray
from icl_dual.grids.engines.slurm import run_slurm
from icl_dual.grids.grid import Grid, GridCell

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}


def note(log: Path, *words: object) -> None:
    """Append a line to a file that several processes write."""
    with log.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


class NotingWorker(Worker):
    """A worker that notes in a file each model that it loads and each cell that it computes, with its process."""

    def __init__(self, log: Path, *args: Any, **options: Any) -> None:
        self.log = log
        super().__init__(*args, **options)

    def _run(self, cell: GridCell, claim: Claim, started: float) -> Any:
        if not isinstance(study.load_model, partial):
            study.load_model = partial(self.load_model, study.load_model)  # type: ignore[assignment]
        note(self.log, "cell", os.getpid(), cell.id)
        return super()._run(cell, claim, started)

    def load_model(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        note(self.log, "model", os.getpid(), name)
        return load(name, **options)


class UnreadableWorker(Worker):
    """A worker that another process cannot read."""

    def __setstate__(self, state: Any) -> None:
        raise ModuleNotFoundError("No module named 'a_module_of_the_driver'")


def make(
    folder: Path, n_seeds: int, kind: Callable[..., Worker], results: str | Path = "results"
) -> tuple[Grid, Worker]:
    """Return a grid of two cells a seed, and a worker for it, the same in each process that calls this."""
    model = folder / "model"
    if not model.exists():
        save_tiny(model)
    grid = small_grid(str(model), n_seeds)
    return grid, worker_of(grid, folder / results, kind)


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """Yield a cluster of two nodes of a CPU each, and the node that can be killed."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        yield cluster, cluster.add_node(**NODE)
    finally:
        cluster.shutdown()


def report(results: Results, expected: dict, log: Path, n_in_flight: int) -> int:
    """Check the results, and print how often each worker loaded a model; return how many cells were computed again."""
    got = contents(results)
    assert got == expected, f"{len(got)} of {len(expected)} cells, or other numbers"
    lines = [line.split(maxsplit=2) for line in log.read_text().splitlines()]
    loads = Counter(pid for kind, pid, _ in lines if kind == "model")
    computed = Counter(cell for kind, _, cell in lines if kind == "cell")
    again = sum(computed.values()) - len(computed)
    assert again <= n_in_flight, f"{again} cells computed again, {n_in_flight} in flight"
    print(f"{len(got)} cells, equal to those of one process; {again} computed again; {len(loads)} workers, ", end="")
    print(f"each loaded its model {max(loads.values())} time(s)", flush=True)
    return again


def ray_node(folder: Path) -> None:
    grid, worker = make(folder, 12, partial(NotingWorker, folder / "log"))
    expected = run_here(grid, folder / "here")
    with two_nodes() as (cluster, node):
        started = time.perf_counter()
        ends: list[float] = []

        def on_end(events: Events) -> None:
            ends.append(time.perf_counter() - started)
            if len(events.ended) == len(expected) // 2:
                print(f"killed the second node after {len(events.ended)} cells")
                cluster.remove_node(node, allow_graceful=False)

        events = Events(on_end)
        run_ray(worker, plan_of(worker), events, address=cluster.address)
        report(worker.results, expected, folder / "log", 1)
        after = [outcome for outcome, end in zip(events.ended, ends, strict=True) if end > ends[len(ends) // 2]]
        spent, wall = sum(outcome.seconds for outcome in after), ends[-1] - ends[len(ends) // 2]
        print(f"first cell after {ends[0]:.1f} s; the last {len(after)} cells, one at a time: {wall:.2f} s, of which ")
        print(f"{spent:.2f} s in cells: {(wall - spent) / len(after):.3f} s of overhead a cell")


def drive(folder: Path, run: Path, address: str) -> None:
    """Run the grid as a driver that can be killed."""
    _, worker = make(folder, 12, partial(NotingWorker, run / "log"), run / "results")
    run_ray(worker, plan_of(worker), Events(), address=address)


def kill_driver(command: list[str], results: Results, rng: random.Random) -> bool:
    """Start a driver and kill it when some more cells are finished; return whether it was killed, and not done."""
    driver = subprocess.Popen(command)
    n_more = rng.randrange(8)
    target = len(results.finished()) + n_more
    while len(results.finished()) < target and driver.poll() is None:
        time.sleep(0.02)
    with suppress(subprocess.TimeoutExpired):
        driver.wait(rng.random() * (1 if n_more else 15))  # without one more: while the driver starts
    driver.kill()
    return driver.wait() == -signal.SIGKILL


def ray_driver(folder: Path, n_kills: int) -> None:
    grid, _ = make(folder, 12, Worker)
    expected, rng = run_here(grid, folder / "here"), random.Random(0)
    kills, again, n_runs = 0, 0, 0
    with two_nodes() as (cluster, _):
        while kills < n_kills:
            run = folder / f"run-{n_runs}"
            results, before = Results(run / "results"), kills
            run.mkdir()
            command = [sys.executable, __file__, "drive", str(folder), str(run), cluster.address]
            while kills < n_kills and len(results.finished()) < len(expected):
                if kill_driver(command, results, rng):
                    kills += 1
                    print(f"kill {kills}: {len(results.finished())} cells finished", flush=True)
            subprocess.run(command, check=True)
            again += report(results, expected, run / "log", 2 * (kills - before))
            n_runs += 1
    print(f"{kills} drivers killed in {n_runs} runs; {again} cells computed again")


def ray_start(folder: Path) -> None:
    _, worker = make(folder, 1, UnreadableWorker)
    started = time.perf_counter()
    try:
        run_ray(worker, plan_of(worker), Events())
    except GridError as error:
        print(f"after {time.perf_counter() - started:.1f} s: {error}")
    else:
        raise AssertionError("the worker was read")


def slurm(folder: Path) -> None:
    import threading

    grid, worker = make(folder, 4, partial(NotingWorker, folder / "log"))
    expected = run_here(grid, folder / "here")

    def kill() -> None:
        while len(worker.results.finished()) < 3:
            time.sleep(0.02)
        jobs = [
            process
            for process in psutil.Process().children(recursive=True)
            if "submitit.core._submit" in process.cmdline()
        ]
        jobs[0].kill()
        print("killed a job after 3 cells", flush=True)

    threading.Thread(target=kill, daemon=True).start()
    run_slurm(worker, plan_of(worker), Events(), cluster="local", cells_per_job=4, logs=folder / "logs")
    report(worker.results, expected, folder / "log", 1)


def address() -> None:
    from icl_dual.grids.engines.ray import check_reachable

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        silent = f"127.0.0.1:{server.getsockname()[1]}"
        for name in (silent, f"ray://{silent}", "127.0.0.1:1", "no-such-host:6379", "10.255.255.1:6379", "auto"):
            started = time.perf_counter()
            try:
                check_reachable(name)
            except GridError as error:
                print(f"{name}: {time.perf_counter() - started:.1f} s, {error}", flush=True)
            else:
                print(f"{name}: reachable", flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    what, *arguments = sys.argv[1:]
    folder = Path(arguments[0]).resolve() if arguments else Path()
    folder.mkdir(parents=True, exist_ok=True)
    match what:
        case "ray-node":
            ray_node(folder)
        case "ray-driver":
            ray_driver(folder, int(arguments[1]))
        case "ray-start":
            ray_start(folder)
        case "slurm":
            slurm(folder)
        case "drive":
            drive(folder, Path(arguments[1]), arguments[2])
        case "address":
            address()
