"""Results compare by value, and refuse what contradicts: shapes, lengths, counts, ranges, made by hand or read."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import icl_dual as icl
from icl_dual.order_sensitivity import measure_order_sensitivity
from icl_dual.results import BaseResult, same_values
from icl_dual.storage import Saved
from icl_dual.updates import summarise

ALL = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS + ("demo_scores", "next_log_probs")


def saved_classes(cls: type = Saved) -> Iterator[type]:
    """Yield every class of the library that saves itself."""
    for subclass in cls.__subclasses__():
        if subclass.__module__.startswith("icl_dual"):
            yield subclass
        yield from saved_classes(subclass)


NAMES = sorted(cls.__name__ for cls in saved_classes())


@pytest.fixture(scope="module")
def results(llama: icl.Model, task: icl.Task, prompts: icl.Prompts) -> dict[str, Any]:
    """A valid result of every class, by the class's name."""
    experiment = icl.run_experiment(llama, prompts, lr=0.05, replicas=2, fields=ALL, factors=True, progress=False)
    orders = measure_order_sensitivity(
        llama, task, task.demonstrations(3, seed=1), task.queries(4), n_orders=3, lr=0.05, progress=False
    )
    with icl.momentum_attention(llama, 0.5):
        pair = {
            name: icl.capture(llama, these, fields=icl.DECOMPOSE_FIELDS, progress=False)
            for name, these in {"zero_shot": prompts.zero_shot(), "in_context": prompts}.items()
        }
        decomposition = icl.decompose(llama, **pair)
    values = [
        experiment,
        experiment.in_context,
        experiment.delta,
        experiment.recordings(),
        experiment.compare(),
        experiment.updates(rank=2, progress=False),
        experiment.massive_activations(),
        summarise(experiment.delta),
        decomposition,
        orders,
    ]
    return {type(value).__name__: value for value in values}


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that is saved with a result, by its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.metadata.get("saved", True):
                yield from parts(getattr(value, field.name), f"{path}/{field.name}".strip("/"))
    elif isinstance(value, dict) or hasattr(value, "_asdict"):
        for name, member in (value if isinstance(value, dict) else value._asdict()).items():
            yield from parts(member, f"{path}/{name}")


def changed(value: Any, path: str, new: Any) -> Any:
    """Return a result with another value at a path, without any check of the outermost one."""
    name, _, rest = path.partition("/")
    if isinstance(value, dict):
        if path in value:
            return value | {path: new}
        return value | {name: changed(value[name], rest, new)}
    member = changed(getattr(value, name), rest, new) if rest else new
    if hasattr(value, "_replace"):
        return value._replace(**{name: member})
    twin = copy.copy(value)
    object.__setattr__(twin, name, member)
    return twin


def test_every_result_is_here(results: dict[str, Any]) -> None:
    assert sorted(results) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_results_compare_by_value(results: dict[str, Any], name: str, tmp_path: Path) -> None:
    result = results[name]
    assert type(result).__eq__ is BaseResult.__eq__, "a dataclass with eq=False"
    with pytest.raises(TypeError, match="unhashable"):
        hash(result)
    assert (result == 3, result != 3) == (False, True)
    result.save(tmp_path / "x")
    loaded = type(result).load(tmp_path / "x")
    assert loaded == result
    assert (loaded != result) is False
    for path, tensor in parts(result):
        others = [tensor[None], tensor.to(torch.int16 if tensor.is_floating_point() else torch.float32)]
        others += [] if tensor.isnan().all() else [tensor + 1]
        assert all(changed(result, path, other) != result for other in others), path
        assert changed(result, path, tensor.clone()) == result, path


@pytest.mark.parametrize(
    ("result", "field"),
    [
        ("Capture", "keys_values"),
        ("Capture", "full_prompt"),
        ("WeightDelta", "factors"),
        ("Decomposition", "relaxation"),
        ("Decomposition", "residuals"),
        ("Decomposition", "momentum"),
        ("Decomposition", "attention_inputs"),
        ("Comparison", "stability"),
        ("UpdateComparison", "demonstrations"),
    ],
)
def test_nested_results_compare_by_value(results: dict[str, Any], result: str, field: str) -> None:
    value = getattr(results[result], field)
    first, tensor = next(parts(value))
    first = first.strip("/")
    twin, other = changed(value, first, tensor.clone()), changed(value, first, tensor + 1)
    assert (value == twin, value != twin, value == other, value != other) == (True, False, False, True)
    assert (value == 3, value != 3) == (False, True)
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)


def test_nan_equals_nan_and_types_are_told_apart() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    assert same_values({"x": (nan, [float("nan")])}, {"x": (nan.clone(), [float("nan")])})
    assert not same_values(nan, torch.tensor([1.0, torch.nan]))
    assert not same_values(nan, nan.double())
    assert not same_values(nan, [float("nan"), 1.0])
    assert not same_values((1, 2), [1, 2])
    assert not same_values({"a": 1}, {"b": 1})
    assert not same_values(torch.ones(2), torch.ones(1))


def test_prompts_tasks_and_examples_compare(prompts: icl.Prompts, task: icl.Task) -> None:
    assert prompts == dataclasses.replace(prompts)
    assert prompts != prompts.zero_shot()
    assert task == task
    assert task.queries(1) == task.queries(1)
