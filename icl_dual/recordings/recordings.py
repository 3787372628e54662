"""What the metrics are computed from → `Recordings`: attention outputs, scores and queries of the three settings, and
finetuning's queries; from a model's captures, or read from a folder (`icl_dual.recordings.released_layout`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from icl_dual.arguments import Count, Index, checked
from icl_dual.captures.capture import METRIC_FIELDS, Capture, Field
from icl_dual.captures.pairing import (
    check_demonstrations,
    check_settings,
    check_start_weights,
    check_training_sequences,
    of_shared_tokens,
)
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.weight_delta import WeightDelta
from icl_dual.massive_activations import ordinary_tokens
from icl_dual.paper_tasks import PAPER_LABELS
from icl_dual.prompts import SEPARATOR, START, Prompts
from icl_dual.results import check_axes, check_count, check_names, check_values
from icl_dual.storage import AssetError, Saved, load_tensors
from icl_dual.torch_utils import to_list
from icl_dual.type_guards import is_dict

SETTINGS = ("ZSL", "ICL", "FT")
"""The three settings: zero-shot, in-context and finetuned, by their keys in tables and saved files."""

REQUIRED_FIELDS: tuple[Field, ...] = ("attn_out", "q", "context_scores", "query_scores")
"""The fields of captures without which there are no recordings. Without others of `METRIC_FIELDS`, which older versions
did not capture, some metrics are absent."""

MOST_LABELS = max(map(len, PAPER_LABELS.values()))
"""The most labels of a task of the paper: where nothing else is known, a larger label id means a damaged file."""


class RecordingError(AssetError, ValueError):
    """Recordings are damaged or do not belong together; the message names the file and line."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class Recordings(Saved):
    """What finetuning and the three settings (ZSL, ICL, FT) computed: all that the metrics need.

    Scores are attention scores at the recorded position: scaled by 1/√d_head, before mask and softmax.
    """

    gold: Int[Tensor, " query"]
    """The queries' label indices."""
    predictions: dict[str, Int[Tensor, " query"]]
    """By setting: the indices of the predicted labels."""
    attn_out: dict[str, Float[Tensor, "query layer d_model"]]
    """By setting: attention output after W_O, before the residual sum."""
    query_scores: dict[str, Float[Tensor, "query layer head query_token"]]
    """By setting: scores over the query's own tokens; zero past its end, which changes no cosine."""
    query_lengths: Int[Tensor, " query"]
    """The number of each query's own tokens: those that it has in every setting."""
    context_scores: dict[str, Float[Tensor, "query layer _"]]
    """By setting: scores over the tokens before the query, start token included, summed over heads."""
    segments: Int[Tensor, " prefix_pos"]
    """The source of each token of ICL's context: the index of the training step with the same demonstration; negative
    for start tokens, separators, demonstrations that were not trained on, and tokens that training had not."""
    q: Float[Tensor, "query layer d_q"]
    """FT's queries at the recorded position, heads side by side, scaled by 1/√d_head."""
    training_q: Float[Tensor, "layer train_token d_q"] | None = None
    """Finetuning's queries, recorded before each step's update, scaled by 1/√d_head; `None` where there are none."""
    training_segments: Int[Tensor, " train_token"] | None = None
    """The training step of each training token, negative for start tokens and tokens that the context has not; `None`
    without `training_q`."""
    training_k: Float[Tensor, "layer train_token d_kv"] | None = None
    """Finetuning's keys, key-value heads side by side; the released code records none."""
    residual_norms: dict[str, Float[Tensor, "query layer query_token"]] | None = None
    """By setting: norms of the residual stream after each layer at the query's own tokens; zero past its end. The
    released code records none."""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """Settings and provenance of the cell that they come from."""
    skipped: tuple[str, ...] = ()
    """The damaged records that were left out, each with the reason."""

    def __post_init__(self) -> None:
        if (self.training_q is None) != (self.training_segments is None):
            given, lacking = ("training_segments", "training_q")[:: 1 if self.training_q is None else -1]
            raise RecordingError(
                f"expected training_q and training_segments together, got {given} without {lacking}: give both, or "
                "neither"
            )
        axes = check_axes(self)
        by_setting = ("predictions", "attn_out", "query_scores", "context_scores", "residual_norms")
        for name in by_setting:
            if (values := getattr(self, name)) is not None:
                check_names(name, values, SETTINGS)
        check_values(self, *by_setting, "q", "training_q", "training_k")
        check_values(self, "gold", "predictions", "residual_norms", low=0)
        check_values(self, "query_lengths", low=0, high=axes["query_token"])
        check_values(self, "segments", "training_segments", low=SEPARATOR)
        n_prefix = self.context_scores["ICL"].shape[-1]
        check_count("segments", axes["prefix_pos"], "scores in context_scores/ICL", n_prefix)
        if self.training_segments is not None:
            in_context, in_training = (set(to_list(segments)) for segments in (self.segments, self.training_segments))
            if unknown := sorted(step for step in in_context - in_training if step >= 0):
                raise RecordingError(
                    f"expected segments of training steps that training_segments has, got {unknown[0]}: record again"
                )
        if "d_kv" in axes and axes["d_q"] % max(axes["d_kv"], 1):
            raise RecordingError(
                f"expected q with a multiple of the elements of training_k ({axes['d_kv']}), got {axes['d_q']}: take "
                "both from one run"
            )

    @classmethod
    @checked
    def of(
        cls,
        *,
        zero_shot: Capture,
        in_context: Capture,
        finetuned: Capture,
        delta: WeightDelta | None = None,
        steps: Sequence[int] | None = None,
    ) -> "Recordings":
        """Return the recordings of three captures and the finetuning between them.

        Args:
            zero_shot: a capture of the zero-shot prompts.
            in_context: a capture of the same queries behind their demonstrations.
            finetuned: a capture of the zero-shot prompts with the delta applied, or of a copy of the model, under the
                same name, that was finetuned by other means.
            delta: the finetuning; without one, or with one that has no training queries, the recordings have none.
            steps: for a control, with other demonstrations in context than were trained on: the training step that each
                of in_context's demonstrations corresponds to, token by token; −1 for none.

        Raises:
            ValueError: the captures or the delta are of different models, queries or demonstrations, or lack a field;
                or steps do not match their demonstrations.
        """
        _check_match(zero_shot, in_context, finetuned, delta, steps)
        device = in_context.label_log_probs.device
        zero_shot, finetuned = zero_shot.to(device), finetuned.to(device)
        delta = None if delta is None else delta.to(device)
        captures, prompts = {"ZSL": zero_shot, "ICL": in_context, "FT": finetuned}, in_context.prompts
        query_scores = {name: _field(capture, "query_scores") for name, capture in captures.items()}
        scale = _field(finetuned, "q").shape[-1] ** -0.5
        segments = _shared_segments(prompts, range(len(prompts.demonstrations)) if steps is None else steps)
        return cls(
            gold=in_context.gold,
            predictions={name: capture.predictions for name, capture in captures.items()},
            attn_out={name: _field(capture, "attn_out") for name, capture in captures.items()},
            query_scores=of_shared_tokens(query_scores, prompts.shared_query_tokens),
            query_lengths=torch.tensor([len(shared) for shared in prompts.shared_query_tokens], device=device),
            context_scores={name: _field(capture, "context_scores") for name, capture in captures.items()},
            segments=segments.to(device),
            q=_field(finetuned, "q").flatten(2) * scale,
            **_training(delta, prompts, steps, scale),
            residual_norms=_residual_norms(captures, prompts),
            metadata={
                "protocol": prompts.protocol,
                "n_labels": len(prompts.labels),
                "dtype": zero_shot.fingerprint.partition(":")[0],
                **({} if prompts.scoring == "mean" else {"scoring": prompts.scoring}),
            },
        )

    @cached_property
    def ordinary_tokens(self) -> Bool[Tensor, "query query_token"]:
        """Return True at the queries' tokens without massive activations, False past a query's end.

        The median that a norm is held against is over all queries (`icl_dual.massive_activations`).

        Raises:
            RecordingError: there are no `residual_norms`.
        """
        if self.residual_norms is None:
            raise RecordingError(
                "expected recordings with residual_norms, got recordings without them: record again from captures with "
                "the field residual_norms"
            )
        return ordinary_tokens(self.residual_norms, self.query_lengths)

    @checked
    def padded(self, n_tokens: Index) -> "Recordings":
        """Return the recordings with at least `n_tokens` query tokens: zero past each query's end."""

        def pad(by_setting: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: nn.functional.pad(t, (0, max(0, n_tokens - t.shape[-1]))) for name, t in by_setting.items()}

        norms = None if self.residual_norms is None else pad(self.residual_norms)
        return replace(self, query_scores=pad(self.query_scores), residual_norms=norms)

    def __repr__(self) -> str:
        _, n_layers, n_heads, _ = self.query_scores["ZSL"].shape
        n_steps = "no" if self.training_segments is None else int((self.training_segments == START).sum())
        return (
            f"Recordings({len(self.gold)} queries, {n_layers} layers, {n_heads} heads, "
            f"{n_steps} training steps, {len(self.segments)} tokens in context, "
            f"{len(self.skipped)} skipped)"
        )

    @classmethod
    @checked
    def load(cls, folder: str | PathLike[str], n_labels: Count | None = None) -> "Recordings":
        """Read recordings that `save` wrote.

        Args:
            folder: the folder they were saved in; of a cell that was run with `keep_recordings=True`, its folder
                `recordings`.
            n_labels: the number of labels; where not given, what `label_limit` finds.

        Raises:
            RecordingError: a label index is not below `n_labels`.
            AssetError: the folder is missing or damaged, or holds another result.
        """
        path = Path(folder)
        try:
            recordings = super().load(path)
        except AssetError as error:
            if not _is_cell(path):
                raise
            raise AssetError(
                f"expected a saved Recordings in {path}, got the folder of a cell: pass its folder recordings, which a "
                "cell has that was run with keep_recordings=True"
            ) from error
        limit = label_limit(path, recordings.metadata) if n_labels is None else n_labels
        for name, tensor in recordings._tensors():
            if name.startswith(("gold", "predictions/")) and not ((tensor >= 0) & (tensor < limit)).all():
                raise RecordingError(
                    f"{path}: expected {name} out of the {limit} labels 0 to {limit - 1}, got {tensor.min()} to "
                    f"{tensor.max()}: pass n_labels where there are more"
                )
        return recordings

    @classmethod
    def _upgraded(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what version 0.1 wrote, which has the field `metadata` under the name `recordings`."""
        return tensors, {"metadata": metadata.get("recordings", {}), **metadata}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor by its name, those by setting as `field/setting`."""
        for name in (member.name for member in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                yield name, value
            elif is_dict(value):
                yield from ((f"{name}/{key}", member) for key, member in value.items() if isinstance(member, Tensor))


def _is_cell(folder: Path) -> bool:
    """Return whether a folder holds a study's cell, which saves its settings with its comparison."""
    try:
        return "settings" in load_tensors(folder)[1]
    except AssetError:
        return False


def label_limit(folder: Path, metadata: dict[str, Any]) -> int:
    """Return the number of labels: of the folder's metadata, of the paper's task that names the folder, or the most.

    Raises:
        RecordingError: the metadata have no positive number.
    """
    words = PAPER_LABELS.get(folder.name)
    n_labels = metadata.get("n_labels", MOST_LABELS if words is None else len(words))
    if not isinstance(n_labels, int) or n_labels < 1:
        raise RecordingError(
            f"{folder / 'metadata.json'}: expected n_labels as a number from 1, got {n_labels!r}: correct it"
        )
    return n_labels


def _shared_segments(prompts: Prompts, steps: Sequence[int]) -> Int[Tensor, " prefix_pos"]:
    """Return the segments of a context by training step; tokens that no training sequence has count as separators."""
    segments = prompts.segments.clone()
    for index, (step, shared) in enumerate(zip(steps, prompts.shared_demonstration_tokens, strict=True)):
        positions = (prompts.segments == index).nonzero().squeeze(-1)
        segments[positions] = SEPARATOR
        segments[positions[[in_context for in_context, _ in shared]]] = step if step >= 0 else SEPARATOR
    return segments


def _training(delta: WeightDelta | None, prompts: Prompts, steps: Sequence[int] | None, scale: float) -> dict[str, Any]:
    """Return the fields of the training queries and keys; empty without any."""
    if delta is None or delta.training_q is None:
        return {}
    by_step = [torch.full((len(tokens),), step) for step, tokens in enumerate(delta.demonstrations)]
    shared = prompts.shared_demonstration_tokens
    for step, pairs in zip(range(len(shared)) if steps is None else steps, shared, strict=True):
        if step >= 0:
            segments = torch.full_like(by_step[step], SEPARATOR)
            segments[[in_training for _, in_training in pairs]] = step
            by_step[step] = segments
    start = torch.full((len(prompts.start),), START)
    training_segments = torch.cat([part for segments in by_step for part in (start, segments)])
    return {
        "training_q": delta.training_q.flatten(2) * scale,
        "training_segments": training_segments.to(delta.training_q.device),
        "training_k": None if delta.training_k is None else delta.training_k.flatten(2),
    }


def _residual_norms(captures: dict[str, Capture], prompts: Prompts) -> dict[str, Tensor] | None:
    """Return residual norms by setting; `None` where a capture has none, as those of older versions."""
    norms = {setting: capture.residual_norms for setting, capture in captures.items()}
    complete = {setting: values for setting, values in norms.items() if values is not None}
    return of_shared_tokens(complete, prompts.shared_query_tokens) if len(complete) == len(norms) else None


def _check_match(
    zero_shot: Capture, in_context: Capture, finetuned: Capture, delta: WeightDelta | None, steps: Sequence[int] | None
) -> None:
    check_settings(zero_shot=zero_shot, in_context=in_context, finetuned=finetuned)
    if delta is not None:
        check_start_weights(delta, zero_shot)
    check_demonstrations(in_context)
    if delta is None or delta.training_q is None:
        if steps is not None:
            raise ValueError(
                "expected a delta with training queries where steps is given, got none: pass a delta of "
                "icl_dual.finetune, or leave steps out"
            )
    elif steps is not None:
        _check_steps(in_context, delta, steps)
    if delta is not None and steps is None:
        advice = "for a control, with others in context, pass steps= of icl_dual.contexts.matching_training_steps"
        check_training_sequences(delta, in_context, advice)


def _check_steps(in_context: Capture, delta: WeightDelta, steps: Sequence[int]) -> None:
    demonstrations = in_context.prompts.training_sequences[: len(in_context.prompts.demonstrations)]
    trained = [step for step in steps if step >= 0]
    if len(steps) != len(demonstrations) or len(set(trained)) < len(trained):
        raise ValueError(
            f"expected a training step of its own, or -1, for each of {len(demonstrations)} demonstrations, got "
            f"{list(steps)}: pass steps= of icl_dual.contexts.matching_training_steps"
        )
    lengths = dict(enumerate(map(len, delta.demonstrations)))
    for step, tokens in zip(steps, demonstrations, strict=True):
        if step >= 0 and lengths.get(step) != len(tokens):
            raise ValueError(
                f"expected a training step of {len(tokens)} tokens for a demonstration of as many, got step {step} of "
                f"{lengths.get(step, 'no')} tokens; there are {len(lengths)} steps: pass steps= of "
                "icl_dual.contexts.matching_training_steps"
            )


def _field(capture: Capture, name: Field) -> Tensor:
    tensor = getattr(capture, name)
    if tensor is None:
        raise ValueError(
            f"expected captures with the fields {METRIC_FIELDS}, got {capture} without {name!r}: pass fields= to "
            "icl_dual.capture with these among them"
        )
    return tensor
