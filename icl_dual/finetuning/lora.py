"""Low-rank adapters of peft that run beside a model's projections: (W + B A · alpha / rank) x.

The model's modules stay as they are: peft puts its adapters into linear layers that share the projections' weights, and
what these adapters compute is added to the projections' outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from icl_dual.finetuning.config import FinetuneConfig
from icl_dual.models import Model, ProjectionName, UnsupportedModelError, Weight
from icl_dual.models.adapters import import_peft
from icl_dual.models.backend import ProjectionDelta
from icl_dual.torch_utils import at_least_float32, fork_rng

ADAPTER = "default"
"""The name that peft gives an adapter."""


class Adapters:
    """An adapter of peft for each adapted projection of each layer, in float32 at least.

    Args:
        model: the model that they run beside.
        config: the adapted projections, rank, alpha and seed.
        weights: the trained weights by field's name in `WeightDelta` and by layer, as `trained_weights` returns them.

    Raises:
        ImportError: peft is not installed.
        UnsupportedModelError: the model has no module for each projection.
    """

    def __init__(self, model: Model, config: FinetuneConfig, weights: dict[str, list[Weight]]) -> None:
        lora = config.lora
        assert lora is not None
        peft: Any = import_peft("LoRA")
        check_adaptable(model)
        self.kinds, self.names = config.adapted, list(weights)
        bases = [[_linear(weights[f"W_{kind}"][layer]) for kind in self.kinds] for layer in range(model.n_layers)]
        modules = nn.ModuleList(nn.ModuleDict(dict(zip(self.kinds, layer, strict=True))) for layer in bases)
        settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(self.kinds))
        with fork_rng(devices=[]):
            torch.default_generator.manual_seed(lora.seed)  # torch.manual_seed would reseed accelerators, too
            self.modules: Any = peft.inject_adapter_in_model(settings, modules)
        self.zeros = {
            name: torch.stack([at_least_float32(torch.zeros_like(w.to_matrix(w.parameter.detach()))) for w in by_layer])
            for name, by_layer in weights.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Return A and B of every adapter."""
        return [p for layer in self.modules for kind in self.kinds for p in _matrices(layer[kind])]

    @property
    def scaling(self) -> float:
        """Return the factor of B A: alpha / rank."""
        return float(self.modules[0][self.kinds[0]].scaling[ADAPTER])

    def matrices(self) -> dict[str, list[nn.Parameter]]:
        """Return A and B by layer, under the field's name in `WeightDelta` and `A` or `B`: `W_K A`, `W_K B`, …."""
        return {
            f"W_{kind} {name}": [_matrices(layer[kind])[at] for layer in self.modules]
            for kind in self.kinds
            for at, name in enumerate("AB")
        }

    def projection_deltas(self) -> dict[ProjectionName, ProjectionDelta]:
        """Return the functions that compute B A x · alpha / rank of each adapted projection, for `Model.run`."""

        def delta_of(layer: int, kind: ProjectionName, x: Tensor) -> Tensor:
            module = self.modules[layer][kind]
            A, B = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
            return B(A(at_least_float32(x))) * module.scaling[ADAPTER]

        return dict.fromkeys(self.kinds, delta_of)

    @torch.no_grad()
    def changes(self) -> dict[str, Tensor]:
        """Return ΔW and Δb of the trained projections by field's name in `WeightDelta`, zero without an adapter."""
        products = {
            f"W_{kind}": torch.stack([layer[kind].get_delta_weight(ADAPTER) for layer in self.modules])
            for kind in self.kinds
        }
        return {name: products.get(name, zeros) for name, zeros in self.zeros.items()}


def check_adaptable(model: Model) -> None:
    """Check that adapters can run beside a model's projections.

    Raises:
        UnsupportedModelError: the model has no module for each projection.
    """
    if not model.supports_projection_deltas:
        raise UnsupportedModelError(
            f"expected a model with a module for each projection, beside which LoRA runs, got {model.name!r}, a "
            f"{type(model.wrapped).__name__}: load it with icl_dual.load_model, or finetune without lora"
        )


def _linear(weight: Weight) -> nn.Linear:
    """Return a linear layer with the values of a projection's matrix, in float32 at least."""
    matrix = at_least_float32(weight.to_matrix(weight.parameter.detach()))
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear


def _matrices(module: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
