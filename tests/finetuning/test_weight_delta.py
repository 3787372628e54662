"""Deltas: applied and removed, saved and loaded, randomised, and taken between two models."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from finetuning_references import KINDS, LR, movable, same, snapshot
from toys import ARCHITECTURES

import icl_dual as icl
from icl_dual.finetuning import Noise
from icl_dual.finetuning.config import Method, Trained
from icl_dual.models import tiny_model
from icl_dual.prompts import Prompts
from icl_dual.storage import save_tensors

ROWS = [{"text": f"film {i}", "label": i % 2} for i in range(9)]
MOVED = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")


@pytest.mark.parametrize(
    ("method", "trained"),
    [("sgd", "key-value"), ("sgd", "attention"), ("layer-causal", "attention"), ("full-batch", "value")],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "xglm"])
def test_the_model_comes_back_bit_for_bit(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str, method: Method, trained: Trained
) -> None:
    model = make_model(architecture)
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(3))
    before = snapshot(model)
    flags = [parameter.requires_grad for parameter in model.wrapped.original_model.parameters()]
    delta = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method=method, trained=trained), progress=False
    )
    assert same(model, before)
    assert flags == [parameter.requires_grad for parameter in model.wrapped.original_model.parameters()]
    assert all(parameter.grad is None for parameter in model.wrapped.original_model.parameters())
    with delta.applied(model):
        assert not same(model, before)
    assert same(model, before)

    def fail_inside() -> None:
        with delta.applied(model):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert same(model, before)


@pytest.mark.parametrize("trained", get_args(Trained))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_deltas_save_and_load(
    models_by_architecture: Callable[[str], icl.Model],
    prompts: Prompts,
    tmp_path: Path,
    architecture: str,
    trained: Trained,
) -> None:
    model = models_by_architecture(architecture)
    delta = icl.finetune(
        model, prompts, lr=LR, config=icl.FinetuneConfig(method="full-batch", trained=trained), progress=False
    )
    assert (delta.W_Q is not None) == (delta.W_O is not None) == (trained == "attention")
    assert (delta.b_Q is not None) == (delta.b_O is not None) == (trained == "attention" and architecture == "gpt2")
    delta.save(tmp_path / "delta")
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert_same_delta(loaded, delta)
    assert loaded.config == icl.FinetuneConfig(method="full-batch", trained=trained)
    assert loaded.trained == trained
    with pytest.raises(icl.AssetError, match=r"expected a folder with tensors\.safetensors .*nothing"):
        icl.WeightDelta.load(tmp_path / "nothing")


def assert_same_delta(got: icl.WeightDelta, expected: icl.WeightDelta) -> None:
    assert (got.factors is None) == (expected.factors is None)
    if got.factors is not None and expected.factors is not None:
        assert_same_fields(got.factors, expected.factors)
    assert_same_fields(replace(got, factors=None), replace(expected, factors=None))


def assert_same_fields(got: Any, expected: Any) -> None:
    assert vars(got).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        other = getattr(got, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
            assert other.dtype == value.dtype
        else:
            assert other == value, name


def test_factors_and_noise_are_saved_with_their_delta(llama: icl.Model, prompts: Prompts, tmp_path: Path) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, factors=True, noise=Noise(5), progress=False)
    delta.save(tmp_path / "delta")
    assert icl.WeightDelta.load(tmp_path / "delta").noise == Noise(5)
    assert_same_delta(icl.WeightDelta.load(tmp_path / "delta"), delta)


def save_as_version_0_1(delta: icl.WeightDelta, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Write a delta as version 0.1 did: flat options, tensors by field, the factors' residual apart."""
    assert delta.config is not None
    tensors = {name: value for name, value in vars(delta).items() if isinstance(value, torch.Tensor)}
    metadata: dict[str, Any] = {
        "model": delta.model,
        "fingerprint": delta.fingerprint,
        "lr": delta.lr,
        "loss": delta.config.loss,
        "demonstrations": delta.demonstrations,
        "method": delta.config.method,
        "trained": delta.config.trained,
        "layout": "d_out d_in",
    }
    if delta.factors is not None:
        metadata["factors_residual"] = delta.factors.residual
        tensors |= {f"factors/{name}": getattr(delta.factors, name) for name in ("x", "e_K", "e_V", "steps")}
    save_tensors(
        folder,
        {name: value for name, value in tensors.items() if name not in without},
        {name: value for name, value in metadata.items() if name not in without},
    )


@pytest.mark.parametrize(
    ("trained", "factors"), [("key-value", True), ("key", False), ("attention", False), ("attention", True)]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_deltas_of_version_0_1_load(
    models_by_architecture: Callable[[str], icl.Model],
    prompts: Prompts,
    tmp_path: Path,
    architecture: str,
    trained: Trained,
    factors: bool,
) -> None:
    config = icl.FinetuneConfig(loss="label", method="layer-causal", trained=trained)
    model = models_by_architecture(architecture)
    delta = icl.finetune(model, prompts, lr=LR, config=config, factors=factors, progress=False)
    save_as_version_0_1(delta, tmp_path / "delta")
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert_same_delta(loaded, delta)
    assert loaded.config == config
    with loaded.applied(model):
        pass


def test_a_delta_that_lacks_what_older_versions_did_not_write_yet_has_it_as_absent(
    llama: icl.Model, prompts: Prompts, tmp_path: Path
) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, progress=False)
    save_as_version_0_1(delta, tmp_path / "delta", without=("method", "trained", "training_k", "layout"))
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert loaded.config == icl.FinetuneConfig()
    assert loaded.training_k is None
    assert_same_delta(loaded, replace(delta, training_k=None))
    save_as_version_0_1(delta, tmp_path / "delta", without=("W_V",))
    with pytest.raises(icl.AssetError, match=r"expected a saved WeightDelta .*W_V"):
        icl.WeightDelta.load(tmp_path / "delta")


def test_outputs_of_older_versions_are_refused_never_transposed(
    llama: icl.Model, prompts: Prompts, tmp_path: Path
) -> None:
    options: list[tuple[Trained, bool]] = [("attention", True), ("key-value", False)]
    for trained, refused in options:
        delta = icl.finetune(llama, prompts, lr=LR, config=icl.FinetuneConfig(trained=trained), progress=False)
        save_as_version_0_1(delta, tmp_path / trained, without=("layout",))
        if refused:
            with pytest.raises(icl.AssetError, match=r"ΔW_O that is not laid out as \[d_out d_in\].*: finetune again"):
                icl.WeightDelta.load(tmp_path / trained)
        else:
            icl.WeightDelta.load(tmp_path / trained)


def test_biases_move_and_are_kept(make_model: Callable[..., icl.Model], task: icl.Task, tmp_path: Path) -> None:
    model = make_model("gpt2")
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(3))
    delta = icl.finetune(model, prompts, lr=LR, progress=False)
    assert delta.b_K is not None
    assert delta.b_V is not None
    assert (delta.b_V != 0).any()
    delta.save(tmp_path / "delta")
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert loaded.b_V is not None
    assert torch.equal(loaded.b_V, delta.b_V)


@pytest.mark.parametrize("option", ["loss", "method", "trained"])
def test_unknown_options_are_refused_with_those_there_are(option: str) -> None:
    options: dict[str, Any] = {option: "adam"}
    with pytest.raises(icl.ArgumentError, match=rf"expected {option} as one of '.*', got 'adam'"):
        icl.FinetuneConfig(**options)


@pytest.fixture(scope="module")
def all_attention(models_by_architecture: Callable[[str], icl.Model], prompts: Prompts) -> icl.WeightDelta:
    model = models_by_architecture("gpt2")
    return icl.finetune(model, prompts, lr=LR, config=icl.FinetuneConfig(trained="attention"), progress=False)


def test_random_directions_are_as_long_and_unrelated(all_attention: icl.WeightDelta) -> None:
    randomised = [all_attention.randomised(seed) for seed in range(40)]
    for name in MOVED:
        moved = getattr(all_attention, name)
        for layer in range(3):
            changed = moved[layer].double().flatten()
            directions = torch.stack([getattr(delta, name)[layer].double().flatten() for delta in randomised])
            torch.testing.assert_close(directions.norm(dim=1), changed.norm().expand(40), rtol=1e-5, atol=0)
            if name == "b_K":  # which softmax does not see: it has moved by rounding at most
                assert changed.norm() < 1e-6
                continue
            cosines = directions @ changed / (directions.norm(dim=1) * changed.norm())
            n = len(changed)
            assert abs(cosines.mean()) < 4 / math.sqrt(40 * n), (name, layer)
            assert 0.5 / math.sqrt(n) < cosines.std() < 2 / math.sqrt(n), (name, layer)
            centre = directions.mean() / directions.std()
            assert abs(centre) < 4 / math.sqrt(40 * n), (name, layer)


def test_random_directions_are_their_seeds_and_all_else_stays(all_attention: icl.WeightDelta) -> None:
    first, again, other = (all_attention.randomised(seed) for seed in (1, 1, 2))
    for name, value in vars(all_attention).items():
        got = getattr(first, name)
        if name in MOVED:
            assert torch.equal(got, getattr(again, name))
            assert not torch.equal(got, getattr(other, name))
            assert (got.shape, got.dtype) == (value.shape, value.dtype)
        else:
            assert got is value
    assert not torch.equal(first.W_K, first.W_V), "every matrix has a direction of its own"


def test_a_random_delta_is_applied_and_taken_off_like_any(
    models_by_architecture: Callable[[str], icl.Model], all_attention: icl.WeightDelta
) -> None:
    model = models_by_architecture("gpt2")
    before, random = snapshot(model), all_attention.randomised(7)
    assert random.W_O is not None
    outputs: list[Any] = [block.attn.c_proj for block in model.wrapped.original_model.transformer.h]
    weights = [output.weight.detach().clone() for output in outputs]
    with random.applied(model):
        for layer, output in enumerate(outputs):  # GPT-2 keeps it transposed
            assert torch.equal(output.weight, weights[layer] + random.W_O[layer].T)
    assert same(model, before)


def test_what_did_not_move_stays_still_in_random_directions(llama: icl.Model, prompts: Prompts) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, config=icl.FinetuneConfig(trained="key"), progress=False)
    random = delta.randomised(1)
    assert (random.W_V == 0).all()
    assert random.W_Q is random.b_V is None
    assert not torch.equal(random.W_K, delta.W_K)


def test_a_random_delta_has_no_factors(llama: icl.Model, prompts: Prompts) -> None:
    assert icl.finetune(llama, prompts, lr=LR, factors=True, progress=False).randomised(1).factors is None


def test_a_delta_of_another_model_is_refused(
    llama: icl.Model, models_by_architecture: Callable[[str], icl.Model], prompts: Prompts
) -> None:
    delta = icl.finetune(llama, prompts, lr=LR, progress=False)
    with pytest.raises(ValueError, match="expected a delta of 'gpt2'"), delta.applied(models_by_architecture("gpt2")):
        pass


@pytest.mark.parametrize("trained", ["key-value", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_delta_of_another_precision_is_refused_with_both(dtype: torch.dtype, trained: Trained) -> None:
    half, mixed, whole = tiny_model(dtype=dtype), tiny_model(dtype=dtype, arithmetic=torch.float32), tiny_model()
    name = str(dtype).removeprefix("torch.")
    task = icl.Task("films", "Text: {text} Label:", ("bad", "good"), ROWS)
    of_tiny = icl.build_prompts(half, task, task.demonstrations(2, seed=1), task.queries(2))
    delta = icl.finetune(half, of_tiny, lr=1e-3, config=icl.FinetuneConfig(trained=trained), progress=False)
    for other, precision in ((mixed, f"{name} storage, float32 arithmetic"), (whole, "float32")):
        expected = f"in the model's precision, {precision}, got one that was finetuned in {name}: "
        with pytest.raises(ValueError, match=expected), delta.applied(other):
            pass
    before, W_O = half.fingerprint(), half.output_projections()[0]

    def fail_inside() -> None:
        with delta.applied(half):
            assert half.fingerprint() != before
            assert torch.equal(half.output_projections()[0], W_O) == (trained == "key-value")
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert half.fingerprint() == before
    assert half.weight_changes == ()


def test_gradients_that_overflow_in_float16_are_told_from_a_large_rate() -> None:
    model, task = tiny_model(dtype=torch.float16), icl.Task("films", "Text: {text} Label:", ("bad", "good"), ROWS)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    with pytest.raises(icl.DivergedError, match=r"step 1 of 2 .*arithmetic=torch\.float32"):
        icl.finetune(model, prompts, lr=1e-3, progress=False)
    model = tiny_model(dtype=torch.float16, arithmetic=torch.float32)
    assert icl.finetune(model, prompts, lr=1e-3, progress=False).W_V.isfinite().all()


def test_a_half_precision_delta_that_older_versions_rounded_stays_so(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    task = icl.Task("films", "Text: {text} Label:", ("bad", "good"), ROWS)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    delta = icl.finetune(model, prompts, lr=1e-3, progress=False)
    halves = {name: getattr(delta, name).bfloat16() for name in ("W_K", "W_V")}
    save_as_version_0_1(replace(delta, **halves), tmp_path / "half")
    save_as_version_0_1(delta, tmp_path / "whole")
    assert icl.WeightDelta.load(tmp_path / "half").rounded
    assert not icl.WeightDelta.load(tmp_path / "whole").rounded


def tune(hf_model: Any, architecture: str, trained: Trained) -> Any:
    """Finetune a Hugging Face model elsewhere: Adam on some projections, all else frozen."""
    weights = movable(hf_model, architecture, trained)
    for parameter in hf_model.parameters():
        parameter.requires_grad_(False)
    for parameter, _ in weights:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([parameter for parameter, _ in weights], lr=1e-2)
    ids = torch.arange(3, 40)[None]
    for _ in range(3):
        optimizer.zero_grad()
        hf_model(ids, labels=ids).loss.backward()
        for parameter, mask in weights:
            assert parameter.grad is not None
            parameter.grad *= mask
        optimizer.step()
    return hf_model


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.run(ids) if isinstance(model, icl.Model) else model(ids).logits


IDS = torch.tensor([[5, 7, 11, 60, 2, 9], [4, 4, 100, 8, 1, 3]])


@pytest.mark.parametrize(
    ("trained", "recognised"), [("key-value", "key-value"), ("value", "key-value"), ("attention", "attention")]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "xglm", "neox"])
def test_a_delta_between_a_model_and_a_copy_finetuned_elsewhere_reproduces_the_copy(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable[..., Any],
    tmp_path: Path,
    architecture: str,
    trained: Trained,
    recognised: Trained,
) -> None:
    model, tuned = make_model(architecture), tune(make_hf_model(architecture), architecture, trained)
    before = snapshot(model)
    named = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    delta = icl.WeightDelta.between(model, tuned)
    assert same(model, before)
    assert named.keys() == dict(tuned.named_parameters()).keys(), "the copy comes back as it was"
    assert all(torch.equal(parameter, named[name]) for name, parameter in tuned.named_parameters())
    assert delta.trained == recognised
    changed = {kind for kind in "QKVO" if (W := getattr(delta, f"W_{kind}")) is not None and (W != 0).any()}
    assert changed == set(KINDS[trained])
    assert (logits_of(model, IDS) - logits_of(tuned, IDS)).abs().max() > 0.01, "finetuning is meant to be seen"
    with delta.applied(model):
        torch.testing.assert_close(logits_of(model, IDS), logits_of(tuned, IDS), atol=2e-5, rtol=1e-5)
    assert same(model, before)
    assert delta.lr is delta.config is delta.training_q is delta.training_k is delta.factors is None
    assert (delta.demonstrations, len(delta.losses)) == ([], 0)
    assert "finetuned elsewhere" in repr(delta)
    delta.save(tmp_path / "delta")
    assert_same_delta(icl.WeightDelta.load(tmp_path / "delta"), delta)


def test_a_delta_between_two_models_is_the_difference_of_their_matrices(
    make_model: Callable[..., icl.Model], make_hf_model: Callable[..., Any]
) -> None:
    before: Any = make_hf_model("gpt2").transformer.h
    tuned = tune(make_hf_model("gpt2"), "gpt2", "attention")
    delta = icl.WeightDelta.between(make_model("gpt2"), tuned)
    assert delta.W_Q is not None
    assert delta.W_O is not None
    for layer, block in enumerate(tuned.transformer.h):
        fused = (block.attn.c_attn.weight - before[layer].attn.c_attn.weight).detach()
        for got, expected in zip((delta.W_Q, delta.W_K, delta.W_V), fused.split(32, dim=1), strict=True):
            assert torch.equal(got[layer], expected.T)
        output = (block.attn.c_proj.weight - before[layer].attn.c_proj.weight).detach()
        assert torch.equal(delta.W_O[layer], output.T)


HOOKED = [name for name in ("hooked-llama", "hooked-gpt2") if name in ARCHITECTURES]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *HOOKED])
def test_the_copy_may_be_a_model_or_what_it_wraps(
    make_model: Callable[..., icl.Model], prompts: Prompts, architecture: str
) -> None:
    model, tuned = make_model(architecture), make_model(architecture, name="tuned elsewhere")
    expected = icl.finetune(model, prompts, lr=LR, progress=False)
    with torch.no_grad():
        for name in ("W_K", "W_V", "b_K", "b_V"):
            for layer, projection in enumerate(tuned.projections("K" if name.endswith("K") else "V")):
                weight = projection.W if name.startswith("W") else projection.b
                if weight is not None:
                    weight.parameter.add_(weight.from_matrix(getattr(expected, name)[layer]))
    of_model, of_bridge = icl.WeightDelta.between(model, tuned), icl.WeightDelta.between(model, tuned.wrapped)
    assert_same_delta(of_model, of_bridge)
    assert (of_model.model, of_model.fingerprint) == (expected.model, expected.fingerprint)
    assert of_model.trained == "key-value"
    for name in ("W_K", "W_V", "b_V"):
        if (value := getattr(expected, name)) is not None:
            torch.testing.assert_close(getattr(of_model, name), value, atol=1e-6, rtol=0)


def test_deltas_between_models_in_half_precision_are_in_float32(
    make_model: Callable[..., icl.Model], make_hf_model: Callable[..., Any]
) -> None:
    model, tuned = make_model("llama", torch.bfloat16), make_hf_model("llama", torch.bfloat16)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.v_proj.weight.mul_(-1.7)  # a change that bfloat16 would round
    delta = icl.WeightDelta.between(model, tuned)
    assert delta.W_V.dtype == torch.float32
    with delta.applied(model):
        applied = model.projections("V")[1].W.parameter
        assert torch.equal(applied, tuned.model.layers[1].self_attn.v_proj.weight)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ("model.embed_tokens.weight", r"model\.embed_tokens\.weight"),
        ("model.layers.0.input_layernorm.weight", r"model\.layers\.0\.input_layernorm\.weight"),
    ],
)
def test_a_copy_that_differs_beyond_attentions_projections_is_refused_by_the_weights_name(
    llama: icl.Model, make_hf_model: Callable[..., Any], path: str, name: str
) -> None:
    tuned = tune(make_hf_model("llama"), "llama", "key-value")
    with torch.no_grad():
        tuned.get_parameter(path).view(-1)[3] += 1e-3
    message = rf"attention's projections only.*got another '{name}' \(1 such weights\): .*delta=None\)"
    with pytest.raises(ValueError, match=message):
        icl.WeightDelta.between(llama, tuned)


def test_what_is_no_finetuned_copy_is_refused(
    llama: icl.Model,
    models_by_architecture: Callable[[str], icl.Model],
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable[..., Any],
) -> None:
    shallow = make_hf_model("llama")
    shallow.model.layers = shallow.model.layers[:2]
    shallow.config.num_hidden_layers = 2
    refused: list[tuple[object, str]] = [
        (models_by_architecture("qwen3"), "architecture=LlamaForCausalLM, got architecture=Qwen3ForCausalLM"),
        (make_hf_model("gpt2"), "architecture=LlamaForCausalLM, got architecture=GPT2LMHeadModel"),
        (shallow, "n_layers=3, got n_layers=2"),
        (make_hf_model("llama", torch.float64), r"dtype=torch\.float32, got dtype=torch\.float64"),
        (make_hf_model("llama"), "expected tuned to have other weights than 'llama', got the same weights"),
        (llama, "expected tuned to have other weights than 'llama', got the same weights"),
        (llama.wrapped.original_model, "got LlamaForCausalLM within a TransformerBridge: pass the bridge"),
        ({"W_K": 0}, "expected tuned as an .*, got dict: merge adapters first"),
        (icl.Model(make_model("llama").wrapped, name="llama", momentum=0.5), "expected tuned with the momentum of"),
    ]
    for tuned, message in refused:
        with pytest.raises(ValueError, match=message):
            icl.WeightDelta.between(llama, tuned)
