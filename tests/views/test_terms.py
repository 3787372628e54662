"""What a view shows: every token's numbers against plain attention over the full prompt, and sums that are exact."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FullPrompts, make_rows
from hypothesis import given
from hypothesis import strategies as st
from viewed import captured_pair, random_terms

import icl_dual as icl
from icl_dual.views.encoding import encoded_view, quantised, to_json
from icl_dual.views.terms import ViewTerms

QUERY = 2


@pytest.fixture(scope="module")
def pair(llama: icl.Model, prompts: icl.Prompts) -> dict[str, icl.Capture]:
    return captured_pair(llama, prompts)


@pytest.fixture(scope="module")
def decomposition(llama: icl.Model, pair: dict[str, icl.Capture]) -> icl.Decomposition:
    return icl.decompose(llama, **pair)


@pytest.fixture(scope="module")
def terms(decomposition: icl.Decomposition, pair: dict[str, icl.Capture]) -> ViewTerms:
    return icl.view(decomposition, QUERY, zero_shot=pair["zero_shot"]).terms


def plain_weights(attention: Any, head: int) -> tuple[np.ndarray, np.ndarray]:
    """The softmax weights of the last position at one head, and the values, in plain numpy."""
    q, k, v = (tensor[0].double().numpy() for tensor in (attention.q, attention.k, attention.v))
    kv_head = head // (q.shape[1] // k.shape[1])
    scores = k[:, kv_head] @ q[-1, head] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum(), v[:, kv_head]


def test_tokens_have_the_weights_and_contributions_of_plain_attention(
    llama: icl.Model, prompts: icl.Prompts, terms: ViewTerms
) -> None:
    """The contribution of a demonstrations' token is w_j (v_j − z_0) W_O, along the layer's sum of all of these."""
    W_O = llama.output_projections()[0].double().numpy()
    is_demo = np.array(
        [segment != -1 for segment in prompts.segments.tolist()] + [False] * len(prompts.suffixes[QUERY])
    )
    is_demo[: len(prompts.start)] = False
    contribution, weight = terms.quantities
    for layer, attention in enumerate(FullPrompts(llama, prompts).attention(QUERY)):
        by_head = []
        for head in range(llama.n_heads):
            weights, values = plain_weights(attention, head)
            z_0 = weights[~is_demo] @ values[~is_demo] / weights[~is_demo].sum()
            by_head.append((weights * is_demo)[:, None] * (values - z_0) @ W_O[layer, head])
            expected = [weights[piece.first : piece.last + 1].sum() for piece in terms.pieces]
            np.testing.assert_allclose(weight.values[layer, head], expected, atol=1e-6)
        direct = sum(added.sum(0) for added in by_head)
        for head, added in enumerate(by_head):
            shares = added @ direct / (direct @ direct)
            expected = [shares[piece.first : piece.last + 1].sum() for piece in terms.pieces]
            np.testing.assert_allclose(contribution.values[layer, head], expected, atol=2e-5)


def test_sums_are_those_of_the_decomposition(decomposition: icl.Decomposition, terms: ViewTerms) -> None:
    contribution, weight = terms.quantities
    assert terms.groups == decomposition.groups
    torch.testing.assert_close(weight.sums, decomposition.mass[QUERY])
    torch.testing.assert_close(contribution.sums.sum(1), decomposition.icl_share[QUERY], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(contribution.sums.sum((1, 2)), torch.ones(len(terms.layers)).double())
    for numbers in terms.quantities:
        for group, name in enumerate(terms.groups):
            units = [piece.unit for piece in terms.pieces if piece.group == group]
            torch.testing.assert_close(numbers.values[..., units].sum(-1), numbers.sums[..., group], msg=name)
    norms = terms.head_numbers
    heads = torch.einsum("lhd,lhdm->lhm", decomposition.delta_icl[QUERY], decomposition.W_O)
    torch.testing.assert_close(norms["direct, ‖ΔICL W_O‖"], heads.norm(dim=-1))
    torch.testing.assert_close(
        heads.sum(1), decomposition.direct[QUERY], msg="what the heads' terms sum to, ΔICL of the layer"
    )


def test_zero_shot_weights_are_those_of_the_zero_shot_run(
    llama: icl.Model, prompts: icl.Prompts, terms: ViewTerms
) -> None:
    zero_shot, without = terms.panes
    for layer, attention in enumerate(FullPrompts(llama, prompts.zero_shot()).attention(QUERY)):
        for head in range(llama.n_heads):
            weights = plain_weights(attention, head)[0]
            expected = [weights[piece.first : piece.last + 1].sum() for piece in zero_shot.pieces]
            np.testing.assert_allclose(zero_shot.values[layer, head], expected, atol=1e-6)
    torch.testing.assert_close(without.values.sum(-1), torch.ones(without.values.shape[:2]).double())
    in_context = terms.quantities[1].values[..., [p.unit for p in terms.pieces if p.group in (1, 2)]]
    torch.testing.assert_close(without.values, in_context / in_context.sum(-1, keepdim=True))
    assert [piece.text for piece in without.pieces] == [piece.text for piece in zero_shot.pieces]


def test_pieces_are_the_text_in_order_and_characters_of_several_tokens_are_one(
    model_of: Callable[[str], icl.Model],
) -> None:
    model = model_of("gpt2")
    rows = [{**row, "text": f"评论 👩‍🚀 שלום\n{row['text']}"} for row in make_rows()]
    task = icl.Task("toy", "{text} Label:", ("no", "yes"), rows)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(1))
    terms = icl.view(icl.decompose(model, **captured_pair(model, prompts))).terms
    tokens = (*prompts.prefix, *prompts.suffixes[0])
    assert "".join(piece.text for piece in terms.pieces) == model.tokenizer.decode(tokens)
    assert [at for piece in terms.pieces for at in range(piece.first, piece.last + 1)] == list(range(len(tokens)))
    characters = {piece.text for piece in terms.pieces if piece.last > piece.first}
    assert {"评", "论"} <= characters, "of several tokens each in this vocabulary"
    assert not any("\ufffd" in piece.text for piece in terms.pieces)


def test_a_capture_by_token_has_its_numbers_by_token_and_sums_by_source(llama: icl.Model, prompts: icl.Prompts) -> None:
    prompt = icl.prompt_from_query(prompts, QUERY)
    logits = [5, 9]
    by_token, by_source = (
        icl.capture_sources(llama, these, logits=logits, progress=False) for these in (prompt.by_token(), prompt)
    )
    terms = icl.view(by_token, sources=prompt, tokenizer=llama).terms
    assert terms.groups == prompt.names
    assert by_source.logit_effect is not None
    of_sources = [*by_source.logit_effect[0, 0].unbind(-1), by_source.share[0, 0], by_source.mass[0, 0]]
    for numbers, expected in zip(terms.quantities, of_sources, strict=True):
        torch.testing.assert_close(numbers.sums.float(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(numbers.values.sum(-1), numbers.sums.sum(-1))
    assert repr(llama.tokenizer.decode([5])) in terms.quantities[0].title
    alone = icl.view(by_source).terms
    assert not alone.by_piece
    for numbers, expected in zip(alone.quantities, of_sources, strict=True):
        assert torch.equal(numbers.values.float(), expected)
    assert "token 5" in alone.quantities[0].title, "without a tokenizer"
    assert icl.view(by_token).terms.groups == ("prompt",)


def test_a_loaded_decomposition_says_how_to_get_the_tokens_terms(
    decomposition: icl.Decomposition, prompts: icl.Prompts, tmp_path: Path
) -> None:
    decomposition.save(tmp_path / "saved")
    loaded = icl.Decomposition.load(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"got one that was loaded, which has no keys: call icl_dual\.decompose"):
        icl.view(loaded, tokenizer=prompts.tokenizer)


def test_arguments_that_do_not_fit_are_refused(
    llama: icl.Model, prompts: icl.Prompts, decomposition: icl.Decomposition, pair: dict[str, icl.Capture]
) -> None:
    prompt = icl.prompt_from_query(prompts)
    by_token = icl.capture_sources(llama, prompt.by_token(), progress=False)
    without_keys = replace(pair["zero_shot"], keys_values=None)
    without_tokenizer = replace(decomposition, prompts=replace(prompts, tokenizer=None))
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: icl.view(decomposition, 7), IndexError, "query"),
        (lambda: icl.view(without_tokenizer), icl.PromptError, "pass tokenizer=model"),
        (lambda: icl.view(decomposition, sources=prompt), ValueError, "leave them out"),
        (lambda: icl.view(decomposition, zero_shot=pair["in_context"]), ValueError, "expected zero_shot as"),
        (lambda: icl.view(decomposition, zero_shot=without_keys), ValueError, "fields=icl_dual.DECOMPOSE_FIELDS"),
        (
            lambda: icl.view(by_token, zero_shot=pair["zero_shot"]),
            ValueError,
            "expected zero_shot with a Decomposition",
        ),
        (lambda: icl.view(by_token, sources=icl.prompt_from_query(prompts, 1)), icl.PromptError, "by_token"),
        (
            lambda: icl.view(icl.capture_sources(llama, prompt, progress=False), sources=prompt),
            ValueError,
            "expected a capture by token",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            call()
    assert str(icl.view(without_tokenizer, tokenizer=llama)) == str(icl.view(decomposition))


@given(st.lists(st.floats(allow_infinity=True, width=32), min_size=1, max_size=9), st.sampled_from((8, 16)))
def test_rounding_is_half_a_step_at_most(values: list[float], n_bits: int) -> None:
    counts, steps = quantised(torch.tensor([[values]]).double(), n_bits)
    assert counts.dtype.itemsize * 8 == n_bits
    for value, count in zip(np.array(values), counts[0, 0].tolist(), strict=True):
        if np.isfinite(value):
            assert abs(count * float(steps[0, 0]) - value) <= float(steps[0, 0]) * (0.5 + 1e-2)
        else:
            assert count == -(2 ** (n_bits - 1))


@pytest.mark.parametrize(("n_quantities", "n_bits"), [(2, 16), (4, 8)])
def test_pages_of_30_layers_9_heads_and_800_tokens_stay_below_2_mb(n_quantities: int, n_bits: int) -> None:
    terms = random_terms(30, 9, 800, n_quantities)
    assert encoded_view(terms)["bits"] == n_bits
    assert len(icl.InteractiveView(terms).page.encode()) <= 2_000_000


def test_json_ends_no_element_and_keeps_lone_surrogates() -> None:
    text = "</script><!-- & \ud800 \u2028"
    encoded = to_json({"text": text})
    assert encoded.isascii()
    assert not set("<>&") & set(encoded)
