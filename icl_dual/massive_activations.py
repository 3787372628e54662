"""Massive activations: tokens whose residual stream is far longer than that of others → `MassiveActivations`.

A few tokens of a prompt carry activations that are orders of magnitude larger than all others, and attention gathers on
them (Sun et al., 2024, "Massive Activations in Large Language Models"). Usually they are the start token and a first
word. With demonstrations before it, a query's first word may lose what it carries, and a metric that reads attention to
the query's own tokens then compares the presence of one token rather than attention to all.

Sun et al. look at single elements: above 100, and about 1,000 times the median magnitude. Here a token is *massive* at
a layer in a setting where the norm of its residual stream exceeds `MASSIVE_RATIO` times the median norm, over the
tokens of all queries at that layer in that setting. The start token is not among them: no metric reads it.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icl_dual.arguments import checked
from icl_dual.captures.capture import Capture
from icl_dual.captures.pairing import check_fields, check_settings, of_shared_tokens
from icl_dual.field_docs import document_fields
from icl_dual.prompts import Tokens
from icl_dual.results import check_axes, check_count, check_names, check_values
from icl_dual.statistics.frames import html_table
from icl_dual.storage import Saved
from icl_dual.torch_utils import from_numpy, to_list

MASSIVE_RATIO = 10.0
"""A token is massive where its residual norm exceeds this many times the median of its layer and setting."""


def token_mask(lengths: Int[Tensor, " query"], n_tokens: int) -> Bool[Tensor, "query query_token"]:
    """Return True at each query's own tokens, False past its end."""
    return torch.arange(n_tokens, device=lengths.device) < lengths[:, None]


def median_norms(
    norms: Float[Tensor, "query layer query_token"], lengths: Int[Tensor, " query"]
) -> Float[Tensor, " layer"]:
    """Return the median norm over the tokens of all queries, at each layer.

    Args:
        norms: norms of the residual stream after each layer.
        lengths: the number of each query's tokens; what is past a query's end is left out.
    """
    by_token = norms.transpose(0, 1)[:, token_mask(lengths, norms.shape[-1])]
    return from_numpy(np.median(by_token.cpu().numpy(), axis=1)).to(norms)


def norm_ratios(
    norms: Float[Tensor, "query layer query_token"], lengths: Int[Tensor, " query"]
) -> Float[Tensor, "query layer query_token"]:
    """Return each token's residual norm in units of the median of its layer; zero past a query's end.

    Args:
        norms: norms of the residual stream after each layer, zero past a query's end.
        lengths: the number of each query's tokens.

    Example:
        >>> norms, lengths = torch.tensor([[[60.0, 2.0, 3.0]], [[50.0, 1.0, 0.0]]]), torch.tensor([3, 2])
        >>> norm_ratios(norms, lengths).squeeze(1).tolist()  # the median of five tokens is 3
        [[20.0, 0.6666666865348816, 1.0], [16.66666603088379, 0.3333333432674408, 0.0]]
    """
    tiny = torch.finfo(norms.dtype).tiny
    return norms / median_norms(norms, lengths).clamp_min(tiny)[:, None]


def ordinary_tokens(
    norms: Mapping[str, Float[Tensor, "query layer query_token"]],
    lengths: Int[Tensor, " query"],
    ratio: float | int = MASSIVE_RATIO,
) -> Bool[Tensor, "query query_token"]:
    """Return True at each query's tokens that are massive at no layer and in no setting, False past its end.

    Args:
        norms: by setting, norms of the residual stream after each layer, zero past a query's end.
        lengths: the number of each query's tokens.
        ratio: how many times the median a token's norm must exceed to be massive.
    """
    mask = token_mask(lengths, next(iter(norms.values())).shape[-1])
    for of_setting in norms.values():
        mask &= ~(norm_ratios(of_setting, lengths) > ratio).any(1)
    return mask


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class MassiveActivations(Saved):
    """The queries' tokens with massive activations, by layer, in the three settings.

    Made by `find_massive_activations`, or by `Experiment.massive_activations`.
    """

    model: str
    """The model's name."""
    queries: tuple[Tokens, ...]
    """The token ids of each query, with what the protocol appends: those that it has both in context and zero-shot."""
    norms: dict[str, Float[Tensor, "query layer query_token"]]
    """By setting (ZSL, ICL, FT): norms of the residual stream after each layer; zero past a query's end."""
    ratio: float | int = MASSIVE_RATIO
    """How many times the median of its layer and setting a token's norm must exceed to be massive."""

    def __post_init__(self) -> None:
        axes = check_axes(self, query=("queries", len(self.queries)))
        check_names("norms", self.norms, ("ZSL", "ICL", "FT"))
        check_count(
            "tokens on the axis query_token",
            axes["query_token"],
            "the longest of queries",
            max(map(len, self.queries), default=0),
        )
        check_values(self, "norms", "queries", low=0)
        check_values(self, "ratio", low=1)

    @property
    def lengths(self) -> Int[Tensor, " query"]:
        """Return the number of each query's tokens."""
        return torch.tensor([len(tokens) for tokens in self.queries])

    @cached_property
    def medians(self) -> dict[str, Float[Tensor, " layer"]]:
        """Return by setting the median norm over the tokens of all queries, at each layer."""
        return {setting: median_norms(norms, self.lengths) for setting, norms in self.norms.items()}

    @cached_property
    def ratios(self) -> dict[str, Float[Tensor, "query layer query_token"]]:
        """Return by setting each token's norm in units of the median; zero past a query's end."""
        return {setting: norm_ratios(norms, self.lengths) for setting, norms in self.norms.items()}

    @property
    def is_massive(self) -> dict[str, Bool[Tensor, "query layer query_token"]]:
        """Return by setting whether each token is massive at each layer."""
        return {setting: ratios > self.ratio for setting, ratios in self.ratios.items()}

    @property
    def ordinary_tokens(self) -> Bool[Tensor, "query query_token"]:
        """Return True at the tokens that are massive at no layer and in no setting, False past a query's end."""
        return ordinary_tokens(self.norms, self.lengths, self.ratio)

    def overall(self) -> dict[str, dict[str, float]]:
        """Return by setting, over all layers: share of queries with a massive token, largest ratio and largest norm."""
        return {
            setting: {
                "share_of_queries": is_massive.any(2).any(1).double().mean().item(),
                "largest_ratio": self.ratios[setting].max().item(),
                "largest_norm": self.norms[setting].max().item(),
            }
            for setting, is_massive in self.is_massive.items()
        }

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each setting and layer.

        Columns: setting, layer, share_of_queries (with a massive token), n_tokens (massive, over all queries),
        largest_norm, median_norm, ratio (of the two), and the position (in the query, from 0) and token id of the
        largest.
        """
        rows: list[dict[str, Any]] = []
        for setting, is_massive in self.is_massive.items():
            for layer in range(is_massive.shape[1]):
                massive, norms = is_massive[:, layer], self.norms[setting][:, layer]
                query, position = divmod(int(norms.argmax()), norms.shape[1])
                largest, median = norms.max().item(), self.medians[setting][layer].item()
                rows.append(
                    {
                        "setting": setting,
                        "layer": layer,
                        "share_of_queries": massive.any(1).double().mean().item(),
                        "n_tokens": int(massive.sum()),
                        "largest_norm": largest,
                        "median_norm": median,
                        "ratio": self.ratios[setting][query, layer, position].item(),
                        "position": position,
                        "token": self.queries[query][position],
                    }
                )
        return pd.DataFrame(rows)

    def tokens(self) -> pd.DataFrame:
        """Return a row for each setting, position and token id that is massive at any layer, the most frequent first.

        Columns: setting, position (in the query, from 0), token (its id), n_queries, layers (as text, such as 2–4, 12),
        largest_norm, and ratio (the largest, to its layer's median).
        """
        columns = ("setting", "position", "token", "n_queries", "layers", "largest_norm", "ratio")
        rows = [row for setting in self.norms for row in self._token_rows(setting)]
        return pd.DataFrame(rows, columns=list(columns))

    @classmethod
    @checked
    def load(cls, folder: str | PathLike[str]) -> "MassiveActivations":
        """Read massive activations that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged, or holds another result.
        """
        loaded = super().load(folder)  # safetensors sorts its names
        return replace(loaded, norms={setting: loaded.norms[setting] for setting in ("ZSL", "ICL", "FT")})

    def _token_rows(self, setting: str) -> list[dict[str, Any]]:
        """Return the rows of `tokens` for one setting."""
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        massive: list[tuple[int, int, int]] = to_list(self.is_massive[setting].nonzero())
        for query, layer, position in massive:
            places.setdefault((position, self.queries[query][position]), []).append((query, layer))
        rows: list[dict[str, Any]] = []
        for (position, token), cells in places.items():
            queries, layers = (torch.tensor(index) for index in zip(*cells, strict=True))
            rows.append(
                {
                    "setting": setting,
                    "position": position,
                    "token": token,
                    "n_queries": len(set(to_list(queries))),
                    "layers": _spans(sorted(set(to_list(layers)))),
                    "largest_norm": self.norms[setting][queries, layers, position].max().item(),
                    "ratio": self.ratios[setting][queries, layers, position].max().item(),
                }
            )
        return sorted(rows, key=lambda row: (-row["n_queries"], row["position"], row["token"]))

    def __repr__(self) -> str:
        counts = [f"{name} {int(massive.any((1, 2)).sum())}" for name, massive in self.is_massive.items()]
        n_layers = next(iter(self.norms.values())).shape[1]
        return (
            f"MassiveActivations({self.model!r}, {len(self.queries)} queries, {n_layers} layers, norms above "
            f"{self.ratio:g} × the median in queries: {', '.join(counts)})"
        )

    def __str__(self) -> str:
        return "\n".join(f"{setting}: {self._sentence(setting)}" for setting in self.norms)

    def _sentence(self, setting: str) -> str:
        """Return what a setting's most frequent massive token is, in words."""
        rows = self._token_rows(setting)
        if not rows:
            return f"no massive token; the largest norm is {self.ratios[setting].max():.1f} × the median"
        first, others = rows[0], rows[1:]
        sentence = (
            f"position {first['position']} (token {first['token']}) in {first['n_queries']} of {len(self.queries)} "
            f"queries, layers {first['layers']}, norm up to {first['largest_norm']:,.0f} "
            f"({first['ratio']:.0f} × the median)"
        )
        if not others:
            return sentence
        n_most = max(row["n_queries"] for row in others)
        return f"{sentence}; {len(others)} other, each in at most {n_most}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{html_table(self.tokens().round(1))}"


def _spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, consecutive ones as a span.

    >>> _spans([2, 3, 4, 12, 14, 15])
    '2–4, 12, 14–15'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)


@checked
def find_massive_activations(
    *, zero_shot: Capture, in_context: Capture, finetuned: Capture, ratio: float | int = MASSIVE_RATIO
) -> MassiveActivations:
    """Find the queries' tokens with massive activations in the three settings.

    Args:
        zero_shot: a capture of the zero-shot prompts, with the field `residual_norms` as the others.
        in_context: a capture of the same queries behind their demonstrations.
        finetuned: a capture of the zero-shot prompts with the finetuning applied.
        ratio: how many times the median of its layer and setting a token's norm must exceed to be massive.

    Raises:
        ValueError: the captures are of different models or queries, or lack `residual_norms`; or `ratio` is not
            above 1.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> model = tiny_model()
        >>> prompts = icl_dual.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(5))
        >>> experiment = icl_dual.run_experiment(model, prompts, lr=0.01, progress=False)
        >>> experiment.massive_activations()  # random weights have none
        MassiveActivations('tiny', 5 queries, 2 layers, norms above 10 × the median in queries: ZSL 0, ICL 0, FT 0)
    """
    if not ratio > 1:
        raise ValueError(f"expected ratio above 1, got {ratio}: pass how many times the median is massive, such as 10")
    captures = {"zero_shot": zero_shot, "in_context": in_context, "finetuned": finetuned}
    check_settings(**captures)
    check_fields(("residual_norms",), **captures)
    by_setting = {"ZSL": zero_shot.residual_norms, "ICL": in_context.residual_norms, "FT": finetuned.residual_norms}
    norms = {setting: values for setting, values in by_setting.items() if values is not None}
    shared = in_context.prompts.shared_query_tokens
    texts = zip(zero_shot.prompts.suffixes, shared, strict=True)
    return MassiveActivations(
        model=zero_shot.model,
        queries=tuple(tuple(tokens[alone] for _, alone in pairs) for tokens, pairs in texts),
        norms={setting: values.cpu() for setting, values in of_shared_tokens(norms, shared).items()},
        ratio=ratio,
    )
