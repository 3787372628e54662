"""Runs Hugging Face modules without the bridge components around them, where these have no hooks.

TransformerLens puts a component around each norm, MLP and projection: hook points, and the module between them. Calling
these takes Python longer than the module itself where a model is small, or where a GPU waits for its next operator.
Whether a component has hooks is looked at when a run starts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
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

WRAPPING_FORWARDS: set[Callable[..., Any]] = {component.forward for component in _COMPONENTS}
"""The forward passes that only call the component's module, with hook points before and after it."""

INPUT_OPTIONS = "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"
"""The bridge's options for hook points on copies of what enters attention and MLP. Without them, the hooks of its own
that collect these inputs on norms do nothing."""

BRIDGE_MODULES = "transformer_lens.model_bridge."
"""The prefix of the Python modules that register such hooks."""


@dataclass(frozen=True, eq=False)
class Bypass:
    """A place in the Hugging Face model where a component of the bridge runs, and its module can run instead."""

    modules: dict[str, nn.Module | None]
    """The submodules of the parent."""
    name: str
    """The component's name in the parent."""
    component: nn.Module
    """The component of the bridge."""
    hookable: tuple[nn.Module, ...]
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
        Bypass(parent._modules, name, child, tuple(_hookable(child)))  # pyright: ignore[reportPrivateUsage]
        for parent in parents
        for name, child in parent.named_children()
        if isinstance(child, GeneralizedComponent) and _only_wraps(child)
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
    # A block registers its own hooks in its first pass; torch's global hooks may be for any module.
    is_ready = all(getattr(block, "_capture_hooks_wired", True) for block in wrapped.blocks)
    if not is_ready or cast(Any, nn.modules.module)._has_any_global_hook():
        return set()
    count_own, dtype = _has_input_option(wrapped), next(wrapped.original_model.parameters()).dtype
    bypassed: dict[Bypass, nn.Module] = {}
    undo.push(_restore, bypassed)
    for place in places:
        component: Any = place.component
        if (
            place.modules.get(place.name) is component
            and _only_wraps(component)
            and _keeps_dtype(component, dtype)
            and not any(has_hooks(module, count_own=count_own) for module in place.hookable)
        ):
            bypassed[place] = component.original_component
            place.modules[place.name] = component.original_component
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
        before = [
            hook for hook in before.values() if not str(getattr(hook, "__module__", "")).startswith(BRIDGE_MODULES)
        ]
    return bool(before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _restore(bypassed: dict[Bypass, nn.Module]) -> None:
    for place, original in bypassed.items():
        if place.modules.get(place.name) is original:  # nobody has replaced it in between
            place.modules[place.name] = place.component


def _has_input_option(wrapped: Any) -> bool:
    """Return whether one of `INPUT_OPTIONS` is set, of the bridge or of one of its blocks."""
    configs = [wrapped.cfg]
    for block in wrapped.blocks:
        if getattr(block, "_use_hook_mlp_in", False):
            return True
        configs += [block.config, getattr(getattr(block, "attn", None), "config", None)]
    return any(getattr(config, option, False) for config in configs for option in INPUT_OPTIONS)


def _only_wraps(component: Any) -> bool:
    """Return whether a component only calls its module."""
    if cast(Any, type(component)).forward not in WRAPPING_FORWARDS or component._compiled_call_impl is not None:
        return False
    if isinstance(component, NormalizationBridge) and not component.use_native_layernorm_autograd:
        return False  # computes the norm itself
    return component.name is not None and isinstance(component.original_component, nn.Module)


def _keeps_dtype(component: Any, dtype: torch.dtype) -> bool:
    """Return whether a norm's weights are in the model's dtype: the bridge casts the outputs of others to it."""
    if not isinstance(component, NormalizationBridge):
        return True
    norm: Any = component.original_component
    return all(weight.dtype == dtype for weight in norm.parameters(recurse=False))


def _hookable(component: nn.Module) -> Iterator[nn.Module]:
    return (module for module in component.modules() if isinstance(module, GeneralizedComponent | HookPoint))
