"""`HookedTransformer`, asked: TransformerLens's own implementation of decoders, which 3.x still has.

It keeps weights by head, gives every projection a bias, and takes no positions. Its options that split inputs or
ungroup keys and values may be on: what its hooks then show is read back into the model's own heads.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from icl_dual import dual
from icl_dual.models.backend import (
    HOOK_LEVEL,
    Backend,
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

BIASED: dict[str, str] = {
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
"""Architectures whose projections have biases, also where these are zero, as they are before any training."""


def is_hooked_transformer(wrapped: object) -> bool:
    """Whether this is a `HookedTransformer`, a class that transformer-lens 4 no longer has."""
    try:
        cls: Any = transformer_lens.HookedTransformer
    except (ImportError, AttributeError):  # which of them, the version decides
        return False
    return isinstance(wrapped, cls)


class HookedBackend(Backend):
    """A `HookedTransformer` with raw weights."""

    HOOK_NAMES: ClassVar[dict[str, str]] = {
        "q": "hook_q",
        "k": "hook_k",
        "v": "hook_v",
        "q_normed": "q_norm.hook_normalized",
        "k_normed": "k_norm.hook_normalized",
        "rot_q": "hook_rot_q",
        "rot_k": "hook_rot_k",
    }

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        cfg = wrapped.cfg
        self.architecture = cfg.original_architecture or "HookedTransformer"
        self.rope_scaling_threshold = int(cfg.train_seq_length or cfg.n_ctx) if cfg.use_dynamic_ntk_rope else None
        self.biased = {kind for kind in ("Q", "K", "V", "O") if self._has_bias(kind)}
        """The projections that have a bias, whatever the class gives them."""

    def check_supported(self) -> None:
        """Processed weights, what is no decoder on one device, and attention that does not split."""
        model, cfg = self.wrapped, self.wrapped.cfg
        name = f"HookedTransformer {cfg.model_name!r}"
        parameter = next(model.parameters())
        if cfg.n_devices > 1 or parameter.device.type != torch.device(cfg.device).type:
            raise UnsupportedModelError(
                f"{name}: expected all its weights on the device of its configuration, {cfg.device}, got weights on "
                f"{parameter.device} and n_devices={cfg.n_devices}. Move it with model.to(device), which tells both"
            )
        if (cause := _processing(model)) is not None:
            by_hand = "Hand it in as it was before process_weights_ or load_and_process_state_dict"
            loaded = "Load it with HookedTransformer.from_pretrained_no_processing"
            raise UnsupportedModelError(
                f"{name}: expected raw weights, got a model with {cause}, which changes W_V, W_O or the path of SGD. "
                f"{by_hand if cfg.original_architecture is None else loaded}"
            )
        known = {
            "attention in both directions": cfg.attention_dir != "causal",
            "other tokens out than in": cfg.d_vocab_out != cfg.d_vocab,
            "biases of scores by relative position": cfg.positional_embedding_type == "relative_positional_bias",
            "queries, keys and values that are clamped": cfg.clip_qkv is not None,
            "queries scaled by the logarithm of their position": cfg.use_logn_attn,
            "weights in four bits": cfg.load_in_4bit,
        }
        check_unsupported(name, known)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's own."""
        return self.wrapped.parameters()

    def forward_weights(self) -> Iterator[nn.Parameter]:
        """The model's own: it keeps none twice."""
        return self.wrapped.parameters()

    def projection(self, layer: int, kind: ProjectionName) -> Projection:
        """Weights by head; keys' and values' by their own heads where queries share them."""
        attn = self._attn(layer)
        own = "_" if kind in ("K", "V") and hasattr(attn, "_W_K") else ""
        weight, bias = getattr(attn, f"{own}W_{kind}"), getattr(attn, f"{own}b_{kind}")
        if kind == "O":
            W, b = Weight(weight, "head d_head d_out", "d_out (head d_head)"), Weight(bias, "d_out", "d_out")
        else:
            W = Weight(weight, "head d_in d_head", "(head d_head) d_in")
            b = Weight(bias, "head d_head", "(head d_head)")
        return Projection(W, b if kind in self.biased else None)

    def attention_rule(self, layer: int) -> dual.AttentionRule:
        """From the configuration, as far as it holds for the layer."""
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
        """The model's own, with positions told by its mask.

        It has a token stand where the mask's cumulative sum has come to, and attends to what the mask has anything
        but zero for. So a mask of steps from position to position, of which none is zero, moves tokens and hides none.
        """
        steps = torch.diff(positions, prepend=positions.new_tensor([-1]))
        if not (steps > 0).all():
            raise ValueError(f"expected positions that ascend from 0 or above, got {positions.tolist()}")
        if self.wrapped.cfg.positional_embedding_type == "rotary":
            self._rotate_up_to(int(positions[-1]))
        hooks = (hook for point in self.hook_points.values() for hook in point.fwd_hooks)
        others = any(hook.context_level != HOOK_LEVEL for hook in hooks)  # which may count on copies
        with nullcontext() if others else _AsTheyLie():
            return self.wrapped(tokens, attention_mask=steps.expand(tokens.shape))

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """By the final norm, where there is one, the unembedding, and the model's cap on logits."""
        cfg = self.wrapped.cfg
        normed = residual if cfg.normalization_type is None else self.wrapped.ln_final(residual)
        logits, cap = self.wrapped.unembed(normed), cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def reinitialised(self, seed: int) -> "HookedBackend":
        """A new model, drawn by its class as its configuration says."""
        model = self.wrapped
        cfg = copy.deepcopy(model.cfg)
        cfg.device, cfg.seed, cfg.tokenizer_name, cfg.init_weights = "cpu", None, None, True
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # whoever has such a model knows
            torch.default_generator.manual_seed(seed)  # torch's own manual_seed reseeds accelerators, too
            try:
                drawn = type(model)(cfg)
            except TypeError as error:
                raise UnsupportedModelError(
                    f"expected {type(model).__name__} to be made from its configuration alone, got: {error}: it has no "
                    "untrained control"
                ) from error
        drawn.to(next(self.parameters()).device, print_details=False)
        drawn.train(model.training)
        made = HookedBackend(drawn)
        made.tokenizer, made.biased = self.tokenizer, self.biased
        return made

    def read(self, layer: int, seen: dict[str, Tensor], positions: Int[Tensor, " pos"]) -> tuple[Tensor, ...]:
        """From rotated queries and keys where the model rotates."""
        q, k = (self._content(layer, kind, seen[kind], seen.get(f"{kind}_normed")) for kind in ("q", "k"))
        rot_q, rot_k = seen.get("rot_q", q), seen.get("rot_k", k)
        return rot_q, self._own_heads(rot_k), self.values(seen["v"]), q

    def values(self, shown: Tensor) -> Float[Tensor, "batch pos kv_head d_head"]:
        """By their own heads, also where the model has repeated them."""
        return self._own_heads(shown)

    def pre_rotary_hooks(self, layer: int, kind: Literal["Q", "K"], show: OnTensor) -> list[Hook]:
        """At the projection, and at the norm behind it where there is one."""
        at, name = f"blocks.{layer}.attn.", kind.lower()
        projection, norm = (
            self.hook_points[f"{at}hook_{name}"],
            self.hook_points.get(f"{at}{name}_norm.hook_normalized"),
        )
        projected: list[Tensor] = []

        def keep(tensor: Tensor, hook: Any) -> None:
            projected.append(tensor)

        def show_content(tensor: Tensor, hook: Any) -> None:
            content = tensor if norm is None else self._content(layer, name, projected.pop(), tensor)
            show(layer, content if kind == "Q" else self._own_heads(content))

        return [(projection, show_content)] if norm is None else [(projection, keep), (norm, show_content)]

    def gradient_hooks(self, layer: int, kind: Literal["K", "V"], show: OnGradient) -> list[Hook]:
        """At the projection's hook, with the input that attention was called with."""
        outputs: list[Tensor] = []
        argument = {"K": "key_input", "V": "value_input"}[kind]

        def keep(output: Tensor, hook: Any) -> None:
            outputs.append(output)

        def attach(module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> None:
            x = kwargs[argument].detach()
            x = x[:, :, 0] if x.ndim == 4 else x  # split by head: copies of one
            outputs.pop().register_hook(lambda gradient: show(layer, kind, x, self._summed_heads(gradient)))

        return [(self.hook_points[f"blocks.{layer}.attn.hook_{kind.lower()}"], keep), (self._attn(layer), attach)]

    def output_hook(self, layer: int, show: OnTensor) -> Hook:
        """At attention itself: the block's hook_attn_out comes after the norm that some models have there."""

        def hook_fn(module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> None:
            show(layer, output)

        return self._attn(layer), hook_fn

    def residual_hook(self, layer: int, show: OnResidual) -> Hook:
        """At the block's output."""
        return self.hook_points[f"blocks.{layer}.hook_resid_post"], callback_hook(layer, show)

    def _attn(self, layer: int) -> Any:
        return self.wrapped.blocks[layer].attn

    def _has_bias(self, kind: ProjectionName) -> bool:
        """The class gives every projection a bias: of an architecture that has none, it is zero at every layer."""
        architecture = self.wrapped.cfg.original_architecture
        biases = [getattr(self._attn(layer), f"b_{kind}") for layer in range(self.n_layers)]
        return architecture is None or kind in BIASED.get(architecture, "") or any(bias.any() for bias in biases)

    def _content(
        self, layer: int, name: str, projected: Tensor, normed: Tensor | None
    ) -> Float[Tensor, "batch pos _ d_head"]:
        """Queries or keys before rotation; no hook shows them once their norm has weighed them."""
        if normed is None:
            return projected
        norm = getattr(self._attn(layer), f"{name}_norm")
        return (normed.to(norm.w.dtype) * norm.w).reshape(projected.shape)

    def _own_heads(self, content: Tensor) -> Float[Tensor, "batch pos kv_head d_head"]:
        """Keys or values by their own heads, also where the model has repeated them for every query's."""
        return content[:, :, :: content.shape[2] // self.n_key_value_heads]

    def _summed_heads(self, gradient: Tensor) -> Float[Tensor, "batch pos d_kv"]:
        """The gradient at keys or values: of repeated ones, the copies' together."""
        return gradient.unflatten(2, (self.n_key_value_heads, -1)).sum(3).flatten(2)

    def _rotate_up_to(self, position: int) -> None:
        """Have every layer's table of angles reach so far: it grows with the tokens that run, not their positions."""
        for layer in range(self.n_layers):
            attn = self._attn(layer)
            if position >= len(attn.rotary_cos):
                attn.apply_rotary(attn.rotary_cos.new_zeros(1, 1, 1, self.d_head), position)


class _AsTheyLie(TorchFunctionMode):
    """Multiplies with transposed weights where they are, to rounding the same.

    The class makes a contiguous copy of nearly every weight in every pass, which takes a third of a short pass.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.contiguous and args[0].ndim == 2 and isinstance(args[0]._base, nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


CENTRED = 3e-4
"""Mean over size of weights that were centred, in bfloat16 too; of others it is about 1/√d_model."""


def _processing(model: Any) -> str | None:
    """What TransformerLens has done to a model's weights, as far as the weights themselves show it.

    They do not show an RMS norm that was folded into weights made by hand, nor value biases that were folded where
    queries have no bias.
    """
    cfg, attentions = model.cfg, [block.attn for block in model.blocks]
    norm = str(cfg.normalization_type)
    # A model that was made by hand without a norm's weights is raw as it is; folding a norm centres what reads from it.
    read = [weight.mT for attn in attentions for weight in (attn.W_Q, attn.W_K, attn.W_V)]
    if norm.endswith("Pre") and (cfg.original_architecture is not None or all(_centred(weight) for weight in read)):
        return "folded norms"
    if _centred(model.embed.W_E[:4096]) and all(_centred(attn.W_O) for attn in attentions):
        return "centred writing weights"
    if all(_refactored(attn) for attn in attentions):
        return "refactored attention matrices"
    query, value, output = (any(getattr(attn, f"b_{kind}").any() for attn in attentions) for kind in "QVO")
    return "folded value biases" if query and output and not value else None


def _centred(weight: Tensor) -> bool:
    return bool(weight.float().mean(-1).norm() <= CENTRED * weight.float().square().mean(-1).sqrt().norm())


def _refactored(attn: Any) -> bool:
    """Whether heads' outputs go through orthonormal rows, and values through orthogonal columns of falling length."""
    W_V, W_O = attn.W_V.float(), attn.W_O.float()
    lengths = W_V.norm(dim=1)
    cosines = (W_V.mT @ W_V) / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)).clamp_min(1e-30)
    identity = torch.eye(W_O.shape[1], device=W_O.device)
    orthogonal = all(bool(((found - identity).abs() < 2e-2).all()) for found in (W_O @ W_O.mT, cosines))
    return orthogonal and bool((lengths.diff(dim=-1) < 0).all())
