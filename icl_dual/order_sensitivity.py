"""How far the order of the demonstrations alone moves in-context learning and finetuning (Shen et al., 2024).

The distance between in-context learning with two orders of the same demonstrations is the noise floor of every
comparison with finetuning: a finetuned model at a smaller distance cannot be told from another order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.arguments import Rate, Seed, checked
from icl_dual.captures.capture import capture
from icl_dual.contexts import draw_orders
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig
from icl_dual.finetuning.parallel import finetune_many
from icl_dual.finetuning.sgd import DivergedError
from icl_dual.models import Model
from icl_dual.models.journal import exclusive
from icl_dual.progress import progress_bar
from icl_dual.prompts import build_prompts
from icl_dual.results import ROUNDING, check_axes, check_names, check_values
from icl_dual.statistics.intervals import bootstrap
from icl_dual.storage import Saved
from icl_dual.tasks import Example, Task

TOP = 10
"""The number of most probable next tokens that the token overlap is computed from."""

SETTINGS = ("ICL", "FT")
"""In-context learning, and finetuning on the same demonstrations."""

PAIRS = ("ICL and ICL", "FT and FT", "ICL and FT")
"""The pairs of runs that are compared: two orders of one setting, or both settings with the same order."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class OrderSensitivity(Saved):
    """How far the order of demonstrations alone moves in-context learning (ICL) and finetuning (FT).

    Next-token distributions at the position that predicts the label are compared between two orders (ICL and ICL, FT
    and FT), averaged over pairs of orders, and between both settings with the same order (ICL and FT), averaged over
    orders.
    """

    model: str
    """The name of the model."""
    orders: list[list[int]]
    """By order, the indices of the demonstrations as they are shown; the first is 0, 1, …"""
    gold: Int[Tensor, " query"]
    """The index of each query's correct label."""
    predictions: dict[str, Int[Tensor, "order query"]]
    """By setting (`SETTINGS`), the index of the predicted label."""
    distance: dict[str, Float[Tensor, " query"]]
    """By pair (`PAIRS`), the total variation distance, from 0 (equal) to 1 (disjoint)."""
    overlap: dict[str, Float[Tensor, " query"]]
    """By pair (`PAIRS`), the share of the `TOP` most probable tokens that both have in common, from 0 to 1."""
    overlap_cosine: dict[str, Float[Tensor, " query"]]
    """By pair (`PAIRS`), the cosine of the probabilities of all tokens that are among the `TOP` of either."""

    def __post_init__(self) -> None:
        check_axes(self, order=("orders", len(self.orders)))
        measures = ("distance", "overlap", "overlap_cosine")
        check_names("predictions", self.predictions, SETTINGS)
        for name in measures:
            check_names(name, getattr(self, name), PAIRS)
        check_values(self, "gold", "predictions", low=0)
        check_values(self, *measures, low=-ROUNDING, high=1 + ROUNDING)
        if any(sorted(order) != list(range(len(self.orders[0]))) for order in self.orders):
            raise ValueError(
                f"expected orders of the same demonstrations, from 0 on, got {self.orders}: measure them again"
            )

    @property
    def accuracy(self) -> dict[str, Float[Tensor, " order"]]:
        """Return the share of correctly labelled queries of each order, by setting."""
        return {setting: (labels == self.gold).double().mean(1) for setting, labels in self.predictions.items()}

    def to_frame(self) -> pd.DataFrame:
        """Return one row a number: measure, pair, value, low, high and n.

        Rows of distances and overlaps hold the mean over queries, its 95 % interval and the number of queries. Rows of
        accuracies hold the mean over orders and the number of queries; their deviations, the number of orders.
        """
        rows: list[dict[str, Any]] = []
        for measure in ("distance", "overlap", "overlap_cosine"):
            for pair, values in getattr(self, measure).items():
                mean = bootstrap(values[None])
                numbers = {"value": mean.value, "low": mean.low, "high": mean.high, "n": mean.n_queries}
                rows.append({"measure": measure, "pair": pair} | numbers)
        for setting, values in self.accuracy.items():
            deviation = values.std().item() if len(values) > 1 else float("nan")
            rows.append({"measure": "accuracy", "pair": setting, "value": values.mean().item(), "n": len(self.gold)})
            rows.append({"measure": "accuracy deviation", "pair": setting, "value": deviation, "n": len(values)})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        pairs = ", ".join(f"{pair}={values.mean():.3f}" for pair, values in self.distance.items())
        return f"OrderSensitivity({self.model!r}, {len(self.orders)} orders, {len(self.gold)} queries, {pairs})"

    @classmethod
    def _upgraded(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors in the order of `SETTINGS` and `PAIRS`; the file sorts them by name."""
        position = {member: index for index, member in enumerate((*SETTINGS, *PAIRS))}
        names = sorted(tensors, key=lambda name: position.get(name.partition("/")[2], -1))
        return {name: tensors[name] for name in names}, metadata


@checked
@exclusive
def measure_order_sensitivity(
    model: Model,
    task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    n_orders: int,
    lr: Rate,
    config: FinetuneConfig = PAPER_FINETUNING,
    seed: Seed = 0,
    progress: bool = True,
) -> OrderSensitivity:
    """Run in-context learning and finetuning with the same demonstrations in several orders (Shen et al., 2024).

    Args:
        model: the model to run and finetune; restored afterwards.
        task: the template and the labels.
        demonstrations: the examples to order; the first order is the one they come in.
        queries: the examples to answer. Memory holds one distribution over the vocabulary for each query, order and
            setting.
        n_orders: the number of orders, at least 2.
        lr: the learning rate of the finetuning.
        config: the loss, the method and the trained projections of the finetuning.
        seed: of the orders.
        progress: show progress bars.

    Raises:
        ValueError: there are fewer than 2 orders, or more than the demonstrations have.
        DivergedError: the finetuning diverged with one of the orders.
    """
    if n_orders < 2:
        raise ValueError(f"expected n_orders of at least 2, got {n_orders}: one order has no other to compare with")
    orders = draw_orders(len(demonstrations), n_orders, seed=seed)
    probabilities: dict[str, list[Tensor]] = {setting: [] for setting in SETTINGS}
    predictions: dict[str, list[Tensor]] = {setting: [] for setting in SETTINGS}
    prompts_by_order = [
        build_prompts(model, task, [demonstrations[index] for index in order], queries) for order in orders
    ]
    deltas = finetune_many(model, prompts_by_order, [lr] * n_orders, config=config, progress=progress)
    bar = progress_bar(prompts_by_order, desc="orders", show=progress)
    for prompts, delta in zip(bar, deltas, strict=True):
        if isinstance(delta, DivergedError):
            raise delta
        captures = {"ICL": capture(model, prompts, fields=("next_log_probs",), progress=progress)}
        with delta.applied(model):
            captures["FT"] = capture(model, prompts.zero_shot(), fields=("next_log_probs",), progress=progress)
        for setting, captured in captures.items():
            assert captured.next_log_probs is not None
            probabilities[setting].append(captured.next_log_probs.exp())
            predictions[setting].append(captured.predictions)
    icl, ft = probabilities["ICL"], probabilities["FT"]
    pairs = {
        "ICL and ICL": list(itertools.combinations(icl, 2)),
        "FT and FT": list(itertools.combinations(ft, 2)),
        "ICL and FT": list(zip(icl, ft, strict=True)),
    }
    measures = {"distance": total_variation, "overlap": token_overlap, "overlap_cosine": overlap_cosine}
    means_by_measure = {
        name: {pair: torch.stack([measure(p, q) for p, q in runs]).mean(0) for pair, runs in pairs.items()}
        for name, measure in measures.items()
    }
    return OrderSensitivity(
        model=model.name,
        orders=[list(order) for order in orders],
        gold=torch.tensor([query.label for query in queries]),
        predictions={setting: torch.stack(by_order) for setting, by_order in predictions.items()},
        **means_by_measure,
    )


def total_variation(p: Float[Tensor, "query token"], q: Float[Tensor, "query token"]) -> Float[Tensor, " query"]:
    """Return the total variation distance ½ Σ |p − q|: the probability mass that differs, from 0 to 1.

    Args:
        p: the probability of each token of the vocabulary.
        q: the probabilities to compare with.

    Returns:
        The distance of each query, from 0 (equal) to 1 (disjoint).
    """
    return (p - q).abs().sum(-1) / 2


def token_overlap(
    p: Float[Tensor, "query token"], q: Float[Tensor, "query token"], k: int = TOP
) -> Float[Tensor, " query"]:
    """Return the share of the k most probable tokens that two distributions have in common.

    Args:
        p: the probability of each token of the vocabulary.
        q: the probabilities to compare with.
        k: the number of most probable tokens.

    Returns:
        The share of each query, from 0 to 1.
    """
    return (_among_top(p, k) & _among_top(q, k)).sum(-1) / k


def overlap_cosine(
    p: Float[Tensor, "query token"], q: Float[Tensor, "query token"], k: int = TOP
) -> Float[Tensor, " query"]:
    """Return the cosine of the probabilities of all tokens that are among the k most probable of either one.

    Args:
        p: the probability of each token of the vocabulary.
        q: the probabilities to compare with.
        k: the number of most probable tokens of each distribution.

    Returns:
        The cosine of each query, from 0 to 1.
    """
    either = _among_top(p, k) | _among_top(q, k)
    return torch.cosine_similarity(p * either, q * either, dim=-1)


def _among_top(p: Tensor, k: int) -> Tensor:
    """Return whether each token is among the k most probable."""
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(k).indices, True)
