"""The runner of all scripts, the commands that pages quote, and that each script is a program."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import controls
import decomposition
import momentum
import pytest
import readable
from matplotlib.figure import Figure

import icl_dual as icl
from icl_dual.scripts import common, reproduce

ROOT = Path(__file__).parents[2]
ANALYSES = ROOT / "analyses"
SCRIPTS = sorted(path.stem for path in ANALYSES.glob("*.py") if "__main__" in path.read_text())
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("figures/**/*.md"))]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.script_parser("A script.")
    parser.add_argument("--number", type=int, default=1)
    return parser.parse_args(argv)


def test_a_script_that_ends_well_returns_0() -> None:
    numbers = []
    assert common.run_script(parse, lambda args: numbers.append(args.number), ["--number", "5"]) == 0
    assert numbers == [5]


@pytest.mark.parametrize(
    "error",
    [ValueError("expected 1"), icl.StudyError("expected 1"), OSError("expected 1"), icl.AssetError("expected 1")],
)
def test_an_error_that_the_user_can_mend_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise error

    assert common.run_script(parse, fail, []) == 1
    assert capsys.readouterr().err == "error: expected 1\n"


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    def fail(args: argparse.Namespace) -> None:
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        common.run_script(parse, fail, [])


def test_ctrl_c_says_what_remains(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    assert common.run_script(parse, stop, ["--number", "7"], stopped="Cell {number} stays.") == 130
    assert capsys.readouterr().err == "\nstopped. Cell 7 stays.\n"


def test_arguments_that_are_refused_return_2_and_run_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run_script(parse, lambda args: pytest.fail("ran"), ["--number", "x"]) == 2
    assert "invalid int value: 'x'" in capsys.readouterr().err


def test_a_command_has_what_departs_from_the_defaults_in_the_parsers_order() -> None:
    parser = common.cell_parser(None)
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--ks", type=int, nargs="*", default=[1])
    parser.add_argument("--out", type=Path, default=Path("figures"))
    given = "--k 3 --tasks sst2 mr --queries all --lr 1e-05 --balanced --ks --out some/where"
    expected = "--tasks sst2 mr --k 3 --queries all --lr 1e-05 --balanced --ks --out some/where"
    args = parser.parse_args(given.split())
    assert common.command_line("/anywhere/x.py", parser, args) == f"python analyses/x.py {expected}"
    usual = parser.parse_args(["--out", "/tmp/x"])
    assert common.command_line("x.py", parser, usual) == "python analyses/x.py"
    assert common.command_line("x.py", parser, usual, always=("queries",)) == "python analyses/x.py --queries 100"


def test_a_command_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    parser = common.cell_parser(None)
    (tmp_path / "mine").mkdir()
    args = parser.parse_args(["--model", str(tmp_path / "mine")])
    assert common.command_line("x.py", parser, args) == "python analyses/x.py --model mine"


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of scripts that stand on lines of their own, as script and arguments."""
    lines = [line.strip() for line in page.read_text().splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"python analyses/\w+\.py", line)]
    return [(Path(script).stem, arguments) for _, script, *arguments in words]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_that_pages_quote_are_commands_that_work(page: Path) -> None:
    for script, arguments in commands(page):
        importlib.import_module(script).parse(arguments)


@pytest.mark.parametrize(
    ("script", "given"),
    [
        (reproduce, "--balanced --loss label --protocol reference --seeds 3 4"),
        (reproduce, "--preset paper-2.7b --tasks sst2 cb --lr 0.5"),
        (reproduce, "--preset paper-1.3b --rehearse 2 --out figures/rehearsal"),
        (controls, "--ks --orders 0 --queries all"),
        (decomposition, "--dtype float64 --source wheel --rank 2"),
        (controls, "--dtype bfloat16 --arithmetic float32"),
        (momentum, "--etas 0 learned --curve --added 0.1 --steps 50 --parts text tasks"),
    ],
    ids=str,
)
def test_a_quoted_command_parses_to_the_same_arguments(script, given: str) -> None:
    args = script.parse(given.split())
    line = (
        script.command(args)
        if hasattr(script, "command")
        else common.command_line(script.__file__, script.make_parser(), args)
    )
    assert script.parse(shlex.split(line)[2:]) == args


def test_every_script_is_a_program() -> None:
    """All are run as `__main__` in one process, for importing what they need takes seconds."""
    program = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as stop: print('returned', stop.code)\n"
    )
    paths = [str(ANALYSES / f"{script}.py") for script in SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ANALYSES), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    assert len(SCRIPTS) >= 11
    assert done.stdout.count("returned 0") == len(SCRIPTS)
    for script in SCRIPTS:
        assert f"usage: {script}.py" in done.stdout


def test_a_program_returns_its_exit_code_and_one_line(tmp_path: Path) -> None:
    arguments = ["--tasks", "sst2", "--lr", "0.001", "--reference-k-mismatch", "--out", str(tmp_path)]
    command = [sys.executable, str(ANALYSES / "reproduce.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "expected reference_k_mismatch with protocol='reference' only" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_long_titles_fit_and_keep_numbers_with_their_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = common.model_title("gemma3-270m")
    title = f"Shares\n{model}, protocol answer, 100 queries a task, seed 1\n{'MR k = 32, lr 0.0001; ' * 9}"
    titles, problems = [], []

    def look(fig: Figure, path: Path, *kinds: str) -> None:
        fig.canvas.draw()
        titles.append(fig.get_suptitle())
        problems.extend(readable.overlapping_titles(fig))

    monkeypatch.setattr(common, "write_figure", look)
    fig, _ = common.panels(5)
    common.finish(fig, [], title, tmp_path / "figure")
    assert problems == []
    assert titles[0].replace("\n", " ") == title.strip().replace("\n", " ")
    assert not any(line.endswith(("lr", "k", "=", "seed")) for line in titles[0].splitlines())
    assert "seed 1" in titles[0]
