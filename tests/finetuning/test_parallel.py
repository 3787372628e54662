"""Finetunings in parallel against one after another."""

import re
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from finetuning_references import (
    ACCURACY,
    LR,
    dtype_of,
    same,
    snapshot,
)
from helpers import some_eta
from torch import nn

import icl_dual as icl
from icl_dual.finetuning import Noise, parallel, sgd
from icl_dual.finetuning.config import Loss, Method, Trained
from icl_dual.prompts import Prompts


def equal_to_one_by_one(
    model: icl.Model, prompts: list[Prompts], lrs: list[float], accuracy: float, **options: Any
) -> list[icl.WeightDelta | icl.DivergedError]:
    """Several runs at once, each held against `finetune`."""
    deltas = list(icl.finetune_many(model, prompts, lrs, progress=False, **options))
    options.pop("at_once", None)
    noises = options.pop("noises", [None] * len(prompts))
    for got, run_prompts, lr, noise in zip(deltas, prompts, lrs, noises, strict=True):
        assert isinstance(got, icl.WeightDelta)
        expected = icl.finetune(model, run_prompts, lr=lr, noise=noise, progress=False, **options)
        for name, value in vars(expected).items():
            other = getattr(got, name)
            if isinstance(value, torch.Tensor):
                assert other.shape == value.shape
                assert other.dtype == value.dtype
                # Δb_K is nothing but rounding, for it moves all scores alike.
                size = value.norm() + 1e-3 * (expected.W_K.norm() + expected.W_V.norm())
                assert (other - value).norm() <= accuracy * size, name
            else:
                assert other == value, name
    return deltas


def several(model: icl.Model, task: icl.Task) -> list[Prompts]:
    """Prompts of other seeds, and of other numbers of demonstrations."""
    demonstrations = [task.demonstrations(k, seed=seed) for k, seed in ((4, 1), (2, 2), (5, 3), (4, 1))]
    return [icl.build_prompts(model, task, examples, task.queries(2)) for examples in demonstrations]


@pytest.mark.parametrize("loss", ["all", "label"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "xglm", "qwen3", "gemma2-window", "bloom"])
def test_several_at_once_are_as_one_by_one(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str, loss: Loss
) -> None:
    model = make_model(architecture, dtype_of(architecture))
    before = snapshot(model)
    accuracy = ACCURACY.get(architecture, 1e-7)
    equal_to_one_by_one(
        model, several(model, task), [LR, 2 * LR, LR / 3, LR / 2], accuracy, config=icl.FinetuneConfig(loss=loss)
    )
    assert same(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("trained", get_args(Trained))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_several_move_what_they_are_told_as_many_at_once_as_they_are_told(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str, trained: Trained, at_once: int
) -> None:
    model = make_model(architecture, torch.float64)
    equal_to_one_by_one(
        model, several(model, task), [LR] * 4, 1e-5, config=icl.FinetuneConfig(trained=trained), at_once=at_once
    )


def test_several_at_once_with_momentum_attention(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("llama", torch.float64)
    with icl.momentum_attention(model, some_eta()):
        equal_to_one_by_one(model, several(model, task), [LR] * 4, 1e-5)


@pytest.mark.parametrize("trained", ["key-value", "attention"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_noisy_and_clean_runs_share_a_batch_and_equal_runs_one_by_one(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str, trained: Trained
) -> None:
    model = make_model(architecture, torch.float64)
    before, prompts = snapshot(model), [several(model, task)[0]] * 4
    noises = [None, Noise(1), Noise(2), Noise(1, size=0.1)]
    config = icl.FinetuneConfig(trained=trained)
    deltas = equal_to_one_by_one(model, prompts, [LR] * 4, 1e-5, config=config, noises=noises)
    assert same(model, before)
    assert [delta.noise for delta in deltas if isinstance(delta, icl.WeightDelta)] == noises
    (alone,) = icl.finetune_many(model, prompts[:1], [LR], config=config, noises=[Noise(2)], progress=False)
    assert isinstance(alone, icl.WeightDelta)
    assert isinstance(deltas[2], icl.WeightDelta)
    assert (alone.W_V - deltas[2].W_V).norm() <= 1e-9 * alone.W_V.norm()


def test_as_many_noises_as_prompts(llama: icl.Model, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="expected as many noises as prompts, got 2 prompts and 1 noises"):
        icl.finetune_many(llama, [prompts, prompts], [LR, LR], noises=[None])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_precision_goes_side_by_side_too(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str
) -> None:
    model = icl.Model(make_model(architecture, torch.bfloat16).wrapped, arithmetic=torch.float32)
    before, noises = snapshot(model), [None, Noise(1), None, Noise(2)]
    equal_to_one_by_one(model, several(model, task), [LR] * 4, 1e-3, noises=noises)
    assert same(model, before)
    half = icl.Model(model.wrapped)
    equal_to_one_by_one(half, several(model, task), [LR] * 4, 0.1, noises=noises)


@pytest.mark.parametrize(
    ("architecture", "dtype", "method", "is_reference"),
    [
        ("llama", torch.bfloat16, "sgd", True),
        ("llama", torch.float32, "layer-causal", False),
        ("gpt2", torch.float32, "full-batch", False),
    ],
)
def test_what_cannot_go_side_by_side_goes_one_by_one(
    make_model: Callable[..., icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    architecture: str,
    dtype: torch.dtype,
    method: Method,
    is_reference: bool,
) -> None:
    model, task = make_model(architecture, dtype), reference_task if is_reference else task
    equal_to_one_by_one(model, several(model, task), [LR, LR, LR, 1e-3], 0.0, config=icl.FinetuneConfig(method=method))


@pytest.mark.parametrize("method", ["sgd", "layer-causal"])
def test_a_run_that_diverges_leaves_the_others_alone(
    make_model: Callable[..., icl.Model], task: icl.Task, method: Method
) -> None:
    model = make_model("llama", torch.float64)
    before, prompts = snapshot(model), several(model, task)
    results = list(
        icl.finetune_many(model, prompts, [LR, 1e38, 1e4, LR], config=icl.FinetuneConfig(method=method), progress=False)
    )
    assert [type(result) for result in results] == [
        icl.WeightDelta,
        icl.DivergedError,
        icl.DivergedError,
        icl.WeightDelta,
    ]
    assert re.search(r"step \d of 2 with lr=1e\+38: loss .* weights changed", str(results[1]))
    assert re.search(r"step \d of 5 with lr=10000: loss .* weights changed", str(results[2]))
    equal_to_one_by_one(model, [prompts[0], prompts[3]], [LR, LR], 1e-5, config=icl.FinetuneConfig(method=method))
    assert same(model, before)


def test_an_exploded_loss_is_divergence_side_by_side_too(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = icl.finetune(llama, prompts, lr=LR, progress=False).losses.tolist()
    limit = sorted(losses)[-2] + 1e-6
    monkeypatch.setattr(sgd, "EXPLODED_LOSS", limit / losses[0])
    (result,) = icl.finetune_many(llama, [prompts], [LR], progress=False)
    assert re.search(rf"step {1 + losses.index(max(losses))} of 4 with lr=0\.05", str(result))


def test_several_ask_for_a_rate_each(llama: icl.Model, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="expected as many learning rates as prompts, got 2 prompts and 1 rates"):
        icl.finetune_many(llama, [prompts, prompts], [LR])
    with pytest.raises(ValueError, match="expected at_once of at least 1, got 0"):
        icl.finetune_many(llama, [prompts], [LR], at_once=0)
    with pytest.raises(ValueError, match=r"expected a learning rate above 0, got -1"):
        icl.finetune_many(llama, [prompts, prompts], [LR, -1.0])
    with pytest.raises(ValueError, match="expected prompts with demonstrations to finetune on"):
        icl.finetune_many(llama, [prompts, prompts.zero_shot()], [LR, LR])
    assert list(icl.finetune_many(llama, [], [])) == []


@pytest.mark.parametrize(("at_once", "passes"), [(8, 5), (2, 4 + 5), (1, 4 + 2 + 5 + 4)])
def test_runs_share_passes(
    make_model: Callable[..., icl.Model],
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    passes: int,
) -> None:
    """Of 4, 2, 5 and 4 steps: as many passes as the longest of a group has steps."""
    model, counted = make_model("llama"), []
    run = model.run
    monkeypatch.setattr(model, "run", lambda *args, **kwargs: counted.append(1) or run(*args, **kwargs))
    list(icl.finetune_many(model, several(model, task), [LR] * 4, at_once=at_once, progress=False))
    assert len(counted) == passes


def test_runs_that_do_not_fit_side_by_side_are_halved(
    make_model: Callable[..., icl.Model],
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model("llama", torch.float64)
    prompts, run = several(model, task), model.run
    expected = list(icl.finetune_many(model, prompts, [LR] * 4, progress=False))

    def full(tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tokens, **kwargs)

    monkeypatch.setattr(model, "run", full)
    deltas = list(icl.finetune_many(model, prompts, [LR] * 4, progress=False))
    for got, wanted in zip(deltas, expected, strict=True):
        assert isinstance(got, icl.WeightDelta)
        assert isinstance(wanted, icl.WeightDelta)
        assert (got.W_V - wanted.W_V).norm() <= 1e-5 * wanted.W_V.norm()
    assert caplog.text.count("do not fit in memory in parallel") == 1, "said once, though halved twice"
    assert "4 finetunings do not fit" in caplog.text
    monkeypatch.setattr(model, "run", lambda *args, **kwargs: full(torch.zeros(2, 1)))
    with pytest.raises(MemoryError, match=r"expected memory to finetune Model\(.*weights are as before"):
        list(icl.finetune_many(model, prompts, [LR] * 4, progress=False))


def test_models_that_turn_keys_by_length_are_finetuned_one_by_one(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding would make a short demonstration as long as the longest."""
    model = make_model("llama")
    model.rope_scaling_threshold = 20
    lengths, run = [], model.run
    monkeypatch.setattr(model, "run", lambda ids, **kwargs: lengths.append(tuple(ids.shape)) or run(ids, **kwargs))
    prompts = several(model, task)
    list(icl.finetune_many(model, prompts, [LR] * 4, progress=False))
    assert lengths == [
        (1, len(run_prompts.start) + len(tokens)) for run_prompts in prompts for tokens in run_prompts.demonstrations
    ]


def test_a_projection_that_does_not_run_is_refused(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    elsewhere, hook = nn.Linear(1, 1), model.backend.projection_delta_hook
    monkeypatch.setattr(
        model.backend,
        "projection_delta_hook",
        lambda layer, *of: (elsewhere, print) if layer == 1 else hook(layer, *of),
    )
    with pytest.raises(icl.UnsupportedModelError, match="a layer that the forward pass calls, got one that"):
        list(icl.finetune_many(model, [prompts], [LR], progress=False))


def test_losses_over_a_large_vocabulary_lose_no_digits(make_model: Callable[..., icl.Model], prompts: Prompts) -> None:
    """As large as a real one's, in float32, against float64."""
    model, row = make_model("llama"), (*prompts.start, *prompts.training_sequences[0])
    logits = 3 * torch.randn(3, len(row), 49152, generator=torch.Generator().manual_seed(0))
    runs = parallel._ParallelRuns(model, [prompts] * 3, [LR] * 3, icl.FinetuneConfig(), [None] * 3)
    n_targets = len(row) - len(prompts.start)
    sequences = runs._sequences([row] * 3, [n_targets] * 3, len(row), n_targets)
    losses = runs._losses(sequences, logits[torch.arange(3)[:, None], sequences.read])
    targets = torch.tensor(row[len(prompts.start) :])
    for got, row_logits in zip(losses.tolist(), logits[:, len(prompts.start) - 1 : -1].double(), strict=True):
        assert got == pytest.approx(nn.functional.cross_entropy(row_logits, targets).item(), abs=1e-5)


STEPS: dict[str, dict[str, Any]] = {
    "batches of SGD": {"epochs": 2, "batch_size": 3, "schedule": "cosine"},
    "momentum": {"momentum": 0.9, "schedule": "linear", "warmup": 2},
    "adamw": {"optimiser": "adamw", "epochs": 2, "trained": "attention"},
    "LoRA": {"lora": icl.Lora(rank=2, targets=("v",)), "epochs": 2},
    "LoRA by adamw": {"lora": icl.Lora(rank=2), "optimiser": "adamw", "trained": "attention", "batch_size": 2},
}
"""Settings under which steps depend on each other, or on the number of demonstrations."""


@pytest.mark.parametrize("name", STEPS)
def test_other_steps_at_once_are_as_one_by_one(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At rates of their own, from noise and without."""
    model = make_model("gpt2", torch.float64)
    before, run_prompts = snapshot(model), several(model, task)
    prompts, noises = [run_prompts[0], run_prompts[3], run_prompts[0]], [None, Noise(1), None]
    config = icl.FinetuneConfig(**STEPS[name])
    lr = 1e-3 if config.optimiser == "adamw" else LR
    rows: list[int] = []
    run = icl.Model.run

    def count_rows(self: icl.Model, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        rows.append(len(tokens))
        return run(self, tokens, **options)

    monkeypatch.setattr(icl.Model, "run", count_rows)
    equal_to_one_by_one(model, prompts, [lr, 2 * lr, lr / 3], 1e-7, config=config, noises=noises)
    assert same(model, before)
    n_read = 4 * config.epochs
    assert rows == [3] * n_read + [1] * 3 * n_read


@pytest.mark.parametrize("name", ["adamw", "LoRA", "batches of SGD"])
def test_a_run_that_diverges_leaves_other_steps_as_they_were(
    make_model: Callable[..., icl.Model], task: icl.Task, name: str
) -> None:
    model, config = make_model("gpt2", torch.float64), icl.FinetuneConfig(**STEPS[name])
    prompts = several(model, task)[0]
    lr = 1e-3 if config.optimiser == "adamw" else LR
    first, diverged, last = icl.finetune_many(model, [prompts] * 3, [lr, 1e6, 2 * lr], config=config, progress=False)
    assert isinstance(diverged, icl.DivergedError)
    for got, rate in ((first, lr), (last, 2 * lr)):
        expected = icl.finetune(model, prompts, lr=rate, config=config, progress=False)
        assert isinstance(got, icl.WeightDelta)
        torch.testing.assert_close(got.W_V, expected.W_V, rtol=1e-7, atol=1e-12)


def test_runs_of_other_lengths_go_one_by_one_where_steps_depend_on_it(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model, config = make_model("gpt2", torch.float64), icl.FinetuneConfig(schedule="linear")
    equal_to_one_by_one(model, several(model, task), [LR] * 4, 0.0, config=config)


def test_the_norm_of_a_step_is_that_of_what_it_changes() -> None:
    """Over all tensors: the sum of the norms bounds the change, which is computed only where the bound is exceeded."""
    generator = torch.Generator().manual_seed(0)
    tensors, gradients = ([torch.randn(2, *shape, generator=generator) for shape in ((3, 4), (5,))] for _ in range(2))
    before, lrs = [tensor.clone() for tensor in tensors], torch.tensor([0.5, 2.0])
    norms = parallel._Steps(icl.FinetuneConfig(), 1, tensors).take(tensors, gradients, lrs, None)
    changes = [(tensor - old).flatten(1) for tensor, old in zip(tensors, before, strict=True)]
    torch.testing.assert_close(norms, torch.cat(changes, dim=1).norm(dim=1))


def test_noise_that_a_gpu_keeps_is_that_of_the_cpu_with_its_sign(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = parallel._ParallelRuns(llama, [prompts], [LR], icl.FinetuneConfig(), [None])
    expected = {size: Noise(1, size).changes(runs.weights) for size in (0.1, -0.1)}
    monkeypatch.setattr(type(llama), "device", torch.device("cuda"))
    for size, changes in expected.items():
        got = runs._noise(parallel._Run(prompts, LR, Noise(1, size)))
        for name, by_layer in changes.items():
            assert all(map(torch.equal, got[name], by_layer))
    assert len(runs.drawn_noise) == 1, "drawn once for both signs"


def test_the_change_by_adapters_is_computed_and_not_bounded(llama: icl.Model, prompts: Prompts) -> None:
    """It is a product of theirs, which may be larger than the sum of their steps."""
    config = icl.FinetuneConfig(lora=icl.Lora(rank=2))
    for settings, is_bounded in ((icl.FinetuneConfig(), True), (config, False)):
        runs = parallel._ParallelRuns(llama, [prompts], [LR], settings, [None])
        runs._step()
        runs._look()
        assert (runs.runs[0].path_length < float("inf")) == is_bounded
