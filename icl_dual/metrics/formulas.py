"""The paper's metrics on plain tensors, each with its baselines and corrected forms."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.statistics.ranks import kendall

TOP_TOKENS, TOP_DEMONSTRATIONS = 100, 5
"""How many of the most attended tokens and demonstrations the released code counts recall over."""

NULL_DRAWS = 4
"""How many centred random updates a query and layer have: their mean is twice as close to what is expected."""

ROUNDING = 1e-5
"""A change of attention scores by no more than this share of their size is rounding, and has no direction: under
rotary positions the first layer scores a query's own tokens alike in and out of context. In half precision it is the
type's own step."""

Seed = int | np.random.Generator


@dataclass(frozen=True)
class Rec2FTP:
    """Recall of finetuning's corrections by in-context learning, with the counts it is made of."""

    both: int
    """Queries that ZSL gets wrong and that FT and ICL both get right."""
    finetuned: int
    """Queries that ZSL gets wrong and FT gets right."""
    random: float
    """The same share, as it is expected with ICL's predictions dealt to the queries at random; NaN where undefined."""

    @property
    def value(self) -> float:
        """both / finetuned; NaN, which is to say undefined, where finetuning corrects nothing."""
        return self.both / self.finetuned if self.finetuned else float("nan")

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.both}/{self.finetuned})" if self.finetuned else "undefined (0/0)"


def rec2ftp(
    gold: Int[Tensor, " query"],
    zsl: Int[Tensor, " query"],
    icl: Int[Tensor, " query"],
    ft: Int[Tensor, " query"],
) -> Rec2FTP:
    """Rec2FTP = N(FT right ∧ ICL right ∧ ZSL wrong) / N(FT right ∧ ZSL wrong), from label indices."""
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
    """Rec2FTP query by query: whether ICL is right where finetuning corrects ZSL; NaN where it corrects nothing.

    `dealt`, how often it is expected to be with its predictions dealt to the queries at random.
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
    """Similarity of attention output updates: cos(ĥ_ICL − ĥ_ZSL, ĥ_FT − ĥ_ZSL), with ĥ = h/‖h‖."""
    zsl = _unit(h_zsl)
    return dual.cosine(_unit(h_icl) - zsl, _unit(h_ft) - zsl)


def sim_aou_random(
    h_zsl: Float[Tensor, "query layer d_model"], h_icl: Float[Tensor, "query layer d_model"], *, seed: Seed = 0
) -> Float[Tensor, "query layer"]:
    """SimAOU's baseline: cos(ĥ_ICL − ĥ_ZSL, u), with u uniform in [0, 1)."""
    return dual.cosine(_unit(h_icl) - _unit(h_zsl), _uniform(h_zsl, seed))


def sim_aou_unnormalised(
    h_zsl: Float[Tensor, "query layer d_model"],
    h_icl: Float[Tensor, "query layer d_model"],
    h_ft: Float[Tensor, "query layer d_model"],
) -> Float[Tensor, "query layer"]:
    """cos(h_ICL − h_ZSL, h_FT − h_ZSL): SimAOU of the updates themselves, without normalising first."""
    return dual.cosine(h_icl - h_zsl, h_ft - h_zsl)


def random_updates(
    update: Float[Tensor, "query *axes d"], *, seed: Seed = 0, draws: int = NULL_DRAWS
) -> Float[Tensor, "query {draws} *axes d"]:
    """Centred Gaussian directions, each as long as the update in whose place it stands; in float32."""
    n, *axes = update.shape
    drawn = np.random.default_rng(seed).standard_normal((n, draws, *axes), dtype=np.float32)
    r = torch.from_numpy(drawn)
    size = update.norm(dim=-1, keepdim=True).unsqueeze(1).to(r)
    return r.mul_(size / r.norm(dim=-1, keepdim=True).clamp_min(1e-20))


def sim_am(
    m_icl: Float[Tensor, "query layer head token"], m_other: Float[Tensor, "query layer head token"]
) -> Float[Tensor, "query layer head"]:
    """Similarity of attention maps over the query's own tokens: cos(m_ICL, m_ZSL) before FT, cos(m_ICL, m_FT) after.

    Scores past a query's end are to be 0, which changes no cosine.
    """
    return dual.cosine(m_icl, m_other)


def sim_am_random(
    m_icl: Float[Tensor, "query layer head token"], *, seed: Seed = 0
) -> Float[Tensor, "query layer head"]:
    """SimAM's baseline: cos(m_ICL, u), with u uniform in [0, 1) over the query's own tokens."""
    return dual.cosine(m_icl, _uniform(m_icl, seed) * (m_icl != 0))


def sim_am_delta(
    m_zsl: Float[Tensor, "query layer head token"],
    m_icl: Float[Tensor, "query layer head token"],
    m_ft: Float[Tensor, "query layer head token"],
    *,
    rounding: float = ROUNDING,
) -> Float[Tensor, "query layer head"]:
    """SimAMΔ = cos(m_ICL − m_ZSL, m_FT − m_ZSL): whether attention maps change alike, not whether they are alike.

    NaN where a map changed by no more than `rounding` of its size.
    """
    return dual.cosine(changed(m_zsl, m_icl, rounding), changed(m_zsl, m_ft, rounding))


def finetuning_attention(
    training_q: Float[Tensor, "layer demo_token d_q"], q: Float[Tensor, "query layer d_q"]
) -> Float[Tensor, "query layer demo_token"]:
    """m_FT: finetuning's attention to its training tokens, Σ_heads (their queries)ᵀ (the tuned model's test query).

    Or by their keys, which is what attention scores in context (`query_by_kv_head`). In float64. A layer at a time: the
    product of all with all is never formed.
    """
    by_layer = [own.double() @ trained.double().mT for own, trained in zip(q.unbind(1), training_q, strict=True)]
    return torch.stack(by_layer, dim=1)


def query_by_kv_head(q: Float[Tensor, "query layer d_q"], n_heads: int, d_kv: int) -> Float[Tensor, "query layer d_kv"]:
    """Queries summed over the heads that share a key-value head: their product with keys is the sum over heads."""
    d_head = q.shape[-1] // n_heads
    return q.unflatten(-1, (d_kv // d_head, -1, d_head)).sum(-2).flatten(-2)


def demonstration_weights(m: Float[Tensor, "query layer demo_token"]) -> Float[Tensor, "query layer demo_token"]:
    """The softmax over the demonstrations' tokens of scores that are summed over heads, as the released code takes it.

    It leaves the order of tokens as it is, but for those so far below the first that they vanish. In numpy, whose
    exponential of equal scores is equal wherever they stand.
    """
    shifted = np.exp((m - m.amax(-1, keepdim=True)).numpy())
    return torch.from_numpy(shifted / shifted.sum(-1, keepdims=True))


def by_demonstration(
    weights: Float[Tensor, "query layer demo_token"], owners: Int[Tensor, " demo_token"]
) -> Float[Tensor, "query layer demo"]:
    """Attention summed within each demonstration; `owners` says which a token belongs to."""
    found, index = owners.unique(return_inverse=True)
    return weights.new_zeros(*weights.shape[:2], len(found)).index_add_(2, index, weights)


def top_recall(
    icl: Float[Tensor, "query layer item"], ft: Float[Tensor, "query layer item"], k: int
) -> Float[Tensor, "query layer"]:
    """The share of ICL's k most attended items that are among FT's; NaN where there are fewer than k."""
    if icl.shape[-1] < k:
        return torch.full(icl.shape[:2], torch.nan, dtype=torch.float64)
    of_icl, of_ft = (np.argsort(-weights.numpy(), axis=-1)[..., :k] for weights in (icl, ft))
    among = np.zeros(ft.shape, dtype=bool)
    np.put_along_axis(among, of_ft, True, axis=-1)
    return torch.from_numpy(np.take_along_axis(among, of_icl, axis=-1).mean(-1))


def kendall_random(m_icl: Float[Tensor, "query layer demo_token"], *, seed: Seed = 0) -> Float[Tensor, "query layer"]:
    """Kendall's baseline: τ between ICL's attention and uniform random scores."""
    return kendall(m_icl, _uniform(m_icl, seed))


def changed(m: Tensor, other: Tensor, rounding: float) -> Tensor:
    """The change of attention maps; zero where it is rounding."""
    change = other - m
    size = torch.maximum(m.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True))
    return change.where(change.norm(dim=-1, keepdim=True) > rounding * size, 0.0)


def _unit(h: Tensor) -> Tensor:
    """ĥ; a zero vector stays zero, as in the scripts."""
    return h / h.norm(dim=-1, keepdim=True).clamp_min(1e-20)


def _uniform(like: Tensor, seed: Seed) -> Tensor:
    """Uniform [0, 1) from numpy's generator, whose stream is the same on every platform."""
    return torch.from_numpy(np.random.default_rng(seed).random(tuple(like.shape))).to(like)
