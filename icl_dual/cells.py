"""`Cell` and `CellResult`: one comparison of a model on a task, by its settings and as it was saved."""

import hashlib
import html
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from icl_dual.arguments import Count, NameOrPath, Rate, Seed, checked
from icl_dual.contexts import Context
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig, Lora
from icl_dual.finetuning.replicas import REPLICAS, check_replicas
from icl_dual.html_tables import Line, lines_table, number
from icl_dual.metrics.catalogue import metrics
from icl_dual.metrics.comparison import Comparison
from icl_dual.models import Control, control_name
from icl_dual.recordings.recordings import Recordings
from icl_dual.scoring import Scoring
from icl_dual.statistics.frames import html_table
from icl_dual.storage import METADATA, TENSORS, load_tensors
from icl_dual.tasks import Protocol, Split
from icl_dual.type_guards import is_dict

RECORDINGS = "recordings"
"""The folder of a cell's recordings inside the cell's own, where they were kept."""

CELL_FILES = {METADATA, TENSORS, f"{RECORDINGS}/{METADATA}", f"{RECORDINGS}/{TENSORS}"}
"""The files in a cell's folder."""

LONGEST_NAME = 200
"""The longest name of a cell's folder, in bytes: file systems allow 255 in most cases."""


class StudyError(ValueError):
    """A cell's settings contradict each other, or the cells, tasks and models of a study do not match."""


@checked
@document_fields
@dataclass(frozen=True)
class Cell:
    """The settings of one comparison.

    Example:
        >>> from dataclasses import replace
        >>> cell = Cell(model="smollm2-135m", task="sst2", k=8, seed=1, lr=0.001)
        >>> cell.name
        'smollm2-135m_sst2_k8_seed1_lr0.001_answer'
        >>> replace(cell, context="flipped labels").variation
        {'context': 'flipped labels'}
    """

    model: NameOrPath
    """The model's name: one that `load_model` takes, or that of a `Model` passed to `run_study`."""
    task: NameOrPath
    """The task's name: one that `load_task` takes, or that of a `Task` passed to `run_study`."""
    k: Count
    """The number of demonstrations."""
    seed: Seed
    """The seed of the demonstrations, of controls and of random baselines."""
    lr: Rate
    """The learning rate of finetuning."""
    n_queries: Count | None = 100
    """The number of queries; `None` for all of the split (under the reference protocol at most 2000)."""
    protocol: Protocol = "answer"
    """How rows are drawn and written, and the recorded position: `answer`, the token that predicts the label; or
    `reference`, as in the released code, the first label word, which is appended to every query."""
    balanced: bool = False
    """Whether as many demonstrations of each class are drawn; by default as classes are distributed (the paper)."""
    split: Split = "evaluation"
    """The pool that queries come from."""
    source: NameOrPath | None = None
    """The source of the tasks' rows, as `load_task` takes it: `wheel`, `hub`, or a file; a task's own by default."""
    reference_k_mismatch: bool = False
    """Whether finetuning also trains on the demonstrations that the reference protocol leaves out of a full context, as
    the released code does."""
    weights: Literal["trained"] | Control = "trained"
    """The weights: the model's own, or those of a control, drawn by `seed`."""
    context: Context = "own"
    """The demonstrations in context: the task's `own`, or a change of them, drawn by `seed`."""
    context_task: NameOrPath | None = None
    """The name of another task that gives the demonstrations in context."""
    finetuned_on: Literal["own", "context"] = "own"
    """The demonstrations that finetuning trains on: the task's `own`, or those in `context`."""
    finetuning: FinetuneConfig = PAPER_FINETUNING
    """The loss, the trained projections, the optimiser's steps and LoRA: how finetuning is done."""
    delta: Literal["finetuned", "random"] = "finetuned"
    """The change of weights in the finetuned setting: finetuning's, or one of the same norm in random directions."""
    replicas: int = REPLICAS
    """How often to repeat the finetuning at slightly other rates from slightly other weights, which shows how stable
    each metric is: at least 2, or 0 for none."""
    scoring: Scoring = "mean"
    """The rule by which predictions follow from the label words' log-probabilities (`icl_dual.scoring`)."""

    def __post_init__(self) -> None:
        try:
            check_replicas(self.replicas)
        except ValueError as error:
            raise StudyError(str(error)) from error
        if self.context_task is not None and (self.context, self.finetuned_on) != ("own", "own"):
            raise StudyError(
                "expected context='own' and finetuned_on='own' with a context_task, got "
                f"context={self.context!r} and finetuned_on={self.finetuned_on!r}: change one thing in a cell"
            )
        if self.context_task == self.task:
            raise StudyError(
                f"expected another task as context_task, got the cell's own, {self.task!r}: leave context_task out"
            )
        if (self.context, self.finetuned_on) == ("own", "context"):
            raise StudyError(
                "expected finetuned_on='own' with context='own', got finetuned_on='context': both are the same "
                "demonstrations, so leave finetuned_on out"
            )

    @classmethod
    @checked
    def from_settings(cls, settings: Mapping[str, Any]) -> "Cell":
        """Return the cell of settings as they are saved, by this version or by an older one.

        Version 0.1 saved the finetuning's loss, method and trained projections among the other settings, and finetuned
        once, without replicas.

        Raises:
            StudyError: a setting is unknown; the message names it.
            ArgumentError: a setting has the wrong type or is out of range.
        """
        given: dict[str, Any] = {"replicas": 0, **settings}
        flat = {name: given.pop(name) for name in vars(PAPER_FINETUNING) if name in given}
        finetuning: dict[str, Any] = given.pop("finetuning", flat)
        lora: dict[str, Any] = finetuning.get("lora") or {}
        known = {field.name for field in fields(cls)}
        of_finetuning = ({*finetuning} - {*vars(PAPER_FINETUNING)}) | ({*lora} - {*vars(Lora())})
        if unknown := sorted((given.keys() - known) | of_finetuning):
            raise StudyError(
                f"expected the settings of a cell, got {', '.join(map(repr, unknown))}, perhaps of a newer version: "
                "install the version of icl-dual that saved them"
            )
        if lora:
            targets = lora.get("targets")
            lora = {**lora, "targets": None if targets is None else tuple(targets)}
            finetuning = {**finetuning, "lora": Lora(**lora)}
        return cls(**given, finetuning=FinetuneConfig(**finetuning))

    @property
    def name(self) -> str:
        """Return the name of the cell's folder, which tells it from the other cells of a study."""
        return folder_name(self._full_name)

    @property
    def _full_name(self) -> str:
        name = f"{self.model.strip('/')}_{self.task}_k{self.k}_seed{self.seed}_lr{self.lr:g}_{self.protocol}"
        return "_".join([name, *(value.replace(" ", "-") for value in self.variation.values())])

    @checked
    def folder_in(self, study: Path) -> Path:
        """Return the cell's folder in a study's: that of its name, or of its name by an older version, if it is there.

        Older versions did not shorten names, kept characters that Windows refuses, and hid the cells of models such as
        `./model`.
        """
        older = study / self._full_name.replace("/", "--")
        is_older = os.path.exists(older)  # noqa: PTH110 - False for a name that is too long
        return older if is_older and not (study / self.name).exists() else study / self.name

    @property
    def variation(self) -> dict[str, str]:
        """Return what makes the cell a control or a variant, by field: every such setting that is not the paper's."""
        descriptions = {
            "weights": "{}",
            "context": "{}",
            "context_task": "context of {}",
            "finetuned_on": "finetuned on {}",
            "delta": "{} delta",
            "scoring": "{} scoring",
        }
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        words = {name: descriptions[name].format(changed[name]) for name in descriptions if name in changed}
        of_finetuning = self.finetuning.variation
        after = {name: words.pop(name) for name in ("delta", "scoring") if name in words}
        return words | of_finetuning | after

    @property
    def model_name(self) -> str:
        """Return the name of the model that the cell runs, which differs from `model` for a control of the weights."""
        return self.model if self.weights == "trained" else control_name(self.model, self.weights, self.seed)


@checked
@document_fields
@dataclass(frozen=True)
class CellResult:
    """A finished cell: its settings, its comparison, and the origin of every number."""

    cell: Cell
    """The settings."""
    comparison: Comparison
    """The metrics, by query and layer."""
    provenance: dict[str, Any]
    """The origin of the numbers: the model's hash or revision and the fingerprint of its weights, the task's
    fingerprint, dtype, precision, device and versions, residuals, seconds by stage, losses, and the rows that were
    drawn."""
    folder: Path
    """The folder that the cell is saved in."""

    def __repr__(self) -> str:
        return f"CellResult({self.folder.name!r}, {self.comparison!r})"

    def _repr_html_(self) -> str:
        comparison = self.comparison._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return f"<p>{html.escape(self.folder.name)}</p>{comparison}"

    def recordings(self) -> Recordings:
        """Return what the metrics were computed from, for a cell that was run with `keep_recordings=True`.

        Raises:
            StudyError: the cell was run without.
        """
        if not (self.folder / RECORDINGS).exists():
            raise StudyError(f"expected {self.folder} with recordings, got none: run it with keep_recordings=True")
        return Recordings.load(self.folder / RECORDINGS)

    def to_frame(self) -> pd.DataFrame:
        """Return the comparison's frame after columns of settings: model, task, k, seed, lr, protocol, variation."""
        frame = self.comparison.to_frame()
        frame.insert(0, "variation", ", ".join(self.cell.variation.values()))
        keys = ("model", "task", "k", "seed", "lr", "protocol")
        for position, key in enumerate(keys):
            frame.insert(position, key, getattr(self.cell, key))
        return frame


class CellResults(list[CellResult]):
    """The finished cells of a study, in order: a list that Jupyter shows as a table."""

    def _repr_html_(self) -> str:
        headlines = [metric.name for metric in metrics().values() if metric.headline]
        by_query = [result.comparison.by_query() for result in self]
        means = {
            name: [float(values[name].nanmean()) if name in values else math.nan for values in by_query]
            for name in headlines
        }
        names = [result.folder.name for result in self]
        texts = {name: [number(value) for value in by_cell] for name, by_cell in means.items()}
        lines = [Line(name, f"cell={len(by_cell)}", "cell", by_cell) for name, by_cell in means.items()]
        caption = f"{len(self)} cells, means over queries"
        return lines_table(caption, lines) + html_table(pd.DataFrame({"cell": names} | texts))


@checked
def load_cell(folder: str | PathLike[str]) -> CellResult:
    """Read a finished cell, of this version or an older one; no model is needed.

    Raises:
        AssetError: the folder is missing or damaged.
        StudyError: the folder holds something other than a cell.
    """
    folder = Path(folder)
    # Settings and numbers are read at once: another process may replace the folder at any time.
    tensors, metadata = load_tensors(folder)
    cell, provenance = read_settings(folder, metadata)
    return CellResult(cell, Comparison.from_saved(tensors, metadata, folder), provenance, folder)


def read_settings(folder: Path, metadata: Mapping[str, Any]) -> tuple[Cell, dict[str, Any]]:
    """Return the cell and the provenance in the metadata of a folder.

    Raises:
        StudyError: the metadata is of something other than a cell, or of a newer version.
    """
    try:
        settings, provenance = metadata["settings"], metadata["provenance"]
        if not is_dict(provenance):
            raise TypeError(f"provenance of type {type(provenance).__name__}")
        return Cell.from_settings(settings), provenance
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(
            f"expected a finished cell in {folder}, got something else ({error!r}): pass a folder that run_cell or "
            "run_study wrote"
        ) from error


def folder_name(name: str) -> str:
    """Return a name as the name of one folder, which is not hidden and which every file system can hold.

    Slashes become `--`; control characters, `:*?"<>|`, which Windows refuses, and halves of surrogate pairs, which
    UTF-8 cannot hold, `-`; dots at the beginning, and dots and spaces at the end, are left out. A name of more than
    `LONGEST_NAME` bytes keeps its end, after a hash of the whole.

    Example:
        >>> folder_name("openai-community/gpt2_sst2"), folder_name("../../etc"), folder_name("C:model. ")
        ('openai-community--gpt2_sst2', '--..--etc', 'C-model')
    """
    dashed = re.sub(r'[\x00-\x1f\x7f:*?"<>|\ud800-\udfff]', "-", re.sub(r"[/\\]", "--", name))
    encoded = (dashed.lstrip(".").rstrip(". ") or "_").encode()
    if len(encoded) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
        encoded = f"{digest}_".encode() + encoded[len(digest) + 1 - LONGEST_NAME :]
    return encoded.decode(errors="ignore")
