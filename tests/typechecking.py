"""The type checker of the tests: beartype, for everything that does not check its arguments itself."""

import sys
from collections.abc import Callable
from typing import Any

from beartype import beartype

_checkers: dict[Any, Callable[..., Any]] = {}
"""The checker of each signature of functions within functions, which are new at each call."""


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply beartype, but not around the constructor of a class that is `checked`: its own check comes first.

    Around a function, the import hook puts beartype below `checked` anyway. The hook hands in an empty function with
    the signature to check, so one checker serves all functions of a signature. Beartype takes 2 ms to make a checker,
    which was up to 40 % of a test, where functions within functions had one made at each call.
    """
    arguments = sys.modules.get("icl_dual.arguments")
    name = f"{function.__module__}.{function.__qualname__}".removesuffix(".__init__")
    if name in getattr(arguments, "CHECKED_CLASSES", ()):
        return function
    if "<locals>" not in name or function.__defaults__ or function.__kwdefaults__:
        return beartype(function)
    signature = name, function.__code__, tuple(function.__annotations__.items())
    try:
        checker = _checkers.get(signature)
    except TypeError:  # an annotation without a hash
        return beartype(function)
    if checker is None:
        checker = _checkers[signature] = beartype(function)
    return checker
