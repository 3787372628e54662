"""Running a model over prompts with hooks on → `Capture`.

Attention over a prompt is attention over its parts, merged (`icl_dual.dual`). So the shared part runs once:

1. Start token, demonstrations and the tokens with which all queries begin (their template's) go through the model once,
   in blocks, or whole with the first query behind them where that plain pass is kept (`PlainPass`); their keys and
   values at every layer are kept.
2. The rest of each query then runs alone, at its in-context positions. At every layer the heads' output over these
   tokens is merged with attention over the kept keys and values, from the layer's own queries: one matrix product for
   the whole batch, and no key or value is copied per query. Zero-shot is the same pass behind the start token alone,
   so that in-context learning is the zero-shot pass with the demonstrations in what is merged. Of momentum, where the
   model has any, what the kept values leave is one vector a head, from which each query's sum goes on.
3. What the metrics need is kept at each row's last token: the position that predicts the label, or under the reference
   protocol the end of the label word that follows every query. Labels are read where they are predicted under both.

Nothing is taken on trust: every pass recomputes the heads' output over the tokens it runs from their queries, keys and
values and holds it against the model's own, and a model's first capture holds the whole pass against a plain forward
pass over a full prompt. A model that fails either is refused.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from icl_dual import dual
from icl_dual.models import Attention, Model, OnTensor, UnsupportedModelError
from icl_dual.momentum import decaying_sum
from icl_dual.prompts import Prompts, Tokens, refuse_unreadable

Field = Literal[
    "attn_out",
    "z",
    "q",
    "q_scored",
    "context_scores",
    "demo_scores",
    "query_scores",
    "keys_values",
    "plain",
    "next_log_probs",
]
METRIC_FIELDS: tuple[Field, ...] = ("attn_out", "q", "context_scores", "query_scores")
"""What the paper's metrics need."""
DECOMPOSE_FIELDS: tuple[Field, ...] = ("attn_out", "z", "q_scored", "keys_values", "plain")
"""What `icl_dual.decompose` needs."""

PREFIX_BLOCK = 256
"""Prefix tokens run at once: a model's own attention takes memory by their square."""

BATCH_OVERHEAD = 96
"""What a batch costs beside its tokens, in tokens: measured on a small model, where it is most."""

PART, WHOLE = "part of the demonstrations,", "prompt, run whole for the field 'plain',"
"""What a single one of does not fit in memory, as errors say it."""

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""Largest relative residual that is rounding. Rotary models take their softmax in float32 also at float64; over the
layers of a real model, bfloat16's rounding adds up to 7e-2."""


@dataclass(frozen=True, repr=False)
class KeysValues:
    """Keys (as scored) and values of the demonstrations, shared by all queries, and of each query's own tokens."""

    demo_keys: Float[Tensor, "layer demo_pos kv_head d_head"]
    """Of every prefix token past the start token: `Prompts.segments` says whose each is."""
    demo_values: Float[Tensor, "layer demo_pos kv_head d_head"]
    query_keys: Float[Tensor, "query layer own_pos kv_head d_head"]
    """Of the start token and the query's tokens, zero past the query's end."""
    query_values: Float[Tensor, "query layer own_pos kv_head d_head"]

    def __repr__(self) -> str:
        return f"KeysValues(demo_keys{list(self.demo_keys.shape)}, query_keys{list(self.query_keys.shape)}, and values)"


class PlainPass(NamedTuple):
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
        return f"PlainPass({len(self.tokens)} tokens)"


@dataclass(frozen=True)
class Capture:
    """What a model did at each query's recorded position, which the prompts' protocol says.

    Scores are scaled, before mask and softmax. Fields that were not asked for are `None`.
    """

    model: str
    fingerprint: str
    """Of the weights it was made with: another with a delta applied, or with momentum."""
    hooks: str
    """Of the hooks that others had on the model; empty where there were none."""
    prompts: Prompts
    label_log_probs: Float[Tensor, "query label"]
    """Mean log-probability per token of each label word, in nats."""
    attn_out: Float[Tensor, "query layer d_model"] | None
    """Attention output after W_O, before the residual sum."""
    z: Float[Tensor, "query layer head d_head"] | None
    """The heads' outputs before W_O, momentum in them where the model has any."""
    q: Float[Tensor, "query layer head d_head"] | None
    """Queries W_Q x, after norms and before rotation."""
    q_scored: Float[Tensor, "query layer head d_head"] | None
    """Queries as scored: after norms and rotation."""
    context_scores: Float[Tensor, "query layer prefix_pos"] | None
    """Scores over the whole prefix, start token and separators among it, summed over heads."""
    demo_scores: Float[Tensor, "query layer head demo_token"] | None
    """Scores over the demonstrations' own tokens, start token and separators left out."""
    query_scores: Float[Tensor, "query layer head query_token"] | None
    """Scores over the row's own tokens, start token left out; zero past its end, which changes no cosine."""
    keys_values: KeysValues | None
    plain: PlainPass | None
    """The plain pass over the first query's full prompt that a decomposition is held against."""
    next_log_probs: Float[Tensor, "query d_vocab"] | None
    """Log-probability in nats of every token of the vocabulary where the label is predicted."""
    residual: float
    """Largest relative difference between the recomputed attention and the model's own, over layers and batches."""

    @property
    def predictions(self) -> Int[Tensor, " query"]:
        """The label with the highest log-probability."""
        return self.label_log_probs.argmax(-1)

    @property
    def gold(self) -> Int[Tensor, " query"]:
        """The queries' label indices."""
        return torch.tensor(self.prompts.gold)

    @property
    def accuracy(self) -> float:
        """Share of queries whose predicted label is the gold one."""
        return (self.predictions == self.gold).double().mean().item()

    def axes(self, field: Field) -> dict[str, int]:
        """The names and lengths of a field's axes, in order; empty where it was not kept or is no tensor."""
        tensor = getattr(self, field)
        if not isinstance(tensor, Tensor):
            return {}
        annotation = get_args(type(self).__annotations__[field])[0]
        return dict(zip(annotation.dim_str.split(), tensor.shape, strict=True))

    def __repr__(self) -> str:
        kept = [name for name in get_args(Field) if getattr(self, name) is not None]
        axes = [" ".join(f"{axis}={n}" for axis, n in self.axes(name).items()) for name in kept]
        shapes = [f"{name}[{shape}]" if shape else name for name, shape in zip(kept, axes, strict=True)]
        return (
            f"Capture({self.model!r}, {len(self.prompts.queries)} queries after {len(self.prompts.demonstrations)} "
            f"demonstrations, accuracy={self.accuracy:.3f}, residual={self.residual:.1e}, {', '.join(shapes)})"
        )


def capture(
    model: Model,
    prompts: Prompts,
    *,
    fields: Collection[Field] = METRIC_FIELDS,
    batch_size: int = 64,
    progress: bool = True,
) -> Capture:
    """Run every query behind the shared demonstrations and keep what happens at its recorded position.

    Args:
        model: what to run; comes back as it was.
        prompts: queries with their demonstrations; `prompts.zero_shot()` for the zero-shot setting.
        fields: which of a `Capture`'s fields to keep, such as `METRIC_FIELDS` or `DECOMPOSE_FIELDS`; memory grows with
            the number of queries by these.
        batch_size: most queries to run at once; fewer where their lengths differ much, or where memory runs out.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks to rounding level.
        PromptError: the prompts are not whole, or the model cannot read them.
        MemoryError: a single query does not fit in memory, or the first one's full prompt where the field `plain` is
            asked for; says its size.
    """
    if isinstance(fields, str):
        raise ValueError(f"expected a collection of fields, such as ({fields!r},), got {fields!r}")
    if unknown := set(fields) - set(get_args(Field)):
        raise ValueError(f"expected fields out of {get_args(Field)}, got {sorted(unknown)}")
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    refuse_unreadable(model, prompts)
    head = shared_head(prompts)
    _refuse_rotation_switch(model, prompts, head)
    with torch.no_grad(), tqdm(total=len(prompts.queries), disable=not progress, unit="query", leave=False) as bar:
        if model.pass_residual is None:
            try:
                model.pass_residual = _measure_pass(model, prompts.start)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise MemoryError(f"expected memory to check {model!r} on a short prompt, got: {error}") from error
                raise UnsupportedModelError(
                    f"{model.name} ({model.architecture}, {model.dtype}): expected a model that runs with its hooks, "
                    f"got: {error}"
                ) from error
        bar.set_description(f"{len(prompts.demonstrations)} demonstrations")
        rows = [row[len(head) :] for row in prompts.rows]
        context, plain = _run_prefix(model, prompts.prefix + head, rows[0] if "plain" in fields else None)
        recorder = _Recorder(model, prompts, fields, context)
        limit = _BatchLimit(batch_size)
        single = [index for index, label in enumerate(prompts.labels) if len(label) == 1]
        log_probs = torch.zeros(len(prompts.queries), len(prompts.labels), dtype=recorder.dtype)
        for batch, logits in _run_queries(model, rows, 1, context, limit, recorder, len(prompts.appended)):
            first = [prompts.labels[label][0] for label in single]
            of_next = _log_probs(logits)[:, 0]
            log_probs[torch.tensor(batch)[:, None], torch.tensor(single, dtype=torch.long)] = of_next[:, first].cpu()
            if "next_log_probs" in recorder.kept:
                recorder.kept["next_log_probs"][batch] = of_next.cpu()
            bar.update(len(batch))
        asked = [query[len(head) :] for query in prompts.queries]
        for label in set(range(len(prompts.labels))) - set(single):
            log_probs[:, label] = _label_word_log_probs(model, asked, prompts.labels[label], context, limit)
    return recorder.capture(log_probs, plain)


def refuse_unpaired(model: Model, icl: Capture, zsl: Capture) -> None:
    """Raise a ValueError unless captures are of this model, as it is now, and of the same queries."""
    names = {"model": model.name, "icl": icl.model, "zsl": zsl.model}
    if len(set(names.values())) > 1:
        raise ValueError(f"expected captures of the model given, got {names}")
    weights = {"model": model.fingerprint(), "icl": icl.fingerprint, "zsl": zsl.fingerprint}
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"expected captures of the model as it is now, got other weights or another dtype ({weights}): was one "
            "made within `with delta.applied(model):` or `with momentum_attention(model, eta):` and the other not, or "
            "with another η?"
        )
    hooks = {"model": model.others_hooks(), "icl": icl.hooks, "zsl": zsl.hooks}
    if len(set(hooks.values())) > 1:
        raise ValueError(
            f"expected captures with the hooks that are on the model now, got others ({hooks}; empty: none): capture "
            "and decompose all with your own hooks on, or all without"
        )
    if zsl.prompts.demonstrations:
        raise ValueError(
            f"expected zsl to be without demonstrations, got {zsl.prompts}: are icl and zsl swapped? Capture zsl with "
            "prompts.zero_shot()"
        )
    if zsl.prompts != icl.prompts.zero_shot():
        raise ValueError(
            "expected captures of the same queries at the same positions: zsl of icl's prompts.zero_shot(), got "
            f"{icl.prompts} and {zsl.prompts}, which differ"
        )


@dataclass(frozen=True)
class _Context:
    """The tokens before the rows that run, as every row meets them: keys, values and state of momentum by layer."""

    keys: list[Float[Tensor, "pos kv_head d_head"]]
    values: list[Float[Tensor, "pos kv_head d_head"]]
    states: list[Float[Tensor, "head d_head"] | None]
    residual: float

    @property
    def n_pos(self) -> int:
        return len(self.keys[0])

    def attend(self, scoring: dual.Scoring, layer: int, q: Tensor, positions: Int[Tensor, "1 pos"]) -> dual.Part:
        """A batch's attention over the context: its rows, stacked, share one matrix product."""
        batch, n_pos = q.shape[:2]
        z, lse = scoring.attend(
            q.reshape(1, batch * n_pos, *q.shape[2:]),
            self.keys[layer][None],
            self.values[layer][None],
            positions.repeat(1, batch),
            torch.arange(self.n_pos)[None],
        )
        return dual.Part(z.reshape(q.shape), lse.reshape(q.shape[:-1]))

    def with_block(self, block: "_Context") -> "_Context":
        """The context with more tokens behind it, which ran behind it."""
        keys = [torch.cat(pair) for pair in zip(self.keys, block.keys, strict=True)]
        values = [torch.cat(pair) for pair in zip(self.values, block.values, strict=True)]
        return _Context(keys, values, block.states, max(self.residual, block.residual))


def _no_context(model: Model) -> _Context:
    empty = torch.zeros(0, model.n_key_value_heads, model.d_head, device=model.device, dtype=model.dtype)
    return _Context([empty] * model.n_layers, [empty] * model.n_layers, [None] * model.n_layers, 0.0)


@dataclass
class _BatchLimit:
    """The most queries to run at once, which a capture learns as it goes."""

    n: int
    said: bool = False

    def halve(self, n_queries: int, n_tokens: int) -> None:
        self.n = (n_queries + 1) // 2
        if not self.said:
            fits = "%d queries of %d tokens do not fit in memory at once: running %d, and fewer where these do not fit"
            log.warning(fits, n_queries, n_tokens, self.n)
        self.said = True


def _run_prefix(model: Model, prefix: Tokens, row: Tokens | None = None) -> tuple[_Context, PlainPass | None]:
    """Pass what the queries share once: in blocks that each run behind the ones before, or whole with a row behind it.

    Causality keeps the row out of its prefix, so that one pass serves as context and as a plain pass.
    """
    context = _no_context(model)
    if row is not None or (prefix and model.rotation_switch is not None):
        # Long-context scaling turns keys by the length of what runs: there, the prefix runs whole.
        return _run_whole(model, prefix, row, context)
    block = PREFIX_BLOCK
    while context.n_pos < len(prefix):
        first = context.n_pos
        tokens = torch.tensor([prefix[first : first + block]], device=model.device)
        kept = _Context([], [], [], 0.0)

        def show(layer: int, attention: Attention, kept: _Context = kept) -> None:
            kept.keys.append(attention.k[0])
            kept.values.append(attention.v[0])
            kept.states.append(None if attention.momentum is None else attention.momentum.state[0])

        try:
            _, residual = _run_behind(model, context, tokens, torch.zeros_like(tokens[:, :1]), show)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if block == 1:
                raise _does_not_fit(model, PART, tokens, context, error) from error
            block = (block + 1) // 2
            continue
        context = context.with_block(replace(kept, residual=residual))
    return context, None


def _run_whole(model: Model, prefix: Tokens, row: Tokens | None, before: _Context) -> tuple[_Context, PlainPass | None]:
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
        if out_of_memory(error):
            raise _does_not_fit(model, WHOLE if row else PART, tokens, before, error) from error
        raise
    q, k, v = zip(*seen, strict=True)
    context = _Context([keys[:n] for keys in k], [values[:n] for values in v], states, residual)
    if row is None:
        return context, None
    dtype = torch.promote_types(model.dtype, torch.float32)
    return context, PlainPass(prefix + row, *(torch.stack(found).to("cpu", dtype) for found in (q, k, v, attn_out)))


def _run_behind(
    model: Model,
    context: _Context,
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
        scoring, (q, k, v, z, *_) = model.scoring[layer], attention
        if not context.n_pos:  # nothing to merge: the last row, which sees all, is enough to check
            last = scoring.with_sink(scoring.attend(q[:, -1:], k, v, positions[:, -1:], positions))
            residuals.append(_residual(last.z, z[:, -1:]))
            show(layer, attention)
            return None
        own = scoring.with_sink(scoring.attend(q, k, v, positions, positions))
        residuals.append(_residual(own.z, z))
        z = dual.merge(own, context.attend(scoring, layer, q, positions)).z
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


class _Recorder:
    """Keeps the asked-for fields of every query at its recorded position."""

    def __init__(self, model: Model, prompts: Prompts, fields: Collection[Field], context: _Context) -> None:
        self.model, self.prompts, self.context, self.fields = model, prompts, context, fields
        self.residual = context.residual
        n_prefix = len(prompts.prefix)
        self.n_head = context.n_pos - n_prefix
        self.n_shared = len(prompts.start) + self.n_head
        shown = prompts.demonstration_positions.to(model.device)
        self.shown_keys = [keys[shown] for keys in context.keys] if "demo_scores" in fields else []
        n_queries, n_layers, n_heads = len(prompts.queries), model.n_layers, model.n_heads
        longest = max(map(len, prompts.rows))
        own = (n_queries, n_layers, len(prompts.start) + longest, model.n_key_value_heads, model.d_head)
        shapes = {
            "attn_out": (n_queries, n_layers, model.d_model),
            "z": (n_queries, n_layers, n_heads, model.d_head),
            "q": (n_queries, n_layers, n_heads, model.d_head),
            "q_scored": (n_queries, n_layers, n_heads, model.d_head),
            "context_scores": (n_queries, n_layers, n_prefix),
            "demo_scores": (n_queries, n_layers, n_heads, len(shown)),
            "query_scores": (n_queries, n_layers, n_heads, longest),
            "next_log_probs": (n_queries, model.d_vocab),
        }
        self.dtype = dtype = torch.promote_types(model.dtype, torch.float32)
        self.kept = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items() if name in fields}
        if "keys_values" in fields:
            self.kept |= {name: torch.zeros(own, dtype=dtype) for name in ("query_keys", "query_values")}

    def on_attention(self, layer: int, attention: Attention, batch: Sequence[int], last: Int[Tensor, " batch"]) -> None:
        """Keep a layer's attention."""
        kept = self.kept
        rows = torch.arange(len(batch), device=last.device)
        z = attention.output if "z" in kept else attention.z
        for name, tensor in (("z", z), ("q", attention.q_content), ("q_scored", attention.q)):
            if name in kept:
                kept[name][batch, layer] = tensor[rows, last].to(kept[name])
        n_pos = attention.k.shape[1]
        past_end = torch.arange(n_pos, device=last.device) > last[:, None]
        self._keep_scores(layer, attention.q[rows, last], attention.k, batch, past_end)
        if "query_keys" in kept:
            for name, tensor in (("query_keys", attention.k), ("query_values", attention.v)):
                own = tensor.masked_fill(past_end[..., None, None], 0.0).to(kept[name])
                kept[name][batch, layer, self.n_shared : self.n_shared + n_pos] = own

    def _keep_scores(
        self,
        layer: int,
        q: Float[Tensor, "batch head d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        batch: Sequence[int],
        past_end: Bool[Tensor, "batch pos"],
    ) -> None:
        """Keep the recorded rows' scores over the context, and over the tokens that ran."""
        kept, (scale, softcap, *_) = self.kept, self.model.scoring[layer]
        keys, n_prefix = self.context.keys[layer], len(self.prompts.prefix)
        if "context_scores" in kept:
            kept["context_scores"][batch, layer] = dual.summed_scores(q, keys[:n_prefix], scale, softcap).cpu()
        if "demo_scores" in kept:
            found = dual.shared_scores(q, self.shown_keys[layer], scale, softcap)
            kept["demo_scores"][batch, layer] = found.transpose(0, 1).cpu()
        if "query_scores" in kept:
            own = dual.scores(q.unsqueeze(1), k, scale, softcap).flatten(1, 2).masked_fill(past_end[:, None], 0.0)
            head = dual.shared_scores(q, keys[n_prefix:], scale, softcap).transpose(0, 1)
            found = torch.cat((head, own), dim=-1)
            kept["query_scores"][batch, layer, :, : found.shape[-1]] = found.cpu()

    def on_output(
        self, layer: int, output: Float[Tensor, "batch pos d_model"], batch: Sequence[int], last: Int[Tensor, " batch"]
    ) -> None:
        if "attn_out" in self.kept:
            rows = torch.arange(len(batch), device=last.device)
            self.kept["attn_out"][batch, layer] = output[rows, last].to(self.kept["attn_out"])

    def capture(self, log_probs: Float[Tensor, "query label"], plain: PlainPass | None) -> Capture:
        found: dict[str, Any] = {name: self.kept.get(name) for name in get_args(Field)}
        found["keys_values"] = self._keys_values() if "keys_values" in self.fields else None
        found["plain"] = plain
        return Capture(
            model=self.model.name,
            fingerprint=self.model.fingerprint(),
            hooks=self.model.others_hooks(),
            prompts=self.prompts,
            label_log_probs=log_probs,
            residual=self.residual,
            **found,
        )

    def _keys_values(self) -> KeysValues:
        n_start, n_prefix = len(self.prompts.start), len(self.prompts.prefix)
        query_keys, query_values = self.kept["query_keys"], self.kept["query_values"]
        keys, values = (torch.stack(found).to("cpu", self.dtype) for found in (self.context.keys, self.context.values))
        for shared, own in ((keys, query_keys), (values, query_values)):
            own[:, :, : self.n_shared] = torch.cat((shared[:, :n_start], shared[:, n_prefix:]), dim=1)
        demos = slice(n_start, n_prefix)
        return KeysValues(keys[:, demos].clone(), values[:, demos].clone(), query_keys, query_values)


def _run_queries(
    model: Model,
    rows: Sequence[Tokens],
    n_read: int,
    context: _Context,
    limit: _BatchLimit,
    recorder: _Recorder | None = None,
    n_after: int = 0,
) -> Iterator[tuple[list[int], Float[Tensor, "batch n_read d_vocab"]]]:
    """Run rows behind the context, in batches padded on the right (causality keeps that exact).

    A batch that does not fit in memory is halved, and so are those after it. Yields each batch's row indices and the
    logits at the last `n_read` tokens of its rows before the last `n_after`.
    """
    waiting = deque(batches(list(map(len, rows)), limit.n))
    while waiting:
        batch = waiting.popleft()
        longest = max(len(rows[row]) for row in batch)
        tokens = torch.tensor([[*rows[row], *[0] * (longest - len(rows[row]))] for row in batch], device=model.device)
        last = torch.tensor([len(rows[row]) - 1 for row in batch], device=model.device)
        read = last[:, None] - n_after - torch.arange(n_read - 1, -1, -1, device=model.device)

        def show(layer: int, attention: Attention, batch: list[int] = batch, last: Tensor = last) -> None:
            if recorder is not None:
                recorder.on_attention(layer, attention, batch, last)

        def on_output(layer: int, output: Tensor, batch: list[int] = batch, last: Tensor = last) -> None:
            if recorder is not None:
                recorder.on_output(layer, output, batch, last)

        try:
            logits, residual = _run_behind(model, context, tokens, read, show, on_output)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise _does_not_fit(model, "query,", tokens, context, error) from error
        else:
            if recorder is not None:
                recorder.residual = max(recorder.residual, residual)
            yield batch, logits
            continue
        # Out of the handler, whose traceback holds on to the memory of what failed.
        limit.halve(len(batch), longest)
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


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has a type for this on some accelerators; elsewhere it is the words that tell."""
    said = (
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "out of memory",
        "cublas_status_alloc_failed",
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error).lower() for words in said)


def _does_not_fit(
    model: Model, what: str, tokens: Int[Tensor, "1 pos"], context: _Context, error: Exception
) -> MemoryError:
    return MemoryError(
        f"expected memory for a single {what} {tokens.shape[1]} tokens behind {context.n_pos} tokens in {model!r}, "
        f"got: {error}. Use fewer or shorter demonstrations, a smaller model or half precision"
    )


def _label_word_log_probs(
    model: Model, queries: Sequence[Tokens], label: Tokens, context: _Context, limit: _BatchLimit
) -> Float[Tensor, " query"]:
    """Mean log-probability per token of a label word of several tokens, each read after the ones before it."""
    rows = [query + label[:-1] for query in queries]
    means = torch.zeros(len(rows), dtype=torch.promote_types(model.dtype, torch.float32))
    target = torch.tensor(label, device=model.device)
    for batch, logits in _run_queries(model, rows, len(label), context, limit):
        log_probs = _log_probs(logits)
        means[batch] = log_probs.gather(-1, target.expand(len(batch), -1)[..., None]).squeeze(-1).mean(-1).cpu()
    return means


def shared_head(prompts: Prompts) -> Tokens:
    """The tokens with which all queries begin, up to the recorded position, which stays each query's own."""
    first, last = min(prompts.queries), max(prompts.queries)  # in dictionary order: what these share, all do
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))
    return tuple(token for token, _ in same)


def _refuse_rotation_switch(model: Model, prompts: Prompts, head: Tokens) -> None:
    """Keys kept from a short prefix are wrong for a model that turns all its keys anew once the prompt is long."""
    switch, shared = model.rotation_switch, len(prompts.prefix) + len(head)
    longest = len(prompts.prefix) + max(map(len, prompts.queries)) + max(map(len, prompts.labels))
    if switch is not None and shared <= switch < longest:
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}) rotates all keys anew past {switch} tokens: expected demonstrations "
            f"and queries on one side of that, got {shared} tokens that the queries share and {longest} with the "
            "longest query. Use fewer demonstrations, or more"
        )


def _log_probs(logits: Tensor) -> Tensor:
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


def _measure_pass(model: Model, start: Tokens) -> float:
    """Hold the ΔICL pass against a plain forward pass over a short full prompt of arbitrary tokens.

    Raises:
        UnsupportedModelError: they differ beyond rounding, e.g. where a model does not take positions that jump.
    """
    room = min(model.n_ctx, model.rotation_switch or model.n_ctx) - len(start)
    n_query = min(6, max(1, room // 5))
    n_demo = min(24, room - n_query)
    drawn = torch.randint(0, model.d_vocab, (n_demo + 2 * n_query,), generator=torch.Generator().manual_seed(0))
    ids = tuple(drawn.tolist())
    queries = (ids[n_demo : n_demo + n_query], ids[n_demo + n_query :])
    prompts = Prompts(start, (ids[:n_demo],), (0,), (), queries, (ids[:1],), (0, 0))
    plain: list[Tensor] = []
    model.run(
        torch.tensor([[*prompts.prefix, *query] for query in queries], device=model.device),
        on_output=lambda layer, output: plain.append(output[:, -1]),
    )
    context, _ = _run_prefix(model, prompts.prefix)
    recorder = _Recorder(model, prompts, ("attn_out",), context)
    list(_run_queries(model, queries, 1, context, _BatchLimit(2), recorder))
    worst = 0.0
    for layer, expected in enumerate(plain):
        got = recorder.kept["attn_out"][:, layer].to(expected)
        worst = max(worst, residual := _residual(got, expected).item())
        if not residual <= TOLERANCE[model.dtype]:
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: the pass of queries behind their prefix is off "
                f"by {residual:.1e} of a plain forward pass; expected at most {TOLERANCE[model.dtype]:.0e}. The model "
                "cannot run queries apart from their demonstrations (it may not take position_ids that jump)"
            )
    return worst
