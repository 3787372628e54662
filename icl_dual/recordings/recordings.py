"""What the metrics are computed from → `Recordings`: attention outputs, scores and queries of the three settings, and
finetuning's queries; of a model's captures, or read from what was recorded elsewhere (`icl_dual.recordings.released_layout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.captures.capture import METRIC_FIELDS, Capture, Field
from icl_dual.finetuning.weight_delta import WeightDelta
from icl_dual.paper_tasks import PAPER_LABELS
from icl_dual.prompts import SEPARATOR, START
from icl_dual.storage import load_tensors, reading, save_tensors

SETTINGS = ("ZSL", "ICL", "FT")
"""The three settings that are asked the queries."""

MOST_LABELS = max(map(len, PAPER_LABELS.values()))
"""More labels than this none of the paper's tasks has: a larger label id is damage, where nothing else is known."""


class RecordingError(ValueError):
    """Recordings that are damaged or do not belong together; says in which file and line."""


@dataclass(frozen=True, repr=False)
class Recordings:
    """What finetuning and the three settings (ZSL, ICL, FT) left behind, which is all that the metrics need.

    Scores are scaled, before mask and softmax, at the recorded position, of keys in its context.
    """

    gold: Int[Tensor, " query"]
    predictions: dict[str, Int[Tensor, " query"]]
    """By setting: label indices."""
    attn_out: dict[str, Float[Tensor, "query layer d_model"]]
    """By setting: attention output after W_O, before the residual sum."""
    query_scores: dict[str, Float[Tensor, "query layer head query_token"]]
    """By setting: scores over the query's own tokens; zero past its end, which changes no cosine."""
    query_lengths: Int[Tensor, " query"]
    context_scores: dict[str, Float[Tensor, "query layer _"]]
    """By setting: scores over what stands before the query, start token included, summed over heads."""
    segments: Int[Tensor, " prefix_pos"]
    """Whose each token of ICL's context is: the training step's index that has the same demonstration, or negative."""
    q: Float[Tensor, "query layer d_q"]
    """FT's queries at the recorded position, heads side by side, scaled by 1/√d_head."""
    training_q: Float[Tensor, "layer train_token d_q"]
    """Finetuning's queries, each step's recorded before its update, scaled by 1/√d_head."""
    training_segments: Int[Tensor, " train_token"]
    """Which step each training token belongs to; negative for start tokens."""
    training_k: Float[Tensor, "layer train_token d_kv"] | None = None
    """Their keys, key-value heads side by side; the released code records none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Where they came from: settings and provenance of a cell."""
    skipped: tuple[str, ...] = ()
    """What was left out as damaged, and why."""

    @classmethod
    def of(
        cls,
        *,
        zero_shot: Capture,
        in_context: Capture,
        finetuned: Capture,
        delta: WeightDelta,
        steps: Sequence[int] | None = None,
    ) -> "Recordings":
        """The recordings of three captures and the finetuning between them.

        Args:
            zero_shot: a capture of the zero-shot prompts.
            in_context: a capture of the same queries behind their demonstrations.
            finetuned: a capture of the zero-shot prompts with the delta applied.
            delta: the finetuning.
            steps: for a control whose context is not what was finetuned on: which training step each of in_context's
                demonstrations stands for, token by token; −1 for none.

        Raises:
            ValueError: the captures or the delta are of different models, queries or demonstrations, or lack a field;
                or steps do not match their demonstrations.
        """
        _check_match(zero_shot, in_context, finetuned, delta, steps)
        runs, prompts = {"ZSL": zero_shot, "ICL": in_context, "FT": finetuned}, in_context.prompts
        trained = [torch.full((len(tokens),), step) for step, tokens in enumerate(delta.demonstrations)]
        n_start = torch.full((len(prompts.start),), START)
        scale = _field(finetuned, "q").shape[-1] ** -0.5
        return cls(
            gold=in_context.gold,
            predictions={name: run.predictions for name, run in runs.items()},
            attn_out={name: _field(run, "attn_out") for name, run in runs.items()},
            query_scores={name: _field(run, "query_scores") for name, run in runs.items()},
            query_lengths=torch.tensor([len(row) for row in prompts.suffixes]),
            context_scores={name: _field(run, "context_scores") for name, run in runs.items()},
            segments=prompts.segments if steps is None else _of_steps(prompts.segments, steps),
            q=_field(finetuned, "q").flatten(2) * scale,
            training_q=delta.training_q.flatten(2) * scale,
            training_segments=torch.cat([part for step in trained for part in (n_start, step)]),
            training_k=delta.training_k.flatten(2),
            metadata={
                "protocol": prompts.protocol,
                "n_labels": len(prompts.labels),
                "dtype": zero_shot.fingerprint.partition(":")[0],
            },
        )

    def __repr__(self) -> str:
        _, n_layers, n_heads, _ = self.query_scores["ZSL"].shape
        return (
            f"Recordings({len(self.gold)} queries, {n_layers} layers, {n_heads} heads, "
            f"{int((self.training_segments == START).sum())} training steps, {len(self.segments)} tokens in context, "
            f"{len(self.skipped)} skipped)"
        )

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the recordings into a folder, as safetensors and JSON: a fifth of the released layout's size."""
        grouped = {"predictions", "attn_out", "query_scores", "context_scores"}
        plain = {"gold", "query_lengths", "segments", "q", "training_q", "training_segments"}
        plain |= {"training_k"} if self.training_k is not None else set()
        tensors = {name: getattr(self, name) for name in plain}
        tensors |= {f"{name}/{setting}": value for name in grouped for setting, value in getattr(self, name).items()}
        save_tensors(Path(folder), tensors, {"recordings": self.metadata, "skipped": self.skipped})

    @classmethod
    def load(cls, folder: str | PathLike[str], n_labels: int | None = None) -> "Recordings":
        """Read recordings that `save` wrote.

        Raises:
            RecordingError: a number is not finite, a label id is not below `n_labels` (where not given, `label_limit`),
                or the folder holds no recordings.
            AssetError: the folder is missing or damaged.
        """
        path = Path(folder)
        tensors, metadata = load_tensors(path)
        if "recordings" not in metadata:
            raise RecordingError(
                f"expected recordings in {path}, got something else: those of a cell are in its folder 'recordings', "
                "where it was run with keep_recordings"
            )
        limit = label_limit(path, metadata["recordings"]) if n_labels is None else n_labels
        grouped: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise RecordingError(f"{path}: expected finite numbers, got others in {name!r}")
            if name.startswith(("gold", "predictions/")) and not ((tensor >= 0) & (tensor < limit)).all():
                raise RecordingError(
                    f"{path}: expected {name} out of the {limit} labels 0 to {limit - 1}, got {tensor.min()} to "
                    f"{tensor.max()}"
                )
            group, _, setting = name.partition("/")
            if setting:
                grouped.setdefault(group, {})[setting] = tensor
            else:
                grouped[name] = tensor
        with reading("Recordings", path):
            return cls(**grouped, metadata=metadata["recordings"], skipped=tuple(metadata["skipped"]))


def label_limit(folder: Path, metadata: dict[str, Any]) -> int:
    """How many labels there are: by a folder's metadata, or the paper's task it is named after, or as many as the most.

    Raises:
        RecordingError: the metadata have no positive number.
    """
    words = PAPER_LABELS.get(folder.name)
    n_labels = metadata.get("n_labels", MOST_LABELS if words is None else len(words))
    if not isinstance(n_labels, int) or n_labels < 1:
        raise RecordingError(f"{folder / 'metadata.json'}: expected n_labels as a number from 1, got {n_labels!r}")
    return n_labels


def _of_steps(segments: Int[Tensor, " prefix_pos"], steps: Sequence[int]) -> Int[Tensor, " prefix_pos"]:
    """Segments of a context by training step, in place of by demonstration."""
    shown = segments >= 0
    found = segments.clone()
    found[shown] = torch.tensor(steps, dtype=segments.dtype)[segments[shown]]
    return found.where((found >= 0) | ~shown, SEPARATOR)


def _check_match(
    zero_shot: Capture, in_context: Capture, finetuned: Capture, delta: WeightDelta, steps: Sequence[int] | None
) -> None:
    models = {
        "zero_shot": zero_shot.model,
        "in_context": in_context.model,
        "finetuned": finetuned.model,
        "delta": delta.model,
    }
    if len(set(models.values())) > 1:
        raise ValueError(f"expected captures and delta of one model, got {models}")
    if zero_shot.prompts != in_context.prompts.zero_shot() or finetuned.prompts != zero_shot.prompts:
        raise ValueError(
            "expected captures of the same queries: zero_shot and finetuned of in_context's prompts without demonstrations"
        )
    if zero_shot.fingerprint != in_context.fingerprint:
        raise ValueError(
            "expected zero_shot and in_context captured with the same weights: both outside of `delta.applied(model)`"
        )
    if delta.fingerprint != zero_shot.fingerprint:
        raise ValueError(
            "expected a delta finetuned from the weights that zero_shot and in_context were captured with, got another"
        )
    if finetuned.fingerprint == zero_shot.fingerprint:
        raise ValueError(
            "expected finetuned captured within `with delta.applied(model):`, got a run with zero_shot's weights"
        )
    if not in_context.prompts.demonstrations:
        raise ValueError("expected in_context's prompts to have demonstrations, got none")
    if steps is not None:
        _check_steps(in_context, delta, steps)
    elif delta.demonstrations != [list(tokens) for tokens in in_context.prompts.training_sequences]:
        raise ValueError(
            "expected a delta finetuned on the demonstrations of in_context's prompts, in their order. For a control, whose "
            "context holds others, pass steps=, which icl_dual.contexts.matching_training_steps finds"
        )


def _check_steps(in_context: Capture, delta: WeightDelta, steps: Sequence[int]) -> None:
    shown = in_context.prompts.demonstrations
    if len(steps) != len(shown) or len({step for step in steps if step >= 0}) < sum(step >= 0 for step in steps):
        raise ValueError(f"expected a training step of its own, or -1, for each of {len(shown)} demonstrations")
    lengths = dict(enumerate(map(len, delta.demonstrations)))
    for step, tokens in zip(steps, shown, strict=True):
        if step >= 0 and lengths.get(step) != len(tokens):
            raise ValueError(
                f"expected a training step of {len(tokens)} tokens for a demonstration of as many, got step {step} of "
                f"{lengths.get(step, 'no')} tokens; there are {len(lengths)} steps"
            )


def _field(run: Capture, name: Field) -> Tensor:
    tensor = getattr(run, name)
    if tensor is None:
        raise ValueError(f"expected captures with the fields {METRIC_FIELDS}, got {run} without {name!r}")
    return tensor
