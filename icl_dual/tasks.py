"""Classification tasks: a template, label words and rows, from which demonstrations and queries are drawn.

A task keeps three pools that share no text, not even across duplicate rows: demonstrations, a selection pool (to
choose learning rates on) and evaluation queries. Pools and draws are ordered by SHA-256 of seed and text, so they
are the same on every platform and with every version of every library.

Under the reference protocol, rows are drawn as the released code of Dai et al. draws them: both splits in their data
set's own order, shuffled by numpy's generator as `datasets` shuffles (demonstrations by their seed, queries by 1),
queries cut at 2000, texts with their own white space.
"""

import hashlib
import json
import logging
import math
import re
import reprlib
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal

import numpy as np

from icl_dual.arguments import Index, Seed, checked, trusted
from icl_dual.rows import Rows, TaskError, class_names, field_value, is_missing, located_rows
from icl_dual.type_guards import is_float, is_integer, is_mapping

Split = Literal["selection", "evaluation"]
"""The pool that queries come from: `evaluation` for results, `selection` to choose learning rates on."""
Protocol = Literal["answer", "reference"]
"""How rows are drawn, written and recorded: `answer` records the token that predicts the label; `reference` follows the
released code, which records the first label word, appended to every query."""

REFERENCE_QUERIES = 2000
"""The largest number of queries under the reference protocol."""

REFERENCE_SHUFFLE = 1
"""The seed that the reference protocol shuffles its queries with."""

CONTENT_FREE = ("N/A", "", "[MASK]")
"""The texts without content of contextual calibration (Zhao et al., 2021), in place of every field."""

UNSPACED_SCRIPTS = (
    *("CJK", "IDEOGRAPHIC", "FULLWIDTH", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER"),
    *("MYANMAR", "TIBETAN"),
)
"""How Unicode names the characters of scripts that write no space between words."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200  # of a value that may be a whole document

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
"""Matches a number in decimals."""

logger = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class Example:
    """One row of a task: the texts of its template's fields, and its label."""

    fields: tuple[tuple[str, str], ...]
    """Name and text of each field, in the template's order."""
    label: Index
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
        template: text with named fields, e.g. `"Sentence: {text} Label:"`, without the label word, which follows after
            `label_separator`. `{answers.text}` and `{choices[0]}` are fields of nested rows.
        label_words: the word for each label, in the order of label indices.
        rows: dictionaries with the template's fields and a `label`, a pandas frame or a `datasets.Dataset` of such
            rows, or the path of a JSONL, JSON or CSV file. A label is read as a label word first (`1`, `1.0` and `True`
            also as the words `1` and `True`, and `1` as `1 star`), and as an index, which begins at 0, only where no
            label word is a number or begins with the index of another.
        query_rows: the rows that queries are drawn from. Without them, half of `rows` are demonstrations, a tenth is
            for selection, and the rest are evaluation queries.
        protocol: `answer` or `reference`. Under `reference` with `query_rows`, all `rows` are demonstrations, repeated
            texts and texts of queries included, and there is no selection pool.
        label_separator: text between the filled template and the label word. By default a space; nothing where the
            template ends in white space, the label words begin with it, or either is in a script without spaces
            between words, such as Chinese, Japanese or Thai.
        separator: text that ends each demonstration; by default the model's own (`icl_dual.build_prompts`).
        description: text before the demonstrations, and before a query that has none.
        strip_fields: leave out the white space around each field's text; the reference protocol always keeps it.

    Raises:
        TaskError: a row lacks a field, has empty text or an unknown label, or does not fit the template (the message
            has the row's number, or its line in the file); a row of a CSV file has more or fewer fields than the
            header; there are fewer than two classes, or no rows;
            labels that are indices run from 1; template, label words or protocol are invalid.

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

    @checked
    def __init__(
        self,
        name: str,
        template: str,
        label_words: Sequence[str],
        rows: Rows,
        query_rows: Rows | None = None,
        *,
        protocol: Protocol = "answer",
        label_separator: str | None = None,
        separator: str | None = None,
        description: str = "",
        strip_fields: bool = True,
    ) -> None:
        self.name = name
        self.protocol: Protocol = protocol
        self.template = template
        self.field_names = tuple(field_names(template))
        _check_template(name, template, self.field_names)
        self.label_words = _checked_label_words(name, label_words)
        if label_separator is None:
            label_separator = default_label_separator(self.tail, self.label_words)
        self.label_separator = label_separator
        """The text between the filled template and the label word."""
        self.separator = separator
        """The text that ends each demonstration; `None` for the model's own."""
        self.description = description
        """The text before the demonstrations, and before a query that has none."""
        self.strip_fields = strip_fields and protocol == "answer"
        """Whether the white space around each field's text is left out."""
        self._warn_of_doubled_space()
        self._has_formats = any(spec or conversion for _, _, spec, conversion in string.Formatter().parse(template))
        self._label_indices: dict[str, int | None] = {}
        pool = self._examples(rows, "rows")
        query_pool = None if query_rows is None else self._examples(query_rows, "query_rows")
        self._check_indices((*pool, *(query_pool or ())))
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

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides the task's prompts and draws.

        It covers template, label words, protocol, separators, and the rows of every pool, but not the name. Results
        record it, so that a study is not continued with other rows under the same name.
        """
        return self._hashes[0]

    @property
    def provenance(self) -> dict[str, Any]:
        """Return what decides the task's prompts and draws, by name, as JSON values.

        `rows` is a hash of the rows of every pool, not only of those that a draw uses.
        """
        return {
            "template": self.template,
            "label_words": list(self.label_words),
            "label_separator": self.label_separator,
            "separator": self.separator,
            "description": self.description,
            "rows": self._hashes[1],
        }

    @cached_property
    def _hashes(self) -> tuple[str, str]:
        """Return the hash of the task, and that of its rows alone."""
        # What has the value that version 0.1 had no name for is left out: its studies continue.
        separators = {"label_separator": self.label_separator, "separator": self.separator}
        without_name = {"label_separator": " ", "separator": None, "description": ""}
        options = {**separators, "description": self.description}
        named = {name: value for name, value in options.items() if value != without_name[name]}
        settings = [self.template, self.label_words, self.protocol, *([named] if named else [])]
        of_task, of_rows = hashlib.sha256(json.dumps(settings).encode()), hashlib.sha256()
        for pool_name, pool in {"demonstrations": self._demonstrations, **self._queries}.items():
            rows = [json.dumps([example.fields, example.label]) for example in pool]
            # Under the answer protocol, draws do not depend on the order of rows.
            ordered = "".join(sorted(rows) if self.protocol == "answer" else rows)
            for digest in (of_task, of_rows):
                digest.update(json.dumps([pool_name, len(pool)]).encode())
                digest.update(ordered.encode())
        return of_task.hexdigest()[:16], of_rows.hexdigest()[:16]

    @cached_property
    def tail(self) -> str:
        """Return the template's text after its last field, which the label separator and a label word follow."""
        texts, last_field = list[str](), -1
        for index, (text, field, _, _) in enumerate(string.Formatter().parse(self.template)):
            texts.append(text)
            last_field = last_field if field is None else index
        return "".join(texts[last_field + 1 :])

    @property
    def unconditional_prompt(self) -> str:
        """Return the text after which labels are scored without a query: the template's end, e.g. `Label:`.

        A template that ends with a field has `Answer:` instead (Brown et al., 2020).
        """
        return self.tail.lstrip() if self.tail.strip() else f"Answer:{self.tail}"

    @property
    def content_free_prompts(self) -> tuple[str, ...]:
        """Return the template with `N/A`, nothing and `[MASK]` in place of every field (Zhao et al., 2021)."""
        return tuple(_fill(self.template, dict.fromkeys(self.field_names, text)) for text in CONTENT_FREE)

    @checked
    def demonstrations(self, k: int, seed: Seed, *, balanced: bool = False) -> list[Example]:
        """Draw k demonstrations by a seed.

        Args:
            k: the number of demonstrations.
            seed: the seed of the draw.
            balanced: draw as many of each class, up to one; by default classes are drawn as they are distributed, as
                in the paper. Where k is no multiple of the number of classes, the seed draws the classes that get one
                more, out of those that have one more.

        Raises:
            TaskError: k is negative, or more than the pool has (when balanced, more than its classes have); or
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
        chosen: set[str] = set()
        for label, quota in self._quotas(Counter(example.label for example in ordered), k, seed).items():
            chosen.update([example.identity for example in ordered if example.label == label][:quota])
        return [example for example in ordered if example.identity in chosen]

    def _quotas(self, available: Mapping[int, int], k: int, seed: int) -> dict[int, int]:
        """Return the number of demonstrations of each label in a balanced draw, given how many each has."""
        labels = range(len(self.label_words))
        quota, rest = divmod(k, len(labels))
        for label in labels:
            if available.get(label, 0) < quota:
                raise TaskError(
                    f"{self.name}: expected {quota} demonstrations labelled {self.label_words[label]!r} for balanced "
                    f"k={k}, got {available.get(label, 0)}: use a smaller k, or balanced=False"
                )
        with_more = [label for label in labels if available.get(label, 0) > quota]
        if len(with_more) < rest:
            raise TaskError(
                f"{self.name}: expected {rest} labels with {quota + 1} demonstrations for balanced k={k}, got "
                f"{len(with_more)}: use a smaller k, or balanced=False"
            )
        with_more.sort(key=lambda label: hashlib.sha256(f"labels {seed}\0{label}".encode()).digest())
        return {label: quota + (label in with_more[:rest]) for label in labels}

    @checked
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

    @checked
    def prompt(self, example: Example) -> str:
        """Return the template filled with an example's texts; `label_text` of its label would follow."""
        return _fill(self.template, dict(example.fields))

    @checked
    def label_text(self, label: Index) -> str:
        """Return what follows a prompt that is answered with a label: the label separator and the label word.

        Raises:
            TaskError: the task has no such label.
        """
        if label >= len(self.label_words):
            raise TaskError(
                f"{self.name}: expected label from 0 to {len(self.label_words) - 1}, got {label}: pass examples "
                "of this task, or give it a word for each label"
            )
        return self.label_separator + self.label_words[label]

    def _warn_of_doubled_space(self) -> None:
        """Log a warning where white space at a prompt's end meets white space before the label word."""
        parts = (self.tail, self.label_separator, self.label_words[0])
        text = "".join(parts)
        ends = {len(parts[0]), len(parts[0]) + len(parts[1])}
        if any(text[end - 1 : end].isspace() and text[end : end + 1].isspace() for end in ends if end):
            advice = "leave it out of the template, label_separator or label_words"
            logger.warning("%s: white space is doubled before the label word, %r: %s", self.name, text, advice)

    def _examples(self, rows: Rows, argument: str) -> list[Example]:
        """Return rows as examples, in their order."""
        source, located = located_rows(rows, argument)
        names = class_names(rows, "label")
        # Indices of a data set's classes are read by the names of these, where they are the label words.
        classes = names if any(_word_index(name, self.label_words) is not None for name in names) else ()
        examples = [self._example(row, where, classes) for where, row in located]
        self._check_no_answer(examples, source)
        n_classes = len({example.label for example in examples})
        if n_classes < 2:
            raise TaskError(
                f"{self.name}: expected rows of two or more classes in {source}, got {len(examples)} rows of "
                f"{n_classes}: add rows with other labels"
            )
        return examples

    def _check_no_answer(self, examples: Sequence[Example], source: str) -> None:
        """Raise a TaskError where the template ends with a field that is the label word of every row."""
        if self.tail.strip() or len(self.field_names) < 2:
            return
        words = [word.strip().casefold() for word in self.label_words]
        if examples and all(example.fields[-1][1].strip().casefold() == words[example.label] for example in examples):
            name = self.field_names[-1]
            raise TaskError(
                f"{self.name}: expected a template that ends before the label, got {self.template!r}, where {{{name}}} "
                f"is the label word in every row of {source}: leave it out, the label word follows the template after "
                "label_separator"
            )

    def _check_indices(self, examples: Iterable[Example]) -> None:
        """Raise a TaskError where labels were read as indices that seem to be counted from 1."""
        indices = [
            index
            for text, index in self._label_indices.items()
            if index is not None and _word_index(text, self.label_words) is None
        ]
        if indices and all(example.label for example in examples):
            raise TaskError(
                f"{self.name}: expected a row of label 0, {self.label_words[0]!r}, where labels are indices, got none: "
                f"labels run from {min(indices)} to {max(indices)}; indices begin at 0: subtract 1, or write label "
                "words as labels"
            )

    @trusted  # a task may have 100,000 rows, and what is made of each is checked here
    def _example(self, row: Any, where: str, classes: Sequence[str] = ()) -> Example:
        """Return a row as an example, or raise a TaskError that says where the row is.

        Args:
            row: the row.
            where: where it is.
            classes: the names of the classes that the row has the index of as its label; none where it has none.
        """
        if not is_mapping(row):
            raise TaskError(
                f"{self.name}: {where}: expected a dictionary, got {type(row).__name__}: pass each row as "
                f"{{{', '.join(f'{name!r}: …' for name in (*self.field_names, 'label'))}}}"
            )
        names = (*self.field_names, "label")
        values = {name: row[name] if name in row else _nested(row, name, where, self.name) for name in names}
        fields = tuple((name, self._field_text(values[name], name, where)) for name in self.field_names)
        label = values["label"]
        is_class = is_integer(label) and not isinstance(label, bool) and 0 <= label < len(classes)
        example = Example(fields, self._label(classes[int(label)] if is_class else label, where))
        if not self._has_formats:
            return example
        try:
            self.prompt(example)
        except (ValueError, TypeError, LookupError) as error:
            raise TaskError(
                f"{self.name}: {where}: expected a template that text fills, got {self.template!r} ({error}): write "
                "each field's name alone in braces, such as {text}"
            ) from error
        return example

    def _field_text(self, value: Any, name: str, where: str) -> str:
        """Return the text of a row's field; numbers are written as Python writes them."""
        text = value if isinstance(value, str) else _number_text(value)
        if not text or text.isspace():
            advice = "fill it in, or leave the row out" if _is_empty(value) else "pass text or a number"
            raise TaskError(f"{self.name}: {where}: expected text as {name!r}, got {_shown(value)}: {advice}")
        if not _is_unicode(text):
            raise TaskError(
                f"{self.name}: {where}: expected text as {name!r}, got {_shown(value)}, with half of a surrogate pair: "
                "correct it, or leave the row out"
            )
        return text.strip() if self.strip_fields else text

    def _label(self, label: Any, where: str) -> int:
        """Return a label's index, given the label word or that index."""
        label = label.item() if getattr(label, "ndim", None) == 0 else label
        text = "" if is_missing(label) else _written(label)
        if text not in self._label_indices:
            self._label_indices[text] = label_index(text, self.label_words)
        index = self._label_indices[text]
        if index is None:
            words_only = _are_words_only(self.label_words)
            or_index = "" if words_only else f"a label from 0 to {len(self.label_words) - 1} or "
            why = "is a number, or begins with the index of another"
            why_no_index = f" (labels are no indices where a label word {why})" if words_only else ""
            raise TaskError(
                f"{self.name}: {where}: expected {or_index}one of {list(self.label_words)}, got {_shown(label)}: "
                f"correct it, or the task's label_words{why_no_index}"
            )
        return index


def label_index(label: str, label_words: Sequence[str]) -> int | None:
    """Return the index of a label, read as a label word first and as an index only where that is unambiguous.

    Args:
        label: the text of a label word, without regard to white space around it and, where one word alone matches, to
            case; a number that one word alone is or begins with; or an index. `True` and `False` are words, or else 1
            and 0.
        label_words: the word for each label. Where one of them is a number, or one begins with the index of another,
            labels are words only. Where they are `yes` and `no`, in this order, booleans are no labels.

    Returns:
        The index, or `None` where the label is neither.

    Example:
        >>> [label_index(text, ("no", "yes")) for text in ("yes", "1", "1.0", "True", "2")]
        [1, 1, 1, 1, None]
        >>> [label_index(text, ("1", "0")) for text in ("1", "0", "2")]
        [0, 1, None]
        >>> [label_index(text, ("1 star", "2 stars")) for text in ("1", "2", "0")]
        [0, 1, None]
    """
    index = _word_index(label, label_words)
    return _plain_index(label, label_words) if index is None else index


def _word_index(label: str, label_words: Sequence[str]) -> int | None:
    """Return the index of the label word that a label is; `None` where it is none, or could be several."""
    words = [word.strip() for word in label_words]
    text, number = label.strip(), _label_number(label)
    texts = [text] if number is None else [text, str(number)]
    for candidate in texts:
        if candidate in words:
            return words.index(candidate)
    ways: list[list[Any]] = [[word.casefold() == candidate.casefold() for word in words] for candidate in texts]
    if number is not None:
        ways += [[of(word) == number for word in words] for of in (_number, _leading_number)]
    for matches in ways:
        if sum(matches) == 1:
            return matches.index(True)
    return None


def _plain_index(label: str, label_words: Sequence[str]) -> int | None:
    """Return the index that a label is as a number; `None` where it is none, or labels are words only."""
    number = _label_number(label)
    is_boolean = label.strip().casefold() in ("true", "false")
    is_reversed = [word.strip().casefold() for word in label_words] == ["yes", "no"]
    if number is None or _are_words_only(label_words) or (is_boolean and (len(label_words) != 2 or is_reversed)):
        return None
    return int(number) if number in range(len(label_words)) else None


def _are_words_only(label_words: Sequence[str]) -> bool:
    """Return whether a number cannot be an index: a label word is a number, or begins with the index of another."""
    if any(_number(word) is not None for word in label_words):
        return True
    numbers = [_leading_number(word) for word in label_words]
    return any(number in range(len(numbers)) and number != index for index, number in enumerate(numbers))


def _label_number(label: str) -> Decimal | None:
    """Return the number that a label is, whole ones without decimals; `True` and `False` are 1 and 0."""
    number = {"true": Decimal(1), "false": Decimal(0)}.get(label.strip().casefold(), _number(label))
    return number.to_integral_value() if number is not None and number == number.to_integral_value() else number


def _number(text: str) -> Decimal | None:
    """Return the number that a text is; `None` for other texts."""
    return Decimal(text.strip()) if re.fullmatch(_NUMBER, text.strip()) else None


def _leading_number(text: str) -> Decimal | None:
    """Return the number that a text begins with, as in `2 stars`; `None` where it goes on as in `1,000` or `1:2`."""
    match = re.match(rf"({_NUMBER})(?![0-9]|[.,:/-][0-9])", text.strip())
    return Decimal(match[1]) if match else None


def _number_text(value: Any) -> str:
    """Return a number as Python writes it, or nothing for other values."""
    is_number = isinstance(value, int | np.integer | np.bool_)
    return _written(value) if is_number or (is_float(value) and math.isfinite(value)) else ""


def _written(value: Any) -> str:
    """Return a value as Python writes it; nothing for an integer of more digits than that."""
    try:
        return str(value)
    except ValueError:
        return ""


def _shown(value: Any) -> str:
    """Return a value for an error: long ones by their beginning and end."""
    try:
        return _short.repr(value)
    except ValueError:
        return "an integer of thousands of digits"


def _is_unicode(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_empty(value: Any) -> bool:
    return value is None or isinstance(value, str | float | np.floating)


def _nested(row: Mapping[Any, Any], name: str, where: str, task: str) -> Any:
    """Return a value of a row's nested columns, or raise a TaskError that says what the row has."""
    try:
        return field_value(row, name)
    except KeyError as error:
        raise TaskError(
            f"{task}: {where}: expected {name!r}, got only {sorted(map(str, row))}: rows need the template's fields "
            "and 'label'"
        ) from error


def _fill(template: str, texts: Mapping[str, str]) -> str:
    """Return a template filled with a text for each field; unlike `str.format`, it reads no attributes."""
    formatter, parts = string.Formatter(), list[str]()
    for text, name, spec, conversion in formatter.parse(template):
        parts.append(text)
        if name is not None:
            parts.append(formatter.format_field(formatter.convert_field(texts[name], conversion), spec or ""))
    return "".join(parts)


def _check_template(name: str, template: str, fields: Sequence[str]) -> None:
    """Refuse templates without the query, with fields that have no name, or with the label."""
    columns = {re.split(r"[.\[]", field)[0] for field in fields}
    if not columns or any(not column or column.isdecimal() for column in columns):
        raise TaskError(
            f"{name}: expected a template with named fields, got {template!r}: write each field of the rows in braces, "
            "such as 'Text: {text} Label:'"
        )
    if "label" in columns:
        raise TaskError(
            f"{name}: expected a template that ends before the label, got {template!r}: leave {{label}} out, the label "
            "word follows the template after label_separator"
        )


def _checked_label_words(name: str, label_words: Sequence[str]) -> tuple[str, ...]:
    """Return label words as a tuple, or raise a TaskError."""
    if not all(word.strip() for word in label_words):
        raise TaskError(
            f"{name}: expected label_words as words, got {label_words!r}: pass a list with one word for each label, in "
            "the order of label indices"
        )
    words = tuple(str(word) for word in label_words)
    if len(words) < 2 or len({word.strip() for word in words}) < len(words):
        raise TaskError(
            f"{name}: expected two or more different label words, got {list(words)}: pass one word for each label"
        )
    if len({word[0].isspace() for word in words}) > 1:
        raise TaskError(
            f"{name}: expected label words that all begin with white space, or none of them, got {list(words)}: leave "
            "it out, and set label_separator"
        )
    return words


def default_label_separator(tail: str, label_words: Sequence[str]) -> str:
    """Return a space, or nothing where a label word follows a text without.

    Args:
        tail: the text before the label word.
        label_words: the label words.

    Example:
        >>> default_label_separator("Label:", ["good", "bad"]), default_label_separator("评价：", ["好", "坏"])
        (' ', '')
    """
    is_spaced = tail[-1:].isspace() or label_words[0][0].isspace()
    is_unspaced = _is_unspaced(tail[-1:]) or all(_is_unspaced(word[0]) for word in label_words)
    return "" if is_spaced or is_unspaced else " "


def _is_unspaced(character: str) -> bool:
    """Return whether a character is of a script without spaces between words."""
    return bool(character) and unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS)


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
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise TaskError(
            f"expected a template like 'Text: {{text}} Label:', got {template!r} ({error}): write each field's name in "
            "one pair of braces"
        ) from error
