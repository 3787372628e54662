"""Helpers for torch tensors that any module may use.

Some are functions of torch with the types that torch leaves out: `vector_norm`, `to_list`, `unique`, `from_numpy`,
`fork_rng` and `linalg`.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "cublas_status_alloc_failed",
)


_DEVICE_LOST_MESSAGES = (
    "unspecified launch failure",
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "misaligned address",
    "device-side assert",
    "launch timed out",
    "uncorrectable ecc",
    "uncorrectable nvlink",
    "hardware stack error",
    "devices are busy or unavailable",
    "device(s) is/are busy or unavailable",
    "cuda error: unknown error",
    "cuda driver error: unknown error",
    "hip error: unknown error",
    "device is lost",
    "device lost",
)
"""Errors after which a process cannot use its accelerator any more, by the driver's messages, which torch passes on."""


class DeviceLostError(RuntimeError):
    """The accelerator was lost: this process cannot compute on it any more."""


def lost_device(error: BaseException, *, handled: BaseException | None = None) -> BaseException | None:
    """Return the error by which an accelerator was lost, among an error and those that led to it; `None` for none.

    Args:
        error: the error.
        handled: the error in whose `except` block the computation began. Python names it as the context of `error`,
            but neither it nor what led to it counts.

    Example:
        >>> from icl_dual.torch_utils import lost_device
        >>> lost_device(RuntimeError("CUDA error: unspecified launch failure"))
        RuntimeError('CUDA error: unspecified launch failure')
    """
    visited_ids = set[int]()
    first_loss, current = None, error
    while current is not None and current is not handled and id(current) not in visited_ids:
        visited_ids.add(id(current))
        message = str(current).lower()
        is_loss = isinstance(current, RuntimeError) and any(known in message for known in _DEVICE_LOST_MESSAGES)
        first_loss = current if is_loss else first_loss
        current = current.__cause__ or current.__context__
    return first_loss


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an exception means that memory ran out.

    Torch has an exception type for this on some accelerators; on others only the message tells.
    """
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        known in message for known in _OUT_OF_MEMORY_MESSAGES
    )


def at_least_float32(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return a tensor in float32, or in its own dtype where this is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype is of floating-point numbers in half precision, or in less."""
    return dtype.is_floating_point and dtype.itemsize < 4


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without torch's, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


linalg: Any = torch.linalg
"""`torch.linalg`, whose functions have no types."""


def vector_norm(
    x: Float[Tensor, "..."],
    dim: int | Sequence[int] | None = None,
    *,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Return the Euclidean norm of all elements, or along axes; of a matrix's two axes, this is the Frobenius norm.

    Example:
        >>> vector_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), dim=-1)
        tensor([5., 1.])
    """
    return linalg.vector_norm(x, dim=dim, keepdim=keepdim, dtype=dtype)


def to_list(x: Shaped[Tensor, "..."]) -> list[Any]:
    """Return a tensor's elements as numbers in lists, one level a dimension."""
    return cast(Any, x).tolist()


def unique(x: Shaped[Tensor, "..."]) -> tuple[Shaped[Tensor, " value"], Int[Tensor, "..."]]:
    """Return a tensor's distinct values in ascending order, and for each element the index of its value."""
    return cast(Any, x).unique(return_inverse=True)


def from_numpy(array: Shaped[np.ndarray, "..."]) -> Shaped[Tensor, "..."]:
    """Return a tensor that shares an array's memory."""
    return cast(Any, torch).from_numpy(array)


def fork_rng(devices: Iterable[torch.device] | None = None) -> AbstractContextManager[None]:
    """Return a context after which torch's random numbers go on as before it.

    Args:
        devices: the accelerators whose random numbers do, besides the CPU's; all by default.
    """
    return cast(Any, torch.random).fork_rng(devices)


def pad_right(
    sequences: Sequence[Sequence[int]], *, device: torch.device | str | None = None
) -> Int[Tensor, "batch pos"]:
    """Return token ids of different lengths as one tensor, padded with 0 on the right.

    Under a causal mask, padding on the right does not change the positions before it.

    Example:
        >>> from icl_dual.torch_utils import pad_right
        >>> pad_right([[5, 6, 7], [8]]).tolist()
        [[5, 6, 7], [8, 0, 0]]
    """
    longest = max(map(len, sequences))
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences], device=device)


def checked_index(name: str, index: int, size: int) -> int:
    """Return an index from 0; a negative one counts from the end.

    Args:
        name: the argument's name, for the message.
        index: what the user passed.
        size: how many entries there are.

    Raises:
        IndexError: the index is out of range.

    Example:
        >>> from icl_dual.torch_utils import checked_index
        >>> checked_index("layer", -1, 12)
        11
    """
    if not -size <= index < size:
        raise IndexError(f"expected {name} from 0 to {size - 1}, got {index}: there are {size}")
    return index % size
