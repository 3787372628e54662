"""One prompt in the browser: the page of an interactive view, and a picture of it.

Four demonstrations and one query run through the model; `view.html` shows what every token contributes at every layer
and head. It works from disk, without a network. `view.png` is a picture of it, which needs Chromium and playwright.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import icl_dual as icl
from icl_dual.scripts.common import (
    ScriptError,
    count,
    device,
    model_name,
    model_title,
    output_folder,
    positive,
    run_script,
    script_parser,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""The names of the program, in the order in which they are tried."""
BROWSER_VARIABLE = "ICL_DUAL_BROWSER"
"""The environment variable with the path of the browser, where it has another name."""


def find_browser() -> str:
    """Return the path of a Chromium: of the environment variable, or on the search path.

    Raises:
        ScriptError: there is none; says what to install.
    """
    named = os.environ.get(BROWSER_VARIABLE)
    path = shutil.which(named) if named else next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise ScriptError(
            f"expected a Chromium as one of {', '.join(BROWSERS)}, got {named or 'none'}: install it (apt-get install "
            f"chromium), or set {BROWSER_VARIABLE} to its path"
        )
    return path


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=model_name,
        default="smollm2-135m",
        help="packaged model, hub id, folder or .gguf file (%(default)s)",
    )
    add("--task", default="sst2", choices=sorted(icl.TASKS), metavar="TASK", help="(%(default)s)")
    add("--k", type=positive, default=4, help="demonstrations (%(default)s)")
    add("--seed", type=count, default=2, help="draw of the demonstrations (%(default)s)")
    add("--query", type=count, default=0, help="index of the query (%(default)s)")
    add("--no-picture", action="store_true", help="write the page alone, without a browser")
    add("--device", type=device, default="cpu", help="(%(default)s)")
    add("--out", type=output_folder, default="figures/view", help="folder for all output (%(default)s)")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def make_view(args: argparse.Namespace) -> icl.InteractiveView:
    """Run the model, and return the view of one query."""
    model, task = icl.load_model(args.model, device=args.device), icl.load_task(args.task)
    prompts = icl.build_prompts(model, task, task.demonstrations(args.k, args.seed), task.queries(args.query + 1))
    zero_shot, in_context = (
        icl.capture(model, these, fields=icl.DECOMPOSE_FIELDS) for these in (prompts.zero_shot(), prompts)
    )
    decomposition = icl.decompose(model, zero_shot=zero_shot, in_context=in_context)
    title = f"{model_title(args.model)}: query {args.query} of {args.task} after {args.k} demonstrations"
    return icl.view(decomposition, args.query, zero_shot=zero_shot, title=title)


def photograph(page: Path, picture: Path) -> None:
    """Write a picture of a page.

    Raises:
        ScriptError: there is no browser.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=picture)
        browser.close()


def write(args: argparse.Namespace) -> None:
    """Write the page, and the picture where it was not left out."""
    view = make_view(args)
    args.out.mkdir(parents=True, exist_ok=True)
    page = view.save(args.out / "view.html")
    if not args.no_picture:
        photograph(page, args.out / "view.png")
    print(f"All of it is in {args.out}/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
