"""The interface between `Model` and a TransformerLens class: weights, hooks, the forward pass, and what is unsupported.

The classes of TransformerLens share most hook names. They differ in what their hooks hold, where their weights are, and
how they take positions; `bridge` and `hooked` implement this interface for one class each.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_dual import dual
from icl_dual.models.journal import Undo
from icl_dual.models.precision import check_arithmetic
from icl_dual.momentum import Momentum


class UnsupportedModelError(ValueError):
    """This library cannot read the model's attention, or cannot split it exactly."""


class Attention(NamedTuple):
    """One layer's attention in a forward pass. Keys and values keep their own number of heads."""

    q: Float[Tensor, "batch pos head d_head"]
    """Queries as they enter the scores: after norms and rotary embedding."""
    k: Float[Tensor, "batch pos kv_head d_head"]
    """Keys as they enter the scores: after norms and rotary embedding."""
    v: Float[Tensor, "batch pos kv_head d_head"]
    """Values."""
    z: Float[Tensor, "batch pos head d_head"]
    """The heads' outputs, before W_O and without momentum."""
    q_pre_rotary: Float[Tensor, "batch pos head d_head"]
    """Queries after norms and before rotary embedding."""
    momentum: Momentum | None = None
    """What momentum adds to z, and the state it leaves; `None` where the layer has no momentum."""

    @property
    def output(self) -> Float[Tensor, "batch pos head d_head"]:
        """The input of W_O: z, plus momentum where the layer has any."""
        return self.z if self.momentum is None else self.z + self.momentum.z


ProjectionName = Literal["Q", "K", "V", "O"]
"""A projection of attention, by the name of its matrix W_Q, W_K, W_V or W_O."""

OnAttention = Callable[[int, Attention], Tensor | None]
"""Called with a layer and its attention; a tensor that it returns replaces z."""
OnTensor = Callable[[int, Tensor], None]
"""Called with a layer and one of its activations."""
OnResidual = Callable[[int, Tensor], Tensor | None]
"""Called with a layer and the residual stream after it; a tensor that it returns replaces the residual stream."""
OnGradient = Callable[[int, ProjectionName, Tensor, Tensor], None]
"""Called in the backward pass with a layer, a projection, its input, and the loss's gradient at its output."""
ProjectionDelta = Callable[[int, ProjectionName, Tensor], Tensor]
"""Called with a layer, a projection and its input; what it returns is added to the projection's output."""

MlpPart = Literal["gate", "in", "out", "scale"]
"""A part of a layer's MLP: an input projection (`in`, and `gate` where the MLP is gated), the down projection (`out`),
or the `scale` of the norm between the MLP and the residual sum."""
OnMlp = Callable[[int, MlpPart, Tensor, Tensor], Tensor | None]
"""Called with a layer, a part of its MLP, the part's input and its output; a tensor that it returns replaces the
output. The input of `scale` is the normalised vector, in float32."""


class MlpForm(NamedTuple):
    """What a layer's MLP is made of, as far as a change of its weights depends on it."""

    inputs: tuple[MlpPart, ...]
    """The projections that read the MLP's input."""
    shift: Literal["bias", "out", "scale"]
    """What can add a fixed vector to what the MLP writes at one token: the `scale` of the norm after the MLP where
    there is one, else the `bias` of the down projection, else the down projection `out` itself."""
    d_hidden: int
    """The number of hidden activations, which the down projection reads."""


HOOK_LEVEL = 1 << 20
"""TransformerLens's context level of the hooks of a run. It tells them from everyone else's hooks."""

Hook = tuple[nn.Module, Callable[..., Any]]
"""A module and the function that is called there in a forward pass. A hook point calls it as `(tensor, hook=)`; any
other module calls it as torch calls forward hooks: `(module, args, kwargs, output)`."""


class Weight(NamedTuple):
    """A weight or bias of a projection, and how its axes map to those of the matrix W (or the bias b) in `W x + b`."""

    parameter: nn.Parameter
    """The model's own parameter."""
    axes: str
    """The parameter's axes as einops writes them, e.g. `head d_in d_head`. An axis `head` must come first."""
    matrix_axes: str
    """The matrix's axes in terms of `axes`, e.g. `(head d_head) d_in`."""

    def to_matrix(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Rearrange a tensor of the parameter's shape into a matrix `[d_out d_in]`, or a bias `[d_out]`."""
        return rearrange(tensor, f"{self.axes} -> {self.matrix_axes}")

    def from_matrix(self, matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Rearrange a matrix `[d_out d_in]`, or a bias `[d_out]`, into the parameter's shape."""
        n_heads = {"head": len(self.parameter)} if self.axes.startswith("head") else {}
        return rearrange(matrix, f"{self.matrix_axes} -> {self.axes}", **n_heads)


class Projection(NamedTuple):
    """A linear map of attention, `W x + b`."""

    W: Weight
    """The weight."""
    b: Weight | None
    """The bias; `None` where the projection has none."""

    @property
    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """The current value of W."""
        return self.W.to_matrix(self.W.parameter.detach())

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The current value of b; `None` where the projection has no bias."""
        return None if self.b is None else self.b.to_matrix(self.b.parameter.detach())


class DirectPathParts(NamedTuple):
    """The modules between attention's outputs and the logits."""

    after_attention: list[nn.Module | None]
    """The norm between attention and the residual stream, by layer; `None` where there is none."""
    final: nn.Module | None
    """The norm before the unembedding; `None` where there is none."""
    W_U: Float[Tensor, "d_vocab d_model"]
    """The unembedding."""
    b_U: Float[Tensor, " d_vocab"] | None
    """The unembedding's bias; `None` for a model without."""
    cap: float | None
    """The bound c of c·tanh(logit / c); `None` where logits are not capped."""


class Backend(ABC):
    """Reads weights, hooks and attention rules from one TransformerLens model.

    Raises:
        UnsupportedModelError: the model's attention is not softmax over scaled scores, its weights are processed, or
            its hooks do not show all of its attention.
    """

    HOOK_NAMES: ClassVar[dict[str, str]]
    """The hooks that attention is read from, by the short names that `attention_inputs` uses; a layer may lack some."""

    supports_projection_deltas: ClassVar[bool] = False
    """Whether `projection_delta_hook` is available."""

    supports_arithmetic: ClassVar[bool] = False
    """Whether weights can run in another dtype than their own (`arithmetic`)."""

    wrapped: Any
    """The TransformerLens model."""
    tokenizer: Any
    """The model's tokenizer, or `None`."""
    architecture: str
    """The name of the model's class in transformers, e.g. `LlamaForCausalLM`."""
    n_layers: int
    """Number of layers."""
    n_heads: int
    """Number of query heads in a layer."""
    n_key_value_heads: int
    """Number of key-value heads in a layer."""
    d_model: int
    """Width of the residual stream."""
    d_head: int
    """Width of a head."""
    n_ctx: int
    """Most tokens that the model reads."""
    d_vocab: int
    """Size of the vocabulary."""
    rope_scaling_threshold: int | None
    """Sequence length in tokens past which rotary embedding changes at every position (dynamic NTK, LongRoPE); `None`
    where rotary embedding does not depend on the sequence length."""
    hook_points: dict[str, Any]
    """The model's hook points by name."""
    offloaded: frozenset[int] = frozenset()
    """The layers whose MLP is kept on another device than the model's, and runs as a copy there."""

    def __init__(self, wrapped: Any, arithmetic: torch.dtype | None = None) -> None:
        self.wrapped = wrapped
        self.arithmetic = arithmetic
        """The dtype of the computation; `None` for the dtype of the weights."""
        self.check_supported()
        self._check_arithmetic()
        cfg = wrapped.cfg
        self.tokenizer = wrapped.tokenizer
        self.n_layers = int(cfg.n_layers)
        self.n_heads = int(cfg.n_heads)
        self.n_key_value_heads = int(cfg.n_key_value_heads or cfg.n_heads)
        self.d_model = int(cfg.d_model)
        self.d_head = int(cfg.d_head)
        self.n_ctx = int(cfg.n_ctx)
        self.d_vocab = int(cfg.d_vocab)
        self.hook_points = wrapped.hook_dict  # kept: a bridge takes as long to collect them as to run a layer

    @abstractmethod
    def check_supported(self) -> None:
        """Check what can be known from the model's parts before it runs.

        Raises:
            UnsupportedModelError: the model is not supported; the message says why.
        """

    def _check_arithmetic(self) -> None:
        """Check that the weights can run in `arithmetic`."""
        dtype = next(self.parameters()).dtype
        check_arithmetic(dtype, self.arithmetic)
        if not self.supports_arithmetic and self.arithmetic not in (None, dtype):
            raise UnsupportedModelError(
                f"expected no arithmetic for a {type(self.wrapped).__name__}, which runs in the dtype of its weights "
                f"({dtype}), got arithmetic={self.arithmetic}: load it with dtype=torch.float32, or pass a "
                "TransformerBridge"
            )

    @property
    def device(self) -> torch.device:
        """Return the device on which the model runs."""
        return next(self.parameters()).device

    def run_copies(self, undo: Undo) -> None:  # noqa: B027 - most classes run their weights as they are
        """Let the weights run in `arithmetic`, and on the model's device, until the block ends."""

    @abstractmethod
    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every weight of the model, fused projections as one weight."""

    @abstractmethod
    def forward_weights(self) -> Iterator[nn.Parameter]:
        """Yield every weight that a forward pass uses, including the model's second copies of some."""

    @abstractmethod
    def projection(self, layer: int, kind: ProjectionName) -> Projection:
        """Return one projection of a layer, with the parameters that the forward pass uses.

        Raises:
            UnsupportedModelError: the projection is not a plain linear map.
        """

    @abstractmethod
    def attention_rule(self, layer: int) -> dual.AttentionRule:
        """Return how a layer turns queries and keys into softmax weights."""

    @abstractmethod
    def forward(self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " pos"]) -> Tensor:
        """Run the model on tokens at the given positions and return logits `[batch pos d_vocab]`."""

    @abstractmethod
    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of a residual stream: final norm, then unembedding."""

    @abstractmethod
    def direct_path_parts(self) -> DirectPathParts:
        """Return the modules between attention's outputs and the logits.

        Raises:
            UnsupportedModelError: what attention writes is not added to the residual stream as it is, or after a norm.
        """

    @abstractmethod
    def reinitialised(self, seed: int) -> "Backend":
        """Return a model of the same class, configuration and dtype with weights from its own initialiser."""

    def attention_hook_names(self, layer: int) -> Collection[str]:
        """Return the short names of the hooks that `attention_inputs` may need of a layer."""
        return self.HOOK_NAMES

    @abstractmethod
    def attention_inputs(
        self, layer: int, activations: dict[str, Tensor], positions: Int[Tensor, " pos"]
    ) -> tuple[Tensor, ...]:
        """Return queries and keys as they enter the scores, values, and queries before rotary embedding.

        Args:
            layer: the layer.
            activations: what the hooks of `attention_hook_names` held, by short name.
            positions: the tokens' positions.

        Returns:
            `q, k, v, q_pre_rotary`, each `[batch pos head d_head]`, keys and values by their own heads.
        """

    @abstractmethod
    def pre_rotary_hooks(self, layer: int, kind: Literal["Q", "K"], callback: OnTensor) -> list[Hook]:
        """Return hooks that pass on a layer's queries or keys by head, after norms and before rotary embedding."""

    @abstractmethod
    def gradient_hooks(self, layer: int, kind: Literal["K", "V"], callback: OnGradient) -> list[Hook]:
        """Return hooks that, in the backward pass, pass on a projection's input and the gradient at its output."""

    def projection_delta_hook(self, layer: int, kind: ProjectionName, delta: ProjectionDelta) -> Hook:
        """Return a hook that adds `delta` of a projection's input to its output.

        Raises:
            NotImplementedError: the class has no `supports_projection_deltas`.
        """
        raise NotImplementedError(
            f"expected a backend with supports_projection_deltas, got {type(self).__name__}: change the weights instead"
        )

    def mlp_form(self, layer: int) -> MlpForm:
        """Return what a layer's MLP is made of.

        Raises:
            UnsupportedModelError: the MLP is not made of plain projections with hooks; the message says why.
        """
        raise UnsupportedModelError(
            f"{self.architecture}: expected a TransformerBridge, in which the projections of an MLP are modules of "
            f"their own, got a {type(self.wrapped).__name__}: load the model as a bridge (icl_dual.load_model)"
        )

    def mlp_projection(self, layer: int, part: MlpPart) -> Projection:
        """Return a projection of a layer's MLP (`gate`, `in` or `out`), with the parameters that the forward pass uses.

        Raises:
            UnsupportedModelError: the MLP is not made of plain projections with hooks; the message says why.
        """
        raise NotImplementedError(f"expected a backend with hooks in MLPs, got {type(self).__name__}: use a bridge")

    def mlp_scale(self, layer: int) -> tuple[nn.Parameter, float]:
        """Return the weight of the norm after a layer's MLP, and what is added to it: its scale is their sum."""
        raise NotImplementedError(f"expected a backend with hooks in MLPs, got {type(self).__name__}: use a bridge")

    def mlp_hooks(self, layer: int, callback: OnMlp) -> list[Hook]:
        """Return hooks that pass on input and output of each part of a layer's MLP, and may replace the output.

        Raises:
            UnsupportedModelError: the MLP is not made of plain projections with hooks; the message says why.
        """
        raise NotImplementedError(f"expected a backend with hooks in MLPs, got {type(self).__name__}: use a bridge")

    def skip_unhooked(self, undo: Undo) -> None:  # noqa: B027 - most classes have no way to
        """Let the model skip what only its hooks would receive, where nobody has any, until the block ends."""

    def skip_mlps(self, undo: Undo) -> None:  # noqa: B027 - most classes have no way to
        """Let MLPs of plain projections return zeros without computing them, until the block ends."""

    def middle_hooks(self, layer: int, callback: OnTensor) -> list[Hook]:
        """Return hooks that pass on the residual stream before a layer plus what the layer's attention writes."""
        raise NotImplementedError(f"expected a backend with hooks in MLPs, got {type(self).__name__}: use a bridge")

    @abstractmethod
    def output_hook(self, layer: int, callback: OnTensor) -> Hook:
        """Return a hook that passes on attention's output after W_O, before any norm and the residual sum."""

    @abstractmethod
    def residual_hook(self, layer: int, callback: OnResidual) -> Hook:
        """Return a hook that passes on the residual stream after a layer, and may replace it."""

    def values_by_head(self, hooked_values: Tensor) -> Float[Tensor, "batch pos kv_head d_head"]:
        """Return what a value hook holds as values by their own heads."""
        return hooked_values

    def attention_hooks(
        self,
        layer: int,
        on_attention: OnAttention | None,
        positions: Int[Tensor, " pos"],
        momentum_of: Callable[[Tensor], Momentum] | None = None,
    ) -> list[Hook]:
        """Return hooks that collect a layer's queries, keys and values, and call back when z is computed.

        Args:
            layer: the layer.
            on_attention: called with the layer's attention; a tensor that it returns replaces z.
            positions: the tokens' positions.
            momentum_of: computes momentum from the layer's values. It is added to z, or to the tensor that replaced z.
        """
        activations: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            def hook_fn(tensor: Tensor, hook: Any) -> None:
                activations[name] = tensor

            return hook_fn

        def call_back(z: Tensor, hook: Any) -> Tensor | None:
            momentum = None if momentum_of is None else momentum_of(self.values_by_head(activations["v"]))
            by_head, replacement = z.reshape(*z.shape[:2], self.n_heads, self.d_head), None
            if on_attention is not None:
                q, k, v, q_pre_rotary = self.attention_inputs(layer, activations, positions)
                activations.clear()
                replacement = on_attention(layer, Attention(q, k, v, by_head, q_pre_rotary, momentum))
            activations.clear()
            if momentum is not None:
                replacement = (by_head if replacement is None else replacement) + momentum.z
            return None if replacement is None else replacement.to(z.dtype).reshape(z.shape)

        names = ["v"] if on_attention is None else self.attention_hook_names(layer)
        points = {name: self.hook_points.get(f"blocks.{layer}.attn.{self.HOOK_NAMES[name]}") for name in names}
        keeping: list[Hook] = [(point, keep(name)) for name, point in points.items() if point is not None]
        return [*keeping, (self.hook_points[f"blocks.{layer}.attn.hook_z"], call_back)]


def check_unsupported(where: str, present_by_feature: dict[str, bool]) -> None:
    """Check that a model has none of the given features.

    Args:
        where: the model or layer, for the message.
        present_by_feature: whether the model has each unsupported feature, by the feature's description.

    Raises:
        UnsupportedModelError: the model has one of them; the message names the first.
    """
    for feature, present in present_by_feature.items():
        if present:
            raise UnsupportedModelError(
                f"{where}: expected a causal language model with softmax attention over scaled scores, got "
                f"{feature}: its attention cannot be split exactly, use another model"
            )


def check_direct_path(where: str, present_by_feature: dict[str, bool]) -> None:
    """Raise an UnsupportedModelError where a model has a feature that no direct path to the logits goes through."""
    for feature, present in present_by_feature.items():
        if present:
            raise UnsupportedModelError(
                f"{where}: expected attention outputs that are added to the residual stream, got {feature}: their "
                "direct effect on logits is not linear in them, leave out logits="
            )


def callback_hook(layer: int, callback: OnTensor | OnResidual) -> Callable[..., Any]:
    """Return a hook function that passes a hook point's tensor to a callback, and returns the callback's result."""

    def hook_fn(tensor: Tensor, hook: Any) -> Tensor | None:
        return callback(layer, tensor)

    return hook_fn
