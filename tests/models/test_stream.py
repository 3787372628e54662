"""A vector that runs add to the residual stream: where it acts, and that it is gone after its block."""

from collections.abc import Callable

import pytest
import torch
from toys import ARCHITECTURES

import icl_dual as icl
from icl_dual.models import tiny_model
from icl_dual.models.stream import StreamChange, add_stream_change

TOKENS = torch.tensor([[0, 5, 9, 11], [0, 7, 8, 0]])


def streams(model: icl.Model, predicting: torch.Tensor | None = None) -> torch.Tensor:
    by_layer: list[torch.Tensor] = []
    with torch.no_grad():
        model.run(TOKENS, on_residual=lambda layer, stream: by_layer.append(stream), predicting=predicting)
    return torch.stack(by_layer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_added_after_its_layer_at_the_predicting_tokens_alone(
    models_by_architecture: Callable[[str], icl.Model], architecture: str
) -> None:
    model = models_by_architecture(architecture)
    before, fingerprint = streams(model), model.fingerprint()
    vector = torch.linspace(-1, 1, model.d_model)
    predicting = torch.tensor([3, 2])
    with model.journal.block() as undo:
        add_stream_change(model, StreamChange(0, vector), undo)
        assert model.fingerprint() != fingerprint
        after = streams(model, predicting)
        by_default = streams(model)
        nowhere = streams(model, torch.zeros(0, dtype=torch.long))
    rows = torch.arange(2)
    difference = after[0] - before[0]
    torch.testing.assert_close(difference[rows, predicting], vector.expand(2, -1), atol=1e-5, rtol=1e-5)
    difference[rows, predicting] = 0
    assert not difference.any()
    assert not torch.equal(after[1], before[1]), "later layers read it"
    torch.testing.assert_close(by_default[0][:, -1] - before[0][:, -1], vector.expand(2, -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(nowhere, before)
    assert torch.equal(streams(model), before)
    assert model.fingerprint() == fingerprint


def test_two_vectors_add_up() -> None:
    model = tiny_model(dtype=torch.float64)
    before, vector = streams(model), torch.ones(model.d_model, dtype=torch.float64)
    with model.journal.block() as undo:
        add_stream_change(model, StreamChange(1, vector), undo)
        add_stream_change(model, StreamChange(1, 2 * vector), undo)
        after = streams(model)
    torch.testing.assert_close(after[1, :, -1] - before[1, :, -1], 3 * vector.expand(2, -1))
