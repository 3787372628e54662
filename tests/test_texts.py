"""Prompts as chats have the tokens of the tokenizer's own chat template."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_rows
from tokenizer_families import FAMILIES, REASONING_CHAT
from transformers import AutoTokenizer

import icl_dual as icl
from icl_dual import assets
from icl_dual.prompts import check_prompts

CHATTING = ("llama2", "llama3", "mistral", "qwen", "gemma")
DEMONSTRATIONS = ("turns", "user turn")


@pytest.fixture(scope="module")
def task() -> icl.Task:
    return icl.Task("toy", "Review: {text}\nLabel:", ("Negative", "Positive"), make_rows())


def turns_of(task: icl.Task, demonstrations: list, query: Any, chat: icl.Chat) -> list[dict[str, str]]:
    """The messages that a chat is meant to have."""
    messages = [{"role": "system", "content": chat.system}] if chat.system else []
    if chat.demonstrations == "user turn":
        context = "".join(f"{task.prompt(example)} {task.label_words[example.label]}\n" for example in demonstrations)
        return [*messages, {"role": "user", "content": context + task.prompt(query)}]
    for example in demonstrations:
        messages.append({"role": "user", "content": task.prompt(example)})
        messages.append({"role": "assistant", "content": task.label_words[example.label]})
    return [*messages, {"role": "user", "content": task.prompt(query)}]


def template_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    options = {"add_generation_prompt": True} | options
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options).input_ids)


def answered_ids(model: icl.Model, messages: list[dict[str, str]], word: str, chat: icl.Chat) -> list[int]:
    """The tokens of a chat with an answer, by the chat template where it writes the same before an answer."""
    if model.name == "mistral" and chat.system:  # its template then leaves the system prompt out
        text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(model.tokenizer(f"{text} {word}", add_special_tokens=False).input_ids)
    answered = [*messages, {"role": "assistant", "content": word}]
    return template_ids(model.tokenizer, answered, add_generation_prompt=False, **chat.options)


def check_chat(
    model: icl.Model, task: icl.Task, prompts: icl.Prompts, demonstrations: list, queries: list, chat: icl.Chat
) -> None:
    """Every prompt of a chat against the chat template's own tokens, with the label where the assistant answers."""
    tokenizer, zero_shot = model.tokenizer, prompts.zero_shot()
    for index, query in enumerate(queries):
        for setting, before in ((prompts, demonstrations), (zero_shot, [])):
            got = [*setting.prefix, *setting.queries[index]]
            messages = turns_of(task, before, query, chat)
            assert got == template_ids(tokenizer, messages, **chat.options)
            for label, tokens in enumerate(prompts.labels):
                whole = answered_ids(model, messages, task.label_words[label], chat)
                assert whole[: len(got) + len(tokens)] == [*got, *tokens]
                assert tokenizer.decode(list(tokens)).strip() == task.label_words[label]
    for example, tokens, length in zip(
        demonstrations, prompts.training_sequences, prompts.demonstration_label_lengths, strict=True
    ):
        own_chat = turns_of(task, [], example, chat)
        whole = answered_ids(model, own_chat, task.label_words[example.label], chat)
        got = [*prompts.start, *tokens]
        assert whole[: len(got)] == got
        assert tokens[-length:] == prompts.labels[example.label]


@pytest.mark.parametrize("system", [None, "You classify."])
@pytest.mark.parametrize("where", DEMONSTRATIONS)
@pytest.mark.parametrize("family", CHATTING)
def test_chats_have_the_tokens_of_the_chat_template(
    model_of: Callable[[str], icl.Model], task: icl.Task, family: str, where: Any, system: str | None
) -> None:
    model, chat = model_of(family), icl.Chat(system=system, demonstrations=where)
    demonstrations, queries = task.demonstrations(3, seed=1), task.queries(4)
    if (family, system) == ("gemma", "You classify."):
        with pytest.raises(
            icl.PromptError, match=r"takes the roles \['system', 'user'.*System role not supported: leave"
        ):
            icl.build_prompts(model, task, demonstrations, queries, chat=chat)
        return
    prompts = icl.build_prompts(model, task, demonstrations, queries, chat=chat)
    check_prompts(model, prompts)
    check_chat(model, task, prompts, demonstrations, queries, chat)
    zero_shot, alone = prompts.zero_shot(), icl.build_prompts(model, task, [], queries, chat=chat)
    wholes = [[setting.prefix + query for query in setting.queries] for setting in (zero_shot, alone)]
    assert wholes[0] == wholes[1]
    if (family, where, system) != ("mistral", "turns", "You classify."):  # else the context begins without the system's
        assert zero_shot == alone
    bos = model.tokenizer.bos_token_id
    if bos is not None and family != "llama2":  # its template writes one before every turn of the user
        assert (*prompts.prefix, *prompts.queries[0]).count(bos) == 1
    if system is not None and family != "mistral":
        assert system in model.tokenizer.decode(list(prompts.start)), "every sequence begins with the system prompt"


@pytest.mark.parametrize("where", DEMONSTRATIONS)
def test_the_packaged_model_is_written_to_as_it_was_trained(model_of: Callable[[str], icl.Model], where: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.model_files("smollm2-135m", None).folder)
    model = icl.Model(model_of("qwen").wrapped, name="smollm2", tokenizer=tokenizer)
    task = icl.Task("toy", "Review: {text}\nLabel:", ("negative", "positive"), make_rows())
    demonstrations, queries = task.demonstrations(3, seed=1), task.queries(4)
    prompts = icl.build_prompts(model, task, demonstrations, queries, chat=(chat := icl.Chat(demonstrations=where)))
    check_chat(model, task, prompts, demonstrations, queries, chat)
    text = tokenizer.decode([*prompts.prefix, *prompts.queries[0], *prompts.labels[0]])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("Label:<|im_end|>\n<|im_start|>assistant\nnegative")
    assert text.count("<|im_start|>system") == 1
    assert len(prompts.labels[0]) == 1


@pytest.mark.parametrize("where", DEMONSTRATIONS)
def test_label_log_probs_of_a_chat_are_those_of_a_plain_pass(
    model_of: Callable[[str], icl.Model], task: icl.Task, where: Any
) -> None:
    model, chat = model_of("llama3"), icl.Chat(system="You classify.", demonstrations=where)
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(3)
    prompts = icl.build_prompts(model, task, demonstrations, queries, chat=chat)
    got = icl.capture(model, prompts, fields=(), progress=False).label_log_probs
    for index, query in enumerate(queries):
        before = template_ids(model.tokenizer, turns_of(task, demonstrations, query, chat))
        for label, word in enumerate(task.label_words):
            tokens = list(model.tokenizer(word, add_special_tokens=False).input_ids)
            with torch.no_grad():
                log_probs = model.wrapped.original_model(torch.tensor([before + tokens])).logits[0].log_softmax(-1)
            expected = sum(log_probs[len(before) - 1 + at, token] for at, token in enumerate(tokens)) / len(tokens)
            assert abs(got[index, label] - expected) < 1e-5


def test_a_chat_runs_through_an_experiment(model_of: Callable[[str], icl.Model], task: icl.Task) -> None:
    model = model_of("mistral")
    chat = icl.Chat(system="You classify.")
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(3), chat=chat)
    assert prompts.training_demonstrations, "the system prompt is in the last turn of the user"
    fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
    experiment = icl.run_experiment(model, prompts, lr=0.05, fields=fields, progress=False)
    assert len(experiment.compare(seed=0).to_frame().dropna(subset=["value"]))
    assert experiment.decompose().residuals.full_prompt.max() < 1e-4


def test_the_tasks_description_is_a_part_of_the_system_prompt(model_of: Callable[[str], icl.Model]) -> None:
    task = icl.Task("t", "{text}", ("no", "yes"), make_rows(), description="Say if it is good.")
    model, build = model_of("qwen"), icl.build_prompts
    for system, expected in ((None, "Say if it is good."), ("Hello.", "Hello.\n\nSay if it is good.")):
        prompts = build(model, task, task.demonstrations(1, 1), task.queries(2), chat=icl.Chat(system=system))
        chat = icl.Chat(system=expected)
        check_chat(model, task, prompts, task.demonstrations(1, 1), task.queries(2), chat)


@pytest.mark.parametrize("system", ["", "{{ m['content'] | upper }}"])
@pytest.mark.parametrize("where", DEMONSTRATIONS)
def test_a_chat_template_without_the_system_prompt_is_refused(
    model_of: Callable[[str], icl.Model], task: icl.Task, system: str, where: Any
) -> None:
    tokenizer = FAMILIES["qwen"].__wrapped__()  # pyright: ignore[reportFunctionMemberAccess] - not the shared one
    turn = (
        f"{{% if m['role'] == 'system' %}}{system}{{% else %}}{{{{ m['role'] + ': ' + m['content'] }}}}{{% endif %}}\n"
    )
    prompt = "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}"
    model = icl.Model(model_of("qwen").wrapped, tokenizer=tokenizer)
    examples = task.demonstrations(2, seed=1), task.queries(2)
    icl.build_prompts(model, task, *examples, chat=icl.Chat(demonstrations=where))
    with pytest.raises(icl.PromptError, match=r"the system prompt as it is, got a chat without 'Be brief\.': leave"):
        icl.build_prompts(model, task, *examples, chat=icl.Chat(system="Be brief.", demonstrations=where))


def test_reasoning_before_the_answer_is_refused_until_it_is_switched_off(
    model_of: Callable[[str], icl.Model], task: icl.Task
) -> None:
    tokenizer = FAMILIES["qwen"].__wrapped__()  # pyright: ignore[reportFunctionMemberAccess] - not the shared one
    tokenizer.chat_template = REASONING_CHAT
    model = icl.Model(model_of("qwen").wrapped, tokenizer=tokenizer)
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(2)
    with pytest.raises(icl.PromptError, match=r"right after its generation prompt, got .*enable_thinking"):
        icl.build_prompts(model, task, demonstrations, queries, chat=icl.Chat())
    chat = icl.Chat(options={"enable_thinking": False})
    prompts = icl.build_prompts(model, task, demonstrations, queries, chat=chat)
    check_chat(model, task, prompts, demonstrations, queries, chat)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "with a chat template where chat is given, got one without"),
        ("{{ messages[-1]['content'] }}", r"each of 5 turns once and in order, got turns \['4'\]"),
        ("{{ messages[0]['content'] }}", "right after its generation prompt, got a prompt that ends in"),
        (
            "{% for message in messages %}{% if loop.revindex < 3 %}{{ message['content'] }}{% endif %}{% endfor %}",
            r"each of 5 turns once and in order, got turns \['3', '4'\]: use Chat\(demonstrations='user turn'\)",
        ),
        (
            "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}",
            r"the text of a turn as it is, .* got 'EVIEW: .* for 'eview: ",
        ),
        (
            "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ raise_exception('one turn') }}"
            "{% endif %}{{ message['content'] }}{% endfor %}",
            r"takes the roles \['user', 'assistant'\], got: one turn: use Chat\(demonstrations='user turn'\)",
        ),
    ],
)
def test_chat_templates_that_cannot_write_the_prompts_are_refused(
    model_of: Callable[[str], icl.Model], task: icl.Task, template: str | None, words: str
) -> None:
    tokenizer = FAMILIES["qwen"].__wrapped__()  # pyright: ignore[reportFunctionMemberAccess] - not the shared one
    tokenizer.chat_template = template
    model = icl.Model(model_of("qwen").wrapped, tokenizer=tokenizer)
    with pytest.raises(icl.PromptError, match=words):
        icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2), chat=icl.Chat())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"tool": "x"}, r"writes turns with text as content, got: .*multiple chat templates.*'chat_template'"),
        (
            "{% for m in messages %}{{ m['role'] + m['content'][0]['text'] }}{% endfor %}",
            "writes turns with text as content, got: 'str object' has no attribute 'text': correct the template",
        ),
        ("{% for m in messages %}{{ m['role'] + 1 }}{% endfor %}", "got: can only concatenate str .*: correct"),
        ("{% for m in messages %}{{ m['role'] ", "got: unexpected end of template.*: correct the template"),
        ("{{ messages[0]['content'] % 0 }}{{ 1 // 0 }}", r"writes turns with text as content, got: .*: correct"),
        ("{{ raise_exception('no chats') }}", r"takes the roles \['user'\], got: no chats: leave chat out, or load"),
        ("nothing", r"each of 1 turns once and in order, got turns \[\]: leave chat out, or load|right after its"),
    ],
)
@pytest.mark.parametrize("where", DEMONSTRATIONS)
def test_chat_templates_that_do_not_fit_are_refused_without_advice_that_cannot_help(
    model_of: Callable[[str], icl.Model], task: icl.Task, template: Any, message: str, where: Any
) -> None:
    """Without demonstrations, or with all of them in one turn, another place for them is no help."""
    tokenizer = FAMILIES["qwen"].__wrapped__()  # pyright: ignore[reportFunctionMemberAccess] - not the shared one
    tokenizer.chat_template = template
    model = icl.Model(model_of("qwen").wrapped, tokenizer=tokenizer)
    demonstrations = task.demonstrations(2, seed=1) if where == "user turn" else []
    chat = icl.Chat(demonstrations=where)
    with pytest.raises(icl.PromptError, match=message) as refusal:
        icl.build_prompts(model, task, demonstrations, task.queries(2), chat=chat)
    assert "user turn" not in str(refusal.value)


def test_one_of_several_chat_templates_is_named_by_options(
    model_of: Callable[[str], icl.Model], task: icl.Task
) -> None:
    tokenizer = FAMILIES["qwen"].__wrapped__()  # pyright: ignore[reportFunctionMemberAccess] - not the shared one
    template = tokenizer.chat_template
    tokenizer.chat_template = {"plain": template}
    model = icl.Model(model_of("qwen").wrapped, tokenizer=tokenizer)
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(2)
    chat = icl.Chat(options={"chat_template": "plain"})
    check_chat(
        model,
        task,
        icl.build_prompts(model, task, demonstrations, queries, chat=chat),
        demonstrations,
        queries,
        chat,
    )


def test_advice_is_for_what_the_template_may_refuse(model_of: Callable[[str], icl.Model], task: icl.Task) -> None:
    """A template without answers has all of the demonstrations in one turn."""
    tokenizer = FAMILIES["qwen"].__wrapped__()  # pyright: ignore[reportFunctionMemberAccess] - not the shared one
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + ';' }}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    model = icl.Model(model_of("qwen").wrapped, tokenizer=tokenizer)
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(2)
    with pytest.raises(icl.PromptError, match=r"takes the roles \['user', 'assistant'\], got: no answers: use Chat\("):
        icl.build_prompts(model, task, demonstrations, queries, chat=icl.Chat())
    both = r"got: no answers: leave out system .*; or use Chat\(demonstrations='user turn'\)"
    with pytest.raises(icl.PromptError, match=both):
        icl.build_prompts(model, task, demonstrations, queries, chat=icl.Chat(system="You classify."))
    chat = icl.Chat(demonstrations="user turn")
    for before in (demonstrations, []):
        prompts = icl.build_prompts(model, task, before, queries, chat=chat)
        text = tokenizer.decode([*prompts.prefix, *prompts.queries[0], *prompts.labels[0]])
        assert text.endswith("Label:;A:Negative")


def test_white_space_around_a_turn_may_be_left_out(model_of: Callable[[str], icl.Model]) -> None:
    """Llama-3's template trims turns: prompts have what it writes, and the label right after it."""
    task = icl.Task("t", "\n Review: {text} Label: \n", ("no", "yes"), make_rows())
    model = model_of("llama3")
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(2)
    for where in DEMONSTRATIONS:
        chat: Any = icl.Chat(demonstrations=where)
        prompts = icl.build_prompts(model, task, demonstrations, queries, chat=chat)
        text = model.tokenizer.decode([*prompts.prefix, *prompts.queries[0]])
        start, end = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>"
        assert text.startswith(f"{start}Review: ")
        assert text.endswith(f" Label:{end}assistant<|end_header_id|>\n\n")


def test_a_chat_says_which_demonstrations_it_knows() -> None:
    unchecked: Any = icl.Chat
    with pytest.raises(Exception, match=r"demonstrations|turns"):
        unchecked(demonstrations="system")
