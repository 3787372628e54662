"""Each metric of the paper beside all its controls, with intervals and paired tests, and what of its claims is left.

For every task and seed: the paper's comparison; the same of models that have learned nothing; with a random change of
weights for finetuning's; with other contexts than the demonstrations that were finetuned on; with other finetunings;
with fewer demonstrations; and with the demonstrations in several orders. A stopped run goes on where it was.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import control_tables
import pandas as pd
import torch
from common import DATA, ERRORS, TITLES, cell_parser, default_lr, finish, panels
from control_tables import CLAIM, CONTEXTS, FAMILIES, MODELS, VARIANTS, WEIGHTS, Runs, Scores
from paper_tables import by_query, short
from tqdm.auto import tqdm

import icl_dual as icl
from icl_dual.assets import load_tensors
from icl_dual.controls import draw_orders
from icl_dual.intervals import bootstrap
from icl_dual.study import refuse_different

OTHER_TASK = {"agnews": "sst2"}
"""Whose demonstrations stand in context as another task's, where that is not AG News."""

Orders = Mapping[str, Sequence[icl.OrderSensitivity]]


def parse() -> argparse.Namespace:
    parser = cell_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="draws of the demonstrations (1 2 3)")
    add("--ks", type=int, nargs="*", default=[1, 4, 16], help="fewer demonstrations, too (%(default)s)")
    add("--orders", type=int, default=3, help="of the demonstrations, their own among them; 0 for none (%(default)s)")
    add("--out", type=Path, default=Path("figures/controls"), help="where cells, tables and figures go (%(default)s)")
    parser.set_defaults(tasks=["sst2", "mr", "subj"])
    return parser.parse_args()


def plan(args: argparse.Namespace) -> dict[str, dict[str, list[icl.Cell]]]:
    """The cells of each row, by task and seed."""
    rows = MODELS | {CLAIM: {}} | WEIGHTS | CONTEXTS | VARIANTS | {f"k = {k}": {"k": k} for k in args.ks}
    found: dict[str, dict[str, list[icl.Cell]]] = {row: {} for row in rows}
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
            )
            for row, settings in rows.items():
                varied = replace(cell, **settings)
                if varied.context_task == task:
                    varied = replace(varied, context_task=OTHER_TASK[task])
                if args.lr is None and {"loss", "method", "trained"} & varied.variation.keys():
                    varied = replace(varied, lr=default_lr(args.model, task, varied))
                found[row].setdefault(task, []).append(varied)
    if args.orders:  # before anything runs
        fewest = min(cell.k for cells in found[CLAIM].values() for cell in cells)
        draw_orders(fewest, args.orders, seed=0)
    return found


def run(rows: dict[str, dict[str, list[icl.Cell]]], args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """All cells, ordered so that each shares what it can with the one before it."""
    cells = [cell for by_task in rows.values() for of_task in by_task.values() for cell in of_task]
    order = {row: number for number, row in enumerate(rows)}
    place = {cell: order[row] for row, by_task in rows.items() for of_task in by_task.values() for cell in of_task}
    cells.sort(key=lambda cell: (cell.weights == "trained", cell.seed, args.tasks.index(cell.task), place[cell]))
    dtype = getattr(torch, args.dtype)
    results = dict(zip(cells, icl.run_study(cells, args.out / "cells", device=args.device, dtype=dtype), strict=True))
    return {
        row: {task: [results[cell] for cell in of_task] for task, of_task in by.items()} for row, by in rows.items()
    }


def run_orders(claim: Mapping[str, Sequence[icl.CellResult]], args: argparse.Namespace) -> Orders:
    """Order sensitivity of every task and seed, each saved when it is done."""
    model, found = None, {}
    todo = [(task, result.cell) for task, results in claim.items() for result in results if args.orders]
    for task, cell in tqdm(todo, desc="orders", unit="cell"):
        folder = args.out / "orders" / cell.name
        settings = {"n_orders": args.orders, "settings": asdict(cell)}
        if folder.exists():
            refuse_different(folder, settings, load_tensors(folder)[1])
        else:
            started = time.perf_counter()
            model = model or icl.load_model(args.model, device=args.device, dtype=getattr(torch, args.dtype))
            of = icl.load_task(task, cell.source, protocol=cell.protocol)
            shown, asked = of.demonstrations(cell.k, cell.seed), of.queries(cell.n_queries)
            made = icl.order_sensitivity(model, of, shown, asked, n_orders=args.orders, lr=cell.lr, seed=cell.seed)
            made.save(folder, settings | {"seconds": time.perf_counter() - started})
        found.setdefault(task, []).append(icl.OrderSensitivity.load(folder))
    return found


def draw(scores: Scores, title: str, path: Path) -> None:
    """All controls of all metrics: a panel a metric, a row a control."""
    families = list(dict.fromkeys(family for by_family in scores.values() for family in by_family))
    rows = list(dict.fromkeys(row for family in families for of in scores.values() for row in of[family]))
    fig, (axes,) = panels(len(scores), height=0.24 * len(rows), sharex=False)
    for (metric, by_family), ax in zip(scores.items(), axes, strict=True):
        found = {row: by_task for by_row in by_family.values() for row, by_task in by_row.items()}
        estimates = {row: {TITLES[task]: one.interval for task, one in found.get(row, {}).items()} for row in rows}
        icl.plots.dots(estimates, ax=ax)
        ax.set_title(metric, fontsize="medium")
        ax.label_outer()
    finish(fig, axes, title, path)


def draw_demonstrations(runs: Runs, title: str, path: Path) -> None:
    """Accuracy and SimAOU against the number of demonstrations; with none, all settings are zero-shot."""
    fig, axes = panels(len(runs[CLAIM]), rows=2)
    for task, top, bottom in zip(runs[CLAIM], *axes, strict=True):
        chosen = [by_task[task] for row, by_task in runs.items() if row == CLAIM or row.startswith("k = ")]
        by_k = {results[0].cell.k: results for results in sorted(chosen, key=lambda results: results[0].cell.k)}
        none = {0: bootstrap(by_query(runs[CLAIM][task], "ZSL accuracy"))}
        accuracies = {
            setting: none | {k: bootstrap(by_query(found, f"{setting} accuracy")) for k, found in by_k.items()}
            for setting in ("ICL", "FT")
        }
        columns = {CLAIM: "SimAOU", "random update of FT's size": "SimAOU random update"}
        likeness = {
            name: {k: bootstrap(by_query(found, column)) for k, found in by_k.items()}
            for name, column in columns.items()
        }
        icl.plots.curves(accuracies, ylabel="accuracy", ax=top)
        icl.plots.curves(likeness, ylabel="SimAOU", ax=bottom)
        top.set_title(TITLES[task])
        bottom.set_xlabel("demonstrations")
    for row in axes:
        row[0].legend(frameon=False, fontsize="small")
        for ax in row:
            ax.label_outer()
    finish(fig, [], title, path)


def describe(args: argparse.Namespace) -> str:
    queries = "all" if args.queries is None else args.queries
    seeds = f"seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))}"
    return f"{short(args.model)}, {queries} queries a task, {seeds}, protocol {args.protocol}"


def command(args: argparse.Namespace) -> str:
    """The command that makes the same again, wherever its output goes."""
    given = {"model": [short(args.model)], "tasks": args.tasks, "seeds": args.seeds, "ks": args.ks}
    given |= {"queries": ["all" if args.queries is None else args.queries], "orders": [args.orders]}
    given |= {name: [value] for name in ("k", "lr", "source") if (value := getattr(args, name)) is not None}
    usual = {"protocol": "answer", "dtype": "float32"}
    given |= {name: [getattr(args, name)] for name, value in usual.items() if getattr(args, name) != value}
    return "python analyses/controls.py " + " ".join(f"--{n} {' '.join(map(str, v))}" for n, v in given.items())


def write_page(tables: Mapping[str, pd.DataFrame], runs: Runs, orders: Orders, args: argparse.Namespace) -> None:
    text = (DATA / "controls_page.md").read_text()
    with_orders, _, how = text.partition("<!-- orders -->\n")[2].partition("<!-- how -->\n")
    text = text.partition("<!-- orders -->\n")[0] + (with_orders if orders else "") + how
    provenance = runs[CLAIM][args.tasks[0]][0].provenance
    fill = {name: frame.to_markdown(index=False, disable_numparse=True) for name, frame in tables.items()}
    fill |= {
        "model": short(args.model),
        "command": command(args),
        "about": f"{describe(args)}; {provenance['model']}, {provenance['dtype']}",
        "versions": ", ".join(f"{name} {number}" for name, number in provenance["versions"].items()),
        "minutes": f"{seconds(runs, args.out) / 60:.0f}",
        "families": "\n".join(f"- *{family}*: {what}" for family, what in FAMILIES.items()),
        "words": "\n".join(f"- {control_tables.in_words(row)}" for row in tables["claims"].to_dict("records")),
        "n_orders": str(args.orders),
        "rates_from": "given by hand"
        if args.lr
        else "chosen by `analyses/select_lr.py` on selection queries, apart from these, for each way of finetuning",
    }
    (args.out / "README.md").write_text(text.format(**fill))


def seconds(runs: Runs, out: Path) -> float:
    """What all cells and orders took together, loading left out."""
    cells = {result.cell: result for by_task in runs.values() for results in by_task.values() for result in results}
    orders = sum(load_tensors(folder)[1]["seconds"] for folder in (out / "orders").glob("*"))
    return orders + sum(sum(result.provenance["seconds"].values()) for result in cells.values())


def main() -> int:
    args = parse()
    try:
        runs = run(plan(args), args)
        orders = run_orders(runs[CLAIM], args)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped. What is finished stays in {args.out}; the same command goes on.", file=sys.stderr)
        return 130
    scores = control_tables.scored(runs)
    against = control_tables.against_best(scores)
    tables = {
        "claims": control_tables.claim_table(against),
        "against_best": control_tables.against_table(against),
        "controls": control_tables.control_table(scores),
        "orders": control_tables.order_table(orders),
        "accuracy": control_tables.accuracy_table(runs),
        "rates": control_tables.rate_table(runs),
    }
    for name in ("claims", "against_best", "controls", "orders"):
        tables[name].to_csv(args.out / f"{name}.csv", index=False)
    draw(scores, f"The paper's metrics and their controls: {describe(args)}", args.out / "controls")
    draw_demonstrations(runs, f"From no demonstration to all: {describe(args)}", args.out / "demonstrations")
    write_page(tables, runs, orders, args)
    print(tables["claims"].to_markdown(index=False))
    print(f"\nTables, figures and what they say are in {args.out}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
