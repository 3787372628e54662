"""`Stability`: how far replicas of the finetuning move each metric.

Finetuning amplifies small differences. Near a threshold, a change of the learning rate by 10⁻³, or of the weights by
the precision that they are stored in, decides whether a token keeps a massive activation, and with it the value of a
metric. An interval over queries does not see this. So the finetuning is repeated at slightly other rates from slightly
other weights (`icl_dual.finetuning.replicas`), and each metric carries the range of its values.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.field_docs import document_fields
from icl_dual.results import check_axes, check_values, compare_by_value, tensors_table


@document_fields
@compare_by_value
@dataclass(frozen=True, repr=False, eq=False)
class Stability:
    """How far each replica of the finetuning moves each metric, on the same queries."""

    replicas: tuple[str, ...]
    """The difference of each replica from the finetuning itself, in words."""
    n_queries: int
    """The number of first queries that replicas are captured on."""
    shifts: dict[str, Float[Tensor, " replica"]]
    """By metric: the replica's value less the run's own on the same queries; NaN where one of the two is undefined,
    infinite where the replica diverged and the metric depends on finetuning."""
    layer_shifts: dict[str, Float[Tensor, "replica layer"]] = field(default_factory=dict[str, Tensor])
    """By metric: the shifts at each layer."""
    diverged: tuple[str, ...] = ()
    """The errors of the replicas that diverged."""

    def __post_init__(self) -> None:
        check_axes(self, replica=("replicas", len(self.replicas)))
        check_values(self, "n_queries", low=0)
        least = torch.finfo(torch.float64).min  # infinite is a replica that diverged, and never below
        check_values(self, "shifts", "layer_shifts", low=least, nan=True, infinite=True)
        if len(self.diverged) > len(self.replicas):
            raise ValueError(
                f"expected at most as many diverged as replicas ({len(self.replicas)}), got {len(self.diverged)}: "
                "measure the stability again"
            )
        if unknown := sorted(self.layer_shifts.keys() - self.shifts.keys()):
            raise ValueError(
                f"expected layer_shifts of metrics that shifts has, got {unknown[0]!r}: measure the stability again"
            )

    @classmethod
    def of(
        cls,
        overall: Mapping[str, Float[Tensor, "_"]],
        by_layer: Mapping[str, Float[Tensor, "_ layer"]],
        replicas: Mapping[str, tuple[Mapping[str, Float[Tensor, "_"]], Mapping[str, Float[Tensor, "_ layer"]]] | str],
        *,
        n_queries: int,
        unaffected: Collection[str] = (),
    ) -> "Stability":
        """Return the stability of metrics, from their values in the run and in its replicas.

        Args:
            overall: by metric, each query's value over all layers together.
            by_layer: by metric, each query's value at each layer.
            replicas: by replica, the same two for its first `n_queries` queries; or, where it diverged, the error.
            n_queries: how many first queries the replicas have.
            unaffected: the metrics that do not depend on finetuning, which replicas need not have: none moves them.
        """

        def shift(name: str, values: Tensor, part: int, replica: Any) -> Tensor:
            if name in unaffected:
                return torch.zeros_like(values[0], dtype=torch.float64)
            if isinstance(replica, str):
                return torch.full_like(values[0], torch.inf, dtype=torch.float64)
            of_replica = replica[part][name].double()
            return of_replica.nanmean(0) - values[: len(of_replica)].double().nanmean(0)

        def shifts(values_by_name: Mapping[str, Tensor], part: int) -> dict[str, Tensor]:
            return {
                name: torch.stack([shift(name, values, part, replica) for replica in replicas.values()])
                for name, values in values_by_name.items()
            }

        return cls(
            replicas=tuple(replicas),
            n_queries=n_queries,
            shifts=shifts(overall, 0),
            layer_shifts=shifts(by_layer, 1),
            diverged=tuple(replica for replica in replicas.values() if isinstance(replica, str)),
        )

    def layer_range(self, metric: str) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
        """Return how far replicas move a metric down and up at each layer: at most 0, and at least 0."""
        shifts = self.layer_shifts[metric].nan_to_num(nan=0.0, posinf=torch.inf)
        return shifts.amin(0).clamp(max=0), shifts.amax(0).clamp(min=0)

    def _repr_html_(self) -> str:
        return tensors_table(self)

    def __repr__(self) -> str:
        diverged = f", {len(self.diverged)} diverged" if self.diverged else ""
        return f"Stability({len(self.replicas)} replicas on {self.n_queries} queries{diverged})"
