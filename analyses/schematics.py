"""Draw the two ideas of the paper: finetuning beside in-context learning, and attention as dual of gradient descent.

Both are drawings, not results: nothing is computed. `docs/guide.md` explains the terms.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import icl_dual as icl
from icl_dual.scripts.common import output_folder, run_script, script_parser
from icl_dual.scripts.outputs import write_figure

Point = tuple[float, float]

FILLS = {"data": "white", "weights": "#D9E8F3", "change": "#F6D9C6", "result": "0.92"}
"""The fill of boxes by what they hold; in grey, the words in the boxes and their edges tell them apart."""

EDGES: dict[str, dict[str, Any]] = {
    "data": {"linestyle": "-"},
    "weights": {"linestyle": "-", "linewidth": 1.4},
    "change": {"linestyle": "--", "linewidth": 1.2},
    "result": {"linestyle": "-"},
}
"""The edge of boxes by what they hold: changes of weights are dashed."""


def box(ax: Axes, center: Point, text: str, kind: str, *, formula: str = "", size: Point = (2.4, 0.8)) -> None:
    """Draw a box with a text, and a formula below it: of 10 pt, so that its indices have 7."""
    (x, y), (width, height) = center, size
    look = {"edgecolor": "black", "linewidth": 0.8, "facecolor": FILLS[kind], "zorder": 2} | EDGES[kind]
    corner = x - width / 2, y - height / 2
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", **look))
    above = 0.25 if formula else 0.0
    ax.text(x, y + above, text, ha="center", va="center", fontsize=7.5, zorder=3, linespacing=1.3)
    ax.text(x, y - 0.17, formula, ha="center", va="center", fontsize=10, zorder=3)


def arrow(ax: Axes, start: Point, end: Point, text: str = "", *, offset: Point = (0.08, 0), **style: Any) -> None:
    """Draw an arrow with a text at its middle."""
    look = {"arrowstyle": "-|>", "mutation_scale": 8, "linewidth": 0.9, "color": "black", "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, zorder=1, **look | style))
    if text:
        x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
        ax.text(x, y, text, ha="left", va="center", fontsize=7, linespacing=1.2)


def canvas(height: float, width: float, title: str) -> tuple[Figure, Axes]:
    """Return a figure of page width with Axes in units of which `width` fill the page."""
    page = icl.plots.PAGE_WIDTH
    fig, ax = plt.subplots(figsize=(page, height * page / width + 0.3))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    ax.set_title(title, fontsize=9)
    return fig, ax


def heading(ax: Axes, x: float, y: float, text: str) -> None:
    """Draw the heading of a part."""
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, fontweight="bold")


def draw_settings() -> Figure:
    """Draw finetuning and in-context learning as two ways from demonstrations to a change of weights."""
    fig, ax = canvas(6.3, 12, "Two ways from the same demonstrations to an answer")
    ax.axvline(6.0, color="0.75", linewidth=0.8, linestyle=":")
    _draw_setting(
        ax,
        0.0,
        ("Finetuning (FT)", "model, weights W\nforward, then backward", "gradients\nof a loss"),
        ("change of key and value weights", r"$\Delta W_{FT}$"),
        ("added once,\nfor all queries", "query alone", "model with changed\nweights"),
    )
    _draw_setting(
        ax,
        6.1,
        ("In-context learning (ICL)", "model, weights W\nforward only", "keys and\nvalues"),
        ("what attention adds, as a change of weights", r"$\Delta W_{ICL}=\sum_i W_V x'_i\otimes W_K x'_i$"),
        ("read by\nattention", "query", "the same pass,\nweights W"),
    )
    ax.annotate("", (6.8, 3.4), (5.3, 3.4), arrowprops={"arrowstyle": "<->", "linewidth": 1.2})
    patch = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    ax.text(6.05, 3.6, "alike?", ha="center", va="bottom", fontsize=8, fontweight="bold", bbox=patch)
    return fig


def _draw_setting(
    ax: Axes, left: float, first: tuple[str, str, str], change: tuple[str, str], then: tuple[str, str, str]
) -> None:
    """Draw one way from demonstrations to an answer, from the top: texts of boxes and arrows in their order."""
    (name, model, gives), (explained, formula), (used, query, changed) = first, change, then
    data, run = left + 1.5, left + 4.5
    heading(ax, left + 3.0, 5.95, name)
    box(ax, (data, 5.0), "demonstrations", "data", formula=r"$x'_1,\ldots,x'_k$", size=(2.4, 0.95))
    box(ax, (run, 5.0), model, "weights", size=(2.4, 0.95))
    arrow(ax, (data + 1.2, 5.0), (run - 1.2, 5.0))
    arrow(ax, (run, 4.52), (run, 3.92), gives)
    box(ax, (left + 3.0, 3.4), explained, "change", formula=formula, size=(4.4, 1.02))
    arrow(ax, (run, 2.89), (run, 2.25), used)
    box(ax, (data, 1.85), query, "data")
    box(ax, (run, 1.85), changed, "weights")
    arrow(ax, (data + 1.2, 1.85), (run - 1.2, 1.85))
    arrow(ax, (run, 1.45), (run, 0.83))
    box(ax, (run, 0.55), "answer", "result", size=(2.4, 0.55))


GRADIENT_DESCENT = (
    ("training inputs and error signals", r"$x'_i,\quad e_i=-\gamma\,\partial L/\partial f_i$"),
    ("sum of outer products", r"$\Delta W=\sum_i e_i\otimes x'_i$"),
    ("applied to an input", r"$(W_0+\Delta W)\,x=W_0x+\sum_i e_i\,(x'_i\cdot x)$"),
    ("momentum: older gradients still count", r"$\sum_i\eta^{\,t-i}\,\nabla_i$"),
)
"""What gradient descent does to a linear layer, from the top: words and formula."""

ATTENTION = (
    ("keys and values of context tokens", r"$W_Kx'_i,\quad W_Vx'_i$"),
    ("sum of outer products", r"$\Delta W_{ICL}=\sum_i W_Vx'_i\otimes W_Kx'_i$"),
    ("applied to a query", r"$(W_{ZSL}+\Delta W_{ICL})\,q$"),
    ("momentum attention: older values still count", r"$\sum_{i<t}\eta^{\,t-i}\,v_i$"),
)
"""What attention does in the same places."""

PAIRS = (r"$x'_i\leftrightarrow W_Kx'_i$" + "\n" + r"$e_i\leftrightarrow W_Vx'_i$", "", r"$x\leftrightarrow q$", "")
"""What corresponds to what, between the two."""


def draw_dual() -> Figure:
    """Draw gradient descent on a linear layer beside linear attention, and both with momentum."""
    fig, ax = canvas(7.2, 12, "Attention is the dual form of a linear layer that is trained by gradient descent")
    heading(ax, 2.7, 6.8, "Gradient descent on a linear layer")
    heading(ax, 9.3, 6.8, "Linear attention over a context")
    kinds, heights = ("data", "change", "weights", "result"), (5.8, 4.25, 2.7, 1.05)
    for y, kind, gradient, attention, pair in zip(heights, kinds, GRADIENT_DESCENT, ATTENTION, PAIRS, strict=True):
        for x, (words, formula) in ((2.7, gradient), (9.3, attention)):
            box(ax, (x, y), words, kind, formula=formula, size=(4.9, 1.05))
            if kind in ("data", "change"):
                arrow(ax, (x, y - 0.525), (x, y - 1.025))
        ax.annotate("", (6.8, y), (5.2, y), arrowprops={"arrowstyle": "<->", "linewidth": 1.0})
        ax.text(6.0, y + 0.1, pair, ha="center", va="bottom", fontsize=10, linespacing=1.3)
    ax.axhline(1.87, xmin=0.02, xmax=0.98, color="0.75", linewidth=0.8, linestyle=":")
    note = "Without softmax and its scale: the identity is exact for linear attention only."
    ax.text(6.0, 0.15, note, ha="center", va="center", fontsize=7.5)
    return fig


FIGURES = {"finetuning_and_icl": draw_settings, "dual_form": draw_dual}
"""The figures by the name of their file."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--out", type=output_folder, default="figures/schematics", help="folder for both figures (%(default)s)"
    )
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Draw both figures."""
    for name, draw in FIGURES.items():
        write_figure(draw(), args.out / name, "png", "pdf")
    print(f"Both figures are in {args.out}/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
