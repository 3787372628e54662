"""Running a model over prompts with hooks on → `Capture`.

Attention over a prompt is attention over its parts, merged (`icl_dual.dual`). So the shared part runs once:

1. Start token, demonstrations and the tokens with which all queries begin (their template's) go through the model once,
   in blocks, or whole with the first query behind them where that plain pass is kept (`FullPromptPass`); their keys and
   values at every layer are kept.
2. The rest of each query then runs alone, at its in-context positions. At every layer the heads' output over these
   tokens is merged with attention over the kept keys and values, from the layer's own queries: one matrix product for
   the whole batch, and no key or value is copied per query. Zero-shot is the same pass behind the start token alone,
   so that in-context learning is the zero-shot pass with the demonstrations in what is merged. Of momentum, where the
   model has any, what the kept values leave is one vector a head, from which each query's sum goes on.
3. What the metrics need is kept at each row's last token: the position that predicts the label, or under the reference
   protocol the end of the label word that follows every query. Labels are read where they are predicted under both.

Nothing is taken on trust: every pass recomputes the heads' output over the tokens it runs from their queries, keys and
values and holds it against the model's own, and a model's first capture holds the whole pass against a full_prompt forward
pass over a full prompt. A model that fails either is refused.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from icl_dual import dual
from icl_dual.captures.shared_prefix import (
    BatchLimit,
    FullPromptPass,
    PrefixCache,
    check_rope_scaling,
    label_word_log_probs,
    log_probs_of,
    measure_pass,
    run_prefix,
    run_queries,
    shared_head,
)
from icl_dual.models import Attention, Model, UnsupportedModelError
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.torch_utils import is_out_of_memory

Field = Literal[
    "attn_out",
    "z",
    "q",
    "q_scored",
    "context_scores",
    "demo_scores",
    "query_scores",
    "keys_values",
    "full_prompt",
    "next_log_probs",
]
METRIC_FIELDS: tuple[Field, ...] = ("attn_out", "q", "context_scores", "query_scores")
"""What the paper's metrics need."""
DECOMPOSE_FIELDS: tuple[Field, ...] = ("attn_out", "z", "q_scored", "keys_values", "full_prompt")
"""What `icl_dual.decompose` needs."""


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
    full_prompt: FullPromptPass | None
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
        MemoryError: a single query does not fit in memory, or the first one's full prompt where the field `full_prompt` is
            asked for; says its size.
    """
    if isinstance(fields, str):
        raise ValueError(f"expected a collection of fields, such as ({fields!r},), got {fields!r}")
    if unknown := set(fields) - set(get_args(Field)):
        raise ValueError(f"expected fields out of {get_args(Field)}, got {sorted(unknown)}")
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    check_prompts(model, prompts)
    head = shared_head(prompts)
    check_rope_scaling(model, prompts, head)
    with torch.no_grad(), tqdm(total=len(prompts.queries), disable=not progress, unit="query", leave=False) as bar:
        if model.pass_residual is None:
            try:
                model.pass_residual = measure_pass(model, prompts.start)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise MemoryError(f"expected memory to check {model!r} on a short prompt, got: {error}") from error
                raise UnsupportedModelError(
                    f"{model.name} ({model.architecture}, {model.dtype}): expected a model that runs with its hooks, "
                    f"got: {error}"
                ) from error
        bar.set_description(f"{len(prompts.demonstrations)} demonstrations")
        rows = [row[len(head) :] for row in prompts.suffixes]
        context, full_prompt = run_prefix(model, prompts.prefix + head, rows[0] if "full_prompt" in fields else None)
        recorder = _Recorder(model, prompts, fields, context)
        limit = BatchLimit(batch_size)
        single = [index for index, label in enumerate(prompts.labels) if len(label) == 1]
        log_probs = torch.zeros(len(prompts.queries), len(prompts.labels), dtype=recorder.dtype)
        callbacks: dict[str, Any] = {"on_attention": recorder.on_attention, "on_output": recorder.on_output}
        for batch in run_queries(model, rows, 1, context, limit, n_after=len(prompts.appended_tokens), **callbacks):
            recorder.residual = max(recorder.residual, batch.residual)
            next_log_probs = log_probs_of(batch.logits)[:, 0]
            first = [prompts.labels[label][0] for label in single]
            at = torch.tensor(batch.rows)[:, None], torch.tensor(single, dtype=torch.long)
            log_probs[at] = next_log_probs[:, first].cpu()
            if "next_log_probs" in recorder.kept:
                recorder.kept["next_log_probs"][batch.rows] = next_log_probs.cpu()
            bar.update(len(batch.rows))
        asked = [query[len(head) :] for query in prompts.queries]
        for label in set(range(len(prompts.labels))) - set(single):
            log_probs[:, label] = label_word_log_probs(model, asked, prompts.labels[label], context, limit)
    return recorder.capture(log_probs, full_prompt)


class _Recorder:
    """Keeps the asked-for fields of every query at its recorded position."""

    def __init__(self, model: Model, prompts: Prompts, fields: Collection[Field], context: PrefixCache) -> None:
        self.model, self.prompts, self.context, self.fields = model, prompts, context, fields
        self.residual = context.residual
        n_prefix = len(prompts.prefix)
        self.n_head = context.n_pos - n_prefix
        self.n_shared = len(prompts.start) + self.n_head
        shown = prompts.demonstration_positions.to(model.device)
        self.shown_keys = [keys[shown] for keys in context.keys] if "demo_scores" in fields else []
        n_queries, n_layers, n_heads = len(prompts.queries), model.n_layers, model.n_heads
        longest = max(map(len, prompts.suffixes))
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
        for name, tensor in (("z", z), ("q", attention.q_pre_rotary), ("q_scored", attention.q)):
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
        kept, (scale, softcap, *_) = self.kept, self.model.attention_rules[layer]
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

    def capture(self, log_probs: Float[Tensor, "query label"], full_prompt: FullPromptPass | None) -> Capture:
        found: dict[str, Any] = {name: self.kept.get(name) for name in get_args(Field)}
        found["keys_values"] = self._keys_values() if "keys_values" in self.fields else None
        found["full_prompt"] = full_prompt
        return Capture(
            model=self.model.name,
            fingerprint=self.model.fingerprint(),
            hooks=self.model.foreign_hooks(),
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
