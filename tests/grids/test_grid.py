import itertools
from typing import Any

import pytest
from grid_cells import grid_of

import icl_dual as icl
from icl_dual.grids import Grid, GridError


def test_a_grid_is_every_combination_with_and_without_each_control() -> None:
    controls: dict[str, dict[str, Any]] = {
        "flipped": {"context": "flipped labels"},
        "untrained": {"weights": "untrained"},
    }
    grid = Grid(
        models=["a/x", "b/y"],
        tasks=["sst2", "mr"],
        k={"sst2": [2, 4], "mr": 3},
        seeds=[1, 2],
        rates={"sst2": 0.1, "mr": [0.01, 0.001]},
        protocols=["answer", "reference"],
        precision=["float32", "bfloat16 storage, float32 arithmetic"],
        controls=controls,
    )
    expected = set()
    for model, seed, protocol in itertools.product(("a/x", "b/y"), (1, 2), ("answer", "reference")):
        for task, k, lr in (("sst2", 2, 0.1), ("sst2", 4, 0.1), ("mr", 3, 0.01), ("mr", 3, 0.001)):
            for settings in ({}, *controls.values()):
                axes: dict[str, Any] = {"k": k, "seed": seed, "lr": lr, "protocol": protocol}
                cell = icl.Cell(model, task, **axes, **settings)
                expected |= {(cell.name, cell), (f"{cell.name}_bfloat16-storage-float32-arithmetic", cell)}
    assert {(cell.id, cell.cell) for cell in grid.cells()} == expected
    assert len(grid.cells()) == len(expected) == 192


def test_cells_that_share_a_model_are_neighbours_and_controls_follow_their_cell() -> None:
    grid = grid_of(
        models=["a", "b"], controls={"flipped": {"context": "flipped labels"}, "none": {"weights": "untrained"}}
    )
    cells = grid.cells()
    assert len(list(itertools.groupby(cells, key=lambda cell: cell.group))) == len({cell.group for cell in cells})
    trained = [cell.control for cell in cells if cell.cell.weights == "trained"]
    assert trained == ["plain", "flipped"] * 4


def test_ids_are_the_names_of_cells_and_do_not_depend_on_the_rest_of_the_grid() -> None:
    small, large = grid_of(), grid_of(seeds=[3, 2, 1], rates=[0.1, 0.01], controls={})
    assert [cell.id for cell in small.cells()] == [cell.cell.name for cell in small.cells()]
    plain = {cell.id: cell.cell for cell in small.cells() if cell.control == "plain"}
    assert plain.items() <= {cell.id: cell.cell for cell in large.cells()}.items()


def test_two_cells_of_one_id_are_refused() -> None:
    with pytest.raises(GridError, match=r"two with 'tiny_films_k2_seed1_lr0.01_answer' \('plain' and 'few'\)") as error:
        grid_of(controls={"few": {"n_queries": 2}})
    assert "which differ in n_queries alone" in str(error.value)
    with pytest.raises(GridError, match="which have the same settings"):
        grid_of(controls={"same": {"k": 2}})


def test_everything_impossible_is_reported_at_once() -> None:
    with pytest.raises(GridError) as error:
        grid_of(
            controls={
                "both": {"context": "flipped labels", "context_task": "mr"},
                "unknown": {"contxt": "own"},
                "typed": {"finetuning": {"epochs": 2, "lora": {"rnk": 3}}},
            },
            device="tpu",
            k={"flms": 2},
        )
    text = str(error.value)
    for part in ("did you mean 'context'?", "did you mean 'rank'?", "device as one of cpu", "got 'flms'"):
        assert part in text
    with pytest.raises(GridError, match="change one thing in a cell"):
        grid_of(controls={"both": {"context": "flipped labels", "context_task": "mr"}})
    with pytest.raises(GridError, match="batch_size of at most the number of demonstrations"):
        grid_of(finetuning=icl.FinetuneConfig(batch_size=3))


def test_a_grid_names_a_device_that_models_can_be_loaded_to() -> None:
    assert grid_of(device="cuda:1").device == "cuda:1"
    with pytest.raises(GridError, match="expected device as one of cpu, cuda, got 'mps'"):
        grid_of(device="mps")


def test_another_task_in_context_may_be_given_by_task() -> None:
    grid = grid_of(tasks=["sst2", "mr"], controls={"other": {"context_task": {"sst2": "mr", "mr": "sst2"}}})
    others = {(cell.cell.task, cell.cell.context_task) for cell in grid.cells() if cell.control == "other"}
    assert others == {("sst2", "mr"), ("mr", "sst2")}
