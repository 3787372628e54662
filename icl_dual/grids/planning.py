"""What remains of a grid, and what each cell needs of a machine."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from icl_dual.arguments import Count, Index, checked
from icl_dual.assets import PACKAGED_MODELS, local_files, model_files
from icl_dual.field_docs import document_fields
from icl_dual.grids.grid import Grid, GridCell, GridError, Precision, check_names
from icl_dual.grids.results import Manifest, Results
from icl_dual.type_guards import is_mapping

PROCESS_BYTES = 1.2e9
"""The memory of a process with torch and transformers before it loads a model, in bytes, measured with `ps`."""

MARGIN = 1.2
"""What is planned for a cell, in sizes of the memory that was measured: a limit at the measured size ends many."""

WEIGHT_COPIES = 2.5
"""A cell's memory beyond that of the process, in sizes of the model's weights: themselves, gradients, replicas."""


class Resources(NamedTuple):
    """What a worker needs for a cell."""

    cpus: int
    """The number of CPUs, each with one thread of torch."""
    gpus: int
    """The number of GPUs."""
    memory: int | None
    """The memory in bytes, from what finished cells of the model took, or its files; `None`: unknown."""


class PlannedCell(NamedTuple):
    """A cell of a plan."""

    cell: GridCell
    """The cell."""
    resources: Resources
    """What a worker needs for it."""

    @property
    def id(self) -> str:
        """Return the cell's id."""
        return self.cell.id

    @property
    def group(self) -> str:
        """Return what cells that can use one loaded model have in common."""
        return self.cell.group


@checked
@document_fields
@dataclass(frozen=True)
class Plan:
    """The cells of a grid that are to run."""

    cells: tuple[PlannedCell, ...]
    """The cells that are neither finished nor failed, in an order in which neighbours share what they can."""
    n_cells: Index
    """The number of all cells of the grid, or of its shard."""
    done: tuple[str, ...]
    """The ids of the finished cells."""
    failed: tuple[str, ...]
    """The ids of the cells that failed before, which `rerun --failed` runs again."""

    @property
    def ids(self) -> list[str]:
        """Return the ids of the cells that are to run."""
        return [cell.id for cell in self.cells]

    def __str__(self) -> str:
        lines = [f"{len(self.cells)} of {self.n_cells} cells to run, {len(self.done)} done, {len(self.failed)} failed"]
        groups: dict[tuple[str, Resources], int] = {}
        for cell in self.cells:
            groups[cell.group, cell.resources] = groups.get((cell.group, cell.resources), 0) + 1
        for (group, needs), count in groups.items():
            memory = "unknown memory" if needs.memory is None else f"{needs.memory / 1e9:.1f} GB"
            lines.append(f"  {count} × {group}: {needs.cpus} CPU(s), {needs.gpus} GPU(s), {memory} each")
        return "\n".join(lines)


@checked
def plan(
    grid: Grid,
    results: Results,
    *,
    shard: tuple[Index, Count] = (0, 1),
    models: Sequence[str] = (),
    tasks: Sequence[str] = (),
    mix_versions: bool = False,
) -> Plan:
    """Return the cells of a grid that are to run, after checking the grid against the results.

    Args:
        grid: the grid.
        results: the results, new or of the same grid before, or of another one with other cells.
        shard: the index of a part, from 0, and the number of parts: cells are divided in order.
        models: the names of models of your own, which are passed to the worker.
        tasks: the names of tasks of your own, which are passed to the worker.
        mix_versions: add cells to those that other versions of icl-dual, torch and transformers have made.

    Raises:
        GridError: the name of a model or task is unknown, or there is no such shard.
        SettingsError: a finished cell has other settings than the cell of its id now, or cells remain and finished ones
            were made with other versions of packages than are installed here.
        AssetError: the results are of another version, or cannot be read.
    """
    check_names(grid, models, tasks)
    cells = in_shard(grid.cells(), shard)
    manifests = results.check_settings(cells, recordings=grid.keep_recordings)
    status = results.status(cells)
    over, measured = {*status.done, *status.failed}, _measured(manifests.values())

    @cache
    def needs(model: str, precision: Precision) -> Resources:
        return _resources(grid, model, measured.get((model, precision)))

    remaining = [cell for cell in cells if cell.id not in over]
    if remaining and not mix_versions:
        results.check_versions(manifests)
    return Plan(
        tuple(PlannedCell(cell, needs(cell.cell.model, cell.precision)) for cell in remaining),
        len(cells),
        status.done,
        status.failed,
    )


def in_shard(cells: Sequence[GridCell], shard: tuple[int, int]) -> list[GridCell]:
    """Return one part of cells that are divided in order, into parts that differ by one cell at most.

    Example:
        >>> in_shard([], (0, 2))
        []
    """
    index, n_parts = shard
    if index >= n_parts:
        raise GridError(f"expected a shard from 0/{n_parts} to {n_parts - 1}/{n_parts}, got {index}/{n_parts}")
    return list(cells[len(cells) * index // n_parts : len(cells) * (index + 1) // n_parts])


class Machine(NamedTuple):
    """What a machine has."""

    cpus: int
    """The number of CPUs that this process may use."""
    gpus: int
    """The number of GPUs."""
    memory: int | None
    """The memory in bytes; `None` where it is not known."""

    @classmethod
    def here(cls) -> "Machine":
        """Return what this machine has."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            memory = None
        limit = Path("/sys/fs/cgroup/memory.max")
        if memory is not None and limit.exists() and (text := limit.read_text().strip()).isdecimal():
            memory = min(memory, int(text))
        return cls(cpus, torch.cuda.device_count(), memory)

    def check_fits(self, cells: Sequence[PlannedCell], name: str = "this machine") -> None:
        """Check that every cell can run on this machine.

        Raises:
            GridError: a cell needs more CPUs, GPUs or memory than there are.
        """
        for cell in cells:
            for what, needed, there in zip(Resources._fields, cell.resources, self, strict=True):
                if needed is not None and there is not None and needed > there:
                    amounts = [f"{n / 1e9:.1f} GB" if what == "memory" else str(n) for n in (there, needed)]
                    raise GridError(
                        f"expected cells that need at most the {what} of {name} ({amounts[0]}), got {cell.id}, which "
                        f"needs {amounts[1]}: use a larger machine, or correct cpus, gpus and memory_gb in the grid"
                    )


def _measured(manifests: Iterable[Manifest]) -> dict[tuple[str, str], int]:
    """Return the most memory of finished cells, by model and precision."""
    peaks: dict[tuple[str, str], int] = {}
    for manifest in manifests:
        key = _key(manifest)
        peaks[key] = max(peaks.get(key, 0), manifest.peak_memory)
    return {key: peak for key, peak in peaks.items() if peak}


def _key(manifest: Manifest) -> tuple[str, str]:
    return str(manifest.settings["model"]), manifest.precision


def _resources(grid: Grid, model: str, measured: int | None) -> Resources:
    gpus = _n_gpus(grid) if grid.gpus is None else grid.gpus
    if grid.memory_gb is not None:
        return Resources(grid.cpus, gpus, int(grid.memory_gb * 1e9))
    return Resources(grid.cpus, gpus, int(MARGIN * measured) if measured else _estimate(model))


def _n_gpus(grid: Grid) -> int:
    """Return the number of GPUs that a grid names."""
    if is_mapping(grid.device_map):
        gpus = (place for place in grid.device_map.values() if place.startswith("cuda"))
        return len({"cuda:0" if place == "cuda" else place for place in gpus})
    return 0 if grid.device_map is None and grid.device.startswith("cpu") else 1


def _estimate(model: str) -> int | None:
    """Return an estimate of a cell's memory from the model's files; `None` for models that are on a hub."""
    files = local_files(str(model_files(model).folder) if model in PACKAGED_MODELS else model)
    weights = sum(size for name, (size, *_) in files.items() if name.endswith((".safetensors", ".bin", ".gguf")))
    return int(PROCESS_BYTES + WEIGHT_COPIES * weights) if weights else None
