import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import released
import torch
from grid_cells import save_tiny
from helpers import make_rows, saved_metadata

import icl_dual as icl
from icl_dual import study
from icl_dual.contexts import Context
from icl_dual.finetuning import Finetuned, Noise, replicas
from icl_dual.finetuning.config import Method, Trained
from icl_dual.models import Control
from icl_dual.storage import load_tensors, save_tensors
from icl_dual.tasks import Protocol
from icl_dual.torch_utils import lost_device

CELL = icl.Cell(model="llama", task="toy", k=3, seed=1, lr=0.05, n_queries=5, replicas=0)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, llama: icl.Model, task: icl.Task, reference_task: icl.Task) -> list[str]:
    """Make the tiny model and the toy task known by name; lists what is loaded."""
    loaded: list[str] = []

    def load_model(name: str, **kwargs: object) -> icl.Model:
        loaded.append(name)
        return llama

    monkeypatch.setattr(study, "load_model", load_model)
    monkeypatch.setattr(study, "check_model_name", lambda name: None)
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
        zero_shot=icl.capture(llama, prompts.zero_shot(), progress=False),
        in_context=icl.capture(llama, prompts, progress=False),
        finetuned=ft,
        delta=delta,
        seed=1,
    )
    for metric, values in expected.per_layer.items():
        torch.testing.assert_close(result.comparison.per_layer[metric], values, equal_nan=True)
    assert result.cell == CELL
    provenance = result.provenance
    assert provenance["losses"] == pytest.approx(delta.losses.tolist())
    assert provenance["demonstrations"] == [example.key for example in task.demonstrations(3, 1)]
    assert provenance["versions"]["torch"] == version("torch")  # without the suffix of a CUDA build
    assert provenance["model"] == llama.provenance
    assert set(provenance["seconds"]) == {"ICL", "ZSL", "finetuning", "FT", "metrics"}
    assert 0 < provenance["attention_residual"] < 1e-5


def test_a_cell_of_a_model_with_momentum_has_its_name(llama: icl.Model, task: icl.Task, tmp_path: Path) -> None:
    with icl.momentum_attention(llama, 0.2) as model:
        with pytest.raises(icl.StudyError, match=r"got \('llama \+ momentum η=0.2', .* Cell\(model=model.name, …\)"):
            icl.run_cell(model, task, CELL, tmp_path / "cell", progress=False)
        cell = dataclasses.replace(CELL, model=model.name)
        result = icl.run_cell(model, task, cell, tmp_path / "cell", progress=False)
    assert result.provenance["momentum"] == [[0.2] * 4] * 3
    with pytest.raises(icl.StudyError, match=r"expected model, .*, got \('llama', .* and so must the cell's"):
        icl.run_cell(llama, task, cell, tmp_path / "other", progress=False)
    with pytest.raises(icl.StudyError, match=r"as it is loaded, got 'llama \+ momentum .* icl_dual.run_cell"):
        icl.run_study([cell], tmp_path / "study", progress=False)


def test_a_cells_frame_is_tidy(llama: icl.Model, task: icl.Task, tmp_path: Path) -> None:
    frame = icl.run_cell(llama, task, CELL, tmp_path / "cell", progress=False).to_frame()
    keys = ["model", "task", "k", "seed", "lr", "protocol", "variation", "metric", "layer"]
    assert list(frame.columns) == [*keys, "value", "low", "high", "spread", "n"]
    assert set(frame["protocol"]) == {"answer"}
    assert not frame.duplicated(keys).any()


def test_complete_cells_are_read_without_model_or_task(known: list[str], tmp_path: Path) -> None:
    cells = [CELL, dataclasses.replace(CELL, seed=2)]
    first = icl.run_study(cells, tmp_path, progress=False)
    assert known == ["llama"]
    again = icl.run_study(cells, tmp_path, progress=False)
    assert known == ["llama"]
    for before, after in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(before.to_frame(), after.to_frame())


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure\nCUDA kernel …"),
            icl.DeviceLostError,
            r"expected a device that computes .* got 'CUDA error: unspecified launch failure', .*in a new process",
        ),
    ],
)
def test_a_stopped_study_keeps_its_finished_cells_and_goes_on(
    known: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
    error: type[BaseException],
    message: str | None,
) -> None:
    cells = [dataclasses.replace(CELL, seed=seed) for seed in (1, 2, 3)]
    compare, seeds = icl.Experiment.compare, list[int]()

    def stop_at_the_second(experiment: icl.Experiment, *, seed: int) -> icl.Comparison:
        seeds.append(seed)
        if seed == 2:
            raise stop
        return compare(experiment, seed=seed)

    monkeypatch.setattr(icl.Experiment, "compare", stop_at_the_second)
    with pytest.raises(error, match=message):
        icl.run_study(cells, tmp_path, progress=False)
    assert seeds == [1, 2], "no cell is tried on a lost device"
    assert [path.name for path in tmp_path.iterdir()] == [cells[0].name]
    monkeypatch.setattr(icl.Experiment, "compare", compare)
    stamp = (tmp_path / cells[0].name).stat().st_mtime_ns
    assert len(icl.run_study(cells, tmp_path, progress=False)) == 3
    assert (tmp_path / cells[0].name).stat().st_mtime_ns == stamp


def test_a_device_that_is_lost_within_a_call_that_names_other_causes_is_named(
    known: list[str], llama: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`capture` says of an error in its check that the model does not run with its hooks."""

    def lose(*args: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(llama, "pass_residual", None)
    monkeypatch.setattr(llama.backend, "forward", lose)
    with pytest.raises(icl.DeviceLostError, match="got 'CUDA error: an illegal memory access was encountered'"):
        icl.run_study([CELL], tmp_path, progress=False)
    assert not (tmp_path / CELL.name).exists()


@pytest.mark.parametrize(
    ("message", "is_loss"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be …", True),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", True),
        ("CUDA error: unknown error", True),
        ("CUDA driver error: unknown error", True),
        ("HIP error: unknown error", True),
        ("CUDA error: invalid program counter", True),
        ("CUDA error: operation not supported on global/shared address space", True),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", False),
        ("unknown error", False),
        ("CUDA error: invalid argument", False),
        ("CUDA error: operation not supported", False),
    ],
)
def test_a_lost_device_is_told_by_its_message(message: str, is_loss: bool) -> None:
    error = RuntimeError(message)
    assert lost_device(error) is (error if is_loss else None)
    assert lost_device(ValueError(message)) is None


def test_the_first_loss_among_the_errors_that_led_to_one_is_named() -> None:
    """Later computations on the device fail, too; whether Python was told the cause or noted the context."""
    first, later = RuntimeError("CUDA error: device-side assert triggered"), RuntimeError("CUDA error: device is lost")
    error = ValueError("expected a cell that ends")
    error.__cause__, later.__context__ = later, first
    assert lost_device(error) is first
    assert lost_device(error, handled=first) is later
    first.__context__ = error
    assert lost_device(error) is first, "a circle ends"


def test_a_runner_of_cells_names_a_lost_device(
    known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(icl.Experiment, "compare", lose)
    with pytest.raises(icl.DeviceLostError, match=f"{CELL.name}: expected a device that computes"):
        study.CellRunner(progress=False).run(CELL, tmp_path / "cell")
    assert not (tmp_path / "cell").exists()


def test_a_device_that_was_lost_before_a_study_is_not_named_for_the_study_s_own_error(
    known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: object, **options: object) -> None:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            raise icl.DivergedError("expected finite weights, got nan")  # noqa: B904 - the context is what is tested

    monkeypatch.setattr(icl.Experiment, "compare", diverge)
    try:
        raise RuntimeError("CUDA error: unspecified launch failure")
    except RuntimeError:
        with pytest.raises(icl.DivergedError):  # the caller goes on with the CPU
            icl.run_study([CELL], tmp_path, progress=False)
        with pytest.raises(icl.DivergedError):
            study.CellRunner(progress=False).run(CELL, tmp_path / "cell")


def test_a_study_that_is_killed_loses_no_cell_and_ends_with_the_same_results(tmp_path: Path) -> None:
    script = Path(__file__).parent / "storage" / "study_kills.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "1", "1"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("each of ")[1].split()[0]) >= 4, "two for each of two cells"


def test_other_settings_are_refused_and_named(known: list[str], tmp_path: Path) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    other = dataclasses.replace(CELL, n_queries=6, balanced=True)
    with pytest.raises(
        icl.SettingsError, match=r"n_queries=6, balanced=True, got .* made with n_queries=5, balanced=False: "
    ):
        icl.run_study([other], tmp_path, progress=False)


def test_other_weights_under_the_same_name_are_refused(
    known: list[str], llama: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    monkeypatch.setattr(llama, "provenance", "sha256:other")
    with pytest.raises(icl.SettingsError, match=r"made with model='sha256:other', got .* made with model='unknown'"):
        icl.run_study([CELL, dataclasses.replace(CELL, seed=2)], tmp_path, progress=False)


def test_cells_that_would_share_a_folder_are_refused(known: list[str], tmp_path: Path) -> None:
    with pytest.raises(icl.StudyError, match="two that would share a folder"):
        icl.run_study([CELL, dataclasses.replace(CELL, balanced=True)], tmp_path, progress=False)
    assert len(icl.run_study([CELL, CELL], tmp_path, progress=False)) == 1


def test_models_are_loaded_by_a_device_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: icl.Task) -> None:
    cell, on_disk = dataclasses.replace(CELL, model=save_tiny(tmp_path / "tiny")), {"": "cpu", "model.layers.1": "disk"}
    maps: list[Any] = []

    def load(name: str, *, device_map: Any, **kwargs: Any) -> icl.Model:
        maps.append(device_map)
        return icl.load_model(name, device_map=device_map, **kwargs)

    monkeypatch.setattr(study, "load_model", load)
    tables = [
        icl.run_study([cell], tmp_path / name, tasks=[task], device_map=device_map, progress=False)[0].to_frame()
        for name, device_map in (("mapped", on_disk), ("plain", None))
    ]
    runner = study.CellRunner(tasks=[task], device_map=on_disk, progress=False)
    tables.append(runner.run(cell, tmp_path / "alone").to_frame())
    assert maps == [on_disk, None, on_disk]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    with pytest.raises(ValueError, match="expected device or device_map"):
        icl.run_study([cell], tmp_path / "both", tasks=[task], device="cpu", device_map="auto", progress=False)
    assert not (tmp_path / "both").exists()


def test_finished_cells_need_no_device(known: list[str], tmp_path: Path) -> None:
    (finished,) = icl.run_study([CELL], tmp_path, progress=False)
    (again,) = icl.run_study([CELL], tmp_path, device="cuda:99", progress=False)
    assert again.comparison == finished.comparison


def test_models_are_loaded_to_the_device_that_is_given(
    known: list[str], llama: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def load(name: str, *, device: Any = None, **_: Any) -> icl.Model:
        given.append(device)
        return llama

    monkeypatch.setattr(study, "load_model", load)
    device = torch.device("cpu")
    icl.run_study([CELL], tmp_path / "study", device=device, progress=False)
    study.CellRunner(device=device, progress=False).run(CELL, tmp_path / "cell")
    assert given == [device, device]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "expected device or device_map, got device='cpu' and device_map="),
        ({"device": "cuda:99"}, "expected a device that torch can use here, got 'cuda:99'"),
        ({"device_map": {"": "cpu", "model.layers.1": "cuda:99"}}, "expected a device that torch can use here, got"),
    ],
)
def test_devices_are_refused_before_a_model_is_loaded(
    known: list[str], tmp_path: Path, place: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        icl.run_study([CELL], tmp_path, progress=False, **place)
    with pytest.raises(ValueError, match=message):
        study.CellRunner(progress=False, **place)
    assert known == []
    assert list(tmp_path.iterdir()) == []


def test_another_arithmetic_is_refused_and_cells_without_a_precision_computed_in_their_dtype(
    known: list[str], tmp_path: Path
) -> None:
    (result,) = icl.run_study([CELL], tmp_path, progress=False)
    assert result.provenance["precision"] == "float32"
    path = result.folder / "metadata.json"
    metadata = saved_metadata(result.folder)
    del metadata["provenance"]["precision"]
    for saved in ({}, {"precision": "float32"}):
        metadata["provenance"] |= saved
        path.write_text(json.dumps(metadata))
        assert icl.run_study([CELL], tmp_path, progress=False)
        with pytest.raises(
            icl.SettingsError, match=r"precision='bfloat16 storage, float32 arithmetic', got .*'float32'"
        ):
            icl.run_study([CELL], tmp_path, dtype=torch.bfloat16, arithmetic=torch.float32, progress=False)


def test_another_dtype_is_refused_also_without_a_model(known: list[str], tmp_path: Path) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    with pytest.raises(icl.SettingsError, match=r"made with dtype='float64', got .* made with dtype='float32'"):
        icl.run_study([CELL], tmp_path, dtype=torch.float64, progress=False)


def test_a_folder_of_something_else_is_refused(llama: icl.Model, prompts: icl.Prompts, tmp_path: Path) -> None:
    icl.finetune(llama, prompts, lr=0.05, progress=False).save(tmp_path / "delta")
    with pytest.raises(icl.StudyError, match="expected a finished cell in"):
        icl.load_cell(tmp_path / "delta")


def test_a_damaged_cell_says_so(known: list[str], tmp_path: Path) -> None:
    icl.run_study([CELL], tmp_path, progress=False)
    (tmp_path / CELL.name / "metadata.json").write_text(json.dumps({})[:-1])
    with pytest.raises(icl.AssetError, match="delete the folder to have it made again"):
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
    with pytest.raises(icl.SettingsError, match=r"made with n_queries=6, got .* made with n_queries=5: "):
        icl.run_study([dataclasses.replace(CELL, n_queries=6)], tmp_path, keep_recordings=True, progress=False)


def test_cells_export_recordings_that_give_the_same_numbers(known: list[str], tmp_path: Path) -> None:
    cells = [dataclasses.replace(CELL, protocol="reference", seed=seed) for seed in (1, 2)]
    results = icl.run_study(cells, tmp_path / "cells", keep_recordings=True, progress=False)
    icl.export_recordings(results, tmp_path / "all", progress=False)
    icl.export_recordings(results[1], tmp_path / "one", progress=False)
    folders = [*(tmp_path / "all" / cell.name for cell in cells), tmp_path / "one"]
    for result, folder in zip([*results, results[1]], folders, strict=True):
        expected = released.scores(folder)
        recordings = icl.load_recordings(folder, progress=False)
        assert recordings.metadata["settings"] == dataclasses.asdict(result.cell)
        for name, values in icl.compare_recordings(recordings).released().items():
            if name in expected:
                assert values == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name
                assert result.comparison.released()[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True)


def test_the_other_protocols_task_is_refused(llama: icl.Model, task: icl.Task, tmp_path: Path) -> None:
    with pytest.raises(icl.StudyError, match=r"'reference'\), got .*'answer'\)"):
        icl.run_cell(llama, task, dataclasses.replace(CELL, protocol="reference"), tmp_path / "cell", progress=False)


def test_names_tell_cells_apart_and_are_plain_folders() -> None:
    hub = icl.Cell(model="openai-community/gpt2", task="sst2", k=32, seed=1, lr=1e-4)
    assert hub.name == "openai-community--gpt2_sst2_k32_seed1_lr0.0001_answer"


@pytest.fixture
def digits(known: list[str], monkeypatch: pytest.MonkeyPatch) -> icl.Task:
    """Another task known by name: its own template, texts and labels, more than the toy task has."""
    rows = [{"digit": f"digit {i}", "label": i % 3} for i in range(40)]
    made = icl.Task("digits", "Number: {digit} Class:", ("zero", "one", "two"), rows)
    load = study.load_task
    monkeypatch.setattr(
        study, "load_task", lambda name, source, **kwargs: made if name == "digits" else load(name, source, **kwargs)
    )
    return made


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a study runs, stage by stage: its captures by what stands in context, and its finetunings."""
    ran: list[str] = []
    capture, finetune = study.capture, study.finetune_with_replicas

    def counted_capture(model: icl.Model, prompts: icl.Prompts, **kwargs: Any) -> icl.Capture:
        ran.append("in context" if prompts.demonstrations else "zero-shot")
        return capture(model, prompts, **kwargs)

    def counted_finetune(*args: Any, **kwargs: Any) -> Finetuned:
        ran.append("finetuning")
        return finetune(*args, **kwargs)

    def counted_replicas(*args: Any, **kwargs: Any) -> Any:
        ran.append("replicas")
        return capture_replicas(*args, **kwargs)

    capture_replicas = study.capture_replicas
    monkeypatch.setattr(study, "capture", counted_capture)
    monkeypatch.setattr(study, "finetune_with_replicas", counted_finetune)
    monkeypatch.setattr(study, "capture_replicas", counted_replicas)
    return ran


def same_numbers(one: icl.CellResult, other: icl.CellResult) -> None:
    assert one.cell == other.cell
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), check_exact=True)


CELLS_OF_ONE_RUN: list[tuple[dict[str, Any], list[str]]] = [
    *[({"context": context}, ["in context"]) for context in get_args(Context) if context != "own"],
    ({"delta": "random"}, ["zero-shot"]),
    ({"finetuning": icl.FinetuneConfig(loss="label")}, ["finetuning", "zero-shot"]),
    ({"finetuning": icl.FinetuneConfig(method="layer-causal")}, ["finetuning", "zero-shot"]),
    ({"finetuning": icl.FinetuneConfig(trained="value")}, ["finetuning", "zero-shot"]),
    ({"lr": 0.01}, ["finetuning", "zero-shot"]),
    ({"context": "flipped labels", "finetuned_on": "context"}, ["finetuning", "in context", "zero-shot"]),
    ({"seed": 2}, ["finetuning", "in context", "zero-shot"]),
    ({"n_queries": 6, "seed": 3}, ["finetuning", "in context", "zero-shot", "zero-shot"]),
]


@pytest.mark.parametrize(("changed", "expected"), CELLS_OF_ONE_RUN)
def test_a_cell_runs_only_what_the_one_before_did_not_and_has_the_same_numbers(
    known: list[str], stages: list[str], tmp_path: Path, changed: dict[str, Any], expected: list[str]
) -> None:
    cell = dataclasses.replace(CELL, k=5, n_queries=3)  # which each control's draw does change
    other = dataclasses.replace(cell, **changed)
    first, second = icl.run_study([cell, other], tmp_path / "both", progress=False)
    whole = ["finetuning", "in context", "zero-shot", "zero-shot"]
    assert stages == whole + expected
    assert set(first.provenance["seconds"]) == {"ICL", "ZSL", "finetuning", "FT", "metrics"}
    assert len(second.provenance["seconds"]) == len(expected) + 1, "and the metrics"
    stages.clear()
    (alone,) = icl.run_study([other], tmp_path / "alone", progress=False)
    assert stages == whole
    same_numbers(second, alone)
    values, changed_to = (result.comparison.per_layer for result in (first, second))
    assert any(not torch.equal(values[name].nan_to_num(), changed_to[name].nan_to_num()) for name in values)


def test_a_study_returns_to_a_cells_runs_only_where_they_were_the_last(
    known: list[str], stages: list[str], tmp_path: Path
) -> None:
    """One of each kind is kept: after another seed's, all runs again."""
    cells = [CELL, dataclasses.replace(CELL, seed=2), dataclasses.replace(CELL, delta="random")]
    icl.run_study(cells, tmp_path, progress=False)
    again = ["finetuning", "in context", "zero-shot"]
    assert stages == [*again, "zero-shot", *again, *again]


def test_controls_share_the_runs_of_the_first_cell_also_after_one_another(
    known: list[str], stages: list[str], tmp_path: Path
) -> None:
    cells = [dataclasses.replace(CELL, n_queries=2, **changed) for changed in ({}, {"delta": "random"})]
    icl.run_study([*cells, dataclasses.replace(cells[0], context="flipped labels")], tmp_path, progress=False)
    assert stages == ["finetuning", "in context", "zero-shot", "zero-shot", "zero-shot", "in context"]


def test_a_context_control_is_compared_with_the_own_finetuning(
    known: list[str], llama: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    cell = dataclasses.replace(CELL, k=5, context="reordered")
    (result,) = icl.run_study([cell], tmp_path, progress=False)
    demonstrations, queries = task.demonstrations(5, 1), task.queries(5)
    prompts = icl.build_prompts(llama, task, demonstrations, queries)
    other = icl.build_prompts(llama, task, icl.relabel(demonstrations, "reordered", 2, seed=1), queries)
    steps = [prompts.demonstrations.index(tokens) for tokens in other.demonstrations]
    delta = icl.finetune(llama, prompts, lr=0.05, progress=False)
    with delta.applied(llama):
        ft = icl.capture(llama, prompts.zero_shot(), progress=False)
    zsl, in_context = (icl.capture(llama, one, progress=False) for one in (prompts.zero_shot(), other))
    expected = icl.compare(zero_shot=zsl, in_context=in_context, finetuned=ft, delta=delta, steps=steps, seed=1)
    assert steps != sorted(steps)
    for metric, values in expected.per_layer.items():
        torch.testing.assert_close(result.comparison.per_layer[metric], values, equal_nan=True)


def test_a_cell_finetuned_on_its_context_is_the_cell_of_those_demonstrations(
    known: list[str], llama: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    cell = dataclasses.replace(CELL, context="flipped labels", finetuned_on="context")
    (result,) = icl.run_study([cell], tmp_path, progress=False)
    flipped = icl.relabel(task.demonstrations(3, 1), "flipped labels", 2, seed=1)
    prompts = icl.build_prompts(llama, task, flipped, task.queries(5))
    delta = icl.finetune(llama, prompts, lr=0.05, progress=False)
    assert result.provenance["losses"] == pytest.approx(delta.losses.tolist())
    with delta.applied(llama):
        ft = icl.capture(llama, prompts.zero_shot(), progress=False)
    zsl, in_context = (icl.capture(llama, one, progress=False) for one in (prompts.zero_shot(), prompts))
    expected = icl.compare(zero_shot=zsl, in_context=in_context, finetuned=ft, delta=delta, seed=1)
    for metric, values in expected.per_layer.items():
        torch.testing.assert_close(result.comparison.per_layer[metric], values, equal_nan=True)


@pytest.mark.parametrize("control", get_args(Control))
def test_a_control_of_weights_is_another_model_and_says_so(
    known: list[str], llama: icl.Model, task: icl.Task, tmp_path: Path, control: Control
) -> None:
    cell = dataclasses.replace(CELL, weights=control)
    first, result = icl.run_study([CELL, cell], tmp_path / "study", progress=False)
    assert cell.model_name == f"llama ({control}, seed 1)"
    assert result.provenance["model"] == f"unknown, {control}, seed 1"
    assert first.provenance["model"] == "unknown"
    assert known == ["llama", "llama"]
    assert not torch.equal(first.comparison.per_layer["SimAOU"], result.comparison.per_layer["SimAOU"])
    made = icl.control_model(llama, control, seed=1)
    same_numbers(result, icl.run_cell(made, task, cell, tmp_path / "cell", progress=False))
    icl.run_study([CELL, cell], tmp_path / "study", progress=False)
    assert known == ["llama", "llama"], "complete"
    with pytest.raises(icl.StudyError, match=rf"expected .*'llama \({control}, seed 1\)'.*, got \('llama'"):
        icl.run_cell(llama, task, cell, tmp_path / "other", progress=False)


def test_each_seed_draws_weights_of_its_own(known: list[str], tmp_path: Path) -> None:
    cells = [dataclasses.replace(CELL, weights="untrained", seed=seed) for seed in (1, 2)]
    results = icl.run_study(cells, tmp_path, progress=False)
    assert [result.provenance["model"] for result in results] == [f"unknown, untrained, seed {seed}" for seed in (1, 2)]


def test_another_tasks_demonstrations_stand_in_context(
    known: list[str], digits: icl.Task, llama: icl.Model, task: icl.Task, stages: list[str], tmp_path: Path
) -> None:
    cell = dataclasses.replace(CELL, context_task="digits")
    first, result = icl.run_study([CELL, cell], tmp_path, keep_recordings=True, progress=False)
    assert stages[4:] == ["in context"]
    others = digits.demonstrations(3, 1)
    prompts = icl.build_prompts(llama, task, others, task.queries(5), demonstration_task=digits)
    in_context = icl.capture(llama, prompts, progress=False)
    assert torch.equal(result.comparison.predictions["ICL"], in_context.predictions)
    assert result.provenance["prefix_tokens"] == len(prompts.prefix) != first.provenance["prefix_tokens"]
    assert result.provenance["losses"] == first.provenance["losses"]
    for name in ("Kendall", "Kendall on keys", "Kendall by demonstration"):
        assert result.comparison.per_layer[name].isnan().all(), "nothing in context was finetuned on"
    assert result.comparison.per_layer["SimAOU"].isfinite().all()
    for name in ("ZSL", "FT"):
        assert torch.equal(result.comparison.label_log_probs[name], first.comparison.label_log_probs[name])
    again = icl.compare_recordings(result.recordings(), seed=1)
    for name, values in result.comparison.per_layer.items():
        assert torch.equal(again.per_layer[name].nan_to_num(), values.nan_to_num()), name


def test_another_context_task_than_the_cells_is_refused(
    digits: icl.Task, llama: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    cell = dataclasses.replace(CELL, context_task="digits")
    for wanted, got, message in (
        (cell, None, "expected the cell's context_task 'digits' as context_task=, got None"),
        (cell, task, "expected the cell's context_task 'digits' as context_task=, got 'toy'"),
        (CELL, digits, "expected the cell's context_task None as context_task=, got 'digits'"),
    ):
        with pytest.raises(icl.StudyError, match=message):
            icl.run_cell(llama, task, wanted, tmp_path / "cell", context_task=got, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_task": "toy"}, "expected another task as context_task, got the cell's own, 'toy': leave"),
        (
            {"context_task": "digits", "context": "reordered"},
            "expected context='own' and finetuned_on='own' with a context_task, got context='reordered'",
        ),
        ({"finetuned_on": "context"}, "expected finetuned_on='own' with context='own', got finetuned_on='context'"),
    ],
)
def test_a_cell_that_means_nothing_is_refused_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    cell = dataclasses.replace(CELL)
    for name, value in settings.items():
        object.__setattr__(cell, name, value)  # past the check of types that only tests have
    with pytest.raises(icl.StudyError, match=message):
        cell.__post_init__()


def test_a_cell_says_which_rows_stood_in_context(
    digits: icl.Task, llama: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    cells = {
        "own": (CELL, None),
        "flipped": (dataclasses.replace(CELL, context="flipped labels"), None),
        "other": (dataclasses.replace(CELL, context_task="digits"), digits),
    }
    contexts = {
        name: icl.run_cell(llama, task, cell, tmp_path / name, context_task=other, progress=False).provenance["context"]
        for name, (cell, other) in cells.items()
    }
    demonstrations = task.demonstrations(3, 1)
    assert contexts["own"] == [[example.key, example.label] for example in demonstrations]
    assert contexts["flipped"] == [[example.key, 1 - example.label] for example in demonstrations]
    assert contexts["other"] == [[example.key, example.label] for example in digits.demonstrations(3, 1)]


def test_controls_and_variants_have_names_and_folders_of_their_own(
    known: list[str], digits: icl.Task, tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        *({"weights": control} for control in get_args(Control)),
        *({"context": context} for context in get_args(Context) if context != "own"),
        {"context_task": "digits"},
        {"context": "shuffled labels", "finetuned_on": "context"},
        {"finetuning": icl.FinetuneConfig(loss="label")},
        *({"finetuning": icl.FinetuneConfig(method=method)} for method in get_args(Method) if method != "sgd"),
        *(
            {"finetuning": icl.FinetuneConfig(trained=trained)}
            for trained in get_args(Trained)
            if trained != "key-value"
        ),
        {"finetuning": icl.FinetuneConfig(optimiser="adam", epochs=2, batch_size=2)},
        {"delta": "random"},
        {"delta": "random", "finetuning": icl.FinetuneConfig(loss="label")},
        {"weights": "untrained", "context": "reordered"},
        {"scoring": "calibrated"},
    ]
    cells = [dataclasses.replace(CELL, k=2, n_queries=2, **changed) for changed in changes]
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(" " not in cell.name and "/" not in cell.name for cell in cells)
    assert cells[0].variation == {}
    for cell, changed in zip(cells, changes, strict=True):
        config = changed.get("finetuning", icl.FinetuneConfig())
        options = {name for name, value in vars(config).items() if value != getattr(icl.FinetuneConfig(), name)}
        assert set(cell.variation) == set(changed) - {"finetuning"} | options
    results = icl.run_study(cells, tmp_path, progress=False)
    assert [result.cell for result in results] == cells
    assert {path.name for path in tmp_path.iterdir()} == {cell.name for cell in cells}
    loaded = [icl.load_cell(tmp_path / cell.name) for cell in cells]
    assert [result.cell for result in loaded] == cells
    assert [result.comparison.scoring for result in loaded] == [cell.scoring for cell in cells]


REPLICAS_OF_ONE_RUN: list[tuple[dict[str, Any], list[str]]] = [
    ({"context": "flipped labels"}, ["in context"]),
    ({"delta": "random"}, ["zero-shot", "replicas"]),
    ({"lr": 0.01}, ["finetuning", "zero-shot", "replicas"]),
]


@pytest.mark.parametrize(("changed", "expected"), REPLICAS_OF_ONE_RUN)
def test_cells_share_replicas_as_they_share_their_finetuning(
    known: list[str], stages: list[str], tmp_path: Path, changed: dict[str, Any], expected: list[str]
) -> None:
    cell = dataclasses.replace(CELL, k=5, n_queries=3, replicas=2)
    other = dataclasses.replace(cell, **changed)
    results = icl.run_study([cell], tmp_path / "first", progress=False)
    stages.clear()
    both = icl.run_study([cell, other], tmp_path / "both", progress=False)
    assert stages == ["finetuning", "in context", "zero-shot", "zero-shot", "replicas", *expected]
    same_numbers(both[0], results[0])
    (alone,) = icl.run_study([both[1].cell], tmp_path / "alone", progress=False)
    same_numbers(both[1], alone)
    stability, first_stability = both[1].comparison.stability, both[0].comparison.stability
    assert stability is not None
    assert first_stability is not None
    assert list(stability.replicas) == both[1].provenance["replicas"]
    assert not stability.shifts["SimAOU"][:2].equal(first_stability.shifts["SimAOU"])


def test_a_cell_of_one_replica_is_refused_and_replicas_are_a_setting(known: list[str], tmp_path: Path) -> None:
    with pytest.raises(icl.StudyError, match="expected replicas as 0 for none, or at least 2, got 1"):
        dataclasses.replace(CELL, replicas=1)
    icl.run_study([CELL], tmp_path, progress=False)
    with pytest.raises(
        icl.SettingsError, match=r"expected a result made with replicas=2, got .*, made with replicas=0"
    ):
        icl.run_study([dataclasses.replace(CELL, replicas=2)], tmp_path, progress=False)


def test_a_cell_names_its_diverged_replicas(known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = {"near": (0.05, Noise(1)), "far": (1e6, Noise(2))}
    monkeypatch.setattr(replicas, "replica_settings", lambda lr, n: far)
    (result,) = icl.run_study([dataclasses.replace(CELL, replicas=2)], tmp_path, progress=False)
    assert result.provenance["replicas"] == ["near", "far"]
    assert "finetuning diverged at step" in result.provenance["diverged_replicas"][0]
    assert result.comparison.unstable
    assert "1 of 2 replicas of the finetuning diverged" in repr(result)
    assert icl.load_cell(result.folder).comparison.unstable == result.comparison.unstable


def test_a_random_delta_moves_as_far_as_the_finetuned_one(
    known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas: list[icl.WeightDelta] = []
    compare = icl.Experiment.compare

    def kept(experiment: icl.Experiment, *, seed: int) -> icl.Comparison:
        deltas.append(experiment.delta)
        return compare(experiment, seed=seed)

    monkeypatch.setattr(icl.Experiment, "compare", kept)
    first, second = icl.run_study([CELL, dataclasses.replace(CELL, delta="random")], tmp_path, progress=False)
    finetuned, random = deltas
    torch.testing.assert_close(random.W_V.flatten(1).norm(dim=1), finetuned.W_V.flatten(1).norm(dim=1))
    assert not torch.allclose(random.W_V, finetuned.W_V)
    assert torch.equal(first.comparison.label_log_probs["ICL"], second.comparison.label_log_probs["ICL"])
    assert not torch.equal(first.comparison.label_log_probs["FT"], second.comparison.label_log_probs["FT"])


def films(rows: list[dict[str, object]], protocol: Protocol = "answer") -> icl.Task:
    return icl.Task("my/films", "Review: {text} Verdict:", ("bad", "good"), rows, protocol=protocol)


MINE = dataclasses.replace(CELL, model="mine", task="my/films")


@pytest.fixture
def mine(make_model: Callable[..., icl.Model]) -> icl.Model:
    return make_model("llama", name="mine")


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing should be loaded")

    monkeypatch.setattr(study, "load_model", load)
    monkeypatch.setattr(study, "load_task", load)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_tasks_and_models_of_ones_own_run_in_a_study(mine: icl.Model, tmp_path: Path) -> None:
    (tmp_path / "films.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in make_rows()))
    task = icl.Task("my/films", "Review: {text} Verdict:", ("bad", "good"), tmp_path / "films.csv")
    cells = [MINE, dataclasses.replace(MINE, weights="untrained")]
    results = icl.run_study(cells, tmp_path / "study", tasks=[task], models=[mine], progress=False)
    assert {path.name for path in (tmp_path / "study").iterdir()} == {cell.name for cell in cells}
    assert results[0].cell == MINE
    assert results[0].provenance["task"] == task.fingerprint == films(make_rows()).fingerprint
    assert results[0].provenance["fingerprint"] == mine.fingerprint()
    assert results[1].provenance["fingerprint"] != mine.fingerprint()
    same_numbers(results[0], icl.run_cell(mine, task, MINE, tmp_path / "cell", progress=False))
    again = icl.run_study(cells, tmp_path / "study", tasks=[task], models=[mine], progress=False)
    for before, after in zip(results, again, strict=True):
        same_numbers(before, after)
    loaded = icl.run_study(cells, tmp_path / "study", progress=False)
    same_numbers(loaded[0], results[0])


@pytest.mark.usefixtures("nothing_is_loaded")
def test_other_rows_or_weights_under_a_name_passed_in_are_refused(
    mine: icl.Model, make_model: Callable[..., icl.Model], tmp_path: Path
) -> None:
    rows = make_rows()
    icl.run_study([MINE], tmp_path, tasks=[films(rows)], models=[mine], progress=False)
    with pytest.raises(
        icl.SettingsError, match=r"with task rows='[0-9a-f]{16}', got .* with task rows='[0-9a-f]{16}': "
    ):
        icl.run_study([MINE], tmp_path, tasks=[films(rows[1:])], progress=False)
    with pytest.raises(icl.SettingsError, match=r"made with dtype='float64', got .* made with dtype='float32'"):
        icl.run_study([MINE], tmp_path, models=[make_model("llama", torch.float64, name="mine")], progress=False)
    with torch.no_grad():
        next(mine.parameters()).add_(1.0)
    with pytest.raises(icl.SettingsError, match=r"fingerprint='float32:.*', got .* fingerprint='float32:"):
        icl.run_study([MINE], tmp_path, models=[mine], progress=False)


def test_other_rows_of_a_context_task_or_a_registered_task_are_refused(
    mine: icl.Model, task: icl.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows()
    toy = dataclasses.replace(MINE, task="toy", context_task="my/films")
    reviews = [row | {"text": f"review {row['text']}"} for row in rows]
    icl.run_study([toy], tmp_path, tasks=[task, films(reviews)], models=[mine], progress=False)
    with pytest.raises(
        icl.SettingsError, match=r"context_task rows='[0-9a-f]{16}', got .* context_task rows='[0-9a-f]{16}': "
    ):
        icl.run_study([toy], tmp_path, tasks=[task, films(reviews[1:])], progress=False)
    monkeypatch.setattr("icl_dual.paper_tasks._registered", {"my/films": films(reviews[1:])})
    with pytest.raises(
        icl.SettingsError, match=r"context_task rows='[0-9a-f]{16}', got .* context_task rows='[0-9a-f]{16}': "
    ):
        icl.run_study([toy], tmp_path, tasks=[task], progress=False)


def test_a_registered_task_runs_in_a_study(mine: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icl_dual.paper_tasks._registered", {})
    icl.register_task(lambda source, protocol: films(make_rows(), protocol), name="my/films")
    cells = [MINE, dataclasses.replace(MINE, protocol="reference", n_queries=None)]
    results = icl.run_study(cells, tmp_path, models=[mine], progress=False)
    assert [result.provenance["task"] for result in results] == [
        films(make_rows(), protocol).fingerprint for protocol in ("answer", "reference")
    ]


def test_a_model_with_momentum_runs_in_a_study_when_it_is_passed_in(
    llama: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    with icl.momentum_attention(llama, 0.2) as model:
        cell = dataclasses.replace(CELL, model=model.name)
        (result,) = icl.run_study([cell], tmp_path, tasks=[task], models=[model], progress=False)
    assert result.provenance["momentum"] == [[0.2] * 4] * 3


INVALID: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"task": "unknown"}, icl.TaskError, r"expected a task out of \['sst2', .*\], got 'unknown'"),
    ({"context_task": "unknown"}, icl.TaskError, r"expected a task out of \['sst2', .*\], got 'unknown'"),
    ({"model": "gtp2"}, icl.AssetError, "'gtp2'"),
    ({"model": "/nowhere/model"}, icl.AssetError, "'/nowhere/model'"),
    ({"k": 31}, icl.TaskError, "expected k from 0 to 30, the number of demonstrations, got 31"),
    ({"task": "skewed", "k": 20, "balanced": True}, icl.TaskError, "expected 10 demonstrations labelled 'yes'"),
    ({"n_queries": 25}, icl.TaskError, "expected from 1 to 24 evaluation queries, got 25"),
    ({"n_queries": 9, "split": "selection"}, icl.TaskError, "expected from 1 to 6 selection queries, got 9"),
    ({"reference_k_mismatch": True}, icl.StudyError, "expected reference_k_mismatch with protocol='reference' only"),
    ({"protocol": "reference"}, icl.StudyError, "'toy' with protocol='reference', got one with protocol='answer'"),
    ({"source": "hub"}, icl.StudyError, "expected source=None for tasks that are passed in .*, got source='hub'"),
    (
        {"context_task": "copy", "k": 12, "n_queries": 24},
        icl.StudyError,
        r"expected queries and demonstrations with different texts, got \d",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), INVALID)
def test_what_cannot_run_is_refused_before_a_model_is_loaded(
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changed: dict[str, Any],
    error: type[Exception],
    message: str | None,
) -> None:
    def load_model(*args: object, **kwargs: object) -> None:
        raise AssertionError("no model should be loaded")

    monkeypatch.setattr(study, "load_model", load_model)
    monkeypatch.setattr(study, "capture", load_model)
    good = dataclasses.replace(CELL, model="smollm2-135m")
    cells = [good, dataclasses.replace(good, **{"seed": 2, **changed})]
    words = ("no", "yes")
    copy = icl.Task("copy", "Text: {text} Label:", words, query_rows(task))
    skewed = icl.Task(
        "skewed", "Text: {text} Label:", words, [r | {"label": int(i < 3)} for i, r in enumerate(make_rows())]
    )
    with pytest.raises(error, match=message):
        icl.run_study(cells, tmp_path / "study", tasks=[task, copy, skewed], progress=False)
    assert not (tmp_path / "study").exists()


def query_rows(task: icl.Task) -> list[dict[str, object]]:
    """A task's queries, as rows of another task."""
    return [{**dict(example.fields), "label": example.label} for example in task.queries()]


def test_one_cell_task_or_model_in_place_of_a_list_is_refused(mine: icl.Model, task: icl.Task, tmp_path: Path) -> None:
    run: Any = icl.run_study
    with pytest.raises(icl.ArgumentError, match=r"expected cells as a list or tuple, got Cell.*: pass a list of it"):
        run(MINE, tmp_path)
    with pytest.raises(icl.ArgumentError, match=r"expected tasks as a list or tuple, got .*: pass a list of it"):
        run([MINE], tmp_path, tasks=task, models=[mine])
    with pytest.raises(icl.ArgumentError, match=r"expected models as a list or tuple, got .*: pass a list of it"):
        run([MINE], tmp_path, tasks=[task], models=mine)


def test_an_unknown_models_name_may_be_of_a_model_that_was_not_passed_in(task: icl.Task, tmp_path: Path) -> None:
    expected = (
        r"got 'mine': check its spelling, or its path, or pass a Model of this name as run_study\(models=\[model\]\)"
    )
    with pytest.raises(icl.AssetError, match=expected):
        icl.run_study([MINE], tmp_path, tasks=[task], progress=False)


def test_names_that_two_objects_share_and_files_for_folders_are_refused(
    mine: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    with pytest.raises(icl.StudyError, match=r"models of different names, got \['mine', 'mine'\]: name them"):
        icl.run_study([MINE], tmp_path, models=[mine, mine], progress=False)
    with pytest.raises(icl.StudyError, match=r"tasks of different names or protocols, got \[\('toy', 'answer'\), "):
        icl.run_study([MINE], tmp_path, tasks=[task, task], progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(icl.StudyError, match="expected a folder for the study, got the file"):
        icl.run_study([MINE], tmp_path / "file", progress=False)


def as_version_0_1(folder: Path) -> None:
    """Rewrite a cell's folder as version 0.1 wrote it: flat settings, no class, no fingerprints."""
    tensors, metadata = load_tensors(folder)
    settings = {name: value for name, value in metadata["settings"].items() if name != "finetuning"}
    settings |= metadata["settings"]["finetuning"]
    new = ("fingerprint", "task", "context_task")
    provenance = {name: value for name, value in metadata["provenance"].items() if name not in new}
    groups = ("per_layer/", "predictions/", "label_log_probs/")
    kept = {name: values for name, values in tensors.items() if name == "gold" or name.startswith(groups)}
    rec2ftp = metadata.get("rec2ftp") or REC2FTP_0_1
    shutil.rmtree(folder)
    save_tensors(folder, kept, {"rec2ftp": rec2ftp, "settings": settings, "provenance": provenance})


REC2FTP_0_1 = {"both": 1, "finetuned": 2, "random": 0.5}
"""Version 0.1's counts; predictions give the same ones."""


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("changed", [{}, {"finetuning": icl.FinetuneConfig(loss="label", trained="value")}])
def test_cells_of_the_version_before_are_complete(
    mine: icl.Model, task: icl.Task, tmp_path: Path, changed: dict[str, Any]
) -> None:
    cell = dataclasses.replace(MINE, task="toy", **changed)
    (expected,) = icl.run_study([cell], tmp_path, tasks=[task], models=[mine], progress=False)
    as_version_0_1(tmp_path / cell.name)
    settings = json.loads((tmp_path / cell.name / "metadata.json").read_text())["settings"]
    finetuning = cell.finetuning
    assert [settings[name] for name in ("loss", "method", "trained")] == [
        finetuning.loss,
        finetuning.method,
        finetuning.trained,
    ]
    assert "finetuning" not in settings
    stamp = (tmp_path / cell.name).stat().st_mtime_ns
    (result,) = icl.run_study([cell], tmp_path, progress=False)
    same_numbers(result, expected)
    (result,) = icl.run_study([cell], tmp_path, tasks=[task], models=[mine], progress=False)
    same_numbers(result, expected)
    assert (tmp_path / cell.name).stat().st_mtime_ns == stamp
    other = dataclasses.replace(cell, finetuning=icl.FinetuneConfig(method="full-batch"))
    (tmp_path / cell.name).rename(tmp_path / other.name)
    with pytest.raises(icl.SettingsError, match="finetuning="):
        icl.run_study([other], tmp_path, progress=False)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_control_of_a_model_with_other_provenance_is_refused(mine: icl.Model, tmp_path: Path) -> None:
    control = dataclasses.replace(MINE, weights="untrained")
    task = films(make_rows())
    icl.run_study([control], tmp_path, tasks=[task], models=[mine], progress=False)
    icl.run_study([control], tmp_path, tasks=[task], models=[mine], progress=False)
    mine.provenance = "sha256:other"
    with pytest.raises(icl.SettingsError, match=r"sha256:other, untrained, seed"):
        icl.run_study([control], tmp_path, tasks=[task], models=[mine], progress=False)


def test_a_registered_task_has_no_other_source(
    mine: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icl_dual.paper_tasks._registered", {"my/films": films(make_rows())})
    with pytest.raises(icl.TaskError, match="source"):
        icl.run_study([dataclasses.replace(MINE, source="other.csv")], tmp_path, models=[mine], progress=False)


def test_a_cell_of_unknown_options_is_no_cell(mine: icl.Model, tmp_path: Path) -> None:
    result = icl.run_cell(mine, films(make_rows()), MINE, tmp_path / "cell", progress=False)
    metadata = saved_metadata(result.folder)
    metadata["settings"]["finetuning"]["method"] = "adam"
    (result.folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(icl.StudyError, match=r"expected a finished cell in .*'adam'"):
        icl.load_cell(result.folder)


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "capture", lambda *args, **kwargs: pytest.fail("a model was run"))
    monkeypatch.setattr(study, "finetune_with_replicas", lambda *args, **kwargs: pytest.fail("a model was finetuned"))


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "the file": lambda folder: folder.write_text("mine"),
    "symbolic link": lambda folder: folder.symlink_to("nowhere"),
    "'notes.txt'": lambda folder: (folder.mkdir(), (folder / "notes.txt").write_text("mine")),
    "'sub/notes.txt'": lambda folder: ((folder / "sub").mkdir(parents=True), (folder / "sub/notes.txt").write_text("")),
}


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_is_in_the_way_of_a_cell_is_found_before_a_model_runs(
    mine: icl.Model, task: icl.Task, tmp_path: Path, name: str
) -> None:
    cell = dataclasses.replace(MINE, task="toy")
    IN_THE_WAY[name](tmp_path / cell.name)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(icl.AssetError, match=name):
        icl.run_cell(mine, task, cell, tmp_path / cell.name, progress=False)
    with pytest.raises(icl.AssetError):
        icl.run_study([cell], tmp_path, tasks=[task], models=[mine], progress=False)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_study_that_cannot_be_written_is_refused_before_a_model_runs(
    mine: icl.Model, task: icl.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = dataclasses.replace(MINE, task="toy")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file/study", "link", "n" * 300):
        with pytest.raises(icl.AssetError):
            icl.run_study([cell], tmp_path / name, tasks=[task], models=[mine], progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(icl.AssetError, match="free disk space"):
        icl.run_study([cell], tmp_path / "study", tasks=[task], models=[mine], progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_cell_is_not_replaced_by_one_of_other_settings_or_weights_nor_without_its_recordings(
    mine: icl.Model, make_model: Callable[..., icl.Model], task: icl.Task, tmp_path: Path
) -> None:
    cell, folder = dataclasses.replace(MINE, task="toy"), tmp_path / "cell"
    first = icl.run_cell(mine, task, cell, folder, keep_recordings=True, progress=False)
    with pytest.raises(icl.SettingsError, match=r"made with seed=2, lr=0.1, got .* made with seed=1, lr=0.05"):
        icl.run_cell(mine, task, dataclasses.replace(cell, seed=2, lr=0.1), folder, progress=False)
    other = make_model("llama", name="mine")
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(icl.SettingsError, match="fingerprint="):
        icl.run_cell(other, task, cell, folder, progress=False)
    with pytest.raises(icl.StudyError, match=r"expected keep_recordings=True for .*, which holds recordings"):
        icl.run_cell(mine, task, cell, folder, progress=False)
    same_numbers(icl.load_cell(folder), first)
    assert len(icl.load_cell(folder).recordings().gold) == 5
    same_numbers(icl.run_cell(mine, task, cell, folder, keep_recordings=True, progress=False), first)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_cell_does_not_replace_one_of_other_settings_that_finished_while_it_ran(
    mine: icl.Model, task: icl.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, folder, compare = dataclasses.replace(MINE, task="toy"), tmp_path / "cell", icl.Experiment.compare

    def slow_compare(experiment: icl.Experiment, **options: Any) -> icl.Comparison:
        monkeypatch.setattr(icl.Experiment, "compare", compare)
        icl.run_cell(mine, task, dataclasses.replace(cell, n_queries=3), folder, progress=False)
        return compare(experiment, **options)

    monkeypatch.setattr(icl.Experiment, "compare", slow_compare)
    with pytest.raises(icl.SettingsError, match=r"made with n_queries=5, got .*, made with n_queries=3"):
        icl.run_cell(mine, task, cell, folder, progress=False)
    assert len(icl.load_cell(folder).comparison.gold) == 3


@pytest.mark.usefixtures("nothing_is_loaded")
def test_results_of_other_kinds_and_cells_of_newer_versions_stop_no_study(
    mine: icl.Model, task: icl.Task, tmp_path: Path
) -> None:
    cell = dataclasses.replace(MINE, task="toy")
    first = icl.run_cell(mine, task, dataclasses.replace(cell, seed=9), tmp_path / "newer", progress=False)
    first.comparison.save(tmp_path / "comparison")
    path = tmp_path / "newer" / "metadata.json"
    saved = json.loads(path.read_text())
    del saved["sha256"]
    saved["settings"]["a_new_setting"] = 1
    path.write_text(json.dumps(saved))
    (result,) = icl.run_study([cell], tmp_path, models=[mine], tasks=[task], progress=False)
    assert result.cell == cell
    with pytest.raises(icl.StudyError, match="got 'a_new_setting', perhaps of a newer version"):
        icl.load_cell(tmp_path / "newer")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_settings_and_numbers_are_of_one_cell_where_its_folder_is_replaced_meanwhile(
    mine: icl.Model, task: icl.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, folder, from_settings = dataclasses.replace(MINE, task="toy"), tmp_path / "cell", icl.Cell.from_settings
    icl.run_cell(mine, task, cell, folder, progress=False)
    icl.run_cell(mine, task, dataclasses.replace(cell, n_queries=3), tmp_path / "other", progress=False)

    def replaced(settings: dict[str, Any]) -> icl.Cell:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "other", folder)
        return from_settings(settings)

    monkeypatch.setattr(icl.Cell, "from_settings", replaced)
    result = icl.load_cell(folder)
    assert len(result.comparison.gold) == result.cell.n_queries == 5


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_cell_does_not_replace_another_result(
    mine: icl.Model, llama: icl.Model, prompts: icl.Prompts, task: icl.Task, tmp_path: Path
) -> None:
    delta = icl.finetune(llama, prompts, lr=0.05, progress=False)
    delta.save(tmp_path)
    with pytest.raises(icl.StudyError, match="expected a finished cell in"):
        icl.run_cell(mine, task, dataclasses.replace(MINE, task="toy"), tmp_path, progress=False)
    assert icl.WeightDelta.load(tmp_path) == delta


@pytest.mark.usefixtures("known")
def test_a_model_of_a_long_path_runs_and_resumes(tmp_path: Path) -> None:
    cells = [dataclasses.replace(CELL, model=f"/{'folder/' * 40}{name}") for name in ("llama", "llama-2")]
    results = icl.run_study(cells, tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {cell.name for cell in cells}
    for before, after in zip(results, icl.run_study(cells, tmp_path, progress=False), strict=True):
        same_numbers(before, after)


@pytest.mark.usefixtures("known")
def test_settings_of_numpy_and_paths_are_saved_and_read(tmp_path: Path) -> None:
    cell = dataclasses.replace(CELL, k=np.int64(3), seed=np.int32(1), lr=np.float64(0.05), source=tmp_path / "rows.csv")
    (result,) = icl.run_study([cell], tmp_path / "study", progress=False)
    assert icl.load_cell(result.folder).cell == cell == dataclasses.replace(CELL, source=str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("task_name", ["x/../../../evil", "/absolute", "..", "C:\\evil", "a\0b"])
def test_recordings_are_exported_inside_their_folder_whatever_a_cells_metadata_says(
    known: list[str], tmp_path: Path, task_name: str
) -> None:
    cell = dataclasses.replace(CELL, protocol="reference", n_queries=2)
    (result,) = icl.run_study([cell], tmp_path / "study", keep_recordings=True, progress=False)
    metadata = saved_metadata(result.folder)
    metadata["settings"]["task"] = task_name
    (result.folder / "metadata.json").write_text(json.dumps(metadata))
    files = set(tmp_path.rglob("*"))
    icl.export_recordings([icl.load_cell(result.folder)], tmp_path / "export", progress=False)
    written = set(tmp_path.rglob("*")) - files
    assert len([path for path in written if path.name == "record_info.jsonl"]) == 4
    for path in written:
        assert (tmp_path / "export") in (path, *path.parents)
        assert len(path.relative_to(tmp_path).parts) <= 4


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", [f".{CELL.name}-k3_x91ab", f".{CELL.name}-k3_x91ab-old"])  # as version 0.2 named them
def test_scratch_folders_of_killed_runs_are_no_cells(tmp_path: Path, name: str) -> None:
    (result,) = icl.run_study([CELL], tmp_path, progress=False)
    scratch = tmp_path / name
    shutil.copytree(result.folder, scratch)
    metadata = saved_metadata(scratch)
    metadata["provenance"]["task"] = "another"
    (scratch / "metadata.json").write_text(json.dumps(metadata))
    icl.run_study([CELL, dataclasses.replace(CELL, seed=2)], tmp_path, progress=False)


@pytest.mark.usefixtures("known")
def test_weights_that_differ_from_those_of_saved_cells_are_refused_when_they_are_loaded(
    llama: icl.Model, tmp_path: Path
) -> None:
    (result,) = icl.run_study([CELL], tmp_path, progress=False)
    metadata = saved_metadata(result.folder)
    metadata["provenance"]["fingerprint"] = "float32:other"
    (result.folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(icl.SettingsError, match=r"fingerprint='float32:.*', got .* fingerprint='float32:other'"):
        icl.run_study([CELL, dataclasses.replace(CELL, seed=2)], tmp_path, progress=False)
