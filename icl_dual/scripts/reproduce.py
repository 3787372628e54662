"""The paper's comparison on a real model and real data: zero-shot, in-context learning and finetuning, layer by layer.

Runs one cell for each task and seed, then draws tables and figures from the saved cells. Cells that are complete are
not run again: a stopped run goes on where it was, and drawing alone needs no model.
"""

# Methods of matplotlib and transformers have types in part.
# pyright: reportUnknownMemberType=false

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from transformers import AutoTokenizer, XGLMConfig, XGLMForCausalLM

import icl_dual as icl
from icl_dual.assets import model_files
from icl_dual.plots import LAYERWISE
from icl_dual.scripts import chat_form, paper_tables
from icl_dual.scripts.common import (
    DATA,
    TITLES,
    add_cell_options,
    command_line,
    count,
    default_lr,
    finish,
    label_outer,
    loading,
    model_title,
    output_folder,
    panels,
    positive,
    run_script,
    script_parser,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_text
from icl_dual.storage import atomic_folder
from icl_dual.torch_utils import fork_rng, to_list

PAPER = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))
PRESETS = {model["preset"]: model for model in PAPER["models"].values()}

Results = Sequence[icl.CellResult]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the reproduction; its parser has the `PARSING` of presets."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="the paper's own set-up; other options override its values")
    add(
        "--rehearse",
        type=positive,
        metavar="N",
        help="run the preset on a random model of its shape with N layers and on the packaged rows: needs no hub",
    )
    add_cell_options(parser)
    add("--seeds", type=count, nargs="+", help="draws of the demonstrations (1)")
    add("--loss", choices=("all", "label"), default="all", help="finetuning's loss: all tokens, or the label word's")
    add("--balanced", action="store_true", help="balance the demonstrations' classes (default: as drawn)")
    add(
        "--reference-k-mismatch",
        action="store_true",
        help="finetune also on demonstrations that the reference protocol cuts from the context, as released",
    )
    add(
        "--export",
        type=output_folder,
        metavar="FOLDER",
        help="folder for each cell's recordings, in the released layout",
    )
    add("--out", type=output_folder, default="figures", help="folder for cells, tables and figures (%(default)s)")


def preset_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Return the defaults of a preset and of its rehearsal."""
    defaults: dict[str, Any] = {}
    if args.preset:
        hub = PRESETS[args.preset]["hub"]
        defaults |= {"model": hub, "tasks": PAPER["tasks"], "queries": None, "protocol": "reference", "source": "hub"}
    return defaults | ({"source": "wheel"} if args.rehearse else {})


def check_rehearsal(args: argparse.Namespace) -> None:
    """Refuse a rehearsal of no preset, and restrict one to what the packages have rows of."""
    if args.rehearse and not args.preset:
        raise argparse.ArgumentTypeError("--rehearse takes a number of layers from 1, and a --preset to rehearse")
    if args.rehearse:
        args.tasks = [task for task in args.tasks if task != "cb"]  # the packages have no rows of it
        args.source = "wheel"
        if not args.tasks:
            raise argparse.ArgumentTypeError("--rehearse has no rows of cb: expected another task")


PARSING: dict[str, Any] = {"dependent": preset_defaults, "check": check_rehearsal}
"""How a parser of these options treats presets."""


def make_parser() -> argparse.ArgumentParser:
    """Return the script's parser."""
    parser = script_parser(__doc__, **PARSING)
    add_options(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the script's arguments."""
    return make_parser().parse_args(argv)


def plan(args: argparse.Namespace, model: str) -> list[icl.Cell]:
    """Return the cells of a model: one for each task and seed."""

    def of_preset(name: str, task: str) -> float | int | None:
        return PRESETS[args.preset][name][PAPER["tasks"].index(task)] if args.preset else None

    def rate(task: str) -> float:
        chosen = of_preset("lr", task) if args.lr is None else args.lr
        if chosen is not None:
            return chosen
        variant = icl.Cell(model, task, 1, 0, 1.0, finetuning=icl.FinetuneConfig(loss=args.loss))
        return default_lr(model, task, variant)

    def seeds(task: str) -> list[int]:
        seed = of_preset("seed", task)
        return args.seeds or [1 if seed is None else int(seed)]

    return [
        icl.Cell(
            model=model,
            task=task,
            k=icl.PAPER_K[task] if args.k is None else args.k,
            seed=seed,
            lr=rate(task),
            n_queries=args.queries,
            protocol=args.protocol,
            finetuning=icl.FinetuneConfig(loss=args.loss),
            balanced=args.balanced,
            source=args.source,
            reference_k_mismatch=args.reference_k_mismatch,
            replicas=args.replicas,
        )
        for task in dict.fromkeys(args.tasks)
        for seed in dict.fromkeys(seeds(task))
    ]


def random_model(preset: str, n_layers: int, folder: Path) -> str:
    """Save a model of a preset's shape with fewer layers and random weights, always the same, with a tokenizer."""
    shape = PRESETS[preset]
    name = folder / f"random-{preset.removeprefix('paper-')}-{n_layers}-layers"
    if not name.exists():
        source = model_files("smollm2-135m").folder
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(source, trust_remote_code=False)
        config = XGLMConfig(
            vocab_size=PAPER["d_vocab"],
            d_model=shape["d_model"],
            ffn_dim=shape["d_mlp"],
            num_layers=n_layers,
            attention_heads=shape["n_heads"],
            max_position_embeddings=2048,
            architectures=["XGLMForCausalLM"],
        )
        with atomic_folder(name) as scratch, fork_rng():
            torch.manual_seed(0)
            XGLMForCausalLM(config).save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    return str(name)


def label_counts(results: Results) -> pd.DataFrame:
    """Return how often each label is gold and is predicted, by task, seed and setting."""
    rows: list[list[Any]] = []
    for result in results:
        model, words = short(result.cell.model), result.provenance["label_words"]
        settings = {"gold": result.comparison.gold, **result.comparison.predictions}
        for setting, labels in settings.items():
            counts = to_list(labels.bincount(minlength=len(words)))
            for word, number in zip(words, counts, strict=True):
                rows.append([model, result.cell.task, result.cell.seed, setting, word, number])
    return pd.DataFrame(rows, columns=["model", "task", "seed", "setting", "label", "count"])


FIGURES = {
    "SimAOU": "SimAOU: the changes of the attention output by ICL and by finetuning, by layer",
    "SimAM": "SimAM: how much finetuning brings attention closer to that of ICL, by layer",
    "Kendall": "Kendall: the order in which ICL and finetuning attend to the demonstrations' tokens, by layer",
}
"""What each figure of a metric shows."""


def write_figures(results: Results, out: Path) -> None:
    """Draw each metric by layer, and how often each label is predicted."""
    tasks = [task for task in TITLES if any(result.cell.task == task for result in results)]
    by_task = {task: [result for result in results if result.cell.task == task] for task in tasks}
    about = f"{describe(results)}\n{describe_cells(results)}"
    for metric in LAYERWISE:
        fig, (axes,) = panels(len(tasks))
        for (task, of_task), ax in zip(by_task.items(), axes, strict=True):
            icl.plots.layers([result.comparison for result in of_task], metric, ax=ax)
            ax.set_title(TITLES[task])
            label_outer(ax)
        finish(fig, axes, f"{FIGURES.get(metric, metric)}\n{about}", out / metric.lower())
    fig, (axes,) = panels(len(tasks), sharex=False)  # each task has labels of its own
    for (task, of_task), ax in zip(by_task.items(), axes, strict=True):
        label_words = of_task[0].provenance["label_words"]
        icl.plots.label_counts([result.comparison for result in of_task], label_words, ax=ax)
        ax.tick_params(axis="x", rotation=0 if len(label_words) < 4 else 30)
        ax.set_title(TITLES[task])
        label_outer(ax, keep_x=True)
    finish(fig, axes, f"Labels: the gold ones, and those predicted in each setting\n{about}", out / "label_counts")


def describe(results: Results) -> str:
    """Return model, protocol, queries and seeds in words."""
    model, seeds = model_title(results[0].cell.model), sorted({result.cell.seed for result in results})
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{model}, protocol {results[0].cell.protocol}, {n_queries(results)}, {which}"


def describe_cells(results: Results) -> str:
    """Return the number of demonstrations and the learning rate of each task."""
    texts = {result.cell.task: f"k = {result.cell.k}, lr {result.cell.lr:g}" for result in results}
    of_task = {title: texts[task] for task, title in TITLES.items() if task in texts}
    if len(set(of_task.values())) == 1:
        return next(iter(of_task.values()))
    return "; ".join(f"{title} {text}" for title, text in of_task.items())


def n_queries(results: Results) -> str:
    """Return the number of queries a task."""
    counts = sorted({len(result.comparison.gold) for result in results})
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} queries a task"


def command(args: argparse.Namespace) -> str:
    """Return the command that makes the same tables and figures."""
    always = ("tasks", "queries") if args.preset else ("model", "tasks", "queries")
    parser = make_parser()
    parser.set_defaults(**preset_defaults(args))
    return command_line(__file__, parser, args, always=always)


def unstable_metrics(result: icl.CellResult) -> str:
    """Return the metrics that replicas of the finetuning move by more than their interval over queries."""
    if result.comparison.stability is None:
        return "not measured"
    return ", ".join(result.comparison.unstable) or "none"


def massive_activations(result: icl.CellResult) -> str:
    """Return the largest residual norm of the queries' tokens in each setting, in medians of its layer."""
    by_setting = result.provenance.get("massive_activations", {})
    return " / ".join(f"{numbers['largest_ratio']:.0f}" for numbers in by_setting.values()) or "not recorded"


def write_readme(results: Results, args: argparse.Namespace, out: Path) -> None:
    """Write the page that says how tables and figures were made."""
    cell, provenance = results[0].cell, results[0].provenance
    runs = pd.DataFrame(
        {
            "task": TITLES[result.cell.task],
            "k": paper_tables.setting([result], "k"),
            "seed": result.cell.seed,
            "lr": result.cell.lr,
            "queries": len(result.comparison.gold),
            "prompt tokens before the query": result.provenance["prefix_tokens"],
            "FT loss, first → last step": "{:.2f} → {:.2f}".format(*(result.provenance["losses"][i] for i in (0, -1))),
            "attention residual": f"{result.provenance['attention_residual']:.1e}",
            "unstable metrics": unstable_metrics(result),
            "largest residual norm ZSL / ICL / FT, × median": massive_activations(result),
        }
        for result in results
    )
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    computed_in = provenance.get("precision", provenance["dtype"])
    rates = "chosen by `analyses/select_lr.py` on selection queries, apart from these"
    if args.lr or args.preset:
        rates = "given by hand" if args.lr else "the paper's, which it chose on its validation queries"
    loss = "all tokens" if cell.finetuning.loss == "all" else "the label word"
    bands = "bands: ±1.96 standard errors over queries, and over seeds where there are several; "
    bands += "dotted: range over replicas of the finetuning; SimAM as a difference, after less before finetuning"
    accuracy, metrics = (paper_tables.file_name(table, cell.protocol) for table in paper_tables.TABLES)
    title = f"{markdown_text(model_title(cell.model))} ({markdown_code(short(cell.model))}, {provenance['model']})"
    text = f"""# How these were made

    {command(args)}

Model: {title}, computed in {computed_in}.
Protocol: `{cell.protocol}` (recorded {paper_tables.RECORDED[cell.protocol]}). Finetuning's loss: {loss}.
{n_queries(results)}. Learning rates: {rates}. {versions}.

| file | what it shows |
|---|---|
| `{accuracy}` (`.md`, `.csv`, `.tex`) | accuracy of the three settings with intervals, the paper's values below |
| `{metrics}` (`.md`, `.csv`, `.tex`) | Rec2FTP, SimAOU, SimAM, Kendall, recall and baselines, likewise |
| `simaou`, `simam`, `kendall` (`.png`, `.pdf`) | by layer; {bands} |
| `label_counts` (`.png`, `.pdf`, `.csv`) | how often each label is predicted: shows whether one prevails |
| `chat` (`.md`, `.csv`) | accuracy of the same prompts as a chat, for a model with a chat template |
| `results.csv` | every number: model, task, k, seed, lr, protocol, metric, layer (empty: all), value, spread, n |

{markdown(runs, disable_numparse=True)}

{paper_tables.replicas_note(results)}

{(DATA / "how_to_read.md").read_text(encoding="utf-8")}"""
    write_text(out / "README.md", text)


def write(args: argparse.Namespace) -> Results:
    """Run the cells that are not finished, write all tables and figures, and return the finished cells."""
    model = random_model(args.preset, args.rehearse, args.out / "models") if args.rehearse else args.model
    results = icl.run_study(
        plan(args, model),
        args.out / "cells",
        **loading(args),
        keep_recordings=args.export is not None,
    )
    if args.export:
        icl.export_recordings(results, args.export)
    numbers = pd.concat([result.to_frame() for result in results]).drop(columns=["low", "high"])
    numbers["model"] = numbers["model"].map(short)
    write_csv(args.out / "results.csv", numbers, float_format="%.6g")
    write_csv(args.out / "label_counts.csv", label_counts(results))
    paper_tables.write(results, args.out)
    write_figures(results, args.out)
    if args.protocol == "answer" and not args.preset and chat_form.has_chat_template(model):
        chat_form.write(results, args.out, **loading(args))
    write_readme(results, args, args.out)
    print(f"\nTables and figures are in {args.out}/; how each was made is in {args.out}/README.md")
    return results


STOPPED = "Finished cells stay in {out}/cells; the same command goes on from them."
"""What Ctrl-C leaves behind."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    return run_script(parse, write, argv, stopped=STOPPED)
