"""`Model`: a decoder with hooks, as the rest of the library uses it."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from icl_dual.arguments import Index, checked
from icl_dual.models.adapters import adapter_states, is_peft_model
from icl_dual.models.backend import (
    HOOK_LEVEL,
    Backend,
    Hook,
    OnAttention,
    OnGradient,
    OnMlp,
    OnResidual,
    OnTensor,
    Projection,
    ProjectionDelta,
    ProjectionName,
    UnsupportedModelError,
)
from icl_dual.models.bridge import BridgeBackend
from icl_dual.models.changes import WeightChanges, projection_deltas_of
from icl_dual.models.direct_path import DirectPath, direct_path
from icl_dual.models.foreign_hooks import foreign_hooks, modules_of, remove_hook
from icl_dual.models.hooked import HookedBackend, is_hooked_transformer
from icl_dual.models.journal import Undo, exclusive, journal_of
from icl_dual.models.mlp import MlpChanges
from icl_dual.models.precision import exact_float32, precision_name
from icl_dual.models.stream import StreamChange
from icl_dual.models.tokenization import TokenisedText, template_start, tokenise
from icl_dual.momentum import Eta, Momentum, decaying_sum, describe_eta, eta_by_layer_and_head
from icl_dual.torch_utils import dtype_name, to_list

if TYPE_CHECKING:
    from transformer_lens.model_protocol import TransformerLensModel
else:
    TransformerLensModel = Any  # transformer-lens 3.x has no such type


FINGERPRINT_ELEMENTS = 16384
"""The elements of a parameter that `Model.fingerprint` reads, where it has no more rows than that: little cost."""


class Model:
    """A decoder with hooks and raw weights: its attention can be read and replaced at every layer.

    Args:
        wrapped: a TransformerLens `TransformerBridge`, or a `HookedTransformer` of transformer-lens 3.9, with raw
            weights (nothing folded, centred or refactored).
        name: the model's name in results.
        provenance: what identifies the model's bytes, e.g. a hub commit or a SHA-256.
        momentum: η, for a model that was trained with momentum attention; it is added in every run. To try momentum on
            another model, use `momentum_attention`.
        description: what the model is, in words for tables and captions, e.g. `SmolLM2-135M-Instruct (Q4_1,
            dequantised)`; by default the name.
        arithmetic: the dtype of the computation, by default that of the weights. With `torch.float32`, weights in
            bfloat16 or float16 run as float32 copies, one block at a time (*half-precision storage with float32
            arithmetic*).
        tokenizer: the tokenizer that makes prompts; by default the wrapped model's. TransformerLens loads the tokenizer
            that it is given again from its files, without tokens that were added to it in memory: pass such a
            tokenizer here.

    Raises:
        UnsupportedModelError: the model is not a decoder with attention that hooks can read, or its weights are
            processed, or its class cannot run in another dtype than its weights'.
        ValueError: arithmetic is another than float32 for weights in half precision, η is out of range, or its shape is
            not by layer and head.

    Example:
        >>> import torch
        >>> from icl_dual.models import tiny_model
        >>> model = tiny_model()
        >>> model  # doctest: +NORMALIZE_WHITESPACE
        Model('tiny', LlamaForCausalLM, n_layers=2, n_heads=4, n_key_value_heads=2, d_model=32, d_head=8,
        dtype=float32, device=cpu)
        >>> shapes = []
        >>> with torch.no_grad():
        ...     logits = model.run(torch.tensor([[0, 5, 9]]), on_output=lambda layer, out: shapes.append(out.shape))
        >>> logits.shape, shapes
        (torch.Size([1, 3, 257]), [torch.Size([1, 3, 32]), torch.Size([1, 3, 32])])
    """

    @checked
    def __init__(
        self,
        wrapped: TransformerLensModel | Backend,
        name: str = "handed-in",
        provenance: str = "unknown",
        *,
        momentum: Eta | None = None,
        description: str | None = None,
        arithmetic: torch.dtype | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.backend = wrapped if isinstance(wrapped, Backend) else _backend_of(wrapped, arithmetic)
        self.wrapped: Any = self.backend.wrapped
        self.journal = journal_of(self.wrapped)
        """What blocks have changed on the model for a while; its lock lets one thread at a time use the model."""
        self.name = name
        self.description = name if description is None else description
        """What the model is, in words for tables and captions; `name` where nothing more is known."""
        self.provenance = provenance
        self.tokenizer: Any = self.backend.tokenizer if tokenizer is None else tokenizer
        """The tokenizer that makes prompts, or `None`."""
        self.architecture = self.backend.architecture
        self.n_layers = self.backend.n_layers
        self.n_heads = self.backend.n_heads
        self.n_key_value_heads = self.backend.n_key_value_heads
        self.d_model = self.backend.d_model
        self.d_head = self.backend.d_head
        self.n_ctx = self.backend.n_ctx
        self.d_vocab = self.backend.d_vocab
        self.supports_projection_deltas = self.backend.supports_projection_deltas
        """Whether `run` takes `projection_deltas`: only a bridge has a module for each projection."""
        self.rope_scaling_threshold = self.backend.rope_scaling_threshold
        """Sequence length in tokens past which rotary embedding changes at every position (dynamic NTK, LongRoPE);
        `None` where rotary embedding does not depend on the sequence length."""
        self.attention_rules = [self.backend.attention_rule(layer) for layer in range(self.n_layers)]
        """How each layer turns queries and keys into softmax weights."""
        self.pass_residual: float | None = None
        """Relative error of the shared-prefix pass against a full-prompt pass. `capture` measures it once, and at every
        capture with hooks of others on the model."""
        self.pass_hooks = ""
        """What `foreign_hooks` returned when `pass_residual` was measured."""
        self.batch_overhead: int | None = None
        """The cost of a batch besides its tokens, in tokens, where `capture` has measured it."""
        self.momentum: Float[Tensor, "layer head"] | None = None
        """η of momentum attention, which adds Σ_{i<t} η^{t−i} v_i to every head's output; `None` without momentum."""
        self.weight_changes: tuple[WeightChanges, ...] = ()
        """The changes of projections that every run adds beside the weights (`changed_projections`)."""
        self.mlp_changes: tuple[MlpChanges, ...] = ()
        """The changes of MLPs that every run adds beside the weights (`add_mlp_changes`)."""
        self.run_checks: tuple[Callable[[Tensor, Tensor], None], ...] = ()
        """Functions called before every run, with token ids and positions: a ValueError refuses the run."""
        self.stream_changes: tuple[StreamChange, ...] = ()
        """The vectors that every run adds to the residual stream (`add_stream_change`)."""
        if momentum is not None:
            self.momentum = eta_by_layer_and_head(momentum, self.n_layers, self.n_heads)

    def __repr__(self) -> str:
        momentum = "" if self.momentum is None else f"momentum {describe_eta(self.momentum)}, "
        description = "" if self.description == self.name else f" = {self.description}"
        offloaded = f", MLPs of {len(self.offloaded)} layers elsewhere" if self.offloaded else ""
        return (
            f"Model({self.name!r}{description}, {self.architecture}, n_layers={self.n_layers}, n_heads={self.n_heads}, "
            f"n_key_value_heads={self.n_key_value_heads}, d_model={self.d_model}, d_head={self.d_head}, {momentum}"
            f"dtype={self.precision}, device={self.device}{offloaded})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied: hooks of a copy would belong to the modules of the original.

        Raises:
            TypeError: always; says what to do.
        """
        raise TypeError(
            f"expected an object without hooks to pickle or copy, got the model {self.name!r}: call "
            "icl_dual.load_model in each process, or once more for a second model"
        )

    @property
    def device(self) -> torch.device:
        """Return the device on which the model runs: that of all weights but those of MLPs that are kept elsewhere."""
        return self.backend.device

    @property
    def offloaded(self) -> frozenset[int]:
        """Return the layers whose MLP is kept on another device, and runs as a copy on the model's (`device_map`)."""
        return self.backend.offloaded

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the computation: of activations, captures and tolerances."""
        return self.backend.arithmetic or self.storage_dtype

    @property
    def storage_dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def precision(self) -> str:
        """Return the precision in words, e.g. `float32`, or `bfloat16 storage, float32 arithmetic`."""
        return precision_name(self.storage_dtype, self.dtype)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every weight of the model, fused projections as one weight."""
        return self.backend.parameters()

    @checked
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens.

        Raises:
            UnsupportedModelError: the model has no tokenizer.
        """
        return list(self._required_tokenizer()(text, add_special_tokens=False).input_ids)

    @checked
    def tokenise(self, texts: Sequence[str]) -> list[TokenisedText]:
        """Return the tokens of texts, without special tokens, and where in its text each token lies.

        Raises:
            UnsupportedModelError: the model has no tokenizer.
        """
        return tokenise(self._required_tokenizer(), texts)

    @property
    def start_tokens(self) -> list[int]:
        """Return the tokens that the tokenizer's own template puts in front of a text: none, one or several.

        Raises:
            UnsupportedModelError: the model has no tokenizer, or its template does more than put tokens around a text.
        """
        return template_start(self._required_tokenizer())

    @property
    def end_tokens(self) -> list[int]:
        """Return the end token of a sequence: EOS.

        Raises:
            UnsupportedModelError: the model has no tokenizer, or its tokenizer has no EOS.
        """
        tokenizer = self._required_tokenizer()
        if tokenizer.eos_token_id is None:
            raise UnsupportedModelError(
                f"{self.name}: expected a tokenizer with an EOS token, got one without: build icl_dual.Prompts "
                "from token ids"
            )
        return [tokenizer.eos_token_id]

    @property
    def separator(self) -> list[int]:
        """Return the tokens that end a demonstration: EOS for XGLM (the paper's models), a line break for others."""
        return self.encode(self.separator_text)

    @property
    def separator_text(self) -> str:
        """Return the text that ends a demonstration: EOS for XGLM (the paper's models), a line break for others."""
        if self.architecture != "XGLMForCausalLM":
            return "\n"
        end, text = self.end_tokens, self._required_tokenizer().eos_token
        if self.encode(text) != end:
            raise UnsupportedModelError(
                f"{self.name}: expected a tokenizer that reads {text!r} as the EOS token {end}, got {self.encode(text)}"
                ": pass separator= to icl_dual.build_prompts"
            )
        return text

    def _required_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UnsupportedModelError(
                f"{self.name}: expected a model with a tokenizer to read text, got one without: build "
                "icl_dual.Prompts from token ids"
            )
        return self.tokenizer

    @checked
    @exclusive
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
        on_middle: OnTensor | None = None,
        on_mlp: OnMlp | None = None,
        on_residual: OnResidual | None = None,
        on_gradient: OnGradient | None = None,
        projection_deltas: Mapping[ProjectionName, ProjectionDelta] | None = None,
        momentum_states: Sequence[Float[Tensor, "run head d_head"] | None] | None = None,
        add_momentum: bool = True,
        skip_mlps: bool = False,
        predicting: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "batch n_read d_vocab"]:
        """Run a forward pass with hooks, which are removed afterwards, also when the pass fails.

        Where the model has momentum, each layer adds the momentum of its values to z, or to what `on_attention`
        returned for z.

        Args:
            tokens: token ids; shorter rows are padded on the right.
            positions: the tokens' positions, in ascending order; 0, 1, … by default.
            read: the positions to compute logits at, by row; all by default.
            on_attention: called at every layer with `(layer, Attention)`; a tensor that it returns replaces z.
            on_query: called at every layer with the queries alone, `[batch pos head d_head]`, after norms and before
                rotary embedding. Equals `Attention.q_pre_rotary`, with fewer hooks.
            on_key: called at every layer with the keys alone, `[batch pos kv_head d_head]`, after norms and before
                rotary embedding.
            on_output: called at every layer with attention's output after W_O and before the residual sum, `[batch pos
                d_model]`.
            on_middle: called at every layer with the residual stream before it plus what its attention writes, `[batch
                pos d_model]`: where the MLP follows attention, the residual stream between the two. Bridges only.
            on_mlp: called at every layer for each part of its MLP with `(layer, part, input, output)`; a tensor that it
                returns replaces the output. Some architectures lay all tokens along one axis there. Bridges only.
            on_residual: called at every layer with the residual stream after it, `[batch pos d_model]`; a tensor that
                it returns replaces the residual stream.
            on_gradient: called in the backward pass, at every layer, for the projections K and V: with the projection's
                input `[batch pos d_model]` and the loss's gradient at its output `[batch pos d_kv]`.
            projection_deltas: by projection, a function that is called at every layer with the projection's input
                `[batch pos d_in]`; its result `[batch pos d_out]` is added to the projection's output. Only where the
                model `supports_projection_deltas`.
            momentum_states: by layer, the state (`Momentum.state`) that the values of preceding tokens left, by run: a
                batch has as many rows of each run, one run after the other. No preceding tokens by default.
            add_momentum: whether to add momentum; pass `False` where `on_attention` returns z with momentum.
            skip_mlps: let MLPs write zeros without computing them, where their parts allow it. For runs whose
                `on_residual` returns every layer's residual stream, so that no layer reads what its MLP writes.
            predicting: the index of each row's token that predicts the label, at which `stream_changes` act; empty
                where the rows have none. By default the last token of every row.

        Returns:
            Logits at the positions in `read`.

        Raises:
            ValueError: the model has momentum, and `positions` has gaps; or a patch for another query is applied.
            UnsupportedModelError: `on_middle` or `on_mlp` is given, and an MLP has no hooks.
            RuntimeError: a callback of a run has started another one.
        """
        if self.journal.in_pass.locked():
            raise RuntimeError(
                f"expected one run of {self.name!r} at a time, got another one from a callback of the first: run it "
                "after the first has ended"
            )
        backend, hooks = self.backend, list[Hook]()
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        positions = positions.to(tokens.device)
        if add_momentum and self.momentum is not None and self.momentum.any():
            _check_no_gaps(self.name, positions)
        for check in self.run_checks:
            check(tokens, positions)
        for changes in self.mlp_changes:
            changes.check(tokens, positions, self.name, after_cache=on_attention is not None)
        for layer in range(self.n_layers):
            eta = self.eta(layer) if add_momentum else None
            if on_attention is not None or eta is not None:
                state = None if momentum_states is None else momentum_states[layer]
                momentum_of = None if eta is None else partial(_momentum, eta=eta, state=state)
                hooks += backend.attention_hooks(layer, on_attention, positions, momentum_of)
            if on_query is not None:
                hooks += backend.pre_rotary_hooks(layer, "Q", on_query)
            if on_key is not None:
                hooks += backend.pre_rotary_hooks(layer, "K", on_key)
            if on_output is not None:
                hooks.append(backend.output_hook(layer, on_output))
            if on_middle is not None:
                hooks += backend.middle_hooks(layer, on_middle)
            for changes in self.mlp_changes:
                hooks += backend.mlp_hooks(layer, changes.apply)
            if on_mlp is not None:
                hooks += backend.mlp_hooks(layer, on_mlp)
            for change in self.stream_changes:
                hooks.append(backend.residual_hook(layer, change.callback(tokens, predicting)))
            if on_residual is not None:
                hooks.append(backend.residual_hook(layer, on_residual))
            for deltas in (*map(projection_deltas_of, self.weight_changes), projection_deltas or {}):
                hooks += [backend.projection_delta_hook(layer, kind, delta) for kind, delta in deltas.items()]
            if on_gradient is not None:  # after the deltas: a frozen projection's own output has no gradient
                hooks += [
                    *backend.gradient_hooks(layer, "K", on_gradient),
                    *backend.gradient_hooks(layer, "V", on_gradient),
                ]
        if read is not None:
            hooks.append((backend.hook_points["unembed.hook_in"], _select_positions(read)))
        with self.journal.in_pass, self.journal.block() as undo:
            _attach(hooks, undo)
            _set_evaluation_mode(self.wrapped, undo)
            exact_float32(undo)
            backend.run_copies(undo)
            backend.skip_unhooked(undo)
            if skip_mlps:
                backend.skip_mlps(undo)
            return backend.forward(tokens, positions)

    def restore(self) -> None:
        """Bring the model back as it was before all blocks that are open on it (`applied`, `momentum_attention`).

        Calls do this for what interrupted calls have left. A block that was interrupted while it began or ended may
        stay open as long as the exception is kept, which a notebook does.
        """
        self.journal.restore()

    @checked
    def eta(self, layer: Index) -> Float[Tensor, " head"] | None:
        """Return η of a layer's heads; `None` where the model has no momentum, or all heads of the layer have η = 0."""
        return self.momentum[layer] if self.momentum is not None and self.momentum[layer].any() else None

    @checked
    @exclusive
    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of a residual stream: final norm, then unembedding."""
        with self.journal.block() as undo:
            exact_float32(undo)
            self.backend.run_copies(undo)
            return self.backend.unembed(residual)

    @checked
    @exclusive
    def direct_path(self, tokens: Sequence[Index]) -> DirectPath:
        """Return how attention's outputs reach the logits of tokens directly, with the scale of norms frozen.

        Args:
            tokens: the ids of the tokens.

        Raises:
            UnsupportedModelError: the path is not linear with the norms' scales frozen, or the model scales its logits.
        """
        with torch.no_grad():
            where = f"{self.name} ({self.architecture})"
            return direct_path(self.backend.direct_path_parts(), tokens, self.unembed, self.dtype, where)

    @checked
    @exclusive
    def projections(self, kind: ProjectionName) -> list[Projection]:
        """Return one projection of every layer, with the parameters that the forward pass uses.

        Fused projections are split, so that changing the parameters of one leaves the others unchanged.

        Args:
            kind: `Q`, `K`, `V` or `O`.

        Raises:
            UnsupportedModelError: a projection is not a plain linear map.
        """
        return [self.backend.projection(layer, kind) for layer in range(self.n_layers)]

    @exclusive
    def output_projections(
        self,
    ) -> tuple[Float[Tensor, "layer head d_head d_model"], Float[Tensor, "layer d_model"] | None]:
        """Return W_O by layer and head, and b_O by layer (`None` without biases), as they act in a run."""
        projections = self.projections("O")
        W = self._with_changes("W_O", torch.stack([projection.matrix for projection in projections]))
        b = self._with_changes("b_O", _stacked([projection.bias for projection in projections]))
        return torch.unflatten(W.mT, 1, (self.n_heads, self.d_head)).contiguous(), b

    @exclusive
    def value_biases(self) -> Float[Tensor, "layer kv_head d_head"] | None:
        """Return b_V by layer and key-value head, as it acts in a run; `None` without biases."""
        biases = self._with_changes("b_V", _stacked([projection.bias for projection in self.projections("V")]))
        return None if biases is None else biases.view(self.n_layers, self.n_key_value_heads, self.d_head)

    def _with_changes(self, name: str, weights: Any) -> Any:
        """Return stacked weights with `weight_changes` added, in the dtype of the computation at least; or `None`."""
        if weights is None:
            return None
        for changes in self.weight_changes:
            if name in changes:
                weights = weights + changes[name]
        return weights.to(torch.promote_types(weights.dtype, self.dtype))

    @property
    def rotary(self) -> bool:
        """Return whether queries and keys have rotary embedding: scores depend on distances, not on positions."""
        return any(f"blocks.{layer}.attn.hook_rot_q" in self.backend.hook_points for layer in range(self.n_layers))

    @exclusive
    def fingerprint(self) -> str:
        """Return the precision and a short hash of the weights, of η, and of which adapters of peft are on.

        Two models with different weights (for example with a delta applied), or with different η, have different
        fingerprints. The hash reads `FINGERPRINT_ELEMENTS` elements of each parameter, evenly spread over it, or one of
        every row where it has more rows. The precision is the dtype of the computation; that of the weights follows
        where it is another one.
        """
        digest = hashlib.sha256()
        changes = [tensor for changes in self.weight_changes for tensor in changes.values()]
        changes += [tensor for changes in self.mlp_changes for tensor in changes.tensors()]
        changes += [change.vector for change in self.stream_changes]
        parameters = [*self.backend.forward_weights(), *changes]  # those of attention twice, of most models
        by_id = {id(parameter): parameter for parameter in parameters}
        parts_by_id = {key: _sampled_bytes(parameter) for key, parameter in by_id.items()}
        parts = [parts_by_id[id(parameter)] for parameter in parameters]
        for _, on_device in itertools.groupby(parts, key=lambda part: part.device):  # each device is read once
            digest.update(torch.cat(list(on_device)).cpu().numpy().tobytes())
        if self.momentum is not None:
            digest.update(self.momentum.numpy().tobytes())
        if states := adapter_states(self.wrapped, getattr(self.wrapped, "original_model", self.wrapped)):
            digest.update(repr(states).encode())
        dtypes = dict.fromkeys(map(dtype_name, (self.dtype, self.storage_dtype)))
        return ":".join([*dtypes, digest.hexdigest()[:16]])

    @exclusive
    def foreign_hooks(self) -> str:
        """Return a short hash of the hooks of others on the model, by place, code and values; empty for none."""
        hooks = foreign_hooks(self.wrapped)
        return hashlib.sha256(repr(hooks).encode()).hexdigest()[:16] if hooks else ""

    @exclusive
    def foreign_hook_names(self) -> list[str]:
        """Return the place and the function of each hook of others on the model, e.g. `blocks.1.hook_out: add`."""
        return [f"{module}: {hook}" for module, hook, _ in foreign_hooks(self.wrapped)]


def _sampled_bytes(parameter: Tensor) -> Tensor:
    """Return the bytes of some elements of a parameter, at a stride that reaches every column."""
    flat, n_columns = parameter.detach().reshape(-1), parameter.shape[-1]
    stride = min(1 + len(flat) // FINGERPRINT_ELEMENTS, n_columns)
    while stride > 1 and math.gcd(stride, n_columns) > 1:  # else it would read some columns only
        stride -= 1
    return flat[::stride].contiguous().view(torch.uint8)


def _momentum(
    v: Float[Tensor, "batch pos kv_head d_head"],
    eta: Float[Tensor, " head"],
    state: Float[Tensor, "run head d_head"] | None,
) -> Momentum:
    by_row = None if state is None else state.repeat_interleave(len(v) // len(state), dim=0)
    return decaying_sum(v, eta, state=by_row)


def _check_no_gaps(name: str, positions: Int[Tensor, " pos"]) -> None:
    if (positions.diff() != 1).any():
        raise ValueError(
            f"expected positions one after another, got {to_list(positions)}: {name} has momentum, which sums over all "
            "preceding tokens. Run the left-out tokens first, and pass the states they leave as momentum_states"
        )


def _backend_of(wrapped: Any, arithmetic: torch.dtype | None) -> Backend:
    if isinstance(wrapped, TransformerBridge):
        return BridgeBackend(wrapped, arithmetic)
    if is_hooked_transformer(wrapped):
        return HookedBackend(wrapped, arithmetic)
    got = type(wrapped).__name__
    if isinstance(wrapped, str):
        got, advice = repr(wrapped), "load it with icl_dual.load_model"
    elif isinstance(wrapped, Model):
        advice = "it is wrapped already, use it directly"
    elif is_peft_model(wrapped):
        advice = "merge it first, with merge_and_unload(), and boot the merged model, or pass the adapter's folder to "
        advice += "icl_dual.WeightDelta.from_adapter"
    elif isinstance(wrapped, PreTrainedModel):
        advice = "boot it with TransformerBridge.boot_transformers(name, hf_model=…, tokenizer=…)"
    else:
        advice = "pass a decoder, or load one with icl_dual.load_model"
    raise UnsupportedModelError(
        f"expected a TransformerBridge of transformer-lens, or a HookedTransformer of 3.9, got {got}: {advice}"
    )


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    """Stack one tensor for each layer; `None` where no layer has one."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _attach(hooks: list[Hook], undo: Undo) -> None:
    """Attach hooks. TransformerLens's own `hooks` is slower: it collects all hook points of a bridge."""
    for module, hook_fn in hooks:
        undo.push(_detach, module, hook_fn)
        if isinstance(module, HookPoint):
            module.add_hook(hook_fn, level=HOOK_LEVEL)
        else:
            module.register_forward_hook(hook_fn, with_kwargs=True)


def _detach(module: nn.Module, hook_fn: Callable[..., Any]) -> None:
    """Remove a hook, also where an interrupt came before its handle was returned."""
    remove_hook(module, hook_fn)
    if isinstance(module, HookPoint):
        forward_hooks = cast(Any, module)._forward_hooks
        module.fwd_hooks = [handle for handle in module.fwd_hooks if handle.hook.id in forward_hooks]


def _set_evaluation_mode(wrapped: nn.Module, undo: Undo) -> None:
    """Switch dropout off."""
    for module in modules_of(wrapped, leave_out=HookPoint):  # which do the same in both modes
        if module.training:
            undo.set(module, "training", False)


def _select_positions(read: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """Return a hook that keeps only the positions to unembed: with a large vocabulary, unembedding dominates."""

    def hook_fn(residual: Tensor, hook: Any) -> Tensor:
        rows = torch.arange(residual.shape[0], device=residual.device).unsqueeze(1)
        return residual[rows, read]

    return hook_fn
