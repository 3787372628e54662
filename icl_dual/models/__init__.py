"""The only package that knows TransformerLens: loading models, their hooks and weights, and which are unsupported.

All other packages see a `Model`: its dimensions, its tokenizer, its attention's projections, and `run`, a forward pass
that passes each layer's attention to a callback and lets the callback replace the heads' outputs.

| module | holds |
|---|---|
| `model` | `Model`: a decoder with hooks |
| `loading` | `load_model`: a model by its name, folder, GGUF file or hub id |
| `shapes` | the sizes of a model, counted from its configuration alone |
| `controls` | control models: untrained, or with random blocks |
| `momentum` | `momentum_attention`: run a model with momentum attention for a while |
| `momentum_gpt2` | a GPT-2 that is trained with momentum attention |
| `precision` | half-precision weights that run in float32, TF32 switched off, names of precisions |
| `overflow` | where activations first overflow |
| `changes` | changes of projections that run beside the weights |
| `mlp` | changes of MLPs that run beside the weights |
| `stream` | vectors that runs add to the residual stream |
| `direct_path` | from attention's outputs to logits, past all later layers |
| `finetuned` | finetuned copies of a model: wrapped alike, and compared weight by weight |
| `adapters` | adapters of peft: models that have them, and the change of weights that a saved one makes |
| `tiny` | `tiny_model`: random weights, for examples and tests |
| `backend` | the interface between `Model` and a TransformerLens class |
| `bridge` | the backend for `TransformerBridge` (transformer-lens 3.9 to 4.x) |
| `hooked` | the backend for `HookedTransformer` (transformer-lens 3.9, below 4) |
"""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

WORKS_WITH = ">=3.9,<5"
"""The versions of transformer-lens that this package supports."""

if not SpecifierSet(WORKS_WITH).contains(version("transformer-lens"), prereleases=True):
    raise ImportError(
        f"expected transformer-lens {WORKS_WITH}, got transformer-lens {version('transformer-lens')}: "
        f"pip install 'transformer-lens{WORKS_WITH}'"
    )

from icl_dual.models.backend import (  # noqa: E402
    Attention,
    MlpForm,
    MlpPart,
    OnAttention,
    OnTensor,
    Projection,
    ProjectionName,
    UnsupportedModelError,
    Weight,
)
from icl_dual.models.controls import Control, control_model, control_name, control_provenance  # noqa: E402 - the version is checked first
from icl_dual.models.direct_path import DirectPath  # noqa: E402 - the version is checked first
from icl_dual.models.loading import load_model  # noqa: E402
from icl_dual.models.mlp import LowRank  # noqa: E402
from icl_dual.models.model import Model  # noqa: E402
from icl_dual.models.momentum import MOMENTUM_TAG, momentum_attention  # noqa: E402
from icl_dual.models.overflow import NonFiniteError  # noqa: E402
from icl_dual.models.tiny import tiny_model  # noqa: E402

__all__ = [
    "MOMENTUM_TAG",
    "Attention",
    "Control",
    "DirectPath",
    "LowRank",
    "MlpForm",
    "MlpPart",
    "Model",
    "NonFiniteError",
    "OnAttention",
    "OnTensor",
    "Projection",
    "ProjectionName",
    "UnsupportedModelError",
    "Weight",
    "control_model",
    "control_name",
    "control_provenance",
    "load_model",
    "momentum_attention",
    "tiny_model",
]
