"""ΔW_ICL compared with ΔW_FT as matrices, head by head; and how much of ΔW_K and ΔW_V comes from each demonstration.

Both updates act on the same queries (equations 11–13):

    F̃_ICL(q) = (W_ZSL + ΔW_ICL) q,    ΔW_ICL = Σ_i v_i ⊗ k_i    over the demonstrations' tokens
    F̃_FT(q)  = (W_ZSL + ΔW_FT) q,     ΔW_FT = (W_V + ΔW_V) X Xᵀ (W_K + ΔW_K)ᵀ − W_V X Xᵀ W_Kᵀ

X are the untuned model's inputs of the zero-shot prompt. The tuned projections run on the same X: the residual stream
after every layer is replaced with the untuned one, so MLPs need not run again. Rotated keys depend on their positions,
so X is run at the query's in-context positions. Attention that depends on distances alone does not change by that,
which is checked.

Both are updates of attention: what momentum adds, where a model has any, depends on no query and is in neither. It is
in X.

Each number has its null: ΔW_FT with the same singular values in random directions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import Count, Seed, checked
from icl_dual.captures.capture import Capture
from icl_dual.captures.pairing import (
    check_demonstrations,
    check_fields,
    check_paired,
    check_start_weights,
    check_training_sequences,
)
from icl_dual.field_docs import document_fields
from icl_dual.finetuning.weight_delta import Factors, WeightDelta
from icl_dual.models import Attention, Model, UnsupportedModelError
from icl_dual.models.journal import exclusive
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts
from icl_dual.results import ROUNDING, check_axes, check_range, check_values, compare_by_value
from icl_dual.statistics.frames import summary_frame
from icl_dual.storage import Saved
from icl_dual.torch_utils import checked_index, is_half, linalg, to_list, vector_norm
from icl_dual.type_guards import is_list

BATCH_SIZE = 16
"""How many queries run at once."""

MOVED_TOLERANCE = 1e-4, 256
"""Largest relative change of a run that is rounding when it is moved to other positions, and the position past which it
grows in proportion: transformers computes the angles of rotations in float32, also for models in float64."""


@document_fields
@compare_by_value
class DemonstrationKeysValues(NamedTuple):
    """Keys and values of the demonstrations, which make up ΔW_ICL, and how many of them each layer's window hides."""

    keys: Float[Tensor, "layer demo_pos kv_head d_head"]
    """Keys as scored of the demonstrations and their separators."""
    values: Float[Tensor, "layer demo_pos kv_head d_head"]
    """Values of the same tokens."""
    n_hidden: Int[Tensor, "query layer"]
    """How many of the first tokens are outside of the layer's sliding window at the query's recorded position; 0
    without a window."""

    def __repr__(self) -> str:
        return f"DemonstrationKeysValues(keys{list(self.keys.shape)} and values)"


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class UpdateComparison(Saved):
    """ΔW_ICL compared with ΔW_FT at each query, layer and key-value head; fields that end in `_random` are the null.

    The null of the Frobenius cosine has mean 0 and standard deviation 1/d_head. It has ΔW_FT's own norm and effective
    rank, which therefore have no null. What is undefined (a zero update) is NaN. `delta_W(layer, head)` returns ΔW_ICL
    itself.
    """

    model: str
    """The model's name."""
    rank: int
    """How many leading singular directions span the subspaces that are compared."""
    cosine: Float[Tensor, "query layer kv_head"]
    """Frobenius cosine ⟨ΔW_ICL, ΔW_FT⟩ / (‖ΔW_ICL‖ ‖ΔW_FT‖)."""
    cosine_random: Float[Tensor, "query layer kv_head"]
    """The Frobenius cosine of ΔW_ICL with the null."""
    left_angles: Float[Tensor, "query layer kv_head rank"]
    """Principal angles between the leading left singular subspaces (what is written), in degrees, smallest first."""
    left_angles_random: Float[Tensor, "query layer kv_head rank"]
    """The angles between the left singular subspaces of ΔW_ICL and the null, in degrees, smallest first."""
    right_angles: Float[Tensor, "query layer kv_head rank"]
    """Principal angles between the leading right singular subspaces (what is read), in degrees, smallest first."""
    right_angles_random: Float[Tensor, "query layer kv_head rank"]
    """The angles between the right singular subspaces of ΔW_ICL and the null, in degrees, smallest first."""
    action_cosine: Float[Tensor, "query layer head"]
    """cos(ΔW_ICL q, ΔW_FT q), q being the in-context query at the recorded position."""
    action_cosine_random: Float[Tensor, "query layer head"]
    """The cosine of ΔW_ICL q with the null's action on q."""
    norm_ratio: Float[Tensor, "query layer kv_head"]
    """‖ΔW_FT‖ / ‖ΔW_ICL‖, in Frobenius norms."""
    effective_rank_icl: Float[Tensor, "query layer kv_head"]
    """Effective rank of ΔW_ICL: exp of the entropy of its normalised singular values."""
    effective_rank_ft: Float[Tensor, "query layer kv_head"]
    """Effective rank of ΔW_FT."""
    residual: float
    """The largest relative difference between the attention output of the run that ΔW_FT is computed from and the
    zero-shot capture's."""
    demonstrations: DemonstrationKeysValues | None = None
    """What `delta_W` computes from: in_context's own tensors. `None` in a comparison that version 0.1 saved."""

    def __post_init__(self) -> None:
        axes = check_axes(self, rank=("the field rank", self.rank))
        for suffix in ("", "_random"):
            for name in ("cosine", "action_cosine"):
                check_values(self, name + suffix, low=-1 - ROUNDING, high=1 + ROUNDING, nan=True)
            for name in ("left_angles", "right_angles"):
                check_values(self, name + suffix, low=0, high=90 + ROUNDING, nan=True)
        check_values(self, "norm_ratio", low=0, nan=True, infinite=True)
        check_values(self, "effective_rank_icl", "effective_rank_ft", low=1 - ROUNDING, nan=True)
        check_values(self, "rank", low=1)
        check_values(self, "residual", low=0)
        if self.demonstrations is not None:
            check_values(self, "demonstrations")
            check_range("demonstrations/n_hidden", self.demonstrations.n_hidden, low=0, high=axes["demo_pos"])

    @checked
    def delta_W(self, layer: int, head: int, query: int = 0) -> Float[Tensor, "d_head d_head"]:  # noqa: N802 - ΔW
        """Return ΔW_ICL = Σ_i v_i ⊗ k_i of one layer and query head, over the demonstrations' tokens, in float64.

        It acts on the head's query as scored (`Capture.q_scored`): ΔW_ICL q. Query heads that share a key-value head
        share the matrix. ΔW_FT, a matrix for each query, is compared and not kept.

        Args:
            layer: the layer's index; like the others, negative from the end.
            head: the query head's index.
            query: the query's index. It matters in layers with a sliding window alone, where ΔW_ICL is over the tokens
                that the window shows to this query; elsewhere all queries share one matrix.

        Returns:
            The matrix; its columns act on queries and its rows are the head's output.

        Raises:
            IndexError: an index is out of range.
            ValueError: the comparison was saved by version 0.1, which saved no keys and values.
        """
        if self.demonstrations is None:
            raise ValueError(
                "expected a comparison with the demonstrations' keys and values, got one that version 0.1 saved "
                "without them: call icl_dual.compare_updates again"
            )
        n_queries, n_layers, n_heads = self.action_cosine.shape
        query, layer = checked_index("query", query, n_queries), checked_index("layer", layer, n_layers)
        kv_head = checked_index("head", head, n_heads) // (n_heads // self.cosine.shape[2])
        kv_heads, visible = slice(kv_head, kv_head + 1), slice(int(self.demonstrations.n_hidden[query, layer]), None)
        k, v = (t[layer, visible, kv_heads].double() for t in (self.demonstrations.keys, self.demonstrations.values))
        return dual.head_weights(k, v)[0]

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: metric, layer, head, mean and deviation over queries, n.

        Heads are key-value heads, except those of the action, which are query heads.
        """
        return summary_frame({name: values for name, values in vars(self).items() if isinstance(values, Tensor)})

    def __repr__(self) -> str:
        return (
            f"UpdateComparison({self.model!r}, {len(self.cosine)} queries, cosine={self.cosine.nanmean():.3f} (null "
            f"{self.cosine_random.nanmean():.3f}), action cosine={self.action_cosine.nanmean():.3f} (null "
            f"{self.action_cosine_random.nanmean():.3f}), norm ratio={self.norm_ratio.nanmean():.2g})"
        )


@checked
@exclusive
def compare_updates(
    model: Model,
    *,
    zero_shot: Capture,
    in_context: Capture,
    delta: WeightDelta,
    rank: Count = 4,
    seed: Seed = 0,
    progress: bool = True,
) -> UpdateComparison:
    """Compare ΔW_ICL with ΔW_FT at every query, layer and head, each number with its null.

    Runs the zero-shot prompts through the model twice, in batches: memory does not grow with the number of queries.

    Args:
        model: the untuned model; comes back as it was.
        zero_shot: a capture of the queries without demonstrations, with `attn_out`.
        in_context: a capture of the same queries after their demonstrations, with the fields `q_scored` and
            `keys_values`.
        delta: the finetuning on the same demonstrations.
        rank: how many leading singular directions to compare by their principal angles.
        seed: the seed of the null's random directions.
        progress: show a progress bar.

    Raises:
        ValueError: captures or delta are of other weights, queries or demonstrations, lack a field, there are no
            demonstrations, the rank is not between 1 and d_head, or the model is in half precision.
        UnsupportedModelError: the prompts moved to their in-context positions give another attention output than the
            zero-shot run.
    """
    _check_match(model, zero_shot, in_context, delta, rank)
    generator = torch.Generator().manual_seed(seed)
    zero_shot, in_context = zero_shot.to("cpu"), in_context.to("cpu")  # as are singular value decompositions
    batches_by_name: dict[str, list[Tensor]] = {}
    residual, n_queries = 0.0, len(in_context.prompts.queries)
    batches, icl_updates = _batches(in_context.prompts), _IclUpdates(model, in_context)
    bar = progress_bar(total=n_queries, desc="ΔW_FT", show=progress, unit="query")
    with torch.no_grad(), bar:
        for batch in batches:
            fixed_inputs = _FixedInputPass(model, in_context.prompts, batch)
            residual = max(residual, fixed_inputs.run_untuned(zero_shot))
            layers = [
                _compare_layer(icl_updates.of(layer, batch), W_FT, in_context, layer, batch, rank, generator)
                for layer, W_FT in enumerate(fixed_inputs.run_tuned(delta))
            ]
            for name in layers[0]:
                by_layer = torch.stack([layer[name] for layer in layers], dim=1)
                batches_by_name.setdefault(name, []).append(by_layer)
            bar.update(len(batch))
    in_order = torch.cat(batches).argsort()
    stacked = {name: torch.cat(by_batch)[in_order] for name, by_batch in batches_by_name.items()}
    demonstrations = _demonstration_keys_values(model, in_context)
    return UpdateComparison(model.name, rank, residual=residual, demonstrations=demonstrations, **stacked)


def _batches(prompts: Prompts) -> list[Int[Tensor, " batch"]]:
    """Return the queries in batches, those together that the demonstrations move by as many positions, by length: a
    batch is padded to its longest query."""
    lengths = torch.tensor([len(row) for row in prompts.zero_shot().suffixes])
    shifts = torch.tensor([len(row) for row in prompts.suffixes]) - lengths
    by_length = lengths.argsort(stable=True)
    by_shift = [by_length[shifts[by_length] == shift] for shift in sorted(set(to_list(shifts)))]
    return [batch for queries in by_shift for batch in torch.split(queries, BATCH_SIZE)]


def _demonstration_keys_values(model: Model, in_context: Capture) -> DemonstrationKeysValues:
    """Return the keys and values that make up ΔW_ICL, and how many of them each layer's window hides from each
    query."""
    assert in_context.keys_values is not None
    queries = torch.arange(len(in_context.prompts.queries))
    visible = [_visible_demonstrations(model, in_context.prompts, layer, queries) for layer in range(model.n_layers)]
    n_hidden = torch.stack([(~by_query).sum(-1) for by_query in visible], dim=1)
    return DemonstrationKeysValues(in_context.keys_values.demo_keys, in_context.keys_values.demo_values, n_hidden)


class _FixedInputPass:
    """Runs zero-shot prompts twice over the same inputs X: with the untuned projections, and with the tuned ones."""

    def __init__(self, model: Model, prompts: Prompts, batch: Int[Tensor, " batch"]) -> None:
        self.model, self.batch = model, batch
        alone = prompts.zero_shot().suffixes
        queries: list[int] = to_list(batch)
        rows = [[*prompts.start, *alone[query]] for query in queries]
        longest = max(map(len, rows))
        self.tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
        self.last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        self.predicting = self.last - len(prompts.appended_tokens)
        self.positions = torch.arange(longest, device=model.device)
        if model.rotary:
            first = int(batch[0])
            self.positions += len(prompts.prefix) + len(prompts.suffixes[first]) - len(rows[0])
        self.attention: list[Attention] = []
        self.residuals: list[Float[Tensor, "batch pos d_model"]] = []

    def run_untuned(self, zero_shot: Capture) -> float:
        """Run the untuned model and keep its attention and its residual stream; return how far attention's output is
        from the zero-shot capture's."""
        worst = 0.0
        tolerance = MOVED_TOLERANCE[0] * max(1.0, int(self.positions[-1]) / MOVED_TOLERANCE[1])

        def keep_attention(layer: int, attention: Attention) -> None:
            self.attention.append(attention)

        def keep_residual(layer: int, residual: Tensor) -> None:
            self.residuals.append(residual)

        def check_output(layer: int, output: Tensor) -> None:
            nonlocal worst
            assert zero_shot.attn_out is not None
            expected = zero_shot.attn_out[self.batch, layer]
            rows = torch.arange(len(self.batch), device=self.last.device)
            difference = output[rows, self.last].to(expected) - expected
            residual = (vector_norm(difference, dim=-1) / vector_norm(expected, dim=-1)).max().item()
            if not residual <= tolerance:
                raise UnsupportedModelError(
                    f"{self.model.name} ({self.model.architecture}), layer {layer}: expected zero-shot prompts at "
                    f"in-context positions to give the zero-shot run's attention output to {tolerance:.0e}, got a "
                    f"difference of {residual:.1e}: its ΔW_FT and ΔW_ICL are not comparable"
                )
            worst = max(worst, residual)

        self._run(on_attention=keep_attention, on_output=check_output, on_residual=keep_residual)
        return worst

    def run_tuned(self, delta: WeightDelta) -> Iterator[Float[Tensor, "batch kv_head d_head d_head"]]:
        """Yield ΔW_FT of every layer: the tuned projections run on X, the untuned residual stream."""
        tuned: list[Attention] = []

        def keep_attention(layer: int, attention: Attention) -> None:
            tuned.append(attention)

        def restore_untuned(layer: int, residual: Tensor) -> Tensor:
            return self.residuals[layer]

        with delta.applied(self.model):
            self._run(on_attention=keep_attention, on_residual=restore_untuned, skip_mlps=True)
        for rule, before, after in zip(self.model.attention_rules, self.attention, tuned, strict=True):
            visible = rule.visible(self.positions[self.last][:, None], self.positions[None])[:, 0, :, None, None]
            keys_values = before.k, before.v * visible, after.k, after.v * visible
            yield dual.delta_w_ft(*(tensor.double().cpu() for tensor in keys_values))

    def _run(self, **options: Any) -> None:
        self.model.run(
            self.tokens, positions=self.positions, read=self.last[:, None], predicting=self.predicting, **options
        )


def _visible_demonstrations(
    model: Model, prompts: Prompts, layer: int, batch: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch demo_pos"]:
    """Return which of the demonstrations' tokens the layer's mask shows at each query's recorded position."""
    n_start, n_prefix = len(prompts.start), len(prompts.prefix)
    queries: list[int] = to_list(batch)
    recorded = torch.tensor([n_prefix + len(prompts.suffixes[query]) - 1 for query in queries])
    return model.attention_rules[layer].visible(recorded[None], torch.arange(n_start, n_prefix)[None])[0]


class _IclUpdates:
    """Forms and decomposes ΔW_ICL, once for all batches of queries to which a layer shows the same demonstrations."""

    def __init__(self, model: Model, in_context: Capture) -> None:
        self.model, self.in_context = model, in_context
        self.latest: dict[int, tuple[Bool[Tensor, "#batch demo_pos"], dual.Svd]] = {}
        """By layer, the tokens that it showed last, and ΔW_ICL over these: the memory is the same for all queries."""

    def of(self, layer: int, batch: Int[Tensor, " batch"]) -> dual.Svd:
        """Return ΔW_ICL over the demonstrations that the layer's mask shows: one for all queries of the batch where it
        shows them the same."""
        visible = _visible_demonstrations(self.model, self.in_context.prompts, layer, batch)
        visible = visible[:1] if (visible == visible[:1]).all() else visible
        if layer in self.latest and torch.equal(self.latest[layer][0], visible):
            return self.latest[layer][1]
        keys_values = self.in_context.keys_values
        assert keys_values is not None
        k, v = keys_values.demo_keys[layer].double(), keys_values.demo_values[layer].double()
        W_ICL = dual.head_weights(k.expand(len(visible), *k.shape), v * visible[..., None, None])
        self.latest[layer] = visible, dual.Svd.of(W_ICL)
        return self.latest[layer][1]


def _compare_layer(
    icl_update: dual.Svd,
    W_FT: Float[Tensor, "batch kv_head d_head d_head"],
    in_context: Capture,
    layer: int,
    batch: Int[Tensor, " batch"],
    rank: int,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Return every number that compares ΔW_ICL, decomposed, with ΔW_FT at one layer, by its name."""
    assert in_context.q_scored is not None
    q = in_context.q_scored[batch, layer].double()
    a, b = icl_update, dual.Svd.of(W_FT)
    values_by_name = {
        "norm_ratio": torch.where(a.S[..., 0] > 0, vector_norm(b.S, dim=-1) / vector_norm(a.S, dim=-1), torch.nan),
        "effective_rank_icl": dual.effective_rank(a.S).expand(len(batch), -1),
        "effective_rank_ft": dual.effective_rank(b.S),
    }
    by_group = torch.unflatten(q, 1, (W_FT.shape[1], -1))
    action = a.act(by_group)
    for suffix, other in (("", b), ("_random", b.with_random_directions(generator))):
        overlap = dual.overlap(a, other, rank)
        values_by_name |= {name + suffix: values for name, values in overlap._asdict().items()}
        values_by_name["action_cosine" + suffix] = dual.cosine(action, other.act(by_group)).flatten(1)
    return values_by_name


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class DeltaSummary(Saved):
    """What finetuning changed in each layer's projections: how much, in how many directions, by which
    demonstrations."""

    norm_K: Float[Tensor, " layer"]
    """Frobenius norm of ΔW_K."""
    norm_V: Float[Tensor, " layer"]
    """Frobenius norm of ΔW_V."""
    effective_rank_K: Float[Tensor, " layer"]
    """Effective rank of ΔW_K: exp of the entropy of its normalised singular values."""
    effective_rank_V: Float[Tensor, " layer"]
    """Effective rank of ΔW_V."""
    demonstrations_K: Float[Tensor, "layer demo"] | None
    """Each demonstration's share ⟨its ΔW_K, ΔW_K⟩ / ‖ΔW_K‖², which sum to 1; `None` for a delta without factors."""
    demonstrations_V: Float[Tensor, "layer demo"] | None
    """Each demonstration's share ⟨its ΔW_V, ΔW_V⟩ / ‖ΔW_V‖², which sum to 1; `None` for a delta without factors."""

    def __post_init__(self) -> None:
        check_axes(self)
        check_values(self, "norm_K", "norm_V", low=0)
        check_values(self, "effective_rank_K", "effective_rank_V", low=1 - ROUNDING, nan=True)
        check_values(self, "demonstrations_K", "demonstrations_V", nan=True)
        for name in ("demonstrations_K", "demonstrations_V"):
            shares = getattr(self, name)
            if shares is not None and ((shares.sum(-1) - 1).abs() > ROUNDING).any():
                raise ValueError(f"expected {name} that sums to 1, got another sum: summarise the delta again")
        if (self.demonstrations_K is None) != (self.demonstrations_V is None):
            raise ValueError(
                "expected demonstrations_K and demonstrations_V together, got one alone: summarise the delta again"
            )

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: metric, layer, demonstration (from 1; empty for all together), value."""
        rows: list[tuple[Any, ...]] = []
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            for layer, value in enumerate(values.tolist()):
                by_demo = enumerate(value, 1) if is_list(value) else [(None, value)]
                rows += [(field.name, layer, demo, number) for demo, number in by_demo]
        frame = pd.DataFrame(rows, columns=["metric", "layer", "demonstration", "value"])
        return frame.astype({"demonstration": "Int64"})

    def __repr__(self) -> str:
        size, rank = ((getattr(self, f"{what}_K"), getattr(self, f"{what}_V")) for what in ("norm", "effective_rank"))
        return (
            f"DeltaSummary({len(self.norm_K)} layers, ‖ΔW_K‖={size[0].norm():.3g}, ‖ΔW_V‖={size[1].norm():.3g}, "
            f"effective ranks {rank[0].nanmean():.1f} and {rank[1].nanmean():.1f})"
        )


@checked
def summarise(delta: WeightDelta) -> DeltaSummary:
    """Return norm and effective rank of ΔW_K and ΔW_V at every layer and, from a delta's factors, each demonstration's
    share.

    A delta with factors is summarised as their sum. A delta itself is the difference of rounded weights, and its
    rounding is spread over all directions.
    """
    factors, weights, shares = delta.factors, [delta.W_K.double(), delta.W_V.double()], [None, None]
    if factors is not None:
        errors = [e.double() for e in (factors.e_K, factors.e_V)]
        weights = [dual.outer_sum(factors.x.double(), e) for e in errors]
        shares = [_shares(e, factors, W) for e, W in zip(errors, weights, strict=True)]
    spectra = [linalg.svdvals(W) for W in weights]
    return DeltaSummary(*(vector_norm(S, dim=-1) for S in spectra), *(dual.effective_rank(S) for S in spectra), *shares)


def _shares(
    errors: Float[Tensor, "layer train_token d_kv"], factors: Factors, W: Float[Tensor, "layer d_kv d_model"]
) -> Float[Tensor, "layer demo"]:
    """Return ⟨Σ_{i∈demo} e_i ⊗ x_i, ΔW⟩ / ‖ΔW‖² as Σ_{i∈demo} e_iᵀ ΔW x_i, without a matrix for each demonstration."""
    along = (errors * (factors.x.double() @ W.mT)).sum(-1)
    n_steps = int(factors.steps.max()) + 1
    by_step = along.new_zeros(len(along), n_steps).index_add_(1, factors.steps, along)
    return by_step / (W * W).sum((-2, -1)).unsqueeze(-1)


def _check_match(model: Model, zero_shot: Capture, in_context: Capture, delta: WeightDelta, rank: int) -> None:
    """Raise a ValueError unless captures, delta and options fit together."""
    check_paired(model, zero_shot=zero_shot, in_context=in_context)
    check_start_weights(delta, in_context)
    if delta.W_Q is not None:
        raise ValueError(
            "expected a delta of keys and values, got one of all attention: equation 13 has no change of queries. "
            "Finetune with trained='key-value'"
        )
    check_demonstrations(in_context)
    check_training_sequences(delta, in_context, "finetune on in_context's prompts")
    check_fields(("q_scored", "keys_values"), in_context=in_context)
    check_fields(("attn_out",), zero_shot=zero_shot)
    if not 1 <= rank <= model.d_head:
        raise ValueError(f"expected a rank from 1 to d_head = {model.d_head}, got {rank}: pass rank= in this range")
    if is_half(model.dtype):
        raise ValueError(
            f"expected a model that computes in float32 or float64, got {model.dtype}: ΔW_FT is a small difference of "
            "two runs, and half precision rounds it away. Load the model with arithmetic=torch.float32, which keeps "
            "its weights in half precision, or with dtype=torch.float32"
        )
