"""Saving and loading: folders that appear complete or not at all, results as safetensors and JSON.

Every result of the library is a frozen dataclass that inherits `Saved`: its tensors go into `tensors.safetensors`, all
other values into `metadata.json`. A field that an older version did not write yet is absent (`None` or its default),
not an error.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

TENSORS, METADATA = "tensors.safetensors", "metadata.json"

CLASS = "class"
"""The metadata entry that holds the name of the saved class; version 0.1 wrote none."""


NOT_SAVED: Mapping[str, Any] = types.MappingProxyType({"saved": False})
"""The metadata of a dataclass field that `Saved` leaves out: `field(default=None, metadata=NOT_SAVED)`."""

Result = TypeVar("Result", bound="Saved")


class AssetError(RuntimeError):
    """Files that are missing, damaged, or not what they are said to be."""


class SettingsError(ValueError):
    """A saved result was made with other settings than the ones wanted now."""


class Saved:
    """A dataclass that saves itself into a folder and loads from it again.

    Fields may be tensors, JSON values, tuples of these, dictionaries by name, and dataclasses or named tuples of all
    that. A nested tensor is stored under `field/name`.

    >>> import tempfile, torch
    >>> @dataclasses.dataclass(frozen=True)
    ... class Scores(Saved):
    ...     name: str
    ...     by_layer: torch.Tensor
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Scores("SimAOU", torch.tensor([0.25, 0.5])).save(folder)
    ...     Scores.load(folder)
    Scores(name='SimAOU', by_layer=tensor([0.2500, 0.5000]))
    """

    def save(self, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write the result into a folder, as safetensors and JSON.

        Args:
            folder: a new folder, or one that holds such a result already.
            about: more JSON values to keep with it, such as settings and provenance; `load` does not return them.

        Raises:
            AssetError: the folder holds other files.
            ValueError: `about` has a name of the result's own.
        """
        tensors: dict[str, Tensor] = {}
        metadata = _flatten(self, "", tensors)
        if shared := (about or {}).keys() & {*(field.name for field in _saved_fields(self)), CLASS}:
            raise ValueError(f"expected about without the result's own names, got {sorted(shared)}: rename these")
        save_tensors(Path(folder), tensors, {**metadata, **(about or {}), CLASS: type(self).__name__})

    @classmethod
    def load(cls: type[Result], folder: str | os.PathLike[str]) -> Result:
        """Read a result that `save` wrote, with this version or an older one.

        Raises:
            AssetError: the folder is missing or damaged, or holds another result.
        """
        tensors, metadata = load_tensors(Path(folder))
        if (saved := metadata.get(CLASS, cls.__name__)) != cls.__name__:
            raise AssetError(f"expected a saved {cls.__name__} in {folder}, got a saved {saved}: use {saved}.load")
        with reading(cls.__name__, folder):
            return _unflatten(cls, "", *cls._upgraded(tensors, metadata))

    @classmethod
    def _upgraded(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what an older version wrote, under the names of this version."""
        return tensors, metadata


_TENSOR = object()
"""The JSON part of a tensor: none."""


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON part of a value, after putting its tensors into `tensors` by their path."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return _TENSOR
    members = _members(value)
    if members is None:
        return value
    prefix = f"{path}/" if path else ""
    parts = {name: _flatten(member, f"{prefix}{name}", tensors) for name, member in members.items()}
    return {name: part for name, part in parts.items() if part is not _TENSOR}


def _members(value: Any) -> Mapping[str, Any] | None:
    """Return the named parts of a dictionary, dataclass or named tuple."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in _saved_fields(value)}
    return cast(Any, value)._asdict() if isinstance(value, tuple) and hasattr(value, "_fields") else None


def _unflatten(cls: Any, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Any:
    """Return a dataclass or named tuple, from the tensors under a path and its JSON part."""
    prefix = f"{path}/" if path else ""
    hints, values = get_type_hints(cls), {}
    for name, has_default in _fields(cls).items():
        at = f"{prefix}{name}"
        is_saved = name in metadata or at in tensors or any(key.startswith(f"{at}/") for key in tensors)
        if is_saved:
            values[name] = _value(hints[name], at, tensors, metadata.get(name))
        elif not has_default:
            if type(None) not in get_args(hints[name]):
                raise KeyError(at)
            values[name] = None
    return cls(**values)


def _fields(cls: Any) -> dict[str, bool]:
    """Return the names of a class's fields, and whether each has a default."""
    if not dataclasses.is_dataclass(cls):
        return {name: name in cls._field_defaults for name in cls._fields}
    missing = dataclasses.MISSING
    return {f.name: not (f.default is missing and f.default_factory is missing) for f in _saved_fields(cls)}


def _saved_fields(cls_or_instance: Any) -> list[dataclasses.Field[Any]]:
    """Return a dataclass's fields without those marked `NOT_SAVED`."""
    return [field for field in dataclasses.fields(cls_or_instance) if field.metadata.get("saved", True)]


def _value(hint: Any, path: str, tensors: Mapping[str, Tensor], part: Any) -> Any:
    """Return a field's value, by its annotation."""
    if path in tensors:
        return tensors[path]
    nested = [key for key in tensors if key.startswith(f"{path}/")]
    if part is None and not nested:
        return None
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return _unflatten(hint, path, tensors, part or {})
    if get_origin(hint) is dict or hint is dict:
        member = (get_args(hint) or (str, Any))[1]
        # Members keep the order they were saved in where JSON holds them; safetensors sorts its names.
        # A tensor's name may have slashes of its own; what has members of its own ends at the first.
        is_nested = dataclasses.is_dataclass(member) or hasattr(member, "_fields") or get_origin(member) is dict
        keys = [key.removeprefix(f"{path}/") for key in nested]
        names = dict.fromkeys([*(part or {}), *(key.split("/")[0] if is_nested else key for key in keys)])
        return {name: _value(member, f"{path}/{name}", tensors, (part or {}).get(name)) for name in names}
    return _tuples(part) if get_origin(hint) is tuple or hint is tuple else part


def _tuples(value: Any) -> Any:
    """Return JSON lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that replaces `folder` when the block ends well, and vanishes when it does not.

    Raises:
        AssetError: `folder` exists and holds other files than the ones that would replace them.
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
                    f"expected a new folder, or one that holds the same kind of result, got {folder} with other files "
                    f"in it ({sorted(foreign)[0]!r}, …): choose another folder"
                )
            aside = scratch.with_name(f"{scratch.name}-old")
            folder.replace(aside)
            scratch.replace(folder)
            shutil.rmtree(aside)
        else:
            scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors.safetensors` and `metadata.json` into a folder that appears complete or not at all.

    Args:
        folder: the folder to write; one that holds nothing but such files is replaced.
        tensors: tensors by name, of any device. Tensors that share memory are written apart.
        metadata: values by name that JSON can hold.

    Raises:
        AssetError: the folder holds other files.
    """
    with atomic_folder(folder) as scratch:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in _apart(tensors)}, scratch / TENSORS)
        (scratch / METADATA).write_text(json.dumps(metadata, indent=1, ensure_ascii=False))


def _apart(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that share no memory, which safetensors refuses to write."""
    memory: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if pointer in memory else tensor
        memory.add(pointer)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1))
    scratch.replace(path)


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        AssetError: the folder is missing, incomplete or damaged, or holds no saved result.
    """
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
        metadata = json.loads((folder / METADATA).read_text())
        with safe_open(folder / TENSORS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise AssetError(
            f"expected {TENSORS} and {METADATA} in {folder}, got {first_line(error)}: delete the folder "
            "to have it made again"
        ) from error


@contextmanager
def reading(what: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong when tensors and metadata are not those of `what` into an AssetError that says so."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise AssetError(
            f"expected a saved {what} in {folder}, got another result, or one of an unknown version ({error!r}): use "
            f"the load of the class that saved it, or save the {what} again"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_same_settings(folder: Path, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that what a folder or file holds was made with the settings that are wanted now.

    Args:
        folder: the folder or file, which the error names.
        wanted: the settings that are wanted, by name.
        saved: the settings that were saved, by name. Those that `wanted` lacks are not compared.

    Raises:
        SettingsError: they differ; names each setting, the saved value and the wanted one.
    """
    different = [key for key, value in wanted.items() if saved.get(key) != value]
    if different:
        expected, got = (", ".join(f"{key}={values.get(key)!r}" for key in different) for values in (wanted, saved))
        raise SettingsError(
            f"expected a result made with {expected}, got {folder}, made with {got}: choose another output folder, or "
            "delete this one"
        )
