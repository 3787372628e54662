"""Grids of cells that take some tenths of a second, for tests that run them in several processes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import make_rows
from transformers import LlamaConfig, LlamaForCausalLM

import icl_dual as icl
from icl_dual.grids import Grid, Outcome, Results, Worker
from icl_dual.models.tiny import _byte_tokenizer as byte_tokenizer

TASK = icl.Task("toy", "Text: {text} Label:", ("no", "perhaps"), make_rows())


def save_tiny_model(folder: Path, seed: int = 0) -> str:
    """Save a tiny model with random weights in a folder that `load_model` reads, and return the folder."""
    tokenizer = byte_tokenizer()
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    tokens: Any = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_grid(models: Sequence[str], n_seeds: int, **settings: Any) -> Grid:
    """Return a grid of two cells for each model and seed: a plain one and a control."""
    options: Any = {"controls": {"flipped": {"context": "flipped labels"}}, "replicas": 0, "n_queries": 3}
    seeds = tuple(range(1, n_seeds + 1))
    return Grid(models=models, tasks=["toy"], k=2, seeds=seeds, rates=[0.01], **{**options, **settings})


def tiny_worker(grid: Grid, folder: Path, **options: Any) -> Worker:
    """Return a worker for the results in a folder, with one thread, which gives the same bits everywhere."""
    return Worker(grid, Results(folder), tasks=[TASK], **{"threads": 1, **options})


class Events:
    """A report that keeps what it is told, and calls back."""

    def __init__(
        self, on_end: Callable[["Events"], None] | None = None, on_begin: Callable[["Events"], None] | None = None
    ) -> None:
        self.begun: list[str] = []
        self.ended: list[Outcome] = []
        self.on_end, self.on_begin = on_end, on_begin

    def begin(self, cell_id: str) -> None:
        self.begun.append(cell_id)
        if self.on_begin is not None:
            self.on_begin(self)

    def end(self, outcome: Outcome) -> None:
        self.ended.append(outcome)
        if self.on_end is not None:
            self.on_end(self)


def contents(results: Results) -> dict[str, icl.CellResult]:
    """Return the finished cells by id, without what differs from run to run."""
    cells = {cell_id: results.load(cell_id) for cell_id in results.finished()}
    return {
        cell_id: replace(cell, provenance={**cell.provenance, "seconds": None}, folder=Path())
        for cell_id, cell in cells.items()
    }


def run_here(grid: Grid, folder: Path) -> dict[str, icl.CellResult]:
    """Run all cells of a grid in this process, and return them: what engines are held against."""
    threads = torch.get_num_threads()
    worker = tiny_worker(grid, folder)
    outcomes = [worker.run(cell.id) for cell in grid.cells()]
    torch.set_num_threads(threads)
    assert {outcome.state for outcome in outcomes} == {"done"}, outcomes
    return contents(worker.results)
