"""Rows of files, frames and data sets: the same whatever they come in; malformed ones are named by their line."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.rows import field_value, located_rows

TEMPLATE, WORDS = "Text: {text} Label:", ("no", "yes")
texts = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip),
    min_size=4,
    max_size=12,
)


@settings(max_examples=30, deadline=None)
@given(row_texts=texts)
def test_rows_are_the_same_whatever_they_come_in(
    tmp_path_factory: pytest.TempPathFactory, row_texts: list[str]
) -> None:
    rows = [{"text": f"{text}, “{i}”", "label": i % 2} for i, text in enumerate(row_texts)]
    folder = tmp_path_factory.mktemp("rows")
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "rows.csv", index=False)
    (folder / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    named = frame.assign(label=frame["label"].map(WORDS.__getitem__))
    sources: list[Any] = [
        frame,
        frame.astype({"label": float}),
        frame.astype({"label": bool}),
        named,
        named.astype({"label": "category"}),
        Dataset.from_list(rows),
        Dataset.from_list(rows).with_format("numpy"),
        iter(rows),
        *(folder / name for name in ("rows.csv", "rows.jsonl", "rows.json")),
    ]
    expected = icl.Task("t", TEMPLATE, WORDS, rows).fingerprint
    for source in sources:
        assert icl.Task("t", TEMPLATE, WORDS, source).fingerprint == expected, type(source)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"text": ["a", "b"], "label": [0, 1]},
            r"expected rows as dictionaries, .*, got dict with the keys \['text', ",
        ),
        (DatasetDict({"train": Dataset.from_list(make_rows())}), r"got DatasetDict with the keys \['train'\]: pass"),
        ([("a", 0), ("b", 1)], "rows, row 1: expected a dictionary, got tuple: pass each row as"),
        ([{"text": "a", "label": 0}, None], "rows, row 2: expected a dictionary, got NoneType"),
        (["text", "label"], "rows, row 1: expected a dictionary, got str"),
        (
            pd.DataFrame([["a", "b", 0]], columns=["text", "text", "label"]),
            r"expected rows as a frame with different column names, got \['text', 'text', 'label'\]: rename",
        ),
        (pd.DataFrame({"text": ["a", None], "label": [0, 1]}), "rows, row 2: expected text as 'text', got (nan|None)"),
        (pd.DataFrame({"text": ["a", "b"], "label": [0, None]}), "rows, row 2: expected a label .*, got nan"),
        (
            pd.DataFrame({"text": ["a", ["b"]], "label": [0, 1]}),
            r"row 2: expected text as 'text', got \['b'\]: pass text",
        ),
    ],
)
def test_rows_that_are_no_rows_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(icl.TaskError, match=message):
        icl.Task("t", TEMPLATE, WORDS, rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "label,text\n1,Great film, truly moving\n0,Dull\n",
            r"line 2: expected 2 columns \(label, text\), got 3: quote",
        ),
        ('label,text\n0,Dull\n1,"Great" film\n', "line 3: expected quotes around whole texts, .*: correct its quotes"),
        ('label,text\n0,Dull\n1,"Great film\n0,Slow\n', "line 3: expected quotes around whole texts"),
        ("label,text,text\n0,Dull,x\n", "line 1: expected different column names, got 'text' more than once: rename"),
        ("label;text\n0;Dull\n", "line 1: expected columns separated by commas, got 'label;text': .*sep=';'"),
        ("\n\nlabel\ttext\n0\tDull\n", "line 3: expected columns separated by commas, got .*sep='.t'"),
        ("\nlabel,text\n0,Dull, not slow\n", r"line 3: expected 2 columns \(label, text\), got 3"),
    ],
)
def test_malformed_csv_is_named_by_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(icl.TaskError, match=rf"rows\.csv, {message}"):
        icl.Task("t", TEMPLATE, WORDS, tmp_path / "rows.csv")


def test_texts_longer_than_csvs_limit_are_read_and_the_limit_is_restored(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(f"text,label\n{'x' * (limit + 10)},1\nshort,0\n")
    _, rows = located_rows(tmp_path / "rows.csv", "rows")
    assert len(rows[0][1]["text"]) == limit + 10
    assert csv.field_size_limit() == limit


def test_a_json_file_that_is_no_list_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"text": "a", "label": 0},\n {"text": ')
    with pytest.raises(icl.TaskError, match=r"rows\.json: expected a JSON list of objects, got"):
        located_rows(tmp_path / "rows.json", "rows")
    (tmp_path / "rows.json").write_text('[{"text": "a", "label": 0}, 3]')
    with pytest.raises(icl.TaskError, match=r"rows\.json, row 2: expected a dictionary, got int"):
        icl.Task("t", TEMPLATE, WORDS, tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "got Exceeds the limit"),
        ("[" * 100_000 + "]" * 100_000, "got too many nested brackets"),
        ('{"text": "a", "label": 0, "label": 1}', "got an object with 'label' more than once"),
        ('{"text": "a\\ud800", "label": 0}', r"expected text as 'text', got .*half of a surrogate pair"),
    ],
)
def test_damaged_json_is_refused_in_words(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{row}\n")
    (tmp_path / "rows.json").write_text(f"[{row}]")
    for name in ("rows.jsonl", "rows.json"):
        with pytest.raises(icl.TaskError, match=rf"{re.escape(name)}(, (line|row) 1)?: .*{message}"):
            icl.Task("t", TEMPLATE, WORDS, tmp_path / name)


@pytest.mark.parametrize(
    ("names", "words", "expected"),
    [
        (["no", "yes"], ("no", "yes"), ["no", "yes"]),
        (["Yes", "no"], ("no", "yes"), ["yes", "no"]),
        (["1", "2"], ("1", "2", "3"), ["1", "2"]),
        (["first", "second"], ("no", "yes"), ["no", "yes"]),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_indices_of_classes_are_read_by_the_names_of_these(
    names: list[str], words: tuple[str, ...], expected: list[str], streamed: bool
) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    dataset: Any = Dataset.from_dict({"text": ["zero", "one"], "label": [0, 1]}, features=features)
    task = icl.Task("t", TEMPLATE, words, dataset.to_iterable_dataset() if streamed else dataset)
    examples = {dict(e.fields)["text"]: words[e.label] for e in (*task._demonstrations, *task.queries())}
    assert [examples["zero"], examples["one"]] == expected


def test_classes_of_which_some_are_no_label_words_are_refused() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "bad"])})
    dataset = Dataset.from_dict({"text": ["zero", "one"], "label": [0, 1]}, features=features)
    with pytest.raises(icl.TaskError, match=r"rows, row 2: expected a label .* one of \['no', 'yes'\], got 'bad'"):
        icl.Task("t", TEMPLATE, ("no", "yes"), dataset)


def test_fields_lead_into_nested_columns() -> None:
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}]}, "text": "t"}
    assert [field_value(row, name) for name in ("a.b", "a[b]", "a.c[0].d", "text")] == [1, 2, 3, "t"]
    for name in ("a.x", "a.c[1]", "text.upper", "a.c.0.__class__", "missing"):
        with pytest.raises(KeyError):
            field_value(row, name)
