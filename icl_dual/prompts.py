"""Prompts as token ids, with the source of every token: start token, demonstration, separator or query.

Zero-shot, in-context and finetuning prompts share one template and one set of demonstrations. A task's protocol decides
how they are tokenised, and which position is recorded:

- `answer` tokenises each prompt as one text and cuts it into segments. It records the token that predicts the label.
- `reference` follows the released code of Dai et al.: demonstrations and queries are tokenised one by one. The first
  label word is appended to every query, whatever the query's label is, and the last appended token is recorded. EOS
  ends each demonstration, and demonstrations that do not fit into the context are left out.

Under the `answer` protocol, a query may have other tokens after demonstrations than alone, and a demonstration other
tokens in the context than as a training sequence. Each setting then reads the tokens of its own text, and comparisons
between settings are of the tokens that both have.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import cache, cached_property, partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from icl_dual.arguments import Count, checked, of_type
from icl_dual.html_tables import Line, lines_table
from icl_dual.models import Model
from icl_dual.models.tokenization import Tokens
from icl_dual.results import check_range
from icl_dual.scoring import Scoring
from icl_dual.segments import Segmenter
from icl_dual.storage import NOT_SAVED
from icl_dual.tasks import Example, Protocol, Task
from icl_dual.texts import Chat, ChatText, PlainText, PromptError

START = -1
"""The source of the start token in `Prompts.segments`."""
SEPARATOR = -2
"""The source of separators in `Prompts.segments`."""

logger = logging.getLogger(__name__)

REFERENCE_CONTEXT = 2048
"""The reference protocol's limit on the tokens of a prompt, also for models with a longer context."""


@checked
@dataclass(frozen=True, repr=False, kw_only=True)
class Prompts:
    """Queries that share their demonstrations, as token ids.

    An in-context prompt is `start`, then each demonstration followed by `separator`, then one query, then the
    protocol's appended tokens. Under the `answer` protocol nothing is appended, and a query's label is predicted at its
    last token.

    Example:
        >>> import icl_dual
        >>> prompts = icl_dual.Prompts(
        ...     start=(0,),
        ...     demonstrations=((1, 2, 9), (3, 4, 8)),
        ...     demonstration_label_lengths=(1, 1),
        ...     separator=(7,),
        ...     queries=((5, 6), (5, 5, 6)),
        ...     labels=((8,), (9,)),
        ...     gold=(1, 0),
        ... )
        >>> prompts
        Prompts(2 queries of 2 to 3 tokens, after 2 demonstrations in 9 tokens, protocol='answer')
        >>> prompts.prefix
        (0, 1, 2, 9, 7, 3, 4, 8, 7)
        >>> prompts.segments.tolist()
        [-1, 0, 0, 0, -2, 1, 1, 1, -2]
        >>> prompts.zero_shot().prefix
        (0,)
    """

    queries: tuple[Tokens, ...]
    """The tokens of each query."""
    labels: tuple[Tokens, ...]
    """The tokens of each label word, as they follow a query."""
    gold: Tokens
    """The index of each query's label in `labels`."""
    start: Tokens = ()
    """The tokens that every sequence begins with, usually one start token."""
    demonstrations: tuple[Tokens, ...] = ()
    """The tokens of each demonstration in the context, its label word included."""
    demonstration_label_lengths: Tokens = ()
    """How many of the last tokens of each training sequence are its label word."""
    separator: Tokens = ()
    """The tokens that end each demonstration in the context."""
    separators: tuple[Tokens, ...] = ()
    """The tokens that end each demonstration, one after another, where some differ from `separator`; else empty."""
    left_out: tuple[Tokens, ...] = ()
    """Demonstrations that finetuning trains on after the others, but that are not in the context. Only
    `build_prompts(..., reference_k_mismatch=True)` has any: it repeats this mismatch of the released code."""
    protocol: Protocol = "answer"
    """Which position is recorded: `answer` or `reference`."""
    zero_shot_queries: tuple[Tokens, ...] = ()
    """The tokens of each query without demonstrations, where some differ from `queries`; else empty."""
    training_demonstrations: tuple[Tokens, ...] = ()
    """The tokens of each demonstration as a training sequence, where some differ from `demonstrations`; else empty."""
    spanning: Tokens = field(default=(), compare=False)
    """The positions, in the first query's prompt, of tokens that have characters of two segments. Such a token belongs
    to the segment of its first character that is not white space."""
    scoring: Scoring = "mean"
    """The rule by which label words are scored (`icl_dual.scoring`)."""
    baseline_queries: tuple[Tokens, ...] = ()
    """The tokens of queries without content, for the rules `unconditional` and `calibrated`; else empty."""
    zero_shot_baseline_queries: tuple[Tokens, ...] = ()
    """The tokens of `baseline_queries` without demonstrations, where some differ; else empty."""
    tokenizer: Any = field(default=None, compare=False, metadata=NOT_SAVED)
    """The tokenizer that made the tokens, by which `icl_dual.show_prompt` shows them; `None` after loading."""

    def __repr__(self) -> str:
        lengths = [len(query) for query in self.queries] or [0]
        notes = [
            f"{len(self.spanning)} tokens span two segments" * bool(self.spanning),
            "other query tokens zero-shot" * bool(self.zero_shot_queries),
            "other demonstration tokens in training" * bool(self.training_demonstrations),
            f"scoring={self.scoring!r}" * (self.scoring != "mean"),
        ]
        return (
            f"Prompts({len(self.queries)} queries of {min(lengths)} to {max(lengths)} "
            f"tokens, after {len(self.demonstrations)} demonstrations in {len(self.prefix)} tokens, "
            + "".join(f"{note}, " for note in notes if note)
            + f"protocol={self.protocol!r})"
        )

    def _repr_html_(self) -> str:
        counts = Counter(self.gold)
        lengths = {"demonstration": self.demonstrations, "query": self.queries, "label": self.labels}
        return lines_table(
            repr(self),
            [
                *(
                    Line(f"tokens of each {axis}", f"{axis}={len(texts)}", axis, [len(tokens) for tokens in texts])
                    for axis, texts in lengths.items()
                ),
                Line(
                    "queries of each label",
                    f"label={len(self.labels)}",
                    "label",
                    [counts[label] for label in range(len(self.labels))],
                ),
            ],
        )

    @property
    def appended_tokens(self) -> Tokens:
        """The tokens appended to every query: none, or the first label word under the reference protocol."""
        return self.labels[0] if self.protocol == "reference" else ()

    @cached_property
    def suffixes(self) -> tuple[Tokens, ...]:
        """The tokens after the prefix, by query: the query and the appended tokens. The last position is recorded."""
        return tuple(query + self.appended_tokens for query in self.queries)

    @property
    def training_sequences(self) -> tuple[Tokens, ...]:
        """The sequences that finetuning trains on, one a step: the demonstrations, then `left_out`."""
        return (self.training_demonstrations or self.demonstrations) + self.left_out

    @cached_property
    def prefix(self) -> Tokens:
        """The tokens before the query: the start token, and the demonstrations with their separators."""
        return tuple(token for _, tokens in self._pieces for token in tokens)

    @cached_property
    def segments(self) -> Int[Tensor, " prefix_pos"]:
        """The source of each prefix token: a demonstration's index, `START` or `SEPARATOR`."""
        return torch.tensor([source for source, tokens in self._pieces for _ in tokens], dtype=torch.long)

    @property
    def _pieces(self) -> list[tuple[int, Tokens]]:
        """The prefix in pieces, each after its source."""
        pieces = [(START, self.start)]
        separators = self.separators or (self.separator,) * len(self.demonstrations)
        for index, (demonstration, separator) in enumerate(zip(self.demonstrations, separators, strict=True)):
            pieces += [(index, demonstration), (SEPARATOR, separator)]
        return pieces

    @property
    def demonstration_positions(self) -> Int[Tensor, " demo_token"]:
        """The prefix positions of demonstration tokens, without the start token and separators."""
        return (self.segments >= 0).nonzero().squeeze(-1)

    @cached_property
    def shared_query_tokens(self) -> list[list[tuple[int, int]]]:
        """For each query, the tokens that it has both in context and zero-shot: the index in each, in order."""
        zero_shot = self.zero_shot()
        return [_shared(*pair) for pair in zip(self.suffixes, zero_shot.suffixes, strict=True)]

    @cached_property
    def shared_demonstration_tokens(self) -> list[list[tuple[int, int]]]:
        """For each demonstration, the tokens that it has both in context and as a training sequence: the index in each,
        in order."""
        pairs = zip(self.demonstrations, self.training_sequences, strict=False)
        return [_shared(*pair) for pair in pairs]

    def zero_shot(self) -> "Prompts":
        """Return prompts with the same queries and no demonstrations."""
        return replace(
            self,
            queries=self.zero_shot_queries or self.queries,
            baseline_queries=self.zero_shot_baseline_queries or self.baseline_queries,
            demonstrations=(),
            demonstration_label_lengths=(),
            separators=(),
            left_out=(),
            zero_shot_queries=(),
            zero_shot_baseline_queries=(),
            training_demonstrations=(),
            spanning=tuple(position for position in self.spanning if position < len(self.start)),
        )

    @checked
    def first(self, n_queries: Count) -> "Prompts":
        """Return prompts with the first queries alone, after the same demonstrations."""
        by_query = {name: getattr(self, name)[:n_queries] for name in ("queries", "gold", "zero_shot_queries")}
        return replace(self, **by_query)


def _shared(a: Tokens, b: Tokens) -> list[tuple[int, int]]:
    """Return the indices of the tokens that two sequences have in common, in order."""
    if a == b:
        return [(index, index) for index in range(len(a))]
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return [(block.a + index, block.b + index) for block in blocks for index in range(block.size)]


@checked
def build_prompts(
    model: Model,
    task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    demonstration_task: Task | None = None,
    separator: str | None = None,
    start: str | Sequence[int] | None = None,
    chat: Chat | None = None,
    scoring: Scoring = "mean",
    reference_k_mismatch: bool = False,
) -> Prompts:
    """Tokenise demonstrations and queries for a model, by the task's protocol.

    Under the `answer` protocol, prompts have the tokens of their whole text: a token that has characters of two
    segments belongs to that of its first character that is not white space. White space at the end of a query that is
    in one token with a label word is a part of the label.

    Args:
        model: the model that will read the prompts; gives tokenizer, start token and context length.
        task: the task of the queries; gives template, label words and protocol.
        demonstrations: the examples in the context, in this order.
        queries: the examples to predict labels of, at least one.
        demonstration_task: the task that gives the demonstrations' template and label words; `task` by default.
        separator: text that ends each demonstration. By default the task's, or else the model's own: EOS for XGLM (the
            paper's models), a line break for all others. The reference protocol always uses EOS.
        start: the text or tokens before every text, which are not repeated where the text begins with them. By default
            what the tokenizer's own template puts in front: none, one or several tokens. For a chat, none: its template
            writes them.
        chat: write the prompts as a chat, by the chat template of the model's tokenizer; by default as plain text.
        scoring: the rule by which label words are scored (`icl_dual.scoring`).
        reference_k_mismatch: whether finetuning also trains on the demonstrations that the reference protocol leaves
            out of a full context, as the released code does. By default both have the same demonstrations.

    Returns:
        The prompts. `prompts.zero_shot()` are the same queries without demonstrations.

    Raises:
        PromptError: there are no queries; a label word has no tokens, the same tokens as another, or tokens that are
            not its own (the message shows them); a query is also a demonstration (the reference protocol allows this);
            the longest prompt does not fit into the model's context; the chat template refuses the chat; or an option
            is not one of the task's protocol.
        UnsupportedModelError: the model has no tokenizer, or one from which segments cannot be cut.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> demonstrations = task.demonstrations(2, seed=1)
        >>> icl_dual.build_prompts(tiny_model(), task, demonstrations, task.queries(3))
        Prompts(3 queries of 26 to 27 tokens, after 2 demonstrations in 63 tokens, protocol='answer')
    """
    _check_options(task, demonstrations, queries, separator, start, chat, reference_k_mismatch)
    context_task = demonstration_task or task
    _check_added_tokens(model, (task, context_task), separator)
    if task.protocol == "reference":
        uncut = _piecewise(model, task, context_task, demonstrations, queries, scoring)
        # The released code cuts by the longest query of its whole validation split, not of the queries in use.
        longest_of_split = max(len(model.encode(task.prompt(query))) for query in task.queries())
        prompts = _cut_to_fit(uncut, longest_of_split, min(REFERENCE_CONTEXT, model.n_ctx), reference_k_mismatch)
    else:
        segmenter = _segmenter(model, task, separator, start, chat)
        uncut = prompts = _joined(segmenter, task, context_task, demonstrations, queries, scoring)
    if len(set(prompts.labels)) < len(prompts.labels):
        raise PromptError(
            f"{task.name}: expected label words with different tokens, got {list(prompts.labels)} for "
            f"{list(task.label_words)}: choose other label words"
        )
    _check_fits(model, task, uncut, prompts)
    return prompts


def _segmenter(
    model: Model, task: Task, separator: str | None, start: str | Sequence[int] | None, chat: Chat | None
) -> Segmenter:
    """Return what tokenises the texts of a task under the answer protocol."""
    separator = task.separator if separator is None else separator
    separator = model.separator_text if separator is None else separator
    if start is None:
        start = () if chat is not None else model.start_tokens
    elif isinstance(start, str):
        start = model.encode(start)
    if chat is not None:
        return Segmenter(model, ChatText(model.tokenizer, chat, task.description, separator), tuple(start))
    return Segmenter(model, PlainText(task.description, separator), tuple(start))


def _joined(
    segmenter: Segmenter,
    task: Task,
    context_task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    scoring: Scoring,
) -> Prompts:
    """Return prompts with the tokens of their whole texts.

    Texts without content change nothing but the baseline queries.
    """
    texts = [(context_task.prompt(example), context_task.label_text(example.label)) for example in demonstrations]
    labels = [task.label_text(label) for label in range(len(task.label_words))]
    segments = segmenter.segments(texts, [*map(task.prompt, queries)], labels)
    prompts = Prompts(
        **segments._asdict(),
        gold=tuple(query.label for query in queries),
        scoring=scoring,
        tokenizer=segmenter.model.tokenizer,
    )
    baselines = partial(
        segmenter.baseline_queries,
        texts=[text for text in _baseline_texts(task, scoring) if text],
        labels=labels,
        label_tokens=prompts.labels,
    )
    alone = baselines((), prefix=prompts.start)
    in_context = alone if scoring == "unconditional" else baselines(texts, prefix=prompts.prefix)
    return replace(
        prompts, baseline_queries=in_context, zero_shot_baseline_queries=() if alone == in_context else alone
    )


def _baseline_texts(task: Task, scoring: Scoring) -> tuple[str, ...]:
    """Return the texts of queries without content that a rule of scoring needs."""
    if scoring == "unconditional":
        return (task.unconditional_prompt,)
    return task.content_free_prompts if scoring == "calibrated" else ()


def _piecewise(
    model: Model,
    task: Task,
    context_task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    scoring: Scoring,
) -> Prompts:
    """Return prompts of the reference protocol: demonstrations, labels and queries tokenised one by one."""
    labels, context_labels = (
        [_label_tokens(model, of.tail, word) for word in of.label_words] for of in (task, context_task)
    )
    return Prompts(
        start=tuple(model.start_tokens),
        demonstrations=tuple(
            (*model.encode(context_task.prompt(example)), *context_labels[example.label]) for example in demonstrations
        ),
        demonstration_label_lengths=tuple(len(context_labels[example.label]) for example in demonstrations),
        separator=tuple(model.end_tokens),
        queries=tuple(tuple(model.encode(task.prompt(query))) for query in queries),
        labels=tuple(labels),
        gold=tuple(query.label for query in queries),
        protocol="reference",
        scoring=scoring,
        baseline_queries=tuple(tuple(model.encode(text)) for text in _baseline_texts(task, scoring) if text),
        tokenizer=model.tokenizer,
    )


def check_prompts(model: Model, prompts: Prompts) -> None:
    """Check that prompts are complete and fit the model; prompts built by hand may not.

    Raises:
        TypeError: the model is not an `icl_dual.Model`.
        PromptError: some tokens, counts or lengths do not fit; the message says which.
    """
    if not of_type(model, Model):
        raise TypeError(f"expected an icl_dual.Model, got {type(model).__name__}: wrap it with icl_dual.Model(model)")
    _check_token_ids(model, prompts)
    check_lengths(prompts)
    # A label's last token is predicted and never read.
    longest_labelled = max(map(len, prompts.queries)) + max(map(len, prompts.labels)) - 1
    longest_prompt = len(prompts.prefix) + max(longest_labelled, *map(len, prompts.suffixes))
    alone = (*map(len, prompts.training_sequences), *map(len, prompts.zero_shot_queries))
    longest = max(longest_prompt, *(len(prompts.start) + n for n in (*alone, 0)))
    if longest > model.n_ctx:
        raise PromptError(
            f"expected prompts of at most {model.n_ctx} tokens, the context of {model.name}, got one of {longest}: use "
            "fewer or shorter demonstrations"
        )


def shared_texts(demonstrations: Sequence[Example], queries: Sequence[Example]) -> set[str]:
    """Return the texts that are both a demonstration and a query."""
    return {example.identity for example in demonstrations} & {example.identity for example in queries}


def _check_options(
    task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    separator: str | None,
    start: str | Sequence[int] | None,
    chat: Chat | None,
    reference_k_mismatch: bool,
) -> None:
    reference = task.protocol == "reference"
    if not queries:
        raise PromptError("expected at least one query, got none: pass some of task.queries(n)")
    n_labels = len(task.label_words)
    if others := sorted({query.label for query in queries} - set(range(n_labels))):
        raise PromptError(
            f"{task.name}: expected queries with a label from 0 to {n_labels - 1}, the index of a label word, got "
            f"{others[0]}: pass queries of this task"
        )
    if reference and separator is not None:
        raise PromptError(
            f"expected no separator under the reference protocol, which ends demonstrations by EOS, got "
            f"separator={separator!r}: leave separator out, or load the task with protocol='answer'"
        )
    if reference and (start is not None or chat is not None):
        raise PromptError(
            "expected neither start nor chat under the reference protocol, which has the released code's prompts, got "
            f"start={start!r} and chat={chat!r}: leave both out, or load the task with protocol='answer'"
        )
    if reference_k_mismatch and not reference:
        raise PromptError(
            "expected reference_k_mismatch with a task of the reference protocol only, got one of the answer protocol: "
            "leave it out, or load the task with protocol='reference'"
        )
    shared = shared_texts(demonstrations, queries)
    if shared and not reference:
        raise PromptError(
            f"expected queries and demonstrations with different texts, got {len(shared)} text(s) in both: leave them "
            "out of one"
        )


_LIKE_ADDED_TOKEN = re.compile(r"<[^<>\s{}]+>|\[[^\[\]\s{}]+\]")
"""Matches texts in the form in which tokens are added to a vocabulary."""

PADDING = 64
"""Vocabularies of a multiple of this size are padded for speed, and have more embeddings than tokens."""


def _check_added_tokens(model: Model, tasks: Sequence[Task], separator: str | None) -> None:
    """Check for tokens that the model has embeddings for, but its tokenizer lost.

    A tokenizer that the user passed as tokenizer= is taken as it is.

    Raises:
        PromptError: a text of the tasks looks like such a token. Where none does, a warning is logged.
    """
    n_tokens = 0 if model.tokenizer is None else len(model.tokenizer)
    is_given = model.tokenizer is not model.backend.tokenizer
    if is_given or not 0 < n_tokens < model.d_vocab or model.d_vocab % PADDING == 0:
        return
    sizes = (
        f"{model.name} has embeddings for {model.d_vocab} tokens, and a tokenizer of {n_tokens}. TransformerLens loads "
        "tokenizers again, without tokens that were added in memory"
    )
    advice = "pass yours as tokenizer= to icl_dual.Model or load_model"
    texts = [
        text
        for task in tasks
        for text in (*task.label_words, task.template, task.separator, task.description, task.label_separator)
    ]
    for like_added in _LIKE_ADDED_TOKEN.findall(" ".join(filter(None, [*texts, separator]))):
        if len(tokens := model.encode(like_added)) > 1:
            raise PromptError(f"expected one token for {like_added!r}, got {tokens}; {sizes}: {advice}")
    _warn_once(f"{sizes}: where the prompts have such tokens, {advice}")


@cache
def _warn_once(message: str) -> None:
    """Log a warning, the first time only."""
    logger.warning(message)


def check_lengths(prompts: Prompts) -> None:
    """Raise a PromptError where counts, lengths or label indices of prompts do not fit each other."""
    if not prompts.queries or not prompts.labels:
        raise PromptError(
            f"expected at least one query and one label, got {len(prompts.queries)} queries and {len(prompts.labels)} "
            "labels: pass both to Prompts"
        )
    for name, of in (
        ("separators", "demonstrations"),
        ("training_demonstrations", "demonstrations"),
        ("zero_shot_queries", "queries"),
        ("zero_shot_baseline_queries", "baseline_queries"),
    ):
        n, expected = len(getattr(prompts, name)), len(getattr(prompts, of))
        if n not in (0, expected):
            raise PromptError(
                f"expected {name} as empty or with as many as {of}, {expected}, got {n}: leave {name} out where all "
                "are as in the context"
            )
    gold, label_lengths = prompts.gold, prompts.demonstration_label_lengths
    if len(gold) != len(prompts.queries) or not all(0 <= label < len(prompts.labels) for label in gold):
        raise PromptError(
            f"expected gold as a label index from 0 to {len(prompts.labels) - 1} for each of {len(prompts.queries)} "
            f"queries, got {gold}: pass the index of each query's label in Prompts.labels"
        )
    lengths = tuple(map(len, prompts.training_sequences))
    if len(label_lengths) != len(lengths) or not all(
        1 <= n <= of for n, of in zip(label_lengths, lengths, strict=True)
    ):
        raise PromptError(
            "expected demonstration_label_lengths as one number for each demonstration, from 1 to its length in tokens "
            f"{lengths}, got {label_lengths}: pass the number of label tokens at the end of each demonstration, "
            "those in left_out included"
        )
    tokens = ("queries", "labels", "demonstrations", "left_out", "separators", "training_demonstrations")
    for name in (*tokens, "zero_shot_queries", "baseline_queries", "zero_shot_baseline_queries"):
        check_range(name, min(chain.from_iterable(getattr(prompts, name)), default=0), low=0)
    for name in ("start", "separator", "spanning"):
        check_range(name, min(getattr(prompts, name), default=0), low=0)


def _check_token_ids(model: Model, prompts: Prompts) -> None:
    non_empty = {
        "demonstrations": prompts.demonstrations + prompts.left_out,
        "training_demonstrations": prompts.training_demonstrations,
        "queries": prompts.queries,
        "zero_shot_queries": prompts.zero_shot_queries,
        "baseline_queries": prompts.baseline_queries,
        "zero_shot_baseline_queries": prompts.zero_shot_baseline_queries,
        "labels": prompts.labels,
    }
    others = {"start": (prompts.start,), "separator": (prompts.separator,), "separators": prompts.separators}
    for name, sequences in {**non_empty, **others}.items():
        for index, tokens in enumerate(sequences):
            if not of_type(tokens, tuple) or not all(of_type(token, int) for token in tokens):
                raise PromptError(
                    f"expected {name} as tuples of token ids, got {tokens!r}: pass tuple(ids) of integers"
                )
            if not tokens and name in non_empty:
                raise PromptError(f"expected at least one token in each of the {name}, got none in {name}[{index}]")
            if tokens and not 0 <= min(tokens) <= max(tokens) < model.d_vocab:
                raise PromptError(
                    f"expected token ids from 0 to {model.d_vocab - 1}, the vocabulary of {model.name}, got {tokens} "
                    f"in {name}: encode the text with this model's tokenizer"
                )


def _check_fits(model: Model, task: Task, uncut: Prompts, prompts: Prompts) -> None:
    """Check that the longest prompt fits into the context, and that the reference protocol kept a demonstration."""
    longest_query, longest_label = max(map(len, prompts.queries)), max(map(len, prompts.labels))
    longest = len(prompts.prefix) + longest_query + longest_label
    if longest <= model.n_ctx and (prompts.demonstrations or not uncut.demonstrations):
        return
    k, n_prefix, advice = len(uncut.demonstrations), len(uncut.prefix), "use fewer or shorter demonstrations"
    if len(prompts.start) + longest_query + longest_label > model.n_ctx:
        advice = "a query alone is too long, use shorter queries or a model with a longer context"
    if task.protocol == "reference":
        k, n_prefix = min(1, k), len(replace(uncut, demonstrations=uncut.demonstrations[:1]).prefix)
        if k and longest_query + longest_label <= model.n_ctx:
            advice = "under the reference protocol not even one demonstration fits before the longest of all queries"
    raise PromptError(
        f"{task.name}: expected prompts of at most {model.n_ctx} tokens, the context of {model.name}, got "
        f"{n_prefix + longest_query + longest_label}: {k} demonstrations take {n_prefix} tokens, the longest query "
        f"{longest_query} and the longest label {longest_label}; {advice}"
    )


def _cut_to_fit(prompts: Prompts, longest_query: int, n_ctx: int, keep_left_out: bool) -> Prompts:
    """Keep the first demonstrations that fit, as the released code counts: with a second start token for the query."""
    longest = len(prompts.start) + max(longest_query, *map(len, prompts.queries)) + max(map(len, prompts.labels))
    n_tokens, n_fit = len(prompts.start), 0
    for demonstration in prompts.demonstrations:
        n_tokens += len(demonstration) + len(prompts.separator)
        if n_tokens + longest >= n_ctx:
            break
        n_fit += 1
    lengths = prompts.demonstration_label_lengths
    return replace(
        prompts,
        demonstrations=prompts.demonstrations[:n_fit],
        left_out=prompts.demonstrations[n_fit:] if keep_left_out else (),
        demonstration_label_lengths=lengths if keep_left_out else lengths[:n_fit],
    )


def _label_tokens(model: Model, text_before: str, word: str) -> Tokens:
    """Return a label word's tokens as they follow a text: in most vocabularies a word includes its leading space."""
    tokens_before = model.encode(text_before)
    joined = model.encode(f"{text_before} {word}")
    separable = joined[: len(tokens_before)] == tokens_before
    tokens = joined[len(tokens_before) :] if separable else model.encode(f" {word}")
    if not tokens:
        raise PromptError(
            f"expected label words with tokens in the vocabulary of {model.name}, got {word!r} without: choose another "
            "label word"
        )
    return tuple(tokens)
