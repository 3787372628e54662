"""Adapters of peft: models that have them, and the change of weights that a saved adapter makes.

`peft` is imported only where an adapter is read or trained (`pip install 'icl-dual[peft]'`).
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from icl_dual.models.backend import UnsupportedModelError
from icl_dual.storage import AssetError
from icl_dual.torch_utils import fork_rng
from icl_dual.type_guards import is_dict

if TYPE_CHECKING:
    from icl_dual.models.model import Model

F = TypeVar("F", bound=Callable[..., Any])

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a saved adapter."""

HARMLESS = frozenset(
    {
        "task_type", "auto_mapping", "parent_library", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
        "qalora_group_size", "runtime_config", "ensure_weight_tying",
    }
)  # fmt: skip
"""The settings of an adapter that adds B A to weights and does nothing else, with any value."""

ADDITIVE: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    }
)
"""The settings that have some values only in such an adapter; all others are off in it, or left out."""

BEYOND_PROJECTIONS = frozenset({"modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"})
"""The settings with which an adapter changes other weights than attention's projections."""


def import_peft(purpose: str) -> ModuleType:
    """Return the package peft.

    Args:
        purpose: what needs it, for the error.

    Raises:
        ImportError: it is not installed; names the extra that installs it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"expected the package peft, which {purpose} needs, got none: pip install 'icl-dual[peft]'"
        ) from error
    return peft


def is_peft_model(value: object) -> bool:
    """Return whether a value is a model of peft around another one."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(value, peft.PeftModel | peft.PeftMixedModel)


def merged_only(load: F) -> F:
    """Let a function that takes a model's name refuse a model of peft, and say what to do with it."""

    @functools.wraps(load)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args[:1], kwargs.get("name")):
            if is_peft_model(value):
                raise UnsupportedModelError(
                    f"expected name as text or a path, got a {type(value).__name__}: merge it first, with "
                    "merge_and_unload(), save the merged model with save_pretrained, and load its folder"
                )
        return load(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


def adapter_layers(*models: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of each layer that peft has put around another one, in any of several models."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # where peft is not imported, no model has its layers
        return
    memo = set[nn.Module]()
    for model in models:
        for name, module in cast(Any, model).named_modules(memo):
            if isinstance(module, tuners.BaseTunerLayer):
                yield name, module


def check_no_adapters(architecture: str, *models: nn.Module) -> None:
    """Check that no layer of a model has an adapter of peft.

    Raises:
        UnsupportedModelError: one has; names it.
    """
    for name, layer in adapter_layers(*models):
        raise UnsupportedModelError(
            f"{architecture}: expected a model without adapters, got {type(layer).__name__} of peft at {name}: merge "
            "it first, with merge_and_unload(), and boot the merged model"
        )


def check_no_adapter_files(name: str, folder: Path) -> None:
    """Check that a model's folder holds no adapter.

    Raises:
        UnsupportedModelError: it does.
    """
    if (folder / CONFIG).exists():
        raise UnsupportedModelError(
            f"{name}: expected a model without adapters, got an adapter in {folder}: merge it into its model first "
            "(merge_and_unload, save_pretrained), or load its model, and pass this folder to "
            "icl_dual.WeightDelta.from_adapter"
        )


def adapter_states(*models: nn.Module) -> list[tuple[str, ...]]:
    """Return which adapters of which layers act now, and how strongly; empty for a model without adapters."""
    names = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    return [(layer, *(str(getattr(module, name, "")) for name in names)) for layer, module in adapter_layers(*models)]


def load_adapter_weights(model: "Model", folder: Path, base: str | None) -> Any:
    """Return a Hugging Face model of a model's class with the weights that a saved adapter adds, and zero elsewhere.

    Args:
        model: the model that the adapter belongs to.
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: the name under which the adapter knows the model; the model's own by default.

    Raises:
        ImportError: peft is not installed.
        AssetError: the folder holds no adapter, or a damaged one.
        UnsupportedModelError: the model is not behind a bridge.
        ValueError: the adapter does more than add B A to weights, or belongs to another model; says how.
    """
    peft: Any = import_peft("an adapter")
    settings = _read_settings(folder)
    original = getattr(model.wrapped, "original_model", None)
    if original is None:
        raise UnsupportedModelError(
            f"expected a model behind a TransformerBridge for an adapter of peft, got {model.name!r}, a "
            f"{type(model.wrapped).__name__}: load it with icl_dual.load_model"
        )
    _check_additive(folder, settings)
    _check_base(model, folder, settings.get("base_model_name_or_path"), base)
    zeros = _zero_twin(original)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise AssetError(
            f"expected an adapter's weights in {folder / WEIGHTS}, got: {error}: save the adapter again"
        ) from error
    weights = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in weights.items()
        if not name.endswith(".base_layer.weight")  # the model's own embeddings, which peft saves with their adapter
    }
    try:
        peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(folder)), zeros)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:  # peft finds none of the targets in the model
        raise _other_model(model, folder, str(error).split("\n")[0]) from error
    _check_same_shapes(model, folder, peft.get_peft_model_state_dict(zeros, save_embedding_layers=False), weights)
    peft.set_peft_model_state_dict(zeros, weights)
    _merge(zeros)
    return zeros


def _read_settings(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AssetError(
            f"expected a folder with {CONFIG} and {WEIGHTS}, got {folder} without {' and '.join(missing)}: save the "
            "adapter there with save_pretrained"
        )
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AssetError(f"expected JSON in {folder / CONFIG}, got: {error}: save the adapter again") from error
    if not is_dict(settings):
        raise AssetError(f"expected a table in {folder / CONFIG}, got something else: save the adapter again")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise AssetError(
            f"expected base_model_name_or_path as text in {folder / CONFIG}, got {base!r}: write the name of the "
            "adapter's model there"
        )
    return settings


def _check_additive(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError where an adapter's settings do more than add B A to weights, or are unknown."""
    refused = [
        name
        for name, value in settings.items()
        if name not in HARMLESS and value not in ADDITIVE.get(name, (None, False, [], {}))
    ]
    if not refused:
        return
    if BEYOND_PROJECTIONS.isdisjoint(refused):
        advice = "(merge_and_unload), and pass both models to icl_dual.WeightDelta.between"
    else:  # which `between` refuses too
        advice = "(merge_and_unload, save_pretrained), load that, and compare by icl_dual.compare(..., delta=None)"
    raise ValueError(
        f"expected an adapter that adds a low-rank matrix to weights, got {folder} with {refused[0]}="
        f"{settings[refused[0]]!r}: merge it into its model {advice}"
    )


def _other_model(model: "Model", folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"expected an adapter of {model.name!r} ({model.architecture}), got one of another model in {folder}: {reason}"
        ". Pass the model that the adapter was trained on"
    )


def _check_base(model: "Model", folder: Path, saved: str | None, base: str | None) -> None:
    """Raise a ValueError where an adapter names another model than it is loaded for."""
    config: Any = model.wrapped.original_model.config
    names = {base} if base is not None else {model.name, getattr(config, "_name_or_path", None)}
    if saved and Path(saved).name.lower() not in {Path(name).name.lower() for name in names if name}:
        expected = model.name if base is None else base
        raise _other_model(
            model, folder, f"its base model is {saved!r}, not {expected!r}; where both are the same, set base={saved!r}"
        )


def _zero_twin(original: Any) -> Any:
    """Return a model of the same class and configuration with all weights zero, in float32 at least."""
    model_class = cast(Any, type(original))
    config = cast(Any, type(original.config)).from_dict(original.config.to_dict())
    dtype = torch.promote_types(original.dtype, torch.float32)
    with fork_rng(devices=[]):
        zeros = model_class._from_config(config, dtype=dtype, attn_implementation="eager").eval()
    for parameter in zeros.parameters():
        parameter.requires_grad_(False).zero_()
    return zeros


def _check_same_shapes(model: "Model", folder: Path, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Raise a ValueError unless an adapter has the matrices that it would have on this model."""
    for name in sorted({*expected, *got}):
        on_model, saved = (tuple(tensors[name].shape) if name in tensors else None for tensors in (expected, got))
        if on_model != saved:
            raise _other_model(model, folder, f"expected its {name} with shape {on_model}, got {saved}")


@torch.no_grad()
def _merge(hf_model: Any) -> None:
    """Add each adapter's matrix to the weight that it belongs to, and take the adapters out."""
    for name, layer in list(adapter_layers(hf_model)):
        base = layer.get_base_layer()
        for adapter in layer.active_adapters:
            base.weight.add_(layer.get_delta_weight(adapter))
        hf_model.set_submodule(name, base)
