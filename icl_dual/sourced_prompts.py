"""Prompts of named sources: documents, demonstrations, a system prompt, a question, and the start token apart.

A prompt is tokenised as one text. Every token then belongs to one source, so that attention to the sources adds up to
all of the attention. A token that covers characters of two sources is refused, unless those of one are white space.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from icl_dual.arguments import Index, checked
from icl_dual.html_tables import Line, lines_table
from icl_dual.models import Model
from icl_dual.models.tokenization import (
    TokenisedText,
    Tokens,
    decoded_pieces,
    n_repeated,
    template_start,
    tokenise,
)
from icl_dual.prompts import SEPARATOR, START, Prompts
from icl_dual.texts import PromptError
from icl_dual.torch_utils import checked_index, to_list

START_TOKEN = "start token"
"""The source of the tokens that the tokenizer's own template puts in front of a text: attention sinks."""

REST = "rest"
"""The source of all text that no named source covers."""

Span = tuple[int, int]
"""The first character or token of a piece, and the one after its last."""

Places = str | re.Pattern[str] | Span | Sequence[Span]
"""Where a source is in a text: a regular expression, or one or several ranges of characters."""


@checked
@dataclass(frozen=True, repr=False)
class SourcedPrompt:
    """The token ids of one prompt, and the named source of each token.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> parts = [("document 1", "The box is red.\\n"), ("question", "Which colour is the box?")]
        >>> prompt = icl_dual.prompt_from_parts(parts, tiny_model())
        >>> prompt
        SourcedPrompt(41 tokens: start token 1, document 1 16, question 24)
        >>> prompt.spans("document 1")
        [(1, 17)]
    """

    tokens: Tokens
    """The token ids, in order."""
    names: tuple[str, ...]
    """The names of the sources, each with at least one token."""
    sources: Tokens
    """The source of each token, as an index into `names`."""
    texts: tuple[str, ...]
    """The text of each token; a character of several tokens is the text of the first."""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.sources) == len(self.texts):
            raise PromptError(
                f"expected one source and one text for each token, got {len(self.tokens)} tokens, {len(self.sources)} "
                f"sources and {len(self.texts)} texts: pass three tuples of one length"
            )
        if not self.tokens:
            raise PromptError("expected a prompt with at least one token, got none: give it text")
        if repeated := [name for name, n in Counter(self.names).items() if n > 1]:
            raise PromptError(f"expected names of sources that differ, got {repeated[0]!r} twice: rename one")
        if unknown := sorted(set(self.sources) - set(range(len(self.names)))):
            raise PromptError(
                f"expected sources as indices of the {len(self.names)} names, got {unknown[0]}: add a name for it"
            )
        if empty := [name for index, name in enumerate(self.names) if index not in set(self.sources)]:
            raise PromptError(
                f"expected sources with at least one token each, got none for {empty[0]!r}: leave this source out, or "
                "give it text of its own"
            )

    def _repr_html_(self) -> str:
        counts = Counter(self.sources)
        by_source = [counts[index] for index in range(len(self.names))]
        return lines_table(
            repr(self), [Line("tokens of each source", f"source={len(self.names)}", "source", by_source)]
        )

    def __repr__(self) -> str:
        counts = Counter(self.sources)
        sources = ", ".join(f"{name} {counts[index]}" for index, name in enumerate(self.names[:12]))
        more = f" and {len(self.names) - 12} more" * (len(self.names) > 12)
        return f"SourcedPrompt({len(self.tokens)} tokens: {sources}{more})"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> str:
        """Return the text of all tokens, the start token's included."""
        return "".join(self.texts)

    @checked
    def index(self, name: str) -> int:
        """Return the index of a source in `names`.

        Raises:
            PromptError: there is no source of this name.
        """
        return source_index(self.names, name)

    @checked
    def spans(self, name: str) -> list[Span]:
        """Return the pieces of a source, each as its first token and the one after its last.

        Raises:
            PromptError: there is no source of this name.
        """
        index, spans, first = self.index(name), list[Span](), 0
        for source, run in itertools.groupby(self.sources):
            end = first + len(list(run))
            spans += [(first, end)] * (source == index)
            first = end
        return spans

    @checked
    def merged(self, name: str, sources: Sequence[str]) -> "SourcedPrompt":
        """Return the prompt with several sources as one.

        Args:
            name: the name of the merged source. It stands where the first of the sources stood.
            sources: the names of the sources to merge.

        Raises:
            PromptError: there is no source of one of the names, or another source has the new name.
        """
        chosen = {self.index(source) for source in sources}
        if not chosen:
            raise PromptError("expected at least one of the sources to merge, got none: pass their names")
        kept = [index for index in range(len(self.names)) if index not in chosen or index == min(chosen)]
        new_index = {old: kept.index(min(chosen) if old in chosen else old) for old in range(len(self.names))}
        names = tuple(name if index in chosen else self.names[index] for index in kept)
        return replace(self, names=names, sources=tuple(new_index[source] for source in self.sources))

    def by_token(self) -> "SourcedPrompt":
        """Return the prompt with every token as a source of its own, named by its position and text."""
        names = tuple(f"{position} {text!r}" for position, text in enumerate(self.texts))
        return replace(self, names=names, sources=tuple(range(len(self.tokens))))

    @checked
    def without(self, name: str) -> "SourcedPrompt":
        """Return the prompt without the tokens of a source.

        The tokens on both sides stay what they are, also where their text alone would have others.

        Raises:
            PromptError: there is no source of this name, or no other.
        """
        removed = self.index(name)
        if len(self.names) == 1:
            raise PromptError(f"expected a prompt with another source than {name!r}, got none: it would be empty")
        kept = [at for at, source in enumerate(self.sources) if source != removed]
        return SourcedPrompt(
            tokens=tuple(self.tokens[at] for at in kept),
            names=tuple(other for other in self.names if other != name),
            sources=tuple(self.sources[at] - (self.sources[at] > removed) for at in kept),
            texts=tuple(self.texts[at] for at in kept),
        )


def source_index(names: Sequence[str], name: str) -> int:
    """Return the index of a source's name.

    Raises:
        PromptError: there is no source of this name.
    """
    if name not in names:
        names_text = ", ".join(map(repr, names[:12])) + " …" * (len(names) > 12)
        raise PromptError(f"expected the name of a source, one of {names_text}, got {name!r}: check its spelling")
    return names.index(name)


@checked
def prompt_from_parts(
    parts: Sequence[tuple[str, str]], tokenizer: Model | Any, *, start: str | Sequence[Index] | None = None
) -> SourcedPrompt:
    """Return the prompt that named texts make one after another, tokenised as one text.

    Args:
        parts: the name and the text of each part, in order. Parts of one name are one source, such as the pieces of a
            template. Texts are joined as they are, with nothing between them.
        tokenizer: the model that will read the prompt, or its tokenizer.
        start: the text or tokens before the text; the source `start token`. They are not repeated where the text begins
            with all of them, or with the last of them and these are special tokens. By default what the tokenizer's own
            template puts in front: none, one or several tokens.

    Returns:
        The prompt. White space in one token with text before or after it belongs to the source of that text, and a
        token of white space alone to the source of its first character.

    Raises:
        PromptError: there is no part, a part has no token, its name is `start token`, or a token covers characters of
            two parts.
        UnsupportedModelError: the tokenizer does not say which characters a token covers, and the text cannot be cut
            without.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> icl_dual.prompt_from_parts([("system", "Be brief. "), ("question", "Why?")], tiny_model())
        SourcedPrompt(15 tokens: start token 1, system 10, question 4)
    """
    if not parts:
        raise PromptError("expected at least one part, got none: pass the name and the text of each")
    names = tuple(dict.fromkeys(name for name, _ in parts))
    ends = list(itertools.accumulate(len(text) for _, text in parts))
    pieces = [
        (names.index(name), (end - len(text), end)) for (name, text), end in zip(parts, ends, strict=True) if text
    ]
    return _prompt("".join(text for _, text in parts), names, pieces, tokenizer, start)


@checked
def prompt_from_text(
    text: str,
    sources: Mapping[str, Places],
    tokenizer: Model | Any,
    *,
    start: str | Sequence[Index] | None = None,
) -> SourcedPrompt:
    """Return the prompt of a text, in which regular expressions or ranges of characters name sources.

    Args:
        text: the whole text, such as a chat that a template has written.
        sources: by name, where the source is (`find_spans`). All text outside of these is the source `rest`.
        tokenizer: the model that will read the prompt, or its tokenizer.
        start: the text or tokens before the text, as in `prompt_from_parts`.

    Raises:
        PromptError: sources overlap or are empty, an expression matches nothing, a range is outside of the text, a name
            is `start token` or `rest`, or a token covers characters of two sources.
        UnsupportedModelError: the tokenizer does not say which characters a token covers, and the text cannot be cut
            without.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> text = "Review: fine film Label: good"
        >>> icl_dual.prompt_from_text(text, {"review": "Review: (.*) Label", "label": (25, 29)}, tiny_model())
        SourcedPrompt(30 tokens: start token 1, review 9, label 4, rest 16)
    """
    if REST in sources:
        raise PromptError(f"expected names other than {REST!r}, which is all other text, got it: rename this source")
    names, located = tuple(sources), find_spans(text, sources)
    named = sorted((span, index) for index, name in enumerate(names) for span in located[name])
    for ((_, end), first), ((begin, later_end), second) in itertools.pairwise(named):
        if begin < end:
            raise PromptError(
                f"expected sources without a common character, got {names[first]!r} and {names[second]!r} on "
                f"{text[begin : min(end, later_end)][:40]!r} at character {begin}: change one of them"
            )
    pieces, at = list[tuple[int, Span]](), 0
    for (begin, end), index in [*named, ((len(text), len(text)), 0)]:
        pieces += [(len(names), (at, begin))] * (at < begin) + [(index, (begin, end))] * (begin < end)
        at = end
    with_rest = (*names, REST) if any(index == len(names) for index, _ in pieces) else names
    return _prompt(text, with_rest, pieces, tokenizer, start)


@checked
def find_spans(text: str, sources: Mapping[str, Places]) -> dict[str, list[Span]]:
    """Return the ranges of characters at which named sources are in a text.

    Args:
        text: the text.
        sources: by name, a regular expression (as text or compiled), a range of characters such as `(0, 12)`, or
            several. Every match of an expression belongs to the source: its first group where it has one, else the
            whole match.

    Raises:
        PromptError: an expression is invalid or matches nothing, or a range is empty or outside of the text.

    Example:
        >>> import icl_dual
        >>> icl_dual.find_spans("a=1, b=2", {"numbers": r"=(\\d)", "first": (0, 3)})
        {'numbers': [(2, 3), (7, 8)], 'first': [(0, 3)]}
    """
    return {name: _located(text, name, places) for name, places in sources.items()}


def _located(text: str, name: str, places: Places) -> list[Span]:
    """Return the ranges of characters of one source."""
    if isinstance(places, str | re.Pattern):
        try:
            pattern = re.compile(places)
            matches = list(pattern.finditer(text))
        except (re.error, TypeError) as error:  # a TypeError for an expression of bytes
            raise PromptError(
                f"expected a regular expression for {name!r}, got {places!r} ({error}): correct it, or escape text "
                "with re.escape"
            ) from error
        spans = [match.span(min(pattern.groups, 1)) for match in matches]
        spans = [span for span in spans if span[0] < span[1]]
        if not spans:
            raise PromptError(
                f"expected an expression for {name!r} that matches in the text, got {pattern.pattern!r} without a "
                "match: correct it, or leave this source out"
            )
        return spans
    is_span = isinstance(places, tuple) and len(places) == 2 and all(isinstance(end, int) for end in places)
    spans = cast(list[Span], [places] if is_span else list(places))
    for begin, end in spans or [(0, 0)]:
        if not 0 <= begin < end <= len(text):
            raise PromptError(
                f"expected characters of {name!r} from 0 to {len(text)}, at least one, got ({begin}, {end}): pass the "
                "first character and the one after the last"
            )
    return spans


@checked
def prompt_from_query(prompts: Prompts, query: int = 0) -> SourcedPrompt:
    """Return one in-context prompt of `Prompts`, with the sources of `Decomposition.groups`.

    Args:
        prompts: the queries and the demonstrations before them; `prompts.zero_shot()` for the zero-shot prompt.
        query: the query's index.

    Returns:
        The prompt, with the sources `start token`, `query`, `separators`, `demonstration 1`, … as far as it has them.

    Raises:
        IndexError: there is no such query.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "{text}:", ("bad", "good"), rows)
        >>> prompts = icl_dual.build_prompts(tiny_model(), task, task.demonstrations(2, seed=1), task.queries(3))
        >>> icl_dual.prompt_from_query(prompts)
        SourcedPrompt(36 tokens: start token 1, query 8, separators 2, demonstration 1 12, demonstration 2 13)
    """
    suffix = prompts.suffixes[checked_index("query", query, len(prompts.queries))]
    names = {START: START_TOKEN, SEPARATOR: "separators"}
    by_token = [names.get(segment, f"demonstration {segment + 1}") for segment in to_list(prompts.segments)]
    by_token += ["query"] * len(suffix)
    order = (
        START_TOKEN,
        "query",
        "separators",
        *(f"demonstration {n + 1}" for n in range(len(prompts.demonstrations))),
    )
    present = tuple(name for name in order if name in set(by_token))
    tokens = prompts.prefix + suffix
    return SourcedPrompt(
        tokens, present, tuple(present.index(name) for name in by_token), _decoded(prompts.tokenizer, tokens)
    )


def _prompt(
    text: str,
    names: tuple[str, ...],
    pieces: Sequence[tuple[int, Span]],
    tokenizer: Model | Any,
    start: str | Sequence[int] | None,
) -> SourcedPrompt:
    """Return the prompt of a text in pieces, each after the index of its source; together they are the whole text."""
    if START_TOKEN in names:
        raise PromptError(f"expected names other than {START_TOKEN!r}, which is a source of its own: rename this one")
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, Model) else tokenizer
    if not callable(tokenizer):
        raise PromptError(
            f"expected tokenizer as a model with a tokenizer, or a tokenizer, got {type(tokenizer).__name__}: load the "
            "model with tokenizer="
        )
    (tokenised,) = tokenise(tokenizer, [text])
    sources = list[int]()
    for index, (_, end) in pieces:
        sources += [index] * (_n_before(tokenised, end) - len(sources))
    start_tokens = _start_tokens(tokenizer, start)
    n = n_repeated(tokenizer, start_tokens, tokenised.tokens)
    if start_tokens:
        names, sources = (START_TOKEN, *names), [index + 1 for index in sources]
    return SourcedPrompt(
        start_tokens + tokenised.tokens[n:],
        names,
        (0,) * len(start_tokens) + tuple(sources[n:]),
        _decoded(tokenizer, start_tokens) + _texts(tokenizer, tokenised)[n:],
    )


def _start_tokens(tokenizer: Any, start: str | Sequence[int] | None) -> Tokens:
    if start is None:
        return tuple(template_start(tokenizer))
    return tuple(tokenizer(start, add_special_tokens=False).input_ids if isinstance(start, str) else start)


def _n_before(tokenised: TokenisedText, position: int) -> int:
    """Return the number of tokens of the text before a position.

    Raises:
        PromptError: a token covers characters on both sides, and none of the sides is white space.
    """
    n_before, spanning = tokenised.cut(position)
    if spanning is not None and tokenised.ends is not None:
        text, end = tokenised.text, tokenised.ends[spanning]
        begin = tokenised.ends[spanning - 1] if spanning else 0
        if text[begin:position].strip() and text[position:end].strip():
            raise PromptError(
                f"expected sources that end where tokens end, got a border within {text[begin:end]!r}, token "
                f"{spanning} of the text, after character {position} ({text[max(0, position - 20) : position]!r}): "
                "move the border, or put white space there"
            )
    return n_before


def _texts(tokenizer: Any, tokenised: TokenisedText) -> tuple[str, ...]:
    """Return the text of each token of a text; together they are the text."""
    if tokenised.ends is None:
        return _decoded(tokenizer, tokenised.tokens)
    ends = list(itertools.accumulate(tokenised.ends, max, initial=0))
    ends[-1] = len(tokenised.text)
    return tuple(tokenised.text[begin:end] for begin, end in itertools.pairwise(ends))


def _decoded(tokenizer: Any, tokens: Tokens) -> tuple[str, ...]:
    """Return the text of each token, a character's for the first of its tokens; ids without a tokenizer."""
    if tokenizer is None:
        return tuple(f"<{token}>" for token in tokens)
    return tuple(
        piece for text, (_, *later) in decoded_pieces(tokenizer, tokens) for piece in (text, *("" for _ in later))
    )
