"""The README's figure: its scores are those of the table, and tasks are told apart without colour."""

from pathlib import Path

import claim
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "figures" / "controls" / "controls.csv"


def test_every_score_is_the_tables_with_its_interval() -> None:
    table = pd.read_csv(TABLE).query("metric == 'SimAOU'").set_index(["what is compared", "task"])
    ax = claim.draw(claim.read(TABLE), plt.figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == list(claim.ROWS.values())
    for task, title in (("sst2", "SST2"), ("mr", "MR"), ("subj", "Subj")):
        (line,) = [line for line in ax.get_lines() if line.get_label() == title]
        expected = [table.loc[(name, task), "value"] for name in claim.ROWS]
        np.testing.assert_array_equal(np.asarray(line.get_xdata()), expected)
    ends = {tuple(np.asarray(path.vertices)[:, 0]) for lines in ax.collections for path in lines.get_paths()}
    rows = table.reset_index().query("task != 'mean'").to_dict("records")
    assert ends == {(row["low"], row["high"]) for row in rows if row["what is compared"] in claim.ROWS}
    plt.close("all")


def test_tasks_have_different_markers() -> None:
    ax = claim.draw(claim.read(TABLE), plt.figure().subplots())
    lines = [line for line in ax.get_lines() if line.get_label() in ("SST2", "MR", "Subj")]
    assert len({str(line.get_marker()) for line in lines}) == len(lines) == 3
    plt.close("all")


def test_the_script_writes_a_column_wide_figure(tmp_path: Path) -> None:
    assert claim.main(["--controls", str(TABLE), "--out", str(tmp_path / "figures" / "claim")]) == 0
    height, width, _ = plt.imread(tmp_path / "figures" / "claim.png").shape
    assert width == round(88 / 25.4 * 300 - 0.5)
    assert height < width
    assert (tmp_path / "figures" / "claim.pdf").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "error: expected a table in {path}, got [Errno 2] No such file"),
        ("", "error: expected a table in {path}, got No columns to parse from file: check the path"),
        ("metric,task\n", "error: expected a column 'what is compared' in {path}, got none: write it with"),
    ],
)
def test_what_is_no_table_of_controls_is_an_error_in_a_line(
    table: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "controls.csv"
    if table is not None:
        path.write_text(table)
    assert claim.main(["--controls", str(path), "--out", str(tmp_path / "claim")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message.format(path=path))
    assert not list(tmp_path.glob("claim*"))


def test_a_name_with_dots_stays_whole(tmp_path: Path) -> None:
    assert claim.main(["--controls", str(TABLE), "--out", str(tmp_path / "claim.v2")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"claim.v2.png", "claim.v2.pdf"}


def test_a_table_without_a_control_is_an_error_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pd.read_csv(TABLE)
    rows[rows["what is compared"] != "untrained model"].to_csv(tmp_path / "controls.csv")
    assert claim.main(["--controls", str(tmp_path / "controls.csv"), "--out", str(tmp_path / "claim")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: expected SimAOU of 'untrained model'")
    assert not (tmp_path / "claim.png").exists()
