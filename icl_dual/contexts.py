"""Altered contexts: demonstrations with other labels, or in another order.

If in-context learning acts like finetuning *on its demonstrations*, the two must become less alike when the context's
labels are wrong, or when its demonstrations come from another task. An altered context replaces one run of a
comparison, and so costs one forward pass.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from icl_dual.arguments import Seed, checked
from icl_dual.prompts import Prompts
from icl_dual.tasks import Example

Context = Literal["own", "shuffled labels", "flipped labels", "random labels", "reordered"]
"""The demonstrations in the context, against those of finetuning: the same (`own`), with labels that are permuted,
mapped to wrong labels by one rule, or drawn at random, or in another order."""


@checked
def relabel(demonstrations: Sequence[Example], context: Context, n_labels: int, *, seed: Seed) -> list[Example]:
    """Return demonstrations with other labels, or in another order.

    Args:
        demonstrations: the demonstrations to change.
        context: `shuffled labels` permutes the labels among the demonstrations, so that at least one changes (unless
            all are equal). `random labels` draws each label from all labels, so that at least one changes. `flipped
            labels` makes every label wrong by one rule: with two labels, each becomes the other; with more, all shift
            by the same random number. `reordered` keeps labels and changes the order. `own` changes nothing.
        n_labels: the number of labels of the task, at least 2.
        seed: the seed of the random draw.

    Raises:
        ValueError: there is no such context, or there are fewer than two labels.

    Example:
        >>> import icl_dual
        >>> rows = [{"text": f"film {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> demonstrations = task.demonstrations(4, seed=1)
        >>> flipped = icl_dual.relabel(demonstrations, "flipped labels", 2, seed=0)
        >>> [a.label + b.label for a, b in zip(demonstrations, flipped)]
        [1, 1, 1, 1]
    """
    if n_labels < 2:
        raise ValueError(f"expected n_labels of at least 2, got {n_labels}: an altered context needs another label")
    rng = np.random.default_rng(seed)
    true_labels = labels = np.array([example.label for example in demonstrations], dtype=int)
    if context == "reordered":
        return [demonstrations[index] for index in draw_orders(len(demonstrations), 2, seed=seed)[1]]
    if context == "shuffled labels":
        # Shuffled again until a label changes, unless all are equal.
        while (labels == true_labels).all() and len(set(true_labels.tolist())) > 1:
            labels = rng.permutation(true_labels)
    elif context == "flipped labels":
        labels = (labels + rng.integers(1, n_labels)) % n_labels
    elif context == "random labels":
        while (labels == true_labels).all() and len(true_labels):
            labels = rng.integers(n_labels, size=len(true_labels))
    elif context != "own":
        raise ValueError(f"expected context as one of {get_args(Context)}, got {context!r}: choose one of these")
    return [replace(example, label=int(label)) for example, label in zip(demonstrations, labels, strict=True)]


def matching_training_steps(
    context_prompts: Prompts, training_prompts: Prompts, k: int, context: Context, *, seed: int
) -> list[int]:
    """Return the training step of each demonstration in an altered context, by position; −1 for those without one.

    A demonstration has a step if finetuning trained on the same example with as many tokens as it would have as a
    training sequence, so that the two can be compared token by token.

    Args:
        context_prompts: the prompts with the altered context.
        training_prompts: the prompts that finetuning trains on.
        k: the number of demonstrations passed to `relabel`. Either prompts may have fewer, where not all fit.
        context: the context passed to `relabel`.
        seed: the seed passed to `relabel`.
    """
    order = draw_orders(k, 2, seed=seed)[1] if context == "reordered" else range(k)
    length_by_step = dict(enumerate(map(len, training_prompts.training_sequences)))
    in_context = context_prompts.training_sequences[: len(context_prompts.demonstrations)]
    pairs = zip(order, in_context, strict=False)
    return [step if length_by_step.get(step) == len(tokens) else -1 for step, tokens in pairs]


def draw_orders(k: int, n: int, *, seed: int) -> list[tuple[int, ...]]:
    """Return n different orders of k demonstrations, the original order first.

    Args:
        k: the number of demonstrations.
        n: the number of orders, from 1 to k!.
        seed: the seed of the random orders.

    Returns:
        For each order, the indices of the demonstrations by position.

    Raises:
        ValueError: n is below 1, or above the k! orders that exist.

    Example:
        >>> from icl_dual.contexts import draw_orders
        >>> draw_orders(2, 2, seed=0)
        [(0, 1), (1, 0)]
    """
    if not 1 <= n <= math.factorial(k):
        raise ValueError(
            f"expected n from 1 to {k}! = {math.factorial(k)} orders of {k} demonstrations, got {n}: use fewer orders, "
            "or more demonstrations"
        )
    rng = np.random.default_rng(seed)
    orders = {tuple(range(k)): None}
    if math.factorial(k) <= 2 * n:  # too few orders exist to draw the last ones by chance
        others = list(itertools.permutations(range(k)))[1:]
        orders |= {others[index]: None for index in rng.permutation(len(others))}
    while len(orders) < n:
        orders[tuple(rng.permutation(k).tolist())] = None
    return list(orders)[:n]
