"""The control script on a tiny model and real rows, with a small budget, and what its tables say of made-up scores."""

import re
import shutil
from pathlib import Path
from typing import Any

import control_tables as tables
import controls as script
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import as_saved_by_0_1
from matplotlib.figure import Figure

import icl_dual as icl

ARGUMENTS = (
    "--tasks",
    "mr",
    "--k",
    "3",
    "--queries",
    "6",
    "--seeds",
    "1",
    "--lr",
    "0.001",
    "--ks",
    "1",
    "--replicas",
    "2",
)


@pytest.fixture(scope="module")
def out(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tables.CONTEXTS, "ICL on another task", {"context_task": "subj"})  # a tenth of AG News' rows
        assert script.main(["--model", tiny_model, *ARGUMENTS, "--orders", "2", "--out", str(folder)]) == 0
    return folder


def cell_of(out: Path, variation: str) -> icl.CellResult:
    suffix = f"_{variation}" if variation else ""
    (folder,) = (out / "cells").glob(f"*tiny-llama_mr_k3_seed1_lr0.001_answer{suffix}")
    return icl.load_cell(folder)


def test_a_mean_that_is_undefined_is_named_in_the_figure(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(script, "finish", lambda fig, *_: figures.append(fig))
    scores = pd.read_csv(out / "controls.csv")
    scores.loc[(scores["metric"] == "SimAOU") & (scores["what is compared"] == tables.CLAIM), "value"] = np.nan
    script.draw(scores, "controls", out / "controls")
    (fig,) = figures
    named = {ax.get_title(): [text.get_text() for text in ax.texts] for ax in fig.axes}
    assert named["SimAOU"] == ["undefined"]
    assert set().union(*named.values()) == {"undefined"}
    plt.close(fig)


def test_every_metric_stands_beside_all_its_controls(out: Path) -> None:
    table = pd.read_csv(out / "controls.csv")
    rows = {*tables.MODELS, *tables.WEIGHTS, *tables.CONTEXTS, *tables.VARIANTS, tables.CLAIM}
    for metric, nulls in tables.NULLS.items():
        assert {*table.loc[table["metric"] == metric, "what is compared"]} == rows | {*nulls}
    numbers = table[table["task"] == "mr"].set_index(["metric", "what is compared"])
    for row, variation in {
        tables.CLAIM: "",
        "untrained model": "untrained",
        "ICL on flipped labels": "flipped-labels",
        "FT layer by layer (causal)": "layer-causal",
        "random ΔW of FT's size": "random-delta",
    }.items():
        values = cell_of(out, variation).comparison.per_layer["SimAOU unnormalised"].mean(1)
        found: Any = numbers.loc[("SimAOU unnormalised", row)]
        assert found["value"] == pytest.approx(values.mean().item(), abs=1e-5)
        assert found["low"] <= found["value"] <= found["high"]
        assert found["queries"] == 6
    inflation = cell_of(out, "").comparison.per_layer["SimAOU inflation null"].mean().item()
    assert numbers.loc[("SimAOU", "random updates for both"), "value"] == pytest.approx(inflation, abs=1e-5)
    assert re.search(r"\| SimAOU +\| claim +\| ICL and FT ", (out / "README.md").read_text())


def test_the_other_task_is_ag_news_and_sst2_for_ag_news() -> None:
    rows = script.plan(script.parse(["--tasks", "sst2", "agnews", "--seeds", "1", "--lr", "0.1"]))
    others = {task: {cell.context_task for cell in cells} for task, cells in rows["ICL on another task"].items()}
    assert others == {"sst2": {"agnews"}, "agnews": {"sst2"}}
    assert {cell.context_task for cells in rows[tables.CLAIM].values() for cell in cells} == {None}


def test_a_control_costs_the_one_run_that_differs(out: Path) -> None:
    for variation, expected in {
        "": {"finetuning", "ICL", "ZSL", "FT", "replicas"},
        "random-delta": {"FT", "replicas"},
        "shuffled-labels": {"ICL"},
        "flipped-labels": {"ICL"},
        "random-labels": {"ICL"},
        "context-of-subj": {"ICL"},
        "reordered": {"ICL"},
        "layer-causal": {"finetuning", "FT", "replicas"},
    }.items():
        assert set(cell_of(out, variation).provenance["seconds"]) - {"metrics"} == expected, variation


def test_the_page_says_what_is_left_and_how_it_was_made(out: Path) -> None:
    page = (out / "README.md").read_text()
    assert "{" not in page
    given = "--tasks mr --k 3 --queries 6 --lr 0.001 --replicas 2 --seeds 1 --ks 1 --orders 2"
    assert f"python analyses/controls.py --model tiny-llama {given}\n" in page
    for claim in tables.CLAIMS.values():
        assert f"**{claim}**" in page
    assert "## The order of demonstrations" in page
    assert str(out) not in page
    for figure in ("controls", "demonstrations"):
        assert (out / f"{figure}.png").stat().st_size > 5_000
        assert (out / f"{figure}.pdf").exists()


def test_the_same_again_needs_no_model(out: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: object, **kwargs: object) -> None:
        raise AssertionError("no model is needed")

    monkeypatch.setattr("icl_dual.study.load_model", load_model)
    monkeypatch.setattr(icl, "load_model", load_model)
    monkeypatch.setitem(tables.CONTEXTS, "ICL on another task", {"context_task": "subj"})
    before = (out / "controls.csv").read_bytes()
    for folder in (next((out / "cells").iterdir()), next((out / "orders").iterdir())):
        as_saved_by_0_1(folder)
    assert script.main(["--model", tiny_model, *ARGUMENTS, "--orders", "2", "--out", str(out)]) == 0
    assert (out / "controls.csv").read_bytes() == before


def test_orders_are_run_by_a_model_that_is_loaded_as_the_options_say(
    out: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(out / "cells", tmp_path / "cells")
    given: list[dict[str, Any]] = []
    load = icl.load_model
    monkeypatch.setattr(icl, "load_model", lambda name, **options: given.append(options) or load(name, **options))
    monkeypatch.setitem(tables.CONTEXTS, "ICL on another task", {"context_task": "subj"})
    arguments = ["--model", tiny_model, *ARGUMENTS, "--orders", "2", "--device-map", "auto", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    assert given == [{"device_map": "auto", "dtype": torch.float32, "arithmetic": None}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*ARGUMENTS, "--orders", "7"), "3! = 6 orders"),
        ((*ARGUMENTS, "--orders", "1"), "expected --orders from 2, or 0 for none, got 1"),
        ((*ARGUMENTS, "--ks", "1", "3"), "expected --ks from 1 to below --k, which is 3, got [3]"),
        ((*ARGUMENTS, "--k", "1"), "expected --k from 2, for there to be another order, got 1"),
        (("--tasks", "cb", "--ks", "1"), "select_lr.py --model smollm2-135m --tasks cb"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*arguments, "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not any(tmp_path.iterdir())


Made = dict[str, dict[str, dict[str, dict[str, tables.Score]]]]


def made_up(claim: float, controls: dict[str, float], n: int = 40) -> Made:
    """Scores of one metric and task, each around a value, with noise of their own that is small."""
    rng = np.random.default_rng(0)

    def score(value: float) -> tables.Score:
        values = torch.from_numpy(value + rng.normal(size=(2, n), scale=0.01))
        return tables.Score(values, torch.zeros(2, 3, dtype=torch.float64))

    families = {family: {row: {"sst2": score(value)} for row, value in controls.items()} for family in tables.FAMILIES}
    return {"SimAOU": {"claim": {tables.CLAIM: {"sst2": score(claim)}}, **families}}


def verdict(scores: tables.Scores) -> dict[Any, Any]:
    unstable = dict.fromkeys(tables.CLAIMS, "1 of 2")
    return tables.claim_table(tables.against_controls(scores), unstable).to_dict("records")[0]


def test_a_claim_has_to_be_above_every_control_of_every_kind() -> None:
    assert verdict(made_up(0.3, {"a": 0.1, "b": 0.2}))["verdict"] == "survives"
    assert verdict(made_up(0.3, {"a": 0.1, "b": 0.4}))["verdict"] == "does not survive"
    mixed = {**made_up(0.3, {"a": 0.1})["SimAOU"], "models": made_up(0.3, {"a": 0.4, "b": 0.1})["SimAOU"]["models"]}
    row = verdict({"SimAOU": mixed})
    assert (row["verdict"], row["models"], row["nulls"]) == ("survives in part", "0 of 1", "1 of 1")
    words = tables.in_words(row)
    assert "survives in part" in words
    assert "not above models that have learned nothing (above on 0 of 1 tasks)" in words
    assert words.endswith("It is unstable in 1 of 2 cells over replicas of the finetuning.")
    stable, unknown = (tables.in_words(row | {"unstable cells": cells}) for cells in ("0 of 2", "not measured"))
    assert stable.endswith("It is stable over replicas of the finetuning.")
    assert "replicas" not in unknown
    closest = {one.family: one.closest for one in tables.against_controls({"SimAOU": mixed})}
    assert closest["models"] == "a"


def test_a_control_of_lower_mean_may_be_the_one_that_comes_closest() -> None:
    scores = made_up(0.3, {"a": 0.2, "noisy": 0.1})
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 40), scale=2.0))
    for family in tables.FAMILIES:
        scores["SimAOU"][family]["noisy"]["sst2"].values.add_(noise - noise.mean())
    found = tables.against_controls(scores)
    assert {one.closest for one in found} == {"noisy"}
    assert not any(one.above for one in found)


def test_every_seed_has_to_agree() -> None:
    scores = made_up(0.3, {"a": 0.1})
    scores["SimAOU"]["models"]["a"]["sst2"].values[1] = 0.301
    (models,) = (one for one in tables.against_controls(scores) if one.family == "models")
    assert models.paired["a"].by_seed[0] > 0 > models.paired["a"].by_seed[1]
    assert not models.above


def test_a_replica_of_the_finetuning_can_take_a_claim_away() -> None:
    scores = made_up(0.3, {"a": 0.1})
    assert verdict(scores)["verdict"] == "survives"
    claim = scores["SimAOU"]["claim"][tables.CLAIM]["sst2"]
    claim.shifts[:, 1] = -0.3
    assert verdict(scores)["verdict"] == "does not survive"
    claim.shifts[1, 1] = 0.0
    assert verdict(scores)["verdict"] == "survives", "a mean of two seeds moves half as far"
    for family in tables.FAMILIES:
        scores["SimAOU"][family]["a"]["sst2"].shifts[:, 1] = -0.3
    claim.shifts[:, 1] = -0.3
    assert verdict(scores)["verdict"] == "survives", "both move alike"
    row = tables.estimates(scores).query("kind == 'claim' and task == 'sst2'").iloc[0]
    assert row["spread"] == pytest.approx(0.3 / 2**0.5)
    assert "†" in tables.control_table(tables.estimates(scores))["SST2"].iloc[0]


def test_what_too_few_queries_tell_stays_open() -> None:
    scores = made_up(0.3, {"a": 0.1}, n=4)
    found = tables.against_controls(scores)
    assert verdict(scores) | {"claim": ""} == {
        "claim": "",
        "measured by": "SimAOU",
        **dict.fromkeys(tables.FAMILIES, "0 of 1 (1 open)"),
        "unstable cells": "1 of 2",
        "verdict": "open",
    }
    assert set(tables.against_table(found)["closest"]) == {"too few queries"}
    assert "4 queries: no interval" in tables.control_table(tables.estimates(scores))["SST2"].iloc[0]
    partly = made_up(0.3, {"a": 0.1})
    partly["SimAOU"]["nulls"]["a"]["sst2"].values.fill_(torch.nan)
    row = verdict(partly)
    assert (row["verdict"], row["nulls"], row["models"]) == ("open", "0 of 1 (1 open)", "1 of 1")
    assert "It is undecided whether it is above what no update" in tables.in_words(row)
