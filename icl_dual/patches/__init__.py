"""The context as a change of MLP weights: an exact one for one query, and one for all queries by ridge regression.

| module | holds |
|---|---|
| `patch` | `Patch`: a change of MLPs as a result, applied in a `with` block |
| `exact` | `build_exact_patch`: the context's effect on one query, exactly |
| `ridge` | ridge regression from sums over rows |
| `queries` | the pass over queries that shared patches are fitted to |
| `shared` | changes for all queries: by ridge regression, the mean patch, the thought matrix, a random patch |
| `relaxed` | ΔICL inserted into a run without demonstrations; linear attention run in place of softmax |
| `value_path` | `build_value_patch`: the context as a change of attention's output projections, for one query |
| `generation` | tokens generated with an exact patch for each, in several forms of rounding |
"""

from icl_dual.patches.comparison import (
    EFFECT_FIELDS,
    EffectComparison,
    FunctionVector,
    WeightComparison,
    build_function_vector,
    capture_each,
    compare_effects,
    compare_weights,
)
from icl_dual.patches.exact import ExactPatch, build_exact_patch
from icl_dual.patches.generation import Generation, generate_patched
from icl_dual.patches.patch import Patch
from icl_dual.patches.relaxed import AttentionRun, run_inserted, run_relaxed
from icl_dual.patches.ridge import RidgeStatistics
from icl_dual.patches.shared import (
    SharedPatch,
    SharedStatistics,
    build_mean_patch,
    build_shared_patch,
    build_thought_matrix,
    draw_random_patch,
    sum_statistics,
)
from icl_dual.patches.value_path import ValuePatch, build_value_patch

__all__ = [
    "EFFECT_FIELDS",
    "AttentionRun",
    "EffectComparison",
    "ExactPatch",
    "FunctionVector",
    "Generation",
    "Patch",
    "RidgeStatistics",
    "SharedPatch",
    "SharedStatistics",
    "ValuePatch",
    "WeightComparison",
    "build_exact_patch",
    "build_function_vector",
    "build_mean_patch",
    "build_shared_patch",
    "build_thought_matrix",
    "build_value_patch",
    "capture_each",
    "compare_effects",
    "compare_weights",
    "draw_random_patch",
    "generate_patched",
    "run_inserted",
    "run_relaxed",
    "sum_statistics",
]
