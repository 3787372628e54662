"""What `momentum.py` has computed, as tables and pictures: every η beside the same decoder without momentum."""

import argparse
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import DATA, TITLES, finish
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import icl_dual as icl
from icl_dual.intervals import Interval, Paired, bootstrap, over_seeds, paired_test

SHOWN = (1, 2, 4, 8, 15)
"""Demonstrations after which the tables have the label mapping's accuracy."""

MEAN = "mean of tasks, in context"

Found = Mapping[str, list[dict[str, Any]]]


def eta_name(eta: float | str) -> str:
    return "vanilla" if eta == 0 else f"η {eta}" if isinstance(eta, str) else f"η = {eta:g}"


def trained(found: Found) -> pd.DataFrame:
    """Every decoder's numbers, tidy: data, η, seed, measure, value."""
    rows = []
    for one in found.get("news", []):
        measures = {f"perplexity, {name}": value for name, value in one["perplexity"].items()}
        rows += [("news", one["eta"], one["seed"], *measure) for measure in measures.items()]
    for one in found.get("mapping", []):
        by_pair = enumerate(one["accuracy"])
        rows += [("label mapping", one["eta"], one["seed"], f"accuracy after {n}", value) for n, value in by_pair]
    for one in found.get("tasks", []):
        if one["right"]:
            name = f"{TITLES[one['task']]} accuracy after {one['k']}"
            rows.append(("tasks", one["eta"], one["seed"], name, float(np.mean(one["right"]))))
    frame = pd.DataFrame(rows, columns=["data", "eta", "seed", "measure", "value"])
    in_context = frame.query("data == 'tasks' and not measure.str.endswith('after 0')")
    means = in_context.groupby(["data", "eta", "seed"], sort=False, as_index=False).agg({"value": "mean"})
    return pd.concat([frame, means.assign(measure=MEAN)], ignore_index=True)


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Every η against vanilla, pair by pair of seeds: mean, difference with Student's interval, p, seeds."""
    rows = []
    for data, measure in frame[["data", "measure"]].drop_duplicates().itertuples(index=False):
        seeds = frame.query("data == @data and measure == @measure").pivot(index="seed", columns="eta", values="value")
        for eta in sorted(seeds.columns, key=str):
            values = seeds[eta].dropna()
            paired = seeds[[eta, 0.0]].dropna().to_numpy() if eta != 0 and 0.0 in seeds else np.zeros((0, 2))
            apart = over_seeds(*paired.T) if len(paired) else None
            found = Interval(np.nan, np.nan, np.nan, 1) if apart is None else apart.difference
            numbers = {"difference": found.value, "low": found.low, "high": found.high}
            about = {"data": data, "measure": measure, "eta": eta, "mean": values.mean(), "seeds": len(values)}
            rows.append(about | numbers | {"p": np.nan if apart is None else apart.p})
    return pd.DataFrame(rows)


def table(differences: pd.DataFrame, measures: Sequence[str], digits: int) -> str:
    """A row for each η, a column for each measure: the mean, and the difference from vanilla with its interval."""
    lines: dict[Any, dict[str, Any]] = {}
    for one in differences.query("measure in @measures").to_dict("records"):
        text = f"{one['mean']:.{digits}f}"
        if not np.isnan(one["difference"]):
            apart = Interval(one["difference"], one["low"], one["high"], 1, one["seeds"])
            text += f" ({apart.format(digits)})" if apart.known else f" ({apart.value:.{digits}f}, one seed)"
        line = lines.setdefault(one["eta"], {"": eta_name(one["eta"]), "seeds": one["seeds"]})
        line[one["measure"]] = text
    return pd.DataFrame(list(lines.values())).fillna("").to_markdown(index=False)


def verdict(one: Mapping[Any, Any], better: int) -> str:
    """Whether momentum makes a number better, by its interval over seeds; `better` is the sign of that."""
    if np.isnan(one.get("low", np.nan)):
        return "one seed tells nothing"
    if one["low"] > 0 or one["high"] < 0:
        return "better" if one["difference"] * better > 0 else "worse"
    return "no difference beyond that between seeds"


def added(found: Found) -> pd.DataFrame:
    """The pretrained model under momentum: accuracy by task, demonstrations and η, and its difference from η = 0."""
    tables: dict[tuple[str, int, float], list[list[int]]] = {}
    counts: dict[tuple[str, int, float], np.ndarray] = {}
    for one in found.get("intervention", []):
        if one["right"]:
            key = one["task"], one["k"], one["eta"]
            tables.setdefault(key, []).append(one["right"])
            counts[key] = counts.get(key, 0) + np.array(one["label_counts"])
    rows = []
    for (task, k, eta), right in tables.items():
        values = np.array(right, dtype=float)
        about = {"task": TITLES[task], "k": k, "eta": eta, "accuracy": bootstrap(values)}
        about["most frequent answer"] = counts[task, k, eta].max() / counts[task, k, eta].sum()
        plain = np.array(tables.get((task, k, 0.0), right), dtype=float)
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
    wide = frame.pivot(index="eta", columns="column", values="text")
    return wide[frame["column"].unique()].rename_axis("η", axis=0).to_markdown()


def spread(values: Sequence[float]) -> Interval:
    """The mean over seeds with Student's interval."""
    numbers = np.array(values)
    return over_seeds(numbers, np.zeros_like(numbers)).difference


def draw_losses(found: Found, ax: Axes) -> None:
    for index, eta in enumerate(dict.fromkeys(one["eta"] for one in found.get("news", []))):
        runs = [one["losses"] for one in found["news"] if one["eta"] == eta]
        step = [number for number, _ in runs[0]]
        ax.plot(step, np.mean([[loss for _, loss in run] for run in runs], axis=0), color=f"C{index}", linewidth=1)
        ax.lines[-1].set_label(eta_name(eta))
    ax.set(xlabel="step", ylabel="training loss, nats", title="news", ylim=(None, 6.5))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def draw_curve(frame: pd.DataFrame, data: str, measure: str, ax: Axes) -> None:
    """A measure against η, with the learned one as a line."""
    chosen: dict[Any, list[float]] = {}
    for one in frame.query("data == @data and measure == @measure").to_dict("records"):
        chosen.setdefault(one["eta"], []).append(one["value"])
    learned = chosen.pop("learned", None)
    fixed = {eta: spread(values) for eta, values in sorted(chosen.items())}
    icl.plots.curves({"fixed": fixed}, ylabel=measure, ax=ax)
    if learned:
        ax.axhline(float(np.mean(learned)), color="C1", linestyle="--", label="learned")
    ax.legend(frameon=False)
    ax.set(xlabel="η", title=data)
    ax.set_ylim(0, None)


def draw_shots(frame: pd.DataFrame, ax: Axes) -> None:
    """The label mapping's accuracy as demonstrations grow."""
    chosen = frame.query("data == 'label mapping'")
    lines: dict[str, dict[int, Interval]] = {}
    for eta, measure in chosen[["eta", "measure"]].drop_duplicates().itertuples(index=False):
        values = chosen.query("eta == @eta and measure == @measure")["value"].tolist()
        if len(values) > 1:
            lines.setdefault(eta_name(eta), {})[int(measure.rsplit(" ", 1)[1])] = spread(values)
    icl.plots.curves(lines, ylabel="accuracy", ax=ax)
    ax.legend(frameon=False)
    ax.set(xlabel="demonstrations", title="label mapping", ylim=(0, 1))


def draw_trained(found: Found, frame: pd.DataFrame, out: Path) -> None:
    fig, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    if found.get("news"):
        draw_losses(found, axes[0, 0])
        draw_curve(frame, "news", list(found["news"][0]["perplexity"])[-1].join(("perplexity, ", "")), axes[0, 1])
    if found.get("mapping"):
        draw_shots(frame, axes[1, 0])
        draw_curve(frame, "label mapping", f"accuracy after {SHOWN[-1]}", axes[1, 1])
    finish(fig, [], "Decoders trained with and without momentum attention", out / "momentum")


def draw_eta(found: Found, out: Path) -> None:
    learned = [one["etas"] for one in found.get("news", []) if one["eta"] == "learned"]
    if learned:
        values = torch.tensor(learned)
        fig, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
        icl.plots.heads(values, label="η, mean over seeds", limits=(0, float(values.mean(0).max())), ax=ax)
        finish(fig, [], "η that heads learned, on news", out / "learned_eta")


def draw_added(frame: pd.DataFrame, model: str, out: Path) -> None:
    tasks = list(frame["task"].drop_duplicates())
    fig, axes = plt.subplots(1, len(tasks), figsize=(3 * len(tasks) + 0.5, 3.4), layout="constrained", squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        lines: dict[str, dict[float, Interval]] = {}
        for one in frame.query("task == @task").to_dict("records"):
            lines.setdefault(f"{one['k']} demonstrations", {})[one["eta"]] = one["accuracy"]
        icl.plots.curves(lines, ylabel="accuracy" if ax is axes[0][0] else "", ax=ax)
        ax.set(xlabel="η", title=task, ylim=(0, 1))
    finish(fig, list(axes[0]), f"{model} given momentum at every layer", out / "intervention")


def conclusions(differences: pd.DataFrame) -> list[str]:
    """What the intervals say, in words."""
    lines = []
    validation = differences[differences["measure"].str.startswith("perplexity, val")]["measure"].tolist()[-1:]
    for measure, better in [*((name, -1) for name in validation), (f"accuracy after {SHOWN[-1]}", 1), (MEAN, 1)]:
        for one in differences.query("measure == @measure and eta != 0").to_dict("records"):
            apart = Interval(one["difference"], one["low"], one["high"], 1).format(3)
            said = f"{one['data']}, {measure}, {eta_name(one['eta'])}, {one['seeds']} seeds"
            lines.append(f"- {said}: {apart}, **{verdict(one, better)}**")
    return lines


def write(found: Found, args: argparse.Namespace) -> None:
    """All tables and pictures, and the page that shows them."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    if any(found.get(part) for part in ("news", "mapping", "tasks")):
        frame = trained(found)
        frame.to_csv(out / "runs.csv", index=False)
        apart = differences(frame)
        apart.to_csv(out / "differences.csv", index=False)
        draw_trained(found, frame, out)
        draw_eta(found, out)
        perplexities = [name for name in frame["measure"].unique() if name.startswith("perplexity")]
        shown = [f"accuracy after {n}" for n in SHOWN]
        of_tasks = [name for name in frame["measure"].unique() if "accuracy after" in name and name not in shown]
        of_tasks = [name for name in of_tasks if name.split(" ")[0] in TITLES.values()]
        sections += ["## Does momentum help?", *conclusions(apart)]
        sections += ["## Perplexity", table(apart, perplexities, 2)]
        sections += ["## Label mapping: accuracy as demonstrations grow", table(apart, shown, 3)]
        sections += ["## Classification tasks", table(apart, [*of_tasks, MEAN], 3)]
    if found.get("intervention"):
        frame = added(found)
        draw_added(frame, args.model, out)
        ends = pd.DataFrame(
            [(one.value, one.low, one.high) for one in frame["accuracy"]], columns=["value", "low", "high"]
        )
        frame.drop(columns=["accuracy", "paired"]).join(ends).to_csv(out / "intervention.csv", index=False)
        sections += [f"## {args.model}, given momentum at every layer", added_table(frame)]
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("icl-dual", "torch", "transformers", "transformer-lens")
    )
    page = (
        (DATA / "momentum_page.md")
        .read_text()
        .format(
            command=f"python analyses/momentum.py --preset {args.preset}",
            versions=f"{versions}, python {platform.python_version()}",
            sections="\n\n".join(sections),
            model=args.model,
        )
    )
    (out / "README.md").write_text(page)
