"""Where tensors are: a whole cell on a device other than the CPU, which a machine without a GPU pretends to have."""

from collections import Counter
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import matplotlib.pyplot as plt
import pretend_device
import pytest
import torch
from pretend_device import DeviceTensor, pretended_device
from torch import Tensor
from transformers import LlamaForCausalLM

import icl_dual as icl
from icl_dual import attention_split
from icl_dual.captures import shared_prefix
from icl_dual.models import tiny_model
from icl_dual.models.bridge import boot
from icl_dual.statistics import ranks
from icl_dual.views.terms import decomposition_terms

FIELDS = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
ROWS = [{"text": f"film {i}" + " very long" * (i % 3), "label": i % 2} for i in range(40)]
TASK = icl.Task("films", "Text: {text} Label:", ("bad", "good"), ROWS)


def prompts_of(model: icl.Model, n_queries: int = 4, k: int = 3) -> icl.Prompts:
    return icl.build_prompts(model, TASK, TASK.demonstrations(k, seed=1), TASK.queries(n_queries))


def model_of(n_layers: int = 2, dtype: torch.dtype = torch.float32, *, there: bool) -> icl.Model:
    """A tiny model with some number of layers, on the pretended device or on the CPU."""
    model = tiny_model(dtype=dtype)
    if n_layers != model.n_layers:
        config = model.wrapped.original_model.config.__class__.from_dict(
            {**model.wrapped.original_model.config.to_dict(), "num_hidden_layers": n_layers}
        )
        config._attn_implementation = "eager"
        hf_model: Any = LlamaForCausalLM(config)
        model = icl.Model(boot("tiny", hf_model.to(dtype).eval(), model.tokenizer, "cpu", dtype), name="tiny")
    if there:
        pretend_device.move(model.wrapped)
        pretend_device.move(model.wrapped.original_model)
    return model


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors in a result, wherever they are nested, on the CPU."""
    if isinstance(value, Tensor):
        return {path: value.held if isinstance(value, DeviceTensor) else value}
    if isinstance(value, dict):
        members = value
    elif is_dataclass(value):
        members = vars(value)
    elif hasattr(value, "_asdict"):
        members = value._asdict()
    elif isinstance(value, list | tuple):
        members = dict(enumerate(value))
    else:
        return {}
    return {at: t for name, member in members.items() for at, t in tensors_of(member, f"{path}/{name}").items()}


def cell(model: icl.Model) -> dict[str, Any]:
    """Every result of a cell."""
    prompts = prompts_of(model)
    zero_shot, in_context = (
        icl.capture(model, each, fields=FIELDS, progress=False) for each in (prompts.zero_shot(), prompts)
    )
    delta = icl.finetune(model, prompts, lr=0.01, factors=True, progress=False)
    with delta.applied(model):
        finetuned = icl.capture(model, prompts.zero_shot(), fields=FIELDS, progress=False)
    captures: dict[str, Any] = {"zero_shot": zero_shot, "in_context": in_context}
    decomposition = icl.decompose(model, **captures)
    shown = repr(decomposition), decomposition._repr_html_(), decomposition.to_frame(), decomposition.masses()
    icl.plots.by_layer({"direct": decomposition.direct_share})
    plt.close("all")
    assert len(decomposition_terms(decomposition, 0, zero_shot, model.tokenizer).quantities) == 2
    assert all(len(each) for each in shown)
    return {
        **captures,
        "decomposition": decomposition,
        "tokens": torch.tensor(decomposition.by_token(1, 1, 2).icl_share.to_numpy()),
        "summary": icl.decompose_prompts(model, prompts, keep=("delta_icl",), progress=False),
        "delta": delta,
        "deltas": list(icl.finetune_many(model, [prompts] * 2, [0.01, 0.02], progress=False)),
        "comparison": icl.compare(**captures, finetuned=finetuned, delta=delta),
        "massive": icl.find_massive_activations(**captures, finetuned=finetuned),
        "updates": icl.compare_updates(model, **captures, delta=delta, progress=False),
        "experiment": icl.run_experiment(model, prompts, lr=0.01, fields=FIELDS, progress=False).compare(),
    }


def test_a_cell_on_another_device_is_that_of_a_cpu() -> None:
    """No operator meets a tensor of the CPU, and every number is the same, in float64."""
    expected = tensors_of(cell(model_of(dtype=torch.float64, there=False)))
    with pretended_device():
        got = cell(model_of(dtype=torch.float64, there=True))
        captured = got["in_context"]
        assert captured.attn_out.device == captured.keys_values.query_keys.device == pretend_device.DEVICE
        assert got["decomposition"].delta_icl.device == got["delta"].W_K.device == pretend_device.DEVICE
        assert got["comparison"].gold.device.type == "cpu"
        moved = captured.to("cpu")
        assert not any(isinstance(tensor, DeviceTensor) for tensor in tensors_of(moved).values())
    actual = tensors_of(got)
    assert actual.keys() == expected.keys()
    assert len(actual) > 150
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


def test_results_of_two_devices_are_computed_where_the_in_context_capture_is() -> None:
    """As where one of them was loaded."""
    with pretended_device():
        model = model_of(there=True)
        prompts = prompts_of(model)
        zero_shot, in_context = (
            icl.capture(model, each, fields=FIELDS, progress=False) for each in (prompts.zero_shot(), prompts)
        )
        delta = icl.finetune(model, prompts, lr=0.01, progress=False).to("cpu")
        expected = icl.decompose(model, zero_shot=zero_shot, in_context=in_context).to("cpu")
        got = icl.decompose(model, zero_shot=zero_shot.to("cpu"), in_context=in_context)
        torch.testing.assert_close(got.to("cpu").inherited, expected.inherited)
        with delta.applied(model):
            finetuned = icl.capture(model, prompts.zero_shot(), fields=FIELDS, progress=False)
        comparison = icl.compare(
            zero_shot=zero_shot.to("cpu"), in_context=in_context, finetuned=finetuned.to("cpu"), delta=delta
        )
        assert comparison.per_layer["Kendall"].isfinite().any()


def capture_counts(n_layers: int) -> Counter[str]:
    model = model_of(n_layers, there=True)
    with pretended_device() as counts:
        prompts = prompts_of(model, n_queries=6)
        icl.capture(model, prompts, fields=FIELDS, progress=False)  # which also checks the model
        counts.clear()
        icl.capture(model, prompts, fields=FIELDS, progress=False)
        return counts.copy()


def finetune_counts(n_layers: int) -> Counter[str]:
    model = model_of(n_layers, there=True)
    with pretended_device() as counts:
        icl.finetune(model, prompts_of(model), lr=0.01, progress=False)
        return counts.copy()


def decompose_counts(n_layers: int) -> Counter[str]:
    model = model_of(n_layers, there=True)
    with pretended_device() as counts:
        prompts = prompts_of(model)
        zero_shot, in_context = (
            icl.capture(model, each, fields=FIELDS, progress=False) for each in (prompts.zero_shot(), prompts)
        )
        counts.clear()
        icl.decompose(model, zero_shot=zero_shot, in_context=in_context)
        return counts.copy()


@pytest.mark.parametrize("count", [capture_counts, finetune_counts])
def test_nothing_waits_for_the_device_inside_a_layer(count: Callable[[int], Counter[str]]) -> None:
    """Twice as many layers: as many copies, and as many numbers that the host waits for."""
    few, many = count(2), count(4)
    assert many["operators"] > 1.3 * few["operators"]
    for what in ("waits", "to host", "to device"):
        assert many[what] == few[what], what


def test_a_decomposition_waits_for_the_device_once() -> None:
    """Its layers take their masks' positions from the host, a copy each, and give nothing back."""
    few, many = decompose_counts(2), decompose_counts(4)
    assert many["waits"] == few["waits"]
    assert many["to host"] == few["to host"]


def test_copies_of_a_capture() -> None:
    """What is captured stays where it is: the host reads the checks of fields and passes, and the fingerprint."""
    counts = capture_counts(2)
    n_passes, n_label_batches = 2, 2
    assert counts["to host"] <= 2 * len(FIELDS) + n_passes + n_label_batches + 1
    assert counts["waits"] <= 3 * (n_passes + n_label_batches)


def bare_launches(n_layers: int, *, backward: bool) -> int:
    """The operators by which transformers alone computes the logits of tokens, and the gradients of keys' and values'
    weights."""
    hf_model: Any = LlamaForCausalLM(model_of(n_layers, there=False).wrapped.original_model.config).eval()
    pretend_device.move(hf_model)
    with pretended_device() as counts, torch.set_grad_enabled(backward):
        tokens = torch.arange(20, device=pretend_device.DEVICE)[None]
        for name, parameter in hf_model.named_parameters():
            parameter.requires_grad_(backward and ("k_proj" in name or "v_proj" in name))
        counts.clear()
        logits = hf_model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        if backward:
            logits.sum().backward()
        return counts["launches"]


def by_layer_and_one_more(count: Callable[[int, int], int], few: int, many: int) -> float:
    """The part of a count that a layer adds for each batch or step, of which there are few or many."""
    added = count(4, many) - count(2, many) - count(4, few) + count(2, few)
    return added / 2 / (many - few)


@pytest.fixture
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended device has the fused attention that GPUs have."""
    monkeypatch.setattr(icl.dual, "FUSED", icl.dual.FUSED | {pretend_device.DEVICE.type})


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize(("fields", "ceiling"), [(icl.METRIC_FIELDS, 1.45), (FIELDS, 1.5)])
def test_the_operators_of_a_capture(fields: Any, ceiling: float) -> None:
    """By layer and batch, of those of the bare model; those that compute something: views are not launched."""

    def launches(n_layers: int, n_batches: int) -> int:
        model = model_of(n_layers, there=True)
        with pretended_device() as counts:
            prompts = prompts_of(model, n_queries=6)
            icl.capture(model, prompts, fields=fields, progress=False, batch_size=6 // n_batches)
            counts.clear()
            icl.capture(model, prompts, fields=fields, progress=False, batch_size=6 // n_batches)
            return counts["launches"]

    n_forward = 3  # a batch of queries, and one with each of two label words
    bare = (bare_launches(4, backward=False) - bare_launches(2, backward=False)) / 2
    assert by_layer_and_one_more(launches, 1, 6) / n_forward <= ceiling * bare


def test_the_operators_of_a_finetuning_step() -> None:
    """By layer and step: those of the bare forward and backward pass, and those of a step of SGD by weight."""

    def launches(n_layers: int, n_steps: int) -> int:
        model = model_of(n_layers, there=True)
        with pretended_device() as counts:
            icl.finetune(model, prompts_of(model, k=n_steps), lr=0.01, progress=False)
            return counts["launches"]

    bare = (bare_launches(4, backward=True) - bare_launches(2, backward=True)) / 2
    assert by_layer_and_one_more(launches, 4, 12) <= 1.05 * bare


def test_the_operators_of_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one rule share them: two captures' attentions over groups of keys, and their sums through W_O."""
    few, many = decompose_counts(2), decompose_counts(4)
    assert many["launches"] == few["launches"] <= 480  # 466
    monkeypatch.setattr(attention_split, "NUMBERS_AT_ONCE", 1)
    assert (decompose_counts(4)["launches"] - decompose_counts(2)["launches"]) / 2 <= 310


@pytest.mark.parametrize("architecture", ["gemma3-window", "mistral-window", "gptoss-window", "bloom", "gpt2"])
@pytest.mark.parametrize("numbers_at_once", [1, 30_000, 1 << 26])
def test_layers_of_one_rule_are_split_together(
    make_model: Callable[..., icl.Model], monkeypatch: pytest.MonkeyPatch, architecture: str, numbers_at_once: int
) -> None:
    """Of windows, sinks and ALiBi, and with as many layers as fit, the terms are those of each layer by itself."""
    monkeypatch.setattr(attention_split, "NUMBERS_AT_ONCE", numbers_at_once)
    model = make_model(architecture)
    prompts = prompts_of(model)
    captures = {
        name: icl.capture(model, each, fields=FIELDS, progress=False)
        for name, each in (("zero_shot", prompts.zero_shot()), ("in_context", prompts))
    }
    expected = tensors_of(icl.decompose(model, **captures))
    pretend_device.move(model.wrapped)
    pretend_device.move(model.wrapped.original_model)
    with pretended_device():
        moved = {name: capture.to(pretend_device.DEVICE) for name, capture in captures.items()}
        got = tensors_of(icl.decompose(icl.Model(model.wrapped, name=model.name), **moved))
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


def test_layers_that_do_not_fit_in_memory_together_are_split_in_smaller_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_several, sizes = attention_split._of_several, list[int]()

    def little_memory(layers: Any, *args: Any) -> Any:
        sizes.append(len(layers.q))
        if len(layers.q) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return of_several(layers, *args)

    expected = decompose_counts(4)
    monkeypatch.setattr(attention_split, "_of_several", little_memory)
    assert decompose_counts(4)["launches"] > expected["launches"]
    assert sizes == 2 * [4, 2, 1, 1, 1, 1], "of the first query's full prompt, and of all queries"


def test_a_finetuning_looks_at_its_losses_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from icl_dual.finetuning import sgd

    def waits(every: int) -> int:
        monkeypatch.setattr(sgd, "LOOK_EVERY", every)
        model = model_of(there=True)
        with pretended_device() as counts:
            icl.finetune(model, prompts_of(model, k=8), lr=0.01, progress=False)
            return counts["to host"] + counts["waits"]

    each_step, every_fourth = waits(1), waits(4)
    assert each_step - every_fourth == 2 * 6  # the losses and the path's length, at 2 looks instead of 8


def test_a_finetuning_that_diverges_between_looks_is_refused() -> None:
    model = model_of(there=True)
    with pretended_device(), pytest.raises(icl.DivergedError, match="diverged at step"):
        icl.finetune(model, prompts_of(model), lr=1e4, progress=False)


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_by_pairs_are_those_by_sorting(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 7, 40, dtype=torch.float64, generator=generator)
    if ties:
        a, b = a.round(), b.round()
    a[0, 0] = 0.0
    a[1, 2, 5] = torch.nan
    known = torch.rand(7, 40, generator=generator) > 0.2
    clean = a.nan_to_num()
    with pretended_device():
        tau: Any = ranks.kendall(DeviceTensor(a), DeviceTensor(b))
        rho: Any = ranks.spearman(DeviceTensor(clean), DeviceTensor(b), DeviceTensor(known))
    for got, expected in ((tau, ranks.kendall(a, b)), (rho, ranks.spearman(clean, b, known))):
        torch.testing.assert_close(got.held, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("of_cache", [False, True])
def test_hidden_infinities_are_looked_at_only_where_a_sum_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, of_cache: bool
) -> None:
    """An attention that is computed without a look is computed once more, with one, where it may be wrong: over the
    rows' own tokens or over those before them."""
    looks: list[bool] = []
    attend = icl.dual.AttentionRule.attend_masked

    def spoilt(rule: Any, q: Any, k: Any, v: Any, mask: icl.dual.Mask, check_finite: bool = True) -> Any:
        looks.append(check_finite)
        part = attend(rule, q, k, v, mask, check_finite=check_finite)
        is_of_cache = not mask.causal
        return part if check_finite or is_of_cache != of_cache else part._replace(z=part.z * torch.nan)

    expected = icl.capture(model_of(there=False), prompts_of(model_of(there=False)), fields=FIELDS, progress=False)
    model = model_of(there=True)
    with pretended_device():
        monkeypatch.setattr(icl.dual.AttentionRule, "attend_masked", spoilt)
        got = icl.capture(model, prompts_of(model), fields=FIELDS, progress=False)
    assert {True, False} == set(looks)
    for name, tensor in tensors_of(got).items():
        torch.testing.assert_close(tensor, tensors_of(expected)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("spoilt_layer", [0, 1])
def test_one_layer_s_hidden_infinities_before_the_rows_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, spoilt_layer: int
) -> None:
    """In the last layer, too, after which no attention follows that would not be finite."""
    looks: list[tuple[int, bool]] = []
    attend = shared_prefix.PrefixCache.attend

    def spoilt(cache: Any, rule: Any, layer: int, *inputs: Any, check_finite: bool, mask: icl.dual.Mask) -> Any:
        looks.append((layer, check_finite))
        part = attend(cache, rule, layer, *inputs, check_finite=check_finite, mask=mask)
        return part if check_finite or layer != spoilt_layer else part._replace(z=part.z * torch.nan)

    expected = icl.capture(model_of(there=False), prompts_of(model_of(there=False)), fields=FIELDS, progress=False)
    model = model_of(there=True)
    with pretended_device():
        monkeypatch.setattr(shared_prefix.PrefixCache, "attend", spoilt)
        got = icl.capture(model, prompts_of(model), fields=FIELDS, progress=False)
    assert {(layer, check_finite) for layer in range(2) for check_finite in (True, False)} == set(looks)
    for name, tensor in tensors_of(got).items():
        torch.testing.assert_close(tensor, tensors_of(expected)[name], rtol=1e-4, atol=1e-5, msg=name)


def test_batches_follow_the_cost_of_a_launch() -> None:
    lengths = [3, 200, 4, 190]
    assert len(shared_prefix.split_into_batches(lengths, 4)) == 2
    assert len(shared_prefix.split_into_batches(lengths, 4, overhead=10_000)) == 1
