"""What stands beside a claim: contexts that are not what was finetuned on, and how much order alone changes.

If in-context learning acts like finetuning *on its demonstrations*, then its likeness to finetuning on them has to fall
when their labels are wrong, when they are another task's, when nothing but their size is left of the finetuning. Each
such control takes the place of one run of a comparison, so it costs one forward pass.

Order is a control by itself (Shen et al., 2024). How far two orders of the same demonstrations move in-context learning
is the noise floor: finetuning that is no farther from it than that could not be told from it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from icl_dual.capture import capture
from icl_dual.finetune import DivergedError, Loss, Method, Trained, finetune_many
from icl_dual.models import Model
from icl_dual.prompts import Prompts, build_prompts
from icl_dual.statistics.intervals import bootstrap
from icl_dual.storage import load_tensors, reading, save_tensors
from icl_dual.tasks import Example, Task

Context = Literal["own", "shuffled labels", "flipped labels", "random labels", "reordered"]
"""What stands in context: the demonstrations; the same with their labels dealt out anew, each turned into another by
one rule, or drawn at random; or the same in another order."""

TOP = 10
"""Token overlap is that of this many most probable next tokens."""

PAIRS = ("ICL and ICL", "FT and FT", "ICL and FT")


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


def steps_of(shown: Prompts, trained: Prompts, k: int, context: Context, *, seed: int) -> list[int]:
    """Which training step each demonstration in a control's context stands for, token by token; −1 for none.

    `relabel` made the context of k demonstrations, of which either may lack some for want of room.
    """
    order = draw_orders(k, 2, seed=seed)[1] if context == "reordered" else range(k)
    lengths = dict(enumerate(map(len, trained.training)))
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


@dataclass(frozen=True, repr=False)
class OrderSensitivity:
    """How far the order of demonstrations alone moves in-context learning (ICL) and finetuning (FT).

    Of next-token distributions where the label is predicted, over pairs of orders (ICL and ICL, FT and FT) and, in the
    same order, between the two.
    """

    model: str
    orders: list[list[int]]
    gold: Int[Tensor, " query"]
    predictions: dict[str, Int[Tensor, "order query"]]
    """By setting: label indices."""
    distance: dict[str, Float[Tensor, " query"]]
    """By pair (`PAIRS`): total variation, from 0 (the same) to 1."""
    overlap: dict[str, Float[Tensor, " query"]]
    """By pair: the share of the `TOP` most probable tokens that both have."""
    overlap_cosine: dict[str, Float[Tensor, " query"]]
    """By pair: cosine of the probabilities of all tokens that are among the `TOP` of either."""

    @property
    def accuracy(self) -> dict[str, Float[Tensor, " order"]]:
        """By setting: share of queries whose predicted label is the gold one, by order."""
        return {name: (found == self.gold).double().mean(1) for name, found in self.predictions.items()}

    def to_frame(self) -> pd.DataFrame:
        """One row a number: measure, pair, mean over queries with its 95 % interval, and n queries; accuracies by
        setting, their mean and deviation over orders."""
        rows: list[dict[str, Any]] = []
        for measure in ("distance", "overlap", "overlap_cosine"):
            for pair, values in getattr(self, measure).items():
                found = bootstrap(values[None])
                numbers = {"value": found.value, "low": found.low, "high": found.high, "n": found.n_queries}
                rows.append({"measure": measure, "pair": pair} | numbers)
        for setting, values in self.accuracy.items():
            deviation = values.std().item() if len(values) > 1 else float("nan")
            rows.append({"measure": "accuracy", "pair": setting, "value": values.mean().item(), "n": len(self.gold)})
            rows.append({"measure": "accuracy deviation", "pair": setting, "value": deviation, "n": len(values)})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        pairs = ", ".join(f"{pair}={values.mean():.3f}" for pair, values in self.distance.items())
        return f"OrderSensitivity({self.model!r}, {len(self.orders)} orders, {len(self.gold)} queries, {pairs})"

    def save(self, folder: str | PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write it into a folder, as safetensors and JSON, with whatever metadata belongs to it."""
        grouped = ("predictions", "distance", "overlap", "overlap_cosine")
        tensors = {f"{group}/{name}": value for group in grouped for name, value in getattr(self, group).items()}
        about = {"model": self.model, "orders": self.orders, **(metadata or {})}
        save_tensors(Path(folder), tensors | {"gold": self.gold}, about)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "OrderSensitivity":
        """Read what `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged.
        """
        tensors, about = load_tensors(Path(folder))
        with reading("OrderSensitivity", folder):
            groups: dict[str, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                group, _, member = name.partition("/")
                if member:
                    groups.setdefault(group, {})[member] = value
            ordered = {
                group: {name: found[name] for name in (("ICL", "FT") if group == "predictions" else PAIRS)}
                for group, found in groups.items()
            }
            return cls(model=about["model"], orders=about["orders"], gold=tensors["gold"], **ordered)


def order_sensitivity(
    model: Model,
    task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    n_orders: int,
    lr: float,
    loss: Loss = "all",
    method: Method = "sgd",
    trained: Trained = "key-value",
    seed: int = 0,
    progress: bool = True,
) -> OrderSensitivity:
    """Show, and finetune on, the same demonstrations in several orders (Shen et al., 2024).

    Args:
        model: comes back as it was.
        task: whose template and labels to use.
        demonstrations: what is put in order; their own order is the first.
        queries: what is asked. Memory takes a distribution over the vocabulary for each, order and setting.
        n_orders: how many orders, 2 at least.
        lr: of the finetuning.
        loss: the same.
        method: the same.
        trained: the same.
        seed: of the orders.
        progress: show progress bars.

    Raises:
        ValueError: fewer than 2 orders, or more than there are.
    """
    if n_orders < 2:
        raise ValueError(f"expected 2 orders at least, got {n_orders}")
    orders = draw_orders(len(demonstrations), n_orders, seed=seed)
    found: dict[str, list[Tensor]] = {"ICL": [], "FT": []}
    predictions: dict[str, list[Tensor]] = {"ICL": [], "FT": []}
    shown = [build_prompts(model, task, [demonstrations[index] for index in order], queries) for order in orders]
    rates = [lr] * n_orders
    deltas = finetune_many(model, shown, rates, loss=loss, method=method, trained=trained, progress=progress)
    for prompts, delta in zip(tqdm(shown, desc="orders", disable=not progress, leave=False), deltas, strict=True):
        if isinstance(delta, DivergedError):
            raise delta
        runs = {"ICL": capture(model, prompts, fields=("next_log_probs",), progress=progress)}
        with delta.applied(model):
            runs["FT"] = capture(model, prompts.zero_shot(), fields=("next_log_probs",), progress=progress)
        for name, run in runs.items():
            assert run.next_log_probs is not None
            found[name].append(run.next_log_probs.exp())
            predictions[name].append(run.predictions)
    of_icl, of_ft = found["ICL"], found["FT"]
    pairs = {
        "ICL and ICL": list(itertools.combinations(of_icl, 2)),
        "FT and FT": list(itertools.combinations(of_ft, 2)),
        "ICL and FT": list(zip(of_icl, of_ft, strict=True)),
    }
    measures = {"distance": total_variation, "overlap": token_overlap, "overlap_cosine": overlap_cosine}
    measured = {
        name: {pair: torch.stack([measure(*two) for two in of_pair]).mean(0) for pair, of_pair in pairs.items()}
        for name, measure in measures.items()
    }
    return OrderSensitivity(
        model=model.name,
        orders=[list(order) for order in orders],
        gold=torch.tensor([query.label for query in queries]),
        predictions={name: torch.stack(by_order) for name, by_order in predictions.items()},
        **measured,
    )


def total_variation(p: Float[Tensor, "query token"], q: Float[Tensor, "query token"]) -> Float[Tensor, " query"]:
    """½ Σ |p − q|: how much probability has to move to make one distribution of the other."""
    return (p - q).abs().sum(-1) / 2


def token_overlap(
    p: Float[Tensor, "query token"], q: Float[Tensor, "query token"], k: int = TOP
) -> Float[Tensor, " query"]:
    """The share of the k most probable tokens that two distributions have in common."""
    return (_among_top(p, k) & _among_top(q, k)).sum(-1) / k


def overlap_cosine(
    p: Float[Tensor, "query token"], q: Float[Tensor, "query token"], k: int = TOP
) -> Float[Tensor, " query"]:
    """Cosine of the probabilities of all tokens that are among the k most probable of either distribution."""
    either = _among_top(p, k) | _among_top(q, k)
    return torch.cosine_similarity(p * either, q * either, dim=-1)


def _among_top(p: Tensor, k: int) -> Tensor:
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(k).indices, True)
