import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from icl_dual.grids import Results
from icl_dual.grids.claims import Claim, Claims, claimed, machine
from icl_dual.grids.files import Files


def test_of_many_workers_one_has_the_claim(results: Results) -> None:
    with ThreadPoolExecutor(8) as workers:
        claims = list(workers.map(lambda _: Claims(results.files).take("cell"), range(8)))
    (claim,) = [claim for claim in claims if claim is not None]
    assert list(claimed(results.files)) == ["cell"]
    claim.give_up()
    assert claimed(results.files) == {}
    assert Claims(results.files).take("cell") is not None


def of_another_machine(claim: Claim) -> Claim:
    claim._owner |= {"machine": "elsewhere", "pid": 2**22 + 1}  # no process has this number here
    return claim


def test_a_claim_that_is_renewed_stays_and_one_that_is_not_is_taken_over_by_one(results: Results) -> None:
    ttl = 0.4
    claim = of_another_machine(Claim(results.files, "cell", 0, ttl))
    assert claim.create()
    other, third = Claims(results.files, ttl), Claims(results.files, ttl)
    with claim:
        deadline = time.monotonic() + 2 * ttl
        while time.monotonic() < deadline:
            assert other.take("cell") is None
            time.sleep(0.05)
    assert claimed(results.files) == {}
    lost = of_another_machine(Claim(results.files, "cell", 0, ttl))
    assert lost.create()
    assert other.take("cell") is None
    assert third.take("cell") is None
    time.sleep(1.2 * ttl)
    first = other.take("cell")
    assert first is not None
    assert first.number == 1
    assert third.take("cell") is None
    first.give_up()
    assert claimed(results.files) == {}


def test_a_cell_is_taken_over_again_and_again_by_one_each_time(results: Results) -> None:
    assert of_another_machine(Claim(results.files, "cell", 0, 0.01)).create()
    for number in (1, 2):
        others = [Claims(results.files, 0.01) for _ in range(2)]
        assert [other.take("cell") for other in others] == [None] * 2
        time.sleep(0.03)
        (claim,) = filter(None, [other.take("cell") for other in others])
        assert claim.number == number
        results.files.write(f"claims/cell.{number}.json", json.dumps({"machine": "elsewhere", "ttl": 0.01}).encode())


def test_an_owner_that_renews_its_claim_less_often_is_waited_for(results: Results) -> None:
    assert of_another_machine(Claim(results.files, "cell", 0, 60.0)).create()
    assert of_another_machine(Claim(results.files, "other", 0, 0.01)).create()
    hasty, patient = Claims(results.files, 0.01), Claims(results.files, 60.0)
    assert hasty.take("cell") is patient.take("other") is None
    time.sleep(0.05)
    assert hasty.take("cell") is None
    assert patient.take("other") is None, "a worker waits for no less than its own seconds"


@pytest.mark.skipif(machine() is None, reason="processes of this machine cannot be told from others'")
def test_the_claim_of_a_killed_process_of_this_machine_is_taken_over_at_once(results: Results) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    claim = Claim(results.files, "cell", 0, 60.0)
    claim._owner["pid"] = process.pid
    assert claim.create()
    assert Claims(results.files).take("cell") is None
    process.kill()  # and not waited for: a zombie is no worker
    deadline = time.monotonic() + 5
    while (after := Claims(results.files).take("cell")) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.communicate()
    assert after is not None
    assert json.loads(claimed(results.files)["cell"].content)["pid"] == os.getpid()


def test_the_claim_of_a_worker_that_lost_its_device_is_taken_over_at_once(results: Results) -> None:
    claim, other = Claims(results.files).take("cell"), Claims(results.files)
    assert claim is not None
    with claim:
        assert other.take("cell") is None
        claim.leave("CUDA error: device-side assert triggered")
    after = other.take("cell")
    assert after is not None
    assert (after.number, after.previous_device_error) == (1, "CUDA error: device-side assert triggered")
    after.give_up()
    assert claimed(results.files) == {}


def test_a_claim_that_was_written_by_half_is_one_until_it_is_old(results: Results) -> None:
    results.files.write("claims/cell.0.json", b'{"machine": ')
    claims = Claims(results.files, ttl=0.05)
    assert claims.take("cell") is None
    time.sleep(0.06)
    assert claims.take("cell") is not None


def test_claims_are_those_of_their_cells_in_whatever_order_storage_reads_them() -> None:
    files = Files("memory://claims-in-order")
    for name in ("x.0", "x.1", "x.2", "x.1.0"):  # the last is the first claim of the cell "x.1"
        files.write(f"claims/{name}.json", name.encode())
    assert {cell_id: info.content for cell_id, info in claimed(files).items()} == {"x": b"x.2", "x.1": b"x.1.0"}
