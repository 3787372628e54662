"""The pass over queries that shared patches are fitted to: what each block lacks without demonstrations.

At the recorded token of a query, the in-context pass leaves the residual stream after every layer. The pass over the
query alone then puts it back after every layer: each layer reads, at the recorded token, what it would read if the
layers below were patched exactly. There, what the block lacks is its in-context output minus its own.

What queries share runs once (`icl_dual.captures.shared_prefix`); the rest of each query runs once in context and once
alone, in batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.captures.capture import check_pass
from icl_dual.captures.shared_prefix import (
    BatchLimit,
    BatchRows,
    check_rope_scaling,
    common_query_prefix,
    run_prefix,
    run_queries,
)
from icl_dual.models import MlpForm, MlpPart, Model
from icl_dual.models.tokenization import Tokens
from icl_dual.patches.exact import check_parts, check_stream
from icl_dual.prompts import Prompts
from icl_dual.torch_utils import at_least_float32, pad_right, vector_norm

STAY = 0.01
"""How much `closest_through_norm` prefers what the norm gives now, in units of the median of γ².

Measured on Gemma 3 270M (`subj`, 8 demonstrations, 32 queries): on 24 held-out queries, the KL divergence of the
patched model from in-context learning is .24 nats with .01, .40 with .1, .89 with 0, and 9.0 without a patch."""

BISECTIONS = 100
"""Halvings of the interval that holds μ: as many as float64 can tell apart."""


class LayerRows(NamedTuple):
    """What one layer leaves at the recorded tokens of some queries, in float64."""

    hidden: Float[Tensor, "query d_hidden"]
    """h: the input of the down projection."""
    lack: Float[Tensor, "query d_model"]
    """What the block's output lacks: the in-context one minus its own."""
    target: Float[Tensor, "query d_model"]
    """What the output of the down projection lacks: with a norm after it, for the closest output that the norm can
    give (`closest_through_norm`); else the same as `lack`."""


def run_over_queries(model: Model, prompts: Prompts, form: MlpForm, batch_size: int) -> Iterator[list[LayerRows]]:
    """Run queries in context and alone, in batches.

    Args:
        model: the model to run.
        prompts: the demonstrations and the queries.
        form: what its MLPs are made of.
        batch_size: the largest number of queries to run at once.

    Yields:
        What each layer leaves, for each batch.

    Raises:
        UnsupportedModelError: the blocks are not sums of a residual stream, attention and an MLP, or the model cannot
            run queries apart from their demonstrations.
        MemoryError: a single query does not fit in memory.
    """
    shared, zero_shot = common_query_prefix(prompts), prompts.zero_shot()
    check_rope_scaling(model, prompts, shared)
    alone = [zero_shot.prefix + suffix for suffix in zero_shot.suffixes]
    limit = BatchLimit(batch_size if model.rope_scaling_threshold is None else 1)  # it rotates by the longest row
    streams: list[Tensor] = []

    def keep_stream(layer: int, stream: Tensor, rows: BatchRows) -> None:
        if layer == 0:  # of this batch, or of one that did not fit in memory
            streams.clear()
        streams.append(at_least_float32(rows.at_last(stream)))

    with torch.no_grad():
        check_pass(model, prompts)
        context, _ = run_prefix(model, prompts.prefix + shared)
        rows = [suffix[len(shared) :] for suffix in prompts.suffixes]
        for batch in run_queries(model, rows, 1, context, limit, on_residual=keep_stream):
            reader = _Reader(model, form, [alone[row] for row in batch.rows], streams)
            yield reader.run()


@dataclass
class _Reader:
    """Reads what each layer lacks, in a pass over queries alone that gets the in-context stream after every layer."""

    model: Model
    form: MlpForm
    rows: list[Tokens]
    streams: list[Float[Tensor, "query d_model"]]
    """The in-context residual stream at the recorded token, after every layer."""

    def run(self) -> list[LayerRows]:
        """Return what each layer leaves."""
        tokens = pad_right(self.rows, device=self.model.device)
        self.last = torch.tensor([len(row) - 1 for row in self.rows], device=self.model.device)
        self.parts: dict[MlpPart, tuple[Tensor, Tensor]] = {}
        self.scale = torch.zeros(0)
        self.layers: list[LayerRows] = []
        self.model.run(
            tokens,
            read=self.last[:, None],
            on_middle=self._on_middle,
            on_mlp=self._on_mlp,
            on_residual=self._on_residual,
        )
        return self.layers

    def _at_last(self, activations: Tensor) -> Float[Tensor, "query width"]:
        """Return each query's activation at the recorded token, in float64. OPT lays all tokens along one axis."""
        by_query = activations.reshape(len(self.rows), -1, activations.shape[-1])
        return by_query[torch.arange(len(self.rows), device=self.last.device), self.last].double()

    def _on_middle(self, layer: int, middle: Tensor) -> None:
        self.middle = self._at_last(middle)

    def _on_mlp(self, layer: int, part: MlpPart, x: Tensor, output: Tensor) -> None:
        self.parts[part] = self._at_last(x), self._at_last(output)
        if part == "scale":
            read, written = (side.double().flatten(0, -2) for side in (x, output))
            self.scale = (read * written).sum(dim=0) / read.square().sum(dim=0)

    def _on_residual(self, layer: int, stream: Tensor) -> Tensor:
        """Keep what the layer lacks, and return the stream as the layers below an exact patch would leave it."""
        check_parts(self.model, layer, self.form, list(self.parts))
        output, in_context = self._at_last(stream), self.streams[layer].double()
        hidden, written = self.parts["out"]
        lack = target = in_context - output
        if self.form.shift == "scale":
            normalised, scaled = self.parts["scale"]
            closest = closest_through_norm(in_context - self.middle, self.scale, normalised)
            target = (closest - normalised) * written.square().mean(dim=-1, keepdim=True).sqrt()
            written = scaled
        errors = vector_norm(self.middle + written - output, dim=-1) / vector_norm(output, dim=-1).clamp_min(1e-30)
        check_stream(self.model, layer, errors.max().item())
        self.layers.append(LayerRows(hidden, lack, target))
        self.parts = {}
        replaced = stream.clone()
        replaced[torch.arange(len(self.rows), device=self.last.device), self.last] = self.streams[layer].to(stream)
        return replaced


def closest_through_norm(
    wanted: Float[Tensor, "query d_model"], scale: Float[Tensor, " d_model"], normalised: Float[Tensor, "query d_model"]
) -> Float[Tensor, "query d_model"]:
    """Return what an RMSNorm should give before its scale, for its output to come closest to a wanted one.

    An RMSNorm gives γ ⊙ n, with n of mean square 1. Returned is

        n* = argmin ‖γ ⊙ n − wanted‖² + κ ‖n − normalised‖²  over n of mean square 1,    κ = STAY · median of γ².

    The second term keeps dimensions where γ is small, which write little, at what they are. The solution is
    n* = (γ ⊙ wanted + κ normalised) / (γ² + κ + μ), where μ above −min(γ² + κ) gives it a mean square of 1.

    Args:
        wanted: what the norm should write.
        scale: its scale γ.
        normalised: n as it is.
    """
    squares = scale.square()
    kappa = STAY * squares.median()
    above, below = scale * wanted + kappa * normalised, squares + kappa
    low = -below.min().expand(len(wanted), 1)
    high = above.square().mean(dim=-1, keepdim=True).sqrt()  # there, the mean square is at most 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_long = (above / (below + middle)).square().mean(dim=-1, keepdim=True) > 1
        low, high = torch.where(is_long, middle, low), torch.where(is_long, high, middle)
    return above / (below + high)
