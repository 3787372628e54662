"""How to finetune: the loss, the trained weights, the optimiser with its schedule, and LoRA.

The default of every setting is the paper's: one step of plain SGD on each demonstration, at a constant rate.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import annotated_types

from icl_dual.arguments import Count, Index, Rate, Seed, checked
from icl_dual.field_docs import document_fields
from icl_dual.models import ProjectionName

Loss = Literal["all", "label"]
"""The tokens of a demonstration that the loss is the mean cross-entropy of: `all`, or its `label` word alone."""
Method = Literal["sgd", "full-batch", "layer-causal"]
"""What a step follows the gradient of. `sgd`: the loss of a demonstration, or the mean of a batch. `full-batch`: the
sum of all demonstrations' losses. `layer-causal`: as `sgd`, with each layer on a loss of its own, read from its output
through the final norm and the unembedding."""
Trained = Literal["key-value", "key", "value", "attention"]
"""The projections of attention that are trained; `attention` is all four."""
Optimiser = Literal["sgd", "adam", "adamw"]
"""The optimisers, each torch's own with its own defaults: `adamw` has a weight decay of 0.01."""
Schedule = Literal["constant", "linear", "cosine"]
"""How the learning rate falls after the warm-up: not at all, or to zero one step after the last."""
Target = Literal["q", "k", "v", "o"]
"""A projection of attention that gets an adapter."""
Momentum = Annotated[float, annotated_types.Ge(0), annotated_types.Lt(1)]
"""The share of the last step that the next one keeps."""

PROJECTIONS_TRAINED: dict[Trained, tuple[ProjectionName, ...]] = {
    "key-value": ("K", "V"),
    "key": ("K",),
    "value": ("V",),
    "attention": ("Q", "K", "V", "O"),
}
"""The projections that each option trains."""


@checked
@document_fields
@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA): ΔW = B A · alpha / rank of each target, of which A and B alone are trained.

    The package `peft` makes and scales them: `pip install 'icl-dual[peft]'`.

    >>> Lora(rank=4, alpha=16, targets=("k", "v"))
    Lora(rank=4, alpha=16.0, targets=('k', 'v'), seed=0)

    Raises:
        ValueError: there are no targets, or one is given twice.
    """

    rank: Count = 8
    """The rank of each ΔW: the number of rows of A and of columns of B."""
    alpha: Rate = 8.0
    """The scale of ΔW, which is divided by the rank."""
    targets: tuple[Target, ...] | None = None
    """The projections that get an adapter, out of those that are trained; all of them where it is `None`. Each has an
    adapter of its own, also where the model keeps several projections in one matrix."""
    seed: Seed = 0
    """The seed of A's random start. B starts at zero, and ΔW with it."""

    def __post_init__(self) -> None:
        if self.targets is not None and (not self.targets or len({*self.targets}) < len(self.targets)):
            raise ValueError(
                f"expected targets with each projection once, got {self.targets}: leave targets out to adapt all "
                "trained projections"
            )

    @property
    def description(self) -> str:
        """Return the settings in words."""
        targets = "" if self.targets is None else f" of {' '.join(self.targets)}"
        seed = f" seed {self.seed}" if self.seed else ""
        return f"LoRA{targets} rank {self.rank} alpha {self.alpha:g}{seed}"


@checked
@document_fields
@dataclass(frozen=True)
class FinetuneConfig:
    """How to finetune: the loss, the trained projections, and the optimiser's steps. The default is the paper's.

    >>> FinetuneConfig(loss="label").variation
    {'loss': 'label loss'}
    >>> FinetuneConfig(optimiser="adam", epochs=3, batch_size=4, schedule="linear", lora=Lora(rank=4)).variation
    {'optimiser': 'adam', 'epochs': '3 epochs', 'batch_size': 'batches of 4', 'schedule': 'linear schedule', \
'lora': 'LoRA rank 4 alpha 8'}

    Raises:
        ValueError: two options contradict each other.
    """

    loss: Loss = "all"
    """The mean cross-entropy of `all` tokens of a demonstration (the released code's), or of its `label` word alone."""
    method: Method = "sgd"
    """What a step follows the gradient of: `sgd`, a demonstration's loss or the mean of a batch; `full-batch`, the sum
    of all demonstrations' losses; `layer-causal`, each layer's own loss."""
    trained: Trained = "key-value"
    """The projections that are trained: `key-value` (the paper's), `key`, `value`, or all of `attention`."""
    optimiser: Optimiser = "sgd"
    """The optimiser: `sgd`, `adam` or `adamw`, of torch with its own defaults."""
    momentum: Momentum = 0.0
    """The momentum of SGD: the share of the last step that the next one keeps."""
    epochs: Count = 1
    """The number of passes over the demonstrations, each in the same order."""
    batch_size: Count = 1
    """The number of demonstrations in a step, which follows the gradient of their mean loss. An epoch's last batch has
    fewer where the number does not divide that of the demonstrations."""
    schedule: Schedule = "constant"
    """How the learning rate goes on after the warm-up: `constant`, or falling to zero one step after the last, on a
    line (`linear`) or a half cosine (`cosine`)."""
    warmup: Index = 0
    """The number of first steps at a lower rate: step i of w, counted from 1, has i / (w + 1) of the rate."""
    lora: Lora | None = None
    """The low-rank adapters that are trained, and the weights left alone; `None` to train the weights themselves."""

    def __post_init__(self) -> None:
        if self.momentum and self.optimiser != "sgd":
            raise ValueError(
                f"expected no momentum with optimiser={self.optimiser!r}, which averages gradients itself, got "
                f"momentum={self.momentum:g}: leave momentum out, or set optimiser='sgd'"
            )
        if self.batch_size > 1 and self.method == "full-batch":
            raise ValueError(
                "expected no batch_size with method='full-batch', a step of which is on all demonstrations, got "
                f"batch_size={self.batch_size}: leave batch_size out, or set method='sgd'"
            )
        others = sorted({*self._targets} - {*self._of_trained})
        if others:
            raise ValueError(
                f"expected targets of lora out of {self._of_trained}, the projections of trained={self.trained!r}, got "
                f"{', '.join(map(repr, others))}: set trained='attention', or leave targets out"
            )

    @property
    def _of_trained(self) -> tuple[str, ...]:
        return tuple(kind.lower() for kind in PROJECTIONS_TRAINED[self.trained])

    @property
    def _targets(self) -> tuple[str, ...]:
        return self._of_trained if self.lora is None or self.lora.targets is None else self.lora.targets

    @property
    def adapted(self) -> tuple[ProjectionName, ...]:
        """Return the projections that get an adapter, in the order Q, K, V, O; none without `lora`."""
        kinds = PROJECTIONS_TRAINED[self.trained]
        return () if self.lora is None else tuple(kind for kind in kinds if kind.lower() in self._targets)

    @property
    def is_plain_sgd(self) -> bool:
        """Return whether a step is the gradient at the learning rate, or its mean over a batch, and nothing more."""
        return self.optimiser == "sgd" and not self.momentum and self.lora is None

    @property
    def has_equal_steps(self) -> bool:
        """Return whether every demonstration gets a step of its own, and no step depends on the others' number."""
        return self == FinetuneConfig(self.loss, self.method, self.trained) and self.method != "full-batch"

    @checked
    def batches(self, n_demonstrations: Count) -> list[range]:
        """Return the demonstrations of each step, over all epochs.

        Example:
            >>> FinetuneConfig(batch_size=2, epochs=2).batches(3)
            [range(0, 2), range(2, 3), range(0, 2), range(2, 3)]
        """
        size = n_demonstrations if self.method == "full-batch" else self.batch_size
        starts = range(0, n_demonstrations, size)
        return [range(start, min(start + size, n_demonstrations)) for start in starts] * self.epochs

    @checked
    def check_demonstrations(self, n_demonstrations: Count) -> None:
        """Check that there are enough demonstrations for the batches and the warm-up.

        Raises:
            ValueError: a batch is larger than their number, or the warm-up as long as all steps.
        """
        if self.batch_size > n_demonstrations:
            raise ValueError(
                f"expected batch_size of at most the number of demonstrations ({n_demonstrations}), got "
                f"{self.batch_size}: use a smaller batch_size, or more demonstrations"
            )
        if self.warmup >= (n_steps := len(self.batches(n_demonstrations))):
            raise ValueError(
                f"expected warmup below the number of steps ({n_steps}), got {self.warmup}: use a shorter warmup, or "
                "more epochs"
            )

    @property
    def variation(self) -> dict[str, str]:
        """Return every setting that is not the paper's, in words, by field."""
        descriptions = {
            "loss": "{} loss",
            "trained": "{} trained",
            "momentum": "momentum {:g}",
            "epochs": "{} epochs",
            "batch_size": "batches of {}",
            "schedule": "{} schedule",
            "warmup": "warm-up {}",
            "lora": "{0.description}",
        }
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: descriptions.get(name, "{}").format(value) for name, value in changed.items()}


PAPER_FINETUNING = FinetuneConfig()
"""The finetuning of Dai et al. (2023)."""
