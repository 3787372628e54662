"""Slow references, made-up rows and the three settings, as several test modules use them."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.recordings.recordings import SETTINGS

seeds = st.integers(0, 2**20)
sizes = st.integers(1, 5)


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=shape))


def assert_exact(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def run_settings(model: icl.Model, prompts: icl.Prompts) -> dict[str, Any]:
    """Return an experiment's captures and delta, as `icl.compare` takes them."""
    experiment = icl.run_experiment(model, prompts, lr=0.05, progress=False)
    return {name: getattr(experiment, name) for name in ("zero_shot", "in_context", "finetuned", "delta")}


_MOVING = {
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "neox": ("attention.query_key_value", "attention.dense"),
    "bloom": ("self_attention.query_key_value", "self_attention.dense"),
    "xglm": ("self_attn.v_proj", "self_attn.out_proj"),
}
"""The modules that make a tiny model's values and read its heads' outputs, where they are not Llama's."""


def past_sum(v: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Σ_{i<t} η^{t−i} v_i of values `[batch pos head d_head]`, token by token: m_t = η (m_{t−1} + v_{t−1})."""
    sums = [torch.zeros_like(v[:, 0])]
    for t in range(1, v.shape[1]):
        sums.append(eta[:, None].to(v) * (sums[-1] + v[:, t - 1]))
    return torch.stack(sums, dim=1)


def with_momentum(hf_model: Any, architecture: str, eta: torch.Tensor) -> list[torch.Tensor]:
    """Give a Hugging Face model momentum by `[layer head]`, in plain torch: what a model under `icl` is held against.

    Returns a list that collects each layer's attention output in every pass.
    """
    name = architecture.removeprefix("hooked-")
    values, output = _MOVING.get(name, ("self_attn.v_proj", "self_attn.o_proj"))
    n_heads, outputs = eta.shape[1], list[torch.Tensor]()
    values_by_layer: dict[int, torch.Tensor] = {}

    def read(layer: int, projected: torch.Tensor) -> None:
        if name == "gpt2":
            projected = projected.chunk(3, dim=-1)[2]
        elif name in ("neox", "bloom"):  # a head's query, key and value lie side by side
            projected = projected.unflatten(-1, (n_heads, 3, -1))[..., 2, :].flatten(2)
        by_head = projected.unflatten(-1, (-1, 8))
        values_by_layer[layer] = by_head.repeat_interleave(n_heads // by_head.shape[2], dim=2)

    def add(layer: int, z: torch.Tensor) -> tuple[torch.Tensor]:
        return (z + past_sum(values_by_layer.pop(layer), eta[layer]).flatten(2),)

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


def as_long_as(r: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return r * (size / r.norm(dim=-1, keepdim=True))


def noisy_recordings(n: int, layers: int, d: int, ratio: float, seed: int = 0) -> icl.Recordings:
    """Attention outputs z, and z with independent noise on it of |r|² = ratio·|z|², and little else."""
    z = draw(seed, n, layers, d) + draw(seed + 1, d)  # all queries have something in common
    size = math.sqrt(ratio) * z.norm(dim=-1, keepdim=True)
    r_icl, r_ft = (as_long_as(draw(seed + which, n, layers, d), size) for which in (2, 3))
    labels = torch.zeros(n, dtype=torch.long)
    return icl.Recordings(
        gold=labels,
        predictions=dict.fromkeys(SETTINGS, labels),
        attn_out={"ZSL": z, "ICL": z + r_icl, "FT": z + r_ft},
        query_scores={name: draw(seed + 4 + at, n, layers, 2, 5) for at, name in enumerate(SETTINGS)},
        query_lengths=torch.full((n,), 5),
        context_scores={name: draw(seed + 7, n, layers, 4) for name in SETTINGS},
        segments=torch.tensor([-1, 0, 0, 1]),
        q=draw(seed + 8, n, layers, 6),
        training_q=draw(seed + 9, layers, 5, 6),
        training_segments=torch.tensor([-1, 0, 0, -1, 1]),
        residual_norms={name: norms_with_a_massive_token(n, layers, 5, name) for name in SETTINGS},
    )


def norms_with_a_massive_token(n: int, layers: int, n_tokens: int, setting: str) -> torch.Tensor:
    """Residual norms near 1; out of context, the first token's is 50 in every other query, from the second layer on."""
    norms = 1 + 0.1 * draw(11 + SETTINGS.index(setting), n, layers, n_tokens).clamp(-3, 3)
    if setting != "ICL":
        norms[::2, min(1, layers - 1) :, 0] = 50.0
    return norms


def with_value(result: Any, field: str, value: Any) -> Any:
    """Return a result with another value of a field, which the result does not check, as damaged files have it."""
    twin = copy.copy(result)
    object.__setattr__(twin, field, value)
    return twin


def snapshot(model: icl.Model) -> list[torch.Tensor]:
    """Copies of every weight of a bridged model."""
    return [parameter.detach().clone() for parameter in model.wrapped.original_model.parameters()]


def boot(hf_model: Any, tokenizer: Any) -> Any:
    """A bridge to a Hugging Face model in memory."""
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.config.architectures = [type(hf_model).__name__]
    return TransformerBridge.boot_transformers("tiny/x", hf_model=hf_model, tokenizer=tokenizer, device="cpu")


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


class FullPrompts:
    """The slow reference of captures: one plain forward pass over each full prompt, without cache, padding or edits."""

    def __init__(self, model: icl.Model, prompts: icl.Prompts) -> None:
        self.model, self.prompts = model, prompts

    def attn_out(self, query: int) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        self.run(query, self.prompts.appended_tokens, on_output=lambda layer, output: outputs.append(output[0, -1]))
        return torch.stack(outputs)

    def attention(self, query: int) -> list:
        by_layer: list = []

        def keep(layer, attention) -> None:
            by_layer.append(attention)

        self.run(query, self.prompts.appended_tokens, on_attention=keep)
        return by_layer

    def label_log_probs(self, query: int) -> torch.Tensor:
        means = []
        for label in self.prompts.labels:
            logits = self.run(query, label)[0, -len(label) - 1 : -1]
            means.append(logits.log_softmax(-1)[range(len(label)), label].mean())
        return torch.stack(means)

    def run(self, query: int, after: tuple[int, ...] = (), **callbacks) -> torch.Tensor:
        tokens = torch.tensor([[*self.prompts.prefix, *self.prompts.queries[query], *after]])
        with torch.no_grad():
            return self.model.run(tokens, **callbacks)


def as_saved_by_0_1(folder: Path) -> None:
    """Rewrite a folder's saved settings of a cell as version 0.1 wrote them: finetuning's options among the others."""
    metadata = saved_metadata(folder)
    metadata["settings"] |= metadata["settings"].pop("finetuning")
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


def saved_metadata(folder: Path) -> dict[str, Any]:
    """Return a folder's metadata without the checksums, which versions before wrote none of."""
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    metadata.pop("sha256", None)
    return metadata
