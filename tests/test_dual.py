"""Each function of `dual` against its definition, written out in plain numpy one number at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_exact, draw, seeds, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from icl_dual import ArgumentError, dual


def heads_of(q: torch.Tensor, k: torch.Tensor):
    """Every query head with the key-value head that it shares."""
    return [(head, head // (q.shape[-2] // k.shape[-2])) for head in range(q.shape[-2])]


# 1. Linear layers under gradient descent


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(0, 6), d_in=sizes, d_out=sizes, repeated=st.booleans())
def test_a_layer_trained_by_sgd_is_the_untrained_layer_plus_linear_attention(seed, n, d_in, d_out, repeated):
    W_0, inputs, targets = draw(seed, d_out, d_in), draw(seed + 1, n, d_in), draw(seed + 2, n, d_out)
    if repeated and n:
        inputs = inputs[:1].expand(n, -1)
    layer = torch.nn.Linear(d_in, d_out, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(W_0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for x, y in zip(inputs, targets, strict=True):  # a loss that is not quadratic, trained by torch itself
        optimizer.zero_grad()
        torch.cosh(layer(x) - y).log().sum().backward()
        optimizer.step()
    W, errors = dual.sgd(W_0, inputs, lambda out, step: torch.tanh(out - targets[step]), lr=0.05)
    x = draw(seed + 3, 3, d_in)
    assert_exact(W, layer.weight.detach())
    assert_exact(x @ W_0.mT + dual.linear_attention(x, inputs, errors), layer(x).detach())
    assert_exact(W_0 + dual.outer_sum(inputs, errors), W)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(0, 6), d_in=sizes, d_out=sizes, repeated=st.booleans())
def test_any_linear_attention_is_an_sgd_run(seed, n, d_in, d_out, repeated):
    W_0, v, k = draw(seed, d_out, d_in), draw(seed + 1, n, d_out), draw(seed + 2, n, d_in)
    if repeated and n:
        k = k[:1].expand(n, -1)
    k = torch.nn.functional.normalize(k, dim=1)  # longer ones make SGD diverge, and its rounding with it
    targets = dual.sgd_targets(W_0, k, v, lr=0.5)
    W, errors = dual.sgd(W_0, k, lambda out, step: out - targets[step], lr=0.5)
    assert_exact(errors, v)
    q = draw(seed + 3, 2, d_in)
    expected = q @ W_0.mT + dual.linear_attention(q, k, v)
    assert_exact(q @ W.mT, expected)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(0, 5), d_in=sizes, d_out=sizes)
def test_linear_attention_written_out(seed, n, d_in, d_out):
    v, k, q = draw(seed, n, d_out), draw(seed + 1, n, d_in), draw(seed + 2, 2, d_in)
    expected = np.zeros((2, d_out))
    for pos in range(2):
        for i in range(n):
            expected[pos] += v[i].numpy() * float(k[i].numpy() @ q[pos].numpy())
    np.testing.assert_allclose(dual.linear_attention(q, k, v), expected, atol=1e-12)
    np.testing.assert_allclose(q @ dual.outer_sum(k, v).mT, expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(0, 6), d_x=sizes, d_y=sizes, lr=st.floats(0.01, 2.0), repeated=st.booleans())
def test_one_linear_self_attention_layer_is_one_step_of_gradient_descent(seed, n, d_x, d_y, lr, repeated):
    W_0, x, y = draw(seed, d_y, d_x), draw(seed + 1, n, d_x), draw(seed + 2, n, d_y)
    if repeated and n:
        x, y = x[:1].expand_as(x), y[:1].expand_as(y)
    W = W_0.clone().requires_grad_()
    ((x @ W.mT - y) ** 2).sum().div(2 * max(n, 1)).backward()
    assert W.grad is not None
    stepped = W_0 - lr * W.grad
    x_q = draw(seed + 3, 2, d_x)
    layer = dual.gradient_descent_layer(W_0, lr, n)
    context = torch.cat((x, y), dim=1)
    out = layer(context, torch.cat((x_q, -x_q @ W_0.mT), dim=1))
    torch.testing.assert_close(out, torch.cat((x_q, -x_q @ stepped.mT), dim=1))
    moved = layer(context, context)
    assert_exact(moved, torch.cat((x, y - x @ (stepped - W_0).mT), dim=1))


# 2. Attention as a linear layer


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(0, 5), kv_heads=st.integers(1, 3), group=st.integers(1, 3), repeated=st.booleans())
def test_weights_per_head_and_their_action_written_out(seed, n, kv_heads, group, repeated):
    k, v, q = draw(seed, n, kv_heads, 4), draw(seed + 1, n, kv_heads, 4), draw(seed + 2, kv_heads * group, 4)
    if repeated and n:
        k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    W = dual.head_weights(k, v)
    for head, kv_head in heads_of(q, k):
        expected = np.zeros((4, 4))
        for j in range(n):
            expected += np.outer(v[j, kv_head].numpy(), k[j, kv_head].numpy())
        np.testing.assert_allclose(W[kv_head], expected, atol=1e-12)
        np.testing.assert_allclose(dual.act(W, q)[head], expected @ q[head].numpy(), atol=1e-12)
    assert_exact(dual.act_unformed(q, k, v), dual.act(W, q))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(0, 5), d_model=sizes, repeated=st.booleans())
def test_delta_w_ft_is_equation_13(seed, n, d_model, repeated):
    """(W_V + ΔW_V) X Xᵀ (W_K + ΔW_K)ᵀ − W_V X Xᵀ W_Kᵀ, with X's tokens as columns, as the paper writes it."""
    X = draw(seed, d_model, n)
    X = X[:, :1].expand_as(X) if repeated and n else X
    W_K, W_V, delta_K, delta_V = (draw(seed + i, 4, d_model) for i in range(1, 5))
    expected = (W_V + delta_V) @ X @ X.mT @ (W_K + delta_K).mT - W_V @ X @ X.mT @ W_K.mT
    keys_values = [(W @ X).mT.unsqueeze(1) for W in (W_K, W_V, W_K + delta_K, W_V + delta_V)]
    assert_exact(dual.delta_w_ft(*keys_values).squeeze(0), expected)


# 3. Softmax attention, split


def reference(q, k, v, scale, softcap, bias):
    """Attention one row, one head at a time, in plain numpy, with each key's weight written out."""
    batch, n_pos, n_heads, _ = q.shape
    group = n_heads // k.shape[2]
    z, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b in range(batch):
        for i in range(n_pos):
            for h in range(n_heads):
                weights, total = [], 0.0
                for j in range(k.shape[1]):
                    s = scale * float(q[b, i, h] @ k[b, j, h // group])
                    s = s if softcap is None else softcap * math.tanh(s / softcap)
                    weights.append(math.exp(s + float(bias[b, h, i, j])))
                    total += weights[-1]
                if total:
                    z[b, i, h] = sum(w * np.asarray(v[b, j, h // group]) for j, w in enumerate(weights)) / total
                    lse[b, i, h] = math.log(total)
    return z, lse


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    batch=st.integers(1, 2),
    n_pos=st.integers(1, 4),
    n_keys=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    softcap=st.sampled_from([None, 0.7, 20.0]),
    visible_share=st.sampled_from([0.0, 0.5, 1.0]),
    by_head=st.booleans(),
    by_batch=st.booleans(),
)
def test_attend_equals_attention_written_out(
    seed, batch, n_pos, n_keys, kv_heads, group, softcap, visible_share, by_head, by_batch
):
    heads = kv_heads * group
    q = draw(seed, batch, n_pos, heads, 4)
    k, v = draw(seed + 1, batch, n_keys, kv_heads, 4), draw(seed + 2, batch, n_keys, kv_heads, 4)
    bias = draw(seed + 3, batch if by_batch else 1, heads if by_head else 1, n_pos, n_keys)
    bias[torch.from_numpy(np.random.default_rng(seed).random(bias.shape)) >= visible_share] = -torch.inf
    part = dual.attend(q, k, v, 0.6, softcap, bias)
    z, lse = reference(q, k, v, 0.6, softcap, bias.expand(batch, heads, n_pos, n_keys))
    np.testing.assert_allclose(part.z, z, atol=1e-12)
    np.testing.assert_allclose(part.lse, lse, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    batch=st.integers(1, 3),
    n_pos=st.integers(1, 5),
    n_keys=st.integers(1, 6),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    softcap=st.sampled_from([None, 0.7]),
    causal=st.booleans(),
    fused=st.booleans(),
    strided=st.booleans(),
)
def test_attend_without_a_bias_equals_attention_written_out(
    seed, batch, n_pos, n_keys, kv_heads, group, softcap, causal, fused, strided
):
    """In the fused kernel and without it; over keys that all rows see, and over the rows' own."""
    n_keys = n_pos if causal else n_keys
    heads = kv_heads * group
    q, k, v = draw(seed, batch, n_pos, heads, 4), *(draw(seed + i, batch, n_keys, kv_heads, 4) for i in (1, 2))
    if strided:  # a head's dimensions apart in memory
        q, k, v = (tensor.mT.contiguous().mT for tensor in (q, k, v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual, "FUSED", {"cpu"} if fused else set())
        part = dual.attend(q, k, v, 0.6, softcap, causal=causal)
    hidden = torch.full((n_pos, n_keys), -torch.inf if causal else 0.0, dtype=torch.float64).triu(1)
    z, lse = reference(q, k, v, 0.6, softcap, hidden.expand(batch, heads, n_pos, n_keys))
    np.testing.assert_allclose(part.z, z, atol=1e-12)
    np.testing.assert_allclose(part.lse, lse, atol=1e-12)


def definition(q, k, v, softcap, bias):
    """Attention of one row, one head, one dimension at a time in Python's floats: a key of score −∞ is left out."""
    batch, n_pos, n_heads, d_head = q.shape
    z, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, i, h in itertools.product(range(batch), range(n_pos), range(n_heads)):
        scores, values = [], []
        for j in range(k.shape[1]):
            kv_head = h // (n_heads // k.shape[2])
            products = [x * y for x, y in zip(q[b, i, h].tolist(), k[b, j, kv_head].tolist(), strict=True)]
            s = sum(products)
            s = s if softcap is None else softcap * math.tanh(s / softcap)
            s = -math.inf if bias[b, h, i, j] == -math.inf else s + float(bias[b, h, i, j])
            if s != -math.inf:
                scores.append(s)
                values.append(v[b, j, kv_head].tolist())
        if any(map(math.isnan, scores)):
            lse[b, i, h] = math.nan
        else:
            total = sum(map(math.exp, scores))
            lse[b, i, h] = math.log(total) if total else -math.inf
        for d in range(d_head if scores else 0):
            weights = [math.nan if s == math.inf else math.exp(s - lse[b, i, h]) for s in scores]
            z[b, i, h, d] = sum(w * value[d] for w, value in zip(weights, values, strict=True))
    return z, lse


@pytest.mark.parametrize("causal", [False, True])
def test_attend_runs_under_vmap_also_below_a_gradient(causal: bool) -> None:
    q, k, v = draw(1, 6, 1, 3, 4, 2), draw(2, 6, 1, 3, 2, 2), draw(3, 6, 1, 3, 2, 2)

    def total(q, k, v):
        return dual.attend(q, k, v, 0.6, causal=causal).z.square().sum()

    expected = [dual.attend(*each, 0.6, causal=causal) for each in zip(q, k, v, strict=True)]
    z, lse = torch.func.vmap(lambda q, k, v: tuple(dual.attend(q, k, v, 0.6, causal=causal)))(q, k, v)
    assert_exact(z, torch.stack([part.z for part in expected]))
    assert_exact(lse, torch.stack([part.lse for part in expected]))
    gradients = [torch.func.grad(total)(*each) for each in zip(q, k, v, strict=True)]
    assert_exact(torch.func.vmap(torch.func.grad(total))(q, k, v), torch.stack(gradients))


@settings(max_examples=100, deadline=None)
@given(
    seed=seeds,
    n_pos=st.integers(1, 4),
    n_keys=st.integers(1, 4),
    group=st.integers(1, 2),
    softcap=st.sampled_from([None, 0.7]),
    causal=st.booleans(),
    with_bias=st.booleans(),
    special=st.lists(
        st.tuples(st.sampled_from("qkv"), st.integers(0, 47), st.sampled_from([math.nan, math.inf, -math.inf, 0.0])),
        max_size=4,
    ),
)
def test_both_ways_to_attend_are_the_definition_for_nan_and_infinities(
    seed, n_pos, n_keys, group, softcap, causal, with_bias, special
):
    n_keys = n_pos if causal else n_keys
    q, k, v = draw(seed, 1, n_pos, 2 * group, 3), *(draw(seed + i, 1, n_keys, 2, 3) for i in (1, 2))
    for name, index, value in special:
        flat = {"q": q, "k": k, "v": v}[name].view(-1)
        flat[index % len(flat)] = value
    bias = draw(seed + 3, 1, 2 * group, n_pos, n_keys) if with_bias else None
    if bias is not None:
        bias[torch.from_numpy(np.random.default_rng(seed).random(bias.shape)) < 0.4] = -torch.inf
    hidden = torch.full((n_pos, n_keys), -torch.inf if causal else 0.0, dtype=torch.float64).triu(1)
    z, lse = definition(q, k, v, softcap, (0.0 if bias is None else bias) + hidden.expand(1, 2 * group, -1, -1))
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dual, "FUSED", {"cpu"} if fused else set())
            part = dual.attend(q, k, v, 1.0, softcap, bias, causal)
        np.testing.assert_allclose(part.z, z, atol=1e-12)
        np.testing.assert_allclose(part.lse, lse, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "n_values", "causal", "message"),
    [
        (3, 2, 5, False, "expected q with a multiple of the 2 key-value heads, got 3 query heads"),
        (2, 3, 5, False, "expected q with a multiple of the 3 key-value heads, got 2 query heads"),
        (2, 0, 5, False, "expected q with a multiple of the 0 key-value heads, got 2 query heads"),
        (4, 2, 4, False, r"expected v as a tensor of floats of shape \[batch key kv_head d_head\], got \[1, 4, 2, 3\]"),
        (4, 2, 6, False, r"expected v as .* got \[1, 6, 2, 3\] with q \[1, 2, 4, 3\] and k \[1, 5, 2, 3\]"),
        (4, 2, 5, True, "expected as many keys as queries where causal=True, got 5 keys and 2 queries"),
    ],
)
def test_shapes_that_attention_cannot_have_are_refused(fused, heads, kv_heads, n_values, causal, message, monkeypatch):
    monkeypatch.setattr(dual, "FUSED", {"cpu"} if fused else set())
    q, k, v = draw(0, 1, 2, heads, 3), draw(1, 1, 5, kv_heads, 3), draw(2, 1, n_values, kv_heads, 3)
    with pytest.raises(ArgumentError, match=message):
        dual.attend(q, k, v, 1.0, causal=causal)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k: dual.scores(q[None], k[None], 1.0),
        lambda q, k: dual.shared_scores(q, k, 1.0),
        lambda q, k: dual.summed_scores(q, k, 1.0),
        lambda q, k: dual.act_unformed(q[0], k, k),
        lambda q, k: dual.act(dual.head_weights(k, k), q[0]),
        lambda q, k: dual.AttentionRule(1.0, None, None).attend(
            q[None], k[None], k[None], torch.zeros(1, 4).long(), torch.zeros(1, 5).long()
        ),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (2, 3), (1, 0)])
def test_query_heads_are_a_multiple_of_key_value_heads(call, heads, kv_heads):
    with pytest.raises(ArgumentError, match=f"multiple of the {kv_heads} key-value heads, got {heads} query heads"):
        call(draw(0, 4, heads, 3), draw(1, 5, kv_heads, 3))


def test_parts_of_other_rows_are_not_merged():
    a, b = (dual.attend(draw(0, 1, n, 2, 3), draw(1, 1, 4, 2, 3), draw(2, 1, 4, 2, 3), 1.0) for n in (1, 2))
    for combine in (dual.merge, dual.share, dual.delta_icl):
        with pytest.raises(ArgumentError, match="expected two parts of attention by the same queries"):
            combine(a, b)


def test_numbers_that_no_mathematics_has_are_refused():
    W = draw(0, 3, 3)
    svd = dual.Svd.of(W)
    layer = dual.gradient_descent_layer(W, 0.1, 2)
    for call, message in (
        (lambda: dual.Svd.of(W / 0), "expected W as finite numbers"),
        (lambda: dual.overlap(svd, svd, 4), "rank up to it, got sizes 3 and 3 and rank=4"),
        (lambda: dual.overlap(svd, dual.Svd.of(draw(0, 2, 2)), 1), "got sizes 3 and 2"),
        (lambda: dual.overlap(svd, svd, 0), "expected rank as a whole number of at least 1, got 0"),
        (lambda: dual.sgd_targets(W, W, W, 0.0), "expected lr other than 0"),
        (lambda: dual.AttentionRule(1.0, 0.0, None), "expected softcap as a number above 0"),
        (lambda: dual.AttentionRule(1.0, None, 0), "expected window as a whole number of at least 1"),
        (lambda: layer(draw(0, 2, 5), draw(1, 2, 5)), "expected context and queries with the 6 dimensions"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    n_zero_shot=st.integers(1, 6),
    n_demo=st.integers(0, 6),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    repeated=st.booleans(),
)
def test_zero_shot_plus_delta_icl_is_attention_over_both(seed, n_zero_shot, n_demo, scale, repeated):
    q, k, v = (
        draw(seed, 2, 3, 4, 8),
        draw(seed + 1, 2, n_zero_shot + n_demo, 2, 8),
        draw(seed + 2, 2, n_zero_shot + n_demo, 2, 8),
    )
    if repeated:
        k = k[:, :1].expand_as(k).contiguous()
    whole = dual.attend(q, k, v, scale).z
    zero_shot = dual.attend(q, k[:, :n_zero_shot], v[:, :n_zero_shot], scale)
    demo = dual.attend(q, k[:, n_zero_shot:], v[:, n_zero_shot:], scale)
    assert_exact(zero_shot.z + dual.delta_icl(zero_shot, demo), whole)
    assert_exact(dual.merge(zero_shot, demo).z, whole)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, cut=st.integers(0, 5), sink=st.floats(-5, 5))
def test_a_sink_is_a_key_without_a_value(seed, cut, sink):
    q, k, v = draw(seed, 2, 3, 2, 4), draw(seed + 1, 2, 5, 2, 4), draw(seed + 2, 2, 5, 2, 4)
    sinks = torch.tensor([sink, 0.5], dtype=torch.float64)
    # The sink as a key: its score is the sink's whatever the query is, its value is 0.
    weights = torch.einsum("bphd,bkhd->bphk", q, k)
    weights = torch.cat((weights, sinks[:, None].expand(2, 3, 2, 1)), dim=-1).softmax(-1)[..., :-1]
    expected = torch.einsum("bphk,bkhd->bphd", weights, v)
    zero_shot, demo = (dual.attend(q, k[:, part], v[:, part], 1.0) for part in (slice(cut, None), slice(cut)))
    zero_shot = dual.add_sink(zero_shot, sinks)
    assert_exact(zero_shot.z + dual.delta_icl(zero_shot, demo), expected)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=sizes, keys=st.integers(0, 5), groups=sizes, kv_heads=sizes, softcap=st.sampled_from([None, 1.5]))
def test_summed_scores_are_the_scores_summed(seed, n, keys, groups, kv_heads, softcap):
    q, k = draw(seed, n, groups * kv_heads, 3), draw(seed + 1, keys, kv_heads, 3)
    got = dual.summed_scores(q, k, 0.7, softcap)
    expected = torch.zeros(n, keys, dtype=torch.float64)
    for head, kv_head in heads_of(q, k):
        of_head = 0.7 * q[:, head] @ k[:, kv_head].T
        expected += of_head if softcap is None else softcap * torch.tanh(of_head / softcap)
    assert_exact(got, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    cuts=st.tuples(st.integers(0, 7), st.integers(0, 7)).map(sorted),
    window=st.sampled_from([None, 1, 3, 20]),
    softcap=st.sampled_from([None, 1.5]),
    alibi=st.booleans(),
    sink=st.booleans(),
    gap=st.integers(0, 4),
)
def test_attention_is_the_groups_by_their_masses(seed, cuts, window, softcap, alibi, sink, gap):
    """Softmax over all keys at once, written out, against z_0 + ΔICL and Σ mass z over three groups and the sink."""
    n, heads, d = 7, 4, 3
    q, k, v = draw(seed, 2, 1, heads, d), draw(seed + 1, 2, n, 2, d), draw(seed + 2, 2, n, 2, d)
    slopes = torch.tensor([0.5, 0.25, 0.1, 2.0]).double() if alibi else None
    sinks = draw(seed + 3, heads) if sink else None
    rule = dual.AttentionRule(0.7, softcap, window, slopes, sinks)
    keys = torch.arange(n) + gap * (torch.arange(n) >= cuts[1])
    rows = keys[None, -1:]
    groups = [slice(0, cuts[0]), slice(cuts[0], cuts[1]), slice(cuts[1], n)]
    parts = [rule.attend(q, k[:, at], v[:, at], rows, keys[None, at]) for at in groups]
    zero_shot = rule.with_sink(dual.merge(parts[0], parts[2]))
    split = zero_shot.z + dual.delta_icl(zero_shot, parts[1])
    nothing = dual.AttentionPart(torch.zeros_like(q), torch.full((2, 1, heads), -torch.inf).double())
    mass = torch.stack([part.lse for part in (*parts, rule.with_sink(nothing))], dim=-1).softmax(-1)
    weighted = [mass[..., index, None] * part.z for index, part in enumerate(parts)]
    assert_exact(torch.stack(weighted).sum(0), split)
    for b in range(2):
        for h in range(heads):
            total, z = (math.exp(float(sinks[h])) if sinks is not None else 0.0), np.zeros(d)
            for j in range(n):
                distance = int(keys[-1] - keys[j])
                s = 0.7 * float(q[b, 0, h] @ k[b, j, h // 2])
                s = s if softcap is None else softcap * math.tanh(s / softcap)
                s -= float(slopes[h]) * distance if slopes is not None else 0.0
                weight = math.exp(s) if window is None or distance < window else 0.0
                total, z = total + weight, z + weight * v[b, j, h // 2].numpy()
            np.testing.assert_allclose(split[b, 0, h], z / total, atol=1e-12)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_rule_checks_hidden_numbers_unless_it_is_told_not_to(number: float):
    """What a window hides adds nothing, whatever its value is; without the check it reaches the output."""
    rule, positions = dual.AttentionRule(0.7, None, 2), torch.arange(3)[None]
    q, k, v = draw(0, 1, 1, 2, 3), draw(1, 1, 3, 2, 3), draw(2, 1, 3, 2, 3)
    expected = rule.attend(q, k, v, positions[:, -1:], positions)
    v[:, 0] = number
    assert_exact(rule.attend(q, k, v, positions[:, -1:], positions).z, expected.z)
    assert not rule.attend(q, k, v, positions[:, -1:], positions, check_finite=False).z.isfinite().any()


def test_tokens_in_any_order_see_those_up_to_their_position():
    rule, order = dual.AttentionRule(0.7, None, None), torch.tensor([2, 0, 3, 1])
    q, k, v = draw(0, 1, 4, 4, 3), draw(1, 1, 4, 2, 3), draw(2, 1, 4, 2, 3)
    positions = torch.arange(4)[None]
    expected = rule.attend(q, k, v, positions, positions)
    got = rule.attend(q[:, order], k[:, order], v[:, order], order[None], order[None])
    assert_exact(got.z, expected.z[:, order])
    assert_exact(got.lse, expected.lse[:, order])


def test_two_groups_without_keys_have_no_share():
    none = dual.attend(draw(0, 1, 1, 2, 4), draw(1, 1, 0, 2, 4), draw(2, 1, 0, 2, 4), 1.0)
    assert (dual.share(none, none) == 0).all()
    assert (dual.merge(none, none).z == 0).all()


def test_a_group_that_no_row_sees_adds_nothing():
    q, k, v = draw(0, 1, 2, 2, 4), draw(1, 1, 3, 2, 4), draw(2, 1, 3, 2, 4)
    unseen = dual.attend(q, k, v, 1.0, bias=torch.full((1, 1, 1, 3), -torch.inf, dtype=q.dtype))
    assert (unseen.z == 0).all()
    assert (unseen.lse == -torch.inf).all()
    assert (dual.delta_icl(dual.attend(q, k, v, 1.0), unseen) == 0).all()


def test_half_precision_is_scored_in_float32():
    q, k, v = (draw(seed, 1, 3, 2, 4).bfloat16() for seed in range(3))
    part = dual.attend(q, k, v, 0.5)
    assert part.z.dtype == torch.float32
    assert_exact(part.z, dual.attend(q.float(), k.float(), v.float(), 0.5).z)


@pytest.mark.parametrize("magnitude", [1e3, -1e3])
def test_scores_far_from_zero_do_not_overflow(magnitude):
    q, k, v = torch.full((1, 1, 1, 1), magnitude).double(), torch.ones(1, 4, 1, 1).double(), draw(0, 1, 4, 1, 1)
    torch.testing.assert_close(dual.attend(q, k, v, 1.0).z[0, 0, 0, 0], v.mean())


# 4. Two updates compared


@settings(max_examples=40, deadline=None)
@given(seed=seeds, d=st.integers(2, 6), rank=st.integers(1, 3))
def test_overlap_equals_its_definitions(seed, d, rank):
    rank = min(rank, d)
    a, b = draw(seed, d, d), draw(seed + 1, d, d)
    overlap = dual.overlap(dual.Svd.of(a), dual.Svd.of(b), rank)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    torch.testing.assert_close(overlap.cosine, cosine, atol=1e-10, rtol=0)
    for angles, side in ((overlap.left_angles, 0), (overlap.right_angles, 1)):
        bases = []
        for W in (a, b):
            U, _, Vh = np.linalg.svd(W.numpy())
            bases.append(U[:, :rank] if side == 0 else Vh[:rank].T)
        expected = np.rad2deg(np.sort(subspace_angles(*bases)))
        np.testing.assert_allclose(angles, expected, atol=1e-5)


def test_directions_that_a_matrix_does_not_have_have_no_angles():
    rank_one, full = torch.outer(draw(0, 6), draw(1, 6)), draw(2, 6, 6)
    overlap = dual.overlap(dual.Svd.of(torch.stack((rank_one, full, full.float()))), dual.Svd.of(full), 3)
    assert overlap.left_angles.isnan().tolist() == [[False, True, True], [False] * 3, [False] * 3]
    u = rank_one[:, 0] / rank_one[:, 0].norm()
    U = torch.linalg.svd(full).U[:, :3]
    assert overlap.left_angles[0, 0].item() == pytest.approx(math.degrees(math.acos((U.mT @ u).norm())))


def test_an_update_overlaps_itself_and_a_zero_update_is_undefined():
    a = dual.Svd.of(draw(0, 3, 5, 5))
    same = dual.overlap(a, a, 2)
    torch.testing.assert_close(same.cosine, torch.ones(3).double())
    assert (same.left_angles < 1e-4).all()
    assert (dual.overlap(a, dual.Svd.of(-draw(0, 3, 5, 5)), 2).cosine + 1).abs().max() < 1e-12
    zero = dual.overlap(a, dual.Svd.of(torch.zeros(3, 5, 5)), 2)
    assert zero.cosine.isnan().all()
    assert zero.left_angles.isnan().all()
    assert dual.effective_rank(torch.zeros(5)).isnan()


@pytest.mark.parametrize(("S", "rank"), [([2.0, 2.0, 2.0, 0.0], 3.0), ([5.0, 0.0, 0.0, 0.0], 1.0)])
def test_effective_rank_counts_equal_directions(S, rank):
    assert dual.effective_rank(torch.tensor(S)).item() == pytest.approx(rank)


def test_random_directions_keep_the_spectrum_and_are_uniform():
    d, n = 8, 4000
    svd = dual.Svd.of(draw(0, d, d)).with_random_directions(torch.Generator().manual_seed(0))
    for basis in (svd.U, svd.Vh):
        torch.testing.assert_close(basis @ basis.mT, torch.eye(d).double())
    svds = dual.Svd(*(t.expand(n, *t.shape) for t in dual.Svd.of(draw(0, d, d))))
    random_svds = svds.with_random_directions(torch.Generator().manual_seed(1))
    assert (random_svds.S == svds.S).all()
    cosines = dual.overlap(svds, random_svds, 1).cosine
    assert abs(cosines.mean()) < 4 / d / math.sqrt(n)
    assert cosines.std().item() == pytest.approx(1 / d, rel=0.05)
    assert random_svds.U.mean(0).abs().max() < 5 / math.sqrt(d * n)  # signs are not fixed by QR's convention


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_an_svd_acts_as_its_matrix(seed):
    W, q = draw(seed, 2, 4, 4), draw(seed + 1, 2, 3, 4)
    torch.testing.assert_close(dual.Svd.of(W).act(q), q @ W.mT)


def test_a_mask_of_other_rows_or_without_alibi_is_refused() -> None:
    rule, alibi = dual.AttentionRule(1.0, None, 2), dual.AttentionRule(1.0, None, 2, torch.tensor([0.5, 0.25]))
    q = k = v = torch.randn(1, 3, 2, 4)
    positions = torch.arange(3)[None]
    of_rule, of_alibi = (each.mask(positions, positions, q.device) for each in (rule, alibi))
    torch.testing.assert_close(rule.attend_masked(q, k, v, of_rule), rule.attend(q, k, v, positions, positions))
    torch.testing.assert_close(alibi.attend_masked(q, k, v, of_alibi), alibi.attend(q, k, v, positions, positions))
    wrong = [
        (rule, rule.mask(positions[:, :1], positions, q.device)),
        (rule, of_alibi),
        (alibi, of_rule),
        (alibi, dual.Mask(None, causal=True)),
    ]
    for each, mask in wrong:
        with pytest.raises(ArgumentError, match=r"expected a mask with a bias of heads, rows and keys \("):
            each.attend_masked(q, k, v, mask)
