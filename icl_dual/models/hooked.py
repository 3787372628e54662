"""The backend for `HookedTransformer`, TransformerLens's own implementation of decoders (up to transformer-lens 3.x).

The class keeps weights by head, gives every projection a bias, and takes no positions. Its options that split inputs or
ungroup keys and values may be on: this backend then maps what the hooks hold back to the model's own heads.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,  # pyright: ignore[reportPrivateUsage]
)

from icl_dual import dual
from icl_dual.models.backend import (
    HOOK_LEVEL,
    Backend,
    DirectPathParts,
    Hook,
    OnGradient,
    OnResidual,
    OnTensor,
    Projection,
    ProjectionName,
    UnsupportedModelError,
    Weight,
    callback_hook,
    check_unsupported,
)
from icl_dual.models.journal import Undo, journal_of
from icl_dual.torch_utils import fork_rng, to_list, vector_norm

BIASED_PROJECTIONS: dict[str, str] = {
    "BloomForCausalLM": "QKVO",
    "GPT2LMHeadModel": "QKVO",
    "GPTNeoForCausalLM": "O",
    "GPTNeoXForCausalLM": "QKVO",
    "GptOssForCausalLM": "QKVO",
    "OPTForCausalLM": "QKVO",
    "PhiForCausalLM": "QKVO",
    "QWenLMHeadModel": "QKV",
    "Qwen2ForCausalLM": "QKV",
}
"""The projections that have biases, by architecture. A bias that is zero, as before training, counts as one here."""


def is_hooked_transformer(wrapped: object) -> bool:
    """Return whether an object is a `HookedTransformer`, a class that transformer-lens 4 no longer has."""
    try:
        cls: Any = transformer_lens.HookedTransformer
    except (ImportError, AttributeError):  # depending on the version
        return False
    return isinstance(wrapped, cls)


class HookedBackend(Backend):
    """Reads a `HookedTransformer` with raw weights."""

    HOOK_NAMES: ClassVar[dict[str, str]] = {
        "q": "hook_q",
        "k": "hook_k",
        "v": "hook_v",
        "q_normed": "q_norm.hook_normalized",
        "k_normed": "k_norm.hook_normalized",
        "rot_q": "hook_rot_q",
        "rot_k": "hook_rot_k",
    }

    def __init__(self, wrapped: Any, arithmetic: torch.dtype | None = None) -> None:
        super().__init__(wrapped, arithmetic)
        cfg = wrapped.cfg
        self.architecture = cfg.original_architecture or "HookedTransformer"
        self.rope_scaling_threshold = int(cfg.train_seq_length or cfg.n_ctx) if cfg.use_dynamic_ntk_rope else None
        self.biased = {kind for kind in ("Q", "K", "V", "O") if self._has_bias(kind)}
        """The projections with a bias in the model's architecture; the class itself gives every projection one."""

    def check_supported(self) -> None:
        """Check for processed weights, several devices, models that are not decoders, and unsupported attention."""
        model, cfg = self.wrapped, self.wrapped.cfg
        name = f"HookedTransformer {cfg.model_name!r}"
        parameter = next(model.parameters())
        if cfg.n_devices > 1 or parameter.device.type != torch.device(cfg.device).type:
            raise UnsupportedModelError(
                f"{name}: expected all its weights on the device of its configuration, {cfg.device}, got weights on "
                f"{parameter.device} and n_devices={cfg.n_devices}: move it with model.to(device), which updates both"
            )
        if (cause := _detected_processing(model)) is not None:
            by_hand = "pass the model from before process_weights_ or load_and_process_state_dict"
            loaded = "load it with HookedTransformer.from_pretrained_no_processing"
            raise UnsupportedModelError(
                f"{name}: expected raw weights, got a model with {cause}, which changes W_V, W_O or the path of SGD: "
                f"{by_hand if cfg.original_architecture is None else loaded}"
            )
        present_by_feature = {
            "bidirectional attention": cfg.attention_dir != "causal",
            "different input and output vocabularies": cfg.d_vocab_out != cfg.d_vocab,
            "relative position biases in the scores": cfg.positional_embedding_type == "relative_positional_bias",
            "clamped queries, keys and values": cfg.clip_qkv is not None,
            "queries scaled by the logarithm of their position": cfg.use_logn_attn,
            "4-bit weights": cfg.load_in_4bit,
        }
        check_unsupported(name, present_by_feature)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the model's parameters."""
        return self.wrapped.parameters()

    def forward_weights(self) -> Iterator[nn.Parameter]:
        """Yield the model's parameters: it keeps no second copies."""
        return self.wrapped.parameters()

    def projection(self, layer: int, kind: ProjectionName) -> Projection:
        """Return weights by head; W_K and W_V by key-value head."""
        attn = self._attn(layer)
        # With grouped queries, attn.W_K repeats attn._W_K, the parameter itself, for every query head.
        prefix = "_" if kind in ("K", "V") and hasattr(attn, "_W_K") else ""
        weight, bias = getattr(attn, f"{prefix}W_{kind}"), getattr(attn, f"{prefix}b_{kind}")
        if kind == "O":
            of_weight, of_bias = ("head d_head d_out", "d_out (head d_head)"), ("d_out", "d_out")
        else:
            of_weight, of_bias = ("head d_in d_head", "(head d_head) d_in"), ("head d_head", "(head d_head)")
        return Projection(Weight(weight, *of_weight), Weight(bias, *of_bias) if kind in self.biased else None)

    def attention_rule(self, layer: int) -> dual.AttentionRule:
        """Return the rule that the configuration describes for this layer."""
        attn, cfg = self._attn(layer), self.wrapped.cfg
        slopes = None
        if cfg.positional_embedding_type == "alibi":
            slopes = attn.create_alibi_multipliers(self.n_heads, next(self.parameters()).device)
        return dual.AttentionRule(
            scale=1 / float(attn.attn_scale),
            softcap=float(cfg.attn_scores_soft_cap) if cfg.attn_scores_soft_cap > 0 else None,
            window=cfg.window_size if attn.attn_type == "local" else None,
            slopes=slopes,
            sink=attn.sinks.detach() if cfg.use_attention_sinks else None,
        )

    def forward(self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " pos"]) -> Tensor:
        """Run the model's own forward pass, with positions encoded in the attention mask.

        The class takes a token's position from the cumulative sum of the mask, and attends to every token with a mask
        other than zero. A mask that holds the steps from one position to the next, none of them zero, therefore sets
        positions and hides no token.
        """
        steps = torch.diff(positions, prepend=positions.new_tensor([-1]))
        if not (steps > 0).all():
            raise ValueError(f"expected positions from 0 in strictly ascending order, got {to_list(positions)}")
        if self.wrapped.cfg.positional_embedding_type == "rotary":
            self._extend_rotary_tables(int(positions[-1]))
        hooks = (hook for point in self.hook_points.values() for hook in point.fwd_hooks)
        foreign = any(hook.context_level != HOOK_LEVEL for hook in hooks)  # these may rely on contiguous copies
        with journal_of(self.wrapped).block() as undo:
            if not foreign:
                _skip_contiguous_copies(undo)
            return self.wrapped(tokens, attention_mask=steps.expand(tokens.shape))

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Apply the final norm if there is one, the unembedding, and the model's softcap on logits."""
        cfg = self.wrapped.cfg
        normed = residual if cfg.normalization_type is None else self.wrapped.ln_final(residual)
        logits, cap = self.wrapped.unembed(normed), cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def direct_path_parts(self) -> DirectPathParts:
        """Return the class's norms, where its configuration has any, and its unembedding."""
        model, cfg = self.wrapped, self.wrapped.cfg
        has_post_norms = cfg.use_normalization_before_and_after
        after_attention = [block.ln1_post if has_post_norms else None for block in model.blocks]
        final = None if cfg.normalization_type is None else model.ln_final
        cap = cfg.output_logits_soft_cap if cfg.output_logits_soft_cap > 0 else None
        return DirectPathParts(after_attention, final, model.W_U.detach().T, model.b_U.detach(), cap)

    def reinitialised(self, seed: int) -> "HookedBackend":
        """Return a new model, initialised by its class for the same configuration."""
        model = self.wrapped
        cfg = copy.deepcopy(model.cfg)
        cfg.device, cfg.seed, cfg.tokenizer_name, cfg.init_weights = "cpu", None, None, True
        with fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the user of such a model has seen it already
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators, too
            try:
                reinitialised = type(model)(cfg)
            except TypeError as error:
                raise UnsupportedModelError(
                    f"expected {type(model).__name__} to be constructed from its configuration alone, got: {error}: it "
                    "has no untrained control"
                ) from error
        reinitialised.to(next(self.parameters()).device, print_details=False)
        reinitialised.train(model.training)
        backend = HookedBackend(reinitialised)
        backend.tokenizer, backend.biased = self.tokenizer, self.biased
        return backend

    def attention_inputs(
        self, layer: int, activations: dict[str, Tensor], positions: Int[Tensor, " pos"]
    ) -> tuple[Tensor, ...]:
        """Return the attention inputs, from the rotary hooks where the model has them."""
        q, k = (
            self._pre_rotary(layer, kind, activations[kind], activations.get(f"{kind}_normed")) for kind in ("q", "k")
        )
        scored_q, scored_k = activations.get("rot_q", q), activations.get("rot_k", k)
        return scored_q, self._ungrouped(scored_k), self.values_by_head(activations["v"]), q

    def values_by_head(self, hooked_values: Tensor) -> Float[Tensor, "batch pos kv_head d_head"]:
        """Return values by key-value head, also where the model has repeated them for every query head."""
        return self._ungrouped(hooked_values)

    def pre_rotary_hooks(self, layer: int, kind: Literal["Q", "K"], callback: OnTensor) -> list[Hook]:
        """Return the hook after the projection, and the one after the norm behind it if there is one."""
        at, name = f"blocks.{layer}.attn.", kind.lower()
        projection, norm = (
            self.hook_points[f"{at}hook_{name}"],
            self.hook_points.get(f"{at}{name}_norm.hook_normalized"),
        )
        projected: list[Tensor] = []

        def keep(tensor: Tensor, hook: Any) -> None:
            projected.append(tensor)

        def call_back(tensor: Tensor, hook: Any) -> None:
            pre_rotary = tensor if norm is None else self._pre_rotary(layer, name, projected.pop(), tensor)
            callback(layer, pre_rotary if kind == "Q" else self._ungrouped(pre_rotary))

        return [(projection, call_back)] if norm is None else [(projection, keep), (norm, call_back)]

    def gradient_hooks(self, layer: int, kind: Literal["K", "V"], callback: OnGradient) -> list[Hook]:
        """Return a hook on the projection's output, and one on attention that reads the projection's input."""
        outputs: list[Tensor] = []
        argument = {"K": "key_input", "V": "value_input"}[kind]

        def keep(output: Tensor, hook: Any) -> None:
            outputs.append(output)

        def attach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            x = kwargs[argument].detach()
            x = x[:, :, 0] if x.ndim == 4 else x  # use_split_qkv_input repeats the input for every head

            def call_back(gradient: Tensor) -> None:
                callback(layer, kind, x, self._summed_heads(gradient))

            outputs.pop().register_hook(call_back)  # pyright: ignore[reportUnknownMemberType]

        return [(self.hook_points[f"blocks.{layer}.attn.hook_{kind.lower()}"], keep), (self._attn(layer), attach)]

    def output_hook(self, layer: int, callback: OnTensor) -> Hook:
        """Return a hook on attention itself: in models with a post-norm, the block's hook_attn_out comes after it."""

        def hook_fn(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            callback(layer, output)

        return self._attn(layer), hook_fn

    def residual_hook(self, layer: int, callback: OnResidual) -> Hook:
        """Return a hook on the block's output."""
        return self.hook_points[f"blocks.{layer}.hook_resid_post"], callback_hook(layer, callback)

    def _attn(self, layer: int) -> Any:
        return self.wrapped.blocks[layer].attn

    def _has_bias(self, kind: ProjectionName) -> bool:
        """Return whether the architecture has this bias; where it has none, the class's bias is zero at every layer."""
        architecture = self.wrapped.cfg.original_architecture
        biases = [getattr(self._attn(layer), f"b_{kind}") for layer in range(self.n_layers)]
        return (
            architecture is None
            or kind in BIASED_PROJECTIONS.get(architecture, "")
            or any(bias.any() for bias in biases)
        )

    def _pre_rotary(
        self, layer: int, name: str, projected: Tensor, normed: Tensor | None
    ) -> Float[Tensor, "batch pos _ d_head"]:
        """Return queries or keys after their norm, if any: the norm's hook comes before its weight is applied."""
        if normed is None:
            return projected
        norm = getattr(self._attn(layer), f"{name}_norm")
        return (normed.to(norm.w.dtype) * norm.w).reshape(projected.shape)

    def _ungrouped(self, by_head: Tensor) -> Float[Tensor, "batch pos kv_head d_head"]:
        """Return keys or values by key-value head, also where the model has repeated them for every query head."""
        return by_head[:, :, :: by_head.shape[2] // self.n_key_value_heads]

    def _summed_heads(self, gradient: Tensor) -> Float[Tensor, "batch pos d_kv"]:
        """Sum the gradient at repeated keys or values over the copies of each key-value head."""
        return torch.unflatten(gradient, 2, (self.n_key_value_heads, -1)).sum(3).flatten(2)

    def _extend_rotary_tables(self, position: int) -> None:
        """Extend every layer's table of angles to a position: the class extends it to the number of tokens only."""
        for layer in range(self.n_layers):
            attn = self._attn(layer)
            if position >= len(attn.rotary_cos):
                attn.apply_rotary(attn.rotary_cos.new_zeros(1, 1, 1, self.d_head), position)


class _WithoutContiguousCopies(TorchFunctionMode):
    """Skips the contiguous copies of transposed weights; results are equal up to rounding.

    The class copies nearly every weight in every pass, which takes a third of the time of a short pass.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.contiguous and args[0].ndim == 2 and isinstance(args[0]._base, nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def _skip_contiguous_copies(undo: Undo) -> None:
    mode = _WithoutContiguousCopies()
    undo.push(_leave_mode, mode)
    mode.__enter__()


def _leave_mode(mode: TorchFunctionMode) -> None:
    """Leave a mode that was entered last, if it was: an interrupt may have come before."""
    if _get_current_function_mode() is mode:
        mode.__exit__(None, None, None)  # pyright: ignore[reportUnknownMemberType]


CENTRED_TOLERANCE = 3e-4
"""Largest ratio of mean to root mean square in centred weights, in bfloat16 too; in others it is about 1/√d_model."""


def _detected_processing(model: Any) -> str | None:
    """Return what TransformerLens has done to a model's weights, as far as the weights show it; `None` for raw weights.

    Two cases leave no trace: an RMS norm folded into hand-made weights, and value biases folded in a model
    without query biases.
    """
    cfg, attentions = model.cfg, [block.attn for block in model.blocks]
    norm = str(cfg.normalization_type)
    # A hand-made model without norm weights is raw; folding a norm centres the weights that read from it.
    reading = [weight.mT for attn in attentions for weight in (attn.W_Q, attn.W_K, attn.W_V)]
    if norm.endswith("Pre") and (cfg.original_architecture is not None or all(_centred(weight) for weight in reading)):
        return "folded norms"
    if _centred(model.embed.W_E[:4096]) and all(_centred(attn.W_O) for attn in attentions):
        return "centred writing weights"
    if all(_refactored(attn) for attn in attentions):
        return "refactored attention matrices"
    query, value, output = (any(getattr(attn, f"b_{kind}").any() for attn in attentions) for kind in "QVO")
    return "folded value biases" if query and output and not value else None


def _centred(weight: Tensor) -> bool:
    means, sizes = weight.float().mean(-1), weight.float().square().mean(-1).sqrt()
    return bool(vector_norm(means) <= CENTRED_TOLERANCE * vector_norm(sizes))


def _refactored(attn: Any) -> bool:
    """Return whether W_O has orthonormal rows by head, and W_V orthogonal columns of decreasing length."""
    W_V, W_O = attn.W_V.float(), attn.W_O.float()
    lengths = W_V.norm(dim=1)
    cosines = (W_V.mT @ W_V) / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)).clamp_min(1e-30)
    identity = torch.eye(W_O.shape[1], device=W_O.device)
    orthogonal = all(bool(((products - identity).abs() < 2e-2).all()) for products in (W_O @ W_O.mT, cosines))
    return orthogonal and bool((lengths.diff(dim=-1) < 0).all())
