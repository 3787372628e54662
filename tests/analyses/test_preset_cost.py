"""The formulas against torch's own counter, on a tiny model of the paper's architecture."""

from collections.abc import Callable

import growth
import preset_cost
import pytest
import torch
from preset_cost import Shape, Tokens

import icl_dual as icl


@pytest.mark.parametrize(("k", "n"), [(2, 3), (6, 12)])
def test_flops_are_those_that_torch_counts(models_by_architecture: Callable[[str], icl.Model], k: int, n: int) -> None:
    model = models_by_architecture("xglm")
    # Label words of one token, as the paper's are, and queries of like length that begin with different tokens.
    rows = [{"text": f"{chr(97 + number % 26)}{number:02d} good film", "label": number % 2} for number in range(100)]
    task = icl.Task("toy", "{text}", ("no", "yes"), rows, protocol="reference")
    prompts = icl.build_prompts(model, task, task.demonstrations(k, 1), task.queries(n))
    assert {len(label) for label in prompts.labels} == {1}
    shape = Shape(model.n_layers, model.d_model, model.n_heads, 48, model.d_vocab)
    counted = preset_cost.flops(shape, Tokens(n, len(prompts.prefix), sum(map(len, prompts.suffixes))))
    icl.capture(model, prompts, progress=False)  # a model's first capture checks it, too

    def finetune() -> None:
        icl.finetune(model, prompts, lr=0.01, progress=False)

    with torch.no_grad():
        in_context = growth.count(lambda: icl.capture(model, prompts, progress=False))
        zero_shot = growth.count(lambda: icl.capture(model, prompts.zero_shot(), progress=False))
    assert growth.count(finetune) == pytest.approx(counted["finetuning"], rel=0.1)
    assert in_context == pytest.approx(counted["prefix"] + counted["ICL"], rel=0.1)
    assert 2 * zero_shot == pytest.approx(counted["ZSL and FT"], rel=0.1)
