from pathlib import Path

import pytest

import icl_dual as icl
from icl_dual.grids import Grid, GridError, load_grid

WHOLE = """
models = ["smollm2-135m"]
tasks = ["sst2", "mr"]
k = "paper"
seeds = [1, 2]
rates = { sst2 = 0.01, mr = [0.001, 0.01] }
n_queries = "all"
precision = "bfloat16"

[finetuning]
optimiser = "adam"
[finetuning.lora]
rank = 4
targets = ["k", "v"]

[controls."flipped labels"]
context = "flipped labels"
[controls.sgd.finetuning]
optimiser = "sgd"
"""


def write(folder: Path, text: str) -> Path:
    (folder / "grid.toml").write_text(text, encoding="utf-8")
    return folder / "grid.toml"


def test_a_file_is_the_grid_of_its_values(tmp_path: Path) -> None:
    config = icl.FinetuneConfig(optimiser="adam", lora=icl.Lora(rank=4, targets=("k", "v")))
    sgd = {"optimiser": "sgd"}
    expected = Grid(
        models=["smollm2-135m"],
        tasks=["sst2", "mr"],
        seeds=[1, 2],
        rates={"sst2": 0.01, "mr": [0.001, 0.01]},
        n_queries=None,
        precision="bfloat16",
        finetuning=config,
        controls={"flipped labels": {"context": "flipped labels"}, "sgd": {"finetuning": sgd}},
    )
    grid = load_grid(write(tmp_path, WHOLE))
    assert grid == expected
    assert grid.cells() == expected.cells()
    assert {cell.cell.finetuning.optimiser for cell in grid.cells() if cell.control == "sgd"} == {"sgd"}


def test_every_problem_is_reported_with_its_line(tmp_path: Path) -> None:
    text = """models = ["smollm2-135m"]
task = ["sst2"]
seeds = [1, -2]
rates = "fast"
# a comment = 1
k = [
  4,
]
[finetuning]
optimizer = "adam"
[finetuning.lora]
rank = 0
[controls.wrong]
contxt = "own"
"""
    with pytest.raises(GridError) as error:
        load_grid(write(tmp_path, text))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("expected a grid that can be run, got 5 problems in ")
    assert lines[1] == "expected tasks, got none: give at least one"
    assert "line 2: expected a key of a grid, got 'task': did you mean 'tasks'?" in lines
    assert any(line.startswith("line 3: expected seeds[1] as a whole number of at least 0") for line in lines)
    assert any(line.startswith("line 4: expected rates as a number") for line in lines)
    assert "line 10: expected a setting of finetuning, got 'optimizer': did you mean 'optimiser'?" in lines


def test_impossible_combinations_are_reported_with_their_lines(tmp_path: Path) -> None:
    text = """models = ["smollm2-135m"]
tasks = ["sst2"]
k = 2
reference_k_mismatch = true
[finetuning]
batch_size = 4
[controls.both]
context = "flipped labels"
context_task = "mr"
[controls."few queries"]
n_queries = 5
"""
    with pytest.raises(GridError) as error:
        load_grid(write(tmp_path, text))
    lines = str(error.value).splitlines()
    assert any(
        line.startswith("line 5: expected batch_size of at most the number of demonstrations (2)") for line in lines
    )
    assert any(line.startswith("line 7: control 'both': expected context='own'") for line in lines)
    mended = text.replace("batch_size = 4", "").replace('context_task = "mr"\n', "")
    with pytest.raises(GridError, match="reference_k_mismatch"):
        load_grid(write(tmp_path, mended))
    mended = mended.replace("reference_k_mismatch = true", "")
    with pytest.raises(GridError, match=r"line 9: expected cells of different ids, got two with .* n_queries alone"):
        load_grid(write(tmp_path, mended))


def test_unknown_keys_and_impossible_combinations_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("""models = ["smollm2-135m"]
tasks = ["sst2"]
sedes = [1]
[controls.both]
context = "flipped labels"
context_task = "mr"
[controls.wrong]
contxt = "flipped labels"
""")
    with pytest.raises(GridError) as error:
        load_grid(path)
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["line 3", "line 4", "line 8"]
    assert "control 'both': expected context='own'" in lines[2]


def test_a_file_may_begin_with_the_mark_of_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "plain.toml").write_text(WHOLE, encoding="utf-8")
    (tmp_path / "marked.toml").write_text(WHOLE, encoding="utf-8-sig")
    assert load_grid(tmp_path / "marked.toml") == load_grid(tmp_path / "plain.toml")


def test_values_that_are_too_deep_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text(f"k = {'[' * 5_000}")
    with pytest.raises(GridError, match="expected a grid in TOML"):
        load_grid(tmp_path / "deep.toml")


def test_what_is_no_file_or_no_toml_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GridError, match=r"No such file or directory: check the path"):
        load_grid(tmp_path / "none.toml")
    with pytest.raises(GridError, match=r"which is none: .*line 1"):
        load_grid(write(tmp_path, "models = = 1\n"))
