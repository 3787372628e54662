import dataclasses
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import released
import torch

import icl_dual as icl

study = sys.modules["icl_dual.study"]
CELL = icl.Cell(model="llama", task="toy", k=3, seed=1, lr=0.05, n_queries=5)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, llama: icl.Model, task: icl.Task, reference_task: icl.Task) -> list[str]:
    """Make the tiny model and the toy task known by name; lists what is loaded."""
    loaded: list[str] = []

    def load_model(name: str, **kwargs: object) -> icl.Model:
        loaded.append(name)
        return llama

    monkeypatch.setattr(study, "load_model", load_model)
    tasks = {"answer": task, "reference": reference_task}
    monkeypatch.setattr(study, "load_task", lambda name, source, *, protocol: tasks[protocol])
    return loaded


def test_a_cell_is_what_its_stages_give_and_says_where_it_came_from(
    llama: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    result = icl.run_cell(llama, task, CELL, tmp_path / "cell", progress=False)
    prompts = icl.build_prompts(llama, task, task.demonstrations(3, 1), task.queries(5))
    delta = icl.finetune(llama, prompts, lr=0.05, progress=False)
    with delta.applied(llama):
        ft = icl.capture(llama, prompts.zero_shot(), progress=False)
    expected = icl.compare(
        icl.capture(llama, prompts.zero_shot(), progress=False),
        icl.capture(llama, prompts, progress=False),
        ft,
        delta,
        seed=1,
    )
    for metric, values in expected.per_layer.items():
        torch.testing.assert_close(result.comparison.per_layer[metric], values, equal_nan=True)
    assert result.cell == CELL
    provenance = result.provenance
    assert provenance["losses"] == pytest.approx(delta.losses.tolist())
    assert provenance["demonstrations"] == [example.key for example in task.demonstrations(3, 1)]
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["model"] == llama.provenance
    assert set(provenance["seconds"]) == {"ICL", "ZSL", "finetuning", "FT", "metrics"}
    assert 0 < provenance["attention_residual"] < 1e-5


def test_a_cells_frame_is_tidy(llama: icl.Model, task: icl.Task, tmp_path: Path) -> None:
    frame = icl.run_cell(llama, task, CELL, tmp_path / "cell", progress=False).to_frame()
    keys = ["model", "task", "k", "seed", "lr", "protocol", "metric", "layer", "value", "n"]
    assert list(frame.columns) == keys
    assert set(frame["protocol"]) == {"answer"}
    assert not frame.duplicated(keys[:8]).any()


def test_complete_cells_are_read_without_model_or_task(known: list[str], tmp_path: Path) -> None:
    cells = [CELL, dataclasses.replace(CELL, seed=2)]
    first = icl.run_study(cells, tmp_path, progress=False)
    assert known == ["llama"]
    again = icl.run_study(cells, tmp_path, progress=False)
    assert known == ["llama"]
    for one, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one.to_frame(), other.to_frame())


def test_a_stopped_study_keeps_its_finished_cells_and_goes_on(
    known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [dataclasses.replace(CELL, seed=seed) for seed in (1, 2, 3)]
    compare = study.compare

    def stop_at_the_second(*args: object, seed: int, **kwargs: object) -> icl.Comparison:
        if seed == 2:
            raise KeyboardInterrupt
        return compare(*args, seed=seed, **kwargs)

    monkeypatch.setattr(study, "compare", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        icl.run_study(cells, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [cells[0].name]
    monkeypatch.setattr(study, "compare", compare)
    stamp = (tmp_path / cells[0].name).stat().st_mtime_ns
    assert len(icl.run_study(cells, tmp_path, progress=False)) == 3
    assert (tmp_path / cells[0].name).stat().st_mtime_ns == stamp


def test_other_settings_are_refused_and_named(known: list[str], tmp_path: Path) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    other = dataclasses.replace(CELL, n_queries=6, balanced=True)
    with pytest.raises(icl.StudyError, match=r"n_queries=5 \(wanted 6\), balanced=False \(wanted True\)"):
        icl.run_study([other], tmp_path, progress=False)


def test_other_weights_under_the_same_name_are_refused(
    known: list[str], llama: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    monkeypatch.setattr(llama, "provenance", "sha256:other")
    with pytest.raises(icl.StudyError, match=r"model='unknown' \(wanted 'sha256:other'\)"):
        icl.run_study([CELL, dataclasses.replace(CELL, seed=2)], tmp_path, progress=False)


def test_cells_that_would_share_a_folder_are_refused(known: list[str], tmp_path: Path) -> None:
    with pytest.raises(icl.StudyError, match="two that would share a folder"):
        icl.run_study([CELL, dataclasses.replace(CELL, balanced=True)], tmp_path, progress=False)
    assert len(icl.run_study([CELL, CELL], tmp_path, progress=False)) == 1


def test_another_dtype_is_refused_also_without_a_model(known: list[str], tmp_path: Path) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    with pytest.raises(icl.StudyError, match=r"dtype='float32' \(wanted 'float64'\)"):
        icl.run_study([CELL], tmp_path, dtype=torch.float64, progress=False)


def test_a_folder_of_something_else_is_refused(llama: icl.Model, prompts: icl.Prompts, tmp_path: Path) -> None:
    icl.finetune(llama, prompts, lr=0.05, progress=False).save(tmp_path / "delta")
    with pytest.raises(icl.StudyError, match="expected a finished cell in"):
        icl.load_cell(tmp_path / "delta")


def test_a_damaged_cell_says_so(known: list[str], tmp_path: Path) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    (tmp_path / CELL.name / "metadata.json").write_text(json.dumps({})[:-1])
    with pytest.raises(icl.AssetError, match="Delete the folder to have it made again"):
        icl.run_study([CELL], tmp_path, progress=False)


def test_cells_of_another_model_or_task_are_refused(llama: icl.Model, task: icl.Task, tmp_path: Path) -> None:
    with pytest.raises(
        icl.StudyError, match=r"expected .*\('gpt2', 'toy', 'answer'\), got \('llama', 'toy', 'answer'\)"
    ):
        icl.run_cell(llama, task, dataclasses.replace(CELL, model="gpt2"), tmp_path / "cell", progress=False)


def test_a_reference_cell_says_so_and_keeps_what_it_was_computed_from(known: list[str], tmp_path: Path) -> None:
    cell = dataclasses.replace(CELL, protocol="reference", n_queries=None)
    (result,) = icl.run_study([cell], tmp_path, keep_recordings=True, progress=False)
    assert set(result.to_frame()["protocol"]) == {"reference"}
    assert result.cell.name.endswith("_reference")
    assert len(result.comparison.gold) > 20, "all there are"
    assert result.provenance["k_in_context"] == 3
    assert result.recordings().metadata["settings"] == dataclasses.asdict(cell)
    again = icl.compare_recordings(result.recordings(), seed=cell.seed)
    for metric, values in result.comparison.per_layer.items():
        assert torch.equal(again.per_layer[metric].nan_to_num(), values.nan_to_num()), metric


def test_a_cell_without_the_recordings_wanted_is_run_again(known: list[str], tmp_path: Path) -> None:
    (first,) = icl.run_study([CELL], tmp_path, progress=False)
    with pytest.raises(icl.StudyError, match="run it with keep_recordings=True"):
        first.recordings()
    with pytest.raises(icl.StudyError, match="run it with keep_recordings=True"):
        icl.export_recordings(first, tmp_path / "out")
    (again,) = icl.run_study([CELL], tmp_path, keep_recordings=True, progress=False)
    pd.testing.assert_frame_equal(first.to_frame(), again.to_frame())
    assert len(again.recordings().gold) == 5
    assert known == ["llama", "llama"]
    icl.run_study([CELL], tmp_path, progress=False)
    icl.run_study([CELL], tmp_path, keep_recordings=True, progress=False)
    assert known == ["llama", "llama"], "complete both ways"


def test_recordings_wanted_do_not_overwrite_a_cell_of_other_settings(known: list[str], tmp_path: Path) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    with pytest.raises(icl.StudyError, match=r"n_queries=5 \(wanted 6\)"):
        icl.run_study([dataclasses.replace(CELL, n_queries=6)], tmp_path, keep_recordings=True, progress=False)


def test_cells_export_recordings_that_give_the_same_numbers(known: list[str], tmp_path: Path) -> None:
    cells = [dataclasses.replace(CELL, protocol="reference", seed=seed) for seed in (1, 2)]
    results = icl.run_study(cells, tmp_path / "cells", keep_recordings=True, progress=False)
    icl.export_recordings(results, tmp_path / "all", progress=False)
    icl.export_recordings(results[1], tmp_path / "one", progress=False)
    folders = [*(tmp_path / "all" / cell.name for cell in cells), tmp_path / "one"]
    for result, folder in zip([*results, results[1]], folders, strict=True):
        expected = released.scores(folder)
        found = icl.load_recordings(folder, progress=False)
        assert found.metadata["settings"] == dataclasses.asdict(result.cell)
        for name, values in icl.compare_recordings(found).released().items():
            if name in expected:
                assert values == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name
                assert result.comparison.released()[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True)


def test_the_other_protocols_task_is_refused(llama: icl.Model, task: icl.Task, tmp_path: Path) -> None:
    with pytest.raises(icl.StudyError, match=r"'reference'\), got .*'answer'\)"):
        icl.run_cell(llama, task, dataclasses.replace(CELL, protocol="reference"), tmp_path / "cell", progress=False)


def test_names_tell_cells_apart_and_are_plain_folders() -> None:
    hub = icl.Cell(model="openai-community/gpt2", task="sst2", k=32, seed=1, lr=1e-4)
    assert hub.name == "openai-community--gpt2_sst2_k32_seed1_lr0.0001_answer"
