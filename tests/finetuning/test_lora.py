"""LoRA against peft's own on the bare Hugging Face model, trained in a plain loop."""

from collections.abc import Callable
from typing import Any, cast

import hooked
import peft
import pytest
import torch
from finetuning_references import (
    relative_error,
    same,
    slow_loss,
    slow_training,
    snapshot,
)
from helpers import make_rows

import icl_dual as icl
from icl_dual.finetuning import Lora, Noise

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft

CONFIGS: dict[str, dict[str, Any]] = {
    "sgd": {"lora": Lora(rank=2, alpha=16)},
    "adam": {"lora": Lora(rank=3, targets=("q", "v"), seed=5), "trained": "attention", "optimiser": "adam"},
    "adamw": {"lora": Lora(rank=2), "trained": "attention", "optimiser": "adamw", "epochs": 3, "schedule": "linear"},
    "batches": {"lora": Lora(rank=2), "optimiser": "adam", "epochs": 2, "batch_size": 3},
}
MODULES = {
    "llama": {kind: f"{kind.lower()}_proj" for kind in "QKVO"},
    "gpt2": {"O": "attn.c_proj"},  # whose queries, keys and values are one module for peft
}


def train_by_peft(
    twin: Any, architecture: str, prompts: icl.Prompts, config: icl.FinetuneConfig, lr: float
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The reference: peft's own model in a plain loop; the losses, and the matrices of its adapters."""
    assert config.lora is not None
    targets = [MODULES[architecture][kind] for kind in config.adapted]
    torch.manual_seed(config.lora.seed)
    settings = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=cast(Any, config.lora.alpha),
        target_modules=targets,
        fan_in_fan_out=architecture == "gpt2",
    )
    adapted: Any = peft.get_peft_model(twin, settings)
    moving = [(parameter, torch.ones(())) for parameter in adapted.parameters() if parameter.requires_grad]
    losses = slow_training(adapted, prompts, config, lr, moving)
    by_kind: dict[str, list[torch.Tensor]] = {kind: [] for kind in config.adapted}
    for name, module in twin.named_modules():
        for kind in config.adapted:
            if name.endswith(MODULES[architecture][kind]):
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                by_kind[kind].append((B @ A * config.lora.alpha / config.lora.rank).detach())
    return losses, {f"W_{kind}": torch.stack(by_layer) for kind, by_layer in by_kind.items()}


@pytest.mark.parametrize(
    ("architecture", "dtype", "name", "accuracy"),
    [
        ("llama", torch.float32, "sgd", 1e-6),
        ("llama", torch.float32, "adam", 1e-6),
        ("llama", torch.float64, "adamw", 1e-12),
        ("llama", torch.float64, "batches", 1e-6),  # its softmax is float32: other rounding ends there
    ],
)
def test_deltas_equal_pefts_own_training_of_the_bare_model(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable,
    task: icl.Task,
    architecture: str,
    dtype: torch.dtype,
    name: str,
    accuracy: float,
) -> None:
    hold_against_peft(
        make_model, make_hf_model, task, architecture, dtype, icl.FinetuneConfig(**CONFIGS[name]), accuracy
    )


@pytest.mark.parametrize("settings", [{}, {"optimiser": "adam", "epochs": 2, "batch_size": 3}], ids=str)
def test_deltas_equal_pefts_own_training_of_a_bare_gpt2(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, settings: dict[str, Any]
) -> None:
    config = icl.FinetuneConfig(trained="attention", lora=Lora(rank=2, targets=("o",)), **settings)
    hold_against_peft(make_model, make_hf_model, task, "gpt2", torch.float64, config, 1e-12)


def hold_against_peft(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable,
    task: icl.Task,
    architecture: str,
    dtype: torch.dtype,
    config: icl.FinetuneConfig,
    accuracy: float,
) -> None:
    model, twin = make_model(architecture, dtype), make_hf_model(architecture, dtype)
    twin.config._attn_implementation = "eager"
    before, random_state = snapshot(model), torch.get_rng_state()
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    lr = 0.05 if config.optimiser == "sgd" else 0.01
    delta = icl.finetune(model, prompts, lr=lr, config=config, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same(model, before)
    losses, expected = train_by_peft(twin, architecture, prompts, config, lr)
    assert relative_error(delta.losses, torch.tensor(losses, dtype=torch.float64)) < accuracy
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        got = getattr(delta, name)
        if name in expected:
            assert relative_error(got, expected[name]) < accuracy, name
        else:
            assert got is None or not got.any()
    for name in ("b_Q", "b_K", "b_V", "b_O"):
        assert getattr(delta, name) is None or not getattr(delta, name).any()
    ids = torch.tensor([[*prompts.start, *prompts.queries[0]]])
    with torch.no_grad(), delta.applied(model):
        torch.testing.assert_close(model.run(ids), twin(ids).logits, rtol=1e-4, atol=1e-4)
    assert same(model, before)


def test_keys_and_values_of_a_fused_projection_have_adapters_of_their_own(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task
) -> None:
    """Against a GPT-2 whose fused matrix is W + B A in the columns of keys and values, A drawn as peft draws it."""
    model, twin = make_model("gpt2", torch.float64), make_hf_model("gpt2", torch.float64)
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    config = icl.FinetuneConfig(lora=Lora(rank=2, alpha=6, seed=3))
    delta = icl.finetune(model, prompts, lr=0.05, config=config, progress=False)
    linears = [torch.nn.Linear(32, 32, dtype=torch.float64) for _ in range(6)]
    pairs = zip(linears[::2], linears[1::2], strict=True)
    drawn = torch.nn.ModuleList(torch.nn.ModuleDict({"K": K, "V": V}) for K, V in pairs)
    torch.manual_seed(3)
    layers: Any = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["K", "V"]), drawn)
    modules = [layer[kind] for layer in layers for kind in "KV"]
    matrices = [[module.lora_A["default"].weight, module.lora_B["default"].weight] for module in modules]
    fused = [block.attn.c_attn for block in twin.transformer.h]
    originals = [module.weight.detach().clone() for module in fused]
    for tokens in prompts.demonstrations:
        weights = {}
        for index, original in enumerate(originals):
            (A_K, B_K), (A_V, B_V) = matrices[2 * index : 2 * index + 2]
            change = torch.cat([torch.zeros(32, 32, dtype=torch.float64), 3 * B_K @ A_K, 3 * B_V @ A_V]).T
            weights[f"transformer.h.{index}.attn.c_attn.weight"] = original + change
        ids = torch.tensor([[*prompts.start, *tokens]])
        logits = torch.func.functional_call(twin, weights, (ids,)).logits
        flat = [matrix for pair in matrices for matrix in pair]
        gradients = torch.autograd.grad(slow_loss(logits, ids, len(tokens)), flat)
        with torch.no_grad():
            for matrix, gradient in zip(flat, gradients, strict=True):
                matrix -= 0.05 * gradient
    for kind, at in (("K", 0), ("V", 1)):
        expected = torch.stack([3 * B @ A for A, B in matrices[at::2]]).detach()
        assert relative_error(getattr(delta, f"W_{kind}"), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_start_from_noisy_weights_and_leave_the_noise_out(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts, dtype: torch.dtype
) -> None:
    model = icl.Model(make_model("llama", dtype).wrapped, arithmetic=torch.float32)
    before, config = snapshot(model), icl.FinetuneConfig(lora=Lora(rank=2))
    plain, noisy, noisier = (
        icl.finetune(model, prompts, lr=0.05, config=config, noise=noise, progress=False)
        for noise in (None, Noise(1), Noise(1, size=0.1))
    )
    assert same(model, before)
    assert 0 < relative_error(noisy.W_V, plain.W_V) < relative_error(noisier.W_V, plain.W_V)
    assert torch.linalg.matrix_rank(noisier.W_V.double(), rtol=1e-5).max() == 2
    assert not plain.rounded
    with plain.applied(model):
        assert same(model, before) == (dtype == torch.bfloat16)
    assert same(model, before)


def test_adapters_diverge_by_name_and_leave_the_model(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(icl.DivergedError, match=r"step \d of 4 with lr=1e\+06"):
        icl.finetune(model, prompts, lr=1e6, config=icl.FinetuneConfig(lora=Lora()), progress=False)
    assert same(model, before)


def test_each_layer_may_train_its_adapters_by_its_own_loss(llama: icl.Model, prompts: icl.Prompts) -> None:
    for method in ("layer-causal", "full-batch"):
        config = icl.FinetuneConfig(method=method, lora=Lora(rank=2))
        delta = icl.finetune(llama, prompts, lr=0.05, config=config, progress=False)
        assert delta.W_V.flatten(1).any(dim=1).all()


def test_studies_run_cells_with_adapters_and_read_them_again(llama: icl.Model, tmp_path: Any) -> None:
    task = icl.Task("toy", "Text: {text} Label:", ("no", "perhaps"), make_rows())
    config = icl.FinetuneConfig(optimiser="adam", epochs=2, lora=Lora(rank=2, targets=("v",)))
    cell = icl.Cell("llama", "toy", k=2, seed=1, lr=0.01, n_queries=2, replicas=0, finetuning=config)
    options: dict[str, Any] = {"tasks": [task], "models": [llama], "progress": False}
    (result,) = icl.run_study([cell], tmp_path, **options)
    assert len(result.provenance["losses"]) == 4
    assert icl.load_cell(tmp_path / cell.name).cell == cell
    assert icl.run_study([cell], tmp_path, **options)[0].comparison == result.comparison


@pytest.mark.skipif(hooked.HookedTransformer is None, reason="transformer-lens 4 has no HookedTransformer")
def test_a_hooked_transformer_has_no_modules_beside_which_adapters_run(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    model, config = make_model("hooked-llama"), icl.FinetuneConfig(lora=Lora())
    with pytest.raises(icl.UnsupportedModelError, match=r"a model with a module for each projection, .* Hooked"):
        icl.finetune(model, prompts, lr=0.01, config=config, progress=False)
