"""A call that is interrupted at any instruction leaves the model as it was."""

import dis
import functools
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import icl_dual as icl
from icl_dual.models import tiny_model

IDS = torch.tensor([[0, 5, 9, 7]])
PROMPTS = icl.Prompts(
    start=(0,),
    demonstrations=((5, 6, 7), (8, 9, 10)),
    demonstration_label_lengths=(1, 1),
    queries=((11, 12), (13, 14)),
    labels=((15,), (16,)),
    gold=(0, 1),
)
FILES = (f"icl_dual{os.sep}", "contextlib.py", "grad_mode.py", "graph.py", "hooks.py", "hook_points.py")
"""Parts of the paths of the modules that are interrupted: what registers hooks, enters contexts or leaves them."""


N_TRIED = int(os.environ.get("ICL_DUAL_INTERRUPTS", "8"))
"""How many interruptible instructions each test tries, evenly spread; 0 for all of them, which takes minutes."""


class Interrupt(BaseException):
    """Raised at an instruction, as a signal handler would raise it."""


@functools.cache
def interruptible(code: CodeType) -> frozenset[int]:
    """Return the instructions before which CPython may run signal handlers: at the start of functions and of a loop's
    next turn, and after calls, where the exception has the handler of the call."""
    bytecode: Any = dis.Bytecode(code)
    entries = bytecode.exception_entries

    def handler(offset: int) -> tuple[int, ...]:
        return next(((entry.target,) for entry in entries if entry.start <= offset < entry.end), ())

    offsets, after_call = set(), None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("RESUME", "JUMP_BACKWARD") or (
            after_call is not None and handler(instruction.offset) == after_call
        ):
            offsets.add(instruction.offset)
        after_call = handler(instruction.offset) if name.startswith("CALL") else None
    return frozenset(offsets)


def interrupted_at(n: int, function: Callable[[], Any]) -> tuple[int, BaseException | None]:
    """Run a function and raise at its nth interruptible instruction.

    Returns how many it passed, and the exception with all frames, as a notebook keeps it.
    """
    passed = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal passed
        if event == "call":
            code = frame.f_code
            if not (any(part in code.co_filename for part in FILES) or code.co_name.startswith("register_")):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode" and frame.f_lasti in interruptible(frame.f_code):
            passed += 1
            if passed == n:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except Interrupt as error:
        return passed, error
    finally:
        sys.settrace(None)
    return passed, None


def state_of(model: icl.Model) -> list[Any]:
    """Return everything about a model that a call may change for a while, and the thread's modes."""
    roots = [model.wrapped, getattr(model.wrapped, "original_model", model.wrapped)]
    modules = [module for root in roots for module in root.modules()]
    hooks = [[*module._forward_hooks, *module._forward_pre_hooks] for module in modules]
    handles = [list(getattr(module, "fwd_hooks", ())) for module in modules]
    weights = [
        (id(tensor), tensor.dtype, tensor.requires_grad, tensor.grad is None)
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    children = [[*module._modules.values()] for module in modules]
    values = [parameter.detach().view(torch.uint8).sum().item() for parameter in model.backend.forward_weights()]
    named = model.name, model.description, model.momentum is None, model.weight_changes
    modes = torch.is_grad_enabled(), torch.backends.cuda.matmul.fp32_precision, packs()
    return [hooks, handles, children, [module.training for module in modules], weights, values, named, modes]


def packs() -> bool:
    """Return whether autograd's hooks on what it keeps are set."""
    functions: Any = torch._C
    return functions._autograd._top_saved_tensors_default_hooks(False) is not None


def run(model: icl.Model) -> torch.Tensor:
    return model.run(IDS, on_attention=lambda layer, attention: None, on_output=lambda layer, output: None)


def finetune(model: icl.Model) -> torch.Tensor:
    return icl.finetune(model, PROMPTS, lr=0.01, progress=False).W_V


def applied(model: icl.Model) -> torch.Tensor:
    with delta_of(model).applied(model):
        return run(model)


@functools.cache
def delta_of(model: icl.Model) -> icl.WeightDelta:
    return icl.finetune(model, PROMPTS, lr=0.01, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", [run, finetune, applied])
def test_a_call_interrupted_at_any_instruction_leaves_the_model_as_it_was(
    call: Callable[[icl.Model], torch.Tensor], dtype: torch.dtype
) -> None:
    model = tiny_model(dtype=dtype, arithmetic=torch.float32)
    for module in model.wrapped.original_model.modules():
        module.training = True
    expected, before = call(model), state_of(model)
    n_points, _ = interrupted_at(0, lambda: call(model))
    n_tried = N_TRIED or n_points
    assert n_points > 1000
    for index in range(n_tried):
        point = 1 + index * n_points // n_tried
        _, error = interrupted_at(point, lambda: call(model))
        where = f"point {point}: {places(error)}"
        if call is applied:  # its block is the caller's: it ends at the latest when the exception is gone
            del error
        assert state_of(model) == before, where
        assert model.journal.blocks == [], where
    assert torch.equal(call(model), expected)


# Python drops what is raised in a callback of its garbage collector, such as hypothesis has, and prints it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timers that raise signals")
def test_timer_interrupts_leave_the_model_as_it_was() -> None:
    model, rng = tiny_model(), random.Random(0)
    calls: list[Callable[[], Any]] = [
        lambda: icl.capture(model, PROMPTS, progress=False),
        lambda: list(icl.finetune_many(model, [PROMPTS] * 2, [0.01, 0.02], progress=False)),
    ]
    for call in calls:  # a bridge's first pass leaves hooks of TransformerLens's own
        call()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupt

    handler, before, n_interrupted = signal.signal(signal.SIGALRM, interrupt), state_of(model), 0
    try:
        for index in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.04))
                calls[index % 2]()
            except Interrupt:
                n_interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert state_of(model) == before
            assert model.journal.blocks == []
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert n_interrupted > 3


def places(error: BaseException | None) -> list[str]:
    """Return the innermost places of an exception's traceback, for a failing test's message."""
    frames, traceback = [], None if error is None else error.__traceback__
    while traceback is not None:
        frames.append(f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return frames[-4:]
