"""Plans of cells: FLOPs against those that torch counts while a cell runs, memory against what captures hold."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import icl_dual as icl
from icl_dual import planning
from icl_dual.captures import shared_prefix
from icl_dual.captures.shared_prefix import split_into_batches
from icl_dual.experiment import capture_replicas
from icl_dual.finetuning.replicas import finetune_with_replicas
from icl_dual.models import tiny_model
from icl_dual.planning import CellPlan, PromptLengths, plan

ALL = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS


def attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The FLOPs of attention, which torch counts on GPUs only; query heads that share keys each count."""
    return sdpa_flop_count(q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], float]:
    # Of several threads, torch counts its own only.
    monkeypatch.setattr(ThreadPoolExecutor, "map", lambda pool, function, *inputs: map(function, *inputs))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def counted(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
            run()
        return counter.get_total_flops()

    return counted


def flops(planned: CellPlan) -> dict[str, float]:
    return {stage.stage: stage.flops for stage in planned.stages}


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama", "gemma3-window"])
def test_flops_are_those_that_torch_counts(
    models_by_architecture: Callable[[str], icl.Model], prompts: icl.Prompts, count: Any, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    planned = flops(plan(model, prompts, replicas=2))
    in_context = icl.capture(model, prompts, fields=ALL, progress=False)  # a model's first capture checks it, too
    zero_shot = icl.capture(model, prompts.zero_shot(), fields=ALL, progress=False)
    replicas = finetune_with_replicas(model, prompts, lr=0.01, replicas=2, progress=False).replicas
    counted = {
        "in context": count(lambda: icl.capture(model, prompts, fields=ALL, progress=False)),
        "zero-shot": count(lambda: icl.capture(model, prompts.zero_shot(), fields=ALL, progress=False)),
        "finetuning": count(
            lambda: list(icl.finetune_many(model, [prompts] * 3, [0.01] * 3, progress=False)),
        ),
        "replicas": count(lambda: capture_replicas(model, prompts.zero_shot(), replicas, progress=False)),
        "decomposition": count(lambda: icl.decompose(model, zero_shot=zero_shot, in_context=in_context)),
    }
    planned["in context"] = planned["prefix"] + planned["in-context"]
    for stage, n in counted.items():
        assert planned[stage] == pytest.approx(n, rel=0.05), stage


def test_replicas_take_their_number_times_the_memory(llama: icl.Model, prompts: icl.Prompts) -> None:
    options: dict[str, Any] = {"fields": icl.METRIC_FIELDS, "batch_size": 256}
    by_number = {
        n: {stage.stage: stage for stage in plan(llama, prompts, replicas=n, **options).stages} for n in (2, 4)
    }
    two, four = (stages["replicas"] for stages in by_number.values())
    finetuned = by_number[2]["finetuned"]
    assert four.kept == 2 * two.kept == 4 * finetuned.kept, "all queries are among the first 25"
    assert two.working < four.working <= 2 * two.working, "rows of all in one batch, cut into as many or more batches"


def replica_stage(model: icl.Model, prompts: icl.Prompts, replicas: int, **options: Any) -> Any:
    (stage,) = (
        stage for stage in plan(model, prompts, replicas=replicas, **options).stages if stage.stage == "replicas"
    )
    return stage


def test_no_more_replicas_run_side_by_side_than_fit_in_a_batch(llama: icl.Model, prompts: icl.Prompts) -> None:
    at_once = {n: replica_stage(llama, prompts, n, batch_size=256).working for n in (4, 8, 16)}
    assert at_once[4] < at_once[8] == at_once[16]
    few = [replica_stage(llama, prompts, n, batch_size=2).working for n in (2, 16)]
    assert few[0] == few[1]


def test_replicas_take_the_memory_and_the_products_of_their_deltas(
    llama: icl.Model, prompts: icl.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, attention = (
        replica_stage(llama, prompts, 3, config=icl.FinetuneConfig(trained=trained))
        for trained in ("value", "attention")
    )
    weights = sum(layer.W.parameter.numel() for kind in ("Q", "K", "O") for layer in llama.projections(kind))
    assert attention.working - values.working == pytest.approx(3 * 4 * weights)
    replicas = finetune_with_replicas(llama, prompts, lr=0.01, replicas=3, progress=False).replicas
    icl.capture(llama, prompts, progress=False)  # a model's first capture checks it, too
    run, n_tokens = llama.run, list[int]()

    def counted(tokens: Tensor, **options: Any) -> Tensor:
        n_tokens.append(tokens.numel())
        return run(tokens, **options)

    monkeypatch.setattr(llama, "run", counted)
    capture_replicas(llama, prompts.zero_shot(), replicas, progress=False)
    assert attention.flops - values.flops == pytest.approx(2 * weights * sum(n_tokens))


@pytest.mark.parametrize("batch_size", [4, 64])
def test_replicas_are_planned_in_the_batches_in_which_they_run(
    llama: icl.Model, prompts: icl.Prompts, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    planned, run = list[Any](), list[Any]()
    for module, batches in ((planning, planned), (shared_prefix, run)):

        def recorded(lengths: Sequence[int], *options: int, batches: list[Any] = batches) -> list[list[int]]:
            batches.append((sorted(lengths), *options))
            return split_into_batches(lengths, *options)

        monkeypatch.setattr(module, "split_into_batches", recorded)
    replicas = finetune_with_replicas(llama, prompts, lr=0.01, replicas=3, progress=False).replicas
    capture_replicas(llama, prompts.zero_shot(), replicas, batch_size=batch_size, progress=False)
    replica_stage(llama, prompts, 3, batch_size=batch_size)
    assert run
    assert all(batches in planned for batches in run)


def test_queries_without_content_take_their_own_passes(llama: icl.Model, task: icl.Task) -> None:
    demonstrations, queries = task.demonstrations(4, seed=1), task.queries(7)
    plain, calibrated = (
        flops(plan(llama, icl.build_prompts(llama, task, demonstrations, queries, scoring=scoring)))
        for scoring in ("mean", "calibrated")
    )
    for stage in ("in-context", "zero-shot", "finetuned", "replicas"):
        assert calibrated[stage] > plain[stage], stage


@pytest.mark.parametrize(
    "config",
    [
        icl.FinetuneConfig(),
        icl.FinetuneConfig(method="layer-causal"),
        icl.FinetuneConfig(trained="attention", epochs=2),
        icl.FinetuneConfig(trained="value"),
    ],
)
def test_finetuning_one_by_one_is_counted_by_its_settings(
    llama: icl.Model, prompts: icl.Prompts, count: Any, config: icl.FinetuneConfig
) -> None:
    counted = count(lambda: icl.finetune(llama, prompts, lr=0.001, config=config, progress=False))
    planned = flops(plan(llama, prompts, config=config, replicas=0))["finetuning"]
    assert planned == pytest.approx(counted, rel=0.05)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    members = value._asdict() if hasattr(value, "_asdict") else vars(value) if dataclasses.is_dataclass(value) else {}
    for member in members.values():
        yield from tensors(member)


def test_what_stages_keep_is_the_size_of_their_results(llama: icl.Model, prompts: icl.Prompts) -> None:
    kept = {stage.stage: stage.kept for stage in plan(llama, prompts, replicas=0).stages}
    in_context = icl.capture(llama, prompts, fields=ALL, progress=False)
    delta = icl.finetune(llama, prompts, lr=0.001, progress=False)
    for stage, result in (("in-context", in_context), ("finetuning", delta)):
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(result))
        assert kept[stage] == pytest.approx(size, rel=0.05), stage


def test_a_gpu_holds_the_results_of_all_stages_and_what_each_needs_beside_those_before_it(
    llama: icl.Model, prompts: icl.Prompts
) -> None:
    planned = plan(llama, prompts, replicas=0)
    on_device, last = planned.device_memory - planned.weight_memory, planned.stages[-1]
    assert on_device >= sum(stage.kept for stage in planned.stages) + last.working
    assert all(on_device >= stage.working + stage.kept for stage in planned.stages)
    assert on_device <= planned.peak_memory - planned.process_memory - planned.weight_memory


def test_lengths_of_prompts_give_the_plan_of_the_prompts() -> None:
    model = tiny_model()
    prompts = icl.Prompts(
        start=(0,),
        demonstrations=((1, 2, 3),) * 2,
        demonstration_label_lengths=(1, 1),
        separator=(7,),
        queries=((5, 6), (5, 6, 8)),
        labels=((8,), (9,)),
        gold=(0, 1),
    )
    lengths = PromptLengths(queries=(2, 3), demonstrations=(3, 3), shared=1, labels=(1, 1))
    from_lengths, from_prompts = plan(model, lengths), plan(model, prompts)
    assert lengths.prefix == len(prompts.prefix)
    assert from_lengths.stages == from_prompts.stages
    assert from_lengths.peak_memory == from_prompts.peak_memory


def test_a_plan_grows_with_queries_and_shrinks_with_precision() -> None:
    model = tiny_model()
    few, many = (plan(model, PromptLengths(queries=(9,) * n, demonstrations=(8, 8))) for n in (10, 100))
    assert flops(many)["zero-shot"] > 5 * flops(few)["zero-shot"]
    assert flops(many)["finetuning"] == flops(few)["finetuning"]
    assert many.peak_memory > few.peak_memory
    half = plan(model.wrapped.original_model.config, few.lengths, dtype=torch.bfloat16)
    assert half.weight_memory == few.weight_memory / 2


def test_a_plan_says_what_it_costs_in_text_table_and_notebook() -> None:
    planned = plan(tiny_model(), PromptLengths(queries=(9, 8), demonstrations=(8, 8)))
    stages = ["finetuning", "prefix", "in-context", "zero-shot", "finetuned", "replicas", "metrics", "decomposition"]
    assert planned.to_frame()["stage"].tolist() == stages
    assert math.isclose(sum(planned.to_frame()["flops"].tolist()), planned.flops)
    n_weights = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert repr(planned).startswith(f"CellPlan('tiny', {n_weights / 1e6:.3g} M weights in float32, 2 queries after 2 ")
    assert all(stage in str(planned) and stage in planned._repr_html_() for stage in stages)
    alone = plan(tiny_model(), PromptLengths(queries=(9,)), fields=icl.METRIC_FIELDS)
    assert [stage.stage for stage in alone.stages] == ["prefix", "in-context", "zero-shot", "finetuned"]


def test_wrong_lengths_and_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected queries with at least one length"):
        PromptLengths(queries=())
    with pytest.raises(ValueError, match="expected queries longer than the 5 tokens that all share"):
        PromptLengths(queries=(5, 9), shared=5)
    lengths = PromptLengths(queries=(9,))
    with pytest.raises(ValueError, match="expected replicas as 0 for none"):
        plan(tiny_model(), lengths, replicas=1)
    with pytest.raises(ValueError, match=r"expected arithmetic=torch\.float32"):
        plan("smollm2-135m", lengths, arithmetic=torch.bfloat16)
