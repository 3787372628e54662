"""`plan`: the arithmetic and memory of a cell, counted from a model's configuration and the prompts, without weights.

A cell is what `run_experiment` with `.compare()` and `.decompose()` runs. FLOPs are those of torch's own counter: two
for each multiply-add of matrix products and of attention, its masked half included. Sorts, norms and elementwise
functions are left out, and so is the short pass that checks a model at its first capture. The formulas are those of
docs/cost.md.

Memory is that of one process on the CPU: the process itself, the weights, what stages keep, and what they need while
they run. `WORKING_WIDTHS`, `HELD` and the factors below are fits to the processes in docs/cost.md.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd
import torch
from transformers import PreTrainedConfig

from icl_dual.arguments import Count, Index, NameOrPath, checked
from icl_dual.captures.capture import DECOMPOSE_FIELDS, METRIC_FIELDS, Field, check_capture_arguments
from icl_dual.captures.shared_prefix import BATCH_OVERHEAD, PREFIX_BLOCK, common_query_prefix, split_into_batches
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.config import PAPER_FINETUNING, PROJECTIONS_TRAINED, FinetuneConfig
from icl_dual.finetuning.replicas import REPLICA_QUERIES, REPLICAS, REPLICAS_AT_ONCE, check_replicas
from icl_dual.html_tables import number
from icl_dual.metrics import KENDALL_QUERIES
from icl_dual.models import Model
from icl_dual.models.precision import check_arithmetic, precision_name
from icl_dual.models.shapes import ModelShape, shape_of
from icl_dual.prompts import Prompts
from icl_dual.torch_utils import is_half

PROCESS_BYTES, TOKENIZER_BYTES = 0.58e9, 1900
"""The memory of a process with torch, transformers, transformer-lens and a task, and of each token of a tokenizer's
vocabulary, in bytes (docs/cost.md)."""

HELD = 0.75
"""The share of finetuning's working memory that the allocator of the CPU does not use again: it is freed in many small
pieces."""

TRAINING_WIDTHS, WORKING_WIDTHS = 3, 3
"""What a layer holds for a token, in widths of its linear maps: for the backward pass, and while it runs."""


@checked
@document_fields
@dataclass(frozen=True)
class PromptLengths:
    """The numbers of tokens of prompts, where their texts are not at hand.

    >>> PromptLengths(queries=(20,) * 100, demonstrations=(30,) * 4)
    PromptLengths(100 queries of 20 tokens after 4 demonstrations in 125 tokens)

    Raises:
        ValueError: there are no queries, or one is no longer than the tokens that all queries share.
    """

    queries: tuple[Count, ...]
    """The tokens after the prefix, by query: its own, and what the protocol appends."""
    demonstrations: tuple[Count, ...] = ()
    """The tokens of each demonstration, without start token and separator."""
    start: Index = 1
    """The number of start tokens."""
    separator: Index = 1
    """The number of tokens after each demonstration."""
    shared: Index = 0
    """How many tokens at the start of all queries are the same: these run once."""
    labels: tuple[Count, ...] = (1,)
    """The tokens of each label word."""
    baseline_queries: tuple[Count, ...] = ()
    """The tokens of each query without content, for the rules of scoring that have any."""
    in_context: Index | None = None
    """The tokens of the demonstrations and separators in the context, where these are not those of `demonstrations`;
    else `None`."""

    def __post_init__(self) -> None:
        if not self.queries:
            raise ValueError("expected queries with at least one length, got none: pass the tokens of each query")
        if min(self.queries) <= self.shared:
            raise ValueError(
                f"expected queries longer than the {self.shared} tokens that all share, got one of "
                f"{min(self.queries)} tokens: pass a smaller shared"
            )

    @classmethod
    @checked
    def of(cls, prompts: Prompts) -> "PromptLengths":
        """Return the lengths of prompts."""
        return cls(
            queries=tuple(map(len, prompts.suffixes)),
            demonstrations=tuple(map(len, prompts.training_sequences)),
            start=len(prompts.start),
            separator=len(prompts.separator),
            shared=len(common_query_prefix(prompts)),
            labels=tuple(map(len, prompts.labels)),
            baseline_queries=tuple(map(len, prompts.baseline_queries)),
            in_context=len(prompts.prefix) - len(prompts.start),
        )

    @property
    def context(self) -> int:
        """Return the number of tokens of demonstrations and separators in the context."""
        if self.in_context is not None:
            return self.in_context
        return sum(self.demonstrations) + self.separator * len(self.demonstrations)

    @property
    def prefix(self) -> int:
        """Return the number of tokens before every query."""
        return self.start + self.context

    @property
    def rows(self) -> list[int]:
        """Return the tokens of each query that run for it alone."""
        return [n - self.shared for n in self.queries]

    def __repr__(self) -> str:
        low, high = min(self.queries), max(self.queries)
        spread = f"{low}" if low == high else f"{low} to {high}"
        return (
            f"PromptLengths({len(self.queries)} queries of {spread} tokens after {len(self.demonstrations)} "
            f"demonstrations in {self.prefix} tokens)"
        )


@document_fields
class StageCost(NamedTuple):
    """The arithmetic and memory of one stage of a cell."""

    stage: str
    """The stage's name."""
    flops: float | int
    """Floating-point operations, two for each multiply-add."""
    working: float | int
    """The most memory in bytes that the stage needs while it runs, beyond the weights and what was kept before."""
    kept: float | int
    """The memory in bytes of what the stage leaves for those after it."""
    runs_model: bool
    """Whether the stage runs the model."""


@checked
@document_fields
@dataclass(frozen=True, repr=False)
class CellPlan:
    """The arithmetic and memory of a cell, by stage. Made by `icl_dual.plan`."""

    model: str
    """The model's name or architecture."""
    shape: ModelShape
    """The model's sizes."""
    lengths: PromptLengths
    """The numbers of tokens of the prompts."""
    precision: str
    """The precision of weights and arithmetic, in words."""
    weight_memory: float
    """The memory of the weights, in bytes."""
    stages: tuple[StageCost, ...]
    """The stages in the order in which they run."""

    @property
    def flops(self) -> float:
        """Return the floating-point operations of the whole cell."""
        return float(sum(stage.flops for stage in self.stages))

    @property
    def peak_memory(self) -> float:
        """Return the most memory of one process that runs the cell on the CPU, in bytes."""
        kept, held, peak = 0.0, 0.0, 0.0
        for stage in self.stages:
            peak = max(peak, kept + stage.kept + max(held, stage.working))
            kept += stage.kept
            held = max(held, HELD * stage.working) if stage.stage == "finetuning" else held
            peak = max(peak, kept + held + (0.0 if stage.runs_model else stage.working))
        return self.process_memory + self.weight_memory + peak

    @property
    def process_memory(self) -> float:
        """Return the memory of a process with the tokenizer and without the model, in bytes."""
        return PROCESS_BYTES + TOKENIZER_BYTES * self.shape.d_vocab

    @property
    def device_memory(self) -> float:
        """Return the most memory of a GPU that holds the model, runs the cell and keeps its results, in bytes.

        A decomposition counts two layers at once, as on a CPU; a GPU takes as many as have 2²⁶ numbers, where it can.
        """
        kept, peak = 0.0, 0.0
        for stage in self.stages:
            kept += stage.kept
            peak = max(peak, kept + stage.working)
        return self.weight_memory + peak

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each stage: its FLOPs, and its working and kept memory in bytes."""
        columns = ("stage", "flops", "working", "kept")
        return pd.DataFrame([{name: getattr(stage, name) for name in columns} for stage in self.stages])

    def __repr__(self) -> str:
        n_weights = f"{number(self.shape.n_weights / 1e6)} M weights"
        return (
            f"CellPlan({self.model!r}, {n_weights} in {self.precision}, {len(self.lengths.queries)} queries after "
            f"{len(self.lengths.demonstrations)} demonstrations, {number(self.flops / 1e12)} TFLOP, "
            f"{self.peak_memory / 1e9:.2f} GB)"
        )

    def __str__(self) -> str:
        lines = [repr(self), f"{'stage':18}{'TFLOP':>10}{'working, GB':>13}{'kept, GB':>10}"]
        lines += [f"{s.stage:18}{s.flops / 1e12:10.3f}{s.working / 1e9:13.3f}{s.kept / 1e9:10.3f}" for s in self.stages]
        lines.append(f"weights {self.weight_memory / 1e9:.3f} GB, process {self.process_memory / 1e9:.2f} GB")
        lines.append(
            f"peak {self.peak_memory / 1e9:.2f} GB in a process on the CPU; on a GPU {self.device_memory / 1e9:.2f} GB"
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        frame = self.to_frame().assign(
            flops=lambda table: table["flops"] / 1e12,
            working=lambda table: table["working"] / 1e9,
            kept=lambda table: table["kept"] / 1e9,
        )
        frame.columns = ["stage", "TFLOP", "working, GB", "kept, GB"]
        table = frame.to_html(index=False, float_format=lambda value: f"{value:.3f}", border=0)
        caption = f'<caption style="text-align: left">{repr(self).replace("<", "&lt;")}</caption>'
        return table.replace("<thead>", f"{caption}<thead>", 1)


@checked
def plan(
    model: NameOrPath | PreTrainedConfig | ModelShape | Model,
    prompts: Prompts | PromptLengths,
    *,
    config: FinetuneConfig = PAPER_FINETUNING,
    replicas: Index = REPLICAS,
    fields: Collection[Field] = METRIC_FIELDS + DECOMPOSE_FIELDS,
    batch_size: Count = 64,
    dtype: torch.dtype = torch.float32,
    arithmetic: torch.dtype | None = None,
    revision: str | None = None,
) -> CellPlan:
    """Count the FLOPs and the memory of a cell, by stage, without a model's weights.

    Args:
        model: a name, folder, `.gguf` file or hub id, of which the configuration alone is read; a configuration of
            transformers; a shape; or a model that is loaded.
        prompts: the prompts, or their numbers of tokens.
        config: how to finetune. LoRA is counted as its full matrices are.
        replicas: the number of replicas of the finetuning, as in `run_experiment`.
        fields: the fields of every capture. Without `METRIC_FIELDS`, there are no replicas and no metrics; without
            `DECOMPOSE_FIELDS`, there is no decomposition.
        batch_size: the largest number of queries to run at once.
        dtype: the dtype of the weights.
        arithmetic: the dtype of the computation, as in `load_model`.
        revision: a branch, tag or commit, for hub ids only.

    Returns:
        The cost of each stage, and of all.

    Raises:
        AssetError: no model has this name, or its configuration cannot be read.
        UnsupportedModelError: the model has layers of which the cost is not counted.
        ValueError: an argument that `run_experiment` refuses, too.

    Example:
        >>> from transformers import LlamaConfig
        >>> from icl_dual.planning import PromptLengths, plan
        >>> llama = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16)
        >>> plan(llama, PromptLengths(queries=(20,) * 100, demonstrations=(30,) * 32))
        CellPlan('LlamaForCausalLM', 1.74e+03 M weights in float32, 100 queries after 32 demonstrations, 60.3 TFLOP, \
22.97 GB)
    """
    check_arithmetic(dtype, arithmetic)
    check_replicas(replicas)
    check_capture_arguments(fields, batch_size)
    shape = shape_of(model, revision)
    lengths = PromptLengths.of(prompts) if isinstance(prompts, Prompts) else prompts
    if isinstance(model, Model):
        dtype, arithmetic = model.storage_dtype, model.dtype
    arithmetic = arithmetic or dtype
    cell = _Cell(shape, lengths, config, replicas, frozenset(fields), batch_size, dtype, arithmetic)
    name = model if isinstance(model, str) else model.name if isinstance(model, Model) else shape.architecture
    return CellPlan(
        model=name,
        shape=shape,
        lengths=lengths,
        precision=precision_name(dtype, arithmetic),
        weight_memory=float((shape.n_weights + shape.n_split_weights) * dtype.itemsize),
        stages=cell.stages(),
    )


class _Run(NamedTuple):
    """Rows of one length that run after cached tokens."""

    n_rows: int
    length: int
    cached: int
    n_read: int
    """The positions of a row at which logits are computed."""


@dataclass(frozen=True)
class _Cell:
    """The arguments of `plan`."""

    shape: ModelShape
    lengths: PromptLengths
    config: FinetuneConfig
    replicas: int
    fields: frozenset[Field]
    batch_size: int
    dtype: torch.dtype
    arithmetic: torch.dtype
    overhead: int = BATCH_OVERHEAD
    """The cost of a batch besides its tokens, in tokens."""

    def stages(self) -> tuple[StageCost, ...]:
        """Return the stages that these fields have."""
        has_metrics, has_terms = {*METRIC_FIELDS} <= self.fields, {*DECOMPOSE_FIELDS} <= self.fields
        n_replicas = self.replicas if has_metrics else 0
        stages = [self.finetuning(n_replicas)] if self.lengths.demonstrations else []
        stages += [self.prefix(), self.queries("in-context", self.lengths.prefix)]
        stages += [self.queries(name, self.lengths.start) for name in ("zero-shot", "finetuned")]
        if n_replicas and self.lengths.demonstrations:
            stages.append(self.replica_captures(n_replicas))
        if has_metrics and self.lengths.demonstrations:
            stages.append(self.metrics(n_replicas))
        return (*stages, self.decomposition()) if has_terms else tuple(stages)

    # Finetuning

    def finetuning(self, n_replicas: int) -> StageCost:
        """Return the cost of finetuning with replicas, which run as rows of one batch where they can."""
        shape, lengths, n_runs = self.shape, self.lengths, 1 + n_replicas
        is_parallel = n_replicas > 0 and self.config.method == "sgd" and not shape.runs_whole
        flops = sum(self._step(n, is_beside=is_parallel or is_half(self.dtype)) for n in lengths.demonstrations)
        n_weights = shape.projection_weights(PROJECTIONS_TRAINED[self.config.trained])
        longest, n_rows = lengths.start + max(lengths.demonstrations), min(n_runs, 8) if is_parallel else 1
        activations = TRAINING_WIDTHS * shape.n_layers * shape.layer_width * longest * n_rows * self.arithmetic.itemsize
        logits = 4 * n_rows * self._n_targets(max(lengths.demonstrations)) * shape.d_vocab * 4
        recorded = shape.n_layers * (shape.d_attention + shape.d_kv) * sum(lengths.demonstrations) * 4
        return StageCost(
            "finetuning",
            flops * n_runs * self.config.epochs,
            2 * n_rows * n_weights * 4 + activations + logits,
            n_runs * (n_weights * 4 + recorded),
            runs_model=True,
        )

    def _n_targets(self, length: int) -> int:
        """Return how many tokens of a demonstration the loss is the mean over."""
        labels = self.lengths.labels
        n_targets = round(sum(labels) / len(labels)) if self.config.loss == "label" else length
        return min(n_targets, self.lengths.start + length - 1)

    def _step(self, length: int, *, is_beside: bool) -> float | int:
        """Return the FLOPs of a forward and backward pass over one demonstration.

        Args:
            length: its tokens, without the start token.
            is_beside: whether changes of the weights are kept apart, and added at the projections.
        """
        shape, kinds = self.shape, PROJECTIONS_TRAINED[self.config.trained]
        n_targets, length = self._n_targets(length), length + self.lengths.start
        n_layers, attention = shape.n_layers, shape.d_attention * length**2
        unembed = 2 * shape.n_unembedding_weights * n_targets
        forward = 2 * shape.n_token_weights * length + 4 * n_layers * attention + unembed
        # Nothing before a layer whose input is frozen has a gradient: not its queries, and not a parallel MLP.
        is_local = self.config.method == "layer-causal"
        n_first = n_layers if is_local else 1
        of_attention = shape.projection_weights(("Q", "K", "V", "O")) / n_layers
        of_rest = 0.0 if shape.parallel_mlp else shape.n_token_weights / n_layers - of_attention
        of_first = shape.d_model * shape.d_attention + of_rest
        through = n_first * of_first + (n_layers - n_first) * shape.n_token_weights / n_layers
        in_first = 2 * len({"Q", "K", "V"} & {*kinds}) + 2 * bool({"Q", "K"} & {*kinds})
        attention_backward = attention * (n_first * in_first + 8 * (n_layers - n_first))
        trained = shape.projection_weights(kinds)
        weights_backward = 2 * trained * length
        beside = 2 * trained * length * (2 - n_first / n_layers) if is_beside else 0.0
        read_out = 2 * n_layers * unembed if is_local else unembed
        return forward + 2 * through * length + attention_backward + weights_backward + beside + read_out

    # Captures

    def prefix(self) -> StageCost:
        """Return the cost of the pass over the tokens that all queries share, in context."""
        lengths, shape, size = self.lengths, self.shape, self.arithmetic.itemsize
        runs = self._prefix_runs(lengths.prefix)
        cache = 2 * shape.n_layers * shape.d_kv * (lengths.prefix + lengths.shared) * size
        return StageCost(
            "prefix",
            sum(map(self._flops, runs)),
            2 * cache + max(map(self._working, runs), default=0.0),
            0.0,
            runs_model=True,
        )

    def _prefix_runs(self, n_context: int) -> list[_Run]:
        """Return the passes over a prefix and the tokens that all queries share after it."""
        n_tokens = n_context + self.lengths.shared
        if "full_prompt" in self.fields:
            return [_Run(1, n_tokens + self.lengths.rows[0], 0, 1)]
        if self.shape.runs_whole:
            return [_Run(1, n_tokens, 0, 1)] if n_tokens else []
        return [_Run(1, min(PREFIX_BLOCK, n_tokens - first), first, 1) for first in range(0, n_tokens, PREFIX_BLOCK)]

    def queries(self, name: str, n_context: int) -> StageCost:
        """Return the cost of a capture: in context without the pass over the prefix, which is a stage of its own."""
        before = [] if name == "in-context" else self._prefix_runs(n_context)
        runs, after = self._capture_runs(n_context)
        flops = sum(map(self._flops, [*before, *runs, *after])) + self._score_flops(runs, n_context)
        cached, size = n_context + self.lengths.shared, self.arithmetic.itemsize
        cache = 2 * self.shape.n_layers * self.shape.d_kv * cached * size
        working = cache + max(map(self._working, [*before, *runs]))
        return StageCost(name, flops, working, self._kept(len(self.lengths.queries), n_context, self.fields), True)

    def _capture_runs(self, n_context: int) -> tuple[list[_Run], list[_Run]]:
        """Return the passes over queries and label words, and those over queries without content."""
        lengths, cached = self.lengths, n_context + self.lengths.shared
        runs = self._query_runs(lengths.rows, cached, 1)
        for n_label in (n for n in lengths.labels if n > 1):
            runs += self._query_runs([row + n_label - 1 for row in lengths.rows], cached, n_label)
        baselines = [n - lengths.shared for n in lengths.baseline_queries if n > lengths.shared]
        return runs, self._query_runs(baselines, cached, 1) if baselines else []

    def replica_captures(self, n_replicas: int) -> StageCost:
        """Return the cost of capturing each replica's finetuned setting on the first queries, side by side."""
        lengths = self.lengths
        few = PromptLengths(
            queries=lengths.queries[:REPLICA_QUERIES],
            start=lengths.start,
            shared=lengths.shared,
            labels=lengths.labels,
            baseline_queries=lengths.baseline_queries,
        )
        at_once = min(n_replicas, REPLICAS_AT_ONCE, self.batch_size)
        batch_size, overhead = self.batch_size // at_once, self.overhead // at_once
        fields = frozenset(METRIC_FIELDS)
        of_one = replace(self, lengths=few, fields=fields, batch_size=batch_size, overhead=overhead)
        stage, (runs, after) = of_one.queries("replicas", lengths.start), of_one._capture_runs(lengths.start)
        n_tokens = sum(run.n_rows * run.length for run in (*of_one._prefix_runs(lengths.start), *runs, *after))
        n_weights = self.shape.projection_weights(PROJECTIONS_TRAINED[self.config.trained])
        flops, kept = n_replicas * (stage.flops + 2 * n_weights * n_tokens), n_replicas * stage.kept
        return StageCost(stage.stage, flops, at_once * (stage.working + 4 * n_weights), kept, runs_model=True)

    def _query_runs(self, rows: Sequence[int], cached: int, n_read: int) -> list[_Run]:
        batches = split_into_batches(rows, self.batch_size, self.overhead)
        return [_Run(len(batch), max(rows[row] for row in batch), cached, n_read) for batch in batches]

    def _flops(self, run: _Run) -> float | int:
        """Return the FLOPs of a pass: the heads' output over a row's own tokens is computed twice, as a check."""
        shape, (n_rows, length, cached, n_read) = self.shape, run
        checked_rows = length if cached else 1  # without a cache, the last row is enough to check
        attended = length * length + checked_rows * length + length * cached
        return n_rows * (
            2 * shape.n_token_weights * length
            + 4 * shape.n_layers * shape.d_attention * attended
            + 2 * shape.n_unembedding_weights * n_read
        )

    def _score_flops(self, runs: Sequence[_Run], n_context: int) -> float | int:
        """Return the FLOPs of the scores that a capture keeps, over the first runs, which are those of the queries."""
        shape, lengths, n_queries = self.shape, self.lengths, len(self.lengths.queries)
        padded = sum(run.n_rows * run.length for run in runs if run.n_read == 1)
        by_field = {
            "context_scores": shape.d_kv * n_queries * n_context,
            "demo_scores": shape.d_attention
            * n_queries
            * (sum(lengths.demonstrations) if n_context > lengths.start else 0),
            "query_scores": shape.d_attention * (n_queries * lengths.shared + padded),
        }
        return 2 * shape.n_layers * sum(n for name, n in by_field.items() if name in self.fields)

    def _working(self, run: _Run) -> float | int:
        """Return the memory of a pass while it runs, in bytes."""
        shape, (n_rows, length, cached, n_read) = self.shape, run
        is_hidden = shape.window is not None and cached + length > shape.window
        written = cached * length if shape.writes_scores or is_hidden else 0
        scores = 2 * shape.n_heads * n_rows * (length**2 + written)
        activations = WORKING_WIDTHS * shape.layer_width * n_rows * length
        return self.arithmetic.itemsize * (scores + activations) + 3 * 4 * n_rows * n_read * shape.d_vocab

    def _kept(self, n_queries: int, n_context: int, fields: Collection[Field]) -> float:
        """Return the bytes of a capture's fields."""
        shape, longest = self.shape, max(self.lengths.queries)
        heads, n_demo = shape.d_attention, max(0, n_context - self.lengths.start)
        by_query = {
            "attn_out": shape.d_model,
            "z": heads,
            "q": heads,
            "q_scored": heads,
            "context_scores": n_context,
            "demo_scores": shape.n_heads * n_demo,
            "query_scores": shape.n_heads * longest,
            "residual_norms": longest,
            "keys_values": 2 * shape.d_kv * (self.lengths.start + longest),
            "stream": shape.d_model,
        }
        numbers = n_queries * shape.n_layers * sum(n for name, n in by_query.items() if name in fields)
        if "keys_values" in fields:
            numbers += 2 * shape.n_layers * shape.d_kv * n_demo
        if "full_prompt" in fields:
            numbers += 2 * shape.n_layers * shape.d_kv * (n_context + self.lengths.queries[0])
        if "next_log_probs" in fields:
            numbers += n_queries * shape.d_vocab
        return float(numbers * max(4, self.arithmetic.itemsize))

    # What is computed from captures, in float64

    def metrics(self, n_replicas: int) -> StageCost:
        """Return the cost of the metrics: products of finetuning's queries and keys with the finetuned model's."""
        shape, lengths, n_queries = self.shape, self.lengths, len(self.lengths.queries)
        n_few = min(REPLICA_QUERIES, n_queries)
        n_products = min(KENDALL_QUERIES, n_queries) + n_replicas * min(KENDALL_QUERIES, n_few)
        flops = 2 * shape.n_layers * (shape.d_attention + shape.d_kv) * n_products * sum(lengths.demonstrations)
        # Six updates of attention's output, and four attention maps.
        numbers = n_queries * shape.n_layers * (6 * shape.d_model + 4 * shape.n_heads * max(lengths.queries))
        return StageCost("metrics", flops, 8.0 * numbers, 0.0, runs_model=False)

    def decomposition(self) -> StageCost:
        """Return the cost of a decomposition, of the queries and of the first one's full prompt."""
        shape, lengths, n_queries = self.shape, self.lengths, len(self.lengths.queries)
        heads, n_demo, longest = shape.d_attention, lengths.context, lengths.start + max(lengths.queries)
        n_groups = 1 + len(lengths.demonstrations)
        through_W_O = 2 * heads * shape.d_model
        split = 4 * heads * longest + 6 * heads * n_demo + 2 * n_demo * n_groups * (shape.n_heads + 1) + 2 * through_W_O
        relaxed = 4 * heads * (n_demo + longest)
        flops = shape.n_layers * (n_queries * (split + relaxed + 2 * through_W_O) + split + through_W_O)
        # Two layers at a time: seven tensors of scores, keys and values; then nine tensors of terms, and W_O.
        scores = 2 * n_queries * (7 * shape.n_heads * n_demo + 2 * shape.d_kv * longest)
        terms = shape.n_layers * (9 * n_queries * heads + heads * shape.d_model)
        return StageCost("decomposition", flops, 8.0 * (scores + terms), 0.0, runs_model=False)
