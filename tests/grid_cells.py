"""Small grids of a tiny model, and finished cells, as several test modules and scripts use them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import icl_dual as icl
from icl_dual.cells import CellResult
from icl_dual.grids import Grid, Results
from icl_dual.grids.results import MANIFEST
from icl_dual.models import tiny_model
from icl_dual.study import CellRunner

ROWS = [{"text": f"film number {i}", "label": i % 2} for i in range(70)]
TASK = icl.Task("films", "Text: {text} Label:", ("bad", "good"), ROWS)


def grid_of(**changes: Any) -> Grid:
    """Return a grid of four cells of a tiny model: two seeds, each plain and with flipped labels in context."""
    settings: dict[str, Any] = {
        "models": ["tiny"],
        "tasks": ["films"],
        "k": 2,
        "seeds": [1, 2],
        "rates": 0.01,
        "controls": {"flipped": {"context": "flipped labels"}},
        "n_queries": 3,
        "replicas": 0,
    }
    return Grid(**settings | changes)


def content(result: CellResult) -> CellResult:
    """Return a cell without what differs from run to run: its folder and the seconds that it took."""
    return replace(result, folder=Path(), provenance={**result.provenance, "seconds": None})


def without_model_files(result: CellResult) -> CellResult:
    """Return a cell without the sizes and times of its model's files."""
    provenance = {name: value for name, value in result.provenance.items() if name != "model_files"}
    return replace(result, provenance=provenance)


class CopiedCells(CellRunner):
    """Takes cells from a study that was run before, for tests of what happens around a cell; fails where told to."""

    study: Path
    runs: list[str]
    failing: Sequence[str] = ()

    def run(self, cell: icl.Cell, folder: Any) -> CellResult:
        self.runs.append(cell.name)
        if cell.name in self.failing:
            raise icl.DivergedError(f"expected finite weights in {cell.name}, got nan")
        shutil.copytree(self.study / cell.name, folder)
        return icl.load_cell(folder)


def save_tiny(folder: Path) -> str:
    """Save a tiny model into a folder that `load_model` reads, and return its name."""
    tokenizer = tiny_model().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def change_version(results: Results, cell_id: str, package: str, version: str) -> None:
    """Let a finished cell have been made with another version of a package."""
    path = f"cells/{cell_id}/{MANIFEST}"
    manifest = json.loads(results.files.read(path))
    manifest["versions"][package] = version
    results.files.write(path, json.dumps(manifest).encode())


def corrupt(results: Results, path: str) -> None:
    """Change one byte of a file in the storage."""
    data = bytearray(results.files.read(path))
    data[len(data) // 2] ^= 1
    results.files.write(path, bytes(data))
