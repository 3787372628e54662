"""Measure grids: status and collection of many finished cells, the overhead of a cell, and processes against threads.

`cells` writes copies of a real cell of SmolLM2 and times `status` and `collect` in a new process each. `overhead` times
tiny cells by a worker, against `run_study` alone. `processes` times a grid of SmolLM2 cells by one process with one
thread, by one with two, and by two with one. Numbers go to standard output; docs/grids.md quotes them.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import icl_dual as icl
from icl_dual.grids import Grid, GridCell, Results, Worker, collect, run_grid
from icl_dual.grids.worker import peak_memory
from icl_dual.models import tiny_model
from icl_dual.scripts.common import output_folder, positive, run_script, script_parser
from icl_dual.storage import to_json

PARTS = ("cells", "overhead", "processes")


def many(n_cells: int) -> Grid:
    """A grid of many cells of one model: seeds and rates."""
    seeds = range(1, n_cells // 100 + 1)
    rates = [*(digit * 10.0**-exponent for exponent in range(1, 12) for digit in range(1, 10)), 1e-12]
    return Grid(models=["smollm2-135m"], tasks=["sst2"], k=4, seeds=[*seeds], rates=rates, n_queries=10, replicas=2)


def write_cells(grid: Grid, results: Results) -> None:
    """Run the first cell, and copy its files under the ids and settings of all others."""
    first = grid.cells()[0]
    outcome = Worker(grid, results).run(first.id)
    assert outcome.state in ("done", "already done"), outcome.traceback
    folder, manifest = Path(results.files.url) / "cells", results.manifest(first.id)
    for cell in grid.cells()[1:]:
        _copy(folder, first.id, cell, asdict(manifest))


def _copy(folder: Path, first: str, cell: GridCell, manifest: dict[str, Any]) -> None:
    (folder / cell.id).mkdir()
    for name in manifest["files"]:
        shutil.copyfile(folder / first / name, folder / cell.id / name)
    text = to_json(manifest | {"id": cell.id, "settings": asdict(cell.cell)})
    (folder / cell.id / "manifest.json").write_text(text, encoding="utf-8")


def measure_cells(folder: Path, n_cells: int) -> None:
    """Write cells, and time status and collection."""
    grid, results = many(n_cells), Results(folder / "many")
    write_cells(grid, results)
    for what in ("status", "collect"):
        command = [sys.executable, __file__, "--inner", what, "--cells", str(n_cells), "--folder", str(folder)]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def measure_inner(what: str, folder: Path, n_cells: int) -> None:
    """Time one of the two in this process."""
    before = peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    grid, results = many(n_cells), Results(folder / "many")
    expanded = time.perf_counter() - started
    if what == "status":
        text = str(results.status(grid.cells()))
    else:
        table = collect(results, folder / "many.parquet", grid)
        text = f"{table.n_cells} cells, {table.n_rows} rows, {table.path.stat().st_size / 1e6:.0f} MB"
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = peak_memory()
    print(
        f"{what}: {text}: {seconds:.2f} s ({cpu:.2f} s of CPU, {expanded:.2f} s to expand the grid), peak "
        f"{peak / 2**30:.2f} GiB ({before / 2**30:.2f} GiB after the import)"
    )


def measure_overhead(folder: Path) -> None:
    """Time cells of the tiny model by a worker, and by `run_study`, in CPU seconds."""
    rows = [{"text": f"film number {i}", "label": i % 2} for i in range(40)]
    task = icl.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
    grid = Grid(models=["tiny"], tasks=["films"], k=2, seeds=[*range(1, 13)], rates=0.01, n_queries=3, replicas=0)
    cells, model = [cell.cell for cell in grid.cells()], tiny_model()
    first = replace(grid, seeds=[0])
    icl.run_study([first.cells()[0].cell], folder / "warm study", tasks=[task], models=[model], progress=False)
    run_grid(first, Results(folder / "warm grid"), tasks=[task], models=[model], progress=False)  # imports packages
    seconds = {}
    for name in ("study", "grid"):
        started, cpu = time.perf_counter(), time.process_time()
        if name == "study":
            icl.run_study(cells, folder / name, tasks=[task], models=[model], progress=False)
        else:
            run_grid(grid, Results(folder / name), tasks=[task], models=[model], progress=False)
        seconds[name] = (time.perf_counter() - started) / len(cells), (time.process_time() - cpu) / len(cells)
    wall, cpu = (grid - study for grid, study in zip(seconds["grid"], seconds["study"], strict=True))
    print(f"overhead: {wall:.3f} s a cell ({cpu:.3f} s of CPU), of {seconds['grid'][0]:.3f} s")


class Measured(NamedTuple):
    """What a run of a grid took."""

    whole: float
    """The seconds from its start to its end, processes and models included."""
    later: float
    """The seconds a cell, by all workers together, without the first cell of each, for which it loads the model."""


def measure_processes(folder: Path) -> None:
    """Time a grid of SmolLM2 cells by one process with one thread and with two, and by two processes with one."""
    grid = Grid(
        models=["smollm2-135m"], tasks=["sst2"], k=4, seeds=[*range(1, 13)], rates=0.001, n_queries=8, replicas=2
    )
    measured = {counts: measure_engine(folder, grid, *counts) for counts in ((1, 1), (1, 2), (2, 1))}
    threads, processes = measured[1, 2], measured[2, 1]
    print(
        f"processes: two with one thread are {threads.whole / processes.whole:.2f} × as fast as one with two, and "
        f"{threads.later / processes.later:.2f} × without the start and the first cell of each"
    )


def measure_engine(folder: Path, grid: Grid, processes: int, threads: int) -> Measured:
    """Time a grid by the local engine."""
    results, started = Results(folder / f"processes-{processes}-{threads}"), time.perf_counter()
    summary = run_grid(grid, results, progress=False, processes=processes, threads=threads)
    whole = time.perf_counter() - started
    by_worker: dict[str, list[float]] = {}
    for cell_id in summary.done:  # in the order of their ends
        manifest = results.manifest(cell_id)
        by_worker.setdefault(manifest.worker, []).append(manifest.seconds)
    later = [seconds for of_worker in by_worker.values() for seconds in of_worker[1:]]
    a_cell = sum(later) / len(later)
    print(
        f"{processes} × {threads} thread(s): {whole:.1f} s for {len(summary.done)} cells, {a_cell:.2f} s a cell after "
        f"the first of each of {len(by_worker)} worker(s), which took "
        f"{', '.join(f'{of_worker[0]:.1f} s' for of_worker in by_worker.values())}"
    )
    return Measured(whole, a_cell / len(by_worker))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"{', '.join(PARTS)} (all)")
    add("--cells", type=positive, default=10_000, help="finished cells (%(default)s)")
    add("--folder", type=output_folder, help="folder for the cells (a temporary one)")
    add("--inner", choices=("status", "collect"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure the parts that are named, or all."""
    if args.inner:
        measure_inner(args.inner, args.folder, args.cells)
        return
    measures = {"overhead": measure_overhead, "processes": measure_processes}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        for part in args.parts:
            if part == "cells":
                measure_cells(folder, args.cells)
            else:
                measures[part](folder)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
