"""Statistics on plain tables and rows: 95 % intervals and paired tests, rank correlations, summary frames."""

from icl_dual.statistics.intervals import (
    Interval,
    Paired,
    Table,
    average,
    bootstrap,
    over_seeds,
    paired_test,
    share,
    wilson,
)

__all__ = ["Interval", "Paired", "Table", "average", "bootstrap", "over_seeds", "paired_test", "share", "wilson"]
