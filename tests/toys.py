"""The tiny random models of the tests, by architecture."""

from collections.abc import Callable
from typing import Any

import hooked
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

VOCABULARY = 300
N_CTX = 512
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
}
_MLP: dict[str, Any] = {**_DECODER, "intermediate_size": 48}
_GQA: dict[str, Any] = {**_MLP, "num_key_value_heads": 2, "head_dim": 8}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": N_CTX}
WINDOW = 40
"""Shorter than the test prompts' demonstrations, longer than their queries."""
HF_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_MLP)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(rotary_dim=4, **_GPT2)),
    "gptneo-window": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            attention_types=[[["global", "local", "global"], 1]],
            window_size=WINDOW,
            max_position_embeddings=N_CTX,
        )
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **_DECODER)),
    "xglm": lambda: XGLMForCausalLM(
        XGLMConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            ffn_dim=48,
            num_layers=3,
            attention_heads=4,
            max_position_embeddings=N_CTX,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GQA)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **_GQA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **_MLP)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GQA)),
    "gemma2-window": lambda: Gemma2ForCausalLM(
        Gemma2Config(sliding_window=WINDOW, attn_logit_softcapping=2.0, **_GQA)  # so low that it bends scores here
    ),
    "gemma3-window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_GQA
        )
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_MLP)),
    "gptoss-window": lambda: GptOssForCausalLM(
        GptOssConfig(
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
            **_GQA,
        )
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**_DECODER)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(num_key_value_heads=2, **_MLP)),
}
BRIDGED = tuple(HF_MODELS)
ARCHITECTURES = BRIDGED + tuple(f"hooked-{name}" for name in hooked.CONVERTED if hooked.HookedTransformer)
"""Behind a bridge, and as `HookedTransformer`s where there is that class."""
HF_MODELS |= {
    "falcon-alibi": lambda: FalconForCausalLM(FalconConfig(alibi=True, **_DECODER)),
    "mpt": lambda: MptForCausalLM(
        MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=VOCABULARY, max_seq_len=N_CTX)
    ),
    "olmo-clamped": lambda: OlmoForCausalLM(OlmoConfig(clip_qkv=0.2, **_MLP)),
    "bitnet": lambda: BitNetForCausalLM(BitNetConfig(num_key_value_heads=2, **_MLP)),
    "qwen3next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["full_attention"] * 3,
            **_GQA,
        )
    ),
    "deepseek2": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(
            kv_lora_rank=8,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            first_k_dense_replace=3,
            **_MLP,
        )
    ),
}
REFUSED = tuple(name for name in HF_MODELS if name not in BRIDGED)
