"""`icl-dual doctor` and `icl-dual models`: what they find is there, and what is wrong is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

import icl_dual as icl
from icl_dual import cli
from icl_dual.assets import PACKAGED_MODELS
from icl_dual.cli import doctor


def test_this_environment_has_nothing_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {"python", "pip", "torch", "transformer-lens", "test", "cpu", "current folder"} <= set(checks)
    assert "problem" not in {check["state"] for check in checks.values()}
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_missing_or_too_old_are_problems_and_extras_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("torch>=99", "nosuch-package>=1", "numpy>=1", "nosuch-extra; extra == 'test'")
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(line) for line in lines])
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: expected no problem, got 2 (torch, nosuch-package): ")
    assert "pip install 'torch>=99'" in captured.out
    assert "missing (required: >=1): pip install 'nosuch-package>=1'" in captured.out
    (line,) = (line for line in captured.out.splitlines() if "nosuch-extra" in line)
    assert line.startswith("  - test ")
    assert "pip install 'icl-dual[test]'" in line


def test_a_cache_that_cannot_be_written_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "cache_dir", lambda: Path("/proc/icl_dual/cache"))
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "got 1 (icl-dual)" in captured.err
    assert "  ! icl-dual " in captured.out


def test_a_folders_size_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "weights").write_bytes(bytes(2_600_000))
    (tmp_path / "link").symlink_to(tmp_path / "below" / "weights")
    assert doctor.megabytes(tmp_path) == 3


def test_models_are_those_that_packages_carry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    names = [model["name"] for model in json.loads(capsys.readouterr().out)]
    assert names == list(PACKAGED_MODELS)


def test_a_model_of_ones_own_is_split(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", tiny_model, "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    model = icl.load_model(tiny_model)
    assert (result["n_layers"], result["n_heads"], result["d_model"]) == (model.n_layers, model.n_heads, model.d_model)
    assert 0 < result["residual"] < 1e-5


def test_a_model_is_loaded_as_the_options_say(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[dict[str, Any]] = []
    load = icl.load_model
    monkeypatch.setattr(icl, "load_model", lambda name, **options: given.append(options) or load(name, **options))
    for place in (["--device", "cpu"], ["--device-map", "auto"]):
        options = [*place, "--dtype", "bfloat16", "--arithmetic", "float32", "--json", "--quiet"]
        assert cli.main(["models", tiny_model, *options]) == 0
    precision = {"dtype": torch.bfloat16, "arithmetic": torch.float32}
    assert given == [{"device": "cpu", **precision}, {"device_map": "auto", **precision}]
