"""Prompts have the tokens of their whole text, on tokenizers of many families, and each token has one segment."""

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, get_args

import pytest
import torch
from helpers import FullPrompts, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, SlowTokenizer

import icl_dual as icl
from icl_dual.models.tokenization import tokenise
from icl_dual.prompts import SEPARATOR, START, check_prompts
from icl_dual.recordings import Recordings
from icl_dual.scoring import Scoring

START_TOKENS = {
    "gpt2": [],
    "llama2": ["<s>"],
    "llama3": ["<|begin_of_text|>"],
    "mistral": ["<s>"],
    "qwen": [],
    "gemma": ["<bos>"],
    "bloom": [],
    "t5": [],
    "chatglm": ["[gMASK]", "<sop>"],
}
"""What each family's template puts in front of a text."""
TEXTS: dict[str, dict[str, Any]] = {
    "plain": {"template": "Review: {text} Label:"},
    "ends in a field": {"template": "Film: {text}"},
    "begins with line breaks": {"template": "\n\nReview: {text}\nLabel:"},
    "ends in a space": {"template": "Review: {text} Label: "},
    "label on its own line": {"template": "{text}\nLabel:\n"},
    "labels in brackets": {"template": "{text} Label:", "label_words": ("(A)", "(B)")},
    "a blank line between": {"template": "Review: {text}\nLabel:", "separator": "\n\n"},
    "a space between": {"template": "Review: {text} Label:", "separator": " "},
    "a description": {"template": "Review: {text} Label:", "description": "Say it is good or bad.\n\n"},
    "no white space": {"template": "评论：{text}情感：", "label_words": ("负面", "正面"), "separator": "。"},
}
"""Tasks with boundaries that one family or another has no token border at."""
REFUSED = ("t5", "no white space")
"""The characters are not in its vocabulary: the end of the template and the label word are one unknown token."""
CASES = [(family, texts) for family in FAMILIES for texts in TEXTS if (family, texts) != REFUSED]


def task_of(template: str, label_words: tuple[str, ...] = ("Negative", "Positive"), **options: Any) -> icl.Task:
    return icl.Task("toy", template, label_words, make_rows(), **options)


def ids(model: icl.Model, text: str) -> list[int]:
    """A text's tokens as the tokenizer itself makes them, without what its template puts around."""
    return list(model.tokenizer(text, add_special_tokens=False).input_ids)


def text_of(task: icl.Task, demonstrations: list, query: Any) -> str:
    separator = "\n" if task.separator is None else task.separator
    context = "".join(task.prompt(example) + task.label_text(example.label) + separator for example in demonstrations)
    return task.description + context + task.prompt(query)


@pytest.mark.parametrize(("family", "texts"), CASES)
def test_every_prompt_has_the_tokens_of_its_whole_text(
    model_of: Callable[[str], icl.Model], family: str, texts: str
) -> None:
    model, task = model_of(family), task_of(**TEXTS[texts])
    demonstrations, queries = task.demonstrations(3, seed=1), task.queries(5)
    prompts = icl.build_prompts(model, task, demonstrations, queries)
    check_prompts(model, prompts)
    start = model.tokenizer.convert_tokens_to_ids(START_TOKENS[family])
    zero_shot = prompts.zero_shot()
    for index, query in enumerate(queries):
        for label, tokens in enumerate(prompts.labels):
            answer = task.label_text(label)
            in_context = [*prompts.prefix, *prompts.queries[index], *tokens]
            assert in_context == start + ids(model, text_of(task, demonstrations, query) + answer)
            alone = [*zero_shot.prefix, *zero_shot.queries[index], *tokens]
            assert alone == start + ids(model, text_of(task, [], query) + answer)
    for example, tokens, length in zip(
        demonstrations, prompts.training_sequences, prompts.demonstration_label_lengths, strict=True
    ):
        whole = start + ids(model, text_of(task, [], example) + task.label_text(example.label))
        assert [*prompts.start, *tokens] == whole
        assert tokens[-length:] == prompts.labels[example.label]
    assert zero_shot == icl.build_prompts(model, task, [], queries), "zero-shot prompts do not depend on demonstrations"


@pytest.mark.parametrize("family", FAMILIES)
def test_default_templates_end_where_the_label_is_predicted(model_of: Callable[[str], icl.Model], family: str) -> None:
    """Without white space at the end of the template, the query is all of its text, and nothing else."""
    model, task = model_of(family), task_of("Review: {text} Label:")
    demonstrations, queries = task.demonstrations(3, seed=1), task.queries(2)
    prompts = icl.build_prompts(model, task, demonstrations, queries)
    for index, query in enumerate(queries):
        whole = ids(model, text_of(task, demonstrations, query))
        assert [*prompts.prefix, *prompts.queries[index]] == [*prompts.start, *whole]
    if family != "t5":  # one space is all that it has between texts
        newline = model.tokenizer.convert_ids_to_tokens(list(prompts.separator))
        assert newline in (["Ċ"], ["<0x0A>"])
        assert prompts.separators == prompts.spanning == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_label_log_probs_are_those_of_a_plain_pass_over_the_text(
    model_of: Callable[[str], icl.Model], family: str
) -> None:
    model, task = model_of(family), task_of("\nReview: {text} Label:", ("no", "(A)"))
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(3)
    prompts = icl.build_prompts(model, task, demonstrations, queries)
    start = model.tokenizer.convert_tokens_to_ids(START_TOKENS[family])
    for setting, before in ((prompts, demonstrations), (prompts.zero_shot(), [])):
        got = icl.capture(model, setting, fields=(), progress=False).label_log_probs
        for index, query in enumerate(queries):
            text = text_of(task, before, query)
            for label in range(2):
                whole = torch.tensor([start + ids(model, text + task.label_text(label))])
                n_label = whole.shape[1] - len(start) - len(ids(model, text))
                with torch.no_grad():
                    log_probs = model.wrapped.original_model(whole).logits[0].log_softmax(-1)
                at = torch.arange(whole.shape[1] - n_label, whole.shape[1])
                expected = log_probs[at - 1, whole[0, at]].mean()
                assert abs(got[index, label] - expected) < 1e-5


@pytest.mark.parametrize(("family", "texts"), CASES)
def test_segments_are_the_texts_that_they_are_named_for(
    model_of: Callable[[str], icl.Model], family: str, texts: str
) -> None:
    """Letters and digits of a demonstration's tokens are those of its text; separators have none."""
    model, task = model_of(family), task_of(**TEXTS[texts])
    demonstrations = task.demonstrations(3, seed=1)
    prompts = icl.build_prompts(model, task, demonstrations, task.queries(4))

    def letters(tokens: Any) -> str:
        return "".join(filter(str.isalnum, model.tokenizer.decode(list(tokens)).replace("<unk>", "")))

    for example, tokens in zip(demonstrations, prompts.demonstrations, strict=True):
        text = task.prompt(example) + task.label_text(example.label)
        assert letters(tokens) == "".join(filter(str.isalnum, text))
    sources = prompts.segments.tolist()
    assert [source for source in dict.fromkeys(sources) if source >= 0] == [0, 1, 2]
    separators = [token for token, source in zip(prompts.prefix, sources, strict=True) if source == SEPARATOR]
    assert letters(separators) == ""
    assert len([source for source in sources if source == START]) == len(prompts.start)


BASELINES = ("baseline_queries", "zero_shot_baseline_queries", "scoring")
"""What a rule of scoring changes in prompts."""


@pytest.mark.parametrize("texts", ["plain", "ends in a field", "starts with a line break", "a description"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_changes_nothing_but_texts_without_content(
    model_of: Callable[[str], icl.Model], family: str, texts: str
) -> None:
    lines: dict[str, Any] = {"template": "\nReview: {text}\nLabel:", "separator": "\n\n"}
    model, task = model_of(family), task_of(**(TEXTS | {"starts with a line break": lines})[texts])
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(3)
    build = partial(icl.build_prompts, model, task, demonstrations, queries)
    mean = build(scoring="mean")
    without_content = {"unconditional": [task.unconditional_prompt], "calibrated": [*task.content_free_prompts]}
    for scoring in get_args(Scoring):
        prompts = build(scoring=scoring)
        for field in fields(icl.Prompts):
            if field.name not in BASELINES:
                assert getattr(prompts, field.name) == getattr(mean, field.name), (scoring, field.name)
        baselines = without_content.get(scoring, [])
        alone = [ids(model, task.description + text) for text in baselines]
        context = "" if scoring == "unconditional" else text_of(task, demonstrations, queries[0])
        context = context.removesuffix(task.prompt(queries[0])) or task.description
        in_context = [ids(model, context + text) for text in baselines]
        before = prompts.start if scoring == "unconditional" else prompts.prefix
        for start, got, expected in (
            (before, prompts.baseline_queries, in_context),
            (prompts.start, prompts.zero_shot().baseline_queries, alone),
        ):
            for tokens, whole in zip(got, expected, strict=True):
                read = [*start[len(model.start_tokens) :], *tokens]
                assert read == whole[: len(read)]
                assert not model.tokenizer.decode(whole[len(read) :]).strip(), "white space goes with the label"


def test_a_text_without_content_that_merges_with_the_separator_is_refused_by_name(
    model_of: Callable[[str], icl.Model],
) -> None:
    model, task = model_of("gpt2"), task_of("{text} Label:", separator="\n\n")
    build = partial(icl.build_prompts, model, task, task.demonstrations(2, seed=1), task.queries(3))
    assert build(scoring="unconditional").prefix == build().prefix
    with pytest.raises(icl.PromptError, match=r"the text without content ' Label:' to begin after the same tokens as"):
        build(scoring="calibrated")


def test_a_token_of_two_segments_belongs_to_that_of_its_first_letter_and_is_reported(
    model_of: Callable[[str], icl.Model],
) -> None:
    model, task = model_of("llama3"), task_of("{text} Label:", ("(A)", "(B)"))
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    assert (prompts.separator, prompts.separators) == ((), ())
    last = [model.tokenizer.convert_ids_to_tokens(tokens[-1]) for tokens in prompts.demonstrations]
    assert last == [")Ċ", ")Ċ"]
    assert [prompts.prefix[at] for at in prompts.spanning] == [tokens[-1] for tokens in prompts.demonstrations]
    assert [tokens[-1] for tokens in prompts.training_sequences] == [prompts.labels[0][-1]] * 2, "alone: no line break"
    assert "2 tokens span two segments, other demonstration tokens in training" in repr(prompts)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "bloom"])
def test_a_separator_within_the_next_token_is_reported_also_where_a_tokenizer_leaves_its_space_out(
    model_of: Callable[[str], icl.Model], family: str
) -> None:
    model, task = model_of(family), task_of("Label: {text} Review:", separator=" ")
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    whole = prompts.prefix + prompts.queries[0]
    spanning = [model.tokenizer.convert_ids_to_tokens(whole[position]) for position in prompts.spanning]
    assert spanning in (["ĠLabel"] * 2, ["ĠLabel:"] * 2)
    assert prompts.spanning[-1] == len(prompts.prefix), "the first token of the query"


def test_queries_without_a_text_before_their_field_share_the_longest_token_prefix(
    model_of: Callable[[str], icl.Model],
) -> None:
    """Line breaks in front of some texts are in one token with the separator, in front of others not."""
    rows = [{"text": f"{'' if i % 3 else chr(10)}good number {i}", "label": i % 2} for i in range(40)]
    task = icl.Task("t", "{text} Label:", ("no", "yes"), rows, strip_fields=False)
    model = model_of("llama3")
    demonstrations, queries = task.demonstrations(2, seed=1), task.queries(12)
    starts = {dict(query.fields)["text"][0] for query in queries}
    assert starts == {"\n", "g"}
    prompts = icl.build_prompts(model, task, demonstrations, queries)
    for index, query in enumerate(queries):
        whole = ids(model, text_of(task, demonstrations, query))
        assert [*prompts.prefix, *prompts.queries[index]] == [*prompts.start, *whole]
    wholes = [prompts.prefix + query for query in prompts.queries]
    assert len({whole[len(prompts.prefix)] for whole in wholes}) > 1, "not one token more is shared"


@pytest.mark.parametrize("family", ["llama2", "mistral"])
def test_settings_read_their_own_tokens_and_are_compared_on_those_that_both_have(
    model_of: Callable[[str], icl.Model], family: str
) -> None:
    """A first word has a "▁" alone that it has not after a line break."""
    model, task = model_of(family), task_of("Review: {text} Label:")
    demonstrations, queries = task.demonstrations(3, seed=1), task.queries(4)
    prompts = icl.build_prompts(model, task, demonstrations, queries)
    assert prompts.zero_shot_queries
    assert prompts.training_demonstrations
    assert prompts.training_demonstrations[0] == prompts.demonstrations[0], "it is first in both"
    assert "other query tokens zero-shot, other demonstration tokens in training" in repr(prompts)
    for pairs, a, b in zip(prompts.shared_query_tokens, prompts.queries, prompts.zero_shot_queries, strict=True):
        assert [a[in_context] for in_context, _ in pairs] == [b[alone] for _, alone in pairs]
        assert pairs[-1] == (len(a) - 1, len(b) - 1)
        assert len(pairs) >= min(len(a), len(b)) - 2
    experiment = icl.run_experiment(
        model, prompts, lr=0.05, fields=icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS, progress=False
    )
    recordings = experiment.recordings()
    plain = FullPrompts(model, prompts)
    attention = plain.attention(1)
    for layer in range(model.n_layers):
        q, k = (tensor[0] for tensor in (attention[layer].q, attention[layer].k))
        scores = (q[-1] * k.repeat_interleave(2, dim=1)).sum(-1) * 8**-0.5  # by position and head
        for at, (in_context, _) in enumerate(prompts.shared_query_tokens[1]):
            expected = scores[len(prompts.prefix) + in_context]
            torch.testing.assert_close(recordings.query_scores["ICL"][1, layer, :, at], expected, atol=1e-4, rtol=1e-4)
    check_recordings(recordings, prompts)
    assert len(experiment.compare(seed=0).to_frame().dropna(subset=["value"]))
    assert experiment.decompose().residuals.full_prompt.max() < 1e-4
    updates = experiment.updates(progress=False)
    for query in (0, 3):
        alone = experiment.in_context, experiment.zero_shot
        assert torch.isfinite(updates.cosine[query]).all(), alone


def check_recordings(recordings: Recordings, prompts: icl.Prompts) -> None:
    """Context and training tokens are paired, step by step: as many of each, and the same ids."""
    assert recordings.training_segments is not None
    flat = [token for tokens in prompts.training_sequences for token in (*prompts.start, *tokens)]
    for step in range(len(prompts.demonstrations)):
        in_context = [prompts.prefix[at] for at in (recordings.segments == step).nonzero().flatten()]
        in_training = [flat[at] for at in (recordings.training_segments == step).nonzero().flatten()]
        assert in_context == in_training
        assert len(in_context) >= len(prompts.demonstrations[step]) - 3
    assert recordings.query_lengths.tolist() == list(map(len, prompts.shared_query_tokens))


def test_updates_move_each_query_by_its_own_number_of_positions(
    model_of: Callable[[str], icl.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that demonstrations move by other numbers of positions run apart, and come back in their order."""
    model = model_of("llama2")
    rows = [{"text": f"{('Te', 'good', 'Positive')[i % 3]} number {i}", "label": i % 2} for i in range(40)]
    task = icl.Task("t", "{text} Label:", ("no", "yes"), rows)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(6))
    shifts = [len(a) - len(b) for a, b in zip(prompts.queries, prompts.zero_shot_queries, strict=True)]
    assert len(set(shifts)) > 1
    run = partial(icl.run_experiment, model, lr=0.05, fields=icl.DECOMPOSE_FIELDS, progress=False)
    updates = run(prompts).updates(progress=False)
    monkeypatch.setattr("icl_dual.updates.BATCH_SIZE", 1)
    one_by_one = run(prompts).updates(progress=False)
    torch.testing.assert_close(updates.cosine, one_by_one.cosine, atol=1e-5, rtol=1e-3)
    single = icl.build_prompts(
        model, task, task.demonstrations(2, seed=1), [task.queries(6)[shifts.index(min(shifts))]]
    )
    expected = run(single).updates(progress=False).cosine[0]
    torch.testing.assert_close(updates.cosine[shifts.index(min(shifts))], expected, atol=1e-5, rtol=1e-3)


def test_labels_without_tokens_of_their_own_are_refused_with_the_tokens(model_of: Callable[[str], icl.Model]) -> None:
    glued = icl.Task("t", "{text} fil", ("m", "n"), make_rows(), label_separator="")
    with pytest.raises(icl.PromptError, match=r"tokens of their own, got \[.*'Ġfilm'\] for the end of"):
        icl.build_prompts(model_of("gpt2"), glued, [], glued.queries(2))
    family, texts = REFUSED
    unknown = task_of(**TEXTS[texts])
    with pytest.raises(icl.PromptError, match=r"tokens of their own, got \[.*'<unk>'\] for the end of"):
        icl.build_prompts(model_of(family), unknown, [], unknown.queries(2))


def test_labels_that_share_all_tokens_are_refused_with_the_tokens(model_of: Callable[[str], icl.Model]) -> None:
    unknown = task_of("Review: {text} Label:", ("ß", "ø"))
    with pytest.raises(
        icl.PromptError, match=r"with different tokens, got \[\(\d+, 2\), \(\d+, 2\)\] for \['ß', 'ø'\]"
    ):
        icl.build_prompts(model_of("t5"), unknown, [], unknown.queries(2))


def test_labels_with_other_tokens_after_another_query_are_refused(model_of: Callable[[str], icl.Model]) -> None:
    rows = [{"text": f"good {i}{'' if i % 4 else ' L'}", "label": i % 2} for i in range(40)]
    task = icl.Task("t", "{text}", ("abel", "no"), rows, label_separator="")
    with pytest.raises(
        icl.PromptError, match=r"label words with (the same tokens after every query|tokens of their own)"
    ):
        icl.build_prompts(model_of("gpt2"), task, [], task.queries(12))


def test_a_separator_that_merges_with_demonstration_and_query_is_refused(model_of: Callable[[str], icl.Model]) -> None:
    task = icl.Task("t", "Label{text} Te", ("xt:", "no"), make_rows(), label_separator="", separator="")
    with pytest.raises(icl.PromptError, match=r"expected (demonstrations|label words|a query) with"):
        icl.build_prompts(model_of("bloom"), task, task.demonstrations(2, 1), task.queries(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_start_tokens_are_the_templates_and_come_once(model_of: Callable[[str], icl.Model], family: str) -> None:
    model = model_of(family)
    start = START_TOKENS[family]
    assert model.tokenizer.convert_ids_to_tokens(model.start_tokens) == start
    task = task_of("".join(start) + "Review: {text} Label:")
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    assert list(prompts.start) == model.start_tokens
    for name in start:
        token = model.tokenizer.convert_tokens_to_ids(name)
        zero_shot = prompts.zero_shot()
        assert (*zero_shot.prefix, *zero_shot.queries[0]).count(token) == 1
        assert (*prompts.prefix, *prompts.queries[0]).count(token) == 3, "as often as the text has it"
        assert all((*prompts.start, *tokens).count(token) == 1 for tokens in prompts.training_sequences)
    end = model.tokenizer.eos_token_id
    if end not in model.start_tokens:
        assert end not in prompts.prefix + prompts.queries[0]


def test_start_overrides_what_the_template_puts_in_front(model_of: Callable[[str], icl.Model]) -> None:
    model, task = model_of("llama2"), task_of("Review: {text} Label:")
    build = partial(icl.build_prompts, model, task, task.demonstrations(2, seed=1), task.queries(2))
    usual = build()
    assert (build(start="").start, build(start=()).start) == ((), ())
    assert build(start="</s><s>").start == build(start=[2, 1]).start == (2, 1)
    for start in ("", [2, 1]):
        other = build(start=start)
        assert (other.demonstrations, other.queries) == (usual.demonstrations, usual.queries)
    after_word = build(start=[2, usual.zero_shot().queries[0][0]])
    assert after_word.zero_shot().queries == usual.zero_shot().queries, "the first word stays in the text"
    captured = icl.capture(model, build(start=()), fields=icl.DECOMPOSE_FIELDS, progress=False)
    zero_shot = icl.capture(model, build(start=()).zero_shot(), fields=icl.DECOMPOSE_FIELDS, progress=False)
    assert icl.decompose(model, zero_shot=zero_shot, in_context=captured).groups[1] == "start"
    reference = icl.Task("t", "{text} Label:", ("no", "yes"), make_rows(), protocol="reference")
    with pytest.raises(icl.PromptError, match="neither start nor chat under the reference protocol"):
        icl.build_prompts(model, reference, [], reference.queries(2), start="")


class TestSlowTokenizers:
    def test_clean_borders_need_no_offsets(self, model_of: Callable[[str], icl.Model]) -> None:
        model = icl.Model(model_of("gpt2").wrapped, name="slow", tokenizer=SlowTokenizer(merged=("oo", " L", " n")))
        assert not model.tokenizer.is_fast
        task = task_of("{text} Label:", ("no", "yes"))
        demonstrations, queries = task.demonstrations(2, seed=1), task.queries(3)
        prompts = icl.build_prompts(model, task, demonstrations, queries)
        for index, query in enumerate(queries):
            whole = ids(model, text_of(task, demonstrations, query))
            assert [*prompts.prefix, *prompts.queries[index]] == whole
        for example, tokens in zip(demonstrations, prompts.demonstrations, strict=True):
            assert list(tokens) == ids(model, task.prompt(example) + task.label_text(example.label))

    def test_white_space_goes_with_what_follows(self, model_of: Callable[[str], icl.Model]) -> None:
        model = icl.Model(model_of("gpt2").wrapped, name="slow", tokenizer=SlowTokenizer(merged=(" R",)))
        task = task_of("Review: {text} Label:", ("no", "yes"), separator=" ")
        prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
        assert prompts.separators == prompts.separator == ()
        assert len(prompts.spanning) == 2

    def test_letters_of_two_segments_in_one_token_are_refused(self, model_of: Callable[[str], icl.Model]) -> None:
        model = icl.Model(model_of("gpt2").wrapped, name="slow", tokenizer=SlowTokenizer(merged=("s\n", "o\n")))
        task = task_of("{text} Label:", ("no", "yes"))
        with pytest.raises(
            icl.UnsupportedModelError, match=r"says which characters each token covers.* got the tokens"
        ):
            icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))


def test_a_tokenizer_with_tokens_added_in_memory_is_used_as_it_is(model_of: Callable[[str], icl.Model]) -> None:
    tokenizer = FAMILIES["gpt2"].__wrapped__()  # pyright: ignore[reportFunctionMemberAccess] - not the shared one
    tokenizer.add_tokens(["<lab0>", "<lab1>"])
    bridge = model_of("gpt2").wrapped
    task = task_of("{text} Label:", ("<lab0>", "<lab1>"))
    model = icl.Model(bridge, tokenizer=tokenizer)
    prompts = icl.build_prompts(model, task, [], task.queries(2))
    added = [tokenizer.convert_tokens_to_ids(word) for word in task.label_words]
    assert [tokens[-1] for tokens in prompts.labels] == added
    control = icl.control_model(model, "untrained", seed=1)
    assert control.tokenizer is tokenizer


@pytest.fixture(scope="module")
def model_without_added_tokens(model_of: Callable[[str], icl.Model]) -> Callable[[int], icl.Model]:
    """A model with embeddings for more tokens than its tokenizer has."""

    def build(d_vocab: int) -> icl.Model:
        model = icl.Model(model_of("gpt2").wrapped, name=f"with {d_vocab} embeddings")
        model.d_vocab = d_vocab
        return model

    return build


@pytest.mark.parametrize(
    ("lost", "options"),
    [
        ("<lab0>", {"label_words": ("<lab0>", "<lab1>")}),
        ("<lab0>", {"label_words": ("<lab0>!", "<lab1>!")}),
        ("[SEP]", {"template": "{text} [SEP] Label:"}),
        ("<sep>", {"separator": "<sep>\n"}),
        ("<task>", {"description": "<task> Say it is good or bad.\n"}),
        ("<is>", {"label_separator": " <is> "}),
    ],
)
def test_texts_like_tokens_that_the_tokenizer_lost_are_refused(
    model_without_added_tokens: Callable[[int], icl.Model], lost: str, options: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"template": "{text} Label:"} | options
    task = task_of(**arguments)
    model = model_without_added_tokens(632)  # a multiple of 8, as by chance
    with pytest.raises(icl.PromptError, match=rf"one token for '{re.escape(lost)}', got .*pass yours as tokenizer="):
        icl.build_prompts(model, task, [], task.queries(2))
    other = task_of("{text} Label:")
    with pytest.raises(icl.PromptError, match=r"one token for '<end>', got .*pass yours as tokenizer="):
        icl.build_prompts(model, other, [], other.queries(2), separator="<end>")
    given = icl.Model(model.wrapped, tokenizer=FAMILIES["gpt2"]())
    given.d_vocab = 632
    icl.build_prompts(given, task, [], task.queries(2))


def test_fewer_tokens_than_embeddings_are_warned_of_once(
    model_without_added_tokens: Callable[[int], icl.Model], caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of("{text} Label:", ("LAB0", "LAB1"))
    model = model_without_added_tokens(633)
    for _ in range(2):
        icl.build_prompts(model, task, [], task.queries(2))
    (record,) = caplog.records
    sizes = f"{model.name} has embeddings for 633 tokens, and a tokenizer of {len(model.tokenizer)}."
    assert record.getMessage().startswith(sizes)
    assert "pass yours as tokenizer=" in record.getMessage()


def test_padded_vocabularies_are_not_warned_of(
    model_without_added_tokens: Callable[[int], icl.Model], caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of("<review> {text} Label:", ("LAB0", "[1]"))
    for d_vocab in (640, 704, 49152, 262144):
        icl.build_prompts(model_without_added_tokens(d_vocab), task, [], task.queries(2))
    assert not caplog.records


unicode_text = st.text(
    st.characters(exclude_categories=("Cs", "Co", "Cn")) | st.sampled_from(" \n:.()ABgod"), min_size=1, max_size=30
)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
@settings(max_examples=40, deadline=None)
@given(before=unicode_text, after=unicode_text)
def test_cuts_agree_with_the_tokens_of_what_is_before(family: str, before: str, after: str) -> None:
    """Where a text's tokens go on from those of its beginning, the cut is between the two; else a token spans it."""
    tokenizer = FAMILIES[family]()
    (text,) = tokenise(tokenizer, [before + after])
    beginning = tuple(tokenizer(before, add_special_tokens=False).input_ids)
    cut = text.cut(len(before))
    assert 0 <= cut.n_before <= len(text.tokens)
    clean = text.tokens[: len(beginning)] == beginning
    if clean and cut.spanning is None:
        assert cut.n_before == len(beginning)
    if cut.spanning is not None:
        assert cut.n_before - cut.spanning in (0, 1)
    cuts = [text.cut(position).n_before for position in range(len(text.text) + 1)]
    assert cuts == sorted(cuts)
    assert (cuts[0], cuts[-1]) == (0, len(text.tokens))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(
    texts=st.lists(
        unicode_text.filter(str.strip), min_size=5, max_size=5, unique_by=lambda t: " ".join(t.split()).casefold()
    )
)
def test_prompts_of_any_text_have_its_tokens_or_are_refused(
    model_of: Callable[[str], icl.Model], family: str, texts: list[str]
) -> None:
    model = model_of(family)
    rows = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    padding = [{"text": f"good {index}", "label": index % 2} for index in range(40)]
    task = icl.Task("t", "{text} Label:", ("no", "yes"), padding, rows)
    queries = task.queries()
    demonstrations = task.demonstrations(2, seed=0)
    try:
        prompts = icl.build_prompts(model, task, demonstrations, queries)
    except icl.PromptError:
        if family != "t5":  # where unknown characters are one token with the label
            raise
        return
    start = model.tokenizer.convert_tokens_to_ids(START_TOKENS[family])
    for index, query in enumerate(queries):
        whole = start + ids(model, text_of(task, demonstrations, query))
        assert [*prompts.prefix, *prompts.queries[index]] == whole
        alone = start + ids(model, text_of(task, [], query))
        assert [*prompts.start, *prompts.zero_shot().queries[index]] == alone
