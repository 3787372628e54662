"""The origin of a cell's numbers: what is saved of its model and tasks, and the checks that these are still the same.

A study is of one data set and one model under each name. What an older version did not save is not compared.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from icl_dual.assets import local_files, local_provenance
from icl_dual.cells import Cell
from icl_dual.models import Model, control_provenance
from icl_dual.models.precision import precision_name
from icl_dual.models.tokenization import tokenizer_fingerprint
from icl_dual.rows import file_sha256
from icl_dual.storage import SettingsError, check_same_settings
from icl_dual.tasks import Task
from icl_dual.torch_utils import dtype_name

PACKAGES = ("icl-dual", "torch", "transformers", "tokenizers", "transformer-lens")
"""The packages of which a cell saves the version."""


class SavedCell(NamedTuple):
    """A cell as it was saved, without its numbers."""

    cell: Cell
    """The settings."""
    provenance: Mapping[str, Any]
    """The origin of its numbers, as JSON values."""
    folder: Path
    """The folder that it is saved in."""

    @property
    def precision(self) -> tuple[str | None, str | None]:
        """Return the dtype and the precision; before there were precisions, cells computed in their weights' dtype."""
        dtype = self.provenance.get("dtype")
        return dtype, self.provenance.get("precision", dtype)


def model_origin(model: Model) -> dict[str, Any]:
    """Return what identifies a model's weights, their precision and its tokenizer, as provenance has it."""
    tokenizer = {} if model.tokenizer is None else {"tokenizer": tokenizer_fingerprint(model.tokenizer)}
    return {
        "model": model.provenance,
        "dtype": dtype_name(model.dtype),
        "precision": model.precision,
        "fingerprint": model.fingerprint(),
        **tokenizer,
    }


def task_origin(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return what identifies a cell's tasks, as provenance has it: a hash of each, and what decides it by name."""
    hashes = {key: task.fingerprint for key, task in tasks.items()}
    return {**hashes, "tasks": {key: task.provenance for key, task in tasks.items()}}


def check_same_precision(saved: SavedCell, dtype: torch.dtype, arithmetic: torch.dtype | None) -> None:
    """Raise a SettingsError where a cell was computed in another precision than that of models to load."""
    computed = arithmetic or dtype
    _check_precision(saved, dtype_name(computed), precision_name(dtype, computed))


def check_same_model(saved: SavedCell, origin: Mapping[str, Any], *, any_precision: bool = False) -> None:
    """Raise a SettingsError where a cell was run with other weights, another precision or another tokenizer.

    Args:
        saved: the cell.
        origin: what `model_origin` returns of the model of the cell's `model_name`; entries that it lacks are not
            compared.
        any_precision: whether the cell may have another precision. Fingerprints are compared within one precision.
    """
    if not any_precision:
        _check_precision(saved, origin["dtype"], origin["precision"])
    hashes = ["tokenizer"]
    if saved.precision == (origin["dtype"], origin["precision"]):
        hashes.append("fingerprint")
    wanted = {name: origin[name] for name in hashes if name in origin and name in saved.provenance}
    if wanted.get("tokenizer") != saved.provenance.get("tokenizer") and not _has_same_tokenizers(saved):
        wanted.pop("tokenizer", None)
    check_same_settings(saved.folder, {"model": origin["model"], **wanted}, saved.provenance)


def check_same_control(saved: SavedCell, origin: Mapping[str, Any], *, any_precision: bool = False) -> None:
    """Raise a SettingsError where a control was run with another model than the one that this is the origin of."""
    if saved.cell.weights != "trained":
        model = control_provenance(origin["model"], saved.cell.weights, saved.cell.seed)
        of_control = {name: value for name, value in origin.items() if name != "fingerprint"} | {"model": model}
        check_same_model(saved, of_control, any_precision=any_precision)


class LocalFiles:
    """Compares the local files of models and tasks with those that cells were run with; each is read once at most."""

    def __init__(self) -> None:
        self._of_model, self._provenance, self._sha256 = cache(local_files), cache(local_provenance), cache(file_sha256)

    def check_same_model(self, saved: SavedCell) -> None:
        """Raise a SettingsError where the local files of a cell's model have changed; no model is loaded.

        Bytes are read only where size or time of change of a file differ from those that were saved.
        """
        cell = saved.cell
        saved_files: dict[str, Any] = saved.provenance.get("model_files") or {}
        files = self._of_model(cell.model) if saved_files else {}
        if not files or files == saved_files:
            return
        provenance = self._provenance(cell.model)
        if cell.weights != "trained":
            provenance = control_provenance(provenance, cell.weights, cell.seed)
        if provenance != saved.provenance["model"]:
            changed = sorted(name for name in {**files, **saved_files} if files.get(name) != saved_files.get(name))
            raise SettingsError(
                f"expected the files of model={cell.model!r} that {saved.folder} was made with, got other bytes "
                f"({', '.join(changed)}): restore them, or choose another output folder"
            )

    def have_tasks_changed(self, saved: SavedCell) -> bool:
        """Return whether a file that a cell's tasks were read from has other bytes now, where that can be told."""
        files: Mapping[str, str] = saved.provenance.get("task_files", {})
        if not files and saved.cell.source is not None and Path(saved.cell.source).is_file():
            return True  # an older version saved no hash of files
        return any(self._sha256(path) not in (None, sha256) for path, sha256 in files.items())


def check_same_task(saved: SavedCell, key: str, task: Task) -> None:
    """Raise a SettingsError where a cell was run with other rows, another template or other label words.

    Args:
        saved: the cell.
        key: `task` or `context_task`.
        task: the task of this name now.
    """
    if saved.provenance.get(key, task.fingerprint) == task.fingerprint:
        return
    parts, saved_parts = task.provenance, saved.provenance.get("tasks", {}).get(key, {})
    changed = [name for name, value in parts.items() if name in saved_parts and saved_parts[name] != value]
    wanted = {f"{key} {name}": parts[name] for name in changed} or {key: task.fingerprint}
    check_same_settings(
        saved.folder, wanted, {**saved.provenance, **{f"{key} {name}": saved_parts[name] for name in changed}}
    )


def _check_precision(saved: SavedCell, dtype: str, precision: str) -> None:
    saved_dtype, saved_precision = saved.precision
    check_same_settings(saved.folder, {"dtype": dtype}, {"dtype": saved_dtype})
    check_same_settings(saved.folder, {"precision": precision}, {"precision": saved_precision})


def _has_same_tokenizers(saved: SavedCell) -> bool:
    """Return whether the packages that write a tokenizer's serialisation have the versions of a saved cell."""
    versions = saved.provenance.get("versions", {})
    return all(versions.get(name) == version(name) for name in ("tokenizers", "transformers"))
