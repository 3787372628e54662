"""Which hooks are told apart: by place, code and what they read; not by what they write themselves."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import icl_dual as icl

SCALE = 0.5
Hook = Callable[..., Any]


def scaled(by: float) -> Hook:
    return lambda residual, hook: residual * by


def steered(vector: torch.Tensor) -> Hook:
    def add(residual: torch.Tensor, hook: Any) -> torch.Tensor:
        return residual + vector

    return add


def times(residual: torch.Tensor, hook: Any, *, exponent: float) -> torch.Tensor:
    return residual * exponent


def by_global(residual: torch.Tensor, hook: Any) -> torch.Tensor:
    return residual * SCALE


class Steering:
    """Steers as a method or when it is called, and counts its calls."""

    def __init__(self, scale: float) -> None:
        self.scale, self.n_calls = scale, 0

    def apply(self, residual: torch.Tensor, hook: Any) -> torch.Tensor:
        self.n_calls += 1
        return residual * self.scale

    def __call__(self, residual: torch.Tensor, hook: Any) -> torch.Tensor:
        self.n_calls += 1
        return residual * self.scale


class Adapter(torch.nn.Module):
    """A module that acts as a hook."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), scale))

    def __call__(self, residual: torch.Tensor, hook: Any) -> torch.Tensor:
        return residual * self.weight[0].detach()


def counting() -> Hook:
    n_calls, stored = 0, {}

    def keep(residual: torch.Tensor, hook: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        stored[n_calls] = residual

    return keep


def by_member(values: Any, key: Any) -> Hook:
    return lambda residual, hook: residual * values[key]


def by_array(scale: Any) -> Hook:
    return lambda residual, hook: residual * torch.from_numpy(scale)


def counted_beside(scale: float) -> Hook:
    """A hook with its counter in the dict of its scale."""
    values = {"n": 0, "scale": scale}

    def count(residual: torch.Tensor, hook: Any) -> torch.Tensor:
        values["n"] += 1
        return residual * values["scale"]

    return count


def added_by_method(vector: torch.Tensor) -> Hook:
    return lambda residual, hook: vector.add(residual)


class Configured:
    """Scales by an attribute of its configuration."""

    def __init__(self, scale: float) -> None:
        self.config = Steering(scale)

    def __call__(self, residual: torch.Tensor, hook: Any) -> torch.Tensor:
        return residual * self.config.scale


def nested_global() -> Hook:
    return lambda residual, hook: sum(residual * SCALE for _ in range(1))


def caching(kind: str) -> Hook:
    counts, norms, by_name = {"n": 0}, [], dict[str, Any]()

    def keep(residual: torch.Tensor, hook: Any) -> None:
        if kind == "counter in a dict":
            counts["n"] += 1
        elif kind == "list":
            norms.append(residual.norm().item())
        else:
            by_name[hook.name] = residual

    return keep


def told(model: icl.Model, hook: Hook, place: str = "blocks.1.hook_out", n_runs: int = 0) -> str:
    """What is told of a hook, after so many runs with it."""
    with model.wrapped.hooks(fwd_hooks=[(place, hook)]), torch.no_grad():
        for _ in range(n_runs):
            model.run(torch.tensor([[0, 5, 9]]))
        return model.foreign_hooks()


KINDS: dict[str, Callable[[float], Hook]] = {
    "closure over a number": scaled,
    "closure over a vector": lambda by: steered(torch.full((32,), by)),
    "partial": lambda by: functools.partial(times, exponent=by),
    "method": lambda by: Steering(by).apply,
    "object": Steering,
    "module": Adapter,
    "default": lambda by: lambda residual, hook, scale=by: residual * scale,
    "dict of vectors": lambda by: by_member({1: torch.full((32,), by)}, 1),
    "list": lambda by: by_member([by], 0),
    "nested dict": lambda by: by_member({0: {"a": [by]}, 1: 1.0}, 1),
    "array": lambda by: by_array(np.full(32, by, np.float32)),
    "dict with a counter": counted_beside,
    "method of a vector": lambda by: added_by_method(torch.full((32,), by)),
    "attribute of an attribute": Configured,
    "function by name": lambda by: (
        (lambda residual, hook: torch.relu(residual)) if by < 1 else (lambda residual, hook: torch.tanh(residual))
    ),
    "method by name": lambda by: (
        (lambda residual, hook: residual.mul(2.0)) if by < 1 else (lambda residual, hook: residual.add(2.0))
    ),
    "code": lambda by: scaled(1.5) if by < 1 else steered(torch.ones(32)),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_hooks_are_told_by_what_they_read(llama: icl.Model, make: Callable[[float], Hook]) -> None:
    assert told(llama, make(0.5)) == told(llama, make(0.5)) == told(llama, make(0.5), n_runs=2)
    assert told(llama, make(0.5)) != told(llama, make(1.5))
    assert told(llama, make(0.5)) != told(llama, make(0.5), "blocks.0.hook_out")
    assert llama.foreign_hooks() == ""


def test_hooks_are_told_by_global_values(llama: icl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = told(llama, by_global)
    monkeypatch.setitem(globals(), "SCALE", 0.9)
    assert told(llama, by_global) != before


def test_what_a_hook_writes_is_no_part_of_it(llama: icl.Model) -> None:
    hook = counting()
    assert told(llama, hook) == told(llama, hook, n_runs=3) == told(llama, hook)


def test_hooks_of_torch_are_found_anywhere_in_the_model(llama: icl.Model) -> None:
    """Also on the original model's own top, which is not among a bridge's modules."""
    original = llama.wrapped.original_model
    for module in (original, original.model, original.model.layers[1]):
        handle = module.register_forward_hook(lambda module, args, output: None)
        assert len(llama.foreign_hook_names()) == 1
        assert llama.foreign_hooks() != ""
        handle.remove()
        assert llama.foreign_hooks() == ""


@pytest.mark.parametrize(
    "run",
    [
        lambda wrapped, tokens: wrapped.run_with_cache(tokens, names_filter=["blocks.0.attn.hook_out"]),
        lambda wrapped, tokens: wrapped.original_model(tokens, output_hidden_states=True, output_attentions=True),
    ],
    ids=["run_with_cache", "output_hidden_states"],
)
def test_captures_before_and_after_runs_that_return_activations_belong_together(
    llama: icl.Model, prompts: icl.Prompts, run: Callable[[Any, torch.Tensor], object]
) -> None:
    """Such runs leave hooks of transformers on the model for good, which collect and change nothing."""
    zero_shot = icl.capture(llama, prompts.zero_shot(), fields=icl.DECOMPOSE_FIELDS, progress=False)
    with torch.no_grad():
        run(llama.wrapped, torch.tensor([[0, 5, 9]]))
    left = [hook for module in llama.wrapped.original_model.modules() for hook in module._forward_hooks.values()]
    assert any("output_capturing" in hook.__module__ for hook in left)
    assert llama.foreign_hooks() == ""
    in_context = icl.capture(llama, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    assert icl.decompose(llama, zero_shot=zero_shot, in_context=in_context).residuals.split.max() < 1e-5


@pytest.mark.parametrize("module", ["transformers.models.llama.modeling_llama", "torch.nn.utils.weight_norm"])
def test_hooks_of_libraries_that_may_change_what_runs_are_foreign(
    llama: icl.Model, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those by which transformers and TransformerLens collect what a caller requests are not."""

    def doubled(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return 2 * output

    monkeypatch.setattr(doubled, "__module__", module)
    handle = llama.wrapped.original_model.model.norm.register_forward_hook(doubled)
    try:
        assert len(llama.foreign_hook_names()) == 1
        assert llama.foreign_hooks() != ""
    finally:
        handle.remove()


def test_captures_under_other_hooks_at_the_same_place_are_refused(llama: icl.Model, prompts: icl.Prompts) -> None:
    def captured(by: float, of: icl.Prompts) -> icl.Capture:
        with llama.wrapped.hooks(fwd_hooks=[("blocks.1.hook_out", scaled(by))]):
            return icl.capture(llama, of, fields=icl.DECOMPOSE_FIELDS, progress=False)

    in_context, zero_shot = captured(0.5, prompts), captured(0.5, prompts.zero_shot())
    with llama.wrapped.hooks(fwd_hooks=[("blocks.1.hook_out", scaled(0.5))]):
        assert icl.decompose(llama, in_context=in_context, zero_shot=zero_shot).residual < 1e-5
        other = captured(0.9, prompts.zero_shot())
        with pytest.raises(ValueError, match="with the hooks that are on the model now, got others"):
            icl.decompose(llama, in_context=in_context, zero_shot=other)


@pytest.mark.parametrize("kind", ["counter in a dict", "list", "dict"])
def test_containers_that_a_hook_writes_are_no_part_of_it(llama: icl.Model, kind: str) -> None:
    hook = caching(kind)
    assert told(llama, hook) == told(llama, hook, n_runs=3) == told(llama, hook)


def test_hooks_are_told_by_global_values_that_a_nested_function_reads(
    llama: icl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = nested_global()
    before = told(llama, hook)
    monkeypatch.setitem(globals(), "SCALE", 0.9)
    assert told(llama, hook) != before


def test_values_that_cannot_be_read_are_never_equal(llama: icl.Model) -> None:
    first, second = object(), object()
    assert told(llama, by_member({0: first}, 0)) == told(llama, by_member({0: first}, 0))
    assert told(llama, by_member({0: first}, 0)) != told(llama, by_member({0: second}, 0))
