"""The control script on the real model and rows, with a small budget, and what its tables say of made-up scores."""

import subprocess
import sys
from pathlib import Path

import control_tables as tables
import controls as script
import numpy as np
import pandas as pd
import pytest
import torch

import icl_dual as icl
from icl_dual.intervals import bootstrap

SCRIPT = Path(__file__).parents[2] / "analyses" / "controls.py"
ARGUMENTS = ("--tasks", "sst2", "--k", "3", "--queries", "6", "--seeds", "1", "--lr", "0.001", "--ks", "1")


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    done = run(folder, *ARGUMENTS, "--orders", "2")
    assert done.returncode == 0, done.stderr
    return folder


def cell_of(out: Path, variation: str) -> icl.CellResult:
    suffix = f"_{variation}" if variation else ""
    return icl.load_cell(out / "cells" / f"smollm2-135m_sst2_k3_seed1_lr0.001_answer{suffix}")


def test_every_metric_stands_beside_all_its_controls(out: Path) -> None:
    table = pd.read_csv(out / "controls.csv")
    rows = {*tables.MODELS, *tables.WEIGHTS, *tables.CONTEXTS, *tables.VARIANTS, tables.CLAIM}
    for metric, nulls in tables.NULLS.items():
        assert {*table.loc[table["metric"] == metric, "what is compared"]} == rows | {*nulls}
    shown = table.set_index(["metric", "what is compared"])["SST2"]
    for row, variation in {
        tables.CLAIM: "",
        "untrained model": "untrained",
        "ICL on flipped labels": "flipped-labels",
        "FT layer by layer (causal)": "layer-causal",
        "random ΔW of FT's size": "random-delta",
    }.items():
        values = cell_of(out, variation).comparison.per_layer["SimAOU unnormalised"]
        value, interval = str(shown["SimAOU unnormalised", row]).split(maxsplit=1)
        assert float(value) == pytest.approx(values.nanmean(1).mean().item(), abs=6e-4)
        assert interval.startswith("[")
    inflation = cell_of(out, "").comparison.per_layer["SimAOU inflation null"].mean().item()
    assert str(shown["SimAOU", "random updates for both"]).startswith(f"{inflation:.3f} [")


def test_a_control_costs_the_one_run_that_differs(out: Path) -> None:
    for variation, expected in {
        "": {"finetuning", "ICL", "ZSL", "FT"},
        "random-delta": {"FT"},
        "shuffled-labels": {"ICL"},
        "flipped-labels": {"ICL"},
        "random-labels": {"ICL"},
        "context-of-agnews": {"ICL"},
        "reordered": {"ICL"},
        "layer-causal": {"finetuning", "FT"},
    }.items():
        assert set(cell_of(out, variation).provenance["seconds"]) - {"metrics"} == expected, variation


def test_the_page_says_what_is_left_and_how_it_was_made(out: Path) -> None:
    page = (out / "README.md").read_text()
    assert "{" not in page
    assert (
        "python analyses/controls.py --model smollm2-135m --tasks sst2 --seeds 1 --ks 1 --queries 6 --orders 2" in page
    )
    for claim in tables.CLAIMS.values():
        assert f"**{claim}**" in page
    assert "## The order of demonstrations" in page
    assert str(out) not in page
    for figure in ("controls", "demonstrations"):
        assert (out / f"{figure}.png").stat().st_size > 20_000
        assert (out / f"{figure}.pdf").exists()


def test_the_same_again_needs_no_model(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: object, **kwargs: object) -> None:
        raise AssertionError("no model is needed")

    monkeypatch.setattr("icl_dual.study.load_model", load_model)
    monkeypatch.setattr(icl, "load_model", load_model)
    monkeypatch.setattr(sys, "argv", ["controls.py", "--out", str(out), *ARGUMENTS, "--orders", "2"])
    before = (out / "controls.csv").read_bytes()
    assert script.main() == 0
    assert (out / "controls.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*ARGUMENTS, "--orders", "7"), "3! = 6 orders"),
        (("--tasks", "cb", "--ks", "1"), "select_lr.py --model smollm2-135m --tasks cb"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def made_up(claim: float, controls: dict[str, float], n: int = 40) -> tables.Scores:
    """Scores of one metric and task, each around a value; the same noise for all, so that differences are known."""
    noise = np.random.default_rng(0).normal(size=(2, n), scale=0.01)

    def score(value: float) -> tables.Score:
        values = torch.from_numpy(value + noise * (1 + abs(value)))
        return tables.Score(values, bootstrap(values))

    families = {family: {row: {"sst2": score(value)} for row, value in controls.items()} for family in tables.FAMILIES}
    return {"SimAOU": {"claim": {tables.CLAIM: {"sst2": score(claim)}}, **families}}


def test_a_claim_has_to_be_above_the_best_control_of_every_kind() -> None:
    def verdict(scores: tables.Scores) -> dict[str, str]:
        return tables.claim_table(tables.against_best(scores)).to_dict("records")[0]

    assert verdict(made_up(0.3, {"a": 0.1, "b": 0.2}))["verdict"] == "survives"
    assert verdict(made_up(0.3, {"a": 0.1, "b": 0.4}))["verdict"] == "does not survive"
    mixed = {**made_up(0.3, {"a": 0.1})["SimAOU"], "models": made_up(0.3, {"a": 0.4})["SimAOU"]["models"]}
    row = verdict({"SimAOU": mixed})
    assert (row["verdict"], row["models"], row["nulls"]) == ("survives in part", "0 of 1", "1 of 1")
    words = tables.in_words(row)
    assert "survives in part" in words
    assert "not above models that have learned nothing (above on 0 of 1 tasks)" in words
    best = {one.family: one.best for one in tables.against_best(made_up(0.3, {"a": 0.1, "b": 0.2}))}
    assert set(best.values()) == {"b"}


def test_what_too_few_queries_say_stays_open() -> None:
    scores = made_up(0.3, {"a": 0.1}, n=4)
    found = tables.against_best(scores)
    row = tables.claim_table(found).to_dict("records")[0]
    assert (row["verdict"], row["nulls"]) == ("open", "undefined")
    assert set(tables.against_table(found)["p"]) == {""}
    assert "4 queries: no interval" in tables.control_table(scores)["SST2"].iloc[0]


def test_recall_is_of_finetunings_corrections_only(out: Path) -> None:
    comparison = cell_of(out, "").comparison
    gold, found = comparison.gold, comparison.predictions
    found = found | {"FT": gold.clone(), "ZSL": 1 - gold, "ICL": torch.tensor([*gold[:2], *(1 - gold[2:])])}
    found["ZSL"][0] = gold[0]  # nothing to correct
    comparison = icl.Comparison(gold, found, {}, comparison.rec2ftp, comparison.per_layer)
    recalled = tables.recalled(comparison, dealt=False)
    assert recalled.isnan().tolist() == [True, *[False] * (len(gold) - 1)]
    assert recalled[1:].tolist() == [1.0, *[0.0] * (len(gold) - 2)]
    dealt = tables.recalled(comparison, dealt=True)
    assert dealt[1].item() == pytest.approx((found["ICL"] == gold[1]).double().mean().item())
