"""Tables and figures of `implicit.py`, from what each change does to held-out queries."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import icl_dual as icl
from icl_dual.scripts.common import TITLES, finish, short
from icl_dual.statistics import Interval, bootstrap

Effects = dict[str, dict[str, Tensor]]
"""By the name of the change: KL, agreement and correctness by query, and what it writes by query and layer."""

CONTEXT, ZERO_SHOT, LAYER_CAUSAL, EXACT = "ICL", "zero-shot", "FT, layer-causal", "exact patch"
SHARED = "shared patch"

METRICS = {"kl": "KL to ICL (nats)", "agreement": "agreement with ICL", "correct": "accuracy"}
"""The answers' metrics, by the name of their tensor."""

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, GREY = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
    "#888888",
)
"""The colours of Okabe and Ito, and a grey."""

STYLES: dict[str, tuple[str, Any, str]] = {
    SHARED: (BLUE, "-", "o"),
    f"{SHARED}, rank 1": (BLUE, ":", "."),
    CONTEXT: (BLACK, "-", "s"),
    ZERO_SHOT: (BLACK, ":", "D"),
    "FT": (VERMILLION, "--", "^"),
    LAYER_CAUSAL: (VERMILLION, "-.", "v"),
    "mean patch": (GREEN, "--", "P"),
    "thought matrix": (GREEN, "-.", "X"),
    "another prompt's patch": (SKY, "--", "<"),
    "another task's patch": (SKY, "-.", ">"),
    "function vector": (PURPLE, (0, (5, 1, 1, 1, 1, 1)), "*"),
    "random patch": (GREY, (0, (1, 2)), "x"),
}
"""Colour, line style and marker of each change."""

IN_FIGURE = {
    CONTEXT: "in context (ICL)",
    "FT": "finetuned",
    LAYER_CAUSAL: "finetuned, layer-causal",
    "random patch": "random patch (null)",
}
"""The names of changes in figures, where they differ from those in the tables."""


def task_title(task: str) -> str:
    """Return a task's title; of a registered task, its name."""
    return TITLES.get(task, task)


def ranked(rank: int) -> str:
    """Return the name of the shared patch of a rank."""
    return f"{SHARED}, rank {rank}"


def rank_of(change: str) -> int | None:
    """Return the rank in the name of a shared patch; `None` for other changes."""
    name, _, rank = change.rpartition(" rank ")
    return int(rank) if name == f"{SHARED}," else None


def by_task(effects: Mapping[Any, Effects]) -> dict[tuple[str, str], list[Effects]]:
    """Return the effects of all seeds by model and task."""
    grouped: dict[tuple[str, str], list[Effects]] = {}
    for run, by_name in effects.items():
        grouped.setdefault((run.model, run.task), []).append(by_name)
    return grouped


def names_of(seeds: Sequence[Effects]) -> list[str]:
    """Return the changes that every seed has, in order."""
    return [name for name in seeds[0] if all(name in by_name for by_name in seeds)]


def interval(seeds: Sequence[Effects], change: str, metric: str) -> Interval:
    """Return the mean of a metric over seeds and queries, with its bootstrap interval."""
    return bootstrap(torch.stack([by_name[change][metric] for by_name in seeds]))


def behaviour(effects: Mapping[Any, Effects]) -> pd.DataFrame:
    """Return what each change makes the model answer: a row for each model, task, change and metric."""
    rows = []
    for (model, task), seeds in by_task(effects).items():
        for change in names_of(seeds):
            for metric in METRICS:
                estimate = interval(seeds, change, metric)
                numbers = {name: getattr(estimate, name) for name in ("value", "low", "high", "n_queries", "n_seeds")}
                rows.append({"model": short(model), "task": task, "change": change, "metric": metric} | numbers)
    return pd.DataFrame(rows)


def behaviour_table(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one metric with intervals: a row for each change, a column for each model and task."""
    rows: dict[str, dict[str, str]] = {}
    for row in frame.query("metric == @metric").to_dict(orient="records"):
        rows.setdefault(row["change"], {})[_column(row["model"], row["task"])] = _interval_of(row).format(2)
    table = pd.DataFrame([{METRICS[metric]: change} | cells for change, cells in rows.items()])
    return table.fillna("–")


def _interval_of(row: Mapping[Any, Any]) -> Interval:
    """Return the estimate in a row of `behaviour`."""
    return Interval(row["value"], row["low"], row["high"], int(row["n_queries"]), int(row["n_seeds"]))


def _column(model: str, task: str) -> str:
    return f"{short(model)}, {task_title(task)}"


def stream(effects: Mapping[Any, Effects]) -> pd.DataFrame:
    """Return what each change writes against the in-context change: a row for each model, task, change and layer."""
    rows = []
    for (model, task), seeds in by_task(effects).items():
        for change in written(seeds):
            means = _stream_means(seeds, change)
            for layer in range(len(means["cosine"])):
                numbers = {name: values[layer].item() for name, values in means.items()}
                rows.append({"model": short(model), "task": task, "change": change, "layer": layer} | numbers)
    return pd.DataFrame(rows)


def written(seeds: Sequence[Effects]) -> list[str]:
    """Return the changes that write something, and of which it is known."""
    names = [name for name in names_of(seeds) if "cosine" in seeds[0][name]]
    return [name for name in names if seeds[0][name]["cosine"].isfinite().any()]


def _stream_means(seeds: Sequence[Effects], change: str) -> dict[str, Tensor]:
    """Return means over seeds and queries by layer, and the null's deviation."""
    stacked = {
        name: torch.stack([by_name[change][name] for by_name in seeds]).double()
        for name in ("cosine", "cosine_random", "norm_ratio", "angles", "angles_random")
    }
    means = {name: values.flatten(0, 1).nanmean(0) for name, values in stacked.items() if "angles" not in name}
    angles = {name: values.nanmean((0, 2)) for name, values in stacked.items() if "angles" in name}
    deviation = stacked["cosine_random"].flatten(0, 1)
    return means | {"cosine_random_std": (deviation - means["cosine_random"]).square().nanmean(0).sqrt()} | angles


def stream_table(effects: Mapping[Any, Effects]) -> pd.DataFrame:
    """Return means over layers: cosine, size and principal angles against the null's."""
    rows: dict[str, dict[str, str]] = {}
    for (model, task), seeds in by_task(effects).items():
        for change in written(seeds):
            means = {name: values.nanmean().item() for name, values in _stream_means(seeds, change).items()}
            rows.setdefault(change, {})[_column(model, task)] = (
                f"{means['cosine']:.2f} ({means['cosine_random_std']:.2f}); {means['norm_ratio']:.2g}; "
                f"{means['angles']:.0f}° ({means['angles_random']:.0f}°)"
            )
    head = "cosine (null's deviation); size; angle (null)"
    return pd.DataFrame([{head: change} | cells for change, cells in rows.items()]).fillna("–")


def matrix_table(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return how similar changes of the same matrices are: means over layers, tasks and seeds, with the null's."""
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in pd.concat(frames).to_dict(orient="records"):
        by_metric = values.setdefault((row["pair"], row["matrix"], row["model"]), {})
        by_metric.setdefault(row["metric"], []).append(row["value"])
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for (pair, matrix, model), by_metric in values.items():
        of = {metric: np.nanmean(numbers) for metric, numbers in by_metric.items()}
        angles = [f"{of[side]:.0f}° ({of[side + '_random']:.0f}°)" for side in ("left_angles", "right_angles")]
        cells = rows.setdefault((pair, matrix), {"pair": pair, "matrix": matrix})
        cosine = f"{of['cosine']:.2f} ({of['cosine_random']:.2f})"
        cells[model] = "; ".join([cosine, *angles, f"{of['norm_ratio']:.2g}"])
    return pd.DataFrame(list(rows.values())).fillna("–")


def draw_ranks(frame: pd.DataFrame, title: str, path: Path) -> None:
    """Draw accuracy and KL against the rank of the shared patch, a column for each task, and other changes.

    Args:
        frame: the rows of one model in `behaviour`.
        title: the model, and how it was run.
        path: where to, without ending.
    """
    tasks = list(frame["task"].unique())
    size = icl.plots.COLUMN_WIDTH, 4.9
    fig, axes = plt.subplots(2, len(tasks), figsize=size, squeeze=False, sharex=True, sharey="row")
    for column, task in enumerate(tasks):
        for row, metric in enumerate(("correct", "kl")):
            rows = frame.query("task == @task and metric == @metric").to_dict(orient="records")
            _draw_metric(axes[row, column], {of["change"]: _interval_of(of) for of in rows}, metric)
        axes[0, column].set_title(task_title(task))
        axes[1, column].set_xlabel("rank  |  other changes")
    for row, label in enumerate(("accuracy", "KL to ICL (nats)")):
        axes[row, 0].set_ylabel(label)
    axes[1, 0].set_yscale("log")
    finish(fig, list(axes.flat), f"Held-out queries, run with a changed model\n{title}", path)


def _draw_metric(ax: Axes, estimates: Mapping[str, Interval], metric: str) -> None:
    """Draw a metric of the shared patch along the rank, and to the right other changes, with their intervals."""
    ranks = {rank: name for name in estimates if (rank := rank_of(name)) is not None}
    colour, line, marker = STYLES[SHARED]
    curve = [estimates[name] for name in ranks.values()]
    x = list(ranks)
    ax.plot([str(rank) for rank in x], [point.value for point in curve], color=colour, linestyle=line, marker=marker)
    ax.lines[-1].set_label("shared patch, by rank")
    low, high = [point.low for point in curve], [point.high for point in curve]
    ax.fill_between(range(len(x)), low, high, color=colour, alpha=0.2, linewidth=0)
    ax.axvline(len(x) - 0.4, color="0.8", linewidth=0.6)
    others = [name for name in STYLES if name in estimates and name != ranked(1)]
    for index, name in enumerate(others):
        estimate = estimates[name]
        if metric == "kl" and name == CONTEXT:
            continue  # it is 0 by definition, which a logarithmic axis has no place for
        colour, line, marker = STYLES[name]
        if name in (CONTEXT, ZERO_SHOT):
            ax.axhline(estimate.value, color=colour, linestyle=line, linewidth=0.6, zorder=1)
        error = np.nan_to_num([[estimate.value - estimate.low], [estimate.high - estimate.value]])
        style = {"color": colour, "marker": marker, "markersize": 3.5, "elinewidth": 0.8, "linestyle": "none"}
        ax.errorbar(len(x) + 0.2 + 0.55 * index, estimate.value, error, label=IN_FIGURE.get(name, name), **style)
    labels = [str(rank) if (len(x) - 1 - at) % 2 == 0 else "" for at, rank in enumerate(x)]
    ax.set_xticks(range(len(x)), labels)
    icl.plots.explain_band(ax, "95 % interval")


def draw_stream(effects: Mapping[Any, Effects], title: str, path: Path) -> None:
    """Draw by layer the cosine of what each change writes with the in-context change, a panel for each task."""
    grouped = {task: seeds for (_, task), seeds in by_task(effects).items()}
    size = icl.plots.COLUMN_WIDTH, 2.2 + 1.5 * len(grouped)
    fig, axes = plt.subplots(len(grouped), 1, figsize=size, squeeze=False, sharex=True)
    for ax, (task, seeds) in zip(axes[:, 0], grouped.items(), strict=True):
        for index, (label, name) in enumerate(_drawn_changes(seeds)):
            means = _stream_means(seeds, name)
            colour, line, marker = STYLES[label]
            layers = np.arange(len(means["cosine"]))
            if label == SHARED:
                band = 2 * means["cosine_random_std"]
                ax.fill_between(layers, -band, band, color="0.85", linewidth=0, zorder=0, label="null, ±2 deviations")
                values = torch.stack([by_name[name]["cosine"] for by_name in seeds]).double()
                error = 1.96 * icl.plots.crossed_error(values)
                low, high = means["cosine"] - error, means["cosine"] + error
                ax.fill_between(layers, low, high, color=colour, alpha=0.25, linewidth=0)
                ax.collections[-1].set_label("±1.96 standard errors")
            style = {"color": colour, "linestyle": line, "marker": marker, "linewidth": 0.9}
            every = (index % 5, 5)
            ax.plot(layers, means["cosine"], markevery=every, label=IN_FIGURE.get(label, label), **style)
        ax.set_title(task_title(task))
    axes[-1, 0].set_xlabel("layer")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.supylabel("cosine with the in-context change", fontsize=7.5)
    finish(fig, list(axes.flat), f"What each change writes into the residual stream\n{title}", path)


def _drawn_changes(seeds: Sequence[Effects]) -> Iterator[tuple[str, str]]:
    """Yield each change to draw by layer: its label and its name. Of the shared patch, the full rank and rank one."""
    names = written(seeds)
    full = max((rank for name in names if (rank := rank_of(name)) is not None), default=None)
    for label in STYLES:
        name = ranked(full) if label == SHARED and full is not None else label
        if name in names and label != CONTEXT:
            yield label, name
