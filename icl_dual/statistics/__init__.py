"""Statistics on plain tables and rows: 95 % intervals and paired tests, rank correlations, summary frames."""

from icl_dual.statistics.intervals import (
    Interval,
    Paired,
    Table,
    bootstrap,
    mean_of_intervals,
    over_seeds,
    paired_test,
    proportion,
    wilson,
)

__all__ = [
    "Interval",
    "Paired",
    "Table",
    "mean_of_intervals",
    "bootstrap",
    "over_seeds",
    "paired_test",
    "proportion",
    "wilson",
]
