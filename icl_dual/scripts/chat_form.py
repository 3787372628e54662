"""Whether chat form helps a model that was tuned to chat: the cells' prompts once more, as turns of a chat."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pandas as pd
from transformers import AutoTokenizer

import icl_dual as icl
from icl_dual.assets import model_files
from icl_dual.metrics import estimate
from icl_dual.scripts.common import TITLES
from icl_dual.scripts.outputs import markdown, write_csv, write_text
from icl_dual.statistics import paired_test
from icl_dual.storage import check_same_settings, load_tensors

SETTINGS = {"ZSL": "zero-shot", "ICL": "in context"}
ORIGIN = ("fingerprint", "task", "queries", "demonstrations")
"""The entries of a cell's provenance that its chats have to share: weights, task and rows."""


def has_chat_template(model: str) -> bool:
    """Return whether a model's tokenizer has a chat template, without loading the model."""
    tokenizer = cast(Any, AutoTokenizer).from_pretrained(model_files(model).folder, trust_remote_code=False)
    return tokenizer.chat_template is not None


def chat_captures(results: Sequence[icl.CellResult], folder: Path, **load: Any) -> dict[str, dict[str, icl.Capture]]:
    """Return a capture of each cell's queries as a chat by setting, run or read from the folder.

    Args:
        results: finished cells of one model.
        folder: the folder of the captures, one folder for each cell and setting.
        load: arguments of `load_model`.

    Raises:
        SettingsError: a capture in the folder is of other settings, weights or rows.
    """
    model: icl.Model | None = None
    by_cell: dict[str, dict[str, icl.Capture]] = {}
    tasks: dict[tuple[str, str | None], icl.Task] = {}
    for result in results:
        cell = result.cell
        by_setting: dict[str, icl.Capture] = {}
        about = {"settings": asdict(cell), "origin": {name: result.provenance[name] for name in ORIGIN}}
        for setting in SETTINGS:
            path = folder / cell.name / setting
            if not path.exists():
                model = model or icl.load_model(cell.model, **load)
                name = cell.task, cell.source
                task = tasks[name] = tasks.get(name) or icl.load_task(*name)  # reading many rows takes seconds
                demonstrations = task.demonstrations(cell.k, cell.seed, balanced=cell.balanced)
                queries = task.queries(cell.n_queries, split=cell.split)
                prompts = icl.build_prompts(model, task, demonstrations, queries, chat=icl.Chat())
                prompts = prompts.zero_shot() if setting == "ZSL" else prompts
                icl.capture(model, prompts, fields=()).save(path, about)
            saved = load_tensors(path)[1]
            saved["settings"] = asdict(icl.Cell.from_settings(saved["settings"]))  # of an older version, too
            check_same_settings(path, about, saved)
            by_setting[setting] = icl.Capture.load(path)
        by_cell[cell.name] = by_setting
    return by_cell


def table(results: Sequence[icl.CellResult], captures: dict[str, dict[str, icl.Capture]]) -> pd.DataFrame:
    """Return a row for each cell and setting: accuracy as plain text and as a chat, their difference, and p."""
    rows: list[dict[str, Any]] = []
    for result in results:
        for setting, name in SETTINGS.items():
            chat = captures[result.cell.name][setting]
            plain = (result.comparison.predictions[setting] == result.comparison.gold).double()[None]
            as_chat = (chat.predictions == chat.gold).double()[None]
            difference = paired_test(as_chat, plain)
            rows.append(
                {
                    "task": TITLES[result.cell.task],
                    "seed": result.cell.seed,
                    "setting": name,
                    "plain text": estimate(plain, of=f"{setting} accuracy").format(1, scale=100.0),
                    "chat": estimate(as_chat, of=f"{setting} accuracy").format(1, scale=100.0),
                    "chat less plain": difference.difference.format(1, scale=100.0),
                    "p": f"{difference.p:.3f}",
                }
            )
    return pd.DataFrame(rows)


def sentence(results: Sequence[icl.CellResult], captures: dict[str, dict[str, icl.Capture]]) -> str:
    """Return in words whether chat form helps in context, over all cells."""
    plain = [result.comparison.accuracy["ICL"] for result in results]
    as_chat = [captures[result.cell.name]["ICL"].accuracy for result in results]
    means = [100 * sum(accuracies) / len(accuracies) for accuracies in (plain, as_chat)]
    n_better = sum(chat > text for chat, text in zip(as_chat, plain, strict=True))
    return (
        f"In context, accuracy is {means[1]:.1f} % as a chat and {means[0]:.1f} % as plain text, as a mean over cells. "
        f"It is higher as a chat in {n_better} of {len(results)} cells."
    )


def write(results: Sequence[icl.CellResult], out: Path, **load: Any) -> None:
    """Write `chat.md` and `chat.csv`."""
    captures = chat_captures(results, out / "chats", **load)
    frame = table(results, captures)
    write_csv(out / "chat.csv", frame)
    text = markdown(frame, disable_numparse=True)
    note = (
        "Accuracy in per cent of the same demonstrations and queries as plain text and as a chat: each demonstration "
        "is a turn of the user and its label the assistant's answer. Brackets are 95 % intervals; p is of a paired "
        f"permutation test. {sentence(results, captures)}"
    )
    write_text(out / "chat.md", f"{note}\n\n{text}\n")
    print(f"\n{note}\n\n{text}")
