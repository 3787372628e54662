"""The command `icl-dual`: its help, its exit codes, and what goes to stdout and stderr."""

import argparse
import json
import logging
import re
import shlex
from pathlib import Path

import pytest

import icl_dual as icl
from icl_dual import cli
from icl_dual.cli import tasks
from icl_dual.progress import progress_bar, progress_enabled

COMMANDS = Path(cli.__file__).parent
ROOT = Path(__file__).parents[2]
PAGES = ("docs/command_line.md", "docs/grids.md", "docs/models.md")
PROSE = ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")))


def leaf_parsers(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parsers of commands by name, commands of a command included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {
                leaf: leaf_parser
                for command, of_command in action.choices.items()
                for leaf, leaf_parser in leaf_parsers(of_command, f"{name} {command}".strip()).items()
            }
    return {name: parser}


PARSERS = leaf_parsers(cli.make_parser())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_module_with_commands_is_registered() -> None:
    modules = {path.stem for path in COMMANDS.glob("*.py") if "\ndef add_commands(" in path.read_text(encoding="utf-8")}
    assert {module.__name__.rpartition(".")[2] for module in cli.MODULES} == modules


@pytest.mark.parametrize("name", PARSERS)
def test_each_command_has_examples_that_are_commands(name: str, folder: Path) -> None:
    parser = PARSERS[name]
    lines = map(str.strip, (parser.epilog or "").splitlines())
    commands = [line for line in lines if line.startswith("icl-dual ")]
    assert commands
    for command in commands:
        args = cli.parse(shlex.split(command)[1:])
        assert callable(args.run)
        assert command.startswith(f"icl-dual {name}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_pages_are_commands(page: str, folder: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:\S*/)?icl-dual (.+)$", text, flags=re.MULTILINE)
    assert commands
    for command in commands:
        if not command.startswith("--"):
            cli.parse(shlex.split(command, comments=True))


@pytest.mark.parametrize("page", PROSE)
def test_sentences_name_commands_that_exist(page: str) -> None:
    named = re.findall(r"`icl-dual ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert {*named} <= {*PARSERS}


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"icl-dual {icl.__version__}\n"


def test_without_a_command_the_help_is_shown_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for name in PARSERS:
        assert re.search(rf"^ +{name.split()[0]}\b", captured.err, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reprduce"], "got 'reprduce' (did you mean 'reproduce' or 'rerun'?): check its spelling"),
        (["tasks", "--jsn"], "unrecognized arguments: --jsn (did you mean '--json'?)"),
        (["reproduce", "--querys=3"], "unrecognized arguments: --querys=3 (did you mean '--queries' or '--quiet'?)"),
        (["reproduce", "--tasks", "sst3"], "got 'sst3' (did you mean 'sst5' or 'sst2'?): check its spelling"),
        (["reproduce", "--dtype", "bfloat"], "got 'bfloat' (did you mean 'bfloat16' or "),
        (["models", "smollm2-135"], "got 'smollm2-135' (did you mean 'smollm2-135m'?): check its spelling, or its"),
        (["compare", "smollm2-135m"], "one of the arguments --task --rows is required"),
    ],
)
def test_what_is_misspelled_is_refused_with_the_near_misses(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def stub(monkeypatch: pytest.MonkeyPatch, run) -> None:
    """Let the command `tasks` run something else."""
    monkeypatch.setattr(tasks, "run", run)


def test_an_error_is_one_line_and_its_traceback_where_that_is_requested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise icl.TaskError("expected 1,\ngot 2")

    stub(monkeypatch, fail)
    assert cli.main(["tasks"]) == 1
    assert capsys.readouterr().err == "error: expected 1, got 2\n"
    assert cli.main(["tasks", "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: expected 1, got 2"


def test_ctrl_c_is_130_and_says_what_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(icl, "run_study", stop)
    assert cli.main(["reproduce", "--lr", "0.1", "--out", "results"]) == 130
    expected = "\nstopped. Finished cells stay in results/cells; the same command goes on from them.\n"
    assert capsys.readouterr().err == expected


def test_json_alone_is_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def report(args: argparse.Namespace) -> dict[str, int]:
        print("for people")
        return {"n": 1}

    stub(monkeypatch, report)
    assert cli.main(["tasks", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"n": 1}
    assert captured.err == "for people\n"
    assert cli.main(["tasks"]) == 0
    assert capsys.readouterr() == ("for people\n", "")


def test_quiet_shows_no_progress_and_the_switch_is_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(args: argparse.Namespace) -> None:
        logging.getLogger("icl_dual.assets").info("fetching a package")
        for _ in progress_bar(range(2), desc="working", leave=True):
            pass

    stub(monkeypatch, work)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert cli.main(["tasks"]) == 0
    printed = capsys.readouterr().err
    assert "fetching a package" in printed
    assert "working" in printed
    assert cli.main(["tasks", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert progress_enabled()


def test_tasks_are_those_of_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in known] == list(icl.TASKS)
    sst2 = known[0]
    rows = [{"text": f"film number {number}", "label": number % 2} for number in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = icl.load_task("sst2", "rows.jsonl")
    assert (sst2["template"], tuple(sst2["labels"])) == (loaded.template, loaded.label_words)
    assert sst2["k"] == icl.PAPER_K["sst2"]
