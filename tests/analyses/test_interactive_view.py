"""The script of the interactive view writes a page and a picture of it, and says what is missing for one."""

from pathlib import Path

import interactive_view
import pytest
from PIL import Image

from icl_dual.scripts.common import ScriptError


def test_the_script_writes_a_page_and_its_picture(few_layers: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "view"
    assert interactive_view.main(["--model", few_layers, "--task", "subj", "--k", "2", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"view.html", "view.png"}
    page = (out / "view.html").read_text(encoding="utf-8")
    assert "query 0 of subj after 2 demonstrations" in page
    assert len(page) < 2_000_000
    with Image.open(out / "view.png") as picture:
        assert picture.size == (1280, 800)
        assert len(picture.convert("L").getcolors() or []) > 20, "it is not blank"


def test_a_missing_browser_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ICL_DUAL_BROWSER", "no-such-browser")
    with pytest.raises(ScriptError, match=r"got no-such-browser: install it \(apt-get install chromium\)"):
        interactive_view.find_browser()
    monkeypatch.delenv("ICL_DUAL_BROWSER")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScriptError, match="got none: install it"):
        interactive_view.find_browser()
    browser = tmp_path / "google-chrome"
    browser.touch(mode=0o755)
    assert interactive_view.find_browser() == str(browser)
