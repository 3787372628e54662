"""The duality between attention and gradient descent, on plain tensors.

1. A linear layer trained by gradient descent is the untrained layer plus linear attention over what it was trained on
    (equations 7–9 of Dai et al., 2023): (W_0 + Σ_i e_i ⊗ x_i) x = W_0 x + Σ_i e_i (x_iᵀ x).
2. Attention without softmax and scale is therefore a linear layer: F̃(q) = (W_ZSL + ΔW_ICL) q, with ΔW_ICL = Σ_i v_i ⊗
    k_i over the demonstrations (11–12). Finetuning adds ΔW_FT instead (13).
3. Softmax attention itself splits exactly by groups of keys. For one query row with scores s_j,

        z_G = Σ_{j∈G} softmax_G(s)_j v_j        attention restricted to the group G
        lse_G = log Σ_{j∈G} exp(s_j)            the group's weight, up to a common factor

    and attention over two groups is z = z_0 + w (z_demo − z_0), where w = σ(lse_demo − lse_0) is the second group's
    share of the softmax. With the demonstrations as that group, ΔICL = w (z_demo − z_0) is what in-context learning
    adds to the zero-shot attention z_0: equation 11 without its relaxation.
4. Two updates are compared by their singular value decompositions, and with an update of random directions.

Keys and values keep their own number of heads (`kv_head`), which groups of query heads share.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icl_dual.arguments import ArgumentError, Count, Finite, Index, Rate, checked
from icl_dual.field_docs import document_fields
from icl_dual.torch_utils import linalg, vector_norm

FUSED = {
    device
    for device, kernel in {
        "cpu": "_scaled_dot_product_flash_attention_for_cpu",
        "cuda": "_scaled_dot_product_efficient_attention",
    }.items()
    if hasattr(torch.ops.aten, kernel)
}
"""The devices on which this torch has a fused kernel that returns its log-sum-exp; on others, attention is computed
step by step."""

# 1. Linear layers under gradient descent


@checked
def linear_attention(
    q: Float[Tensor, "*batch pos d_k"], k: Float[Tensor, "*batch key d_k"], v: Float[Tensor, "*batch key d_v"]
) -> Float[Tensor, "*batch pos d_v"]:
    """Return LinearAttn(V, K, q) = Σ_i v_i (k_iᵀ q): attention without softmax and without scale.

    Args:
        q: queries, one for each output.
        k: keys.
        v: values, one for each key.

    Returns:
        For each query, the sum of all values, each weighted by the dot product of its key with the query.

    >>> import torch
    >>> q, k, v = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 4)
    >>> torch.allclose(linear_attention(q, k, v), q @ outer_sum(k, v).T, atol=1e-5)
    True
    """
    return (q @ k.mT) @ v


@checked
def outer_sum(
    k: Float[Tensor, "*batch key d_k"], v: Float[Tensor, "*batch key d_v"]
) -> Float[Tensor, "*batch d_v d_k"]:
    """Return ΔW = Σ_i v_i ⊗ k_i, so that ΔW q is `linear_attention(q, k, v)` (equations 7–9, 12).

    Args:
        k: keys, or the inputs of a linear layer.
        v: values, or the error signals of the layer's outputs, one for each key.

    Returns:
        The matrix that maps queries of d_k dimensions to outputs of d_v.

    >>> import torch
    >>> k, v = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [5.0]])
    >>> outer_sum(k, v)
    tensor([[ 3., 10.]])
    """
    return v.mT @ k


@checked
@document_fields
class Sgd(NamedTuple):
    """A linear layer after stochastic gradient descent, and the error signals of its steps."""

    W: Float[Tensor, "d_out d_in"]
    """The trained weights."""
    errors: Float[Tensor, "step d_out"]
    """e_i = −lr ∂L/∂(output_i), so that W = W_0 + Σ_i e_i ⊗ x_i."""


@checked
def sgd(
    W_0: Float[Tensor, "d_out d_in"],
    inputs: Float[Tensor, "step d_in"],
    gradient: Callable[[Float[Tensor, " d_out"], int], Float[Tensor, " d_out"]],
    lr: Finite,
    momentum: Finite = 0.0,
) -> Sgd:
    """Train the linear layer x ↦ W x by SGD, one input per step: the dual of linear attention over its error signals.

    Args:
        W_0: the untrained weights.
        inputs: x_i, in the order of the steps.
        gradient: a function of the layer's output W x_i and the step's index that returns ∂L/∂(output).
        lr: the learning rate.
        momentum: η: each step adds η times the step before.

    Returns:
        The trained weights, and error signals such that W x = W_0 x + linear_attention(x, inputs, errors) for every x
        (equations 7–9); with momentum, `icl_dual.momentum.momentum_linear_attention` instead.

    >>> import torch
    >>> W_0, x, y = torch.zeros(1, 2), torch.eye(2), torch.tensor([[1.0], [2.0]])
    >>> W, errors = sgd(W_0, x, lambda output, step: output - y[step], lr=0.5)
    >>> W
    tensor([[0.5000, 1.0000]])
    >>> torch.equal(W, W_0 + outer_sum(x, errors))
    True
    """
    weights, errors = W_0, torch.zeros(len(inputs), len(W_0), dtype=W_0.dtype, device=W_0.device)
    velocity = torch.zeros_like(W_0)
    for step, x in enumerate(inputs):
        errors[step] = -lr * gradient(weights @ x, step)
        velocity = momentum * velocity + torch.outer(errors[step], x)
        weights = weights + velocity
    return Sgd(weights, errors)


@checked
def sgd_targets(
    W_0: Float[Tensor, "d_out d_in"], k: Float[Tensor, "step d_in"], v: Float[Tensor, "step d_out"], lr: Finite
) -> Float[Tensor, "step d_out"]:
    """Return targets y_i for which SGD is linear attention over given values and keys: equations 7–9 read backwards.

    SGD from W_0 on inputs k_i with the loss ½‖W k_i − y_i‖² then has the values v_i as its error signals:
    y_i = W_{i−1} k_i + v_i / lr.

    Args:
        W_0: the untrained weights.
        k: the keys, which are the inputs in the order of the steps.
        v: the values, which the error signals are to equal.
        lr: the learning rate; not 0.

    Returns:
        The target of each step, in the unit of the layer's outputs.

    Raises:
        ValueError: the learning rate is 0.
    """
    if lr == 0:
        raise ArgumentError("expected lr other than 0, got 0: without steps there is no update to have as a target")
    from_earlier_steps = torch.tril(k @ k.mT, -1) @ v
    return k @ W_0.mT + from_earlier_steps + v / lr


@checked
@document_fields
class LinearSelfAttention(NamedTuple):
    """A linear self-attention layer: every token e becomes e + P Σ_i W_V e_i (W_K e_i)ᵀ W_Q e."""

    W_Q: Float[Tensor, "d_token d_token"]
    """The query projection: output dimensions by dimensions of a token."""
    W_K: Float[Tensor, "d_token d_token"]
    """The key projection: output dimensions by dimensions of a token."""
    W_V: Float[Tensor, "d_token d_token"]
    """The value projection: output dimensions by dimensions of a token."""
    P: Float[Tensor, "d_token d_token"]
    """The output projection: dimensions of a token by dimensions of a value."""

    @checked
    def __call__(
        self, context: Float[Tensor, "token d_token"], queries: Float[Tensor, "query d_token"]
    ) -> Float[Tensor, "query d_token"]:
        """Return the query tokens after the layer, in which they attend to the context tokens.

        Args:
            context: the tokens that are attended to.
            queries: the tokens that attend, each to every context token.

        Returns:
            The query tokens, each with the layer's output added.

        Raises:
            ValueError: tokens have another number of dimensions than the layer.
        """
        if context.shape[1] != self.W_Q.shape[1]:
            raise ArgumentError(
                f"expected context and queries with the {self.W_Q.shape[1]} dimensions of the layer's tokens, got "
                f"{context.shape[1]}: pass tokens of the layer's width"
            )
        attended = linear_attention(queries @ self.W_Q.mT, context @ self.W_K.mT, context @ self.W_V.mT)
        return queries + attended @ self.P.mT


@checked
def gradient_descent_layer(W_0: Float[Tensor, "d_y d_x"], lr: Finite, n_tokens: Index) -> LinearSelfAttention:
    """Return the linear self-attention layer that is one step of gradient descent (von Oswald et al., 2023).

    Tokens are (x, y). For the loss 1/(2N) Σ_i ‖W x_i − y_i‖² over N context tokens, the layer maps every (x, y) to
    (x, y − ΔW x) with ΔW = −lr ∂L/∂W at W_0: a query token (x, −W_0 x) becomes (x, −(W_0 + ΔW) x).

    Args:
        W_0: the weights before the step.
        lr: the learning rate.
        n_tokens: N, the number of context tokens.
    """
    d_y, d_x = W_0.shape
    reads_x, writes_y, errors = (W_0.new_zeros(d_x + d_y, d_x + d_y) for _ in range(3))
    reads_x.diagonal()[:d_x] = 1.0
    writes_y.diagonal()[d_x:] = lr / max(n_tokens, 1)  # without tokens the gradient is 0
    errors[d_x:, :d_x] = W_0
    errors.diagonal()[d_x:] = -1.0
    return LinearSelfAttention(W_Q=reads_x, W_K=reads_x, W_V=errors, P=writes_y)


# 2. Attention as a linear layer


@checked
def head_weights(
    k: Float[Tensor, "*batch key kv_head d_head"], v: Float[Tensor, "*batch key kv_head d_head"]
) -> Float[Tensor, "*batch kv_head d_head d_head"]:
    """Return Σ_j v_j ⊗ k_j per head: over the demonstrations ΔW_ICL, over the zero-shot prompt W_ZSL (equations 11–12).

    Args:
        k: keys, by key-value head.
        v: values, by key-value head.

    Returns:
        One matrix for each key-value head: dimensions of a value by dimensions of a key.

    >>> import torch
    >>> k, v = torch.randn(7, 2, 4), torch.randn(7, 2, 4)  # 7 tokens, 2 key-value heads
    >>> head_weights(k, v).shape
    torch.Size([2, 4, 4])
    >>> torch.allclose(head_weights(k, v)[1], outer_sum(k[:, 1], v[:, 1]), atol=1e-5)
    True
    """
    return outer_sum(k.transpose(-3, -2), v.transpose(-3, -2))


@checked
def delta_w_ft(
    k: Float[Tensor, "*batch key kv_head d_head"],
    v: Float[Tensor, "*batch key kv_head d_head"],
    tuned_k: Float[Tensor, "*batch key kv_head d_head"],
    tuned_v: Float[Tensor, "*batch key kv_head d_head"],
) -> Float[Tensor, "*batch kv_head d_head d_head"]:
    """Return ΔW_FT = (W_V + ΔW_V) X Xᵀ (W_K + ΔW_K)ᵀ − W_V X Xᵀ W_Kᵀ per head (equation 13).

    Args:
        k: keys W_K X of the untuned model.
        v: values W_V X of the untuned model.
        tuned_k: keys (W_K + ΔW_K) X of the same inputs X.
        tuned_v: values (W_V + ΔW_V) X of the same inputs X.

    >>> import torch
    >>> k, v = torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    >>> bool((delta_w_ft(k, v, k, v) == 0).all())  # without a change of weights
    True
    """
    return head_weights(tuned_k, tuned_v) - head_weights(k, v)


@checked
def act(
    W: Float[Tensor, "*batch kv_head d_head d_head"], q: Float[Tensor, "*batch head d_head"]
) -> Float[Tensor, "*batch head d_head"]:
    """Return W q for every query head, with the matrix of its key-value head.

    Args:
        W: one matrix for each key-value head.
        q: one query for each query head. Consecutive query heads share a key-value head.

    Returns:
        The output of each query head.

    Raises:
        ValueError: the number of query heads is no multiple of that of key-value heads.

    >>> import torch
    >>> W, q = torch.stack([torch.eye(3), 2 * torch.eye(3)]), torch.ones(4, 3)  # 2 key-value heads, 4 query heads
    >>> act(W, q)[:, 0]
    tensor([1., 1., 2., 2.])
    """
    heads = torch.unflatten(q, -2, (W.shape[-3], _group(q.shape[-2], W.shape[-3])))
    return torch.einsum("...kij,...kgj->...kgi", W, heads).flatten(-3, -2)


@checked
def act_unformed(
    q: Float[Tensor, "*batch head d_head"],
    k: Float[Tensor, "*batch key kv_head d_head"],
    v: Float[Tensor, "*batch key kv_head d_head"],
) -> Float[Tensor, "*batch head d_head"]:
    """Return (Σ_j v_j ⊗ k_j) q for every query head without forming the matrix: linear attention over the keys.

    Args:
        q: one query for each query head. Consecutive query heads share a key-value head.
        k: keys, by key-value head.
        v: values, by key-value head.

    Returns:
        The output of each query head, which is `act(head_weights(k, v), q)` up to rounding.

    Raises:
        ValueError: the number of query heads is no multiple of that of key-value heads.

    >>> import torch
    >>> q, k, v = torch.randn(4, 3), torch.randn(6, 2, 3), torch.randn(6, 2, 3)
    >>> torch.allclose(act_unformed(q, k, v), act(head_weights(k, v), q), atol=1e-5)
    True
    """
    heads = torch.unflatten(q, -2, (k.shape[-2], _group(q.shape[-2], k.shape[-2])))
    return linear_attention(heads, k.transpose(-3, -2), v.transpose(-3, -2)).flatten(-3, -2)


def _group(n_heads: int, n_kv_heads: int) -> int:
    """Return the number of query heads that share a key-value head.

    Raises:
        ValueError: it is no whole number.
    """
    if not n_kv_heads or n_heads % n_kv_heads:
        raise ArgumentError(
            f"expected q with a multiple of the {n_kv_heads} key-value heads, got {n_heads} query heads: pass keys and "
            "values of heads that the same number of query heads share"
        )
    return n_heads // n_kv_heads


# 3. Softmax attention, split


@checked
@document_fields
class AttentionPart(NamedTuple):
    """Attention restricted to one group of keys: its output, and the log-sum-exp of its scores."""

    z: Float[Tensor, "*batch head d_head"]
    """The heads' outputs; 0 where no key is visible."""
    lse: Float[Tensor, "*batch head"]
    """Log-sum-exp of the scores, the group's weight in a softmax over several groups; −∞ where no key is visible."""


@checked
def scores(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    scale: Finite,
    softcap: Rate | None = None,
) -> Float[Tensor, "batch kv_head group_pos key"]:
    """Return scaled scores qᵀk before mask, position bias and softmax, capped where the model caps them.

    The heads that share a key-value head are stacked along the rows (`group_pos`, group-major), so that grouped-query
    attention is one matrix product and no key is repeated. Half-precision input is scored in float32.

    Args:
        q: queries as scored, after norms and rotation.
        k: keys as scored, after norms and rotation.
        scale: the factor of the scores, usually 1/√d_head.
        softcap: the bound c of c·tanh(score / c); none where `None`.

    Raises:
        ValueError: the number of query heads is no multiple of that of key-value heads.
    """
    batch, n_pos, n_heads, d_head = q.shape
    n_keys, n_kv_heads = k.shape[1:3]
    group = _group(n_heads, n_kv_heads)
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = (q.to(dtype) * scale).view(batch, n_pos, n_kv_heads, group, d_head).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * n_kv_heads, group * n_pos, d_head)
    columns = k.to(dtype).permute(0, 2, 3, 1).reshape(batch * n_kv_heads, d_head, n_keys)
    product = torch.bmm(rows, columns).view(batch, n_kv_heads, group * n_pos, n_keys)
    return product if softcap is None else softcap * torch.tanh(product / softcap)


@checked
def shared_scores(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "key kv_head d_head"],
    scale: Finite,
    softcap: Rate | None = None,
) -> Float[Tensor, "head row key"]:
    """Return `scores` of rows that share one set of keys, as queries share their demonstrations.

    Args:
        q: queries as scored, one in each row.
        k: keys as scored, the same for all rows.
        scale: the factor of the scores, usually 1/√d_head.
        softcap: the bound c of c·tanh(score / c); none where `None`.

    Returns:
        The score of each row and key by query head, before mask, position bias and softmax.

    >>> import torch
    >>> q, k = torch.randn(5, 4, 8), torch.randn(9, 2, 8)  # 5 rows of 4 heads, 9 keys of 2 key-value heads
    >>> shared_scores(q, k, scale=8**-0.5).shape
    torch.Size([4, 5, 9])
    """
    return scores(q[None], k[None], scale, softcap).view(q.shape[1], len(q), len(k))


@checked
def summed_scores(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "key kv_head d_head"],
    scale: Finite,
    softcap: Rate | None = None,
) -> Float[Tensor, "row key"]:
    """Return `shared_scores` summed over heads: one product with all keys side by side, where no score is capped.

    Args:
        q: queries as scored, one in each row.
        k: keys as scored, the same for all rows.
        scale: the factor of the scores, usually 1/√d_head.
        softcap: the bound c of c·tanh(score / c), applied to each head before the sum; none where `None`.

    Returns:
        The score of each row and key, summed over query heads.
    """
    if softcap is not None:
        return shared_scores(q, k, scale, softcap).sum(0)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_by_kv_head = torch.unflatten(q.to(dtype), 1, (k.shape[1], _group(q.shape[1], k.shape[1]))).sum(2) * scale
    return q_by_kv_head.flatten(1) @ k.to(dtype).flatten(1).T


@checked
def attend(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    scale: Finite,
    softcap: Rate | None = None,
    bias: Float[Tensor, "#batch #head #pos key"] | None = None,
    causal: bool = False,
) -> AttentionPart:
    """Return softmax attention of every row over one group of keys.

    A row that sees no key of the group has output 0 and log-sum-exp −∞, so that the group has no share in a merge. A
    key of score −∞, as hidden ones have, adds nothing, whatever its value is. A visible score of NaN or +∞ makes the
    row's output NaN; a visible value of ±∞ or NaN goes through to the output. Under `torch.func.vmap`, which allows no
    branch by values, also a hidden NaN or infinity makes the output NaN; the function that is mapped returns
    `tuple(attend(…))` or one of its tensors.

    Args:
        q: queries as scored.
        k: keys as scored.
        v: values.
        scale: the factor of the scores, usually 1/√d_head.
        softcap: the bound c of c·tanh(score / c); none where `None`.
        bias: added to the scores: position biases, and −∞ for a key that a row does not see.
        causal: whether the rows are the tokens of the keys, in order, and see no token after themselves.

    Raises:
        ValueError: the number of query heads is no multiple of that of key-value heads, or causal attention has
            another number of rows than keys.

    >>> import torch
    >>> q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    >>> z, lse = attend(q, k, v, scale=8**-0.5)
    >>> z.shape, lse.shape
    (torch.Size([1, 3, 4, 8]), torch.Size([1, 3, 4]))
    """
    n_pos, n_keys = q.shape[1], k.shape[1]
    _group(q.shape[2], k.shape[2])
    if causal and n_pos != n_keys:
        raise ArgumentError(
            f"expected as many keys as queries where causal=True, got {n_keys} keys and {n_pos} queries: pass those of "
            "the same tokens, or hide keys by bias="
        )
    if n_keys == 0:
        return _no_keys(q)
    if any(map(_is_batched, (q, k, v, bias))):
        return _attend(q, k, v, scale, softcap, bias, causal)
    is_fused = softcap is None and bias is None and _can_fuse(q, k, v)
    if is_fused and _are_scores_finite(q, k, scale):
        part = _attend_fused(q, k, v, scale, causal)
    else:
        part = _attend(q, k, v, scale, softcap, bias, causal)
    # A hidden NaN or infinity may have reached the output as 0·∞.
    is_finite = bool(part.z.detach().sum().isfinite())
    return part if is_finite else _attend_not_finite(q, k, v, scale, softcap, bias, causal)


def _attend_unseen(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    scale: float,
    softcap: float | None,
    bias: Float[Tensor, "#batch #head #pos key"] | None,
    causal: bool,
) -> AttentionPart:
    """Return `attend` without a look at any number: on a GPU the host would wait for it.

    Where a score or value is NaN or infinite, so may be the output where that of `attend` is not. Then use `attend`.
    """
    if not k.shape[1]:
        return _no_keys(q)
    if softcap is None and bias is None and _can_fuse(q, k, v):
        return _attend_fused(q, k, v, scale, causal)
    return _attend(q, k, v, scale, softcap, bias, causal)


def _no_keys(q: Float[Tensor, "batch pos head d_head"]) -> AttentionPart:
    """Return attention over a group without keys."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return AttentionPart(torch.zeros_like(q, dtype=dtype), torch.full_like(q[..., 0], -torch.inf, dtype=dtype))


def _is_batched(tensor: Tensor | None) -> bool:
    """Return whether `torch.func.vmap` runs over a tensor, also below another transform: no branch may read it."""
    core: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    functorch = core._functorch
    while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _can_fuse(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether a fused kernel takes tensors of this device, dtype and width."""
    if q.device.type == "cuda":  # the kernel takes no float64, reads 8 numbers at once, and has no gradient of its sum
        can_take = all(t.dtype.itemsize <= 4 and t.shape[-1] % 8 == 0 and not t.requires_grad for t in (q, k, v))
        return "cuda" in FUSED and can_take
    return q.device.type in FUSED and q.numel() > 0


def _are_scores_finite(q: Tensor, k: Tensor, scale: float) -> bool:
    """Return whether no score can be NaN or infinite: the fused kernel takes a row of such scores for a hidden one."""
    norms = [float(vector_norm(tensor.detach())) for tensor in (q, k)]
    bound = math.prod(norms) * abs(scale)
    return bound < torch.finfo(torch.promote_types(q.dtype, torch.float32)).max


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> AttentionPart:
    """Return `attend` by torch's fused kernel, which also returns the log-sum-exp."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    # The kernel assumes that a head's dimensions are side by side in memory.
    side_by_side = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in side_by_side)
    if q.device.type == "cpu":
        z, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, scale=scale)
    else:
        group = q.shape[1] // k.shape[1]
        k, v = (tensor if group == 1 else tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
        z, lse, *_ = kernel(q, k, v, None, True, 0.0, causal, scale=scale)
        lse = lse[..., : q.shape[2]]  # the kernel pads the rows
    return AttentionPart(z.transpose(1, 2), lse.transpose(1, 2))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, bias: Tensor | None, causal: bool
) -> AttentionPart:
    """Return `attend` step by step."""
    weights = _hidden_scores(q, k, scale, softcap, bias, causal)
    # The largest score cancels out; finite also where all keys are hidden.
    largest = weights.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).min)
    weights = weights.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    z = _weighted(weights, v) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return _by_head(z, (largest + total.log()).squeeze(-1), q.shape)


def _attend_not_finite(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, bias: Tensor | None, causal: bool
) -> AttentionPart:
    """Return `attend` where a score or a value is NaN or infinite, as its definition says for each row and key."""
    scores = _hidden_scores(q, k, scale, softcap, bias, causal)
    if bias is not None:  # a score of NaN or +∞ is NaN after a bias of −∞
        hidden = _by_group(bias, k.shape[2]) == -torch.inf
        scores.view(len(q), k.shape[2], -1, q.shape[1], k.shape[1]).masked_fill_(hidden, -torch.inf)
    is_visible = scores != -torch.inf
    lse = scores.logsumexp(-1)
    weights = torch.where(is_visible, (scores - lse[..., None]).exp(), 0.0)
    z = _weighted(weights, v.nan_to_num(0.0, 0.0, 0.0))
    for value, is_value in ((torch.nan, v.isnan()), (torch.inf, v == torch.inf), (-torch.inf, v == -torch.inf)):
        has_value = _weighted(is_visible.to(z.dtype), is_value.to(z.dtype)) > 0
        z = z + torch.where(has_value, value, 0.0)
    return _by_head(z, lse, q.shape)


def _hidden_scores(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, bias: Tensor | None, causal: bool
) -> Float[Tensor, "batch kv_head group_pos key"]:
    """Return `scores` with their biases, and −∞ for keys that a row does not see."""
    weights = scores(q, k, scale, softcap)
    n_pos = q.shape[1]
    by_group = weights.view(len(q), k.shape[2], -1, n_pos, k.shape[1])
    if bias is not None:
        by_group.add_(_by_group(bias, k.shape[2]))
    if causal:
        by_group.masked_fill_(torch.ones(n_pos, n_pos, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return weights


def _by_group(
    bias: Float[Tensor, "_ head pos key"], n_kv_heads: int
) -> Float[Tensor, "_ kv_head_or_1 group_or_1 pos key"]:
    """Return a bias by key-value head and the query heads that share it; one for all heads stays one."""
    return bias.unsqueeze(1) if bias.shape[1] == 1 else torch.unflatten(bias, 1, (n_kv_heads, -1))


def _weighted(
    weights: Float[Tensor, "batch kv_head group_pos key"], v: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch kv_head group_pos d_head"]:
    """Return the sum of the values that each row gives weights to."""
    values = v.to(weights.dtype).permute(0, 2, 1, 3).flatten(0, 1)
    return torch.unflatten(torch.bmm(weights.flatten(0, 1), values), 0, weights.shape[:2])


def _by_head(z: Tensor, lse: Tensor, shape: torch.Size) -> AttentionPart:
    """Return attention of rows by key-value head, `[batch kv_head group_pos …]`, in the shape of the queries."""
    batch, n_pos, n_heads, d_head = shape
    group = n_heads // z.shape[1]
    return AttentionPart(
        z.view(batch, -1, group, n_pos, d_head).permute(0, 3, 1, 2, 4).reshape(shape),
        lse.view(batch, -1, group, n_pos).permute(0, 3, 1, 2).reshape(shape[:3]),
    )


@checked
def weighted_values(
    weights: Float[Tensor, "head row key"], v: Float[Tensor, "key kv_head d_head"]
) -> Float[Tensor, "row head d_head"]:
    """Return the values that rows share, weighted and summed by each query head.

    Args:
        weights: the weight of each key in each row, by query head.
        v: values, by key-value head.

    >>> import torch
    >>> weights, v = torch.ones(4, 2, 3), torch.ones(3, 2, 5)  # 4 heads, 2 rows, 3 keys of 2 key-value heads
    >>> weighted_values(weights, v).shape
    torch.Size([2, 4, 5])
    """
    summed = torch.unflatten(weights, 0, (v.shape[1], -1)).flatten(1, 2) @ v.transpose(0, 1)
    return summed.view(*weights.shape[:2], -1).transpose(0, 1)


@checked
def add_sink(part: AttentionPart, sink: Float[Tensor, " head"]) -> AttentionPart:
    """Return a group with a sink added to it: a learned score per head that has a share of the softmax and no value.

    Args:
        part: attention over the group.
        sink: the sink's score, by query head.

    Returns:
        The group's attention with the sink among its keys.

    >>> import torch
    >>> part = AttentionPart(torch.ones(1, 2, 3), torch.zeros(1, 2))
    >>> add_sink(part, torch.tensor([0.0, -torch.inf])).z[0, :, 0]  # half of the softmax, and none of it
    tensor([0.5000, 1.0000])
    """
    lse = torch.logaddexp(part.lse, sink.to(part.lse))
    return AttentionPart(part.z * (part.lse - lse).exp().unsqueeze(-1), lse)


@checked
def share(part: AttentionPart, rest: AttentionPart) -> Float[Tensor, "*batch head"]:
    """Return a group's share of the softmax, w = σ(lse − lse_rest); 0 where neither the group nor the rest has a key.

    Args:
        part: attention over the group.
        rest: attention over all other keys.

    Returns:
        The share of each head, from 0 to 1.

    Raises:
        ValueError: the parts are of different heads or rows.

    >>> import torch
    >>> twice, once = (AttentionPart(torch.ones(1, 3), torch.tensor([n]).log()) for n in (2.0, 1.0))
    >>> share(twice, once)
    tensor([0.6667])
    """
    _check_same_rows(part, rest)
    return torch.sigmoid((part.lse - rest.lse).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))


@checked
def delta_icl(zero_shot: AttentionPart, demonstrations: AttentionPart) -> Float[Tensor, "*batch head d_head"]:
    """Return what the demonstrations add to zero-shot attention: ΔICL = w (z_demo − z_0), w = σ(lse_demo − lse_0).

    Zero-shot attention plus ΔICL is softmax attention over both groups, exactly.

    Args:
        zero_shot: attention over the tokens of the zero-shot prompt.
        demonstrations: attention over the tokens of the demonstrations, by the same queries.

    Returns:
        ΔICL of each head, in the unit of the values.

    >>> import torch
    >>> q, k, v = (torch.randn(1, n, 4, 8) for n in (1, 9, 9))
    >>> demonstrations, rest = attend(q, k[:, :6], v[:, :6], 1.0), attend(q, k[:, 6:], v[:, 6:], 1.0)
    >>> torch.allclose(rest.z + delta_icl(rest, demonstrations), attend(q, k, v, 1.0).z, atol=1e-5)
    True
    """
    return share(demonstrations, zero_shot).unsqueeze(-1) * (demonstrations.z - zero_shot.z)


@checked
def merge(a: AttentionPart, b: AttentionPart) -> AttentionPart:
    """Return softmax attention over the keys of two groups, from the attention over each.

    Args:
        a: attention over one group of keys.
        b: attention over the other group, by the same queries; the groups have no key in common.

    Returns:
        The heads' outputs and the log-sum-exp of the scores over both groups.

    >>> import torch
    >>> q, k, v = (torch.randn(1, n, 4, 8) for n in (2, 9, 9))
    >>> merged = merge(attend(q, k[:, :6], v[:, :6], 1.0), attend(q, k[:, 6:], v[:, 6:], 1.0))
    >>> all(torch.allclose(a, b, atol=1e-5) for a, b in zip(merged, attend(q, k, v, 1.0)))
    True
    """
    return AttentionPart(a.z + delta_icl(a, b), torch.logaddexp(a.lse, b.lse))


def _check_same_rows(a: AttentionPart, b: AttentionPart) -> None:
    if a.z.shape != b.z.shape:
        raise ArgumentError(
            f"expected two parts of attention by the same queries, got z of shapes {list(a.z.shape)} and "
            f"{list(b.z.shape)}: pass attention of the same rows and heads over different keys"
        )


@checked
@document_fields
class Mask(NamedTuple):
    """What positions do to the scores of a group of rows over a group of keys: the same for layers of one window."""

    bias: Float[Tensor, "_ _ pos key"] | None
    """What is added to the scores (`AttentionRule.bias`); `None` where nothing is."""
    causal: bool
    """Whether the rows are the tokens of the keys, in order, and see no token after themselves."""


@checked
@document_fields
class AttentionRule(NamedTuple):
    """How a layer turns qᵀk into attention weights."""

    scale: Finite
    """The factor of the scores, usually 1/√d_head."""
    softcap: Rate | None
    """The bound c of c·tanh(score / c); `None` where scores are not capped."""
    window: Count | None
    """How many positions a query sees, from its own backwards; `None` where it sees all."""
    slopes: Float[Tensor, " head"] | None = None
    """ALiBi: what each position of distance subtracts from a score; `None` without ALiBi."""
    sink: Float[Tensor, " head"] | None = None
    """The learned score that has a share of each row's softmax and no value; `None` without a sink."""

    @checked
    def attend(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_head"],
        rows: Int[Tensor, "#batch pos"],
        keys: Int[Tensor, "#batch key"],
        check_finite: bool = True,
    ) -> AttentionPart:
        """Return attention over one group of keys, without the sink.

        Args:
            q: queries as scored.
            k: keys as scored.
            v: values.
            rows: the position of each query.
            keys: the position of each key.
            check_finite: whether to check scores and values for NaN and infinity, as `attend` does: on a GPU the host
                waits for that. With `False` the caller checks the output, and attends again where it is not finite.

        Raises:
            ValueError: the numbers of heads of queries, keys and ALiBi slopes do not fit each other.
        """
        if self.slopes is not None and len(self.slopes) not in (1, q.shape[2]):
            raise ArgumentError(
                f"expected q with as many heads as slopes, {len(self.slopes)}, got {q.shape[2]}: pass one slope for "
                "each query head"
            )
        return self.attend_masked(q, k, v, self.mask(rows, keys, q.device), check_finite=check_finite)

    @checked
    def attend_masked(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_head"],
        mask: Mask,
        check_finite: bool = True,
    ) -> AttentionPart:
        """Return `attend` by a mask that was made before: layers of one window have the same.

        Args:
            q: queries as scored.
            k: keys as scored.
            v: values.
            mask: what `mask` returned for the positions of queries and keys.
            check_finite: as for `attend`.

        Raises:
            ValueError: the mask is of other rows, keys or heads, or lacks the biases of ALiBi.
        """
        expected = (1 if self.slopes is None else len(self.slopes), q.shape[1], k.shape[1])
        given = None if mask.bias is None else tuple(mask.bias.shape[1:])
        if given != expected and not (given is None and self.slopes is None):
            raise ArgumentError(
                f"expected a mask with a bias of heads, rows and keys {expected}, got {given}: pass what this rule's "
                "mask() has returned for these positions"
            )
        bias = None if mask.bias is None else mask.bias.to(torch.promote_types(q.dtype, torch.float32))
        compute = attend if check_finite else _attend_unseen
        return compute(q, k, v, self.scale, self.softcap, bias, mask.causal)

    @checked
    def mask(self, rows: Int[Tensor, "#batch pos"], keys: Int[Tensor, "#batch key"], device: torch.device) -> Mask:
        """Return what positions do to the scores of rows over keys.

        Args:
            rows: the position of each query.
            keys: the position of each key.
            device: the device of queries and keys.
        """
        has_bias = self.slopes is not None or self._hides(rows, keys)
        if not has_bias and bool(keys.numel()) and bool(keys.max() > rows.min()):
            # Tokens that attend to themselves, in order, are causal attention: no mask has to be built.
            if torch.equal(rows, keys) and bool((rows.diff() > 0).all()):
                return Mask(None, causal=True)
            has_bias = True
        return Mask(self.bias(rows.to(device), keys.to(device)) if has_bias else None, causal=False)

    @checked
    def weights(
        self,
        q: Float[Tensor, "row head d_head"],
        k: Float[Tensor, "key kv_head d_head"],
        rows: Int[Tensor, " row"],
        keys: Int[Tensor, " key"],
    ) -> Float[Tensor, "head row key"]:
        """Return each key's share of each row's softmax over all of these keys and the sink.

        Shares sum to 1 over the keys, or with a sink to less: the rest is the sink's. The keys that a row sees must be
        among them, in any order.

        Args:
            q: queries as scored, one in each row.
            k: keys as scored, the same for all rows.
            rows: the position of each query.
            keys: the position of each key.

        Returns:
            The shares by query head, computed in place in one tensor: there are many of them.

        >>> import torch
        >>> rule, keys = AttentionRule(scale=1.0, softcap=None, window=None), torch.arange(4)
        >>> rule.weights(torch.zeros(1, 1, 3), torch.zeros(4, 1, 3), torch.tensor([1]), keys)
        tensor([[[0.5000, 0.5000, 0.0000, 0.0000]]])
        """
        scores = shared_scores(q, k, self.scale, self.softcap)
        if self.slopes is not None or bool(keys.max() > rows.min()) or self._hides(rows[None], keys[None]):
            scores += self.bias(rows[None], keys[None])[0].to(scores)
        largest = scores.amax(-1, keepdim=True)
        if self.sink is not None:
            largest = torch.maximum(largest, self.sink.to(scores)[:, None, None])
        total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
        if self.sink is not None:
            total += (self.sink.to(scores)[:, None, None] - largest).exp()
        return scores.div_(total)

    def _hides(self, rows: Int[Tensor, "#batch pos"], keys: Int[Tensor, "#batch key"]) -> bool:
        """Return whether the window hides a key from a row."""
        return self.window is not None and bool(keys.numel()) and int(rows.max() - keys.min()) >= self.window

    @checked
    def bias(self, rows: Int[Tensor, "#batch pos"], keys: Int[Tensor, "#batch key"]) -> Float[Tensor, "_ _ pos key"]:
        """Return what positions add to the scores, by batch and head where these differ: ALiBi, and −∞ if hidden.

        Args:
            rows: the position of each query.
            keys: the position of each key.
        """
        hidden = ~self.visible(rows, keys).unsqueeze(1)
        distance = (rows[..., None] - keys[:, None]).unsqueeze(1)
        if self.slopes is None:
            return torch.zeros_like(hidden, dtype=torch.get_default_dtype()).masked_fill_(hidden, -torch.inf)
        return torch.where(hidden, -torch.inf, -self.slopes.to(rows.device)[:, None, None] * distance)

    @checked
    def visible(self, rows: Int[Tensor, "#batch pos"], keys: Int[Tensor, "#batch key"]) -> Bool[Tensor, "_ pos key"]:
        """Return which keys each row sees: none after itself, and none before the window.

        Args:
            rows: the position of each query.
            keys: the position of each key.

        Returns:
            Whether each row sees each key.

        >>> import torch
        >>> rule = AttentionRule(scale=1.0, softcap=None, window=2)
        >>> rule.visible(torch.tensor([[3]]), torch.tensor([[1, 2, 3, 4]]))
        tensor([[[False,  True,  True, False]]])
        """
        distance = rows[..., None] - keys[:, None]
        return distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)

    @checked
    def with_sink(self, part: AttentionPart) -> AttentionPart:
        """Return a group of keys with the layer's sink added to it, if the layer has one."""
        return part if self.sink is None else add_sink(part, self.sink)


# 4. Two updates compared


@checked
def cosine(a: Float[Tensor, "*#batch d"], b: Float[Tensor, "*#batch d"]) -> Float[Tensor, "..."]:
    """Return the cosine over the last axis; NaN where a vector is zero.

    Args:
        a: vectors along the last axis; the other axes broadcast.
        b: vectors to compare with, of as many dimensions.

    Returns:
        The cosines, without the last axis.

    >>> import torch
    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
    tensor(0.6000)
    """
    return (a * b).sum(-1) / (vector_norm(a, dim=-1) * vector_norm(b, dim=-1))


@checked
@document_fields
class Svd(NamedTuple):
    """The singular value decomposition U diag(S) Vᵀ of a matrix."""

    U: Float[Tensor, "*batch d d"]
    """Left singular vectors, by column: the directions that the matrix writes."""
    S: Float[Tensor, "*batch d"]
    """Singular values, in falling order."""
    Vh: Float[Tensor, "*batch d d"]
    """Right singular vectors, by row: the directions that the matrix reads."""

    @classmethod
    @checked
    def of(cls, W: Float[Tensor, "*batch d d"]) -> "Svd":
        """Return the decomposition of a matrix, in float64: float32 loses the angles between close directions.

        Raises:
            ValueError: the matrix has NaN or infinities.
        """
        if not W.isfinite().all():
            raise ArgumentError("expected W as finite numbers, got NaN or infinities: such a matrix has no directions")
        return cls(*linalg.svd(W.double()))

    @checked
    def with_random_directions(self, generator: torch.Generator) -> "Svd":
        """Return a matrix with the same singular values and singular vectors drawn uniformly (Haar): the null."""
        U, V = (linalg.qr(_normal(self.U, generator)) for _ in range(2))
        # Unless R's diagonal is made positive, the Q of a random matrix is not uniformly distributed.
        return Svd(_signed(*U), self.S, _signed(*V).mT)

    @checked
    def act(self, q: Float[Tensor, "*#batch group d"]) -> Float[Tensor, "*#batch group d"]:
        """Return the matrix applied to vectors."""
        return ((q @ self.Vh.mT) * self.S.unsqueeze(-2)) @ self.U.mT


@checked
@document_fields
class Overlap(NamedTuple):
    """How similar two updates are as matrices."""

    cosine: Float[Tensor, "*batch"]
    """Frobenius cosine ⟨A, B⟩ / (‖A‖ ‖B‖); for random directions it has mean 0 and standard deviation 1/d."""
    left_angles: Float[Tensor, "*batch rank"]
    """Principal angles between the leading left singular subspaces (what is written), in degrees, smallest first; NaN
    past the rank of either matrix."""
    right_angles: Float[Tensor, "*batch rank"]
    """Principal angles between the leading right singular subspaces (what is read), in degrees, smallest first; NaN
    past the rank of either matrix."""


@checked
def overlap(a: Svd, b: Svd, rank: Count) -> Overlap:
    """Compare two matrices: Frobenius cosine, and principal angles between their leading singular subspaces.

    Args:
        a: one matrix; batch axes broadcast.
        b: the other.
        rank: how many leading singular directions span a subspace.

    Returns:
        NaN where a matrix is zero, or has fewer directions than `rank`: a singular value that is float32's rounding of
        the largest has no direction.

    Raises:
        ValueError: the matrices are of different sizes, or smaller than `rank`.

    >>> import torch
    >>> a, b = Svd.of(torch.diag(torch.tensor([2.0, 1.0, 0.0]))), Svd.of(torch.diag(torch.tensor([0.0, 1.0, 2.0])))
    >>> overlap(a, b, rank=1).left_angles
    tensor([90.], dtype=torch.float64)
    """
    d = a.S.shape[-1]
    if b.S.shape[-1] != d or rank > d:
        raise ArgumentError(
            f"expected matrices of the same size and rank up to it, got sizes {d} and {b.S.shape[-1]} and rank={rank}: "
            "pass two updates of the same head, and a smaller rank"
        )
    inner = (_matrix(a) * _matrix(b)).sum((-2, -1))
    norms = vector_norm(a.S, dim=-1) * vector_norm(b.S, dim=-1)
    cosine = torch.where(norms > 0, inner / norms, torch.nan)
    in_a, in_b = (_has_direction(svd.S)[..., :rank] for svd in (a, b))
    in_both = in_a.unsqueeze(-1) & in_b.unsqueeze(-2)
    n_angles = torch.minimum(in_a.sum(-1), in_b.sum(-1)).unsqueeze(-1)
    is_defined = torch.arange(rank, device=inner.device) < n_angles
    left, right = a.U[..., :rank].mT @ b.U[..., :rank], a.Vh[..., :rank, :] @ b.Vh[..., :rank, :].mT
    # Missing directions get cosine 0 to all others, so that their angles come last.
    angles = (_angles(cosines * in_both) for cosines in (left, right))
    return Overlap(cosine, *(torch.where(is_defined, degrees, torch.nan) for degrees in angles))


@checked
def effective_rank(S: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Return exp of the entropy of the normalised singular values (Roy & Vetterli, 2007); NaN for a zero matrix.

    >>> import torch
    >>> effective_rank(torch.tensor([[3.0, 3.0, 0.0], [1.0, 0.0, 0.0]]))
    tensor([2., 1.])
    """
    p = S / S.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(p, p).sum(-1))


def _has_direction(S: Float[Tensor, "*batch d"]) -> Bool[Tensor, "*batch d"]:
    """Return which singular values are more than rounding of the largest."""
    return S.shape[-1] * torch.finfo(torch.float32).eps * S[..., :1] < S


def _angles(cosines: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch rank"]:
    return torch.rad2deg(torch.arccos(linalg.svdvals(cosines).clamp(max=1.0)))


def _matrix(svd: Svd) -> Float[Tensor, "*batch d d"]:
    return (svd.U * svd.S.unsqueeze(-2)) @ svd.Vh


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)  # in float32: drawing float64 takes six times as long


def _signed(Q: Tensor, R: Tensor) -> Tensor:
    return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
