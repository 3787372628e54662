"""How much the order of the demonstrations alone changes (Shen et al., 2024).

How far two orders of the same demonstrations move in-context learning is the noise floor: finetuning that is no farther
from it than that could not be told from it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from icl_dual.captures.capture import capture
from icl_dual.contexts import draw_orders
from icl_dual.finetuning.parallel import finetune_many
from icl_dual.finetuning.sgd import DivergedError
from icl_dual.finetuning.weight_delta import PAPER_FINETUNING, FinetuneConfig
from icl_dual.models import Model
from icl_dual.prompts import build_prompts
from icl_dual.statistics.intervals import bootstrap
from icl_dual.storage import load_tensors, reading, save_tensors
from icl_dual.tasks import Example, Task

TOP = 10
"""Token overlap is that of this many most probable next tokens."""

PAIRS = ("ICL and ICL", "FT and FT", "ICL and FT")


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


def measure_order_sensitivity(
    model: Model,
    task: Task,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    n_orders: int,
    lr: float,
    config: FinetuneConfig = PAPER_FINETUNING,
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
        config: the loss, the method and the trained projections of the finetuning.
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
    deltas = finetune_many(model, shown, rates, config=config, progress=progress)
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
