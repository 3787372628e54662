"""Control models: how their weights are distributed, what they share with the trained model, and what is refused."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any, cast, get_args

import pytest
import torch
from helpers import boot, snapshot
from toys import BRIDGED
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import icl_dual as icl
from icl_dual.models import Control, ProjectionName

NORM = re.compile(r"norm|\.ln_")


def weights(model: icl.Model) -> dict[str, torch.Tensor]:
    """A model's weights, under the names that they have without a bridge."""
    named = {name.replace("._original_component", ""): p for name, p in model.wrapped.original_model.named_parameters()}
    qkv, output = ("c_attn", "c_proj") if model.architecture == "GPT2LMHeadModel" else ("query_key_value", "dense")
    found: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        *within, part, kind = name.split(".")
        if ".".join([*within, "qkv", kind]) in named:  # next to the parts that the bridge split out of it
            if part not in ("qkv", "o"):
                continue
            name = ".".join([*within, qkv if part == "qkv" else output, kind])
        found[name] = parameter.detach()
    return found


def plain_model(model: icl.Model, seed: int = 0) -> PreTrainedModel:
    """A model of the same class and configuration, as anyone would construct it."""
    config: Any = copy.deepcopy(model.wrapped.original_model.config)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model.wrapped.original_model)(config).eval()


def in_blocks(name: str) -> bool:
    """Whether a weight belongs to a layer's attention or MLP, by its name."""
    return bool(re.search(r"\.\d+\.", name)) and not NORM.search(name)


@pytest.fixture(scope="module")
def control_of(models_by_architecture: Callable[[str], icl.Model]) -> Callable[[str, Any], icl.Model]:
    """One shared control of each kind an architecture, by seed 3."""
    made: dict[tuple[str, Any], icl.Model] = {}

    def get(architecture: str, control: Any) -> icl.Model:
        if (architecture, control) not in made:
            made[architecture, control] = icl.control_model(models_by_architecture(architecture), control, seed=3)
        return made[architecture, control]

    return get


@pytest.mark.parametrize("architecture", BRIDGED)
def test_untrained_weights_are_distributed_as_a_plainly_constructed_models(
    control_of: Callable[..., icl.Model], architecture: str
) -> None:
    control = control_of(architecture, "untrained")
    expected = {name: parameter.detach() for name, parameter in plain_model(control).named_parameters()}
    got = weights(control)
    added = {name: got.pop(name) for name in got.keys() - expected.keys()}  # by the bridge of transformer-lens 3
    assert added.keys() <= {"lm_head.bias"}
    assert not any(bias.any() for bias in added.values())
    assert got.keys() == expected.keys()
    for name, plain in expected.items():
        if plain.min() == plain.max():
            assert torch.equal(got[name], plain), name
            continue
        error = 1 / math.sqrt(plain.numel())  # of the ratio of two deviations, and of the mean, for normal draws
        assert got[name].std() / plain.std() == pytest.approx(1, abs=4.5 * error), name
        assert abs((got[name].mean() - plain.mean()) / plain.std()) < 4.5 * math.sqrt(2) * error, name
        assert torch.equal(got[name] == 0, plain == 0), name  # padding's row of an embedding
        assert not torch.equal(got[name], plain), name


@pytest.mark.parametrize("control", get_args(Control))
@pytest.mark.parametrize("architecture", BRIDGED)
def test_a_control_runs_as_a_plain_model_of_its_weights(
    control_of: Callable[..., icl.Model], architecture: str, control: Control
) -> None:
    model = control_of(architecture, control)
    twin, own = plain_model(model), weights(model)
    ids = torch.arange(120).view(2, 60)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(own[name])
        expected = cast(Any, twin)(ids).logits
        torch.testing.assert_close(model.run(ids), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("architecture", BRIDGED)
def test_random_blocks_keep_embeddings_and_norms_and_draw_all_else_as_untrained(
    models_by_architecture: Callable[[str], icl.Model], control_of: Callable[..., icl.Model], architecture: str
) -> None:
    model = models_by_architecture(architecture)
    trained = weights(model)
    got, untrained = (weights(control_of(architecture, kind)) for kind in ("random-blocks", "untrained"))
    assert got.keys() == trained.keys()
    assert {in_blocks(name) for name in got} == {True, False}
    for name, tensor in got.items():
        if in_blocks(name):
            assert torch.equal(tensor, untrained[name]), name
            assert not torch.equal(tensor, trained[name]), name
        else:
            assert tensor.data_ptr() == trained[name].data_ptr(), name
            assert torch.equal(tensor, trained[name]), name
    for kind in get_args(ProjectionName):
        both = (one.projections(kind) for one in (control_of(architecture, "random-blocks"), model))
        assert not any(torch.equal(ours.matrix, others.matrix) for ours, others in zip(*both, strict=True))


@pytest.mark.parametrize("architecture", BRIDGED)
def test_controls_tie_what_the_trained_model_ties(
    models_by_architecture: Callable[[str], icl.Model], control_of: Callable[..., icl.Model], architecture: str
) -> None:
    def tied(model: icl.Model) -> bool:
        original: Any = model.wrapped.original_model
        return original.get_output_embeddings().weight is original.get_input_embeddings().weight

    trained = tied(models_by_architecture(architecture))
    assert [tied(control_of(architecture, kind)) for kind in get_args(Control)] == [trained, trained]


def test_models_tested_as_controls_are_some_tied_and_some_not(
    models_by_architecture: Callable[[str], icl.Model],
) -> None:
    configs: list[Any] = [models_by_architecture(name).wrapped.original_model.config for name in BRIDGED]
    assert {bool(config.tie_word_embeddings) for config in configs} == {True, False}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptoss-window"])
def test_a_controls_draw_is_its_seeds(
    models_by_architecture: Callable[[str], icl.Model], control_of: Callable[..., icl.Model], architecture: str
) -> None:
    first = control_of(architecture, "untrained")
    again, other = (icl.control_model(models_by_architecture(architecture), "untrained", seed=seed) for seed in (3, 4))
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(again)[name]), name
        if tensor.min() < tensor.max():
            assert not torch.equal(tensor, weights(other)[name]), name
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_drawing_a_control_touches_no_random_state_and_no_trained_weight(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    model = make_model("llama")
    before, fingerprint = snapshot(model), model.fingerprint()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    controls = [icl.control_model(model, kind, seed=1) for kind in get_args(Control)]
    assert torch.equal(torch.get_rng_state(), state)
    for control in controls:
        own = snapshot(control)
        delta = icl.finetune(control, prompts, lr=0.05, progress=False)
        assert (delta.W_V != 0).any()
        with delta.applied(control):
            assert model.fingerprint() == fingerprint
        assert all(map(torch.equal, snapshot(control), own))
    assert all(map(torch.equal, snapshot(model), before))
    assert model.fingerprint() == fingerprint


def test_a_control_says_what_it_is(control_of: Callable[..., icl.Model], llama: icl.Model) -> None:
    control = control_of("llama", "random-blocks")
    assert control.name == "llama (random-blocks, seed 3)"
    assert control.provenance == f"{llama.provenance}, random-blocks, seed 3"
    assert control.fingerprint() != llama.fingerprint()


def test_a_control_has_its_models_dtype(make_model: Callable[..., icl.Model]) -> None:
    control = icl.control_model(make_model("llama", torch.bfloat16), "random-blocks", seed=0)
    assert {parameter.dtype for parameter in control.parameters()} == {torch.bfloat16}
    assert control.fingerprint().startswith("bfloat16:")


@pytest.mark.parametrize("control", get_args(Control))
def test_a_weight_that_its_class_does_not_initialise_is_refused(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, control: Control
) -> None:
    class Gated(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.gate = torch.nn.Parameter(torch.ones(3))

    Gated.__name__ = "LlamaForCausalLM"
    gated = Gated(cast(LlamaConfig, make_hf_model("llama").config)).eval()
    with pytest.raises(
        icl.UnsupportedModelError, match=r"gated: .* initialise all its weights, got none for 'gate' \(1 in all\)"
    ):
        icl.control_model(icl.Model(boot(gated, tokenizer), name="gated"), control, seed=0)


def test_a_matrix_outside_of_attention_and_mlp_is_refused_between_random_blocks(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    class Wired(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            cast(Any, self.model.layers[1]).bypass = torch.nn.Linear(4, 4)

    Wired.__name__ = "LlamaForCausalLM"
    wired = Wired(cast(LlamaConfig, make_hf_model("llama").config)).eval()
    model = icl.Model(boot(wired, tokenizer), name="wired")
    with pytest.raises(icl.UnsupportedModelError, match=r"wired .* layer 1: expected attention and MLP .*bypass"):
        icl.control_model(model, "random-blocks", seed=0)
    assert icl.control_model(model, "untrained", seed=0).fingerprint() != model.fingerprint()


def test_a_model_that_is_not_transformers_own_has_no_untrained_control(
    make_model: Callable[..., icl.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    monkeypatch.setattr(model.backend, "original", torch.nn.Linear(2, 2))
    with pytest.raises(icl.UnsupportedModelError, match=r"expected a transformers model, .* got Linear"):
        icl.control_model(model, "untrained", seed=0)


def test_an_unknown_control_is_refused(llama: icl.Model) -> None:
    unknown: Any = "shuffled"
    with pytest.raises(ValueError, match="expected control as one of 'untrained', 'random-blocks', got 'shuffled'"):
        icl.control_model(llama, unknown, seed=0)
