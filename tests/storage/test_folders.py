"""Folders that appear complete or not at all, whatever stops or races with the process that writes them."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import icl_dual as icl
from icl_dual.storage import (
    atomic_file,
    atomic_folder,
    check_writable,
    clean_scratch,
    finished_folders,
    folders,
    load_tensors,
    recover,
    save_tensors,
)


def write(folder: Path, content: str, then: BaseException | None = None) -> None:
    with atomic_folder(folder) as scratch:
        (scratch / "file").write_text(content)
        if then:
            raise then


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def scratch_folder(parent: Path, *, host: str | None = None, pid: int = 1, number: int = 0) -> Path:
    """Make what a process that was killed leaves: a scratch folder with a lock that nobody holds."""
    scratch = parent / f".icl_dual-{folders._host() if host is None else host}-{pid}-{number:08d}"
    scratch.mkdir(parents=True)
    (scratch / "lock").touch()
    return scratch


def between_renames(parent: Path, name: str, **options) -> Path:
    """Make what a process leaves that was killed between the two renames of a replacement."""
    scratch = scratch_folder(parent, **options)
    for part, content in (("old", "old"), ("new", "new")):
        (scratch / part / name).mkdir(parents=True)
        (scratch / part / name / "file").write_text(content)
    return scratch


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    write(folder, "first")
    with pytest.raises(KeyboardInterrupt):
        write(folder, "second", KeyboardInterrupt())
    assert (folder / "file").read_text() == "first"
    write(folder, "third")
    assert (folder / "file").read_text() == "third"
    assert names(tmp_path) == ["result"]


def test_a_kill_at_any_instant_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, str(script), str(tmp_path / "study"), "5", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("each of ")[1].split()[0]) > 20


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=repr)
def test_a_replacement_that_fails_between_its_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    write(tmp_path / "result", "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.parent.name == "new" and not (tmp_path / "result").exists():
            raise stop
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((KeyboardInterrupt, icl.AssetError)):
        write(tmp_path / "result", "new")
    assert (tmp_path / "result" / "file").read_text() == "old"
    assert names(tmp_path) == ["result"]


def test_a_folder_that_cannot_be_put_back_is_kept_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "result", Path.rename
    write(folder, "old")

    def failing(path: Path, target: Path) -> Path:
        if target == folder and not folder.exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(icl.AssetError, match="Input/output error"):
            write(folder, "new")
    assert not folder.exists()
    assert finished_folders(tmp_path) == [folder]
    assert (folder / "file").read_text() == "old"


@pytest.mark.parametrize("read", ["recover", "finished_folders", "clean_scratch", "check_writable", "atomic_folder"])
def test_what_a_killed_replacement_set_aside_is_put_back(tmp_path: Path, read: str) -> None:
    between_renames(tmp_path, "cell")
    match read:
        case "recover":
            recover(tmp_path / "cell")
        case "finished_folders":
            assert finished_folders(tmp_path) == [tmp_path / "cell"]
        case "clean_scratch":
            clean_scratch(tmp_path)
            assert names(tmp_path) == ["cell"]
        case "check_writable":
            check_writable(tmp_path / "cell", ["file"])
        case "atomic_folder":
            write(tmp_path / "other", "x")
            assert names(tmp_path) == ["cell", "other"]
    assert (tmp_path / "cell" / "file").read_text() == "old"


def test_saved_results_are_put_back_where_they_are_loaded(tmp_path: Path) -> None:
    for part in ("cell", "cell/recordings"):
        save_tensors(tmp_path / "made" / part, {"a": torch.ones(2)}, {})
        scratch = scratch_folder(tmp_path)
        (scratch / "old").mkdir()
        (scratch / "new" / "cell").mkdir(parents=True)
        (tmp_path / "made" / "cell").rename(scratch / "old" / "cell")
        assert torch.equal(load_tensors(tmp_path / part)[0]["a"], torch.ones(2))
        shutil.rmtree(tmp_path / "cell")
        clean_scratch(tmp_path)


def test_the_folder_that_was_set_aside_last_is_put_back(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        scratch = between_renames(tmp_path, "cell", number=number)
        (scratch / "old" / "cell" / "file").write_text(str(number))
        os.utime(scratch / "old", (number, number))
    recover(tmp_path / "cell")
    assert (tmp_path / "cell" / "file").read_text() == "3"


def test_a_deleted_folder_stays_deleted(tmp_path: Path) -> None:
    """A process that was killed after it had put the new folder in place leaves the old one, which is of no use."""
    scratch = between_renames(tmp_path, "cell")
    shutil.rmtree(scratch / "new" / "cell")
    recover(tmp_path / "cell")
    assert finished_folders(tmp_path) == []
    clean_scratch(tmp_path)
    assert names(tmp_path) == []


def test_what_was_being_deleted_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has finished the folder, and this one is killed while it deletes what was set aside."""
    between_renames(tmp_path, "cell")
    write(tmp_path / "x" / "cell", "finished")
    (tmp_path / "x" / "cell").rename(tmp_path / "cell")
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
        clean_scratch(tmp_path)
    shutil.rmtree(tmp_path / "cell")
    recover(tmp_path / "cell")
    assert not (tmp_path / "cell").exists()


def test_a_reader_waits_for_a_replacement_in_progress(tmp_path: Path) -> None:
    scratch = between_renames(tmp_path, "cell")
    lock = FileLock(scratch / "lock", thread_local=False)
    lock.acquire(timeout=0)

    def finish() -> None:
        time.sleep(0.1)
        (scratch / "new" / "cell").rename(tmp_path / "cell")
        lock.release()

    thread = threading.Thread(target=finish)
    thread.start()
    recover(tmp_path / "cell")
    thread.join()
    assert (tmp_path / "cell" / "file").read_text() == "new"


def test_scratch_in_use_stays_and_other_scratch_goes(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    scratch_folder(tmp_path, number=1, pid=gone.pid)  # killed before it had its lock
    between_renames(tmp_path / "x", "y")
    locked = between_renames(tmp_path, "cell", number=2)
    (tmp_path / "cell").mkdir()
    starting = scratch_folder(tmp_path, number=3, pid=os.getpid())
    elsewhere = between_renames(tmp_path, "cell", number=4, host="elsewhere")
    old_elsewhere = between_renames(tmp_path, "cell", number=5, host="elsewhere")
    os.utime(old_elsewhere, (1, 1))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".icl_dual-notes").mkdir()
    with FileLock(locked / "lock"):
        clean_scratch(tmp_path)
    expected = {locked, starting, elsewhere, tmp_path / "cell", tmp_path / "x"}
    assert {*tmp_path.iterdir()} == expected | {tmp_path / ".git", tmp_path / ".icl_dual-notes"}
    assert [path.name for path in finished_folders(tmp_path)] == ["cell", "x"]
    clean_scratch(tmp_path)
    assert not locked.exists()


def test_asking_for_a_lock_leaves_no_scratch_that_its_process_deletes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between_renames(tmp_path, "cell", pid=os.getpid())
    acquire = FileLock.acquire

    def acquire_late(lock: FileLock, *args, **kwargs) -> object:
        shutil.rmtree(Path(lock.lock_file).parent, ignore_errors=True)
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", acquire_late)
    recover(tmp_path / "cell")
    assert names(tmp_path) == []


def test_threads_that_write_one_folder_at_once_end_with_one_of_theirs(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def keep_writing(name: str) -> None:
        try:
            for _ in range(20):
                write(tmp_path / "cell", name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=keep_writing, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (tmp_path / "cell" / "file").read_text() in "abc"
    assert names(tmp_path) == ["cell"]


@pytest.mark.parametrize("read", ["_files", "read_json"])
def test_a_folder_that_another_process_replaces_while_it_is_checked_is_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    folder, n_gone = tmp_path / "cell", 0
    save_tensors(folder, {"x": torch.zeros(1)}, {"class": "X"})
    reading = getattr(folders, read)

    def while_it_is_gone(path: Path) -> object:
        nonlocal n_gone
        if n_gone < 3 and path.parts[: len(folder.parts)] == folder.parts:
            n_gone += 1
            folder.rename(tmp_path / "gone")
            try:
                # `_files` lists the folder that was there when it began.
                return sorted(path.iterdir()) if path == folder else reading(path)
            finally:
                (tmp_path / "gone").rename(folder)
        return reading(path)

    monkeypatch.setattr(folders, read, while_it_is_gone)
    save_tensors(folder, {"x": torch.ones(1)}, {"class": "X"})
    assert n_gone == 3
    assert load_tensors(folder)[0]["x"] == 1
    with pytest.raises(icl.AssetError, match="with a saved X"):
        save_tensors(folder, {"x": torch.ones(1)}, {"class": "Y"})


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(icl.AssetError, match=r"got .*thesis with other files in it \('chapter\.tex'"):
        save_tensors(tmp_path / "thesis", {"a": torch.ones(1)}, {})
    with pytest.raises(icl.AssetError, match=r"with other files in it \('chapter\.tex'"):
        write(tmp_path / "thesis", "x")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"
    assert names(tmp_path) == ["thesis"]


def test_files_in_folders_of_the_same_name_are_kept_too(tmp_path: Path) -> None:
    (tmp_path / "out" / "zs").mkdir(parents=True)
    (tmp_path / "out" / "zs" / "notes.txt").write_text("precious")

    def export() -> None:
        with atomic_folder(tmp_path / "out") as scratch:
            (scratch / "zs").mkdir()
            (scratch / "zs" / "record_info.jsonl").touch()

    with pytest.raises(icl.AssetError, match=r"other files in it \('zs/notes\.txt'"):
        export()
    assert (tmp_path / "out" / "zs" / "notes.txt").read_text() == "precious"


def test_an_empty_folder_inside_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "out" / "later").mkdir(parents=True)
    with pytest.raises(icl.AssetError, match=r"other files in it \('later'"):
        write(tmp_path / "out", "x")
    assert (tmp_path / "out" / "later").is_dir()


def test_a_linked_folder_is_replaced_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk" / "cell").mkdir(parents=True)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "cell").symlink_to(tmp_path / "disk" / "cell")
    check_writable(tmp_path / "study" / "cell", [])
    for content in "12":
        write(tmp_path / "study" / "cell", content)
        assert (tmp_path / "study" / "cell").is_symlink()
        assert (tmp_path / "disk" / "cell" / "file").read_text() == content
    (tmp_path / "file").symlink_to(tmp_path / "disk" / "cell" / "file")
    with atomic_file(tmp_path / "file") as scratch:
        scratch.write_text("3")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "disk" / "cell" / "file").read_text() == "3"


def unwritable(tmp_path: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield what a folder cannot be, with its error."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    yield "a file", tmp_path / "file", r"expected a folder or a new path, got the file .*: choose another path"
    yield "below a file", tmp_path / "file" / "x" / "y", "(below the file .*file: choose another path|Not a directory)"
    yield "a dangling link", tmp_path / "link", "the symbolic link .*unmounted, which does not exist: restore"
    yield "below a dangling link", tmp_path / "link" / "x", "the symbolic link .*unmounted, which does not exist"
    yield "a loop", tmp_path / "loop", "(the symbolic link .*loop|Too many levels)"
    yield (
        "a long name",
        tmp_path / ("n" * 300),
        "(at most 255 bytes, got 300|File name too long).*choose a shorter name",
    )
    yield "a long name in UTF-8", tmp_path / ("λ" * 200), "(got 400|File name too long).*: choose a shorter name"
    yield "below a long name", tmp_path / "new" / ("n" * 300) / "x", "(at most 255 bytes, got 300|File name too long)"
    yield "a long path", tmp_path.joinpath(*["n" * 200] * 25), "(at most 4096 bytes|File name too long)"


def test_what_cannot_be_written_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    for name, folder, message in unwritable(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(icl.AssetError, match=message):
            check_writable(folder)
        assert sorted(tmp_path.rglob("*")) == before, name
        with pytest.raises(icl.AssetError):
            write(folder, name)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_check_writes_nothing_that_stays(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "study" / "cell")
    assert names(tmp_path) == []
    write(tmp_path / "cell", "x")
    check_writable(tmp_path / "cell", ["file", "other"])
    with pytest.raises(icl.AssetError, match=r"with other files in it \('file'"):
        check_writable(tmp_path / "cell", ["other"])
    assert names(tmp_path) == ["cell"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "'Read-only file system': choose a path that you may write to"),
        (errno.EACCES, "'Permission denied': choose a path that you may write to"),
        (errno.ENOSPC, "'No space left on device': free disk space, or choose another path"),
        (errno.EIO, "'Input/output error': check the path, and whether its disk is full"),
    ],
)
def test_a_folder_that_the_system_refuses_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    mkdir = Path.mkdir

    def refused(path: Path, *args: object, **kwargs: object) -> None:
        if path.name.startswith(folders.SCRATCH):
            raise OSError(number, os.strerror(number))
        mkdir(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refused)
    for attempt in (lambda: check_writable(tmp_path / "x"), lambda: write(tmp_path / "x", "content")):
        with pytest.raises(icl.AssetError, match=f"expected to write .*x, got {advice}"):
            attempt()


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", "content")
    monkeypatch.setattr(folders.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(icl.AssetError, match="'Permission denied': choose a path that you may write to"):
        check_writable(tmp_path / "x")


def test_a_disk_that_is_nearly_full_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(icl.AssetError, match=r"expected 1048576000 MiB of free disk space for .*: free disk space, or"):
        check_writable(tmp_path / "x", free_bytes=1000 * 2**40)


def test_a_disk_that_fills_up_while_something_is_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(icl.AssetError, match="No space left on device"):
        write(tmp_path / "x", "content", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def draw() -> None:
        with atomic_file(tmp_path / "table.md") as scratch:
            scratch.write_text("| half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(icl.AssetError, match="No space left"):
        draw()
    assert names(tmp_path) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    for content, stop in (("first", None), ("second", KeyboardInterrupt())):
        try:
            with atomic_file(tmp_path / "new" / "table.md") as scratch:
                assert scratch.suffix == ".md"
                scratch.write_text(content)
                if stop:
                    raise stop
        except KeyboardInterrupt:
            pass
    assert (tmp_path / "new" / "table.md").read_text() == "first"
    assert names(tmp_path / "new") == ["table.md"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "cell", {"a": torch.ones(2)}, {"k": 3})
        with atomic_file(tmp_path / "table.md") as scratch:
            scratch.touch()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = dict.fromkeys(("tensors.safetensors", "metadata.json", "table.md"), 0o666 & ~umask)
    assert modes == files | {"cell": 0o777 & ~umask}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_scratch_folders_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "cell") as new:
            (scratch,) = tmp_path.iterdir()
            assert new.is_relative_to(scratch)
            assert scratch.stat().st_mode & 0o777 == 0o777 & ~umask
    finally:
        os.umask(before)


def forbid(monkeypatch: pytest.MonkeyPatch, *forbidden: Path) -> None:
    """Let these folders be entered and not listed, also by the administrator."""
    iterdir = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:
        if path in forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)


def test_scratch_of_another_user_that_cannot_be_read_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "cell", {"a": torch.ones(2)}, {})
    scratch = between_renames(tmp_path, "other")
    forbid(monkeypatch, scratch, scratch / "old", scratch / "new")
    assert torch.equal(load_tensors(tmp_path / "cell")[0]["a"], torch.ones(2))
    assert finished_folders(tmp_path) == [tmp_path / "cell"]
    check_writable(tmp_path / "cell")
    save_tensors(tmp_path / "cell", {"a": torch.zeros(2)}, {})
    assert scratch.exists(), "it may be in use"


def test_a_folder_below_one_that_cannot_be_listed_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "study" / "cell", {"a": torch.ones(2)}, {})
    forbid(monkeypatch, tmp_path, tmp_path / "study")
    assert torch.equal(load_tensors(tmp_path / "study" / "cell")[0]["a"], torch.ones(2))
    save_tensors(tmp_path / "study" / "cell", {"a": torch.zeros(2)}, {})
    with pytest.raises(icl.AssetError, match=r"expected to list .*study, got 'Permission denied': "):
        finished_folders(tmp_path / "study")


@pytest.mark.parametrize("read", ["load_tensors", "finished_folders", "check_writable", "save_tensors"])
def test_what_a_link_led_to_is_put_back(tmp_path: Path, read: str) -> None:
    save_tensors(tmp_path / "cell", {"a": torch.ones(2)}, {})
    scratch = between_renames(tmp_path / "disk", "cell")
    shutil.rmtree(scratch / "old" / "cell")
    (tmp_path / "cell").rename(scratch / "old" / "cell")
    (tmp_path / "study").mkdir()
    link = tmp_path / "study" / "cell"
    link.symlink_to(tmp_path / "disk" / "cell")
    match read:
        case "load_tensors":
            load_tensors(link)
        case "finished_folders":
            assert finished_folders(tmp_path / "study") == [link]
        case "check_writable":
            check_writable(link)
        case "save_tensors":
            save_tensors(link, {"a": torch.ones(2)}, {})
    assert torch.equal(load_tensors(tmp_path / "disk" / "cell")[0]["a"], torch.ones(2))
    assert link.is_symlink()


def test_a_mount_point_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path in (tmp_path, Path(tmp_path.anchor)))
    check_writable(tmp_path / "inside")
    for folder in (tmp_path, Path(tmp_path.anchor)):
        with pytest.raises(icl.AssetError, match=r"got the mount point .*: choose a folder inside it"):
            check_writable(folder)


def test_machines_whose_long_names_differ_at_the_end_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = []
    for node in ("pod-of-a-very-long-deployment-name-7f6d9-a", "pod-of-a-very-long-deployment-name-7f6d9-b", "", "λ"):
        monkeypatch.setattr(folders.platform, "node", lambda node=node: node)
        hosts.append(folders._host())
        assert folders.is_scratch(f"{folders.SCRATCH}{hosts[-1]}-1-00")
    assert len(set(hosts)) == len(hosts)


def test_hidden_results_of_version_02_are_found_and_its_scratch_is_not(tmp_path: Path) -> None:
    hidden = (".--llama_sst2_k4_seed1_lr1e-05_answer", "..--llama_sst2_k4_seed1_lr0.1_answer_random-delta")
    cells = ("cell", *hidden)
    scratch = (".cell-k3_x91ab", ".cell-k3_x91ab-old", f"..--llama_answer-{'a' * 8}", ".icl_dual-host-12-ab_1")
    for name in (*cells, *scratch):
        save_tensors(tmp_path / name, {"a": torch.ones(1)}, {})
    (tmp_path / ".git").mkdir()
    assert {path.name for path in finished_folders(tmp_path)} == {*cells}
    assert all(map(folders.is_scratch, scratch))


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "._metadata.json", ".nfs000000001", "desktop.ini"])
def test_files_of_the_system_are_no_foreign_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "cell").mkdir()
    for value in (1, 2):
        (tmp_path / "cell" / name).touch()
        check_writable(tmp_path / "cell", ["metadata.json", "tensors.safetensors"])
        save_tensors(tmp_path / "cell", {"a": torch.tensor(value)}, {})
        assert load_tensors(tmp_path / "cell")[0]["a"] == value
        assert names(tmp_path / "cell") == ["metadata.json", "tensors.safetensors"]
    assert names(tmp_path) == ["cell"]


@pytest.mark.parametrize("wait", [recover, lambda cell: finished_folders(cell.parent)], ids=["recover", "finished"])
def test_all_replacements_of_other_machines_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(folders, "_WAIT_S", 0.2)
    for number in range(4):
        between_renames(tmp_path, f"cell{number}", number=number, host="elsewhere")
        between_renames(tmp_path, "cell", number=9 - number, host="elsewhere")
    monkeypatch.setattr(folders, "_put_back", lambda *_: None)  # as where it fails
    started = time.monotonic()
    wait(tmp_path / "cell")
    assert 0.1 < time.monotonic() - started < 0.5


@pytest.mark.parametrize("write_one", [atomic_folder, atomic_file])
def test_errors_of_a_block_about_other_files_stay_as_they_are(
    tmp_path: Path, write_one: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    def work(error: Callable[[Path], OSError]) -> None:
        with write_one(tmp_path / "result") as scratch:
            raise error(scratch)

    for theirs in (
        FileNotFoundError(errno.ENOENT, "No such file", "rows.csv"),
        ConnectionError("offline"),
        TimeoutError(),
    ):
        with pytest.raises(type(theirs)) as raised:
            work(lambda _, theirs=theirs: theirs)
        assert raised.value is theirs
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        with pytest.raises(icl.AssetError, match=r"expected to write .*result, got"):
            work(lambda _, number=number: OSError(number, os.strerror(number)))
    with pytest.raises(icl.AssetError, match=r"expected to write .*result, got 'File name too long'"):
        work(lambda scratch: OSError(errno.ENAMETOOLONG, "File name too long", str(scratch / "x")))
    assert names(tmp_path) == []
