"""x"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.models import Attention, Model, OnTensor, UnsupportedModelError
from icl_dual.momentum import decaying_sum
from icl_dual.prompts import Prompts, Tokens
from icl_dual.torch_utils import is_out_of_memory, pad_right

PREFIX_BLOCK = 256
"""Prefix tokens run at once: a model's own attention takes memory by their square."""

BATCH_OVERHEAD = 96
"""What a batch costs beside its tokens, in tokens: measured on a small model, where it is most."""

PART, WHOLE = "part of the demonstrations,", "prompt, run whole for the field 'full_prompt',"
"""What a single one of does not fit in memory, as errors say it."""

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""Largest relative residual that is rounding. Rotary models take their softmax in float32 also at float64; over the
layers of a real model, bfloat16's rounding adds up to 7e-2."""


class FullPromptPass(NamedTuple):
    """A plain pass over the first query's full prompt, in which nothing is merged: what captures are held against."""

    tokens: Tokens
    q: Float[Tensor, "layer head d_head"]
    """Queries as scored, at the recorded position."""
    k: Float[Tensor, "layer pos kv_head d_head"]
    """Keys as scored."""
    v: Float[Tensor, "layer pos kv_head d_head"]
    attn_out: Float[Tensor, "layer d_model"]
    """Attention output after W_O, at the recorded position."""

    def __repr__(self) -> str:
        return f"FullPromptPass({len(self.tokens)} tokens)"


OnBatchAttention = Callable[[int, Attention, Sequence[int], Int[Tensor, " batch"]], None]
"""Called with the layer, its attention, the rows' indices, and each row's last position."""
OnBatchOutput = Callable[[int, Tensor, Sequence[int], Int[Tensor, " batch"]], None]
"""Called with the layer, attention's output `[batch pos d_model]`, the rows' indices, and each row's last position."""


@dataclass(frozen=True)
class PrefixCache:
    """The tokens before the rows that run, as every row meets them: keys, values and state of momentum by layer."""

    keys: list[Float[Tensor, "pos kv_head d_head"]]
    values: list[Float[Tensor, "pos kv_head d_head"]]
    states: list[Float[Tensor, "head d_head"] | None]
    residual: float

    @property
    def n_pos(self) -> int:
        return len(self.keys[0])

    def attend(
        self, rule: dual.AttentionRule, layer: int, q: Tensor, positions: Int[Tensor, "1 pos"]
    ) -> dual.AttentionPart:
        """A batch's attention over the context: its rows, stacked, share one matrix product."""
        batch, n_pos = q.shape[:2]
        z, lse = rule.attend(
            q.reshape(1, batch * n_pos, *q.shape[2:]),
            self.keys[layer][None],
            self.values[layer][None],
            positions.repeat(1, batch),
            torch.arange(self.n_pos)[None],
        )
        return dual.AttentionPart(z.reshape(q.shape), lse.reshape(q.shape[:-1]))

    def with_block(self, block: "PrefixCache") -> "PrefixCache":
        """The context with more tokens behind it, which ran behind it."""
        keys = [torch.cat(pair) for pair in zip(self.keys, block.keys, strict=True)]
        values = [torch.cat(pair) for pair in zip(self.values, block.values, strict=True)]
        return PrefixCache(keys, values, block.states, max(self.residual, block.residual))


def no_context(model: Model) -> PrefixCache:
    empty = torch.zeros(0, model.n_key_value_heads, model.d_head, device=model.device, dtype=model.dtype)
    return PrefixCache([empty] * model.n_layers, [empty] * model.n_layers, [None] * model.n_layers, 0.0)


@dataclass
class BatchLimit:
    """The most queries to run at once, which a capture learns as it goes."""

    n: int
    said: bool = False

    def halve(self, n_queries: int, n_tokens: int) -> None:
        self.n = (n_queries + 1) // 2
        if not self.said:
            fits = "%d queries of %d tokens do not fit in memory at once: running %d, and fewer where these do not fit"
            log.warning(fits, n_queries, n_tokens, self.n)
        self.said = True


def run_prefix(model: Model, prefix: Tokens, row: Tokens | None = None) -> tuple[PrefixCache, FullPromptPass | None]:
    """Pass what the queries share once: in blocks that each run behind the ones before, or whole with a row behind it.

    Causality keeps the row out of its prefix, so that one pass serves as context and as a plain pass.
    """
    context = no_context(model)
    if row is not None or (prefix and model.rope_scaling_threshold is not None):
        # Long-context scaling turns keys by the length of what runs: there, the prefix runs whole.
        return _run_whole(model, prefix, row, context)
    block = PREFIX_BLOCK
    while context.n_pos < len(prefix):
        first = context.n_pos
        tokens = torch.tensor([prefix[first : first + block]], device=model.device)
        kept = PrefixCache([], [], [], 0.0)

        def show(layer: int, attention: Attention, kept: PrefixCache = kept) -> None:
            kept.keys.append(attention.k[0])
            kept.values.append(attention.v[0])
            kept.states.append(None if attention.momentum is None else attention.momentum.state[0])

        try:
            _, residual = _run_behind(model, context, tokens, torch.zeros_like(tokens[:, :1]), show)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if block == 1:
                raise _does_not_fit(model, PART, tokens, context, error) from error
            block = (block + 1) // 2
            continue
        context = context.with_block(replace(kept, residual=residual))
    return context, None


def _run_whole(
    model: Model, prefix: Tokens, row: Tokens | None, before: PrefixCache
) -> tuple[PrefixCache, FullPromptPass | None]:
    """Pass a prefix at once, and a row behind it."""
    tokens, n = torch.tensor([prefix + (row or ())], device=model.device), len(prefix)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    states: list[Tensor | None] = []
    attn_out: list[Tensor] = []

    def show(layer: int, attention: Attention) -> None:
        seen.append((attention.q[0, -1].clone(), attention.k[0], attention.v[0]))  # a view would keep all of q
        eta = model.eta(layer)
        states.append(None if eta is None else decaying_sum(attention.v[:, :n], eta).state[0])

    def on_output(layer: int, output: Tensor) -> None:
        attn_out.append(output[0, -1].clone())

    try:
        _, residual = _run_behind(model, before, tokens, torch.zeros_like(tokens[:, :1]), show, on_output)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _does_not_fit(model, WHOLE if row else PART, tokens, before, error) from error
        raise
    q, k, v = zip(*seen, strict=True)
    context = PrefixCache([keys[:n] for keys in k], [values[:n] for values in v], states, residual)
    if row is None:
        return context, None
    dtype = torch.promote_types(model.dtype, torch.float32)
    return context, FullPromptPass(
        prefix + row, *(torch.stack(found).to("cpu", dtype) for found in (q, k, v, attn_out))
    )


def _run_behind(
    model: Model,
    context: PrefixCache,
    tokens: Int[Tensor, "batch pos"],
    read: Int[Tensor, "batch n_read"],
    show: Callable[[int, Attention], None],
    on_output: OnTensor | None = None,
) -> tuple[Float[Tensor, "batch n_read d_vocab"], float]:
    """Run rows behind a context; `show` sees each layer's attention with the z of the whole prompt.

    Returns logits at the positions read, and the residual of the heads' output over the rows' own tokens.
    """
    positions = context.n_pos + torch.arange(tokens.shape[1])[None]
    residuals: list[Tensor] = []

    def on_attention(layer: int, attention: Attention) -> Tensor | None:
        rule, (q, k, v, z, *_) = model.attention_rules[layer], attention
        if not context.n_pos:  # nothing to merge: the last row, which sees all, is enough to check
            last = rule.with_sink(rule.attend(q[:, -1:], k, v, positions[:, -1:], positions))
            residuals.append(_residual(last.z, z[:, -1:]))
            show(layer, attention)
            return None
        own = rule.with_sink(rule.attend(q, k, v, positions, positions))
        residuals.append(_residual(own.z, z))
        z = dual.merge(own, context.attend(rule, layer, q, positions)).z
        show(layer, attention._replace(z=z))
        return z

    logits = model.run(
        tokens,
        positions=positions[0],
        read=read,
        on_attention=on_attention,
        on_output=on_output,
        momentum_states=context.states,
    )
    return logits, _checked(model, residuals)


class QueryBatch(NamedTuple):
    """Some of the rows, run behind the shared context."""

    rows: list[int]
    """The rows' indices."""
    logits: Float[Tensor, "batch n_read d_vocab"]
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
    n_after: int = 0,
) -> Iterator[QueryBatch]:
    """Run rows behind the context, in batches padded on the right (causality keeps that exact).

    A batch that does not fit in memory is halved, and so are those after it.

    Args:
        model: the model to run.
        rows: each row's own tokens.
        n_read: how many positions of each row to unembed.
        context: the tokens before every row.
        limit: the most rows to run at once; it is lowered where memory runs out.
        on_attention: called at every layer with the batch's attention, z being that of the whole prompt, the rows'
            indices and their last positions.
        on_output: the same with the attention output after W_O.
        n_after: how many tokens at the end of each row stand after the positions that are read.

    Yields:
        Each batch, with the logits at its rows' last `n_read` positions before the last `n_after`.
    """
    waiting = deque(batches(list(map(len, rows)), limit.n))
    while waiting:
        batch = waiting.popleft()
        tokens = pad_right([rows[row] for row in batch], device=model.device)
        last = torch.tensor([len(rows[row]) - 1 for row in batch], device=model.device)
        read = last[:, None] - n_after - torch.arange(n_read - 1, -1, -1, device=model.device)

        def show(layer: int, attention: Attention, batch: list[int] = batch, last: Tensor = last) -> None:
            if on_attention is not None:
                on_attention(layer, attention, batch, last)

        def show_output(layer: int, output: Tensor, batch: list[int] = batch, last: Tensor = last) -> None:
            if on_output is not None:
                on_output(layer, output, batch, last)

        try:
            logits, residual = _run_behind(model, context, tokens, read, show, show_output)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise _does_not_fit(model, "query,", tokens, context, error) from error
        else:
            yield QueryBatch(batch, logits, residual)
            continue
        # Out of the handler, whose traceback holds on to the memory of what failed.
        limit.halve(len(batch), tokens.shape[1])
        waiting = deque(
            whole[first : first + limit.n] for whole in (batch, *waiting) for first in range(0, len(whole), limit.n)
        )


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of like lengths together: the split of the sorted rows that costs least, padding and batches counted."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    cost, begins = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        options = range(max(0, end - batch_size), end)
        found = [cost[begin] + (end - begin) * longest + BATCH_OVERHEAD for begin in options]
        cost.append(min(found))
        begins.append(options[found.index(cost[-1])])
    found = []
    end = len(order)
    while end:
        found.append(order[begins[end] : end])
        end = begins[end]
    return found


def _does_not_fit(
    model: Model, what: str, tokens: Int[Tensor, "1 pos"], context: PrefixCache, error: Exception
) -> MemoryError:
    return MemoryError(
        f"expected memory for a single {what} {tokens.shape[1]} tokens behind {context.n_pos} tokens in {model!r}, "
        f"got: {error}. Use fewer or shorter demonstrations, a smaller model or half precision"
    )


def label_word_log_probs(
    model: Model, queries: Sequence[Tokens], label: Tokens, context: PrefixCache, limit: BatchLimit
) -> Float[Tensor, " query"]:
    """Mean log-probability per token of a label word of several tokens, each read after the ones before it."""
    rows = [query + label[:-1] for query in queries]
    means = torch.zeros(len(rows), dtype=torch.promote_types(model.dtype, torch.float32))
    target = torch.tensor(label, device=model.device)
    for batch in run_queries(model, rows, len(label), context, limit):
        log_probs = log_probs_of(batch.logits)
        means[batch.rows] = (
            log_probs.gather(-1, target.expand(len(batch.rows), -1)[..., None]).squeeze(-1).mean(-1).cpu()
        )
    return means


def shared_head(prompts: Prompts) -> Tokens:
    """The tokens with which all queries begin, up to the recorded position, which stays each query's own."""
    first, last = min(prompts.queries), max(prompts.queries)  # in dictionary order: what these share, all do
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))
    return tuple(token for token, _ in same)


def check_rope_scaling(model: Model, prompts: Prompts, head: Tokens) -> None:
    """Keys kept from a short prefix are wrong for a model that turns all its keys anew once the prompt is long."""
    switch, shared = model.rope_scaling_threshold, len(prompts.prefix) + len(head)
    longest = len(prompts.prefix) + max(map(len, prompts.queries)) + max(map(len, prompts.labels))
    if switch is not None and shared <= switch < longest:
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}) rotates all keys anew past {switch} tokens: expected demonstrations "
            f"and queries on one side of that, got {shared} tokens that the queries share and {longest} with the "
            "longest query. Use fewer demonstrations, or more"
        )


def log_probs_of(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _residual(got: Tensor, expected: Tensor) -> Tensor:
    return _largest(got - expected) / _largest(expected).clamp_min(1e-30)


def _largest(tensor: Tensor) -> Tensor:
    """The largest size of an element; NaN where there is one. Reads the tensor once and writes nothing."""
    low, high = tensor.aminmax()
    return torch.maximum(-low, high)


def _checked(model: Model, residuals: Sequence[Tensor]) -> float:
    """The largest of a pass's residuals, by layer; refused above rounding level."""
    found = torch.stack(list(residuals)).double().cpu()
    wrong = (~(found <= TOLERANCE[model.dtype])).nonzero()
    if len(wrong):
        layer = int(wrong[0])
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}), layer {layer}: attention recomputed from queries, keys and values "
            f"is off by {found[layer]:.1e} of the model's own; expected at most {TOLERANCE[model.dtype]:.0e}. Its "
            "attention does more than softmax over scaled scores (position biases, gates, a norm before W_O, a hook "
            "left on the model …) and cannot be split exactly here"
        )
    return found.max().item()


def measure_pass(model: Model, start: Tokens) -> float:
    """Hold the ΔICL pass against a plain forward pass over a short full prompt of arbitrary tokens.

    Raises:
        UnsupportedModelError: they differ beyond rounding, e.g. where a model does not take positions that jump.
    """
    room = min(model.n_ctx, model.rope_scaling_threshold or model.n_ctx) - len(start)
    n_query = min(6, max(1, room // 5))
    n_demo = min(24, room - n_query)
    drawn = torch.randint(0, model.d_vocab, (n_demo + 2 * n_query,), generator=torch.Generator().manual_seed(0))
    ids = tuple(drawn.tolist())
    queries = (ids[n_demo : n_demo + n_query], ids[n_demo + n_query :])
    prompts = Prompts(start, (ids[:n_demo],), (0,), (), queries, (ids[:1],), (0, 0))
    full_prompt: list[Tensor] = []
    model.run(
        torch.tensor([[*prompts.prefix, *query] for query in queries], device=model.device),
        on_output=lambda layer, output: full_prompt.append(output[:, -1]),
    )
    context, _ = run_prefix(model, prompts.prefix)
    outputs: list[Tensor] = [torch.zeros_like(output) for output in full_prompt]

    def keep(layer: int, output: Tensor, batch: Sequence[int], last: Tensor) -> None:
        outputs[layer][batch] = output[torch.arange(len(batch), device=last.device), last]

    for _ in run_queries(model, queries, 1, context, BatchLimit(2), on_output=keep):
        pass
    worst = 0.0
    for layer, (got, expected) in enumerate(zip(outputs, full_prompt, strict=True)):
        worst = max(worst, residual := _residual(got, expected).item())
        if not residual <= TOLERANCE[model.dtype]:
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: the pass of queries behind their prefix is off "
                f"by {residual:.1e} of a plain forward pass; expected at most {TOLERANCE[model.dtype]:.0e}. The model "
                "cannot run queries apart from their demonstrations (it may not take position_ids that jump)"
            )
    return worst
