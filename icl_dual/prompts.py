"""Token ids with segments: the start token, each demonstration, separators, the query, and where its label comes.

The three settings share one template and one set of demonstrations. Each piece is tokenised by itself, so that a
demonstration has the same tokens in the in-context prompt and as a training sequence.

Two protocols differ in what is recorded. `answer` records at the token that predicts the label. `reference` does as the
released code of Dai et al.: the first label word follows every query, whatever its label is, and its last token is the
recorded position; EOS ends a demonstration and nothing else does; demonstrations that do not fit are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from icl_dual.models import Model
from icl_dual.tasks import Example, Protocol, Task

Tokens = tuple[int, ...]

START = -1
"""The segment of the start token in `Prompts.segments`."""
SEPARATOR = -2
"""The segment of separators in `Prompts.segments`."""

REFERENCE_CONTEXT = 2048
"""The reference protocol's prompts are shorter than this, whatever the model could read."""


class PromptError(ValueError):
    """Prompts that a model cannot read."""


@dataclass(frozen=True, repr=False)
class Prompts:
    """A set of queries that share their demonstrations, as token ids.

    The label of a query is predicted at its last token. An in-context prompt is `start`, then each demonstration
    followed by `separator`, then the query, then what the protocol has after it.
    """

    start: Tokens
    demonstrations: tuple[Tokens, ...]
    demonstration_label_lengths: Tokens
    """How many of each training sequence's last tokens are its label word."""
    separator: Tokens
    queries: tuple[Tokens, ...]
    labels: tuple[Tokens, ...]
    """The tokens of each label word, as they follow a query."""
    gold: Tokens
    """Each query's label index."""
    protocol: Protocol = "answer"
    left_out: tuple[Tokens, ...] = ()
    """Demonstrations that finetuning trains on after the others and that no context shows (the released code's own
    mismatch, where it was asked for)."""

    def __repr__(self) -> str:
        return (
            f"Prompts({len(self.queries)} queries of {min(map(len, self.queries))} to {max(map(len, self.queries))} "
            f"tokens, after {len(self.demonstrations)} demonstrations in {len(self.prefix)} tokens, "
            f"protocol={self.protocol!r})"
        )

    @property
    def appended_tokens(self) -> Tokens:
        """What follows every query: nothing, or the first label word under the reference protocol."""
        return self.labels[0] if self.protocol == "reference" else ()

    @cached_property
    def suffixes(self) -> tuple[Tokens, ...]:
        """Each query's own tokens; the recorded position is the last."""
        return tuple(query + self.appended_tokens for query in self.queries)

    @property
    def training_sequences(self) -> tuple[Tokens, ...]:
        """What finetuning trains on, a demonstration a step."""
        return self.demonstrations + self.left_out

    @cached_property
    def prefix(self) -> Tokens:
        """Everything before the query: the start token and the demonstrations with their separators."""
        ids = list(self.start)
        for demonstration in self.demonstrations:
            ids += [*demonstration, *self.separator]
        return tuple(ids)

    @cached_property
    def segments(self) -> Int[Tensor, " prefix_pos"]:
        """Whose each prefix token is: the demonstration's index, `START` or `SEPARATOR`."""
        owners = [START] * len(self.start)
        for index, demonstration in enumerate(self.demonstrations):
            owners += [index] * len(demonstration) + [SEPARATOR] * len(self.separator)
        return torch.tensor(owners, dtype=torch.long)

    @property
    def demonstration_positions(self) -> Int[Tensor, " demo_token"]:
        """Where the demonstrations' own tokens stand in the prefix, start token and separators left out."""
        return (self.segments >= 0).nonzero().squeeze(-1)

    def zero_shot(self) -> "Prompts":
        """The same queries without the demonstrations."""
        return replace(self, demonstrations=(), demonstration_label_lengths=(), left_out=())


def build_prompts(
    model: Model,
    task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    demonstration_task: Task | None = None,
    separator: str | None = None,
    reference_k_mismatch: bool = False,
) -> Prompts:
    """Tokenise demonstrations and queries for a model, by the task's protocol.

    Args:
        model: whose tokenizer, start token and context length to use.
        task: whose template and label words to use.
        demonstrations: what stands in context, in this order.
        queries: what is asked.
        demonstration_task: whose template and label words the demonstrations have, where they are of another task.
        separator: text that ends each demonstration; the model's own where not given (EOS for the paper's models, a
            line break elsewhere). The reference protocol has EOS.
        reference_k_mismatch: finetune also on demonstrations that the reference protocol leaves out of the context for
            want of room, as the released code does. Otherwise both have the same.

    Raises:
        PromptError: no queries; a label word without tokens, or two with the same; a query that is also a
            demonstration (the reference protocol takes its splits as they are); the longest prompt, or under the
            reference protocol a single demonstration with it, does not fit the model's context; or an option that the
            task's protocol does not have.
    """
    reference = task.protocol == "reference"
    if not queries:
        raise PromptError("expected at least one query, got none")
    if reference and separator is not None:
        raise PromptError(f"the reference protocol ends demonstrations by EOS alone, got separator={separator!r}")
    if reference_k_mismatch and not reference:
        raise PromptError("reference_k_mismatch belongs to the reference protocol, got a task of the answer protocol")
    shared = shared_texts(demonstrations, queries)
    if shared and not reference:
        raise PromptError(f"expected queries apart from the demonstrations, got {len(shared)} text(s) in both")
    labels = [_label_tokens(model, task.tail, word) for word in task.label_words]
    shown_task = demonstration_task or task
    shown_labels = [_label_tokens(model, shown_task.tail, word) for word in shown_task.label_words]
    if len(set(labels)) < len(labels):
        raise PromptError(f"{task.name}: label words {list(task.label_words)} share their tokens: {labels}")
    if reference:
        separator_tokens = model.end_tokens
    else:
        separator_tokens = model.separator if separator is None else model.encode(separator)
    whole = Prompts(
        start=tuple(model.start_tokens),
        demonstrations=tuple(
            (*model.encode(shown_task.prompt(shown)), *shown_labels[shown.label]) for shown in demonstrations
        ),
        demonstration_label_lengths=tuple(len(shown_labels[shown.label]) for shown in demonstrations),
        separator=tuple(separator_tokens),
        queries=tuple(tuple(model.encode(task.prompt(query))) for query in queries),
        labels=tuple(labels),
        gold=tuple(query.label for query in queries),
        protocol=task.protocol,
    )
    prompts = whole
    if reference:
        # By all queries of the protocol, however few are asked: the released code cuts by its whole validation split.
        all_queries = max(len(model.encode(task.prompt(query))) for query in task.queries())
        prompts = _cut_to_fit(whole, all_queries, min(REFERENCE_CONTEXT, model.n_ctx), reference_k_mismatch)
    longest_query, longest_label = max(map(len, prompts.queries)), max(map(len, labels))
    longest = len(prompts.prefix) + longest_query + longest_label
    if longest > model.n_ctx or (demonstrations and not prompts.demonstrations):
        n_shown, n_prefix = len(demonstrations), len(whole.prefix)
        advice = "Use fewer demonstrations"
        if reference:
            n_shown, n_prefix = min(1, n_shown), len(replace(whole, demonstrations=whole.demonstrations[:1]).prefix)
            if n_shown and longest_query + longest_label <= model.n_ctx:
                advice = (
                    "Under the reference protocol not even one demonstration fits beside the longest of all queries"
                )
            else:
                advice = "A query alone is too long"
        raise PromptError(
            f"{task.name}: {n_shown} demonstrations take {n_prefix} tokens, the longest query {longest_query} and the "
            f"longest label {longest_label}: {n_prefix + longest_query + longest_label} in all, and {model.name} reads "
            f"at most {model.n_ctx}. {advice}"
        )
    return prompts


def check_prompts(model: Model, prompts: Prompts) -> None:
    """Raise a PromptError unless prompts are whole and the model can read them: made by hand, they may not be.

    Raises:
        TypeError: the model is not wrapped.
        PromptError: says which tokens, counts or lengths do not fit.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected an icl_dual.Model, got {type(model).__name__}: wrap it, as icl_dual.Model(model)")
    found = {"demonstrations": prompts.training_sequences, "queries": prompts.queries, "labels": prompts.labels}
    for name, sequences in {**found, "start": (prompts.start,), "separator": (prompts.separator,)}.items():
        for at, tokens in enumerate(sequences):
            if not isinstance(tokens, tuple) or not all(isinstance(token, int) for token in tokens):
                raise PromptError(f"expected {name} as tuples of token ids, got {tokens!r}")
            if not tokens and name in found:
                raise PromptError(f"expected at least one token in each of the {name}, got none in number {at}")
            if tokens and not 0 <= min(tokens) <= max(tokens) < model.d_vocab:
                raise PromptError(
                    f"{model.name}: expected token ids of 0 to {model.d_vocab - 1}, got {tokens} in {name}"
                )
    if not prompts.queries or not prompts.labels:
        raise PromptError(f"expected queries and labels, got {len(prompts.queries)} and {len(prompts.labels)}")
    gold, lengths = prompts.gold, prompts.demonstration_label_lengths
    if len(gold) != len(prompts.queries) or not all(0 <= label < len(prompts.labels) for label in gold):
        raise PromptError(
            f"expected a label of 0 to {len(prompts.labels) - 1} for each of {len(prompts.queries)} queries, got {gold}"
        )
    whole = tuple(map(len, prompts.training_sequences))
    if len(lengths) != len(whole) or not all(1 <= n <= of for n, of in zip(lengths, whole, strict=True)):
        raise PromptError(f"expected the label length of each demonstration, at most its own {whole}, got {lengths}")
    labelled = max(map(len, prompts.queries)) + max(map(len, prompts.labels)) - 1  # a label's last token never runs
    in_context = len(prompts.prefix) + max(labelled, *map(len, prompts.suffixes))
    longest = max(in_context, *(len(prompts.start) + n for n in (*whole, 0)))
    if longest > model.n_ctx:
        raise PromptError(
            f"{model.name} reads at most {model.n_ctx} tokens: expected prompts of no more, got one of {longest}. Use "
            "fewer or shorter demonstrations"
        )


def shared_texts(demonstrations: Sequence[Example], queries: Sequence[Example]) -> set[str]:
    """The texts that are both a demonstration and a query."""
    return {example.identity for example in demonstrations} & {example.identity for example in queries}


def _cut_to_fit(prompts: Prompts, longest_query: int, n_ctx: int, keep_left_out: bool) -> Prompts:
    """The first demonstrations that fit, by the released code's count, which allows for the longest query's own start
    token beside the context's."""
    longest = len(prompts.start) + max(longest_query, *map(len, prompts.queries)) + max(map(len, prompts.labels))
    taken, n_fit = len(prompts.start), 0
    for demonstration in prompts.demonstrations:
        taken += len(demonstration) + len(prompts.separator)
        if taken + longest >= n_ctx:
            break
        n_fit += 1
    lengths = prompts.demonstration_label_lengths
    return replace(
        prompts,
        demonstrations=prompts.demonstrations[:n_fit],
        left_out=prompts.demonstrations[n_fit:] if keep_left_out else (),
        demonstration_label_lengths=lengths if keep_left_out else lengths[:n_fit],
    )


def _label_tokens(model: Model, before: str, word: str) -> Tokens:
    """The tokens of a label word as it follows a text: in most vocabularies a word carries its leading space."""
    head = model.encode(before)
    joined = model.encode(f"{before} {word}")
    tokens = joined[len(head) :] if joined[: len(head)] == head else model.encode(f" {word}")
    if not tokens:
        raise PromptError(f"label word {word!r} has no tokens in the vocabulary of {model.name}")
    return tuple(tokens)
