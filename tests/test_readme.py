"""What the README shows, run as printed."""

import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes

from icl_dual import pretraining

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_commands_are_the_two_promised() -> None:
    set_up = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e"
    assert re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL) == [
        f"{set_up} . && .venv/bin/python analyses/reproduce.py",
        f'{set_up} ".[test]" && .venv/bin/pytest',
    ]


def test_the_examples_run_on_the_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict = {}
    exec(PYTHON[0], scope)
    assert "SimAM after FT" in capsys.readouterr().out
    comparison = scope["comparison"]
    assert comparison.per_layer["SimAOU"].shape == (20, 30)
    assert comparison.per_layer["SimAOU"].isfinite().all()
    axes: Axes = plt.gca()
    assert axes.get_ylabel() == "SimAOU (cosine)"
    exec(PYTHON[1], scope)
    assert scope["split"].residual < 2e-6
    assert "Residuals(split=" in capsys.readouterr().out
    assert scope["updates"].cosine.isfinite().all()
    assert scope["delta_W_ICL"].shape == (30, 3, 64, 64)
    assert scope["W_ZSL"].shape == (20, 30, 3, 64, 64)
    exec(PYTHON[4], scope)
    assert scope["model"].momentum is None
    assert "momentum norm=" in capsys.readouterr().out
    exec(PYTHON[5], scope)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0.0003", "0.001", "0.003"]
    plt.close("all")


def test_the_page_on_momentum_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As printed, but for the presets' numbers of steps."""
    monkeypatch.chdir(tmp_path)
    shorter = {name: replace(preset, n_steps=4, n_warmup=1) for name, preset in pretraining.PRESETS.items()}
    monkeypatch.setattr(pretraining, "PRESETS", shorter)
    Path("texts.txt").write_text("\n".join(f"item {n} is {'good' if n % 3 else 'bad'}" for n in range(2000)))
    scope: dict = {}
    page = (Path(__file__).parents[1] / "docs/momentum.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, scope)
    said = capsys.readouterr().out
    assert "smollm2-135m + momentum η=0.1 in layers 10-29" in said
    assert scope["split"].residual < 2e-6
    assert (scope["split"].momentum_norm[:, :10] == 0).all()
    assert scope["model"].momentum.shape == (4, 4)
    assert "momentum η=0." in said.splitlines()[-1]


def test_recordings_go_out_and_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import icl_dual as icl

    scope: dict = {"in_context": icl}
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[2], scope)
    expected = scope["results"][0].comparison.released()
    found = icl.compare_recordings(scope["recordings"], seed=1).released()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-9, nan_ok=True), name
    assert {path.name for path in (tmp_path / "recordings" / scope["cell"].name).iterdir()} == {
        *("zs", "icl", "ftzs", "ft"),
        "metadata.json",
    }


def test_controls_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import icl_dual as icl

    scope: dict = {"in_context": icl}
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[3], scope)
    said = capsys.readouterr().out
    assert said.count(" [") == 6, "five intervals, and that of a difference"
    costs = {key: set(result.provenance["seconds"]) for key, result in scope["found"].items()}
    for seed in (1, 2):
        assert costs["random delta", seed] == {"FT", "metrics"}
        assert costs["flipped labels", seed] == {"ICL", "metrics"}
        assert costs["layer-causal", seed] == {"finetuning", "FT", "metrics"}


def test_a_task_of_ones_own_runs() -> None:
    import icl_dual as icl

    scope: dict = {"in_context": icl}
    exec(PYTHON[6], scope)
    assert scope["parity"].prompt(scope["parity"].queries(1)[0]).startswith("Q: Is ")
