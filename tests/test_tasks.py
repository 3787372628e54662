"""Tasks: pools that share no text, draws that are the same everywhere, rows that are refused."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from helpers import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.tasks import label_index

TEMPLATE = "Text: {text} Label:"
texts = st.lists(st.text("ab cD", min_size=1, max_size=6).filter(str.strip), min_size=4, max_size=40)


def rows_of(row_texts: list[str]) -> list[dict]:
    return [{"text": text, "label": index % 2} for index, text in enumerate([*row_texts, "zero", "one"])]


@settings(max_examples=60, deadline=None)
@given(row_texts=texts, seed=st.integers(0, 5), two_files=st.booleans())
def test_no_text_is_in_two_pools(row_texts: list[str], seed: int, two_files: bool) -> None:
    rows = rows_of(row_texts)
    task = icl.Task("t", TEMPLATE, ("no", "yes"), rows, rows[len(rows) // 2 :] if two_files else None)
    pools = [task._demonstrations, *(task._queries[split] for split in ("selection", "evaluation"))]
    identities = [example.identity for pool in pools for example in pool]
    assert len(identities) == len(set(identities))
    assert set(identities) == {" ".join(row["text"].split()).casefold() for row in rows}
    draws = task.demonstrations(len(task._demonstrations), seed)
    assert Counter(example.identity for example in draws) == Counter(e.identity for e in task._demonstrations)


def test_draws_are_the_order_of_a_hash_and_so_portable(task: icl.Task) -> None:
    def rank(salt: str, example) -> str:
        return hashlib.sha256(f"{salt}\0{example.identity}".encode()).hexdigest()

    pool = task.demonstrations(30, seed=0)
    assert task.demonstrations(8, seed=3) == sorted(pool, key=lambda e: rank("demonstrations 3", e))[:8]
    assert task.queries(5) == sorted(task.queries(), key=lambda e: rank("queries", e))[:5]
    # Written down once: a change of these would silently change every published number.
    assert [dict(example.fields)["text"] for example in task.demonstrations(2, seed=1)] == PINNED


PINNED = ["very so film number 34", "so bad very number 58"]


def test_the_order_of_rows_does_not_matter() -> None:
    forward = icl.Task("t", TEMPLATE, ("no", "yes"), make_rows())
    backward = icl.Task("t", TEMPLATE, ("no", "yes"), make_rows()[::-1])
    assert forward.demonstrations(9, 1) == backward.demonstrations(9, 1)
    assert forward.queries(9) == backward.queries(9)


def test_balanced_draws_have_equal_classes_and_the_rest_fall_as_they_do(task: icl.Task) -> None:
    assert Counter(example.label for example in task.demonstrations(10, seed=2, balanced=True)) == {0: 5, 1: 5}
    odd = [Counter(example.label for example in task.demonstrations(7, seed, balanced=True)) for seed in range(20)]
    assert {tuple(sorted(counts.items())) for counts in odd} == {((0, 3), (1, 4)), ((0, 4), (1, 3))}, "by seed"
    skewed = icl.Task("t", TEMPLATE, ("no", "yes"), [row | {"label": int(i < 3)} for i, row in enumerate(make_rows())])
    assert len(skewed.demonstrations(20, seed=0)) == 20
    with pytest.raises(
        icl.TaskError, match=r"expected 10 demonstrations labelled 'yes' for balanced k=20, got [0-3]: use"
    ):
        skewed.demonstrations(20, seed=0, balanced=True)


def test_asking_for_more_than_there_is_gives_the_numbers(task: icl.Task) -> None:
    with pytest.raises(icl.TaskError, match="expected k from 0 to 30, the number of demonstrations, got 31: use"):
        task.demonstrations(31, seed=0)
    with pytest.raises(icl.TaskError, match="expected from 1 to 24 evaluation queries, got 25: use"):
        task.queries(25)
    with pytest.raises(icl.TaskError, match="got 0"):
        task.queries(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "  ", "label": 0}, "row 3: expected text as 'text', got '  ': fill it in"),
        (
            {"text": "fine", "label": 2},
            r"row 3: expected a label from 0 to 1 or one of \['no', 'yes'\], got 2: correct it",
        ),
        ({"text": "fine", "label": "maybe"}, "row 3: expected a label .*, got 'maybe': correct it"),
        ({"text": "fine"}, r"row 3: expected 'label', got only \['text'\]"),
        ({"label": 1}, "row 3: expected 'text'"),
        ({"label": 1, None: ["extra"]}, "row 3: expected 'text'"),
        ({"text": None, "label": 1}, "row 3: expected text as 'text', got None"),
        ({"text": float("nan"), "label": 1}, "row 3: expected text as 'text', got nan"),
        ({"text": "fine", "label": 0.9}, "row 3: expected a label .*, got 0.9"),
        ({"text": "fine", "label": float("inf")}, "row 3: expected a label .*, got inf"),
    ],
)
def test_bad_rows_are_named_by_their_number(row: dict, message: str) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": "yes"}, row]
    with pytest.raises(icl.TaskError, match=message):
        icl.Task("t", TEMPLATE, ("no", "yes"), rows)


@pytest.mark.parametrize("rows", [[], [{"text": "a", "label": 1}, {"text": "b", "label": 1}]])
def test_empty_and_one_class_tasks_are_refused(rows: list[dict]) -> None:
    with pytest.raises(icl.TaskError, match="expected rows of two or more classes"):
        icl.Task("t", TEMPLATE, ("no", "yes"), rows)


def test_templates_and_label_words_are_checked() -> None:
    with pytest.raises(icl.TaskError, match="named fields"):
        icl.Task("t", "no field", ("no", "yes"), make_rows())
    with pytest.raises(icl.TaskError, match="two or more different label words"):
        icl.Task("t", TEMPLATE, ("no", "no"), make_rows())


def test_rows_come_from_jsonl_and_csv(tmp_path: Path) -> None:
    rows = make_rows()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    expected = icl.Task("t", TEMPLATE, ("no", "yes"), rows).demonstrations(9, 0)
    for name in ("rows.jsonl", "rows.csv"):
        assert icl.Task("t", TEMPLATE, ("no", "yes"), tmp_path / name).demonstrations(9, 0) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "dull, slow and long,0",
            r"line 5: expected 2 columns \(text, label\), got 3: quote texts that contain commas",
        ),
        ("dull", r"line 5: expected 2 columns \(text, label\), got 1: quote texts"),
        ("dull,maybe", "line 5: expected a label from 0 to 1 .*, got 'maybe': correct it, or the task's label_words"),
        (",0", "line 5: expected text as 'text', got ''"),
    ],
)
def test_bad_rows_of_a_csv_file_are_named_by_their_line(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'text,label\n\n"fine, and\nlong",0\n{row}\ngood,1\n')
    with pytest.raises(icl.TaskError, match=rf"rows\.csv, {message}"):
        icl.Task("t", TEMPLATE, ("no", "yes"), path)


def test_quoted_commas_line_breaks_and_empty_lines_are_read_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('label,text\n0,"fine, and\nlong"\n\n1,good\n')
    task = icl.Task("t", TEMPLATE, ("no", "yes"), path)
    assert {example.fields[0][1] for example in (*task.demonstrations(1, 0), *task.queries())} == {
        "fine, and\nlong",
        "good",
    }


def test_bad_rows_of_a_jsonl_file_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": "maybe"}\n')
    with pytest.raises(
        icl.TaskError, match=r"rows\.jsonl, line 2: expected a label .*, got 'maybe': correct it, or the"
    ):
        icl.Task("t", TEMPLATE, ("no", "yes"), path)


def test_unreadable_files_say_where(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", \n')
    with pytest.raises(icl.TaskError, match=r"rows\.jsonl, line 2: expected one JSON object, got .* line of its own"):
        icl.Task("t", TEMPLATE, ("no", "yes"), tmp_path / "rows.jsonl")
    with pytest.raises(icl.TaskError, match=r"got .*row\.jsonl, which does not exist \(did you mean 'rows\.jsonl'\?\)"):
        icl.Task("t", TEMPLATE, ("no", "yes"), tmp_path / "row.jsonl")
    with pytest.raises(icl.TaskError, match=r"got .*rows\.csv, which does not exist"):
        icl.Task("t", TEMPLATE, ("no", "yes"), tmp_path / "none" / "rows.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\nschön,0\n".encode("latin-1"))
    with pytest.raises(icl.TaskError, match=r"expected a readable UTF-8 file of rows at .*latin\.csv"):
        icl.Task("t", TEMPLATE, ("no", "yes"), tmp_path / "latin.csv")
    with pytest.raises(icl.TaskError, match=r"expected a \.jsonl, \.json or \.csv file"):
        icl.Task("t", TEMPLATE, ("no", "yes"), tmp_path / "rows.txt")


def test_reference_draws_are_those_of_datasets_own_shuffle() -> None:
    """Repeated texts, texts of both splits and white space stay: the released code takes rows as they are."""
    rows = [row | {"text": f" {row['text']} "} for row in make_rows(40)] + make_rows(3)
    query_rows = make_rows(25)
    task = icl.Task("t", TEMPLATE, ("no", "yes"), rows, query_rows, protocol="reference")
    for seed in (1, 7):
        shuffled = Dataset.from_list(rows).shuffle(seed=seed)
        draws = [dict(example.fields)["text"] for example in task.demonstrations(43, seed)]
        assert draws == shuffled["text"][:]
    shuffled = Dataset.from_list(query_rows).shuffle(seed=1)
    assert [dict(example.fields)["text"] for example in task.queries()] == shuffled["text"][:]
    assert [example.label for example in task.queries(4)] == shuffled["label"][:4]
    assert any(task.prompt(example).startswith("Text:  ") for example in task.demonstrations(43, 1))


def test_reference_queries_are_cut_at_2000() -> None:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(2100)]
    assert len(icl.Task("t", TEMPLATE, ("no", "yes"), rows[:9], rows, protocol="reference").queries()) == 2000
    with pytest.raises(icl.TaskError, match="from 1 to 2000 evaluation queries, got 2001"):
        icl.Task("t", TEMPLATE, ("no", "yes"), rows[:9], rows, protocol="reference").queries(2001)


def test_reference_pools_of_one_file_share_no_text_and_are_shuffled_from_its_order() -> None:
    rows = make_rows()
    task = icl.Task("t", TEMPLATE, ("no", "yes"), rows, protocol="reference")
    answer = icl.Task("t", TEMPLATE, ("no", "yes"), rows)
    pools = [task._demonstrations, *task._queries.values()]
    assert [{e.identity for e in pool} for pool in pools] == [
        {e.identity for e in pool} for pool in (answer._demonstrations, *answer._queries.values())
    ]
    in_order = [e for e in (task._example(row, "") for row in rows) if e in task._demonstrations]
    expected = Dataset.from_list([{"text": dict(e.fields)["text"]} for e in in_order]).shuffle(seed=5)["text"][:]
    assert [dict(e.fields)["text"] for e in task.demonstrations(len(in_order), 5)] == expected


def test_what_the_reference_protocol_does_not_have_is_refused() -> None:
    task = icl.Task("t", TEMPLATE, ("no", "yes"), make_rows(), make_rows(20), protocol="reference")
    with pytest.raises(
        icl.TaskError, match="expected balanced=False under the reference protocol, got balanced=True: use"
    ):
        task.demonstrations(2, 1, balanced=True)
    with pytest.raises(icl.TaskError, match=r"expected split out of \['evaluation'\], got 'selection'"):
        task.queries(2, split="selection")


def test_the_fingerprint_tells_everything_that_decides_prompts_and_draws() -> None:
    rows, words = make_rows(), ("no", "yes")
    task = icl.Task("t", TEMPLATE, words, rows)
    assert icl.Task("other name", TEMPLATE, words, rows[::-1]).fingerprint == task.fingerprint, "draws are the same"
    split = icl.Task("t", TEMPLATE, words, rows[:30], rows[30:])
    assert icl.Task("t", TEMPLATE, words, rows[:30], rows[:29:-1]).fingerprint == split.fingerprint
    changed_text = [rows[0] | {"text": "another film"}, *rows[1:]]
    changed_label = [rows[0] | {"label": 1 - int(str(rows[0]["label"]))}, *rows[1:]]
    others = {
        "template": icl.Task("t", "Text: {text} Class:", words, rows),
        "label words": icl.Task("t", TEMPLATE, ("no", "maybe"), rows),
        "text": icl.Task("t", TEMPLATE, words, changed_text),
        "label": icl.Task("t", TEMPLATE, words, changed_label),
        "fewer rows": icl.Task("t", TEMPLATE, words, rows[:-1]),
        "split": split,
        "protocol": icl.Task("t", TEMPLATE, words, rows, protocol="reference"),
        "order of the reference protocol": icl.Task("t", TEMPLATE, words, rows[::-1], protocol="reference"),
    }
    fingerprints = {task.fingerprint} | {other.fingerprint for other in others.values()}
    assert len(fingerprints) == 1 + len(others)
    # Written down once: a change of it would refuse to continue every study.
    assert task.fingerprint == FINGERPRINT


FINGERPRINT = "e08c78de66099318"


def test_pool_sizes_are_those_of_the_draws(task: icl.Task) -> None:
    assert task.pool_sizes == {
        "demonstrations": task.n_demonstrations,
        "selection": len(task.queries(split="selection")),
        "evaluation": len(task.queries()),
    }
    assert "30" in repr(task)


@pytest.mark.parametrize(
    ("words", "labels", "expected"),
    [
        (
            ("no", "yes"),
            [0, "1", 1.0, "1.0", True, "True", "true", np.bool_(False), np.int64(1), " yes ", "YES"],
            "01111110111",
        ),
        (("1", "0"), [1, "1", 1.0, "1.0", True, 0, "0", False], "00000111"),
        (("-1", "0", "1"), [0, 1, -1, "-1", 1.0], "12002"),
        (("1", "2", "3"), [1, 2.0, "3"], "012"),
        (("False", "True"), [True, "True", "true", 1, 0, False], "111100"),
        (("True", "False", "Neither"), [True, False, 0, "0", 2, "neither"], "010022"),
        (("true", "false"), [True, "True", False, 0], "0010"),
        (("a", "A"), ["a", "A", 1], "011"),
        ((" no", " yes"), ["no", " yes", 1], "011"),
        (("0.5", "1.0"), [0.5, "1.0", 1.0], "011"),
        (("1.0", "2.0"), [1, "2", 2.0, "+1"], "0110"),
        (("+1", "-1"), [1, -1, "1.0"], "010"),
        (("1 star", "2 stars", "3 stars"), [1, 2, "3", 3.0, "2 stars"], "01221"),
        (("2D", "3D"), [0, 1, 2, "3"], "0101"),
        (("0 (no)", "1 (yes)"), [0, 1, True, False], "0110"),
        (("1st", "1-1", "1:1"), [1, "1st", "1-1", "1:1"], "0012"),
        (("half past 1", "noon", "2 o'clock"), [0, 1, 2, "noon"], "0121"),
    ],
)
def test_labels_are_read_as_words_first(words: tuple[str, ...], labels: list, expected: str) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    task = icl.Task("t", TEMPLATE, words, rows)
    by_text = {task.prompt(e): e.label for e in (*task.demonstrations(task.n_demonstrations, 0), *all_queries(task))}
    assert [by_text[f"Text: t{i} Label:"] for i in range(len(rows))] == [int(digit) for digit in expected]


@pytest.mark.parametrize(("labels", "lowest"), [([1, 2], 1), (["2", 1.0], 1), (["three", 1], 1)])
def test_indices_that_are_counted_from_1_are_refused(labels: list, lowest: int) -> None:
    words = ("one", "two", "three")
    rows = [{"text": f"t{i}", "label": labels[i % 2]} for i in range(20)]
    with pytest.raises(icl.TaskError, match=rf"labels run from {lowest} to \d; indices begin at 0: subtract 1, or"):
        icl.Task("t", TEMPLATE, words, rows)
    with_zero = [{"text": "u", "label": 0}, {"text": "v", "label": 1}]
    assert icl.Task("t", TEMPLATE, words, rows, with_zero).pool_sizes["evaluation"] == 2
    words_only = [{"text": f"t{i}", "label": words[1 + i % 2]} for i in range(20)]
    assert icl.Task("t", TEMPLATE, words, words_only).pool_sizes["evaluation"] == 8


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 3), n=st.integers(2, 4), written=st.sampled_from(["{}", "{}.0", "{} stars", "{}: good"]))
def test_numbers_that_words_begin_with_are_never_taken_for_other_indices(first: int, n: int, written: str) -> None:
    words = [written.format(first + index) for index in range(n)]
    for number in range(-1, 8):
        expected = number - first if 0 <= number - first < n else None
        index = label_index(str(number), words)
        are_indices = first >= n and " " in written  # no word is a number or begins with an index
        assert index == (number if are_indices and number in range(n) else expected)


def test_a_template_or_label_words_of_another_type_are_refused() -> None:
    template: Any
    words: Any
    for template in (None, 5):
        with pytest.raises(icl.ArgumentError, match=f"icl_dual.Task: expected template as text, got {template}"):
            icl.Task("t", template, ("no", "yes"), make_rows())
    for words in (None, 2, iter(("no", "yes"))):
        with pytest.raises(icl.ArgumentError, match="expected label_words as a list or tuple, got "):
            icl.Task("t", TEMPLATE, words, make_rows())


def all_queries(task: icl.Task) -> list:
    return [example for pool in task._queries.values() for example in pool]


@pytest.mark.parametrize(
    ("words", "label", "message"),
    [
        (
            ("1", "2", "3"),
            0,
            r"expected one of \['1', '2', '3'\], got 0: .* \(labels are no indices where a label word",
        ),
        (
            ("1 star", "2 stars"),
            0,
            r"expected one of \['1 star', '2 stars'\], got 0: .* begins with the index of another",
        ),
        (("0.5", "1.5"), 1, r"expected one of \['0.5', '1.5'\], got 1"),
        (("1.0", "1."), "+1", r"expected one of \['1.0', '1.'\], got '\+1'"),
        (("1", "0"), 2, r"expected one of \['1', '0'\], got 2"),
        (("a", "A", "b"), "á", "expected a label from 0 to 2"),
        (("no", "maybe", "yes"), True, r"expected a label from 0 to 2 or one of \['no', 'maybe', 'yes'\], got True"),
        (("no", "yes"), -1, "expected a label from 0 to 1 .*, got -1"),
        (("no", "yes"), 0.5, "got 0.5"),
        (("no", "yes"), None, "got None"),
        (("no", "yes"), [1], r"got \[1\]"),
        (("no", "yes"), "²", "got '²'"),
        (("none", "mild"), None, "got None"),
        (("nan", "mild"), float("nan"), "got nan"),
        (("nan", "mild"), np.float32("nan"), "got nan"),
        (("<NA>", "NaT"), pd.NA, "got <NA>"),
        (("<NA>", "NaT"), pd.NaT, "got NaT"),
        (("yes", "no"), True, "got True"),
        pytest.param(("no", "yes"), 10**5000, "got an integer of thousands of digits", id="long integer"),
        (("no", "yes"), "9" * 5000, r"got '9+\.\.\.9+': correct it"),
    ],
)
def test_ambiguous_and_unknown_labels_are_refused(words: tuple[str, ...], label: object, message: str) -> None:
    rows = [{"text": "a", "label": words[0]}, {"text": "b", "label": words[1]}, {"text": "c", "label": label}]
    with pytest.raises(icl.TaskError, match=f"row 3: .*{message}|row 3: {message}"):
        icl.Task("t", TEMPLATE, words, rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"no", "yes"}, "expected label_words as a list or tuple, got {.*}.*: pass a sorted list, a set has no order"),
        (frozenset(("no", "yes")), "expected label_words as a list or tuple, got frozenset"),
        ({"no": 0, "yes": 1}, "expected label_words as a list or tuple, got {'no': 0"),
        (("no", " no"), "two or more different label words"),
        ((" no", "yes"), "expected label words that all begin with white space, or none of them"),
    ],
)
def test_label_words_without_order_or_of_two_kinds_are_refused(words: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        icl.Task("t", TEMPLATE, words, make_rows())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Text: {text} Label: {label}", r"expected a template that ends before the label, .*: leave {label} out"),
        ("{label.name}: {text}", "expected a template that ends before the label"),
        ("Text: {text} {}", "expected a template with named fields"),
        ("Text: {0}", "expected a template with named fields"),
        ("Text: {0.text}", "expected a template with named fields"),
        ("Text: {text", "expected a template like"),
        ("Text: {text:5.2f} Label:", r"rows, row 1: expected a template that text fills, got .*: write each field"),
        ("Text: {text:{width}} Label:", r"rows, row 1: expected a template that text fills"),
        ("Text: {text!x} Label:", "rows, row 1: expected a template that text fills"),
        ("Text: {text.__class__} Label:", r"rows, row 1: expected 'text.__class__', got only \['label', 'text'\]"),
        ("Text: {text.} Label:", r"rows, row 1: expected 'text\.', got only \['label', 'text'\]"),
        ("Text: {text[]} Label:", r"rows, row 1: expected 'text\[\]', got only"),
        ("Text: {sentence} Label:", r"rows, row 1: expected 'sentence', got only \['label', 'text'\]"),
    ],
)
def test_templates_that_rows_cannot_fill_are_refused(template: str, message: str) -> None:
    with pytest.raises(icl.TaskError, match=message):
        icl.Task("t", template, ("no", "yes"), make_rows())


def test_a_template_that_ends_with_the_label_under_another_name_is_refused() -> None:
    rows = [row | {"sentiment": ("No", "yes")[int(str(row["label"]))]} for row in make_rows()]
    template = "Review: {text}\nSentiment: {sentiment}"
    with pytest.raises(icl.TaskError, match=r"got .*, where {sentiment} is the label word in every row of rows: leave"):
        icl.Task("t", template, ("no", "yes"), rows)
    rows[5]["sentiment"] = "maybe"
    assert icl.Task("t", template, ("no", "yes"), rows).field_names == ("text", "sentiment")
    copied = icl.Task("copy", "{sentiment}", ("no", "yes"), rows[:5], label_separator=" -> ")
    assert copied.prompt(copied.queries(1)[0]) in ("No", "yes")


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["{text}", "{n:>4}", "{text!r}", "a ", "{{", "}}", "：", "\n"]), max_size=6),
    text=st.text(min_size=1).filter(str.strip),
)
def test_filled_templates_are_those_of_str_format(pieces: list[str], text: str) -> None:
    template = "".join([*pieces, "{text}", *pieces[:2]])
    rows = [{"text": f"{text.strip()}{i}", "n": i, "label": i % 2} for i in range(8)]
    task = icl.Task("t", template, ("no", "yes"), rows)
    expected = {template.format(text=row["text"], n=str(row["n"])) for row in rows}
    assert {task.prompt(e) for e in (*task.demonstrations(4, 0), *all_queries(task))} == expected
    assert task.prompt(task.queries(1)[0]).endswith(task.tail)


def test_dotted_fields_and_numbers_are_filled() -> None:
    rows = [{"answers.text": f"t{i}", "n": {"a": i, "b": [i + 0.5]}, "label": i % 2} for i in range(12)]
    task = icl.Task("t", "Q: {answers.text} {n.a}+{n[b][0]}=", ("no", "yes"), rows)
    assert {task.prompt(e) for e in task.demonstrations(6, 0)} <= {f"Q: t{i} {i}+{i + 0.5}=" for i in range(12)}


@pytest.mark.parametrize(
    ("template", "words", "options", "expected"),
    [
        ("Text: {text} Label:", ("no", "yes"), {}, "Label: yes"),
        ("Text: {text} Label: ", ("no", "yes"), {}, "Label: yes"),
        ("Text: {text}\nLabel:\n", ("no", "yes"), {}, "Label:\nyes"),
        ("Text: {text} Label:", (" no", " yes"), {}, "Label: yes"),
        ("评论：{text}情感：", ("负面", "正面"), {}, "情感：正面"),
        ("评论：{text}情感:", ("负面", "正面"), {}, "情感:正面"),
        ("評価：{text}答え：", ("no", "yes"), {}, "答え：yes"),
        ("ข้อความ: {text} ความรู้สึก:", ("ลบ", "บวก"), {}, "ความรู้สึก:บวก"),
        ("문장: {text} 감정:", ("부정", "긍정"), {}, "감정: 긍정"),
        ("Text: {text} Label:", ("no", "yes"), {"label_separator": ""}, "Label:yes"),
        ("Text: {text} Label:", ("no", "yes"), {"label_separator": "\n"}, "Label:\nyes"),
        ("{text}", ("no", "yes"), {}, " yes"),
    ],
)
def test_a_label_follows_its_separator(
    template: str, words: tuple[str, str], options: dict, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = icl.Task("t", template, words, make_rows(), **options)
    assert (task.prompt(task.queries(1)[0]) + task.label_text(1)).endswith(expected)
    assert not caplog.records


@pytest.mark.parametrize(
    ("template", "words", "separator"),
    [
        ("Text: {text} Label: ", ("no", "yes"), " "),
        ("Text: {text} Label:\n", ("no", "yes"), "\n"),
        ("Text: {text} Label: ", (" no", " yes"), None),
        ("Text: {text} Label:", (" no", " yes"), " "),
        ("Text: {text} Label:", (" no", " yes"), "\n"),
    ],
)
def test_doubled_white_space_is_warned_of(
    template: str, words: tuple[str, str], separator: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    icl.Task("t", template, words, make_rows(), label_separator=separator)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "t: white space is doubled before the label word" in record.getMessage()


def test_fields_keep_their_white_space_where_they_are_told_to() -> None:
    rows = [row | {"text": f" {row['text']}\n"} for row in make_rows()]
    task = icl.Task("t", "{text}Label:", ("no", "yes"), rows, strip_fields=False)
    assert task.prompt(task.queries(1)[0]) in {f"{row['text']}Label:" for row in rows}


def test_separators_and_description_are_a_part_of_the_fingerprint() -> None:
    def fingerprint(template: str = TEMPLATE, **options: Any) -> str:
        return icl.Task("t", template, ("no", "yes"), make_rows(), **options).fingerprint

    options: list[dict[str, Any]] = [
        {"label_separator": ""},
        {"separator": "\n\n"},
        {"separator": ""},
        {"description": "d"},
    ]
    assert len({fingerprint(), *(fingerprint(**each) for each in options)}) == 1 + len(options)
    assert fingerprint(label_separator=" ") == fingerprint() == FINGERPRINT


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=2, max_size=7).filter(lambda counts: sum(map(bool, counts)) > 1),
    k=st.integers(0, 20),
    seed=st.integers(0, 50),
)
def test_balanced_draws_differ_by_at_most_one_for_each_class(counts: list[int], k: int, seed: int) -> None:
    words = [f"word {label}" for label in range(len(counts))]
    texts_by_label = [(f"text {label} {i}", label) for label, n in enumerate(counts) for i in range(n)]
    queries = [{"text": f"query {label}", "label": label} for label in range(len(counts))]
    rows = [{"text": text, "label": label} for text, label in texts_by_label]
    task = icl.Task("t", TEMPLATE, words, rows, queries)
    available = Counter(e.label for e in task.demonstrations(task.n_demonstrations, 0))
    quota, rest = divmod(k, len(words))
    possible = (
        k <= task.n_demonstrations
        and all(available[label] >= quota for label in range(len(words)))
        and sum(n > quota for n in available.values()) >= rest
    )
    if not possible:
        with pytest.raises(icl.TaskError, match="expected"):
            task.demonstrations(k, seed, balanced=True)
        return
    drawn_labels = Counter(e.label for e in task.demonstrations(k, seed, balanced=True))
    assert sum(drawn_labels.values()) == k
    assert all(quota <= drawn_labels[label] <= quota + 1 for label in range(len(words)))
    assert task.demonstrations(k, seed, balanced=True) == task.demonstrations(k, seed, balanced=True)


def test_balanced_draws_of_many_classes_give_each_class_its_turn() -> None:
    words = [f"intent {i}" for i in range(12)]
    task = icl.Task("t", TEMPLATE, words, [{"text": f"text {i}", "label": i % 12} for i in range(240)])
    draws = [{e.label for e in task.demonstrations(5, seed, balanced=True)} for seed in range(240)]
    assert all(len(labels) == 5 for labels in draws)
    counts = Counter(label for labels in draws for label in labels)
    # Each class is in 5/12 of the draws: 100 of 240, with a deviation of 7.6.
    assert all(70 < counts[label] < 130 for label in range(12)), counts
