"""`HookedTransformer`, asked: TransformerLens's own implementation of decoders, which 3.x still has.

It keeps weights by head, gives every projection a bias, and takes no positions. Its options that split inputs or
ungroup keys and values may be on: what its hooks then show is read back into the model's own heads.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from icl_dual import dual
from icl_dual.models.lens import (
    Hook,
    Kind,
    Lens,
    OnError,
    OnResidual,
    OnTensor,
    Projection,
    UnsupportedModelError,
    Weight,
    watch,
)

RAW = "Load it with HookedTransformer.from_pretrained_no_processing"
"""What to do about a model whose weights were processed."""


def is_hooked_transformer(wrapped: object) -> bool:
    """Whether this is a `HookedTransformer`, a class that transformer-lens 4 no longer has."""
    try:
        cls: Any = transformer_lens.HookedTransformer
    except (ImportError, AttributeError):  # which of them, the version decides
        return False
    return isinstance(wrapped, cls)


class HookedLens(Lens):
    """A `HookedTransformer` with raw weights."""

    SEEN: ClassVar[dict[str, str]] = {
        "Q": "hook_q",
        "K": "hook_k",
        "v": "hook_v",
        "Q normed": "q_norm.hook_normalized",
        "K normed": "k_norm.hook_normalized",
        "rot_q": "hook_rot_q",
        "rot_k": "hook_rot_k",
    }

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        cfg = wrapped.cfg
        self.architecture = cfg.original_architecture or "HookedTransformer"
        self.rotation_switch = int(cfg.train_seq_length or cfg.n_ctx) if cfg.use_dynamic_ntk_rope else None
        self.biased = {kind for kind in ("Q", "K", "V", "O") if self._has_bias(kind)}
        """The projections that have a bias, whatever the class gives them."""

    def refuse_unsupported(self) -> None:
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
            raise UnsupportedModelError(
                f"{name}: expected raw weights, got a model with {cause}, which changes W_V, W_O or the path of SGD. "
                f"{RAW}"
            )
        known = {
            "attention in both directions": cfg.attention_dir != "causal",
            "other tokens out than in": cfg.d_vocab_out != cfg.d_vocab,
            "biases of scores by relative position": cfg.positional_embedding_type == "relative_positional_bias",
            "queries, keys and values that are clamped": cfg.clip_qkv is not None,
            "queries scaled by the logarithm of their position": cfg.use_logn_attn,
            "weights in four bits": cfg.load_in_4bit,
        }
        for cause, found in known.items():
            if found:
                raise UnsupportedModelError(
                    f"{name}: expected a causal language model whose attention is softmax over scaled scores, got "
                    f"{cause}; it cannot be split exactly here"
                )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's own."""
        return self.wrapped.parameters()

    def running_weights(self) -> Iterator[nn.Parameter]:
        """The model's own: it keeps none twice."""
        return self.wrapped.parameters()

    def projection(self, layer: int, kind: Kind) -> Projection:
        """Weights by head; keys' and values' by their own heads where queries share them."""
        attn = self._attn(layer)
        grouped = "_" * (kind in "KV" and hasattr(attn, "_W_K"))
        weight, bias = (getattr(attn, f"{grouped if kind in 'KV' else ''}{name}_{kind}") for name in "Wb")
        if kind == "O":
            laid_out = Weight(weight, "head d_head d_out", "d_out (head d_head)")
            return Projection(laid_out, Weight(bias, "d_out", "d_out") if "O" in self.biased else None)
        laid_out = Weight(weight, "head d_in d_head", "(head d_head) d_in")
        return Projection(laid_out, Weight(bias, "head d_head", "(head d_head)") if kind in self.biased else None)

    def scoring(self, layer: int) -> dual.Scoring:
        """From the configuration, as far as it holds for the layer."""
        attn, cfg = self._attn(layer), self.wrapped.cfg
        slopes = None
        if cfg.positional_embedding_type == "alibi":
            slopes = attn.create_alibi_multipliers(self.n_heads, next(self.parameters()).device)
        return dual.Scoring(
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
        if self.wrapped.cfg.positional_embedding_type == "rotary":
            self._rotate_up_to(int(positions[-1]))
        steps = torch.diff(positions, prepend=positions.new_tensor([-1]))
        if not (steps > 0).all():
            raise ValueError(f"expected positions that ascend from 0 or above, got {positions.tolist()}")
        with _AsTheyLie():
            return self.wrapped(tokens, attention_mask=steps.expand(tokens.shape))

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """By the final norm, where there is one, the unembedding, and the model's cap on logits."""
        cfg = self.wrapped.cfg
        normed = residual if cfg.normalization_type is None else self.wrapped.ln_final(residual)
        logits, cap = self.wrapped.unembed(normed), cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def drawn_anew(self, seed: int) -> "HookedLens":
        """A new model, drawn by its class as its configuration says."""
        model = self.wrapped
        cfg = copy.deepcopy(model.cfg)
        cfg.device, cfg.seed, cfg.tokenizer_name, cfg.init_weights = "cpu", None, None, True
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # whoever has such a model knows
            torch.default_generator.manual_seed(seed)  # torch's own manual_seed reseeds accelerators, too
            drawn = type(model)(cfg)
        drawn.to(next(self.parameters()).device, print_details=False)
        drawn.train(model.training)
        made = HookedLens(drawn)
        made.tokenizer, made.biased = self.tokenizer, self.biased
        return made

    def read(self, layer: int, seen: dict[str, Tensor], positions: Int[Tensor, " pos"]) -> tuple[Tensor, ...]:
        """From rotated queries and keys where the model rotates."""
        q, k = (self._content(layer, kind, seen[kind], seen.get(f"{kind} normed")) for kind in ("Q", "K"))
        rot_q, rot_k = seen.get("rot_q", q), seen.get("rot_k", k)
        return rot_q, self._own_heads(rot_k), self._own_heads(seen["v"]), q

    def content_hooks(self, layer: int, kind: Literal["Q", "K"], show: OnTensor) -> list[Hook]:
        """At the projection, and at the norm behind it where there is one."""
        at, name = f"blocks.{layer}.attn.", kind.lower()
        norm = self.points.get(f"{at}{name}_norm.hook_normalized")
        projected: list[Tensor] = []

        def keep(tensor: Tensor, hook: Any) -> None:
            projected.append(tensor)

        def show_normed(normed: Tensor, hook: Any) -> None:
            content = self._content(layer, kind, projected.pop(), normed)
            show(layer, content if kind == "Q" else self._own_heads(content))

        def show_plain(content: Tensor, hook: Any) -> None:
            show(layer, content if kind == "Q" else self._own_heads(content))

        point = self.points[f"{at}hook_{name}"]
        return [(point, show_plain)] if norm is None else [(point, keep), (norm, show_normed)]

    def error_hooks(self, layer: int, kind: Literal["K", "V"], show: OnError) -> list[Hook]:
        """At the projection's hook, with the input that attention was called with."""
        outputs: list[Tensor] = []
        argument = {"K": "key_input", "V": "value_input"}[kind]

        def keep(output: Tensor, hook: Any) -> None:
            outputs.append(output)

        def attach(module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> None:
            x = kwargs[argument].detach()
            x = x[:, :, 0] if x.ndim == 4 else x  # split by head: copies of one
            outputs.pop().register_hook(lambda gradient: show(layer, kind, x, self._summed_heads(gradient)))

        return [(self.points[f"blocks.{layer}.attn.hook_{kind.lower()}"], keep), (self._attn(layer), attach)]

    def output_hook(self, layer: int, show: OnTensor) -> Hook:
        """At attention itself: the block's hook_attn_out comes after the norm that some models have there."""

        def hook_fn(module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> None:
            show(layer, output)

        return self._attn(layer), hook_fn

    def residual_hook(self, layer: int, show: OnResidual) -> Hook:
        """At the block's output."""
        return self.points[f"blocks.{layer}.hook_resid_post"], watch(layer, show)

    def _attn(self, layer: int) -> Any:
        return self.wrapped.blocks[layer].attn

    def _has_bias(self, kind: Kind) -> bool:
        """The class gives every projection a bias: of an architecture that has none, it is zero at every layer."""
        converted = self.wrapped.cfg.original_architecture is not None
        biases = [getattr(self._attn(layer), f"b_{kind}") for layer in range(self.n_layers)]
        return not converted or any(bias.any() for bias in biases)

    def _content(
        self, layer: int, kind: Literal["Q", "K"], projected: Tensor, normed: Tensor | None
    ) -> Float[Tensor, "batch pos _ d_head"]:
        """Queries or keys before rotation; no hook shows them once their norm has weighed them."""
        if normed is None:
            return projected
        norm = getattr(self._attn(layer), f"{kind.lower()}_norm")
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


def _processing(model: Any) -> str | None:
    """What TransformerLens has done to a model's weights on loading, as far as the weights themselves show it."""
    cfg, attentions = model.cfg, [block.attn for block in model.blocks]
    eps = max(32 * torch.finfo(torch.float32).eps, torch.finfo(cfg.dtype).eps / 4)

    def centred(weight: Tensor) -> bool:
        return bool(weight.float().mean(-1).norm() <= eps * weight.float().square().mean(-1).sqrt().norm())

    def any_bias(kind: Kind) -> bool:
        return any(getattr(attn, f"b_{kind}").any() for attn in attentions)

    # A model that was made without a norm's weights, by hand, is raw as it is.
    if str(cfg.normalization_type).endswith("Pre") and cfg.original_architecture is not None:
        return "folded norms"
    if centred(model.embed.W_E) and all(centred(attn.W_O) for attn in attentions):
        return "centred writing weights"
    gram = attentions[0].W_O.float() @ attentions[0].W_O.float().mT
    if torch.allclose(gram, torch.eye(cfg.d_head, device=gram.device).expand_as(gram), atol=1e-3):
        return "refactored attention matrices"
    return "folded value biases" if any_bias("Q") and not any_bias("V") else None
