"""The tiny model of the examples: always the same for a seed, and a model like any other."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.models import tiny_model

MODEL = tiny_model()


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_any_text_has_one_token_a_byte(text: str) -> None:
    tokens = MODEL.encode(text)
    assert tokens == [1 + byte for byte in text.encode()]
    assert MODEL.tokenizer.decode(tokens) == text


def test_its_weights_are_those_of_its_seed_and_no_random_state_moves() -> None:
    state = torch.get_rng_state()
    again, other = tiny_model(), tiny_model(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fingerprint() == MODEL.fingerprint() != other.fingerprint()
    assert again.provenance != other.provenance


def test_it_captures_decomposes_and_finetunes(task: icl.Task) -> None:
    prompts = icl.build_prompts(MODEL, task, task.demonstrations(4, seed=1), task.queries(3))
    zero_shot, in_context = (
        icl.capture(MODEL, of, fields=icl.DECOMPOSE_FIELDS, progress=False) for of in (prompts.zero_shot(), prompts)
    )
    split = icl.decompose(MODEL, zero_shot=zero_shot, in_context=in_context)
    assert split.residual < 2e-6
    assert (split.demonstration_mass > 0.1).any(), "attention to demonstrations is large enough to show something"
    assert (icl.finetune(MODEL, prompts, lr=0.05, progress=False).W_V != 0).any()
