"""One experiment is what its steps give, bit for bit; it saves, loads, and says what it lacks."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import hooked
import pytest
import torch
from torch import Tensor

import icl_dual as icl
from icl_dual import experiment as module
from icl_dual.captures.capture import Field
from icl_dual.contexts import matching_training_steps
from icl_dual.finetuning import Finetuned
from icl_dual.finetuning.replicas import finetune_with_replicas
from icl_dual.models import NonFiniteError
from icl_dual.models.mlp import MlpChanges
from icl_dual.storage import load_tensors

ALL = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
LR = 0.05


def assert_same(got: Any, expected: Any, path: str = "") -> None:
    """Check that two results have equal values, and bit-equal tensors, wherever they are nested."""
    assert type(got) is type(expected), path
    if isinstance(got, Tensor):
        assert got.dtype == expected.dtype, path
        assert torch.equal(got.isnan(), expected.isnan()), path
        assert torch.equal(got.nan_to_num(), expected.nan_to_num()), path
    elif dataclasses.is_dataclass(got):
        for field in dataclasses.fields(got):
            if field.metadata.get("saved", True):
                assert_same(getattr(got, field.name), getattr(expected, field.name), f"{path}.{field.name}")
    elif isinstance(got, dict):
        assert got.keys() == expected.keys(), path
        for name in got:
            assert_same(got[name], expected[name], f"{path}[{name!r}]")
    elif isinstance(got, tuple | list):
        assert len(got) == len(expected), path
        for index, (item, expected_item) in enumerate(zip(got, expected, strict=True)):
            assert_same(item, expected_item, f"{path}[{index}]")
    else:
        assert got == expected or got != got != expected != expected, path


@pytest.fixture(scope="module")
def experiment(llama: icl.Model, prompts: icl.Prompts) -> icl.Experiment:
    return icl.run_experiment(llama, prompts, lr=LR, replicas=2, fields=ALL, factors=True, progress=False)


def test_an_experiment_is_what_its_steps_give_bit_for_bit(
    llama: icl.Model, prompts: icl.Prompts, experiment: icl.Experiment
) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, factors=True, progress=False)
    zero_shot = icl.capture(llama, prompts.zero_shot(), fields=ALL, progress=False)
    in_context = icl.capture(llama, prompts, fields=ALL, progress=False)
    with delta.applied(llama):
        finetuned = icl.capture(llama, prompts.zero_shot(), fields=ALL, progress=False)
    pair: dict[str, Any] = {"zero_shot": zero_shot, "in_context": in_context}
    expected = icl.Experiment(**pair, finetuned=finetuned, delta=delta)
    expected = dataclasses.replace(
        expected, replicas=experiment.replicas, replica_names=("lr × 0.999", "lr × 1.001, noise +1")
    )
    assert_same(experiment, expected)
    assert experiment.delta.factors is not None
    comparison = experiment.compare(seed=3)
    expected_comparison = icl.compare(**pair, finetuned=finetuned, delta=delta, seed=3)
    assert_same(dataclasses.replace(comparison, stability=None), expected_comparison)
    assert_same(experiment.decompose(), icl.decompose(llama, **pair))
    updates = icl.compare_updates(llama, **pair, delta=delta, rank=2, seed=4, progress=False)
    assert_same(experiment.updates(rank=2, seed=4, progress=False), updates)
    recordings = experiment.recordings()
    for setting, captured in {"FT": finetuned, "ICL": in_context}.items():
        assert_same(recordings.attn_out[setting], captured.attn_out)


def test_finetuning_comes_first_and_the_model_comes_back(
    llama: icl.Model, prompts: icl.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = llama.fingerprint()
    stages: list[str] = []
    capture, capture_changed, finetune = module.capture, module.capture_changed, module.finetune_with_replicas

    def counted_capture(model: icl.Model, prompts: icl.Prompts, **options: Any) -> icl.Capture:
        stages.append(f"{len(prompts.demonstrations)} demonstrations {model.fingerprint() == before}")
        return capture(model, prompts, **options)

    def counted_replicas(model: icl.Model, prompts: icl.Prompts, changes: Any, **options: Any) -> list[icl.Capture]:
        stages.append(f"{len(changes)} replicas {model.fingerprint() == before}")
        return capture_changed(model, prompts, changes, **options)

    def counted_finetune(*args: Any, **options: Any) -> Finetuned:
        stages.append("finetuning")
        return finetune(*args, **options)

    monkeypatch.setattr(module, "capture", counted_capture)
    monkeypatch.setattr(module, "capture_changed", counted_replicas)
    monkeypatch.setattr(module, "finetune_with_replicas", counted_finetune)
    icl.run_experiment(llama, prompts, lr=LR, replicas=2, progress=False)
    captures = ["4 demonstrations True", "0 demonstrations True", "0 demonstrations False"]
    assert stages == ["finetuning", *captures, "2 replicas True"]
    assert llama.fingerprint() == before
    stages.clear()
    with pytest.raises(icl.DivergedError):
        icl.run_experiment(llama, prompts, lr=1e6, progress=False)
    assert stages == ["finetuning"], "nothing is captured"
    assert llama.fingerprint() == before


@pytest.mark.parametrize(
    "why",
    [
        "a hook of others",
        "a check of runs",
        "a change of MLPs",
        "a rounded delta",
        "no projections of its own",
        "HookedTransformer",
    ],
)
def test_replicas_are_captured_one_by_one_where_rows_cannot_have_deltas_of_their_own(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "HookedTransformer" and not hooked.HookedTransformer:
        pytest.skip("this TransformerLens has none")
    model = make_model("hooked-gpt2" if why == "HookedTransformer" else "llama")
    if why == "a change of MLPs":
        bias = torch.full((model.n_layers, model.d_model), 0.01)
        monkeypatch.setattr(model, "mlp_changes", (MlpChanges({}, bias=bias),))
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(5))
    deltas = dict(finetune_with_replicas(model, prompts, lr=LR, replicas=2, progress=False).replicas)
    if why == "a rounded delta":
        deltas |= {name: dataclasses.replace(delta, rounded=True) for name, delta in list(deltas.items())[:1]}
    monkeypatch.setattr(module, "capture_changed", lambda *args, **options: pytest.fail("rows shared a batch"))
    if why == "a check of runs":  # as exact patches for one query have
        monkeypatch.setattr(model, "run_checks", (lambda tokens, positions: None,))
    if why == "no projections of its own":
        monkeypatch.setattr(model, "supports_projection_deltas", False)
    handles: list[Any] = []
    if why == "a hook of others":
        (name, layer) = next((n, m) for n, m in model.wrapped.named_modules() if n.endswith("mlp"))
        handles.append(layer.register_forward_hook(lambda *args: args[-1] * 1.0))
        assert model.foreign_hooks(), name
    captures = module.capture_replicas(model, prompts.zero_shot(), deltas, progress=False)
    for name, delta in deltas.items():
        with delta.applied(model):
            assert_same(captures[name], icl.capture(model, prompts.zero_shot(), progress=False), name)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("n_fit", [2, 4])
def test_replicas_that_do_not_fit_side_by_side_are_captured_one_by_one(
    make_model: Callable[..., icl.Model],
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    n_fit: int,
) -> None:
    model = make_model("llama")
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(5))
    deltas = finetune_with_replicas(model, prompts, lr=LR, replicas=3, progress=False).replicas
    expected = module.capture_replicas(model, prompts.zero_shot(), deltas, progress=False)
    run = model.run

    def fits(tokens: Tensor, **options: Any) -> Tensor:
        if len(tokens) > n_fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tokens, **options)

    monkeypatch.setattr(model, "run", fits)
    got = module.capture_replicas(model, prompts.zero_shot(), deltas, progress=False)
    assert list(got) == list(expected) == list(deltas)
    for name in deltas:
        one, other = got[name], expected[name]
        assert isinstance(one, icl.Capture)
        assert isinstance(other, icl.Capture)
        torch.testing.assert_close(one.attn_out, other.attn_out, rtol=1e-4, atol=1e-5)
    assert ("3 replicas do not fit in memory side by side" in caplog.text) == (n_fit == 2)


def test_replicas_whose_deltas_do_not_fit_side_by_side_are_captured_one_by_one(
    llama: icl.Model, prompts: icl.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stacked(*args: Any) -> list[dict[str, Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    deltas = finetune_with_replicas(llama, prompts, lr=LR, replicas=2, progress=False).replicas
    monkeypatch.setattr(module, "changes_of", stacked)
    captures = module.capture_replicas(llama, prompts.zero_shot(), deltas, progress=False)
    assert all(isinstance(captures[name], icl.Capture) for name in deltas)


@pytest.mark.parametrize(("batch_size", "expected"), [(64, [8, 2]), (3, [3, 3, 3]), (1, [])])
def test_replicas_run_in_groups(
    llama: icl.Model, prompts: icl.Prompts, monkeypatch: pytest.MonkeyPatch, batch_size: int, expected: list[int]
) -> None:
    """Of 8, and of as many as there are rows in a batch; a group of one runs by itself."""
    delta = finetune_with_replicas(llama, prompts, lr=LR, replicas=0, progress=False).delta
    groups, alone = list[int](), list[int]()
    capture, capture_changed = module.capture, module.capture_changed

    def counted(model: icl.Model, prompts: icl.Prompts, changes: Any, **options: Any) -> list[icl.Capture]:
        groups.append(len(changes))
        assert options["batch_size"] == batch_size
        return capture_changed(model, prompts, changes, **options)

    def counted_alone(model: icl.Model, prompts: icl.Prompts, **options: Any) -> icl.Capture:
        alone.append(options["batch_size"])
        return capture(model, prompts, **options)

    monkeypatch.setattr(module, "capture_changed", counted)
    monkeypatch.setattr(module, "capture", counted_alone)
    deltas = {str(index): delta for index in range(10)}
    captures = module.capture_replicas(llama, prompts.zero_shot(), deltas, batch_size=batch_size, progress=False)
    assert groups == expected
    assert alone == [batch_size] * (10 - sum(expected))
    assert list(captures) == list(deltas)


def test_a_replica_that_overflows_leaves_other_groups_side_by_side(
    llama: icl.Model, prompts: icl.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = dict(finetune_with_replicas(llama, prompts, lr=LR, replicas=4, progress=False).replicas)
    first, *others = deltas
    deltas[first] = dataclasses.replace(deltas[first], W_V=deltas[first].W_V * 1e38)
    alone, capture = list[icl.Prompts](), module.capture

    def counted(model: icl.Model, prompts: icl.Prompts, **options: Any) -> icl.Capture:
        alone.append(prompts)
        return capture(model, prompts, **options)

    monkeypatch.setattr(module, "capture", counted)
    monkeypatch.setattr(module, "REPLICAS_AT_ONCE", 2)
    captures = module.capture_replicas(llama, prompts.zero_shot(), deltas, progress=False)
    assert len(alone) == 2, "those of its own group"
    assert list(captures) == [first, *others]
    assert isinstance(captures[first], NonFiniteError)
    assert all(isinstance(captures[name], icl.Capture) for name in others)


def test_other_errors_of_replicas_side_by_side_are_passed_on(
    llama: icl.Model, prompts: icl.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> list[icl.Capture]:
        raise RuntimeError("broken")

    deltas = finetune_with_replicas(llama, prompts, lr=LR, replicas=2, progress=False).replicas
    monkeypatch.setattr(module, "capture_changed", broken)
    with pytest.raises(RuntimeError, match="broken"):
        module.capture_replicas(llama, prompts.zero_shot(), deltas, progress=False)


def test_replicas_of_other_weights_are_refused(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(5))
    deltas = finetune_with_replicas(model, prompts, lr=LR, replicas=2, progress=False).replicas
    monkeypatch.setattr(module, "capture", lambda *args, **options: pytest.fail("one of them ran by itself"))
    captures = module.capture_replicas(model, prompts.zero_shot(), deltas, progress=False)
    assert list(captures) == list(deltas)
    *_, last = deltas
    mixed = {**deltas, last: dataclasses.replace(deltas[last], fingerprint="another")}
    with pytest.raises(ValueError, match=r"expected a delta finetuned from these weights .* got one from another"):
        module.capture_replicas(model, prompts.zero_shot(), mixed, progress=False)
    model.projections("V")[0].W.parameter.data.mul_(1.5)
    with pytest.raises(ValueError, match="expected a delta finetuned from these weights"):
        module.capture_replicas(model, prompts.zero_shot(), deltas, progress=False)


def test_an_experiment_saves_and_loads_without_its_model(
    llama: icl.Model, prompts: icl.Prompts, experiment: icl.Experiment, tmp_path: Path
) -> None:
    with_steps = dataclasses.replace(experiment, steps=(0, 1, -1, 3))
    for name, saved in {"plain": experiment, "steps": with_steps}.items():
        saved.save(tmp_path / name, {"note": "mine"})
        loaded = icl.Experiment.load(tmp_path / name)
        assert_same(loaded, saved)
        assert loaded.model is None
        assert loaded.steps == saved.steps
        assert repr(loaded) == repr(saved)
        assert load_tensors(tmp_path / name)[1]["note"] == "mine"
        assert "model" not in load_tensors(tmp_path / name)[1]
    loaded = icl.Experiment.load(tmp_path / "plain")
    assert loaded.in_context.prompts == prompts, "tuples of tuples again"
    assert loaded.in_context.prompts.zero_shot() == loaded.zero_shot.prompts
    assert loaded.in_context.full_prompt is not None
    assert_same(loaded.compare(seed=1), experiment.compare(seed=1))
    assert_same(loaded.decompose(llama), experiment.decompose())
    assert_same(loaded.updates(llama, progress=False), experiment.updates(progress=False))
    for method in ("decompose", "updates"):
        message = rf"expected a model, got none: .* pass the model that was captured, experiment\.{method}\(model\)"
        with pytest.raises(ValueError, match=message):
            getattr(loaded, method)()
    with pytest.raises(icl.AssetError, match=r"expected a saved Capture in .*, got a saved Experiment: use"):
        icl.Capture.load(tmp_path / "plain")


@pytest.mark.parametrize("protocol", ["answer", "reference"])
def test_a_capture_of_every_field_saves_and_loads(
    llama: icl.Model, task: icl.Task, reference_task: icl.Task, tmp_path: Path, protocol: str
) -> None:
    chosen = task if protocol == "answer" else reference_task
    prompts = icl.build_prompts(llama, chosen, chosen.demonstrations(2, 1), chosen.queries(3))
    for fields in (get_args(Field), ()):
        captured = icl.capture(llama, prompts, fields=fields, progress=False)
        captured.save(tmp_path / str(len(fields)))
        loaded = icl.Capture.load(tmp_path / str(len(fields)))
        assert_same(loaded, captured)
        assert loaded.prompts == prompts
        assert loaded.prompts.protocol == protocol


def test_another_model_or_other_weights_are_refused(
    experiment: icl.Experiment, make_model: Callable[..., icl.Model], llama: icl.Model
) -> None:
    with pytest.raises(ValueError, match="pass the model that was captured"):
        experiment.decompose(make_model("llama", name="another"))
    with experiment.delta.applied(llama), pytest.raises(ValueError, match="got other weights"):
        experiment.decompose()


def test_missing_fields_are_named_with_those_to_request(llama: icl.Model, prompts: icl.Prompts) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, progress=False)

    def run(fields: Any) -> icl.Experiment:
        return icl.run_experiment(llama, prompts, delta=delta, fields=fields, progress=False)

    for_metrics, for_terms = run({*icl.METRIC_FIELDS}), run([*icl.DECOMPOSE_FIELDS])
    for_metrics.compare()
    for_terms.decompose()
    for_terms.updates(progress=False)
    for method in (for_metrics.decompose, for_metrics.updates):
        with pytest.raises(ValueError, match=r"got .* without \[.*\]: run the experiment with fields=icl_dual.DECOMP"):
            method()
    for method in (for_terms.compare, for_terms.recordings):
        message = (
            r"for \w+\(\), got zero_shot without \['q', 'context_scores', 'query_scores'\]: run the .*METRIC_FIELDS,"
        )
        with pytest.raises(ValueError, match=message):
            method()
    with pytest.raises(
        ValueError, match=r"expected captures with .* without \['attn_out', 'z'\]: .*DECOMPOSE_FIELDS, or"
    ):
        run(("q",)).decompose()


def test_arguments_are_checked_before_anything_runs(
    llama: icl.Model, prompts: icl.Prompts, experiment: icl.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing should run")

    monkeypatch.setattr(module, "finetune_with_replicas", run)
    monkeypatch.setattr(module, "capture", run)
    invalid: list[tuple[dict[str, Any], str]] = [
        ({}, "expected lr or delta, got neither: pass"),
        ({"delta": experiment.delta, "lr": 0.1}, "got delta and lr: leave out"),
        (
            {
                "delta": experiment.delta,
                "factors": True,
                "config": icl.FinetuneConfig(loss="label"),
                "finetune_prompts": prompts,
            },
            "got delta and config, factors, finetune_prompts: leave out delta, or these",
        ),
        ({"lr": 0.1, "batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"lr": 0.1, "replicas": 1}, "expected replicas as 0 for none, or at least 2, got 1: one replica shows no"),
        ({"lr": 0.1, "replicas": -1}, "expected replicas as 0 for none, or at least 2, got -1"),
    ]
    for options, message in invalid:
        with pytest.raises(ValueError, match=message):
            icl.run_experiment(llama, prompts, **options, progress=False)
    with pytest.raises(icl.PromptError):
        icl.run_experiment(llama, dataclasses.replace(prompts, queries=(*prompts.queries[:6], ())), lr=0.1)


def test_positional_settings_are_pythons_own_type_error(llama: icl.Model, prompts: icl.Prompts) -> None:
    run: Any = icl.run_experiment
    with pytest.raises(TypeError):
        run(llama, prompts, 0.1)


def test_controls_finetune_on_other_demonstrations_or_apply_another_delta(
    llama: icl.Model, task: icl.Task, prompts: icl.Prompts
) -> None:
    demonstrations, queries = task.demonstrations(4, seed=1), task.queries(7)
    changed = icl.build_prompts(llama, task, icl.relabel(demonstrations, "reordered", 2, seed=1), queries)
    steps = matching_training_steps(changed, prompts, 4, "reordered", seed=1)
    options: dict[str, Any] = {"steps": steps, "replicas": 0, "progress": False}
    control = icl.run_experiment(llama, changed, lr=LR, finetune_prompts=prompts, **options)
    delta = icl.finetune(llama, prompts, lr=LR, progress=False)
    assert_same(control.delta, delta)
    assert control.steps == tuple(steps)
    assert sorted(steps) == [0, 1, 2, 3] != steps
    assert control.in_context.prompts == changed
    same = icl.run_experiment(llama, changed, delta=delta, **options)
    assert_same(same, control)
    captures = {name: getattr(control, name) for name in ("zero_shot", "in_context", "finetuned")}
    assert_same(control.compare(seed=2), icl.compare(**captures, delta=delta, steps=steps, seed=2))
    assert control.recordings().segments.unique_consecutive().tolist()[1::2] == steps
    random = icl.run_experiment(llama, prompts, delta=delta.randomised(1), progress=False)
    assert not torch.equal(random.finetuned.label_log_probs, control.finetuned.label_log_probs)


def test_a_pickle_of_an_experiment_has_no_model(experiment: icl.Experiment) -> None:
    assert experiment.model is not None
    for twin in (pickle.loads(pickle.dumps(experiment)), copy.deepcopy(experiment)):
        assert twin == experiment
        assert twin.model is None
