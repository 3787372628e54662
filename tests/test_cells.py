"""A cell's settings, and the name of its folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.arguments import ArgumentError
from icl_dual.cells import LONGEST_NAME, folder_name

CELL = icl.Cell(model="llama", task="toy", k=3, seed=1, lr=0.5, n_queries=5, source="rows.csv")


@pytest.mark.parametrize(
    "settings",
    [
        {"k": np.int64(3), "seed": np.uint8(1), "lr": np.float32(0.5), "n_queries": np.int32(5)},
        {"k": torch.tensor(3), "lr": torch.tensor(0.5, dtype=torch.float64)},
        {"model": Path("llama"), "task": Path("toy"), "source": Path("rows.csv"), "balanced": np.False_},
    ],
)
def test_scalars_and_paths_become_what_json_can_hold(settings: dict[str, Any]) -> None:
    cell = dataclasses.replace(CELL, **settings)
    assert cell == CELL
    assert cell.name == CELL.name
    assert icl.Cell.from_settings(json.loads(json.dumps(dataclasses.asdict(cell)))) == CELL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": "3"}, r"expected k as a whole number .*, got '3'"),
        ({"k": 2.5}, "expected k as a whole number"),
        ({"k": 0}, "expected k as a whole number of at least 1, got 0"),
        ({"k": True}, r"expected k as a whole number .*, got True"),
        ({"seed": None}, r"expected seed as a whole number .*, got None"),
        ({"lr": "0.1"}, r"expected lr as a number .*, got '0.1'"),
        ({"lr": 0.0}, r"expected lr as a number above 0 .*, got 0\.0"),
        ({"lr": float("nan")}, r"expected lr as a number above 0 .*, got nan"),
        ({"model": None}, "expected model as text or a path, got None"),
        ({"source": 3}, "expected source as"),
        ({"finetuning": {"loss": "label"}}, "expected finetuning as an instance of icl_dual.FinetuneConfig"),
        *(
            ({name: "other"}, rf"expected {name} as .*'.*', got 'other'")
            for name in ("protocol", "split", "weights", "context", "finetuned_on", "delta", "scoring")
        ),
    ],
)
def test_settings_of_other_types_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(CELL, **settings)


def test_settings_of_a_newer_version_are_refused_by_name() -> None:
    settings = dataclasses.asdict(CELL)
    with pytest.raises(icl.StudyError, match=r"got 'later', 'newer', perhaps of a newer version: install"):
        icl.Cell.from_settings({**settings, "newer": 1, "finetuning": {**settings["finetuning"], "later": 2}})


@example("\ud800", False)
@given(st.text(st.characters() | st.sampled_from('./\\\0\n :*?"<>|'), max_size=400), st.booleans())
def test_every_name_is_that_of_one_folder_inside_another(name: str, is_long: bool) -> None:
    folder = folder_name(name * 50 if is_long else name)
    inside = Path("/study") / folder
    assert inside.parent == Path("/study")
    assert inside.name == folder
    assert not folder.startswith(".")
    assert 0 < len(folder.encode()) <= LONGEST_NAME
    assert not set(folder) & set('/\\\0\n:*?"<>|')
    assert not folder.endswith((".", " "))


def test_long_names_are_told_apart_and_keep_their_end() -> None:
    cells = [dataclasses.replace(CELL, model=f"/{'folder/' * 60}{name}", lr=lr) for name in "ab" for lr in (0.1, 0.2)]
    cells += [dataclasses.replace(CELL, model=f"/{'other/' * 60}a", lr=0.1)]
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert names[0].endswith("--a_toy_k3_seed1_lr0.1_answer")
    assert all(len(name.encode()) == LONGEST_NAME for name in names)
    assert folder_name("é" * 200).endswith("é" * 90), "cut between characters"


def test_settings_of_version_0_1_are_those_of_one_finetuning_without_replicas() -> None:
    settings = {"model": "m", "task": "t", "k": 1, "seed": 1, "lr": 0.1, "method": "full-batch"}
    cell = icl.Cell.from_settings(settings)
    assert cell.replicas == 0
    assert cell.finetuning == icl.FinetuneConfig(method="full-batch")


def test_the_folder_of_an_older_version_is_the_cells_where_it_is_there(tmp_path: Path) -> None:
    hidden = dataclasses.replace(CELL, model="./llama")
    long = dataclasses.replace(CELL, model=f"{'m' * 190}")
    colon = dataclasses.replace(CELL, model="C:llama")
    for cell, older in (
        (colon, "C:llama_toy_k3_seed1_lr0.5_answer"),
        (hidden, ".--llama_toy_k3_seed1_lr0.5_answer"),
        (long, f"{'m' * 190}_toy_k3_seed1_lr0.5_answer"),
    ):
        assert cell.folder_in(tmp_path) == tmp_path / cell.name
        assert cell.name != older
        (tmp_path / older).mkdir()
        assert cell.folder_in(tmp_path) == tmp_path / older
        (tmp_path / cell.name).mkdir()
        assert cell.folder_in(tmp_path) == tmp_path / cell.name
    assert CELL.folder_in(tmp_path) == tmp_path / "llama_toy_k3_seed1_lr0.5_answer"
    assert dataclasses.replace(CELL, model="m" * 5000).folder_in(tmp_path).parent == tmp_path
