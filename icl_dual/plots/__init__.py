"""Plots: each function takes Axes and returns them; all it computes are means over queries, errors and quantiles.

| module | draws |
|---|---|
| `style` | nothing: the style file `paper.mplstyle`, the looks of series, legends |
| `lines` | quantities by layer |
| `maps` | maps of layers by heads, or by demonstrations |
| `estimates` | estimates with intervals, as rows of dots or as curves; shares of labels |
| `tokens` | a prompt's text, token by token |
"""

from icl_dual.plots.estimates import INTERVAL, UNSTABLE, curves, dots, label_counts
from icl_dual.plots.lines import LAYERWISE, against_null, by_layer, crossed_error, layers, massive_activations, sources
from icl_dual.plots.maps import BELOW_ZERO, demonstrations, heads
from icl_dual.plots.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    STYLE,
    explain_band,
    explain_line,
    legend_below,
    literal,
    ordered,
    resolved,
    series_style,
)
from icl_dual.plots.tokens import source_tokens

__all__ = [
    "BELOW_ZERO",
    "COLUMN_WIDTH",
    "INTERVAL",
    "LAYERWISE",
    "PAGE_WIDTH",
    "STYLE",
    "UNSTABLE",
    "against_null",
    "by_layer",
    "crossed_error",
    "curves",
    "demonstrations",
    "dots",
    "explain_band",
    "explain_line",
    "heads",
    "label_counts",
    "layers",
    "legend_below",
    "literal",
    "massive_activations",
    "ordered",
    "resolved",
    "series_style",
    "source_tokens",
    "sources",
]
