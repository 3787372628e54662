"""The same cells as a chat: only for models with a chat template, run once, compared query by query."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import make_rows

import icl_dual as icl
from icl_dual.scripts import chat_form

TEMPLATE = (
    "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

OLD_SETTINGS = {"model", "task", "k", "seed", "lr", "n_queries", "protocol", "loss", "method", "trained"}
"""The settings of a cell that version 0.1 saved."""


@pytest.fixture
def chatty(llama: icl.Model, monkeypatch: pytest.MonkeyPatch) -> icl.Model:
    monkeypatch.setattr(llama.tokenizer, "chat_template", TEMPLATE)
    return llama


def test_a_cell_as_a_chat_is_its_rows_in_chat_form(
    chatty: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = icl.Task("sst2", "Text: {text} Label:", ("no", "perhaps"), make_rows())
    cell = icl.Cell(chatty.name, "sst2", k=2, seed=1, lr=0.05, n_queries=6, replicas=0)
    result = icl.run_cell(chatty, task, cell, tmp_path / "cell", progress=False)
    monkeypatch.setattr(icl, "load_model", lambda name, **options: chatty)
    monkeypatch.setattr(icl, "load_task", lambda name, source: task)
    chat_form.write([result], tmp_path)
    prompts = icl.build_prompts(chatty, task, task.demonstrations(2, seed=1), task.queries(6), chat=icl.Chat())
    expected = icl.capture(chatty, prompts, fields=(), progress=False)
    captured = icl.Capture.load(tmp_path / "chats" / cell.name / "ICL")
    torch.testing.assert_close(captured.label_log_probs, expected.label_log_probs)
    frame = pd.read_csv(tmp_path / "chat.csv", dtype=str).to_dict("records")
    assert [row["setting"] for row in frame] == ["zero-shot", "in context"]
    assert frame[1]["chat"].startswith(f"{100 * expected.accuracy:.1f} ")
    assert f"accuracy is {100 * expected.accuracy:.1f} % as a chat" in (tmp_path / "chat.md").read_text()
    monkeypatch.setattr(icl, "load_model", lambda name, **options: pytest.fail("it was captured"))
    for metadata in (tmp_path / "chats" / cell.name).glob("*/metadata.json"):
        saved = json.loads(metadata.read_text())
        saved["settings"] |= saved["settings"].pop("finetuning")  # as version 0.1 saved it: fewer settings, and flat
        for name in {*saved["settings"]} - OLD_SETTINGS:
            del saved["settings"][name]
        metadata.write_text(json.dumps(saved | {"sha256": {}}))
    chat_form.write([result], tmp_path)
    other = dataclasses.replace(result, cell=dataclasses.replace(cell, balanced=True))
    with pytest.raises(icl.SettingsError, match="balanced"):
        chat_form.write([other], tmp_path)


def test_a_model_without_a_chat_template_has_no_chat_form(tiny_model: str) -> None:
    assert not chat_form.has_chat_template(tiny_model)
    assert chat_form.has_chat_template("smollm2-135m")
