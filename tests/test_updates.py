import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import icl_dual as icl
from icl_dual.finetuning import sgd
from icl_dual.prompts import Prompts
from icl_dual.storage import load_tensors, save_tensors

LR = 0.05
RANK = 2


@dataclasses.dataclass
class Runs:
    model: icl.Model
    prompts: Prompts
    in_context: icl.Capture
    zsl: icl.Capture
    delta: icl.WeightDelta

    def compare(self, **changes) -> icl.UpdateComparison:
        given = {
            "model": self.model,
            "in_context": self.in_context,
            "zero_shot": self.zsl,
            "delta": self.delta,
            "rank": RANK,
        } | changes
        return icl.compare_updates(**given, progress=False)


def make_runs(model: icl.Model, task: icl.Task, n: int = 4) -> Runs:
    prompts = icl.build_prompts(model, task, task.demonstrations(5, seed=1), task.queries(n))
    in_context, zsl = (
        icl.capture(model, which, fields=icl.DECOMPOSE_FIELDS, progress=False)
        for which in (prompts, prompts.zero_shot())
    )
    return Runs(model, prompts, in_context, zsl, icl.finetune(model, prompts, lr=LR, progress=False))


@pytest.fixture(scope="module")
def llama_runs(make_model: Callable[..., icl.Model], task: icl.Task) -> Runs:
    return make_runs(make_model("llama"), task)


def linear_layers(model: icl.Model) -> list[list[Any]]:
    """The layers that a bridge runs for keys and values, by layer."""
    attentions = [block.attn for block in model.wrapped.blocks]
    return [[part.original_component for part in (attn.k, attn.v)] for attn in attentions]


def equation_13(runs: Runs, query: int) -> list[np.ndarray]:
    """ΔW_FT at every layer as the paper writes it: from X, the untuned inputs to each layer's projections."""
    model, prompts = runs.model, runs.prompts
    X: list[torch.Tensor] = []
    projections = linear_layers(model)
    hooks = [key.register_forward_pre_hook(lambda module, args: X.append(args[0][0])) for key, _ in projections]
    with torch.no_grad():
        model.run(torch.tensor([[*prompts.start, *prompts.suffixes[query]]]))
    for hook in hooks:
        hook.remove()
    found = []
    for layer, (x, pair) in enumerate(zip(X, projections, strict=True)):
        shape = len(x), model.n_key_value_heads, model.d_head
        k, v = (projection(x).detach().view(shape) for projection in pair)
        delta_k, delta_v = (
            (x @ W[layer].mT + (0 if b is None else b[layer])).view(shape)
            for W, b in ((runs.delta.W_K, runs.delta.b_K), (runs.delta.W_V, runs.delta.b_V))
        )
        tuned_k = k + delta_k
        rotary = getattr(getattr(model.wrapped.original_model, "model", None), "rotary_emb", None)
        if rotary is not None:  # where the query stands in context, from transformers' own formula
            positions = len(prompts.prefix) - 1 + torch.arange(len(x))[None]
            cos, sin = rotary(x, positions)
            k, tuned_k = (
                apply_rotary_pos_emb(t.transpose(0, 1)[None], t.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)
                for t in (k, tuned_k)
            )
        k, v, tuned_k, tuned_v = (t.double().numpy() for t in (k, v, tuned_k, v + delta_v))
        window = model.attention_rules[layer].window
        seen = slice(0 if window is None else max(0, len(x) - window), None)
        found.append(
            np.einsum("jhv,jhk->hvk", tuned_v[seen], tuned_k[seen]) - np.einsum("jhv,jhk->hvk", v[seen], k[seen])
        )
    return found


@pytest.mark.parametrize(
    ("architecture", "protocol"),
    [("llama", "answer"), ("mistral-window", "answer"), ("gpt2", "answer"), ("xglm", "answer"), ("llama", "reference")],
)
def test_every_number_is_that_of_the_matrices_written_out(
    make_model: Callable[..., icl.Model], task: icl.Task, reference_task: icl.Task, architecture: str, protocol: str
) -> None:
    hold_to_matrices(make_runs(make_model(architecture), task if protocol == "answer" else reference_task))


def test_with_momentum_too_every_number_is_that_of_the_matrices(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    with icl.momentum_attention(make_model("llama"), 0.6) as model:
        hold_to_matrices(make_runs(model, task))


def hold_to_matrices(runs: Runs) -> None:
    model, prompts, kept = runs.model, runs.prompts, runs.in_context.keys_values
    assert kept is not None
    assert runs.in_context.q_scored is not None
    got = runs.compare()
    assert got.residual < 1e-5
    group = model.n_heads // model.n_key_value_heads
    n_prefix = len(prompts.prefix)
    for query in (0, 3):
        W_FT = equation_13(runs, query)
        at = n_prefix + len(prompts.suffixes[query]) - 1
        for layer in range(model.n_layers):
            window = model.attention_rules[layer].window
            seen = slice(0 if window is None else max(0, at - window + 1 - len(prompts.start)), None)
            k, v = (t[layer, seen].double().numpy() for t in (kept.demo_keys, kept.demo_values))
            for head in range(model.n_key_value_heads):
                A, B = v[:, head].T @ k[:, head], W_FT[layer][head]
                where = query, layer, head
                cosine = (A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B)
                assert got.cosine[where].item() == pytest.approx(cosine, abs=1e-4)
                ratio = np.linalg.norm(B) / np.linalg.norm(A)
                assert got.norm_ratio[where].item() == pytest.approx(ratio, rel=1e-3)
                (U_a, s_a, V_a), (U_b, s_b, V_b) = np.linalg.svd(A), np.linalg.svd(B)
                for found, S in ((got.effective_rank_icl, s_a), (got.effective_rank_ft, s_b)):
                    p = S / S.sum()
                    assert found[where].item() == pytest.approx(np.exp(-(p * np.log(p + 1e-300)).sum()), rel=1e-3)
                for found, a, b in ((got.left_angles, U_a, U_b), (got.right_angles, V_a.T, V_b.T)):
                    expected = np.rad2deg(np.sort(subspace_angles(a[:, :RANK], b[:, :RANK])))
                    np.testing.assert_allclose(found[where], expected, atol=0.2)
                for index in range(head * group, (head + 1) * group):
                    q = runs.in_context.q_scored[query, layer, index].double().numpy()
                    a, b = A @ q, B @ q
                    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                    assert got.action_cosine[query, layer, index].item() == pytest.approx(cosine, abs=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_float64_models_are_compared_although_their_angles_are_float32(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str
) -> None:
    single, double = (
        make_runs(make_model(architecture, dtype), task).compare() for dtype in (torch.float32, torch.float64)
    )
    assert double.residual < 1e-5
    torch.testing.assert_close(double.cosine, single.cosine, atol=1e-3, rtol=0)


def test_the_windowed_model_tested_has_lost_demonstrations(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    runs = make_runs(make_model("mistral-window"), task)
    assert all((s.window or 0) < len(runs.prompts.prefix) for s in runs.model.attention_rules)


def test_demonstrations_out_of_sight_leave_nothing_to_compare(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    """A query longer than the window: ΔW_ICL is 0, and no ratio to it is a number."""
    rows = [{"text": " ".join(["film"] * 45) + f" {i}", "label": i % 2} for i in range(40)]
    long = icl.Task("long", task.template, task.label_words, rows)
    runs = make_runs(make_model("mistral-window"), long, n=2)
    assert min(map(len, runs.prompts.queries)) > 40
    got = runs.compare()
    for undefined in (got.norm_ratio, got.cosine, got.left_angles, got.action_cosine, got.effective_rank_icl):
        assert undefined.isnan().all()
    assert got.effective_rank_ft.isfinite().all()


def test_queries_are_compared_in_batches_without_changing_a_number(
    llama_runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama_runs.compare()
    monkeypatch.setattr(sys.modules["icl_dual.updates"], "BATCH_SIZE", 3)
    for name in ("cosine", "left_angles", "action_cosine", "effective_rank_ft"):
        torch.testing.assert_close(getattr(llama_runs.compare(), name), getattr(whole, name), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_delta_w_icl_is_decomposed_once_for_all_batches(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Once a layer where all queries have the same demonstrations in sight; ΔW_FT, of each query, once a batch."""
    runs = make_runs(make_model(architecture), task)
    monkeypatch.setattr(sys.modules["icl_dual.updates"], "BATCH_SIZE", 1)
    decomposed: list[torch.Tensor] = []
    of = icl.dual.Svd.of
    monkeypatch.setattr(icl.dual.Svd, "of", lambda W: decomposed.append(W) or of(W))
    got = runs.compare()
    expected = 0
    for layer in range(runs.model.n_layers):
        matrices = [[got.delta_W(layer, head, query) for head in (0, 2)] for query in range(4)]
        changes = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(matrices)]
        expected += 1 + changes.count(False)
    assert len(decomposed) == 4 * runs.model.n_layers + expected
    assert (expected > runs.model.n_layers) == (architecture == "mistral-window")


def test_mlps_run_once_for_both_passes_and_come_back_as_they_were(
    llama_runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another library has wrapped a linear layer's forward, as accelerate does."""
    plain, wrapped = (layer.mlp.down_proj for layer in llama_runs.model.wrapped.original_model.model.layers[:2])
    plain, wrapped = plain.original_component, wrapped.original_component
    calls: list[torch.Size] = []
    forward = wrapped.forward
    spy = lambda x: calls.append(x.shape) or forward(x)  # noqa: E731
    monkeypatch.setattr(wrapped, "forward", spy)
    llama_runs.compare()
    lengths = [1 + len(row) for row in llama_runs.prompts.zero_shot().suffixes]
    assert [shape[:2] for shape in calls] == [(len(lengths), max(lengths))]
    assert wrapped.forward is spy
    assert "forward" not in vars(plain)


def test_batches_are_of_queries_of_similar_length(llama_runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["icl_dual.updates"], "BATCH_SIZE", 2)
    lengths = [len(row) for row in llama_runs.prompts.zero_shot().suffixes]
    assert len(set(lengths)) > 1
    batches = sys.modules["icl_dual.updates"]._batches(llama_runs.prompts)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(lengths)))
    shifts = [len(row) - alone for row, alone in zip(llama_runs.prompts.suffixes, lengths, strict=True)]
    order = [(shifts[query], lengths[query]) for query in torch.cat(batches).tolist()]
    assert order == sorted(order)


@pytest.mark.parametrize("protocol", ["answer", "reference"])
def test_a_function_vector_is_added_where_captures_add_it(
    llama_runs: Runs, task: icl.Task, reference_task: icl.Task, protocol: str
) -> None:
    """At the token that predicts each query's label, also where another query of the batch is longer, or where a label
    follows."""
    model, generator = llama_runs.model, torch.Generator().manual_seed(0)
    assert len({len(row) for row in llama_runs.prompts.suffixes}) > 1
    vector = icl.FunctionVector(model.name, model.fingerprint(), 0, torch.randn(model.d_model, generator=generator))
    with vector.applied(model):
        runs = make_runs(model, task if protocol == "answer" else reference_task)
        assert runs.compare().residual < 1e-5


def test_the_residual_is_the_largest_of_all_batches(llama_runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, residuals = sys.modules["icl_dual.updates"], iter([0.25, 0.5, 0.125, 0.0])
    run = updates._FixedInputPass.run_untuned
    monkeypatch.setattr(updates, "BATCH_SIZE", 1)
    monkeypatch.setattr(
        updates._FixedInputPass, "run_untuned", lambda self, zero_shot: (run(self, zero_shot), next(residuals))[1]
    )
    assert llama_runs.compare().residual == 0.5


def test_the_null_is_seeded_and_around_zero(llama_runs: Runs) -> None:
    one, again, other = (llama_runs.compare(seed=seed) for seed in (1, 1, 2))
    assert (one.cosine_random == again.cosine_random).all()
    assert (one.cosine_random != other.cosine_random).all()
    assert (one.cosine == other.cosine).all()
    n, d_head = one.cosine_random.numel(), 8
    assert abs(one.cosine_random.mean()) < 4 / d_head / n**0.5
    assert one.cosine_random.std().item() == pytest.approx(1 / d_head, rel=0.5)


def test_the_model_comes_back_as_it_was(llama_runs: Runs) -> None:
    before = [parameter.detach().clone() for parameter in llama_runs.model.parameters()]
    llama_runs.compare()
    assert all((now == then).all() for now, then in zip(llama_runs.model.parameters(), before, strict=True))


def test_queries_that_demonstrations_move_by_other_distances_run_at_their_own_positions(
    llama_runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, every second one has a token less in front, as a chat's turns may have."""
    model, prompts = llama_runs.model, llama_runs.prompts
    alone = tuple(query[at % 2 :] for at, query in enumerate(prompts.queries))
    prompts = dataclasses.replace(prompts, zero_shot_queries=alone)
    in_context, zsl = (
        icl.capture(model, which, fields=icl.DECOMPOSE_FIELDS, progress=False)
        for which in (prompts, prompts.zero_shot())
    )
    runs = Runs(model, prompts, in_context, zsl, llama_runs.delta)
    together = runs.compare()
    monkeypatch.setattr(sys.modules["icl_dual.updates"], "BATCH_SIZE", 1)
    torch.testing.assert_close(together.cosine, runs.compare().cosine, atol=1e-3, rtol=1e-3)


def test_a_frame_has_a_row_for_each_head(llama_runs: Runs) -> None:
    got = llama_runs.compare()
    frame = got.to_frame()
    assert len(frame.query("metric == 'cosine'")) == 3 * 2
    assert len(frame.query("metric == 'action_cosine'")) == 3 * 4
    row = frame.query("metric == 'norm_ratio' and layer == 1 and head == 1").iloc[0]
    assert row["mean"] == pytest.approx(got.norm_ratio[:, 1, 1].mean().item())
    assert row["std"] == pytest.approx(got.norm_ratio[:, 1, 1].std().item())
    angles = frame.query("metric == 'left_angles' and layer == 2 and head == 0").iloc[0]
    assert angles["mean"] == pytest.approx(got.left_angles[:, 2, 0].mean().item())
    assert "4 queries" in repr(got)


def test_a_comparison_is_saved_and_loaded(llama_runs: Runs, tmp_path: Path) -> None:
    got = llama_runs.compare()
    got.save(tmp_path / "updates")
    loaded = icl.UpdateComparison.load(tmp_path / "updates")
    assert loaded.to_frame().equals(got.to_frame())
    assert (loaded.model, loaded.rank, loaded.residual) == (got.model, got.rank, got.residual)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral-window"])
def test_delta_w_is_the_matrix_of_a_query_heads_demonstrations(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str
) -> None:
    runs = make_runs(make_model(architecture), task)
    model, keys_values = runs.model, runs.in_context.keys_values
    got = runs.compare()
    assert keys_values is not None
    group = model.n_heads // model.n_key_value_heads
    n_start, n_prefix = len(runs.prompts.start), len(runs.prompts.prefix)
    for query in (0, 3):
        at = n_prefix + len(runs.prompts.suffixes[query]) - 1
        for layer in range(model.n_layers):
            window = model.attention_rules[layer].window
            visible = [i for i in range(n_prefix - n_start) if window is None or at - (i + n_start) < window]
            assert (len(visible) < n_prefix - n_start) == (window is not None)
            for head in range(model.n_heads):
                k, v = (t[layer, :, head // group].double() for t in (keys_values.demo_keys, keys_values.demo_values))
                expected = sum(np.outer(v[i].numpy(), k[i].numpy()) for i in visible)
                W = got.delta_W(layer, head, query)
                np.testing.assert_allclose(W, expected, atol=1e-10)
                S = torch.linalg.svdvals(W)
                rank = icl.dual.effective_rank(S).item()
                assert got.effective_rank_icl[query, layer, head // group].item() == pytest.approx(rank)


def test_delta_w_counts_from_the_end_is_saved_and_refuses_other_indices(llama_runs: Runs, tmp_path: Path) -> None:
    got = llama_runs.compare()
    assert torch.equal(got.delta_W(-1, -4), got.delta_W(2, 0))
    assert torch.equal(got.delta_W(1, 2), got.delta_W(1, 3)), "query heads 2 and 3 share a key-value head"
    assert not torch.equal(got.delta_W(1, 1), got.delta_W(1, 2))
    for arguments, message in (
        ((3, 0), "layer from 0 to 2, got 3"),
        ((0, 4), "head from 0 to 3"),
        ((0, 0, 4), "query"),
    ):
        with pytest.raises(IndexError, match=message):
            got.delta_W(*arguments)
    got.save(tmp_path / "updates")
    assert torch.equal(icl.UpdateComparison.load(tmp_path / "updates").delta_W(1, 3), got.delta_W(1, 3))
    assert set(got.to_frame()["metric"]).isdisjoint({"keys", "values", "n_hidden", "demonstrations"})


def test_a_comparison_that_version_0_1_saved_is_loaded_and_has_no_delta_w(llama_runs: Runs, tmp_path: Path) -> None:
    got = llama_runs.compare()
    got.save(tmp_path / "updates")
    tensors, metadata = load_tensors(tmp_path / "updates")
    tensors = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    assert len(tensors) == 11
    save_tensors(tmp_path / "old", tensors, {name: metadata[name] for name in ("model", "rank", "residual")})
    loaded = icl.UpdateComparison.load(tmp_path / "old")
    assert loaded.to_frame().equals(got.to_frame())
    with pytest.raises(
        ValueError, match=r"got one that version 0\.1 saved without them: call icl_dual\.compare_updates"
    ):
        loaded.delta_W(0, 0)


def test_captures_and_deltas_that_do_not_belong_together_are_refused(
    llama_runs: Runs, make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    runs = llama_runs
    with pytest.raises(ValueError, match=r"delta finetuned from the weights of 'llama' .*, got one from 'other'"):
        runs.compare(delta=dataclasses.replace(runs.delta, model="other"))
    with pytest.raises(ValueError, match="delta finetuned from the weights of"):
        runs.compare(delta=dataclasses.replace(runs.delta, fingerprint="0"))
    half = make_runs(make_model("llama", torch.bfloat16), task)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16.*arithmetic=torch\.float32"):
        half.compare()
    with pytest.raises(
        ValueError, match="finetuned on the 5 demonstrations of in_context's prompts, in their order, got"
    ):
        runs.compare(delta=dataclasses.replace(runs.delta, demonstrations=[[1, 2]], losses=runs.delta.losses[:1]))
    with runs.delta.applied(runs.model), pytest.raises(ValueError, match="got other weights"):
        runs.compare()
    with pytest.raises(ValueError, match=r"prompts\.zero_shot\(\)"):
        runs.compare(zero_shot=runs.in_context)
    with pytest.raises(ValueError, match="to have demonstrations"):
        runs.compare(in_context=runs.zsl)
    other = Runs(
        make_model("llama", name="llama"), *(getattr(runs, name) for name in ("prompts", "in_context", "zsl", "delta"))
    )
    hf_model: Any = other.model.wrapped.original_model
    hf_model.model.layers[0].mlp.up_proj.weight.data.neg_()
    with pytest.raises(ValueError, match="got other weights"):
        other.compare()
    with pytest.raises(ValueError, match="delta finetuned from these weights"), runs.delta.applied(other.model):
        pass
    with pytest.raises(ValueError, match="without 'keys_values'"):
        runs.compare(in_context=dataclasses.replace(runs.in_context, keys_values=None))
    with pytest.raises(ValueError, match="rank from 1 to d_head = 8, got 9"):
        runs.compare(rank=9)
    assert runs.zsl.attn_out is not None
    moved = dataclasses.replace(runs.zsl, attn_out=runs.zsl.attn_out * 1.01)
    with pytest.raises(
        icl.UnsupportedModelError, match="layer 0: expected zero-shot prompts at in-context positions to give"
    ):
        runs.compare(zero_shot=moved)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_a_delta_is_the_sum_of_its_factors(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str
) -> None:
    """Equations 7–9 on the model itself: the tuned projection is the untuned one plus linear attention."""
    model = make_model(architecture, torch.float64)
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(1))
    delta = icl.finetune(model, prompts, lr=LR, factors=True, progress=False)
    factors = delta.factors
    assert factors is not None
    assert factors.residual < 1e-12
    assert factors.steps.bincount().tolist() == [len(tokens) + 1 for tokens in prompts.demonstrations]
    x = torch.randn(2, model.d_model, dtype=torch.float64)
    for layer, pair in enumerate(linear_layers(model)):
        for projection, errors, W in zip(pair, (factors.e_K, factors.e_V), (delta.W_K, delta.W_V), strict=True):
            torch.testing.assert_close(errors[layer].mT @ factors.x[layer], W[layer], atol=1e-13, rtol=1e-10)
            dual_form = projection(x) + icl.dual.linear_attention(x, factors.x[layer], errors[layer])
            if projection.bias is not None:
                dual_form = dual_form + errors[layer].sum(0)
            with delta.applied(model):
                torch.testing.assert_close(projection(x), dual_form, atol=1e-12, rtol=1e-10)


def test_factors_are_kept_only_where_asked_for_and_no_hook_stays(llama_runs: Runs) -> None:
    assert llama_runs.delta.factors is None
    delta = icl.finetune(llama_runs.model, llama_runs.prompts, lr=LR, factors=True, progress=False)
    torch.testing.assert_close(delta.W_K, llama_runs.delta.W_K)
    assert not any(module._forward_hooks for module in llama_runs.model.wrapped.modules())


def test_factors_that_do_not_make_up_the_delta_are_refused(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    """A layer whose values are projected from something else than its keys."""
    model = make_model("llama")
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(1))
    value = linear_layers(model)[1][1]
    handle = value.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    with pytest.raises(icl.UnsupportedModelError, match="layer 1: expected the gradient of W_V to be the sum of its"):
        icl.finetune(model, prompts, lr=LR, factors=True, progress=False)
    handle.remove()


def test_a_delta_of_all_attention_is_refused(llama_runs: Runs) -> None:
    options: dict[str, Any] = {"lr": LR, "progress": False}
    whole = icl.finetune(
        llama_runs.model, llama_runs.prompts, config=icl.FinetuneConfig(trained="attention"), **options
    )
    with pytest.raises(ValueError, match=r"expected a delta of keys and values, .* Finetune with trained='key-value'"):
        llama_runs.compare(delta=whole)
    values = icl.finetune(llama_runs.model, llama_runs.prompts, config=icl.FinetuneConfig(trained="value"), **options)
    assert llama_runs.compare(delta=values).cosine.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "wrong"), [("K", 0.0), ("V", -1.0), ("K", 1.1)])
def test_wrong_factors_are_seen_at_any_learning_rate(
    make_model: Callable[..., icl.Model],
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kind: str,
    wrong: float,
) -> None:
    model = make_model("llama", dtype)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(1))
    assert icl.finetune(model, prompts, lr=1e-6, factors=True, progress=False).factors is not None
    recorder = sgd._FactorRecorder
    keep = recorder.on_gradient
    if (dtype, wrong) == (torch.bfloat16, 1.1):
        wrong = 3.0  # bfloat16's gradients are not that sure of themselves

    def keep_wrong(self, layer: int, which: Any, x: torch.Tensor, gradient: torch.Tensor) -> None:
        keep(self, layer, which, x, gradient * wrong if which == kind else gradient)

    monkeypatch.setattr(recorder, "on_gradient", keep_wrong)
    with pytest.raises(icl.UnsupportedModelError, match=f"layer 0: expected the gradient of W_{kind}"):
        icl.finetune(model, prompts, lr=1e-6, factors=True, progress=False)


def test_a_delta_with_factors_is_saved_and_loaded(llama_runs: Runs, tmp_path: Path) -> None:
    delta = icl.finetune(llama_runs.model, llama_runs.prompts, lr=LR, factors=True, progress=False)
    delta.save(tmp_path / "delta")
    loaded = icl.WeightDelta.load(tmp_path / "delta")
    assert delta.factors is not None
    assert loaded.factors is not None
    for name, part in vars(delta.factors).items():
        assert torch.equal(torch.as_tensor(part), torch.as_tensor(getattr(loaded.factors, name)))
    assert torch.equal(delta.W_K, loaded.W_K)


def test_a_summary_says_how_much_where_and_from_which_demonstrations(llama_runs: Runs) -> None:
    delta = icl.finetune(llama_runs.model, llama_runs.prompts, lr=LR, factors=True, progress=False)
    got = icl.summarise(delta)
    factors = delta.factors
    assert factors is not None
    assert got.demonstrations_V is not None
    for layer in range(3):
        W = factors.e_V[layer].double().numpy().T @ factors.x[layer].double().numpy()
        np.testing.assert_allclose(W, delta.W_V[layer], atol=1e-5 * np.abs(W).max())
        S = np.linalg.svd(W, compute_uv=False)
        p = S / S.sum()
        assert got.norm_V[layer].item() == pytest.approx(np.linalg.norm(W))
        assert got.effective_rank_V[layer].item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        whole = (factors.e_V[layer].mT @ factors.x[layer]).double()
        for demo in range(5):
            own = factors.steps == demo
            part = (factors.e_V[layer, own].mT @ factors.x[layer, own]).double()
            share = ((part * whole).sum() / whole.norm() ** 2).item()
            assert got.demonstrations_V[layer, demo].item() == pytest.approx(share, abs=1e-5)
    torch.testing.assert_close(got.demonstrations_V.sum(1), torch.ones(3).double())
    frame = got.to_frame()
    assert len(frame.query("metric == 'demonstrations_K' and layer == 0")) == 5
    assert frame.query("metric == 'norm_K'")["demonstration"].isna().tolist() == [True] * 3
    assert icl.summarise(llama_runs.delta).demonstrations_K is None
    assert "3 layers" in repr(got)
