"""Control models: the configuration of a trained model, without what its blocks have learned."""

from typing import Literal, get_args

from torch import nn

from icl_dual.arguments import Seed, checked
from icl_dual.models.backend import UnsupportedModelError
from icl_dual.models.model import Model

Control = Literal["untrained", "random-blocks"]
"""Which weights are reinitialised: all of them (`untrained`), or those of attention and MLP (`random-blocks`)."""


def control_name(name: str, control: Control, seed: Seed) -> str:
    """Return the name that results give to a control of a model."""
    return f"{name} ({control}, seed {seed})"


def control_provenance(provenance: str, control: Control, seed: Seed) -> str:
    """Return the provenance of a control of a model."""
    return f"{provenance}, {control}, seed {seed}"


@checked
def control_model(model: Model, control: Control, *, seed: Seed) -> Model:
    """Build a model of the same configuration with reinitialised weights.

    Weights are initialised on the CPU as the model's class initialises them for its configuration; global random states
    are left unchanged. Trained weights that a control keeps are shared with the trained model, not copied. A control
    has the momentum of the model, also where this comes from a `momentum_attention` block, and keeps it afterwards.

    Args:
        model: the model that gives configuration, tokenizer, device and dtype. It is left unchanged.
        control: `untrained` reinitialises all weights (Deutch et al., 2024). `random-blocks` reinitialises all weights
            of attention and MLP, and keeps trained embeddings, unembedding and norms.
        seed: the seed of the initialisation.

    Returns:
        The control, with the name `"<model> (<control>, seed <seed>)"`.

    Raises:
        UnsupportedModelError: the model's class does not initialise all of its weights, or has matrices outside of
            attention and MLP.
        ValueError: there is no such control.

    Example:
        >>> from icl_dual.models import control_model, tiny_model
        >>> control_model(tiny_model(), "untrained", seed=1).name
        'tiny (untrained, seed 1)'
    """
    if control not in get_args(Control):
        raise ValueError(f"expected control as one of {get_args(Control)}, got {control!r}")
    try:
        reinitialised = model.backend.reinitialised(seed)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{model.name}: {error}") from error
    controlled = Model(
        reinitialised,
        control_name(model.name, control, seed),
        control_provenance(model.provenance, control, seed),
        momentum=model.momentum,
        description=control_name(model.description, control, seed),
        tokenizer=model.tokenizer,
    )
    if control == "random-blocks":
        block_weights = {id(parameter) for parameter in _block_weights(controlled)}
        for parameter, trained in zip(controlled.parameters(), model.parameters(), strict=True):
            if id(parameter) not in block_weights:
                parameter.data = trained.data
    return controlled


def _block_weights(model: Model) -> list[nn.Parameter]:
    """Return the weights and biases of attention and MLP at every layer, without norms."""
    block_weights: list[nn.Parameter] = []
    for layer, block in enumerate(model.wrapped.blocks):
        parts = [getattr(block, name, None) for name in ("attn", "mlp")]
        modules = [module for part in parts if part is not None for module in part.modules()]
        of_layer = [p for m in modules if "norm" not in type(m).__name__.lower() for p in m.parameters(recurse=False)]
        known = {id(parameter) for parameter in of_layer}
        elsewhere = [name for name, p in block.named_parameters() if p.ndim > 1 and id(p) not in known]
        if elsewhere:
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: expected attention and MLP to hold all matrices "
                f"of a layer, got {elsewhere[0]!r} outside of them: it has no control with random blocks"
            )
        block_weights += of_layer
    return block_weights
