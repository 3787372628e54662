"""`icl-dual compare` and `icl-dual view`: a file of one's own in, what the library computes of it out."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import icl_dual as icl
from icl_dual import cli
from icl_dual.models import load_model

WORDS = ("bad", "good")
ROWS = [(f"film number {number}, seen {'twice' if number % 3 else 'once'}", WORDS[number % 2]) for number in range(30)]
BUDGET = ("--k", "2", "--lr", "0.01", "--replicas", "2", "--quiet")


def write_rows(path: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ("text", "kind")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "films.csv", ROWS)


@pytest.fixture(scope="module")
def out(tiny_model: str, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "new" / "folder"
    arguments = ("compare", tiny_model, "--rows", str(films), "--label-column", "kind", "--seeds", "1", "2", *BUDGET)
    assert cli.main([*arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs a command that is refused before a model is loaded or a file is written; returns exit code and error."""
    monkeypatch.chdir(tmp_path)
    for name in ("icl_dual.load_model", "icl_dual.study.load_model"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("no model is needed"))

    def run(*arguments: str) -> tuple[int, str]:
        before = set(tmp_path.rglob("*"))
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        assert captured.out == ""
        assert set(tmp_path.rglob("*")) == before
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return code, line

    return run


def test_table_and_figure_are_written(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    tables = {"metrics.md", "metrics.csv", "results.csv", "README.md"}
    assert names == tables | {"comparison.png", "comparison.pdf", "cells"}


def test_the_numbers_are_those_of_an_experiment_by_hand(out: Path, tiny_model: str) -> None:
    rows = [{"text": text, "label": word} for text, word in ROWS]
    task, model = icl.Task("films", "Text: {text} Kind:", WORDS, rows), icl.load_model(tiny_model)
    results = pd.read_csv(out / "results.csv")
    for seed in (1, 2):
        prompts = icl.build_prompts(model, task, task.demonstrations(2, seed), task.queries())
        comparison = icl.run_experiment(model, prompts, lr=0.01, replicas=2, progress=False).compare(seed=seed)
        values = results.query(f"seed == {seed} and layer.isna()").set_index("metric")["value"].to_dict()
        expected = dict(zip(comparison.overall()["metric"], comparison.overall()["value"], strict=True))
        for name in ("ICL accuracy", "SimAOU", "SimAM after FT", "Kendall"):
            assert float(values[name]) == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
        headline = pd.read_csv(out / "metrics.csv").query(f"seed == {seed}").set_index("metric")["value"].to_dict()
        assert float(headline["SimAOU"]) == pytest.approx(expected["SimAOU"], rel=1e-4)
        assert f"SimAOU         {expected['SimAOU']:.3f}" in (out / "metrics.md").read_text()


def test_the_page_says_what_was_run_and_names_no_machine(out: Path, films: Path) -> None:
    page = (out / "README.md").read_text()
    assert "template `Text: {text} Kind:`, labels `bad`, `good`" in page
    assert "k = 2, 12 queries, seeds 1, 2, learning rate 0.01, 2 replicas" in page
    for folder in (out, films):
        assert str(folder.parent) not in page


def test_drawing_again_needs_no_model_and_no_display(
    out: Path, tiny_model: str, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("icl_dual.study.load_model", lambda *args, **kwargs: pytest.fail("no model is needed"))
    monkeypatch.delenv("DISPLAY", raising=False)
    arguments = ["compare", tiny_model, "--rows", str(films), "--label-column", "kind", "--seeds", "1", *BUDGET]
    assert cli.main([*arguments, "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [cell["seed"] for cell in result["cells"]] == [1]
    assert str(out / "comparison.png") in result["files"]
    assert {metric["metric"] for metric in result["cells"][0]["metrics"]} >= {"SimAOU", "Kendall"}


@pytest.mark.parametrize("changed", [("--lr", "0.02"), ("--k", "3")])
def test_a_folder_of_other_settings_is_refused_and_keeps_its_figure(
    changed: tuple[str, str], out: Path, tiny_model: str, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = (out / "comparison.png").read_bytes()
    arguments = ["compare", tiny_model, "--rows", str(films), "--label-column", "kind", *BUDGET, *changed]
    assert cli.main([*arguments, "--out", str(out)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "cells of other settings" in message
    assert "_lr0.01_" in message
    assert "--out" in message
    assert (out / "comparison.png").read_bytes() == figure


def test_a_model_is_loaded_by_a_device_map(
    tiny_model: str, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., Any]
) -> None:
    code, line = refused("compare", tiny_model, "--rows", str(films), "--device", "cpu", "--device-map", "auto")
    assert code == 2
    assert "not allowed with argument --device" in line
    options: list[dict[str, Any]] = []

    def load(name: str, **given: Any) -> icl.Model:
        options.append(given)
        return load_model(name, **given)

    for place in ("icl_dual.load_model", "icl_dual.study.load_model"):
        monkeypatch.setattr(place, load)
    arguments = [tiny_model, "--rows", str(films), "--label-column", "kind", "--device-map", "auto"]
    assert cli.main(["compare", *arguments, "--seeds", "1", *BUDGET, "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["view", *arguments, "--k", "2", "--quiet", "--out", str(tmp_path / "view.html")]) == 0
    assert [(given.get("device"), given["device_map"]) for given in options] == [(None, "auto")] * 2


NOT_LABELLED = [("a film", "good"), ("another", "bad")]


@pytest.mark.parametrize("command", ["compare", "view"])
@pytest.mark.parametrize(
    ("rows", "header", "options", "message"),
    [
        (NOT_LABELLED, ("text", "lable"), (), "expected a column 'label' .* got the columns 'text', 'lable' .did you"),
        (NOT_LABELLED, ("text", "x"), ("--label-column", "y"), "expected a column 'y' .*: name it with --label-column"),
        ([("a", "0"), ("b", "1")], ("text", "label"), (), "expected words .*, got 0, 1: pass the word of each label"),
        ([(f"{n}", f"w{n}") for n in range(21)], ("text", "label"), (), "at most 20 different labels .*, got 21"),
        ([], ("text", "label"), (), "expected rows in .*films.csv, got none"),
        (NOT_LABELLED, ("text", "label"), ("--labels", "good", "fine"), "line 3: .*bad"),
        (NOT_LABELLED, ("text", "label"), ("--template", "Film: {film}"), "film"),
        (
            [("a", "b", "good"), ("c", "d", "bad")],
            ("premise", "hypothesis", "label"),
            (),
            "expected a single column beside 'label', got 'premise', 'hypothesis': pass --template",
        ),
    ],
)
def test_a_file_that_is_no_task_is_refused(
    command: str, rows: list, header: tuple[str, ...], options: tuple[str, ...], message: str, tmp_path: Path, refused
) -> None:
    write_rows(tmp_path / "films.csv", rows, header)
    code, line = refused(command, "smollm2-135m", "--rows", "films.csv", *options)
    assert code == 1
    assert re.search(message, line), line


@pytest.mark.parametrize("command", ["compare", "view"])
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("smollm2-135", "--task", "mr"), 2, r"did you mean 'smollm2-135m'\?"),
        (("smollm2-135m", "--task", "ssst2"), 1, r"got 'ssst2' \(did you mean 'sst2' or 'sst5'\?\)"),
        (("smollm2-135m", "--task", "mr", "--labels", "a", "b"), 1, "expected --labels with --rows only"),
        (("smollm2-135m", "--rows", "missing.csv"), 1, "missing.csv"),
        (("smollm2-135m", "--task", "mr", "--out", "/proc/icl_dual/out"), 2, "argument --out: expected .*/proc"),
        (("smollm2-135m", "--task", "mr", "--out", "a_file/below"), 2, "argument --out: expected .*a_file"),
    ],
)
def test_wrong_names_and_folders_that_cannot_be_written_are_refused(
    command: str, arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, refused
) -> None:
    (tmp_path / "a_file").write_text("kept")
    assert refused(command, *arguments)[0] == code
    assert re.search(message, refused(command, *arguments)[1])


def test_a_query_that_does_not_exist_is_refused(films: Path, refused) -> None:
    code, line = refused("view", "smollm2-135m", "--rows", str(films), "--label-column", "kind", "--query", "12")
    assert (code, line) == (1, "error: expected --query from 0 to 11, got 12: choose another query")


def test_a_view_replaces_no_file_of_other_origin(films: Path, tmp_path: Path, refused) -> None:
    (tmp_path / "notes.html").write_text("<!doctype html><p>my notes", encoding="utf-8")
    arguments = ("view", "smollm2-135m", "--rows", str(films), "--label-column", "kind", "--out", "notes.html")
    code, line = refused(*arguments)
    assert code == 2
    assert "argument --out: expected a new file, or an earlier view to replace, got 'notes.html'" in line
    assert (tmp_path / "notes.html").read_text(encoding="utf-8") == "<!doctype html><p>my notes"
    # With --force, what is wrong is the next thing.
    assert refused(*arguments, "--force", "--query", "99")[1].startswith("error: expected --query from 0 to 11")


def test_a_view_is_the_page_of_the_same_decomposition(
    tiny_model: str, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "page.html"
    arguments = ["view", tiny_model, "--rows", str(films), "--label-column", "kind", "--k", "2"]
    page.parent.mkdir()
    page.write_text("my notes", encoding="utf-8")
    assert cli.main([*arguments, "--out", str(page), "--quiet", "--force"]) == 0
    assert page.read_text(encoding="utf-8") != "my notes"
    capsys.readouterr()
    # An earlier view is replaced.
    assert cli.main([*arguments, "--query", "3", "--out", str(page), "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [{"text": text, "label": word} for text, word in ROWS]
    task, model = icl.Task("films", "Text: {text} Kind:", WORDS, rows), icl.load_model(tiny_model)
    query = task.queries()[3]
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), [query])
    zero_shot, in_context = (
        icl.capture(model, setting, fields=icl.DECOMPOSE_FIELDS, progress=False)
        for setting in (prompts.zero_shot(), prompts)
    )
    split = icl.decompose(model, zero_shot=zero_shot, in_context=in_context)
    title = f"{Path(tiny_model).name}: query 3 of films after 2 demonstrations"
    view = icl.view(split, zero_shot=zero_shot, tokenizer=model, title=title)
    assert page.read_text(encoding="utf-8") == view.page
    assert result["query"] == task.prompt(query)
    assert result["gold"] == WORDS[query.label]
    assert result["residual"] < 1e-5
