"""`Model`: a decoder with its hooks, as everything above this room sees it."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from icl_dual.models.backend import (
    HOOK_LEVEL,
    Backend,
    Hook,
    OnAttention,
    OnGradient,
    OnResidual,
    OnTensor,
    Projection,
    ProjectionDelta,
    ProjectionName,
    UnsupportedModelError,
)
from icl_dual.models.bridge import BridgeBackend
from icl_dual.models.hooked import HookedBackend, is_hooked_transformer
from icl_dual.momentum import Eta, Momentum, decaying_sum, describe_eta, eta_by_layer_and_head

if TYPE_CHECKING:
    from transformer_lens.model_protocol import TransformerLensModel
else:
    TransformerLensModel = Any  # 3.x has no such type; what is no model is refused by name


FINGERPRINT_ELEMENTS = 16384
"""Enough of a matrix to touch its every row and head, few enough to cost nothing beside a forward pass."""


class Model:
    """A decoder with its hooks: raw weights, every attention layer readable and its heads' output replaceable.

    Args:
        wrapped: a TransformerLens `TransformerBridge`, or a `HookedTransformer` of transformer-lens 3.9, with raw
            weights (nothing folded, centred or refactored).
        name: what to call it in results.
        provenance: what identifies its bytes, e.g. a hub commit or a SHA-256.
        momentum: η, for a model that was trained with momentum attention: it is added in every run. What to try on
            other models is `momentum_attention`.

    Raises:
        UnsupportedModelError: no decoder-only attention model, processed weights, or attention without hooks.
        ValueError: η is out of range, or not by layer and head.
    """

    def __init__(
        self,
        wrapped: TransformerLensModel | Backend,
        name: str = "handed-in",
        provenance: str = "unknown",
        *,
        momentum: Eta | None = None,
    ) -> None:
        self.backend = wrapped if isinstance(wrapped, Backend) else _backend_of(wrapped)
        self.wrapped: Any = self.backend.wrapped
        self.name = name
        self.provenance = provenance
        self.tokenizer: Any = self.backend.tokenizer
        self.architecture = self.backend.architecture
        self.n_layers = self.backend.n_layers
        self.n_heads = self.backend.n_heads
        self.n_key_value_heads = self.backend.n_key_value_heads
        self.d_model = self.backend.d_model
        self.d_head = self.backend.d_head
        self.n_ctx = self.backend.n_ctx
        self.d_vocab = self.backend.d_vocab
        self.supports_projection_deltas = self.backend.supports_projection_deltas
        """Whether `run` can add to what projections make: a bridge's are layers of their own."""
        self.rope_scaling_threshold = self.backend.rope_scaling_threshold
        """Length past which long-context scaling rotates every position anew; `None` where it never does."""
        self.attention_rules = [self.backend.attention_rule(layer) for layer in range(self.n_layers)]
        self.pass_residual: float | None = None
        """Relative error of the ΔICL pass against a plain forward pass; `capture` measures it once."""
        self.momentum: Float[Tensor, "layer head"] | None = None
        """η of momentum attention: every head's output has Σ_{i<t} η^{t−i} v_i added; `None` for softmax alone."""
        if momentum is not None:
            self.momentum = eta_by_layer_and_head(momentum, self.n_layers, self.n_heads)

    def __repr__(self) -> str:
        momentum = "" if self.momentum is None else f"momentum {describe_eta(self.momentum)}, "
        return (
            f"Model({self.name!r}, {self.architecture}, n_layers={self.n_layers}, n_heads={self.n_heads}, "
            f"n_key_value_heads={self.n_key_value_heads}, d_model={self.d_model}, d_head={self.d_head}, {momentum}"
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return next(self.parameters()).dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight of the model; fused projections whole."""
        return self.backend.parameters()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token.

        Raises:
            UnsupportedModelError: the model has no tokenizer.
        """
        return list(self._own_tokenizer()(text, add_special_tokens=False).input_ids)

    @property
    def start_tokens(self) -> list[int]:
        """What a sequence begins with: the tokenizer's own choice, else BOS, else EOS."""
        tokenizer = self._own_tokenizer()
        own = list(tokenizer("").input_ids)
        fallback = tokenizer.bos_token_id
        if fallback is None:
            fallback = tokenizer.eos_token_id
        if own:
            return own[:1]
        if fallback is None:
            raise UnsupportedModelError(f"{self.name}: its tokenizer has neither a BOS nor an EOS token")
        return [fallback]

    @property
    def end_tokens(self) -> list[int]:
        """What ends a sequence: EOS."""
        tokenizer = self._own_tokenizer()
        if tokenizer.eos_token_id is None:
            raise UnsupportedModelError(f"{self.name}: its tokenizer has no EOS token")
        return [tokenizer.eos_token_id]

    @property
    def separator(self) -> list[int]:
        """What ends a demonstration: EOS for XGLM, the paper's architecture; a line break elsewhere."""
        return self.end_tokens if self.architecture == "XGLMForCausalLM" else self.encode("\n")

    def _own_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UnsupportedModelError(
                f"{self.name}: expected a model with a tokenizer to read text, got one without: build "
                "icl_dual.Prompts from token ids"
            )
        return self.tokenizer

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        positions: Int[Tensor, " pos"] | None = None,
        read: Int[Tensor, "batch n_read"] | None = None,
        on_attention: OnAttention | None = None,
        on_query: OnTensor | None = None,
        on_key: OnTensor | None = None,
        on_output: OnTensor | None = None,
        on_residual: OnResidual | None = None,
        on_gradient: OnGradient | None = None,
        projection_deltas: Mapping[ProjectionName, ProjectionDelta] | None = None,
        momentum_states: Sequence[Float[Tensor, "head d_head"] | None] | None = None,
        add_momentum: bool = True,
    ) -> Float[Tensor, "batch n_read d_vocab"]:
        """A forward pass with hooks on, which are taken off again also when it fails.

        Where the model has momentum, each layer adds that of its own values to what `on_attention` has left of z.

        Args:
            tokens: token ids; shorter rows padded on the right.
            positions: the tokens' positions, each behind the one before; 0, 1, … where not given.
            read: positions to unembed, by row; all where not given.
            on_attention: called at every layer with its attention; what it returns, if anything, replaces z.
            on_query: called at every layer with its queries alone, `[batch pos head d_head]`, after norms and before
                rotation: `Attention.q_pre_rotary`, for a fraction of the hooks.
            on_key: the same of its keys, `[batch pos kv_head d_head]`.
            on_output: called at every layer with the attention output, after W_O and before the residual sum,
                `[batch pos d_model]`.
            on_residual: called at every layer with the residual stream after it, `[batch pos d_model]`; what it
                returns, if anything, goes on in its place.
            on_gradient: called in the backward pass, at every layer, with K's and with V's projection's input,
                `[batch pos d_model]`, and the loss's gradient at its output, `[batch pos d_kv]`.
            projection_deltas: by projection, what is called at every layer with its input, `[batch pos d_in]`, and whose result is
                added to its output, `[batch pos d_out]`; where the model `supports_projection_deltas`.
            momentum_states: by layer, what the values of tokens before these have left (`Momentum.state`), the
                same for every row; nothing where not given.
            add_momentum: leave momentum out where false, as where `on_attention` returns what has it.

        Returns:
            Logits at the positions read.

        Raises:
            ValueError: positions leave some out, where there is momentum.
        """
        backend, hooks = self.backend, list[Hook]()
        positions = (torch.arange(tokens.shape[1]) if positions is None else positions).to(tokens.device)
        if add_momentum and self.momentum is not None and self.momentum.any():
            _check_no_gaps(self.name, positions)
        for layer in range(self.n_layers):
            eta = self.eta(layer) if add_momentum else None
            if on_attention is not None or eta is not None:
                state = None if momentum_states is None else momentum_states[layer]
                added = None if eta is None else partial(_momentum, eta=eta, state=state)
                hooks += backend.attention_hooks(layer, on_attention, positions, added)
            if on_query is not None:
                hooks += backend.pre_rotary_hooks(layer, "Q", on_query)
            if on_key is not None:
                hooks += backend.pre_rotary_hooks(layer, "K", on_key)
            if on_output is not None:
                hooks.append(backend.output_hook(layer, on_output))
            if on_residual is not None:
                hooks.append(backend.residual_hook(layer, on_residual))
            if on_gradient is not None:
                hooks += [
                    *backend.gradient_hooks(layer, "K", on_gradient),
                    *backend.gradient_hooks(layer, "V", on_gradient),
                ]
            hooks += [
                backend.projection_delta_hook(layer, kind, of_kind)
                for kind, of_kind in (projection_deltas or {}).items()
            ]
        if read is not None:
            hooks.append((backend.hook_points["unembed.hook_in"], _gather(read)))
        with _hooked(hooks), _evaluating(self.wrapped):
            return backend.forward(tokens, positions)

    def eta(self, layer: int) -> Float[Tensor, " head"] | None:
        """η of a layer's heads; `None` where they have no momentum, which is also where all of them are 0."""
        return self.momentum[layer] if self.momentum is not None and self.momentum[layer].any() else None

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a residual stream, by the final norm and the unembedding."""
        return self.backend.unembed(residual)

    def projections(self, kind: ProjectionName) -> list[Projection]:
        """Each layer's projection onto queries, keys or values, or of the heads' outputs, as the forward pass uses it.

        Fused projections come apart, so that changing one's parameters leaves the others alone.

        Raises:
            UnsupportedModelError: a projection is no plain linear map.
        """
        return [self.backend.projection(layer, kind) for layer in range(self.n_layers)]

    def output_projections(
        self,
    ) -> tuple[Float[Tensor, "layer head d_head d_model"], Float[Tensor, "layer d_model"] | None]:
        """W_O by layer and head, and b_O by layer where there is one."""
        projections = self.projections("O")
        heads = [projection.matrix.T.reshape(self.n_heads, self.d_head, -1) for projection in projections]
        return torch.stack(heads), _stacked([projection.bias for projection in projections])

    def value_biases(self) -> Float[Tensor, "layer kv_head d_head"] | None:
        """b_V by layer and key-value head, where there is one."""
        biases = _stacked([projection.bias for projection in self.projections("V")])
        return None if biases is None else biases.view(self.n_layers, self.n_key_value_heads, self.d_head)

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by position, so that attention knows distances only."""
        return any(f"blocks.{layer}.attn.hook_rot_q" in self.backend.hook_points for layer in range(self.n_layers))

    def fingerprint(self) -> str:
        """What tells these weights from others, also from themselves with a delta applied: their type and a short hash.

        Momentum counts as weights do: the same ones with another η, or with none, are told apart.
        Of every parameter up to `FINGERPRINT_ELEMENTS` elements are read, evenly spread over it.
        """
        digest = hashlib.sha256()
        for parameter in self.backend.forward_weights():
            flat = parameter.detach().reshape(-1)
            stride = 1 + len(flat) // FINGERPRINT_ELEMENTS
            while math.gcd(stride, parameter.shape[-1]) > 1:  # or it would fall on some columns only
                stride += 1
            digest.update(flat[::stride].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        if self.momentum is not None:
            digest.update(self.momentum.numpy().tobytes())
        return f"{str(self.dtype).removeprefix('torch.')}:{digest.hexdigest()[:16]}"

    def foreign_hooks(self) -> str:
        """What tells the hooks that others have on the model from none, or from as many elsewhere: a short hash."""
        found = [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in self.wrapped.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else ""


def _momentum(
    v: Float[Tensor, "batch pos kv_head d_head"],
    eta: Float[Tensor, " head"],
    state: Float[Tensor, "head d_head"] | None,
) -> Momentum:
    return decaying_sum(v, eta, state=None if state is None else state.expand(len(v), -1, -1))


def _check_no_gaps(name: str, positions: Int[Tensor, " pos"]) -> None:
    if (positions.diff() != 1).any():
        raise ValueError(
            f"expected positions one after another, got {positions.tolist()}: momentum, which {name} has, sums over "
            "all tokens before. Run those left out first, and hand on what they leave as momentum_states"
        )


def _backend_of(wrapped: Any) -> Backend:
    if isinstance(wrapped, TransformerBridge):
        return BridgeBackend(wrapped)
    if is_hooked_transformer(wrapped):
        return HookedBackend(wrapped)
    got = type(wrapped).__name__
    if isinstance(wrapped, str):
        got, advice = repr(wrapped), "load it with icl_dual.load_model"
    elif isinstance(wrapped, Model):
        advice = "it is wrapped already"
    elif isinstance(wrapped, PreTrainedModel):
        advice = "boot it with TransformerBridge.boot_transformers(name, hf_model=…, tokenizer=…)"
    else:
        advice = "hand in the model itself, a decoder, or load one with icl_dual.load_model"
    raise UnsupportedModelError(
        f"expected a TransformerBridge of transformer-lens, or a HookedTransformer of 3.9, got {got}: {advice}"
    )


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    """One tensor a layer as one tensor, where there are any."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None


@contextmanager
def _hooked(hooks: list[Hook]) -> Iterator[None]:
    """Hooks on, and off again: TransformerLens's own way collects all hooks of a bridge anew each time."""
    handles = []
    try:
        for module, hook_fn in hooks:
            if isinstance(module, HookPoint):
                module.add_hook(hook_fn, level=HOOK_LEVEL)
            else:
                handles.append(module.register_forward_hook(hook_fn, with_kwargs=True))
        yield
    finally:
        for module, _ in hooks:
            if isinstance(module, HookPoint):
                module.remove_hooks("fwd", level=HOOK_LEVEL)
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(wrapped: nn.Module) -> Iterator[None]:
    """No dropout during a pass, and every module's own mode again afterwards."""
    training = [module for module in wrapped.modules() if module.training]
    if training:
        wrapped.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _gather(read: Tensor) -> Callable:
    """Unembed only the positions that are read: with large vocabularies, the rest is most of a small model's work."""

    def hook_fn(residual: Tensor, hook: Any) -> Tensor:
        rows = torch.arange(residual.shape[0], device=residual.device).unsqueeze(1)
        return residual[rows, read]

    return hook_fn
