"""Blocks on a model end as they began: in any order, in several threads, and when memory runs out."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.models import momentum_attention, tiny_model
from icl_dual.models.journal import Journal, Undo, exclusive, journal_of

IDS = torch.tensor([[0, 5, 9, 7]])


def prompts_of(model: icl.Model) -> icl.Prompts:
    rows = [{"text": f"film {index}", "label": index % 2} for index in range(8)]
    task = icl.Task("films", "{text}:", ("bad", "good"), rows)
    return icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(4))


def weights_of(model: icl.Model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_weights(model: icl.Model, expected: list[torch.Tensor]) -> None:
    assert all(map(torch.equal, model.parameters(), expected))


@given(st.permutations(range(4)), st.data())
def test_blocks_that_close_in_any_order_restore_what_was_there_before_them(
    order: list[int], data: st.DataObject
) -> None:
    settings, journal, stacks = {"value": 0}, Journal(), [ExitStack() for _ in order]

    def set_value(value: int, stack: ExitStack) -> None:
        undo = stack.enter_context(journal.block())
        undo.push(settings.update, dict(settings))
        settings["value"] = value

    for index, stack in enumerate(stacks, start=1):
        set_value(index, stack)
    is_open = [True] * len(order)
    for index in order:
        stacks[index].close()
        is_open[index] = False
        assert settings["value"] == max((i + 1 for i, is_open_ in enumerate(is_open) if is_open_), default=0)
    assert journal.blocks == []


def test_an_interrupted_function_runs_again_and_the_others_run_once() -> None:
    journal, calls = Journal(), list[str]()

    def interrupted() -> None:
        calls.append("interrupted")
        if len(calls) == 2:
            raise KeyboardInterrupt

    undo = Undo()
    undo.push(calls.append, "first")
    undo.push(interrupted)
    undo.push(calls.append, "last")
    journal.open(undo)
    with pytest.raises(KeyboardInterrupt):
        journal.close(undo)
    assert calls == ["last", "interrupted"]
    assert journal.call(lambda: 5) == 5
    assert calls == ["last", "interrupted", "interrupted", "first"]
    journal.restore()
    assert len(calls) == 4


def test_a_call_undoes_what_an_interrupted_call_has_left() -> None:
    journal, settings, contexts = Journal(), {"value": 0}, list[Any]()

    def leaves_its_block() -> None:
        contexts.append(journal.block())  # kept: a generator without references would close its block
        contexts[-1].__enter__().push(settings.update, dict(settings))
        settings["value"] = 1

    journal.call(leaves_its_block)
    assert settings["value"] == 0
    with pytest.raises(KeyboardInterrupt):
        journal.call(lambda: (leaves_its_block(), _raise(KeyboardInterrupt())))
    assert settings["value"] == 0


def _raise(error: BaseException) -> None:
    raise error


def test_models_that_wrap_the_same_weights_share_a_journal() -> None:
    model = tiny_model()
    assert icl.Model(model.wrapped).journal is model.journal
    assert journal_of(model.wrapped.original_model) is model.journal
    assert tiny_model().journal is not model.journal


def two_deltas(model: icl.Model) -> tuple[icl.WeightDelta, icl.WeightDelta]:
    """Return a delta of the model, and one of the model with the first applied."""
    prompts = prompts_of(model)
    first = icl.finetune(model, prompts, lr=0.01, progress=False)
    with first.applied(model):
        return first, icl.finetune(model, prompts, lr=0.02, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltas_that_are_closed_in_the_wrong_order_leave_the_weights_as_they_were(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, arithmetic=torch.float32)
    deltas, before, fingerprint = two_deltas(model), weights_of(model), model.fingerprint()
    outer, inner = (delta.applied(model) for delta in deltas)
    outer.__enter__()
    inner.__enter__()
    both = model.fingerprint()
    outer.__exit__(None, None, None)
    assert model.fingerprint() == both  # the block that is still open sees what it was opened on
    inner.__exit__(None, None, None)
    assert_weights(model, before)
    assert model.fingerprint() == fingerprint
    assert model.weight_changes == ()


def test_deltas_and_momentum_close_in_any_order() -> None:
    model = tiny_model()
    delta, before, name = two_deltas(model)[0], weights_of(model), model.name
    applied = delta.applied(model)
    applied.__enter__()
    with momentum_attention(model, 0.1):
        applied.__exit__(None, None, None)
        assert model.momentum is not None
    assert_weights(model, before)
    assert (model.name, model.momentum) == (name, None)


def test_restore_ends_blocks_that_nobody_can_close() -> None:
    model = tiny_model()
    delta, before = two_deltas(model)[0], weights_of(model)
    lost = delta.applied(model)
    lost.__enter__()
    with pytest.raises(ValueError, match=r"is another delta applied, .*\?"), delta.applied(model):
        pass
    model.restore()
    assert_weights(model, before)
    with delta.applied(model):
        lost.__exit__(None, None, None)  # late: it must not undo what has been opened since
        assert not all(map(torch.equal, model.parameters(), before))
    assert_weights(model, before)


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Run functions in threads that begin together."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_in_several_threads_give_what_they_give_alone(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, arithmetic=torch.float32)
    prompts = prompts_of(model)
    calls = [
        lambda: icl.capture(model, prompts, fields=("attn_out",), progress=False).attn_out,
        lambda: icl.capture(icl.Model(model.wrapped, arithmetic=model.backend.arithmetic), prompts, progress=False).z,
        lambda: icl.finetune(model, prompts, lr=0.05, progress=False).W_V,
        lambda: model.fingerprint(),
        lambda: model.foreign_hooks(),
    ]
    alone = [call() for call in calls]
    for got, expected in zip(in_threads(*calls), alone, strict=True):
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


def test_a_block_of_one_thread_is_not_applied_to_the_calls_of_another() -> None:
    model = tiny_model()
    before, (delta, other) = weights_of(model), two_deltas(model)

    def apply_other() -> None:
        with other.applied(model):
            pass

    with torch.no_grad():
        expected = model.run(IDS)
        with delta.applied(model):
            within = model.run(IDS)
            for call in (lambda: model.run(IDS), model.fingerprint, apply_other):
                with pytest.raises(RuntimeError, match=r"got one within a block, .* thread 'MainThread': use it"):
                    in_threads(call)
            assert torch.equal(model.run(IDS), within)
        (after,) = in_threads(lambda: model.run(IDS).detach())
    assert not torch.equal(within, expected)
    assert torch.equal(after, expected)
    assert_weights(model, before)


def test_a_run_from_a_callback_of_a_run_is_refused() -> None:
    model = tiny_model()

    def run(layer: int, output: torch.Tensor) -> None:
        model.run(IDS)

    with torch.no_grad():
        expected = model.run(IDS)
        with pytest.raises(RuntimeError, match="expected one run of 'tiny' at a time, got another one from a callback"):
            model.run(IDS, on_output=run)
        assert torch.equal(model.run(IDS), expected)


def test_a_callback_may_use_what_is_no_run() -> None:
    model, logits = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32), list[torch.Tensor]()

    def read(layer: int, residual: torch.Tensor) -> None:
        logits.append(model.unembed(residual))

    with torch.no_grad():
        expected = model.run(IDS, on_residual=read)
    assert torch.equal(logits[-1], expected)


def test_an_abandoned_iterator_of_finetunings_keeps_nothing() -> None:
    model = tiny_model()
    prompts, before = prompts_of(model), weights_of(model)
    runs = icl.finetune_many(model, [prompts] * 4, [0.01] * 4, at_once=2, progress=False)
    first = next(runs)
    assert isinstance(first, icl.WeightDelta)
    (other,) = in_threads(lambda: icl.finetune(model, prompts, lr=0.01, progress=False))
    torch.testing.assert_close(first.W_V, other.W_V, rtol=1e-4, atol=1e-6)
    assert model.journal.blocks == []
    assert_weights(model, before)


def test_the_gradient_mode_that_a_call_leaves_is_restored() -> None:
    model = tiny_model()

    @exclusive
    def leave(model: icl.Model) -> None:
        torch.set_grad_enabled(False)

    leave(model)
    assert torch.is_grad_enabled()
    leave(model=model)
    assert torch.is_grad_enabled()
