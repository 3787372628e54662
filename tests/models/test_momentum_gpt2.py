"""The decoder with momentum attention, against GPT-2 and against the definition summed by hooks of the test's own."""

from typing import Any

import pytest
import torch
from helpers import with_momentum
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from icl_dual.models import momentum_gpt2
from icl_dual.models.momentum_gpt2 import MomentumConfig, MomentumForCausalLM
from icl_dual.momentum import Momentum, decaying_sum_reference

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.3,
}


def make(eta: float | str) -> Any:  # its modules are known to transformers, not to types
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MomentumForCausalLM(MomentumConfig(**SHAPE, eta=eta)).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


def by_hand(model: MomentumForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a GPT-2 of these weights, to whose heads hooks add the definition's sum."""
    plain = model.without_momentum()
    with_momentum(plain, "gpt2", model.eta)
    with torch.no_grad():
        return plain(ids).logits


@pytest.mark.parametrize("eta", [0.3, 0.9, "learned"])
def test_every_head_adds_the_decaying_sum_of_its_past_values(eta):
    model, ids = make(eta), tokens(3, 40)
    if eta == "learned":
        for number, block in enumerate(model.transformer.h):
            block.attn.eta_logit.data.copy_(torch.linspace(-2, 3, 4) - number)
    with torch.no_grad():
        got = model(ids).logits
    torch.testing.assert_close(got, by_hand(model, ids), atol=2e-5, rtol=1e-5)
    assert (got - model.without_momentum()(ids).logits).abs().max() > 0.1


def test_without_momentum_it_is_gpt2_bit_for_bit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2: Any = GPT2LMHeadModel(GPT2Config(**SHAPE)).eval()
    ids = tokens(2, 40)
    expected = gpt2(ids, labels=ids)
    for eta in (0.0, 0.5, "learned"):  # the same weights are drawn whatever is added
        plain = make(eta).without_momentum()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), gpt2.parameters(), strict=True))
    model = make(0.0)
    found = model(ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    for loss in (found.loss, expected.loss):
        loss.backward()
    for ours, theirs in zip(model.parameters(), gpt2.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_decoding_with_a_cache_is_the_whole_pass():
    model, ids = make(0.9), tokens(3, 40)
    with torch.no_grad():
        whole = model(ids).logits
        parts, cache = [], None
        for first, end in ((0, 20), (20, 21), (21, 22), (22, 40)):  # prefill, tokens, and several at once
            step = model(ids[:, first:end], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)
    greedy = model.generate(ids[:, :10], max_new_tokens=8, do_sample=False, pad_token_id=0)
    for n in range(10, 18):
        assert torch.equal(greedy[:, n], model(greedy[:, :n]).logits[:, -1].argmax(-1))
    mask = torch.ones(3, 15, dtype=torch.long)
    mask[:, :5] = 0
    padded = torch.cat((ids[:, :5], ids[:, :10]), dim=1)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(left[:, 15:], greedy[:, 10:])


def test_padding_and_packed_documents_do_not_leak():
    model = make(0.9)
    a, b = tokens(1, 20), tokens(1, 35)[:, 20:]
    with torch.no_grad():
        alone = [model(ids).logits for ids in (a, b)]
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, :5] = 0
        batch = torch.cat((a, torch.cat((tokens(1, 5), b), dim=1)))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        left = model(batch, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(left.logits[:1], alone[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(left.logits[1:, 5:], alone[1], atol=2e-5, rtol=1e-5)
        cached = model(batch[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12], use_cache=True)
        rest = model(
            batch[:, 12:], attention_mask=mask, position_ids=positions[:, 12:], past_key_values=cached.past_key_values
        )
        torch.testing.assert_close(rest.logits[1:], alone[1][:, 7:], atol=2e-5, rtol=1e-5)
        packed = torch.cat((torch.arange(20), torch.arange(15)))[None]
        both = model(torch.cat((a, b), dim=1), position_ids=packed, use_cache=False).logits
        torch.testing.assert_close(both, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-5)


def test_it_saves_and_loads_itself(tmp_path):
    model, ids = make("learned"), tokens(1, 9)
    model.transformer.h[1].attn.eta_logit.data[2] = 1.5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MomentumForCausalLM)
    assert torch.equal(loaded.eta, model.eta)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("eta", [-0.1, 1.0, float("nan"), "fixed"])
def test_a_decay_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match=r"expected eta (as a number )?from 0 to below 1"):
        MomentumConfig(**SHAPE, eta=eta)


def test_a_sequence_longer_than_the_context_is_refused():
    model = make(0.5)
    with pytest.raises(ValueError, match="at most 64 tokens, the model's context, got 65"):
        model(tokens(1, 65))
    cache = model(tokens(1, 64), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="got 65"):
        model(tokens(1, 1), past_key_values=cache)


def test_a_hole_in_the_mask_begins_a_text_anew_in_every_pass():
    model, ids = make(0.9), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 6:9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    real = mask.bool()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        for first in (12, 19):
            cached = model(
                ids[:, :first], attention_mask=mask[:, :first], position_ids=positions[:, :first], use_cache=True
            )
            cache = cached.past_key_values
            rest = model(ids[:, first:], attention_mask=mask, position_ids=positions[:, first:], past_key_values=cache)
            torch.testing.assert_close(rest.logits, whole[:, first:], atol=2e-5, rtol=1e-5)
        # The same mask, as the number that is added to scores.
        shown = real[:, None, None] & torch.ones(20, 20, dtype=torch.bool).tril()
        added = torch.zeros(shown.shape).masked_fill(~shown, -1e9)
        by_number = model(ids, attention_mask=added, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(by_number[real], whole[real], atol=2e-5, rtol=1e-5)


def test_what_would_leave_momentum_out_is_refused():
    model, ids = make(0.9), tokens(1, 6)
    with pytest.raises(ValueError, match=r"expected a cache that grows with the tokens .* got StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", do_sample=False, pad_token_id=0)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"expected the attention implementation 'icl_dual_momentum', .* got 'eager'"):
        model(ids)


def test_a_learned_decay_stays_below_one_and_in_float32():
    model, ids = make("learned"), tokens(1, 30)
    for block in model.transformer.h:
        block.attn.eta_logit.data.fill_(40.0)
    assert (model.eta < 1).all()
    assert model(ids).logits.isfinite().all()
    half = model.to(torch.bfloat16)
    assert half.eta.dtype == torch.float32
    assert (half.eta < 1).all()


def test_under_autocast_sums_keep_their_precision():
    model, ids = make(0.99), tokens(1, 60)
    found: list[torch.Tensor] = []
    own = momentum_gpt2.decaying_sum

    def summed(*args: Any, **kwargs: Any) -> Momentum:
        found.append(own(*args, **kwargs).z)
        expected = decaying_sum_reference(args[0].double(), args[1].double())
        torch.testing.assert_close(found[-1].double(), expected, atol=1e-5, rtol=1e-5)
        return own(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(momentum_gpt2, "decaying_sum", summed)
        logits = model(ids).logits
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert logits.isfinite().all()


def test_gradients_are_those_of_sums_that_are_kept(monkeypatch):
    ids = tokens(2, 40)
    found = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(momentum_gpt2, "checkpoint", lambda sums, *args, **options: sums(*args))
        model = make("learned")
        model(ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert all((block.attn.eta_logit.grad != 0).all() for block in model.transformer.h)


def test_one_mask_may_stand_for_a_whole_batch():
    model, ids = make("learned"), tokens(3, 20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[8:, :8] = False  # two texts
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    one, each = (
        model(ids, attention_mask=mask.expand(n, 1, 20, 20), position_ids=positions, use_cache=False).logits
        for n in (1, 3)
    )
    assert torch.equal(one, each)
    torch.testing.assert_close(one[:, 8:], model(ids[:, 8:]).logits, atol=2e-5, rtol=1e-5)
