"""Write the tables of controls from a grid's finished cells: each metric beside the controls that the grid has.

    python analyses/grid_controls.py results --out figures/grid_controls
    python analyses/grid_controls.py s3://bucket/grid --where model=smollm2-135m k=4

Reads any grid's results, or folders of cells, as `paper_tables.py` does; runs no model. The plain cells are the claim.
A control is the row of the study in `controls.py` that has its settings, and else a variant.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields

import control_tables
import pandas as pd
from controls import draw

import icl_dual as icl
from icl_dual.scripts.common import TITLES, model_title, output_folder, run_script, script_parser
from icl_dual.scripts.outputs import markdown, write_csv, write_text
from icl_dual.scripts.paper_tables import find_cells, replicas_note

SETTINGS = [*(field.name for field in fields(icl.Cell)), "precision"]

HEADINGS = {
    "claims": "Number of tasks on which each score is above all controls of each kind",
    "against_controls": "The closest control of each kind",
    "controls": "All controls",
    "accuracy": "Accuracy, in per cent",
    "rates": "Learning rates",
}
"""The tables, in order, and what each holds."""


def setting(text: str) -> tuple[str, str]:
    """Read KEY=VALUE, where KEY is a setting of a cell."""
    key, separator, value = text.partition("=")
    if not separator or key not in SETTINGS:
        raise argparse.ArgumentTypeError(
            f"expected KEY=VALUE, got {text!r}: use a setting of a cell, one of {', '.join(SETTINGS)}"
        )
    return key, value


def chosen(results: Iterable[icl.CellResult], where: Sequence[tuple[str, str]]) -> list[icl.CellResult]:
    """Return the cells with the settings given.

    Raises:
        StudyError: there is none.
    """
    of_result: dict[str, Callable[[icl.CellResult], object]] = {"precision": control_tables.precision_of}
    results = list(results)
    for key, text in where:
        read = of_result.get(key, lambda result, key=key: getattr(result.cell, key))
        values = [read(result) for result in results]
        kept = [result for result, value in zip(results, values, strict=True) if _is(value, text)]
        if not kept:
            there = ", ".join(sorted({str(value) for value in values}))
            raise icl.StudyError(f"expected cells with {key}={text}, got {there}: choose one of these")
        results = kept
    return results


def _is(value: object, text: str) -> bool:
    try:
        return value == float(text) if isinstance(value, float) else str(value) == text
    except ValueError:
        return False


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("cells", nargs="+", help="a grid's results, such as s3://bucket/grid, or folders that contain finished cells")
    add(
        "--where",
        nargs="+",
        action="extend",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="settings of the cells to take, where there are several set-ups",
    )
    add("--out", type=output_folder, default="figures/grid_controls", help="folder for the tables (%(default)s)")
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Write all tables, the page with them in words, and the figure."""
    runs = control_tables.runs_of(chosen(find_cells(args.cells), args.where))
    scores = control_tables.scored(runs)
    against, estimates = control_tables.against_controls(scores), control_tables.estimates(scores)
    unstable = {metric: control_tables.unstable_cells(runs, metric) for metric in control_tables.CLAIMS}
    tables = {
        "claims": control_tables.claim_table(against, unstable),
        "against_controls": control_tables.against_table(against),
        "controls": control_tables.control_table(estimates),
        "accuracy": control_tables.accuracy_table(runs),
        "rates": control_tables.rate_table(runs),
    }
    for name, frame in (tables | {"controls": estimates}).items():
        write_csv(args.out / f"{name}.csv", frame, float_format="%.6g")
    claim = [result for of_task in runs[control_tables.CLAIM].values() for result in of_task]
    about = _about(claim)
    write_text(args.out / "controls.md", _page(tables, about, replicas_note(claim)))
    tasks = ", ".join(TITLES.get(task, task) for task in runs[control_tables.CLAIM])
    draw(estimates, f"The metrics and their controls, mean over {tasks}\n{about}", args.out / "controls")
    print(markdown(tables["claims"]))


def _about(claim: Sequence[icl.CellResult]) -> str:
    """What the plain cells are, in words."""
    cell = claim[0].cell
    k = " or ".join(map(str, sorted({result.cell.k for result in claim})))
    queries = " or ".join(map(str, sorted({len(result.comparison.gold) for result in claim})))
    seeds = ", ".join(map(str, sorted({result.cell.seed for result in claim})))
    return f"{model_title(cell.model)}, k = {k}, {queries} queries a task, seeds {seeds}, protocol {cell.protocol}"


def _page(tables: dict[str, pd.DataFrame], about: str, note: str) -> str:
    words = "\n".join(f"- {control_tables.in_words(row)}" for row in tables["claims"].to_dict("records"))
    parts = [f"## {HEADINGS[name]}\n\n{markdown(frame, disable_numparse=True)}" for name, frame in tables.items()]
    return "\n\n".join([f"# Controls of a grid\n\n{about}. {note}", words, *parts, ""])


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
