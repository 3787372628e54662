"""Altered contexts: the demonstrations with other labels, or in another order.

If in-context learning acts like finetuning *on its demonstrations*, then its likeness to finetuning on them has to fall
when their labels are wrong, when they are another task's, when nothing but their size is left of the finetuning. Each
such control takes the place of one run of a comparison, so it costs one forward pass.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from icl_dual.prompts import Prompts
from icl_dual.tasks import Example

Context = Literal["own", "shuffled labels", "flipped labels", "random labels", "reordered"]
"""What stands in context: the demonstrations; the same with their labels dealt out anew, each turned into another by
one rule, or drawn at random; or the same in another order."""


def relabel(demonstrations: Sequence[Example], context: Context, n_labels: int, *, seed: int) -> list[Example]:
    """Demonstrations with other labels, or in another order.

    Args:
        demonstrations: what to change.
        context: `shuffled labels` deals the labels that there are to the demonstrations anew, `random labels` draws
            each from all labels, both so that at least one changes (unless all are the same and are shuffled);
            `flipped labels` makes every label wrong by one rule (with two labels, each becomes the other; with more,
            all go on by the same drawn number); `reordered` leaves labels alone.
        n_labels: how many labels the task has, two at least.
        seed: of the draw.

    Raises:
        ValueError: there is no such change, or there are fewer than two labels.
    """
    if n_labels < 2:
        raise ValueError(f"expected two labels at least, got {n_labels}")
    rng = np.random.default_rng(seed)
    labels = np.array([shown.label for shown in demonstrations], dtype=int)
    if context == "reordered":
        return [demonstrations[index] for index in draw_orders(len(demonstrations), 2, seed=seed)[1]]
    own = labels
    if context == "shuffled labels":
        # Drawn again until something changes, where anything can.
        while (labels == own).all() and len(set(own.tolist())) > 1:
            labels = rng.permutation(own)
    elif context == "flipped labels":
        labels = (labels + rng.integers(1, n_labels)) % n_labels
    elif context == "random labels":
        while (labels == own).all() and len(own):
            labels = rng.integers(n_labels, size=len(own))
    elif context != "own":
        raise ValueError(f"expected a context out of {get_args(Context)}, got {context!r}")
    return [replace(shown, label=int(label)) for shown, label in zip(demonstrations, labels, strict=True)]


def matching_training_steps(shown: Prompts, trained: Prompts, k: int, context: Context, *, seed: int) -> list[int]:
    """Which training step each demonstration in a control's context stands for, token by token; −1 for none.

    `relabel` made the context of k demonstrations, of which either may lack some for want of room.
    """
    order = draw_orders(k, 2, seed=seed)[1] if context == "reordered" else range(k)
    lengths = dict(enumerate(map(len, trained.training_sequences)))
    pairs = zip(order, shown.demonstrations, strict=False)
    return [step if lengths.get(step) == len(tokens) else -1 for step, tokens in pairs]


def draw_orders(k: int, n: int, *, seed: int) -> list[tuple[int, ...]]:
    """n different orders of k demonstrations, their own first.

    Raises:
        ValueError: there are not as many, or n is below one.
    """
    if not 1 <= n <= math.factorial(k):
        raise ValueError(
            f"expected from 1 to {k}! = {math.factorial(k)} orders of {k} demonstrations, got {n}: ask for fewer "
            "orders, or show more demonstrations"
        )
    rng = np.random.default_rng(seed)
    found = {tuple(range(k)): None}
    if math.factorial(k) <= 2 * n:  # too few to find the last ones by chance
        others = list(itertools.permutations(range(k)))[1:]
        found |= {others[index]: None for index in rng.permutation(len(others))}
    while len(found) < n:
        found[tuple(rng.permutation(k).tolist())] = None
    return list(found)[:n]
