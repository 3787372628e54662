"""What makes a figure fit for a paper, checked on the figure itself: sizes, labels, series, and where legends are."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

WIDTH, FONT_SIZE, CONTRAST = 6.9, 7.0, 0.15
"""The largest width in inches, the smallest text in points, and the least difference of luminance between two bars."""


def problems(fig: Figure) -> list[str]:
    """Everything that keeps a drawn figure from a paper; empty where nothing does."""
    return [*sizes(fig), *labels(fig), *alike(fig), *covered(fig), *overlapping_titles(fig), *crowded(fig)]


def sizes(fig: Figure) -> Iterator[str]:
    """Figures that are too wide, and text that is too small."""
    if (width := fig.get_size_inches()[0]) > WIDTH + 1e-6:
        yield f"{width:.2f} in wide"
    for text in fig.findobj(Text):
        assert isinstance(text, Text)
        if text.get_visible() and text.get_text().strip() and float(text.get_fontsize()) < FONT_SIZE:
            yield f"{text.get_text()!r} in {text.get_fontsize()} pt"


def panels(fig: Figure) -> list[Axes]:
    """The Axes with data; no colour bars."""
    return [ax for ax in fig.axes if ax.axison and ax.get_label() != "<colorbar>"]


def labels(fig: Figure) -> Iterator[str]:
    """Axes without a label of their own, of the outer Axes of their row or column, or of the figure."""
    for ax in panels(fig):
        for name in ("x", "y"):
            line = [ax, *(other for other in panels(fig) if _same_line(ax, other, name))]
            texts = [getattr(other, f"get_{name}label")() for other in line]
            ticks = [text.get_text() for other in line for text in getattr(other, f"get_{name}ticklabels")()]
            is_named = any(any(letter.isalpha() for letter in tick) and "mathdefault" not in tick for tick in ticks)
            if not any(texts) and not is_named and not getattr(fig, f"get_sup{name}label")():
                yield f"{ax.get_title()!r}: no {name} label"
    for bar in fig.axes:
        if bar.get_label() == "<colorbar>" and not bar.get_ylabel():
            yield "a colour bar without a label"


def _same_line(ax: Axes, other: Axes, name: str) -> bool:
    """Whether two Axes are in the same column (for x) or row (for y)."""
    ours, theirs = ax.get_subplotspec(), other.get_subplotspec()
    if ours is None or theirs is None or ours.get_gridspec() is not theirs.get_gridspec():
        return False
    side = "colspan" if name == "x" else "rowspan"
    return getattr(ours, side).start == getattr(theirs, side).start


def alike(fig: Figure) -> Iterator[str]:
    """Two series of the same Axes that differ by their hue alone."""
    for ax in fig.axes:
        lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
        first_of_series = {str(line.get_label()): line for line in reversed(lines)}  # a label is a series
        for one, other in itertools.combinations(reversed(first_of_series.values()), 2):
            if _look(one) == _look(other) and abs(luminance(one.get_color()) - luminance(other.get_color())) < CONTRAST:
                yield f"{one.get_label()!r} and {other.get_label()!r} differ by hue alone"
        bars = [bars for bars in ax.containers if isinstance(bars, BarContainer) and len(bars.patches)]
        for one, other in itertools.combinations(bars, 2):
            first, second = one.patches[0], other.patches[0]
            contrast = abs(luminance(first.get_facecolor()[:3]) - luminance(second.get_facecolor()[:3]))
            if first.get_hatch() == second.get_hatch() and contrast < CONTRAST:
                yield f"bars {one.get_label()!r} and {other.get_label()!r} differ by hue alone"


def _look(line: Line2D) -> tuple[str, str]:
    return str(line.get_linestyle()), str(line.get_marker())


def luminance(color: Any) -> float:
    """The relative luminance of a colour (Rec. 709, linear light)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def covered(fig: Figure) -> Iterator[str]:
    """Legends over the area of data, or beyond the figure's edge."""
    renderer = fig.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    whole = fig.bbox.padded(3)
    for legend in [*fig.legends, *(ax.get_legend() for ax in fig.axes)]:
        if legend is None:
            continue
        extent = legend.get_window_extent(renderer)
        if any(_overlap(extent, ax.get_window_extent(renderer)) for ax in panels(fig)):
            yield "a legend over the area of data"
        if extent.x0 < whole.x0 or extent.x1 > whole.x1 or extent.y0 < whole.y0 or extent.y1 > whole.y1:
            yield "a legend beyond the figure's edge"
    for ax in panels(fig):
        height = ax.get_window_extent(renderer).height / fig.dpi
        if len(panels(fig)) == 1 and ax.get_legend() and height < 1.5:
            yield f"only {height:.2f} in of height for data, above a legend"


def overlapping_titles(fig: Figure) -> Iterator[str]:
    """Titles over each other, or beyond the figure's edge."""
    renderer = fig.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    titles = [ax.title for ax in fig.axes if ax.get_title()]
    titles += [text for text in fig.texts if text.get_text() == fig.get_suptitle() and text.get_text()]
    extents = {title.get_text() or str(index): title.get_window_extent(renderer) for index, title in enumerate(titles)}
    for text, extent in extents.items():
        if extent.x0 < fig.bbox.x0 - 3 or extent.x1 > fig.bbox.x1 + 3:
            yield f"title {text!r} beyond the figure's edge"
    for (one, first), (other, second) in itertools.combinations(extents.items(), 2):
        if _overlap(first, second):
            yield f"titles {one!r} and {other!r} overlap"


def crowded(fig: Figure) -> Iterator[str]:
    """Numbers below an axis that run into each other."""
    renderer = fig.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    least = 2 * fig.dpi / 72  # pixels: 2 pt, which is less than a blank
    for ax in panels(fig):
        ticks = [text for text in ax.get_xticklabels() if text.get_text() and text.get_visible()]
        extents = [(text.get_text(), text.get_window_extent(renderer)) for text in ticks if text.get_rotation() == 0]
        for (one, first), (other, second) in itertools.pairwise(sorted(extents, key=lambda pair: pair[1].x0)):
            if first.width and second.width and second.x0 - first.x1 < least:
                yield f"{ax.get_title()!r}: {one} and {other} run into each other"


def _overlap(one: Bbox, other: Bbox) -> bool:
    common = Bbox.intersection(one, other)
    return common is not None and common.width > 1 and common.height > 1


@pytest.fixture(scope="module", autouse=True)
def figures_fit_for_a_paper() -> Iterator[None]:
    """Check every figure that a script writes under test: a paper must be able to print it."""
    save = Figure.savefig

    def checked(fig: Figure, *arguments: Any, **options: Any) -> None:
        save(fig, *arguments, **options)
        if options.get("format") == "png":
            found = problems(fig)
            assert not found, f"{fig.get_suptitle()}: {found}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", checked)
        yield
