"""Small tools for torch tensors that every module may use."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has a type for this on some accelerators; elsewhere it is the words that tell."""
    said = (
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "out of memory",
        "cublas_status_alloc_failed",
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error).lower() for words in said)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pad_right(rows: Sequence[Sequence[int]], *, device: torch.device | str | None = None) -> Int[Tensor, "batch pos"]:
    """Return token ids of several lengths as one tensor, padded with 0 on the right.

    Under a causal mask, padding on the right changes nothing of what stands before it.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
