"""Replicas: the same finetuning again, at slightly other rates from slightly other weights.

SGD amplifies small differences. Near a threshold, a relative change of the rate by 10⁻³, or of the weights by the
precision that they are stored in, changes what is learned. Replicas change both, and show whether a number depends on
it. The first has a rate of 1 − 10⁻³ times the run's. The others start from weights with noise, in pairs of opposite
sign, of which one is likely to be on the other side of a threshold nearby; their rates are 1 + 10⁻³, 1 and 1 − 10⁻³
times the run's in turn.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from icl_dual.arguments import of_type
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig
from icl_dual.finetuning.parallel import finetune_many
from icl_dual.finetuning.sgd import DivergedError, finetune
from icl_dual.finetuning.weight_delta import Noise, WeightDelta
from icl_dual.models import Model
from icl_dual.prompts import Prompts

REPLICAS = 3
"""The default number of replicas: on a CPU, about two fifths of the time of the rest of a small model's cell."""

RATE_CHANGE = 1e-3
"""The relative change of the learning rate."""

NOISE = 2**-9
"""The size of the noise on weights: the unit roundoff of bfloat16, in which most models are published."""

REPLICA_QUERIES = 25
"""Replicas are captured on this many of the first queries."""

REPLICAS_AT_ONCE = 8
"""The most replicas to capture side by side: each needs memory for another copy of its delta."""


@dataclass(frozen=True)
class Finetuned:
    """A finetuning with its replicas."""

    delta: WeightDelta
    """The change of weights by the finetuning itself."""
    replicas: Mapping[str, WeightDelta] = field(default_factory=dict[str, WeightDelta])
    """By replica: the change of weights."""
    diverged: Mapping[str, str] = field(default_factory=dict[str, str])
    """By replica that diverged: the error."""
    names: tuple[str, ...] = ()
    """The names of all replicas in order, those that diverged included."""

    def randomised(self, seed: int) -> "Finetuned":
        """Return random deltas of the same norms, in the same directions for all (`WeightDelta.randomised`)."""
        replicas = {name: delta.randomised(seed) for name, delta in self.replicas.items()}
        return replace(self, delta=self.delta.randomised(seed), replicas=replicas)


def check_replicas(n: int) -> None:
    """Check the number of replicas.

    Raises:
        ValueError: it is negative, or a single one.
    """
    if not of_type(n, int) or isinstance(n, bool) or n < 0 or n == 1:
        raise ValueError(
            f"expected replicas as 0 for none, or at least 2, got {n}: one replica shows no spread, {REPLICAS} are the "
            "default"
        )


def replica_settings(lr: float, n: int) -> dict[str, tuple[float, Noise | None]]:
    """Return the learning rate and the noise of each replica, by its name.

    Example:
        >>> for name, settings in replica_settings(0.5, 4).items():
        ...     print(name, settings)
        lr × 0.999 (0.4995, None)
        lr × 1.001, noise +1 (0.5005, Noise(seed=1, size=0.001953125))
        lr × 1, noise -1 (0.5, Noise(seed=1, size=-0.001953125))
        lr × 0.999, noise +2 (0.4995, Noise(seed=2, size=0.001953125))
    """
    settings: dict[str, tuple[float, Noise | None]] = {}
    for index, factor in zip(range(n), itertools.cycle((1 - RATE_CHANGE, 1 + RATE_CHANGE, 1.0)), strict=False):
        name, noise = f"lr × {factor:g}", None
        if index:
            seed, sign = (index + 1) // 2, 1 if index % 2 else -1
            name, noise = f"{name}, noise {sign * seed:+d}", Noise(seed, sign * NOISE)
        settings[name] = lr * factor, noise
    return settings


def finetune_with_replicas(
    model: Model,
    prompts: Prompts,
    *,
    lr: float,
    replicas: int = REPLICAS,
    config: FinetuneConfig = PAPER_FINETUNING,
    factors: bool = False,
    progress: bool = True,
) -> Finetuned:
    """Finetune a model with replicas, which run in parallel with it where `finetune_many` can do that.

    Args:
        model: the model to finetune; restored afterwards.
        prompts: their demonstrations are the training sequences.
        lr: the learning rate.
        replicas: the number of replicas: 0 for none, or at least 2.
        config: the loss, the method and the trained projections.
        factors: keep the outer products of the finetuning itself.
        progress: show progress bars.

    Raises:
        ValueError: the number of replicas is 1 or negative, or as in `finetune`.
        DivergedError: the finetuning itself diverged. A replica that diverged is named instead.
        PromptError, UnsupportedModelError: as in `finetune`.
    """
    check_replicas(replicas)
    settings = replica_settings(lr, replicas)
    lrs, noises = [rate for rate, _ in settings.values()], [noise for _, noise in settings.values()]
    if factors or not replicas:
        delta = finetune(model, prompts, lr=lr, config=config, factors=factors, progress=progress)
        runs = finetune_many(model, [prompts] * replicas, lrs, noises=noises, config=config, progress=progress)
    else:
        lrs, noises = [lr, *lrs], [None, *noises]
        runs = finetune_many(model, [prompts] * len(lrs), lrs, noises=noises, config=config, progress=progress)
        delta = next(runs)
        if isinstance(delta, DivergedError):
            raise delta
    results = dict(zip(settings, runs, strict=True))
    return Finetuned(
        delta,
        {name: result for name, result in results.items() if isinstance(result, WeightDelta)},
        {name: str(result) for name, result in results.items() if isinstance(result, DivergedError)},
        tuple(results),
    )
