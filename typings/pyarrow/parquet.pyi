"""The part of `pyarrow.parquet` that the library uses; the package itself comes without types."""

from os import PathLike
from typing import BinaryIO

from pyarrow import Schema, Table

class ParquetWriter:
    schema: Schema
    def __init__(self, where: str | PathLike[str], schema: Schema, *, compression: str = "snappy") -> None: ...
    def write_table(self, table: Table) -> None: ...
    def close(self) -> None: ...

def read_table(source: str | PathLike[str] | BinaryIO) -> Table: ...
