"""The paper's finetuning, SGD on key and value projections, and the variants that other papers compare it with.

The paper's (Dai et al., 2023): one demonstration a step, in the order of the in-context prompt, one epoch, plain SGD at
a constant learning rate. Weights and biases of the key and value projections are trained, all others are frozen, and
the model is restored bit for bit afterwards.

The variants (`FinetuneConfig`): the loss of the label word alone (Shen et al., 2024); one step on all demonstrations
together, with the gradients that equations 7–9 read as the dual form; each layer trained by a loss of its own, so that
no gradient comes from the layers above it, as no information does in a forward pass (layer-causal, Deutch et al.,
2024); keys alone, values alone, or all of attention.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_dual import dual
from icl_dual.finetuning.weight_delta import (
    PAPER_FINETUNING,
    Factors,
    FinetuneConfig,
    WeightDelta,
    restored,
    trained_weights,
)
from icl_dual.models import Model, OnTensor, Projection, ProjectionName, UnsupportedModelError, Weight
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.torch_utils import at_least_float32

EXPLODED_LOSS = 3.0
"""The largest loss that is no explosion, in units of log(d_vocab), the loss of a uniform prediction; or of the first
step's loss, where a model begins above that."""

EXPLODED_WEIGHTS = 10.0
"""The largest change of the trained weights that is no explosion, in units of their norm. The loss need not show such a
change: a norm may follow the weights."""

READOUT_TOKENS = 512
"""The most residual streams that go through the unembedding at once, over tokens and layers (`layer-causal`)."""


class DivergedError(RuntimeError):
    """Finetuning ran away: its loss or its weights are no longer finite, or its loss exploded."""


@torch.inference_mode(False)
def finetune(
    model: Model,
    prompts: Prompts,
    *,
    lr: float,
    config: FinetuneConfig = PAPER_FINETUNING,
    factors: bool = False,
    progress: bool = True,
) -> WeightDelta:
    """Finetune a model on the demonstrations, as Dai et al. (2023) do or by a variant, and return the weights' change.

    Args:
        model: the model to finetune, with its momentum attention if it has any; restored afterwards.
        prompts: their demonstrations are the training sequences, each after the start token and without a separator.
        lr: the learning rate of SGD.
        config: the loss, the method and the trained projections. One step of `full-batch`, on the sum of the
            demonstrations' losses, is to first order as long as all steps of `sgd` together. With `layer-causal`,
            gradients stop at every layer's input, and each layer's output is read by the final norm and the
            unembedding, which stay frozen.
        factors: keep the outer products that the delta of keys and values is the sum of, and check that it is.
        progress: show a progress bar.

    Raises:
        ValueError: lr is not a positive number, there are no demonstrations, a demonstration has no token that can be
            predicted, or factors=True where keys and values are not both trained.
        PromptError: the prompts are incomplete, or the model cannot read them.
        DivergedError: the loss or the weights exploded or are not finite; says at which step and lr.
        UnsupportedModelError: the outer products of a step do not sum to its gradient (says at which layer), or the
            last layer's output is not read by the final norm and the unembedding alone (`layer-causal`).

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> rows = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
        >>> task = icl_dual.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
        >>> model = tiny_model()  # or icl_dual.load_model("smollm2-135m")
        >>> prompts = icl_dual.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(5))
        >>> delta = icl_dual.finetune(model, prompts, lr=0.01, progress=False)
        >>> delta.W_V.shape  # layer, d_kv, d_model
        torch.Size([2, 16, 32])
        >>> with delta.applied(model):
        ...     finetuned = icl_dual.capture(model, prompts.zero_shot(), progress=False)
    """
    check_arguments(model, prompts, lr)
    if factors and config.trained not in ("key-value", "attention"):
        raise ValueError(
            f"expected keys and values to be trained where factors are kept, got trained={config.trained!r}: set "
            "trained to 'key-value' or 'attention', or factors=False"
        )
    weights = trained_weights(model, config.trained)
    parameters = [weight.parameter for by_layer in weights.values() for weight in by_layer]
    losses: list[float] = []
    training: dict[str, list[Tensor]] = {"q": [], "k": []}
    fingerprint = model.fingerprint()
    recorder = _FactorRecorder(model, lr) if factors else None
    with restored(parameters) as before, only_trained(model, parameters):
        descent = _GradientDescent(model, parameters, before, lr, full_batch=config.method == "full-batch")
        steps = zip(prompts.training_sequences, prompts.demonstration_label_lengths, strict=True)
        total = len(prompts.training_sequences)
        for step, (tokens, label_length) in enumerate(
            progress_bar(steps, total=total, desc=f"finetuning, lr {lr:g}", show=progress, unit="step"), start=1
        ):
            n_targets = label_length if config.loss == "label" else len(tokens)
            for parameter in parameters:
                parameter.grad = None
            loss, q, k = _backward(
                model,
                prompts.start,
                tokens,
                n_targets,
                layer_causal=config.method == "layer-causal",
                recorder=recorder,
            )
            losses.append(loss)
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
    """Return the error that says how the last step diverged; `None` where it did not.

    Args:
        model: the model that is finetuned.
        losses: the loss of every step so far, in nats.
        change: the norm of the change of the trained weights so far, or more, in units of the weights' norm.
        total: the number of all steps.
        lr: the learning rate.
    """
    largest_loss = EXPLODED_LOSS * max(math.log(model.d_vocab), losses[0])
    if math.isfinite(losses[-1]) and losses[-1] <= largest_loss and change <= EXPLODED_WEIGHTS:
        return None
    return DivergedError(
        f"finetuning diverged at step {len(losses)} of {total} with lr={lr:g}: loss {losses[-1]:.3g} (first step: "
        f"{losses[0]:.3g}), weights changed by {change:.3g} times their own norm. Use a smaller rate"
    )


def check_arguments(model: Model, prompts: Prompts, lr: float) -> None:
    """Check that a model can be finetuned on the prompts' demonstrations at a learning rate.

    Raises:
        PromptError: the prompts are incomplete, or the model cannot read them.
        ValueError: lr is not a positive number, there are no demonstrations, one has no token to predict, or the model
            was loaded inside of `torch.inference_mode()`.
    """
    check_prompts(model, prompts)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"expected a model that was loaded outside of torch.inference_mode(), got {model!r} with weights that "
            "cannot be trained: load it outside"
        )
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"expected a learning rate above 0, got {lr}: pass a positive lr, such as 0.01")
    if not prompts.training_sequences:
        raise ValueError("expected prompts with demonstrations to finetune on, got none: build them with at least one")
    if short := [tokens for tokens in prompts.training_sequences if len(prompts.start) + len(tokens) < 2]:
        raise ValueError(
            f"expected demonstrations of at least 2 tokens, the start token included, got {short[0]}: nothing comes "
            "before its only token, which cannot be predicted"
        )


class _GradientDescent:
    """Takes a step along each demonstration's gradient, or one step along the sum of all of them."""

    def __init__(
        self, model: Model, parameters: list[nn.Parameter], before: list[Tensor], lr: float, *, full_batch: bool
    ) -> None:
        self.parameters, self.before, self.lr, self.full_batch = parameters, before, lr, full_batch
        self.weight_norm, self.path_length = total_norm(before), 0.0
        # Half precision would round small steps to nothing: they are taken on float32 copies, as in mixed precision.
        is_half = model.dtype.itemsize < 4
        self.stepped = [nn.Parameter(parameter.detach().float()) for parameter in parameters] if is_half else parameters
        self.gradient_sums: list[Tensor] = []
        self.optimizer = torch.optim.SGD(self.stepped, lr=lr, foreach=True)

    def step(self, *, last: bool) -> float:
        """Use the gradients that a demonstration has left at the parameters.

        Returns:
            The norm of the change of the weights so far, or an upper bound of it, in units of the weights' norm.
        """
        gradients = [
            torch.zeros_like(stepped) if parameter.grad is None else parameter.grad.to(stepped)
            for stepped, parameter in zip(self.stepped, self.parameters, strict=True)
        ]
        # The path's length bounds the change and needs no difference of all weights, which is taken only beyond it.
        self.path_length += self.lr * total_norm(gradients) / self.weight_norm
        if self.full_batch:
            sums = self.gradient_sums
            self.gradient_sums = [s + g for s, g in zip(sums, gradients, strict=True)] if sums else gradients
            if not last:
                return 0.0
            gradients = self.gradient_sums
        for parameter, gradient in zip(self.stepped, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        if self.stepped is not self.parameters:
            for stepped, parameter in zip(self.stepped, self.parameters, strict=True):
                parameter.detach().copy_(stepped.detach())
        if self.path_length <= EXPLODED_WEIGHTS:
            return self.path_length
        return total_norm(_differences(self.parameters, self.before)) / self.weight_norm


class _FactorRecorder:
    """Records the projections' input and the error signal at their output for every training token, step by step."""

    def __init__(self, model: Model, lr: float) -> None:
        self.model, self.lr = model, lr
        self.projections: dict[ProjectionName, list[Projection]] = {
            "K": model.projections("K"),
            "V": model.projections("V"),
        }
        self.x: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
        self.errors: dict[ProjectionName, list[list[Tensor]]] = {
            kind: [[] for _ in self.x] for kind in self.projections
        }

    def on_gradient(
        self,
        layer: int,
        kind: ProjectionName,
        x: Float[Tensor, "batch train_token d_model"],
        gradient: Float[Tensor, "batch train_token d_kv"],
    ) -> None:
        """Record a layer's input and error signal from a step's backward pass."""
        if kind == "K":  # keys and values are projected from the same input
            self.x[layer].append(at_least_float32(x[0]).cpu())
        self.errors[kind][layer].append(-self.lr * at_least_float32(gradient[0]).cpu())

    def check(self, step: int) -> None:
        """Check that a step's outer products sum to its gradient, before any rounding of the weights.

        Raises:
            UnsupportedModelError: they do not; says at which layer.
        """
        for kind, projections in self.projections.items():
            for layer, projection in enumerate(projections):
                parameter_gradient = projection.W.parameter.grad
                assert parameter_gradient is not None
                expected = -self.lr * at_least_float32(projection.W.to_matrix(parameter_gradient)).cpu()
                error = (dual.outer_sum(self.x[layer][-1], self.errors[kind][layer][-1]) - expected).norm()
                if not error <= 10 * math.sqrt(torch.finfo(self.model.dtype).eps) * expected.norm():
                    raise UnsupportedModelError(
                        f"{self.model.name}, layer {layer}: expected the gradient of W_{kind} to be the sum of its "
                        f"factors, got a difference of {error:.1e} at a norm of {expected.norm():.1e} in step {step}: "
                        "its projections are used elsewhere too, or keys and values have different inputs. Use "
                        "factors=False"
                    )

    def factors(self, W_K: Float[Tensor, "layer d_kv d_model"], W_V: Float[Tensor, "layer d_kv d_model"]) -> Factors:
        """Return the outer products of all steps, with their error against the delta."""
        x, e_K, e_V = (
            torch.stack([torch.cat(steps) for steps in layers])
            for layers in (self.x, self.errors["K"], self.errors["V"])
        )
        steps = torch.cat([torch.full((len(tokens),), step) for step, tokens in enumerate(self.x[0])])
        errors = [(dual.outer_sum(x, e) - W).flatten(1).norm(dim=1) for e, W in ((e_K, W_K), (e_V, W_V))]
        norms = [W.flatten(1).norm(dim=1) for W in (W_K, W_V)]
        return Factors(x, e_K, e_V, steps, (torch.stack(errors) / torch.stack(norms)).max().item())


def _backward(
    model: Model,
    start: tuple[int, ...],
    tokens: tuple[int, ...],
    n_targets: int,
    *,
    layer_causal: bool,
    recorder: _FactorRecorder | None,
) -> tuple[float, Float[Tensor, "layer train_token head d_head"], Float[Tensor, "layer train_token kv_head d_head"]]:
    """Leave the gradient of the mean cross-entropy of a demonstration's last `n_targets` tokens at the parameters.

    With `layer_causal`, the gradient is that of the sum of every layer's own loss instead.

    Returns:
        The model's loss in nats, and the queries and keys of all tokens, before rotation.
    """
    ids = torch.tensor([[*start, *tokens]], device=model.device)
    n_targets = min(n_targets, ids.shape[1] - 1)  # without a start token, nothing comes before the first
    targets = ids[0, -n_targets:]
    by_layer: dict[str, list[Tensor]] = {"q": [], "k": []}
    residuals: list[Tensor] = []

    def record(name: str) -> OnTensor:
        return lambda layer, content: by_layer[name].append(at_least_float32(content[0]).detach().cpu())

    def stop_gradient(layer: int, residual: Tensor) -> Tensor:
        residuals.append(residual)
        return residual.detach()

    read = torch.arange(ids.shape[1] - 1 - n_targets, ids.shape[1] - 1, device=model.device)
    logits = model.run(
        ids,
        read=read[None],
        on_query=record("q"),
        on_key=record("k"),
        on_residual=stop_gradient if layer_causal else None,
        on_gradient=None if recorder is None else recorder.on_gradient,
    )
    loss = nn.functional.cross_entropy(at_least_float32(logits[0]), targets)
    if layer_causal:
        _backward_by_layer(model, [residual[0, read] for residual in residuals], targets, logits[0])
    else:
        loss.backward()
    return loss.item(), torch.stack(by_layer["q"]), torch.stack(by_layer["k"])


def _backward_by_layer(
    model: Model,
    outputs: list[Float[Tensor, "target d_model"]],
    targets: Int[Tensor, " target"],
    logits: Float[Tensor, "target d_vocab"],
) -> None:
    """Leave the gradient of the sum of all layers' own losses at the parameters.

    Args:
        model: the model that is finetuned.
        outputs: by layer, the residual stream after it where a target is predicted.
        targets: the token ids to predict.
        logits: the model's own logits, which those read from the last layer's output must equal.
    """
    layer_logits, layers_at_once = logits, max(1, READOUT_TOKENS // len(targets))
    for first in range(0, len(outputs), layers_at_once):
        group = outputs[first : first + layers_at_once]
        layer_logits = at_least_float32(model.unembed(torch.stack(group)))
        loss = nn.functional.cross_entropy(layer_logits.flatten(0, 1), targets.repeat(len(group)), reduction="sum")
        (loss / len(targets)).backward()
    _check_readout(model, layer_logits[-1].detach(), logits)


def _check_readout(model: Model, got: Tensor, expected: Tensor) -> None:
    """Raise an UnsupportedModelError unless the last layer's logits are the model's own."""
    error = (got - expected).abs().max() / expected.abs().max()
    if not error <= 10 * math.sqrt(torch.finfo(model.dtype).eps):
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}): expected the last layer's output to be read out by the final norm "
            f"and the unembedding alone, got logits with a relative error of {error:.1e} against the model's own: "
            "layers have no loss of their own here. Use method='sgd' or 'full-batch'"
        )


def total_norm(tensors: list[Tensor]) -> float:
    """Return the Euclidean norm of all elements of several tensors, computed in float32 at least."""
    return nn.utils.get_total_norm([at_least_float32(tensor) for tensor in tensors]).item()


def _differences(after: list[nn.Parameter], before: list[Tensor]) -> list[Tensor]:
    return [new.detach() - old for new, old in zip(after, before, strict=True)]


def _deltas(model: Model, weights: dict[str, list[Weight]], before: list[Tensor]) -> dict[str, Any]:
    """Return the change of each trained weight since `before`, as matrices by layer, and zero for the untrained."""
    old = iter(before)
    deltas = {
        name: torch.stack([weight.to_matrix(weight.parameter.detach() - next(old)).cpu() for weight in by_layer])
        for name, by_layer in weights.items()
    }
    return with_untrained(model, deltas)


def with_untrained(model: Model, deltas: dict[str, Tensor]) -> dict[str, Any]:
    """Return the deltas by their field's name in `WeightDelta`, with zero for keys and values that were not trained."""
    all_deltas: dict[str, Any] = dict(deltas)
    for kind in ("K", "V"):
        W, b = model.projections(kind)[0]
        for name, weight in ((f"W_{kind}", W), (f"b_{kind}", b)):
            like = None if weight is None else weight.to_matrix(weight.parameter.detach())
            untrained = None if like is None else like.new_zeros(model.n_layers, *like.shape).cpu()
            all_deltas.setdefault(name, untrained)
    return all_deltas


@contextmanager
def only_trained(model: Model, trained: list[nn.Parameter]) -> Iterator[None]:
    """Require gradients of the trained parameters alone; restore every parameter's flag and gradient afterwards."""
    parameters = list({id(p): p for p in (*model.parameters(), *trained)}.values())
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        for parameter in parameters:
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
