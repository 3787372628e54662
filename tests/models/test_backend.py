"""Weights as matrices."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_dual.models import Weight

LAYOUTS = [
    ("d_out d_in", "d_out d_in", 2),
    ("d_in d_out", "d_out d_in", 2),
    ("head d_in d_head", "(head d_head) d_in", 3),
    ("head d_head d_out", "d_out (head d_head)", 3),
    ("head d_head", "(head d_head)", 2),
    ("d_out", "d_out", 1),
]


@given(st.sampled_from(LAYOUTS), st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_a_matrix_is_stored_as_it_was_laid_out(layout: tuple[str, str, int], sizes: list[int]) -> None:
    axes, written, n_axes = layout
    parameter = torch.nn.Parameter(torch.randn(sizes[:n_axes]))
    weight = Weight(parameter, axes, written)
    matrix = weight.to_matrix(parameter)
    assert matrix.ndim == 2 - (axes in ("head d_head", "d_out"))
    assert torch.equal(weight.from_matrix(matrix), parameter)
