"""Scores of label words against plain forward passes, rule by rule, and that results say which rule they follow."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import draw, make_rows
from hypothesis import given
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.scoring import Scoring, label_baselines, label_scores

WORDS = ("card", "card arrival", "card arrival time", "top up", "no")
"""Label words of several tokens; three begin alike, and two of these are another's beginning."""


@pytest.fixture(scope="module")
def intents() -> icl.Task:
    rows = [row | {"label": WORDS[i % len(WORDS)]} for i, row in enumerate(make_rows())]
    return icl.Task("intents", "Query: {text}\nIntent:", WORDS, rows)


def scored_prompts(model: icl.Model, task: icl.Task, scoring: Scoring) -> icl.Prompts:
    return icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(4), scoring=scoring)


def log_probs_of_words(model: icl.Model, before: tuple[int, ...], labels: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The log-probability of each whole label word, by one plain forward pass of the wrapped model over each."""
    sums = []
    for label in labels:
        with torch.no_grad():
            logits = model.wrapped.original_model(torch.tensor([[*before, *label]])).logits[0].double()
        log_probs = logits.log_softmax(-1)[len(before) - 1 : -1]
        sums.append(sum(log_probs[position, token].item() for position, token in enumerate(label)))
    return np.array(sums)


@pytest.mark.parametrize("zero_shot", [False, True], ids=["in context", "zero-shot"])
@pytest.mark.parametrize("scoring", get_args(Scoring))
def test_scores_are_those_of_plain_forward_passes(
    llama: icl.Model, intents: icl.Task, scoring: Scoring, zero_shot: bool
) -> None:
    prompts = scored_prompts(llama, intents, scoring)
    prompts = prompts.zero_shot() if zero_shot else prompts
    capture = icl.capture(llama, prompts, fields=(), progress=False)
    lengths = np.array([len(label) for label in prompts.labels])
    assert len(set(lengths)) > 2
    baseline = np.zeros(len(WORDS))
    if scoring == "unconditional":
        before = (*prompts.start, *llama.encode("Intent:"))
        baseline = log_probs_of_words(llama, before, prompts.labels)
    if scoring == "calibrated":
        shares = []
        for text in ("N/A", "", "[MASK]"):
            before = (*prompts.prefix, *llama.encode(f"Query: {text}\nIntent:"))
            p = np.exp(log_probs_of_words(llama, before, prompts.labels))
            shares.append(p / p.sum())
        baseline = np.log(np.mean(shares, axis=0))
    for query, scores, prediction in zip(prompts.queries, capture.label_scores, capture.predictions, strict=True):
        sums = log_probs_of_words(llama, (*prompts.prefix, *query), prompts.labels)
        expected = sums / lengths if scoring == "mean" else sums - baseline
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-4)  # sums of up to 18 tokens in float32
        assert prediction == expected.argmax()
    means = icl.capture(llama, replace(prompts, scoring="mean", baseline_queries=()), fields=(), progress=False)
    assert torch.equal(capture.label_log_probs, means.label_log_probs), "what is kept does not depend on the rule"
    assert f"scoring={scoring!r}" in repr(capture) or scoring == "mean"


def test_calibration_survives_labels_that_never_occur_without_content() -> None:
    """exp(−300) is 0 in float32; the label's score is finite all the same."""
    baselines = label_baselines("calibrated", torch.tensor([[-1.0, -300.0]]), (1, 1))
    assert torch.allclose(baselines, torch.tensor([0.0, -299.0]))


@given(seed=st.integers(0, 999))
def test_calibration_is_that_of_zhao_et_al(seed: int) -> None:
    """Their prediction: the largest entry of W p, with W = diag(p̄)⁻¹ and p the label words' normalised probability."""
    label_log_probs, without_content = draw(seed, 6, 4), draw(seed + 1, 3, 4)
    lengths = (1, 2, 3, 1)
    scores = label_scores(
        "calibrated",
        label_log_probs,
        lengths,
        label_baselines("calibrated", without_content, lengths).repeat(6, 1),
    )
    n = torch.tensor(lengths)
    p, p_bar = (label_log_probs * n).softmax(-1), (without_content * n).softmax(-1).mean(0)
    calibrated = torch.einsum("ij,qj->qi", torch.diag(1 / p_bar), p)
    assert torch.equal(scores.argmax(-1), calibrated.argmax(-1))


def test_rules_agree_where_they_must() -> None:
    """With one token a word, mean is sum; with the same baseline for every word, nothing changes."""
    log_probs = draw(0, 5, 3)
    assert torch.equal(label_scores("mean", log_probs, (2, 1, 1)), log_probs)
    assert torch.equal(label_scores("sum", log_probs, (1, 1, 1)), log_probs)
    for scoring in ("unconditional", "calibrated"):
        flat = label_baselines(scoring, torch.full((2, 3), -1.0, dtype=torch.float64), (1, 1, 1)).repeat(5, 1)
        scores = label_scores(scoring, log_probs, (1, 1, 1), flat)
        assert torch.equal(scores.argmax(-1), log_probs.argmax(-1))
        with pytest.raises(ValueError, match=f"scored after queries without content for scoring='{scoring}', got none"):
            label_scores(scoring, log_probs, (1, 1, 1))


def test_results_say_which_rule_they_follow(llama: icl.Model, intents: icl.Task, tmp_path: Path) -> None:
    prompts = scored_prompts(llama, intents, "calibrated")
    experiment = icl.run_experiment(llama, prompts, lr=0.05, progress=False)
    comparison = experiment.compare()
    assert comparison.scoring == "calibrated"
    assert "scoring='calibrated'" in repr(comparison)
    for name in ("zero_shot", "in_context", "finetuned"):
        capture = getattr(experiment, name)
        assert capture.label_baselines is not None
        assert torch.equal(capture.predictions, (capture.label_scores).argmax(-1))
    baselines = [getattr(experiment, name).label_baselines[0] for name in ("zero_shot", "in_context", "finetuned")]
    assert not torch.allclose(baselines[0], baselines[1]), "content-free queries follow the demonstrations"
    assert not torch.allclose(baselines[0], baselines[2]), "and run with the finetuned weights"
    comparison.save(tmp_path / "comparison")
    assert icl.Comparison.load(tmp_path / "comparison").scoring == "calibrated"
    experiment.in_context.save(tmp_path / "capture")
    loaded = icl.Capture.load(tmp_path / "capture")
    assert torch.equal(loaded.label_scores, experiment.in_context.label_scores)


def test_settings_scored_by_different_rules_are_not_compared(llama: icl.Model, intents: icl.Task) -> None:
    calibrated = icl.run_experiment(llama, scored_prompts(llama, intents, "calibrated"), lr=0.05, progress=False)
    by_sum = icl.capture(llama, scored_prompts(llama, intents, "sum"), progress=False)
    with pytest.raises(ValueError, match="expected captures of the same queries"):
        icl.compare(zero_shot=calibrated.zero_shot, in_context=by_sum, finetuned=calibrated.finetuned)
