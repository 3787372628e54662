"""Claims: small files by which several workers divide cells, with nothing in common but the storage.

The claims of a cell are numbered. Each is created only where it does not exist yet, which every storage that grids use
does for one writer alone; the highest number holds. Its owner rewrites it while it works. A worker that sees the same
bytes in it for `ttl` seconds of its own clock, or the owner's where they are more, takes the cell over with the next
number: no clocks are compared. Where the owner was a process of this machine that is gone, or says that it lost its
device, it does so at once.

A worker that was taken over and comes back does no harm: results are complete and equal, and the first one stays.
"""

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from icl_dual.grids.files import Files
from icl_dual.type_guards import is_dict

TTL_S = 60.0
"""The seconds after which a claim that is not renewed can be taken over."""

FOLDER = "claims"


@cache
def machine() -> str | None:
    """Return what tells the processes that can see each other here from others; `None` where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - no file
    except OSError:
        return None


@dataclass(frozen=True)
class ClaimInfo:
    """A claim as others see it."""

    number: int
    """How many claims there were before: each was of a worker that was lost."""
    content: bytes
    """The bytes of its file, which change while its owner works."""

    @property
    def owner(self) -> dict[str, Any]:
        """Return what the owner wrote about itself; nothing where the file was not complete."""
        with suppress(ValueError):
            owner = json.loads(self.content)
            return owner if is_dict(owner) else {}
        return {}

    def ttl(self, default: float) -> float:
        """Return the seconds without a change after which the owner is lost, by the owner's word where it is there."""
        ttl = self.owner.get("ttl")
        return max(ttl, default) if isinstance(ttl, int | float) else default

    @property
    def device_error(self) -> str | None:
        """Return the error by which the owner lost its device, if it did."""
        return self.owner.get("device_error")

    @property
    def is_of_lost_process(self) -> bool:
        """Return whether the owner was a process of this machine that no longer runs."""
        owner = self.owner
        if machine() is None or owner.get("machine") != machine():
            return False
        try:
            os.kill(int(owner["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, KeyError, ValueError):
            return False
        return _is_zombie(int(owner["pid"]))


def _is_zombie(pid: int) -> bool:
    """Return whether a process has ended, and only its parent has not noticed yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


class Claims:
    """The claims of the cells of some results, by one worker."""

    def __init__(self, files: Files, ttl: float = TTL_S) -> None:
        self.files, self.ttl = files, ttl
        self._first_read: dict[str, tuple[ClaimInfo, float]] = {}

    def take(self, cell_id: str) -> "Claim | None":
        """Return a claim of a cell, or `None` while another worker has one."""
        current = self.current(cell_id)
        if current is not None and not self._is_lost(cell_id, current):
            return None
        if current is None:
            claim = Claim(self.files, cell_id, 0, self.ttl)
        else:
            claim = Claim(self.files, cell_id, current.number + 1, self.ttl, current.device_error)
        return claim if claim.create() else None

    def current(self, cell_id: str) -> ClaimInfo | None:
        """Return the claim of a cell that holds now, if there is one."""
        latest = None
        for number in range(10_000):
            try:
                latest = ClaimInfo(number, self.files.read(_path(cell_id, number)))
            except FileNotFoundError:
                break
        return latest

    def _is_lost(self, cell_id: str, info: ClaimInfo) -> bool:
        if info.device_error is not None or info.is_of_lost_process:
            return True
        now = time.monotonic()
        first, since = self._first_read.get(cell_id, (None, now))
        if first != info:
            first, since = info, now
        self._first_read[cell_id] = (info, since)
        return now - since > info.ttl(self.ttl)


def claimed(files: Files) -> dict[str, ClaimInfo]:
    """Return the claims that exist, by cell."""
    numbers: dict[str, int] = {}
    for name in files.names(FOLDER):
        cell_id, _, number = name.removesuffix(".json").rpartition(".")
        if number.isdecimal():
            numbers[cell_id] = max(int(number), numbers.get(cell_id, 0))
    contents = files.read_many([_path(cell_id, number) for cell_id, number in numbers.items()])
    return {
        cell_id: ClaimInfo(number, content)
        for (cell_id, number), content in zip(numbers.items(), contents.values(), strict=True)
        if isinstance(content, bytes)
    }


def delete_claims(files: Files, cell_ids: Collection[str]) -> None:
    """Delete the claims of cells that have ended, which workers that were killed at their very end have left."""
    ended = set(cell_ids)
    for name in files.names(FOLDER):
        if name.removesuffix(".json").rpartition(".")[0] in ended:
            files.delete(f"{FOLDER}/{name}")


class Claim:
    """A claim of this worker, renewed by a thread of its own within a `with` block, and given up at its end."""

    def __init__(
        self, files: Files, cell_id: str, number: int, ttl: float, previous_device_error: str | None = None
    ) -> None:
        self.files, self.cell_id, self.number, self.ttl = files, cell_id, number, ttl
        self.previous_device_error = previous_device_error
        """The error by which the worker that had the cell before lost its device, if it did."""
        self._owner = {
            "machine": machine(), "host": platform.node(), "pid": os.getpid(), "key": secrets.token_hex(8), "ttl": ttl,
        }  # fmt: skip
        self._ended, self._thread, self._beat = threading.Event(), None, 0

    def create(self) -> bool:
        """Create the claim; return whether it is this worker's."""
        return self.files.create(_path(self.cell_id, self.number), self._content())

    def __enter__(self) -> "Claim":
        self._thread = threading.Thread(target=self._renew, name=f"claim of {self.cell_id}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if "device_error" in self._owner:
            self._write()
        else:
            self.give_up()

    def leave(self, device_error: str) -> None:
        """Let the claim stay after the block: its worker has lost its device by this error, which counts as a loss."""
        self._owner["device_error"] = device_error

    def give_up(self) -> None:
        """Delete the claim and those before it; storage that fails is left with a claim that will be taken over."""
        for number in range(self.number, -1, -1):
            with suppress(Exception):
                self.files.delete(_path(self.cell_id, number))

    def _renew(self) -> None:
        while not self._ended.wait(self.ttl / 4):
            self._beat += 1
            self._write()

    def _write(self) -> None:
        with suppress(Exception):  # the next beat may succeed; a claim that is lost does no harm
            self.files.write(_path(self.cell_id, self.number), self._content())

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beat": self._beat, "time": time.time()}).encode()


def _path(cell_id: str, number: int) -> str:
    return f"{FOLDER}/{cell_id}.{number}.json"
