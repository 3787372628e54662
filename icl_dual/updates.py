"""ΔW_ICL against ΔW_FT in weight space, head by head, and what ΔW_K and ΔW_V themselves are made of.

Both updates act on the same queries (equations 11–13):

    F̃_ICL(q) = (W_ZSL + ΔW_ICL) q,    ΔW_ICL = Σ_i v_i ⊗ k_i    over the demonstrations' tokens
    F̃_FT(q)  = (W_ZSL + ΔW_FT) q,     ΔW_FT = (W_V + ΔW_V) X Xᵀ (W_K + ΔW_K)ᵀ − W_V X Xᵀ W_Kᵀ

X are the zero-shot prompt's own inputs, held as they are in the untuned model: the tuned projections are run with every
layer's attention output put back to the untuned one. Rotated keys depend on where they stand, so X stands where the
query stands in context; attention that knows distances only does not change by that, which is checked.

Both are of attention: what momentum adds, where a model has any, depends on no query and is in neither. It is in X.

Beside each number is its null: ΔW_FT with the same singular values in random directions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.captures.capture import Capture
from icl_dual.captures.pairing import check_paired
from icl_dual.finetuning.weight_delta import Factors, WeightDelta
from icl_dual.models import Attention, Model, OnAttention, OnTensor, UnsupportedModelError
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts
from icl_dual.statistics.frames import summary_frame
from icl_dual.storage import load_tensors, reading, save_tensors

BATCH_SIZE = 16

MOVED_TOLERANCE = 1e-4, 256
"""Largest relative change, by rounding, of a run that is moved to other positions; past that position, in proportion to
it: transformers computes the angles of rotations in float32, also for models in float64."""


@dataclass(frozen=True, repr=False)
class UpdateComparison:
    """ΔW_ICL and ΔW_FT at each query, layer and key-value head; the fields ending in `_random` are the null.

    The null of the Frobenius cosine has mean 0 and standard deviation 1/d_head. It has ΔW_FT's own norm and effective
    rank, which therefore have no null. What is undefined (a zero update) is NaN.
    """

    model: str
    rank: int
    """How many leading singular directions the subspaces have."""
    cosine: Float[Tensor, "query layer kv_head"]
    """Frobenius cosine ⟨ΔW_ICL, ΔW_FT⟩ / (‖ΔW_ICL‖ ‖ΔW_FT‖)."""
    cosine_random: Float[Tensor, "query layer kv_head"]
    left_angles: Float[Tensor, "query layer kv_head rank"]
    """Principal angles between the leading left singular subspaces (what is written), in degrees, smallest first."""
    left_angles_random: Float[Tensor, "query layer kv_head rank"]
    right_angles: Float[Tensor, "query layer kv_head rank"]
    """The same of the right singular subspaces (what is read)."""
    right_angles_random: Float[Tensor, "query layer kv_head rank"]
    action_cosine: Float[Tensor, "query layer head"]
    """cos(ΔW_ICL q, ΔW_FT q), q the in-context query at the recorded position."""
    action_cosine_random: Float[Tensor, "query layer head"]
    norm_ratio: Float[Tensor, "query layer kv_head"]
    """‖ΔW_FT‖ / ‖ΔW_ICL‖."""
    effective_rank_icl: Float[Tensor, "query layer kv_head"]
    effective_rank_ft: Float[Tensor, "query layer kv_head"]
    residual: float
    """How far the run that ΔW_FT is read from is off the zero-shot capture's attention output, relative to it."""

    def to_frame(self) -> pd.DataFrame:
        """Tidy: metric, layer, head (key-value heads, but for the action), mean and deviation over queries, and n."""
        return summary_frame(_tensors(self))

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the comparison into a folder, as safetensors and JSON."""
        about = {"model": self.model, "rank": self.rank, "residual": self.residual}
        save_tensors(Path(folder), _tensors(self), about)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "UpdateComparison":
        """Read a comparison that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged.
        """
        tensors, about = load_tensors(Path(folder))
        with reading("UpdateComparison", folder):
            return cls(**tensors, **about)

    def __repr__(self) -> str:
        return (
            f"UpdateComparison({self.model!r}, {len(self.cosine)} queries, cosine={self.cosine.nanmean():.3f} (null "
            f"{self.cosine_random.nanmean():.3f}), action cosine={self.action_cosine.nanmean():.3f} (null "
            f"{self.action_cosine_random.nanmean():.3f}), norm ratio={self.norm_ratio.nanmean():.2g})"
        )


def compare_updates(
    model: Model,
    *,
    zero_shot: Capture,
    in_context: Capture,
    delta: WeightDelta,
    rank: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> UpdateComparison:
    """Hold ΔW_ICL against ΔW_FT at every query, layer and head, each beside its null.

    Runs the zero-shot prompts through the model twice, in batches: memory does not grow with the number of queries.

    Args:
        model: the untuned model; comes back as it was.
        zero_shot: a capture of the queries without demonstrations, with `attn_out`.
        in_context: a capture of the same queries behind their demonstrations, with the fields `q_scored` and
            `keys_values`.
        delta: the finetuning on the same demonstrations.
        rank: how many leading singular directions to compare by their principal angles.
        seed: of the null's directions.
        progress: show a progress bar.

    Raises:
        ValueError: captures or delta are of other weights, queries or demonstrations, lack a field, there are no
            demonstrations, the rank is not between 1 and d_head, or the model is in half precision.
        UnsupportedModelError: the prompts moved to their in-context positions are not the zero-shot run.
    """
    _check_match(model, zero_shot, in_context, delta, rank)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {}
    residual = 0.0
    bar = progress_bar(total=len(in_context.prompts.queries), desc="ΔW_FT", show=progress, unit="query")
    with torch.no_grad(), bar:
        for first in range(0, len(in_context.prompts.queries), BATCH_SIZE):
            batch = torch.arange(first, min(first + BATCH_SIZE, len(in_context.prompts.queries)))
            held = _HeldPass(model, in_context.prompts, batch)
            residual = max(residual, held.base(zero_shot))
            layers = [
                _compare_layer(
                    _delta_w_icl(model, in_context, layer, batch), W_FT, in_context, layer, batch, rank, generator
                )
                for layer, W_FT in enumerate(held.tuned(delta))
            ]
            for name in layers[0]:
                found.setdefault(name, []).append(torch.stack([layer[name] for layer in layers], dim=1))
            bar.update(len(batch))
    stacked = {name: torch.cat(batches) for name, batches in found.items()}
    return UpdateComparison(model=model.name, rank=rank, residual=residual, **stacked)


class _HeldPass:
    """Zero-shot prompts run twice over the same inputs X: by the untuned projections, and by the tuned ones."""

    def __init__(self, model: Model, prompts: Prompts, batch: Int[Tensor, " batch"]) -> None:
        self.model, self.batch = model, batch
        rows = [[*prompts.start, *prompts.suffixes[index]] for index in batch.tolist()]
        longest = max(map(len, rows))
        self.tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
        self.last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        self.positions = torch.arange(longest, device=model.device)
        if model.rotary:
            self.positions += len(prompts.prefix) - len(prompts.start)
        self.attention: list[Attention] = []

    def base(self, zero_shot: Capture) -> float:
        """The untuned run, kept; returns how far its attention output is off the zero-shot capture's."""
        worst = 0.0
        tolerance = MOVED_TOLERANCE[0] * max(1.0, int(self.positions[-1]) / MOVED_TOLERANCE[1])

        def keep(layer: int, attention: Attention) -> None:
            self.attention.append(attention)

        def check(layer: int, output: Tensor) -> None:
            nonlocal worst
            assert zero_shot.attn_out is not None
            expected = zero_shot.attn_out[self.batch, layer]
            off = output[torch.arange(len(self.batch), device=self.last.device), self.last].to(expected) - expected
            residual = (off.norm(dim=-1) / expected.norm(dim=-1)).max().item()
            if not residual <= tolerance:
                raise UnsupportedModelError(
                    f"{self.model.name} ({self.model.architecture}), layer {layer}: zero-shot prompts at in-context "
                    f"positions are off the zero-shot run by {residual:.1e}; expected at most "
                    f"{tolerance:.0e}. Its ΔW_FT cannot be held against ΔW_ICL in one frame"
                )
            worst = max(worst, residual)

        self._run(keep, check)
        return worst

    def tuned(self, delta: WeightDelta) -> Iterator[Float[Tensor, "batch kv_head d_head d_head"]]:
        """ΔW_FT at every layer: the tuned projections run on inputs held by putting back what W_O got, untuned."""
        tuned: list[Attention] = []

        def hold(layer: int, attention: Attention) -> Tensor:
            tuned.append(attention)
            return self.attention[layer].output

        with delta.applied(self.model):
            self._run(hold, add_momentum=False)  # the tuned values' own would move the inputs
        for rule, before, after in zip(self.model.attention_rules, self.attention, tuned, strict=True):
            seen = rule.visible(self.positions[self.last][:, None], self.positions[None])[:, 0, :, None, None]
            keys_values = before.k, before.v * seen, after.k, after.v * seen
            yield dual.delta_w_ft(*(tensor.double().cpu() for tensor in keys_values))

    def _run(self, on_attention: OnAttention, on_output: OnTensor | None = None, *, add_momentum: bool = True) -> None:
        self.model.run(
            self.tokens,
            positions=self.positions,
            read=self.last[:, None],
            on_attention=on_attention,
            on_output=on_output,
            add_momentum=add_momentum,
        )


def _tensors(result: UpdateComparison) -> dict[str, Tensor]:
    return {name: values for name, values in vars(result).items() if isinstance(values, Tensor)}


def _delta_w_icl(
    model: Model, in_context: Capture, layer: int, batch: Int[Tensor, " batch"]
) -> Float[Tensor, "#batch kv_head d_head d_head"]:
    """ΔW_ICL over the demonstrations that the layer's mask shows: one for all queries where that is all of them."""
    prompts, kept = in_context.prompts, in_context.keys_values
    assert kept is not None
    n_start, n_prefix = len(prompts.start), len(prompts.prefix)
    rows = torch.tensor([n_prefix + len(prompts.suffixes[index]) - 1 for index in batch.tolist()])
    seen = model.attention_rules[layer].visible(rows[None], torch.arange(n_start, n_prefix)[None])[0]
    seen = seen[:1] if (seen == seen[:1]).all() else seen
    k, v = kept.demo_keys[layer].double(), kept.demo_values[layer].double()
    return dual.head_weights(k.expand(len(seen), *k.shape), v * seen[..., None, None])


def _compare_layer(
    W_ICL: Float[Tensor, "#batch kv_head d_head d_head"],
    W_FT: Float[Tensor, "batch kv_head d_head d_head"],
    in_context: Capture,
    layer: int,
    batch: Int[Tensor, " batch"],
    rank: int,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "batch ..."]]:
    assert in_context.q_scored is not None
    q = in_context.q_scored[batch, layer].double()
    a, b = dual.Svd.of(W_ICL), dual.Svd.of(W_FT)
    found = {
        "norm_ratio": torch.where(a.S[..., 0] > 0, b.S.norm(dim=-1) / a.S.norm(dim=-1), torch.nan),
        "effective_rank_icl": dual.effective_rank(a.S).expand(len(batch), -1),
        "effective_rank_ft": dual.effective_rank(b.S),
    }
    by_group = q.unflatten(1, (W_FT.shape[1], -1))
    acted = a.act(by_group)
    for suffix, other in (("", b), ("_random", b.with_random_directions(generator))):
        overlap = dual.overlap(a, other, rank)
        found |= {name + suffix: values for name, values in overlap._asdict().items()}
        found["action_cosine" + suffix] = dual.cosine(acted, other.act(by_group)).flatten(1)
    return found


@dataclass(frozen=True, repr=False)
class DeltaSummary:
    """What finetuning did to each layer's projections: how much, in how many directions, from which demonstrations."""

    norm_K: Float[Tensor, " layer"]
    """Frobenius norm of ΔW_K."""
    norm_V: Float[Tensor, " layer"]
    effective_rank_K: Float[Tensor, " layer"]
    effective_rank_V: Float[Tensor, " layer"]
    demonstrations_K: Float[Tensor, "layer demo"] | None
    """⟨ΔW_K of a demonstration, ΔW_K⟩ / ‖ΔW_K‖²: each one's share, summing to 1; `None` without factors."""
    demonstrations_V: Float[Tensor, "layer demo"] | None

    def to_frame(self) -> pd.DataFrame:
        """One row a number: metric, layer, demonstration (from 1; empty where the number is of all), value."""
        rows = []
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            for layer, value in enumerate(values.tolist()):
                by_demo = enumerate(value, 1) if isinstance(value, list) else [(None, value)]
                rows += [(field.name, layer, demo, number) for demo, number in by_demo]
        frame = pd.DataFrame(rows, columns=["metric", "layer", "demonstration", "value"])
        return frame.astype({"demonstration": "Int64"})

    def __repr__(self) -> str:
        size, rank = ((getattr(self, f"{what}_K"), getattr(self, f"{what}_V")) for what in ("norm", "effective_rank"))
        return (
            f"DeltaSummary({len(self.norm_K)} layers, ‖ΔW_K‖={size[0].norm():.3g}, ‖ΔW_V‖={size[1].norm():.3g}, "
            f"effective ranks {rank[0].nanmean():.1f} and {rank[1].nanmean():.1f})"
        )


def summarise(delta: WeightDelta) -> DeltaSummary:
    """Norm and effective rank of ΔW_K and ΔW_V at every layer and, from a delta's factors, what they are made of.

    A delta with factors is summarised as their sum: the difference of rounded weights, which a delta is, has its
    rounding spread over all directions.
    """
    factors, weights, shares = delta.factors, [delta.W_K.double(), delta.W_V.double()], [None, None]
    if factors is not None:
        errors = [e.double() for e in (factors.e_K, factors.e_V)]
        weights = [dual.outer_sum(factors.x.double(), e) for e in errors]
        shares = [_shares(e, factors, W) for e, W in zip(errors, weights, strict=True)]
    spectra = [torch.linalg.svdvals(W) for W in weights]
    return DeltaSummary(*(S.norm(dim=-1) for S in spectra), *(dual.effective_rank(S) for S in spectra), *shares)


def _shares(
    errors: Float[Tensor, "layer train_token d_kv"], factors: Factors, W: Float[Tensor, "layer d_kv d_model"]
) -> Float[Tensor, "layer demo"]:
    """⟨Σ_{i∈demo} e_i ⊗ x_i, ΔW⟩ = Σ_{i∈demo} e_iᵀ ΔW x_i, without forming a matrix for each demonstration."""
    along = (errors * (factors.x.double() @ W.mT)).sum(-1)
    n_steps = int(factors.steps.max()) + 1
    by_step = along.new_zeros(len(along), n_steps).index_add_(1, factors.steps, along)
    return by_step / (W * W).sum((-2, -1)).unsqueeze(-1)


def _check_match(model: Model, zero_shot: Capture, in_context: Capture, delta: WeightDelta, rank: int) -> None:
    check_paired(model, zero_shot=zero_shot, in_context=in_context)
    if (delta.model, delta.fingerprint) != (model.name, in_context.fingerprint):
        raise ValueError(
            f"expected a delta finetuned from the weights of {model.name!r} (fingerprint {in_context.fingerprint}), got one "
            f"from {delta.model!r} ({delta.fingerprint})"
        )
    if delta.W_Q is not None:
        raise ValueError(
            "expected a delta of keys and values, got one of all attention: equation 13 has no change of queries. "
            "Finetune with trained='key-value'"
        )
    if not in_context.prompts.demonstrations:
        raise ValueError("expected in_context's prompts to have demonstrations: without any, ΔW_ICL is 0. Got none")
    if delta.demonstrations != [list(tokens) for tokens in in_context.prompts.training_sequences]:
        raise ValueError(
            f"expected a delta finetuned on the {len(in_context.prompts.demonstrations)} demonstrations of in_context's prompts, in "
            f"their order, got one of {len(delta.demonstrations)} that differ. Finetune on in_context's prompts"
        )
    for run, name in ((in_context, "q_scored"), (in_context, "keys_values"), (zero_shot, "attn_out")):
        if getattr(run, name) is None:
            raise ValueError(f"expected a capture with fields=icl_dual.DECOMPOSE_FIELDS, got {run} without {name!r}")
    if not 1 <= rank <= model.d_head:
        raise ValueError(f"expected a rank from 1 to d_head = {model.d_head}, got {rank}")
    if model.dtype.itemsize < 4:
        raise ValueError(
            f"expected a model in float32 or float64, got {model.dtype}: ΔW_FT is a small difference of two runs, and "
            "half precision rounds it away. Load the model with dtype=torch.float32"
        )
