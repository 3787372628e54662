"""Running a model over prompts with hooks on → `Capture`.

In-context learning is run as what it is: the zero-shot pass plus ΔICL.

1. The demonstrations go through the model once; their keys and values at every layer are kept.
2. Each query then runs alone, behind its start token, at its in-context positions. At every layer, past the start
   token, the heads' output z_0 becomes z_0 + w (z_demo − z_0), from the layer's own queries and the kept keys and
   values (`icl_dual.dual`). No key or value is copied per query.
3. What the metrics need is kept at each query's last token, the position that predicts the label.

Nothing is taken on trust: every pass recomputes the heads' z_0 from queries, keys and values and holds it against the
model's own, and a model's first capture holds the whole pass against a plain forward pass over a full prompt. A model
that fails either is refused.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from icl_dual import dual
from icl_dual.models import Attention, Model, UnsupportedModelError
from icl_dual.prompts import Prompts, Tokens

Field = Literal["attn_out", "z", "q", "q_scored", "demo_scores", "query_scores", "keys_values"]
METRIC_FIELDS: tuple[Field, ...] = ("attn_out", "q", "demo_scores", "query_scores")
"""What the paper's metrics need."""
DECOMPOSE_FIELDS: tuple[Field, ...] = ("attn_out", "z", "q_scored", "keys_values")
"""What `icl_dual.decompose` needs."""

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


@dataclass(frozen=True)
class Capture:
    """What a model did at each query's recorded position, the one that predicts the label.

    Scores are scaled, before mask and softmax. Fields that were not asked for are `None`.
    """

    model: str
    fingerprint: str
    """Of the weights it was made with: another with a delta applied."""
    prompts: Prompts
    label_log_probs: Float[Tensor, "query label"]
    """Mean log-probability per token of each label word, in nats."""
    attn_out: Float[Tensor, "query layer d_model"] | None
    """Attention output after W_O, before the residual sum."""
    z: Float[Tensor, "query layer head d_head"] | None
    """The heads' outputs before W_O."""
    q: Float[Tensor, "query layer head d_head"] | None
    """Queries W_Q x, after norms and before rotation."""
    q_scored: Float[Tensor, "query layer head d_head"] | None
    """Queries as scored: after norms and rotation."""
    demo_scores: Float[Tensor, "query layer head demo_token"] | None
    """Scores over the demonstrations' own tokens, start token and separators left out."""
    query_scores: Float[Tensor, "query layer head query_token"] | None
    """Scores over the query's own tokens, start token left out; zero past its end, which changes no cosine."""
    keys_values: KeysValues | None
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
    batch_size: int = 16,
    progress: bool = True,
) -> Capture:
    """Run every query behind the shared demonstrations and keep what happens at its last token.

    Args:
        model: what to run; comes back as it was.
        prompts: queries with their demonstrations; `prompts.zero_shot()` for the zero-shot setting.
        fields: which tensors to keep; memory grows with the number of queries only by these.
        batch_size: queries run at once.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks to rounding level.
    """
    unknown = set(fields) - set(get_args(Field))
    if unknown:
        raise ValueError(f"expected fields out of {get_args(Field)}, got {sorted(unknown)}")
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    _refuse_rotation_switch(model, prompts)
    with torch.no_grad(), tqdm(total=len(prompts.queries), disable=not progress, unit="query", leave=False) as bar:
        if model.pass_residual is None:
            try:
                model.pass_residual = _measure_pass(model)
            except RuntimeError as error:
                raise UnsupportedModelError(
                    f"{model.name} ({model.architecture}, {model.dtype}): expected a model that runs on its bridge, "
                    f"got: {error}"
                ) from error
        bar.set_description(f"{len(prompts.demonstrations)} demonstrations")
        prefix = _run_prefix(model, prompts)
        recorder = _Recorder(model, prompts, fields, prefix)
        single = [index for index, label in enumerate(prompts.labels) if len(label) == 1]
        log_probs = torch.zeros(len(prompts.queries), len(prompts.labels), dtype=recorder.dtype)
        for batch, logits in _run_queries(model, prompts.start, prompts.queries, 1, prefix, batch_size, recorder):
            first = [prompts.labels[label][0] for label in single]
            log_probs[torch.tensor(batch)[:, None], torch.tensor(single, dtype=torch.long)] = _log_probs(logits)[
                :, 0, first
            ].cpu()
            bar.update(len(batch))
        for label in set(range(len(prompts.labels))) - set(single):
            log_probs[:, label] = _label_word_log_probs(model, prompts, prompts.labels[label], prefix, batch_size)
    return recorder.capture(log_probs)


def refuse_unpaired(model: Model, icl: Capture, zsl: Capture) -> None:
    """Raise a ValueError unless captures are of this model, as it is now, and of the same queries."""
    names = {"model": model.name, "icl": icl.model, "zsl": zsl.model}
    if len(set(names.values())) > 1:
        raise ValueError(f"expected captures of the model given, got {names}")
    weights = {"model": model.fingerprint(), "icl": icl.fingerprint, "zsl": zsl.fingerprint}
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"expected captures of the model as it is now, got other weights or another dtype ({weights}): was one "
            "made within `with delta.applied(model):` and the other not?"
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
class _Prefix:
    """The demonstrations as every query meets them: their keys and values by layer, and how far they reach."""

    keys: list[Float[Tensor, "demo_pos kv_head d_head"]]
    values: list[Float[Tensor, "demo_pos kv_head d_head"]]
    positions: Int[Tensor, " demo_pos"]
    n_start: int
    residual: float


def _run_prefix(model: Model, prompts: Prompts) -> _Prefix | None:
    """Pass start token and demonstrations once; nothing to do without demonstrations."""
    if not prompts.demonstrations:
        return None
    tokens = torch.tensor([prompts.prefix], device=model.device)
    n_start, n_pos = len(prompts.start), tokens.shape[1]
    positions = torch.arange(n_pos, device=model.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    residuals: list[float] = []

    def on_attention(layer: int, attention: Attention) -> None:
        keys.append(attention.k[0, n_start:])
        values.append(attention.v[0, n_start:])
        scoring, at = model.scoring[layer], positions[None]
        last = scoring.with_sink(scoring.attend(attention.q[:, -1:], attention.k, attention.v, at[:, -1:], at))
        residuals.append(_checked(model, layer, last.z, attention.z[:, -1:]))

    model.run(tokens, read=positions[None, -1:], on_attention=on_attention)
    return _Prefix(keys, values, positions[n_start:], n_start, max(residuals))


class _QueryPass:
    """What happens at every layer of a batch of queries: attention recomputed, checked, and ΔICL added."""

    def __init__(self, model: Model, positions: Int[Tensor, " pos"], prefix: _Prefix | None) -> None:
        self.model = model
        self.positions = positions
        self.prefix = prefix
        self.residual = 0.0

    def on_attention(self, layer: int, attention: Attention) -> Tensor | None:
        scoring = self.model.scoring[layer]
        index = torch.arange(len(self.positions), device=self.positions.device)
        # The model itself knows distances only by the tokens it is given: it is checked as such, and where scores or
        # masks depend on the distance across the demonstrations, z_0 is done again.
        z_0 = self._own(attention, layer, index)
        self.residual = max(self.residual, _checked(self.model, layer, z_0.z, attention.z))
        if self.prefix is None:
            return None
        if scoring.by_position:
            z_0 = self._own(attention, layer, self.positions)
        n_start = self.prefix.n_start
        z_0_past = dual.Part(z_0.z[:, n_start:], z_0.lse[:, n_start:])
        added = dual.delta_icl(z_0_past, self._demonstrations(attention, layer))
        return torch.cat((z_0.z[:, :n_start], z_0_past.z + added), dim=1)

    def _own(self, attention: Attention, layer: int, positions: Int[Tensor, " pos"]) -> dual.Part:
        """Attention over everything but the demonstrations: the query's own prompt, and the sink."""
        scoring, at = self.model.scoring[layer], positions[None]
        return scoring.with_sink(scoring.attend(attention.q, attention.k, attention.v, at, at))

    def _demonstrations(self, attention: Attention, layer: int) -> dual.Part:
        """Attention over the shared demonstrations: one matrix product for the whole batch, whose rows are stacked."""
        assert self.prefix is not None
        q = attention.q[:, self.prefix.n_start :]
        batch, n_pos = q.shape[:2]
        z, lse = self.model.scoring[layer].attend(
            q.reshape(1, batch * n_pos, *q.shape[2:]),
            self.prefix.keys[layer][None],
            self.prefix.values[layer][None],
            self.positions[self.prefix.n_start :].repeat(batch)[None],
            self.prefix.positions[None],
        )
        return dual.Part(z.view(q.shape), lse.view(q.shape[:-1]))


class _Recorder:
    """Keeps the asked-for fields of every query at its recorded position."""

    def __init__(self, model: Model, prompts: Prompts, fields: Collection[Field], prefix: _Prefix | None) -> None:
        self.model, self.prompts, self.prefix = model, prompts, prefix
        self.residual = 0.0 if prefix is None else prefix.residual
        self.n_start = len(prompts.start)
        n_queries, n_layers, n_heads = len(prompts.queries), model.n_layers, model.n_heads
        longest = max(map(len, prompts.queries))
        self.demo_tokens = (prompts.demonstration_positions - self.n_start).to(model.device)
        own = (n_queries, n_layers, self.n_start + longest, model.n_key_value_heads, model.d_head)
        shapes = {
            "attn_out": (n_queries, n_layers, model.d_model),
            "z": (n_queries, n_layers, n_heads, model.d_head),
            "q": (n_queries, n_layers, n_heads, model.d_head),
            "q_scored": (n_queries, n_layers, n_heads, model.d_head),
            "demo_scores": (n_queries, n_layers, n_heads, len(self.demo_tokens)),
            "query_scores": (n_queries, n_layers, n_heads, longest),
        }
        self.dtype = dtype = torch.promote_types(model.dtype, torch.float32)
        self.kept = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items() if name in fields}
        if "keys_values" in fields:
            self.kept |= {name: torch.zeros(own, dtype=dtype) for name in ("query_keys", "query_values")}

    def on_attention(self, layer: int, attention: Attention, batch: Sequence[int], last: Int[Tensor, " batch"]) -> None:
        """Keep a layer's attention, whose z is the in-context one, that replaces the model's own."""
        kept, scoring = self.kept, self.model.scoring[layer]
        rows = torch.arange(len(batch), device=last.device)
        for name, tensor in (("z", attention.z), ("q", attention.q_content), ("q_scored", attention.q)):
            if name in kept:
                kept[name][batch, layer] = tensor[rows, last].to(kept[name])
        q = attention.q[rows, last].unsqueeze(1)
        if "demo_scores" in kept and self.prefix is not None:
            keys = self.prefix.keys[layer][self.demo_tokens][None].expand(len(batch), -1, -1, -1)
            found = dual.scores(q, keys, scoring.scale, scoring.softcap).flatten(1, 2)
            kept["demo_scores"][batch, layer] = found.to(kept["demo_scores"])
        if "query_scores" in kept:
            found = dual.scores(q, attention.k[:, self.n_start :], scoring.scale, scoring.softcap).flatten(1, 2)
            past_end = torch.arange(found.shape[-1], device=last.device) > (last - self.n_start)[:, None]
            found = found.masked_fill(past_end[:, None], 0.0)
            kept["query_scores"][batch, layer, :, : found.shape[-1]] = found.to(kept["query_scores"])
        if "query_keys" in kept:
            n_pos = attention.k.shape[1]
            past_end = (torch.arange(n_pos, device=last.device) > last[:, None])[..., None, None]
            for name, tensor in (("query_keys", attention.k), ("query_values", attention.v)):
                kept[name][batch, layer, :n_pos] = tensor.masked_fill(past_end, 0.0).to(kept[name])

    def on_output(
        self, layer: int, output: Float[Tensor, "batch pos d_model"], batch: Sequence[int], last: Int[Tensor, " batch"]
    ) -> None:
        if "attn_out" in self.kept:
            rows = torch.arange(len(batch), device=last.device)
            self.kept["attn_out"][batch, layer] = output[rows, last].to(self.kept["attn_out"])

    def capture(self, log_probs: Float[Tensor, "query label"]) -> Capture:
        kept = self.kept
        keys_values = None
        if "query_keys" in kept:
            keys_values = KeysValues(*self._demo_keys_values(), kept["query_keys"], kept["query_values"])
        return Capture(
            model=self.model.name,
            fingerprint=self.model.fingerprint(),
            prompts=self.prompts,
            label_log_probs=log_probs,
            attn_out=kept.get("attn_out"),
            z=kept.get("z"),
            q=kept.get("q"),
            q_scored=kept.get("q_scored"),
            demo_scores=kept.get("demo_scores"),
            query_scores=kept.get("query_scores"),
            keys_values=keys_values,
            residual=self.residual,
        )

    def _demo_keys_values(self) -> tuple[Tensor, Tensor]:
        model, dtype = self.model, self.kept["query_keys"].dtype
        if self.prefix is None:
            empty = torch.zeros(model.n_layers, 0, model.n_key_value_heads, model.d_head, dtype=dtype)
            return empty, empty.clone()
        return torch.stack(self.prefix.keys).to("cpu", dtype), torch.stack(self.prefix.values).to("cpu", dtype)


def _run_queries(
    model: Model,
    start: Tokens,
    rows: Sequence[Tokens],
    n_read: int,
    prefix: _Prefix | None,
    batch_size: int,
    recorder: _Recorder | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "batch n_read d_vocab"]]]:
    """Run rows behind the start token, shortest first, in batches padded on the right (causality keeps that exact).

    Yields each batch's row indices and the logits at its rows' last `n_read` tokens.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    offset = 0 if prefix is None else len(prefix.positions)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        longest = max(len(rows[row]) for row in batch)
        padded = [[*start, *rows[row], *[0] * (longest - len(rows[row]))] for row in batch]
        tokens = torch.tensor(padded, device=model.device)
        last = torch.tensor([len(start) + len(rows[row]) - 1 for row in batch], device=model.device)
        positions = torch.arange(tokens.shape[1], device=model.device)
        positions[len(start) :] += offset
        query_pass = _QueryPass(model, positions, prefix)

        def on_attention(
            layer: int, attention: Attention, batch: list[int] = batch, last: Tensor = last, at: _QueryPass = query_pass
        ) -> Tensor | None:
            replaced = at.on_attention(layer, attention)
            if recorder is not None:
                shown = attention if replaced is None else attention._replace(z=replaced)
                recorder.on_attention(layer, shown, batch, last)
            return replaced

        def on_output(layer: int, output: Tensor, batch: list[int] = batch, last: Tensor = last) -> None:
            if recorder is not None:
                recorder.on_output(layer, output, batch, last)

        read = last[:, None] - torch.arange(n_read - 1, -1, -1, device=model.device)
        logits = model.run(tokens, positions=positions, read=read, on_attention=on_attention, on_output=on_output)
        if recorder is not None:
            recorder.residual = max(recorder.residual, query_pass.residual)
        yield batch, logits


def _label_word_log_probs(
    model: Model, prompts: Prompts, label: Tokens, prefix: _Prefix | None, batch_size: int
) -> Float[Tensor, " query"]:
    """Mean log-probability per token of a label word of several tokens, each read after the ones before it."""
    rows = [query + label[:-1] for query in prompts.queries]
    means = torch.zeros(len(rows), dtype=torch.promote_types(model.dtype, torch.float32))
    target = torch.tensor(label, device=model.device)
    for batch, logits in _run_queries(model, prompts.start, rows, len(label), prefix, batch_size):
        log_probs = _log_probs(logits)
        means[batch] = log_probs.gather(-1, target.expand(len(batch), -1)[..., None]).squeeze(-1).mean(-1).cpu()
    return means


def _refuse_rotation_switch(model: Model, prompts: Prompts) -> None:
    """Keys kept from a short prefix are wrong for a model that turns all its keys anew once the prompt is long."""
    switch, prefix = model.rotation_switch, len(prompts.prefix)
    longest = prefix + max(map(len, prompts.queries)) + max(map(len, prompts.labels))
    if prompts.demonstrations and switch is not None and prefix <= switch < longest:
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}) rotates all keys anew past {switch} tokens: expected demonstrations "
            f"and queries on one side of that, got {prefix} tokens of demonstrations and {longest} with the longest "
            "query. Use fewer demonstrations, or more"
        )


def _log_probs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def _checked(model: Model, layer: int, z: Tensor, model_z: Tensor) -> float:
    """The recomputed heads' relative difference from the model's own; refused above rounding level."""
    residual = _relative(z, model_z)
    if not residual <= TOLERANCE[model.dtype]:
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}), layer {layer}: attention recomputed from queries, keys and values "
            f"is off by {residual:.1e} of the model's own; expected at most {TOLERANCE[model.dtype]:.0e}. Its "
            "attention does more than softmax over scaled scores (position biases, sinks, gates, a norm before W_O …) "
            "and cannot be split exactly here"
        )
    return residual


def _measure_pass(model: Model) -> float:
    """Hold the ΔICL pass against a plain forward pass over a short full prompt of arbitrary tokens.

    Raises:
        UnsupportedModelError: they differ beyond rounding, e.g. where a model does not take positions that jump.
    """
    n_demo, n_query = 24, 6
    drawn = torch.randint(0, model.d_vocab, (n_demo + 2 * n_query,), generator=torch.Generator().manual_seed(0))
    ids = tuple(drawn.tolist())
    queries = (ids[n_demo : n_demo + n_query], ids[n_demo + n_query :])
    prompts = Prompts(tuple(model.start_tokens), (ids[:n_demo],), (0,), (), queries, (ids[:1],), (0, 0))
    plain: list[Tensor] = []
    model.run(
        torch.tensor([[*prompts.prefix, *query] for query in queries], device=model.device),
        on_output=lambda layer, output: plain.append(output[:, -1]),
    )
    recorder = _Recorder(model, prompts, ("attn_out",), prefix := _run_prefix(model, prompts))
    list(_run_queries(model, prompts.start, queries, 1, prefix, 2, recorder))
    worst = 0.0
    for layer, expected in enumerate(plain):
        got = recorder.kept["attn_out"][:, layer].to(expected)
        worst = max(worst, residual := _relative(got, expected))
        if not residual <= TOLERANCE[model.dtype]:
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: the zero-shot pass with ΔICL added is off by "
                f"{residual:.1e} of a plain forward pass; expected at most {TOLERANCE[model.dtype]:.0e}. The model "
                "cannot run queries apart from their demonstrations (it may not take position_ids that jump)"
            )
    return worst
