"""Momentum as an intervention: what it adds, and that the model comes back unchanged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import past_sum, snapshot, some_eta

import icl_dual as icl


def test_momentum_is_of_the_passs_own_values_and_comes_after_a_replaced_z(llama: icl.Model) -> None:
    ids, eta = torch.arange(12).view(2, 6), some_eta()
    W_O, _ = llama.output_projections()
    values: list[torch.Tensor] = []
    softmax: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def show(layer: int, attention: Any) -> torch.Tensor:
        values.append(attention.v.repeat_interleave(2, dim=2))
        softmax.append(attention.z.clone())
        return torch.ones_like(attention.z)

    with icl.momentum_attention(llama, eta, layers=[0, 1]), torch.no_grad():
        llama.run(ids, on_attention=show, on_output=lambda layer, output: outputs.append(output))
    with torch.no_grad():
        llama.run(ids, on_attention=show)
    torch.testing.assert_close(softmax[0], softmax[3])  # the first layer's, before anything is added
    for layer in range(3):
        added = past_sum(values[layer], eta[layer] if layer < 2 else torch.zeros(4))
        expected = torch.einsum("bphd,hdm->bpm", 1 + added, W_O[layer])
        torch.testing.assert_close(outputs[layer], expected)


def test_the_model_comes_back_from_momentum_as_it_was(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    model = make_model("llama")
    before, ids = snapshot(model), torch.arange(6)[None]
    icl.capture(model, prompts, fields=(), progress=False)
    was = model.name, model.pass_residual, model.fingerprint()
    with torch.no_grad():
        plain = model.run(ids)
        with icl.momentum_attention(model, 0.5) as within:
            assert within is model
            assert model.pass_residual is None
            assert not torch.allclose(model.run(ids), plain, atol=0.1)
            assert model.fingerprint() != was[2]
            icl.capture(model, prompts, fields=(), progress=False)
            assert model.pass_residual not in (None, was[1])
        with pytest.raises(KeyError), icl.momentum_attention(model, 0.5):
            raise KeyError
        assert torch.equal(model.run(ids), plain)
    assert (model.name, model.pass_residual, model.fingerprint()) == was
    assert model.momentum is None
    assert all(map(torch.equal, snapshot(model), before))
    assert not any(point.fwd_hooks for point in model.wrapped.hook_dict.values())


def test_momentum_of_zero_is_the_model_itself_bit_for_bit(llama: icl.Model, prompts: icl.Prompts) -> None:
    plain = icl.capture(llama, prompts, progress=False)
    with icl.momentum_attention(llama, 0):
        got = icl.capture(llama, prompts, progress=False)
    for name in ("attn_out", "label_log_probs", "context_scores"):
        assert torch.equal(getattr(got, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("eta", "layers", "words"),
    [
        (0.3, None, "η=0.3"),
        (0, None, "η=0"),
        (torch.tensor([0.1, 0.0, 0.6, 0.2], dtype=torch.float64), None, "η=0 to 0.6"),
        (0.25, [2], "η=0.25 in layer 2"),
        (torch.tensor([[0.5] * 4, [0.5] * 4, [0.0] * 4]), None, "η=0.5 in layers 0-1"),
        (0.5, [2, 0], "η=0.5 in layers 0, 2"),
    ],
)
def test_a_model_is_named_by_its_momentum(llama: icl.Model, eta: Any, layers: Any, words: str) -> None:
    with icl.momentum_attention(llama, eta, layers=layers) as model:
        assert model.name == f"llama + momentum {words}"
        assert f"momentum {words}, dtype" in repr(model)
        named = icl.control_model(model, "untrained", seed=1) if words == "η=0.3" else None
    if named is not None:
        assert named.name == "llama + momentum η=0.3 (untrained, seed 1)"
        assert named.momentum is not None
        assert (named.momentum == 0.3).all()


@pytest.mark.parametrize(
    ("eta", "layers", "message"),
    [
        (1.0, None, "expected eta from 0 to below 1, got 1"),
        (-0.1, None, "expected eta from 0 to below 1, got -0.1"),
        (float("nan"), None, "expected eta from 0 to below 1, got nan"),
        (torch.zeros(3), None, r"\[head\] = \[4\] or \[layer head\] = \[3, 4\], got shape \[3\]"),
        (0.1, [0, 3], r"expected layers from 0 to 2, got \[0, 3\]"),
        (0.1, [-1], r"expected layers from 0 to 2, got \[-1\]"),
    ],
)
def test_momentum_that_is_none_is_refused(llama: icl.Model, eta: Any, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), icl.momentum_attention(llama, eta, layers=layers):
        pass
    if layers is None:
        with pytest.raises(ValueError, match=message):
            icl.Model(llama.backend, momentum=eta)
    assert (llama.name, llama.momentum) == ("llama", None)


def test_a_model_may_have_momentum_of_its_own_and_no_second(llama: icl.Model) -> None:
    ids, eta = torch.arange(6)[None], some_eta()
    own = icl.Model(llama.backend, name="own", momentum=eta)
    with torch.no_grad():
        with icl.momentum_attention(llama, eta):
            expected = llama.run(ids)
            assert llama.fingerprint() == own.fingerprint()
            with pytest.raises(ValueError, match=r"without momentum, got 'llama \+ momentum .* with momentum η=0"):
                icl.momentum_attention(llama, 0.1).__enter__()
        assert torch.equal(own.run(ids), expected)
    with pytest.raises(ValueError, match="expected a model without momentum, got 'own'"):
        icl.momentum_attention(own, 0.1).__enter__()
    assert (own.name, llama.momentum) == ("own", None)


def test_positions_that_jump_are_refused_under_momentum(llama: icl.Model) -> None:
    ids, positions = torch.arange(3)[None], torch.tensor([0, 4, 5])
    with torch.no_grad():
        plain = llama.run(ids, positions=positions)
        with icl.momentum_attention(llama, 0):
            assert torch.equal(llama.run(ids, positions=positions), plain)
        with icl.momentum_attention(llama, 0.1), pytest.raises(ValueError, match=r"one after another, got \[0, 4, 5\]"):
            llama.run(ids, positions=positions)
