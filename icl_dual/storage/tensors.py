"""Tensors as safetensors and their metadata as JSON, in one folder, with the checksum of each file."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icl_dual.storage.errors import AssetError, first_line, writing
from icl_dual.storage.folders import (
    CHECKSUMS,
    METADATA,
    TENSORS,
    atomic_file,
    atomic_folder,
    check_replaceable,
    recover,
)
from icl_dual.storage.json_files import read_json, to_json

_ATTEMPTS, _MISSING_ATTEMPTS, _POLL_S = 100, 2, 0.01
"""How often to read a folder that others replace all the time, and to look for one that is missing: it may be between
the two renames of a replacement each time."""


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors.safetensors` and `metadata.json` into a folder that appears complete or not at all.

    Args:
        folder: the folder to write; one that holds such a result is replaced.
        tensors: tensors by name, of any device. Tensors that share memory are written apart.
        metadata: values by name that JSON can hold, without the name `sha256`, under which the checksums are kept.

    Raises:
        AssetError: the folder holds other files or another result, or cannot be written.
        ValueError: a value cannot be saved as JSON.
    """
    text = to_json(metadata, "metadata")
    recover(folder)
    check_replaceable(folder, (TENSORS, METADATA), metadata)
    with atomic_folder(folder) as scratch, writing(folder):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in _apart(tensors)}, scratch / TENSORS)
        checksums = {TENSORS: _file_sha256(scratch / TENSORS), METADATA: _json_sha256(json.loads(text))}
        (scratch / METADATA).write_text(to_json({**metadata, CHECKSUMS: checksums}), encoding="utf-8")
        (scratch / TENSORS).chmod((scratch / METADATA).stat().st_mode)  # safetensors does not follow the umask


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        AssetError: the folder is missing, incomplete or damaged, or holds no saved result.
    """
    for attempt in range(_ATTEMPTS):
        for path in (folder.parent, folder):
            recover(path)
        identity = _identity(folder)
        try:
            result = _load(folder)
        except (AssetError, RuntimeError):  # torch's, where the file vanishes while it is opened
            is_missing = identity is None
            if _identity(folder) == identity and (not is_missing or attempt == _MISSING_ATTEMPTS):
                raise
            time.sleep(_POLL_S if is_missing else 0)
        else:
            if _identity(folder) == identity:
                return result
    raise AssetError(f"expected {folder} unchanged while it is read, got a folder that is replaced all the time: wait")


def _load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not folder.is_dir():
        raise AssetError(
            f"expected a folder with {TENSORS} and {METADATA}, got {folder}, which does not exist: check the path"
        )
    if not any((folder / name).exists() for name in (TENSORS, METADATA)):
        raise AssetError(
            f"expected a saved result in {folder}, got a folder without {TENSORS} and {METADATA}: pass a result's own "
            "folder; the cells of a study are its sub-folders"
        )
    try:
        metadata = read_json(folder / METADATA)
        _check_sums(folder, metadata.pop(CHECKSUMS, {}), metadata)
        with cast(Any, safe_open)(folder / TENSORS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except (OSError, AssetError, SafetensorError) as error:
        raise AssetError(
            f"expected {TENSORS} and {METADATA} in {folder}, got {first_line(error)}: delete the folder "
            "to have it made again"
        ) from error


def _check_sums(folder: Path, checksums: Any, metadata: Any) -> None:
    """Raise an AssetError where a file has another checksum than the one saved; version 0.2 saved none."""
    if not isinstance(checksums, dict):
        raise AssetError(f"{METADATA} with {CHECKSUMS} that are no table")
    if METADATA in checksums and checksums[METADATA] != _json_sha256(metadata):
        raise AssetError(f"{METADATA} with other values than were saved (its SHA-256 differs)")
    if TENSORS in checksums and checksums[TENSORS] != _file_sha256(folder / TENSORS):
        raise AssetError(f"{TENSORS} with other bytes than were saved (its SHA-256 differs)")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_sha256(metadata: Any) -> str:
    """Return a checksum of JSON values, however they are written."""
    return hashlib.sha256(json.dumps(metadata, separators=(",", ":")).encode()).hexdigest()


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from the one that replaces it."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _apart(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that share no memory, which safetensors refuses to write."""
    memory: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if pointer in memory else tensor
        memory.add(pointer)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all.

    Raises:
        AssetError: the file cannot be written.
        ValueError: the value cannot be saved as JSON.
    """
    text = to_json(value)
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
