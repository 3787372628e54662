"""Progress bars show when wanted and are silent when not: asked, switched off, or told by the environment."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import nbclient
import nbformat
import pytest
from transformers.utils import logging as transformers_logging

import icl_dual as icl
from icl_dual import progress
from icl_dual.progress import datasets_bars, progress_bar, progress_enabled, transformers_bars

LIBRARY = Path(icl.__file__).parent


@pytest.fixture(autouse=True)
def restore_progress(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    yield
    icl.set_progress(True)


def run_everything(model: icl.Model, task: icl.Task, *, progress: bool = True) -> None:
    """Capture, finetune alone and in parallel, compare updates and measure order sensitivity."""
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    icl.capture(model, prompts, progress=progress)
    icl.finetune(model, prompts, lr=0.01, progress=progress)
    list(icl.finetune_many(model, [prompts, prompts], [0.01, 0.02], progress=progress))
    icl.measure_order_sensitivity(
        model, task, task.demonstrations(2, seed=1), task.queries(2), n_orders=2, lr=0.01, progress=progress
    )


def test_bars_show_unless_a_function_is_told_not_to(
    llama: icl.Model, task: icl.Task, capfd: pytest.CaptureFixture[str]
) -> None:
    run_everything(llama, task, progress=False)
    assert capfd.readouterr() == ("", "")
    run_everything(llama, task)
    out, err = capfd.readouterr()
    assert not out
    for title in ("query", "finetuning, lr 0.01", "finetuning 2 in parallel", "orders"):
        assert title in err


def test_set_progress_silences_every_bar(llama: icl.Model, task: icl.Task, capfd: pytest.CaptureFixture[str]) -> None:
    icl.set_progress(False)
    run_everything(llama, task)
    assert capfd.readouterr() == ("", "")
    icl.set_progress(True)
    run_everything(llama, task)
    assert "finetuning" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("value", "shows"), [("1", False), ("true", False), ("", True), ("0", True), ("false", True), ("False", True)]
)
def test_the_environment_silences_every_bar(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], value: str, shows: bool
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert progress_enabled() == shows
    assert list(progress_bar(range(3), desc="counting")) == [0, 1, 2]
    assert ("counting" in capfd.readouterr().err) == shows
    icl.set_progress(False)
    assert not progress_enabled()


SCRIPT = """
import icl_dual as icl
from icl_dual.models.tiny import tiny_model

model = tiny_model()
rows = [{"text": f"film {i}", "label": i % 2} for i in range(40)]
task = icl.Task("toy", "Text: {text} Label:", ("no", "yes"), rows)
prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
icl.capture(model, prompts)
icl.finetune(model, prompts, lr=0.01)
"""


@pytest.mark.parametrize(("variable", "shows"), [("", True), ("1", False)])
def test_a_script_writes_nothing_to_stderr_when_the_environment_silences_bars(variable: str, shows: bool) -> None:
    environment = {**os.environ, "TQDM_DISABLE": variable, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=LIBRARY.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stdout
    assert ("finetuning" in done.stderr) == shows
    assert bool(done.stderr) == shows


def test_a_pipe_gets_lines_from_time_to_time_and_no_control_characters(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in progress_bar(range(3000), desc="counting", leave=True):
        assert step >= 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2, "at the beginning and at the end: the steps in between took no ten seconds"
    assert "0/3000" in lines[0]
    assert "3000/3000" in lines[1]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress_bar(total=3, desc="outer", miniters=1) as outer:
        for _ in progress_bar(range(2), desc="inner", miniters=1):
            outer.update()
    err = capfd.readouterr().err
    assert [line.split(":")[0] for line in err.splitlines()] == ["outer", "inner", "outer", "inner", "outer", "inner"]
    assert not set(err) & set("\r\x1b")


def test_a_terminal_gets_a_bar_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(3), desc="counting")) == [0, 1, 2]
    assert "\rcounting" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress_bar(range(3), show=False)) == [0, 1, 2]


NOTEBOOK = [
    """
from icl_dual.progress import progress_bar
import icl_dual as icl
for _ in progress_bar(range(3), desc="counting", leave=True):
    pass
""",
    """
for _ in progress_bar(range(3), desc="fleeting"):
    pass
""",
    """
icl.set_progress(False)
for _ in progress_bar(range(3), desc="silent", leave=True):
    pass
""",
]


def test_a_notebook_shows_bars_as_widgets_and_nothing_on_stderr() -> None:
    """Run in a real kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in NOTEBOOK])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    kept, fleeting, silent = (cell.outputs for cell in notebook.cells)
    assert [output.output_type for output in (*kept, *fleeting)] == ["display_data"] * 2, "and no stream"
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state
    states = {name: widget["state"] for name, widget in widgets.items()}
    children = states[kept[0].data["application/vnd.jupyter.widget-view+json"]["model_id"]]["children"]
    parts = [states[child.removeprefix("IPY_MODEL_")] for child in children]
    assert "counting:\u2007100%" in parts[0]["value"]
    assert (parts[1]["value"], parts[1]["max"], parts[1]["bar_style"]) == (3, 3, "success")
    assert silent == []


def test_transformers_bars_are_silenced_within_the_block_only() -> None:
    def shows() -> bool:
        return transformers_logging.is_progress_bar_enabled()

    assert shows()
    with transformers_bars():
        assert shows()
    with transformers_bars(show=False):
        assert not shows()
    assert shows()
    icl.set_progress(False)

    @transformers_bars()
    def fail() -> None:
        assert not shows()
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert shows(), "also after an exception"


def test_transformers_bars_stay_silent_for_a_user_who_silenced_them() -> None:
    transformers_logging.disable_progress_bar()
    try:
        with transformers_bars(show=False):
            pass
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_datasets_bars_are_silenced_within_the_block_only() -> None:
    with datasets_bars(datasets):
        assert not datasets.are_progress_bars_disabled()
    icl.set_progress(False)
    with datasets_bars(datasets):
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()


def test_loading_a_model_shows_no_bar_when_they_are_silenced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[bool] = []

    def model_files(*args: object) -> None:
        shown.append(transformers_logging.is_progress_bar_enabled())
        raise icl.AssetError("there is none")

    monkeypatch.setattr("icl_dual.assets.model_files", model_files)
    for enabled in (True, False):
        icl.set_progress(enabled)
        with pytest.raises(icl.AssetError, match="there is none"):
            icl.load_model(str(tmp_path))
    assert shown == [True, False]


def test_every_bar_of_the_library_obeys_the_switch() -> None:
    """No module but this one's uses tqdm."""
    users = [path.name for path in LIBRARY.rglob("*.py") if "import tqdm" in path.read_text()]
    assert users == ["progress.py"]
