"""The decaying sum of past values against sums written out, and against SGD with momentum."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_exact, draw, seeds, sizes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icl_dual import dual, momentum


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(0, 6), d_in=sizes, d_out=sizes, eta=st.floats(0, 0.99), repeated=st.booleans())
def test_sgd_with_momentum_unrolled_is_linear_attention_with_momentum(seed, n, d_in, d_out, eta, repeated):
    W_0, inputs, targets = draw(seed, d_out, d_in), draw(seed + 1, n, d_in), draw(seed + 2, n, d_out)
    if repeated and n:
        inputs = inputs[:1].expand(n, -1)
    layer = torch.nn.Linear(d_in, d_out, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(W_0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=eta)
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        torch.cosh(layer(x) - y).log().sum().backward()
        optimizer.step()
    W, errors = dual.sgd(W_0, inputs, lambda out, step: torch.tanh(out - targets[step]), lr=0.05, momentum=eta)
    x = draw(seed + 3, 3, d_in)
    assert_exact(W, layer.weight.detach())
    assert_exact(x @ W_0.mT + momentum.momentum_linear_attention(x, inputs, errors, eta), layer(x).detach())


def test_the_papers_momentum_is_that_of_sgd():
    """Θ_t = Θ_{t−1} − γ Σ_{i<t} η^{t−i} ∇f(Θ_i), which is SGD with momentum at the learning rate γη."""
    gamma, eta, n = 0.1, 0.7, 6
    W_1, inputs, targets = draw(0, 3, 4), draw(1, n, 4), draw(2, n, 3)
    thetas, gradients = [W_1], []
    for t in range(1, n + 1):
        gradients.append(torch.outer(torch.tanh(thetas[-1] @ inputs[t - 1] - targets[t - 1]), inputs[t - 1]))
        past = sum(eta ** (t + 1 - i) * gradient for i, gradient in enumerate(gradients, start=1))
        thetas.append(thetas[-1] - gamma * past)
    W, errors = dual.sgd(W_1, inputs, lambda out, i: torch.tanh(out - targets[i]), lr=gamma * eta, momentum=eta)
    assert_exact(W, thetas[-1])
    x = draw(3, 2, 4)
    assert_exact(x @ W_1.mT + momentum.momentum_linear_attention(x, inputs, errors, eta), x @ thetas[-1].mT)


def plain_momentum(v: np.ndarray, eta: np.ndarray) -> np.ndarray:
    """Σ_{i<t} η^{t−i} v_i, a sum at a time."""
    group = len(eta) // v.shape[2]
    out = np.zeros((*v.shape[:2], len(eta), v.shape[3]))
    for head, decay in enumerate(eta):
        for t in range(v.shape[1]):
            out[:, t, head] = sum((decay ** (t - i) * v[:, i, head // group] for i in range(t)), np.zeros(v.shape[3]))
    return out


ETA = torch.tensor([0.0, 0.3, 0.9, 0.999], dtype=torch.float64)
LENGTHS = st.sampled_from((1, 2, 7, 31, 32, 33, 64, 65, 100))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=LENGTHS, kv_heads=st.sampled_from((1, 2, 4)))
def test_momentum_is_its_definition_in_both_forms(seed, n, kv_heads):
    v = draw(seed, 2, n, kv_heads, 3)
    expected = torch.from_numpy(plain_momentum(v.numpy(), ETA.numpy()))
    assert_exact(momentum.decaying_sum_reference(v, ETA), expected)
    assert_exact(momentum.decaying_sum(v, ETA).z, expected)
    # In float32 against float64 of the same inputs, which rounding η once changes by more than this at long memories.
    single, rounded = v.float(), ETA.float()
    expected = momentum.decaying_sum_reference(single.double(), rounded.double())
    assert (momentum.decaying_sum(single, rounded).z - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_momentum_over_blocks_of_blocks():
    v = draw(0, 1, 2100, 2, 3)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        # In float64 of the same inputs: over so many positions, the reference's own rounding in float32 is the larger.
        expected = momentum.decaying_sum_reference(v.to(dtype).double(), ETA.to(dtype).double())
        got = momentum.decaying_sum(v.to(dtype), ETA.to(dtype)).z
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@settings(max_examples=40, deadline=None)
@example(seed=0, n=80, cuts=[16], padding=0, block=4)  # a document that begins with a block of blocks
@given(
    seed=seeds,
    n=st.integers(1, 80),
    cuts=st.lists(st.integers(1, 79), max_size=6),
    padding=st.integers(0, 9),
    block=st.sampled_from((4, momentum.BLOCK)),
)
def test_momentum_of_packed_documents_is_that_of_each_alone(seed, n, cuts, padding, block):
    v = draw(seed, 1, n, 2, 3)
    borders = sorted({0, n, *(cut for cut in cuts if cut < n)})
    documents = torch.full((1, n), -1)
    expected = torch.zeros(1, n, 4, 3).double()
    for number, (first, end) in enumerate(itertools.pairwise(borders)):
        if number % 3 < 2 or padding == 0:  # the rest is padding between documents
            documents[0, first:end] = number % 2
            expected[:, first:end] = momentum.decaying_sum_reference(v[:, first:end], ETA)
    v[documents < 0] = torch.nan  # what is there must not be seen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(momentum, "BLOCK", block)
        assert_exact(momentum.decaying_sum(v, ETA, documents=documents).z, expected)
    assert_exact(momentum.decaying_sum_reference(v.nan_to_num(), ETA, documents), expected)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=LENGTHS, cuts=st.lists(st.integers(0, 99), max_size=4))
def test_momentum_goes_on_from_its_state(seed, n, cuts):
    v = draw(seed, 2, n, 2, 3)
    borders = sorted({0, n, *(cut for cut in cuts if cut < n)})
    state, parts = None, []
    for first, end in itertools.pairwise(borders):
        part = momentum.decaying_sum(v[:, first:end], ETA, state=state)
        state = part.state
        parts.append(part.z)
    assert_exact(torch.cat(parts, dim=1), momentum.decaying_sum_reference(v, ETA))
    whole = momentum.decaying_sum(v, ETA).state
    assert state is not None
    assert_exact(state, whole)
    assert state.shape == (2, 4, 3)  # one vector a head, however many positions
    again = momentum.decaying_sum(v[:, :0], ETA, state=whole)
    assert again.z.shape == (2, 0, 4, 3)
    assert torch.equal(again.state, whole)


def test_a_token_at_a_time_is_the_whole_sequence():
    v = draw(0, 1, 70, 4, 3)
    state, found = None, []
    for t in range(70):
        part = momentum.decaying_sum(v[:, t : t + 1], ETA, state=state)
        state = part.state
        found.append(part.z)
    assert_exact(torch.cat(found, dim=1), momentum.decaying_sum_reference(v, ETA))


@pytest.mark.parametrize("n", [3, 40])
def test_gradients_of_momentum(n, monkeypatch):
    monkeypatch.setattr(momentum, "BLOCK", 4)  # several levels of blocks, and few numbers to vary
    v, state = draw(0, 1, n, 1, 2).requires_grad_(), draw(1, 1, 2, 2).requires_grad_()
    eta = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    documents = torch.arange(n)[None] // 13
    assert torch.autograd.gradcheck(
        lambda *given: momentum.decaying_sum(given[0], given[1], state=given[2]), (v, eta, state)
    )
    assert torch.autograd.gradcheck(lambda v, eta: momentum.decaying_sum(v, eta, documents=documents), (v, eta))
    assert torch.autograd.gradcheck(momentum.decaying_sum_reference, (v, eta))


def test_without_decay_nothing_is_added_and_its_gradient_is_known():
    v, eta = draw(0, 1, 5, 2, 3), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = momentum.decaying_sum(v, eta).z
    assert (found == 0).all()
    found.sum().backward()
    assert eta.grad is not None
    assert_exact(eta.grad, v[0, :-1].sum((0, 2)))  # d/dη Σ η^{t−i} v_i at 0 is the value just before


@pytest.mark.parametrize("eta", [-0.1, 1.0, 1.5, math.nan])
def test_a_decay_out_of_range_is_refused(eta):
    for summed in (momentum.decaying_sum, momentum.decaying_sum_reference):
        with pytest.raises(ValueError, match="expected eta from 0 to below 1, got"):
            summed(torch.zeros(1, 3, 1, 2), torch.tensor([0.5, eta]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"eta": torch.tensor(0.5)},
            "expected eta with one value for each query head, a multiple of the 2 heads of v, got",
        ),
        ({"eta": torch.full((3,), 0.5)}, "expected eta with one value for each query head"),
        ({"eta": 0.5}, "expected eta with one value for each query head"),
        (
            {"v": torch.zeros(3, 2, 2)},
            r"expected v of shape \[batch pos kv_head d_head\], got torch.float32 \[3, 2, 2\]",
        ),
        ({"state": torch.zeros(1, 2, 3)}, r"expected state of shape \[1, 2, 2\], got"),
        ({"documents": torch.zeros(1, 2)}, r"expected documents as integers of shape \[1, 3\]"),
        ({"documents": torch.ones(1, 3, dtype=torch.bool)}, "expected documents as integers .* got torch.bool"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(given, said):
    unchecked = getattr(momentum.decaying_sum, "__wrapped__")  # noqa: B009 - without its checks of types
    with pytest.raises(ValueError, match=said):
        unchecked(**{"v": torch.zeros(1, 3, 2, 2), "eta": torch.full((2,), 0.5), **given})


def test_decay_weights_are_written_out():
    rows, keys = torch.tensor([0, 2, 5]), torch.tensor([0, 1, 2, 4, 6])
    weights = momentum.decay_matrix(ETA, rows, keys)
    for head, eta in enumerate(ETA.tolist()):
        for row, t in enumerate(rows.tolist()):
            expected = [eta ** (t - i) if i < t else 0.0 for i in keys.tolist()]
            torch.testing.assert_close(weights[head, row], torch.tensor(expected, dtype=torch.float64))
