"""Pictures: Axes in, Axes out, nothing computed but means over queries, their standard errors, and quantiles."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from icl_dual.metrics.comparison import PER_LAYER, Comparison
from icl_dual.statistics.intervals import Interval

_LINES: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "SimAOU": (
        ("SimAOU", "ICL and FT", {"color": "C0"}),
        ("SimAOU unnormalised", "unnormalised", {"color": "C2", "linestyle": "--"}),
        ("SimAOU inflation null", "random updates for both", {"color": "0.3", "linestyle": "-."}),
        ("SimAOU random", "ICL and random", {"color": "0.5", "linestyle": ":"}),
    ),
    "SimAM": (
        ("SimAM after FT", "ICL and FT", {"color": "C0"}),
        ("SimAM before FT", "ICL and ZSL (before FT)", {"color": "C1", "linestyle": "--"}),
        ("SimAM random", "ICL and random", {"color": "0.5", "linestyle": ":"}),
    ),
    "Kendall": (
        ("Kendall", "ICL and FT, by its queries", {"color": "C0"}),
        ("Kendall on keys", "by its keys", {"color": "C2", "linestyle": "--"}),
        ("Kendall random", "ICL and random", {"color": "0.5", "linestyle": ":"}),
    ),
}
_AXIS_LABELS = {"SimAOU": "SimAOU (cosine)", "SimAM": "SimAM (cosine)", "Kendall": "Kendall's τ"}
LAYERWISE = tuple(_LINES)
"""The metrics that `layers` draws beside their baselines."""


def layers(comparisons: Comparison | Sequence[Comparison], metric: str, *, ax: Axes | None = None) -> Axes:
    """A metric by layer beside its baselines: means over queries, with bands of ±1.96 standard errors.

    Args:
        comparisons: one comparison, or several of the same queries (by seeds, say), averaged query by query.
        metric: `SimAOU`, `SimAM` or `Kendall`, beside their baselines; or any other that comparisons hold by layer.
        ax: where to draw; new Axes with a legend where not given.

    Returns:
        The Axes drawn on.
    """
    if metric not in (*_LINES, *PER_LAYER):
        raise ValueError(
            f"expected a metric out of {LAYERWISE} or of icl_dual.metrics.comparison.PER_LAYER, got {metric!r}"
        )
    together = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    ax, alone = _axes(ax)
    for name, label, style in _LINES.get(metric, ((metric, metric, {"color": "C0"}),)):
        if any(name not in comparison.per_layer for comparison in together):
            continue  # recordings may have no keys
        # Comparisons of several seeds share their queries: averaged first, so that a query counts once.
        values = torch.stack([comparison.per_layer[name] for comparison in together]).nanmean(0)
        _mean_by_layer(values, ax, label=label, **style)
    _finish(ax, alone, ylabel=_AXIS_LABELS.get(metric, metric))
    return ax


def by_layer(series: Mapping[str, Float[Tensor, "query layer"]], *, ylabel: str = "", ax: Axes | None = None) -> Axes:
    """Quantities by layer: means over queries, with bands of ±1.96 standard errors.

    Args:
        series: by name, each query's value at each layer; NaNs are left out.
        ylabel: what the values are.
        ax: where to draw; new Axes with a legend where not given.
    """
    ax, alone = _axes(ax)
    for index, (label, values) in enumerate(series.items()):
        _check_shape(values, "query layer")
        _mean_by_layer(values, ax, label=label, color=f"C{index}")
    _finish(ax, alone, ylabel=ylabel)
    return ax


def against_null(
    values: Float[Tensor, "query layer head"],
    null: Float[Tensor, "query layer head"],
    *,
    ylabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A quantity by layer beside its null: means, with bands that hold 95 % of all queries and heads.

    Args:
        values: e.g. `UpdateComparison.cosine`.
        null: the same of random directions, e.g. `UpdateComparison.cosine_random`.
        ylabel: what the values are.
        ax: where to draw; new Axes with a legend where not given.
    """
    _check_shape(values, "query layer head")
    _check_shape(null, "query layer head")
    ax, alone = _axes(ax)
    for label, found, color in (("random directions", null, "0.5"), ("ΔW_ICL and ΔW_FT", values, "C0")):
        flat = found.transpose(0, 1).flatten(1).double()
        low, high = flat.nanquantile(torch.tensor([0.025, 0.975], dtype=flat.dtype), dim=1)
        layer = np.arange(len(flat))
        ax.plot(layer, flat.nanmean(1), label=label, color=color)
        ax.fill_between(layer, low, high, color=color, alpha=0.2, linewidth=0)
    _finish(ax, alone, ylabel=ylabel)
    return ax


def heads(
    values: Float[Tensor, "query layer head"],
    *,
    label: str = "",
    limits: tuple[float | int, float | int] = (0, 1),
    ax: Axes | None = None,
) -> Axes:
    """A map of layers and heads: means over queries.

    Args:
        values: e.g. `Decomposition.demonstration_mass` or `Relaxation.update_cosine`.
        label: what the values are, beside the colour bar; no colour bar where empty.
        limits: the values at the colours' ends; with a negative first, colours diverge from 0.
        ax: where to draw; new Axes where not given.
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


def demonstrations(
    shares: Float[Tensor, "layer demo"], names: Sequence[str], *, label: str = "", ax: Axes | None = None
) -> Axes:
    """Which demonstrations a layer's update comes from: a map of layers and demonstrations, in the prompt's order.

    Args:
        shares: e.g. one query's `Decomposition.icl_share`, or `DeltaSummary.demonstrations_V`.
        names: of the demonstrations (or groups), from the top.
        label: what the shares are of, beside the colour bar.
        ax: where to draw; new Axes where not given.
    """
    _check_shape(shares, "layer demo")
    ax, _ = _axes(ax)
    if len(names) != shares.shape[1] or not names:
        raise ValueError(
            f"expected a name for each of {shares.shape[1]} demonstrations, at least one, got {len(names)}"
        )
    most = float(shares.abs().nan_to_num().quantile(0.99))
    image = ax.imshow(shares.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(xlabel="layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, label=label, extend="both")
    return ax


def dots(estimates: Mapping[str, Mapping[str, Interval]], *, ax: Axes | None = None) -> Axes:
    """Estimates with their 95 % intervals, a row a name, from the top; hollow where there is no interval.

    Args:
        estimates: by row, then by series (tasks, say), which share a colour from row to row.
        ax: where to draw; new Axes with a legend where not given.
    """
    ax, alone = _axes(ax)
    series = list(dict.fromkeys(name for by_series in estimates.values() for name in by_series))
    for index, name in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * 0.6 / len(series)
        found = [(row + offset, of[name]) for row, of in enumerate(estimates.values()) if name in of]
        style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3, "color": f"C{index}"}
        for known, label in ((True, name), (False, None)):
            at, chosen = [y for y, one in found if one.known is known], [one for _, one in found if one.known is known]
            face = f"C{index}" if known else "white"  # an estimate without interval
            ax.plot([one.value for one in chosen], at, label=label, markerfacecolor=face, **style)
            ax.hlines(at, [one.low for one in chosen], [one.high for one in chosen], color=f"C{index}", linewidth=1.2)
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(estimates)), list(estimates), fontsize="small")
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    ax.grid(axis="y", color="0.93")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if alone:
        ax.legend(frameon=False)
    return ax


def curves(
    estimates: Mapping[str, Mapping[int, Interval] | Mapping[float, Interval]],
    *,
    ylabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Estimates against a number (of demonstrations, say, or η), with bands that are their 95 % intervals.

    Args:
        estimates: by series, then by the number.
        ylabel: what is estimated.
        ax: where to draw; new Axes with a legend where not given.
    """
    ax, alone = _axes(ax)
    for index, (name, by_number) in enumerate(estimates.items()):
        x = list(by_number)
        ax.plot(x, [one.value for one in by_number.values()], ".-", color=f"C{index}", label=name)
        low, high = ([getattr(one, end) for one in by_number.values()] for end in ("low", "high"))
        ax.fill_between(x, low, high, color=f"C{index}", alpha=0.2, linewidth=0)
    if alone:
        ax.legend(frameon=False)
    ax.set(ylabel=ylabel)
    if all(isinstance(number, int) for by_number in estimates.values() for number in by_number):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def label_counts(
    comparisons: Comparison | Sequence[Comparison], label_words: Sequence[str], *, ax: Axes | None = None
) -> Axes:
    """How often each label is the gold one, and is predicted in each setting: shares of the queries.

    A model that answers one label whatever it is asked shows here, and nowhere in an accuracy.
    """
    together = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    ax, _ = _axes(ax)
    settings = ["gold", *together[0].predictions]
    width = 0.8 / len(settings)
    for index, setting in enumerate(settings):
        found = torch.cat([c.gold if setting == "gold" else c.predictions[setting] for c in together])
        shares = found.bincount(minlength=len(label_words)) / len(found)
        at = np.arange(len(label_words)) + (index - (len(settings) - 1) / 2) * width
        ax.bar(at, shares.numpy(), width, label=setting, color="0.75" if setting == "gold" else f"C{index - 1}")
    ax.set_xticks(np.arange(len(label_words)), label_words)
    ax.set(ylabel="share of queries", ylim=(0, 1))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _check_shape(values: Tensor, axes: str) -> None:
    if values.ndim != len(axes.split()):
        raise ValueError(f"expected values by [{axes}], got a tensor of shape {list(values.shape)}")


def _axes(ax: Axes | None) -> tuple[Axes, bool]:
    """The Axes given, or new ones, and whether they are new."""
    return (plt.figure(figsize=(5, 3.2), layout="constrained").subplots(), True) if ax is None else (ax, False)


def _mean_by_layer(values: Float[Tensor, "query layer"], ax: Axes, *, color: str, **style: Any) -> None:
    mean = values.nanmean(0)
    error = 1.96 * ((values - mean) ** 2).nanmean(0).sqrt() / values.isfinite().sum(0).clamp_min(1).sqrt()
    layer = np.arange(len(mean))
    ax.plot(layer, mean, color=color, **style)
    ax.fill_between(layer, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _finish(ax: Axes, alone: bool, *, ylabel: str) -> None:
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if alone:
        ax.legend(frameon=False)
    ax.set(xlabel="layer", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
