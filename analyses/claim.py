"""Draw the claim in one figure: SimAOU of in-context learning and finetuning, and of controls that
should score less.

Reads the table that `controls.py`, or `grid_controls.py` of a grid, wrote; runs no model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from control_tables import read_interval
from matplotlib.axes import Axes

import icl_dual as icl
from icl_dual.scripts.common import TITLES, output_file, run_script, script_parser
from icl_dual.scripts.outputs import read_csv, write_figure
from icl_dual.statistics import Interval

ROWS = {
    "ICL and FT": "ICL and finetuning",
    "random update of FT's size": "a random update for finetuning's",
    "ICL on flipped labels": "labels flipped in context",
    "ICL on another task": "another task in context",
    "untrained model": "untrained model",
}
"""What is compared in the table, and its name in the figure, from the top."""

COLUMNS = ("metric", "what is compared", "task", "value", "low", "high", "queries")
"""The columns that are read."""


def read(table: Path) -> dict[str, dict[str, Interval]]:
    """Return SimAOU with its interval by row of the figure and task."""
    scores = read_csv(table)
    if absent := [name for name in COLUMNS if name not in scores]:
        raise ValueError(f"expected a column {absent[0]!r} in {table}, got none: write it with analyses/controls.py")
    scores = scores.query("metric == 'SimAOU' and task in @TITLES")
    missing = [name for name in ROWS if name not in set(scores["what is compared"])]
    if missing:
        raise ValueError(f"expected SimAOU of {missing[0]!r} in {table}, got none: write it with analyses/controls.py")
    estimates: dict[str, dict[str, Interval]] = {label: {} for label in ROWS.values()}
    for row in scores.to_dict("records"):
        if row["what is compared"] not in ROWS:
            continue
        interval = read_interval(row)
        estimates[ROWS[row["what is compared"]]][TITLES[row["task"]]] = interval
    return estimates


def draw(estimates: dict[str, dict[str, Interval]], ax: Axes) -> Axes:
    """Draw a row for each comparison and a marker for each task."""
    icl.plots.dots(estimates, ax=ax)
    ax.set(xlabel="SimAOU (cosine)")
    return ax


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--controls", type=Path, default=Path("figures/controls/controls.csv"), help="the table (%(default)s)")
    add("--out", type=output_file, default="figures/claim", help="the figure's path without suffix (%(default)s)")
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Draw the figure and write it as .png and .pdf."""
    estimates = read(args.controls)
    fig, ax = plt.subplots(figsize=(icl.plots.COLUMN_WIDTH, 2.2))
    draw(estimates, ax)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=2)
    write_figure(fig, args.out, "png", "pdf", dpi=300)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
