"""Free memory, also within a limit of control groups."""

from pathlib import Path

import psutil
import pytest
import torch

from icl_dual.models import memory
from icl_dual.models.memory import free_in_control_group, free_memory


def test_free_memory_is_that_of_the_machine() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < psutil.virtual_memory().total
    assert free_memory(torch.device("meta")) is None


def test_a_limit_is_less_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_in_control_group", lambda: 5)
    assert free_memory(torch.device("cpu")) == 5
    monkeypatch.setattr(memory, "free_in_control_group", lambda: 2**60)
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert free < psutil.virtual_memory().total, "a limit may be more than the machine has"


def test_memory_that_torch_keeps_for_new_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda:0")) == 130


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_least_that_any_group_leaves_counts(tmp_path: Path) -> None:
    process, root = tmp_path / "cgroup", tmp_path / "groups"
    process.write_text("0::/job/step\n")
    write(root / "job", memory__max=1000, memory__current=700, memory__stat="anon 1\ninactive_file 50")
    write(root / "job" / "step", memory__max="max", memory__current=600, memory__stat="inactive_file 0")
    assert free_in_control_group(root, process) == 350
    write(root, memory__max=800, memory__current=790, memory__stat="inactive_file 3")
    assert free_in_control_group(root, process) == 13
    write(root, memory__max=800, memory__current=810, memory__stat="inactive_file 3")  # a limit that was lowered
    assert free_in_control_group(root, process) == 0


@pytest.mark.parametrize("controllers", ["memory", "cpuset,memory"])
def test_the_first_version_of_control_groups(tmp_path: Path, controllers: str) -> None:
    process, root = tmp_path / "cgroup", tmp_path / "groups"
    process.write_text(f"5:cpu,cpuacct:/a\n4:{controllers}:/a\n0::/\n")
    write(
        root / "memory" / "a",
        memory__limit_in_bytes=100,
        memory__usage_in_bytes=90,
        memory__stat="inactive_file 1\ntotal_inactive_file 2",
    )
    assert free_in_control_group(root, process) == 12


def test_files_in_memory_are_free_but_for_pages_that_are_locked_or_not_yet_written(tmp_path: Path) -> None:
    process, root = tmp_path / "cgroup", tmp_path / "groups"
    process.write_text("0::/\n")
    statistics = "file 95\nshmem 20\ninactive_file 30\nactive_file 40\nunevictable 5\nfile_dirty 6\nfile_writeback 1"
    write(root, memory__max=100, memory__current=98, memory__stat=statistics)
    assert free_in_control_group(root, process) == 2 + 70 - 7
    process.write_text("4:memory:/\n")
    statistics = "active_file 1\ntotal_inactive_file 30\ntotal_active_file 40\ntotal_dirty 6\ntotal_writeback 80"
    write(root / "memory", memory__limit_in_bytes=100, memory__usage_in_bytes=98, memory__stat=statistics)
    assert free_in_control_group(root, process) == 2


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert free_in_control_group(tmp_path, tmp_path / "missing") is None
    (tmp_path / "cgroup").write_text("0::/\n")
    assert free_in_control_group(tmp_path, tmp_path / "cgroup") is None
