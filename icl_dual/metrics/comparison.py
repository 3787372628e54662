"""The paper's metrics, on plain tensors, each with its baselines and corrected forms, and their comparison of settings.

Notation: h is the attention output at the recorded position, m are attention scores before the softmax; ZSL, ICL and
FT are the zero-shot, in-context and finetuned settings. Definitions are those of Dai et al. (2023), as
computed by the released code. What cannot be computed (a cosine with a zero vector, a rank correlation of constants)
is NaN, never a number, but under the released scripts' own names (`Comparison.released`).

Attention to the demonstrations is compared by token, and by demonstration: the softmax over all their tokens, summed
within each.

What criticism has found wanting stands beside it. Two updates of the same vector that are normalised first and
subtracted then share that vector, and so are alike (Deutch et al., 2024): with independent noise r of |r|² = 3|z|²,
SimAOU is 1/4. Hence the cosine of the plain differences, for attention maps too (SimAMΔ), and nulls whose updates are
centred and as long as those observed, by the same formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.captures.capture import Capture
from icl_dual.finetuning.weight_delta import WeightDelta
from icl_dual.metrics.formulas import (
    NULL_DRAWS,
    ROUNDING,
    TOP_DEMONSTRATIONS,
    TOP_TOKENS,
    Rec2FTP,
    by_demonstration,
    changed,
    demonstration_weights,
    finetuning_attention,
    kendall_random,
    query_by_kv_head,
    random_updates,
    rec2ftp,
    recall,
    sim_am,
    sim_am_delta,
    sim_am_random,
    sim_aou,
    sim_aou_random,
    sim_aou_unnormalised,
    top_recall,
)
from icl_dual.recordings.recordings import SETTINGS, Recordings
from icl_dual.statistics.intervals import Interval, Table, bootstrap, mean_of_intervals, proportion
from icl_dual.statistics.ranks import kendall
from icl_dual.storage import load_tensors, reading, save_tensors

KENDALL_QUERIES = 100
"""Attention to the demonstrations is compared on this many of the first queries, as the paper does."""

QUERIES_AT_ONCE = 64
"""The metrics take float64 copies of this many queries at a time."""


RELEASED_NAMES = {
    "SimAOU": "SimAOU",
    "SimAOU random": "Random SimAOU",
    "SimAM before FT": "ZSL SimAM",
    "SimAM after FT": "SimAM",
    "SimAM random": "Random SimAM",
    "Kendall": "token-level kendall",
    "Kendall random": "token-level random_kendall",
    "Kendall by demonstration": "example-level kendall",
    "Kendall by demonstration random": "example-level random_kendall",
    f"Top-{TOP_TOKENS} recall": "token-level recall_topk",
    f"Top-{TOP_TOKENS} recall random": "token-level random_recall_topk",
    f"Top-{TOP_DEMONSTRATIONS} recall by demonstration": "example-level recall_topk",
    f"Top-{TOP_DEMONSTRATIONS} recall by demonstration random": "example-level random_recall_topk",
}
"""Those metrics by query and layer that the released scripts have, and what they call them."""

PER_LAYER = (
    "SimAOU",
    "SimAOU random",
    "SimAOU random update",
    "SimAOU inflation null",
    "SimAOU unnormalised",
    "SimAOU unnormalised random",
    "SimAM before FT",
    "SimAM after FT",
    "SimAM random",
    "SimAM random update",
    "SimAMΔ",
    "SimAMΔ random",
    "Kendall",
    "Kendall random",
    "Kendall on keys",
    *(name for name in RELEASED_NAMES if "demonstration" in name or "recall" in name),
)
"""The metrics that a `Comparison` holds by query and layer: released ones, each with its corrected form and nulls."""


def estimate(*groups: Table, of: str) -> Interval:
    """A metric of one task, or its mean over several, with the interval that suits it.

    Rec2FTP is a share of few queries: its interval is Wilson's (`intervals.proportion`), also where it is the mean of
    several tasks (`intervals.mean_of_intervals`). Of one task, so is that of an accuracy of 0 or 1, which the bootstrap would
    give no width. All others are `intervals.bootstrap`'s.

    Args:
        groups: tables `[seed query]`, one a task.
        of: the metric's name.
    """
    if of.startswith("Rec2FTP"):
        return mean_of_intervals(*(proportion(group) for group in groups))
    found = bootstrap(*groups)
    extreme = of.endswith("accuracy") and len(groups) == 1 and found.value in (0.0, 1.0)
    return proportion(*groups) if extreme else found


@dataclass(frozen=True, repr=False)
class Comparison:
    """In-context learning against finetuning on the same demonstrations, by the paper's metrics."""

    gold: Int[Tensor, " query"]
    predictions: dict[str, Int[Tensor, " query"]]
    """By setting (ZSL, ICL, FT): each query's most probable label."""
    label_log_probs: dict[str, Float[Tensor, "query label"]]
    """By setting: mean log-probability per token of each label word, in nats; recordings have none."""
    rec2ftp: Rec2FTP
    per_layer: dict[str, Float[Tensor, "_ layer"]]
    """By metric (`PER_LAYER`), query by layer; SimAM is averaged over heads, Kendall and recall have the first queries
    only, and recordings without keys have no Kendall on keys."""

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
            overall = values.nanmean(1).nanmean().item()  # a query counts once, however many of its layers are defined
            rows.append({"metric": metric, "layer": None, "value": overall, "n": n})
            per_layer = zip(values.nanmean(0).tolist(), known.sum(0).tolist(), strict=True)
            rows += [{"metric": metric, "layer": i, "value": value, "n": n} for i, (value, n) in enumerate(per_layer)]
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def by_query(self) -> dict[str, Float[Tensor, " query"]]:
        """Each number over all layers together, query by query: whether a prediction is right, whether ICL makes a
        correction of FT (`recall`), or the mean over layers; NaN where undefined."""
        found = {f"{name} accuracy": (labels == self.gold).double() for name, labels in self.predictions.items()}
        labels = [self.predictions[setting] for setting in SETTINGS]
        found |= {
            "Rec2FTP": recall(self.gold, *labels),
            "Rec2FTP random": recall(self.gold, *labels, dealt=True),
        }
        return found | {name: values.nanmean(1).double() for name, values in self.per_layer.items()}

    def intervals(self) -> dict[str, Interval]:
        """Each number over all layers together, with its 95 % interval (`estimate`)."""
        return {name: estimate(values[None], of=name) for name, values in self.by_query().items()}

    def overall(self) -> pd.DataFrame:
        """The numbers over all layers together: metric, value, low and high (its 95 % interval), n."""
        return pd.DataFrame(
            {"metric": name, "value": one.value, "low": one.low, "high": one.high, "n": one.n_queries}
            for name, one in self.intervals().items()
        )

    def released(self) -> dict[str, Any]:
        """The metrics under the released scripts' own names: Recall2FTP in per cent, the others as lists by layer.

        Means over queries are the scripts': a cosine with a zero vector counts as 0, and one undefined rank correlation
        leaves its layer undefined.
        """
        found: dict[str, Any] = {"Recall2FTP": 100 * self.rec2ftp.value}
        for metric, name in RELEASED_NAMES.items():
            values = self.per_layer[metric]
            found[name] = (values.nan_to_num() if metric.startswith("Sim") else values).mean(0).tolist()
        return found

    def __repr__(self) -> str:
        settings = ", ".join(f"{name} accuracy={value:.3f}" for name, value in self.accuracy.items())
        return f"Comparison({len(self.gold)} queries, {settings}, Rec2FTP={self.rec2ftp})"

    def _repr_html_(self) -> str:
        return self._shown().to_html(index=False)

    def __str__(self) -> str:
        return self._shown().to_string(index=False)

    def _shown(self) -> pd.DataFrame:
        counts = {"Rec2FTP": f"{self.rec2ftp.both}/{self.rec2ftp.finetuned}"}
        return pd.DataFrame(
            {"metric": name, "value [95 % interval]": one.format(counts=counts.get(name, "")), "n": one.n_queries}
            for name, one in self.intervals().items()
        )

    def save(self, folder: str | PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        """Write the comparison into a folder, as safetensors and JSON, with whatever metadata belongs to it."""
        tensors = {"gold": self.gold} | {f"per_layer/{name}": values for name, values in self.per_layer.items()}
        tensors |= {f"predictions/{name}": values for name, values in self.predictions.items()}
        tensors |= {f"label_log_probs/{name}": values for name, values in self.label_log_probs.items()}
        save_tensors(Path(folder), tensors, {"rec2ftp": vars(self.rec2ftp), **(metadata or {})})

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Comparison":
        """Read a comparison that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged.
        """
        tensors, metadata = load_tensors(Path(folder))
        groups: dict[str, dict[str, Tensor]] = {"per_layer": {}, "predictions": {}, "label_log_probs": {}}
        # The order of columns and settings is the paper's, not the file's.
        with reading("Comparison", folder):
            for name, values in tensors.items():
                group, _, member = name.partition("/")
                if member:
                    groups[group][member] = values
            scored = groups["label_log_probs"]
            return cls(
                gold=tensors["gold"],
                predictions={name: groups["predictions"][name] for name in SETTINGS},
                label_log_probs={name: scored[name] for name in SETTINGS if name in scored},
                rec2ftp=Rec2FTP(**metadata["rec2ftp"]),
                per_layer={
                    name: groups["per_layer"][name]
                    for name in PER_LAYER
                    if name != "Kendall on keys" or name in groups["per_layer"]  # recordings may have no keys
                },
            )


def compare(
    *,
    zero_shot: Capture,
    in_context: Capture,
    finetuned: Capture,
    delta: WeightDelta,
    steps: Sequence[int] | None = None,
    seed: int = 0,
) -> Comparison:
    """Hold in-context learning against finetuning, query by query and layer by layer.

    Args:
        zero_shot: a capture of the zero-shot prompts.
        in_context: a capture of the same queries behind their demonstrations.
        finetuned: a capture of the zero-shot prompts with the delta applied.
        delta: the finetuning on the same demonstrations.
        steps: where a control's context holds other demonstrations, which training step each of them stands for; −1
            for none (`icl_dual.contexts.matching_training_steps`).
        seed: of the random baselines.

    Raises:
        ValueError: the captures or the delta are of different models, queries or demonstrations, or lack a field.
    """
    found = compare_recordings(
        Recordings.of(zero_shot=zero_shot, in_context=in_context, finetuned=finetuned, delta=delta, steps=steps),
        seed=seed,
    )
    runs = {"ZSL": zero_shot, "ICL": in_context, "FT": finetuned}
    return replace(found, label_log_probs={name: run.label_log_probs for name, run in runs.items()})


def compare_recordings(
    recordings: Recordings, *, seed: int = 0, kendall_queries: int | None = KENDALL_QUERIES
) -> Comparison:
    """The same from recordings, ours or the released code's, without any model.

    Args:
        recordings: e.g. what `load_recordings` reads.
        seed: of the random baselines.
        kendall_queries: on how many of the first queries attention to the demonstrations is compared; all for None.

    Raises:
        ValueError: `kendall_queries` is below one.
    """
    n_queries = len(recordings.gold)
    if kendall_queries is None:
        kendall_queries = n_queries
    if kendall_queries < 1:
        raise ValueError(f"expected at least one query whose attention is compared, got {kendall_queries}")
    # One stream of random numbers a baseline, so that the queries taken at once change none.
    streams = {name: np.random.default_rng(seed) for name in ("SimAOU", "SimAM", "token", "demonstration")}
    # Independent of one another: two of the updates of the inflation null are random at once.
    nulls = ("h_icl", "h_ft", "m_ft")
    streams |= {name: np.random.default_rng([seed, index]) for index, name in enumerate(nulls, 1)}
    found: dict[str, list[Tensor]] = {}
    for batch in torch.arange(n_queries).split(QUERIES_AT_ONCE):
        values = _outputs_and_maps(recordings, batch, streams)
        if len(batch := batch[batch < kendall_queries]):
            values |= _demonstration_attention(recordings, batch, streams)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    predictions = recordings.predictions
    return Comparison(
        gold=recordings.gold,
        predictions=predictions,
        label_log_probs={},
        rec2ftp=rec2ftp(recordings.gold, predictions["ZSL"], predictions["ICL"], predictions["FT"]),
        per_layer={name: torch.cat(found[name]) for name in PER_LAYER if name in found},
    )


def _outputs_and_maps(
    recordings: Recordings, batch: Int[Tensor, " batch"], streams: dict[str, np.random.Generator]
) -> dict[str, Float[Tensor, "batch layer"]]:
    rounding = _rounding(recordings)
    h_zsl, h_icl, h_ft = (recordings.attn_out[setting][batch].double() for setting in SETTINGS)
    m_zsl, m_icl, m_ft = (recordings.query_scores[setting][batch].double() for setting in SETTINGS)
    return {
        "SimAOU": sim_aou(h_zsl, h_icl, h_ft),
        "SimAOU random": sim_aou_random(h_zsl, h_icl, seed=streams["SimAOU"]),
        "SimAM before FT": _over_heads(sim_am(m_icl, m_zsl)),
        "SimAM after FT": _over_heads(sim_am(m_icl, m_ft)),
        "SimAM random": _over_heads(sim_am_random(m_icl, seed=streams["SimAM"])),
        "SimAMΔ": sim_am_delta(m_zsl, m_icl, m_ft, rounding=rounding).nanmean(-1),
        **_output_nulls(h_zsl, h_icl, h_ft, streams),
        **_map_nulls(m_zsl, m_icl, m_ft, rounding, streams["m_ft"]),
    }


def _output_nulls(
    h_zsl: Float[Tensor, "batch layer d_model"],
    h_icl: Float[Tensor, "batch layer d_model"],
    h_ft: Float[Tensor, "batch layer d_model"],
    streams: dict[str, np.random.Generator],
) -> dict[str, Float[Tensor, "batch layer"]]:
    """SimAOU's corrected form, and what updates in random directions score by either form, means over draws."""
    found = {name: torch.zeros(h_zsl.shape[:2], dtype=h_zsl.dtype) for name in _OUTPUT_NULLS}
    r_ft = random_updates(h_ft - h_zsl, seed=streams["h_ft"])
    r_icl = random_updates(h_icl - h_zsl, seed=streams["h_icl"])
    for of_ft, of_icl in zip(r_ft.unbind(1), r_icl.unbind(1), strict=True):
        random_ft = h_zsl + of_ft
        scores = (
            sim_aou(h_zsl, h_icl, random_ft),
            sim_aou(h_zsl, h_zsl + of_icl, random_ft),
            dual.cosine(h_icl - h_zsl, of_ft.double()),
        )
        for total, score in zip(found.values(), scores, strict=True):
            total += score / NULL_DRAWS
    return {"SimAOU unnormalised": sim_aou_unnormalised(h_zsl, h_icl, h_ft), **found}


_OUTPUT_NULLS = ("SimAOU random update", "SimAOU inflation null", "SimAOU unnormalised random")


def _map_nulls(
    m_zsl: Float[Tensor, "batch layer head token"],
    m_icl: Float[Tensor, "batch layer head token"],
    m_ft: Float[Tensor, "batch layer head token"],
    rounding: float,
    stream: np.random.Generator,
) -> dict[str, Float[Tensor, "batch layer"]]:
    """What changes of attention maps in random directions score, over the query's own tokens."""
    own = (m_zsl != 0).any(-2, keepdim=True)  # past a query's end all heads score 0
    change = changed(m_zsl, m_ft, rounding)
    drawn = torch.from_numpy(stream.standard_normal(tuple(change.shape), dtype=np.float32)).to(change) * own
    r = drawn * (change.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-20))
    return {
        "SimAM random update": _over_heads(sim_am(m_icl, m_zsl + r)),
        "SimAMΔ random": dual.cosine(changed(m_zsl, m_icl, rounding), r).nanmean(-1),
    }


def _over_heads(similarity: Float[Tensor, "batch layer head"]) -> Float[Tensor, "batch layer"]:
    """The mean over heads, in which one that scores nothing counts as 0, as in the scripts; NaN where all are such."""
    mean = similarity.nan_to_num().mean(-1)
    return mean.where(similarity.isfinite().any(-1), torch.nan)


def _demonstration_attention(
    recordings: Recordings, batch: Int[Tensor, " batch"], streams: dict[str, np.random.Generator]
) -> dict[str, Float[Tensor, "batch layer"]]:
    shown = (recordings.segments >= 0).nonzero().squeeze(-1)
    shown = shown[recordings.segments[shown].argsort(stable=True)]  # in the order in which they were trained on
    owners, q = recordings.segments[shown], recordings.q[batch]
    trained = torch.isin(recordings.training_segments, owners)
    m_icl = recordings.context_scores["ICL"][batch][..., shown].double()
    icl = demonstration_weights(m_icl) if len(shown) else m_icl
    m_ft = finetuning_attention(recordings.training_q[:, trained], q)
    ft = demonstration_weights(m_ft) if len(shown) else m_ft
    found = _agreement(icl, ft, TOP_TOKENS, "", streams["token"])
    if recordings.training_k is not None:
        n_heads, d_kv = recordings.query_scores["ICL"].shape[2], recordings.training_k.shape[-1]
        by_keys = finetuning_attention(recordings.training_k[:, trained], query_by_kv_head(q, n_heads, d_kv))
        found["Kendall on keys"] = kendall(icl, by_keys)
    icl, ft = by_demonstration(icl, owners), by_demonstration(ft, owners)
    return found | _agreement(icl, ft, TOP_DEMONSTRATIONS, " by demonstration", streams["demonstration"])


def _agreement(
    icl: Float[Tensor, "batch layer item"],
    ft: Float[Tensor, "batch layer item"],
    k: int,
    level: str,
    stream: np.random.Generator,
) -> dict[str, Float[Tensor, "batch layer"]]:
    """Rank correlation and recall of the most attended, with what chance has of each."""
    recall = top_recall(icl, ft, k)
    return {
        f"Kendall{level}": kendall(icl, ft),
        f"Kendall{level} random": kendall_random(icl, seed=stream),
        f"Top-{k} recall{level}": recall,
        f"Top-{k} recall{level} random": recall * 0 + k / max(icl.shape[-1], 1),
    }


def _rounding(recordings: Recordings) -> float:
    """What rounding alone changes, by the type of the weights that was recorded with."""
    dtype = getattr(torch, recordings.metadata.get("dtype", "float32"))
    return max(ROUNDING, torch.finfo(dtype).eps)
