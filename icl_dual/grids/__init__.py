"""Grids: many cells from one file, on one machine or on many, with results on any fsspec path.

Workers share nothing but the storage, in which they claim cells; the engines only start them.
"""

from icl_dual.grids.collection import Collection, collect, to_xarray
from icl_dual.grids.driver import Engine, reset_failed, run_grid
from icl_dual.grids.engines import Report, Summary
from icl_dual.grids.grid import Grid, GridCell, GridError
from icl_dual.grids.planning import Plan, PlannedCell, Resources, plan
from icl_dual.grids.results import Failure, Manifest, Results, Status
from icl_dual.grids.selection import Choice, Selection, select
from icl_dual.grids.toml_files import load_grid
from icl_dual.grids.worker import Outcome, Worker

__all__ = [
    "Choice",
    "Collection",
    "Engine",
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
    "Selection",
    "Status",
    "Summary",
    "Worker",
    "collect",
    "load_grid",
    "plan",
    "reset_failed",
    "run_grid",
    "select",
    "to_xarray",
]
