from collections.abc import Callable

import pytest

import icl_dual as icl
from icl_dual.prompts import SEPARATOR, START, Prompts


def test_segments_say_whose_each_token_is(llama: icl.Model, task: icl.Task, prompts: Prompts) -> None:
    rebuilt = [llama.tokenizer.bos_token_id]
    owners = [START]
    shown = task.demonstrations(4, seed=1)
    for index, example in enumerate(shown):
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
    shown, asked = task.demonstrations(2, 0), task.queries(2)
    assert icl.build_prompts(model, task, shown, asked).separator == (model.tokenizer.eos_token_id,)
    assert icl.build_prompts(model, task, shown, asked, separator=" ; ").separator == tuple(model.encode(" ; "))


def test_too_long_a_context_is_refused_with_the_numbers(llama: icl.Model, task: icl.Task) -> None:
    with pytest.raises(icl.PromptError, match=r"30 demonstrations take \d+ tokens, .* llama reads at most 512"):
        icl.build_prompts(llama, task, task.demonstrations(30, seed=0), task.queries(3))


def test_queries_that_are_demonstrations_are_refused(llama: icl.Model, task: icl.Task) -> None:
    shown = task.demonstrations(3, seed=0)
    with pytest.raises(icl.PromptError, match=r"got 1 text\(s\) in both"):
        icl.build_prompts(llama, task, shown, [*task.queries(2), shown[1]])
    with pytest.raises(icl.PromptError, match="at least one query"):
        icl.build_prompts(llama, task, shown, [])


def test_no_demonstrations_at_all_is_the_zero_shot_setting(llama: icl.Model, task: icl.Task) -> None:
    prompts = icl.build_prompts(llama, task, [], task.queries(3))
    assert prompts == prompts.zero_shot()
