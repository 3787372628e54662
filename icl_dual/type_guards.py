"""Checks of a value's type after which its items are `Any`.

After `isinstance(value, dict)`, a strict type checker takes keys and items for unknown, and reports every use of them.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, TypeGuard

import numpy as np


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Return whether a value is a mapping."""
    return isinstance(value, Mapping)


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    """Return whether a value is a dictionary."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Return whether a value is a list."""
    return isinstance(value, list)


def is_list_or_tuple(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Return whether a value is a list or a tuple."""
    return isinstance(value, list | tuple)


def is_array(value: object) -> TypeGuard[np.ndarray[Any, Any]]:
    """Return whether a value is an array of numpy."""
    return isinstance(value, np.ndarray)


def is_path_like(value: object) -> TypeGuard[PathLike[str]]:
    """Return whether a value is a path that is no text."""
    return isinstance(value, PathLike)


def is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    """Return whether a value is a tuple."""
    return isinstance(value, tuple)


def is_iterable(value: object) -> TypeGuard[Iterable[Any]]:
    """Return whether a value can be iterated over."""
    return isinstance(value, Iterable)


def is_class(value: object) -> TypeGuard[type[Any]]:
    """Return whether a value is a class."""
    return isinstance(value, type)


def is_integer(value: object) -> TypeGuard[int | np.integer[Any]]:
    """Return whether a value is an integer, or a truth value, of Python or an integer of numpy."""
    return isinstance(value, int | np.integer)


def is_float(value: object) -> TypeGuard[float | np.floating[Any]]:
    """Return whether a value is a floating-point number of Python or numpy."""
    return isinstance(value, float | np.floating)


def is_number(value: object) -> TypeGuard[int | float | np.number[Any]]:
    """Return whether a value is a number of Python or numpy, or a truth value."""
    return isinstance(value, int | float | np.number)
