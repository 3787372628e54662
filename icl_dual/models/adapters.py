"""Adapters of peft: models that have them, and the change of weights that a saved adapter makes.

`peft` is imported only where an adapter is read or trained (`pip install 'icl-dual[peft]'`).
"""

from types import ModuleType


def import_peft(purpose: str) -> ModuleType:
    """Return the package peft.

    Args:
        purpose: what needs it, for the error.

    Raises:
        ImportError: it is not installed; names the extra that installs it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"expected the package peft, which {purpose} needs, got none: pip install 'icl-dual[peft]'"
        ) from error
    return peft
