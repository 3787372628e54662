from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from grid_cells import CopiedCells, corrupt, grid_of

import icl_dual as icl
from icl_dual.grids import GridError, Results, Worker, collect, collection, to_xarray
from icl_dual.grids.results import FRAME, file_path

GRID = grid_of()


@pytest.fixture
def finished(results: Results, copied: type[CopiedCells]) -> Results:
    worker = Worker(GRID, results)
    for cell in GRID.cells():
        assert worker.run(cell.id).state == "done"
    return results


def test_the_table_has_the_rows_of_every_cell(
    finished: Results, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "_AT_ONCE", 3)
    table = collect(finished, tmp_path / "table.parquet", GRID)
    frames = [icl.load_cell(path).to_frame() for path in sorted(study.iterdir())]
    frame = table.to_frame()
    expected = pd.concat(frames, ignore_index=True)
    pd.testing.assert_frame_equal(frame.drop(columns=["id", "precision"]), expected, check_dtype=False)
    assert list(frame["id"].unique()) == finished.finished()
    assert set(frame["precision"]) == {"float32"}
    assert (table.n_cells, table.n_rows, table.damaged) == (4, len(expected), {})


def test_damaged_cells_are_left_out_and_named(finished: Results, tmp_path: Path) -> None:
    first, second = finished.finished()[:2]
    corrupt(finished, file_path(finished.manifest(first), FRAME))
    finished.files.write(f"cells/{second}/manifest.json", b"{")
    table = collect(finished, tmp_path / "table.parquet")
    assert set(table.damaged) == {first, second}
    assert table.n_cells == 2
    assert set(table.to_frame()["id"]) == set(finished.finished()) - {first, second}


def test_nothing_finished_is_an_error(results: Results, tmp_path: Path) -> None:
    with pytest.raises(GridError, match=r"expected finished cells in .*, got none"):
        collect(results, tmp_path / "table.parquet")
    assert not (tmp_path / "table.parquet").exists()


def test_the_data_set_has_each_number_at_its_axes(finished: Results, tmp_path: Path) -> None:
    frame = collect(finished, tmp_path / "table.parquet").to_frame()
    data = to_xarray(frame)
    assert data.sizes["seed"] == 2
    axes = ["model", "task", "k", "seed", "lr", "protocol", "precision", "variation", "metric"]
    for row in frame.sample(60, random_state=0).to_dict("records"):
        at = {axis: row[axis] for axis in axes}
        is_overall = pd.isna(row["layer"])
        values = data["value"] if is_overall else data["value_by_layer"].sel(layer=row["layer"])
        np.testing.assert_equal(values.sel(at).item(), row["value"])
    with pytest.raises(ValueError, match="got two that do not"):
        to_xarray(pd.concat([frame, frame]))
