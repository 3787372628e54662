"""The documentation site: what is generated is up to date, and every page and module has its place."""

import ast
import html
import re
from pathlib import Path

import build_site
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_structure import MODULES

from icl_dual.metrics import formulas
from icl_dual.metrics.catalogue import BUILT_IN, Metric

ROOT = Path(__file__).parents[1]
METRICS = (ROOT / "docs" / "metrics.md").read_text()


def test_what_is_generated_is_up_to_date() -> None:
    outdated = [
        str(path.relative_to(ROOT))
        for path, text in build_site.written().items()
        if not path.exists() or path.read_text() != text
    ]
    assert outdated == [], "run python docs/build_site.py --write"


def test_every_public_module_has_a_page_and_no_other() -> None:
    public = {name for name in MODULES if "._" not in name} - {"icl_dual"}
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md") if path.stem != "index"}
    assert {f"icl_dual.{name}" for name in pages} == public
    for name, text in pages.items():
        assert f"\n::: icl_dual.{name}\n" in text
        assert f"docs/api/{name}.md\n" in (ROOT / "mkdocs.yml").read_text()


def test_every_page_is_in_the_navigation_once() -> None:
    paths = [path for _, _, path in build_site.navigation()]
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"README.md", "CONTRIBUTING.md", build_site.TOUR} <= {*paths}
    assert len(paths) == len({*paths})
    assert all((ROOT / path).exists() for path in paths if path != build_site.TOUR)


def test_llms_txt_names_every_page_and_what_one_reads_it_for() -> None:
    lines = (ROOT / "llms.txt").read_text().splitlines()
    assert lines[0] == "# icl_dual"
    assert lines[2].startswith("> ")
    links = [match for line in lines if (match := re.fullmatch(r"- \[.+\]\((.+?)\)(: .+)?", line))]
    assert len(links) == len(build_site.navigation())
    for match in links:
        assert (ROOT / match[1]).is_file(), match[1]
        assert match[2] or match[1] in ("README.md", "CONTRIBUTING.md", "docs/index.md", "figures/README.md")


@pytest.mark.parametrize("metric", BUILT_IN, ids=lambda metric: metric.name)
def test_every_metric_has_its_section(metric: Metric) -> None:
    (section,) = re.findall(rf"^### {re.escape(metric.name)}\n(.*?)(?=^##|\Z)", METRICS, flags=re.MULTILINE | re.DOTALL)
    facts, *definition = section.strip().split("\n\n")
    assert re.fullmatch(r"Range: \S+ to \S+\. .*Interval: .*", facts)
    text = " ".join(" ".join(definition).split())
    assert len(text.partition("*Against it:*")[0]) > 20, "it has a definition"
    assert len(text.partition("*Against it:*")[2].partition("*Code:*")[0]) > 5, "what is known against it"
    assert text.partition("*Code:*")[2].strip(), "it has its code"


def test_the_page_of_metrics_has_no_metric_and_no_function_that_does_not_exist() -> None:
    assert {*re.findall(r"^### (.*)$", METRICS, flags=re.MULTILINE)} == {metric.name for metric in BUILT_IN}
    for name in re.findall(r"`formulas\.(\w+)", METRICS):
        assert hasattr(formulas, name), name


def test_examples_of_docstrings_become_sections() -> None:
    source = '''def f():
    """Return 1.

    >>> f()
    1

    Text.

    Example:
        >>> f()
        1
    """
    return 1
'''
    changed = build_site.with_examples(source)
    docstring = ast.get_docstring(ast.parse(changed).body[0])  # type: ignore[arg-type]
    assert docstring == "Return 1.\n\nExamples:\n    >>> f()\n    1\n\nText.\n\nExamples:\n    >>> f()\n    1"


def test_examples_of_all_docstrings_change_headings_and_indentation_only() -> None:
    for name in build_site.modules():
        source = build_site.module_path(name).read_text()
        before, after = (
            [line.strip() for line in text.splitlines() if line.strip() not in ("Example:", "Examples:")]
            for text in (source, build_site.with_examples(source))
        )
        assert before == after, name


def test_formulas_outside_of_code_are_found() -> None:
    text = "A $x_1$ and `$y$`, for $5 or 6$:\n\n$$a\n= b$$\n\n```sh\necho $HOME $PATH\n```\n"
    pieces = build_site.CODE.split(text)
    prose = "".join(piece for at, piece in enumerate(pieces) if at % 2 == 0)
    matches = [match[1] or match[2] for match in build_site.FORMULA.finditer(prose)]
    assert matches == ["x_1", "5 or 6", "a\n= b"]


def test_views_of_the_tour_are_files_of_the_site() -> None:
    page = "<p>a view</p>\n\n<script>`${1}`</script>"
    frame = f'<iframe title="a view" srcdoc="{html.escape(page)}" style="border: 0"></iframe>'
    outputs = [new_output("execute_result", {"text/html": text, "text/plain": ""}) for text in (frame, "<b>1</b>")]
    notebook = new_notebook(cells=[new_markdown_cell("srcdoc"), new_code_cell("view", outputs=outputs)])
    assert build_site.take_views(notebook) == {"tour_files/view_0.html": page.encode()}
    shown = [output.data["text/html"] for output in notebook.cells[1].outputs]
    assert shown == ['<iframe title="a view" src="../tour_files/view_0.html" style="border: 0"></iframe>', "<b>1</b>"]


def test_links_of_the_built_site_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text('<a href="a/#there">1</a><a href="b.html">2</a><img src="https://x.org/y">')
    (tmp_path / "a" / "index.html").write_text('<h2 id="here"></h2><a href="../">3</a><a href="#here">4</a>')
    monkeypatch.setattr(build_site, "SITE", tmp_path)
    assert build_site.broken_links() == ["index.html links to a/#there", "index.html links to b.html"]


def test_a_link_to_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("docs", "figures", "icl_dual"):
        (tmp_path / folder).mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "llms.txt"):
        (tmp_path / name).write_text("[figures](figures/)" if name == "README.md" else "")
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    monkeypatch.setattr(build_site, "STAGED", tmp_path / "pages")
    with pytest.raises(FileNotFoundError, match=r"expected links to files, got a link to .*figures"):
        build_site.stage()
