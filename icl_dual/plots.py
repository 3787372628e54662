"""Plots: each function takes Axes and returns them; all it computes are means over queries, errors and quantiles."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from icl_dual.arguments import Count, Finite, checked
from icl_dual.massive_activations import MassiveActivations
from icl_dual.metrics import catalogue
from icl_dual.metrics.catalogue import Drawing
from icl_dual.metrics.comparison import Comparison
from icl_dual.prompt_view import TokenView
from icl_dual.source_attention import QUANTITY_TITLES, Quantity, SourceAttention
from icl_dual.statistics.intervals import Interval

FONT: dict[str, Any] = {"fontsize": 7, "family": "monospace"}
"""The font of a prompt's text."""

LAYERWISE = tuple(catalogue.figures())
"""The figures of the paper's metrics: each draws a metric with others beside it (`Drawing.beside`)."""


LINESTYLES = ("-", "--", "-.", ":")
"""The line styles of curves, which tell them apart without colour."""


@checked
def literal(text: str) -> str:
    """Return a name as a text of a figure that shows the name: a dollar sign begins no formula.

    All names are drawn so: those of series, rows, metrics, demonstrations and label words. Titles and axes' texts that
    are passed as such may hold formulas.

    >>> print(literal("costs $5 or $6"))
    costs \\$5 or \\$6
    """
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text  # matplotlib leaves labels with _ out of legends


@checked
def layers(comparisons: Comparison | Sequence[Comparison], metric: str, *, ax: Axes | None = None) -> Axes:
    """Draw a metric by layer, with its baselines: means over queries, with bands of ±1.96 standard errors.

    Where comparisons have replicas of the finetuning, dotted lines hold the range of the means over replicas.

    Args:
        comparisons: one comparison, or several of the same queries (of several seeds, say), averaged query by query.
        metric: `SimAOU`, `SimAM` or `Kendall`, with their baselines; or another metric that comparisons have by layer,
            also one that is not registered now. A registered metric without `Drawing.beside` is drawn with its
            `baselines`, as dotted grey lines.
        ax: the Axes to draw on; new Axes with a legend where not given.

    Returns:
        The Axes drawn on.

    Raises:
        ValueError: no such metric is registered or in every comparison, or the comparisons have none of its lines.
    """
    together = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    drawings = _drawings(metric)
    if not drawings and all(metric in comparison.per_layer for comparison in together):
        drawings = {metric: Drawing()}  # comparisons keep the values of a metric that is not registered now
    if not drawings:
        raise ValueError(
            f"expected one of the figures {list(catalogue.figures())} or of the metrics by layer "
            f"{list(catalogue.layer_metrics())}, got {metric!r}: pass one of these, or register it with register_metric"
        )
    names = [name for name in drawings if all(name in comparison.per_layer for comparison in together)]
    if not names:
        raise ValueError(
            f"expected comparisons with {metric!r}, got at least one without: it was made before the metric was "
            "registered, or without the delta that it needs. Compare again"
        )
    ax, is_new = _axes(ax)
    for name in names:
        drawing = drawings[name]
        # Comparisons of several seeds share their queries: averaged first, so that a query counts once.
        values = torch.stack([comparison.per_layer[name] for comparison in together]).nanmean(0)
        style = {"color": drawing.color, "linestyle": drawing.linestyle}
        _mean_by_layer(values, ax, label=drawing.label or literal(name), **style)
        for edge in _replica_edges(together, name):
            ax.plot(np.arange(len(edge)), values.nanmean(0) + edge, color=drawing.color, linestyle=":", linewidth=0.8)
    lead = next(iter(drawings))
    _finish(ax, is_new, ylabel=drawings[lead].axis_label or literal(lead))
    return ax


@checked
def by_layer(series: Mapping[str, Float[Tensor, "_query _layer"]], *, ylabel: str = "", ax: Axes | None = None) -> Axes:
    """Draw quantities by layer: means over queries, with bands of ±1.96 standard errors.

    Args:
        series: by name, each query's value at each layer; NaNs are left out.
        ylabel: the y axis's text.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    ax, is_new = _axes(ax)
    for index, (label, values) in enumerate(series.items()):
        _check_shape(values, "query layer")
        _mean_by_layer(values, ax, label=literal(label), color=f"C{index}")
    _finish(ax, is_new, ylabel=ylabel)
    return ax


@checked
def against_null(
    values: Float[Tensor, "query layer head"],
    null: Float[Tensor, "query layer head"],
    *,
    ylabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw a quantity by layer with its null: means, with bands that hold 95 % of all queries and heads.

    Args:
        values: for example `UpdateComparison.cosine`.
        null: the quantity for random directions, for example `UpdateComparison.cosine_random`.
        ylabel: the y axis's text.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    _check_shape(values, "query layer head")
    _check_shape(null, "query layer head")
    ax, is_new = _axes(ax)
    for label, series, color in (("random directions", null, "0.5"), ("ΔW_ICL and ΔW_FT", values, "C0")):
        flat = series.transpose(0, 1).flatten(1).double()
        low, high = flat.nanquantile(torch.tensor([0.025, 0.975], dtype=flat.dtype), dim=1)
        layer = np.arange(len(flat))
        ax.plot(layer, flat.nanmean(1), label=label, color=color)
        ax.fill_between(layer, low, high, color=color, alpha=0.2, linewidth=0)
    _finish(ax, is_new, ylabel=ylabel)
    return ax


@checked
def heads(
    values: Float[Tensor, "query layer head"],
    *,
    label: str = "",
    limits: tuple[Finite, Finite] = (0, 1),
    ax: Axes | None = None,
) -> Axes:
    """Draw a map of layers and heads: means over queries.

    Args:
        values: for example `Decomposition.demonstration_mass` or `Relaxation.update_cosine`.
        label: the colour bar's text; no colour bar where empty.
        limits: the values at the ends of the colour scale; where the first is negative, colours diverge from 0.
        ax: the Axes to draw on; new Axes where not given.
    """
    _check_shape(values, "query layer head")
    ax, _ = _axes(ax)
    colours = "RdBu_r" if limits[0] < 0 else "viridis"
    image = ax.imshow(
        values.nanmean(0).T.numpy(), aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1], origin="lower"
    )
    ax.set(xlabel="layer", ylabel="head")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if label:
        ax.figure.colorbar(image, ax=ax, label=label)
    return ax


@checked
def demonstrations(
    shares: Float[Tensor, "layer demo"], names: Sequence[str], *, label: str = "", ax: Axes | None = None
) -> Axes:
    """Draw the share of each demonstration in each layer's update: a map, demonstrations in the prompt's order.

    Args:
        shares: for example one query's `Decomposition.icl_share`, or `DeltaSummary.demonstrations_V`.
        names: the demonstrations' (or groups') names, from the top.
        label: the colour bar's text.
        ax: the Axes to draw on; new Axes where not given.

    Returns:
        The Axes drawn on.

    Raises:
        ValueError: `shares` has other axes, or there is not one name for each demonstration, at least one.
    """
    _check_shape(shares, "layer demo")
    ax, _ = _axes(ax)
    if len(names) != shares.shape[1] or not names:
        raise ValueError(
            f"expected a name for each of {shares.shape[1]} demonstrations, at least one, got {len(names)}: pass as "
            "many names as the shares' last axis is long"
        )
    most = float(shares.abs().nan_to_num().quantile(0.99))
    image = ax.imshow(shares.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
    ax.set_yticks(range(len(names)), [literal(name) for name in names], fontsize=7)
    ax.set(xlabel="layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, label=label, extend="both")
    return ax


@checked
def dots(estimates: Mapping[str, Mapping[str, Interval]], *, ax: Axes | None = None) -> Axes:
    """Draw estimates with their 95 % intervals, one row for each name, from the top.

    An estimate without interval is hollow; an unstable one (`Interval.unstable`) is a cross.

    Args:
        estimates: by row, then by series (tasks, say), which have the same colour in every row.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    ax, is_new = _axes(ax)
    series = list(dict.fromkeys(name for by_series in estimates.values() for name in by_series))
    for index, name in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * 0.6 / len(series)
        points = [(row + offset, of[name]) for row, of in enumerate(estimates.values()) if name in of]
        style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3, "color": f"C{index}"}
        looks: dict[str, dict[str, Any]] = {
            "stable": {"label": literal(name)},
            "unstable": {"marker": "x", "markersize": 5},
            "no interval": {"markerfacecolor": "white"},
        }
        for kind, look in looks.items():
            y = [at for at, estimate in points if _kind(estimate) == kind]
            chosen = [estimate for _, estimate in points if _kind(estimate) == kind]
            ax.plot([estimate.value for estimate in chosen], y, **style | look)
            low, high = [estimate.low for estimate in chosen], [estimate.high for estimate in chosen]
            ax.hlines(y, low, high, color=f"C{index}", linewidth=1.2)
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(estimates)), [literal(name) for name in estimates], fontsize="small")
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    ax.grid(axis="y", color="0.93")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if is_new:
        ax.legend(frameon=False)
    return ax


@checked
def curves(
    estimates: Mapping[str, Mapping[int, Interval] | Mapping[float, Interval]],
    *,
    ylabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw estimates against a number (of demonstrations, say, or η), with their 95 % intervals as bands.

    An unstable estimate (`Interval.unstable`) is crossed out: replicas of its finetuning differ by more than its
    interval over queries is wide.

    Args:
        estimates: by series, then by the number on the x axis.
        ylabel: the y axis's text.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    ax, is_new = _axes(ax)
    for index, (name, by_number) in enumerate(estimates.items()):
        x = list(by_number)
        style: dict[str, Any] = {"color": f"C{index}", "linestyle": LINESTYLES[index % len(LINESTYLES)], "marker": "."}
        ax.plot(x, [estimate.value for estimate in by_number.values()], label=literal(name), **style)
        low, high = ([getattr(estimate, end) for estimate in by_number.values()] for end in ("low", "high"))
        ax.fill_between(x, low, high, color=f"C{index}", alpha=0.2, linewidth=0)
        unstable = [(number, estimate.value) for number, estimate in by_number.items() if estimate.unstable]
        if unstable:
            ax.plot(*zip(*unstable, strict=True), "x", markersize=7, color=f"C{index}")
    if is_new:
        ax.legend(frameon=False)
    ax.set(ylabel=ylabel)
    if all(isinstance(number, int) for by_number in estimates.values() for number in by_number):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


@checked
def massive_activations(massive: MassiveActivations, *, ax: Axes | None = None) -> Axes:
    """Draw by layer the largest residual norm of a query token, in units of the median, in the three settings.

    Args:
        massive: for example what `Experiment.massive_activations` returns.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    ax, is_new = _axes(ax)
    for setting, ratios in massive.ratios.items():
        ax.plot(np.arange(ratios.shape[1]), ratios.amax((0, 2)), ".-", label=literal(setting))
    ax.axhline(massive.ratio, color="0.5", linestyle=":", linewidth=0.8, label=f"massive: above {massive.ratio:g}")
    ax.set_yscale("log")
    if is_new:
        ax.legend(frameon=False)
    ax.set(xlabel="layer", ylabel="largest norm / median norm")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


@checked
def sources(captured: SourceAttention, quantity: Quantity = "mass", *, logit: int = 0, ax: Axes | None = None) -> Axes:
    """Draw by layer what each source has: means over prompts and positions, with bands of ±1.96 standard errors.

    Mass and norm are means over heads; shares of the attention output and effects on a logit are summed over heads.

    Args:
        captured: attention by source.
        quantity: `mass`, `norm`, `share` or `logit_effect`.
        logit: which of the capture's `logit_tokens`, for `logit_effect`.
        ax: the Axes to draw on; new Axes with a legend where not given.

    Returns:
        The Axes drawn on.

    Raises:
        ValueError: the capture has no effects on logits.
    """
    values = captured.values(quantity, logit).flatten(0, 1)
    by_source = values.mean(2) if quantity in ("mass", "norm") else values.sum(2)
    series = {name: by_source[..., index] for index, name in enumerate(captured.names)}
    ax = by_layer(series, ylabel=QUANTITY_TITLES[quantity], ax=ax)
    if captured.layers != tuple(range(len(captured.layers))):
        ax.set_xticks(range(len(captured.layers)), [str(layer) for layer in captured.layers])
    return ax


@checked
def source_tokens(view: TokenView, *, width: Count = 90, ax: Axes | None = None) -> Axes:
    """Draw a prompt's text, each token on the colour of its number: blue above 0, red below, white at 0.

    Args:
        view: for example what `SourceAttention.show` returns.
        width: the number of characters of a line.
        ax: the Axes to draw on; new Axes where not given.

    Returns:
        The Axes drawn on.
    """
    places, row, column = [], 0, 0
    for text, colour in zip(view.texts, view.colours(), strict=True):
        for piece in text.splitlines(keepends=True):
            visible = piece.rstrip("\n")
            if column and column + len(visible) > width:
                row, column = row + 1, 0
            places.append((visible, row, column, colour))
            row, column = (row + 1, 0) if piece.endswith("\n") else (row, column + len(visible))
    n_rows = row + 1
    if ax is None:
        ax = plt.figure(figsize=(0.085 * width, 0.6 + 0.22 * n_rows), layout="constrained").subplots()
    for text, row, column, colour in places:
        ax.add_patch(Rectangle((column, row), len(text), 1, facecolor=colour, edgecolor="none"))
        for index, character in enumerate(text):  # one by one: every character has its column in any font
            ax.text(column + index + 0.5, row + 0.5, literal(character), ha="center", va="center", **FONT)
    ax.set(xlim=(0, width), ylim=(n_rows, 0))
    ax.set_title(literal(view.title), fontsize="small")
    ax.axis("off")
    return ax


@checked
def label_counts(
    comparisons: Comparison | Sequence[Comparison], label_words: Sequence[str], *, ax: Axes | None = None
) -> Axes:
    """Draw the share of the queries for which each label is the gold one, and is predicted in each setting.

    It shows a model that predicts one label for every query, which an accuracy does not.

    Args:
        comparisons: one comparison, or several of one task, whose queries are counted together.
        label_words: the task's label words, in the order of label indices.
        ax: the Axes to draw on; new Axes where not given.
    """
    together = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    ax, _ = _axes(ax)
    settings = ["gold", *together[0].predictions]
    width = 0.8 / len(settings)
    for index, setting in enumerate(settings):
        labels = torch.cat([c.gold if setting == "gold" else c.predictions[setting] for c in together])
        shares = labels.bincount(minlength=len(label_words)) / len(labels)
        at = np.arange(len(label_words)) + (index - (len(settings) - 1) / 2) * width
        ax.bar(
            at, shares.numpy(), width, label=literal(setting), color="0.75" if setting == "gold" else f"C{index - 1}"
        )
    ax.set_xticks(np.arange(len(label_words)), [literal(word) for word in label_words])
    ax.set(ylabel="share of queries", ylim=(0, 1))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _drawings(metric: str) -> dict[str, Drawing]:
    """Return the drawings of a figure's or metric's lines by name, its own first; empty where none has this name."""
    metrics, figures = catalogue.metrics(), catalogue.figures()
    lead = figures.get(metric) or metrics.get(metric)
    if lead is None or lead.axes != "query layer":
        return {}
    drawings = {lead.name: lead.drawing}
    if lead.drawing.beside:
        beside = lead.drawing.beside if metric in figures else ()
        return drawings | {name: metrics[name].drawing for name in beside if name in metrics}
    baselines = () if lead in catalogue.BUILT_IN else lead.baselines
    return drawings | {name: Drawing(color="0.5", linestyle=":") for name in baselines}


def _check_shape(values: Tensor, axes: str) -> None:
    if values.ndim != len(axes.split()):
        raise ValueError(
            f"expected values by [{axes}], got a tensor of shape {list(values.shape)}: pass a tensor with these axes"
        )


def _axes(ax: Axes | None) -> tuple[Axes, bool]:
    """Return the Axes given, or new ones, and whether they are new."""
    return (plt.figure(figsize=(5, 3.2), layout="constrained").subplots(), True) if ax is None else (ax, False)


def _kind(estimate: Interval) -> str:
    """Return how an estimate is marked."""
    if not estimate.known:
        return "no interval"
    return "unstable" if estimate.unstable else "stable"


def _replica_edges(comparisons: Sequence[Comparison], metric: str) -> list[Float[Tensor, " layer"]]:
    """Return how far replicas of the finetuning move a metric's mean down and up, by layer; empty where they do not.

    Comparisons of several seeds were finetuned apart: their moves add up as independent errors do.
    """
    ranges = [
        torch.stack(comparison.stability.layer_range(metric))
        for comparison in comparisons
        if comparison.stability is not None and metric in comparison.stability.layer_shifts
    ]
    if len(ranges) < len(comparisons) or not any(edges.any() for edges in ranges):
        return []
    down, up = torch.stack(ranges).square().sum(0).sqrt() / len(ranges)
    return [-down, up]


def _mean_by_layer(values: Float[Tensor, "query layer"], ax: Axes, *, color: str, **style: Any) -> None:
    mean = values.nanmean(0)
    error = 1.96 * ((values - mean) ** 2).nanmean(0).sqrt() / values.isfinite().sum(0).clamp_min(1).sqrt()
    layer = np.arange(len(mean))
    ax.plot(layer, mean, color=color, **style)
    ax.fill_between(layer, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _finish(ax: Axes, is_new: bool, *, ylabel: str) -> None:
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if is_new:
        ax.legend(frameon=False)
    ax.set(xlabel="layer", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
