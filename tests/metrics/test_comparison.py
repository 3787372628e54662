import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import draw, noisy_recordings, run_settings, slow_tau

import icl_dual as icl
from icl_dual.metrics import comparison as comparison_module
from icl_dual.metrics.catalogue import layer_metrics, metrics
from icl_dual.metrics.formulas import (
    NULL_DRAWS,
    demonstration_weights,
    finetuning_attention,
    rec2ftp,
    sim_am,
    sim_am_delta,
    sim_aou,
    sim_aou_unnormalised,
)
from icl_dual.prompts import SEPARATOR, Prompts
from icl_dual.recordings.recordings import SETTINGS
from icl_dual.statistics.ranks import kendall
from icl_dual.storage import load_tensors, save_tensors


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_scores_by_query_are_what_the_overall_numbers_are_means_of(runs: dict) -> None:
    comparison = icl.compare(**runs)
    by_query, overall = comparison.by_query(), comparison.overall().set_index("metric").to_dict("index")
    assert list(by_query) == list(overall)
    for name, values in by_query.items():
        row = overall[name]
        assert values.nanmean().item() == pytest.approx(row["value"], nan_ok=True), name
        assert int(values.isfinite().sum()) == row["n"]
        assert math.isnan(row["low"]) or row["low"] <= row["value"] <= row["high"]
    corrected = (comparison.predictions["FT"] == comparison.gold) & (comparison.predictions["ZSL"] != comparison.gold)
    assert torch.equal(by_query["Rec2FTP"].isfinite(), corrected)
    assert overall["SimAOU"]["low"] < overall["SimAOU"]["high"]


@pytest.fixture(scope="module")
def runs(llama: icl.Model, prompts: Prompts) -> dict:
    return run_settings(llama, prompts)


def of_demonstrations(delta: icl.WeightDelta) -> list[int]:
    """Where the demonstrations' own tokens are among the training tokens: behind one start token each."""
    positions, at = [], 0
    for tokens in delta.demonstrations:
        positions += range(at + 1, at + 1 + len(tokens))
        at += 1 + len(tokens)
    return positions


def test_compare_puts_each_capture_in_its_place(runs: dict) -> None:
    comparison = icl.compare(**runs, seed=5)
    zsl, in_context, ft = (runs[name] for name in ("zero_shot", "in_context", "finetuned"))
    torch.testing.assert_close(
        comparison.per_layer["SimAOU"], sim_aou(*(run.attn_out.double() for run in (zsl, in_context, ft)))
    )
    before = sim_am(in_context.query_scores.double(), zsl.query_scores.double()).mean(-1)
    after = sim_am(in_context.query_scores.double(), ft.query_scores.double()).mean(-1)
    torch.testing.assert_close(comparison.per_layer["SimAM before FT"], before)
    torch.testing.assert_close(comparison.per_layer["SimAM after FT"], after)
    demo_q = runs["delta"].training_q[:, of_demonstrations(runs["delta"])]
    # By the same steps as `compare`: a token that stands twice has equal scores, which rounding puts in either order.
    scale = ft.q.shape[-1] ** -0.5
    m_ft = finetuning_attention(demo_q.flatten(2) * scale, ft.q.flatten(2) * scale)
    m_icl = in_context.context_scores[..., in_context.prompts.demonstration_positions].double()
    weights = demonstration_weights(m_icl), demonstration_weights(m_ft)
    torch.testing.assert_close(comparison.per_layer["Kendall"], kendall(*weights))
    assert comparison.rec2ftp == rec2ftp(zsl.gold, zsl.predictions, in_context.predictions, ft.predictions)
    assert comparison.accuracy == {"ZSL": zsl.accuracy, "ICL": in_context.accuracy, "FT": ft.accuracy}
    assert tuple(comparison.per_layer) == layer_metrics()


def test_comparisons_save_and_load_and_become_a_tidy_frame(runs: dict, tmp_path: Path) -> None:
    comparison = icl.compare(**runs)
    comparison.save(tmp_path / "x")
    loaded = icl.Comparison.load(tmp_path / "x")
    assert list(loaded.per_layer) == list(layer_metrics())
    frame = loaded.to_frame()
    pd.testing.assert_frame_equal(frame, comparison.to_frame())
    assert frame.columns.tolist() == ["metric", "layer", "value", "low", "high", "spread", "n"]
    by_layer = frame.drop(columns=["low", "high", "spread"]).set_index(["metric", "layer"]).to_dict(orient="index")
    expected = comparison.per_layer["Kendall"][:, 1].mean().item()
    assert by_layer["Kendall", 1] == {"value": pytest.approx(expected), "n": 7}
    intervals = comparison.intervals()
    for row in frame.to_dict("records"):
        whole = intervals[str(row["metric"])]
        expected = (whole.low, whole.high) if pd.isna(row["layer"]) else (math.nan, math.nan)
        assert np.array_equal((row["low"], row["high"]), expected, equal_nan=True)
    assert math.isfinite(intervals["SimAOU"].low)
    overall = comparison.overall().set_index("metric").to_dict()["value"]
    assert overall["SimAOU"] == pytest.approx(comparison.per_layer["SimAOU"].mean().item())
    assert "SimAOU random" in comparison._repr_html_()
    assert "ICL accuracy" in str(comparison)


def test_what_is_undefined_is_not_counted(runs: dict) -> None:
    runs = runs | {"finetuned": dataclasses.replace(runs["finetuned"], attn_out=runs["finetuned"].attn_out.clone())}
    runs["finetuned"].attn_out[2, 1] = runs["zero_shot"].attn_out[2, 1]
    by_layer = icl.compare(**runs).to_frame().set_index(["metric", "layer"]).to_dict(orient="index")
    assert by_layer["SimAOU", 1]["n"] == 6
    assert by_layer["SimAOU", 2]["n"] == 7


def test_under_the_released_names_means_are_the_scripts(runs: dict) -> None:
    comparison = icl.compare(**runs)
    values = {name: value.clone() for name, value in comparison.per_layer.items()}
    values["SimAOU"][0, 1] = torch.nan  # no update: the scripts count a cosine of 0
    values["Kendall"][0, 2] = torch.nan  # a constant: the scripts carry it through
    scores = dataclasses.replace(comparison, per_layer=values).released()
    assert scores["SimAOU"][1] == pytest.approx(comparison.per_layer["SimAOU"][1:, 1].sum().item() / 7)
    assert math.isnan(scores["token-level kendall"][2])
    assert scores["ZSL SimAM"] == pytest.approx(comparison.per_layer["SimAM before FT"].mean(0).tolist())
    assert scores["Recall2FTP"] == pytest.approx(100 * comparison.rec2ftp.value, nan_ok=True)
    assert scores["token-level random_recall_topk"] == pytest.approx([100 / n_tokens(runs)] * 3)


def n_tokens(runs: dict) -> int:
    return len(runs["in_context"].prompts.demonstration_positions)


def test_captures_that_do_not_belong_together_are_refused(runs: dict, llama: icl.Model, task: icl.Task) -> None:
    def refused(message: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=message):
            icl.compare(**{**runs, **changed})

    refused("of one model, got .* under the same name", zero_shot=dataclasses.replace(runs["zero_shot"], model="other"))
    refused("of the same queries", zero_shot=runs["in_context"])
    refused("with zero_shot's weights", finetuned=runs["zero_shot"])
    refused("zero_shot and in_context captured with the same weights", zero_shot=runs["finetuned"])
    refused("without 'q'", finetuned=dataclasses.replace(runs["finetuned"], q=None))
    refused("to have demonstrations", in_context=runs["zero_shot"])
    other = icl.build_prompts(llama, task, task.demonstrations(2, seed=9), task.queries(3))
    reversed_ = dataclasses.replace(runs["delta"], demonstrations=runs["delta"].demonstrations[::-1])
    refused("in their order", delta=reversed_)
    refused("finetuned on the", delta=icl.finetune(llama, other, lr=0.05, progress=False))


def test_the_inflation_null_is_a_quarter_where_updates_are_three_times_their_vector() -> None:
    per_layer = icl.compare_recordings(noisy_recordings(200, 1, 4096, 3.0)).per_layer
    assert per_layer["SimAOU inflation null"].mean().item() == pytest.approx(0.25, abs=0.01)
    assert per_layer["SimAOU"].mean().item() == pytest.approx(0.25, abs=0.01), "these updates are such noise"
    assert abs(per_layer["SimAOU unnormalised"].mean().item()) < 3 / math.sqrt(200 * 4096)
    assert per_layer["SimAOU random update"].mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_inflation_null_is_of_the_updates_lengths_not_their_directions() -> None:
    """ICL and FT the same update: SimAOU is 1, and the null is what it was."""
    recordings = noisy_recordings(60, 2, 1024, 3.0)
    same = dataclasses.replace(recordings, attn_out=recordings.attn_out | {"FT": recordings.attn_out["ICL"]})
    per_layer = icl.compare_recordings(same).per_layer
    torch.testing.assert_close(per_layer["SimAOU"], torch.ones(60, 2).double())
    torch.testing.assert_close(per_layer["SimAOU unnormalised"], torch.ones(60, 2).double())
    assert per_layer["SimAOU inflation null"].mean().item() == pytest.approx(0.25, abs=0.01)


def test_centred_random_updates_score_nothing_unnormalised() -> None:
    n, d = 150, 256
    recordings = noisy_recordings(n, 4, d, 0.5)
    per_layer = icl.compare_recordings(recordings).per_layer
    null = per_layer["SimAOU unnormalised random"]
    assert (null.mean(0).abs() < 3 / math.sqrt(n * d)).all()
    # The mean of several draws each: were it one, deviations would be twice as large.
    expected = 1 / math.sqrt(d * NULL_DRAWS)
    assert null.std().item() == pytest.approx(expected, rel=0.1)
    assert (per_layer["SimAOU random update"].mean(0) > 0.05).all(), "the same updates do, normalised first"


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_no_number_depends_on_the_queries_taken_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    recordings = dataclasses.replace(noisy_recordings(7, 2, 16, 1.0), training_k=draw(40, 2, 5, 3))
    expected = icl.compare_recordings(recordings, seed=2, kendall_queries=4).per_layer
    monkeypatch.setattr(comparison_module, "QUERIES_AT_ONCE", at_once)
    got = icl.compare_recordings(recordings, seed=2, kendall_queries=4).per_layer
    other = icl.compare_recordings(recordings, seed=3, kendall_queries=4).per_layer
    assert tuple(got) == layer_metrics()
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=0, atol=1e-12, equal_nan=True, msg=name)
        is_random = ("random" in name or "null" in name) and "recall" not in name
        assert torch.equal(other[name].nan_to_num(), got[name].nan_to_num()) != is_random, name


def test_heads_that_did_not_change_are_left_out_of_sim_am_delta() -> None:
    recordings = noisy_recordings(6, 2, 8, 1.0)
    scores = {name: values.clone() for name, values in recordings.query_scores.items()}
    scores["FT"][:, 0, 1] = scores["ZSL"][:, 0, 1]
    scores["FT"][:, 1] = scores["ZSL"][:, 1]
    per_layer = icl.compare_recordings(dataclasses.replace(recordings, query_scores=scores)).per_layer
    by_head = sim_am_delta(*(scores[name] for name in SETTINGS))
    torch.testing.assert_close(per_layer["SimAMΔ"][:, 0], by_head[:, 0, 0])
    assert per_layer["SimAMΔ random"][:, 0].isfinite().all()
    assert per_layer["SimAMΔ"][:, 1].isnan().all()
    assert per_layer["SimAMΔ random"][:, 1].isnan().all()


def test_random_changes_of_maps_score_nothing_but_their_maps_are_alike() -> None:
    recordings = noisy_recordings(300, 2, 8, 1.0)
    m = draw(1, 300, 2, 2, 40)
    scores = {"ZSL": m, "ICL": m + 0.1 * draw(2, 300, 2, 2, 40), "FT": m + 0.1 * draw(3, 300, 2, 2, 40)}
    lengths = np.random.default_rng(0).integers(20, 41, 300)
    for values in scores.values():
        for query, length in enumerate(lengths):
            values[query, ..., length:] = 0
    recordings = dataclasses.replace(recordings, query_scores=scores, residual_norms=None)
    per_layer = icl.compare_recordings(recordings).per_layer
    per_query = 1 / np.sqrt(2 * lengths)  # of two heads' mean cosine: padding has no part in it
    bound = 4 * math.sqrt((per_query**2).sum()) / 300
    assert (per_layer["SimAMΔ random"].mean(0).abs() < bound).all()
    assert per_layer["SimAMΔ random"].std().item() == pytest.approx(math.sqrt((per_query**2).mean()), rel=0.1)
    torch.testing.assert_close(
        per_layer["SimAM random update"].mean(0), per_layer["SimAM after FT"].mean(0), atol=0.002, rtol=0
    )
    assert (per_layer["SimAM random update"] > 0.9).all()


def test_compare_holds_the_corrected_metrics_of_its_captures(runs: dict) -> None:
    comparison = icl.compare(**runs, seed=5)
    h = [runs[name].attn_out.double() for name in ("zero_shot", "in_context", "finetuned")]
    m = [runs[name].query_scores.double() for name in ("zero_shot", "in_context", "finetuned")]
    torch.testing.assert_close(comparison.per_layer["SimAOU unnormalised"], sim_aou_unnormalised(*h))
    torch.testing.assert_close(comparison.per_layer["SimAMΔ"], sim_am_delta(*m).nanmean(-1), equal_nan=True)
    assert comparison.per_layer["SimAMΔ"][:, 0].isnan().all(), "rotary scores of the first layer stay as they are"
    assert comparison.per_layer["SimAMΔ"][:, 1:].isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_kendall_on_keys_scores_the_training_keys_head_by_head(
    models_by_architecture: Callable[[str], icl.Model], prompts: Prompts, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    runs = run_settings(model, prompts)
    tau = icl.compare(**runs).per_layer["Kendall on keys"]
    delta, ft, in_context = runs["delta"], runs["finetuned"], runs["in_context"]
    demo_tokens, group = of_demonstrations(delta), model.n_heads // model.n_key_value_heads
    assert group == {"llama": 2, "gpt2": 1}[architecture]
    for query, layer in ((0, 0), (3, 1), (6, 2)):
        of_tokens = np.zeros(len(demo_tokens))
        for at, token in enumerate(demo_tokens):
            for head in range(model.n_heads):
                of_tokens[at] += float(
                    ft.q[query, layer, head].double() @ delta.training_k[layer, token, head // group].double()
                )
        m_icl = in_context.context_scores[query, layer, prompts.demonstration_positions].double().numpy()
        assert tau[query, layer].item() == pytest.approx(slow_tau(m_icl, of_tokens), abs=1e-12)


def test_recordings_without_keys_have_no_kendall_on_keys(runs: dict, tmp_path: Path) -> None:
    recordings = icl.Recordings.of(**runs)
    whole = icl.compare_recordings(recordings)
    without = icl.compare_recordings(dataclasses.replace(recordings, training_k=None))
    assert set(whole.per_layer) - set(without.per_layer) == {"Kendall on keys"}
    for name, values in without.per_layer.items():
        assert torch.equal(values.nan_to_num(), whole.per_layer[name].nan_to_num()), name
    without.save(tmp_path / "x")
    assert list(icl.Comparison.load(tmp_path / "x").per_layer) == [n for n in layer_metrics() if n != "Kendall on keys"]
    assert {metric.released for metric in metrics().values() if metric.released} < set(without.released())


@pytest.fixture(scope="module")
def reordered(llama: icl.Model, task: icl.Task, runs: dict) -> Callable[[tuple[int, ...]], dict]:
    """Runs whose context has the demonstrations in another order than was finetuned on."""

    def run(order: tuple[int, ...]) -> dict:
        demonstrations = task.demonstrations(4, seed=1)
        prompts = icl.build_prompts(llama, task, [demonstrations[index] for index in order], task.queries(7))
        return runs | {"in_context": icl.capture(llama, prompts, progress=False)}

    return run


def positions_of(prompts: Prompts, demonstration: int) -> list[int]:
    """Where a demonstration's tokens stand in the context, counted one by one."""
    at = len(prompts.start)
    for index, tokens in enumerate(prompts.demonstrations):
        if index == demonstration:
            return list(range(at, at + len(tokens)))
        at += len(tokens) + len(prompts.separator)
    raise IndexError(demonstration)


@pytest.mark.parametrize("order", [(2, 0, 3, 1), (3, 2, 1, 0)])
@pytest.mark.parametrize("left_out", [(), (0,), (1, 3)])
def test_another_order_in_context_is_compared_demonstration_by_demonstration(
    reordered: Callable[[tuple[int, ...]], dict], order: tuple[int, ...], left_out: tuple[int, ...]
) -> None:
    runs = reordered(order)
    steps = [-1 if step in left_out else step for step in order]
    per_layer = icl.compare(**runs, steps=steps).per_layer
    delta, in_context, ft = runs["delta"], runs["in_context"], runs["finetuned"]
    context, trained, at = [], [], 0
    for step, tokens in enumerate(delta.demonstrations):
        at += 1  # its start token
        if step not in left_out:
            context += positions_of(in_context.prompts, order.index(step))
            trained += range(at, at + len(tokens))
        at += len(tokens)
    for query, layer in ((0, 1), (5, 2)):
        scores = [
            float((ft.q[query, layer].double() * delta.training_q[layer, token].double()).sum()) for token in trained
        ]
        m_icl = in_context.context_scores[query, layer, context].double().numpy()
        assert per_layer["Kendall"][query, layer].item() == pytest.approx(slow_tau(m_icl, np.array(scores)), abs=1e-12)


def test_recordings_of_another_order_say_which_step_each_token_is(
    reordered: Callable[[tuple[int, ...]], dict],
) -> None:
    runs = reordered((2, 0, 3, 1))
    prompts = runs["in_context"].prompts
    segments = icl.Recordings.of(**runs, steps=[2, -1, 3, 1]).segments
    expected = prompts.segments.tolist()
    for demonstration, step in enumerate((2, SEPARATOR, 3, 1)):
        for position in positions_of(prompts, demonstration):
            expected[position] = step
    assert segments.tolist() == expected


def test_a_context_that_was_not_finetuned_on_at_all_has_no_rank_correlation(
    reordered: Callable[[tuple[int, ...]], dict],
) -> None:
    per_layer = icl.compare(**reordered((1, 0, 2, 3)), steps=[-1] * 4).per_layer
    for name in ("Kendall", "Kendall random", "Kendall by demonstration", "Kendall on keys", "Top-100 recall"):
        assert per_layer[name].isnan().all(), name
    assert per_layer["SimAOU"].isfinite().all()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([2, 0, 3], "for each of 4 demonstrations"),
        ([2, 0, 3, 3], "a training step of its own"),
        ([2, 0, 3, 4], "got step 4 of no tokens; there are 4 steps"),
        ([3, 0, 2, 1], "expected a training step of 26 tokens for a demonstration of as many, got step 3 of 32"),
    ],
)
def test_steps_that_are_not_their_demonstrations_are_refused(
    reordered: Callable[[tuple[int, ...]], dict], steps: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        icl.compare(**reordered((2, 0, 3, 1)), steps=steps)


def captures_of(runs: dict) -> dict:
    """The captures alone, as of a model that was finetuned elsewhere."""
    return {name: run for name, run in runs.items() if name != "delta"}


def test_without_a_delta_all_but_attention_to_the_demonstrations_is_compared(runs: dict, tmp_path: Path) -> None:
    whole = icl.compare(**runs, seed=3)
    without = icl.compare(**captures_of(runs), seed=3)
    needing = {name for name, metric in metrics().items() if {*metric.needs} & {"training_q", "training_k"}}
    assert set(whole.per_layer) - set(without.per_layer) == needing
    assert needing == {name for name in layer_metrics() if name.startswith(("Kendall", "Top-"))}
    for name, values in without.per_layer.items():
        assert torch.equal(values.nan_to_num(), whole.per_layer[name].nan_to_num()), name
    assert without.rec2ftp == whole.rec2ftp
    assert "token-level kendall" not in without.released()
    assert "Kendall" not in set(without.overall()["metric"])
    without.save(tmp_path / "x")
    assert list(icl.Comparison.load(tmp_path / "x").per_layer) == list(without.per_layer)
    (row,) = [line for line in str(without).splitlines() if line.startswith("Kendall")]
    assert "absent: it needs finetuning's training queries (pass compare a delta of icl_dual.finetune)" in row


def test_a_delta_without_training_queries_is_as_none_but_is_checked(runs: dict) -> None:
    delta = dataclasses.replace(runs["delta"])
    for name in ("training_q", "training_k"):
        object.__setattr__(delta, name, None)
    object.__setattr__(delta, "demonstrations", [])
    got = icl.compare(**runs | {"delta": delta})
    assert list(got.per_layer) == list(icl.compare(**captures_of(runs)).per_layer)
    object.__setattr__(delta, "fingerprint", "other")
    with pytest.raises(ValueError, match="expected a delta finetuned from the weights of"):
        icl.compare(**runs | {"delta": delta})


def test_without_a_delta_captures_that_do_not_belong_together_are_refused(runs: dict) -> None:
    runs = captures_of(runs)

    def refused(message: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=message):
            icl.compare(**{**runs, **changed})

    refused("of one model", finetuned=dataclasses.replace(runs["finetuned"], model="other"))
    refused("of the same queries", zero_shot=runs["in_context"])
    refused("or with the finetuned copy", finetuned=runs["zero_shot"])
    refused("zero_shot and in_context captured with the same weights", zero_shot=runs["finetuned"])
    refused("a delta with training queries where steps is given", steps=[0, 1, 2, 3])


def answers(gold: list[int], zsl: list[int], in_context: list[int], ft: list[int]) -> icl.Comparison:
    """A comparison of one layer, whose SimAOU is .5 above its null for every query."""
    labels = {"ZSL": torch.tensor(zsl), "ICL": torch.tensor(in_context), "FT": torch.tensor(ft)}
    n = len(gold)
    null = 0.1 * draw(0, n, 1)
    per_layer = {"SimAOU": null + 0.5, "SimAOU random update": null, "SimAM after FT": null, "SimAM before FT": null}
    per_layer["Kendall"] = torch.full((n, 1), torch.nan).double()
    per_layer["Kendall random"] = null
    return icl.Comparison(torch.tensor(gold), labels, {}, rec2ftp(torch.tensor(gold), *labels.values()), per_layer)


def test_a_printed_comparison_has_five_rows_each_with_a_verdict() -> None:
    n = 20
    comparison = answers([1] * n, [0] * n, [1] * 15 + [0] * 5, [0] * n)
    summary = comparison.summary().set_index("metric").to_dict("index")
    assert {metric: row["baseline"] for metric, row in summary.items()} == {
        "ICL accuracy": "ZSL accuracy",
        "Rec2FTP": "Rec2FTP random",
        "SimAOU": "SimAOU random update",
        "SimAM after FT": "SimAM before FT",
        "Kendall": "Kendall random",
    }
    verdicts = {metric: row["verdict"] for metric, row in summary.items()}
    assert verdicts["ICL accuracy"] == "above zero-shot (p < .001)"
    assert verdicts["Rec2FTP"] == "undefined: finetuning corrects nothing"
    assert verdicts["SimAOU"] == "above its null (p < .001)"
    assert verdicts["SimAM after FT"] == "not above its value before FT (p = 1.000)"
    assert verdicts["Kendall"].startswith("undefined: no demonstration is both in context and trained on")
    accuracy, expected = summary["ICL accuracy"], comparison.intervals()["ICL accuracy"]
    assert accuracy["p"] == pytest.approx(2**-14, abs=2e-4)  # all 15 swaps one way, of 9999 drawn
    assert (accuracy["value"], accuracy["low"], accuracy["high"]) == (0.75, expected.low, expected.high)
    assert (accuracy["n"], accuracy["baseline_value"]) == (20, 0.0)
    lines = str(comparison).splitlines()
    assert len(lines) == 7
    assert lines[-1] == "stability not measured: finetuned once"
    assert lines[1].split("  ")[0] == "ICL accuracy"
    assert "0.750 [" in lines[1]
    assert "ZSL accuracy 0.000" in lines[1]
    assert "undefined (0/0)" in lines[2]
    for text in ("above zero-shot (p &lt; .001)", "SimAOU random update"):
        assert text in comparison._repr_html_()


def test_a_verdict_says_below_and_when_there_are_too_few_queries() -> None:
    n = 20

    def verdicts(*labels: list[int]) -> list[str]:
        return answers(*labels).summary()["verdict"].tolist()

    assert verdicts([1] * n, [1] * n, [0] * n, [1] * n)[0] == "below zero-shot (p < .001)"
    assert verdicts([1] * 4, [0] * 4, [1] * 4, [1] * 4)[0] == "not tested: 4 queries, fewer than 5"
    assert verdicts([1] * 6, [0, 1, 1, 1, 1, 1], [1] * 6, [1] * 6)[1] == "not tested: 1 query, fewer than 5"


def test_a_latex_table_has_every_overall_number(runs: dict) -> None:
    comparison = icl.compare(**runs)
    table = comparison.to_latex()
    assert table.startswith("\\begin{tabular}{llr}\n\\toprule")
    assert "\\midrule" in table
    assert "95 \\%" in table
    assert "SimAM$\\Delta$" in table
    rows = [line.split("&") for line in table.splitlines() if line.count("&") == 2][1:]
    intervals = comparison.intervals()
    assert len(rows) == len(intervals) == 31
    for (name, text, n), (metric, interval) in zip(rows, intervals.items(), strict=True):
        assert name.strip() == metric.replace("Δ", r"$\Delta$")
        assert text.strip().startswith(f"{interval.value:.3f}" if math.isfinite(interval.value) else "undefined")
        assert int(n.strip().removesuffix("\\\\")) == interval.n_queries


def test_a_saved_comparison_that_lacks_a_metric_loads_without_it(runs: dict, tmp_path: Path) -> None:
    comparison = icl.compare(**runs)
    older = {name: values for name, values in comparison.per_layer.items() if name != "SimAOU inflation null"}
    dataclasses.replace(comparison, per_layer=older).save(tmp_path / "x")
    loaded = icl.Comparison.load(tmp_path / "x")
    assert list(loaded.per_layer) == [name for name in layer_metrics() if name != "SimAOU inflation null"]
    assert len(loaded.overall()) == 30
    older = {name: values for name, values in comparison.per_layer.items() if name != "SimAOU"}
    dataclasses.replace(comparison, per_layer=older).save(tmp_path / "y")
    (row,) = [line for line in str(icl.Comparison.load(tmp_path / "y")).splitlines() if line.startswith("SimAOU")]
    assert "absent: the comparison was made without it (compare again)" in row


def test_a_verdict_names_only_a_baseline_that_is_there() -> None:
    n = 20
    comparison = answers([1] * n, [0] * n, [1] * n, [1] * n)
    per_layer = {"SimAOU": comparison.per_layer["SimAOU"], "Kendall": torch.full((n, 1), 0.25).double()}
    lacking = dataclasses.replace(comparison, per_layer=per_layer)
    rows = lacking.summary().set_index("metric").to_dict("index")
    assert (rows["Kendall"]["baseline"], rows["Kendall"]["baseline_value"]) == ("", 0.0)
    assert rows["Kendall"]["verdict"].startswith("above 0 (p")
    assert "Kendall random" not in str(lacking)
    assert rows["SimAOU"]["verdict"] == "not tested: its baseline SimAOU random update is absent (compare again)"


def test_a_comparison_without_a_setting_is_not_loaded(runs: dict, tmp_path: Path) -> None:
    icl.compare(**runs).save(tmp_path / "x")
    tensors, metadata = load_tensors(tmp_path / "x")
    del tensors["predictions/FT"]
    save_tensors(tmp_path / "x", tensors, metadata)
    with pytest.raises(icl.AssetError, match=r"expected predictions by .*, got \('ICL', 'ZSL'\)"):
        icl.Comparison.load(tmp_path / "x")


def test_a_delta_between_models_is_compared_without_attention_to_the_demonstrations(
    llama: icl.Model, make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    tuned = make_model("llama", name="llama")
    delta = icl.finetune(tuned, prompts, lr=0.05, progress=False)
    with delta.applied(tuned):
        between = icl.WeightDelta.between(llama, tuned)
    fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
    experiment = icl.run_experiment(llama, prompts, delta=between, fields=fields, progress=False)
    assert "finetuned elsewhere" in repr(experiment)
    expected = icl.run_experiment(llama, prompts, delta=delta, fields=fields, progress=False)
    got, whole = experiment.compare().per_layer, expected.compare().per_layer
    assert "Kendall" not in got
    torch.testing.assert_close(got["SimAOU"], whole["SimAOU"], atol=1e-4, rtol=1e-3)
    cosine = experiment.updates(progress=False).cosine
    torch.testing.assert_close(cosine, expected.updates(progress=False).cosine, atol=1e-3, rtol=1e-2)
