"""Hugging Face models as `HookedTransformer`s, where transformer-lens has that class: with the same weights.

The class's own loading goes by names on the hub. Here its conversion is asked with models in hand: by the configuration
it reads from a local folder, and by one made by hand where it knows an architecture by its names only.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
import transformer_lens
from transformers import PreTrainedModel, PreTrainedTokenizerFast

try:
    HookedTransformer: Any = transformer_lens.HookedTransformer
except (ImportError, AttributeError):  # 4.x says so
    HookedTransformer = None

CONVERTED = (
    "gpt2",
    "neox",
    "gptj",
    "gptneo-window",
    "opt",
    "llama",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2-window",
    "gemma3-window",
    "gptoss-window",
    "bloom",
)
"""The tiny models of `toys` with an architecture that the class has."""

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def hooked_transformer(
    hf_model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **processing: bool
) -> Any:
    """The model as a `HookedTransformer`, with raw weights unless processing is asked for."""
    cfg = configuration(hf_model, folder)
    state = module("loading_from_pretrained").get_pretrained_state_dict(
        str(folder), cfg, hf_model, dtype=hf_model.dtype
    )
    hooked = construct(cfg, tokenizer)
    hooked.load_and_process_state_dict(state, **(RAW | processing))
    return hooked.eval()


def construct(cfg: Any, tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """A new `HookedTransformer`, without its farewell."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        return HookedTransformer(cfg, tokenizer)


def hand_made(**settings: Any) -> Any:
    """A `HookedTransformerConfig`."""
    return module("config").HookedTransformerConfig(device="cpu", **settings)


def module(name: str) -> Any:
    """A part of transformer-lens that 4.x does not have, or has otherwise."""
    return importlib.import_module(f"transformer_lens.{name}")


def configuration(hf_model: PreTrainedModel, folder: Path) -> Any:
    hf: Any = hf_model.config
    if hf.model_type.startswith("gemma"):
        return hand_made(**by_hand(hf), dtype=hf_model.dtype, init_weights=False)
    if hf.model_type == "gpt2":
        hf.n_ctx = hf.n_positions  # what it asks older configurations for
    if not (folder / "config.json").exists():
        hf_model.save_pretrained(folder)
    read = module("loading_from_pretrained").get_pretrained_model_config
    cfg = read(str(folder), hf.to_dict(), dtype=hf_model.dtype, device="cpu")
    cfg.tokenizer_name = None  # or it would load one from the folder
    return cfg


def by_hand(hf: Any) -> dict[str, Any]:
    rope = hf.rope_parameters
    settings: dict[str, Any] = {
        "n_layers": hf.num_hidden_layers,
        "d_model": hf.hidden_size,
        "n_ctx": hf.max_position_embeddings,
        "d_head": hf.head_dim,
        "n_heads": hf.num_attention_heads,
        "n_key_value_heads": hf.num_key_value_heads,
        "d_mlp": hf.intermediate_size,
        "d_vocab": hf.vocab_size,
        "act_fn": "gelu_pytorch_tanh",
        "eps": hf.rms_norm_eps,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "final_rms": True,
        "original_architecture": hf.architectures[0],
    }
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    settings |= {
        "attn_scale": hf.query_pre_attn_scalar**0.5,
        "use_local_attn": True,
        "attn_types": [kinds[kind] for kind in hf.layer_types],
        "window_size": hf.sliding_window,
        "use_normalization_before_and_after": True,
    }
    if hf.model_type == "gemma2":
        caps = {
            "attn_scores_soft_cap": hf.attn_logit_softcapping,
            "output_logits_soft_cap": hf.final_logit_softcapping,
        }
        return settings | caps | {"rotary_base": rope["rope_theta"]}
    bases = {"rotary_base": "full_attention", "rotary_base_local": "sliding_attention"}
    return settings | {"use_qk_norm": True} | {name: rope[kind]["rope_theta"] for name, kind in bases.items()}
