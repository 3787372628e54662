"""x"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_dual.finetuning.sgd import (
    EXPLODED_WEIGHTS,
    DivergedError,
    check_arguments,
    divergence,
    finetune,
    only_trained,
    total_norm,
    with_untrained,
)
from icl_dual.finetuning.weight_delta import (
    PAPER_FINETUNING,
    PROJECTIONS_TRAINED,
    FinetuneConfig,
    WeightDelta,
    trained_weights,
)
from icl_dual.models import ProjectionName, Model, UnsupportedModelError
from icl_dual.prompts import Prompts
from icl_dual.torch_utils import is_out_of_memory

log = logging.getLogger(__name__)


def finetune_many(
    model: Model,
    prompts: Sequence[Prompts],
    lrs: Sequence[float],
    *,
    config: FinetuneConfig = PAPER_FINETUNING,
    at_once: int = 8,
    progress: bool = True,
) -> Iterator[WeightDelta | DivergedError]:
    """Finetune several times: at several rates, on several seeds' demonstrations, or on the same in several orders.

    A step on one demonstration takes about as long as reading the weights does. So runs of SGD go side by side, each
    with what it has changed so far beside the weights that all read, (W + ΔW) x = W x + ΔW x, and their deltas are
    `finetune`'s up to rounding, which is less here: no small change is lost in a large weight. SGD amplifies rounding,
    step by step, also that of another number of threads: hold runs against each other in float64. By other methods, in
    half precision, of a `HookedTransformer`, and of models that turn keys by the length of what runs, runs go one by
    one.

    Args:
        model: what to finetune; comes back as it was.
        prompts: by run, whose demonstrations to train on.
        lrs: by run, the learning rate.
        config: the loss, the method and the trained projections, as in `finetune`.
        at_once: most runs side by side; each takes its delta's memory, and as much for its gradient. Fewer where memory
            runs out.
        progress: show progress bars.

    Returns:
        An iterator: by run, its delta, or the error that says where it diverged. Runs are made as they are asked for,
        as many as go side by side at a time.

    Raises:
        ValueError: there are not as many rates as prompts, at_once is below 1, or as in `finetune`.
        PromptError: the prompts are not whole, or the model cannot read them.
        UnsupportedModelError: as in `finetune`, or a projection that is to move is not called as a layer of its own.
    """
    if len(prompts) != len(lrs):
        raise ValueError(
            f"expected as many learning rates as prompts, got {len(prompts)} prompts and {len(lrs)} rates: pass one rate "
            "for each"
        )
    if at_once < 1:
        raise ValueError(f"expected at least 1 run at once, got {at_once}")
    for one, lr in zip(prompts, lrs, strict=True):
        check_arguments(model, one, lr)
    one_by_one = (
        config.method != "sgd"
        or model.dtype.itemsize < 4
        or not model.supports_projection_deltas
        or model.rope_scaling_threshold is not None
    )
    if one_by_one:
        return (_or_diverged(model, one, lr, config, progress) for one, lr in zip(prompts, lrs, strict=True))
    return _in_groups(model, prompts, lrs, config, at_once, progress)


def _or_diverged(
    model: Model, prompts: Prompts, lr: float, config: FinetuneConfig, progress: bool
) -> WeightDelta | DivergedError:
    try:
        return finetune(model, prompts, lr=lr, config=config, progress=progress)
    except DivergedError as error:
        return error.with_traceback(None)  # which holds on to the run's memory


def _in_groups(
    model: Model,
    prompts: Sequence[Prompts],
    lrs: Sequence[float],
    config: FinetuneConfig,
    at_once: int,
    progress: bool,
) -> Iterator[WeightDelta | DivergedError]:
    first, said = 0, False
    with tqdm(total=len(prompts), desc="finetuning", disable=not progress, unit="run", leave=False) as bar:
        while first < len(prompts):
            group = slice(first, first + at_once)
            try:
                found = _SideBySide(model, prompts[group], lrs[group], config).run(progress)
            except (RuntimeError, MemoryError) as error:
                if at_once == 1 or not is_out_of_memory(error):
                    raise
                if not said:
                    log.warning("%d finetunings do not fit in memory side by side: running fewer", len(prompts[group]))
                said = True
                found = []
            if not found:  # out of the handler, whose traceback holds on to the memory of what failed
                at_once = (min(at_once, len(prompts) - first) + 1) // 2
                continue
            first += len(found)
            bar.update(len(found))
            yield from found


@dataclass
class _Run:
    """One of several finetunings side by side: its settings, and what its steps have left."""

    prompts: Prompts
    lr: float
    losses: list[float] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    path: float = 0.0
    result: WeightDelta | DivergedError | None = None

    @property
    def total(self) -> int:
        return len(self.prompts.training_sequences)


class _SideBySide:
    """Runs of SGD that share each pass, a row of its batch each. Those that are through, or diverged, leave."""

    def __init__(self, model: Model, prompts: Sequence[Prompts], lrs: Sequence[float], config: FinetuneConfig) -> None:
        self.model = model
        self.config = config
        self.runs = [_Run(one, lr) for one, lr in zip(prompts, lrs, strict=True)]
        self.going = list(self.runs)
        weights = trained_weights(model, config.trained)
        self.size = total_norm([weight.parameter.detach() for by_layer in weights.values() for weight in by_layer])
        self.moved: dict[str, list[Float[Tensor, "run d_out *d_in"]]] = {}
        for name, by_layer in weights.items():
            matrices = [weight.to_matrix(weight.parameter.detach()) for weight in by_layer]
            self.moved[name] = [matrix.new_zeros(len(self.runs), *matrix.shape) for matrix in matrices]

    def run(self, progress: bool) -> list[WeightDelta | DivergedError]:
        fingerprint, longest = self.model.fingerprint(), max(run.total for run in self.runs)
        what = f"finetuning {len(self.runs)} side by side"
        with (
            only_trained(self.model, []),
            tqdm(total=longest, desc=what, disable=not progress, unit="step", leave=False) as bar,
        ):
            while self.going:
                self._step()
                self._leave(fingerprint)
                bar.update()
        return [run.result for run in self.runs if run.result is not None]

    def _step(self) -> None:
        """Each run's next step, along the gradient of its own row's loss."""
        rows = [(*run.prompts.start, *run.prompts.training_sequences[len(run.losses)]) for run in self.going]
        tensors = [tensor.requires_grad_() for by_layer in self.moved.values() for tensor in by_layer]
        losses = self._losses(rows)
        gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise UnsupportedModelError(
                f"{self.model.name} ({self.model.architecture}): expected every projection that is to move to be a "
                "layer that runs, got one that does not. Finetune one by one, with icl_dual.finetuning.sgd"
            )
        lrs = torch.tensor([run.lr for run in self.going], dtype=losses.dtype, device=losses.device)
        with torch.no_grad():
            sizes = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0) * lrs
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.sub_(gradient * lrs.view(-1, *[1] * (gradient.ndim - 1)))
        for run, loss, size in zip(self.going, losses.tolist(), sizes.tolist(), strict=True):
            run.losses.append(loss)
            run.path += size / self.size

    def _losses(self, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, " run"]:
        """Each row's mean cross-entropy over its targets; its queries and keys are kept."""
        model = self.model
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
        n_targets = torch.tensor([self._n_targets(run, row) for run, row in zip(self.going, rows, strict=True)])
        back = torch.arange(int(n_targets.max()), 0, -1)  # from a row's last token, behind which nothing is predicted
        read = (torch.tensor([[len(row) - 1] for row in rows]) - back).clamp_min(0).to(model.device)
        counted = (back <= n_targets[:, None]).to(model.device)
        content: dict[str, list[Tensor]] = {"q": [], "k": []}
        logits = model.run(
            ids,
            read=read,
            on_query=lambda layer, q: content["q"].append(q.detach().cpu()),
            on_key=lambda layer, k: content["k"].append(k.detach().cpu()),
            projection_deltas=dict.fromkeys(PROJECTIONS_TRAINED[self.config.trained], self._added),
        )
        for name, layers in content.items():
            for run, row, found in zip(self.going, rows, torch.stack(layers, dim=1), strict=True):
                getattr(run, name).append(found[:, : len(row)].clone())
        targets = ids.gather(1, read + 1)
        # Flat: over an axis that is not the last, torch sums a vocabulary one by one, and loses digits.
        flat = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        each = flat.view(targets.shape)
        return each.where(counted, 0.0).sum(1) / counted.sum(1)

    def _added(self, layer: int, kind: ProjectionName, x: Float[Tensor, "run pos d_in"]) -> Float[Tensor, "run pos d_out"]:
        """ΔW x + Δb, each run's own."""
        added = x @ self.moved[f"W_{kind}"][layer].mT
        return added + self.moved[f"b_{kind}"][layer].unsqueeze(1) if f"b_{kind}" in self.moved else added

    def _n_targets(self, run: _Run, row: tuple[int, ...]) -> int:
        label = run.prompts.demonstration_label_lengths[len(run.losses)]
        return min(label if self.config.loss == "label" else len(row) - len(run.prompts.start), len(row) - 1)

    def _leave(self, fingerprint: str) -> None:
        """Runs that are through, or have diverged, leave with their result."""
        for index, run in enumerate(self.going):
            change = run.path  # no shorter than the change, which is looked at once it says so
            if not change <= EXPLODED_WEIGHTS:
                change = (
                    total_norm([tensor[index] for by_layer in self.moved.values() for tensor in by_layer]) / self.size
                )
            run.result = divergence(self.model, run.losses, change, run.total, run.lr)
            if run.result is None and len(run.losses) == run.total:
                run.result = self._delta(index, run, fingerprint)
        staying = [index for index, run in enumerate(self.going) if run.result is None]
        if len(staying) < len(self.going):
            self.going = [self.going[index] for index in staying]
            for by_layer in self.moved.values():
                by_layer[:] = [tensor.detach()[staying] for tensor in by_layer]

    def _delta(self, index: int, run: _Run, fingerprint: str) -> WeightDelta:
        moved = {
            name: torch.stack([tensor.detach()[index] for tensor in by_layer]).cpu()
            for name, by_layer in self.moved.items()
        }
        return WeightDelta(
            model=self.model.name,
            fingerprint=fingerprint,
            lr=run.lr,
            config=self.config,
            **with_untrained(self.model, moved),
            demonstrations=[list(tokens) for tokens in run.prompts.training_sequences],
            losses=torch.tensor(run.losses, dtype=torch.float64),
            training_q=torch.cat(run.q, dim=1),
            training_k=torch.cat(run.k, dim=1),
        )
