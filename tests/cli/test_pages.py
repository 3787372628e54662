"""The shell commands of pages: those that a tiny model can run in seconds run as printed, in the order of a page."""

import csv
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from icl_dual import Task, assets, cli, paper_tasks

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")))
RUN = {
    "docs/command_line.md": ("icl-dual",),
    "docs/grids.md": (
        "icl-dual plan",
        "icl-dual run grid.toml --results results --processes",
        "icl-dual status",
        "icl-dual rerun",
        "icl-dual collect",
        "icl-dual select",
        "python analyses/paper_tables.py results",
        "python analyses/grid_controls.py",
    ),
    "docs/models.md": ("icl-dual compare",),
    "docs/extending.md": ("python analyses/claim.py",),
}
"""By page, how the commands begin that tests of this module run."""
ELSEWHERE = {
    r"python3 -m venv .*|\.venv/bin/pip install .*": "installs packages: the gate runs the README's",
    r"\.venv/bin/(pytest|ruff|pyright)\b.*": "the gate runs them",
    r"\.venv/bin/icl-dual doctor": "the same command without its folder is on the page",
    r"\.venv/bin/python analyses/reproduce\.py": "minutes of the real model; the gate runs it with fewer queries",
    r"icl-dual run .*(s3://|--engine (ray|slurm)).*": "needs a cluster or a bucket: tests/grids has local ones",
    r"python analyses/\w+\.py s3://.*": "needs a bucket: tests/grids has a local one",
    r"python analyses/claim\.py --controls figures/grid_controls/.*": "needs a grid with three controls",
    r"torchrun .*": "needs eight GPUs: tests/pretraining has two processes",
    r"python analyses/(benchmark|controls|decomposition|growth|implicit|momentum|sources|stability|token_agreement)"
    r"\.py.*": "minutes to hours of real models: tests/analyses has each on a tiny one",
    r"python analyses/claim\.py": "reads the committed controls: it is run on them for docs/extending.md",
    r"python analyses/preset_cost\.py .*": "reads the cells of a rehearsal, which takes minutes: tests/analyses has it",
    r"python analyses/reproduce\.py.*": "minutes to days of real models: tests/scripts has each option on a tiny one",
    r"python analyses/paper_tables\.py --recordings .*": "reads the recordings that the paper's authors released",
}
"""Commands that no test of this module runs, and why."""


def commands(page: str) -> list[str]:
    """The shell commands of a page, without comments."""
    blocks = re.findall(r"```(?:sh|bash|shell|console)\n(.*?)```", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.split(" && ")]
    return [command for part in parts if (command := shlex.join(shlex.split(part, comments=True)))]


def is_run(page: str, command: str) -> bool:
    return command.startswith(RUN.get(page, ()))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the tokenizer of the packaged model, which has a chat template, as it is unpacked."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    AutoTokenizer.from_pretrained(assets.model_files("smollm2-135m").folder).save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    tokens: dict[str, Any] = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.2, architectures=["LlamaForCausalLM"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Runs a command in a folder with rows of one's own, with an empty HOME. A tiny model takes the place of the
    packaged one, in a cache of its own, and of those of the hub, and few rows that of the packaged data sets, which
    take half a minute to read with every call's types checked."""
    for name in ("home", "work", "cache/icl_dual/models"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unpacked = assets.cache_dir() / "models" / assets.PACKAGED_MODELS["smollm2-135m"].sha256[:16]
    shutil.copytree(model_folder, unpacked)
    monkeypatch.setattr(assets, "_hub_model", lambda name, revision: assets.ModelFiles(unpacked, "revision:tiny"))
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(model_folder, "my-model")
    with Path("films.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(f"film {number}", ("bad", "good")[number % 2]) for number in range(40)]
        csv.writer(file).writerows([("text", "label"), *rows])

    texts = [{"text": f"report {number} of the day", "label": number % 2} for number in range(100)]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    for name in ("sst2", "agnews"):
        monkeypatch.setitem(paper_tasks._registered, name, partial(few_rows, name, few))

    def run_command(command: str) -> None:
        program, *arguments = shlex.split(command)
        if program == "python":
            main = importlib.import_module(Path(arguments.pop(0)).stem).main
        else:
            assert program == "icl-dual"
            main = cli.main
        assert main(arguments) == 0, command

    yield run_command
    assert not list((tmp_path / "home").iterdir())


def few_rows(name: str, few: Path, source: object, protocol: Literal["answer", "reference"]) -> Task:
    return paper_tasks._paper_task(name, few, protocol)


def run_page(page: str, run: Callable[[str], None]) -> list[str]:
    """Run a page's commands, and return them."""
    chosen = [command for command in commands(page) if is_run(page, command)]
    for command in chosen:
        run(command)
    return chosen


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_has_its_reason(page: str) -> None:
    for command in commands(page):
        reasons = [why for pattern, why in ELSEWHERE.items() if re.fullmatch(pattern, command)]
        assert is_run(page, command) or reasons, f"{page}: no test runs `{command}`"


def test_each_reason_is_that_of_a_command() -> None:
    others = [command for page in PAGES for command in commands(page) if not is_run(page, command)]
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in others), pattern
    for page, beginnings in RUN.items():
        for beginning in beginnings:
            assert any(command.startswith(beginning) for command in commands(page)), (page, beginning)


def test_the_page_of_the_command_line_runs(run: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_page("docs/command_line.md", run)
    assert {command.split()[1] for command in ran} == {
        *("doctor", "models", "tasks", "compare", "view", "reproduce"),
    }
    printed = capsys.readouterr().out
    assert "attention splits into z_0 and ΔICL" in printed
    files = {path.name for path in Path("comparison").iterdir()}
    page = (ROOT / "docs" / "command_line.md").read_text("utf-8")
    section = page.partition("## What `compare` writes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    assert {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)} == files
    (data,) = re.findall(r'id="data">(.*?)</script>', Path("page.html").read_text("utf-8"))
    assert json.loads(data)
    for table in ("accuracy", "metrics", "chat"):  # the model has a chat template; others get no `chat.md`
        assert Path("small", f"{table}.md").is_file()
    assert len(list(Path("small", "cells").iterdir())) == 2


def test_the_page_of_grids_runs(run: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    """With one process: what a grid does with several is the subject of tests/grids."""
    page = (ROOT / "docs" / "grids.md").read_text("utf-8")
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], {})
    search = Path("grid.toml").read_text("utf-8").replace("[0.001]", "[0.001, 0.01]").partition("[controls")[0]
    Path("search.toml").write_text(f'{search}\nsplit = "selection"\n', encoding="utf-8")
    run("icl-dual run search.toml --results searched")
    ran = run_page("docs/grids.md", lambda command: run(command.replace("--processes 2", "--processes 1")))
    assert [command.split()[1] for command in ran] == [
        *("plan", "run", "status", "rerun", "collect"),
        *("analyses/paper_tables.py", "analyses/grid_controls.py", "select"),
    ]
    assert "2 done, 0 running, 0 failed, 0 remaining" in capsys.readouterr().out
    assert {*pd.read_parquet("grid.parquet")["control"]} == {"plain", "flipped labels"}
    assert Path("figures", "metrics.md").is_file()
    assert Path("figures", "grid_controls", "controls.csv").is_file()


def test_the_pages_of_models_and_extensions_run(run: Callable[[str], None]) -> None:
    run_page("docs/models.md", run)
    assert Path("comparison", "comparison.png").is_file()
    controls = Path("figures", "controls", "controls.csv")
    controls.parent.mkdir(parents=True)
    shutil.copy(ROOT / controls, controls)
    run_page("docs/extending.md", run)
    assert Path("figures", "claim.png").is_file()
