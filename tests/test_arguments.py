"""Every public function, method and class refuses wrong arguments in a sentence: drawn from its annotations."""

import dataclasses
import gc
import inspect
import math
import reprlib
import types
import typing
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import annotated_types
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import AbstractArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import icl_dual as icl
from icl_dual import dual
from icl_dual.arguments import checked
from icl_dual.models import tiny_model
from icl_dual.patches import Patch

PLAIN = (str, int, float, bool, types.NoneType)


class Call(NamedTuple):
    """One public function, method or constructor, and what it may be called with."""

    name: str
    call: Callable[..., Any]
    hints: dict[str, Any]
    arguments: dict[str, Any]


# What is called, with arguments that are right


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[type, Any]:
    """One instance of every public class, by class."""
    return make_examples(tmp_path_factory.mktemp("examples"))


def make_examples(folder: Path) -> dict[type, Any]:
    model = tiny_model()
    task = icl.Task("toy", "Text: {text} Label:", ("no", "yes"), make_rows())
    demonstrations = task.demonstrations(2, seed=1)
    prompts = icl.build_prompts(model, task, demonstrations, task.queries(2))
    fields = (*icl.METRIC_FIELDS, *icl.DECOMPOSE_FIELDS)
    experiment = icl.run_experiment(model, prompts, lr=0.01, fields=fields, factors=True, replicas=0, progress=False)
    cell = icl.Cell(model=model.name, task="toy", k=2, seed=1, lr=0.01, n_queries=2, replicas=0)
    W = torch.eye(3)
    exact, statistics = icl.build_exact_patch(model, prompts), icl.sum_statistics(model, prompts)
    zero_shot, in_context = (
        icl.capture(model, these, fields=(*icl.EFFECT_FIELDS, "attn_out"), progress=False)
        for these in (prompts.zero_shot(), prompts)
    )
    sourced = icl.prompt_from_parts([("document", "Seen. "), ("question", "Is it?")], model)
    captured = icl.capture_sources(model, sourced, logits=[1], progress=False)
    part = dual.AttentionPart(torch.ones(1, 2, 3), torch.zeros(1, 2))
    interval = icl.statistics.Interval(0.5, 0.4, 0.6, 3)
    instances = [
        model,
        task,
        demonstrations[0],
        prompts,
        icl.Chat(),
        experiment,
        icl.plan(model, prompts),
        icl.PromptLengths.of(prompts),
        experiment.in_context,
        experiment.delta,
        experiment.delta.config,
        icl.Lora(),
        experiment.compare(),
        experiment.recordings(),
        experiment.decompose(),
        icl.decompose_prompts(model, prompts, progress=False),
        experiment.updates(progress=False),
        experiment.massive_activations(),
        icl.summarise(experiment.delta),
        icl.measure_order_sensitivity(
            model, task, demonstrations, task.queries(2), n_orders=2, lr=0.01, progress=False
        ),
        Patch(exact.model, exact.fingerprint, exact.factors, exact.bias, exact.scale),
        exact,
        statistics,
        statistics.ridge_patch(),
        icl.build_function_vector(in_context, 0),
        icl.compare_effects(zero_shot=zero_shot, reference=in_context, changed=in_context, rank=2),
        icl.compare_weights(exact, exact, rank=1),
        sourced,
        captured,
        captured.show(0, 0),
        icl.view(captured),
        icl.build_value_patch(model, prompts),
        icl.run_relaxed(model, prompts),
        icl.generate_patched(model, prompts, n_tokens=1),
        cell,
        icl.run_cell(model, task, cell, folder / "cell", progress=False),
        icl.Metric("toy metric", lambda batch: batch.h_zero_shot[..., 0]),
        interval,
        icl.statistics.Paired(interval, 0.5, (0.1,)),
        part,
        dual.Sgd(W, W),
        dual.LinearSelfAttention(W, W, W, W),
        dual.AttentionRule(1.0, None, None),
        dual.Mask(None, causal=True),
        dual.Svd.of(W),
        dual.overlap(dual.Svd.of(W), dual.Svd.of(W), 2),
    ]
    return {type(instance): instance for instance in instances}


AXES = {"kv_head": 2, "head": 4, "d_head": 3, "group": 2}


def tensor_of(hint: Any) -> Any:
    """A tensor or array of a jaxtyping annotation."""
    sizes = [AXES.get(axis.strip("#*"), 2) for axis in hint.dim_str.split() if axis != "..."]
    kind = hint.__name__.partition("[")[0]
    array = {"Int": torch.zeros(sizes).long(), "Bool": torch.zeros(sizes).bool()}.get(kind, torch.zeros(sizes))
    return array.numpy() if hint.array_type is np.ndarray else array


def right(hint: Any, examples: dict[type, Any]) -> Any:
    """A value that an annotation accepts."""
    origin, options = get_origin(hint), get_args(hint)
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return tensor_of(hint)
    if origin is Annotated or origin in (Union, types.UnionType):
        return right(options[0], examples)
    if origin is Literal:
        return options[0]
    if origin is tuple and options[-1] is not Ellipsis:
        return tuple(right(option, examples) for option in options)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return {right(options[0], examples): right(options[1], examples)}
    if origin in (Sequence, Collection, Iterable, list, tuple):
        return (list if origin is not tuple else tuple)([right(options[0], examples)])
    if origin is Callable:
        return lambda *_: None
    plain = {int: 1, float: 0.5, bool: True, str: "text", Any: None, Path: Path("folder"), torch.dtype: torch.float32}
    plain |= {
        torch.Tensor: torch.zeros(2),
        Axes: Figure().subplots(),
        torch.Generator: torch.Generator(),
        object: None,
        types.NoneType: None,
    }
    return plain[hint] if hint in plain else examples.get(hint, "folder")


def public_calls(examples: dict[type, Any]) -> Iterator[Call]:
    """Everything that a user can call, with arguments."""
    for name in icl.__all__:
        target = getattr(icl, name)
        if inspect.ismodule(target):
            members = {f"{name}.{member}": value for member, value in vars(target).items() if member[0] != "_"}
        else:
            members = {name: target}
        for member_name, member in members.items():
            module = getattr(member, "__module__", None) or ""
            if not module.startswith(f"icl_dual.{name}" if inspect.ismodule(target) else "icl_dual."):
                continue
            if inspect.isfunction(member):
                yield call_of(member_name, member, member, examples)
            elif inspect.isclass(member) and not issubclass(member, BaseException):
                yield from calls_of_class(member_name, member, examples)


def calls_of_class(name: str, cls: Any, examples: dict[type, Any]) -> Iterator[Call]:
    instance = examples[cls]
    names = [field.name for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else None
    names = getattr(cls, "_fields", names)
    if names is not None:
        hints = {
            field: hint for field, hint in typing.get_type_hints(cls, include_extras=True).items() if field in names
        }
        constructor: Any = cls
        yield Call(name, constructor, hints, {field: getattr(instance, field) for field in names})
    else:
        yield call_of(name, cls, cls.__init__, examples)
    for method, function in inspect.getmembers(cls, callable):
        if method[0] != "_" and (getattr(function, "__module__", None) or "").startswith("icl_dual"):
            yield call_of(f"{name}.{method}", getattr(instance, method), function, examples)


def call_of(name: str, call: Any, function: Any, examples: dict[type, Any]) -> Call:
    hints = typing.get_type_hints(inspect.unwrap(getattr(function, "__func__", function)), include_extras=True)
    parameters = inspect.signature(call).parameters
    hints = {parameter: hint for parameter, hint in hints.items() if parameter in parameters}
    required = {
        parameter: right(hint, examples)
        for parameter, hint in hints.items()
        if parameters[parameter].default is inspect.Parameter.empty
        and parameters[parameter].kind is not inspect.Parameter.VAR_POSITIONAL
    }
    if name == "Model":
        required = {"wrapped": examples[icl.Model].backend}
    if name == "build_prompts":
        required["queries"] = examples[icl.Task].queries(1)
    if name == "Task":
        required = {"name": "toy", "template": "{text}", "label_words": ["no", "yes"], "rows": make_rows()}
    return Call(name, call, hints, required)


# Arguments that are wrong

ANYTHING = (
    None,
    True,
    3,
    2.5,
    math.nan,
    "word",
    b"bytes",
    [],
    {},
    {"a"},
    object(),
    np.ones(3),
    torch.ones(5, 1, 2, 7, 1),
)


def accepts(hint: Any, value: Any) -> bool:
    """Whether an annotation says that a value is right, read without `icl_dual.arguments`, item by item."""
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return True
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return isinstance(value, hint)
    if origin is Annotated:
        return (
            accepts(options[0], value) or ("PathAllowed()" in map(repr, options) and isinstance(value, Path))
        ) and all(isinstance(value, str | Path) or value > getattr(bound, "gt", -math.inf) for bound in options[1:])
    if origin in (Union, types.UnionType):
        return any(accepts(option, value) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if hint in (int, float, bool, str):
        return type(value) in ((float, int) if hint is float else (hint,))
    if hint is Path:
        return isinstance(value, str | Path)
    if origin is Callable:
        return callable(value)
    if origin is not None and inspect.isclass(origin):
        if isinstance(value, str | bytes | Mapping) and not issubclass(origin, Mapping):
            return origin is Iterable and isinstance(value, Mapping)
        if isinstance(value, Mapping) and isinstance(value, origin):
            return all(accepts(options[1], item) for item in value.values())
        return isinstance(value, origin) and (
            origin is Iterable or not options or all(accepts(options[0], item) for item in cast(Any, value))
        )
    return isinstance(value, hint if hint is not None else types.NoneType)


def out_of_range(hint: Any) -> Iterator[Any]:
    """Values of the right type, out of the range that an annotation says, at any depth of unions."""
    options = get_args(hint)
    for constraint in options if get_origin(hint) is Annotated else ():
        match constraint:
            case annotated_types.Gt(bound) | annotated_types.Lt(bound):
                yield from (bound, math.nan) if options[0] is float else (bound,)
            case annotated_types.Ge(bound):
                yield cast(Any, bound) - 1
    if get_origin(hint) in (Union, types.UnionType):
        for option in options:
            yield from out_of_range(option)


def in_container(hint: Any, examples: dict[type, Any]) -> Iterator[Any]:
    """Containers of the right type with a wrong item, or for a sequence a set."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in options:
            yield from in_container(option, examples)
    if origin in (Sequence, list, tuple) and options[0] is not Any:
        item = right(options[0], examples)
        kind = tuple if origin is tuple else list
        for wrong in (None, object(), *out_of_range(options[0])):
            if not accepts(options[0], wrong) or wrong in (*out_of_range(options[0]),):
                yield kind([item, wrong])
        if isinstance(item, PLAIN):
            yield {item}
            yield str(item) * 2
    if inspect.isclass(origin) and issubclass(cast(type, origin), Mapping) and options[1] is not Any:
        yield {right(options[0], examples): object()}


def wrong_values(hint: Any, examples: dict[type, Any]) -> list[Any]:
    refused = [value for value in ANYTHING if not accepts(hint, value)]
    nested = [value for value in in_container(hint, examples) if not (isinstance(value, str) and accepts(hint, value))]
    return [*refused, *out_of_range(hint), *nested]


@pytest.fixture(scope="module")
def wrong_arguments(examples: dict[type, Any]) -> list[tuple[Call, str, Any]]:
    """Each public call with one parameter and a wrong value for it."""
    return [
        (call, parameter, wrong)
        for call in public_calls(examples)
        for parameter, hint in call.hints.items()
        for wrong in wrong_values(hint, examples)
    ]


def test_every_public_call_refuses_none_or_a_set_in_a_sentence(wrong_arguments: list[tuple[Call, str, Any]]) -> None:
    """One wrong value for each parameter: that a new function is checked at all."""
    by_parameter = {(call.name, parameter): (call, parameter, wrong) for call, parameter, wrong in wrong_arguments}
    problems = [text for case in by_parameter.values() for text in problem(*case)]
    assert not problems, "\n".join(problems)
    assert len(by_parameter) > 300


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_wrong_arguments_of_the_public_api_are_refused_in_a_sentence(
    wrong_arguments: list[tuple[Call, str, Any]], data: st.DataObject
) -> None:
    case = data.draw(st.sampled_from(range(len(wrong_arguments))))
    assert problem(*wrong_arguments[case]) == []


def problem(call: Call, parameter: str, wrong: Any) -> list[str]:
    """What a user would complain about where one argument is wrong: nothing, if it is refused in a sentence."""
    case = f"{call.name}({parameter}={reprlib.repr(wrong)})"
    try:
        if inspect.signature(call.call).parameters[parameter].kind is inspect.Parameter.VAR_POSITIONAL:
            call.call(*call.arguments.values(), wrong)
        else:
            call.call(**{**call.arguments, parameter: wrong})
    except (ValueError, icl.AssetError) as error:
        is_sentence = "expected" in str(error) and "got" in str(error) and parameter in str(error)
        return [] if is_sentence else [f"{case}: {type(error).__name__}: {str(error)[:150]}"]
    except Exception as error:
        return [f"{case}: bare {type(error).__name__}: {str(error)[:150]}"]
    return [f"{case}: accepted"]


def test_scalars_of_numpy_and_torch_and_paths_become_plain_values() -> None:
    k: Any = np.int64(2)
    lr: Any = torch.tensor(0.5)
    model: Any = Path("a/model")
    cell = icl.Cell(model=model, task="toy", k=k, seed=1, lr=lr, n_queries=2, replicas=0)
    assert (type(cell.k), type(cell.lr), cell.model) == (int, float, "a/model")
    assert cell == icl.Cell(model="a/model", task="toy", k=2, seed=1, lr=0.5, n_queries=2, replicas=0)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ((n for n in (1, 2)), "list"),
        (pd.Series([1, 2]), "list"),
        ({1: 2}.keys(), "list"),
        (range(2).__iter__(), "list"),
        ({1: 2}, None),
        ("12", None),
    ],
)
def test_items_that_are_no_list_are_to_be_passed_as_a_list(value: Any, advice: str | None) -> None:
    @checked
    def total(numbers: Sequence[int]) -> None: ...

    @checked
    def ordered(numbers: tuple[int, ...]) -> None: ...

    @checked
    def labelled(numbers: dict[str, Sequence[int]]) -> None: ...

    for function, kind in ((total, advice), (ordered, advice and "tuple")):
        with pytest.raises(icl.ArgumentError, match=r": see help\(" if kind is None else rf": pass {kind}\(…\)$"):
            function(value)
    if advice is not None:
        with pytest.raises(icl.ArgumentError, match=r": see help\("):
            labelled(value)


def test_a_whole_number_stays_one_where_it_may() -> None:
    @checked
    def given(number: float | int | None) -> float | int | None:
        return number

    call: Any = given
    scalars: tuple[tuple[Any, type], ...] = (
        (3, int),
        (np.int64(3), int),
        (np.float32(0.5), float),
        (None, types.NoneType),
    )
    for number, kind in scalars:
        assert type(call(number)) is kind


def test_bounds_and_lengths_are_those_of_the_annotation() -> None:
    @checked
    def given(
        *,
        share: Annotated[float, annotated_types.Le(1)] = 0.0,
        pair: tuple[int, int] = (0, 0),
        names: Annotated[Sequence[str], annotated_types.MinLen(2)] = ("a", "b"),
    ) -> None: ...

    given(share=1.0, pair=(1, 2), names=["a", "b"])
    wrong: Any
    for name, wrong in (("share", 1.5), ("pair", (1,)), ("pair", (1, 2, 3)), ("names", ["a"])):
        with pytest.raises(icl.ArgumentError, match=f"expected {name} as"):
            given(**{name: wrong})


def test_errors_name_the_function_the_parameter_and_what_to_do() -> None:
    text: Any = "0.1"
    with pytest.raises(
        icl.ArgumentError, match=r"icl_dual\.Cell: expected lr as .*, got '0\.1' \(str\): leave out the"
    ):
        icl.Cell(model="m", task="t", k=1, seed=1, lr=text)
    loaded: Any = tiny_model()
    with pytest.raises(icl.ArgumentError, match=r"expected model as text .*, got Model\(.*: pass its name, 'tiny'"):
        icl.Cell(model=loaded, task="t", k=1, seed=1, lr=0.1)
    series: Any = pd.Series([1.0], name="col")
    with pytest.raises(icl.ArgumentError, match=r"(?s)expected model as text .*: see help\("):
        icl.Cell(model=series, task="t", k=1, seed=1, lr=0.1)
    with pytest.raises(TypeError, match=r"missing .*'lr'"):
        icl.Cell(model="m", task="t", k=1, seed=1)  # pyright: ignore[reportCallIssue]


def test_options_that_did_not_fit_keep_no_tensor_of_a_caller_alive() -> None:
    @checked
    def scale(factor: Annotated[float, annotated_types.Gt(0)] | Sequence[int] | None) -> None: ...

    def caller() -> weakref.ref[torch.Tensor]:
        tensor = torch.ones(3)
        scale(None)
        scale([1])
        return weakref.ref(tensor)

    caller()  # annotations are read at the first call
    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
