"""What `Model` asks of a TransformerLens class: its weights, its hooks, a forward pass, and what it refuses.

The classes share most hook names, but not what their hooks show, where their weights lie, or how they take positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_dual import dual
from icl_dual.momentum import Momentum


class UnsupportedModelError(ValueError):
    """A model whose attention this library cannot read or split exactly."""


class Attention(NamedTuple):
    """One layer's attention as its hooks show it; keys and values keep their own number of heads."""

    q: Float[Tensor, "batch pos head d_head"]
    """Queries as scored: after norms and rotation."""
    k: Float[Tensor, "batch pos kv_head d_head"]
    """Keys as scored: after norms and rotation."""
    v: Float[Tensor, "batch pos kv_head d_head"]
    z: Float[Tensor, "batch pos head d_head"]
    """The heads' outputs, before W_O and before momentum."""
    q_pre_rotary: Float[Tensor, "batch pos head d_head"]
    """Queries after norms but before rotation: what they say, apart from where they stand."""
    momentum: Momentum | None = None
    """What momentum adds to z, and its state after the last position; `None` where the layer has none."""

    @property
    def output(self) -> Float[Tensor, "batch pos head d_head"]:
        """What W_O gets: z, which is the softmax's alone, and momentum where there is any."""
        return self.z if self.momentum is None else self.z + self.momentum.z


OnAttention = Callable[[int, Attention], Tensor | None]
OnTensor = Callable[[int, Tensor], None]
OnResidual = Callable[[int, Tensor], Tensor | None]
OnGradient = Callable[[int, "ProjectionName", Tensor, Tensor], None]
ProjectionDelta = Callable[[int, "ProjectionName", Tensor], Tensor]

HOOK_LEVEL = 1 << 20
"""What tells the hooks of a run from anyone else's."""

Hook = tuple[nn.Module, Callable[..., Any]]
"""Where a function is called in a forward pass, and the function: at a hook point with its tensor (and `hook=`), at any
other module with what torch calls forward hooks with: `(module, args, kwargs, output)`."""

ProjectionName = Literal["Q", "K", "V", "O"]
"""Attention's projections, by the matrix they multiply with."""


class Weight(NamedTuple):
    """A weight or bias of a projection, and how the model keeps it.

    `matrix` lays out what has the parameter's shape as the W of `W x + b` (or the b), `[d_out d_in]`, heads in order;
    `stored` lays out such a matrix as the parameter is.
    """

    parameter: nn.Parameter
    axes: str
    """The parameter's axes, e.g. `head d_in d_head`; `head` may come first only."""
    matrix_axes: str
    """The matrix' axes in terms of these, e.g. `(head d_head) d_in`."""

    def to_matrix(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A tensor like the parameter, laid out as a matrix."""
        return rearrange(tensor, f"{self.axes} -> {self.matrix_axes}")

    def from_matrix(self, matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A matrix, laid out like the parameter."""
        n_heads = {"head": len(self.parameter)} if self.axes.startswith("head") else {}
        return rearrange(matrix, f"{self.matrix_axes} -> {self.axes}", **n_heads)


class Projection(NamedTuple):
    """A linear map of attention, `W x + b`."""

    W: Weight
    b: Weight | None

    @property
    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """W as it is now."""
        return self.W.to_matrix(self.W.parameter.detach())

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The bias as it is now, where there is one."""
        return None if self.b is None else self.b.to_matrix(self.b.parameter.detach())


class Backend(ABC):
    """One TransformerLens model, asked.

    Raises:
        UnsupportedModelError: what the model does is not softmax attention over raw weights that hooks show whole.
    """

    HOOK_NAMES: ClassVar[dict[str, str]]
    """What attention is put together from, and the hooks that show it, where a layer has them."""

    supports_projection_deltas: ClassVar[bool] = False
    """Whether something can be added to what its projections make."""

    wrapped: Any
    tokenizer: Any
    architecture: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    d_vocab: int
    rope_scaling_threshold: int | None
    hook_points: dict[str, Any]

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.check_supported()
        cfg = wrapped.cfg
        self.tokenizer = wrapped.tokenizer
        self.n_layers = int(cfg.n_layers)
        self.n_heads = int(cfg.n_heads)
        self.n_key_value_heads = int(cfg.n_key_value_heads or cfg.n_heads)
        self.d_model = int(cfg.d_model)
        self.d_head = int(cfg.d_head)
        self.n_ctx = int(cfg.n_ctx)
        self.d_vocab = int(cfg.d_vocab)
        self.hook_points = wrapped.hook_dict  # kept: collecting a bridge's takes as long as a layer

    @abstractmethod
    def check_supported(self) -> None:
        """Raise an UnsupportedModelError that says what is in the way, where that is known from the model's parts."""

    @abstractmethod
    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight of the model; fused projections whole."""

    @abstractmethod
    def forward_weights(self) -> Iterator[nn.Parameter]:
        """Every weight that a forward pass uses, also those it keeps twice."""

    @abstractmethod
    def projection(self, layer: int, kind: ProjectionName) -> Projection:
        """A layer's projection, as the part that the forward pass uses.

        Raises:
            UnsupportedModelError: it is no plain linear map.
        """

    @abstractmethod
    def attention_rule(self, layer: int) -> dual.AttentionRule:
        """How a layer's softmax weighs keys."""

    @abstractmethod
    def forward(self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " pos"]) -> Tensor:
        """Logits of tokens that stand at positions."""

    @abstractmethod
    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a residual stream, by the final norm and the unembedding."""

    @abstractmethod
    def reinitialised(self, seed: int) -> "Backend":
        """A model of the same class, configuration and type, all of whose weights its own initialiser has drawn."""

    @abstractmethod
    def read(self, layer: int, seen: dict[str, Tensor], positions: Int[Tensor, " pos"]) -> tuple[Tensor, ...]:
        """Queries and keys as scored, values, and queries before rotation, `[batch pos head d_head]` each."""

    @abstractmethod
    def pre_rotary_hooks(self, layer: int, kind: Literal["Q", "K"], show: OnTensor) -> list[Hook]:
        """Hooks that show a layer's queries or keys after norms and before rotation, heads apart."""

    @abstractmethod
    def gradient_hooks(self, layer: int, kind: Literal["K", "V"], show: OnGradient) -> list[Hook]:
        """Hooks that, in the backward pass, show a projection's input and the gradient at its output."""

    def projection_delta_hook(self, layer: int, kind: ProjectionName, added: ProjectionDelta) -> Hook:
        """A hook that adds to a projection's output what is made of its input, where the class `supports_projection_deltas`."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing")

    @abstractmethod
    def output_hook(self, layer: int, show: OnTensor) -> Hook:
        """A hook that shows attention's output after W_O, before any norm and the residual sum."""

    @abstractmethod
    def residual_hook(self, layer: int, show: OnResidual) -> Hook:
        """A hook that shows the residual stream after a layer, and may replace it."""

    def values(self, shown: Tensor) -> Float[Tensor, "batch pos kv_head d_head"]:
        """Values by their own heads, from what their hook shows."""
        return shown

    def attention_hooks(
        self,
        layer: int,
        on_attention: OnAttention | None,
        positions: Int[Tensor, " pos"],
        momentum_of: Callable[[Tensor], Momentum] | None = None,
    ) -> list[Hook]:
        """Hooks that collect a layer's queries, keys and values as it computes them, and show them when z arrives.

        `momentum_of` the layer's values is added to z, or to what was put in its place.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            def hook_fn(tensor: Tensor, hook: Any) -> None:
                seen[name] = tensor

            return hook_fn

        def show(z: Tensor, hook: Any) -> Tensor | None:
            momentum = None if momentum_of is None else momentum_of(self.values(seen["v"]))
            by_head, replaced = z.reshape(*z.shape[:2], self.n_heads, self.d_head), None
            if on_attention is not None:
                q, k, v, q_pre_rotary = self.read(layer, seen, positions)
                seen.clear()
                replaced = on_attention(layer, Attention(q, k, v, by_head, q_pre_rotary, momentum))
            seen.clear()
            if momentum is not None:
                replaced = (by_head if replaced is None else replaced) + momentum.z
            return None if replaced is None else replaced.to(z.dtype).reshape(z.shape)

        wanted = self.HOOK_NAMES if on_attention is not None else {"v": self.HOOK_NAMES["v"]}
        points = {name: self.hook_points.get(f"blocks.{layer}.attn.{hook}") for name, hook in wanted.items()}
        watched: list[Hook] = [(point, keep(name)) for name, point in points.items() if point is not None]
        return [*watched, (self.hook_points[f"blocks.{layer}.attn.hook_z"], show)]


def check_unsupported(where: str, known: dict[str, bool]) -> None:
    """Refuse a model for the first of these that is true of it.

    Raises:
        UnsupportedModelError: says which.
    """
    for cause, found in known.items():
        if found:
            raise UnsupportedModelError(
                f"{where}: expected a causal language model whose attention is softmax over scaled scores, got "
                f"{cause}; it cannot be split exactly here"
            )


def callback_hook(layer: int, on_tensor: OnTensor | OnResidual) -> Callable[..., Any]:
    """What shows a hook point's tensor to a callback, and puts back what it returns."""

    def hook_fn(tensor: Tensor, hook: Any) -> Tensor | None:
        return on_tensor(layer, tensor)

    return hook_fn
