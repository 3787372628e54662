"""The errors of storage, and the sentences of errors that the operating system, safetensors or torch raise."""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError

from icl_dual.type_guards import is_path_like


class AssetError(RuntimeError):
    """Files that are missing, damaged, not what they are said to be, or that cannot be written."""


class SettingsError(ValueError):
    """A saved result was made with other settings than the ones wanted now."""


_ADVICE = {
    errno.ENOSPC: "free disk space, or choose another path",
    errno.EDQUOT: "free disk space, or choose another path",
    errno.EFBIG: "raise the limit on the size of files, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EACCES: "choose a path that you may write to",
    errno.EPERM: "choose a path that you may write to",
    errno.EROFS: "choose a path that you may write to",
}


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def writing(path: str | PathLike[str], *, only_in: Path | None = None) -> Generator[None]:
    """Turn what goes wrong while something is written into an AssetError that says where and why.

    Args:
        path: what is written, for the error.
        only_in: leave errors alone that name files outside this folder, or that name none and are no disk's; by default
            none is left alone.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if only_in is not None and not _is_of_files_in(only_in, error):
            raise
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or first_line(error)
        advice = (
            _ADVICE.get(number, "check the path, and whether its disk is full") if number else _ADVICE[errno.ENOSPC]
        )
        raise AssetError(f"expected to write {path}, got {reason!r}: {advice}") from error


def _is_of_files_in(folder: Path, error: OSError | SafetensorError) -> bool:
    """Return whether an error is about files in a folder; without a file's name, whether it is one of disks."""
    names = [getattr(error, attribute, None) for attribute in ("filename", "filename2")]
    paths = [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes) or is_path_like(name)]
    if not paths:
        return getattr(error, "errno", None) in _DISK_ERRORS
    return any(path.is_relative_to(folder) for path in paths)


@contextmanager
def reading(what: str, folder: str | PathLike[str]) -> Generator[None]:
    """Turn what goes wrong when tensors and metadata are not those of `what` into an AssetError that says so."""
    try:
        yield
    except FieldError as error:
        raise AssetError(
            f"expected {error.field or what} in {folder} as {error.expected}, got {error.got}: the files are damaged "
            f"or were changed; save the {what} again"
        ) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise AssetError(
            f"expected a saved {what} in {folder}, got another result, or one of an unknown version ({error!r}): use "
            f"the load of the class that saved it, or save the {what} again"
        ) from error
    except ValueError as error:
        raise AssetError(
            f"expected a saved {what} in {folder} with values that fit each other, got an error of its own check "
            f"({first_line(error)}): the files are damaged or were changed; save the {what} again"
        ) from error


class FieldError(Exception):
    """A saved value is not what the field's annotation says."""

    def __init__(self, field: str, expected: str, got: str) -> None:
        super().__init__(f"expected {field} as {expected}, got {got}")
        self.field, self.expected, self.got = field, expected, got


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none.

    Of torch's refusal to unpickle a file, the advice to read it unsafely is left out.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "a file that is damaged or holds other things than tensors" if "Weights only load failed" in line else line
