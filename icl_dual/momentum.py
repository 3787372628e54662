"""Momentum attention: the decaying sum of past values, and its coefficient η.

Gradient descent with momentum steps along a decaying sum of past gradients. By analogy, momentum attention adds a
decaying sum of past values to every head (Dai et al., 2023, §5):

    MoAttn(V, K, q_t) = Attn(V, K, q_t) + Σ_{i<t} η^{t−i} v_i,    0 ≤ η < 1.

`decaying_sum` computes the sum in time linear in the number of positions, `decaying_sum_reference` by its definition.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.torch_utils import to_list

BLOCK = 32
"""Positions in one decay matrix. Larger blocks take more arithmetic, smaller ones more steps."""
NEGLIGIBLE = 1e-30
"""Decays below this count as 0: they do not change a sum, and arithmetic on subnormal numbers is slow."""


class Momentum(NamedTuple):
    """What momentum adds to attention's output, and the state that later positions need."""

    z: Float[Tensor, "batch pos head d_head"]
    """Σ_{i<t} η^{t−i} v_i at every position t, over preceding positions only."""
    state: Float[Tensor, "batch head d_head"]
    """Σ_i η^{n−1−i} v_i over all n positions: what later positions need to know of them."""


def decaying_sum(
    v: Float[Tensor, "batch pos kv_head d_head"],
    eta: Float[Tensor, " head"],
    *,
    state: Float[Tensor, "batch head d_head"] | None = None,
    documents: Int[Tensor, "batch pos"] | None = None,
) -> Momentum:
    """Compute the decaying sum of past values, Σ_{i<t} η^{t−i} v_i, in time linear in the number of positions.

    Positions are processed in blocks. Within a block, the sum is a product with a matrix of decays. The states that
    blocks leave are summed in the same way, with decay η^block.

    Args:
        v: values, in the order of their positions. Consecutive query heads share a key-value head.
        eta: η of each query head, at least 0 and below 1. With η = 0 the sum is 0.
        state: the `Momentum.state` that preceding values left; no preceding values by default.
        documents: the index of each position's document, negative for padding. The sum restarts where the index
            changes. A `state` belongs to the first document.

    Returns:
        The sums by query head, and the state after the last position.

    Raises:
        ValueError: η is out of range, or shapes do not fit.

    Example:
        >>> import torch
        >>> from icl_dual.momentum import decaying_sum
        >>> v = torch.ones(1, 4, 1, 1)
        >>> decaying_sum(v, torch.tensor([0.5])).z.flatten().tolist()
        [0.0, 0.5, 0.75, 0.875]
    """
    _check_shapes(v, eta, state, documents)
    check_eta(eta)
    with torch.autocast(v.device.type, enabled=False):  # autocast would sum in half precision
        return _decaying_sum(*_as_heads(v, eta), state, documents)


def _decaying_sum(
    values: Float[Tensor, "batch pos head d_head"],
    decay: Float[Tensor, " head"],
    state: Float[Tensor, "batch head d_head"] | None,
    documents: Int[Tensor, "batch pos"] | None,
) -> Momentum:
    if not values.shape[1]:
        return Momentum(values, values.sum(1) if state is None else state)
    initial = values.new_zeros(len(values), *values.shape[2:]) if state is None else state.to(values)
    runs = preceding_runs = None
    if documents is not None:
        values = values.masked_fill((documents < 0)[..., None, None], 0.0)
        runs = torch.nn.functional.pad((documents.diff(dim=1) != 0).cumsum(1), (1, 0))
        preceding_runs = torch.cat((runs[:, :1], runs[:, :-1]), dim=1)
    z = _decayed(torch.cat((initial[:, None], values[:, :-1]), dim=1), decay, preceding_runs, runs, 1)
    return Momentum(z, values[:, -1] + z[:, -1])


def decaying_sum_reference(
    v: Float[Tensor, "batch pos kv_head d_head"],
    eta: Float[Tensor, " head"],
    documents: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Compute the sums of `decaying_sum` with one triangular matrix of decays, in time quadratic in the positions."""
    check_eta(eta)
    values, decay = _as_heads(v, eta)
    position = torch.arange(v.shape[1], device=v.device)
    summed = (position[:, None] > position).expand(len(v), -1, -1)
    if documents is not None:
        summed = torch.zeros_like(summed)
        for batch, row in enumerate(to_list(documents)):
            for t, document in enumerate(row):
                first = next((i + 1 for i in range(t - 1, -1, -1) if row[i] != document), 0)  # of this run of tokens
                summed[batch, t, first:t] = document >= 0
    return torch.einsum("bhti,bihd->bthd", decay_matrix(decay, position, position) * summed[:, None], values)


def decay_matrix(
    eta: Float[Tensor, " head"], positions: Int[Tensor, "*batch pos"], key_positions: Int[Tensor, "*#batch key"]
) -> Float[Tensor, "*batch head pos key"]:
    """Return η^{t−i} for every position t and every key at i < t, and 0 for keys at t or after it."""
    distance = (positions[..., None] - key_positions[..., None, :]).unsqueeze(-3)
    return torch.where(distance > 0, eta[:, None, None] ** distance.clamp_min(1), 0.0)


def momentum_linear_attention(
    q: Float[Tensor, "*batch pos d_k"],
    k: Float[Tensor, "*batch key d_k"],
    v: Float[Tensor, "*batch key d_v"],
    eta: float,
) -> Float[Tensor, "*batch pos d_v"]:
    """Compute linear attention with momentum over its terms: Σ_t (u_t + Σ_{i<t} η^{t−i} u_i), u_i = v_i (k_iᵀ q).

    With the inputs of a linear layer as keys and its error signals as values, this is what SGD with momentum η adds to
    the layer's output.

    Args:
        q: queries.
        k: keys, in the order of the steps.
        v: values, in the order of the steps.
        eta: η, at least 0 and below 1.
    """
    terms = (q @ k.mT).unsqueeze(-1) * v.unsqueeze(-3)
    by_step = terms.flatten(0, -3)  # each query's terms, in the order of the steps
    momentum = decaying_sum(by_step.unsqueeze(2), by_step.new_full((1,), eta)).z.view(terms.shape)
    return (terms + momentum).sum(-2)


def check_eta(eta: Float[Tensor, "*shape"]) -> None:
    """Check that every η is at least 0 and below 1.

    Raises:
        ValueError: some η is out of range; the message gives the first.
    """
    out_of_range = eta[~((eta >= 0) & (eta < 1))]
    if len(out_of_range):
        raise ValueError(f"expected eta from 0 to below 1, got {out_of_range[0].item():g}: the sum would not decay")


def _check_shapes(v: Any, eta: Any, state: Any, documents: Any) -> None:
    if not isinstance(v, Tensor) or v.ndim != 4:
        raise ValueError(f"expected v of shape [batch pos kv_head d_head], got {_shape(v)}")
    if not isinstance(eta, Tensor) or eta.ndim != 1 or not len(eta) or len(eta) % v.shape[2]:
        raise ValueError(
            f"expected eta with one value for each query head, a multiple of the {v.shape[2]} heads of v, got "
            f"{_shape(eta)}: pass a tensor of shape [n_heads]"
        )
    if state is not None and state.shape != (len(v), len(eta), v.shape[3]):
        raise ValueError(f"expected state of shape {[len(v), len(eta), v.shape[3]]}, got {_shape(state)}")
    if documents is not None and (documents.shape != v.shape[:2] or documents.dtype is torch.bool):
        raise ValueError(
            f"expected documents as integers of shape {list(v.shape[:2])}, negative for padding, got "
            f"{_shape(documents)}: pass the index of each position's document"
        )


def _shape(given: Any) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)


def _as_heads(v: Tensor, eta: Tensor) -> tuple[Float[Tensor, "batch pos head d_head"], Float[Tensor, " head"]]:
    """Return values repeated for every query head, and η, in a common dtype of at least float32."""
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
    """Return Σ_{i≤t} decay^{t−i+offset} x_i at every t, over the i with source_i = target_t.

    `source` and `target` are the indices of runs of positions, in ascending order.
    """
    n_pos = x.shape[1]
    n_blocks = -(-n_pos // BLOCK)
    size = n_pos if n_blocks == 1 else BLOCK
    if pad := n_blocks * size - n_pos:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad))
    blocks = torch.unflatten(x, 1, (n_blocks, size))
    step = torch.arange(size, device=x.device)
    distance = step[:, None] - step
    powers = decay[:, None, None] ** (distance + offset).clamp_min(0)
    hidden = (distance < 0) | ((powers > 0) & (powers < NEGLIGIBLE))
    weights = powers.masked_fill(hidden, 0.0)[None, None]
    sources = targets = ends = None
    if source is not None and target is not None:
        sources, targets = (
            torch.unflatten(torch.nn.functional.pad(runs, (0, pad), mode="replicate"), 1, (n_blocks, size))
            for runs in (source, target)
        )
        weights = weights * (targets[..., :, None] == sources[..., None, :])[:, :, None]
        ends = targets[..., -1]
    if n_blocks > 1:
        # The states at the ends of blocks are summed from block to block, and added to the next block's first position.
        to_end = (decay[:, None] ** step.flip(0))[None, None]
        if sources is not None and ends is not None:
            to_end = to_end * (sources == ends[..., None])[:, :, None]
        sums = _decayed(torch.einsum("bnhi,bnihd->bnhd", to_end, blocks), decay**BLOCK, ends, ends, 0)
        carried = decay[:, None] * sums[:, :-1]
        if sources is not None and ends is not None:
            carried = carried * (sources[:, 1:, 0] == ends[:, :-1])[..., None, None]
        first = blocks[:, :, :1] + torch.nn.functional.pad(carried, (0, 0, 0, 0, 1, 0))[:, :, None]
        blocks = torch.cat((first, blocks[:, :, 1:]), dim=2)
    return torch.einsum("bnhti,bnihd->bnthd", weights, blocks).flatten(1, 2)[:, :n_pos]


Eta = float | int | Float[Tensor, "*layer head"]
"""η of momentum attention: a number for all heads, or a tensor `[head]` or `[layer head]`."""


def eta_by_layer_and_head(
    eta: Eta, n_layers: int, n_heads: int, layers: Sequence[int] | None = None
) -> Float[Tensor, "layer head"]:
    """Return η of momentum attention by layer and head, in float64, and 0 at all other layers than `layers`.

    Args:
        eta: η, at least 0 and below 1: a number for all heads, or a tensor `[head]` or `[layer head]`.
        n_layers: the model's number of layers.
        n_heads: the model's number of query heads.
        layers: the layers that have momentum; all by default.

    Raises:
        ValueError: η is out of range or has another shape, or a layer does not exist.
    """
    try:
        values = torch.as_tensor(eta, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected eta as a number or a tensor, got {eta!r}: pass one of these") from error
    if values.shape not in ((), (n_heads,), (n_layers, n_heads)):
        raise ValueError(
            f"expected eta as a number, or of shape [head] = [{n_heads}] or [layer head] = [{n_layers}, {n_heads}], "
            f"got shape {list(values.shape)}: pass one of these shapes"
        )
    check_eta(values)
    with_momentum = range(n_layers) if layers is None else layers
    if isinstance(with_momentum, int):
        raise ValueError(f"expected layers as a sequence, got {with_momentum}: pass layers=[{with_momentum}]")
    if not set(with_momentum) <= set(range(n_layers)):
        raise ValueError(f"expected layers from 0 to {n_layers - 1}, got {list(with_momentum)}: choose among these")
    by_layer_and_head = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    by_layer_and_head[list(with_momentum)] = values.expand(n_layers, n_heads)[list(with_momentum)]
    return by_layer_and_head


def describe_eta(eta: Float[Tensor, "layer head"]) -> str:
    """Return η in a few words: its value or range, and its layers unless all have momentum.

    Example:
        >>> from icl_dual.momentum import describe_eta, eta_by_layer_and_head
        >>> describe_eta(eta_by_layer_and_head(0.1, n_layers=12, n_heads=2, layers=range(4, 12)))
        'η=0.1 in layers 4-11'
    """
    has_momentum = eta.any(1)
    if not has_momentum.any():
        return "η=0"
    low, high = (f"{bound:.3g}" for bound in eta[has_momentum].aminmax())
    value = low if low == high else f"{low} to {high}"
    if has_momentum.all():
        return f"η={value}"
    layers: list[int] = to_list(has_momentum.nonzero().flatten())
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spans = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"η={value} in {'layer' if len(layers) == 1 else 'layers'} {spans}"
