import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import run_settings, slow_tau
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.metrics import comparison as comparison_module
from icl_dual.metrics.comparison import PER_LAYER, RELEASED_NAMES
from icl_dual.metrics.formulas import (
    NULL_DRAWS,
    ROUNDING,
    by_demonstration,
    demonstration_weights,
    finetuning_attention,
    kendall_random,
    query_by_kv_head,
    random_updates,
    rec2ftp,
    sim_am,
    sim_am_delta,
    sim_am_random,
    sim_aou,
    sim_aou_random,
    sim_aou_unnormalised,
    top_recall,
)
from icl_dual.prompts import SEPARATOR, Prompts
from icl_dual.recordings.recordings import SETTINGS
from icl_dual.statistics.ranks import kendall


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_rec2ftp_by_hand() -> None:
    gold, zsl = ints(0, 0, 1, 1, 1, 0), ints(1, 1, 1, 0, 0, 0)
    icl_, ft = ints(0, 1, 1, 1, 0, 1), ints(0, 0, 0, 1, 0, 0)
    found = rec2ftp(gold, zsl, icl_, ft)  # FT corrects 0, 1 and 3; ICL gets 0 and 3 right
    assert (found.both, found.finetuned) == (2, 3)
    assert found.value == pytest.approx(2 / 3)
    assert str(found) == "0.667 (2/3)"


def test_rec2ftp_is_undefined_where_finetuning_corrects_nothing() -> None:
    found = rec2ftp(ints(0, 1), ints(0, 0), ints(0, 1), ints(0, 0))
    assert math.isnan(found.value)
    assert math.isnan(found.random)
    assert str(found) == "undefined (0/0)"


def test_rec2ftps_baseline_is_the_chance_of_a_dealt_prediction() -> None:
    rng = np.random.default_rng(0)
    gold, zsl, icl_, ft = (torch.from_numpy(rng.integers(3, size=40)) for _ in range(4))
    ft[:25] = gold[:25]
    corrected = ((ft == gold) & (zsl != gold)).numpy()
    deals = [rng.permutation(icl_.numpy()) for _ in range(20_000)]
    shares = [(dealt == gold.numpy())[corrected].mean() for dealt in deals]
    assert rec2ftp(gold, zsl, icl_, ft).random == pytest.approx(np.mean(shares), abs=float(4 * np.std(shares) / 141))


def test_scores_by_query_are_what_the_overall_numbers_are_means_of(runs: dict) -> None:
    found = icl.compare(**runs)
    by_query, overall = found.by_query(), found.overall().set_index("metric").to_dict("index")
    assert list(by_query) == list(overall)
    for name, values in by_query.items():
        row = overall[name]
        assert values.nanmean().item() == pytest.approx(row["value"], nan_ok=True), name
        assert int(values.isfinite().sum()) == row["n"]
        assert math.isnan(row["low"]) or row["low"] <= row["value"] <= row["high"]
    corrected = (found.predictions["FT"] == found.gold) & (found.predictions["ZSL"] != found.gold)
    assert torch.equal(by_query["Rec2FTP"].isfinite(), corrected)
    assert overall["SimAOU"]["low"] < overall["SimAOU"]["high"]


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


@pytest.fixture(scope="module")
def runs(llama: icl.Model, prompts: Prompts) -> dict:
    return run_settings(llama, prompts)


def of_demonstrations(delta: icl.WeightDelta) -> list[int]:
    """Where the demonstrations' own tokens are among the training tokens: behind one start token each."""
    found, at = [], 0
    for tokens in delta.demonstrations:
        found += range(at + 1, at + 1 + len(tokens))
        at += 1 + len(tokens)
    return found


def test_compare_puts_each_capture_in_its_place(runs: dict) -> None:
    found = icl.compare(**runs, seed=5)
    zsl, in_context, ft = (runs[name] for name in ("zero_shot", "in_context", "finetuned"))
    torch.testing.assert_close(
        found.per_layer["SimAOU"], sim_aou(*(run.attn_out.double() for run in (zsl, in_context, ft)))
    )
    before = sim_am(in_context.query_scores.double(), zsl.query_scores.double()).mean(-1)
    after = sim_am(in_context.query_scores.double(), ft.query_scores.double()).mean(-1)
    torch.testing.assert_close(found.per_layer["SimAM before FT"], before)
    torch.testing.assert_close(found.per_layer["SimAM after FT"], after)
    own = runs["delta"].training_q[:, of_demonstrations(runs["delta"])]
    # By the same steps as `compare`: a token that stands twice has equal scores, which rounding puts in either order.
    scale = ft.q.shape[-1] ** -0.5
    m_ft = finetuning_attention(own.flatten(2) * scale, ft.q.flatten(2) * scale)
    m_icl = in_context.context_scores[..., in_context.prompts.demonstration_positions].double()
    weights = demonstration_weights(m_icl), demonstration_weights(m_ft)
    torch.testing.assert_close(found.per_layer["Kendall"], kendall(*weights))
    assert found.rec2ftp == rec2ftp(zsl.gold, zsl.predictions, in_context.predictions, ft.predictions)
    assert found.accuracy == {"ZSL": zsl.accuracy, "ICL": in_context.accuracy, "FT": ft.accuracy}
    assert tuple(found.per_layer) == PER_LAYER


def test_comparisons_save_and_load_and_become_a_tidy_frame(runs: dict, tmp_path: Path) -> None:
    found = icl.compare(**runs)
    found.save(tmp_path / "x")
    loaded = icl.Comparison.load(tmp_path / "x")
    assert list(loaded.per_layer) == list(PER_LAYER)
    frame = loaded.to_frame()
    pd.testing.assert_frame_equal(frame, found.to_frame())
    assert frame.columns.tolist() == ["metric", "layer", "value", "n"]
    by_layer = frame.set_index(["metric", "layer"]).to_dict(orient="index")
    expected = found.per_layer["Kendall"][:, 1].mean().item()
    assert by_layer["Kendall", 1] == {"value": pytest.approx(expected), "n": 7}
    overall = found.overall().set_index("metric").to_dict()["value"]
    assert overall["SimAOU"] == pytest.approx(found.per_layer["SimAOU"].mean().item())
    assert "SimAOU random" in found._repr_html_()
    assert "ICL accuracy" in str(found)


def test_what_is_undefined_is_not_counted(runs: dict) -> None:
    runs = runs | {"finetuned": dataclasses.replace(runs["finetuned"], attn_out=runs["finetuned"].attn_out.clone())}
    runs["finetuned"].attn_out[2, 1] = runs["zero_shot"].attn_out[2, 1]
    by_layer = icl.compare(**runs).to_frame().set_index(["metric", "layer"]).to_dict(orient="index")
    assert by_layer["SimAOU", 1]["n"] == 6
    assert by_layer["SimAOU", 2]["n"] == 7


def test_recall_of_the_most_attended_by_hand() -> None:
    icl_, ft = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]), torch.tensor([[[0.1, 0.4, 0.3, 0.2]]])
    assert top_recall(icl_, ft, 2).item() == 0.5  # 0 and 1 against 1 and 2
    assert top_recall(icl_, icl_, 3).item() == 1.0
    assert top_recall(icl_, ft, 5).isnan().all(), "there are no five"


def test_weights_by_demonstration_are_sums_of_the_softmax() -> None:
    m, owners = draw(0, 2, 3, 6), ints(0, 0, 2, 2, 2, 5)
    weights = demonstration_weights(m)
    torch.testing.assert_close(weights, m.softmax(-1))
    parts = [weights[..., :2].sum(-1), weights[..., 2:5].sum(-1), weights[..., 5]]
    torch.testing.assert_close(by_demonstration(weights, owners), torch.stack(parts, dim=-1))


def test_under_the_released_names_means_are_the_scripts(runs: dict) -> None:
    found = icl.compare(**runs)
    values = {name: value.clone() for name, value in found.per_layer.items()}
    values["SimAOU"][0, 1] = torch.nan  # no update: the scripts count a cosine of 0
    values["Kendall"][0, 2] = torch.nan  # a constant: the scripts carry it through
    scores = dataclasses.replace(found, per_layer=values).released()
    assert scores["SimAOU"][1] == pytest.approx(found.per_layer["SimAOU"][1:, 1].sum().item() / 7)
    assert math.isnan(scores["token-level kendall"][2])
    assert scores["ZSL SimAM"] == pytest.approx(found.per_layer["SimAM before FT"].mean(0).tolist())
    assert scores["Recall2FTP"] == pytest.approx(100 * found.rec2ftp.value, nan_ok=True)
    assert scores["token-level random_recall_topk"] == pytest.approx([100 / n_tokens(runs)] * 3)


def n_tokens(runs: dict) -> int:
    return len(runs["in_context"].prompts.demonstration_positions)


def test_captures_that_do_not_belong_together_are_refused(runs: dict, llama: icl.Model, task: icl.Task) -> None:
    def refused(message: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=message):
            icl.compare(**{**runs, **changed})

    refused("of one model", zero_shot=dataclasses.replace(runs["zero_shot"], model="other"))
    refused("of the same queries", zero_shot=runs["in_context"])
    refused("with zero_shot's weights", finetuned=runs["zero_shot"])
    refused("zero_shot and in_context captured with the same weights", zero_shot=runs["finetuned"])
    refused("without 'q'", finetuned=dataclasses.replace(runs["finetuned"], q=None))
    refused("to have demonstrations", in_context=runs["zero_shot"])
    other = icl.build_prompts(llama, task, task.demonstrations(2, seed=9), task.queries(3))
    reversed_ = dataclasses.replace(runs["delta"], demonstrations=runs["delta"].demonstrations[::-1])
    refused("in their order", delta=reversed_)
    refused("finetuned on the", delta=icl.finetune(llama, other, lr=0.05, progress=False))


def as_long_as(r: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return r * (size / r.norm(dim=-1, keepdim=True))


def noisy_recordings(n: int, layers: int, d: int, ratio: float, seed: int = 0) -> icl.Recordings:
    """Attention outputs z, and z with independent noise on it of |r|² = ratio·|z|², and little else."""
    z = draw(seed, n, layers, d) + draw(seed + 1, d)  # all queries have something in common
    size = math.sqrt(ratio) * z.norm(dim=-1, keepdim=True)
    r_icl, r_ft = (as_long_as(draw(seed + which, n, layers, d), size) for which in (2, 3))
    labels = torch.zeros(n, dtype=torch.long)
    return icl.Recordings(
        gold=labels,
        predictions=dict.fromkeys(SETTINGS, labels),
        attn_out={"ZSL": z, "ICL": z + r_icl, "FT": z + r_ft},
        query_scores={name: draw(seed + 4 + at, n, layers, 2, 5) for at, name in enumerate(SETTINGS)},
        query_lengths=torch.full((n,), 5),
        context_scores={name: draw(seed + 7, n, layers, 4) for name in SETTINGS},
        segments=ints(-1, 0, 0, 1),
        q=draw(seed + 8, n, layers, 6),
        training_q=draw(seed + 9, layers, 5, 6),
        training_segments=ints(-1, 0, 0, -1, 1),
    )


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


def test_the_inflation_null_is_a_quarter_where_updates_are_three_times_their_vector() -> None:
    found = icl.compare_recordings(noisy_recordings(200, 1, 4096, 3.0)).per_layer
    assert found["SimAOU inflation null"].mean().item() == pytest.approx(0.25, abs=0.01)
    assert found["SimAOU"].mean().item() == pytest.approx(0.25, abs=0.01), "these updates are such noise"
    assert abs(found["SimAOU unnormalised"].mean().item()) < 3 / math.sqrt(200 * 4096)
    assert found["SimAOU random update"].mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_inflation_null_is_of_the_updates_lengths_not_their_directions() -> None:
    """ICL and FT the same update: SimAOU is 1, and the null is what it was."""
    recordings = noisy_recordings(60, 2, 1024, 3.0)
    same = dataclasses.replace(recordings, attn_out=recordings.attn_out | {"FT": recordings.attn_out["ICL"]})
    found = icl.compare_recordings(same).per_layer
    torch.testing.assert_close(found["SimAOU"], torch.ones(60, 2).double())
    torch.testing.assert_close(found["SimAOU unnormalised"], torch.ones(60, 2).double())
    assert found["SimAOU inflation null"].mean().item() == pytest.approx(0.25, abs=0.01)


def test_centred_random_updates_score_nothing_unnormalised() -> None:
    n, d = 150, 256
    recordings = noisy_recordings(n, 4, d, 0.5)
    found = icl.compare_recordings(recordings).per_layer
    null = found["SimAOU unnormalised random"]
    assert (null.mean(0).abs() < 3 / math.sqrt(n * d)).all()
    # The mean of several draws each: were it one, deviations would be twice as large.
    expected = 1 / math.sqrt(d * NULL_DRAWS)
    assert null.std().item() == pytest.approx(expected, rel=0.1)
    assert (found["SimAOU random update"].mean(0) > 0.05).all(), "the same updates do, normalised first"


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
    got = random_updates(update, seed=seed, draws=draws)
    assert got.shape == (4, draws, *axes, 5)
    torch.testing.assert_close(
        got.norm(dim=-1), update.norm(dim=-1).float().unsqueeze(1).expand(4, draws, *axes), rtol=1e-6, atol=1e-12
    )
    assert not torch.equal(got, random_updates(update, seed=seed + 1, draws=draws))


def test_random_updates_have_no_direction_in_common() -> None:
    got = random_updates(draw(0, 2000, 8).abs(), seed=3, draws=2)
    units = got / got.norm(dim=-1, keepdim=True)
    assert units.mean((0, 1)).abs().max() < 4 / math.sqrt(4000 * 8)
    between = (units[:, 0] * units[:, 1]).sum(-1)
    assert abs(between.mean().item()) < 4 / math.sqrt(2000 * 8), "the draws of one query are apart"


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_no_number_depends_on_the_queries_taken_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    recordings = dataclasses.replace(noisy_recordings(7, 2, 16, 1.0), training_k=draw(40, 2, 5, 3))
    expected = icl.compare_recordings(recordings, seed=2, kendall_queries=4).per_layer
    monkeypatch.setattr(comparison_module, "QUERIES_AT_ONCE", at_once)
    got = icl.compare_recordings(recordings, seed=2, kendall_queries=4).per_layer
    other = icl.compare_recordings(recordings, seed=3, kendall_queries=4).per_layer
    assert tuple(got) == PER_LAYER
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=0, atol=1e-12, equal_nan=True, msg=name)
        drawn = ("random" in name or "null" in name) and "recall" not in name
        assert torch.equal(other[name].nan_to_num(), got[name].nan_to_num()) != drawn, name


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


def test_heads_that_did_not_change_are_left_out_of_sim_am_delta() -> None:
    recordings = noisy_recordings(6, 2, 8, 1.0)
    scores = {name: values.clone() for name, values in recordings.query_scores.items()}
    scores["FT"][:, 0, 1] = scores["ZSL"][:, 0, 1]
    scores["FT"][:, 1] = scores["ZSL"][:, 1]
    found = icl.compare_recordings(dataclasses.replace(recordings, query_scores=scores)).per_layer
    by_head = sim_am_delta(*(scores[name] for name in SETTINGS))
    torch.testing.assert_close(found["SimAMΔ"][:, 0], by_head[:, 0, 0])
    assert found["SimAMΔ random"][:, 0].isfinite().all()
    assert found["SimAMΔ"][:, 1].isnan().all()
    assert found["SimAMΔ random"][:, 1].isnan().all()


def test_random_changes_of_maps_score_nothing_but_their_maps_are_alike() -> None:
    recordings = noisy_recordings(300, 2, 8, 1.0)
    m = draw(1, 300, 2, 2, 40)
    scores = {"ZSL": m, "ICL": m + 0.1 * draw(2, 300, 2, 2, 40), "FT": m + 0.1 * draw(3, 300, 2, 2, 40)}
    lengths = np.random.default_rng(0).integers(20, 41, 300)
    for values in scores.values():
        for query, length in enumerate(lengths):
            values[query, ..., length:] = 0
    found = icl.compare_recordings(dataclasses.replace(recordings, query_scores=scores)).per_layer
    per_query = 1 / np.sqrt(2 * lengths)  # of two heads' mean cosine: padding has no part in it
    bound = 4 * math.sqrt((per_query**2).sum()) / 300
    assert (found["SimAMΔ random"].mean(0).abs() < bound).all()
    assert found["SimAMΔ random"].std().item() == pytest.approx(math.sqrt((per_query**2).mean()), rel=0.1)
    torch.testing.assert_close(
        found["SimAM random update"].mean(0), found["SimAM after FT"].mean(0), atol=0.002, rtol=0
    )
    assert (found["SimAM random update"] > 0.9).all()


def test_compare_holds_the_corrected_metrics_of_its_captures(runs: dict) -> None:
    found = icl.compare(**runs, seed=5)
    h = [runs[name].attn_out.double() for name in ("zero_shot", "in_context", "finetuned")]
    m = [runs[name].query_scores.double() for name in ("zero_shot", "in_context", "finetuned")]
    torch.testing.assert_close(found.per_layer["SimAOU unnormalised"], sim_aou_unnormalised(*h))
    torch.testing.assert_close(found.per_layer["SimAMΔ"], sim_am_delta(*m).nanmean(-1), equal_nan=True)
    assert found.per_layer["SimAMΔ"][:, 0].isnan().all(), "rotary scores of the first layer stay as they are"
    assert found.per_layer["SimAMΔ"][:, 1:].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), kv_heads=st.integers(1, 3), group=st.integers(1, 3), d_head=st.integers(1, 3))
def test_a_querys_product_with_keys_is_the_sum_over_heads(seed: int, kv_heads: int, group: int, d_head: int) -> None:
    n_heads = kv_heads * group
    q, k = draw(seed, 2, 3, n_heads, d_head), draw(seed + 1, 3, 4, kv_heads, d_head)
    got = finetuning_attention(k.flatten(2), query_by_kv_head(q.flatten(2), n_heads, kv_heads * d_head))
    for query, layer, token in np.ndindex(2, 3, 4):
        by_head = [float(q[query, layer, head] @ k[layer, token, head // group]) for head in range(n_heads)]
        assert got[query, layer, token].item() == pytest.approx(sum(by_head), abs=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_kendall_on_keys_scores_the_training_keys_head_by_head(
    models_by_architecture: Callable[[str], icl.Model], prompts: Prompts, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    runs = run_settings(model, prompts)
    found = icl.compare(**runs).per_layer["Kendall on keys"]
    delta, ft, in_context = runs["delta"], runs["finetuned"], runs["in_context"]
    own, group = of_demonstrations(delta), model.n_heads // model.n_key_value_heads
    assert group == {"llama": 2, "gpt2": 1}[architecture]
    for query, layer in ((0, 0), (3, 1), (6, 2)):
        of_tokens = np.zeros(len(own))
        for at, token in enumerate(own):
            for head in range(model.n_heads):
                of_tokens[at] += float(
                    ft.q[query, layer, head].double() @ delta.training_k[layer, token, head // group].double()
                )
        shown = in_context.context_scores[query, layer, prompts.demonstration_positions].double().numpy()
        assert found[query, layer].item() == pytest.approx(slow_tau(shown, of_tokens), abs=1e-12)


def test_recordings_without_keys_have_no_kendall_on_keys(runs: dict, tmp_path: Path) -> None:
    recordings = icl.Recordings.of(**runs)
    whole = icl.compare_recordings(recordings)
    without = icl.compare_recordings(dataclasses.replace(recordings, training_k=None))
    assert set(whole.per_layer) - set(without.per_layer) == {"Kendall on keys"}
    for name, values in without.per_layer.items():
        assert torch.equal(values.nan_to_num(), whole.per_layer[name].nan_to_num()), name
    without.save(tmp_path / "x")
    assert list(icl.Comparison.load(tmp_path / "x").per_layer) == [n for n in PER_LAYER if n != "Kendall on keys"]
    assert set(RELEASED_NAMES.values()) < set(without.released())


@pytest.fixture(scope="module")
def reordered(llama: icl.Model, task: icl.Task, runs: dict) -> Callable[[tuple[int, ...]], dict]:
    """Runs whose context has the demonstrations in another order than was finetuned on."""

    def run(order: tuple[int, ...]) -> dict:
        shown = task.demonstrations(4, seed=1)
        other = icl.build_prompts(llama, task, [shown[index] for index in order], task.queries(7))
        return runs | {"in_context": icl.capture(llama, other, progress=False)}

    return run


def positions_of(prompts: Prompts, demonstration: int) -> list[int]:
    """Where a demonstration's tokens stand in the context, counted one by one."""
    at = len(prompts.start)
    for index, tokens in enumerate(prompts.demonstrations):
        if index == demonstration:
            return list(range(at, at + len(tokens)))
        at += len(tokens) + len(prompts.separator)
    raise IndexError(demonstration)


@pytest.mark.parametrize("order", [(2, 0, 3, 1), (3, 2, 1, 0)])
@pytest.mark.parametrize("left_out", [(), (0,), (1, 3)])
def test_another_order_in_context_is_compared_demonstration_by_demonstration(
    reordered: Callable[[tuple[int, ...]], dict], order: tuple[int, ...], left_out: tuple[int, ...]
) -> None:
    runs = reordered(order)
    steps = [-1 if step in left_out else step for step in order]
    found = icl.compare(**runs, steps=steps).per_layer
    delta, shown, ft = runs["delta"], runs["in_context"], runs["finetuned"]
    context, trained, at = [], [], 0
    for step, tokens in enumerate(delta.demonstrations):
        at += 1  # its start token
        if step not in left_out:
            context += positions_of(shown.prompts, order.index(step))
            trained += range(at, at + len(tokens))
        at += len(tokens)
    for query, layer in ((0, 1), (5, 2)):
        scores = [
            float((ft.q[query, layer].double() * delta.training_q[layer, token].double()).sum()) for token in trained
        ]
        m_icl = shown.context_scores[query, layer, context].double().numpy()
        assert found["Kendall"][query, layer].item() == pytest.approx(slow_tau(m_icl, np.array(scores)), abs=1e-12)


def test_recordings_of_another_order_say_which_step_each_token_is(
    reordered: Callable[[tuple[int, ...]], dict],
) -> None:
    runs = reordered((2, 0, 3, 1))
    prompts = runs["in_context"].prompts
    segments = icl.Recordings.of(**runs, steps=[2, -1, 3, 1]).segments
    expected = prompts.segments.tolist()
    for demonstration, step in enumerate((2, SEPARATOR, 3, 1)):
        for position in positions_of(prompts, demonstration):
            expected[position] = step
    assert segments.tolist() == expected


def test_a_context_that_was_not_finetuned_on_at_all_has_no_rank_correlation(
    reordered: Callable[[tuple[int, ...]], dict],
) -> None:
    found = icl.compare(**reordered((1, 0, 2, 3)), steps=[-1] * 4).per_layer
    for name in ("Kendall", "Kendall random", "Kendall by demonstration", "Kendall on keys", "Top-100 recall"):
        assert found[name].isnan().all(), name
    assert found["SimAOU"].isfinite().all()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([2, 0, 3], "for each of 4 demonstrations"),
        ([2, 0, 3, 3], "a training step of its own"),
        ([2, 0, 3, 4], "got step 4 of no tokens; there are 4 steps"),
        ([3, 0, 2, 1], "expected a training step of 26 tokens for a demonstration of as many, got step 3 of 32"),
    ],
)
def test_steps_that_are_not_their_demonstrations_are_refused(
    reordered: Callable[[tuple[int, ...]], dict], steps: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        icl.compare(**reordered((2, 0, 3, 1)), steps=steps)
