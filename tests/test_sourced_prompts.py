"""Prompts of named sources: every token has one, and borders within tokens are refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import icl_dual as icl
from icl_dual.models import tiny_model
from icl_dual.sourced_prompts import SourcedPrompt
from icl_dual.texts import PromptError

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, with the space before it."""
    vocabulary = {"<s>": 0, "Ġred": 1, "red": 2, "Ġbox": 3, "box": 4, "Ġ": 5, "reds": 6, "Ċ": 7}
    merges = [("r", "e"), ("re", "d"), ("b", "o"), ("bo", "x"), ("Ġ", "red"), ("Ġ", "box"), ("red", "s")]
    pieces = {piece for pair in merges for piece in (*pair, "".join(pair))} | set("redboxsa")
    vocabulary |= {piece: len(vocabulary) + index for index, piece in enumerate(sorted(pieces - vocabulary.keys()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(("a", "b", "c")), TEXT), min_size=1, max_size=5))
def test_parts_cover_the_tokens_of_the_joined_text(parts: list[tuple[str, str]]) -> None:
    model = tiny_model()
    prompt = icl.prompt_from_parts(parts, model, start=[0])
    text = "".join(text for _, text in parts)
    assert prompt.tokens == (0, *model.encode(text))
    expected = ["start token", *(name for name, text in parts for _ in text.encode())]  # a token is a byte
    assert [prompt.names[source] for source in prompt.sources] == expected
    assert prompt.text == "<s>" + text
    for name in prompt.names:
        positions = [position for span in prompt.spans(name) for position in range(*span)]
        assert positions == [position for position, of in enumerate(expected) if of == name]


def test_white_space_belongs_to_the_text_in_one_token_with_it() -> None:
    prompt = icl.prompt_from_parts([("a", "red "), ("b", "box")], words_tokenizer(), start="")
    assert prompt.tokens == (2, 3)
    assert prompt.spans("b") == [(1, 2)]
    assert prompt.texts == ("red", " box")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(("a", "\nb"), [("a\n", "x"), ("b", "y")]), (("b\n", "\na"), [("b", "x"), ("\n\n", "x"), ("a", "y")])],
)
def test_white_space_belongs_to_the_text_before_in_one_token_with_it_and_alone_to_its_first_character(
    parts: tuple[str, str], expected: list[tuple[str, str]]
) -> None:
    merges = [("a", "Ċ"), ("Ċ", "Ċ")]
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ċ": 2, "aĊ": 3, "ĊĊ": 4}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    prompt = icl.prompt_from_parts(list(zip("xy", parts, strict=True)), fast, start="")
    sources = [prompt.names[source] for source in prompt.sources]
    assert list(zip(prompt.texts, sources, strict=True)) == expected


def test_a_border_within_a_token_is_refused_with_its_text_and_position() -> None:
    with pytest.raises(
        PromptError, match=r"a border within ' box', token 1 of the text, after character 6 \('red bo'\)"
    ):
        icl.prompt_from_parts([("a", "red bo"), ("b", "x")], words_tokenizer())
    with pytest.raises(PromptError, match="a border within ' box', token 1"):
        icl.prompt_from_text("red box", {"a": (0, 5)}, words_tokenizer())


def test_the_start_token_is_not_repeated_and_is_a_source_of_its_own() -> None:
    prompt = icl.prompt_from_parts([("a", "<s>red")], words_tokenizer(), start="<s>")
    assert prompt.tokens == (0, 2)
    assert prompt.names == ("start token", "a")
    assert prompt.sources == (0, 1)


@pytest.mark.parametrize(("text", "start"), [("old times", "hello"), ("lo", "hello"), ("<s>red", "the <s>r")])
def test_words_that_begin_like_the_end_of_the_start_stay_in_the_text(text: str, start: str) -> None:
    prompt = icl.prompt_from_parts([("a", text)], tiny_model(), start=start)
    assert prompt.text == start + text
    assert "".join(prompt.texts[slice(*prompt.spans("a")[0])]) == text


def test_special_tokens_that_end_the_start_are_not_repeated(model_of: Callable[[str], icl.Model]) -> None:
    model = model_of("chatglm")
    for text in ("The box", "<sop>The box", "[gMASK]<sop>The box"):
        assert icl.prompt_from_parts([("a", text)], model).text == "[gMASK]<sop>The box"
    assert icl.prompt_from_parts([("a", "<s>red")], tiny_model(), start="the <s>").text == "the <s>red"
    assert icl.prompt_from_parts([("a", "hello you")], tiny_model(), start="hello").text == "hello you", "all of it"


def test_expressions_and_ranges_name_sources_and_the_rest_is_one() -> None:
    text = "Review: fine. Label: good\nReview: dull. Label: bad\n"
    sources = {"label": r"Label: (\w+)", "first": (8, 13), "pairs": [(0, 6), (26, 32)]}
    prompt = icl.prompt_from_text(text, sources, tiny_model(), start="")
    assert ["".join(prompt.texts[a:b]) for a, b in prompt.spans("label")] == ["good", "bad"]
    assert ["".join(prompt.texts[a:b]) for a, b in prompt.spans("first")] == ["fine."]
    assert ["".join(prompt.texts[a:b]) for a, b in prompt.spans("pairs")] == ["Review", "Review"]
    rest = "".join("".join(prompt.texts[a:b]) for a, b in prompt.spans("rest"))
    assert sorted(rest + "gooddbadfine.ReviewReview".replace("dd", "d")) == sorted(text)
    assert icl.find_spans(text, {"label": re.compile("label: (good)", re.IGNORECASE)}) == {"label": [(21, 25)]}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": "purple"}, "expected an expression for 'a' that matches in the text, got 'purple' without a match"),
        ({"a": "("}, "expected a regular expression for 'a'"),
        ({"a": re.compile(b"red")}, "expected a regular expression for 'a', got .*b'red'.* a bytes pattern"),
        ({"a": (0, 3), "b": (2, 5)}, "without a common character, got 'a' and 'b' on 'd' at character 2"),
        ({"a": (0, 5), "b": (0, 5)}, "got 'a' and 'b' on 'red b'"),
        ({"a": (3, 3)}, r"characters of 'a' from 0 to 7, at least one, got \(3, 3\)"),
        ({"a": (0, 8)}, r"from 0 to 7, at least one, got \(0, 8\)"),
        ({"a": (-3, -1)}, r"got \(-3, -1\)"),
        ({"a": []}, "at least one, got"),
        ({"rest": (0, 3)}, "names other than 'rest'"),
        ({"start token": (0, 3)}, "names other than 'start token'"),
    ],
)
def test_bad_sources_of_a_text_are_refused(sources: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        icl.prompt_from_text("red box", sources, tiny_model())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one part"),
        ([("a", "red"), ("b", "")], "at least one token each, got none for 'b'"),
        ([("a", "red"), ("b", " "), ("c", "box")], "got none for 'b'"),
        ([("start token", "red")], "names other than 'start token'"),
    ],
)
def test_bad_parts_are_refused(parts: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        icl.prompt_from_parts(parts, words_tokenizer())


def test_a_model_without_tokenizer_is_refused() -> None:
    model = tiny_model()
    model.tokenizer = None
    with pytest.raises(PromptError, match="expected tokenizer as a model with a tokenizer"):
        icl.prompt_from_parts([("a", "red")], model)


def test_merging_and_removing_sources_keep_the_other_tokens() -> None:
    prompt = icl.prompt_from_parts([("a", "red"), ("b", " box"), ("c", " red"), ("a", " box")], words_tokenizer())
    merged = prompt.merged("both", ["b", "c"])
    assert merged.names == ("a", "both")
    assert merged.tokens == prompt.tokens
    assert merged.spans("both") == [(prompt.spans("b")[0][0], prompt.spans("c")[0][1])]
    without = prompt.without("b")
    assert without.tokens == tuple(
        t for t, s in zip(prompt.tokens, prompt.sources, strict=True) if s != prompt.index("b")
    )
    assert "b" not in without.names
    with pytest.raises(PromptError, match="the name of a source"):
        prompt.merged("both", ["b", "d"])
    with pytest.raises(PromptError, match="got 'a' twice"):
        prompt.merged("a", ["b", "c"])
    with pytest.raises(PromptError, match="at least one of the sources to merge"):
        prompt.merged("both", [])
    with pytest.raises(PromptError, match="got none: it would be empty"):
        SourcedPrompt((1,), ("a",), (0,), ("x",)).without("a")


def test_inconsistent_fields_are_refused() -> None:
    with pytest.raises(PromptError, match="one source and one text for each token"):
        SourcedPrompt((1, 2), ("a",), (0,), ("x",))
    with pytest.raises(PromptError, match="indices of the 1 names, got 1"):
        SourcedPrompt((1,), ("a",), (1,), ("x",))


def test_prompts_without_tokens_and_negative_start_tokens_are_refused() -> None:
    with pytest.raises(PromptError, match="a prompt with at least one token, got none: give it text"):
        SourcedPrompt((), (), (), ())
    with pytest.raises(PromptError, match="a prompt with at least one token, got none: give it text"):
        icl.prompt_from_text("", {}, tiny_model(), start=[])
    with pytest.raises(ValueError, match=r"expected start\[0\] .*at least 0, got -5"):
        icl.prompt_from_text("red", {}, tiny_model(), start=[-5])


def test_a_query_of_prompts_has_the_groups_of_its_decomposition(task: icl.Task) -> None:
    prompts = icl.build_prompts(tiny_model(), task, task.demonstrations(2, seed=1), task.queries(2))
    prompt = icl.prompt_from_query(prompts, 1)
    assert prompt.tokens == prompts.prefix + prompts.suffixes[1]
    n_start = len(prompts.start)
    names = ("start token", "query", "separators", "demonstration 1", "demonstration 2")
    assert prompt.names == names[0 if n_start else 1 :]
    assert len(prompt.spans("separators")) == 2
    assert icl.prompt_from_query(prompts.zero_shot()).names[-1] == "query"
    with pytest.raises(IndexError, match="query from 0 to 1, got 2"):
        icl.prompt_from_query(prompts, 2)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_the_texts_of_a_query_join_to_the_text_that_the_model_reads(
    model_of: Callable[[str], icl.Model], family: str
) -> None:
    model = model_of(family)
    rows = [{"text": f"评论 the film  was 😀 é {row}", "label": row % 2} for row in range(12)]
    task = icl.Task("toy", "{text} Label:", ("bad", "good"), rows)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    prompt = icl.prompt_from_query(prompts)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    expected = model.tokenizer.decode(prompt.tokens[len(prompts.start) :], **options)
    assert "".join(prompt.texts[len(prompts.start) :]).removeprefix(" ") == expected.removeprefix(" ")
    assert "😀 é" in expected
    at = next(at for at, text in enumerate(prompt.texts) if text.endswith("😀"))
    assert prompt.texts[at + 1] == "", "a later token of the character"


@pytest.mark.parametrize("family", ["llama2", "gpt2"])
def test_tokenizer_families_join_their_texts(model_of: Callable[[str], icl.Model], family: str) -> None:
    model = model_of(family)
    parts = [("document", "The box is red.\n"), ("question", "Which colour?")]
    prompt = icl.prompt_from_parts(parts, model)
    n_start = len(prompt.spans("start token")) if "start token" in prompt.names else 0
    assert list(prompt.tokens[n_start:]) == model.encode("".join(text for _, text in parts))
    assert "".join(prompt.texts[n_start:]) == "The box is red.\nWhich colour?"
