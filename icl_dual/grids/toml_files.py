"""Grids in TOML files: everything that is wrong is reported at once, each with its line."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, make_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

from icl_dual.arguments import ArgumentError, checked
from icl_dual.grids.grid import Grid, GridError, Problem, advise, finetuning_of
from icl_dual.type_guards import is_dict

_WORDS: Mapping[str, str] = {"k": "paper", "n_queries": "all"}
"""The keys that may be `None` in Python, and the word for it in TOML, which has no null."""


@checked
def load_grid(path: str | PathLike[str]) -> Grid:
    """Read a grid from a TOML file, of which the keys are the fields of `Grid`.

    `k = "paper"` and `n_queries = "all"` stand for `None`; `[finetuning]`, `[finetuning.lora]` and `[controls.name]`
    are tables.

    Raises:
        GridError: the file cannot be read or is no TOML, keys are unknown, values have the wrong type, or combinations
            are impossible; the message lists every problem with its line.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors of Windows begin a file with a mark
        table = tomllib.loads(text)
    except OSError as error:
        raise GridError(f"expected a grid in TOML, got {path}: {error.strerror}: check the path") from error
    except (ValueError, RecursionError) as error:  # of TOML or UTF-8, or tables that are too deep
        raise GridError(f"expected a grid in TOML, got {path}, which is none: {error}") from error
    grid, problems = _grid(table)
    if grid is None or problems:
        lines = line_numbers(text)
        raise GridError(
            _message(path, sorted(problems, key=lambda problem: _line(problem.key, lines)), lines), problems
        )
    return grid


def _grid(table: Mapping[str, Any]) -> tuple[Grid | None, list[Problem]]:
    """Return the grid of a table, if there is one, and everything that is wrong with it."""
    known, hints = {field.name for field in fields(Grid)}, get_type_hints(Grid, include_extras=True)
    problems = [
        Problem((key,), f"expected a key of a grid, got {key!r}: {advise(key, known)}")
        for key in table
        if key not in known
    ]
    problems += [
        Problem((key,), f"expected {key}, got none: give at least one")
        for key in ("models", "tasks")
        if key not in table
    ]
    values: dict[str, Any] = {}
    for key in (key for key in table if key in known):
        value = None if table[key] == _WORDS.get(key, ...) else table[key]
        if key == "finetuning" and is_dict(value):
            value, of_finetuning = finetuning_of(value, (key,))
            problems += of_finetuning
        try:
            checked(make_dataclass("Grid", [(key, hints[key])]))(**{key: value})
        except ArgumentError as error:
            problems.append(Problem((key,), str(error).removeprefix("Grid: ")))
        else:
            values[key] = value
    if not {"models", "tasks"} <= values.keys():
        return None, problems
    try:
        return Grid(**values), problems
    except GridError as error:
        return None, [*problems, *error.problems]


def _message(path: Path, problems: list[Problem], lines: Mapping[tuple[str, ...], int]) -> str:
    numbered = [(_line(problem.key, lines), problem.text) for problem in problems]
    sentences = [f"line {line}: {text}" if line else text for line, text in numbered]
    if len(sentences) == 1:
        return f"{path}, {sentences[0]}"
    return "\n".join([f"expected a grid that can be run, got {len(sentences)} problems in {path}:", *sentences])


def _line(key: tuple[str, ...], lines: Mapping[tuple[str, ...], int]) -> int:
    """Return the line of a key, or of the innermost table or value that it is in; 0 for a key that is missing."""
    prefixes = (key[:length] for length in range(len(key), 0, -1))
    return next((lines[prefix] for prefix in prefixes if prefix in lines), 0)


def line_numbers(text: str) -> dict[tuple[str, ...], int]:
    """Return the line, from 1, of each key that begins a line of a TOML file, and of each table's header.

    Example:
        >>> line_numbers('k = 4\\n[controls."flipped labels"]\\ncontext = "flipped labels"')
        {('k',): 1, ('controls', 'flipped labels'): 2, ('controls', 'flipped labels', 'context'): 3}
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([^\[\]]+)\]\s*(#.*)?$", line):
            table = next(_keys(header[1]), ())
            lines.setdefault(table, number)
        elif (key := re.match(r"""\s*((?:[\w.-]|\s*\.\s*|"[^"]*"|'[^']*')+?)\s*=""", line)) is not None:
            for path in _keys(key[1]):
                for length in range(1, len(path) + 1):
                    lines.setdefault((*table, *path[:length]), number)
    return lines


def _keys(text: str) -> Iterator[tuple[str, ...]]:
    """Yield the path that a dotted key of TOML is; nothing where it is none, as within a text of several lines."""
    try:
        value: Any = tomllib.loads(f"{text} = 0")
    except ValueError:
        return
    path: tuple[str, ...] = ()
    while is_dict(value):
        ((name, value),) = value.items()
        path = (*path, name)
    yield path
