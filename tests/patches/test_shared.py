"""One patch for all queries: against a slow fit with plain hooks, and where it must be exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw, relative_error, seeds, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import icl_dual as icl
from icl_dual.models import tiny_model
from icl_dual.patches import Patch
from icl_dual.patches.queries import STAY, closest_through_norm

ToyModel = Callable[..., icl.Model]


def last_logits(model: icl.Model, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model.run(torch.tensor([tokens]))[0, -1]


@pytest.fixture(scope="module")
def hand_made() -> icl.Prompts:
    return icl.Prompts(
        start=(0,),
        demonstrations=((5, 6, 7, 20), (8, 9, 21)),
        demonstration_label_lengths=(1, 1),
        queries=((10, 11, 12), (13, 14), (15,), (16, 11, 10)),
        labels=((20,), (21,)),
        gold=(0, 1, 0, 1),
    )


def one_token_prompts() -> icl.Prompts:
    return icl.Prompts(
        demonstrations=((5, 6, 7, 20),), demonstration_label_lengths=(1,), queries=((9,),), labels=((20,),), gold=(0,)
    )


def rows_of(hf_model: Any, prompts: icl.Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """h and t by layer and query of a GPT-2, by torch's own hooks."""
    blocks = hf_model.transformer.h
    hidden = torch.zeros(len(blocks), len(prompts.queries), blocks[0].mlp.c_proj.weight.shape[0], dtype=torch.float64)
    lacking = torch.zeros(len(blocks), len(prompts.queries), hf_model.config.n_embd, dtype=torch.float64)
    for index, query in enumerate(prompts.queries):
        in_context: list[torch.Tensor] = []

        def read(m: Any, args: Any, out: Any, to: Any = in_context) -> None:
            to.append(stream(out)[0, -1])

        handles = [block.register_forward_hook(read) for block in blocks]
        with torch.no_grad():
            hf_model(torch.tensor([[*prompts.prefix, *query]]))
        for handle in handles:
            handle.remove()

        def keep(m: Any, args: Any, layer: int, index: int = index) -> None:
            hidden[layer, index] = args[0][0, -1]

        def force(m: Any, args: Any, out: Any, layer: int, index: int = index, to: Any = in_context) -> Any:
            lacking[layer, index] = to[layer] - stream(out)[0, -1]
            stream(out)[0, -1] = to[layer]
            return out

        handles = []
        for layer, block in enumerate(blocks):
            handles.append(
                block.mlp.c_proj.register_forward_pre_hook(lambda m, args, layer=layer: keep(m, args, layer))
            )
            handles.append(block.register_forward_hook(lambda m, args, out, layer=layer: force(m, args, out, layer)))
        with torch.no_grad():
            hf_model(torch.tensor([[*prompts.start, *query]]))
        for handle in handles:
            handle.remove()
    return hidden, lacking


def stream(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def test_it_is_the_ridge_solution_of_each_layer(
    make_model: ToyModel, make_hf_model: Callable[..., PreTrainedModel], hand_made: icl.Prompts
) -> None:
    patch = icl.build_shared_patch(make_model("gpt2", torch.float64), hand_made, relative_ridge=0.01)
    assert patch.ridge is not None
    for layer, (h, t) in enumerate(zip(*rows_of(make_hf_model("gpt2", torch.float64), hand_made), strict=True)):
        gram = h.mT @ h
        ridge = 0.01 * gram.square().sum() / gram.trace()
        assert patch.ridge[layer].item() == pytest.approx(ridge.item())
        rows = np.vstack([h.numpy(), ridge.sqrt().item() * np.eye(h.shape[1])])
        targets = np.vstack([t.numpy(), np.zeros((h.shape[1], t.shape[1]))])
        expected = torch.from_numpy(np.linalg.lstsq(rows, targets, rcond=None)[0].T)
        left, right = (factor[layer] for factor in patch.factors["out"])
        assert relative_error(left @ right.mT, expected) < 1e-9
    assert patch.rank == len(hand_made.queries) == patch.n_queries


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "neox", "falcon"])
def test_it_is_exact_for_one_query_of_one_token(make_model: ToyModel, architecture: str) -> None:
    """No earlier token can differ from the pass that the patch was fitted in."""
    model = make_model(architecture, torch.float64)
    prompts = one_token_prompts()
    before = snapshot(model)
    in_context, zero_shot = last_logits(model, (5, 6, 7, 20, 9)), last_logits(model, (9,))
    patch = icl.build_shared_patch(model, prompts, relative_ridge=1e-12)
    with patch.applied(model):
        patched = last_logits(model, (9,))
        assert last_logits(model, (9, 8)).isfinite().all(), "it runs on other tokens, too"
    tolerance = 1e-8 if architecture == "gpt2" else 1e-6  # the others' own softmax is in float32
    assert relative_error(patched, in_context) < tolerance < 0.1 < relative_error(zero_shot, in_context)
    assert all(torch.equal(*pair) for pair in zip(snapshot(model), before, strict=True))
    assert torch.equal(last_logits(model, (9,)), zero_shot)


def test_sums_over_queries_add_up_and_do_not_grow(hand_made: icl.Prompts) -> None:
    model = tiny_model(dtype=torch.float64)
    rest = replace(hand_made, queries=hand_made.queries[1:], gold=hand_made.gold[1:])
    whole = icl.sum_statistics(model, hand_made)
    added = icl.sum_statistics(model, hand_made.first(1)) + icl.sum_statistics(model, rest)
    assert whole.n_queries == added.n_queries == 4
    assert (whole.gram.shape, whole.cross.shape, whole.lack.shape) == ((2, 64, 64), (2, 32, 64), (2, 32))
    for name in ("gram", "cross", "thought", "lack"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_a_query_costs_two_passes(hand_made: icl.Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = tiny_model(), list[int]()
    icl.build_shared_patch(model, hand_made)  # the first pass behind a shared prefix is checked against a plain one
    forward = model.backend.forward

    def counted(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        counts.append(tokens.numel())
        return forward(tokens, positions)

    monkeypatch.setattr(model.backend, "forward", counted)
    icl.build_shared_patch(model, hand_made, batch_size=1)
    by_length = sorted(hand_made.queries, key=len, reverse=True)
    assert counts == [len(hand_made.prefix)] + [n for query in by_length for n in (len(query), 1 + len(query))]


def test_batches_do_not_change_the_patch(make_model: ToyModel, hand_made: icl.Prompts) -> None:
    model = make_model("gpt2", torch.float64)
    one_by_one, at_once = (icl.sum_statistics(model, hand_made, batch_size=size) for size in (1, 64))
    for name in ("gram", "cross", "thought", "lack"):
        torch.testing.assert_close(getattr(one_by_one, name), getattr(at_once, name), rtol=1e-10, atol=1e-10)


def test_the_mean_patch_and_the_thought_matrix_are_sums_over_queries(
    make_model: ToyModel, make_hf_model: Callable[..., PreTrainedModel], hand_made: icl.Prompts
) -> None:
    model = make_model("gpt2", torch.float64)
    mean = icl.build_mean_patch(model, hand_made)
    by_default, doubled = (icl.build_thought_matrix(model, hand_made, strength=strength) for strength in (None, 0.5))
    assert mean.bias is not None
    for layer, (h, t) in enumerate(zip(*rows_of(make_hf_model("gpt2", torch.float64), hand_made), strict=True)):
        torch.testing.assert_close(mean.bias[layer], t.sum(0) / 4)
        exact = [torch.outer(lacking, hidden) / (hidden @ hidden) for hidden, lacking in zip(h, t, strict=True)]
        for patch, strength in ((by_default, 0.25), (doubled, 0.5)):
            left, right = (factor[layer] for factor in patch.factors["out"])
            torch.testing.assert_close(left @ right.mT, strength * torch.stack(exact).sum(0))
    assert (mean.factors, mean.scale, mean.rank, mean.n_queries) == ({}, None, 0, 4)
    assert (by_default.bias, by_default.rank, by_default.ridge) == (None, 4, None)


@pytest.mark.parametrize(
    ("architecture", "build"),
    [
        ("gpt2", icl.build_mean_patch),
        ("llama", icl.build_mean_patch),
        ("gemma3-window", icl.build_mean_patch),
        ("gpt2", icl.build_thought_matrix),
        ("llama", icl.build_thought_matrix),
    ],
)
def test_they_are_exact_for_one_query_of_one_token(
    make_model: ToyModel, architecture: str, build: Callable[..., icl.SharedPatch]
) -> None:
    model, prompts = make_model(architecture, torch.float64), one_token_prompts()
    before, zero_shot = snapshot(model), last_logits(model, (9,))
    in_context = last_logits(model, (5, 6, 7, 20, 9))
    with build(model, prompts).applied(model):
        assert relative_error(last_logits(model, (9,)), in_context) < 1e-6 < 0.1 < relative_error(zero_shot, in_context)
    assert all(torch.equal(*pair) for pair in zip(snapshot(model), before, strict=True))
    assert torch.equal(last_logits(model, (9,)), zero_shot)


@pytest.mark.parametrize("architecture", ["gemma2-window", "gemma3-window"])
def test_a_norm_after_the_mlp_gives_the_closest_output_that_it_can(
    make_model: ToyModel, make_hf_model: Callable[..., PreTrainedModel], architecture: str
) -> None:
    """By torch's own hooks on a plain model of one query of one token, with what reaches each layer forced."""
    plain: Any = make_hf_model(architecture, torch.float64)
    patch = icl.build_thought_matrix(make_model(architecture, torch.float64), one_token_prompts())
    in_context: list[torch.Tensor] = []
    blocks = plain.model.layers
    handles = [
        block.register_forward_hook(lambda m, args, out: in_context.append(stream(out)[0, -1])) for block in blocks
    ]
    with torch.no_grad():
        plain(torch.tensor([[5, 6, 7, 20, 9]]))
    for handle in handles:
        handle.remove()
    for layer, block in enumerate(blocks):
        read: dict[str, torch.Tensor] = {}
        handles = [
            block.mlp.down_proj.register_forward_hook(
                lambda m, args, out, read=read: read.update(h=args[0][0], m=out[0])
            ),
            block.post_feedforward_layernorm.register_forward_hook(
                lambda m, args, out, read=read: read.update(o=out[0])
            ),
            block.register_forward_hook(lambda m, args, out, read=read: read.update(stream=stream(out)[0])),
        ]
        if layer:  # the layer below gives its in-context stream
            below = in_context[layer - 1]
            handles.append(block.register_forward_pre_hook(lambda m, args, to=below: (to[None, None], *args[1:])))
        with torch.no_grad():
            plain(torch.tensor([[9]]))
        for handle in handles:
            handle.remove()
        scale = 1 + block.post_feedforward_layernorm.weight.detach()
        wanted = in_context[layer] - (read["stream"] - read["o"])
        length = read["m"].square().mean().sqrt()
        target = closest_through_norm(wanted, scale, read["m"] / length) * length - read["m"]
        left, right = (factor[layer] for factor in patch.factors["out"])
        assert relative_error(left @ right.mT, target.mT @ read["h"] / read["h"].square().sum()) < 1e-5
        reached = read["m"] + read["h"] @ right @ left.mT
        output = scale * reached / reached.square().mean().sqrt()
        before, after = ((out - wanted).norm() for out in (read["o"], output))
        assert after < 0.9 * before


@settings(deadline=None, max_examples=20)
@given(seed=seeds, small=st.sampled_from([0.0, 1e-3, 0.5]))
def test_the_closest_output_of_a_norm(seed: int, small: float) -> None:
    """On a circle, against all directions; in more dimensions, against steps along the sphere."""
    scale = torch.tensor([1.5, small], dtype=torch.float64)
    wanted, normalised = draw(seed, 1, 2, scale=2.0), as_long(draw(seed + 1, 1, 2))
    angles = torch.linspace(0, 2 * torch.pi, 20001, dtype=torch.float64)
    circle = 2**0.5 * torch.stack([angles.cos(), angles.sin()], dim=1)
    got = closest_through_norm(wanted, scale, normalised)
    distances = distance(circle, wanted, scale, normalised)
    assert distance(got, wanted, scale, normalised).item() == pytest.approx(distances.min().item(), rel=1e-6, abs=1e-6)

    scale, wanted, normalised = draw(seed, 7), draw(seed + 1, 3, 7, scale=2.0), as_long(draw(seed + 2, 3, 7))
    got = closest_through_norm(wanted, scale, normalised)
    torch.testing.assert_close(got.square().mean(dim=-1), torch.ones(3, dtype=torch.float64))
    for size in (1e-3, 0.1, 1.0):
        near = as_long(got + size * draw(seed + 3, 3, 7))
        closest, other = (distance(n, wanted, scale, normalised) for n in (got, near))
        assert (closest <= other + 1e-9).all()


def as_long(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt()


def distance(n: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, normalised: torch.Tensor) -> torch.Tensor:
    """What `closest_through_norm` minimises."""
    kappa = STAY * scale.square().median()
    return (scale * n - wanted).square().sum(dim=-1) + kappa * (n - normalised).square().sum(dim=-1)


@pytest.mark.parametrize("name", ["ridge", "mean", "thought-matrix", "exact", "exact with a scale"])
def test_a_random_patch_has_the_singular_values_and_norms(
    models_by_architecture: ToyModel, hand_made: icl.Prompts, name: str
) -> None:
    model = models_by_architecture("gemma3-window") if name == "exact with a scale" else tiny_model()
    statistics = icl.sum_statistics(model, hand_made)
    patches: dict[str, Callable[[], Patch]] = {
        "ridge": statistics.ridge_patch,
        "mean": statistics.mean_patch,
        "thought-matrix": statistics.thought_matrix,
    }
    patch = patches.get(name, lambda: icl.build_exact_patch(model, hand_made))()
    drawn, again, other = (icl.draw_random_patch(patch, seed) for seed in (1, 1, 2))
    assert drawn == again
    assert drawn != other
    assert drawn.method == "random"
    assert drawn.rank == patch.rank
    assert set(drawn.norms) == set(patch.norms)
    for part, norms in patch.norms.items():
        torch.testing.assert_close(drawn.norms[part], norms, rtol=1e-5, atol=0)
    for part, low_rank in patch.factors.items():
        dense, drawn_dense = (left.double() @ right.double().mT for left, right in (low_rank, drawn.factors[part]))
        values, drawn_values = torch.linalg.svdvals(dense), torch.linalg.svdvals(drawn_dense)
        torch.testing.assert_close(drawn_values, values, rtol=1e-5, atol=1e-6)
        cosine = torch.cosine_similarity(dense.flatten(1), drawn_dense.flatten(1), dim=1)
        assert cosine.abs().max() < 0.3, "the direction is another"
    with drawn.applied(model):
        assert last_logits(model, (0, 10, 11)).isfinite().all()


def test_sums_and_patches_save_and_load(hand_made: icl.Prompts, tmp_path: Path) -> None:
    statistics = icl.sum_statistics(tiny_model(), hand_made)
    statistics.save(tmp_path / "sums")
    loaded = icl.SharedStatistics.load(tmp_path / "sums")
    assert loaded == statistics
    mean = statistics.mean_patch()
    patches = statistics.ridge_patch(), mean, loaded.thought_matrix(), icl.draw_random_patch(mean, 0)
    for patch in patches:
        patch.save(tmp_path / patch.method)
        assert icl.SharedPatch.load(tmp_path / patch.method) == patch


def test_half_precision_gives_patches_in_float32(hand_made: icl.Prompts) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    for patch in (icl.build_shared_patch(model, hand_made), icl.build_mean_patch(model, hand_made)):
        tensors = [*(factor for low_rank in patch.factors.values() for factor in low_rank), patch.bias]
        assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.float32}
        with patch.applied(model):
            assert last_logits(model, (0, 10, 11)).isfinite().all()


def test_sums_of_other_weights_do_not_add_up(hand_made: icl.Prompts) -> None:
    with pytest.raises(ValueError, match="expected sums of one model and the same weights, got 'tiny'"):
        _ = icl.sum_statistics(tiny_model(), hand_made) + icl.sum_statistics(tiny_model(seed=1), hand_made)


def test_a_zero_hidden_activation_has_no_thought_matrix(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    model.wrapped.blocks[1].mlp.gate.original_component.weight.data.zero_()
    statistics = icl.sum_statistics(model, hand_made)
    assert statistics.mean_patch().norm > 0
    with pytest.raises(ValueError, match="layer 1: expected inputs of the down projection other than zero, got"):
        statistics.thought_matrix()
    with pytest.raises(ValueError, match="layer 1: expected inputs of the down projection other than zero, got zeros"):
        statistics.ridge_patch()


def test_a_truncated_patch_is_the_closest_of_its_rank(hand_made: icl.Prompts, tmp_path: Path) -> None:
    patch = icl.build_shared_patch(tiny_model(dtype=torch.float64), hand_made)
    left, right = patch.factors["out"]
    values = torch.linalg.svdvals(left @ right.mT)
    for rank in (1, 2, 3):
        truncated = patch.truncated(rank)
        assert truncated.rank == rank
        short_left, short_right = truncated.factors["out"]
        error = (left @ right.mT - short_left @ short_right.mT).flatten(1).norm(dim=1)
        torch.testing.assert_close(error, values[:, rank:].norm(dim=1))
    assert patch.truncated(1000) == patch
    truncated.save(tmp_path / "patch")
    assert icl.SharedPatch.load(tmp_path / "patch") == truncated
    with pytest.raises(ValueError, match="expected rank"):
        patch.truncated(0)


def test_mixtures_of_experts_are_refused(models_by_architecture: ToyModel, hand_made: icl.Prompts) -> None:
    with pytest.raises(icl.UnsupportedModelError, match="got a mixture of experts"):
        icl.build_shared_patch(models_by_architecture("gptoss-window"), hand_made)


def test_no_ridge_with_fewer_queries_than_hidden_activations_is_refused(hand_made: icl.Prompts) -> None:
    with pytest.raises(ValueError, match="expected ridge"):
        icl.build_shared_patch(tiny_model(), hand_made, relative_ridge=0.0)


def test_a_negative_ridge_is_refused_by_the_name_and_number_of_the_argument(hand_made: icl.Prompts) -> None:
    with pytest.raises(ValueError, match=r"expected relative_ridge of at least 0, got -0\.5"):
        icl.build_shared_patch(tiny_model(), hand_made, relative_ridge=-0.5)


def test_layers_with_fewer_directions_are_filled_up_with_zeros(hand_made: icl.Prompts) -> None:
    """With a λ that is small against HᵀH, directions without rows are left out, and layers differ in their number."""
    sums = icl.sum_statistics(tiny_model(dtype=torch.float64), hand_made)
    gram, cross = sums.gram.clone(), sums.cross.clone()
    h, t = draw(0, gram.shape[1]), draw(1, cross.shape[1])
    gram[1], cross[1] = torch.outer(h, h), torch.outer(t, h)  # the same query four times
    patch = replace(sums, gram=gram, cross=cross).ridge_patch(1e-9)
    left, right = patch.factors["out"]
    assert left.shape[-1] == right.shape[-1] == len(hand_made.queries)
    assert torch.linalg.matrix_rank(left @ right.mT, rtol=1e-6).tolist() == [len(hand_made.queries), 1]
    torch.testing.assert_close(left[1] @ right[1].mT, torch.outer(t, h) / h.square().sum(), rtol=1e-7, atol=1e-9)
    same = sums.ridge_patch(1e-9).factors["out"]
    assert torch.equal(left[0], same.left[0])


def test_arguments_of_the_wrong_kind_are_refused(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    with pytest.raises(icl.ArgumentError, match="expected batch_size"):
        icl.sum_statistics(model, hand_made, batch_size=0)
    with pytest.raises(icl.ArgumentError, match="expected strength"):
        icl.build_thought_matrix(model, hand_made, strength=float("nan"))
    with pytest.raises(icl.ArgumentError, match="expected seed"):
        icl.draw_random_patch(icl.build_mean_patch(model, hand_made), -1)


def test_prompts_without_queries_are_refused(hand_made: icl.Prompts) -> None:
    with pytest.raises(icl.PromptError, match="expected at least one query"):
        icl.build_shared_patch(tiny_model(), replace(hand_made, queries=(), gold=()))
