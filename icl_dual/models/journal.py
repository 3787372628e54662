"""What blocks change on a model for a while, and how it is undone: also after an interrupt at any instruction.

An exception from a signal handler (Ctrl-C, a timer) can be raised after any instruction: after a hook was registered
and before the `try` that would remove it, or in the middle of a `finally`. So every change is written down before it
is made, with the function that undoes it, and that function is forgotten only when it has run to its end. What an
interrupted block leaves is undone by the call around it (`exclusive`), or at the latest by the next call.
"""

import functools
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


class Undo:
    """The functions that undo what a block has changed so far, run in reverse order.

    Each is kept until it has run to its end, so an interrupted one runs again: running it twice must do no harm.

    Example:
        >>> undo, settings = Undo(), {"mode": "fast"}
        >>> undo.push(settings.update, dict(settings))
        >>> settings["mode"] = "exact"
        >>> undo.run()
        >>> settings
        {'mode': 'fast'}
    """

    def __init__(self, *, of_call: bool = False) -> None:
        self.functions: list[Callable[[], Any]] = []
        """The functions, in the order of the changes."""
        self.of_call = of_call
        """Whether the block lies within a call (`exclusive`), and ends with it."""
        self.thread = threading.current_thread()
        """The thread that has opened the block."""
        self.is_closed = False
        """Whether the block has ended."""

    def push(self, function: Callable[..., Any], *args: Any) -> None:
        """Add a function that undoes a change; call this before the change."""
        self.functions.append(functools.partial(function, *args))

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute until the block ends."""
        self.push(setattr, target, name, getattr(target, name))
        setattr(target, name, value)

    def run(self) -> None:
        """Undo all changes."""
        while self.functions:
            self.functions[-1]()
            self.functions.pop()


class Journal:
    """The open blocks on a model, and the lock that lets one call at a time use it.

    A block that ends while one that was opened later is still open is undone together with that one: each block sees
    what it was opened on, and whatever the order, the model is as it was when the last block has ended.
    """

    def __init__(self) -> None:
        self.blocks: list[Undo] = []
        """The blocks whose changes are not undone yet, in the order in which they were opened."""
        self.lock = threading.RLock()
        """Held by a call from its start to its end."""
        # CPython handles no signal between entering or leaving a lock's `with` block and the block itself: unlike a
        # flag, a lock tells whether a call is still running.
        self.in_call, self.in_pass = threading.Lock(), threading.Lock()
        """Locked while a call, or a forward pass, is running."""

    @contextmanager
    def block(self) -> Generator[Undo]:
        """Open a block: what is written into its `Undo` is undone when the block ends, however it ends."""
        undo = Undo()
        try:
            self.open(undo)
            yield undo
        finally:
            self.close(undo)

    def open(self, undo: Undo) -> None:
        """Add a block; the caller must close it."""
        with self.lock:
            undo.of_call = self.in_call.locked()
            if not undo.of_call:
                self._abandon(0)
                self._check_thread()
            self.blocks.append(undo)

    def close(self, undo: Undo) -> None:
        """End a block, and undo it unless a later one is still open."""
        undo.is_closed = True
        self._undo_closed()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function while no other thread uses the model; undo what interrupted calls have left before it.

        Raises:
            RuntimeError: another thread has a block open, with which this call would compute something else.
        """
        with self.lock:
            if self.in_call.locked():  # by this thread, which holds `lock`
                return self._run(function)
            self._abandon(0)
            self._check_thread()
            with self.in_call:
                return self._run(function)

    def _run(self, function: Callable[[], Any]) -> Any:
        """Run a function; undo what an interrupt in it has left, torch's gradient mode included."""
        n_blocks, grad_mode = len(self.blocks), torch.is_grad_enabled()
        try:
            return function()
        finally:
            if len(self.blocks) > n_blocks:
                self._abandon(n_blocks)
            if torch.is_grad_enabled() != grad_mode:
                torch.set_grad_enabled(grad_mode)

    def _abandon(self, first: int) -> None:
        """End the blocks of calls from an index on: the calls are no longer running."""
        for undo in self.blocks[first:]:
            undo.is_closed = undo.is_closed or undo.of_call
        self._undo_closed()

    def _check_thread(self) -> None:
        """Raise a RuntimeError where another thread has a block open."""
        for undo in self.blocks:
            if not undo.is_closed and undo.thread is not threading.current_thread():
                raise RuntimeError(
                    "expected the model without another thread's changes, got one within a block, such as "
                    f"`with delta.applied(model):`, of the thread {undo.thread.name!r}: use it in that thread or after "
                    "the block has ended, or end the block by model.restore()"
                )

    def _undo_closed(self) -> None:
        with self.lock:
            while self.blocks and self.blocks[-1].is_closed:
                self.blocks[-1].run()
                self.blocks.pop()

    def restore(self) -> None:
        """End all blocks."""
        with self.lock:
            for undo in self.blocks:
                undo.is_closed = True
            self._undo_closed()


_JOURNALS: "WeakKeyDictionary[nn.Module, Journal]" = WeakKeyDictionary()
_JOURNALS_LOCK = threading.Lock()


def journal_of(wrapped: nn.Module) -> Journal:
    """Return the journal of a model: one for all that wrap the same weights."""
    original = getattr(wrapped, "original_model", wrapped)
    with _JOURNALS_LOCK:
        return _JOURNALS.setdefault(original, Journal())


def exclusive(function: F) -> F:
    """Let a function or method, with a `Model` as its first argument, run while no other thread uses the model.

    Other threads wait. When it ends, by whatever exception, nothing that it has changed on the model is left.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs["model"]
        return model.journal.call(functools.partial(function, *args, **kwargs))

    return call  # pyright: ignore[reportReturnType]
