"""The backend for `TransformerBridge`: a Hugging Face model with raw weights and TransformerLens's hooks in it."""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import AttentionBridge, TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from icl_dual import dual
from icl_dual.models.adapters import check_no_adapters
from icl_dual.models.backend import (
    Backend,
    DirectPathParts,
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
    check_direct_path,
    check_unsupported,
)
from icl_dual.models.bypass import bypass_unhooked, bypasses, has_hooks
from icl_dual.models.journal import Undo
from icl_dual.models.placement import check_placement, mlp_matrices, place
from icl_dual.models.precision import run_copies
from icl_dual.torch_utils import fork_rng, is_half, is_out_of_memory


class BridgeBackend(Backend):
    """Reads a `TransformerBridge` with raw weights."""

    supports_projection_deltas = True
    supports_arithmetic = True

    HOOK_NAMES: ClassVar[dict[str, str]] = {
        "q": "hook_q",
        "k": "hook_k",
        "v": "hook_v",
        "q_normed": "hook_q_normed",
        "k_normed": "hook_k_normed",
        "rot_q": "hook_rot_q",
        "rot_k": "hook_rot_k",
        "cos": "hook_cos",
        "sin": "hook_sin",
    }

    def __init__(self, wrapped: TransformerBridge, arithmetic: torch.dtype | None = None) -> None:
        self.original: Any = wrapped.original_model
        super().__init__(wrapped, arithmetic)
        self.architecture = str(self.wrapped.cfg.architecture)
        self.rope_scaling_threshold = rope_scaling_threshold(self.original.config)
        self.n_ctx = min(self.n_ctx, *_rule_lengths(self.original.config))
        # Those that run the original model's norm, and compute the rest for their hooks alone.
        norms: Iterator[Any] = (m for m in self.wrapped.modules() if isinstance(m, NormalizationBridge))
        self.norms = [norm for norm in norms if norm.use_native_layernorm_autograd]
        self.bypasses = bypasses(self.original)
        self.forwards_with_kwargs = {
            block: block.original_component.forward for block in self.wrapped.blocks if _takes_all_kwargs(block)
        }

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
        check_no_adapters(cfg.architecture, bridge, bridge.original_model)
        self.offloaded = check_placement(bridge, str(cfg.architecture))
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
        for name in bridge.adapter.component_mapping:
            if getattr(getattr(bridge, name), "original_component", bridge) is None:
                raise UnsupportedModelError(
                    f"{cfg.architecture}: expected a module for each hook of transformer-lens, got none for {name}: "
                    "its bridge cannot run this configuration, use another model"
                )

    def run_copies(self, undo: Undo) -> None:
        """Let blocks run on copies of their weights in `arithmetic`, and on the model's device, one block at a time."""
        if self.arithmetic is not None or self.offloaded:
            run_copies([self.wrapped, self.original], list(self.wrapped.blocks), self.arithmetic, self.device, undo)

    def skip_unhooked(self, undo: Undo) -> None:
        """Run modules without the components around them that have no hooks, and norms without what only hooks receive.

        Such norms compute their output alone, without the scale and the normalised vector. Blocks that take all
        arguments do not read their signature at each pass, which takes as long as a norm.
        """
        bypassed = bypass_unhooked(self.wrapped, self.bypasses, undo)
        for norm in self.norms:
            hooks: tuple[Any, ...] = norm.hook_scale, norm.hook_normalized
            if norm not in bypassed and not any(map(has_hooks, hooks)):
                _replace(norm, "_hf_autograd_forward_with_hooks", partial(_native_norm, norm.original_component), undo)
        for block, forward in self.forwards_with_kwargs.items():
            if block.original_component.forward == forward:  # nobody has replaced it
                _replace(block, "_filter_kwargs_for_forward", _same_kwargs, undo)

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
        scale = getattr(attn, "scaling", getattr(attn, "softmax_scale", None))
        if self.architecture == "GPTNeoForCausalLM":
            scale = 1.0
        sink = getattr(attn, "sinks", None)
        return dual.AttentionRule(
            scale=float(self.d_head**-0.5 if scale is None else scale),
            softcap=getattr(attn, "attn_logit_softcapping", None),
            window=_window(self.original.config, attn, layer),
            slopes=self._alibi_slopes(),
            sink=None if sink is None else sink.detach(),
        )

    def forward(self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " pos"]) -> Tensor:
        """Run the Hugging Face model's own forward pass with an explicit mask."""
        # Without one, transformers may read a jump in the positions as the border of packed sequences. GPT's bridge
        # takes one for all of the mask, and would let tokens see those after them.
        masked = self.architecture != "OpenAIGPTLMHeadModel"
        return self.wrapped(
            tokens,
            position_ids=positions.expand(tokens.shape),
            attention_mask=torch.ones_like(tokens) if masked else None,
            use_cache=False,
        )

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Apply the final norm where the model has one, the unembedding, and the model's scale and cap of logits."""
        bridge = self.wrapped
        for name in ("ln_final", "project_out"):  # OPT's smallest models have no final norm but a projection
            if name in bridge.adapter.component_mapping:
                residual = getattr(bridge, name)(residual)
        return bridge.adapter.apply_output_logits_transform(bridge.unembed(residual))

    def direct_path_parts(self) -> DirectPathParts:
        """Return the norms by the bridge's names for them, and the unembedding of the Hugging Face model."""
        config: Any = self.original.config
        before = getattr(config, "do_layer_norm_before", True) and self.architecture != "OpenAIGPTLMHeadModel"
        check_direct_path(
            self.architecture,
            {
                "a norm after each residual sum": not before,
                "a residual stream that is normed": getattr(config, "apply_residual_connection_post_layernorm", False),
                "outputs of layers that are scaled": getattr(config, "residual_multiplier", 1.0) != 1.0,
            },
        )
        bridge, names = self.wrapped, self.wrapped.adapter.component_mapping
        after_attention = [
            getattr(block.submodules.get("ln1_post"), "original_component", None) for block in bridge.blocks
        ]
        final = bridge.ln_final.original_component if "ln_final" in names else None
        unembed: Any = bridge.unembed.original_component
        projection = bridge.project_out.original_component if "project_out" in names else None
        weight = unembed.weight.detach()
        W_U = weight if projection is None else weight @ projection.weight.detach()
        cap = getattr(config, "final_logit_softcapping", None)
        bias = getattr(unembed, "bias", None)
        return DirectPathParts(after_attention, final, W_U, None if bias is None else bias.detach(), cap)

    def reinitialised(self, seed: int) -> "BridgeBackend":
        """Return a bridge to a new Hugging Face model, initialised by transformers."""
        hf_model: Any = _reinitialised(self.original, seed)
        if not self.offloaded:
            hf_model.to(self.device)
        bridge = boot(self.architecture, hf_model, self.tokenizer, hf_model.device, hf_model.dtype)
        if self.offloaded:
            matrices = mlp_matrices(self.wrapped)
            place(bridge, self.device, {layer: matrices[layer][0].device for layer in self.offloaded})
        return BridgeBackend(bridge, self.arithmetic)

    def attention_hook_names(self, layer: int) -> Collection[str]:
        """Return the hooks for queries before and after rotation, rotated keys, and values, where all of them fire."""
        rotary: Any = PositionEmbeddingsAttentionBridge
        if getattr(self._attn(layer).forward, "__func__", None) is not rotary.forward:
            return self.HOOK_NAMES
        normed = self._norms(layer)
        scored = ("q_normed", "k_normed") if normed == "after rotation" else ("rot_q", "rot_k")
        return ("q_normed" if normed == "before rotation" else "q", *scored, "v")

    def attention_inputs(
        self, layer: int, activations: dict[str, Tensor], positions: Int[Tensor, " pos"]
    ) -> tuple[Tensor, ...]:
        """Return the attention inputs; rotary embedding is computed here where no hook holds its result."""
        normed = self._norms(layer)
        suffix = "_normed" if normed == "before rotation" else ""

        def pre_rotary(name: Literal["q", "k"]) -> Tensor:
            n_heads = self.n_heads if name == "q" else self.n_key_value_heads
            return self._by_head(activations[name + suffix], n_heads, normed == "before rotation")

        q = pre_rotary("q")
        if normed == "after rotation":
            scored_q, scored_k = (activations[name].transpose(1, 2) for name in ("q_normed", "k_normed"))
        elif "rot_q" in activations:
            scored_q, scored_k = activations["rot_q"], activations["rot_k"]
        elif "cos" in activations:  # fused rotary attention (GPT-NeoX) has these hooks but fires only its angles
            cos, sin = activations["cos"], activations["sin"]
            scored_q, scored_k = (_rotate(x, cos, sin) for x in (q, pre_rotary("k")))
        elif self.architecture in ("GPTJForCausalLM", "CodeGenForCausalLM"):  # their angles are a table by position
            angles = self._attn(layer).original_component.embed_positions[positions].to(q)
            sin, cos = angles.repeat_interleave(2, dim=-1)[None].chunk(2, dim=-1)
            scored_q, scored_k = (_rotate(x, cos, sin, pairs=True) for x in (q, pre_rotary("k")))
        elif self.architecture == "Llama4ForCausalLM":
            scored_q, scored_k = self._llama4_scored(layer, q, pre_rotary("k"), positions)
        else:
            scored_q, scored_k = q, pre_rotary("k")
        return scored_q, scored_k, self.values_by_head(activations["v"]), q

    def pre_rotary_hooks(self, layer: int, kind: Literal["Q", "K"], callback: OnTensor) -> list[Hook]:
        """Return the hook after the norm of queries or keys where it precedes rotation, else after the projection."""
        normed = self._norms(layer) == "before rotation"
        name = f"blocks.{layer}.attn.hook_{kind.lower()}" + "_normed" * normed
        n_heads = self.n_heads if kind == "Q" else self.n_key_value_heads

        def hook_fn(projected: Tensor, hook: Any) -> None:
            callback(layer, self._by_head(projected, n_heads, normed))

        return [(self.hook_points[name], hook_fn)]

    def gradient_hooks(self, layer: int, kind: Literal["K", "V"], callback: OnGradient) -> list[Hook]:
        """Return a hook on the linear layer that runs."""

        def hook_fn(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> None:
            call_back = partial(callback, layer, kind, args[0].detach())
            output.register_hook(call_back)  # pyright: ignore[reportUnknownMemberType]

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

    def mlp_projection(self, layer: int, part: MlpPart) -> Projection:
        """Return a linear layer of the MLP."""
        if layer in self.offloaded:
            raise UnsupportedModelError(
                f"{self.architecture}, layer {layer}: expected the weights of its MLP on {self.device}, where they are "
                "computed with, got an MLP that is kept elsewhere (device_map): load the model without device_map"
            )
        module: Any = self._mlp_modules(layer)[part]
        W = Weight(module.weight, "d_in d_out" if isinstance(module, Conv1D) else "d_out d_in", "d_out d_in")
        return Projection(W, None if module.bias is None else Weight(module.bias, "d_out", "d_out"))

    def mlp_scale(self, layer: int) -> tuple[nn.Parameter, float]:
        """Return the norm's weight, and the 1 that some architectures add to it."""
        norm: Any = cast(Any, self._mlp_modules(layer)["scale"]).original_component
        with torch.no_grad():
            scale = norm.forward(torch.ones_like(norm.weight))  # of a vector of ones, the normalised vector is one
            return norm.weight, float(round((scale.float() - norm.weight.float()).mean().item()))

    def mlp_hooks(self, layer: int, callback: OnMlp) -> list[Hook]:
        """Return hooks on the linear layers that run, and on the norm after the MLP."""
        return [(module, _mlp_hook(layer, part, callback)) for part, module in self._mlp_modules(layer).items()]

    def skip_mlps(self, undo: Undo) -> None:
        """Replace the linear layers that run with zeros, but for those in MLPs of experts."""
        for layer in range(self.n_layers):
            with suppress(UnsupportedModelError):
                for part, module in self._mlp_modules(layer).items():
                    if part != "scale":
                        _skip(module, undo)

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
        """Return a hook on the block's output; on GPT, the hook of the norm that ends the block."""
        # GPT's blocks return lists, at which hook_out does not fire.
        name = "ln2.hook_out" if self.architecture == "OpenAIGPTLMHeadModel" else "hook_out"
        return self.hook_points[f"blocks.{layer}.{name}"], callback_hook(layer, callback)

    def _attn(self, layer: int) -> Any:
        return self.wrapped.blocks[layer].attn

    def _linear(self, layer: int, kind: ProjectionName) -> Any:
        return getattr(self._attn(layer), kind.lower()).original_component

    def _by_head(self, projected: Tensor, n_heads: int, normed: bool) -> Float[Tensor, "batch pos _ d_head"]:
        """Split queries or keys by head. Hooks after a norm of each head by itself hold heads before positions."""
        if normed and projected.ndim == 4:
            return projected.transpose(1, 2)
        return projected.reshape(*projected.shape[:2], n_heads, self.d_head)

    def _norms(self, layer: int) -> Literal["before rotation", "after rotation"] | None:
        """Return where a layer's norms of queries and keys run; `None` where the layer has none.

        An optional norm has hooks in models without it, too, which never fire (StableLM).
        """
        if f"blocks.{layer}.attn.hook_q_normed" not in self.hook_points or "q_norm" not in self._attn(layer).submodules:
            return None
        return "after rotation" if getattr(self.wrapped.cfg, "qk_norm_after_rope", False) else "before rotation"

    def _llama4_scored(
        self, layer: int, q: Tensor, k: Tensor, positions: Int[Tensor, " pos"]
    ) -> tuple[Float[Tensor, "batch pos head d_head"], Float[Tensor, "batch pos kv_head d_head"]]:
        """Return Llama-4's queries and keys after rotation of neighbouring pairs and the norm behind it, if any."""
        attn: Any = self._attn(layer).original_component
        if not attn.use_rope:
            return q, k
        rotation = self.original.model.rotary_emb(q, positions[None]).repeat_interleave(2, dim=-1)
        rotated = (_rotate(x, rotation.real, rotation.imag, pairs=True).to(x.dtype) for x in (q, k))
        scored_q, scored_k = (attn.qk_norm(x) if hasattr(attn, "qk_norm") else x for x in rotated)
        return scored_q, scored_k

    def _alibi_slopes(self) -> Float[Tensor, " head"] | None:
        """Return the model's ALiBi bias for a distance of one position, by head; `None` without ALiBi."""
        decoder: Any = getattr(self.original, "transformer", None)
        if hasattr(decoder, "build_mpt_alibi_tensor"):
            return decoder.build_mpt_alibi_tensor(self.n_heads, 2, device=next(self.parameters()).device)[:, 0].diff()[
                :, 0
            ]
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


def _skip(module: Any, undo: Undo) -> None:
    """Let a linear layer return zeros of its output's shape until the block ends."""
    d_out = module.weight.shape[1 if isinstance(module, Conv1D) else 0]

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], d_out)

    _replace(module, "forward", zeros, undo)


def _replace(module: Any, name: str, method: Callable[..., Any], undo: Undo) -> None:
    """Replace a method of one module until the block ends."""
    own = module.__dict__.get(name)  # of an instance that another library has wrapped
    if own is None:
        undo.push(module.__dict__.pop, name, None)
    else:
        undo.push(setattr, module, name, own)
    setattr(module, name, method)


def _takes_all_kwargs(block: Any) -> bool:
    """Return whether a block passes all keyword arguments on to its layer, whose forward pass takes any."""
    block_bridge: Any = BlockBridge
    if getattr(block._filter_kwargs_for_forward, "__func__", None) is not block_bridge._filter_kwargs_for_forward:
        return False
    parameters = inspect.signature(block.original_component.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _same_kwargs(kwargs: dict[str, Any], n_positional: int = 0) -> dict[str, Any]:
    return kwargs


def _native_norm(component: Any, x: Tensor) -> Tensor:
    return component(x).to(x.dtype)


def _normalised(norm: Any, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
    """Return what an RMSNorm multiplies with its scale, in float32, in which transformers computes it always."""
    original, x = norm.original_component, x.float()
    eps = original.variance_epsilon if hasattr(original, "variance_epsilon") else original.eps
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def boot(name: str, hf_model: Any, tokenizer: Any, device: str | torch.device, dtype: torch.dtype) -> TransformerBridge:
    """Put TransformerLens's hooks into a Hugging Face model.

    Args:
        name: the folder or name of the model, for TransformerLens.
        hf_model: the model in memory; its modules are replaced.
        tokenizer: the model's tokenizer, or `None`.
        device: the device of the weights.
        dtype: the dtype of the weights.

    Raises:
        UnsupportedModelError: TransformerLens cannot put its hooks into the model, or the model computes something else
            with them; the message says why.
    """
    transformer_lens = f"transformer-lens {version('transformer-lens')}"
    try:
        tokens = torch.arange(4, device=device)[None] % hf_model.config.get_text_config().vocab_size
        expected = _short_logits(hf_model, tokens)
        bridge = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            trust_remote_code=False,
        )
    except BOOT_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(hf_model).__name__}: expected a model that {transformer_lens} can put hooks into, got "
            f"{_boot_obstacle(hf_model.config, error)}: use another model"
        ) from error
    BridgeBackend(bridge)  # refuses by cause what it can
    difference = ((_short_logits(bridge, tokens) - expected).abs().max() / expected.abs().max()).item()
    if difference > (1e-1 if is_half(dtype) else 1e-3):
        raise UnsupportedModelError(
            f"{type(hf_model).__name__}: expected the logits of transformers from the bridge of {transformer_lens}, "
            f"got a relative error of {difference:.1e}: use another model"
        )
    return bridge


def _short_logits(model: Any, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "1 pos d_vocab"]:
    """Return the logits of a Hugging Face model or of its bridge."""
    with torch.no_grad():
        output = model(tokens)
    return (output if isinstance(output, Tensor) else output.logits).float()


BOOT_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""The errors that TransformerLens raises from models that it has no hooks for, some of them without a message."""


def _boot_obstacle(config: Any, error: Exception) -> str:
    """Return in words why TransformerLens cannot put its hooks into a model, as far as it is known."""
    if config.model_type == "gpt_neox" and not config.attention_bias:
        return "attention without biases (attention_bias=False)"
    if config.model_type == "falcon" and config.new_decoder_architecture:
        return "grouped keys and values in one fused projection (new_decoder_architecture=True)"
    return str(error).split(". ")[0] or f"{type(error).__name__} without a message"


def _check_attention(bridge: TransformerBridge, architecture: str, layer: int, arithmetic: torch.dtype | None) -> None:
    """Check what a layer's attention does beyond softmax over scaled scores, as far as its parts show it."""
    block, config = bridge.blocks[layer], cast(Any, bridge.original_model.config)
    attn: Any = getattr(block, "attn", None)
    original = getattr(attn, "original_component", None)
    hf_block: Any = getattr(block, "original_component", None)
    half_precision = is_half(arithmetic or next(bridge.original_model.parameters()).dtype)
    features = partial(getattr, original)
    present_by_feature = {
        f"a layer without softmax attention ({type(hf_block).__name__})": original is None,
        "a state-space model that runs in parallel with attention": hasattr(hf_block, "mamba"),
        "bidirectional attention": bool(getattr(config, "use_bidirectional_attention", False)),
        "multi-head latent attention (keys and values from one compressed vector)": hasattr(
            original, "kv_a_proj_with_mqa"
        ),
        "experts in attention's projections": hasattr(original, "experts"),
        "keys and values that another layer computes": features("is_kv_shared_layer", False),
        "keys that are values, too": features("use_alternative_attention", False),
        "a norm of values": hasattr(original, "v_norm"),
        "a norm between the heads and W_O": hasattr(original, "attn_sub_norm"),
        "a gate on the heads' output": hasattr(attn, "hook_q_gate")
        or hasattr(original, "g_proj")
        or hasattr(original, "gate_proj"),
        "clamped queries, keys and values": bool(features("clip_qkv", None))
        or getattr(config, "clip_qkv", None) is not None,
        "grouped keys and values in one fused projection, which its bridge splits in another order": architecture
        == "FalconForCausalLM"
        and config.new_decoder_architecture,
        "unscaled scores (scale_attn_weights=False), which its bridge scales": not getattr(
            config, "scale_attn_weights", True
        ),
        "ALiBi biases rounded to bfloat16 at every position": architecture == "FalconForCausalLM" and config.alibi,
        "ALiBi biases rounded to half precision": architecture == "BloomForCausalLM" and half_precision,
        "rotary embedding that no hook shows": _hides_rotation(bridge, architecture, layer),
    }
    check_unsupported(f"{architecture}, layer {layer}", present_by_feature)


def _hides_rotation(bridge: TransformerBridge, architecture: str, layer: int) -> bool:
    """Return whether a layer turns queries and keys inside of transformers, in a way that is not computed here."""
    attn: Any = getattr(bridge.blocks[layer], "attn", None)
    # Its hooks after rotation exist, but never fire: the bridge runs the forward pass of transformers.
    if attn is None or architecture == "Llama4ForCausalLM":
        return False
    if cast(Any, type(attn)).forward is not AttentionBridge.forward:
        return False
    return "position_embeddings" in inspect.signature(attn.original_component.forward).parameters


def _window(config: Any, attn: Any, layer: int) -> int | None:
    """Return how many positions a layer's queries see, from their own backwards; `None` where they see all."""
    if config.model_type == "gpt_neo":
        return config.window_size if attn.attention_type == "local" else None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    # Where every layer has the same window, transformers keeps it in the configuration (Mistral). 0 stands for none.
    return getattr(attn, "sliding_window", getattr(config, "sliding_window", None)) or None


def _rule_lengths(config: Any) -> list[int]:
    """Return the numbers of tokens up to which a configuration's attention rule is the same at every position.

    Llama-4 sees nothing before the chunk of a position in some layers. In others it scales queries by the logarithm of
    their position in units of `floor_scale`, which is 0 up to there.
    """
    lengths = [sys.maxsize]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        lengths.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False) and not all(config.no_rope_layers):
        lengths.append(int(config.floor_scale) - 1)
    return lengths


def rope_scaling_threshold(config: Any) -> int | None:
    """Return the sequence length past which dynamic NTK or LongRoPE scaling changes every rotation, else `None`."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
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
    model_class = cast(Any, type(original))
    config = cast(Any, type(original.config)).from_dict(original.config.to_dict())
    with fork_rng(devices=[]):
        hf_model = model_class._from_config(config, dtype=original.dtype, attn_implementation="eager").eval()
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
