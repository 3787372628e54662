import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from helpers import make_rows

import icl_dual as icl
from icl_dual.prompts import SEPARATOR, START, Prompts, check_prompts


def test_segments_hold_the_source_of_each_token(llama: icl.Model, task: icl.Task, prompts: Prompts) -> None:
    rebuilt = [llama.tokenizer.bos_token_id]
    owners = [START]
    demonstrations = task.demonstrations(4, seed=1)
    for index, example in enumerate(demonstrations):
        tokens = llama.encode(f"{task.prompt(example)} {task.label_words[example.label]}")
        rebuilt += [*tokens, *llama.encode("\n")]
        owners += [index] * len(tokens) + [SEPARATOR]
    assert list(prompts.prefix) == rebuilt
    assert prompts.segments.tolist() == owners
    positions = prompts.demonstration_positions
    assert [prompts.prefix[at] for at in positions] == [token for demo in prompts.demonstrations for token in demo]


def test_a_query_ends_where_its_label_is_predicted(llama: icl.Model, task: icl.Task, prompts: Prompts) -> None:
    query = task.queries(7)[3]
    label = prompts.labels[query.label]
    whole = llama.encode(f"{task.prompt(query)} {task.label_words[query.label]}")
    assert list(prompts.queries[3] + label) == whole
    assert len(prompts.labels[1]) > 1, "the toy task is meant to have a label word of several tokens"


@pytest.mark.parametrize("label", [2, 7])
def test_a_query_of_a_label_that_the_task_lacks_is_refused(llama: icl.Model, task: icl.Task, label: int) -> None:
    query = dataclasses.replace(task.queries(1)[0], label=label)
    with pytest.raises(icl.PromptError, match=rf"toy: expected queries with a label from 0 to 1, .*, got {label}: "):
        icl.build_prompts(llama, task, task.demonstrations(2, seed=1), [query])


def test_demonstrations_know_how_long_their_label_is(task: icl.Task, prompts: Prompts) -> None:
    for example, tokens, length in zip(
        task.demonstrations(4, seed=1), prompts.demonstrations, prompts.demonstration_label_lengths, strict=True
    ):
        assert tokens[-length:] == prompts.labels[example.label]


def test_zero_shot_keeps_the_queries_only(prompts: Prompts) -> None:
    zero_shot = prompts.zero_shot()
    assert zero_shot.prefix == zero_shot.start
    assert zero_shot.queries == prompts.queries
    assert zero_shot.segments.tolist() == [START]


def test_the_papers_architecture_separates_by_eos(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task
) -> None:
    model = models_by_architecture("xglm")
    demonstrations, queries = task.demonstrations(2, 0), task.queries(2)
    assert icl.build_prompts(model, task, demonstrations, queries).separator == (model.tokenizer.eos_token_id,)
    prompts = icl.build_prompts(model, task, demonstrations, queries, separator=" ; ")
    assert prompts.separator == tuple(model.encode(" ;")), "its last space is in one token with the next text"
    texts = [f"{task.prompt(example)} {task.label_words[example.label]} ; " for example in demonstrations]
    whole = model.encode("".join(texts) + task.prompt(queries[1]))
    assert [*prompts.prefix, *prompts.queries[1]] == [*model.start_tokens, *whole]


def test_too_long_a_context_is_refused_with_the_numbers(llama: icl.Model, task: icl.Task) -> None:
    with pytest.raises(
        icl.PromptError, match=r"at most 512 tokens, the context of llama, got \d+: 30 demonstrations take"
    ):
        icl.build_prompts(llama, task, task.demonstrations(30, seed=0), task.queries(3))


def test_queries_that_are_demonstrations_are_refused(llama: icl.Model, task: icl.Task) -> None:
    demonstrations = task.demonstrations(3, seed=0)
    with pytest.raises(icl.PromptError, match=r"got 1 text\(s\) in both"):
        icl.build_prompts(llama, task, demonstrations, [*task.queries(2), demonstrations[1]])
    with pytest.raises(icl.PromptError, match="at least one query"):
        icl.build_prompts(llama, task, demonstrations, [])


def test_no_demonstrations_at_all_is_the_zero_shot_setting(llama: icl.Model, task: icl.Task) -> None:
    prompts = icl.build_prompts(llama, task, [], task.queries(3))
    assert prompts == prompts.zero_shot()


def test_the_reference_protocol_appends_the_first_label_word_to_every_query(
    llama: icl.Model, reference_task: icl.Task
) -> None:
    prompts = icl.build_prompts(llama, reference_task, reference_task.demonstrations(3, 1), reference_task.queries(5))
    assert prompts.protocol == "reference"
    assert prompts.appended_tokens == prompts.labels[0]
    assert prompts.suffixes == tuple(query + prompts.labels[0] for query in prompts.queries)
    assert {query.label for query in reference_task.queries(5)} == {0, 1}, "whatever the label is"
    assert prompts.separator == (llama.tokenizer.eos_token_id,)
    assert prompts.zero_shot().suffixes == prompts.suffixes


def test_the_answer_protocol_appends_nothing(prompts: Prompts) -> None:
    assert prompts.protocol == "answer"
    assert prompts.suffixes == prompts.queries


def reference_fit(llama: icl.Model, reference_task: icl.Task, k: int, n_ctx: int) -> int:
    """How many demonstrations the released code keeps: by its count, a prompt stays below the context length."""
    label = {0: " no", 1: " perhaps"}
    longest = (
        1
        + max(len(llama.encode(reference_task.prompt(q))) for q in reference_task.queries())
        + len(llama.encode(label[1]))
    )
    taken = 1
    for n_fit, example in enumerate(reference_task.demonstrations(k, 1)):
        taken += len(llama.encode(reference_task.prompt(example) + label[example.label])) + 1
        if not taken + longest < n_ctx:
            return n_fit
    return k


@pytest.mark.parametrize("n_ctx", [200, 333, 512])
def test_reference_demonstrations_are_cut_to_what_fits_and_finetuning_to_the_same(
    llama: icl.Model, reference_task: icl.Task, n_ctx: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icl_dual.prompts.REFERENCE_CONTEXT", n_ctx)
    demonstrations, queries = reference_task.demonstrations(28, 1), reference_task.queries(5)
    whole = icl.build_prompts(llama, reference_task, demonstrations[:5], queries)
    prompts = icl.build_prompts(llama, reference_task, demonstrations, queries)
    n_fit = reference_fit(llama, reference_task, 28, n_ctx)
    assert 0 < n_fit < 28
    assert len(prompts.demonstrations) == n_fit
    assert prompts.training_sequences == prompts.demonstrations
    assert len(prompts.demonstration_label_lengths) == n_fit
    assert prompts.demonstrations[:5] == whole.demonstrations[:n_fit]
    mismatched = icl.build_prompts(llama, reference_task, demonstrations, queries, reference_k_mismatch=True)
    assert mismatched.demonstrations == prompts.demonstrations
    assert len(mismatched.training_sequences) == len(mismatched.demonstration_label_lengths) == 28
    assert mismatched.zero_shot() == prompts.zero_shot()


def test_the_cut_does_not_depend_on_the_number_of_queries(llama: icl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icl_dual.prompts.REFERENCE_CONTEXT", 300)
    query_rows = [{"text": f"{'very ' * (i % 9)}film {i}", "label": i % 2} for i in range(30)]
    task = icl.Task("t", "Text: {text} Label:", ("no", "perhaps"), make_rows(), query_rows, protocol="reference")
    few, all_of_them = (icl.build_prompts(llama, task, task.demonstrations(20, 1), task.queries(n)) for n in (2, None))
    assert max(map(len, few.queries)) < max(map(len, all_of_them.queries))
    assert few.demonstrations == all_of_them.demonstrations


def test_not_one_reference_demonstration_that_fits_is_an_error(
    llama: icl.Model, reference_task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icl_dual.prompts.REFERENCE_CONTEXT", 40)
    with pytest.raises(icl.PromptError, match="not even one demonstration fits"):
        icl.build_prompts(llama, reference_task, reference_task.demonstrations(3, 1), reference_task.queries(5))


def test_the_reference_protocol_takes_its_splits_as_they_are(llama: icl.Model, reference_task: icl.Task) -> None:
    demonstrations = reference_task.demonstrations(3, 1)
    prompts = icl.build_prompts(llama, reference_task, demonstrations, demonstrations)
    assert prompts.gold == tuple(example.label for example in demonstrations)


@pytest.fixture(scope="module")
def digits() -> icl.Task:
    """Another task: its own template, texts and labels."""
    rows = [{"digit": f"digit {i}", "label": i % 3} for i in range(40)]
    return icl.Task("digits", "Number: {digit} Class:", ("zero", "one", "two"), rows)


def test_demonstrations_of_another_task_have_its_template_and_words(
    llama: icl.Model, task: icl.Task, digits: icl.Task, prompts: Prompts
) -> None:
    others = digits.demonstrations(4, seed=1)
    got = icl.build_prompts(llama, task, others, task.queries(7), demonstration_task=digits)
    assert {example.label for example in others} >= {1, 2}, "a label index that the queries' task does not have"
    words = [digits.label_words[example.label] for example in others]
    texts = [f"Number: {dict(example.fields)['digit']} Class: {w}" for example, w in zip(others, words, strict=True)]
    assert [list(tokens) for tokens in got.demonstrations] == [llama.encode(text) for text in texts]
    assert list(got.demonstration_label_lengths) == [len(llama.encode(f" {word}")) for word in words]
    assert got.zero_shot() == prompts.zero_shot(), "the queries stay the task's"
    assert got.start + got.separator == prompts.start + prompts.separator


def test_the_task_itself_may_be_named_as_its_demonstrations(llama: icl.Model, task: icl.Task, prompts: Prompts) -> None:
    demonstrations, queries = task.demonstrations(4, seed=1), task.queries(7)
    assert icl.build_prompts(llama, task, demonstrations, queries, demonstration_task=task) == prompts


def test_another_tasks_demonstrations_count_towards_the_context(
    llama: icl.Model, task: icl.Task, digits: icl.Task
) -> None:
    others = digits.demonstrations(20, seed=1) * 2
    with pytest.raises(icl.PromptError, match=r"40 demonstrations take \d+ tokens"):
        icl.build_prompts(llama, task, others, task.queries(3), demonstration_task=digits)


def test_options_of_the_other_protocol_are_refused(llama: icl.Model, task: icl.Task, reference_task: icl.Task) -> None:
    with pytest.raises(icl.PromptError, match=r"by EOS, got separator='; '"):
        icl.build_prompts(
            llama, reference_task, reference_task.demonstrations(2, 1), reference_task.queries(2), separator="; "
        )
    with pytest.raises(icl.PromptError, match="reference_k_mismatch with a task of the reference protocol only"):
        icl.build_prompts(llama, task, task.demonstrations(2, 1), task.queries(2), reference_k_mismatch=True)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"queries": ((), (1,))}, "at least one token in each of the queries, got none in queries.0."),
    ({"labels": ((5,), ())}, "at least one token in each of the labels, got none in labels.1."),
    (
        {"demonstrations": ((1, 2), ())},
        "at least one token in each of the demonstrations, got none in demonstrations.1.",
    ),
    ({"queries": ([1, 2], (1,))}, r"expected queries as tuples of token ids, got \[1, 2\]"),
    ({"start": ("<s>",)}, r"expected start as tuples of token ids, got \('<s>',\)"),
    ({"queries": ((1,), (-1,))}, r"token ids from 0 to 299, the vocabulary of model, got \(-1,\) in queries"),
    ({"labels": ((5,), (300,))}, r"token ids from 0 to 299, the vocabulary of model, got \(300,\) in labels"),
    ({"queries": (), "gold": ()}, "expected at least one query and one label, got 0 queries and 2 labels"),
    ({"labels": (), "gold": (0, 0)}, "expected at least one query and one label, got 2 queries and 0 labels"),
    ({"gold": (0,)}, r"expected gold as a label index from 0 to 1 for each of 2 queries, got \(0,\)"),
    ({"gold": (0, 2)}, r"expected gold as a label index from 0 to 1 for each of 2 queries, got \(0, 2\)"),
    (
        {"demonstration_label_lengths": (1,)},
        r"for each demonstration, from 1 to its length in tokens \(2, 2\), got \(1,\)",
    ),
    ({"demonstration_label_lengths": (1, 3)}, r"from 1 to its length in tokens \(2, 2\), got \(1, 3\)"),
    ({"queries": ((1,) * 506, (2,))}, "at most 512 tokens, the context of model, got one of 513: use fewer or shorter"),
    ({"demonstrations": ((1,) * 512, (2, 3))}, "at most 512 tokens, the context of model, got one of 5"),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN)
@pytest.mark.parametrize("used", [icl.capture, partial(icl.finetune, lr=0.1)])
def test_prompts_made_by_hand_are_checked_before_anything_runs(
    make_model: Callable[..., icl.Model], damage: dict[str, Any], words: str, used: Callable
) -> None:
    model = make_model("llama", name="model")
    whole = icl.Prompts(
        start=(0,),
        demonstrations=((1, 2), (3, 4)),
        demonstration_label_lengths=(1, 1),
        separator=(9,),
        queries=((5,), (6,)),
        labels=((7,), (8,)),
        gold=(0, 1),
    )
    check_prompts(model, whole)
    broken = copy.copy(whole)
    for name, value in damage.items():
        object.__setattr__(broken, name, value)  # not by `replace`, whose types tests check
    with pytest.raises(icl.PromptError, match=words):
        used(model, broken, progress=False)


def test_a_model_that_is_not_wrapped_is_said(make_model: Callable[..., icl.Model], prompts: Prompts) -> None:
    unchecked: Any = getattr(check_prompts, "__wrapped__", check_prompts)
    with pytest.raises(TypeError, match=r"expected an icl_dual\.Model, got TransformerBridge: wrap it with"):
        unchecked(make_model("llama").wrapped, prompts)


def test_prompts_are_given_by_keyword_and_need_only_queries_labels_and_gold(llama: icl.Model) -> None:
    unchecked: Any = icl.Prompts
    with pytest.raises(TypeError, match="positional argument"):
        unchecked(((5,),), ((7,),), (0,))
    with pytest.raises(TypeError, match="gold"):
        unchecked(queries=((5,),), labels=((7,),))
    shortest = icl.Prompts(queries=((5,),), labels=((7,),), gold=(0,))
    check_prompts(llama, shortest)
    assert shortest == shortest.zero_shot()
    assert (shortest.prefix, shortest.suffixes, shortest.training_sequences) == ((), ((5,),), ())
    assert shortest.protocol == "answer"


def test_prompts_without_queries_can_be_shown() -> None:
    nothing = icl.Prompts(queries=(), labels=(), gold=())
    assert repr(nothing) == "Prompts(0 queries of 0 to 0 tokens, after 0 demonstrations in 0 tokens, protocol='answer')"
