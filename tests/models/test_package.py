"""The supported range of transformer-lens."""

import re
import subprocess
import sys
from pathlib import Path

from icl_dual.models import WORKS_WITH

ROOT = Path(__file__).parents[2]


def test_another_transformer_lens_is_refused() -> None:
    versions = ["2.16.1", "3.8.1", "5.0.0"]
    program = f"""
import importlib.metadata as metadata
installed = metadata.version
for got in {versions}:
    metadata.version = lambda name: got if name == "transformer-lens" else installed(name)
    try:
        import icl_dual
    except ImportError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        f"expected transformer-lens >=3.9,<5, got transformer-lens {version}: pip install 'transformer-lens>=3.9,<5'"
        for version in versions
    ]


def test_the_range_is_the_packages_own() -> None:
    (line,) = re.findall(r'"transformer-lens(.*?)"', (ROOT / "pyproject.toml").read_text())
    assert line == WORKS_WITH


def test_the_second_environment_is_the_first_with_another_transformer_lens() -> None:
    first, second = (
        [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("constraints.txt", "constraints-tl3.txt")
    )
    assert set(second) - set(first) == {"transformer-lens==3.9.0", "better-abc==0.0.3"}
    assert set(first) - set(second) == {"transformer-lens==4.3.0"}
