"""The tour: script and notebook hold the same code, outputs are clean, and the code runs and prints what they say."""

import re
import tomllib
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
import run_tour

import icl_dual as icl

ROOT = Path(__file__).parents[1]
PATHS = re.compile(r"/(?:home|root|tmp|usr|opt|work|Users|content)/|[A-Z]:\\\\")


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(run_tour.NOTEBOOK, as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_script_and_notebook_hold_the_same_cells(notebook: nbformat.NotebookNode) -> None:
    expected = [(cell.cell_type, cell.source, cell.id) for cell in run_tour.read_script().cells]
    assert [(cell.cell_type, cell.source, cell.id) for cell in notebook.cells] == expected, "run docs/run_tour.py"


def test_the_notebook_is_valid_and_was_run_once_from_top_to_bottom(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_outputs_have_no_error_no_warning_and_no_path(notebook: nbformat.NotebookNode) -> None:
    for output in outputs(notebook):
        assert output.output_type in ("stream", "display_data", "execute_result")
        assert output.get("name", "stdout") == "stdout"
        text = output.text if output.output_type == "stream" else str({**output.data, "image/png": ""})
        assert not PATHS.search(text), text
    assert not PATHS.search(str([notebook.metadata, [cell.metadata for cell in notebook.cells]]))


def test_the_notebook_has_figures_a_table_and_is_small(notebook: nbformat.NotebookNode) -> None:
    data = [output.data for output in outputs(notebook) if output.output_type != "stream"]
    assert sum("image/png" in formats for formats in data) >= 6
    assert any("text/html" in formats for formats in data)
    assert run_tour.NOTEBOOK.stat().st_size < 2_000_000


def test_the_badge_opens_the_notebook_where_the_repository_has_an_address(notebook: nbformat.NotebookNode) -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    path = urls.get("Repository", "").removeprefix("https://github.com/").removesuffix(".git")
    target = f"{path}/blob/main/docs/tour.ipynb" if path else ""
    assert f"](https://colab.research.google.com/github/{target})" in notebook.cells[0].source


def test_the_code_runs_and_prints_the_lines_of_the_notebook(
    notebook: nbformat.NotebookNode,
    few_layers: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the model's first layers; the gate runs it on the whole model (`docs/run_tour.py`)."""
    model = icl.Model(icl.load_model(few_layers).wrapped, name="smollm2-135m")
    monkeypatch.setattr(icl, "load_model", lambda name: model)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    scope: dict[str, Any] = {}
    capsys.readouterr()
    lines = []
    try:
        for code in run_tour.code(notebook):
            exec(compile(code, "docs/tour.py", "exec"), scope)
            lines.append(run_tour.without_numbers(capsys.readouterr().out))
    finally:
        icl.set_progress(True)
    assert lines == run_tour.printed(notebook)
    assert scope["errors"].shape == (20, 3), "the linear layer's error signals"
    assert scope["decomposition"].residual < 1e-5
    assert [*scope["comparisons"]] == ["right labels", "flipped labels", "untrained model"]
