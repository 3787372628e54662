import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import icl_dual as icl
from icl_dual.prompts import Prompts

LR = 0.05
# Where the fused projection keeps its queries: rows (or, for GPT-2's transposed layer, columns) that must not move.
FUSED = {
    "gpt2": lambda hf: [(block.attn.c_attn, _gpt2_query) for block in hf.transformer.h],
    "neox": lambda hf: [(layer.attention.query_key_value, _neox_query) for layer in hf.gpt_neox.layers],
}


def _gpt2_query(tensor: torch.Tensor) -> None:
    tensor[..., :32] = 0


def _neox_query(tensor: torch.Tensor) -> None:
    tensor.view(4, 3, 8, -1)[:, 0] = 0


def slow_sgd(hf_model, prompts: Prompts, n_targets: list[int], architecture: str) -> list[float]:
    """The reference: SGD on the Hugging Face model itself, every other gradient thrown away."""
    if architecture in FUSED:
        trained = FUSED[architecture](hf_model)
    else:
        named = [(name, module) for name, module in hf_model.named_modules() if name.endswith(("k_proj", "v_proj"))]
        trained = [(module, lambda gradient: None) for _, module in named]
    losses = []
    for tokens, targets in zip(prompts.demonstrations, n_targets, strict=True):
        ids = torch.tensor([[*prompts.start, *tokens]])
        log_probs = hf_model(ids).logits[0, :-1].log_softmax(-1)
        loss = -log_probs.gather(1, ids[0, 1:, None])[-targets:].mean()
        hf_model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for module, hide_query in trained:
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        hide_query(parameter.grad)
                        parameter -= LR * parameter.grad
    return losses


@pytest.mark.parametrize("loss", ["all", "label"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "xglm", "qwen3"])
def test_finetuning_equals_sgd_on_the_bare_model(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, architecture: str, loss
) -> None:
    dtype = torch.float32 if architecture == "xglm" else torch.float64  # XGLM's mask overflows at float64
    # Rotary attention takes its softmax in float32 also at float64.
    accuracy = {"xglm": 1e-4, "llama": 1e-5, "qwen3": 1e-5}.get(architecture, 1e-8)
    model, twin = make_model(architecture, dtype), make_hf_model(architecture, dtype)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    lengths = prompts.demonstration_label_lengths
    n_targets = [len(tokens) for tokens in prompts.demonstrations] if loss == "all" else list(lengths)
    expected = slow_sgd(twin, prompts, n_targets, architecture)
    delta = icl.finetune(model, prompts, lr=LR, loss=loss, progress=False)
    torch.testing.assert_close(delta.losses, torch.tensor(expected, dtype=torch.float64), atol=accuracy, rtol=accuracy)
    ids = torch.tensor([[*prompts.start, *prompts.queries[0]]])
    with torch.no_grad():
        tuned = twin(ids).logits
        before = model.run(ids)
        with delta.applied(model):
            torch.testing.assert_close(model.run(ids), tuned, atol=accuracy, rtol=accuracy)
        assert (before - tuned).abs().max() > 1e-3, "finetuning is meant to change the logits"


def snapshot(model: icl.Model) -> list[torch.Tensor]:
    fused = list(model.bridge.original_model.parameters())
    split = [p for pair in model.key_value_projections() for module in pair for p in module.parameters()]
    return [parameter.detach().clone() for parameter in (*fused, *split)]


def same(model: icl.Model, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(snapshot(model), before, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "xglm"])
def test_the_model_comes_back_bit_for_bit(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str
) -> None:
    model = make_model(architecture)
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(3))
    before = snapshot(model)
    flags = [parameter.requires_grad for parameter in model.bridge.original_model.parameters()]
    delta = icl.finetune(model, prompts, lr=LR, progress=False)
    assert same(model, before)
    assert flags == [parameter.requires_grad for parameter in model.bridge.original_model.parameters()]
    assert all(parameter.grad is None for parameter in model.bridge.original_model.parameters())
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
    assert delta.training_q.shape[1] == len(prompts.demonstration_positions) + 3, "a start token each"
    one = icl.build_prompts(model, task, task.demonstrations(3, seed=1)[:1], task.queries(3))
    after_one = icl.finetune(model, one, lr=LR, progress=False)
    found: list[torch.Tensor] = []

    def queries(tokens: tuple[int, ...]) -> torch.Tensor:
        found.clear()
        with torch.no_grad():
            model.run(
                torch.tensor([[*prompts.start, *tokens]]),
                on_attention=lambda layer, attention: found.append(attention.q_content[0]),
            )
        return torch.stack(found)

    first, second = prompts.demonstrations[:2]
    n_first, n_second = len(first) + 1, len(second) + 1
    torch.testing.assert_close(delta.training_q[:, :n_first], queries(first))
    with after_one.applied(model):
        torch.testing.assert_close(delta.training_q[:, n_first : n_first + n_second], queries(second))


def test_deltas_save_and_load(llama: icl.Model, prompts: Prompts, tmp_path: Path) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, progress=False)
    delta.save(tmp_path / "delta")
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert vars(loaded).keys() == vars(delta).keys()
    for name, value in vars(delta).items():
        got = getattr(loaded, name)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value
    with pytest.raises(icl.AssetError, match=r"expected a folder with tensors\.safetensors .*, found no"):
        icl.WeightDelta.load(tmp_path / "nothing")


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
    module = sys.modules["icl_dual.finetune"]
    monkeypatch.setattr(module, "EXPLODED_LOSS", limit / math.log(llama.d_vocab))
    with pytest.raises(icl.DivergedError, match=rf"step {1 + losses.index(max(losses))} of 4 with lr=0\.05"):
        icl.finetune(llama, prompts, lr=LR, progress=False)


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


def model_of(make_model: Callable[..., icl.Model], half: icl.Model) -> icl.Model:
    """The same weights in float32."""
    model = make_model("llama")
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), half.parameters(), strict=True):
            mine.copy_(theirs.float())
    return model
