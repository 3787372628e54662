"""The comparison with finetuning as people do it: SGD, Adam, and LoRA over several epochs, on the same cell.

Runs a cell with replicas for each way to finetune and each rate. A stopped run goes on where it was.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import pandas as pd

import icl_dual as icl
from icl_dual.scripts import paper_tables
from icl_dual.scripts.common import (
    TITLES,
    cell_parser,
    command_line,
    count,
    loading,
    model_title,
    output_folder,
    run_script,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_text

LORA = icl.Lora(rank=8, alpha=16)

WAYS: Mapping[str, tuple[icl.FinetuneConfig, tuple[float, ...]]] = {
    "SGD (the paper's)": (icl.FinetuneConfig(), (5e-4, 2e-3)),
    "Adam": (icl.FinetuneConfig(optimiser="adam"), (1e-5, 1e-4)),
    "LoRA by Adam": (icl.FinetuneConfig(optimiser="adam", lora=LORA), (1e-4, 1e-3)),
    "LoRA by Adam, 3 epochs, batches of 4, linear": (
        icl.FinetuneConfig(optimiser="adam", epochs=3, batch_size=4, schedule="linear", warmup=1, lora=LORA),
        (1e-4, 1e-3),
    ),
}
"""How to finetune, and the rates to try: those of Adam are steps of each weight, and are smaller."""

METRICS = ("SimAOU", "SimAOU unnormalised", "SimAM after FT", "Kendall")


def make_parser() -> argparse.ArgumentParser:
    parser = cell_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=count, default=1, help="draw of the demonstrations (%(default)s)")
    add("--out", type=output_folder, default="figures/optimisers", help="folder for cells and table (%(default)s)")
    parser.set_defaults(tasks=["sst2"], k=8, queries=20)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def plan(args: argparse.Namespace) -> dict[icl.Cell, str]:
    """Return the name of each cell's way to finetune, by cell."""
    return {
        icl.Cell(
            model=args.model,
            task=task,
            k=args.k,
            seed=args.seed,
            lr=lr,
            n_queries=args.queries,
            protocol=args.protocol,
            source=args.source,
            finetuning=config,
            replicas=args.replicas,
        ): name
        for task in dict.fromkeys(args.tasks)
        for name, (config, rates) in WAYS.items()
        for lr in (rates if args.lr is None else (args.lr,))
    }


def table(results: Sequence[icl.CellResult], names: Mapping[icl.Cell, str]) -> pd.DataFrame:
    """Return a row for each cell: losses, accuracy and metrics."""
    rows = []
    for result in results:
        losses, comparison = result.provenance["losses"], result.comparison
        rows.append(
            {
                "task": TITLES[result.cell.task],
                "finetuning": names[result.cell],
                "lr": f"{result.cell.lr:g}",
                "loss, first → last epoch": " → ".join(
                    f"{sum(epoch) / len(epoch):.2f}" for epoch in (losses[: result.cell.k], losses[-result.cell.k :])
                ),
                "FT accuracy": f"{comparison.accuracy['FT']:.2f}",
                **{metric: comparison.intervals()[metric].format() for metric in METRICS},
            }
        )
    return pd.DataFrame(rows)


def write(args: argparse.Namespace) -> None:
    """Run the cells that are not finished, and write the table and the page."""
    names = plan(args)
    results = icl.run_study(list(names), args.out / "cells", **loading(args))
    frame = table(results, names)
    write_csv(args.out / "optimisers.csv", frame)
    provenance, accuracy = results[0].provenance, results[0].comparison.accuracy
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    command = command_line(__file__, make_parser(), args, always=("model", "tasks", "k", "queries"))
    cells = markdown(frame, disable_numparse=True)
    title = markdown_text(
        f"{model_title(args.model)}, {args.k} demonstrations, {args.queries} queries, seed {args.seed}, protocol "
        f"{args.protocol}"
    )
    origin = f"{markdown_code(short(args.model))}, {provenance['model']}, {provenance['precision']}"
    accuracies = (
        f"On {TITLES[results[0].cell.task]}, accuracy is {accuracy['ZSL']:.2f} zero-shot and {accuracy['ICL']:.2f} in "
        "context."
    )
    page = f"""# Finetuning as people do it

    {command}

{title} ({origin}). {versions}.

LoRA has rank {LORA.rank} and alpha {LORA.alpha:g} on keys and values. Losses are means over demonstrations, each
before its own step. {accuracies}
{paper_tables.replicas_note(results)}

{cells}
"""
    write_text(args.out / "README.md", page)
    print(f"{cells}\n\nAll of it is in {args.out}/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv, stopped="Finished cells stay in {out}/cells; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
