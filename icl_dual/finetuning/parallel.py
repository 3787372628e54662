"""Several finetunings in parallel: runs of SGD that share every forward and backward pass.

A step on one demonstration takes about as long as reading the weights from memory does, so the runs are rows of one
batch. All rows read the same weights W, and each run's change of them is kept apart and added at the projections:
(W + ΔW) x = W x + ΔW x.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_dual.arguments import checked
from icl_dual.finetuning.config import PAPER_FINETUNING, FinetuneConfig
from icl_dual.finetuning.sgd import (
    EXPLODED_WEIGHTS,
    DivergedError,
    check_arguments,
    divergence,
    finetune,
    memory_error,
    rounds_changes,
    total_norm,
    train_only,
    with_untrained,
)
from icl_dual.finetuning.weight_delta import Noise, WeightDelta, trained_weights
from icl_dual.models import Model, UnsupportedModelError
from icl_dual.models.changes import projection_deltas_of
from icl_dual.models.journal import exclusive
from icl_dual.models.overflow import check_activations
from icl_dual.models.precision import exact_float32
from icl_dual.progress import progress_bar
from icl_dual.prompts import Prompts
from icl_dual.torch_utils import at_least_float32, is_out_of_memory

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

    Runs of SGD go in parallel, as rows of one batch. Their deltas equal those of `finetune` up to rounding, which is
    smaller here because no small change is added to a large weight. SGD amplifies rounding step by step, also that of
    another number of threads: compare runs with each other in float64. Runs go one after another with other methods, in
    the reference protocol in half precision, for a `HookedTransformer`, and for models with a rotary embedding that
    depends on the sequence length (dynamic NTK, LongRoPE).

    Args:
        model: the model to finetune; restored afterwards.
        prompts: by run, the prompts; their demonstrations are the training sequences.
        lrs: by run, the learning rate.
        config: the loss, the method and the trained projections of all runs, as in `finetune`.
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
    losses: list[float] = field(default_factory=list)
    """The mean cross-entropy of each step's demonstration, in nats."""
    q: list[Tensor] = field(default_factory=list)
    """By step, the queries of its tokens before rotation, `[layer pos head d_head]`."""
    k: list[Tensor] = field(default_factory=list)
    """By step, the keys of its tokens before rotation, `[layer pos kv_head d_head]`."""
    path_length: float = 0.0
    """The sum of the norms of all steps, in units of the weights' norm."""
    result: WeightDelta | DivergedError | None = None
    """The delta or the error; `None` while the run goes on."""

    @property
    def n_steps(self) -> int:
        """The number of all its steps."""
        return len(self.prompts.training_sequences)


class _ParallelRuns:
    """Runs of SGD that share each pass, as rows of its batch. A run that has finished or diverged leaves the batch."""

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
        self.weight_norm = total_norm(
            [weight.parameter.detach() for by_layer in weights.values() for weight in by_layer]
        )
        self.deltas: dict[str, list[Float[Tensor, "run d_out *d_in"]]] = {}
        """By a delta's name and by layer, the difference of each active run's weights from the model's: the run's noise
        and its steps so far."""
        for name, by_layer in weights.items():
            matrices = [at_least_float32(weight.to_matrix(weight.parameter.detach())) for weight in by_layer]
            self.deltas[name] = [matrix.new_zeros(len(self.runs), *matrix.shape) for matrix in matrices]
        for index, run in enumerate(self.runs):
            for name, by_layer in self._noise(run).items():
                for tensor, change in zip(self.deltas[name], by_layer, strict=True):
                    tensor[index] = change

    def _noise(self, run: _Run) -> dict[str, list[Tensor]]:
        """Return the noise on a run's weights by a delta's name and by layer; nothing for a run without noise."""
        return {} if run.noise is None else run.noise.changes(self.weights)

    def run(self, progress: bool) -> list[WeightDelta | DivergedError]:
        """Take all steps of all runs and return each run's result."""
        fingerprint, n_steps = self.model.fingerprint(), max(run.n_steps for run in self.runs)
        title = f"finetuning {len(self.runs)} in parallel"
        with progress_bar(total=n_steps, desc=title, show=progress, unit="step") as bar:
            while self.active:
                self._step()
                self._remove_finished(fingerprint)
                bar.update()
        return [run.result for run in self.runs if run.result is not None]

    def _step(self) -> None:
        """Take each active run's next step, along the gradient of its own row's loss."""
        sequences = [(*run.prompts.start, *run.prompts.training_sequences[len(run.losses)]) for run in self.active]
        tensors = [tensor.requires_grad_() for by_layer in self.deltas.values() for tensor in by_layer]
        losses = self._losses(sequences)
        gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise UnsupportedModelError(
                f"{self.model.name} ({self.model.architecture}): expected every trained projection to be a layer that "
                "the forward pass calls, got one that it does not call: finetune one by one, with icl_dual.finetune"
            )
        lrs = torch.tensor([run.lr for run in self.active], dtype=losses.dtype, device=losses.device)
        with torch.no_grad():
            norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0) * lrs
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.sub_(gradient * lrs.view(-1, *[1] * (gradient.ndim - 1)))
        for run, loss, norm in zip(self.active, losses.tolist(), norms.tolist(), strict=True):
            run.losses.append(loss)
            run.path_length += norm / self.weight_norm

    def _losses(self, sequences: Sequence[tuple[int, ...]]) -> Float[Tensor, " run"]:
        """Return the mean cross-entropy of each active run's sequence over its targets; record queries and keys."""
        model = self.model
        longest = max(map(len, sequences))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in sequences], device=model.device)
        n_targets = torch.tensor([self._n_targets(run, row) for run, row in zip(self.active, sequences, strict=True)])
        distance = torch.arange(int(n_targets.max()), 0, -1)  # of a position that predicts a target from the row's end
        read = (torch.tensor([[len(row) - 1] for row in sequences]) - distance).clamp_min(0).to(model.device)
        is_target = (distance <= n_targets[:, None]).to(model.device)
        by_layer: dict[str, list[Tensor]] = {"q": [], "k": []}
        forward = partial(model.run, ids, read=read, projection_deltas=projection_deltas_of(self.deltas))
        logits = forward(
            on_query=lambda layer, q: by_layer["q"].append(at_least_float32(q).detach().cpu()),
            on_key=lambda layer, k: by_layer["k"].append(at_least_float32(k).detach().cpu()),
        )
        for name, layers in by_layer.items():
            for run, row, content in zip(self.active, sequences, torch.stack(layers, dim=1), strict=True):
                getattr(run, name).append(content[:, : len(row)].clone())
        targets = ids.gather(1, read + 1)
        # Flat: over an axis that is not the last, torch sums a vocabulary one by one, and loses digits.
        flat_logits = at_least_float32(logits.flatten(0, 1))
        flat_losses = nn.functional.cross_entropy(flat_logits, targets.flatten(), reduction="none")
        token_losses = flat_losses.view(targets.shape)
        losses = token_losses.where(is_target, 0.0).sum(1) / is_target.sum(1)
        if not self.active[0].losses and not torch.isfinite(losses).all():
            check_activations(model, forward)
        return losses

    def _n_targets(self, run: _Run, row: tuple[int, ...]) -> int:
        """Return how many of a sequence's last tokens the loss is the mean over."""
        label_length = run.prompts.demonstration_label_lengths[len(run.losses)]
        return min(label_length if self.config.loss == "label" else len(row) - len(run.prompts.start), len(row) - 1)

    def _remove_finished(self, fingerprint: str) -> None:
        """Give the runs that have finished or diverged their result, and take them out of the batch."""
        for index, run in enumerate(self.active):
            change = run.path_length  # an upper bound of the change, which is computed only when the bound is exceeded
            if not change <= EXPLODED_WEIGHTS:
                tensors = [tensor[index] for by_layer in self.deltas.values() for tensor in by_layer]
                change = total_norm(tensors) / self.weight_norm
            run.result = divergence(self.model, run.losses, change, run.n_steps, run.lr)
            if run.result is None and len(run.losses) == run.n_steps:
                run.result = self._weight_delta(index, run, fingerprint)
        kept = [index for index, run in enumerate(self.active) if run.result is None]
        if len(kept) < len(self.active):
            self.active = [self.active[index] for index in kept]
            for by_layer in self.deltas.values():
                by_layer[:] = [tensor.detach()[kept] for tensor in by_layer]

    def _weight_delta(self, index: int, run: _Run, fingerprint: str) -> WeightDelta:
        deltas = {
            name: torch.stack([tensor.detach()[index] for tensor in by_layer]).cpu()
            for name, by_layer in self.deltas.items()
        }
        for name, by_layer in self._noise(run).items():  # drawn once more, which costs less than to keep it
            deltas[name] -= torch.stack(by_layer).cpu()
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
