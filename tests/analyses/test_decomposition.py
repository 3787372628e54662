"""The decomposition's script on a tiny model and real rows, with a small budget."""

from pathlib import Path

import decomposition as script
import pandas as pd
import pytest
import torch
from helpers import as_saved_by_0_1
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import icl_dual as icl

FIGURES = ("demonstration_mass", "direct_inherited", "relaxation", "updates", "delta", "prompt", "delta_demonstrations")


@pytest.fixture(scope="module")
def arguments(tiny_model: str) -> tuple[str, ...]:
    return ("--model", tiny_model, "--tasks", "subj", "mr", "--k", "3", "--queries", "4", "--lr", "0.001")


@pytest.fixture(scope="module")
def out(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    assert script.main([*arguments, "--out", str(folder)]) == 0
    return folder


def test_every_table_and_figure_is_written(out: Path) -> None:
    written = {path.name for path in out.iterdir()}
    pictures = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")}
    assert written == pictures | {"README.md", "layers.csv", "cells"}


def test_numbers_by_layer_are_complete_and_within_their_bounds(out: Path) -> None:
    rows = pd.read_csv(out / "layers.csv").to_dict(orient="records")
    assert {row["task"] for row in rows} == {"subj", "mr"}
    for metric, n_heads, low, high in (
        ("demonstration_mass", 4, 0, 1),
        ("update_cosine", 4, -1, 1),
        ("cosine", 2, -1, 1),
        ("left_angles", 2, 0, 90),
        ("effective_rank_icl", 2, 1, 8),
    ):
        found = [row for row in rows if row["metric"] == metric and row["task"] == "mr"]
        assert len(found) == 3 * n_heads
        assert all(low <= row["mean"] <= high for row in found)
        assert all(row["n"] == 4 for row in found)


def test_the_readme_has_the_residuals_and_the_command(out: Path) -> None:
    text = (out / "README.md").read_text()
    assert "python analyses/decomposition.py --model tiny-llama --tasks subj mr --k 3 --queries 4 --lr 0.001" in text
    assert str(out) not in text
    assert "exact split, plain pass" in text
    assert "| Subj " in text


def test_finished_cells_are_drawn_again_without_the_model(
    out: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icl, "load_model", lambda *args, **kwargs: pytest.fail("no model is needed"))
    before = (out / "layers.csv").read_bytes()
    as_saved_by_0_1(next((out / "cells").iterdir()))
    assert script.main([*arguments, "--out", str(out)]) == 0
    assert (out / "layers.csv").read_bytes() == before


@pytest.mark.parametrize(("largest", "scale"), [(1.9, "linear"), (2.5, "symlog")])
def test_shares_beyond_two_alone_have_a_logarithmic_scale(
    largest: float, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, str]] = []
    finish = script.finish

    def finish_and_keep(fig: Figure, axes: list[Axes], title: str, path: Path) -> None:
        drawn.append((axes[1].get_yscale(), title))
        finish(fig, axes, title, path)

    monkeypatch.setattr(script, "finish", finish_and_keep)
    shares = torch.tensor([[0.2, 1.0, largest]])
    tensors = {"direct_share": shares, "inherited_share": 1 - shares}
    small = {name: values.clamp(0, 1) for name, values in tensors.items()}
    script.write_shares([script.Result("sst2", tensors, {}), script.Result("mr", small, {})], "", tmp_path / "shares")
    assert [(scale, "logarithmic" in title) for scale, title in drawn] == [(scale, scale == "symlog")]


def test_cells_of_other_settings_and_models_without_a_rate_are_errors_in_a_line(
    out: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for given, message in (
        ((*arguments, "--rank", "2"), "expected a result made with rank=2, got "),
        ((*arguments, "--rank", "9", "--tasks", "sst5"), "expected --rank of at most 8, the width of a head, got 9: "),
        (("--model", "nothing/here"), "no learning rate was chosen"),
    ):
        assert script.main([*given, "--out", str(out)]) == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert message in line
