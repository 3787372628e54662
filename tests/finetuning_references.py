"""Slow references of finetuning on bare Hugging Face models, and what the tests of finetuning share."""

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn

import icl_dual as icl
from icl_dual.models import ProjectionName
from icl_dual.prompts import Prompts

LR = 0.05
PROJECTIONS = {"Q": ("q_proj",), "K": ("k_proj",), "V": ("v_proj",), "O": ("o_proj", "out_proj")}
FUSED = {"gpt2": ("attn.c_attn", "attn.c_proj"), "neox": ("query_key_value", "attention.dense")}
KINDS = {"key-value": "KV", "key": "K", "value": "V", "attention": "QKVO"}
# Rotary attention takes its softmax in float32 also at float64.
ACCURACY = {"xglm": 1e-4, "llama": 1e-5, "qwen3": 1e-5, "gemma2-window": 1e-5, "bloom": 1e-5}


def dtype_of(architecture: str) -> torch.dtype:
    return torch.float32 if architecture == "xglm" else torch.float64  # XGLM's mask overflows at float64


def movable(hf_model: Any, architecture: str, trained: str) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Every parameter that may move, layer by layer, and with 1 where it may: fused projections move in part."""
    kinds = KINDS[trained]
    weights = []
    for name, module in hf_model.named_modules():
        if architecture in FUSED:
            fused, output = FUSED[architecture]
            whole: tuple[str, ...] = (output,) if "O" in kinds else ()
            if name.endswith(fused):
                weights += [(p, fused_mask(architecture, p, kinds)) for p in (module.weight, module.bias)]
        else:
            whole = tuple(name for kind in kinds for name in PROJECTIONS[kind])
        if name.endswith(whole):
            weights += [(p, torch.ones_like(p)) for p in (module.weight, module.bias) if p is not None]
    return weights


def fused_mask(architecture: str, parameter: torch.Tensor, kinds: str) -> torch.Tensor:
    """Where a fused projection keeps these kinds: GPT-2 in columns of its transposed layer, NeoX in rows by head."""
    mask = torch.zeros_like(parameter)
    for at, kind in enumerate("QKV"):
        if kind in kinds and architecture == "gpt2":
            mask[..., 32 * at : 32 * (at + 1)] = 1
        elif kind in kinds:
            mask.view(4, 3, 8, -1)[:, at] = 1
    return mask


def slow_loss(logits: torch.Tensor, ids: torch.Tensor, n_targets: int) -> torch.Tensor:
    log_probs = logits[0, :-1].log_softmax(-1)
    return -log_probs.gather(1, ids[0, 1:, None])[-n_targets:].mean()


def slow_sgd(
    hf_model: Any, prompts: Prompts, n_targets: list[int], architecture: str, trained: str = "key-value"
) -> list[float]:
    """The reference: SGD on the Hugging Face model itself, every other gradient thrown away."""
    losses = []
    for tokens, targets in zip(prompts.demonstrations, n_targets, strict=True):
        ids = torch.tensor([[*prompts.start, *tokens]])
        loss = slow_loss(hf_model(ids).logits, ids, targets)
        hf_model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, mask in movable(hf_model, architecture, trained):
                assert parameter.grad is not None
                parameter -= LR * mask * parameter.grad
    return losses


def slow_full_batch(hf_model: Any, prompts: Prompts, architecture: str) -> list[float]:
    """The reference: one step of gradient descent on the sum of the demonstrations' losses."""
    batch = [torch.tensor([[*prompts.start, *tokens]]) for tokens in prompts.demonstrations]
    losses = [slow_loss(hf_model(ids).logits, ids, ids.shape[1] - 1) for ids in batch]
    moving = movable(hf_model, architecture, "key-value")
    gradients = torch.autograd.grad(torch.stack(losses).sum(), [parameter for parameter, _ in moving])
    with torch.no_grad():
        for (parameter, mask), gradient in zip(moving, gradients, strict=True):
            parameter -= LR * mask * gradient
    return [loss.item() for loss in losses]


def slow_layer_causal(hf_model: Any, prompts: Prompts, n_targets: list[int], architecture: str) -> list[float]:
    """The reference: each layer's gradient of the loss of its own output, read as the last layer's is.

    No gradient is cut off: a layer's loss does not know of the layers above it, and only the gradient with respect to
    the layer's own parameters is taken.
    """
    layers, norm = {
        "gpt2": lambda: (hf_model.transformer.h, hf_model.transformer.ln_f),
        "neox": lambda: (hf_model.gpt_neox.layers, hf_model.gpt_neox.final_layer_norm),
    }.get(architecture, lambda: (hf_model.model.layers, hf_model.model.norm))()
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    moving = movable(hf_model, architecture, "key-value")
    per_layer = len(moving) // len(layers)
    losses = []
    for tokens, targets in zip(prompts.demonstrations, n_targets, strict=True):
        outputs.clear()
        ids = torch.tensor([[*prompts.start, *tokens]])
        losses.append(slow_loss(hf_model(ids).logits, ids, targets).item())
        steps = []
        for index, output in enumerate(outputs):
            logits = hf_model.get_output_embeddings()(norm(output))
            cap = getattr(hf_model.config, "final_logit_softcapping", None)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            layer_weights = moving[index * per_layer : (index + 1) * per_layer]
            gradients = torch.autograd.grad(
                slow_loss(logits, ids, targets), [parameter for parameter, _ in layer_weights], retain_graph=True
            )
            steps += [(*pair, gradient) for pair, gradient in zip(layer_weights, gradients, strict=True)]
        with torch.no_grad():
            for parameter, mask, gradient in steps:
                parameter -= LR * mask * gradient
    return losses


def targets_of(prompts: Prompts, loss: str) -> list[int]:
    lengths = list(prompts.demonstration_label_lengths)
    return [len(tokens) for tokens in prompts.demonstrations] if loss == "all" else lengths


def hold_against(
    twin: Any, expected: list[float], model: icl.Model, prompts: Prompts, delta: icl.WeightDelta, accuracy: float
) -> None:
    """The delta's losses against the reference's, and what the model does with it against the finetuned twin."""
    torch.testing.assert_close(delta.losses, torch.tensor(expected, dtype=torch.float64), atol=accuracy, rtol=accuracy)
    ids = torch.tensor([[*prompts.start, *prompts.queries[0]]])
    with torch.no_grad():
        tuned = twin(ids).logits
        before = model.run(ids)
        with delta.applied(model):
            torch.testing.assert_close(model.run(ids), tuned, atol=accuracy, rtol=accuracy)
        assert (before - tuned).abs().max() > 1e-3, "finetuning is meant to change the logits"


def snapshot(model: icl.Model) -> list[torch.Tensor]:
    fused = list(model.wrapped.original_model.parameters())
    projections = [projection for kind in get_args(ProjectionName) for projection in model.projections(kind)]
    split = [weight.parameter for projection in projections for weight in projection if weight is not None]
    return [parameter.detach().clone() for parameter in (*fused, *split)]


def same(model: icl.Model, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(snapshot(model), before, strict=True))


def model_of(make_model: Callable[..., icl.Model], half: icl.Model) -> icl.Model:
    """The same rounded weights and buffers in float32."""
    model = make_model("llama")
    original, rounded = model.wrapped.original_model, half.wrapped.original_model
    with torch.no_grad():
        for tensors in ("parameters", "buffers"):
            for mine, theirs in zip(getattr(original, tensors)(), getattr(rounded, tensors)(), strict=True):
                mine.copy_(theirs)
    return model


def cosines(delta: icl.WeightDelta, expected: icl.WeightDelta, kinds: str) -> torch.Tensor:
    """By projection and layer, the cosine of ΔW with the expected one."""
    pairs = [(getattr(delta, f"W_{kind}").flatten(1), getattr(expected, f"W_{kind}").flatten(1)) for kind in kinds]
    return torch.stack([nn.functional.cosine_similarity(got.double(), wanted.double()) for got, wanted in pairs])


def rate_factor(config: icl.FinetuneConfig, step: int, n_steps: int) -> float:
    """The share of the learning rate at a step, counted from 0, by the formula of each schedule."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / (n_steps - config.warmup)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return factors[config.schedule]


def slow_training(
    hf_model: Any,
    prompts: Prompts,
    config: icl.FinetuneConfig,
    lr: float,
    moving: list[tuple[nn.Parameter, torch.Tensor]],
) -> list[float]:
    """The reference: torch's optimiser in the plain loop that one would write, on the Hugging Face model itself.

    `moving` are the parameters, with 1 where they may move.
    """
    parameters = [parameter for parameter, _ in moving]
    optimiser = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=lr, momentum=config.momentum),
        "adam": lambda: torch.optim.Adam(parameters, lr=lr),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=lr),
    }[config.optimiser]()
    losses, k, step = [], len(prompts.demonstrations), 0
    n_steps = config.epochs * -(-k // config.batch_size)
    for _ in range(config.epochs):
        for first in range(0, k, config.batch_size):
            demonstrations = prompts.demonstrations[first : first + config.batch_size]
            batch = [torch.tensor([[*prompts.start, *tokens]]) for tokens in demonstrations]
            batch_losses = [slow_loss(hf_model(ids).logits, ids, ids.shape[1] - 1) for ids in batch]
            hf_model.zero_grad()
            torch.stack(batch_losses).mean().backward()
            for parameter, mask in moving:
                parameter.grad = parameter.grad * mask if parameter.grad is not None else None
            optimiser.param_groups[0]["lr"] = lr * rate_factor(config, step, n_steps)
            optimiser.step()
            losses += [loss.item() for loss in batch_losses]
            step += 1
    return losses


def projection_weights(hf_model: Any, architecture: str) -> dict[str, torch.Tensor]:
    """The projections' matrices of a bare Llama or GPT-2, `[layer d_out d_in]`."""
    if architecture == "gpt2":
        blocks = hf_model.transformer.h
        fused = torch.stack([block.attn.c_attn.weight.detach().T for block in blocks])
        outputs = torch.stack([block.attn.c_proj.weight.detach().T for block in blocks])
        return {**dict(zip(("W_Q", "W_K", "W_V"), fused.split(32, dim=1), strict=True)), "W_O": outputs}
    modules = [layer.self_attn for layer in hf_model.model.layers]
    return {
        f"W_{kind}": torch.stack([getattr(attn, f"{kind.lower()}_proj").weight.detach() for attn in modules])
        for kind in "QKVO"
    }


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()
