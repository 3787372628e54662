"""The paper's finetuning: SGD on key and value projections → `WeightDelta`, applied and taken off again.

One demonstration a step, in the order in which the in-context prompt shows them, one epoch, plain SGD at a constant
learning rate. Weights and biases of the key and value projections move, nothing else does, and the model comes back
bit for bit.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_dual import dual
from icl_dual.assets import load_tensors, reading, save_tensors
from icl_dual.models import Model, UnsupportedModelError
from icl_dual.prompts import Prompts

Loss = Literal["all", "label"]

EXPLODED_LOSS = 3.0
"""A loss above this many times log(d_vocab), the loss of knowing nothing, is an explosion."""

EXPLODED_WEIGHTS = 10.0
"""So is a change of weights this many times as large as the weights: behind a norm, it need not show in the loss."""


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
    """What finetuning on the demonstrations did to a model: ΔW_K, ΔW_V, Δb_K and Δb_V at every layer."""

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
    factors: Factors | None = None
    """The delta's outer products, where they were asked for."""

    def __repr__(self) -> str:
        return (
            f"WeightDelta({self.model!r}, lr={self.lr}, {len(self.losses)} steps, loss {self.losses[0]:.3f} → "
            f"{self.losses[-1]:.3f}, ‖ΔW_K‖={self.W_K.norm():.3g}, ‖ΔW_V‖={self.W_V.norm():.3g})"
        )

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the delta added; afterwards, also after an exception, as it was, bit for bit.

        Raises:
            ValueError: the delta belongs to another model.
        """
        projections = model.key_value_projections()
        shape = (len(projections), *projections[0][0].weight.shape)
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
        with _restored(_parameters(model)):
            with torch.no_grad():
                for layer, (key, value) in enumerate(projections):
                    for projection, weights, biases in ((key, self.W_K, self.b_K), (value, self.W_V, self.b_V)):
                        projection.weight.add_(weights[layer].to(projection.weight))
                        if biases is not None:
                            projection.bias.add_(biases[layer].to(projection.bias))
            yield model

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the delta into a folder, as safetensors and JSON."""
        tensors = {"W_K": self.W_K, "W_V": self.W_V, "losses": self.losses, "training_q": self.training_q}
        if self.b_K is not None and self.b_V is not None:
            tensors |= {"b_K": self.b_K, "b_V": self.b_V}
        metadata = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "lr": self.lr,
            "loss": self.loss,
            "demonstrations": self.demonstrations,
        }
        if self.factors is not None:
            parts = vars(self.factors)
            metadata["factors_residual"] = parts["residual"]
            tensors |= {f"factors/{name}": part for name, part in parts.items() if isinstance(part, Tensor)}
        save_tensors(Path(folder), tensors, metadata)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "WeightDelta":
        """Read a delta that `save` wrote.

        Raises:
            AssetError: the folder is missing or damaged.
        """
        tensors, metadata = load_tensors(Path(folder))
        parts = {name.removeprefix("factors/"): tensors.pop(name) for name in list(tensors) if "/" in name}
        residual = metadata.pop("factors_residual", None)
        with reading("WeightDelta", folder):
            factors = None if residual is None else Factors(**parts, residual=residual)
            return cls(**metadata, **{"b_K": None, "b_V": None, **tensors}, factors=factors)


def finetune(
    model: Model, prompts: Prompts, *, lr: float, loss: Loss = "all", factors: bool = False, progress: bool = True
) -> WeightDelta:
    """Finetune key and value projections on the demonstrations the way Dai et al. (2023) do.

    Args:
        model: what to finetune; comes back as it was.
        prompts: whose demonstrations to train on, each behind the start token and without a separator.
        lr: the learning rate of SGD.
        loss: mean cross-entropy over all tokens of a demonstration (the released code's), or its label word only.
        factors: keep the outer products that the delta is the sum of, and check that it is.
        progress: show a progress bar.

    Raises:
        ValueError: lr is not a positive number, there are no demonstrations, or the loss is unknown.
        DivergedError: the loss or the weights exploded or are no numbers; says at which step and lr.
        UnsupportedModelError: a step's factors do not make up its gradient; says at which layer.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"expected a learning rate above 0, got {lr}")
    if loss not in get_args(Loss):
        raise ValueError(f"expected loss 'all' or 'label', got {loss!r}")
    if not prompts.training:
        raise ValueError("expected demonstrations to finetune on, got none")
    parameters = _parameters(model)
    losses: list[float] = []
    training_q: list[Tensor] = []
    fingerprint = model.fingerprint()
    recorder = _FactorRecorder(model, lr) if factors else None
    with _restored(parameters) as before, _only_trained(model, parameters), recorder or nullcontext():
        size, path = _norm(before), 0.0
        # Half precision would round small steps away: they are taken on float32 copies, as mixed precision does.
        half = model.dtype.itemsize < 4
        stepped = [nn.Parameter(parameter.detach().float()) for parameter in parameters] if half else parameters
        copies = list(zip(stepped, parameters, strict=True)) if half else []
        optimizer = torch.optim.SGD(stepped, lr=lr, foreach=True)
        steps = zip(prompts.training, prompts.demonstration_label_lengths, strict=True)
        total = len(prompts.training)
        for step, (tokens, label_length) in enumerate(
            tqdm(steps, total=total, desc=f"finetuning, lr {lr:g}", disable=not progress, unit="step", leave=False), 1
        ):
            value, q = _step_loss(model, prompts.start, tokens, label_length if loss == "label" else len(tokens))
            losses.append(value.item())
            training_q.append(q)
            for parameter in parameters:
                parameter.grad = None
            value.backward()
            if recorder is not None:
                recorder.check(step)
            for copy, parameter in copies:
                copy.grad = None if parameter.grad is None else parameter.grad.float()
            optimizer.step()
            for copy, parameter in copies:
                parameter.detach().copy_(copy.detach())
            # The path is no shorter than the change and takes no copy of the weights to know: it says when to look.
            path += lr * _norm([parameter.grad for parameter in parameters if parameter.grad is not None]) / size
            change = path if path <= EXPLODED_WEIGHTS else _norm(_differences(parameters, before)) / size
            if not (losses[-1] <= EXPLODED_LOSS * math.log(model.d_vocab) and change <= EXPLODED_WEIGHTS):
                raise DivergedError(
                    f"finetuning diverged at step {step} of {total} with lr={lr:g}: loss {losses[-1]:.3g} (first step: "
                    f"{losses[0]:.3g}), weights changed by {change:.3g} times their own norm. Use a smaller rate"
                )
        deltas = _differences(parameters, before)
    W_K, b_K, W_V, b_V = _by_kind(model, deltas)
    return WeightDelta(
        model=model.name,
        fingerprint=fingerprint,
        lr=lr,
        loss=loss,
        W_K=W_K,
        W_V=W_V,
        b_K=b_K,
        b_V=b_V,
        demonstrations=[list(tokens) for tokens in prompts.training],
        losses=torch.tensor(losses, dtype=torch.float64),
        training_q=torch.cat(training_q, dim=1),
        factors=None if recorder is None else recorder.factors(W_K, W_V),
    )


class _FactorRecorder:
    """Keeps every training token's input to the projections and the error signal at their output, step by step."""

    def __init__(self, model: Model, lr: float) -> None:
        self.model, self.lr = model, lr
        self.pairs = model.key_value_projections()
        self.x: list[list[Tensor]] = [[] for _ in self.pairs]
        self.errors: dict[str, list[list[Tensor]]] = {kind: [[] for _ in self.pairs] for kind in "KV"}
        self.handles = []
        for layer, pair in enumerate(self.pairs):
            for kind, projection in zip("KV", pair, strict=True):
                self.handles.append(projection.register_forward_hook(partial(self._watch, layer, kind)))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _watch(self, layer: int, kind: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if kind == "K":  # keys and values are projected from the same input
            self.x[layer].append(_at_least_float32(args[0][0]).detach().cpu())
        output.register_hook(lambda gradient: self._keep(layer, kind, gradient))

    def _keep(self, layer: int, kind: str, gradient: Tensor) -> None:
        self.errors[kind][layer].append(-self.lr * _at_least_float32(gradient[0]).cpu())

    def check(self, step: int) -> None:
        """Hold the step's factors against its gradient, which no rounding of the weights has touched."""
        for layer, pair in enumerate(self.pairs):
            for kind, projection in zip("KV", pair, strict=True):
                assert projection.weight.grad is not None
                gradient = -self.lr * _at_least_float32(projection.weight.grad).cpu()
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


def _step_loss(
    model: Model, start: tuple[int, ...], tokens: tuple[int, ...], n_targets: int
) -> tuple[Tensor, Float[Tensor, "layer train_token head d_head"]]:
    """Mean cross-entropy of a demonstration's last `n_targets` tokens, and the queries of all that runs."""
    ids = torch.tensor([[*start, *tokens]], device=model.device)
    q: list[Tensor] = []

    def on_query(layer: int, queries: Tensor) -> None:
        q.append(_at_least_float32(queries[0]).detach().cpu())

    read = torch.arange(ids.shape[1] - 1 - n_targets, ids.shape[1] - 1, device=model.device)
    logits = model.run(ids, read=read[None], on_query=on_query)
    return nn.functional.cross_entropy(_at_least_float32(logits[0]), ids[0, -n_targets:]), torch.stack(q)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _parameters(model: Model) -> list[nn.Parameter]:
    """Weights and biases of the key and value projections, layer by layer: W_K, b_K, W_V, b_V."""
    found = []
    for pair in model.key_value_projections():
        for projection in pair:
            found.append(projection.weight)
            if projection.bias is not None:
                found.append(projection.bias)
    return found


def _differences(after: list[nn.Parameter], before: list[Tensor]) -> list[Tensor]:
    return [now.detach() - then for now, then in zip(after, before, strict=True)]


def _norm(tensors: list[Tensor]) -> float:
    return nn.utils.get_total_norm([_at_least_float32(tensor) for tensor in tensors]).item()


def _by_kind(model: Model, deltas: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The deltas of `_parameters`, stacked over layers as W_K, b_K, W_V and b_V."""
    deltas = [delta.cpu() for delta in deltas]
    if len(deltas) == 2 * model.n_layers:
        return torch.stack(deltas[0::2]), None, torch.stack(deltas[1::2]), None
    W_K, b_K, W_V, b_V = (torch.stack(deltas[kind::4]) for kind in range(4))
    return W_K, b_K, W_V, b_V


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
