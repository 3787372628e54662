"""The exact patch: against the in-context pass, and against plain weights of a Hugging Face model that it is added to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative_error

import icl_dual as icl

SHIFTED_BY = {
    "gpt2": "bias",
    "opt": "bias",
    "xglm": "bias",
    "gptneo-window": "bias",
    "bloom": "bias",
    "llama": "out",
    "qwen2": "out",
    "qwen3": "out",
    "mistral-window": "out",
    "gemma2-window": "scale",
    "gemma3-window": "scale",
    "olmo2": "scale",
    "neox": "bias",
    "phi": "bias",
    "gptj": "bias",
    "falcon": "out",
}
"""The families, and what of each takes the difference of residual streams."""


def last_logits(model: icl.Model, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model.run(torch.tensor([tokens]))[0, -1]

@pytest.fixture(params=SHIFTED_BY)
def model(request: pytest.FixtureRequest, make_model: Callable[..., icl.Model]) -> icl.Model:
    return make_model(request.param, torch.float32 if request.param == "xglm" else torch.float64)


def test_q(model, prompts):
    patch = icl.build_exact_patch(model, prompts, 2)
    ic = last_logits(model, patch.prompt); zs = last_logits(model, patch.query)
    with patch.applied(model):
        p = last_logits(model, patch.query)
    print(model.name, patch, patch.residual, relative_error(p, ic), relative_error(zs, ic), {k: v.tolist() for k, v in patch.norms.items()})
