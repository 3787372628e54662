"""Results compare by value, and refuse what contradicts: shapes, lengths, counts, ranges, made by hand or read."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import with_value
from jaxtyping import Float
from torch import Tensor

import icl_dual as icl
from icl_dual.order_sensitivity import measure_order_sensitivity
from icl_dual.patches import Patch, RidgeStatistics
from icl_dual.results import BaseResult, check_axes, same_values
from icl_dual.storage import Saved, load_tensors, saved
from icl_dual.updates import summarise

ALL = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS + ("demo_scores", *icl.EFFECT_FIELDS)


def saved_classes(cls: type = Saved) -> Iterator[type]:
    """Yield every class of the library that saves itself."""
    for subclass in cls.__subclasses__():
        if subclass.__module__.startswith("icl_dual"):
            yield subclass
        yield from saved_classes(subclass)


NAMES = sorted(cls.__name__ for cls in saved_classes())


@pytest.fixture(scope="module")
def results(
    llama: icl.Model, task: icl.Task, prompts: icl.Prompts, models_by_architecture: Callable[[str], icl.Model]
) -> dict[str, Any]:
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
        decomposed = icl.decompose_prompts(
            llama, prompts, keep=("delta_icl", "z_0", "direct", "realised"), progress=False
        )
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
        decomposed,
        orders,
        icl.compare_effects(
            zero_shot=experiment.zero_shot,
            reference=experiment.in_context,
            changed=experiment.finetuned,
            rank=2,
        ),
        icl.compare_weights(experiment.delta, experiment.delta.randomised(1), rank=2),
        icl.build_function_vector(experiment.in_context, 0),
        icl.capture_sources(llama, icl.prompt_from_query(prompts), logits=[5, 6], progress=False),
        *patches(llama, models_by_architecture("gemma3-window"), prompts),
    ]
    return {type(value).__name__: value for value in values}


def patches(llama: icl.Model, gemma: icl.Model, prompts: icl.Prompts) -> list[Any]:
    """One of each result of `icl_dual.patches` that is of weights or runs; `Patch` changes all that a patch may."""
    statistics, of_gemma = icl.sum_statistics(llama, prompts), icl.build_exact_patch(gemma, prompts)
    wide = icl.draw_random_patch(icl.build_exact_patch(llama, prompts), seed=1)
    bias = icl.build_mean_patch(gemma, prompts).bias
    return [
        Patch(gemma.name, of_gemma.fingerprint, of_gemma.factors | {"out": wide.factors["out"]}, bias, of_gemma.scale),
        icl.build_exact_patch(llama, prompts),
        statistics,
        statistics.ridge_patch(),
        RidgeStatistics(statistics.gram[0], statistics.cross[0], statistics.n_queries),
        icl.build_value_patch(llama, prompts, layers=(0, 2)),
        icl.run_relaxed(llama, prompts, scale="fitted"),
        icl.generate_patched(llama, prompts, n_tokens=2, forms=("beside", "cached")),
    ]


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
        ("ValuePatch", "factors"),
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
    assert not same_values((1, 2), (1, 2, 3))
    assert not same_values([1, 2, 3], [1, 2])


def test_heads_without_key_value_heads_are_refused() -> None:
    @dataclasses.dataclass
    class Heads:
        q: Float[Tensor, " head"]
        k: Float[Tensor, " kv_head"]

    assert check_axes(Heads(torch.ones(4), torch.ones(2))) == {"head": 4, "kv_head": 2}
    for n in (0, 3):
        with pytest.raises(ValueError, match=rf"expected q with a multiple of the key-value heads of k \({n}\), got 4"):
            check_axes(Heads(torch.ones(4), torch.ones(n)))


def test_prompts_tasks_and_examples_compare(prompts: icl.Prompts, task: icl.Task) -> None:
    assert prompts == dataclasses.replace(prompts)
    assert prompts != prompts.zero_shot()
    assert task == task
    assert task.queries(1) == task.queries(1)


FREE_AXES = {("next_log_probs", 1), ("context_scores/FT", 2), ("context_scores/ZSL", 2), ("W_O", 3), ("vector", 0)}
"""Axes of tensors that no other field has: d_vocab, the zero-shot context, and d_model of a model without biases."""
FREE_AXES_OF = {
    "AttentionRun": {("factors", 2)},
    "RidgeStatistics": {("cross", 0)},
    "SharedPatch": {("factors/out/left", 1), ("factors/out/right", 1)},
    "ValuePatch": {("factors/left", 1), ("factors/right", 1)},
}
"""The same of one class: heads, and d_out and d_in of a matrix that changes alone."""
MAY_BE_NAN = (
    *("share", "relaxation", "per_layer", "per_query", "stability", "cosine", "angles", "norm_ratio"),
    *("effective_rank", "demonstrations_K", "demonstrations_V", "thought", "momentum_norm"),
)
"""Parts of the names of fields that are undefined in some results."""


def corruptions(name: str, path: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a tensor in a damaged file of a class may be, each with what is wrong."""
    free_axes = FREE_AXES | FREE_AXES_OF.get(name, set())
    yield "one axis more", tensor[None]
    yield "another dtype", tensor.to(torch.int16 if tensor.is_floating_point() else torch.float32)
    for axis, length in enumerate(tensor.shape):
        if length and (path, axis) not in free_axes:
            yield f"axis {axis} too short", tensor.narrow(axis, 0, length - 1)
    wrong = tensor.clone()
    if tensor.numel() and not tensor.is_floating_point():
        wrong.view(-1)[-1] = -7
        yield "a negative index", wrong
    elif tensor.numel() and not any(part in path for part in MAY_BE_NAN):
        wrong.view(-1)[-1] = torch.nan
        yield "NaN", wrong


def some_parts(result: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a result, of a table by metric the first alone."""
    tables: set[str] = set()
    for path, tensor in parts(result):
        table = path.rpartition("/")[0]
        if not table.endswith(("per_layer", "per_query", "shifts")) or table not in tables:
            yield path, tensor
        tables.add(table)


def check(result: Any, path: str) -> None:
    """Check a result and the results in it on the way to a path, as making them does.

    The suite's check of annotations would refuse some before: it is not there where the library is used.
    """
    name, _, rest = path.partition("/")
    member = result.get(name) if isinstance(result, dict) else getattr(result, name)
    if rest and not isinstance(member, Tensor | None):
        check(member, rest)
    if hasattr(result, "__post_init__"):
        cast(Any, result).__post_init__()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Load a result from a folder whose tensors and metadata were changed."""

    def load(result: Any, tensors: dict[str, Tensor] | None = None, metadata: dict[str, Any] | None = None) -> Any:
        folder = tmp_path / type(result).__name__
        if not folder.exists():
            result.save(folder)
        saved_tensors, saved_metadata = load_tensors(folder)
        changed_files = saved_tensors | (tensors or {}), saved_metadata | (metadata or {})
        with monkeypatch.context() as patch:
            patch.setattr(saved, "load_tensors", lambda folder: changed_files)
            return type(result).load(folder)

    return load


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_tensor_is_refused_by_name(results: dict[str, Any], name: str, load: Callable[..., Any]) -> None:
    result = results[name]
    if name == "Experiment":  # the captures and the delta are classes of their own
        paths = ["zero_shot/attn_out", "in_context/keys_values/demo_keys", "delta/W_K"]
        tensors = {path: tensor for path, tensor in parts(result) if path in paths}
    else:
        tensors = dict(some_parts(result))
    assert load(result) == result
    for path, tensor in tensors.items():
        for what, wrong in corruptions(name, path, tensor):
            with pytest.raises(icl.AssetError):
                load(result, {path: wrong})
            with pytest.raises(ValueError, match="expected") as raised:
                check(changed(result, path, wrong), path)
            assert path.split("/")[-1] in str(raised.value), f"{path}, {what}: {raised.value}"


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_another_type_is_refused_by_name(
    results: dict[str, Any], name: str, load: Callable[..., Any]
) -> None:
    result = results[name]
    for field in dataclasses.fields(result):
        is_tensor = isinstance(getattr(result, field.name), Tensor)  # which is read, whatever JSON says
        if field.metadata.get("saved", True) and field.name != "metadata" and not is_tensor:
            with pytest.raises(icl.AssetError, match=field.name):
                load(result, metadata={field.name: [[{"a": 0.5}]]})


def nested(result: Any, path: str, value: Any) -> dict[str, Any]:
    """Return the metadata entry of a result's field, with another value in it."""
    name, _, rest = path.partition("/")
    if not rest:
        return {name: value}
    member = getattr(result, name)
    values = (
        dict(member)
        if isinstance(member, dict)
        else {
            field.name: getattr(member, field.name)
            for field in dataclasses.fields(member)
            if field.metadata.get("saved", True) and not any(True for _ in parts(getattr(member, field.name)))
        }
    )
    return {name: {key: _as_json(item) for key, item in values.items()} | {rest: value}}


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("Comparison", "rec2ftp/both", 5, "expected rec2ftp as predictions give it"),
        ("Comparison", "rec2ftp/random", 1.5, "expected rec2ftp/random from 0 to 1, got 1.5"),
        ("Comparison", "stability/replicas", ["a", "b", "c"], "axis replica as replicas"),
        ("Comparison", "stability/n_queries", 99, "expected stability of at most as many queries as gold"),
        ("Comparison", "stability/diverged", ["a", "b", "c"], "expected at most as many diverged as replicas"),
        ("Capture", "prompts/gold", [0, 1], "expected gold as a label index from 0 to 1 for each of 7"),
        ("Capture", "prompts/gold", [0, 0, 0, 0, 0, 0, 2], "expected gold as a label index from 0 to 1"),
        ("Capture", "prompts/gold", [0, 0, 0, 0, 0, 0, -1], "expected gold as a label index from 0 to 1"),
        ("Capture", "prompts/labels", [[1]], "expected gold as a label index from 0 to 0"),
        ("Capture", "prompts/start", [-3], "expected start of at least 0, got -3"),
        ("Capture", "prompts/separators", [[1]], "expected separators as empty or with as many as demonstrations"),
        ("Capture", "prompts/demonstration_label_lengths", [1], "expected demonstration_label_lengths as one"),
        ("Capture", "prompts/demonstration_label_lengths", [999] * 4, "expected demonstration_label_lengths as one"),
        ("Capture", "prompts/scoring", "calibrated", "expected label_baselines with the rules of scoring"),
        ("Capture", "residual", -1.0, "expected residual of at least 0"),
        ("Capture", "residual", float("nan"), "expected residual of at least 0, got nan"),
        ("WeightDelta", "lr", float("nan"), "expected lr of at least 0, got nan"),
        ("WeightDelta", "demonstrations", [[1, 2]], "expected factors/steps from 0 to 0"),
        ("WeightDelta", "demonstrations", [[-5]] * 4, "expected demonstrations of at least 0"),
        ("WeightDelta", "config", {"trained": "key"}, "expected no change W_V with key trained"),
        ("WeightDelta", "config", {"trained": "attention"}, "expected W_Q with attention trained, got none"),
        ("UpdateComparison", "rank", 3, "axis rank as the field rank"),
        ("UpdateComparison", "residual", float("inf"), "expected residual of at least 0, got inf"),
        ("MassiveActivations", "ratio", 0.5, "expected ratio of at least 1"),
        ("MassiveActivations", "queries", [[1]], "axis query as queries"),
        ("OrderSensitivity", "orders", [[0, 1, 2], [0, 1, 1], [2, 1, 0]], "expected orders of the same demonstrations"),
        ("OrderSensitivity", "orders", [[0, 1, 2]], "axis order as orders"),
        ("Experiment", "steps", [0, 1], "expected as many steps as demonstrations in context"),
        ("Experiment", "replica_names", ["other"], "expected replica_names by"),
        ("ExactPatch", "query", [], "expected query with at least one token id, got none"),
        ("ExactPatch", "prompt", [-1], "expected prompt of at least 0, got -1"),
        ("ExactPatch", "residual", float("inf"), "expected residual of at least 0, got inf"),
        ("SharedPatch", "method", "mean", "expected ridge with the method 'ridge' alone, got one with 'mean'"),
        ("SharedPatch", "n_queries", 0, "expected n_queries of at least 1, got 0"),
        ("SharedStatistics", "n_queries", 0, "expected n_queries of at least 1, got 0"),
        ("RidgeStatistics", "n_rows", -1, "expected n_rows of at least 0, got -1"),
        ("ValuePatch", "layers", [2, 0], "expected layers in ascending order, got (2, 0)"),
        ("ValuePatch", "layers", [0, 1, 2, 3], "expected layers of factors from 0 to 2, got 3"),
        ("ValuePatch", "layers", [0], "expected factors/left of layers that do not change from 0 to 0"),
        ("ValuePatch", "positions", [0], "expected as many positions as query"),
        ("ValuePatch", "query", [0], "expected as many positions as query"),
        ("ValuePatch", "prompt", [0], "expected positions from 0 to 0"),
        ("ValuePatch", "prompt", [7] * 500, "expected query as the tokens of prompt at positions"),
        ("ValuePatch", "residual", float("nan"), "expected residual of at least 0, got nan"),
        ("AttentionRun", "layers", [0, 0], "expected layers in ascending order, got (0, 0)"),
        ("AttentionRun", "layers", [0, 3], "expected layers of factors from 0 to 2, got 3"),
        ("AttentionRun", "option", "query", "expected option with relaxed as one of"),
        ("AttentionRun", "change", "inserted", "expected option with inserted as one of"),
        ("AttentionRun", "prompts/labels", [[1], [5000]], "expected prompts/labels from 0 to"),
        ("Generation", "prompted", [1], "expected as many prompted as steps in margins (2), got 1"),
        ("Generation", "generated/beside", [1], "expected as many tokens in generated/beside as prompted (2), got 1"),
        ("Generation", "generated/cached", [1, -1], "expected generated/cached of at least 0, got -1"),
        ("Generation", "generated/naive", [1, 2], "expected errors by"),
    ],
)  # fmt: skip
def test_contradicting_values_are_refused_by_name(
    results: dict[str, Any], name: str, path: str, value: Any, message: str, load: Callable[..., Any]
) -> None:
    result = results[name]
    with pytest.raises(icl.AssetError, match=f"saved {name} in .*{re.escape(message)}"):
        load(result, metadata=nested(result, path, value))


@pytest.mark.parametrize(
    ("name", "field", "change", "message"),
    [
        ("WeightDelta", "W_K", lambda delta: delta.W_K * torch.nan, "expected W_K finite, got nan: compute it again"),
        (
            "WeightDelta",
            "W_V",
            lambda delta: delta.W_V[:1],
            r"expected W_V with as many on its axis layer as W_K \(3\)",
        ),
        (
            "WeightDelta",
            "W_V",
            lambda delta: delta.W_V.sum(1),
            r"expected W_V as Float.*, got float32 of shape \(3, 32\)",
        ),
        ("Decomposition", "mass", lambda it: it.mass / 2, "expected mass that sums to 1 over groups"),
        ("DeltaSummary", "demonstrations_K", lambda it: it.demonstrations_K * 2, "expected demonstrations_K that sums"),
        ("DeltaSummary", "demonstrations_V", lambda it: None, "demonstrations_K and demonstrations_V together"),
        ("Recordings", "segments", lambda it: it.segments + 9, "expected segments of training steps"),
        ("Recordings", "attn_out", lambda it: {"ICL": it.attn_out["ICL"]}, "expected attn_out by .*, got .'ICL',"),
        ("Recordings", "attn_out", lambda it: it.attn_out["ICL"], "expected attn_out"),
        ("Patch", "factors", lambda it: it.factors | {"up": it.factors["in"]}, "expected factors by some of .*'up'"),
        ("Patch", "factors", lambda it: it.factors | {"out": it.factors["in"]}, "expected as many elements of d_model"),
        ("SharedPatch", "ridge", lambda it: None, "expected ridge with the method 'ridge' alone, got none"),
        ("SharedPatch", "ridge", lambda it: -it.ridge, "expected ridge of at least 0, got -"),
        ("SharedStatistics", "lack", lambda it: it.lack.float(), "expected lack in float64, got float32"),
        ("SharedStatistics", "gram", lambda it: -it.gram, "expected the diagonal of gram of at least 0, got -"),
        ("RidgeStatistics", "gram", lambda it: it.gram.float(), "expected gram in float64, got float32"),
        ("RidgeStatistics", "gram", lambda it: -it.gram, "expected the diagonal of gram of at least 0, got -"),
        ("AttentionRun", "factors", lambda it: None, "expected factors with relaxed attention alone, got none"),
        ("Generation", "margins", lambda it: -it.margins - 1, "expected margins of at least 0, got -"),
        (
            "Generation",
            "errors",
            lambda it: it.errors | {"cached": it.errors["cached"] * torch.nan},
            "expected errors/cached and largest/cached with NaN at the same steps",
        ),
        ("Comparison", "predictions", lambda it: it.predictions | {"FT": 1 - it.predictions["FT"]}, "expected rec2ftp"),
    ],
)
def test_contradictions_made_by_hand_are_refused(
    results: dict[str, Any], name: str, field: str, change: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_value(results[name], field, change(results[name])).__post_init__()


@pytest.mark.parametrize("name", NAMES)
def test_results_show_themselves_in_notebooks(results: dict[str, Any], name: str) -> None:
    page = results[name]._repr_html_()
    assert "<table" in page
    without_graphics = re.sub(r"<svg.*?</svg>", "", page)
    assert re.search(r"<t[hd][^>]*>[^<]+</t[hd]>", without_graphics)
    assert page.count("<svg") == page.count("</svg>")
    assert len(page) < 100_000
