"""Shapes counted from configurations, against the weights and the FLOPs of the models that transformers builds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGURATIONS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, T5Config

import icl_dual as icl
from icl_dual.models import tiny_model
from icl_dual.models.shapes import ModelShape, shape_of

EXPERTS = ("mixtral", "qwen2moe", "llama4", "gptoss-window", "erniemoe", "glm4moe")
DENSE = ("gpt2", "bigcode", "neox", "gptneo-window", "opt-projected", "xglm", "bloom", "mpt", "llama-tied", "phi3")
DENSE += ("qwen3", "gemma3-window", "cohere-normed", "starcoder2", "lfm2")


def shape_and_model(name: str) -> tuple[ModelShape, Any]:
    configuration = CONFIGURATIONS[name]
    hf_model: Any = configuration.build().eval()
    hf_model.set_attn_implementation("eager")
    return ModelShape.of_config(AutoConfig.for_model(configuration.model_type, **configuration.settings)), hf_model


@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_weights_and_flops_are_those_of_the_model(name: str) -> None:
    shape, hf_model = shape_and_model(name)
    if name in EXPERTS and hasattr(hf_model, "set_experts_implementation"):
        hf_model.set_experts_implementation("eager")  # torch counts no grouped products
    assert shape.n_weights == sum(parameter.numel() for parameter in hf_model.parameters())
    n_rows, length = 2, 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hf_model(torch.arange(1, length + 1).expand(n_rows, length))
    linear = 2 * length * (shape.n_token_weights + shape.n_unembedding_weights)
    attention = 4 * shape.n_layers * shape.d_attention * length**2
    assert counter.get_total_flops() == pytest.approx(n_rows * (linear + attention), rel=0.01)


def test_a_shape_is_read_from_a_loaded_model_a_folder_and_a_configuration(tmp_path: Path) -> None:
    model = tiny_model()
    model.wrapped.original_model.config.save_pretrained(tmp_path)
    shape = shape_of(model)
    assert shape == ModelShape.of_name(str(tmp_path)) == shape_of(shape)
    sizes = (shape.n_layers, shape.n_heads, shape.n_key_value_heads, shape.d_model, shape.d_head, shape.d_vocab)
    assert sizes == (model.n_layers, model.n_heads, model.n_key_value_heads, model.d_model, model.d_head, model.d_vocab)
    projections = [p.matrix.numel() for p in (*model.projections("K"), *model.projections("V"))]
    assert shape.projection_weights(("K", "V")) == sum(projections)


def test_a_model_of_billions_needs_no_memory() -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    config.num_key_value_heads, config.vocab_size = 8, 128256
    assert ModelShape.of_config(config).n_weights == 70_553_706_496  # Llama-3-70B, by its model card 70.6 billion


@pytest.mark.parametrize("name", ["deepseek2", "mamba", "lfm2-hybrid"])
def test_layers_that_are_not_counted_are_refused(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    with pytest.raises(icl.UnsupportedModelError, match=r"expected .*, got .*: .*use another model"):
        ModelShape.of_config(AutoConfig.for_model(configuration.model_type, **configuration.settings))


def test_what_is_no_decoder_or_has_no_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(icl.UnsupportedModelError, match="expected the configuration of a decoder-only language model"):
        ModelShape.of_config(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1))
    with pytest.raises(icl.AssetError, match="expected a configuration of a model of transformers"):
        ModelShape.of_name(str(tmp_path))
    with pytest.raises(icl.AssetError, match="expected name as one of"):
        ModelShape.of_name("smollm3")
