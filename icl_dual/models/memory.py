"""The free memory of a device, and of the host within its control group's limit."""

from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; `None` where it is not known."""
    if device.type == "cpu":
        available = int(psutil.virtual_memory().available)
        left = free_in_control_group()
        return available if left is None else min(available, left)
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for new tensors
    return torch.cuda.mem_get_info(device)[0] + kept


def free_in_control_group(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return how much memory the process's control groups (of a container or a job) leave it; `None` without a limit.

    Args:
        root: where Linux shows control groups.
        process: the file that names those of the process.
    """
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:  # not Linux
        return None
    free: list[int] = []
    for _, controllers, path in lines:
        is_first_version = "memory" in controllers.split(",")
        if controllers and not is_first_version:
            continue
        top = root / "memory" if is_first_version else root
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_first_version else ("memory.max", "memory.current")
        )
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # a container shows its own group at the top
            free += _left(folder, *names)
            if folder == top:
                break
    return min(free, default=None)


def _left(folder: Path, limit_name: str, usage_name: str) -> list[int]:
    """Return what a control group leaves, with the files that it caches; nothing without a limit."""
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if not limit.isdecimal():  # max
        return []

    def pages(name: str) -> int:
        """Return a statistic of the group and those in it: the first version of control groups has it as a total."""
        return int(statistics.get(f"total_{name}", statistics.get(name, 0)))

    # The kernel reclaims pages of files from both of its lists, also those used lately ("active"), such as a model's
    # mapped weights. Locked pages, tmpfs and shared memory are on other lists. Dirty pages must be written first.
    cached = pages("inactive_file") + pages("active_file")
    unwritten = sum(pages(name) for name in ("file_dirty", "file_writeback", "dirty", "writeback"))
    return [max(0, int(limit) - usage + max(0, cached - unwritten))]
