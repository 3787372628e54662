"""Files on any fsspec path: retried where storage fails now and then, and created only where they do not exist yet."""

import errno
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from icl_dual.storage import AssetError, first_line

Value = TypeVar("Value")

ATTEMPTS = 6
"""How often an operation on storage is tried, over about a quarter of a minute, before its error counts."""

_PERMANENT = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError,
)  # fmt: skip
_PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
_CLIENTS = ("aiohttp", "aiobotocore", "botocore", "google", "gcsfs", "requests", "urllib3")
"""The packages of storage clients, some of the errors of which are no OSError."""


def _is_of_client(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _CLIENTS


def is_transient(error: BaseException) -> bool:
    """Return whether an operation that failed with an error may succeed when it is repeated."""
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS
    return (
        _is_of_client(error)
        and "Credentials" not in type(error).__name__
        and "ParamValidation" not in type(error).__name__
    )


def retried(operation: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """Call an operation on storage, and again after a growing wait while its errors are of storage that may recover.

    Raises:
        AssetError: the storage's client cannot reach it, or has no credentials. Errors of files are left as they are.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.05, max=8),
        reraise=True,
    )
    try:
        return retrying(operation, *args, **kwargs)
    except Exception as error:
        if not _is_of_client(error):
            raise
        raise AssetError(
            f"expected storage that answers, got {type(error).__name__}: {first_line(error)}: check its address, its "
            "options and your credentials"
        ) from error


def check_inside(path: str) -> str:
    """Return a path below the results' address, after checking that each of its parts is a name.

    Raises:
        AssetError: a part is empty, `.` or `..`, or has a backslash or a null character, as in the name of no cell.

    Example:
        >>> check_inside("cells/smollm2-135m_sst2")
        'cells/smollm2-135m_sst2'
    """
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in path.split("/")):
        raise AssetError(
            f"expected names of cells and files that stay within the results, got the path {path!r}: give a cell's id"
        )
    return path


class Files:
    """The files below one fsspec address. It can be pickled; the connection is opened where it is first used."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url, self.options = str(url), dict(options or {})

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            fs, root = fsspec.url_to_fs(self.url, **{"use_listings_cache": False, **self.options})
        except (ImportError, ValueError) as error:
            raise AssetError(
                f"expected an address that fsspec can open, got {self.url!r} ({first_line(error)}): check it, and for "
                "s3:// install icl-dual[grid]"
            ) from error
        return fs, root.rstrip("/")

    @property
    def local(self) -> Path | None:
        """Return the local folder, or `None` on other storage."""
        fs, root = self._opened
        return Path(root) if isinstance(fs, LocalFileSystem) else None

    def _path(self, path: str) -> str:
        return f"{self._opened[1]}/{check_inside(path)}"

    def _folder(self, folder: str) -> str:
        return self._path(folder) if folder else self._opened[1]

    def read(self, path: str) -> bytes:
        """Return a file's bytes, as they are now.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return retried(self._opened[0].cat_file, self._path(path))

    def exists(self, path: str) -> bool:
        """Return whether a file exists now."""
        fs = self._opened[0]
        retried(fs.invalidate_cache)
        return retried(fs.exists, self._path(path))

    def write(self, path: str, data: bytes) -> None:
        """Write a file, which others see with its old or its new bytes, or while it is written locally with a part."""
        if self.local is not None:
            (self.local / check_inside(path)).parent.mkdir(parents=True, exist_ok=True)
        retried(self._opened[0].pipe_file, self._path(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless it exists; return whether it was written. Of several at once, one alone succeeds.

        On object stores this is a conditional write (`If-None-Match` of S3, a generation match of Google's).
        """
        try:
            retried(self._create, path, data)
        except FileExistsError:
            try:
                return self.read(path) == data  # written by an attempt that was reported as failed
            except FileNotFoundError:
                return False
        return True

    def _create(self, path: str, data: bytes) -> None:
        if self.local is not None:
            (self.local / check_inside(path)).parent.mkdir(parents=True, exist_ok=True)
            _create_locally(self.local / check_inside(path), data)
            return
        try:
            self._opened[0].pipe_file(self._path(path), data, mode="create")
        except Exception as error:
            if getattr(error, "errno", None) == errno.EEXIST or any(
                word in f"{error!r} {error.__cause__!r}" for word in ("PreconditionFailed", "pre-condition", "412")
            ):
                raise FileExistsError(errno.EEXIST, "exists", path) from error
            raise

    def delete(self, path: str) -> None:
        """Delete a file, or nothing where there is none."""
        with suppress(FileNotFoundError):
            retried(self._opened[0].rm_file, self._path(path))

    def delete_folder(self, path: str) -> None:
        """Delete everything below a path, or nothing where there is none."""
        with suppress(FileNotFoundError):
            retried(self._opened[0].rm, self._path(path), recursive=True)

    def names(self, folder: str) -> list[str]:
        """Return the names of the files and folders in a folder (`""`: the address); none where it is missing."""
        fs = self._opened[0]
        retried(fs.invalidate_cache)
        try:
            entries = retried(fs.ls, self._folder(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def find(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, relative to it; none where it is missing."""
        fs, start = self._opened[0], self._folder(folder)
        retried(fs.invalidate_cache)
        try:
            paths = retried(fs.find, start)
        except FileNotFoundError as error:  # a bucket; a folder that is missing is empty
            raise AssetError(
                f"expected results at {self.url}, got {first_line(error)}: correct the address, or create it"
            ) from error
        return [path.removeprefix(start).lstrip("/") for path in paths]

    def read_many(self, paths: list[str]) -> dict[str, bytes | Exception]:
        """Return the bytes of many files by path, or the error of each that cannot be read; object stores at once."""
        if self.local is not None or not paths:
            return {path: self._read_or_error(path) for path in paths}
        contents = retried(self._opened[0].cat, [self._path(path) for path in paths], on_error="return")
        by_path = {path: contents[self._path(path)] for path in paths}  # storage returns them in an order of its own
        return {
            path: self._read_or_error(path) if isinstance(content, Exception) else content
            for path, content in by_path.items()
        }

    def _read_or_error(self, path: str) -> bytes | Exception:
        try:
            return retried((self.local / check_inside(path)).read_bytes) if self.local is not None else self.read(path)
        except OSError as error:
            return error


def _create_locally(path: Path, data: bytes) -> None:
    """Write a file unless it exists, so that it appears complete or not at all."""
    scratch = path.with_name(f".icl_dual-{secrets.token_hex(6)}")
    try:
        scratch.write_bytes(data)
        try:
            path.hardlink_to(scratch)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with path.open("xb") as file:  # a file system without hard links: complete unless the process is killed
                file.write(data)
    finally:
        scratch.unlink(missing_ok=True)
