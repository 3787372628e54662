"""Quantities by layer: means with bands."""

# matplotlib's methods take keyword arguments without types.
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from icl_dual.arguments import checked
from icl_dual.massive_activations import MassiveActivations
from icl_dual.metrics import catalogue
from icl_dual.metrics.catalogue import Drawing
from icl_dual.metrics.comparison import Comparison
from icl_dual.plots.style import (
    BAND_ALPHA,
    drawing,
    explain_band,
    explain_line,
    literal,
    mark_every,
    resolved,
    series_style,
)
from icl_dual.source_attention import QUANTITY_TITLES, Quantity, SourceAttention

LAYERWISE = tuple(catalogue.figures())
"""The figures of the paper's metrics: each draws a metric with others beside it (`Drawing.beside`)."""


@checked
def layers(comparisons: Comparison | Sequence[Comparison], metric: str, *, ax: Axes | None = None) -> Axes:
    """Draw a metric by layer, with its baselines: means, with bands of ±1.96 standard errors.

    The errors are over queries, or over queries and seeds where there are several comparisons. Where comparisons have
    replicas of the finetuning, dotted lines hold the range of the metric's mean over replicas.

    Args:
        comparisons: one comparison, or several of the same queries (of several seeds, say).
        metric: `SimAOU`, `SimAM` (after less before finetuning) or `Kendall`, with their baselines; or another metric
            that comparisons have by layer, also one that is not registered now. A registered metric without
            `Drawing.beside` is drawn with its `baselines`, as grey lines.
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
    names = [
        name
        for name, how in drawings.items()
        if all({name, how.minus or name} <= comparison.per_layer.keys() for comparison in together)
    ]
    if not names:
        raise ValueError(
            f"expected comparisons with {metric!r}, got at least one without: it was made before the metric was "
            "registered, or without the delta that it needs. Compare again"
        )
    over = "queries and seeds" if len(together) > 1 else "queries"
    with drawing(ax) as on:
        for index, name in enumerate(names):
            how = drawings[name]
            values = torch.stack([_values(comparison, name, how) for comparison in together])
            style = {"color": resolved(how.color), "linestyle": how.linestyle, "marker": series_style(index)["marker"]}
            _mean_by_layer(values, on, index, label=how.label or literal(name), **style)
        explain_band(on, f"±1.96 standard errors over {over}")
        lead = next(iter(drawings))
        if lead in names:
            _draw_replicas(together, lead, drawings[lead], on)
        _finish(on, ylabel=drawings[lead].axis_label or literal(lead))
    return on


@checked
def by_layer(
    series: Mapping[str, Float[Tensor, "_query _layer"]],
    *,
    ylabel: str = "",
    over: str = "queries",
    ax: Axes | None = None,
) -> Axes:
    """Draw quantities by layer: means over queries, with bands of ±1.96 standard errors.

    Args:
        series: by name, each query's value at each layer; NaNs are left out.
        ylabel: the y axis's text.
        over: what the first axis of the values counts, for the legend's entry of the bands.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    for values in series.values():
        _check_shape(values, "query layer")
    with drawing(ax) as on:
        for index, (name, values) in enumerate(series.items()):
            _mean_by_layer(values[None], on, index, label=literal(name), **series_style(index))
        if any(len(values) > 1 for values in series.values()):
            explain_band(on, f"±1.96 standard errors over {over}")
        _finish(on, ylabel=ylabel)
    return on


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
    with drawing(ax) as on:
        styles: tuple[dict[str, Any], ...] = (
            series_style(0) | {"color": "0.5", "linestyle": ":", "marker": "D"},
            series_style(0),
        )
        for index, (label, tensor) in enumerate({"random directions": null, "ΔW_ICL and ΔW_FT": values}.items()):
            flat = tensor.transpose(0, 1).flatten(1).double().cpu()
            low, high = flat.nanquantile(torch.tensor([0.025, 0.975], dtype=flat.dtype), dim=1)
            layer = np.arange(len(flat))
            on.plot(layer, flat.nanmean(1), label=label, markevery=mark_every(index, len(flat)), **styles[index])
            on.fill_between(layer, low, high, color=styles[index]["color"], alpha=BAND_ALPHA, linewidth=0)
        explain_band(on, "95 % of queries and heads")
        _finish(on, ylabel=ylabel)
    return on


@checked
def massive_activations(massive: MassiveActivations, *, ax: Axes | None = None) -> Axes:
    """Draw by layer the largest residual norm of a query token, in units of the median, in the three settings.

    Args:
        massive: for example what `Experiment.massive_activations` returns.
        ax: the Axes to draw on; new Axes with a legend where not given.
    """
    with drawing(ax) as on:
        for index, (setting, ratios) in enumerate(massive.ratios.items()):
            n = ratios.shape[1]
            style: dict[str, Any] = series_style(index) | {"markevery": mark_every(index, n)}
            on.plot(np.arange(n), ratios.amax((0, 2)), label=literal(setting), **style)
        on.axhline(massive.ratio, color="0.5", linestyle=":", linewidth=0.8, label=f"massive: above {massive.ratio:g}")
        on.set_yscale("log")
        _finish(on, ylabel="largest residual norm (× median)")
    return on


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
    by_name = {name: by_source[..., index] for index, name in enumerate(captured.names)}
    ax = by_layer(by_name, ylabel=QUANTITY_TITLES[quantity], over="prompts and positions", ax=ax)
    if captured.layers != tuple(range(len(captured.layers))):
        ax.set_xticks(range(len(captured.layers)), [str(layer) for layer in captured.layers])
    return ax


@checked
def crossed_error(values: Float[Tensor, "seed query layer"]) -> Float[Tensor, " layer"]:
    """Return the standard error of the mean by layer: over queries, and over seeds where there are several.

    All seeds have the same queries: the variance of the mean is that of the queries' means over seeds, plus that of the
    seeds' means over queries, less what both count, the variance of single pairs (two-way clusters; Cameron, Gelbach
    and Miller, 2011). It is at least the variance over queries alone. NaNs are left out.
    """
    of_queries, of_seeds = values.nanmean(0), values.nanmean(1)
    by_query = _variance(of_queries) / of_queries.isfinite().sum(0).clamp_min(1)
    if len(values) == 1:
        return by_query.sqrt()
    by_seed = _variance(of_seeds) / of_seeds.isfinite().sum(0).clamp_min(1)
    rest = (values - of_queries - of_seeds[:, None] + values.nanmean((0, 1))).flatten(0, 1)
    pairs = _variance(rest) / rest.isfinite().sum(0).clamp_min(1)
    return (by_query + (by_seed - pairs).clamp_min(0)).sqrt()


def _variance(values: Float[Tensor, "item layer"]) -> Float[Tensor, " layer"]:
    """Return the sample variance over items, NaNs left out; 0 of a single one."""
    squares = (values - values.nanmean(0)).square()
    return squares.nansum(0) / (values.isfinite().sum(0) - 1).clamp_min(1)


def _values(comparison: Comparison, name: str, how: Drawing) -> Float[Tensor, "query layer"]:
    values = comparison.per_layer[name]
    return values - comparison.per_layer[how.minus] if how.minus else values


def _drawings(metric: str) -> dict[str, Drawing]:
    """Return the drawings of a figure's or metric's lines by name, its own first; empty where none has this name."""
    metrics, figures = catalogue.metrics(), catalogue.figures()
    lead = figures.get(metric) or metrics.get(metric)
    if lead is None or lead.axes != "query layer":
        return {}
    drawings = {lead.name: lead.drawing}
    if lead.drawing.minus and metric not in figures:  # by its own name, a metric is drawn as it is
        drawings = {lead.name: replace(lead.drawing, minus="", label=lead.name, axis_label="")}
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


def _draw_replicas(comparisons: Sequence[Comparison], name: str, how: Drawing, ax: Axes) -> None:
    """Draw the range of a metric's mean over replicas of the finetuning, where it is known."""
    style: dict[str, Any] = {"linestyle": ":", "linewidth": 0.8}
    mean = torch.stack([_values(comparison, name, how) for comparison in comparisons]).nanmean(0).nanmean(0)
    edges = _replica_edges(comparisons, name)
    for edge in edges:
        ax.plot(np.arange(len(edge)), mean + edge, color=resolved(how.color), label="_replicas", **style)
    if edges:
        explain_line(ax, "range over finetuning replicas", color=resolved(how.color), **style)


def _mean_by_layer(values: Float[Tensor, "seed query layer"], ax: Axes, index: int, **style: Any) -> None:
    """Draw the mean over seeds and queries by layer, with a band of ±1.96 standard errors."""
    values = values.double().cpu()
    mean, error = values.nanmean(0).nanmean(0), 1.96 * crossed_error(values)
    layer = np.arange(len(mean))
    ax.plot(layer, mean, markevery=mark_every(index, len(mean)), **style)
    ax.fill_between(layer, mean - error, mean + error, color=style["color"], alpha=BAND_ALPHA, linewidth=0)


def _finish(ax: Axes, *, ylabel: str) -> None:
    low, high = ax.dataLim.intervaly
    if low <= 0 <= high:  # elsewhere, the line would widen the range
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="layer", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))  # a model may have one layer
    ax.spines[["top", "right"]].set_visible(False)
