"""Every check that captures, and a finetuning, belong together.

Each raises a ValueError that names the argument, what was expected of it and what was given.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.captures.capture import Capture, Field
from icl_dual.models import Model


@runtime_checkable
class Finetuning(Protocol):
    """What a finetuning says of itself: the weights it started from and the sequences it was trained on."""

    @property
    def model(self) -> str:
        """The name of the model that was finetuned."""
        ...

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the weights that finetuning started from."""
        ...

    @property
    def demonstrations(self) -> list[list[int]]:
        """The token ids of each training sequence, in the order of the steps."""
        ...


def of_shared_tokens(
    by_setting: Mapping[str, Float[Tensor, "query layer ..."]], shared: Sequence[Sequence[tuple[int, int]]]
) -> dict[str, Float[Tensor, "query layer ..."]]:
    """Return what captures hold of each query's own tokens for the tokens that it has both in context and zero-shot.

    Args:
        by_setting: by setting (ZSL, ICL, FT), values with the queries' tokens as last axis.
        shared: by query, the indices in context and zero-shot of the tokens that both have
            (`Prompts.shared_query_tokens`).

    Returns:
        By setting, the values with these tokens as last axis; zero past each query's last shared token.
    """
    indices = {"ICL": 0, "ZSL": 1, "FT": 1}
    longest = max(map(len, shared))
    if all(pair == (index, index) for pairs in shared for index, pair in enumerate(pairs)):
        n_shared = torch.tensor([len(pairs) for pairs in shared])
        past_shared = torch.arange(longest) >= n_shared[:, None]

        def up_to_shared(values: Tensor) -> Tensor:
            past = past_shared.view(len(shared), *[1] * (values.ndim - 2), longest)
            return values[..., :longest].masked_fill(past.to(values.device), 0)

        return {name: up_to_shared(values) for name, values in by_setting.items()}
    of_shared = {name: values.new_zeros(*values.shape[:-1], longest) for name, values in by_setting.items()}
    for query, pairs in enumerate(shared):
        for name, values in by_setting.items():
            tokens = [pair[indices[name]] for pair in pairs]
            of_shared[name][query, ..., : len(tokens)] = values[query][..., tokens]
    return of_shared


def check_fields(fields: Collection[Field], **captures: Capture) -> None:
    """Raise a ValueError unless each capture, passed under its argument's name, has all of these fields."""
    for name, capture in captures.items():
        missing = [field for field in fields if getattr(capture, field) is None]
        if missing:
            raise ValueError(
                f"expected {name} captured with the fields {tuple(fields)}, got {capture} without {missing[0]!r}: "
                f"capture again with fields={tuple(fields)}"
            )


def check_paired(model: Model, *, zero_shot: Capture, in_context: Capture) -> None:
    """Raise a ValueError unless both captures are of this model as it is now, and of the same queries."""
    names = {"model": model.name, "in_context": in_context.model, "zero_shot": zero_shot.model}
    if len(set(names.values())) > 1:
        raise ValueError(f"expected captures of the model given, got {names}: pass the model that was captured")
    fingerprints = {
        "model": model.fingerprint(),
        "in_context": in_context.fingerprint,
        "zero_shot": zero_shot.fingerprint,
    }
    if len(set(fingerprints.values())) > 1:
        raise ValueError(
            f"expected captures with the model's present weights and dtype, got other weights ({fingerprints}): "
            "capture both inside the same `with delta.applied(model):` or `with momentum_attention(model, eta):` and "
            "the same η, or both outside"
        )
    hooks = {"model": model.foreign_hooks(), "in_context": in_context.hooks, "zero_shot": zero_shot.hooks}
    if len(set(hooks.values())) > 1:
        raise ValueError(
            f"expected captures with the hooks that are on the model now, got others ({hooks}; empty: none): capture "
            "and decompose all with your own hooks on, or all without"
        )
    _check_zero_shot(zero_shot)
    _check_same_queries(zero_shot=zero_shot, in_context=in_context)


def check_settings(*, zero_shot: Capture, in_context: Capture, finetuned: Capture) -> None:
    """Raise a ValueError unless the captures are the three settings of one model and the same queries."""
    models = {"zero_shot": zero_shot.model, "in_context": in_context.model, "finetuned": finetuned.model}
    if len(set(models.values())) > 1:
        raise ValueError(
            f"expected captures of one model, got {models}: capture all with one model, or with a finetuned copy that "
            "is loaded under the same name"
        )
    _check_same_queries(zero_shot=zero_shot, in_context=in_context)
    if finetuned.prompts != zero_shot.prompts:
        raise ValueError(
            "expected captures of the same queries: finetuned of in_context's prompts.zero_shot(), as zero_shot is, "
            f"got {finetuned.prompts} and {zero_shot.prompts}, which differ"
        )
    if zero_shot.fingerprint != in_context.fingerprint:
        raise ValueError(
            f"expected zero_shot and in_context captured with the same weights, got {zero_shot.fingerprint} and "
            f"{in_context.fingerprint}: capture both before finetuning, or outside of `with delta.applied(model):`"
        )
    if finetuned.fingerprint == zero_shot.fingerprint:
        raise ValueError(
            "expected finetuned captured with finetuned weights, got a capture with zero_shot's weights "
            f"({zero_shot.fingerprint}): capture it within `with delta.applied(model):`, or with the finetuned copy"
        )


def check_demonstrations(in_context: Capture) -> None:
    """Raise a ValueError where in_context's prompts have no demonstrations."""
    if not in_context.prompts.demonstrations:
        raise ValueError(
            "expected in_context's prompts to have demonstrations, got none: capture the prompts of build_prompts, not "
            "their zero_shot()"
        )


def check_start_weights(delta: Finetuning, capture: Capture) -> None:
    """Raise a ValueError unless a delta was finetuned from the weights that were captured."""
    if (delta.model, delta.fingerprint) != (capture.model, capture.fingerprint):
        raise ValueError(
            f"expected a delta finetuned from the weights of {capture.model!r} (fingerprint {capture.fingerprint}), "
            f"got one from {delta.model!r} ({delta.fingerprint}): finetune the model that was captured"
        )


def check_training_sequences(delta: Finetuning, in_context: Capture, advice: str) -> None:
    """Raise a ValueError, which ends with the advice, unless a delta was finetuned on in_context's demonstrations.

    What a delta between two models was trained on is unknown (it has no demonstrations), so that nothing is checked.
    """
    if delta.demonstrations and delta.demonstrations != [
        list(tokens) for tokens in in_context.prompts.training_sequences
    ]:
        raise ValueError(
            f"expected a delta finetuned on the {len(in_context.prompts.demonstrations)} demonstrations of "
            f"in_context's prompts, in their order, got one of {len(delta.demonstrations)} that differ: {advice}"
        )


def _check_zero_shot(zero_shot: Capture) -> None:
    if zero_shot.prompts.demonstrations:
        raise ValueError(
            f"expected zero_shot to be without demonstrations, got {zero_shot.prompts}: are in_context and zero_shot "
            "swapped? Capture zero_shot with prompts.zero_shot()"
        )


def _check_same_queries(*, zero_shot: Capture, in_context: Capture) -> None:
    if zero_shot.prompts != in_context.prompts.zero_shot():
        raise ValueError(
            "expected captures of the same queries at the same positions: zero_shot of in_context's "
            f"prompts.zero_shot(), got {in_context.prompts} and {zero_shot.prompts}, which differ"
        )
