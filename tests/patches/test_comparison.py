"""Changes compared by what they write and answer, and as matrices: against slow references and known cases."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from toys import ARCHITECTURES

import icl_dual as icl
from icl_dual.models import LowRank, UnsupportedModelError, tiny_model
from icl_dual.models.stream import has_norm_after_attention

capture = partial(icl.capture, fields=(*icl.EFFECT_FIELDS, "attn_out"), progress=False)


@pytest.fixture(scope="module")
def model() -> icl.Model:
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def hand_made() -> icl.Prompts:
    """Prompts of token ids; a label word of one token and one of two."""
    return icl.Prompts(
        start=(0,),
        demonstrations=((5, 6, 7, 20), (8, 9, 21)),
        demonstration_label_lengths=(1, 1),
        queries=(*((10 + index, 11, 12 + index * index) for index in range(5)), (13, 14)),
        labels=((20,), (21, 22)),
        gold=(0, 1, 0, 1, 0, 1),
    )


@pytest.fixture(scope="module")
def settings(model: icl.Model, hand_made: icl.Prompts) -> dict[str, Any]:
    return {"zero_shot": capture(model, hand_made.zero_shot()), "reference": capture(model, hand_made)}


@pytest.fixture(scope="module")
def shared(model: icl.Model, hand_made: icl.Prompts) -> icl.SharedPatch:
    return icl.build_shared_patch(model, hand_made)


@pytest.fixture(scope="module")
def changed(model: icl.Model, hand_made: icl.Prompts, shared: icl.SharedPatch) -> icl.Capture:
    with shared.truncated(1).applied(model):
        return capture(model, hand_made.zero_shot())


def plain_run(model: icl.Model, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The streams by layer and the log-probabilities at the last token, of a plain pass over one row."""
    streams: list[torch.Tensor] = []
    with torch.no_grad():
        logits = model.run(torch.tensor([tokens]), on_residual=lambda layer, stream: streams.append(stream[0, -1]))
    return torch.stack(streams), logits[0, -1].log_softmax(-1)


def test_every_number_is_that_of_plain_passes(
    model: icl.Model,
    hand_made: icl.Prompts,
    settings: dict[str, Any],
    shared: icl.SharedPatch,
    changed: icl.Capture,
) -> None:
    got = icl.compare_effects(**settings, changed=changed, rank=2)
    written, of_context = [], []
    for query, tokens in enumerate(hand_made.queries):
        in_context, p = plain_run(model, (*hand_made.prefix, *tokens))
        alone, _ = plain_run(model, (0, *tokens))
        with shared.truncated(1).applied(model):
            patched, q = plain_run(model, (0, *tokens))
        a, b = patched - alone, in_context - alone
        written.append(a)
        of_context.append(b)
        torch.testing.assert_close(got.cosine[query], torch.cosine_similarity(a, b, dim=-1), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got.norm_ratio[query], a.norm(dim=-1) / b.norm(dim=-1), atol=1e-6, rtol=1e-6)
        assert got.kl[query] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-6)
    assert got.correct.tolist() == [float(p == g) for p, g in zip(changed.predictions, hand_made.gold, strict=True)]
    same = changed.predictions == settings["reference"].predictions
    assert got.agreement.tolist() == same.double().tolist()
    spans = [np.linalg.svd(torch.stack(effects)[:, 1].numpy())[2][:2].T for effects in (written, of_context)]
    expected = np.sort(np.rad2deg(scipy.linalg.subspace_angles(*spans)))
    np.testing.assert_allclose(got.angles[1], expected, atol=1e-4)
    assert got.angles[0].isnan().tolist() == [False, True], "a change of rank one writes one direction in its layer"


def test_exact_patches_do_what_the_context_does(
    model: icl.Model, hand_made: icl.Prompts, settings: dict[str, Any]
) -> None:
    alone = hand_made.zero_shot()
    patches = [icl.build_exact_patch(model, hand_made, query) for query in range(len(alone.queries))]
    one_token = replace(alone, labels=((20,), (21,)))  # a label of two tokens runs longer rows than the patch is for
    patched = icl.capture_each(model, one_token, patches)
    ends: dict[str, Any] = {
        name: capture(model, replace(c.prompts, labels=one_token.labels)) for name, c in settings.items()
    }
    got = icl.compare_effects(**ends, changed=patched)
    assert got.kl.max() < 1e-9
    assert got.agreement.all()
    assert got.cosine.min() > 1 - 1e-6
    assert got.angles.nan_to_num().max() < 0.1
    torch.testing.assert_close(got.norm_ratio, torch.ones_like(got.norm_ratio), atol=1e-5, rtol=1e-5)
    assert got.cosine_random.abs().max() < 0.9


def test_the_context_itself_and_no_change_are_the_two_ends(settings: dict[str, Any]) -> None:
    ends = {
        name: icl.compare_effects(**settings, changed=replace(settings[name], prompts=settings["zero_shot"].prompts))
        for name in settings
    }
    assert ends["reference"].kl.tolist() == [0] * 6
    assert ends["reference"].agreement.tolist() == [1] * 6
    assert (ends["reference"].cosine > 1 - 1e-9).all()
    assert ends["zero_shot"].cosine.isnan().all()
    assert ends["zero_shot"].angles.isnan().all()
    assert not ends["zero_shot"].norm_ratio.any()
    assert ends["zero_shot"].kl.min() > 0


def test_the_null_writes_as_much_in_random_directions(settings: dict[str, Any], changed: icl.Capture) -> None:
    draws = [icl.compare_effects(**settings, changed=changed, seed=seed) for seed in range(40)]
    nulls = torch.stack([draw.cosine_random for draw in draws])
    assert all(torch.equal(draw.cosine, draws[0].cosine) for draw in draws)
    assert not torch.equal(nulls[0], nulls[1])
    assert nulls.mean().abs() < 0.05
    assert nulls.std() == pytest.approx(32**-0.5, rel=0.25)  # d_model is 32
    assert torch.equal(nulls[0], icl.compare_effects(**settings, changed=changed, seed=0).cosine_random)


def test_a_function_vector_is_the_mean_attention_output_and_acts_where_the_label_is_predicted(
    model: icl.Model, hand_made: icl.Prompts, settings: dict[str, Any]
) -> None:
    outputs: list[torch.Tensor] = []

    def keep(layer: int, output: torch.Tensor) -> None:
        if layer == 1:
            outputs.append(output[0, -1])

    alone = hand_made.zero_shot()
    for query in hand_made.queries:
        with torch.no_grad():
            model.run(torch.tensor([(*hand_made.prefix, *query)]), on_output=keep)
    vector = icl.build_function_vector(settings["reference"], layer=-1)
    torch.testing.assert_close(vector.vector, torch.stack(outputs).mean(0), atol=1e-6, rtol=1e-6)
    assert vector.layer == 1
    fingerprint = model.fingerprint()
    with vector.applied(model):
        with_vector = capture(model, alone)
    assert model.fingerprint() == fingerprint
    assert with_vector.stream is not None
    for query, tokens in enumerate(alone.queries):
        streams, log_probs = plain_run(model, (0, *tokens))
        with vector.applied(model):
            changed_streams, changed_log_probs = plain_run(model, (0, *tokens))
        torch.testing.assert_close(changed_streams[1] - streams[1], vector.vector)
        torch.testing.assert_close(changed_streams, with_vector.stream[query], atol=1e-6, rtol=1e-6)
        assert with_vector.label_log_probs[query, 0] == pytest.approx(float(changed_log_probs[20]), abs=1e-6)
        assert not torch.allclose(changed_log_probs, log_probs)


def test_matrices_are_compared_as_dense_ones_are(shared: icl.SharedPatch, hand_made: icl.Prompts) -> None:
    other = icl.build_shared_patch(tiny_model(dtype=torch.float64), replace(hand_made, demonstrations=((20, 9), (7,))))
    got = icl.compare_weights(shared, other, rank=2)
    dense = [patch.factors["out"].left @ patch.factors["out"].right.mT for patch in (shared, other)]
    for layer, (a, b) in enumerate(zip(*dense, strict=True)):
        assert got.cosine["out"][layer] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        assert got.norm_ratio["out"][layer] == pytest.approx(float(b.norm() / a.norm()), rel=1e-6)
        spans = [np.linalg.svd(matrix.numpy()) for matrix in (a, b)]
        left = np.sort(np.rad2deg(scipy.linalg.subspace_angles(*(U[:, :2] for U, _, _ in spans))))
        right = np.sort(np.rad2deg(scipy.linalg.subspace_angles(*(Vh[:2].T for _, _, Vh in spans))))
        np.testing.assert_allclose(got.left_angles["out"][layer], left, atol=1e-3)
        np.testing.assert_allclose(got.right_angles["out"][layer], right, atol=1e-3)
    itself = icl.compare_weights(shared, shared)
    assert itself.cosine["out"].min() > 1 - 1e-6
    assert itself.left_angles["out"].nan_to_num().max() < 0.1
    assert itself.cosine_random["out"].abs().max() < 0.5


def test_finetunings_are_compared_by_the_matrices_that_they_changed(model: icl.Model, hand_made: icl.Prompts) -> None:
    configs = {"sgd": icl.FinetuneConfig(), "causal": icl.FinetuneConfig(method="layer-causal")}
    sgd, causal = (icl.finetune(model, hand_made, lr=0.01, config=c, progress=False) for c in configs.values())
    got = icl.compare_weights(sgd, causal)
    assert set(got.cosine) == {"W_K", "W_V"}
    cosine = torch.nn.functional.cosine_similarity(sgd.W_V.flatten(1), causal.W_V.flatten(1))
    torch.testing.assert_close(got.cosine["W_V"], cosine.double(), atol=1e-6, rtol=1e-6)
    exact = icl.build_exact_patch(model, hand_made)
    with pytest.raises(ValueError, match=r"expected two changes with a matrix in common, got \['W_K', 'W_V'\] and"):
        icl.compare_weights(sgd, exact)


def test_a_change_of_nothing_has_no_directions(shared: icl.SharedPatch) -> None:
    zero = replace(shared, factors={"out": LowRank(*(0 * factor for factor in shared.factors["out"]))})
    got = icl.compare_weights(shared, zero)
    assert got.cosine["out"].isnan().all()
    assert got.left_angles["out"].isnan().all()


def test_results_are_saved_and_tidy(
    model: icl.Model,
    settings: dict[str, Any],
    changed: icl.Capture,
    shared: icl.SharedPatch,
    tmp_path: Path,
) -> None:
    results = {
        "effects": icl.compare_effects(**settings, changed=changed),
        "weights": icl.compare_weights(shared, shared.truncated(1)),
        "vector": icl.build_function_vector(settings["reference"], 0),
    }
    for name, result in results.items():
        result.save(tmp_path / name)
        assert type(result).load(tmp_path / name) == result
    frame = results["effects"].to_frame()
    assert list(frame.columns) == ["metric", "layer", "mean", "std", "n"]
    (accuracy,) = frame[frame["metric"] == "accuracy"].to_dict("records")
    assert accuracy["mean"] == pytest.approx(changed.accuracy)
    assert accuracy["n"] == 6
    cosines = frame[frame["metric"] == "cosine"]
    assert cosines["layer"].tolist() == list(range(model.n_layers))
    weights = results["weights"].to_frame()
    assert set(weights["matrix"]) == {"out"}
    assert len(weights) == 7 * model.n_layers
    assert "accuracy=" in repr(results["effects"])
    assert "out=" in repr(results["weights"])
    assert "layer 0" in repr(results["vector"])


def test_what_does_not_belong_together_is_refused(
    model: icl.Model,
    hand_made: icl.Prompts,
    settings: dict[str, Any],
    changed: icl.Capture,
    shared: icl.SharedPatch,
) -> None:
    all_three = {**settings, "changed": changed}
    for arguments, message in (
        ({"changed": changed.first(3)}, "expected changed of the same queries as zero_shot, got"),
        ({"reference": settings["reference"].first(3)}, "expected reference of the same queries as zero_shot, got"),
        ({"zero_shot": settings["reference"]}, "expected zero_shot to be without demonstrations, got"),
        ({"changed": replace(changed, model="other")}, "expected captures of one model, got"),
        ({"zero_shot": replace(settings["zero_shot"], fingerprint="float64:0")}, "expected reference, which has dem"),
        ({"reference": replace(settings["reference"], fingerprint="float64:0")}, "expected reference, which has dem"),
        ({"zero_shot": changed}, "expected reference, which has demonstrations, of the same weights as zero_shot"),
        ({"changed": replace(changed, fingerprint="bfloat16:float64:0")}, "expected captures in one precision, got"),
        *(
            ({name: replace(c, hooks="other")}, "expected captures with the same hooks")
            for name, c in all_three.items()
        ),
        ({"changed": replace(changed, stream=None)}, "expected changed captured with the fields"),
        ({"rank": 33}, "expected a rank from 1 to d_model = 32, got 33"),
    ):
        with pytest.raises(ValueError, match=message):
            icl.compare_effects(**{**all_three, **arguments})
    with pytest.raises(ValueError, match="expected two changes of one model, got"):
        icl.compare_weights(shared, replace(shared, fingerprint="float64:0"))
    with pytest.raises(ValueError, match="expected one change for each of 6 queries, got 1"):
        icl.capture_each(model, hand_made.zero_shot(), [shared])
    with pytest.raises(ValueError, match="label words of one token"):
        icl.capture_each(model, hand_made.zero_shot(), [shared] * 6)
    vector = icl.build_function_vector(settings["reference"], 0)
    with pytest.raises(IndexError, match="layer"):
        icl.build_function_vector(settings["reference"], 2)
    with pytest.raises(ValueError, match="expected a function vector of"), vector.applied(tiny_model(seed=1)):
        pass
    with pytest.raises(ValueError, match="'attn_out'"):
        icl.build_function_vector(replace(settings["reference"], attn_out=None), 0)
    with pytest.raises(ValueError, match="expected in_context's prompts to have demonstrations, got none"):
        icl.build_function_vector(settings["zero_shot"], 0)


def test_a_reference_without_demonstrations_may_have_other_weights(
    settings: dict[str, Any], changed: icl.Capture
) -> None:
    itself = icl.compare_effects(zero_shot=settings["zero_shot"], reference=changed, changed=changed)
    assert itself.kl.tolist() == [0] * 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_function_vector_is_refused_where_a_norm_follows_attention(
    architecture: str, models_by_architecture: Callable[[str], icl.Model]
) -> None:
    model = models_by_architecture(architecture)
    has_norm = [norm is not None for norm in model.backend.direct_path_parts().after_attention]
    assert [has_norm_after_attention(model, layer) for layer in range(model.n_layers)] == has_norm
    vector = icl.FunctionVector(model.name, model.fingerprint(), 0, torch.zeros(model.d_model))
    if has_norm[0]:
        with pytest.raises(UnsupportedModelError, match="which norms it first"), vector.applied(model):
            pass
        assert not model.stream_changes
    else:
        with vector.applied(model):
            assert model.stream_changes
