"""`Saved`: a result as tensors and JSON, and back, with every value checked against its field's annotation."""

import copy
import dataclasses
import os
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from jaxtyping import AbstractArray
from torch import Tensor

from icl_dual.arguments import checked
from icl_dual.results import BaseResult
from icl_dual.storage.errors import AssetError, FieldError, first_line, reading
from icl_dual.storage.folders import CHECKSUMS, CLASS, METADATA
from icl_dual.storage.json_files import json_kind, read_json
from icl_dual.storage.tensors import load_tensors, save_tensors
from icl_dual.type_guards import is_class, is_dict, is_list, is_list_or_tuple, is_mapping, is_tuple

NOT_SAVED: Mapping[str, Any] = types.MappingProxyType({"saved": False})
"""The metadata of a dataclass field that `Saved` leaves out: `field(default=None, metadata=NOT_SAVED)`."""

Result = TypeVar("Result", bound="Saved")
Parsed = TypeVar("Parsed")


class Saved(BaseResult):
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

    @checked
    def to(self: Result, device: str | torch.device) -> Result:
        """Return the result with all its tensors on a device.

        Results are on the device of the model that they are from. Tensors move to the CPU by way of pinned memory, and
        the host waits once for all of them.

        Args:
            device: the device, such as `cpu` or `cuda`.
        """
        moved = _moved(self, torch.device(device))
        for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            torch.cuda.synchronize(index)
        return moved

    @checked
    def save(self, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write the result into a folder, as safetensors and JSON.

        Args:
            folder: a new folder, or one that holds such a result already: the new result replaces it.
            about: more JSON values to keep with it, such as settings and provenance; `load` does not return them.

        Raises:
            AssetError: the folder holds other files or another result, or cannot be written.
            ValueError: `about` has a name of the result's own, or a value that JSON cannot hold.
        """
        tensors: dict[str, Tensor] = {}
        metadata = _flatten(self, "", tensors)
        if shared := (about or {}).keys() & {*(field.name for field in _saved_fields(self)), CLASS, CHECKSUMS}:
            raise ValueError(f"expected about without the result's own names, got {sorted(shared)}: rename these")
        metadata = {**metadata, **(about or {}), CLASS: type(self).__name__}
        _check_kept(Path(folder), metadata[CLASS], {*metadata, *(field.name for field in _saved_fields(self))})
        save_tensors(Path(folder), tensors, metadata)

    @classmethod
    @checked
    def load(cls: type[Result], folder: str | os.PathLike[str]) -> Result:
        """Read a result that `save` wrote, with this version or an older one.

        Raises:
            AssetError: the folder is missing or damaged, or holds another result.
        """
        return cls.from_saved(*load_tensors(Path(folder)), folder)

    @classmethod
    @checked
    def from_saved(
        cls: type[Result], tensors: dict[str, Tensor], metadata: dict[str, Any], folder: str | os.PathLike[str]
    ) -> Result:
        """Return the result of what `load_tensors` has read.

        Args:
            tensors: the tensors by name.
            metadata: the JSON values by name.
            folder: the folder that they were read from, for errors.

        Raises:
            AssetError: they are another result's.
        """
        if (saved := metadata.get(CLASS) or cls.__name__) != cls.__name__:
            raise AssetError(f"expected a saved {cls.__name__} in {folder}, got a saved {saved}: use {saved}.load")
        with reading(cls.__name__, folder):
            return _unflatten(cls, "", *cls._upgraded(tensors, metadata))

    @classmethod
    def _upgraded(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what an older version wrote, under the names of this version."""
        return tensors, metadata


def _check_kept(folder: Path, cls: str, names: Collection[str]) -> None:
    """Raise an AssetError where a folder's result of a class has more about it than the names of its successor."""
    saved = read_json(folder / METADATA) if (folder / METADATA).is_file() else {}
    lost = sorted(saved.keys() - {*names, CHECKSUMS})
    if lost and saved.get(CLASS) in (None, cls):
        raise AssetError(
            f"expected a new folder, or one with nothing more than such a result, got {folder} with its "
            f"{', '.join(lost[:3])}: choose another folder, or delete this one"
        )


_TENSOR = object()
"""The JSON part of a tensor: none."""


def _moved(value: Any, device: torch.device) -> Any:
    """Return a value with its tensors on a device, wherever they are nested; not waiting for the copies.

    A dataclass whose fields hold no tensors, such as prompts, stays as it is, with what was computed from them.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=value.device.type == "cuda")
    if is_mapping(value):
        return {name: _moved(member, device) for name, member in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(_moved(member, device) for member in value))
    if is_list_or_tuple(value):
        return type(value)(_moved(member, device) for member in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _holds_tensors(value):
        moved = copy.copy(value)
        for name, member in vars(value).items():  # with what was computed from the fields and kept
            object.__setattr__(moved, name, _moved(member, device))
        return moved
    return value


def _holds_tensors(value: Any) -> bool:
    """Return whether a value is a tensor, or has one in its items or fields."""
    if is_mapping(value):
        return any(map(_holds_tensors, value.values()))
    if is_list_or_tuple(value):
        return any(map(_holds_tensors, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_holds_tensors(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, Tensor)


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
    if is_mapping(value):
        return value
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in _saved_fields(value)}
    return cast(Any, value)._asdict() if is_tuple(value) and hasattr(value, "_fields") else None


def _unflatten(cls: Any, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Any:
    """Return a dataclass or named tuple, from the tensors under a path and its JSON part."""
    prefix = f"{path}/" if path else ""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, has_default in _fields(cls).items():
        at = f"{prefix}{name}"
        is_saved = name in metadata or at in tensors or any(key.startswith(f"{at}/") for key in tensors)
        if is_saved:
            values[name] = _value(hints[name], at, tensors, metadata.get(name))
        elif not has_default:
            if type(None) not in get_args(hints[name]):
                raise KeyError(at)
            values[name] = None
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {first_line(error)}" if path else first_line(error)) from error


def _fields(cls: Any) -> dict[str, bool]:
    """Return the names of a class's fields, and whether each has a default."""
    if not dataclasses.is_dataclass(cls):
        return {name: name in cls._field_defaults for name in cls._fields}
    missing = dataclasses.MISSING
    return {f.name: not (f.default is missing and f.default_factory is missing) for f in _saved_fields(cls)}


def _saved_fields(cls_or_instance: Any) -> list[dataclasses.Field[Any]]:
    """Return a dataclass's fields without those marked `NOT_SAVED`."""
    return [field for field in dataclasses.fields(cls_or_instance) if field.metadata.get("saved", True)]


def from_json(cls: type[Parsed], values: Any, source: str | os.PathLike[str]) -> Parsed:
    """Return a dataclass of JSON values, each checked against the annotation of its field.

    Args:
        cls: the dataclass. A field that the values lack gets its default, or `None` where its annotation has it.
        values: the JSON values by field.
        source: the file that holds them, for the error.

    Raises:
        AssetError: a value is missing, of a wrong type, or refused by the class itself; names file and field.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Settings:
        ...     k: int
        >>> from_json(Settings, {"k": 3}, "metadata.json")
        Settings(k=3)
    """
    with reading(cls.__name__, source):
        if not is_dict(values):
            raise FieldError("", f"a table of {cls.__name__}", json_kind(values))
        if unknown := sorted(values.keys() - _fields(cls).keys()):
            raise KeyError(unknown[0])
        return _unflatten(cls, "", {}, values)


def _value(hint: Any, path: str, tensors: Mapping[str, Tensor], part: Any) -> Any:
    """Return a field's value, by its annotation.

    Raises:
        FieldError: the value is not what the annotation says.
    """
    options = [option for option in _options(hint) if option is not type(None)]
    if path in tensors:
        if not any(option is Any or _is_tensor(option) for option in options):
            raise FieldError(path, _words(hint), "a tensor")
        return tensors[path]
    nested = [key for key in tensors if key.startswith(f"{path}/")]
    if nested:
        return _container(options[0], path, tensors, part, nested)
    errors: list[FieldError] = []
    for option in _options(hint):
        try:
            return _plain_value(option, path, part)
        except FieldError as error:
            errors.append(error)
    deeper = [error for error in errors if error.field != path or len(errors) == 1]
    raise deeper[0] if deeper else FieldError(path, _words(hint), json_kind(part))


def _plain_value(hint: Any, path: str, part: Any) -> Any:
    """Return a value of JSON, without tensors, by an annotation that is no union."""
    origin = get_origin(hint) or hint
    if origin is Any:
        return part
    if origin is Literal:
        is_fit = any(type(part) is type(option) and part == option for option in get_args(hint))
    elif origin in _JSON_TYPES:
        is_fit = type(part) in _JSON_TYPES[origin]
    elif origin in (tuple, list, Sequence):
        return _sequence(hint, path, part)
    elif origin in (dict, Mapping) or _is_record(origin):
        if not is_dict(part):
            raise FieldError(path, _words(hint), json_kind(part))
        return _container(hint, path, {}, part, [])
    else:  # a tensor, which is never in JSON
        is_fit = False
    if not is_fit:
        raise FieldError(path, _words(hint), json_kind(part))
    return part


def _container(hint: Any, path: str, tensors: Mapping[str, Tensor], part: Any, nested: list[str]) -> Any:
    """Return a dataclass, named tuple or dictionary, of the tensors under a path and the JSON part."""
    if part is not None and not is_dict(part):
        raise FieldError(path, _words(hint), json_kind(part))
    if _is_record(hint):
        return _unflatten(hint, path, tensors, part or {})
    if (get_origin(hint) or hint) not in (dict, Mapping):
        raise FieldError(path, _words(hint), "a table of tensors")
    member = (get_args(hint) or (str, Any))[1]
    # Members keep the order they were saved in where JSON holds them; safetensors sorts its names.
    # A tensor's name may have slashes of its own; what has members of its own ends at the first.
    is_nested = any(_is_record(option) or get_origin(option) is dict for option in _options(member))
    keys = [key.removeprefix(f"{path}/") for key in nested]
    names = dict.fromkeys([*(part or {}), *(key.split("/")[0] if is_nested else key for key in keys)])
    return {name: _value(member, f"{path}/{name}", tensors, (part or {}).get(name)) for name in names}


def _sequence(hint: Any, path: str, part: Any) -> Any:
    """Return a JSON list as the tuple or list that it was."""
    if not is_list(part):
        raise FieldError(path, _words(hint), json_kind(part))
    origin, members = get_origin(hint) or hint, get_args(hint)
    if not members:
        return _tuples(part) if origin is tuple else part
    if origin is tuple and members[-1] is not Ellipsis:
        if len(part) != len(members):
            raise FieldError(path, _words(hint), f"a list of {len(part)}")
    elif members[0] in _JSON_TYPES and {*map(type, part)} <= {*_JSON_TYPES[members[0]]}:
        return tuple(part) if origin is tuple else part
    else:
        members = (members[0],) * len(part)
    pairs = enumerate(zip(members, part, strict=True))
    values = [_value(member, f"{path}/{index}", {}, item) for index, (member, item) in pairs]
    return tuple(values) if origin is tuple else values


_JSON_TYPES: Mapping[Any, tuple[type, ...]] = types.MappingProxyType(
    {bool: (bool,), int: (int,), float: (float, int), str: (str,), type(None): (type(None),)}
)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the options of a union, or the one annotation."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_record(hint: Any) -> bool:
    return is_class(hint) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"))


def _is_tensor(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Tensor | AbstractArray)


def _words(hint: Any) -> str:
    """Return what an annotation says, in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    origin = get_origin(hint) or hint
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if len(options := _options(hint)) > 1:
        return " or ".join(dict.fromkeys(map(_words, options)))
    if origin in (tuple, list, Sequence):
        fixed = origin is tuple and get_args(hint) and get_args(hint)[-1] is not Ellipsis
        return f"a list of {len(get_args(hint))}" if fixed else "a list"
    if origin in (dict, Mapping) or _is_record(origin):
        return "a table"
    return "a tensor" if _is_tensor(origin) else words.get(origin, str(hint))


def _tuples(value: Any) -> Any:
    """Return JSON lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if is_list(value) else value
