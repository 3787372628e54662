"""What `momentum.py` has computed, as tables and pictures: every η beside the same decoder without momentum."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import icl_dual as icl
from icl_dual import pretraining
from icl_dual.scripts.common import DATA, TITLES, finish, model_title
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, read_csv, write_csv, write_text
from icl_dual.statistics import Interval, Paired, bootstrap, over_seeds, paired_test

SHOWN = (1, 2, 4, 8, 15)
"""Demonstrations after which the tables have the label mapping's accuracy."""

ENOUGH = 5
"""Fewer seeds draw a curve, and are not tested."""
MEAN = "mean of tasks, in context"

FILES = {
    "runs.csv": "every decoder's numbers: data, η, seed, measure, value",
    "differences.csv": "every η against vanilla",
    "learned_eta.csv": "the η that heads learned on text: seed, layer, head, η",
    "intervention.csv": "the pretrained model under momentum",
    "cost.md": "what a training step and a decoded token cost (`python analyses/benchmark_momentum.py`)",
}

CellsByPart = Mapping[str, list[dict[str, Any]]]


def eta_name(eta: float | str) -> str:
    return "vanilla" if eta == 0 else f"η {eta}" if isinstance(eta, str) else f"η = {eta:g}"


def trained(cells: CellsByPart) -> pd.DataFrame:
    """Return every decoder's numbers: data, η, seed, measure, value."""
    rows = []
    for one in cells.get("text", []):
        measures = {f"perplexity, {name}": value for name, value in one["perplexity"].items()}
        rows += [("text", one["eta"], one["seed"], *measure) for measure in measures.items()]
    for one in cells.get("mapping", []):
        by_pair = enumerate(one["accuracy"])
        rows += [("label mapping", one["eta"], one["seed"], f"accuracy after {n}", value) for n, value in by_pair]
    for one in cells.get("tasks", []):
        if one["right"]:
            name = f"{TITLES[one['task']]} accuracy after {one['k']}"
            rows.append(("tasks", one["eta"], one["seed"], name, float(np.mean(one["right"]))))
    frame = pd.DataFrame(rows, columns=["data", "eta", "seed", "measure", "value"])
    in_context = frame.query("data == 'tasks' and not measure.str.endswith('after 0')")
    means = in_context.groupby(["data", "eta", "seed"], sort=False, as_index=False).agg({"value": "mean"})
    return pd.concat([frame, means.assign(measure=MEAN)], ignore_index=True)


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Return every η against vanilla, paired by seed: mean, difference with Student's interval, p, seeds."""
    rows = []
    for data, measure in frame[["data", "measure"]].drop_duplicates().itertuples(index=False):
        seeds = frame.query("data == @data and measure == @measure").pivot(index="seed", columns="eta", values="value")
        for eta in sorted(seeds.columns, key=str):
            values = seeds[eta].dropna()
            paired = seeds[[eta, 0.0]].dropna().to_numpy() if eta != 0 and 0.0 in seeds else np.zeros((0, 2))
            apart = over_seeds(*paired.T) if len(paired) else None
            interval = Interval(np.nan, np.nan, np.nan, 1) if apart is None else apart.difference
            numbers = {"difference": interval.value, "low": interval.low, "high": interval.high}
            about = {"data": data, "measure": measure, "eta": eta, "mean": values.mean(), "seeds": len(values)}
            rows.append(about | numbers | {"p": np.nan if apart is None else apart.p})
    return pd.DataFrame(rows)


def table(differences: pd.DataFrame, measures: Sequence[str], digits: int) -> str:
    """Return a row for each η, a column for each measure: mean, and difference from vanilla with its interval."""
    lines: dict[Any, dict[str, Any]] = {}
    for one in differences.query("measure in @measures").to_dict("records"):
        text = f"{one['mean']:.{digits}f}"
        if not np.isnan(one["difference"]):
            apart = Interval(one["difference"], one["low"], one["high"], 1, one["seeds"])
            text += f" ({apart.format(digits)})" if apart.known else f" ({apart.value:.{digits}f}, one seed)"
        line = lines.setdefault(one["eta"], {"": eta_name(one["eta"]), "seeds": one["seeds"]})
        line[one["measure"]] = text
    return markdown(pd.DataFrame(list(lines.values())).fillna(""))


def verdict(one: Mapping[Any, Any], better: int, n: int) -> str:
    """Whether momentum makes a number better, of n that are asked about; `better` is the sign of that."""
    if one["seeds"] < ENOUGH:
        return "too few seeds to tell"
    if one["p"] * n < 0.05:
        return "better" if one["difference"] * better > 0 else "worse"
    return "no difference beyond that between seeds"


def added(cells: CellsByPart) -> pd.DataFrame:
    """Return the pretrained model's accuracy by task, demonstrations and η, and its difference from η = 0."""
    tables: dict[tuple[str, int, float], list[list[int]]] = {}
    counts: dict[tuple[str, int, float], np.ndarray] = {}
    for one in cells.get("intervention", []):
        if one["right"]:
            key = one["task"], one["k"], one["eta"]
            tables.setdefault(key, []).append(one["right"])
            counts[key] = counts.get(key, 0) + np.array(one["label_counts"])
    rows = []
    for (task, k, eta), right in tables.items():
        values = np.array(right, dtype=float)
        about = {"task": TITLES[task], "k": k, "eta": eta, "accuracy": bootstrap(values)}
        about["most frequent answer"] = counts[task, k, eta].max() / counts[task, k, eta].sum()
        plain = np.array(tables.get((task, k, 0.0), []), dtype=float)
        about["paired"] = paired_test(values, plain) if eta and plain.shape == values.shape else None
        rows.append(about)
    return pd.DataFrame(rows)


def added_table(frame: pd.DataFrame) -> str:
    def text(row: Mapping[Any, Any]) -> str:
        paired: Paired | None = row["paired"]
        apart = "" if paired is None else f" ({paired.difference.format(2)})"
        return f"{row['accuracy'].value:.2f}{apart}, one label {row['most frequent answer']:.0%}"

    frame = frame.assign(
        text=frame.apply(text, axis=1), column=frame["task"] + ", " + frame["k"].astype(str) + " shots"
    )
    wide = frame.pivot(index="eta", columns="column", values="text").reindex(columns=frame["column"].unique())
    wide.index.name = "η"
    return markdown(wide, index=True)


def spread(values: Sequence[float]) -> Interval:
    """Return the mean over seeds, with Student's interval where there are enough."""
    numbers = np.array(values)
    interval = over_seeds(numbers, np.zeros_like(numbers)).difference
    return interval if len(numbers) >= ENOUGH else replace(interval, low=np.nan, high=np.nan)


LEARNED: dict[str, Any] = {"color": "#D55E00", "linestyle": "--", "marker": "s"}
"""The look of a learned η, which has no place on the scale of fixed ones."""

SEEDS_BAND = "95 % interval over seeds (5 or more)"
"""What bands over seeds are, in legends."""


def draw_losses(cells: CellsByPart, out: Path) -> None:
    """Draw the training loss of the decoders trained on text: means over seeds."""
    by_eta: dict[Any, list[list[list[float]]]] = {}
    for one in cells["text"]:
        by_eta.setdefault(one["eta"], []).append(one["losses"])
    fixed = sorted(eta for eta in by_eta if eta != "learned")
    looks = dict(zip(fixed, icl.plots.ordered(len(fixed)), strict=True)) if fixed else {}
    fig, ax = plt.subplots(figsize=(icl.plots.COLUMN_WIDTH, 2.8))
    etas: list[Any] = [*fixed, *(["learned"] if "learned" in by_eta else [])]
    for index, eta in enumerate(etas):
        losses = np.array([[loss for _, loss in run] for run in by_eta[eta]])
        steps = [number for number, _ in by_eta[eta][0]]
        style: dict[str, Any] = LEARNED if eta == "learned" else {**icl.plots.series_style(index), "color": looks[eta]}
        ax.plot(steps, losses.mean(0), label=eta_name(eta), markevery=(index, 20), **style)
    ax.set(xlabel="training step", ylabel="training loss (nats a token)")
    finish(fig, [ax], "Training loss of decoders on text, mean over seeds", out / "losses")


def draw_curve(frame: pd.DataFrame, data: str, measure: str, ax: Axes) -> None:
    """Draw a measure against η, with the learned η as a line with its interval."""
    chosen: dict[Any, list[float]] = {}
    for one in frame.query("data == @data and measure == @measure").to_dict("records"):
        chosen.setdefault(one["eta"], []).append(one["value"])
    learned = chosen.pop("learned", None)
    fixed = {eta: spread(values) for eta, values in sorted(chosen.items())}
    icl.plots.curves({"η fixed": fixed}, ax=ax)
    if learned:
        estimate = spread(learned)
        style: dict[str, Any] = {"color": LEARNED["color"], "linestyle": LEARNED["linestyle"]}
        ax.axhline(estimate.value, label="η learned", **style)
        if estimate.known:
            ax.axhspan(estimate.low, estimate.high, color=style["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="η (0: vanilla attention)")


def draw_shots(frame: pd.DataFrame, ceiling: Sequence[float], ax: Axes) -> None:
    """Draw the label mapping's accuracy as demonstrations grow, below the best there can be."""
    chosen = frame.query("data == 'label mapping'")
    lines: dict[Any, dict[int, Interval]] = {}
    for eta, measure in chosen[["eta", "measure"]].drop_duplicates().itertuples(index=False):
        values = chosen.query("eta == @eta and measure == @measure")["value"].tolist()
        lines.setdefault(eta, {})[int(measure.rsplit(" ", 1)[1])] = spread(values)
    learned = lines.pop("learned", None)
    fixed = {eta_name(eta): lines[eta] for eta in sorted(lines)}
    icl.plots.curves(fixed, ylabel="accuracy", is_ordered=True, ax=ax)
    if learned:
        ax.plot(list(learned), [estimate.value for estimate in learned.values()], label="η learned", **LEARNED)
    ax.plot(ceiling, color="0.5", linestyle=":", label="best possible")
    ax.set(xlabel="demonstrations", ylim=(0, 1))


def draw_trained(frame: pd.DataFrame, ceiling: Sequence[float], out: Path) -> None:
    """Draw perplexity against η, accuracy against demonstrations, and accuracy against η, of what there is."""
    validation = [m for m in frame["measure"].drop_duplicates() if str(m).startswith("perplexity, val")]
    has_mapping = bool(frame["data"].eq("label mapping").any())
    widths = [1.0] * bool(validation) + [1.35, 1.0] * has_mapping
    fig, axes = plt.subplots(1, len(widths), figsize=(icl.plots.PAGE_WIDTH, 2.9), width_ratios=widths, squeeze=False)
    left = list(axes[0])
    if validation:
        ax = left.pop(0)
        length = validation[-1].rsplit(" ", 1)[1]
        draw_curve(frame, "text", validation[-1], ax)
        ax.set(title="text", ylabel=f"perplexity of held-out\ntext ({length} tokens)")
    if has_mapping:
        draw_shots(frame, ceiling, left[0])
        left[0].set_title("label mapping")
        draw_curve(frame, "label mapping", f"accuracy after {SHOWN[-1]}", left[1])
        left[1].set(title="label mapping", ylabel=f"accuracy after\n{SHOWN[-1]} demonstrations")
    for ax in axes[0]:
        _rename_band(ax)
    finish(fig, list(axes[0]), "Decoders trained from scratch with and without momentum attention", out / "momentum")


def _rename_band(ax: Axes) -> None:
    """Say in the legend that bands are over seeds, of which few have none."""
    for band in ax.collections:
        if band.get_label() == icl.plots.INTERVAL:
            band.set_label(SEEDS_BAND)


def learned_etas(cells: CellsByPart) -> pd.DataFrame:
    """Return the η that every head learned on text: seed, layer, head, η."""
    rows = [
        (one["seed"], layer, head, eta)
        for one in cells.get("text", [])
        if one["eta"] == "learned"
        for layer, of_layer in enumerate(one["etas"])
        for head, eta in enumerate(of_layer)
    ]
    return pd.DataFrame(rows, columns=["seed", "layer", "head", "eta"])


def draw_eta(frame: pd.DataFrame, out: Path) -> None:
    """Draw the η that heads learned: means over seeds."""
    shape = [len(frame[name].unique()) for name in ("seed", "layer", "head")]
    learned = torch.tensor(frame.sort_values(["seed", "layer", "head"])["eta"].to_numpy()).reshape(shape)
    fig, ax = plt.subplots(figsize=(icl.plots.COLUMN_WIDTH, 2.6))
    icl.plots.heads(learned, label="η, mean over seeds", limits=(0, float(learned.mean(0).max())), ax=ax)
    finish(fig, [], f"η that heads learned on text, {len(learned)} seeds", out / "learned_eta")


def draw_added(frame: pd.DataFrame, model: str, out: Path) -> None:
    """Draw the pretrained model's accuracy against the η that it is given, a panel for each task."""
    tasks = list(frame["task"].drop_duplicates())
    size = min(icl.plots.PAGE_WIDTH, 1.2 + 1.9 * len(tasks)), 2.7
    fig, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True)
    for ax, task in zip(axes[0], tasks, strict=True):
        lines: dict[str, dict[float, Interval]] = {}
        for one in frame.query("task == @task").to_dict("records"):
            label = f"{one['k']} demonstrations" if one["k"] else "zero-shot"
            lines.setdefault(label, {})[one["eta"]] = one["accuracy"]
        icl.plots.curves(lines, ylabel="accuracy" if ax is axes[0][0] else "", ax=ax)
        ax.set(xlabel="η at every layer", title=task, ylim=(0, 1))
    heading = "A pretrained model given momentum attention without training"
    finish(fig, list(axes[0]), f"{heading}\n{model_title(model)}, protocol answer", out / "intervention")


def redraw(out: Path, model: str) -> None:
    """Draw the figures again from the tables of a folder, without cells; losses are only in cells."""
    frame = read_csv(out / "runs.csv", dtype={"eta": object})
    frame["eta"] = [eta if eta == "learned" else float(eta) for eta in frame["eta"]]
    draw_trained(frame, best_accuracies(), out)
    rows = read_csv(out / "intervention.csv")
    accuracies: list[Any] = [Interval(row["value"], row["low"], row["high"], 0) for row in rows.to_dict("records")]
    rows["accuracy"] = accuracies
    draw_added(rows, model, out)
    if (out / "learned_eta.csv").exists():
        draw_eta(read_csv(out / "learned_eta.csv"), out)


def best_accuracies() -> list[float]:
    """Return the best accuracy of the label mapping there can be, by the number of demonstrations."""
    data = pretraining.LabelMapping()
    return [data.best_accuracy(n) for n in range(data.n_pairs)]


def conclusions(differences: pd.DataFrame) -> list[str]:
    """Return what the tests over seeds say, in words: a difference counts where p times their number is below .05."""
    validation = differences[differences["measure"].str.startswith("perplexity, val")]["measure"].tolist()[-1:]
    signs = {**dict.fromkeys(validation, -1), f"accuracy after {SHOWN[-1]}": 1, MEAN: 1}
    asked = differences.query("measure in @signs and eta != 0").to_dict("records")
    n = sum(one["seeds"] >= ENOUGH for one in asked)
    lines = []
    for one in asked:
        apart = Interval(one["difference"], one["low"], one["high"], 1)
        numbers = f"{apart.format(3)}, p = {one['p']:.2g}" if apart.known else f"{apart.value:.3f}"
        seeds = f"{one['seeds']} seeds" if one["seeds"] > 1 else "one seed"
        about = f"{one['data']}, {one['measure']}, {eta_name(one['eta'])}, {seeds}"
        lines.append(f"- {about}: {numbers}, **{verdict(one, signs[one['measure']], n)}**")
    return ["\n".join(lines)]


def write(cells: CellsByPart, args: argparse.Namespace, command: str) -> None:
    """Write the tables and pictures of all parts that have results, and the page that shows them."""
    out: Path = args.out
    sections = []
    frame = trained(cells)
    if len(frame):
        write_csv(out / "runs.csv", frame)
        apart = differences(frame)
        write_csv(out / "differences.csv", apart)
        draw_trained(frame, cells["mapping"][0]["ceiling"] if cells.get("mapping") else [], out)
        if cells.get("text"):
            draw_losses(cells, out)
        sections += ["## Does momentum help?", *conclusions(apart), "![perplexity and accuracy](momentum.png)"]
        sections += ["![training loss](losses.png)"] if cells.get("text") else []
        sections += section(apart, "Perplexity", lambda name: name.startswith("perplexity"), 2)
        if cells.get("mapping"):
            best = ", ".join(f"{cells['mapping'][0]['ceiling'][n]:.3f} after {n}" for n in SHOWN)
            measures = [f"accuracy after {n}" for n in SHOWN]
            sections += section(apart, "Label mapping: accuracy as demonstrations grow", measures.__contains__, 3)
            sections += [f"The best there can be, knowing every x seen and guessing at others: {best}."]
        titles = tuple(f"{title} accuracy" for title in TITLES.values())
        sections += section(apart, "Classification tasks", lambda name: name.startswith((*titles, MEAN)), 3)
    learned = learned_etas(cells)
    if len(learned):
        write_csv(out / "learned_eta.csv", learned, float_format="%.6g")
        draw_eta(learned, out)
        sections += ["## What heads learned", "![η by layer and head](learned_eta.png)"]
    if cells.get("intervention"):
        frame = added(cells)
        draw_added(frame, args.model, out)
        accuracies = [(one.value, one.low, one.high) for one in frame["accuracy"]]
        ends = pd.DataFrame(accuracies, columns=["value", "low", "high"])
        write_csv(out / "intervention.csv", frame.drop(columns=["accuracy", "paired"]).join(ends))
        sections += [f"## {markdown_text(model_title(args.model))}, given momentum at every layer", added_table(frame)]
        sections += ["![accuracy against η](intervention.png)"]
    versions = next((cell["versions"] for of_part in cells.values() for cell in of_part), {})
    page = (DATA / "momentum_page.md").read_text(encoding="utf-8")
    page = page.format(
        command=command,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        parts="\n".join(described(cells, args)),
        sections="\n\n".join(sections),
        files="\n".join(f"| `{name}` | {what} |" for name, what in FILES.items() if (out / name).exists()),
    )
    write_text(out / "README.md", page)


def described(cells: CellsByPart, args: argparse.Namespace) -> list[str]:
    """Return the description of each part that was run."""
    corpus = "AG News" if args.corpus == "agnews" else markdown_code(Path(args.corpus).name)
    parts = {
        "text": f"- **text**: the texts of {corpus} as lines, a byte-level vocabulary learned on the training split; "
        "perplexity at the training length, and at a quarter, a half and all of it on texts held out.",
        "mapping": "- **label mapping**: pairs `x y x y …` of which every sequence draws its own mapping from 8 x to 4 "
        "y; only the context tells. Accuracy after as many demonstrations, whether or not x is among them.",
        "tasks": "- **tasks**: the decoders trained on text, classifying in context.",
    }
    lines = [line for part, line in parts.items() if cells.get(part)]
    if any(not cell["right"] for cell in cells.get("tasks", [])):
        missing = dict.fromkeys(f"{TITLES[one['task']]} after {one['k']}" for one in cells["tasks"] if not one["right"])
        lines.append(
            f"  Longer than the decoders' context and so left out, by some seed at least: {', '.join(missing)}."
        )
    if args.corpus == "agnews" and any(cell["task"] == "agnews" for cell in cells.get("tasks", [])):
        lines.append("  AG News' demonstrations are texts that the decoders were trained on, without their labels; its")
        lines.append("  queries are not.")
    return lines


def section(differences: pd.DataFrame, title: str, chosen: Callable[[str], bool], digits: int) -> list[str]:
    """Return a table with its title; nothing for an empty one."""
    measures = [name for name in differences["measure"].drop_duplicates() if chosen(name)]
    return [f"## {title}", table(differences, measures, digits)] if measures else []
