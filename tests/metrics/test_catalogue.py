import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import noisy_recordings
from matplotlib.axes import Axes

import icl_dual as icl
from icl_dual import dual
from icl_dual import metrics as metrics_package
from icl_dual.metrics import comparison as comparison_module
from icl_dual.metrics.catalogue import (
    BUILT_IN,
    Batch,
    Drawing,
    Metric,
    figures,
    layer_metrics,
    metrics,
    register_metric,
    unregister_metric,
    without_massive_tokens,
)
from icl_dual.recordings.recordings import SETTINGS

PER_LAYER = (
    "SimAOU",
    "SimAOU random",
    "SimAOU random update",
    "SimAOU inflation null",
    "SimAOU unnormalised",
    "SimAOU unnormalised random",
    "SimAM before FT",
    "SimAM after FT",
    "SimAM random",
    "SimAM random update",
    "SimAMΔ",
    "SimAMΔ random",
    "SimAM before FT without massive tokens",
    "SimAM after FT without massive tokens",
    "SimAM random update without massive tokens",
    "SimAMΔ without massive tokens",
    "SimAMΔ random without massive tokens",
    "Kendall",
    "Kendall random",
    "Kendall on keys",
    "Kendall by demonstration",
    "Kendall by demonstration random",
    "Top-100 recall",
    "Top-100 recall random",
    "Top-5 recall by demonstration",
    "Top-5 recall by demonstration random",
)
OVERALL = ("ZSL accuracy", "ICL accuracy", "FT accuracy", "Rec2FTP", "Rec2FTP random", *PER_LAYER)
RELEASED = (
    "Recall2FTP",
    "SimAOU",
    "Random SimAOU",
    "ZSL SimAM",
    "SimAM",
    "Random SimAM",
    "token-level kendall",
    "token-level random_kendall",
    "example-level kendall",
    "example-level random_kendall",
    "token-level recall_topk",
    "token-level random_recall_topk",
    "example-level recall_topk",
    "example-level random_recall_topk",
)


@contextmanager
def registered(*added: Metric) -> Iterator[None]:
    names: list[str] = []
    try:
        for metric in added:
            names.append(register_metric(metric).name)
        yield
    finally:
        for name in names:
            unregister_metric(name)


@pytest.fixture
def recordings() -> icl.Recordings:
    keys = torch.from_numpy(np.random.default_rng(40).normal(size=(2, 5, 3)))
    return dataclasses.replace(noisy_recordings(7, 2, 16, 1.0), training_k=keys)


def update_alignment(batch: Batch) -> torch.Tensor:
    return dual.cosine(batch.h_in_context - batch.h_zero_shot, batch.h_zero_shot)


ALIGNMENT = Metric(
    "ICL update on h_ZSL",
    update_alignment,
    range=(-1, 1),
    null=0.0,
    headline=True,
    drawing=Drawing("ICL", color="C3", axis_label="cosine", beside=("SimAOU random",)),
)


def test_the_order_of_numbers_is_the_papers(recordings: icl.Recordings) -> None:
    comparison = icl.compare_recordings(recordings)
    assert tuple(comparison.per_layer) == layer_metrics() == PER_LAYER
    assert tuple(comparison.overall()["metric"]) == tuple(metrics()) == OVERALL
    assert tuple(comparison.to_frame()["metric"].unique()) == OVERALL
    assert sorted(comparison.released()) == sorted(RELEASED)


def test_entries_agree_with_one_another() -> None:
    known = metrics()
    assert len(known) == len(BUILT_IN), "no name twice"
    for metric in BUILT_IN:
        assert {*metric.baselines, *metric.drawing.beside} <= known.keys() - {metric.name}
        assert metric.range in ((-1, 1), (0, 1))
        assert metric.null is None or metric.range[0] <= metric.null <= metric.range[1]
        assert metric.from_predictions == (metric.axes == "query")
        assert metric.first_queries == ("training_q" in metric.needs)
        assert metric.name.endswith("without massive tokens") == ("residual_norms" in metric.needs)
        assert (metric.interval == "accuracy") == metric.name.endswith("accuracy")
        assert (metric.interval == "proportion") == metric.name.startswith("Rec2FTP")
        for name in metric.baselines:  # so that a verdict has values of the same queries
            assert (known[name].axes, known[name].first_queries) == (metric.axes, metric.first_queries)
    assert [metric.name for metric in BUILT_IN if metric.released_zeros] == [
        metric.name for metric in BUILT_IN if metric.released and metric.name.startswith("Sim")
    ]
    assert list(figures()) == ["SimAOU", "SimAM", "Kendall"]


def test_a_registered_metric_is_compared_tabled_saved_and_drawn(recordings: icl.Recordings, tmp_path: Path) -> None:
    before = icl.compare_recordings(recordings)
    with registered(ALIGNMENT):
        comparison = icl.compare_recordings(recordings)
        assert tuple(comparison.per_layer) == (*PER_LAYER, ALIGNMENT.name)
        h_zsl, h_icl = (recordings.attn_out[setting].double() for setting in ("ZSL", "ICL"))
        expected = dual.cosine(h_icl - h_zsl, h_zsl)
        assert torch.equal(comparison.per_layer[ALIGNMENT.name], expected)
        for name, values in before.per_layer.items():
            assert torch.equal(comparison.per_layer[name].nan_to_num(), values.nan_to_num()), name
        rows = comparison.to_frame().query("metric == @ALIGNMENT.name")
        assert rows["value"].tolist() == pytest.approx([expected.mean().item(), *expected.mean(0).tolist()])
        assert comparison.overall()["metric"].tolist() == [*OVERALL, ALIGNMENT.name]
        assert "ICL update on h\\_ZSL" in comparison.to_latex()
        (line,) = [line for line in str(comparison).splitlines() if line.startswith(ALIGNMENT.name)]
        assert " 0 (p" in line, "without a baseline it is held against its null value"
        comparison.save(tmp_path / "x")
        loaded = icl.Comparison.load(tmp_path / "x")
        assert list(loaded.per_layer) == list(comparison.per_layer)
        ax = icl.plots.layers(loaded, ALIGNMENT.name)
        drawn = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
        assert [(line.get_label(), line.get_color()) for line in drawn] == [
            ("ICL", icl.plots.resolved("C3")),
            ("random vector (the paper's)", "0.5"),
        ]
        np.testing.assert_allclose(np.asarray(drawn[0].get_ydata()), expected.mean(0))
        assert ax.get_ylabel() == "cosine"
        plt.close("all")
    assert tuple(metrics()) == OVERALL
    kept = icl.Comparison.load(tmp_path / "x")  # a metric that is not registered now
    assert list(kept.per_layer) == [*PER_LAYER, ALIGNMENT.name]
    assert torch.equal(kept.per_layer[ALIGNMENT.name], expected)
    assert kept.overall()["metric"].tolist() == [*OVERALL, ALIGNMENT.name]
    (line,) = (
        line for line in icl.plots.layers(kept, ALIGNMENT.name).get_lines() if line.get_label() == ALIGNMENT.name
    )
    np.testing.assert_allclose(np.asarray(line.get_ydata()), expected.mean(0))
    with pytest.raises(ValueError, match=f"got '{ALIGNMENT.name}'"):
        icl.plots.layers(before, ALIGNMENT.name)
    plt.close("all")


def test_a_comparison_from_before_a_metric_was_registered_lacks_it(recordings: icl.Recordings, tmp_path: Path) -> None:
    icl.compare_recordings(recordings).save(tmp_path / "x")
    with registered(ALIGNMENT):
        loaded = icl.Comparison.load(tmp_path / "x")
        assert tuple(loaded.per_layer) == PER_LAYER
        (line,) = [line for line in str(loaded).splitlines() if line.startswith(ALIGNMENT.name)]
        assert "absent: the comparison was made without it (compare again)" in line
        with pytest.raises(ValueError, match=f"expected comparisons with '{ALIGNMENT.name}', got at least one without"):
            icl.plots.layers(dataclasses.replace(loaded, per_layer={}), ALIGNMENT.name)


def test_a_metric_of_predictions_is_computed_of_older_comparisons_too(
    recordings: icl.Recordings, tmp_path: Path
) -> None:
    labels = {"ZSL": torch.tensor([0, 1, 1, 0, 1, 0, 0]), "ICL": torch.tensor([0, 1, 0, 0, 1, 0, 1])}
    recordings = dataclasses.replace(recordings, predictions=recordings.predictions | labels)
    icl.compare_recordings(recordings).save(tmp_path / "x")
    agreement = Metric(
        "ICL agrees with ZSL",
        lambda batch: (batch.labels_in_context == batch.labels_zero_shot).double(),
        axes="query",
        from_predictions=True,
        range=(0, 1),
        interval="proportion",
    )
    with registered(agreement):
        loaded = icl.Comparison.load(tmp_path / "x")
        assert loaded.by_query()[agreement.name].tolist() == [1, 1, 0, 1, 1, 1, 0]
        assert loaded.intervals()[agreement.name].value == pytest.approx(5 / 7)
        assert agreement.name not in loaded.per_query


def test_a_metric_by_query_of_recordings_is_kept(recordings: icl.Recordings, tmp_path: Path) -> None:
    norm = Metric("‖h_ICL‖", lambda batch: batch.h_in_context[:, -1].norm(dim=-1), axes="query")
    with registered(norm):
        comparison = icl.compare_recordings(recordings)
    expected = recordings.attn_out["ICL"][:, -1].norm(dim=-1)
    assert torch.equal(comparison.per_query[norm.name], expected)
    comparison.save(tmp_path / "x")
    loaded = icl.Comparison.load(tmp_path / "x")
    assert torch.equal(loaded.by_query()[norm.name], expected)
    rows = loaded.to_frame().query("metric == @norm.name")
    assert rows["value"].tolist() == pytest.approx([expected.mean().item()])
    assert list(loaded.by_query()) == [*OVERALL[:5], norm.name, *PER_LAYER]


def test_a_registered_metric_of_first_queries_has_these_only(recordings: icl.Recordings) -> None:
    most = Metric(
        "most attended demonstration",
        lambda batch: batch.demo_weights_in_context.amax(-1),
        first_queries=True,
        needs=("training_q",),
    )
    with registered(most):
        comparison = icl.compare_recordings(recordings, kendall_queries=4)
        assert comparison.per_layer[most.name].shape == (4, 2)
        assert (comparison.per_layer[most.name] > 0.5).all()
        without = dataclasses.replace(recordings, training_q=None, training_segments=None)
        assert most.name not in icl.compare_recordings(without).per_layer


def test_a_baseline_of_ones_own_is_random_and_independent_of_batches(
    recordings: icl.Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise(name: str) -> Metric:
        return Metric(name, lambda batch: torch.from_numpy(batch.generator(name).random((len(batch.gold), 2))))

    with registered(noise("a"), noise("b")):
        whole = icl.compare_recordings(recordings, seed=1).per_layer
        other_seed = icl.compare_recordings(recordings, seed=2).per_layer
        monkeypatch.setattr(comparison_module, "QUERIES_AT_ONCE", 3)
        in_batches = icl.compare_recordings(recordings, seed=1).per_layer
    assert torch.equal(whole["a"], in_batches["a"])
    assert torch.equal(whole["SimAOU random"], in_batches["SimAOU random"])
    assert not torch.equal(whole["a"], whole["b"])
    assert not torch.equal(whole["a"], other_seed["a"])
    assert len(whole["a"].unique()) == 14


def test_what_a_batch_holds_is_computed_once(recordings: icl.Recordings) -> None:
    batch = Batch.of(recordings, torch.tensor([4, 2]), n_first=1)
    assert torch.equal(batch.h_finetuned, recordings.attn_out["FT"][[4, 2]].double())
    assert torch.equal(batch.m_zero_shot, recordings.query_scores["ZSL"][[4, 2]].double())
    assert torch.equal(batch.q_finetuned, recordings.q[[4]])
    assert batch.output_nulls is batch.output_nulls, "drawing again would go on in the stream"
    assert batch.random_m_update is batch.random_m_update
    assert (batch.n_layers, batch.n_heads) == (2, 2)
    assert batch.token_weights_in_context.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda batch: batch.h_in_context, r"torch.float64 of shape \[7, 2, 16\]"),
        (lambda batch: batch.h_in_context[:-1, :, 0], r"torch.float64 of shape \[6, 2\]"),
        (lambda batch: batch.h_in_context.mean(), r"torch.float64 of shape \[\]"),
        (lambda batch: batch.h_in_context[..., 0] > 0, r"torch.bool of shape \[7, 2\]"),
        (lambda batch: batch.h_in_context[..., 0].numpy(), "ndarray"),
        (lambda batch: 0.5, "float"),
    ],
)
def test_a_metric_of_the_wrong_shape_is_refused(recordings: icl.Recordings, function: object, got: str) -> None:
    metric = Metric("mine", lambda batch: batch.gold)
    object.__setattr__(metric, "function", function)  # as without the type checks that tests have on
    message = (
        rf"metric 'mine': expected its function to return a floating-point tensor \[query layer\] = \[7, 2\], got {got}"
        ": return one value for each query and layer, NaN where it is undefined"
    )
    with registered(metric), pytest.raises(ValueError, match=message):
        icl.compare_recordings(recordings)


def correlation(batch: Batch) -> torch.Tensor:
    """Return Pearson's r of ICL's and FT's attention scores over each query's own tokens, as a mean over heads."""
    mask = batch.query_mask[:, None, None].double()

    def centred(m: torch.Tensor) -> torch.Tensor:
        return mask * (m - (mask * m).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))

    return dual.cosine(centred(batch.m_in_context), centred(batch.m_finetuned)).mean(-1)


def test_the_query_mask_is_true_at_a_querys_own_tokens(
    recordings: icl.Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_module, "QUERIES_AT_ONCE", 3)
    lengths = torch.tensor([5, 3, 4, 2, 5, 4, 3])
    past_end = torch.arange(5) >= lengths[:, None]
    scores = {
        name: m.masked_fill(past_end[:, None, None], 0) + 0.3 * ~past_end[:, None, None]
        for name, m in recordings.query_scores.items()
    }
    recordings = dataclasses.replace(recordings, query_scores=scores, query_lengths=lengths)
    with registered(Metric("correlation", correlation, range=(-1, 1))):
        values = icl.compare_recordings(recordings).per_layer["correlation"]
    for query, length in enumerate(lengths):
        for layer in range(2):
            pairs = [[scores[name][query, layer, head, :length].numpy() for name in ("ICL", "FT")] for head in range(2)]
            expected = np.mean([np.corrcoef(icl_scores, ft_scores)[0, 1] for icl_scores, ft_scores in pairs])
            np.testing.assert_allclose(values[query, layer], expected, rtol=1e-9, atol=1e-12)
    batch = Batch.of(recordings, torch.tensor([3, 0]), n_first=0)
    assert batch.query_mask.tolist() == [[True, True, False, False, False], [True] * 5]


def with_scores_of_ordinary_tokens(recordings: icl.Recordings) -> icl.Recordings:
    """The recordings with only the scores of ordinary tokens, at the first places, as of shorter queries."""
    kept = torch.zeros(recordings.query_scores["ZSL"].shape[0], 5, dtype=torch.bool)
    norms = recordings.residual_norms
    assert norms is not None
    for query, token in itertools.product(range(len(kept)), range(5)):
        within = token < int(recordings.query_lengths[query])
        kept[query, token] = within and all((of[query, :, token] < 10).all() for of in norms.values())
    scores = {name: torch.zeros_like(values) for name, values in recordings.query_scores.items()}
    for name, values in recordings.query_scores.items():
        for query, is_kept in enumerate(kept):
            scores[name][query, ..., : int(is_kept.sum())] = values[query][..., is_kept]
    return dataclasses.replace(recordings, query_scores=scores, query_lengths=kept.sum(1), residual_norms=None)


def test_metrics_without_massive_tokens_are_those_of_queries_that_lack_them(recordings: icl.Recordings) -> None:
    assert recordings.residual_norms is not None
    assert recordings.ordinary_tokens.sum() == 7 * 5 - 4
    got = icl.compare_recordings(recordings).per_layer
    expected = icl.compare_recordings(with_scores_of_ordinary_tokens(recordings)).per_layer
    for name in ("SimAM before FT", "SimAM after FT", "SimAMΔ"):
        torch.testing.assert_close(got[f"{name} without massive tokens"], expected[name], atol=1e-12, rtol=0)
        assert not torch.equal(got[f"{name} without massive tokens"][::2], got[name][::2])
        assert torch.equal(got[f"{name} without massive tokens"][1::2], got[name][1::2]), "these have none"
    for name in ("SimAM random update", "SimAMΔ random"):
        noisy = got[f"{name} without massive tokens"]
        assert noisy.isfinite().all()
        assert not torch.equal(noisy[::2], got[name][::2])
        assert torch.equal(noisy[1::2], got[name][1::2]), "the same noise"


def test_a_random_update_without_massive_tokens_is_as_long_as_finetunings_without_them(
    recordings: icl.Recordings,
) -> None:
    batch = Batch.of(recordings, torch.arange(7), n_first=7).without_massive_tokens
    change = recordings.query_scores["FT"] - recordings.query_scores["ZSL"]
    change[~recordings.ordinary_tokens[:, None, None].expand_as(change)] = 0
    torch.testing.assert_close(batch.random_m_update.norm(dim=-1), change.norm(dim=-1))
    assert (batch.random_m_update[0, ..., 0] == 0).all(), "massive"


def test_without_massive_tokens_other_metrics_are_what_they_were(recordings: icl.Recordings) -> None:
    norms = {name: torch.ones(7, 2, 5) for name in SETTINGS}
    lacking = dataclasses.replace(recordings, residual_norms=None)
    per_layer, without = (icl.compare_recordings(r, seed=3).per_layer for r in (recordings, lacking))
    assert set(per_layer) - set(without) == {name for name in per_layer if name.endswith("without massive tokens")}
    for name, values in without.items():
        assert torch.equal(values.nan_to_num(), per_layer[name].nan_to_num()), name
    ordinary = icl.compare_recordings(dataclasses.replace(recordings, residual_norms=norms), seed=3).per_layer
    for name in set(per_layer) - set(without):
        assert torch.equal(ordinary[name], ordinary[name.removesuffix(" without massive tokens")]), "none is massive"


def test_a_query_of_massive_tokens_alone_is_undefined_without_them(recordings: icl.Recordings) -> None:
    norms = {name: torch.ones(7, 2, 5) for name in SETTINGS}
    norms["FT"][2, 1] = 1000.0
    per_layer = icl.compare_recordings(dataclasses.replace(recordings, residual_norms=norms)).per_layer
    for name, values in per_layer.items():
        if name.endswith("without massive tokens"):
            assert values[2].isnan().all(), name
            assert values[[0, 1, 3, 4, 5, 6]].isfinite().all(), name


def test_a_metric_of_ones_own_stands_without_massive_tokens(recordings: icl.Recordings) -> None:
    def mean_score(batch: Batch) -> torch.Tensor:
        mask = batch.query_mask[:, None, None]
        return (batch.m_in_context * mask).sum((-1, -2)) / mask.sum(-1).squeeze(-1)

    metric = Metric("Mean score", mean_score, headline=True)
    with registered(metric, without_massive_tokens(metric)):
        per_layer = icl.compare_recordings(recordings).per_layer
        expected = recordings.query_scores["ICL"][0, ..., 1:].sum((-1, -2)) / 4
        torch.testing.assert_close(per_layer["Mean score without massive tokens"][0], expected)
        assert torch.equal(per_layer["Mean score without massive tokens"][1], per_layer["Mean score"][1])
        lacking = icl.compare_recordings(dataclasses.replace(recordings, residual_norms=None))
        assert "Mean score without massive tokens" not in lacking.per_layer


def test_a_batch_of_recordings_without_norms_says_what_it_lacks(recordings: icl.Recordings) -> None:
    lacking = dataclasses.replace(recordings, residual_norms=None)
    batch = Batch.of(lacking, torch.arange(7), n_first=7)
    with pytest.raises(icl.RecordingError, match=r"expected recordings with residual_norms, got .*: record again"):
        _ = batch.without_massive_tokens.m_zero_shot


def test_values_out_of_a_metrics_range_are_refused(recordings: icl.Recordings) -> None:
    metric = Metric("mine", lambda batch: batch.h_in_context[..., 0] * 0 + 1.5, range=(-1, 1))
    with registered(metric), pytest.raises(ValueError, match=r"'mine': expected values from -1 to 1, got 1.5: correct"):
        icl.compare_recordings(recordings)
    rounded = Metric("mine", lambda batch: batch.h_in_context[..., 0] * 0 + 1 + 1e-9, range=(-1, 1))
    with registered(rounded):
        icl.compare_recordings(recordings)


def test_a_metric_of_predictions_that_reads_more_is_refused(recordings: icl.Recordings) -> None:
    comparison = icl.compare_recordings(recordings)
    metric = Metric("mine", lambda batch: batch.h_in_context.mean((1, 2)), axes="query", from_predictions=True)
    with registered(metric), pytest.raises(ValueError, match="register it with from_predictions=False"):
        comparison.overall()


def test_an_error_of_a_registered_metrics_function_names_the_metric(recordings: icl.Recordings) -> None:
    def fails(batch: Batch) -> torch.Tensor:
        return batch.predictions["no such setting"].double()

    comparison = icl.compare_recordings(recordings)
    note = "raised by the function of the metric 'mine': correct it and register it again"
    with registered(Metric("mine", fails, axes="query", from_predictions=True)), pytest.raises(KeyError) as raised:
        comparison.by_query()
    assert raised.value.__notes__ == [note]
    with registered(Metric("mine", fails)), pytest.raises(KeyError) as raised:
        icl.compare_recordings(recordings)
    assert raised.value.__notes__ == [note]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": "layer query"}, r"expected axes out of \('query', 'query layer'\), got 'layer query': choose"),
        ({"interval": "t"}, r"expected interval out of \('bootstrap', 'proportion', 'accuracy'\), got 't': choose"),
        ({"range": (1, -1)}, r"expected range as the least and the largest .*, got \(1, -1\): pass the smaller first"),
        ({"range": (0, float("nan"))}, r"expected range .*, got \(0, nan\)"),
        ({"range": (0,)}, r"expected range .*, got \(0,\)"),
        ({"baselines": "SimAOU"}, r"baselines as a tuple of names, got the string 'SimAOU': pass \('SimAOU',\)"),
        ({"needs": "training_q"}, r"needs as a tuple of names, got the string 'training_q': pass \('training_q',\)"),
        ({"needs": ("q",)}, r"expected needs out of \('training_q', .*\), got \['q'\]: choose"),
    ],
)
def test_a_metric_of_unknown_settings_is_refused(change: dict, message: str) -> None:
    metric: Any = Metric("mine", update_alignment)
    vars(metric).update(change)  # as without the type checks that tests have on
    with pytest.raises(ValueError, match=rf"metric 'mine': .*{message}"):
        metric.__post_init__()


def test_one_name_in_place_of_a_tuple_is_refused_as_beside() -> None:
    drawing: Any = Drawing()
    vars(drawing)["beside"] = "SimAOU"  # as without the type checks that tests have on
    with pytest.raises(ValueError, match=r"beside as a tuple of names, got the string 'SimAOU': pass \('SimAOU',\)"):
        drawing.__post_init__()


def test_only_a_metric_can_be_registered() -> None:
    function: Any = update_alignment
    with pytest.raises(TypeError, match=r"expected metric as an instance of icl_dual\.Metric, got <function"):
        register_metric(function)
    assert tuple(metrics()) == OVERALL


def test_what_a_metric_is_made_of_is_public() -> None:
    assert (metrics_package.Batch, metrics_package.Drawing) == (Batch, Drawing)
    assert {"Batch", "Drawing", "Metric"} <= set(metrics_package.__all__)


def lines_of(ax: Axes) -> list[tuple[str, str, str]]:
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    return [(str(line.get_label()), str(line.get_color()), str(line.get_linestyle())) for line in lines]


def test_a_registered_metric_is_drawn_with_its_baselines(recordings: icl.Recordings) -> None:
    baseline = Metric("mine at random", update_alignment)
    metric = Metric("mine", update_alignment, baselines=("mine at random", "SimAOU random"))
    with registered(baseline, metric):
        comparison = icl.compare_recordings(recordings)
        ax = icl.plots.layers(comparison, "mine")
        baselines = [("mine at random", "0.5", ":"), ("SimAOU random", "0.5", ":")]
        assert lines_of(ax) == [("mine", icl.plots.resolved("C0"), "-"), *baselines]
        alone = icl.plots.layers(comparison, "SimAMΔ")
        assert lines_of(alone) == [("SimAMΔ", icl.plots.resolved("C0"), "-")], (
            "pictures of built-in metrics are what they were"
        )
    plt.close("all")


def test_a_metric_that_is_not_registered_now_is_drawn_from_what_was_saved(recordings: icl.Recordings) -> None:
    with registered(ALIGNMENT):
        comparison = icl.compare_recordings(recordings)
    ax = icl.plots.layers(comparison, ALIGNMENT.name)
    assert lines_of(ax) == [(ALIGNMENT.name, icl.plots.resolved("C0"), "-")]
    assert ax.get_ylabel() == ALIGNMENT.name
    without = icl.compare_recordings(recordings)
    with pytest.raises(ValueError, match=rf"got '{ALIGNMENT.name}': .*register_metric"):
        icl.plots.layers([comparison, without], ALIGNMENT.name)
    plt.close("all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "SimAOU"}, "expected a metric name that is not taken, got 'SimAOU': choose another"),
        ({"name": "SimAM"}, "not taken, got 'SimAM'"),  # a figure's name
        ({"name": "ICL accuracy"}, "not taken, got 'ICL accuracy'"),
        ({"name": ""}, "not taken, got ''"),
        ({"baselines": ("SimAOU", "mine at random")}, r"got \['mine at random'\]: register these first"),
        ({"drawing": Drawing(beside=("other",))}, r"beside 'mine', got \['other'\]"),
        (
            {"from_predictions": True},
            "from predictions alone to have axes='query' and no needs, got axes='query layer'",
        ),
    ],
)
def test_metrics_that_cannot_be_registered_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_metric(dataclasses.replace(Metric("mine", update_alignment), **change))
    assert tuple(metrics()) == OVERALL


def test_a_name_can_be_registered_once_and_again_after_it_was_removed() -> None:
    expected = f"got '{ALIGNMENT.name}': .* with icl_dual.metrics.unregister_metric"
    with registered(ALIGNMENT), pytest.raises(ValueError, match=expected):
        register_metric(ALIGNMENT)
    with registered(ALIGNMENT):
        assert ALIGNMENT.name in layer_metrics()
    with pytest.raises(ValueError, match=r"a metric that you registered, out of \[\], got 'SimAOU': choose"):
        unregister_metric("SimAOU")
