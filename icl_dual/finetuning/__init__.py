"""Finetuning on the demonstrations → `WeightDelta`.

| module | holds |
|---|---|
| `weight_delta` | the change of weights: applied and taken off again, saved, randomised |
| `sgd` | the paper's finetuning, one demonstration a step, and its variants |
| `parallel` | several finetunings side by side |
"""

from icl_dual.finetuning.parallel import finetune_many
from icl_dual.finetuning.sgd import DivergedError, finetune
from icl_dual.finetuning.weight_delta import Factors, FinetuneConfig, Loss, Method, Trained, WeightDelta

__all__ = [
    "DivergedError",
    "Factors",
    "FinetuneConfig",
    "Loss",
    "Method",
    "Trained",
    "WeightDelta",
    "finetune",
    "finetune_many",
]
