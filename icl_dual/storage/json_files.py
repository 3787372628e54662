"""JSON in files: UTF-8 whatever the locale, and one error for everything that is no JSON."""

import json
from os import fspath
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from icl_dual.storage.errors import AssetError, first_line
from icl_dual.type_guards import is_dict, is_list_or_tuple, is_mapping, is_path_like


def to_json(value: Any, name: str = "value") -> str:
    """Return a value as JSON text. Scalars of numpy and torch become numbers, paths become text.

    Args:
        value: dictionaries, lists, tuples, text, numbers, truth values, `None`.
        name: the value's name, for the error.

    Raises:
        ValueError: a part of the value cannot be saved as JSON; names it.

    Example:
        >>> to_json({"k": np.int64(3), "file": Path("rows.csv")})
        '{\\n "k": 3,\\n "file": "rows.csv"\\n}'
        >>> to_json({"task": {"labels": {1, 2}}}, "settings")
        Traceback (most recent call last):
        ValueError: expected settings/task/labels as text, numbers, lists or dictionaries, got a set: convert it
    """
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, default=_plain)
        return text if text.isascii() or _is_encodable(text) else json.dumps(value, indent=1, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        path, part = _unsaveable(value, name, depth=0)
        raise ValueError(
            f"expected {path} as text, numbers, lists or dictionaries, got a {type(part).__name__}: convert it"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file in UTF-8.

    Raises:
        AssetError: the file is missing, is no JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"expected JSON in {path}, got {_reason(error)}: restore or delete the file") from error
    if not is_dict(value):
        raise AssetError(f"expected a JSON object in {path}, got {json_kind(value)}: restore or delete the file")
    return value


def json_kind(value: Any) -> str:
    """Return what a JSON value is, for errors."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a table"}
    return kinds.get(cast(type[Any], type(value)), f"a {type(value).__name__}")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    return "too many nested brackets" if isinstance(error, RecursionError) else first_line(error)


def _plain(value: Any) -> Any:
    """Return a scalar of numpy or torch as a number, a path as text."""
    name = type(value).__name__
    if is_path_like(value):
        return fspath(value)
    if isinstance(value, np.generic | Tensor | np.ndarray) and value.ndim == 0:
        return cast(Any, value).item()
    raise TypeError(name)


def _is_encodable(text: str) -> bool:
    """Return whether text has no half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unsaveable(value: Any, path: str, depth: int) -> tuple[str, Any]:
    """Return the path and value of the first innermost part that JSON cannot hold."""
    parts = value.items() if is_mapping(value) else enumerate(value) if is_list_or_tuple(value) else ()
    for name, part in parts if depth < 100 else ():
        try:
            json.dumps({name: part}, default=_plain)
        except (TypeError, ValueError, RecursionError):
            return _unsaveable(part, f"{path}/{name}", depth + 1)
    return path, value
