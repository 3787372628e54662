"""LoRA against peft's own on the bare Hugging Face model, trained in a plain loop."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from finetuning_references import projection_weights, relative_error, same, slow_training, snapshot

import icl_dual as icl
from icl_dual.finetuning import Lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft

ONES = torch.ones(())

CONFIGS: dict[str, dict[str, Any]] = {
    "sgd": {"lora": Lora(rank=2, alpha=16)},
    "adam": {
        "lora": Lora(rank=3, targets=("q", "v"), seed=5),
        "trained": "attention",
        "optimiser": "adam",
        "epochs": 2,
        "batch_size": 3,
    },
    "adamw": {"lora": Lora(rank=2), "trained": "attention", "optimiser": "adamw", "epochs": 3, "schedule": "linear"},
}


def train_by_peft(twin: Any, prompts: icl.Prompts, config: icl.FinetuneConfig, lr: float) -> tuple[list[float], dict]:
    """The reference: peft's own model, trained in a plain loop, its adapters read by its own merge."""
    assert config.lora is not None
    targets = [f"{kind}_proj" for kind in (config.lora.targets or [k.lower() for k in config.adapted])]
    start = {name: W.clone() for name, W in projection_weights(twin, "llama").items()}
    torch.manual_seed(config.lora.seed)
    adapted = peft.get_peft_model(
        twin, peft.LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets)
    )
    moving = [(parameter, ONES) for parameter in adapted.parameters() if parameter.requires_grad]
    losses = slow_training(adapted, prompts, config, lr, moving)
    changes = {}
    for kind in "QKVO":
        modules = [getattr(layer.self_attn, f"{kind.lower()}_proj") for layer in twin.model.layers]
        if hasattr(modules[0], "lora_A"):
            changes[f"W_{kind}"] = torch.stack(
                [m.lora_B["default"].weight @ m.lora_A["default"].weight * m.scaling["default"] for m in modules]
            ).detach()
        else:
            changes[f"W_{kind}"] = torch.zeros_like(start[f"W_{kind}"])
    return losses, changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_deltas_equal_pefts_own_training_of_the_bare_model(
    make_model: Callable[..., icl.Model], make_hf_model: Callable, task: icl.Task, dtype: torch.dtype, name: str
) -> None:
    model, twin = make_model("llama", dtype), make_hf_model("llama", dtype)
    twin.config._attn_implementation = "eager"
    before, config = snapshot(model), icl.FinetuneConfig(**CONFIGS[name])
    prompts = icl.build_prompts(model, task, task.demonstrations(4, seed=1), task.queries(3))
    lr = 0.05 if config.optimiser == "sgd" else 0.01
    losses, expected = train_by_peft(twin, prompts, config, lr)
    delta = icl.finetune(model, prompts, lr=lr, config=config, progress=False)
    assert same(model, before)
    print(name, dtype, relative_error(delta.losses, torch.tensor(losses, dtype=torch.float64)))
    for n, W in expected.items():
        got = getattr(delta, n)
        if W.any():
            print(n, relative_error(got, W))
        else:
            assert got is None or not got.any()
