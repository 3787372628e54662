"""The race on the real model, small; and the counting of FLOPs."""

import json
import time
from pathlib import Path

import benchmark
import contenders
import growth
import pytest
import torch

import icl_dual as icl

SMALL = ("--task", "mr", "--k", "2", "--queries", "3", "--repeats", "1")


def test_a_race_writes_times_ratios_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REPLICAS", 2)
    for module in (benchmark, contenders):
        monkeypatch.setattr(module, "RATES", 2)
    assert benchmark.main([*SMALL, "--no-memory", "--out", str(tmp_path), "--json", str(tmp_path / "copy.json")]) == 0
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result == json.loads((tmp_path / "copy.json").read_text())
    ran = result["medians_s"]
    assert {"floor", "bare", "ours", "ours_decomposed", "tl_prefix", "tl_filtered", "cell", "floors"} <= ran.keys()
    for ratio, value in result["ratios"].items():
        ours, theirs = ratio.split("/")
        assert value == pytest.approx(ran[ours] / ran[theirs])
    assert max(result["relative_differences"]["tl_filtered"].values()) < 1e-4
    assert {"ours/floor", "ours/bare", "tl_filtered/ours", "finetune/kv_sgd", "cell/floors"} <= result["ratios"].keys()
    assert {path.name for path in tmp_path.iterdir()} >= {"benchmark.md", "benchmark.png", "benchmark.pdf"}


def test_the_slower_of_two_is_timed_as_slower() -> None:
    race = contenders.Race("none", icl.Prompts(queries=(), labels=(), gold=()), "cpu", torch.float32, 1e-4)
    seconds = benchmark.time_all(race, {"slow": lambda: time.sleep(0.2), "fast": lambda: None}, 2)
    assert {name: len(found) for name, found in seconds.items()} == {"slow": 2, "fast": 2}
    assert min(seconds["slow"]) >= 0.2 > max(seconds["fast"])


def test_peak_memory_is_a_number_of_megabytes() -> None:
    """In a process of its own, for memory that this one has freed and would take again is not counted."""

    args = benchmark.parse(["--task", "mr", "--k", "2", "--queries", "3"])
    (peak,) = benchmark.peaks(args, ["ours"]).values()
    assert 1 < peak < 4000


def test_a_contender_that_captures_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    task = icl.load_task("mr")
    nothing = icl.Prompts(queries=(), labels=(), gold=())
    race = contenders.Race("smollm2-135m", nothing, "cpu", torch.float32, 1e-4)
    race.prompts = icl.build_prompts(race.model, task, task.demonstrations(2, seed=1), task.queries(3))
    with torch.no_grad():
        benchmark.check_equal(race, ["bare", "tl_prefix"])
        other = icl.build_prompts(race.model, task, task.demonstrations(2, seed=2), task.queries(3))
        bare = contenders.bare
        monkeypatch.setitem(contenders.BATCHED, "bare", lambda race: bare(race.with_prompts(other)))
        with pytest.raises(RuntimeError, match="expected bare to capture what we do"):
            benchmark.check_equal(race, ["bare"])


def test_flops_of_products_and_of_attention_are_counted() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert growth.count(lambda: a @ b) == 2 * 3 * 5 * 7
    q, k, v = torch.randn(2, 11, 6, 8), torch.randn(2, 13, 3, 8), torch.randn(2, 13, 3, 8)
    assert growth.count(lambda: icl.dual.attend(q, k, v, 0.5)) == 2 * 2 * 2 * 6 * 11 * 13 * 8
