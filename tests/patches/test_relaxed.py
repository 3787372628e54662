"""ΔICL inserted and linear attention run: against loops over heads and tokens, and against the decomposition."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative_error

import icl_dual as icl
from icl_dual.models import momentum_attention, tiny_model
from icl_dual.patches.relaxed import AttentionRun, run_inserted, run_relaxed

ToyModel = Callable[..., icl.Model]
ARCHITECTURES = ("gpt2", "bloom", "llama", "qwen2", "gemma2-window", "gemma3-window", "gptoss-window", "neox", "xglm")
"""Absolute, ALiBi and rotary positions, grouped queries, biases, caps and windows, norms of keys, sinks."""

PROMPTS = icl.Prompts(
    start=(0,),
    demonstrations=((5, 6, 7, 20), (8, 9, 21)),
    demonstration_label_lengths=(1, 1),
    separator=(3,),
    queries=((10, 11, 12), (13, 14), (10, 14)),
    labels=((20,), (21,)),
    gold=(0, 1, 0),
)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


class SlowGpt2:
    """GPT-2 in numpy: one head and one token after another."""

    def __init__(self, hf_model: Any) -> None:
        self.weights = {name: tensor.double().numpy() for name, tensor in hf_model.state_dict().items()}
        self.n_layers, self.n_heads = hf_model.config.n_layer, hf_model.config.n_head

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.weights[f"transformer.{name}.weight"] + self.weights[f"transformer.{name}.bias"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"transformer.{name}.weight"] + self.weights[f"transformer.{name}.bias"]

    def run(
        self, tokens: tuple[int, ...], change: Callable[[int, int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return the last token's logits; `change` returns a head's output there, from layer, head, z's q, k and v."""
        x = self.weights["transformer.wte.weight"][[*tokens]] + self.weights["transformer.wpe.weight"][: len(tokens)]
        for layer in range(self.n_layers):
            q, k, v = np.split(self.linear(self.norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn"), 3, axis=-1)
            d_head = q.shape[1] // self.n_heads
            z = np.zeros_like(q)
            for head in range(self.n_heads):
                at = slice(head * d_head, (head + 1) * d_head)
                for t in range(len(tokens)):
                    if t == len(tokens) - 1:
                        z[t, at] = change(layer, head, q[t, at], k[:, at], v[:, at])
                    else:
                        z[t, at] = softmax(k[: t + 1, at] @ q[t, at] / d_head**0.5) @ v[: t + 1, at]
            x = x + self.linear(z, f"h.{layer}.attn.c_proj")
            hidden = self.linear(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
            hidden = 0.5 * hidden * (1 + np.tanh((2 / np.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
            x = x + self.linear(hidden, f"h.{layer}.mlp.c_proj")
        return self.norm(x[-1], "ln_f") @ self.weights["lm_head.weight"].T


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return softmax(k @ q / len(q) ** 0.5) @ v


def relax(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(Σ v_i ⊗ k_i) q, as a matrix."""
    matrix = np.zeros((len(q), len(q)))
    for key, value in zip(k, v, strict=True):
        matrix += np.outer(value, key)
    return matrix @ q


@pytest.fixture(scope="module")
def gpt2(make_hf_model: Callable[..., Any], make_model: ToyModel) -> tuple[SlowGpt2, icl.Model]:
    return SlowGpt2(make_hf_model("gpt2", torch.float64)), make_model("gpt2", torch.float64)


@pytest.fixture(scope="module")
def tiny() -> icl.Model:
    return tiny_model(dtype=torch.float64)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (0, 2)])
def test_raw_linear_attention_is_that_of_a_loop(gpt2: tuple[SlowGpt2, icl.Model], layers: tuple[int, ...]) -> None:
    slow, model = gpt2
    result = run_relaxed(model, PROMPTS, layers=layers)
    for query, suffix in enumerate(PROMPTS.suffixes):
        tokens = (*PROMPTS.prefix, *suffix)
        expected = slow.run(tokens, lambda layer, head, *qkv: (relax if layer in layers else attend)(*qkv))
        assert relative_error(result.logits[query], torch.from_numpy(expected)) < 1e-10
        in_context = slow.run(tokens, lambda layer, head, *qkv: attend(*qkv))
        assert relative_error(result.in_context_logits[query], torch.from_numpy(in_context)) < 1e-10


@pytest.mark.parametrize("scale", ["fitted", "held-out", "in sequence"])
def test_factors_are_least_squares_of_a_loop(gpt2: tuple[SlowGpt2, icl.Model], scale: Any) -> None:
    slow, model = gpt2
    prompts = [(*PROMPTS.prefix, *suffix) for suffix in PROMPTS.suffixes]
    pairs: list[dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]] = [{} for _ in prompts]
    for query, tokens in enumerate(prompts):

        def keep(layer: int, head: int, *qkv: np.ndarray, query: int = query) -> np.ndarray:
            pairs[query][layer, head] = attend(*qkv), relax(*qkv)
            return pairs[query][layer, head][0]

        slow.run(tokens, keep)
    result = run_relaxed(model, PROMPTS, scale=scale)
    assert result.factors is not None
    for query, tokens in enumerate(prompts):
        fitted_to = [q for q in range(len(prompts)) if (q != query if scale == "held-out" else q == query)]

        def scaled(layer: int, head: int, *qkv: np.ndarray, query: int = query, of: list[int] = fitted_to) -> Any:
            relaxed = relax(*qkv)
            targets = [pairs[q][layer, head] for q in of]
            if scale == "in sequence":
                targets = [(pairs[query][layer, head][0], relaxed)]
            (factor,) = np.linalg.lstsq(
                np.concatenate([pair[1] for pair in targets])[:, None], np.concatenate([pair[0] for pair in targets])
            )[0]
            assert result.factors is not None
            assert result.factors[query, layer, head].item() == pytest.approx(factor, rel=1e-8)
            return factor * relaxed

        expected = slow.run(tokens, scaled)
        assert relative_error(result.logits[query], torch.from_numpy(expected)) < 1e-10


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma2-window", "gptoss-window"])
def test_factors_are_those_of_the_decomposition(
    models_by_architecture: ToyModel, prompts: icl.Prompts, architecture: str
) -> None:
    """With r = ‖z̃‖ / ‖z‖, the factor is cos(z̃, z) / r, and ‖z̃ − z‖² / ‖z‖² is r² − 2 r cos + 1."""
    model = models_by_architecture(architecture)
    prompts = prompts.first(2)
    factors = run_relaxed(model, prompts, scale="fitted").factors
    captures = {"in_context": icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)}
    captures["zero_shot"] = icl.capture(model, prompts.zero_shot(), fields=("attn_out", "z"), progress=False)
    relaxation = icl.decompose(model, **captures).relaxation
    assert factors is not None
    cosine = relaxation.output_cosine.double()
    size = cosine / factors
    torch.testing.assert_close(size**2 - 2 * size * cosine + 1, relaxation.output_error**2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_query_alone_with_delta_icl_gives_the_in_context_logits(
    models_by_architecture: ToyModel, prompts: icl.Prompts, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    everywhere = run_inserted(model, prompts)
    assert everywhere.relative_error.max() < 1e-5
    assert everywhere.kl.max() < 1e-8
    assert everywhere.agreement.all()
    nowhere = run_inserted(model, prompts, layers=[])
    assert nowhere.relative_error.min() > 1e-2
    torch.testing.assert_close(nowhere.in_context_logits, everywhere.in_context_logits, rtol=0, atol=0)


def test_delta_icl_is_exact_in_float64(gpt2: tuple[SlowGpt2, icl.Model]) -> None:
    _, model = gpt2
    assert run_inserted(model, PROMPTS).relative_error.max() < 1e-10
    assert run_inserted(model, PROMPTS, tokens="recorded").relative_error.min() > 1e-2


def test_what_is_inserted_at_the_recorded_token_is_the_decompositions(gpt2: tuple[SlowGpt2, icl.Model]) -> None:
    _, model = gpt2
    captures = {"in_context": icl.capture(model, PROMPTS, fields=icl.DECOMPOSE_FIELDS, progress=False)}
    captures["zero_shot"] = icl.capture(model, PROMPTS.zero_shot(), fields=("attn_out", "z"), progress=False)
    delta_icl = icl.decompose(model, **captures).delta_icl
    result = run_inserted(model, PROMPTS, layers=(-1, 0), tokens="recorded")
    assert result.layers == (0, 2)
    for query, suffix in enumerate(PROMPTS.suffixes):

        def add(layer: int, attention: Any, query: int = query) -> torch.Tensor:
            z = attention.z.clone()
            if layer != 1:
                z[0, -1] += delta_icl[query, layer]
            return z

        tokens = torch.tensor([[*PROMPTS.start, *suffix]])
        positions = torch.tensor([0, *range(len(PROMPTS.prefix), len(PROMPTS.prefix) + len(suffix))])
        with torch.no_grad():
            expected = model.run(tokens, positions=positions, on_attention=add)[0, -1]
        assert relative_error(result.logits[query], expected) < 1e-10


def test_without_layers_nothing_is_relaxed(tiny: icl.Model) -> None:
    result = run_relaxed(tiny, PROMPTS, layers=[])
    assert result.relative_error.max() < 1e-6
    assert (result.factors == 1).all()


def test_momentum_is_added_to_relaxed_outputs(tiny: icl.Model) -> None:
    with momentum_attention(tiny, 0.2):
        unchanged = run_relaxed(tiny, PROMPTS, layers=[])
        tokens = torch.tensor([[*PROMPTS.prefix, *PROMPTS.suffixes[0]]])
        with torch.no_grad():
            expected = tiny.run(tokens)[0, -1]
        with pytest.raises(icl.UnsupportedModelError, match="expected a model without momentum, got tiny"):
            run_inserted(tiny, PROMPTS)
    assert relative_error(unchanged.logits[0], expected) < 1e-6


def test_measures_are_those_of_the_logits(tiny: icl.Model) -> None:
    result = run_relaxed(tiny, PROMPTS, scale="held-out")
    p, q = result.in_context_logits.softmax(-1), result.logits.softmax(-1)
    torch.testing.assert_close(result.kl, (p * (p / q).log()).sum(-1))
    for query in range(3):
        both = torch.stack([result.logits[query], result.in_context_logits[query]])
        assert result.logit_cosine[query].item() == pytest.approx(torch.corrcoef(both)[0, 1].item())
        label = int(result.logits[query, [20, 21]].argmax())
        assert result.predictions[query] == label
        assert result.correct[query] == (label == PROMPTS.gold[query])
    assert result.accuracy == result.correct.double().mean()
    assert result.in_context_predictions.tolist() == result.in_context_logits[:, [20, 21]].argmax(-1).tolist()


def test_it_saves_and_loads(tiny: icl.Model, tmp_path: Path) -> None:
    for name, result in {"relaxed": run_relaxed(tiny, PROMPTS), "inserted": run_inserted(tiny, PROMPTS)}.items():
        result.save(tmp_path / name)
        loaded = AttentionRun.load(tmp_path / name)
        assert loaded == result
        assert repr(loaded) == repr(result)


@pytest.mark.parametrize("run", [run_relaxed, run_inserted])
def test_bad_arguments_are_refused(tiny: icl.Model, run: Callable[..., AttentionRun]) -> None:
    with pytest.raises(icl.PromptError, match="expected prompts with demonstrations, got none"):
        run(tiny, PROMPTS.zero_shot())
    with pytest.raises(IndexError, match="expected layers from 0 to 1, got 2"):
        run(tiny, PROMPTS, layers=[0, 2])
    with pytest.raises(icl.ArgumentError, match=r"expected (scale|tokens) as one of"):
        run(tiny, PROMPTS, **{"scale" if run is run_relaxed else "tokens": "all"})
    reference = replace(PROMPTS, protocol="reference")
    with pytest.raises(ValueError, match="expected prompts under the answer protocol, got 'reference'"):
        run(tiny, reference)


def test_a_function_vector_acts_at_each_querys_last_token(tiny: icl.Model) -> None:
    """Queries of different lengths run in one batch, padded."""
    vector = icl.build_function_vector(icl.capture(tiny, PROMPTS, fields=("attn_out",), progress=False), 0)
    with vector.applied(tiny):
        in_context = torch.stack(
            [tiny.run(torch.tensor([[*PROMPTS.prefix, *suffix]]))[0, -1].detach() for suffix in PROMPTS.suffixes]
        )
        runs = run_inserted(tiny, PROMPTS), run_relaxed(tiny, PROMPTS, layers=[])
    for run in runs:
        torch.testing.assert_close(run.in_context_logits, in_context, rtol=1e-4, atol=1e-5)
        assert run.relative_error.max() < 1e-5


def test_one_query_has_no_others_to_fit_to(tiny: icl.Model) -> None:
    with pytest.raises(ValueError, match="expected at least 2 queries for scale='held-out', got 1"):
        run_relaxed(tiny, PROMPTS.first(1), scale="held-out")


def test_label_words_of_several_tokens_have_no_predictions(tiny: icl.Model) -> None:
    prompts = replace(PROMPTS, labels=((20, 4), (21,)))
    with pytest.raises(ValueError, match="expected label words of one token each"):
        _ = run_relaxed(tiny, prompts).accuracy


@pytest.mark.parametrize("run", [run_relaxed, run_inserted])
def test_attention_that_is_no_softmax_is_refused(run: Callable[..., AttentionRun]) -> None:
    model = tiny_model()

    def double(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return 2 * z

    model.wrapped.blocks[1].attn.hook_z.add_hook(double)
    with pytest.raises(icl.UnsupportedModelError, match="layer 1: expected attention recomputed"):
        run(model, PROMPTS)
