"""Each metric of the paper beside all its controls, with intervals and paired tests, and what of its claims is left.

For every task and seed: the paper's comparison; the same of models that have learned nothing; with a random change of
weights for finetuning's; with other contexts than the demonstrations that were finetuned on; with other finetunings;
with fewer demonstrations; and with the demonstrations in several orders. A stopped run goes on where it was.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import control_tables
import matplotlib.pyplot as plt
import pandas as pd
from control_tables import CLAIM, CONTEXTS, FAMILIES, MODELS, VARIANTS, WEIGHTS, Runs
from matplotlib.axes import Axes
from tqdm.auto import tqdm

import icl_dual as icl
from icl_dual.contexts import draw_orders
from icl_dual.scripts.common import (
    DATA,
    SHARED,
    TITLES,
    cell_parser,
    command_line,
    count,
    default_lr,
    finish,
    label_outer,
    legend_beside,
    loading,
    model_title,
    output_folder,
    panels,
    positive,
    run_script,
)
from icl_dual.scripts.outputs import markdown, markdown_text, write_csv, write_text
from icl_dual.scripts.paper_tables import interval_of, replicas_note
from icl_dual.statistics import Interval
from icl_dual.storage import check_same_settings, load_tensors

OTHER_TASK = {"agnews": "sst2"}
"""The task of the demonstrations of another task, where that is not AG News."""

KINDS = ["claim", *FAMILIES, "variants"]

Orders = Mapping[str, Sequence[icl.OrderSensitivity]]


def make_parser() -> argparse.ArgumentParser:
    parser = cell_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=count, nargs="+", default=[1, 2, 3], help="draws of the demonstrations (1 2 3)")
    add(
        "--ks",
        type=positive,
        nargs="*",
        default=[1, 4, 16],
        help="smaller numbers of demonstrations to add (%(default)s)",
    )
    add(
        "--orders",
        type=count,
        default=3,
        help="orders of the demonstrations, the first as drawn; 0: none (%(default)s)",
    )
    add(
        "--out",
        type=output_folder,
        default="figures/controls",
        help="folder for cells, tables and figures (%(default)s)",
    )
    parser.set_defaults(tasks=["sst2", "mr", "subj"])
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def plan(args: argparse.Namespace) -> dict[str, dict[str, list[icl.Cell]]]:
    """Return the cells of each row, by task and seed."""
    _check_counts(args)
    rows = MODELS | {CLAIM: {}} | WEIGHTS | CONTEXTS | VARIANTS | {f"k = {k}": {"k": k} for k in args.ks}
    cells: dict[str, dict[str, list[icl.Cell]]] = {row: {} for row in rows}
    for task in dict.fromkeys(args.tasks):
        for seed in dict.fromkeys(args.seeds):
            cell = icl.Cell(
                model=args.model,
                task=task,
                k=icl.PAPER_K[task] if args.k is None else args.k,
                seed=seed,
                lr=default_lr(args.model, task) if args.lr is None else args.lr,
                n_queries=args.queries,
                protocol=args.protocol,
                source=args.source,
                replicas=args.replicas,
            )
            for row, settings in rows.items():
                if settings.get("context_task") == task:
                    settings = settings | {"context_task": OTHER_TASK[task]}
                varied = replace(cell, **settings)
                if args.lr is None and {"loss", "method", "trained"} & varied.variation.keys():
                    varied = replace(varied, lr=default_lr(args.model, task, varied))
                cells[row].setdefault(task, []).append(varied)
    return cells


def _check_counts(args: argparse.Namespace) -> None:
    """Refuse numbers of demonstrations that cannot be run, before anything runs."""
    ks = {icl.PAPER_K[task] if args.k is None else args.k for task in args.tasks}
    if min(ks) < 2:
        raise icl.StudyError(f"expected --k from 2, for there to be another order, got {min(ks)}")
    if wrong := [k for k in args.ks if not 1 <= k < min(ks)]:
        raise icl.StudyError(f"expected --ks from 1 to below --k, which is {min(ks)}, got {wrong}")
    if args.orders == 1:
        raise icl.StudyError("expected --orders from 2, or 0 for none, got 1")
    draw_orders(min(ks), max(args.orders, 2), seed=0)


def run(rows: dict[str, dict[str, list[icl.Cell]]], args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """Run all cells, ordered so that each shares what it can with the one before it."""
    cells = [cell for by_task in rows.values() for of_task in by_task.values() for cell in of_task]
    order = {row: number for number, row in enumerate(rows)}
    place = {cell: order[row] for row, by_task in rows.items() for of_task in by_task.values() for cell in of_task}
    models = ("untrained", "random-blocks", "trained")  # what may be refused comes first
    cells.sort(key=lambda cell: (models.index(cell.weights), cell.seed, args.tasks.index(cell.task), place[cell]))
    finished = icl.run_study(cells, args.out / "cells", **loading(args))
    results = dict(zip(cells, finished, strict=True))
    return {
        row: {task: [results[cell] for cell in of_task] for task, of_task in by.items()} for row, by in rows.items()
    }


def run_orders(claim: Mapping[str, Sequence[icl.CellResult]], args: argparse.Namespace) -> Orders:
    """Return the order sensitivity of every task and seed, each saved when it is finished."""
    model, by_task = None, {}
    todo = [(task, result) for task, results in claim.items() for result in results if args.orders]
    for task, result in tqdm(todo, desc="orders", unit="cell"):
        cell, folder = result.cell, args.out / "orders" / result.cell.name
        provenance = result.provenance
        origin = {name: provenance[name] for name in ("model", "dtype")}
        if provenance.get("precision", origin["dtype"]) != origin["dtype"]:
            origin["precision"] = provenance["precision"]
        settings = {"n_orders": args.orders, "settings": asdict(cell), "origin": origin}
        if folder.exists():
            saved = load_tensors(folder)[1]
            saved["settings"] = asdict(icl.Cell.from_settings(saved["settings"]))  # of an older version, too
            check_same_settings(folder, settings, saved)
        else:
            started = time.perf_counter()
            model = model or icl.load_model(args.model, **loading(args))
            of = icl.load_task(task, cell.source, protocol=cell.protocol)
            demonstrations, queries = of.demonstrations(cell.k, cell.seed), of.queries(cell.n_queries)
            sensitivity = icl.measure_order_sensitivity(
                model, of, demonstrations, queries, n_orders=args.orders, lr=cell.lr, seed=cell.seed
            )
            versions = result.provenance["versions"]
            sensitivity.save(folder, settings | {"versions": versions, "seconds": time.perf_counter() - started})
        by_task.setdefault(task, []).append(icl.OrderSensitivity.load(folder))
    return by_task


IN_FIGURE = {
    CLAIM: "ICL and finetuning (the claim)",
    "paper's random baseline": "random vector or scores (the paper's)",
    "random updates for both": "two random updates (inflation)",
    "ICL and ZSL": "ICL and zero-shot (before finetuning)",
    "ICL's answers dealt at random": "ICL's answers, shuffled over queries",
    "both on flipped labels": "both ICL and FT on flipped labels",
}
"""The names of rows in the figure, where they differ from those in the tables."""

PANELS = {
    "SimAOU": ("SimAOU", "cosine"),
    "SimAOU unnormalised": ("SimAOU, un-\nnormalised", "cosine"),
    "SimAM after FT": ("SimAM\nafter FT", "cosine"),
    "SimAMΔ": ("SimAMΔ", "cosine"),
    "Kendall": ("Kendall,\nqueries", "Kendall's τ"),
    "Kendall on keys": ("Kendall,\nkeys", "Kendall's τ"),
    "Rec2FTP": ("Rec2FTP", "share"),
}
"""The title and the unit of each metric in the figure. Kendall is by finetuning's queries, or by its keys."""

FAMILY_NAMES = {
    "claim": "the claim",
    "nulls": "nulls by formula",
    "models": "models that learned nothing",
    "weights": "random change of weights",
    "contexts": "contexts not finetuned on",
    "variants": "variants (no controls)",
}
"""The families of rows, in the legend."""

UNSTABLE = "unstable over finetuning replicas"

SETTINGS = {"ICL": "in context", "FT": "finetuned"}
"""The settings whose accuracy depends on the number of demonstrations, in words."""


def draw(scores: pd.DataFrame, title: str, path: Path) -> None:
    """Draw the mean over tasks of every metric and control: a panel a metric, a row a control, families apart.

    The interval of the claim is a band over all rows: a control within it does not differ. Tasks, and metrics without
    massive tokens, are in the table.
    """
    scores = scores.query("not metric.str.contains('without massive tokens') and task == 'mean'")
    rows = scores.drop_duplicates("what is compared").sort_values(
        "kind", key=lambda kinds: kinds.map(KINDS.index), kind="stable"
    )
    names, metrics = rows["what is compared"].tolist(), list(scores["metric"].unique())
    columns = -(-len(metrics) // 2)
    size = icl.plots.PAGE_WIDTH, 1.4 + 2 * (0.35 + 0.135 * len(names))
    fig, axes = plt.subplots(2, columns, figsize=size, sharey=True, squeeze=False)
    for metric, ax in zip(metrics, axes.flat, strict=False):
        of_metric = scores.query("metric == @metric").to_dict("records")
        _draw_controls(ax, {row["what is compared"]: row for row in of_metric}, names)
        for border in rows["kind"].ne(rows["kind"].shift()).to_numpy().nonzero()[0][1:]:
            ax.axhline(border - 0.5, color="0.7", linewidth=0.6)
        name, unit = PANELS.get(metric, (metric, ""))
        ax.set(title=icl.plots.literal(name), xlabel=unit)
    for ax in axes.flat:
        ax.set_yticks(range(len(names)), [icl.plots.literal(IN_FIGURE.get(name) or name) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
    for ax in axes.flat[len(metrics) :]:
        ax.remove()
    finish(fig, list(axes.flat[: len(metrics)]), title, path)


def _draw_controls(ax: Axes, rows: Mapping[str, Mapping[Any, Any]], names: Sequence[str]) -> None:
    """Draw the rows of one metric, and the claim's interval over all of them."""
    claim = control_tables.read_interval(rows[CLAIM])
    if claim.known:
        ax.axvspan(claim.low, claim.high, color="#56B4E9", alpha=0.35, linewidth=0, label="95 % interval of the claim")
    ax.axvline(0, color="0.8", linewidth=0.6, zorder=0)
    for at, name in enumerate(names):
        if name not in rows:
            continue
        estimate, kind = control_tables.read_interval(rows[name]), rows[name]["kind"]
        if math.isnan(estimate.value):
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            ax.text(0.03, at, "undefined", transform=ax.get_yaxis_transform(), va="center", fontsize=7, bbox=ground)
            continue
        look = icl.plots.series_style(KINDS.index(kind))
        style = {"color": look["color"], "marker": look["marker"], "markersize": 3.5, "linestyle": "none"}
        style |= {} if estimate.known else {"markerfacecolor": "white"}
        ax.plot([estimate.value], [at], label=FAMILY_NAMES[kind], **style)
        ax.hlines([at], [estimate.low], [estimate.high], color=look["color"], linewidth=0.9)
        if estimate.unstable:
            ax.plot([estimate.value], [at], linestyle="none", marker="x", markersize=6, color="black", label=UNSTABLE)
    icl.plots.explain_line(ax, "95 % interval over queries and seeds", color="0.4", linewidth=0.9)
    ax.grid(axis="y", color="0.93")
    ax.set_axisbelow(True)


def draw_demonstrations(runs: Runs, title: str, path: Path) -> None:
    """Draw accuracy and SimAOU along the number of demonstrations; with none, all settings are zero-shot."""
    fig, axes = panels(len(runs[CLAIM]), rows=2)
    for task, top, bottom in zip(runs[CLAIM], *axes, strict=True):
        chosen = [by_task[task] for row, by_task in runs.items() if row == CLAIM or row.startswith("k = ")]
        by_k = {results[0].cell.k: results for results in sorted(chosen, key=lambda results: results[0].cell.k)}

        def estimates(name: str, by_k: Mapping[int, Sequence[icl.CellResult]] = by_k) -> dict[int, Interval]:
            return {k: interval_of(name, results) for k, results in by_k.items()}

        none = {0: interval_of("ZSL accuracy", runs[CLAIM][task])}
        accuracies = {text: none | estimates(f"{setting} accuracy") for setting, text in SETTINGS.items()}
        columns = {"SimAOU of ICL and finetuning": "SimAOU", "of a random update of FT's size": "SimAOU random update"}
        likeness = {name: estimates(column) for name, column in columns.items()}
        icl.plots.curves(accuracies, ylabel="accuracy", ax=top)
        icl.plots.curves(likeness, ylabel="SimAOU (cosine)", ax=bottom)
        top.axhline(none[0].value, color="black", linestyle=":", linewidth=0.8, label="zero-shot")
        top.set_title(TITLES[task])
        bottom.set_xlabel("demonstrations, k")
    for row in axes:
        for ax in row:
            label_outer(ax)
        legend_beside(row[-1])
    finish(fig, [ax for row in axes for ax in row], title, path, labels=SHARED)


def describe(args: argparse.Namespace) -> str:
    queries = "all" if args.queries is None else args.queries
    seeds = f"seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))}"
    return f"{model_title(args.model)}, {queries} queries a task, {seeds}, protocol {args.protocol}"


def command(args: argparse.Namespace) -> str:
    """Return the command that makes the same tables and figures."""
    always = ("model", "tasks", "queries", "seeds", "ks", "orders")
    return command_line(__file__, make_parser(), args, always=always)


def write_page(tables: Mapping[str, pd.DataFrame], runs: Runs, orders: Orders, args: argparse.Namespace) -> None:
    text = (DATA / "controls_page.md").read_text(encoding="utf-8")
    with_orders, _, how = text.partition("<!-- orders -->\n")[2].partition("<!-- how -->\n")
    text = text.partition("<!-- orders -->\n")[0] + (with_orders if orders else "") + how
    provenance = runs[CLAIM][args.tasks[0]][0].provenance
    computed_in = provenance.get("precision", provenance["dtype"])
    fill = {name: markdown(frame, disable_numparse=True) for name, frame in tables.items()}
    fill |= {
        "model": markdown_text(model_title(args.model)),
        "command": command(args),
        "about": f"{markdown_text(describe(args))}; {provenance['model']}, {computed_in}",
        "versions": ", ".join(f"{name} {number}" for name, number in provenance["versions"].items()),
        "minutes": f"{seconds(runs, args) / 60:.0f}",
        "families": "\n".join(f"- *{family}*: {what}" for family, what in FAMILIES.items()),
        "words": "\n".join(f"- {control_tables.in_words(row)}" for row in tables["claims"].to_dict("records")),
        "n_orders": str(args.orders),
        "replicas": replicas_note([result for of_task in runs[CLAIM].values() for result in of_task]),
        "rates_from": "given by hand"
        if args.lr
        else "chosen by `analyses/select_lr.py` on selection queries, apart from these, for each way of finetuning",
    }
    write_text(args.out / "README.md", text.format(**fill))


def seconds(runs: Runs, args: argparse.Namespace) -> float:
    """Return the seconds of all cells and orders together, without loading."""
    cells = {result.cell: result for by_task in runs.values() for results in by_task.values() for result in results}
    total = sum(sum(result.provenance["seconds"].values()) for result in cells.values())
    of_orders = [args.out / "orders" / result.cell.name for results in runs[CLAIM].values() for result in results]
    return total + sum(load_tensors(folder)[1]["seconds"] for folder in of_orders if args.orders)


def write(args: argparse.Namespace) -> None:
    """Run the cells and orders that are not finished, and write all tables and figures."""
    runs = run(plan(args), args)
    orders = run_orders(runs[CLAIM], args)
    scores = control_tables.scored(runs)
    against, estimates = control_tables.against_controls(scores), control_tables.estimates(scores)
    tables = {
        "claims": control_tables.claim_table(
            against, {metric: control_tables.unstable_cells(runs, metric) for metric in control_tables.CLAIMS}
        ),
        "against_controls": control_tables.against_table(against),
        "controls": control_tables.control_table(estimates),
        "orders": control_tables.order_table(orders),
        "accuracy": control_tables.accuracy_table(runs),
        "rates": control_tables.rate_table(runs),
    }
    for name, frame in (tables | {"controls": estimates}).items():
        write_csv(args.out / f"{name}.csv", frame, float_format="%.6g")
    tasks = ", ".join(TITLES[task] for task in args.tasks)
    heading = f"The paper's metrics and their controls, mean over {tasks}"
    ks = sorted({result.cell.k for results in runs[CLAIM].values() for result in results})
    rates = f"lr {args.lr:g}" if args.lr else "lr chosen for each task and way of finetuning"
    about = f"{describe(args)}, k = {' or '.join(map(str, ks))}, {rates}"
    draw(estimates, f"{heading}\n{about}", args.out / "controls")
    draw_demonstrations(runs, f"From no demonstration to all\n{describe(args)}", args.out / "demonstrations")
    write_page(tables, runs, orders, args)
    print(markdown(tables["claims"]))
    print(f"\nTables and figures are in {args.out}/; the page that explains them is {args.out}/README.md")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        parse, write, argv, stopped="Finished cells and orders stay in {out}; the same command goes on from them."
    )


if __name__ == "__main__":
    sys.exit(main())
