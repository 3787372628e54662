"""All finished cells as one tidy table in a parquet file, and as an xarray data set."""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from icl_dual.arguments import Index, checked
from icl_dual.field_docs import document_fields
from icl_dual.grids.grid import PLAIN, Grid, GridError
from icl_dual.grids.results import FRAME, Manifest, Results, VersionError, file_path
from icl_dual.storage import AssetError, atomic_file

AXES = ("model", "task", "k", "seed", "lr", "protocol", "precision", "control", "metric")
"""The columns that tell a number of all layers together from the others; those of layers have `layer` as well."""

VALUES = ("value", "low", "high", "spread", "n")
"""The columns of numbers: a mean, its 95 % interval, its range over replicas, and the number of queries."""

_AT_ONCE = 100
"""The number of cells that are in memory at a time: some 100,000 rows."""


@checked
@document_fields
@dataclass(frozen=True)
class Collection:
    """The table of all finished cells, in a parquet file."""

    path: Path
    """The file."""
    n_cells: Index
    """The number of cells in it."""
    n_rows: Index
    """The number of rows: one for each cell, metric and layer, and one for all layers together."""
    damaged: dict[str, str]
    """The cells that are left out, since their files are damaged, with the error of each."""
    versions: dict[str, int]
    """The versions of packages that the cells were made with, in words, and the number of cells of each."""

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        return pd.read_parquet(self.path)

    def to_xarray(self) -> Any:
        """Return the table as an xarray data set, as the function `to_xarray` does."""
        return to_xarray(self.to_frame())


@checked
def collect(results: Results, path: str | PathLike[str], grid: Grid | None = None) -> Collection:
    """Write the rows of all finished cells into one parquet file, which appears complete or not at all.

    The columns are those of `CellResult.to_frame`, after the cell's id, with its precision, the name of its control
    (the grid's name for it, or without a grid what the cell varies, or `plain`) and, last, the `versions` of packages
    that it was made with. Each cell's rows were saved when it was finished; their checksum is compared. Memory does not
    grow with the number of cells.

    Args:
        results: the results.
        path: the file to write.
        grid: the grid of which to take the cells; by default all that are there.

    Raises:
        GridError: no cell is finished, or the file exists and is no parquet file.
        SettingsError: a finished cell has other settings than the grid's cell of its id.
        AssetError: the results are of another version, or the file cannot be written.
    """
    _check_replaceable(Path(path))
    path, cell_ids, n_cells, n_rows = Path(path), results.finished(), 0, 0
    controls: dict[str, str] = {}
    versions: Counter[str] = Counter()
    if grid is not None:
        results.check_settings(grid.cells())
        controls = {cell.id: cell.control for cell in grid.cells()}
        cell_ids = [cell_id for cell_id in cell_ids if cell_id in controls]
    if not cell_ids:
        raise GridError(f"expected finished cells in {results.files.url}, got none: run the grid first")
    damaged: dict[str, str] = {}
    with atomic_file(path) as scratch:
        writer: pq.ParquetWriter | None = None
        try:
            for start in range(0, len(cell_ids), _AT_ONCE):
                tables: list[pa.Table] = []
                for manifest, table in _tables(results, cell_ids[start : start + _AT_ONCE], damaged):
                    versions[manifest.made_with] += 1
                    tables.append(_with_origin(table, controls.get(manifest.id), manifest.made_with))
                if not tables:
                    continue
                for table in tables:
                    _check_columns(table, tables[0] if writer is None else writer)
                table = pa.concat_tables(tables, promote_options="permissive")
                writer = writer or pq.ParquetWriter(scratch, table.schema, compression="zstd")
                writer.write_table(table.select(writer.schema.names).cast(writer.schema))
                n_cells, n_rows = n_cells + len(tables), n_rows + table.num_rows
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise AssetError(f"expected a cell that is not damaged, got none: {next(iter(damaged.values()))}")
    return Collection(path, n_cells, n_rows, damaged, dict(versions))


def _with_origin(table: pa.Table, control: str | None, versions: str) -> pa.Table:
    """Return a cell's rows with the name of its control after what it varies, and its versions."""
    at = table.schema.get_field_index("variation")
    name = control or table.column(at)[0].as_py() or PLAIN
    table = table.add_column(at + 1, "control", pa.repeat(name, table.num_rows))
    return table.append_column("versions", pa.repeat(versions, table.num_rows))


def _check_columns(table: pa.Table, first: pa.Table | pq.ParquetWriter) -> None:
    if set(table.schema.names) != set(first.schema.names):
        raise VersionError(
            f"expected cells with the columns {', '.join(first.schema.names)}, got {table['id'][0].as_py()} with "
            f"{', '.join(table.schema.names)}, of another version: run the grid into other results"
        )


def _check_replaceable(path: Path) -> None:
    """Refuse to replace a file that is no table: a grid's, or one of the user's."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if (beginning := file.read(4)) not in (b"", b"PAR1"):
            raise GridError(
                f"expected the path of a new file or of a parquet file to replace, got {path}, which begins with "
                f"{beginning!r}: choose another path"
            )


def _tables(results: Results, cell_ids: list[str], damaged: dict[str, str]) -> list[tuple[Manifest, pa.Table]]:
    """Return the manifests and rows of cells; of those that are damaged, the error goes into `damaged`."""
    errors: dict[str, AssetError] = {}
    manifests = results.manifests(cell_ids, errors)
    if (of_other_version := next((e for e in errors.values() if isinstance(e, VersionError)), None)) is not None:
        raise of_other_version
    paths = {file_path(manifest, FRAME): manifest for manifest in manifests.values()}
    tables: list[tuple[Manifest, pa.Table]] = []
    for path, content in results.files.read_many(list(paths)).items():
        manifest = paths[path]
        try:
            rows = results.checked_file(manifest, FRAME, content)
        except AssetError as error:
            errors[manifest.id] = error
        else:
            tables.append((manifest, pq.read_table(io.BytesIO(rows))))
    damaged |= {cell_id: str(error) for cell_id, error in errors.items()}
    return tables


@checked
def to_xarray(frame: pd.DataFrame) -> Any:
    """Return the table of cells as an `xarray.Dataset`: numbers of all layers together, and the means by layer.

    The package is optional: `pip install 'icl-dual[grid]'`.

    Args:
        frame: what `Collection.to_frame` returns, or a part of it.

    Returns:
        The variables `value`, `low`, `high`, `spread` and `n` with the axes model, task, k, seed, lr, protocol,
        precision, control and metric, and `value_by_layer`, `spread_by_layer` and `n_by_layer` with the axis layer,
        too. What was not computed is NaN. Where each control is one variation, `variation` is a coordinate of it.

    Raises:
        ValueError: two cells have the same values of all axes: choose one finetuning, or one number of queries.
        ImportError: xarray is not installed.
    """
    import xarray

    overall, by_layer = frame.query("layer.isna()"), frame.query("layer.notna()")
    parts = [_dataset(overall, AXES, dict(zip(VALUES, VALUES, strict=True)))]
    if len(by_layer):
        names = {name: f"{name}_by_layer" for name in VALUES if name not in ("low", "high")}
        parts.append(_dataset(by_layer.astype({"layer": "int64"}), (*AXES, "layer"), names))
    data = xarray.merge(parts, join="outer")  # pyright: ignore[reportUnknownMemberType]
    variations = frame.groupby("control")["variation"].unique()
    if variations.map(len).max() == 1:
        of_control = [variations[name][0] for name in data["control"].to_numpy()]
        data = data.assign_coords(variation=("control", of_control))
    return data


def _dataset(frame: pd.DataFrame, axes: Iterable[str], names: dict[str, str]) -> Any:
    axes = list(axes)
    if frame.duplicated(axes).any():
        first = frame.loc[frame.duplicated(axes), "id"].iloc[0]
        raise ValueError(
            f"expected cells that differ in {', '.join(axes[:-1])}, got two that do not ({first} is one): pass a part "
            "of the table"
        )
    numbers: Any = frame.set_index(axes)[list(names)]
    return numbers.astype("float64").rename(columns=names).to_xarray()
