"""The catalogue of metrics: one `Metric` holds everything that comparisons, tables and plots know of a metric.

| name | holds |
|---|---|
| `Metric` | a metric's name, function, axes, baselines, interval, range and drawing |
| `Batch` | what a metric's function reads: attention outputs, scores and labels of some queries, each computed once |
| `BUILT_IN` | the paper's metrics, their corrected forms and their nulls, in the order of tables |
| `register_metric` | adds a metric of yours: it is computed, saved, tabled and drawn like those built in |
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.field_docs import document_fields
from icl_dual.metrics.formulas import (
    NULL_DRAWS,
    ROUNDING,
    TOP_DEMONSTRATIONS,
    TOP_TOKENS,
    by_demonstration,
    changed,
    demonstration_weights,
    finetuning_attention,
    kendall_random,
    mean_over_heads,
    query_by_kv_head,
    random_map_updates,
    random_updates,
    recall,
    sim_am,
    sim_am_delta,
    sim_am_random,
    sim_aou,
    sim_aou_random,
    sim_aou_unnormalised,
    top_recall,
    top_recall_random,
)
from icl_dual.recordings.recordings import Recordings
from icl_dual.statistics.ranks import kendall

Axes = Literal["query", "query layer"]
IntervalRule = Literal["bootstrap", "proportion", "accuracy"]
Need = Literal["training_q", "training_k"]

ABSENT: dict[Need, str] = {
    "training_q": "it needs finetuning's training queries (pass compare a delta of icl_dual.finetune)",
    "training_k": "it needs finetuning's training keys (the released code records none)",
}
"""By field of `Recordings` that may be missing: why the metrics that need it are absent from a comparison."""

RANGE_TOLERANCE = 1e-6
"""Values may be this far outside a metric's range: a cosine rounds beyond 1."""


@document_fields
@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """What a metric's function reads: the recordings of some queries. Each attribute is computed once, when first read.

    `h_…` are attention outputs, `m_…` attention scores over the query's own tokens, both in float64. Queries differ in
    length: `m_…` are zero past a query's end, where `query_mask` is False. Attributes of the demonstrations
    (`token_weights_…`, `demo_weights_…`, `key_scores`) have the batch's first `n_first` queries only.
    """

    gold: Int[Tensor, " query"]
    """The queries' label indices."""
    predictions: dict[str, Int[Tensor, " query"]]
    """By setting (ZSL, ICL, FT): each query's most probable label."""
    source: Recordings | None = None
    """The recordings of all queries; `None` for a metric of predictions alone."""
    queries: Int[Tensor, " query"] | None = None
    """The batch's queries, as indices into the recordings."""
    n_first: int = 0
    """How many of the batch's queries have their attention to the demonstrations compared."""
    seed: int = 0
    """The seed of the random baselines."""
    streams: dict[str, np.random.Generator] = field(default_factory=dict)
    """The random baselines' generators by name, shared by all batches of a comparison."""

    @classmethod
    def of(
        cls,
        recordings: Recordings,
        queries: Int[Tensor, " query"],
        *,
        n_first: int,
        seed: int = 0,
        streams: dict[str, np.random.Generator] | None = None,
    ) -> "Batch":
        """Return the batch of some queries of the recordings.

        Args:
            recordings: the recordings of all queries.
            queries: the batch's queries, as indices into the recordings.
            n_first: how many of them, from the first, have their attention to the demonstrations compared.
            seed: the seed of the random baselines.
            streams: the random baselines' generators by name (`random_streams`), to share between batches; new ones
                from `seed` where not given.
        """
        return cls(
            gold=recordings.gold[queries],
            predictions={setting: labels[queries] for setting, labels in recordings.predictions.items()},
            source=recordings,
            queries=queries,
            n_first=n_first,
            seed=seed,
            streams=random_streams(seed) if streams is None else streams,
        )

    @property
    def recordings(self) -> Recordings:
        """Return the recordings of all queries.

        Raises:
            ValueError: the metric is one of predictions alone.
        """
        if self.source is None:
            raise ValueError(
                "expected a metric with from_predictions=True to read gold labels and predictions only, got one that "
                "reads recordings: register it with from_predictions=False"
            )
        return self.source

    def generator(self, name: str) -> np.random.Generator:
        """Return the generator of a random baseline of yours: it goes on from batch to batch, and is no other's."""
        return self.streams.setdefault(f"registered/{name}", np.random.default_rng([self.seed, *name.encode()]))

    @property
    def n_layers(self) -> int:
        """Return the number of layers."""
        return self.recordings.attn_out["ZSL"].shape[1]

    @property
    def n_heads(self) -> int:
        """Return the number of query heads."""
        return self.recordings.query_scores["ICL"].shape[2]

    @property
    def labels_zero_shot(self) -> Int[Tensor, " query"]:
        """Return the labels predicted zero-shot."""
        return self.predictions["ZSL"]

    @property
    def labels_in_context(self) -> Int[Tensor, " query"]:
        """Return the labels predicted in context."""
        return self.predictions["ICL"]

    @property
    def labels_finetuned(self) -> Int[Tensor, " query"]:
        """Return the labels predicted after finetuning."""
        return self.predictions["FT"]

    @cached_property
    def h_zero_shot(self) -> Float[Tensor, "query layer d_model"]:
        """Return the attention output h_ZSL."""
        return self.recordings.attn_out["ZSL"][self.queries].double()

    @cached_property
    def h_in_context(self) -> Float[Tensor, "query layer d_model"]:
        """Return the attention output h_ICL."""
        return self.recordings.attn_out["ICL"][self.queries].double()

    @cached_property
    def h_finetuned(self) -> Float[Tensor, "query layer d_model"]:
        """Return the attention output h_FT."""
        return self.recordings.attn_out["FT"][self.queries].double()

    @cached_property
    def m_zero_shot(self) -> Float[Tensor, "query layer head token"]:
        """Return the attention scores m_ZSL over the query's own tokens, zero past its end (`query_mask`)."""
        return self.recordings.query_scores["ZSL"][self.queries].double()

    @cached_property
    def m_in_context(self) -> Float[Tensor, "query layer head token"]:
        """Return the attention scores m_ICL over the query's own tokens, zero past its end (`query_mask`)."""
        return self.recordings.query_scores["ICL"][self.queries].double()

    @cached_property
    def m_finetuned(self) -> Float[Tensor, "query layer head token"]:
        """Return the attention scores m_FT over the query's own tokens, zero past its end (`query_mask`)."""
        return self.recordings.query_scores["FT"][self.queries].double()

    @cached_property
    def query_mask(self) -> Bool[Tensor, "query token"]:
        """Return True at the query's own tokens, False past its end, for the tokens of `m_…`.

        The zeros past its end do not change a cosine. They change a mean, a softmax or a correlation.
        """
        n_tokens = self.recordings.query_scores["ZSL"].shape[-1]
        return torch.arange(n_tokens) < self.recordings.query_lengths[self.queries][:, None]

    @cached_property
    def rounding(self) -> float:
        """Return the relative change of attention scores that rounding alone makes, in the recorded weights' type."""
        dtype = getattr(torch, self.recordings.metadata.get("dtype", "float32"))
        return max(ROUNDING, torch.finfo(dtype).eps)

    @cached_property
    def output_nulls(self) -> dict[str, Float[Tensor, "query layer"]]:
        """Return SimAOU and its unnormalised form of updates in random directions: means over `NULL_DRAWS`.

        By name: `update` for a random update of FT's size, `inflation` for random updates of both, `unnormalised`.
        """
        h_zsl, h_icl, h_ft = self.h_zero_shot, self.h_in_context, self.h_finetuned
        names = ("update", "inflation", "unnormalised")
        totals = {name: torch.zeros(h_zsl.shape[:2], dtype=h_zsl.dtype) for name in names}
        r_ft = random_updates(h_ft - h_zsl, seed=self.streams["h_ft"])
        r_icl = random_updates(h_icl - h_zsl, seed=self.streams["h_icl"])
        for of_ft, of_icl in zip(r_ft.unbind(1), r_icl.unbind(1), strict=True):
            random_ft = h_zsl + of_ft
            scores = (
                sim_aou(h_zsl, h_icl, random_ft),
                sim_aou(h_zsl, h_zsl + of_icl, random_ft),
                dual.cosine(h_icl - h_zsl, of_ft.double()),
            )
            for total, score in zip(totals.values(), scores, strict=True):
                total += score / NULL_DRAWS
        return totals

    @cached_property
    def random_m_update(self) -> Float[Tensor, "query layer head token"]:
        """Return a random change of each attention map, as large as finetuning's, over the query's own tokens."""
        change = changed(self.m_zero_shot, self.m_finetuned, self.rounding)
        return random_map_updates(self.m_zero_shot, change, seed=self.streams["m_ft"])

    @cached_property
    def demo_tokens(self) -> Int[Tensor, " demo_token"]:
        """Return the context positions of the demonstrations' tokens, in the order in which they were trained on."""
        segments = self.recordings.segments
        positions = (segments >= 0).nonzero().squeeze(-1)
        return positions[segments[positions].argsort(stable=True)]

    @cached_property
    def demo_steps(self) -> Int[Tensor, " demo_token"]:
        """Return the training step of each of `demo_tokens`."""
        return self.recordings.segments[self.demo_tokens]

    @cached_property
    def trained_tokens(self) -> Int[Tensor, " demo_token"]:
        """Return the positions of the context's demonstrations among the training tokens, ordered as `demo_tokens`."""
        assert self.recordings.training_segments is not None
        return torch.isin(self.recordings.training_segments, self.demo_steps).nonzero().squeeze(-1)

    @cached_property
    def q_finetuned(self) -> Float[Tensor, "query layer d_q"]:
        """Return the first queries' attention queries after finetuning, heads side by side, scaled by 1/√d_head."""
        assert self.queries is not None
        return self.recordings.q[self.queries[: self.n_first]]

    @cached_property
    def token_weights_in_context(self) -> Float[Tensor, "query layer demo_token"]:
        """Return in-context attention to each token of the demonstrations: the softmax of scores summed over heads."""
        assert self.queries is not None
        m = self.recordings.context_scores["ICL"][self.queries[: self.n_first]][..., self.demo_tokens].double()
        return demonstration_weights(m) if len(self.demo_tokens) else m

    @cached_property
    def token_weights_finetuned(self) -> Float[Tensor, "query layer demo_token"]:
        """Return finetuning's attention to the same tokens, by its training queries (`finetuning_attention`)."""
        assert self.recordings.training_q is not None
        m = finetuning_attention(self.recordings.training_q[:, self.trained_tokens], self.q_finetuned)
        return demonstration_weights(m) if len(self.demo_tokens) else m

    @cached_property
    def key_scores(self) -> Float[Tensor, "query layer demo_token"]:
        """Return finetuning's attention scores of the same tokens by its training keys, summed over heads."""
        assert self.recordings.training_k is not None
        keys = self.recordings.training_k
        q = query_by_kv_head(self.q_finetuned, self.n_heads, keys.shape[-1])
        return finetuning_attention(keys[:, self.trained_tokens], q)

    @cached_property
    def demo_weights_in_context(self) -> Float[Tensor, "query layer demo"]:
        """Return in-context attention to each demonstration: `token_weights_in_context` summed within it."""
        return by_demonstration(self.token_weights_in_context, self.demo_steps)

    @cached_property
    def demo_weights_finetuned(self) -> Float[Tensor, "query layer demo"]:
        """Return finetuning's attention to each demonstration: `token_weights_finetuned` summed within it."""
        return by_demonstration(self.token_weights_finetuned, self.demo_steps)

    @cached_property
    def token_recall(self) -> Float[Tensor, "query layer"]:
        """Return the share of ICL's `TOP_TOKENS` most attended tokens that are among FT's."""
        return top_recall(self.token_weights_in_context, self.token_weights_finetuned, TOP_TOKENS)

    @cached_property
    def demo_recall(self) -> Float[Tensor, "query layer"]:
        """Return the share of ICL's `TOP_DEMONSTRATIONS` most attended demonstrations that are among FT's."""
        return top_recall(self.demo_weights_in_context, self.demo_weights_finetuned, TOP_DEMONSTRATIONS)


def random_streams(seed: int) -> dict[str, np.random.Generator]:
    """Return the built-in baselines' generators, one for each, so that the size of batches changes no number."""
    streams = {name: np.random.default_rng(seed) for name in ("SimAOU", "SimAM", "token", "demonstration")}
    # Independent of one another: two of the updates of the inflation null are random at once.
    return streams | {name: np.random.default_rng([seed, at]) for at, name in enumerate(("h_icl", "h_ft", "m_ft"), 1)}


@document_fields
@dataclass(frozen=True)
class Drawing:
    """How `icl_dual.plots.layers` draws a metric."""

    label: str = ""
    """The legend's text; the metric's name where empty."""
    color: str = "C0"
    """A matplotlib colour."""
    linestyle: str = "-"
    """A matplotlib line style."""
    axis_label: str = ""
    """The y axis's text; the metric's name where empty."""
    figure: str = ""
    """The name that `plots.layers` takes for the metric with others beside it; the metric's own name where empty."""
    beside: tuple[str, ...] = ()
    """Names of the metrics that are drawn beside it, in the legend's order; without them, a registered metric is drawn
    with its baselines."""

    def __post_init__(self) -> None:
        if isinstance(self.beside, str):
            raise ValueError(
                f"expected beside as a tuple of names, got the string {self.beside!r}: pass ({self.beside!r},)"
            )


@document_fields
@dataclass(frozen=True)
class Metric:
    """A metric of in-context learning against finetuning, one value for each query, or for each query and layer.

    Example:
        >>> from icl_dual import dual
        >>> Metric(
        ...     "ICL update on h_ZSL",
        ...     lambda batch: dual.cosine(batch.h_in_context - batch.h_zero_shot, batch.h_zero_shot),
        ...     range=(-1, 1),
        ...     null=0.0,
        ... ).axes
        'query layer'
    """

    name: str
    """The name in tables, frames and `Comparison.per_layer`."""
    function: Callable[[Batch], Tensor]
    """Returns the floating-point values of a batch's queries, NaN where undefined."""
    axes: Axes = "query layer"
    """The axes of the values."""
    first_queries: bool = False
    """Whether the values are of the batch's first `n_first` queries only, as attention to the demonstrations is."""
    from_predictions: bool = False
    """Whether the function reads gold labels and predictions only. Such a metric, by `query`, is not saved: comparisons
    compute it from their predictions, also those saved before it was registered."""
    needs: tuple[Need, ...] = ()
    """Fields of `Recordings` that may be `None`; where one is, the metric is absent."""
    baselines: tuple[str, ...] = ()
    """Names of the metrics that it is held against, the one of its verdict first."""
    null: float | int | None = None
    """The value that chance gives, which a metric without baselines is held against; `None` where there is no such."""
    range: tuple[float | int, float | int] = (-float("inf"), float("inf"))
    """The least and the largest possible value."""
    interval: IntervalRule = "bootstrap"
    """The method of the 95 % interval: `bootstrap` over queries; `proportion`, Wilson's, for a share of few queries;
    `accuracy`, the bootstrap, but Wilson's for one task's value of 0 or 1, to which the bootstrap gives no width."""
    headline: bool = False
    """Whether a printed comparison has a row with its value, baseline and verdict."""
    called: str = "its null"
    """What a verdict calls the metric where another is held against it."""
    undefined: str = "no query has a value"
    """Why it is undefined where no query has a value."""
    released: str | None = None
    """The name that the released scripts give it; `None` where they have no such metric."""
    released_zeros: bool = False
    """Whether the released scripts count an undefined value as 0."""
    drawing: Drawing = Drawing()
    """How `icl_dual.plots.layers` draws it."""

    def __post_init__(self) -> None:
        expected = f"metric {self.name!r}: expected"
        for name, options in {"axes": get_args(Axes), "interval": get_args(IntervalRule)}.items():
            if (value := getattr(self, name)) not in options:
                raise ValueError(f"{expected} {name} out of {options}, got {value!r}: choose one of these")
        for name in ("baselines", "needs"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{expected} {name} as a tuple of names, got the string {value!r}: pass ({value!r},)")
        if unknown := [name for name in self.needs if name not in get_args(Need)]:
            raise ValueError(f"{expected} needs out of {get_args(Need)}, got {unknown}: choose among these")
        if len(self.range) != 2 or not self.range[0] < self.range[1]:
            raise ValueError(
                f"{expected} range as the least and the largest possible value, got {self.range!r}: pass the smaller "
                "first, such as (-1, 1)"
            )

    def missing(self, recordings: Recordings) -> tuple[Need, ...]:
        """Return the fields that the metric needs and the recordings lack."""
        return tuple(name for name in self.needs if getattr(recordings, name) is None)

    def values(self, batch: Batch) -> Tensor:
        """Return the values of a batch's queries.

        Raises:
            ValueError: the function returns no floating-point tensor with the metric's axes, or a value out of range.
        """
        try:
            values = self.function(batch)
        except Exception as error:
            error.add_note(f"raised by the function of the metric {self.name!r}: correct it and register it again")
            raise
        shape = [batch.n_first if self.first_queries else len(batch.gold)]
        shape += [batch.n_layers] if self.axes == "query layer" else []
        expected = (
            f"metric {self.name!r}: expected its function to return a floating-point tensor [{self.axes}] = {shape}"
        )
        advice = f"return one value for each {self.axes.replace(' ', ' and ')}, NaN where it is undefined"
        if not isinstance(values, Tensor):
            raise ValueError(f"{expected}, got {type(values).__name__}: {advice}")
        if list(values.shape) != shape or not values.is_floating_point():
            raise ValueError(f"{expected}, got {values.dtype} of shape {list(values.shape)}: {advice}")
        low, high = self.range
        outside = values[(values < low - RANGE_TOLERANCE) | (values > high + RANGE_TOLERANCE)]
        if len(outside):
            raise ValueError(
                f"metric {self.name!r}: expected values from {low} to {high}, got {outside[0]:.6g}: correct its "
                "function, or register it with the range that it has"
            )
        return values


_COSINE, _SHARE = (-1.0, 1.0), (0.0, 1.0)
_NO_UPDATE = "no attention output changes"
_NO_SCORES = "all attention scores are zero"
_NO_CHANGE = "no attention map changes beyond rounding"
_NO_RANKS = "no demonstration is both in context and trained on, or attention to all is equal"
_TOO_FEW = "there are fewer items than are counted"

BUILT_IN: tuple[Metric, ...] = (
    Metric(
        "ZSL accuracy",
        lambda batch: (batch.labels_zero_shot == batch.gold).double(),
        axes="query",
        from_predictions=True,
        range=_SHARE,
        interval="accuracy",
        called="zero-shot",
    ),
    Metric(
        "ICL accuracy",
        lambda batch: (batch.labels_in_context == batch.gold).double(),
        axes="query",
        from_predictions=True,
        range=_SHARE,
        interval="accuracy",
        baselines=("ZSL accuracy",),
        headline=True,
    ),
    Metric(
        "FT accuracy",
        lambda batch: (batch.labels_finetuned == batch.gold).double(),
        axes="query",
        from_predictions=True,
        range=_SHARE,
        interval="accuracy",
        baselines=("ZSL accuracy",),
    ),
    Metric(
        "Rec2FTP",
        lambda batch: recall(batch.gold, batch.labels_zero_shot, batch.labels_in_context, batch.labels_finetuned),
        axes="query",
        from_predictions=True,
        range=_SHARE,
        interval="proportion",
        baselines=("Rec2FTP random",),
        headline=True,
        undefined="finetuning corrects nothing",
    ),
    Metric(
        "Rec2FTP random",
        lambda batch: recall(
            batch.gold, batch.labels_zero_shot, batch.labels_in_context, batch.labels_finetuned, dealt=True
        ),
        axes="query",
        from_predictions=True,
        range=_SHARE,
        interval="proportion",
        undefined="finetuning corrects nothing",
    ),
    Metric(
        "SimAOU",
        lambda batch: sim_aou(batch.h_zero_shot, batch.h_in_context, batch.h_finetuned),
        range=_COSINE,
        baselines=("SimAOU random update", "SimAOU inflation null", "SimAOU random"),
        headline=True,
        undefined=_NO_UPDATE,
        released="SimAOU",
        released_zeros=True,
        drawing=Drawing(
            "ICL and FT",
            axis_label="SimAOU (cosine)",
            beside=("SimAOU unnormalised", "SimAOU inflation null", "SimAOU random"),
        ),
    ),
    Metric(
        "SimAOU random",
        lambda batch: sim_aou_random(batch.h_zero_shot, batch.h_in_context, seed=batch.streams["SimAOU"]),
        range=_COSINE,
        undefined=_NO_UPDATE,
        released="Random SimAOU",
        released_zeros=True,
        drawing=Drawing("ICL and random", color="0.5", linestyle=":"),
    ),
    Metric("SimAOU random update", lambda batch: batch.output_nulls["update"], range=_COSINE, undefined=_NO_UPDATE),
    Metric(
        "SimAOU inflation null",
        lambda batch: batch.output_nulls["inflation"],
        range=_COSINE,
        undefined=_NO_UPDATE,
        drawing=Drawing("random updates for both", color="0.3", linestyle="-."),
    ),
    Metric(
        "SimAOU unnormalised",
        lambda batch: sim_aou_unnormalised(batch.h_zero_shot, batch.h_in_context, batch.h_finetuned),
        range=_COSINE,
        baselines=("SimAOU unnormalised random",),
        null=0.0,
        undefined=_NO_UPDATE,
        drawing=Drawing("unnormalised", color="C2", linestyle="--"),
    ),
    Metric(
        "SimAOU unnormalised random",
        lambda batch: batch.output_nulls["unnormalised"],
        range=_COSINE,
        null=0.0,
        undefined=_NO_UPDATE,
    ),
    Metric(
        "SimAM before FT",
        lambda batch: mean_over_heads(sim_am(batch.m_in_context, batch.m_zero_shot)),
        range=_COSINE,
        called="its value before FT",
        undefined=_NO_SCORES,
        released="ZSL SimAM",
        released_zeros=True,
        drawing=Drawing("ICL and ZSL (before FT)", color="C1", linestyle="--"),
    ),
    Metric(
        "SimAM after FT",
        lambda batch: mean_over_heads(sim_am(batch.m_in_context, batch.m_finetuned)),
        range=_COSINE,
        baselines=("SimAM before FT", "SimAM random update", "SimAM random"),
        headline=True,
        undefined=_NO_SCORES,
        released="SimAM",
        released_zeros=True,
        drawing=Drawing(
            "ICL and FT",
            axis_label="SimAM (cosine)",
            figure="SimAM",
            beside=("SimAM before FT", "SimAM random"),
        ),
    ),
    Metric(
        "SimAM random",
        lambda batch: mean_over_heads(sim_am_random(batch.m_in_context, seed=batch.streams["SimAM"])),
        range=_COSINE,
        undefined=_NO_SCORES,
        released="Random SimAM",
        released_zeros=True,
        drawing=Drawing("ICL and random", color="0.5", linestyle=":"),
    ),
    Metric(
        "SimAM random update",
        lambda batch: mean_over_heads(sim_am(batch.m_in_context, batch.m_zero_shot + batch.random_m_update)),
        range=_COSINE,
        undefined=_NO_SCORES,
    ),
    Metric(
        "SimAMΔ",
        lambda batch: sim_am_delta(
            batch.m_zero_shot, batch.m_in_context, batch.m_finetuned, rounding=batch.rounding
        ).nanmean(-1),
        range=_COSINE,
        baselines=("SimAMΔ random",),
        null=0.0,
        undefined=_NO_CHANGE,
    ),
    Metric(
        "SimAMΔ random",
        lambda batch: dual.cosine(
            changed(batch.m_zero_shot, batch.m_in_context, batch.rounding), batch.random_m_update
        ).nanmean(-1),
        range=_COSINE,
        null=0.0,
        undefined=_NO_CHANGE,
    ),
    Metric(
        "Kendall",
        lambda batch: kendall(batch.token_weights_in_context, batch.token_weights_finetuned),
        first_queries=True,
        needs=("training_q",),
        range=_COSINE,
        baselines=("Kendall random",),
        null=0.0,
        headline=True,
        undefined=_NO_RANKS,
        released="token-level kendall",
        drawing=Drawing(
            "ICL and FT, by its queries",
            axis_label="Kendall's τ",
            beside=("Kendall on keys", "Kendall random"),
        ),
    ),
    Metric(
        "Kendall random",
        lambda batch: kendall_random(batch.token_weights_in_context, seed=batch.streams["token"]),
        first_queries=True,
        needs=("training_q",),
        range=_COSINE,
        null=0.0,
        undefined=_NO_RANKS,
        released="token-level random_kendall",
        drawing=Drawing("ICL and random", color="0.5", linestyle=":"),
    ),
    Metric(
        "Kendall on keys",
        lambda batch: kendall(batch.token_weights_in_context, batch.key_scores),
        first_queries=True,
        needs=("training_q", "training_k"),
        range=_COSINE,
        baselines=("Kendall random",),
        null=0.0,
        undefined=_NO_RANKS,
        drawing=Drawing("by its keys", color="C2", linestyle="--"),
    ),
    Metric(
        "Kendall by demonstration",
        lambda batch: kendall(batch.demo_weights_in_context, batch.demo_weights_finetuned),
        first_queries=True,
        needs=("training_q",),
        range=_COSINE,
        baselines=("Kendall by demonstration random",),
        null=0.0,
        undefined=_NO_RANKS,
        released="example-level kendall",
    ),
    Metric(
        "Kendall by demonstration random",
        lambda batch: kendall_random(batch.demo_weights_in_context, seed=batch.streams["demonstration"]),
        first_queries=True,
        needs=("training_q",),
        range=_COSINE,
        null=0.0,
        undefined=_NO_RANKS,
        released="example-level random_kendall",
    ),
    Metric(
        f"Top-{TOP_TOKENS} recall",
        lambda batch: batch.token_recall,
        first_queries=True,
        needs=("training_q",),
        range=_SHARE,
        baselines=(f"Top-{TOP_TOKENS} recall random",),
        undefined=_TOO_FEW,
        released="token-level recall_topk",
    ),
    Metric(
        f"Top-{TOP_TOKENS} recall random",
        lambda batch: top_recall_random(batch.token_recall, TOP_TOKENS, batch.token_weights_in_context.shape[-1]),
        first_queries=True,
        needs=("training_q",),
        range=_SHARE,
        undefined=_TOO_FEW,
        released="token-level random_recall_topk",
    ),
    Metric(
        f"Top-{TOP_DEMONSTRATIONS} recall by demonstration",
        lambda batch: batch.demo_recall,
        first_queries=True,
        needs=("training_q",),
        range=_SHARE,
        baselines=(f"Top-{TOP_DEMONSTRATIONS} recall by demonstration random",),
        undefined=_TOO_FEW,
        released="example-level recall_topk",
    ),
    Metric(
        f"Top-{TOP_DEMONSTRATIONS} recall by demonstration random",
        lambda batch: top_recall_random(batch.demo_recall, TOP_DEMONSTRATIONS, batch.demo_weights_in_context.shape[-1]),
        first_queries=True,
        needs=("training_q",),
        range=_SHARE,
        undefined=_TOO_FEW,
        released="example-level random_recall_topk",
    ),
)
"""The metrics that every comparison has, in the order of its tables."""

_registered: dict[str, Metric] = {}


def metrics() -> dict[str, Metric]:
    """Return all metrics by name: those built in, then the registered ones in their order."""
    return {metric.name: metric for metric in BUILT_IN} | _registered


def layer_metrics() -> tuple[str, ...]:
    """Return the names of the metrics that have a value for each query and layer, in the order of tables."""
    return tuple(name for name, metric in metrics().items() if metric.axes == "query layer")


def figures() -> dict[str, Metric]:
    """Return the metrics that are drawn with others beside them, by the name that `icl_dual.plots.layers` takes."""
    return {m.drawing.figure or name: m for name, m in metrics().items() if m.drawing.figure or m.drawing.beside}


def register_metric(metric: Metric) -> Metric:
    """Add a metric to those that comparisons compute, save, table and draw, and return it.

    Comparisons made or loaded before do not have it, unless it is one of predictions alone.

    Args:
        metric: of a name that is not taken. The metrics that it names as baselines or in its drawing come first.

    Raises:
        TypeError: it is no `Metric`.
        ValueError: the name is taken or empty, a metric that it names is not registered, or its flags contradict its
            axes.

    Example:
        >>> from icl_dual import dual
        >>> metric = register_metric(
        ...     Metric("FT update on h_ZSL", lambda b: dual.cosine(b.h_finetuned - b.h_zero_shot, b.h_zero_shot))
        ... )
        >>> metric.name in metrics()
        True
        >>> unregister_metric(metric.name)
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"expected a Metric, such as icl.Metric('name', function), got {metric!r}: pass a Metric")
    known = metrics()
    if not metric.name or metric.name in (*known, *figures()):
        raise ValueError(
            f"expected a metric name that is not taken, got {metric.name!r}: choose another, or remove the metric that "
            "you registered with icl_dual.metrics.unregister_metric"
        )
    if unknown := [name for name in (*metric.baselines, *metric.drawing.beside) if name not in known]:
        raise ValueError(
            f"expected registered metrics as baselines and beside {metric.name!r}, got {unknown}: register these first"
        )
    if metric.from_predictions and (metric.axes != "query" or metric.first_queries or metric.needs):
        raise ValueError(
            f"expected metric {metric.name!r} from predictions alone to have axes='query' and no needs, got "
            f"axes={metric.axes!r}, first_queries={metric.first_queries} and needs={metric.needs}: set "
            "from_predictions=False, or leave the others out"
        )
    _registered[metric.name] = metric
    return metric


def unregister_metric(name: str) -> None:
    """Remove a metric that was registered.

    Raises:
        ValueError: there is no such registered metric.
    """
    if name not in _registered:
        raise ValueError(
            f"expected the name of a metric that you registered, out of {list(_registered)}, got {name!r}: choose one "
            "of these"
        )
    del _registered[name]
