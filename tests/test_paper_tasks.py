"""The six tasks of the paper: their rows, templates and label words."""

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import make_rows

import icl_dual as icl
from icl_dual import paper_tasks
from icl_dual.paper_tasks import _PlainUnpickler, _staicc_rows, registered_task, unregister_task
from icl_dual.tasks import Protocol


def test_cb_comes_from_a_file_with_two_fields(tmp_path: Path) -> None:
    rows = [{"premise": f"It rained {i} days.", "hypothesis": "It rained", "label": i % 3} for i in range(30)]
    path = tmp_path / "cb.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cb = icl.load_task("cb", source=path)
    (example,) = cb.demonstrations(1, seed=0)
    premise = dict(example.fields)["premise"]
    assert cb.prompt(example) == f"{premise} Question: It rained True, False, or Neither? Answer:"
    assert cb.label_words == ("True", "False", "Neither")
    with pytest.raises(icl.TaskError, match="cb: expected source='hub' or the path of a file, got 'wheel'"):
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
    known = r"expected a task out of \['sst2', 'sst5', .*\], got"
    with pytest.raises(icl.TaskError, match=rf"{known} 'sst3' \(did you mean 'sst5' or 'sst2'\?\): choose"):
        icl.load_task("sst3")
    with pytest.raises(icl.TaskError, match=rf"{known} 'nosuch': choose"):
        icl.load_task("nosuch")


def test_pickles_hold_plain_rows_or_are_refused() -> None:
    assert _PlainUnpickler(io.BytesIO(pickle.dumps([(["a"], 1)]))).load() == [(["a"], 1)]
    with pytest.raises(pickle.UnpicklingError, match="expected plain rows"):
        _PlainUnpickler(io.BytesIO(pickle.dumps(Path("x")))).load()


def test_the_released_templates_are_the_references(tmp_path: Path) -> None:
    articles = [{"text": f"Article {i}", "label": i % 4} for i in range(40)]
    (tmp_path / "agnews.jsonl").write_text("\n".join(map(json.dumps, articles)))
    agnews = icl.load_task("agnews", tmp_path / "agnews.jsonl", protocol="reference")
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


@pytest.fixture
def registry() -> Iterator[None]:
    """Leave the registry as it was."""
    before = dict(paper_tasks._registered)
    yield
    paper_tasks._registered.clear()
    paper_tasks._registered.update(before)


def films(name: str, protocol: Protocol = "answer") -> icl.Task:
    return icl.Task(name, "Text: {text} Label:", ("bad", "good"), make_rows(), protocol=protocol)


def test_a_registered_task_is_loaded_by_its_name(registry: None) -> None:
    task = films("films")
    icl.register_task(task)
    assert icl.load_task("films") is task
    assert registered_task("films") is task
    with pytest.raises(icl.TaskError, match=r"films: expected a Task .* protocol='reference', got Task\('films'"):
        icl.load_task("films", protocol="reference")
    with pytest.raises(icl.TaskError, match=r"films: expected source=None for a task that was .*, got 'hub': leave"):
        icl.load_task("films", "hub")
    with pytest.raises(icl.TaskError, match=r"out of \['sst2', .*'cb', 'films'\], got 'sst3'"):
        icl.load_task("sst3")
    unregister_task("films")
    with pytest.raises(icl.TaskError, match="got 'films'"):
        icl.load_task("films")


def test_a_function_makes_a_registered_task_from_source_and_protocol(registry: None, tmp_path: Path) -> None:
    calls = []

    def make(source: object, protocol: Protocol) -> icl.Task:
        calls.append((source, protocol))
        return films("films", protocol)

    icl.register_task(make, name="films")
    assert not calls
    assert registered_task("films") is None, "made only when loaded"
    assert icl.load_task("films", tmp_path, protocol="reference").protocol == "reference"
    assert icl.load_task("films").protocol == "answer"
    assert calls == [(tmp_path, "reference"), (None, "answer")]


def test_a_taken_or_missing_name_is_refused(registry: None) -> None:
    icl.register_task(films("films"))
    for name in ("films", "sst2"):
        with pytest.raises(icl.TaskError, match=f"expected a task name that is not taken, got '{name}': choose"):
            icl.register_task(films(name))
        with pytest.raises(icl.TaskError, match=f"expected a task name that is not taken, got '{name}': choose"):
            icl.register_task(lambda source, protocol: films("x"), name=name)
    with pytest.raises(icl.TaskError, match="expected a name for the task, got None: pass name="):
        icl.register_task(lambda source, protocol: films("x"))
    with pytest.raises(icl.TaskError, match="expected no name for a task, which has its own, 'x', got name='y'"):
        icl.register_task(films("x"), name="y")
    icl.register_task(lambda source, protocol: films("other"), name="mine")
    with pytest.raises(icl.TaskError, match=r"mine: expected a Task of this name .*, got Task\('other'"):
        icl.load_task("mine")


@pytest.mark.parametrize("name", ["sst2", "films"])
def test_only_a_users_own_task_can_be_removed(name: str) -> None:
    with pytest.raises(icl.TaskError, match=rf"expected the name of a task that you registered, \[\], got '{name}'"):
        unregister_task(name)
    assert icl.TASKS == ("sst2", "sst5", "mr", "subj", "agnews", "cb")
