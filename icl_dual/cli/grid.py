"""The commands of grids: `run`, `status`, `collect`, `rerun` and `plan`."""

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from icl_dual.grids import GridError, Results, collect, load_grid, plan, reset_failed, run_grid
from icl_dual.grids.claims import TTL_S

EXAMPLES = {
    "run": "icl-dual run grid.toml --results s3://bucket/grid --processes 4",
    "status": "icl-dual status grid.toml --results s3://bucket/grid",
    "collect": "icl-dual collect grid.toml --results s3://bucket/grid --table grid.parquet",
    "rerun": "icl-dual rerun grid.toml --results s3://bucket/grid --failed",
    "plan": "icl-dual plan grid.toml --results results --shard 0/8",
}


def add_commands(subparsers: Any) -> None:
    """Add the commands of grids to a parser's subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    commands: dict[str, tuple[str, Callable[[argparse.Namespace], Any]]] = {
        "run": ("run the cells of a grid that are not finished", run),
        "status": ("show how far a grid is, and what failed", status),
        "collect": ("write all finished cells of a grid into one table", collect_cells),
        "rerun": ("run failed and damaged cells of a grid again", rerun),
        "plan": ("show the cells of a grid that are to run, and what they need", show_plan),
    }
    for name, (text, function) in commands.items():
        epilog = f"example:\n  {EXAMPLES[name]}"
        parser = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog, formatter_class=raw
        )
        parser.add_argument("grid", help="TOML file of the grid")
        parser.add_argument("--results", required=True, help="folder, or address such as s3://bucket/prefix")
        parser.add_argument(
            "--storage",
            nargs="*",
            type=_option,
            default=[],
            metavar="KEY=VALUE",
            help="options of fsspec for the storage",
        )
        parser.set_defaults(run=function)
        if name in ("run", "rerun", "plan"):
            parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="part I of N, from 0")
        if name in ("run", "rerun"):
            _add_engine(parser)
    subparsers.choices["collect"].add_argument("--table", default="grid.parquet", help="parquet file (%(default)s)")
    subparsers.choices["rerun"].add_argument("--failed", action="store_true", required=True, help="failed cells")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("engine").add_argument
    add("--engine", choices=("local", "ray", "slurm"), default="local", help="what runs the cells (%(default)s)")
    add("--processes", type=int, default=None, help="processes of the local engine (1)")
    add("--threads", type=int, default=None, help="threads of each process (its share of the CPUs)")
    add("--ttl", type=float, default=TTL_S, help="seconds until a lost worker's cell is taken over (%(default)g)")
    add("--option", nargs="*", type=_option, default=[], metavar="KEY=VALUE", help="further options of the engine")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run a grid.

    Raises:
        GridError: cells failed; each was printed with its error.
    """
    grid, results = load_grid(args.grid), _results(args)
    options = dict(args.option) | {
        name: value for name in ("processes", "threads") if (value := getattr(args, name)) is not None
    }
    run_grid(grid, results, engine=args.engine, shard=args.shard, ttl=args.ttl, **options)
    return status(args)


def status(args: argparse.Namespace) -> dict[str, Any]:
    """Show how far a grid is.

    Raises:
        GridError: cells failed; each was printed with its error.
    """
    grid, results = load_grid(args.grid), _results(args)
    state = results.status(grid.cells())
    print(state)
    if state.failed:
        failures = results.failures()
        for cell_id in state.failed:
            print(f"failed: {cell_id}\n{failures[cell_id].traceback or failures[cell_id].error}")
        first = failures[state.failed[0]]
        raise GridError(
            f"expected cells that run, got {len(state.failed)} that failed (the first, {first.id}: {first.error}): see "
            "the tracebacks above, and run `rerun --failed`"
        )
    return asdict(state)


def collect_cells(args: argparse.Namespace) -> dict[str, Any]:
    """Write all finished cells into one table.

    Raises:
        GridError: cells are damaged; each was printed with its error.
    """
    collection = collect(_results(args), args.table, load_grid(args.grid))
    print(f"{collection.n_cells} cells, {collection.n_rows} rows: {collection.path}")
    for error in collection.damaged.values():
        print(f"damaged: {error}")
    if collection.damaged:
        raise GridError(
            f"expected cells that are not damaged, got {len(collection.damaged)} that are, which the table lacks: run "
            "`rerun --failed`"
        )
    return {**asdict(collection), "path": str(collection.path)}


def rerun(args: argparse.Namespace) -> dict[str, Any]:
    """Run failed and damaged cells again."""
    reset = reset_failed(load_grid(args.grid), _results(args), shard=args.shard)
    print(f"{len(reset)} cells to run again")
    return run(args)


def show_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Show the cells that are to run."""
    planned = plan(load_grid(args.grid), _results(args), shard=args.shard)
    print(planned)
    for cell in planned.cells:
        print(f"  {cell.id}")
    return {"cells": planned.ids, "done": list(planned.done), "failed": list(planned.failed)}


def _results(args: argparse.Namespace) -> Results:
    return Results(args.results, dict(args.storage))


def _option(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; whole numbers, true and false are read as such."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)


def _shard(text: str) -> tuple[int, int]:
    if (parts := re.fullmatch(r"(\d+)/(\d+)", text)) is None or not int(parts[1]) < int(parts[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/4, got {text!r}")
    return int(parts[1]), int(parts[2])
