"""Tokens of whole prompts, cut into segments: start, demonstrations, separators, queries and labels.

Every prompt is tokenised as one text. Where a text has other tokens alone than in a prompt, both are kept: each setting
reads the tokens of its own text. Where labels have no tokens of their own, or queries do not share the tokens of their
demonstrations, prompts are refused.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from icl_dual.models import Model
from icl_dual.models.tokenization import Cut, TokenisedText, Tokens, common_length, n_repeated
from icl_dual.texts import ChatText, Demonstration, PlainText, PromptError, PromptText

CHUNK = 64
"""The number of texts that are tokenised at once: offset mappings take more memory than ids."""


class Segments(NamedTuple):
    """The tokens of prompts, under the names of `icl_dual.Prompts`."""

    start: Tokens
    demonstrations: tuple[Tokens, ...]
    demonstration_label_lengths: Tokens
    separator: Tokens
    separators: tuple[Tokens, ...]
    queries: tuple[Tokens, ...]
    labels: tuple[Tokens, ...]
    zero_shot_queries: tuple[Tokens, ...]
    training_demonstrations: tuple[Tokens, ...]
    spanning: Tokens


@dataclass(frozen=True)
class _Sequence:
    """A text's tokens after the start tokens."""

    tokens: Tokens
    """The start tokens, then the text's, without start tokens that the text repeats."""
    text: TokenisedText
    """The text with its tokens."""
    n_start: int
    """The number of start tokens."""

    def cut(self, position: int) -> Cut:
        """Return where a position in the text falls among the tokens."""
        n_before, spanning = self.text.cut(position)
        n_added = len(self.tokens) - len(self.text.tokens)
        return Cut(max(n_before + n_added, self.n_start), None if spanning is None else spanning + n_added)


class _Answered(NamedTuple):
    """A text, and the labels that follow it."""

    text: PromptText
    """The text."""
    sequence: _Sequence
    """Its tokens."""
    n_before_label: int
    """The number of its tokens before the label: without white space that is in one token with a label."""
    labels: list[Tokens]
    """The tokens of each label."""

    @property
    def tokens(self) -> Tokens:
        """Return the tokens before the label."""
        return self.sequence.tokens[: self.n_before_label]

    @property
    def white_space(self) -> Tokens:
        """Return the tokens at the end that the text has without a label only."""
        return self.sequence.tokens[self.n_before_label :]


class _Query(NamedTuple):
    """A query after the demonstrations."""

    n_shared: int
    """The number of first tokens that are those of the first query's prompt, and not of the query."""
    rest: Tokens
    """The tokens from there on."""


@dataclass(frozen=True)
class Segmenter:
    """Tokenises texts for a model and cuts them into segments."""

    model: Model
    """The model that gives the tokenizer."""
    writer: PlainText | ChatText
    """Writes the text of a prompt."""
    start: Tokens
    """The tokens before every text, which a text that begins with them does not repeat."""

    def segments(
        self, demonstrations: Sequence[Demonstration], queries: Sequence[str], labels: Sequence[str]
    ) -> Segments:
        """Return the tokens of prompts, and of the same queries and demonstrations alone.

        Args:
            demonstrations: the text of each demonstration, and of its label.
            queries: the text of each query, at least one.
            labels: the text of each label, as it would follow a query in plain text.

        Raises:
            PromptError: a label has no tokens of its own, or others after another query; or the queries do not share
                the tokens of the demonstrations.
            UnsupportedModelError: the tokenizer does not say where tokens lie, and the text cannot be cut without.
        """
        label_texts = [self.writer.label_text(label) for label in labels]
        alone = list(self._answered(queries, [label_texts] * len(queries)))
        self._check_same_labels(alone)
        training = list(
            self._answered(
                [prompt for prompt, _ in demonstrations],
                [[self.writer.label_text(label)] for _, label in demonstrations],
            )
        )
        texts = (
            [self.writer.write(demonstrations, query) for query in queries]
            if demonstrations
            else [a.text for a in alone]
        )
        (first,) = self._read([texts[0].whole])
        self._check_labels_in_context(first, texts[0], alone[0], label_texts)
        n_start = _n_start(first, texts[0], [*alone, *training])
        in_context = list(self._in_context(first, texts, alone))
        n_prefix = min(query.n_shared for query in in_context) if demonstrations else n_start
        pieces, spanning = self._context(first, texts[0], n_start, n_prefix)
        query_tokens = tuple(first.tokens[n_prefix : query.n_shared] + query.rest for query in in_context)
        zero_shot = tuple(answered.tokens[n_start:] for answered in alone)
        trained = tuple((*answered.tokens, *answered.labels[0])[n_start:] for answered in training)
        separator = self._separator(queries[0], labels[0])
        separators = () if set(pieces[1::2]) <= {separator} else tuple(pieces[1::2])
        return Segments(
            start=first.tokens[:n_start],
            demonstrations=tuple(pieces[::2]),
            demonstration_label_lengths=tuple(len(answered.labels[0]) for answered in training),
            separator=separator,
            separators=separators,
            queries=query_tokens,
            labels=tuple(alone[0].labels),
            zero_shot_queries=() if zero_shot == query_tokens else zero_shot,
            training_demonstrations=() if trained == tuple(pieces[::2]) else trained,
            spanning=spanning,
        )

    def baseline_queries(
        self,
        demonstrations: Sequence[Demonstration],
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        prefix: Tokens,
        label_tokens: Sequence[Tokens],
    ) -> tuple[Tokens, ...]:
        """Return the tokens of texts without content, after the prefix that queries have.

        Args:
            demonstrations: the text of each demonstration, and of its label; the same as those of the queries.
            texts: the texts without content.
            labels: the text of each label, as it would follow a query in plain text.
            prefix: the tokens before each query.
            label_tokens: the tokens of each label after a query.

        Raises:
            PromptError: a text's prompt begins with other tokens than the prefix, or labels have other tokens after it.
        """
        label_texts = [self.writer.label_text(label) for label in labels]
        answered = list(self._answered(texts, [label_texts] * len(texts), demonstrations))
        for text, baseline in zip(texts, answered, strict=True):
            tokens = baseline.tokens
            for after, expected in zip(baseline.labels, label_tokens, strict=True):
                if after != expected:
                    raise PromptError(
                        f"expected label words with the same tokens after the text without content {text!r} as after "
                        f"queries, got {self._names(after)} and {self._names(expected)}: choose another "
                        "label_separator or end of the template, or scoring='sum'"
                    )
            if tokens[: len(prefix)] != prefix or len(tokens) == len(prefix):
                at = min(common_length(tokens, prefix), len(prefix) - 1)
                raise PromptError(
                    f"expected the text without content {text!r} to begin after the same tokens as the queries, got "
                    f"{self._names(tokens[at : at + 4])} where queries have {self._names(prefix[at : at + 4])}: "
                    "choose a separator that has tokens of its own, another beginning of the template, or scoring='sum'"
                )
        return tuple(baseline.tokens[len(prefix) :] for baseline in answered)

    def _read(self, texts: Iterable[str]) -> Iterator[_Sequence]:
        """Yield the tokens of each text after the start tokens."""
        remaining = iter(texts)
        while chunk := list(itertools.islice(remaining, CHUNK)):
            for text in self.model.tokenise(chunk):
                n = n_repeated(self.model.tokenizer, self.start, text.tokens)
                yield _Sequence(self.start + text.tokens[n:], text, len(self.start))

    def _answered(
        self,
        prompts: Sequence[str],
        labels: Sequence[Sequence[str]],
        demonstrations: Sequence[Demonstration] = (),
    ) -> Iterator[_Answered]:
        """Yield each prompt after the demonstrations, alone by default, and the labels that follow it."""
        texts = [self.writer.write(demonstrations, prompt) for prompt in prompts]
        pairs = zip(texts, labels, strict=True)
        with_label = self._read(text.whole + label for text, following in pairs for label in following)
        sequences = self._read(text.whole for text in texts)
        for text, sequence, following in zip(texts, sequences, labels, strict=True):
            tokens = [next(with_label).tokens for _ in following]
            n_common = min(common_length(sequence.tokens, answered) for answered in tokens)
            if sequence.cut(len(text.whole.rstrip())).n_before > n_common or n_common == min(map(len, tokens)):
                raise PromptError(
                    f"expected label words with tokens of their own, got {self._names(min(tokens, key=len)[-6:])} for "
                    f"the end of {(text.whole + following[0])[-40:]!r}, and {self._names(sequence.tokens[-6:])} "
                    "without the label word: choose another label_separator, label word or end of the template"
                )
            yield _Answered(text, sequence, n_common, [answered[n_common:] for answered in tokens])

    def _check_same_labels(self, alone: Sequence[_Answered]) -> None:
        """Raise a PromptError where a label has other tokens after another query."""
        for answered in alone:
            for label, expected in zip(answered.labels, alone[0].labels, strict=True):
                if label != expected:
                    raise PromptError(
                        f"expected label words with the same tokens after every query, got {self._names(expected)} "
                        f"after {alone[0].text.whole[-40:]!r} and {self._names(label)} after "
                        f"{answered.text.whole[-40:]!r}: end the template with text after its last field, or choose "
                        "another label_separator"
                    )

    def _check_labels_in_context(
        self, first: _Sequence, text: PromptText, alone: _Answered, label_texts: Sequence[str]
    ) -> None:
        """Raise a PromptError where a label has other tokens after demonstrations and the first query than after the
        query alone."""
        before = self._without_white_space(first, alone)
        for label, sequence in zip(alone.labels, self._read(text.whole + label for label in label_texts), strict=True):
            if sequence.tokens != before + label:
                at = common_length(sequence.tokens, before + label)
                raise PromptError(
                    "expected label words with the same tokens after demonstrations as after a query alone, got "
                    f"{self._names(sequence.tokens[at : at + 6])} and {self._names((before + label)[at : at + 6])}: "
                    "choose another label_separator, label word or end of the template"
                )

    def _without_white_space(self, sequence: _Sequence, alone: _Answered) -> Tokens:
        """Return the tokens of a query's prompt without the white space that is in one token with a label."""
        n_kept = len(sequence.tokens) - len(alone.white_space)
        if sequence.tokens[n_kept:] != alone.white_space:
            raise PromptError(
                f"expected a query that ends in the tokens {self._names(alone.white_space)} also after demonstrations, "
                f"got {self._names(sequence.tokens[n_kept:])}: leave out white space at the end of the template"
            )
        return sequence.tokens[:n_kept]

    def _in_context(
        self, first: _Sequence, texts: Sequence[PromptText], alone: Sequence[_Answered]
    ) -> Iterator[_Query]:
        """Yield each query after the demonstrations."""
        for text, sequence, answered in zip(texts, self._read(text.whole for text in texts), alone, strict=True):
            tokens = self._without_white_space(sequence, answered)
            n_shared = min(sequence.cut(text.ends[-1]).n_before, common_length(tokens, first.tokens))
            if n_shared == len(tokens):
                raise PromptError(
                    f"expected a query with tokens of its own, got none for {text.query!r}, which is in one token with "
                    f"{text.whole[: text.ends[-1]][-20:]!r}: choose another separator"
                )
            yield _Query(n_shared, tokens[n_shared:])

    def _context(self, first: _Sequence, text: PromptText, n_start: int, n_prefix: int) -> tuple[list[Tokens], Tokens]:
        """Return the demonstrations, each followed by its separator, and the positions of spanning tokens."""
        cuts = [first.cut(end) for end in text.ends]
        spanning = {cut.spanning for cut in cuts if cut.spanning is not None}
        borders = [n_start, *(cut.n_before for cut in cuts[1:-1]), n_prefix]
        pieces = [first.tokens[begin:end] for begin, end in itertools.pairwise(borders)]
        if not text.demonstrations:
            return [], tuple(sorted(spanning))
        if borders != sorted(borders) or not all(pieces[::2]):
            last = self._names(first.tokens[max(0, n_prefix - 3) : n_prefix + 3])
            raise PromptError(
                f"expected demonstrations with tokens that all queries share, got {last} around the end of the last "
                f"token that they share, after demonstrations that end in {text.demonstrations[-1][-40:]!r}: choose a "
                "separator that has tokens of its own"
            )
        return pieces, tuple(sorted(spanning))

    def _separator(self, query: str, label: str) -> Tokens:
        """Return the tokens of the separator between two texts."""
        text = self.writer.write([(query, label)], query)
        (sequence,) = self._read([text.whole])
        begin, end = (sequence.cut(position).n_before for position in text.ends[1:])
        return sequence.tokens[begin:end]

    def _names(self, tokens: Sequence[int]) -> list[str]:
        """Return tokens as the vocabulary has them, for messages."""
        return self.model.tokenizer.convert_ids_to_tokens(list(tokens))


def _n_start(first: _Sequence, text: PromptText, alone: Sequence[_Answered]) -> int:
    """Return how many tokens every sequence begins with, before the first demonstration or the query."""
    n_start = first.cut(text.ends[0]).n_before
    for answered in alone:
        n_preamble = answered.sequence.cut(answered.text.ends[0]).n_before
        n_start = min(n_start, n_preamble, common_length(answered.sequence.tokens, first.tokens))
    return n_start
