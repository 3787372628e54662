import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
from grid_cells import TASK, CopiedCells, change_version, content, grid_of, save_tiny, without_model_files

import icl_dual as icl
from icl_dual import study as study_module
from icl_dual.grids import Failure, Grid, GridError, Results, Worker, collect, files, plan, reset_failed, run_grid
from icl_dual.grids import results as results_module
from icl_dual.grids import worker as worker_module
from icl_dual.grids.claims import Claim, Claims, claimed
from icl_dual.grids.planning import MARGIN, Machine, PlannedCell, Resources, in_shard
from icl_dual.grids.results import installed_versions
from icl_dual.models import tiny_model

GRID = grid_of()
IDS = [cell.id for cell in GRID.cells()]


def test_a_workers_cells_are_those_of_a_study_and_its_model_is_loaded_once(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    monkeypatch.setattr(study_module, "check_model_name", lambda name: None)
    monkeypatch.setattr(study_module, "load_model", lambda name, **_: loads.append(name) or tiny_model())
    results = Results(tmp_path)
    worker = pickle.loads(pickle.dumps(Worker(GRID, results, tasks=[TASK])))
    assert [worker.run(cell_id).state for cell_id in IDS] == ["done"] * 4
    assert loads == ["tiny"]
    for cell_id in IDS:
        result = without_model_files(content(results.load(cell_id)))
        assert result == content(icl.load_cell(study / cell_id))
    assert claimed(results.files) == {}
    assert [worker.run(cell_id).state for cell_id in IDS] == ["already done"] * 4


def test_a_cell_that_raises_is_recorded_and_the_rest_goes_on(results: Results, copied: type[CopiedCells]) -> None:
    copied.failing = [IDS[1]]
    worker = Worker(GRID, results)
    outcomes = [worker.run(cell_id) for cell_id in IDS]
    assert [outcome.state for outcome in outcomes] == ["done", "failed", "done", "done"]
    assert outcomes[1].error.startswith("DivergedError: expected finite weights")
    assert "grid_cells.py" in outcomes[1].traceback
    assert results.failures()[IDS[1]].traceback == outcomes[1].traceback
    assert claimed(results.files) == {}
    status = results.status(GRID.cells())
    assert (status.failed, status.remaining, len(status.done)) == ((IDS[1],), (), 3)
    assert worker.run(IDS[1]).state == "failed"
    assert copied.runs.count(IDS[1]) == 1  # not run again by itself
    copied.failing = []
    assert reset_failed(GRID, results) == [IDS[1]]
    assert plan(GRID, results, models=["tiny"], tasks=["films"]).ids == [IDS[1]]
    assert worker.run(IDS[1]).state == "done"


def test_a_lost_device_ends_the_run_and_another_goes_on_at_once(
    local_results: Results, copied: type[CopiedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next cell is not tried in vain, and none counts as failed or as running."""
    run = copied.run

    def lose(self: CopiedCells, cell: icl.Cell, folder: Any) -> Any:
        if cell.name == IDS[1] and copied.runs.count(IDS[1]) == 0:
            copied.runs.append(cell.name)
            raise icl.DeviceLostError("expected a device that computes until the end, got 'CUDA error: …'")
        return run(self, cell, folder)

    monkeypatch.setattr(copied, "run", lose)
    with pytest.raises(icl.DeviceLostError, match="a device that computes"):
        run_grid(GRID, local_results, tasks=[TASK], models=[tiny_model()], progress=False)
    assert copied.runs == IDS[:2]
    assert {cell_id: info.number for cell_id, info in claimed(local_results.files).items()} == {IDS[1]: 0}
    status = local_results.status(GRID.cells())
    assert (status.done, status.failed, status.remaining) == ((IDS[0],), (), tuple(IDS[1:]))
    summary = run_grid(GRID, local_results, tasks=[TASK], models=[tiny_model()], progress=False)
    assert {outcome.state for outcome in summary.outcomes} == {"done"}
    assert copied.runs.count(IDS[0]) == 1
    assert claimed(local_results.files) == {}


def test_a_cell_that_loses_the_device_each_time_fails_and_the_others_run(
    local_results: Results, copied: type[CopiedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied.run

    def lose(self: CopiedCells, cell: icl.Cell, folder: Any) -> Any:
        if cell.name == IDS[1]:
            raise icl.DeviceLostError("expected a device") from RuntimeError("CUDA error: device-side assert triggered")
        return run(self, cell, folder)

    monkeypatch.setattr(copied, "run", lose)
    options: dict[str, Any] = {"tasks": [TASK], "models": [tiny_model()], "progress": False, "max_lost": 2}
    for _ in range(2):
        with pytest.raises(icl.DeviceLostError):
            run_grid(GRID, local_results, **options)
    summary = run_grid(GRID, local_results, **options)
    assert set(summary.done) == set(IDS[2:])
    assert r"got 2 workers lost in it, one after the other (CUDA error: device-side" in summary.failed[IDS[1]].error
    assert local_results.status(GRID.cells()).failed == (IDS[1],)
    assert claimed(local_results.files) == {}


def test_a_damaged_cell_is_made_again(results: Results, copied: type[CopiedCells]) -> None:
    worker = Worker(GRID, results)
    for cell_id in IDS:
        worker.run(cell_id)
    manifest = results.manifest(IDS[2])
    results.files.write("/".join(filter(None, ("cells", IDS[2], manifest.folder, "tensors.safetensors"))), b"half")
    assert reset_failed(GRID, results) == [IDS[2]]
    assert worker.run(IDS[2]).state == "done"
    assert content(results.load(IDS[2])) == content(icl.load_cell(copied.study / IDS[2]))


@pytest.mark.parametrize("unreadable", ["manifest.json", "tensors.safetensors"])
def test_a_cell_that_cannot_be_read_now_is_not_deleted(
    unreadable: str, local_results: Results, copied: type[CopiedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    Worker(GRID, local_results).run(IDS[0])
    monkeypatch.setattr(files, "wait_random_exponential", lambda **_: lambda state: 0)
    read_bytes, attempts = Path.read_bytes, []

    def fail(path: Path) -> bytes:
        if path.name != unreadable:
            return read_bytes(path)
        attempts.append(path)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(icl.AssetError, match=r"Input/output error: check the storage"):
            reset_failed(GRID, local_results)
    assert len(attempts) == files.ATTEMPTS
    assert reset_failed(GRID, local_results) == []
    assert content(local_results.load(IDS[0])) == content(icl.load_cell(copied.study / IDS[0]))


def test_a_cell_that_is_to_run_again_is_not_held_against_its_lost_workers(
    local_results: Results, copied: type[CopiedCells]
) -> None:
    results = local_results
    assert Claim(results.files, IDS[0], 0, 60.0).create()  # of a worker that was killed after it recorded the failure
    results.record_failure(Failure(IDS[0], "error", "traceback", "host:1"))
    reset_failed(GRID, results)
    assert claimed(results.files) == {}
    assert Worker(GRID, results, max_lost=1).run(IDS[0]).state == "done"


def test_a_cell_that_another_worker_computes_is_left_to_it(local_results: Results, copied: type[CopiedCells]) -> None:
    results = local_results
    worker = Worker(GRID, results, ttl=60.0)
    claim = Claim(results.files, IDS[0], 0, 60.0)
    assert claim.create()
    assert worker.run(IDS[0]).state == "claimed"
    assert copied.runs == []
    assert results.status(GRID.cells()).running == (IDS[0],)
    claim.give_up()
    assert worker.run(IDS[0], wait=True).state == "done"


def test_a_cell_that_another_worker_finished_just_before_the_claim_is_not_computed_again(
    local_results: Results, copied: type[CopiedCells]
) -> None:
    take = Claims.take

    with pytest.MonkeyPatch.context() as patch:

        def take_late(claims: Claims, cell_id: str) -> Claim | None:
            patch.undo()
            assert Worker(GRID, local_results).run(cell_id).state == "done"
            return take(claims, cell_id)

        patch.setattr(Claims, "take", take_late)
        assert Worker(GRID, local_results).run(IDS[0]).state == "already done"
    assert copied.runs == [IDS[0]]


def test_a_cell_in_which_workers_are_lost_again_and_again_fails(
    local_results: Results, copied: type[CopiedCells]
) -> None:
    results = local_results
    claim = Claim(results.files, IDS[0], 0, 0.01)
    claim._owner["machine"] = "elsewhere"
    assert claim.create()
    outcome = Worker(GRID, results, ttl=0.01, max_lost=1).run(IDS[0], wait=True)
    assert outcome.state == "failed"
    assert "got 1 workers lost in it" in outcome.error
    assert copied.runs == []


def test_other_settings_under_an_id_are_a_failure_that_is_not_recorded(
    local_results: Results, copied: type[CopiedCells]
) -> None:
    results = local_results
    Worker(GRID, results).run(IDS[0])
    other = grid_of(n_queries=2)
    assert Worker(other, results).run(IDS[0]).error.startswith("SettingsError: expected a result made with n_queries=2")
    assert results.failures() == {}
    with pytest.raises(icl.SettingsError, match="n_queries=2"):
        plan(other, results, models=["tiny"], tasks=["films"])


def test_cells_of_other_versions_are_not_mixed_unless_it_is_allowed(
    results: Results, copied: type[CopiedCells], tmp_path: Path
) -> None:
    passed: dict[str, Any] = {"models": ["tiny"], "tasks": ["films"]}
    worker = Worker(GRID, results)
    worker.run(IDS[0])
    change_version(results, IDS[0], "torch", "1.0.0")
    change_version(results, IDS[0], "python", "3.0")  # decides no number
    with pytest.raises(icl.SettingsError, match=rf"got torch \S+ in .*, and torch 1.0.0 of {IDS[0]} in .*--mix-vers"):
        plan(GRID, results, **passed)
    assert plan(GRID, results, mix_versions=True, **passed).ids == IDS[1:]
    for cell_id in IDS[1:]:
        worker.run(cell_id)
    assert plan(GRID, results, **passed).ids == []  # nothing is to run
    table = collect(results, tmp_path / "table.parquet", GRID)
    assert sorted(table.versions.values()) == [1, 3] == sorted(results.versions(IDS).values())
    versions = table.to_frame().groupby("id")["versions"].first()
    assert [cell_id for cell_id in IDS if "torch 1.0.0," in versions[cell_id]] == [IDS[0]]


def test_a_worker_is_not_read_where_packages_have_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    strict, mixing = (pickle.dumps(Worker(GRID, Results("unused"), mix_versions=mix)) for mix in (False, True))
    here = installed_versions()
    monkeypatch.setattr(worker_module, "installed_versions", lambda: {**here, "transformers": "4.0.0"})
    with pytest.raises(icl.SettingsError, match=r"got transformers 4.0.0 in .* of the process that started it"):
        pickle.loads(strict)
    pickle.loads(mixing)


def test_a_full_disk_fails_the_cell_and_leaves_nothing_by_half(
    tmp_path: Path, copied: type[CopiedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path / "results")
    copytree = results_module.shutil.copytree

    def fill(source: Path, target: Path, **_: bool) -> None:
        (target / "metadata.json").write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device", str(target / "tensors.safetensors"))

    worker = Worker(GRID, results)
    worker.run(IDS[0])
    monkeypatch.setattr(copied, "run", lambda self, cell, folder: (copytree(self.study / cell.name, folder),
                                                                  icl.load_cell(folder))[1])  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(results_module.shutil, "copytree", fill)
        outcome = worker.run(IDS[1])
    assert outcome.state == "failed"
    assert "No space left on device" in outcome.error
    assert "free disk space" in outcome.error
    assert results.finished() == [IDS[0]]
    assert [path.name for path in (tmp_path / "results" / "cells").iterdir()] == [IDS[0]]
    reset_failed(GRID, results)
    assert worker.run(IDS[1]).state == "done"


def test_a_worker_with_models_stays_in_its_process() -> None:
    worker = Worker(GRID, Results("unused"), models=[tiny_model()])
    with pytest.raises(GridError, match="expected a worker without models to send to another process"):
        pickle.dumps(worker)


def test_shards_are_all_cells_once() -> None:
    cells = grid_of(seeds=[1, 2, 3, 4, 5, 6, 7]).cells()
    shards = [in_shard(cells, (index, 4)) for index in range(4)]
    assert [cell for shard in shards for cell in shard] == cells
    assert {len(shard) for shard in shards} == {3, 4}
    with pytest.raises(GridError, match="a shard from 0/4 to 3/4, got 4/4"):
        in_shard(cells, (4, 4))


def test_a_cell_that_is_larger_than_the_machine_is_refused_before_any_runs(tmp_path: Path) -> None:
    large = grid_of(memory_gb=1e6)
    with pytest.raises(GridError, match=rf"got {IDS[0]}, which needs 1000000.0 GB"):
        Machine.here().check_fits(plan(large, Results(tmp_path), models=["tiny"], tasks=["films"]).cells)
    cell = PlannedCell(GRID.cells()[0], Resources(3, 1, None))
    with pytest.raises(GridError, match=r"the gpus of a node \(0\)"):
        Machine(4, 0, None).check_fits([cell], "a node")


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({}, 0),
        ({"device": "cuda"}, 1),
        ({"device": "cuda", "gpus": 2}, 2),
        ({"device_map": "auto"}, 1),
        ({"device_map": "auto", "gpus": 0}, 0),
        ({"device_map": {"": "cuda:0", "model.layers.1": "cuda:1", "model.layers.2": "cuda:1"}}, 2),
        ({"device_map": {"": "cuda", "model.layers.1": "cuda:0"}}, 1),
        ({"device_map": {"": "cpu", "model.layers.1": "disk"}}, 0),
    ],
)
def test_a_cell_is_planned_with_the_gpus_that_its_model_is_loaded_to(
    settings: dict[str, Any], gpus: int, tmp_path: Path
) -> None:
    planned = plan(grid_of(**settings), Results(tmp_path), models=["tiny"], tasks=["films"])
    assert {cell.resources.gpus for cell in planned.cells} == {gpus}


def test_maps_that_no_model_could_be_loaded_by_are_refused() -> None:
    with pytest.raises(GridError, match=r"expected device or device_map, got device='cuda' .*: leave out device"):
        grid_of(device="cuda", device_map="auto")
    with pytest.raises(GridError, match="expected device_map with at least one entry"):
        grid_of(device_map={})
    with pytest.raises(GridError, match="expected a device as one of cpu, cuda, disk, got 'mps'"):
        grid_of(device_map={"": "cpu", "model.layers.1": "mps"})


def test_processes_do_not_fill_the_same_gpus(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="expected one process where device_map fills GPUs, got processes=2"):
        run_grid(grid_of(device_map="auto"), Results(tmp_path), tasks=[TASK], models=[tiny_model()], processes=2)


def test_a_worker_loads_models_by_the_grid_s_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk, maps = {"": "cpu", "model.layers.1": "disk"}, list[Any]()

    def load(name: str, **options: Any) -> icl.Model:
        maps.append((options["device"], options["device_map"]))
        return icl.load_model(name, **options)

    monkeypatch.setattr("icl_dual.study.load_model", load)
    grid = grid_of(models=[save_tiny(tmp_path / "model")], seeds=[1], controls={}, device_map=on_disk)
    assert Worker(grid, Results(tmp_path / "results"), tasks=[TASK]).run(grid.cells()[0].id).state == "done"
    assert maps == [(None, on_disk)]


def test_a_worker_loads_models_to_the_grid_s_device(tmp_path: Path) -> None:
    grid = grid_of(device="cuda:99")
    outcome = Worker(grid, Results(tmp_path), tasks=[TASK], models=[tiny_model()]).run(grid.cells()[0].id)
    assert outcome.state == "failed"
    assert "expected a device that torch can use here, got 'cuda:99'" in outcome.error


def test_a_plan_says_what_remains_and_what_it_needs(local_results: Results, copied: type[CopiedCells]) -> None:
    results = local_results
    Worker(GRID, results).run(IDS[0])
    planned = plan(GRID, results, models=["tiny"], tasks=["films"])
    assert (planned.ids, planned.done, planned.n_cells) == (IDS[1:], (IDS[0],), 4)
    peak = results.manifest(IDS[0]).peak_memory
    assert peak > 10**8
    assert {cell.resources for cell in planned.cells} == {Resources(1, 0, int(MARGIN * peak))}  # measured
    assert str(planned).startswith("3 of 4 cells to run, 1 done, 0 failed\n  3 × tiny in float32: 1 CPU(s)")
    with pytest.raises(GridError) as error:
        plan(Grid(models=["no-such"], tasks=["sst2", "sst3"], k=2), results)
    assert "models: expected name as one of" in str(error.value)
    assert "tasks: expected a task out of" in str(error.value)
    assert "'sst3'" in str(error.value)
    with pytest.raises(icl.SettingsError, match=rf"finished cells with recordings, got {IDS[0]} without"):
        plan(grid_of(keep_recordings=True), results, models=["tiny"], tasks=["films"])
