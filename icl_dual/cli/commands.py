"""What commands share: their parsers, the task that is named or read from a file, and messages."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import icl_dual as icl
from icl_dual.arguments import near_misses
from icl_dual.rows import Rows, located_rows
from icl_dual.scripts.common import ScriptParser

MOST_LABELS = 20
"""The largest number of different labels in a column that can be label words by themselves."""


class IncompleteError(ValueError):
    """A command did a part of its work, which `--json` prints before the error is shown."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], object],
    *,
    summary: str,
    examples: str,
    **parsing: Any,
) -> ScriptParser:
    """Add a command and return its parser.

    Args:
        subparsers: what `add_subparsers` returned.
        name: the command's name.
        run: runs the command with its arguments and returns its result, which can be written as JSON.
        summary: what the command does, in a sentence.
        examples: commands, one a line.
        parsing: options of `ScriptParser`.
    """
    lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
    epilog = f"examples:\n{lines}"
    parser = subparsers.add_parser(name, help=summary, description=summary, epilog=epilog, **parsing)
    parser.set_defaults(run=run, stopped="")
    return parser


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a task, or read one from a file."""
    group = parser.add_argument_group("task", "a known task, or rows of your own")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--task", metavar="NAME", help=f"{', '.join(icl.TASKS)}, or a YAML file of lm-evaluation-harness"
    )
    source.add_argument("--rows", type=Path, metavar="FILE", help="a CSV, JSONL or JSON file with a column of labels")
    group.add_argument(
        "--template",
        help='prompt with the columns in braces and \\n for a new line, such as "Review: {text}\\nSentiment:" '
        '(of a single column: "Text: {text} Label:")',
    )
    group.add_argument(
        "--labels", nargs="+", metavar="WORD", help="word of each label, in the order of label indices (the labels)"
    )
    group.add_argument("--label-column", metavar="COLUMN", help="column of the labels (label)")


def load_task(args: argparse.Namespace) -> icl.Task:
    """Return the task that the arguments name or describe.

    Raises:
        TaskError: the task is unknown, or the file has no column of labels or does not fit template and label words.
    """
    if args.task is not None:
        options = {"--template": args.template, "--labels": args.labels, "--label-column": args.label_column}
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise icl.TaskError(f"expected {', '.join(given)} with --rows only, got --task {args.task}: leave out")
        return icl.load_task(args.task)
    label_column = args.label_column or "label"
    rows = [row for _, row in located_rows(args.rows, "--rows")[1]]
    if not rows:
        raise icl.TaskError(f"expected rows in {args.rows}, got none: write a header and a line for each row")
    columns = list(rows[0])
    if label_column not in columns:
        raise icl.TaskError(
            f"expected a column {label_column!r} with the label of each row in {args.rows}, got the columns "
            f"{', '.join(map(repr, columns))}{near_misses(label_column, columns)}: name it with --label-column. "
            "The first line of a .csv file has the names of its columns"
        )
    # A file's own path keeps the lines in errors; rows of another label column are numbered.
    source: Rows = args.rows if label_column == "label" else [{**row, "label": row[label_column]} for row in rows]
    words = args.labels or label_words(rows, label_column, str(args.rows))
    template = args.template.replace("\\n", "\n") if args.template else default_template(columns, label_column)
    return icl.Task(args.rows.stem, template, words, source)


def label_words(rows: list[dict[str, Any]], column: str, source: str) -> list[str]:
    """Return the different labels of a column as label words, in alphabetical order.

    Raises:
        TaskError: they are numbers, of which the words are unknown, or too many.
    """
    labels = sorted({str(row.get(column, "")).strip() for row in rows})
    sample = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
    if len(labels) > MOST_LABELS:
        raise icl.TaskError(
            f"expected at most {MOST_LABELS} different labels in the column {column!r} of {source}, got {len(labels)} "
            f"({sample}): name the column of the labels with --label-column"
        )
    if any(_is_number(label) for label in labels):
        raise icl.TaskError(
            f"expected words in the column {column!r} of {source}, got {sample}: pass the word of each label with "
            "--labels, in the order of label indices"
        )
    return labels


def _is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def default_template(columns: list[str], label_column: str) -> str:
    """Return the template of a file with one column beside the labels.

    Raises:
        TaskError: it has several, or none.

    Example:
        >>> default_template(["review", "label"], "label")
        'Review: {review} Label:'
    """
    texts = [column for column in columns if column != label_column]
    if len(texts) != 1:
        names = ", ".join(map(repr, texts)) or "none"
        raise icl.TaskError(
            f"expected a single column beside {label_column!r}, got {names}: pass --template with the columns to read "
            'in braces, such as "Text: {text} Label:"'
        )
    return f"{texts[0].capitalize()}: {{{texts[0]}}} {label_column.capitalize()}:"


@contextmanager
def log_messages(quiet: bool) -> Generator[None]:
    """Print what the library logs, such as which package it fetches, to stderr within a block."""
    logger, handler = logging.getLogger("icl_dual"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    if not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
