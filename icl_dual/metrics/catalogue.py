"""The catalogue of metrics: one `Metric` holds everything that comparisons, tables and plots know of a metric.

| name | holds |
|---|---|
| `Metric` | a metric's name, function, axes, baselines, interval, range and drawing |
| `BUILT_IN` | the paper's metrics, their corrected forms and their nulls, in the order of tables |
| `without_massive_tokens` | a metric of the query's own tokens without those that carry massive activations |
| `register_metric` | adds a metric of yours: it is computed, saved, tabled and drawn like those built in |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import checked, of_type
from icl_dual.field_docs import document_fields
from icl_dual.metrics.batch import Batch
from icl_dual.metrics.formulas import (
    TOP_DEMONSTRATIONS,
    TOP_TOKENS,
    changed,
    kendall_random,
    mean_over_heads,
    recall,
    sim_am,
    sim_am_delta,
    sim_am_random,
    sim_aou,
    sim_aou_random,
    sim_aou_unnormalised,
    top_recall_random,
)
from icl_dual.recordings.recordings import Recordings
from icl_dual.statistics.ranks import kendall

Axes = Literal["query", "query layer"]
IntervalRule = Literal["bootstrap", "proportion", "accuracy"]
Need = Literal["training_q", "training_k", "residual_norms"]

ABSENT: dict[Need, str] = {
    "training_q": "it needs finetuning's training queries (pass compare a delta of icl_dual.finetune)",
    "training_k": "it needs finetuning's training keys (the released code records none)",
    "residual_norms": "it needs the norms of the residual stream (the released code records none; capture again)",
}
"""By field of `Recordings` that may be missing: why the metrics that need it are absent from a comparison."""

RANGE_TOLERANCE = 1e-6
"""Values may be this far outside a metric's range: a cosine rounds beyond 1."""


@checked
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
    minus: str = ""
    """The name of a metric that is subtracted query by query where the figure is drawn; none where empty."""
    beside: tuple[str, ...] = ()
    """Names of the metrics that are drawn beside it, in the legend's order; without them, a registered metric is drawn
    with its baselines."""

    def __post_init__(self) -> None:
        if isinstance(self.beside, str):
            raise ValueError(
                f"expected beside as a tuple of names, got the string {self.beside!r}: pass ({self.beside!r},)"
            )


@checked
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
    from_finetuning: bool = True
    """Whether the value depends on the finetuned model: replicas of the finetuning compute it anew, and one that
    diverges has none. Other values stand still."""
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

    @checked
    def missing(self, recordings: Recordings) -> tuple[Need, ...]:
        """Return the fields that the metric needs and the recordings lack."""
        return tuple(name for name in self.needs if getattr(recordings, name) is None)

    @checked
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
        if not of_type(values, Tensor):
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


def without_massive_tokens(metric: Metric, baselines: tuple[str, ...] = ()) -> Metric:
    """Return a metric of the query's own tokens without those that carry massive activations.

    It has the name of the metric with "without massive tokens" after it, and is absent where recordings have no
    residual norms.

    Args:
        metric: a metric of `Batch.m_…` and `Batch.query_mask`.
        baselines: the names of the metrics that it is held against; each must exist without massive tokens as well.
    """

    def function(batch: Batch) -> Tensor:
        return metric.function(batch.without_massive_tokens)

    return replace(
        metric,
        name=_without(metric.name),
        function=function,
        needs=(*metric.needs, "residual_norms"),
        baselines=tuple(map(_without, baselines)),
        headline=False,
        undefined=f"{metric.undefined}, or all tokens are massive",
        released=None,
        released_zeros=False,
        drawing=Drawing(),
        from_finetuning=True,  # which tokens are massive depends on it
    )


def _without(name: str) -> str:
    return f"{name} without massive tokens"


_COSINE, _SHARE = (-1.0, 1.0), (0.0, 1.0)
_NO_UPDATE = "no attention output changes"
_NO_SCORES = "all attention scores are zero"
_NO_CHANGE = "no attention map changes beyond rounding"
_NO_RANKS = "no demonstration is both in context and trained on, or attention to all is equal"
_TOO_FEW = "there are fewer items than are counted"

_OF_QUERY_TOKENS: tuple[Metric, ...] = (
    Metric(
        "SimAM before FT",
        lambda batch: mean_over_heads(sim_am(batch.m_in_context, batch.m_zero_shot)),
        range=_COSINE,
        called="its value before FT",
        undefined=_NO_SCORES,
        released="ZSL SimAM",
        released_zeros=True,
        drawing=Drawing("before FT", color="C1", linestyle="--"),
        from_finetuning=False,
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
            "finetuning",
            axis_label="SimAM after − before\nFT (cosine)",
            figure="SimAM",
            minus="SimAM before FT",
            beside=("SimAM random update",),
        ),
    ),
    Metric(
        "SimAM random",
        lambda batch: mean_over_heads(sim_am_random(batch.m_in_context, seed=batch.streams["SimAM"])),
        range=_COSINE,
        undefined=_NO_SCORES,
        released="Random SimAM",
        released_zeros=True,
        drawing=Drawing("random vector (the paper's)", color="0.5", linestyle=":"),
        from_finetuning=False,
    ),
    Metric(
        "SimAM random update",
        lambda batch: mean_over_heads(sim_am(batch.m_in_context, batch.m_zero_shot + batch.random_m_update)),
        range=_COSINE,
        undefined=_NO_SCORES,
        drawing=Drawing("random update of FT's size", color="0.5", linestyle=":", minus="SimAM before FT"),
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
)
"""The metrics that read attention to the query's own tokens."""

_WITHOUT_MASSIVE_TOKENS = tuple(
    without_massive_tokens(metric, tuple(name for name in metric.baselines if name != "SimAM random"))
    for metric in _OF_QUERY_TOKENS
    if metric.name != "SimAM random"  # uniform numbers, whatever tokens there are
)

BUILT_IN: tuple[Metric, ...] = (
    Metric(
        "ZSL accuracy",
        lambda batch: (batch.labels_zero_shot == batch.gold).double(),
        axes="query",
        from_predictions=True,
        range=_SHARE,
        interval="accuracy",
        called="zero-shot",
        from_finetuning=False,
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
        from_finetuning=False,
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
            "finetuning",
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
        drawing=Drawing("random vector (the paper's)", color="0.5", linestyle=":"),
        from_finetuning=False,
    ),
    Metric("SimAOU random update", lambda batch: batch.output_nulls["update"], range=_COSINE, undefined=_NO_UPDATE),
    Metric(
        "SimAOU inflation null",
        lambda batch: batch.output_nulls["inflation"],
        range=_COSINE,
        undefined=_NO_UPDATE,
        drawing=Drawing("two random updates (inflation)", color="0.3", linestyle="-."),
    ),
    Metric(
        "SimAOU unnormalised",
        lambda batch: sim_aou_unnormalised(batch.h_zero_shot, batch.h_in_context, batch.h_finetuned),
        range=_COSINE,
        baselines=("SimAOU unnormalised random",),
        null=0.0,
        undefined=_NO_UPDATE,
        drawing=Drawing("finetuning, not normalised", color="C1", linestyle="--"),
    ),
    Metric(
        "SimAOU unnormalised random",
        lambda batch: batch.output_nulls["unnormalised"],
        range=_COSINE,
        null=0.0,
        undefined=_NO_UPDATE,
    ),
    *_OF_QUERY_TOKENS,
    *_WITHOUT_MASSIVE_TOKENS,
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
            "by queries of finetuning",
            axis_label="Kendall's τ with ICL attention",
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
        drawing=Drawing("random scores (the paper's)", color="0.5", linestyle=":"),
        from_finetuning=False,
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
        drawing=Drawing("by keys of finetuning", color="C1", linestyle="--"),
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
        from_finetuning=False,
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


@checked
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
    if not of_type(metric, Metric):
        raise TypeError(f"expected a Metric, such as icl.Metric('name', function), got {metric!r}: pass a Metric")
    known = metrics()
    if not metric.name or metric.name in (*known, *figures()):
        raise ValueError(
            f"expected a metric name that is not taken, got {metric.name!r}: choose another, or remove the metric that "
            "you registered with icl_dual.metrics.unregister_metric"
        )
    drawn = (*metric.drawing.beside, *filter(None, [metric.drawing.minus]))
    if unknown := [name for name in (*metric.baselines, *drawn) if name not in known]:
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
