"""The one room that knows TransformerLens: loading, hook names, per-architecture facts, what is refused.

Everything above this room sees a `Model`: its dimensions, its tokenizer, its attention's projections, and `run`, a
forward pass that shows each layer's attention to a callback and lets the callback replace the heads' output.

| module | holds |
|---|---|
| `model` | `Model`, and loading one |
| `backend` | what `Model` asks of a TransformerLens class |
| `bridge` | the answers of `TransformerBridge` (3.9 to 4.x) |
| `hooked` | the answers of `HookedTransformer` (3.9 to 3.x) |
| `blank` | models that have learned nothing |
| `momentum` | models that run with momentum attention for a while |
"""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

WORKS_WITH = ">=3.9,<5"
"""The versions of transformer-lens whose classes and hooks this room knows."""

if not SpecifierSet(WORKS_WITH).contains(version("transformer-lens"), prereleases=True):
    raise ImportError(
        f"expected transformer-lens {WORKS_WITH}, got transformer-lens {version('transformer-lens')}: "
        f"pip install 'transformer-lens{WORKS_WITH}'"
    )

from icl_dual.models.backend import (  # noqa: E402
    Attention,
    OnAttention,
    OnTensor,
    Projection,
    ProjectionName,
    UnsupportedModelError,
    Weight,
)
from icl_dual.models.controls import Control, control_model, control_name  # noqa: E402 - the right version comes first
from icl_dual.models.loading import load_model  # noqa: E402
from icl_dual.models.model import Model  # noqa: E402
from icl_dual.models.momentum import MOMENTUM_TAG, momentum_attention  # noqa: E402

__all__ = [
    "MOMENTUM_TAG",
    "Attention",
    "Control",
    "ProjectionName",
    "Model",
    "OnAttention",
    "OnTensor",
    "Projection",
    "UnsupportedModelError",
    "Weight",
    "control_model",
    "control_name",
    "load_model",
    "momentum_attention",
]
