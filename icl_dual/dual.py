"""The mathematics of attention in two parts, on plain tensors.

Softmax attention over a set of keys splits exactly by groups of keys. For one query row with scores s_j,

    z_G = Σ_{j∈G} softmax_G(s)_j v_j        attention restricted to the group G
    lse_G = log Σ_{j∈G} exp(s_j)            the group's weight, up to a common factor

and attention over two groups is z = z_0 + w (z_demo − z_0), with w = σ(lse_demo − lse_0) the share that the second
group takes. With the demonstrations as that group, ΔICL = w (z_demo − z_0) is what in-context learning adds to the
zero-shot attention z_0: equation 11 of Dai et al. (2023) without its relaxation.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Part(NamedTuple):
    """Attention restricted to one group of keys: its output, and the log-sum-exp of its scores."""

    z: Float[Tensor, "batch pos head d_head"]
    lse: Float[Tensor, "batch pos head"]


def scores(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "batch kv_head group_pos key"]:
    """Scaled scores qᵀk before mask and softmax, capped where the model caps them.

    The heads that share a key-value head are stacked along the rows (`group_pos`, group-major), so that grouped-query
    attention is one matrix product and no key is repeated. Half-precision input is scored in float32.
    """
    batch, n_pos, n_heads, d_head = q.shape
    n_keys, n_kv_heads = k.shape[1:3]
    group = n_heads // n_kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = (q.to(dtype) * scale).view(batch, n_pos, n_kv_heads, group, d_head).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * n_kv_heads, group * n_pos, d_head)
    columns = k.to(dtype).permute(0, 2, 3, 1).reshape(batch * n_kv_heads, d_head, n_keys)
    product = torch.bmm(rows, columns).view(batch, n_kv_heads, group * n_pos, n_keys)
    return product if softcap is None else softcap * torch.tanh(product / softcap)


def attend(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    scale: float,
    softcap: float | None = None,
    visible: Bool[Tensor, "#pos key"] | None = None,
) -> Part:
    """Attention of every row over one group of keys.

    A row that sees no key of the group has output 0 and log-sum-exp −∞, so that it takes no share in a merge.
    """
    batch, n_pos, n_heads, d_head = q.shape
    n_keys, n_kv_heads = k.shape[1:3]
    group = n_heads // n_kv_heads
    weights = scores(q, k, scale, softcap)
    if visible is not None:
        hidden = ~visible.expand(n_pos, n_keys).repeat(group, 1)
        weights = weights.masked_fill_(hidden, -torch.inf)
    top = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).min)  # finite where all is hidden
    weights = weights.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    values = v.to(weights.dtype).permute(0, 2, 1, 3).reshape(batch * n_kv_heads, n_keys, d_head)
    z = torch.bmm(weights.view(batch * n_kv_heads, group * n_pos, n_keys), values)
    z = z.view(batch, n_kv_heads, group * n_pos, d_head) / total.clamp_min(torch.finfo(total.dtype).tiny)
    lse = (top + total.log()).squeeze(-1)
    return Part(
        z.view(batch, n_kv_heads, group, n_pos, d_head).permute(0, 3, 1, 2, 4).reshape(q.shape),
        lse.view(batch, n_kv_heads, group, n_pos).permute(0, 3, 1, 2).reshape(batch, n_pos, n_heads),
    )


def delta_icl(zero_shot: Part, demonstrations: Part) -> Float[Tensor, "batch pos head d_head"]:
    """What the demonstrations add to zero-shot attention: ΔICL = w (z_demo − z_0), w = σ(lse_demo − lse_0).

    Zero-shot attention plus ΔICL is softmax attention over both groups, exactly.
    """
    share = torch.sigmoid(demonstrations.lse - zero_shot.lse).unsqueeze(-1)
    return share * (demonstrations.z - zero_shot.z)
