"""Momentum attention as an intervention: run any model with momentum for a while."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from icl_dual.arguments import checked
from icl_dual.models.model import Model
from icl_dual.momentum import Eta, describe_eta, eta_by_layer_and_head

MOMENTUM_TAG = " + momentum "
"""The text between a model's name and the η that it runs with."""


@checked
@contextmanager
def momentum_attention(model: Model, eta: Eta, *, layers: Sequence[int] | None = None) -> Generator[Model]:
    """Run a model with momentum attention inside a `with` block, and restore it afterwards, also after an exception.

    In every run (captures, finetuning, decomposition), the output of every head becomes

        MoAttn(V, K, q_t) = Attn(V, K, q_t) + Σ_{i<t} η^{t−i} v_i    (Dai et al., 2023, §5).

    Inside the block the model has another name and another fingerprint, so that results from inside and outside cannot
    be paired by mistake. η = 0 gives the model itself, bit for bit.

    Args:
        model: the model to run; its weights are not changed.
        eta: η, at least 0 and below 1: a number for all heads, or a tensor `[head]` or `[layer head]`.
        layers: the layers that have momentum; all by default.

    Yields:
        The same model.

    Raises:
        ValueError: η is out of range or has another shape, a layer does not exist, or the model already has momentum.

    Example:
        >>> import torch
        >>> from icl_dual.models import momentum_attention, tiny_model
        >>> model = tiny_model()
        >>> with momentum_attention(model, 0.1, layers=[1]), torch.no_grad():
        ...     print(model.name)
        ...     logits = model.run(torch.tensor([[0, 5, 9]]))
        tiny + momentum η=0.1 in layer 1
        >>> model.name
        'tiny'
    """
    if model.momentum is not None:
        raise ValueError(
            f"expected a model without momentum, got {model.name!r} with momentum {describe_eta(model.momentum)}: "
            "leave the other block first. For a decoder that was trained with momentum, wrap a bridge to its "
            "without_momentum() in Model"
        )
    eta_by_head = eta_by_layer_and_head(eta, model.n_layers, model.n_heads, layers)
    tag = MOMENTUM_TAG + describe_eta(eta_by_head)
    with model.journal.block() as undo:
        undo.set(model, "momentum", eta_by_head)
        undo.set(model, "pass_residual", None)
        undo.set(model, "name", model.name + tag)
        undo.set(model, "description", model.description + tag)
        yield model
