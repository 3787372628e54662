"""Estimates with intervals: rows of dots, curves, and shares of labels."""

# matplotlib's methods take keyword arguments without types.
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from icl_dual.arguments import checked
from icl_dual.metrics.comparison import Comparison
from icl_dual.plots.style import BAND_ALPHA, drawing, explain_band, explain_line, literal, ordered, series_style
from icl_dual.statistics.intervals import Interval

UNSTABLE = "unstable: replicas differ more than the interval"
"""What the legend says of crossed out estimates."""

NO_INTERVAL = "too few for an interval"
"""What the legend says of hollow estimates."""

INTERVAL = "95 % interval"
"""What the legend says of bars and bands."""

BARS: tuple[dict[str, Any], ...] = (
    {"color": "0.9"},
    {"color": "#56B4E9", "hatch": "...."},
    {"color": "#0072B2"},
    {"color": "#D55E00", "hatch": "////"},
)
"""The bars of gold labels and of the three settings: told apart by lightness and hatching."""


@checked
def dots(estimates: Mapping[str, Mapping[str, Interval]], *, ax: Axes | None = None) -> Axes:
    """Draw estimates with their 95 % intervals, one row for each name, from the top.

    An estimate without interval is hollow; an unstable one (`Interval.unstable`) is crossed out.

    Args:
        estimates: by row, then by series (tasks, say), which have the same colour and marker in every row.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    names = list(dict.fromkeys(name for by_series in estimates.values() for name in by_series))
    with drawing(ax) as on:
        for index, name in enumerate(names):
            offset = (index - (len(names) - 1) / 2) * 0.6 / len(names)
            points = [(row + offset, of[name]) for row, of in enumerate(estimates.values()) if name in of]
            _draw_points(on, points, literal(name), series_style(index) | {"linestyle": "none", "markersize": 3.5})
        every = [estimate for by_series in estimates.values() for estimate in by_series.values()]
        explain_line(on, INTERVAL, color="0.4", linewidth=1.2)
        if any(estimate.unstable for estimate in every):
            explain_line(on, UNSTABLE, linestyle="none", marker="x", markersize=6, color="black")
        if any(not estimate.known and not np.isnan(estimate.value) for estimate in every):
            explain_line(on, NO_INTERVAL, linestyle="none", marker="o", markerfacecolor="white", color="0.4")
        on.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        on.set_yticks(range(len(estimates)), [literal(name) for name in estimates])
        on.set_ylim(len(estimates) - 0.5, -0.5)
        on.grid(axis="y", color="0.93")
        on.set_axisbelow(True)
        on.spines[["top", "right"]].set_visible(False)
    return on


def _draw_points(ax: Axes, points: Sequence[tuple[float, Interval]], label: str, style: dict[str, Any]) -> None:
    """Draw one series of estimates at their heights, with its intervals."""
    known = [(y, estimate) for y, estimate in points if estimate.known]
    unknown = [(y, estimate) for y, estimate in points if not estimate.known]
    unstable = [(y, estimate) for y, estimate in known if estimate.unstable]
    ax.plot([estimate.value for _, estimate in known], [y for y, _ in known], label=label, **style)
    hollow: dict[str, Any] = style | {"markerfacecolor": "white"}
    ax.plot([estimate.value for _, estimate in unknown], [y for y, _ in unknown], **hollow)
    if unstable:
        cross: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 6, "color": "black", "zorder": 3}
        ax.plot([estimate.value for _, estimate in unstable], [y for y, _ in unstable], **cross)
    low, high = [estimate.low for _, estimate in known], [estimate.high for _, estimate in known]
    ax.hlines([y for y, _ in known], low, high, color=style["color"], linewidth=1.2)


@checked
def curves(
    estimates: Mapping[str, Mapping[int, Interval] | Mapping[float, Interval]],
    *,
    ylabel: str = "",
    is_ordered: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw estimates against a number (of demonstrations, say, or η), with their 95 % intervals as bands.

    An unstable estimate (`Interval.unstable`) is crossed out: replicas of its finetuning differ by more than its
    interval over queries is wide.

    Args:
        estimates: by series, then by the number on the x axis.
        ylabel: the y axis's text.
        is_ordered: whether the series are steps of an ordered quantity, such as η: their colours then go from light to
            dark.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    colours = ordered(len(estimates)) if is_ordered and estimates else []
    with drawing(ax) as on:
        for index, (name, by_number) in enumerate(estimates.items()):
            style = series_style(index)
            style |= {"color": colours[index], "linestyle": "-"} if is_ordered else {}
            on.plot(list(by_number), [estimate.value for estimate in by_number.values()], label=literal(name), **style)
            low, high = ([getattr(estimate, end) for estimate in by_number.values()] for end in ("low", "high"))
            on.fill_between(list(by_number), low, high, color=style["color"], alpha=BAND_ALPHA, linewidth=0)
            unstable = [(number, estimate.value) for number, estimate in by_number.items() if estimate.unstable]
            if unstable:
                on.plot(*zip(*unstable, strict=True), "x", markersize=6, color="black", zorder=3)
        every = [estimate for by_number in estimates.values() for estimate in by_number.values()]
        if any(estimate.known for estimate in every):
            explain_band(on, INTERVAL)
        if any(estimate.unstable for estimate in every):
            explain_line(on, UNSTABLE, linestyle="none", marker="x", markersize=6, color="black")
        on.set(ylabel=ylabel)
        if all(isinstance(number, int) for by_number in estimates.values() for number in by_number):
            on.xaxis.set_major_locator(MaxNLocator(integer=True))
        on.spines[["top", "right"]].set_visible(False)
    return on


@checked
def label_counts(
    comparisons: Comparison | Sequence[Comparison], label_words: Sequence[str], *, ax: Axes | None = None
) -> Axes:
    """Draw the share of the queries for which each label is the gold one, and is predicted in each setting.

    It shows a model that predicts one label for every query, which an accuracy does not.

    Args:
        comparisons: one comparison, or several of one task; their queries are counted together.
        label_words: the task's label words, in the order of label indices.
        ax: the Axes to draw on; new Axes where not given.
    """
    together = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    settings = ["gold", *together[0].predictions]
    width = 0.8 / len(settings)
    with drawing(ax) as on:
        for index, setting in enumerate(settings):
            labels = torch.cat([c.gold if setting == "gold" else c.predictions[setting] for c in together])
            shares = labels.bincount(minlength=len(label_words)) / len(labels)
            at = np.arange(len(label_words)) + (index - (len(settings) - 1) / 2) * width
            look: dict[str, Any] = BARS[index % len(BARS)] | {"edgecolor": "black", "linewidth": 0.4}
            on.bar(at, shares.cpu().numpy(), width, label=literal(setting), **look)
        on.set_xticks(np.arange(len(label_words)), [literal(word) for word in label_words])
        on.set(ylabel="share of queries", ylim=(0, 1))
        on.spines[["top", "right"]].set_visible(False)
    return on
