"""A prompt's text with each token on the colour of its number."""

# matplotlib's methods take keyword arguments without types.
# pyright: reportUnknownMemberType=false

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from icl_dual.arguments import Count, checked
from icl_dual.plots.style import PAGE_WIDTH, STYLE, literal
from icl_dual.prompt_view import TokenView

FONT: dict[str, Any] = {"fontsize": 7, "family": "monospace"}
"""The font of a prompt's text."""

_MARKED = 0.05
"""Tokens are underlined from this share of the largest number down below 0: less is nearly white."""


@checked
def source_tokens(view: TokenView, *, width: Count = 108, ax: Axes | None = None) -> Axes:
    """Draw a prompt's text, each token on the colour of its number: blue above 0, red below, white at 0.

    Tokens with a number below 0 are also underlined, for readers who see no colours.

    Args:
        view: for example what `SourceAttention.show` returns.
        width: the number of characters of a line; 108 fill a page of 6.9 in.
        ax: the Axes to draw on; new Axes where not given.

    Returns:
        The Axes drawn on.
    """
    row, column = 0, 0
    places: list[tuple[str, int, int, Any, bool]] = []
    largest = max(map(abs, view.values), default=0.0)
    for text, colour, value in zip(view.texts, view.colours(), view.values, strict=True):
        is_negative = value < -_MARKED * largest
        for piece in text.splitlines(keepends=True):
            visible = piece.rstrip("\n")
            if column and column + len(visible) > width:
                row, column = row + 1, 0
            places.append((visible, row, column, colour, is_negative))
            row, column = (row + 1, 0) if piece.endswith("\n") else (row, column + len(visible))
    n_rows = row + 1
    if ax is None:
        with plt.style.context(STYLE):
            size = PAGE_WIDTH * min(1, width / 108), 0.5 + 0.16 * n_rows
            ax = plt.figure(figsize=size, layout="constrained").subplots()
    for text, row, column, colour, is_negative in places:
        ax.add_patch(Rectangle((column, row), len(text), 1, facecolor=colour, edgecolor="none"))
        if is_negative and text:
            ax.plot([column, column + len(text)], [row + 0.95] * 2, color="black", linewidth=0.7)
        for index, character in enumerate(text):  # one by one: every character has its column in any font
            ax.text(column + index + 0.5, row + 0.5, literal(character), ha="center", va="center", **FONT)
    ax.set(xlim=(0, width), ylim=(n_rows, 0))
    ax.set_title(literal(view.title), fontsize=8)
    ax.axis("off")
    return ax
