"""The paper's metrics, their baselines and corrected forms → `Comparison`.

| module | holds |
|---|---|
| `formulas` | the metrics on plain tensors |
| `comparison` | three settings compared, query by query and layer by layer |
"""

from icl_dual.metrics.comparison import Comparison, compare, compare_recordings, estimate

__all__ = ["Comparison", "compare", "compare_recordings", "estimate"]
