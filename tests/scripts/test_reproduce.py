"""The whole pipeline on real rows with a small budget: on a tiny model, once on the real one, and its presets."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import icl_dual as icl
from icl_dual.scripts import reproduce as script
from icl_dual.scripts.common import DATA

ANALYSES = Path(__file__).parents[2] / "analyses"
SST5 = ["terrible", "bad", "neutral", "good", "great"]
BUDGET = (
    "--tasks",
    "mr",
    "sst5",
    "--k",
    "4",
    "--queries",
    "6",
    "--seeds",
    "1",
    "2",
    "--lr",
    "0.001",
    "--replicas",
    "2",
)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a script says of an error."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture(scope="module")
def arguments(tiny_model: str) -> tuple[str, ...]:
    return ("--model", tiny_model, *BUDGET)


@pytest.fixture(scope="module")
def out(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    assert script.main([*arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def real_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the real model, on one task."""
    folder = tmp_path_factory.mktemp("figures")
    arguments = ("--tasks", "mr", "--k", "2", "--queries", "6", "--lr", "0.001", "--replicas", "0")
    assert script.main([*arguments, "--out", str(folder)]) == 0
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
    assert results.columns.tolist() == [*keys, "value", "spread", "n"]
    rows = results.to_dict(orient="records")
    assert len({tuple(str(row[key]) for key in keys) for row in rows}) == len(rows)
    assert {(row["task"], row["seed"]) for row in rows} == {(t, s) for t in ("mr", "sst5") for s in (1, 2)}
    assert len({row["layer"] for row in rows if row["metric"] == "SimAOU" and row["layer"] >= 0}) == 3
    # At layer 0 the query's scores come from its own tokens alone, in context or not: nothing changes them there.
    unchanged = [row for row in rows if row["metric"].startswith("SimAMΔ") and row["layer"] == 0]
    assert {(str(row["value"]), row["n"]) for row in unchanged} == {("nan", 0)}
    cosines = [row for row in rows if row["metric"].startswith(("SimAOU", "SimAM", "Kendall")) and row["n"]]
    assert all(-1 <= row["value"] <= 1 for row in cosines)


def test_the_real_model_has_every_layer_and_the_scores_that_it_has_to_have(real_out: Path) -> None:
    rows = pd.read_csv(real_out / "results.csv").to_dict(orient="records")
    assert {row["model"] for row in rows} == {"smollm2-135m"}
    assert len({row["layer"] for row in rows if row["metric"] == "SimAOU" and row["layer"] >= 0}) == 30
    first = [row for row in rows if row["layer"] == 0]
    assert {(str(row["value"]), row["n"]) for row in first if row["metric"].startswith("SimAMΔ")} == {("nan", 0)}
    assert all(row["value"] > 0.9 for row in first if row["metric"] == "SimAM before FT")
    cosines = [row for row in rows if row["metric"].startswith(("SimAOU", "SimAM", "Kendall")) and row["n"]]
    assert all(-1 <= row["value"] <= 1 for row in cosines)
    table = pd.read_csv(real_out / "metrics.csv").set_index(["model", "metric"])
    assert table.loc[("SmolLM2-135M-Instruct (Q4_1, dequantised)", "queries"), "MR"] == "6"


def test_label_counts_add_up_to_the_queries(out: Path) -> None:
    counts = pd.read_csv(out / "label_counts.csv").to_dict(orient="records")
    assert {row["setting"] for row in counts} == {"gold", "ZSL", "ICL", "FT"}
    sst5 = [row for row in counts if (row["task"], row["seed"], row["setting"]) == ("sst5", 2, "ICL")]
    assert [row["label"] for row in sst5] == SST5
    assert sum(row["count"] for row in sst5) == 6


def test_each_task_has_its_own_labels_under_its_predictions(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[list[str]]] = {}

    def look(fig: Figure, axes: list[Axes], title: str, path: Path) -> None:
        drawn[path.name] = [[label.get_text() for label in ax.get_xticklabels()] for ax in axes]

    monkeypatch.setattr(script, "finish", look)
    cells = [path for task in ("mr", "sst5") for path in sorted((out / "cells").glob(f"*_{task}_*"))]
    script.write_figures([icl.load_cell(cell) for cell in cells], out)
    assert drawn["label_counts"] == [SST5, ["Negative", "Positive"]], "in the order of the paper's tables"


def test_tables_say_what_the_results_say_with_the_papers_values_beside(out: Path) -> None:
    results = pd.read_csv(out / "results.csv")
    table = pd.read_csv(out / "metrics.csv").set_index(["model", "metric"])
    assert table.loc[("tiny-llama", "seed"), "MR"] == "1, 2"
    ours = results[(results["metric"] == "SimAOU") & (results["task"] == "mr") & results["layer"].isna()]["value"]
    shown = str(table.loc[("tiny-llama", "SimAOU"), "MR"])
    assert re.fullmatch(rf"{ours.mean():.3f} (\[-?[\d.]+, -?[\d.]+\]|\(\d+ quer(y|ies): no interval\))", shown)
    assert table.loc[("GPT 1.3B (paper)", "SimAOU"), "MR"] == "0.222"
    accuracy = pd.read_csv(out / "accuracy.csv").set_index(["model", "metric"])
    icl = results[(results["metric"] == "ICL accuracy") & (results["task"] == "sst5")]["value"]
    assert str(accuracy.loc[("tiny-llama", "ICL accuracy"), "SST5"]).startswith(f"{100 * icl.mean():.1f} ")


def test_the_readme_names_how_it_was_made_and_no_machine(out: Path, real_out: Path, tiny_model: str) -> None:
    text = (real_out / "README.md").read_text()
    assert (
        "python analyses/reproduce.py --model smollm2-135m --tasks mr --k 2 --queries 6 --lr 0.001 --replicas 0\n"
        in text
    )
    assert "sha256:b179c952" in text
    assert str(real_out) not in text
    text = (out / "README.md").read_text()
    given = "--tasks mr sst5 --k 4 --queries 6 --lr 0.001 --replicas 2 --seeds 1 2"
    assert f"python analyses/reproduce.py --model tiny-llama {given}\n" in text
    for folder in (ANALYSES, out, Path(tiny_model).parent):
        assert str(folder) not in text


def test_drawing_again_needs_no_model(out: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icl_dual.study.load_model", lambda *args, **kwargs: pytest.fail("no model is needed"))
    before = (out / "results.csv").read_bytes()
    assert script.main([*arguments, "--out", str(out)]) == 0
    assert (out / "results.csv").read_bytes() == before


def test_other_settings_in_the_same_folder_are_an_error_in_one_line(
    out: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*arguments, "--queries", "7", "--out", str(out)]) == 1
    assert re.search(r"expected a result made with n_queries=7, got .*, made with n_queries=6: ", error_of(capsys))


def test_a_model_without_a_chosen_rate_says_how_to_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--model", "someone/something", "--tasks", "sst2", "--out", str(tmp_path)]) == 1
    assert "analyses/select_lr.py --model someone/something --tasks sst2" in error_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("--lr", "0"), "argument --lr: expected a finite number above 0, got '0': pass ", 2),
        (("--lr", "nan"), "argument --lr: expected a finite number above 0, got 'nan': pass ", 2),
        (("--lr", "0.001", "--device", "nowhere"), "expected a device that torch knows, got 'nowhere': pass cpu", 2),
        (("--lr", "0.001", "--device", "mps"), "expected a device that torch can use here, got 'mps'", 1),
        (("--lr", "1e9"), "finetuning diverged at step", 1),
        (("--lr", "0.001", "--queries", "999999"), "evaluation queries, got 999999", 1),
        (("--lr", "0.001", "--k", "999999"), "expected k from 0 to ", 1),
        (("--lr", "0.001", "--k", "2000"), "at most 8192 tokens, the context of ", 1),
        (("--lr", "0.001", "--model", "smollm3"), "'smollm3' (did you mean 'smollm2-135m'?): check its spelling", 2),
        (
            ("--lr", "0.001", "--protocol", "reference", "--balanced"),
            "expected balanced=False under the reference protocol, got balanced=True",
            1,
        ),
        (
            ("--lr", "0.001", "--reference-k-mismatch"),
            "expected reference_k_mismatch with protocol='reference' only",
            1,
        ),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line(
    tiny_model: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = ("--model", tiny_model, "--tasks", "mr", "--k", "2", "--queries", "2", "--replicas", "0")
    assert script.main([*usual, *arguments, "--out", str(tmp_path)]) == status
    assert message in error_of(capsys)


def planned(*arguments: str) -> list[icl.Cell]:
    args = script.parse(arguments)
    return script.plan(args, args.model)


def test_a_preset_is_the_papers_set_up_and_gives_way_to_what_is_asked() -> None:
    cells = planned("--preset", "paper-2.7b")
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
    (one,) = planned("--preset", "paper-1.3b", "--tasks", "mr", "--lr", "0.5", "--seeds", "9", "--k", "3")
    assert (one.model, one.k, one.seed, one.lr) == ("KoboldAI/fairseq-dense-1.3B", 3, 9, 0.5)
    assert one.protocol == "reference"


def test_the_command_names_what_departs_from_a_preset() -> None:
    given = (
        "--preset paper-1.3b --model smollm2-135m --tasks sst2 --k 3 --queries 5 --protocol answer --source wheel "
        "--dtype bfloat16"
    )
    line = script.command(script.parse(given.split()))
    assert line == f"python analyses/reproduce.py {given}"
    assert script.parse(shlex.split(line)[2:]) == script.parse(given.split())


def test_without_a_preset_nothing_of_it_is_there() -> None:
    (cell,) = planned("--tasks", "cb", "--lr", "0.1")
    assert (cell.protocol, cell.source, cell.n_queries, cell.seed) == ("answer", None, 100, 1)


def test_a_preset_is_rehearsed_on_a_random_model_of_its_shape(tmp_path: Path) -> None:
    given = "--preset paper-1.3b --rehearse 1 --tasks mr cb --k 3 --queries 3 --replicas 0"
    arguments = given.split()
    assert script.main([*arguments, "--export", str(tmp_path / "recordings"), "--out", str(tmp_path / "out")]) == 0
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(results["protocol"]) == {"reference"}
    assert set(results["task"]) == {"mr"}, "the packages have no rows of cb"
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{given.replace(' cb', '')}\n" in text
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
        (
            ("--preset", "paper-1.3b", "--rehearse", "0"),
            "argument --rehearse: expected a whole number of at least 1, got '0'",
        ),
        (("--preset", "paper-13b"), "argument --preset: expected one of paper-1.3b, paper-2.7b, got 'paper-13b'"),
    ],
)
def test_presets_that_are_none_are_said(
    tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_papers_tables_have_the_papers_means() -> None:
    """The paper prints the mean of each row in brackets: a check on the transcription."""
    models = json.loads((DATA / "paper.json").read_text())["models"]
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


def test_prompts_run_as_chats_by_a_model_that_is_loaded_as_the_options_say(
    out: Path, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    shutil.copytree(out / "cells", tmp_path / "out" / "cells")
    monkeypatch.setattr(script.chat_form, "has_chat_template", lambda name: True)
    monkeypatch.setattr(script.chat_form, "write", lambda results, out, **load: given.append(load))
    assert script.main([*arguments, "--device-map", "auto", "--out", str(tmp_path / "out")]) == 0
    assert given == [{"device_map": "auto", "dtype": torch.float32, "arithmetic": None}]
