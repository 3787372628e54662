"""The context as a change of MLP weights: an exact one for one query, and one for all queries by ridge regression.

| module | holds |
|---|---|
| `patch` | `Patch`: a change of MLPs as a result, applied in a `with` block |
| `exact` | `build_exact_patch`: the context's effect on one query, exactly |
| `ridge` | ridge regression from sums over rows |
| `shared` | `build_shared_patch`: the change that serves all queries best |
"""

from icl_dual.patches.exact import ExactPatch, build_exact_patch
from icl_dual.patches.patch import Patch
from icl_dual.patches.ridge import RidgeStatistics
from icl_dual.patches.shared import SharedPatch, build_shared_patch

__all__ = [
    "ExactPatch",
    "Patch",
    "RidgeStatistics",
    "SharedPatch",
    "build_exact_patch",
    "build_shared_patch",
]
