"""`icl-dual compare`: a model and a task of one's own, in context and finetuned: a table and a figure."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import icl_dual as icl
from icl_dual.cli.commands import add_command, add_task_options, load_task
from icl_dual.finetuning import REPLICAS
from icl_dual.plots import LAYERWISE
from icl_dual.scripts.common import (
    HEADINGS,
    add_device_options,
    count,
    finish,
    loading,
    model_name,
    model_title,
    output_folder,
    panels,
    positive,
    rate,
    replica_count,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_text

EXAMPLES = """
icl-dual compare smollm2-135m --rows films.csv --labels bad good
icl-dual compare ./my-model --rows mail.csv --label-column kind --template "Mail: {subject}\\nKind:" --out mail
icl-dual compare openai-community/gpt2 --task sst2 --k 4 --queries 50 --seeds 1 2 3
"""
DEFAULT_K = 8
DEFAULT_QUERIES = 50


def add_commands(subparsers: Any) -> None:
    """Add the command."""
    summary = "Compare in-context learning with finetuning on a model and a task of your own: a table and a figure."
    parser = add_command(subparsers, "compare", run, summary=summary, examples=EXAMPLES)
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help="packaged model, hub id, folder or .gguf file")
    add_task_options(parser)
    add("--k", type=positive, default=DEFAULT_K, help="demonstrations (%(default)s)")
    add("--queries", type=positive, help=f"queries ({DEFAULT_QUERIES}, or all where there are fewer)")
    add("--seeds", type=count, nargs="+", default=[1], help="draws of the demonstrations (1)")
    add("--lr", type=rate, default=0.001, help="finetuning's learning rate (%(default)s, not chosen for the task)")
    add(
        "--replicas",
        type=replica_count,
        default=REPLICAS,
        help="repeats of the finetuning that show how stable its numbers are; 0: none (%(default)s)",
    )
    add_device_options(parser)
    add("--out", type=output_folder, default="comparison", help="folder for table, figure and cells (%(default)s)")
    parser.set_defaults(stopped="Finished cells stay in {out}/cells; the same command goes on from them.")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run a cell for each seed, write tables and figure, and return the headline metrics and the files."""
    task = load_task(args)
    n_queries = args.queries or min(DEFAULT_QUERIES, task.pool_sizes["evaluation"])
    print(f"the first query of {task.name}, of {task.pool_sizes['evaluation']}:\n{task.prompt(task.queries(1)[0])}\n")
    cells = [
        icl.Cell(args.model, task.name, args.k, seed, args.lr, n_queries=n_queries, replicas=args.replicas)
        for seed in dict.fromkeys(args.seeds)
    ]
    _check_same_settings(cells, args.out / "cells")
    results = icl.run_study(cells, args.out / "cells", tasks=[task], **loading(args))
    write_tables(results, args.out)
    write_figure(results, args.out)
    write_page(results, task, args.out)
    for result in results:
        print(f"\nseed {result.cell.seed}\n{result.comparison}")
    print(f"\nThe learning rate {args.lr:g} was not chosen for this task: compare several, in folders of their own")
    print(f"\nTable and figure are in {args.out}/; {args.out}/README.md says how they were made")
    summaries = [{"seed": result.cell.seed, **_summary(result)} for result in results]
    return {"cells": summaries, "files": sorted(str(path) for path in args.out.iterdir() if path.is_file())}


def _check_same_settings(cells: Sequence[icl.Cell], folder: Path) -> None:
    """Refuse a folder with cells that differ in more than the seed: its table and figure would be replaced.

    Raises:
        StudyError: there is such a cell.
    """
    expected = {_without_seed(cell.folder_in(folder)) for cell in cells}
    others = [path.name for path in sorted(folder.glob("*_seed*")) if _without_seed(path) not in expected]
    if others:
        raise icl.StudyError(
            f"expected {folder} without cells of other settings than {min(expected)}, got {others[0]}, whose table and "
            "figure would be replaced: choose another folder with --out, or delete this one"
        )


def _without_seed(path: Path) -> str:
    """Return the name of a cell's folder for any seed."""
    return re.sub(r"_seed\d+_", "_seed…_", path.name)


def _summary(result: icl.CellResult) -> dict[str, Any]:
    """Return accuracies and headline metrics as JSON values; undefined numbers are null."""
    rows = result.comparison.summary().to_dict("records")
    metrics = [{str(name): _json_value(value) for name, value in row.items()} for row in rows]
    return {"accuracy": result.comparison.accuracy, "metrics": metrics}


def _json_value(value: Any) -> Any:
    """Return a cell of a frame as a JSON value."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tables(results: Sequence[icl.CellResult], out: Path) -> None:
    """Write `metrics.csv` and `metrics.md`, the headline metrics, and `results.csv`, every number by layer."""
    summaries = {result.cell.seed: result.comparison.summary() for result in results}
    headline = pd.concat([frame.assign(seed=seed) for seed, frame in summaries.items()], ignore_index=True)
    headline.insert(0, "seed", headline.pop("seed"))
    write_csv(out / "metrics.csv", headline, float_format="%.6g")
    texts = [f"Seed {result.cell.seed}:\n\n```text\n{result.comparison}\n```\n" for result in results]
    write_text(out / "metrics.md", "\n".join(texts))
    numbers = pd.concat([result.to_frame() for result in results])
    numbers["model"] = numbers["model"].map(short)
    write_csv(out / "results.csv", numbers, float_format="%.6g")


def write_figure(results: Sequence[icl.CellResult], out: Path) -> None:
    """Draw the metrics by layer, with what they are held against, and how often each label is predicted."""
    comparisons = [result.comparison for result in results]
    fig, rows = panels(2, rows=2, sharex=False, sharey="none", height=3.2)
    axes = [ax for row in rows for ax in row]
    for metric, ax in zip(LAYERWISE, axes, strict=False):
        icl.plots.layers(comparisons, metric, ax=ax)
    icl.plots.label_counts(comparisons, results[0].provenance["label_words"], ax=axes[-1])
    for ax in axes:
        icl.plots.legend_below(ax, ncols=1)  # a panel is half a page wide
    cell = results[0].cell
    title = f"{model_title(cell.model)} on {cell.task}, k = {cell.k}, lr = {cell.lr:g}, {cell.n_queries} queries"
    finish(fig, [], title, out / "comparison")


PAGE = """{heading}

`icl-dual compare`, model {model}, task {task}: template {template}, labels {labels}.
k = {k}, {n_queries} queries, seeds {seeds}, learning rate {lr:g}, {replicas} replicas of the finetuning.
{versions}.

| file | what it shows |
|---|---|
| `comparison` (`.png`, `.pdf`) | SimAOU, SimAM and Kendall by layer, with baselines; how often labels are predicted |
| `metrics` (`.md`, `.csv`) | the headline metrics with 95 % intervals, what each is held against, and a verdict |
| `results.csv` | every number: metric, layer (empty: all), value, spread, n |
| `cells` | the cells, from which the same command draws again |

{accuracies}

- ZSL is zero-shot, ICL in context, FT finetuned.
- Bands are ±1.96 standard errors over queries, seeds averaged. Dotted lines hold the range over replicas.
- Where one label is predicted for every query, the model does not do the task, whatever its similarities are.
- The learning rate was given, and not chosen for this task. Other rates give other numbers.
"""


def write_page(results: Sequence[icl.CellResult], task: icl.Task, out: Path) -> None:
    """Write the page that says how table and figure were made."""
    cell, provenance = results[0].cell, results[0].provenance
    accuracies = pd.DataFrame({"seed": str(result.cell.seed), **result.comparison.accuracy} for result in results)
    text = PAGE.format(
        heading=HEADINGS[0],
        model=markdown_text(model_title(cell.model)),
        task=markdown_code(task.name),
        template=markdown_code(task.template),
        labels=", ".join(map(markdown_code, task.label_words)),
        k=cell.k,
        n_queries=cell.n_queries,
        seeds=", ".join(str(result.cell.seed) for result in results),
        lr=cell.lr,
        replicas=cell.replicas,
        versions=", ".join(f"{name} {number}" for name, number in provenance["versions"].items()),
        accuracies=markdown(accuracies, floatfmt=".3f"),
    )
    write_text(out / "README.md", text)
