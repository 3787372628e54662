"""`icl-dual reproduce`: the paper's tables and figures."""

import argparse
from typing import Any

from icl_dual.cli.commands import add_command
from icl_dual.scripts import reproduce

EXAMPLES = """
icl-dual reproduce
icl-dual reproduce --tasks sst2 agnews --k 4 --queries 20 --lr 0.001 --out small
icl-dual reproduce --preset paper-1.3b --rehearse 2 --out rehearsal
"""


def add_commands(subparsers: Any) -> None:
    """Add the command."""
    summary = "Write the paper's tables and figures for a model: zero-shot, in-context learning and finetuning."
    parser = add_command(subparsers, "reproduce", run, summary=summary, examples=EXAMPLES, **reproduce.PARSING)
    reproduce.add_options(parser)
    parser.set_defaults(stopped=reproduce.STOPPED)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the cells that are not finished, write tables and figures, and return accuracies and files."""
    results = reproduce.write(args)
    cells = [{"cell": result.cell.name, "accuracy": result.comparison.accuracy} for result in results]
    return {"cells": cells, "files": sorted(str(path) for path in args.out.iterdir() if path.is_file())}
