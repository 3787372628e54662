"""The tiny configurations of the table in docs/architectures.md: exact, or refused by a reason."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 300
N_CTX = 512
WINDOW = 40
"""Shorter than the test prompts' demonstrations, longer than their queries."""


@dataclass(frozen=True)
class Configuration:
    """A tiny configuration of a decoder architecture of transformers."""

    model_type: str
    """The architecture, as `AutoConfig.for_model` names it."""
    particular: str
    """What is particular about the configuration, for the table."""
    settings: dict[str, Any]
    """The settings of its configuration class."""
    refusal: str | None = None
    """The reason in the error, where the configuration is refused; `None` where it is exact."""

    def build(self) -> PreTrainedModel:
        """Return a new model with weights from transformers' initialiser."""
        config = AutoConfig.for_model(self.model_type, **self.settings)
        return AutoModelForCausalLM.from_config(config)

    @property
    def architecture(self) -> str:
        """Return the name of the model's class."""
        config = AutoConfig.for_model(self.model_type, **self.settings)
        cls: Any = AutoModelForCausalLM._model_mapping[type(config)]
        return cls.__name__


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
}
_MLP: dict[str, Any] = {**_DECODER, "intermediate_size": 48}
_KV: dict[str, Any] = {**_MLP, "num_key_value_heads": 2}
_GQA: dict[str, Any] = {**_KV, "head_dim": 8}
_PADDED: dict[str, Any] = {"pad_token_id": 0}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": N_CTX}
_MPT: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": N_CTX}
_OPT: dict[str, Any] = {**_DECODER, "ffn_dim": 48}
_ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LATER = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_FULL = {"layer_types": ["full_attention"] * 3}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 16, **_EXPERTS}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_LLAMA4 = {**_GQA, **_PADDED, "intermediate_size_mlp": 48, "attention_chunk_size": N_CTX, **_LOCAL_EXPERTS}
_GEMMA4 = {
    **_GQA,
    "num_kv_shared_layers": 0,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_GRANITE = {**_KV, "attention_multiplier": 0.3, "logits_scaling": 4.0, "residual_multiplier": 0.5}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4}
_NO_ATTENTION = "a layer without softmax attention"
_GATED = "a gate on the heads' output"
_MLA = "multi-head latent attention (keys and values from one compressed vector)"
_CLAMPED = "clamped queries, keys and values"


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **settings}}


def _exact() -> dict[str, Configuration]:
    """Return the configurations whose attention is split exactly."""
    C = Configuration
    return {
        "gpt": C("openai-gpt", "norms after each sum", _GPT2),
        "gpt2": C("gpt2", "learned positions, biases, fused projections", _GPT2),
        "gpt2-by-layer": C(
            "gpt2", "scores divided by the layer's number", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}
        ),
        "bigcode": C("gpt_bigcode", "one key-value head in a fused projection", _GPT2),
        "neox": C("gpt_neox", "partial rotation, fused projections, parallel MLP", _MLP),
        "neox-sequential": C("gpt_neox", "sequential MLP", {**_MLP, "use_parallel_residual": False}),
        "neox-full": C("gpt_neox", "rotation of all dimensions", {**_MLP, "rotary_pct": 1.0}),
        "gptj": C("gptj", "rotation of neighbouring pairs, parallel MLP", {**_GPT2, "rotary_dim": 4}),
        "codegen": C(
            "codegen", "rotation of neighbouring pairs, projections fused by partition", {**_GPT2, "rotary_dim": 4}
        ),
        "gptneo-window": C(
            "gpt_neo",
            "unscaled scores, sliding window on alternate layers",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_layers": 3,
                "num_heads": 4,
                "attention_types": [[["global", "local", "global"], 1]],
                "window_size": WINDOW,
                "max_position_embeddings": N_CTX,
            },
        ),
        "opt": C("opt", "learned positions, biases", {**_OPT, "word_embed_proj_dim": 32}),
        "opt-unbiased": C("opt", "no biases", {**_OPT, "word_embed_proj_dim": 32, "enable_bias": False}),
        "opt-projected": C(
            "opt",
            "norms after each sum, projected embeddings",
            {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        ),
        "xglm": C(
            "xglm",
            "sinusoidal positions, biases; the paper's models",
            {
                "vocab_size": VOCABULARY,
                "d_model": 32,
                "ffn_dim": 48,
                "num_layers": 3,
                "attention_heads": 4,
                "max_position_embeddings": N_CTX,
            },
        ),
        "bloom": C(
            "bloom",
            "ALiBi, fused projections",
            {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
        ),
        "bloom-3-heads": C(
            "bloom", "ALiBi of 3 heads", {"vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 3, "n_head": 3}
        ),
        "mpt": C("mpt", "ALiBi, fused projections", _MPT),
        "mpt-6-heads": C("mpt", "ALiBi of 6 heads", {**_MPT, "d_model": 48, "n_heads": 6}),
        "mpt-scaled": C("mpt", "another scale of scores", {**_MPT, "attn_config": {"softmax_scale": 0.2}}),
        "falcon": C("falcon", "one key-value head, rotation, parallel MLP", _DECODER),
        "falcon-sequential": C(
            "falcon",
            "fused projections, biases",
            {**_DECODER, "multi_query": False, "parallel_attn": False, "bias": True},
        ),
        "llama": C("llama", "rotation, grouped queries", _GQA),
        "llama-ungrouped": C("llama", "as many key-value heads as query heads", _MLP),
        "llama-biased": C("llama", "biases on all projections", {**_GQA, "attention_bias": True}),
        "llama-tied": C("llama", "tied embeddings", {**_GQA, "tie_word_embeddings": True}),
        "llama-llama3": C(
            "llama",
            "rotation scaled by frequency",
            {**_GQA, **_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)},
        ),
        "llama-yarn": C("llama", "YaRN", {**_GQA, **_rope("yarn", original_max_position_embeddings=128)}),
        "llama-linear": C("llama", "rotation of scaled positions", {**_GQA, **_rope("linear")}),
        "llama-dynamic": C("llama", "dynamic NTK", {**_GQA, **_rope("dynamic")}),
        "llama4": C("llama4_text", "rotation and norms inside transformers, experts", _LLAMA4),
        "llama4-unrotated": C(
            "llama4_text",
            "layers without rotation, no norms",
            {**_LLAMA4, "no_rope_layers": [1, 0, 1], "use_qk_norm": False, "attn_temperature_tuning": False, **_FULL},
        ),
        "mistral": C("mistral", "rotation, grouped queries", {**_GQA, "sliding_window": None}),
        "mistral-window": C("mistral", "sliding window", {**_GQA, "sliding_window": WINDOW}),
        "ministral3": C(
            "ministral3",
            "queries scaled by position",
            {**_GQA, **_rope("yarn", llama_4_scaling_beta=0.1, original_max_position_embeddings=16)},
        ),
        "mixtral": C("mixtral", "experts", {**_GQA, "sliding_window": None, **_LOCAL_EXPERTS}),
        "mixtral-window": C("mixtral", "experts, sliding window", {**_GQA, "sliding_window": WINDOW, **_LOCAL_EXPERTS}),
        "qwen2": C("qwen2", "biases on queries, keys and values only", _KV),
        "qwen2-window": C("qwen2", "sliding window from the second layer on", {**_KV, **_LATER}),
        "qwen2moe": C("qwen2_moe", "experts, a window of 0 for none", {**_KV, **_SHARED_EXPERT}),
        "qwen2moe-window": C(
            "qwen2_moe", "experts, sliding window in the first layer", {**_KV, **_SHARED_EXPERT, **_LATER}
        ),
        "qwen2moe-unbiased": C("qwen2_moe", "experts, no biases", {**_KV, **_SHARED_EXPERT, "qkv_bias": False}),
        "qwen3": C("qwen3", "norms on queries and keys", _GQA),
        "qwen3-window": C("qwen3", "sliding window from the second layer on", {**_GQA, **_LATER}),
        "qwen3moe": C("qwen3_moe", "experts", {**_GQA, **_EXPERTS}),
        "qwen3moe-window": C("qwen3_moe", "experts, sliding window", {**_GQA, **_EXPERTS, **_LATER}),
        "gemma": C("gemma", "scaled embeddings", _GQA),
        "gemma2-window": C(
            "gemma2",
            "capped scores, alternate sliding windows, norms after attention",
            {**_GQA, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},  # so low that it bends scores here
        ),
        "gemma2-uncapped": C(
            "gemma2",
            "no caps, another scale of scores",
            {
                **_GQA,
                "sliding_window": WINDOW,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "query_pre_attn_scalar": 16,
            },
        ),
        "gemma3-window": C(
            "gemma3_text", "norms on queries and keys, sliding windows, norms after attention", {**_GQA, **_ALTERNATING}
        ),
        "gemma3-capped": C(
            "gemma3_text",
            "capped logits, another scale of scores",
            {**_GQA, **_ALTERNATING, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
        ),
        "vaultgemma": C(
            "vaultgemma", "capped scores, sliding windows", {**_GQA, **_ALTERNATING, "attn_logit_softcapping": 2.0}
        ),
        "phi": C("phi", "partial rotation, biases, parallel MLP", _MLP),
        "phi3": C("phi3", "fused projections", {**_KV, **_PADDED}),
        "phi3-window": C("phi3", "fused projections, sliding window", {**_KV, **_PADDED, "sliding_window": WINDOW}),
        "stablelm": C("stablelm", "partial rotation", _KV),
        "stablelm-normed": C("stablelm", "a norm for each head's queries and keys", {**_KV, "qk_layernorm": True}),
        "stablelm-parallel": C(
            "stablelm", "parallel MLP, biases", {**_KV, "use_parallel_residual": True, "use_qkv_bias": True}
        ),
        "olmo": C("olmo", "norms without weights", _MLP),
        "olmo2": C("olmo2", "norms over all of a layer's queries and keys", _KV),
        "olmo3": C("olmo3", "norms over all queries and keys, sliding windows", {**_KV, **_ALTERNATING}),
        "olmoe": C("olmoe", "experts", {**_KV, "num_experts": 2, "num_experts_per_tok": 1}),
        "cohere": C(
            "cohere", "scaled logits, parallel MLP, rotation of neighbouring pairs", {**_KV, "logit_scale": 0.25}
        ),
        "cohere-normed": C("cohere", "a norm for each head's queries and keys", {**_KV, "use_qk_norm": True}),
        "cohere2": C("cohere2", "scaled logits, layers without rotation, sliding windows", {**_GQA, **_ALTERNATING}),
        "granite": C("granite", "scaled scores, residuals and logits", {**_GRANITE, "embedding_multiplier": 2.0}),
        "granitemoe": C("granitemoe", "scaled scores and logits, experts", {**_GRANITE, **_LOCAL_EXPERTS}),
        "starcoder2": C("starcoder2", "biases", _KV),
        "starcoder2-window": C("starcoder2", "biases, sliding window", {**_KV, "sliding_window": WINDOW}),
        "gptoss-window": C(
            "gpt_oss", "sinks, alternate sliding windows, experts", {**_GQA, **_ALTERNATING, **_LOCAL_EXPERTS}
        ),
        "smollm3": C("smollm3", "layers without rotation", {**_KV, **_PADDED, "no_rope_layers": [1, 0, 1]}),
        "nemotron": C("nemotron", "partial rotation, norms with 1 added to their weights", _KV),
        "glm": C("glm", "partial rotation of neighbouring pairs", {**_GQA, **_PADDED}),
        "glm4": C("glm4", "norms after attention", {**_GQA, **_PADDED}),
        "glm4moe": C("glm4_moe", "experts", {**_GQA, "n_routed_experts": 2, "first_k_dense_replace": 1, **_EXPERTS}),
        "ernie": C("ernie4_5", "rotation of neighbouring pairs", _GQA),
        "erniemoe": C(
            "ernie4_5_moe", "experts", {**_KV, "moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 16}
        ),
        "exaone4": C(
            "exaone4", "norms on queries and keys, layers without rotation, sliding windows", {**_KV, **_ALTERNATING}
        ),
        "apertus": C("apertus", "norms on queries and keys", {**_KV, **_PADDED}),
        "arcee": C("arcee", "rotation, grouped queries", _GQA),
        "seedoss": C("seed_oss", "biases on queries, keys and values only", _GQA),
        "hunyuan": C("hunyuan_v1_dense", "norms on queries and keys after rotation", _GQA),
        "jais2": C("jais2", "biases", _GQA),
        "minimaxm2": C(
            "minimax_m2", "norms over all of a layer's queries and keys, experts", {**_GQA, **_LOCAL_EXPERTS}
        ),
        "lfm2": C("lfm2", "attention in all layers", {**_KV, **_FULL}),
    }


def _refused() -> dict[str, Configuration]:
    """Return the configurations that are refused."""
    C = Configuration
    return {
        "gpt2-unscaled": C(
            "gpt2",
            "unscaled scores",
            {**_GPT2, "scale_attn_weights": False},
            "unscaled scores (scale_attn_weights=False), which its bridge scales",
        ),
        "bigcode-ungrouped": C(
            "gpt_bigcode",
            "as many key-value heads as query heads",
            {**_GPT2, "multi_query": False},
            "GPTBigCodeArchitectureAdapter only supports multi_query=True models",
        ),
        "neox-unbiased": C(
            "gpt_neox",
            "no biases",
            {**_MLP, "attention_bias": False},
            "attention without biases (attention_bias=False)",
        ),
        "opt-unnormed": C(
            "opt",
            "norms after each sum",
            {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
            "a module for each hook of transformer-lens, got none for ln_final",
        ),
        "mpt-clamped": C("mpt", "clamped projections", {**_MPT, "attn_config": {"clip_qkv": 0.2}}, _CLAMPED),
        "falcon-alibi": C(
            "falcon", "ALiBi", {**_DECODER, "alibi": True}, "ALiBi biases rounded to bfloat16 at every position"
        ),
        "falcon-grouped": C(
            "falcon",
            "grouped keys and values",
            {**_DECODER, "new_decoder_architecture": True, "num_kv_heads": 2},
            "grouped keys and values in one fused projection (new_decoder_architecture=True)",
        ),
        "falcon-reordered": C(
            "falcon",
            "grouped keys and values",
            {**_DECODER, "new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
            "grouped keys and values in one fused projection, which its bridge splits in another order",
        ),
        "llama4-chunked": C(
            "llama4_text",
            "prompts longer than a chunk of attention",
            {**_LLAMA4, "attention_chunk_size": WINDOW},
            f"prompts of at most {WINDOW} tokens",
        ),
        "llama4-tuned": C(
            "llama4_text",
            "prompts longer than the positions without a scale",
            {**_LLAMA4, "no_rope_layers": [1, 0, 1], "attn_temperature_tuning": True, "floor_scale": 16},
            "prompts of at most 15 tokens",
        ),
        "ministral": C(
            "ministral",
            "no bridge",
            {**_GQA, **_ALTERNATING},
            "Could not determine supported architecture from config",
        ),
        "phi-normed": C(
            "phi",
            "norms on queries and keys",
            {**_MLP, "qk_layernorm": True},
            "HF module has 'q_layernorm' but adapter did not declare 'q_norm'",
        ),
        "phimoe": C(
            "phimoe",
            "no bridge",
            {**_KV, **_LOCAL_EXPERTS},
            "Could not determine supported architecture from config",
        ),
        "olmo-clamped": C("olmo", "clamped projections", {**_MLP, "clip_qkv": 0.2}, _CLAMPED),
        "bitnet": C("bitnet", "a norm before W_O", _KV, "a norm between the heads and W_O"),
        "gemma3-bidirectional": C(
            "gemma3_text",
            "bidirectional attention",
            {**_GQA, **_ALTERNATING, "use_bidirectional_attention": True},
            "bidirectional attention",
        ),
        "gemma4": C("gemma4_text", "norms of values", {**_GEMMA4, **_FULL}, "a norm of values"),
        "qwen3next": C("qwen3_next", "gated attention", {**_GQA, **_SHARED_EXPERT, **_FULL}, _GATED),
        "qwen3next-linear": C(
            "qwen3_next",
            "linear attention",
            {**_GQA, **_SHARED_EXPERT, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
            _NO_ATTENTION,
        ),
        "qwen35": C("qwen3_5_text", "gated attention", {**_GQA, **_FULL}, _GATED),
        "afmoe": C(
            "afmoe",
            "gated attention",
            {
                **_GQA,
                "moe_intermediate_size": 16,
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "num_dense_layers": 1,
                **_FULL,
            },
            _GATED,
        ),
        "laguna": C("laguna", "gated attention", {**_GQA, **_EXPERTS}, _GATED),
        "nanochat": C("nanochat", "rotation inside transformers", _KV, "rotary embedding that no hook shows"),
        "modernbert-decoder": C(
            "modernbert-decoder",
            "rotation inside transformers",
            {**_MLP, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1},
            "rotary embedding that no hook shows",
        ),
        "deepseek2": C("deepseek_v2", "latent attention", {**_MLP, **_LATENT, "first_k_dense_replace": 3}, _MLA),
        "deepseek3": C("deepseek_v3", "latent attention", {**_MLP, **_LATENT, "first_k_dense_replace": 3}, _MLA),
        "youtu": C("youtu", "latent attention", {**_MLP, **_LATENT}, _MLA),
        "jetmoe": C(
            "jetmoe",
            "experts in attention",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_key_value_heads": 2,
                "kv_channels": 8,
                "intermediate_size": 48,
                "max_position_embeddings": N_CTX,
                **_LOCAL_EXPERTS,
            },
            "experts in attention's projections",
        ),
        "falconh1": C(
            "falcon_h1",
            "state-space models in parallel with attention",
            {**_KV, **_MAMBA, "mamba_d_ssm": 64},
            "a state-space model that runs in parallel with attention",
        ),
        "granitehybrid": C(
            "granitemoehybrid",
            "state-space layers",
            {
                **_KV,
                "layer_types": ["mamba", "attention", "attention"],
                "shared_intermediate_size": 16,
                "mamba_n_heads": 4,
                "mamba_d_head": 16,
                "mamba_expand": 2,
                **_LOCAL_EXPERTS,
            },
            _NO_ATTENTION,
        ),
        "mamba": C(
            "mamba",
            "state-space layers",
            {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            _NO_ATTENTION,
        ),
        "mamba2": C(
            "mamba2",
            "state-space layers",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "state_size": 4,
                "num_heads": 4,
                "head_dim": 16,
                "n_groups": 1,
            },
            _NO_ATTENTION,
        ),
        "jamba": C(
            "jamba",
            "state-space layers",
            {
                **_KV,
                "attn_layer_period": 2,
                "attn_layer_offset": 0,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "use_mamba_kernels": False,
                "mamba_d_state": 4,
                "mamba_dt_rank": 4,
            },
            _NO_ATTENTION,
        ),
        "bamba": C("bamba", "state-space layers", {**_KV, **_MAMBA, "attn_layer_indices": [1]}, _NO_ATTENTION),
        "nemotronh": C(
            "nemotron_h",
            "state-space layers",
            {
                **_KV,
                "hybrid_override_pattern": "M*-",
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 4,
                "n_groups": 1,
            },
            _NO_ATTENTION,
        ),
        "lfm2-hybrid": C(
            "lfm2",
            "convolutions in some layers",
            {**_KV, "layer_types": ["conv", "full_attention", "full_attention"]},
            _NO_ATTENTION,
        ),
        "recurrentgemma": C(
            "recurrent_gemma",
            "recurrent layers",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "intermediate_size": 48,
                "lru_width": 32,
            },
            _NO_ATTENTION,
        ),
        "rwkv": C(
            "rwkv",
            "recurrent layers",
            {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
            _NO_ATTENTION,
        ),
    }


EXACT = _exact()
"""The configurations whose attention is split exactly, by name."""
REFUSED = _refused()
"""The configurations that are refused, by name."""
CONFIGURATIONS = EXACT | REFUSED
"""All configurations by name."""


def table() -> str:
    """Return the table of docs/architectures.md."""
    rows = [
        f"| {configuration.architecture} | {configuration.particular} | "
        f"{'exact' if configuration.refusal is None else f'refused: {configuration.refusal}'} |"
        for configuration in CONFIGURATIONS.values()
    ]
    return "\n".join(("| architecture | what is particular | result |", "|---|---|---|", *rows))
