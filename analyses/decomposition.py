"""What in-context attention is made of, and whether ΔW_ICL is like ΔW_FT: layer by layer and head by head.

Runs one cell for each task: captures, finetuning, the exact split, the linear relaxation beside it, and both updates
compared in weight space. Then draws tables and figures from the saved cells. Cells that are complete are not run again:
a stopped run goes on where it was, and drawing alone needs no model.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor
from tqdm import tqdm

import icl_dual as icl
from icl_dual.scripts.common import (
    DATA,
    TITLES,
    cell_parser,
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
    precision_title,
    run_script,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_text
from icl_dual.statistics import summary_frame
from icl_dual.storage import check_same_settings, load_tensors, save_tensors

ROWS = {
    "demonstration_mass": "softmax share of the demonstrations, w",
    "start_mass": "softmax share of the start token",
    "direct_share": "direct share of the realised update",
    "inherited_share": "inherited share of the realised update",
    "update_cosine": "cos(ΔW_ICL q, ΔICL)",
    "update_error": "‖ΔW_ICL q − ΔICL‖ / ‖ΔICL‖",
    "output_cosine": "cos((W_ZSL + ΔW_ICL) q, z)",
    "output_error": "‖(W_ZSL + ΔW_ICL) q − z‖ / ‖z‖",
    "rank_agreement": "Spearman's ρ, softmax weights and sizes of linear ones",
    "cosine": "Frobenius cos(ΔW_ICL, ΔW_FT)",
    "cosine_random": "… in random directions",
    "action_cosine": "cos(ΔW_ICL q, ΔW_FT q)",
    "action_cosine_random": "… in random directions",
    "left_angles": "left principal angles, degrees",
    "left_angles_random": "… in random directions",
    "right_angles": "right principal angles, degrees",
    "right_angles_random": "… in random directions",
    "norm_ratio": "‖ΔW_FT‖ / ‖ΔW_ICL‖",
    "effective_rank_icl": "effective rank of ΔW_ICL",
    "effective_rank_ft": "effective rank of ΔW_FT",
    "norm_K": "‖ΔW_K‖",
    "norm_V": "‖ΔW_V‖",
    "effective_rank_K": "effective rank of ΔW_K",
    "effective_rank_V": "effective rank of ΔW_V",
}
"""What the table shows by the name of its tensor: mean and deviation over queries, layers and heads."""


@dataclass
class Result:
    """A finished cell: per-query tensors by name, and where they came from."""

    task: str
    tensors: dict[str, Tensor]
    about: dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    parser = cell_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=count, default=1, help="seed of the demonstrations and of the null's directions (%(default)s)")
    add(
        "--rank", type=positive, default=4, help="number of singular directions whose angles are compared (%(default)s)"
    )
    add("--out", type=output_folder, default="figures/decomposition", help="folder for all output (%(default)s)")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def run(model: icl.Model, cell: icl.Cell, rank: int) -> Result:
    """Run one cell, from prompts to everything that is drawn."""
    task = icl.load_task(cell.task, cell.source, protocol=cell.protocol)
    demonstrations, queries = task.demonstrations(cell.k, cell.seed), task.queries(cell.n_queries)
    prompts = icl.build_prompts(model, task, demonstrations, queries)
    delta = icl.finetune(model, prompts, lr=cell.lr, factors=True)
    in_context = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS)
    zsl = icl.capture(model, prompts.zero_shot(), fields=icl.DECOMPOSE_FIELDS)
    split = icl.decompose(model, zero_shot=zsl, in_context=in_context)
    updates = icl.compare_updates(model, zero_shot=zsl, in_context=in_context, delta=delta, rank=rank, seed=cell.seed)
    assert delta.factors is not None
    tensors = {
        "demonstration_mass": split.demonstration_mass,
        "start_mass": split.mass[..., split.groups.index("start")],
        "direct_share": split.direct_share,
        "inherited_share": split.inherited_share,
        "icl_share": split.icl_share,
        **split.relaxation._asdict(),
        **{name: values for name, values in vars(updates).items() if isinstance(values, Tensor)},
        **vars(icl.summarise(delta)),
    }
    about = {
        "model": model.provenance,
        "dtype": model.precision,
        "versions": {name: version(name) for name in ("icl-dual", "torch", "transformers", "transformer-lens")},
        "residuals": {name: residual.max().item() for name, residual in split.residuals._asdict().items()},
        "held_residual": updates.residual,
        "factors_residual": delta.factors.residual,
        "groups": split.groups,
        "demonstrations": [
            f"{number} {demonstration.fields[0][1]} → {task.label_words[demonstration.label]}"
            for number, demonstration in enumerate(demonstrations, 1)
        ],
        "first_query": f"{queries[0].fields[0][1]} → {task.label_words[queries[0].label]}",
    }
    return Result(cell.task, {name: tensor.float().contiguous() for name, tensor in tensors.items()}, about)


def results(args: argparse.Namespace) -> Iterator[Result]:
    """Return the cells, read where they are complete and run where they are not."""
    model: icl.Model | None = None
    for name in tqdm(dict.fromkeys(args.tasks), unit="cell"):
        cell = icl.Cell(
            model=args.model,
            task=name,
            k=icl.PAPER_K[name] if args.k is None else args.k,
            seed=args.seed,
            lr=default_lr(args.model, name) if args.lr is None else args.lr,
            n_queries=args.queries,
            protocol=args.protocol,
            source=args.source,
        )
        settings = {**asdict(cell), "rank": args.rank}
        folder = args.out / "cells" / cell.name
        if folder.exists():
            tensors, metadata = load_tensors(folder)
            saved = dict(metadata["settings"])
            rank = saved.pop("rank")
            saved = {**asdict(icl.Cell.from_settings(saved)), "rank": rank}  # of an older version, too
            check_same_settings(folder, settings, saved)
            check_same_settings(folder, {"dtype": precision_title(args)}, metadata["about"])
            yield Result(name, tensors, metadata["about"])
            continue
        model = model or icl.load_model(args.model, **loading(args))
        if args.rank > model.d_head:
            raise icl.StudyError(
                f"expected --rank of at most {model.d_head}, the width of a head, got {args.rank}: pass a smaller one"
            )
        result = run(model, cell, args.rank)
        save_tensors(folder, result.tensors, {"settings": settings, "about": result.about})
        yield result


def table(cells: list[Result]) -> pd.DataFrame:
    """Return mean ± standard deviation over queries, layers and heads: a row a quantity, a column a task."""
    rows = []
    for name, label in ROWS.items():
        row = {"mean ± deviation over queries, layers and heads": label}
        for result in cells:
            values = result.tensors[name].double()
            values = values.mean(-1) if values.ndim == 4 else values
            known = values[values.isfinite()]
            row[TITLES[result.task]] = f"{known.mean():.2g} ± {known.std():.2g}"
        rows.append(row)
    return pd.DataFrame(rows)


def by_layer(cells: list[Result]) -> pd.DataFrame:
    """Return every quantity by layer and head: mean and standard deviation over queries, and their number."""
    frames = []
    for result in cells:
        tensors = {name: result.tensors[name] for name in ROWS}
        frame = summary_frame({name: values[None] if values.ndim == 1 else values for name, values in tensors.items()})
        frame.insert(0, "task", result.task)
        frames.append(frame)
    return pd.concat(frames)


def write_figures(cells: list[Result], args: argparse.Namespace) -> None:
    n, about = len(cells), describe(cells, args)

    fig, (axes,) = panels(n)
    for ax, result in columns(axes, cells):
        icl.plots.heads(result.tensors["demonstration_mass"], ax=ax)
        label_outer(ax)
    colour_bar(fig, axes, "softmax share w, mean over queries")
    finish(fig, [], f"The softmax share of the demonstrations\n{about}", args.out / "demonstration_mass")

    write_shares(cells, about, args.out / "direct_inherited")

    fig, rows = panels(n, 2)
    labels = {"update_cosine": "cos(ΔW_ICL q, ΔICL)", "rank_agreement": "Spearman's ρ of the weights"}
    for axes, (name, label) in zip(rows, labels.items(), strict=True):
        for ax, result in columns(axes, cells, is_first=axes is rows[0]):
            icl.plots.heads(result.tensors[name], limits=(-1, 1), ax=ax)
            label_outer(ax)
        colour_bar(fig, axes, f"{label}\n({icl.plots.BELOW_ZERO})")
    finish(fig, [], f"The linear relaxation against the exact split\n{about}", args.out / "relaxation")

    fig, rows = panels(n, 4, height=1.3)
    for axes, (name, label) in zip(rows, UPDATE_LABELS.items(), strict=True):
        for ax, result in columns(axes, cells, is_first=axes is rows[0]):
            pair = (
                result.tensors[kind].flatten(3).mean(-1) if "angles" in kind else result.tensors[kind]
                for kind in (name, f"{name}_random")
            )
            icl.plots.against_null(*pair, ylabel=label, ax=ax)
            label_outer(ax)
    finish(fig, rows[0], f"The changes of weights ΔW_ICL and ΔW_FT compared\n{about}", args.out / "updates")

    fig, rows = panels(n, 2, height=1.4)
    labels = {"norm": "Frobenius norm", "effective_rank": "effective rank"}
    for axes, (name, label) in zip(rows, labels.items(), strict=True):
        for ax, result in columns(axes, cells, is_first=axes is rows[0]):
            series = {f"ΔW_{kind}": result.tensors[f"{name}_{kind}"][None] for kind in "KV"}
            icl.plots.by_layer(series, ylabel=label, ax=ax)
            ax.set_yscale("log" if name == "norm" else "linear")
            label_outer(ax)
    heading = "Size and effective rank of finetuning's change of key and value weights"
    finish(fig, rows[0], f"{heading}\n{about}", args.out / "delta")

    write_prompt(cells[0], args)
    write_delta_demonstrations(cells[0], args)


UPDATE_LABELS = {
    "cosine": "Frobenius\ncosine",
    "action_cosine": "cosine of the\nactions on q",
    "left_angles": "principal angles,\noutputs (degrees)",
    "right_angles": "principal angles,\ninputs (degrees)",
}
"""The comparisons of ΔW_ICL and ΔW_FT that are drawn, with units. The angles are those between the spans of the left
singular vectors (outputs) and of the right ones (inputs)."""


LINEAR = 2
"""Up to here, shares have a linear scale."""


def write_shares(cells: list[Result], about: str, path: Path) -> None:
    """Draw the direct and inherited shares by layer; where both parts cancel, shares leave every linear scale."""
    fig, (axes,) = panels(len(cells))
    for ax, result in columns(axes, cells):
        series = {kind: result.tensors[f"{kind}_share"] for kind in ("direct", "inherited")}
        icl.plots.by_layer(series, ylabel="share of h_ICL − h_ZSL", ax=ax)
        label_outer(ax)
    heading = "Direct and inherited shares of the change of the attention output"
    if max(abs(end) for ax in axes for end in ax.dataLim.intervaly) > LINEAR:
        heading += f"; logarithmic beyond ±{LINEAR}"
        for ax in axes:
            ax.set_yscale("symlog", linthresh=LINEAR, linscale=2)
            ax.yaxis.set_major_locator(FixedLocator([-100, -10, -LINEAR, -1, 0, 1, LINEAR, 10, 100]))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter("{x:g}")
    finish(fig, axes, f"{heading}\n{about}", path)


def describe(cells: list[Result], args: argparse.Namespace, *, queries: str | None = None) -> str:
    """Return the model and how the cells were run, in two lines; `queries` stands for the number of queries."""
    rates = {result.task: default_lr(args.model, result.task) if args.lr is None else args.lr for result in cells}
    ks = {result.task: icl.PAPER_K[result.task] if args.k is None else args.k for result in cells}
    each = "; ".join(f"{TITLES[task]} k = {ks[task]}, lr {rates[task]:g}" for task in rates)
    settings = [model_title(args.model), f"protocol {args.protocol}", n_queries(args) if queries is None else queries]
    return f"{', '.join(part for part in [*settings, f'seed {args.seed}'] if part)}\n{each}"


def colour_bar(fig: Figure, axes: list[Axes], label: str) -> None:
    """Draw the colour bar of maps that share their scale."""
    fig.colorbar(axes[0].images[0], ax=axes, label=label)


def columns(axes: list[Axes], cells: list[Result], *, is_first: bool = True) -> Iterator[tuple[Axes, Result]]:
    """Yield each task's Axes, with the task's title over those of the first quantity."""
    for ax, result in zip(axes, cells, strict=True):
        if is_first:
            ax.set_title(TITLES[result.task])
        yield ax, result


def write_prompt(result: Result, args: argparse.Namespace) -> None:
    """Draw one prompt: how much each layer takes from the demonstrations, and from which."""
    groups: list[str] = result.about["groups"]
    first = groups.index("separators")
    names = ["separators", *(shorten(text) for text in result.about["demonstrations"])]
    size = icl.plots.PAGE_WIDTH, 2.4 + 0.135 * len(names)
    fig, (above, below) = plt.subplots(2, 1, figsize=size, height_ratios=[1, 0.09 * len(names)], sharex=True)
    of_first = {name: result.tensors[name][:1] for name in ("demonstration_mass", "direct_share", "icl_share")}
    series = {
        "softmax share w of the demonstrations, mean over heads": of_first["demonstration_mass"].mean(-1),
        "direct share of h_ICL − h_ZSL": of_first["direct_share"],
    }
    icl.plots.by_layer(series, ylabel="share", ax=above)
    above.legend(loc="lower left", bbox_to_anchor=(0, 1.0))
    above.set_xlabel("")
    icl.plots.demonstrations(of_first["icl_share"][0, :, first:], names, label="share of ΔICL", ax=below)
    below.set_xlim(-0.5, len(of_first["icl_share"][0]) - 0.5)
    heading = f"Demonstrations' shares of ΔICL by layer, for the query “{shorten(result.about['first_query'], 60)}”"
    finish(fig, [], f"{heading}\n{describe([result], args, queries='one query')}", args.out / "prompt")


def write_delta_demonstrations(result: Result, args: argparse.Namespace) -> None:
    names = [shorten(text) for text in result.about["demonstrations"]]
    size = icl.plots.PAGE_WIDTH, 1.2 + 0.135 * len(names)
    fig, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    for ax, kind in zip(axes, "KV", strict=True):
        shares = result.tensors[f"demonstrations_{kind}"]
        icl.plots.demonstrations(shares, names, label=f"share of ΔW_{kind}", ax=ax)
        ax.set_title(f"ΔW_{kind}")
    heading = "Demonstrations' shares of finetuning's change of key and value weights"
    finish(fig, [], f"{heading}\n{describe([result], args, queries='')}", args.out / "delta_demonstrations")


def shorten(text: str, length: int = 32) -> str:
    """Return the beginning of a text, and its label, which comes last."""
    text, _, label = text.rpartition(" → ")
    return (text if len(text) <= length else text[: length - 1].rstrip() + "…") + " → " + label


def n_queries(args: argparse.Namespace) -> str:
    return f"{'all' if args.queries is None else args.queries} queries a task"


def write_readme(cells: list[Result], args: argparse.Namespace) -> None:
    about = cells[0].about
    always = ("model", "tasks", "queries", "seed", "rank", "out")
    command = command_line(__file__, make_parser(), args, always=always)
    residuals = pd.DataFrame(
        {
            "task": TITLES[result.task],
            "exact split": f"{result.about['residuals']['split']:.1e}",
            "exact split, plain pass": f"{result.about['residuals']['full_prompt']:.1e}",
            "realised = direct + inherited": f"{result.about['residuals']['realised']:.1e}",
            "whole run against a plain pass": f"{result.about['residuals']['run']:.1e}",
            "ΔW_FT's run against the zero-shot run": f"{result.about['held_residual']:.1e}",
            "Σ e ⊗ x against ΔW": f"{result.about['factors_residual']:.1e}",
        }
        for result in cells
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    title = f"{markdown_text(model_title(args.model))} ({markdown_code(short(args.model))}, {about['model']})"
    text = f"""# How these were made

    {command}

Model: {title}, computed in {about["dtype"]}. Protocol
`{args.protocol}`. {n_queries(args)}. {versions}.

{markdown(table(cells), disable_numparse=True)}

Residuals, relative, the largest over queries and layers (in {about["dtype"]}):

{markdown(residuals, disable_numparse=True)}

{(DATA / "how_to_read_decomposition.md").read_text(encoding="utf-8")}"""
    write_text(args.out / "README.md", text)


def write(args: argparse.Namespace) -> None:
    """Run the cells that are not finished, and write all tables and figures."""
    cells = list(results(args))
    write_csv(args.out / "layers.csv", by_layer(cells), float_format="%.5g")
    write_figures(cells, args)
    write_readme(cells, args)
    print(table(cells).to_string(index=False))
    print(f"\nTables and figures are in {args.out}/; how to read them is in {args.out}/README.md")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        parse, write, argv, stopped="Finished cells stay in {out}/cells; the same command goes on from them."
    )


if __name__ == "__main__":
    sys.exit(main())
