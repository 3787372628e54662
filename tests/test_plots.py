import dataclasses
import html
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import readable
import torch
from helpers import draw
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import icl_dual as icl
from icl_dual.metrics.stability import Stability
from icl_dual.models import tiny_model
from icl_dual.statistics.intervals import Interval


@pytest.fixture(scope="module")
def comparison(llama: icl.Model, task: icl.Task, tmp_path_factory: pytest.TempPathFactory) -> icl.Comparison:
    cell = icl.Cell(model="llama", task="toy", k=3, seed=1, lr=0.05, n_queries=5, replicas=0)
    return icl.run_cell(llama, task, cell, tmp_path_factory.mktemp("cells") / "cell", progress=False).comparison


def legend_texts(ax: Axes) -> list[str]:
    """What the legend of Axes says, from the top."""
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize(
    ("metric", "drawn"),
    [
        ("SimAOU", ["SimAOU", "SimAOU unnormalised", "SimAOU inflation null", "SimAOU random"]),
        ("SimAM after FT", ["SimAM after FT"]),
        ("SimAM before FT", ["SimAM before FT"]),
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
        np.testing.assert_allclose(np.asarray(line.get_ydata()), comparison.per_layer[name].mean(0), rtol=1e-5)
    fig.savefig(tmp_path / "figure.png")
    plt.close(fig)


def test_simam_is_drawn_as_its_change_by_finetuning(comparison: icl.Comparison) -> None:
    ax = icl.plots.layers(comparison, "SimAM")
    lines = [line for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 3]
    for name, line in zip(("SimAM after FT", "SimAM random update"), lines, strict=True):
        change = (comparison.per_layer[name] - comparison.per_layer["SimAM before FT"]).double()
        np.testing.assert_allclose(np.asarray(line.get_ydata()), change.mean(0), atol=1e-6)
    without = {name: values for name, values in comparison.per_layer.items() if name != "SimAM before FT"}
    with pytest.raises(ValueError, match="expected comparisons with 'SimAM', got at least one without"):
        icl.plots.layers(dataclasses.replace(comparison, per_layer=without), "SimAM")
    plt.close("all")


def slow_crossed_error(values: torch.Tensor) -> list[float]:
    """Two-way clusters from sums of residuals, number by number."""
    n_seeds, n_queries, n_layers = values.shape
    errors = []
    for layer in range(n_layers):
        table = values[:, :, layer].tolist()
        mean = sum(map(sum, table)) / (n_seeds * n_queries)
        queries = [sum(row[query] for row in table) / n_seeds for query in range(n_queries)]
        seeds = [sum(row) / n_queries for row in table]
        variance = sum((q - mean) ** 2 for q in queries) / (n_queries - 1) / n_queries
        if n_seeds > 1:
            rest = [table[s][q] - queries[q] - seeds[s] + mean for s in range(n_seeds) for q in range(n_queries)]
            pairs = sum(r**2 for r in rest) / (len(rest) - 1) / len(rest)
            variance += max(0.0, sum((s - mean) ** 2 for s in seeds) / (n_seeds - 1) / n_seeds - pairs)
        errors.append(variance**0.5)
    return errors


@pytest.mark.parametrize("n_seeds", [1, 2, 4])
def test_the_crossed_error_is_that_of_two_way_clusters(n_seeds: int) -> None:
    values = draw(3, n_seeds, 6, 5).double() + torch.arange(n_seeds)[:, None, None]
    expected = slow_crossed_error(values)
    np.testing.assert_allclose(icl.plots.crossed_error(values), expected)


def test_bands_widen_where_seeds_differ(comparison: icl.Comparison) -> None:
    def half_width(shift: float) -> np.ndarray:
        moved = comparison.per_layer | {"SimAOU": comparison.per_layer["SimAOU"] + shift}
        ax = icl.plots.layers([comparison, dataclasses.replace(comparison, per_layer=moved)], "SimAOU")
        (band,) = ax.collections[0].get_paths()
        edges = np.asarray(band.vertices)
        plt.close("all")
        return np.array([np.ptp(edges[edges[:, 0] == layer, 1]) / 2 for layer in range(3)])

    alike, apart = half_width(0.0), half_width(0.2)
    assert (apart > alike).all()
    np.testing.assert_allclose(apart**2 - alike**2, (1.96 * 0.1) ** 2, rtol=1e-3)


def test_layers_draws_the_range_of_the_means_over_replicas(comparison: icl.Comparison) -> None:
    shifts = torch.tensor([[0.1, -0.3, 0.0], [0.2, -0.1, 0.0]], dtype=torch.float64)
    stability = Stability(
        replicas=("a", "b"), n_queries=5, shifts={"SimAOU": torch.zeros(2)}, layer_shifts={"SimAOU": shifts}
    )
    moved = dataclasses.replace(comparison, stability=stability)

    def edges(comparisons: list[icl.Comparison]) -> list[list[float]]:
        ax = icl.plots.layers(comparisons, "SimAOU")
        mean = comparison.per_layer["SimAOU"].mean(0).numpy()
        dotted = [line for line in ax.get_lines() if line.get_label() == "_replicas"]
        explained = ax.get_legend_handles_labels()[1].count("range over finetuning replicas")
        assert explained == bool(dotted)
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
    assert crosses == [[0.5], []], "the cross, and its line in the legend"
    assert "unstable: replicas differ more than the interval" in ax.get_legend_handles_labels()[1]
    ax = icl.plots.curves({"SimAOU": {0.1: stable, 0.2: unstable}})
    crosses = [np.asarray(line.get_xydata()).tolist() for line in ax.get_lines() if line.get_marker() == "x"]
    assert crosses == [[[0.2, 0.5]], []]
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
    blue, orange = icl.plots.resolved("C0"), icl.plots.resolved("C1")
    expected = {
        "SimAOU": [
            ("finetuning", blue, "-"),
            ("finetuning, not normalised", orange, "--"),
            ("two random updates (inflation)", "0.3", "-."),
            ("random vector (the paper's)", "0.5", ":"),
        ],
        "SimAM": [("finetuning", blue, "-"), ("random update of FT's size", "0.5", ":")],
        "Kendall": [
            ("by queries of finetuning", blue, "-"),
            ("by keys of finetuning", orange, "--"),
            ("random scores (the paper's)", "0.5", ":"),
        ],
    }
    labels = {
        "SimAOU": "SimAOU (cosine)",
        "SimAM": "SimAM after − before\nFT (cosine)",
        "Kendall": "Kendall's τ with ICL attention",
    }
    assert tuple(expected) == icl.plots.LAYERWISE
    for figure, lines in expected.items():
        ax = icl.plots.layers(comparison, figure)
        drawn = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
        assert [(line.get_label(), line.get_color(), line.get_linestyle()) for line in drawn] == lines
        assert ax.get_ylabel() == labels[figure]
        assert legend_texts(ax) == [*(label for label, _, _ in lines), "±1.96 standard errors over queries"]
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
    band = "±1.96 standard errors over queries and seeds"
    assert legend_texts(ax) == ["by queries of finetuning", "random scores (the paper's)", band]
    with pytest.raises(ValueError, match=r"expected comparisons with 'Kendall', got at least one without: .*delta"):
        icl.plots.layers([comparison, without], "Kendall")
    plt.close("all")


def test_by_layer_draws_means_and_leaves_undefined_values_out() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 2.0, 5.0]])
    ax = icl.plots.by_layer({"a": values, "b": 2 * values}, ylabel="share")
    lines = [line for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 3]
    for line, expected in zip(lines, ([2, 2, 5], [4, 4, 10]), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), expected)
    assert legend_texts(ax) == ["a", "b", "±1.96 standard errors over queries"]
    plt.close("all")


def test_dots_draws_rows_from_the_top_hollow_where_there_is_no_interval() -> None:
    nan = float("nan")
    known, unknown, none = (Interval(0.3, 0.1, 0.6, 9), Interval(0.5, nan, nan, 3), Interval(nan, nan, nan, 0))
    ax = icl.plots.dots({"claim": {"a": known, "b": unknown}, "control": {"a": none}})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["claim", "control"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    drawn = {
        (line.get_markerfacecolor() == "white", line.get_marker()): np.asarray(line.get_xdata()).tolist()
        for line in ax.get_lines()
        if len(np.asarray(line.get_xdata())) == 1
    }
    assert drawn == {(False, "o"): [0.3], (True, "s"): [0.5]} | {(True, "o"): drawn.get((True, "o"), [])}
    assert all(np.isnan(x) for x in drawn[True, "o"])
    bars = [np.asarray(path.vertices)[:, 0].tolist() for of in ax.collections for path in of.get_paths()]
    assert [0.1, 0.6] in bars
    assert legend_texts(ax) == ["a", "b", "95 % interval", "too few for an interval"]
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
    *lines, limit = (line for line in ax.get_lines() if not str(line.get_label()).startswith("_"))
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
    assert ax.get_legend_handles_labels()[1][0] == "ΔW_FT"
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
    labels = legend_texts(ax)
    assert labels[:-1] == [icl.plots.literal(name) for name in captured_sources.names]
    assert labels[-1] == "±1.96 standard errors over prompts and positions"
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


def every_picture(comparison: icl.Comparison, captured: icl.SourceAttention) -> Iterator[tuple[str, Axes]]:
    """New Axes of every function that draws."""
    interval, unstable = Interval(0.5, 0.4, 0.6, 9), Interval(0.7, 0.2, 0.9, 9, unstable=True)
    names = [f"series {number}" for number in range(9)]
    norms = {name: 1 + draw(at, 4, 3, 5).abs() for at, name in enumerate(("ZSL", "ICL", "FT"))}
    massive = icl.MassiveActivations(model="toy", queries=((1, 2, 3, 4, 5),) * 4, norms=norms, ratio=20)
    values = draw(0, 4, 3, 2)
    leads = {"SimAOU": "SimAOU", "SimAM": "SimAM after FT", "Kendall": "Kendall"}
    shifts, by_layer = ({name: torch.zeros(2, *axes).double() for name in leads.values()} for axes in ((), (3,)))
    stability = Stability(replicas=("a", "b"), n_queries=5, shifts=shifts, layer_shifts=by_layer)
    moved = dataclasses.replace(comparison, stability=stability)
    for figure, several in itertools.product(icl.plots.LAYERWISE, ([comparison, comparison], [comparison], [moved])):
        yield f"{figure} of {len(several)}", icl.plots.layers(several, figure)
    yield "by_layer", icl.plots.by_layer({name: draw(at, 4, 3) for at, name in enumerate(names)}, ylabel="share")
    yield "against_null", icl.plots.against_null(values, values - 1, ylabel="cosine")
    yield "massive_activations", icl.plots.massive_activations(massive)
    yield "sources", icl.plots.sources(captured, "share")
    rows = {"claim": dict.fromkeys(names, interval), "control": dict.fromkeys(names, unstable)}
    ax = icl.plots.dots(rows)
    ax.set_xlabel("cosine")
    yield "dots", ax
    for is_ordered in (False, True):
        lines = {name: {1: interval, 2: unstable} for name in names}
        ax = icl.plots.curves(lines, ylabel="accuracy", is_ordered=is_ordered)
        ax.set_xlabel("demonstrations")
        yield f"curves, ordered: {is_ordered}", ax
    yield "label_counts", icl.plots.label_counts(comparison, ("no", "perhaps"))
    yield "heads", icl.plots.heads(values, label="cosine", limits=(-1, 1))
    yield "demonstrations", icl.plots.demonstrations(values[0], ("one", "two"), label="share")
    yield "source_tokens", icl.plots.source_tokens(captured.show(1, 0))


def test_every_figure_is_fit_for_a_paper(comparison: icl.Comparison, captured_sources: icl.SourceAttention) -> None:
    with plt.rc_context({"font.size": 4, "lines.marker": "o", "figure.figsize": (12, 9)}):  # whatever style is in use
        for name, ax in every_picture(comparison, captured_sources):
            figure = ax.get_figure(root=True)
            assert figure is not None
            figure.savefig(io.BytesIO(), format="png")
            assert readable.problems(figure) == [], name
            plt.close(figure)


def test_a_style_that_tells_series_apart_by_hue_alone_is_noticed() -> None:
    ax = icl.plots.by_layer({"a": torch.rand(4, 3), "b": torch.rand(4, 3)}, ylabel="share")
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    assert not list(readable.alike(figure))
    for line in ax.get_lines():
        line.set(linestyle="-", marker="o")
    assert list(readable.alike(figure)) == ["'a' and 'b' differ by hue alone"]
    ax.legend(loc="center")
    figure.set_size_inches(9, 3)
    ax.set_xlabel("")
    ax.text(0, 0, "small", fontsize=5)
    figure.savefig(io.BytesIO(), format="png")
    found = " ".join(readable.problems(figure))
    for problem in ("9.00 in wide", "'small' in 5.0 pt", "no x label", "a legend over the area of data"):
        assert problem in found
    plt.close(figure)


def test_layers_are_numbered_as_far_as_there_is_room() -> None:
    with plt.style.context(icl.plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(2.6, 1.5))
    icl.plots.by_layer({"a": draw(0, 4, 30)}, ylabel="share", ax=left)
    icl.plots.heads(draw(0, 4, 30, 3), ax=right)
    figure.savefig(io.BytesIO(), format="png")
    assert not list(readable.crowded(figure))
    for ax in (left, right):
        assert len([tick for tick in ax.get_xticks() if 0 <= tick < 30]) >= 2
    left.set_xticks(range(0, 30, 4))
    assert "12 and 16 run into each other" in " ".join(readable.crowded(figure))
    plt.close(figure)


@pytest.mark.parametrize("n", [2, 13, 52])
def test_series_differ_in_more_than_their_colour(n: int) -> None:
    looks = [icl.plots.series_style(index) for index in range(n)]
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == n
    assert len({(look["color"], look["marker"]) for look in looks}) == n
    for one, other in itertools.pairwise(looks):
        assert one["marker"] != other["marker"]
        assert one["color"] != other["color"]


def test_ordered_colours_go_from_light_to_dark() -> None:
    luminances = [readable.luminance(color) for color in icl.plots.ordered(6)]
    assert all(one > other + 0.02 for one, other in itertools.pairwise(luminances))
    assert len(icl.plots.ordered(1)) == 1


def test_negative_cells_and_tokens_have_a_mark(captured_sources: icl.SourceAttention) -> None:
    values = torch.tensor([[[0.5, -0.5], [-0.1, 0.2]]])
    marks = [np.asarray(line.get_xydata()).tolist() for line in icl.plots.heads(values, limits=(-1, 1)).get_lines()]
    assert sorted(marks[0]) == [[0, 1], [1, 0]], "layer across, head upwards"
    assert not icl.plots.heads(values, limits=(0, 1)).get_lines()
    view = captured_sources.show(1, 0)
    negative = [text for text, value in zip(view.texts, view.values, strict=True) if value < 0 and text.strip()]
    assert len(icl.plots.source_tokens(view).get_lines()) == len(negative)
    plt.close("all")


def test_the_style_is_one_file_that_matplotlib_finds() -> None:
    with plt.style.context(icl.plots.STYLE):
        assert plt.rcParams["figure.figsize"][0] <= icl.plots.COLUMN_WIDTH + 0.01
        assert min(plt.rcParams["xtick.labelsize"], plt.rcParams["ytick.labelsize"]) >= readable.FONT_SIZE
        cycle = plt.rcParams["axes.prop_cycle"].by_key()
    looks = [icl.plots.series_style(index) for index in range(len(cycle["color"]))]
    assert [look["color"].upper() for look in looks] == [f"#{color}".replace("##", "#") for color in cycle["color"]]
    assert [look["linestyle"] for look in looks] == cycle["linestyle"]
