"""The type checker of the tests: beartype, for everything that does not check its arguments itself."""

import sys
from collections.abc import Callable
from typing import Any

from beartype import beartype


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply beartype, but not around the constructor of a class that is `checked`: its own check comes first.

    Around a function, the import hook puts beartype below `checked` anyway.
    """
    arguments = sys.modules.get("icl_dual.arguments")
    name = f"{function.__module__}.{function.__qualname__}".removesuffix(".__init__")
    is_checked = name in getattr(arguments, "CHECKED_CLASSES", ())
    return function if is_checked else beartype(function)
