"""Names stay text in every format that scripts write, and numbers stay numbers."""

import html
import io
import re
from contextlib import nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

import icl_dual as icl
from icl_dual.scripts import outputs, paper_tables

MARKUP = (
    *("a|b", "<b>bold</b>", "<script>", "R&D &amp; &#42;", "$x$ and $y$", "_u_", "__x__", "a_b_", "*e*", "**s**"),
    *("`code`", "``", "~~gone~~", "\\|", "\\", "[l](http://x.y)", "![i](j.png)", "# head", "two\nlines", "a\r\n\r\nb"),
    *("1. item", "- item", "100 %", "{x}", "^", "http://x.y", "a\u2028b", "<http://x.y>", "[a]: b"),
)
FORMULAS = ("=1+1", "+1+1", "-1+cmd|' /C calc'!A0", "-x", "@SUM(A1)", "\t=1", "\r=1", "=", "-")
NAMES = st.text(st.sampled_from("ab1 |<>$_&*`#%\\\n~[]()!^{}=+-@'\"Δé"), min_size=1, max_size=12)


def cells_of(markdown: str) -> list[list[str]]:
    """The texts of a Markdown table's cells, row by row, as a renderer of GitHub's dialect shows them."""
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    assert page.startswith("<table>")
    assert page.endswith("</table>\n")
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def shown(name: str) -> str:
    """A name as a table shows it: on one line, without white space at its ends."""
    return html.escape(outputs.one_line(name).strip(), quote=False).replace('"', "&quot;")


def check_table(name: str) -> None:
    frame = pd.DataFrame({name: ["first", name], "value": [0.5, -1.25]})
    header, *rows = cells_of(outputs.markdown(frame, disable_numparse=True))
    assert header == [shown(name), "value"]
    assert rows == [["first", "0.5"], [shown(name), "-1.25"]]


@pytest.mark.parametrize("name", MARKUP)
def test_a_markdown_table_shows_names_as_they_are(name: str) -> None:
    check_table(name)


@given(NAMES)
def test_a_markdown_table_shows_any_name_as_it_is(name: str) -> None:
    check_table(name)


@given(NAMES.filter(str.strip))
def test_code_and_text_of_a_page_show_any_name_as_it_is(name: str) -> None:
    renderer = MarkdownIt("commonmark", {"html": True}).enable("strikethrough")
    page = renderer.render(f"Model: {outputs.markdown_text(name)}.")
    assert page == f"<p>Model: {html.escape(outputs.one_line(name), quote=False)}.</p>\n".replace('"', "&quot;")
    page = renderer.render(f"Model ({outputs.markdown_code(name)}).")
    assert page == f"<p>Model (<code>{html.escape(outputs.one_line(name), quote=False)}</code>).</p>\n".replace(
        '"', "&quot;"
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_no_cell_of_a_csv_file_is_a_formula_and_numbers_stay(name: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({name: [name, "x"], "number": [-1.5, 1e-17], "n": [-3, 4]})
    outputs.write_csv(tmp_path / "t.csv", frame)
    read = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)
    neutral = f"'{name}".replace("\r", "\n")
    assert read.columns.tolist() == [neutral, "number", "n"]
    assert read[neutral].tolist() == [neutral, "x"]
    pd.testing.assert_frame_equal(read.filter(["number", "n"]), frame.filter(["number", "n"]))


@given(NAMES, NAMES)
def test_a_csv_file_has_as_many_rows_and_columns_as_its_table(name: str, other: str) -> None:
    frame = pd.DataFrame({name: [other, name], "n": [1, 2]})
    text = outputs.with_texts(frame, outputs.csv_text).to_csv(index=False)
    read = pd.read_csv(io.StringIO(text), keep_default_na=False, na_filter=False, skip_blank_lines=False, dtype=str)
    assert read.iloc[:, 0].tolist() == [outputs.csv_text(other), outputs.csv_text(name)]
    assert read["n"].tolist() == ["1", "2"]


@given(NAMES)
def test_whatever_a_csv_file_holds_comes_back(name: str) -> None:
    text = outputs.csv_text(name)
    assert text.removeprefix("'") == name.removeprefix("'")
    assert text[0] not in "=@\t\r\n"
    assert text[0] not in "+-" or re.fullmatch(r"[-+][\d.].*", text, re.DOTALL)


@pytest.mark.parametrize(
    "estimate", ["-0.5", "+2", "-1e-05", "-0.116 [-0.135, -0.097]", "-0.1† [-0.2, 0.0] (1/3)", "-"]
)
def test_estimates_are_no_formulas(estimate: str) -> None:
    assert outputs.csv_text(estimate) == (estimate if estimate != "-" else "'-")


def test_names_are_text_in_latex() -> None:
    names = ["A&B", "50%", "$x$", "a_b", "{c}", "#1", "x^2", "~", "\\cmd", "two\n\nlines"]
    frame = pd.DataFrame({"model": names, "protocol": "answer", "metric": names, "SST2": "1.0"})
    table = paper_tables.latex(frame, "A note.")
    body = [line for line in table.splitlines() if line.endswith("\\\\") and " & " in line][1:]
    assert len(body) == len(names)
    assert table.count("\\midrule") == len(names), "one below the header, one between models"
    for line in body:
        text = re.sub(r"\\textbackslash\s?|\\textasciitilde\s?|\\textasciicircum\s?", "", line.removesuffix("\\\\"))
        text = re.sub(r"\\[&%$_#{}]", "", text)
        assert text.count("&") == 3
        assert not set("%$_#{}^~\\") & set(text), line


def test_ordinary_tables_are_what_they_were() -> None:
    frame = pd.DataFrame(
        {
            "model": ["SmolLM2-135M-Instruct (Q4_1, dequantised)", "‖ΔW_FT‖ / ‖ΔW_ICL‖"],
            "eta": [0.1, "learned"],
            "SimAM after FT": ["-0.1† [-0.2, 0.0] (1/3: no interval)", "20.0 [3.6, 62.4]"],
            "value": [-0.25, 1e-9],
        }
    )
    assert outputs.markdown(frame) == frame.to_markdown(index=False)
    assert outputs.with_texts(frame, outputs.csv_text).to_csv() == frame.to_csv()
    assert outputs.markdown_code("smollm2-135m") == "`smollm2-135m`"


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    outputs.write_text(tmp_path / "new" / "page.md", "Δ")
    assert (tmp_path / "new" / "page.md").read_bytes() == "Δ".encode()
    with pytest.raises(UnicodeEncodeError):
        outputs.write_text(tmp_path / "new" / "page.md", "half \ud800")
    assert (tmp_path / "new" / "page.md").read_text(encoding="utf-8") == "Δ"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.md"]


@pytest.mark.parametrize("fails", [False, True])
def test_figures_are_closed_once_written_and_where_they_cannot_be(tmp_path: Path, fails: bool) -> None:
    figure, folder = plt.figure(), tmp_path / "folder"
    if fails:
        folder.write_text("a file")
    with pytest.raises(icl.AssetError) if fails else nullcontext():
        outputs.write_figure(figure, folder / "figure", "png")
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize(("has_map", "n_colours"), [(False, 64), (True, 256)])
def test_a_png_is_small_and_looks_as_it_was_drawn(tmp_path: Path, has_map: bool, n_colours: int) -> None:
    x = np.linspace(0, 6, 200)
    figure, ax = plt.subplots(figsize=(5, 3))
    for shift in range(6 if has_map else 3):
        ax.plot(x, np.sin(x + shift))
        ax.fill_between(x, np.sin(x + shift) - 0.1, np.sin(x + shift) + 0.1, alpha=0.3)
    bar = None
    if has_map:
        values = np.arange(100.0).reshape(10, 10)
        image = ax.imshow(values, extent=(0, 3, -1, 1), cmap="RdBu_r", aspect="auto", zorder=3)
        bar = figure.colorbar(image, ax=ax, label="value")
    ax.set(xlabel="x", ylabel="y")
    figure.savefig(tmp_path / "drawn.png", dpi=150)
    outputs.write_figure(figure, tmp_path / "written", "png")
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(tmp_path / "written.png") as written:
        assert written.size == drawn.size
        assert written.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert n_colours / 2 < len(written.getcolors() or ()) <= n_colours
        pixels, expected = (np.asarray(image.convert("RGB"), dtype=int) for image in (written, drawn))
    difference = np.abs(pixels - expected)
    assert difference.max() <= 32
    assert difference.mean() < 1
    assert (pixels[0, 0] == 255).all()
    if bar is not None:  # its steps are so small that no eye sees them
        column = int(np.mean(bar.ax.get_position().intervalx) * pixels.shape[1])
        assert difference[:, column].max() <= 8
    assert (tmp_path / "written.png").stat().st_size < 0.6 * (tmp_path / "drawn.png").stat().st_size
