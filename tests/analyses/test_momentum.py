"""The whole script on tiny decoders and a tiny pretrained model, and its numbers against what is recomputed here."""

import json
import re
from pathlib import Path
from typing import Any

import momentum as script
import momentum_tables
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import icl_dual as icl
from icl_dual import pretraining

ARGUMENTS = (
    *(
        "--etas",
        "0",
        "learned",
        "--curve",
        "0.5",
        "--seeds",
        "1",
        "2",
        "--mapping-seeds",
        "1",
        "2",
        "--curve-seeds",
        "1",
        "--jobs",
        "1",
    ),
    *("--tasks", "subj", "--ks", "0", "1", "9", "--queries", "6", "--k", "2", "--draws", "1", "--added", "0", "0.3"),
)


def run(out: Path, model: str, *arguments: str) -> int:
    return script.main([*ARGUMENTS, "--model", model, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def out(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("momentum")
    text = folder / "lines.txt"
    text.write_text("\n".join(f"Sentence: item {n} is {'good' if n % 3 else 'bad'} Label: {n * 7}" for n in range(900)))
    with pytest.MonkeyPatch.context() as patch:
        tiny = pretraining.Preset(1, 2, 16, 32, 512, 300, batch_size=4, n_steps=4, n_warmup=1, lr=1e-3)
        toy = pretraining.Preset(1, 2, 16, 32, 33, 13, batch_size=4, n_steps=4, n_warmup=1, lr=1e-3)
        patch.setattr(pretraining, "PRESETS", {**pretraining.PRESETS, "tiny": tiny, "label-mapping": toy})
        assert run(folder / "out", tiny_model, "--corpus", str(text)) == 0
        made = {path: path.stat().st_mtime_ns for path in (folder / "out/cells").iterdir()}
        text.unlink()  # finished runs need nothing but what they have written
        assert run(folder / "out", tiny_model, "--corpus", str(text), "--parts", "tasks") == 0  # shows the others, too
        assert {path: path.stat().st_mtime_ns for path in (folder / "out/cells").iterdir()} == made
    return folder / "out"


def test_every_table_and_figure_is_written(out: Path) -> None:
    figures = {
        f"{name}.{kind}" for name in ("momentum", "losses", "learned_eta", "intervention") for kind in ("png", "pdf")
    }
    tables = {"README.md", "runs.csv", "differences.csv", "intervention.csv", "learned_eta.csv"}
    assert {path.name for path in out.iterdir()} == {*figures, *tables, "cells", "models"}
    page = (out / "README.md").read_text()
    for shown in (
        "perplexity, val 128",
        "perplexity, val 256",
        "perplexity, val 512",
        "accuracy after 15",
        "| vanilla",
    ):
        assert shown in page
    assert "nan" not in page
    assert "python analyses/momentum.py --corpus lines.txt --etas 0.0 learned --curve 0.5" in page
    assert str(out) not in page


def test_runs_are_those_of_the_cells(out: Path) -> None:
    frame = pd.read_csv(out / "runs.csv", dtype={"eta": str})
    for path in (out / "cells").glob("*_eta*_seed?.json"):
        cell = json.loads(path.read_text())
        data = "text" if "perplexity" in cell else "label mapping"
        chosen = frame.query(
            "data == @data and eta == @eta and seed == @seed",
            local_dict=None,
            global_dict={"data": data, "eta": str(cell["eta"]), "seed": cell["seed"]},
        )
        expected = cell.get("perplexity", {}).values() if data == "text" else cell["accuracy"]
        assert chosen["value"].tolist() == pytest.approx(list(expected))
        assert len(cell["etas"]) == 1
    assert len(list((out / "cells").glob("*_eta*_seed?.json"))) == 2 * (2 * 2 + 1)


def test_figures_are_drawn_again_from_the_tables_alone(
    out: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("lines.txt_etalearned_seed?.json")]
    means: Any = np.mean([cell["etas"] for cell in cells], axis=0)
    for path in out.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    drawn: list[Any] = []
    draw = icl.plots.heads
    monkeypatch.setattr(icl.plots, "heads", lambda values, **options: drawn.append(values) or draw(values, **options))
    assert script.main(["--redraw", "--model", tiny_model, "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == {"momentum", "intervention", "learned_eta"}
    np.testing.assert_allclose(drawn[0].mean(0), means, rtol=1e-5)


def test_tasks_of_which_no_prompt_fits_are_left_out(out: Path) -> None:
    measures = set(pd.read_csv(out / "runs.csv")["measure"])
    assert {"Subj accuracy after 0", "Subj accuracy after 1"} <= measures
    assert "Subj accuracy after 9" not in measures


def test_differences_are_students_over_seeds() -> None:
    rng = np.random.default_rng(0)
    values = {(eta, seed): rng.normal() for eta in (0.0, 0.1, "learned") for seed in range(5)}
    values[0.5, 0] = 1.0
    rows = [("text", eta, seed, "perplexity, val 8", value) for (eta, seed), value in values.items()]
    frame = pd.DataFrame(rows, columns=["data", "eta", "seed", "measure", "value"])
    found = {one["eta"]: one for one in momentum_tables.differences(frame).to_dict("records")}
    for eta in (0.1, "learned"):
        ours, vanilla = (np.array([values[one, seed] for seed in range(5)]) for one in (eta, 0.0))
        test = stats.ttest_rel(ours, vanilla)
        low, high = test.confidence_interval(0.95)
        assert (found[eta]["difference"], found[eta]["low"], found[eta]["high"], found[eta]["p"]) == pytest.approx(
            (np.mean(ours - vanilla), low, high, test.pvalue)
        )
    assert np.isnan(found[0.0]["difference"])
    assert found[0.5]["difference"] == pytest.approx(1.0 - values[0.0, 0])
    assert np.isnan(found[0.5]["low"])


@pytest.mark.parametrize(
    ("difference", "p", "better", "said"),
    [(-1.0, 0.01, -1, "better"), (-1.0, 0.01, 1, "worse"), (1.0, 0.01, 1, "better"), (-1.0, 0.04, 1, "no difference")],
)
def test_a_verdict_counts_how_many_are_asked(difference: float, p: float, better: int, said: str) -> None:
    one = {"difference": difference, "p": p, "seeds": 5}
    assert momentum_tables.verdict(one, better, 2).startswith(said)
    assert momentum_tables.verdict({**one, "seeds": 4}, better, 2) == "too few seeds to tell"


def test_a_cell_of_other_settings_is_refused(out: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(out, tiny_model) == 1  # of the presets as they are
    assert re.search(
        r"^error: expected a result made with preset=.*, got .*, made with preset=",
        capsys.readouterr().err,
        re.MULTILINE,
    )


def test_without_momentum_nothing_is_compared_with_itself() -> None:
    cell = {"task": "sst2", "k": 2, "label_counts": [3, 3], "right": [1, 0, 1, 0, 1, 0]}
    assert momentum_tables.added({"intervention": [{**cell, "eta": 0.3}]})["paired"].tolist() == [None]
    both = momentum_tables.added({"intervention": [{**cell, "eta": 0.3}, {**cell, "eta": 0.0, "right": [0] * 6}]})
    assert both["paired"].tolist()[0].difference.value == 0.5
