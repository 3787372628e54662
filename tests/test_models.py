from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import ARCHITECTURES
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import icl_dual as icl


def boot(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.config.architectures = [type(hf_model).__name__]
    return TransformerBridge.boot_transformers("tiny/x", hf_model=hf_model, tokenizer=tokenizer, device="cpu")


def test_a_local_folder_loads_with_its_hash(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    hf_model = make_hf_model("llama")
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = icl.load_model(str(tmp_path))
    assert model.provenance.startswith("sha256:")
    assert (model.n_layers, model.n_heads, model.n_key_value_heads, model.d_head) == (3, 4, 2, 8)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.run(ids), hf_model(ids).logits)
    assert icl.load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(icl.UnsupportedModelError, match="expected a folder with a decoder-only language model"):
        icl.load_model(str(tmp_path))


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
        model.run(ids, on_attention=lambda layer, attention: whole.append(attention.q_content))
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


def test_processed_weights_are_refused(make_model: Callable[..., icl.Model]) -> None:
    bridge = make_model("gpt2").bridge
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
    from icl_dual.models import _refuse_unsupported

    refuse = getattr(_refuse_unsupported, "__wrapped__", _refuse_unsupported)
    with pytest.raises(icl.UnsupportedModelError, match="expected a transformer_lens TransformerBridge, got Llama"):
        refuse(cast(Any, make_hf_model("llama")))


@pytest.mark.parametrize("damage", ["truncated", "a layer missing"])
def test_damaged_weights_are_refused_never_made_up(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str
) -> None:
    make_hf_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        kept = {name: tensor for name, tensor in load_file(weights).items() if ".layers.1." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(icl.AssetError, match=r"expected whole weights|lacks the weights"):
        icl.load_model(str(tmp_path))


def test_a_training_model_comes_back_training(make_model: Callable[..., icl.Model], prompts: icl.Prompts) -> None:
    bridge = make_model("llama").bridge
    bridge.train()
    icl.capture(icl.Model(bridge, name="llama"), prompts, progress=False)
    assert bridge.training
