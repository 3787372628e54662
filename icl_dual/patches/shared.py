"""One patch for all queries: the change of the MLPs that comes closest to the context for every query.

An exact patch is for one query. Here one change of weights serves all of them, as well as it can. At the recorded token
of query i, let h_i be the input of a layer's down projection in a pass without demonstrations, and t_i what the layer's
output lacks: its in-context output minus its own. Three changes of weights are sums over queries of h and t:

| patch | change | after |
|---|---|---|
| ridge regression | ΔW = argmin Σ_i ‖t_i − ΔW h_i‖² + λ ‖ΔW‖² = TᵀH (HᵀH + λI)⁻¹ | PatchKV, 2026 |
| mean patch, the "thought vector" | Δb = mean of t_i | Mazzawi et al., 2025 |
| thought matrix | ΔW = strength · Σ_i t_i ⊗ h_i / ‖h_i‖² | Mazzawi et al., 2025 |

For ridge regression, λ = relative_ridge · ‖HᵀH‖² / tr(HᵀH). With strength 1 / n, the thought matrix of n queries is the
mean of the changes of rank one, each fitted to one query.

Layers come in sequence. Each reads, at the recorded token, the in-context stream: what the layers below would give if
their patches were exact. So every layer's change is fitted in the same pass, and queries cost one in-context and one
zero-shot pass each. Only sums are kept, by layer: the memory does not grow with the number of queries. When the patch
is applied, the layers below are not exact, and their errors add up. The patched model shows how far it comes.

ΔW is a change of the down projection. Where a norm follows it (Gemma 2 and 3, OLMo 2), ΔW acts through the norm, which
gives γ ⊙ n with n of mean square 1. There, t_i in the two sums of products is not what the block's output lacks, but
what the down projection lacks for the closest output that the norm can give; γ stays. So the thought matrix of one
query is exact at its token without such a norm, and only close with one. To change γ instead, as exact patches do,
serves one query only: Δγ divides by n, dimension by dimension, and n differs among queries.

The bias is that of the down projection, and of the norm after it where there is one: what blocks lack on average adds
to the stream as it is. Llama's projections and the RMSNorms of Gemma and OLMo have no bias: there, the patch adds one
to the architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import Count, Finite, Seed, checked
from icl_dual.field_docs import document_fields
from icl_dual.models import LowRank, Model
from icl_dual.models.journal import exclusive
from icl_dual.patches.exact import common_form
from icl_dual.patches.patch import Patch
from icl_dual.patches.queries import LayerRows, run_over_queries
from icl_dual.patches.ridge import RidgeStatistics, by_singular_value, check_sums, range_of
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.results import check_axes, check_values
from icl_dual.storage import Saved
from icl_dual.torch_utils import linalg, vector_norm

RELATIVE_RIDGE = 1e-3
"""The default of λ in units of ‖HᵀH‖² / tr(HᵀH)."""

BATCH_SIZE = 64
"""The default of the largest number of queries to run at once."""

SharedMethod = Literal["ridge", "mean", "thought-matrix", "random"]
"""How a shared patch came about."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class SharedPatch(Patch):
    """One change of MLPs for all queries. It may be applied to any prompt."""

    method: SharedMethod
    """How it came about: by `ridge` regression, as the `mean` patch, as the `thought-matrix`, or at `random`."""
    ridge: Float[Tensor, " layer"] | None
    """λ by layer; `None` but for ridge regression."""
    n_queries: int
    """The number of queries that it was fitted to; of a random patch, those of the patch that it is as large as."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, "ridge", low=0)
        check_values(self, "n_queries", low=1)
        if (self.method == "ridge") != (self.ridge is not None):
            got = "none" if self.ridge is None else "one"
            raise ValueError(
                f"expected ridge with the method 'ridge' alone, got {got} with {self.method!r}: correct it"
            )

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
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class SharedStatistics(Saved):
    """Sums over queries from which shared patches follow, by layer and in float64. They add up over sets of queries.

    The size does not depend on the number of queries. With d_hidden far above d_model it is mostly that of `gram`.
    """

    model: str
    """The name of the model."""
    fingerprint: str
    """The fingerprint of the model's weights; it begins with their precision."""
    gram: Float[Tensor, "layer d_hidden d_hidden"]
    """HᵀH = Σ_i h_i ⊗ h_i."""
    cross: Float[Tensor, "layer d_model d_hidden"]
    """TᵀH = Σ_i t_i ⊗ h_i, where t is what the down projection lacks."""
    thought: Float[Tensor, "layer d_model d_hidden"]
    """Σ_i t_i ⊗ h_i / ‖h_i‖²; not finite where an h_i is zero."""
    lack: Float[Tensor, "layer d_model"]
    """Σ_i of what the block's output lacks."""
    n_queries: int
    """The number of queries."""

    def __post_init__(self) -> None:
        check_axes(self)
        check_values(self, "n_queries", low=1)
        check_sums(self, "gram", "cross", "lack")

    def __repr__(self) -> str:
        return f"SharedStatistics({self.model!r}, {self.n_queries} queries, {self.cross.shape[0]} layers)"

    def __add__(self, other: "SharedStatistics") -> "SharedStatistics":
        """Return the sums over the queries of both.

        Raises:
            ValueError: they are of different models or weights.
        """
        if (self.model, self.fingerprint) != (other.model, other.fingerprint):
            raise ValueError(
                f"expected sums of one model and the same weights, got {self.model!r} ({self.fingerprint}) and "
                f"{other.model!r} ({other.fingerprint}): compute both with the same model"
            )
        sums = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "fingerprint")}
        return replace(self, **{name: value + getattr(other, name) for name, value in sums.items()})

    @checked
    def ridge_patch(self, relative_ridge: Finite = RELATIVE_RIDGE) -> SharedPatch:
        """Return the patch by ridge regression, of the rank that the number of queries allows.

        Args:
            relative_ridge: λ in units of ‖HᵀH‖² / tr(HᵀH) of each layer. With 0, queries must be at least as many as
                hidden activations.

        Raises:
            ValueError: relative_ridge is negative, or it is 0 and HᵀH of a layer is singular; or the input of a down
                projection is zero for all queries.
        """
        if relative_ridge < 0:
            raise ValueError(f"expected relative_ridge of at least 0, got {relative_ridge}: pass a positive one")
        if (zero := (self.gram == 0).flatten(1).all(dim=1)).any():
            raise ValueError(
                f"{self.model}, layer {int(zero.nonzero()[0])}: expected inputs of the down projection other than "
                f"zero, got zeros for all {self.n_queries} queries: no change of its weights acts on them, use others"
            )
        layers = [RidgeStatistics(*sums, self.n_queries) for sums in zip(self.gram, self.cross, strict=True)]
        ridges = [layer.scaled_ridge(relative_ridge) for layer in layers]
        factors = [layer.factors(ridge) for layer, ridge in zip(layers, ridges, strict=True)]
        return self._patch("ridge", factors, ridge=torch.tensor(ridges, dtype=torch.float64))

    def mean_patch(self) -> SharedPatch:
        """Return the mean patch: what blocks lack on average, as a bias."""
        return self._patch("mean", [], bias=self.lack / self.n_queries)

    @checked
    def thought_matrix(self, strength: Finite | None = None) -> SharedPatch:
        """Return the thought matrix.

        Args:
            strength: the factor of the sum over queries; by default 1 divided by their number.

        Raises:
            ValueError: the input of a down projection was zero for a query, so that no change of its weights acts.
        """
        if not self.thought.isfinite().all():
            layer = int((~self.thought.isfinite().flatten(1).all(dim=1)).nonzero()[0])
            raise ValueError(
                f"{self.model}, layer {layer}: expected inputs of the down projection other than zero, got one of norm "
                "0: no change of weights acts on it, leave that query out"
            )
        strength = 1 / self.n_queries if strength is None else strength
        outputs = [range_of(matrix, self.n_queries) for matrix in self.thought]
        factors = [
            by_singular_value(basis, strength * matrix.mT @ basis, self.n_queries)
            for basis, matrix in zip(outputs, self.thought, strict=True)
        ]
        return self._patch("thought-matrix", factors)

    def _patch(
        self,
        method: SharedMethod,
        factors: list[tuple[Tensor, Tensor]],
        *,
        bias: Tensor | None = None,
        ridge: Tensor | None = None,
    ) -> SharedPatch:
        """Return a patch, in the model's precision and in float32 at least."""
        arithmetic: torch.dtype = getattr(torch, self.fingerprint.split(":")[0])
        dtype = torch.promote_types(arithmetic, torch.float32)
        stacked = [_stacked(sides).to(dtype) for sides in zip(*factors, strict=True)]
        return SharedPatch(
            model=self.model,
            fingerprint=self.fingerprint,
            factors={"out": LowRank(*stacked)} if stacked else {},
            bias=None if bias is None else bias.to(dtype),
            scale=None,
            method=method,
            ridge=ridge,
            n_queries=self.n_queries,
        )


def _stacked(factors: Sequence[Float[Tensor, "d _"]]) -> Float[Tensor, "layer d rank"]:
    """Return factors of all layers; where one has fewer columns, zeros follow."""
    rank = max(factor.shape[1] for factor in factors)
    return torch.stack([torch.nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in factors])


@checked
@exclusive
def sum_statistics(model: Model, prompts: Prompts, *, batch_size: Count = BATCH_SIZE) -> SharedStatistics:
    """Sum over queries what shared patches need: one pass in context and one without for each query.

    Demonstrations run once, and queries in batches after them.

    Args:
        model: the model; a bridge with dense MLPs.
        prompts: the demonstrations, and the queries to fit to.
        batch_size: the largest number of queries to run at once.

    Returns:
        The sums. `ridge_patch`, `mean_patch` and `thought_matrix` give the patches.

    Raises:
        PromptError: the prompts are incomplete, or do not fit into the model's context.
        UnsupportedModelError: the model's MLPs are mixtures of experts or have no hooks, its blocks are not sums of a
            residual stream, attention and an MLP, or it cannot run queries apart from their demonstrations.
    """
    check_prompts(model, prompts)
    form = common_form(model)
    n_layers, d_model, d_hidden = model.n_layers, model.d_model, form.d_hidden

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(n_layers, *shape, dtype=torch.float64)

    statistics = SharedStatistics(
        model=model.name,
        fingerprint=model.fingerprint(),
        gram=zeros(d_hidden, d_hidden),
        cross=zeros(d_model, d_hidden),
        thought=zeros(d_model, d_hidden),
        lack=zeros(d_model),
        n_queries=len(prompts.queries),
    )
    for layers in run_over_queries(model, prompts, form, batch_size):
        for layer, rows in enumerate(layers):
            _add_rows(statistics, layer, rows)
    return statistics


def _add_rows(statistics: SharedStatistics, layer: int, rows: LayerRows) -> None:
    """Add a batch of queries to the sums of a layer."""
    hidden, lack, target = (values.cpu() for values in rows)
    statistics.gram[layer].addmm_(hidden.mT, hidden)
    statistics.cross[layer].addmm_(target.mT, hidden)
    statistics.thought[layer].addmm_(target.mT, hidden / hidden.square().sum(dim=-1, keepdim=True))
    statistics.lack[layer] += lack.sum(dim=0)


@checked
@exclusive
def build_shared_patch(
    model: Model, prompts: Prompts, *, relative_ridge: Finite = RELATIVE_RIDGE, batch_size: Count = BATCH_SIZE
) -> SharedPatch:
    """Fit one change of the down projections to all queries of some prompts, by ridge regression.

    Args:
        model: the model; a bridge with dense MLPs.
        prompts: the demonstrations, and the queries to fit to.
        relative_ridge: λ in units of ‖HᵀH‖² / tr(HᵀH) of each layer. With 0, queries must be at least as many as hidden
            activations.
        batch_size: the largest number of queries to run at once.

    Returns:
        The patch, of the rank that the number of queries allows. `truncated` gives lower ranks.

    Raises:
        PromptError: the prompts are incomplete, or do not fit into the model's context.
        ValueError: relative_ridge is negative, or it is 0 and HᵀH of a layer is singular.
        UnsupportedModelError: the model's MLPs are mixtures of experts or have no hooks, its blocks are not sums of a
            residual stream, attention and an MLP, or it cannot run queries apart from their demonstrations.

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
    return sum_statistics(model, prompts, batch_size=batch_size).ridge_patch(relative_ridge)


@checked
@exclusive
def build_mean_patch(model: Model, prompts: Prompts, *, batch_size: Count = BATCH_SIZE) -> SharedPatch:
    """Build the mean patch ("thought vector"): what blocks lack without demonstrations, on average, as a bias.

    The bias is added to what the MLP writes: by the down projection, or by the norm after it. Where that
    module has no bias, the patch adds one to the architecture, as `mlp_bias` of a Llama's configuration does.

    Args:
        model: the model; a bridge with dense MLPs.
        prompts: the demonstrations, and the queries to average over.
        batch_size: the largest number of queries to run at once.

    Returns:
        The patch; its `bias` has one vector for each layer, and `factors` are empty.

    Raises:
        PromptError: the prompts are incomplete, or do not fit into the model's context.
        UnsupportedModelError: as for `build_shared_patch`.
    """
    return sum_statistics(model, prompts, batch_size=batch_size).mean_patch()


@checked
@exclusive
def build_thought_matrix(
    model: Model, prompts: Prompts, *, strength: Finite | None = None, batch_size: Count = BATCH_SIZE
) -> SharedPatch:
    """Build the thought matrix, strength · Σ_i t_i ⊗ h_i / ‖h_i‖², as a change of the down projections.

    Mazzawi et al. (2025, arXiv 2510.08734) sum over the tokens of a prompt; here the sum is over queries.

    Args:
        model: the model; a bridge with dense MLPs.
        prompts: the demonstrations, and the queries to sum over.
        strength: the factor λ of the sum; by default 1 divided by the number of queries, which gives the mean of the
            changes of rank one, each fitted to one query.
        batch_size: the largest number of queries to run at once.

    Returns:
        The patch, of the rank that the number of queries allows.

    Raises:
        PromptError: the prompts are incomplete, or do not fit into the model's context.
        ValueError: the input of a down projection is zero for a query.
        UnsupportedModelError: as for `build_shared_patch`.
    """
    return sum_statistics(model, prompts, batch_size=batch_size).thought_matrix(strength)


@checked
def draw_random_patch(patch: Patch, seed: Seed) -> SharedPatch:
    """Draw a random patch as large as another one.

    Every change of a matrix has the same singular values at every layer, thus the same norm and rank, and random
    singular vectors. Every change of a bias or a scale has the same norm, and a random direction.

    Args:
        patch: the patch to take sizes from.
        seed: the seed of the directions.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Float[Tensor, "*shape"]:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def redirected(low_rank: LowRank) -> LowRank:
        values = low_rank.singular_values()
        left, right = (
            linalg.qr(draw(len(values), factor.shape[1], values.shape[1])).Q.to(values) for factor in low_rank
        )
        return LowRank((left * values[:, None]).to(low_rank.left), right.to(low_rank.right))

    def rescaled(vectors: Tensor | None) -> Tensor | None:
        if vectors is None:
            return None
        directions = torch.nn.functional.normalize(draw(*vectors.shape), dim=-1)
        return (directions * vector_norm(vectors.double().cpu(), dim=-1, keepdim=True)).to(vectors)

    return SharedPatch(
        model=patch.model,
        fingerprint=patch.fingerprint,
        factors={part: redirected(low_rank) for part, low_rank in patch.factors.items()},
        bias=rescaled(patch.bias),
        scale=rescaled(patch.scale),
        method="random",
        ridge=None,
        n_queries=getattr(patch, "n_queries", 1),
    )
