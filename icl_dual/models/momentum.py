"""Momentum attention as an intervention: any model, run with it for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from icl_dual.models.model import Model
from icl_dual.momentum import Eta, describe_eta, eta_by_layer_and_head

MOMENTUM_TAG = " + momentum "
"""What stands between a model's name and what momentum it runs with."""


@contextmanager
def momentum_attention(model: Model, eta: Eta, *, layers: Sequence[int] | None = None) -> Iterator[Model]:
    """The model with momentum attention; afterwards, also after an exception, as it was.

    Every head's output becomes MoAttn(V, K, q_t) = Attn(V, K, q_t) + Σ_{i<t} η^{t−i} v_i, in every run: captures,
    finetuning, decomposition. Its name says so within the block, and its fingerprint differs, so that what was made
    within is not paired with what was made outside. η = 0 is the model itself, bit for bit.

    Args:
        model: what to run; its weights are not touched.
        eta: η, from 0 to below 1: one for all heads, `[head]` or `[layer head]`.
        layers: where; at all layers where not given, and nowhere else.

    Yields:
        The model.

    Raises:
        ValueError: η is out of range or of another shape, there is no such layer, or the model has momentum already.
    """
    if model.momentum is not None:
        raise ValueError(
            f"expected a model without momentum, got {model.name!r} with momentum {describe_eta(model.momentum)}: "
            "what two would be together is not defined. Leave the other block first; a decoder that was trained with "
            "momentum is without it as Model of a bridge to its without_momentum()"
        )
    chosen = eta_by_layer_and_head(eta, model.n_layers, model.n_heads, layers)
    before = model.name, model.pass_residual
    model.momentum, model.pass_residual = chosen, None
    model.name += MOMENTUM_TAG + describe_eta(chosen)
    try:
        yield model
    finally:
        model.momentum = None
        model.name, model.pass_residual = before
