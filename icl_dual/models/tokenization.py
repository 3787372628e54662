"""Texts → token ids, where in the text each token lies, and what a tokenizer's own template puts in front."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from icl_dual.models.backend import UnsupportedModelError

Tokens = tuple[int, ...]
"""Token ids, in order."""


class Cut(NamedTuple):
    """Where a position in a text falls among its tokens."""

    n_before: int
    """The number of tokens that belong to the text before the position."""
    spanning: int | None
    """The index of the token that covers characters on both sides of the position; `None` where there is none."""


@dataclass(frozen=True)
class TokenisedText:
    """A text and its tokens, without special tokens that the text does not have itself."""

    text: str
    """The text."""
    tokens: Tokens
    """Its token ids."""
    begins: tuple[int, ...] | None
    """The first character of each token, by the tokenizer; `None` where the tokenizer does not say."""
    ends: tuple[int, ...] | None
    """The end of each token in characters; `None` where the tokenizer does not say."""
    encode: Callable[[str], Tokens]
    """Returns the tokens of another text, for tokenizers that do not say where tokens lie."""

    def cut(self, position: int) -> Cut:
        """Return where a position in the text falls among the tokens.

        A token that covers characters on both sides belongs to the side of its first character that is not white space,
        and a token of white space alone to the side of its first character.

        Args:
            position: the number of characters before the cut.

        Raises:
            UnsupportedModelError: the tokenizer does not say where tokens lie, and the text up to the position has
                other tokens by itself.
        """
        if position <= 0:
            return Cut(0, None)
        if position >= len(self.text):
            return Cut(len(self.tokens), None)
        if self.begins is None or self.ends is None:
            return self._cut_by_prefix(position)
        at = bisect_right(self.ends, position)
        if at == len(self.tokens):
            return Cut(at, None)
        # Many tokenizers leave a token's white space out of its characters: it is what the token before does not cover.
        begin = min(self.begins[at], self.ends[at - 1] if at else 0)
        if begin >= position:
            return Cut(at, None)
        is_space_before = not self.text[begin:position].strip()
        is_space_after = not self.text[position : self.ends[at]].strip()
        return Cut(at if is_space_before and not is_space_after else at + 1, at)

    def _cut_by_prefix(self, position: int) -> Cut:
        before = self.encode(self.text[:position])
        if before == self.tokens[: len(before)]:
            return Cut(len(before), None)
        without_space = self.encode(self.text[:position].rstrip())
        if without_space == self.tokens[: len(without_space)] and self.text[position - 1].isspace():
            return Cut(len(without_space), len(without_space))
        at = common_length(before, self.tokens)
        raise UnsupportedModelError(
            f"expected a tokenizer that says which characters each token covers, or a text with tokens that end where "
            f"{self.text[max(0, position - 20) : position]!r} ends, got the tokens {list(before[at:])} for its end "
            f"alone and {list(self.tokens[at : at + 3])} before {self.text[position : position + 20]!r}: pass a fast "
            "tokenizer (PreTrainedTokenizerFast) as tokenizer= to icl_dual.Model"
        )


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many first tokens, or characters, two sequences have in common."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(index for index in range(shorter) if a[index] != b[index])


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[TokenisedText]:
    """Return the tokens of texts; none are added that a text does not have itself."""

    def encode(text: str) -> Tokens:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    if not getattr(tokenizer, "is_fast", False):
        return [TokenisedText(text, encode(text), None, None, encode) for text in texts]
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(list(texts), **options)
    return [
        TokenisedText(text, tuple(ids), tuple(begin for begin, _ in offsets), tuple(end for _, end in offsets), encode)
        for text, ids, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True)
    ]


def template_start(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer's own template puts in front of a text: none, one or several.

    Raises:
        UnsupportedModelError: the template does more than put tokens around a text.
    """
    text = "a"
    bare = list(tokenizer(text, add_special_tokens=False).input_ids)
    whole = list(tokenizer(text).input_ids)
    for first in range(len(whole) - len(bare) + 1):
        if bare and whole[first : first + len(bare)] == bare:
            return whole[:first]
    raise UnsupportedModelError(
        f"expected a tokenizer that puts tokens before and after the tokens of a text, got {whole} for {text!r}, which "
        f"has the tokens {bare}: pass start= to icl_dual.build_prompts"
    )


def n_repeated(tokenizer: Any, start: Tokens, tokens: Tokens) -> int:
    """Return how many first tokens of a text repeat start tokens, and are left out behind them.

    A text that begins with all start tokens repeats them. Where it begins with the last of them only, it does if these
    are special tokens: others are words of the text.

    Args:
        tokenizer: the tokenizer, which says what tokens are special.
        start: the start tokens.
        tokens: the tokens of the text.
    """
    if tokens[: len(start)] == start:
        return len(start)
    overlaps = [n for n in range(len(start) - 1, 0, -1) if tokens[:n] == start[-n:]]
    special = _special_tokens(tokenizer) if overlaps else set[int]()
    return next((n for n in overlaps if special.issuperset(tokens[:n])), 0)


def _special_tokens(tokenizer: Any) -> set[int]:
    """Return the special tokens of a tokenizer: those with a role, such as the start token, and all others."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


def decoded_pieces(tokenizer: Any, tokens: Tokens) -> Iterator[tuple[str, range]]:
    """Yield the text of each token within a text, and its position; tokens that are one character together are one.

    Args:
        tokenizer: the tokenizer that made the tokens.
        tokens: the tokens.
    """
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer("a", add_special_tokens=False).input_ids  # at a text's beginning, many tokenizers omit a space
    text_before, first = tokenizer.decode(before, **options), 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode([*before, *tokens[first:end]], **options).removeprefix(text_before)
        if text.endswith("\ufffd") and end < len(tokens) and end - first < 4:
            continue  # the first bytes of a character
        yield text, range(first, end)
        first = end


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a short hash of what decides a tokenizer's tokens: vocabulary, merges, normaliser and templates.

    It is that of the tokenizer's serialisation, which another version of `tokenizers` can write differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    else:
        rules = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # set by every call
            del rules[state]
    return hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode()).hexdigest()[:16]
