"""The page of a view in a real browser: it requests nothing, shows the right numbers, and works by keyboard."""

import errno
import html
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interactive_view import find_browser
from playwright.sync_api import Browser, Locator, Page, ViewportSize, sync_playwright
from viewed import captured_pair, random_terms

import icl_dual as icl
from icl_dual.views.interactive import InteractiveView

QUERY = 2
Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Opened]:
    """Open a view, or the HTML around one, from disk with the network off; no request and no error may follow."""
    requests, errors, contexts = [], [], []

    def open_page(view: InteractiveView | str, width: int = 1280, color_scheme: Any = None) -> Page:
        viewport: ViewportSize = {"width": width, "height": 800}
        context = browser.new_context(offline=True, viewport=viewport, color_scheme=color_scheme)
        contexts.append(context)
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(view if isinstance(view, str) else view.page, encoding="utf-8")
        page = context.new_page()
        page.set_default_timeout(30_000)  # of a busy machine
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert errors == []
    assert requests == [(tmp_path / f"{n + 1}.html").as_uri() for n in range(len(contexts))]
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def decomposition(llama: icl.Model, prompts: icl.Prompts) -> icl.Decomposition:
    return icl.decompose(llama, **captured_pair(llama, prompts))


@pytest.fixture(scope="module")
def view(decomposition: icl.Decomposition, llama: icl.Model, prompts: icl.Prompts) -> InteractiveView:
    return icl.view(decomposition, QUERY, zero_shot=captured_pair(llama, prompts)["zero_shot"])


def number(text: str | None) -> float:
    """The number that a text ends with."""
    assert text
    return float(re.split(r"[ ,]", text.strip())[-1].replace("\u2212", "-"))


def tokens(page: Page) -> Locator:
    return page.get_by_role("listbox").get_by_role("option")


def token_numbers(page: Page) -> list[list[float]]:
    """Both numbers of every token, as its label tells them."""
    labels = tokens(page).evaluate_all("all => all.map(e => e.title)")
    return [[number(part) for part in label.split(", ")[-2:]] for label in labels]


def cell(page: Page, layer: int, head: int) -> Locator:
    return page.get_by_role("gridcell", name=re.compile(rf"^layer {layer}, head {head}:"))


def selected(page: Page) -> str:
    return page.get_by_role("gridcell", selected=True).get_attribute("aria-label") or ""


def table(page: Page, name: str) -> dict[str, list[str]]:
    rows = page.locator(f".{name} tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")
    return {row[0]: row[1:] for row in rows}


def test_a_click_on_a_head_shows_the_numbers_of_this_head(
    opened: Opened, view: InteractiveView, decomposition: icl.Decomposition
) -> None:
    page = opened(view)
    before = {}
    for layer, head in ((0, 1), (2, 3)):
        cell(page, layer, head).click()
        assert selected(page).startswith(f"layer {layer}, head {head}:")
        frame = decomposition.by_token(QUERY, layer, head)
        expected = [
            [frame[name].to_numpy()[piece.first : piece.last + 1].sum() for name in ("icl_share", "weight")]
            for piece in view.terms.pieces
        ]
        torch.testing.assert_close(
            torch.tensor(token_numbers(page)), torch.tensor(expected).float(), atol=1e-5, rtol=6e-3
        )
        sums = table(page, "icl-sums")
        for group, name in enumerate(decomposition.groups[1:], start=1):  # this model has no sink
            mass = decomposition.mass[QUERY, layer, head, group].item()
            assert number(sums[name][1]) == pytest.approx(mass, rel=6e-3, abs=1e-9)
        assert number(sums["sum"][1]) == 1.0
        head_share = view.terms.quantities[0].sums[layer, head].sum().item()
        assert number(sums["sum"][0]) == pytest.approx(head_share, rel=6e-3)
        assert f"Layer {layer}, head {head}" in page.get_by_role("status").inner_text()
        before[layer] = (sums, page.locator(".icl-pane").first.locator(".icl-token").first.get_attribute("title"))
    assert before[0] != before[2]


def test_every_control_changes_what_is_shown(
    opened: Opened, view: InteractiveView, decomposition: icl.Decomposition
) -> None:
    page = opened(view)
    cell(page, 1, 2).click()
    amounts = "all => all.map(e => parseFloat(e.style.getPropertyValue('--amount')))"
    by_token = tokens(page).evaluate_all(amounts)
    page.get_by_label("Tokens").select_option("summed by source")
    summed = tokens(page).evaluate_all(amounts)
    by_group = {
        group: {amount for amount, piece in zip(summed, view.terms.pieces, strict=True) if piece.group == group}
        for group in {piece.group for piece in view.terms.pieces}
    }
    assert summed != by_token
    assert all(len(values) == 1 for values in by_group.values())
    largest = view.terms.quantities[0].sums[1, 2].abs()
    for group, (amount,) in by_group.items():
        assert amount == pytest.approx(100 * (largest[group] / largest.max()).item(), abs=0.06)
    page.get_by_label("Quantity").select_option("attention weight")
    for name, masses in {
        "all demonstrations with separators": decomposition.demonstration_mass[QUERY],
        "start": decomposition.mass[QUERY, ..., decomposition.groups.index("start")],
        "sum of all sources": torch.ones(decomposition.mass.shape[1:3]),
    }.items():
        page.get_by_label("Grid shows").select_option(name)
        for layer, head in ((0, 0), (1, 3)):
            label = cell(page, layer, head).get_attribute("aria-label")
            assert number(label) == pytest.approx(masses[layer, head].item(), rel=6e-3)
    page.get_by_text("Table of all tokens").click()
    rows = page.locator(".icl-token-table tbody tr")
    rows.first.wait_for()
    assert rows.count() == len(view.terms.pieces)
    cell(page, 2, 0).click()
    weights = rows.evaluate_all("rows => rows.map(r => r.cells[4].textContent)")
    expected = view.terms.quantities[1].values[2, 0].tolist()
    assert [number(text) for text in weights] == pytest.approx(expected, rel=6e-3, abs=1e-5)


def test_the_keyboard_reaches_and_changes_everything(opened: Opened, view: InteractiveView) -> None:
    page = opened(view)
    focused = "document.activeElement.getAttribute('role') || document.activeElement.tagName"
    stops = []
    for _ in range(6):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(focused))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", "the focus is visible"
    assert stops == ["SELECT", "SELECT", "SELECT", "gridcell", "option", "SUMMARY"]
    cell(page, 1, 1).click()
    for key, layer, head in (
        ("ArrowRight", 1, 2),
        ("ArrowDown", 2, 2),
        ("ArrowDown", 2, 2),
        ("ArrowLeft", 2, 1),
        ("End", 2, 3),
        ("ArrowUp", 1, 3),
        ("Control+Home", 0, 0),
        ("ArrowLeft", 0, 0),
        ("Control+End", 2, 3),
    ):
        page.keyboard.press(key)
        assert selected(page).startswith(f"layer {layer}, head {head}:"), key
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    piece = view.terms.pieces[1]
    assert f"position {piece.first}" in page.get_by_role("status").inner_text()
    for layer, head in ((0, 1), (2, 2)):
        label = cell(page, layer, head).get_attribute("aria-label")
        expected = view.terms.quantities[0].values[layer, head, piece.unit].item()
        assert number(label) == pytest.approx(expected, rel=6e-3, abs=1e-5), "the chosen token in every head"
    page.keyboard.press("Escape")
    assert page.get_by_label("Grid shows").input_value() == "first"


def test_screen_readers_get_names_for_everything(opened: Opened, view: InteractiveView) -> None:
    page = opened(view)
    tree = page.locator("body").aria_snapshot()
    assert "\n" in tree
    for expected in (
        "heading",
        'combobox "Quantity"',
        'grid "Layers',
        "rowheader",
        "columnheader",
        "listbox",
        "status",
    ):
        assert expected in tree, expected
    assert not re.search(r"- (gridcell|option|combobox|button)( \[[^]]*\])*:?\n", tree), "each has a name"
    assert page.get_by_role("gridcell").count() == 3 * 4


HOSTILE = (
    "</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "&lt;",
    "\u202eabc",
    "\x00",
    "\n\n",
    "שלום",
    "👩‍🚀",
    "`${1}`",
    "",
    "\u200b",
    "a\u2028b",
)


def test_tokens_cannot_break_the_page(opened: Opened) -> None:
    terms = random_terms(2, 2, 16)
    texts = (*HOSTILE, *("</style><script>window.broken = 1</script>" for _ in range(16 - len(HOSTILE))))
    pieces = tuple(replace(piece, text=text) for piece, text in zip(terms.pieces, texts, strict=True))
    groups = ("<b>bold</b>", *terms.groups[1:])
    page = opened(
        InteractiveView(
            replace(terms, pieces=pieces, groups=groups, title="</title><script>window.broken = 2</script>")
        )
    )
    assert page.evaluate("window.broken") is None
    assert page.locator("img, script:not([type]), b").count() == 0
    shown = tokens(page).evaluate_all("all => all.map(e => e.textContent)")
    assert shown[:4] == list(HOSTILE[:4])
    assert shown[4:6] == ["‹U+202e›abc", "‹U+0000›"], "controls of direction are spelled out"
    assert shown[6] == "⏎\n⏎\n"
    assert shown[7:11] == [*HOSTILE[7:10], "∅"]
    assert shown[11:13] == ["‹U+200b›", "a‹U+2028›b"], "what has no width can be seen and clicked"
    assert page.title() == "</title><script>window.broken = 2</script>"
    assert page.get_by_role("rowheader", name="<b>bold</b>").count() == 1


LIGHTNESS = """
() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = getComputedStyle(document.querySelector(".icl-view")).backgroundColor;
  const texts = ".icl-token, .icl-grid [role=gridcell], .icl-note, .icl-grid th, td";
  return [...document.querySelectorAll(texts)].map((e) => {
    const style = getComputedStyle(e);
    const ground = style.backgroundColor === "rgba(0, 0, 0, 0)" ? page : style.backgroundColor;
    const [low, high] = [luminance(style.color), luminance(ground)].sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), e.dataset.sign ?? ""];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour_and_signs_without_colour(opened: Opened, scheme: str) -> None:
    page = opened(InteractiveView(random_terms(4, 6, 48)), color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    assert dark == (scheme == "dark")
    measured = page.evaluate(LIGHTNESS)
    assert min(contrast for contrast, _ in measured) >= 4.5, "WCAG AA"
    signs = {sign for _, sign in measured}
    assert {"positive", "negative"} <= signs
    lines = tokens(page).evaluate_all("all => all.map(e => [e.dataset.sign, getComputedStyle(e).borderBottomStyle])")
    assert all((line == "dashed") == (sign == "negative") for sign, line in lines)
    cells = page.get_by_role("gridcell").evaluate_all("all => all.map(e => [e.dataset.sign, e.textContent])")
    assert all((text == "\u2212") == (sign == "negative") for sign, text in cells)


@pytest.mark.parametrize("width", [360, 700])
def test_narrow_windows_need_no_sideways_scrolling(opened: Opened, view: InteractiveView, width: int) -> None:
    page = opened(view, width=width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    cell(page, 2, 3).click()
    assert selected(page).startswith("layer 2, head 3")


def test_a_page_of_30_layers_9_heads_and_800_tokens_works(opened: Opened) -> None:
    page = opened(InteractiveView(random_terms(30, 9, 800)))
    assert tokens(page).count() == 800
    cell(page, 29, 8).click()
    milliseconds = page.evaluate(
        """() => { const before = performance.now();
        document.querySelectorAll("[role=gridcell]")[5].click(); return performance.now() - before; }"""
    )
    assert selected(page).startswith("layer 0, head 5:")
    assert milliseconds < 500


def test_undefined_numbers_are_named_and_hatched(opened: Opened) -> None:
    terms = random_terms(2, 2, 16)
    first, second = terms.quantities
    undefined = replace(first, values=first.values * torch.nan, sums=first.sums * torch.nan)
    page = opened(InteractiveView(replace(terms, quantities=(undefined, second))))
    assert "undefined" in page.get_by_role("status").inner_text()
    assert set(tokens(page).evaluate_all("all => all.map(e => e.dataset.sign)")) == {"undefined"}
    assert number(tokens(page).first.get_attribute("title") or "") == pytest.approx(
        second.values[0, 0, 0].item(), rel=6e-3
    )


WIDGET = """
<!doctype html><meta charset="utf-8"><title>widget</title><body><div id="el"></div><script type="module">{module}
const state = {{ data: {data}, layer: 1, head: 2 }}, listeners = {{}};
window.model = {{
  get: (name) => state[name], set: (name, value) => {{ state[name] = value; }},
  save_changes: () => {{ window.saved = [state.layer, state.head]; }},
  on: (name, call) => {{ listeners[name] = call; }}, off: (name) => {{ delete listeners[name]; }},
}};
window.fromPython = (name, value) => {{ state[name] = value; listeners[`change:${{name}}`](); }};
window.stop = render({{ model: window.model, el: document.getElementById("el") }});
window.listeners = listeners;
</script>
"""


def test_the_same_module_is_a_widget_that_follows_python_and_tells_it(opened: Opened, view: InteractiveView) -> None:
    widget = view.widget(layer=1, head=2)
    assert (widget.layer, widget.head) == (1, 2)
    assert "export default { render }" in widget._esm
    assert str(widget._esm) in view.page, "one module, in both"
    page = opened(WIDGET.format(module=widget._esm, data=re.sub("<", r"\\u003c", repr(widget.data))))
    assert selected(page).startswith("layer 1, head 2:")
    cell(page, 2, 0).click()
    assert page.evaluate("window.saved") == [2, 0]
    page.evaluate("window.fromPython('layer', 0)")
    assert selected(page).startswith("layer 0, head 0:")
    page.evaluate("window.stop()")
    assert page.evaluate("Object.keys(window.listeners)") == []


def test_a_notebook_shows_the_page_in_a_frame(opened: Opened, view: InteractiveView) -> None:
    page = opened(f"<!doctype html><meta charset='utf-8'><p>before</p>{view._repr_html_()}<p>after</p>")
    frame = page.frame_locator("iframe")
    frame.get_by_role("gridcell", name=re.compile("^layer 2, head 1:")).click()
    assert "Layer 2, head 1" in frame.get_by_role("status").inner_text()
    assert html.escape(view.terms.title) in view._repr_html_()


def test_a_page_is_saved_as_it_is_shown(view: InteractiveView, tmp_path: Path) -> None:
    path = view.save(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == view.page
    (tmp_path / "file").write_text("a file")
    with pytest.raises(icl.AssetError, match="file"):
        view.save(tmp_path / "file" / "page.html")


def test_a_page_that_cannot_be_written_leaves_the_one_before(
    view: InteractiveView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(self: Path, text: str, **_: object) -> int:
        with self.open("wb") as file:
            file.write(text[:100].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "page.html").write_text("the page before")
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(icl.AssetError, match="No space left"):
        view.save(tmp_path / "page.html")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "the page before"


def test_half_a_surrogate_pair_in_the_title_is_no_error(view: InteractiveView, tmp_path: Path) -> None:
    path = InteractiveView(replace(view.terms, title="a \ud800 b")).save(tmp_path / "page.html")
    assert "<title>a ? b" in path.read_text(encoding="utf-8")
