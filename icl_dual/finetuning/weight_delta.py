"""x"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_dual.models import ProjectionName, Model, Weight
from icl_dual.storage import AssetError, load_tensors, reading, save_tensors

Loss = Literal["all", "label"]
Method = Literal["sgd", "full-batch", "layer-causal"]
"""`sgd`, one demonstration a step; `full-batch`, one step on the sum of all demonstrations' losses; `layer-causal`, one
demonstration a step, each layer by its own loss through the final norm and the unembedding."""
Trained = Literal["key-value", "key", "value", "attention"]
"""Which projections of attention move; `attention` is all four."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How to finetune: the loss, the optimisation method and the trained projections. The default is the paper's.

    >>> FinetuneConfig(loss="label")
    FinetuneConfig(loss='label', method='sgd', trained='key-value')

    Raises:
        ValueError: an option is not one of those listed.
    """

    loss: Loss = "all"
    """The mean cross-entropy of `all` tokens of a demonstration (the released code's), or of its `label` word alone."""
    method: Method = "sgd"
    """The optimisation method: `sgd`, `full-batch` or `layer-causal`."""
    trained: Trained = "key-value"
    """The projections that are trained: `key-value` (the paper's), `key`, `value`, or all of `attention`."""

    def __post_init__(self) -> None:
        for name, options in (("loss", Loss), ("method", Method), ("trained", Trained)):
            if (value := getattr(self, name)) not in get_args(options):
                raise ValueError(f"expected {name} out of {get_args(options)}, got {value!r}: choose one of these")


PAPER_FINETUNING = FinetuneConfig()
"""The finetuning of Dai et al. (2023)."""

PROJECTIONS_TRAINED: dict[Trained, tuple[ProjectionName, ...]] = {
    "key-value": ("K", "V"),
    "key": ("K",),
    "value": ("V",),
    "attention": ("Q", "K", "V", "O"),
}

LAYOUT = "d_out d_in"
"""How a delta's matrices are saved."""


@dataclass(frozen=True)
class Factors:
    """What a delta is made of: ΔW = Σ_i e_i ⊗ x_i over the training tokens (equations 7–9), and Δb = Σ_i e_i."""

    x: Float[Tensor, "layer train_token d_model"]
    """The projections' inputs; each demonstration's start token is a training token too."""
    e_K: Float[Tensor, "layer train_token d_kv"]
    """Error signals of the key projections, −lr ∂L/∂(output), each at its own step's weights."""
    e_V: Float[Tensor, "layer train_token d_kv"]
    steps: Int[Tensor, " train_token"]
    """Which demonstration each training token belongs to."""
    residual: float
    """How far the factors' sum is from the delta, relative to it, at worst over layers: rounding of the weights, which
    a small change of a large weight shows. NaN where a layer did not change."""


@dataclass(frozen=True)
class WeightDelta:
    """What finetuning on the demonstrations did to a model: ΔW_K, ΔW_V, Δb_K and Δb_V at every layer.

    What was not trained is zero, or `None` for queries and outputs.
    """

    model: str
    fingerprint: str
    """Of the weights it started from."""
    lr: float
    """The learning rate."""
    config: FinetuneConfig
    """The loss, the method and the trained projections."""
    W_K: Float[Tensor, "layer d_kv d_model"]
    """ΔW_K; d_kv is n_key_value_heads·d_head, heads in order."""
    W_V: Float[Tensor, "layer d_kv d_model"]
    b_K: Float[Tensor, "layer d_kv"] | None
    """Δb_K; `None` where the projections have no bias."""
    b_V: Float[Tensor, "layer d_kv"] | None
    demonstrations: list[list[int]]
    """The token ids trained on, in order."""
    losses: Float[Tensor, " step"]
    """Mean cross-entropy in nats of each demonstration, before its own update."""
    training_q: Float[Tensor, "layer train_token head d_head"]
    """Queries W_Q x of each step's start token and demonstration, recorded before the step's update, in order."""
    training_k: Float[Tensor, "layer train_token kv_head d_head"]
    """Their keys W_K x, before rotation."""
    W_Q: Float[Tensor, "layer d_q d_model"] | None = None
    W_O: Float[Tensor, "layer d_model d_q"] | None = None
    b_Q: Float[Tensor, "layer d_q"] | None = None
    b_O: Float[Tensor, "layer d_model"] | None = None
    factors: Factors | None = None
    """The delta's outer products, where they were asked for."""

    def __repr__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        norms = ", ".join(f"‖Δ{name}‖={moved.norm():.3g}" for name, moved in sizes.items() if moved is not None)
        return (
            f"WeightDelta({self.model!r}, lr={self.lr}, {self.config.method}, {self.config.trained} trained, "
            f"{len(self.losses)} demonstrations, mean loss {self.losses.mean():.3f} before each one's step, {norms})"
        )

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the delta added; afterwards, also after an exception, as it was, bit for bit.

        Raises:
            ValueError: the delta belongs to another model.
        """
        shape = (model.n_layers, model.n_key_value_heads * model.d_head, model.d_model)
        if self.model != model.name or tuple(self.W_K.shape) != shape:
            raise ValueError(
                f"expected a delta of {model.name!r} with ΔW_K of shape {shape}, got one of {self.model!r} with shape "
                f"{tuple(self.W_K.shape)}"
            )
        if self.fingerprint != (now := model.fingerprint()):
            raise ValueError(
                f"expected a delta finetuned from these weights of {model.name!r} (fingerprint {now}), got one from "
                f"{self.fingerprint}: is another delta applied, or was another model finetuned?"
            )
        weights = trained_weights(model, self.config.trained)
        with restored([weight.parameter for by_layer in weights.values() for weight in by_layer]):
            with torch.no_grad():
                for name, by_layer in weights.items():
                    for weight, moved in zip(by_layer, getattr(self, name), strict=True):
                        weight.parameter.add_(weight.from_matrix(moved).to(weight.parameter))
            yield model

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the delta into a folder, as safetensors and JSON."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        metadata = {
            name: value
            for name, value in vars(self).items()
            if name not in tensors and name != "factors" and value is not None
        }
        metadata["layout"] = LAYOUT
        if self.factors is not None:
            parts = vars(self.factors)
            metadata["factors_residual"] = parts["residual"]
            tensors |= {f"factors/{name}": part for name, part in parts.items() if isinstance(part, Tensor)}
        save_tensors(Path(folder), tensors, metadata)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "WeightDelta":
        """Read a delta that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged, or its ΔW_O is laid out as older versions did.
        """
        tensors, metadata = load_tensors(Path(folder))
        parts = {name.removeprefix("factors/"): tensors.pop(name) for name in list(tensors) if "/" in name}
        residual, layout = metadata.pop("factors_residual", None), metadata.pop("layout", None)
        with reading("WeightDelta", folder):
            factors = None if residual is None else Factors(**parts, residual=residual)
            made = cls(**metadata, **{"b_K": None, "b_V": None, **tensors}, factors=factors)
        if made.W_O is not None and layout != LAYOUT:  # once, it was laid out as each model keeps it
            raise AssetError(
                f"{folder}: expected ΔW_O as [{LAYOUT}], got a delta that an older version saved. Finetune anew"
            )
        return made

    def randomised(self, seed: int) -> "WeightDelta":
        """The delta with every matrix and bias turned into a random direction of the same norm.

        What a change of weights of this size does, whatever it has learned: a control for `applied`. Directions are
        centred Gaussians.
        """
        rng = np.random.default_rng(seed)
        turned: dict[str, Tensor] = {}
        for name in DELTA_FIELDS:
            if (moved := getattr(self, name)) is not None:
                drawn = torch.from_numpy(rng.standard_normal(moved.shape)).flatten(1)
                size = moved.double().flatten(1).norm(dim=1, keepdim=True)
                turned[name] = (drawn * (size / drawn.norm(dim=1, keepdim=True))).view(moved.shape).to(moved)
        return replace(self, **turned, factors=None)


DELTA_FIELDS = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")


def trained_weights(model: Model, trained: Trained = "key-value") -> dict[str, list[Weight]]:
    """Weights and biases of the projections that move, by their delta's name and by layer."""
    found = {}
    for kind in PROJECTIONS_TRAINED[trained]:
        weights, biases = zip(*model.projections(kind), strict=True)
        found |= {f"W_{kind}": list(weights)} | ({f"b_{kind}": list(biases)} if None not in biases else {})
    return found


@contextmanager
def restored(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The parameters' values, put back when the block ends, however it ends."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
