"""The wheel: it holds every file of the package, and the command runs from it without the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    sources = (path for path in (ROOT / "icl_dual").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    assert {"icl_dual/scripts/data/paper.json", "icl_dual/views/view.js", "icl_dual/py.typed"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert archive.read(entry_points).decode().split() == [
            "[console_scripts]",
            "icl-dual",
            "=",
            "icl_dual.cli:main",
        ]
    assert names == expected


def test_the_command_runs_from_the_wheel_without_a_display(wheel: Path, tmp_path: Path) -> None:
    """`doctor` reads the wheel's own metadata; one process, for importing what it needs takes seconds."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "MPLBACKEND": "TkAgg"}
    done = subprocess.run(
        [sys.executable, "-m", "icl_dual", "doctor", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (package,) = (c for c in json.loads(done.stdout) if (c["area"], c["name"]) == ("environment", "icl-dual"))
    assert package["text"].endswith(str(tmp_path / "site" / "icl_dual"))
