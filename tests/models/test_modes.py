"""Modes that a user sets: training or evaluation module by module, and torch.inference_mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint

import icl_dual as icl


def modes(model: icl.Model, but: type[torch.nn.Module] | None = None) -> dict[str, bool]:
    """The mode of every module but those of a class, of the bridge and of the original model, whose top is not among
    the bridge's."""
    original = model.wrapped.original_model
    return {
        f"{root} {name}": module.training
        for root, modules in (("bridge", model.wrapped.named_modules()), ("original", original.named_modules()))
        for name, module in modules
        if type(module) is not but
    }


@pytest.mark.parametrize("switch", ["all train", "all evaluate", "every third trains", "top alone trains"])
def test_modes_come_back_one_by_one(make_model: Callable[..., icl.Model], prompts: icl.Prompts, switch: str) -> None:
    model = make_model("llama")
    original: Any = model.wrapped.original_model
    original.train(switch == "all train")
    model.wrapped.train(switch == "all train")
    for index, module in enumerate(original.modules()):
        if switch == "every third trains":
            module.training = index % 3 == 0
    if switch == "top alone trains":
        original.training = original.model.training = True
    before = modes(model)
    seen: list[set[bool]] = []
    handle = original.lm_head.register_forward_pre_hook(lambda *_: seen.append({*modes(model, but=HookPoint).values()}))
    icl.capture(model, prompts, fields=(), progress=False)
    handle.remove()
    assert seen
    assert all(during == {False} for during in seen), "no dropout while it runs"
    assert modes(model) == before
    icl.finetune(model, prompts, lr=0.01, progress=False)
    assert modes(model) == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_mode_changes_nothing(llama: icl.Model, prompts: icl.Prompts, mode: type) -> None:
    expected = icl.finetune(llama, prompts, lr=0.01, progress=False)
    with mode():
        delta = icl.finetune(llama, prompts, lr=0.01, progress=False)
        many = list(icl.finetune_many(llama, [prompts, prompts], [0.01, 0.01], progress=False))
        capture = icl.capture(llama, prompts, progress=False)
    assert torch.equal(delta.W_V, expected.W_V)
    for result in many:
        assert isinstance(result, icl.WeightDelta)
        torch.testing.assert_close(result.W_V, expected.W_V, atol=1e-6, rtol=1e-3)
    assert not capture.label_log_probs.is_inference(), "what is made there can be changed later"
    assert not delta.W_V.is_inference()


def test_a_model_made_in_inference_mode_is_not_finetuned(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    with torch.inference_mode():
        model = make_model("llama")
    with pytest.raises(ValueError, match=r"expected a model that was loaded outside of torch\.inference_mode\(\), got"):
        icl.finetune(model, prompts, lr=0.01, progress=False)
    capture = icl.capture(model, prompts, fields=(), progress=False)
    assert capture.label_log_probs.isfinite().all()
