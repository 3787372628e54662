"""Altered contexts: what changes, what stays, and by which draw."""

import itertools
import math
from collections import Counter
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.contexts import Context, draw_orders, matching_training_steps
from icl_dual.tasks import Example

LR = 0.05
LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=12)


def examples(labels: list[int]) -> list[Example]:
    return [Example((("text", f"row {index}"),), label) for index, label in enumerate(labels)]


def labels_of(demonstrations: list[Example]) -> list[int]:
    return [shown.label for shown in demonstrations]


@settings(max_examples=50, deadline=None)
@given(
    labels=LABELS,
    context=st.sampled_from([c for c in get_args(Context) if c != "reordered"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_relabelling_changes_labels_alone_and_by_its_seed(labels: list[int], context: Context, seed: int) -> None:
    shown = examples(labels)
    got = icl.relabel(shown, context, 5, seed=seed)
    assert [one.fields for one in got] == [one.fields for one in shown]
    assert all(0 <= label < 5 for label in labels_of(got))
    assert got == icl.relabel(shown, context, 5, seed=seed)
    assert shown == examples(labels), "what is given stays"


@settings(max_examples=50, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 2**20))
def test_shuffled_labels_are_the_same_labels(labels: list[int], seed: int) -> None:
    got = labels_of(icl.relabel(examples(labels), "shuffled labels", 5, seed=seed))
    assert Counter(got) == Counter(labels)


@settings(max_examples=50, deadline=None)
@given(n_labels=st.integers(2, 5), seed=st.integers(0, 2**20), data=st.data())
def test_flipped_labels_are_all_wrong_by_one_rule(n_labels: int, seed: int, data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.integers(0, n_labels - 1), min_size=1, max_size=12))
    got = labels_of(icl.relabel(examples(labels), "flipped labels", n_labels, seed=seed))
    rule = dict(zip(labels, got, strict=True))
    assert [rule[label] for label in labels] == got
    assert all(old != new for old, new in rule.items())
    assert len(set(rule.values())) == len(rule), "no two labels become one"
    if n_labels == 2:
        assert got == [1 - label for label in labels]


def test_every_rule_of_flipping_is_drawn_by_some_seed() -> None:
    rules = {icl.relabel(examples([0]), "flipped labels", 4, seed=seed)[0].label for seed in range(40)}
    assert rules == {1, 2, 3}


def test_seeds_deal_and_draw_other_labels() -> None:
    shown = examples([0, 1, 2, 3] * 5)
    for context in ("shuffled labels", "random labels"):
        dealt = {tuple(labels_of(icl.relabel(shown, context, 4, seed=seed))) for seed in range(5)}
        assert len(dealt) == 5
        assert tuple(labels_of(shown)) not in dealt


def test_random_labels_are_drawn_evenly_from_all_labels() -> None:
    """Also from those that no demonstration has, and with no regard to its own."""
    got = labels_of(icl.relabel(examples([0] * 4000), "random labels", 4, seed=0))
    deviation = math.sqrt(4000 * 0.25 * 0.75)
    assert all(abs(got.count(label) - 1000) < 4 * deviation for label in range(4))


@settings(max_examples=50, deadline=None)
@given(k=st.integers(2, 9), seed=st.integers(0, 2**20))
def test_reordered_demonstrations_are_the_same_in_another_order(k: int, seed: int) -> None:
    shown = examples([index % 2 for index in range(k)])
    got = icl.relabel(shown, "reordered", 2, seed=seed)
    assert got != shown
    assert sorted(got, key=shown.index) == shown
    assert got == [shown[index] for index in draw_orders(k, 2, seed=seed)[1]]


def test_an_unknown_context_is_refused_and_a_single_demonstration_has_no_other_order() -> None:
    unknown: Any = "upside down"
    with pytest.raises(ValueError, match=r"expected context as one of 'own', .*, got 'upside down'"):
        icl.relabel(examples([0, 1]), unknown, 2, seed=0)
    with pytest.raises(ValueError, match="from 1 to 1! = 1 orders of 1 demonstrations, got 2"):
        icl.relabel(examples([0]), "reordered", 2, seed=0)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 6), seed=st.integers(0, 2**20), data=st.data())
def test_orders_are_different_and_their_own_is_first(k: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, min(math.factorial(k), 30)))
    got = draw_orders(k, n, seed=seed)
    assert got[0] == tuple(range(k))
    assert len(set(got)) == len(got) == n
    assert all(sorted(order) == list(range(k)) for order in got)
    assert got == draw_orders(k, n, seed=seed)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_all_orders_there_are_can_be_had(k: int) -> None:
    assert sorted(draw_orders(k, math.factorial(k), seed=3)) == list(itertools.permutations(range(k)))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_other_order_is_drawn_as_often(n: int) -> None:
    """Whether few or nearly all of the six orders are asked for."""
    drawn = Counter(order for seed in range(900) for order in draw_orders(3, n, seed=seed)[1:])
    expected = 900 * (n - 1) / 5
    assert len(drawn) == 5
    assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in drawn.values())


@pytest.mark.parametrize(("k", "n"), [(3, 7), (2, 3), (3, 0), (3, -1)])
def test_more_orders_than_there_are_are_refused_with_how_many_there_are(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"from 1 to {k}! = {math.factorial(k)} orders of {k} .*, got {n}"):
        draw_orders(k, n, seed=0)


def test_steps_say_which_demonstration_stands_for_which_step(llama: icl.Model, task: icl.Task) -> None:
    shown = task.demonstrations(5, seed=2)
    asked = task.queries(3)
    trained = icl.build_prompts(llama, task, shown, asked)
    for seed in range(5):
        reordered = icl.build_prompts(llama, task, icl.relabel(shown, "reordered", 2, seed=seed), asked)
        steps = matching_training_steps(reordered, trained, 5, "reordered", seed=seed)
        assert sorted(steps) == [0, 1, 2, 3, 4]
        assert [trained.training_sequences[step] for step in steps] == list(reordered.demonstrations)
    flipped = icl.build_prompts(llama, task, icl.relabel(shown, "flipped labels", 2, seed=0), asked)
    # The two label words have other numbers of tokens: no token of a flipped demonstration stands for one trained on.
    assert matching_training_steps(flipped, trained, 5, "flipped labels", seed=0) == [-1] * 5
    dealt = icl.build_prompts(llama, task, icl.relabel(shown, "shuffled labels", 2, seed=1), asked)
    same = [len(a) == len(b) for a, b in zip(dealt.demonstrations, trained.demonstrations, strict=True)]
    assert set(same) == {True, False}
    expected = [step if kept else -1 for step, kept in enumerate(same)]
    assert matching_training_steps(dealt, trained, 5, "shuffled labels", seed=1) == expected


def test_what_had_no_room_in_training_has_no_step(
    llama: icl.Model, reference_task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icl_dual.prompts.REFERENCE_CONTEXT", 200)
    shown, asked = reference_task.demonstrations(8, 1), reference_task.queries(3)
    trained = icl.build_prompts(llama, reference_task, shown, asked)
    assert 0 < len(trained.training_sequences) < 8
    without = 0
    for seed in range(4):
        other = icl.build_prompts(llama, reference_task, icl.relabel(shown, "reordered", 2, seed=seed), asked)
        steps = matching_training_steps(other, trained, 8, "reordered", seed=seed)
        assert len(steps) == len(other.demonstrations) < 8
        for step, tokens in zip(steps, other.demonstrations, strict=True):
            if step >= 0:
                assert trained.training_sequences[step] == tokens
            else:
                assert tokens not in trained.training_sequences
                without += 1
    assert without
