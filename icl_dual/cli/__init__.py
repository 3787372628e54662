"""The command `icl-dual`: one module for each command, and what all of them share."""

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout

import icl_dual as icl
from icl_dual.cli import compare, doctor, grid, models, reproduce, tasks, view
from icl_dual.cli.commands import IncompleteError, log_messages
from icl_dual.progress import progress_enabled
from icl_dual.scripts.common import ScriptParser, run_script

DESCRIPTION = "Compare in-context learning with finetuning, layer by layer, on any decoder model."
EPILOG = """examples:
  icl-dual doctor
  icl-dual compare smollm2-135m --rows films.csv --labels bad good
  icl-dual reproduce --tasks sst2 mr --queries 50

`icl-dual COMMAND --help` has the options and examples of a command.
exit codes: 0 done, 1 an error that you can mend, 2 wrong arguments, 130 stopped by Ctrl-C"""
MODULES = (reproduce, compare, view, grid, models, tasks, doctor)
"""The modules of commands, in the order of the help: `add_commands` of each adds its parsers."""


def make_parser() -> ScriptParser:
    """Return the parser of all commands. The one of a command sets `run`, a function of the arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(prog="icl-dual", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"icl-dual {icl.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in MODULES:
        module.add_commands(subparsers)
    for command in dict.fromkeys(subparsers.choices.values()):
        _add_output_options(command)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has, also to commands of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            for command in dict.fromkeys(vars(action)["choices"].values()):
                _add_output_options(command)
            return
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="show no progress bars, log or warnings")
    group.add_argument("--json", action="store_true", help="print the result as JSON, and everything else to stderr")
    group.add_argument("--debug", action="store_true", help="show an error's traceback")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments of a command; without one, show the help and end with exit status 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        parser.exit(2)
    return args


def run(args: argparse.Namespace) -> None:
    """Run a command, and print its result where `--json` requests it, also that of one that is incomplete."""
    incomplete: IncompleteError | None = None
    with _quiet(args.quiet), log_messages(args.quiet), redirect_stdout(sys.stderr if args.json else sys.stdout):
        try:
            result = args.run(args)
        except IncompleteError as error:
            result, incomplete = error.result, error
    if args.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    if incomplete is not None:
        raise incomplete


@contextmanager
def _quiet(quiet: bool) -> Generator[None]:
    """Silence progress bars within a block."""
    enabled = progress_enabled()
    if quiet:
        icl.set_progress(False)
    try:
        yield
    finally:
        if quiet:
            icl.set_progress(enabled)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 after an error, 2 after wrong arguments, 130 after Ctrl-C.

    Args:
        argv: the command and its arguments; by default the process's own.
    """
    return run_script(parse, run, argv)
