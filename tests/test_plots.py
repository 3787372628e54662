import dataclasses
import html
import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import draw
from matplotlib.patches import Rectangle

import icl_dual as icl
from icl_dual.metrics.stability import Stability
from icl_dual.models import tiny_model
from icl_dual.statistics.intervals import Interval


@pytest.fixture(scope="module")
def comparison(llama: icl.Model, task: icl.Task, tmp_path_factory: pytest.TempPathFactory) -> icl.Comparison:
    cell = icl.Cell(model="llama", task="toy", k=3, seed=1, lr=0.05, n_queries=5, replicas=0)
    return icl.run_cell(llama, task, cell, tmp_path_factory.mktemp("cells") / "cell", progress=False).comparison


@pytest.mark.parametrize(
    ("metric", "drawn"),
    [
        ("SimAOU", ["SimAOU", "SimAOU unnormalised", "SimAOU inflation null", "SimAOU random"]),
        ("SimAM", ["SimAM after FT", "SimAM before FT", "SimAM random"]),
        ("Kendall", ["Kendall", "Kendall on keys", "Kendall random"]),
        ("SimAM random update", ["SimAM random update"]),
    ],
)
def test_layers_draws_the_means_on_the_axes_it_is_given(
    comparison: icl.Comparison, metric: str, drawn: list[str], tmp_path: Path
) -> None:
    fig, ax = plt.subplots()
    assert icl.plots.layers([comparison, comparison], metric, ax=ax) is ax
    lines = [line for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 3]
    for name, line in zip(drawn, lines, strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), comparison.per_layer[name].mean(0))
    fig.savefig(tmp_path / "figure.png")
    plt.close(fig)


def test_layers_draws_the_range_of_the_means_over_replicas(comparison: icl.Comparison) -> None:
    shifts = torch.tensor([[0.1, -0.3, 0.0], [0.2, -0.1, 0.0]], dtype=torch.float64)
    stability = Stability(
        replicas=("a", "b"), n_queries=5, shifts={"SimAOU": torch.zeros(2)}, layer_shifts={"SimAOU": shifts}
    )
    moved = dataclasses.replace(comparison, stability=stability)

    def edges(comparisons: list[icl.Comparison]) -> list[list[float]]:
        ax = icl.plots.layers(comparisons, "SimAOU")
        mean = comparison.per_layer["SimAOU"].mean(0).numpy()
        dotted = [line for line in ax.get_lines() if line.get_color() == "C0" and line.get_linestyle() == ":"]
        plt.close("all")
        return [(np.asarray(line.get_ydata()) - mean).tolist() for line in dotted]

    assert edges([moved]) == [pytest.approx([0, -0.3, 0], abs=1e-6), pytest.approx([0.2, 0, 0], abs=1e-6)]
    two_seeds = [pytest.approx([0, -0.3 / 2**0.5, 0], abs=1e-6), pytest.approx([0.2 / 2**0.5, 0, 0], abs=1e-6)]
    assert edges([moved, moved]) == two_seeds, "as independent errors add up"
    assert edges([comparison]) == []
    assert edges([moved, comparison]) == [], "one of them was finetuned once"


def test_unstable_estimates_are_crosses(comparison: icl.Comparison) -> None:
    stable, unstable = Interval(0.3, 0.1, 0.6, 9, spread=0.1), Interval(0.5, 0.2, 0.6, 9, spread=0.3, unstable=True)
    ax = icl.plots.dots({"claim": {"a": stable}, "control": {"a": unstable}})
    crosses = [np.asarray(line.get_xdata()).tolist() for line in ax.get_lines() if line.get_marker() == "x"]
    assert crosses == [[0.5]]
    ax = icl.plots.curves({"SimAOU": {0.1: stable, 0.2: unstable}})
    crosses = [np.asarray(line.get_xydata()).tolist() for line in ax.get_lines() if line.get_marker() == "x"]
    assert crosses == [[[0.2, 0.5]]]
    plt.close("all")


def test_label_counts_draws_shares(comparison: icl.Comparison) -> None:
    ax = icl.plots.label_counts(comparison, ("no", "perhaps"))
    bars = [patch.get_height() for patch in ax.patches if isinstance(patch, Rectangle)]
    heights = [bars[at : at + 2] for at in range(0, len(bars), 2)]
    assert [sum(group) for group in heights] == pytest.approx([1.0] * 4)
    gold = (comparison.gold == 1).double().mean().item()
    assert heights[0] == pytest.approx([1 - gold, gold])
    plt.close("all")


def test_unknown_metrics_are_refused(comparison: icl.Comparison) -> None:
    for name in ("Rec2FTP", "SimilarityOfUpdates"):  # one has no layers, the other is none
        expected = (
            rf"\['SimAOU', 'SimAM', 'Kendall'\] or of .*'SimAM random update', .* got '{name}': .*register_metric"
        )
        with pytest.raises(ValueError, match=expected):
            icl.plots.layers(comparison, name)


def test_the_figures_legends_are_the_catalogues(comparison: icl.Comparison) -> None:
    expected = {
        "SimAOU": [
            ("ICL and FT", "C0", "-"),
            ("unnormalised", "C2", "--"),
            ("random updates for both", "0.3", "-."),
            ("ICL and random", "0.5", ":"),
        ],
        "SimAM": [("ICL and FT", "C0", "-"), ("ICL and ZSL (before FT)", "C1", "--"), ("ICL and random", "0.5", ":")],
        "Kendall": [
            ("ICL and FT, by its queries", "C0", "-"),
            ("by its keys", "C2", "--"),
            ("ICL and random", "0.5", ":"),
        ],
    }
    labels = {"SimAOU": "SimAOU (cosine)", "SimAM": "SimAM (cosine)", "Kendall": "Kendall's τ"}
    assert tuple(expected) == icl.plots.LAYERWISE
    for figure, lines in expected.items():
        ax = icl.plots.layers(comparison, figure)
        drawn = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
        assert [(line.get_label(), line.get_color(), line.get_linestyle()) for line in drawn] == lines
        assert ax.get_ylabel() == labels[figure]
        assert ax.get_legend() is not None
    plt.close("all")


def test_a_metric_that_comparisons_lack_is_left_out_or_refused(comparison: icl.Comparison) -> None:
    names = ("Kendall", "Kendall on keys")
    keyless, without = (
        dataclasses.replace(
            comparison, per_layer={name: v for name, v in comparison.per_layer.items() if name not in lacking}
        )
        for lacking in (names[1:], {*names, "Kendall random"})
    )
    ax = icl.plots.layers([comparison, keyless], "Kendall")
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["ICL and FT, by its queries", "ICL and random"]
    with pytest.raises(ValueError, match=r"expected comparisons with 'Kendall', got at least one without: .*delta"):
        icl.plots.layers([comparison, without], "Kendall")
    plt.close("all")


def test_by_layer_draws_means_and_leaves_undefined_values_out() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 2.0, 5.0]])
    ax = icl.plots.by_layer({"a": values, "b": 2 * values}, ylabel="share")
    lines = [line for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 3]
    for line, expected in zip(lines, ([2, 2, 5], [4, 4, 10]), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), expected)
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    plt.close("all")


def test_dots_draws_rows_from_the_top_hollow_where_there_is_no_interval() -> None:
    nan = float("nan")
    known, unknown, none = (Interval(0.3, 0.1, 0.6, 9), Interval(0.5, nan, nan, 3), Interval(nan, nan, nan, 0))
    ax = icl.plots.dots({"claim": {"a": known, "b": unknown}, "control": {"a": none}})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["claim", "control"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    drawn = {
        (line.get_markerfacecolor() == "white"): np.asarray(line.get_xdata()).tolist()
        for line in ax.get_lines()
        if line.get_marker() == "o" and len(np.asarray(line.get_xdata()))
    }
    assert drawn[False] == [0.3]
    assert drawn[True][-1] == 0.5
    bars = [np.asarray(path.vertices)[:, 0].tolist() for of in ax.collections for path in of.get_paths()]
    assert [0.1, 0.6] in bars
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    plt.close("all")


def test_curves_draws_estimates_with_bands_that_are_their_intervals() -> None:
    ax = icl.plots.curves({"ICL": {0: Interval(0.5, 0.4, 0.6, 9), 8: Interval(0.7, 0.6, 0.9, 9)}}, ylabel="accuracy")
    (line,) = ax.get_lines()
    assert np.asarray(line.get_xydata()).tolist() == [[0, 0.5], [8, 0.7]]
    corners = {tuple(corner) for corner in np.asarray(ax.collections[0].get_paths()[0].vertices).tolist()}
    assert {(0, 0.4), (0, 0.6), (8, 0.6), (8, 0.9)} <= corners
    assert ax.get_ylabel() == "accuracy"
    plt.close("all")


def test_against_null_draws_both_means_with_bands_of_95_per_cent() -> None:
    values = torch.linspace(0, 1, 101)[:, None, None].expand(-1, 3, 2)
    ax = icl.plots.against_null(values, values - 1)
    null, ours = (line for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 3)
    np.testing.assert_allclose(np.asarray(ours.get_ydata()), 0.5)
    np.testing.assert_allclose(np.asarray(null.get_ydata()), -0.5)
    edges = ax.collections[1].get_paths()[0].vertices
    expected = np.quantile(values[:, 0].numpy(), [0.025, 0.975])
    np.testing.assert_allclose([np.asarray(edges)[:, 1].min(), np.asarray(edges)[:, 1].max()], expected, atol=1e-6)
    plt.close("all")


def test_heads_draws_layers_across_and_heads_upwards() -> None:
    values = torch.arange(6.0).view(1, 3, 2).expand(4, -1, -1)
    ax = icl.plots.heads(values, label="w", limits=(0, 5))
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), [[0, 2, 4], [1, 3, 5]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "head")
    plt.close("all")


def test_massive_activations_draws_the_largest_ratio_by_layer_of_each_setting() -> None:
    norms = {name: 1 + 0.1 * draw(at, 4, 3, 5).abs() for at, name in enumerate(("ZSL", "ICL", "FT"))}
    norms["ZSL"][2, 1, 3] = 400.0
    massive = icl.MassiveActivations(model="toy", queries=((1, 2, 3, 4, 5),) * 4, norms=norms, ratio=20)
    ax = icl.plots.massive_activations(massive)
    assert ax.get_yscale() == "log"
    *lines, limit = ax.get_lines()
    assert [line.get_label() for line in lines] == ["ZSL", "ICL", "FT"]
    for line, of_setting in zip(lines, norms.values(), strict=True):
        expected = [of_setting[:, layer].max() / np.median(of_setting[:, layer]) for layer in range(3)]
        np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), expected)
    assert (limit.get_label(), limit.get_ydata()) == ("massive: above 20", [20, 20])
    given = plt.figure().subplots()
    assert icl.plots.massive_activations(massive, ax=given) is given
    assert given.get_legend() is None
    plt.close("all")


def test_values_by_other_axes_are_refused() -> None:
    by_layers, by_heads = torch.zeros(4, 3), torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match=r"expected values as .* \[query layer head\], got .* and shape \[4, 3\]"):
        icl.plots.heads(by_layers)
    with pytest.raises(ValueError, match=r"expected series\['a'\] as .* \[query layer\], got .* \[4, 3, 2\]"):
        icl.plots.by_layer({"a": by_heads})
    with pytest.raises(ValueError, match=r"expected null as .* \[query layer head\]"):
        icl.plots.against_null(by_heads, by_layers)
    plt.close("all")


def test_demonstrations_are_drawn_from_the_top_and_named() -> None:
    shares = torch.tensor([[0.2, 0.8], [1.5, -0.5], [0.0, 1.0]])
    ax = icl.plots.demonstrations(shares, ["one", "two"], label="share")
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), shares.T)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["one", "two"]
    with pytest.raises(ValueError, match="a name for each of 2 demonstrations, at least one, got 1"):
        icl.plots.demonstrations(shares, ["one"])
    with pytest.raises(ValueError, match="at least one, got 0"):
        icl.plots.demonstrations(shares[:, :0], [])
    plt.close("all")


NAMES = ("costs $5 or $6", "$\\nosuch{$", "_hidden", "a_b & <c> \\$")


def texts_of_picture(ax: Any) -> str:
    """The texts of a figure as a reader sees them: SVG holds them as such where they are no formulas."""
    picture = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        ax.figure.savefig(picture, format="svg")
    plt.close(ax.figure)
    return html.unescape(picture.getvalue())


def test_names_in_figures_are_text_and_no_formulas(comparison: icl.Comparison) -> None:
    series = {name: torch.rand(4, 3) for name in NAMES}
    interval = Interval(0.5, 0.4, 0.6, 9)
    layers = dataclasses.replace(comparison, per_layer={**comparison.per_layer, NAMES[0]: torch.rand(5, 3)})
    pictures = [
        (icl.plots.by_layer(series), NAMES),
        (icl.plots.dots({name: {name: interval} for name in NAMES}), NAMES),
        (icl.plots.curves({name: {1: interval} for name in NAMES}), NAMES),
        (icl.plots.demonstrations(torch.rand(3, 4), NAMES), NAMES),
        (icl.plots.label_counts(comparison, NAMES), NAMES),
        (icl.plots.layers(layers, NAMES[0]), NAMES[:1]),
    ]
    for ax, names in pictures:
        texts = texts_of_picture(ax)
        for name in names:
            assert name in texts, name


def test_a_title_may_be_a_formula_and_ordinary_names_are_drawn_as_they_are() -> None:
    ax = icl.plots.by_layer({"ΔW_FT": torch.rand(4, 3)}, ylabel="$x^2$")
    assert ax.get_ylabel() == "$x^2$"
    assert ax.get_legend_handles_labels()[1] == ["ΔW_FT"]
    plt.close("all")


@pytest.fixture(scope="module")
def captured_sources() -> icl.SourceAttention:
    model = tiny_model()
    parts = [("document", "It costs $5 or $6.\n"), ("_question", "How much? ")]
    return icl.capture_sources(
        model, icl.prompt_from_parts(parts, model), positions=(-1, -2), logits=[3], progress=False
    )


@pytest.mark.parametrize("quantity", ["mass", "norm", "share", "logit_effect"])
def test_sources_draws_a_line_for_each_source(captured_sources: icl.SourceAttention, quantity: Any) -> None:
    ax = icl.plots.sources(captured_sources, quantity)
    legend = ax.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [icl.plots.literal(name) for name in captured_sources.names]
    values = captured_sources.values(quantity)[0].nan_to_num()
    by_layer = values.mean(2) if quantity in ("mass", "norm") else values.sum(2)
    lines = [np.asarray(line.get_ydata()) for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 2][:3]
    np.testing.assert_allclose(np.stack(lines), by_layer.mean(0).T.numpy(), rtol=1e-5, atol=1e-6)
    plt.close("all")


def test_source_tokens_draws_every_character_on_the_colour_of_its_token(
    captured_sources: icl.SourceAttention, tmp_path: Path
) -> None:
    view = captured_sources.show(1, 0)
    ax = icl.plots.source_tokens(view, width=12)
    drawn = "".join(text.get_text().replace("\\$", "$") for text in ax.texts)
    assert drawn == "<s>It costs $5 or $6.How much? "
    patches = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    colours = [colour for colour, text in zip(view.colours(), view.texts, strict=True) if text != "\n"]
    visible = [patch.get_facecolor()[:3] for patch in patches if patch.get_width()]
    assert visible == [pytest.approx(colour) for colour in colours]
    assert all(patch.get_x() + patch.get_width() <= 12 for patch in patches)
    plt.gcf().savefig(tmp_path / "tokens.png")
    plt.close("all")
