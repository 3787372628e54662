"""`Capture` → the terms of in-context attention, by layer and head.

1. **The exact split**, inside one in-context pass: z = z_0 + ΔICL. z_0 is softmax attention over everything but the
   demonstrations (start token, query, and a sink where the model has one), and ΔICL = w (z_demo − z_0) is what the
   demonstrations add, w being their share of the softmax.
2. **The realised update**, between two runs: h_ICL − h_ZSL = direct + inherited. Direct is ΔICL through W_O. Inherited
   is the difference between z_0 and zero-shot attention, through W_O: lower layers, or other positions, already changed
   it.
3. **The linear relaxation** of the paper (equations 11–12), compared with the split: ΔW_ICL q for ΔICL, and
   (W_ZSL + ΔW_ICL) q for z, without softmax and without 1/√d.

A model with momentum attention adds Σ_{i<t} η^{t−i} v_i to every head. That sum splits by the source of the values: the
start token's and the query's belong to z_0, the demonstrations' to the direct update.

Every decomposition has its residuals, and is refused where one is more than rounding.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import Count, checked
from icl_dual.attention_split import Positions, Relaxation, field_of, full_prompt_z, split_layers
from icl_dual.captures.capture import DECOMPOSE_FIELDS, BatchedCapture, Capture, Field
from icl_dual.captures.pairing import check_fields, check_paired
from icl_dual.captures.shared_prefix import TOLERANCE, FullPromptPass
from icl_dual.field_docs import document_fields
from icl_dual.html_tables import lines_table
from icl_dual.models import Model, UnsupportedModelError
from icl_dual.models.journal import exclusive
from icl_dual.momentum import decay_matrix
from icl_dual.progress import progress_bar
from icl_dual.prompts import SEPARATOR, START, Prompts, check_lengths, check_prompts
from icl_dual.results import ROUNDING, check_axes, check_values, compare_by_value, tensor_line
from icl_dual.statistics.frames import summary_frame
from icl_dual.storage import NOT_SAVED, Saved
from icl_dual.torch_utils import checked_index, to_list, vector_norm

GROUPS = ("sink", "start", "query", "separators")
"""The groups of keys besides the demonstrations, each of which is a group of its own."""

Term = Literal[
    "from_start",
    "from_query",
    "delta_icl",
    "from_demonstrations",
    "z_0",
    "z",
    "z_zsl",
    "direct",
    "inherited",
    "realised",
]
"""The terms of `Decomposition` that `decompose_prompts` keeps where they are requested."""

LAYER_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest relative residual that is rounding within a layer. Rotary models take their softmax in float32 also at
float64. Between two whole runs, the rounding of all layers adds up: `icl_dual.captures.shared_prefix.TOLERANCE`."""

_OLD_NAMES = {
    "start": "from_start",
    "query": "from_query",
    "residuals/plain": "residuals/full_prompt",
    "momentum/own": "momentum/start_and_query",
}
"""The names of tensors that version 0.1 saved under other names."""


@document_fields
@compare_by_value
class MomentumTerms(NamedTuple):
    """What momentum adds to the heads' outputs, Σ_{i<t} η^{t−i} v_i, by the source of the values v_i."""

    start_and_query: Float[Tensor, "query layer head d_head"]
    """The sum over the start token and the query's tokens before its recorded position; the zero-shot run has it,
    too."""
    demonstrations: Float[Tensor, "query layer head d_head"]
    """The sum over the demonstrations and their separators."""
    eta: Float[Tensor, "layer head"]
    """η; 0 at heads without momentum."""

    def __repr__(self) -> str:
        low, high = self.eta.aminmax()
        shape = list(self.start_and_query.shape)
        return f"MomentumTerms(start_and_query{shape} and demonstrations, η={low:.3g} to {high:.3g})"


@document_fields
@compare_by_value
class Residuals(NamedTuple):
    """Relative differences that rounding leaves in each check, by layer: the largest over queries."""

    split: Float[Tensor, " layer"]
    """z_0 + ΔICL (and momentum) against the captured heads' outputs, and through W_O plus b_O against the captured
    attention output."""
    full_prompt: Float[Tensor, " layer"]
    """The same split of a plain forward pass over the first query's full prompt, against the model's own output."""
    run: Float[Tensor, " layer"]
    """The captured run against that plain forward pass: rounding of all layers up to this one, in two orders of
    summation."""
    realised: Float[Tensor, " layer"]
    """Direct + inherited against h_ICL − h_ZSL, relative to h_ICL."""

    def __repr__(self) -> str:
        largest = ", ".join(f"{name}={by_layer.max():.1e}" for name, by_layer in self._asdict().items())
        return f"Residuals({largest}: the largest of {len(self.split)} layers)"


@document_fields
@compare_by_value
class AttentionInputs(NamedTuple):
    """What the softmax of the in-context pass was computed from: the capture's own tensors, not copies."""

    q_scored: Float[Tensor, "query layer head d_head"]
    """Queries as scored, at the recorded position."""
    query_keys: Float[Tensor, "query layer query_pos kv_head d_head"]
    """Keys as scored of the start token and then each query's own tokens."""
    demo_keys: Float[Tensor, "layer demo_pos kv_head d_head"]
    """Keys as scored of the demonstrations and their separators."""
    demo_values: Float[Tensor, "layer demo_pos kv_head d_head"]
    """Values of the demonstrations and their separators."""
    rules: tuple[dual.AttentionRule, ...]
    """How each layer turns scores into attention weights."""

    def __repr__(self) -> str:
        return f"AttentionInputs(q_scored{list(self.q_scored.shape)}, demo_keys{list(self.demo_keys.shape)}, …)"


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class Decomposition(Saved):
    """In-context attention at each query's recorded position, split exactly into its terms at every layer and head.

        z = z_0 + ΔICL,    ΔICL = w (z_demo − z_0),    z_0 = from_start + from_query

    z_0 is softmax attention over everything but the demonstrations, z_demo over the demonstrations alone, and w
    (`demonstration_mass`) the demonstrations' share of the softmax. Terms by head are before W_O; `through_W_O` takes
    any of them into the residual stream. The attention output is Σ_heads z W_O + b_O.

    With momentum, z_0 also has `momentum.start_and_query`, and `from_demonstrations` is ΔICL plus
    `momentum.demonstrations`, so that z = z_0 + from_demonstrations.

    Keys are grouped by source (`groups`): sink, start, query, separators, and each demonstration. `masses()`,
    `shares()` and `by_token(query, layer, head)` are labelled tables; `mass_by_demonstration` and
    `share_by_demonstration` are tensors in which index 0 is the first demonstration.
    """

    model: str
    """The model's name."""
    prompts: Prompts
    """The in-context prompts: the queries and the demonstrations before them."""
    from_start: Float[Tensor, "query layer head d_head"]
    """The start token's term of z_0."""
    from_query: Float[Tensor, "query layer head d_head"]
    """The query's own tokens' term of z_0."""
    delta_icl: Float[Tensor, "query layer head d_head"]
    """ΔICL = w (z_demo − z_0), what the demonstrations add to softmax attention."""
    z_zsl: Float[Tensor, "query layer head d_head"]
    """The heads' outputs in the zero-shot run."""
    mass: Float[Tensor, "query layer head group"]
    """Share of the softmax that each group of keys takes, from 0 to 1; sums to 1 over groups. `groups` names them."""
    icl_share: Float[Tensor, "query layer group"]
    """Each group's share of the direct update along that update's direction, including momentum. Sums to 1 over groups,
    may be negative, and is NaN where there is no update; sink, start token and query have 0. `groups` names them."""
    relaxation: Relaxation
    """The paper's linear relaxation, compared with this split."""
    W_O: Float[Tensor, "layer head d_head d_model"]
    """The output projections."""
    b_O: Float[Tensor, "layer d_model"] | None
    """The output projections' biases; `None` for a model without."""
    b_V: Float[Tensor, "layer kv_head d_head"] | None
    """The value projections' biases; `None` for a model without."""
    residuals: Residuals
    """How far the terms are from adding up, relative to what they add up to."""
    momentum: MomentumTerms | None = None
    """What momentum adds; `None` for a model without."""
    attention_inputs: AttentionInputs | None = field(default=None, compare=False, metadata=NOT_SAVED)
    """What `by_token` computes from: in_context's own tensors, kept in memory with the decomposition. Not saved: `None`
    after loading."""

    def __post_init__(self) -> None:
        check_lengths(self.prompts)
        query, group = ("prompts.queries", len(self.prompts.queries)), ("groups", len(self.groups))
        check_axes(self, query=query, group=group)
        check_values(self, "from_start", "from_query", "delta_icl", "z_zsl", "W_O", "b_O", "b_V")
        check_values(self, "icl_share", nan=True)
        check_values(self, "mass", low=0, high=1 + ROUNDING)
        check_values(self, "residuals", low=0)
        for name in ("update_cosine", "output_cosine", "rank_agreement"):
            check_values(self, f"relaxation/{name}", low=-1 - ROUNDING, high=1 + ROUNDING, nan=True)
        for name in ("update_error", "output_error"):
            check_values(self, f"relaxation/{name}", low=0, nan=True, infinite=True)
        check_values(self, "momentum")
        check_values(self, "momentum/eta", low=0, high=1)
        if ((self.mass.sum(-1) - 1).abs() > ROUNDING).any():
            raise ValueError("expected mass that sums to 1 over groups, got another sum: compute it again")

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the names of the groups of keys: `GROUPS`, then each demonstration by its number from 1."""
        return _groups(self.prompts)

    @property
    def demonstration_mass(self) -> Float[Tensor, "query layer head"]:
        """Return w, the share of the softmax that demonstrations and their separators take together."""
        return self.mass[..., GROUPS.index("separators") :].sum(-1)

    @property
    def mass_by_demonstration(self) -> Float[Tensor, "query layer head demo"]:
        """Return each demonstration's share of the softmax, without separators; index 0 is the first demonstration."""
        return self.mass[..., len(GROUPS) :]

    @property
    def share_by_demonstration(self) -> Float[Tensor, "query layer demo"]:
        """Return each demonstration's share of the direct update, without separators; index 0 is the first one."""
        return self.icl_share[..., len(GROUPS) :]

    def masses(self) -> pd.DataFrame:
        """Return `mass` as a table: a row for each query, layer and head, a column for each group."""
        return _by_group(self.mass, ("query", "layer", "head"), self.groups)

    def shares(self) -> pd.DataFrame:
        """Return `icl_share` as a table: a row for each query and layer, a column for each group."""
        return _by_group(self.icl_share, ("query", "layer"), self.groups)

    @checked
    def by_token(self, query: int, layer: int, head: int) -> pd.DataFrame:
        """Return a head's attention to every token of one query's prompt, and each token's share of the direct update.

        Over the tokens of a group, `weight` sums to the group's `mass` at this head. With the mass of the sink, all
        weights sum to 1. Over the tokens of a group and all heads, `icl_share` sums to the group's `icl_share`.

        Args:
            query: the query's index; like the others, negative from the end.
            layer: the layer's index.
            head: the query head's index.

        Returns:
            A row for each token in the order of the prompt, with the columns position, token (its id), group (as in
            `groups`), weight (softmax attention weight) and icl_share.

        Raises:
            IndexError: an index is out of range.
            ValueError: the decomposition was loaded from a folder, which has no keys.
        """
        query = checked_index("query", query, self.mass.shape[0])
        layer = checked_index("layer", layer, self.mass.shape[1])
        head = checked_index("head", head, self.mass.shape[2])
        suffix, segments = self.prompts.suffixes[query], to_list(self.prompts.segments)
        names = {START: "start", SEPARATOR: "separators"}
        names |= {n: f"demonstration {n + 1}" for n in range(len(self.prompts.demonstrations))}
        tokens = (*self.prompts.prefix, *suffix)
        weights = self._token_weights(query, layer, head)
        return pd.DataFrame(
            {
                "position": range(len(tokens)),
                "token": tokens,
                "group": [*(names[segment] for segment in segments), *["query"] * len(suffix)],
                "weight": weights.cpu().numpy(),
                "icl_share": self._token_shares(query, layer, head, weights).cpu().numpy(),
            }
        )

    def _token_weights(self, query: int, layer: int, head: int) -> Float[Tensor, " pos"]:
        """Return a head's softmax weight of every token of a query's prompt."""
        inputs, kv_head, n_start = self._inputs(), self._kv_head(head), len(self.prompts.start)
        rule, n_suffix = inputs.rules[layer], len(self.prompts.suffixes[query])
        query_keys = inputs.query_keys[query, layer, : n_start + n_suffix, kv_head]
        keys = torch.cat((query_keys[:n_start], inputs.demo_keys[layer, :, kv_head], query_keys[n_start:])).double()
        q = inputs.q_scored[query, layer, head].double()
        positions = torch.arange(len(keys))
        bias = rule.bias(positions[None, -1:], positions[None])[0, :, 0]
        scores = dual.shared_scores(q[None, None], keys[:, None], rule.scale, rule.softcap)[0, 0]
        scores = scores + bias[head if len(bias) > 1 else 0].to(scores.device)
        lse = scores.logsumexp(-1)
        if rule.sink is not None:
            lse = torch.logaddexp(lse, rule.sink[head].to(lse))
        return (scores - lse).exp()

    def _token_shares(self, query: int, layer: int, head: int, weights: Float[Tensor, " pos"]) -> Float[Tensor, " pos"]:
        """Return the share of every token of a query's prompt, through one head, in the layer's direct update."""
        n_start, n_prefix = len(self.prompts.start), len(self.prompts.prefix)
        values = self._inputs().demo_values[layer, :, self._kv_head(head)].double()
        direct = torch.einsum("hd,hdm->m", self.from_demonstrations[query, layer], self.W_O[layer])
        along = self.W_O[layer, head] @ direct
        z_0 = (self.from_start + self.from_query)[query, layer, head]
        added = weights[n_start:n_prefix] * ((values - z_0) @ along)
        if self.momentum is not None:
            positions = torch.arange(len(weights), device=weights.device)
            decay = decay_matrix(self.momentum.eta[layer], positions[-1:], positions[n_start:n_prefix])[head, 0]
            added = added + decay * (values @ along)
        shares = torch.zeros_like(weights)
        shares[n_start:n_prefix] = added / (direct @ direct)
        return shares

    def _inputs(self) -> AttentionInputs:
        if self.attention_inputs is None:
            raise ValueError(
                "expected a decomposition with attention_inputs, got one that was loaded, which has no keys: call "
                "icl_dual.decompose on the captures again"
            )
        return self.attention_inputs

    def _kv_head(self, head: int) -> int:
        """Return the index of the key-value head that a query head reads."""
        n_kv_heads = self._inputs().demo_keys.shape[2]
        return head // (self.W_O.shape[1] // n_kv_heads)

    @property
    def z_0(self) -> Float[Tensor, "query layer head d_head"]:
        """Return attention over everything but the demonstrations, inside the in-context pass, with its momentum."""
        z_0 = self.from_start + self.from_query
        return z_0 if self.momentum is None else z_0 + self.momentum.start_and_query

    @property
    def from_demonstrations(self) -> Float[Tensor, "query layer head d_head"]:
        """Return all that the demonstrations add to the heads' outputs: ΔICL, and their momentum."""
        return self.delta_icl if self.momentum is None else self.delta_icl + self.momentum.demonstrations

    @property
    def z(self) -> Float[Tensor, "query layer head d_head"]:
        """Return the heads' outputs before W_O: z_0 + from_demonstrations."""
        return self.z_0 + self.from_demonstrations

    @property
    def value_bias(self) -> Float[Tensor, "query layer head d_head"]:
        """Return the part of z that comes from b_V. It is inside the groups: a group with mass w has w b_V.

        Every value has b_V in it, so momentum at position t has Σ_{i<t} η^{t−i} b_V = η (1 − η^t) / (1 − η) b_V.
        """
        if self.b_V is None:
            return torch.zeros_like(self.delta_icl)
        by_head = self.b_V.repeat_interleave(self.W_O.shape[1] // self.b_V.shape[1], dim=1)
        times = 1 - self.mass[..., GROUPS.index("sink")]
        if self.momentum is not None:
            eta = self.momentum.eta
            t = Positions.of(self.prompts).recorded[:, None, None].to(eta.device)
            times = times + eta * (1 - eta**t) / (1 - eta)
        return times.unsqueeze(-1) * by_head

    @checked
    def through_W_O(  # noqa: N802 - the field's name
        self, term: Float[Tensor, "query layer head d_head"]
    ) -> Float[Tensor, "query layer head d_model"]:
        """Return a term by head in the residual stream, without b_O, which belongs to no head."""
        return torch.einsum("qlhd,lhdm->qlhm", term, self.W_O)

    @property
    def direct(self) -> Float[Tensor, "query layer d_model"]:
        """Return the direct update: what the demonstrations add through this layer's attention, after W_O."""
        return _sum_through_W_O(self.from_demonstrations, self.W_O)

    @property
    def inherited(self) -> Float[Tensor, "query layer d_model"]:
        """Return the inherited update, (z_0 − z_ZSL) W_O: the layer's input, or the query's position, had changed."""
        return _sum_through_W_O(self.z_0 - self.z_zsl, self.W_O)

    @property
    def realised(self) -> Float[Tensor, "query layer d_model"]:
        """Return the realised update between the two runs, h_ICL − h_ZSL = direct + inherited."""
        return self.direct + self.inherited

    @property
    def direct_share(self) -> Float[Tensor, "query layer"]:
        """Return ⟨direct, realised⟩ / ‖realised‖²; NaN where the realised update is rounding."""
        return self._share_of_realised(self.direct)

    @property
    def inherited_share(self) -> Float[Tensor, "query layer"]:
        """Return ⟨inherited, realised⟩ / ‖realised‖², which is 1 − direct_share."""
        return self._share_of_realised(self.inherited)

    def _share_of_realised(self, update: Float[Tensor, "query layer d_model"]) -> Float[Tensor, "query layer"]:
        realised = self.realised
        attn_out = _sum_through_W_O(self.z, self.W_O, self.b_O)
        realised_norm, attn_norm = vector_norm(realised, dim=-1), vector_norm(attn_out, dim=-1)
        return _share((update * realised).sum(-1), realised_norm, attn_norm, self.residuals.realised)

    @property
    def momentum_norm(self) -> Float[Tensor, "query layer head"]:
        """Return ‖momentum‖ / ‖z‖, the size of what momentum adds relative to the head's output; 0 without momentum."""
        if self.momentum is None:
            return torch.zeros_like(self.demonstration_mass)
        momentum = self.momentum.start_and_query + self.momentum.demonstrations
        return vector_norm(momentum, dim=-1) / vector_norm(self.z, dim=-1)

    @property
    def residual(self) -> float:
        """Return the largest residual within a layer: of all checks but `residuals.run`, which is of whole runs."""
        return _largest_residual(self.residuals)

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: metric, layer, head (empty for a whole layer's), mean and deviation over queries, n.

        With momentum, `momentum_norm` is among the metrics.
        """
        return _summary_frame(self, None if self.momentum is None else self.momentum_norm)

    @classmethod
    def _upgraded(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {_OLD_NAMES.get(name, name): tensor for name, tensor in tensors.items()}, metadata

    def _repr_html_(self) -> str:
        lines = [
            tensor_line("demonstration mass", ("query", "layer", "head"), self.demonstration_mass),
            tensor_line("‖ΔICL‖", ("query", "layer", "head", "d_head"), self.delta_icl),
            tensor_line("‖direct‖", ("query", "layer", "d_model"), self.direct),
            tensor_line("‖inherited‖", ("query", "layer", "d_model"), self.inherited),
            tensor_line("direct share", ("query", "layer"), self.direct_share),
            tensor_line("cos(ΔW_ICL q, ΔICL)", ("query", "layer", "head"), self.relaxation.update_cosine),
            tensor_line("residual of the split", ("layer",), self.residuals.split),
        ]
        return lines_table(repr(self), lines)

    def __repr__(self) -> str:
        n_queries, n_layers, n_heads = self.mass.shape[:3]
        momentum = "" if self.momentum is None else f"momentum norm={self.momentum_norm.nanmean():.3f}, "
        return (
            f"Decomposition({self.model!r}, {n_queries} queries after {len(self.prompts.demonstrations)} "
            f"demonstrations, {n_layers} layers of {n_heads} heads, demonstration mass="
            f"{self.demonstration_mass.mean():.3f}, direct share={self.direct_share.nanmean():.3f}, {momentum}"
            f"residual={self.residual:.1e})"
        )


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class DecompositionSummary(Saved):
    """The numbers of a `Decomposition` by query, layer and head, and of its terms those that were requested.

    Made by `decompose_prompts`, in memory that grows with the number of queries by these fields alone. The fields have
    the values that those of the same name have in the decomposition of all queries at once.
    """

    model: str
    """The model's name."""
    prompts: Prompts
    """The in-context prompts: the queries and the demonstrations before them."""
    mass: Float[Tensor, "query layer head group"]
    """Share of the softmax that each group of keys takes, from 0 to 1; sums to 1 over groups. `groups` names them."""
    icl_share: Float[Tensor, "query layer group"]
    """Each group's share of the direct update along that update's direction, as in `Decomposition.icl_share`."""
    relaxation: Relaxation
    """The paper's linear relaxation, compared with the split."""
    direct_share: Float[Tensor, "query layer"]
    """⟨direct, realised⟩ / ‖realised‖²; NaN where the realised update is rounding."""
    inherited_share: Float[Tensor, "query layer"]
    """⟨inherited, realised⟩ / ‖realised‖², which is 1 − direct_share."""
    delta_icl_norm: Float[Tensor, "query layer head"]
    """‖ΔICL‖, before W_O."""
    z_0_norm: Float[Tensor, "query layer head"]
    """‖z_0‖, before W_O."""
    z_norm: Float[Tensor, "query layer head"]
    """Norm of the heads' outputs before W_O."""
    direct_norm: Float[Tensor, "query layer"]
    """Norm of the direct update, after W_O."""
    inherited_norm: Float[Tensor, "query layer"]
    """Norm of the inherited update, after W_O."""
    realised_norm: Float[Tensor, "query layer"]
    """Norm of the realised update, h_ICL − h_ZSL."""
    residuals: Residuals
    """How far the terms of all queries are from adding up, relative to what they add up to."""
    momentum_norm: Float[Tensor, "query layer head"] | None = None
    """‖momentum‖ / ‖z‖; `None` for a model without momentum."""
    from_start: Float[Tensor, "query layer head d_head"] | None = None
    """The start token's term of z_0; like the fields below, `None` where it was not requested."""
    from_query: Float[Tensor, "query layer head d_head"] | None = None
    """The query's own tokens' term of z_0."""
    delta_icl: Float[Tensor, "query layer head d_head"] | None = None
    """ΔICL = w (z_demo − z_0), what the demonstrations add to softmax attention."""
    from_demonstrations: Float[Tensor, "query layer head d_head"] | None = None
    """ΔICL, and the demonstrations' momentum."""
    z_0: Float[Tensor, "query layer head d_head"] | None = None
    """Attention over everything but the demonstrations, with its momentum."""
    z: Float[Tensor, "query layer head d_head"] | None = None
    """The heads' outputs in the in-context run."""
    z_zsl: Float[Tensor, "query layer head d_head"] | None = None
    """The heads' outputs in the zero-shot run."""
    direct: Float[Tensor, "query layer d_model"] | None = None
    """The direct update: what the demonstrations add through the layer's attention, after W_O."""
    inherited: Float[Tensor, "query layer d_model"] | None = None
    """The inherited update, (z_0 − z_ZSL) W_O."""
    realised: Float[Tensor, "query layer d_model"] | None = None
    """The realised update between the two runs, direct + inherited."""

    def __post_init__(self) -> None:
        check_lengths(self.prompts)
        check_axes(self, query=("prompts.queries", len(self.prompts.queries)), group=("groups", len(self.groups)))
        check_values(self, "mass", low=0, high=1 + ROUNDING)
        check_values(self, "icl_share", "direct_share", "inherited_share", nan=True)
        check_values(self, *(name for name in _NORMS), "residuals", low=0)
        check_values(self, "momentum_norm", low=0, nan=True)
        check_values(self, *get_args(Term))
        for name in ("update_cosine", "output_cosine", "rank_agreement"):
            check_values(self, f"relaxation/{name}", low=-1 - ROUNDING, high=1 + ROUNDING, nan=True)
        for name in ("update_error", "output_error"):
            check_values(self, f"relaxation/{name}", low=0, nan=True, infinite=True)
        if ((self.mass.sum(-1) - 1).abs() > ROUNDING).any():
            raise ValueError("expected mass that sums to 1 over groups, got another sum: compute it again")

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the names of the groups of keys, those of `Decomposition.groups`."""
        return _groups(self.prompts)

    @property
    def demonstration_mass(self) -> Float[Tensor, "query layer head"]:
        """Return w, the share of the softmax that demonstrations and their separators take together."""
        return self.mass[..., GROUPS.index("separators") :].sum(-1)

    @property
    def residual(self) -> float:
        """Return the largest residual within a layer: of all checks but `residuals.run`, which is of whole runs."""
        return _largest_residual(self.residuals)

    def masses(self) -> pd.DataFrame:
        """Return `mass` as a table: a row for each query, layer and head, a column for each group."""
        return _by_group(self.mass, ("query", "layer", "head"), self.groups)

    def shares(self) -> pd.DataFrame:
        """Return `icl_share` as a table: a row for each query and layer, a column for each group."""
        return _by_group(self.icl_share, ("query", "layer"), self.groups)

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: metric, layer, head (empty for a whole layer's), mean and deviation over queries, n.

        It is that of the decomposition of all queries at once.
        """
        return _summary_frame(self, self.momentum_norm)

    def _repr_html_(self) -> str:
        lines = [
            tensor_line("demonstration mass", ("query", "layer", "head"), self.demonstration_mass),
            tensor_line("‖ΔICL‖", ("query", "layer", "head"), self.delta_icl_norm),
            tensor_line("‖direct‖", ("query", "layer"), self.direct_norm),
            tensor_line("‖inherited‖", ("query", "layer"), self.inherited_norm),
            tensor_line("direct share", ("query", "layer"), self.direct_share),
            tensor_line("cos(ΔW_ICL q, ΔICL)", ("query", "layer", "head"), self.relaxation.update_cosine),
            tensor_line("residual of the split", ("layer",), self.residuals.split),
        ]
        return lines_table(repr(self), lines)

    def __repr__(self) -> str:
        n_queries, n_layers, n_heads = self.mass.shape[:3]
        kept = [name for name in get_args(Term) if getattr(self, name) is not None]
        return (
            f"DecompositionSummary({self.model!r}, {n_queries} queries after {len(self.prompts.demonstrations)} "
            f"demonstrations, {n_layers} layers of {n_heads} heads, demonstration mass="
            f"{self.demonstration_mass.mean():.3f}, direct share={self.direct_share.nanmean():.3f}, "
            + (f"terms: {', '.join(kept)}, " if kept else "")
            + f"residual={self.residual:.1e})"
        )


_NORMS = ("delta_icl_norm", "z_0_norm", "z_norm", "direct_norm", "inherited_norm", "realised_norm")


@checked
def decompose(model: Model, *, zero_shot: Capture, in_context: Capture) -> Decomposition:
    """Split in-context attention into its terms at every layer and head, and check that they add up.

    Args:
        model: the model that was captured, with the weights it had; it does not run.
        zero_shot: a capture of the queries without demonstrations, with `fields=icl_dual.DECOMPOSE_FIELDS`, or with
            `attn_out` and `z` alone.
        in_context: a capture of the same queries after their demonstrations, with `fields=icl_dual.DECOMPOSE_FIELDS`.

    Returns:
        The terms z = z_0 + ΔICL with ΔICL = w (z_demo − z_0), in float64, where the captures are.

    Raises:
        ValueError: the captures are of different models, weights, prompts or positions, or lack a field.
        UnsupportedModelError: the terms do not add up to the model's own attention output; the message has the layer.
    """
    check_paired(model, zero_shot=zero_shot, in_context=in_context)
    check_fields(DECOMPOSE_FIELDS, in_context=in_context)
    check_fields(("attn_out", "z"), zero_shot=zero_shot)
    device = field_of(in_context, "z").device
    zero_shot, projections = zero_shot.to(device), _projections(model, device)
    of_first = _full_prompt_residuals(model, in_context, in_context.full_prompt, *projections)
    return _decompose(model, zero_shot, in_context, of_first, *projections)


@checked
@exclusive
@torch.inference_mode(False)  # tensors made inside of it could not be changed or differentiated later
def decompose_prompts(
    model: Model, prompts: Prompts, *, keep: Collection[Term] = (), batch_size: Count = 64, progress: bool = True
) -> DecompositionSummary:
    """Capture and decompose queries batch by batch, and keep summaries by query, layer and head.

    Each batch runs in context and zero-shot and is split, checked and summarised before the next one runs. Memory grows
    with the number of queries by the result alone. `decompose` splits captures of all queries, and keeps every term.

    Args:
        model: the model to run; it comes back as it was.
        prompts: the queries with their demonstrations.
        keep: the terms to keep besides the summaries, such as `("delta_icl",)`.
        batch_size: the largest number of queries to run at once; the working memory grows with it.
        progress: show a progress bar.

    Returns:
        The summaries and the terms that were requested, in float64 on the model's device, in the order of the queries.

    Raises:
        ValueError: a term is unknown, or the batch size is below 1.
        UnsupportedModelError: the terms do not add up to the model's own attention output; the message has the layer.
        PromptError: the prompts are incomplete, or the model cannot read them.
        MemoryError: a single query, or the first one's full prompt, does not fit in memory.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> model = tiny_model()
        >>> prompts = icl_dual.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(5))
        >>> summary = icl_dual.decompose_prompts(model, prompts, keep=("delta_icl",), progress=False)
        >>> summary.direct_share.shape, summary.delta_icl.shape, summary.z_0
        (torch.Size([5, 2]), torch.Size([5, 2, 4, 8]), None)
    """
    check_prompts(model, prompts)
    n_queries, by_query = len(prompts.queries), dict[str, Tensor]()
    with torch.no_grad(), progress_bar(total=n_queries, desc="decomposition", show=progress, unit="query") as bar:
        fields: tuple[Field, ...] = ("attn_out", "z", "q_scored", "keys_values")
        in_context = BatchedCapture(model, prompts, fields, batch_size, full_prompt=True)
        zero_shot = BatchedCapture(model, prompts.zero_shot(), ("attn_out", "z"), batch_size)
        projections, of_first, residuals = _projections(model, model.device), None, None
        # The first query first: its full prompt is what the run is checked against.
        for batch in sorted(in_context.batches, key=lambda batch: 0 not in batch):
            captures = zero_shot.run(batch), in_context.run(batch)
            if of_first is None:
                of_first = _full_prompt_residuals(model, in_context.run([0]), in_context.full_prompt, *projections)
            split = _decompose(model, *captures, of_first, *projections)
            residuals = split.residuals if residuals is None else _larger(residuals, split.residuals)
            for name, values in _summarise(split, keep).items():
                if name not in by_query:
                    by_query[name] = values.new_empty(n_queries, *values.shape[1:])
                by_query[name][batch] = values
            del captures, split  # before the next batch runs, which needs as much memory
            bar.update(len(batch))
    assert residuals is not None
    attn_norm = by_query.pop("attn_norm")
    for name in ("direct", "inherited"):
        inner = by_query.pop(f"{name}_inner")
        by_query[f"{name}_share"] = _share(inner, by_query["realised_norm"], attn_norm, residuals.realised)
    relaxation = Relaxation(*(by_query.pop(name) for name in Relaxation._fields))
    return DecompositionSummary(model.name, prompts, relaxation=relaxation, residuals=residuals, **by_query)


def _summarise(split: Decomposition, keep: Collection[Term]) -> dict[str, Tensor]:
    """Return the summaries of a batch, what the shares are computed from, and the terms to keep, by name."""
    direct, inherited, z_0, z = split.direct, split.inherited, split.z_0, split.z
    realised = direct + inherited
    kept = {"direct": direct, "inherited": inherited, "realised": realised, "z_0": z_0, "z": z}
    return {
        "mass": split.mass,
        "icl_share": split.icl_share,
        **split.relaxation._asdict(),
        "delta_icl_norm": vector_norm(split.delta_icl, dim=-1),
        "z_0_norm": vector_norm(z_0, dim=-1),
        "z_norm": vector_norm(z, dim=-1),
        "direct_norm": vector_norm(direct, dim=-1),
        "inherited_norm": vector_norm(inherited, dim=-1),
        "realised_norm": vector_norm(realised, dim=-1),
        "direct_inner": (direct * realised).sum(-1),
        "inherited_inner": (inherited * realised).sum(-1),
        "attn_norm": vector_norm(_sum_through_W_O(z, split.W_O, split.b_O), dim=-1),
        **({} if split.momentum is None else {"momentum_norm": split.momentum_norm}),
        **{name: kept[name] if name in kept else getattr(split, name) for name in keep},
    }


def _larger(a: Residuals, b: Residuals) -> Residuals:
    return Residuals(*map(torch.maximum, a, b))


def _largest_residual(residuals: Residuals) -> float:
    within_layers = residuals._replace(run=residuals.split)
    return max(by_layer.max().item() for by_layer in within_layers)


def _groups(prompts: Prompts) -> tuple[str, ...]:
    return (*GROUPS, *(f"demonstration {n + 1}" for n in range(len(prompts.demonstrations))))


def _by_group(values: Float[Tensor, "*axes group"], axes: tuple[str, ...], groups: tuple[str, ...]) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([range(n) for n in values.shape[:-1]], names=axes)
    return pd.DataFrame(values.flatten(0, -2).cpu().numpy(), index, pd.Index(groups, name="group"))


def _summary_frame(
    result: Decomposition | DecompositionSummary, momentum_norm: Float[Tensor, "query layer head"] | None
) -> pd.DataFrame:
    """Return the tidy table of a decomposition or its summary."""
    masses = {f"{name}_mass": result.mass[..., index] for index, name in enumerate(GROUPS)}
    shares = {"direct_share": result.direct_share, "inherited_share": result.inherited_share}
    shares |= {} if momentum_norm is None else {"momentum_norm": momentum_norm}
    return summary_frame(
        {"demonstration_mass": result.demonstration_mass, **masses, **shares, **result.relaxation._asdict()}
    )


def _share(
    inner: Float[Tensor, "query layer"],
    realised_norm: Float[Tensor, "query layer"],
    attn_norm: Float[Tensor, "query layer"],
    residual: Float[Tensor, " layer"],
) -> Float[Tensor, "query layer"]:
    """Return ⟨update, realised⟩ / ‖realised‖²; NaN where the realised update is rounding of the attention output."""
    return torch.where(realised_norm > 4 * residual * attn_norm, inner / realised_norm**2, torch.nan)


def _projections(
    model: Model, device: torch.device
) -> tuple[Float[Tensor, "layer head d_head d_model"], Float[Tensor, "layer d_model"] | None]:
    """Return W_O and b_O in float64."""
    W_O, b_O = model.output_projections()
    return W_O.to(device, torch.float64), None if b_O is None else b_O.to(device, torch.float64)


def _decompose(
    model: Model,
    zero_shot: Capture,
    in_context: Capture,
    of_first: tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]],
    W_O: Float[Tensor, "layer head d_head d_model"],
    b_O: Float[Tensor, "layer d_model"] | None,
) -> Decomposition:
    """Split captures, and check the residuals; `of_first` has those of the first query's full prompt and of the run."""
    split, relaxation = split_layers(model, in_context, W_O)
    residuals = _residuals(zero_shot, in_context, split.z, of_first, W_O, b_O)
    _check_residuals(model, residuals)
    momentum = None
    if split.query_momentum is not None and split.demo_momentum is not None and model.momentum is not None:
        momentum = MomentumTerms(split.query_momentum, split.demo_momentum, model.momentum.to(W_O.device, copy=True))
    return Decomposition(
        model=model.name,
        prompts=in_context.prompts,
        from_start=split.start,
        from_query=split.query,
        delta_icl=split.delta_icl,
        z_zsl=field_of(zero_shot, "z").to(W_O),
        mass=split.mass,
        icl_share=split.icl_share,
        relaxation=relaxation,
        W_O=W_O,
        b_O=b_O,
        b_V=None if (b_V := model.value_biases()) is None else b_V.to(W_O),
        residuals=residuals,
        momentum=momentum,
        attention_inputs=_attention_inputs(model, in_context),
    )


def _attention_inputs(model: Model, in_context: Capture) -> AttentionInputs:
    keys_values = in_context.keys_values
    assert keys_values is not None
    return AttentionInputs(
        q_scored=field_of(in_context, "q_scored"),
        query_keys=keys_values.query_keys,
        demo_keys=keys_values.demo_keys,
        demo_values=keys_values.demo_values,
        rules=tuple(model.attention_rules),
    )


def _residuals(
    zero_shot: Capture,
    in_context: Capture,
    z: Float[Tensor, "query layer head d_head"],
    of_first: tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]],
    W_O: Float[Tensor, "layer head d_head d_model"],
    b_O: Float[Tensor, "layer d_model"] | None,
) -> Residuals:
    """Return how far the terms are from what they add up to."""
    z_zsl, h_zsl = field_of(zero_shot, "z").double(), field_of(zero_shot, "attn_out").double()
    h_icl, (full_prompt, run) = field_of(in_context, "attn_out").double(), of_first
    return Residuals(
        split=torch.maximum(
            _relative(_sum_through_W_O(z, W_O, b_O), h_icl),
            _relative(z.flatten(2), field_of(in_context, "z").flatten(2)),
        ),
        full_prompt=full_prompt,
        run=run,
        realised=_relative(h_zsl + _sum_through_W_O(z - z_zsl, W_O), h_icl),
    )


def _full_prompt_residuals(
    model: Model,
    in_context: Capture,
    full_prompt: FullPromptPass | None,
    W_O: Float[Tensor, "layer head d_head d_model"],
    b_O: Float[Tensor, "layer d_model"] | None,
) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    """Return how far the split of the first query's full prompt, and then the captured run, are from that pass."""
    assert full_prompt is not None
    h_icl, expected = field_of(in_context, "attn_out")[:1].double(), full_prompt.attn_out.double()[None]
    z = full_prompt_z(model, in_context.prompts, full_prompt, W_O)
    return _relative(_sum_through_W_O(z, W_O, b_O), expected), _relative(h_icl, expected)


def _check_residuals(model: Model, residuals: Residuals) -> None:
    """Raise an UnsupportedModelError where a residual is more than rounding."""
    causes = {
        "split": "the keys, values or queries captured are not those of the attention output captured with them",
        "full_prompt": "its attention does more than softmax over scaled scores and a linear W_O, or a hook changes it",
        "run": "the capture is not a plain forward pass over the first query's prompt",
        "realised": "the zero-shot capture's heads do not give its attention output",
    }
    for name, cause in causes.items():
        by_layer = getattr(residuals, name)
        tolerance = (TOLERANCE if name == "run" else LAYER_TOLERANCE)[model.dtype]
        above = (~(by_layer <= tolerance)).nonzero()
        if len(above):
            layer = int(above[0])
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: expected terms that add up to the attention "
                f"output ({name}) to {tolerance:.0e}, got a difference of {by_layer[layer]:.1e}: {cause}"
            )


def _sum_through_W_O(  # noqa: N802 - the field's name
    z: Float[Tensor, "query layer head d_head"],
    W_O: Float[Tensor, "layer head d_head d_model"],
    b_O: Float[Tensor, "layer d_model"] | None = None,
) -> Float[Tensor, "query layer d_model"]:
    """Return the heads' outputs through W_O, summed over heads, plus b_O where one is given."""
    out = (z.flatten(2).transpose(0, 1) @ W_O.flatten(1, 2)).transpose(0, 1)
    return out if b_O is None else out + b_O


def _relative(
    result: Float[Tensor, "query layer d_model"], expected: Float[Tensor, "query layer d_model"]
) -> Float[Tensor, " layer"]:
    """Return ‖result − expected‖ / ‖expected‖, the largest over queries."""
    return (vector_norm(result - expected, dim=-1) / vector_norm(expected, dim=-1)).amax(0)
