"""Finetuning against slow references on the bare Hugging Face model."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from finetuning_references import (
    ACCURACY,
    KINDS,
    LR,
    cosines,
    dtype_of,
    hold_against,
    model_of,
    same,
    slow_full_batch,
    slow_layer_causal,
    slow_loss,
    slow_sgd,
    snapshot,
    targets_of,
)
from helpers import some_eta, with_momentum
from torch import nn
from transformers import PreTrainedModel

import icl_dual as icl
from icl_dual.finetuning import Noise, sgd
from icl_dual.finetuning.config import Loss, Method, Trained
from icl_dual.finetuning.weight_delta import trained_weights
from icl_dual.models import tiny_model
from icl_dual.prompts import Prompts


@pytest.mark.parametrize("loss", ["all", "label"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "xglm", "qwen3"])
def test_finetuning_equals_sgd_on_the_bare_model(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, architecture: str, loss: Loss
) -> None:
    dtype = dtype_of(architecture)
    model, twin = make_model(architecture, dtype), make_hf_model(architecture, dtype)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    expected = slow_sgd(twin, prompts, targets_of(prompts, loss), architecture)
    delta = icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(loss=loss), progress=False)
    hold_against(twin, expected, model, prompts, delta, ACCURACY.get(architecture, 1e-8))


@pytest.mark.parametrize(
    ("architecture", "method"), [("llama", "sgd"), ("gpt2", "sgd"), ("llama", "layer-causal"), ("neox", "layer-causal")]
)
def test_finetuning_with_momentum_attention_equals_that_of_a_bare_model_that_has_it(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, architecture: str, method: Method
) -> None:
    model, twin = make_model(architecture, torch.float64), make_hf_model(architecture, torch.float64)
    with_momentum(twin, architecture, some_eta())
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    descend = slow_sgd if method == "sgd" else slow_layer_causal
    expected = descend(twin, prompts, targets_of(prompts, "all"), architecture)
    with icl.momentum_attention(model, some_eta()):
        delta = icl.finetune(
            model, prompts, lr=LR, config=icl.FinetuneConfig(method=method), factors=True, progress=False
        )
        hold_against(twin, expected, model, prompts, delta, ACCURACY.get(architecture, 1e-8))
    assert delta.factors is not None
    assert delta.factors.residual < 1e-5
    with pytest.raises(ValueError, match=rf"a delta of '{architecture}' .* got one of '{architecture} \+ momentum"):
        delta.applied(model).__enter__()


@pytest.mark.parametrize("trained", ["key", "value", "attention"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "xglm", "qwen3"])
def test_other_projections_equal_sgd_restricted_to_them(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, architecture: str, trained: Trained
) -> None:
    dtype = dtype_of(architecture)
    model, twin = make_model(architecture, dtype), make_hf_model(architecture, dtype)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    expected = slow_sgd(twin, prompts, targets_of(prompts, "all"), architecture, trained)
    delta = icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(trained=trained), progress=False)
    hold_against(twin, expected, model, prompts, delta, ACCURACY.get(architecture, 1e-8))
    moved = {kind for kind in "QKVO" if (W := getattr(delta, f"W_{kind}")) is not None and (W != 0).any()}
    assert moved == set(KINDS[trained])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "qwen3"])
def test_full_batch_equals_one_step_on_the_sum_of_losses(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, architecture: str
) -> None:
    model, twin = make_model(architecture, torch.float64), make_hf_model(architecture, torch.float64)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    expected = slow_full_batch(twin, prompts, architecture)
    delta = icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(method="full-batch"), progress=False)
    hold_against(twin, expected, model, prompts, delta, ACCURACY.get(architecture, 1e-8))
    # Its step in one go, to first order as long as SGD's together, which are other steps.
    one_by_one = icl.finetune(model, prompts, lr=LR, progress=False)
    assert 0.01 < (one_by_one.W_V - delta.W_V).norm() / one_by_one.W_V.norm() < 0.9


@pytest.mark.parametrize("loss", ["all", "label"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "gemma2-window"])
def test_layer_causal_equals_each_layers_own_gradient_on_the_bare_model(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, architecture: str, loss: Loss
) -> None:
    model, twin = make_model(architecture, torch.float64), make_hf_model(architecture, torch.float64)
    if architecture == "gemma2-window":  # so low that it bends the logits
        for original in (twin, model.wrapped.original_model):
            original.config.final_logit_softcapping = 2.0
        model.wrapped.cfg.output_logits_soft_cap = 2.0  # which the bridge read when it was booted
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    expected = slow_layer_causal(twin, prompts, targets_of(prompts, loss), architecture)
    delta = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method="layer-causal", loss=loss), progress=False
    )
    hold_against(twin, expected, model, prompts, delta, ACCURACY.get(architecture, 1e-8))


@pytest.mark.parametrize("at_once", [1, 40])
def test_layers_may_be_read_out_in_parts(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    model = make_model("llama", torch.float64)
    expected = icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(method="layer-causal"), progress=False)
    monkeypatch.setattr(sgd, "READOUT_TOKENS", at_once)
    got = icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(method="layer-causal"), progress=False)
    torch.testing.assert_close(got.W_K, expected.W_K, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(got.W_V, expected.W_V, rtol=1e-9, atol=1e-14)


def test_a_layer_causal_delta_knows_nothing_of_the_layers_above(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    deltas_by_method: dict[str, list[icl.WeightDelta]] = {"sgd": [], "layer-causal": []}
    for altered in (False, True):
        model = make_model("llama", torch.float64)
        if altered:
            with torch.no_grad():
                for parameter in model.wrapped.blocks[1].parameters():
                    parameter.mul_(1.5)
        for method, deltas in deltas_by_method.items():
            deltas.append(
                icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(method=cast(Any, method)), progress=False)
            )
    for name in ("W_K", "W_V"):
        plain, altered_ = (getattr(delta, name) for delta in deltas_by_method["layer-causal"])
        torch.testing.assert_close(altered_[0], plain[0], rtol=1e-9, atol=1e-14)
        for layer in (1, 2):
            assert relative(altered_[layer], plain[layer]) > 0.01
        plain, altered_ = (getattr(delta, name) for delta in deltas_by_method["sgd"])
        assert relative(altered_[0], plain[0]) > 0.01, "SGD's gradient does come down from above"


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_layers_that_are_read_out_otherwise_have_no_loss_of_their_own(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    model = make_model("llama")
    before = snapshot(model)
    model.wrapped.cfg.output_logits_soft_cap = 1.0  # which a Llama does not heed
    with pytest.raises(icl.UnsupportedModelError, match=r"llama .*: expected the last layer's output to be read out"):
        icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(method="layer-causal"), progress=False)
    assert same(model, before)


def test_training_queries_are_recorded_before_their_own_update(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama")
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(3))
    delta = icl.finetune(model, prompts, lr=LR, progress=False)
    n_tokens = len(prompts.demonstration_positions) + 3  # a start token each
    assert delta.training_q is not None
    assert delta.training_k is not None
    assert delta.training_q.shape == (3, n_tokens, 4, 8)
    assert delta.training_k.shape == (3, n_tokens, 2, 8)
    first_only = icl.build_prompts(model, task, task.demonstrations(3, seed=1)[:1], task.queries(3))
    after_first = icl.finetune(model, first_only, lr=LR, progress=False)

    def keep(outputs: list[torch.Tensor], module: nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs.append(output[0])

    def projected(tokens: tuple[int, ...]) -> list[torch.Tensor]:
        """Queries and keys of a demonstration by the model as it is now, before rotation."""
        outputs_by_name: dict[str, list[torch.Tensor]] = {"q_proj": [], "k_proj": []}
        handles = []
        for path, module in model.wrapped.original_model.named_modules():
            name = path.removesuffix("._original_component").split(".")[-1]
            if name in outputs_by_name and isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(partial(keep, outputs_by_name[name])))
        with torch.no_grad():
            model.run(torch.tensor([[*prompts.start, *tokens]]))
        for handle in handles:
            handle.remove()
        return [torch.stack(outputs).unflatten(-1, (-1, 8)) for outputs in outputs_by_name.values()]

    first, second = prompts.demonstrations[:2]
    n_first, n_second = len(first) + 1, len(second) + 1
    recorded = delta.training_q, delta.training_k
    for got, expected in zip(recorded, projected(first), strict=True):
        torch.testing.assert_close(got[:, :n_first], expected)
    with after_first.applied(model):
        for got, expected in zip(recorded, projected(second), strict=True):
            torch.testing.assert_close(got[:, n_first : n_first + n_second], expected)
    assert not torch.allclose(delta.training_k[:, n_first : n_first + n_second], projected(second)[1])


def test_without_a_start_token_a_demonstrations_first_token_is_not_predicted(
    make_model: Callable[..., icl.Model], make_hf_model: Callable[..., PreTrainedModel], prompts: Prompts
) -> None:
    model, twin = make_model("gpt2", torch.float64), make_hf_model("gpt2", torch.float64)
    bare = replace(prompts, start=(), demonstrations=prompts.demonstrations[:1], demonstration_label_lengths=(1,))
    delta = icl.finetune(model, bare, lr=LR, progress=False)
    ids = torch.tensor([bare.demonstrations[0]])
    expected = slow_loss(cast(Any, twin)(ids).logits, ids, ids.shape[1] - 1)
    assert delta.losses.item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"expected demonstrations of at least 2 tokens, .* included, got \(7,\)"):
        icl.finetune(model, replace(bare, demonstrations=((7,),)), lr=LR, progress=False)


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan"), float("inf")])
def test_learning_rates_are_positive_numbers(llama: icl.Model, prompts: Prompts, lr: float) -> None:
    with pytest.raises(ValueError, match=r"expected a learning rate above 0, got"):
        icl.finetune(llama, prompts, lr=lr, progress=False)


@pytest.mark.parametrize("lr", [1e4, 1e38])
def test_divergence_names_the_step_and_the_rate_and_leaves_the_model(
    make_model: Callable[..., icl.Model], prompts: Prompts, lr: float
) -> None:
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(
        icl.DivergedError, match=rf"step \d of 4 with lr={re.escape(f'{lr:g}')}: loss .* weights changed"
    ):
        icl.finetune(model, prompts, lr=lr, progress=False)
    assert same(model, before)


def test_an_exploded_loss_is_divergence(llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = icl.finetune(llama, prompts, lr=LR, progress=False).losses.tolist()
    limit = sorted(losses)[-2] + 1e-6
    module = sgd
    assert losses[0] > math.log(llama.d_vocab), "it begins with knowing less than nothing"
    monkeypatch.setattr(module, "EXPLODED_LOSS", limit / losses[0])
    with pytest.raises(icl.DivergedError, match=rf"step {1 + losses.index(max(losses))} of 4 with lr=0\.05"):
        icl.finetune(llama, prompts, lr=LR, progress=False)


def test_a_model_that_begins_far_from_knowing_anything_is_finetuned_all_the_same(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.wrapped.original_model.get_output_embeddings().weight.mul_(30)
    losses = icl.finetune(model, prompts, lr=1e-5, progress=False).losses
    assert losses.min() > sgd.EXPLODED_LOSS * math.log(model.d_vocab)


@pytest.mark.parametrize("method", ["full-batch", "layer-causal"])
def test_other_methods_diverge_too(llama: icl.Model, prompts: Prompts, method: Method) -> None:
    with pytest.raises(icl.DivergedError, match=r"step \d of 4 with lr=10000: loss .* weights changed"):
        icl.finetune(llama, prompts, lr=1e4, config=icl.FinetuneConfig(method=method), progress=False)


@pytest.mark.parametrize("trained", ["key", "value"])
def test_factors_ask_for_keys_and_values_both(llama: icl.Model, prompts: Prompts, trained: Trained) -> None:
    with pytest.raises(ValueError, match=rf"expected keys and values to be trained .* got trained='{trained}'"):
        icl.finetune(llama, prompts, lr=LR, config=icl.FinetuneConfig(trained=trained), factors=True, progress=False)


@pytest.mark.parametrize(
    ("method", "trained"),
    [("full-batch", "key-value"), ("layer-causal", "key-value"), ("sgd", "attention"), ("layer-causal", "attention")],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_make_up_the_delta_of_any_method(
    make_model: Callable[..., icl.Model], prompts: Prompts, architecture: str, method: Method, trained: Trained
) -> None:
    model = make_model(architecture, torch.float64)
    delta = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method=method, trained=trained), factors=True, progress=False
    )
    factors = delta.factors
    assert factors is not None
    assert factors.residual < 1e-9
    for W, b, e in ((delta.W_K, delta.b_K, factors.e_K), (delta.W_V, delta.b_V, factors.e_V)):
        for layer in range(3):
            outer_sum = sum(np.outer(*pair) for pair in zip(e[layer].numpy(), factors.x[layer].numpy(), strict=True))
            np.testing.assert_allclose(outer_sum, W[layer].numpy(), rtol=1e-8, atol=1e-10 * W[layer].abs().max().item())
        if b is not None:
            torch.testing.assert_close(e.sum(1), b, rtol=1e-8, atol=1e-12)
    lengths = [len(tokens) + 1 for tokens in prompts.demonstrations]
    assert factors.steps.tolist() == [step for step, n in enumerate(lengths) for _ in range(n)]


def test_nothing_to_train_on_is_refused(llama: icl.Model, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="expected prompts with demonstrations to finetune on, got none"):
        icl.finetune(llama, prompts.zero_shot(), lr=LR, progress=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", get_args(Method))
def test_finetuning_from_noisy_weights_is_that_of_a_model_with_these_weights(
    make_model: Callable[..., icl.Model], prompts: Prompts, architecture: str, method: Method
) -> None:
    model, noisy = make_model(architecture, torch.float64), make_model(architecture, torch.float64)
    before, config, ratios = snapshot(model), icl.FinetuneConfig(method=method, trained="attention"), []
    weights = trained_weights(noisy, "attention")
    with torch.no_grad():
        for name, changes in Noise(3).changes(weights).items():
            for weight, change in zip(weights[name], changes, strict=True):
                ratios.append((change / weight.to_matrix(weight.parameter.detach())).flatten())
                weight.parameter.add_(weight.from_matrix(change))
    ratio = torch.cat(ratios)[~torch.cat(ratios).isnan()]  # GPT-2's biases are zero
    assert ratio.std().item() == pytest.approx(2**-9, rel=0.05)
    assert abs(ratio.mean()) < 4 * 2**-9 / math.sqrt(len(ratio))
    delta = icl.finetune(model, prompts, lr=LR, config=config, noise=Noise(3), progress=False)
    expected = icl.finetune(noisy, prompts, lr=LR, config=config, progress=False)
    assert same(model, before)
    for name in ("W_Q", "W_K", "W_V", "W_O", "losses", "training_q", "training_k"):
        torch.testing.assert_close(getattr(delta, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert delta.fingerprint == model.fingerprint() != expected.fingerprint
    assert "noise of 0.00195 with seed 3" in repr(delta)


def test_other_seeds_are_other_noise_and_none_is_none(llama: icl.Model, prompts: Prompts) -> None:
    clean, again, first, second = (
        icl.finetune(llama, prompts, lr=LR, noise=noise, progress=False) for noise in (None, None, Noise(1), Noise(2))
    )
    assert torch.equal(clean.W_V, again.W_V)
    assert not torch.equal(first.W_V, second.W_V)
    assert not torch.equal(first.W_V, clean.W_V)
    assert "noise" not in repr(clean)


@pytest.mark.parametrize("size", [0.0, -1.0, 1.0, math.nan])
def test_the_size_of_noise_is_a_part_of_the_weight(size: float) -> None:
    with pytest.raises(ValueError, match="expected size between -1 and 1 and not 0, got"):
        Noise(1, size=size)


@pytest.mark.parametrize("is_reference", [False, True])
@pytest.mark.parametrize(("dtype", "at_least"), [(torch.bfloat16, 0.997), (torch.float16, 0.99995)])
def test_half_precision_keeps_the_real_change_in_float32(
    make_model: Callable[..., icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    dtype: torch.dtype,
    at_least: float,
    is_reference: bool,
) -> None:
    """Steps so small that the weights' precision rounds nearly all of them away."""
    model, task = make_model("llama", dtype), reference_task if is_reference else task
    whole = model_of(make_model, model)
    prompts = icl.build_prompts(model, task, task.demonstrations(16, seed=1), task.queries(2))
    delta = icl.finetune(model, prompts, lr=1e-4, progress=False)
    expected = icl.finetune(whole, prompts, lr=1e-4, progress=False)
    assert delta.W_V.dtype == delta.W_K.dtype == torch.float32
    assert (delta.W_V != 0).float().mean() > 0.99
    assert cosines(delta, expected, "KV").min() > at_least
    weights = torch.stack([projection.matrix for projection in model.projections("V")])
    rounded = (weights + delta.W_V).to(dtype) - weights
    assert (rounded != 0).float().mean() < 0.4, "in the weights' precision little is left"
    assert delta.rounded == is_reference


def test_the_reference_protocol_rounds_weights_at_every_step_in_half_precision_throughout_alone(
    make_model: Callable[..., icl.Model], reference_task: icl.Task
) -> None:
    """The paper's own set-up: float32 master weights, rounded for each pass."""
    model, demonstrations = make_model("llama", torch.bfloat16), reference_task.demonstrations(4, seed=1)
    prompts = icl.build_prompts(model, reference_task, demonstrations, reference_task.queries(2))
    delta = icl.finetune(model, prompts, lr=LR, progress=False)
    slow = make_model("llama", torch.bfloat16)
    weights = trained_weights(slow)
    parameters = [weight.parameter for by_layer in weights.values() for weight in by_layer]
    start = [parameter.detach().float() for parameter in parameters]
    masters = [tensor.clone() for tensor in start]
    for tokens in prompts.training_sequences:
        ids = torch.tensor([[*prompts.start, *tokens]])
        logits = slow.run(ids, read=torch.arange(len(tokens))[None])[0].float()
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, ids[0, 1:]), parameters)
        with torch.no_grad():
            for parameter, master, gradient in zip(parameters, masters, gradients, strict=True):
                master -= LR * gradient.float()
                parameter.copy_(master)
    changes = [master - before for master, before in zip(masters, start, strict=True)]
    torch.testing.assert_close(torch.cat([*delta.W_K, *delta.W_V]), torch.cat(changes), atol=5e-5, rtol=1e-3)
    with delta.applied(model):  # rounded to the weights of the last step
        tuned = nn.utils.parameters_to_vector(
            w.parameter for by_layer in trained_weights(model).values() for w in by_layer
        )
        assert (tuned == nn.utils.parameters_to_vector(parameters)).float().mean() > 0.999
        assert (tuned == nn.utils.parameters_to_vector(start)).float().mean() < 0.5
    mixed = icl.Model(model.wrapped, arithmetic=torch.float32)
    assert not icl.finetune(mixed, prompts, lr=LR, progress=False).rounded


@pytest.mark.parametrize("trained", ["key-value", "attention"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_half_precision_steps_run_beside_the_weights(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, architecture: str, trained: Trained
) -> None:
    """In float32 arithmetic, finetuning is that of the same weights in float32; fused projections too."""
    model, twin = make_model(architecture, torch.bfloat16), make_hf_model(architecture, torch.bfloat16).float()
    mixed = icl.Model(model.wrapped, arithmetic=torch.float32)
    before = snapshot(mixed)
    prompts = icl.build_prompts(mixed, task, task.demonstrations(4, seed=1), task.queries(3))
    expected = slow_sgd(twin, prompts, targets_of(prompts, "all"), architecture, trained)
    config = icl.FinetuneConfig(trained=trained)
    for delta in (
        icl.finetune(mixed, prompts, lr=LR, config=config, progress=False),
        *icl.finetune_many(mixed, [prompts], [LR], config=config, progress=False),
    ):
        assert isinstance(delta, icl.WeightDelta)
        assert not delta.rounded
        hold_against(twin, expected, mixed, prompts, delta, 2e-4)
    assert same(mixed, before)


def test_factors_make_up_the_delta_beside_half_precision_weights(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    model = make_model("llama", torch.bfloat16)
    delta = icl.finetune(model, prompts, lr=LR, factors=True, progress=False)
    assert delta.factors is not None
    assert delta.factors.residual < 1e-5, "no rounding of small changes of large weights"


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("trained", ["key-value", "attention"])
def test_half_precision_finetunes_by_any_method(
    make_model: Callable[..., icl.Model], task: icl.Task, method: Method, trained: Trained
) -> None:
    model = make_model("llama", torch.bfloat16)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(2))
    before = snapshot(model)
    half = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method=method, trained=trained), progress=False
    )
    assert same(model, before)
    whole = model_of(make_model, model)
    expected = icl.finetune(
        whole, prompts, lr=LR, config=icl.FinetuneConfig(method=method, trained=trained), progress=False
    )
    for kind in KINDS[trained]:
        assert getattr(half, f"W_{kind}").dtype == torch.float32
    assert cosines(half, expected, KINDS[trained]).min() > 0.99
    fingerprint = model.fingerprint()
    with half.applied(model):
        assert same(model, before), "it runs beside the weights"
        assert model.fingerprint() != fingerprint
    assert model.fingerprint() == fingerprint


def test_gradients_that_a_model_had_come_back(make_model: Callable[..., icl.Model], prompts: icl.Prompts) -> None:
    model = make_model("llama")
    parameter = model.projections("K")[0].W.parameter
    parameter.grad = torch.ones_like(parameter)
    icl.finetune(model, prompts, lr=0.01, progress=False)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory")])
def test_memory_that_runs_out_is_said_in_words_and_leaves_the_weights_as_they_were(
    error: Exception, dtype: torch.dtype, task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(dtype=dtype)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    before, fingerprint, steps = [p.detach().clone() for p in model.parameters()], model.fingerprint(), list[int]()

    def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        steps.append(len(steps))
        if len(steps) == 3:  # the weights have changed by then
            raise error
        torch.autograd.backward(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    longest = max(len(prompts.start) + len(tokens) for tokens in prompts.training_sequences)
    message = rf"expected memory to finetune Model\('tiny'.* on demonstrations of up to {longest} tokens, got: .*memory"
    with pytest.raises(MemoryError, match=message):
        icl.finetune(model, prompts, lr=LR, progress=False)
    assert all(map(torch.equal, model.parameters(), before))
    assert model.fingerprint() == fingerprint
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
