"""Several finetunings in parallel: runs that share every forward and backward pass.

A step on one demonstration takes about as long as reading the weights from memory does, so the runs are rows of one
batch. All rows read the same weights W, and each run's change of them is kept apart and added at the projections:
(W + ΔW) x = W x + ΔW x.

On a GPU, launching the operators of a step takes longer than the arithmetic. Where all steps are alike, a step is
captured once as a CUDA graph, with the hooks' operators in it, and launched as one (`_StepGraph`).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from icl_dual.arguments import checked, of_type
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig
from icl_dual.finetuning.lora import Adapters
from icl_dual.finetuning.optimisers import make_optimiser, rate_factors, weight_decay
from icl_dual.finetuning.sgd import (
    EXPLODED_WEIGHTS,
    DivergedError,
    check_arguments,
    divergence,
    finetune,
    memory_error,
    rounds_changes,
    runs_as_graph,
    steps_between_looks,
    total_norm,
    train_only,
    with_untrained,
)
from icl_dual.finetuning.weight_delta import Noise, WeightDelta, trained_weights
from icl_dual.models import Model, OnTensor, UnsupportedModelError
from icl_dual.models.changes import projection_deltas_of
from icl_dual.models.journal import exclusive
from icl_dual.models.overflow import check_activations
from icl_dual.models.precision import exact_float32
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts
from icl_dual.torch_utils import at_least_float32, is_out_of_memory, to_list, vector_norm

log = logging.getLogger(__name__)


@checked
def finetune_many(
    model: Model,
    prompts: Sequence[Prompts],
    lrs: Sequence[float],
    *,
    config: FinetuneConfig = PAPER_FINETUNING,
    noises: Sequence[Noise | None] | None = None,
    at_once: int = 8,
    progress: bool = True,
) -> Iterator[WeightDelta | DivergedError]:
    """Finetune a model several times: at several rates, on several seeds' demonstrations, or in several orders.

    Runs go in parallel, as rows of one batch. Their deltas equal those of `finetune` up to rounding, which is smaller
    here because no small change is added to a large weight. SGD amplifies rounding step by step, also that of another
    number of threads: compare runs with each other in float64. Runs go one after another with methods other than `sgd`,
    in the reference protocol in half precision, for a `HookedTransformer`, for models with a rotary embedding that
    depends on the sequence length (dynamic NTK, LongRoPE), and where runs have different numbers of demonstrations
    and steps are not all alike (batches, epochs, a schedule, momentum, Adam, LoRA).

    Args:
        model: the model to finetune; restored afterwards.
        prompts: by run, the prompts; their demonstrations are the training sequences.
        lrs: by run, the learning rate.
        config: how to finetune, the same for all runs, as in `finetune`.
        noises: by run, the noise on the weights that it starts from, as in `finetune`; no noise by default.
        at_once: the most runs in parallel; each needs memory for its delta and its gradient. Halved where memory runs
            out.
        progress: show progress bars.

    Returns:
        An iterator over each run's delta, or the error that says where it diverged, in the order of the prompts. Runs
        start when the iterator reaches them, `at_once` at a time.

    Raises:
        ValueError: there are not as many rates or noises as prompts, at_once is below 1, or as in `finetune`.
        PromptError: the prompts are incomplete, or the model cannot read them.
        NonFiniteError: as in `finetune`, by the iterator.
        MemoryError: as in `finetune`, by the iterator.
        UnsupportedModelError: as in `finetune`, or a trained projection is not a layer that the forward pass calls.
    """
    if len(prompts) != len(lrs):
        raise ValueError(
            f"expected as many learning rates as prompts, got {len(prompts)} prompts and {len(lrs)} rates: pass one "
            "rate for each"
        )
    noises = [None] * len(prompts) if noises is None else noises
    if len(prompts) != len(noises):
        raise ValueError(
            f"expected as many noises as prompts, got {len(prompts)} prompts and {len(noises)} noises: pass one for "
            "each, None for a run without"
        )
    if at_once < 1:
        raise ValueError(f"expected at_once of at least 1, got {at_once}: pass 1 to finetune one after another")
    for run_prompts, lr in zip(prompts, lrs, strict=True):
        check_arguments(model, run_prompts, lr, config)
    is_sequential = (
        config.method != "sgd"
        or (not config.has_equal_steps and len({len(each.training_sequences) for each in prompts}) > 1)
        or any(rounds_changes(model, run_prompts) for run_prompts in prompts)
        or not model.supports_projection_deltas
        or model.rope_scaling_threshold is not None
    )
    if is_sequential:
        return (
            _delta_or_error(model, run_prompts, lr, config, noise, progress)
            for run_prompts, lr, noise in zip(prompts, lrs, noises, strict=True)
        )
    return _finetune_groups(model, prompts, lrs, config, noises, at_once, progress)


def _delta_or_error(
    model: Model, prompts: Prompts, lr: float, config: FinetuneConfig, noise: Noise | None, progress: bool
) -> WeightDelta | DivergedError:
    try:
        return finetune(model, prompts, lr=lr, config=config, noise=noise, progress=progress)
    except DivergedError as error:
        return error.with_traceback(None)  # the traceback would keep the run's memory


def _finetune_groups(
    model: Model,
    prompts: Sequence[Prompts],
    lrs: Sequence[float],
    config: FinetuneConfig,
    noises: Sequence[Noise | None],
    at_once: int,
    progress: bool,
) -> Iterator[WeightDelta | DivergedError]:
    """Yield each run's result, from groups of runs that are halved where memory runs out."""
    first, has_warned = 0, False
    with progress_bar(total=len(prompts), desc="finetuning", show=progress, unit="run") as bar:
        while first < len(prompts):
            group = slice(first, first + at_once)
            try:
                results = _run_group(model, prompts[group], lrs[group], config, noises[group], progress)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if at_once == 1:
                    raise memory_error(model, prompts[group], error) from error
                if not has_warned:
                    log.warning("%d finetunings do not fit in memory in parallel: running fewer", len(prompts[group]))
                has_warned = True
                results = []
            if not results:  # outside of the handler: its traceback keeps the memory of the failed group
                at_once = (min(at_once, len(prompts) - first) + 1) // 2
                continue
            first += len(results)
            bar.update(len(results))
            yield from results


@exclusive
@torch.inference_mode(False)
def _run_group(
    model: Model,
    prompts: Sequence[Prompts],
    lrs: Sequence[float],
    config: FinetuneConfig,
    noises: Sequence[Noise | None],
    progress: bool,
) -> list[WeightDelta | DivergedError]:
    """Return the results of runs in parallel."""
    with model.journal.block() as undo:
        train_only(model, [], undo)
        exact_float32(undo)
        return _ParallelRuns(model, prompts, lrs, config, noises).run(progress)


@dataclass
class _Run:
    """One of several finetunings in parallel: its settings, and what its steps so far have recorded."""

    prompts: Prompts
    """The prompts; their demonstrations are the training sequences."""
    lr: float
    """The learning rate."""
    noise: Noise | None = None
    """The noise on the weights that it starts from; `None` without noise."""
    losses: list[float] = field(default_factory=list[float])
    """The mean cross-entropy of each step's demonstration, in nats, up to the last look."""
    n_read: int = 0
    """How many demonstrations it has read."""
    q: list[Tensor] = field(default_factory=list[Tensor])
    """By step, the queries of its tokens before rotation, `[layer pos head d_head]`."""
    k: list[Tensor] = field(default_factory=list[Tensor])
    """By step, the keys of its tokens before rotation, `[layer pos kv_head d_head]`."""
    path_length: float = 0.0
    """The sum of the norms of all steps, in units of the weights' norm."""
    result: WeightDelta | DivergedError | None = None
    """The delta or the error; `None` while the run goes on."""

    @property
    def position(self) -> int:
        """Return the index of the next demonstration."""
        return self.n_read % self.n_demonstrations

    @property
    def n_demonstrations(self) -> int:
        """Return the number of demonstrations in an epoch."""
        return len(self.prompts.training_sequences)

    def row(self, demonstration: int) -> tuple[int, ...]:
        """Return the tokens that a step on a demonstration reads."""
        return (*self.prompts.start, *self.prompts.training_sequences[demonstration])


class _Steps:
    """Takes the steps of several runs at once: optimisers of torch are elementwise, and each run has a rate of its own.

    Args:
        config: the optimiser, its schedule and its batches.
        n_demonstrations: the number of demonstrations in an epoch of the longest run.
        tensors: the tensors that change, each by run.
    """

    def __init__(self, config: FinetuneConfig, n_demonstrations: int, tensors: Sequence[Tensor]) -> None:
        self.config, self.batches = config, config.batches(n_demonstrations)
        self.rate_factors = rate_factors(config, len(self.batches))
        self.n_steps, self.n_read = 0, 0
        self.gradient_sums: list[Tensor] = []
        self.directions: list[Tensor] = []
        """What the optimiser steps on, at a rate of 1 and from zero: the steps of all runs, without their rates."""
        self.optimiser: torch.optim.Optimizer | None = None
        if config.optimiser != "sgd" or config.momentum:
            self.directions = [torch.zeros_like(tensor) for tensor in tensors]
            self.optimiser = make_optimiser(config, self.directions, 1.0)

    def take(
        self,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor],
        lrs: Float[Tensor, " run"],
        weights: Sequence[Tensor] | None,
    ) -> Float[Tensor, " run"]:
        """Use the gradients of one demonstration of each run: a step after the last of each batch.

        Args:
            tensors: the tensors that change, each by run.
            gradients: their gradients.
            lrs: by run, the learning rate before the schedule.
            weights: the weights that the tensors are changes of; `None` for tensors that are no changes.

        Returns:
            By run, the norm of the step, or 0 before a batch is complete.
        """
        batch = self.batches[self.n_steps]
        self.n_read += 1
        if len(batch) > 1:
            sums = self.gradient_sums or [torch.zeros_like(gradient) for gradient in gradients]
            gradients = self.gradient_sums = [s + g for s, g in zip(sums, gradients, strict=True)]
        if self.n_read < len(batch):
            return torch.zeros_like(lrs)
        if len(batch) > 1:
            gradients = [gradient / len(batch) for gradient in gradients]
        rates = lrs * self.rate_factors[self.n_steps]
        steps = self._directions(tensors, gradients, weights)
        norms = torch.stack([vector_norm(step, dim=tuple(range(1, step.ndim))) for step in steps])
        for tensor, step in zip(tensors, steps, strict=True):
            tensor.sub_(step * rates.view(-1, *[1] * (step.ndim - 1)))
        self.gradient_sums, self.n_read, self.n_steps = [], 0, self.n_steps + 1
        return vector_norm(norms, dim=0) * rates

    def _directions(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor], weights: Sequence[Tensor] | None
    ) -> Sequence[Tensor]:
        """Return each run's step at a rate of 1, with the opposite sign, as a gradient has."""
        if self.optimiser is None:
            return gradients
        for direction, gradient in zip(self.directions, gradients, strict=True):
            direction.zero_()
            direction.grad = gradient
        self.optimiser.step()
        steps = [-direction for direction in self.directions]
        if decay := weight_decay(self.optimiser):
            decayed = tensors if weights is None else [W + tensor for W, tensor in zip(weights, tensors, strict=True)]
            steps = [step + decay * tensor for step, tensor in zip(steps, decayed, strict=True)]
        return steps

    def keep(self, kept: list[int]) -> None:
        """Leave out all runs but those at some indices."""
        self.gradient_sums = [gradient[kept] for gradient in self.gradient_sums]
        for direction in self.directions:
            direction.grad = None
            direction.data = direction.data[kept]
        for state in () if self.optimiser is None else self.optimiser.state.values():
            state.update({name: value[kept] for name, value in state.items() if getattr(value, "ndim", 0)})


class _Sequences(NamedTuple):
    """What a step reads, on the model's device: each active run's sequence, padded on the right."""

    ids: Int[Tensor, "run pos"]
    """Token ids."""
    read: Int[Tensor, "run target"]
    """The positions that predict targets, at the end of each sequence."""
    is_target: Bool[Tensor, "run target"]
    """Whether the loss is over what such a position predicts."""
    lrs: Float[Tensor, " run"]
    """The learning rates before the schedule."""


class _StepResult(NamedTuple):
    """What a step leaves besides the changed weights."""

    losses: Float[Tensor, " run"]
    """The mean cross-entropy over each sequence's targets, in nats, before the step."""
    norms: Float[Tensor, " run"]
    """The norm of each run's step; 0 before a batch is complete."""
    q: Float[Tensor, "run layer pos head d_head"]
    """The sequences' queries before rotation."""
    k: Float[Tensor, "run layer pos kv_head d_head"]
    """The sequences' keys before rotation."""


class _StepGraph:
    """A step of all active runs as one CUDA graph.

    Args:
        step: takes the step; what it runs on the device must not depend on what the host knows of the step's number.
        sequences: sequences of the shape that all steps have. The graph's own from now on; no step is taken on them.
    """

    def __init__(self, step: Callable[[_Sequences], _StepResult], sequences: _Sequences) -> None:
        self.sequences, self.graph = sequences, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step(sequences)

    def run(self, sequences: _Sequences) -> _StepResult:
        """Take a step."""
        for of_graph, values in zip(self.sequences, sequences, strict=True):
            of_graph.copy_(values)
        self.graph.replay()
        return _StepResult(*(tensor.clone() for tensor in self.result))


class _ParallelRuns:
    """Runs that share each pass, as rows of its batch. A run that has finished or diverged leaves the batch."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompts],
        lrs: Sequence[float],
        config: FinetuneConfig,
        noises: Sequence[Noise | None],
    ) -> None:
        self.model = model
        self.config = config
        self.runs = [_Run(*settings) for settings in zip(prompts, lrs, noises, strict=True)]
        self.active = list(self.runs)
        self.weights = weights = trained_weights(model, config.trained)
        trained = [weight.parameter.detach() for by_layer in weights.values() for weight in by_layer]
        self.weight_norm = total_norm(trained).item()
        self.unseen: list[tuple[Float[Tensor, " run"], Float[Tensor, " run"]]] = []
        """By step since the last look, each active run's loss and the norm of its step."""
        self.offsets: dict[str, list[Float[Tensor, "run d_out *d_in"]]] = {}
        """By a delta's name and by layer, the difference of each active run's weights from the model's: the run's noise
        and its steps so far; with adapters, which are added to it, the noise alone."""
        for name, by_layer in weights.items():
            matrices = [at_least_float32(weight.to_matrix(weight.parameter.detach())) for weight in by_layer]
            # Laid out in memory as their gradients are, [run d_in d_out]: a step then reads and writes in order.
            self.offsets[name] = [
                matrix.new_zeros(len(self.runs), *matrix.t().shape).transpose(1, -1) for matrix in matrices
            ]
        self.drawn_noise: dict[tuple[int, float], dict[str, list[Tensor]]] = {}
        """On a GPU, by seed and size, the noise that runs start from: the host takes long to draw it."""
        for index, run in enumerate(self.runs):
            for name, by_layer in self._noise(run).items():
                for tensor, change in zip(self.offsets[name], by_layer, strict=True):
                    tensor[index] = change
        self.adapters: dict[str, list[Float[Tensor, "run _ _"]]] = {}
        """With LoRA, the matrices A and B of each active run by the delta's name and `A` or `B`, and by layer."""
        self.scaling = 0.0
        if config.lora is not None:
            adapters = Adapters(model, config, weights)
            self.scaling = adapters.scaling
            self.adapters = {
                name: [matrix.detach().expand(len(self.runs), -1, -1).clone() for matrix in by_layer]
                for name, by_layer in adapters.matrices().items()
            }
        self.steps = _Steps(config, max(run.n_demonstrations for run in self.runs), self._trained)
        self.by_graph = runs_as_graph(model, config)
        self.graph: _StepGraph | None = None
        """A step of the active runs, where steps run as CUDA graphs; `None` before it is captured."""

    @property
    def _trained(self) -> list[Float[Tensor, "run d_out *d_in"]]:
        """Return the tensors that the steps change."""
        return [tensor for by_layer in (self.adapters or self.offsets).values() for tensor in by_layer]

    def _changes(self) -> dict[str, list[Float[Tensor, "run d_out *d_in"]]]:
        """Return, by a delta's name and by layer, the difference of each active run's weights from the model's."""
        changes = {name: list(by_layer) for name, by_layer in self.offsets.items()}
        for name in changes:
            if f"{name} A" in self.adapters:
                layers = zip(changes[name], self.adapters[f"{name} A"], self.adapters[f"{name} B"], strict=True)
                changes[name] = [offset + (B @ A) * self.scaling for offset, A, B in layers]
        return changes

    def _noise(self, run: _Run) -> dict[str, list[Tensor]]:
        """Return the noise on a run's weights by a delta's name and by layer; nothing for a run without noise."""
        if run.noise is None:
            return {}
        if self.model.device.type == "cpu":  # where memory is scarcer than time
            return run.noise.changes(self.weights)
        seed, size = run.noise.seed, abs(run.noise.size)
        if (seed, size) not in self.drawn_noise:
            self.drawn_noise[seed, size] = Noise(seed, size).changes(self.weights)
        drawn = self.drawn_noise[seed, size]
        return drawn if run.noise.size > 0 else {name: [-change for change in drawn[name]] for name in drawn}

    def run(self, progress: bool) -> list[WeightDelta | DivergedError]:
        """Take all steps of all runs and return each run's result."""
        fingerprint, longest = self.model.fingerprint(), max(run.n_demonstrations for run in self.runs)
        title = f"finetuning {len(self.runs)} in parallel"
        # Graphs and streams are those of the current device, which need not be the model's.
        current = torch.cuda.device(self.model.device) if self.by_graph else nullcontext()
        total = longest * self.config.epochs
        with current, progress_bar(total=total, desc=title, show=progress, unit="step") as bar:
            while self.active:
                self._step()
                if self._is_look_due():
                    self._look()
                    self._remove_finished(fingerprint)
                bar.update()
        return [run.result for run in self.runs if run.result is not None]

    def _step(self) -> None:
        """Read each active run's next demonstration, and take a step along its own row's loss after each batch."""
        rows = [run.row(run.position) for run in self.active]
        n_targets = [self._n_targets(run, run.position) for run in self.active]
        is_first = not self.active[0].n_read
        if self.by_graph:
            sequences = self._sequences(rows, n_targets, *self._largest_shape)
            result = self._step_by_graph(sequences, is_first=is_first)
        else:
            sequences = self._sequences(rows, n_targets, max(map(len, rows)), max(n_targets))
            result = self._take_step(sequences)
        for name in ("q", "k"):
            for run, row, content in zip(self.active, rows, getattr(result, name), strict=True):
                if run.n_read < run.n_demonstrations:
                    getattr(run, name).append(content[:, : len(row)].clone())
        self.unseen.append((result.losses, result.norms))
        for run in self.active:
            run.n_read += 1

    @cached_property
    def _largest_shape(self) -> tuple[int, int]:
        """Return the largest numbers of tokens and of targets of any sequence of any run."""
        sequences = [(run, step) for run in self.runs for step in range(run.n_demonstrations)]
        return max(len(run.row(step)) for run, step in sequences), max(self._n_targets(*each) for each in sequences)

    def _step_by_graph(self, sequences: _Sequences, *, is_first: bool) -> _StepResult:
        """Take a step as a CUDA graph; the first one as it is, on a stream of its own, as captures need."""
        if is_first:
            stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                result = self._take_step(sequences)
            before.wait_stream(stream)
            return result
        if self.graph is None:
            n_steps, n_read = self.steps.n_steps, self.steps.n_read
            try:
                self.graph = _StepGraph(self._take_step, _Sequences(*(tensor.clone() for tensor in sequences)))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # A forward pass that waits for the device, as some routers of experts do, cannot be captured.
                log.warning("finetuning step by step: %s cannot run as a CUDA graph (%s)", self.model.name, error)
                self.by_graph, self.steps.n_steps, self.steps.n_read = False, n_steps, n_read
                return self._take_step(sequences)
        return self.graph.run(sequences)

    def _take_step(self, sequences: _Sequences) -> _StepResult:
        """Run forwards and backwards, and take a step after each batch."""
        tensors = [tensor.requires_grad_() for tensor in self._trained]
        by_layer: dict[str, list[Tensor]] = {"q": [], "k": []}

        def keep(name: str) -> OnTensor:
            return lambda layer, tensor: by_layer[name].append(at_least_float32(tensor).detach())

        logits = self._forward(sequences, on_query=keep("q"), on_key=keep("k"))
        losses = self._losses(sequences, logits)
        if not self.active[0].n_read and not torch.isfinite(losses).all():  # before the step makes all weights NaN
            check_activations(self.model, partial(self._forward, sequences))
        gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
        if not all(of_type(gradient, Tensor) for gradient in gradients):  # `None` where a projection was not called
            raise UnsupportedModelError(
                f"{self.model.name} ({self.model.architecture}): expected every trained projection to be a layer that "
                "the forward pass calls, got one that it does not call: finetune one by one, with icl_dual.finetune"
            )
        with torch.no_grad():
            norms = self.steps.take(tensors, gradients, sequences.lrs.to(losses.dtype), self._decayed)
        return _StepResult(losses.detach(), norms, *(torch.stack(layers, dim=1) for layers in by_layer.values()))

    def _is_look_due(self) -> bool:
        """Return whether to look at the steps now: when a run has taken its last step, or after enough steps."""
        is_finished = any(run.n_read == self.config.epochs * run.n_demonstrations for run in self.active)
        return is_finished or len(self.unseen) == steps_between_looks(self.model)

    def _look(self) -> None:
        """Read the losses and norms of the steps since the last look."""
        losses, norms = (to_list(torch.stack(steps, dim=1)) for steps in zip(*self.unseen, strict=True))
        self.unseen.clear()
        for run, run_losses, run_norms in zip(self.active, losses, norms, strict=True):
            run.losses += run_losses
            for norm in run_norms:
                # What a step of adapters changes is no sum of its parts: the change itself is computed each time.
                run.path_length += math.inf if self.adapters else norm / self.weight_norm

    @property
    def _decayed(self) -> list[Tensor] | None:
        """Return the weights that the trained tensors are changes of, as matrices; `None` for those of adapters."""
        if self.adapters:
            return None
        by_layer = (weight for layers in self.weights.values() for weight in layers)
        return [weight.to_matrix(weight.parameter.detach()) for weight in by_layer]

    def _sequences(
        self, rows: Sequence[tuple[int, ...]], n_targets: Sequence[int], n_pos: int, n_read: int
    ) -> _Sequences:
        """Return rows of tokens on the model's device, padded to a shape."""
        ids = torch.tensor([[*row, *[0] * (n_pos - len(row))] for row in rows])
        distance = torch.arange(n_read, 0, -1)  # of a position that predicts a target from the row's end
        read = (torch.tensor([[len(row) - 1] for row in rows]) - distance).clamp_min(0)
        is_target = distance <= torch.tensor(n_targets)[:, None]
        lrs = torch.tensor([run.lr for run in self.active], dtype=torch.float64)
        return _Sequences(*(tensor.to(self.model.device) for tensor in (ids, read, is_target, lrs)))

    def _forward(self, sequences: _Sequences, **callbacks: Any) -> Float[Tensor, "run target d_vocab"]:
        """Return the logits at the positions that predict targets."""
        deltas = projection_deltas_of(self._changes())
        return self.model.run(sequences.ids, read=sequences.read, projection_deltas=deltas, **callbacks)

    def _losses(self, sequences: _Sequences, logits: Float[Tensor, "run target d_vocab"]) -> Float[Tensor, " run"]:
        """Return the mean cross-entropy of each active run's sequence over its targets."""
        targets = sequences.ids.gather(1, sequences.read + 1)
        # Flat: over an axis that is not the last, torch sums a vocabulary one by one, and loses digits.
        flat_logits = at_least_float32(logits.flatten(0, 1))
        flat_losses = nn.functional.cross_entropy(flat_logits, targets.flatten(), reduction="none")
        token_losses = flat_losses.view(targets.shape)
        return token_losses.where(sequences.is_target, 0.0).sum(1) / sequences.is_target.sum(1)

    def _n_targets(self, run: _Run, demonstration: int) -> int:
        """Return how many of a sequence's last tokens the loss is the mean over."""
        n_tokens, label_length = len(run.row(demonstration)), run.prompts.demonstration_label_lengths[demonstration]
        return min(label_length if self.config.loss == "label" else n_tokens - len(run.prompts.start), n_tokens - 1)

    def _remove_finished(self, fingerprint: str) -> None:
        """Give the runs that have finished or diverged their result, and take them out of the batch."""
        for index, run in enumerate(self.active):
            change = run.path_length  # an upper bound of the change, which is computed only when the bound is exceeded
            if not change <= EXPLODED_WEIGHTS:
                tensors = [tensor[index] for by_layer in self._changes().values() for tensor in by_layer]
                change = total_norm(tensors).item() / self.weight_norm
            total = self.config.epochs * run.n_demonstrations
            run.result = divergence(self.model, run.losses, change, total, run.lr)
            if run.result is None and len(run.losses) == total:
                run.result = self._weight_delta(index, run, fingerprint)
        kept = [index for index, run in enumerate(self.active) if run.result is None]
        if len(kept) < len(self.active):
            self.active = [self.active[index] for index in kept]
            for by_layer in (*self.offsets.values(), *self.adapters.values()):
                by_layer[:] = [tensor.detach()[kept] for tensor in by_layer]
            self.steps.keep(kept)
            self.graph = None  # of the tensors that were

    def _weight_delta(self, index: int, run: _Run, fingerprint: str) -> WeightDelta:
        deltas = {
            name: torch.stack([tensor.detach()[index] for tensor in by_layer])
            for name, by_layer in self._changes().items()
        }
        for name, by_layer in self._noise(run).items():  # on a CPU drawn once more
            deltas[name] -= torch.stack(by_layer)
        return WeightDelta(
            model=self.model.name,
            fingerprint=fingerprint,
            lr=run.lr,
            config=self.config,
            **with_untrained(self.model, deltas),
            demonstrations=[list(tokens) for tokens in run.prompts.training_sequences],
            losses=torch.tensor(run.losses, dtype=torch.float64),
            training_q=torch.cat(run.q, dim=1),
            training_k=torch.cat(run.k, dim=1),
            noise=run.noise,
        )
