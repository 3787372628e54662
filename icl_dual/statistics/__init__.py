"""Statistics on plain tables and rows.

| module | holds |
|---|---|
| `intervals` | 95 % intervals of means, shares and differences; paired tests |
| `ranks` | rank correlations of many short rows |
| `frames` | means and deviations over queries as a data frame |
"""

from icl_dual.statistics.frames import html_table, summary_frame
from icl_dual.statistics.intervals import (
    MIN_QUERIES,
    UNSTABLE,
    Interval,
    Paired,
    Shifts,
    Table,
    bootstrap,
    mean_of_intervals,
    over_seeds,
    paired_test,
    proportion,
    widened,
    wilson,
)

__all__ = [
    "MIN_QUERIES",
    "UNSTABLE",
    "Interval",
    "Paired",
    "Shifts",
    "Table",
    "bootstrap",
    "html_table",
    "mean_of_intervals",
    "over_seeds",
    "paired_test",
    "proportion",
    "summary_frame",
    "widened",
    "wilson",
]
