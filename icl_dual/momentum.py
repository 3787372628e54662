"""Momentum attention: the decaying sum of past values, and its coefficient η.

Gradient descent with momentum steps along a decaying sum of past gradients. By analogy, momentum attention adds a
decaying sum of past values to every head (Dai et al., 2023, §5):

    MoAttn(V, K, q_t) = Attn(V, K, q_t) + Σ_{i<t} η^{t−i} v_i,    0 ≤ η < 1.

`decaying_sum` computes the sum in time linear in the positions, `decaying_sum_reference` pair by pair.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 32
"""Positions that one matrix of decays covers: more cost more arithmetic, fewer more steps."""
NOTHING = 1e-30
"""What decays below this adds nothing but time: arithmetic on subnormal numbers is slow."""


class Momentum(NamedTuple):
    """What momentum adds to attention's output, and what it carries on."""

    z: Float[Tensor, "batch pos head d_head"]
    """Σ_{i<t} η^{t−i} v_i, of the past alone."""
    state: Float[Tensor, "batch head d_head"]
    """Σ_i η^{n−1−i} v_i over the n positions so far: all that positions to come need of them."""


def decaying_sum(
    v: Float[Tensor, "batch pos kv_head d_head"],
    eta: Float[Tensor, " head"],
    *,
    state: Float[Tensor, "batch head d_head"] | None = None,
    documents: Int[Tensor, "batch pos"] | None = None,
) -> Momentum:
    """The decaying sum of past values that momentum attention adds, in time linear in the positions.

    Positions come in blocks. Within one, the sum is a product with a matrix of decays; what each block leaves behind
    is summed from block to block in the same way, with decay η^block.

    Args:
        v: values, in the order of their positions; query heads share them group by group.
        eta: η of each query head, from 0 to below 1. At 0 nothing is added.
        state: what values before these have left, by `Momentum.state`; nothing where not given.
        documents: which document each position belongs to, negative for padding. A run of positions of one document
            is summed by itself; a state belongs to the first.

    Raises:
        ValueError: η is out of range or not by head, or shapes do not fit.
    """
    _check_shapes(v, eta, state, documents)
    check_eta(eta)
    with torch.autocast(v.device.type, enabled=False):  # which would sum in half precision
        return _decaying_sum(*_as_heads(v, eta), state, documents)


def _decaying_sum(
    values: Float[Tensor, "batch pos head d_head"],
    decay: Float[Tensor, " head"],
    state: Float[Tensor, "batch head d_head"] | None,
    documents: Int[Tensor, "batch pos"] | None,
) -> Momentum:
    if not values.shape[1]:
        return Momentum(values, values.sum(1) if state is None else state)
    before = values.new_zeros(len(values), *values.shape[2:]) if state is None else state.to(values)
    own = before_own = None
    if documents is not None:
        values = values.masked_fill((documents < 0)[..., None, None], 0.0)
        own = torch.nn.functional.pad((documents.diff(dim=1) != 0).cumsum(1), (1, 0))
        before_own = torch.cat((own[:, :1], own[:, :-1]), dim=1)
    z = _decayed(torch.cat((before[:, None], values[:, :-1]), dim=1), decay, before_own, own, 1)
    return Momentum(z, values[:, -1] + z[:, -1])


def decaying_sum_reference(
    v: Float[Tensor, "batch pos kv_head d_head"],
    eta: Float[Tensor, " head"],
    documents: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Return `decaying_sum` as a product with a triangular matrix of decays, in time quadratic in the positions."""
    check_eta(eta)
    values, decay = _as_heads(v, eta)
    position = torch.arange(v.shape[1], device=v.device)
    shown = (position[:, None] > position).expand(len(v), -1, -1)
    if documents is not None:
        shown = torch.zeros_like(shown)
        for batch, of_row in enumerate(documents.tolist()):
            for t, document in enumerate(of_row):
                own = itertools.takewhile(lambda i, row=of_row, own=document: row[i] == own, range(t - 1, -1, -1))
                shown[batch, t, list(own)] = document >= 0
    return torch.einsum("bhti,bihd->bthd", decay_matrix(decay, position, position) * shown[:, None], values)


def decay_matrix(
    eta: Float[Tensor, " head"], rows: Int[Tensor, "*batch pos"], keys: Int[Tensor, "*#batch key"]
) -> Float[Tensor, "*batch head pos key"]:
    """η^{t−i} for a row at t and a key at i before it, else 0."""
    distance = (rows[..., None] - keys[..., None, :]).unsqueeze(-3)
    return torch.where(distance > 0, eta[:, None, None] ** distance.clamp_min(1), 0.0)


def momentum_linear_attention(
    q: Float[Tensor, "*batch pos d_k"],
    k: Float[Tensor, "*batch key d_k"],
    v: Float[Tensor, "*batch key d_v"],
    eta: float,
) -> Float[Tensor, "*batch pos d_v"]:
    """Linear attention with momentum over its terms: Σ_t (u_t + Σ_{i<t} η^{t−i} u_i), u_i = v_i (k_iᵀ q).

    On error signals and inputs it is what SGD with momentum adds to a linear layer, unrolled.
    """
    terms = (q @ k.mT).unsqueeze(-1) * v.unsqueeze(-3)
    by_step = terms.flatten(0, -3)  # every query's terms, in the order of the steps
    added = decaying_sum(by_step.unsqueeze(2), by_step.new_full((1,), eta)).z.view(terms.shape)
    return (terms + added).sum(-2)


def check_eta(eta: Float[Tensor, "*shape"]) -> None:
    """Raise a ValueError unless every η is at least 0 and below 1."""
    wrong = eta[~((eta >= 0) & (eta < 1))]
    if len(wrong):
        raise ValueError(f"expected η from 0 to below 1, got {wrong[0].item():g}")


def _check_shapes(v: Any, eta: Any, state: Any, documents: Any) -> None:
    if not isinstance(v, Tensor) or v.ndim != 4:
        raise ValueError(f"expected values [batch pos kv_head d_head], got {_shape(v)}")
    if not isinstance(eta, Tensor) or eta.ndim != 1 or not len(eta) or len(eta) % v.shape[2]:
        raise ValueError(
            f"expected η by query head, of which {v.shape[2]} heads of values have as many each, got {_shape(eta)}"
        )
    if state is not None and state.shape != (len(v), len(eta), v.shape[3]):
        raise ValueError(f"expected a state {[len(v), len(eta), v.shape[3]]}, got {_shape(state)}")
    if documents is not None and (documents.shape != v.shape[:2] or documents.dtype is torch.bool):
        raise ValueError(
            f"expected a document's number for each of {list(v.shape[:2])} positions, negative for padding, got "
            f"{_shape(documents)}"
        )


def _shape(given: Any) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)


def _as_heads(v: Tensor, eta: Tensor) -> tuple[Float[Tensor, "batch pos head d_head"], Float[Tensor, " head"]]:
    """Values repeated for every query head, and decays, in one type of float32 at least."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    group = len(eta) // v.shape[2]
    return (v if group == 1 else v.repeat_interleave(group, dim=2)).to(dtype), eta.to(v.device, dtype)


def _decayed(
    x: Float[Tensor, "batch pos head d_head"],
    decay: Float[Tensor, " head"],
    source: Int[Tensor, "batch pos"] | None,
    target: Int[Tensor, "batch pos"] | None,
    offset: int,
) -> Float[Tensor, "batch pos head d_head"]:
    """Σ_{i≤t} decay^{t−i+offset} x_i at every t, of the x whose source is t's target; both are runs, and ascend."""
    n_pos = x.shape[1]
    n_blocks = -(-n_pos // BLOCK)
    size = n_pos if n_blocks == 1 else BLOCK
    if pad := n_blocks * size - n_pos:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad))
    blocks = x.unflatten(1, (n_blocks, size))
    step = torch.arange(size, device=x.device)
    distance = step[:, None] - step
    powers = decay[:, None, None] ** (distance + offset).clamp_min(0)
    hidden = (distance < 0) | ((powers > 0) & (powers < NOTHING))
    weights = powers.masked_fill(hidden, 0.0)[None, None]
    sources = targets = ends = None
    if source is not None and target is not None:
        sources, targets = (
            torch.nn.functional.pad(runs, (0, pad), mode="replicate").unflatten(1, (n_blocks, size))
            for runs in (source, target)
        )
        weights = weights * (targets[..., :, None] == sources[..., None, :])[:, :, None]
        ends = targets[..., -1]
    if n_blocks > 1:
        # What each block leaves at its end is summed from block to block, and goes into the next one's first row.
        left = (decay[:, None] ** step.flip(0))[None, None]
        if sources is not None and ends is not None:
            left = left * (sources == ends[..., None])[:, :, None]
        sums = _decayed(torch.einsum("bnhi,bnihd->bnhd", left, blocks), decay**BLOCK, ends, ends, 0)
        carried = decay[:, None] * sums[:, :-1]
        if sources is not None and ends is not None:
            carried = carried * (sources[:, 1:, 0] == ends[:, :-1])[..., None, None]
        first = blocks[:, :, :1] + torch.nn.functional.pad(carried, (0, 0, 0, 0, 1, 0))[:, :, None]
        blocks = torch.cat((first, blocks[:, :, 1:]), dim=2)
    return torch.einsum("bnhti,bnihd->bnthd", weights, blocks).flatten(1, 2)[:, :n_pos]


Eta = float | int | Float[Tensor, "*layer head"]
"""η of momentum attention: one for all heads, one by head, or one by layer and head."""


def eta_by_layer_and_head(
    eta: Eta, n_layers: int, n_heads: int, layers: Sequence[int] | None = None
) -> Float[Tensor, "layer head"]:
    """η of momentum attention by layer and head, 0 at layers not chosen.

    Raises:
        ValueError: η is out of range, or of another shape; or there is no such layer.
    """
    try:
        given = torch.as_tensor(eta, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected η as a number or a tensor, got {eta!r}") from error
    if given.shape not in ((), (n_heads,), (n_layers, n_heads)):
        raise ValueError(
            f"expected η as a number, [head] = [{n_heads}] or [layer head] = [{n_layers}, {n_heads}], got a tensor of "
            f"shape {list(given.shape)}"
        )
    check_eta(given)
    chosen = range(n_layers) if layers is None else layers
    if isinstance(chosen, int):
        raise ValueError(f"expected a sequence of layers, got {chosen}: say layers=[{chosen}]")
    if not set(chosen) <= set(range(n_layers)):
        raise ValueError(f"expected layers from 0 to {n_layers - 1}, got {list(chosen)}")
    found = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    found[list(chosen)] = given.expand(n_layers, n_heads)[list(chosen)]
    return found


def describe_eta(eta: Float[Tensor, "layer head"]) -> str:
    """η in a few words: its size, or the sizes it lies between, and at which layers, unless at all."""
    there = eta.any(1)
    if not there.any():
        return "η=0"
    low, high = (f"{bound:.3g}" for bound in eta[there].aminmax())
    layers = there.nonzero().flatten().tolist()
    # Of layers that follow each other, layer and rank differ by the same.
    runs = [list(run) for _, run in itertools.groupby(enumerate(layers), key=lambda found: found[1] - found[0])]
    at = ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
    size = low if low == high else f"{low} to {high}"
    return f"η={size}" if there.all() else f"η={size} in {'layer' if len(layers) == 1 else 'layers'} {at}"
