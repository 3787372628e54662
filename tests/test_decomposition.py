import contextlib
import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_rows, some_eta
from scipy import stats
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from toys import ARCHITECTURES

import icl_dual as icl
from icl_dual.captures import capture as capture_module
from icl_dual.captures import shared_prefix
from icl_dual.decomposition import GROUPS, Term
from icl_dual.models import tiny_model
from icl_dual.models.foreign_hooks import remove_hook
from icl_dual.prompts import SEPARATOR, Prompts
from icl_dual.storage import load_tensors, save_tensors

EXACT = 2e-6
"""What the residuals of float32 models are to stay below."""


def build(model: icl.Model, task: icl.Task, k: int = 5, n: int = 4) -> Prompts:
    return icl.build_prompts(model, task, task.demonstrations(k, seed=1), task.queries(n))


def runs(model: icl.Model, prompts: Prompts, batch_size: int = 3) -> tuple[icl.Capture, icl.Capture]:
    icl_run, zsl = (
        icl.capture(model, which, fields=icl.DECOMPOSE_FIELDS, batch_size=batch_size, progress=False)
        for which in (prompts, prompts.zero_shot())
    )
    return icl_run, zsl


def decompose_runs(model: icl.Model, in_context: icl.Capture, zero_shot: icl.Capture) -> icl.Decomposition:
    return icl.decompose(model, zero_shot=zero_shot, in_context=in_context)


def decomposed(model: icl.Model, prompts: Prompts, batch_size: int = 3) -> icl.Decomposition:
    return decompose_runs(model, *runs(model, prompts, batch_size))


@pytest.fixture(scope="module")
def llama_runs(llama: icl.Model, prompts: Prompts) -> tuple[icl.Capture, icl.Capture]:
    """The captures that tests share which look at what is made of them."""
    return runs(llama, prompts)


@pytest.fixture(scope="module")
def split(llama: icl.Model, llama_runs: tuple[icl.Capture, icl.Capture]) -> icl.Decomposition:
    return decompose_runs(llama, *llama_runs)


class Reference:
    """One query's decomposition at one layer, in plain numpy, from a plain forward pass over the full prompt."""

    def __init__(self, model: icl.Model, prompts: Prompts, query: int) -> None:
        self.model, self.attention = model, []
        tokens = torch.tensor([[*prompts.prefix, *prompts.suffixes[query]]])

        def keep(layer: int, attention) -> None:
            self.attention.append(attention)

        with torch.no_grad():
            model.run(tokens, on_attention=keep)
        owners = [*prompts.segments.tolist(), *[-9] * len(prompts.suffixes[query])]
        kinds = [None, -1, -9, SEPARATOR, *range(len(prompts.demonstrations))]
        self.groups = [[at for at, owner in enumerate(owners) if owner == kind] for kind in kinds]
        self.demonstrations = [at for at, owner in enumerate(owners) if owner == SEPARATOR or owner >= 0]
        self.others = [at for at in range(len(owners)) if at not in self.demonstrations]

    def head(self, layer: int, head: int):
        """Its scores before the softmax, its softmax weights, its values, its q and its keys."""
        rule, seen = self.model.attention_rules[layer], self.attention[layer]
        kv_head = head // (self.model.n_heads // self.model.n_key_value_heads)
        q, k, v = seen.q[0, -1, head], seen.k[0, :, kv_head], seen.v[0, :, kv_head]
        q, k, v = (tensor.double().numpy() for tensor in (q, k, v))
        n_keys = len(k)
        scores = []
        for at in range(n_keys):
            score = rule.scale * float(k[at] @ q)
            if rule.softcap is not None:
                score = rule.softcap * np.tanh(score / rule.softcap)
            if rule.slopes is not None:
                score -= float(rule.slopes[head]) * (n_keys - 1 - at)
            if rule.window is not None and n_keys - 1 - at >= rule.window:
                score = -np.inf
            scores.append(score)
        sink = 0.0 if rule.sink is None else float(np.exp(float(rule.sink[head])))
        weights = np.exp(scores)
        return np.array(scores), weights / (weights.sum() + sink), sink / (weights.sum() + sink), v, q, k


def close(got: torch.Tensor, expected: np.ndarray, scale: float = 1.0) -> bool:
    return bool(np.abs(got.numpy() - expected).max() <= 2e-5 * max(scale, float(np.abs(expected).max())))


@pytest.mark.parametrize(
    ("architecture", "protocol"), [*((name, "answer") for name in ARCHITECTURES), ("llama", "reference")]
)
def test_terms_are_those_of_attention_written_out_in_a_plain_full_prompt(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    architecture: str,
    protocol: str,
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task if protocol == "answer" else reference_task)
    got = decomposed(model, prompts)
    assert got.residual <= EXACT
    for query in (0, 3):
        plain = Reference(model, prompts, query)
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                at = query, layer, head
                scores, weights, sink, v, q, k = plain.head(layer, head)
                masses = [sink, *(weights[group].sum() for group in plain.groups[1:])]
                assert close(got.mass[at], np.array(masses))
                w = weights[plain.demonstrations].sum()
                assert close(got.demonstration_mass[at], np.array(w))
                z_0 = weights[plain.others] @ v[plain.others] / (1 - w)
                z = weights @ v
                scale = float(np.abs(z).max())
                assert close(got.z_0[at], z_0, scale)
                assert close(got.from_start[at], weights[:1] @ v[:1] / (1 - w), scale)
                assert close(got.delta_icl[at], z - z_0, scale)
                linear = np.where(np.isinf(scores), 0.0, k @ q)
                update, output = linear[plain.demonstrations] @ v[plain.demonstrations], linear @ v
                for name, relaxed, truth in (("update", update, z - z_0), ("output", output, z)):
                    cosine = relaxed @ truth / np.linalg.norm(relaxed) / np.linalg.norm(truth)
                    error = np.linalg.norm(relaxed - truth) / np.linalg.norm(truth)
                    assert close(getattr(got.relaxation, f"{name}_cosine")[at], np.array(cosine), 10.0)
                    assert getattr(got.relaxation, f"{name}_error")[at].item() == pytest.approx(error, rel=1e-3)
                seen = [key for key in plain.demonstrations if not np.isinf(scores[key])]
                found: Any = stats.spearmanr(scores[seen], np.abs(linear[seen])) if len(seen) > 2 else None
                if found is not None:
                    assert got.relaxation.rank_agreement[at].item() == pytest.approx(found.statistic, abs=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptoss-window"])
def test_realised_is_direct_plus_inherited_and_shares_sum_to_one(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    icl_run, zsl = runs(model, build(model, task))
    got = icl.decompose(model, zero_shot=zsl, in_context=icl_run)
    assert icl_run.attn_out is not None
    assert zsl.attn_out is not None
    torch.testing.assert_close(got.realised.float(), icl_run.attn_out - zsl.attn_out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.direct_share + got.inherited_share, torch.ones(4, 3).double())
    torch.testing.assert_close(got.icl_share.sum(-1), torch.ones(4, 3).double())
    torch.testing.assert_close(got.mass.sum(-1), torch.ones(4, 3, 4).double())
    torch.testing.assert_close(got.through_W_O(got.delta_icl).sum(2), got.direct)


def test_each_demonstrations_share_is_its_own_part_of_the_direct_update(llama: icl.Model, task: icl.Task) -> None:
    prompts = build(llama, task)
    got = decomposed(llama, prompts)
    W_O = llama.output_projections()[0].double().numpy()
    plain = Reference(llama, prompts, 2)
    for layer in range(llama.n_layers):
        outs = np.zeros((len(plain.groups), llama.d_model))
        for head in range(llama.n_heads):
            _, weights, _, v, _, _ = plain.head(layer, head)
            z_0 = weights[plain.others] @ v[plain.others] / weights[plain.others].sum()
            for group in range(3, len(plain.groups)):
                for key in plain.groups[group]:
                    outs[group] += weights[key] * (v[key] - z_0) @ W_O[layer, head]
        direct = outs.sum(0)
        assert close(got.icl_share[2, layer], outs @ direct / (direct @ direct))
        assert close(got.direct[2, layer], direct)


def test_gpt2_in_float64_is_exact_to_its_own_rounding(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("gpt2", torch.float64)
    assert decomposed(model, build(model, task)).residual <= 1e-12


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, EXACT), (torch.bfloat16, 1e-2)])
def test_the_real_model_is_exact_behind_32_demonstrations(dtype: torch.dtype, rounding: float) -> None:
    model, task = icl.load_model("smollm2-135m", dtype=dtype), icl.load_task("sst2")
    got = decomposed(model, icl.build_prompts(model, task, task.demonstrations(32, seed=1), task.queries(6)))
    assert got.residual <= rounding


# Bloom is refused (its rounded biases), OLMo2's norms do not run on their bridge.
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("bloom", "olmo2")])
def test_half_precision_is_split_in_more_than_its_own(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str
) -> None:
    model = make_model(architecture, torch.bfloat16)
    assert decomposed(model, build(model, task)).residual <= 1e-2


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_b_v_sits_inside_the_groups(make_model: Callable[..., icl.Model], task: icl.Task, architecture: str) -> None:
    """What b_V makes is what is missing once it is taken out of the values, at weights left as they are."""
    model = make_model(architecture, torch.float64)
    got = decomposed(model, build(model, task))
    assert (got.b_V is None) == (architecture == "llama")
    assert (got.b_O is None) == (architecture == "llama")
    whole = torch.zeros(4, 4, 8).double() if got.b_V is None else got.b_V[1].expand(4, 4, 8)
    torch.testing.assert_close(got.value_bias[:, 1], whole)


def test_a_sink_has_no_part_of_b_v(models_by_architecture: Callable[[str], icl.Model], task: icl.Task) -> None:
    model = models_by_architecture("gptoss-window")
    got = decomposed(model, build(model, task))
    assert got.b_V is not None
    sink = got.mass[..., GROUPS.index("sink")]
    assert (sink > 0).all()
    expected = (1 - sink[..., None]) * got.b_V.repeat_interleave(2, dim=1)
    torch.testing.assert_close(got.value_bias, expected)


def test_momentum_of_b_v_begins_at_the_first_token(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task
) -> None:
    """At an η that has not decayed over the whole prompt."""
    model = models_by_architecture("gpt2")
    prompts = build(model, task, k=1, n=2)
    with icl.momentum_attention(model, 0.99):
        got = decomposed(model, prompts)
    assert got.b_V is not None
    for query, suffix in enumerate(prompts.suffixes):
        times = 1 + sum(0.99**distance for distance in range(1, len(prompts.prefix) + len(suffix)))
        torch.testing.assert_close(got.value_bias[query], times * got.b_V)


def test_without_demonstrations_nothing_is_added(llama: icl.Model, llama_runs: tuple[icl.Capture, icl.Capture]) -> None:
    _, zsl = llama_runs
    got = icl.decompose(llama, zero_shot=zsl, in_context=zsl)
    for nothing in (got.delta_icl, got.direct, got.demonstration_mass):
        assert (nothing == 0).all()
    assert got.inherited.abs().max() < 1e-5
    assert got.direct_share.isnan().all()
    assert got.inherited_share.isnan().all()
    assert got.groups == GROUPS
    for undefined in (got.icl_share[..., -1], got.relaxation.update_cosine, got.relaxation.rank_agreement):
        assert undefined.isnan().all()
    assert "0 demonstrations" in repr(got)


def test_demonstrations_before_the_window_add_nothing(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task
) -> None:
    model = models_by_architecture("mistral-window")
    rows = [{**row, "text": f"{row['text']} " * 20 + "."} for row in make_rows()]
    long = icl.Task("long", task.template, ("no", "perhaps"), rows)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), long.queries(2))
    windows = [rule.window for rule in model.attention_rules]
    assert all(window is not None and len(suffix) > window for suffix in prompts.suffixes for window in windows)
    got = decomposed(model, prompts)
    assert got.residual <= EXACT
    for nothing in (got.delta_icl, got.direct, got.demonstration_mass):
        assert (nothing == 0).all()
    torch.testing.assert_close(got.mass.sum(-1), torch.ones_like(got.mass[..., 0]))


def test_groups_are_named_in_order(split: icl.Decomposition) -> None:
    assert split.groups == ("sink", "start", "query", "separators", *(f"demonstration {n}" for n in (1, 2, 3, 4)))
    assert split.mass.shape[-1] == split.icl_share.shape[-1] == len(split.groups)


def test_tables_and_tensors_by_demonstration_are_labelled(split: icl.Decomposition) -> None:
    masses: Any = split.masses()
    shares: Any = split.shares()
    assert (masses.shape, shares.shape) == ((7 * 3 * 4, 8), (7 * 3, 8))
    assert list(shares.columns) == list(masses.columns) == list(split.groups)
    assert (masses.index.names, shares.index.names) == (["query", "layer", "head"], ["query", "layer"])
    assert masses.loc[(5, 1, 2), "demonstration 3"] == split.mass[5, 1, 2, 6].item()
    assert masses.loc[(5, 1, 2), "start"] == split.mass[5, 1, 2, GROUPS.index("start")].item()
    assert shares.loc[(6, 2), "demonstration 4"] == split.icl_share[6, 2, 7].item()
    assert shares.loc[(6, 2), "separators"] == split.icl_share[6, 2, GROUPS.index("separators")].item()
    assert split.share_by_demonstration.shape == (7, 3, 4)
    assert split.mass_by_demonstration.shape == (7, 3, 4, 4)
    for n in range(4):
        assert (split.share_by_demonstration[..., n].flatten().numpy() == shares[f"demonstration {n + 1}"]).all()
        assert (split.mass_by_demonstration[..., n].flatten().numpy() == masses[f"demonstration {n + 1}"]).all()
    largest = split.share_by_demonstration[0, 0].argmax().item()
    assert shares.loc[(0, 0)].filter(like="demonstration").idxmax() == f"demonstration {largest + 1}"


@pytest.mark.parametrize("eta", [None, 0.6])
@pytest.mark.parametrize(
    ("architecture", "protocol"),
    [(name, "answer") for name in ("gpt2", "llama", "mistral-window", "gemma2-window", "gptoss-window", "bloom")]
    + [("llama", "reference")],
)
def test_attention_by_token_is_that_of_a_plain_full_prompt(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    architecture: str,
    protocol: str,
    eta: float | None,
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task if protocol == "answer" else reference_task)
    with contextlib.nullcontext() if eta is None else icl.momentum_attention(model, eta):
        got, plain = decomposed(model, prompts), Reference(model, prompts, 1)
    W_O = model.output_projections()[0].double().numpy()
    for layer in range(model.n_layers):
        outs, tables = [], []
        for head in range(model.n_heads):
            _, weights, _, v, _, _ = plain.head(layer, head)
            table: Any = got.by_token(1, layer, head)
            assert table["position"].tolist() == list(range(len(weights)))
            assert tuple(table["token"]) == prompts.prefix + prompts.suffixes[1]
            assert close(torch.tensor(table["weight"]), weights)
            assert table["weight"].sum() + got.mass[1, layer, head, 0].item() == pytest.approx(1.0)
            for name, keys in zip(got.groups[1:], plain.groups[1:], strict=True):
                rows = table[table["group"] == name]
                assert rows["position"].tolist() == keys
                assert rows["weight"].sum() == pytest.approx(got.masses().loc[(1, layer, head), name], abs=1e-6)
            decays = np.array([(eta or 0.0) ** (len(v) - 1 - at) if at < len(v) - 1 else 0.0 for at in range(len(v))])
            z_0 = weights[plain.others] @ v[plain.others] / (1 - weights[plain.demonstrations].sum())
            terms = weights[:, None] * (v - z_0) + decays[:, None] * v
            terms[plain.others] = 0.0
            outs.append(terms @ W_O[layer, head])
            tables.append(table)
        direct = np.sum(outs, axis=(0, 1))
        for out, table in zip(outs, tables, strict=True):
            assert close(torch.tensor(table["icl_share"]), out @ direct / (direct @ direct))
        by_group: Any = pd.concat(tables).groupby("group")["icl_share"].sum()
        for name, share in got.shares().loc[(1, layer)].items():
            assert by_group.get(name, 0.0) == pytest.approx(share, abs=1e-6)


def test_attention_by_token_counts_negative_indices_from_the_end_and_refuses_others(
    llama: icl.Model, llama_runs: tuple[icl.Capture, icl.Capture], split: icl.Decomposition, tmp_path: Path
) -> None:
    assert split.by_token(-1, -2, -3).equals(split.by_token(6, 1, 1))
    for indices, message in (
        ((7, 0, 0), "query from 0 to 6, got 7"),
        ((0, -4, 0), "layer .* got -4"),
        ((0, 0, 4), "head"),
    ):
        with pytest.raises(IndexError, match=message):
            split.by_token(*indices)
    nothing = icl.decompose(llama, **dict.fromkeys(("zero_shot", "in_context"), llama_runs[1]))
    table: Any = nothing.by_token(0, 0, 0)
    assert set(table["group"]) == {"start", "query"}
    assert table["weight"].sum() == pytest.approx(1.0)
    split.save(tmp_path / "split")
    with pytest.raises(ValueError, match="expected a decomposition with attention_inputs, got one that was loaded"):
        icl.Decomposition.load(tmp_path / "split").by_token(0, 0, 0)


def test_the_keys_kept_for_tokens_are_the_captures_own(llama: icl.Model, prompts: Prompts) -> None:
    in_context, zero_shot = runs(llama, prompts)
    inputs = decompose_runs(llama, in_context, zero_shot).attention_inputs
    assert inputs is not None
    assert in_context.keys_values is not None
    for name in ("query_keys", "demo_keys", "demo_values"):
        assert getattr(inputs, name) is getattr(in_context.keys_values, name)
    assert inputs.q_scored is in_context.q_scored


@pytest.mark.parametrize("momentum", [False, True])
def test_a_decomposition_that_version_0_1_saved_is_loaded(
    llama: icl.Model, prompts: Prompts, tmp_path: Path, momentum: bool
) -> None:
    with icl.momentum_attention(llama, 0.5) if momentum else contextlib.nullcontext():
        got = decomposed(llama, prompts)
    got.save(tmp_path / "split")
    tensors, metadata = load_tensors(tmp_path / "split")
    old_names = {"from_start": "start", "from_query": "query", "residuals/full_prompt": "residuals/plain"}
    old_names |= {"momentum/start_and_query": "momentum/own"}
    tensors = {old_names.get(name, name): tensor for name, tensor in tensors.items()}
    assert {"start", "query", "residuals/plain"} <= tensors.keys()
    assert ("momentum/own" in tensors) == momentum
    save_tensors(tmp_path / "old", tensors, {name: metadata[name] for name in ("model", "prompts")})
    loaded = icl.Decomposition.load(tmp_path / "old")
    assert torch.equal(loaded.z, got.z)
    assert torch.equal(loaded.residuals.full_prompt, got.residuals.full_prompt)
    assert loaded.prompts == got.prompts
    assert loaded.to_frame().equals(got.to_frame())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_decomposition_is_saved_and_loaded(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task, architecture: str, tmp_path: Path
) -> None:
    model = models_by_architecture(architecture)
    got = decomposed(model, build(model, task))
    got.save(tmp_path / "split")
    loaded = icl.Decomposition.load(tmp_path / "split")
    assert loaded.to_frame().equals(got.to_frame())
    assert loaded.prompts == got.prompts
    assert torch.equal(loaded.direct, got.direct)
    assert torch.equal(loaded.value_bias, got.value_bias)
    assert loaded.residual == got.residual
    assert re.match(r"Residuals\(split=\d.*: the largest of 3 layers\)", repr(got.residuals))


def test_something_else_than_a_decomposition_is_not_loaded(
    llama: icl.Model, prompts: Prompts, split: icl.Decomposition, tmp_path: Path
) -> None:
    icl.finetune(llama, prompts, lr=0.05, progress=False).save(tmp_path / "delta")
    split.save(tmp_path / "split")
    for kind, folder in ((icl.Decomposition, "delta"), (icl.WeightDelta, "split"), (icl.UpdateComparison, "split")):
        with pytest.raises(icl.AssetError, match=f"expected a saved {kind.__name__} in .*{folder}, got "):
            kind.load(tmp_path / folder)
    with pytest.raises(
        icl.AssetError, match=r"expected a folder with tensors\.safetensors .*, got .*none, which does not"
    ):
        icl.Decomposition.load(tmp_path / "none")


def test_a_frame_is_tidy(
    llama: icl.Model, llama_runs: tuple[icl.Capture, icl.Capture], split: icl.Decomposition
) -> None:
    frame = split.to_frame()
    assert len(frame.query("metric == 'demonstration_mass'")) == 3 * 4
    row = frame.query("metric == 'start_mass' and layer == 1 and head == 2").iloc[0]
    assert row["mean"] == pytest.approx(split.mass[:, 1, 2, 1].mean().item())
    shares = frame.query("metric == 'direct_share'")
    assert shares["head"].isna().tolist() == [True] * 3
    assert shares["mean"].tolist() == pytest.approx(split.direct_share.mean(0).tolist())
    assert shares["n"].tolist() == [7, 7, 7]
    undefined = decompose_runs(llama, *[llama_runs[1]] * 2).to_frame()
    cosines = undefined.query("metric == 'update_cosine'")
    assert cosines["mean"].isna().tolist() == [True] * 12
    assert cosines["n"].tolist() == [0] * 12


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "other"}, ValueError, "expected captures of the model given"),
        ({"fingerprint": "0"}, ValueError, "got other weights"),
        ({"keys_values": None}, ValueError, "without 'keys_values'"),
        ({"q_scored": None}, ValueError, "without 'q_scored'"),
        ({"attn_out": lambda t: t * 1.001}, icl.UnsupportedModelError, r"layer 0: .* \\(split\\)"),
        ({"z": lambda t: t * 1.001}, icl.UnsupportedModelError, r"layer 0: .* \(split\)"),
        ({"q_scored": lambda t: t.roll(1, 2)}, icl.UnsupportedModelError, r"layer 0: .* \\(split\\)"),
    ],
)
def test_captures_that_do_not_belong_together_are_refused(
    llama: icl.Model, llama_runs: tuple[icl.Capture, icl.Capture], change: dict, error: type[Exception], message: str
) -> None:
    got, zsl = llama_runs
    change = {name: new(getattr(got, name)) if callable(new) else new for name, new in change.items()}
    with pytest.raises(error, match=message.replace("\\\\", "\\")):
        icl.decompose(llama, zero_shot=zsl, in_context=dataclasses.replace(got, **change))


def test_a_zero_shot_capture_of_other_queries_positions_or_heads_is_refused(
    llama: icl.Model, task: icl.Task, llama_runs: tuple[icl.Capture, icl.Capture]
) -> None:
    got, zsl = llama_runs
    with pytest.raises(ValueError, match="same queries at the same positions"):
        icl.decompose(llama, zero_shot=runs(llama, build(llama, task, n=3))[1], in_context=got)
    with pytest.raises(
        ValueError, match=r"zero_shot to be without demonstrations, got .*: are in_context and zero_shot swapped"
    ):
        icl.decompose(llama, zero_shot=got, in_context=zsl)
    assert zsl.z is not None
    with pytest.raises(icl.UnsupportedModelError, match=r"layer 0: .* \(realised\)"):
        icl.decompose(llama, zero_shot=dataclasses.replace(zsl, z=zsl.z * 1.01), in_context=got)


def test_captures_of_changed_weights_are_refused(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    """Changes that no sum of sizes would show: signs, the order of heads, and what is not attention."""
    model = make_model("llama")
    prompts = build(model, task)
    got, _ = runs(model, prompts)
    hf_model: Any = model.wrapped.original_model
    layer = hf_model.model.layers[1]
    for weight, change in (
        (layer.self_attn.v_proj.weight, lambda w: -w),
        (layer.self_attn.q_proj.weight, lambda w: w.roll(8, 0)),
        (layer.mlp.down_proj.weight, lambda w: 3 * w),
        (layer.input_layernorm.weight, lambda w: w + 1e-3),
    ):
        before = weight.data.clone()
        weight.data.copy_(change(before))
        with pytest.raises(ValueError, match="got other weights"):
            icl.decompose(model, zero_shot=runs(model, prompts)[1], in_context=got)
        weight.data.copy_(before)


@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_a_run_that_is_not_a_plain_pass_over_the_prompt_is_refused(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Keys kept in the wrong places add up within the captured run, and only there."""
    model = make_model(architecture)
    prompts = build(model, task)
    _, zsl = runs(model, prompts)
    module = capture_module
    run_prefix = module.run_prefix

    def rolled(*args: Any, **options: Any) -> Any:
        prefix, plain = run_prefix(*args, **options)
        return dataclasses.replace(prefix, keys=[keys.roll(3, 1) for keys in prefix.keys]), plain

    monkeypatch.setattr(module, "run_prefix", rolled)
    wrong = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    with pytest.raises(icl.UnsupportedModelError, match=r"layer 0: .* \(run\) .* not a plain forward pass"):
        icl.decompose(model, zero_shot=zsl, in_context=wrong)


def test_a_capture_relabelled_with_other_demonstrations_is_refused(llama: icl.Model, task: icl.Task) -> None:
    got, zsl = runs(llama, prompts := build(llama, task))
    other = dataclasses.replace(prompts, demonstrations=prompts.demonstrations[::-1])
    with pytest.raises(ValueError, match="full_prompt over the first query's prompt"):
        icl.decompose(llama, zero_shot=zsl, in_context=dataclasses.replace(got, prompts=other))


def test_decomposing_runs_no_model(
    llama: icl.Model, llama_runs: tuple[icl.Capture, icl.Capture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.wrapped, "forward", None)
    assert decompose_runs(llama, *llama_runs).residual <= EXACT


@pytest.mark.parametrize("hooked", [(True, True, False), (True, False, False), (False, False, True)])
def test_captures_under_hooks_that_are_not_on_now_are_refused(
    make_model: Callable[..., icl.Model], task: icl.Task, hooked: tuple[bool, bool, bool]
) -> None:
    """One of the user's own, on in context, in the zero-shot run, or while it is decomposed."""
    model = make_model("llama")
    prompts, hook = build(model, task), ("blocks.0.hook_out", lambda tensor, hook: tensor / 2)

    def under(on: bool) -> Any:
        return model.wrapped.hooks(fwd_hooks=[hook] if on else [])

    with under(hooked[0]):
        in_context = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    with under(hooked[1]):
        zsl = icl.capture(model, prompts.zero_shot(), fields=icl.DECOMPOSE_FIELDS, progress=False)
    with under(hooked[2]), pytest.raises(ValueError, match="with the hooks that are on the model now, got others"):
        icl.decompose(model, zero_shot=zsl, in_context=in_context)
    with under(True):
        assert decompose_runs(model, *runs(model, prompts)).residual <= EXACT


def test_a_plain_pass_that_does_not_split_is_refused(
    llama: icl.Model, llama_runs: tuple[icl.Capture, icl.Capture]
) -> None:
    got, zsl = llama_runs
    assert got.full_prompt is not None
    with pytest.raises(icl.UnsupportedModelError, match=r"layer 0: .* \(full_prompt\)"):
        icl.decompose(
            llama,
            zero_shot=zsl,
            in_context=dataclasses.replace(got, full_prompt=got.full_prompt._replace(v=1.01 * got.full_prompt.v)),
        )


def test_captures_within_a_delta_are_not_decomposed_outside_of_it(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama")
    prompts = build(model, task)
    delta = icl.finetune(model, prompts, lr=0.05, progress=False)
    with delta.applied(model):
        tuned = runs(model, prompts)
        assert decompose_runs(model, *tuned).residual <= EXACT
    with pytest.raises(ValueError, match="got other weights"):
        decompose_runs(model, *tuned)


@pytest.mark.parametrize(
    "hook", ["attn.hook_z", "attn.o.hook_out", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v"]
)
def test_a_corrupted_hook_is_refused_never_decomposed_wrongly(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    """A hook that shows what the model does not compute with: off by 1 % for those who look on."""
    model = make_model("llama")
    prompts = build(model, task)
    runs(model, prompts)
    point = model.wrapped.hook_dict[f"blocks.1.{hook}"]
    add_hook, corrupted = point.add_hook, {}

    def add_corrupted(hook_fn: Callable, *args, **kwargs):
        corrupted[hook_fn] = lambda tensor, hook: hook_fn(tensor * 1.01, hook=hook)
        return add_hook(corrupted[hook_fn], *args, **kwargs)

    monkeypatch.setattr(point, "add_hook", add_corrupted)
    monkeypatch.setattr(
        "icl_dual.models.model.remove_hook", lambda module, hook: remove_hook(module, corrupted.get(hook, hook))
    )
    for known in (model.pass_residual, None):  # None of a model that is captured for the first time
        model.pass_residual = known
        with pytest.raises(icl.UnsupportedModelError, match="layer 1"):
            decomposed(model, prompts)


@pytest.mark.parametrize(
    "architecture",
    [name for name in ARCHITECTURES if name in ("gpt2", "llama", "gptoss-window", "bloom", "hooked-gemma2-window")],
)
def test_momentum_is_split_by_whose_values_it_sums(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task, architecture: str
) -> None:
    model, eta = models_by_architecture(architecture), some_eta()
    prompts = build(model, task)
    with icl.momentum_attention(model, eta):
        icl_run, zsl = runs(model, prompts)
        got, plain = icl.decompose(model, zero_shot=zsl, in_context=icl_run), Reference(model, prompts, 2)
    assert got.residual <= EXACT
    assert got.momentum is not None
    assert icl_run.attn_out is not None
    assert zsl.attn_out is not None
    torch.testing.assert_close(got.momentum.eta, eta)
    torch.testing.assert_close(got.realised.float(), icl_run.attn_out - zsl.attn_out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.direct_share + got.inherited_share, torch.ones(4, 3).double())
    W_O = model.output_projections()[0].double().numpy()
    for layer in range(model.n_layers):
        outs = np.zeros((len(plain.groups), model.d_model))
        for head in range(model.n_heads):
            at = 2, layer, head
            scores, weights, sink, v, q, k = plain.head(layer, head)
            t, decay = len(v) - 1, eta[layer, head].item()
            decays = np.array([decay ** (t - i) if i < t else 0.0 for i in range(len(v))])
            z_0 = weights[plain.others] @ v[plain.others] / (1 - weights[plain.demonstrations].sum())
            own, demonstrations = (decays[group] @ v[group] for group in (plain.others, plain.demonstrations))
            scale = float(np.abs(v).max())
            assert close(got.momentum.start_and_query[at], own, scale)
            assert close(got.momentum.demonstrations[at], demonstrations, scale)
            assert close(got.delta_icl[at], weights @ v - z_0, scale)
            assert close(got.z_0[at], z_0 + own, scale)
            assert close(got.z[at], weights @ v + decays @ v, scale)
            relaxed, softmax_z = np.where(np.isinf(scores), 0.0, k @ q) @ v, weights @ v
            error = np.linalg.norm(relaxed - softmax_z) / np.linalg.norm(softmax_z)
            assert got.relaxation.output_error[at].item() == pytest.approx(error, rel=1e-3)
            norm = np.linalg.norm(decays @ v) / np.linalg.norm(weights @ v + decays @ v)
            assert got.momentum_norm[at].item() == pytest.approx(norm, rel=1e-4)
            if got.b_V is not None:
                b_V = got.b_V[layer, head // (model.n_heads // model.n_key_value_heads)].numpy()
                assert close(got.value_bias[at], (1 - sink + decays.sum()) * b_V)
            for group in range(3, len(plain.groups)):
                for key in plain.groups[group]:
                    outs[group] += (weights[key] * (v[key] - z_0) + decays[key] * v[key]) @ W_O[layer, head]
        direct = outs.sum(0)
        assert close(got.direct[2, layer], direct)
        assert close(got.icl_share[2, layer], outs @ direct / (direct @ direct))


def test_a_split_with_momentum_is_exact_in_float64_and_saved(
    make_model: Callable[..., icl.Model], task: icl.Task, tmp_path: Path
) -> None:
    model = make_model("gpt2", torch.float64)
    prompts = build(model, task)
    with icl.momentum_attention(model, 0.6, layers=[0, 2]):
        got = decomposed(model, prompts)
    assert got.residual <= 1e-12
    assert (got.momentum_norm > 0).all(-1).all(0).tolist() == [True, False, True]
    got.save(tmp_path / "split")
    loaded = icl.Decomposition.load(tmp_path / "split")
    assert loaded.to_frame().equals(got.to_frame())
    assert torch.equal(loaded.realised, got.realised)
    assert torch.equal(loaded.value_bias, got.value_bias)
    row = loaded.to_frame().query("metric == 'momentum_norm' and layer == 2 and head == 1").iloc[0]
    assert row["mean"] == pytest.approx(got.momentum_norm[:, 2, 1].mean().item())
    without = decomposed(model, prompts)
    assert without.momentum is None
    assert "momentum_norm" not in set(without.to_frame()["metric"])


@pytest.mark.parametrize(
    ("architecture", "protocol", "eta"),
    [("llama", "answer", None), ("llama", "answer", 0.6), ("gpt2", "answer", None), ("llama", "reference", None)],
)
def test_summaries_of_batches_are_those_of_all_queries_at_once(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    architecture: str,
    protocol: str,
    eta: float | None,
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task if protocol == "answer" else reference_task, n=7)
    terms: tuple[Any, ...] = get_args(Term)
    with contextlib.nullcontext() if eta is None else icl.momentum_attention(model, eta):
        whole = decomposed(model, prompts)
        got = icl.decompose_prompts(model, prompts, keep=terms, batch_size=3, progress=False)
    names = ("mass", "icl_share", "direct_share", "inherited_share", "demonstration_mass", *terms)
    pairs = [(getattr(got, name), getattr(whole, name)) for name in names]
    pairs += [*zip(got.relaxation, whole.relaxation, strict=True), *zip(got.residuals, whole.residuals, strict=True)]
    by_head, by_layer = ("delta_icl", "z_0", "z"), ("direct", "inherited", "realised")
    pairs += [(getattr(got, f"{name}_norm"), getattr(whole, name).norm(dim=-1)) for name in (*by_head, *by_layer)]
    for summary, expected in pairs:
        torch.testing.assert_close(summary, expected, atol=1e-6, rtol=1e-5, equal_nan=True)
    pd.testing.assert_frame_equal(got.to_frame(), whole.to_frame(), atol=1e-6, rtol=1e-5)
    pd.testing.assert_frame_equal(got.masses(), whole.masses(), atol=1e-6)
    pd.testing.assert_frame_equal(got.shares(), whole.shares(), atol=1e-6, rtol=1e-5)
    assert (got.momentum_norm is None) == (eta is None)
    assert got.residual <= EXACT
    assert "terms: from_start" in repr(got)
    assert "‖inherited‖" in got._repr_html_()


def test_terms_that_were_not_requested_are_none_and_unknown_ones_are_refused(llama: icl.Model, task: icl.Task) -> None:
    prompts = build(llama, task)
    got = icl.decompose_prompts(llama, prompts, keep=("z_0",), progress=False)
    assert [name for name in get_args(Term) if getattr(got, name) is not None] == ["z_0"]
    unknown: Any = ("mass_of_tokens",)
    with pytest.raises(icl.ArgumentError, match="mass_of_tokens"):
        icl.decompose_prompts(llama, prompts, keep=unknown, progress=False)


def test_batches_that_do_not_add_up_are_refused(
    llama: icl.Model, task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a later batch too, by its first layer."""
    run = capture_module.BatchedCapture.run

    def run_wrongly(self: Any, queries: Any) -> icl.Capture:
        captured = run(self, queries)
        assert captured.z is not None
        is_later = 0 not in queries and self.prompts.demonstrations
        return dataclasses.replace(captured, z=captured.z * 1.01) if is_later else captured

    monkeypatch.setattr(capture_module.BatchedCapture, "run", run_wrongly)
    with pytest.raises(icl.UnsupportedModelError, match=r"layer 0: expected terms that add up"):
        icl.decompose_prompts(llama, build(llama, task), batch_size=2, progress=False)


def test_a_batch_of_a_summary_that_does_not_fit_is_halved(
    llama: icl.Model, task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, run = build(llama, task, n=7), llama.run

    def summary() -> icl.DecompositionSummary:
        return icl.decompose_prompts(llama, prompts, keep=("z",), batch_size=7, progress=False)

    def fits_two(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tokens, **options)

    monkeypatch.setattr(shared_prefix, "BATCH_OVERHEAD", 10_000)  # as few batches as may be
    expected = summary()
    monkeypatch.setattr(llama, "run", fits_two)
    got = summary()
    torch.testing.assert_close(got.z, expected.z, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(got.to_frame(), expected.to_frame(), rtol=1e-4, atol=1e-6)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that torch has made and that are alive, and keeps their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self.live.get(storage._cdata)
                if known is None or known[0].expired():
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.total += storage.nbytes()
        if self.total > self.peak:  # an upper bound: what has been freed is subtracted only when it matters
            self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
            self.total = sum(n_bytes for _, n_bytes in self.live.values())
            self.peak = max(self.peak, self.total)
        return out


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak of a call's tensors; dispatch modes count one thread, so that layers are split on it."""
    one_by_one = mock.patch.object(ThreadPoolExecutor, "map", lambda pool, f, *inputs: map(f, *inputs))
    with one_by_one, LiveBytes() as memory:
        run()
    return memory.peak


def test_memory_does_not_grow_with_queries_but_for_the_summaries(task: icl.Task) -> None:
    model = tiny_model()
    rows = [{"text": f"film number {100 + i}", "label": i % 2} for i in range(300)]
    films = icl.Task("films", task.template, task.label_words, rows)
    few, many = (build(model, films, n=n) for n in (20, 100))
    icl.capture(model, few, progress=False)  # a model's first capture checks it, too

    def streamed(prompts: Prompts) -> icl.DecompositionSummary:
        return icl.decompose_prompts(model, prompts, batch_size=20, progress=False)

    summary = streamed(many)
    tensors = [*vars(summary).values(), *summary.relaxation, *summary.residuals]
    kept = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    grown = peak_bytes(lambda: streamed(many)) - peak_bytes(lambda: streamed(few))
    assert grown <= 1.5 * kept
    whole = peak_bytes(lambda: decomposed(model, many, 20)) - peak_bytes(lambda: decomposed(model, few, 20))
    assert whole > 5 * max(grown, kept)
