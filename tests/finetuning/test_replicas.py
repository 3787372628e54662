"""Replicas of a finetuning against the same finetunings one by one."""

from collections.abc import Callable

import pytest
import torch
from finetuning_references import snapshot

import icl_dual as icl
from icl_dual.finetuning import Noise, finetune_with_replicas, replicas
from icl_dual.prompts import Prompts

LR = 0.05


def test_replicas_are_finetunings_at_other_rates_from_other_weights(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama", torch.float64)
    before = snapshot(model)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(2))
    finetuned = finetune_with_replicas(model, prompts, lr=LR, replicas=4, progress=False)
    expected = {
        "lr × 0.999": (LR * 0.999, None),
        "lr × 1.001, noise +1": (LR * 1.001, Noise(1)),
        "lr × 1, noise -1": (LR, Noise(1, -(2**-9))),
        "lr × 0.999, noise +2": (LR * 0.999, Noise(2)),
    }
    assert list(finetuned.replicas) == list(expected)
    deltas = {"": (finetuned.delta, LR, None)}
    deltas |= {name: (finetuned.replicas[name], *settings) for name, settings in expected.items()}
    for name, (delta, lr, noise) in deltas.items():
        by_itself = icl.finetune(model, prompts, lr=lr, noise=noise, progress=False)
        torch.testing.assert_close(delta.W_V, by_itself.W_V, rtol=1e-6, atol=1e-9, msg=name)
        assert (delta.lr, delta.noise) == (lr, noise)
    assert all(torch.equal(*pair) for pair in zip(before, snapshot(model), strict=True))


def test_without_replicas_or_with_factors_the_finetuning_itself_is_finetunes(
    llama: icl.Model, prompts: Prompts
) -> None:
    by_itself = icl.finetune(llama, prompts, lr=LR, factors=True, progress=False)
    alone = finetune_with_replicas(llama, prompts, lr=LR, replicas=0, progress=False)
    assert torch.equal(alone.delta.W_K, by_itself.W_K)
    assert not alone.replicas
    with_factors = finetune_with_replicas(llama, prompts, lr=LR, replicas=2, factors=True, progress=False)
    assert torch.equal(with_factors.delta.W_K, by_itself.W_K)
    assert with_factors.delta.factors is not None
    without = finetune_with_replicas(llama, prompts, lr=LR, replicas=2, progress=False)
    assert with_factors.names == without.names == tuple(without.replicas)
    for name, delta in without.replicas.items():
        other = with_factors.replicas[name]
        assert (other.lr, other.noise) == (delta.lr, delta.noise)
        torch.testing.assert_close(other.W_K, delta.W_K, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("n", [1, -1])
def test_a_single_replica_shows_no_spread(llama: icl.Model, prompts: Prompts, n: int) -> None:
    with pytest.raises(ValueError, match=rf"expected replicas as 0 for none, or at least 2, got {n}: one replica"):
        finetune_with_replicas(llama, prompts, lr=LR, replicas=n)


def test_a_finetuning_that_diverges_has_no_replicas(llama: icl.Model, prompts: Prompts) -> None:
    with pytest.raises(icl.DivergedError, match=r"at step \d of 4 with lr=1e\+06"):
        finetune_with_replicas(llama, prompts, lr=1e6, progress=False)


def test_a_replica_that_diverges_is_named(llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rate is too high here."""
    monkeypatch.setattr(replicas, "replica_settings", lambda lr, n: {"near": (lr, Noise(1)), "far": (1e6, Noise(2))})
    finetuned = finetune_with_replicas(llama, prompts, lr=LR, replicas=2, progress=False)
    assert list(finetuned.replicas) == ["near"]
    assert list(finetuned.diverged) == ["far"]
    assert finetuned.names == ("near", "far")
    assert "finetuning diverged at step" in finetuned.diverged["far"]


def test_random_deltas_of_replicas_have_their_norms(llama: icl.Model, prompts: Prompts) -> None:
    finetuned = finetune_with_replicas(llama, prompts, lr=LR, replicas=2, progress=False)
    random = finetuned.randomised(3)
    for name, delta in {"": finetuned.delta, **finetuned.replicas}.items():
        other = random.replicas[name] if name else random.delta
        torch.testing.assert_close(other.W_K.flatten(1).norm(dim=1), delta.W_K.flatten(1).norm(dim=1))
        assert torch.equal(other.W_K, delta.randomised(3).W_K)
