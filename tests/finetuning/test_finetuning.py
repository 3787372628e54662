import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from helpers import some_eta, with_momentum
from torch import nn
from transformers import PreTrainedModel

import icl_dual as icl
from icl_dual.finetuning import parallel, sgd
from icl_dual.finetuning.weight_delta import Loss, Method, Trained
from icl_dual.models import ProjectionName
from icl_dual.prompts import Prompts

LR = 0.05
PROJECTIONS = {"Q": ("q_proj",), "K": ("k_proj",), "V": ("v_proj",), "O": ("o_proj", "out_proj")}
FUSED = {"gpt2": ("attn.c_attn", "attn.c_proj"), "neox": ("query_key_value", "attention.dense")}
KINDS = {"key-value": "KV", "key": "K", "value": "V", "attention": "QKVO"}
# Rotary attention takes its softmax in float32 also at float64.
ACCURACY = {"xglm": 1e-4, "llama": 1e-5, "qwen3": 1e-5, "gemma2-window": 1e-5, "bloom": 1e-5}


def dtype_of(architecture: str) -> torch.dtype:
    return torch.float32 if architecture == "xglm" else torch.float64  # XGLM's mask overflows at float64


def movable(hf_model: Any, architecture: str, trained: str) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Every parameter that may move, layer by layer, and with 1 where it may: fused projections move in part."""
    kinds = KINDS[trained]
    found = []
    for name, module in hf_model.named_modules():
        if architecture in FUSED:
            fused, output = FUSED[architecture]
            whole: tuple[str, ...] = (output,) if "O" in kinds else ()
            if name.endswith(fused):
                found += [(p, fused_mask(architecture, p, kinds)) for p in (module.weight, module.bias)]
        else:
            whole = tuple(name for kind in kinds for name in PROJECTIONS[kind])
        if name.endswith(whole):
            found += [(p, torch.ones_like(p)) for p in (module.weight, module.bias) if p is not None]
    return found


def fused_mask(architecture: str, parameter: torch.Tensor, kinds: str) -> torch.Tensor:
    """Where a fused projection keeps these kinds: GPT-2 in columns of its transposed layer, NeoX in rows by head."""
    mask = torch.zeros_like(parameter)
    for at, kind in enumerate("QKV"):
        if kind in kinds and architecture == "gpt2":
            mask[..., 32 * at : 32 * (at + 1)] = 1
        elif kind in kinds:
            mask.view(4, 3, 8, -1)[:, at] = 1
    return mask


def slow_loss(logits: torch.Tensor, ids: torch.Tensor, n_targets: int) -> torch.Tensor:
    log_probs = logits[0, :-1].log_softmax(-1)
    return -log_probs.gather(1, ids[0, 1:, None])[-n_targets:].mean()


def slow_sgd(
    hf_model: Any, prompts: Prompts, n_targets: list[int], architecture: str, trained: str = "key-value"
) -> list[float]:
    """The reference: SGD on the Hugging Face model itself, every other gradient thrown away."""
    losses = []
    for tokens, targets in zip(prompts.demonstrations, n_targets, strict=True):
        ids = torch.tensor([[*prompts.start, *tokens]])
        loss = slow_loss(hf_model(ids).logits, ids, targets)
        hf_model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, mask in movable(hf_model, architecture, trained):
                assert parameter.grad is not None
                parameter -= LR * mask * parameter.grad
    return losses


def slow_full_batch(hf_model: Any, prompts: Prompts, architecture: str) -> list[float]:
    """The reference: one step of gradient descent on the sum of the demonstrations' losses."""
    batch = [torch.tensor([[*prompts.start, *tokens]]) for tokens in prompts.demonstrations]
    losses = [slow_loss(hf_model(ids).logits, ids, ids.shape[1] - 1) for ids in batch]
    moving = movable(hf_model, architecture, "key-value")
    gradients = torch.autograd.grad(torch.stack(losses).sum(), [parameter for parameter, _ in moving])
    with torch.no_grad():
        for (parameter, mask), gradient in zip(moving, gradients, strict=True):
            parameter -= LR * mask * gradient
    return [loss.item() for loss in losses]


def slow_layer_causal(hf_model: Any, prompts: Prompts, n_targets: list[int], architecture: str) -> list[float]:
    """The reference: each layer's gradient of the loss of its own output, read as the last layer's is.

    Nothing is cut off: a layer's loss does not know of the layers above it, and of its gradient only the layer's own
    parameters are asked for.
    """
    layers, norm = {
        "gpt2": lambda: (hf_model.transformer.h, hf_model.transformer.ln_f),
        "neox": lambda: (hf_model.gpt_neox.layers, hf_model.gpt_neox.final_layer_norm),
    }.get(architecture, lambda: (hf_model.model.layers, hf_model.model.norm))()
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    moving = movable(hf_model, architecture, "key-value")
    per_layer = len(moving) // len(layers)
    losses = []
    for tokens, targets in zip(prompts.demonstrations, n_targets, strict=True):
        outputs.clear()
        ids = torch.tensor([[*prompts.start, *tokens]])
        losses.append(slow_loss(hf_model(ids).logits, ids, targets).item())
        steps = []
        for index, output in enumerate(outputs):
            logits = hf_model.get_output_embeddings()(norm(output))
            cap = getattr(hf_model.config, "final_logit_softcapping", None)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            own = moving[index * per_layer : (index + 1) * per_layer]
            gradients = torch.autograd.grad(
                slow_loss(logits, ids, targets), [parameter for parameter, _ in own], retain_graph=True
            )
            steps += [(*pair, gradient) for pair, gradient in zip(own, gradients, strict=True)]
        with torch.no_grad():
            for parameter, mask, gradient in steps:
                parameter -= LR * mask * gradient
    return losses


def targets_of(prompts: Prompts, loss: str) -> list[int]:
    lengths = list(prompts.demonstration_label_lengths)
    return [len(tokens) for tokens in prompts.demonstrations] if loss == "all" else lengths


def hold_against(
    twin: Any, expected: list[float], model: icl.Model, prompts: Prompts, delta: icl.WeightDelta, accuracy: float
) -> None:
    """The delta's losses against the reference's, and what the model does with it against the finetuned twin."""
    torch.testing.assert_close(delta.losses, torch.tensor(expected, dtype=torch.float64), atol=accuracy, rtol=accuracy)
    ids = torch.tensor([[*prompts.start, *prompts.queries[0]]])
    with torch.no_grad():
        tuned = twin(ids).logits
        before = model.run(ids)
        with delta.applied(model):
            torch.testing.assert_close(model.run(ids), tuned, atol=accuracy, rtol=accuracy)
        assert (before - tuned).abs().max() > 1e-3, "finetuning is meant to change the logits"


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
    found: dict[str, list[icl.WeightDelta]] = {"sgd": [], "layer-causal": []}
    for altered in (False, True):
        model = make_model("llama", torch.float64)
        if altered:
            with torch.no_grad():
                for parameter in model.wrapped.blocks[1].parameters():
                    parameter.mul_(1.5)
        for method, deltas in found.items():
            deltas.append(
                icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(method=cast(Any, method)), progress=False)
            )
    for name in ("W_K", "W_V"):
        plain, altered_ = (getattr(delta, name) for delta in found["layer-causal"])
        torch.testing.assert_close(altered_[0], plain[0], rtol=1e-9, atol=1e-14)
        for layer in (1, 2):
            assert relative(altered_[layer], plain[layer]) > 0.01
        plain, altered_ = (getattr(delta, name) for delta in found["sgd"])
        assert relative(altered_[0], plain[0]) > 0.01, "SGD's gradient does come down from above"


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_layers_that_are_read_out_otherwise_have_no_loss_of_their_own(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    model = make_model("llama")
    before = snapshot(model)
    model.wrapped.original_model.config.final_logit_softcapping = 1.0  # which a Llama does not heed
    with pytest.raises(icl.UnsupportedModelError, match=r"llama .*: expected the last layer's output to be read out"):
        icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(method="layer-causal"), progress=False)
    assert same(model, before)


def snapshot(model: icl.Model) -> list[torch.Tensor]:
    fused = list(model.wrapped.original_model.parameters())
    projections = [projection for kind in get_args(ProjectionName) for projection in model.projections(kind)]
    split = [weight.parameter for projection in projections for weight in projection if weight is not None]
    return [parameter.detach().clone() for parameter in (*fused, *split)]


def same(model: icl.Model, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(snapshot(model), before, strict=True))


@pytest.mark.parametrize(
    ("method", "trained"),
    [("sgd", "key-value"), ("sgd", "attention"), ("layer-causal", "attention"), ("full-batch", "value")],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "xglm"])
def test_the_model_comes_back_bit_for_bit(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str, method: Method, trained: Trained
) -> None:
    model = make_model(architecture)
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(3))
    before = snapshot(model)
    flags = [parameter.requires_grad for parameter in model.wrapped.original_model.parameters()]
    delta = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method=method, trained=trained), progress=False
    )
    assert same(model, before)
    assert flags == [parameter.requires_grad for parameter in model.wrapped.original_model.parameters()]
    assert all(parameter.grad is None for parameter in model.wrapped.original_model.parameters())
    with delta.applied(model):
        assert not same(model, before)
    assert same(model, before)

    def fail_inside() -> None:
        with delta.applied(model):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert same(model, before)


def test_training_queries_are_recorded_before_their_own_update(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama")
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(3))
    delta = icl.finetune(model, prompts, lr=LR, progress=False)
    n_tokens = len(prompts.demonstration_positions) + 3  # a start token each
    assert delta.training_q.shape == (3, n_tokens, 4, 8)
    assert delta.training_k.shape == (3, n_tokens, 2, 8)
    one = icl.build_prompts(model, task, task.demonstrations(3, seed=1)[:1], task.queries(3))
    after_one = icl.finetune(model, one, lr=LR, progress=False)

    def keep(found: list[torch.Tensor], module: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.append(output[0])

    def projected(tokens: tuple[int, ...]) -> list[torch.Tensor]:
        """Queries and keys of a demonstration by the model as it is now, before rotation."""
        found: dict[str, list[torch.Tensor]] = {"q_proj": [], "k_proj": []}
        handles = []
        for path, module in model.wrapped.original_model.named_modules():
            name = path.removesuffix("._original_component").split(".")[-1]
            if name in found and isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(partial(keep, found[name])))
        with torch.no_grad():
            model.run(torch.tensor([[*prompts.start, *tokens]]))
        for handle in handles:
            handle.remove()
        return [torch.stack(outputs).unflatten(-1, (-1, 8)) for outputs in found.values()]

    first, second = prompts.demonstrations[:2]
    n_first, n_second = len(first) + 1, len(second) + 1
    recorded = delta.training_q, delta.training_k
    for got, expected in zip(recorded, projected(first), strict=True):
        torch.testing.assert_close(got[:, :n_first], expected)
    with after_one.applied(model):
        for got, expected in zip(recorded, projected(second), strict=True):
            torch.testing.assert_close(got[:, n_first : n_first + n_second], expected)
    assert not torch.allclose(delta.training_k[:, n_first : n_first + n_second], projected(second)[1])


@pytest.mark.parametrize("trained", get_args(Trained))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_deltas_save_and_load(
    models_by_architecture: Callable[[str], icl.Model],
    prompts: Prompts,
    tmp_path: Path,
    architecture: str,
    trained: Trained,
) -> None:
    model = models_by_architecture(architecture)
    delta = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method="full-batch", trained=trained), progress=False
    )
    assert (delta.W_Q is not None) == (delta.W_O is not None) == (trained == "attention")
    assert (delta.b_Q is not None) == (delta.b_O is not None) == (trained == "attention" and architecture == "gpt2")
    delta.save(tmp_path / "delta")
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert vars(loaded).keys() == vars(delta).keys()
    assert (loaded.method, loaded.trained) == ("full-batch", trained)
    for name, value in vars(delta).items():
        got = getattr(loaded, name)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value
    with pytest.raises(icl.AssetError, match=r"expected a folder with tensors\.safetensors .*, found no"):
        icl.WeightDelta.load(tmp_path / "nothing")


def test_outputs_of_older_versions_are_refused_never_transposed(
    llama: icl.Model, prompts: Prompts, tmp_path: Path
) -> None:
    options: list[tuple[Trained, bool]] = [("attention", True), ("key-value", False)]
    for trained, refused in options:
        folder = tmp_path / trained
        icl.finetune(llama, prompts, lr=LR, config=icl.FinetuneConfig(trained=trained), progress=False).save(folder)
        (metadata,) = folder.glob("*.json")
        kept = {name: value for name, value in json.loads(metadata.read_text()).items() if name != "layout"}
        metadata.write_text(json.dumps(kept))
        if refused:
            with pytest.raises(icl.AssetError, match=r"expected ΔW_O as \[d_out d_in\], got .* older version saved"):
                icl.WeightDelta.load(folder)
        else:
            icl.WeightDelta.load(folder)


def test_without_a_start_token_a_demonstrations_first_token_is_not_predicted(
    make_model: Callable[..., icl.Model], make_hf_model: Callable[..., PreTrainedModel], prompts: Prompts
) -> None:
    model, twin = make_model("gpt2", torch.float64), make_hf_model("gpt2", torch.float64)
    bare = replace(prompts, start=(), demonstrations=prompts.demonstrations[:1], demonstration_label_lengths=(1,))
    delta = icl.finetune(model, bare, lr=LR, progress=False)
    ids = torch.tensor([bare.demonstrations[0]])
    expected = slow_loss(cast(Any, twin)(ids).logits, ids, ids.shape[1] - 1)
    assert delta.losses.item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"expected demonstrations with a token that others come before, got \(7,\)"):
        icl.finetune(model, replace(bare, demonstrations=((7,),)), lr=LR, progress=False)


def test_biases_move_and_are_kept(make_model: Callable[..., icl.Model], task: icl.Task, tmp_path: Path) -> None:
    model = make_model("gpt2")
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(3))
    delta = icl.finetune(model, prompts, lr=LR, progress=False)
    assert delta.b_K is not None
    assert delta.b_V is not None
    assert (delta.b_V != 0).any()
    delta.save(tmp_path / "delta")
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert loaded.b_V is not None
    assert torch.equal(loaded.b_V, delta.b_V)


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


@pytest.mark.parametrize("option", ["loss", "method", "trained"])
def test_unknown_options_are_refused_with_those_there_are(llama: icl.Model, prompts: Prompts, option: str) -> None:
    unchecked: Any = getattr(icl.finetune, "__wrapped__", icl.finetune)
    with pytest.raises(ValueError, match=rf"expected {option} out of \('.*'\), got 'adam'"):
        unchecked(llama, prompts, lr=LR, **{option: "adam"})


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
            made = sum(np.outer(*pair) for pair in zip(e[layer].numpy(), factors.x[layer].numpy(), strict=True))
            np.testing.assert_allclose(made, W[layer].numpy(), rtol=1e-8, atol=1e-10 * W[layer].abs().max().item())
        if b is not None:
            torch.testing.assert_close(e.sum(1), b, rtol=1e-8, atol=1e-12)
    lengths = [len(tokens) + 1 for tokens in prompts.demonstrations]
    assert factors.steps.tolist() == [step for step, n in enumerate(lengths) for _ in range(n)]


@pytest.fixture(scope="module")
def all_attention(models_by_architecture: Callable[[str], icl.Model], prompts: Prompts) -> icl.WeightDelta:
    model = models_by_architecture("gpt2")
    return icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(trained="attention"), progress=False)


MOVED = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")


def test_random_directions_are_as_long_and_unrelated(all_attention: icl.WeightDelta) -> None:
    turned = [all_attention.randomised(seed) for seed in range(40)]
    for name in MOVED:
        moved = getattr(all_attention, name)
        for layer in range(3):
            own = moved[layer].double().flatten()
            drawn = torch.stack([getattr(delta, name)[layer].double().flatten() for delta in turned])
            torch.testing.assert_close(drawn.norm(dim=1), own.norm().expand(40), rtol=1e-5, atol=0)
            if name == "b_K":  # which softmax does not see: it has moved by rounding at most
                assert own.norm() < 1e-6
                continue
            cosines = drawn @ own / (drawn.norm(dim=1) * own.norm())
            n = len(own)
            assert abs(cosines.mean()) < 4 / math.sqrt(40 * n), (name, layer)
            assert 0.5 / math.sqrt(n) < cosines.std() < 2 / math.sqrt(n), (name, layer)
            centre = drawn.mean() / drawn.std()
            assert abs(centre) < 4 / math.sqrt(40 * n), (name, layer)


def test_random_directions_are_their_seeds_and_all_else_stays(all_attention: icl.WeightDelta) -> None:
    first, again, other = (all_attention.randomised(seed) for seed in (1, 1, 2))
    for name, value in vars(all_attention).items():
        got = getattr(first, name)
        if name in MOVED:
            assert torch.equal(got, getattr(again, name))
            assert not torch.equal(got, getattr(other, name))
            assert (got.shape, got.dtype) == (value.shape, value.dtype)
        else:
            assert got is value
    assert not torch.equal(first.W_K, first.W_V), "every matrix has a direction of its own"


def test_a_random_delta_is_applied_and_taken_off_like_any(
    models_by_architecture: Callable[[str], icl.Model], all_attention: icl.WeightDelta
) -> None:
    model = models_by_architecture("gpt2")
    before, random = snapshot(model), all_attention.randomised(7)
    assert random.W_O is not None
    outputs: list[Any] = [block.attn.c_proj for block in model.wrapped.original_model.transformer.h]
    own = [output.weight.detach().clone() for output in outputs]
    with random.applied(model):
        for layer, output in enumerate(outputs):  # GPT-2 keeps it transposed
            assert torch.equal(output.weight, own[layer] + random.W_O[layer].T)
    assert same(model, before)


def test_what_did_not_move_stays_still_in_random_directions(llama: icl.Model, prompts: Prompts) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, config=icl.FinetuneConfig(trained="key"), progress=False)
    random = delta.randomised(1)
    assert (random.W_V == 0).all()
    assert random.W_Q is random.b_V is None
    assert not torch.equal(random.W_K, delta.W_K)


def test_a_random_delta_has_no_factors(llama: icl.Model, prompts: Prompts) -> None:
    assert icl.finetune(llama, prompts, lr=LR, factors=True, progress=False).randomised(1).factors is None


def test_nothing_to_train_on_is_refused(llama: icl.Model, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="expected demonstrations"):
        icl.finetune(llama, prompts.zero_shot(), lr=LR, progress=False)


def test_a_delta_of_another_model_is_refused(
    llama: icl.Model, models_by_architecture: Callable[[str], icl.Model], prompts: Prompts
) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, progress=False)
    with pytest.raises(ValueError, match="expected a delta of 'gpt2'"), delta.applied(models_by_architecture("gpt2")):
        pass


@pytest.mark.parametrize(("dtype", "at_least"), [(torch.bfloat16, 0.85), (torch.float16, 0.985)])
def test_half_precision_steps_are_taken_on_float32_copies(
    make_model: Callable[..., icl.Model], task: icl.Task, dtype: torch.dtype, at_least: float
) -> None:
    """Steps so small that half precision rounds most of them away: taken on the weights themselves, .58 and .96."""
    model = make_model("llama", dtype)
    prompts = icl.build_prompts(model, task, task.demonstrations(16, seed=1), task.queries(2))
    found = icl.finetune(model, prompts, lr=1e-3, progress=False)
    expected = icl.finetune(model_of(make_model, model), prompts, lr=1e-3, progress=False)
    same_way = torch.nn.functional.cosine_similarity(found.W_V.float().flatten(), expected.W_V.flatten(), dim=0)
    assert same_way > at_least


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("trained", ["key-value", "attention"])
def test_half_precision_finetunes_by_any_method(
    make_model: Callable[..., icl.Model], task: icl.Task, method: Method, trained: Trained
) -> None:
    model = make_model("llama", torch.bfloat16)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(2))
    before = snapshot(model)
    found = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method=method, trained=trained), progress=False
    )
    assert same(model, before)
    whole = model_of(make_model, model)
    expected = icl.finetune(
        whole, prompts, lr=LR, config=icl.FinetuneConfig(method=method, trained=trained), progress=False
    )
    for kind in KINDS[trained]:
        got, wanted = (getattr(delta, f"W_{kind}") for delta in (found, expected))
        assert got.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0) > 0.9
    with found.applied(model):
        assert not same(model, before)
    assert same(model, before)


def model_of(make_model: Callable[..., icl.Model], half: icl.Model) -> icl.Model:
    """The same weights in float32."""
    model = make_model("llama")
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), half.parameters(), strict=True):
            mine.copy_(theirs.float())
    return model


def equal_to_one_by_one(
    model: icl.Model, prompts: list[Prompts], lrs: list[float], accuracy: float, **options: Any
) -> list[icl.WeightDelta | icl.DivergedError]:
    """Several runs at once, each held against `finetune`."""
    found = list(icl.finetune_many(model, prompts, lrs, progress=False, **options))
    options.pop("at_once", None)
    for got, one, lr in zip(found, prompts, lrs, strict=True):
        assert isinstance(got, icl.WeightDelta)
        expected = icl.finetune(model, one, lr=lr, progress=False, **options)
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
    return found


def several(model: icl.Model, task: icl.Task) -> list[Prompts]:
    """Prompts of other seeds, and of other numbers of demonstrations."""
    drawn = [task.demonstrations(k, seed=seed) for k, seed in ((4, 1), (2, 2), (5, 3), (4, 1))]
    return [icl.build_prompts(model, task, shown, task.queries(2)) for shown in drawn]


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


@pytest.mark.parametrize(
    ("architecture", "dtype", "method"),
    [
        ("llama", torch.bfloat16, "sgd"),
        ("llama", torch.float32, "layer-causal"),
        ("gpt2", torch.float32, "full-batch"),
    ],
)
def test_what_cannot_go_side_by_side_goes_one_by_one(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str, dtype: torch.dtype, method: Method
) -> None:
    model = make_model(architecture, dtype)
    equal_to_one_by_one(model, several(model, task), [LR, LR, LR, 1e-3], 0.0, config=icl.FinetuneConfig(method=method))


@pytest.mark.parametrize("method", ["sgd", "layer-causal"])
def test_a_run_that_diverges_leaves_the_others_alone(
    make_model: Callable[..., icl.Model], task: icl.Task, method: Method
) -> None:
    model = make_model("llama", torch.float64)
    before, prompts = snapshot(model), several(model, task)
    found = list(
        icl.finetune_many(model, prompts, [LR, 1e38, 1e4, LR], config=icl.FinetuneConfig(method=method), progress=False)
    )
    assert [type(one) for one in found] == [icl.WeightDelta, icl.DivergedError, icl.DivergedError, icl.WeightDelta]
    assert re.search(r"step \d of 2 with lr=1e\+38: loss .* weights changed", str(found[1]))
    assert re.search(r"step \d of 5 with lr=10000: loss .* weights changed", str(found[2]))
    equal_to_one_by_one(model, [prompts[0], prompts[3]], [LR, LR], 1e-5, config=icl.FinetuneConfig(method=method))
    assert same(model, before)


def test_an_exploded_loss_is_divergence_side_by_side_too(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = icl.finetune(llama, prompts, lr=LR, progress=False).losses.tolist()
    limit = sorted(losses)[-2] + 1e-6
    monkeypatch.setattr(sgd, "EXPLODED_LOSS", limit / losses[0])
    (found,) = icl.finetune_many(llama, [prompts], [LR], progress=False)
    assert re.search(rf"step {1 + losses.index(max(losses))} of 4 with lr=0\.05", str(found))


def test_several_ask_for_a_rate_each(llama: icl.Model, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="a learning rate for each run, got 2 prompts and 1 rates"):
        icl.finetune_many(llama, [prompts, prompts], [LR])
    with pytest.raises(ValueError, match="expected at least 1 run at once, got 0"):
        icl.finetune_many(llama, [prompts], [LR], at_once=0)
    with pytest.raises(ValueError, match=r"expected a learning rate above 0, got -1"):
        icl.finetune_many(llama, [prompts, prompts], [LR, -1.0])
    with pytest.raises(ValueError, match="expected demonstrations to finetune on"):
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
    found = list(icl.finetune_many(model, prompts, [LR] * 4, progress=False))
    for got, one in zip(found, expected, strict=True):
        assert isinstance(got, icl.WeightDelta)
        assert isinstance(one, icl.WeightDelta)
        assert (got.W_V - one.W_V).norm() <= 1e-5 * one.W_V.norm()
    assert caplog.text.count("do not fit in memory side by side") == 1, "said once, though halved twice"
    assert "4 finetunings do not fit" in caplog.text
    monkeypatch.setattr(model, "run", lambda *args, **kwargs: full(torch.zeros(2, 1)))
    with pytest.raises(torch.OutOfMemoryError):
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
    assert lengths == [(1, len(one.start) + len(shown)) for one in prompts for shown in one.demonstrations]


def test_a_projection_that_does_not_run_is_refused(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    elsewhere, hook = nn.Linear(1, 1), model.backend.projection_delta_hook
    monkeypatch.setattr(
        model.backend, "projection_delta_hook", lambda layer, *of: (elsewhere, print) if layer == 1 else hook(layer, *of)
    )
    with pytest.raises(icl.UnsupportedModelError, match="layer that runs, got one that does not"):
        list(icl.finetune_many(model, [prompts], [LR], progress=False))


def test_losses_over_a_large_vocabulary_lose_no_digits(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as a real one's, in float32, against float64."""
    model, row = make_model("llama"), (*prompts.start, *prompts.training_sequences[0])
    logits = 3 * torch.randn(3, len(row), 49152, generator=torch.Generator().manual_seed(0))

    def run(ids: torch.Tensor, *, read: torch.Tensor, on_query: Callable, on_key: Callable, **kwargs: Any):
        for show in (on_query, on_key):
            show(0, torch.zeros(3, len(row), 4, 8))
        return logits[torch.arange(3)[:, None], read]

    monkeypatch.setattr(model, "run", run)
    runs = parallel._SideBySide(model, [prompts] * 3, [LR] * 3, "all", "key-value")
    found = runs._losses([row] * 3)
    targets = torch.tensor(row[len(prompts.start) :])
    for got, one in zip(found.tolist(), logits[:, len(prompts.start) - 1 : -1].double(), strict=True):
        assert got == pytest.approx(nn.functional.cross_entropy(one, targets).item(), abs=1e-5)
