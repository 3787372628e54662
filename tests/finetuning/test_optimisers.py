"""Adam, momentum, epochs, batches and schedules against torch's own in a plain loop on the bare Hugging Face model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finetuning_references import (
    movable,
    projection_weights,
    relative_error,
    same,
    slow_training,
    snapshot,
)

import icl_dual as icl

CONFIGS = {
    "adam": {"optimiser": "adam"},
    "adam in batches": {"optimiser": "adam", "epochs": 2, "batch_size": 3, "schedule": "cosine", "warmup": 1},
    "momentum": {"momentum": 0.9, "epochs": 2, "schedule": "linear"},
    "batches of SGD": {"epochs": 3, "batch_size": 2, "warmup": 2},
}
"""Settings of finetuning that are not the paper's."""


@pytest.mark.parametrize("trained", ["key-value", "attention"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float32), ("gpt2", torch.float32), ("llama", torch.float64), ("gpt2", torch.float64)],
)
def test_deltas_equal_torchs_own_training_of_the_bare_model(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable,
    task: icl.Task,
    architecture: str,
    dtype: torch.dtype,
    name: str,
    trained: Any,
) -> None:
    model, twin = make_model(architecture, dtype), make_hf_model(architecture, dtype)
    twin.config._attn_implementation = "eager"
    before, start = snapshot(model), projection_weights(twin, architecture)
    start = {k: v.clone() for k, v in start.items()}
    config = icl.FinetuneConfig(trained=trained, **CONFIGS[name])
    lr = 1e-3 if config.optimiser == "adam" else 0.02
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    losses = slow_training(twin, prompts, config, lr, movable(twin, architecture, trained))
    delta = icl.finetune(model, prompts, lr=lr, config=config, progress=False)
    print(
        architecture,
        dtype,
        name,
        trained,
        relative_error(delta.losses, torch.tensor(losses).double()),
        [
            relative_error(getattr(delta, n), w - start[n])
            for n, w in projection_weights(twin, architecture).items()
            if getattr(delta, n) is not None
        ],
    )
    assert same(model, before)
