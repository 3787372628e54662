"""Pictures of comparisons: Axes in, Axes out, nothing computed but means and their standard errors."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from icl_dual.metrics import Comparison

_LINES: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "SimAOU": (
        ("SimAOU", "ICL and FT", {"color": "C0"}),
        ("SimAOU random", "ICL and random", {"color": "0.5", "linestyle": ":"}),
    ),
    "SimAM": (
        ("SimAM after FT", "ICL and FT", {"color": "C0"}),
        ("SimAM before FT", "ICL and ZSL (before FT)", {"color": "C1", "linestyle": "--"}),
        ("SimAM random", "ICL and random", {"color": "0.5", "linestyle": ":"}),
    ),
    "Kendall": (
        ("Kendall", "ICL and FT", {"color": "C0"}),
        ("Kendall random", "ICL and random", {"color": "0.5", "linestyle": ":"}),
    ),
}
_AXIS_LABELS = {"SimAOU": "SimAOU (cosine)", "SimAM": "SimAM (cosine)", "Kendall": "Kendall's τ"}
LAYERWISE = tuple(_LINES)
"""The metrics that `layers` draws."""


def layers(comparisons: Comparison | Sequence[Comparison], metric: str, *, ax: Axes | None = None) -> Axes:
    """A metric by layer beside its baselines: means over queries, with bands of ±1.96 standard errors.

    Args:
        comparisons: one comparison, or several of the same queries (by seeds, say), averaged query by query.
        metric: `SimAOU`, `SimAM` or `Kendall`.
        ax: where to draw; new Axes with a legend where not given.

    Returns:
        The Axes drawn on.
    """
    if metric not in _LINES:
        raise ValueError(f"expected a metric out of {LAYERWISE}, got {metric!r}")
    together = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    alone = ax is None
    ax = ax or plt.figure(figsize=(5, 3.2), layout="constrained").subplots()
    for name, label, style in _LINES[metric]:
        # Comparisons of several seeds share their queries: averaged first, so that a query counts once.
        values = torch.stack([comparison.per_layer[name] for comparison in together]).nanmean(0)
        mean = values.nanmean(0)
        error = 1.96 * ((values - mean) ** 2).nanmean(0).sqrt() / values.isfinite().sum(0).clamp_min(1).sqrt()
        layer = np.arange(len(mean))
        ax.plot(layer, mean, label=label, **style)
        ax.fill_between(layer, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if alone:
        ax.legend(frameon=False)
    ax.set(xlabel="layer", ylabel=_AXIS_LABELS[metric])
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def label_counts(
    comparisons: Comparison | Sequence[Comparison], label_words: Sequence[str], *, ax: Axes | None = None
) -> Axes:
    """How often each label is the gold one, and is predicted in each setting: shares of the queries.

    A model that answers one label whatever it is asked shows here, and nowhere in an accuracy.
    """
    together = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    ax = ax or plt.figure(figsize=(5, 3.2), layout="constrained").subplots()
    settings = ["gold", *together[0].label_log_probs]
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
