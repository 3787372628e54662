import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_settings
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.metrics import (
    PER_LAYER,
    by_demonstration,
    demonstration_weights,
    finetuning_attention,
    kendall,
    kendall_random,
    rec2ftp,
    sim_am,
    sim_am_random,
    sim_aou,
    sim_aou_random,
    top_recall,
)
from icl_dual.prompts import Prompts


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))


def slow_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ-b by counting every pair."""
    agreement, ties_a, ties_b = 0, 0, 0
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    for i, j in pairs:
        agreement += int(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))
        ties_a += int(a[i] == a[j])
        ties_b += int(b[i] == b[j])
    return agreement / math.sqrt((len(pairs) - ties_a) * (len(pairs) - ties_b))


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
    gold, wrong = torch.zeros(200, dtype=torch.long), torch.ones(200, dtype=torch.long)
    icl_ = torch.cat((gold[:50], wrong[50:]))  # a quarter of what is dealt is right, whoever gets it
    found = rec2ftp(gold, wrong, icl_, gold, seed=3)
    assert found.random == pytest.approx(0.25)
    half = rec2ftp(gold, torch.cat((wrong[:20], gold[20:])), icl_, gold, seed=3)
    assert half.random == pytest.approx(0.25, abs=0.02)
    assert half == rec2ftp(gold, torch.cat((wrong[:20], gold[20:])), icl_, gold, seed=3)


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


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), tokens=st.integers(2, 9), ties=st.booleans())
def test_kendall_equals_counting_pairs(seed: int, tokens: int, ties: bool) -> None:
    a, b = draw(seed, 2, 2, tokens), draw(seed + 1, 2, 2, tokens)
    if ties:
        a, b = a.round(), b.round()
    got = kendall(a, b)
    for query in range(2):
        for layer in range(2):
            x, y = a[query, layer].numpy(), b[query, layer].numpy()
            if len(set(x.tolist())) > 1 and len(set(y.tolist())) > 1:
                assert got[query, layer].item() == pytest.approx(slow_tau(x, y), abs=1e-12)
            else:
                assert got[query, layer].isnan()


def test_kendall_by_hand() -> None:
    up = torch.arange(5.0).view(1, 1, 5)
    assert kendall(up, up**3).item() == pytest.approx(1.0)
    assert kendall(up, -up).item() == pytest.approx(-1.0)
    swapped = torch.tensor([[[1.0, 0.0, 2.0, 3.0, 4.0]]])
    assert kendall(up, swapped).item() == pytest.approx(0.8)  # one pair of ten disagrees
    many = draw(0, 40, 2, 60)
    assert abs(kendall_random(many, seed=1).mean().item()) < 0.03


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
    zsl, in_context, ft = (runs[name] for name in ("zsl", "icl", "ft"))
    torch.testing.assert_close(
        found.per_layer["SimAOU"], sim_aou(*(run.attn_out.double() for run in (zsl, in_context, ft)))
    )
    before = sim_am(in_context.query_scores.double(), zsl.query_scores.double()).mean(-1)
    after = sim_am(in_context.query_scores.double(), ft.query_scores.double()).mean(-1)
    torch.testing.assert_close(found.per_layer["SimAM before FT"], before)
    torch.testing.assert_close(found.per_layer["SimAM after FT"], after)
    own = runs["delta"].training_q[:, of_demonstrations(runs["delta"])]
    m_ft = finetuning_attention(own.flatten(2), ft.q.flatten(2)) / ft.q.shape[-1]
    m_icl = in_context.context_scores[..., in_context.prompts.demonstration_positions].double()
    torch.testing.assert_close(found.per_layer["Kendall"], kendall(m_icl, m_ft))
    assert found.rec2ftp == rec2ftp(zsl.gold, zsl.predictions, in_context.predictions, ft.predictions, seed=5)
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
    runs = runs | {"ft": dataclasses.replace(runs["ft"], attn_out=runs["ft"].attn_out.clone())}
    runs["ft"].attn_out[2, 1] = runs["zsl"].attn_out[2, 1]
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
    return len(runs["icl"].prompts.demonstration_positions)


def test_captures_that_do_not_belong_together_are_refused(runs: dict, llama: icl.Model, task: icl.Task) -> None:
    def refused(message: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=message):
            icl.compare(**{**runs, **changed})

    refused("of one model", zsl=dataclasses.replace(runs["zsl"], model="other"))
    refused("of the same queries", zsl=runs["icl"])
    refused("with zsl's weights", ft=runs["zsl"])
    refused("zsl and icl captured with the same weights", zsl=runs["ft"])
    refused("without 'q'", ft=dataclasses.replace(runs["ft"], q=None))
    refused("to have demonstrations", icl=runs["zsl"])
    other = icl.build_prompts(llama, task, task.demonstrations(2, seed=9), task.queries(3))
    reversed_ = dataclasses.replace(runs["delta"], demonstrations=runs["delta"].demonstrations[::-1])
    refused("in their order", delta=reversed_)
    refused("finetuned on the", delta=icl.finetune(llama, other, lr=0.05, progress=False))
