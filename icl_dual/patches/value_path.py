"""The context as a change of attention's output projections, of rank one at every layer, for one query.

At the recorded token, let z be a layer's heads' outputs side by side: what W_O reads. In context they would be another
vector. The change of least Frobenius norm with which W_O gives, for z, what it gives for z + δ is

    ΔW_O = (W_O δ) ⊗ z / ‖z‖²,    so that (W_O + ΔW_O) z = W_O (z + δ).

For δ there are two choices (`icl_dual.decomposition` has the terms):

- `direct`: δ = ΔICL, what the demonstrations add to the heads' outputs inside the in-context pass.
- `realised`: δ = z_ICL − z, all that the outputs lack. This is ΔICL plus the inherited update, which is there because
  the query's earlier tokens are not those of the in-context pass.

The change is one of weights, so it acts on the query's earlier tokens, too. So layers are changed in sequence: z is
measured in a pass over the query in which all layers below are changed. The query runs at the positions that it has in
context: its embeddings are the same there. With `realised` at all layers, attention's output at the recorded token is
the in-context one at every layer, by induction, and so are the residual stream and the logits. As with the exact patch
of MLPs (`icl_dual.patches.exact`), this holds by construction.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.arguments import checked
from icl_dual.field_docs import document_fields
from icl_dual.models import Attention, LowRank, Model, UnsupportedModelError
from icl_dual.models.backend import ProjectionName
from icl_dual.models.changes import add_changes
from icl_dual.models.journal import Undo, exclusive
from icl_dual.models.precision import fingerprinted_precision
from icl_dual.patches.exact import relative_difference
from icl_dual.patches.patch import check_model, check_tokens
from icl_dual.patches.relaxed import check_layers, checked_layers, delta_icl_at
from icl_dual.prompts import Prompts
from icl_dual.results import check_axes, check_count, check_range, check_values
from icl_dual.storage import Saved
from icl_dual.torch_utils import at_least_float32, checked_index, to_list, vector_norm

Update = Literal["realised", "direct"]
"""What is added to the heads' outputs: all that they lack, or ΔICL alone."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class ValuePatch(Saved):
    """A change of the output projections, of rank one at each layer, for one query at its positions in context."""

    model: str
    """The name of the model."""
    fingerprint: str
    """The fingerprint of the model's weights that the patch was built for; it begins with their precision."""
    update: Update
    """What is added to the heads' outputs."""
    layers: tuple[int, ...]
    """The layers that change."""
    factors: LowRank
    """ΔW_O by layer; zero in layers that do not change."""
    query: tuple[int, ...]
    """The token ids of the start token and the query."""
    positions: tuple[int, ...]
    """The positions at which these run: those that they have in context."""
    prompt: tuple[int, ...]
    """The token ids of the in-context prompt."""
    residual: float
    """The largest relative difference, over layers, between the attention output of the patched query and the
    in-context one, at the recorded position."""

    def __post_init__(self) -> None:
        n_layers = check_axes(self)["layer"]
        check_values(self, "factors")
        check_values(self, "residual", low=0)
        check_tokens(self, "query", "prompt")
        check_layers(self.layers, n_layers)
        unchanged = [layer for layer in range(n_layers) if layer not in self.layers]
        for side, factor in self.factors._asdict().items():
            check_range(f"factors/{side} of layers that do not change", factor[unchanged], low=0, high=0)
        check_count("positions", len(self.positions), "query", len(self.query))
        check_range("positions", self.positions, low=0, high=len(self.prompt) - 1)
        if (at_positions := tuple(self.prompt[position] for position in self.positions)) != self.query:
            raise ValueError(
                f"expected query as the tokens of prompt at positions, {at_positions}, got {self.query}: take all "
                "three from one run"
            )

    def __repr__(self) -> str:
        precision = fingerprinted_precision(self.fingerprint)
        return (
            f"ValuePatch({self.model!r}, {precision}, {self.update}, {len(self.layers)} layers, "
            f"norm={vector_norm(self.norms):.3g}, residual={self.residual:.1e})"
        )

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        """The Frobenius norm of ΔW_O by layer."""
        return vector_norm(self.factors.singular_values(), dim=-1)

    @checked
    @contextmanager
    def applied(self, model: Model) -> Generator[Model]:
        """Yield the model with the patch; afterwards it is as it was, bit for bit, also after an exception.

        Each output projection adds ΔW_O z to its output, in float32 at least. No weight is written. Run `query` at
        `positions`: the patch is for no other prompt.

        Raises:
            ValueError: the patch belongs to another model, to other weights of it, or to another precision. Runs inside
                the block raise one for other tokens or positions.
        """
        with model.journal.block() as undo:
            _apply(model, self, undo)
            yield model


@exclusive
def _apply(model: Model, patch: ValuePatch, undo: Undo) -> None:
    """Add a patch to every run of a model, until the block ends."""
    check_model(model, patch.model, patch.fingerprint)
    left, right = patch.factors
    add_changes(model, {"W_O": left @ right.mT}, undo)
    undo.set(model, "run_checks", (*model.run_checks, partial(_check_run, model, patch)))


def _check_run(
    model: Model, patch: ValuePatch, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " pos"]
) -> None:
    """Check that a run is of the patch's query at its positions, by the model that it was built for.

    Raises:
        ValueError: it is of other tokens, at other positions, or of another model: momentum changes a model's name.
    """
    query = torch.tensor(patch.query, device=tokens.device)
    fits = tokens.shape[1] == len(query) and bool((tokens == query).all()) and to_list(positions) == [*patch.positions]
    if not fits or model.name != patch.model:
        raise ValueError(
            f"expected the query that the patch of {patch.model!r} was built for, {list(patch.query)} at positions "
            f"{list(patch.positions)}, got {to_list(tokens)} at positions {to_list(positions)} of {model.name!r}: pass "
            "[patch.query] and positions=patch.positions to model.run, or build another patch"
        )


@checked
@exclusive
def build_value_patch(
    model: Model,
    prompts: Prompts,
    query: int = 0,
    *,
    layers: Sequence[int] | None = None,
    update: Update = "realised",
) -> ValuePatch:
    """Build the change of the output projections that replaces the demonstrations for one query.

    Args:
        model: the model; a bridge, without momentum.
        prompts: the demonstrations and the queries, under the `answer` protocol.
        query: the index of the query; negative from the end.
        layers: the layers to change, negative from the end; all by default.
        update: `realised` for all that the heads' outputs lack, which is exact at all layers together; `direct` for
            ΔICL alone.

    Returns:
        The patch. Inside `patch.applied(model)`, `patch.query` at `patch.positions` has the in-context logits at its
        last token, where all layers have the realised update.

    Raises:
        IndexError: there is no such query or layer.
        PromptError: the prompts are incomplete or have no demonstrations, or do not fit into the model's context.
        ValueError: the prompts are under the `reference` protocol, or a layer's heads write zero at the recorded
            position, so that no change of W_O acts.
        UnsupportedModelError: the model's attention cannot be recomputed from its hooks, it has momentum, or it is a
            `HookedTransformer`.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> model = tiny_model()
        >>> prompts = icl_dual.Prompts(
        ...     start=(0,),
        ...     demonstrations=((5, 6), (7, 8)),
        ...     demonstration_label_lengths=(1, 1),
        ...     queries=((9, 10),),
        ...     labels=((6,), (8,)),
        ...     gold=(0,),
        ... )
        >>> patch = icl_dual.build_value_patch(model, prompts)
        >>> patch.query, patch.positions
        ((0, 9, 10), (0, 5, 6))
        >>> with torch.no_grad():
        ...     in_context = model.run(torch.tensor([patch.prompt]))[0, -1]
        ...     with patch.applied(model):
        ...         patched = model.run(torch.tensor([patch.query]), positions=torch.tensor(patch.positions))[0, -1]
        >>> torch.allclose(patched, in_context, atol=1e-5)
        True
    """
    changed = checked_layers(model, prompts, layers)
    index = checked_index("query", query, len(prompts.queries))
    if not model.supports_projection_deltas:
        raise UnsupportedModelError(
            f"{model.architecture}: expected a TransformerBridge, in which output projections are modules of their "
            f"own, got a {type(model.wrapped).__name__}: load the model as a bridge (icl_dual.load_model)"
        )
    if model.momentum is not None:
        raise UnsupportedModelError(
            f"expected a model without momentum, got {model.name}: the query runs at positions with a gap"
        )
    suffix, n_prefix = prompts.suffixes[index], len(prompts.prefix)
    alone, prompt = (*prompts.start, *suffix), (*prompts.prefix, *suffix)
    positions = (*range(len(prompts.start)), *range(n_prefix, n_prefix + len(suffix)))
    with torch.no_grad():
        context = _Context.of(model, prompt)
        of_query = replace(prompts, queries=(suffix,), gold=(prompts.gold[index],), zero_shot_queries=())
        delta_icl = delta_icl_at(model, of_query) if update == "direct" else None
        patcher = _Patcher(model, context, changed, delta_icl)
        _run(model, alone, positions, projection_deltas={"O": patcher.change}, on_output=patcher.on_output)
    return ValuePatch(
        model=model.name,
        fingerprint=model.fingerprint(),
        update=update,
        layers=changed,
        factors=LowRank(*(torch.stack(by_layer).unsqueeze(-1) for by_layer in (patcher.left, patcher.right))),
        query=alone,
        positions=positions,
        prompt=prompt,
        residual=max(patcher.residuals),
    )


def _run(model: Model, tokens: tuple[int, ...], positions: Sequence[int], **callbacks: Any) -> None:
    """Run one prompt."""
    ids = torch.tensor([tokens], device=model.device)
    read = torch.tensor([[len(tokens) - 1]], device=model.device)
    model.run(ids, positions=torch.tensor(positions), read=read, **callbacks)


@dataclass
class _Context:
    """What the in-context pass leaves at the recorded token, by layer, in float32 at least."""

    z: list[Float[Tensor, " d_z"]] = field(default_factory=list[Tensor])
    """The heads' outputs, side by side."""
    outputs: list[Float[Tensor, " d_model"]] = field(default_factory=list[Tensor])
    """The attention output."""

    @classmethod
    def of(cls, model: Model, prompt: tuple[int, ...]) -> "_Context":
        """Return what a pass over a prompt leaves."""
        context = cls()

        def keep_z(layer: int, attention: Attention) -> None:
            context.z.append(at_least_float32(attention.z[0, -1].flatten()))

        def keep_output(layer: int, output: Tensor) -> None:
            context.outputs.append(at_least_float32(output.flatten(0, -2)[-1]))

        _run(model, prompt, range(len(prompt)), on_attention=keep_z, on_output=keep_output)
        return context


class _Patcher:
    """Computes each layer's change as the layer runs on the query, and applies it to all tokens."""

    def __init__(
        self, model: Model, context: _Context, layers: tuple[int, ...], delta_icl: Float[Tensor, "layer d_z"] | None
    ) -> None:
        self.model, self.context, self.layers, self.delta_icl = model, context, layers, delta_icl
        self.W_O = at_least_float32(model.output_projections()[0].flatten(1, 2))
        """By layer, what each of the heads' outputs writes: `[layer d_z d_model]`."""
        self.left: list[Tensor] = []
        """What each layer's change writes."""
        self.right: list[Tensor] = []
        """What each layer's change reads."""
        self.residuals: list[float] = []
        """The relative difference of each layer's attention output from the in-context one."""

    def change(self, layer: int, kind: ProjectionName, x: Tensor) -> Tensor:
        """Return what the layer's change adds for each token."""
        z = at_least_float32(x.flatten(0, -2)[-1])
        if layer in self.layers:
            square = z.double().square().sum()
            if not square > 0:
                raise ValueError(
                    f"{self.model.name}, layer {layer}: expected heads that write something other than zero at the "
                    "recorded position, got zeros: no change of W_O acts on them, use another query"
                )
            delta = self.context.z[layer] - z if self.delta_icl is None else self.delta_icl[layer].to(z)
            self.left.append(delta @ self.W_O[layer])
            self.right.append((z.double() / square).to(z))
        else:
            self.left.append(torch.zeros_like(self.W_O[layer, 0]))
            self.right.append(torch.zeros_like(z))
        return (at_least_float32(x) @ self.right[layer]).unsqueeze(-1) * self.left[layer]

    def on_output(self, layer: int, output: Tensor) -> None:
        """Compare attention's output with the in-context one."""
        expected = self.context.outputs[layer]
        self.residuals.append(relative_difference(at_least_float32(output.flatten(0, -2)[-1]), expected))
