"""The registry of known tasks: the six that the paper measures."""

import io
import pickle
from dataclasses import dataclass
from os import PathLike
from typing import Any

from icl_dual import assets
from icl_dual.tasks import Protocol, Rows, Task, TaskError, field_names


@dataclass(frozen=True)
class _PaperTask:
    """A task of the paper: its template and words, where its rows lie, and how many demonstrations the paper used."""

    template: str
    label_words: tuple[str, ...]
    k: int
    staicc: str | None
    hub: str
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_query_split: str = "validation"
    hub_fields: tuple[str, ...] = ("text",)
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
"""How many demonstrations the paper used for each task."""

PAPER_LABELS = {name: task.label_words for name, task in _PAPER_TASKS.items()}
"""Each task's label words, by label index."""


def load_task(name: str, source: str | PathLike[str] | None = None, *, protocol: Protocol = "answer") -> Task:
    """One of the paper's six tasks, with its template and label words.

    Args:
        name: `sst2`, `sst5`, `mr`, `subj`, `agnews` or `cb`.
        source: `"wheel"` (rows of the StaICC package: training splits, from which queries are held out; the default
            where it has the task), `"hub"` (the data set's own training and validation splits; the default for
            `cb`), or the path of a JSONL or CSV file of rows.
        protocol: `answer`; or `reference`, with the released code's templates, order and cut of the rows.

    Raises:
        TaskError: there is no such task, or its rows do not fit it.
        AssetError: its rows cannot be had.
    """
    if name not in _PAPER_TASKS:
        raise TaskError(f"unknown task {name!r}: expected one of {list(TASKS)}; for your own, use icl_dual.Task")
    paper = _PAPER_TASKS[name]
    if source is None:
        source = "wheel" if paper.staicc else "hub"
    query_rows: Rows | None = None
    if source == "wheel":
        if paper.staicc is None:
            raise TaskError(f"{name} is in no package: expected source='hub' or the path of a file, got 'wheel'")
        rows: Rows = _staicc_rows(paper.staicc)
    elif source == "hub":
        rows, query_rows = _hub_rows(paper, "train"), _hub_rows(paper, paper.hub_query_split)
    else:
        rows = source
    template = paper.template
    if protocol == "reference" and paper.reference_template is not None:
        template = paper.reference_template
    return Task(name, template, paper.label_words, rows, query_rows, protocol=protocol)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, tuples, strings and integers; anything else in the pickle is refused, never imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"expected plain rows, got a reference to {module}.{name}")


def _staicc_rows(file: str) -> list[dict[str, Any]]:
    data = assets.read_wheel_member(assets.STAICC, f"StaICC/cached_dataset/{file}.dataset")
    return [{"text": texts[0], "label": label} for texts, label in _PlainUnpickler(io.BytesIO(data)).load()]


def _hub_rows(paper: _PaperTask, split: str) -> list[dict[str, Any]]:
    names = dict(zip(paper.hub_fields, field_names(paper.template), strict=True)) | {"label": "label"}
    rows = assets.hub_rows(paper.hub, split, config=paper.hub_config, revision=paper.hub_revision)
    return [{ours: row[theirs] for theirs, ours in names.items()} for row in rows]
