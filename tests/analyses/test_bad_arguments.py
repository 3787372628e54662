"""Every script refuses bad arguments in one line, before it computes or writes anything."""

import argparse
import importlib
import io
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import control_tables
import processes
import pytest
import torch

import icl_dual as icl
from icl_dual.scripts import common

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "analyses").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
NOT_NUMBERS = ("x", "", "nan", "1.5.2")
NO_OUTPUTS = ("a_file/below", "a_file/far/below", "x" * 300, "to_nothing")
BAD_VALUES = {
    "setting": ("k", "sedes=1", "=2", ""),
    "whole": ("-1", "1.5", "1e3", "9" * 5000, "²", *NOT_NUMBERS),
    "count_or_all": ("0", "-1", "none", *NOT_NUMBERS),
    "replica_count": ("1", "-1", "1.5", *NOT_NUMBERS),
    "rate": ("0", "-1", "inf", *NOT_NUMBERS),
    "eta": ("1", "-0.1", "inf", *NOT_NUMBERS),
    "eta_or_learned": ("1", "-0.1", "inf", "Learned", *NOT_NUMBERS),
    "model_name": ("nosuch", "./no/such", ""),
    "model_or_random": ("nosuch", "random-1.4b", ""),
    "device": ("nowhere", "cuda:x", ""),
    "output_folder": ("a_file", "a_project", *NO_OUTPUTS),
    "output_file": (".", "a_folder", "a_file/below", "a_file/far/below"),
}
"""By the name of an option's type: what it refuses."""

TEXT = {"--controls", "--corpus", "--recordings", "--work"}
"""Options with a name or an input of any kind, which is checked where it is read."""


class Captured(Exception):  # noqa: N818 - it carries a parser out of a script
    """The parser of a script."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser that a script's `parse` makes."""

    def capture(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise Captured(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.ScriptParser, "parse_args", capture)
        with pytest.raises(Captured) as captured:
            importlib.import_module(script).parse([])
    return captured.value.args[0]


OPTIONS = [
    pytest.param(script, action, id=f"{script} {action.option_strings[-1]}")
    for script in SCRIPTS
    for action in parser_of(script)._actions
    if action.option_strings and action.nargs != 0
]


def bad_values(action: argparse.Action) -> tuple[str, ...]:
    """Return values that an option has to refuse."""
    values = () if action.type is None else BAD_VALUES.get(getattr(action.type, "__name__", ""), ())
    of_choices = ("nosuch", "") if action.choices is not None and action.type is None else ()
    return (*values, *of_choices)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a file, a folder, and a link to nothing."""
    (tmp_path / "a_file").write_text("kept")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_project").mkdir()
    (tmp_path / "a_project" / "README.md").write_text("# My project")
    (tmp_path / "to_nothing").symlink_to(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(icl, "load_model", lambda *args, **kwargs: pytest.fail("no model is needed"))
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refusal(script: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit status of a script and the one line that it wrote."""
    status = importlib.import_module(script).main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return status, line


@pytest.mark.parametrize(("script", "action"), OPTIONS)
def test_a_bad_value_is_refused_in_one_line(
    script: str, action: argparse.Action, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, before = action.option_strings[-1], files(folder)
    assert bad_values(action) or option in TEXT, "an option of numbers, files or names has a type that checks them"
    for value in bad_values(action):
        status, line = refusal(script, [option, value], capsys)
        assert status == 2, value
        assert re.match(rf"error: argument (-\w, )?{option}: expected .+, got .+: .+", line, re.DOTALL), line
    assert files(folder) == before
    assert (folder / "a_file").read_text() == "kept"


@pytest.mark.parametrize(("script", "action"), OPTIONS)
def test_options_of_numbers_start_where_they_say(
    script: str, action: argparse.Action, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if getattr(action.type, "__name__", "") != "whole":
        return
    convert: Any = action.type
    least = next(number for number in range(100) if _accepts(convert, number))
    assert least in (0, 1, 2, 5), "5: the fewest queries with an interval"
    if least:
        assert refusal(script, [action.option_strings[-1], str(least - 1)], capsys)[0] == 2


def _accepts(convert: Any, number: int) -> bool:
    try:
        return convert(str(number)) == number
    except argparse.ArgumentTypeError:
        return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_options_are_one_line(script: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    positional = ["cells"] if script in ("grid_controls", "paper_tables", "preset_cost") else []
    status, line = refusal(script, [*positional, "--nosuch", "1"], capsys)
    assert status == 2
    assert "--nosuch" in line


COMPUTING = [script for script in SCRIPTS if any(a.dest == "model" for a in parser_of(script)._actions)]


@pytest.mark.parametrize("script", COMPUTING)
def test_a_folder_without_a_model_is_one_line_before_anything_is_computed(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(control_tables.CONTEXTS, "ICL on another task", {"context_task": "subj"})  # has fewer rows
    options = {a.option_strings[-1]: a for a in parser_of(script)._actions if a.option_strings}
    arguments = ["--model", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]
    arguments += ["--lr", "0.001"] * ("--lr" in options and script != "stability")
    arguments += ["--tasks", "mr"] * ("--tasks" in options and "mr" in (options["--tasks"].choices or ["mr"]))
    assert importlib.import_module(script).main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert str(tmp_path / "empty") in lines[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "script", [script for script in COMPUTING if any(a.dest == "device_map" for a in parser_of(script)._actions)]
)
def test_models_are_loaded_as_the_options_say(
    script: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def load(*args: object, **options: Any) -> None:
        given.append({name: options.get(name) for name in ("device", "device_map", "dtype", "arithmetic")})
        raise icl.StudyError("expected nothing more, got a model to load: stop here")

    monkeypatch.setattr(icl, "run_study", load)
    monkeypatch.setattr(icl, "load_model", load)
    arguments = ["--model", tiny_model, "--out", str(tmp_path), "--dtype", "bfloat16", "--arithmetic", "float32"]
    arguments += ["--lr", "0.001"] * (script != "stability")
    for place in (["--device", "cpu"], ["--device-map", "auto"]):
        assert importlib.import_module(script).main([*arguments, *place]) == 1
    precision = {"dtype": torch.bfloat16, "arithmetic": torch.float32}
    on_cpu, mapped = {"device": "cpu", "device_map": None}, {"device": None, "device_map": "auto"}
    assert given == [on_cpu | precision, mapped | precision]


def test_headings_are_those_of_the_pages_that_scripts_write() -> None:
    scripts = ROOT / "icl_dual" / "scripts"
    templates = [*(ROOT / "analyses").glob("*.py"), *scripts.glob("*.py"), *scripts.glob("data/*_page.md")]
    texts = [path.read_text(encoding="utf-8") for path in templates if path.name != "common.py"]
    for heading in common.HEADINGS:
        assert any(f'f"""{heading}' in text or text.startswith(heading) for text in texts), heading
    for page in ROOT.glob("figures/**/README.md"):
        assert common.output_folder(str(page.parent)) == page.parent


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond some bytes, as on a disk that is full: the beginning is written, then an error."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_disk_that_is_full_while_drawing_leaves_no_half_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = importlib.import_module("claim")
    table = ROOT / "figures" / "controls" / "controls.csv"
    arguments = ["--controls", str(table), "--out", str(tmp_path / "claim")]
    (tmp_path / "claim.png").write_bytes(b"the old one")
    with full_disk(6000):
        assert claim.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: expected to write .*claim\.png, got .+: .+", line)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"claim.png": b"the old one"}


def test_a_terminal_without_delta_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii", write_through=True))
    assert common.run_script(lambda argv: argparse.Namespace(), lambda args: print("ΔW"), []) == 0
    assert stream.getvalue() == b"\\u0394W\n"


def test_errors_of_several_lines_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise OSError("We couldn't connect.\n  Check\nyour connection.\n")

    assert common.run_script(lambda argv: argparse.Namespace(), fail, []) == 1
    assert capsys.readouterr().err == "error: We couldn't connect. Check your connection.\n"


@pytest.mark.parametrize("error", [ImportError("No module named 'psutil'"), MemoryError(), common.ScriptError("x")])
def test_what_is_missing_is_no_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise error

    assert common.run_script(lambda argv: argparse.Namespace(), fail, []) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_process_that_fails_is_said_by_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nif len(sys.argv) < 3: sys.exit('a warning\\nerror: too few')")
    assert processes.run_child(str(script), "a", "b") == "['a', 'b']\n"
    with pytest.raises(common.ScriptError, match=r"expected .*script\.py a to end well, got too few$"):
        processes.run_child(str(script), "a")
