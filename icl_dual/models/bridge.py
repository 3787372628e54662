"""`TransformerBridge`, asked: a Hugging Face model that runs as it is, with TransformerLens's hooks in it."""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from icl_dual import dual
from icl_dual.models.backend import (
    Backend,
    Hook,
    OnGradient,
    OnResidual,
    OnTensor,
    Projection,
    ProjectionDelta,
    ProjectionName,
    UnsupportedModelError,
    Weight,
    callback_hook,
    check_unsupported,
)


class BridgeBackend(Backend):
    """A `TransformerBridge` with raw weights."""

    supports_projection_deltas = True

    HOOK_NAMES: ClassVar[dict[str, str]] = {
        "q": "hook_q",
        "k": "hook_k",
        "v": "hook_v",
        "q_normed": "hook_q_normed",
        "rot_q": "hook_rot_q",
        "rot_k": "hook_rot_k",
        "cos": "hook_cos",
        "sin": "hook_sin",
    }

    def __init__(self, wrapped: TransformerBridge) -> None:
        super().__init__(wrapped)
        self.original: Any = wrapped.original_model
        self.architecture = str(self.wrapped.cfg.architecture)
        self.rope_scaling_threshold = _rope_scaling_threshold(self.original.config)

    def check_supported(self) -> None:
        """Processed weights, what is no decoder, and attention that is known not to split."""
        bridge, cfg = self.wrapped, self.wrapped.cfg
        if bridge.compatibility_mode:
            raise UnsupportedModelError(
                f"{cfg.architecture}: expected raw weights, got a model in compatibility mode, whose folded weights "
                "change W_V, W_O and the path of SGD. Boot it again without enable_compatibility_mode()"
            )
        causal = type(bridge.original_model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        hf_config: Any = getattr(bridge.original_model, "config", None)
        if not causal or getattr(hf_config, "is_encoder_decoder", False) or not bridge.adapter.supports_causal_loss:
            raise UnsupportedModelError(f"{cfg.architecture}: expected a decoder-only causal language model")
        wanted = ("hook_q", "hook_k", "hook_v", "hook_z", "o.hook_out")
        hooks = frozenset(bridge.hook_dict)
        for layer in range(cfg.n_layers):
            _check_attention(bridge, cfg.architecture, layer)
            missing = [name for name in wanted if f"blocks.{layer}.attn.{name}" not in hooks]
            if missing:
                raise UnsupportedModelError(
                    f"{cfg.architecture}, layer {layer}: expected softmax attention with hooks {wanted}, found no "
                    f"{missing}"
                )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The Hugging Face model's."""
        return self.original.parameters()

    def forward_weights(self) -> Iterator[nn.Parameter]:
        """Every parameter, and the projections that the bridge has split out of fused ones and runs instead."""
        yield from self.parameters()
        for layer in range(self.n_layers):
            attn = self._attn(layer)
            for part in (attn.q, attn.k, attn.v, attn.o):
                yield from part.original_component.parameters()

    def projection(self, layer: int, kind: ProjectionName) -> Projection:
        """A linear layer of the model, or of the bridge, which splits fused ones."""
        module: Any = self._linear(layer, kind)
        width = (self.n_key_value_heads if kind in "KV" else self.n_heads) * self.d_head
        shape = (self.d_model, width) if kind == "O" else (width, self.d_model)
        transposed = isinstance(module, Conv1D)  # GPT-2 keeps its output's weight input first
        linear = transposed or isinstance(module, nn.Linear)  # Falcon's own class is a subclass of it
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        if not linear or weight is None or tuple(weight.shape) != (shape[::-1] if transposed else shape):
            raise UnsupportedModelError(
                f"{self.architecture}, layer {layer}: expected W_{kind} as a linear layer of shape {shape}, got "
                f"{module}"
            )
        W = Weight(weight, "d_in d_out" if transposed else "d_out d_in", "d_out d_in")
        return Projection(W, None if bias is None else Weight(bias, "d_out", "d_out"))

    def attention_rule(self, layer: int) -> dual.AttentionRule:
        """From the attention's own attributes, or its configuration's."""
        attn: Any = self._attn(layer).original_component
        scale = getattr(attn, "scaling", None)
        # Where every layer has the same window, transformers keeps it in the configuration (Mistral).
        config: Any = getattr(attn, "config", None)
        window = getattr(attn, "sliding_window", getattr(config, "sliding_window", None))
        if self.architecture == "GPTNeoForCausalLM":  # unscaled scores, and windows on alternate layers
            scale, window = 1.0, config.window_size if attn.attention_type == "local" else None
        sink = getattr(attn, "sinks", None)
        return dual.AttentionRule(
            scale=float(self.d_head**-0.5 if scale is None else scale),
            softcap=getattr(attn, "attn_logit_softcapping", None),
            window=window,
            slopes=self._alibi_slopes(),
            sink=None if sink is None else sink.detach(),
        )

    def forward(self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " pos"]) -> Tensor:
        """The Hugging Face model's own, with an explicit mask."""
        # Without one, transformers may read a jump in the positions as the border of packed sequences.
        return self.wrapped(
            tokens,
            position_ids=positions.expand(tokens.shape),
            attention_mask=torch.ones_like(tokens),
            use_cache=False,
        )

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """By the bridge's final norm and unembedding, and the model's cap on logits."""
        logits = self.wrapped.unembed(self.wrapped.ln_final(residual))
        cap = getattr(self.original.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def reinitialised(self, seed: int) -> "BridgeBackend":
        """A bridge to a new Hugging Face model, drawn by transformers."""
        drawn: Any = _reinitialised(self.original, seed)
        drawn.to(next(self.parameters()).device)
        made = TransformerBridge.boot_transformers(
            self.architecture, hf_model=drawn, tokenizer=self.tokenizer, device=drawn.device, dtype=drawn.dtype
        )
        return BridgeBackend(made)

    def read(self, layer: int, seen: dict[str, Tensor], positions: Int[Tensor, " pos"]) -> tuple[Tensor, ...]:
        """From rotated queries and keys where hooks show these; else rotated here."""
        q = self._by_head(seen.get("q_normed", seen["q"]), self.n_heads, normed="q_normed" in seen)
        if "rot_q" in seen:
            scored_q, scored_k = seen["rot_q"], seen["rot_k"]
        elif "cos" in seen:  # fused rotary attention (GPT-NeoX) has these hooks but fires only its angles
            scored_q, scored_k = (_rotate(seen[name], seen["cos"], seen["sin"]) for name in ("q", "k"))
        elif self.architecture == "GPTJForCausalLM":  # no hook shows its angles: they are a table by position
            angles = self._attn(layer).original_component.embed_positions[positions].to(q)
            sin, cos = angles.repeat_interleave(2, dim=-1)[None].chunk(2, dim=-1)
            scored_q, scored_k = (_rotate(seen[name], cos, sin, pairs=True) for name in ("q", "k"))
        else:
            scored_q, scored_k = q, seen["k"]
        return scored_q, scored_k, self.values(seen["v"]), q

    def pre_rotary_hooks(self, layer: int, kind: Literal["Q", "K"], show: OnTensor) -> list[Hook]:
        """At the hook after norms, where there is one."""
        name = f"blocks.{layer}.attn.hook_{kind.lower()}"
        normed = f"{name}_normed" in self.hook_points
        n_heads = self.n_heads if kind == "Q" else self.n_key_value_heads

        def hook_fn(content: Tensor, hook: Any) -> None:
            show(layer, self._by_head(content, n_heads, normed))

        return [(self.hook_points[name + "_normed" * normed], hook_fn)]

    def gradient_hooks(self, layer: int, kind: Literal["K", "V"], show: OnGradient) -> list[Hook]:
        """At the linear layer that runs."""

        def hook_fn(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> None:
            output.register_hook(partial(show, layer, kind, args[0].detach()))

        return [(self._linear(layer, kind), hook_fn)]

    def projection_delta_hook(self, layer: int, kind: ProjectionName, added: ProjectionDelta) -> Hook:
        """At the linear layer that runs."""

        def hook_fn(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return output + added(layer, kind, args[0])

        return self._linear(layer, kind), hook_fn

    def output_hook(self, layer: int, show: OnTensor) -> Hook:
        """At the output projection: the attention's own hook_out has the residual stream in it on Bloom."""
        return self.hook_points[f"blocks.{layer}.attn.o.hook_out"], callback_hook(layer, show)

    def residual_hook(self, layer: int, show: OnResidual) -> Hook:
        """At the block's output."""
        return self.hook_points[f"blocks.{layer}.hook_out"], callback_hook(layer, show)

    def _attn(self, layer: int) -> Any:
        return self.wrapped.blocks[layer].attn

    def _linear(self, layer: int, kind: ProjectionName) -> Any:
        return getattr(self._attn(layer), kind.lower()).original_component

    def _by_head(self, content: Tensor, n_heads: int, normed: bool) -> Float[Tensor, "batch pos _ d_head"]:
        """Queries or keys as their hook shows them, heads apart; where each is normed by itself, heads come first."""
        if normed and content.ndim == 4:
            return content.transpose(1, 2)
        return content.reshape(*content.shape[:2], n_heads, self.d_head)

    def _alibi_slopes(self) -> Float[Tensor, " head"] | None:
        """The bias that the model itself adds for one position of distance, where it adds any."""
        decoder: Any = getattr(self.original, "transformer", None)
        if not hasattr(decoder, "build_alibi_tensor"):
            return None
        mask = torch.ones(1, 2, dtype=torch.long, device=next(self.parameters()).device)
        return decoder.build_alibi_tensor(mask, self.n_heads, torch.float32)[:, 0, 1]


def _check_attention(bridge: TransformerBridge, architecture: str, layer: int) -> None:
    """Name what a layer's attention does beyond softmax over scaled scores, where that is known from its parts."""
    attn: Any = getattr(bridge.blocks[layer], "attn", None)
    original = getattr(attn, "original_component", None)
    config: Any = bridge.original_model.config
    known = {
        "latent attention, whose keys and values are compressed together": hasattr(original, "kv_a_proj_with_mqa"),
        "a norm between the heads and W_O": hasattr(original, "attn_sub_norm"),
        "a gate on the heads' output": hasattr(attn, "hook_q_gate"),
        "queries, keys and values that are clamped": getattr(config, "clip_qkv", None) is not None,
        "ALiBi rounded to bfloat16, which differs from place to place": architecture == "FalconForCausalLM"
        and config.alibi,
        "ALiBi in a form that is read for Bloom only": architecture == "MptForCausalLM",
        "ALiBi in half precision, whose biases are rounded": architecture == "BloomForCausalLM"
        and next(bridge.original_model.parameters()).dtype.itemsize < 4,
    }
    check_unsupported(f"{architecture}, layer {layer}", known)


def _rope_scaling_threshold(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "dynamic"):
        return None
    switch = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
    return int(switch or config.max_position_embeddings)


def _reinitialised(original: Any, seed: int) -> PreTrainedModel:
    """A model of the same class, configuration and type, all of whose weights its own initialiser has drawn."""
    name = type(original).__name__
    if not isinstance(original, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers model, whose class says how its weights are initialised, got {name}: it has no "
            "untrained control"
        )
    config = type(original.config).from_dict(original.config.to_dict())
    with torch.random.fork_rng(devices=[]):
        drawn: Any = type(original)._from_config(config, dtype=original.dtype, attn_implementation="eager").eval()
        output = drawn.get_output_embeddings()
        tied = output.weight is drawn.get_input_embeddings().weight
        # Drawn once more over NaN: a weight that its initialiser does not know shows.
        for module in drawn.modules():
            module._is_hf_initialized = tied and module is output  # else its draw would follow the embedding's
        with torch.no_grad():
            for parameter in drawn.parameters():
                parameter._is_hf_initialized = False
                parameter.fill_(torch.nan)
        torch.default_generator.manual_seed(seed)  # torch's own manual_seed reseeds accelerators, too
        drawn.initialize_weights()
    unknown = [name for name, parameter in drawn.named_parameters() if parameter.isnan().any()]
    if unknown:
        raise UnsupportedModelError(
            f"expected {name} to initialise all its weights, got none for {unknown[0]!r} ({len(unknown)} in all): it "
            "has no untrained control"
        )
    return drawn


def _rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos d_rot"],
    sin: Float[Tensor, "#batch pos d_rot"],
    *,
    pairs: bool = False,
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotary embedding of the first d_rot dimensions: halves turned against each other, or neighbours in pairs."""
    d_rot = cos.shape[-1]
    turned, kept = x[..., :d_rot], x[..., d_rot:]
    if pairs:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    turned = turned * cos.unsqueeze(2) + partner * sin.unsqueeze(2)
    return torch.cat((turned, kept), dim=-1)
