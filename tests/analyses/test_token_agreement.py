"""Tokens generated in context and by patches: from the prompts to the page, on a tiny model."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import token_agreement
from helpers import make_rows

import icl_dual as icl
from icl_dual.patches.generation import Generation


@pytest.fixture(scope="module")
def arguments(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("token_agreement")
    return ["--models", tiny_model, "--k", "1", "--prompts", "5", "--tokens", "2", "--out", str(out)]


@pytest.fixture(scope="module")
def out(arguments: list[str]) -> Path:
    task = icl.Task("sst2", "{text}:", ("no", "yes"), make_rows())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icl, "load_task", lambda name: task)
        assert token_agreement.main(arguments) == 0
    return Path(arguments[-1])


def test_every_prompt_has_a_row_for_each_form(out: Path) -> None:
    frame = pd.read_csv(out / "token_agreement.csv")
    for precision, forms in token_agreement.FORMS.items():
        for form in forms:
            rows = frame[(frame["precision"] == precision) & (frame["form"] == form)]
            assert rows["prompt"].tolist() == list(range(5))
            saved = [Generation.load(out / "cells" / "tiny-llama" / precision / f"{index:03d}") for index in range(5)]
            assert (rows["agreeing"] / 2).tolist() == [generation.agreement(form) for generation in saved]
    patched = frame[(frame["precision"] == "float32") & (frame["form"] != "unpatched")]
    assert set(patched["agreeing"]) == {2}
    assert max(patched["largest relative error"]) < 1e-5


def test_the_page_has_a_row_for_each_form_and_names_no_machine(out: Path, tiny_model: str) -> None:
    page = (out / "README.md").read_text()
    assert page.count("| tiny-llama ") == sum(map(len, token_agreement.FORMS.values()))
    assert str(Path(tiny_model).parent) not in page
    assert (out / "token_agreement.png").exists()
    assert (out / "token_agreement.pdf").exists()


def test_panels_are_named_by_checkpoints() -> None:
    assert token_agreement.checkpoint("smollm2-135m") == "SmolLM2-135M-Instruct"
    assert token_agreement.checkpoint("gemma3-270m") == "gemma-3-270m"


def test_what_is_done_needs_no_model_and_other_settings_are_refused(
    out: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(icl, "load_model", lambda *args, **options: pytest.fail("all is done"))
    page = (out / "README.md").read_text()
    assert token_agreement.main(arguments) == 0
    assert (out / "README.md").read_text() == page
    capsys.readouterr()
    assert token_agreement.main([*arguments, "--seed", "7"]) == 1
    assert "error: expected a result made with settings=" in capsys.readouterr().err


def test_the_interval_of_next_tokens_is_over_prompts() -> None:
    # Ten prompts agree for 20 tokens, ten fail at the first: a few independent prompts, not 210 independent tokens.
    part, whole = np.repeat([20.0, 0.0], 10), np.repeat([20.0, 1.0], 10)
    got = token_agreement.ratio(part, whole)
    assert got.value == pytest.approx(200 / 210)
    rng = np.random.default_rng(1)
    draws = [rng.integers(20, size=20) for _ in range(2000)]
    expected = np.quantile([part[prompts].sum() / whole[prompts].sum() for prompts in draws], (0.025, 0.975))
    np.testing.assert_allclose((got.low, got.high), expected, atol=0.01)
    same = token_agreement.ratio(np.full(20, 20.0), np.full(20, 20.0))
    assert (same.value, same.n_queries) == (1, 20)
    assert same.low < 0.9, "Wilson's for 20 prompts, not for 400 tokens"
