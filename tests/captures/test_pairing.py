"""Captures and deltas that do not belong together are refused, and each message names the argument."""

import dataclasses

import pytest
import torch

import icl_dual as icl
from icl_dual.captures.pairing import (
    check_demonstrations,
    check_fields,
    check_paired,
    check_settings,
    check_start_weights,
    check_training_sequences,
    of_shared_tokens,
)
from icl_dual.prompts import Prompts


@pytest.fixture(scope="module")
def in_context(llama: icl.Model, prompts: Prompts) -> icl.Capture:
    return icl.capture(llama, prompts, fields=("q", "full_prompt"), progress=False)


@pytest.fixture(scope="module")
def zero_shot(llama: icl.Model, prompts: Prompts) -> icl.Capture:
    return icl.capture(llama, prompts.zero_shot(), fields=("q",), progress=False)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    model: str
    fingerprint: str
    demonstrations: list[list[int]]


def test_a_missing_field_is_named_with_its_capture(in_context: icl.Capture, zero_shot: icl.Capture) -> None:
    check_fields(("q", "full_prompt"), in_context=in_context)
    check_fields(("q",), in_context=in_context, zero_shot=zero_shot)
    with pytest.raises(ValueError, match=r"expected zero_shot captured with .*, got Capture.* without 'full_prompt'"):
        check_fields(("q", "full_prompt"), in_context=in_context, zero_shot=zero_shot)


def test_captures_of_one_model_and_its_queries_are_paired(
    llama: icl.Model, in_context: icl.Capture, zero_shot: icl.Capture
) -> None:
    check_paired(llama, zero_shot=zero_shot, in_context=in_context)
    with pytest.raises(ValueError, match=r"expected zero_shot to be without demonstrations, .* swapped"):
        check_paired(llama, zero_shot=in_context, in_context=zero_shot)
    with pytest.raises(ValueError, match=r"same queries at the same positions: .*, got Prompts\(7 .* and Prompts\(2 "):
        check_paired(llama, zero_shot=zero_shot.first(2), in_context=in_context)
    for change, message in (
        ({"model": "other"}, "expected captures of the model given, got .*'zero_shot': 'other'"),
        ({"fingerprint": "0"}, "got other weights .*'zero_shot': '0'"),
        ({"hooks": "blocks.0"}, "with the hooks that are on the model now, got others .*'zero_shot': 'blocks.0'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_paired(llama, zero_shot=dataclasses.replace(zero_shot, **change), in_context=in_context)


def test_three_settings_are_of_one_model_and_two_weights(in_context: icl.Capture, zero_shot: icl.Capture) -> None:
    finetuned = dataclasses.replace(zero_shot, fingerprint="tuned")
    settings = {"zero_shot": zero_shot, "in_context": in_context, "finetuned": finetuned}
    check_settings(**settings)
    changed = dataclasses.replace
    for name, capture, message in (
        ("in_context", changed(in_context, model="other"), "expected captures of one model, got .*'other'"),
        ("zero_shot", in_context, "expected captures of the same queries .* zero_shot of in_context's"),
        ("finetuned", changed(in_context, fingerprint="tuned"), "same queries: finetuned of in_context's"),
        ("in_context", changed(in_context, fingerprint="0"), "zero_shot and in_context captured with the same weights"),
        ("finetuned", zero_shot, "expected finetuned captured with finetuned weights, got a capture with zero_shot's"),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings(**(settings | {name: capture}))


def test_a_full_prompt_pass_over_other_tokens_is_refused(in_context: icl.Capture) -> None:
    assert in_context.full_prompt is not None
    other = in_context.full_prompt._replace(tokens=in_context.full_prompt.tokens[:-1])
    message = r"expected full_prompt over the first query's prompt, got one over \d+ other tokens"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(in_context, full_prompt=other)


def test_a_delta_of_other_weights_or_demonstrations_is_refused(
    in_context: icl.Capture, zero_shot: icl.Capture, prompts: Prompts
) -> None:
    demonstrations = [list(tokens) for tokens in prompts.demonstrations]
    delta = Finetuned(in_context.model, in_context.fingerprint, demonstrations)
    check_start_weights(delta, in_context)
    check_training_sequences(delta, in_context, "finetune on them")
    for name in ("model", "fingerprint"):
        with pytest.raises(ValueError, match=r"delta finetuned from the weights of 'llama' .*, got one from .*other"):
            check_start_weights(dataclasses.replace(delta, **{name: "other"}), in_context)
    with pytest.raises(
        ValueError, match=r"on the 4 demonstrations .*, in their order, got one of 4 .*: finetune on them"
    ):
        check_training_sequences(
            dataclasses.replace(delta, demonstrations=demonstrations[::-1]), in_context, "finetune on them"
        )
    check_demonstrations(in_context)
    with pytest.raises(ValueError, match="expected in_context's prompts to have demonstrations, got none"):
        check_demonstrations(zero_shot)


def test_captures_with_and_without_momentum_are_not_paired(llama: icl.Model, prompts: Prompts) -> None:
    fields = icl.DECOMPOSE_FIELDS
    zsl = icl.capture(llama, prompts.zero_shot(), fields=fields, progress=False)
    with icl.momentum_attention(llama, 0.1):
        got = icl.capture(llama, prompts, fields=fields, progress=False)
        with pytest.raises(ValueError, match=r"captures of the model given, got .*'zero_shot': 'llama'}"):
            icl.decompose(llama, zero_shot=zsl, in_context=got)
        renamed = dataclasses.replace(zsl, model=llama.name)
        with pytest.raises(ValueError, match=r"other weights .* `with momentum_attention\(model, eta\):` and the same"):
            icl.decompose(llama, zero_shot=renamed, in_context=got)
    with pytest.raises(ValueError, match=r"captures of the model given, got .*'in_context': 'llama \+ momentum η=0.1'"):
        icl.decompose(llama, zero_shot=zsl, in_context=got)


@pytest.mark.parametrize("n_heads", [(), (3,)], ids=["by layer", "by layer and head"])
@pytest.mark.parametrize("zero_shot", [((5, 6, 7), (5, 6)), ((5, 6, 7), (8, 5, 6)), ((5, 6, 9, 9), (5, 4))])
def test_values_of_tokens_that_one_setting_alone_has_are_left_out(
    zero_shot: tuple[tuple[int, ...], ...], n_heads: tuple[int, ...]
) -> None:
    prompts = Prompts(queries=((5, 6, 7), (5, 6, 8)), zero_shot_queries=zero_shot, labels=((1,),), gold=(0, 0))
    shared = prompts.shared_query_tokens
    by_setting = {setting: 1 + torch.rand(2, 4, *n_heads, 4) for setting in ("ZSL", "ICL", "FT")}
    got = of_shared_tokens(by_setting, shared)
    longest = max(map(len, shared))
    for setting, values in by_setting.items():
        assert got[setting].shape == (2, 4, *n_heads, longest)
        for query, pairs in enumerate(shared):
            for at in range(longest):
                expected = values[query, ..., pairs[at][setting != "ICL"]] if at < len(pairs) else 0.0
                assert (got[setting][query, ..., at] == expected).all()
