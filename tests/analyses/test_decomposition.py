"""The decomposition's script on the real model and real rows, with a small budget."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ANALYSES = Path(__file__).parents[2] / "analyses"
ARGUMENTS = ("--tasks", "sst2", "mr", "--k", "3", "--queries", "4", "--lr", "0.001")
FIGURES = ("demonstration_mass", "direct_inherited", "relaxation", "updates", "delta", "prompt", "delta_demonstrations")


def decomposition(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ANALYSES / "decomposition.py"), *arguments, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    done = decomposition(folder, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_table_and_figure_is_written(out: Path) -> None:
    written = {path.name for path in out.iterdir()}
    pictures = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")}
    assert written == pictures | {"README.md", "layers.csv", "cells"}


def test_numbers_by_layer_are_complete_and_within_their_bounds(out: Path) -> None:
    rows = pd.read_csv(out / "layers.csv").to_dict(orient="records")
    assert {row["task"] for row in rows} == {"sst2", "mr"}
    for metric, n_heads, low, high in (
        ("demonstration_mass", 9, 0, 1),
        ("update_cosine", 9, -1, 1),
        ("cosine", 3, -1, 1),
        ("left_angles", 3, 0, 90),
        ("effective_rank_icl", 3, 1, 64),
    ):
        found = [row for row in rows if row["metric"] == metric and row["task"] == "mr"]
        assert len(found) == 30 * n_heads
        assert all(low <= row["mean"] <= high for row in found)
        assert all(row["n"] == 4 for row in found)


def test_the_readme_has_the_residuals_and_the_command(out: Path) -> None:
    text = (out / "README.md").read_text()
    assert "--tasks sst2 mr" in text
    assert "exact split, plain pass" in text
    assert "| SST2 " in text


def test_finished_cells_are_drawn_again_without_the_model(out: Path) -> None:
    before = (out / "layers.csv").read_bytes()
    done = decomposition(out, *ARGUMENTS, XDG_CACHE_HOME=str(out), PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    assert (out / "layers.csv").read_bytes() == before


def test_cells_of_other_settings_and_bad_rates_are_errors_in_a_line(out: Path) -> None:
    for arguments, message in (
        ((*ARGUMENTS, "--rank", "2"), "made with other settings"),
        ((*ARGUMENTS[:-1], "-1", "--tasks", "subj"), "expected a learning rate above 0"),
        (("--model", "nothing/here"), "no learning rate was chosen"),
    ):
        done = decomposition(out, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
