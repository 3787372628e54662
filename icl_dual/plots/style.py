"""The style of figures: how series are told apart, how bands are explained, and where legends go.

| name | holds |
|---|---|
| `STYLE` | the name of the style file, for `plt.style.use` |
| `series_style`, `resolved`, `ordered` | colours, line styles and markers of series |
| `drawing` | the Axes that a function draws on: those it is given, or new ones in the style, with a legend |
| `explain_band`, `legend_below` | what a band is, in the legend; a legend below the Axes, never over data |
| `literal` | a name as a text of a figure that begins no formula |
"""

# matplotlib's methods take keyword arguments without types.
# pyright: reportUnknownMemberType=false

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.transforms import ScaledTranslation

from icl_dual.arguments import Count, Index, checked

STYLE = "icl_dual.plots.paper"
"""The style of the library's figures, for `plt.style.use`: at most 6.9 in wide, with text of at least 7 pt."""

PAGE_WIDTH, COLUMN_WIDTH = 6.9, 88 / 25.4
"""The widths of a figure over a page and over a column of a journal, in inches."""

_FILE = Path(__file__).with_name("paper.mplstyle")
_CYCLE = mpl.rc_params_from_file(_FILE, fail_on_error=True, use_default_template=False)["axes.prop_cycle"].by_key()

PALETTE: tuple[str, ...] = tuple(to_hex(f"#{color}".replace("##", "#")) for color in _CYCLE["color"])
"""The colours of series, in order; from the style file."""

LINESTYLES = ("-", "--", "-.", ":")
"""The line styles of series, in order."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d")
"""The markers of series, in order. Their number and those of colours and line styles have no common factor: series
repeat none of their pairs for long."""

_LEGEND_HEIGHT = 0.5
"""The height of a legend, in inches, that fits below the Axes of this style. With a higher one, the figure grows."""

BAND_ALPHA = 0.2
"""The opacity of bands."""


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
def series_style(index: Index) -> dict[str, Any]:
    """Return colour, line style and marker of a series, as arguments of `Axes.plot`.

    The first 13 series have different markers, and the first 52 differ in line style or marker.

    Args:
        index: the place of the series, from 0.
    """
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": LINESTYLES[index % len(LINESTYLES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


@checked
def resolved(color: str) -> str:
    """Return a matplotlib colour, with `C0`, `C1`, … as the colours of this style whatever style is in use."""
    number = re.fullmatch(r"C(\d+)", color)
    return color if number is None else PALETTE[int(number[1]) % len(PALETTE)]


@checked
def ordered(n: Count) -> list[str]:
    """Return colours for steps of an ordered quantity: from light to dark, also in grey."""
    return [to_hex(color) for color in plt.get_cmap("viridis")(np.linspace(0.85, 0, n))]


@contextmanager
def drawing(ax: Axes | None) -> Generator[Axes]:
    """Yield the Axes given as they are; or new ones in the library's style, which get a legend below at the end."""
    if ax is not None:
        yield ax
        return
    with plt.style.context(STYLE):
        figure = plt.figure()
        ax = figure.subplots()
        yield ax
        ax.tick_params(labelsize=plt.rcParams["xtick.labelsize"])  # ticks that are made later, outside of the style
        legend_below(ax)
        if (legend := ax.get_legend()) is not None:
            height = legend.get_window_extent().height / figure.dpi
            figure.set_figheight(figure.get_figheight() + max(0.0, height - _LEGEND_HEIGHT))


@checked
def legend_below(ax: Axes, ncols: Count = 2) -> None:
    """Put the legend of Axes below them, where no data is; none where nothing has a label.

    Args:
        ax: the Axes.
        ncols: the largest number of columns. There are fewer where the figure is not wide enough.
    """
    handles, labels = ax.get_legend_handles_labels()
    below = ax.transAxes + ScaledTranslation(0, -32 / 72, ax.figure.dpi_scale_trans)  # below tick labels and title
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    for n in range(min(ncols, len(labels)), 0, -1):
        legend = ax.legend(handles, labels, ncols=n, frameon=False, **place)
        if legend.get_window_extent().width <= ax.figure.bbox.width:
            break


@checked
def explain_band(ax: Axes, text: str) -> None:
    """Add what bands are to what the legend of Axes explains, once."""
    if text not in ax.get_legend_handles_labels()[1]:
        ax.fill_between([], [], color="0.4", alpha=BAND_ALPHA, linewidth=0, label=text)


@checked
def explain_line(ax: Axes, text: str, **style: Any) -> None:
    """Add what a line or a mark is to what the legend of Axes explains, once."""
    if text not in ax.get_legend_handles_labels()[1]:
        style.setdefault("linestyle", "-")
        ax.plot([], [], label=text, **style)


def mark_every(index: int, n: int) -> tuple[int, int]:
    """Return which of a curve's n points get a marker: about six, shifted from one series to the next."""
    step = max(1, n // 6)
    return index % step, step
