"""The paper's metrics, their baselines and corrected forms → `Comparison`.

| module | holds |
|---|---|
| `formulas` | the metrics on plain tensors |
| `batch` | `Batch`, what a metric's function reads |
| `catalogue` | one `Metric` for each: name, function, baselines, interval rule, drawing; registering one of yours |
| `comparison` | three settings compared, query by query and layer by layer |
"""

from icl_dual.metrics.batch import Batch
from icl_dual.metrics.catalogue import Drawing, Metric, register_metric, unregister_metric, without_massive_tokens
from icl_dual.metrics.comparison import KENDALL_QUERIES, Comparison, compare, compare_recordings, estimate

__all__ = [
    "KENDALL_QUERIES",
    "Batch",
    "Comparison",
    "Drawing",
    "Metric",
    "compare",
    "compare_recordings",
    "estimate",
    "register_metric",
    "unregister_metric",
    "without_massive_tokens",
]
