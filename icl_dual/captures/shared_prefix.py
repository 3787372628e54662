"""The engine of captures: what queries share runs once, and each query's own tokens run after it.

Attention over a prompt is attention over its parts, merged (`icl_dual.dual`). So the part that all queries share runs
once:

1. Start token, demonstrations and the tokens with which all queries begin (their template's) run through the model
   once. They run in blocks, each after the ones before it; where the full-prompt pass is kept (`FullPromptPass`), they
   run as one sequence with the first query after them. Their keys and values at every layer are kept in a
   `PrefixCache`.
2. The rest of each query then runs alone, at its in-context positions. At every layer the heads' output over these
   tokens is merged with attention over the cached keys and values, computed from the layer's own queries: one matrix
   product for the whole batch, and no key or value is copied per query. The zero-shot pass is the same with the start
   token alone in the cache: in-context learning is the zero-shot pass with the demonstrations added to what is merged.
   Where the model has momentum, the cached values leave one vector per head, from which each query's sum continues.
3. Callbacks receive each layer's attention, attention output and residual stream; what to keep of them is the caller's
   choice. Of what runs once, the norms of the residual stream are kept beside keys and values.
4. Every pass recomputes the heads' output over its tokens from queries, keys and values and compares it with the
   model's own. `measure_pass` compares the whole pass with a plain forward pass over a full prompt. A model that fails
   either is refused.
"""

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import trusted
from icl_dual.field_docs import document_fields
from icl_dual.models import Attention, Model, OnTensor, UnsupportedModelError
from icl_dual.models.backend import ProjectionDelta, ProjectionName
from icl_dual.models.overflow import check_activations, is_finite
from icl_dual.momentum import decaying_sum
from icl_dual.prompts import Prompts, Tokens
from icl_dual.results import compare_by_value
from icl_dual.torch_utils import is_out_of_memory, pad_right, to_list, vector_norm

PREFIX_BLOCK = 256
"""How many prefix tokens run at once on a CPU: the memory of a model's own attention grows with their square."""

LAUNCHED_BLOCK = 2048
"""How many prefix tokens run at once on other devices: launching operators takes as long for few tokens as for many."""

BATCH_OVERHEAD = 96
"""The cost of a batch besides its tokens on a CPU, in tokens: measured on a small model, where it is largest."""

LARGEST_OVERHEAD = 1 << 20
"""The largest cost of a batch besides its tokens, in tokens: where these cost nothing against their launch."""

MEASURED_TOKENS = (1, 2), (64, 64)
"""The rows and tokens of the passes that `batch_overhead` measures."""

PREFIX_PART, FULL_PROMPT = "part of the demonstrations,", "prompt, run whole for the field 'full_prompt',"
"""How errors name the single piece that does not fit in memory."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""Largest relative residual that is rounding. Rotary models take their softmax in float32 also at float64; over the
layers of a real model, bfloat16's rounding adds up to 7e-2."""

logger = logging.getLogger(__name__)


class BatchRows(NamedTuple):
    """The rows of a batch, as tensors on the model's device: made once for all layers."""

    indices: Int[Tensor, " batch"]
    """The rows' indices."""
    last: Int[Tensor, " batch"]
    """The position of each row's last token."""
    in_batch: Int[Tensor, " batch"]
    """0, 1, …: the rows' places in the batch."""
    past_end: Bool[Tensor, "batch pos"]
    """Whether each position comes after the row's last token."""

    @classmethod
    def of(cls, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> "BatchRows":
        """Return the rows of some indices and numbers of tokens."""
        numbers = torch.tensor([rows, lengths, range(len(rows))], device=device)
        last = numbers[1] - 1
        return cls(numbers[0], last, numbers[2], torch.arange(max(lengths), device=device) > last[:, None])

    def at_last(self, tensor: Shaped[Tensor, "batch pos *axes"]) -> Shaped[Tensor, "batch *axes"]:
        """Return a tensor at each row's last token."""
        return tensor[self.in_batch, self.last]


OnBatchAttention = Callable[[int, Attention, BatchRows], None]
"""Called with the layer, its attention, and the rows."""
OnBatchOutput = Callable[[int, Tensor, BatchRows], None]
"""Called with the layer, attention's output or the residual stream after the layer `[batch pos d_model]`, and the
rows."""


@document_fields
@compare_by_value
class FullPromptPass(NamedTuple):
    """A plain forward pass over the first query's full prompt, with nothing merged: the reference for captures."""

    tokens: Tokens
    """The token ids of the prompt: prefix, query, and what the protocol appends."""
    q: Float[Tensor, "layer head d_head"]
    """Queries as scored (after norms and rotation), at the recorded position."""
    k: Float[Tensor, "layer pos kv_head d_head"]
    """Keys as scored, at every position of the prompt."""
    v: Float[Tensor, "layer pos kv_head d_head"]
    """Values, at every position of the prompt."""
    attn_out: Float[Tensor, "layer d_model"]
    """Attention output after W_O, at the recorded position."""

    def __repr__(self) -> str:
        return f"FullPromptPass({len(self.tokens)} tokens)"


@dataclass(frozen=True)
class PrefixCache:
    """Keys, values, momentum state and residual norms of the tokens that come before every row, by layer.

    Several runs, each with weights of its own, can go on side by side: every batch then has as many rows of each run,
    one run after the other.
    """

    keys: list[Float[Tensor, "run pos kv_head d_head"]]
    """Keys as scored, by layer."""
    values: list[Float[Tensor, "run pos kv_head d_head"]]
    """Values, by layer."""
    states: list[Float[Tensor, "run head d_head"] | None]
    """`Momentum.state` after the last token, by layer; `None` where the layer has no momentum."""
    norms: list[Float[Tensor, "run pos"]]
    """Norms of the residual stream after the layer, by layer."""
    residual: float
    """Largest relative difference between the recomputed attention and the model's own, over layers and blocks."""

    @property
    def n_runs(self) -> int:
        """Return the number of runs."""
        return len(self.keys[0])

    @property
    def n_pos(self) -> int:
        """Return the number of tokens."""
        return self.keys[0].shape[1]

    def of_run(self, run: int) -> "PrefixCache":
        """Return the cache of a single run."""
        one = slice(run, run + 1)
        keys, values, norms = ([t[one] for t in by_layer] for by_layer in (self.keys, self.values, self.norms))
        states = [None if state is None else state[one] for state in self.states]
        return PrefixCache(keys, values, states, norms, self.residual)

    def attend(
        self,
        rule: dual.AttentionRule,
        layer: int,
        q: Tensor,
        positions: Int[Tensor, "1 pos"],
        check_finite: bool = True,
        mask: dual.Mask | None = None,
    ) -> dual.AttentionPart:
        """Return a batch's attention over the cached tokens: a run's rows are stacked and share one matrix product."""
        batch, n_pos = q.shape[:2]
        n_rows = batch // self.n_runs
        z, lse = rule.attend_masked(
            q.reshape(self.n_runs, n_rows * n_pos, *q.shape[2:]),
            self.keys[layer],
            self.values[layer],
            self.mask(rule, positions, n_rows, q.device) if mask is None else mask,
            check_finite=check_finite,
        )
        return dual.AttentionPart(z.reshape(q.shape), lse.reshape(q.shape[:-1]))

    def mask(
        self, rule: dual.AttentionRule, positions: Int[Tensor, "1 pos"], n_rows: int, device: torch.device
    ) -> dual.Mask:
        """Return what a run's rows, stacked, see of the cached tokens."""
        return rule.mask(positions.repeat(1, n_rows), torch.arange(self.n_pos)[None], device)

    def with_block(self, block: "PrefixCache") -> "PrefixCache":
        """Return the cache extended by a block of tokens that ran after it."""
        keys = [torch.cat(pair, dim=1) for pair in zip(self.keys, block.keys, strict=True)]
        values = [torch.cat(pair, dim=1) for pair in zip(self.values, block.values, strict=True)]
        norms = [torch.cat(pair, dim=1) for pair in zip(self.norms, block.norms, strict=True)]
        return PrefixCache(keys, values, block.states, norms, max(self.residual, block.residual))


def empty_cache(model: Model, n_runs: int = 1) -> PrefixCache:
    """Return a cache of no tokens."""
    empty = torch.zeros(n_runs, 0, model.n_key_value_heads, model.d_head, device=model.device, dtype=model.dtype)
    n_layers, norms = model.n_layers, norms_of(empty.flatten(2))
    return PrefixCache([empty] * n_layers, [empty] * n_layers, [None] * n_layers, [norms] * n_layers, 0.0)


class Runs(NamedTuple):
    """How many runs go on side by side, and what tells them apart."""

    n: int
    """The number of runs."""
    projection_deltas: Mapping[ProjectionName, ProjectionDelta] | None = None
    """What is added to projections' outputs, for `Model.run`: it receives the rows of all runs, one run after the
    other."""


ONE_RUN = Runs(1)
"""A run of the model as it is."""


@dataclass
class BatchLimit:
    """The largest number of queries to run at once, lowered where a batch does not fit in memory."""

    n: int
    """The number of queries."""
    warned: bool = False
    """Whether the user was told that it was lowered."""

    def halve(self, n_queries: int, n_tokens: int) -> None:
        """Set the limit to half of a batch that did not fit, and warn the first time."""
        self.n = (n_queries + 1) // 2
        if not self.warned:
            message = (
                "%d queries of %d tokens do not fit in memory at once: running %d, and fewer where these do not fit"
            )
            logger.warning(message, n_queries, n_tokens, self.n)
        self.warned = True


class BlockCallbacks(NamedTuple):
    """Called by `run_prefix` at every layer of every block; a block that does not fit in memory runs again, shorter."""

    on_attention: Callable[[PrefixCache, int, Attention], None]
    """Called with the cache of the tokens before the block, the layer and its attention; z is of the whole prompt."""
    on_output: Callable[[int, int, Tensor], None]
    """Called with the position of the block's first token, the layer and attention's output `[1 pos d_model]`."""
    on_residual: Callable[[int, int, Tensor], None]
    """Called with that position, the layer and the residual stream after it `[1 pos d_model]`."""


def run_prefix(
    model: Model,
    prefix: Tokens,
    row: Tokens | None = None,
    callbacks: BlockCallbacks | None = None,
    runs: Runs = ONE_RUN,
) -> tuple[PrefixCache, FullPromptPass | None]:
    """Run what the queries share once: in blocks that each run after the ones before, or whole with a row after it.

    Args:
        model: the model to run.
        prefix: the tokens that all queries share.
        row: the first query's own tokens, where its full-prompt pass is kept. Causality keeps them out of the prefix,
            so that one pass serves as cache and as full-prompt pass.
        callbacks: called at every layer of every block; not with a row.
        runs: the runs that go on side by side; one where a row or callbacks are given.

    Returns:
        The cache of the prefix, and the full-prompt pass where a row was given.

    Raises:
        MemoryError: a single token, or the prompt that must run whole, does not fit in memory.
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks.
    """
    cache = empty_cache(model, runs.n)
    block_size = PREFIX_BLOCK if model.device.type == "cpu" else LAUNCHED_BLOCK
    if row is not None or (prefix and model.rope_scaling_threshold is not None):
        # Long-context scaling rotates keys by the length of what runs: there, the prefix must run whole.
        if callbacks is None:
            return _run_whole(model, prefix, row, cache, runs)
        block_size = len(prefix)
    while cache.n_pos < len(prefix):
        tokens = torch.tensor([prefix[cache.n_pos : cache.n_pos + block_size]] * runs.n, device=model.device)
        try:
            block = _run_block(model, tokens, cache, callbacks, runs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if block_size == 1 or model.rope_scaling_threshold is not None:
                raise _memory_error(model, PREFIX_PART, tokens, cache, error) from error
            block_size = (block_size + 1) // 2
            continue
        cache = cache.with_block(block)
    return cache, None


def _run_block(
    model: Model, tokens: Int[Tensor, "run pos"], cache: PrefixCache, callbacks: BlockCallbacks | None, runs: Runs
) -> PrefixCache:
    """Return the cache of one block of prefix tokens, run after the ones before."""
    block = PrefixCache([], [], [], [], 0.0)

    def on_attention(layer: int, attention: Attention) -> None:
        # From the layer on: the pass may run once more.
        block.keys[layer:] = [attention.k]
        block.values[layer:] = [attention.v]
        block.states[layer:] = [None if attention.momentum is None else attention.momentum.state]
        if callbacks is not None:
            callbacks.on_attention(cache, layer, attention)

    def on_residual(layer: int, residual: Tensor) -> None:
        block.norms[layer:] = [norms_of(residual)]
        if callbacks is not None:
            callbacks.on_residual(cache.n_pos, layer, residual)

    on_output = None if callbacks is None else partial(callbacks.on_output, cache.n_pos)
    logit_positions = torch.zeros_like(tokens[:, :1])
    _, residual = _run_after(cache, model, tokens, logit_positions, on_attention, on_output, on_residual, runs=runs)
    return replace(block, residual=residual)


def _run_whole(
    model: Model, prefix: Tokens, row: Tokens | None, cache: PrefixCache, runs: Runs
) -> tuple[PrefixCache, FullPromptPass | None]:
    """Run a prefix as one sequence, with a row after it where one is given."""
    tokens, n = torch.tensor([prefix + (row or ())] * runs.n, device=model.device), len(prefix)
    q, k, v, attn_out, norms = (list[Tensor]() for _ in range(5))
    states: list[Tensor | None] = []

    def on_attention(layer: int, attention: Attention) -> None:
        # From the layer on: the pass may run once more.
        q[layer:] = [attention.q[0, -1].clone()]  # a view would keep all of q in memory
        k[layer:] = [attention.k]
        v[layer:] = [attention.v]
        eta = model.eta(layer)
        states[layer:] = [None if eta is None else decaying_sum(attention.v[:, :n], eta).state]

    def on_output(layer: int, output: Tensor) -> None:
        attn_out[layer:] = [output[0, -1].clone()]

    def on_residual(layer: int, residual: Tensor) -> None:
        norms[layer:] = [norms_of(residual[:, :n])]

    logit_positions = torch.zeros_like(tokens[:, :1])
    try:
        _, residual = _run_after(cache, model, tokens, logit_positions, on_attention, on_output, on_residual, runs=runs)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _memory_error(model, FULL_PROMPT if row else PREFIX_PART, tokens, cache, error) from error
        raise
    keys, values = ([tensor[:, :n] for tensor in by_layer] for by_layer in (k, v))
    prefix_cache = PrefixCache(keys, values, states, norms, residual)
    if row is None:
        return prefix_cache, None
    dtype = torch.promote_types(model.dtype, torch.float32)
    k, v = ([tensor[0] for tensor in by_layer] for by_layer in (k, v))
    stacked = (torch.stack(by_layer).to(dtype) for by_layer in (q, k, v, attn_out))
    return prefix_cache, FullPromptPass(prefix + row, *stacked)


def _run_after(
    cache: PrefixCache,
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    logit_positions: Int[Tensor, "batch n_read"],
    on_attention: Callable[[int, Attention], None],
    on_output: OnTensor | None = None,
    on_residual: OnTensor | None = None,
    predicting: Int[Tensor, " row"] | None = None,
    runs: Runs = ONE_RUN,
) -> tuple[Float[Tensor, "batch n_read d_vocab"], float]:
    """Run rows after the cached tokens; `on_attention` receives each layer's attention with the z of the whole prompt.

    `predicting` is the index of each row's token that predicts the label, where rows have one. Returns logits at the
    positions requested, and the residual of the heads' output over the rows' own tokens. Raises a NonFiniteError that
    names the layer where activations overflow.
    """
    positions = cache.n_pos + torch.arange(tokens.shape[1])[None]
    extremes: list[Tensor] = []
    sums: list[Tensor] = []
    check_finite = model.device.type == "cpu"
    masks = _Masks(cache, positions, len(tokens) // runs.n, model.device)

    @trusted
    def merge_cache(layer: int, attention: Attention) -> Tensor | None:
        rule, (q, k, v, z, *_) = model.attention_rules[layer], attention
        if not cache.n_pos:  # nothing to merge: the last row, which sees all tokens, is enough to check
            last = rule.with_sink(rule.attend(q[:, -1:], k, v, positions[:, -1:], positions, check_finite=check_finite))
            extremes.extend(_extremes(last.z, z[:, -1:], runs.n))
            on_attention(layer, attention)
            return None
        of_rows, of_cache = masks.of_rule(rule)
        row_part = rule.with_sink(rule.attend_masked(q, k, v, of_rows, check_finite=check_finite))
        extremes.extend(_extremes(row_part.z, z, runs.n))
        cached = cache.attend(rule, layer, q, positions, check_finite=check_finite, mask=of_cache)
        if not check_finite:  # the rows' own part would make the extremes NaN or infinite
            sums.append(cached.z.detach().sum())
        # `dual.merge` in fewer operators. Each row sees itself, so that its own part is never without keys.
        share = torch.sigmoid(cached.lse - row_part.lse).unsqueeze(-1)
        z = torch.lerp(row_part.z, cached.z, share)
        on_attention(layer, attention._replace(z=z))
        return z

    run = partial(
        model.run,
        tokens,
        positions=positions[0],
        read=logit_positions,
        on_attention=merge_cache,
        momentum_states=cache.states,
        projection_deltas=runs.projection_deltas,
        predicting=tokens.new_zeros(0) if predicting is None else predicting,
    )
    logits = run(on_output=on_output, on_residual=on_residual)
    residuals = _residuals(extremes)
    if not (check_finite or is_finite(torch.cat([*(total[None] for total in sums), residuals]))):
        check_finite = True  # at every layer: hidden numbers may be the cause
        extremes.clear()
        logits = run(on_output=on_output, on_residual=on_residual)
        residuals = _residuals(extremes)
    if not (is_finite(logits.amax()) and is_finite(residuals)):
        check_activations(model, run)
    return logits, _check_residuals(model, residuals)


class _Masks:
    """What the rows of a batch see of their own tokens and of the cache: made once for all layers of a window."""

    def __init__(self, cache: PrefixCache, positions: Int[Tensor, "1 pos"], n_rows: int, device: torch.device) -> None:
        self.cache, self.positions, self.n_rows, self.device = cache, positions, n_rows, device
        self.by_window: dict[int | None, tuple[dual.Mask, dual.Mask]] = {}

    def of_rule(self, rule: dual.AttentionRule) -> tuple[dual.Mask, dual.Mask]:
        """Return both masks of a layer."""
        if rule.slopes is None and rule.window in self.by_window:
            return self.by_window[rule.window]
        of_rows = rule.mask(self.positions, self.positions, self.device)
        masks = of_rows, self.cache.mask(rule, self.positions, self.n_rows, self.device)
        if rule.slopes is None:  # ALiBi's differ by head: they would take much memory
            self.by_window[rule.window] = masks
        return masks


class QueryBatch(NamedTuple):
    """The result of some of the rows, run after the shared tokens."""

    rows: list[int]
    """The rows' indices."""
    logits: Float[Tensor, "batch n_read d_vocab"]
    """Logits at the positions requested; of several runs one after the other."""
    residual: float
    """The largest relative difference between the recomputed attention and the model's own, over layers."""


def run_queries(
    model: Model,
    rows: Sequence[Tokens],
    n_read: int,
    context: PrefixCache,
    limit: BatchLimit,
    *,
    on_attention: OnBatchAttention | None = None,
    on_output: OnBatchOutput | None = None,
    on_residual: OnBatchOutput | None = None,
    on_batch: Callable[[BatchRows], None] | None = None,
    n_after: int = 0,
    runs: Runs = ONE_RUN,
) -> Iterator[QueryBatch]:
    """Run rows after the shared tokens, in batches padded on the right (causality keeps that exact).

    A batch that does not fit in memory is halved, and so are those after it.

    Args:
        model: the model to run.
        rows: each row's own tokens.
        n_read: at how many positions of each row to compute logits.
        context: the cache of the tokens before every row.
        limit: the largest number of rows to run at once; it is lowered where memory runs out.
        on_attention: called at every layer with the batch's attention (z is that of the whole prompt), the rows'
            indices and their last positions.
        on_output: called at every layer with the attention output after W_O, the rows' indices and their last
            positions.
        on_residual: called at every layer with the residual stream after it, the rows' indices and their last
            positions.
        on_batch: called with the rows' indices and their last positions when a batch has run.
        n_after: how many tokens at the end of each row come after the positions of the logits.
        runs: the runs that go on side by side, those of the context: callbacks receive the rows of all runs, and the
            rows' indices and last positions of one.

    Yields:
        Each batch, with the logits at its rows' last `n_read` positions before the last `n_after`.

    Raises:
        MemoryError: a single row does not fit in memory.
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks.
    """
    # A row has as many times its tokens as there are runs; what a batch costs besides its tokens stays the same.
    overhead, n_runs = batch_overhead(model) // runs.n, runs.n
    pending: deque[list[int]] = deque(split_into_batches(list(map(len, rows)), limit.n, overhead))
    while pending:
        batch = pending.popleft()
        tokens = pad_right([rows[row] for row in batch], device=model.device).repeat(n_runs, 1)
        of_batch = BatchRows.of(batch, [len(rows[row]) for row in batch], model.device)
        distance = torch.arange(n_read - 1, -1, -1, device=model.device)
        logit_positions = (of_batch.last[:, None] - n_after - distance).repeat(n_runs, 1)

        def with_rows(callback: Callable[[int, Any, BatchRows], None], of_batch: BatchRows = of_batch) -> Any:
            def on_layer(layer: int, content: Any) -> None:
                callback(layer, content, of_batch)

            return on_layer

        try:
            logits, residual = _run_after(
                context,
                model,
                tokens,
                logit_positions,
                with_rows(on_attention or _ignore),
                None if on_output is None else with_rows(on_output),
                None if on_residual is None else with_rows(on_residual),
                predicting=logit_positions[:, 0],
                runs=runs,
            )
            if on_batch is not None:
                on_batch(of_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise _memory_error(model, "query,", tokens, context, error) from error
        else:
            yield QueryBatch(batch, logits, residual)
            continue
        # Outside of the handler: its traceback holds on to the memory of the failed run.
        limit.halve(len(batch), tokens.shape[1])
        pending = deque(
            whole[first : first + limit.n] for whole in (batch, *pending) for first in range(0, len(whole), limit.n)
        )


def _ignore(layer: int, attention: Attention, rows: BatchRows) -> None:
    """Keep nothing of a layer's attention."""


def batch_overhead(model: Model) -> int:
    """Return the cost of a batch besides its tokens, in tokens.

    A CPU works through the tokens one after the other; other devices wait for each operator to be launched. There, the
    cost is measured the first time, in less than a second.
    """
    if model.device.type != "cuda":
        return BATCH_OVERHEAD
    if model.batch_overhead is not None:
        return model.batch_overhead
    if model.mlp_changes or model.run_checks or model.foreign_hooks():
        return LARGEST_OVERHEAD  # other tokens may be refused, and foreign hooks may keep what they receive
    generator = torch.Generator().manual_seed(0)
    seconds: list[float] = []
    for shape in MEASURED_TOKENS:
        tokens = torch.randint(model.d_vocab, shape, generator=generator).to(model.device)
        last = torch.zeros_like(tokens[:, :1])
        turns = [_seconds(model, partial(model.run, tokens[:, : model.n_ctx], read=last)) for _ in range(3)]
        seconds.append(min(turns))
    (few, many), (n_few, n_many) = seconds, map(math.prod, MEASURED_TOKENS)
    by_token = max(many - few, 0.0) / (n_many - n_few)
    overhead = few / max(by_token, few / LARGEST_OVERHEAD)
    model.batch_overhead = measured = 4 ** round(math.log(overhead, 4))  # roughly, so that runs plan the same batches
    return measured


def _seconds(model: Model, run: Callable[[], Tensor]) -> float:
    """Return how long the device takes for a pass."""
    torch.cuda.synchronize(model.device)
    started = time.perf_counter()
    run()
    torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


def split_into_batches(lengths: Sequence[int], batch_size: int, overhead: int = BATCH_OVERHEAD) -> list[list[int]]:
    """Return batches of row indices, rows of like lengths together, at the lowest cost in padding and batches.

    Args:
        lengths: the number of tokens of each row.
        batch_size: the largest number of rows in a batch.
        overhead: the cost of a batch besides its tokens, in tokens.

    >>> split_into_batches([3, 200, 4, 190], batch_size=2)
    [[3, 1], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    lowest_cost, best_begin = [0], [0]  # of the first n sorted rows, and where their last batch begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        begins = range(max(0, end - batch_size), end)
        costs = [lowest_cost[begin] + (end - begin) * longest + overhead for begin in begins]
        lowest_cost.append(min(costs))
        best_begin.append(begins[costs.index(lowest_cost[-1])])
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[best_begin[end] : end])
        end = best_begin[end]
    return batches


def _memory_error(
    model: Model, piece: str, tokens: Int[Tensor, "run pos"], cache: PrefixCache, error: Exception
) -> MemoryError:
    return MemoryError(
        f"expected memory for a single {piece} {tokens.shape[1]} tokens after {cache.n_pos} tokens in {model!r}, "
        f"got: {error}. Use fewer or shorter demonstrations, a smaller model or half precision"
    )


def label_word_log_probs(
    model: Model, queries: Sequence[Tokens], label: Tokens, context: PrefixCache, limit: BatchLimit, runs: Runs
) -> Float[Tensor, "run query"]:
    """Return the mean log-probability per token, in nats, of a label word of several tokens after each query.

    Each token is read after the label's tokens before it.
    """
    rows = [query + label[:-1] for query in queries]
    dtype = torch.promote_types(model.dtype, torch.float32)
    means = torch.zeros(runs.n, len(rows), dtype=dtype, device=model.device)
    target = torch.tensor(label, device=model.device)
    for batch in run_queries(model, rows, len(label), context, limit, runs=runs):
        log_probs = log_probs_of(batch.logits)
        label_log_probs = log_probs.gather(-1, target.expand(len(log_probs), -1)[..., None]).squeeze(-1)
        means[:, batch.rows] = torch.unflatten(label_log_probs.mean(-1), 0, (runs.n, -1))
    return means


def common_query_prefix(prompts: Prompts) -> Tokens:
    """Return the tokens with which all queries begin, without the last token of any query."""
    first, last = min(prompts.queries), max(prompts.queries)  # in dictionary order: what these share, all share
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))
    return tuple(token for token, _ in same)


def check_rope_scaling(model: Model, prompts: Prompts, query_prefix: Tokens) -> None:
    """Refuse prompts where the shared part is within the model's original context and the longest query is past it.

    Raises:
        UnsupportedModelError: long-context scaling (dynamic NTK, LongRoPE) would rotate the cached keys differently
            once the query follows.
    """
    threshold, n_shared = model.rope_scaling_threshold, len(prompts.prefix) + len(query_prefix)
    longest = len(prompts.prefix) + max(map(len, prompts.queries)) + max(map(len, prompts.labels))
    if threshold is not None and n_shared <= threshold < longest:
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}) rotates all keys differently past {threshold} tokens: expected "
            f"demonstrations and queries on one side of that, got {n_shared} tokens that the queries share and "
            f"{longest} with the longest query. Use fewer demonstrations, or more"
        )


def log_probs_of(logits: Tensor) -> Tensor:
    """Return log-probabilities in nats, in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def norms_of(residual: Float[Tensor, "*axes d_model"]) -> Float[Tensor, " *axes"]:
    """Return the norm of each token's residual stream, in float32 or wider: massive activations overflow float16."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return vector_norm(residual, dim=-1, dtype=dtype)


def _residual(recomputed: Tensor, expected: Tensor) -> Tensor:
    return _residuals(_extremes(recomputed, expected))[0]


def _extremes(recomputed: Tensor, expected: Tensor, n_runs: int = 1) -> tuple[Tensor, ...]:
    """Return the smallest and the largest difference and expected number, of which `_residuals` makes a residual.

    Of several runs, those of each: large numbers of one would hide what differs in another. Reads the tensors once.
    What can be computed for all layers at once is: on a GPU each operator takes its time.
    """
    if n_runs == 1:
        return (*(recomputed - expected).aminmax(), *expected.aminmax())
    difference, expected = ((recomputed - expected).reshape(n_runs, -1), expected.reshape(n_runs, -1))
    return (*difference.aminmax(dim=1), *expected.aminmax(dim=1))


def _residuals(extremes: Sequence[Tensor]) -> Float[Tensor, " layer"]:
    """Return the largest difference in units of its run's largest number, by layer; NaN where there is a NaN."""
    stacked = torch.stack(list(extremes))
    low, high = stacked.view(-1, 2, 2, *stacked.shape[1:]).unbind(2)
    difference, number = torch.maximum(-low, high).unbind(1)
    by_run = difference / number.clamp_min(1e-30)
    return by_run.amax(1) if by_run.ndim == 2 else by_run


def _check_residuals(model: Model, residuals: Float[Tensor, " layer"]) -> float:
    """Return the largest of a pass's residuals, by layer; refuse the model where one is above rounding level."""
    by_layer = residuals.double().cpu()
    above = (~(by_layer <= TOLERANCE[model.dtype])).nonzero()
    if len(above):
        layer = int(above[0])
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}), layer {layer}: expected attention recomputed from queries, keys and "
            f"values to differ by at most {TOLERANCE[model.dtype]:.0e} from the model's own, got "
            f"{by_layer[layer]:.1e}: remove hooks that change attention, or use another model. The attention does more "
            "than softmax over scaled scores (position biases, gates, a norm before W_O, a hook left on the model …) "
            "and cannot be split exactly"
        )
    return by_layer.max().item()


def measure_pass(model: Model, prefix: Tokens, rows: Sequence[Tokens]) -> float:
    """Return the residual of the shared-prefix pass against plain forward passes over the full prompts.

    The rows run as one batch. At least one of them is padded, unless all have one length and fill the model's context.

    Args:
        model: the model to run.
        prefix: the tokens before every row.
        rows: each row's own tokens.

    Returns:
        The largest relative difference at the last position, over the layers' attention outputs and the logits.

    Raises:
        UnsupportedModelError: they differ beyond rounding, e.g. where a model ignores positions that jump, or where a
            hook counts positions.
    """
    expected = [torch.cat(by_row) for by_row in zip(*(_run_plain(model, prefix + row) for row in rows), strict=True)]
    context, _ = run_prefix(model, prefix)
    tokens = pad_right(rows, device=model.device)
    n_pos = len(prefix) + tokens.shape[1]
    if len(set(map(len, rows))) == 1 and n_pos not in (model.n_ctx, model.rope_scaling_threshold):
        tokens = torch.nn.functional.pad(tokens, (0, 1))
    last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    outputs: dict[int, Tensor] = {}

    def on_output(layer: int, output: Tensor) -> None:
        outputs[layer] = output[torch.arange(len(rows), device=last.device), last]

    logits, _ = _run_after(
        context, model, tokens, last[:, None], lambda layer, attention: None, on_output, predicting=last
    )
    places = [*(f"layer {layer}" for layer in range(model.n_layers)), "logits"]
    worst = 0.0
    for place, actual, plain in zip(places, (*outputs.values(), logits[:, 0]), expected, strict=True):
        worst = max(worst, residual := _residual(actual, plain).item())
        if not residual <= TOLERANCE[model.dtype]:
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), {place}: expected the pass of queries after their "
                f"shared prefix to differ by at most {TOLERANCE[model.dtype]:.0e} from a plain forward pass, got "
                f"{residual:.1e}: {advise(model)}"
            )
    return worst


def _run_plain(model: Model, prompt: Tokens) -> list[Float[Tensor, "1 width"]]:
    """Return each layer's attention output, and then the logits, at the last position of a plain forward pass."""
    outputs: dict[int, Tensor] = {}

    def on_output(layer: int, output: Tensor) -> None:
        outputs[layer] = output[:, -1].clone()

    tokens = torch.tensor([prompt], device=model.device)
    last = torch.full_like(tokens[:, :1], len(prompt) - 1)
    # A hook after the choice of positions would not receive what it receives in a plain pass.
    logits = model.run(tokens, read=None if model.foreign_hooks() else last, on_output=on_output)
    return [*outputs.values(), logits[:, -1]]


def advise(model: Model) -> str:
    """Return what to do about a model that cannot run queries apart from their demonstrations."""
    hooks = model.foreign_hook_names()
    if not hooks:
        return (
            "use another model. This one cannot run queries apart from their demonstrations (it may ignore "
            "position_ids that jump)"
        )
    more = f" and {len(hooks) - 5} more" * (len(hooks) > 5)
    return (
        f"remove the hooks that count positions, of {', '.join(hooks[:5])}{more}. Queries run apart from their "
        "demonstrations and padded at the end, so that position 5 or -1 of what a hook sees is not that of the prompt"
    )


def arbitrary_prompts(model: Model, start: Tokens) -> Prompts:
    """Return two short queries of unequal length after one demonstration, of random tokens that the model can read."""
    n_available = min(model.n_ctx, model.rope_scaling_threshold or model.n_ctx) - len(start)
    n_query = min(6, max(1, n_available // 5))
    n_demo = min(24, n_available - n_query)
    generator = torch.Generator().manual_seed(0)
    ids = tuple(to_list(torch.randint(0, model.d_vocab, (n_demo + 2 * n_query,), generator=generator)))
    return Prompts(
        start=start,
        demonstrations=(ids[:n_demo],),
        demonstration_label_lengths=(0,),
        queries=(ids[n_demo : n_demo + n_query], ids[n_demo + n_query + n_query // 2 :]),
        labels=(ids[:1],),
        gold=(0, 0),
    )
