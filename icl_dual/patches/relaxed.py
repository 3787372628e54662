"""Two forms of ΔW_ICL, inserted into a model that then runs: the exact ΔICL, and the paper's linear relaxation.

1. **The exact ΔICL** (`run_inserted`). In an in-context pass, every head's output splits exactly into z = z_0 + ΔICL
   (`icl_dual.decomposition`). Here ΔICL is taken from that pass, and added to the heads' outputs in another one, which
   runs the query without the demonstrations. At all layers and all of the query's tokens, this gives the in-context
   logits, by induction over layers. At the recorded token alone it does not: the query's earlier tokens are then those
   of a zero-shot pass, and what the recorded token reads from them has changed, too (the *inherited* update).
2. **The linear relaxation** (`run_relaxed`; equations 11–12 of Dai et al., 2023). In the in-context prompt, every
   head's output at the recorded token becomes

       z̃ = (W_ZSL + ΔW_ICL) q,    W_ZSL = Σ v_i ⊗ k_i over the query's tokens and the start token,
                                  ΔW_ICL = Σ v_i ⊗ k_i over the demonstrations and their separators.

   Softmax and 1/√d are gone, and with them the cap of scores, position biases (ALiBi) and the sink, which are parts of
   the softmax. Norms and rotary embedding of queries and keys stay, and so does the window of keys that a token reads.
   Query heads that share a key-value head share its matrices. Linear attention does not normalise its weights, so z̃ may
   be of another size than z. It may be multiplied by the factor of each layer and head that brings it closest to z:

       c = Σ ⟨z, z̃⟩ / Σ ‖z̃‖²,

   over queries of an unchanged in-context pass. All other tokens, the demonstrations' and the query's earlier ones,
   keep softmax attention: what the recorded token reads is what it reads in context.

In both, lower layers that are changed change the input of those above, as in any change of a model's weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import checked
from icl_dual.captures.capture import check_pass
from icl_dual.captures.shared_prefix import (
    BatchLimit,
    BatchRows,
    PrefixCache,
    check_rope_scaling,
    run_prefix,
    run_queries,
    split_into_batches,
)
from icl_dual.field_docs import document_fields
from icl_dual.models import Attention, Model, UnsupportedModelError
from icl_dual.models.journal import exclusive
from icl_dual.prompts import PromptError, Prompts, check_prompts
from icl_dual.results import check_axes, check_range, check_values
from icl_dual.storage import Saved
from icl_dual.torch_utils import at_least_float32, checked_index, pad_right, to_list, vector_norm

Scale = Literal["raw", "fitted", "held-out", "in sequence"]
"""The factor of the relaxed heads' outputs: 1; the closest for the query itself; the closest for all other queries; or
the closest for the query itself where the layers below are relaxed, too."""
InsertedTokens = Literal["query", "recorded"]
"""The tokens at which ΔICL is inserted: all of the query's, or the recorded one."""

BATCH_SIZE = 16
"""The most queries that run at once."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class AttentionRun(Saved):
    """Logits of a model with changed attention, beside those in context, after each query."""

    model: str
    """The name of the model."""
    fingerprint: str
    """The fingerprint of the model's weights; it begins with their precision."""
    prompts: Prompts
    """The in-context prompts."""
    change: Literal["inserted", "relaxed"]
    """What was changed: ΔICL was inserted, or softmax was relaxed."""
    option: Scale | InsertedTokens
    """The scale of the relaxed outputs, or the tokens at which ΔICL was inserted."""
    layers: tuple[int, ...]
    """The layers that were changed."""
    logits: Float[Tensor, "query d_vocab"]
    """The logits with the change, at the recorded position."""
    in_context_logits: Float[Tensor, "query d_vocab"]
    """The model's own logits there, in context."""
    factors: Float[Tensor, "query layer head"] | None = None
    """The factor of each relaxed head's output, at layers that were changed; elsewhere 1. `None` where ΔICL was
    inserted."""

    def __post_init__(self) -> None:
        axes = check_axes(self, query=("prompts.queries", len(self.prompts.queries)))
        check_values(self, "logits", "in_context_logits", "factors")
        check_layers(self.layers, axes.get("layer"))
        check_range("prompts/labels", self.prompts.labels, low=0, high=axes["d_vocab"] - 1)
        is_relaxed = self.change == "relaxed"
        if self.option not in get_args(Scale if is_relaxed else InsertedTokens):
            options = get_args(Scale if is_relaxed else InsertedTokens)
            raise ValueError(f"expected option with {self.change} as one of {options}, got {self.option!r}: correct it")
        if is_relaxed != (self.factors is not None):
            got = "none" if self.factors is None else "some"
            raise ValueError(f"expected factors with relaxed attention alone, got {got} with {self.change}: correct it")

    def __repr__(self) -> str:
        return (
            f"AttentionRun({self.model!r}, {self.change}, {self.option!r}, {len(self.layers)} layers, "
            f"{len(self.logits)} queries, KL={self.kl.mean():.3g}, agreement={self.agreement.double().mean():.3f})"
        )

    @property
    def kl(self) -> Float[Tensor, " query"]:
        """The Kullback–Leibler divergence of the changed model's next-token distribution from that in context, in nats.

        It is KL(in context ‖ changed).
        """
        p, q = (logits.double().log_softmax(-1) for logits in (self.in_context_logits, self.logits))
        return (p.exp() * (p - q)).sum(-1)

    @property
    def logit_cosine(self) -> Float[Tensor, " query"]:
        """The cosine of the changed logits with those in context, each less its mean over the vocabulary."""
        a, b = (logits.double() - logits.double().mean(-1, True) for logits in (self.logits, self.in_context_logits))
        return dual.cosine(a, b)

    @property
    def relative_error(self) -> Float[Tensor, " query"]:
        """The norm of the logits' difference, relative to those in context."""
        logits, expected = self.logits.double(), self.in_context_logits.double()
        return vector_norm(logits - expected, dim=-1) / vector_norm(expected, dim=-1)

    @property
    def agreement(self) -> Bool[Tensor, " query"]:
        """Whether the next token with the highest logit is the one in context."""
        return self.logits.argmax(-1) == self.in_context_logits.argmax(-1)

    @property
    def predictions(self) -> Int[Tensor, " query"]:
        """The index of the label word with the highest logit.

        Raises:
            ValueError: a label word has several tokens.
        """
        return self._predictions(self.logits)

    @property
    def in_context_predictions(self) -> Int[Tensor, " query"]:
        """The index of the label word with the highest logit in context.

        Raises:
            ValueError: a label word has several tokens.
        """
        return self._predictions(self.in_context_logits)

    def _predictions(self, logits: Float[Tensor, "query d_vocab"]) -> Int[Tensor, " query"]:
        if any(len(label) > 1 for label in self.prompts.labels):
            raise ValueError(
                f"expected label words of one token each, got {list(self.prompts.labels)}: one position has the logits "
                "of their first tokens alone, choose other label words"
            )
        return logits[:, [label[0] for label in self.prompts.labels]].argmax(-1)

    @property
    def correct(self) -> Bool[Tensor, " query"]:
        """Whether the predicted label is the query's."""
        return self.predictions == torch.tensor(self.prompts.gold)

    @property
    def accuracy(self) -> float:
        """The share of queries with the right label."""
        return self.correct.double().mean().item()


@checked
@exclusive
def run_relaxed(
    model: Model, prompts: Prompts, *, layers: Sequence[int] | None = None, scale: Scale = "raw"
) -> AttentionRun:
    """Run a model in context with linear attention, (W_ZSL + ΔW_ICL) q, at the recorded token of some layers.

    All other tokens and layers keep softmax attention. Where the model has momentum attention, its sum is added to the
    relaxed outputs as to the model's own.

    Args:
        model: the model.
        prompts: the demonstrations and the queries, under the `answer` protocol.
        layers: the layers to relax, negative from the end; all by default.
        scale: the factor of the relaxed heads' outputs: `raw` for 1; `fitted` for the one that brings the head closest
            to its softmax output for the query itself, an upper bound; `held-out` for the one that does so for all
            other queries together; `in sequence` as `fitted`, with the relaxed outputs computed where the layers below
            are relaxed, too.

    Returns:
        The logits, and those in context.

    Raises:
        IndexError: there is no such layer.
        PromptError: the prompts are incomplete or have no demonstrations, or do not fit into the model's context.
        ValueError: the prompts are under the `reference` protocol, or have a single query, and scale is `held-out`.
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> prompts = icl_dual.Prompts(
        ...     start=(0,),
        ...     demonstrations=((5, 6), (7, 8)),
        ...     demonstration_label_lengths=(1, 1),
        ...     queries=((9, 10), (12, 10)),
        ...     labels=((6,), (8,)),
        ...     gold=(0, 1),
        ... )
        >>> relaxed = icl_dual.run_relaxed(tiny_model(), prompts, scale="held-out")
        >>> relaxed.logits.shape, relaxed.factors.shape
        (torch.Size([2, 257]), torch.Size([2, 2, 4]))
    """
    changed = checked_layers(model, prompts, layers)
    if scale == "held-out" and len(prompts.queries) < 2:
        raise ValueError("expected at least 2 queries for scale='held-out', got 1: there is no other one to fit to")
    with torch.no_grad():
        cache, _ = run_prefix(model, prompts.prefix)
        context = _Context(model, prompts, cache, changed)
        factors = context.factors(scale)

        def relax(layer: int, attention: Attention, rows: list[int], last: Tensor) -> Tensor:
            if layer not in changed:
                return attention.z
            relaxed = _relaxed(model, cache, layer, attention, last)
            if scale == "in sequence":
                inner, square = _products(context.z[rows, layer], relaxed)
                factors[rows, layer] = _ratio(inner, square)
            z = at_least_float32(attention.z).clone()
            z[torch.arange(len(rows)), last] = factors[rows, layer].to(relaxed).unsqueeze(-1) * relaxed
            return z

        logits = _run_after(model, prompts, cache, len(prompts.prefix), relax)
    return AttentionRun(
        model=model.name,
        fingerprint=model.fingerprint(),
        prompts=prompts,
        change="relaxed",
        option=scale,
        layers=changed,
        logits=logits,
        in_context_logits=context.logits,
        factors=factors,
    )


@checked
@exclusive
def run_inserted(
    model: Model, prompts: Prompts, *, layers: Sequence[int] | None = None, tokens: InsertedTokens = "query"
) -> AttentionRun:
    """Run a model without the demonstrations, with ΔICL of an in-context pass added to the heads' outputs.

    The start token and the query run alone, at the positions that they have in context, with the query's tokens in
    context. A head's output z becomes z + ΔICL. At all layers and all of the query's tokens this gives the in-context
    logits.

    Args:
        model: the model; without momentum.
        prompts: the demonstrations and the queries, under the `answer` protocol.
        layers: the layers to insert ΔICL at, negative from the end; all by default.
        tokens: `query` for all of the query's tokens; `recorded` for the recorded one alone.

    Returns:
        The logits, and those in context.

    Raises:
        IndexError: there is no such layer.
        PromptError: the prompts are incomplete or have no demonstrations, or do not fit into the model's context.
        ValueError: the prompts are under the `reference` protocol.
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks, or it has momentum.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> prompts = icl_dual.Prompts(
        ...     start=(0,),
        ...     demonstrations=((5, 6), (7, 8)),
        ...     demonstration_label_lengths=(1, 1),
        ...     queries=((9, 10),),
        ...     labels=((6,), (8,)),
        ...     gold=(0,),
        ... )
        >>> inserted = icl_dual.run_inserted(tiny_model(), prompts)
        >>> bool(inserted.relative_error < 1e-5)
        True
    """
    changed = checked_layers(model, prompts, layers)
    if model.momentum is not None:
        raise UnsupportedModelError(
            f"expected a model without momentum, got {model.name}: what its demonstrations add is more than ΔICL"
        )
    with torch.no_grad():
        delta_icl = _DeltaIcl(model, prompts, changed)

        def insert(layer: int, attention: Attention, rows: list[int], last: Tensor) -> Tensor:
            if layer not in changed:
                return attention.z
            z = at_least_float32(attention.z).clone()
            for index, (row, end) in enumerate(zip(rows, to_list(last), strict=True)):
                at = slice(0 if tokens == "query" else end, end + 1)
                z[index, at] += delta_icl.by_query[row, layer][at]
            return z

        alone, _ = run_prefix(model, prompts.start)
        logits = _run_after(model, prompts, alone, len(prompts.prefix), insert)
    return AttentionRun(
        model=model.name,
        fingerprint=model.fingerprint(),
        prompts=prompts,
        change="inserted",
        option=tokens,
        layers=changed,
        logits=logits,
        in_context_logits=delta_icl.logits,
    )


def check_layers(layers: Sequence[int], n_layers: int | None) -> None:
    """Check that `layers` of a result are in ascending order, and among those of its `factors` where it has these.

    Raises:
        ValueError: a layer is negative, not one of the factors', or not above the one before it.
    """
    name, last = ("layers", math.inf) if n_layers is None else ("layers of factors", n_layers - 1)
    check_range(name, layers, low=0, high=last)
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"expected layers in ascending order, got {tuple(layers)}: sort them")


def checked_layers(model: Model, prompts: Prompts, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Check the arguments, and return the layers from 0."""
    check_prompts(model, prompts)
    if not prompts.demonstrations:
        raise PromptError(
            "expected prompts with demonstrations, got none: without them there is no ΔW_ICL, pass the prompts of "
            "build_prompts and not their zero_shot()"
        )
    if prompts.appended_tokens:
        raise ValueError(
            f"expected prompts under the answer protocol, got {prompts.protocol!r}: its recorded position is after the "
            "one that predicts the label"
        )
    every = range(model.n_layers)
    changed = every if layers is None else {checked_index("layers", layer, model.n_layers) for layer in layers}
    check_rope_scaling(model, prompts, ())
    with torch.no_grad():
        check_pass(model, prompts)
    return tuple(sorted(changed))


class _DeltaIcl:
    """ΔICL of an in-context pass of all queries, at all of their tokens."""

    def __init__(self, model: Model, prompts: Prompts, layers: tuple[int, ...]) -> None:
        self.by_query: dict[tuple[int, int], Float[Tensor, "pos head d_head"]] = {}
        """By query and layer."""
        n_start, n_prefix = len(prompts.start), len(prompts.prefix)
        cache, _ = run_prefix(model, prompts.prefix)
        first = {name: [tensor[:, :n_start] for tensor in getattr(cache, name)] for name in ("keys", "values", "norms")}
        start = replace(cache, **first)

        def keep(layer: int, attention: Attention, rows: BatchRows) -> None:
            if layer in layers:
                z_0 = merge_cache(model, start, layer, attention, n_prefix).z
                added = at_least_float32(attention.z) - at_least_float32(z_0)
                for row, of_row, end in zip(to_list(rows.indices), added, to_list(rows.last), strict=True):
                    self.by_query[row, layer] = of_row[: end + 1].clone()

        self.logits = _in_context_logits(model, prompts, cache, keep)
        """The logits at the recorded positions."""


def delta_icl_at(model: Model, prompts: Prompts) -> Float[Tensor, "layer d_z"]:
    """Return ΔICL of the first query's heads, side by side, at its recorded position."""
    delta_icl = _DeltaIcl(model, prompts, tuple(range(model.n_layers))).by_query
    return torch.stack([delta_icl[0, layer][-1].flatten() for layer in range(model.n_layers)])


OnRows = Callable[[int, Attention, list[int], Int[Tensor, " batch"]], Tensor]
"""Returns z of a batch, from the layer, its attention, the rows' indices, and each row's last position."""


def _run_after(
    model: Model, prompts: Prompts, cache: PrefixCache, first: int, z_of: OnRows
) -> Float[Tensor, "query d_vocab"]:
    """Return the logits at the recorded positions of queries that run after cached tokens, with replaced z.

    Args:
        model: the model.
        prompts: the queries.
        cache: the tokens before every query.
        first: the position of each query's first token.
        z_of: called with each layer's attention, its z merged with attention over the cache.
    """
    rows = prompts.suffixes
    logits = torch.zeros(len(rows), model.d_vocab, dtype=torch.promote_types(model.dtype, torch.float32))
    for batch in split_into_batches(list(map(len, rows)), BATCH_SIZE):
        tokens = pad_right([rows[row] for row in batch], device=model.device)
        last = torch.tensor([len(rows[row]) - 1 for row in batch], device=model.device)

        def on_attention(layer: int, attention: Attention, batch: list[int] = batch, last: Tensor = last) -> Tensor:
            merged = attention._replace(z=merge_cache(model, cache, layer, attention, first).z)
            return z_of(layer, merged, batch, last)

        positions = first + torch.arange(tokens.shape[1], device=model.device)
        logits[batch] = model.run(
            tokens,
            positions=positions,
            read=last[:, None],
            on_attention=on_attention,
            momentum_states=cache.states,
            predicting=last,
        )[:, 0].to(logits)
    return logits


def merge_cache(model: Model, cache: PrefixCache, layer: int, attention: Attention, first: int) -> dual.AttentionPart:
    """Return a batch's softmax attention over its own tokens, from a position on, and over cached tokens before it."""
    rule, (q, k, v, *_) = model.attention_rules[layer], attention
    positions = first + torch.arange(q.shape[1], device=q.device)[None]
    of_batch = rule.with_sink(rule.attend(q, k, v, positions, positions))
    return dual.merge(of_batch, cache.attend(rule, layer, q, positions)) if cache.n_pos else of_batch


def _in_context_logits(
    model: Model, prompts: Prompts, cache: PrefixCache, on_attention: Callable[..., None]
) -> Float[Tensor, "query d_vocab"]:
    """Return the logits at the recorded positions in context."""
    rows = prompts.suffixes
    logits = torch.zeros(len(rows), model.d_vocab, dtype=torch.promote_types(model.dtype, torch.float32))
    for batch in run_queries(model, rows, 1, cache, BatchLimit(BATCH_SIZE), on_attention=on_attention):
        logits[batch.rows] = batch.logits[:, 0].to(logits)
    return logits


def _relaxed(
    model: Model, cache: PrefixCache, layer: int, attention: Attention, last: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head d_head"]:
    """Return (W_ZSL + ΔW_ICL) q of each row's last token, over the keys that it sees."""
    rule, (q, k, v, *_) = model.attention_rules[layer], attention
    index = torch.arange(len(q), device=q.device)
    recorded = cache.n_pos + last[:, None]
    last_q = at_least_float32(q[index, last])
    before = torch.arange(cache.n_pos, device=q.device)[None]
    after = cache.n_pos + torch.arange(q.shape[1], device=q.device)[None]
    parts = ((before, cache.keys[layer], cache.values[layer]), (after, k, v))
    return sum(
        (
            dual.act_unformed(
                last_q,
                at_least_float32(keys) * rule.visible(recorded, positions)[:, 0, :, None, None],
                at_least_float32(values).expand(len(q), -1, -1, -1),
            )
            for positions, keys, values in parts
        ),
        start=torch.zeros_like(last_q),
    )


def _products(
    z: Float[Tensor, "batch head d_head"], relaxed: Float[Tensor, "batch head d_head"]
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head"]]:
    """Return ⟨z, z̃⟩ and ‖z̃‖², in float64."""
    z, relaxed = z.double().cpu(), relaxed.double().cpu()
    return (z * relaxed).sum(-1), relaxed.square().sum(-1)


def _ratio(inner: Float[Tensor, "..."], square: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return ⟨z, z̃⟩ / ‖z̃‖²; 0 where z̃ is zero."""
    return torch.where(square > 0, inner / square, torch.zeros_like(inner))


class _Context:
    """What an in-context pass of all queries leaves: logits, and what factors are fitted to."""

    def __init__(self, model: Model, prompts: Prompts, cache: PrefixCache, layers: tuple[int, ...]) -> None:
        shape = len(prompts.queries), model.n_layers, model.n_heads
        self.z = torch.zeros(*shape, model.d_head, dtype=torch.promote_types(model.dtype, torch.float32))
        """The heads' softmax outputs at the recorded position."""
        self.inner, self.square = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        """⟨z, z̃⟩ and ‖z̃‖² there."""

        def keep(layer: int, attention: Attention, rows: BatchRows) -> None:
            if layer in layers:
                at = to_list(rows.indices)
                self.z[at, layer] = rows.at_last(attention.z).to(self.z)
                relaxed = _relaxed(model, cache, layer, attention, rows.last)
                self.inner[at, layer], self.square[at, layer] = _products(self.z[at, layer], relaxed)

        self.logits = _in_context_logits(model, prompts, cache, keep)
        self.layers = list(layers)

    def factors(self, scale: Scale) -> Float[Tensor, "query layer head"]:
        """Return the factor of each query, layer and head."""
        factors = torch.ones_like(self.inner)
        if scale in ("fitted", "held-out"):
            inner, square = self.inner, self.square
            if scale == "held-out":
                inner, square = inner.sum(0) - inner, square.sum(0) - square
            factors[:, self.layers] = _ratio(inner, square)[:, self.layers]
        return factors
