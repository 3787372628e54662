"""`checked`: public functions, methods and classes check their arguments where they enter, by their annotations.

Annotations are read strictly where Python is lax: a bool is no number, a string is no sequence of strings, a set or an
array is no sequence, and `None` is accepted only where it is annotated. Scalars of numpy and torch are accepted as
numbers and become Python's own, which can be saved. Tensors are checked by their jaxtyping shapes, in which axes of the
same name have the same length in all arguments of a call.

What a value may be beyond its type is annotated by the constraints of `annotated_types`. The names below (`Count`,
`Seed`, `Rate`, …) are the ones that the library uses. What depends on other arguments, the functions check themselves.

Unknown and missing arguments stay Python's own TypeErrors. Values that a function returns are not checked.
"""

import difflib
import functools
import inspect
import itertools
import math
import reprlib
import sys
import threading
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, is_dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import numpy as np
from jaxtyping import AbstractArray, jaxtyped  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from icl_dual.type_guards import is_array, is_dict, is_mapping, is_path_like

Checked = TypeVar("Checked", bound=Callable[..., Any])


class ArgumentError(TypeError, ValueError):
    """An argument has the wrong type, is out of range, or has axes that do not fit those of another argument."""


@dataclass(frozen=True)
class PathAllowed:
    """Marks text that may be given as a path, which then becomes text."""


Count = Annotated[int, annotated_types.Ge(1)]
"""A number of things, at least 1."""
Index = Annotated[int, annotated_types.Ge(0)]
"""An index, or a number of things that may be 0."""
Seed = Annotated[int, annotated_types.Ge(0), annotated_types.Lt(2**63)]
"""The seed of a random generator, which numpy and torch both take."""
Rate = Annotated[float, annotated_types.Gt(0), annotated_types.Lt(math.inf)]
"""A finite number above 0, such as a learning rate."""
Finite = Annotated[float, annotated_types.Gt(-math.inf), annotated_types.Lt(math.inf)]
"""A finite number."""
NameOrPath = Annotated[str, PathAllowed()]
"""A name or a path, as text; a `Path` becomes its text."""

CHECKED_CLASSES: set[str] = set()
"""The dataclasses and named tuples that are checked, by module and name."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """Return the known names that are spelled like a name, as words to follow it in an error; empty without any.

    Example:
        >>> near_misses("sst3", ("sst2", "sst5", "mr")), near_misses("nosuch", ("sst2", "mr"))
        (" (did you mean 'sst5' or 'sst2'?)", '')
    """
    matches = difflib.get_close_matches(name, list(dict.fromkeys(known)))
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def of_type(value: object, kind: type) -> bool:
    """Return `isinstance(value, kind)`, for a value whose annotation nothing enforces.

    Such values are returned by users' functions, or are fields of users' objects. A type checker trusts the annotation
    and reports a plain `isinstance` as unnecessary.

    Example:
        >>> of_type(2, int), of_type("2", int)
        (True, False)
    """
    return isinstance(value, kind)


def checked(target: Checked) -> Checked:
    """Check the arguments of a function, a method, or a dataclass's or named tuple's constructor at every call.

    It stands above `dataclass` and `contextmanager`, and below `classmethod`. Annotations are read at the first call.

    Raises:
        ArgumentError: at a call, an argument is not what its annotation says; the message names both.

    Example:
        >>> @checked
        ... def double(number: float) -> float:
        ...     return 2 * number
        >>> double(np.float32(1.5))
        3.0
        >>> double("1.5")
        Traceback (most recent call last):
        ...
        icl_dual.arguments.ArgumentError: double: expected number as a number, got '1.5' (str): leave out the quotes
    """
    if not isinstance(target, type):
        return _checked(target, target)
    CHECKED_CLASSES.add(f"{target.__module__}.{target.__qualname__}")
    cls = typing.cast(Any, target)
    constructor = "__init__" if is_dataclass(cls) else "__new__"
    setattr(cls, constructor, _checked(getattr(cls, constructor), cls))
    return typing.cast(Checked, target)


def _checked(call: Any, annotated: Any) -> Any:
    """Return a call of which the arguments are checked by the annotations of a function or class."""

    @functools.cache
    def parameters() -> _Parameters:
        return _parameters(call, annotated)

    @functools.wraps(call)
    def check_and_call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if not _trust.is_on:
            args, kwargs = parameters().check(args, kwargs)
        return call(*args, **kwargs)

    return check_and_call


class _Trust(threading.local):
    """Whether the thread is in a function that is `trusted`."""

    is_on = False


_trust = _Trust()


def trusted(function: Checked) -> Checked:
    """Leave out the checks of arguments in what a function of the library calls: it runs at every layer or row, on what
    the library has made.

    Example:
        >>> @checked
        ... def double(number: float) -> float:
        ...     return 2 * number
        >>> trusted(lambda text: double(text))("1.5")
        '1.51.5'
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before, _trust.is_on = _trust.is_on, True
        try:
            return function(*args, **kwargs)
        finally:
            _trust.is_on = before

    return typing.cast(Checked, call)


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a function and what they are annotated with."""

    function: str
    """The function's name in errors."""
    positional: tuple[str, ...]
    """The names of the parameters that may be given by position."""
    repeated: str | None
    """The name of the parameter that takes all further positions, if there is one."""
    hints: Mapping[str, Any] = field(repr=False)
    """The annotation of each annotated parameter."""
    have_axes: bool
    """Whether a parameter is annotated with a shape."""

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call as the function takes them.

        Raises:
            ArgumentError: an argument is not what its annotation says.
        """
        # Axes of the same name have the same length within this block.
        with jaxtyped("context") if self.have_axes else nullcontext():
            by_position = zip(args, itertools.chain(self.positional, itertools.repeat(self.repeated)), strict=False)
            checked_args = tuple([self._fit(name, value, args, kwargs) for value, name in by_position])
            return checked_args, {name: self._fit(name, value, args, kwargs) for name, value in kwargs.items()}

    def _fit(self, name: str | None, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name is None or name not in self.hints:
            return value
        try:
            return _fit(value, self.hints[name])
        except _UnfitError as error:
            arguments = {**dict(zip(self.positional, args, strict=False)), **kwargs}
            advice = _advice(error) or f"see help({self.function})"
            raise ArgumentError(f"{self.function}: {_sentence(name, error, arguments)}: {advice}") from None


def _parameters(call: Any, annotated: Any) -> _Parameters:
    signature = inspect.signature(call).parameters.values()
    hints = typing.get_type_hints(annotated, include_extras=True)
    names = {parameter.name for parameter in signature}
    return _Parameters(
        function=_public_name(annotated),
        positional=tuple(p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)),
        repeated=next((p.name for p in signature if p.kind is p.VAR_POSITIONAL), None),
        hints={name: hint for name, hint in hints.items() if name in names and hint is not Any},
        have_axes=any(_has_axes(hint) for hint in hints.values()),
    )


def _public_name(annotated: Any) -> str:
    """Return the name by which a user calls a function or class."""
    name = annotated.__qualname__.removesuffix(".__init__")
    is_exported = hasattr(sys.modules.get("icl_dual"), name.split(".")[0])
    return f"icl_dual.{name}" if is_exported else name


def _has_axes(hint: Any) -> bool:
    return _is_array(hint) or any(map(_has_axes, get_args(hint)))


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


class _UnfitError(Exception):
    """A value is not what a hint says."""

    def __init__(self, value: Any, hint: Any, place: str = "") -> None:
        self.value, self.hint, self.place = value, hint, place
        """What was given, what was expected, and where in the argument: `[2]` for the third item."""


def _fit(value: Any, hint: Any) -> Any:
    """Return a value as a hint says that it is: scalars of numpy and torch become Python's own.

    Raises:
        _UnfitError: the value is something else.
    """
    if type(value) is hint or hint is Any or isinstance(hint, TypeVar):
        return value
    origin = get_origin(hint)
    if origin is Annotated:
        return _fit_constraints(value, hint)
    if origin in (Union, types.UnionType):
        return _fit_union(value, hint)
    if origin is Literal:
        return _fit_literal(value, hint)
    if hint in (int, float, bool, str):
        return _fit_scalar(value, hint)
    if hint in (None, types.NoneType):
        is_fit = value is None
    elif hint is Path and (isinstance(value, str) or is_path_like(value)):
        return Path(value)
    elif _is_array(hint) or origin is None:
        is_fit = isinstance(value, hint)
    elif origin is PathLike:
        is_fit = isinstance(value, PathLike)
    elif origin in (Callable, type):
        is_fit = isinstance(value, origin)
    else:
        return _fit_container(value, hint, origin)
    if not is_fit:
        raise _UnfitError(value, hint)
    return value


def _fit_constraints(value: Any, hint: Any) -> Any:
    inner, *constraints = get_args(hint)
    if PathAllowed() in constraints and is_path_like(value):
        value = fspath(value)
    try:
        value = _fit(value, inner)
    except _UnfitError as error:
        raise error if error.place else _UnfitError(value, hint) from None
    if not all(_satisfies(value, constraint) for constraint in constraints):
        raise _UnfitError(value, hint)
    return value


def _satisfies(value: Any, constraint: Any) -> bool:
    match constraint:
        case annotated_types.Gt(bound):
            return value > bound
        case annotated_types.Ge(bound):
            return value >= bound
        case annotated_types.Lt(bound):
            return value < bound
        case annotated_types.Le(bound):
            return value <= bound
        case annotated_types.MinLen(length):
            return len(value) >= length
        case _:
            return True


def _fit_union(value: Any, hint: Any) -> Any:
    """Return a value as one of several hints says; an integer stays one where it may."""
    options = sorted(get_args(hint), key=lambda option: option is float)
    errors: list[_UnfitError] = []
    for option in options:
        try:
            return _fit(value, option)
        except _UnfitError as error:
            # Tracebacks would hold the callers' frames, and so their tensors, until garbage is collected.
            error.__context__ = error.__traceback__ = None
            errors.append(error)
    nested = next((error for error in errors if error.place), None)
    raise nested or _UnfitError(value, hint)


def _fit_literal(value: Any, hint: Any) -> Any:
    for option in get_args(hint):
        if isinstance(value, type(option)) and value == option:
            return option
    raise _UnfitError(value, hint)


def _fit_scalar(value: Any, hint: Any) -> Any:
    number = value
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        number = typing.cast(Any, value).item()
    is_fit = isinstance(number, (float, int) if hint is float else hint)
    if not is_fit or (isinstance(number, bool) and hint is not bool):
        raise _UnfitError(value, hint)
    try:
        return float(number) if hint is float else number
    except OverflowError:
        raise _UnfitError(value, hint) from None


def _fit_container(value: Any, hint: Any, origin: Any) -> Any:
    is_text = isinstance(value, str | bytes)
    is_table = is_mapping(value) and not issubclass(origin, Mapping)
    if is_text or (is_table and origin is not Iterable) or not isinstance(value, origin):
        raise _UnfitError(value, hint)
    options = get_args(hint)
    if not options or is_table:  # annotated without its items, or a table where any iterable will do
        return value
    if is_mapping(value):
        return _rebuilt(
            value, {_fit(name, options[0]): _fit_at(name, item, options[1]) for name, item in value.items()}
        )
    if not issubclass(origin, Collection):  # an iterator is not read
        return value
    if origin is tuple and options[-1] is not Ellipsis:
        if len(options) != len(value):
            raise _UnfitError(value, hint)
        item_hints: Iterable[Any] = options
    else:
        item_hints = itertools.repeat(options[0])
    if options[0] is Any:
        return value
    items = [
        item if type(item) is item_hint else _fit_at(place, item, item_hint)
        for place, (item, item_hint) in enumerate(zip(value, item_hints, strict=False))
    ]
    return _rebuilt(value, items)


def _fit_at(place: Any, value: Any, hint: Any) -> Any:
    """Return an item of a container as a hint says, or raise an error with its place."""
    try:
        return _fit(value, hint)
    except _UnfitError as error:
        raise _UnfitError(error.value, error.hint, f"[{place!r}]{error.place}") from None


def _rebuilt(container: Any, items: Any) -> Any:
    """Return a container itself, or one with new items where an item became another."""
    olds, news = (container.values(), items.values()) if is_dict(items) else (container, items)
    if all(old is new for old, new in zip(olds, news, strict=True)):
        return container
    return tuple(items) if isinstance(container, tuple) else items


# The sentence of an error


def _sentence(name: str | None, error: _UnfitError, arguments: Mapping[str, Any]) -> str:
    """Return what was expected as an argument, and what was given."""
    expected = f"expected {name}{error.place} as {_words(error.hint)}"
    if _clashes(error):
        others = {other: value for other, value in arguments.items() if other != name and hasattr(value, "shape")}
        shapes = " and ".join(f"{other} {list(value.shape)}" for other, value in others.items())
        return f"{expected}, got {list(error.value.shape)} with {shapes or 'axes of another length'}"
    return f"{expected}, got {_given(error.value)}"


def _clashes(error: _UnfitError) -> bool:
    """Return whether a tensor would fit, had other arguments not set the length of an axis."""
    with jaxtyped("context"):
        return _is_array(error.hint) and isinstance(error.value, error.hint)


def _words(hint: Any) -> str:
    """Return what a hint says, in words."""
    origin, options = get_origin(hint), get_args(hint)
    if _is_array(hint):
        kind = "array" if hint.array_type is np.ndarray else "tensor"
        axes = " ".join(axis.removeprefix("_") for axis in hint.dim_str.split())  # `_` marks axes of any length
        return f"a {kind} of {hint.__name__.partition('[')[0].lower()}s of shape [{axes}]"
    if origin is Annotated:
        return " ".join((_words(options[0]), *filter(None, map(_constraint_words, options[1:]))))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, options)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, options))
    if origin is tuple and options[-1] is not Ellipsis:
        return f"a tuple of {len(options)}"
    simple = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "text",
        types.NoneType: "None",
        Path: "a path",
        PathLike: "a path",
        Callable: "a function",
        type: "a class",
        tuple: "a tuple",
        list: "a list",
        dict: "a dictionary",
        Mapping: "a dictionary",
        Sequence: "a list or tuple",
        Collection: "a list, tuple or set",
        Iterable: "an iterable",
    }
    return simple.get(origin or hint) or f"an instance of {_public_name(hint)}"


def _constraint_words(constraint: Any) -> str:
    match constraint:
        case annotated_types.Gt(bound):
            return "" if bound == -math.inf else f"above {bound}"
        case annotated_types.Ge(bound):
            return f"of at least {bound}"
        case annotated_types.Lt(bound):
            return "and finite" if bound == math.inf else f"and below {bound}"
        case annotated_types.Le(bound):
            return f"and at most {bound}"
        case annotated_types.MinLen(length):
            return f"with at least {length}"
        case PathAllowed():
            return "or a path"
        case _:
            return ""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def _given(value: Any) -> str:
    """Return a value and its type in a few words."""
    name = type(value).__name__
    if isinstance(value, Tensor) or is_array(value):
        return f"{name} of {value.dtype} and shape {list(value.shape)}"
    return "None" if value is None else f"{_short.repr(value)} ({name})"


def _advice(error: _UnfitError) -> str | None:
    """Return what to do about a value that is not what was expected; `None` where only the documentation helps."""
    if _clashes(error):
        return "pass axes of the same name in the same length"
    hints = _options(error.hint)
    item_hints = [get_args(hint)[0] for hint in hints if get_origin(hint) in (Sequence, Collection, tuple, list)]
    if not item_hints:
        is_of_library = type(error.value).__module__.startswith("icl_dual.")
        if str in hints and is_of_library and isinstance(getattr(error.value, "name", None), str):  # a model or a task
            return f"pass its name, {error.value.name!r}"
        is_quoted = isinstance(error.value, str) and error.value.replace(".", "", 1).isdecimal()
        return "leave out the quotes" if is_quoted and (int in hints or float in hints) else None
    if isinstance(error.value, set | frozenset):
        return "pass a sorted list, a set has no order"
    if isinstance(error.value, np.ndarray | Tensor):
        return "pass its .tolist()"
    if any(_is_fit(error.value, hint) for hint in item_hints):
        return "pass a list of it"
    kind = "tuple" if all(get_origin(hint) is tuple for hint in hints if get_args(hint)) else "list"
    value = error.value
    is_sequence = type(value).__name__ == kind or isinstance(value, tuple)
    is_items = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    return f"pass {kind}(…)" if is_items and not is_sequence else None


def _options(hint: Any) -> list[Any]:
    """Return the hints of which a value must fit one, without their constraints."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [option for each in get_args(hint) for option in _options(each)]
    return [hint]


def _is_fit(value: Any, hint: Any) -> bool:
    try:
        _fit(value, hint)
    except _UnfitError:
        return False
    return True
