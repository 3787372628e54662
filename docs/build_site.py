"""Build the documentation site from the pages of the repository, by mkdocs and by Zensical.

    python docs/build_site.py            # stage the pages, build them by both, check every link of the result
    python docs/build_site.py --write    # first write what is generated in the repository

Generated and committed are a page for each module (`docs/api/`), their part of the navigation in `mkdocs.yml`, the
range and null of each metric in `docs/metrics.md`, and `llms.txt`. The pages link to files outside of `docs/`, such as
`../figures/claim.png`, so that they can be read in the repository. A builder wants one folder: pages and all files that
they link to are copied into `build/pages`, at the paths that they have. There, the tour becomes a page, and formulas
become MathML, which browsers draw without any script.
"""

import argparse
import ast
import html
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).parents[1]
STAGED, SOURCE, SITE = (ROOT / "build" / name for name in ("pages", "source", "site"))
CODE = re.compile(r"(^```.*?^```|^~~~.*?^~~~|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\s](?:[^$\n]*[^$\s])?)\$", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)")
NOTEBOOK, TOUR = "docs/tour.ipynb", "docs/tour.md"
"""The tour in the repository, and as a page of the site."""
MODULES_BEGIN = "  # The modules, written by docs/build_site.py.\n"
HEADINGS = {
    "arguments": "Arguments and results",
    "dual": "Mathematics",
    "assets": "Models and tasks",
    "texts": "Prompts",
    "captures": "Attention",
    "finetuning": "Finetuning and changes of weights",
    "recordings": "Metrics and studies",
    "pretraining": "Training and drawing",
}
"""The navigation's heading for the modules from the named one on, in the order of the table in CONTRIBUTING.md."""


def modules() -> list[str]:
    """Return the names of all modules below `icl_dual`, without the package's: as in the table of CONTRIBUTING.md."""
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    order = [name.rstrip("/") for row in table for name in re.findall(r"`(\w+/?)`", row)]
    files = [path for path in (ROOT / "icl_dual").rglob("*.py") if (path.parent / "__init__.py").exists()]
    paths = [path.relative_to(ROOT / "icl_dual").with_suffix("") for path in files]
    parts = [path.parts[:-1] if path.name == "__init__" else path.parts for path in paths]
    public = [names for names in parts if names and not any(name.startswith("_") for name in names)]
    if unlisted := sorted({names[0] for names in public} - {*order}):
        raise SystemExit(f"expected every module in the table of CONTRIBUTING.md, got {unlisted}: add them there")
    return [".".join(names) for names in sorted(public, key=lambda names: (order.index(names[0]), names))]


def module_path(name: str) -> Path:
    """Return the file of a module below `icl_dual`."""
    path = ROOT / "icl_dual" / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def first_line(name: str) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(module_path(name).read_text())) or "").partition("\n")[0]


def module_page(name: str) -> str:
    """Return the page of a module. A package's page has its docstring alone: what it exports is its modules'."""
    is_package = module_path(name).name == "__init__.py"
    options = "    options:\n      members: false\n" if is_package else ""
    return f"# icl_dual.{name}\n\n::: icl_dual.{name}\n{options}"


def modules_page() -> str:
    """Return the page that lists all modules."""
    rows = "\n".join(f"| [`{name}`]({name}.md) | {first_line(name)} |" for name in modules())
    return (
        "# Modules\n\nEvery module of `icl_dual`, from its docstrings. `import icl_dual` has what most code needs.\n"
        "[Contributing](../../CONTRIBUTING.md#where-things-go) says which module imports which.\n\n"
        f"| module | first line |\n|---|---|\n{rows}\n"
    )


def modules_navigation() -> str:
    """Return the part of `mkdocs.yml` with the pages of modules, which ends the file."""
    lines = ["  - Modules:\n", "      - All modules: docs/api/index.md\n"]
    for name in modules():
        if name in HEADINGS:
            lines.append(f"      - {HEADINGS[name]}:\n")
        lines.append(f"          - {name}: docs/api/{name}.md\n")
    return "".join(lines)


def metrics_page(text: str) -> str:
    """Return the page of metrics with what the catalogue says of each below its heading."""
    from icl_dual.metrics.catalogue import BUILT_IN

    def number(value: float) -> str:
        return f"{value:g}".replace("-", "−").replace("inf", "∞")

    rules = {"bootstrap": "bootstrap", "proportion": "Wilson's", "accuracy": "bootstrap, Wilson's at 0 and 1"}
    for metric in BUILT_IN:
        facts = [f"Range: {' to '.join(map(number, metric.range))}."]
        if metric.null is not None:
            facts.append(f"By chance: {number(metric.null)}.")
        if metric.baselines:
            facts.append(f"Held against: {', '.join(metric.baselines)}.")
        facts.append(f"Interval: {rules[metric.interval]}.")
        if metric.needs:
            facts.append(f"Absent without: {', '.join(f'`{name}`' for name in metric.needs)}.")
        if metric.released:
            facts.append(f"In the released code: `{metric.released}`.")
        heading = re.compile(rf"^(### {re.escape(metric.name)}\n\n)(?:Range: .*\n\n)?", flags=re.MULTILINE)
        text = heading.sub(lambda match, facts=facts: f"{match.group(1)}{' '.join(facts)}\n\n", text, count=1)
    return text


def navigation() -> list[tuple[str, str, str]]:
    """Return section, title and path of each page of the site in order; of the modules, the page that lists them."""
    pages = []
    for entry in configuration()["nav"]:
        ((section, content),) = entry.items()
        if isinstance(content, str):
            pages.append(("Pages", section, content))
        elif section != "Modules":
            pages += [(section, title, path) for item in content for title, path in item.items()]
    return [*pages, ("Modules", "All modules", "docs/api/index.md")]


def configuration() -> dict:
    """Return the settings of `mkdocs.yml` without its extensions, which name Python objects."""
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text())
    return yaml.safe_load(text)


def descriptions() -> dict[str, str]:
    """Return by page what one reads it for, from the table of `docs/index.md`."""
    rows = re.findall(r"^\| \[.*?\]\((.*?)\) \| (.*?) \|$", (ROOT / "docs/index.md").read_text(), flags=re.MULTILINE)
    return {f"docs/{path}": description for path, description in rows}


def llms_txt() -> str:
    """Return `llms.txt`: what the library is, and a line for each page of the site."""
    readme = (ROOT / "README.md").read_text()
    about = readme[readme.index("**Is in-context") : readme.index("![")]
    about = " ".join(re.sub(r"\[(.*?)\]\(.*?\)|\*", r"\1", about).split())
    text, described, last = f"# icl_dual\n\n> {configuration()['site_description']}\n\n{about}\n", descriptions(), ""
    for section, title, path in navigation():
        path = NOTEBOOK if path == TOUR else path
        if section != last:
            text += f"\n## {section}\n\n"
            last = section
        text += f"- [{title}]({path})" + (f": {described[path]}\n" if path in described else "\n")
    return text


def written() -> dict[Path, str]:
    """Return the text of every file that is generated and committed, by its path."""
    files = {ROOT / "docs" / "api" / f"{name}.md": module_page(name) for name in modules()}
    files[ROOT / "docs" / "api" / "index.md"] = modules_page()
    before, begin, _ = (ROOT / "mkdocs.yml").read_text().partition(MODULES_BEGIN)
    files[ROOT / "mkdocs.yml"] = before + begin + modules_navigation()
    page = ROOT / "docs" / "metrics.md"
    files[page] = metrics_page(page.read_text())
    files[ROOT / "llms.txt"] = llms_txt()
    return files


def write() -> None:
    """Write every file that is generated and committed, and remove pages of modules that are no more."""
    files = written()
    for path in (ROOT / "docs" / "api").glob("*.md"):
        if path not in files:
            path.unlink()
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def pages() -> Iterator[Path]:
    """Yield the pages that the site begins with; those that they link to follow from them."""
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    yield from sorted((ROOT / "docs").rglob("*.md"))


def linked_files(page: Path) -> list[Path]:
    """Return the files of the repository that a page links to."""
    targets = LINK.findall(CODE.sub("", page.read_text()))
    return [(page.parent / unquote(target)).resolve() for target in targets]


def stage() -> None:
    """Copy pages, and all files that they link to, into `build/pages`."""
    shutil.rmtree(STAGED, ignore_errors=True)
    waiting, staged = [*pages(), ROOT / "llms.txt"], set()
    while waiting:
        path = waiting.pop()
        if path in staged:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"expected links to files, got a link to {path}: name a file in the folder")
        staged.add(path)
        target = STAGED / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.write_text(for_site(path.read_text()))
            waiting += linked_files(path)
        else:
            shutil.copyfile(path, target)
        if path.suffix == ".ipynb":
            stage_notebook(path, target.with_suffix(".md"))


def stage_source() -> None:
    """Copy the library into `build/source`, with the examples of its docstrings as griffe reads them."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for path in (ROOT / "icl_dual").rglob("*.py"):
        target = SOURCE / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(with_examples(path.read_text()))


def with_examples(source: str) -> str:
    """Return a module's source with `Examples:` above each example of its docstrings, the section's lines indented."""
    lines: list[str] = []
    is_section = is_bare = False
    for line in source.splitlines():
        text = line.strip()
        if text == "Example:":
            line, is_section = line.replace("Example:", "Examples:"), True
        elif text.startswith(">>> ") and not is_section and not is_bare:
            lines.append(line[: line.index(">>>")] + "Examples:")
            is_bare = True
        elif not text or text.startswith('"""'):
            is_bare = False
        if text.endswith('"""'):
            is_section = False
        lines.append(f"    {line}" if is_bare else line)
    return "\n".join(lines) + "\n"


def stage_notebook(notebook: Path, target: Path) -> None:
    """Write a notebook with its outputs as a page, and its figures and views as files next to it."""
    import nbformat
    from nbconvert import MarkdownExporter

    content = nbformat.read(notebook, as_version=4)
    views = take_views(content)
    body, resources = MarkdownExporter().from_notebook_node(content, {"output_files_dir": "tour_files"})
    target.write_text(for_site(body))
    # mkdocs keeps a frame's address; Zensical reads it as relative to the notebook, and leads to the folder above.
    files = {target.parent: resources["outputs"] | views, target.parent.parent: views}
    for folder, of_folder in files.items():
        for name, content in of_folder.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)


SRCDOC = re.compile(r'srcdoc="([^"]*)"')
"""The page inside of a frame, as the outputs of a notebook have it."""


def take_views(notebook: Any) -> dict[str, bytes]:
    """Return the pages that frames in a notebook's outputs hold, by file, and let the frames show the files instead.

    A page is no Markdown. A frame's address is relative to `docs/tour/`, the folder of the notebook's page in the site.
    """
    files: dict[str, bytes] = {}

    def to_file(match: re.Match[str]) -> str:
        name = f"tour_files/view_{len(files)}.html"
        files[name] = html.unescape(match[1]).encode()
        return f'src="../{name}"'

    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = SRCDOC.sub(to_file, output.data["text/html"])
    return files


def for_site(text: str) -> str:
    """Return a page as the builders read it: formulas as MathML, and the tour as a page."""
    pieces = CODE.split(re.sub(r"\]\(((?:docs/)?tour)\.ipynb", r"](\1.md", text))
    return "".join(piece if at % 2 else FORMULA.sub(formula, piece) for at, piece in enumerate(pieces))


def formula(match: re.Match[str]) -> str:
    """Return a formula of TeX as MathML."""
    from latex2mathml.converter import convert

    if match.group(1):
        return f'<div style="overflow-x: auto">{convert(match.group(1).strip(), display="block")}</div>'
    return f"<span>{convert(match.group(2))}</span>"  # math alone, at the begin of a line, would be a block


class Links(HTMLParser):
    """The targets and anchors of a page of the built site."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what an element links to, loads, and is called."""
        values = dict(attrs)
        if tag != "link":  # its targets are addresses of the site, not of files
            self.targets += [value for name in ("href", "src") if (value := values.get(name))]
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}


def broken_links() -> list[str]:
    """Return the links of the built site that lead to no file or anchor of it, and what it loads from elsewhere."""
    parsed = {}
    for path in SITE.rglob("*.html"):
        parsed[path] = Links()
        parsed[path].feed(path.read_text())
    broken = []
    for path, links in parsed.items():
        if path.name == "404.html":
            continue
        for link in links.targets:
            if re.match(r"[a-z]+:|//", link):
                continue
            file, _, name = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (name and target in parsed and name not in parsed[target].anchors):
                broken.append(f"{path.relative_to(SITE)} links to {link}")
    return broken


def publish_sources() -> None:
    """Put the pages' Markdown, `llms.txt` and `llms-full.txt` into the built site, for readers that are programs."""
    full = []
    for path in sorted(STAGED.rglob("*.md")):
        target = SITE / path.relative_to(STAGED)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for _, title, path in navigation():
        source = (ROOT / path).read_text() if path != TOUR else (STAGED / path).read_text()
        full.append(f"<!-- {path}: {title} -->\n\n{source.strip()}\n")
    (SITE / "llms-full.txt").write_text("\n\n".join(full))


def build() -> None:
    """Build the site by Zensical, then by mkdocs, which is the one that stays; stop at the first warning."""
    stage()
    stage_source()
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    for command in (["zensical", "build", "--clean", "--strict"], ["mkdocs", "build", "--clean", "--strict"]):
        print("+", *command, flush=True)
        subprocess.run(
            [Path(sys.executable).with_name(command[0]), *command[1:]], cwd=ROOT, check=True, env=environment
        )
        if broken := broken_links():
            raise SystemExit("\n".join(["expected links to files and anchors of the site, got", *broken]))
        publish_sources()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--write", action="store_true", help="write what is generated in the repository, and stop")
    write() if parser.parse_args().write else build()
