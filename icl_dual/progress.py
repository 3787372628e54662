"""Progress bars: one wrapper around tqdm for every module, and one switch that silences them all."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from icl_dual.arguments import checked

SILENCING_VARIABLE = "TQDM_DISABLE"
"""The environment variable that silences every bar, tqdm's own: any value but `0`, `false` or nothing."""

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


def progress_bar(iterable: Iterable | None = None, *, show: bool = True, leave: bool = False, **options: Any) -> tqdm:
    """Return a tqdm bar that obeys `set_progress` and `TQDM_DISABLE`.

    Args:
        iterable: what to iterate over; `None` for a bar that is updated by hand.
        show: whether the caller wants a bar.
        leave: keep the finished bar on the screen.
        options: tqdm's own, such as `total`, `desc` and `unit`.
    """
    return tqdm(iterable, disable=not (show and progress_enabled()), leave=leave, **options)


@contextmanager
def transformers_bars(*, show: bool = True) -> Iterator[None]:
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
def datasets_bars(datasets: Any) -> Iterator[None]:
    """Silence the bars of the `datasets` library, passed as its module, within a block, unless bars may show."""
    with _silenced(
        not progress_enabled() and not datasets.are_progress_bars_disabled(),
        datasets.disable_progress_bars,
        datasets.enable_progress_bars,
    ):
        yield


@contextmanager
def _silenced(silence: bool, disable: Callable[[], None], enable: Callable[[], None]) -> Iterator[None]:
    """Call `disable` before a block and `enable` after it, if asked to silence."""
    if silence:
        disable()
    try:
        yield
    finally:
        if silence:
            enable()
