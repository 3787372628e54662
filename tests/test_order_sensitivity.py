"""Order sensitivity against plain loops over orders and pairs."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.contexts import draw_orders
from icl_dual.finetuning.config import PAPER_FINETUNING
from icl_dual.order_sensitivity import PAIRS, overlap_cosine, token_overlap, total_variation
from icl_dual.storage import load_tensors, save_tensors

LR = 0.05


def distributions(seed: int, n: int, tokens: int) -> torch.Tensor:
    """Distributions over tokens, some of which have no probability at all."""
    rng = np.random.default_rng(seed)
    drawn = rng.gamma(0.3, size=(n, tokens)) * (rng.random((n, tokens)) < 0.8)
    drawn[:, 0] += 1e-3
    return torch.from_numpy(drawn / drawn.sum(1, keepdims=True))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 8))
def test_total_variation_is_the_most_that_any_event_differs(seed: int, tokens: int) -> None:
    p, q, r = (distributions(seed + i, 3, tokens) for i in range(3))
    got = total_variation(p, q)
    for query in range(3):
        events = itertools.product((False, True), repeat=tokens)
        most = max(
            sum(float(a - b) for a, b, kept in zip(p[query], q[query], event, strict=True) if kept) for event in events
        )
        assert got[query].item() == pytest.approx(most, abs=1e-12)
    assert ((got >= 0) & (got <= 1 + 1e-12)).all()
    assert torch.equal(got, total_variation(q, p))
    assert (total_variation(p, p) == 0).all()
    assert (total_variation(p, r) <= got + total_variation(q, r) + 1e-12).all()


def test_distributions_that_share_nothing_are_as_far_apart_as_can_be() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.25, 0.75]])
    assert total_variation(p, q).item() == 1
    assert token_overlap(p, q, 2).item() == 0
    assert overlap_cosine(p, q, 2).item() == 0


def most_probable(p: torch.Tensor, k: int) -> set[int]:
    return set(sorted(range(len(p)), key=lambda token: -float(p[token]))[:k])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), tokens=st.integers(3, 9), k=st.integers(1, 3))
def test_overlaps_equal_counting_sets_of_tokens(seed: int, tokens: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = (torch.from_numpy(rng.dirichlet(np.ones(tokens), 3)) for _ in range(2))
    overlap, cosine = token_overlap(p, q, k), overlap_cosine(p, q, k)
    for query in range(3):
        ours, theirs = most_probable(p[query], k), most_probable(q[query], k)
        assert overlap[query].item() == pytest.approx(len(ours & theirs) / k)
        either = sorted(ours | theirs)
        a, b = p[query, either].numpy(), q[query, either].numpy()
        assert cosine[query].item() == pytest.approx(a @ b / math.sqrt(a @ a * (b @ b)), abs=1e-9)
    assert torch.equal(overlap, token_overlap(q, p, k))
    torch.testing.assert_close(token_overlap(p, p, k), torch.ones(3), check_dtype=False)
    torch.testing.assert_close(overlap_cosine(p, p, k), torch.ones(3), check_dtype=False)


@pytest.fixture(scope="module")
def sensitivity(llama: icl.Model, task: icl.Task) -> icl.OrderSensitivity:
    return icl.measure_order_sensitivity(
        llama, task, task.demonstrations(3, 1), task.queries(4), n_orders=3, lr=LR, seed=2, progress=False
    )


def plain_runs(
    model: icl.Model,
    task: icl.Task,
    orders: list[list[int]],
    k: int,
    n: int,
    config: icl.FinetuneConfig = PAPER_FINETUNING,
) -> dict[str, list[torch.Tensor]]:
    """By setting and order: next-token probabilities from one plain forward pass a query."""
    shown = task.demonstrations(k, 1)
    found: dict[str, list[torch.Tensor]] = {"ICL": [], "FT": []}

    def next_tokens(prompts: icl.Prompts) -> torch.Tensor:
        rows = [torch.tensor([[*prompts.prefix, *query]]) for query in prompts.queries]
        with torch.no_grad():
            return torch.stack([model.run(row)[0, -1].softmax(-1) for row in rows])

    for order in orders:
        prompts = icl.build_prompts(model, task, [shown[index] for index in order], task.queries(n))
        found["ICL"].append(next_tokens(prompts))
        with icl.finetune(model, prompts, lr=LR, config=config, progress=False).applied(model):
            found["FT"].append(next_tokens(prompts.zero_shot()))
    return found


def test_order_sensitivity_equals_plain_loops_over_orders_and_pairs(
    llama: icl.Model, task: icl.Task, sensitivity: icl.OrderSensitivity
) -> None:
    assert [tuple(order) for order in sensitivity.orders] == draw_orders(3, 3, seed=2)
    runs = plain_runs(llama, task, sensitivity.orders, 3, 4)
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {
        "ICL and ICL": [(runs["ICL"][i], runs["ICL"][j]) for i, j in ((0, 1), (0, 2), (1, 2))],
        "FT and FT": [(runs["FT"][i], runs["FT"][j]) for i, j in ((0, 1), (0, 2), (1, 2))],
        "ICL and FT": [(runs["ICL"][i], runs["FT"][i]) for i in range(3)],
    }
    assert tuple(pairs) == PAIRS == tuple(sensitivity.distance)
    for name, of_pair in pairs.items():
        for query in range(4):
            distances, overlaps, cosines = [], [], []
            for p, q in of_pair:
                distances.append(sum(abs(float(a - b)) for a, b in zip(p[query], q[query], strict=True)) / 2)
                ours, theirs = most_probable(p[query], 10), most_probable(q[query], 10)
                overlaps.append(len(ours & theirs) / 10)
                a, b = (one[query, sorted(ours | theirs)].double().numpy() for one in (p, q))
                cosines.append(a @ b / math.sqrt(a @ a * (b @ b)))
            assert sensitivity.distance[name][query].item() == pytest.approx(np.mean(distances), abs=1e-5)
            assert sensitivity.overlap[name][query].item() == pytest.approx(np.mean(overlaps))
            assert sensitivity.overlap_cosine[name][query].item() == pytest.approx(np.mean(cosines), abs=1e-5)
    assert (sensitivity.distance["ICL and ICL"] > 1e-4).all(), "order is meant to matter"


def test_order_sensitivity_predicts_and_scores_labels_order_by_order(
    llama: icl.Model, task: icl.Task, sensitivity: icl.OrderSensitivity
) -> None:
    shown, asked = task.demonstrations(3, 1), task.queries(4)
    assert sensitivity.gold.tolist() == [query.label for query in asked]
    for at, order in enumerate(sensitivity.orders):
        prompts = icl.build_prompts(llama, task, [shown[index] for index in order], asked)
        in_context = icl.capture(llama, prompts, progress=False)
        with icl.finetune(llama, prompts, lr=LR, progress=False).applied(llama):
            ft = icl.capture(llama, prompts.zero_shot(), progress=False)
        for name, run in (("ICL", in_context), ("FT", ft)):
            assert torch.equal(sensitivity.predictions[name][at], run.predictions)
            assert sensitivity.accuracy[name][at].item() == run.accuracy


def test_order_sensitivity_finetunes_as_it_is_told(
    llama: icl.Model, task: icl.Task, sensitivity: icl.OrderSensitivity
) -> None:
    """One step on all demonstrations together does not know their order."""
    before = llama.fingerprint()
    shown, asked = task.demonstrations(3, 1), task.queries(4)
    options: dict[str, Any] = {"n_orders": 3, "lr": LR, "seed": 2, "progress": False}
    whole = icl.measure_order_sensitivity(
        llama, task, shown, asked, config=icl.FinetuneConfig(method="full-batch"), **options
    )
    assert whole.distance["FT and FT"].max() < 1e-5 < sensitivity.distance["FT and FT"].min()
    torch.testing.assert_close(whole.distance["ICL and ICL"], sensitivity.distance["ICL and ICL"])
    assert llama.fingerprint() == before


def test_order_sensitivity_becomes_a_frame(sensitivity: icl.OrderSensitivity) -> None:
    frame = sensitivity.to_frame()
    assert list(frame.columns) == ["measure", "pair", "value", "low", "high", "n"]
    rows = frame.set_index(["measure", "pair"]).to_dict(orient="index")
    assert len(rows) == len(frame) == 3 * 3 + 2 * 2
    row = rows["overlap", "FT and FT"]
    assert (row["value"], row["n"]) == (pytest.approx(sensitivity.overlap["FT and FT"].mean().item()), 4)
    assert math.isnan(row["low"]), "four queries have no interval"
    by_order = sensitivity.accuracy["ICL"].tolist()
    assert (rows["accuracy", "ICL"]["value"], rows["accuracy", "ICL"]["n"]) == (pytest.approx(np.mean(by_order)), 4)
    row = rows["accuracy deviation", "ICL"]
    assert (row["value"], row["n"]) == (pytest.approx(np.std(by_order, ddof=1)), 3)
    assert "'llama', 3 orders, 4 queries, ICL and ICL=" in repr(sensitivity)


def test_order_sensitivity_is_saved_and_loaded(sensitivity: icl.OrderSensitivity, tmp_path: Path) -> None:
    sensitivity.save(tmp_path / "orders", {"lr": LR})
    assert load_tensors(tmp_path / "orders")[1]["lr"] == LR
    assert_same(icl.OrderSensitivity.load(tmp_path / "orders"), sensitivity)


def test_order_sensitivity_of_version_0_1_loads(sensitivity: icl.OrderSensitivity, tmp_path: Path) -> None:
    """It wrote tensors by group and name, and the model and the orders among the caller's metadata."""
    groups = ("predictions", "distance", "overlap", "overlap_cosine")
    tensors = {f"{group}/{name}": value for group in groups for name, value in getattr(sensitivity, group).items()}
    metadata = {"model": sensitivity.model, "orders": sensitivity.orders, "n_orders": 3, "seconds": 1.5}
    save_tensors(tmp_path / "orders", tensors | {"gold": sensitivity.gold}, metadata)
    assert_same(icl.OrderSensitivity.load(tmp_path / "orders"), sensitivity)
    save_tensors(tmp_path / "orders", tensors, metadata)
    with pytest.raises(icl.AssetError, match=r"expected a saved OrderSensitivity .*gold"):
        icl.OrderSensitivity.load(tmp_path / "orders")


def assert_same(loaded: icl.OrderSensitivity, sensitivity: icl.OrderSensitivity) -> None:
    assert (loaded.model, loaded.orders) == (sensitivity.model, sensitivity.orders)
    assert torch.equal(loaded.gold, sensitivity.gold)
    for name in ("predictions", "distance", "overlap", "overlap_cosine"):
        got, expected = getattr(loaded, name), getattr(sensitivity, name)
        assert list(got) == list(expected)
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert loaded.to_frame().equals(sensitivity.to_frame())


def test_a_folder_of_something_else_has_no_order_sensitivity(
    llama: icl.Model, prompts: icl.Prompts, tmp_path: Path
) -> None:
    icl.finetune(llama, prompts, lr=LR, progress=False).save(tmp_path / "delta")
    with pytest.raises(icl.AssetError, match="OrderSensitivity"):
        icl.OrderSensitivity.load(tmp_path / "delta")
    with pytest.raises(icl.AssetError, match="does not exist"):
        icl.OrderSensitivity.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("n_orders", "message"), [(1, "expected n_orders of at least 2, got 1"), (7, r"3! = 6 orders")]
)
def test_too_few_or_too_many_orders_are_refused_before_anything_runs(
    llama: icl.Model, task: icl.Task, monkeypatch: pytest.MonkeyPatch, n_orders: int, message: str
) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is to run")

    monkeypatch.setattr(llama, "run", run)
    with pytest.raises(ValueError, match=message):
        icl.measure_order_sensitivity(
            llama, task, task.demonstrations(3, 1), task.queries(2), n_orders=n_orders, lr=LR, progress=False
        )


def test_an_architecture_without_rotation_and_a_loss_of_the_label_alone_have_order_sensitivity(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task
) -> None:
    model = models_by_architecture("gpt2")
    got = icl.measure_order_sensitivity(
        model,
        task,
        task.demonstrations(2, 1),
        task.queries(3),
        n_orders=2,
        lr=LR,
        config=icl.FinetuneConfig(loss="label"),
        progress=False,
    )
    runs = plain_runs(model, task, [[0, 1], [1, 0]], 2, 3, icl.FinetuneConfig(loss="label"))
    expected = (runs["FT"][0] - runs["FT"][1]).abs().sum(-1) / 2
    torch.testing.assert_close(got.distance["FT and FT"], expected, rtol=1e-3, atol=1e-6)
