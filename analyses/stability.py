"""Where a comparison is stable: metrics along the learning rate, with their spread over replicas of the finetuning.

Runs a cell with replicas for each number of demonstrations and each rate, draws metrics along the rate, and lists the
value of each replica. A stopped run goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import icl_dual as icl
from icl_dual.scripts import paper_tables
from icl_dual.scripts.common import (
    SHARED,
    TITLES,
    cell_parser,
    command_line,
    count,
    finish,
    legend_beside,
    loading,
    model_title,
    output_folder,
    positive,
    rate,
    run_script,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_text

METRICS = ("SimAOU", "SimAM after FT", "SimAM after FT without massive tokens", "SimAMΔ")
RATES = (1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 8e-4, 1e-3, 1.5e-3, 2e-3)


def make_parser() -> argparse.ArgumentParser:
    parser = cell_parser(__doc__)
    add = parser.add_argument
    add("--ks", type=positive, nargs="+", default=[32], help="numbers of demonstrations (%(default)s)")
    add("--seed", type=count, default=1, help="draw of the demonstrations (%(default)s)")
    add("--lrs", type=rate, nargs="+", default=list(RATES), help="learning rates (%(default)s)")
    add("--out", type=output_folder, default="figures/stability", help="folder for cells and figure (%(default)s)")
    parser.set_defaults(tasks=["sst2"], queries=50)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.replicas < 2:
        parser.error(f"expected --replicas of at least 2, got {args.replicas}: without replicas there is no spread")
    if args.k is not None or args.lr is not None:
        parser.error("expected --ks and --lrs instead of --k and --lr")
    return args


def plan(args: argparse.Namespace) -> list[icl.Cell]:
    """Return the cells: all rates of a task and a number of demonstrations one after another, which share captures."""
    return [
        icl.Cell(
            model=args.model,
            task=task,
            k=k,
            seed=args.seed,
            lr=lr,
            n_queries=args.queries,
            protocol=args.protocol,
            source=args.source,
            replicas=args.replicas,
        )
        for task in dict.fromkeys(args.tasks)
        for k in dict.fromkeys(args.ks)
        for lr in sorted(set(args.lrs))
    ]


def values_by_replica(results: Sequence[icl.CellResult]) -> pd.DataFrame:
    """Return a row for each cell, metric and finetuning: the run itself, and each replica on the first queries."""
    rows = []
    for result in results:
        comparison, cell = result.comparison, result.cell
        assert comparison.stability is not None
        for metric in METRICS:
            interval = comparison.intervals()[metric]
            about = {"task": cell.task, "k": cell.k, "lr": cell.lr, "metric": metric, "unstable": interval.unstable}
            rows.append(about | {"finetuning": "the run itself", "value": interval.value})
            names = comparison.stability.replicas
            for name, shift in zip(names, comparison.shifts(metric)[0].tolist(), strict=True):
                rows.append(about | {"finetuning": name, "value": interval.value + shift})
    return pd.DataFrame(rows)


PANELS = {
    "accuracy": {"after finetuning": "FT accuracy", "zero-shot": "ZSL accuracy"},
    "SimAM (cosine)": {
        "after finetuning": "SimAM after FT",
        "the same, without massive tokens": "SimAM after FT without massive tokens",
        "zero-shot (before finetuning)": "SimAM before FT",
    },
    "similarity of changes (cosine)": {
        "SimAOU": "SimAOU",
        "SimAMΔ": "SimAMΔ",
        "SimAOU of a random update": "SimAOU random update",
    },
}
"""The panels of a column from the top: the y axis's text, then the metric of each curve by its name in the legend."""


def draw(results: Sequence[icl.CellResult], title: str, path: Path) -> None:
    """Draw metrics along the rate, with the zero-shot values, a column for each task and number of demonstrations."""
    columns = list(dict.fromkeys((result.cell.task, result.cell.k) for result in results))
    size = icl.plots.PAGE_WIDTH, 0.9 + 1.6 * len(PANELS)
    fig, axes = plt.subplots(len(PANELS), len(columns), figsize=size, squeeze=False, sharex="col", sharey="row")
    for index, (task, k) in enumerate(columns):
        chosen = [result for result in results if (result.cell.task, result.cell.k) == (task, k)]
        intervals = {result.cell.lr: result.comparison.intervals() for result in chosen}
        for ax, (label, metrics) in zip(axes[:, index], PANELS.items(), strict=True):
            estimates = {
                text: {lr: of_cell[name] for lr, of_cell in intervals.items() if name in of_cell}
                for text, name in metrics.items()
            }
            icl.plots.curves(estimates, ylabel=label if index == 0 else "", ax=ax)
            ax.set(xscale="log")
            ax.minorticks_off()
            ax.set_xticks(list(intervals), [f"{1000 * lr:g}" for lr in intervals])
        axes[0, index].set_title(f"{TITLES[task]}, k = {k}")
        axes[-1, index].set_xlabel("learning rate (10⁻³)")
    for ax in axes[:, -1]:
        legend_beside(ax)
    finish(fig, list(axes.flat), title, path, labels=SHARED)


def describe(args: argparse.Namespace) -> str:
    return f"{model_title(args.model)}, {args.queries} queries, seed {args.seed}, protocol {args.protocol}"


def summary(results: Sequence[icl.CellResult]) -> pd.DataFrame:
    """Return a row for each cell: its metrics with intervals, and where massive activations are."""
    return pd.DataFrame(
        {"task": TITLES[result.cell.task], "k": result.cell.k, "lr": f"{result.cell.lr:g}"}
        | {metric: result.comparison.intervals()[metric].format() for metric in METRICS}
        | {"largest residual norm ZSL / ICL / FT": norms(result)}
        for result in results
    )


def norms(result: icl.CellResult) -> str:
    by_setting = result.provenance["massive_activations"].values()
    return " / ".join(f"{numbers['largest_norm']:,.0f}" for numbers in by_setting)


def write(args: argparse.Namespace) -> None:
    """Run the cells that are not finished, and write the table, the figure and the page."""
    results = icl.run_study(plan(args), args.out / "cells", **loading(args))
    by_replica = values_by_replica(results)
    write_csv(args.out / "replicas.csv", by_replica, float_format="%.6g")
    draw(results, f"Metrics along the learning rate, {describe(args)}", args.out / "rates")
    provenance = results[0].provenance
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    command = command_line(__file__, make_parser(), args, always=("model", "tasks", "ks", "queries"))
    cells = markdown(summary(results), disable_numparse=True)
    origin = f"{markdown_code(short(args.model))}, {provenance['model']}, {provenance['precision']}"
    title = f"{markdown_text(describe(args))} ({origin})"
    page = f"""# Stability along the learning rate

    {command}

{title}. {versions}.

![metrics along the learning rate](rates.png)

Each point is a cell with its 95 % interval as a band; a cross marks a cell that is unstable.
{paper_tables.replicas_note(results)}

{cells}

The largest residual norm is that of the query's own tokens, over layers and queries. `replicas.csv` has the value of
every metric for each replica: that of the run, moved by the replica's shift on its first queries.
"""
    write_text(args.out / "README.md", page)
    print(f"{cells}\n\nAll of it is in {args.out}/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv, stopped="Finished cells stay in {out}/cells; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
