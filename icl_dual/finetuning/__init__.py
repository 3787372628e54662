"""Finetuning on the demonstrations, and the change of weights that it makes: ΔW_FT.

| module | holds |
|---|---|
| `config` | `FinetuneConfig`: loss, trained weights, optimiser, schedule and `Lora` |
| `weight_delta` | `WeightDelta`: the change of weights, applied, saved, randomised, taken between two models |
| `optimisers` | torch's optimisers and learning-rate schedules |
| `lora` | low-rank adapters of peft, beside the weights |
| `sgd` | `finetune`: the paper's finetuning, one demonstration a step, and its variants |
| `parallel` | `finetune_many`: several finetunings in parallel |
| `replicas` | `finetune_with_replicas`: the finetuning again, at slightly other rates from slightly other weights |
"""

from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig, Lora, Loss, Method, Trained
from icl_dual.finetuning.parallel import finetune_many
from icl_dual.finetuning.replicas import REPLICAS, Finetuned, finetune_with_replicas
from icl_dual.finetuning.sgd import DivergedError, finetune
from icl_dual.finetuning.weight_delta import Factors, Noise, WeightDelta

__all__ = [
    "PAPER_FINETUNING",
    "REPLICAS",
    "DivergedError",
    "Factors",
    "FinetuneConfig",
    "Finetuned",
    "Lora",
    "Loss",
    "Method",
    "Noise",
    "Trained",
    "WeightDelta",
    "finetune",
    "finetune_many",
    "finetune_with_replicas",
]
