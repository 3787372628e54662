"""Studies: run, save and resume a grid of cells, each a comparison of a model on a task, in one folder.

A cell's folder appears complete or not at all, so a study that was stopped continues where it was.
"""

import platform
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from icl_dual.arguments import checked
from icl_dual.assets import check_model_name, local_files
from icl_dual.captures.capture import Capture, capture
from icl_dual.cells import CELL_FILES, RECORDINGS, Cell, CellResult, CellResults, StudyError, load_cell, read_settings
from icl_dual.contexts import matching_training_steps, relabel
from icl_dual.experiment import Experiment, Setting, add_replicas, capture_replicas, capture_settings
from icl_dual.finetuning.replicas import Finetuned, finetune_with_replicas
from icl_dual.models import MOMENTUM_TAG, Model, control_model, load_model
from icl_dual.models.loading import check_devices
from icl_dual.models.placement import DeviceMap
from icl_dual.models.precision import check_arithmetic
from icl_dual.paper_tasks import load_task, registered_task
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts, build_prompts, shared_texts
from icl_dual.provenance import (
    PACKAGES,
    LocalFiles,
    SavedCell,
    check_same_control,
    check_same_model,
    check_same_precision,
    check_same_task,
    model_origin,
    task_origin,
)
from icl_dual.recordings.released_layout import write_recordings
from icl_dual.rows import files_read
from icl_dual.storage import (
    METADATA,
    TENSORS,
    AssetError,
    atomic_folder,
    check_same_settings,
    check_writable,
    finished_folders,
    first_line,
    read_json,
    writing,
)
from icl_dual.tasks import Example, Protocol, Task
from icl_dual.torch_utils import DeviceLostError, lost_device, to_list


@checked
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
    """Run one cell and save it into a folder.

    Args:
        model: the model of the cell's name; for a control, the one that `control_model` returns. Within
            `momentum_attention`, the model's name includes its momentum, and so does the cell's.
        task: the task of the cell's name and protocol.
        cell: the settings.
        folder: the cell's folder, which appears complete or not at all: a new one, or that of this cell, run before.
        context_task: the other task that gives the demonstrations in context, if the cell has one.
        keep_recordings: also save what the metrics are computed from; some megabytes a query for large models.
        progress: show progress bars.

    Raises:
        StudyError: the cell is of another model, task or protocol, has `reference_k_mismatch` under another protocol
            than `reference`, or a text in both demonstrations and queries; or the folder holds something other than a
            cell, or recordings that would be lost.
        SettingsError: the folder holds a cell of other settings, weights or rows.
        AssetError: the folder cannot be written, or holds other files or a damaged cell.
        TaskError: the task has too few rows for k or the number of queries.
        PromptError: the prompts do not fit into the model's context.
        DivergedError: finetuning diverged.
    """
    _check_cell(model, task, context_task, cell)
    draw, origin = _Draw.of(task, context_task, cell), model_origin(model)
    _check_replaceable(Path(folder), draw, cell, origin, keep_recordings)
    return _run_cell(model, cell, draw, Path(folder), _Runs(progress), keep_recordings, origin)


def _check_replaceable(
    folder: Path, draw: "_Draw", cell: Cell, origin: Mapping[str, Any], keep_recordings: bool
) -> None:
    """Raise an error unless a folder can be written, and holds nothing but this cell, run before."""
    check_writable(folder, CELL_FILES)
    if not any((folder / name).exists() for name in (METADATA, TENSORS)):
        return
    saved = _saved(load_cell(folder))
    check_same_settings(folder, asdict(cell), asdict(saved.cell))
    check_same_model(saved, origin)
    for key, task in draw.tasks.items():
        check_same_task(saved, key, task)
    if (folder / RECORDINGS).exists() and not keep_recordings:
        raise StudyError(
            f"expected keep_recordings=True for {folder}, which holds recordings, got False: keep them, or choose "
            "another folder"
        )


def _saved(result: CellResult) -> SavedCell:
    return SavedCell(result.cell, result.provenance, result.folder)


@dataclass(frozen=True)
class _Draw:
    """The rows of a cell, for which no model is needed."""

    task: Task
    """The task of the queries."""
    context_task: Task | None
    """The other task that gives the demonstrations in context, if any."""
    demonstrations: list[Example]
    """The task's own demonstrations."""
    context: list[Example]
    """The demonstrations in context: the task's own, unless the cell is a control of the context."""
    queries: list[Example]
    """The queries."""
    files: Mapping[str, str]
    """The SHA-256 of each local file that the tasks were read from, by path."""

    @property
    def tasks(self) -> dict[str, Task]:
        """Return the tasks, by what they give: `task` the queries, `context_task` the demonstrations in context."""
        return {"task": self.task} | ({} if self.context_task is None else {"context_task": self.context_task})

    @classmethod
    def of(
        cls, task: Task, context_task: Task | None, cell: Cell, files: Mapping[str, str] = MappingProxyType({})
    ) -> "_Draw":
        """Draw a cell's rows, after checking every setting that needs no model."""
        _check_mismatch(cell)
        demonstrations = task.demonstrations(cell.k, cell.seed, balanced=cell.balanced)
        queries = task.queries(cell.n_queries, split=cell.split)
        if context_task is not None:
            context = context_task.demonstrations(cell.k, cell.seed, balanced=cell.balanced)
        elif cell.context != "own":
            context = relabel(demonstrations, cell.context, len(task.label_words), seed=cell.seed)
        else:
            context = demonstrations
        if cell.protocol == "answer" and (shared := shared_texts(context, queries)):
            raise StudyError(
                f"{cell.name}: expected queries and demonstrations with different texts, got {len(shared)} text(s) in "
                "both: choose another context_task"
            )
        return cls(task, context_task, demonstrations, context, queries, files)


@dataclass(frozen=True)
class _CellPrompts:
    """The prompts of a cell."""

    prompts: Prompts
    """The queries with the task's own demonstrations."""
    in_context: Prompts
    """The queries with the demonstrations in context."""
    finetuning: Prompts
    """The prompts that finetuning trains on the demonstrations of."""
    steps: tuple[int, ...] | None
    """The training step that each demonstration in context corresponds to, where it is not its own."""

    @classmethod
    def of(cls, model: Model, draw: _Draw, cell: Cell) -> "_CellPrompts":
        """Tokenise a cell's rows for a model."""
        task, queries = draw.task, draw.queries
        options: dict[str, Any] = {"reference_k_mismatch": cell.reference_k_mismatch, "scoring": cell.scoring}
        prompts = build_prompts(model, task, draw.demonstrations, queries, **options)
        if draw.context_task is not None:
            other = build_prompts(model, task, draw.context, queries, demonstration_task=draw.context_task, **options)
            return cls(prompts, other, prompts, (-1,) * len(other.demonstrations))
        if cell.context == "own":
            return cls(prompts, prompts, prompts, None)
        changed = build_prompts(model, task, draw.context, queries, **options)
        if cell.finetuned_on == "context":
            return cls(prompts, changed, changed, None)
        steps = matching_training_steps(changed, prompts, cell.k, cell.context, seed=cell.seed)
        return cls(prompts, changed, prompts, tuple(steps))


def _check_mismatch(cell: Cell) -> None:
    """Raise a StudyError where a cell has the reference protocol's mismatch of k under another protocol."""
    if cell.reference_k_mismatch and cell.protocol != "reference":
        raise StudyError(
            f"{cell.name}: expected reference_k_mismatch with protocol='reference' only, got "
            f"protocol={cell.protocol!r}: leave one of them out"
        )


def _check_cell(model: Model, task: Task, context_task: Task | None, cell: Cell) -> None:
    """Raise a StudyError unless model and tasks are the cell's."""
    expected, given = (cell.model_name, cell.task, cell.protocol), (model.name, task.name, task.protocol)
    if given != expected:
        advice = "pass the model and task of the cell's names"
        if cell.weights != "trained":
            advice = "make the model with control_model, by the cell's weights and seed"
        if (MOMENTUM_TAG in cell.model) != (MOMENTUM_TAG in model.name):
            advice = (
                "within `with momentum_attention(model, eta):`, the model's name includes its momentum, and so must "
                "the cell's: Cell(model=model.name, …)"
            )
        raise StudyError(f"expected model, task and protocol {expected}, got {given}: {advice}")
    if (name := context_task and context_task.name) != cell.context_task:
        raise StudyError(
            f"expected the cell's context_task {cell.context_task!r} as context_task=, got {name!r}: pass the task of "
            "this name"
        )


def _run_cell(
    model: Model,
    cell: Cell,
    draw: _Draw,
    folder: Path,
    runs: "_Runs",
    keep_recordings: bool,
    origin: Mapping[str, Any],
) -> CellResult:
    """Run a cell, reusing what `runs` has of it, and save it with the model's origin."""
    of_cell = _CellPrompts.of(model, draw, cell)
    experiment = runs.experiment(model, cell, of_cell)
    with runs.clock("metrics"):
        comparison = experiment.compare(seed=cell.seed)
    provenance = {**origin, **_provenance(model, draw, experiment, runs.clock.seconds)}
    about = {"settings": asdict(cell), "provenance": provenance}
    _check_replaceable(folder, draw, cell, origin, keep_recordings)  # another run may have finished there since
    with atomic_folder(folder) as scratch:
        comparison.save(scratch, about)
        if keep_recordings:
            recordings = experiment.recordings()
            replace(recordings, metadata=recordings.metadata | about).save(scratch / RECORDINGS)
    return load_cell(folder)


def _provenance(model: Model, draw: _Draw, experiment: Experiment, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the origin of a cell's numbers beside the model's own, as JSON values."""
    captures = (experiment.zero_shot, experiment.in_context, experiment.finetuned)
    in_context = experiment.in_context.prompts
    return {
        **task_origin(draw.tasks),
        **({"task_files": dict(draw.files)} if draw.files else {}),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": str(model.device),
        **({} if model.momentum is None else {"momentum": to_list(model.momentum)}),
        "attention_residual": max(capture.residual for capture in captures),
        "pass_residual": model.pass_residual,
        "seconds": seconds,
        "prefix_tokens": len(in_context.prefix),
        "query_tokens": sum(map(len, in_context.suffixes)),
        "k_in_context": len(in_context.demonstrations),
        "shared_texts": len(shared_texts([*draw.demonstrations, *draw.context], draw.queries)),
        "label_words": draw.task.label_words,
        "losses": to_list(experiment.delta.losses),
        "replicas": list(experiment.replica_names),
        "diverged_replicas": list(experiment.diverged.values()),
        "massive_activations": experiment.massive_activations().overall(),
        "demonstrations": [example.key for example in draw.demonstrations],
        "context": [(example.key, example.label) for example in draw.context],
        "queries": [example.key for example in draw.queries],
    }


@checked
def run_study(
    cells: Sequence[Cell],
    folder: str | PathLike[str],
    *,
    tasks: Sequence[Task] = (),
    models: Sequence[Model] = (),
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype = torch.float32,
    arithmetic: torch.dtype | None = None,
    keep_recordings: bool = False,
    progress: bool = True,
) -> list[CellResult]:
    """Run a grid of cells, each into a folder of its own; cells that are complete are read and not run again.

    Everything that needs no model is checked before the first one is loaded. Models and tasks are loaded only if a cell
    is not complete, one model at a time. A cell reuses the captures and the finetuning that it shares with the cell
    before it: a control directly after the cell that it is a control of costs only the run that differs.

    Args:
        cells: the settings; a cell given twice is run and returned once.
        folder: the study's folder, new or of the same study before.
        tasks: tasks of your own that cells name, such as one read from a CSV file. A name given here takes precedence
            over a known task's.
        models: models of your own that cells name, with their own device and precision. A name given here takes
            precedence over what `load_model` would load.
        device: the device to load models to; the CPU by default.
        device_map: for models that do not fit on one device, instead of `device`, as in `load_model`.
        dtype: the dtype to load models in.
        arithmetic: the dtype of the computation, as in `load_model`; by default that of the weights.
        keep_recordings: also save what the metrics are computed from; a cell then is complete only with its recordings.
        progress: show progress bars.

    Returns:
        The finished cells, in the order of `cells`.

    Raises:
        StudyError: two cells would share a folder, two tasks or models a name; a task is passed in with another
            protocol than a cell's; or a cell's settings cannot be run, as in `run_cell`.
        SettingsError: a complete cell has other settings, weights, tokenizer or rows, or another cell in the folder was
            run with another model or other rows of the same name; the message names what differs.
        TaskError: a task is unknown, or has too few rows for k or the number of queries.
        AssetError: a model's name is unknown, model or rows cannot be fetched, the folder cannot be written, or a cell
            in it is damaged.
        PromptError: the prompts of a cell do not fit into its model's context.
        DivergedError: the finetuning of a cell diverged.
        DeviceLostError: the accelerator was lost in a cell; those finished before are saved.
        ValueError: `arithmetic` does not fit `dtype`, both `device` and `device_map` are given, or `load_model` refuses
            one of them.

    Example:
        >>> import icl_dual, tempfile
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> cells = [icl_dual.Cell("tiny", "films", k=2, seed=seed, lr=0.01, n_queries=5) for seed in (1, 2)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = icl_dual.run_study(cells, folder, tasks=[task], models=[tiny_model()], progress=False)
        >>> [result.cell.seed for result in results]
        [1, 2]
    """
    check_arithmetic(dtype, arithmetic)
    plan = _Plan.of(cells, Path(folder), tasks, models, dtype, arithmetic, keep_recordings)
    if any(cell.model not in plan.models for cell in plan.draws):  # finished cells and one's own models need no device
        check_devices(device, device_map)
    kept = _Kept(plan.models, _loader(device, device_map, dtype, arithmetic), progress)
    results = dict(plan.finished)
    with progress_bar(initial=len(results), total=len(plan.folders), show=progress, leave=True, unit="cell") as bar:
        for cell, draw in plan.draws.items():
            bar.set_description(f"{cell.model_name} {cell.task} k={cell.k} seed={cell.seed} lr={cell.lr:g}")
            with _naming_lost_devices(cell):
                model, origin = kept.model(cell, plan.check_same_model)
                results[cell] = _run_cell(model, cell, draw, plan.folders[cell], kept.runs, keep_recordings, origin)
            bar.update()
    return CellResults(results[cell] for cell in plan.folders)


@checked
def export_recordings(
    study: CellResult | Sequence[CellResult], folder: str | PathLike[str], *, progress: bool = True
) -> None:
    """Write the recordings of cells in the released code's layout, for the released scripts to read.

    Args:
        study: a finished cell, of which `zs`, `icl`, `ftzs` and `ft` are written into `folder`; or several, each
            written into a folder of the cell's name inside it. All were run with `keep_recordings=True`.
        folder: a new folder, or one that such recordings were written into.
        progress: show a progress bar.

    Raises:
        StudyError: a cell has no recordings.
        RecordingError: separators are not one token each, which the layout requires.
        AssetError: the folder holds other files.
    """
    if isinstance(study, CellResult):
        write_recordings(study.recordings(), folder, progress=progress)
        return
    for result in study:
        write_recordings(result.recordings(), Path(folder) / result.cell.name, progress=progress)


@dataclass(frozen=True)
class _Plan:
    """A study after every check that needs no model: which cells are finished, and the rows of the others."""

    folders: dict[Cell, Path]
    """The folder of each cell, in the order given."""
    saved: list[SavedCell]
    """Those of the cells that were saved before."""
    others: list[SavedCell]
    """The other cells in the study's folder."""
    finished: dict[Cell, CellResult]
    """The cells that are complete."""
    draws: dict[Cell, _Draw]
    """The rows of each cell that is to run."""
    models: dict[str, Model]
    """The models passed in, by name."""

    @classmethod
    def of(
        cls,
        cells: Sequence[Cell],
        folder: Path,
        tasks: Sequence[Task],
        models: Sequence[Model],
        dtype: torch.dtype,
        arithmetic: torch.dtype | None,
        keep_recordings: bool,
    ) -> "_Plan":
        """Check a study and draw the rows of the cells that are to run."""
        with writing(folder):  # its name may be too long
            is_file = folder.exists() and not folder.is_dir()
        if is_file:
            raise StudyError(f"expected a folder for the study, got the file {folder}: choose another path")
        folders = {cell: cell.folder_in(folder) for cell in cells}
        if len(set(folders.values())) < len(folders):
            raise StudyError(
                "expected cells that differ in model, task, k, seed, lr, protocol or control, got two that would share "
                "a folder: run cells that differ in queries, balance, split, source, mismatch, scoring or replicas as "
                "studies in folders of their own"
            )
        models_by_name = {model.name: model for model in models}
        if len(models_by_name) < len(models):
            names = [model.name for model in models]
            raise StudyError(f"expected models of different names, got {names}: name them with Model(…, name=…)")
        files = LocalFiles()
        known_tasks, known_models = _Tasks(tasks, files), _Models(models_by_name, files, dtype, arithmetic)
        study_folders = finished_folders(folder)
        saved = {cell: _load_same(cell, path, known_models) for cell, path in folders.items() if path.exists()}
        finished = {
            cell: result
            for cell, result in saved.items()
            if not keep_recordings or (result.folder / RECORDINGS).exists()
        }
        draws: dict[Cell, _Draw] = {}
        for cell, path in folders.items():
            if cell not in finished:
                check_writable(path, CELL_FILES)
                _check_model(cell, models_by_name)
                draws[cell] = known_tasks.draw(cell)
        others = _saved_cells(set(study_folders) - set(folders.values())) if draws else []
        for cell in (*map(_saved, saved.values()), *others):
            known_tasks.check_same(cell)
        for cell in others:
            known_models.check_same(cell, any_precision=True)
        return cls(folders, [*map(_saved, saved.values())], others, finished, draws, models_by_name)

    def check_same_model(self, model: Model, origin: Mapping[str, Any]) -> None:
        """Raise a SettingsError where a cell of this model's name was run with other weights or another precision."""
        for cells, any_precision in ((self.saved, False), (self.others, True)):
            for saved in cells:
                if saved.cell.model_name == model.name:
                    check_same_model(saved, origin, any_precision=any_precision)


def _saved_cells(folders: Iterable[Path]) -> list[SavedCell]:
    """Return the cells among folders of all kinds, without their numbers."""
    cells: list[SavedCell] = []
    for folder in folders:
        with suppress(AssetError, StudyError):  # something else, or a damaged cell: reading it says so
            cells.append(SavedCell(*read_settings(folder, read_json(folder / METADATA)), folder))
    return cells


class _Models:
    """The models of a study as they are known without loading: those passed in, and the files of local ones."""

    def __init__(
        self, passed: Mapping[str, Model], files: LocalFiles, dtype: torch.dtype, arithmetic: torch.dtype | None
    ) -> None:
        self.passed, self.dtype, self.arithmetic = passed, dtype, arithmetic
        self.files = files

        @cache
        def origin(name: str) -> dict[str, Any]:
            return model_origin(passed[name])

        self.origin = origin

    def check_same(self, saved: SavedCell, *, any_precision: bool = False) -> None:
        """Raise a SettingsError where a cell was run with another model of its name, or in another precision."""
        cell = saved.cell
        if cell.model not in self.passed:
            if not any_precision:
                check_same_precision(saved, self.dtype, self.arithmetic)
            self.files.check_same_model(saved)
        elif cell.weights == "trained":
            check_same_model(saved, self.origin(cell.model), any_precision=any_precision)
        else:
            check_same_control(saved, self.origin(cell.model), any_precision=any_precision)


class _Tasks:
    """The tasks of a study, each loaded once: those passed in, and known ones."""

    def __init__(self, tasks: Sequence[Task], files: LocalFiles) -> None:
        self.passed = {(task.name, task.protocol): task for task in tasks}
        if len(self.passed) < len(tasks):
            names = [(task.name, task.protocol) for task in tasks]
            raise StudyError(f"expected tasks of different names or protocols, got {names}: rename one")
        self.loaded: dict[tuple[str, str | None, Protocol], Task] = {}
        self.local_files = files
        self.files: dict[tuple[str, str | None, Protocol], dict[str, str]] = {}
        """The SHA-256 of each local file that a task was read from, by path."""

    def draw(self, cell: Cell) -> _Draw:
        """Draw a cell's rows.

        Raises:
            StudyError: a task was passed in with another protocol only, or the cell names a source for it.
            TaskError: a task is unknown, or has too few rows.
        """
        task, context_task = self.of_cell(cell)
        files: dict[str, str] = {}
        for name in (cell.task, cell.context_task):
            files |= {} if name is None else self.files.get((name, cell.source, cell.protocol), {})
        return _Draw.of(task, context_task, cell, files)

    def of_cell(self, cell: Cell) -> tuple[Task, Task | None]:
        """Return a cell's task, and the other task that gives its demonstrations in context, if any.

        Raises:
            StudyError: a task was passed in with another protocol only, or the cell names a source for it.
            TaskError: a task is unknown.
        """
        names = [cell.task] if cell.context_task is None else [cell.task, cell.context_task]
        if cell.source is not None and any((name, cell.protocol) in self.passed for name in names):
            raise StudyError(
                f"{cell.name}: expected source=None for tasks that are passed in with their rows, got "
                f"source={cell.source!r}: leave source out"
            )
        tasks = [self._task(name, cell) for name in names]
        return tasks[0], tasks[1] if cell.context_task is not None else None

    def check_same(self, saved: SavedCell) -> None:
        """Raise a SettingsError if a saved cell has other rows, templates or label words than its tasks have now.

        A task is loaded only where a local file that it was read from has changed.
        """
        cell, has_changed = saved.cell, self.local_files.have_tasks_changed(saved)
        for key, name in (("task", cell.task), ("context_task", cell.context_task)):
            task = None if name is None else self._task(name, cell) if has_changed else self._at_hand(name, cell)
            if task is not None:
                check_same_task(saved, key, task)

    def _task(self, name: str, cell: Cell) -> Task:
        if (task := self._at_hand(name, cell)) is not None:
            return task
        if other := [protocol for passed, protocol in self.passed if passed == name]:
            raise StudyError(
                f"{cell.name}: expected the task {name!r} with protocol={cell.protocol!r}, got one with "
                f"protocol={other[0]!r}: pass a Task with the cell's protocol"
            )
        key = name, cell.source, cell.protocol
        with files_read() as self.files[key]:
            self.loaded[key] = load_task(name, cell.source, protocol=cell.protocol)
        return self.loaded[key]

    def _at_hand(self, name: str, cell: Cell) -> Task | None:
        """Return the task if it is there without loading anything."""
        if (task := self.passed.get((name, cell.protocol))) is not None:
            return task
        if (task := self.loaded.get((name, cell.source, cell.protocol))) is not None:
            return task
        # With a source, `load_task` says that a registered task has rows of its own.
        registered = registered_task(name) if cell.source is None else None
        return registered if registered is not None and registered.protocol == cell.protocol else None


def _check_model(cell: Cell, models: Mapping[str, Model]) -> None:
    """Raise an error unless a cell's model was passed in, or has a name that `load_model` may know."""
    if cell.model in models:
        return
    if MOMENTUM_TAG in cell.model:
        raise StudyError(
            f"expected a cell's model as it is loaded, got {cell.model!r}, a model with momentum: pass the model "
            "within `with momentum_attention(model, eta):` as run_study(models=[model]), or use icl_dual.run_cell there"
        )
    try:
        check_model_name(cell.model)
    except AssetError as error:
        raise AssetError(f"{error}, or pass a Model of this name as run_study(models=[model])") from error


class _Kept:
    """The model of the last cell, and the runs that the next one may share with it."""

    def __init__(self, models: Mapping[str, Model], load: Callable[[str], Model], progress: bool) -> None:
        self.models, self.load, self.runs = models, load, _Runs(progress)
        self.current: dict[str, tuple[Model, dict[str, Any]]] = {}

    def model(self, cell: Cell, check: Callable[[Model, dict[str, Any]], None]) -> tuple[Model, dict[str, Any]]:
        """Return a cell's model and its origin: the last cell's, or one that is made, and checked, now."""
        name = cell.model_name
        if name not in self.current:
            self.current.clear()
            self.current[name] = _make_model(cell, self.models.get(cell.model), self.load)
            check(*self.current[name])
        return self.current[name]


@contextmanager
def _naming_lost_devices(cell: Cell) -> Generator[None]:
    """Raise a DeviceLostError where the device is lost within the block, whatever error that led to."""
    handled = sys.exception()  # a GPU that was lost before, where the caller goes on with the CPU in an `except` block
    try:
        yield
    except Exception as error:
        if (cause := lost_device(error, handled=handled)) is None:
            raise
        raise DeviceLostError(
            f"{cell.name}: expected a device that computes until the end, got {first_line(cause)!r}, after which this "
            "process cannot use it any more: finished cells are saved, run the same call in a new process to go on"
        ) from error


class CellRunner:
    """Runs cells one at a time, as `run_study` does, for callers that choose the next cell themselves.

    The model stays loaded while cells share it, and a control directly after the cell that it is a control of costs
    only the run that differs.
    """

    @checked
    def __init__(
        self,
        *,
        tasks: Sequence[Task] = (),
        models: Sequence[Model] = (),
        device: str | torch.device | None = None,
        device_map: DeviceMap | None = None,
        dtype: torch.dtype = torch.float32,
        arithmetic: torch.dtype | None = None,
        keep_recordings: bool = False,
        progress: bool = True,
    ) -> None:
        check_arithmetic(dtype, arithmetic)
        check_devices(device, device_map)
        self._tasks, self._models = _Tasks(tasks, LocalFiles()), {model.name: model for model in models}
        self._kept = _Kept(self._models, _loader(device, device_map, dtype, arithmetic), progress)
        self._keep_recordings = keep_recordings

    @checked
    def check(self, cell: Cell) -> None:
        """Check that a cell's rows can be drawn and that its model's name is known; no model is loaded.

        Raises:
            StudyError, TaskError, AssetError: as `run_study` does.
        """
        _check_model(cell, self._models)
        self._tasks.draw(cell)

    @checked
    def run(self, cell: Cell, folder: str | PathLike[str]) -> CellResult:
        """Run a cell and save it into a folder, new or of the same cell.

        Raises:
            StudyError, TaskError, AssetError, PromptError, SettingsError, DivergedError, DeviceLostError: as
                `run_study` does.
        """
        folder = Path(folder)
        check_writable(folder, CELL_FILES)
        _check_model(cell, self._models)
        draw = self._tasks.draw(cell)
        with _naming_lost_devices(cell):
            model, origin = self._kept.model(cell, lambda model, origin: None)
            return _run_cell(model, cell, draw, folder, self._kept.runs, self._keep_recordings, origin)


def _loader(
    device: str | torch.device | None, device_map: DeviceMap | None, dtype: torch.dtype, arithmetic: torch.dtype | None
) -> Callable[[str], Model]:
    """Return what loads a model by its name."""
    return lambda name: load_model(name, device=device, device_map=device_map, dtype=dtype, arithmetic=arithmetic)


def _make_model(cell: Cell, passed: Model | None, load: Callable[[str], Model]) -> tuple[Model, dict[str, Any]]:
    """Return a cell's model and its origin.

    The model is the one passed in or loaded by name, or a control of it, after which it can be freed.
    """
    files: dict[str, Any] = {}
    if passed is None:
        files = {"model_files": local_files(cell.model)}  # before they are read: a later change is seen
        passed = load(cell.model)
    model = passed if cell.weights == "trained" else control_model(passed, cell.weights, seed=cell.seed)
    return model, model_origin(model) | files


class _Clock:
    """Measures seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Generator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)


@dataclass
class _Runs:
    """The finetunings and captures that cells share, by stage.

    While cells have the same demonstrations of their own, the first result of each stage and the latest are kept, so
    that a control costs only the run that differs from the cell it is a control of.
    """

    progress: bool
    """Whether to show progress bars."""
    clock: _Clock = field(default_factory=_Clock)
    """The seconds of the current cell's stages."""
    demonstrated: Any = None
    """The model's name and the prompts with the task's own demonstrations, of the current cell."""
    kept: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict[str, list[tuple[Any, Any]]])
    """By stage: each kept result after everything that decides it."""

    def experiment(self, model: Model, cell: Cell, of_cell: _CellPrompts) -> Experiment:
        """Return a cell's experiment, of which only the runs that are not kept are made."""
        zero_shot = of_cell.prompts.zero_shot()
        self._begin(model, of_cell.prompts)
        # Finetuning first: a learning rate that diverges then costs no captures.
        finetuned = self._finetuned(model, of_cell.finetuning, cell)
        applied = cell.lr, cell.finetuning, cell.delta, of_cell.finetuning.training_sequences

        def run(setting: Setting, prompts: Prompts) -> Capture:
            return self._captured(setting, model, prompts, with_delta=applied if setting == "FT" else None)

        experiment = capture_settings(model, of_cell.in_context, zero_shot, finetuned.delta, run, steps=of_cell.steps)
        if not cell.replicas:
            return experiment
        key = model.name, model.fingerprint(), applied, cell.replicas, zero_shot
        captures = self._once(
            "replicas",
            key,
            lambda: capture_replicas(model, zero_shot, finetuned.replicas, progress=self.progress),
        )
        return add_replicas(experiment, finetuned, captures)

    def _begin(self, model: Model, prompts: Prompts) -> None:
        """Start a cell; other demonstrations than the last cell's drop what is kept, except the zero-shot capture."""
        if self.demonstrated != (demonstrated := (model.name, prompts)):
            self.demonstrated, self.kept = demonstrated, {"ZSL": self.kept.get("ZSL", [])[-1:]}
        self.clock = _Clock()

    def _captured(self, setting: str, model: Model, prompts: Prompts, *, with_delta: Any = None) -> Capture:
        """Return a capture of the prompts by the model with the delta that is applied to it now."""
        key = model.name, model.fingerprint(), with_delta, prompts
        return self._once(setting, key, lambda: capture(model, prompts, progress=self.progress))

    def _finetuned(self, model: Model, prompts: Prompts, cell: Cell) -> Finetuned:
        """Return a cell's finetuning with its replicas, or random deltas of their norms where the cell says so."""
        options: dict[str, Any] = {"lr": cell.lr, "config": cell.finetuning, "replicas": cell.replicas}
        trained_on = prompts.start, prompts.training_sequences, prompts.demonstration_label_lengths
        key = model.name, model.fingerprint(), trained_on, options
        finetuned: Finetuned = self._once(
            "finetuning", key, lambda: finetune_with_replicas(model, prompts, **options, progress=self.progress)
        )
        return finetuned.randomised(cell.seed) if cell.delta == "random" else finetuned

    def _once(self, stage: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return the result that is kept under a key, or make it and keep it as the latest."""
        kept = self.kept.setdefault(stage, [])
        for kept_key, result in kept:
            if kept_key == key:
                return result
        del kept[1:]
        with self.clock(stage):
            kept.append((key, make()))
        return kept[-1][1]


def _load_same(cell: Cell, folder: Path, known_models: _Models) -> CellResult:
    """Load a saved cell, or raise a SettingsError where it has other settings, another precision or other weights."""
    result = load_cell(folder)
    check_same_settings(folder, asdict(cell), asdict(result.cell))
    known_models.check_same(_saved(result))
    return result
