"""The tiny random models that most tests run through: some of `architectures`, by name."""

import hooked

ALL_BRIDGED = (
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
OLDER = {"gpt2", "neox", "opt", "xglm", "llama", "qwen3", "gemma3-window", "gptoss-window", "bloom"}
"""Those that also run on transformer-lens 3.9, where the `HookedTransformer`s take the time: each kind of attention."""

BRIDGED = tuple(name for name in ALL_BRIDGED if not hooked.HookedTransformer or name in OLDER)
"""The models behind a bridge."""
ARCHITECTURES = BRIDGED + tuple(f"hooked-{name}" for name in hooked.CONVERTED if hooked.HookedTransformer)
"""Behind a bridge, and as `HookedTransformer`s where there is that class."""
