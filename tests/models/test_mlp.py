"""Changes of MLPs beside the weights, and the hooks of `Model.run` that they are measured by."""

from collections.abc import Callable

import pytest
import torch
from helpers import draw

import icl_dual as icl
from icl_dual.models import LowRank, MlpForm, tiny_model
from icl_dual.models.mlp import MlpChanges

IDS = torch.arange(12).view(2, 6)


def test_low_rank_changes_have_the_singular_values_of_their_matrix() -> None:
    left, right = draw(0, 2, 7, 3), draw(1, 2, 5, 3)
    expected = torch.linalg.svdvals(left @ right.mT)[:, :3]
    torch.testing.assert_close(LowRank(left, right).singular_values(), expected)


def test_low_rank_changes_act_as_their_matrix_in_float32_at_least() -> None:
    change, x = LowRank(draw(0, 2, 7, 3).float(), draw(1, 2, 5, 3).float()), draw(2, 4, 6, 5).bfloat16()
    got = change.act(1, x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x.float() @ (change.left[1] @ change.right[1].mT).mT)


@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        ("gpt2", MlpForm(("in",), "bias", 128)),
        ("llama", MlpForm(("gate", "in"), "out", 48)),
        ("gemma2-window", MlpForm(("gate", "in"), "scale", 48)),
        ("falcon", MlpForm(("in",), "out", 128)),
    ],
)
def test_what_attention_leaves_and_what_the_mlp_writes_are_the_residual_stream(
    models_by_architecture: Callable[[str], icl.Model], architecture: str, form: MlpForm
) -> None:
    model = models_by_architecture(architecture)
    assert model.backend.mlp_form(1) == form
    middle: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []
    last = "scale" if form.shift == "scale" else "out"
    with torch.no_grad():
        model.run(
            IDS,
            on_middle=lambda layer, stream: middle.append(stream),
            on_mlp=lambda layer, part, x, output: written.append(output) if part == last else None,
            on_residual=lambda layer, stream: streams.append(stream),
        )
    assert len(middle) == len(written) == len(streams) == model.n_layers
    for parts in zip(middle, written, streams, strict=True):
        torch.testing.assert_close(parts[0] + parts[1], parts[2])


def test_a_part_of_an_mlp_can_be_replaced() -> None:
    model = tiny_model()
    with torch.no_grad():
        plain = model.run(IDS)
        same = model.run(IDS, on_mlp=lambda layer, part, x, output: output.clone())
        silent = model.run(IDS, on_mlp=lambda layer, part, x, output: torch.zeros_like(output))
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    assert (silent - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [([[7, 8, 9]], [0, 1, 2]), ([[8, 9]], [1, 2]), ([[7], [7]], [0])],
    ids=["whole", "part", "rows"],
)
def test_the_query_and_its_parts_pass_the_check(tokens: list[list[int]], positions: list[int]) -> None:
    changes = MlpChanges({}, query=(7, 8, 9), model="tiny")
    changes.check(torch.tensor(tokens), torch.tensor(positions), "tiny", after_cache=positions[0] > 0)


@pytest.mark.parametrize("after_cache", [False, True])
@pytest.mark.parametrize(
    ("tokens", "positions"), [([[8, 9]], [0, 1]), ([[7, 8]], [1, 2]), ([[9, 9]], [2, 3]), ([[7, 9]], [0, 2])]
)
def test_other_tokens_and_positions_do_not(tokens: list[list[int]], positions: list[int], after_cache: bool) -> None:
    changes = MlpChanges({}, query=(7, 8, 9), model="tiny")
    with pytest.raises(ValueError, match=r"expected the query .* \[7, 8, 9\] at positions 0 to 2, got"):
        changes.check(torch.tensor(tokens), torch.tensor(positions), "tiny", after_cache=after_cache)


def test_later_tokens_without_those_before_them_do_not() -> None:
    changes = MlpChanges({}, query=(7, 8, 9), model="tiny")
    with pytest.raises(ValueError, match=r"expected the query .* got \[\[8, 9\]\] at positions \[1, 2\]"):
        changes.check(torch.tensor([[8, 9]]), torch.tensor([1, 2]), "tiny", after_cache=False)
