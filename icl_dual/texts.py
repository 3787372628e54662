"""The text of a prompt in pieces: what comes before, demonstrations, separators and query; plain, or as a chat.

| class | writes |
|---|---|
| `PlainText` | the demonstrations and the query one after another |
| `ChatText` | the same as turns of a chat, by the tokenizer's own chat template |

Each piece of a prompt is a part of one text, so that the text can be tokenised as a whole.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jinja2 import TemplateError

from icl_dual.arguments import checked
from icl_dual.models.tokenization import common_length

TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What a chat template raises where it refuses a chat, or does not fit it."""


class PromptError(ValueError):
    """Prompts are incomplete, or the model cannot read them."""


Demonstration = tuple[str, str]
"""The text of a demonstration: its filled template, and its label with the white space before it."""

ChatDemonstrations = Literal["turns", "user turn"]
"""Where a chat has its demonstrations: each as a user's turn with the label as the assistant's answer (`turns`), or all
as plain text in the user's turn that has the query (`user turn`)."""


@checked
@dataclass(frozen=True)
class Chat:
    """How prompts are written as a chat, by the chat template of the model's tokenizer.

    The query is the user's last turn, and its label is predicted right after the template's generation prompt.

    Example:
        >>> import icl_dual
        >>> icl_dual.Chat(system="You classify reviews.")
        Chat(system='You classify reviews.', demonstrations='turns', options={})
    """

    system: str | None = None
    """The system prompt. By default none is given; some templates then write one of their own."""
    demonstrations: ChatDemonstrations = "turns"
    """`turns`: each demonstration is a turn of the user, and its label the assistant's answer. `user turn`: all are
    plain text before the query, in one turn of the user."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More variables of the chat template, such as `{"enable_thinking": False}`."""


@dataclass(frozen=True)
class PromptText:
    """The text of one prompt, in pieces."""

    preamble: str
    """The text before the first demonstration, or before the query where there is none."""
    demonstrations: tuple[str, ...]
    """The text of each demonstration, label included."""
    separators: tuple[str, ...]
    """The text after each demonstration."""
    query: str
    """The text of the query, up to where its label is predicted."""

    @property
    def whole(self) -> str:
        """Return the whole text."""
        pairs = zip(self.demonstrations, self.separators, strict=True)
        return "".join((self.preamble, *itertools.chain.from_iterable(pairs), self.query))

    @property
    def ends(self) -> list[int]:
        """Return the end in characters of the preamble, then of each demonstration and of its separator, in turn."""
        pairs = zip(self.demonstrations, self.separators, strict=True)
        pieces = (self.preamble, *itertools.chain.from_iterable(pairs))
        return list(itertools.accumulate(map(len, pieces)))


@dataclass(frozen=True)
class PlainText:
    """Writes demonstrations and query one after another."""

    preamble: str
    """The text before everything else."""
    separator: str
    """The text that ends each demonstration."""

    def write(self, demonstrations: Sequence[Demonstration], query: str) -> PromptText:
        """Return the text of a prompt."""
        texts = tuple(prompt + label for prompt, label in demonstrations)
        return PromptText(self.preamble, texts, (self.separator,) * len(texts), query)

    def label_text(self, label: str) -> str:
        """Return what follows a query that is answered with a label: the same as in a demonstration."""
        return label


_MARK = re.compile("\ue0a1([0-9]+)\ue0a2")
"""Stands for the text of a turn, in characters of private use that no chat template has."""


@dataclass(frozen=True)
class ChatText:
    """Writes demonstrations and query as a chat, by a tokenizer's chat template.

    Raises:
        PromptError: the tokenizer has no chat template; or, where it writes, the template refuses a role, changes the
            text of a turn, or puts more than white space between its generation prompt and the answer.
    """

    tokenizer: Any
    """The tokenizer, which has a chat template."""
    chat: Chat
    """The system prompt, and where demonstrations are."""
    description: str
    """Text that the system prompt ends with."""
    separator: str
    """The text that ends each demonstration within the user's turn."""

    def __post_init__(self) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise PromptError(
                "expected a tokenizer with a chat template where chat is given, got one without: leave chat out, or "
                "load the model with a tokenizer= that has one"
            )

    def write(self, demonstrations: Sequence[Demonstration], query: str) -> PromptText:
        """Return the text of a chat that ends with the generation prompt."""
        if self.chat.demonstrations == "user turn":
            return self._within_turn(PlainText("", self.separator).write(demonstrations, query))
        turns: list[tuple[str, str]] = []
        for prompt, label in demonstrations:
            turns += [("user", prompt), ("assistant", label.strip())]
        preamble, *pieces = self._pieces([*turns, ("user", query)], generation_prompt=True)
        n_answered = 4 * len(demonstrations)  # prompt, what is before the answer, answer, what is after it
        return PromptText(
            preamble,
            tuple("".join(pieces[first : first + 3]) for first in range(0, n_answered, 4)),
            tuple(pieces[3:n_answered:4]),
            "".join(pieces[n_answered:]),
        )

    def _within_turn(self, plain: PromptText) -> PromptText:
        """Return the text of a chat with one turn, which has all of a plain prompt."""
        preamble, turn, after = self._pieces([("user", plain.whole)], generation_prompt=True)
        if turn != plain.whole:  # the template leaves out white space around it
            plain = replace(plain, query=plain.query.rstrip())
            first, *others = (*plain.demonstrations, plain.query)
            *demonstrations, query = (first.lstrip(), *others)
            plain = replace(plain, demonstrations=tuple(demonstrations), query=query)
        return replace(plain, preamble=preamble, query=plain.query + after)

    def label_text(self, label: str) -> str:
        """Return what follows the generation prompt where the assistant answers with a label.

        Where the template refuses answers, the label follows directly.
        """
        query, answer = "\ue0a10\ue0a2", "\ue0a11\ue0a2"
        prompt = self._render([("user", query)], generation_prompt=True)
        try:
            answered = self._render([("user", query), ("assistant", answer)], generation_prompt=False)
        except PromptError as error:
            if type(error.__cause__) is TemplateError:
                return label.strip()
            raise
        after_query = prompt.rpartition(query)[2]
        before_answer, mark, _ = answered.rpartition(query)[2].partition(answer)
        space = before_answer.removeprefix(after_query)
        if not mark or not before_answer.startswith(after_query) or space.strip():
            raise PromptError(
                "expected a chat template that writes an answer right after its generation prompt, got a prompt that "
                f"ends in {prompt[-60:]!r} and an answer after {before_answer[-60:]!r}: set the template's variables "
                "by Chat(options={…}), such as {'enable_thinking': False}"
            )
        return space + label.strip()

    def _pieces(self, turns: Sequence[tuple[str, str]], *, generation_prompt: bool) -> list[str]:
        """Return a chat in pieces: what is before the first turn's text, that text, what is before the next, …"""
        marked = [(role, f"\ue0a1{index}\ue0a2") for index, (role, _) in enumerate(turns)]
        parts = _MARK.split(self._render(marked, generation_prompt=generation_prompt))
        if parts[1::2] != [str(index) for index in range(len(turns))]:
            raise PromptError(
                f"expected a chat template that writes each of {len(turns)} turns once and in order, got turns "
                f"{parts[1::2]}: {self._advice(turns)}"
            )
        expected = self._render(turns, generation_prompt=generation_prompt)
        if (system := self._system.strip()) not in expected:
            raise PromptError(
                f"expected a chat template that writes the system prompt as it is, got a chat without {system!r}: "
                "leave out system and the task's description, and write both into the task's template"
            )
        for as_written in (str, str.strip):
            parts[1::2] = [as_written(text) for _, text in turns]
            if (written := "".join(parts)) == expected:
                return parts
        at = common_length(written, expected)
        raise PromptError(
            "expected a chat template that writes the text of a turn as it is, or without the white space around it, "
            f"got {expected[at : at + 60]!r} for {written[at : at + 60]!r}: leave special tokens out of template and "
            "rows"
        )

    @property
    def _system(self) -> str:
        """Return the text of the system prompt: the chat's own, and the description."""
        return "\n\n".join(filter(None, (self.chat.system, self.description)))

    def _render(self, turns: Sequence[tuple[str, str]], *, generation_prompt: bool) -> str:
        """Return the chat template's text of turns, after the system prompt."""
        system = self._system
        messages = [("system", system)] * bool(system) + list(turns)
        conversation = [{"role": role, "content": text} for role, text in messages]
        try:
            return self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generation_prompt, **self.chat.options
            )
        except TEMPLATE_ERRORS as error:
            if type(error) is TemplateError:  # which templates raise by raise_exception
                expected = f"takes the roles {list(dict.fromkeys(role for role, _ in messages))}"
                advice = self._advice(turns)
                if system:
                    advice = "leave out system and the task's description, and write both into the task's template"
                    advice += f"; or {self._advice(turns)}" if self._has_demonstration_turns(turns) else ""
            else:
                expected = "writes turns with text as content"
                advice = (
                    "correct the template, or set its variables by Chat(options={…}); where the tokenizer has several "
                    "templates, name one by {'chat_template': …}"
                )
            message = str(error) or type(error).__name__
            raise PromptError(f"expected a chat template that {expected}, got: {message}: {advice}") from error

    def _has_demonstration_turns(self, turns: Sequence[tuple[str, str]]) -> bool:
        """Return whether turns are demonstrations: each of these has two, and the query one."""
        return self.chat.demonstrations == "turns" and len(turns) > 2

    def _advice(self, turns: Sequence[tuple[str, str]]) -> str:
        """Return what to do where a template refuses turns."""
        if self._has_demonstration_turns(turns):
            return "use Chat(demonstrations='user turn'), which has one turn"
        return "leave chat out, or load the model with a tokenizer= that has another template"
