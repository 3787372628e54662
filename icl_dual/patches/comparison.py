"""Changes of a model compared: what each writes into the residual stream, what it makes the model answer, and how
similar two changes of the same matrices are.

A patch of the MLPs, a finetuning of keys and values and a function vector live in different matrices. What they share
is the residual stream at the recorded token. So they are compared by captures of the same zero-shot queries:

- what a change writes: D = the stream with it minus the stream without, by query and layer; that of the context is the
  in-context stream minus the zero-shot one. Cosines compare them query by query, principal angles compare the
  directions that they span over queries;
- what it makes the model answer: predictions, and the KL divergence of the next token's distribution.

Two changes of the same matrices (two patches, or two finetunings) are also compared as matrices.

Each number has its null, as in `icl_dual.updates`: the change with the same singular values in random directions.
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import Count, Seed, checked
from icl_dual.captures.capture import Capture, Field
from icl_dual.captures.pairing import check_demonstrations, check_fields
from icl_dual.field_docs import document_fields
from icl_dual.finetuning import WeightDelta
from icl_dual.models import LowRank, Model, UnsupportedModelError
from icl_dual.models.journal import Undo, exclusive
from icl_dual.models.stream import StreamChange, add_stream_change, has_norm_after_attention
from icl_dual.models.tokenization import Tokens
from icl_dual.patches.patch import Patch
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.results import ROUNDING, check_axes, check_values
from icl_dual.scoring import WITH_BASELINE
from icl_dual.statistics.frames import summary_frame
from icl_dual.storage import Saved
from icl_dual.torch_utils import at_least_float32, checked_index, linalg, vector_norm

EFFECT_FIELDS: tuple[Field, ...] = ("stream", "next_log_probs")
"""The fields of `capture` that `compare_effects` needs."""


@runtime_checkable
class Change(Protocol):
    """A change of a model: a patch, a finetuning's delta, a function vector."""

    def applied(self, model: Model, /) -> AbstractContextManager[Model]:
        """Yield the model with the change; afterwards it is as it was."""
        ...


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class FunctionVector(Saved):
    """A vector that is added to the residual stream after one layer, at the token that predicts the label."""

    model: str
    """The name of the model."""
    fingerprint: str
    """The fingerprint of the model's weights that ran."""
    layer: int
    """The index of the layer."""
    vector: Float[Tensor, " d_model"]
    """What is added: the mean over prompts of the layer's in-context attention output, at the recorded token."""

    def __post_init__(self) -> None:
        check_axes(self)
        check_values(self, "vector")
        check_values(self, "layer", low=0)

    def __repr__(self) -> str:
        return f"FunctionVector({self.model!r}, layer {self.layer}, norm={vector_norm(self.vector):.3g})"

    @checked
    @contextmanager
    def applied(self, model: Model) -> Generator[Model]:
        """Yield the model with the vector; afterwards it is as it was, bit for bit, also after an exception.

        In a capture, the vector is added at the token that predicts the label, and nowhere else. In a plain run it is
        added at the last token of every row.

        Raises:
            ValueError: the vector belongs to another model, or to other weights of it.
            UnsupportedModelError: the model has a norm between attention and the residual stream (Gemma 2 and 3, OLMo
                2). The vector is the mean of what enters that norm, so its scale is not the stream's.
        """
        if (self.model, self.fingerprint) != (here := (model.name, model.fingerprint())):
            raise ValueError(
                f"expected a function vector of {here}, got one of {(self.model, self.fingerprint)}: capture this "
                "model in context, and build it again"
            )
        if has_norm_after_attention(model, self.layer):
            raise UnsupportedModelError(
                f"expected a model that adds attention's output to the residual stream as it is, got {model.name!r} "
                f"({model.architecture}), which norms it first, so that a function vector has another scale than the "
                "stream: compare patches or finetunings instead"
            )
        with model.journal.block() as undo:
            _add(model, self, undo)
            yield model


@exclusive
def _add(model: Model, vector: FunctionVector, undo: Undo) -> None:
    """Add a function vector to every run of a model, until the block ends."""
    add_stream_change(model, StreamChange(vector.layer, vector.vector), undo)


@checked
def build_function_vector(in_context: Capture, layer: int) -> FunctionVector:
    """Return the mean attention output of one layer over in-context prompts, at the recorded token.

    This is the function vector of Todd et al. (2024) with all heads of a layer in the place of selected heads. It can
    be applied to models that add attention's output to the residual stream without a norm in between.

    Args:
        in_context: a capture of queries after demonstrations, with the field `attn_out`.
        layer: the layer whose output it is, and after which it is added; negative from the end.

    Raises:
        IndexError: there is no such layer.
        ValueError: the capture lacks `attn_out`, or is of queries without demonstrations.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> model = tiny_model()
        >>> prompts = icl_dual.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(6))
        >>> in_context = icl_dual.capture(model, prompts, progress=False)
        >>> vector = icl_dual.build_function_vector(in_context, layer=0)
        >>> with vector.applied(model):
        ...     changed = icl_dual.capture(model, prompts.zero_shot(), progress=False)
        >>> len(changed.predictions)
        6
    """
    check_fields(("attn_out",), in_context=in_context)
    check_demonstrations(in_context)
    assert in_context.attn_out is not None
    index = checked_index("layer", layer, in_context.attn_out.shape[1])
    mean = in_context.attn_out[:, index].mean(0)
    return FunctionVector(in_context.model, in_context.fingerprint, index, mean)


@checked
@exclusive
def capture_each(model: Model, prompts: Prompts, changes: Sequence[Change]) -> Capture:
    """Capture each query with a change of its own, such as its exact patch.

    Each query runs alone and whole. `capture` runs what queries share once, and the rest after it: that is the same but
    for rounding, which an exact patch with a large change of a norm's scale (Gemma's) blows up.

    Args:
        model: the model; it comes back as it was.
        prompts: the queries, without demonstrations for exact patches.
        changes: one change for each query.

    Returns:
        One capture of all queries with the fields `EFFECT_FIELDS`. Its fingerprint is a hash of those of the changed
        models.

    Raises:
        ValueError: there are not as many changes as queries; a label word has several tokens; or the prompts are under
            the reference protocol, or their rule of scoring needs a baseline.
    """
    if len(changes) != len(prompts.queries):
        raise ValueError(
            f"expected one change for each of {len(prompts.queries)} queries, got {len(changes)}: pass as many changes "
            "as queries"
        )
    if prompts.protocol != "answer" or prompts.scoring in WITH_BASELINE or max(map(len, prompts.labels)) > 1:
        raise ValueError(
            "expected prompts under the answer protocol with label words of one token, scored without a baseline, got "
            f"{prompts} with labels {prompts.labels} and scoring {prompts.scoring!r}: capture the queries one by one"
        )
    check_prompts(model, prompts)
    streams: list[Tensor] = []
    log_probs: list[Tensor] = []
    fingerprints: list[str] = []
    for suffix, change in zip(prompts.suffixes, changes, strict=True):
        with change.applied(model):
            stream, next_log_probs = _run_whole(model, (*prompts.prefix, *suffix))
            fingerprints.append(model.fingerprint())
        streams.append(stream)
        log_probs.append(next_log_probs)
    digest = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]
    together = torch.stack(log_probs)
    fields: dict[str, Any] = dict.fromkeys(get_args(Field))
    fields |= {"stream": torch.stack(streams), "next_log_probs": together}
    return Capture(
        model=model.name,
        fingerprint=f"{fingerprints[0].rpartition(':')[0]}:{digest}",
        hooks=model.foreign_hooks(),
        prompts=prompts,
        label_log_probs=together[:, [label[0] for label in prompts.labels]],
        residual=0.0,
        **fields,
    )


def _run_whole(model: Model, tokens: Tokens) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, " d_vocab"]]:
    """Return the streams and the next token's log-probabilities at the last token of a plain pass, on the CPU."""
    streams: list[Tensor] = []

    def keep(layer: int, stream: Tensor) -> None:
        streams.append(at_least_float32(stream[0, -1]).cpu())

    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        logits = model.run(ids, read=torch.tensor([[len(tokens) - 1]], device=model.device), on_residual=keep)
    return torch.stack(streams), at_least_float32(logits[0, 0]).log_softmax(-1).cpu()


class _Directions(NamedTuple):
    """The thin singular value decomposition U diag(S) Vᵀ of matrices."""

    U: Float[Tensor, "*batch d_out n"]
    S: Float[Tensor, "*batch n"]
    V: Float[Tensor, "*batch d_in n"]

    @classmethod
    def of(cls, W: Float[Tensor, "*batch d_out d_in"]) -> "_Directions":
        U, S, Vh = linalg.svd(W.double().cpu(), full_matrices=False)
        return cls(U, S, Vh.mT)

    @classmethod
    def of_low_rank(cls, change: LowRank) -> "_Directions":
        """Return that of ΔW from its factors: the matrix itself is never computed."""
        (Q_left, R_left), (Q_right, R_right) = (linalg.qr(factor.double().cpu()) for factor in change)
        inner = cls.of(R_left @ R_right.mT)
        return cls(Q_left @ inner.U, inner.S, Q_right @ inner.V)

    def with_random_directions(self, generator: torch.Generator) -> "_Directions":
        """Return matrices with the same singular values and singular vectors drawn uniformly: the null."""
        return _Directions(_random_like(self.U, generator), self.S, _random_like(self.V, generator))

    def matrices(self) -> Float[Tensor, "*batch d_out d_in"]:
        return self.U * self.S.unsqueeze(-2) @ self.V.mT

    def has_direction(self) -> Tensor:
        """Return which singular values are more than float32's rounding of the largest."""
        rounding = max(self.U.shape[-2], self.V.shape[-2]) * torch.finfo(torch.float32).eps
        return self.S.amax(-1, keepdim=True) * rounding < self.S


def _random_like(basis: Float[Tensor, "*batch d n"], generator: torch.Generator) -> Float[Tensor, "*batch d n"]:
    """Return orthonormal columns drawn uniformly."""
    Q, R = linalg.qr(torch.randn(basis.shape, generator=generator, dtype=basis.dtype))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else they would not be uniform


def _angles(a: _Directions, b: _Directions, side: str, rank: int) -> Float[Tensor, "*batch rank"]:
    """Return the principal angles between leading singular directions in degrees, NaN past the rank of either."""
    in_a, in_b = (directions.has_direction()[..., :rank] for directions in (a, b))
    of_a, of_b = (getattr(directions, side)[..., :rank] for directions in (a, b))
    overlap = (of_a.mT @ of_b) * (in_a.unsqueeze(-1) & in_b.unsqueeze(-2))
    degrees = linalg.svdvals(overlap).clamp(max=1).acos().rad2deg()
    n_angles = torch.minimum(in_a.sum(-1), in_b.sum(-1)).unsqueeze(-1)
    known = torch.where(torch.arange(degrees.shape[-1]) < n_angles, degrees, torch.nan)
    return torch.nn.functional.pad(known, (0, rank - known.shape[-1]), value=torch.nan)


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class EffectComparison(Saved):
    """What a change of a model does to queries, against what a reference does, such as the context.

    Fields that end in `_random` are the null: what the change writes, with the same singular values over queries, in
    random directions. What is undefined, because nothing is written, is NaN.
    """

    model: str
    """The name of the model."""
    rank: int
    """How many leading directions span the subspaces that are compared."""
    cosine: Float[Tensor, "query layer"]
    """Cosine of the change's and the reference's effect on the residual stream after each layer."""
    cosine_random: Float[Tensor, "query layer"]
    """The cosine of the null with the reference's effect."""
    norm_ratio: Float[Tensor, "query layer"]
    """Norm of the change's effect over that of the reference's."""
    angles: Float[Tensor, "layer rank"]
    """Principal angles between the leading directions over queries of both effects, in degrees, smallest first."""
    angles_random: Float[Tensor, "layer rank"]
    """The angles between the reference's directions and the null's, in degrees, smallest first."""
    kl: Float[Tensor, " query"]
    """KL(reference ‖ change) of the next token's distribution, in nats."""
    agreement: Float[Tensor, " query"]
    """1 where the change's prediction is the reference's, else 0."""
    correct: Float[Tensor, " query"]
    """1 where the change's prediction is the gold label, else 0."""

    def __post_init__(self) -> None:
        check_axes(self, rank=("the field rank", self.rank))
        check_values(self, "cosine", "cosine_random", low=-1 - ROUNDING, high=1 + ROUNDING, nan=True)
        check_values(self, "angles", "angles_random", low=0, high=90 + ROUNDING, nan=True)
        check_values(self, "norm_ratio", low=0, nan=True, infinite=True)
        check_values(self, "kl", low=-ROUNDING, infinite=True)
        check_values(self, "agreement", "correct", low=0, high=1)
        check_values(self, "rank", low=1)

    @property
    def accuracy(self) -> float:
        """The proportion of queries for which the change's prediction is correct."""
        return self.correct.mean().item()

    def __repr__(self) -> str:
        return (
            f"EffectComparison({self.model!r}, {len(self.kl)} queries, cosine={self.cosine.nanmean():.3f} (null "
            f"{self.cosine_random.nanmean():.3f}), KL={self.kl.mean():.3g}, agreement={self.agreement.mean():.3f}, "
            f"accuracy={self.accuracy:.3f})"
        )

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: metric, layer (empty: of the answer), mean and deviation over queries, n.

        Angles are means over the angles of a layer, and have no deviation.
        """
        by_layer = {name: getattr(self, name) for name in ("cosine", "cosine_random", "norm_ratio")}
        angles = {name: getattr(self, name).nanmean(-1)[None] for name in ("angles", "angles_random")}
        answers = {"kl": self.kl, "agreement": self.agreement, "accuracy": self.correct}
        of_answers = summary_frame({name: values[:, None] for name, values in answers.items()})
        of_answers["layer"] = pd.NA
        frames = [summary_frame(by_layer | angles), of_answers]
        frame = pd.concat([frame.astype({"layer": "Int64"}) for frame in frames], ignore_index=True)
        return frame.drop(columns="head")


@checked
def compare_effects(
    *, zero_shot: Capture, reference: Capture, changed: Capture, rank: Count = 4, seed: Seed = 0
) -> EffectComparison:
    """Compare what a change of a model does to queries with what a reference does, each number with its null.

    Args:
        zero_shot: a capture of the queries without demonstrations and without the change, with the fields
            `EFFECT_FIELDS`.
        reference: a capture of the same queries in context, with zero_shot's weights; or without demonstrations, with
            another change.
        changed: a capture of the zero-shot queries with the change: made inside of its `applied`, or by `capture_each`.
        rank: how many leading directions over queries to compare by their principal angles.
        seed: the seed of the null's random directions.

    Raises:
        ValueError: a capture is of another model or other queries, in another precision or with other hooks, or lacks a
            field; the reference has demonstrations and other weights than zero_shot; or the rank is not between 1 and
            d_model.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> model = tiny_model()
        >>> prompts = icl_dual.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(6))
        >>> alone, fields = prompts.zero_shot(), icl_dual.EFFECT_FIELDS
        >>> zero_shot = icl_dual.capture(model, alone, fields=fields, progress=False)
        >>> in_context = icl_dual.capture(model, prompts, fields=fields, progress=False)
        >>> with icl_dual.build_shared_patch(model, prompts).applied(model):
        ...     patched = icl_dual.capture(model, alone, fields=fields, progress=False)
        >>> comparison = icl_dual.compare_effects(zero_shot=zero_shot, reference=in_context, changed=patched)
        >>> comparison.cosine.shape, comparison.kl.shape
        (torch.Size([6, 2]), torch.Size([6]))
    """
    _check_captures(zero_shot, reference, changed)
    assert zero_shot.stream is not None
    d_model = zero_shot.stream.shape[-1]
    if not 1 <= rank <= d_model:
        raise ValueError(f"expected a rank from 1 to d_model = {d_model}, got {rank}: pass rank= in this range")
    generator = torch.Generator().manual_seed(seed)
    base = zero_shot.stream.double()
    written, of_reference = (_stream(captured) - base for captured in (changed, reference))
    a, b = (_Directions.of(effect.transpose(0, 1)) for effect in (written, of_reference))
    null = a.with_random_directions(generator)
    sizes = [vector_norm(effect, dim=-1) for effect in (written, of_reference)]
    return EffectComparison(
        model=zero_shot.model,
        rank=rank,
        cosine=_cosine(written, of_reference),
        cosine_random=_cosine(null.matrices().transpose(0, 1), of_reference),
        norm_ratio=torch.where(sizes[1] > 0, sizes[0] / sizes[1], torch.nan),
        angles=_angles(a, b, "V", rank),
        angles_random=_angles(null, b, "V", rank),
        kl=_kl(reference, changed),
        agreement=(changed.predictions == reference.predictions).double(),
        correct=(changed.predictions == changed.gold).double(),
    )


def _stream(captured: Capture) -> Float[Tensor, "query layer d_model"]:
    assert captured.stream is not None
    return captured.stream.double()


def _cosine(a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    norms = vector_norm(a, dim=-1) * vector_norm(b, dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan)


def _kl(reference: Capture, changed: Capture) -> Float[Tensor, " query"]:
    """Return KL(reference ‖ changed) of the next token's distribution; query by query, for vocabularies are large."""
    assert reference.next_log_probs is not None
    assert changed.next_log_probs is not None
    by_query: list[Tensor] = []
    for p, q in zip(reference.next_log_probs, changed.next_log_probs, strict=True):
        p, q = p.double(), q.double()
        by_query.append(torch.where(p > -torch.inf, p.exp() * (p - q), torch.zeros_like(p)).sum())
    return torch.stack(by_query)


def _check_captures(zero_shot: Capture, reference: Capture, changed: Capture) -> None:
    """Raise a ValueError unless captures are of one model and the same queries, with the fields that are compared.

    The change's weights differ from zero_shot's; what a context does is known for zero_shot's weights alone.
    """
    captures = {"zero_shot": zero_shot, "reference": reference, "changed": changed}
    check_fields(EFFECT_FIELDS, **captures)
    names = {name: captured.model for name, captured in captures.items()}
    if len(set(names.values())) > 1:
        raise ValueError(f"expected captures of one model, got {names}: capture all with one model")
    precisions = {name: captured.fingerprint.rpartition(":")[0] for name, captured in captures.items()}
    if len(set(precisions.values())) > 1:
        raise ValueError(f"expected captures in one precision, got {precisions}: capture all with one model")
    hooks = {name: captured.hooks for name, captured in captures.items()}
    if len(set(hooks.values())) > 1:
        raise ValueError(
            f"expected captures with the same hooks on the model, got others ({hooks}; empty: none): capture all with "
            "your own hooks on, or all without"
        )
    if reference.prompts.demonstrations and reference.fingerprint != zero_shot.fingerprint:
        raise ValueError(
            f"expected reference, which has demonstrations, of the same weights as zero_shot, got "
            f"{reference.fingerprint} and {zero_shot.fingerprint}: capture both without the change"
        )
    if zero_shot.prompts.demonstrations:
        raise ValueError(
            f"expected zero_shot to be without demonstrations, got {zero_shot.prompts}: capture prompts.zero_shot()"
        )
    for name in ("reference", "changed"):
        prompts = captures[name].prompts
        if zero_shot.prompts not in (prompts, prompts.zero_shot()):
            raise ValueError(
                f"expected {name} of the same queries as zero_shot, got {prompts} and {zero_shot.prompts}, which "
                "differ: capture the same queries"
            )


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class WeightComparison(Saved):
    """How similar two changes of the same matrices are, by matrix and layer.

    Fields that end in `_random` are the null: the second change with the same singular values in random directions.
    What is undefined, because a change is zero, is NaN.
    """

    rank: int
    """How many leading singular directions span the subspaces that are compared."""
    cosine: dict[str, Float[Tensor, " layer"]]
    """Frobenius cosine ⟨A, B⟩ / (‖A‖ ‖B‖) by matrix: `gate`, `in` and `out` of MLPs, `W_K` and so on of attention."""
    cosine_random: dict[str, Float[Tensor, " layer"]]
    """The Frobenius cosine of A with the null."""
    left_angles: dict[str, Float[Tensor, "layer rank"]]
    """Principal angles between the leading directions that are written, in degrees, smallest first."""
    left_angles_random: dict[str, Float[Tensor, "layer rank"]]
    """The angles between the directions that A and the null write."""
    right_angles: dict[str, Float[Tensor, "layer rank"]]
    """Principal angles between the leading directions that are read, in degrees, smallest first."""
    right_angles_random: dict[str, Float[Tensor, "layer rank"]]
    """The angles between the directions that A and the null read."""
    norm_ratio: dict[str, Float[Tensor, " layer"]]
    """‖B‖ / ‖A‖ in Frobenius norms."""

    def __post_init__(self) -> None:
        check_axes(self, rank=("the field rank", self.rank))
        for suffix in ("", "_random"):
            check_values(self, "cosine" + suffix, low=-1 - ROUNDING, high=1 + ROUNDING, nan=True)
            for side in ("left_angles", "right_angles"):
                check_values(self, side + suffix, low=0, high=90 + ROUNDING, nan=True)
        check_values(self, "norm_ratio", low=0, nan=True, infinite=True)
        check_values(self, "rank", low=1)

    def __repr__(self) -> str:
        cosines = ", ".join(f"{name}={values.nanmean():.3f}" for name, values in self.cosine.items())
        return f"WeightComparison(cosines: {cosines})"

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: metric, matrix, layer, value. Angles are means over the angles of a layer."""
        rows: list[tuple[Any, ...]] = []
        for metric, by_matrix in vars(self).items():
            if metric == "rank":
                continue
            for matrix, values in by_matrix.items():
                by_layer = values.nanmean(-1) if values.ndim == 2 else values
                rows += [(metric, matrix, layer, value) for layer, value in enumerate(by_layer.tolist())]
        return pd.DataFrame(rows, columns=["metric", "matrix", "layer", "value"])


@checked
def compare_weights(
    a: Patch | WeightDelta, b: Patch | WeightDelta, *, rank: Count = 4, seed: Seed = 0
) -> WeightComparison:
    """Compare two changes of the same matrices, layer by layer, each number with its null.

    Args:
        a: one change: a patch, or the delta of a finetuning.
        b: the other, of at least one matrix that `a` changes.
        rank: how many leading singular directions to compare by their principal angles.
        seed: the seed of the null's random directions.

    Raises:
        ValueError: the changes are of different models, or have no matrix in common.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> model = tiny_model()
        >>> prompts = icl_dual.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(6))
        >>> a, b = (icl_dual.build_exact_patch(model, prompts, query) for query in (0, 1))
        >>> sorted(icl_dual.compare_weights(a, b).cosine)
        ['gate', 'in', 'out']
    """
    if (a.model, a.fingerprint) != (b.model, b.fingerprint):
        raise ValueError(
            f"expected two changes of one model, got {(a.model, a.fingerprint)} and {(b.model, b.fingerprint)}: build "
            "both from the same weights"
        )
    of_a, of_b = _matrices(a), _matrices(b)
    if not (names := [name for name in of_a if name in of_b]):
        raise ValueError(
            f"expected two changes with a matrix in common, got {sorted(of_a)} and {sorted(of_b)}: compare what they "
            "write into the residual stream with icl_dual.compare_effects"
        )
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, dict[str, Tensor]] = {}
    for name in names:
        left, right = of_a[name], of_b[name]
        sizes = [vector_norm(directions.S, dim=-1) for directions in (left, right)]
        fields.setdefault("norm_ratio", {})[name] = torch.where(sizes[0] > 0, sizes[1] / sizes[0], torch.nan)
        for suffix, other in (("", right), ("_random", right.with_random_directions(generator))):
            fields.setdefault("cosine" + suffix, {})[name] = _frobenius_cosine(left, other)
            fields.setdefault("left_angles" + suffix, {})[name] = _angles(left, other, "U", rank)
            fields.setdefault("right_angles" + suffix, {})[name] = _angles(left, other, "V", rank)
    return WeightComparison(rank=rank, **fields)


def _matrices(change: Patch | WeightDelta) -> dict[str, _Directions]:
    """Return the directions of every matrix that a change has, by name."""
    if isinstance(change, Patch):
        return {part: _Directions.of_low_rank(low_rank) for part, low_rank in change.factors.items()}
    matrices = {name: getattr(change, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
    return {name: _Directions.of(W) for name, W in matrices.items() if W is not None and W.any()}


def _frobenius_cosine(a: _Directions, b: _Directions) -> Float[Tensor, " layer"]:
    inner = (a.S.unsqueeze(-1) * b.S.unsqueeze(-2) * (a.U.mT @ b.U) * (a.V.mT @ b.V)).sum((-2, -1))
    norms = vector_norm(a.S, dim=-1) * vector_norm(b.S, dim=-1)
    return torch.where(norms > 0, inner / norms, torch.nan)
