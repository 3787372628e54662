"""The registry of known tasks: the six that the paper measures, and those that a user registers."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

from icl_dual import assets
from icl_dual.arguments import NameOrPath, checked, near_misses, of_type
from icl_dual.harness_tasks import task_from_yaml
from icl_dual.rows import Rows, TaskError
from icl_dual.tasks import Protocol, Task, field_names


@dataclass(frozen=True)
class _PaperTask:
    """A task of the paper: its template and label words, and where its rows come from."""

    template: str
    """The paper's template."""
    label_words: tuple[str, ...]
    """The word for each label, in the order of label indices."""
    k: int
    """The number of demonstrations in the paper."""
    staicc: str | None
    """The task's file in the StaICC package; `None` where the package does not have it."""
    hub: str
    """The data set's id on the Hugging Face hub."""
    hub_config: str | None = None
    """The data set's configuration on the hub."""
    hub_revision: str | None = None
    """The data set's commit on the hub; the newest by default."""
    hub_query_split: str = "validation"
    """The split that queries come from."""
    hub_fields: tuple[str, ...] = ("text",)
    """The data set's own names of the template's fields, in their order."""
    reference_template: str | None = None
    """The released code's template, where it differs from the paper's."""


_SENTENCE = "Sentence: {text} Label:"
_PAPER_TASKS = {
    "sst2": _PaperTask(
        _SENTENCE, ("Negative", "Positive"), 32, "sst2", "nyu-mll/glue", hub_config="sst2", hub_fields=("sentence",)
    ),
    "sst5": _PaperTask(_SENTENCE, ("terrible", "bad", "neutral", "good", "great"), 32, "sst5", "SetFit/sst5"),
    "mr": _PaperTask(
        "Review: {text} Sentiment:",
        ("Negative", "Positive"),
        32,
        "rotten_tomatoes",
        "cornell-movie-review-data/rotten_tomatoes",
    ),
    "subj": _PaperTask(
        "Input: {text} Type:", ("objective", "subjective"), 32, "subjective", "SetFit/subj", hub_query_split="test"
    ),
    "agnews": _PaperTask(
        "Classify the news articles into the categories of World, Sports, Business, and Technology. News: {text} Type:",
        ("World", "Sports", "Business", "Technology"),
        22,
        "agnews",
        "fancyzhx/ag_news",
        hub_query_split="test",
        reference_template="Classify the news articles into the categories of World, Sports, Business, and Technology. "
        "Article: {text} Answer:",
    ),
    "cb": _PaperTask(
        "{premise} Question: {hypothesis} True, False, or Neither? Answer:",
        ("True", "False", "Neither"),
        19,
        None,
        "aps/super_glue",
        hub_config="cb",
        hub_revision="3de24cf8022e94f4ee4b9d55a6f539891524d646",
        hub_fields=("premise", "hypothesis"),
        reference_template="{premise} Question: {hypothesis}. True, False, or Neither? Answer:",
    ),
}

TASKS = tuple(_PAPER_TASKS)
"""The names of the paper's tasks, in the order of its tables."""

PAPER_K = {name: task.k for name, task in _PAPER_TASKS.items()}
"""The number of demonstrations in the paper, by task."""

PAPER_LABELS = {name: task.label_words for name, task in _PAPER_TASKS.items()}
"""The label words of the paper's tasks, in the order of label indices."""

PAPER_TEMPLATES = {name: task.template for name, task in _PAPER_TASKS.items()}
"""The paper's templates, by task."""

TaskFactory = Callable[[str | PathLike[str] | None, Protocol], Task]
"""Makes a task from a source of rows and a protocol, as `load_task` takes them."""


@checked
def register_task(task: Task | TaskFactory, *, name: str | None = None) -> None:
    """Make a task known by its name to `load_task`, `Cell` and `run_study`, until the process ends.

    Args:
        task: the task; or a function that makes it from a source and a protocol, for tasks that are slow to load or
            exist under both protocols.
        name: the name of the task that a function makes; a task has its own.

    Raises:
        TaskError: another task has the name; or a function comes without a name, a task with another one.

    Example:
        >>> import icl_dual
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> icl_dual.register_task(icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows))
        >>> icl_dual.load_task("films").label_words
        ('bad', 'good')
        >>> cell = icl_dual.Cell(model="smollm2-135m", task="films", k=4, seed=1, lr=0.001, n_queries=5)
        >>> unregister_task("films")
    """
    if isinstance(task, Task):
        if name not in (None, task.name):
            raise TaskError(
                f"expected no name for a task, which has its own, {task.name!r}, got name={name!r}: leave name out, or "
                "make the task with this name"
            )
        name = task.name
    if not name:
        raise TaskError(f"expected a name for the task, got {name!r}: pass name= with a function, or name the Task")
    if name in _registered:
        raise TaskError(
            f"expected a task name that is not taken, got {name!r}: choose another, or remove a task that you "
            "registered with icl_dual.paper_tasks.unregister_task"
        )
    _registered[name] = task


def unregister_task(name: str) -> None:
    """Remove a task that was registered.

    Raises:
        TaskError: no task is registered under the name, or it is one of the paper's.
    """
    if name in _PAPER_TASKS or name not in _registered:
        registered_names = [registered_name for registered_name in _registered if registered_name not in _PAPER_TASKS]
        raise TaskError(
            f"expected the name of a task that you registered, {registered_names}, got {name!r}: choose one of these"
        )
    del _registered[name]


def registered_task(name: str) -> Task | None:
    """Return the task that was registered under a name as an object; `None` where it would have to be loaded."""
    task = _registered.get(name)
    return task if isinstance(task, Task) else None


@checked
def load_task(name: NameOrPath, source: str | PathLike[str] | None = None, *, protocol: Protocol = "answer") -> Task:
    """Load a task by its name: one of the paper's six, one that was registered, or that of a YAML file.

    Args:
        name: `sst2`, `sst5`, `mr`, `subj`, `agnews` or `cb`; the name of a task given to `register_task`; or the path
            of a YAML file of lm-evaluation-harness (`task_from_yaml`), to which `source` gives other rows.
        source: where the rows come from. For the paper's tasks: `"wheel"`, the StaICC package, which has training
            splits, from which queries are held out (the default for all but `cb`); `"hub"`, the data set's own
            training and validation splits (the default for `cb`); or the path of a JSONL, JSON or CSV file of rows.
        protocol: `answer`; or `reference`, with the released code's templates and draws.

    Raises:
        TaskError: the task is unknown, its rows are invalid, or a registered task has another protocol or no sources.
        AssetError: the rows cannot be fetched.

    Example:
        >>> import icl_dual, json, pathlib, tempfile
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "rows.jsonl")
        ...     _ = path.write_text("\\n".join(map(json.dumps, rows)))
        ...     icl_dual.load_task("sst2", path).template
        'Sentence: {text} Label:'
    """
    if name not in _registered and name.endswith((".yaml", ".yml")):
        if protocol != "answer":
            raise TaskError(f"expected protocol='answer' for a YAML file, got {protocol!r}: leave protocol out")
        return task_from_yaml(name, source)
    check_task_name(name)
    registered = _registered[name]
    if isinstance(registered, Task):
        if source is not None:
            raise TaskError(
                f"{name}: expected source=None for a task that was registered with its rows, got {str(source)!r}: "
                "leave source out, or register a function that reads it"
            )
        task = registered
    else:
        task = registered(source, protocol)
    if not of_type(task, Task) or (task.name, task.protocol) != (name, protocol):
        raise TaskError(
            f"{name}: expected a Task of this name with protocol={protocol!r}, got {task!r}: register one of this name "
            "and protocol, or a function that makes it for either protocol"
        )
    return task


def check_task_name(name: str) -> None:
    """Check that `load_task` knows a name, or may read it as a YAML file.

    Raises:
        TaskError: the task is unknown.
    """
    if name not in _registered and not name.endswith((".yaml", ".yml")):
        raise TaskError(
            f"expected a task out of {list(_registered)}, got {name!r}{near_misses(name, _registered)}: choose one of "
            "these, or make your own: with icl_dual.Task and run_study(tasks=[…]) or icl_dual.register_task, on the "
            "command line from a file with --rows"
        )


def _paper_task(name: str, source: str | PathLike[str] | None, protocol: Protocol) -> Task:
    """Return one of the paper's tasks."""
    paper = _PAPER_TASKS[name]
    if source is None:
        source = "wheel" if paper.staicc else "hub"
    query_rows: Rows | None = None
    if source == "wheel":
        if paper.staicc is None:
            raise TaskError(
                f"{name}: expected source='hub' or the path of a file, got 'wheel', a package without this task: "
                "choose one of these"
            )
        rows: Rows = _staicc_rows(paper.staicc)
    elif source == "hub":
        rows, query_rows = _hub_rows(paper, "train"), _hub_rows(paper, paper.hub_query_split)
    else:
        rows = source
    template = paper.template
    if protocol == "reference" and paper.reference_template is not None:
        template = paper.reference_template
    return Task(name, template, paper.label_words, rows, query_rows, protocol=protocol)


_registered: dict[str, Task | TaskFactory] = {name: partial(_paper_task, name) for name in _PAPER_TASKS}


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of lists, tuples, strings and integers; anything else is refused and never imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"expected plain rows, got a reference to {module}.{name}: do not read this file, it can run code"
        )


def _staicc_rows(file: str) -> list[dict[str, Any]]:
    """Return the rows of a file of the StaICC package."""
    data = assets.read_wheel_member(assets.STAICC, f"StaICC/cached_dataset/{file}.dataset")
    return [{"text": texts[0], "label": label} for texts, label in _PlainUnpickler(io.BytesIO(data)).load()]


def _hub_rows(paper: _PaperTask, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split on the hub, with the template's field names."""
    field_of = dict(zip(paper.hub_fields, field_names(paper.template), strict=True)) | {"label": "label"}
    rows = assets.hub_rows(paper.hub, split, config=paper.hub_config, revision=paper.hub_revision)
    return [{ours: row[theirs] for theirs, ours in field_of.items()} for row in rows]
