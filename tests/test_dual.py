import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_dual import dual


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=shape))


def reference(q, k, v, scale, softcap, visible):
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
                    weights.append(math.exp(s) if visible[i, j] else 0.0)
                    total += weights[-1]
                if total:
                    z[b, i, h] = sum(w * np.asarray(v[b, j, h // group]) for j, w in enumerate(weights)) / total
                    lse[b, i, h] = math.log(total)
    return z, lse


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 2),
    n_pos=st.integers(1, 4),
    n_keys=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    softcap=st.sampled_from([None, 0.7, 20.0]),
    visible_share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_attend_equals_attention_written_out(seed, batch, n_pos, n_keys, kv_heads, group, softcap, visible_share):
    q = draw(seed, batch, n_pos, kv_heads * group, 4)
    k, v = draw(seed + 1, batch, n_keys, kv_heads, 4), draw(seed + 2, batch, n_keys, kv_heads, 4)
    visible = torch.from_numpy(np.random.default_rng(seed).random((n_pos, n_keys)) < visible_share)
    part = dual.attend(q, k, v, 0.6, softcap, visible)
    z, lse = reference(q, k, v, 0.6, softcap, visible)
    np.testing.assert_allclose(part.z, z, atol=1e-12)
    np.testing.assert_allclose(part.lse, lse, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n_own=st.integers(1, 6),
    n_demo=st.integers(1, 6),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    repeated=st.booleans(),
)
def test_zero_shot_plus_delta_icl_is_attention_over_both(seed, n_own, n_demo, scale, repeated):
    q, k, v = draw(seed, 2, 3, 4, 8), draw(seed + 1, 2, n_own + n_demo, 2, 8), draw(seed + 2, 2, n_own + n_demo, 2, 8)
    if repeated:
        k = k[:, :1].expand_as(k).contiguous()
    whole = dual.attend(q, k, v, scale).z
    own = dual.attend(q, k[:, :n_own], v[:, :n_own], scale)
    demo = dual.attend(q, k[:, n_own:], v[:, n_own:], scale)
    torch.testing.assert_close(own.z + dual.delta_icl(own, demo), whole, atol=1e-12, rtol=1e-12)


def test_a_group_that_no_row_sees_adds_nothing():
    q, k, v = draw(0, 1, 2, 2, 4), draw(1, 1, 3, 2, 4), draw(2, 1, 3, 2, 4)
    unseen = dual.attend(q, k, v, 1.0, visible=torch.zeros(1, 3, dtype=torch.bool))
    assert (unseen.z == 0).all()
    assert (unseen.lse == -torch.inf).all()
    assert (dual.delta_icl(dual.attend(q, k, v, 1.0), unseen) == 0).all()


def test_half_precision_is_scored_in_float32():
    q, k, v = (draw(seed, 1, 3, 2, 4).bfloat16() for seed in range(3))
    part = dual.attend(q, k, v, 0.5)
    assert part.z.dtype == torch.float32
    torch.testing.assert_close(part.z, dual.attend(q.float(), k.float(), v.float(), 0.5).z)


@pytest.mark.parametrize("magnitude", [1e3, -1e3])
def test_scores_far_from_zero_do_not_overflow(magnitude):
    q, k, v = torch.full((1, 1, 1, 1), magnitude).double(), torch.ones(1, 4, 1, 1).double(), draw(0, 1, 4, 1, 1)
    torch.testing.assert_close(dual.attend(q, k, v, 1.0).z[0, 0, 0, 0], v.mean())
