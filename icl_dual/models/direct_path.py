"""The direct path from a layer's attention output to logits: norms with their scale frozen, then the unembedding.

A norm (RMS or layer norm) divides by a scale that depends on all that enters it. With the scale frozen at the value
that it has in a run, it is a linear map, and the logit is a sum of one term for each part of the residual stream. Norms
are measured on vectors rather than read by name: their gain, their ε and whether they subtract the mean.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_dual.models.backend import DirectPathParts, UnsupportedModelError
from icl_dual.torch_utils import vector_norm

TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
"""Largest relative difference of norms and logits from their linear form: of float32 or wider, of half precision."""

SMALL = 1e-3
"""The length of the vector, relative to another, from which a norm's ε is measured."""


@dataclass(frozen=True)
class FrozenNorm:
    """A norm as a linear map, with its scale frozen: x ↦ gain ⊙ (x − mean) / scale + bias."""

    gain: Float[Tensor, " d_model"]
    """The weight of each dimension."""
    bias: Float[Tensor, " d_model"]
    """What is added to every output."""
    eps: float
    """What is added to the mean square before its root is taken."""
    centred: bool
    """Whether the mean is subtracted (layer norm)."""

    def centre(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Return vectors without their mean, where the norm subtracts it."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def inverse_scale(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes"]:
        """Return 1 / scale of the norm at vectors that enter it."""
        return (self.centre(x).square().mean(-1) + self.eps).rsqrt()

    def __call__(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Return the norm of vectors."""
        return self.gain * self.centre(x) * self.inverse_scale(x).unsqueeze(-1) + self.bias

    def pull_back(self, direction: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Return the direction before the norm that is this direction after it, up to the frozen scale."""
        return self.centre(self.gain * direction)


@dataclass(frozen=True)
class DirectPath:
    """How a vector that attention writes reaches the logits of some tokens directly, past all later layers."""

    after_attention: tuple[FrozenNorm | None, ...]
    """The norm between attention and the residual stream, by layer; `None` where there is none."""
    final: FrozenNorm | None
    """The norm before the unembedding; `None` where there is none."""
    unembedding: Float[Tensor, "token d_model"]
    """The unembedding's row of each token."""

    def directions(self, layer: int) -> Float[Tensor, "token d_model"]:
        """Return what reads a layer's attention output as logits, up to the frozen scales of both norms."""
        rows = self.unembedding if self.final is None else self.final.pull_back(self.unembedding)
        norm = self.after_attention[layer]
        return rows if norm is None else norm.pull_back(rows)


def direct_path(
    parts: DirectPathParts, tokens: Sequence[int], unembed: Callable[[Tensor], Tensor], dtype: torch.dtype, where: str
) -> DirectPath:
    """Return the direct path to the logits of tokens, in float64, checked against the model's own logits.

    Args:
        parts: the modules on the path.
        tokens: the ids of the tokens.
        unembed: returns the model's logits `[1 1 d_vocab]` of a residual stream `[1 1 d_model]`.
        dtype: what the model computes in.
        where: the model, for errors.

    Raises:
        UnsupportedModelError: a norm is neither an RMS norm nor a layer norm, or the model's logits are not the
            unembedding of the normed residual stream, as where they are scaled.
    """
    d_model = parts.W_U.shape[1]
    tolerance = HALF_TOLERANCE if dtype.itemsize < 4 else TOLERANCE
    final = None if parts.final is None else _measured(parts.final, d_model, where, tolerance)
    after_attention = tuple(
        None if norm is None else _measured(norm, d_model, f"{where}, layer {layer}", tolerance)
        for layer, norm in enumerate(parts.after_attention)
    )
    rows = parts.W_U[list(tokens)].double().cpu()
    sample = _sample(d_model)
    logits = rows @ (sample if final is None else final(sample))
    logits = logits if parts.b_U is None else logits + parts.b_U[list(tokens)].double().cpu()
    logits = logits if parts.cap is None else parts.cap * torch.tanh(logits / parts.cap)
    expected = unembed(sample.to(parts.W_U.device, dtype)[None, None])[0, 0, list(tokens)].double().cpu()
    difference = (logits - expected).abs().max()
    if not difference <= tolerance * max(1.0, expected.abs().max()):
        raise UnsupportedModelError(
            f"{where}: expected logits that are the unembedding of the normed residual stream, got a difference of "
            f"{difference:.1e}, as of logits that the model scales: leave out logits="
        )
    return DirectPath(after_attention, final, rows)


def _measured(norm: nn.Module, d_model: int, where: str, tolerance: float) -> FrozenNorm:
    """Return a norm as a linear map with a frozen scale, measured on vectors."""
    copied: Any = copy.deepcopy(norm).double().cpu()

    def apply(x: Tensor) -> Tensor:
        with torch.no_grad():
            return copied.forward(x.double()[None, None])[0, 0].double()

    bias, sample = apply(torch.zeros(d_model)), _sample(d_model)
    alternating = torch.ones(d_model, dtype=torch.float64)
    alternating[1::2] = -1.0
    for centred in (False, True):
        unit = alternating - alternating.mean() if centred else alternating
        of_one, of_small = ((apply(size * alternating) - bias) / unit for size in (1.0, SMALL))
        mean_square = unit.square().mean().item()
        # Outputs grow with the input's size s as s / √(s² m + ε): the squared ratio of two is (m + ε) s² / (s² m + ε).
        ratio = float((of_small @ of_one) / (of_one @ of_one).clamp_min(1e-30)) ** 2
        eps = max(0.0, mean_square * SMALL**2 * (1 - ratio) / max(ratio - SMALL**2, 1e-30))
        measured = FrozenNorm(of_one * (mean_square + eps) ** 0.5, bias, eps, centred)
        expected = apply(sample)
        if vector_norm(measured(sample) - expected) <= tolerance * vector_norm(expected):
            return measured
    raise UnsupportedModelError(
        f"{where}: expected an RMS norm or a layer norm for direct effects on logits, got {type(norm).__name__}, which "
        "is neither: leave out logits="
    )


def _sample(d_model: int) -> Float[Tensor, " d_model"]:
    """Return a vector with a mean other than 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(d_model, generator=generator, dtype=torch.float64) + 0.5
