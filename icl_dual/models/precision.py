"""Numeric precision: its names, copies of weights while they run, and TF32 switched off.

Copies are in float32 of weights in half precision, on the model's device of weights that are kept elsewhere, or both.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from icl_dual.models.foreign_hooks import remove_hook
from icl_dual.models.journal import Journal, Undo
from icl_dual.torch_utils import dtype_name, is_half


def check_arithmetic(dtype: torch.dtype, arithmetic: torch.dtype | None) -> None:
    """Check that weights of a dtype can run in an arithmetic.

    Raises:
        ValueError: arithmetic is neither the weights' dtype nor float32 for weights in half precision.
    """
    if arithmetic not in (None, dtype) and not (is_half(dtype) and arithmetic == torch.float32):
        raise ValueError(
            f"expected arithmetic=torch.float32 with weights in bfloat16 or float16, got arithmetic={arithmetic} with "
            f"weights in {dtype}: leave arithmetic out to compute in the dtype of the weights"
        )


def precision_name(dtype: torch.dtype, arithmetic: torch.dtype) -> str:
    """Return a precision in words.

    Args:
        dtype: the dtype of the weights.
        arithmetic: the dtype of the computation.

    Example:
        >>> precision_name(torch.bfloat16, torch.float32)
        'bfloat16 storage, float32 arithmetic'
        >>> precision_name(torch.bfloat16, torch.bfloat16)
        'bfloat16'
    """
    storage, computed = map(dtype_name, (dtype, arithmetic))
    return storage if storage == computed else f"{storage} storage, {computed} arithmetic"


def fingerprinted_precision(fingerprint: str) -> str:
    """Return the precision in words that a fingerprint (`Model.fingerprint`) begins with.

    Example:
        >>> fingerprinted_precision("float32:bfloat16:5d41402abc4b2a76")
        'bfloat16 storage, float32 arithmetic'
        >>> fingerprinted_precision("float32:5d41402abc4b2a76")
        'float32'
    """
    arithmetic, _, storage = fingerprint.rpartition(":")[0].partition(":")
    return f"{storage} storage, {arithmetic} arithmetic" if storage else arithmetic


_SETTINGS = Journal()
"""The blocks that compute in exact float32. The setting is the process's, and models may run in several threads."""


def exact_float32(undo: Undo) -> None:
    """Multiply float32 matrices in float32 on GPUs too, without TF32, until the block ends."""
    settings: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    setting = Undo()
    undo.push(_SETTINGS.close, setting)
    with _SETTINGS.lock:
        _SETTINGS.open(setting)
        setting.set(settings, name, exact)


class _Replaced(NamedTuple):
    """A parameter or buffer that a copy stands in for."""

    tensors: dict[str, Any]
    """A module's parameters or buffers by name."""
    name: str
    """Its name in `tensors`."""
    original: Tensor
    """The module's own tensor."""


class _Copies:
    """Stands copies in for modules' parameters and buffers, for a while.

    Args:
        dtype: the wider dtype in which half-precision tensors run; `None` for their own.
        device: the device on which all tensors run.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.originals: dict[int, Tensor] = {}
        """By the address of a copy that is in use, the original."""
        self.n_packed = 0
        """How many tensors autograd has kept since `n_packed` was set to 0."""

    def stand_in(self, modules: Iterable[nn.Module], undo: Undo) -> None:
        """Replace the parameters and buffers of some modules until the block ends."""
        replaced: list[_Replaced] = []
        copies: dict[int, Tensor] = {}  # by the original's id: tied weights share one copy
        addresses: list[int] = []
        undo.push(self._restore, replaced, copies, addresses)
        for module in modules:
            of_module: list[dict[str, Any]] = [module._parameters, module._buffers]  # pyright: ignore[reportPrivateUsage]
            for tensors in of_module:
                for name, tensor in tensors.items():
                    if tensor is not None and self._needs_copy(tensor):
                        if id(tensor) not in copies:
                            copies[id(tensor)] = self._copy(tensor, addresses)
                        replaced.append(_Replaced(tensors, name, tensor))
                        tensors[name] = copies[id(tensor)]

    def _restore(self, replaced: list[_Replaced], copies: dict[int, Tensor], addresses: list[int]) -> None:
        for tensors, name, original in replaced:
            tensors[name] = original
        for address in addresses:  # before the copies are freed: other tensors may come to lie there
            self.originals.pop(address, None)
        copies.clear()

    def _needs_copy(self, tensor: Tensor) -> bool:
        return tensor.device != self.device or (self.dtype is not None and is_half(tensor.dtype))

    def _copy(self, original: Tensor, addresses: list[int]) -> Tensor:
        copy = self._copied(original)
        if address := copy.untyped_storage().data_ptr():
            addresses.append(address)
            self.originals[address] = original
        return nn.Parameter(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy

    def _copied(self, original: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and is_half(original.dtype) else original.dtype
        return original.detach().to(self.device, dtype, memory_format=torch.contiguous_format)

    def pack(self, tensor: Tensor) -> "Tensor | _View":
        """Return what autograd keeps of a tensor: of a copy, only where to make it from again."""
        self.n_packed += 1
        original = self.originals.get(tensor.untyped_storage().data_ptr())
        if original is None:
            return tensor
        return _View(original, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: "Tensor | _View") -> Tensor:
        """Return a tensor that autograd has kept."""
        if isinstance(kept, Tensor):
            return kept
        return self._copied(kept.original).as_strided(kept.size, kept.stride, kept.offset)


class _View(NamedTuple):
    """A view of a copy, as it can be made from the original again."""

    original: Tensor
    """The half-precision tensor."""
    size: Sequence[int]
    """The view's size."""
    stride: Sequence[int]
    """The view's strides, in elements."""
    offset: int
    """The view's first element in the copy."""


def run_copies(
    roots: Sequence[nn.Module],
    blocks: Sequence[nn.Module],
    dtype: torch.dtype | None,
    device: torch.device,
    undo: Undo,
) -> None:
    """Run weights in a wider dtype, or on another device, until the block ends; the weights are left as they are.

    Each block's weights and buffers that are in half precision or on another device are replaced with copies while the
    block runs, one block at a time. Those outside of all blocks (embeddings, final norm, unembedding) are replaced
    throughout. The backward pass makes the copies again: autograd keeps none of them. Gradients reach activations, not
    the weights that have copies.

    Args:
        roots: the modules that hold the whole model.
        blocks: the modules that run one after another.
        dtype: the wider dtype of weights in half precision; `None` for their own.
        device: the device on which the model runs.
        undo: what undoes it.
    """
    copies = _Copies(dtype, device)
    in_blocks = {id(module) for block in blocks for module in block.modules()}
    modules = {id(module): module for root in roots for module in root.modules() if id(module) not in in_blocks}
    for block in blocks:
        _copy_while_running(block, copies, undo)
    copies.stand_in(modules.values(), undo)
    if torch.is_grad_enabled():
        _keep_originals(copies, undo)


def _copy_while_running(block: nn.Module, copies: _Copies, undo: Undo) -> None:
    """Attach hooks that replace a block's weights before it runs and restore them after it, however it ends."""
    running = Undo()

    def enter(module: nn.Module, args: Any) -> None:
        copies.stand_in(block.modules(), running)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.run()

    undo.push(running.run)  # after an exception that hooks do not see, such as Ctrl-C
    undo.push(remove_hook, block, enter)
    undo.push(remove_hook, block, leave)
    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)


def _keep_originals(copies: _Copies, undo: Undo) -> None:
    """Let autograd keep the originals of copies until the block ends."""
    hooks = saved_tensors_hooks(copies.pack, copies.unpack)
    undo.push(_pop_hooks, hooks, copies)
    hooks.__enter__()


def _pop_hooks(hooks: saved_tensors_hooks, copies: _Copies) -> None:
    """Take hooks of autograd off the thread's stack, if they are on its top: an interrupt may have come before."""
    copies.n_packed = 0
    with torch.enable_grad():
        torch.ones(1, requires_grad=True).exp()  # keeps its result for the backward pass
    if copies.n_packed:
        hooks.__exit__(None, None, None)
