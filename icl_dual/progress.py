"""Progress bars: one wrapper around tqdm for every module, and one switch that silences them all.

A terminal shows a bar, a notebook a widget, and a pipe or a file a line from time to time.
"""

import os
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar, overload

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from icl_dual.arguments import checked

Item = TypeVar("Item")

SILENCING_VARIABLE = "TQDM_DISABLE"
"""The environment variable that silences every bar, tqdm's own: any value but `0`, `false` or nothing."""

SECONDS_BETWEEN_LINES = 10
"""The least time between two lines of a bar that is written into a pipe or a file."""

_IS_WIDGET = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
"""Whether bars are widgets, as in notebooks. Importing `tqdm.notebook` to compare the class would import ipywidgets."""

_enabled = True


@checked
def set_progress(enabled: bool) -> None:
    """Show or silence every progress bar of the library, also those of the libraries that it loads models with.

    The environment variable `TQDM_DISABLE=1` silences them too, whatever is set here. A bar that a function was told
    not to show (`progress=False`) never shows.

    >>> set_progress(False)
    >>> list(progress_bar(range(3), desc="counting"))  # writes nothing to stderr
    [0, 1, 2]
    >>> set_progress(True)
    """
    global _enabled
    _enabled = enabled


def progress_enabled() -> bool:
    """Return whether progress bars may show."""
    is_silenced = os.environ.get(SILENCING_VARIABLE, "").lower() not in ("", "0", "false")
    return _enabled and not is_silenced


@overload
def progress_bar(
    iterable: Iterable[Item], *, show: bool = True, leave: bool = False, **options: Any
) -> "tqdm[Item]": ...


@overload
def progress_bar(*, show: bool = True, leave: bool = False, **options: Any) -> "tqdm[Any]": ...


def progress_bar(
    iterable: Iterable[Any] | None = None, *, show: bool = True, leave: bool = False, **options: Any
) -> "tqdm[Any]":
    """Return a tqdm bar that obeys `set_progress` and `TQDM_DISABLE`.

    Where stderr is neither a terminal nor a notebook's, the bar is written as lines, without control characters.

    Args:
        iterable: what to iterate over; `None` for a bar that is updated by hand.
        show: whether the caller wants a bar.
        leave: keep the finished bar on the screen.
        options: tqdm's own, such as `total`, `desc` and `unit`.
    """
    if not _IS_WIDGET and not (sys.stderr is None or sys.stderr.isatty()):
        options = {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES} | options
    return tqdm(iterable, disable=not (show and progress_enabled()), leave=leave, **options)


class _Lines:
    """A stream for tqdm that writes each state of a bar as a line of its own, and nothing that moves a cursor."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line:
            self.stream.write(f"{line}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def transformers_bars(*, show: bool = True) -> Generator[None]:
    """Silence the bars of transformers and huggingface_hub within a block or function, unless they may show.

    Args:
        show: whether the caller wants them, where `set_progress` and `TQDM_DISABLE` allow any.
    """
    with _silenced(
        not (show and progress_enabled()) and transformers_logging.is_progress_bar_enabled(),
        transformers_logging.disable_progress_bar,
        transformers_logging.enable_progress_bar,
    ):
        yield


@contextmanager
def datasets_bars(datasets: Any) -> Generator[None]:
    """Silence the bars of the `datasets` library, passed as its module, within a block, unless bars may show."""
    with _silenced(
        not progress_enabled() and not datasets.are_progress_bars_disabled(),
        datasets.disable_progress_bars,
        datasets.enable_progress_bars,
    ):
        yield


@contextmanager
def _silenced(silence: bool, disable: Callable[[], None], enable: Callable[[], None]) -> Generator[None]:
    """Call `disable` before a block and `enable` after it where bars are to be silenced."""
    if silence:
        disable()
    try:
        yield
    finally:
        if silence:
            enable()
