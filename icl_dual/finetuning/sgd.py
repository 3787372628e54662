"""The paper's finetuning: SGD on key and value projections → `WeightDelta`, applied and taken off again.

One demonstration a step, in the order in which the in-context prompt shows them, one epoch, plain SGD at a constant
learning rate. Weights and biases of the key and value projections move, nothing else does, and the model comes back
bit for bit.

What others have set beside it: the loss of the label word alone (Shen et al., 2024); one step on all demonstrations,
from whose gradients equations 7–9 read the dual form; each layer trained by its own loss, which lets no layer know of
those above it, as a forward pass does not (layer-causal, Deutch et al., 2024); keys or values alone; all of attention.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_dual import dual
from icl_dual.finetuning.weight_delta import (
    PAPER_FINETUNING,
    Factors,
    FinetuneConfig,
    WeightDelta,
    restored,
    trained_weights,
)
from icl_dual.models import ProjectionName, Model, OnTensor, Projection, UnsupportedModelError, Weight
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.torch_utils import at_least_float32

EXPLODED_LOSS = 3.0
"""A loss above this many times log(d_vocab), the loss of knowing nothing, is an explosion; or above this many times the
first step's, for a model that begins with knowing less."""

EXPLODED_WEIGHTS = 10.0
"""So is a change of weights this many times as large as the weights: behind a norm, it need not show in the loss."""

READOUT_TOKENS = 512
"""Layers are read out together up to so many tokens: each reading takes the whole unembedding through memory."""


class DivergedError(RuntimeError):
    """Finetuning ran away: its loss or its weights are no longer finite, or its loss exploded."""


def finetune(
    model: Model,
    prompts: Prompts,
    *,
    lr: float,
    config: FinetuneConfig = PAPER_FINETUNING,
    factors: bool = False,
    progress: bool = True,
) -> WeightDelta:
    """Finetune on the demonstrations the way Dai et al. (2023) do, or as others have set beside it.

    Args:
        model: what to finetune, with its momentum where it has any; comes back as it was.
        prompts: whose demonstrations to train on, each behind the start token and without a separator.
        lr: the learning rate of SGD.
        config: the loss, the method and the trained projections. One `full-batch` step on the sum of the
            demonstrations' losses is, to first order, as long as the steps of `sgd` together. Under `layer-causal`,
            gradients stop at every layer's input, and its output is read out by the final norm and the unembedding,
            which stay as they are.
        factors: keep the outer products that the delta of keys and values is the sum of, and check that it is.
        progress: show a progress bar.

    Raises:
        ValueError: lr is not a positive number, there are no demonstrations, or none of one's tokens can be predicted,
            an option is unknown, or factors are asked for where keys and values do not both move.
        PromptError: the prompts are not whole, or the model cannot read them.
        DivergedError: the loss or the weights exploded or are no numbers; says at which step and lr.
        UnsupportedModelError: a step's factors do not make up its gradient (says at which layer), or a layer's output
            is not read out by the final norm and the unembedding alone (`layer-causal`).
    """
    check_arguments(model, prompts, lr)
    if factors and config.trained not in ("key-value", "attention"):
        raise ValueError(
            f"expected keys and values to be trained where factors are kept, got trained={config.trained!r}"
        )
    weights = trained_weights(model, config.trained)
    parameters = [weight.parameter for by_layer in weights.values() for weight in by_layer]
    losses: list[float] = []
    training: dict[str, list[Tensor]] = {"q": [], "k": []}
    fingerprint = model.fingerprint()
    recorder = _FactorRecorder(model, lr) if factors else None
    with restored(parameters) as before, only_trained(model, parameters):
        descent = _Descent(model, parameters, before, lr, whole=config.method == "full-batch")
        steps = zip(prompts.training_sequences, prompts.demonstration_label_lengths, strict=True)
        total = len(prompts.training_sequences)
        for step, (tokens, label_length) in enumerate(
            tqdm(steps, total=total, desc=f"finetuning, lr {lr:g}", disable=not progress, unit="step", leave=False), 1
        ):
            n_targets = label_length if config.loss == "label" else len(tokens)
            for parameter in parameters:
                parameter.grad = None
            local = config.method == "layer-causal"
            value, q, k = _backward(model, prompts.start, tokens, n_targets, local=local, recorder=recorder)
            losses.append(value)
            training["q"].append(q)
            training["k"].append(k)
            if recorder is not None:
                recorder.check(step)
            change = descent.step(last=step == total)
            if (error := divergence(model, losses, change, total, lr)) is not None:
                raise error
        deltas = _deltas(model, weights, before)
    return WeightDelta(
        model=model.name,
        fingerprint=fingerprint,
        lr=lr,
        config=config,
        **deltas,
        demonstrations=[list(tokens) for tokens in prompts.training_sequences],
        losses=torch.tensor(losses, dtype=torch.float64),
        training_q=torch.cat(training["q"], dim=1),
        training_k=torch.cat(training["k"], dim=1),
        factors=None if recorder is None else recorder.factors(deltas["W_K"], deltas["W_V"]),
    )


def divergence(model: Model, losses: Sequence[float], change: float, total: int, lr: float) -> DivergedError | None:
    """What is wrong after the step whose loss is the last, if anything."""
    most = EXPLODED_LOSS * max(math.log(model.d_vocab), losses[0])
    if math.isfinite(losses[-1]) and losses[-1] <= most and change <= EXPLODED_WEIGHTS:
        return None
    return DivergedError(
        f"finetuning diverged at step {len(losses)} of {total} with lr={lr:g}: loss {losses[-1]:.3g} (first step: "
        f"{losses[0]:.3g}), weights changed by {change:.3g} times their own norm. Use a smaller rate"
    )


def check_arguments(model: Model, prompts: Prompts, lr: float) -> None:
    check_prompts(model, prompts)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"expected a learning rate above 0, got {lr}")
    if not prompts.training_sequences:
        raise ValueError("expected demonstrations to finetune on, got none")
    if short := [tokens for tokens in prompts.training_sequences if len(prompts.start) + len(tokens) < 2]:
        raise ValueError(f"expected demonstrations with a token that others come before, got {short[0]}")


class _Descent:
    """Plain gradient descent: a step for each demonstration's gradient, or one step for all of them together."""

    def __init__(
        self, model: Model, parameters: list[nn.Parameter], before: list[Tensor], lr: float, *, whole: bool
    ) -> None:
        self.parameters, self.before, self.lr, self.whole = parameters, before, lr, whole
        self.size, self.path = total_norm(before), 0.0
        # Half precision would round small steps away: they are taken on float32 copies, as mixed precision does.
        half = model.dtype.itemsize < 4
        self.stepped = [nn.Parameter(parameter.detach().float()) for parameter in parameters] if half else parameters
        self.sums: list[Tensor] = []
        self.optimizer = torch.optim.SGD(self.stepped, lr=lr, foreach=True)

    def step(self, *, last: bool) -> float:
        """Go along the parameters' gradients; returns how far they have gone, relative to their norm, or farther."""
        gradients = [parameter.grad for parameter in self.parameters]
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.stepped, gradients, strict=True)]
        found = [gradient.to(p) for gradient, p in zip(found, self.stepped, strict=True)]
        # The path is no shorter than the change and takes no copy of the weights to know: it says when to look.
        self.path += self.lr * total_norm(found) / self.size
        if self.whole:
            self.sums = [s + g for s, g in zip(self.sums, found, strict=True)] if self.sums else found
            if not last:
                return 0.0
            found = self.sums
        for parameter, gradient in zip(self.stepped, found, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        if self.stepped is not self.parameters:
            for copy, parameter in zip(self.stepped, self.parameters, strict=True):
                parameter.detach().copy_(copy.detach())
        if self.path <= EXPLODED_WEIGHTS:
            return self.path
        return total_norm(_differences(self.parameters, self.before)) / self.size


class _FactorRecorder:
    """Keeps every training token's input to the projections and the error signal at their output, step by step."""

    def __init__(self, model: Model, lr: float) -> None:
        self.model, self.lr = model, lr
        self.projections: dict[ProjectionName, list[Projection]] = {"K": model.projections("K"), "V": model.projections("V")}
        self.x: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
        self.errors: dict[ProjectionName, list[list[Tensor]]] = {kind: [[] for _ in self.x] for kind in self.projections}

    def on_gradient(
        self,
        layer: int,
        kind: ProjectionName,
        x: Float[Tensor, "batch train_token d_model"],
        gradient: Float[Tensor, "batch train_token d_kv"],
    ) -> None:
        """Keep what a step's backward pass shows of a layer."""
        if kind == "K":  # keys and values are projected from the same input
            self.x[layer].append(at_least_float32(x[0]).cpu())
        self.errors[kind][layer].append(-self.lr * at_least_float32(gradient[0]).cpu())

    def check(self, step: int) -> None:
        """Hold the step's factors against its gradient, which no rounding of the weights has touched."""
        for kind, projections in self.projections.items():
            for layer, projection in enumerate(projections):
                found = projection.W.parameter.grad
                assert found is not None
                gradient = -self.lr * at_least_float32(projection.W.to_matrix(found)).cpu()
                missing = (dual.outer_sum(self.x[layer][-1], self.errors[kind][layer][-1]) - gradient).norm()
                if not missing <= 10 * math.sqrt(torch.finfo(self.model.dtype).eps) * gradient.norm():
                    raise UnsupportedModelError(
                        f"{self.model.name}, layer {layer}: expected the gradient of W_{kind} to be the sum of its "
                        f"factors, got a difference of {missing:.1e} at a norm of {gradient.norm():.1e} in step "
                        f"{step}. Its projections are used elsewhere too, or keys and values have different inputs"
                    )

    def factors(self, W_K: Float[Tensor, "layer d_kv d_model"], W_V: Float[Tensor, "layer d_kv d_model"]) -> Factors:
        x, e_K, e_V = (
            torch.stack([torch.cat(steps) for steps in layers])
            for layers in (self.x, self.errors["K"], self.errors["V"])
        )
        steps = torch.cat([torch.full((len(tokens),), step) for step, tokens in enumerate(self.x[0])])
        missing = [(dual.outer_sum(x, e) - W).flatten(1).norm(dim=1) for e, W in ((e_K, W_K), (e_V, W_V))]
        size = [W.flatten(1).norm(dim=1) for W in (W_K, W_V)]
        return Factors(x, e_K, e_V, steps, (torch.stack(missing) / torch.stack(size)).max().item())


def _backward(
    model: Model,
    start: tuple[int, ...],
    tokens: tuple[int, ...],
    n_targets: int,
    *,
    local: bool,
    recorder: _FactorRecorder | None,
) -> tuple[float, Float[Tensor, "layer train_token head d_head"], Float[Tensor, "layer train_token kv_head d_head"]]:
    """The gradient of the mean cross-entropy of a demonstration's last `n_targets` tokens, left at the parameters.

    Local, the gradient of all layers' own losses instead. Returns the model's loss, and queries and keys of all that
    runs.
    """
    ids = torch.tensor([[*start, *tokens]], device=model.device)
    n_targets = min(n_targets, ids.shape[1] - 1)  # without a start token, nothing comes before the first
    targets = ids[0, -n_targets:]
    content: dict[str, list[Tensor]] = {"q": [], "k": []}
    residuals: list[Tensor] = []

    def keep(kind: str) -> OnTensor:
        return lambda layer, found: content[kind].append(at_least_float32(found[0]).detach().cpu())

    def cut(layer: int, residual: Tensor) -> Tensor:
        residuals.append(residual)
        return residual.detach()

    read = torch.arange(ids.shape[1] - 1 - n_targets, ids.shape[1] - 1, device=model.device)
    logits = model.run(
        ids,
        read=read[None],
        on_query=keep("q"),
        on_key=keep("k"),
        on_residual=cut if local else None,
        on_gradient=None if recorder is None else recorder.on_gradient,
    )
    loss = nn.functional.cross_entropy(at_least_float32(logits[0]), targets)
    if local:
        _backward_locally(model, [residual[0, read] for residual in residuals], targets, logits[0])
    else:
        loss.backward()
    return loss.item(), torch.stack(content["q"]), torch.stack(content["k"])


def _backward_locally(
    model: Model,
    outputs: list[Float[Tensor, "target d_model"]],
    targets: Int[Tensor, " target"],
    logits: Float[Tensor, "target d_vocab"],
) -> None:
    """The gradient of the sum of all layers' own losses, each read out as the last layer's output is."""
    own, at_once = logits, max(1, READOUT_TOKENS // len(targets))
    for first in range(0, len(outputs), at_once):
        some = outputs[first : first + at_once]
        own = at_least_float32(model.unembed(torch.stack(some)))
        loss = nn.functional.cross_entropy(own.flatten(0, 1), targets.repeat(len(some)), reduction="sum")
        (loss / len(targets)).backward()
    _check_readout(model, own[-1].detach(), logits)


def _check_readout(model: Model, got: Tensor, expected: Tensor) -> None:
    off = (got - expected).abs().max() / expected.abs().max()
    if not off <= 10 * math.sqrt(torch.finfo(model.dtype).eps):
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}): expected the last layer's output to be read out by the final norm "
            f"and the unembedding, got logits that are off by {off:.1e} of the model's own: layers have no loss of "
            "their own here, and method='layer-causal' cannot train them"
        )


def _differences(after: list[nn.Parameter], before: list[Tensor]) -> list[Tensor]:
    return [now.detach() - then for now, then in zip(after, before, strict=True)]


def total_norm(tensors: list[Tensor]) -> float:
    return nn.utils.get_total_norm([at_least_float32(tensor) for tensor in tensors]).item()


def _deltas(model: Model, weights: dict[str, list[Weight]], before: list[Tensor]) -> dict[str, Any]:
    """What the weights have changed by, as matrices, by layer."""
    then = iter(before)
    moved = {
        name: torch.stack([weight.to_matrix(weight.parameter.detach() - next(then)).cpu() for weight in by_layer])
        for name, by_layer in weights.items()
    }
    return with_untrained(model, moved)


def with_untrained(model: Model, moved: dict[str, Tensor]) -> dict[str, Any]:
    """What has moved, and zero for keys and values that have not."""
    found: dict[str, Any] = dict(moved)
    for kind in ("K", "V"):
        W, b = model.projections(kind)[0]
        for name, weight in ((f"W_{kind}", W), (f"b_{kind}", b)):
            like = None if weight is None else weight.to_matrix(weight.parameter.detach())
            still = None if like is None else like.new_zeros(model.n_layers, *like.shape).cpu()
            found.setdefault(name, still)
    return found


@contextmanager
def only_trained(model: Model, trained: list[nn.Parameter]) -> Iterator[None]:
    """Ask for no gradient but the trained parameters', and put every flag and gradient back afterwards."""
    everything = list({id(p): p for p in (*model.parameters(), *trained)}.values())
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in everything]
    try:
        for parameter in everything:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
