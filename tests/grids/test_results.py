import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
from grid_cells import content, corrupt, grid_of

import icl_dual as icl
from icl_dual.cells import METADATA, TENSORS
from icl_dual.grids import Failure, Results, files
from icl_dual.grids import results as results_module
from icl_dual.grids.files import Files, is_transient, retried
from icl_dual.grids.results import FRAME, MANIFEST, DamagedError, file_path
from icl_dual.storage import to_json

CELL = grid_of().cells()[0]
ABOUT = {"seconds": 1.0, "peak_memory": 10**9, "worker": "test:1"}


def publish(results: Results, study: Path, folder: Path) -> bool:
    """Publish a cell of the study as a worker does: from a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(study / CELL.id, folder)
    return results.publish(CELL, icl.load_cell(folder), ABOUT)


def test_a_published_cell_is_the_one_that_was_saved(results: Results, study: Path, tmp_path: Path) -> None:
    assert results.finished() == []
    assert publish(results, study, tmp_path / "cell")
    assert results.finished() == [CELL.id]
    assert content(results.load(CELL.id)) == content(icl.load_cell(study / CELL.id))
    manifest = results.manifest(CELL.id)
    assert manifest.cell == CELL.cell
    assert set(manifest.files) == {METADATA, TENSORS, FRAME}


def test_of_two_publications_the_first_stays(results: Results, study: Path, tmp_path: Path) -> None:
    assert publish(results, study, tmp_path / "cell")
    before = {path: results.files.read(f"cells/{path}") for path in results.files.find("cells")}
    assert not publish(results, study, tmp_path / "cell")
    if results.files.local is None:  # the other worker saw no manifest when it began to write
        manifest = replace(results.manifest(CELL.id), folder="attempt-other")
        assert not results._upload(manifest, tmp_path / "cell")
    assert {path: results.files.read(f"cells/{path}") for path in results.files.find("cells")} == before


def test_of_two_that_publish_at_once_the_first_stays(study: Path, tmp_path: Path, monkeypatch: Any) -> None:
    results, copytree = Results(tmp_path / "results"), shutil.copytree

    def copy_late(source: Path, target: Path, **options: Any) -> None:
        copytree(source, target, **options)
        if results.finished() == []:  # the other worker's whole publication
            monkeypatch.undo()
            assert publish(results, study, tmp_path / "other")

    shutil.copytree(study / CELL.id, tmp_path / "cell")
    monkeypatch.setattr(results_module.shutil, "copytree", copy_late)
    before = {"seconds": 2.0, "peak_memory": 0, "worker": "late:1"}
    assert not results.publish(CELL, icl.load_cell(tmp_path / "cell"), before)
    assert results.manifest(CELL.id).worker == "test:1"
    results.verify(CELL.id)
    assert [path.name for path in (tmp_path / "results" / "cells").iterdir()] == [CELL.id]


def test_a_cell_stays_whole_where_storage_failed_after_it_had_written_the_manifest(
    s3_server: dict[str, Any], study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(f"s3://grid/{tmp_path.name}", s3_server)
    create = results.files.create

    def create_and_fail(path: str, data: bytes) -> bool:
        create(path, data)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(results.files, "create", create_and_fail)
    with pytest.raises(OSError, match="Input/output error"):
        publish(results, study, tmp_path / "cell")
    results.verify(CELL.id)


def test_a_cell_exists_only_when_all_its_files_are_there(
    s3_server: dict[str, Any], study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(f"s3://grid/{tmp_path.name}", s3_server)
    write, written = results.files.write, []

    def write_two(path: str, data: bytes) -> None:
        assert results.finished() == []
        if len(written) == 2:
            raise OSError(errno.EIO, "Input/output error")
        write(path, data)
        written.append(path)

    monkeypatch.setattr(results.files, "write", write_two)
    with pytest.raises(OSError, match="Input/output error"):
        publish(results, study, tmp_path / "cell")
    assert len(written) == 2
    assert results.files.find("cells") == []


def test_what_a_killed_worker_has_uploaded_is_deleted(s3_server: dict[str, Any], study: Path, tmp_path: Path) -> None:
    results = Results(f"s3://grid/{tmp_path.name}", s3_server)
    results.files.write(f"cells/{CELL.id}/attempt-killed/{METADATA}", b"{")
    assert publish(results, study, tmp_path / "cell")
    assert set(results.files.names(f"cells/{CELL.id}")) == {MANIFEST, results.manifest(CELL.id).folder}


def test_a_file_is_created_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write_bytes = Files(str(tmp_path)), Path.write_bytes

    def fill(path: Path, data: bytes) -> int:
        write_bytes(path, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        with pytest.raises(OSError, match="No space left"):
            folder.create("origins/model.json", b"{}")
    assert folder.names("origins") == []
    assert folder.create("origins/model.json", b"{}")
    assert not folder.create("origins/model.json", b"[]")
    create, failures = files._create_locally, [OSError(errno.EIO, "Input/output error")]

    def create_and_fail_once(path: Path, data: bytes) -> None:
        create(path, data)
        raise failures.pop()

    with monkeypatch.context() as patch:  # written, but reported as failed
        patch.setattr(files, "wait_random_exponential", lambda **_: lambda state: 0)
        patch.setattr(files, "_create_locally", create_and_fail_once)
        assert folder.create("origins/again.json", b"{}")
    assert failures == []
    folder.delete("origins/again.json")
    with monkeypatch.context() as patch:  # a file system without hard links
        patch.setattr(Path, "hardlink_to", lambda *_: exec("raise PermissionError(1, 'no links')"))
        assert folder.create("origins/task.json", b"{}")
        assert not folder.create("origins/task.json", b"[]")
    assert folder.names("origins") == ["model.json", "task.json"]
    assert folder.read("origins/task.json") == b"{}"


def test_a_changed_byte_is_found_when_the_cell_is_read(results: Results, study: Path, tmp_path: Path) -> None:
    publish(results, study, tmp_path / "cell")
    for name in (METADATA, TENSORS, FRAME):
        path = file_path(results.manifest(CELL.id), name)
        before = results.files.read(path)
        corrupt(results, path)
        with pytest.raises(icl.AssetError, match=rf"{name} with the bytes that were saved .* got other bytes .* `reru"):
            results.load(CELL.id)
        results.files.write(path, before)


def test_what_is_written_by_half_does_not_exist(results: Results, study: Path, tmp_path: Path) -> None:
    publish(results, study, tmp_path / "cell")
    results.files.delete(f"cells/{CELL.id}/{MANIFEST}")
    assert results.finished() == []
    with pytest.raises(icl.AssetError, match="expected the manifest of a cell"):
        results.load(CELL.id)
    results.files.write(f"cells/{CELL.id}/{MANIFEST}", b'{"format": 1, "id":')
    with pytest.raises(icl.AssetError, match="expected the manifest of a cell"):
        results.load(CELL.id)


OUTSIDE = ("", ".", "..", "../..", "a/../..", "a/..", "/etc", "a\\b", "a\0b", f"{CELL.id}/")


@pytest.mark.parametrize("cell_id", OUTSIDE)
def test_an_id_is_a_name_and_never_a_path_out_of_the_cells(results: Results, cell_id: str) -> None:
    results.files.write("cells/kept/manifest.json", b"kept")
    results.files.write("kept.txt", b"kept")
    for use in (results.remove, results.has, results.manifest, results.load, results.verify):
        with pytest.raises(icl.AssetError, match="stay within the results"):
            use(cell_id)
    with pytest.raises(icl.AssetError, match="stay within the results"):
        results.record_failure(Failure(f"../{cell_id}", "error", "traceback", "worker"))
    assert results.files.read("cells/kept/manifest.json") == results.files.read("kept.txt") == b"kept"


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../kept.txt": "0" * 64}},
        {"files": {"/etc/hostname": "0" * 64}},
        {"files": ["metadata.json"]},
        {"files": {"metadata.json": 3}},
        {"folder": "../.."},
        {"folder": 3},
        {"settings": 3},
        {"versions": None},
        {"seconds": "long"},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_manifest_is_checked_before_it_is_used(
    local_results: Results, study: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    results, path = local_results, f"cells/{CELL.id}/{MANIFEST}"
    publish(results, study, tmp_path / "cell")
    results.files.write("kept.txt", b"kept")
    results.files.write(path, to_json(json.loads(results.files.read(path)) | change).encode())
    for use in (results.manifest, results.load, results.verify):
        with pytest.raises(DamagedError, match="expected the manifest of a cell"):
            use(CELL.id)


def test_records_that_are_too_deep_are_damaged(local_results: Results) -> None:
    deep = b"[" * 100_000
    local_results.files.write(f"cells/{CELL.id}/{MANIFEST}", deep)
    local_results.files.write(f"failures/{CELL.id}.json", deep)
    with pytest.raises(DamagedError, match="expected the manifest of a cell"):
        local_results.manifest(CELL.id)
    failure = local_results.failure(CELL.id)
    assert failure is not None
    assert "damaged" in failure.error


def test_results_of_another_version_are_refused(local_results: Results, study: Path, tmp_path: Path) -> None:
    results = local_results
    publish(results, study, tmp_path / "cell")
    path = f"cells/{CELL.id}/{MANIFEST}"
    text = results.files.read(path).replace(b'"format": 1', b'"format": 2')
    results.files.write(path, text)
    for use in (lambda: results.load(CELL.id), lambda: results.check_settings([CELL])):
        with pytest.raises(icl.AssetError, match=r"format 1 in .*, got format 2 of icl-dual .*: install that version"):
            use()


def test_results_of_other_settings_are_refused(local_results: Results, study: Path, tmp_path: Path) -> None:
    results = local_results
    publish(results, study, tmp_path / "cell")
    other = grid_of(n_queries=2)
    with pytest.raises(icl.SettingsError, match=r"made with n_queries=2, got .*, made with n_queries=3"):
        results.check_settings(other.cells())


def test_all_cells_of_a_model_have_its_weights(results: Results, study: Path) -> None:
    result = icl.load_cell(study / CELL.id)
    results.check_origin(result)
    results.check_origin(result)
    changed = replace(result, provenance={**result.provenance, "fingerprint": "float32:other"})
    with pytest.raises(icl.SettingsError, match="fingerprint='float32:other'"):
        results.check_origin(changed)
    with pytest.raises(icl.SettingsError, match="task='other'"):
        results.check_origin(replace(result, provenance={**result.provenance, "task": "other"}))
    in_context = replace(result, cell=replace(result.cell, context_task="mr"))
    results.check_origin(replace(in_context, provenance={**result.provenance, "context_task": "first"}))
    with pytest.raises(icl.SettingsError, match="task='second'"):
        results.check_origin(replace(in_context, provenance={**result.provenance, "context_task": "second"}))
    (path,) = (path for path in results.files.find("origins") if path.startswith("model"))
    results.files.write(f"origins/{path}", b"{")
    with pytest.raises(icl.AssetError, match=r"expected the origin of cells in .*: delete this file"):
        results.check_origin(result)


def test_failures_are_kept_with_their_tracebacks(local_results: Results) -> None:
    results = local_results
    failure = Failure("cell", "ValueError: no", "Traceback …\nValueError: no", "host:1")
    results.record_failure(failure)
    assert results.failures() == {"cell": failure}
    results.files.write("failures/half.json", to_json({"id": "half"}).encode()[:-5])
    assert "damaged" in results.failures()["half"].error
    results.remove("cell")
    assert results.failure("cell") is None


def test_storage_that_fails_now_and_then_is_tried_again(
    results: Results, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = results.files._opened[0]
    calls: dict[str, int] = dict.fromkeys(("pipe_file", "cat_file", "exists", "ls", "find"), 0)

    def failing_first(name: str):
        operation = getattr(fs, name)

        def call(*args, **kwargs):
            calls[name] += 1
            if calls[name] % 3 != 0:  # two of three fail
                error = OSError(errno.EIO, "Input/output error")
                raise error if calls[name] % 3 == 1 else botocore.exceptions.EndpointConnectionError(endpoint_url="x")
            return operation(*args, **kwargs)

        return call

    monkeypatch.setattr(files, "wait_random_exponential", lambda **_: lambda state: 0)
    for name in calls:
        monkeypatch.setattr(fs, name, failing_first(name))
    assert publish(results, study, tmp_path / "cell")
    results.record_failure(Failure("other", "e", "t", "w"))
    assert results.status(grid_of().cells()).done == (CELL.id,)
    assert results.failed_ids() == ["other"]
    assert content(results.load(CELL.id)) == content(icl.load_cell(study / CELL.id))
    assert all(count % 3 == 0 for count in calls.values())
    assert sum(calls.values()) > 6


def test_what_does_not_pass_is_not_tried_again() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert not any(map(is_transient, (full, FileNotFoundError(), PermissionError(), ValueError())))
    assert not is_transient(botocore.exceptions.NoCredentialsError())
    assert is_transient(OSError(errno.ESTALE, "Stale file handle"))


def test_storage_without_credentials_is_an_error_in_a_sentence() -> None:
    def fail() -> None:
        raise botocore.exceptions.NoCredentialsError()

    with pytest.raises(icl.AssetError, match=r"expected storage that answers, got NoCredentialsError: .*credentials"):
        retried(fail)


def test_an_address_that_cannot_be_opened_is_refused_in_a_sentence() -> None:
    with pytest.raises(icl.AssetError, match=r"an address that fsspec can open, got 'nowhere://x'"):
        Files("nowhere://x").exists("a")
