"""Hooks on a model that neither this library, TransformerLens nor transformers has put there; an identity of each.

A hook's identity is its code and the values that it reads: constants, defaults, its closure, global names, attributes
of objects, and what dicts, lists, sets and arrays hold. Variables, attributes and members of containers that its code
writes to, such as a counter or a store of activations, are its state and no part of its identity. Classes and modules,
and functions of other modules, are read by name alone. A value that cannot be read, or that lies too deep, is read by
its address: two of them differ, so that captures are refused rather than paired wrongly.
"""

import dis
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from icl_dual.type_guards import is_array, is_dict, is_list, is_mapping

DEPTH = 8
"""How many functions, objects and containers deep a hook's values are read."""

OWN_MODULES = "transformer_lens.", "transformers.utils.output_capturing"
"""Prefixes of modules whose hooks are not foreign: they collect what a caller requests, and change no activation."""

MUTATORS = {"add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop", "popitem"} | {
    "popleft",
    "remove",
    "setdefault",
    "update",
}
"""The methods by which lists, dicts, sets and deques change."""


def foreign_hooks(wrapped: nn.Module) -> list[tuple[str, str, str]]:
    """Return an identity of each foreign hook: its module, its name, and a hash of its code and of what it reads.

    Those that TransformerLens and transformers have put there for themselves are left out: transformers' stay for good
    once a forward pass has returned attentions or hidden states, and TransformerLens's `run_with_cache` asks for these.
    """
    # Making names takes longer than a layer runs, and mostly there are no hooks.
    if not any(_foreign(module) for module in modules_of(wrapped) if any(_hooks_of(module))):
        return []
    return [
        (name, _name(hook), hashlib.sha256("\n".join(_identity(hook, DEPTH, frozenset())).encode()).hexdigest())
        for module, name in _named_modules(wrapped).items()
        for hook in _foreign(module)
    ]


def modules_of(wrapped: nn.Module, leave_out: type[nn.Module] | None = None) -> Iterator[nn.Module]:
    """Yield each module that a model runs once, those of a bridge's original model included, without their names.

    Args:
        wrapped: the model.
        leave_out: a class of which no module is yielded.
    """
    pending: list[nn.Module | None] = [wrapped, getattr(wrapped, "original_model", None)]
    visited = set[nn.Module]()
    while pending:
        module = pending.pop()
        if module is None or module in visited:
            continue
        visited.add(module)
        yield module
        children: Iterable[nn.Module | None] = cast(Any, module)._modules.values()
        pending += children if leave_out is None else [child for child in children if type(child) is not leave_out]


def _foreign(module: nn.Module) -> list[Callable[..., Any]]:
    """Return a module's foreign hooks."""
    hooks = [_unwrapped(hook) for hooks in _hooks_of(module) for hook in hooks.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(OWN_MODULES)]


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove every forward hook that is a function, or that TransformerLens has put around it."""
    for hooks in _hooks_of(module):
        for handle_id in [key for key, value in hooks.items() if value is hook or _unwrapped(value) is hook]:
            hooks.pop(handle_id, None)
            for options in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called):  # pyright: ignore[reportPrivateUsage]
                options.pop(handle_id, None)


def _hooks_of(module: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """Return a module's hooks before and after its forward pass, by handle; torch has no public name for them."""
    return [cast(Any, module)._forward_pre_hooks, cast(Any, module)._forward_hooks]


def _named_modules(wrapped: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that a model runs, by name; a bridge's original model has some at its top that are not its."""
    names: dict[nn.Module, str] = {module: name for name, module in cast(Any, wrapped).named_modules()}
    original = getattr(wrapped, "original_model", None)
    if isinstance(original, nn.Module):
        names = {module: name or "original_model" for name, module in cast(Any, original).named_modules()} | names
    return names


def _unwrapped(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a user's hook out of the function that TransformerLens puts around it."""
    values = _closure(hook) if isinstance(hook, FunctionType) else {}
    return values["hook"] if isinstance(values.get("self"), HookPoint) and "hook" in values else hook


def _name(hook: Callable[..., Any]) -> str:
    if isinstance(hook, functools.partial):
        return _name(hook.func)
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _identity(value: Any, depth: int, written: frozenset[str]) -> Iterator[str]:
    """Yield texts that identify a value, for tensors and arrays a hash; attributes that are written are left out."""
    yield type(value).__qualname__
    if value is None or isinstance(
        value, bool | int | float | complex | str | bytes | slice | range | np.generic | torch.dtype
    ):
        yield f"{value!r}"
    elif isinstance(value, torch.device):
        yield str(value)
    elif isinstance(value, Tensor):
        yield _hash_of(value)
    elif is_array(value) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, ModuleType | type):
        yield value.__name__
    elif isinstance(value, HookPoint):
        return
    elif isinstance(value, CodeType):
        yield f"{value.co_code.hex()} {value.co_names} {value.co_freevars}"
        for constant in value.co_consts:
            yield from _identity(constant, depth, written)
    elif depth == 0:
        yield _address(value)
    elif is_mapping(value):
        for key, member in value.items():
            yield from _identity(key, depth - 1, written)
            yield from _identity(member, depth - 1, written)
    elif isinstance(value, tuple | list | deque):
        for member in cast(Iterable[Any], value):
            yield from _identity(member, depth - 1, written)
    elif isinstance(value, AbstractSet):
        yield from sorted(" ".join(_identity(member, depth - 1, written)) for member in cast(Iterable[Any], value))
    elif isinstance(value, FunctionType):
        yield from _function_identity(value, depth - 1)
    elif isinstance(value, MethodType):
        yield from _identity(value.__func__, depth, written)
        yield from _object_identity(value.__self__, _written_by(value.__func__), depth - 1)
    elif isinstance(value, functools.partial):
        yield from _identity((value.func, value.args, value.keywords), depth, written)
    elif isinstance(value, BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
        yield from _identity(value.__self__, depth - 1, written)
    else:
        call = vars(type(value)).get("__call__")  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(call, FunctionType):
            yield from _identity(call, depth, written)
            written |= _written_by(call)
        yield from _object_identity(value, written, max(depth - 2, 0))


def _function_identity(function: FunctionType, depth: int) -> Iterator[str]:
    code, written = function.__code__, _written_by(function)
    yield function.__qualname__
    yield from _identity(code, depth, written)
    n_defaults = len(function.__defaults__ or ())
    positional = code.co_varnames[: code.co_argcount][code.co_argcount - n_defaults :]
    values = dict(zip(positional, function.__defaults__ or (), strict=True)) | (function.__kwdefaults__ or {})
    values |= _closure(function) | {
        name: function.__globals__[name]
        for name in sorted(_names_of(code, "LOAD_GLOBAL") | _names_of(code, "LOAD_NAME"))
        if name in function.__globals__ and function.__globals__[name] is not function
    }
    for name, value in values.items():
        is_of_library = isinstance(value, FunctionType) and value.__module__ != function.__module__
        if is_of_library:
            yield f"{value.__module__}.{value.__qualname__}"
        elif not _is_state(name, value, written):
            yield name
            yield from _identity(_without_state(name, value, written), depth, written)


def _is_state(name: str, value: Any, written: frozenset[str]) -> bool:
    """Return whether a hook writes a variable or an attribute, or all members of a container."""
    if isinstance(value, list | dict | set | deque) and f"{name}()" in written:
        return True
    has_elements = isinstance(value, Tensor | np.ndarray)
    return name in written or (has_elements and any(place.startswith(f"{name}[") for place in written))


def _without_state(name: str, value: Any, written: frozenset[str]) -> Any:
    """Return a container without the members that a hook writes by a constant key; leave any other value unchanged."""
    if not (is_dict(value) or is_list(value)) or not any(place.startswith(f"{name}[") for place in written):
        return value
    items = value.items() if is_dict(value) else enumerate(value)
    return {key: member for key, member in items if f"{name}[{key!r}]" not in written}


def _object_identity(value: Any, written: frozenset[str], depth: int) -> Iterator[str]:
    """Yield texts that identify an object's attributes and weights, without the attributes that are written."""
    wrapped = getattr(value, "wrapped", None)
    if isinstance(wrapped, nn.Module):  # this library's model: its other attributes change as it runs
        value = wrapped
    members: dict[str, Any]
    if isinstance(value, nn.Module) and any(isinstance(module, HookPoint) for module in value.modules()):
        members = dict(value.named_parameters())
    elif isinstance(value, nn.Module):
        members = {name: member for name, member in vars(value).items() if not name.startswith("_")}
        members |= {**dict(value.named_parameters()), **dict(value.named_buffers())}
    elif hasattr(value, "__dict__"):
        members = value.__dict__
    else:
        yield _address(value)
        return
    for name, member in members.items():
        if not _is_state(name, member, written):
            yield name
            yield from _identity(_without_state(name, member, written), depth, written)


def _address(value: Any) -> str:
    return f"at {id(value)}"


def _closure(function: FunctionType) -> dict[str, Any]:
    """Return the values of a function's closure, by name, without those that are not set yet."""
    values: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:
            continue
    return values


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.cache
def _names_of(code: CodeType, operation: str) -> frozenset[str]:
    """Return the names that a function's bytecode reads or writes by an operation."""
    return frozenset(
        str(instruction.argval)
        for part in _codes(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname == operation
    )


def _written_by(function: FunctionType) -> frozenset[str]:
    """Return the variables and attributes that a function assigns, or whose contents it changes."""
    return _written_names(function.__code__)


@functools.cache
def _written_names(code: CodeType) -> frozenset[str]:
    assigned = [_names_of(code, operation) for operation in ("STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL")]
    return frozenset[str]().union(*assigned, *map(_changed_containers, _codes(code)))


def _changed_containers(code: CodeType) -> Iterable[str]:
    """Yield the containers that bytecode changes: `name[key]`, `name` for any key, or `name()` by a method.

    The container is the name that was last loaded onto its place of the stack. Where the code leaves that open, no
    name is yielded: the container is read, and its changes change the identity.
    """
    stack: list[str | None] = []
    for instruction in dis.get_instructions(code):
        name, operation = str(instruction.argval), instruction.opname
        if instruction.is_jump_target:
            stack.clear()
        if operation in ("LOAD_METHOD", "LOAD_ATTR") and name in MUTATORS and stack and stack[-1]:
            yield f"{stack[-1]}()"
        if operation in ("STORE_SUBSCR", "DELETE_SUBSCR") and len(stack) > 1 and stack[-2]:
            is_constant = (stack[-1] or "").startswith("=")
            yield f"{stack[-2]}[{stack[-1][1:]}]" if stack[-1] and is_constant else stack[-2]
        if operation in ("EXTENDED_ARG", "CACHE", "PRECALL", "KW_NAMES", "RESUME", "NOP"):
            continue
        depth = int(instruction.arg or 0)
        if operation == "COPY":
            stack.append(stack[-depth] if len(stack) >= depth else None)
            continue
        if operation == "SWAP" and len(stack) >= depth:
            stack[-1], stack[-depth] = stack[-depth], stack[-1]
            continue
        effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        loads = operation in ("LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR") or operation == "LOAD_FAST"
        pops_alone = operation == "POP_TOP" or operation.startswith(("STORE_", "DELETE_", "POP_JUMP"))
        if effect < 0:
            del stack[effect:]
        if stack and not pops_alone and not (effect > 0 and operation.startswith(("LOAD_", "PUSH_"))):
            stack[-1] = None
        stack.extend([None] * effect)
        if loads and stack:
            stack[-1] = name
        elif operation == "LOAD_CONST":
            stack[-1] = f"={instruction.argval!r}"


def _hash_of(tensor: Tensor) -> str:
    try:
        data = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).cpu()
    except (RuntimeError, NotImplementedError):  # e.g. of a sparse tensor, or of a tensor without data
        return _address(tensor)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
