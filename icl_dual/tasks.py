"""The paper's six classification tasks, a user's own, and the drawing of demonstrations and queries.

A task keeps three pools that share no text, not even across duplicate rows: demonstrations, a selection pool (to
choose learning rates on) and evaluation queries. Pools and draws are ordered by SHA-256 of seed and text, so they
are the same on every platform and with every version of every library.

Under the reference protocol, rows are drawn as the released code of Dai et al. draws them instead: both splits in
their data set's own order, shuffled by numpy's generator as `datasets` shuffles (demonstrations by their seed, queries
by 1), queries cut at 2000, texts taken as they stand.
"""

import csv
import hashlib
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

Split = Literal["selection", "evaluation"]
Protocol = Literal["answer", "reference"]
"""How a cell is drawn, written and recorded: `answer`, at the token that predicts the label; `reference`, as the
released code does, after the first label word."""

REFERENCE_QUERIES = 2000
"""The reference protocol takes no more queries than this."""

REFERENCE_SHUFFLE = 1
"""The seed by which the reference protocol shuffles its queries."""

Rows = Iterable[Mapping[str, Any]] | str | PathLike[str]


class TaskError(ValueError):
    """A task, its rows, or what was asked of it do not fit together."""


@dataclass(frozen=True)
class Example:
    """One row of a task: the texts its template asks for, and the index of its label word."""

    fields: tuple[tuple[str, str], ...]
    label: int

    @property
    def identity(self) -> str:
        """What makes two rows the same text: case and white space do not."""
        return "\x1f".join(" ".join(text.split()).casefold() for _, text in self.fields)

    @property
    def key(self) -> str:
        """A short, stable name of the text, for records of what was drawn."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]


class Task:
    """A classification task: a template, a word for each label, and rows.

    Args:
        name: what to call it in tables.
        template: text with named fields, e.g. `"Sentence: {text} Label:"`; the label word follows after a space.
        label_words: the word that stands for each label, by label index.
        rows: dictionaries with the template's fields and a `label` (an index, or a label word); or the path of a
            JSONL or CSV file of such rows.
        query_rows: rows to draw queries from. Without them, half of `rows` serve as demonstrations, a tenth for
            selection, and the rest as queries.
        protocol: `reference` draws as the released code does; then all `rows` serve as demonstrations where there are
            `query_rows`, repeated and shared texts among them, and nothing is left for selection.

    Raises:
        TaskError: a row lacks a field, has empty text or an unknown label (with the row's number); fewer than two
            classes; no rows; no such protocol.
    """

    def __init__(
        self,
        name: str,
        template: str,
        label_words: Sequence[str],
        rows: Rows,
        query_rows: Rows | None = None,
        *,
        protocol: Protocol = "answer",
    ) -> None:
        if protocol not in get_args(Protocol):
            raise TaskError(f"expected protocol 'answer' or 'reference', got {protocol!r}")
        self.name = name
        self.protocol: Protocol = protocol
        self.template = template
        self.label_words = tuple(label_words)
        self.field_names = tuple(field_names(template))
        if not self.field_names:
            raise TaskError(f"expected a template with named fields like '{{text}}', got {template!r}")
        if isinstance(label_words, str) or not all(isinstance(word, str) and word.strip() for word in label_words):
            raise TaskError(f"expected a sequence of label words, got {label_words!r}")
        if len(self.label_words) < 2 or len(set(self.label_words)) < len(self.label_words):
            raise TaskError(f"expected two or more different label words, got {list(self.label_words)}")
        pool = self._examples(rows, "rows")
        held_out = None if query_rows is None else self._examples(query_rows, "query_rows")
        self._demonstrations, self._queries = self._pools(pool, held_out)

    def _pools(
        self, rows: list[Example], held_out: list[Example] | None
    ) -> tuple[list[Example], dict[str, list[Example]]]:
        """The demonstrations, and the queries by split."""
        if held_out is None:
            ordered = _shuffled(_first_of_each_text(rows), "pools")
            half, tenth = len(ordered) // 2, len(ordered) // 10
            parts = [ordered[:half], ordered[half : half + tenth], ordered[half + tenth :]]
            if self.protocol == "reference":  # the same pools, in the order of their rows
                parts = [_in_order_of(rows, part) for part in parts]
            demonstrations, selection, evaluation = parts
            return demonstrations, {"selection": selection, "evaluation": evaluation}
        if self.protocol == "reference":
            return rows, {"evaluation": held_out}
        evaluation = _first_of_each_text(held_out)
        asked = {example.identity for example in evaluation}
        ordered = _shuffled([row for row in _first_of_each_text(rows) if row.identity not in asked], "pools")
        tenth = len(ordered) // 10
        return ordered[tenth:], {"selection": ordered[:tenth], "evaluation": evaluation}

    def __repr__(self) -> str:
        sizes = {"demonstrations": len(self._demonstrations)} | {
            name: len(pool) for name, pool in self._queries.items()
        }
        return (
            f"Task({self.name!r}, {self.template!r}, labels={list(self.label_words)}, {sizes}, "
            f"protocol={self.protocol!r})"
        )

    @cached_property
    def tail(self) -> str:
        """The template's text after its last field: what a label word directly follows."""
        return self.template[self.template.rindex("}") + 1 :]

    @property
    def n_demonstrations(self) -> int:
        """How many rows demonstrations are drawn from."""
        return len(self._demonstrations)

    def demonstrations(self, k: int, seed: int, *, balanced: bool = False) -> list[Example]:
        """Draw k demonstrations by seed, classes as they fall (the paper's way) or balanced.

        Raises:
            TaskError: k is negative or more than the pool, or than a class of it when balanced, can give; or balanced
                under the reference protocol, which knows no such draw.
        """
        if self.protocol == "reference":
            if balanced:
                raise TaskError("the reference protocol takes demonstrations as they fall, got balanced=True")
            ordered = _permuted(self._demonstrations, seed)
        else:
            ordered = _shuffled(self._demonstrations, f"demonstrations {seed}")
        if not 0 <= k <= len(ordered):
            raise TaskError(f"{self.name}: expected k from 0 to the {len(ordered)} demonstrations there are, got {k}")
        if not balanced:
            return ordered[:k]
        n_labels = len(self.label_words)
        quotas = [k // n_labels + (label < k % n_labels) for label in range(n_labels)]
        drawn: set[str] = set()
        for label, quota in enumerate(quotas):
            of_label = [example.identity for example in ordered if example.label == label][:quota]
            if len(of_label) < quota:
                raise TaskError(
                    f"{self.name}: balanced k={k} wants {quota} demonstrations labelled {self.label_words[label]!r}, "
                    f"and there are {len(of_label)}"
                )
            drawn.update(of_label)
        return [example for example in ordered if example.identity in drawn]

    def queries(self, n: int | None = None, *, split: Split = "evaluation") -> list[Example]:
        """The first n queries of a fixed order, the same whatever the seed of the demonstrations; all without n.

        The reference protocol has 2000 at most.

        Raises:
            TaskError: n is below one or more than there are, or there is no such split.
        """
        if split not in self._queries:
            raise TaskError(f"{self.name}: expected a split out of {list(self._queries)}, got {split!r}")
        if self.protocol == "reference":
            ordered = _permuted(self._queries[split], REFERENCE_SHUFFLE)[:REFERENCE_QUERIES]
        else:
            ordered = _shuffled(self._queries[split], "queries")
        if n is None:
            return ordered
        if not 1 <= n <= len(ordered):
            raise TaskError(f"{self.name}: expected between 1 and {len(ordered)} {split} queries, got {n}")
        return ordered[:n]

    def prompt(self, example: Example) -> str:
        """The template filled with an example's texts, up to where the label word would come."""
        return self.template.format(**dict(example.fields))

    def _examples(self, rows: Rows, what: str) -> list[Example]:
        """Rows as examples, in their order."""
        source = str(rows) if isinstance(rows, str | PathLike) else what
        records = _read_rows(Path(rows)) if isinstance(rows, str | PathLike) else rows
        found = [self._example(row, f"{source}, row {number}") for number, row in enumerate(records, start=1)]
        n_classes = len({example.label for example in found})
        if n_classes < 2:
            raise TaskError(
                f"{self.name}: expected rows of two or more classes in {source}, got {len(found)} rows of {n_classes}"
            )
        return found

    def _example(self, row: Mapping[str, Any], where: str) -> Example:
        if not isinstance(row, Mapping):
            raise TaskError(f"{self.name}: {where}: expected a dictionary, got {type(row).__name__}")
        missing = [name for name in (*self.field_names, "label") if name not in row]
        if missing:
            raise TaskError(f"{self.name}: {where}: expected {missing[0]!r}, got only {sorted(map(str, row))}")
        fields = tuple((name, str(row[name])) for name in self.field_names)
        empty = [name for name, text in fields if not text.strip() or not isinstance(row[name], str)]
        if empty:
            raise TaskError(f"{self.name}: {where}: {empty[0]!r} is empty: expected text, got {row[empty[0]]!r}")
        if self.protocol == "answer":
            fields = tuple((name, text.strip()) for name, text in fields)
        return Example(fields, self._label(row["label"], where))

    def _label(self, label: Any, where: str) -> int:
        if label in self.label_words:
            return self.label_words.index(label)
        text = str(label).strip()
        index = int(text) if text.isascii() and text.isdigit() else -1
        if not 0 <= index < len(self.label_words):
            raise TaskError(
                f"{self.name}: {where}: unknown label {label!r}; expected 0 to {len(self.label_words) - 1} or one of "
                f"{list(self.label_words)}"
            )
        return index


def _first_of_each_text(examples: Iterable[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.identity, example)
    return list(first.values())


def _in_order_of(rows: Sequence[Example], pool: Sequence[Example]) -> list[Example]:
    wanted = {example.identity for example in pool}
    return [row for row in _first_of_each_text(rows) if row.identity in wanted]


def _permuted(examples: Sequence[Example], seed: int) -> list[Example]:
    """The order in which `datasets` shuffles rows by a seed."""
    return [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))]


def _shuffled(examples: Iterable[Example], salt: str) -> list[Example]:
    def rank(example: Example) -> bytes:
        return hashlib.sha256(f"{salt}\0{example.identity}".encode()).digest()

    return sorted(examples, key=rank)


def field_names(template: str) -> list[str]:
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field]
    except ValueError as error:
        raise TaskError(f"expected a template like 'Text: {{text}} Label:', got {template!r}: {error}") from error


def _read_rows(path: Path) -> list[Mapping[str, Any]]:
    readers: dict[str, Callable[[Path], list[Mapping[str, Any]]]] = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise TaskError(f"expected a .jsonl or .csv file of rows, got {str(path)!r}")
    try:
        return readers[path.suffix](path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"expected a readable UTF-8 file of rows at {path}, got {error}") from error


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path}, line {number}: expected one JSON object a line, got {error}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))
