"""Running a model over prompts with hooks on → `Capture`.

| module | holds |
|---|---|
| `capture` | the result, and `capture()`, which makes it |
| `shared_prefix` | the engine: what queries share runs once, each query's own tokens after it |
| `pairing` | every check that captures belong together |

The function `capture` is `icl_dual.capture`: here it would shadow its module.
"""

from icl_dual.captures.capture import DECOMPOSE_FIELDS, METRIC_FIELDS, Capture, Field, KeysValues
from icl_dual.captures.shared_prefix import FullPromptPass, common_query_prefix, split_into_batches

__all__ = [
    "DECOMPOSE_FIELDS",
    "METRIC_FIELDS",
    "Capture",
    "Field",
    "FullPromptPass",
    "KeysValues",
    "common_query_prefix",
    "split_into_batches",
]
