from dataclasses import replace
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import control_tables
import grid_controls
import numpy as np
import pandas as pd
import pytest
from grid_cells import CopiedCells, corrupt, grid_of

import icl_dual as icl
from icl_dual import grids
from icl_dual.grids import GridError, Results, Worker, collect, collection, to_xarray
from icl_dual.grids.results import FRAME, file_path
from icl_dual.scripts.paper_tables import find_cells

GRID = grid_of()


@pytest.fixture
def finished(local_results: Results, copied: type[CopiedCells]) -> Results:
    """A grid that is finished in a local folder."""
    worker = Worker(GRID, local_results)
    assert {worker.run(cell.id).state for cell in GRID.cells()} == {"done"}
    return local_results


@pytest.fixture
def finished_anywhere(finished: Results, results: Results) -> Results:
    """The finished grid, in a local folder and on a real S3 server."""
    if results.files.local is None:
        for path in finished.files.find(""):
            results.files.write(path, finished.files.read(path))
    return results


def test_the_table_has_the_rows_of_every_cell(
    finished: Results, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "_AT_ONCE", 3)
    table = collect(finished, tmp_path / "table.parquet", GRID)
    frames = [icl.load_cell(path).to_frame() for path in sorted(study.iterdir())]
    frame = table.to_frame()
    expected = pd.concat(frames, ignore_index=True)
    pd.testing.assert_frame_equal(
        frame.drop(columns=["id", "precision", "control", "versions"]), expected, check_dtype=False
    )
    assert list(frame["id"].unique()) == finished.finished()
    assert set(frame["precision"]) == {"float32"}
    controls = frame.groupby("id")["control"].first().to_dict()
    assert controls == {cell.id: cell.control for cell in GRID.cells()}
    assert (table.n_cells, table.n_rows, table.damaged) == (4, len(expected), {})
    (versions,) = frame["versions"].unique()
    assert f"torch {version('torch')}, transformers {version('transformers')}" in versions
    assert table.versions == {versions: 4}


def test_damaged_cells_are_left_out_and_named(finished_anywhere: Results, tmp_path: Path) -> None:
    finished = finished_anywhere
    first, second = finished.finished()[:2]
    corrupt(finished, file_path(finished.manifest(first), FRAME))
    finished.files.write(f"cells/{second}/manifest.json", b"{")
    table = collect(finished, tmp_path / "table.parquet")
    assert set(table.damaged) == {first, second}
    assert table.n_cells == 2
    assert set(table.to_frame()["id"]) == set(finished.finished()) - {first, second}


def test_cells_with_other_columns_are_refused(
    finished: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = finished.finished()[-1]
    tables = collection._tables

    def with_another(*args: Any) -> Any:
        return [(of, table.drop(["spread"]) if of.id == last else table) for of, table in tables(*args)]

    monkeypatch.setattr(collection, "_tables", with_another)
    for at_once in (1, 100):
        monkeypatch.setattr(collection, "_AT_ONCE", at_once)
        with pytest.raises(icl.AssetError, match=rf"got {last} with .*, of another version"):
            collect(finished, tmp_path / "table.parquet")
    assert not (tmp_path / "table.parquet").exists()


def test_tables_of_the_paper_read_a_grid_wherever_it_is(
    finished_anywhere: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = finished_anywhere
    place = finished.files.url
    if finished.files.local is None:
        monkeypatch.setattr(
            grids.Results, "__init__", partialmethod(grids.Results.__init__, options=finished.files.options)
        )
    cells = [result.cell for result in find_cells([place])]
    assert sorted(cell.name for cell in cells) == finished.finished()
    corrupt(finished, file_path(finished.manifest(finished.finished()[0]), FRAME))
    with pytest.raises(icl.AssetError, match="with the bytes that were saved"):
        find_cells([place])


@pytest.mark.parametrize("results", ["s3"], indirect=True)
def test_the_controls_tables_read_a_grid_on_any_storage(
    finished_anywhere: Results, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, options = finished_anywhere.files.url, finished_anywhere.files.options
    monkeypatch.setattr(grids.Results, "__init__", partialmethod(grids.Results.__init__, options=options))
    assert grid_controls.main([place, "--where", "k=2", "lr=1e-2", "--out", str(tmp_path / "tables")]) == 0
    table = pd.read_csv(tmp_path / "tables" / "controls.csv").query("metric == 'SimAOU' and task == 'films'")
    values = dict(zip(table["what is compared"], table["value"], strict=True))
    for row, control in {"ICL and FT": "plain", "ICL on flipped labels": "flipped"}.items():
        folders = [study / cell.id for cell in GRID.cells() if cell.control == control]
        of_cells = [icl.load_cell(folder).comparison.per_layer["SimAOU"].mean().item() for folder in folders]
        assert values[row] == pytest.approx(np.mean(of_cells), rel=1e-4)
    assert set(table["kind"]) == {"claim", "nulls", "contexts"}
    page = (tmp_path / "tables" / "controls.md").read_text()
    assert "It was not compared with models that have learned nothing" in page
    assert "survives" not in page  # without all kinds of controls, no claim does
    assert (tmp_path / "tables" / "controls.png").stat().st_size > 10_000


def test_cells_that_are_no_study_of_controls_are_refused_in_a_sentence(finished: Results) -> None:
    def refused(message: str, results: list[icl.CellResult]) -> None:
        with pytest.raises(icl.StudyError, match=message):
            control_tables.runs_of(results)

    plain, flipped, *others = find_cells([finished.files.url])
    refused("expected plain cells, which controls are compared with, got none", [flipped])
    refused(r"'ICL on flipped labels' with the tasks and seeds of the plain cells, \{'films': \[1, 2\]\}, got .*\[2\]",
            [plain, *others])  # fmt: skip
    for name, value, text in (("k", 3, "2 and 3"), ("lr", 0.1, "0.01 and 0.1"), ("model", "gpt2", "gpt2 and tiny")):
        other = replace(plain, cell=replace(plain.cell, **{name: value, "seed": 3}))
        refused(rf"expected cells of one set-up, got {name} {text}: choose with --where {name}=", [plain, other])
    with pytest.raises(icl.StudyError, match=r"expected cells with k=4, got 2: choose one of these"):
        grid_controls.chosen([plain], [("k", "4")])
    both = {"context": "flipped labels", "delta": "random"}
    runs = control_tables.runs_of([plain, replace(plain, cell=replace(plain.cell, **both))])
    assert list(runs) == ["ICL and FT", "flipped labels and random delta"]  # no row of the study: by what it varies


def test_a_table_replaces_a_table_and_no_other_file(finished: Results, tmp_path: Path) -> None:
    table, other = tmp_path / "table.parquet", tmp_path / "grid.toml"
    assert collect(finished, table).n_cells == collect(finished, table).n_cells
    other.write_text("models = []")
    with pytest.raises(GridError, match=r"expected the path of a new file .* choose another path"):
        collect(finished, other)
    assert other.read_text() == "models = []"


def test_nothing_finished_is_an_error(results: Results, tmp_path: Path) -> None:
    with pytest.raises(GridError, match=r"expected finished cells in .*, got none"):
        collect(results, tmp_path / "table.parquet")
    assert not (tmp_path / "table.parquet").exists()


def test_the_data_set_has_each_number_at_its_axes(finished: Results, tmp_path: Path) -> None:
    frame = collect(finished, tmp_path / "table.parquet").to_frame()
    data = to_xarray(frame)
    assert data.sizes["seed"] == 2
    assert dict(zip(data["control"].values, data["variation"].values, strict=True)) == {
        "plain": "", "flipped labels": "flipped labels",
    }  # fmt: skip
    axes = ["model", "task", "k", "seed", "lr", "protocol", "precision", "control", "metric"]
    for row in frame.sample(60, random_state=0).to_dict("records"):
        at = {axis: row[axis] for axis in axes}
        is_overall = pd.isna(row["layer"])
        values = data["value"] if is_overall else data["value_by_layer"].sel(layer=row["layer"])
        np.testing.assert_equal(values.sel(at).item(), row["value"])
    with pytest.raises(ValueError, match="got two that do not"):
        to_xarray(pd.concat([frame, frame]))
