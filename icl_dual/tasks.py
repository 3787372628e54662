"""Classification tasks: a template, label words and rows, from which demonstrations and queries are drawn.

A task keeps three pools that share no text, not even across duplicate rows: demonstrations, a selection pool (to
choose learning rates on) and evaluation queries. Pools and draws are ordered by SHA-256 of seed and text, so they
are the same on every platform and with every version of every library.

Under the reference protocol, rows are drawn as the released code of Dai et al. draws them: both splits in their data
set's own order, shuffled by numpy's generator as `datasets` shuffles (demonstrations by their seed, queries by 1),
queries cut at 2000, texts with their own white space.
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
"""The pool that queries come from: `evaluation` for results, `selection` to choose learning rates on."""
Protocol = Literal["answer", "reference"]
"""How rows are drawn, written and recorded: `answer` records the token that predicts the label; `reference` follows the
released code, which records the first label word, appended to every query."""

REFERENCE_QUERIES = 2000
"""The largest number of queries under the reference protocol."""

REFERENCE_SHUFFLE = 1
"""The seed that the reference protocol shuffles its queries with."""

Rows = Iterable[Mapping[str, Any]] | str | PathLike[str]
"""Rows as dictionaries, or the path of a JSONL or CSV file of them."""


class TaskError(ValueError):
    """A task is unknown, its rows are invalid, or it has too few rows for a draw."""


@dataclass(frozen=True)
class Example:
    """One row of a task: the texts of its template's fields, and its label."""

    fields: tuple[tuple[str, str], ...]
    """Name and text of each field, in the template's order."""
    label: int
    """The index of the row's label word."""

    @property
    def identity(self) -> str:
        """Return the texts without differences of case and white space: rows that share it count as the same text."""
        return "\x1f".join(" ".join(text.split()).casefold() for _, text in self.fields)

    @property
    def key(self) -> str:
        """Return a short hash of the texts, by which results name the rows that were drawn."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]


class Task:
    """A classification task: a template, a word for each label, and rows.

    Args:
        name: the task's name in tables and cells.
        template: text with named fields, e.g. `"Sentence: {text} Label:"`; the label word follows after a space.
        label_words: the word for each label, in the order of label indices.
        rows: dictionaries with the template's fields and a `label` (an index, or a label word); or the path of a
            JSONL or CSV file of such rows.
        query_rows: the rows that queries are drawn from. Without them, half of `rows` are demonstrations, a tenth is
            for selection, and the rest are evaluation queries.
        protocol: `answer` or `reference`. Under `reference` with `query_rows`, all `rows` are demonstrations, repeated
            texts and texts of queries included, and there is no selection pool.

    Raises:
        TaskError: a row lacks a field, has empty text or an unknown label (the message has the row's number, or its
            line in the file); a row of a CSV file has more or fewer fields than the header; there are fewer than two
            classes, or no rows; template, label words or protocol are invalid.

    Example:
        >>> import icl_dual
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> task.pool_sizes
        {'demonstrations': 10, 'selection': 2, 'evaluation': 8}
        >>> query = task.queries(1)[0]
        >>> task.prompt(query), task.label_words[query.label]
        ('Text: film number 13 Label:', 'good')
        >>> [task.prompt(example) for example in task.demonstrations(2, seed=1)]
        ['Text: film number 2 Label:', 'Text: film number 4 Label:']
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
            raise TaskError(
                f"{name}: expected protocol out of {get_args(Protocol)}, got {protocol!r}: choose one of these"
            )
        self.name = name
        self.protocol: Protocol = protocol
        self.template = template
        self.label_words = tuple(label_words)
        self.field_names = tuple(field_names(template))
        if not self.field_names:
            raise TaskError(
                f"{name}: expected a template with named fields, got {template!r}: write each field of the rows in "
                "braces, such as 'Text: {text} Label:'"
            )
        if isinstance(label_words, str) or not all(isinstance(word, str) and word.strip() for word in label_words):
            raise TaskError(
                f"{name}: expected label_words as a sequence of words, got {label_words!r}: pass one word for "
                "each label"
            )
        if len(self.label_words) < 2 or len(set(self.label_words)) < len(self.label_words):
            raise TaskError(
                f"{name}: expected two or more different label words, got {list(self.label_words)}: pass one word for "
                "each label"
            )
        pool = self._examples(rows, "rows")
        query_pool = None if query_rows is None else self._examples(query_rows, "query_rows")
        self._demonstrations, self._queries = self._pools(pool, query_pool)

    def _pools(
        self, examples: list[Example], query_examples: list[Example] | None
    ) -> tuple[list[Example], dict[str, list[Example]]]:
        """Return the demonstrations, and the queries by split."""
        if query_examples is None:
            ordered = _shuffled(_first_of_each_text(examples), "pools")
            half, tenth = len(ordered) // 2, len(ordered) // 10
            pools = [ordered[:half], ordered[half : half + tenth], ordered[half + tenth :]]
            if self.protocol == "reference":  # the same pools, in the order of their rows
                pools = [_in_order_of(examples, pool) for pool in pools]
            demonstrations, selection, evaluation = pools
            return demonstrations, {"selection": selection, "evaluation": evaluation}
        if self.protocol == "reference":
            return examples, {"evaluation": query_examples}
        evaluation = _first_of_each_text(query_examples)
        query_texts = {example.identity for example in evaluation}
        unshared = [example for example in _first_of_each_text(examples) if example.identity not in query_texts]
        ordered = _shuffled(unshared, "pools")
        tenth = len(ordered) // 10
        return ordered[tenth:], {"selection": ordered[:tenth], "evaluation": evaluation}

    def __repr__(self) -> str:
        return (
            f"Task({self.name!r}, {self.template!r}, labels={list(self.label_words)}, {self.pool_sizes}, "
            f"protocol={self.protocol!r})"
        )

    @property
    def pool_sizes(self) -> dict[str, int]:
        """Return the number of rows in each pool: demonstrations, and queries by split."""
        queries = {split: len(pool) for split, pool in self._queries.items()}
        return {"demonstrations": len(self._demonstrations)} | queries

    @property
    def n_demonstrations(self) -> int:
        """Return the number of rows that demonstrations are drawn from."""
        return len(self._demonstrations)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides the task's prompts and draws.

        It covers template, label words, protocol, and the rows of every pool, but not the name. Results record it, so
        that a study is not continued with other rows under the same name.
        """
        digest = hashlib.sha256(json.dumps([self.template, self.label_words, self.protocol]).encode())
        for pool_name, pool in {"demonstrations": self._demonstrations, **self._queries}.items():
            digest.update(json.dumps([pool_name, len(pool)]).encode())
            rows = [json.dumps([example.fields, example.label]) for example in pool]
            # Under the answer protocol, draws do not depend on the order of rows.
            digest.update("".join(sorted(rows) if self.protocol == "answer" else rows).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def tail(self) -> str:
        """Return the template's text after its last field, which a label word directly follows."""
        return self.template[self.template.rindex("}") + 1 :]

    def demonstrations(self, k: int, seed: int, *, balanced: bool = False) -> list[Example]:
        """Draw k demonstrations by a seed.

        Args:
            k: the number of demonstrations.
            seed: the seed of the draw.
            balanced: draw as many of each class, up to one; by default classes are drawn as they are distributed, as
                in the paper.

        Raises:
            TaskError: k is negative, or more than the pool has (when balanced, more than a class of it has); or
                balanced under the reference protocol, which has no such draw.
        """
        if self.protocol == "reference":
            if balanced:
                raise TaskError(
                    f"{self.name}: expected balanced=False under the reference protocol, got balanced=True: use the "
                    "answer protocol for balanced demonstrations"
                )
            ordered = _permuted(self._demonstrations, seed)
        else:
            ordered = _shuffled(self._demonstrations, f"demonstrations {seed}")
        if not 0 <= k <= len(ordered):
            raise TaskError(
                f"{self.name}: expected k from 0 to {len(ordered)}, the number of demonstrations, got {k}: use a k in "
                "this range, or more rows"
            )
        if not balanced:
            return ordered[:k]
        n_labels = len(self.label_words)
        quotas = [k // n_labels + (label < k % n_labels) for label in range(n_labels)]
        chosen: set[str] = set()
        for label, quota in enumerate(quotas):
            of_label = [example.identity for example in ordered if example.label == label][:quota]
            if len(of_label) < quota:
                raise TaskError(
                    f"{self.name}: expected {quota} demonstrations labelled {self.label_words[label]!r} for balanced "
                    f"k={k}, got {len(of_label)}: use a smaller k, or balanced=False"
                )
            chosen.update(of_label)
        return [example for example in ordered if example.identity in chosen]

    def queries(self, n: int | None = None, *, split: Split = "evaluation") -> list[Example]:
        """Return the first n queries of a split, in a fixed order that does not depend on the demonstrations' seed.

        Args:
            n: the number of queries; all of the split by default (under the reference protocol at most 2000).
            split: the pool they come from.

        Raises:
            TaskError: n is below 1 or more than the split has, or the task has no such split.
        """
        if split not in self._queries:
            raise TaskError(
                f"{self.name}: expected split out of {list(self._queries)}, got {split!r}: choose one of these"
            )
        if self.protocol == "reference":
            ordered = _permuted(self._queries[split], REFERENCE_SHUFFLE)[:REFERENCE_QUERIES]
        else:
            ordered = _shuffled(self._queries[split], "queries")
        if n is None:
            return ordered
        if not 1 <= n <= len(ordered):
            raise TaskError(
                f"{self.name}: expected from 1 to {len(ordered)} {split} queries, got {n}: use a number in this range, "
                "or more rows"
            )
        return ordered[:n]

    def prompt(self, example: Example) -> str:
        """Return the template filled with an example's texts; the label word would follow."""
        return self.template.format(**dict(example.fields))

    def _examples(self, rows: Rows, argument: str) -> list[Example]:
        """Return rows as examples, in their order."""
        if isinstance(rows, str | PathLike):
            source, unit, numbered_rows = str(rows), "line", _read_rows(Path(rows))
        else:
            source, unit, numbered_rows = argument, "row", enumerate(rows, start=1)
        examples = [self._example(row, f"{source}, {unit} {number}") for number, row in numbered_rows]
        n_classes = len({example.label for example in examples})
        if n_classes < 2:
            raise TaskError(
                f"{self.name}: expected rows of two or more classes in {source}, got {len(examples)} rows of "
                f"{n_classes}: add rows with other labels"
            )
        return examples

    def _example(self, row: Mapping[str, Any], where: str) -> Example:
        """Return a row as an example, or raise a TaskError that says where the row is."""
        if not isinstance(row, Mapping):
            raise TaskError(
                f"{self.name}: {where}: expected a dictionary, got {type(row).__name__}: pass each row as "
                f"{{{', '.join(f'{name!r}: …' for name in (*self.field_names, 'label'))}}}"
            )
        missing = [name for name in (*self.field_names, "label") if name not in row]
        if missing:
            raise TaskError(
                f"{self.name}: {where}: expected {missing[0]!r}, got only {sorted(map(str, row))}: rows need the "
                "template's fields and 'label'"
            )
        fields = tuple((name, str(row[name])) for name in self.field_names)
        empty = [name for name, text in fields if not text.strip() or not isinstance(row[name], str)]
        if empty:
            raise TaskError(
                f"{self.name}: {where}: expected text as {empty[0]!r}, got {row[empty[0]]!r}: fill it in, or leave the "
                "row out"
            )
        if self.protocol == "answer":
            fields = tuple((name, text.strip()) for name, text in fields)
        return Example(fields, self._label(row["label"], where))

    def _label(self, label: Any, where: str) -> int:
        """Return a label's index, given that index or the label word."""
        if label in self.label_words:
            return self.label_words.index(label)
        text = str(label).strip()
        index = int(text) if text.isascii() and text.isdigit() else -1
        if not 0 <= index < len(self.label_words):
            raise TaskError(
                f"{self.name}: {where}: expected a label from 0 to {len(self.label_words) - 1} or one of "
                f"{list(self.label_words)}, got {label!r}: correct it, or the task's label_words"
            )
        return index


def _first_of_each_text(examples: Iterable[Example]) -> list[Example]:
    """Return the examples without those that repeat the texts of an earlier one."""
    by_text: dict[str, Example] = {}
    for example in examples:
        by_text.setdefault(example.identity, example)
    return list(by_text.values())


def _in_order_of(examples: Sequence[Example], pool: Sequence[Example]) -> list[Example]:
    """Return the examples of a pool, in the order of all examples."""
    texts = {example.identity for example in pool}
    return [example for example in _first_of_each_text(examples) if example.identity in texts]


def _permuted(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return examples in the order that `datasets` shuffles rows into by a seed."""
    return [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))]


def _shuffled(examples: Iterable[Example], salt: str) -> list[Example]:
    """Return examples in the order of the SHA-256 of a salt and their texts."""

    def rank(example: Example) -> bytes:
        return hashlib.sha256(f"{salt}\0{example.identity}".encode()).digest()

    return sorted(examples, key=rank)


def field_names(template: str) -> list[str]:
    """Return the names of a template's fields, in their order.

    Raises:
        TaskError: the template's braces do not match.
    """
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field]
    except ValueError as error:
        raise TaskError(
            f"expected a template like 'Text: {{text}} Label:', got {template!r} ({error}): write each field's name in "
            "one pair of braces"
        ) from error


def _read_rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the rows of a JSONL or CSV file, each after the number of the line that it begins on."""
    readers: dict[str, Callable[[Path], list[tuple[int, Mapping[str, Any]]]]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
    }
    if path.suffix not in readers:
        raise TaskError(
            f"expected a .jsonl or .csv file of rows, got {str(path)!r}: convert it, or pass the rows as dictionaries"
        )
    try:
        return readers[path.suffix](path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(
            f"expected a readable UTF-8 file of rows at {path}, got {error}: check the path and the file's encoding"
        ) from error


def _read_jsonl(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(
                    f"{path}, line {number}: expected one JSON object, got {error}: write each row on a line of its own"
                ) from error
            if not isinstance(row, dict):
                raise TaskError(
                    f"{path}, line {number}: expected a JSON object, got {type(row).__name__}: write each row as "
                    '{"text": …, "label": …}'
                )
            rows.append((number, row))
    return rows


def _read_csv(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader, [])
        number = reader.line_num + 1  # a quoted text may have several lines
        for values in reader:
            if values and len(values) != len(header):
                raise TaskError(
                    f"{path}, line {number}: expected {len(header)} columns ({', '.join(header)}), got {len(values)}: "
                    "quote texts that contain commas or line breaks"
                )
            if values:
                rows.append((number, dict(zip(header, values, strict=True))))
            number = reader.line_num + 1
    return rows
