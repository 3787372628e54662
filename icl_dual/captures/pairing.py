"""x"""

from icl_dual.captures.capture import Capture
from icl_dual.models import Model


def refuse_unpaired(model: Model, icl: Capture, zsl: Capture) -> None:
    """Raise a ValueError unless captures are of this model, as it is now, and of the same queries."""
    names = {"model": model.name, "icl": icl.model, "zsl": zsl.model}
    if len(set(names.values())) > 1:
        raise ValueError(f"expected captures of the model given, got {names}")
    weights = {"model": model.fingerprint(), "icl": icl.fingerprint, "zsl": zsl.fingerprint}
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"expected captures of the model as it is now, got other weights or another dtype ({weights}): was one "
            "made within `with delta.applied(model):` or `with momentum_attention(model, eta):` and the other not, or "
            "with another η?"
        )
    hooks = {"model": model.others_hooks(), "icl": icl.hooks, "zsl": zsl.hooks}
    if len(set(hooks.values())) > 1:
        raise ValueError(
            f"expected captures with the hooks that are on the model now, got others ({hooks}; empty: none): capture "
            "and decompose all with your own hooks on, or all without"
        )
    if zsl.prompts.demonstrations:
        raise ValueError(
            f"expected zsl to be without demonstrations, got {zsl.prompts}: are icl and zsl swapped? Capture zsl with "
            "prompts.zero_shot()"
        )
    if zsl.prompts != icl.prompts.zero_shot():
        raise ValueError(
            "expected captures of the same queries at the same positions: zsl of icl's prompts.zero_shot(), got "
            f"{icl.prompts} and {zsl.prompts}, which differ"
        )
