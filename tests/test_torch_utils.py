from collections.abc import Sequence

import numpy as np
import pytest
import torch

from icl_dual import torch_utils


@pytest.mark.parametrize("dim", [None, -1, 0, (1, 2), [0, 1]])
@pytest.mark.parametrize("keepdim", [False, True])
def test_vector_norm_is_that_of_tensors(dim: int | Sequence[int] | None, keepdim: bool) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch_utils.vector_norm(x, dim=dim, keepdim=keepdim), x.norm(dim=dim, keepdim=keepdim))


def test_lists_and_arrays_become_what_torch_makes_of_them() -> None:
    array = np.arange(6.0).reshape(2, 3)
    tensor = torch_utils.from_numpy(array)
    assert torch_utils.to_list(tensor) == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    array[0, 0] = 7.0
    assert tensor[0, 0] == 7.0


def test_unique_returns_values_in_order_and_the_place_of_each_element() -> None:
    values, index = torch_utils.unique(torch.tensor([[5, 2], [2, 9]]))
    assert values.tolist() == [2, 5, 9]
    assert index.tolist() == [[1, 0], [0, 2]]


def test_random_numbers_go_on_after_a_fork_as_before_it() -> None:
    with torch_utils.fork_rng(devices=[]):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)
