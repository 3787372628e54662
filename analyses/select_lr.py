"""Choose a model's default learning rate for each task, on selection queries that no evaluation ever sees.

Finetunes on one draw of demonstrations (seed 0, which evaluations do not use) at all learning rates of a grid. Rates
are ranked by accuracy on the selection split; ties go to the lower cross-entropy of the gold label. The first rate that
is stable is chosen: over replicas of its finetuning, no metric's spread exceeds its interval over the queries. Where
none of the first few is, the best is chosen and said to be unstable.

The whole grid goes to figures/lr_selection/, with what was checked and what stability cost in accuracy; the choice goes
to icl_dual/scripts/data/default_lr.json, which reproduce.py and controls.py read. Measured rows are kept, so a stopped
run goes on where it was.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import icl_dual as icl
from icl_dual.finetuning.replicas import REPLICA_QUERIES, REPLICAS
from icl_dual.scripts.common import (
    DATA,
    TITLES,
    at_least,
    file_stem,
    finish,
    label_outer,
    lr_key,
    model_name,
    model_title,
    output_folder,
    panels,
    rate,
    run_script,
    script_parser,
    variant_parser,
)
from icl_dual.scripts.outputs import markdown_text, read_csv, write_csv, write_text
from icl_dual.statistics import MIN_QUERIES, Interval, proportion
from icl_dual.storage import read_json

DEFAULT_LR = DATA / "default_lr.json"
COLUMNS = ("model", "task", "k", "lr", "n", "accuracy", "cross_entropy", "unstable")
STABLE = "stable"
"""The entry of the column `unstable` for a rate with no unstable metric; where it is empty, none was measured."""

CHECKED = 6
"""The most rates of a task with stability measured, from the best."""

ZERO_SHOT = 0.0
"""The rate of the row that holds the zero-shot accuracy, which no choice considers."""

GRID = [digit * 10.0**exponent for exponent in (-4, -3, -2, -1) for digit in (1, 2, 5)]


def measure(model: icl.Model, prompts: icl.Prompts, delta: icl.WeightDelta | icl.DivergedError) -> dict[str, float]:
    if isinstance(delta, icl.DivergedError):
        return {"accuracy": float("nan"), "cross_entropy": float("nan")}
    with delta.applied(model):
        return measure_zero_shot(model, prompts)


def measure_zero_shot(model: icl.Model, prompts: icl.Prompts) -> dict[str, float]:
    """Return the accuracy and cross-entropy of the gold label, without demonstrations."""
    run = icl.capture(model, prompts.zero_shot(), fields=())
    of_gold = run.label_log_probs.log_softmax(-1)[range(len(run.gold)), run.gold]
    return {"accuracy": run.accuracy, "cross_entropy": -of_gold.mean().item()}


class Grid:
    """The measured rates of a model and a way of finetuning, kept in a file after every measurement."""

    def __init__(self, table: Path, n_queries: int) -> None:
        self.table = table
        rows = read_csv(table, dtype={"unstable": object}) if table.exists() else pd.DataFrame()
        rows = rows.reindex(columns=list(COLUMNS))
        self.others = rows.query("n != @n_queries")  # measured on other queries
        measured: list[dict[Any, Any]] = rows.query("n == @n_queries").to_dict("records")
        self.rows = {(row["task"], row["lr"]): row for row in measured}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a measured rate, or one that was measured, with its stability."""
        self.rows[row["task"], row["lr"]] = row
        measured = pd.DataFrame(list(self.rows.values()), columns=list(COLUMNS))
        table = pd.concat([self.others, measured], ignore_index=True)
        write_csv(self.table, table.astype({"k": int, "n": int}))  # which an empty frame turns into floats
        print(row, flush=True)

    def ranked(self, task: str) -> list[dict[str, Any]]:
        """Return a task's rates from the best; those that diverged are left out."""
        rates = [row for (of, lr), row in self.rows.items() if of == task and lr != ZERO_SHOT]
        rows = [row for row in rates if not math.isnan(row["accuracy"])]
        return sorted(rows, key=lambda row: (-row["accuracy"], row["cross_entropy"]))

    def unchecked(self, task: str) -> dict[str, Any] | None:
        """Return the best rate with unknown stability; `None` where a better one is stable or enough were checked."""
        for row in self.ranked(task)[:CHECKED]:
            if not isinstance(row["unstable"], str):
                return row
            if row["unstable"] == STABLE:
                return None
        return None


def unstable_metrics(
    model: icl.Model, prompts: icl.Prompts, lr: float, config: icl.FinetuneConfig, replicas: int
) -> str:
    """Return the metrics that replicas of the finetuning move by more than their interval over queries."""
    try:
        experiment = icl.run_experiment(
            model, prompts.first(REPLICA_QUERIES), lr=lr, config=config, replicas=replicas, progress=False
        )
    except icl.DivergedError:  # at the edge: in a batch of replicas it rounds otherwise than by itself
        return "diverged"
    return ", ".join(experiment.compare().unstable) or STABLE


def choose(ranked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the best rate that is stable; the best of all where none of those checked is."""
    return next((row for row in ranked if row["unstable"] == STABLE), ranked[0])


def given_up(ranked: Sequence[dict[str, Any]]) -> str:
    """Return what the choice of a stable rate gave up, in words."""
    best, chosen = ranked[0], choose(ranked)
    if chosen["lr"] != best["lr"]:
        return (
            f"{chosen['lr']:g} is stable, the best rate {best['lr']:g} is not ({best['unstable']}): accuracy "
            f"{chosen['accuracy']:.2f} instead of {best['accuracy']:.2f}"
        )
    if best["unstable"] == STABLE:
        return f"{best['lr']:g} is the best rate and stable: nothing was given up"
    return f"{best['lr']:g} is the best rate and unstable ({best['unstable']}), as are the next that were checked"


def accuracy_of(row: Mapping[str, Any]) -> Interval:
    """Return a rate's accuracy with its interval over selection queries (Wilson's)."""
    n_right = round(row["accuracy"] * row["n"])
    right = np.repeat([1.0, 0.0], [n_right, row["n"] - n_right])
    is_unstable = isinstance(row["unstable"], str) and row["unstable"] != STABLE
    return replace(proportion(right[None]), unstable=is_unstable)


def draw(grid: Grid, chosen: dict[str, float], title: str, path: Path) -> None:
    """Draw accuracy against the rate, a panel for each task, with the zero-shot accuracy where it was measured."""
    fig, (axes,) = panels(len(chosen))
    for (task, lr), ax in zip(chosen.items(), axes, strict=True):
        rows = sorted(grid.ranked(task), key=lambda row: row["lr"])
        estimates = {float(row["lr"]): accuracy_of(row) for row in rows}
        icl.plots.curves({"after finetuning": estimates}, ylabel="accuracy", ax=ax)
        ring = {"marker": "o", "markersize": 9, "fillstyle": "none", "linestyle": "none", "color": "black"}
        ax.plot([lr], [estimates[lr].value], label="the chosen rate", **ring)
        if (zero_shot := grid.rows.get((task, ZERO_SHOT))) is not None:
            estimate = accuracy_of(zero_shot)
            ax.axhline(estimate.value, color="black", linestyle=":", linewidth=0.9, label="zero-shot")
            ax.axhspan(estimate.low, estimate.high, color="black", alpha=0.08, linewidth=0)
        ax.set(xscale="log", xlabel="learning rate", ylim=(-0.03, 1.03))
        ax.set_title(TITLES[task])
        label_outer(ax)
    n_queries, k = ({row[name] for row in grid.rows.values()} for name in ("n", "k"))
    about = f"{n_queries.pop()} selection queries a task, k = {' or '.join(map(str, sorted(k)))}, seed 0"
    finish(fig, axes, f"Accuracy along the learning rate, {title}\n{about}", path, kinds=("png",))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__, variant_parser())
    add = parser.add_argument
    add("--model", type=model_name, default="smollm2-135m", help="packaged model, hub id or folder (%(default)s)")
    add("--tasks", nargs="+", default=["sst2", "sst5", "mr", "subj", "agnews"], choices=icl.TASKS, metavar="TASK")
    add("--queries", type=at_least(MIN_QUERIES), default=100, help="selection queries a task (%(default)s)")
    add("--lrs", type=rate, nargs="+", default=GRID, help="grid of learning rates (%(default)s)")
    add(
        "--replicas",
        type=at_least(2),
        default=REPLICAS,
        help="repeats of the finetuning for its stability (%(default)s)",
    )
    add("--zero-shot", action="store_true", help="measure the zero-shot accuracy of tables made without it, too")
    add("--out", type=output_folder, default="figures/lr_selection", help="folder for the grid (%(default)s)")
    return parser.parse_args(argv)


def select(grid: Grid, task_name: str, model: Callable[[], icl.Model], args: argparse.Namespace) -> None:
    """Measure a task's rates that were not measured before, then the stability of the best."""
    todo = [lr for lr in args.lrs if (task_name, lr) not in grid.rows]
    is_needed = (task_name, ZERO_SHOT) not in grid.rows and (args.zero_shot or bool(todo))
    if not todo and not is_needed and grid.unchecked(task_name) is None:
        return
    task, k, config = icl.load_task(task_name), icl.PAPER_K[task_name], finetuning(args)
    queries = task.queries(args.queries, split="selection")
    prompts = icl.build_prompts(model(), task, task.demonstrations(k, seed=0), queries)
    about = {"model": args.model, "task": task_name, "k": k, "n": len(queries)}
    if is_needed:
        grid.add(about | {"lr": ZERO_SHOT} | measure_zero_shot(model(), prompts) | {"unstable": None})
    deltas = icl.finetune_many(model(), [prompts] * len(todo), todo, config=config) if todo else []
    for lr, delta in zip(todo, deltas, strict=True):
        row = about | {"lr": lr}
        grid.add(row | measure(model(), prompts, delta) | {"unstable": None})
    while (row := grid.unchecked(task_name)) is not None:
        grid.add(row | {"unstable": unstable_metrics(model(), prompts, row["lr"], config, args.replicas)})


def finetuning(args: argparse.Namespace) -> icl.FinetuneConfig:
    return icl.FinetuneConfig(loss=args.loss, method=args.method, trained=args.trained)


def write(args: argparse.Namespace) -> None:
    """Measure what was not measured before, and write the grid and the choice."""
    name = lr_key(args.model, icl.Cell(args.model, args.tasks[0], 1, 0, 1.0, finetuning=finetuning(args)))
    table = args.out / f"{file_stem(name).replace(', ', '_').replace(' ', '-')}.csv"
    grid, chosen, words = Grid(table, args.queries), {}, []
    model = functools.cache(lambda: icl.load_model(args.model))  # loaded only where something is to be measured
    for task in args.tasks:
        select(grid, task, model, args)
        ranked = grid.ranked(task)
        chosen[task] = choose(ranked)["lr"]
        words.append(f"- {task}: {given_up(ranked)}")
    variation = name.partition(", ")[2]
    title = model_title(args.model) + (f", finetuning: {variation}" if variation else "")
    draw(grid, chosen, title, table.with_suffix(""))
    page = "\n".join([f"# Learning rates of {markdown_text(name)}", "", *words])
    write_text(table.with_suffix(".md"), page + "\n")
    known = read_json(DEFAULT_LR) if DEFAULT_LR.exists() else {}
    write_text(DEFAULT_LR, json.dumps(known | {name: known.get(name, {}) | chosen}, indent=1) + "\n")
    print("\n".join([*words, f"{name}: {chosen} → {DEFAULT_LR}"]))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv, stopped="Measured rates stay in {out}; the same command goes on from them.")


if __name__ == "__main__":
    sys.exit(main())
