"""The paper's finetuning: SGD on key and value projections → `WeightDelta`, applied and taken off again.

One demonstration a step, in the order in which the in-context prompt shows them, one epoch, plain SGD at a constant
learning rate. Weights and biases of the key and value projections move, nothing else does, and the model comes back
bit for bit.

What others have set beside it: the loss of the label word alone (Shen et al., 2024); one step on all demonstrations,
from whose gradients equations 7–9 read the dual form; each layer trained by its own loss, which lets no layer know of
those above it, as a forward pass does not (layer-causal, Deutch et al., 2024); keys or values alone; all of attention.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_dual import dual
from icl_dual.capture import out_of_memory
from icl_dual.models import Kind, Model, OnTensor, Projection, UnsupportedModelError, Weight
from icl_dual.prompts import Prompts, refuse_unreadable
from icl_dual.storage import AssetError, load_tensors, reading, save_tensors

Loss = Literal["all", "label"]
Method = Literal["sgd", "full-batch", "layer-causal"]
"""`sgd`, one demonstration a step; `full-batch`, one step on the sum of all demonstrations' losses; `layer-causal`, one
demonstration a step, each layer by its own loss through the final norm and the unembedding."""
Trained = Literal["key-value", "key", "value", "attention"]
"""Which projections of attention move; `attention` is all four."""

_KINDS: dict[Trained, tuple[Kind, ...]] = {
    "key-value": ("K", "V"),
    "key": ("K",),
    "value": ("V",),
    "attention": ("Q", "K", "V", "O"),
}

EXPLODED_LOSS = 3.0
"""A loss above this many times log(d_vocab), the loss of knowing nothing, is an explosion; or above this many times the
first step's, for a model that begins with knowing less."""

EXPLODED_WEIGHTS = 10.0
"""So is a change of weights this many times as large as the weights: behind a norm, it need not show in the loss."""

LAYOUT = "d_out d_in"
"""How a delta's matrices are saved."""

READOUT_TOKENS = 512
"""Layers are read out together up to so many tokens: each reading takes the whole unembedding through memory."""


log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """Finetuning ran away: its loss or its weights are no longer finite, or its loss exploded."""


@dataclass(frozen=True)
class Factors:
    """What a delta is made of: ΔW = Σ_i e_i ⊗ x_i over the training tokens (equations 7–9), and Δb = Σ_i e_i."""

    x: Float[Tensor, "layer train_token d_model"]
    """The projections' inputs; each demonstration's start token is a training token too."""
    e_K: Float[Tensor, "layer train_token d_kv"]
    """Error signals of the key projections, −lr ∂L/∂(output), each at its own step's weights."""
    e_V: Float[Tensor, "layer train_token d_kv"]
    steps: Int[Tensor, " train_token"]
    """Which demonstration each training token belongs to."""
    residual: float
    """How far the factors' sum is from the delta, relative to it, at worst over layers: rounding of the weights, which
    a small change of a large weight shows. NaN where a layer did not change."""


@dataclass(frozen=True)
class WeightDelta:
    """What finetuning on the demonstrations did to a model: ΔW_K, ΔW_V, Δb_K and Δb_V at every layer.

    What was not trained is zero, or `None` for queries and outputs.
    """

    model: str
    fingerprint: str
    """Of the weights it started from."""
    lr: float
    loss: Loss
    W_K: Float[Tensor, "layer d_kv d_model"]
    """ΔW_K; d_kv is n_key_value_heads·d_head, heads in order."""
    W_V: Float[Tensor, "layer d_kv d_model"]
    b_K: Float[Tensor, "layer d_kv"] | None
    """Δb_K; `None` where the projections have no bias."""
    b_V: Float[Tensor, "layer d_kv"] | None
    demonstrations: list[list[int]]
    """The token ids trained on, in order."""
    losses: Float[Tensor, " step"]
    """Mean cross-entropy in nats of each demonstration, before its own update."""
    training_q: Float[Tensor, "layer train_token head d_head"]
    """Queries W_Q x of each step's start token and demonstration, recorded before the step's update, in order."""
    training_k: Float[Tensor, "layer train_token kv_head d_head"]
    """Their keys W_K x, before rotation."""
    method: Method = "sgd"
    """How was descended."""
    trained: Trained = "key-value"
    """Which projections moved."""
    W_Q: Float[Tensor, "layer d_q d_model"] | None = None
    W_O: Float[Tensor, "layer d_model d_q"] | None = None
    b_Q: Float[Tensor, "layer d_q"] | None = None
    b_O: Float[Tensor, "layer d_model"] | None = None
    factors: Factors | None = None
    """The delta's outer products, where they were asked for."""

    def __repr__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        norms = ", ".join(f"‖Δ{name}‖={moved.norm():.3g}" for name, moved in sizes.items() if moved is not None)
        return (
            f"WeightDelta({self.model!r}, lr={self.lr}, {self.method}, {self.trained} trained, "
            f"{len(self.losses)} demonstrations, mean loss {self.losses.mean():.3f} before each one's step, {norms})"
        )

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the delta added; afterwards, also after an exception, as it was, bit for bit.

        Raises:
            ValueError: the delta belongs to another model.
        """
        shape = (model.n_layers, model.n_key_value_heads * model.d_head, model.d_model)
        if self.model != model.name or tuple(self.W_K.shape) != shape:
            raise ValueError(
                f"expected a delta of {model.name!r} with ΔW_K of shape {shape}, got one of {self.model!r} with shape "
                f"{tuple(self.W_K.shape)}"
            )
        if self.fingerprint != (now := model.fingerprint()):
            raise ValueError(
                f"expected a delta finetuned from these weights of {model.name!r} (fingerprint {now}), got one from "
                f"{self.fingerprint}: is another delta applied, or was another model finetuned?"
            )
        weights = _weights(model, self.trained)
        with _restored([weight.parameter for by_layer in weights.values() for weight in by_layer]):
            with torch.no_grad():
                for name, by_layer in weights.items():
                    for weight, moved in zip(by_layer, getattr(self, name), strict=True):
                        weight.parameter.add_(weight.stored(moved).to(weight.parameter))
            yield model

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the delta into a folder, as safetensors and JSON."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        metadata = {
            name: value
            for name, value in vars(self).items()
            if name not in tensors and name != "factors" and value is not None
        }
        metadata["layout"] = LAYOUT
        if self.factors is not None:
            parts = vars(self.factors)
            metadata["factors_residual"] = parts["residual"]
            tensors |= {f"factors/{name}": part for name, part in parts.items() if isinstance(part, Tensor)}
        save_tensors(Path(folder), tensors, metadata)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "WeightDelta":
        """Read a delta that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged, or its ΔW_O is laid out as older versions did.
        """
        tensors, metadata = load_tensors(Path(folder))
        parts = {name.removeprefix("factors/"): tensors.pop(name) for name in list(tensors) if "/" in name}
        residual, layout = metadata.pop("factors_residual", None), metadata.pop("layout", None)
        with reading("WeightDelta", folder):
            factors = None if residual is None else Factors(**parts, residual=residual)
            made = cls(**metadata, **{"b_K": None, "b_V": None, **tensors}, factors=factors)
        if made.W_O is not None and layout != LAYOUT:  # once, it was laid out as each model keeps it
            raise AssetError(
                f"{folder}: expected ΔW_O as [{LAYOUT}], got a delta that an older version saved. Finetune anew"
            )
        return made

    def randomised(self, seed: int) -> "WeightDelta":
        """The delta with every matrix and bias turned into a random direction of the same norm.

        What a change of weights of this size does, whatever it has learned: a control for `applied`. Directions are
        centred Gaussians.
        """
        rng = np.random.default_rng(seed)
        turned: dict[str, Tensor] = {}
        for name in _DELTAS:
            if (moved := getattr(self, name)) is not None:
                drawn = torch.from_numpy(rng.standard_normal(moved.shape)).flatten(1)
                size = moved.double().flatten(1).norm(dim=1, keepdim=True)
                turned[name] = (drawn * (size / drawn.norm(dim=1, keepdim=True))).view(moved.shape).to(moved)
        return replace(self, **turned, factors=None)


def finetune(
    model: Model,
    prompts: Prompts,
    *,
    lr: float,
    loss: Loss = "all",
    method: Method = "sgd",
    trained: Trained = "key-value",
    factors: bool = False,
    progress: bool = True,
) -> WeightDelta:
    """Finetune on the demonstrations the way Dai et al. (2023) do, or as others have set beside it.

    Args:
        model: what to finetune, with its momentum where it has any; comes back as it was.
        prompts: whose demonstrations to train on, each behind the start token and without a separator.
        lr: the learning rate of SGD.
        loss: mean cross-entropy over all tokens of a demonstration (the released code's), or its label word only.
        method: the paper's `sgd`; `full-batch`, a single step on the sum of the demonstrations' losses, which to first
            order is as long as the steps of SGD together; or `layer-causal`, where gradients stop at every layer's
            input, and its output is read out by the final norm and the unembedding, which stay as they are.
        trained: which projections move.
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
    _refuse(model, prompts, lr, {"loss": (loss, Loss), "method": (method, Method), "trained": (trained, Trained)})
    if factors and trained not in ("key-value", "attention"):
        raise ValueError(f"expected keys and values to be trained where factors are kept, got trained={trained!r}")
    weights = _weights(model, trained)
    parameters = [weight.parameter for by_layer in weights.values() for weight in by_layer]
    losses: list[float] = []
    training: dict[str, list[Tensor]] = {"q": [], "k": []}
    fingerprint = model.fingerprint()
    recorder = _FactorRecorder(model, lr) if factors else None
    with _restored(parameters) as before, _only_trained(model, parameters):
        descent = _Descent(model, parameters, before, lr, whole=method == "full-batch")
        steps = zip(prompts.training, prompts.demonstration_label_lengths, strict=True)
        total = len(prompts.training)
        for step, (tokens, label_length) in enumerate(
            tqdm(steps, total=total, desc=f"finetuning, lr {lr:g}", disable=not progress, unit="step", leave=False), 1
        ):
            n_targets = label_length if loss == "label" else len(tokens)
            for parameter in parameters:
                parameter.grad = None
            local = method == "layer-causal"
            value, q, k = _backward(model, prompts.start, tokens, n_targets, local=local, recorder=recorder)
            losses.append(value)
            training["q"].append(q)
            training["k"].append(k)
            if recorder is not None:
                recorder.check(step)
            change = descent.step(last=step == total)
            if (diverged := _diverged(model, losses, change, total, lr)) is not None:
                raise diverged
        deltas = _deltas(model, weights, before)
    return WeightDelta(
        model=model.name,
        fingerprint=fingerprint,
        lr=lr,
        loss=loss,
        method=method,
        trained=trained,
        **deltas,
        demonstrations=[list(tokens) for tokens in prompts.training],
        losses=torch.tensor(losses, dtype=torch.float64),
        training_q=torch.cat(training["q"], dim=1),
        training_k=torch.cat(training["k"], dim=1),
        factors=None if recorder is None else recorder.factors(deltas["W_K"], deltas["W_V"]),
    )


def finetune_many(
    model: Model,
    prompts: Sequence[Prompts],
    lrs: Sequence[float],
    *,
    loss: Loss = "all",
    method: Method = "sgd",
    trained: Trained = "key-value",
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
        loss: as in `finetune`.
        method: the same.
        trained: the same.
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
            f"expected a prompts and a learning rate for each run, got {len(prompts)} prompts and {len(lrs)} rates"
        )
    if at_once < 1:
        raise ValueError(f"expected at least 1 run at once, got {at_once}")
    for one, lr in zip(prompts, lrs, strict=True):
        _refuse(model, one, lr, {"loss": (loss, Loss), "method": (method, Method), "trained": (trained, Trained)})
    one_by_one = method != "sgd" or model.dtype.itemsize < 4 or not model.adds or model.rotation_switch is not None
    if one_by_one:
        options: dict[str, Any] = {"loss": loss, "method": method, "trained": trained, "progress": progress}
        return (_or_diverged(model, one, lr, options) for one, lr in zip(prompts, lrs, strict=True))
    return _in_groups(model, prompts, lrs, loss, trained, at_once, progress)


def _or_diverged(model: Model, prompts: Prompts, lr: float, options: dict[str, Any]) -> WeightDelta | DivergedError:
    try:
        return finetune(model, prompts, lr=lr, **options)
    except DivergedError as error:
        return error.with_traceback(None)  # which holds on to the run's memory


def _in_groups(
    model: Model,
    prompts: Sequence[Prompts],
    lrs: Sequence[float],
    loss: Loss,
    trained: Trained,
    at_once: int,
    progress: bool,
) -> Iterator[WeightDelta | DivergedError]:
    first, said = 0, False
    with tqdm(total=len(prompts), desc="finetuning", disable=not progress, unit="run", leave=False) as bar:
        while first < len(prompts):
            group = slice(first, first + at_once)
            try:
                found = _SideBySide(model, prompts[group], lrs[group], loss, trained).run(progress)
            except (RuntimeError, MemoryError) as error:
                if at_once == 1 or not out_of_memory(error):
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


def _diverged(model: Model, losses: Sequence[float], change: float, total: int, lr: float) -> DivergedError | None:
    """What is wrong after the step whose loss is the last, if anything."""
    most = EXPLODED_LOSS * max(math.log(model.d_vocab), losses[0])
    if math.isfinite(losses[-1]) and losses[-1] <= most and change <= EXPLODED_WEIGHTS:
        return None
    return DivergedError(
        f"finetuning diverged at step {len(losses)} of {total} with lr={lr:g}: loss {losses[-1]:.3g} (first step: "
        f"{losses[0]:.3g}), weights changed by {change:.3g} times their own norm. Use a smaller rate"
    )


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
        return len(self.prompts.training)


class _SideBySide:
    """Runs of SGD that share each pass, a row of its batch each. Those that are through, or diverged, leave."""

    def __init__(
        self, model: Model, prompts: Sequence[Prompts], lrs: Sequence[float], loss: Loss, trained: Trained
    ) -> None:
        self.model = model
        self.loss: Loss = loss
        self.trained: Trained = trained
        self.runs = [_Run(one, lr) for one, lr in zip(prompts, lrs, strict=True)]
        self.going = list(self.runs)
        weights = _weights(model, trained)
        self.size = _norm([weight.parameter.detach() for by_layer in weights.values() for weight in by_layer])
        self.moved: dict[str, list[Float[Tensor, "run d_out *d_in"]]] = {}
        for name, by_layer in weights.items():
            matrices = [weight.matrix(weight.parameter.detach()) for weight in by_layer]
            self.moved[name] = [matrix.new_zeros(len(self.runs), *matrix.shape) for matrix in matrices]

    def run(self, progress: bool) -> list[WeightDelta | DivergedError]:
        fingerprint, longest = self.model.fingerprint(), max(run.total for run in self.runs)
        what = f"finetuning {len(self.runs)} side by side"
        with (
            _only_trained(self.model, []),
            tqdm(total=longest, desc=what, disable=not progress, unit="step", leave=False) as bar,
        ):
            while self.going:
                self._step()
                self._leave(fingerprint)
                bar.update()
        return [run.result for run in self.runs if run.result is not None]

    def _step(self) -> None:
        """Each run's next step, along the gradient of its own row's loss."""
        rows = [(*run.prompts.start, *run.prompts.training[len(run.losses)]) for run in self.going]
        tensors = [tensor.requires_grad_() for by_layer in self.moved.values() for tensor in by_layer]
        losses = self._losses(rows)
        gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise UnsupportedModelError(
                f"{self.model.name} ({self.model.architecture}): expected every projection that is to move to be a "
                "layer that runs, got one that does not. Finetune one by one, with icl_dual.finetune"
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
            adding=dict.fromkeys(_KINDS[self.trained], self._added),
        )
        for name, layers in content.items():
            for run, row, found in zip(self.going, rows, torch.stack(layers, dim=1), strict=True):
                getattr(run, name).append(found[:, : len(row)].clone())
        targets = ids.gather(1, read + 1)
        # Flat: over an axis that is not the last, torch sums a vocabulary one by one, and loses digits.
        flat = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        each = flat.view(targets.shape)
        return each.where(counted, 0.0).sum(1) / counted.sum(1)

    def _added(self, layer: int, kind: Kind, x: Float[Tensor, "run pos d_in"]) -> Float[Tensor, "run pos d_out"]:
        """ΔW x + Δb, each run's own."""
        added = x @ self.moved[f"W_{kind}"][layer].mT
        return added + self.moved[f"b_{kind}"][layer].unsqueeze(1) if f"b_{kind}" in self.moved else added

    def _n_targets(self, run: _Run, row: tuple[int, ...]) -> int:
        label = run.prompts.demonstration_label_lengths[len(run.losses)]
        return min(label if self.loss == "label" else len(row) - len(run.prompts.start), len(row) - 1)

    def _leave(self, fingerprint: str) -> None:
        """Runs that are through, or have diverged, leave with their result."""
        for index, run in enumerate(self.going):
            change = run.path  # no shorter than the change, which is looked at once it says so
            if not change <= EXPLODED_WEIGHTS:
                change = _norm([tensor[index] for by_layer in self.moved.values() for tensor in by_layer]) / self.size
            run.result = _diverged(self.model, run.losses, change, run.total, run.lr)
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
            loss=self.loss,
            trained=self.trained,
            **_with_still(self.model, moved),
            demonstrations=[list(tokens) for tokens in run.prompts.training],
            losses=torch.tensor(run.losses, dtype=torch.float64),
            training_q=torch.cat(run.q, dim=1),
            training_k=torch.cat(run.k, dim=1),
        )


def _refuse(model: Model, prompts: Prompts, lr: float, options: dict[str, tuple[str, Any]]) -> None:
    refuse_unreadable(model, prompts)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"expected a learning rate above 0, got {lr}")
    for name, (got, known) in options.items():
        if got not in get_args(known):
            raise ValueError(f"expected {name} out of {get_args(known)}, got {got!r}")
    if not prompts.training:
        raise ValueError("expected demonstrations to finetune on, got none")
    if short := [tokens for tokens in prompts.training if len(prompts.start) + len(tokens) < 2]:
        raise ValueError(f"expected demonstrations with a token that others come before, got {short[0]}")


class _Descent:
    """Plain gradient descent: a step for each demonstration's gradient, or one step for all of them together."""

    def __init__(
        self, model: Model, parameters: list[nn.Parameter], before: list[Tensor], lr: float, *, whole: bool
    ) -> None:
        self.parameters, self.before, self.lr, self.whole = parameters, before, lr, whole
        self.size, self.path = _norm(before), 0.0
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
        self.path += self.lr * _norm(found) / self.size
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
        return _norm(_differences(self.parameters, self.before)) / self.size


class _FactorRecorder:
    """Keeps every training token's input to the projections and the error signal at their output, step by step."""

    def __init__(self, model: Model, lr: float) -> None:
        self.model, self.lr = model, lr
        self.projections: dict[Kind, list[Projection]] = {"K": model.projections("K"), "V": model.projections("V")}
        self.x: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
        self.errors: dict[Kind, list[list[Tensor]]] = {kind: [[] for _ in self.x] for kind in self.projections}

    def on_error(
        self,
        layer: int,
        kind: Kind,
        x: Float[Tensor, "batch train_token d_model"],
        gradient: Float[Tensor, "batch train_token d_kv"],
    ) -> None:
        """Keep what a step's backward pass shows of a layer."""
        if kind == "K":  # keys and values are projected from the same input
            self.x[layer].append(_at_least_float32(x[0]).cpu())
        self.errors[kind][layer].append(-self.lr * _at_least_float32(gradient[0]).cpu())

    def check(self, step: int) -> None:
        """Hold the step's factors against its gradient, which no rounding of the weights has touched."""
        for kind, projections in self.projections.items():
            for layer, projection in enumerate(projections):
                found = projection.W.parameter.grad
                assert found is not None
                gradient = -self.lr * _at_least_float32(projection.W.matrix(found)).cpu()
                missing = (dual.outer_sum(self.errors[kind][layer][-1], self.x[layer][-1]) - gradient).norm()
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
        missing = [(dual.outer_sum(e, x) - W).flatten(1).norm(dim=1) for e, W in ((e_K, W_K), (e_V, W_V))]
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
        return lambda layer, found: content[kind].append(_at_least_float32(found[0]).detach().cpu())

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
        on_error=None if recorder is None else recorder.on_error,
    )
    loss = nn.functional.cross_entropy(_at_least_float32(logits[0]), targets)
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
        own = _at_least_float32(model.unembed(torch.stack(some)))
        loss = nn.functional.cross_entropy(own.flatten(0, 1), targets.repeat(len(some)), reduction="sum")
        (loss / len(targets)).backward()
    _refuse_other_readout(model, own[-1].detach(), logits)


def _refuse_other_readout(model: Model, got: Tensor, expected: Tensor) -> None:
    off = (got - expected).abs().max() / expected.abs().max()
    if not off <= 10 * math.sqrt(torch.finfo(model.dtype).eps):
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}): expected the last layer's output to be read out by the final norm "
            f"and the unembedding, got logits that are off by {off:.1e} of the model's own: layers have no loss of "
            "their own here, and method='layer-causal' cannot train them"
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_DELTAS = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")


def _weights(model: Model, trained: Trained = "key-value") -> dict[str, list[Weight]]:
    """Weights and biases of the projections that move, by their delta's name and by layer."""
    found = {}
    for kind in _KINDS[trained]:
        weights, biases = zip(*model.projections(kind), strict=True)
        found |= {f"W_{kind}": list(weights)} | ({f"b_{kind}": list(biases)} if None not in biases else {})
    return found


def _differences(after: list[nn.Parameter], before: list[Tensor]) -> list[Tensor]:
    return [now.detach() - then for now, then in zip(after, before, strict=True)]


def _norm(tensors: list[Tensor]) -> float:
    return nn.utils.get_total_norm([_at_least_float32(tensor) for tensor in tensors]).item()


def _deltas(model: Model, weights: dict[str, list[Weight]], before: list[Tensor]) -> dict[str, Any]:
    """What the weights have changed by, as matrices, by layer."""
    then = iter(before)
    moved = {
        name: torch.stack([weight.matrix(weight.parameter.detach() - next(then)).cpu() for weight in by_layer])
        for name, by_layer in weights.items()
    }
    return _with_still(model, moved)


def _with_still(model: Model, moved: dict[str, Tensor]) -> dict[str, Any]:
    """What has moved, and zero for keys and values that have not."""
    found: dict[str, Any] = dict(moved)
    for kind in ("K", "V"):
        W, b = model.projections(kind)[0]
        for name, weight in ((f"W_{kind}", W), (f"b_{kind}", b)):
            like = None if weight is None else weight.matrix(weight.parameter.detach())
            still = None if like is None else like.new_zeros(model.n_layers, *like.shape).cpu()
            found.setdefault(name, still)
    return found


@contextmanager
def _restored(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The parameters' values, put back when the block ends, however it ends."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def _only_trained(model: Model, trained: list[nn.Parameter]) -> Iterator[None]:
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
