"""The change of output projections: against the in-context pass, and against a plain model with it in its weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error, snapshot
from toys import ARCHITECTURES
from transformers import PreTrainedModel

import icl_dual as icl
from icl_dual.models import momentum_attention, tiny_model
from icl_dual.patches.value_path import ValuePatch, build_value_patch

ToyModel = Callable[..., icl.Model]

PROMPTS = icl.Prompts(
    start=(0,),
    demonstrations=((5, 6, 7, 20), (8, 9, 21)),
    demonstration_label_lengths=(1, 1),
    separator=(3,),
    queries=((10, 11, 12), (13, 14), (10, 14)),
    labels=((20,), (21,)),
    gold=(0, 1, 0),
)


def in_context_and_alone(model: icl.Model, patch: ValuePatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The last logits of the in-context prompt, and of the query at its positions there."""
    with torch.no_grad():
        in_context = model.run(torch.tensor([patch.prompt]))[0, -1]
        return in_context, model.run(torch.tensor([patch.query]), positions=torch.tensor(patch.positions))[0, -1]


def patched_logits(model: icl.Model, patch: ValuePatch) -> torch.Tensor:
    with torch.no_grad(), patch.applied(model):
        return model.run(torch.tensor([patch.query]), positions=torch.tensor(patch.positions))[0, -1]


@pytest.fixture(scope="module")
def gpt2(make_model: ToyModel) -> icl.Model:
    return make_model("gpt2", torch.float64)


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", "opt", "bloom", "llama", "qwen2", "gemma2-window", "gemma3-window", "gptoss-window", "neox"],
)
def test_the_realised_update_gives_the_in_context_logits(models_by_architecture: ToyModel, architecture: str) -> None:
    model = models_by_architecture(architecture)
    patch = build_value_patch(model, PROMPTS, -1)
    in_context, alone = in_context_and_alone(model, patch)
    assert (patch.query, patch.positions) == ((0, 10, 14), (0, 10, 11))
    assert relative_error(alone, in_context) > 1e-2
    assert relative_error(patched_logits(model, patch), in_context) < 1e-5
    assert patch.residual < 1e-5


def test_it_is_exact_in_float64_and_nothing_is_left(gpt2: icl.Model) -> None:
    before, fingerprint = snapshot(gpt2), gpt2.fingerprint()
    patch = build_value_patch(gpt2, PROMPTS)
    in_context, alone = in_context_and_alone(gpt2, patch)
    assert relative_error(patched_logits(gpt2, patch), in_context) < 1e-12
    assert patch.residual < 1e-12
    with patch.applied(gpt2):
        assert gpt2.fingerprint() != fingerprint
    with pytest.raises(KeyError), patch.applied(gpt2):
        raise KeyError
    assert gpt2.fingerprint() == fingerprint
    assert all(torch.equal(*pair) for pair in zip(snapshot(gpt2), before, strict=True))
    assert torch.equal(in_context_and_alone(gpt2, patch)[1], alone)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_is_a_change_of_weights_of_rank_one(
    models_by_architecture: ToyModel, make_hf_model: Callable[..., PreTrainedModel], architecture: str
) -> None:
    patch, plain = build_value_patch(models_by_architecture(architecture), PROMPTS), make_hf_model(architecture)
    name = "attn.c_proj" if architecture == "gpt2" else "self_attn.o_proj"
    modules: list[Any] = [module for path, module in plain.named_modules() if path.endswith(name)]
    delta = patch.factors.left @ patch.factors.right.mT
    assert (torch.linalg.matrix_rank(delta, rtol=1e-5) == 1).all()
    torch.testing.assert_close(patch.norms, delta.double().flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    tokens = torch.tensor([patch.query])
    options = {"position_ids": torch.tensor([patch.positions]), "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        in_context = plain(torch.tensor([patch.prompt])).logits[0, -1]
        for module, change in zip(modules, delta, strict=True):
            module.weight += change.mT if architecture == "gpt2" else change
        assert relative_error(plain(tokens, **options).logits[0, -1], in_context) < 1e-5


def test_the_direct_update_is_the_decompositions(gpt2: icl.Model) -> None:
    captures = {"in_context": icl.capture(gpt2, PROMPTS, fields=icl.DECOMPOSE_FIELDS, progress=False)}
    captures["zero_shot"] = icl.capture(gpt2, PROMPTS.zero_shot(), fields=("attn_out", "z"), progress=False)
    direct = icl.decompose(gpt2, **captures).direct
    for query in range(3):
        patch = build_value_patch(gpt2, PROMPTS, query, update="direct")
        torch.testing.assert_close(patch.factors.left[..., 0], direct[query], rtol=1e-9, atol=1e-12)
        in_context, _ = in_context_and_alone(gpt2, patch)
        assert relative_error(patched_logits(gpt2, patch), in_context) > 1e-2
        assert patch.residual > 1e-2


def test_chosen_layers_alone_change(gpt2: icl.Model) -> None:
    patch = build_value_patch(gpt2, PROMPTS, layers=(-1, 0))
    assert patch.layers == (0, 2)
    assert (patch.norms > 0).tolist() == [True, False, True]
    nothing = build_value_patch(gpt2, PROMPTS, layers=[])
    _, alone = in_context_and_alone(gpt2, nothing)
    assert torch.equal(patched_logits(gpt2, nothing), alone)


def test_it_saves_and_loads(tmp_path: Path) -> None:
    model = tiny_model()
    patch = build_value_patch(model, PROMPTS, 1, update="direct")
    patch.save(tmp_path / "patch")
    loaded = ValuePatch.load(tmp_path / "patch")
    assert loaded == patch
    assert torch.equal(patched_logits(model, loaded), patched_logits(model, patch))


def test_bad_arguments_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(IndexError, match="expected query from 0 to 2, got 3"):
        build_value_patch(model, PROMPTS, 3)
    with pytest.raises(IndexError, match="expected layers from 0 to 1, got -3"):
        build_value_patch(model, PROMPTS, layers=[-3])
    with pytest.raises(icl.PromptError, match="expected prompts with demonstrations, got none"):
        build_value_patch(model, PROMPTS.zero_shot())
    with pytest.raises(ValueError, match="expected prompts under the answer protocol"):
        build_value_patch(model, replace(PROMPTS, protocol="reference"))
    with momentum_attention(model, 0.1), pytest.raises(icl.UnsupportedModelError, match="a model without momentum"):
        build_value_patch(model, PROMPTS)
    patch = build_value_patch(model, PROMPTS)
    with pytest.raises(ValueError, match="expected a patch of these weights of 'tiny'"):
        patched_logits(tiny_model(1), patch)
    with pytest.raises(ValueError, match="in the model's precision, float64, got one for float32"):
        patched_logits(tiny_model(dtype=torch.float64), patch)


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        ([[0, 10, 11, 12]], None),
        ([[0, 13, 14]], [0, 10, 11]),
        ([[0, 10, 11, 13]], [0, 10, 11, 12]),
        ([[0, 10, 11, 12], [0, 13, 14, 12]], [0, 10, 11, 12]),
    ],
    ids=["from position 0", "another query", "another token", "another row"],
)
def test_other_tokens_and_positions_are_refused(tokens: list[list[int]], positions: list[int] | None) -> None:
    model = tiny_model()
    patch = build_value_patch(model, PROMPTS)
    at = None if positions is None else torch.tensor(positions)
    message = (
        r"expected the query that the patch of 'tiny' was built for, \[0, 10, 11, 12\] at positions \[0, 10, 11, 12\]"
    )
    with patch.applied(model), pytest.raises(ValueError, match=message):
        model.run(torch.tensor(tokens), positions=at)
    model.run(torch.tensor(tokens), positions=at)


def test_momentum_inside_the_block_is_refused() -> None:
    model = tiny_model()
    patch = build_value_patch(model, replace(PROMPTS, start=()))
    with (
        patch.applied(model),
        momentum_attention(model, 0.1),
        pytest.raises(ValueError, match=r"the patch of 'tiny' was built for.* of 'tiny [+] momentum"),
    ):
        model.run(torch.tensor([patch.query]), positions=torch.tensor(patch.positions))


def test_heads_that_write_zeros_are_refused() -> None:
    model = tiny_model()
    model.wrapped.blocks[1].attn.v.original_component.weight.data.zero_()
    with pytest.raises(ValueError, match="layer 1: expected heads that write something other than zero"):
        build_value_patch(model, PROMPTS)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith("hooked-")][:1])
def test_a_hooked_transformer_is_refused(models_by_architecture: ToyModel, architecture: str) -> None:
    with pytest.raises(icl.UnsupportedModelError, match=r"expected a TransformerBridge.*got a HookedTransformer"):
        build_value_patch(models_by_architecture(architecture), PROMPTS)
