"""The commands of grids: `run`, `status`, `collect`, `rerun`, `plan` and `select`."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from icl_dual.cli.commands import IncompleteError, add_command
from icl_dual.grids import (
    Engine,
    Failure,
    Grid,
    GridCell,
    GridError,
    Results,
    collect,
    load_grid,
    plan,
    reset_failed,
    run_grid,
    select,
)
from icl_dual.grids.claims import TTL_S
from icl_dual.grids.planning import in_shard
from icl_dual.grids.selection import CHECKED, Rule
from icl_dual.scripts.common import positive

RUN = """
icl-dual run grid.toml --results results --processes 2
icl-dual run grid.toml --results s3://bucket/grid --storage endpoint_url=https://store.example.org
icl-dual run grid.toml --results results --shard 0/8
icl-dual run grid.toml --results results --engine ray --option address=10.0.0.1:6379
icl-dual run grid.toml --results results --engine slurm --option cells_per_job=20 slurm_partition=gpu
"""
STATUS = """
icl-dual status grid.toml --results results
icl-dual status grid.toml --results s3://bucket/grid --json
"""
COLLECT = "icl-dual collect grid.toml --results results --table grid.parquet"
RERUN = "icl-dual rerun grid.toml --results results --failed --processes 2"
PLAN = """
icl-dual plan grid.toml --results results
icl-dual plan grid.toml --results results --shard 0/8
"""
SELECT = """
icl-dual select search.toml --results searched
icl-dual select search.toml --results searched --rule best --seeds
"""
STOPPED = "Finished cells stay in {results}; the same command goes on from them."


def add_commands(subparsers: Any) -> None:
    """Add the commands of grids to a parser's subparsers."""

    def add(name: str, function: Callable[[argparse.Namespace], Any], summary: str, examples: str) -> Any:
        parser = add_command(subparsers, name, function, summary=summary, examples=examples)
        parser.add_argument("grid", type=Path, help="TOML file of the grid")
        parser.add_argument("--results", required=True, help="folder, or address such as s3://bucket/prefix")
        options: dict[str, Any] = {"nargs": "+", "action": "extend", "type": _option, "metavar": "KEY=VALUE"}
        parser.add_argument("--storage", default=[], help="options of fsspec for the storage", **options)
        if name in ("run", "rerun", "plan"):
            parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="part I of N, from 0")
            parser.add_argument(
                "--mix-versions", action="store_true", help="add cells to those that other versions of packages made"
            )
        if name in ("run", "rerun"):
            engine = parser.add_argument_group("engine").add_argument
            engine("--engine", choices=get_args(Engine), default="local", help="what runs the cells (%(default)s)")
            engine("--processes", type=positive, help="processes of the local engine (1)")
            engine("--threads", type=positive, help="threads of each process (its share of the CPUs)")
            engine(
                "--ttl",
                type=_seconds,
                default=TTL_S,
                help="seconds until a lost worker's cell is taken over (%(default)g)",
            )
            engine("--option", default=[], help="further options of the engine", **options)
            parser.set_defaults(stopped=STOPPED)
        return parser

    add("run", run, "Run the cells of a grid that are not finished.", RUN)
    add("status", status, "Show how far a grid is, and what failed.", STATUS)
    parser = add("collect", collect_cells, "Write all finished cells of a grid into one table.", COLLECT)
    parser.add_argument("--table", type=Path, default="grid.parquet", help="parquet file (%(default)s)")
    parser = add("rerun", rerun, "Run failed and damaged cells of a grid again.", RERUN)
    parser.add_argument("--failed", action="store_true", required=True, help="failed and damaged cells")
    add("plan", show_plan, "Show the cells of a grid that are to run, and what they need.", PLAN)
    parser = add("select", select_rates, "Choose rates, and seeds, from a finished grid.", SELECT)
    parser.add_argument("--rule", choices=get_args(Rule), default="stable", help="how to choose (%(default)s)")
    parser.add_argument("--seeds", action="store_true", help="choose a seed together with the rate")
    parser.add_argument(
        "--checked",
        type=positive,
        default=CHECKED,
        help="candidates checked for stability, from the best (%(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run a grid.

    Raises:
        IncompleteError: cells failed; each was printed with its error.
    """
    grid, results = _grid(args), _results(args)
    options = dict(args.option) | {
        name: value for name in ("processes", "threads") if (value := getattr(args, name)) is not None
    }
    options |= {"engine": args.engine, "shard": args.shard, "ttl": args.ttl, "mix_versions": args.mix_versions}
    summary = run_grid(grid, results, **options)
    failures = [Failure(cell_id, o.error, o.traceback, "") for cell_id, o in summary.failed.items()]
    return _show_status(results, in_shard(grid.cells(), args.shard), failures)


def status(args: argparse.Namespace) -> dict[str, Any]:
    """Show how far a grid is.

    Raises:
        IncompleteError: cells failed; each was printed with its error.
    """
    results, cells = _results(args), _grid(args).cells()
    versions = results.versions(results.status(cells).done)
    _warn_of_versions(versions)
    return _show_status(results, cells) | {"versions": versions}


def _warn_of_versions(versions: Mapping[str, int]) -> None:
    """Print the versions that cells were made with, where there are several."""
    if len(versions) > 1:
        lines = [f"  {count} cells with {text}" for text, count in versions.items()]
        print("\n".join(["warning: cells were made with several versions of packages:", *lines]), file=sys.stderr)


def _show_status(results: Results, cells: Iterable[GridCell], failures: Iterable[Failure] = ()) -> dict[str, Any]:
    """Show how far cells are, and all failures: those of the results, and others that storage may have lost."""
    state = results.status(cells)
    recorded = results.failures() if state.failed else {}
    failed = {failure.id: failure for failure in failures if failure.id not in state.done}
    failed |= {cell_id: recorded[cell_id] for cell_id in state.failed if cell_id in recorded}
    print(state)
    for failure in failed.values():
        print(f"failed: {failure.id}\n{failure.traceback or failure.error}")
    about = {cell_id: {"error": failure.error, "traceback": failure.traceback} for cell_id, failure in failed.items()}
    result = {**asdict(state), "failed": about}
    if failed:
        first = next(iter(failed.values()))
        raise IncompleteError(
            f"expected cells that run, got {len(failed)} that failed (the first, {first.id}: {first.error}): see the "
            "tracebacks above, and run `rerun --failed`",
            result,
        )
    return result


def collect_cells(args: argparse.Namespace) -> dict[str, Any]:
    """Write all finished cells into one table.

    Raises:
        IncompleteError: cells are damaged; each was printed with its error.
    """
    collection = collect(_results(args), args.table, _grid(args))
    print(f"{collection.n_cells} cells, {collection.n_rows} rows: {collection.path}")
    _warn_of_versions(collection.versions)
    for error in collection.damaged.values():
        print(f"damaged: {error}")
    result = {**asdict(collection), "path": str(collection.path)}
    if collection.damaged:
        raise IncompleteError(
            f"expected cells that are not damaged, got {len(collection.damaged)} that are, which the table lacks: run "
            "`rerun --failed`",
            result,
        )
    return result


def rerun(args: argparse.Namespace) -> dict[str, Any]:
    """Run failed and damaged cells again."""
    reset = reset_failed(_grid(args), _results(args), shard=args.shard)
    print(f"{len(reset)} cells to run again")
    return run(args)


def show_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Show the cells that are to run."""
    planned = plan(_grid(args), _results(args), shard=args.shard, mix_versions=args.mix_versions)
    print(planned)
    for cell in planned.cells:
        print(f"  {cell.id}")
    cells = [{"id": cell.id, **cell.resources._asdict()} for cell in planned.cells]
    return {"cells": cells, "done": list(planned.done), "failed": list(planned.failed)}


def select_rates(args: argparse.Namespace) -> dict[str, Any]:
    """Choose rates, and seeds."""
    selection = select(_grid(args), _results(args), rule=args.rule, seeds=args.seeds, n_checked=args.checked)
    print(selection.to_frame().to_string(index=False))
    return {"rule": selection.rule, "choices": [choice._asdict() for choice in selection.choices]}


def _grid(args: argparse.Namespace) -> Grid:
    """Read the grid; several problems are printed one a line, since an error is one line."""
    try:
        return load_grid(args.grid)
    except GridError as error:
        if len(error.problems) < 2:
            raise
        print(error, file=sys.stderr)
        raise GridError(
            f"expected a grid that can be run in {args.grid}, got the {len(error.problems)} problems above: mend them"
        ) from error


def _results(args: argparse.Namespace) -> Results:
    return Results(args.results, dict(args.storage))


def _option(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; numbers, true and false are read as such."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    for kind in (int, float):
        with suppress(ValueError):
            return key, kind(value)
    return key, {"true": True, "false": False}.get(value, value)


def _shard(text: str) -> tuple[int, int]:
    if (parts := re.fullmatch(r"(\d+)/(\d+)", text)) is None or not int(parts[1]) < int(parts[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/4, got {text!r}")
    return int(parts[1]), int(parts[2])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds
