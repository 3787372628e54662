"""The Ray engine, on one real cluster for all tests."""

import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from engine_runs import (
    DeviceLosingWorker,
    Events,
    SlowWorker,
    check_device_losses,
    contents,
    plan_of,
    run_here,
    small_grid,
    worker_of,
)
from grid_cells import save_tiny
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.cluster_utils import Cluster

from icl_dual.grids import GridError, Plan, Resources
from icl_dual.grids.engines import ray as engine
from icl_dual.grids.engines.ray import run_ray
from icl_dual.grids.planning import Machine

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": engine.OBJECT_STORE_BYTES, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of a head node with one CPU, which this process is connected to."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_grid_is_complete_and_the_same_where_a_node_is_lost_and_another_worker_has_a_cell(
    cluster: Cluster, tmp_path: Path
) -> None:
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=3)
    expected = run_here(grid, tmp_path / "here")
    worker = worker_of(grid, tmp_path / "ray", SlowWorker)
    node = cluster.add_node(**{**NODE, "num_cpus": 1})
    claim = worker._claims.take(grid.cells()[2].id)
    assert claim is not None
    lost: list[str] = []

    def on_begin(events: Events) -> None:
        if not lost and len(events.begun) == len(events.ended) + 2:  # a cell on each node
            lost.append(events.begun[-1])
            cluster.remove_node(node, allow_graceful=False)

    def on_end(events: Events) -> None:
        if events.ended[-1].state == "claimed" and events.ended[-1].id == grid.cells()[2].id:
            claim.__exit__(None, None, None)

    events = Events(on_end, on_begin)
    module = sys.modules[SlowWorker.__module__]  # actors cannot import it
    cloudpickle.register_pickle_by_value(module)
    try:
        with claim:
            summary = run_ray(worker, plan_of(worker), events)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert set(summary.done) == {cell.id for cell in grid.cells()}
    assert contents(worker.results) == expected
    assert lost
    assert len(events.begun) > len(events.ended), "the cell of the lost node began twice"
    n_done = sum(outcome.state == "done" for outcome in events.ended)
    assert len(expected) - 1 <= n_done <= len(expected), "each cell was computed once, but for one that may have been"
    assert len({worker.results.manifest(cell_id).worker for cell_id in summary.done}) <= 3


def test_an_actor_that_loses_its_device_is_replaced_and_a_cell_that_loses_it_each_time_fails(
    cluster: Cluster, tmp_path: Path
) -> None:
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=1)
    worker = worker_of(grid, tmp_path / "ray", DeviceLosingWorker, max_lost=2)
    module = sys.modules[DeviceLosingWorker.__module__]  # actors cannot import it
    cloudpickle.register_pickle_by_value(module)
    try:
        check_device_losses(worker, run_ray(worker, plan_of(worker), Events()))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"cpus": 64}, r"a node of the cluster \(1 CPU\(s\), 0 GPU\(s\), .* GB\), got .*, which needs 64 CPU\(s\)"),
        ({"memory_gb": 1e6}, r"which needs 1 CPU\(s\), 0 GPU\(s\), 1000000.0 GB: add a larger node, or set cpus"),
        ({"device": "cuda", "memory_gb": 0.1}, r"which needs 1 CPU\(s\), 1 GPU\(s\)"),
    ],
)
def test_a_cell_larger_than_any_node_is_refused_at_once(
    cluster: Cluster, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=1, **settings)
    worker, events, started = worker_of(grid, tmp_path / "ray"), Events(), time.monotonic()
    with pytest.raises(GridError, match=match):
        run_ray(worker, plan_of(worker), events)
    assert time.monotonic() - started < 10
    assert not events.begun


def test_where_every_node_that_fits_was_lost_the_run_waits_for_one_and_then_stops(cluster: Cluster) -> None:
    slot = engine._Slot(Resources(64, 0, None), deque())
    run = object.__new__(engine._Run)
    run.ray, run.remaining, run.last_fit = ray, {"cell"}, time.monotonic()
    run.pending = {"the start of an actor": slot}
    run._check_nodes()
    run.last_fit -= engine.NODE_WAIT_S
    with pytest.raises(GridError, match=r"for the 1 cells that remain, got 1 CPU\(s\), .* for 120 s after others"):
        run._check_nodes()
    slot.running = "cell", False
    run._check_nodes()
    assert time.monotonic() - run.last_fit < engine.NODE_WAIT_S


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_without_a_cluster_is_refused_in_15_seconds(
    tmp_path: Path, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ANSWER_S", 2)
    grid = small_grid(save_tiny(tmp_path / "model"), n_seeds=1)
    worker = worker_of(grid, tmp_path / "ray")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(GridError, match=f"expected a Ray cluster at address '{address}', got .*: start a cluster"):
            run_ray(worker, plan_of(worker), Events(), address=address)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(small_grid("gpt2", n_seeds=1), tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GridError, match=r"expected Ray .*: pip install 'icl-dual\[ray\]'"):
        run_ray(worker, Plan((), 0, (), ()), Events())


def test_models_stay_behind(tmp_path: Path, llama: Any) -> None:
    worker = worker_of(small_grid(save_tiny(tmp_path / "model"), n_seeds=1), tmp_path, models=[llama])
    with pytest.raises(GridError, match="expected a worker without models to send to another process"):
        worker.__getstate__()


amounts = st.builds(Machine, st.integers(1, 9), st.integers(0, 3), st.none() | st.integers(1, 9))
needs = st.builds(Resources, st.integers(1, 9), st.integers(0, 3), st.none() | st.integers(1, 9))


@given(needs, amounts)
def test_as_many_workers_fit_on_a_node_as_can_be_taken_from_it_one_by_one(needs: Resources, node: Machine) -> None:
    wanted = [needed or 0 for needed in needs]
    count, left = 0, [100 if there is None else there for there in node]  # as much as is never used up
    while all(needed <= there for needed, there in zip(wanted, left, strict=True)):
        count += 1
        left = [there - needed for needed, there in zip(wanted, left, strict=True)]
    assert engine.n_workers(needs, node) == count


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_an_idle_slot_takes_the_end_of_the_longest_and_loses_no_cell(lengths: list[int]) -> None:
    needs, start, slots = Resources(1, 0, None), 0, []
    for length in [0, *lengths]:
        slots.append(engine._Slot(needs, deque(str(cell) for cell in range(start, start + length))))
        start += length
    run = object.__new__(engine._Run)
    run.slots = slots
    run._share(slots[0])
    assert sorted(int(cell) for slot in slots for cell in slot.cells) == [*range(start)]
    cells = [int(cell) for cell in slots[0].cells]
    assert cells == [*range(cells[0], cells[0] + len(cells))] if cells else not any(lengths), "neighbours, in order"
    assert len(cells) == (max(lengths) + 1) // 2
