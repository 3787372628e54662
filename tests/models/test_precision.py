"""Half-precision weights that run in float32, and what a run in float32 leaves behind: nothing."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from finetuning_references import cosines
from toys import BRIDGED

import icl_dual as icl
from icl_dual.models import control_model, tiny_model
from icl_dual.models.changes import changed_projections
from icl_dual.models.journal import Undo
from icl_dual.models.precision import exact_float32, fingerprinted_precision, run_copies
from icl_dual.prompts import Prompts

HALF = (torch.bfloat16, torch.float16)
IDS = torch.tensor([[0, 5, 9, 40, 7, 3], [0, 8, 8, 1, 90, 2]])


def tensors(model: icl.Model) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name: the objects themselves."""
    original = model.wrapped.original_model
    return {**dict(original.named_parameters()), **dict(original.named_buffers())}


def in_float32(make_model: Callable[..., icl.Model], architecture: str, half: icl.Model) -> icl.Model:
    """The same rounded weights and buffers in a model in float32, those that a bridge split off included."""
    whole = make_model(architecture)
    with torch.no_grad():
        for mine, theirs in zip(whole.backend.forward_weights(), half.backend.forward_weights(), strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(
            whole.wrapped.original_model.buffers(), half.wrapped.original_model.buffers(), strict=True
        ):
            mine.copy_(theirs)
    return whole


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("architecture", [name for name in BRIDGED if name != "bloom"])
def test_half_precision_weights_in_float32_arithmetic_are_a_float32_model_with_these_weights(
    make_model: Callable[..., icl.Model], architecture: str, dtype: torch.dtype
) -> None:
    half = make_model(architecture, dtype)
    model, before = icl.Model(half.wrapped, arithmetic=torch.float32), tensors(half)
    whole, dtypes = in_float32(make_model, architecture, half), set[torch.dtype]()
    residuals: dict[str, list[torch.Tensor]] = {"model": [], "whole": []}
    with torch.no_grad():
        got = model.run(
            IDS,
            on_attention=lambda layer, attention: dtypes.update(tensor.dtype for tensor in attention[:5]),
            on_output=lambda layer, output: dtypes.add(output.dtype),
            on_residual=lambda layer, residual: residuals["model"].append(residual),
        )
        expected = whole.run(IDS, on_residual=lambda layer, residual: residuals["whole"].append(residual))
    assert got.dtype == torch.float32
    assert dtypes == {torch.float32}
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(residuals["model"], residuals["whole"], rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        last = residuals["model"][-1]
        torch.testing.assert_close(model.unembed(last), whole.unembed(last), rtol=1e-5, atol=2e-5)
    after = tensors(half)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor for name, tensor in before.items()), "the model's own tensors are back"


def test_tied_weights_share_one_copy() -> None:
    embedding, unembedding = torch.nn.Embedding(5, 3, dtype=torch.bfloat16), torch.nn.Linear(3, 5, bias=False)
    unembedding.weight = embedding.weight
    undo = Undo()
    with torch.no_grad():
        run_copies([embedding, unembedding], [], torch.float32, torch.device("cpu"), undo)
    assert embedding.weight.dtype == torch.float32
    assert unembedding.weight is embedding.weight
    undo.run()
    assert unembedding.weight is embedding.weight
    assert embedding.weight.dtype == torch.bfloat16


def test_bloom_has_float32_position_biases_in_float32_arithmetic(make_model: Callable[..., icl.Model]) -> None:
    wrapped = make_model("bloom").wrapped
    torch.nn.Module.to(wrapped.original_model, torch.bfloat16)
    with pytest.raises(icl.UnsupportedModelError, match="ALiBi biases rounded to half precision"):
        icl.Model(wrapped)
    with torch.no_grad():
        assert icl.Model(wrapped, arithmetic=torch.float32).run(IDS).dtype == torch.float32


@pytest.mark.parametrize("at", ["on_output", "on_residual"])
def test_nothing_is_left_after_an_exception_inside_a_block(at: str) -> None:
    model = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32)
    before = tensors(model)

    def stop(layer: int, tensor: torch.Tensor) -> None:
        assert model.projections("K")[layer].W.parameter.dtype == torch.float32 or at == "on_residual"
        raise KeyboardInterrupt

    callback: dict[str, Any] = {at: stop}
    with pytest.raises(KeyboardInterrupt):
        model.run(IDS, **callback)
    assert all(tensors(model)[name] is tensor for name, tensor in before.items())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.wrapped.blocks)


def test_one_block_is_in_float32_at_a_time() -> None:
    model = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32)
    running: list[list[torch.dtype]] = []
    with torch.no_grad():
        model.run(
            IDS,
            on_output=lambda layer, output: running.append([p.W.parameter.dtype for p in model.projections("K")]),
        )
    assert running == [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32]]


def test_autograd_keeps_no_copy_of_the_weights_and_has_the_same_gradient() -> None:
    model, whole = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32), tiny_model()
    with torch.no_grad():
        for mine, theirs in zip(whole.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    copies: list[weakref.ref] = []
    gradients = []
    for each in (model, whole):
        change = torch.zeros(2, 16, 32, requires_grad=True)
        with changed_projections(each, {"W_V": change}):
            logits = each.run(
                IDS,
                on_output=lambda layer, output, each=each: copies.append(
                    weakref.ref(each.projections("O")[layer].W.parameter)
                ),
            )
        gc.collect()
        if each is model:
            assert [copy() for copy in copies] == [None, None], "freed before the backward pass"
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[..., 7].sum(), [change])
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert gradients[0].norm() > 0


def test_a_run_leaves_no_activations_behind() -> None:
    model, activations = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32), list[weakref.ref]()
    change = torch.zeros(2, 16, 32, requires_grad=True)
    with changed_projections(model, {"W_V": change}):
        logits = model.run(IDS, on_residual=lambda layer, residual: activations.append(weakref.ref(residual)))
    logits.sum().backward()
    del logits
    assert [activation() for activation in activations] == [None, None], "hooks on saved tensors make no cycle"


@pytest.mark.parametrize("dtype", HALF)
def test_precision_is_named_and_in_the_fingerprint(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    half, model = tiny_model(dtype=dtype), tiny_model(dtype=dtype, arithmetic=torch.float32)
    assert (model.dtype, model.storage_dtype) == (torch.float32, dtype)
    assert (half.dtype, half.storage_dtype) == (dtype, dtype)
    assert model.precision == f"{name} storage, float32 arithmetic"
    assert (half.precision, tiny_model().precision) == (name, "float32")
    assert f"dtype={name} storage, float32 arithmetic" in repr(model)
    prints = [each.fingerprint() for each in (half, model, tiny_model())]
    assert len(set(prints)) == 3
    assert [fingerprinted_precision(each) for each in prints] == [name, model.precision, "float32"]
    assert tiny_model(dtype=dtype, arithmetic=dtype).precision == name


@pytest.mark.parametrize(
    ("dtype", "arithmetic"),
    [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.bfloat16, torch.float64)],
)
def test_other_arithmetic_is_refused(dtype: torch.dtype, arithmetic: torch.dtype) -> None:
    expected = rf"expected arithmetic=torch\.float32 .* got arithmetic={arithmetic} with weights in {dtype}"
    with pytest.raises(ValueError, match=expected):
        tiny_model(dtype=dtype, arithmetic=arithmetic)
    with pytest.raises(ValueError, match=expected):
        icl.load_model("no/such-model", dtype=dtype, arithmetic=arithmetic)


def test_controls_and_momentum_keep_the_arithmetic(prompts: Prompts) -> None:
    model = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32)
    control = control_model(model, "random-blocks", seed=1)
    assert control.precision == model.precision
    with torch.no_grad():
        assert control.run(IDS).dtype == torch.float32
        with icl.momentum_attention(model, 0.1):
            assert model.run(IDS).dtype == torch.float32


def test_metrics_in_float32_arithmetic_are_those_of_the_rounded_weights_in_float32(task: icl.Task) -> None:
    model, whole = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32), tiny_model()
    with torch.no_grad():
        for mine, theirs in zip(whole.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(5))
    got, expected = (icl.run_experiment(each, prompts, lr=0.01, replicas=0, progress=False) for each in (model, whole))
    assert cosines(got.delta, expected.delta, "KV").min() > 0.9999
    for experiment in (got, expected):
        assert experiment.finetuned.attn_out is not None
        assert experiment.finetuned.attn_out.dtype == torch.float32
    numbers = [torch.tensor(each.compare().to_frame()["value"].to_numpy()) for each in (got, expected)]
    torch.testing.assert_close(*numbers, atol=2e-3, rtol=0, equal_nan=True)


def test_float32_runs_without_tf32_and_the_setting_comes_back() -> None:
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision

    def fail(layer: int, output: torch.Tensor) -> None:
        raise KeyError

    try:
        for user in ("tf32", "ieee"):
            settings.fp32_precision = user
            inside = list[str]()

            def read(layer: int, output: torch.Tensor, inside: list[str] = inside) -> None:
                inside.append(settings.fp32_precision)

            with torch.no_grad():
                tiny_model().run(IDS, on_output=read)
            assert inside == ["ieee", "ieee"]
            assert settings.fp32_precision == user
            with pytest.raises(KeyError):
                tiny_model().run(IDS, on_output=fail)
            assert settings.fp32_precision == user
            first, second = Undo(), Undo()
            exact_float32(first)
            exact_float32(second)
            first.run()
            assert settings.fp32_precision == "ieee"  # a model of another thread still runs
            second.run()
            assert settings.fp32_precision == user
    finally:
        settings.fp32_precision = before
