"""A prompt's tokens are shown by segment: all of them, once, and as the model reads them."""

import html
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers import make_rows
from tokenizer_families import FAMILIES

import icl_dual as icl
from icl_dual.prompt_view import TokenView

SHOWN_SPACE = str.maketrans({"␣": " ", "⏎": "\n"})


def build(model: icl.Model, template: str = "Review: {text}\nLabel:", **options: Any) -> icl.Prompts:
    task = icl.Task("toy", template, ("Negative", "(A)"), make_rows())
    return icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(4), **options)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_the_tokens_shown_are_the_text_that_the_model_reads(model_of: Callable[[str], icl.Model], family: str) -> None:
    model = model_of(family)
    prompts = build(model)
    view = icl.show_prompt(prompts, query=2)
    names = [segment.name for segment in view.segments]
    assert [name for name in names if name not in ("start", "separator")] == [
        "demonstration 1",
        "demonstration 2",
        "query",
        "label",
    ]
    tokens = [*prompts.prefix, *prompts.queries[2], *prompts.labels[prompts.gold[2]]]
    shown = "".join(text for segment in view.segments for text in segment.texts)
    assert shown.removeprefix("<s>").strip() == model.tokenizer.decode(tokens).removeprefix("<s>").strip()
    lines = str(view).splitlines()
    assert len(lines) == 1 + len(view.segments), "white space is visible, line breaks too"
    assert lines[-2].startswith("query")
    assert lines[-1].endswith(view.segments[-1].texts[-1])
    assert f"{len(tokens) - len(prompts.labels[prompts.gold[2]])} tokens" in lines[0]
    assert repr(view) == str(view)


def test_tokens_of_two_segments_are_marked(model_of: Callable[[str], icl.Model]) -> None:
    prompts = build(model_of("llama3"), "\n{text} Label:")
    view = icl.show_prompt(prompts)
    marked = [
        text for segment in view.segments for text, marks in zip(segment.texts, segment.spanning, strict=True) if marks
    ]
    assert len(marked) == len(prompts.spanning) > 0
    assert str(view).count("‹") == len(marked)
    assert f"of which {len(marked)} span two segments" in str(view)
    assert view._repr_html_().count("#e31a1c") == len(marked)


def test_characters_of_several_tokens_are_one_text(model_of: Callable[[str], icl.Model]) -> None:
    view = icl.show_prompt(build(model_of("gpt2"), "评论：{text} Label:"))
    (query,) = (segment for segment in view.segments if segment.name == "query")
    assert query.texts[:3] == ("评", "论", "：")


def test_html_is_escaped_and_has_a_colour_for_each_segment(model_of: Callable[[str], icl.Model]) -> None:
    task = icl.Task("toy", "<b>{text}</b> & Label:", ("no", "<i>"), make_rows())
    prompts = icl.build_prompts(model_of("llama3"), task, task.demonstrations(2, seed=1), task.queries(2))
    page = icl.show_prompt(prompts, label=1)._repr_html_()
    inside = re.sub(r"</?(span|p|pre)\b[^>]*>", "", page)
    assert "<" not in inside
    assert html.unescape(inside).translate(SHOWN_SPACE).count("</b> & Label:") == 3
    colours = dict(re.findall(r'<span title="([^"]*)" style="color: black; background: (#\w+)', page))
    assert list(colours) == ["start", "demonstration 1", "separator", "demonstration 2", "query", "label"]
    assert len(set(colours.values())) == 6


def test_loaded_prompts_need_a_tokenizer(llama: icl.Model, prompts: icl.Prompts) -> None:
    loaded = replace(prompts, tokenizer=None)
    with pytest.raises(icl.PromptError, match="or a tokenizer, got prompts without one: pass tokenizer=model"):
        icl.show_prompt(loaded)
    expected = str(icl.show_prompt(prompts))
    assert str(icl.show_prompt(loaded, tokenizer=llama)) == expected
    assert str(icl.show_prompt(loaded, tokenizer=llama.tokenizer)) == expected


def test_other_queries_and_labels_are_said(prompts: icl.Prompts) -> None:
    with pytest.raises(icl.PromptError, match="expected query from 0 to 6, got 7"):
        icl.show_prompt(prompts, 7)
    with pytest.raises(icl.PromptError, match="expected label from 0 to 1, got 2"):
        icl.show_prompt(prompts, label=2)


def test_the_reference_protocol_shows_its_appended_label(
    model_of: Callable[[str], icl.Model], reference_task: icl.Task
) -> None:
    demonstrations, queries = reference_task.demonstrations(2, 1), reference_task.queries(2)
    prompts = icl.build_prompts(model_of("gpt2"), reference_task, demonstrations, queries)
    view = icl.show_prompt(prompts)
    assert "".join(view.segments[-2].texts).endswith("Label: no")


def test_tokens_without_a_finite_number_are_grey() -> None:
    values = (float("nan"), 0.0, 2.0, float("inf"), -1.0)
    colours = TokenView("numbers", tuple("abcde"), ("s",) * 5, values).colours()
    assert colours[0] == colours[3] == (0.85, 0.85, 0.85)
    assert [colours[at] for at in (1, 2, 4)] == TokenView(
        "numbers", tuple("bce"), ("s",) * 3, (0.0, 2.0, -1.0)
    ).colours()
    assert TokenView("numbers", ("a",), ("s",), (float("nan"),)).colours() == [(0.85, 0.85, 0.85)]
