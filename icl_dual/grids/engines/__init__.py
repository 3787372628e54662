"""Engines: what runs a grid's cells, on this machine or on many.

The contract. An engine is a module in this package with one public function:

    run_<name>(worker: Worker, plan: Plan, report: Report, **options) -> Summary

- `worker` (`icl_dual.grids.worker.Worker`) is a picklable description: the grid, the address of the results and the
  options of the workers. It opens nothing and loads nothing before it is used, so it can be sent to any process that
  reaches the storage. Its copy there runs cells by their ids: `worker.run(cell_id)` returns an `Outcome` and raises no
  error of a cell. A `DeviceLostError` says that its process can run no more cells: end the process and replace it, as
  one that is lost, or let the error reach the caller where it is the caller's own. The copy keeps its model loaded
  while cells share it, so keep it for as long as the process lives.
- `plan` (`icl_dual.grids.planning.Plan`) holds the cells that remain, in an order in which neighbours share what they
  can (`plan.cells`, each with `id`, `cell`, `group` and `resources`). Cells of one `group` share a model. The engine
  may divide them as it likes: two workers that are given one cell do not both compute it, for `worker.run` claims it
  in the storage. It then returns an outcome with the state `claimed`; `worker.run(cell_id, wait=True)` waits until the
  other worker is done with it, and takes the cell over where that one was lost. Give every cell whose last outcome is
  `claimed` once more with `wait=True` before the engine ends.
- `report` is called in the driver's process with each `Outcome`, and with the ids that begin, as far as the engine
  knows: `report.begin(cell_id)`, `report.end(outcome)`.
- It returns `Summary.of(outcomes)`. A worker that is lost in a cell is the engine's to replace; `worker.run` of a cell
  at which several workers were lost in turn returns a failure by itself.

An engine that cannot start (no such address, a cell larger than every node) raises a `GridError` in one sentence,
before any cell runs. It imports optional packages within its function.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from icl_dual.arguments import checked
from icl_dual.field_docs import document_fields
from icl_dual.grids.worker import Outcome


@runtime_checkable
class Report(Protocol):
    """What an engine tells the driver while it runs, in the driver's process."""

    def begin(self, cell_id: str) -> None:
        """Note that a worker has begun a cell."""

    def end(self, outcome: Outcome) -> None:
        """Note what came of a cell; `claimed` is not the last word."""


@checked
@document_fields
@dataclass(frozen=True)
class Summary:
    """What came of a run."""

    outcomes: tuple[Outcome, ...]
    """The last outcome of each cell, in the order of their ends."""

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> "Summary":
        """Return the summary of outcomes: of several of one cell, that of the worker that computed it, or the last."""
        final: dict[str, Outcome] = {}
        for outcome in outcomes:
            if outcome.id not in final or final[outcome.id].state != "done":
                final[outcome.id] = outcome
        return cls(tuple(final.values()))

    @property
    def done(self) -> tuple[str, ...]:
        """Return the ids of the cells that are finished, now or before."""
        return tuple(outcome.id for outcome in self.outcomes if outcome.state in ("done", "already done"))

    @property
    def failed(self) -> dict[str, Outcome]:
        """Return the outcomes of the cells that failed, by id."""
        return {outcome.id: outcome for outcome in self.outcomes if outcome.state == "failed"}
