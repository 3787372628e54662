"""Tables and sparklines of results in notebooks: escaped, well-formed, and with the numbers of their values."""

import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor

import icl_dual as icl
from icl_dual.cells import CellResults
from icl_dual.html_tables import HEIGHT, MOST_POINTS, WIDTH, Line, lines_table, sparkline
from icl_dual.results import tensors_table

numbers = st.lists(st.floats(width=32), min_size=0, max_size=500)


def points(svg: str) -> list[tuple[str, float, float]]:
    """What a sparkline's pen does: move (M) or draw (L), and where."""
    path = re.findall(r'<path d="([^"]*)"', svg)[-1]
    return [(pen, float(x), float(y)) for pen, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)]


@given(numbers)
def test_sparklines_draw_finite_values_in_order_inside_of_their_frame(values: list[float]) -> None:
    svg = sparkline(values, "layer")
    finite = [value for value in values if math.isfinite(value)]
    if len(values) < 2 or not finite:
        assert svg == "" or len(values) > MOST_POINTS
        return
    if not svg:  # every run of a long line has a value that is not finite
        return
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"].startswith(f"{len(values)} values by layer, from ")
    pen = points(svg)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for _, x, y in pen)
    assert [x for _, x, _ in pen] == sorted(x for _, x, _ in pen)
    if len(values) <= MOST_POINTS:
        assert len(pen) == len(finite)
        for (_, _, left), (_, _, right), a, b in zip(pen, pen[1:], finite, finite[1:], strict=False):
            assert (left >= right) if b > a else (left <= right), "higher values are higher up"


def test_gaps_are_where_values_are_undefined_and_zero_is_marked() -> None:
    assert [pen for pen, _, _ in points(sparkline([1.0, 2.0, math.nan, 0.5, -1.0], "layer"))] == ["M", "L", "M", "L"]
    assert "stroke-dasharray" in sparkline([-1.0, 1.0], "layer")
    assert "stroke-dasharray" not in sparkline([0.5, 1.0], "layer")
    assert sparkline([1.0], "layer") == sparkline([math.nan, math.nan], "layer") == ""


def test_names_are_text() -> None:
    page = lines_table("<b>&", [Line("<i>", "<u>", "<script>", (1.0, 2.0))])
    assert not re.search(r"<(b|i|u|script)>", page)
    ElementTree.fromstring(page)


class Cells(HTMLParser):
    """The rows of a page's tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.inside = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside in ("td", "th") and self.rows:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def rows(page: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in Cells(page).rows}


@pytest.fixture(scope="module")
def experiment(llama: icl.Model, prompts: icl.Prompts) -> icl.Experiment:
    fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
    return icl.run_experiment(llama, prompts, lr=0.05, replicas=0, fields=fields, progress=False)


def test_numbers_are_norms_of_vectors_and_means_over_the_rest(experiment: icl.Experiment) -> None:
    decomposition = experiment.decompose()
    table = rows(tensors_table(decomposition))
    n_queries, n_layers, n_heads = decomposition.mass.shape[:3]
    norms = [
        sum(decomposition.delta_icl[q, layer, h].norm().item() for q in range(n_queries) for h in range(n_heads))
        / (n_queries * n_heads)
        for layer in range(n_layers)
    ]
    expected = [f"{value:.3g}" for value in (sum(norms) / n_layers, min(norms), max(norms))]
    assert table["delta_icl"][:4] == [f"query={n_queries} layer={n_layers} head={n_heads} d_head=8", *expected]
    assert table["delta_icl"][4].strip() == "layer"
    curated = rows(decomposition._repr_html_())
    assert curated["‖ΔICL‖"] == table["delta_icl"]
    assert curated["direct share"][1] == f"{decomposition.direct_share.nanmean(0).nanmean():.3g}"
    direct = decomposition.direct.norm(dim=-1).mean(0)
    assert curated["‖direct‖"][1:4] == [f"{value:.3g}" for value in (direct.mean(), direct.min(), direct.max())]
    norms = experiment.delta.W_V.flatten(1).norm(dim=1)
    assert table.keys() >= {"mass", "relaxation/update_cosine", "residuals/split", "W_O"}
    assert rows(experiment.delta._repr_html_())["W_V"][1] == f"{norms.mean():.3g}"
    captured = rows(experiment.in_context._repr_html_())
    assert captured["context_scores"][1:4] == ["", "", ""], "scores of tokens are not averaged"
    assert captured["attn_out"][1] != ""


@dataclass
class Mixed:
    """Numbers with gaps, beside integers and tokens."""

    cosine: dict[str, Float[Tensor, "query layer"]]
    labels: Int[Tensor, " query"]
    scores: Float[Tensor, "layer prefix_pos"]


def test_undefined_numbers_are_left_out_and_integers_and_tokens_have_no_mean() -> None:
    cosine = torch.tensor([[math.nan, 0.5], [0.25, math.inf], [math.nan, -0.25]])
    table = rows(tensors_table(Mixed({"W_K": cosine}, torch.arange(3), torch.ones(2, 4))))
    assert table["cosine/W_K"] == ["query=3 layer=2", "0.188", "0.125", "0.25", table["cosine/W_K"][4]]
    assert table["labels"] == ["query=3", "", "", "", ""]
    assert table["scores"] == ["layer=2 prefix_pos=4", "", "", "", ""]


def test_prompts_experiments_and_comparisons_have_tables(
    experiment: icl.Experiment, prompts: icl.Prompts, llama: icl.Model
) -> None:
    table = rows(prompts._repr_html_())
    lengths = [len(query) for query in prompts.queries]
    assert table["tokens of each query"][1:4] == [f"{n:.3g}" for n in (sum(lengths) / 7, min(lengths), max(lengths))]
    table = rows(experiment._repr_html_())
    counts = [(experiment.in_context.predictions == label).sum().item() for label in (0, 1)]
    assert table["predictions, in_context"][2:4] == [f"{min(counts)}", f"{max(counts)}"]
    assert table["loss before each step"][1] == f"{experiment.delta.losses.mean():.3g}"
    comparison = experiment.compare()
    page = comparison._repr_html_()
    assert "<svg" in page
    similarity = comparison.per_layer["SimAOU"].nanmean(0)
    assert [row[1:5] for row in Cells(page).rows if row[:1] == ["SimAOU"]][-1] == [
        "query=7 layer=3",
        *(f"{value:.3g}" for value in (similarity.mean(), similarity.min(), similarity.max())),
    ]
    sourced = icl.prompt_from_query(prompts)
    assert rows(sourced._repr_html_())["tokens of each source"][0] == f"source={len(sourced.names)}"


def test_studies_are_tables_of_their_cells(llama: icl.Model, task: icl.Task, tmp_path) -> None:
    cells = [icl.Cell(llama.name, task.name, k=2, seed=seed, lr=0.05, n_queries=3, replicas=0) for seed in (1, 2)]
    study = icl.run_study(cells, tmp_path, tasks=[task], models=[llama], progress=False)
    assert isinstance(study, CellResults)
    page = study._repr_html_()
    table = rows(page)
    assert {result.folder.name for result in study} <= table.keys()
    means = [float(result.comparison.per_layer["SimAOU"].nanmean(1).nanmean()) for result in study]
    assert table["SimAOU"][:2] == ["cell=2", f"{sum(means) / 2:.3g}"]
    assert study[0].folder.name in study[0]._repr_html_()
    assert "<svg" in study[0]._repr_html_()
