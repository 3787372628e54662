"""Folders and files that appear complete or not at all, whatever kills the process that writes them.

What is written is first put into a scratch folder next to its destination. A folder that is replaced is set aside in
the scratch folder, and the new one takes its name. A process that is killed between the two leaves both in its scratch
folder, from which `recover` puts the old one back; everything here that reads calls it. A lock in the scratch folder,
which the operating system releases with the process, tells whether it is in use.
"""

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from icl_dual.storage.errors import AssetError, writing
from icl_dual.storage.json_files import read_json

TENSORS, METADATA = "tensors.safetensors", "metadata.json"
"""The files of a saved result."""

CLASS = "class"
"""The metadata entry that holds the name of the saved class; version 0.1 wrote none."""

CHECKSUMS = "sha256"
"""The metadata entry that holds the SHA-256 of each file; version 0.2 wrote none."""

SCRATCH = ".icl_dual-"
"""How the names of scratch folders begin; the machine, the process and random characters follow."""

FREE_BYTES = 2**24
"""The free disk space that `check_writable` expects by default."""

_SCRATCH_NAME = re.compile(re.escape(SCRATCH) + r"[A-Za-z0-9]+-\d+-\w+")
_OLDER_SCRATCH_NAME = re.compile(r"\..+-[a-z0-9_]{8}(-old)?")  # of version 0.2
_SYSTEM_FILE = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs.*")
"""Files that operating systems and network file systems put into folders by themselves."""
_LOCK, _NEW, _OLD, _TRASH = "lock", "new", "old", "trash"
_DAY_S, _WAIT_S, _POLL_S = 86400.0, 10.0, 0.01
_ATTEMPTS = 1000


@contextmanager
def atomic_folder(folder: Path) -> Generator[Path]:
    """Yield a new folder that replaces `folder` when the block ends well, and vanishes when it does not.

    Of two processes that write one folder at once, the second replaces what the first wrote. A symbolic link to a
    folder stays, and the folder that it leads to is replaced.

    Raises:
        AssetError: `folder` cannot be written, or exists and holds another result or other files than the ones that
            would replace them. Errors of the block that are not about the new folder's files are left as they are.
    """
    with ExitStack() as stack:
        with writing(folder):
            recover(folder)
            target = _target(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            clean_scratch(target.parent)
            scratch = stack.enter_context(_scratch(target.parent))
            new = scratch / _NEW / target.name
            new.mkdir(parents=True)
        with writing(folder, only_in=scratch):
            yield new
        with writing(folder):
            _swap(scratch, target)


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield the path of a new file, of the same name, that replaces `path` when the block ends well.

    Raises:
        AssetError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(Path(folder) / "table.md") as scratch:
        ...         _ = scratch.write_text("| a |", encoding="utf-8")
        ...     os.listdir(folder)
        ['table.md']
    """
    with ExitStack() as stack:
        with writing(path):
            target = path.resolve() if path.is_symlink() else path
            target.parent.mkdir(parents=True, exist_ok=True)
            clean_scratch(target.parent)
            scratch = stack.enter_context(_scratch(target.parent))
            (scratch / _NEW).mkdir()
        with writing(path, only_in=scratch):
            yield scratch / _NEW / target.name
        with writing(path):
            (scratch / _NEW / target.name).replace(target)


def check_writable(
    folder: str | os.PathLike[str], files: Collection[str] | None = None, *, free_bytes: int = FREE_BYTES
) -> None:
    """Check, before anything is computed, that a folder can be written; nothing that stays is written.

    Args:
        folder: the folder to write, new or one that would be replaced.
        files: the paths in the folder, separated by `/`, of the files that would be written; a folder with others is
            refused. `None` for any.
        free_bytes: the disk space to expect.

    Raises:
        AssetError: the folder is a file, a mount point or a dangling symbolic link, lies below a file or such a link,
            has too long a name, holds other files, or its place is read-only or full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_writable(Path(folder) / "study" / "cell")
    """
    folder = Path(folder)
    with writing(folder):
        recover(folder)
        target = _target(folder)
        place = next(path for path in target.parents if path.exists())
        if not place.is_dir():
            raise AssetError(
                f"expected a path below a folder, got {folder}, below the file {place}: choose another path"
            )
        _check_length(target, place)
        if target.exists():
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, "Permission denied")
            if files is not None:
                check_replaceable(target, files, None)
        clean_scratch(place)
        with _scratch(place) as scratch:
            (scratch / "probe").write_bytes(bytes(4096))
        if (free := shutil.disk_usage(place).free) < free_bytes:
            raise AssetError(
                f"expected {free_bytes / 2**20:.0f} MiB of free disk space for {folder}, got {free / 2**20:.0f} MiB: "
                "free disk space, or choose another path"
            )


def finished_folders(parent: str | os.PathLike[str]) -> list[Path]:
    """Return the folders in a folder by name, after `recover` of each; none where it is missing.

    Of hidden folders, only saved results are returned: version 0.2 hid the cells of models such as `./model`.

    Raises:
        AssetError: the folder cannot be listed.
    """
    parent, deadline = Path(parent), time.monotonic() + _WAIT_S
    names = {aside.name for _, aside in _asides(parent)}
    names |= {path.name for path in _children(parent) if os.path.islink(path) and not path.exists()}  # noqa: PTH114
    for name in names:
        _recover(parent / name, deadline)
    if not parent.is_dir():
        return []
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and _may_be_result(path))
    except PermissionError as error:
        raise AssetError(f"expected to list {parent}, got 'Permission denied': ask its owner for access") from error


def is_scratch(name: str) -> bool:
    """Return whether a folder's name is that of a scratch folder, of this version or of 0.2."""
    return bool(_SCRATCH_NAME.fullmatch(name) or _OLDER_SCRATCH_NAME.fullmatch(name))


def _may_be_result(folder: Path) -> bool:
    return not folder.name.startswith(".") or (not is_scratch(folder.name) and _exists(folder / METADATA))


def clean_scratch(parent: str | os.PathLike[str]) -> None:
    """Put back what killed processes set aside in a folder, and delete their scratch folders.

    Scratch folders in use stay: those whose lock is held, those of other users that cannot be read, and of other
    machines those younger than a day.
    """
    deadline = time.monotonic() + _WAIT_S
    for scratch in _scratch_folders(Path(parent)):
        for aside in _unfinished(scratch):
            _recover(scratch.parent / aside.name, deadline)
        if not _is_in_use(scratch):
            _discard(scratch)


def recover(folder: Path) -> None:
    """Put a folder back that a process had set aside to replace it, and was killed before it did.

    While a process replaces the folder, wait for it, for some seconds at most. Of a symbolic link, the folder that it
    leads to is put back.
    """
    _recover(folder, time.monotonic() + _WAIT_S)


def _recover(folder: Path, deadline: float) -> None:
    """Put a folder back as `recover` does, and wait until a time of the monotonic clock at most."""
    if os.path.islink(folder):  # noqa: PTH114 - False where it cannot be told
        folder = Path(os.path.realpath(folder))
    asides = [(scratch, aside) for scratch, aside in _asides(folder.parent) if aside.name == folder.name]
    for scratch, aside in asides:
        while not _exists(folder) and _exists(aside) and _is_in_use(scratch) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        _put_back(aside, folder)


def _target(folder: Path) -> Path:
    """Return the absolute path that a folder has, or will have, with a symbolic link followed."""
    target = folder.absolute()
    for path in (target, *target.parents):
        if path.is_symlink() and not path.exists():
            raise AssetError(
                f"expected a folder or a new path, got {folder}, with the symbolic link {path} to {path.readlink()}, "
                "which does not exist: restore what it leads to, or delete the link"
            )
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not target.is_dir():
        raise AssetError(f"expected a folder or a new path, got the file {folder}: choose another path")
    if target.is_mount():
        raise AssetError(
            f"expected a folder that can be replaced, got the mount point {folder}: choose a folder inside it"
        )
    return target


def _check_length(target: Path, place: Path) -> None:
    """Raise an AssetError where a part of a path, or all of it, is longer than the file system of `place` allows."""
    try:
        most_of_name, most_of_path = os.pathconf(place, "PC_NAME_MAX"), os.pathconf(place, "PC_PATH_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has none
        most_of_name, most_of_path = 255, 4096
    longest = max(target.parts, key=lambda part: len(os.fsencode(part)))
    scratch = len(SCRATCH) + len(_host()) + len(f"/{_NEW}/") + 30
    for what, length, most in (
        ("names", len(os.fsencode(longest)), most_of_name),
        ("a path", len(os.fsencode(target)) + scratch, most_of_path),
    ):
        if length > most:
            raise AssetError(
                f"expected {what} of at most {most} bytes, got {length} in {str(target)[:100]}…: choose a shorter name"
            )


def check_replaceable(folder: Path, files: Collection[str], metadata: Mapping[str, Any] | None) -> None:
    """Check that nothing is lost when a folder is replaced by files, apart from a result of the same class.

    Args:
        folder: the folder, which need not exist.
        files: the paths of the new files in the folder, separated by `/`.
        metadata: the new result's metadata, or `None` for files that are no saved result.

    Raises:
        AssetError: the folder holds other files, or another result.
    """
    for _ in range(_ATTEMPTS):
        before = _identity(folder)
        try:
            return _check_replaceable(folder, files, metadata)
        except (AssetError, FileNotFoundError):
            if before is not None and _identity(folder) == before:
                raise
            # Another process has replaced it meanwhile: what was read may be of neither folder.
    raise OSError(errno.EBUSY, "other processes keep replacing it")


def _check_replaceable(folder: Path, files: Collection[str], metadata: Mapping[str, Any] | None) -> None:
    """Check a folder that stays the same meanwhile."""
    if not folder.exists() or not _files(folder):
        return
    _check_files(folder, files)
    if metadata is None:
        return
    advice = "choose another folder, or delete this one"
    try:
        saved = read_json(folder / METADATA)
    except AssetError as error:
        raise AssetError(
            f"expected a new folder, or one with a saved result, got {folder}: {error}; {advice}"
        ) from error
    if (kind := saved.get(CLASS)) not in (None, metadata.get(CLASS)):
        wanted = metadata.get(CLASS, "result without a class")
        raise AssetError(
            f"expected a new folder, or one with a saved {wanted}, got {folder} with a saved {kind}: {advice}"
        )


def _check_files(folder: Path, files: Collection[str]) -> None:
    """Raise an AssetError where a folder holds other files than these."""
    if foreign := _files(folder) - set(files):
        raise AssetError(
            f"expected a new folder, or one that holds the same kind of result, got {folder} with other files in it "
            f"({sorted(foreign)[0]!r}, …): choose another folder"
        )


def _files(folder: Path) -> set[str]:
    """Return the paths of the files in a folder and of its empty folders, relative to it.

    Files that the system puts there by itself are left out: they are deleted with the folder when it is replaced.
    """
    paths = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink() or not any(path.iterdir())]
    return {path.relative_to(folder).as_posix() for path in paths if not _SYSTEM_FILE.fullmatch(path.name)}


@contextmanager
def _scratch(parent: Path) -> Generator[Path]:
    """Yield a locked scratch folder in a folder, and delete it."""
    scratch = parent / f"{SCRATCH}{_host()}-{os.getpid()}-{secrets.token_hex(6)}"
    scratch.mkdir()  # by the umask, so that those who may read results also see what is set aside
    lock = FileLock(scratch / _LOCK)
    try:
        with suppress(OSError, NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
        yield scratch
    finally:
        for aside in _unfinished(scratch):
            _put_back(aside, parent / aside.name)
        lock.release()
        _discard(scratch)


def _swap(scratch: Path, target: Path) -> None:
    """Put the new folder in the place of a target, and what is there into the scratch folder."""
    new, aside = scratch / _NEW / target.name, scratch / _OLD / target.name
    for _ in range(_ATTEMPTS):
        try:
            new.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _throw_away_old(scratch)
        metadata = read_json(new / METADATA) if (new / METADATA).exists() else None
        check_replaceable(target, _files(new), metadata)
        aside.parent.mkdir()
        with suppress(FileNotFoundError):  # another process has set it aside just now
            target.rename(aside)
    raise OSError(errno.EBUSY, "other processes keep replacing it")


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what tells a folder from another one that takes its name later; `None` where it is missing."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _put_back(aside: Path, folder: Path) -> None:
    if not _exists(folder):
        with suppress(OSError):  # another process has put it back, or has finished another
            aside.rename(folder)


def _discard(scratch: Path) -> None:
    """Delete a scratch folder, unless it holds the only copy of a folder that could not be put back."""
    if all(_exists(scratch.parent / aside.name) for aside in _unfinished(scratch)):
        with suppress(OSError):
            _throw_away_old(scratch)  # at once, so that nothing half deleted is ever put back
            shutil.rmtree(scratch, ignore_errors=True)


def _throw_away_old(scratch: Path) -> None:
    if (scratch / _OLD).exists():
        (scratch / _OLD).rename(scratch / f"{_TRASH}-{time.monotonic_ns()}")


def _is_in_use(scratch: Path) -> bool:
    """Return whether the process that made a scratch folder may still run."""
    try:
        names = {path.name for path in scratch.iterdir()}
        is_young = time.time() - scratch.stat().st_mtime < _DAY_S
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's
        return True
    host, pid, _ = scratch.name.removeprefix(SCRATCH).split("-")
    if host != _host():
        return is_young
    if names <= {_LOCK}:  # perhaps not locked yet
        return is_young and _is_running(int(pid))
    if _LOCK not in names:
        return False
    lock = FileLock(scratch / _LOCK)
    try:
        lock.acquire(timeout=0)
        lock.release()
        if {path.name for path in _children(scratch)} <= {_LOCK}:  # deleted meanwhile; the lock made it again
            shutil.rmtree(scratch, ignore_errors=True)
    except Timeout:
        return True
    except FileNotFoundError:
        return False
    except (OSError, RuntimeError):  # a file system without locks
        return is_young
    return False


def _is_running(pid: int) -> bool:
    """Return whether a process of this machine may run."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _scratch_folders(parent: Path) -> list[Path]:
    return [path for path in _children(parent) if _SCRATCH_NAME.fullmatch(path.name)]


def _asides(parent: Path) -> list[tuple[Path, Path]]:
    """Return the scratch folders that were stopped, or are, between the two renames, and the folders set aside.

    The latest comes first.
    """
    asides: list[tuple[int, Path, Path]] = []
    for scratch in _scratch_folders(parent):
        with suppress(FileNotFoundError, PermissionError):  # its process has just finished, or is another user's
            moved_ns = (scratch / _OLD).stat().st_mtime_ns
            asides += [(moved_ns, scratch, aside) for aside in _unfinished(scratch)]
    return [(scratch, aside) for _, scratch, aside in sorted(asides, reverse=True)]


def _unfinished(scratch: Path) -> list[Path]:
    """Return the folders that were set aside in a scratch folder which still holds what was to replace them."""
    return [aside for aside in _children(scratch / _OLD) if _exists(scratch / _NEW / aside.name)]


def _children(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing where it is missing, no folder, or may not be listed."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _host() -> str:
    """Return the machine's name as a part of a file's name: its beginning, and a hash of the whole."""
    name = platform.node()
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9]", "", name)[:24] + digest
