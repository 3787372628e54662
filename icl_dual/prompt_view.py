"""`show_prompt`: the tokens that a model reads, by segment, as text or in colour; `TokenView`: coloured by a number."""

import html
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from icl_dual.arguments import checked
from icl_dual.models import Model
from icl_dual.models.tokenization import Tokens, decoded_pieces
from icl_dual.prompts import SEPARATOR, START, PromptError, Prompts
from icl_dual.torch_utils import to_list

QUERY = "query"
LABEL = "label"
_COLOURS = {START: "#d9d9d9", SEPARATOR: "#bdbdbd", QUERY: "#fdd0a2", LABEL: "#a1d99b"}
_DEMONSTRATION_COLOURS = ("#c6dbef", "#9ecae1")


@dataclass(frozen=True)
class Segment:
    """One segment of a prompt."""

    source: int | str
    """A demonstration's index, `START`, `SEPARATOR`, `"query"` or `"label"`."""
    texts: tuple[str, ...]
    """The text of each token, or of several that are one character together."""
    spanning: tuple[bool, ...]
    """Whether each text has a token with characters of two segments."""

    @property
    def name(self) -> str:
        """Return the segment's name."""
        if isinstance(self.source, str):
            return self.source
        return {START: "start", SEPARATOR: "separator"}.get(self.source, f"demonstration {self.source + 1}")


@dataclass(frozen=True, repr=False)
class PromptView:
    """A prompt's tokens by segment. Printed, it has one line a segment; in Jupyter, tokens are coloured by segment."""

    title: str
    """What prompt it is."""
    segments: tuple[Segment, ...]
    """The segments, in order."""

    def __str__(self) -> str:
        width = max(len(segment.name) for segment in self.segments)
        lines = [
            f"{segment.name:<{width}}  {'|'.join(_line(*token) for token in _tokens(segment))}"
            for segment in self.segments
        ]
        return "\n".join([self.title, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self.title)}</p>", '<pre style="white-space: pre-wrap; line-height: 1.8">']
        for segment in self.segments:
            for text, is_spanning in _tokens(segment):
                border = "2px solid #e31a1c" if is_spanning else "1px solid white"
                content = html.escape(_visible(text)) + text.count("\n") * "\n"
                parts.append(
                    f'<span title="{html.escape(segment.name)}" style="color: black; background: {_colour(segment)}; '
                    f'border: {border}">{content}</span>'
                )
        return "".join([*parts, "</pre>"])


@dataclass(frozen=True, repr=False)
class TokenView:
    """A prompt's tokens with a number each. Printed, it has a line for each source; in Jupyter, tokens are coloured."""

    title: str
    """What prompt and what numbers they are."""
    texts: tuple[str, ...]
    """The text of each token."""
    sources: tuple[str, ...]
    """The source of each token."""
    values: tuple[float, ...]
    """The number of each token's source, by which tokens are coloured: blue above 0, red below."""

    def __str__(self) -> str:
        width = max(map(len, self.sources))
        lines, first = list[str](), 0
        for source, run in itertools.groupby(self.sources):
            end = first + len(list(run))
            text = _visible("".join(self.texts[first:end]))
            lines.append(f"{source:<{width}}  {self.values[first]:+.3f}  {text}")
            first = end
        return "\n".join([self.title, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self.title)}</p>", '<pre style="white-space: pre-wrap; line-height: 1.8">']
        for text, source, value, colour in zip(self.texts, self.sources, self.values, self.colours(), strict=True):
            red, green, blue = (round(255 * part) for part in colour)
            content = html.escape(_visible(text)) + text.count("\n") * "\n"
            parts.append(
                f'<span title="{html.escape(source)}: {value:+.4f}" style="color: black; '
                f'background: rgb({red}, {green}, {blue})">{content}</span>'
            )
        return "".join([*parts, "</pre>"])

    def colours(self) -> list[tuple[float, float, float]]:
        """Return the colour of each token, as red, green and blue from 0 to 1.

        It is white at 0 and deepest at the largest number, and grey where the number is NaN or infinite.
        """
        largest = max((abs(value) for value in self.values if math.isfinite(value)), default=0.0) or 1.0
        return [_shade(value / largest) if math.isfinite(value) else (0.85, 0.85, 0.85) for value in self.values]


def _shade(value: float) -> tuple[float, float, float]:
    """Return white at 0, blue at 1 and red at −1, light enough for black text."""
    deep = (0.35, 0.6, 0.9) if value > 0 else (0.95, 0.45, 0.35)
    red, green, blue = (1 - abs(value) * (1 - part) for part in deep)
    return red, green, blue


@checked
def show_prompt(
    prompts: Prompts, query: int = 0, *, label: int | None = None, tokenizer: Model | Any = None
) -> PromptView:
    """Return a view of one query's prompt, token by token and segment by segment: what the model reads.

    Args:
        prompts: the prompts.
        query: the index of the query.
        label: the index of the label to show after the query; by default the query's own.
        tokenizer: the tokenizer that made the tokens, or the model that has it; needed only where the prompts have
            none, as after loading.

    Returns:
        The view: `print` it, or let Jupyter display it. Texts with tokens that span two segments are marked by `‹›`, or
        by a red frame.

    Raises:
        PromptError: there is no such query or label, or no tokenizer.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "{text}:", ("bad", "good"), rows)
        >>> prompts = icl_dual.build_prompts(tiny_model(), task, task.demonstrations(1, seed=1), task.queries(3))
        >>> print(icl_dual.show_prompt(prompts))
        Query 0 of 3, in 22 tokens, with label 1 after it
        start            <s>
        demonstration 1  f|i|l|m|␣|5|:|␣|g|o|o|d
        separator        ⏎
        query            f|i|l|m|␣|1|5|:
        label            ␣|g|o|o|d
    """
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, Model) else tokenizer
    tokenizer = prompts.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise PromptError(
            "expected prompts that build_prompts made, or a tokenizer, got prompts without one: pass tokenizer=model"
        )
    if not 0 <= query < len(prompts.queries):
        raise PromptError(
            f"expected query from 0 to {len(prompts.queries) - 1}, got {query}: pass the index of one of the queries"
        )
    label = prompts.gold[query] if label is None else label
    if not 0 <= label < len(prompts.labels):
        raise PromptError(
            f"expected label from 0 to {len(prompts.labels) - 1}, got {label}: pass the index of one of the labels"
        )
    runs = [*_runs(prompts), (QUERY, prompts.suffixes[query]), (LABEL, prompts.labels[label])]
    segments, position = list[Segment](), 0
    for source, tokens in runs:
        spanning = {at - position for at in prompts.spanning}
        segments.append(_segment(tokenizer, source, tokens, spanning))
        position += len(tokens)
    n_tokens = len(prompts.prefix) + len(prompts.suffixes[query])
    spans = f", of which {len(prompts.spanning)} span two segments" * bool(prompts.spanning)
    title = f"Query {query} of {len(prompts.queries)}, in {n_tokens} tokens{spans}, with label {label} after it"
    return PromptView(title, tuple(segment for segment in segments if segment.texts))


def _runs(prompts: Prompts) -> Iterator[tuple[int, Tokens]]:
    """Yield each piece of the prefix after its source."""
    first = 0
    sources = to_list(prompts.segments)
    for at in range(1, len(sources) + 1):
        if at == len(sources) or sources[at] != sources[first]:
            yield sources[first], prompts.prefix[first:at]
            first = at


def _segment(tokenizer: Any, source: int | str, tokens: Tokens, spanning: set[int]) -> Segment:
    """Return a segment with the text of its tokens; those that are one character together have one text."""
    pieces = list(decoded_pieces(tokenizer, tokens))
    marks = tuple(not spanning.isdisjoint(positions) for _, positions in pieces)
    return Segment(source, tuple(text for text, _ in pieces), marks)


def _tokens(segment: Segment) -> Iterator[tuple[str, bool]]:
    """Yield the text of each token, and whether it spans two segments."""
    yield from zip(segment.texts, segment.spanning, strict=True)


def _line(text: str, is_spanning: bool) -> str:
    """Return a token's text in a line: its white space visible, and spanning tokens marked."""
    visible = _visible(text)
    return f"‹{visible}›" if is_spanning else visible


def _visible(text: str) -> str:
    """Return a text with its white space visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _colour(segment: Segment) -> str:
    """Return a segment's background colour; demonstrations have two in turn."""
    if isinstance(segment.source, int) and segment.source >= 0:
        return _DEMONSTRATION_COLOURS[segment.source % 2]
    return _COLOURS[segment.source]
