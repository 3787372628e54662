"""Ways to finetune on the same cell."""

from pathlib import Path

import optimisers
import pandas as pd
import pytest

from icl_dual.scripts.paper_tables import find_cells


def test_every_way_has_a_row_with_the_metrics_of_its_cell(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("SGD (the paper's)", "LoRA by Adam, 3 epochs, batches of 4, linear")
    monkeypatch.setattr(optimisers, "WAYS", {name: optimisers.WAYS[name] for name in names})
    options = ("--tasks", "mr", "--k", "4", "--queries", "5", "--lr", "0.001", "--replicas", "0")
    assert optimisers.main(["--model", tiny_model, *options, "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "optimisers.csv", dtype=str)
    assert tuple(frame["finetuning"]) == names
    by_config = {result.cell.finetuning: result for result in find_cells([tmp_path / "cells"])}
    for row in frame.to_dict("records"):
        result = by_config[optimisers.WAYS[row["finetuning"]][0]]
        assert row["SimAOU"] == result.comparison.intervals()["SimAOU"].format()
        losses = result.provenance["losses"]
        assert row["loss, first → last epoch"] == f"{sum(losses[:4]) / 4:.2f} → {sum(losses[-4:]) / 4:.2f}"
    page = (tmp_path / "README.md").read_text()
    assert "python analyses/optimisers.py" in page
    assert str(Path(tiny_model).parent) not in page
