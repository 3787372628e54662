"""One patch for all queries: the change of the down projections that comes closest to the context for every query.

An exact patch is for one query. Here one change of weights serves all of them, as well as it can (the recipe of
PatchKV, 2026). At the recorded token of query i, let h_i be the input of a layer's down projection in a pass without
demonstrations, and t_i what the layer's output lacks: its in-context output minus its own. Ridge regression gives

    ΔW = argmin Σ_i ‖t_i − ΔW h_i‖² + λ ‖ΔW‖²,    λ = relative_ridge · ‖HᵀH‖² / tr(HᵀH).

Layers come in sequence. Each reads, at the recorded token, the in-context stream: what the layers below would give if
their patches were exact. So every layer's change is fitted in the same pass, and queries cost one in-context and one
zero-shot pass each. Only HᵀH and TᵀH are kept, by layer: the memory does not grow with the number of queries. When the
patch is applied, the layers below are not exact, and their errors add up. The patched model shows how far it comes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import Count, Finite, checked
from icl_dual.field_docs import document_fields
from icl_dual.models import LowRank, Model, UnsupportedModelError
from icl_dual.models.journal import exclusive
from icl_dual.models.tokenization import Tokens
from icl_dual.patches.exact import Recorder, prompt_pair
from icl_dual.patches.patch import Patch
from icl_dual.patches.ridge import RidgeStatistics
from icl_dual.prompts import Prompts, check_prompts

RELATIVE_RIDGE = 1e-3
"""The default of λ in units of ‖HᵀH‖² / tr(HᵀH)."""


@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class SharedPatch(Patch):
    """One change of the down projections for all queries, by ridge regression. It may be applied to any prompt."""

    ridge: Float[Tensor, " layer"]
    """λ by layer."""
    n_queries: int
    """The number of queries that it was fitted to."""

    @checked
    def truncated(self, rank: Count) -> "SharedPatch":
        """Return the patch with the leading singular directions of each layer's ΔW alone: the closest of that rank.

        Args:
            rank: how many to keep; as many as there are, or more, keep all.
        """
        factors = {
            part: LowRank(*(factor[..., :rank] for factor in low_rank)) for part, low_rank in self.factors.items()
        }
        return replace(self, factors=factors)


@checked
@exclusive
def build_shared_patch(model: Model, prompts: Prompts, *, relative_ridge: Finite = RELATIVE_RIDGE) -> SharedPatch:
    """Fit one change of the down projections to all queries of some prompts.

    Args:
        model: the model; a bridge with dense MLPs, and no norm after them.
        prompts: the demonstrations, and the queries to fit to.
        relative_ridge: λ in units of ‖HᵀH‖² / tr(HᵀH) of each layer. With 0, queries must be at least as many as hidden
            activations.

    Returns:
        The patch, of the rank that the number of queries allows. `truncated` gives lower ranks.

    Raises:
        PromptError: the prompts are incomplete, or do not fit into the model's context.
        ValueError: relative_ridge is negative, or it is 0 and HᵀH of a layer is singular.
        UnsupportedModelError: the model's MLPs are mixtures of experts, have no hooks or a norm after them, or its
            blocks are not sums of a residual stream, attention and an MLP.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> prompts = icl_dual.Prompts(
        ...     start=(0,),
        ...     demonstrations=((5, 6), (7, 8)),
        ...     demonstration_label_lengths=(1, 1),
        ...     queries=((9, 10), (12, 10)),
        ...     labels=((6,), (8,)),
        ...     gold=(0, 1),
        ... )
        >>> patch = icl_dual.build_shared_patch(tiny_model(), prompts)
        >>> patch.rank, patch.truncated(1).rank, patch.n_queries
        (2, 1, 2)
    """
    statistics = sum_statistics(model, prompts)
    ridges = [layer.scaled_ridge(relative_ridge) for layer in statistics]
    weights = torch.stack([layer.solve(ridge) for layer, ridge in zip(statistics, ridges, strict=True)])
    rank = min(*weights.shape[1:], len(prompts.queries))
    return SharedPatch(
        model=model.name,
        fingerprint=model.fingerprint(),
        factors={"out": _factorised(weights, rank, torch.promote_types(model.dtype, torch.float32))},
        bias=None,
        scale=None,
        ridge=torch.tensor(ridges, dtype=torch.float64),
        n_queries=len(prompts.queries),
    )


def sum_statistics(model: Model, prompts: Prompts) -> list[RidgeStatistics]:
    """Return each layer's sums for the regression of what its output lacks on the input of its down projection.

    Sums over two sets of queries with the same demonstrations add up to those over both.
    """
    check_prompts(model, prompts)
    in_context, alone = Recorder(model), Recorder(model)
    if in_context.form.shift == "scale":
        raise UnsupportedModelError(
            f"{model.architecture}: expected MLPs that write into the residual stream, got a norm after them: what a "
            "layer lacks is no linear function of a change of its down projection, use another model"
        )
    statistics = [
        RidgeStatistics.empty(d_in=in_context.form.d_hidden, d_out=model.d_model) for _ in range(model.n_layers)
    ]
    for query in range(len(prompts.queries)):
        for layer, (h, t) in enumerate(_rows(in_context, alone, *prompt_pair(prompts, query))):
            statistics[layer] = statistics[layer].with_rows(h[None], t[None])
    return statistics


def _rows(in_context: Recorder, alone: Recorder, prompt: Tokens, query: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield h and t of each layer for one query."""
    in_context.run(prompt)

    def replace_last(layer: int, stream: Tensor) -> Tensor:
        replaced = stream.clone()
        replaced[:, -1] = in_context.streams[layer].to(stream)
        return replaced

    alone.run(query, on_residual=replace_last)
    for layer in range(in_context.model.n_layers):
        yield alone.hidden[layer], in_context.streams[layer] - alone.streams[layer]


def _factorised(weights: Float[Tensor, "layer d_out d_in"], rank: int, dtype: torch.dtype) -> LowRank:
    """Return ΔW as factors, the leading singular directions first."""
    U, S, Vh = torch.linalg.svd(weights, full_matrices=False)
    left, right = U * S.unsqueeze(-2), Vh.mT
    return LowRank(left[..., :rank].to(dtype).contiguous(), right[..., :rank].to(dtype).contiguous())
