"""Tables from saved cells, and metrics from recordings; everything made here, on a tiny random model."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import released
import torch
from helpers import make_rows
from scipy import stats

import icl_dual as icl
from icl_dual.metrics.catalogue import layer_metrics
from icl_dual.metrics.formulas import rec2ftp
from icl_dual.scripts import paper_tables
from icl_dual.statistics.intervals import bootstrap, widened
from icl_dual.storage.folders import SCRATCH, _host

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


def run(*arguments: object) -> int:
    return paper_tables.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def cells(llama: icl.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two protocols, two seeds of one, another k: what a folder of finished cells may hold."""
    folder = tmp_path_factory.mktemp("cells")
    answer = dataclasses.replace(CELL, protocol="answer", replicas=0)
    wanted = [CELL, dataclasses.replace(CELL, seed=2), dataclasses.replace(CELL, k=2), answer]
    for cell in wanted:
        task = icl.Task("sst2", "Text: {text} Label:", ("no", "perhaps"), make_rows(), protocol=cell.protocol)
        icl.run_cell(llama, task, cell, folder / cell.name, keep_recordings=cell is CELL, progress=False)
    return folder


def test_tables_put_ours_beside_the_papers_and_never_mix_protocols(cells: Path, tmp_path: Path) -> None:
    assert run(cells, "--out", tmp_path) == 0
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
    values = torch.stack([comparison.per_layer["SimAOU"].mean(1) for comparison in both])
    shifts = torch.stack([comparison.shifts("SimAOU")[0] for comparison in both])
    expected = widened(bootstrap(values), shifts)
    assert rows["llama (2)", "SimAOU"] == expected.format()
    assert f"{expected.low:.3f}, {expected.high:.3f}" in rows["llama (2)", "SimAOU"]
    paper = rows["GPT 1.3B (paper)", "SimAOU"], rows["GPT 2.7B (paper)", "lr"]
    assert paper == ("0.110", "0.007")
    text = (tmp_path / "metrics_reference.tex").read_text()
    assert text.count("\\midrule") == 4
    assert "Brackets are 95 \\% intervals" in text
    caption = (tmp_path / "accuracy_reference.md").read_text()
    assert "recorded after the first label word" in caption
    assert "a bootstrap over queries, seeds resampled, too. Fewer than 5" in caption
    assert "Intervals include the range over 3 replicas of the finetuning, at rates that differ by 10⁻³" in caption
    assert "the range over 3 replicas of the finetuning, at rates that differ by $10^{-3}$" in text
    assert "a bootstrap over queries; of Rec2FTP and its baseline, Wilson's." in (tmp_path / "metrics.md").read_text()


def made(seed: int, *, n: int = 40, task: str = "sst2", draw: int = 1, **change: object) -> icl.CellResult:
    """A finished cell with made-up numbers."""
    rng = np.random.default_rng(seed)
    gold, zsl, in_context, ft = torch.from_numpy(rng.integers(2, size=(4, n)))
    comparison = icl.Comparison(
        gold=gold,
        predictions={"ZSL": zsl, "ICL": in_context, "FT": ft},
        label_log_probs={},
        rec2ftp=rec2ftp(gold, zsl, in_context, ft),
        per_layer={name: torch.from_numpy(rng.uniform(size=(n, 3))) for name in layer_metrics()},
    )
    about = {"model": "sha256:0", "dtype": "float32", "queries": [f"{task} {i}" for i in range(n)]}
    cell = dataclasses.replace(CELL, task=task, seed=draw, n_queries=n)
    return icl.CellResult(cell, dataclasses.replace(comparison, **change), about, Path(f"made/{task}-{draw}"))


def printed(results: list[icl.CellResult], row: str) -> dict[Any, Any]:
    table = paper_tables.table(results, [row])
    return table[(table["model"] == "llama") & (table["metric"] == row)].iloc[0].to_dict()


def ends(text: str) -> list[float]:
    """The value and both ends of `1.0 [0.5, 1.5]`, whatever follows."""
    found = re.match(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]", text)
    assert found, text
    return [float(number) for number in found.groups()]


def normal_ends(values: np.ndarray, scale: float = 1) -> list[float]:
    """The interval that a bootstrap over queries comes to when there are many."""
    deviation = 1.96 * values.std() / math.sqrt(len(values))
    return [scale * (values.mean() + side * deviation) for side in (0, -1, 1)]


def test_a_cell_of_one_seed_has_an_interval_over_queries() -> None:
    result = made(0, n=400)
    right = (result.comparison.predictions["FT"] == result.comparison.gold).double().numpy()
    assert ends(printed([result], "FT accuracy")["SST2"]) == pytest.approx(normal_ends(right, 100), abs=0.5)
    values = result.comparison.per_layer["SimAOU"].mean(1).numpy()
    assert ends(printed([result], "SimAOU")["SST2"]) == pytest.approx(normal_ends(values), abs=0.005)


def test_layers_without_a_value_and_first_queries_only_are_no_hindrance() -> None:
    kendall = made(0).comparison.per_layer["Kendall"][:30].clone()
    kendall[0, 0], kendall[1] = torch.nan, torch.nan
    result = made(0)
    result.comparison.per_layer["Kendall"] = kendall
    by_query = [np.nanmean(kendall[query]) for query in range(30) if query != 1]
    assert ends(printed([result], "Kendall")["SST2"])[0] == pytest.approx(np.mean(by_query), abs=0.0006)
    result.comparison.per_layer["Kendall"] = kendall[:5]
    assert printed([result], "Kendall")["SST2"].endswith(" (4 queries: no interval)")
    result.comparison.per_layer["Kendall"] = kendall * torch.nan
    assert printed([result], "Kendall")["SST2"] == "undefined"


def test_seeds_are_resampled_too() -> None:
    """Of two seeds far apart, each is the interval's end, however little its queries vary."""
    low, high = made(0), made(1, draw=2)
    low.comparison.per_layer["SimAOU"] = torch.full((40, 3), 0.25)
    high.comparison.per_layer["SimAOU"] = torch.full((40, 3), 0.75)
    assert printed([low, high], "SimAOU")["SST2"] == "0.500 [0.250, 0.750]"


def test_a_mean_over_tasks_weighs_them_alike_and_is_narrower() -> None:
    results = [made(0, n=400), made(1, n=400, task="mr"), made(2, n=400, task="mr", draw=2)]
    row = printed(results, "ICL accuracy")
    (one, *_), (other, *_) = ends(row["SST2"]), ends(row["MR"])
    value, low, high = ends(row["mean"])
    assert value == pytest.approx((one + other) / 2, abs=0.1)
    half = [(ends(row[task])[2] - ends(row[task])[1]) / 2 for task in ("SST2", "MR")]
    assert (high - low) / 2 == pytest.approx(math.hypot(*half) / 2, rel=0.1)


def test_rec2ftp_has_wilsons_interval_with_each_query_once_for_all_seeds() -> None:
    results = [made(0), made(1, draw=2)]
    both, finetuned, distinct, dealt = 0, 0, set(), 0.0
    for result in results:
        found, gold = result.comparison.predictions, result.comparison.gold
        corrected = (found["FT"] == gold) & (found["ZSL"] != gold)
        finetuned += int(corrected.sum())
        both += int((corrected & (found["ICL"] == gold)).sum())
        distinct |= set(corrected.nonzero().flatten().tolist())
        dealt += sum((found["ICL"] == label).double().mean().item() for label in gold[corrected])
    assert len(distinct) < finetuned
    share, n, z = both / finetuned, len(distinct), stats.norm.ppf(0.975)
    centre, half = (share + z**2 / (2 * n)), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((centre + side) / (1 + z**2 / n) for side in (-half, half))
    row = printed(results, "Rec2FTP")
    value, low, high = (f"{100 * number:.1f}" for number in (share, low, high))
    assert row["SST2"] == f"{value} [{low}, {high}] ({both}/{finetuned})"
    assert row["mean"] == f"{value} [{low}, {high}]"
    value, low, high = ends(printed(results, "Rec2FTP random")["SST2"])
    assert value == pytest.approx(100 * dealt / finetuned, abs=0.051)
    assert low < value < high


def recalling(both: int, corrected: int, **change: Any) -> icl.CellResult:
    """A made-up cell in which finetuning corrects some queries, and ICL recalls some of these."""
    result = made(**change)
    gold = result.comparison.gold
    predictions = dict.fromkeys(("ZSL", "ICL", "FT"), 1 - gold)
    predictions["FT"] = torch.cat((gold[:corrected], 1 - gold[corrected:]))
    predictions["ICL"] = torch.cat((gold[:both], 1 - gold[both:]))
    changed = {"predictions": predictions, "rec2ftp": rec2ftp(gold, *predictions.values())}
    return dataclasses.replace(result, comparison=dataclasses.replace(result.comparison, **changed))


def test_few_queries_have_no_interval_and_leave_the_mean_without() -> None:
    few, many = recalling(1, 3, seed=0), recalling(9, 18, seed=1, task="mr")
    row = printed([few, many], "Rec2FTP")
    assert row["SST2"] == "33.3 (1/3: no interval)"
    assert row["MR"] == "50.0 [29.0, 71.0] (9/18)"
    assert row["mean"] == "41.7 (3 queries: no interval)"
    none = recalling(0, 0, seed=2, task="subj")
    row = printed([few, many, none], "Rec2FTP")
    assert (row["Subj"], row["mean"]) == ("undefined (0/0)", "undefined")
    assert printed([none], "Rec2FTP random")["Subj"] == "undefined"
    # A seed in which finetuning corrects nothing adds nothing.
    nothing = recalling(0, 0, seed=3, task="mr", draw=2)
    assert printed([many, nothing], "Rec2FTP")["MR"] == "50.0 [29.0, 71.0] (9/18)"


def test_seeds_that_asked_other_queries_are_refused() -> None:
    fewer = made(1, draw=2, n=39)
    results = [made(0), dataclasses.replace(fewer, cell=dataclasses.replace(fewer.cell, n_queries=40))]
    with pytest.raises(icl.StudyError, match="expected the same queries for every seed, got others in made/sst2-1, "):
        paper_tables.table(results, ["SimAOU"])
    others = made(1, draw=2)
    others.provenance["queries"][0] = "another"
    with pytest.raises(icl.StudyError, match="expected the same queries for every seed"):
        paper_tables.table([made(0), others], ["ICL accuracy"])


def test_a_table_of_two_protocols_is_refused(cells: Path) -> None:
    with pytest.raises(icl.StudyError, match=r"of one protocol in a table, got \['answer', 'reference'\]"):
        paper_tables.table(paper_tables.find_cells([cells]), paper_tables.METRIC_ROWS)


def test_cells_of_other_set_ups_share_no_row_and_say_what_differs(
    cells: Path, llama: icl.Model, tmp_path: Path
) -> None:
    label = dataclasses.replace(CELL, task="agnews", finetuning=icl.FinetuneConfig(loss="label"), replicas=0)
    task = icl.Task("agnews", "Text: {text} Label:", ("no", "perhaps"), make_rows(), protocol="reference")
    found = [icl.load_cell(cells / CELL.name), icl.run_cell(llama, task, label, tmp_path / "x", progress=False)]
    one, other = paper_tables.groups(found)
    assert (one.model, set(one.by_task)) == ("llama, variant none", {"sst2"})
    assert (other.model, set(other.by_task)) == ("llama, variant label loss", {"agnews"})


def test_exported_recordings_beside_cells_are_no_cells(cells: Path, tmp_path: Path) -> None:
    icl.export_recordings(icl.load_cell(cells / CELL.name), tmp_path / "study" / "exported", progress=False)
    (tmp_path / "study" / "cell").symlink_to(cells / CELL.name)
    assert len(paper_tables.find_cells([tmp_path / "study" / "exported", tmp_path / "study" / "cell"])) == 1


def test_folders_of_killed_processes_are_no_cells_and_what_they_set_aside_comes_back(
    cells: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "cells" / f"{SCRATCH}{_host()}-1-killed"
    for part in ("new", "old"):
        shutil.copytree(cells / CELL.name, scratch / part / CELL.name)
    (result,) = paper_tables.find_cells([tmp_path])
    assert result.folder == tmp_path / "cells" / CELL.name


def test_hidden_cells_of_version_02_are_cells_and_its_scratch_folders_are_not(cells: Path, tmp_path: Path) -> None:
    hidden = tmp_path / ".--llama_sst2_k4_seed1_lr0.1_answer"
    for folder in (hidden, tmp_path / ".cell-k3_x91ab", tmp_path / ".cell-k3_x91ab-old"):
        shutil.copytree(cells / CELL.name, folder)
    assert [result.folder for result in paper_tables.find_cells([tmp_path])] == [hidden]


def test_a_cell_found_twice_is_no_second_seed(cells: Path) -> None:
    (cells / "again").symlink_to(cells / CELL.name)
    with pytest.raises(icl.StudyError, match="expected each cell once, got the same in"):
        paper_tables.find_cells([cells, cells / "again"])


def test_recordings_give_the_released_scripts_numbers_under_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released.write_random(tmp_path / "found", **RECORDED)
    assert run("--recordings", tmp_path / "found", "--json", tmp_path / "scores.json") == 0
    got = json.loads((tmp_path / "scores.json").read_text())
    for name, values in released.scores(tmp_path / "found").items():
        expected = None if isinstance(values, float) and math.isnan(values) else pytest.approx(values, abs=1e-9)
        assert got[name] == expected, name
    assert got["skipped"] == 0
    assert "token-level kendall" in capsys.readouterr().out


def test_a_kept_cell_is_read_as_recordings_too(cells: Path, tmp_path: Path) -> None:
    assert run("--recordings", cells / CELL.name / "recordings", "--json", tmp_path / "scores.json") == 0
    expected = icl.load_cell(cells / CELL.name).comparison.released()
    got = json.loads((tmp_path / "scores.json").read_text())
    assert got["SimAOU"] == pytest.approx(expected["SimAOU"])
    assert got["token-level random_kendall"] == pytest.approx(expected["token-level random_kendall"])
    undefined = [name for name, value in expected.items() if isinstance(value, list) and math.isnan(value[0])]
    assert "example-level recall_topk" in undefined, "three demonstrations have no top five"
    assert all(got[name] == [None] * 3 for name in undefined)


def test_bad_records_are_an_error_in_a_line_or_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released.write_random(tmp_path / "found", **RECORDED)
    path = tmp_path / "found" / "icl" / "record_info.jsonl"
    path.write_text(path.read_text()[:-30])
    assert run("--recordings", tmp_path / "found") == 1
    assert f"error: {path}, line 5: expected a complete JSON object" in capsys.readouterr().err
    assert run("--recordings", tmp_path / "found", "--skip-bad", "--json", tmp_path / "scores.json") == 0
    assert json.loads((tmp_path / "scores.json").read_text())["skipped"] == 1
    assert f"skipped: {path}, line 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "expected either folders of cells, or --recordings FOLDER"),
        (("somewhere", "--json", "x.json"), 2, "--json takes the metrics of --recordings"),
        (("--recordings", "x", "--kendall-queries", "0"), 2, "expected a whole number of at least 1, or all, got '0'"),
        (("nowhere",), 1, "error: expected finished cells in nowhere, found none"),
        (
            ("--recordings", "nowhere"),
            1,
            "error: expected a folder of recordings, got nowhere, which does not exist: pass",
        ),
    ],
)
def test_what_a_user_can_mend_is_said(
    arguments: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    assert message in capsys.readouterr().err
