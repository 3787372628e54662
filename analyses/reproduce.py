"""The paper's comparison on a real model and real data: zero-shot, in-context learning and finetuning, layer by layer.

Runs one cell for each task and seed, then draws tables and figures from the saved cells. Cells that are complete are
not run again: a stopped run goes on where it was, and drawing alone needs no model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import DATA, ERRORS, TITLES, cell_parser, default_lr, finish, panels

import icl_dual as icl
from icl_dual.plots import LAYERWISE

ACCURACY_ROWS = ("ZSL accuracy", "FT accuracy", "ICL accuracy")
METRIC_ROWS = (
    "Rec2FTP random",
    "Rec2FTP",
    "SimAOU random",
    "SimAOU",
    "SimAM random",
    "SimAM before FT",
    "SimAM after FT",
    "Kendall random",
    "Kendall",
)
PER_CENT = (*ACCURACY_ROWS, "Rec2FTP random", "Rec2FTP")
PAPER_NOTE = "The paper's own values stand below ours: they are of other models and query sets."

Results = Sequence[icl.CellResult]


def parse() -> argparse.Namespace:
    parser = cell_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1], help="draws of the demonstrations (%(default)s)")
    add("--loss", choices=("all", "label"), default="all", help="finetuning's loss: all tokens, or the label word's")
    add("--balanced", action="store_true", help="balance the demonstrations' classes (default: as they fall)")
    add("--out", type=Path, default=Path("figures"), help="where cells, tables and figures go (%(default)s)")
    return parser.parse_args()


def plan(args: argparse.Namespace) -> list[icl.Cell]:
    return [
        icl.Cell(
            model=args.model,
            task=task,
            k=icl.PAPER_K[task] if args.k is None else args.k,
            seed=seed,
            lr=default_lr(args.model, task) if args.lr is None else args.lr,
            n_queries=args.queries,
            loss=args.loss,
            balanced=args.balanced,
        )
        for task in dict.fromkeys(args.tasks)
        for seed in dict.fromkeys(args.seeds)
    ]


def table(results: Results, rows: Sequence[str]) -> pd.DataFrame:
    """Ours and the paper's values in the paper's layout: a row a metric, a column a task."""
    paper = json.loads((DATA / "paper.json").read_text())
    tasks = [task for task in TITLES if any(result.cell.task == task for result in results)]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        values = {task: seed_values(results, task, row) for task in tasks}
        texts = {task: cell_text(results, task, row) for task in tasks}
        mean = pd.Series({task: found.mean() for task, found in values.items()}).mean(skipna=False)
        lines[results[0].cell.model, row] = texts | {"mean": number(mean, row)}
    for model, by_row in paper["models"].items():
        for row in (row for row in rows if row in by_row):
            shown = pd.Series(by_row[row], index=paper["tasks"])[tasks] / (100 if row in PER_CENT else 1)
            texts = {task: number(value, row) for task, value in zip(tasks, shown, strict=True)}
            lines[f"{model} (paper, another model)", row] = texts | {"mean": number(shown.mean(), row)}
    frame = pd.DataFrame.from_dict(lines, orient="index").rename(columns=TITLES)
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["model", "metric"])
    return frame.reset_index()


def seed_values(results: Results, task: str, row: str) -> pd.Series:
    """A metric of one task by seed; Rec2FTP, whose counts add up, and its baseline as one value for all seeds."""
    chosen = [result.comparison for result in results if result.cell.task == task]
    if row == "Rec2FTP":
        both, finetuned = rec2ftp_counts(results, task)
        return pd.Series([both / finetuned if finetuned else float("nan")])
    if row == "Rec2FTP random":
        pooled = [(c.rec2ftp.random * c.rec2ftp.finetuned, c.rec2ftp.finetuned) for c in chosen if c.rec2ftp.finetuned]
        expected, finetuned = sum(both for both, _ in pooled), sum(n for _, n in pooled)
        return pd.Series([expected / finetuned if finetuned else float("nan")])
    return pd.Series([c.overall().set_index("metric").loc[row, "value"] for c in chosen], dtype=float)


def rec2ftp_counts(results: Results, task: str) -> tuple[int, int]:
    chosen = [result.comparison.rec2ftp for result in results if result.cell.task == task]
    return sum(found.both for found in chosen), sum(found.finetuned for found in chosen)


def cell_text(results: Results, task: str, row: str) -> str:
    """A metric of one task: its mean over seeds, with their standard deviation where there are several."""
    values = seed_values(results, task, row)
    counts = " ({}/{})".format(*rec2ftp_counts(results, task)) if row == "Rec2FTP" else ""
    spread = f" ± {number(float(np.std(values.dropna(), ddof=1)), row)}" if values.count() > 1 else ""
    return number(values.mean(), row) + spread + counts


def number(value: float, row: str) -> str:
    if pd.isna(value):
        return "undefined"
    shown = round(100 * value, 1) if row in PER_CENT else round(value, 3)
    return f"{shown + 0.0:.{1 if row in PER_CENT else 3}f}"  # + 0.0: no minus before a rounded zero


def write_tables(results: Results, out: Path) -> None:
    captions = {
        "accuracy": (
            ACCURACY_ROWS,
            "Accuracy in per cent: zero-shot (ZSL), finetuned (FT), in-context learning (ICL).",
        ),
        "metrics": (
            METRIC_ROWS,
            "Rec2FTP in per cent, with its counts (FT and ICL right, ZSL wrong / FT right, ZSL wrong), summed over "
            "seeds; the others are means over queries and layers.",
        ),
    }
    n_seeds = len({result.cell.seed for result in results})
    spread = f" ± is the standard deviation over {n_seeds} seeds." if n_seeds > 1 else ""
    for name, (rows, caption) in captions.items():
        frame = table(results, rows)
        frame.to_csv(out / f"{name}.csv", index=False)
        text = frame.to_markdown(index=False, disable_numparse=True)
        note = f"{caption}{spread} The mean is over the tasks shown. {PAPER_NOTE}"
        (out / f"{name}.md").write_text(f"{note}\n\n{text}\n")
        print(f"\n{text}")


def label_counts(results: Results) -> pd.DataFrame:
    """How often each label is gold and is predicted, by task, seed and setting."""
    rows = []
    for result in results:
        words = result.provenance["label_words"]
        settings = {"gold": result.comparison.gold, **result.comparison.predictions}
        for setting, labels in settings.items():
            counts = labels.bincount(minlength=len(words)).tolist()
            for word, count in zip(words, counts, strict=True):
                rows.append([result.cell.model, result.cell.task, result.cell.seed, setting, word, count])
    return pd.DataFrame(rows, columns=["model", "task", "seed", "setting", "label", "count"])


def write_figures(results: Results, out: Path) -> None:
    tasks = [task for task in TITLES if any(result.cell.task == task for result in results)]
    for metric in LAYERWISE:
        fig, (axes,) = panels(len(tasks))
        for task, ax in zip(tasks, axes, strict=True):
            icl.plots.layers([r.comparison for r in results if r.cell.task == task], metric, ax=ax)
            ax.set_title(TITLES[task])
            ax.label_outer()
        finish(fig, axes, f"{metric} by layer, {describe(results)}", out / metric.lower())
    fig, (axes,) = panels(len(tasks))
    for task, ax in zip(tasks, axes, strict=True):
        chosen = [result for result in results if result.cell.task == task]
        icl.plots.label_counts([r.comparison for r in chosen], chosen[0].provenance["label_words"], ax=ax)
        ax.tick_params(axis="x", rotation=30)
        ax.set_title(TITLES[task])
        ax.label_outer()
    finish(fig, axes, f"What is predicted, {describe(results)}", out / "label_counts")


def describe(results: Results) -> str:
    cell = results[0].cell
    seeds = sorted({result.cell.seed for result in results})
    return f"{cell.model}, {cell.n_queries} queries a task, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def write_readme(results: Results, args: argparse.Namespace, out: Path) -> None:
    cell, provenance = results[0].cell, results[0].provenance
    given = {"model": args.model, "tasks": args.tasks, "queries": args.queries, "seeds": args.seeds}
    given |= {"k": args.k, "lr": args.lr}
    words = [f"--{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in given.items() if v]
    words += ["--loss label"] * (cell.loss == "label") + ["--balanced"] * cell.balanced
    runs = pd.DataFrame(
        {
            "task": TITLES[result.cell.task],
            "k": result.cell.k,
            "seed": result.cell.seed,
            "lr": result.cell.lr,
            "prompt tokens before the query": result.provenance["prefix_tokens"],
            "FT loss, first → last step": "{:.2f} → {:.2f}".format(*(result.provenance["losses"][i] for i in (0, -1))),
            "attention residual": f"{result.provenance['attention_residual']:.1e}",
        }
        for result in results
    )
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    rates = "given by hand" if args.lr else "chosen by `analyses/select_lr.py` on selection queries, apart from these"
    command = f"python analyses/reproduce.py {' '.join(words)}"
    (out / "README.md").write_text(f"""# How these were made

    {command}

Model `{cell.model}` ({provenance["model"]}, {provenance["dtype"]}), protocol `{cell.protocol}` (recorded at the token
that predicts the label), loss over {"all tokens" if cell.loss == "all" else "the label word"}, {cell.n_queries} queries
a task. Learning rates: {rates}. {versions}.

| file | what it shows |
|---|---|
| `accuracy.md`, `.csv` | accuracy of the three settings, the paper's values below |
| `metrics.md`, `.csv` | Rec2FTP, SimAOU, SimAM and Kendall with their baselines, the paper's values below |
| `simaou`, `simam`, `kendall` (`.png`, `.pdf`) | by layer; bands: ±1.96 standard errors over queries, seeds averaged |
| `label_counts` (`.png`, `.pdf`, `.csv`) | which labels are predicted: a model that always answers the same shows |
| `results.csv` | every number: model, task, k, seed, lr, protocol, metric, layer (empty: all), value, n |

{runs.to_markdown(index=False, disable_numparse=True)}

{(DATA / "how_to_read.md").read_text()}""")


def main() -> int:
    args = parse()
    try:
        results = icl.run_study(plan(args), args.out / "cells", device=args.device, dtype=getattr(torch, args.dtype))
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped. Finished cells stay in {args.out / 'cells'}; the same command goes on.", file=sys.stderr)
        return 130
    pd.concat([result.to_frame() for result in results]).to_csv(
        args.out / "results.csv", index=False, float_format="%.6g"
    )
    label_counts(results).to_csv(args.out / "label_counts.csv", index=False)
    write_tables(results, args.out)
    write_figures(results, args.out)
    write_readme(results, args, args.out)
    print(f"\nTables and figures are in {args.out}/; how each was made is in {args.out}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
