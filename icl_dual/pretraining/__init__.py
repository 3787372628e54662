"""Train small decoders from scratch that differ in η only, to see what momentum attention changes.

| module | holds |
|---|---|
| `corpus` | text as tokens, and the label-mapping task |
| `training` | presets, training, perplexity and in-context accuracy |
"""

from icl_dual.pretraining.corpus import Corpus, LabelMapping, TrainingData, build_corpus, load_corpus
from icl_dual.pretraining.training import PRESETS, Preset, build_config, in_context_accuracy, perplexity, train

__all__ = [
    "PRESETS",
    "Corpus",
    "LabelMapping",
    "Preset",
    "TrainingData",
    "build_config",
    "build_corpus",
    "in_context_accuracy",
    "load_corpus",
    "perplexity",
    "train",
]
