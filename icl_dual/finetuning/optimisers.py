"""Torch's optimisers and learning-rate schedules, as a `FinetuneConfig` sets them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from icl_dual.finetuning.config import FinetuneConfig


def make_optimiser(config: FinetuneConfig, parameters: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    """Return torch's optimiser of the parameters, with its own defaults."""
    match config.optimiser:
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, foreach=True)
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, foreach=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, foreach=True)


def weight_decay(optimiser: torch.optim.Optimizer) -> float:
    """Return by which share of the learning rate an optimiser shrinks the weights in a step."""
    return float(optimiser.param_groups[0]["weight_decay"])


def rate_factors(config: FinetuneConfig, n_steps: int) -> list[float]:
    """Return the learning rate of each step, in units of the rate that is set: torch's schedule at a rate of 1.

    Example:
        >>> rate_factors(FinetuneConfig(schedule="linear", warmup=1), 5)
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = _scheduler(config, optimiser, n_steps - config.warmup)
    factors: list[float] = []
    for _ in range(n_steps):
        factors.append(optimiser.param_groups[0]["lr"])
        optimiser.step()  # pyright: ignore[reportUnknownMemberType]
        scheduler.step()
    return factors


def _scheduler(config: FinetuneConfig, optimiser: torch.optim.Optimizer, n_steps: int) -> Any:
    """Return torch's schedule of a warm-up and of the n_steps after it."""
    warmup = config.warmup
    match config.schedule:
        case "constant":
            main: Any = lr_scheduler.ConstantLR(optimiser, factor=1.0)
        case "linear":
            main = lr_scheduler.LinearLR(optimiser, start_factor=1.0, end_factor=0.0, total_iters=n_steps)
        case "cosine":
            main = lr_scheduler.CosineAnnealingLR(optimiser, T_max=n_steps)
    if not warmup:
        return main
    first = lr_scheduler.LinearLR(optimiser, start_factor=1 / (warmup + 1), end_factor=1.0, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimiser, [first, main], milestones=[warmup])
