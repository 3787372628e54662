"""The script on documents on a tiny model, with few prompts."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sources as script
import torch

import icl_dual as icl
from icl_dual.models import tiny_model


@pytest.fixture(scope="module")
def arguments(tiny_model: str) -> tuple[str, ...]:
    return ("--model", tiny_model, "--tasks", "facts", "--prompts", "10")


@pytest.fixture(scope="module")
def out(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    assert script.main([*arguments, "--out", str(folder)]) == 0
    return folder


def test_every_table_and_figure_is_written(out: Path) -> None:
    pictures = {f"{name}.{kind}" for name in ("layers", "agreement", "prompt_facts") for kind in ("png", "pdf")}
    written = {path.name for path in out.iterdir()}
    assert written == pictures | {"README.md", "agreement.csv", "documents.csv", "cells"}
    text = (out / "README.md").read_text()
    assert "python analyses/sources.py --model tiny-llama --tasks facts --prompts 10 --seed 1" in text
    assert str(out) not in text


def test_agreement_is_that_of_the_documents_in_the_other_table(out: Path) -> None:
    documents: Any = pd.read_csv(out / "documents.csv")
    agreement = pd.read_csv(out / "agreement.csv")
    assert len(documents) == 30
    assert documents.groupby("prompt")["answers"].sum().eq(1).all()
    for score in script.SCORES:
        first = documents.loc[documents.groupby("prompt")[score].idxmax(), "document"].to_numpy()
        falls = documents.loc[documents.groupby("prompt")["drop"].idxmax(), "document"].to_numpy()
        of_score = agreement[(agreement["score"] == score) & (agreement["measure"] == "same document first")]
        assert of_score["value"].item() == pytest.approx((first == falls).mean())
        taus = agreement[(agreement["score"] == score) & (agreement["measure"] == "Kendall's τ")]
        expected = documents.groupby("prompt")[[score, "drop"]].corr("kendall").iloc[::2]["drop"].mean()
        assert taus["value"].item() == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_the_fall_is_the_answers_log_probability_with_and_without_a_document(out: Path, tiny_model: str) -> None:
    model, case = icl.load_model(tiny_model), script.facts(10, 1)[3]
    prompt = script.prompt_of(case, model)
    answer = script.first_token(model, case, case.answers[case.target])
    documents = pd.read_csv(out / "documents.csv").query("prompt == 3")
    with torch.no_grad():
        whole = model.run(torch.tensor([prompt.tokens]))[0, -1].log_softmax(-1)[answer]
        for name, fall in zip(script.DOCUMENTS, documents["drop"], strict=True):
            without = model.run(torch.tensor([prompt.without(name).tokens]))[0, -1].log_softmax(-1)[answer]
            assert fall == pytest.approx((whole - without).item(), abs=1e-4)
    assert documents["answers"].tolist() == [index == case.target for index in range(3)]


def test_finished_cells_are_drawn_again_without_the_model_and_others_are_refused(
    out: Path,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(icl, "load_model", lambda *args, **options: pytest.fail("no model is needed"))
    before = (out / "agreement.csv").read_bytes()
    assert script.main([*arguments, "--out", str(out)]) == 0
    assert (out / "agreement.csv").read_bytes() == before
    assert script.main(["--model", "smollm2-135m", *arguments[2:], "--out", str(out)]) == 1
    assert "model" in capsys.readouterr().err.splitlines()[-1]


def test_stories_are_quoted_up_to_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": " ".join(f"w{story}x{word}" for word in range(30)), "label": story % 2} for story in range(240)]
    rows += [{"text": "too short", "label": 0}] * 5
    letters = str.maketrans("0123456789", "abcdefghij")
    rows = [{**row, "text": row["text"].translate(letters)} for row in rows]
    stories = icl.Task("stories", "{text}", ("no", "yes"), rows)
    monkeypatch.setattr(icl, "load_task", lambda name: stories)
    for number, case in enumerate(script.news(3, 1)):
        assert case.target == number % 3
        quoted = case.question.partition("Answer: ")[2]
        assert quoted + case.answers[case.target] in case.documents[case.target]
        assert len(set(case.documents)) == 3
        model = tiny_model()
        answer = script.first_token(model, case, case.answers[case.target])
        assert answer == model.encode(case.answers[case.target])[0]
