"""Results as HTML for notebooks: one small table, with a sparkline for every quantity along its layers."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT, MARGIN = 120, 20, 2
"""The size of a sparkline and what it leaves free at its edges, in pixels."""
MOST_POINTS = 200
"""How many points a sparkline has at most; of more values, each point is the mean of a run of them."""


class Line(NamedTuple):
    """One row of a table."""

    name: str
    """The quantity."""
    axes: str
    """Its axes and their lengths, such as `query=7 layer=3`."""
    along: str = ""
    """The axis of `values`; empty without values."""
    values: Sequence[float | int] = ()
    """The numbers along the axis; NaN where undefined."""


def lines_table(caption: str, lines: Iterable[Line]) -> str:
    """Return an HTML table with a row for each line: its mean, lowest and highest value, and a sparkline.

    >>> table = lines_table("two layers", [Line("mass", "query=1 layer=2", "layer", (0.25, 0.75))])
    >>> "<td>0.5</td><td>0.25</td><td>0.75</td>" in table
    True
    """
    heading = "".join(f'<th scope="col">{name}</th>' for name in ("", "axes", "mean", "lowest", "highest", "along"))
    return (
        f'<table><caption style="text-align: left">{html.escape(caption)}</caption><thead><tr>{heading}</tr></thead>'
        f"<tbody>{''.join(map(_row, lines))}</tbody></table>"
    )


def sparkline(values: Sequence[float | int], along: str) -> str:
    """Return a line through values as an inline SVG in the colour of the text, with gaps where they are not finite.

    Args:
        values: the numbers, in order.
        along: the axis that they are along, for screen readers.
    """
    points = _at_most(values, MOST_POINTS)
    finite = [value for value in points if math.isfinite(value)]
    if len(values) < 2 or not finite:
        return ""
    low, high = min(finite), max(finite)
    x_step, span = (WIDTH - 2 * MARGIN) / (len(points) - 1), (high - low) or 1.0

    def y(value: float | int) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * ((value - low) / span if high > low else 0.5)

    path, pen_is_down = list[str](), False
    for at, value in enumerate(points):
        if math.isfinite(value):
            path.append(f"{'L' if pen_is_down else 'M'}{MARGIN + at * x_step:.1f} {y(value):.1f}")
        pen_is_down = math.isfinite(value)
    zero = f'<path d="M0 {y(0):.1f}H{WIDTH}" stroke-opacity="0.35" stroke-dasharray="2 2"/>' if low < 0 < high else ""
    label = html.escape(f"{len(values)} values by {along}, from {number(low)} to {number(high)}")
    return (
        f'<svg role="img" aria-label="{label}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="currentColor" '
        f'stroke-linecap="round" style="vertical-align: middle"><title>{label}</title>{zero}'
        f'<path d="{"".join(path)}" stroke-width="1.3"/></svg>'
    )


def number(value: float | int) -> str:
    """Return a number with three significant digits, and a dash where it is undefined."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def _row(line: Line) -> str:
    finite = [value for value in line.values if math.isfinite(value)]
    numbers = (sum(finite) / len(finite), min(finite), max(finite)) if finite else ()
    cells = [number(value) for value in numbers] or [""] * 3
    graphic = sparkline(line.values, line.along)
    along = f"{html.escape(line.along)} {graphic}".strip() if graphic else ""
    texts = "".join(f"<td>{text}</td>" for text in (html.escape(line.axes), *cells, along))
    return f'<tr><th scope="row" style="text-align: left">{html.escape(line.name)}</th>{texts}</tr>'


def _at_most(values: Sequence[float | int], n: int) -> Sequence[float | int]:
    """Return values, or the means of runs of them: at most n."""
    size = math.ceil(len(values) / n)
    if size <= 1:
        return values
    runs = (values[first : first + size] for first in range(0, len(values), size))
    return [sum(run) / len(run) for run in runs]
