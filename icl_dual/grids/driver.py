"""The driver: plans a grid, hands the plan to an engine, and shows how far it is."""

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from icl_dual.arguments import Count, Index, Rate, checked
from icl_dual.grids.claims import TTL_S, delete_claims
from icl_dual.grids.engines import Summary
from icl_dual.grids.grid import Grid, GridError
from icl_dual.grids.planning import in_shard, plan
from icl_dual.grids.results import DamagedError, Results
from icl_dual.grids.worker import MAX_LOST, Outcome, Worker
from icl_dual.models import Model
from icl_dual.paper_tasks import registered_task
from icl_dual.progress import progress_bar
from icl_dual.tasks import Task

Engine = Literal["local", "ray", "slurm"]
"""The engines; `ray` and `slurm` need the extras of these names."""


@checked
def run_grid(
    grid: Grid,
    results: Results,
    *,
    engine: Engine = "local",
    shard: tuple[Index, Count] = (0, 1),
    tasks: Sequence[Task] = (),
    models: Sequence[Model] = (),
    ttl: Rate = TTL_S,
    max_lost: Count = MAX_LOST,
    mix_versions: bool = False,
    progress: bool = True,
    **options: Any,
) -> Summary:
    """Run the cells of a grid that are neither finished nor failed, and go on where any of them fails.

    Several drivers may run one grid at once, also with different engines: no cell is computed twice.

    Args:
        grid: the grid.
        results: the results.
        engine: what runs the cells: `local`, `ray` or `slurm`.
        shard: the index of a part of the cells, from 0, and the number of parts.
        tasks: tasks of your own that the grid names; those given to `register_task` as objects are known.
        models: models of your own that the grid names, for the local engine in one process.
        ttl: the seconds after which the claim of a lost worker can be taken over.
        max_lost: the number of workers that may be lost in a cell, one after the other, before it counts as failed.
        mix_versions: add cells to those that other versions of icl-dual, torch and transformers have made.
        progress: show a bar with the cells that are done, running and failed, and the time left.
        options: options of the engine, such as `processes=2` of `local`.

    Returns:
        What came of each cell, with the errors of those that failed; those that failed before are not run again.

    Raises:
        GridError: the name of a model or task is unknown, a cell is larger than the machine, or the engine cannot
            start.
        SettingsError: a finished cell has other settings than the cell of its id now, or was made with other versions.
        AssetError: the results are of another version, or the storage cannot be read or written.
        DeviceLostError: the local engine with one process lost the accelerator; finished cells are kept, and a call in
            a new process goes on.
    """
    passed = {task.name for task in tasks}
    registered = [registered_task(name) for name in sorted(grid.task_names - passed)]  # other processes lack them
    tasks = [*tasks, *(task for task in registered if task is not None)]
    planned = plan(
        grid,
        results,
        shard=shard,
        models=[model.name for model in models],
        tasks=[task.name for task in tasks],
        mix_versions=mix_versions,
    )
    if planned.cells:
        results.check_writable()
    delete_claims(results.files, planned.done)
    worker = Worker(grid, results, tasks=tasks, models=models, ttl=ttl, max_lost=max_lost, mix_versions=mix_versions)
    run = getattr(importlib.import_module(f"icl_dual.grids.engines.{engine}"), f"run_{engine}")
    with Progress(planned.n_cells, len(planned.done), len(planned.failed), show=progress) as report:
        try:
            return run(worker, planned, report, **options)
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
            raise GridError(f"expected options of the engine {engine!r}, got {error}: see icl_dual.grids") from error


@checked
def reset_failed(grid: Grid, results: Results, *, shard: tuple[Index, Count] = (0, 1)) -> list[str]:
    """Delete the failures and the damaged cells of a grid, so that these cells run again; return their ids.

    Every file of every finished cell is read and checked.

    Raises:
        AssetError: the results are of another version, or a file cannot be read now; nothing is deleted.
    """
    status = results.status(in_shard(grid.cells(), shard))
    reset = list(status.failed)
    for cell_id in status.done:
        try:
            results.verify(cell_id)
        except DamagedError:
            reset.append(cell_id)
    for cell_id in reset:
        results.remove(cell_id)
    return reset


class Progress:
    """A bar with the cells that are done, running and failed, and the time left; with `show=False`, none."""

    def __init__(self, n_cells: int, n_done: int, n_failed: int, *, show: bool = True) -> None:
        self.bar = progress_bar(
            total=n_cells, initial=n_done + n_failed, show=show, leave=True, unit="cell", file=sys.stderr
        )
        self.running: dict[str, float] = {}
        self.failed, self.over = n_failed, set[str]()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, cell_id: str) -> None:
        """Note that a worker has begun a cell."""
        self.running[cell_id] = time.monotonic()
        self._show()

    def end(self, outcome: Outcome) -> None:
        """Note what came of a cell."""
        self.running.pop(outcome.id, None)
        if outcome.state != "claimed" and outcome.id not in self.over:
            self.over.add(outcome.id)
            self.failed += outcome.state == "failed"
            self.bar.update()
        self._show()

    def _show(self) -> None:
        self.bar.set_postfix_str(f"{len(self.running)} running, {self.failed} failed")
