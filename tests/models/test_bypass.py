"""Modules run without the bridge's components around them only where these have no hooks."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from toys import BRIDGED
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

import icl_dual as icl

TOKENS = torch.arange(12)[None]


def bridge_logits(model: icl.Model) -> torch.Tensor:
    """Run the bridge as TransformerLens does."""
    masked = model.architecture != "OpenAIGPTLMHeadModel"
    return model.wrapped(TOKENS, attention_mask=torch.ones_like(TOKENS) if masked else None, use_cache=False)


@contextmanager
def components_called() -> Iterator[Counter[str]]:
    """Count the bridge's components that run, by their names in the Hugging Face model."""
    called, call = Counter[str](), GeneralizedComponent.__call__

    def count(component: Any, *args: Any, **kwargs: Any) -> Any:
        called[str(component.name)] += 1
        return call(component, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneralizedComponent, "__call__", count)
        yield called


def test_components_without_hooks_do_not_run(make_model: Callable[..., icl.Model]) -> None:
    model = make_model("llama")
    expected = bridge_logits(model)
    with components_called() as called, torch.no_grad():
        assert torch.equal(model.run(TOKENS), expected)
    around = {"input_layernorm", "post_attention_layernorm", "model.norm", "mlp", "gate_proj", "up_proj", "down_proj"}
    assert around.isdisjoint(called)
    assert called["self_attn"] == called["q_proj"] == model.n_layers
    handle = model.wrapped.blocks[1].mlp.gate.hook_out.register_forward_hook(lambda module, args, output: 2 * output)
    with components_called() as called, torch.no_grad():
        assert not torch.allclose(model.run(TOKENS), expected)
    handle.remove()
    assert called["mlp"] == called["gate_proj"] == 1
    assert called["up_proj"] == 0
    with components_called() as called, torch.no_grad():
        assert torch.equal(bridge_logits(model), expected)
    assert around <= set(called), "the bridge has its components again"


@pytest.mark.parametrize(
    ("architecture", "register"),
    [*((name, "register_forward_hook") for name in BRIDGED), ("llama", "register_forward_pre_hook")],
)
def test_a_hook_anywhere_runs_as_often_as_in_the_bridge_s_own_pass(
    make_model: Callable[..., icl.Model], architecture: str, register: str
) -> None:
    model, expected = make_model(architecture), Counter[str]()
    modules = {name: module for name, module in model.wrapped.named_modules() if name}
    modules = {name: module for name, module in modules.items() if not name.startswith(("blocks.1", "blocks.2"))}
    handles = [
        getattr(module, register)(lambda *_, name=name: expected.update([name])) for name, module in modules.items()
    ]
    with torch.no_grad():
        bridge_logits(model)
    for handle in handles:
        handle.remove()
    for name, module in modules.items():
        got: Counter[str] = Counter()
        handle = getattr(module, register)(lambda *_, name=name, got=got: got.update([name]))
        with torch.no_grad():
            model.run(TOKENS)
        handle.remove()
        assert got[name] == expected[name], name


@pytest.mark.filterwarnings("ignore:Backward hooks on hook_scale")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2-window"])
def test_a_hook_on_gradients_runs(make_model: Callable[..., icl.Model], architecture: str) -> None:
    model = make_model(architecture)
    block = model.wrapped.blocks[0]
    points = {name: module for name, module in block.named_modules() if isinstance(module, HookPoint)}
    for name, point in points.items():
        gradients: list[list[torch.Tensor]] = [[], []]
        for run, fired in zip((bridge_logits, lambda model: model.run(TOKENS)), gradients, strict=True):
            point.add_hook(lambda tensor, *, hook, fired=fired: fired.append(tensor.clone()), dir="bwd")
            run(model).square().sum().backward()
            point.remove_hooks("bwd")
            model.wrapped.original_model.zero_grad()
        assert len(gradients[0]) == len(gradients[1]), name
        for expected, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("option", ["use_hook_mlp_in", "use_attn_in", "use_split_qkv_input"])
def test_hooks_on_copies_of_what_enters_a_layer_run_with_the_bridge_s_options(
    make_model: Callable[..., icl.Model], option: str, has_run: bool
) -> None:
    """Also in the bridge's first pass, in which its blocks register hooks of their own."""
    model = make_model("llama")
    block = model.wrapped.blocks[0]
    point = {
        "use_hook_mlp_in": block.hook_mlp_in,
        "use_attn_in": block.attn.hook_attn_in,
        "use_split_qkv_input": block.attn.hook_q_input,
    }[option]
    with torch.no_grad():
        if has_run:
            bridge_logits(model)
        getattr(model.wrapped, f"set_{option}")(True)
        handle = point.register_forward_hook(lambda module, args, output: 2 * output)
        got = model.run(TOKENS)
        torch.testing.assert_close(got, bridge_logits(model))
        handle.remove()
        assert not torch.allclose(got, bridge_logits(model))


def test_an_option_of_one_block_counts(make_model: Callable[..., icl.Model]) -> None:
    model = make_model("llama")
    block = model.wrapped.blocks[0]
    with torch.no_grad():
        expected = bridge_logits(model)
        block._use_hook_mlp_in = True
        if block.config is not None:
            block.config.use_hook_mlp_in = True
        block.hook_mlp_in.register_forward_hook(lambda module, args, output: 2 * output)
        got = model.run(TOKENS)
        assert not torch.allclose(got, expected)
        torch.testing.assert_close(got, bridge_logits(model))


def test_a_hook_on_what_a_component_scales_runs_in_the_bridge_s_first_pass(
    make_model: Callable[..., icl.Model],
) -> None:
    model = make_model("granite")
    model.wrapped.blocks[0].hook_mlp_out.add_hook(lambda tensor, *, hook: 2 * tensor)
    with torch.no_grad():
        first = model.run(TOKENS)
        torch.testing.assert_close(model.run(TOKENS), first)
        model.wrapped.reset_hooks()
        assert not torch.allclose(model.run(TOKENS), first)


@pytest.mark.parametrize("norms", ["all", "final"])
def test_norms_in_another_dtype_than_the_model_s_are_cast_as_by_the_bridge(
    make_model: Callable[..., icl.Model], norms: str
) -> None:
    model = make_model("llama", torch.bfloat16)
    for block in model.wrapped.blocks if norms == "all" else ():
        block.ln1.original_component.float()
        block.ln2.original_component.float()
    model.wrapped.ln_final.original_component.float()
    with torch.no_grad():
        expected = bridge_logits(model)
        assert torch.equal(model.run(TOKENS), expected)


def test_hooks_of_all_modules_run(make_model: Callable[..., icl.Model]) -> None:
    model = make_model("llama")
    with torch.no_grad():
        expected = bridge_logits(model)
        point = model.wrapped.blocks[0].mlp.hook_out
        handle = register_module_forward_hook(lambda module, args, output: 2 * output if module is point else None)
        got = model.run(TOKENS)
        handle.remove()
    assert not torch.allclose(got, expected)


def test_a_layer_whose_forward_pass_was_replaced_gets_the_arguments_that_it_takes(
    make_model: Callable[..., icl.Model],
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        expected = bridge_logits(model)
        layer: Any = model.wrapped.blocks[0].original_component
        forward = layer.forward

        def replacement(hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None) -> Any:
            return forward(2 * hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask)

        layer.forward = replacement
        got = model.run(TOKENS)
        assert not torch.allclose(got, expected)
        torch.testing.assert_close(got, bridge_logits(model))


def test_a_module_that_a_callback_replaces_stays(make_model: Callable[..., icl.Model]) -> None:
    model = make_model("llama")
    layer: Any = model.wrapped.blocks[2].original_component
    with torch.no_grad():
        bridge_logits(model)
        mine = nn.Identity()

        def replace(index: int, output: torch.Tensor) -> None:
            layer._modules["input_layernorm"] = mine

        model.run(TOKENS, on_output=replace)
    assert layer.input_layernorm is mine


def test_a_forward_pass_that_a_library_has_put_on_a_component_runs(make_model: Callable[..., icl.Model]) -> None:
    model = make_model("llama")
    mlp = model.wrapped.blocks[0].mlp
    with torch.no_grad():
        before = model.run(TOKENS)
        object.__setattr__(mlp, "forward", lambda x: torch.zeros_like(x))  # the component's own sets it on its module
        assert not torch.allclose(model.run(TOKENS), before)
        assert torch.equal(model.run(TOKENS), bridge_logits(model))


def test_a_module_that_was_replaced_within_its_component_runs(make_model: Callable[..., icl.Model]) -> None:
    """As peft does, after the model was wrapped."""
    model = make_model("llama")
    with torch.no_grad():
        before = model.run(TOKENS)
        norm = model.wrapped.blocks[0].ln1
        norm._modules["_original_component"] = nn.Identity()
        assert not torch.allclose(model.run(TOKENS), before)
