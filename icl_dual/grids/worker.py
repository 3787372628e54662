"""A worker: runs cells of a grid by their ids, in any process that reaches the storage."""

import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from icl_dual.arguments import Count, Rate, checked
from icl_dual.field_docs import document_fields
from icl_dual.grids.claims import TTL_S, Claim, Claims
from icl_dual.grids.grid import Grid, GridCell, GridError
from icl_dual.grids.results import Failure, Results, check_same_versions, installed_versions, process_name
from icl_dual.models import Model
from icl_dual.storage import first_line
from icl_dual.study import CellRunner
from icl_dual.tasks import Task
from icl_dual.torch_utils import DeviceLostError, lost_device

State = Literal["done", "already done", "claimed", "failed"]
"""What came of a cell: computed now; finished before or by another worker; another worker computes it; failed."""

MAX_LOST = 10
"""The number of workers that may be lost in a cell, one after the other, before it counts as failed."""

_POLL_S = 0.2


@checked
@document_fields
@dataclass(frozen=True)
class Outcome:
    """What came of a cell that a worker was given."""

    id: str
    """The cell's id."""
    state: State
    """`done`, `already done`, `claimed` by another worker, or `failed`."""
    seconds: float = 0.0
    """The seconds that the worker spent on it."""
    error: str = ""
    """The error of a cell that failed, in a sentence."""
    traceback: str = ""
    """The traceback of a cell that failed."""


class Worker:
    """Runs cells of a grid by their ids. It can be pickled: models are loaded, and storage opened, where it runs.

    Args:
        grid: the grid.
        results: the results.
        tasks: tasks of your own that the grid names; a name given here takes precedence over a known task's.
        models: models of your own that the grid names. A worker with models cannot be sent to other processes.
        threads: the number of torch's threads; by default as many as torch has.
        ttl: the seconds after which the claim of a lost worker can be taken over.
        max_lost: the number of workers that may be lost in a cell, one after the other, before it counts as failed.
        mix_versions: let a process run cells that has other versions of packages than the one that made the worker.
        progress: show progress bars of the stages within a cell.
    """

    @checked
    def __init__(
        self,
        grid: Grid,
        results: Results,
        *,
        tasks: Sequence[Task] = (),
        models: Sequence[Model] = (),
        threads: Count | None = None,
        ttl: Rate = TTL_S,
        max_lost: Count = MAX_LOST,
        mix_versions: bool = False,
        progress: bool = False,
    ) -> None:
        self.grid, self.results, self.tasks, self.models = grid, results, tuple(tasks), tuple(models)
        self.threads, self.ttl, self.max_lost, self.progress = threads, ttl, max_lost, progress
        self.versions = None if mix_versions else installed_versions()
        self._start()

    def _start(self) -> None:
        self._claims = Claims(self.results.files, self.ttl)
        self._runner: tuple[str, CellRunner] | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self.models:
            raise GridError(
                "expected a worker without models to send to another process, got models: save them in folders and "
                "name these in the grid, or use the local engine with processes=1"
            )
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        if self.versions is not None:
            check_same_versions(installed_versions(), self.versions, "the process that started it")
        self._start()

    @checked
    def run(self, cell_id: str, *, wait: bool = False) -> Outcome:
        """Run a cell, unless it is finished, has failed before, or another worker has claimed it.

        Args:
            cell_id: the id of a cell of the grid.
            wait: wait until a worker that has claimed the cell is done with it, or is lost and the cell taken over.

        Returns:
            What came of it. Errors of the cell are in it, and are recorded in the results; none is raised.

        Raises:
            DeviceLostError: the accelerator was lost, and this process can run no cell any more. The cell's claim stays
                as that of a lost worker, so any other worker takes the cell over at once.
        """
        started, cell = time.perf_counter(), self.grid.cell(cell_id)
        try:
            while True:
                if (outcome := self.known(cell_id)) is not None:
                    return outcome
                if (claim := self._claims.take(cell_id)) is not None:
                    with claim:
                        return self.known(cell_id) or self._run(cell, claim, started)
                if not wait:
                    return Outcome(cell_id, "claimed")
                time.sleep(min(_POLL_S, self.ttl / 4))
        except DeviceLostError:
            raise
        except Exception as error:
            return self._failed(cell_id, error, started, is_of_cell=False)

    def known(self, cell_id: str) -> Outcome | None:
        """Return the outcome of a cell that is finished, or that failed before; `None` for another."""
        cell = self.grid.cell(cell_id)
        if self.results.has(cell.id):
            self.results.check_same(cell, self.results.manifest(cell.id))
            return Outcome(cell.id, "already done")
        if (failure := self.results.failure(cell.id)) is not None:
            return Outcome(cell.id, "failed", 0.0, failure.error, failure.traceback)
        return None

    def _run(self, cell: GridCell, claim: Claim, started: float) -> Outcome:
        try:
            if claim.number >= self.max_lost:
                raise GridError(
                    f"expected {cell.id} to run to its end, got {claim.number} workers lost in it, one after the other "
                    f"({claim.previous_device_error or 'killed, out of memory or time'}): give it more memory, more "
                    "time or another device, and run `rerun --failed`"
                )
            with tempfile.TemporaryDirectory(prefix="icl_dual-") as scratch:
                folder = Path(scratch) / "cell"
                result = self._runner_of(cell).run(cell.cell, folder)
                self.results.check_origin(result)
                seconds = round(time.perf_counter() - started, 3)
                about = {"seconds": seconds, "peak_memory": peak_memory(), "worker": process_name()}
                is_first = self.results.publish(cell, result, about)
        except DeviceLostError as error:  # no error of the cell yet: another process may be able to run it
            claim.leave(first_line(lost_device(error) or error))
            raise
        except Exception as error:
            return self._failed(cell.id, error, started, is_of_cell=True)
        return Outcome(cell.id, "done" if is_first else "already done", time.perf_counter() - started)

    def _runner_of(self, cell: GridCell) -> CellRunner:
        """Return what runs cells in a cell's precision, with the model of the last one kept."""
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if self._runner is None or self._runner[0] != cell.precision:
            dtype, arithmetic = cell.dtypes
            runner = CellRunner(
                tasks=self.tasks,
                models=self.models,
                device=self.grid.device if self.grid.device_map is None else None,
                device_map=self.grid.device_map,
                dtype=dtype,
                arithmetic=arithmetic,
                keep_recordings=self.grid.keep_recordings,
                progress=self.progress,
            )
            self._runner = (cell.precision, runner)
        return self._runner[1]

    def _failed(self, cell_id: str, error: Exception, started: float, *, is_of_cell: bool) -> Outcome:
        """Return the outcome of a cell that failed, after recording it where the storage allows it."""
        text = "".join(traceback.format_exception(error))
        sentence = f"{type(error).__name__}: {first_line(error)}"
        if is_of_cell:
            with suppress(Exception):  # storage that fails: the outcome says so
                self.results.record_failure(Failure(cell_id, sentence, text, process_name()))
        return Outcome(cell_id, "failed", time.perf_counter() - started, sentence, text)


def peak_memory() -> int:
    """Return the most memory that this process has used so far, in bytes."""
    with suppress(OSError, StopIteration):  # `getrusage` counts what the process that started this one had
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
