"""The paper's tables, ours beside its own, from finished cells; and the metrics of a folder of recordings.

    python analyses/paper_tables.py figures/cells --out figures
    python analyses/paper_tables.py --recordings ana_rlt/en_dense_lm_1_3b/sst2 --json sst2.json

Cells of the two protocols never share a table: those of the reference protocol go into files of their own. Recordings
are in the released code's layout (docs/recordings.md), whoever wrote them; no model is needed for either.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import icl_dual as icl
from icl_dual import grids
from icl_dual.finetuning.replicas import REPLICA_QUERIES
from icl_dual.grids.results import MANIFEST
from icl_dual.metrics import KENDALL_QUERIES, estimate
from icl_dual.scripts.common import (
    DATA,
    TITLES,
    count,
    count_or_all,
    model_title,
    output_file,
    output_folder,
    positive,
    run_script,
    script_parser,
)
from icl_dual.scripts.outputs import markdown, one_line, with_texts, write_csv, write_text
from icl_dual.statistics import MIN_QUERIES, UNSTABLE, Interval
from icl_dual.storage import finished_folders, is_scratch
from icl_dual.type_guards import is_list

SETTING_ROWS = ("queries", "k", "seed", "lr")
ACCURACY_ROWS = ("ZSL accuracy", "FT accuracy", "ICL accuracy")
METRIC_ROWS = (
    "Rec2FTP random",
    "Rec2FTP",
    "SimAOU random",
    "SimAOU random update",
    "SimAOU inflation null",
    "SimAOU",
    "SimAOU unnormalised random",
    "SimAOU unnormalised",
    "SimAM random",
    "SimAM random update",
    "SimAM before FT",
    "SimAM after FT",
    "SimAM before FT without massive tokens",
    "SimAM after FT without massive tokens",
    "SimAMΔ random",
    "SimAMΔ",
    "SimAMΔ random without massive tokens",
    "SimAMΔ without massive tokens",
    "Kendall random",
    "Kendall",
    "Kendall on keys",
    "Kendall by demonstration random",
    "Kendall by demonstration",
    "Top-100 recall random",
    "Top-100 recall",
    "Top-5 recall by demonstration random",
    "Top-5 recall by demonstration",
)
SHARES = ("Rec2FTP random", "Rec2FTP")
PER_CENT = (*ACCURACY_ROWS, *SHARES)
TABLES = {
    "accuracy": (ACCURACY_ROWS, "Accuracy in per cent: zero-shot (ZSL), finetuned (FT), in-context learning (ICL)."),
    "metrics": (
        METRIC_ROWS,
        "Rec2FTP in per cent, with its counts (FT and ICL right, ZSL wrong / FT right, ZSL wrong), summed over seeds; "
        "the others are means over queries of each query's mean over layers. Kendall and recall of the most attended "
        "compare attention to the demonstrations' tokens, and to whole demonstrations, on the first "
        f"{KENDALL_QUERIES} queries at most.",
    ),
}
RECORDED = {"answer": "at the token that predicts the label", "reference": "after the first label word, as released"}
PAPER_NOTE = (
    "The paper's own values stand below ours: they are of its models and its validation queries, recorded as released, "
    "and it gives no intervals."
)

Results = Sequence[icl.CellResult]


@dataclass(frozen=True)
class Group:
    """Cells of one model and one protocol that differ in task and seed only, but for what the table shows by task."""

    model: str
    by_task: dict[str, Results]


def groups(results: Results) -> list[Group]:
    """What belongs together into the rows of a table. Cells of other k, rate or queries of a task are kept apart."""
    set_ups: dict[str, dict[tuple[Any, ...], dict[str, dict[tuple[Any, ...], list[icl.CellResult]]]]] = {}
    for result in results:
        cell, of_model = result.cell, set_ups.setdefault(result.cell.model, {})
        by_task = of_model.setdefault(tuple(set_up(result).items()), {}).setdefault(cell.task, {})
        by_task.setdefault((cell.k, cell.lr, cell.n_queries), []).append(result)
    table_groups: list[Group] = []
    for model, of_model in set_ups.items():
        one = [dict(same) for same in of_model]
        differing = [name for name in one[0] if len({str(of[name]) for of in one}) > 1]
        for same, by_task in of_model.items():
            about = ", ".join(f"{name} {value}" for name, value in same if name in differing)
            most = max(map(len, by_task.values()))
            for index in range(most):
                label = model_title(model) + (f", {about}" if about else "") + (f" ({index + 1})" if most > 1 else "")
                chosen: dict[str, Results] = {
                    task: list(by.values())[index] for task, by in by_task.items() if index < len(by)
                }
                table_groups.append(Group(label, chosen))
    return table_groups


def set_up(result: icl.CellResult) -> dict[str, Any]:
    """What a table does not show by task, and so must not differ within a row."""
    cell = result.cell
    return {
        "variant": " and ".join(cell.variation.values()) or "none",
        "balanced": cell.balanced,
        "split": cell.split,
        "source": cell.source,
        "mismatch": cell.reference_k_mismatch,
        "weights": result.provenance["model"].partition(", ")[0],  # a control's seed is the cell's
        "dtype": result.provenance["dtype"],
    }


def table(results: Results, rows: Sequence[str]) -> pd.DataFrame:
    """Ours and the paper's values in the paper's layout: a row a metric, a column a task.

    Raises:
        StudyError: the cells are of two protocols.
    """
    protocols = {result.cell.protocol for result in results}
    if len(protocols) != 1:
        raise icl.StudyError(f"expected cells of one protocol in a table, got {sorted(protocols)}")
    if other := {result.cell.task for result in results} - {*TITLES}:
        raise icl.StudyError(f"expected cells of the paper's tasks, {list(TITLES)}, got {sorted(other)}")
    tasks = [task for task in TITLES if any(result.cell.task == task for result in results)]
    lines: list[dict[str, str]] = []
    for group in groups(results):
        about = {"model": group.model, "protocol": protocols.copy().pop()}
        for row in SETTING_ROWS:
            texts = {TITLES[task]: setting(group.by_task.get(task, ()), row) for task in tasks}
            lines.append(about | {"metric": row} | texts | {"mean": ""})
        for row in rows:
            texts = {TITLES[task]: task_text(group.by_task.get(task, ()), row) for task in tasks}
            mean = interval_of(row, *group.by_task.values())
            lines.append(about | {"metric": row} | texts | {"mean": format_interval(mean, row)})
    return pd.DataFrame(lines + paper_lines(tasks, rows)).fillna("")


def paper_lines(tasks: Sequence[str], rows: Sequence[str]) -> list[dict[str, str]]:
    """Return the paper's own values as rows of a table."""
    paper = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))
    lines: list[dict[str, str]] = []
    for model, by_row in paper["models"].items():
        about = {"model": f"{model} (paper)", "protocol": "reference"}
        of_model = {"queries": paper["queries"], "k": paper["k"], **by_row}
        for row in (row for row in (*SETTING_ROWS, *rows) if row in of_model):
            by_task = dict(zip(paper["tasks"], of_model[row], strict=True))
            values = {task: by_task[task] / style(row)[1] for task in tasks}
            if row in SETTING_ROWS:
                texts, mean = {TITLES[task]: f"{value:g}" for task, value in values.items()}, ""
            else:
                texts = {TITLES[task]: number(value, row) for task, value in values.items()}
                mean = number(sum(values.values()) / len(values), row)
            lines.append(about | {"metric": row} | texts | {"mean": mean})
    return lines


def setting(results: Results, row: str) -> str:
    """What a task's cells were run with."""
    if not results:
        return ""
    cell, in_context = results[0].cell, {result.provenance.get("k_in_context", result.cell.k) for result in results}
    if row == "k":
        cut = in_context != {cell.k}
        return f"{cell.k} ({'/'.join(map(str, sorted(in_context)))} in context)" if cut else str(cell.k)
    if row == "queries":
        return "/".join(map(str, sorted({len(result.comparison.gold) for result in results})))
    if row == "lr":
        return f"{cell.lr:g}"
    return ", ".join(str(result.cell.seed) for result in results)


def task_text(results: Results, row: str) -> str:
    """A metric of one task with its interval."""
    if not results:
        return ""
    values = by_query(results, row)
    counts = f"{values.nansum():g}/{values.isfinite().sum():g}" if row == "Rec2FTP" else ""
    return format_interval(interval_of(row, results), row, counts)


def interval_of(row: str, *by_task: Results) -> Interval:
    """A metric of one task's seeds, or its mean over several tasks, with its interval over queries and replicas."""
    values = (by_query(results, row) for results in by_task)
    return estimate(*values, of=row, shifts=[by_replica(results, row) for results in by_task])


def by_replica(results: Results, row: str) -> Float[Tensor, "seed replica"]:
    """How far each seed's replicas of the finetuning move a metric; NaN for seeds with fewer replicas than others."""
    shifts = [result.comparison.shifts(row)[0] for result in results]
    return torch.nn.utils.rnn.pad_sequence(shifts, batch_first=True, padding_value=torch.nan)


def by_query(results: Results, row: str) -> Float[Tensor, "seed query"]:
    """A metric of one task's seeds, query by query.

    Raises:
        StudyError: seeds asked different queries.
    """
    values = [result.comparison.by_query()[row] for result in results]
    query_lists = {tuple(result.provenance.get("queries", ())) for result in results}
    if len(query_lists) > 1 or len({len(by_seed) for by_seed in values}) > 1:
        folders = ", ".join(str(result.folder) for result in results)
        raise icl.StudyError(
            f"expected the same queries for every seed, got others in {folders}: make a table of each by itself"
        )
    return torch.stack(values)


def style(row: str) -> tuple[int, float]:
    """A row's digits after the point, and its unit's share in one."""
    return (1, 100.0) if row in PER_CENT else (3, 1.0)


def format_interval(interval: Interval, row: str, counts: str = "") -> str:
    """Return an interval with the digits of its row, and counts after it."""
    digits, scale = style(row)
    return interval.format(digits, scale=scale, counts=counts)


def number(value: float, row: str) -> str:
    """Return a number with the digits of its row."""
    digits, scale = style(row)
    return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a rounded zero


def file_name(table: str, protocol: str) -> str:
    """A table's file, without its ending: those of the reference protocol say so."""
    return table if protocol == "answer" else f"{table}_{protocol}"


def write(results: Results, out: Path) -> None:
    """Each table as Markdown, CSV and LaTeX, a set for each protocol; the reference protocol's names say so."""
    for protocol in dict.fromkeys(result.cell.protocol for result in results):
        chosen = [result for result in results if result.cell.protocol == protocol]
        several = any(len(cells) > 1 for group in groups(chosen) for cells in group.by_task.values())
        for name, (rows, caption) in TABLES.items():
            path = out / file_name(name, protocol)
            frame = table(chosen, rows)
            about = f"Protocol `{protocol}`: recorded {RECORDED[protocol]}."
            about_intervals = f"{brackets(rows, several)} {replicas_note(chosen)}"
            note = f"{caption} {about_intervals} The mean is over the tasks shown. {about} {PAPER_NOTE}"
            text = markdown(frame, disable_numparse=True)
            write_text(path.with_suffix(".md"), f"{note}\n\n{text}\n")
            write_csv(path.with_suffix(".csv"), frame)
            write_text(path.with_suffix(".tex"), latex(frame, note))
            print(f"\n{text}")


def brackets(rows: Sequence[str], several: bool) -> str:
    """What a table's brackets are."""
    sentence = "Brackets are 95 % intervals: a bootstrap over queries" + ", seeds resampled, too" * several
    if {*SHARES} & {*rows}:
        sentence += "; of Rec2FTP and its baseline, Wilson's" + ", each query counted once for all seeds" * several
    return f"{sentence}. Fewer than {MIN_QUERIES} queries have none, nor has a mean with such a task."


def replicas_note(results: Results) -> str:
    """What intervals and daggers owe to replicas of the finetuning."""
    n_replicas = sorted(
        {len(result.comparison.stability.replicas) if result.comparison.stability else 0 for result in results}
    )
    if n_replicas == [0]:
        return "Each cell is finetuned once: how stable its numbers are was not measured."
    counts = " or ".join(map(str, n_replicas))
    return (
        f"Intervals include the range over {counts} replicas of the finetuning, at rates that differ by 10⁻³ and "
        f"partly from weights with noise of 2⁻⁹, on the first {REPLICA_QUERIES} queries. {UNSTABLE}: unstable, that "
        "range is wider than the interval over queries."
    )


def latex(frame: pd.DataFrame, note: str) -> str:
    """A table for the booktabs and graphicx packages, as wide as the text, with a rule between models."""
    caption = latex_text(note.replace("`", "").replace("%", "\\%"))
    columns = "lll" + "r" * (len(frame.columns) - 3)
    text = with_texts(frame, one_line).to_latex(index=False, escape=True, caption=caption, column_format=columns)
    text = latex_text(text).replace("\\begin{tabular}", "\\resizebox{\\linewidth}{!}{%\n\\begin{tabular}")
    lines = text.replace("\\end{tabular}", "\\end{tabular}}").splitlines(keepends=True)
    first = next(at for at, line in enumerate(lines) if line.startswith("\\midrule")) + 1
    starts = [at for at in range(1, len(frame)) if frame["model"].iloc[at] != frame["model"].iloc[at - 1]]
    for at in reversed(starts):
        lines.insert(first + at, "\\midrule\n")
    return "".join(lines)


def latex_text(text: str) -> str:
    """A text with the characters that LaTeX has commands for."""
    commands = {UNSTABLE: "$^\\dagger$", "10⁻³": "$10^{-3}$", "2⁻⁹": "$2^{-9}$", "Δ": "$\\Delta$"}
    for character, command in commands.items():
        text = text.replace(character, command)
    return text


def find_cells(places: Sequence[str | Path]) -> list[icl.CellResult]:
    """Every finished cell in the folders given, or the cells that they are; and of grids, wherever their results are.

    A cell of a grid is checked against its checksums. A place with `://` is an address of a grid's results.
    """
    folders = [Path(place) for place in places if "://" not in str(place)]
    in_grids = _cells_of_grids([str(place) for place in places if "://" in str(place)])
    for scratch in [path for folder in folders for path in folder.rglob(".*") if path.is_dir()]:
        finished_folders(scratch.parent)  # cells that a killed process had set aside come back
    paths = [
        path.parent
        for folder in folders
        for path in sorted(folder.rglob("metadata.json"))
        if not any(map(is_scratch, path.relative_to(folder).parts))  # of processes that were killed
    ]
    # Kept recordings and exported ones have metadata, too.
    cells = [path for path in paths if path.name != "recordings" and (path / "tensors.safetensors").exists()]
    if not cells and not in_grids:
        raise icl.StudyError(f"expected finished cells in {', '.join(map(str, places))}, found none")
    results: dict[tuple[Any, ...], icl.CellResult] = {}
    for result in [*map(_load, dict.fromkeys(cells)), *in_grids]:
        provenance = result.provenance
        precision = provenance.get("precision", provenance["dtype"])
        same = results.setdefault((result.cell, provenance["model"], precision), result)
        if same is not result:
            raise icl.StudyError(f"expected each cell once, got the same in {same.folder} and {result.folder}")
    return list(results.values())


def _load(folder: Path) -> icl.CellResult:
    """A cell in a folder, after a check of its files where it is one of a grid."""
    if (folder / MANIFEST).exists() and folder.parent.name == "cells":
        return grids.Results(folder.parents[1]).load(folder.name)
    return icl.load_cell(folder)


def _cells_of_grids(addresses: Sequence[str]) -> list[icl.CellResult]:
    by_address = [grids.Results(address) for address in addresses]
    return [results.load(cell_id) for results in by_address for cell_id in results.finished()]


def score(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of a folder of recordings under the released scripts' names."""
    recordings = icl.load_recordings(args.recordings, n_labels=args.n_labels, skip_bad=args.skip_bad)
    for reason in recordings.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    seed = recordings.metadata.get("settings", {}).get("seed", 0) if args.seed is None else args.seed
    metrics_by_name = icl.compare_recordings(recordings, seed=seed, kendall_queries=args.kendall_queries).released()
    overall = {name: float(np.asarray(values).mean()) for name, values in metrics_by_name.items()}
    formatted = {name: "undefined" if np.isnan(value) else f"{value:.4f}" for name, value in overall.items()}
    print(f"{recordings}\n\n{pd.Series(formatted, name='over layers').to_markdown(disable_numparse=True)}")
    return {**metrics_by_name, "skipped": len(recordings.skipped)}


def plain(value: Any) -> Any:
    """What is undefined is null: JSON has no NaN."""
    if is_list(value):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the script\'s arguments."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "cells",
        nargs="*",
        help="finished cells, folders that contain some, or a grid's results, such as s3://bucket/grid",
    )
    add("--out", type=output_folder, default="figures", help="folder for the tables of cells (%(default)s)")
    add(
        "--recordings",
        type=Path,
        metavar="FOLDER",
        help="recordings (a folder with zs, icl, ftzs and ft): print their metrics instead",
    )
    add("--json", type=output_file, metavar="FILE", help="file for the metrics of --recordings by layer")
    add("--skip-bad", action="store_true", help="skip and count damaged records of --recordings")
    add("--n-labels", type=positive, help="number of labels (from the folder's name or metadata, else 5)")
    add("--seed", type=count, help="seed of the random baselines (from the folder's metadata, else 0)")
    add(
        "--kendall-queries",
        type=count_or_all,
        default=KENDALL_QUERIES,
        help="number of queries whose attention to the demonstrations is compared, or all (%(default)s)",
    )
    args = parser.parse_args(argv)
    if bool(args.cells) == bool(args.recordings):
        parser.error("expected either folders of cells, or --recordings FOLDER")
    if args.json and not args.recordings:
        parser.error("--json takes the metrics of --recordings; tables of cells are written as CSV, too")
    return args


def write_tables(args: argparse.Namespace) -> None:
    """Write the tables of finished cells, or print the metrics of recordings."""
    if not args.recordings:
        write(find_cells(args.cells), args.out)
        return
    metrics_by_name = score(args)
    if args.json:
        defined = {name: plain(value) for name, value in metrics_by_name.items()}
        write_text(args.json, json.dumps(defined, indent=1, allow_nan=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    return run_script(parse, write_tables, argv)
