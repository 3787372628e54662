"""Models that have learned nothing, of a trained model's configuration."""

from typing import Literal, get_args

from torch import nn

from icl_dual.models.backend import UnsupportedModelError
from icl_dual.models.model import Model

Control = Literal["untrained", "random-blocks"]
"""Weights that have learned nothing: all of them drawn anew, or those of attention and MLP, between trained embeddings
and norms."""


def control_name(name: str, control: Control, seed: int) -> str:
    """What results call a control of a model."""
    return f"{name} ({control}, seed {seed})"


def control_model(model: Model, control: Control, *, seed: int) -> Model:
    """A model of the same configuration that has learned nothing, or nothing but its embeddings and norms.

    Momentum that the model has is of its configuration: the control has it for good, also where it is a block's.

    Weights are drawn as the model's own class initialises them for its configuration, on the CPU by `seed`, without
    touching global random state. What a control keeps of the trained model it shares with it: these weights are in
    memory once.

    Args:
        model: whose configuration, tokenizer, device and dtype to take; it is left as it is.
        control: `untrained`, all weights anew (Deutch et al., 2024); or `random-blocks`, anew all weights of attention
            and MLP, while embeddings, unembedding and norms stay trained.
        seed: of the draw.

    Raises:
        UnsupportedModelError: it is not known how the model's class initialises its weights, or which of them belong to
            attention and MLP.
        ValueError: there is no such control.
    """
    if control not in get_args(Control):
        raise ValueError(f"expected a control out of {get_args(Control)}, got {control!r}")
    try:
        drawn = model.backend.reinitialised(seed)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{model.name}: {error}") from error
    name, provenance = control_name(model.name, control, seed), f"{model.provenance}, {control}, seed {seed}"
    made = Model(drawn, name, provenance, momentum=model.momentum)
    if control == "random-blocks":
        blocks = {id(parameter) for parameter in _block_weights(made)}
        for ours, trained in zip(made.parameters(), model.parameters(), strict=True):
            if id(ours) not in blocks:
                ours.data = trained.data
    return made


def _block_weights(model: Model) -> list[nn.Parameter]:
    """Weights and biases of attention and MLP at every layer, norms left out."""
    found = []
    for layer, block in enumerate(model.wrapped.blocks):
        parts = [getattr(block, name, None) for name in ("attn", "mlp")]
        modules = [module for part in parts if part is not None for module in part.modules()]
        within = [p for m in modules if "norm" not in type(m).__name__.lower() for p in m.parameters(recurse=False)]
        known = {id(parameter) for parameter in within}
        other = [name for name, p in block.named_parameters() if p.ndim > 1 and id(p) not in known]
        if other:
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: expected attention and MLP to hold all of a "
                f"layer's matrices, got {other[0]!r} elsewhere: it has no control with random blocks"
            )
        found += within
    return found
