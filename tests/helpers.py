"""Slow references, made-up rows and the three settings, as several test modules use them."""

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import icl_dual as icl

seeds = st.integers(0, 2**20)
sizes = st.integers(1, 5)


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=shape))


def assert_exact(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def run_settings(model: icl.Model, prompts: icl.Prompts) -> dict[str, Any]:
    """A cell's captures and delta, as `icl.compare` takes them."""
    zsl, in_context = (icl.capture(model, one, progress=False) for one in (prompts.zero_shot(), prompts))
    delta = icl.finetune(model, prompts, lr=0.05, progress=False)
    with delta.applied(model):
        ft = icl.capture(model, prompts.zero_shot(), progress=False)
    return {"zero_shot": zsl, "in_context": in_context, "finetuned": ft, "delta": delta}


_MOVING = {
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "neox": ("attention.query_key_value", "attention.dense"),
    "bloom": ("self_attention.query_key_value", "self_attention.dense"),
    "xglm": ("self_attn.v_proj", "self_attn.out_proj"),
}
"""The modules that make a tiny model's values and read its heads' outputs, where they are not Llama's."""


def past_sum(v: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Σ_{i<t} η^{t−i} v_i of values `[batch pos head d_head]`, token by token: m_t = η (m_{t−1} + v_{t−1})."""
    found = [torch.zeros_like(v[:, 0])]
    for t in range(1, v.shape[1]):
        found.append(eta[:, None].to(v) * (found[-1] + v[:, t - 1]))
    return torch.stack(found, dim=1)


def with_momentum(hf_model: Any, architecture: str, eta: torch.Tensor) -> list[torch.Tensor]:
    """Give a Hugging Face model momentum by `[layer head]`, in plain torch: what a model under `icl` is held against.

    Returns a list that collects each layer's attention output in every pass.
    """
    name = architecture.removeprefix("hooked-")
    values, output = _MOVING.get(name, ("self_attn.v_proj", "self_attn.o_proj"))
    n_heads, outputs = eta.shape[1], list[torch.Tensor]()
    seen: dict[int, torch.Tensor] = {}

    def read(layer: int, projected: torch.Tensor) -> None:
        if name == "gpt2":
            projected = projected.chunk(3, dim=-1)[2]
        elif name in ("neox", "bloom"):  # a head's query, key and value lie side by side
            projected = projected.unflatten(-1, (n_heads, 3, -1))[..., 2, :].flatten(2)
        by_head = projected.unflatten(-1, (-1, 8))
        seen[layer] = by_head.repeat_interleave(n_heads // by_head.shape[2], dim=2)

    def add(layer: int, z: torch.Tensor) -> tuple[torch.Tensor]:
        return (z + past_sum(seen.pop(layer), eta[layer]).flatten(2),)

    modules = {kind: [m for path, m in hf_model.named_modules() if path.endswith(kind)] for kind in (values, output)}
    for layer in range(len(eta)):
        modules[values][layer].register_forward_hook(lambda m, args, out, layer=layer: read(layer, out))
        modules[output][layer].register_forward_pre_hook(lambda m, args, layer=layer: add(layer, args[0]))
        modules[output][layer].register_forward_hook(lambda m, args, out: outputs.append(out))
    return outputs


def some_eta(n_layers: int = 3, n_heads: int = 4) -> torch.Tensor:
    """A different η at every layer and head; at one head none."""
    eta = 0.9 * torch.rand(n_layers, n_heads, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eta[1, 1] = 0.0
    return eta


def make_rows(n: int = 60) -> list[dict[str, object]]:
    words = ("good", "bad", "film", "so", "very")
    return [
        {"text": f"{' '.join(words[(i * j) % 5] for j in range(1, 2 + i % 4))} number {i}", "label": i % 2}
        for i in range(n)
    ]


def slow_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ-b by counting every pair."""
    agreement, ties_a, ties_b = 0, 0, 0
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    for i, j in pairs:
        agreement += int(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))
        ties_a += int(a[i] == a[j])
        ties_b += int(b[i] == b[j])
    both = (len(pairs) - ties_a) * (len(pairs) - ties_b)
    return agreement / math.sqrt(both) if both else math.nan
