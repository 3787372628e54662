"""Choose a model's default learning rate for each task, on selection queries that no evaluation ever sees.

Finetunes on one draw of demonstrations (seed 0, which evaluations do not use) at all learning rates of a grid, and
keeps the one with the best accuracy on the selection split; ties go to the lower cross-entropy of the gold label.
The whole grid goes to figures/lr_selection/, the choice to analyses/data/default_lr.json, which reproduce.py and
controls.py read. Measured rows are kept, so a stopped run goes on where it was.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from common import lr_key, run_script, script_parser, variant_parser

import icl_dual as icl

DEFAULT_LR = Path(__file__).parent / "data" / "default_lr.json"
GRID = [digit * 10.0**exponent for exponent in (-4, -3, -2, -1) for digit in (1, 2, 5)]


def measure(model: icl.Model, prompts: icl.Prompts, delta: icl.WeightDelta | icl.DivergedError) -> dict[str, float]:
    if isinstance(delta, icl.DivergedError):
        return {"accuracy": float("nan"), "cross_entropy": float("nan")}
    with delta.applied(model):
        tuned = icl.capture(model, prompts.zero_shot(), fields=())
    of_gold = tuned.label_log_probs.log_softmax(-1)[range(len(tuned.gold)), tuned.gold]
    return {"accuracy": tuned.accuracy, "cross_entropy": -of_gold.mean().item()}


def choose(rows: pd.DataFrame) -> dict[str, float]:
    ranked = rows.dropna().sort_values(["accuracy", "cross_entropy"], ascending=[False, True])
    return {str(task): float(group["lr"].iloc[0]) for task, group in ranked.groupby("task", sort=False)}


def draw(rows: pd.DataFrame, chosen: dict[str, float], path: Path) -> None:
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for task, group in rows.query("task in @chosen").sort_values("lr").groupby("task", sort=False):
        (line,) = ax.plot(group["lr"], group["accuracy"], marker=".", label=task)
        best = group[group["lr"] == chosen[str(task)]]
        ax.plot(best["lr"], best["accuracy"], marker="o", markersize=9, fillstyle="none", color=line.get_color())
    ax.set(xscale="log", xlabel="learning rate", ylabel="accuracy after finetuning")
    ax.set_title(f"{path.stem}\n{rows['n'].iloc[0]} selection queries a task, chosen rates ringed", fontsize="medium")
    ax.legend(frameon=False, ncols=2)
    fig.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__, variant_parser())
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="packaged model, hub id or folder (%(default)s)")
    add("--tasks", nargs="+", default=["sst2", "sst5", "mr", "subj", "agnews"], choices=icl.TASKS)
    add("--queries", type=int, default=100, help="selection queries a task (%(default)s)")
    add("--lrs", type=float, nargs="+", default=GRID, help="grid of learning rates (%(default)s)")
    add("--out", type=Path, default=Path("figures/lr_selection"), help="folder for the grid (%(default)s)")
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Measure the rates that were not measured before, and write the grid and the choice."""
    args.out.mkdir(parents=True, exist_ok=True)
    variant = {"loss": args.loss, "method": args.method, "trained": args.trained}
    name = lr_key(args.model, icl.Cell(args.model, "", 0, 0, 0.0, **variant))
    table = args.out / f"{name.strip('/').replace('/', '--').replace(', ', '_').replace(' ', '-')}.csv"
    rows = pd.read_csv(table) if table.exists() else pd.DataFrame(columns=["model", "task", "k", "lr", "n"])
    done = set(rows.loc[rows["n"] == args.queries, ["task", "lr"]].itertuples(index=False, name=None))
    model = None
    for task_name in args.tasks:
        todo = [lr for lr in args.lrs if (task_name, lr) not in done]
        if not todo:
            continue
        model = model or icl.load_model(args.model)
        task, k = icl.load_task(task_name), icl.PAPER_K[task_name]
        queries = task.queries(args.queries, split="selection")
        prompts = icl.build_prompts(model, task, task.demonstrations(k, seed=0), queries)
        for lr, delta in zip(todo, icl.finetune_many(model, [prompts] * len(todo), todo, **variant), strict=True):
            row = {"model": args.model, "task": task_name, "k": k, "lr": lr, "n": len(queries)}
            rows = pd.concat([rows, pd.DataFrame([row | measure(model, prompts, delta)])], ignore_index=True)
            rows.to_csv(table, index=False)
            print(rows.iloc[-1].to_dict(), flush=True)

    rows = rows.query("n == @args.queries")  # those of other runs were measured on other queries
    chosen = choose(rows)
    draw(rows, chosen, table.with_suffix(".png"))
    known = json.loads(DEFAULT_LR.read_text()) if DEFAULT_LR.exists() else {}
    DEFAULT_LR.write_text(json.dumps(known | {name: known.get(name, {}) | chosen}, indent=1) + "\n")
    print(f"{name}: {chosen} → {DEFAULT_LR}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv, stopped="Measured rates stay in {out}; the same command goes on from them.")


if __name__ == "__main__":
    sys.exit(main())
