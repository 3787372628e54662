"""x"""

from icl_dual.captures.capture import Capture
from icl_dual.models import Model


def check_paired(model: Model, *, zero_shot: Capture, in_context: Capture) -> None:
    """Raise a ValueError unless captures are of this model, as it is now, and of the same queries."""
    names = {"model": model.name, "in_context": in_context.model, "zero_shot": zero_shot.model}
    if len(set(names.values())) > 1:
        raise ValueError(f"expected captures of the model given, got {names}")
    weights = {"model": model.fingerprint(), "in_context": in_context.fingerprint, "zero_shot": zero_shot.fingerprint}
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"expected captures of the model as it is now, got other weights or another dtype ({weights}): was one "
            "made within `with delta.applied(model):` or `with momentum_attention(model, eta):` and the other not, or "
            "with another η?"
        )
    hooks = {"model": model.foreign_hooks(), "in_context": in_context.hooks, "zero_shot": zero_shot.hooks}
    if len(set(hooks.values())) > 1:
        raise ValueError(
            f"expected captures with the hooks that are on the model now, got others ({hooks}; empty: none): capture "
            "and decompose all with your own hooks on, or all without"
        )
    if zero_shot.prompts.demonstrations:
        raise ValueError(
            f"expected zero_shot to be without demonstrations, got {zero_shot.prompts}: are in_context and zero_shot swapped? Capture zero_shot with "
            "prompts.zero_shot()"
        )
    if zero_shot.prompts != in_context.prompts.zero_shot():
        raise ValueError(
            "expected captures of the same queries at the same positions: zero_shot of in_context's prompts.zero_shot(), got "
            f"{in_context.prompts} and {zero_shot.prompts}, which differ"
        )
