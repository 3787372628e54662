"""The paper's metrics, on plain tensors, each with its random baseline, and their comparison of three captures.

Notation: h is the attention output at the recorded position, m are attention scores before the softmax; ZSL, ICL and
FT are the zero-shot, in-context and finetuned settings. Definitions are those of Dai et al. (2023), as
computed by the released code. What cannot be computed (a cosine with a zero vector, a rank correlation of constants)
is NaN, never a number.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from icl_dual import dual
from icl_dual.assets import load_tensors, save_tensors
from icl_dual.capture import METRIC_FIELDS, Capture, Field
from icl_dual.finetune import WeightDelta

KENDALL_QUERIES = 100
"""Kendall is computed on this many of the first queries, as the paper does."""

BASELINE_DRAWS = 1000
"""How many random deals of ICL's predictions Rec2FTP's baseline averages over."""


@dataclass(frozen=True)
class Rec2FTP:
    """Recall of finetuning's corrections by in-context learning, with the counts it is made of."""

    both: int
    """Queries that ZSL gets wrong and that FT and ICL both get right."""
    finetuned: int
    """Queries that ZSL gets wrong and FT gets right."""
    random: float
    """The same share with ICL's predictions dealt to the queries at random; NaN where undefined."""

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
    *,
    seed: int = 0,
) -> Rec2FTP:
    """Rec2FTP = N(FT right ∧ ICL right ∧ ZSL wrong) / N(FT right ∧ ZSL wrong), from label indices.

    The baseline deals ICL's own predictions to the queries in a random order, `BASELINE_DRAWS` times by seed.
    """
    corrected = (ft == gold) & (zsl != gold)
    n_corrected = int(corrected.sum())
    random = float("nan")
    if n_corrected:
        rng = np.random.default_rng(seed)
        dealt = rng.permuted(np.tile(icl.numpy(), (BASELINE_DRAWS, 1)), axis=1)
        random = float((dealt == gold.numpy())[:, corrected.numpy()].mean())
    return Rec2FTP(int((corrected & (icl == gold)).sum()), n_corrected, random)


def sim_aou(
    h_zsl: Float[Tensor, "query layer d_model"],
    h_icl: Float[Tensor, "query layer d_model"],
    h_ft: Float[Tensor, "query layer d_model"],
) -> Float[Tensor, "query layer"]:
    """Similarity of attention output updates: cos(ĥ_ICL − ĥ_ZSL, ĥ_FT − ĥ_ZSL), with ĥ = h/‖h‖."""
    zsl = _unit(h_zsl)
    return dual.cosine(_unit(h_icl) - zsl, _unit(h_ft) - zsl)


def sim_aou_random(
    h_zsl: Float[Tensor, "query layer d_model"], h_icl: Float[Tensor, "query layer d_model"], *, seed: int = 0
) -> Float[Tensor, "query layer"]:
    """SimAOU's baseline: cos(ĥ_ICL − ĥ_ZSL, u), with u uniform in [0, 1)."""
    return dual.cosine(_unit(h_icl) - _unit(h_zsl), _uniform(h_zsl, seed))


def sim_am(
    m_icl: Float[Tensor, "query layer head token"], m_other: Float[Tensor, "query layer head token"]
) -> Float[Tensor, "query layer head"]:
    """Similarity of attention maps over the query's own tokens: cos(m_ICL, m_ZSL) before FT, cos(m_ICL, m_FT) after.

    Scores past a query's end are to be 0, which changes no cosine.
    """
    return dual.cosine(m_icl, m_other)


def sim_am_random(
    m_icl: Float[Tensor, "query layer head token"], *, seed: int = 0
) -> Float[Tensor, "query layer head"]:
    """SimAM's baseline: cos(m_ICL, u), with u uniform in [0, 1) over the query's own tokens."""
    return dual.cosine(m_icl, _uniform(m_icl, seed) * (m_icl != 0))


def finetuning_attention(
    training_q: Float[Tensor, "layer demo_token head d_head"], q: Float[Tensor, "query layer head d_head"]
) -> Float[Tensor, "query layer demo_token"]:
    """m_FT: finetuning's attention to its training tokens, Σ_heads (their queries)ᵀ (the tuned model's test query).

    Scaled by 1/√d_head, as the released code's queries are.
    """
    return torch.einsum("lthd,qlhd->qlt", training_q.to(q), q) * q.shape[-1] ** -0.5


def kendall(
    m_icl: Float[Tensor, "query layer demo_token"], m_ft: Float[Tensor, "query layer demo_token"]
) -> Float[Tensor, "query layer"]:
    """Kendall's τ between ICL's and finetuning's attention to the demonstrations' tokens."""
    if m_icl.shape[-1] < 2:
        return torch.full(m_icl.shape[:2], torch.nan, dtype=torch.float64)
    tau: Any = stats.kendalltau  # typed for single pairs only
    found = tau(m_icl.numpy(), m_ft.numpy(), axis=-1)
    return torch.as_tensor(found.statistic, dtype=torch.float64).view(m_icl.shape[:2])


def kendall_random(m_icl: Float[Tensor, "query layer demo_token"], *, seed: int = 0) -> Float[Tensor, "query layer"]:
    """Kendall's baseline: τ between ICL's attention and uniform random scores."""
    return kendall(m_icl, _uniform(m_icl, seed))


PER_LAYER = (
    "SimAOU",
    "SimAOU random",
    "SimAM before FT",
    "SimAM after FT",
    "SimAM random",
    "Kendall",
    "Kendall random",
)
"""The metrics that a `Comparison` holds by query and layer."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """In-context learning against finetuning on the same demonstrations, by the paper's metrics."""

    gold: Int[Tensor, " query"]
    label_log_probs: dict[str, Float[Tensor, "query label"]]
    """By setting (ZSL, ICL, FT): mean log-probability per token of each label word."""
    rec2ftp: Rec2FTP
    per_layer: dict[str, Float[Tensor, "_ layer"]]
    """By metric (`PER_LAYER`), query by layer; SimAM is averaged over heads, Kendall has its first queries only."""

    @property
    def predictions(self) -> dict[str, Int[Tensor, " query"]]:
        """By setting: each query's most probable label."""
        return {setting: log_probs.argmax(-1) for setting, log_probs in self.label_log_probs.items()}

    @property
    def accuracy(self) -> dict[str, float]:
        """By setting: share of queries whose predicted label is the gold one."""
        return {name: (found == self.gold).double().mean().item() for name, found in self.predictions.items()}

    def to_frame(self) -> pd.DataFrame:
        """One row a number: metric, layer (empty for all layers together), value, and n queries it is a mean over."""
        rows: list[dict[str, Any]] = [
            {"metric": f"{setting} accuracy", "layer": None, "value": value, "n": len(self.gold)}
            for setting, value in self.accuracy.items()
        ]
        rows.append({"metric": "Rec2FTP", "layer": None, "value": self.rec2ftp.value, "n": self.rec2ftp.finetuned})
        rows.append(
            {"metric": "Rec2FTP random", "layer": None, "value": self.rec2ftp.random, "n": self.rec2ftp.finetuned}
        )
        for metric, values in self.per_layer.items():
            known = values.isfinite()
            n = int(known.any(1).sum())
            rows.append({"metric": metric, "layer": None, "value": values.nanmean().item(), "n": n})
            per_layer = zip(values.nanmean(0).tolist(), known.sum(0).tolist(), strict=True)
            rows += [{"metric": metric, "layer": i, "value": value, "n": n} for i, (value, n) in enumerate(per_layer)]
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def overall(self) -> pd.DataFrame:
        """The numbers over all layers together."""
        frame = self.to_frame()
        return frame.loc[frame["layer"].isna()].drop(columns="layer")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name} accuracy={value:.3f}" for name, value in self.accuracy.items())
        return f"Comparison({len(self.gold)} queries, {settings}, Rec2FTP={self.rec2ftp})"

    def _repr_html_(self) -> str:
        return self.overall().to_html(index=False, float_format="{:.3f}".format, na_rep="undefined")

    def __str__(self) -> str:
        return self.overall().to_string(index=False, float_format="{:.3f}".format, na_rep="undefined")

    def save(self, folder: str | PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write the comparison into a folder, as safetensors and JSON, with whatever metadata belongs to it."""
        tensors = {"gold": self.gold} | {f"per_layer/{name}": values for name, values in self.per_layer.items()}
        tensors |= {f"label_log_probs/{name}": values for name, values in self.label_log_probs.items()}
        save_tensors(Path(folder), tensors, {"rec2ftp": vars(self.rec2ftp), **(metadata or {})})

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Comparison":
        """Read a comparison that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged.
        """
        tensors, metadata = load_tensors(Path(folder))
        groups: dict[str, dict[str, Tensor]] = {"per_layer": {}, "label_log_probs": {}}
        for name, values in tensors.items():
            group, _, member = name.partition("/")
            if member:
                groups[group][member] = values
        # The order of columns and settings is the paper's, not the file's.
        return cls(
            gold=tensors["gold"],
            label_log_probs={name: groups["label_log_probs"][name] for name in ("ZSL", "ICL", "FT")},
            rec2ftp=Rec2FTP(**metadata["rec2ftp"]),
            per_layer={name: groups["per_layer"][name] for name in PER_LAYER},
        )


def compare(zsl: Capture, icl: Capture, ft: Capture, delta: WeightDelta, *, seed: int = 0) -> Comparison:
    """Hold in-context learning against finetuning, query by query and layer by layer.

    Args:
        zsl: a capture of the zero-shot prompts.
        icl: a capture of the same queries behind their demonstrations.
        ft: a capture of the zero-shot prompts with the delta applied.
        delta: the finetuning on the same demonstrations.
        seed: of the random baselines.

    Raises:
        ValueError: the captures or the delta are of different models, queries or demonstrations, or lack a field.
    """
    _refuse_mismatch(zsl, icl, ft, delta)
    h_zsl, h_icl, h_ft = (_field(run, "attn_out").double() for run in (zsl, icl, ft))
    own_zsl, own_icl, own_ft = (_field(run, "query_scores").double() for run in (zsl, icl, ft))
    m_icl = _field(icl, "demo_scores")[:KENDALL_QUERIES].double().sum(2)
    m_ft = finetuning_attention(delta.training_q, _field(ft, "q")[:KENDALL_QUERIES].double())
    return Comparison(
        gold=icl.gold,
        label_log_probs={"ZSL": zsl.label_log_probs, "ICL": icl.label_log_probs, "FT": ft.label_log_probs},
        rec2ftp=rec2ftp(icl.gold, zsl.predictions, icl.predictions, ft.predictions, seed=seed),
        per_layer={
            "SimAOU": sim_aou(h_zsl, h_icl, h_ft),
            "SimAOU random": sim_aou_random(h_zsl, h_icl, seed=seed),
            "SimAM before FT": sim_am(own_icl, own_zsl).nanmean(-1),
            "SimAM after FT": sim_am(own_icl, own_ft).nanmean(-1),
            "SimAM random": sim_am_random(own_icl, seed=seed).nanmean(-1),
            "Kendall": kendall(m_icl, m_ft),
            "Kendall random": kendall_random(m_icl, seed=seed),
        },
    )


def _refuse_mismatch(zsl: Capture, icl: Capture, ft: Capture, delta: WeightDelta) -> None:
    models = {"zsl": zsl.model, "icl": icl.model, "ft": ft.model, "delta": delta.model}
    if len(set(models.values())) > 1:
        raise ValueError(f"expected captures and delta of one model, got {models}")
    if zsl.prompts != icl.prompts.zero_shot() or ft.prompts != zsl.prompts:
        raise ValueError("expected captures of the same queries: zsl and ft of icl's prompts without demonstrations")
    if zsl.fingerprint != icl.fingerprint:
        raise ValueError("expected zsl and icl captured with the same weights: both outside of `delta.applied(model)`")
    if delta.fingerprint != zsl.fingerprint:
        raise ValueError("expected a delta finetuned from the weights that zsl and icl were captured with, got another")
    if ft.fingerprint == zsl.fingerprint:
        raise ValueError("expected ft captured within `with delta.applied(model):`, got a run with zsl's weights")
    if not icl.prompts.demonstrations:
        raise ValueError("expected icl's prompts to have demonstrations, got none")
    if delta.demonstrations != [list(tokens) for tokens in icl.prompts.demonstrations]:
        raise ValueError("expected a delta finetuned on the demonstrations of icl's prompts, in their order")


def _field(run: Capture, name: Field) -> Tensor:
    tensor = getattr(run, name)
    if tensor is None:
        raise ValueError(f"expected captures with the fields {METRIC_FIELDS}, got {run} without {name!r}")
    return tensor


def _unit(h: Tensor) -> Tensor:
    return h / h.norm(dim=-1, keepdim=True)


def _uniform(like: Tensor, seed: int) -> Tensor:
    """Uniform [0, 1) from numpy's generator, whose stream is the same on every platform."""
    return torch.from_numpy(np.random.default_rng(seed).random(tuple(like.shape))).to(like)
