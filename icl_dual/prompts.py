"""Token ids with segments: the start token, each demonstration, separators, the query, and where its label comes.

The three settings share one template and one set of demonstrations. Each piece is tokenised by itself, so that a
demonstration has the same tokens in the in-context prompt and as a training sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from icl_dual.models import Model
from icl_dual.tasks import Example, Task

Tokens = tuple[int, ...]

START = -1
"""The segment of the start token in `Prompts.segments`."""
SEPARATOR = -2
"""The segment of separators in `Prompts.segments`."""


class PromptError(ValueError):
    """Prompts that a model cannot read."""


@dataclass(frozen=True, repr=False)
class Prompts:
    """A set of queries that share their demonstrations, as token ids.

    The label of a query is predicted at its last token. An in-context prompt is `start`, then each demonstration
    followed by `separator`, then the query.
    """

    start: Tokens
    demonstrations: tuple[Tokens, ...]
    demonstration_label_lengths: Tokens
    """How many of each demonstration's last tokens are its label word."""
    separator: Tokens
    queries: tuple[Tokens, ...]
    labels: tuple[Tokens, ...]
    """The tokens of each label word, as they follow a query."""
    gold: Tokens
    """Each query's label index."""

    def __repr__(self) -> str:
        return (
            f"Prompts({len(self.queries)} queries of {min(map(len, self.queries))} to {max(map(len, self.queries))} "
            f"tokens, after {len(self.demonstrations)} demonstrations in {len(self.prefix)} tokens)"
        )

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
        return torch.tensor(owners)

    @property
    def demonstration_positions(self) -> Int[Tensor, " demo_token"]:
        """Where the demonstrations' own tokens stand in the prefix, start token and separators left out."""
        return (self.segments >= 0).nonzero().squeeze(-1)

    def zero_shot(self) -> "Prompts":
        """The same queries without the demonstrations."""
        return replace(self, demonstrations=(), demonstration_label_lengths=())


def build_prompts(
    model: Model,
    task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    separator: str | None = None,
) -> Prompts:
    """Tokenise demonstrations and queries for a model.

    Args:
        model: whose tokenizer, start token and context length to use.
        task: whose template and label words to use.
        demonstrations: what stands in context, in this order.
        queries: what is asked.
        separator: text that ends each demonstration; the model's own where not given (EOS for the paper's models, a
            line break elsewhere).

    Raises:
        PromptError: no queries; a label word without tokens, or two with the same; a query that is also a
            demonstration; or the longest prompt does not fit the model's context.
    """
    if not queries:
        raise PromptError("expected at least one query, got none")
    shared = {example.identity for example in demonstrations} & {example.identity for example in queries}
    if shared:
        raise PromptError(f"expected queries apart from the demonstrations, got {len(shared)} text(s) in both")
    labels = [_label_tokens(model, task.tail, word) for word in task.label_words]
    if len(set(labels)) < len(labels):
        raise PromptError(f"{task.name}: label words {list(task.label_words)} share their tokens: {labels}")
    prompts = Prompts(
        start=tuple(model.start_tokens),
        demonstrations=tuple((*model.encode(task.prompt(shown)), *labels[shown.label]) for shown in demonstrations),
        demonstration_label_lengths=tuple(len(labels[shown.label]) for shown in demonstrations),
        separator=tuple(model.separator if separator is None else model.encode(separator)),
        queries=tuple(tuple(model.encode(task.prompt(query))) for query in queries),
        labels=tuple(labels),
        gold=tuple(query.label for query in queries),
    )
    longest_query, longest_label = max(map(len, prompts.queries)), max(map(len, labels))
    longest = len(prompts.prefix) + longest_query + longest_label
    if longest > model.n_ctx:
        raise PromptError(
            f"{task.name}: {len(demonstrations)} demonstrations take {len(prompts.prefix)} tokens, the longest query "
            f"{longest_query} and the longest label {longest_label}: {longest} in all, and {model.name} reads at most "
            f"{model.n_ctx}. Use fewer demonstrations"
        )
    return prompts


def _label_tokens(model: Model, before: str, word: str) -> Tokens:
    """The tokens of a label word as it follows a text: in most vocabularies a word carries its leading space."""
    head = model.encode(before)
    joined = model.encode(f"{before} {word}")
    tokens = joined[len(head) :] if joined[: len(head)] == head else model.encode(f" {word}")
    if not tokens:
        raise PromptError(f"label word {word!r} has no tokens in the vocabulary of {model.name}")
    return tuple(tokens)
