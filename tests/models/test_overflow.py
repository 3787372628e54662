"""Activations that overflow are reported with the layer where they first do."""

import pytest
import torch

import icl_dual as icl
from icl_dual.models import NonFiniteError, tiny_model
from icl_dual.models.overflow import is_finite


def overflowing(layer: int, at: str, arithmetic: torch.dtype | None = None) -> icl.Model:
    """A tiny model whose attention output, or whose MLP's, is too large for float16 at a layer."""
    model = tiny_model(dtype=torch.float16, arithmetic=arithmetic)
    block = model.wrapped.original_model.model.layers[layer]
    weights = [block.self_attn.o_proj] if at == "attention" else [block.mlp.down_proj, block.mlp.up_proj]
    with torch.no_grad():
        for linear in weights:
            linear.weight.mul_(3e4)
    return model


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("at", "name"), [("attention", "the attention output of layer"), ("mlp", "the residual stream after layer")]
)
def test_a_capture_and_finetuning_say_where_activations_overflow_first(
    task: icl.Task, layer: int, at: str, name: str
) -> None:
    model = overflowing(layer, at)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    expected = rf"computed in float16.*first in {name} {layer}: .*bfloat16.*arithmetic=torch\.float32"
    with pytest.raises(NonFiniteError, match=expected):
        icl.capture(model, prompts, progress=False)
    with pytest.raises(NonFiniteError, match=expected):
        icl.finetune(model, prompts, lr=1e-3, progress=False)
    with pytest.raises(NonFiniteError, match=expected):
        list(icl.finetune_many(model, [prompts], [1e-3], progress=False))
    with pytest.raises(NonFiniteError, match=expected):
        icl.finetune(model, prompts, lr=1e-3, config=icl.FinetuneConfig(method="layer-causal"), progress=False)


def test_float32_arithmetic_keeps_them_finite(task: icl.Task) -> None:
    model = overflowing(0, "attention", arithmetic=torch.float32)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    assert icl.capture(model, prompts, progress=False).label_log_probs.isfinite().all()


def test_damaged_weights_in_float32_are_reported_without_another_dtype(task: icl.Task) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.wrapped.original_model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    with pytest.raises(NonFiniteError, match="first in the residual stream after layer 1: check its weights"):
        icl.capture(model, prompts, progress=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_is_enough(value: float) -> None:
    tensor = torch.ones(3, 4)
    assert is_finite(tensor)
    tensor[1, 2] = value
    assert not is_finite(tensor)
