import pandas as pd
import pytest

from icl_dual.metrics.comparison import Comparison
from icl_dual.statistics import html_table


def test_names_in_html_are_text_and_no_formulas() -> None:
    table = html_table(pd.DataFrame({"<b>": ["a & <script>", "$x$ and $y$"], "n": [1, 2]}))
    assert "<b>" not in table
    assert "<script>" not in table
    assert "<td>a &amp; &lt;script&gt;</td>" in table
    assert "mathjax_ignore" in table, "the class by which notebooks leave dollar signs alone"
    assert "mathjax_ignore" not in pd.DataFrame({"n": [1]}).to_html(), "an option of the user's is put back"


def test_sentences_in_html_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "_printed", lambda self: pd.DataFrame({"metric": ["<i>"]}))
    monkeypatch.setattr(Comparison, "_stability_in_words", lambda self: "<b> is unstable")
    comparison = object.__new__(Comparison)
    object.__setattr__(comparison, "per_layer", {})
    page = comparison._repr_html_()
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.endswith("<p>&lt;b&gt; is unstable</p>")
