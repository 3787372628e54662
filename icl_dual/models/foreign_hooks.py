"""The hooks that others have on a model: where they are, and what tells one from another.

A hook is told by its code and by the values that it reads: constants, defaults, its closure, global names, attributes
of the object that it is a method of. What it writes itself, such as a counter or a store of activations, is its state
and no part of its identity.
"""

import dis
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

DEPTH = 4
"""How many functions and objects deep a hook's values are read."""


def foreign_hooks(wrapped: nn.Module) -> list[tuple[str, str, str]]:
    """Return the hooks on a model: for each, its module, its name, and a hash of its code and of what it reads.

    Those that TransformerLens has put there for itself are left out.
    """
    return [
        (name, _name(hook), hashlib.sha256("\n".join(_identity(hook, DEPTH)).encode()).hexdigest())
        for module, name in _named_modules(wrapped).items()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in map(_unwrapped, hooks.values())
        if not str(getattr(hook, "__module__", "")).startswith("transformer_lens.")
    ]


def _named_modules(wrapped: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that a model runs, by name; a bridge's original model has some at its top that are not its."""
    names = {module: name for name, module in wrapped.named_modules()}
    original = getattr(wrapped, "original_model", None)
    if isinstance(original, nn.Module):
        names = {module: name or "original_model" for name, module in original.named_modules()} | names
    return names


def _unwrapped(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a user's hook out of the function that TransformerLens puts around it."""
    values = _closure(hook) if isinstance(hook, FunctionType) else {}
    return values["hook"] if isinstance(values.get("self"), HookPoint) and "hook" in values else hook


def _name(hook: Callable[..., Any]) -> str:
    if isinstance(hook, functools.partial):
        return _name(hook.func)
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _identity(value: Any, depth: int) -> Iterator[str]:
    """Yield what tells a value from others: text, for tensors a hash of their bytes."""
    yield type(value).__qualname__
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        yield repr(value)
    elif isinstance(value, Tensor):
        yield _hash_of(value)
    elif isinstance(value, tuple | frozenset):
        for member in value:
            yield from _identity(member, depth)
    elif isinstance(value, ModuleType | type):
        yield value.__name__
    elif depth == 0 or isinstance(value, HookPoint):
        return
    elif isinstance(value, CodeType):
        yield value.co_code.hex()
        yield from _identity(value.co_consts, depth)
    elif isinstance(value, FunctionType):
        yield from _function_identity(value, depth - 1)
    elif isinstance(value, MethodType):
        yield from _identity(value.__func__, depth)
        yield from _object_identity(value.__self__, _names_of(value.__func__.__code__, "STORE_ATTR"), depth - 1)
    elif isinstance(value, functools.partial):
        for member in (value.func, value.args, *value.keywords.values()):
            yield from _identity(member, depth)
    else:
        call = vars(type(value)).get("__call__")
        if isinstance(call, FunctionType):
            yield from _identity(call, depth)
        written = _names_of(call.__code__, "STORE_ATTR") if isinstance(call, FunctionType) else frozenset()
        yield from _object_identity(value, written, depth - 1)


def _function_identity(function: FunctionType, depth: int) -> Iterator[str]:
    code = function.__code__
    yield function.__qualname__
    yield from _identity(code, depth)
    yield from _identity((function.__defaults__, *(function.__kwdefaults__ or {}).values()), depth)
    reads = _closure(function) | {
        name: function.__globals__[name]
        for name in sorted(_names_of(code, "LOAD_GLOBAL"))
        if name in function.__globals__
    }
    written = _names_of(code, "STORE_DEREF") | _names_of(code, "STORE_GLOBAL")
    for name, value in reads.items():
        is_of_library = isinstance(value, FunctionType) and value.__module__ != function.__module__
        if is_of_library:
            yield f"{value.__module__}.{value.__qualname__}"
        elif name not in written:
            yield name
            yield from _identity(value, depth)


def _object_identity(value: Any, written: frozenset[str], depth: int) -> Iterator[str]:
    """Yield the numbers, texts, tensors and weights that an object has, without those that its hook writes."""
    members: Mapping[str, Any] = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        members = {**members, **dict(value.named_parameters()), **dict(value.named_buffers())}
    for name, member in members.items():
        if name not in written and isinstance(member, bool | int | float | str | Tensor | FunctionType | MethodType):
            yield name
            yield from _identity(member, depth)


def _closure(function: FunctionType) -> dict[str, Any]:
    """Return the values of a function's closure, by name, without those that are not set yet."""
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:
            continue
    return values


@functools.cache
def _names_of(code: CodeType, operation: str) -> frozenset[str]:
    """Return the names that a function's bytecode reads or writes by an operation."""
    return frozenset(
        str(instruction.argval) for instruction in dis.get_instructions(code) if instruction.opname == operation
    )


def _hash_of(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return f"{tuple(tensor.shape)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
