"""The backend for `TransformerBridge`: a Hugging Face model with raw weights and TransformerLens's hooks in it."""

from collections.abc import Callable, Iterator
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
    MlpForm,
    MlpPart,
    OnGradient,
    OnMlp,
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
from icl_dual.models.journal import Undo
from icl_dual.models.precision import upcast
from icl_dual.torch_utils import is_half


class BridgeBackend(Backend):
    """Reads a `TransformerBridge` with raw weights."""

    supports_projection_deltas = True
    supports_arithmetic = True

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

    def __init__(self, wrapped: TransformerBridge, arithmetic: torch.dtype | None = None) -> None:
        self.original: Any = wrapped.original_model
        super().__init__(wrapped, arithmetic)
        self.architecture = str(self.wrapped.cfg.architecture)
        self.rope_scaling_threshold = _rope_scaling_threshold(self.original.config)

    def check_supported(self) -> None:
        """Check for processed weights, models that are not decoders, and attention that cannot be split."""
        bridge, cfg = self.wrapped, self.wrapped.cfg
        if bridge.compatibility_mode:
            raise UnsupportedModelError(
                f"{cfg.architecture}: expected raw weights, got a model in compatibility mode, which changes W_V, W_O "
                "and the path of SGD: boot it again without enable_compatibility_mode()"
            )
        if hasattr(bridge.original_model, "_orig_mod"):
            raise UnsupportedModelError(
                f"{cfg.architecture}: expected a model that torch.compile has not compiled, got "
                f"{type(bridge.original_model).__name__}: hooks need its modules to run one by one, so boot the model "
                "that you gave to torch.compile"
            )
        names = {cls.__name__ for cls in type(bridge.original_model).__mro__}
        causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        hf_config: Any = getattr(bridge.original_model, "config", None)
        if not causal or getattr(hf_config, "is_encoder_decoder", False) or not bridge.adapter.supports_causal_loss:
            raise UnsupportedModelError(
                f"{cfg.architecture}: expected a decoder-only causal language model, got "
                f"{type(bridge.original_model).__name__}: use a model that AutoModelForCausalLM loads"
            )
        required = ("hook_q", "hook_k", "hook_v", "hook_z", "o.hook_out")
        hooks = frozenset(bridge.hook_dict)
        for layer in range(cfg.n_layers):
            _check_attention(bridge, cfg.architecture, layer, self.arithmetic)
            missing = [name for name in required if f"blocks.{layer}.attn.{name}" not in hooks]
            if missing:
                raise UnsupportedModelError(
                    f"{cfg.architecture}, layer {layer}: expected softmax attention with hooks {required}, got none of "
                    f"{missing}: its attention cannot be read, use another model"
                )

    def upcast(self, undo: Undo) -> None:
        """Let blocks run on copies of their weights in `arithmetic`, one block at a time, until the block ends."""
        if self.arithmetic is not None:
            upcast([self.wrapped, self.original], list(self.wrapped.blocks), self.arithmetic, undo)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the Hugging Face model's parameters."""
        return self.original.parameters()

    def forward_weights(self) -> Iterator[nn.Parameter]:
        """Yield every parameter, and the projections that the bridge has split out of fused ones and runs instead."""
        yield from self.parameters()
        for layer in range(self.n_layers):
            attn = self._attn(layer)
            for linear in (attn.q, attn.k, attn.v, attn.o):
                yield from linear.original_component.parameters()

    def projection(self, layer: int, kind: ProjectionName) -> Projection:
        """Return a linear layer of the model, or of the bridge, which splits fused ones."""
        module: Any = self._linear(layer, kind)
        width = (self.n_key_value_heads if kind in "KV" else self.n_heads) * self.d_head
        shape = (self.d_model, width) if kind == "O" else (width, self.d_model)
        transposed = isinstance(module, Conv1D)  # GPT-2 keeps its output's weight input first
        linear = transposed or isinstance(module, nn.Linear)  # Falcon's own class is a subclass of it
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        if not linear or weight is None or tuple(weight.shape) != (shape[::-1] if transposed else shape):
            raise UnsupportedModelError(
                f"{self.architecture}, layer {layer}: expected W_{kind} as a linear layer of shape {shape}, got "
                f"{module}: its weights cannot be read, use another model"
            )
        W = Weight(weight, "d_in d_out" if transposed else "d_out d_in", "d_out d_in")
        return Projection(W, None if bias is None else Weight(bias, "d_out", "d_out"))

    def attention_rule(self, layer: int) -> dual.AttentionRule:
        """Return the rule that the attention module's attributes and its configuration describe."""
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
        """Run the Hugging Face model's own forward pass with an explicit mask."""
        # Without one, transformers may read a jump in the positions as the border of packed sequences.
        return self.wrapped(
            tokens,
            position_ids=positions.expand(tokens.shape),
            attention_mask=torch.ones_like(tokens),
            use_cache=False,
        )

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Apply the bridge's final norm and unembedding, and the model's softcap on logits."""
        logits = self.wrapped.unembed(self.wrapped.ln_final(residual))
        cap = getattr(self.original.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def reinitialised(self, seed: int) -> "BridgeBackend":
        """Return a bridge to a new Hugging Face model, initialised by transformers."""
        hf_model: Any = _reinitialised(self.original, seed)
        hf_model.to(next(self.parameters()).device)
        bridge = TransformerBridge.boot_transformers(
            self.architecture, hf_model=hf_model, tokenizer=self.tokenizer, device=hf_model.device, dtype=hf_model.dtype
        )
        return BridgeBackend(bridge, self.arithmetic)

    def attention_inputs(
        self, layer: int, activations: dict[str, Tensor], positions: Int[Tensor, " pos"]
    ) -> tuple[Tensor, ...]:
        """Return the attention inputs; rotary embedding is computed here where no hook holds its result."""
        q = self._by_head(activations.get("q_normed", activations["q"]), self.n_heads, normed="q_normed" in activations)
        if "rot_q" in activations:
            scored_q, scored_k = activations["rot_q"], activations["rot_k"]
        elif "cos" in activations:  # fused rotary attention (GPT-NeoX) has these hooks but fires only its angles
            cos, sin = activations["cos"], activations["sin"]
            scored_q, scored_k = (_rotate(activations[name], cos, sin) for name in ("q", "k"))
        elif self.architecture == "GPTJForCausalLM":  # no hook holds its angles: they are a table by position
            angles = self._attn(layer).original_component.embed_positions[positions].to(q)
            sin, cos = angles.repeat_interleave(2, dim=-1)[None].chunk(2, dim=-1)
            scored_q, scored_k = (_rotate(activations[name], cos, sin, pairs=True) for name in ("q", "k"))
        else:
            scored_q, scored_k = q, activations["k"]
        return scored_q, scored_k, self.values_by_head(activations["v"]), q

    def pre_rotary_hooks(self, layer: int, kind: Literal["Q", "K"], callback: OnTensor) -> list[Hook]:
        """Return the hook after the norm of queries or keys where the layer has one, else after the projection."""
        name = f"blocks.{layer}.attn.hook_{kind.lower()}"
        # A norm that is optional has a hook in models without it, too, which never fires (StableLM).
        normed = f"{name}_normed" in self.hook_points and f"{kind.lower()}_norm" in self._attn(layer).submodules
        n_heads = self.n_heads if kind == "Q" else self.n_key_value_heads

        def hook_fn(projected: Tensor, hook: Any) -> None:
            callback(layer, self._by_head(projected, n_heads, normed))

        return [(self.hook_points[name + "_normed" * normed], hook_fn)]

    def gradient_hooks(self, layer: int, kind: Literal["K", "V"], callback: OnGradient) -> list[Hook]:
        """Return a hook on the linear layer that runs."""

        def hook_fn(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> None:
            output.register_hook(partial(callback, layer, kind, args[0].detach()))

        return [(self._linear(layer, kind), hook_fn)]

    def projection_delta_hook(self, layer: int, kind: ProjectionName, delta: ProjectionDelta) -> Hook:
        """Return a hook on the linear layer that runs."""

        def hook_fn(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return (output + delta(layer, kind, args[0])).to(output.dtype)

        return self._linear(layer, kind), hook_fn

    def mlp_form(self, layer: int) -> MlpForm:
        """Return what a layer's MLP is made of, read from the bridge's parts."""
        modules = self._mlp_modules(layer)
        out: Any = modules["out"]
        shift = "scale" if "scale" in modules else "out" if out.bias is None else "bias"
        inputs: tuple[MlpPart, ...] = ("gate", "in")
        d_hidden = int(out.weight.shape[0 if isinstance(out, Conv1D) else 1])
        return MlpForm(tuple(part for part in inputs if part in modules), shift, d_hidden)

    def mlp_hooks(self, layer: int, callback: OnMlp) -> list[Hook]:
        """Return hooks on the linear layers that run, and on the norm after the MLP."""
        return [(module, _mlp_hook(layer, part, callback)) for part, module in self._mlp_modules(layer).items()]

    def middle_hooks(self, layer: int, callback: OnTensor) -> list[Hook]:
        """Return hooks on the block's input and on attention's output, after its norm where there is one."""
        inputs: list[Tensor] = []

        def keep(residual: Tensor, hook: Any) -> None:
            inputs.append(residual)

        def call_back(written: Tensor, hook: Any) -> None:
            callback(layer, inputs.pop() + written)

        normed = f"blocks.{layer}.ln1_post.hook_out"
        written = normed if normed in self.hook_points else f"blocks.{layer}.attn.o.hook_out"
        return [(self.hook_points[f"blocks.{layer}.hook_in"], keep), (self.hook_points[written], call_back)]

    def _mlp_modules(self, layer: int) -> dict[MlpPart, nn.Module]:
        """Return the modules of a layer's MLP that run, by part."""
        block: Any = self.wrapped.blocks[layer]
        mlp = getattr(block, "mlp", None)
        where, submodules = f"{self.architecture}, layer {layer}", getattr(mlp, "submodules", {})
        if "router" in submodules or hasattr(getattr(mlp, "original_component", None), "experts"):
            raise UnsupportedModelError(
                f"{where}: expected an MLP with projections of its own, got a mixture of experts: the query alone may "
                "be routed to other experts than after the demonstrations, which no change of their weights undoes, "
                "and the experts share one stacked weight without hooks: use a model with dense MLPs"
            )
        modules: dict[MlpPart, nn.Module] = {}
        parts: tuple[MlpPart, ...] = ("gate", "in", "out")
        for part in parts:
            if part in submodules:
                modules[part] = submodules[part].original_component
        if not {"in", "out"} <= set(modules) or not all(isinstance(m, nn.Linear | Conv1D) for m in modules.values()):
            raise UnsupportedModelError(
                f"{where}: expected an MLP of linear projections `in` and `out`, got {mlp}: its weights cannot be "
                "changed, use another model"
            )
        norm = getattr(block, "ln2_post", None)
        if norm is not None:
            if "RMSNorm" not in (name := type(norm.original_component).__name__):
                raise UnsupportedModelError(
                    f"{where}: expected an RMSNorm after the MLP, got {name}: its scale cannot be changed, use another "
                    "model"
                )
            modules["scale"] = norm
        return modules

    def output_hook(self, layer: int, callback: OnTensor) -> Hook:
        """Return a hook on the output projection: on Bloom, attention's own hook_out includes the residual stream."""
        return self.hook_points[f"blocks.{layer}.attn.o.hook_out"], callback_hook(layer, callback)

    def residual_hook(self, layer: int, callback: OnResidual) -> Hook:
        """Return a hook on the block's output."""
        return self.hook_points[f"blocks.{layer}.hook_out"], callback_hook(layer, callback)

    def _attn(self, layer: int) -> Any:
        return self.wrapped.blocks[layer].attn

    def _linear(self, layer: int, kind: ProjectionName) -> Any:
        return getattr(self._attn(layer), kind.lower()).original_component

    def _by_head(self, projected: Tensor, n_heads: int, normed: bool) -> Float[Tensor, "batch pos _ d_head"]:
        """Split queries or keys by head. Hooks after a norm of each head by itself hold heads before positions."""
        if normed and projected.ndim == 4:
            return projected.transpose(1, 2)
        return projected.reshape(*projected.shape[:2], n_heads, self.d_head)

    def _alibi_slopes(self) -> Float[Tensor, " head"] | None:
        """Return the model's ALiBi bias for a distance of one position, by head; `None` without ALiBi."""
        decoder: Any = getattr(self.original, "transformer", None)
        if not hasattr(decoder, "build_alibi_tensor"):
            return None
        mask = torch.ones(1, 2, dtype=torch.long, device=next(self.parameters()).device)
        return decoder.build_alibi_tensor(mask, self.n_heads, torch.float32)[:, 0, 1]


def _mlp_hook(layer: int, part: MlpPart, callback: OnMlp) -> Callable[..., Tensor | None]:
    """Return a hook function that passes on input and output of a part of an MLP."""

    def hook_fn(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        x = _normalised(module, args[0]) if part == "scale" else args[0]
        return callback(layer, part, x, output)

    return hook_fn


def _normalised(norm: Any, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
    """Return what an RMSNorm multiplies with its scale, in float32, in which transformers computes it always."""
    original, x = norm.original_component, x.float()
    eps = original.variance_epsilon if hasattr(original, "variance_epsilon") else original.eps
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _check_attention(bridge: TransformerBridge, architecture: str, layer: int, arithmetic: torch.dtype | None) -> None:
    """Check what a layer's attention does beyond softmax over scaled scores, as far as its parts show it."""
    attn: Any = getattr(bridge.blocks[layer], "attn", None)
    original = getattr(attn, "original_component", None)
    config: Any = bridge.original_model.config
    half_precision = is_half(arithmetic or next(bridge.original_model.parameters()).dtype)
    present_by_feature = {
        "multi-head latent attention (keys and values from one compressed vector)": hasattr(
            original, "kv_a_proj_with_mqa"
        ),
        "a norm between the heads and W_O": hasattr(original, "attn_sub_norm"),
        "a gate on the heads' output": hasattr(attn, "hook_q_gate"),
        "clamped queries, keys and values": getattr(config, "clip_qkv", None) is not None,
        "ALiBi biases rounded to bfloat16 at every position": architecture == "FalconForCausalLM" and config.alibi,
        "ALiBi in another form than Bloom's": architecture == "MptForCausalLM",
        "ALiBi biases rounded to half precision": architecture == "BloomForCausalLM" and half_precision,
    }
    check_unsupported(f"{architecture}, layer {layer}", present_by_feature)


def _rope_scaling_threshold(config: Any) -> int | None:
    """Return the sequence length past which dynamic NTK or LongRoPE scaling changes every rotation, else `None`."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "dynamic"):
        return None
    threshold = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
    return int(threshold or config.max_position_embeddings)


def _reinitialised(original: Any, seed: int) -> PreTrainedModel:
    """Return a model of the same class, configuration and dtype with all weights from its own initialiser."""
    name = type(original).__name__
    if not isinstance(original, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers model, which defines how its weights are initialised, got {name}: it has no "
            "untrained control"
        )
    config = type(original.config).from_dict(original.config.to_dict())
    with torch.random.fork_rng(devices=[]):
        hf_model: Any = type(original)._from_config(config, dtype=original.dtype, attn_implementation="eager").eval()
        output = hf_model.get_output_embeddings()
        tied = output.weight is hf_model.get_input_embeddings().weight
        # Weights are initialised a second time, over NaN: one that the initialiser leaves out stays NaN.
        for module in hf_model.modules():
            module._is_hf_initialized = tied and module is output  # else it would be initialised after the embedding
        with torch.no_grad():
            for parameter in hf_model.parameters():
                parameter._is_hf_initialized = False
                parameter.fill_(torch.nan)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators, too
        hf_model.initialize_weights()
    uninitialised = [name for name, parameter in hf_model.named_parameters() if parameter.isnan().any()]
    if uninitialised:
        raise UnsupportedModelError(
            f"expected {name} to initialise all its weights, got none for {uninitialised[0]!r} "
            f"({len(uninitialised)} in all): it has no untrained control"
        )
    return hf_model


def _rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos d_rot"],
    sin: Float[Tensor, "#batch pos d_rot"],
    *,
    pairs: bool = False,
) -> Float[Tensor, "batch pos head d_head"]:
    """Apply rotary embedding to the first d_rot dimensions.

    Each dimension is rotated with its partner in the other half, or with its neighbour where `pairs`.
    """
    d_rot = cos.shape[-1]
    rotary_part, rest = x[..., :d_rot], x[..., d_rot:]
    if pairs:
        partner = torch.stack((-rotary_part[..., 1::2], rotary_part[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = rotary_part.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    rotated = rotary_part * cos.unsqueeze(2) + partner * sin.unsqueeze(2)
    return torch.cat((rotated, rest), dim=-1)
