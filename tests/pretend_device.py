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
"""The name that the device goes by: torch's own tensors of that name have no numbers, and do not appear here."""

WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.is_nonzero.default: "is_nonzero",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
}
"""Operators of which the host waits for the result."""


class DeviceTensor(Tensor):
    """A tensor that says it is on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        assert not isinstance(held, DeviceTensor)
        made = Tensor._make_wrapper_subclass(
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

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, Counter())


class PretendedDevice(TorchDispatchMode):
    """Counts what runs on the device: operators, copies to and from it, and waits of the host."""

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
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]).type == DEVICE.type and not isinstance(args[0], Tensor):
                self.counts["to device"] += 1
                kwargs["device"] = "cpu"
                return DeviceTensor(func(*args, **kwargs))
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


def run(func: Any, args: Any, kwargs: dict[str, Any], counts: Counter[str]) -> Any:
    """Run an operator on the numbers that its operands hold."""
    operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if any(type(operand) is Tensor and operand.device.type == DEVICE.type for operand in operands):
        raise RuntimeError(f"expected numbers in every operand of {func}, got a tensor without any")
    on_device = [isinstance(operand, DeviceTensor) for operand in operands]
    target = kwargs.get("device")
    to_device = target is not None and torch.device(target).type == DEVICE.type
    if not any(on_device) and not to_device:
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    counts["operators"] += 1
    copy = func in (aten._to_copy.default, aten.copy_.default)
    if copy:
        to_host = (func is aten._to_copy.default and target is not None and not to_device) or (
            func is aten.copy_.default and not on_device[0]
        )
        from_host = not on_device[-1] and (to_device or on_device[0])
        if to_host and any(on_device):
            counts["to host"] += 1
        if from_host:
            counts["to device"] += 1
    elif any(on_device) and not all(on_device):
        host = [operand for operand, there in zip(operands, on_device, strict=True) if not there]
        indexing = func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
        if indexing and on_device[0]:
            counts["to device"] += len(host)
        elif any(operand.ndim for operand in host):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got one on cpu")
    if func in WAITS:
        counts["waits"] += 1
        counts[WAITS[func]] += 1
    if func is aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
        counts["waits"] += 1
        counts["index by bool"] += 1
    kwargs = dict(kwargs)
    if to_device:
        kwargs["device"] = torch.device("cpu")
    out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if copy and func is aten._to_copy.default and target is not None and not to_device:
        return out.clone() if any(out is _unwrap(operand) for operand in operands) else out
    if func is aten.copy_.default and not on_device[0]:
        return args[0]
    # In-place operators and those that write into out= return the tensor that was passed.
    held = {id(_unwrap(operand)): operand for operand in operands}
    return tree_map(
        lambda value: (
            (held[id(value)] if id(value) in held else DeviceTensor(value)) if isinstance(value, Tensor) else value
        ),
        out,
    )


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
