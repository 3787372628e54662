"""The whole pipeline on the real model and real rows, with a small budget."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import reproduce as script
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import icl_dual as icl

ANALYSES = Path(__file__).parents[2] / "analyses"
ARGUMENTS = ("--tasks", "sst2", "agnews", "--k", "4", "--queries", "6", "--seeds", "1", "2", "--lr", "0.001")


def reproduce(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ANALYSES / "reproduce.py"), *arguments, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    done = reproduce(folder, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_table_and_figure_is_written(out: Path) -> None:
    written = {path.name for path in out.iterdir()}
    figures = {f"{name}.{kind}" for name in ("simaou", "simam", "kendall", "label_counts") for kind in ("png", "pdf")}
    assert written == figures | {
        "README.md",
        "results.csv",
        "label_counts.csv",
        *(f"{table}.{kind}" for table in ("accuracy", "metrics") for kind in ("md", "csv", "tex")),
        "cells",
    }


def test_results_are_tidy_and_complete(out: Path) -> None:
    results = pd.read_csv(out / "results.csv")
    keys = ["model", "task", "k", "seed", "lr", "protocol", "variation", "metric", "layer"]
    assert results.columns.tolist() == [*keys, "value", "n"]
    rows = results.to_dict(orient="records")
    assert len({tuple(str(row[key]) for key in keys) for row in rows}) == len(rows)
    assert {(row["task"], row["seed"]) for row in rows} == {(t, s) for t in ("sst2", "agnews") for s in (1, 2)}
    assert len({row["layer"] for row in rows if row["metric"] == "SimAOU" and row["layer"] >= 0}) == 30
    # At layer 0 the query's scores come from its own tokens alone, in context or not: nothing changes them there.
    unchanged = [row for row in rows if row["metric"].startswith("SimAMΔ") and row["layer"] == 0]
    assert {(str(row["value"]), row["n"]) for row in unchanged} == {("nan", 0)}
    assert all(row["value"] > 0.9 for row in rows if row["metric"] == "SimAM before FT" and row["layer"] == 0)
    cosines = [row for row in rows if row["metric"].startswith(("SimAOU", "SimAM", "Kendall")) and row["n"]]
    assert all(-1 <= row["value"] <= 1 for row in cosines)


def test_label_counts_add_up_to_the_queries(out: Path) -> None:
    counts = pd.read_csv(out / "label_counts.csv").to_dict(orient="records")
    assert {row["setting"] for row in counts} == {"gold", "ZSL", "ICL", "FT"}
    agnews = [row for row in counts if (row["task"], row["seed"], row["setting"]) == ("agnews", 2, "ICL")]
    assert [row["label"] for row in agnews] == ["World", "Sports", "Business", "Technology"]
    assert sum(row["count"] for row in agnews) == 6


def test_each_task_has_its_own_labels_under_its_predictions(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[list[str]]] = {}

    def look(fig: Figure, axes: list[Axes], title: str, path: Path) -> None:
        drawn[path.name] = [[label.get_text() for label in ax.get_xticklabels()] for ax in axes]

    monkeypatch.setattr(script, "finish", look)
    cells = [path for task in ("sst2", "agnews") for path in sorted((out / "cells").glob(f"*_{task}_*"))]
    script.write_figures([icl.load_cell(cell) for cell in cells], out)
    assert drawn["label_counts"] == [["Negative", "Positive"], ["World", "Sports", "Business", "Technology"]]


def test_tables_say_what_the_results_say_with_the_papers_values_beside(out: Path) -> None:
    results = pd.read_csv(out / "results.csv")
    table = pd.read_csv(out / "metrics.csv").set_index(["model", "metric"])
    assert table.loc[("smollm2-135m", "seed"), "SST2"] == "1, 2"
    ours = results[(results["metric"] == "SimAOU") & (results["task"] == "sst2") & results["layer"].isna()]["value"]
    shown = str(table.loc[("smollm2-135m", "SimAOU"), "SST2"])
    assert re.fullmatch(rf"{ours.mean():.3f} (\[-?[\d.]+, -?[\d.]+\]|\(\d+ quer(y|ies): no interval\))", shown)
    assert table.loc[("GPT 1.3B (paper)", "SimAOU"), "SST2"] == "0.110"
    accuracy = pd.read_csv(out / "accuracy.csv").set_index(["model", "metric"])
    icl = results[(results["metric"] == "ICL accuracy") & (results["task"] == "agnews")]["value"]
    assert str(accuracy.loc[("smollm2-135m", "ICL accuracy"), "AGNews"]).startswith(f"{100 * icl.mean():.1f} ")


def test_the_readme_names_how_it_was_made_and_no_machine(out: Path) -> None:
    text = (out / "README.md").read_text()
    assert "python analyses/reproduce.py --model smollm2-135m --tasks sst2 agnews" in text
    assert "sha256:b179c952" in text
    assert str(ANALYSES) not in text
    assert str(out) not in text


def test_drawing_again_needs_no_model(out: Path, tmp_path: Path) -> None:
    before = (out / "results.csv").read_text()
    again = reproduce(out, *ARGUMENTS, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1")
    assert again.returncode == 0, again.stderr
    assert (out / "results.csv").read_text() == before
    assert not list(tmp_path.rglob("*.whl"))


def test_other_settings_in_the_same_folder_are_an_error_in_one_line(out: Path) -> None:
    done = reproduce(out, *ARGUMENTS, "--queries", "7")
    assert done.returncode == 1
    assert "n_queries=6 (wanted 7)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_a_chosen_rate_says_how_to_choose(tmp_path: Path) -> None:
    done = reproduce(tmp_path, "--model", "someone/something", "--tasks", "sst2")
    assert done.returncode == 1
    assert "analyses/select_lr.py --model someone/something --tasks sst2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "0"), "expected a learning rate above 0, got 0.0"),
        (("--lr", "nan"), "expected a learning rate above 0, got nan"),
        (("--lr", "0.001", "--device", "nowhere"), "expected a device that works here, got 'nowhere'"),
        (("--lr", "1e4"), "finetuning diverged at step"),
        (("--lr", "0.001", "--queries", "999999"), "evaluation queries, got 999999"),
        (("--lr", "0.001", "--k", "999999"), "expected k from 0 to the"),
        (("--lr", "0.001", "--k", "2000"), "at most 8192 tokens, the context of smollm2-135m"),
        (("--lr", "0.001", "--model", "smollm3"), "got 'smollm3': check its spelling"),
        (("--lr", "0.001", "--protocol", "reference", "--balanced"), "as they fall, got balanced=True"),
        (("--lr", "0.001", "--reference-k-mismatch"), "reference_k_mismatch belongs to the reference protocol"),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = reproduce(tmp_path, "--tasks", "sst2", "--k", "2", "--queries", "2", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[icl.Cell]:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    return script.plan(script.parse())


def test_a_preset_is_the_papers_set_up_and_gives_way_to_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = planned(monkeypatch, "--preset", "paper-2.7b")
    assert [(cell.task, cell.k, cell.seed, cell.lr) for cell in cells] == [
        ("sst2", 32, 7, 0.007),
        ("sst5", 32, 5, 0.04),
        ("mr", 32, 1, 0.001),
        ("subj", 32, 4, 0.002),
        ("agnews", 22, 3, 0.2),
        ("cb", 19, 3, 0.01),
    ]
    assert {(cell.model, cell.protocol, cell.source, cell.n_queries, cell.finetuning.loss) for cell in cells} == {
        ("KoboldAI/fairseq-dense-2.7B", "reference", "hub", None, "all")
    }
    (one,) = planned(monkeypatch, "--preset", "paper-1.3b", "--tasks", "mr", "--lr", "0.5", "--seeds", "9", "--k", "3")
    assert (one.model, one.k, one.seed, one.lr) == ("KoboldAI/fairseq-dense-1.3B", 3, 9, 0.5)
    assert one.protocol == "reference"


def test_the_command_names_what_departs_from_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "--preset paper-1.3b --model smollm2-135m --protocol answer --source wheel --tasks sst2 "
        "--queries 5 --k 0 --dtype bfloat16"
    )
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *given.split()])
    assert script.command(script.parse()) == f"python analyses/reproduce.py {given}"


def test_without_a_preset_nothing_of_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = planned(monkeypatch, "--tasks", "cb", "--lr", "0.1")
    assert (cell.protocol, cell.source, cell.n_queries, cell.seed) == ("answer", None, 100, 1)


def test_a_preset_is_rehearsed_on_a_random_model_of_its_shape(tmp_path: Path) -> None:
    arguments = ("--preset", "paper-1.3b", "--rehearse", "1", "--tasks", "sst2", "cb", "--k", "3", "--queries", "3")
    done = reproduce(tmp_path / "out", *arguments, "--export", str(tmp_path / "recordings"))
    assert done.returncode == 0, done.stderr
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(results["protocol"]) == {"reference"}
    assert set(results["task"]) == {"sst2"}, "the packages have no rows of cb"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "--preset paper-1.3b --rehearse 1 --tasks sst2 --queries 3 --k 3" in text
    assert str(tmp_path) not in text
    assert str(tmp_path) not in (tmp_path / "out" / "metrics_reference.md").read_text()
    (folder,) = (tmp_path / "recordings").iterdir()
    recordings = icl.load_recordings(folder, progress=False)
    assert recordings.query_scores["ICL"].shape[:3] == (3, 1, 32)
    assert recordings.attn_out["ICL"].shape[2] == 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rehearse", "2"), "and a --preset to rehearse"),
        (("--preset", "paper-1.3b", "--rehearse", "0"), "takes a number of layers from 1"),
        (("--preset", "paper-13b"), "invalid choice"),
    ],
)
def test_presets_that_are_none_are_said(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = reproduce(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_papers_tables_have_the_papers_means() -> None:
    """The paper prints the mean of each row in brackets: a check on the transcription."""
    models = json.loads((ANALYSES / "data" / "paper.json").read_text())["models"]
    means = {
        "Rec2FTP": (85.56, 89.39),
        "SimAOU": (0.186, 0.225),
        "SimAOU random": (0.002, -0.001),
        "SimAM before FT": (0.338, 0.355),
        "SimAM after FT": (0.442, 0.434),
        "Kendall": (0.193, 0.214),
        "Kendall random": (0.000, 0.000),
    }
    for row, expected in means.items():
        for model, mean in zip(("GPT 1.3B", "GPT 2.7B"), expected, strict=True):
            values = models[model][row]
            assert sum(values) / len(values) == pytest.approx(mean, abs=0.0051 if row == "Rec2FTP" else 0.00101), row
