"""The exact patch: a change of MLP weights under which a query alone gives what it gives after the demonstrations.

Of every block of a decoder, the MLP is the last to write into the residual stream, and it reads one token at a time. At
the recorded token, call

- u: the stream before the block, plus what attention writes (before the MLP, where it follows attention);
- z: the vector that the MLP's input projections read, and W z what they give (bias included);
- h: the vector that the down projection reads, and m what the MLP writes, so that the block's output is u + m.

A C marks the values of the in-context pass: u_C, z_C, h_C, m_C. Demonstrations reach the token by attention alone. They
turn u into u_C, and thereby z into z_C. Two changes of weights do the same without demonstrations:

1. Each input projection gets ΔW = W (z_C − z) ⊗ z / ‖z‖², so (W + ΔW) z = W z_C. The hidden activation becomes h_C, and
   what the MLP writes becomes m_C. (ΔW is the change of least Frobenius norm that does this.)
2. What the residual sum lacks, u_C − u, is added to what the MLP writes. How depends on the architecture:
   the bias of the down projection, Δb = u_C − u; without a bias, the down projection, ΔW = (u_C − u) ⊗ h_C / ‖h_C‖²;
   with an RMSNorm between the MLP and the residual sum, its scale, Δγ = (u_C − u) / r, with r the normalised vector.

The block's output at the token is then u + m_C + (u_C − u) = u_C + m_C: that of the in-context pass. Nothing was said
of how u and z came about. So it holds for blocks where the MLP follows attention and where both read the same input,
for any norm in front of the MLP or none, and for positions that differ between the two prompts.

The change is one of weights, so it acts on the query's earlier tokens too, wherever their z is not orthogonal to that
of the recorded token. They reach the recorded token through attention in later layers. This is why layers are patched
in sequence: u and z of a layer are measured in a pass over the query in which all layers below are patched, for all
tokens. Attention is causal, and a patch of a layer changes nothing below it, so no patch invalidates an earlier one. By
induction over layers, the stream at the recorded token is the in-context one after every layer, and so are the logits.
Earlier tokens get other streams than in context, and later tokens too: the patch is exact for one query at one token.

Two passes are enough: one in context, which leaves u, W z and the block's output of the recorded token at every layer;
and one over the query, in which each layer's patch is computed and applied as the layer runs. In the second pass every
layer's output is compared with the in-context one, and a model that does not fit the equations above is refused.

Dherin et al. (2025, arXiv 2507.16003 and 2512.11255) showed this for MLPs with biases. Goldwaser et al. (2025, arXiv
2511.17864) gave the forms for gated MLPs, down projections and norms after the block. It holds by construction, for any
weights and any context. It is no evidence that the model descends a gradient.
"""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import checked
from icl_dual.captures.shared_prefix import TOLERANCE
from icl_dual.field_docs import document_fields
from icl_dual.models import LowRank, MlpForm, MlpPart, Model, UnsupportedModelError
from icl_dual.models.journal import exclusive
from icl_dual.models.mlp import MlpChanges
from icl_dual.models.tokenization import Tokens
from icl_dual.patches.patch import Patch, check_tokens
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.results import check_values
from icl_dual.torch_utils import at_least_float32, checked_index, vector_norm


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class ExactPatch(Patch):
    """The change of MLPs under which one query alone gives its in-context residual stream at the recorded position.

    It holds for this query at this position. Inside `applied`, a run of other tokens or positions raises a ValueError.
    """

    query: tuple[int, ...]
    """The token ids of the zero-shot prompt, start token included. The last one is at the recorded position."""
    prompt: tuple[int, ...]
    """The token ids of the in-context prompt."""
    stream: Float[Tensor, "layer d_model"]
    """The in-context residual stream after each layer, at the last token of `prompt`."""
    residual: float
    """The largest relative difference, over layers, between the residual stream of the patched query and the in-context
    one, at the recorded position."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self, "query", "prompt")
        check_values(self, "stream")
        check_values(self, "residual", low=0)

    @property
    def position(self) -> int:
        """The position in `query` at which the patch is exact: the last one."""
        return len(self.query) - 1

    @checked
    @contextmanager
    def applied(self, model: Model) -> Generator[Model]:
        """Yield the model with the patch; afterwards it is as it was, bit for bit, also after an exception.

        The query runs once, to check that the patch is exact. A large change of a norm's scale blows up rounding, so it
        may not be exact on another machine.

        Raises:
            ValueError: the patch belongs to another model, to other weights of it, or to another precision; or it does
                not give the in-context residual stream. Runs inside the block raise one for a query that the patch does
                not fit.
        """
        with super().applied(model):
            _check_exact(model, self)
            yield model

    def changes(self) -> MlpChanges:
        """Return the changes as a run of the model takes them; they refuse other tokens and positions."""
        return MlpChanges(self.factors, self.bias, self.scale, self.query, self.model)


@exclusive
def _check_exact(model: Model, patch: ExactPatch) -> None:
    """Check that the query of an applied patch has the in-context residual stream.

    Raises:
        ValueError: it has another one.
    """
    residuals: list[float] = []

    def compare(layer: int, stream: Tensor) -> None:
        residuals.append(relative_difference(last_token(stream), patch.stream[layer].to(stream.device)))

    tokens = torch.tensor([patch.query], device=model.device)
    with torch.no_grad():
        model.run(tokens, read=torch.tensor([[patch.position]], device=model.device), on_residual=compare)
    if not all(residual <= TOLERANCE[model.dtype] for residual in residuals):
        raise ValueError(
            f"expected a patch that gives the in-context residual stream, got relative differences of up to "
            f"{max(residuals):.1g} ({patch.residual:.1g} where it was built): the model has other hooks, or this "
            "machine rounds in another way, build the patch here"
        )


@checked
@exclusive
def build_exact_patch(model: Model, prompts: Prompts, query: int = 0) -> ExactPatch:
    """Build the change of MLP weights that replaces the demonstrations for one query, exactly.

    It costs one pass over the in-context prompt and one over the query.

    Args:
        model: the model; a bridge with dense MLPs.
        prompts: the demonstrations and the queries.
        query: the index of the query; negative from the end.

    Returns:
        The patch. Inside `patch.applied(model)`, the zero-shot prompt's logits at its last position are the in-context
        ones.

    Raises:
        IndexError: there is no such query.
        PromptError: the prompts are incomplete, or do not fit into the model's context.
        ValueError: the input of an MLP is zero at the recorded position, so that no change of its weights acts.
        UnsupportedModelError: the model's MLPs are mixtures of experts or have no hooks, or its blocks are not sums of
            a residual stream, attention and an MLP.

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
        >>> patch = icl_dual.build_exact_patch(model, prompts)
        >>> patch.rank, patch.query, patch.position
        (1, (0, 9, 10), 2)
        >>> with torch.no_grad():
        ...     in_context = model.run(torch.tensor([[0, 5, 6, 7, 8, 9, 10]]))[0, -1]
        ...     with patch.applied(model):
        ...         patched = model.run(torch.tensor([[0, 9, 10]]))[0, -1]
        >>> torch.allclose(patched, in_context, atol=1e-5)
        True
    """
    check_prompts(model, prompts)
    index = checked_index("query", query, len(prompts.queries))
    prompt, alone = prompt_pair(prompts, index)
    recorder = Recorder(model)
    recorder.run(prompt)
    patcher = _Patcher(model, recorder)
    with torch.no_grad():
        model.run(
            torch.tensor([alone], device=model.device),
            read=torch.tensor([[len(alone) - 1]], device=model.device),
            on_middle=patcher.on_middle,
            on_mlp=patcher.on_mlp,
            on_residual=patcher.on_residual,
        )
    return ExactPatch(
        model=model.name,
        fingerprint=model.fingerprint(),
        factors={part: _stacked(*factors) for part, factors in patcher.factors.items()},
        bias=torch.stack(patcher.bias) if patcher.bias else None,
        scale=torch.stack(patcher.scale) if patcher.scale else None,
        query=alone,
        prompt=prompt,
        stream=torch.stack(recorder.streams),
        residual=max(patcher.residuals),
    )


def prompt_pair(prompts: Prompts, query: int) -> tuple[Tokens, Tokens]:
    """Return the token ids of one query's in-context prompt and of its zero-shot prompt."""
    zero_shot = prompts.zero_shot()
    return (*prompts.prefix, *prompts.suffixes[query]), (*zero_shot.prefix, *zero_shot.suffixes[query])


def last_token(activations: Tensor) -> Float[Tensor, " d"]:
    """Return the last token's activation in a pass over one row, in float32 at least."""
    return at_least_float32(activations.detach().flatten(0, -2)[-1])  # OPT lays all tokens along one axis


def checked_input(model: Model, layer: int, part: MlpPart, x: Float[Tensor, " d_in"]) -> Float[Tensor, " d_in"]:
    """Return the input of a projection, on which a change of its weights must be able to act.

    Raises:
        ValueError: it is zero, or so small that x / ‖x‖² overflows.
    """
    if not (x.double() / x.double().square().sum()).to(x).isfinite().all():
        name = "the down projection" if part == "out" else "the MLP"
        raise ValueError(
            f"{model.name}, layer {layer}: expected an input of {name} other than zero, got one of norm "
            f"{vector_norm(x.double()):.3g} at the recorded position: no change of weights acts on it, use another "
            "query"
        )
    return x


def checked_ratio(
    model: Model, layer: int, lack: Float[Tensor, " d_model"], normalised: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """Return the change of a norm's scale that adds `lack`: lack / normalised, and 0 where nothing lacks.

    Raises:
        ValueError: the norm gives zero in a dimension where something lacks.
    """
    ratio = torch.where(lack == 0, torch.zeros_like(lack), lack / normalised)
    if not ratio.isfinite().all():
        raise ValueError(
            f"{model.name}, layer {layer}: expected what the MLP writes to be other than zero in every dimension, got "
            "zeros at the recorded position: no change of the norm's scale acts on them, use another query"
        )
    return ratio


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Return ‖got − expected‖ / ‖expected‖, computed in float64; 0 where both are zero."""
    difference, norm = vector_norm(got.double() - expected.double()).item(), vector_norm(expected.double()).item()
    return difference / norm if norm else difference


class Recorder:
    """What a pass over one prompt leaves at the last token, by layer, in float32 at least.

    Raises:
        UnsupportedModelError: an MLP has no hooks, or layers differ in what their MLPs are made of.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.form = common_form(model)
        self.middle: list[Float[Tensor, " d_model"]] = []
        """u: the residual stream before the layer, plus what attention writes."""
        self.outputs: dict[tuple[int, MlpPart], Float[Tensor, " d_out"]] = {}
        """The output of each part of the MLP, by layer and part."""
        self.streams: list[Float[Tensor, " d_model"]] = []
        """The residual stream after the layer."""

    def run(self, tokens: Tokens) -> None:
        """Run a prompt.

        Raises:
            UnsupportedModelError: the layers' outputs are not u + m.
        """
        for recorded in (self.middle, self.outputs, self.streams):
            recorded.clear()

        def keep_middle(layer: int, middle: Tensor) -> None:
            self.middle.append(last_token(middle))

        def keep_mlp(layer: int, part: MlpPart, x: Tensor, output: Tensor) -> None:
            self.outputs[layer, part] = last_token(output)

        def keep_stream(layer: int, stream: Tensor) -> None:
            self.streams.append(last_token(stream))
            self._check_sum(layer)

        ids = torch.tensor([tokens], device=self.model.device)
        read = torch.tensor([[len(tokens) - 1]], device=self.model.device)
        with torch.no_grad():
            self.model.run(ids, read=read, on_middle=keep_middle, on_mlp=keep_mlp, on_residual=keep_stream)

    def _check_sum(self, layer: int) -> None:
        """Check that a layer's output is u + m, and that every part of its MLP ran."""
        check_parts(self.model, layer, self.form, [part for at, part in self.outputs if at == layer])
        written = self.outputs[layer, "scale" if self.form.shift == "scale" else "out"]
        error = relative_difference(self.middle[layer] + written, self.streams[layer])
        check_stream(self.model, layer, error)


def check_parts(model: Model, layer: int, form: MlpForm, ran: Collection[MlpPart]) -> None:
    """Check that every part of a layer's MLP ran.

    Raises:
        UnsupportedModelError: a part did not, as where the architecture computes with the weights without the module.
    """
    parts: tuple[MlpPart, ...] = (*form.inputs, "out")
    if missing := [part for part in parts if part not in ran]:
        raise UnsupportedModelError(
            f"{model.architecture}, layer {layer}: expected an MLP in which the modules of {parts} run, got {missing} "
            "that do not: its weights cannot be changed, use another model"
        )


def check_stream(model: Model, layer: int, error: float) -> None:
    """Check a relative difference between what a layer's output should be and what it is.

    Raises:
        UnsupportedModelError: it is larger than rounding.
    """
    if not error <= TOLERANCE[model.dtype]:
        raise UnsupportedModelError(
            f"{model.architecture}, layer {layer}: expected a block that adds what attention and MLP write to the "
            f"residual stream, got another output (relative difference {error:.2g}): its context is no change of "
            "weights in this form, use another model"
        )


def common_form(model: Model) -> MlpForm:
    """Return what the MLPs of all layers are made of."""
    forms = [model.backend.mlp_form(layer) for layer in range(model.n_layers)]
    if different := [layer for layer, form in enumerate(forms) if form != forms[0]]:
        raise UnsupportedModelError(
            f"{model.architecture}: expected MLPs of one form, got {forms[0]} in layer 0 and {forms[different[0]]} in "
            f"layer {different[0]}: use another model"
        )
    return forms[0]


@dataclass
class _Patcher:
    """Computes each layer's patch as the layer runs, from a pass over the query, and applies it to all tokens."""

    model: Model
    context: Recorder
    """What the in-context pass left."""
    middle: Tensor = field(init=False)
    """u of the layer that runs."""
    factors: dict[MlpPart, tuple[list[Tensor], list[Tensor]]] = field(
        default_factory=dict[MlpPart, tuple[list[Tensor], list[Tensor]]]
    )
    """By part, what its change writes and what it reads, by layer."""
    bias: list[Tensor] = field(default_factory=list[Tensor])
    """The change of the bias, by layer."""
    scale: list[Tensor] = field(default_factory=list[Tensor])
    """The change of the scale, by layer."""
    residuals: list[float] = field(default_factory=list[float])
    """The relative difference of the stream from the in-context one, by layer."""

    def on_middle(self, layer: int, middle: Tensor) -> None:
        self.middle = last_token(middle)

    def on_mlp(self, layer: int, part: MlpPart, x: Tensor, output: Tensor) -> Tensor | None:
        """Patch a part of an MLP."""
        lack = self.context.middle[layer] - self.middle
        shift = self.context.form.shift
        if part in self.context.form.inputs:  # W (z_C − z) is the difference of the outputs: the bias cancels
            return self._patch_matrix(layer, part, x, output, self.context.outputs[layer, part] - last_token(output))
        if part == shift == "out":
            return self._patch_matrix(layer, part, x, output, lack)
        if part == "out" and shift == "bias":
            self.bias.append(lack)
        elif part == shift == "scale":
            self.scale.append(checked_ratio(self.model, layer, lack, last_token(x)))
        else:
            return None
        return self._apply(layer, part, x, output)

    def on_residual(self, layer: int, stream: Tensor) -> None:
        """Compare the stream after a layer with the in-context one."""
        self.residuals.append(relative_difference(last_token(stream), self.context.streams[layer]))
        check_stream(self.model, layer, self.residuals[-1])

    def _patch_matrix(self, layer: int, part: MlpPart, x: Tensor, output: Tensor, change: Tensor) -> Tensor | None:
        """Change a matrix by change ⊗ x / ‖x‖², x being its input at the last token."""
        read = checked_input(self.model, layer, part, last_token(x)).double()
        right = (read / read.square().sum()).to(change)
        left_by_layer, right_by_layer = self.factors.setdefault(part, ([], []))
        left_by_layer.append(change)
        right_by_layer.append(right)
        return self._apply(layer, part, x, output)

    def _apply(self, layer: int, part: MlpPart, x: Tensor, output: Tensor) -> Tensor | None:
        """Return a part's output with the layer's changes, by the code that runs when the patch is applied."""
        factors = {p: LowRank(*(f[-1][None, :, None] for f in pair)) for p, pair in self.factors.items()}
        bias, scale = (vectors[-1][None] if vectors else None for vectors in (self.bias, self.scale))
        return MlpChanges(factors, bias, scale).apply(0, part, x, output)


def _stacked(left: list[Tensor], right: list[Tensor]) -> LowRank:
    """Return rank-one factors of all layers."""
    return LowRank(torch.stack(left).unsqueeze(-1), torch.stack(right).unsqueeze(-1))
