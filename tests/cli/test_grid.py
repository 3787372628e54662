import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import icl_dual as icl
from icl_dual import study
from icl_dual.cli.grid import add_commands
from icl_dual.grids import GridError, Results
from icl_dual.grids import grid as grid_module

TEXT = """models = ["tiny"]
tasks = ["films"]
k = 2
seeds = [1]
rates = [0.01, 1e30]
n_queries = 3
replicas = 0
"""
ROWS = [{"text": f"film number {i}", "label": i % 2} for i in range(40)]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command on a grid of a tiny model, of which one rate diverges; return its result."""
    from icl_dual.models import tiny_model

    monkeypatch.setattr(study, "load_model", lambda name, **_: tiny_model())
    monkeypatch.setattr(study, "check_model_name", lambda name: None)
    monkeypatch.setattr(grid_module, "check_model_name", lambda name: None)
    icl.register_task(icl.Task("films", "Text: {text} Label:", ("bad", "good"), ROWS))
    (tmp_path / "grid.toml").write_text(TEXT)
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())

    def call(name: str, *options: str) -> Any:
        args = parser.parse_args([name, str(tmp_path / "grid.toml"), "--results", str(tmp_path / "results"), *options])
        return args.run(args)

    yield call
    from icl_dual.paper_tasks import unregister_task

    unregister_task("films")


def test_a_grid_from_plan_to_table(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = "tiny_films_k2_seed1_lr0.01_answer", "tiny_films_k2_seed1_lr1e+30_answer"
    assert command("plan")["cells"] == [good, bad]
    assert command("plan", "--shard", "1/2")["cells"] == [bad]
    with pytest.raises(GridError, match=rf"got 1 that failed \(the first, {bad.replace('+', '.')}: .*`rerun --failed`"):
        command("run")
    out = capsys.readouterr().out
    assert "1 done, 0 running, 1 failed, 0 remaining" in out
    assert "Traceback (most recent call last)" in out
    with pytest.raises(GridError, match="got 1 that failed"):
        command("status")
    table = tmp_path / "table.parquet"
    assert json.loads(json.dumps(command("collect", "--table", str(table))))["n_cells"] == 1
    assert set(pd.read_parquet(table)["id"]) == {good}
    path = tmp_path / "grid.toml"
    path.write_text(TEXT.replace("1e30", "0.02"))
    Results(tmp_path / "results").remove(bad)
    assert len(command("rerun", "--failed")["done"]) == 2
    assert command("status")["failed"] == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "g", "--results", "r", "--shard", "2/2"], "expected I/N with I from 0 to N - 1"),
        (["run", "g", "--results", "r", "--option", "nodes"], "expected KEY=VALUE, got 'nodes'"),
        (["rerun", "g", "--results", "r"], "the following arguments are required: --failed"),
        (["status", "g"], "the following arguments are required: --results"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(options)
    assert message in capsys.readouterr().err
