"""`WeightDelta`: the change that finetuning made to a model's attention weights, and how the finetuning was set.

A delta holds ΔW and Δb of the projections of attention at every layer, as matrices `[d_out d_in]` with heads in order,
whatever way the model stores them, in float32 at least. It can be applied to the model for the length of a `with`
block, saved, replaced by a random direction of the same norm, and taken between a model and any finetuned copy of it.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_dual.arguments import NameOrPath, Seed, checked
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.config import PROJECTIONS_TRAINED, FinetuneConfig, Trained
from icl_dual.models import Model, Weight
from icl_dual.models.changes import add_changes
from icl_dual.models.finetuned import weights_beyond_projections, wrap_adapter, wrap_finetuned
from icl_dual.models.journal import Undo, exclusive
from icl_dual.models.precision import fingerprinted_precision
from icl_dual.results import check_axes, check_count, check_values, compare_by_value
from icl_dual.storage import CLASS, Saved
from icl_dual.torch_utils import at_least_float32, from_numpy, is_half, vector_norm


@checked
@document_fields
@dataclass(frozen=True)
class Noise:
    """Random noise on the weights that finetuning starts from. Replicas with noise show how stable its outcome is.

    Each trained weight and bias starts from W·(1 + size·g), with g drawn from a standard normal distribution. The same
    seed gives the same g for every model of the same shape.

    >>> Noise(seed=1)
    Noise(seed=1, size=0.001953125)

    Raises:
        ValueError: the size is 0, or not between −1 and 1.
    """

    seed: Seed
    """The seed of g."""
    size: float = 2**-9
    """The relative size of the noise. The default is the unit roundoff of bfloat16, in which most models are published:
    a weight is known no better than that. A negative size gives the noise the opposite sign."""

    def __post_init__(self) -> None:
        if not 0 < abs(self.size) < 1:
            raise ValueError(f"expected size between -1 and 1 and not 0, got {self.size}: pass 2**-9, or a similar one")

    @checked
    def changes(self, weights: dict[str, list[Weight]]) -> dict[str, list[Tensor]]:
        """Return size·g·W of each weight and bias as a matrix or vector, in float32 at least, on the weight's device.

        Args:
            weights: by field's name in `WeightDelta` and by layer, as `trained_weights` returns them.
        """
        generator = torch.Generator().manual_seed(self.seed)
        changes: dict[str, list[Tensor]] = {}
        for name, by_layer in weights.items():
            changes[name] = []
            for weight in by_layer:
                matrix = at_least_float32(weight.to_matrix(weight.parameter.detach()))
                changes[name].append(self.size * torch.randn(matrix.shape, generator=generator).to(matrix) * matrix)
        return changes


DELTA_FIELDS = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")
"""The fields of a `WeightDelta` that hold changes of weights and biases."""

LAYOUT = "d_out d_in"
"""The axes of a delta's matrices. Version 0.1 wrote them into the metadata; versions before it kept ΔW_O otherwise."""


@document_fields
@compare_by_value
@dataclass(frozen=True, eq=False)
class Factors:
    """The outer products that a delta is the sum of: ΔW = Σ_i e_i ⊗ x_i over training tokens (equations 7–9), and
    Δb = Σ_i e_i."""

    x: Float[Tensor, "layer train_token d_model"]
    """The input x_i of the key and value projections. Each demonstration's start token is a training token too."""
    e_K: Float[Tensor, "layer train_token d_kv"]
    """The error signal e_i of the key projections, −lr ∂L/∂(W_K x_i), each at the weights of its own step."""
    e_V: Float[Tensor, "layer train_token d_kv"]
    """The error signal e_i of the value projections, −lr ∂L/∂(W_V x_i), each at the weights of its own step."""
    steps: Int[Tensor, " train_token"]
    """The index of the demonstration that each training token belongs to, from 0."""
    residual: float
    """The largest relative error ‖Σ_i e_i ⊗ x_i − ΔW‖ / ‖ΔW‖ over layers, keys and values. It shows the rounding of a
    small change of a large weight. NaN where a layer did not change."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class WeightDelta(Saved):
    """The change that finetuning made to a model: ΔW and Δb of attention's projections at every layer.

    A projection that was not trained is zero if it is of keys or values, and `None` if it is of queries or outputs.
    """

    model: str
    """The name of the model that was finetuned."""
    fingerprint: str
    """The fingerprint of the model's weights before finetuning, and before `noise`."""
    lr: float | None
    """The learning rate before the schedule; `None` where it is unknown (`between`, `from_adapter`)."""
    config: FinetuneConfig | None
    """How it was finetuned: the loss, the trained projections, the optimiser's steps and LoRA; `None` where this is
    unknown (`between`, `from_adapter`)."""
    W_K: Float[Tensor, "layer d_kv d_model"]
    """ΔW_K; d_kv is n_key_value_heads·d_head, heads in order."""
    W_V: Float[Tensor, "layer d_kv d_model"]
    """ΔW_V; d_kv is n_key_value_heads·d_head, heads in order."""
    b_K: Float[Tensor, "layer d_kv"] | None
    """Δb_K; `None` where the key projections have no bias."""
    b_V: Float[Tensor, "layer d_kv"] | None
    """Δb_V; `None` where the value projections have no bias."""
    demonstrations: list[list[int]]
    """The token ids of each training sequence, in the order of the steps; empty where they are unknown."""
    losses: Float[Tensor, " step"]
    """The mean cross-entropy of each demonstration before its own step, in nats, epoch after epoch; empty where it is
    unknown."""
    training_q: Float[Tensor, "layer train_token head d_head"] | None = None
    """The queries W_Q x of each step's start token and demonstration, before rotation, recorded before the step changed
    any weight, in the order of the first epoch's steps; `None` where they are unknown."""
    training_k: Float[Tensor, "layer train_token kv_head d_head"] | None = None
    """The keys W_K x of the tokens of `training_q`, before rotation; `None` where they are unknown."""
    W_Q: Float[Tensor, "layer d_q d_model"] | None = None
    """ΔW_Q; d_q is n_heads·d_head, heads in order. `None` where the query projections were not trained."""
    W_O: Float[Tensor, "layer d_model d_q"] | None = None
    """ΔW_O; d_q is n_heads·d_head, heads in order. `None` where the output projections were not trained."""
    b_Q: Float[Tensor, "layer d_q"] | None = None
    """Δb_Q; `None` where the query projections have no bias, or were not trained."""
    b_O: Float[Tensor, "layer d_model"] | None = None
    """Δb_O; `None` where the output projections have no bias, or were not trained."""
    factors: Factors | None = None
    """The outer products that ΔW_K and ΔW_V are the sums of; `None` where `finetune` was not told to keep them."""
    noise: Noise | None = None
    """The noise on the weights that finetuning started from, which is no part of the delta; `None` without noise."""
    rounded: bool = False
    """Whether half-precision weights are rounded after the delta is added to them, as in the paper's own set-up and by
    `between`. Otherwise the delta runs beside such weights. Wider weights always get it added."""

    def __post_init__(self) -> None:
        axes = check_axes(self)
        check_values(self, *DELTA_FIELDS, "training_q", "training_k", "factors/x", "factors/e_K", "factors/e_V")
        check_values(self, "lr", "losses", low=0)
        check_values(self, "factors/residual", low=0, nan=True)
        check_values(self, "demonstrations", low=0)
        check_values(self, "factors/steps", low=0, high=len(self.demonstrations) - 1)
        epochs = 1 if self.config is None else self.config.epochs
        of_epochs = "demonstrations" if epochs == 1 else f"demonstrations in {epochs} epochs"
        check_count("losses", len(self.losses), of_epochs, epochs * len(self.demonstrations))
        self._check_head_lengths(axes)
        self._check_trained()
        n_tokens, n_start = sum(map(len, self.demonstrations)), len(self.demonstrations)  # each has start tokens
        if n_start and "train_token" in axes and (axes["train_token"] - n_tokens) % n_start:
            raise ValueError(
                f"expected training tokens for each token of demonstrations ({n_tokens}) and as many start tokens "
                f"for each of them, got {axes['train_token']}: take both from one run"
            )

    def _check_head_lengths(self, axes: dict[str, int]) -> None:
        """Check that a projection has the length of its heads side by side."""
        for kind, d_out, head in (("Q", "d_q", "head"), ("K", "d_kv", "kv_head")):
            if d_out in axes and head in axes:
                n_elements = axes[head] * axes["d_head"]
                check_count(f"{d_out} in W_{kind}", axes[d_out], f"elements in training_{kind.lower()}", n_elements)

    def _check_trained(self) -> None:
        """Check that projections that were not trained have no change, and that those that were have one."""
        trained = PROJECTIONS_TRAINED[self.trained]
        for kind in "QKVO":
            fields = [name for name in (f"W_{kind}", f"b_{kind}") if getattr(self, name) is not None]
            if kind in "QO" and kind in trained and f"W_{kind}" not in fields:
                raise ValueError(f"expected W_{kind} with {self.trained} trained, got none: finetune again")
            if kind not in trained and any(kind in "QO" or getattr(self, name).any() for name in fields):
                raise ValueError(f"expected no change {fields[0]} with {self.trained} trained, got one: finetune again")

    def __repr__(self) -> str:
        matrices = {name: getattr(self, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        norms = ", ".join(f"‖Δ{name}‖={delta.norm():.3g}" for name, delta in matrices.items() if delta is not None)
        if self.config is None:
            return f"WeightDelta({self.model!r}, finetuned elsewhere, {self.trained} changed, {norms})"
        changed = self.config.variation
        steps = [words for name, words in changed.items() if name not in ("loss", "method", "trained")]
        if "method" in changed or "optimiser" not in changed:
            steps.insert(0, self.config.method)
        noise = "" if self.noise is None else f"noise of {self.noise.size:.3g} with seed {self.noise.seed}, "
        return (
            f"WeightDelta({self.model!r}, lr={self.lr}, {', '.join(steps)}, {self.trained} trained, {noise}"
            f"{len(self.demonstrations)} demonstrations, mean loss {self.losses.mean():.3f} before each one's step, "
            f"{norms})"
        )

    @property
    def trained(self) -> Trained:
        """Return the projections that the delta holds changes of."""
        if self.config is not None:
            return self.config.trained
        return "key-value" if self.W_Q is None else "attention"

    @classmethod
    @checked
    def between(cls, model: Model, tuned: object) -> "WeightDelta":
        """Return the delta from a model to any finetuned copy of it, however it was finetuned.

        How the copy was finetuned is unknown to the delta: its `lr`, `config`, `training_q` and `training_k` are
        `None`, its `demonstrations` and `losses` empty.

        Args:
            model: the model before finetuning.
            tuned: a copy with other weights in attention's projections, and nowhere else: a `Model`, a
                `TransformerBridge`, or a Hugging Face `PreTrainedModel`.

        Returns:
            ΔW and Δb in float32 at least, of keys and values where nothing else changed, else of all four projections.

        Raises:
            ValueError: tuned is of another architecture, shape or dtype, has the same weights as the model, or differs
                from it in a weight that is not of attention's projections; names it.

        Example:
            >>> from icl_dual.models import tiny_model
            >>> model, tuned = tiny_model(), tiny_model()
            >>> with torch.no_grad():
            ...     _ = tuned.projections("V")[1].W.parameter.mul_(2)
            >>> delta = WeightDelta.between(model, tuned)
            >>> delta.trained, delta.W_V.flatten(1).any(dim=1).tolist()
            ('key-value', [False, True])
        """
        tuned_model = wrap_finetuned(model, tuned)
        _check_other_weights(model, tuned_model)
        before, after = trained_weights(model, "attention"), trained_weights(tuned_model, "attention")
        _check_same_names(model, set(before), set(after))
        deltas = {
            name: torch.stack([_difference(*pair) for pair in zip(before[name], after[name], strict=True)])
            for name in before
        }
        changed = {name for name, delta in deltas.items() if (delta != 0).any()}  # NaN counts as a change
        if not changed:
            raise ValueError(
                f"expected tuned to have other weights than {model.name!r}, got the same weights: pass the model as "
                "it was before, and a copy that was finetuned apart from it"
            )
        return cls._of_unknown_training(model, deltas, rounded=True)

    @classmethod
    @checked
    def from_adapter(
        cls, model: Model, folder: str | PathLike[str], *, base: NameOrPath | None = None
    ) -> "WeightDelta":
        """Return the delta that a saved LoRA adapter of peft makes: ΔW = B A · alpha / rank.

        How the adapter was trained is unknown to the delta, as in `between`. Reading it needs peft: `pip install
        'icl-dual[peft]'`.

        Args:
            model: the model that the adapter was trained on.
            folder: the adapter's folder, with `adapter_config.json` and `adapter_model.safetensors`.
            base: the name under which the adapter knows its model (`base_model_name_or_path`), where this is not the
                model's own.

        Returns:
            ΔW in float32 at least, of keys and values where nothing else changes, else of all four projections.

        Raises:
            ImportError: peft is not installed.
            AssetError: the folder holds no adapter, or a damaged one.
            UnsupportedModelError: the model is not behind a bridge.
            ValueError: the adapter belongs to another model, changes a weight that is not of attention's projections
                (names it) or no weight at all, or does more than add a matrix to weights.
        """
        change = wrap_adapter(model, Path(folder), base)
        others = [name for name, weight in weights_beyond_projections(change).items() if weight.any()]
        if others:
            raise ValueError(
                f"expected an adapter of attention's projections only, which are all that a delta holds, got {folder} "
                f"with a change of {others[0]!r} ({len(others)} such weights): merge it into its model "
                "(merge_and_unload, save_pretrained), load that, and compare by icl_dual.compare(..., delta=None)"
            )
        deltas = {
            name: torch.stack([weight.to_matrix(weight.parameter.detach()) for weight in by_layer])
            for name, by_layer in trained_weights(change, "attention").items()
        }
        if not any(delta.any() for delta in deltas.values()):
            raise ValueError(f"expected an adapter that changes weights, got zeros in {folder}: train it first")
        return cls._of_unknown_training(model, deltas, rounded=False)

    @classmethod
    def _of_unknown_training(cls, model: Model, deltas: dict[str, Tensor], *, rounded: bool) -> "WeightDelta":
        """Return a delta of keys and values where nothing else changed, else of all four projections."""
        if not any((deltas[name] != 0).any() for name in deltas if name[-1] in "QO"):
            deltas = {name: delta for name, delta in deltas.items() if name[-1] in "KV"}
        fields: dict[str, Any] = {"b_K": None, "b_V": None, **deltas}
        return cls(
            model=model.name,
            fingerprint=model.fingerprint(),
            lr=None,
            config=None,
            **fields,
            demonstrations=[],
            losses=torch.empty(0, dtype=torch.float64),
            rounded=rounded,
        )

    @checked
    @contextmanager
    def applied(self, model: Model) -> Generator[Model]:
        """Yield the model with the delta; afterwards it is as it was, bit for bit, also after an exception.

        The delta is added to the weights. Weights in half precision, which would round most of it away, stay as they
        are, and each projection adds ΔW x + Δb in float32 to its output (unless the delta is `rounded`). A block that
        ends before one that was opened inside it stays applied until that one ends.

        Raises:
            ValueError: the delta belongs to another model, to other weights of it, or to another precision.
        """
        with model.journal.block() as undo:
            _apply(model, self, undo)
            yield model

    def _check_applies(self, model: Model, fingerprint: str) -> None:
        shape = (model.n_layers, model.n_key_value_heads * model.d_head, model.d_model)
        if self.model != model.name or tuple(self.W_K.shape) != shape:
            raise ValueError(
                f"expected a delta of {model.name!r} with ΔW_K of shape {shape}, got one of {self.model!r} with shape "
                f"{tuple(self.W_K.shape)}: apply it to the model that was finetuned"
            )
        if (precision := fingerprinted_precision(self.fingerprint)) not in ("", model.precision):
            raise ValueError(
                f"expected a delta of {model.name!r} in the model's precision, {model.precision}, got one that was "
                f"finetuned in {precision}: finetune again, or load the model in the delta's precision with dtype and "
                "arithmetic of icl_dual.load_model"
            )
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"expected a delta finetuned from these weights of {model.name!r} (fingerprint {fingerprint}), got one "
                f"from {self.fingerprint}: is another delta applied, or was another model finetuned?"
            )

    @classmethod
    def _upgraded(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a delta of an older version as this one keeps it.

        Version 0.1 kept options and the residual of factors flat. Before there was `rounded`, a half-precision model's
        delta was the difference of its rounded weights.
        """
        if "rounded" not in metadata and "W_K" in tensors:
            metadata = {**metadata, "rounded": is_half(tensors["W_K"].dtype)}
        if CLASS in metadata:
            return tensors, metadata
        if "W_O" in tensors and metadata.get("layout") != LAYOUT:
            raise TypeError(f"ΔW_O that is not laid out as [{LAYOUT}], by a version before 0.1: finetune again")
        options = ("loss", "method", "trained")
        upgraded = {name: value for name, value in metadata.items() if name not in (*options, "factors_residual")}
        upgraded["config"] = {name: metadata[name] for name in options if name in metadata}
        if "factors_residual" in metadata:
            upgraded["factors"] = {"residual": metadata["factors_residual"]}
        return tensors, upgraded

    @checked
    def randomised(self, seed: Seed) -> "WeightDelta":
        """Return a delta with each layer's matrices and biases replaced by random directions of the same norm.

        It shows what a change of weights of this size does, whatever finetuning has learned: a control for `applied`.
        Directions are those of centred Gaussians. The copy has no `factors`.

        Args:
            seed: of the directions.
        """
        rng = np.random.default_rng(seed)
        random_deltas: dict[str, Tensor] = {}
        for name in DELTA_FIELDS:
            delta: Tensor | None = getattr(self, name)
            if delta is not None:
                direction = from_numpy(rng.standard_normal(delta.shape)).flatten(1)
                norm = vector_norm(delta.double().flatten(1), dim=1, keepdim=True)
                scaled = direction * (norm / vector_norm(direction, dim=1, keepdim=True))
                random_deltas[name] = scaled.view(delta.shape).to(delta)
        return replace(self, **random_deltas, factors=None)


def trained_weights(model: Model, trained: Trained = "key-value") -> dict[str, list[Weight]]:
    """Return the weights and biases of the trained projections: by layer, under their field's name in `WeightDelta`.

    Args:
        model: the model that holds the parameters.
        trained: the projections: `key-value`, or `attention` for all four.

    Returns:
        By field's name (`W_K`, `b_K`, …), one weight for each layer. Biases that the model lacks are left out.
    """
    weights_by_name: dict[str, list[Weight]] = {}
    for kind in PROJECTIONS_TRAINED[trained]:
        weights, biases = zip(*model.projections(kind), strict=True)
        weights_by_name[f"W_{kind}"] = list(weights)
        if None not in biases:
            weights_by_name[f"b_{kind}"] = list(biases)
    return weights_by_name


@exclusive
def changes_of(model: Model, deltas: Iterable[WeightDelta]) -> list[dict[str, Tensor]]:
    """Return each delta's change of the weights and biases that the model has, by name.

    Raises:
        ValueError: as in `WeightDelta.applied`.
    """
    fingerprint, changes = model.fingerprint(), list[dict[str, Tensor]]()
    for delta in deltas:
        delta._check_applies(model, fingerprint)  # pyright: ignore[reportPrivateUsage]
        changes.append({name: getattr(delta, name) for name in trained_weights(model, delta.trained)})
    return changes


@exclusive
def _apply(model: Model, delta: WeightDelta, undo: Undo) -> None:
    """Apply a delta to a model until the block ends."""
    (changes,), weights = changes_of(model, [delta]), trained_weights(model, delta.trained)
    if is_half(model.storage_dtype) and model.supports_projection_deltas and not delta.rounded:
        add_changes(model, changes, undo)
        return
    keep_values([weight.parameter for by_layer in weights.values() for weight in by_layer], undo)
    for name, by_layer in weights.items():
        for weight, matrix in zip(by_layer, changes[name], strict=True):
            parameter = weight.parameter.detach()
            change = weight.from_matrix(matrix).to(parameter.device)
            if is_half(parameter.dtype):  # rounded once: the sum, not the change
                parameter.copy_(at_least_float32(parameter) + change)
            else:
                parameter.add_(change)


def keep_values(parameters: list[nn.Parameter], undo: Undo) -> list[Tensor]:
    """Return copies of the parameters' values, which are written back when the block ends."""
    before = [parameter.detach().clone() for parameter in parameters]
    undo.push(_write_values, parameters, before)
    return before


def _write_values(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.detach().copy_(value)


def _difference(before: Weight, after: Weight) -> Float[Tensor, "..."]:
    """Return the change of a weight or bias as a matrix or vector, in float32 at least, on the CPU."""
    old, new = (at_least_float32(weight.to_matrix(weight.parameter.detach()).cpu()) for weight in (before, after))
    return new - old


def _check_same_names(model: Model, expected: set[str], got: set[str]) -> None:
    if difference := sorted(expected ^ got):
        raise ValueError(
            f"expected tuned to be a finetuned copy of {model.name!r}, with the weights {sorted(expected)}, got "
            f"{difference[0]!r} in one of them only: pass a copy of the same model"
        )


def _check_other_weights(model: Model, tuned: Model) -> None:
    """Raise a ValueError where a weight that is not of attention's projections differs; names it."""
    before, after = weights_beyond_projections(model), weights_beyond_projections(tuned)
    _check_same_names(model, set(before), set(after))
    different = [
        name for name, weight in before.items() if not torch.equal(weight.detach().cpu(), after[name].detach().cpu())
    ]
    if different:
        raise ValueError(
            f"expected tuned to differ from {model.name!r} in attention's projections only, which are all that a delta "
            f"holds, got another {different[0]!r} ({len(different)} such weights): compare the finetuned model by "
            "capturing it directly, icl_dual.compare(..., delta=None)"
        )
