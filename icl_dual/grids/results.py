"""The results of a grid on any fsspec path: a folder a cell, with a manifest of the checksums of its files.

    cells/<id>/manifest.json       the cell's settings and the SHA-256 of each of its files; the cell exists with it
    cells/<id>/…                   what `run_cell` saves, and `frame.parquet`, its rows of the table of all cells
    failures/<id>.json             the traceback of a cell that failed
    claims/<id>.<number>.json      the worker that computes a cell now
    origins/<name>.json            the weights and rows that all cells of a model or task must have

Locally a cell's folder appears complete or not at all. On object stores its files are written under a name of their
own, and then the manifest, if there is none yet: of two workers the first one's cell stays, and files never mix.
"""

import hashlib
import io
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from icl_dual.arguments import checked
from icl_dual.cells import RECORDINGS, Cell, CellResult, load_cell
from icl_dual.field_docs import document_fields
from icl_dual.grids.claims import FOLDER, ClaimInfo, claimed, delete_claims
from icl_dual.grids.files import Files, check_inside
from icl_dual.grids.grid import GridCell
from icl_dual.provenance import PACKAGES
from icl_dual.storage import (
    METADATA,
    AssetError,
    SettingsError,
    atomic_folder,
    check_same_settings,
    finished_folders,
    first_line,
    from_json,
    to_json,
    writing,
)

MANIFEST, FRAME = "manifest.json", "frame.parquet"
"""The files in a cell's folder beside those of `run_cell`."""

ATTEMPT = "attempt-"
"""How the names of the folders begin in which workers write a cell's files on object stores."""

FORMAT = 1
"""The version of the manifest's layout."""


class DamagedError(AssetError):
    """Files of a finished cell are missing, or are not those that were saved: the cell must be made again."""


class VersionError(AssetError):
    """Results have the layout of another version."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a finished cell without its numbers."""

    id: str
    """The cell's id."""
    settings: Mapping[str, Any]
    """The settings of the `Cell`, as JSON values."""
    precision: str
    """The precision."""
    files: Mapping[str, str]
    """The SHA-256 of each file, by its path in `folder`."""
    folder: str
    """The folder of the files within the cell's: empty, or of one attempt on an object store."""
    seconds: float
    """The seconds that the cell took, loading a model included."""
    peak_memory: int
    """The most memory that the worker's process had used by then, in bytes; 0 where it is not known."""
    worker: str
    """The machine and process that computed the cell."""
    versions: Mapping[str, str]
    """The versions of the packages."""
    format: int = FORMAT
    """The version of this layout."""

    @classmethod
    def read(cls, cell_id: str, content: bytes | Exception, where: str) -> "Manifest":
        """Return the manifest in the bytes of a file.

        Raises:
            DamagedError: it is missing or damaged.
            VersionError: it is of another version.
            AssetError: it cannot be read now.
        """
        if isinstance(content, Exception):
            is_missing = isinstance(content, FileNotFoundError)
            advice = "run the grid to have the cell made" if is_missing else "check the storage"
            raise (DamagedError if is_missing else AssetError)(
                f"expected the manifest of a cell in {where}, got {first_line(content)}: {advice}"
            ) from content
        try:
            values = json.loads(content)
            if values["format"] != FORMAT:
                raise VersionError(
                    f"expected a manifest of format {FORMAT} in {where}, got format {values['format']!r} of icl-dual "
                    f"{values.get('versions', {}).get('icl-dual')}: install that version, or choose other results"
                )
            manifest = from_json(cls, values, where)
            if manifest.id != cell_id or not manifest.files:
                raise ValueError(f"that of {manifest.id!r}")
            for name in manifest.files:
                check_inside(file_path(manifest, name))
        except VersionError:
            raise
        except (AssetError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError(
                f"expected the manifest of a cell in {where}, got {first_line(error)}: run `rerun --failed` to have "
                "the cell made again"
            ) from error
        return manifest

    @property
    def cell(self) -> Cell:
        """Return the settings."""
        return Cell.from_settings(self.settings)

    @property
    def made_with(self) -> str:
        """Return the versions of the packages that decide numbers, in words."""
        return ", ".join(f"{name} {self.versions[name]}" for name in PACKAGES if name in self.versions)


def installed_versions() -> dict[str, str]:
    """Return the versions, as installed here, of the packages that decide a cell's numbers."""
    return {name: version(name) for name in PACKAGES}


@checked
@document_fields
@dataclass(frozen=True)
class Failure:
    """A cell that failed."""

    id: str
    """The cell's id."""
    error: str
    """The error in a sentence."""
    traceback: str
    """The whole traceback."""
    worker: str
    """The machine and process in which it failed."""


@checked
@document_fields
@dataclass(frozen=True)
class Status:
    """How far a grid is."""

    done: tuple[str, ...]
    """The ids of the finished cells."""
    running: tuple[str, ...]
    """The ids of the cells that a worker computes, or computed when it was lost."""
    failed: tuple[str, ...]
    """The ids of the cells that failed."""
    remaining: tuple[str, ...]
    """The ids of all others."""

    def __str__(self) -> str:
        counts = {name: len(getattr(self, name)) for name in ("done", "running", "failed", "remaining")}
        return ", ".join(f"{count} {name}" for name, count in counts.items())


class Results:
    """The results of a grid in a folder or under any address that fsspec opens. It can be pickled.

    Args:
        url: a path, or an address such as `s3://bucket/prefix`.
        options: the options of fsspec for the storage, such as `endpoint_url` for `s3://`.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Results(folder).finished()
        []
    """

    @checked
    def __init__(self, url: str | Path, options: Mapping[str, Any] | None = None) -> None:
        self.files = Files(str(url), options)

    def __repr__(self) -> str:
        return f"Results({self.files.url!r})"

    def finished(self) -> list[str]:
        """Return the ids of all finished cells."""
        if (root := self.files.local) is not None:
            return [path.name for path in finished_folders(root / "cells") if (path / MANIFEST).exists()]
        manifests = (path.split("/") for path in self.files.find("cells"))
        return sorted(parts[0] for parts in manifests if parts[1:] == [MANIFEST])

    @checked
    def has(self, cell_id: str) -> bool:
        """Return whether a cell is finished."""
        return self.files.exists(f"cells/{cell_id}/{MANIFEST}")

    @checked
    def manifest(self, cell_id: str) -> Manifest:
        """Return the manifest of a finished cell.

        Raises:
            AssetError: it is missing, damaged or of another version.
        """
        return self.manifests([cell_id])[cell_id]

    def manifests(self, cell_ids: Iterable[str], errors: dict[str, AssetError] | None = None) -> dict[str, Manifest]:
        """Return the manifests of cells; those that cannot be read go into `errors`, if it is given."""
        paths = {f"cells/{cell_id}/{MANIFEST}": cell_id for cell_id in cell_ids}
        manifests: dict[str, Manifest] = {}
        for path, content in self.files.read_many(list(paths)).items():
            try:
                manifests[paths[path]] = Manifest.read(paths[path], content, f"{self.files.url}/{path}")
            except AssetError as error:
                if errors is None:
                    raise
                errors[paths[path]] = error
        return manifests

    @checked
    def status(self, cells: Iterable[GridCell]) -> Status:
        """Return how far cells are, from the names in the storage alone."""
        ids = [cell.id for cell in cells]
        done = set(self.finished())
        failed = set(self.failed_ids()) - done
        claimed_ids = {cell_id for cell_id, info in self.claims().items() if info.device_error is None}
        running = claimed_ids - done - failed
        over = done | failed | running
        groups = (done, running, failed, set(ids) - over)
        return Status(*(tuple(name for name in ids if name in group) for group in groups))

    @checked
    def versions(self, cell_ids: Iterable[str]) -> dict[str, int]:
        """Return the versions that finished cells were made with, in words, and how many cells each; reads manifests.

        Manifests that cannot be read are left out.
        """
        return dict(Counter(manifest.made_with for manifest in self.manifests(cell_ids, {}).values()))

    def claims(self) -> dict[str, ClaimInfo]:
        """Return the claims of workers, by cell."""
        return claimed(self.files)

    def check_settings(self, cells: Iterable[GridCell], *, recordings: bool = False) -> dict[str, Manifest]:
        """Check that finished cells were made with the settings that cells of their ids have now.

        Args:
            cells: the cells.
            recordings: whether finished cells must have recordings.

        Returns:
            The manifests of the finished cells, without damaged ones.

        Raises:
            SettingsError: one has other settings, or no recordings; the message names them.
            AssetError: the results are of another version, or cannot be read.
        """
        by_id, finished = {cell.id: cell for cell in cells}, set(self.finished())
        damaged: dict[str, AssetError] = {}
        manifests = self.manifests([name for name in by_id if name in finished], damaged)
        for cell_id, manifest in manifests.items():
            self.check_same(by_id[cell_id], manifest)
            if recordings and f"{RECORDINGS}/{METADATA}" not in manifest.files:
                raise SettingsError(
                    f"expected finished cells with recordings, got {cell_id} without, in {self.files.url}: set "
                    "keep_recordings=False, or choose other results"
                )
        for error in damaged.values():
            if not isinstance(error, DamagedError):
                raise error
        return manifests

    def check_versions(self, manifests: Mapping[str, Manifest]) -> None:
        """Check that finished cells were made with the versions of packages that are installed here.

        Raises:
            SettingsError: one was made with others; the message names them.
        """
        here = installed_versions()
        for cell_id, manifest in manifests.items():
            check_same_versions(here, manifest.versions, f"{cell_id} in {self.files.url}")

    def check_same(self, cell: GridCell, manifest: Manifest) -> None:
        """Raise a SettingsError where a finished cell has other settings than the cell of its id."""
        where = Path(f"{self.files.url.rstrip('/')}/cells/{cell.id}")
        check_same_settings(where, asdict(cell.cell), asdict(manifest.cell))

    # one cell

    @checked
    def load(self, cell_id: str) -> CellResult:
        """Read a finished cell, after checking every file of it against its checksum.

        The folder of the result is local, of cells in other storage a temporary one that is gone when this returns.

        Raises:
            AssetError: the cell is missing or damaged.
        """
        with self.opened(cell_id) as folder:
            return load_cell(folder)

    @contextmanager
    def opened(self, cell_id: str) -> Generator[Path]:
        """Yield a local folder with the files of a finished cell, after checking each against its checksum."""
        manifest = self.manifest(cell_id)
        if (root := self.files.local) is not None:
            self.verify(cell_id, manifest)
            yield root / "cells" / cell_id / manifest.folder
            return
        with tempfile.TemporaryDirectory() as scratch:
            for name in manifest.files:
                path = Path(scratch) / cell_id / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.read_file(manifest, name))
            yield Path(scratch) / cell_id

    def verify(self, cell_id: str, manifest: Manifest | None = None) -> None:
        """Check every file of a finished cell against its checksum.

        Raises:
            DamagedError: a file is missing or has other bytes than were saved.
            AssetError: a file cannot be read now.
        """
        manifest = manifest or self.manifest(cell_id)
        for name in manifest.files:
            self.read_file(manifest, name)

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """Return a file of a finished cell, after checking it.

        Raises:
            DamagedError: it is missing or has other bytes than were saved.
            AssetError: it cannot be read now.
        """
        path = file_path(manifest, name)
        return self.checked_file(manifest, name, self.files.read_many([path])[path])

    def checked_file(self, manifest: Manifest, name: str, content: bytes | Exception) -> bytes:
        """Return the bytes that were read of a file, or raise an error as `read_file` does."""
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise AssetError(
                f"expected to read {self.files.url}/{file_path(manifest, name)}, got {first_line(content)}: check the "
                "storage"
            ) from content
        digest = "" if isinstance(content, Exception) else hashlib.sha256(content).hexdigest()
        if isinstance(content, Exception) or digest != manifest.files[name]:
            got = first_line(content) if isinstance(content, Exception) else f"other bytes (SHA-256 {digest[:12]}…)"
            raise DamagedError(
                f"expected {self.files.url}/{file_path(manifest, name)} with the bytes that were saved (SHA-256 "
                f"{manifest.files[name][:12]}…), got {got}: run `rerun --failed` to have the cell made again"
            )
        return content

    def publish(self, cell: GridCell, result: CellResult, about: Mapping[str, Any]) -> bool:
        """Write a cell that `run_cell` saved in a local folder; return whether it is the first of its id.

        Raises:
            AssetError: the storage cannot be written.
        """
        folder = result.folder
        (folder / FRAME).write_bytes(_parquet(cell, result))
        checksums = {path.relative_to(folder).as_posix(): _sha256(path) for path in _files_in(folder)}
        manifest = Manifest(
            id=cell.id, settings=asdict(cell.cell), precision=cell.precision, files=checksums, folder="",
            versions={"icl-dual": version("icl-dual"), **result.provenance["versions"]}, **about,
        )  # fmt: skip
        if self.has(cell.id):
            return False
        if (root := self.files.local) is not None:
            with suppress(_PublishedError), atomic_folder(root / "cells" / cell.id) as scratch:
                shutil.copytree(folder, scratch, dirs_exist_ok=True)
                (scratch / MANIFEST).write_text(to_json(asdict(manifest)), encoding="utf-8")
                if self.has(cell.id):  # another worker's, published while this one was copied
                    raise _PublishedError
                return True
            return False
        return self._upload(replace(manifest, folder=f"{ATTEMPT}{secrets.token_hex(6)}"), folder)

    def _upload(self, manifest: Manifest, folder: Path) -> bool:
        parent = f"cells/{manifest.id}"
        try:
            for name in manifest.files:
                self.files.write(f"{parent}/{manifest.folder}/{name}", (folder / name).read_bytes())
        except BaseException:
            with suppress(Exception):
                self.files.delete_folder(f"{parent}/{manifest.folder}")
            raise
        others = {name for name in self.files.names(parent) if name.startswith(ATTEMPT)} - {manifest.folder}
        # Where this fails, the manifest may be there all the same: then its files must stay.
        is_first = self.files.create(f"{parent}/{MANIFEST}", to_json(asdict(manifest)).encode())
        with suppress(Exception):  # what workers have left that were killed, or come too late, costs only space
            for name in others if is_first else [manifest.folder]:
                self.files.delete_folder(f"{parent}/{name}")
        return is_first

    @checked
    def remove(self, cell_id: str) -> None:
        """Delete a cell, its failure and its claims, so that it will be computed again."""
        self.files.delete(f"cells/{cell_id}/{MANIFEST}")  # first: without it the cell does not exist
        self.files.delete_folder(f"cells/{cell_id}")
        delete_claims(self.files, [cell_id])  # with them the workers that were lost count no more
        self.files.delete(f"failures/{cell_id}.json")  # last: the cell runs again from now on

    def check_writable(self) -> None:
        """Check that files can be written and deleted, before anything is computed.

        Raises:
            AssetError: they cannot.
        """
        path = f"{FOLDER}/probe-{secrets.token_hex(6)}"
        with writing(self.files.url):
            self.files.create(path, b"")
            self.files.delete(path)

    # failures

    def failed_ids(self) -> list[str]:
        """Return the ids of the cells that failed."""
        return [name.removesuffix(".json") for name in self.files.names("failures")]

    def failures(self) -> dict[str, Failure]:
        """Return the failures by cell."""
        contents = self.files.read_many([f"failures/{name}.json" for name in self.failed_ids()])
        by_id = {path.removeprefix("failures/").removesuffix(".json"): content for path, content in contents.items()}
        return {
            cell_id: _failure(cell_id, content)
            for cell_id, content in by_id.items()
            if not isinstance(content, FileNotFoundError)  # deleted meanwhile
        }

    def failure(self, cell_id: str) -> Failure | None:
        """Return the failure of a cell, if it failed."""
        content = self.files.read_many([f"failures/{cell_id}.json"]).popitem()[1]
        return None if isinstance(content, FileNotFoundError) else _failure(cell_id, content)

    def record_failure(self, failure: Failure) -> None:
        """Write the failure of a cell."""
        self.files.write(f"failures/{failure.id}.json", to_json(asdict(failure)).encode())

    # origins

    def check_origin(self, result: CellResult) -> None:
        """Check that a cell has the weights and rows of the other cells of its model and task.

        Raises:
            SettingsError: other weights, another tokenizer, or other rows were used before under the same name.
        """
        cell, provenance = result.cell, result.provenance
        precision = provenance.get("precision", provenance["dtype"])
        of_model = {name: provenance[name] for name in ("model", "fingerprint", "tokenizer") if name in provenance}
        self._check_origin(f"model {cell.model_name} {precision}", of_model)
        for key, name in (("task", cell.task), ("context_task", cell.context_task)):
            if name is not None:
                self._check_origin(f"task {name} {cell.protocol} {cell.source}", {"task": provenance[key]})

    def _check_origin(self, name: str, origin: Mapping[str, Any]) -> None:
        path = f"origins/{name.split(' ')[0]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        content = to_json({"name": name, **origin}).encode()
        if not self.files.create(path, content):
            try:
                saved = json.loads(self.files.read(path))
            except (ValueError, RecursionError) as error:
                raise AssetError(
                    f"expected the origin of cells in {self.files.url}/{path}, got {first_line(error)}: delete this "
                    "file"
                ) from error
            check_same_settings(Path(f"{self.files.url}/{path}"), origin, saved)


def check_same_versions(here: Mapping[str, str], others: Mapping[str, str], of: str) -> None:
    """Raise a SettingsError where packages have other versions here than elsewhere, as `of` says."""
    different = [name for name in PACKAGES if name in others and others[name] != here[name]]
    if different:
        raise SettingsError(
            f"expected one version of each package in a grid, got {_listed(here, different)} in {process_name()}, and "
            f"{_listed(others, different)} of {of}: install the same versions, choose other results, or allow it "
            "with --mix-versions (mix_versions=True)"
        )


def _listed(versions: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in names)


def process_name() -> str:
    """Return the machine and process of a worker."""
    return f"{platform.node()}:{os.getpid()}"


def file_path(manifest: Manifest, name: str) -> str:
    """Return the path of a file of a finished cell below the results' address."""
    return "/".join(filter(None, ("cells", manifest.id, manifest.folder, name)))


class _PublishedError(Exception):
    """Another worker has published the cell."""


def _failure(cell_id: str, content: bytes | Exception) -> Failure:
    if isinstance(content, Exception):
        return Failure(cell_id, f"the record of its failure cannot be read ({first_line(content)})", "", "")
    try:
        return from_json(Failure, json.loads(content), f"failures/{cell_id}.json")
    except (AssetError, ValueError, TypeError, RecursionError) as error:
        return Failure(cell_id, f"the record of its failure is damaged ({first_line(error)})", "", "")


def _parquet(cell: GridCell, result: CellResult) -> bytes:
    """Return the rows of a cell in the table of all cells."""
    frame: pd.DataFrame = result.to_frame()
    frame.insert(0, "id", cell.id)
    frame.insert(7, "precision", cell.precision)
    buffer = io.BytesIO()
    frame.astype({"k": "int64", "seed": "int64", "n": "int64"}).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
