"""`icl-dual doctor`: the environment, versions, devices, caches, and what is missing."""

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import icl_dual as icl
from icl_dual.assets import cache_dir
from icl_dual.cli.commands import add_command
from icl_dual.scripts.common import ScriptError
from icl_dual.storage import check_writable

DISTRIBUTION = "icl-dual"
EXAMPLES = """
icl-dual doctor
icl-dual doctor --json
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    area: str
    """What it belongs to: `environment`, `packages`, `extras`, `devices`, `caches` or `folders`."""
    name: str
    """The package, device or folder."""
    state: Literal["ok", "absent", "problem"]
    """`ok`; `absent`, which only some uses need; or `problem`, which has to be mended."""
    text: str
    """The version or size, or what to do."""


def add_commands(subparsers: Any) -> None:
    """Add the command."""
    summary = "Check environment, versions, devices, caches and folders; exit code 1 where something has to be mended."
    add_command(subparsers, "doctor", run, summary=summary, examples=EXAMPLES)


def run(args: argparse.Namespace) -> list[dict[str, str]]:
    """Print the checks and return them.

    Raises:
        ScriptError: a check found a problem.
    """
    checks = [*environment(), *packages(), *extras(), *devices(), *caches(), *folders()]
    area = ""
    for check in checks:
        if check.area != area:
            print(area := check.area)
        sign = {"ok": " ", "absent": "-", "problem": "!"}[check.state]
        print(f"  {sign} {check.name:20} {check.text}")
    problems = [check.name for check in checks if check.state == "problem"]
    if problems:
        raise ScriptError(f"expected no problem, got {len(problems)} ({', '.join(problems)}): see the lines with !")
    print("nothing to mend (-: not installed, needed by some uses only)")
    return [asdict(check) for check in checks]


def environment() -> Iterator[Check]:
    """Check Python, and pip, which fetches packaged models and data."""
    required = SpecifierSet(metadata(DISTRIBUTION)["Requires-Python"] or "")
    number = platform.python_version()
    is_right = required.contains(number, prereleases=True)
    text = f"{number} (required: {required}), {platform.platform()}"
    yield Check("environment", "python", "ok" if is_right else "problem", text)
    yield Check("environment", DISTRIBUTION, "ok", f"{icl.__version__}, {Path(icl.__file__).parent}")
    if find_spec("pip") is None:
        advice = "missing: packaged models and data cannot be fetched; run `python -m ensurepip`"
        yield Check("environment", "pip", "problem", advice)
    else:
        yield Check("environment", "pip", "ok", version("pip"))


def packages() -> Iterator[Check]:
    """Check the packages that are required, and their versions."""
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            installed = _version(requirement.name)
            required = f"required: {requirement.specifier}" if requirement.specifier else "any version"
            if installed is None or not requirement.specifier.contains(installed, prereleases=True):
                text = f"{installed or 'missing'} ({required}): pip install '{requirement.name}{requirement.specifier}'"
                yield Check("packages", requirement.name, "problem", text)
            else:
                yield Check("packages", requirement.name, "ok", f"{installed} ({required})")


def extras() -> Iterator[Check]:
    """Check the optional extras: which packages of each are missing."""
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        names = [
            requirement.name
            for requirement in _requirements()
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": extra})
            and not requirement.marker.evaluate({"extra": ""})
        ]
        missing = [name for name in names if name != DISTRIBUTION and _version(name) is None]
        if missing:
            text = f"missing {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'"
            yield Check("extras", extra, "absent", text)
        else:
            yield Check("extras", extra, "ok", "installed")


def devices() -> Iterator[Check]:
    """List the devices that torch can use."""
    yield Check("devices", "cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        about = cast(Any, torch.cuda).get_device_properties(index)
        yield Check("devices", f"cuda:{index}", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        yield Check("devices", "cuda", "absent", "no GPU, or a torch without CUDA")
    if torch.backends.mps.is_available():
        yield Check("devices", "mps", "ok", "available")


def caches() -> Iterator[Check]:
    """Check the caches: whether they can be written, and their sizes."""
    hub = Path(constants.HF_HUB_CACHE)
    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    for name, folder, note in ((DISTRIBUTION, cache_dir(), ""), ("hugging face hub", hub, offline)):
        state, text = _writable(folder)
        size = f"{megabytes(folder)} MB, " if folder.exists() else "empty, "
        yield Check("caches", name, state, f"{size}{text}{note}")


def folders() -> Iterator[Check]:
    """Check that results can be written into the current folder."""
    state, text = _writable(Path.cwd() / f".{DISTRIBUTION}-doctor")
    yield Check("folders", "current folder", state, text)


def megabytes(folder: Path) -> int:
    """Return the size of a folder's files in megabytes, links not followed."""
    sizes = (path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return round(sum(sizes) / 1e6)


def _writable(folder: Path) -> tuple[Literal["ok", "problem"], str]:
    """Return whether a folder can be written, and its path or what to do."""
    try:
        check_writable(folder)
    except icl.AssetError as error:
        return "problem", str(error)
    return "ok", str(folder if folder.exists() else folder.parent)


def _requirements() -> list[Requirement]:
    """Return the requirements of the installed package."""
    return [Requirement(line) for line in metadata(DISTRIBUTION).get_all("Requires-Dist") or ()]


def _version(name: str) -> str | None:
    """Return the installed version of a package; `None` where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
