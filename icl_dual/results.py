"""What all results share: axes that fit each other, values in range, and equality by value.

A result is a dataclass with tensors, annotated with their named axes. `BaseResult` binds an axis name to one length in
the whole result, nested dataclasses and named tuples included, and compares two results value by value.
"""

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from jaxtyping import AbstractArray, jaxtyped  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from icl_dual.html_tables import Line, lines_table
from icl_dual.torch_utils import to_list, vector_norm
from icl_dual.type_guards import is_class, is_list_or_tuple, is_mapping

Class = TypeVar("Class", bound=type)

ROUNDING = 1e-3
"""By how much rounding may move a number out of its range: a log-probability above 0, a cosine above 1."""


def same_values(a: Any, b: Any) -> bool:
    """Return whether two values are equal: tensors by dtype, shape and element, and NaN equal to NaN.

    Dataclasses are compared by the fields that they compare (`dataclasses.field(compare=False)` leaves one out).

    >>> same_values({"x": torch.tensor([1.0, torch.nan])}, {"x": torch.tensor([1.0, torch.nan])})
    True
    >>> same_values({"x": torch.tensor([1.0])}, {"x": torch.tensor([1])})
    False
    """
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _same_tensors(a, b)
    if is_mapping(a) and is_mapping(b):
        return a.keys() == b.keys() and all(same_values(value, b[name]) for name, value in a.items())
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [field.name for field in dataclasses.fields(a) if field.compare]
        return type(a) is type(b) and all(same_values(getattr(a, name), getattr(b, name)) for name in names)
    if is_list_or_tuple(a) and is_list_or_tuple(b):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_values, a, b))
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def _same_tensors(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    b = b.to(a.device)
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def compare_by_value(cls: Class) -> Class:
    """Make the instances of a dataclass or named tuple compare with `same_values`; they cannot be hashed then.

    >>> @compare_by_value
    ... @dataclasses.dataclass(frozen=True, eq=False)
    ... class Scores:
    ...     by_layer: Tensor
    >>> Scores(torch.ones(2)) == Scores(torch.ones(2)), Scores(torch.ones(2)) == Scores(torch.zeros(2))
    (True, False)
    """
    methods = {"__eq__": _equal, "__ne__": _not_equal, "__hash__": None}
    for name, method in methods.items():
        setattr(cls, name, method)
    return cls


def _equal(self: Any, other: object) -> bool:
    if type(self) is not type(other):
        return False

    def members(value: Any) -> Any:
        return value._asdict() if hasattr(value, "_asdict") else value

    return same_values(members(self), members(other))


def _not_equal(self: Any, other: object) -> bool:
    return not _equal(self, other)


@compare_by_value
class BaseResult:
    """A dataclass with tensors that compares by value and, when it is made, checks that their axes fit each other.

    Subclasses are dataclasses with `eq=False`. A class with more to check calls `check_axes` in its `__post_init__`.
    """

    def __post_init__(self) -> None:
        check_axes(self)

    def _repr_html_(self) -> str:
        return tensors_table(self)


def tensors_table(result: object) -> str:
    """Return a result as an HTML table for notebooks: its `repr`, and a row for each of its tensors.

    A number is the norm over axes of vectors (`d_head`, `d_model`, …) and the mean over the others, along the layers
    or, without layers, the first axis. What is undefined is left out of means. Of integers, and of tensors with an axis
    of tokens, which may be padded, the axes alone are listed.

    Args:
        result: a dataclass or named tuple, with tensors that are annotated by jaxtyping.

    Example:
        >>> from jaxtyping import Float
        >>> @dataclasses.dataclass
        ... class Heads:
        ...     z: Float[Tensor, "layer head d_head"]
        >>> "<td>layer=2 head=3 d_head=4</td><td>2</td><td>2</td>" in tensors_table(Heads(torch.ones(2, 3, 4)))
        True
    """
    annotated = _annotated(type(result), result, "")
    lines = [tensor_line(path, hint.dim_str.split(), value) for path, hint, value in annotated]
    return lines_table(repr(result), lines)


def tensor_line(name: str, axes: Sequence[str], tensor: Tensor) -> Line:
    """Return a tensor as a row of a table, by the rules of `tensors_table`."""
    sizes = " ".join(f"{axis}={size}" for axis, size in zip(axes, tensor.shape, strict=True))
    has_tokens = any(axis.endswith(("pos", "token")) for axis in axes)
    if not axes or has_tokens or not tensor.is_floating_point():
        return Line(name, sizes)
    along = axes.index("layer") if "layer" in axes else 0
    vectors = [at for at, axis in enumerate(axes) if axis.startswith("d_") and axis != "d_vocab" and at != along]
    others = [at for at in range(len(axes)) if at != along and at not in vectors]
    values = tensor.detach().double()
    values = vector_norm(values, dim=vectors, keepdim=True) if vectors else values
    values = values.masked_fill(values.isinf(), torch.nan)
    values = values.nanmean(dim=others, keepdim=True) if others else values
    return Line(name, sizes, axes[along], to_list(values.flatten()))


def check_axes(result: object, /, **lengths: tuple[str, int]) -> dict[str, int]:
    """Check that the tensors of a result have the axes of their annotations, and each axis one length in all of them.

    Tensors in dictionaries, nested dataclasses and named tuples are checked with the others. A nested `BaseResult` is
    left out: it has checked itself. The axis `_` may have any length.

    Args:
        result: a dataclass or named tuple, with tensors that are annotated by jaxtyping.
        lengths: by axis, what sets its length and that length, such as `query=("prompts.queries", 5)`.

    Returns:
        The length of each axis.

    Raises:
        ValueError: a value is no tensor of its annotation, two lengths contradict, or the axis `kv_head` does not
            divide `head`; names both fields.

    Example:
        >>> from jaxtyping import Float
        >>> @dataclasses.dataclass
        ... class Heads:
        ...     z: Float[Tensor, "layer head"]
        ...     mass: Float[Tensor, "layer head"]
        >>> check_axes(Heads(torch.ones(2, 4), torch.ones(2, 4)))
        {'layer': 2, 'head': 4}
        >>> check_axes(Heads(torch.ones(2, 4), torch.ones(2, 3)))
        Traceback (most recent call last):
        ValueError: expected mass with as many on its axis head as z (4), got 3: take both from one run
    """
    bound = dict(lengths)
    for path, hint, value in _annotated(type(result), result, ""):
        if not _is_of(value, hint):
            raise ValueError(f"expected {path} as {hint.__name__}, got {_describe(value)}: correct {path}")
        for axis, length in zip(hint.dim_str.split(), value.shape, strict=True):
            source, expected = bound.setdefault(axis, (path, length)) if axis != "_" else (path, length)
            if length != expected:
                raise ValueError(
                    f"expected {path} with as many on its axis {axis} as {source} ({expected}), got {length}: take "
                    "both from one run"
                )
    (head_source, heads), (kv_source, kv_heads) = (bound.get(axis, ("", 1)) for axis in ("head", "kv_head"))
    if head_source and kv_source and (not kv_heads or heads % kv_heads):
        raise ValueError(
            f"expected {head_source} with a multiple of the key-value heads of {kv_source} ({kv_heads}), got {heads}: "
            "take both from one run"
        )
    return {axis: length for axis, (_, length) in bound.items()}


def check_values(
    result: object,
    *fields: str,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    nan: bool = False,
    infinite: bool = False,
) -> None:
    """Check that all numbers in fields of a result are finite and within a range.

    Args:
        result: the object that has the fields.
        fields: names of fields that hold numbers, tensors, or anything nested of these; `None` has none. Fields of a
            field are named with a slash, such as `residuals/split`.
        low: the least value.
        high: the largest value.
        nan: whether a number may be NaN, where it is undefined.
        infinite: whether a number may be infinite.

    Raises:
        ValueError: a number is outside of the range; names the field.
    """
    for field in fields:
        check_range(field, _member(result, field), low=low, high=high, nan=nan, infinite=infinite)


def check_range(
    name: str,
    value: Any,
    *,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    nan: bool = False,
    infinite: bool = False,
) -> None:
    """Check one value as `check_values` does, under the name of its field."""
    for path, numbers in _numbers(value, name):
        for number in _extremes(numbers, nan):
            if not (low <= number <= high and (infinite or math.isfinite(number))):
                raise ValueError(f"expected {path} {_range(low, high)}, got {number:.6g}: compute it again")


def check_names(field: str, names: Sequence[str] | Mapping[str, Any], expected: Sequence[str]) -> None:
    """Raise a ValueError unless a dictionary of a result has exactly the names expected, in any order."""
    if sorted(names) != sorted(expected):
        raise ValueError(f"expected {field} by {tuple(expected)}, got {tuple(names)}: give a value for each of these")


def check_count(field: str, count: int, source: str, expected: int) -> None:
    """Raise a ValueError unless a field has as many items as another."""
    if count != expected:
        raise ValueError(f"expected as many {field} as {source} ({expected}), got {count}: take both from one run")


def _member(result: object, field: str) -> Any:
    """Return a field, or a field of a field; `None` where it is one of `None`."""
    return reduce(lambda part, name: getattr(part, name, None), field.split("/"), result)


def _range(low: float | int, high: float | int) -> str:
    if math.isinf(high):
        return "finite" if math.isinf(low) else f"of at least {low:g}"
    return f"of at most {high:g}" if math.isinf(low) else f"from {low:g} to {high:g}"


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the annotations of a class's fields."""
    hints, is_dataclass = get_type_hints(cls), dataclasses.is_dataclass(cls)
    names = [field.name for field in dataclasses.fields(cls)] if is_dataclass else cast(Any, cls)._fields
    return {name: hints[name] for name in names}


def _annotated(hint: Any, value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is annotated as a tensor in a value, wherever it is nested: its path, annotation and value."""
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is not None and len(options) == 1:
            yield from _annotated(options[0], value, path)
    elif is_class(hint) and issubclass(hint, AbstractArray):
        yield path, hint, value
    elif get_origin(hint) is dict:
        member = get_args(hint)[1]
        for name, part in _expected(value, dict, path).items():
            yield from _annotated(member, part, f"{path}/{name}")
    elif _has_fields(hint) and not (path and issubclass(hint, BaseResult)):
        prefix = f"{path}/" if path else ""
        for name, member in _hints(hint).items():
            yield from _annotated(member, getattr(_expected(value, hint, path), name), f"{prefix}{name}")


def _has_fields(hint: Any) -> bool:
    return is_class(hint) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"))


def _expected(value: Any, cls: Any, path: str) -> Any:
    if not isinstance(value, cls):
        raise ValueError(f"expected {path} as {cls.__name__}, got {type(value).__name__}: correct {path}")
    return value


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value is a tensor of an annotation, whatever lengths other tensors have."""
    with jaxtyped("context"):
        return isinstance(value, hint)


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _numbers(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the numbers in a value as tensors, wherever they are nested, each with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif is_list_or_tuple(value) and not hasattr(value, "_fields"):
        numbers = [item for item in value if isinstance(item, int | float)]
        yield path, torch.tensor(numbers)
        for item in value if len(numbers) < len(value) else ():
            yield from _numbers(item, path)
    elif isinstance(value, int | float):
        yield path, torch.tensor(value)
    else:
        for name, member in _members(value).items():
            yield from _numbers(member, f"{path}/{name}")


def _members(value: Any) -> Mapping[str, Any]:
    """Return the named parts of a dictionary, dataclass or named tuple; nothing of other values."""
    if is_mapping(value):
        return value
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value._asdict() if hasattr(value, "_asdict") else {}


def _extremes(numbers: Tensor, without_nan: bool) -> list[float] | list[int]:
    """Return the least and the largest number; NaN where one is, unless these are left out."""
    if not numbers.numel():
        return []
    extremes = to_list(torch.stack(numbers.aminmax()))
    if without_nan and math.isnan(extremes[0]):
        return _extremes(numbers[~numbers.isnan()], without_nan)
    return extremes
