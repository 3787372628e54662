"""Rates are chosen on selection queries: the best that is stable, and what that gives up is said."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import select_lr

import icl_dual as icl
from icl_dual.scripts import common


@pytest.fixture
def default_lr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "default_lr.json"
    monkeypatch.setattr(select_lr, "DEFAULT_LR", path)
    return path


@pytest.fixture
def few_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(icl.PAPER_K, "mr", 3)


def run(model: str, out: Path, *options: str) -> int:
    return select_lr.main(["--model", model, "--tasks", "mr", "--queries", "6", "--out", str(out), *options])


@pytest.mark.usefixtures("few_demonstrations")
def test_a_grid_is_measured_once_and_the_choice_is_kept(
    tiny_model: str, tmp_path: Path, default_lr: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lr_selection"
    options = ("--lrs", "0.001", "0.01", "1e9", "--replicas", "2")
    assert run(tiny_model, out, *options) == 0
    (table,) = out.glob("*.csv")
    rows = pd.read_csv(table)
    assert rows["lr"].tolist() == [select_lr.ZERO_SHOT, 0.001, 0.01, 1e9]
    zero_shot, *records = rows.to_dict("records")
    assert 0 <= zero_shot["accuracy"] <= 1
    assert [math.isnan(row["accuracy"]) for row in records] == [False, False, True], "the last diverged"
    assert any(isinstance(row["unstable"], str) for row in records)
    (chosen,) = json.loads(default_lr.read_text()).values()
    assert chosen["mr"] in (0.001, 0.01)
    (page,) = out.glob("*.md")
    assert "- mr: " in page.read_text()
    assert list(out.glob("*.png"))
    monkeypatch.setattr(icl, "load_model", lambda name: pytest.fail("all of it was measured"))
    assert run(tiny_model, out, *options) == 0


def test_the_choice_is_kept_where_scripts_read_it() -> None:
    chosen = json.loads(select_lr.DEFAULT_LR.read_text())
    assert common.default_lr("smollm2-135m", "sst2") == chosen["smollm2-135m"]["sst2"]


@pytest.mark.usefixtures("few_demonstrations", "default_lr")
def test_a_way_of_finetuning_has_a_table_of_its_own(tiny_model: str, tmp_path: Path) -> None:
    assert (
        run(tiny_model, tmp_path, "--lrs", "0.01", "--replicas", "2", "--loss", "label", "--method", "full-batch") == 0
    )
    (table,) = tmp_path.glob("*.csv")
    assert table.stem.endswith("_label-loss_full-batch")


@pytest.mark.parametrize(
    ("option", "value", "least"), [("--replicas", "0", 2), ("--replicas", "1", 2), ("--queries", "4", 5)]
)
def test_stability_that_is_not_measured_is_not_reported(
    option: str, value: str, least: int, capsys: pytest.CaptureFixture
) -> None:
    assert select_lr.main([option, value]) == 2
    message = f"argument {option}: expected a whole number of at least {least}, got '{value}'"
    assert message in capsys.readouterr().err


def grid(tmp_path: Path, rows: list[tuple[float, float, str | None]]) -> select_lr.Grid:
    tmp_path.mkdir(exist_ok=True)
    grid = select_lr.Grid(tmp_path / "grid.csv", 6)
    for lr, accuracy, unstable in rows:
        row = {"model": "tiny", "task": "mr", "k": 3, "lr": lr, "n": 6, "cross_entropy": lr}
        grid.add(row | {"accuracy": accuracy, "unstable": unstable})
    return grid


def test_the_best_stable_rate_is_chosen_and_what_it_gives_up_is_said(tmp_path: Path) -> None:
    rows = [(0.1, 0.5, None), (0.2, 0.8, "SimAOU, SimAMΔ"), (0.3, 0.7, "stable")]
    measured = grid(tmp_path, rows)
    ranked = select_lr.Grid(measured.table, 6).ranked("mr")
    assert select_lr.choose(ranked)["lr"] == 0.3
    words = "0.3 is stable, the best rate 0.2 is not (SimAOU, SimAMΔ): accuracy 0.70 instead of 0.80"
    assert select_lr.given_up(ranked) == words
    assert measured.unchecked("mr") is None


def test_stability_is_measured_from_the_best_rate_until_one_is_stable(tmp_path: Path) -> None:
    rows = [(0.1, 0.5, None), (0.2, 0.8, "SimAOU"), (0.3, 0.7, None)]
    measured = grid(tmp_path, rows)
    row = measured.unchecked("mr")
    assert row is not None
    assert row["lr"] == 0.3
    all_unstable = grid(tmp_path / "other", [(lr / 10, 1 - lr / 10, "SimAOU") for lr in range(1, 6)])
    assert all_unstable.unchecked("mr") is None
    ranked = all_unstable.ranked("mr")
    assert select_lr.choose(ranked)["lr"] == 0.1
    assert select_lr.given_up(ranked).startswith("0.1 is the best rate and unstable (SimAOU)")


def test_ties_in_accuracy_go_to_the_lower_cross_entropy(tmp_path: Path) -> None:
    ranked = grid(tmp_path, [(0.3, 0.5, None), (0.2, 0.5, "stable")]).ranked("mr")
    assert [row["lr"] for row in ranked] == [0.2, 0.3]
    assert select_lr.given_up(ranked) == "0.2 is the best rate and stable: nothing was given up"
