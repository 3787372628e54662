"""The exact split of in-context attention, layer by layer, from a capture's queries, keys and values, in float64.

The heads' outputs are the start token's term, the query's, and ΔICL, each computed from keys and values and not as a
difference of outputs; with momentum, its two sums besides. Beside each layer's split stands the paper's linear
relaxation of it. `icl_dual.decomposition` adds what follows from W_O and from the zero-shot run, and checks the sums.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import trusted
from icl_dual.captures.capture import Capture, Field
from icl_dual.captures.shared_prefix import FullPromptPass
from icl_dual.field_docs import document_fields
from icl_dual.models import Model
from icl_dual.models.overflow import is_finite
from icl_dual.momentum import decay_matrix
from icl_dual.prompts import SEPARATOR, Prompts
from icl_dual.results import compare_by_value
from icl_dual.statistics import ranks
from icl_dual.torch_utils import is_out_of_memory, vector_norm

LAYERS_AT_ONCE = 2
"""How many layers a CPU decomposes in parallel; the memory of a layer's weights is needed for each."""

NUMBERS_AT_ONCE = 1 << 26
"""How many queries, keys, values and scores another device computes with at once: launching operators takes as long for
many layers as for one."""


@document_fields
@compare_by_value
class Relaxation(NamedTuple):
    """The paper's linear relaxation compared with the exact split of softmax attention, both without momentum.

    Values are NaN where the term of the split is zero.
    """

    update_cosine: Float[Tensor, "query layer head"]
    """cos(ΔW_ICL q, ΔICL)."""
    update_error: Float[Tensor, "query layer head"]
    """‖ΔW_ICL q − ΔICL‖ / ‖ΔICL‖."""
    output_cosine: Float[Tensor, "query layer head"]
    """cos((W_ZSL + ΔW_ICL) q, z)."""
    output_error: Float[Tensor, "query layer head"]
    """‖(W_ZSL + ΔW_ICL) q − z‖ / ‖z‖."""
    rank_agreement: Float[Tensor, "query layer head"]
    """Spearman's ρ, over the demonstrations' tokens, between softmax weights and |kᵀq|, the sizes of the linear
    weights. With its sign, kᵀq has the order of the softmax by construction."""


class SplitTerms(NamedTuple):
    """The exact split of one layer; stacked, of all."""

    start: Float[Tensor, "query *layer head d_head"]
    query: Float[Tensor, "query *layer head d_head"]
    delta_icl: Float[Tensor, "query *layer head d_head"]
    query_momentum: Float[Tensor, "query *layer head d_head"] | None
    demo_momentum: Float[Tensor, "query *layer head d_head"] | None
    mass: Float[Tensor, "query *layer head group"]
    icl_share: Float[Tensor, "query *layer group"]

    @property
    def softmax_z(self) -> Float[Tensor, "query *layer head d_head"]:
        """Softmax attention alone, without momentum."""
        return self.start + self.query + self.delta_icl

    @property
    def z(self) -> Float[Tensor, "query *layer head d_head"]:
        """The heads' outputs."""
        momentum = (term for term in (self.query_momentum, self.demo_momentum) if term is not None)
        return sum(momentum, start=self.softmax_z)


def split_layers(
    model: Model, in_context: Capture, W_O: Float[Tensor, "layer head d_head d_model"]
) -> tuple[SplitTerms, Relaxation]:
    """Return the split and the relaxation of every layer."""
    positions = _PositionsTwice.of(in_context.prompts, W_O.device)

    def compute(
        layer: _LayerInputs, W: Float[Tensor, "head d_head d_model"], sums: list[Tensor] | None
    ) -> tuple[Tensor | None, ...]:
        terms = _split(layer, positions, W, sums)
        return *terms, *_relax(layer, positions.on_device, terms)

    stacked = _of_all_layers(model, partial(_LayerInputs.of_capture, in_context, model), W_O, compute)
    n_terms = len(SplitTerms._fields)
    return SplitTerms(*stacked[:n_terms]), Relaxation(*stacked[n_terms:])


def full_prompt_z(
    model: Model, prompts: Prompts, full_prompt: FullPromptPass, W_O: Float[Tensor, "layer head d_head d_model"]
) -> Float[Tensor, "1 layer head d_head"]:
    """Return the heads' outputs in the plain forward pass over the first query's full prompt, as the sum of its
    terms."""
    first = replace(prompts, queries=prompts.queries[:1], gold=prompts.gold[:1])
    positions = _PositionsTwice.of(first, W_O.device)
    inputs_of = partial(_LayerInputs.of_full_prompt, full_prompt, positions.on_device, model)
    (z,) = _of_all_layers(model, inputs_of, W_O, lambda layer, W, sums: (_split(layer, positions, W, sums).z,))
    return z


@dataclass(frozen=True)
class Positions:
    """The positions in the in-context prompt of each query's recorded row and of all keys."""

    recorded: Int[Tensor, " query"]
    """The recorded position."""
    query: Int[Tensor, "query query_pos"]
    """Positions of the start token and then of the query's own tokens, as `KeysValues.query_keys` has them."""
    n_start: int
    """How many of those are the start token's."""
    demo: Int[Tensor, " demo_pos"]
    """Positions of the demonstrations and their separators."""
    demo_groups: Float[Tensor, "demo_pos group"]
    """1 where a position belongs to the separators, or to a demonstration, else 0."""

    def to(self, device: torch.device) -> "Positions":
        """Return the positions on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    @classmethod
    def of(cls, prompts: Prompts) -> "Positions":
        """Return the positions of prompts."""
        n_start, n_prefix = len(prompts.start), len(prompts.prefix)
        longest = max(map(len, prompts.suffixes))
        query = torch.cat((torch.arange(n_start), n_prefix + torch.arange(longest)))
        segments = torch.tensor((SEPARATOR, *range(len(prompts.demonstrations))))
        return cls(
            recorded=torch.tensor([n_prefix + len(suffix) - 1 for suffix in prompts.suffixes]),
            query=query.expand(len(prompts.queries), -1),
            n_start=n_start,
            demo=torch.arange(n_start, n_prefix),
            demo_groups=(prompts.segments[n_start:, None] == segments).double(),
        )


class _PositionsTwice(NamedTuple):
    """The same positions twice: what depends on their values alone is looked up on the host, which need not wait."""

    on_host: Positions
    on_device: Positions

    @classmethod
    def of(cls, prompts: Prompts, device: torch.device) -> "_PositionsTwice":
        """Return the positions of prompts."""
        on_host = Positions.of(prompts)
        return cls(on_host, on_host.to(device))


class _LayerInputs(NamedTuple):
    """One layer's queries at the recorded positions, and all their keys and values, in float64.

    Those of several layers of one rule have an axis for layers in front.
    """

    rule: dual.AttentionRule
    q: Float[Tensor, "*layer query head d_head"]
    query_k: Float[Tensor, "*layer query query_pos kv_head d_head"]
    query_v: Float[Tensor, "*layer query query_pos kv_head d_head"]
    demo_k: Float[Tensor, "*layer demo_pos kv_head d_head"]
    demo_v: Float[Tensor, "*layer demo_pos kv_head d_head"]
    eta: Float[Tensor, "*layer head"] | None

    @classmethod
    def of_capture(cls, in_context: Capture, model: Model, layers: Sequence[int]) -> "_LayerInputs":
        """Return the inputs of layers in a capture."""
        keys_values, at = in_context.keys_values, _indices(layers)
        assert keys_values is not None
        # Each head's keys side by side in memory: otherwise every product over them copies them.
        side_by_side: dict[str, Any] = {"dtype": torch.float64, "memory_format": torch.contiguous_format}
        by_query = (keys_values.query_keys, keys_values.query_values)
        query_k, query_v = (t[:, at].movedim(1, 0).transpose(2, 3).to(**side_by_side).transpose(2, 3) for t in by_query)
        demo_k, demo_v = (t[at].double() for t in (keys_values.demo_keys, keys_values.demo_values))
        q = field_of(in_context, "q_scored")[:, at].movedim(1, 0).double()
        return cls(model.attention_rules[layers[0]], q, query_k, query_v, demo_k, demo_v, _eta(model, at, q.device))

    @classmethod
    def of_full_prompt(
        cls, full_prompt: FullPromptPass, positions: Positions, model: Model, layers: Sequence[int]
    ) -> "_LayerInputs":
        """Return the inputs of layers in the plain forward pass over the first query's full prompt."""
        at, query, demo = _indices(layers), positions.query[0], positions.demo
        q, k, v = (tensor[at].double() for tensor in (full_prompt.q, full_prompt.k, full_prompt.v))
        rule, eta = model.attention_rules[layers[0]], _eta(model, at, q.device)
        return cls(rule, q[:, None], k[:, None, query], v[:, None, query], k[:, demo], v[:, demo], eta)

    @property
    def n_numbers(self) -> int:
        """Return how many numbers these are, and seven tensors of scores."""
        n_scores = self.q[..., 0].numel() * (self.query_k.shape[-3] + self.demo_k.shape[-3])
        return sum(tensor.numel() for tensor in self[1:] if tensor is not None) + 7 * n_scores

    def first(self) -> "_LayerInputs":
        """Return the inputs of the first of several layers, without their axis."""
        return self._make((self.rule, *(None if tensor is None else tensor[0] for tensor in self[1:])))


_Part = tuple[Sequence[int], Sequence[Tensor | None]]
"""Indices of layers, and tensors of them `[query layer …]`."""


def _indices(layers: Sequence[int]) -> slice | list[int]:
    """Return what indexes layers, as views where they follow each other."""
    is_range = [*layers] == [*range(layers[0], layers[0] + len(layers))]
    return slice(layers[0], layers[0] + len(layers)) if is_range else [*layers]


_Compute = Callable[[_LayerInputs, Tensor, list[Tensor] | None], Sequence[Tensor | None]]
"""Takes a layer's inputs, its W_O and the sums of `_looked_at_once`; returns tensors `[query …]`."""


def _of_all_layers(
    model: Model,
    inputs_of: Callable[[Sequence[int]], _LayerInputs],
    W_O: Float[Tensor, "layer head d_head d_model"],
    compute: _Compute,
) -> list[Any]:
    """Return what is computed of each layer, `[query layer …]`.

    On a CPU two layers are computed in parallel. On other devices, each operator computes several layers of one rule.
    With momentum, sinks or ALiBi, which are tensors by layer, layers are computed one by one.

    Args:
        model: the model.
        inputs_of: returns the inputs of some layers of one rule.
        W_O: the output projections.
        compute: computes one layer.
    """
    rules, n_layers, compute = model.attention_rules, model.n_layers, trusted(compute)
    has_tensors = model.momentum is not None or any(rule.slopes is not None or rule.sink is not None for rule in rules)

    def of_one(index: int, sums: list[Tensor] | None) -> _Part:
        computed = compute(inputs_of([index]).first(), W_O[index], sums)
        return [index], [None if tensor is None else tensor.unsqueeze(1) for tensor in computed]

    def of_rule(rule: dual.AttentionRule, sums: list[Tensor]) -> Iterator[_Part]:
        pending = [layer for layer in range(n_layers) if rules[layer] == rule]
        n_at_once = max(1, NUMBERS_AT_ONCE // inputs_of(pending[:1]).n_numbers)
        while pending:
            layers = pending[:n_at_once]
            try:
                computed = _of_several(inputs_of(layers), W_O[_indices(layers)], compute, sums)
            except (RuntimeError, MemoryError) as error:
                if len(layers) == 1 or not is_out_of_memory(error):
                    raise
                n_at_once = len(layers) // 2
                continue
            yield layers, computed
            del pending[:n_at_once]

    def of_all(sums: list[Tensor] | None) -> list[Any]:
        if sums is None:
            # Ranking is numpy's, on one thread: the next layer uses the other.
            with ThreadPoolExecutor(LAYERS_AT_ONCE) as pool:
                return _stack_layers(pool.map(partial(of_one, sums=None), range(n_layers)), n_layers)
        if has_tensors:
            return _stack_layers((of_one(index, sums) for index in range(n_layers)), n_layers)
        by_rule = (of_rule(rule, sums) for rule in dict.fromkeys(rules))
        return _stack_layers(itertools.chain.from_iterable(by_rule), n_layers)

    return _looked_at_once(W_O.device, of_all)


def _of_several(
    layers: _LayerInputs, W_O: Float[Tensor, "layer head d_head d_model"], compute: _Compute, sums: list[Tensor]
) -> list[Tensor | None]:
    """Return what is computed of several layers, each by the same operators, `[query layer …]`."""
    rule, *inputs, _ = layers

    def of_one(*tensors: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        *inputs, W = tensors
        layer_sums: list[Tensor] = []
        computed = compute(_LayerInputs(rule, *inputs, eta=None), W, layer_sums)
        # vmap returns tensors alone.
        present = {place: tensor for place, tensor in enumerate(computed) if tensor is not None}
        return present, torch.stack(layer_sums).sum()

    computed, by_layer = torch.func.vmap(of_one, out_dims=(1, 0))(*inputs, W_O)
    sums.append(by_layer.sum())
    return [computed.get(place) for place in range(max(computed) + 1)]


def _eta(model: Model, at: slice | list[int], device: torch.device) -> Float[Tensor, "layer head"] | None:
    """Return layers' η, zero or not, where the model has momentum: all its layers have the same terms."""
    return None if model.momentum is None else model.momentum[at].to(device)


def _looked_at_once(device: torch.device, compute: Callable[[list[Tensor] | None], Any]) -> Any:
    """Return what is computed of all layers; on a GPU, whether numbers are finite is looked at once for all of them.

    Args:
        device: where it is computed.
        compute: takes a list that receives the sums of what is not looked at, or `None` to look at all. It is called
            once more, with `None`, where a sum is not finite: hidden numbers may be the cause.
    """
    if device.type == "cpu":
        return compute(None)
    sums: list[Tensor] = []
    computed = compute(sums)
    return computed if is_finite(torch.stack(sums)) else compute(None)


def _split(
    layer: _LayerInputs,
    positions: _PositionsTwice,
    W_O: Float[Tensor, "head d_head d_model"],
    sums: list[Tensor] | None,
) -> SplitTerms:
    """Return the exact split of one layer; `sums` as in `_looked_at_once`."""
    rule, q, demo_v, eta = layer.rule, layer.q, layer.demo_v, layer.eta
    n_start = positions.on_host.n_start
    start, query = (_attend(layer, positions.on_host, keys, sums) for keys in (slice(n_start), slice(n_start, None)))
    there = positions.on_device
    sink = rule.with_sink(dual.AttentionPart(torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)))
    z_0 = reduce(dual.merge, (sink, start, query))
    weights, lse = _demo_weights(layer, there, z_0)
    delta_icl = dual.weighted_values(weights, demo_v) - weights.sum(-1).T.unsqueeze(-1) * z_0.z
    decay_weights = None if eta is None else decay_matrix(eta, there.recorded, there.demo)
    demo_momentum = None if decay_weights is None else dual.weighted_values(decay_weights, demo_v)
    added = delta_icl if demo_momentum is None else delta_icl + demo_momentum
    share = _demo_shares(weights, decay_weights, demo_v, z_0.z, added, W_O, there.demo_groups)
    mass = torch.stack([(part.lse - lse).exp() for part in (sink, start, query)], dim=-1)
    return SplitTerms(
        start=start.z * (start.lse - z_0.lse).exp().unsqueeze(-1),
        query=query.z * (query.lse - z_0.lse).exp().unsqueeze(-1),
        delta_icl=delta_icl,
        query_momentum=None if eta is None else _query_momentum(eta, layer.query_v, there),
        demo_momentum=demo_momentum,
        mass=torch.cat((mass, (weights @ there.demo_groups).transpose(0, 1)), dim=-1),
        icl_share=torch.cat((torch.zeros_like(mass[:, 0]), share), dim=-1),
    )


def _attend(layer: _LayerInputs, positions: Positions, keys: slice, sums: list[Tensor] | None) -> dual.AttentionPart:
    """Return attention of the recorded rows over some of the start token's and the query's keys."""
    part = layer.rule.attend(
        layer.q[:, None],
        layer.query_k[:, keys],
        layer.query_v[:, keys],
        positions.recorded[:, None],
        positions.query[:, keys],
        check_finite=sums is None,
    )
    if sums is not None:
        sums.append(part.z.detach().sum())
    return dual.AttentionPart(part.z[:, 0], part.lse[:, 0])


def _demo_weights(
    layer: _LayerInputs, positions: Positions, z_0: dual.AttentionPart
) -> tuple[Float[Tensor, "head query demo_pos"], Float[Tensor, "query head"]]:
    """Return each demonstration token's share of the whole softmax, and the log-sum-exp of all scores.

    Groups are sums of these shares. Computed in place: there are many of them.
    """
    scores = dual.shared_scores(layer.q, layer.demo_k, layer.rule.scale, layer.rule.softcap)
    _add_bias(scores, layer.rule, positions)
    lse_0 = z_0.lse.T.unsqueeze(-1)
    largest = torch.maximum(scores.amax(-1, keepdim=True), lse_0) if scores.shape[-1] else lse_0
    total = scores.sub_(largest).exp_().sum(-1, keepdim=True) + (lse_0 - largest).exp()
    return scores.div_(total), (largest + total.log()).squeeze(-1).T


def _add_bias(scores: Float[Tensor, "head query demo_pos"], rule: dual.AttentionRule, positions: Positions) -> None:
    """Add what positions add to scores over the demonstrations, which come before all recorded rows."""
    if rule.slopes is not None or rule.window is not None:
        scores += rule.bias(positions.recorded[None], positions.demo[None])[0]


def _demo_shares(
    weights: Float[Tensor, "head query demo_pos"],
    decay_weights: Float[Tensor, "head query demo_pos"] | None,
    demo_v: Float[Tensor, "demo_pos kv_head d_head"],
    z_0: Float[Tensor, "query head d_head"],
    added: Float[Tensor, "query head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    demo_groups: Float[Tensor, "demo_pos group"],
) -> Float[Tensor, "query group"]:
    """Return the share of the separators and of each demonstration in the direct update, along that update's
    direction."""
    direct = torch.einsum("qhd,hdm->qm", added, W_O)
    along = torch.einsum("qm,hdm->qhd", direct, W_O)
    value_products = dual.shared_scores(along, demo_v, 1.0)
    from_momentum = 0.0 if decay_weights is None else (value_products * decay_weights).sum(0)
    from_softmax = value_products.sub_((along * z_0).sum(-1).T.unsqueeze(-1)).mul_(weights).sum(0)
    return (from_softmax + from_momentum) @ demo_groups / (direct * direct).sum(-1, keepdim=True)


def _query_momentum(
    eta: Float[Tensor, " head"], query_v: Float[Tensor, "query query_pos kv_head d_head"], positions: Positions
) -> Float[Tensor, "query head d_head"]:
    """Return Σ η^{t−i} v_i over the start token and each query's own tokens before its recorded position t."""
    decay_weights = decay_matrix(eta, positions.recorded[:, None], positions.query)[:, :, 0]
    return (torch.unflatten(decay_weights, 1, (query_v.shape[2], -1)) @ query_v.transpose(1, 2)).flatten(1, 2)


def _relax(layer: _LayerInputs, positions: Positions, terms: SplitTerms) -> Relaxation:
    """Return one layer's linear relaxation, over the keys that its mask shows, against ΔICL and softmax attention."""
    rule, q, query_k, query_v, demo_k, demo_v, _ = layer
    delta_icl, z = terms.delta_icl, terms.softmax_z
    demo_visible = rule.visible(positions.recorded[None], positions.demo[None])
    query_visible = rule.visible(positions.recorded[:, None], positions.query).unsqueeze(1)
    weights = dual.shared_scores(q, demo_k, 1.0)
    if rule.window is not None:
        weights *= demo_visible
    update = dual.weighted_values(weights, demo_v)
    output = update + (dual.scores(q[:, None], query_k, 1.0) * query_visible @ query_v.transpose(1, 2)).flatten(1, 2)
    return Relaxation(
        update_cosine=dual.cosine(update, delta_icl),
        update_error=vector_norm(update - delta_icl, dim=-1) / vector_norm(delta_icl, dim=-1),
        output_cosine=dual.cosine(output, z),
        output_error=vector_norm(output - z, dim=-1) / vector_norm(z, dim=-1),
        rank_agreement=_rank_agreement(weights, rule, positions, demo_visible).T,
    )


def _rank_agreement(
    weights: Float[Tensor, "head query demo_pos"],
    rule: dual.AttentionRule,
    positions: Positions,
    visible: Bool[Tensor, "1 query demo_pos"],
) -> Float[Tensor, "head query"]:
    """Return Spearman's ρ between the softmax's logits and the sizes of the linear weights kᵀq."""
    if rule.slopes is None:  # logits have the order of the linear weights themselves
        return ranks.spearman_with_sizes(weights, visible)
    logits = weights * rule.scale
    _add_bias(logits, rule, positions)
    return ranks.spearman(logits, weights.abs_(), visible)


def _stack_layers(parts: Iterable[_Part], n_layers: int) -> list[Any]:
    """Return the tensors of all layers, written as the layers come, so that none is held twice.

    Args:
        parts: the layers, in any order.
        n_layers: the number of layers.
    """
    stacked: list[Any] = []
    for layers, tensors in parts:
        if not stacked:
            stacked = [None if t is None else t.new_empty(len(t), n_layers, *t.shape[2:]) for t in tensors]
        for all_layers, tensor in zip(stacked, tensors, strict=True):
            if all_layers is not None and tensor is not None:
                all_layers[:, _indices(layers)] = tensor
    return stacked


def field_of(capture: Capture, name: Field) -> Tensor:
    """Return a field of a capture that was checked to have it."""
    return getattr(capture, name)
