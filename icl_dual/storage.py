"""Folders that appear complete or not at all, and what results are saved as: safetensors and JSON."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class AssetError(RuntimeError):
    """Bytes that were wanted are missing, damaged, or not what they are said to be."""


class SettingsError(ValueError):
    """Something saved was made with other settings than the ones wanted now."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes `folder`'s place when the block ends well, and vanishes when it does not.

    Raises:
        AssetError: `folder` is there and holds other files than the ones that would replace them.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists():
            foreign = {path.name for path in folder.iterdir()} - {path.name for path in scratch.iterdir()}
            if foreign:
                raise AssetError(
                    f"expected a new folder, or one to write again, got {folder} with other files in it "
                    f"({sorted(foreign)[0]!r}, …). Choose another folder"
                )
            aside = scratch.with_name(f"{scratch.name}-old")
            folder.replace(aside)
            scratch.replace(folder)
            shutil.rmtree(aside)
        else:
            scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_tensors(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write `tensors.safetensors` and `metadata.json` into a folder that appears complete or not at all."""
    with atomic_folder(folder) as scratch:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, scratch / "tensors.safetensors")
        (scratch / "metadata.json").write_text(json.dumps(metadata, indent=1, ensure_ascii=False))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1))
    scratch.replace(path)


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        AssetError: the folder is missing, incomplete or damaged.
    """
    if not folder.is_dir():
        raise AssetError(f"expected a folder with tensors.safetensors and metadata.json, found no {folder}")
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        with safe_open(folder / "tensors.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise AssetError(
            f"expected tensors.safetensors and metadata.json in {folder}, got {first_line(error)}. Delete the folder "
            "to have it made again."
        ) from error


@contextmanager
def reading(what: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong when tensors and metadata are not those of `what` into an AssetError that says so."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise AssetError(
            f"expected a saved {what} in {folder}, got something else, or of another version ({error!r})"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_same_settings(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise a SettingsError where what a folder or file holds was made with other settings than are wanted now."""
    pairs = {key: (found.get(key), value) for key, value in wanted.items()}
    different = [f"{key}={was!r} (wanted {now!r})" for key, (was, now) in pairs.items() if was != now]
    if different:
        raise SettingsError(
            f"{folder} was made with other settings: {', '.join(different)}. Use another output folder, or delete this "
            "one"
        )
