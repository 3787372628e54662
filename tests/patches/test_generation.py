"""Generation with a patch for each token: against plain generation, and against weights with the patch in them."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from transformers import PreTrainedModel

import icl_dual as icl
from icl_dual.models import tiny_model
from icl_dual.patches.generation import FORMS, Form, Generation, generate_patched

ToyModel = Callable[..., icl.Model]
PATCHED: tuple[Form, ...] = ("naive", "stable", "beside")
MATRICES = {
    "gpt2": {"in": "mlp.c_fc"},
    "llama": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"},
    "gemma3-window": {"gate": "mlp.gate_proj", "in": "mlp.up_proj"},
}
"""The matrices that change in each architecture, and the modules that have them."""
VECTORS = {"gpt2": "mlp.c_proj.bias", "gemma3-window": "post_feedforward_layernorm.weight"}

PROMPTS = icl.Prompts(
    start=(0,),
    demonstrations=((5, 6, 7, 20), (8, 9, 21)),
    demonstration_label_lengths=(1, 1),
    queries=((10, 11, 12), (13, 14)),
    labels=((20,), (21,)),
    gold=(0, 1),
)


def greedy(model: icl.Model, tokens: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
    generated: tuple[int, ...] = ()
    with torch.no_grad():
        for _ in range(n_tokens):
            generated += (int(model.run(torch.tensor([tokens + generated]))[0, -1].argmax()),)
    return generated


def test_patches_generate_the_prompted_tokens() -> None:
    model = tiny_model(dtype=torch.float64)
    result = generate_patched(model, PROMPTS, -1, n_tokens=3)
    assert result.query == (0, 13, 14)
    assert tuple(result.generated) == FORMS
    assert result.prompted == greedy(model, result.prompt, 3)
    assert result.generated["unpatched"] == greedy(model, result.query, 3)
    assert result.agreement("unpatched") < 1
    for form in (*PATCHED, "cached"):
        assert result.generated[form] == result.prompted
        assert result.agreement(form) == 1
        assert result.errors[form].max() < (1e-12 if form in PATCHED else 1e-6)
        assert result.largest[form].max() < (1e-12 if form in PATCHED else 1e-5)
    assert result.errors["unpatched"][0] > 0.1
    assert result.errors["unpatched"][1:].isnan().any()


def test_errors_and_margins_are_those_of_plain_passes() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    result = generate_patched(model, PROMPTS, n_tokens=2, forms=("unpatched", "beside"))
    with torch.no_grad():
        for step in range(2):
            logits = model.run(torch.tensor([result.prompt + result.prompted[:step]]))[0, -1].float()
            first, second = logits.topk(2).values
            assert result.margins[step].item() == pytest.approx((first - second).item())
        expected = model.run(torch.tensor([result.prompt]))[0, -1].float()
        alone = model.run(torch.tensor([result.query]))[0, -1].float()
    assert result.errors["unpatched"][0].item() == pytest.approx(relative_error(alone, expected))
    assert result.largest["unpatched"][0].item() == pytest.approx((alone - expected).abs().max().item())
    assert 0 < result.errors["beside"].max() < 0.05


def test_beside_is_the_exact_patch() -> None:
    model = tiny_model(dtype=torch.bfloat16)  # the error of other forms is twice as large
    patch = icl.build_exact_patch(model, PROMPTS)
    with torch.no_grad():
        expected = model.run(torch.tensor([patch.prompt]))[0, -1].float()
        with patch.applied(model):
            patched = model.run(torch.tensor([patch.query]))[0, -1].float()
    result = generate_patched(model, PROMPTS, n_tokens=1, forms=("beside",))
    assert result.errors["beside"].item() == pytest.approx(relative_error(patched, expected), rel=0.05)


def written(hf_model: Any, architecture: str, patch: icl.ExactPatch) -> None:
    """Add an exact patch to a plain model's weights and round them."""
    paths = dict(hf_model.named_modules())
    for part, path in MATRICES[architecture].items():
        modules = [module for name, module in paths.items() if name.endswith(f".{path}")]
        for module, left, right in zip(modules, *patch.factors[part], strict=True):
            delta = left @ right.mT
            weight = module.weight.data
            module.weight.data = (weight + (delta.mT if architecture == "gpt2" else delta)).to(weight.dtype)
    vectors = patch.bias if patch.scale is None else patch.scale
    if vectors is not None:
        names = [name for name, _ in hf_model.named_parameters() if name.endswith(VECTORS[architecture])]
        for name, vector in zip(names, vectors, strict=True):
            parameter = hf_model.get_parameter(name)
            parameter.data = (parameter.data + vector).to(parameter.dtype)


@pytest.mark.parametrize("architecture", MATRICES)
def test_stable_is_the_patch_in_the_weights(
    make_hf_model: Callable[..., PreTrainedModel], make_model: ToyModel, architecture: str
) -> None:
    """In float32, in which rounding moves the patches of later layers little."""
    model, plain = make_model(architecture), make_hf_model(architecture)
    patch = icl.build_exact_patch(model, PROMPTS)
    with torch.no_grad():
        written(plain, architecture, patch)
        expected = plain(torch.tensor([patch.query])).logits[0, -1]
        in_context = model.run(torch.tensor([patch.prompt]))[0, -1]
    result = generate_patched(model, PROMPTS, n_tokens=1, forms=("naive", "stable"))
    tolerance = 1e-3 if patch.scale is not None else 1e-5
    assert relative_error(expected, in_context) < tolerance
    assert result.errors["stable"].item() < tolerance
    assert result.errors["naive"].item() < tolerance


def test_in_half_precision_every_form_is_rounded_in_its_own_way() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before = [parameter.clone() for parameter in model.parameters()]
    result = generate_patched(model, PROMPTS, n_tokens=1, forms=PATCHED)
    errors = {form: result.errors[form].item() for form in PATCHED}
    assert len(set(errors.values())) == 3
    assert errors["beside"] < min(errors["naive"], errors["stable"]) < 0.05
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


# Before transformer-lens 4, OLMo2's norms have no hooks, and `test_exact.py` sees it refused.
@pytest.mark.parametrize(
    "architecture",
    ["gpt2", "opt", "gemma3-window", "neox", *(["olmo2"] if version("transformer-lens") >= "4" else [])],
)
def test_every_form_is_exact_in_every_architecture(models_by_architecture: ToyModel, architecture: str) -> None:
    result = generate_patched(models_by_architecture(architecture), PROMPTS, n_tokens=1)
    for form in PATCHED:
        assert result.errors[form].item() < 1e-4
    assert result.errors["unpatched"].item() > 1e-2


def test_it_saves_and_loads(tmp_path: Path) -> None:
    result = generate_patched(tiny_model(), PROMPTS, n_tokens=2, forms=("beside", "unpatched"))
    result.save(tmp_path / "generation")
    loaded = Generation.load(tmp_path / "generation")
    assert repr(loaded) == repr(result)
    assert loaded.generated == result.generated
    torch.testing.assert_close(loaded.errors, result.errors, equal_nan=True, rtol=0, atol=0)


def test_bad_arguments_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"expected form as one that was run, of \['unpatched'\], got 'naive'"):
        generate_patched(model, PROMPTS, n_tokens=1, forms=("unpatched",)).agreement("naive")
    with pytest.raises(IndexError, match="expected query from 0 to 1, got 2"):
        generate_patched(model, PROMPTS, 2)
    with pytest.raises(icl.ArgumentError, match="expected n_tokens as a whole number of at least 1, got 0"):
        generate_patched(model, PROMPTS, n_tokens=0)
    with pytest.raises(icl.ArgumentError, match="expected forms"):
        generate_patched(model, PROMPTS, forms=("clever",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(icl.PromptError, match=rf"expected at most {model.n_ctx} tokens, .* got a prompt of 11 and n_t"):
        generate_patched(model, PROMPTS, n_tokens=model.n_ctx - 9)
    upcast = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32)
    with pytest.raises(icl.UnsupportedModelError, match="computes in the precision of its weights, got tiny in bfloat"):
        generate_patched(upcast, PROMPTS)


def test_the_last_token_may_lie_after_the_context() -> None:
    model = tiny_model()
    query = (10,) * (model.n_ctx - len(PROMPTS.prefix))
    full = replace(PROMPTS, queries=(query,), gold=(0,))
    assert generate_patched(model, full, n_tokens=1, forms=("cached",)).agreement("cached") == 1
    with pytest.raises(icl.PromptError, match=f"got a prompt of {model.n_ctx} and n_tokens=2"):
        generate_patched(model, full, n_tokens=2)


@pytest.mark.parametrize("form", ["naive", "stable"])
def test_forms_that_compute_with_the_weights_alone_are_refused_inside_a_patch(form: Form) -> None:
    model = tiny_model(dtype=torch.float64)
    with icl.build_shared_patch(model, PROMPTS).applied(model):
        with pytest.raises(ValueError, match="expected a model without a patch for the forms naive and stable"):
            generate_patched(model, PROMPTS, n_tokens=1, forms=("beside", form))
        assert generate_patched(model, PROMPTS, n_tokens=1, forms=("beside",)).errors["beside"].item() < 1e-12


@pytest.mark.parametrize("form", PATCHED)
def test_inputs_of_zero_are_refused(make_model: ToyModel, form: Form) -> None:
    model = tiny_model()
    model.wrapped.blocks[1].ln2.original_component.weight.data.zero_()
    with pytest.raises(ValueError, match="layer 1: expected an input of the MLP other than zero, got one of norm 0"):
        generate_patched(model, PROMPTS, n_tokens=1, forms=(form,))
    assert generate_patched(model, PROMPTS, n_tokens=1, forms=("cached",)).agreement("cached") == 1
    model = make_model("gemma3-window")
    model.wrapped.blocks[2].mlp.out.original_component.weight.data[5] = 0
    with pytest.raises(ValueError, match="layer 2: expected what the MLP writes to be other than zero in every dim"):
        generate_patched(model, PROMPTS, n_tokens=1, forms=(form,))


@pytest.mark.parametrize("form", PATCHED)
def test_zeros_before_a_norm_are_no_change_where_nothing_lacks(make_model: ToyModel, form: Form) -> None:
    model = make_model("gemma3-window")
    model.wrapped.blocks[2].mlp.out.original_component.weight.data[5] = 0
    result = generate_patched(model, PROMPTS.zero_shot(), n_tokens=1, forms=(form,))
    assert result.errors[form].item() < 1e-6


def test_a_mixture_of_experts_is_refused(models_by_architecture: ToyModel) -> None:
    with pytest.raises(icl.UnsupportedModelError, match="got a mixture of experts"):
        generate_patched(models_by_architecture("gptoss-window"), PROMPTS, n_tokens=1)
