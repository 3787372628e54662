"""The six tasks of the paper: their rows, templates and label words."""

import io
import json
import pickle
from pathlib import Path

import pytest

import icl_dual as icl
from icl_dual.paper_tasks import _PlainUnpickler, _staicc_rows


def test_cb_comes_from_a_file_with_two_fields(tmp_path: Path) -> None:
    rows = [{"premise": f"It rained {i} days.", "hypothesis": "It rained", "label": i % 3} for i in range(30)]
    path = tmp_path / "cb.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cb = icl.load_task("cb", source=path)
    (example,) = cb.demonstrations(1, seed=0)
    premise = dict(example.fields)["premise"]
    assert cb.prompt(example) == f"{premise} Question: It rained True, False, or Neither? Answer:"
    assert cb.label_words == ("True", "False", "Neither")
    with pytest.raises(icl.TaskError, match="cb is in no package"):
        icl.load_task("cb", source="wheel")


@pytest.mark.parametrize(
    ("name", "file", "n_rows", "start", "label_words"),
    [
        ("sst2", "sst2", 67_349, "Sentence: ", ("Negative", "Positive")),
        ("sst5", "sst5", 8_544, "Sentence: ", ("terrible", "bad", "neutral", "good", "great")),
        ("mr", "rotten_tomatoes", 8_530, "Review: ", ("Negative", "Positive")),
        ("subj", "subjective", 8_000, "Input: ", ("objective", "subjective")),
        (
            "agnews",
            "agnews",
            127_600,
            "Classify the news articles into the categories of World, Sports, Business, and Technology. News: ",
            ("World", "Sports", "Business", "Technology"),
        ),
    ],
)
def test_the_papers_tasks_have_real_rows(
    name: str, file: str, n_rows: int, start: str, label_words: tuple[str, ...]
) -> None:
    raw = _staicc_rows(file)
    assert len(raw) == n_rows
    task = icl.load_task(name)
    sizes = [len(task._demonstrations), *(len(pool) for pool in task._queries.values())]
    assert sum(sizes) == len({" ".join(row["text"].split()).casefold() for row in raw})
    assert task.prompt(task.queries(1)[0]).startswith(start)
    assert task.label_words == label_words
    assert {example.label for example in task.queries(200)} == set(range(len(label_words)))


def test_unknown_tasks_are_refused_with_the_known_ones() -> None:
    with pytest.raises(icl.TaskError, match=r"unknown task 'sst3': expected one of \['sst2', 'sst5'"):
        icl.load_task("sst3")


def test_pickles_hold_plain_rows_or_are_refused() -> None:
    assert _PlainUnpickler(io.BytesIO(pickle.dumps([(["a"], 1)]))).load() == [(["a"], 1)]
    with pytest.raises(pickle.UnpicklingError, match="expected plain rows"):
        _PlainUnpickler(io.BytesIO(pickle.dumps(Path("x")))).load()


def test_the_released_templates_are_the_references(tmp_path: Path) -> None:
    agnews = icl.load_task("agnews", protocol="reference")
    text = dict(agnews.queries(1)[0].fields)["text"]
    assert agnews.prompt(agnews.queries(1)[0]) == (
        "Classify the news articles into the categories of World, Sports, Business, and Technology. "
        f"Article: {text} Answer:"
    )
    rows = [{"premise": f"P{i}", "hypothesis": f"h{i}", "label": i % 3} for i in range(30)]
    (tmp_path / "cb.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cb = icl.load_task("cb", tmp_path / "cb.jsonl", protocol="reference")
    premise, hypothesis = (text for _, text in cb.queries(1)[0].fields)
    assert cb.prompt(cb.queries(1)[0]) == f"{premise} Question: {hypothesis}. True, False, or Neither? Answer:"
    assert icl.load_task("cb", tmp_path / "cb.jsonl").template == (
        "{premise} Question: {hypothesis} True, False, or Neither? Answer:"
    )
