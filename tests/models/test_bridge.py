"""The backend for `TransformerBridge`: what it reads, against the bare Hugging Face model, and what it refuses."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from helpers import FullPrompts, boot
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StableLmConfig,
    StableLmForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import icl_dual as icl


def test_processed_weights_are_refused(make_model: Callable[..., icl.Model]) -> None:
    bridge = make_model("gpt2").wrapped
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(icl.UnsupportedModelError, match="expected raw weights, got a model in compatibility mode"):
        icl.Model(bridge)


def test_models_that_are_no_decoders_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bert = BertForMaskedLM(
        BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(icl.UnsupportedModelError, match="BertForMaskedLM: expected a decoder-only causal"):
        icl.Model(boot(bert, tokenizer))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(icl.UnsupportedModelError, match="T5ForConditionalGeneration: expected a decoder-only causal"):
        icl.Model(boot(t5, tokenizer))


def test_something_that_is_no_bridge_is_refused(make_hf_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(icl.UnsupportedModelError, match=r"expected a TransformerBridge .*, got Llama"):
        icl.Model(cast(Any, make_hf_model("llama")))


def test_a_subclass_of_a_decoder_is_one(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, prompts: icl.Prompts
) -> None:
    hf_model = make_hf_model("llama")
    hf_model.__class__ = type("MyLlama", (type(hf_model),), {})
    model = icl.Model(boot(hf_model, tokenizer))
    expected = FullPrompts(model, prompts).label_log_probs(2)
    got = icl.capture(model, prompts, fields=(), progress=False).label_log_probs[2]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_is_refused_with_the_reason(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    class OptimizedModule(torch.nn.Module):
        """What torch.compile returns: the model behind a name."""

        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

    compiled: Any = OptimizedModule(make_hf_model("llama"))
    with pytest.raises(
        icl.UnsupportedModelError, match=r"expected a model that torch\.compile has not compiled, got OptimizedModule"
    ):
        icl.Model(boot(compiled, tokenizer))


@pytest.mark.parametrize("has_norms", [False, True])
def test_norms_of_queries_and_keys_may_be_absent(
    tokenizer: PreTrainedTokenizerFast, task: icl.Task, has_norms: bool
) -> None:
    """A bridge has hooks for StableLM's optional norms in models without them, too, where they never fire."""
    config = StableLmConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        qk_layernorm=has_norms,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = icl.Model(boot(StableLmForCausalLM(config).eval(), tokenizer))
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    delta = icl.finetune(model, prompts, lr=0.01, progress=False)
    (same,) = icl.finetune_many(model, [prompts], [0.01], progress=False)
    assert isinstance(same, icl.WeightDelta)
    assert delta.W_K.any()
    torch.testing.assert_close(same.W_K, delta.W_K, atol=1e-6, rtol=1e-3)
    assert delta.training_q is not None
    assert delta.training_q.isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_norms_compute_for_their_hooks_only_where_someone_has_a_hook(
    make_model: Callable[..., icl.Model], architecture: str
) -> None:
    model, tokens, scales = make_model(architecture), torch.arange(12)[None], list[torch.Tensor]()
    norms = [module for module in model.wrapped.modules() if isinstance(module, NormalizationBridge)]
    before = [dict(vars(norm)) for norm in norms]
    hook = model.wrapped.blocks[0].ln1.hook_scale
    assert any(norm.use_native_layernorm_autograd for norm in norms)
    with torch.no_grad():
        plain = model.run(tokens)
        handle = hook.register_forward_hook(lambda module, args, output: scales.append(output))
        assert torch.equal(model.run(tokens), plain)
        assert len(scales) == 1
        handle.remove()
        handle = hook.register_forward_hook(lambda module, args, output: 2 * output)
        with pytest.warns(UserWarning, match="edited hook_scale"):
            assert not torch.allclose(model.run(tokens), plain)
        handle.remove()
        assert torch.equal(model.wrapped(tokens, attention_mask=torch.ones_like(tokens), use_cache=False), plain)
    assert [dict(vars(norm)) for norm in norms] == before


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("name", ["hook_scale", "hook_normalized"])
def test_hooks_of_both_kinds_on_a_norm_run(make_model: Callable[..., icl.Model], name: str, register: str) -> None:
    model, seen = make_model("llama"), list[str]()
    handle = getattr(getattr(model.wrapped.blocks[1].ln1, name), register)(lambda *_: seen.append(name))
    with torch.no_grad():
        model.run(torch.arange(6)[None])
    handle.remove()
    assert seen == [name]


def test_queries_that_are_normed_after_rotation_are_recorded_by_position_and_head(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    model, shapes = make_model("hunyuan"), list[torch.Size]()
    with torch.no_grad():
        model.run(torch.arange(12)[None], on_attention=lambda _, attention: shapes.append(attention.q_pre_rotary.shape))
    assert {*shapes} == {(1, 12, model.n_heads, model.d_head)}
    assert icl.capture(model, prompts, fields=("q",), progress=False).q is not None
