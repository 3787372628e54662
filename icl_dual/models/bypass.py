"""Bridge components that nobody listens to step aside: the Hugging Face model then runs its own modules.

TransformerLens puts a component around each norm, MLP and projection: hook points, and the module between them. Calling
these takes Python longer than the module itself where a model is small, or where a GPU waits for its next operator.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import AttentionBridge
from transformer_lens.model_bridge.generalized_components import (
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.conv1d import Conv1DBridge

from icl_dual.models.journal import Undo

_COMPONENTS: tuple[Any, ...] = (Conv1DBridge, GatedMLPBridge, LinearBridge, MLPBridge, NormalizationBridge)

PASSING_ON: set[Callable[..., Any]] = {component.forward for component in _COMPONENTS}
"""The forward passes that only call the component's module, with hook points before and after it."""

FORKS = "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"
"""The bridge's options for hooks on copies of what enters attention and MLP. Without them, the hooks that collect it
on norms do nothing."""

COMPONENTS = "transformer_lens.model_bridge."
"""The prefix of the modules whose hooks these are."""


@dataclass(frozen=True)
class Bypass:
    """A place in the Hugging Face model where a component of the bridge runs, and its module can run instead."""

    modules: dict[str, nn.Module | None]
    """The submodules of the parent."""
    name: str
    """The component's name in the parent."""
    component: nn.Module
    """The component of the bridge."""
    listening: tuple[nn.Module, ...]
    """The component, its hook points, and the components within it."""


def bypasses(original_model: nn.Module) -> list[Bypass]:
    """Return the components that only call their module, in parents that are no components themselves.

    Attention's projections are left out: most of them have hooks in every pass.
    """
    attention = {
        module.original_component for module in original_model.modules() if isinstance(module, AttentionBridge)
    }
    parents: Iterator[nn.Module] = (
        module
        for module in original_model.modules()
        if not isinstance(module, GeneralizedComponent | HookPoint) and module not in attention
    )
    return [
        Bypass(parent._modules, name, child, tuple(_listening(child)))  # pyright: ignore[reportPrivateUsage]
        for parent in parents
        for name, child in parent.named_children()
        if _passes_on(child)
    ]


def bypass_unhooked(wrapped: Any, places: Sequence[Bypass], undo: Undo) -> set[nn.Module]:
    """Let modules run without their components until the block ends, where these have no hooks.

    Args:
        wrapped: the bridge.
        places: its `bypasses`.
        undo: what undoes it.

    Returns:
        The components that do not run.
    """
    forks = any(getattr(wrapped.cfg, option, False) for option in FORKS)
    bypassed: list[Bypass] = []
    undo.push(_restore, bypassed)
    for place in places:
        is_current = place.modules.get(place.name) is place.component
        if is_current and not any(has_hooks(module, count_own=forks) for module in place.listening):
            bypassed.append(place)
            place.modules[place.name] = cast(Any, place.component).original_component  # peft may have replaced it
    return {place.component for place in bypassed}


def has_hooks(module: Any, *, count_own: bool = True) -> bool:
    """Return whether anything but a module's own class takes part in its forward or backward pass.

    Args:
        module: the module.
        count_own: whether to count the hooks that TransformerLens has put on its own components.
    """
    if "forward" in module.__dict__:  # a library's own, on this instance
        return True
    before = module._forward_pre_hooks
    if before and not count_own:
        before = [hook for hook in before.values() if not str(getattr(hook, "__module__", "")).startswith(COMPONENTS)]
    return bool(before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _restore(bypassed: Sequence[Bypass]) -> None:
    for place in bypassed:
        place.modules[place.name] = place.component


def _passes_on(module: Any) -> bool:
    if not isinstance(module, GeneralizedComponent) or type(module).forward not in PASSING_ON:
        return False
    if isinstance(module, NormalizationBridge) and not module.use_native_layernorm_autograd:
        return False  # computes the norm itself
    return module.name is not None and isinstance(module.original_component, nn.Module)


def _listening(component: nn.Module) -> Iterator[nn.Module]:
    return (module for module in component.modules() if isinstance(module, GeneralizedComponent | HookPoint))
