import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from grid_cells import change_version

import icl_dual as icl
from icl_dual import cli, study
from icl_dual.cli.commands import IncompleteError
from icl_dual.cli.grid import add_commands
from icl_dual.grids import Results
from icl_dual.grids import grid as grid_module
from icl_dual.scripts.common import ScriptParser

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
    parser = ScriptParser()
    add_commands(parser.add_subparsers())

    def call(name: str, *options: str) -> Any:
        args = parser.parse_args([name, str(tmp_path / "grid.toml"), "--results", str(tmp_path / "results"), *options])
        return args.run(args)

    yield call
    from icl_dual.paper_tasks import unregister_task

    unregister_task("films")


def test_a_grid_from_plan_to_table(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = "tiny_films_k2_seed1_lr0.01_answer", "tiny_films_k2_seed1_lr1e+30_answer"
    planned = command("plan")["cells"]
    assert [cell["id"] for cell in planned] == [good, bad]
    assert {(cell["cpus"], cell["gpus"]) for cell in planned} == {(1, 0)}
    assert [cell["id"] for cell in command("plan", "--shard", "1/2")["cells"]] == [bad]
    assert command("run", "--shard", "0/2")["remaining"] == ()
    with pytest.raises(
        IncompleteError, match=rf"got 1 that failed \(the first, {bad.replace('+', '.')}: .*`rerun --failed`"
    ):
        command("run")
    out = capsys.readouterr().out
    assert "1 done, 0 running, 1 failed, 0 remaining" in out
    assert "Traceback (most recent call last)" in out
    with pytest.raises(IncompleteError, match="got 1 that failed") as error:
        command("status")
    assert error.value.result["done"] == (good,)
    assert "Traceback" in error.value.result["failed"][bad]["traceback"]
    assert command("run", "--shard", "0/2")["failed"] == {}  # the failure is in the other part
    table = tmp_path / "table.parquet"
    assert json.loads(json.dumps(command("collect", "--table", str(table))))["n_cells"] == 1
    assert set(pd.read_parquet(table)["id"]) == {good}
    path = tmp_path / "grid.toml"
    path.write_text(TEXT.replace("1e30", "0.02"))
    Results(tmp_path / "results").remove(bad)
    assert len(command("rerun", "--failed")["done"]) == 2
    assert len(command("status")["versions"]) == 1
    assert "warning" not in capsys.readouterr().err
    change_version(Results(tmp_path / "results"), good, "torch", "1.0.0")
    status = command("status")
    assert (status["failed"], sorted(status["versions"].values())) == ({}, [1, 1])
    assert "warning: cells were made with several versions of packages:\n  1 cells with" in capsys.readouterr().err
    command("collect", "--table", str(table))
    assert "warning: cells were made with several versions" in capsys.readouterr().err
    path.write_text(TEXT.replace("1e30", "0.02, 0.03"))
    with pytest.raises(icl.SettingsError, match=r"and torch 1.0.0 of .* with --mix-versions"):
        command("run")
    assert len(command("run", "--mix-versions")["done"]) == 3
    path.write_text(TEXT.replace("1e30", "0.02"))
    with pytest.raises(icl.StudyError, match="with split='selection' for the rule 'best'"):
        command("select", "--rule", "best")
    chosen = command("select", "--rule", "paper-on-evaluation-data")["choices"]
    assert [choice["task"] for choice in chosen] == ["films"]
    assert chosen[0]["lr"] in (0.01, 0.02)
    assert "accuracy" in capsys.readouterr().out


def test_cells_that_fail_without_a_record_are_no_success(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Results, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Results, "publish", fail)
    monkeypatch.setattr(Results, "record_failure", fail)
    with pytest.raises(IncompleteError, match=r"got 2 that failed .*") as error:
        command("run")
    assert "No space left" in str(error.value.result["failed"])
    assert "2 remaining" in capsys.readouterr().out


def test_what_is_incomplete_is_printed_as_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise IncompleteError("expected cells that run, got 1 that failed: see above", {"done": ["a"]})

    monkeypatch.setattr("icl_dual.cli.grid.status", run)
    assert cli.main(["status", "grid.toml", "--results", "r", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"done": ["a"]}
    assert printed.err == "error: expected cells that run, got 1 that failed: see above\n"


def test_problems_of_a_grid_are_printed_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('models = ["smollm2-135m"]\ntask = ["sst2"]\nsedes = [1]\n')
    assert cli.main(["plan", str(path), "--results", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in lines[2:4]] == ["line 2", "line 3"]
    assert lines[-1] == f"error: expected a grid that can be run in {path}, got the 3 problems above: mend them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "g", "--results", "r", "--shard", "2/2"], "expected I/N with I from 0 to N - 1"),
        (["run", "g", "--results", "r", "--option", "nodes"], "expected KEY=VALUE, got 'nodes'"),
        (["rerun", "g", "--results", "r"], "the following arguments are required: --failed"),
        (["run", "g", "--results", "r", "--ttl", "0"], "expected seconds above 0, got '0'"),
        (["status", "g"], "the following arguments are required: --results"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ScriptParser()
    add_commands(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(options)
    assert message in capsys.readouterr().err
