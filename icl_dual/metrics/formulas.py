"""The paper's metrics on plain tensors, each with its baselines and corrected forms.

Notation: h is the attention output at the recorded position, m are attention scores before the softmax; ZSL, ICL and
FT are the zero-shot, in-context and finetuned settings. Definitions are those of Dai et al. (2023), as computed by the
released code. What is undefined (a cosine with a zero vector, a rank correlation of constants) is NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.field_docs import document_fields
from icl_dual.statistics.ranks import kendall
from icl_dual.torch_utils import from_numpy, unique, vector_norm

TOP_TOKENS, TOP_DEMONSTRATIONS = 100, 5
"""The numbers of most attended tokens and demonstrations over which the released code computes recall."""

NULL_DRAWS = 4
"""The number of centred random updates for each query and layer: the mean over four has half the deviation of one."""

ROUNDING = 1e-5
"""The relative change of attention scores up to which it is rounding and has no direction: with rotary positions the
first layer scores a query's own tokens alike in and out of context. In half precision, the type's own step is used."""

Seed = int | np.random.Generator


@document_fields
@dataclass(frozen=True)
class Rec2FTP:
    """The recall of finetuning's corrections by in-context learning, with its counts."""

    both: int
    """The number of queries that ZSL gets wrong and that FT and ICL both get right."""
    finetuned: int
    """The number of queries that ZSL gets wrong and FT gets right."""
    random: float
    """The expected share with ICL's predictions dealt to the queries at random; NaN where undefined."""

    @property
    def value(self) -> float:
        """Return the share both / finetuned, from 0 to 1; NaN where finetuning corrects nothing."""
        return self.both / self.finetuned if self.finetuned else float("nan")

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.both}/{self.finetuned})" if self.finetuned else "undefined (0/0)"


def rec2ftp(
    gold: Int[Tensor, " query"],
    zsl: Int[Tensor, " query"],
    icl: Int[Tensor, " query"],
    ft: Int[Tensor, " query"],
) -> Rec2FTP:
    """Return Rec2FTP = N(FT right ∧ ICL right ∧ ZSL wrong) / N(FT right ∧ ZSL wrong), from label indices.

    Args:
        gold: the queries' correct labels.
        zsl: the labels predicted zero-shot.
        icl: the labels predicted in context.
        ft: the labels predicted after finetuning.

    Returns:
        The two counts, and the expected share with ICL's predictions dealt to the queries at random.

    Example:
        >>> gold, zsl = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1])
        >>> print(rec2ftp(gold, zsl, icl=torch.tensor([0, 1, 1]), ft=torch.tensor([0, 0, 0])))
        0.500 (1/2)
    """
    recalled = recall(gold, zsl, icl, ft)
    dealt = recall(gold, zsl, icl, ft, dealt=True)
    return Rec2FTP(int(recalled.nansum()), int(recalled.isfinite().sum()), dealt.nanmean().item())


def recall(
    gold: Int[Tensor, " query"],
    zsl: Int[Tensor, " query"],
    icl: Int[Tensor, " query"],
    ft: Int[Tensor, " query"],
    *,
    dealt: bool = False,
) -> Float[Tensor, " query"]:
    """Return Rec2FTP query by query: whether ICL is right where finetuning corrects ZSL; NaN where it does not.

    Args:
        gold: the queries' correct labels.
        zsl: the labels predicted zero-shot.
        icl: the labels predicted in context.
        ft: the labels predicted after finetuning.
        dealt: return the expected value with ICL's predictions dealt to the queries at random.

    Returns:
        For each query 1, 0 or NaN; with `dealt`, an expected share or NaN.
    """
    right = (icl == gold).double()
    if dealt:
        right = (icl[:, None] == gold).double().mean(0)
    return right.where((ft == gold) & (zsl != gold), torch.nan)


def sim_aou(
    h_zsl: Float[Tensor, "query layer d_model"],
    h_icl: Float[Tensor, "query layer d_model"],
    h_ft: Float[Tensor, "query layer d_model"],
) -> Float[Tensor, "query layer"]:
    """Return the similarity of attention output updates: cos(ĥ_ICL − ĥ_ZSL, ĥ_FT − ĥ_ZSL), with ĥ = h/‖h‖.

    Args:
        h_zsl: attention outputs at the recorded position, zero-shot.
        h_icl: attention outputs in context.
        h_ft: attention outputs after finetuning, with the zero-shot prompt.

    Returns:
        The cosine of each query and layer; NaN where an output does not change.

    Example:
        >>> h_zsl, h_icl, h_ft = (torch.tensor([[h]]) for h in ([1.0, 0.0], [0.0, 2.0], [0.0, 3.0]))
        >>> round(sim_aou(h_zsl, h_icl, h_ft).item(), 6)  # FT turns the output as ICL does
        1.0
    """
    zsl = _unit(h_zsl)
    return dual.cosine(_unit(h_icl) - zsl, _unit(h_ft) - zsl)


def sim_aou_random(
    h_zsl: Float[Tensor, "query layer d_model"], h_icl: Float[Tensor, "query layer d_model"], *, seed: Seed = 0
) -> Float[Tensor, "query layer"]:
    """Return SimAOU's baseline in the paper: cos(ĥ_ICL − ĥ_ZSL, u), with u uniform in [0, 1).

    Args:
        h_zsl: attention outputs at the recorded position, zero-shot.
        h_icl: attention outputs in context.
        seed: the seed of u, or a generator to go on from.

    Returns:
        The cosine of each query and layer; NaN where the output does not change.
    """
    return dual.cosine(_unit(h_icl) - _unit(h_zsl), _uniform(h_zsl, seed))


def sim_aou_unnormalised(
    h_zsl: Float[Tensor, "query layer d_model"],
    h_icl: Float[Tensor, "query layer d_model"],
    h_ft: Float[Tensor, "query layer d_model"],
) -> Float[Tensor, "query layer"]:
    """Return cos(h_ICL − h_ZSL, h_FT − h_ZSL): SimAOU without normalising the outputs first.

    Args:
        h_zsl: attention outputs at the recorded position, zero-shot.
        h_icl: attention outputs in context.
        h_ft: attention outputs after finetuning, with the zero-shot prompt.

    Returns:
        The cosine of each query and layer; NaN where an output does not change.
    """
    return dual.cosine(h_icl - h_zsl, h_ft - h_zsl)


def draw_directions(shape: Sequence[int], seed: Seed, draws: int = NULL_DRAWS) -> Float[Tensor, "query draw *axes d"]:
    """Return centred Gaussian directions for updates of a shape, in float32 on the CPU.

    Args:
        shape: the shape of the updates, queries first.
        seed: the seed of the directions, or a generator to go on from.
        draws: the number of directions for each update, along the second axis.
    """
    n, *axes = shape
    return from_numpy(np.random.default_rng(seed).standard_normal((n, draws, *axes), dtype=np.float32))


def as_long(
    directions: Float[Tensor, "query draw *axes d"], update: Float[Tensor, "query *axes d"]
) -> Float[Tensor, "query draw *axes d"]:
    """Return directions as vectors that are as long as the updates; the directions are overwritten."""
    directions = directions.to(update.device)
    size = vector_norm(update, dim=-1, keepdim=True).unsqueeze(1).to(directions)
    return directions.mul_(size / vector_norm(directions, dim=-1, keepdim=True).clamp_min(1e-20))


def sim_am(
    m_icl: Float[Tensor, "query layer head token"], m_other: Float[Tensor, "query layer head token"]
) -> Float[Tensor, "query layer head"]:
    """Return the similarity of attention maps over the query's own tokens: cos(m_ICL, m_ZSL) or cos(m_ICL, m_FT).

    Args:
        m_icl: attention scores in context, before the softmax; 0 past a query's end, which changes no cosine.
        m_other: attention scores zero-shot or after finetuning, of the same tokens.

    Returns:
        The cosine of each head; NaN where all scores of a head are 0.

    Example:
        >>> m_icl, m_ft = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[4.0, 3.0]]]])
        >>> round(sim_am(m_icl, m_ft).item(), 6)
        0.96
    """
    return dual.cosine(m_icl, m_other)


def sim_am_random(
    m_icl: Float[Tensor, "query layer head token"], *, seed: Seed = 0
) -> Float[Tensor, "query layer head"]:
    """Return SimAM's baseline in the paper: cos(m_ICL, u), with u uniform in [0, 1) over the query's own tokens.

    Args:
        m_icl: attention scores in context, before the softmax; 0 past a query's end.
        seed: the seed of u, or a generator to go on from.

    Returns:
        The cosine of each head; NaN where all scores of a head are 0.
    """
    return dual.cosine(m_icl, _uniform(m_icl, seed) * (m_icl != 0))


def sim_am_delta(
    m_zsl: Float[Tensor, "query layer head token"],
    m_icl: Float[Tensor, "query layer head token"],
    m_ft: Float[Tensor, "query layer head token"],
    *,
    rounding: float = ROUNDING,
) -> Float[Tensor, "query layer head"]:
    """Return SimAMΔ = cos(m_ICL − m_ZSL, m_FT − m_ZSL): whether attention maps change alike.

    Args:
        m_zsl: attention scores zero-shot, before the softmax; 0 past a query's end.
        m_icl: attention scores in context.
        m_ft: attention scores after finetuning, with the zero-shot prompt.
        rounding: the relative change of a map up to which it is rounding and has no direction.

    Returns:
        The cosine of each head; NaN where the relative change of a map is at most `rounding`.
    """
    return dual.cosine(changed(m_zsl, m_icl, rounding), changed(m_zsl, m_ft, rounding))


def finetuning_attention(
    training_q: Float[Tensor, "layer demo_token d_q"], q: Float[Tensor, "query layer d_q"]
) -> Float[Tensor, "query layer demo_token"]:
    """Return m_FT, finetuning's attention to its training tokens: Σ_heads (their queries)ᵀ (the tuned model's query).

    With training keys in place of training queries it is what attention scores in context (`query_by_kv_head`). In
    float64, one layer at a time, so that no product over all layers is held.

    Args:
        training_q: attention queries of the training tokens in finetuning, heads side by side.
        q: attention queries of the finetuned model at the recorded position, heads side by side.

    Returns:
        The score of each training token, summed over heads.
    """
    by_layer = [
        layer_q.double() @ layer_training_q.double().mT
        for layer_q, layer_training_q in zip(q.unbind(1), training_q, strict=True)
    ]
    return torch.stack(by_layer, dim=1)


def query_by_kv_head(q: Float[Tensor, "query layer d_q"], n_heads: int, d_kv: int) -> Float[Tensor, "query layer d_kv"]:
    """Return queries summed over the heads that share a key-value head: their product with keys sums over heads.

    Args:
        q: attention queries, query heads side by side.
        n_heads: the number of query heads.
        d_kv: the width of a token's keys, key-value heads side by side.

    Returns:
        The summed queries, key-value heads side by side.
    """
    d_head = q.shape[-1] // n_heads
    return torch.unflatten(q, -1, (d_kv // d_head, -1, d_head)).sum(-2).flatten(-2)


def demonstration_weights(m: Float[Tensor, "query layer demo_token"]) -> Float[Tensor, "query layer demo_token"]:
    """Return the softmax over the demonstrations' tokens of scores summed over heads, as the released code computes it.

    It keeps the order of tokens, but for those so far below the first that they vanish. On a CPU in numpy, because its
    exponential of equal scores is equal at every position.
    """
    if m.device.type != "cpu":
        weights = (m - m.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True)
    shifted = np.exp((m - m.amax(-1, keepdim=True)).numpy())
    return from_numpy(shifted / shifted.sum(-1, keepdims=True))


def by_demonstration(
    weights: Float[Tensor, "query layer demo_token"], owners: Int[Tensor, " demo_token"]
) -> Float[Tensor, "query layer demo"]:
    """Return attention summed within each demonstration.

    Args:
        weights: attention to each token of the demonstrations.
        owners: the index of each token's demonstration.

    Returns:
        Attention to each demonstration that has tokens, in the order of the indices.
    """
    demonstrations, index = unique(owners)
    return weights.new_zeros(*weights.shape[:2], len(demonstrations)).index_add_(2, index, weights)


def top_recall(
    icl: Float[Tensor, "query layer item"], ft: Float[Tensor, "query layer item"], k: int
) -> Float[Tensor, "query layer"]:
    """Return the share of ICL's k most attended items that are among FT's; NaN where there are fewer than k.

    Args:
        icl: attention to each item (a token or a demonstration) in context.
        ft: attention to each item by finetuning.
        k: the number of most attended items.

    Returns:
        The share of each query and layer, from 0 to 1.

    Example:
        >>> icl, ft = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]), torch.tensor([[[0.1, 0.4, 0.3, 0.2]]])
        >>> top_recall(icl, ft, k=2).item()  # items 0 and 1 against items 1 and 2
        0.5
    """
    if icl.shape[-1] < k:
        return torch.full(icl.shape[:2], torch.nan, dtype=torch.float64, device=icl.device)
    if icl.device.type != "cpu":
        top_icl, top_ft = (weights.argsort(dim=-1, descending=True, stable=True)[..., :k] for weights in (icl, ft))
        is_top_ft = torch.zeros_like(ft, dtype=torch.bool).scatter_(-1, top_ft, True)
        return is_top_ft.gather(-1, top_icl).double().mean(-1)
    top_icl, top_ft = (np.argsort(-weights.numpy(), axis=-1)[..., :k] for weights in (icl, ft))
    is_top_ft = np.zeros(ft.shape, dtype=bool)
    np.put_along_axis(is_top_ft, top_ft, True, axis=-1)
    return from_numpy(np.take_along_axis(is_top_ft, top_icl, axis=-1).mean(-1))


def top_recall_random(recall: Float[Tensor, "query layer"], k: int, n_items: int) -> Float[Tensor, "query layer"]:
    """Return the recall that k items chosen at random out of n_items have, NaN where `recall` is.

    Args:
        recall: the recall that this is the baseline of (`top_recall`).
        k: the number of most attended items.
        n_items: the number of all items.

    Returns:
        The expected share of each query and layer, from 0 to 1.
    """
    return recall * 0 + k / max(n_items, 1)


def kendall_random(m_icl: Float[Tensor, "query layer demo_token"], *, seed: Seed = 0) -> Float[Tensor, "query layer"]:
    """Return Kendall's baseline in the paper: τ between ICL's attention and uniform random scores.

    Args:
        m_icl: attention to each token of the demonstrations in context.
        seed: the seed of the random scores, or a generator to go on from.

    Returns:
        Kendall's τ of each query and layer, from −1 to 1; NaN where attention is constant.
    """
    return kendall(m_icl, _uniform(m_icl, seed))


def changed(m: Tensor, other: Tensor, rounding: float) -> Tensor:
    """Return the change of attention maps from m to other; zero where it is rounding.

    Args:
        m: attention scores before the softmax, tokens along the last axis.
        other: attention scores of the same tokens in another setting.
        rounding: the relative change of a map up to which it is rounding.

    Returns:
        The difference of each score, in the unit of the scores.
    """
    change = other - m
    size = torch.maximum(vector_norm(m, dim=-1, keepdim=True), vector_norm(other, dim=-1, keepdim=True))
    return change.where(vector_norm(change, dim=-1, keepdim=True) > rounding * size, 0.0)


def random_map_updates(
    m_zsl: Float[Tensor, "query layer head token"], change: Float[Tensor, "query layer head token"], *, seed: Seed = 0
) -> Float[Tensor, "query layer head token"]:
    """Return centred Gaussian changes of attention maps over the query's own tokens, each as large as `change`.

    Args:
        m_zsl: attention scores zero-shot, 0 past a query's end, which marks the query's tokens.
        change: the changes of maps to replace.
        seed: the seed of the changes, or a generator to go on from.

    Returns:
        The random changes, 0 past a query's end.
    """
    is_token = (m_zsl != 0).any(-2, keepdim=True)  # past a query's end the scores of all heads are 0
    noise = np.random.default_rng(seed).standard_normal(tuple(change.shape), dtype=np.float32)
    r = from_numpy(noise).to(change) * is_token
    return r * (vector_norm(change, dim=-1, keepdim=True) / vector_norm(r, dim=-1, keepdim=True).clamp_min(1e-20))


def mean_over_heads(similarity: Float[Tensor, "query layer head"]) -> Float[Tensor, "query layer"]:
    """Return the mean over heads, an undefined head counted as 0 as in the released scripts; NaN where all are."""
    mean = similarity.nan_to_num().mean(-1)
    return mean.where(similarity.isfinite().any(-1), torch.nan)


def _unit(h: Tensor) -> Tensor:
    """Return ĥ = h/‖h‖; a zero vector stays zero, as in the released scripts."""
    return h / vector_norm(h, dim=-1, keepdim=True).clamp_min(1e-20)


def _uniform(like: Tensor, seed: Seed) -> Tensor:
    """Return uniform numbers in [0, 1) from numpy's generator, which gives the same stream on every platform."""
    return from_numpy(np.random.default_rng(seed).random(tuple(like.shape))).to(like)
