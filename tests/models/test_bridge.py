"""The backend for `TransformerBridge`: what it reads, against the bare Hugging Face model, and what it refuses."""

from collections.abc import Callable
from typing import Any, cast

import pytest
from helpers import boot
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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
