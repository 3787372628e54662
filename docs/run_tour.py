"""Run the tour, docs/tour.py, and write it with its outputs as docs/tour.ipynb.

The lines that it prints have to be those of the notebook before, numbers aside: `--new` writes others. Where only words
between the code have changed, `--text` writes them without running anything.
"""

import argparse
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

SCRIPT = Path(__file__).with_name("tour.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def without_numbers(text: str) -> str:
    """Return a text in which every number is #."""
    return re.sub(r"-?\d*\.?\d+(e-?\d+)?", "#", text)


def printed(notebook: NotebookNode) -> list[str]:
    """Return what each code cell printed, numbers aside."""
    return [
        "".join(without_numbers(output.text) for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def read_script() -> NotebookNode:
    """Return the script as a notebook without outputs; cells have the same names every time."""
    notebook = jupytext.read(SCRIPT)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
    return notebook


def run() -> NotebookNode:
    """Return the script as a notebook with its outputs."""
    from nbclient import NotebookClient

    notebook = read_script()
    NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False).execute()
    # The version of Python and the order of execution are of this run only.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def with_text_of_script(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook with the script's text between the same code."""
    script = read_script()
    if code(script) != code(notebook):
        raise SystemExit(f"expected {SCRIPT} with the code of {NOTEBOOK.name}, got other code: run it without --text")
    outputs = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in script.cells:
        if cell.cell_type == "code":
            cell.update({name: outputs[0][name] for name in ("outputs", "execution_count")})
            del outputs[0]
    script.metadata = notebook.metadata
    return script


def code(notebook: NotebookNode) -> list[str]:
    """Return the code of each code cell."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", action="store_true", help="accept other lines than those of the notebook before")
    parser.add_argument("--text", action="store_true", help="run nothing, only take over the text between the code")
    args = parser.parse_args()
    before = None if args.new else nbformat.read(NOTEBOOK, as_version=4)
    notebook = with_text_of_script(before) if args.text and before else run()
    if before and printed(notebook) != printed(before):
        raise SystemExit(
            f"expected the tour to print {printed(before)}, got {printed(notebook)}: look why, or pass --new"
        )
    written = NOTEBOOK.with_suffix(".ipynb.new")  # whoever reads the notebook meanwhile sees all of one of both
    nbformat.write(notebook, written)
    written.replace(NOTEBOOK)
