"""`Capture` → what in-context attention is made of, layer by layer and head by head.

1. **The exact split**, inside one in-context pass: z = z_0 + ΔICL, where z_0 is softmax attention over everything but
   the demonstrations (start token, query, and a sink where the model has one) and ΔICL what the demonstrations add.
2. **The realised update**, between two runs: h_ICL − h_ZSL = direct + inherited. Direct is ΔICL through W_O; inherited
   is that z_0 itself differs from zero-shot attention, because lower layers (or positions) already differed.
3. **The linear relaxation** of the paper (equations 11–12), beside the split: ΔW_ICL q for ΔICL, (W_ZSL + ΔW_ICL) q for
   z, without softmax and without 1/√d, and how far that is from the truth.

A model with momentum attention adds Σ_{i<t} η^{t−i} v_i to every head, a sum that splits by whose tokens the values
are: the start token's and the query's own belong to z_0, the demonstrations' to the direct update.

Every decomposition carries its residuals, and is refused where one is more than rounding.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.captures.capture import DECOMPOSE_FIELDS, Capture, Field
from icl_dual.captures.pairing import check_paired
from icl_dual.captures.shared_prefix import TOLERANCE, FullPromptPass
from icl_dual.models import Model, UnsupportedModelError
from icl_dual.momentum import decay_matrix
from icl_dual.prompts import SEPARATOR, Prompts
from icl_dual.statistics import ranks
from icl_dual.statistics.frames import summary_frame
from icl_dual.storage import load_tensors, reading, save_tensors

GROUPS = ("sink", "start", "query", "separators")
"""The groups of keys before the demonstrations, each of which is a group of its own."""

LAYERS_AT_ONCE = 2
"""Each takes memory of its own."""

LAYER_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest relative residual that is rounding within a layer. Rotary models take their softmax in float32 also at
float64. Between two whole runs, the rounding of all layers adds up: `icl_dual.captures.capture.TOLERANCE`."""


class MomentumTerms(NamedTuple):
    """What momentum adds to the heads' outputs, Σ_{i<t} η^{t−i} v_i, by whose tokens the values v_i are."""

    own: Float[Tensor, "query layer head d_head"]
    """The start token's and the query's own before its recorded position, which the zero-shot run has, too."""
    demonstrations: Float[Tensor, "query layer head d_head"]
    """The demonstrations' and their separators'."""
    eta: Float[Tensor, "layer head"]
    """η; 0 at heads without momentum."""

    def __repr__(self) -> str:
        low, high = self.eta.aminmax()
        return f"MomentumTerms(own{list(self.own.shape)} and demonstrations, η={low:.3g} to {high:.3g})"


_MOMENTUM = tuple(f"momentum/{name}" for name in MomentumTerms._fields)


class Relaxation(NamedTuple):
    """The paper's linear relaxation against the exact split of softmax attention, without momentum where there is any;
    NaN where what it stands for is zero.
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
    """Spearman's ρ over the demonstrations' tokens between their softmax weights and |kᵀq|, the linear weights' sizes.

    With its sign, kᵀq has the softmax's order by construction."""


class Residuals(NamedTuple):
    """What rounding leaves, relative to what it is held against: the largest over queries, by layer."""

    split: Float[Tensor, " layer"]
    """z_0 + ΔICL, and momentum, through W_O, plus b_O, against the captured run's attention output; and before W_O."""
    full_prompt: Float[Tensor, " layer"]
    """The same split inside a plain forward pass over the first query's full prompt, against the model's own output."""
    run: Float[Tensor, " layer"]
    """The captured run against that plain pass: rounding of all layers up to this one, in two orders of summation."""
    realised: Float[Tensor, " layer"]
    """Direct + inherited against h_ICL − h_ZSL; relative to h_ICL, of which this is a difference."""

    def __repr__(self) -> str:
        largest = ", ".join(f"{name}={found.max():.1e}" for name, found in self._asdict().items())
        return f"Residuals({largest}: the largest of {len(self.split)} layers)"


@dataclass(frozen=True, repr=False)
class Decomposition:
    """In-context attention at each query's recorded position: zero-shot part, ΔICL, and what each is made of.

    Terms by head are before W_O; `through_W_O` takes any of them into the residual stream. z_0 is `from_start` + `from_query`,
    z is z_0 + `delta_icl`, and the attention output is Σ_heads z W_O + b_O. With momentum, z_0 has `momentum.own`, too,
    and z = from_start + from_query + ΔICL + momentum.own + momentum.demonstrations.
    """

    model: str
    prompts: Prompts
    from_start: Float[Tensor, "query layer head d_head"]
    """The start token's part of softmax attention over everything but the demonstrations."""
    from_query: Float[Tensor, "query layer head d_head"]
    """The part of the same that comes from the query's own tokens."""
    delta_icl: Float[Tensor, "query layer head d_head"]
    """ΔICL = w (z_demo − z_0), what the demonstrations add to softmax attention."""
    z_zsl: Float[Tensor, "query layer head d_head"]
    """Attention in the zero-shot run."""
    mass: Float[Tensor, "query layer head group"]
    """Share of the softmax that each group of keys takes; `groups` names them."""
    icl_share: Float[Tensor, "query layer group"]
    """Each group's share of the direct update, its momentum included, along that update's direction: sums to 1, may be
    negative, NaN where there is no update."""
    relaxation: Relaxation
    W_O: Float[Tensor, "layer head d_head d_model"]
    b_O: Float[Tensor, "layer d_model"] | None
    b_V: Float[Tensor, "layer kv_head d_head"] | None
    residuals: Residuals
    momentum: MomentumTerms | None = None
    """What momentum adds; `None` of a model without."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of keys: sink, start token, query, separators, and each demonstration by its number from 1."""
        return (*GROUPS, *(f"demonstration {n + 1}" for n in range(len(self.prompts.demonstrations))))

    @property
    def demonstration_mass(self) -> Float[Tensor, "query layer head"]:
        """w, the share of the softmax that demonstrations and their separators take together."""
        return self.mass[..., GROUPS.index("separators") :].sum(-1)

    @property
    def z_0(self) -> Float[Tensor, "query layer head d_head"]:
        """Attention over everything but the demonstrations, inside the in-context pass; with its momentum."""
        z_0 = self.from_start + self.from_query
        return z_0 if self.momentum is None else z_0 + self.momentum.own

    @property
    def added(self) -> Float[Tensor, "query layer head d_head"]:
        """All that the demonstrations add: ΔICL, and their momentum."""
        return self.delta_icl if self.momentum is None else self.delta_icl + self.momentum.demonstrations

    @property
    def z(self) -> Float[Tensor, "query layer head d_head"]:
        """The heads' outputs, as W_O gets them: z_0 and what the demonstrations add."""
        return self.z_0 + self.added

    @property
    def value_bias(self) -> Float[Tensor, "query layer head d_head"]:
        """The part of z that b_V makes. It sits inside the groups: of a group with mass w, w b_V.

        Every value has b_V in it, so momentum at position t has Σ_{i<t} η^{t−i} b_V = η (1 − η^t) / (1 − η) b_V.
        """
        if self.b_V is None:
            return torch.zeros_like(self.delta_icl)
        by_head = self.b_V.repeat_interleave(self.W_O.shape[1] // self.b_V.shape[1], dim=1)
        times = 1 - self.mass[..., GROUPS.index("sink")]
        if self.momentum is not None:
            eta, t = self.momentum.eta, _Where.of(self.prompts).rows[:, None, None]
            times = times + eta * (1 - eta**t) / (1 - eta)
        return times.unsqueeze(-1) * by_head

    def through_W_O(  # noqa: N802 - the field's name
        self, term: Float[Tensor, "query layer head d_head"]
    ) -> Float[Tensor, "query layer head d_model"]:
        """A term by head in the residual stream; b_O is a term of its own, of no head."""
        return torch.einsum("qlhd,lhdm->qlhm", term, self.W_O)

    @property
    def direct(self) -> Float[Tensor, "query layer d_model"]:
        """ΔICL through W_O: what the layer's own attention to the demonstrations adds to its output; with momentum,
        also what the demonstrations' values add to it."""
        return _through(self.added, self.W_O)

    @property
    def inherited(self) -> Float[Tensor, "query layer d_model"]:
        """(z_0 − z_ZSL) through W_O: moved before the layer attends, by its input or by where the query stands."""
        return _through(self.z_0 - self.z_zsl, self.W_O)

    @property
    def realised(self) -> Float[Tensor, "query layer d_model"]:
        """The update between the two runs, h_ICL − h_ZSL = direct + inherited."""
        return self.direct + self.inherited

    @property
    def direct_share(self) -> Float[Tensor, "query layer"]:
        """⟨direct, realised⟩ / ‖realised‖²; NaN where nothing is realised but rounding."""
        return self._share(self.direct)

    @property
    def inherited_share(self) -> Float[Tensor, "query layer"]:
        """⟨inherited, realised⟩ / ‖realised‖²: with the direct share, 1."""
        return self._share(self.inherited)

    def _share(self, part: Float[Tensor, "query layer d_model"]) -> Float[Tensor, "query layer"]:
        realised = self.realised
        rounding = 4 * self.residuals.realised * _through(self.z, self.W_O, self.b_O).norm(dim=-1)
        size = realised.norm(dim=-1)
        return torch.where(size > rounding, (part * realised).sum(-1) / size**2, torch.nan)

    @property
    def momentum_norm(self) -> Float[Tensor, "query layer head"]:
        """‖momentum‖ / ‖z‖: how large what momentum adds is, beside all of a head's output; 0 without momentum."""
        if self.momentum is None:
            return torch.zeros_like(self.demonstration_mass)
        return (self.momentum.own + self.momentum.demonstrations).norm(dim=-1) / self.z.norm(dim=-1)

    @property
    def residual(self) -> float:
        """The largest residual within a layer: all but `residuals.run`, which is of whole runs."""
        return max(found.max().item() for found in (self.residuals._replace(run=self.residuals.split)))

    def to_frame(self) -> pd.DataFrame:
        """Tidy: metric, layer, head (empty for a whole layer's), mean and standard deviation over queries, n.

        With momentum, `momentum_norm` is among the metrics.
        """
        masses = {f"{name}_mass": self.mass[..., index] for index, name in enumerate(GROUPS)}
        shares = {"direct_share": self.direct_share, "inherited_share": self.inherited_share}
        shares |= {} if self.momentum is None else {"momentum_norm": self.momentum_norm}
        return summary_frame(
            {"demonstration_mass": self.demonstration_mass, **masses, **shares, **self.relaxation._asdict()}
        )

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the decomposition into a folder, as safetensors and JSON."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        groups = {"relaxation": self.relaxation, "residuals": self.residuals, "momentum": self.momentum}
        for group, members in groups.items():
            tensors |= {} if members is None else {f"{group}/{name}": t for name, t in members._asdict().items()}
        save_tensors(Path(folder), tensors, {"model": self.model, "prompts": asdict(self.prompts)})

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Decomposition":
        """Read a decomposition that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged.
        """
        tensors, metadata = load_tensors(Path(folder))
        with reading("Decomposition", folder):
            momentum = [tensors[name] for name in _MOMENTUM if name in tensors]
            return cls(
                model=metadata["model"],
                prompts=Prompts(**{name: _tuples(value) for name, value in metadata["prompts"].items()}),
                relaxation=Relaxation(*(tensors[f"relaxation/{name}"] for name in Relaxation._fields)),
                residuals=Residuals(*(tensors[f"residuals/{name}"] for name in Residuals._fields)),
                momentum=MomentumTerms(*momentum) if momentum else None,
                b_O=tensors.pop("b_O", None),
                b_V=tensors.pop("b_V", None),
                **{name: value for name, value in tensors.items() if "/" not in name},
            )

    def __repr__(self) -> str:
        n_queries, n_layers, n_heads = self.mass.shape[:3]
        momentum = "" if self.momentum is None else f"momentum norm={self.momentum_norm.nanmean():.3f}, "
        return (
            f"Decomposition({self.model!r}, {n_queries} queries after {len(self.prompts.demonstrations)} "
            f"demonstrations, {n_layers} layers of {n_heads} heads, demonstration mass="
            f"{self.demonstration_mass.mean():.3f}, direct share={self.direct_share.nanmean():.3f}, {momentum}"
            f"residual={self.residual:.1e})"
        )


def decompose(model: Model, *, zero_shot: Capture, in_context: Capture) -> Decomposition:
    """Split in-context attention into its terms at every layer and head, and check that they add up.

    Args:
        model: what was captured, with the weights it had; does not run.
        zero_shot: a capture of the queries without demonstrations, with `fields=icl_dual.DECOMPOSE_FIELDS`, or with
            `attn_out` and `z` alone.
        in_context: a capture of the same queries behind their demonstrations, with `fields=icl_dual.DECOMPOSE_FIELDS`.

    Raises:
        ValueError: the captures are of different models, weights, prompts or positions, or lack a field.
        UnsupportedModelError: the terms do not add up to the model's own attention output; says at which layer.
    """
    _check_match(model, zero_shot, in_context)
    W_O, b_O = model.output_projections()
    W_O, b_O = W_O.double().cpu(), None if b_O is None else b_O.double().cpu()
    where = _Where.of(in_context.prompts)

    def of_layer(index: int) -> tuple[Tensor | None, ...]:
        layer = _Layer.captured(in_context, index, model)
        terms = _split(layer, where, W_O[index])
        return *terms, *_relax(layer, where, terms)

    # Ranking is numpy's, on one thread: the next layer fills the other.
    with ThreadPoolExecutor(LAYERS_AT_ONCE) as pool:
        found = _stacked(pool.map(of_layer, range(model.n_layers)), model.n_layers)
    n_terms = len(_Terms._fields)
    split, relaxation = _Terms(*found[:n_terms]), Relaxation(*found[n_terms:])
    z = split.z
    z_zsl, h_zsl, h_icl = (
        _field(zero_shot, "z").double(),
        _field(zero_shot, "attn_out").double(),
        _field(in_context, "attn_out").double(),
    )
    assert in_context.full_prompt is not None
    own = in_context.full_prompt.attn_out.double()[None]
    residuals = Residuals(
        split=torch.maximum(
            _relative(_through(z, W_O, b_O), h_icl), _relative(z.flatten(2), _field(in_context, "z").flatten(2))
        ),
        full_prompt=_relative(
            _through(_full_prompt_z(model, in_context.prompts, in_context.full_prompt, W_O), W_O, b_O), own
        ),
        run=_relative(h_icl[:1], own),
        realised=_relative(h_zsl + _through(z - z_zsl, W_O), h_icl),
    )
    _check_residuals(model, residuals)
    momentum = None
    if split.own_momentum is not None and split.demo_momentum is not None and model.momentum is not None:
        momentum = MomentumTerms(split.own_momentum, split.demo_momentum, model.momentum.clone())
    return Decomposition(
        model=model.name,
        prompts=in_context.prompts,
        from_start=split.start,
        from_query=split.query,
        delta_icl=split.delta_icl,
        z_zsl=z_zsl,
        mass=split.mass,
        icl_share=split.icl_share,
        relaxation=relaxation,
        W_O=W_O,
        b_O=b_O,
        b_V=None if (b_V := model.value_biases()) is None else b_V.double().cpu(),
        residuals=residuals,
        momentum=momentum,
    )


@dataclass(frozen=True)
class _Where:
    """Where each query's recorded row and all its keys stand in the in-context prompt."""

    rows: Int[Tensor, " query"]
    own: Int[Tensor, "query own_pos"]
    n_start: int
    demo: Int[Tensor, " demo_pos"]
    groups: Float[Tensor, "demo_pos group"]
    """1 where a position belongs to the separators, or to a demonstration, else 0."""

    @classmethod
    def of(cls, prompts: Prompts) -> "_Where":
        n_start, n_prefix = len(prompts.start), len(prompts.prefix)
        longest = max(map(len, prompts.suffixes))
        own = torch.cat((torch.arange(n_start), n_prefix + torch.arange(longest)))
        owners = prompts.segments[n_start:]
        kinds = torch.tensor((SEPARATOR, *range(len(prompts.demonstrations))))
        return cls(
            rows=torch.tensor([n_prefix + len(row) - 1 for row in prompts.suffixes]),
            own=own.expand(len(prompts.queries), -1),
            n_start=n_start,
            demo=torch.arange(n_start, n_prefix),
            groups=(owners[:, None] == kinds).double(),
        )


class _Layer(NamedTuple):
    """One layer's queries at the recorded rows, and all their keys and values, in float64."""

    rule: dual.AttentionRule
    q: Float[Tensor, "query head d_head"]
    own_k: Float[Tensor, "query own_pos kv_head d_head"]
    own_v: Float[Tensor, "query own_pos kv_head d_head"]
    demo_k: Float[Tensor, "demo_pos kv_head d_head"]
    demo_v: Float[Tensor, "demo_pos kv_head d_head"]
    eta: Float[Tensor, " head"] | None

    @classmethod
    def captured(cls, in_context: Capture, layer: int, model: Model) -> "_Layer":
        kept = in_context.keys_values
        assert kept is not None
        # Each head's own keys side by side in memory, or every product over them copies them anew.
        side_by_side = {"dtype": torch.float64, "memory_format": torch.contiguous_format}
        own = (t[:, layer].transpose(1, 2).to(**side_by_side) for t in (kept.query_keys, kept.query_values))
        demo = (t[layer].double() for t in (kept.demo_keys, kept.demo_values))
        q = _field(in_context, "q_scored")[:, layer].double()
        return cls(model.attention_rules[layer], q, *(t.transpose(1, 2) for t in own), *demo, eta=_eta(model, layer))

    @classmethod
    def of_full_prompt(cls, full_prompt: FullPromptPass, layer: int, where: "_Where", model: Model) -> "_Layer":
        """From the plain pass over the first query's full prompt."""
        q, k, v = (tensor[layer].double() for tensor in (full_prompt.q, full_prompt.k, full_prompt.v))
        own, demo = where.own[0], where.demo
        return cls(
            model.attention_rules[layer], q[None], k[None, own], v[None, own], k[demo], v[demo], eta=_eta(model, layer)
        )


def _eta(model: Model, layer: int) -> Float[Tensor, " head"] | None:
    """A layer's η, zero or not, where the model has momentum: the terms of all its layers are alike."""
    return None if model.momentum is None else model.momentum[layer]


class _Terms(NamedTuple):
    """The exact split of one layer; stacked, of all."""

    start: Float[Tensor, "query *layer head d_head"]
    query: Float[Tensor, "query *layer head d_head"]
    delta_icl: Float[Tensor, "query *layer head d_head"]
    own_momentum: Float[Tensor, "query *layer head d_head"] | None
    demo_momentum: Float[Tensor, "query *layer head d_head"] | None
    mass: Float[Tensor, "query *layer head group"]
    icl_share: Float[Tensor, "query *layer group"]

    @property
    def softmax(self) -> Float[Tensor, "query *layer head d_head"]:
        """Softmax attention alone."""
        return self.start + self.query + self.delta_icl

    @property
    def z(self) -> Float[Tensor, "query *layer head d_head"]:
        momentum = (term for term in (self.own_momentum, self.demo_momentum) if term is not None)
        return sum(momentum, start=self.softmax)


def _split(layer: _Layer, where: _Where, W_O: Float[Tensor, "head d_head d_model"]) -> _Terms:
    rule, q, own_k, own_v, demo_k, demo_v, eta = layer
    own = []
    for at in (slice(where.n_start), slice(where.n_start, None)):
        part = rule.attend(q[:, None], own_k[:, at], own_v[:, at], where.rows[:, None], where.own[:, at])
        own.append(dual.AttentionPart(part.z[:, 0], part.lse[:, 0]))
    sink = rule.with_sink(dual.AttentionPart(torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)))
    z_0 = reduce(dual.merge, (sink, *own))

    # Each demonstration token's share of the whole softmax, of which groups are sums; in place, for there are many.
    scores = dual.shared_scores(q, demo_k, rule.scale, rule.softcap)
    scores += rule.bias(where.rows[None], where.demo[None])[0]
    lse = torch.logaddexp(z_0.lse, scores.logsumexp(-1).T)
    weights = scores.sub_(lse.T.unsqueeze(-1)).exp_()
    delta_icl = _weigh(weights, demo_v) - weights.sum(-1).T.unsqueeze(-1) * z_0.z
    mass = torch.stack([(part.lse - lse).exp() for part in (sink, *own)], dim=-1)

    decay_weights = None if eta is None else decay_matrix(eta, where.rows, where.demo)
    demo_momentum = None if decay_weights is None else _weigh(decay_weights, demo_v)
    direct = torch.einsum("qhd,hdm->qm", delta_icl if demo_momentum is None else delta_icl + demo_momentum, W_O)
    along = torch.einsum("qm,hdm->qhd", direct, W_O)
    of_values = dual.shared_scores(along, demo_v, 1.0)
    pulled = 0.0 if decay_weights is None else (of_values * decay_weights).sum(0)
    added = of_values.sub_((along * z_0.z).sum(-1).T.unsqueeze(-1)).mul_(weights).sum(0) + pulled
    share = added @ where.groups / (direct * direct).sum(-1, keepdim=True)
    return _Terms(
        start=own[0].z * (own[0].lse - z_0.lse).exp().unsqueeze(-1),
        query=own[1].z * (own[1].lse - z_0.lse).exp().unsqueeze(-1),
        delta_icl=delta_icl,
        own_momentum=None if eta is None else _own_momentum(eta, own_v, where),
        demo_momentum=demo_momentum,
        mass=torch.cat((mass, (weights @ where.groups).transpose(0, 1)), dim=-1),
        icl_share=torch.cat((torch.zeros_like(mass[:, 0]), share), dim=-1),
    )


def _own_momentum(
    eta: Float[Tensor, " head"], own_v: Float[Tensor, "query own_pos kv_head d_head"], where: _Where
) -> Float[Tensor, "query head d_head"]:
    """Σ η^{t−i} v_i over the start token and each query's own tokens before its recorded row t."""
    decay_weights = decay_matrix(eta, where.rows[:, None], where.own)[:, :, 0]
    return (decay_weights.unflatten(1, (own_v.shape[2], -1)) @ own_v.transpose(1, 2)).flatten(1, 2)


def _relax(layer: _Layer, where: _Where, terms: _Terms) -> Relaxation:
    """One layer's linear relaxation, over the keys that its mask shows, against ΔICL and softmax attention."""
    rule, q, own_k, own_v, demo_k, demo_v, _ = layer
    delta_icl, z = terms.delta_icl, terms.softmax
    seen = rule.visible(where.rows[None], where.demo[None])
    own_seen = rule.visible(where.rows[:, None], where.own).unsqueeze(1)
    weights = dual.shared_scores(q, demo_k, 1.0).mul_(seen)
    update = _weigh(weights, demo_v)
    output = update + (dual.scores(q[:, None], own_k, 1.0) * own_seen @ own_v.transpose(1, 2)).flatten(1, 2)
    logits = weights * rule.scale + rule.bias(where.rows[None], where.demo[None])[0]
    return Relaxation(
        update_cosine=dual.cosine(update, delta_icl),
        update_error=(update - delta_icl).norm(dim=-1) / delta_icl.norm(dim=-1),
        output_cosine=dual.cosine(output, z),
        output_error=(output - z).norm(dim=-1) / z.norm(dim=-1),
        rank_agreement=ranks.spearman(logits, weights.abs_(), seen).T,
    )


def _weigh(
    weights: Float[Tensor, "head query demo_pos"], v: Float[Tensor, "demo_pos kv_head d_head"]
) -> Float[Tensor, "query head d_head"]:
    """The demonstrations' values, weighed and summed by each head."""
    summed = weights.unflatten(0, (v.shape[1], -1)).flatten(1, 2) @ v.transpose(0, 1)
    return summed.view(*weights.shape[:2], -1).transpose(0, 1)


def _full_prompt_z(
    model: Model, prompts: Prompts, full_prompt: FullPromptPass, W_O: Float[Tensor, "layer head d_head d_model"]
) -> Float[Tensor, "1 layer head d_head"]:
    """The plain pass over the first query's full prompt, split and put together again."""
    where = _Where.of(replace(prompts, queries=prompts.queries[:1], gold=prompts.gold[:1]))
    layers = (_Layer.of_full_prompt(full_prompt, index, where, model) for index in range(model.n_layers))
    return torch.stack([_split(layer, where, W).z for layer, W in zip(layers, W_O, strict=True)], dim=1)


def _check_match(model: Model, zero_shot: Capture, in_context: Capture) -> None:
    check_paired(model, zero_shot=zero_shot, in_context=in_context)
    for run, fields in ((in_context, DECOMPOSE_FIELDS), (zero_shot, ("attn_out", "z"))):
        for name in fields:
            if getattr(run, name) is None:
                raise ValueError(
                    f"expected a capture with fields=icl_dual.DECOMPOSE_FIELDS, got {run} without {name!r}"
                )
    if (
        in_context.full_prompt is not None
        and in_context.full_prompt.tokens != in_context.prompts.prefix + in_context.prompts.suffixes[0]
    ):
        raise ValueError(
            f"expected a plain pass over the first query's prompt, got one of {len(in_context.full_prompt.tokens)} other tokens: "
            "the capture was put together from two"
        )


def _check_residuals(model: Model, residuals: Residuals) -> None:
    causes = {
        "split": "the keys, values or queries captured are not those of the attention output captured with them",
        "full_prompt": "its attention does more than softmax over scaled scores and a linear W_O, or a hook changes it",
        "run": "what was captured is not a plain pass over the first query's prompt",
        "realised": "the zero-shot capture's heads do not give its attention output",
    }
    for kind, cause in causes.items():
        found = getattr(residuals, kind)
        tolerance = (TOLERANCE if kind == "run" else LAYER_TOLERANCE)[model.dtype]
        wrong = (~(found <= tolerance)).nonzero()
        if len(wrong):
            layer = int(wrong[0])
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: the terms are off by {found[layer]:.1e} of the "
                f"attention output ({kind}); expected at most {tolerance:.0e}: {cause}"
            )


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _stacked(layers: Iterable[tuple[Tensor | None, ...]], n_layers: int) -> list[Any]:
    """Each of what layers have, with a layer axis: put in its place as it comes, so that none is held twice."""
    stacked: list[Any] = []
    for index, found in enumerate(layers):
        if not index:
            stacked = [None if own is None else own.new_empty(len(own), n_layers, *own.shape[1:]) for own in found]
        for whole, own in zip(stacked, found, strict=True):
            if whole is not None and own is not None:
                whole[:, index] = own
    return stacked


def _field(run: Capture, name: Field) -> Tensor:
    return getattr(run, name)


def _through(
    z: Float[Tensor, "query layer head d_head"],
    W_O: Float[Tensor, "layer head d_head d_model"],
    b_O: Float[Tensor, "layer d_model"] | None = None,
) -> Float[Tensor, "query layer d_model"]:
    out = (z.flatten(2).transpose(0, 1) @ W_O.flatten(1, 2)).transpose(0, 1)
    return out if b_O is None else out + b_O


def _relative(
    got: Float[Tensor, "query layer d_model"], expected: Float[Tensor, "query layer d_model"]
) -> Float[Tensor, " layer"]:
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).amax(0)
