"""`Model.run`: reading and replacing activations, and what a model says of itself."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from toys import ARCHITECTURES
from transformers import (
    PreTrainedModel,
)

import icl_dual as icl


def test_reading_some_positions_gives_their_logits(llama: icl.Model) -> None:
    ids = torch.arange(12).view(2, 6)
    read = torch.tensor([[5, 0], [3, 3]])
    with torch.no_grad():
        whole, some = llama.run(ids), llama.run(ids, read=read)
    torch.testing.assert_close(some, whole[torch.arange(2)[:, None], read])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries_alone_are_those_of_the_whole_attention(
    models_by_architecture: Callable[[str], icl.Model], architecture: str
) -> None:
    alone: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    model = models_by_architecture(architecture)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        model.run(ids, on_query=lambda layer, q: alone.append(q))
        model.run(ids, on_attention=lambda layer, attention: whole.append(attention.q_pre_rotary))
    assert len(alone) == model.n_layers
    assert all(torch.equal(*pair) for pair in zip(alone, whole, strict=True))


def test_z_can_be_replaced_and_hooks_come_off_also_after_an_error(llama: icl.Model) -> None:
    ids = torch.arange(6)[None]
    with torch.no_grad():
        plain = llama.run(ids)
        same = llama.run(ids, on_attention=lambda layer, attention: attention.z.clone())
        zeroed = llama.run(ids, on_attention=lambda layer, attention: torch.zeros_like(attention.z))

        def fail(layer: int, attention) -> None:
            raise KeyError(layer)

        with pytest.raises(KeyError):
            llama.run(ids, on_attention=fail)
        torch.testing.assert_close(same, plain)
        assert (zeroed - plain).abs().max() > 0.1
        torch.testing.assert_close(llama.run(ids), plain)


def test_start_token_and_separator_are_the_models_own(models_by_architecture: Callable[[str], icl.Model]) -> None:
    llama, xglm = models_by_architecture("llama"), models_by_architecture("xglm")
    assert llama.start_tokens == [llama.tokenizer.bos_token_id]
    assert llama.separator == llama.encode("\n")
    assert xglm.separator == [xglm.tokenizer.eos_token_id]


def test_a_training_model_comes_back_training(make_model: Callable[..., icl.Model], prompts: icl.Prompts) -> None:
    bridge = make_model("llama").wrapped
    bridge.train()
    icl.capture(icl.Model(bridge, name="llama"), prompts, progress=False)
    assert bridge.training


NO_ROTATION = ("gpt2", "gptneo-window", "opt", "xglm", "bloom")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_residual_unembeds_to_the_logits(
    make_model: Callable[..., icl.Model], models_by_architecture: Callable[[str], icl.Model], architecture: str
) -> None:
    capped = architecture == "gemma2-window"
    model = make_model(architecture) if capped else models_by_architecture(architecture)
    residuals: list[torch.Tensor] = []
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        if capped:
            model.wrapped.original_model.get_output_embeddings().weight.mul_(30)
        model.run(ids, on_residual=lambda layer, residual: residuals.append(residual))
        logits = model.run(ids)
        assert len(residuals) == model.n_layers
        torch.testing.assert_close(model.unembed(residuals[-1]), logits)
        assert not torch.allclose(model.unembed(residuals[-2]), logits, atol=0.1)
        if capped:
            plain = model.wrapped.unembed(model.wrapped.ln_final(residuals[-1]))
            assert logits.abs().max() <= 30 < plain.abs().max()


def test_a_residual_can_be_replaced(llama: icl.Model) -> None:
    """The first layer's output of other tokens: all that follows is then the other tokens' run."""
    ids, others = torch.arange(6)[None], torch.arange(20, 26)[None]
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        expected = llama.run(others, on_residual=lambda layer, residual: kept.append(residual.clone()))
        got = llama.run(ids, on_residual=lambda layer, residual: kept[0] if layer == 0 else None)
        torch.testing.assert_close(got, expected)
        assert not torch.allclose(llama.run(ids), expected, atol=0.1)


def keys_of(model: icl.Model, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each layer's keys as `on_key` shows them, and as they are scored."""
    content: list[torch.Tensor] = []
    scored: list[torch.Tensor] = []
    with torch.no_grad():
        model.run(ids, on_key=lambda layer, k: content.append(k))
        model.run(ids, on_attention=lambda layer, attention: scored.append(attention.k))
    assert len(content) == len(scored) == model.n_layers
    return content, scored


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_alone_are_those_scored_but_for_rotation(
    models_by_architecture: Callable[[str], icl.Model], architecture: str
) -> None:
    for content, scored in zip(*keys_of(models_by_architecture(architecture), torch.arange(6)[None]), strict=True):
        assert content.shape == scored.shape
        stretch = scored.norm(dim=-1) / content.norm(dim=-1)  # YaRN's rotation makes all keys longer
        assert (stretch[0, 0, 0].item() == pytest.approx(1)) == (not architecture.endswith("gptoss-window"))
        torch.testing.assert_close(stretch, stretch[0, 0, 0].expand_as(stretch))
        torch.testing.assert_close(content[:, 0] * stretch[0, 0, 0], scored[:, 0])  # position 0 is not turned
        assert torch.allclose(content, scored, atol=1e-5) == (architecture.removeprefix("hooked-") in NO_ROTATION)


@pytest.mark.parametrize(("architecture", "module"), [("llama", "k_proj"), ("qwen3", "k_norm"), ("neox", None)])
def test_keys_alone_are_what_the_bare_model_projects_and_norms(
    models_by_architecture: Callable[[str], icl.Model],
    make_hf_model: Callable[..., PreTrainedModel],
    architecture: str,
    module: str | None,
) -> None:
    model, twin = models_by_architecture(architecture), make_hf_model(architecture)
    name = module or "query_key_value"
    found: list[torch.Tensor] = []
    for path, part in twin.named_modules():
        if path.endswith(name):
            part.register_forward_hook(lambda module, args, output: found.append(output))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        cast(Any, twin)(ids)
    content, _ = keys_of(model, ids)
    for got, expected in zip(content, found, strict=True):
        if module is None:  # a head's query, key and value lie side by side
            expected = expected.view(1, 6, model.n_heads, 3, model.d_head)[:, :, :, 1]
        torch.testing.assert_close(got, expected.reshape(got.shape))


def test_a_description_is_shown_beside_the_short_name(llama: icl.Model) -> None:
    described = icl.Model(llama.backend, name="short", description="A tiny Llama (random weights)")
    assert repr(described).startswith("Model('short' = A tiny Llama (random weights), LlamaForCausalLM, n_layers=3")
    assert described.fingerprint() == llama.fingerprint()
    assert llama.description == llama.name
    assert repr(llama).startswith("Model('llama', LlamaForCausalLM, n_layers=3")


def test_controls_and_momentum_are_in_the_description_too(llama: icl.Model) -> None:
    described = icl.Model(llama.backend, name="short", description="A tiny Llama")
    control = icl.control_model(described, "untrained", seed=3)
    assert (control.name, control.description) == ("short (untrained, seed 3)", "A tiny Llama (untrained, seed 3)")
    with icl.momentum_attention(described, 0.1):
        assert described.description == "A tiny Llama + momentum η=0.1"
    assert (described.name, described.description) == ("short", "A tiny Llama")


def test_a_change_of_any_row_changes_the_fingerprint(
    make_model: Callable[..., icl.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a vocabulary with more rows than elements are read, too."""
    monkeypatch.setattr("icl_dual.models.model.FINGERPRINT_ELEMENTS", 64)
    model = make_model("llama")
    embedding = model.wrapped.original_model.get_input_embeddings().weight
    before = model.fingerprint()
    for row in range(0, len(embedding), 7):
        kept = embedding.data[row].clone()
        embedding.data[row] = 0
        assert model.fingerprint() != before, row
        embedding.data[row] = kept
    assert model.fingerprint() == before


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_a_model_is_never_pickled_or_copied(llama: icl.Model, take: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"got the model 'llama': call icl_dual\.load_model in each process, or once"):
        take(llama)
