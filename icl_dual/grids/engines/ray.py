"""The Ray engine: cells on the nodes of a Ray cluster, by actors that keep their model loaded."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import IO, Any, cast

from icl_dual.arguments import Count, checked
from icl_dual.grids.engines import Report, Summary
from icl_dual.grids.grid import GridError
from icl_dual.grids.planning import Machine, Plan, PlannedCell, Resources
from icl_dual.grids.worker import Outcome, Worker
from icl_dual.torch_utils import DeviceLostError

CONNECTION_S = 3
"""The seconds in which the machine at an address must accept a connection."""

ANSWER_S = 10
"""The seconds in which it must then answer as a Ray cluster does."""

_CONNECT = """
import sys, ray
print("imported", flush=True)
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
ray.shutdown()
"""

OBJECT_STORE_BYTES = 80 * 2**20
"""The shared memory of a local cluster, in bytes, near the least that Ray takes: outcomes of cells are small."""

NODE_WAIT_S = 120.0
"""The seconds to wait for another node after every node that a cell fits on was lost."""

MAX_FAILED_STARTS = 3
"""How often an actor may fail to start, one time after the other, before the run is stopped."""

_TICK_S = 1.0


@checked
def run_ray(
    worker: Worker, plan: Plan, report: Report, *, address: str | None = None, workers: Count | None = None
) -> Summary:
    """Run the cells of a plan on a Ray cluster.

    Each actor reserves what the plan says that a cell needs, and uses as many threads as CPUs. It takes neighbouring
    cells of the plan, which share the model and some of their runs. A cell whose actor or node is lost is run again.

    Args:
        worker: what runs the cells; its results are storage that every node reaches.
        plan: the cells.
        report: what is told of cells that begin and end.
        address: the address of a cluster, such as `10.0.0.1:6379`, `ray://10.0.0.1:10001` (which needs `ray[client]`)
            or `auto` for the one that runs on this machine; `None` for a local cluster that ends with the run. In a
            process that is connected by `ray.init` already, that connection is used.
        workers: the number of actors; by default as many as fit on the nodes of the cluster. On a cluster that adds
            nodes on demand, give the number that it is to grow to.

    Raises:
        GridError: Ray is not installed, the address cannot be reached, a cell needs more than any node has, or actors
            cannot start on the nodes. Cells that are finished by then are kept.
    """
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise GridError("expected Ray for this engine, got none installed: pip install 'icl-dual[ray]'") from error
    with _connected(ray, address):
        nodes = _alive(ray)
        check_fits(plan.cells, nodes)
        return _Run(ray, worker, report, _slots(plan.cells, nodes, workers)).outcomes()


@contextmanager
def _connected(ray: ModuleType, address: str | None) -> Generator[None]:
    """Connect to a cluster within a block, unless this process is connected already."""
    if address is not None:
        check_reachable(address)
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": Machine.here().cpus, "object_store_memory": OBJECT_STORE_BYTES}
        options |= {"address": "local", "include_dashboard": False}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Check that a Ray cluster answers at an address, within 15 seconds.

    Ray itself ends the process that connects to an address at which nothing answers, so another process tries first.

    Raises:
        GridError: nothing answers, or something other than a Ray cluster of this version.
    """
    advice = "start a cluster with `ray start --head`, or leave the address out for a local one"
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTION_S).close()
        except (OSError, OverflowError) as error:
            raise GridError(f"expected a Ray cluster at address {address!r}, got {error}: {advice}") from error
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _CONNECT, address], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            cast(IO[str], process.stdout).readline()  # Ray is imported
            errors = process.communicate(timeout=ANSWER_S)[1].strip().splitlines()
            reason = next((line for line in reversed(errors) if "Error:" in line), "no answer of a cluster")
        except subprocess.TimeoutExpired:
            reason = f"no answer of a cluster in {ANSWER_S} s"
            process.kill()
    if process.returncode:
        raise GridError(f"expected a Ray cluster at address {address!r}, got {reason}: {advice}")


def _alive(ray: ModuleType) -> list[Machine]:
    """Return what each node of the cluster has."""
    return [as_machine(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def as_machine(resources: Mapping[str, float]) -> Machine:
    """Return what a node has, from Ray's names of resources."""
    memory = resources.get("memory")
    return Machine(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), None if memory is None else int(memory))


def n_workers(needs: Resources, node: Machine) -> int:
    """Return how many workers fit on a node.

    Example:
        >>> n_workers(Resources(cpus=2, gpus=0, memory=10**9), Machine(cpus=8, gpus=1, memory=3 * 10**9))
        3
    """
    return min(there // needed for needed, there in zip(needs, node, strict=True) if needed and there is not None)


def check_fits(cells: Iterable[PlannedCell], nodes: Sequence[Machine]) -> None:
    """Check that every cell fits on a node.

    Raises:
        GridError: a cell needs more than any node has; the message says what each kind of node has.
    """
    for needs, cell in {cell.resources: cell for cell in cells}.items():
        if not any(n_workers(needs, node) for node in nodes):
            raise GridError(
                f"expected cells that fit on a node of the cluster ({_kinds(nodes)}), got {cell.id}, which needs "
                f"{_in_words(needs)}: add a larger node, or set cpus, gpus or memory_gb in the grid to what it needs"
            )


def _in_words(amounts: Resources | Machine) -> str:
    memory = "unknown memory" if amounts.memory is None else f"{amounts.memory / 1e9:.1f} GB"
    return f"{amounts.cpus} CPU(s), {amounts.gpus} GPU(s), {memory}"


def _kinds(nodes: Iterable[Machine]) -> str:
    return "; ".join(dict.fromkeys(map(_in_words, nodes))) or "no node"


class CellActor:
    """A process on a node, which keeps a worker and so its model."""

    def __init__(self, worker: Worker, cpus: int, folder: str) -> None:
        if os.path.isdir(folder):  # noqa: PTH112 - on this machine: paths of models and tasks may be relative
            os.chdir(folder)
        self.worker = worker
        if worker.threads is None:
            worker.threads = cpus

    def start(self) -> None:
        """Return once the process runs."""

    def run(self, cell_id: str, wait: bool) -> Outcome:
        """Run a cell, or end the process where it has lost its device."""
        try:
            return self.worker.run(cell_id, wait=wait)
        except DeviceLostError:
            os._exit(1)  # a raised error would leave the actor alive, and the driver would take it for a broken worker


@dataclass(eq=False)
class _Slot:
    """What an actor reserves, the cells meant for it, and the actor, which is replaced where it is lost."""

    needs: Resources
    """What the actor reserves."""
    cells: deque[str]
    """The ids of the cells that it is to run, which idle slots may take from the end of."""
    actor: Any = field(default=None, repr=False)
    """The actor, if there is one."""
    running: tuple[str, bool] | None = None
    """The cell that it runs, and whether it waits for another worker that has claimed the cell."""
    failed_starts: int = 0
    """How often an actor failed to start since one did."""


def _slots(cells: Sequence[PlannedCell], nodes: Sequence[Machine], workers: int | None) -> list[_Slot]:
    """Return a slot for each actor, with neighbouring cells of equal needs."""
    by_needs: dict[Resources, list[str]] = {}
    for cell in cells:
        by_needs.setdefault(cell.resources, []).append(cell.id)
    slots: list[_Slot] = []
    for needs, ids in by_needs.items():
        n = min(len(ids), workers or sum(n_workers(needs, node) for node in nodes))
        slots += [_Slot(needs, deque(ids[len(ids) * i // n : len(ids) * (i + 1) // n])) for i in range(n)]
    return slots


class _Run:
    """The run of cells on the actors of slots."""

    def __init__(self, ray: ModuleType, worker: Worker, report: Report, slots: list[_Slot]) -> None:
        self.ray, self.report, self.slots = ray, report, slots
        self.worker = ray.put(worker)
        self.remaining = {cell_id for slot in slots for cell_id in slot.cells}
        self.claimed: dict[Resources, deque[str]] = {slot.needs: deque() for slot in slots}
        """The cells that other workers have claimed, which are waited for when there is nothing else to do."""
        self.pending: dict[Any, _Slot] = {}
        """The slots by what their actor does: it starts, or runs a cell."""
        self.last_fit = time.monotonic()

    def outcomes(self) -> Summary:
        """Run all cells and return what came of them."""
        outcomes: list[Outcome] = []
        try:
            for slot in self.slots:
                self._start(slot)
            while self.remaining:
                ready, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=_TICK_S)
                if not ready:
                    self._check_nodes()
                for ref in ready:
                    if (outcome := self._result(ref)) is not None:
                        outcomes.append(outcome)
        finally:
            for slot in self.slots:
                self._stop(slot)
        return Summary.of(outcomes)

    def _start(self, slot: _Slot) -> None:
        """Start an actor on any node that has what it reserves, now or later."""
        needs = slot.needs
        actor_class = self.ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory)(CellActor)
        slot.actor = actor_class.remote(self.worker, needs.cpus, os.getcwd())  # noqa: PTH109 - a string
        self.pending[slot.actor.start.remote()] = slot

    def _stop(self, slot: _Slot) -> None:
        """End a slot's actor, which frees what it reserved."""
        if slot.actor is not None:
            self.ray.kill(slot.actor)
            slot.actor = None

    def _result(self, ref: Any) -> Outcome | None:
        """Return the outcome of a cell, and give the slot its next one; `None` where an actor started or was lost."""
        slot, exceptions = self.pending.pop(ref), self.ray.exceptions
        try:
            outcome: Outcome | None = self.ray.get(ref)
        except exceptions.RayTaskError as error:  # a worker raises no error of a cell: this one is of the process
            raise GridError(f"expected workers that run cells, got an error in one: {_last_line(error)}") from error
        except exceptions.RayError as error:  # the process, the node or the connection to it was lost
            self._replace(slot, error)
            return None
        slot.failed_starts = 0
        if outcome is not None:
            self._end(slot, outcome)
        self._next(slot)
        return outcome

    def _replace(self, slot: _Slot, error: Exception) -> None:
        """Start another actor in place of a lost one, for the cell that it ran and those after it."""
        if slot.running is None:
            slot.failed_starts += 1
            if slot.failed_starts >= MAX_FAILED_STARTS or getattr(error, "actor_init_failed", False):
                raise GridError(
                    f"expected workers to start on the nodes of the cluster, got {_last_line(error)}: install the same "
                    "versions of icl-dual and Ray on every node"
                ) from error
        else:
            slot.cells.appendleft(slot.running[0])
            slot.running = None
        self._stop(slot)
        self._start(slot)

    def _end(self, slot: _Slot, outcome: Outcome) -> None:
        slot.running = None
        if outcome.state == "claimed":
            self.claimed[slot.needs].append(outcome.id)
        else:
            self.remaining.discard(outcome.id)
        self.report.end(outcome)

    def _next(self, slot: _Slot) -> None:
        """Have a slot's actor run the next cell, or end it where there is none."""
        if not slot.cells:
            self._share(slot)
        if slot.cells:
            slot.running = slot.cells.popleft(), False
        elif self.claimed[slot.needs]:
            slot.running = self.claimed[slot.needs].popleft(), True
        else:
            self._stop(slot)
            return
        self.report.begin(slot.running[0])
        self.pending[slot.actor.run.remote(*slot.running)] = slot

    def _share(self, slot: _Slot) -> None:
        """Give an idle slot the last half of the cells of the slot that has most."""
        other = max((other for other in self.slots if other.needs == slot.needs), key=lambda other: len(other.cells))
        for _ in range((len(other.cells) + 1) // 2):
            slot.cells.appendleft(other.cells.pop())

    def _check_nodes(self) -> None:
        """Raise an error where no cell runs, and for some time no node was there on which one could."""
        nodes = _alive(self.ray)
        waiting = {slot.needs for slot in self.pending.values()}
        has_work = any(slot.running for slot in self.pending.values())
        if has_work or any(n_workers(needs, node) for needs in waiting for node in nodes):
            self.last_fit = time.monotonic()
        elif time.monotonic() - self.last_fit > NODE_WAIT_S:
            raise GridError(
                f"expected a node for the {len(self.remaining)} cells that remain, got {_kinds(nodes)} for "
                f"{NODE_WAIT_S:.0f} s after others were lost: run the grid again when the cluster has more"
            )


def _last_line(error: Exception) -> str:
    """Return the line of a remote error that names it: the last one, after the traceback of the other process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
