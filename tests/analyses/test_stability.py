"""Metrics along the rate, from cells with replicas."""

from pathlib import Path

import pandas as pd
import pytest
import stability

from icl_dual.scripts.paper_tables import find_cells


@pytest.fixture(scope="module")
def out(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stability")
    options = ("--tasks", "mr", "--ks", "2", "3", "--queries", "6", "--lrs", "0.05", "0.001", "--replicas", "2")
    assert stability.main(["--model", tiny_model, *options, "--out", str(out)]) == 0
    return out


def test_every_cell_has_a_row_and_every_replica_a_value(out: Path) -> None:
    results = {(result.cell.k, result.cell.lr): result.comparison for result in find_cells([out / "cells"])}
    assert set(results) == {(k, lr) for k in (2, 3) for lr in (0.001, 0.05)}
    frame = pd.read_csv(out / "replicas.csv")
    keys = zip(frame["k"], frame["lr"], frame["metric"], frame["finetuning"], strict=True)
    rows = dict(zip(keys, frame["value"].tolist(), strict=True))
    assert len(rows) == 4 * len(stability.METRICS) * 3
    for (k, lr), comparison in results.items():
        value = comparison.intervals()["SimAOU"].value
        assert rows[k, lr, "SimAOU", "the run itself"] == pytest.approx(value, abs=1e-5)
        shift = comparison.shifts("SimAOU")[0, 1].item()
        assert rows[k, lr, "SimAOU", "lr × 1.001, noise +1"] == pytest.approx(value + shift, abs=1e-5)


def test_the_page_has_a_row_for_each_cell_and_names_no_machine(out: Path, tiny_model: str) -> None:
    page = (out / "README.md").read_text()
    assert page.count("| MR ") == 4
    assert str(Path(tiny_model).parent) not in page
    assert "the range over 2 replicas" in page
    assert (out / "rates.png").exists()
    assert (out / "rates.pdf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--replicas", "1"), "argument --replicas: expected at least 2, or 0 for none, got '1'"),
        (("--replicas", "0"), "expected --replicas of at least 2, got 0"),
        (("--lr", "0.1"), "expected --ks and --lrs"),
    ],
)
def test_a_scan_needs_replicas_and_lists(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stability.main([*options]) == 2
    assert message in capsys.readouterr().err
