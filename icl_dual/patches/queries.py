"""The pass over queries that shared patches are fitted to: what each block lacks without demonstrations.

At the recorded token of a query, the in-context pass leaves the residual stream after every layer. The pass over the
query alone then puts it back after every layer: each layer reads, at the recorded token, what it would read if the
layers below were patched exactly. There, what the block lacks is its in-context output minus its own.

What queries share runs once (`icl_dual.captures.shared_prefix`); the rest of each query runs once in context and once
alone, in batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.captures.capture import check_pass
from icl_dual.captures.shared_prefix import (
    BatchLimit,
    check_rope_scaling,
    common_query_prefix,
    run_prefix,
    run_queries,
)
from icl_dual.models import MlpForm, MlpPart, Model
from icl_dual.models.tokenization import Tokens
from icl_dual.patches.exact import check_parts, check_stream
from icl_dual.prompts import Prompts
from icl_dual.torch_utils import at_least_float32, pad_right


class LayerRows(NamedTuple):
    """What one layer leaves at the recorded tokens of some queries, in float64."""

    hidden: Float[Tensor, "query d_hidden"]
    """h: the input of the down projection."""
    lack: Float[Tensor, "query d_model"]
    """What the block's output lacks: the in-context one minus its own."""
    target: Float[Tensor, "query d_model"]
    """What the output of the down projection lacks."""
    normalised: Float[Tensor, "query d_model"] | None
    """With the target added, what the norm after the MLP multiplies with its scale; `None` without a norm."""
    rest: Float[Tensor, "query d_model"] | None
    """With the target added, what the block's output still lacks; `None` without a norm."""


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

    def keep_stream(layer: int, stream: Tensor, rows: Sequence[int], last: Tensor) -> None:
        if layer == 0:  # of this batch, or of one that did not fit in memory
            streams.clear()
        streams.append(at_least_float32(stream[torch.arange(len(rows), device=last.device), last]))

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
        callbacks: dict[str, Callable] = {
            "on_middle": self._on_middle,
            "on_mlp": self._on_mlp,
            "on_residual": self._on_residual,
        }
        self.model.run(tokens, read=self.last[:, None], **callbacks)
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
        lack, target, normalised, rest = in_context - output, in_context - output, None, None
        if self.form.shift == "scale":
            wanted = in_context - self.middle
            normalised, target = _through_norm(wanted, self.scale, written)
            rest = wanted - self.scale * normalised
            written = self.parts["scale"][1]
        errors = (self.middle + written - output).norm(dim=-1) / output.norm(dim=-1).clamp_min(1e-30)
        check_stream(self.model, layer, errors.max().item())
        self.layers.append(LayerRows(hidden, lack, target, normalised, rest))
        self.parts = {}
        replaced = stream.clone()
        replaced[torch.arange(len(self.rows), device=self.last.device), self.last] = self.streams[layer].to(stream)
        return replaced


def _through_norm(
    wanted: Float[Tensor, "query d_model"], scale: Float[Tensor, " d_model"], written: Float[Tensor, "query d_model"]
) -> tuple[Float[Tensor, "query d_model"], Float[Tensor, "query d_model"]]:
    """Return what the norm should give before its scale, and what the down projection lacks for that.

    Args:
        wanted: what the MLP should write after the norm.
        scale: the norm's scale.
        written: what the down projection gives.
    """
    direction = torch.where(scale == 0, torch.zeros_like(wanted), wanted / scale)
    normalised = direction / direction.square().mean(dim=-1, keepdim=True).sqrt()
    length = written.square().mean(dim=-1, keepdim=True).sqrt()
    return normalised, normalised * length - written
