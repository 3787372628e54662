"""The local engine: the cells in this process, or in processes of this machine with their share of the threads.

Processes divide the cells by their claims. One that is killed, or that ends as its device was lost, is replaced, and
its cell is computed again; all end with the driver.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from icl_dual.arguments import Count, checked
from icl_dual.grids.engines import Report, Summary
from icl_dual.grids.grid import GridError
from icl_dual.grids.planning import Machine, Plan
from icl_dual.grids.worker import Outcome, Worker


@checked
def run_local(
    worker: Worker, plan: Plan, report: Report, *, processes: Count = 1, threads: Count | None = None
) -> Summary:
    """Run the cells of a plan on this machine.

    Args:
        worker: the worker.
        plan: the cells.
        report: what is told of each cell.
        processes: the number of processes; with 1, the cells run in this one.
        threads: the threads of torch of each process; by default an equal share of the CPUs.

    Raises:
        GridError: a cell or all processes together need more than the machine has, several processes would share the
            GPUs of a `device_map`, or no process can start.
        DeviceLostError: with one process, the accelerator was lost in a cell.
    """
    if processes > 1 and worker.grid.device_map is not None and any(cell.resources.gpus for cell in plan.cells):
        raise GridError(
            f"expected one process where device_map fills GPUs, got processes={processes}, which would fill the same "
            "ones: use processes=1"
        )
    machine = Machine.here()
    machine.check_fits(plan.cells)
    needed = max((cell.resources.memory or 0 for cell in plan.cells), default=0)
    if machine.memory is not None and processes * needed > machine.memory:
        raise GridError(
            f"expected processes that fit into {machine.memory / 1e9:.1f} GB of memory, got processes={processes} with "
            f"{needed / 1e9:.1f} GB each: use at most {int(machine.memory // needed)}"
        )
    if processes == 1:
        worker.threads, before = threads or worker.threads, torch.get_num_threads()
        try:
            return Summary.of(_reported(worker, plan.ids, report))
        finally:
            torch.set_num_threads(before)
    worker.threads = threads or max(1, machine.cpus // processes)
    return Summary.of(_Processes(worker, plan.ids, report, min(processes, max(1, len(plan.ids)))).run())


def _reported(worker: Worker, ids: Sequence[str], report: Report) -> Iterator[Outcome]:
    for event in _work(worker, ids):
        if isinstance(event, str):
            report.begin(event)
        else:
            report.end(event)
            yield event


def _work(worker: Worker, ids: Sequence[str]) -> Iterator[str | Outcome]:
    """Run cells in order, and those that others had claimed once more at the end; yield each id and its outcome."""
    claimed: list[str] = []
    for cell_id in ids:
        yield cell_id
        outcome = worker.run(cell_id)
        yield outcome
        if outcome.state == "claimed":
            claimed.append(cell_id)
    for cell_id in claimed:
        yield cell_id
        yield worker.run(cell_id, wait=True)


def _serve(worker: Worker, ids: Sequence[str], connection: Connection) -> None:
    """Run cells in a process of its own, which tells the driver of each and ends with it."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with suppress(KeyboardInterrupt, BrokenPipeError):  # the driver says what stopped
        for event in _work(worker, ids):
            connection.send(event)
        connection.send(None)


def _end_with_driver() -> None:
    if (driver := multiprocessing.parent_process()) is not None:
        wait([driver.sentinel])
        os._exit(1)


@dataclass
class _Slot:
    """One of the processes, which is replaced when it is lost."""

    ids: list[str]
    """The cells in the order in which the process tries them."""
    process: Any = None
    """The process."""
    connection: Any = None
    """Where it tells of its cells."""
    n_lost: int = 0
    """The number of processes lost since the last outcome."""
    over: set[str] = field(default_factory=set[str])
    """The cells with a last outcome."""


class _Processes:
    """Processes that run cells, in the driver's eyes."""

    def __init__(self, worker: Worker, ids: Sequence[str], report: Report, n: int) -> None:
        is_forking = "forkserver" in multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if is_forking else "spawn")
        if is_forking:
            self.context.set_forkserver_preload(["icl_dual.grids"])  # once for all processes
        self.worker, self.report = worker, report
        starts = [len(ids) * index // n for index in range(n)]  # each begins at a part of its own, and goes round
        self.slots = [_Slot([*ids[start:], *ids[:start]]) for start in starts]

    def run(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        running = list(self.slots)
        try:
            for slot in running:
                self._start(slot)
            while running:
                for connection in wait([slot.connection for slot in running]):
                    slot = next(slot for slot in running if slot.connection is connection)
                    if self._has_ended(slot, outcomes):
                        running.remove(slot)
        finally:
            for slot in running:
                slot.process.terminate()
            for slot in self.slots:
                if slot.process is not None:
                    slot.process.join()
        return outcomes

    def _start(self, slot: _Slot) -> None:
        reader, writer = self.context.Pipe(duplex=False)
        ids = [cell_id for cell_id in slot.ids if cell_id not in slot.over]
        slot.process = self.context.Process(target=_serve, args=(self.worker, ids, writer), daemon=True)
        slot.connection = reader
        slot.process.start()
        writer.close()

    def _has_ended(self, slot: _Slot, outcomes: list[Outcome]) -> bool:
        """Take the next event of a process; return whether it was its last one. A lost process is replaced."""
        try:
            event = slot.connection.recv()
        except (EOFError, OSError):
            slot.process.join()
            slot.n_lost += 1
            if slot.n_lost > self.worker.max_lost + 1:
                raise GridError(
                    f"expected a process that runs cells, got {slot.n_lost} lost without an outcome (exit code "
                    f"{slot.process.exitcode}): run with processes=1 to see why"
                ) from None
            self._start(slot)
            return False
        if isinstance(event, str):
            self.report.begin(event)
        elif event is not None:
            self.report.end(event)
            outcomes.append(event)
            slot.n_lost = 0
            if event.state != "claimed":
                for each in self.slots:  # a process that is replaced need not look at it
                    each.over.add(event.id)
        return event is None
