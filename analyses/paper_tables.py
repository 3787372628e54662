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
from common import DATA, ERRORS, TITLES, count_or_all

import icl_dual as icl
from icl_dual.metrics import KENDALL_QUERIES

SETTING_ROWS = ("queries", "k", "seed", "lr")
ACCURACY_ROWS = ("ZSL accuracy", "FT accuracy", "ICL accuracy")
METRIC_ROWS = (
    "Rec2FTP random",
    "Rec2FTP",
    "SimAOU random",
    "SimAOU",
    "SimAM random",
    "SimAM before FT",
    "SimAM after FT",
    "Kendall random",
    "Kendall",
    "Kendall by demonstration random",
    "Kendall by demonstration",
    "Top-100 recall random",
    "Top-100 recall",
    "Top-5 recall by demonstration random",
    "Top-5 recall by demonstration",
)
PER_CENT = (*ACCURACY_ROWS, "Rec2FTP random", "Rec2FTP")
TABLES = {
    "accuracy": (ACCURACY_ROWS, "Accuracy in per cent: zero-shot (ZSL), finetuned (FT), in-context learning (ICL)."),
    "metrics": (
        METRIC_ROWS,
        "Rec2FTP in per cent, with its counts (FT and ICL right, ZSL wrong / FT right, ZSL wrong), summed over seeds; "
        "the others are means over queries and layers. Kendall and recall of the most attended compare attention to "
        "the demonstrations' tokens, and to whole demonstrations.",
    ),
}
RECORDED = {"answer": "at the token that predicts the label", "reference": "after the first label word, as released"}
PAPER_NOTE = (
    "The paper's own values stand below ours: they are of its models and its validation queries, recorded as released."
)

Results = Sequence[icl.CellResult]


@dataclass(frozen=True)
class Group:
    """Cells of one model and one protocol that differ in task and seed only, but for what the table shows by task."""

    model: str
    by_task: dict[str, Results]


def groups(results: Results) -> list[Group]:
    """What belongs together into the rows of a table. Cells of other k, rate or queries of a task are kept apart."""
    set_ups: dict[str, dict[tuple, dict[str, dict[tuple, list[icl.CellResult]]]]] = {}
    for result in results:
        cell, of_model = result.cell, set_ups.setdefault(result.cell.model, {})
        by_task = of_model.setdefault(tuple(set_up(result).items()), {}).setdefault(cell.task, {})
        by_task.setdefault((cell.k, cell.lr, cell.n_queries), []).append(result)
    found = []
    for model, of_model in set_ups.items():
        one = [dict(same) for same in of_model]
        differing = [name for name in one[0] if len({str(of[name]) for of in one}) > 1]
        for same, by_task in of_model.items():
            about = ", ".join(f"{name} {value}" for name, value in same if name in differing)
            most = max(map(len, by_task.values()))
            for index in range(most):
                label = short(model) + (f", {about}" if about else "") + (f" ({index + 1})" if most > 1 else "")
                chosen: dict[str, Results] = {
                    task: list(by.values())[index] for task, by in by_task.items() if index < len(by)
                }
                found.append(Group(label, chosen))
    return found


def set_up(result: icl.CellResult) -> dict[str, Any]:
    """What a table does not show by task, and so must not differ within a row."""
    cell = result.cell
    return {
        "loss": cell.loss,
        "balanced": cell.balanced,
        "split": cell.split,
        "source": cell.source,
        "mismatch": cell.reference_k_mismatch,
        "weights": result.provenance["model"],
        "dtype": result.provenance["dtype"],
    }


def short(model: str) -> str:
    """A model's name as tables have it: of a folder, its last part."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


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
            found = {task: seed_values(group.by_task[task], row) for task in tasks if task in group.by_task}
            texts = {TITLES[task]: cell_text(group.by_task.get(task, ()), row) for task in tasks}
            mean = pd.Series({task: values.mean() for task, values in found.items()}).mean(skipna=False)
            lines.append(about | {"metric": row} | texts | {"mean": number(mean, row)})
    return pd.DataFrame(lines + paper_lines(tasks, rows)).fillna("")


def paper_lines(tasks: Sequence[str], rows: Sequence[str]) -> list[dict[str, str]]:
    paper = json.loads((DATA / "paper.json").read_text())
    lines = []
    for model, by_row in paper["models"].items():
        about = {"model": f"{model} (paper)", "protocol": "reference"}
        of_model = {"queries": paper["queries"], "k": paper["k"], **by_row}
        for row in (row for row in (*SETTING_ROWS, *rows) if row in of_model):
            by_task = dict(zip(paper["tasks"], of_model[row], strict=True))
            shown = {task: by_task[task] / (100 if row in PER_CENT else 1) for task in tasks}
            if row in SETTING_ROWS:
                texts, mean = {TITLES[task]: f"{value:g}" for task, value in shown.items()}, ""
            else:
                texts = {TITLES[task]: number(value, row) for task, value in shown.items()}
                mean = number(sum(shown.values()) / len(shown), row)
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


def seed_values(results: Results, row: str) -> pd.Series:
    """A metric of one task by seed; Rec2FTP, whose counts add up, and its baseline as one value for all seeds."""
    chosen = [result.comparison for result in results]
    if row == "Rec2FTP":
        both, finetuned = rec2ftp_counts(results)
        return pd.Series([both / finetuned if finetuned else float("nan")])
    if row == "Rec2FTP random":
        pooled = [(c.rec2ftp.random * c.rec2ftp.finetuned, c.rec2ftp.finetuned) for c in chosen if c.rec2ftp.finetuned]
        expected, finetuned = sum(both for both, _ in pooled), sum(n for _, n in pooled)
        return pd.Series([expected / finetuned if finetuned else float("nan")])
    return pd.Series([c.overall().set_index("metric").loc[row, "value"] for c in chosen], dtype=float)


def rec2ftp_counts(results: Results) -> tuple[int, int]:
    chosen = [result.comparison.rec2ftp for result in results]
    return sum(found.both for found in chosen), sum(found.finetuned for found in chosen)


def cell_text(results: Results, row: str) -> str:
    """A metric of one task: its mean over seeds, with their standard deviation where there are several."""
    if not results:
        return ""
    values = seed_values(results, row)
    counts = " ({}/{})".format(*rec2ftp_counts(results)) if row == "Rec2FTP" else ""
    spread = f" ± {number(float(np.std(values.dropna(), ddof=1)), row)}" if values.count() > 1 else ""
    return number(values.mean(), row) + spread + counts


def number(value: float, row: str) -> str:
    if pd.isna(value):
        return "undefined"
    shown = round(100 * value, 1) if row in PER_CENT else round(value, 3)
    return f"{shown + 0.0:.{1 if row in PER_CENT else 3}f}"  # + 0.0: no minus before a rounded zero


def file_name(table: str, protocol: str) -> str:
    """A table's file, without its ending: those of the reference protocol say so."""
    return table if protocol == "answer" else f"{table}_{protocol}"


def write(results: Results, out: Path) -> None:
    """Each table as Markdown, CSV and LaTeX, a set for each protocol; the reference protocol's names say so."""
    out.mkdir(parents=True, exist_ok=True)
    for protocol in dict.fromkeys(result.cell.protocol for result in results):
        chosen = [result for result in results if result.cell.protocol == protocol]
        n_seeds = max(len(cells) for group in groups(chosen) for cells in group.by_task.values())
        spread = f" ± is the standard deviation over {n_seeds} seeds." if n_seeds > 1 else ""
        for name, (rows, caption) in TABLES.items():
            path = out / file_name(name, protocol)
            frame = table(chosen, rows)
            note = (
                f"{caption}{spread} Protocol `{protocol}`: recorded {RECORDED[protocol]}. The mean is over the tasks "
                f"shown. {PAPER_NOTE}"
            )
            text = frame.to_markdown(index=False, disable_numparse=True)
            path.with_suffix(".md").write_text(f"{note}\n\n{text}\n")
            frame.to_csv(path.with_suffix(".csv"), index=False)
            path.with_suffix(".tex").write_text(latex(frame, note))
            print(f"\n{text}")


def latex(frame: pd.DataFrame, note: str) -> str:
    """A table for the booktabs package, with a rule between models."""
    text = frame.to_latex(
        index=False, escape=True, caption=note.replace("`", ""), column_format="lll" + "r" * (len(frame.columns) - 3)
    )
    lines = text.replace("±", "$\\pm$").splitlines(keepends=True)
    first = next(at for at, line in enumerate(lines) if line.startswith("\\midrule")) + 1
    starts = [at for at in range(1, len(frame)) if frame["model"].iloc[at] != frame["model"].iloc[at - 1]]
    for at in reversed(starts):
        lines.insert(first + at, "\\midrule\n")
    return "".join(lines)


def find_cells(folders: Sequence[Path]) -> list[icl.CellResult]:
    """Every finished cell in the folders given, or the cells that they are."""
    paths = [path.parent for folder in folders for path in sorted(folder.rglob("metadata.json"))]
    # Kept recordings and exported ones have metadata, too.
    cells = [path for path in paths if path.name != "recordings" and (path / "tensors.safetensors").exists()]
    if not cells:
        raise icl.StudyError(f"expected finished cells in {', '.join(map(str, folders))}, found none")
    found: dict[tuple, icl.CellResult] = {}
    for path in dict.fromkeys(cells):
        result = icl.load_cell(path)
        same = found.setdefault((result.cell, result.provenance["model"], result.provenance["dtype"]), result)
        if same is not result:
            raise icl.StudyError(f"expected each cell once, got the same in {same.folder} and {path}")
    return list(found.values())


def score(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of a folder of recordings under the released scripts' names."""
    recordings = icl.load_recordings(args.recordings, n_labels=args.n_labels, skip_bad=args.skip_bad)
    for reason in recordings.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    seed = recordings.metadata.get("settings", {}).get("seed", 0) if args.seed is None else args.seed
    found = icl.compare_recordings(recordings, seed=seed, kendall_queries=args.kendall_queries).released()
    overall = {name: np.mean(values) for name, values in found.items()}
    shown = {name: "undefined" if np.isnan(value) else f"{value:.4f}" for name, value in overall.items()}
    print(f"{recordings}\n\n{pd.Series(shown, name='over layers').to_markdown(disable_numparse=True)}")
    return {**found, "skipped": len(recordings.skipped)}


def plain(value: Any) -> Any:
    """What is undefined is null: JSON has no NaN."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cells", type=Path, nargs="*", help="folders of finished cells, or with such in them")
    add("--out", type=Path, default=Path("figures"), help="where tables of cells go (%(default)s)")
    add("--recordings", type=Path, metavar="FOLDER", help="has zs, icl, ftzs and ft: print its metrics instead")
    add("--json", type=Path, metavar="FILE", help="where the metrics of --recordings go, by layer")
    add("--skip-bad", action="store_true", help="leave out and count damaged records of --recordings")
    add("--n-labels", type=int, help="how many labels there are (by the folder's name or metadata, else 5)")
    add("--seed", type=int, help="of the random baselines (the cell's own, where the folder's metadata say; else 0)")
    add(
        "--kendall-queries",
        type=count_or_all,
        default=KENDALL_QUERIES,
        help="first queries whose attention to the demonstrations is compared, or all (%(default)s, as released)",
    )
    args = parser.parse_args()
    if bool(args.cells) == bool(args.recordings):
        parser.error("expected either folders of cells, or --recordings FOLDER")
    if args.json and not args.recordings:
        parser.error("--json takes the metrics of --recordings; tables of cells are written as CSV, too")
    return args


def main() -> int:
    args = parse()
    try:
        if args.recordings:
            found = score(args)
            if args.json:
                defined = {name: plain(value) for name, value in found.items()}
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(defined, indent=1, allow_nan=False) + "\n")
        else:
            write(find_cells(args.cells), args.out)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
