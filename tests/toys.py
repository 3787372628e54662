"""The tiny random models that most tests run through: some of `architectures`, by name."""

import hooked

BRIDGED = (
    "gpt2",
    "neox",
    "gptj",
    "gptneo-window",
    "opt",
    "xglm",
    "llama",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2-window",
    "gemma3-window",
    "phi",
    "gptoss-window",
    "falcon",
    "bloom",
    "olmo2",
)
"""The models behind a bridge."""
ARCHITECTURES = BRIDGED + tuple(f"hooked-{name}" for name in hooked.CONVERTED if hooked.HookedTransformer)
"""Behind a bridge, and as `HookedTransformer`s where there is that class."""
