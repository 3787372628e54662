"""`Batch`: what a metric's function reads, each attribute computed once; and the random baselines' generators."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.field_docs import document_fields
from icl_dual.massive_activations import token_mask
from icl_dual.metrics.formulas import (
    NULL_DRAWS,
    ROUNDING,
    TOP_DEMONSTRATIONS,
    TOP_TOKENS,
    as_long,
    by_demonstration,
    changed,
    demonstration_weights,
    draw_directions,
    finetuning_attention,
    query_by_kv_head,
    random_map_updates,
    sim_aou,
    top_recall,
)
from icl_dual.recordings.recordings import Recordings


@document_fields
@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """What a metric's function reads: the recordings of some queries. Each attribute is computed once, when first read.

    `h_…` are attention outputs, `m_…` attention scores over the query's own tokens, both in float64. Queries differ in
    length: `m_…` are zero past a query's end, where `query_mask` is False. Attributes of the demonstrations
    (`token_weights_…`, `demo_weights_…`, `key_scores`) have the batch's first `n_first` queries only.
    `without_massive_tokens` is the same batch with scores of massive tokens zero as well.
    """

    gold: Int[Tensor, " query"]
    """The queries' label indices."""
    predictions: dict[str, Int[Tensor, " query"]]
    """By setting (ZSL, ICL, FT): each query's most probable label."""
    source: Recordings | None = None
    """The recordings of all queries; `None` for a metric of predictions alone."""
    queries: Int[Tensor, " query"] | None = None
    """The batch's queries, as indices into the recordings."""
    n_first: int = 0
    """How many of the batch's queries have their attention to the demonstrations compared."""
    seed: int = 0
    """The seed of the random baselines."""
    streams: dict[str, np.random.Generator] = field(default_factory=dict[str, np.random.Generator])
    """The random baselines' generators by name, shared by all batches of a comparison."""
    leave_out_massive: bool = False
    """Whether `m_…` are zero, and `query_mask` False, at tokens with massive activations."""

    @classmethod
    def of(
        cls,
        recordings: Recordings,
        queries: Int[Tensor, " query"],
        *,
        n_first: int,
        seed: int = 0,
        streams: dict[str, np.random.Generator] | None = None,
    ) -> "Batch":
        """Return the batch of some queries of the recordings.

        Args:
            recordings: the recordings of all queries.
            queries: the batch's queries, as indices into the recordings.
            n_first: how many of them, from the first, have their attention to the demonstrations compared.
            seed: the seed of the random baselines.
            streams: the random baselines' generators by name (`random_streams`), to share between batches; new ones
                from `seed` where not given.
        """
        return cls(
            gold=recordings.gold[queries],
            predictions={setting: labels[queries] for setting, labels in recordings.predictions.items()},
            source=recordings,
            queries=queries,
            n_first=n_first,
            seed=seed,
            streams=random_streams(seed) if streams is None else streams,
        )

    @property
    def recordings(self) -> Recordings:
        """Return the recordings of all queries.

        Raises:
            ValueError: the metric is one of predictions alone.
        """
        if self.source is None:
            raise ValueError(
                "expected a metric with from_predictions=True to read gold labels and predictions only, got one that "
                "reads recordings: register it with from_predictions=False"
            )
        return self.source

    def generator(self, name: str) -> np.random.Generator:
        """Return the generator of a random baseline of yours: it goes on from batch to batch, and is no other's."""
        return self.streams.setdefault(f"registered/{name}", np.random.default_rng([self.seed, *name.encode()]))

    @property
    def n_layers(self) -> int:
        """Return the number of layers."""
        return self.recordings.attn_out["ZSL"].shape[1]

    @property
    def n_heads(self) -> int:
        """Return the number of query heads."""
        return self.recordings.query_scores["ICL"].shape[2]

    @property
    def labels_zero_shot(self) -> Int[Tensor, " query"]:
        """Return the labels predicted zero-shot."""
        return self.predictions["ZSL"]

    @property
    def labels_in_context(self) -> Int[Tensor, " query"]:
        """Return the labels predicted in context."""
        return self.predictions["ICL"]

    @property
    def labels_finetuned(self) -> Int[Tensor, " query"]:
        """Return the labels predicted after finetuning."""
        return self.predictions["FT"]

    @cached_property
    def h_zero_shot(self) -> Float[Tensor, "query layer d_model"]:
        """Return the attention output h_ZSL."""
        return self.recordings.attn_out["ZSL"][self.queries].double()

    @cached_property
    def h_in_context(self) -> Float[Tensor, "query layer d_model"]:
        """Return the attention output h_ICL."""
        return self.recordings.attn_out["ICL"][self.queries].double()

    @cached_property
    def h_finetuned(self) -> Float[Tensor, "query layer d_model"]:
        """Return the attention output h_FT."""
        return self.recordings.attn_out["FT"][self.queries].double()

    @cached_property
    def m_zero_shot(self) -> Float[Tensor, "query layer head token"]:
        """Return the attention scores m_ZSL over the query's own tokens, zero past its end (`query_mask`)."""
        return self._query_scores("ZSL")

    @cached_property
    def m_in_context(self) -> Float[Tensor, "query layer head token"]:
        """Return the attention scores m_ICL over the query's own tokens, zero past its end (`query_mask`)."""
        return self._query_scores("ICL")

    @cached_property
    def m_finetuned(self) -> Float[Tensor, "query layer head token"]:
        """Return the attention scores m_FT over the query's own tokens, zero past its end (`query_mask`)."""
        return self._query_scores("FT")

    def _query_scores(self, setting: str) -> Float[Tensor, "query layer head token"]:
        scores = self.recordings.query_scores[setting][self.queries].double()
        return scores.where(self.query_mask[:, None, None], 0.0) if self.leave_out_massive else scores

    @cached_property
    def query_mask(self) -> Bool[Tensor, "query token"]:
        """Return True at the query's own tokens, False past its end, for the tokens of `m_…`.

        The zeros past its end do not change a cosine. They change a mean, a softmax or a correlation.
        """
        if self.leave_out_massive:
            return self.recordings.ordinary_tokens[self.queries]
        n_tokens = self.recordings.query_scores["ZSL"].shape[-1]
        return token_mask(self.recordings.query_lengths[self.queries], n_tokens)

    @cached_property
    def without_massive_tokens(self) -> "Batch":
        """Return the batch with massive tokens left out of `m_…` and `query_mask`, as tokens past a query's end are.

        A token is left out where it is massive at any layer in any of the three settings
        (`icl_dual.massive_activations`).

        Raises:
            RecordingError: the recordings have no `residual_norms`.
        """
        return replace(self, leave_out_massive=True)

    @cached_property
    def rounding(self) -> float:
        """Return the relative change of attention scores that rounding alone makes, in the recorded weights' type."""
        dtype = getattr(torch, self.recordings.metadata.get("dtype", "float32"))
        return max(ROUNDING, torch.finfo(dtype).eps)

    @cached_property
    def output_nulls(self) -> dict[str, Float[Tensor, "query layer"]]:
        """Return SimAOU and its unnormalised form of updates in random directions: means over `NULL_DRAWS`.

        By name: `update` for a random update of FT's size, `inflation` for random updates of both, `unnormalised`.
        """
        h_zsl, h_icl, h_ft = self.h_zero_shot, self.h_in_context, self.h_finetuned
        names = ("update", "inflation", "unnormalised")
        totals = {name: h_zsl.new_zeros(h_zsl.shape[:2]) for name in names}
        with ThreadPoolExecutor(2) as pool:  # numpy draws a stream on one thread
            streams = (self.streams[name] for name in ("h_ft", "h_icl"))
            directions = pool.map(partial(draw_directions, h_zsl.shape), streams)
        r_ft, r_icl = map(as_long, directions, (h_ft - h_zsl, h_icl - h_zsl))
        for of_ft, of_icl in zip(r_ft.unbind(1), r_icl.unbind(1), strict=True):
            random_ft = h_zsl + of_ft
            scores = (
                sim_aou(h_zsl, h_icl, random_ft),
                sim_aou(h_zsl, h_zsl + of_icl, random_ft),
                dual.cosine(h_icl - h_zsl, of_ft.double()),
            )
            for total, score in zip(totals.values(), scores, strict=True):
                total += score / NULL_DRAWS
        return totals

    @cached_property
    def random_m_update(self) -> Float[Tensor, "query layer head token"]:
        """Return a random change of each attention map, as large as finetuning's, over the query's own tokens."""
        change = changed(self.m_zero_shot, self.m_finetuned, self.rounding)
        stream = "m_ft without massive tokens" if self.leave_out_massive else "m_ft"
        return random_map_updates(self.m_zero_shot, change, seed=self.streams[stream])

    @cached_property
    def demo_tokens(self) -> Int[Tensor, " demo_token"]:
        """Return the context positions of the demonstrations' tokens, in the order in which they were trained on."""
        segments = self.recordings.segments
        positions = (segments >= 0).nonzero().squeeze(-1)
        return positions[segments[positions].argsort(stable=True)]

    @cached_property
    def demo_steps(self) -> Int[Tensor, " demo_token"]:
        """Return the training step of each of `demo_tokens`."""
        return self.recordings.segments[self.demo_tokens]

    @cached_property
    def trained_tokens(self) -> Int[Tensor, " demo_token"]:
        """Return the positions of the context's demonstrations among the training tokens, ordered as `demo_tokens`."""
        assert self.recordings.training_segments is not None
        return torch.isin(self.recordings.training_segments, self.demo_steps).nonzero().squeeze(-1)

    @cached_property
    def q_finetuned(self) -> Float[Tensor, "query layer d_q"]:
        """Return the first queries' attention queries after finetuning, heads side by side, scaled by 1/√d_head."""
        assert self.queries is not None
        return self.recordings.q[self.queries[: self.n_first]]

    @cached_property
    def token_weights_in_context(self) -> Float[Tensor, "query layer demo_token"]:
        """Return in-context attention to each token of the demonstrations: the softmax of scores summed over heads."""
        assert self.queries is not None
        m = self.recordings.context_scores["ICL"][self.queries[: self.n_first]][..., self.demo_tokens].double()
        return demonstration_weights(m) if len(self.demo_tokens) else m

    @cached_property
    def token_weights_finetuned(self) -> Float[Tensor, "query layer demo_token"]:
        """Return finetuning's attention to the same tokens, by its training queries (`finetuning_attention`)."""
        assert self.recordings.training_q is not None
        m = finetuning_attention(self.recordings.training_q[:, self.trained_tokens], self.q_finetuned)
        return demonstration_weights(m) if len(self.demo_tokens) else m

    @cached_property
    def key_scores(self) -> Float[Tensor, "query layer demo_token"]:
        """Return finetuning's attention scores of the same tokens by its training keys, summed over heads."""
        assert self.recordings.training_k is not None
        keys = self.recordings.training_k
        q = query_by_kv_head(self.q_finetuned, self.n_heads, keys.shape[-1])
        return finetuning_attention(keys[:, self.trained_tokens], q)

    @cached_property
    def demo_weights_in_context(self) -> Float[Tensor, "query layer demo"]:
        """Return in-context attention to each demonstration: `token_weights_in_context` summed within it."""
        return by_demonstration(self.token_weights_in_context, self.demo_steps)

    @cached_property
    def demo_weights_finetuned(self) -> Float[Tensor, "query layer demo"]:
        """Return finetuning's attention to each demonstration: `token_weights_finetuned` summed within it."""
        return by_demonstration(self.token_weights_finetuned, self.demo_steps)

    @cached_property
    def token_recall(self) -> Float[Tensor, "query layer"]:
        """Return the share of ICL's `TOP_TOKENS` most attended tokens that are among FT's."""
        return top_recall(self.token_weights_in_context, self.token_weights_finetuned, TOP_TOKENS)

    @cached_property
    def demo_recall(self) -> Float[Tensor, "query layer"]:
        """Return the share of ICL's `TOP_DEMONSTRATIONS` most attended demonstrations that are among FT's."""
        return top_recall(self.demo_weights_in_context, self.demo_weights_finetuned, TOP_DEMONSTRATIONS)


def random_streams(seed: int) -> dict[str, np.random.Generator]:
    """Return the built-in baselines' generators, one for each, so that the size of batches changes no number."""
    streams = {name: np.random.default_rng(seed) for name in ("SimAOU", "SimAM", "token", "demonstration")}
    # Independent of one another: two of the updates of the inflation null are random at once.
    streams |= {name: np.random.default_rng([seed, at]) for at, name in enumerate(("h_icl", "h_ft", "m_ft"), 1)}
    # The same noise with and without massive tokens: what differs is then due to these.
    return streams | {"m_ft without massive tokens": np.random.default_rng([seed, 3])}
