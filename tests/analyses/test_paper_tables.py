"""Tables from saved cells, and metrics from recordings; everything made here, on a tiny random model."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import paper_tables
import pytest
import released
from conftest import make_rows

import icl_dual as icl

SCRIPT = Path(paper_tables.__file__)
CELL = icl.Cell(model="llama", task="sst2", k=3, seed=1, lr=0.05, n_queries=6, protocol="reference")
RECORDED: dict = {
    "seed": 0,
    "n_examples": 5,
    "n_layers": 2,
    "n_heads": 3,
    "d_head": 4,
    "demonstration_lengths": [30, 1, 40, 20, 9, 15],
    "query_lengths": [2, 5],
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def cells(llama: icl.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two protocols, two seeds of one, another k: what a folder of finished cells may hold."""
    folder = tmp_path_factory.mktemp("cells")
    answer = dataclasses.replace(CELL, protocol="answer")
    wanted = [CELL, dataclasses.replace(CELL, seed=2), dataclasses.replace(CELL, k=2), answer]
    for cell in wanted:
        task = icl.Task("sst2", "Text: {text} Label:", ("no", "perhaps"), make_rows(), protocol=cell.protocol)
        icl.run_cell(llama, task, cell, folder / cell.name, keep_recordings=cell is CELL, progress=False)
    return folder


def test_tables_put_ours_beside_the_papers_and_never_mix_protocols(cells: Path, tmp_path: Path) -> None:
    done = run(cells, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    names = ("accuracy", "metrics", "accuracy_reference", "metrics_reference")
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.{k}" for n in names for k in ("md", "csv", "tex")}
    answer = pd.read_csv(tmp_path / "metrics.csv").query("not model.str.contains('paper')")
    assert set(answer["protocol"]) == {"answer"}
    reference = pd.read_csv(tmp_path / "metrics_reference.csv", keep_default_na=False)
    assert set(reference["protocol"]) == {"reference"}
    rows = reference.set_index(["model", "metric"])["SST2"].to_dict()
    # Another k is another group; seeds of one are pooled and said.
    assert (rows["llama (2)", "k"], rows["llama (2)", "seed"]) == ("3", "1, 2")
    assert (rows["llama (1)", "k"], rows["llama (1)", "seed"]) == ("2", "1")
    assert (rows["llama (2)", "lr"], rows["llama (2)", "queries"]) == ("0.05", "6")
    both = [icl.load_cell(cells / dataclasses.replace(CELL, seed=seed).name).comparison for seed in (1, 2)]
    values = pd.Series([comparison.per_layer["SimAOU"].mean().item() for comparison in both])
    assert rows["llama (2)", "SimAOU"] == f"{values.mean():.3f} ± {values.std():.3f}"
    paper = rows["GPT 1.3B (paper)", "SimAOU"], rows["GPT 2.7B (paper)", "lr"]
    assert paper == ("0.110", "0.007")
    text = (tmp_path / "metrics_reference.tex").read_text()
    assert "$\\pm$" in text
    assert text.count("\\midrule") == 4
    assert "recorded after the first label word" in (tmp_path / "accuracy_reference.md").read_text()


def test_a_table_of_two_protocols_is_refused(cells: Path) -> None:
    with pytest.raises(icl.StudyError, match=r"of one protocol in a table, got \['answer', 'reference'\]"):
        paper_tables.table(paper_tables.find_cells([cells]), paper_tables.METRIC_ROWS)


def test_cells_of_other_set_ups_share_no_row_and_say_what_differs(
    cells: Path, llama: icl.Model, tmp_path: Path
) -> None:
    label = dataclasses.replace(CELL, task="agnews", loss="label")
    task = icl.Task("agnews", "Text: {text} Label:", ("no", "perhaps"), make_rows(), protocol="reference")
    found = [icl.load_cell(cells / CELL.name), icl.run_cell(llama, task, label, tmp_path / "x", progress=False)]
    one, other = paper_tables.groups(found)
    assert (one.model, set(one.by_task)) == ("llama, loss all", {"sst2"})
    assert (other.model, set(other.by_task)) == ("llama, loss label", {"agnews"})


def test_exported_recordings_beside_cells_are_no_cells(cells: Path, tmp_path: Path) -> None:
    icl.export_recordings(icl.load_cell(cells / CELL.name), tmp_path / "study" / "exported", progress=False)
    (tmp_path / "study" / "cell").symlink_to(cells / CELL.name)
    assert len(paper_tables.find_cells([tmp_path / "study" / "exported", tmp_path / "study" / "cell"])) == 1


def test_a_cell_found_twice_is_no_second_seed(cells: Path) -> None:
    (cells / "again").symlink_to(cells / CELL.name)
    with pytest.raises(icl.StudyError, match="expected each cell once, got the same in"):
        paper_tables.find_cells([cells, cells / "again"])


def test_recordings_give_the_released_scripts_numbers_under_their_names(tmp_path: Path) -> None:
    released.write_random(tmp_path / "found", **RECORDED)
    done = run("--recordings", tmp_path / "found", "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    got = json.loads((tmp_path / "scores.json").read_text())
    for name, values in released.scores(tmp_path / "found").items():
        expected = None if isinstance(values, float) and math.isnan(values) else pytest.approx(values, abs=1e-9)
        assert got[name] == expected, name
    assert got["skipped"] == 0
    assert "token-level kendall" in done.stdout


def test_a_kept_cell_is_read_as_recordings_too(cells: Path, tmp_path: Path) -> None:
    done = run("--recordings", cells / CELL.name / "recordings", "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    expected = icl.load_cell(cells / CELL.name).comparison.released()
    got = json.loads((tmp_path / "scores.json").read_text())
    assert got["SimAOU"] == pytest.approx(expected["SimAOU"])
    assert got["token-level random_kendall"] == pytest.approx(expected["token-level random_kendall"])
    undefined = [name for name, value in expected.items() if isinstance(value, list) and math.isnan(value[0])]
    assert "example-level recall_topk" in undefined, "three demonstrations have no top five"
    assert all(got[name] == [None] * 3 for name in undefined)


def test_bad_records_are_an_error_in_a_line_or_skipped_and_counted(tmp_path: Path) -> None:
    released.write_random(tmp_path / "found", **RECORDED)
    path = tmp_path / "found" / "icl" / "record_info.jsonl"
    path.write_text(path.read_text()[:-30])
    done = run("--recordings", tmp_path / "found")
    assert done.returncode == 1
    assert f"error: {path}, line 5: expected a whole JSON object" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("--recordings", tmp_path / "found", "--skip-bad", "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["skipped"] == 1
    assert f"skipped: {path}, line 5" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either folders of cells, or --recordings FOLDER"),
        (("somewhere", "--json", "x.json"), "--json takes the metrics of --recordings"),
        (("--recordings", "x", "--kendall-queries", "0"), "expected a number from 1, or all, got '0'"),
        (("nowhere",), "error: expected finished cells in nowhere, found none"),
        (("--recordings", "nowhere"), "error: expected a folder of recordings, found no nowhere"),
    ],
)
def test_what_a_user_can_mend_is_said(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
