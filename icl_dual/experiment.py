"""One experiment: the zero-shot, in-context and finetuned settings of one model on the same queries.

`run_experiment` finetunes, captures the three settings and returns an `Experiment`, which is compared, decomposed and
saved as one object. The steps remain available one by one: `finetune`, `capture`, `compare`, `decompose`,
`compare_updates`.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from icl_dual.arguments import Count, Seed, checked
from icl_dual.captures.capture import (
    DECOMPOSE_FIELDS,
    METRIC_FIELDS,
    Capture,
    Field,
    capture,
    capture_changed,
    check_capture_arguments,
)
from icl_dual.decomposition import Decomposition, decompose
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig
from icl_dual.finetuning.replicas import (
    REPLICA_QUERIES,
    REPLICAS,
    REPLICAS_AT_ONCE,
    Finetuned,
    check_replicas,
    finetune_with_replicas,
)
from icl_dual.finetuning.weight_delta import WeightDelta, changes_of
from icl_dual.html_tables import Line, lines_table
from icl_dual.massive_activations import MASSIVE_RATIO, MassiveActivations, find_massive_activations
from icl_dual.metrics.comparison import Comparison, compare, with_stability
from icl_dual.models import Model, NonFiniteError
from icl_dual.models.journal import exclusive
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.recordings.recordings import REQUIRED_FIELDS, Recordings
from icl_dual.results import check_count, check_names, check_values
from icl_dual.storage import NOT_SAVED, Saved
from icl_dual.torch_utils import is_out_of_memory, to_list, vector_norm
from icl_dual.updates import UpdateComparison, compare_updates

log = logging.getLogger(__name__)

Setting = Literal["ZSL", "ICL", "FT"]
"""The three settings: zero-shot, in-context learning, finetuned."""

UPDATE_FIELDS: tuple[Field, ...] = ("attn_out", "q_scored", "keys_values")
"""The fields that `compare_updates` needs; `DECOMPOSE_FIELDS` has them all."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class Experiment(Saved):
    """The three settings of one model on the same queries, and the finetuning.

    Made by `run_experiment`. It saves into a folder and loads from it again, without the model.
    """

    zero_shot: Capture
    """The queries without demonstrations."""
    in_context: Capture
    """The same queries after the demonstrations."""
    finetuned: Capture
    """The queries without demonstrations, with `delta` applied to the model."""
    delta: WeightDelta
    """The change of weights by finetuning."""
    steps: tuple[int, ...] | None = None
    """For a control with other demonstrations in context than finetuning had: the training step that each demonstration
    in context corresponds to, −1 for none. `None` where both are the same."""
    replicas: dict[str, Recordings] = field(default_factory=dict[str, Recordings])
    """By replica of the finetuning: what the metrics are computed from, for its first queries. Empty where the
    experiment finetuned once."""
    diverged: dict[str, str] = field(default_factory=dict[str, str])
    """By replica of the finetuning that diverged: the error."""
    replica_names: tuple[str, ...] = ()
    """The names of all replicas in order, those that diverged included."""
    model: Model | None = field(default=None, compare=False, metadata=NOT_SAVED)
    """The model that was captured; `None` after loading, and in a copy or pickle."""

    def __post_init__(self) -> None:
        captures = {**self._captures, "finetuned": self.finetuned}
        n_layers = len(self.delta.W_K)
        for name, captured in captures.items():
            if captured.model != self.delta.model:
                raise ValueError(
                    f"expected {name} and delta of one model, got {captured.model!r} and {self.delta.model!r}: take "
                    "both from one run"
                )
            if captured.attn_out is not None:
                check_count(f"layers in {name}", captured.attn_out.shape[1], "delta", n_layers)
            if name != "in_context" and captured.prompts != self.in_context.prompts.zero_shot():
                raise ValueError(
                    f"expected {name} with the queries of in_context, got {captured.prompts} and "
                    f"{self.in_context.prompts}, which differ: take both from one run"
                )
        check_names("replica_names", self.replica_names, (*self.replicas, *self.diverged))
        if self.steps is not None:
            check_count(
                "steps", len(self.steps), "demonstrations in context", len(self.in_context.prompts.demonstrations)
            )
            check_values(self, "steps", low=-1)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle has: all but the model, as after loading."""
        return {**vars(self), "model": None}

    @checked
    def compare(self, *, seed: Seed = 0) -> Comparison:
        """Compare in-context learning with finetuning by the paper's metrics, query by query and layer by layer.

        Each metric carries its spread over replicas of the finetuning, where the experiment has any.

        Args:
            seed: the seed of the random baselines.

        Raises:
            ValueError: the experiment was run without `METRIC_FIELDS`.
        """
        self._check_fields("compare", REQUIRED_FIELDS, REQUIRED_FIELDS, REQUIRED_FIELDS)
        comparison = compare(**self._captures, finetuned=self.finetuned, delta=self.delta, steps=self.steps, seed=seed)
        replicas = {**self.replicas, **self.diverged}
        return with_stability(comparison, {name: replicas[name] for name in self.replica_names}, seed=seed)

    @checked
    def decompose(self, model: Model | None = None) -> Decomposition:
        """Split in-context attention at every layer and head into its zero-shot part and ΔICL.

        Args:
            model: the model that was captured, with the weights it had; not needed before the experiment is loaded from
                a folder.

        Raises:
            ValueError: the experiment was run without `DECOMPOSE_FIELDS`, or was loaded and no model is given, or the
                model has other weights now.
            UnsupportedModelError: the terms do not add up to the model's own attention output.
        """
        self._check_fields("decompose", ("attn_out", "z"), DECOMPOSE_FIELDS)
        return decompose(self._model("decompose", model), **self._captures)

    @checked
    def updates(
        self, model: Model | None = None, *, rank: Count = 4, seed: Seed = 0, progress: bool = True
    ) -> UpdateComparison:
        """Compare ΔW_ICL with ΔW_FT as matrices, at every query, layer and head.

        Args:
            model: the model that was captured, with the weights it had; not needed before the experiment is loaded from
                a folder. It runs the zero-shot prompts twice.
            rank: the number of leading singular directions that are compared by principal angles.
            seed: the seed of the null's directions.
            progress: show a progress bar.

        Raises:
            ValueError: the experiment was run without `DECOMPOSE_FIELDS`, or was loaded and no model is given; or
                `compare_updates` refuses the captures, the delta or the rank.
            UnsupportedModelError: the prompts, moved to their in-context positions, do not repeat the zero-shot run.
        """
        self._check_fields("updates", ("attn_out",), UPDATE_FIELDS)
        model = self._model("updates", model)
        return compare_updates(model, **self._captures, delta=self.delta, rank=rank, seed=seed, progress=progress)

    def recordings(self) -> Recordings:
        """Return what the metrics are computed from, as `icl_dual.compare_recordings` reads it.

        Raises:
            ValueError: the experiment was run without `METRIC_FIELDS`.
        """
        self._check_fields("recordings", REQUIRED_FIELDS, REQUIRED_FIELDS, REQUIRED_FIELDS)
        return Recordings.of(**self._captures, finetuned=self.finetuned, delta=self.delta, steps=self.steps)

    @checked
    def massive_activations(self, *, ratio: float | int = MASSIVE_RATIO) -> MassiveActivations:
        """Find the queries' tokens whose residual norm is far above the median, by layer and setting.

        Args:
            ratio: how many times the median of its layer and setting a token's norm must exceed.

        Raises:
            ValueError: the experiment was run without the field `residual_norms`, or the ratio is not above 1.
        """
        needed: tuple[Field, ...] = ("residual_norms",)
        self._check_fields("massive_activations", needed, needed, needed)
        return find_massive_activations(**self._captures, finetuned=self.finetuned, ratio=ratio)

    @property
    def _captures(self) -> dict[str, Capture]:
        return {"zero_shot": self.zero_shot, "in_context": self.in_context}

    def _model(self, method: str, model: Model | None) -> Model:
        """Return the model given, or the one that was captured."""
        model = self.model if model is None else model
        if model is None:
            raise ValueError(
                "expected a model, got none: an experiment that was loaded has none, so pass the model that was "
                f"captured, experiment.{method}(model)"
            )
        return model

    def _check_fields(
        self,
        method: str,
        zero_shot: Collection[Field],
        in_context: Collection[Field],
        finetuned: Collection[Field] = (),
    ) -> None:
        """Raise a ValueError unless each capture has the fields that a method needs; says which to request."""
        needed = {"zero_shot": zero_shot, "in_context": in_context, "finetuned": finetuned}
        for setting, fields in needed.items():
            missing = [name for name in fields if getattr(getattr(self, setting), name) is None]
            if missing:
                group = (
                    "METRIC_FIELDS" if set(missing) <= {*METRIC_FIELDS} - {*DECOMPOSE_FIELDS} else "DECOMPOSE_FIELDS"
                )
                raise ValueError(
                    f"expected captures with the fields {tuple(fields)} for {method}(), got {setting} without "
                    f"{missing}: run the experiment with fields=icl_dual.{group}, or with "
                    "fields=icl_dual.METRIC_FIELDS + icl_dual.DECOMPOSE_FIELDS for all methods"
                )

    def _repr_html_(self) -> str:
        lines: list[Line] = []
        for name in ("zero_shot", "in_context", "finetuned"):
            counts = getattr(self, name).predictions.bincount(minlength=len(self.in_context.prompts.labels))
            lines.append(Line(f"predictions, {name}", f"label={len(counts)}", "label", to_list(counts)))
        lines += [
            Line("loss before each step", f"step={len(self.delta.losses)}", "step", to_list(self.delta.losses)),
            *(
                Line(f"‖Δ{name}‖", f"layer={len(delta)}", "layer", to_list(vector_norm(delta, dim=(1, 2))))
                for name, delta in (("W_K", self.delta.W_K), ("W_V", self.delta.W_V))
            ),
        ]
        return lines_table(repr(self), lines)

    def __repr__(self) -> str:
        prompts = self.in_context.prompts
        accuracies = {name: getattr(self, name).accuracy for name in ("zero_shot", "in_context", "finetuned")}
        return (
            f"Experiment({self.in_context.model!r}, {len(prompts.queries)} queries, {len(prompts.demonstrations)} "
            f"demonstrations, {'finetuned elsewhere' if self.delta.lr is None else f'lr={self.delta.lr}'}, accuracy: "
            f"{', '.join(f'{name}={value:.3f}' for name, value in accuracies.items())})"
        )


@checked
def run_experiment(
    model: Model,
    prompts: Prompts,
    *,
    lr: float | None = None,
    config: FinetuneConfig = PAPER_FINETUNING,
    replicas: int = REPLICAS,
    fields: Collection[Field] = METRIC_FIELDS,
    factors: bool = False,
    delta: WeightDelta | None = None,
    finetune_prompts: Prompts | None = None,
    steps: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Experiment:
    """Finetune a model on the demonstrations, and capture its zero-shot, in-context and finetuned settings.

    Args:
        model: the model to run; it comes back as it was.
        prompts: the queries with their demonstrations.
        lr: the learning rate of finetuning; `None` only where `delta` is given.
        config: the loss, the method and the trained projections of finetuning; the paper's by default.
        replicas: how often to repeat the finetuning at slightly other rates from slightly other weights, which shows
            how stable each metric is: at least 2, or 0 for none. Without `METRIC_FIELDS`, or with a `delta`, there are
            none.
        fields: the fields of every capture: `METRIC_FIELDS` for `.compare()`, `DECOMPOSE_FIELDS` for `.decompose()` and
            `.updates()`, `METRIC_FIELDS + DECOMPOSE_FIELDS` for all three.
        factors: keep the outer products that the delta of keys and values is the sum of.
        delta: a change of this model's weights made before, which is captured in place of a new finetuning.
        finetune_prompts: prompts with other demonstrations to finetune on, for a control; by default
            those of `prompts`.
        steps: for a control, the training step that each demonstration in context corresponds to, −1 for none
            (`icl_dual.contexts.matching_training_steps`).
        batch_size: the largest number of queries to run at once.
        progress: show progress bars.

    Returns:
        The experiment, which keeps a reference to the model.

    Raises:
        ValueError: both or none of `lr` and `delta` are given, `replicas` is 1 or negative, or an argument that
            `finetune` or `capture` refuses.
        PromptError: the prompts are incomplete, or the model cannot read them.
        DivergedError: finetuning diverged; nothing was captured then.
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks to rounding level.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> model = tiny_model()  # or icl_dual.load_model("smollm2-135m")
        >>> prompts = icl_dual.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(5))
        >>> fields = icl_dual.METRIC_FIELDS + icl_dual.DECOMPOSE_FIELDS
        >>> experiment = icl_dual.run_experiment(model, prompts, lr=0.01, fields=fields, progress=False)
        >>> experiment.in_context.axes("attn_out")
        {'query': 5, 'layer': 2, 'd_model': 32}
        >>> experiment.compare(seed=1).per_layer["SimAOU"].shape
        torch.Size([5, 2])
        >>> experiment.decompose().residuals.split.max().item() < 1e-5
        True
    """
    _check_arguments(lr, config, factors, delta, finetune_prompts)
    check_replicas(replicas)
    check_capture_arguments(fields, batch_size)
    check_prompts(model, prompts)
    zero_shot = prompts.zero_shot()
    # Finetuning first: a learning rate that diverges then costs no captures.
    if delta is None:
        assert lr is not None
        finetuned = finetune_with_replicas(
            model,
            prompts if finetune_prompts is None else finetune_prompts,
            lr=lr,
            replicas=replicas if set(METRIC_FIELDS) <= set(fields) else 0,
            config=config,
            factors=factors,
            progress=progress,
        )
    else:
        finetuned = Finetuned(delta)

    def run(setting: Setting, setting_prompts: Prompts) -> Capture:
        return capture(model, setting_prompts, fields=fields, batch_size=batch_size, progress=progress)

    steps = None if steps is None else tuple(steps)
    experiment = capture_settings(model, prompts, zero_shot, finetuned.delta, run, steps=steps)
    captures = capture_replicas(model, zero_shot, finetuned.replicas, batch_size=batch_size, progress=progress)
    return add_replicas(experiment, finetuned, captures)


@exclusive
def capture_settings(
    model: Model,
    in_context: Prompts,
    zero_shot: Prompts,
    delta: WeightDelta,
    run: Callable[[Setting, Prompts], Capture],
    *,
    steps: tuple[int, ...] | None = None,
) -> Experiment:
    """Capture the three settings with a finetuning that is made already.

    Args:
        model: the model to run; it comes back as it was.
        in_context: the queries with their demonstrations.
        zero_shot: the same queries without.
        delta: the change of weights by finetuning.
        run: captures a setting (`ICL`, `ZSL` or `FT`) of prompts, with the model as it is when called.
        steps: for a control, as in `run_experiment`.
    """
    in_context_capture, zero_shot_capture = run("ICL", in_context), run("ZSL", zero_shot)
    with delta.applied(model):
        finetuned_capture = run("FT", zero_shot)
    return Experiment(
        zero_shot=zero_shot_capture,
        in_context=in_context_capture,
        finetuned=finetuned_capture,
        delta=delta,
        steps=steps,
        model=model,
    )


@exclusive
def capture_replicas(
    model: Model, zero_shot: Prompts, deltas: Mapping[str, WeightDelta], *, batch_size: int = 64, progress: bool = True
) -> dict[str, Capture | NonFiniteError]:
    """Capture the finetuned setting of each replica, on the first queries: side by side where that can be.

    Args:
        model: the model to run; it comes back as it was.
        zero_shot: the queries without demonstrations.
        deltas: by replica, the change of weights by finetuning.
        batch_size: the largest number of queries to run at once.
        progress: show progress bars.

    Returns:
        By replica: its capture, or the error that says where its activations overflow.
    """
    prompts, names, captures = zero_shot.first(REPLICA_QUERIES), list(deltas), dict[str, Capture | NonFiniteError]()
    at_once = min(REPLICAS_AT_ONCE, batch_size) if _share_batches(model, deltas.values()) else 1
    for first in range(0, len(names), at_once):
        group = {name: deltas[name] for name in names[first : first + at_once]}
        captures |= _captured_together(model, prompts, group, batch_size, progress) if len(group) > 1 else {}
    for name in names:
        if name in captures:
            continue
        with deltas[name].applied(model):
            try:
                captures[name] = capture(model, prompts, batch_size=batch_size, progress=progress)
            except NonFiniteError as error:
                captures[name] = error.with_traceback(None)
    return {name: captures[name] for name in names}


def _captured_together(
    model: Model, prompts: Prompts, deltas: Mapping[str, WeightDelta], batch_size: int, progress: bool
) -> dict[str, Capture]:
    """Capture several deltas side by side; none where an activation overflows, or memory runs out."""
    try:
        changes = changes_of(model, deltas.values())
        captured = capture_changed(model, prompts, changes, batch_size=batch_size, progress=progress)
        return dict(zip(deltas, captured, strict=True))
    except NonFiniteError:
        log.info("capturing replicas one by one: activations of one of %s overflow", ", ".join(deltas))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("%d replicas do not fit in memory side by side: capturing them one by one", len(deltas))
    return {}


def _share_batches(model: Model, deltas: Iterable[WeightDelta]) -> bool:
    """Return whether rows with different deltas can run in one batch of a model.

    Hooks of others, and changes of MLPs, may depend on which rows run together.
    """
    depends_on_rows = model.mlp_changes or model.run_checks or model.foreign_hooks()
    is_rounded = any(delta.rounded for delta in deltas)  # into weights, which all rows share
    return model.supports_projection_deltas and not (depends_on_rows or is_rounded)


def add_replicas(
    experiment: Experiment, finetuned: Finetuned, captures: Mapping[str, Capture | NonFiniteError]
) -> Experiment:
    """Return an experiment with what the metrics of each replica of its finetuning are computed from.

    Args:
        experiment: the experiment of the finetuning itself.
        finetuned: the finetuning with its replicas.
        captures: by replica that did not diverge, its finetuned setting (`capture_replicas`).
    """
    zero_shot, in_context = (
        setting.first(REPLICA_QUERIES) for setting in (experiment.zero_shot, experiment.in_context)
    )
    # As wide as the run's own: the random baselines draw a number for each token of the longest query.
    n_tokens = max(map(len, experiment.in_context.prompts.shared_query_tokens))
    recordings, diverged = {}, dict(finetuned.diverged)
    for name, captured in captures.items():
        if isinstance(captured, NonFiniteError):
            diverged[name] = str(captured)
        else:
            recordings[name] = Recordings.of(
                zero_shot=zero_shot,
                in_context=in_context,
                finetuned=captured,
                delta=finetuned.replicas[name],
                steps=experiment.steps,
            ).padded(n_tokens)
    return replace(experiment, replicas=recordings, diverged=diverged, replica_names=tuple(finetuned.names))


def _check_arguments(
    lr: float | None,
    config: FinetuneConfig,
    factors: bool,
    delta: WeightDelta | None,
    finetune_prompts: Prompts | None,
) -> None:
    """Raise a ValueError unless the arguments say in one way how the weights change."""
    if lr is None and delta is None:
        raise ValueError("expected lr or delta, got neither: pass the learning rate of finetuning, such as lr=0.001")
    if delta is not None:
        settings = {
            "lr": lr is not None,
            "config": config != PAPER_FINETUNING,
            "factors": factors,
            "finetune_prompts": finetune_prompts is not None,
        }
        if given := [name for name, is_given in settings.items() if is_given]:
            raise ValueError(
                f"expected delta without settings of another finetuning, got delta and {', '.join(given)}: leave out "
                "delta, or these"
            )
