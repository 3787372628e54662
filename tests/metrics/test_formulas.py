import math

import numpy as np
import pytest
import torch
from helpers import as_long_as, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_dual.metrics.formulas import (
    ROUNDING,
    as_long,
    by_demonstration,
    demonstration_weights,
    draw_directions,
    finetuning_attention,
    kendall_random,
    query_by_kv_head,
    rec2ftp,
    sim_am,
    sim_am_delta,
    sim_am_random,
    sim_aou,
    sim_aou_random,
    sim_aou_unnormalised,
    top_recall,
)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_rec2ftp_by_hand() -> None:
    gold, zsl = ints(0, 0, 1, 1, 1, 0), ints(1, 1, 1, 0, 0, 0)
    icl_, ft = ints(0, 1, 1, 1, 0, 1), ints(0, 0, 0, 1, 0, 0)
    result = rec2ftp(gold, zsl, icl_, ft)  # FT corrects 0, 1 and 3; ICL gets 0 and 3 right
    assert (result.both, result.finetuned) == (2, 3)
    assert result.value == pytest.approx(2 / 3)
    assert str(result) == "0.667 (2/3)"


def test_rec2ftp_is_undefined_where_finetuning_corrects_nothing() -> None:
    result = rec2ftp(ints(0, 1), ints(0, 0), ints(0, 1), ints(0, 0))
    assert math.isnan(result.value)
    assert math.isnan(result.random)
    assert str(result) == "undefined (0/0)"


def test_rec2ftps_baseline_is_the_chance_of_a_dealt_prediction() -> None:
    rng = np.random.default_rng(0)
    gold, zsl, icl_, ft = (torch.from_numpy(rng.integers(3, size=40)) for _ in range(4))
    ft[:25] = gold[:25]
    corrected = ((ft == gold) & (zsl != gold)).numpy()
    deals = [rng.permutation(icl_.numpy()) for _ in range(20_000)]
    shares = [(dealt == gold.numpy())[corrected].mean() for dealt in deals]
    assert rec2ftp(gold, zsl, icl_, ft).random == pytest.approx(np.mean(shares), abs=float(4 * np.std(shares) / 141))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(1, 3), layers=st.integers(1, 3), d=st.integers(1, 5))
def test_sim_aou_equals_its_definition(seed: int, n: int, layers: int, d: int) -> None:
    zsl, icl_, ft = (draw(seed + i, n, layers, d) for i in range(3))
    got = sim_aou(zsl, icl_, ft)
    for query in range(n):
        for layer in range(layers):
            z, i, f = (h[query, layer].numpy() / np.linalg.norm(h[query, layer].numpy()) for h in (zsl, icl_, ft))
            if d > 1:
                assert got[query, layer].item() == pytest.approx(cosine(i - z, f - z), abs=1e-9)


def test_sim_aou_by_hand_and_its_signs() -> None:
    zsl, icl_ = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert sim_aou(zsl, icl_, icl_).item() == pytest.approx(1.0)
    # ĥ_ICL − ĥ_ZSL = (−1, 1) and ĥ_FT − ĥ_ZSL = (−1, −1) are at right angles: normalised first, then subtracted.
    assert sim_aou(zsl, icl_, torch.tensor([[[0.0, -5.0]]])).item() == pytest.approx(0.0, abs=1e-7)
    assert sim_aou(zsl, icl_, zsl).isnan().all(), "no update has no direction"


def test_sim_aou_random_is_against_uniform_updates() -> None:
    zsl, icl_ = draw(0, 4, 3, 6), draw(1, 4, 3, 6)
    u = torch.from_numpy(np.random.default_rng(7).random((4, 3, 6)))
    update = icl_ / icl_.norm(dim=-1, keepdim=True) - zsl / zsl.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(
        sim_aou_random(zsl, icl_, seed=7), torch.nn.functional.cosine_similarity(update, u, dim=-1)
    )
    assert not torch.equal(sim_aou_random(zsl, icl_, seed=7), sim_aou_random(zsl, icl_, seed=8))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_sim_am_equals_its_definition_whatever_the_lengths(seed: int, lengths: list[int]) -> None:
    a, b = draw(seed, len(lengths), 2, 3, 6), draw(seed + 1, len(lengths), 2, 3, 6)
    for query, length in enumerate(lengths):
        a[query, ..., length:] = 0
        b[query, ..., length:] = 0
    got, random = sim_am(a, b), sim_am_random(a, seed=seed)
    u = np.random.default_rng(seed).random((len(lengths), 2, 3, 6))
    for query, length in enumerate(lengths):
        for layer in range(2):
            for head in range(3):
                m_icl, m_ft = a[query, layer, head, :length].numpy(), b[query, layer, head, :length].numpy()
                assert got[query, layer, head].item() == pytest.approx(cosine(m_icl, m_ft), abs=1e-9)
                expected = cosine(m_icl, u[query, layer, head, :length])
                assert random[query, layer, head].item() == pytest.approx(expected, abs=1e-9)


def test_kendalls_baseline_is_around_zero() -> None:
    assert abs(kendall_random(draw(0, 40, 2, 60), seed=1).mean().item()) < 0.03


def test_finetunings_attention_sums_heads_of_query_products() -> None:
    training_q, q = draw(0, 2, 5, 3, 4), draw(1, 6, 2, 3, 4)
    got = finetuning_attention(training_q.flatten(2), q.flatten(2))
    for query in range(6):
        for layer in range(2):
            for token in range(5):
                expected = sum(float(training_q[layer, token, h] @ q[query, layer, h]) for h in range(3))
                assert got[query, layer, token].item() == pytest.approx(expected)


def test_recall_of_the_most_attended_by_hand() -> None:
    icl_, ft = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]), torch.tensor([[[0.1, 0.4, 0.3, 0.2]]])
    assert top_recall(icl_, ft, 2).item() == 0.5  # 0 and 1 against 1 and 2
    assert top_recall(icl_, icl_, 3).item() == 1.0
    assert top_recall(icl_, ft, 4).item() == 1.0, "all of four"
    assert top_recall(icl_, ft, 5).isnan().all(), "there are no five"


def test_weights_by_demonstration_are_sums_of_the_softmax() -> None:
    m, owners = draw(0, 2, 3, 6), ints(0, 0, 2, 2, 2, 5)
    weights = demonstration_weights(m)
    torch.testing.assert_close(weights, m.softmax(-1))
    parts = [weights[..., :2].sum(-1), weights[..., 2:5].sum(-1), weights[..., 5]]
    torch.testing.assert_close(by_demonstration(weights, owners), torch.stack(parts, dim=-1))


@pytest.mark.parametrize(("a", "b"), [(3.0, 3.0), (1.0, 8.0), (0.04, 0.04)])
def test_normalising_first_makes_unrelated_updates_alike(a: float, b: float) -> None:
    """For |r|² = 3|z|², ĥ − ẑ = −ẑ/2 + r̂·√3/2 for both, and what they share is a quarter of their squares."""
    z = draw(0, 200, 1, 4096)
    size = z.norm(dim=-1, keepdim=True)
    h_icl, h_ft = (
        z + as_long_as(draw(seed, 200, 1, 4096), math.sqrt(ratio) * size) for seed, ratio in ((1, a), (2, b))
    )
    shorter = [1 - 1 / math.sqrt(1 + ratio) for ratio in (a, b)]  # by how much of ẑ
    expected = math.sqrt(shorter[0] * shorter[1]) / 2
    assert sim_aou(z, h_icl, h_ft).mean().item() == pytest.approx(expected, abs=0.01)
    assert sim_aou_unnormalised(z, h_icl, h_ft).mean().item() == pytest.approx(0, abs=0.01)
    if a == b == 3:
        assert expected == 0.25


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), d=st.integers(1, 6), size=st.floats(0.01, 100), other=st.floats(0.01, 100))
def test_unnormalised_updates_of_one_direction_score_one_whatever_their_lengths(
    seed: int, d: int, size: float, other: float
) -> None:
    z, u = draw(seed, 3, 2, d), draw(seed + 1, 3, 2, d)
    ones = torch.ones(3, 2).double()
    torch.testing.assert_close(sim_aou_unnormalised(z, z + size * u, z + other * u), ones, atol=1e-6, rtol=0)
    torch.testing.assert_close(sim_aou_unnormalised(z, z + size * u, z - other * u), -ones, atol=1e-6, rtol=0)
    assert sim_aou_unnormalised(z, z, z + u).isnan().all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), d=st.integers(2, 5))
def test_sim_aou_unnormalised_equals_its_definition(seed: int, d: int) -> None:
    zsl, icl_, ft = (draw(seed + i, 2, 3, d) for i in range(3))
    got = sim_aou_unnormalised(zsl, icl_, ft)
    for query in range(2):
        for layer in range(3):
            z, i, f = (h[query, layer].numpy() for h in (zsl, icl_, ft))
            assert got[query, layer].item() == pytest.approx(cosine(i - z, f - z), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), draws=st.integers(1, 3), axes=st.lists(st.integers(1, 3), max_size=2))
def test_random_updates_are_as_long_as_those_observed(seed: int, draws: int, axes: list[int]) -> None:
    update = draw(seed, 4, *axes, 5)
    update[2] = 0
    got = as_long(draw_directions(update.shape, seed, draws), update)
    assert got.shape == (4, draws, *axes, 5)
    torch.testing.assert_close(
        got.norm(dim=-1), update.norm(dim=-1).float().unsqueeze(1).expand(4, draws, *axes), rtol=1e-6, atol=1e-12
    )
    assert not torch.equal(got, as_long(draw_directions(update.shape, seed + 1, draws), update))


def test_random_updates_have_no_direction_in_common() -> None:
    update = draw(0, 2000, 8).abs()
    got = as_long(draw_directions(update.shape, 3, draws=2), update)
    units = got / got.norm(dim=-1, keepdim=True)
    assert units.mean((0, 1)).abs().max() < 4 / math.sqrt(4000 * 8)
    between = (units[:, 0] * units[:, 1]).sum(-1)
    assert abs(between.mean().item()) < 4 / math.sqrt(2000 * 8), "the draws of one query are apart"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), tokens=st.integers(2, 6), padding=st.integers(0, 3))
def test_sim_am_delta_equals_its_definition_whatever_stands_past_the_end(seed: int, tokens: int, padding: int) -> None:
    zsl, icl_, ft = (draw(seed + i, 2, 2, 3, tokens) for i in range(3))
    got = sim_am_delta(*(torch.nn.functional.pad(m, (0, padding)) for m in (zsl, icl_, ft)))
    for at in np.ndindex(2, 2, 3):
        z, i, f = (m[at].numpy() for m in (zsl, icl_, ft))
        assert got[at].item() == pytest.approx(cosine(i - z, f - z), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.floats(0.01, 10), other=st.floats(0.01, 10))
def test_maps_that_change_alike_score_one_and_against_each_other_minus_one(
    seed: int, size: float, other: float
) -> None:
    m, u = draw(seed, 2, 2, 3, 5), draw(seed + 1, 2, 2, 3, 5)
    ones = torch.ones(2, 2, 3).double()
    torch.testing.assert_close(sim_am_delta(m, m + size * u, m + other * u), ones, atol=1e-6, rtol=0)
    torch.testing.assert_close(sim_am_delta(m, m + size * u, m - other * u), -ones, atol=1e-6, rtol=0)


def test_maps_that_did_not_change_beyond_rounding_have_no_direction() -> None:
    m, u = draw(0, 2, 2, 3, 5), draw(1, 2, 2, 3, 5)
    size = m.norm(dim=-1, keepdim=True)
    below, above = (m + as_long_as(u, share * ROUNDING * size) for share in (0.9, 1.1))
    assert sim_am_delta(m, m, m + u).isnan().all()
    assert sim_am_delta(m, m + u, m).isnan().all()
    assert sim_am_delta(m, below, m + u).isnan().all()
    assert sim_am_delta(m, m + u, below).isnan().all()
    torch.testing.assert_close(sim_am_delta(m, above, m + u), torch.ones(2, 2, 3).double(), atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), kv_heads=st.integers(1, 3), group=st.integers(1, 3), d_head=st.integers(1, 3))
def test_a_querys_product_with_keys_is_the_sum_over_heads(seed: int, kv_heads: int, group: int, d_head: int) -> None:
    n_heads = kv_heads * group
    q, k = draw(seed, 2, 3, n_heads, d_head), draw(seed + 1, 3, 4, kv_heads, d_head)
    got = finetuning_attention(k.flatten(2), query_by_kv_head(q.flatten(2), n_heads, kv_heads * d_head))
    for query, layer, token in np.ndindex(2, 3, 4):
        by_head = [float(q[query, layer, head] @ k[layer, token, head // group]) for head in range(n_heads)]
        assert got[query, layer, token].item() == pytest.approx(sum(by_head), abs=1e-9)
