"""`Capture`: what a model did at each query's recorded position, and `capture()`, which runs the model for it.

What is kept is read at each query's last token: the position that predicts the label, or under the reference protocol
the end of the label word that follows every query. Label words are scored where the label is predicted, under both
protocols. How the model runs is described in `icl_dual.captures.shared_prefix`.

Every capture is checked. Each pass recomputes the heads' output over its tokens from queries, keys and values and
compares it with the model's own, and a model's first capture compares the shared-prefix pass with a plain forward pass
over a full prompt. A model that fails either check is refused.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import Count, checked
from icl_dual.captures.shared_prefix import (
    ONE_RUN,
    BatchLimit,
    BatchRows,
    FullPromptPass,
    PrefixCache,
    Runs,
    advise,
    arbitrary_prompts,
    batch_overhead,
    check_rope_scaling,
    common_query_prefix,
    label_word_log_probs,
    log_probs_of,
    measure_pass,
    norms_of,
    run_prefix,
    run_queries,
    split_into_batches,
)
from icl_dual.field_docs import document_fields
from icl_dual.models import Attention, Model, NonFiniteError, UnsupportedModelError
from icl_dual.models.changes import WeightChanges, changed_projections, projection_deltas_of
from icl_dual.models.journal import exclusive
from icl_dual.models.overflow import is_finite
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts, check_lengths, check_prompts
from icl_dual.results import ROUNDING, check_axes, check_values, compare_by_value
from icl_dual.scoring import WITH_BASELINE, label_baselines, label_scores
from icl_dual.storage import Saved
from icl_dual.torch_utils import is_out_of_memory

Field = Literal[
    "attn_out",
    "z",
    "q",
    "q_scored",
    "context_scores",
    "demo_scores",
    "query_scores",
    "residual_norms",
    "keys_values",
    "full_prompt",
    "next_log_probs",
    "stream",
]
METRIC_FIELDS: tuple[Field, ...] = ("attn_out", "q", "context_scores", "query_scores", "residual_norms")
"""The fields that the paper's metrics need, and that tell which tokens carry massive activations."""
DECOMPOSE_FIELDS: tuple[Field, ...] = ("attn_out", "z", "q_scored", "keys_values", "full_prompt")
"""The fields that `icl_dual.decompose` needs."""


@document_fields
@compare_by_value
@dataclass(frozen=True, repr=False, eq=False)
class KeysValues:
    """Keys and values of the demonstrations, which all queries share, and of each query's own tokens."""

    demo_keys: Float[Tensor, "layer demo_pos kv_head d_head"]
    """Keys as scored (after norms and rotation) of every prefix token after the start token: the demonstrations and
    their separators. `Prompts.segments` holds the source of each."""
    demo_values: Float[Tensor, "layer demo_pos kv_head d_head"]
    """Values of the tokens of `demo_keys`."""
    query_keys: Float[Tensor, "query layer query_pos kv_head d_head"]
    """Keys as scored of the start token and then each query's own tokens; zero past a query's end."""
    query_values: Float[Tensor, "query layer query_pos kv_head d_head"]
    """Values of the tokens of `query_keys`; zero past a query's end."""

    def __repr__(self) -> str:
        return f"KeysValues(demo_keys{list(self.demo_keys.shape)}, query_keys{list(self.query_keys.shape)}, and values)"


@checked
@document_fields
@dataclass(frozen=True, eq=False)
class Capture(Saved):
    """What a model did at each query's recorded position, which the prompts' protocol sets.

    Scores are scaled by 1/√d_head (or as the model scales them), before mask and softmax. Fields that were not
    requested are `None`.
    """

    model: str
    """The model's name."""
    fingerprint: str
    """The dtype and a hash of the weights that ran: a delta applied to the model, or momentum, changes it."""
    hooks: str
    """The hooks that others had on the model during the run; empty where there were none."""
    prompts: Prompts
    """The queries and the demonstrations before them, as token ids."""
    label_log_probs: Float[Tensor, "query label"]
    """Mean log-probability per token of each label word, in nats."""
    attn_out: Float[Tensor, "query layer d_model"] | None
    """Attention output after W_O, before it is added to the residual stream."""
    z: Float[Tensor, "query layer head d_head"] | None
    """Outputs of the heads before W_O, including momentum where the model has any."""
    q: Float[Tensor, "query layer head d_head"] | None
    """Queries W_Q x, after norms and before rotation."""
    q_scored: Float[Tensor, "query layer head d_head"] | None
    """Queries as scored: after norms and rotation."""
    context_scores: Float[Tensor, "query layer prefix_pos"] | None
    """Scores over every prefix token, including start token and separators, summed over heads."""
    demo_scores: Float[Tensor, "query layer head demo_token"] | None
    """Scores over the tokens of the demonstrations, without start token and separators."""
    query_scores: Float[Tensor, "query layer head query_token"] | None
    """Scores over the query's own tokens, without the start token; zero past a query's end, which changes no cosine."""
    residual_norms: Float[Tensor, "query layer query_token"] | None
    """Norm of the residual stream after each layer at the query's own tokens, those of `query_scores`; zero past a
    query's end. The start token is left out: no metric reads it."""
    keys_values: KeysValues | None
    """Keys and values of the demonstrations and of each query's own tokens."""
    full_prompt: FullPromptPass | None
    """A plain forward pass over the first query's full prompt, against which a decomposition is checked."""
    next_log_probs: Float[Tensor, "query d_vocab"] | None
    """Log-probability in nats of every token of the vocabulary at the position that predicts the label."""
    residual: float
    """Largest relative difference between the recomputed attention and the model's own, over layers and batches."""
    label_baselines: Float[Tensor, "query label"] | None = None
    """What scoring subtracts from the log-probability of each whole label word, in nats, equal for all queries; `None`
    where the prompts' rule of scoring (`icl_dual.scoring`) subtracts nothing."""
    stream: Float[Tensor, "query layer d_model"] | None = None
    """Residual stream after each layer."""

    def __post_init__(self) -> None:
        prompts, full_prompt = self.prompts, self.full_prompt
        check_lengths(prompts)
        n_start, longest = len(prompts.start), max(map(len, prompts.suffixes), default=0)
        if full_prompt is not None and full_prompt.tokens != prompts.prefix + prompts.suffixes[0]:
            raise ValueError(
                f"expected full_prompt over the first query's prompt, got one over {len(full_prompt.tokens)} other "
                "tokens: do not put a capture together from two"
            )
        check_axes(
            self,
            query=("prompts.queries", len(prompts.queries)),
            label=("prompts.labels", len(prompts.labels)),
            prefix_pos=("prompts.prefix", len(prompts.prefix)),
            demo_pos=("prompts.prefix without the start token", len(prompts.prefix) - n_start),
            demo_token=("prompts.demonstration_positions", len(prompts.demonstration_positions)),
            query_token=("the longest of prompts.suffixes", longest),
            query_pos=("the longest of prompts.suffixes with the start token", n_start + longest),
            pos=("full_prompt.tokens", 0 if full_prompt is None else len(full_prompt.tokens)),
        )
        check_values(self, "label_log_probs", high=ROUNDING)
        check_values(self, "next_log_probs", high=ROUNDING, infinite=True)
        check_values(self, "residual", "residual_norms", low=0)
        check_values(self, "attn_out", "z", "q", "q_scored", "context_scores", "demo_scores", "query_scores", "stream")
        check_values(self, "keys_values", "full_prompt", "label_baselines")
        if (self.label_baselines is None) == (prompts.scoring in WITH_BASELINE):
            raise ValueError(
                f"expected label_baselines with the rules of scoring {WITH_BASELINE} and no others, got "
                f"{'none' if self.label_baselines is None else 'some'} with {prompts.scoring!r}: capture again"
            )

    @property
    def label_scores(self) -> Float[Tensor, "query label"]:
        """Return the score of each label word, by the prompts' rule of scoring (`icl_dual.scoring`)."""
        label_lengths = [len(label) for label in self.prompts.labels]
        return label_scores(self.prompts.scoring, self.label_log_probs, label_lengths, self.label_baselines)

    @property
    def predictions(self) -> Int[Tensor, " query"]:
        """Return the index of the label with the highest score, for each query."""
        return self.label_scores.argmax(-1)

    @property
    def gold(self) -> Int[Tensor, " query"]:
        """Return the index of the correct label of each query."""
        return torch.tensor(self.prompts.gold, device=self.label_log_probs.device)

    @property
    def accuracy(self) -> float:
        """Return the proportion of queries for which the predicted label is the correct one."""
        return (self.predictions == self.gold).double().mean().item()

    @checked
    def axes(self, field: Field) -> dict[str, int]:
        """Return the names and lengths of a field's axes, in order; empty where it is `None` or no tensor."""
        tensor = getattr(self, field)
        if not isinstance(tensor, Tensor):
            return {}
        annotation = get_args(type(self).__annotations__[field])[0]
        return dict(zip(annotation.dim_str.split(), tensor.shape, strict=True))

    @checked
    def first(self, n_queries: Count) -> "Capture":
        """Return the capture of the first queries alone."""
        prompts = self.prompts.first(n_queries)
        longest = max(map(len, prompts.suffixes))
        by_query = {
            name: value[:n_queries, ..., :longest] if name in ("query_scores", "residual_norms") else value[:n_queries]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        keys_values = self.keys_values
        if keys_values is not None:
            n_pos = len(prompts.start) + longest
            query_keys, query_values = (
                keys_or_values[:n_queries, :, :n_pos]
                for keys_or_values in (keys_values.query_keys, keys_values.query_values)
            )
            keys_values = replace(keys_values, query_keys=query_keys, query_values=query_values)
        return replace(self, prompts=prompts, keys_values=keys_values, **by_query)

    def __repr__(self) -> str:
        names = [name for name in get_args(Field) if getattr(self, name) is not None]
        axes = [" ".join(f"{axis}={n}" for axis, n in self.axes(name).items()) for name in names]
        shapes = [f"{name}[{shape}]" if shape else name for name, shape in zip(names, axes, strict=True)]
        by_rule = "" if self.prompts.scoring == "mean" else f" (scoring={self.prompts.scoring!r})"
        return (
            f"Capture({self.model!r}, {len(self.prompts.queries)} queries after {len(self.prompts.demonstrations)} "
            f"demonstrations, accuracy={self.accuracy:.3f}{by_rule}, residual={self.residual:.1e}, {', '.join(shapes)})"
        )


@checked
@exclusive
@torch.inference_mode(False)  # tensors made inside of it could not be changed or differentiated later
def capture(
    model: Model,
    prompts: Prompts,
    *,
    fields: Collection[Field] = METRIC_FIELDS,
    batch_size: int = 64,
    progress: bool = True,
) -> Capture:
    """Run every query after the shared demonstrations and record the model at its last token.

    Args:
        model: the model to run; it comes back as it was.
        prompts: queries with their demonstrations; `prompts.zero_shot()` for the zero-shot setting.
        fields: the fields of `Capture` to keep, such as `METRIC_FIELDS` or `DECOMPOSE_FIELDS`; memory grows with the
            number of queries by these alone.
        batch_size: the largest number of queries to run at once; fewer run where their lengths differ much, or where
            memory runs out.
        progress: show a progress bar.

    Returns:
        The capture, on the model's device (`to("cpu")` moves it), in float32 or the model's dtype where that is wider.

    Raises:
        ValueError: a field is unknown, or the batch size is below 1.
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks to rounding level.
        PromptError: the prompts are incomplete, or the model cannot read them.
        MemoryError: a single query does not fit in memory, or the first one's full prompt where the field `full_prompt`
            is requested; the message has its size.
    """
    check_capture_arguments(fields, batch_size)
    check_prompts(model, prompts)
    with torch.no_grad(), progress_bar(total=len(prompts.queries), show=progress, unit="query") as bar:
        check_pass(model, prompts)
        bar.set_description(f"{len(prompts.demonstrations)} demonstrations")
        (captured,) = _capture_runs(model, prompts, fields, batch_size, (), bar.update)
    return captured


@exclusive
@torch.inference_mode(False)
def capture_changed(
    model: Model,
    prompts: Prompts,
    changes: Sequence[WeightChanges],
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> list[Capture]:
    """Capture a model under each of several changes of its projections, side by side: as rows of the same batches.

    A short batch takes little longer than a single row. Each capture has `METRIC_FIELDS`, and is that within
    `changed_projections`, up to rounding; its residual is the largest of all.

    Args:
        model: the model to run; one that `supports_projection_deltas`, without hooks of others.
        prompts: queries with their demonstrations.
        changes: by capture, the change of each projection, at least one; all of the same projections.
        batch_size: the largest number of rows to run at once; or as many as there are changes, where these are more.
        progress: show a progress bar.

    Returns:
        The captures, in the order of the changes.

    Raises:
        NonFiniteError: activations overflow under one of the changes; which one is not known.
        UnsupportedModelError, PromptError, MemoryError: as in `capture`.
    """
    check_prompts(model, prompts)
    with torch.no_grad(), progress_bar(total=len(prompts.queries), show=progress, unit="query") as bar:
        check_pass(model, prompts)
        bar.set_description(f"{len(prompts.demonstrations)} demonstrations, {len(changes)} in parallel")
        n_queries = max(1, batch_size // len(changes))
        return _capture_runs(model, prompts, METRIC_FIELDS, n_queries, changes, bar.update)


def _capture_runs(
    model: Model,
    prompts: Prompts,
    fields: Collection[Field],
    batch_size: int,
    changes: Sequence[WeightChanges],
    on_done: Callable[[int], object],
) -> list[Capture]:
    """Capture the model under each of some changes, or as it is where there are none; says how many queries are done.

    The field `full_prompt` is for a model as it is.
    """
    query_prefix = common_query_prefix(prompts)
    check_rope_scaling(model, prompts, query_prefix)
    runs = Runs(len(changes), projection_deltas_of(_stacked(changes, model.device))) if changes else ONE_RUN
    rows = [suffix[len(query_prefix) :] for suffix in prompts.suffixes]
    first_row = rows[0] if "full_prompt" in fields else None
    context, full_prompt = run_prefix(model, prompts.prefix + query_prefix, first_row, runs=runs)
    recorders = [_Recorder(model, prompts, fields, context.of_run(run)) for run in range(runs.n)]
    limit = BatchLimit(batch_size)
    single_token_labels = [index for index, label in enumerate(prompts.labels) if len(label) == 1]
    label_tokens = [prompts.labels[index][0] for index in single_token_labels]
    log_probs = recorders[0].zeros(runs.n, len(prompts.queries), len(prompts.labels))
    label_index = torch.tensor(single_token_labels, dtype=torch.long, device=model.device)
    n_after, callbacks = len(prompts.appended_tokens), _callbacks(recorders)
    for batch in run_queries(model, rows, 1, context, limit, n_after=n_after, runs=runs, **callbacks):
        index = torch.tensor(batch.rows, device=model.device)
        next_log_probs = torch.unflatten(log_probs_of(batch.logits)[:, 0], 0, (runs.n, -1))
        log_probs[:, index[:, None], label_index] = next_log_probs[..., label_tokens]
        for recorder, of_run in zip(recorders, next_log_probs, strict=True):
            recorder.residual = max(recorder.residual, batch.residual)
            if "next_log_probs" in recorder.tensors:
                recorder.tensors["next_log_probs"][index] = of_run
        on_done(len(batch.rows))
    query_rows = [query[len(query_prefix) :] for query in prompts.queries]
    for label in set(range(len(prompts.labels))) - set(single_token_labels):
        log_probs[..., label] = label_word_log_probs(model, query_rows, prompts.labels[label], context, limit, runs)
    captures: list[Capture] = []
    for recorder, of_run, change in zip(recorders, log_probs, changes or (None,), strict=True):
        with nullcontext() if change is None else changed_projections(model, change):
            captures.append(recorder.capture(of_run, full_prompt, _label_baselines(model, prompts, batch_size)))
    return captures


def _stacked(changes: Sequence[WeightChanges], device: torch.device) -> dict[str, Float[Tensor, "layer run *axes"]]:
    """Return several changes of the same projections as one, by run."""
    return {name: torch.stack([change[name] for change in changes], dim=1).to(device) for name in changes[0]}


def _callbacks(recorders: "Sequence[_Recorder]") -> dict[str, Any]:
    """Return the callbacks for `run_queries` by which each recorder records its own run's rows."""
    names = ["on_attention", "on_output"]
    if {"residual_norms", "stream"} & set(recorders[0].fields):
        names.append("on_residual")
    if len(recorders) == 1:
        return {name: getattr(recorders[0], name) for name in (*names, "on_batch")}

    def by_run(name: str) -> Callable[[int, Any, BatchRows], None]:
        def on_layer(layer: int, content: Any, rows: BatchRows) -> None:
            for run, recorder in enumerate(recorders):
                getattr(recorder, name)(layer, _of_run(content, run, len(recorders)), rows)

        return on_layer

    def on_batch(rows: BatchRows) -> None:
        for recorder in recorders:
            recorder.on_batch(rows)

    return {name: by_run(name) for name in names} | {"on_batch": on_batch}


def _of_run(content: Any, run: int, n_runs: int) -> Any:
    """Return a run's rows of a tensor, or of each tensor in a tuple, that has as many rows of each run."""
    if isinstance(content, Tensor):
        return torch.unflatten(content, 0, (n_runs, -1))[run]
    return None if content is None else type(content)(*(_of_run(part, run, n_runs) for part in content))


class BatchedCapture:
    """Captures queries in batches after what they all share, which runs once; keeps nothing of a batch that has run.

    A batch is a capture of its queries alone, with the numbers of a capture of all. Of the label words it scores the
    first token of the first only.

    Args:
        model: the model to run; only within an exclusive call, and without gradients.
        prompts: queries with their demonstrations.
        fields: the fields of each batch's capture, without `full_prompt`.
        batch_size: the largest number of queries to run at once.
        full_prompt: run the shared tokens as one sequence with the first query after them, and keep that pass.
    """

    def __init__(
        self, model: Model, prompts: Prompts, fields: Collection[Field], batch_size: int, *, full_prompt: bool = False
    ) -> None:
        self.model, self.prompts, self.fields = model, prompts, fields
        self.query_prefix = common_query_prefix(prompts)
        check_rope_scaling(model, prompts, self.query_prefix)
        check_pass(model, prompts)
        rows = [suffix[len(self.query_prefix) :] for suffix in prompts.suffixes]
        self.context, self.full_prompt = run_prefix(
            model, prompts.prefix + self.query_prefix, rows[0] if full_prompt else None
        )
        self.batches = split_into_batches(list(map(len, rows)), batch_size, batch_overhead(model))
        """The indices of the queries in each batch: queries of like lengths together."""
        self.limit = BatchLimit(batch_size)

    def run(self, queries: Sequence[int]) -> Capture:
        """Run some of the queries, and return their capture."""
        prompts = replace(
            self.prompts,
            queries=tuple(self.prompts.queries[query] for query in queries),
            zero_shot_queries=tuple(self.prompts.zero_shot_queries[query] for query in queries)
            if self.prompts.zero_shot_queries
            else (),
            labels=self.prompts.labels[:1],
            gold=(0,) * len(queries),
            scoring="mean",
            baseline_queries=(),
            zero_shot_baseline_queries=(),
        )
        recorder = _Recorder(self.model, prompts, self.fields, self.context)
        rows = [suffix[len(self.query_prefix) :] for suffix in prompts.suffixes]
        log_probs = recorder.zeros(len(queries), 1)
        for batch in run_queries(
            self.model,
            rows,
            1,
            self.context,
            self.limit,
            n_after=len(prompts.appended_tokens),
            on_attention=recorder.on_attention,
            on_output=recorder.on_output,
            on_batch=recorder.on_batch,
        ):
            recorder.residual = max(recorder.residual, batch.residual)
            log_probs[batch.rows] = log_probs_of(batch.logits)[:, 0, [prompts.labels[0][0]]]
        return recorder.capture(log_probs, None, None)


def _label_baselines(model: Model, prompts: Prompts, batch_size: int) -> Float[Tensor, "query label"] | None:
    """Score the label words after queries without content, where the prompts have any."""
    if not prompts.baseline_queries:
        return None
    alone = prompts.scoring == "unconditional"
    without_content = replace(
        prompts.zero_shot() if alone else prompts,
        queries=prompts.baseline_queries,
        gold=(0,) * len(prompts.baseline_queries),
        scoring="mean",
        baseline_queries=(),
        zero_shot_queries=(),
        zero_shot_baseline_queries=(),
    )
    captured = capture(model, without_content, fields=(), batch_size=batch_size, progress=False)
    label_lengths = [len(label) for label in prompts.labels]
    baselines = label_baselines(prompts.scoring, captured.label_log_probs, label_lengths)
    return baselines.repeat(len(prompts.queries), 1)


def check_capture_arguments(fields: Collection[Field], batch_size: int) -> None:
    """Raise a ValueError unless every field is known and the batch size is at least 1."""
    if isinstance(fields, str):
        raise ValueError(f"expected fields as a collection of names, got {fields!r}: pass ({fields!r},)")
    if unknown := set(fields) - set(get_args(Field)):
        raise ValueError(f"expected fields out of {get_args(Field)}, got {sorted(unknown)}: remove these")
    if batch_size < 1:
        raise ValueError(f"expected batch_size of at least 1, got {batch_size}: 1 runs one query at a time")


def check_pass(model: Model, prompts: Prompts) -> None:
    """Compare the shared-prefix pass with plain forward passes: once, and at every capture with foreign hooks.

    The effect of such a hook may depend on the prompt and on where the prompt is split. So these prompts are compared,
    split as `capture` splits them: the query with the shortest rest and that with the longest.
    """
    hooks = model.foreign_hooks()
    if model.pass_residual is not None and not hooks and not model.pass_hooks:
        return
    if hooks:
        shared = common_query_prefix(prompts)
        by_length = sorted((suffix[len(shared) :] for suffix in prompts.suffixes), key=len)
        prefix, rows = prompts.prefix + shared, by_length if len(by_length) == 1 else [by_length[0], by_length[-1]]
    else:
        arbitrary = arbitrary_prompts(model, prompts.start)
        prefix, rows = arbitrary.prefix, arbitrary.queries
    try:
        with model.journal.block() as undo:
            undo.set(model, "mlp_changes", ())  # which do not touch attention, and may refuse these prompts
            undo.set(model, "run_checks", ())
            residual = measure_pass(model, prefix, rows)
        model.pass_residual, model.pass_hooks = residual, hooks
    except (RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise MemoryError(
                f"expected memory to check {model!r} on a short prompt, got: {error}. Use a smaller model or half "
                "precision"
            ) from error
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}, {model.dtype}): expected a model that runs with its hooks, got: "
            f"{error}" + f": {advise(model)}" * bool(hooks)
        ) from error


class _Recorder:
    """Records the requested fields of every query at its last token, as the engine's callbacks pass them."""

    def __init__(self, model: Model, prompts: Prompts, fields: Collection[Field], context: PrefixCache) -> None:
        self.model, self.prompts, self.context, self.fields = model, prompts, context, fields
        self.residual = context.residual
        n_prefix = len(prompts.prefix)
        self.n_before_rows = len(prompts.start) + context.n_pos - n_prefix
        """How many tokens of the start token and the query come before the tokens that run in a row."""
        demo_positions = prompts.demonstration_positions.to(model.device)
        self.demo_keys = [keys[0, demo_positions] for keys in context.keys] if "demo_scores" in fields else []
        n_queries, n_layers, n_heads = len(prompts.queries), model.n_layers, model.n_heads
        longest = max(map(len, prompts.suffixes))
        keys_shape = (n_queries, n_layers, len(prompts.start) + longest, model.n_key_value_heads, model.d_head)
        shapes = {
            "attn_out": (n_queries, n_layers, model.d_model),
            "z": (n_queries, n_layers, n_heads, model.d_head),
            "q": (n_queries, n_layers, n_heads, model.d_head),
            "q_scored": (n_queries, n_layers, n_heads, model.d_head),
            "context_scores": (n_queries, n_layers, n_prefix),
            "demo_scores": (n_queries, n_layers, n_heads, len(demo_positions)),
            "query_scores": (n_queries, n_layers, n_heads, longest),
            "residual_norms": (n_queries, n_layers, longest),
            "next_log_probs": (n_queries, model.d_vocab),
            "stream": (n_queries, n_layers, model.d_model),
        }
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self.at_last: dict[str, list[Tensor]] = {}
        """By field, one tensor a layer: its value at the rows' last tokens, for the batch that is running."""
        self.tensors = {name: self.zeros(*shape) for name, shape in shapes.items() if name in fields}
        if "keys_values" in fields:
            self.tensors |= {name: self.zeros(*keys_shape) for name in ("query_keys", "query_values")}
        if "residual_norms" in fields:
            common_norms = torch.stack(context.norms)[:, 0, n_prefix:]
            self.tensors["residual_norms"][..., : common_norms.shape[-1]] = common_norms.to(self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros to record into, on the model's device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.model.device)

    def on_attention(self, layer: int, attention: Attention, rows: BatchRows) -> None:
        """Record a layer's attention."""
        tensors, index = self.tensors, rows.indices
        z = attention.output if "z" in tensors else attention.z
        for name, tensor in (("z", z), ("q", attention.q_pre_rotary), ("q_scored", attention.q)):
            if name in tensors:
                self._keep(name, layer, rows.at_last(tensor))
        self._record_scores(layer, rows.at_last(attention.q), attention.k, rows)
        if "query_keys" in tensors:
            positions = slice(self.n_before_rows, self.n_before_rows + attention.k.shape[1])
            for name, tensor in (("query_keys", attention.k), ("query_values", attention.v)):
                until_end = tensor.masked_fill(rows.past_end[..., None, None], 0.0).to(self.dtype)
                tensors[name][index, layer, positions] = until_end

    def _record_scores(
        self,
        layer: int,
        q: Float[Tensor, "batch head d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        rows: BatchRows,
    ) -> None:
        """Record the scores of the last tokens over the context, and over the tokens of their rows."""
        tensors, (scale, softcap, *_) = self.tensors, self.model.attention_rules[layer]
        keys, n_prefix = self.context.keys[layer][0], len(self.prompts.prefix)
        if "context_scores" in tensors:
            self._keep("context_scores", layer, dual.summed_scores(q, keys[:n_prefix], scale, softcap))
        if "demo_scores" in tensors:
            demo_scores = dual.shared_scores(q, self.demo_keys[layer], scale, softcap)
            tensors["demo_scores"][rows.indices, layer] = demo_scores.transpose(0, 1)
        if "query_scores" in tensors:
            prefix_scores = dual.shared_scores(q, keys[n_prefix:], scale, softcap).transpose(0, 1)
            row_scores = dual.scores(q.unsqueeze(1), k, scale, softcap).flatten(1, 2)
            row_scores = row_scores.masked_fill(rows.past_end[:, None], 0.0)
            query_scores = torch.cat((prefix_scores, row_scores), dim=-1)
            tensors["query_scores"][rows.indices, layer, :, : query_scores.shape[-1]] = query_scores

    def on_output(self, layer: int, output: Float[Tensor, "batch pos d_model"], rows: BatchRows) -> None:
        """Record a layer's attention output."""
        if "attn_out" in self.tensors:
            self._keep("attn_out", layer, rows.at_last(output))

    def on_residual(self, layer: int, stream: Float[Tensor, "batch pos d_model"], rows: BatchRows) -> None:
        """Record the residual stream after a layer, and its norms."""
        if "stream" in self.tensors:
            self._keep("stream", layer, rows.at_last(stream))
        if "residual_norms" not in self.tensors:
            return
        n_common, n_pos = self.n_before_rows - len(self.prompts.start), stream.shape[1]
        norms = norms_of(stream).masked_fill(rows.past_end, 0.0)
        self.tensors["residual_norms"][rows.indices, layer, n_common : n_common + n_pos] = norms

    def _keep(self, name: str, layer: int, tensor: Shaped[Tensor, "batch *axes"]) -> None:
        """Keep what a layer has at the rows' last tokens until the batch is done: one copy then serves all layers."""
        self.at_last.setdefault(name, [])[layer:] = [tensor]  # from the layer on: the pass may run once more

    def on_batch(self, rows: BatchRows) -> None:
        """Record what was kept of a batch."""
        while self.at_last:
            name, layers = self.at_last.popitem()
            self.tensors[name][rows.indices] = torch.stack(layers, dim=1).to(self.dtype)

    def capture(
        self,
        log_probs: Float[Tensor, "query label"],
        full_prompt: FullPromptPass | None,
        baselines: Float[Tensor, "query label"] | None,
    ) -> Capture:
        """Return what was recorded.

        Raises:
            NonFiniteError: the norm of the residual stream overflows, though each of its numbers does not.
        """
        fields: dict[str, Any] = {name: self.tensors.get(name) for name in get_args(Field)}
        fields["keys_values"] = self._keys_values() if "keys_values" in self.fields else None
        fields["full_prompt"] = full_prompt
        try:
            return Capture(
                model=self.model.name,
                fingerprint=self.model.fingerprint(),
                hooks=self.model.foreign_hooks(),
                prompts=self.prompts,
                label_log_probs=log_probs,
                residual=self.residual,
                label_baselines=baselines,
                **fields,
            )
        except ValueError:
            self._check_norms()
            raise

    def _check_norms(self) -> None:
        """Raise a NonFiniteError where a norm of the residual stream is infinite; names the layer."""
        norms = self.tensors.get("residual_norms")
        if norms is not None and not is_finite(norms):
            layer = int((~norms.isfinite()).nonzero()[:, 1].min())
            raise NonFiniteError(
                f"{self.model.name} ({self.model.architecture}): expected finite norms of the residual stream, got "
                f"infinite ones, first after layer {layer}: check its weights, which may be damaged"
            )

    def _keys_values(self) -> KeysValues:
        n_start, n_prefix = len(self.prompts.start), len(self.prompts.prefix)
        query_keys, query_values = self.tensors["query_keys"], self.tensors["query_values"]
        context = (self.context.keys, self.context.values)
        keys, values = (torch.cat(by_layer).to(self.dtype) for by_layer in context)
        for shared, by_query in ((keys, query_keys), (values, query_values)):
            by_query[:, :, : self.n_before_rows] = torch.cat((shared[:, :n_start], shared[:, n_prefix:]), dim=1)
        demos = slice(n_start, n_prefix)
        return KeysValues(keys[:, demos].clone(), values[:, demos].clone(), query_keys, query_values)
