"""Adam, momentum, epochs, batches and schedules against torch's own in a plain loop on the bare Hugging Face model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finetuning_references import (
    movable,
    projection_weights,
    rate_factor,
    relative_error,
    same,
    slow_training,
    snapshot,
)

import icl_dual as icl
from icl_dual.finetuning.optimisers import rate_factors

CONFIGS: dict[str, dict[str, Any]] = {
    "adam": {"optimiser": "adam", "epochs": 2, "trained": "attention"},
    "adam in batches": {"optimiser": "adam", "epochs": 2, "batch_size": 3, "schedule": "cosine", "warmup": 1},
    "momentum": {"momentum": 0.9, "epochs": 2, "schedule": "linear"},
    "batches of SGD": {"epochs": 3, "batch_size": 2, "warmup": 2},
}
"""Settings of finetuning that are not the paper's."""

EXACT = 1e-12
"""The relative error of float64."""


def errors_against_torch(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable,
    task: icl.Task,
    architecture: str,
    dtype: torch.dtype,
    config: icl.FinetuneConfig,
) -> dict[str, float]:
    """By name, the relative error of ΔW and of the losses, against torch's own training of the bare model."""
    model, twin = make_model(architecture, dtype), make_hf_model(architecture, dtype)
    twin.config._attn_implementation = "eager"
    lr = 0.02 if config.optimiser == "sgd" else 0.005
    before = snapshot(model)
    start = {name: W.clone() for name, W in projection_weights(twin, architecture).items()}
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    losses = slow_training(twin, prompts, config, lr, movable(twin, architecture, config.trained))
    delta = icl.finetune(model, prompts, lr=lr, config=config, progress=False)
    assert same(model, before)
    errors = {"losses": relative_error(delta.losses, torch.tensor(losses, dtype=torch.float64))}
    for name, W in projection_weights(twin, architecture).items():
        if getattr(delta, name) is not None:
            errors[name] = relative_error(getattr(delta, name), W - start[name])
    return errors


@pytest.mark.parametrize("name", CONFIGS)
def test_deltas_equal_torchs_own_training_of_a_bare_gpt2_in_float64(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, name: str
) -> None:
    config = icl.FinetuneConfig(**CONFIGS[name])
    errors = errors_against_torch(make_model, make_hf_model, task, "gpt2", torch.float64, config)
    assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize(
    ("dtype", "settings", "accuracy"),
    [
        (torch.float32, {"optimiser": "adam", "epochs": 2}, 1e-6),
        (torch.float32, {"momentum": 0.9, "epochs": 2, "schedule": "linear"}, 1e-6),
        (torch.float64, {"optimiser": "adamw", "epochs": 2, "trained": "attention"}, EXACT),
        # Llama takes its softmax in float32 also at float64: what rounds otherwise there, differs by that.
        (torch.float64, {"optimiser": "adamw", "batch_size": 3, "trained": "attention"}, 1e-6),
    ],
)
def test_deltas_equal_torchs_own_training_of_a_bare_llama(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable,
    task: icl.Task,
    dtype: torch.dtype,
    settings: dict[str, Any],
    accuracy: float,
) -> None:
    errors = errors_against_torch(make_model, make_hf_model, task, "llama", dtype, icl.FinetuneConfig(**settings))
    assert max(errors.values()) < accuracy, errors


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_their_formulas(schedule: Any, warmup: int) -> None:
    config = icl.FinetuneConfig(schedule=schedule, warmup=warmup)
    for n_steps in (warmup + 1, 9):
        expected = [rate_factor(config, step, n_steps) for step in range(n_steps)]
        assert rate_factors(config, n_steps) == pytest.approx(expected, rel=1e-12)


def test_the_default_has_the_full_rate_at_every_step_to_the_bit() -> None:
    assert rate_factors(icl.FinetuneConfig(), 50) == [1.0] * 50


def test_weights_in_half_precision_decay_with_their_change_beside_them(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    """By steps so small that the weight decay is most of the change."""
    model = icl.Model(make_model("llama", torch.bfloat16).wrapped, arithmetic=torch.float32)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    adam, adamw = (
        icl.finetune(model, prompts, lr=1e-4, config=icl.FinetuneConfig(optimiser=optimiser), progress=False)
        for optimiser in ("adam", "adamw")
    )
    W = torch.stack([projection.matrix.float() for projection in model.projections("V")])
    torch.testing.assert_close(adamw.W_V - adam.W_V, -4 * 1e-4 * 0.01 * W, rtol=0.02, atol=1e-8)


def test_losses_are_those_of_all_epochs_and_queries_those_of_the_first(
    llama: icl.Model, prompts: icl.Prompts, tmp_path: Any
) -> None:
    config = icl.FinetuneConfig(optimiser="adam", epochs=3, batch_size=2)
    delta = icl.finetune(llama, prompts, lr=0.01, config=config, progress=False)
    alone = icl.finetune(llama, prompts, lr=0.01, config=icl.FinetuneConfig(batch_size=2), progress=False)
    assert len(delta.losses) == 12
    assert delta.losses.view(3, 4).mean(1).diff().max() < 0
    assert delta.training_q is not None
    assert alone.training_q is not None
    assert delta.training_q.shape == alone.training_q.shape
    assert torch.equal(delta.training_q[:, :5], alone.training_q[:, :5]), "before the first step"
    assert "adam, 3 epochs, batches of 2, key-value trained, 4 demonstrations" in repr(delta)
    delta.save(tmp_path / "delta")
    assert icl.WeightDelta.load(tmp_path / "delta") == delta


@pytest.mark.parametrize("method", ["sgd", "layer-causal"])
def test_factors_make_up_the_delta_of_batches_and_schedules(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts, method: Any
) -> None:
    model = make_model("gpt2", torch.float64)
    config = icl.FinetuneConfig(method=method, batch_size=3, schedule="linear", warmup=1)
    delta = icl.finetune(model, prompts, lr=0.05, config=config, factors=True, progress=False)
    assert delta.factors is not None
    assert delta.factors.residual < 1e-9


def test_experiments_run_with_replicas(llama: icl.Model, prompts: icl.Prompts) -> None:
    config = icl.FinetuneConfig(optimiser="adam", epochs=2, batch_size=2, lora=icl.Lora(rank=2))
    fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
    experiment = icl.run_experiment(llama, prompts, lr=0.01, config=config, replicas=2, fields=fields, progress=False)
    comparison = experiment.compare()
    assert len(experiment.replicas) == 2
    assert {"SimAOU", "Kendall"} <= comparison.per_layer.keys()
    assert torch.isfinite(comparison.per_layer["Kendall"]).all()
    assert torch.isfinite(experiment.updates(progress=False).cosine).all()
