"""The SLURM engine: cells in job arrays that submitit submits, and that SLURM requeues after pre-emption."""

import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from icl_dual.arguments import Count, checked
from icl_dual.grids.engines import Report, Summary
from icl_dual.grids.grid import GridError
from icl_dual.grids.planning import Plan, PlannedCell, Resources
from icl_dual.grids.worker import Outcome, Worker

_POLL_S = {"local": 0.2, "slurm": 5.0}


@checked
def run_slurm(
    worker: Worker,
    plan: Plan,
    report: Report,
    *,
    logs: str | Path = "slurm_logs",
    cluster: Literal["slurm", "local"] = "slurm",
    cells_per_job: Count = 8,
    minutes: Count = 60,
    jobs_at_once: Count = 256,
    **parameters: Any,
) -> Summary:
    """Run the cells of a plan in job arrays on SLURM, an array for each kind of resources.

    A job runs neighbouring cells of one model, which it loads once. A job that is pre-empted or at the end of its time
    is requeued, and goes on with the cells that are not finished; the cells of a job that is lost are submitted again.

    Args:
        worker: what runs the cells; its results are storage that every node reaches.
        plan: the cells.
        report: what is told of cells that begin, with their job, and that end, with their job.
        logs: a folder on a file system that every node reaches, for what jobs are given, return and print.
        cluster: `slurm`, or `local` for processes on this machine, all at once, to try a grid without SLURM.
        cells_per_job: the most cells that a job runs, one after the other.
        minutes: the time limit of a job.
        jobs_at_once: the most jobs of an array that SLURM runs at once.
        parameters: further parameters of submitit's executor, such as `slurm_partition="gpu"` or `mem_gb=64`.

    Raises:
        GridError: submitit or SLURM is not installed, a parameter is unknown, or SLURM refuses a job, for example as no
            node has what a cell needs.
    """
    try:
        submitit = import_module("submitit")
    except ImportError as error:
        raise GridError("expected submitit for this engine, got none: pip install 'icl-dual[slurm]'") from error
    arrays: dict[Resources, list[list[str]]] = {}
    for needs, ids in in_jobs(plan.cells, cells_per_job):
        arrays.setdefault(needs, []).append(ids)
    run = _Run(submitit, worker, report, cluster)
    try:
        for needs, jobs in arrays.items():
            options = _options(needs, minutes, jobs_at_once) | parameters
            run.submit(_executor(submitit, logs, cluster, options), jobs)
        return run.outcomes()
    finally:
        run.cancel()


def in_jobs(cells: Iterable[PlannedCell], cells_per_job: int) -> list[tuple[Resources, list[str]]]:
    """Return the cells of each job, with what it needs: neighbours with one model and equal needs."""
    jobs: list[tuple[Resources, list[str]]] = []
    for (_, needs), members in groupby(cells, key=lambda cell: (cell.group, cell.resources)):
        ids = [cell.id for cell in members]
        jobs += [(needs, ids[start : start + cells_per_job]) for start in range(0, len(ids), cells_per_job)]
    return jobs


def _options(needs: Resources, minutes: int, jobs_at_once: int) -> dict[str, Any]:
    """Return the parameters of submitit's executor for jobs that need these resources."""
    options: dict[str, Any] = {"name": "icl-dual", "timeout_min": minutes, "cpus_per_task": needs.cpus}
    options |= {"gpus_per_node": needs.gpus} if needs.gpus else {}
    options |= {} if needs.memory is None else {"mem_gb": needs.memory / 1e9}
    return options | {"slurm_array_parallelism": jobs_at_once, "slurm_additional_parameters": {"requeue": True}}


def _executor(submitit: ModuleType, logs: str | Path, cluster: str, options: Mapping[str, Any]) -> Any:
    try:
        executor = submitit.AutoExecutor(logs, cluster=cluster)
        executor.update_parameters(**options)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise GridError(
            f"expected SLURM and parameters of submitit's executor, got {error}: run on a machine with `sbatch`, or "
            "use cluster='local' or another engine"
        ) from error
    return executor


class RunCells:
    """Runs cells one after the other in a job. It is pickled with the job, and again where the job is requeued."""

    def __init__(self, worker: Worker, cpus: int) -> None:
        self.worker, self.cpus = worker, cpus

    def __call__(self, cell_ids: Sequence[str]) -> list[Outcome]:
        """Run cells and return what came of each; those that another worker has claimed are waited for at the end."""
        if self.worker.threads is None:
            self.worker.threads = self.cpus
        outcomes = {cell_id: self.worker.run(cell_id) for cell_id in cell_ids}
        for cell_id, outcome in outcomes.items():
            if outcome.state == "claimed":
                outcomes[cell_id] = self.worker.run(cell_id, wait=True)
        return list(outcomes.values())

    def checkpoint(self, cell_ids: Sequence[str]) -> Any:
        """Return what submitit requeues: the job itself, for which finished cells cost nothing."""
        return import_module("submitit").helpers.DelayedSubmission(self, cell_ids)


class _Submitted(NamedTuple):
    """A job that was submitted."""

    job: Any
    """Submitit's job."""
    executor: Any
    """The executor that it was submitted by."""
    cell_ids: list[str]
    """The cells that it runs."""
    losses: int
    """How often a job of these cells was lost before, one after the other."""


class _Run:
    """The jobs of a run."""

    def __init__(self, submitit: ModuleType, worker: Worker, report: Report, cluster: str) -> None:
        self.errors = (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError)
        self.worker, self.report, self.is_local = worker, report, cluster == "local"
        self.jobs: list[_Submitted] = []
        self.begun: set[str] = set()

    def submit(self, executor: Any, jobs: Sequence[list[str]], losses: int = 0) -> None:
        """Submit an array of jobs."""
        cpus = executor.parameters.get("cpus_per_task", 1)
        try:
            submitted = executor.map_array(RunCells(self.worker, cpus), jobs)
        except (*self.errors, RuntimeError) as error:
            raise GridError(
                f"expected SLURM to take jobs with {dict(executor.parameters)}, got {error}: choose a partition whose "
                "nodes have as much, or set cpus, gpus or memory_gb in the grid to what a cell needs"
            ) from error
        for job, cell_ids in zip(submitted, jobs, strict=True):
            self.jobs.append(_Submitted(job, executor, cell_ids, losses))

    def outcomes(self) -> Summary:
        """Wait for all jobs, and return what came of their cells."""
        outcomes: list[Outcome] = []
        while self.jobs:
            for submitted in list(self.jobs):
                if submitted.job.done():
                    self.jobs.remove(submitted)
                    outcomes += self._collect(submitted)
                elif submitted.job.job_id not in self.begun and submitted.job.state == "RUNNING":
                    self.begun.add(submitted.job.job_id)
                    for cell_id in submitted.cell_ids:
                        self.report.begin(cell_id)
            if self.jobs:
                time.sleep(_POLL_S["local" if self.is_local else "slurm"])
        return Summary.of(outcomes)

    def _collect(self, submitted: _Submitted) -> list[Outcome]:
        """Return the outcomes of a job's cells that ended; the others of a job that was lost are submitted again."""
        try:
            if self.is_local and not submitted.job.paths.result_pickle.exists():  # submitit waits for 15 s for it
                raise self.errors[0](f"no result in {submitted.job.paths.stderr}")
            outcomes: list[Outcome] = submitted.job.result()
        except self.errors as error:
            ended = {cell_id: self.worker.known(cell_id) for cell_id in submitted.cell_ids}
            outcomes = [outcome for outcome in ended.values() if outcome is not None]
            remaining = [cell_id for cell_id, outcome in ended.items() if outcome is None]
            losses = 0 if outcomes else submitted.losses + 1  # jobs that get on may be lost in one cell after the other
            if remaining and losses <= self.worker.max_lost:
                self.submit(submitted.executor, [remaining], losses)
            else:
                sentence = f"expected a job to run to its end, got {losses} that were lost: see {error}"
                outcomes += [Outcome(cell_id, "failed", error=sentence) for cell_id in remaining]
        for outcome in outcomes:
            self.report.end(outcome)
        return outcomes

    def cancel(self) -> None:
        """Cancel the jobs that have not ended."""
        for submitted in self.jobs:
            submitted.job.cancel(check=False)
