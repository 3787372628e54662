"""Rows of a task: from JSONL, JSON and CSV files, pandas frames, data sets or lists, each with where it stands."""

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from icl_dual.arguments import near_misses
from icl_dual.type_guards import is_array, is_dict, is_float, is_iterable, is_list_or_tuple, is_mapping

Rows = Iterable[Any] | str | PathLike[str]
"""Rows as dictionaries, a pandas frame, a `datasets.Dataset`, or the path of a JSONL, JSON or CSV file."""

NumberedRows = list[tuple[int, Any]]
"""Rows after the number of each: of the line that it begins on, or counted from 1."""

LONGEST_FIELD = 2**31 - 1
"""The longest field of a CSV file, in characters: the largest limit that `csv` takes on every platform."""


_files_read: ContextVar[dict[str, str] | None] = ContextVar("files_read", default=None)
"""The SHA-256 of each file that was read within `files_read`, by path."""


class TaskError(ValueError):
    """A task is unknown, its rows are invalid, or it has too few rows for a draw."""


@contextmanager
def files_read() -> Generator[dict[str, str]]:
    """Yield a dictionary that collects the SHA-256 of each local file that tasks are read from within the block."""
    files: dict[str, str] = {}
    token = _files_read.set(files)
    try:
        yield files
    finally:
        _files_read.reset(token)


def note_file(path: Path) -> None:
    """Record that a task is read from a file, for `files_read`."""
    if (files := _files_read.get()) is not None and (sha256 := file_sha256(path)) is not None:
        files[str(path)] = sha256


def file_sha256(path: str | PathLike[str]) -> str | None:
    """Return the SHA-256 of a file's bytes, in hexadecimal; `None` where there is no such file, or it is unreadable."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def located_rows(rows: Rows, argument: str) -> tuple[str, list[tuple[str, Any]]]:
    """Return the source of rows in words, and each row after where it stands.

    Args:
        rows: the rows.
        argument: the name of the argument that they were passed as, which errors name.

    Returns:
        The source, a file's path or the argument's name; and each row after its place, e.g. `rows.csv, line 3`.

    Raises:
        TaskError: the file cannot be read, a row of it has another number of fields than the header, or `rows` is a
            single dictionary, e.g. of columns or of splits.
    """
    if isinstance(rows, str | PathLike):
        source, (unit, numbered_rows) = str(rows), _read_file(Path(rows))
    else:
        source, unit, numbered_rows = argument, "row", list(enumerate(_iterated(rows, argument), start=1))
    return source, [(f"{source}, {unit} {number}", row) for number, row in numbered_rows]


def field_value(row: Mapping[Any, Any], name: str) -> Any:
    """Return a row's value of a template's field.

    A column of exactly this name comes first. Otherwise dots and brackets lead into nested columns: `answers.text`,
    `choices[0]`.

    Raises:
        KeyError: the row has no such column.

    Example:
        >>> field_value({"answers": {"text": ["two", "2"]}}, "answers.text[0]")
        'two'
    """
    if name in row:
        return row[name]
    if not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[[^.\[\]]+\])*", name):
        raise KeyError(name)
    value: Any = row
    for part in re.findall(r"[^.\[\]]+", name):
        if is_mapping(value) and part in value:
            value = value[part]
        elif (is_list_or_tuple(value) or is_array(value)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(name)
    return value


def class_names(rows: Any, column: str) -> tuple[str, ...]:
    """Return the names of the classes that a column of a `datasets.Dataset` has the indices of; none of other rows."""
    features = getattr(rows, "features", None)
    feature = features.get(column) if is_mapping(features) else None
    return tuple(map(str, getattr(feature, "names", None) or ()))


def is_missing(value: Any) -> bool:
    """Return whether a value stands for none: `None`, NaN, or what pandas has for missing values."""
    is_nan = is_float(value) and math.isnan(value)
    return is_nan or value is None or value is pd.NA or value is pd.NaT


def _iterated(rows: Any, argument: str) -> Iterable[Any]:
    """Return rows that are no file as an iterable of dictionaries."""
    datasets = sys.modules.get("datasets")  # where it was never imported, no data set was given
    if isinstance(rows, pd.DataFrame):
        if not rows.columns.is_unique:
            raise TaskError(
                f"expected {argument} as a frame with different column names, got {list(map(str, rows.columns))}: "
                "rename or drop columns"
            )
        return rows.to_dict("records")
    if datasets is not None and isinstance(rows, datasets.Dataset):
        return rows.with_format(None)
    if is_mapping(rows) or not is_iterable(rows):
        keys = f" with the keys {list(map(str, rows))[:5]}" if is_mapping(rows) else ""
        raise TaskError(
            f"expected {argument} as dictionaries, one for each row, got {type(rows).__name__}{keys}: pass a list of "
            "them, a pandas frame, one split of a data set, or the path of a file"
        )
    return rows


def _read_file(path: Path) -> tuple[str, NumberedRows]:
    """Return the unit that a file's rows are counted in, and the rows."""
    readers: dict[str, Callable[[Path], tuple[str, NumberedRows]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
    }
    if path.suffix not in readers:
        raise TaskError(
            f"expected a .jsonl, .json or .csv file of rows, got {str(path)!r}: convert it, or pass the rows as "
            "dictionaries"
        )
    note_file(path)
    try:
        return readers[path.suffix](path)
    except FileNotFoundError as error:
        there = [other.name for other in path.parent.glob("*")]
        raise TaskError(
            f"expected a file of rows, got {path}, which does not exist{near_misses(path.name, there)}: check the path"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"expected a readable UTF-8 file of rows at {path}, got {error}: check the path and the file's encoding"
        ) from error


def _read_jsonl(path: Path) -> tuple[str, NumberedRows]:
    rows: NumberedRows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_row)
            except (ValueError, RecursionError) as error:
                raise TaskError(
                    f"{path}, line {number}: expected one JSON object, got {_json_reason(error)}: write each row on a "
                    "line of its own"
                ) from error
            if not is_dict(row):
                raise TaskError(
                    f"{path}, line {number}: expected a JSON object, got {type(row).__name__}: write each row as "
                    '{"text": …, "label": …}'
                )
            rows.append((number, row))
    return "line", rows


def _read_json(path: Path) -> tuple[str, NumberedRows]:
    """Return the rows of a JSON list, or of JSON lines under this suffix."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)
    try:
        rows: list[Any] = json.loads(text, object_pairs_hook=_row)
        return "row", list(enumerate(rows, start=1))
    except (ValueError, RecursionError) as error:
        raise TaskError(
            f"{path}: expected a JSON list of objects, got {_json_reason(error)}: correct the file"
        ) from error


def _row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the names and values of a JSON object, of which none is lost to another of the same name."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"an object with {', '.join(map(repr, repeated))} more than once")
    return row


def _json_reason(error: Exception) -> str:
    """Return what is wrong with JSON, in words."""
    return "too many nested brackets" if isinstance(error, RecursionError) else str(error)


def _read_csv(path: Path) -> tuple[str, NumberedRows]:
    rows: NumberedRows = []
    number = 1
    with path.open(encoding="utf-8-sig", newline="") as lines, _long_fields():
        reader = csv.reader(lines, strict=True)
        try:
            header = next((values for values in reader if values), list[str]())
            _check_header(f"{path}, line {reader.line_num}", header)
            number = reader.line_num + 1  # a quoted text may have several lines
            for values in reader:
                if values and len(values) != len(header):
                    raise TaskError(
                        f"{path}, line {number}: expected {len(header)} columns ({', '.join(header)}), got "
                        f"{len(values)}: quote texts that contain commas or line breaks"
                    )
                if values:
                    rows.append((number, dict(zip(header, values, strict=True))))
                number = reader.line_num + 1
        except csv.Error as error:
            raise TaskError(
                f'{path}, line {number}: expected quotes around whole texts, with "" for a quote inside, got a row '
                f"that is not CSV ({error}): correct its quotes"
            ) from error
    return "line", rows


def _check_header(where: str, header: Sequence[str]) -> None:
    others = [mark for mark in ";\t|" if header and mark in header[0]]
    if len(header) == 1 and others:
        raise TaskError(
            f"{where}: expected columns separated by commas, got {header[0]!r}: separate them by commas, or pass the "
            f"frame that pandas.read_csv(path, sep={others[0]!r}) returns"
        )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise TaskError(
            f"{where}: expected different column names, got {', '.join(map(repr, repeated))} more than once: rename one"
        )


@contextmanager
def _long_fields() -> Generator[None]:
    """Lift the limit of `csv` on the length of a field, and restore it: it is one for the whole process."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
