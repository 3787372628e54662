import torch

from icl_dual.models.changes import projection_deltas_of


def test_deltas_of_runs_are_those_of_each_in_float32() -> None:
    """Of a model in half precision, whose rows are in its own."""
    generator = torch.Generator().manual_seed(0)
    W, b = (torch.randn(2, 3, *axes, generator=generator) for axes in ((4, 5), (4,)))  # by layer and run
    x = torch.randn(6, 7, 5, generator=generator).bfloat16()  # two rows of each run
    got = projection_deltas_of({"W_V": W, "b_V": b})["V"](1, "V", x)
    assert got.dtype == torch.float32
    for run, rows in enumerate(x.float().chunk(3)):
        torch.testing.assert_close(got.chunk(3)[run], rows @ W[1, run].mT + b[1, run], rtol=1e-5, atol=1e-5)
