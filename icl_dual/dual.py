"""The duality between attention and gradient descent, on plain tensors.

1. A linear layer trained by gradient descent is the untrained layer plus linear attention over what it was trained on
   (equations 7–9 of Dai et al., 2023): (W_0 + Σ_i e_i ⊗ x_i) x = W_0 x + Σ_i e_i (x_iᵀ x).
2. Attention whose softmax and scale are dropped is therefore a linear layer: F̃(q) = (W_ZSL + ΔW_ICL) q, with
   ΔW_ICL = Σ_i v_i ⊗ k_i over the demonstrations (11–12), and finetuning's ΔW_FT beside it (13).
3. Softmax attention itself splits exactly by groups of keys. For one query row with scores s_j,

       z_G = Σ_{j∈G} softmax_G(s)_j v_j        attention restricted to the group G
       lse_G = log Σ_{j∈G} exp(s_j)            the group's weight, up to a common factor

   and attention over two groups is z = z_0 + w (z_demo − z_0), with w = σ(lse_demo − lse_0) the share that the second
   group takes. With the demonstrations as that group, ΔICL = w (z_demo − z_0) is what in-context learning adds to the
   zero-shot attention z_0: equation 11 without its relaxation.
4. Two updates are compared by their singular value decompositions, against one with random directions.

Keys and values keep their own number of heads (`kv_head`); query heads share them group by group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FUSED = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
"""Whether this torch has the kernel that gives up its log-sum-exp; without it, attention is written out."""

# 1. Linear layers under gradient descent


def linear_attention(
    q: Float[Tensor, "*batch pos d_k"], k: Float[Tensor, "*batch key d_k"], v: Float[Tensor, "*batch key d_v"]
) -> Float[Tensor, "*batch pos d_v"]:
    """Return LinearAttn(V, K, q) = Σ_i v_i (k_iᵀ q): attention without softmax and without scale.

    >>> import torch
    >>> q, k, v = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 4)
    >>> torch.allclose(linear_attention(q, k, v), q @ outer_sum(k, v).T, atol=1e-5)
    True
    """
    return (q @ k.mT) @ v


def outer_sum(
    k: Float[Tensor, "*batch key d_k"], v: Float[Tensor, "*batch key d_v"]
) -> Float[Tensor, "*batch d_v d_k"]:
    """Return ΔW = Σ_i v_i ⊗ k_i, the matrix whose action on q is `linear_attention(q, k, v)` (equations 7–9, 12)."""
    return v.mT @ k


class Sgd(NamedTuple):
    """A linear layer after stochastic gradient descent, and the error signals that moved it."""

    W: Float[Tensor, "d_out d_in"]
    errors: Float[Tensor, "step d_out"]
    """e_i = −lr ∂L/∂(output_i), so that W = W_0 + Σ_i e_i ⊗ x_i."""


def sgd(
    W_0: Float[Tensor, "d_out d_in"],
    inputs: Float[Tensor, "step d_in"],
    gradient: Callable[[Float[Tensor, " d_out"], int], Float[Tensor, " d_out"]],
    lr: float,
    momentum: float = 0.0,
) -> Sgd:
    """Train the linear layer x ↦ W x by SGD, one input a step: what attention over its error signals is dual to.

    Args:
        W_0: the untrained weights.
        inputs: x_i, in the order of the steps.
        gradient: ∂L/∂(output) at a step, from the layer's output W x_i and the step's index.
        lr: the learning rate.
        momentum: η, by which each step repeats the one before.

    Returns:
        The trained weights, and error signals with W x = W_0 x + linear_attention(x, inputs, errors) for every x
        (equations 7–9); with momentum, `momentum_linear_attention` in its place.
    """
    W, errors = W_0, torch.zeros(len(inputs), len(W_0), dtype=W_0.dtype, device=W_0.device)
    velocity = torch.zeros_like(W_0)
    for step, x in enumerate(inputs):
        errors[step] = -lr * gradient(W @ x, step)
        velocity = momentum * velocity + torch.outer(errors[step], x)
        W = W + velocity
    return Sgd(W, errors)


def sgd_targets(
    W_0: Float[Tensor, "d_out d_in"], k: Float[Tensor, "step d_in"], v: Float[Tensor, "step d_out"], lr: float
) -> Float[Tensor, "step d_out"]:
    """The other direction of equations 7–9: targets y_i for which SGD is linear attention over given values and keys.

    SGD from W_0 on inputs k_i with the loss ½‖W k_i − y_i‖² has the values v_i as its error signals, whatever they are:
    y_i = W_{i−1} k_i + v_i / lr.
    """
    moved_by_then = torch.tril(k @ k.mT, -1) @ v
    return k @ W_0.mT + moved_by_then + v / lr


class LinearSelfAttention(NamedTuple):
    """A linear self-attention layer: every token e becomes e + P Σ_i W_V e_i (W_K e_i)ᵀ W_Q e."""

    W_Q: Float[Tensor, "d_token d_token"]
    W_K: Float[Tensor, "d_token d_token"]
    W_V: Float[Tensor, "d_token d_token"]
    P: Float[Tensor, "d_token d_token"]

    def __call__(
        self, context: Float[Tensor, "token d_token"], queries: Float[Tensor, "query d_token"]
    ) -> Float[Tensor, "query d_token"]:
        """The queries after the layer, having attended to the context tokens."""
        attended = linear_attention(queries @ self.W_Q.mT, context @ self.W_K.mT, context @ self.W_V.mT)
        return queries + attended @ self.P.mT


def gradient_descent_layer(W_0: Float[Tensor, "d_y d_x"], lr: float, n_tokens: int) -> LinearSelfAttention:
    """von Oswald et al. (2023): the linear self-attention layer that is one step of gradient descent.

    Tokens are (x, y). For the loss 1/(2N) Σ_i ‖W x_i − y_i‖² over N context tokens, the layer turns every (x, y) into
    (x, y − ΔW x) with ΔW = −lr ∂L/∂W at W_0: a query token (x, −W_0 x) comes out as (x, −(W_0 + ΔW) x).
    """
    d_y, d_x = W_0.shape
    reads_x, writes_y, errors = (W_0.new_zeros(d_x + d_y, d_x + d_y) for _ in range(3))
    reads_x.diagonal()[:d_x] = 1.0
    writes_y.diagonal()[d_x:] = lr / max(n_tokens, 1)  # without tokens there is nothing to step along
    errors[d_x:, :d_x] = W_0
    errors.diagonal()[d_x:] = -1.0
    return LinearSelfAttention(W_Q=reads_x, W_K=reads_x, W_V=errors, P=writes_y)


# 2. Attention as a linear layer


def head_weights(
    k: Float[Tensor, "*batch key kv_head d_head"], v: Float[Tensor, "*batch key kv_head d_head"]
) -> Float[Tensor, "*batch kv_head d_head d_head"]:
    """Σ_j v_j ⊗ k_j per head: over the demonstrations ΔW_ICL, over the query's own prompt W_ZSL (equations 11–12)."""
    return outer_sum(k.transpose(-3, -2), v.transpose(-3, -2))


def delta_w_ft(
    k: Float[Tensor, "*batch key kv_head d_head"],
    v: Float[Tensor, "*batch key kv_head d_head"],
    tuned_k: Float[Tensor, "*batch key kv_head d_head"],
    tuned_v: Float[Tensor, "*batch key kv_head d_head"],
) -> Float[Tensor, "*batch kv_head d_head d_head"]:
    """ΔW_FT = (W_V + ΔW_V) X Xᵀ (W_K + ΔW_K)ᵀ − W_V X Xᵀ W_Kᵀ per head (equation 13), from keys and values of X."""
    return head_weights(tuned_k, tuned_v) - head_weights(k, v)


def act(
    W: Float[Tensor, "*batch kv_head d_head d_head"], q: Float[Tensor, "*batch head d_head"]
) -> Float[Tensor, "*batch head d_head"]:
    """W q for every query head, each with the matrix of its key-value head."""
    heads = q.unflatten(-2, (W.shape[-3], -1))
    return torch.einsum("...kij,...kgj->...kgi", W, heads).flatten(-3, -2)


def act_unformed(
    q: Float[Tensor, "*batch head d_head"],
    k: Float[Tensor, "*batch key kv_head d_head"],
    v: Float[Tensor, "*batch key kv_head d_head"],
) -> Float[Tensor, "*batch head d_head"]:
    """(Σ_j v_j ⊗ k_j) q for every query head without forming the matrix: linear attention over the keys."""
    heads = q.unflatten(-2, (k.shape[-2], -1))
    return linear_attention(heads, k.transpose(-3, -2), v.transpose(-3, -2)).flatten(-3, -2)


# 3. Softmax attention, split


class AttentionPart(NamedTuple):
    """Attention restricted to one group of keys: its output, and the log-sum-exp of its scores."""

    z: Float[Tensor, "*batch head d_head"]
    lse: Float[Tensor, "*batch head"]


def scores(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "batch kv_head group_pos key"]:
    """Scaled scores qᵀk before mask, position bias and softmax, capped where the model caps them.

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


def shared_scores(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "key kv_head d_head"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "head row key"]:
    """`scores` of rows that share one set of keys, as queries do their demonstrations."""
    return scores(q[None], k[None], scale, softcap).view(q.shape[1], len(q), len(k))


def summed_scores(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "key kv_head d_head"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "row key"]:
    """`shared_scores` summed over heads: one product with all keys side by side, as long as nothing caps a score."""
    if softcap is not None:
        return shared_scores(q, k, scale, softcap).sum(0)
    dtype = torch.promote_types(q.dtype, torch.float32)
    of_kv_head = q.to(dtype).unflatten(1, (k.shape[1], -1)).sum(2) * scale
    return of_kv_head.flatten(1) @ k.to(dtype).flatten(1).T


def attend(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    scale: float,
    softcap: float | None = None,
    bias: Float[Tensor, "#batch #head #pos key"] | None = None,
    causal: bool = False,
) -> AttentionPart:
    """Attention of every row over one group of keys.

    `bias` is added to the scores: position biases, and −∞ for a key that a row does not see. `causal` says that the
    rows are the keys' own tokens, in order, and see none after themselves. A row that sees no key of the group has
    output 0 and log-sum-exp −∞, so that it takes no share in a merge.
    """
    batch, n_pos, n_heads, d_head = q.shape
    n_keys, n_kv_heads = k.shape[1:3]
    group = n_heads // n_kv_heads
    if n_keys == 0:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return AttentionPart(torch.zeros_like(q, dtype=dtype), torch.full_like(q[..., 0], -torch.inf, dtype=dtype))
    if softcap is None and bias is None and q.device.type == "cpu" and q.numel() and FUSED:
        return _attend_fused(q, k, v, scale, causal)
    weights = scores(q, k, scale, softcap)
    by_head = weights.view(batch, n_kv_heads, group, n_pos, n_keys)
    if bias is not None:
        by_head.add_(bias.unflatten(1, (n_kv_heads, group)) if bias.shape[1] > 1 else bias.unsqueeze(1))
    if causal:
        by_head.masked_fill_(torch.ones(n_pos, n_keys, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    top = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).min)  # finite where all is hidden
    weights = weights.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    values = v.to(weights.dtype).permute(0, 2, 1, 3).reshape(batch * n_kv_heads, n_keys, d_head)
    z = torch.bmm(weights.view(batch * n_kv_heads, group * n_pos, n_keys), values)
    z = z.view(batch, n_kv_heads, group * n_pos, d_head) / total.clamp_min(torch.finfo(total.dtype).tiny)
    lse = (top + total.log()).squeeze(-1)
    return AttentionPart(
        z.view(batch, n_kv_heads, group, n_pos, d_head).permute(0, 3, 1, 2, 4).reshape(q.shape),
        lse.view(batch, n_kv_heads, group, n_pos).permute(0, 3, 1, 2).reshape(batch, n_pos, n_heads),
    )


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> AttentionPart:
    """`attend` in torch's own fused kernel, which gives up its log-sum-exp."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    # The kernel takes it that a head's dimensions lie side by side.
    own = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    heads_first = (tensor.to(dtype).transpose(1, 2) for tensor in own)
    z, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, causal, scale=scale)
    return AttentionPart(z.transpose(1, 2), lse.transpose(1, 2))


def add_sink(part: AttentionPart, sink: Float[Tensor, " head"]) -> AttentionPart:
    """A group with a sink in it: a learned score per head that takes a share of the softmax and has no value."""
    lse = torch.logaddexp(part.lse, sink.to(part.lse))
    return AttentionPart(part.z * (part.lse - lse).exp().unsqueeze(-1), lse)


def share(part: AttentionPart, rest: AttentionPart) -> Float[Tensor, "*batch head"]:
    """The share w = σ(lse − lse_rest) of the softmax that a group takes from the rest; 0 where neither has a key."""
    return torch.sigmoid((part.lse - rest.lse).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))


def delta_icl(zero_shot: AttentionPart, demonstrations: AttentionPart) -> Float[Tensor, "*batch head d_head"]:
    """What the demonstrations add to zero-shot attention: ΔICL = w (z_demo − z_0), w = σ(lse_demo − lse_0).

    Zero-shot attention plus ΔICL is softmax attention over both groups, exactly.
    """
    return share(demonstrations, zero_shot).unsqueeze(-1) * (demonstrations.z - zero_shot.z)


def merge(a: AttentionPart, b: AttentionPart) -> AttentionPart:
    """Softmax attention over the keys of two groups, from the attention over each."""
    return AttentionPart(a.z + delta_icl(a, b), torch.logaddexp(a.lse, b.lse))


class AttentionRule(NamedTuple):
    """How a layer turns qᵀk into attention weights."""

    scale: float
    softcap: float | None
    window: int | None
    """How many positions back a query sees, itself included; all where None."""
    slopes: Float[Tensor, " head"] | None = None
    """ALiBi: what each position of distance adds to a score; nothing where None."""
    sink: Float[Tensor, " head"] | None = None
    """The learned score that takes a share of each row's softmax and has no value; none where None."""

    def attend(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_head"],
        rows: Int[Tensor, "#batch pos"],
        keys: Int[Tensor, "#batch key"],
    ) -> AttentionPart:
        """Attention over one group of keys, of rows and keys that stand at these positions; the sink is left out."""
        bias, causal = None, False
        if self.slopes is not None or self._hides(rows, keys):
            bias = self.bias(rows, keys)
        elif k.shape[1] and bool(keys.max() > rows.min()):
            # Tokens in order among themselves need no mask to be made.
            causal = torch.equal(rows, keys) and bool((rows.diff() > 0).all())
            bias = None if causal else self.bias(rows, keys)
        if bias is not None:
            bias = bias.to(q.device, torch.promote_types(q.dtype, torch.float32))
        return attend(q, k, v, self.scale, self.softcap, bias, causal)

    def _hides(self, rows: Int[Tensor, "#batch pos"], keys: Int[Tensor, "#batch key"]) -> bool:
        """Whether the window keeps a row from a key; without keys there is nothing to hide."""
        return self.window is not None and bool(keys.numel()) and int(rows.max() - keys.min()) >= self.window

    def bias(self, rows: Int[Tensor, "#batch pos"], keys: Int[Tensor, "#batch key"]) -> Float[Tensor, "_ _ pos key"]:
        """What positions add to the scores, by batch and head where these differ: ALiBi, and −∞ for hidden keys."""
        hidden = ~self.visible(rows, keys).unsqueeze(1)
        distance = (rows[..., None] - keys[:, None]).unsqueeze(1)
        bias = torch.zeros(()) if self.slopes is None else -self.slopes.to(rows.device)[:, None, None] * distance
        return torch.where(hidden, -torch.inf, bias.to(rows.device))

    def visible(self, rows: Int[Tensor, "#batch pos"], keys: Int[Tensor, "#batch key"]) -> Bool[Tensor, "_ pos key"]:
        """Which keys each row sees: none after itself, and none further back than the window."""
        distance = rows[..., None] - keys[:, None]
        return distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)

    def with_sink(self, part: AttentionPart) -> AttentionPart:
        """A group of keys together with the layer's sink, if it has one."""
        return part if self.sink is None else add_sink(part, self.sink)


# 4. Two updates compared


def cosine(a: Float[Tensor, "*#batch d"], b: Float[Tensor, "*#batch d"]) -> Float[Tensor, "..."]:
    """Cosine over the last axis; NaN where a vector is zero."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


class Svd(NamedTuple):
    """A matrix as U diag(S) Vᵀ, singular values in falling order."""

    U: Float[Tensor, "*batch d d"]
    S: Float[Tensor, "*batch d"]
    Vh: Float[Tensor, "*batch d d"]

    @classmethod
    def of(cls, W: Float[Tensor, "*batch d d"]) -> "Svd":
        """Decompose a matrix, in float64: angles between close directions are lost in less."""
        return cls(*torch.linalg.svd(W.double()))

    def with_random_directions(self, generator: torch.Generator) -> "Svd":
        """The same singular values between singular vectors drawn uniformly (Haar): what chance looks like."""
        U, V = (torch.linalg.qr(_normal(self.U, generator)) for _ in range(2))
        # Without its signs fixed, QR draws Q from a distribution that is not uniform.
        return Svd(_signed(*U), self.S, _signed(*V).mT)

    def act(self, q: Float[Tensor, "*#batch group d"]) -> Float[Tensor, "*#batch group d"]:
        """The matrix applied to vectors."""
        return ((q @ self.Vh.mT) * self.S.unsqueeze(-2)) @ self.U.mT


class Overlap(NamedTuple):
    """How alike two updates are as matrices."""

    cosine: Float[Tensor, "*batch"]
    """Frobenius cosine ⟨A, B⟩ / (‖A‖ ‖B‖); for random directions it has mean 0 and standard deviation 1/d."""
    left_angles: Float[Tensor, "*batch rank"]
    """Principal angles between the leading left singular subspaces (what they write), in degrees, smallest first.

    NaN past the rank of either matrix."""
    right_angles: Float[Tensor, "*batch rank"]
    """The same between the leading right singular subspaces (what they read)."""


def overlap(a: Svd, b: Svd, rank: int) -> Overlap:
    """Compare two matrices: Frobenius cosine, and principal angles between their `rank` leading singular subspaces.

    NaN where a matrix is zero, or has not so many directions: singular values that are float32's rounding of the
    largest have none. Batch axes broadcast.
    """
    left, right = a.U.mT @ b.U, a.Vh @ b.Vh.mT
    inner = (a.S.unsqueeze(-1) * b.S.unsqueeze(-2) * left * right).sum((-2, -1))
    norms = a.S.norm(dim=-1) * b.S.norm(dim=-1)
    cosine = torch.where(norms > 0, inner / norms, torch.nan)
    of_a, of_b = (_directions(svd.S)[..., :rank] for svd in (a, b))
    real = of_a.unsqueeze(-1) & of_b.unsqueeze(-2)
    n_angles = torch.minimum(of_a.sum(-1), of_b.sum(-1)).unsqueeze(-1)
    known = torch.arange(rank, device=inner.device) < n_angles
    # Directions that are not there have cosine 0 to all others, and so come last.
    angles = (_angles(cosines[..., :rank, :rank] * real) for cosines in (left, right))
    return Overlap(cosine, *(torch.where(known, found, torch.nan) for found in angles))


def effective_rank(S: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """exp of the entropy of the normalised singular values (Roy & Vetterli, 2007); NaN for a zero matrix."""
    p = S / S.sum(-1, keepdim=True)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))


def _directions(S: Float[Tensor, "*batch d"]) -> Bool[Tensor, "*batch d"]:
    """Which singular values are more than rounding of the largest."""
    return S.shape[-1] * torch.finfo(torch.float32).eps * S[..., :1] < S


def _angles(cosines: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch rank"]:
    return torch.rad2deg(torch.arccos(torch.linalg.svdvals(cosines).clamp(max=1.0)))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _signed(Q: Tensor, R: Tensor) -> Tensor:
    return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
