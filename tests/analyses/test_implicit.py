"""The script of shared patches on a tiny model and real rows, with a small budget."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import implicit as script
import implicit_tables as tables
import pandas as pd
import pytest
import torch

import icl_dual as icl
from icl_dual.statistics import bootstrap
from icl_dual.storage import load_tensors


@pytest.fixture(scope="module")
def arguments(tiny_model: str) -> tuple[str, ...]:
    sizes = ("--k", "2", "--queries", "5", "--train-queries", "2", "--ranks", "1", "9", "--lr", "0.001")
    return ("--models", tiny_model, "--tasks", "sst2", "--seeds", "1", "2", *sizes)


@pytest.fixture(scope="module")
def out(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("implicit")
    assert script.main([*arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def frame(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "behaviour.csv")


def test_every_table_and_figure_is_written(out: Path) -> None:
    pictures = {f"{name}_tiny-llama.{kind}" for name in ("rank", "stream") for kind in ("png", "pdf")}
    csv = {"behaviour.csv", "stream.csv", "matrices.csv"}
    assert {path.name for path in out.iterdir()} == pictures | csv | {"README.md", "cells"}


def test_every_change_has_every_metric_and_the_context_is_the_reference(frame: pd.DataFrame) -> None:
    changes = set(frame["change"])
    assert {*tables.STYLES, tables.ranked(2)} - {tables.SHARED, "another task's patch"} == changes
    assert len(frame) == len(changes) * 3
    of_context: Any = frame[frame["change"] == tables.CONTEXT].set_index(["task", "metric"])["value"]
    assert of_context["sst2", "kl"] == 0
    assert of_context["sst2", "agreement"] == 1


def test_intervals_are_over_queries_and_seeds(out: Path, frame: pd.DataFrame) -> None:
    folders = sorted((out / "cells").glob("*_sst2_*"))
    kl = torch.stack([load_tensors(folder / "effects" / "mean-patch")[0]["kl"] for folder in folders])
    expected = bootstrap(kl)
    (row,) = frame.query("change == 'mean patch' and metric == 'kl'").to_dict("records")
    assert row["value"] == pytest.approx(expected.value, rel=1e-4)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert (row["n_queries"], row["n_seeds"]) == (5, 2)


def test_held_out_queries_are_none_of_those_fitted_to(arguments: tuple[str, ...], out: Path) -> None:
    for run in script.plan(script.parse([*arguments, "--out", str(out)])):
        train, test = script.Bench(run, out / "cells").prompts
        assert (len(train.queries), len(test.queries)) == (2, 5)
        assert not set(train.queries) & set(test.queries)
        assert train.demonstrations == test.demonstrations


def test_changes_of_other_tasks_are_run_where_there_are_several(arguments: tuple[str, ...], out: Path) -> None:
    runs = script.plan(script.parse([*arguments, "--tasks", "sst2", "subj", "--ranks", "1", "2", "7"]))
    benches = {run: script.Bench(run, out / "cells") for run in runs}
    names = [change.name for change in script.changes(benches[runs[0]], benches, [7, 2, 1])]
    assert [name for name in names if tables.rank_of(name)] == [tables.ranked(1), tables.ranked(2)], "two queries"
    others = {"another task's patch", "another task's FT", "another task's function vector", "another prompt's patch"}
    assert others <= set(names)
    assert {"exact patch", *script.RELAXED} <= set(names)


def test_what_is_taken_from_another_run_is_saved_with_that_run(arguments: tuple[str, ...], out: Path) -> None:
    settings = []
    for tasks in (("sst2", "mr"), ("sst2", "agnews")):
        runs = script.plan(script.parse([*arguments, "--tasks", *tasks, "--seeds", "1"]))
        bench, other = (script.Bench(run, out / "cells") for run in runs)
        by_name = {
            change.name: change.settings(bench)
            for change in script.changes(bench, {bench.run: bench, other.run: other}, [1])
        }
        assert by_name["mean patch"] == bench.settings
        for name in ("another task's patch", "another task's FT", "another task's function vector"):
            assert by_name[name] == {**bench.settings, "other": other.settings}
        settings.append(by_name)
    assert settings[0]["FT"] == settings[1]["FT"]
    assert settings[0]["another task's patch"] != settings[1]["another task's patch"]


def test_effects_of_another_run_list_are_refused(
    out: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    # The cell of seed 2 holds the patch of seed 1, the next one in a list of two.
    folder = next((out / "cells").glob("*_seed2")) / "effects" / "another-prompts-patch"
    assert load_tensors(folder)[1]["settings"]["other"]["seed"] == 1
    assert script.main([*arguments, "--seeds", "2", "3", "--out", str(out)]) == 1
    assert "expected a result made with" in capsys.readouterr().err


def test_a_function_vector_is_left_out_where_a_norm_follows_attention(
    out: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run, _) = script.plan(script.parse(arguments))
    bench = script.Bench(run, out / "cells")
    monkeypatch.setattr(script, "has_norm_after_attention", lambda model, layer: True)
    assert bench.vector_effect(bench) == {}


def test_the_committed_run_is_that_of_the_defaults() -> None:
    page = (Path(script.__file__).parents[1] / "figures" / "implicit" / "README.md").read_text()
    args = script.parse([])
    assert script.command_line("analyses/implicit.py", script.make_parser(), args, always=script.ALWAYS) in page


def test_another_prompt_and_another_task_are_the_next_and_the_last_begins_again(arguments: tuple[str, ...]) -> None:
    first, second = script.plan(script.parse(arguments))
    third = replace(second, seed=5)
    assert script._after([second, third], first) == second
    assert script._after([first, third], second) == third
    assert script._after([first, second], third) == first


def test_the_page_has_the_command_and_says_what_exactness_is(out: Path, tiny_model: str) -> None:
    text = (out / "README.md").read_text()
    assert "python analyses/implicit.py --models tiny-llama --tasks sst2 --seeds 1 2 --k 2 --train-queries 2" in text
    assert "exact by construction" in text
    assert "no evidence that" in text
    assert str(Path(tiny_model).parent) not in text
    assert "{" not in text
    assert "nan" not in text


def test_finished_changes_are_drawn_again_without_the_model(
    out: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    script.load.cache_clear()
    before = (out / "behaviour.csv").read_bytes()
    monkeypatch.setattr(icl, "load_model", lambda *args, **kwargs: pytest.fail("no model is needed"))
    assert script.main([*arguments, "--out", str(out)]) == 0
    assert (out / "behaviour.csv").read_bytes() == before


def test_what_was_made_with_other_settings_is_refused(
    out: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*arguments, "--queries", "6", "--out", str(out)]) == 1
    assert "expected a result made with" in capsys.readouterr().err
