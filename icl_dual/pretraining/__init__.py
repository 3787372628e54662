"""Small decoders trained from scratch, alike in everything but η: what momentum attention does to a model.

| module | holds |
|---|---|
| `corpus` | text as tokens, and the label-mapping task |
| `training` | presets, training, perplexity and in-context accuracy |
"""

from icl_dual.pretraining.corpus import Corpus, Data, LabelMapping, build_corpus, load_corpus
from icl_dual.pretraining.training import PRESETS, Preset, configuration, in_context_accuracy, perplexity, train

__all__ = [
    "Corpus",
    "Data",
    "LabelMapping",
    "PRESETS",
    "Preset",
    "build_corpus",
    "configuration",
    "in_context_accuracy",
    "load_corpus",
    "perplexity",
    "train",
]
