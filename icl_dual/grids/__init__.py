"""Grids: many cells from one file, on one machine or on many, with results on any fsspec path.

Workers share nothing but the storage, in which they claim cells; the engines only start them.
"""

from icl_dual.grids.engines import Report, Summary
from icl_dual.grids.grid import Grid, GridCell, GridError
from icl_dual.grids.planning import Plan, PlannedCell, Resources, plan
from icl_dual.grids.results import Failure, Manifest, Results, Status
from icl_dual.grids.worker import Outcome, Worker

__all__ = [
    "Failure",
    "Grid",
    "GridCell",
    "GridError",
    "Manifest",
    "Outcome",
    "Plan",
    "PlannedCell",
    "Report",
    "Resources",
    "Results",
    "Status",
    "Summary",
    "Worker",
    "plan",
]
