"""A grid: models × tasks × k × seeds × rates × protocols × precisions × controls, as cells with stable ids."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product
from typing import Any, Literal, NamedTuple

import torch

from icl_dual.arguments import Count, Index, NameOrPath, Rate, Seed, checked
from icl_dual.assets import AssetError, check_model_name
from icl_dual.cells import Cell, StudyError, folder_name
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig, Lora
from icl_dual.finetuning.replicas import REPLICAS
from icl_dual.models.placement import DISK
from icl_dual.paper_tasks import PAPER_K, check_task_name
from icl_dual.scoring import Scoring
from icl_dual.tasks import Protocol, Split, TaskError
from icl_dual.type_guards import is_iterable, is_mapping

Precision = Literal[
    "float32", "float64", "bfloat16", "float16", "bfloat16 storage, float32 arithmetic",
    "float16 storage, float32 arithmetic",
]  # fmt: skip
"""The dtype of weights and computation, in the words in which cells save it."""

DEVICES = ("cpu", "cuda")
"""The kinds of devices that a grid may name."""

PLAIN = "plain"
"""The name of the cell that controls are compared with."""


class GridError(StudyError):
    """A grid with unknown keys or impossible combinations, all of which it lists, or a grid that cannot be run."""

    def __init__(self, message: str, problems: Sequence["Problem"] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class Problem(NamedTuple):
    """One thing that is wrong in a grid."""

    key: tuple[str, ...]
    """Where: the key, after the tables that it is in."""
    text: str
    """What was expected, what was given, and what to do."""


class GridCell(NamedTuple):
    """One cell of a grid."""

    id: str
    """The name of the cell's folder: `Cell.name`, and the precision where it is not float32."""
    cell: Cell
    """The settings."""
    precision: str
    """The precision, one of `Precision`."""
    control: str
    """The name of the control, or `plain`."""

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype | None]:
        """Return the dtype of the weights, and that of the computation where it is another."""
        storage, _, arithmetic = self.precision.partition(" storage, ")
        return getattr(torch, storage), torch.float32 if arithmetic else None

    @property
    def group(self) -> str:
        """Return what cells that can use one loaded model have in common."""
        return f"{self.cell.model_name} in {self.precision}"


@checked
@document_fields
@dataclass(frozen=True)
class Grid:
    """The settings of many cells: every combination of what is listed, with and without each control.

    Raises:
        GridError: combinations are impossible, or two cells have one id; the message lists every problem.

    Example:
        >>> grid = Grid(models=["smollm2-135m"], tasks=["sst2"], k=4, seeds=[1, 2], rates=[0.01, 0.001],
        ...             controls={"flipped": {"context": "flipped labels"}})
        >>> len(grid.cells())
        8
        >>> grid.cells()[0].id
        'smollm2-135m_sst2_k4_seed1_lr0.01_answer'
    """

    models: Sequence[NameOrPath]
    """The models' names, as `load_model` takes them."""
    tasks: Sequence[NameOrPath]
    """The tasks' names, as `load_task` takes them."""
    k: Count | Sequence[Count] | Mapping[str, Count | Sequence[Count]] | None = None
    """The numbers of demonstrations, for all tasks or by task; `None` for the paper's of each task."""
    seeds: Sequence[Seed] = (1,)
    """The seeds of the demonstrations, of controls and of random baselines."""
    rates: Rate | Sequence[Rate] | Mapping[str, Rate | Sequence[Rate]] = (0.001,)
    """The learning rates, for all tasks or by task."""
    protocols: Sequence[Protocol] = ("answer",)
    """How rows are drawn and written, and the recorded position (`Cell.protocol`)."""
    precision: Precision | Sequence[Precision] = "float32"
    """The precisions."""
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """By name: the settings in which a control differs from the plain cell, fields of `Cell`. `finetuning` may be a
    table; `context_task` may be a table by task."""
    finetuning: FinetuneConfig = PAPER_FINETUNING
    """How to finetune."""
    n_queries: Count | None = 100
    """The number of queries; `None` for all of the split."""
    balanced: bool = False
    """Whether as many demonstrations of each class are drawn."""
    split: Split = "evaluation"
    """The pool that queries come from."""
    source: NameOrPath | None = None
    """The source of the tasks' rows (`Cell.source`)."""
    reference_k_mismatch: bool = False
    """Whether finetuning also trains on demonstrations that are left out of a full context (`Cell`)."""
    replicas: int = REPLICAS
    """How often to repeat each finetuning, which shows how stable each metric is: at least 2, or 0 for none."""
    scoring: Scoring = "mean"
    """The rule by which predictions follow from log-probabilities (`icl_dual.scoring`)."""
    device: str = "cpu"
    """The device of the models, such as `cpu` or `cuda`."""
    device_map: Literal["auto"] | Mapping[str, str] | None = None
    """For models that do not fit on one device, instead of `device`, as in `load_model`; devices by name."""
    keep_recordings: bool = False
    """Whether to save what the metrics are computed from; some megabytes a query for large models."""
    cpus: Count = 1
    """The number of CPUs that a cell is planned with."""
    gpus: Index | None = None
    """The number of GPUs that a cell is planned with; `None` for those that `device` or `device_map` names, where
    `auto` counts as one: 0 runs it on a CPU."""
    memory_gb: Rate | None = None
    """The memory that a cell is planned with, in GB; `None` for an estimate from the model's files."""

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "seeds", "protocols"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        cells, problems = self._expand()
        if problems:
            raise GridError(in_words(problems), problems)
        object.__setattr__(self, "_cells", cells)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Return the precisions, each once."""
        return tuple(dict.fromkeys((self.precision,) if isinstance(self.precision, str) else self.precision))

    @property
    def task_names(self) -> set[str]:
        """Return the names of all tasks, also of those that only give demonstrations in context."""
        names = {name for cell in self.cells() for name in (cell.cell.task, cell.cell.context_task)}
        return {name for name in names if name is not None}

    def cells(self) -> list[GridCell]:
        """Return the cells, ordered so that neighbours share the model, and controls follow the cell they vary."""
        return list(self._cells)  # type: ignore[attr-defined]

    @checked
    def cell(self, cell_id: str) -> GridCell:
        """Return the cell with an id.

        Raises:
            GridError: the grid has none.
        """
        try:
            return self._by_id[cell_id]
        except KeyError:
            raise GridError(
                f"expected the id of one of the grid's {len(self._by_id)} cells, got {cell_id!r}: see `plan`"
            ) from None

    @property
    def _by_id(self) -> dict[str, GridCell]:
        if "_index" not in vars(self):
            object.__setattr__(self, "_index", {cell.id: cell for cell in self.cells()})
        return vars(self)["_index"]

    def _expand(self) -> tuple[list[GridCell], list[Problem]]:
        """Return all cells that are possible, and everything that is wrong."""
        controls, of_controls = self._controls()
        of_axes = [*self._problems_of_axes()]
        problems = [*self._problems_of_names(), *of_axes, *of_controls]
        if of_axes:
            return [], _once(problems)
        wrong = {problem.key[1] for problem in of_controls}  # their combinations cannot be told
        controls = {name: settings for name, settings in controls.items() if name not in wrong}
        cells: list[GridCell] = []
        for model, precision, task, protocol, seed in product(
            self.models, self.precisions, self.tasks, self.protocols, self.seeds
        ):
            for k, rate in product(_of_task(self.k, task, PAPER_K.get(task)), _of_task(self.rates, task, None)):
                axes = {"model": model, "task": task, "k": k, "seed": seed, "lr": rate, "protocol": protocol}
                for name, settings in controls.items():
                    try:
                        cell = self._make(axes, settings)
                    except ValueError as error:
                        problems.append(Problem(_key(name, error), _text(name, error)))
                    else:
                        cells.append(GridCell(_id(cell, precision), cell, precision, name))
        problems += _shared_ids(cells)
        cells.sort(key=lambda cell: (self.models.index(cell.cell.model), self.precisions.index(cell.precision),
                                     cell.cell.weights == "trained", cell.group))  # fmt: skip
        return cells, _once(problems)

    def _make(self, axes: Mapping[str, Any], settings: Mapping[str, Any]) -> Cell:
        common = {name: getattr(self, name) for name in _COMMON}
        of_control = dict(settings)
        if isinstance(of_control.get("context_task"), Mapping):
            of_control["context_task"] = of_control["context_task"].get(axes["task"])
        cell = Cell(**{**axes, **common, **of_control})
        _check_demonstrations(cell.finetuning, cell.k)
        if cell.reference_k_mismatch and cell.protocol != "reference":
            raise StudyError(
                "expected reference_k_mismatch with the protocol 'reference' only, got "
                f"{cell.protocol!r}: leave one of them out"
            )
        return cell

    def _controls(self) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
        """Return the settings of the plain cell and of each control, and what is wrong with them."""
        controls, problems = {PLAIN: dict[str, Any]()}, list[Problem]()
        known = {f.name for f in fields(Cell)} - {"model", "task", "seed"}
        for name, settings in self.controls.items():
            if name == PLAIN:
                problems.append(Problem(("controls", name), f"expected a control under another name than {PLAIN!r}"))
            problems += [
                Problem(("controls", name, key), f"expected a setting of a cell, got {key!r}: {advise(key, known)}")
                for key in settings
                if key not in known
            ]
            controls[name] = {key: value for key, value in settings.items() if key in known}
            if isinstance(table := settings.get("finetuning"), Mapping):
                config, of_table = finetuning_of({**_plain(self.finetuning), **table}, ("controls", name, "finetuning"))
                problems += of_table
                controls[name]["finetuning"] = config
        return controls, problems

    def _problems_of_names(self) -> Iterator[Problem]:
        if self.device.partition(":")[0] not in DEVICES:
            yield Problem(("device",), f"expected device as one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.device_map is not None and self.device != "cpu":
            yield Problem(
                ("device_map",),
                f"expected device or device_map, got device={self.device!r} and device_map={self.device_map!r}: leave "
                "out device, the map says where models run",
            )
        if is_mapping(self.device_map):
            if not self.device_map:
                yield Problem(("device_map",), "expected device_map with at least one entry, got none: pass 'auto'")
            for name, place in self.device_map.items():
                if place.partition(":")[0] not in (*DEVICES, DISK):
                    known = ", ".join((*DEVICES, DISK))
                    yield Problem(("device_map", name), f"expected a device as one of {known}, got {place!r}")
        for model in self.models:
            if not model:
                yield Problem(("models",), "expected the name of a model, got an empty string")
        for name, value in (("k", self.k), ("rates", self.rates)):
            for task in value if isinstance(value, Mapping) else ():
                if task not in self.tasks:
                    yield Problem((name, task), f"expected {name} by the grid's tasks, got {task!r}: add it to tasks")

    def _problems_of_axes(self) -> Iterator[Problem]:
        for name in ("models", "tasks", "seeds", "protocols"):
            if not getattr(self, name):
                yield Problem((name,), f"expected {name} with at least one value, got none")
        if not self.precisions:
            yield Problem(("precision",), "expected precision with at least one value, got none")
        for task in self.tasks:
            if not _of_task(self.k, task, PAPER_K.get(task)):
                yield Problem(("k",), f"expected k for the task {task!r}, which the paper has none for: give it")
            if not _of_task(self.rates, task, None):
                yield Problem(("rates",), f"expected rates for the task {task!r}, got none: give at least one")


_COMMON = ("n_queries", "balanced", "split", "source", "reference_k_mismatch", "replicas", "scoring", "finetuning")
"""The fields of a cell that all cells of a grid share, except where a control says otherwise."""


@checked
def check_names(grid: Grid, models: Sequence[str] = (), tasks: Sequence[str] = ()) -> None:
    """Check that models and tasks of every name can be loaded, without loading or fetching any.

    Args:
        grid: the grid.
        models: the names of models that are passed in, which are not checked.
        tasks: the names of tasks that are passed in, which are not checked.

    Raises:
        GridError: names that are no model's or task's; the message lists them.
    """
    problems: list[Problem] = []
    for key, check, names in (
        ("models", check_model_name, set(grid.models) - set(models)),
        ("tasks", check_task_name, grid.task_names - set(tasks)),
    ):
        for name in sorted(names):
            try:
                check(name)
            except (AssetError, TaskError) as error:
                problems.append(Problem((key,), str(error)))
    if problems:
        raise GridError(in_words(problems), problems)


def finetuning_of(table: Mapping[str, Any], key: tuple[str, ...]) -> tuple[FinetuneConfig, list[Problem]]:
    """Return the finetuning that a table says, and what is wrong with it."""
    known, of_lora = set(vars(PAPER_FINETUNING)), set(vars(Lora()))
    settings, lora = dict(table), table.get("lora")
    problems = [
        Problem((*key, name), f"expected a setting of finetuning, got {name!r}: {advise(name, known)}")
        for name in settings
        if name not in known
    ]
    if is_mapping(lora):
        problems += [
            Problem((*key, "lora", name), f"expected a setting of lora, got {name!r}: {advise(name, of_lora)}")
            for name in lora
            if name not in of_lora
        ]
    if problems:
        return PAPER_FINETUNING, problems
    try:
        if is_mapping(lora):
            targets = lora.get("targets")
            fields: dict[str, Any] = {**lora, "targets": None if targets is None else tuple(targets)}
            settings["lora"] = Lora(**fields)
        return FinetuneConfig(**settings), []
    except (ValueError, TypeError) as error:
        return PAPER_FINETUNING, [Problem(key, str(error))]


def in_words(problems: Sequence[Problem], where: Mapping[tuple[str, ...], str] | None = None) -> str:
    """Return the message about problems: one line each, after the place where it is known."""
    lines = [f"{(where or {}).get(problem.key) or '.'.join(problem.key)}: {problem.text}" for problem in problems]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"expected a grid that can be run, got {len(lines)} problems:", *lines])


@cache
def _check_demonstrations(config: FinetuneConfig, k: int) -> None:
    config.check_demonstrations(k)


def _id(cell: Cell, precision: str) -> str:
    """Return a cell's id: the name of its folder, and the precision where it is not float32."""
    words = "" if precision == "float32" else "_" + precision.replace(",", "").replace(" ", "-")
    return folder_name(cell.name + words)


def _of_task(values: Any, task: str, default: Any) -> tuple[Any, ...]:
    """Return the values of an axis for a task, each once."""
    if is_mapping(values):
        values = values.get(task)
    if values is None:
        values = default
    if values is None:
        return ()
    return tuple(dict.fromkeys(values)) if is_iterable(values) else (values,)


def _shared_ids(cells: Sequence[GridCell]) -> list[Problem]:
    """Return a problem for each two cells with one id."""
    first: dict[str, GridCell] = {}
    problems: list[Problem] = []
    for cell in cells:
        other = first.setdefault(cell.id, cell)
        if other is not cell:
            differing = [f.name for f in fields(Cell) if getattr(cell.cell, f.name) != getattr(other.cell, f.name)]
            how = f"which differ in {', '.join(differing)} alone" if differing else "which have the same settings"
            names = f"{other.control!r} and {cell.control!r}"
            key = ("controls", cell.control) if cell.control != PLAIN else ("rates",)
            problems.append(
                Problem(key, f"expected cells of different ids, got two with {cell.id!r} ({names}), {how}: leave one "
                             "out, or put them into a grid with results of its own")
            )  # fmt: skip
    return problems


def _once(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems, each once, at most the first of those in the same words."""
    return list(dict.fromkeys(problems))


def _key(control: str, error: ValueError) -> tuple[str, ...]:
    """Return the key that an error is about: the control's, or that of the setting it names first."""
    if control != PLAIN:
        return ("controls", control)
    words = str(error).replace("=", " ").replace("/", " ").split()
    names = {
        "lr": "rates",
        "protocol": "protocols",
        "seed": "seeds",
        "batch_size": "finetuning",
        "warmup": "finetuning",
    }
    known = {f.name for f in fields(Grid)}
    named = (names.get(word, word) for word in words)
    return (next((name for name in named if name in known), "models"),)


def _text(control: str, error: ValueError) -> str:
    text = str(error).removeprefix("icl_dual.Cell: ").removeprefix("Cell: ")
    return text if control == PLAIN else f"control {control!r}: {text}"


def advise(name: str, known: Iterable[str]) -> str:
    """Return advice about an unknown name: the most similar known one, or all of them."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"use one of {', '.join(sorted(known))}"


def _plain(config: FinetuneConfig) -> dict[str, Any]:
    return dict(vars(config))
