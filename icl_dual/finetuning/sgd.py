"""The paper's finetuning, SGD on key and value projections, and the variants that it is compared with.

The paper's (Dai et al., 2023): one demonstration a step, in the order of the in-context prompt, one epoch, plain SGD at
a constant learning rate. Weights and biases of the key and value projections are trained, all others are frozen, and
the model is restored bit for bit afterwards. Where weights are in half precision, their changes are kept in float32 and
run beside them.

The variants (`FinetuneConfig`): the loss of the label word alone (Shen et al., 2024); one step on all demonstrations
together, with the gradients that equations 7–9 read as the dual form; each layer trained by a loss of its own, so that
no gradient comes from the layers above it, as no information does in a forward pass (layer-causal, Deutch et al.,
2024); keys alone, values alone, or all of attention. Finetuning as most people do it is a variant, too: Adam or
momentum, several epochs, batches, a schedule of the learning rate, and low-rank adapters (LoRA).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_dual import dual
from icl_dual.arguments import checked
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig
from icl_dual.finetuning.lora import Adapters, check_adaptable
from icl_dual.finetuning.optimisers import make_optimiser, rate_factors, weight_decay
from icl_dual.finetuning.weight_delta import (
    Factors,
    Noise,
    WeightDelta,
    keep_values,
    trained_weights,
)
from icl_dual.models import Model, OnTensor, ProjectionName, UnsupportedModelError, Weight
from icl_dual.models.backend import ProjectionDelta
from icl_dual.models.changes import projection_deltas_of
from icl_dual.models.journal import Undo, exclusive
from icl_dual.models.overflow import check_activations
from icl_dual.models.precision import exact_float32
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts, check_prompts
from icl_dual.torch_utils import at_least_float32, is_half, is_out_of_memory, to_list, vector_norm

EXPLODED_LOSS = 3.0
"""The largest loss that is no explosion, in units of log(d_vocab), the loss of a uniform prediction; or of the first
step's loss, where a model begins above that."""

EXPLODED_WEIGHTS = 10.0
"""The largest change of the trained weights that is no explosion, in units of their norm. The loss need not show such a
change: a norm may follow the weights."""

LOOK_EVERY = 8
"""After how many steps a finetuning looks whether it has diverged, on devices that the host would have to wait for. On
a CPU it looks after each."""

READOUT_TOKENS = 512
"""The most residual streams that go through the unembedding at once, over tokens and layers (`layer-causal`)."""


class DivergedError(RuntimeError):
    """Finetuning ran away: its loss or its weights are no longer finite, or its loss exploded."""


@checked
@exclusive
@torch.inference_mode(False)
def finetune(
    model: Model,
    prompts: Prompts,
    *,
    lr: float,
    config: FinetuneConfig = PAPER_FINETUNING,
    noise: Noise | None = None,
    factors: bool = False,
    progress: bool = True,
) -> WeightDelta:
    """Finetune a model on the demonstrations, as Dai et al. (2023) do or by a variant, and return the weights' change.

    Args:
        model: the model to finetune, with its momentum attention if it has any; restored afterwards.
        prompts: their demonstrations are the training sequences, each after the start token and without a separator.
        lr: the learning rate, before the schedule.
        config: the loss, the trained projections, the optimiser's steps and LoRA. One step of `full-batch`, on the sum
            of the demonstrations' losses, is to first order as long as all steps of `sgd` together. With
            `layer-causal`, gradients stop at every layer's input, and each layer's output is read by the final norm and
            the unembedding, which stay frozen.
        noise: noise on the trained weights that finetuning starts from. The delta is the change from there on, without
            the noise.
        factors: keep the outer products that the delta of keys and values is the sum of, and check that it is. Only one
            epoch of plain SGD makes such a sum.
        progress: show a progress bar.

    Raises:
        ValueError: lr is not a positive number, there are no demonstrations, or fewer than in a batch, a demonstration
            has no token that can be predicted, the warm-up is as long as all steps, or factors=True where keys and
            values are not both trained by one epoch of plain SGD.
        PromptError: the prompts are incomplete, or the model cannot read them.
        DivergedError: the loss or the weights exploded or are not finite; says at which step and lr.
        NonFiniteError: activations overflow before the first step; names the layer.
        UnsupportedModelError: the outer products of a step do not sum to its gradient (says at which layer), the last
            layer's output is not read by the final norm and the unembedding alone (`layer-causal`), or the model has
            no module for each projection (`lora`).
        ImportError: peft, which `lora` needs, is not installed.
        MemoryError: a demonstration does not fit in memory; the message has its size.

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
    check_arguments(model, prompts, lr, config)
    if factors:
        _check_factors(config)
    elif runs_as_graph(model, config) and not rounds_changes(model, prompts):
        return _finetune_as_graph(model, prompts, lr, config, noise, progress)
    try:
        return _finetune(model, prompts, lr, config, noise, factors=factors, progress=progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise memory_error(model, [prompts], error) from error


def _finetune_as_graph(
    model: Model, prompts: Prompts, lr: float, config: FinetuneConfig, noise: Noise | None, progress: bool
) -> WeightDelta:
    """Finetune as a single run of several in parallel, whose steps are CUDA graphs."""
    from icl_dual.finetuning.parallel import finetune_many  # it is made of this module

    (result,) = finetune_many(model, [prompts], [lr], config=config, noises=[noise], progress=progress)
    if isinstance(result, DivergedError):
        raise result
    return result


def _finetune(
    model: Model,
    prompts: Prompts,
    lr: float,
    config: FinetuneConfig,
    noise: Noise | None,
    *,
    factors: bool,
    progress: bool,
) -> WeightDelta:
    weights = trained_weights(model, config.trained)
    adapters = None if config.lora is None else Adapters(model, config, weights)
    rounded = adapters is None and rounds_changes(model, prompts)
    is_beside = is_half(model.storage_dtype) and not rounded and (adapters is None or noise is not None)
    started = _zero_changes(weights) if is_beside else weights
    parameters = _parameters(started) if adapters is None else adapters.parameters()
    projection_deltas = _added(
        _deltas_beside(started) if is_beside else {}, {} if adapters is None else adapters.projection_deltas()
    )
    losses, loss_tensors = list[float](), list[Tensor]()
    look_every = 1 if factors else steps_between_looks(model)  # factors are checked at each step
    training: dict[str, list[Tensor]] = {"q": [], "k": []}
    fingerprint = model.fingerprint()
    recorder = _FactorRecorder(model, started) if factors else None
    sequences = list(zip(prompts.training_sequences, prompts.demonstration_label_lengths, strict=True))
    total = config.epochs * len(sequences)
    with model.journal.block() as undo:
        before = keep_values(_parameters(started), undo)
        train_only(model, parameters, undo)
        exact_float32(undo)
        noise_changes = None if noise is None else _of_parameters(started, noise.changes(weights))
        descent = _Descent(
            config,
            lr,
            len(sequences),
            parameters=_parameters(started),
            before=before,
            noise=noise_changes,
            weight_norm=total_norm(_parameters(weights)).item(),
            beside=_matrices(weights) if is_beside else None,
            adapters=adapters,
        )
        for step, (tokens, label_length) in enumerate(
            progress_bar(sequences * config.epochs, desc=f"finetuning, lr {lr:g}", show=progress, unit="step"), start=1
        ):
            n_targets = label_length if config.loss == "label" else len(tokens)
            for parameter in parameters:
                parameter.grad = None
            if recorder is not None:
                recorder.rate = descent.rate
            loss, q, k = _backward(
                model,
                prompts.start,
                tokens,
                n_targets,
                layer_causal=config.method == "layer-causal",
                recorder=recorder,
                projection_deltas=projection_deltas,
                is_first=step == 1,
            )
            loss_tensors.append(loss)
            if step <= len(sequences):
                training["q"].append(q)
                training["k"].append(k)
            if recorder is not None:
                recorder.check(step)
            descent.step()
            if step % look_every and step < total:
                continue
            losses += to_list(torch.stack(loss_tensors))
            loss_tensors.clear()
            if (error := divergence(model, losses, descent.change(), total, lr)) is not None:
                raise error
        changes = _deltas(started, descent.changes()) if adapters is None else adapters.changes()
        deltas = with_untrained(model, changes)
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
        noise=noise,
        rounded=rounded,
    )


def memory_error(model: Model, prompts: Sequence[Prompts], error: Exception) -> MemoryError:
    """Return the error that says what did not fit in memory."""
    longest = max(len(each.start) + len(tokens) for each in prompts for tokens in each.training_sequences)
    return MemoryError(
        f"expected memory to finetune {model!r} on demonstrations of up to {longest} tokens, got: {error}. The weights "
        "are as before. Use shorter demonstrations, a smaller model or half precision"
    )


def rounds_changes(model: Model, prompts: Prompts) -> bool:
    """Return whether finetuning adds its steps to half-precision weights, which rounds them, as in the paper's set-up.

    Changes otherwise run beside such weights. The paper's own set-up is the reference protocol in half precision
    throughout. A `HookedTransformer` has no modules that a change could run beside.
    """
    is_reference = prompts.protocol == "reference" and is_half(model.dtype)
    return is_half(model.storage_dtype) and (is_reference or not model.supports_projection_deltas)


def _zero_changes(weights: dict[str, list[Weight]]) -> dict[str, list[Weight]]:
    """Return a change of zero for each weight and bias, in float32, which is trained instead."""
    changes: dict[str, list[Weight]] = {}
    for name, by_layer in weights.items():
        axes = "d_out d_in" if name.startswith("W") else "d_out"
        matrices = [at_least_float32(weight.to_matrix(weight.parameter.detach())) for weight in by_layer]
        changes[name] = [Weight(nn.Parameter(torch.zeros_like(matrix)), axes, axes) for matrix in matrices]
    return changes


def _deltas_beside(trained: dict[str, list[Weight]]) -> dict[ProjectionName, ProjectionDelta]:
    return projection_deltas_of({name: [w.parameter for w in by_layer] for name, by_layer in trained.items()})


def _added(
    first: dict[ProjectionName, ProjectionDelta], second: dict[ProjectionName, ProjectionDelta]
) -> dict[ProjectionName, ProjectionDelta] | None:
    """Return the sums of what two dictionaries add to projections; `None` for nothing."""

    def delta_of(layer: int, kind: ProjectionName, x: Tensor) -> Tensor:
        return first[kind](layer, kind, x) + second[kind](layer, kind, x)

    return {**first, **second, **dict.fromkeys(first.keys() & second.keys(), delta_of)} or None


def _parameters(weights: dict[str, list[Weight]]) -> list[nn.Parameter]:
    return [weight.parameter for by_layer in weights.values() for weight in by_layer]


def _matrices(weights: dict[str, list[Weight]]) -> list[Tensor]:
    """Return weights and biases as matrices and vectors, views of the parameters where possible."""
    return [weight.to_matrix(weight.parameter.detach()) for by_layer in weights.values() for weight in by_layer]


def _of_parameters(weights: dict[str, list[Weight]], matrices: dict[str, list[Tensor]]) -> list[Tensor]:
    """Return matrices and vectors in the shapes of the parameters that they belong to."""
    pairs = ((name, weight, at) for name, by_layer in weights.items() for at, weight in enumerate(by_layer))
    return [weight.from_matrix(matrices[name][at]) for name, weight, at in pairs]


def divergence(model: Model, losses: Sequence[float], change: float, total: int, lr: float) -> DivergedError | None:
    """Return the error that says how a finetuning has diverged; `None` where it has not.

    Args:
        model: the model that is finetuned.
        losses: the loss of every step so far, in nats.
        change: the norm of the change of the trained weights so far, or more, in units of the weights' norm.
        total: the number of all steps.
        lr: the learning rate.
    """
    largest_loss = EXPLODED_LOSS * max(math.log(model.d_vocab), losses[0])
    exploded = [step for step, loss in enumerate(losses) if not (math.isfinite(loss) and loss <= largest_loss)]
    if not exploded and change <= EXPLODED_WEIGHTS:
        return None
    losses = losses[: exploded[0] + 1] if exploded else losses
    advice = "Use a smaller rate"
    if is_half(model.dtype) and not math.isfinite(change):
        advice += ", or arithmetic=torch.float32 of icl_dual.load_model: gradients overflow in half precision"
    return DivergedError(
        f"finetuning diverged at step {len(losses)} of {total} with lr={lr:g}: loss {losses[-1]:.3g} (first step: "
        f"{losses[0]:.3g}), weights changed by {change:.3g} times their own norm. {advice}"
    )


def steps_between_looks(model: Model) -> int:
    """Return after how many steps a finetuning of a model looks whether it has diverged."""
    return 1 if model.device.type == "cpu" else LOOK_EVERY


def runs_as_graph(model: Model, config: FinetuneConfig) -> bool:
    """Return whether a finetuning takes its steps as CUDA graphs: they are alike, and no hook has to run in each."""
    has_changes = model.momentum is not None or model.weight_changes or model.mlp_changes or model.stream_changes
    return (
        model.device.type == "cuda"
        and config.has_equal_steps
        and config.method == "sgd"
        and model.supports_projection_deltas
        and model.rope_scaling_threshold is None
        and model.dtype == model.storage_dtype
        and not model.offloaded
        and not (has_changes or model.run_checks or model.foreign_hooks())
    )


def check_arguments(model: Model, prompts: Prompts, lr: float, config: FinetuneConfig) -> None:
    """Check that a model can be finetuned on the prompts' demonstrations at a learning rate.

    Raises:
        PromptError: the prompts are incomplete, or the model cannot read them.
        ValueError: lr is not a positive number, there are no demonstrations, or fewer than in a batch, one has no token
            to predict, the warm-up is as long as all steps, or the model was loaded inside of
            `torch.inference_mode()`.
        UnsupportedModelError: the model has no module for each projection, which LoRA needs.
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
    config.check_demonstrations(len(prompts.training_sequences))
    if config.lora is not None:
        check_adaptable(model)


def _check_factors(config: FinetuneConfig) -> None:
    """Raise a ValueError unless the delta of keys and values is a sum of outer products."""
    if config.trained not in ("key-value", "attention"):
        raise ValueError(
            f"expected keys and values to be trained where factors are kept, got trained={config.trained!r}: set "
            "trained to 'key-value' or 'attention', or factors=False"
        )
    if not config.is_plain_sgd or config.epochs > 1:
        others = {"optimiser", "momentum", "lora", "epochs"} & config.variation.keys()
        raise ValueError(
            "expected one epoch of plain SGD where factors are kept, else the delta is no sum of outer products "
            f"of training tokens, got {', '.join(f'{name}={getattr(config, name)!r}' for name in sorted(others))}: "
            "leave these out, or set factors=False"
        )


class _Descent:
    """Takes the optimiser's steps along the gradients of batches of demonstrations.

    Args:
        config: the optimiser, its schedule and its batches.
        lr: the learning rate, before the schedule.
        n_demonstrations: the number of demonstrations in an epoch.
        parameters: the parameters that change, or that adapters run beside.
        before: copies of their values.
        noise: changes of these parameters to start from; `None` for none.
        weight_norm: the norm of the weights that change.
        beside: the weights that the parameters are changes of; `None` where the parameters are the weights.
        adapters: the adapters that are trained instead of the parameters.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        lr: float,
        n_demonstrations: int,
        *,
        parameters: list[nn.Parameter],
        before: list[Tensor],
        noise: list[Tensor] | None,
        weight_norm: float,
        beside: list[Tensor] | None,
        adapters: Adapters | None,
    ) -> None:
        self.lr, self.config = lr, config
        self.batches = config.batches(n_demonstrations)
        self.rate_factors = rate_factors(config, len(self.batches))
        self.weight_norm = weight_norm
        self.path_length = torch.zeros((), dtype=torch.float64, device=before[0].device)
        """The sum of the norms of all gradients, each times its rate, in units of the weights' norm."""
        self.adapters, self.beside = adapters, beside if adapters is None else None
        self.parameters = parameters
        # Half precision would round small steps to nothing: they are taken on float32 copies, as in mixed precision.
        self.is_rounded = any(is_half(parameter.dtype) for parameter in self.parameters)
        self.stepped: list[nn.Parameter] = (
            [nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
            if self.is_rounded
            else self.parameters
        )
        self.start = before
        if noise is not None:
            with torch.no_grad():
                for stepped, change in zip(self.stepped, noise, strict=True):
                    stepped.add_(change)
            self._round()
            self.start = [stepped.detach().clone() for stepped in self.stepped]
        if adapters is not None:
            self.parameters = self.stepped = adapters.parameters()
            self.is_rounded = False
        self.gradient_sums: list[Tensor] = []
        self.n_steps, self.n_read = 0, 0
        self.optimiser = make_optimiser(config, self.stepped, lr)

    @property
    def rate(self) -> float:
        """Return the factor of a demonstration's gradient in the current step: the rate, and the share in the batch."""
        share = 1.0 if self.config.method == "full-batch" else 1 / len(self.batches[self.n_steps])
        return self.lr * self.rate_factors[self.n_steps] * share

    def step(self) -> None:
        """Use the gradients that a demonstration has left at the parameters: a step after the last of each batch."""
        gradients = [
            torch.zeros_like(stepped) if parameter.grad is None else parameter.grad.to(stepped)
            for stepped, parameter in zip(self.stepped, self.parameters, strict=True)
        ]
        batch = self.batches[self.n_steps]
        if self.config.is_plain_sgd:
            # The path's length bounds the change and needs no difference of all weights, which is taken only beyond it.
            self.path_length += self.rate * total_norm(gradients).double() / self.weight_norm
        sums = self.gradient_sums
        self.gradient_sums = [s + g for s, g in zip(sums, gradients, strict=True)] if sums else gradients
        self.n_read += 1
        if self.n_read < len(batch):
            return
        is_mean = len(batch) > 1 and self.config.method != "full-batch"
        for parameter, gradient in zip(self.stepped, self.gradient_sums, strict=True):
            parameter.grad = gradient / len(batch) if is_mean else gradient
        self._take_step(self.lr * self.rate_factors[self.n_steps])
        self.gradient_sums, self.n_read, self.n_steps = [], 0, self.n_steps + 1

    def change(self) -> float:
        """Return the norm of the change of the weights so far, or an upper bound of it, in units of their norm; 0 in
        the middle of a batch."""
        if self.n_read:
            return 0.0
        if self.config.is_plain_sgd and (path_length := self.path_length.item()) <= EXPLODED_WEIGHTS:
            return path_length
        changes = self.changes() if self.adapters is None else list(self.adapters.changes().values())
        return total_norm(changes).item() / self.weight_norm

    def _take_step(self, lr: float) -> None:
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        if self.beside is not None and (decay := weight_decay(self.optimiser)):
            with torch.no_grad():  # of the weights; the optimiser's own decay is that of their change alone
                for stepped, weight in zip(self.stepped, self.beside, strict=True):
                    stepped.sub_(weight, alpha=lr * decay)
        self._round()

    def changes(self) -> list[Tensor]:
        """Return the change of each parameter since the start, before it was rounded, in float32 at least."""
        return [stepped.detach() - start for stepped, start in zip(self.stepped, self.start, strict=True)]

    def _round(self) -> None:
        """Write float32 copies into the half-precision parameters that they are copies of."""
        if self.is_rounded:
            for stepped, parameter in zip(self.stepped, self.parameters, strict=True):
                parameter.detach().copy_(stepped.detach())


class _FactorRecorder:
    """Records the projections' input and the error signal at their output for every training token, step by step."""

    def __init__(self, model: Model, trained: dict[str, list[Weight]]) -> None:
        self.model = model
        self.rate = 0.0
        """The factor of the next demonstration's gradient."""
        self.projections: dict[ProjectionName, list[Weight]] = {"K": trained["W_K"], "V": trained["W_V"]}
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
            self.x[layer].append(at_least_float32(x[0]))
        self.errors[kind][layer].append(-self.rate * at_least_float32(gradient[0]))

    def check(self, step: int) -> None:
        """Check that a step's outer products sum to its gradient, before any rounding of the weights.

        Raises:
            UnsupportedModelError: they do not; says at which layer.
        """
        for kind, by_layer in self.projections.items():
            for layer, weight in enumerate(by_layer):
                parameter_gradient = weight.parameter.grad
                assert parameter_gradient is not None
                expected = -self.rate * at_least_float32(weight.to_matrix(parameter_gradient))
                error = vector_norm(dual.outer_sum(self.x[layer][-1], self.errors[kind][layer][-1]) - expected)
                norm = vector_norm(expected)
                if not error <= 10 * math.sqrt(torch.finfo(self.model.dtype).eps) * norm:
                    raise UnsupportedModelError(
                        f"{self.model.name}, layer {layer}: expected the gradient of W_{kind} to be the sum of its "
                        f"factors, got a difference of {error:.1e} at a norm of {norm:.1e} in step {step}: "
                        "its projections are used elsewhere too, or keys and values have different inputs. Use "
                        "factors=False"
                    )

    def factors(self, W_K: Float[Tensor, "layer d_kv d_model"], W_V: Float[Tensor, "layer d_kv d_model"]) -> Factors:
        """Return the outer products of all steps, with their error against the delta."""
        x, e_K, e_V = (
            torch.stack([torch.cat(steps) for steps in layers])
            for layers in (self.x, self.errors["K"], self.errors["V"])
        )
        steps = torch.arange(len(self.x[0])).repeat_interleave(torch.tensor(list(map(len, self.x[0])))).to(x.device)
        errors = [vector_norm((dual.outer_sum(x, e) - W).flatten(1), dim=1) for e, W in ((e_K, W_K), (e_V, W_V))]
        norms = [vector_norm(W.flatten(1), dim=1) for W in (W_K, W_V)]
        return Factors(x, e_K, e_V, steps, (torch.stack(errors) / torch.stack(norms)).max().item())


def _backward(
    model: Model,
    start: tuple[int, ...],
    tokens: tuple[int, ...],
    n_targets: int,
    *,
    layer_causal: bool,
    recorder: _FactorRecorder | None,
    projection_deltas: dict[ProjectionName, ProjectionDelta] | None,
    is_first: bool,
) -> tuple[
    Float[Tensor, ""], Float[Tensor, "layer train_token head d_head"], Float[Tensor, "layer train_token kv_head d_head"]
]:
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
        return lambda layer, content: by_layer[name].append(at_least_float32(content[0]).detach())

    def stop_gradient(layer: int, residual: Tensor) -> Tensor:
        residuals.append(residual)
        return residual.detach()

    read = torch.arange(ids.shape[1] - 1 - n_targets, ids.shape[1] - 1, device=model.device)
    run = partial(model.run, ids, read=read[None], projection_deltas=projection_deltas)
    logits = run(
        on_query=record("q"),
        on_key=record("k"),
        on_residual=stop_gradient if layer_causal else None,
        on_gradient=None if recorder is None else recorder.on_gradient,
    )
    loss = nn.functional.cross_entropy(at_least_float32(logits[0]), targets)
    if is_first and not torch.isfinite(loss):
        check_activations(model, run)
    if layer_causal:
        _backward_by_layer(model, [residual[0, read] for residual in residuals], targets, logits[0])
    else:
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
    return loss.detach(), torch.stack(by_layer["q"]), torch.stack(by_layer["k"])


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
        (loss / len(targets)).backward()  # pyright: ignore[reportUnknownMemberType]
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


def total_norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the Euclidean norm of all elements of several tensors, computed in float32 at least."""
    return nn.utils.get_total_norm([at_least_float32(tensor.detach()) for tensor in tensors])


def _deltas(trained: dict[str, list[Weight]], changes: list[Tensor]) -> dict[str, Tensor]:
    """Return the change of each trained weight as matrices by layer."""
    remaining = iter(changes)
    return {
        name: torch.stack([weight.to_matrix(next(remaining)) for weight in by_layer])
        for name, by_layer in trained.items()
    }


def with_untrained(model: Model, deltas: dict[str, Tensor]) -> dict[str, Any]:
    """Return the deltas by their field's name in `WeightDelta`, with zero for keys and values that were not trained."""
    all_deltas: dict[str, Any] = dict(deltas)
    for kind in ("K", "V"):
        W, b = model.projections(kind)[0]
        for name, weight in ((f"W_{kind}", W), (f"b_{kind}", b)):
            if name in all_deltas:
                continue
            like = None if weight is None else at_least_float32(weight.to_matrix(weight.parameter.detach()))
            all_deltas[name] = None if like is None else like.new_zeros(model.n_layers, *like.shape)
    return all_deltas


def train_only(model: Model, trained: list[nn.Parameter], undo: Undo) -> None:
    """Require gradients of the trained parameters alone, and compute them, until the block ends."""
    is_trained = set(map(id, trained))
    for parameter in {id(parameter): parameter for parameter in (*model.parameters(), *trained)}.values():
        undo.set(parameter, "requires_grad", id(parameter) in is_trained)
    for parameter in trained:
        undo.set(parameter, "grad", None)
    undo.push(torch.set_grad_enabled, torch.is_grad_enabled())
    torch.set_grad_enabled(True)
