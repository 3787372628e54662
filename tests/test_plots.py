from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Rectangle

import icl_dual as icl


@pytest.fixture(scope="module")
def comparison(llama: icl.Model, task: icl.Task, tmp_path_factory: pytest.TempPathFactory) -> icl.Comparison:
    cell = icl.Cell(model="llama", task="toy", k=3, seed=1, lr=0.05, n_queries=5)
    return icl.run_cell(llama, task, cell, tmp_path_factory.mktemp("cells") / "cell", progress=False).comparison


@pytest.mark.parametrize(
    ("metric", "drawn"),
    [
        ("SimAOU", ["SimAOU", "SimAOU random"]),
        ("SimAM", ["SimAM after FT", "SimAM before FT", "SimAM random"]),
        ("Kendall", ["Kendall", "Kendall random"]),
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


def test_label_counts_draws_shares(comparison: icl.Comparison) -> None:
    ax = icl.plots.label_counts(comparison, ("no", "perhaps"))
    bars = [patch.get_height() for patch in ax.patches if isinstance(patch, Rectangle)]
    heights = [bars[at : at + 2] for at in range(0, len(bars), 2)]
    assert [sum(group) for group in heights] == pytest.approx([1.0] * 4)
    gold = (comparison.gold == 1).double().mean().item()
    assert heights[0] == pytest.approx([1 - gold, gold])
    plt.close("all")


def test_unknown_metrics_are_refused(comparison: icl.Comparison) -> None:
    with pytest.raises(ValueError, match=r"expected a metric out of \('SimAOU', 'SimAM', 'Kendall'\), got 'Rec2FTP'"):
        icl.plots.layers(comparison, "Rec2FTP")
