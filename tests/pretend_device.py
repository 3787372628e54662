"""A device that is not there: tensors that say they are on it, hold their numbers on the CPU, and count their moves.

What runs on such tensors does what it does on a GPU as far as devices go: a tensor of the CPU among its operands is an
error, and each copy from device to device and each number that the host waits for is counted. So a machine without a
GPU can prove where tensors stay.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten: Any = torch.ops.aten

DEVICE = torch.device("meta")
"""The device's name, that of torch's tensors without numbers, which are refused here."""

WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
"""Operators of which the host waits for the result."""


class DeviceTensor(Tensor):
    """A tensor that says it is on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        assert not isinstance(held, DeviceTensor)
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held!r})"

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory of the numbers, which views share as they do on a device."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, Counter())


class PretendedDevice(TorchDispatchMode):
    """Counts what runs on the device: operators, those that compute, copies to and from it, and waits of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.counts)


class _Made(TorchFunctionMode):
    """Makes tensors of Python's numbers, and lists of tensors, which no operator does."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        makes = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if makes and _is_there(kwargs.get("device")):
            self.counts["to device"] += 1
            return DeviceTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], DeviceTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                index = tuple(self._index(part) for part in index)
                return func(args[0], index, *args[2:])
        if func is Tensor.tolist and isinstance(args[0], DeviceTensor):
            self.counts["to host"] += 1
            return args[0].held.tolist()
        if func is Tensor.__format__ and isinstance(args[0], DeviceTensor):
            self.counts["waits"] += 1
            return format(args[0].held, args[1])
        if func is Tensor.numpy and isinstance(args[0], DeviceTensor):
            raise TypeError("expected a tensor on the host: numpy cannot read the device")
        return func(*args, **kwargs)

    def _index(self, part: Any) -> Any:
        if not isinstance(part, list):
            return part
        self.counts["to device"] += 1
        return DeviceTensor(torch.tensor(part, dtype=torch.long))


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def run(func: Any, args: Any, kwargs: dict[str, Any], counts: Counter[str]) -> Any:
    """Run an operator on the numbers that its operands hold."""
    operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if any(type(operand) is Tensor and _is_there(operand.device) for operand in operands):
        raise RuntimeError(f"expected numbers in every operand of {func}, got a tensor without any")
    there = [isinstance(operand, DeviceTensor) for operand in operands]
    to_there = _is_there(kwargs.get("device"))
    if not any(there) and not to_there:
        return func(*args, **kwargs)
    counts["operators"] += 1
    counts["launches"] += not (func.is_view or func is aten._unsafe_view.default)
    to_host = func is aten._to_copy.default and kwargs.get("device") is not None and not to_there
    to_host = to_host or (func is aten.copy_.default and not there[0])
    counts["to host"] += to_host
    if func in (aten._to_copy.default, aten.copy_.default):
        counts["to device"] += not there[-1]
    elif not all(there):
        _count_mixed(func, operands, there, counts)
    is_mask = func is aten.index.Tensor and any(at is not None and at.dtype == torch.bool for at in args[1])
    counts["waits"] += func in WAITS or is_mask
    if to_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is aten.histc.default:  # of whole numbers (tokens by expert), which a GPU takes
        args = (_unwrap(args[0]).float(), *args[1:])
    if func is aten._scaled_dot_product_efficient_attention.default:  # the fused kernel of a GPU
        out = _attend(*map(_unwrap, args), **kwargs)
    else:
        out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    # In-place operators and those that write into out= return the tensor that was passed.
    passed = {id(_unwrap(operand)): operand for operand in operands}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or (to_host and id(value) not in passed):
            return value
        return passed[id(value)] if id(value) in passed else DeviceTensor(value)

    return tree_map(wrap, out)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    with_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    """Compute a GPU's fused attention by the CPU's, which takes and returns the same."""
    seed = torch.zeros(())
    return (*aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale), seed, seed)


def _count_mixed(func: Any, operands: list[Tensor], there: list[bool], counts: Counter[str]) -> None:
    """Count indices that an operator takes from the host; refuse other operands there, as torch does."""
    host = [operand for operand, is_there in zip(operands, there, strict=True) if not is_there]
    if there and there[0] and func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
        counts["to device"] += len(host)
    elif any(operand.ndim for operand in host):
        raise RuntimeError(f"expected all operands of {func} on one device, got one on the CPU")


def move(module: torch.nn.Module) -> None:
    """Move a module's parameters and buffers to the pretended device."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, DeviceTensor):
                if id(parameter) not in memo:
                    memo[id(parameter)] = torch.nn.Parameter(DeviceTensor(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = memo[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, DeviceTensor):
                part._buffers[name] = DeviceTensor(buffer)


@contextmanager
def pretended_device() -> Iterator[Counter[str]]:
    """Let tensors go to the device; yield the counts of what runs there."""
    with PretendedDevice() as mode, _Made(mode.counts):
        yield mode.counts
