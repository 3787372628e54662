"""Rank correlations of many short rows at once.

scipy computes one row at a time, and a cell has tens of thousands of rows. On a CPU, ranks are numpy's, which sorts
many times faster than torch. On other devices torch compares all pairs, which is exact, too: counts are whole numbers.
"""

import math
from typing import Any

import numpy as np
import scipy  # `scipy.stats` takes a third of a second, and is loaded on first use
import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from icl_dual import dual
from icl_dual.torch_utils import from_numpy

AT_ONCE = 1 << 15
"""The number of elements that Kendall's τ ranks at once: few enough for all its passes to stay in a core's cache."""

PAIRS_AT_ONCE = 1 << 26
"""The number of pairs of items that Kendall's τ compares at once where it does not sort."""

Rows = Shaped[np.ndarray, "row item"]


def spearman(
    a: Float[Tensor, "*batch item"], b: Float[Tensor, "*batch item"], known: Bool[Tensor, "*#batch item"]
) -> Float[Tensor, "*batch"]:
    """Return Spearman's ρ over the last axis, of the known items only; NaN where nothing varies."""
    return dual.cosine(_centred_ranks(a, known), _centred_ranks(b, known))


def spearman_with_sizes(
    x: Float64[Tensor, "*batch item"], known: Bool[Tensor, "*#batch item"]
) -> Float64[Tensor, "*batch"]:
    """Return Spearman's ρ between items and their sizes, x and |x|; NaN where nothing varies.

    On a CPU and where all items are known, one sort does for both ranks: in order of size, the negative items come in
    reverse order, and the others in order after all of them.

    Example:
        >>> spearman_with_sizes(torch.tensor([[3.0, -1.0, 2.0]]).double(), torch.ones(1, 3, dtype=torch.bool))
        tensor([1.], dtype=torch.float64)
    """
    if x.device.type != "cpu" or not known.all():
        return spearman(x, x.abs(), known)
    n = x.shape[-1]
    bits = x.contiguous().numpy().view(np.uint64)
    # Numbers of which the size is larger have larger bits. The sign, their first bit, is put last, to be kept.
    in_order = np.sort((bits << np.uint64(1)) | (bits >> np.uint64(63)), -1)
    negative = (in_order & np.uint64(1)).astype(np.int64)
    n_negative = negative.cumsum(-1)
    difference = (n_negative - n_negative[..., -1:] + negative * np.arange(n)).astype(np.float64)  # of the two ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = from_numpy(1 - 6 * np.einsum("...i,...i->...", difference, difference) / np.float64(n * (n**2 - 1)))
    tied = from_numpy((in_order[..., 1:] ^ in_order[..., :-1]) <= 1).any(-1)  # of one size, of any sign
    if tied.any():
        rho[tied] = spearman(x[tied], x[tied].abs(), torch.ones_like(x[tied], dtype=torch.bool))
    return rho


def kendall(a: Float[Tensor, "*batch item"], b: Float[Tensor, "*batch item"]) -> Float[Tensor, "*batch"]:
    """Return Kendall's τ-b over the last axis, in O(n log² n); NaN where nothing varies, or a number is missing.

    τ = (concordant − discordant pairs) / √(pairs untied in a · pairs untied in b).

    Example:
        >>> kendall(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 2.0, 4.0, 3.0]]))  # 5 pairs of 6 agree
        tensor([0.6667], dtype=torch.float64)
    """
    *batch, n = a.shape
    rows = math.prod(batch)
    if n < 2 or not rows:
        return torch.full(batch, torch.nan, dtype=torch.float64, device=a.device)
    if a.device.type != "cpu" and n**2 > PAIRS_AT_ONCE:
        return kendall(a.cpu(), b.cpu()).to(a.device)
    if a.device.type != "cpu":
        return _kendall_by_pairs(a.reshape(rows, n), b.reshape(rows, n)).view(batch)
    step = max(1, AT_ONCE // n)
    rows_a, rows_b = a.reshape(rows, n).numpy(), b.reshape(rows, n).numpy()
    blocks = [_kendall(rows_a[first : first + step], rows_b[first : first + step]) for first in range(0, rows, step)]
    return from_numpy(np.concatenate(blocks)).view(batch)


def _kendall_by_pairs(a: Float[Tensor, "row item"], b: Float[Tensor, "row item"]) -> Float[Tensor, " row"]:
    """Return `kendall` where the tensors are, without sorting them."""
    step = max(1, PAIRS_AT_ONCE // a.shape[1] ** 2)
    blocks: list[Tensor] = []
    for rows in zip(torch.split(a, step), torch.split(b, step), strict=True):
        order_a, order_b = ((x[:, :, None] > x[:, None]).float() - (x[:, :, None] < x[:, None]).float() for x in rows)
        products = (order_a * order_b, order_a.abs_(), order_b.abs_())  # each pair twice
        difference, untied_a, untied_b = (product.sum((1, 2), dtype=torch.float64) for product in products)
        tau = (difference / untied_a.sqrt() / untied_b.sqrt()).clamp(-1.0, 1.0)
        blocks.append(tau.masked_fill(rows[0].isnan().any(-1) | rows[1].isnan().any(-1), torch.nan))
    return torch.cat(blocks)


def _kendall(a: Rows, b: Rows) -> Shaped[np.ndarray, " row"]:
    n = a.shape[-1]
    dtype = np.int32 if n < 1 << 15 else np.int64  # wide enough for a pair of ranks in one number, which sorts as pairs
    x, y = _dense_ranks(a, dtype), _dense_ranks(b, dtype)
    both = np.sort(x * dtype(n) + y)
    y_by_x = both % dtype(n)
    # The places of b's items when sorted by a; equal items in order, so that no tie is an inversion.
    places = np.sort(y_by_x * dtype(n) + np.arange(n, dtype=dtype)) % dtype(n)
    pairs = n * (n - 1) // 2
    tied_x, tied_y, tied_both = (_tied_pairs(ranks) for ranks in (np.sort(x), np.sort(y), both))
    difference = pairs - tied_x - tied_y + tied_both - 2 * _inversions(places)
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = difference / np.sqrt(pairs - tied_x) / np.sqrt(pairs - tied_y)
    missing = np.isnan(a).any(-1) | np.isnan(b).any(-1)
    return np.where(missing, np.nan, tau.clip(-1.0, 1.0))  # square roots may round beyond


def _dense_ranks(rows: Rows, dtype: type[np.signedinteger[Any]]) -> Rows:
    """Return ranks 0, 1, … by size, the same for equal items."""
    order = rows.argsort(-1)
    in_order = np.take_along_axis(rows, order, -1)
    shape: tuple[int, ...] = rows.shape
    sorted_ranks, ranks = np.zeros(shape, dtype), np.zeros(shape, dtype)
    np.cumsum(in_order[:, 1:] != in_order[:, :-1], axis=-1, out=sorted_ranks[:, 1:])
    np.put_along_axis(ranks, order, sorted_ranks, -1)
    return ranks


def _tied_pairs(in_order: Rows) -> Shaped[np.ndarray, " row"]:
    """Return the number of pairs of equal items in sorted rows: each item with its equals before it."""
    places = np.arange(int(in_order.shape[-1]))
    first = np.zeros(in_order.shape, places.dtype)
    np.copyto(first[:, 1:], places[1:], where=in_order[:, 1:] != in_order[:, :-1])
    return (places - np.maximum.accumulate(first, -1)).sum(-1)


def _inversions(permutations: Rows) -> Shaped[np.ndarray, " row"]:
    """Return the number of pairs of items out of order in permutations of 0 … n − 1.

    The highest bit in which two items differ says which is larger. So, bit by bit, among the items that agree in all
    higher bits, in their order, count those with a 1 before each with a 0.
    """
    n, dtype = permutations.shape[-1], permutations.dtype.type
    n_bits = (n - 1).bit_length()
    size = 1 << n_bits
    added = np.broadcast_to(np.arange(n, size, dtype=dtype), (len(permutations), size - n))  # all groups whole
    items, places = np.concatenate((permutations, added), -1), np.arange(size, dtype=dtype)
    inversions = np.zeros(len(permutations), dtype=np.int64)
    for bit in range(n_bits):
        # One number of the higher bits, the place and the bit itself: sorted, groups lie together, each in its order.
        key = np.sort((items >> dtype(bit + 1) << dtype(n_bits + 1)) + (places << dtype(1)) + (items >> dtype(bit) & 1))
        ones = (key & dtype(1)).reshape(len(key), -1, 2 << bit)
        inversions += (np.cumsum(ones, -1, dtype=dtype) * (dtype(1) - ones)).sum((-1, -2), dtype=np.int64)
    return inversions


def _centred_ranks(
    x: Float[Tensor, "*batch item"], known: Bool[Tensor, "*#batch item"]
) -> Float[Tensor, "*batch item"]:
    """Return ranks over the last axis, ties at their mean, less the mean of all; 0 where not known."""
    if x.device.type != "cpu":
        # Equal items lie together in order: the mean of their ranks is that of where they begin and end.
        x = x.where(known, torch.inf)
        in_order, x = x.sort(-1).values, x.contiguous()
        begin, end = (torch.searchsorted(in_order, x, right=right) for right in (False, True))
        n_known = known.sum(-1, keepdim=True)
        end, mean = torch.minimum(end, n_known), (n_known + 1) / 2  # unknown items come last, as infinite ones
        return ((begin + end + 1).to(x.dtype) / 2 - mean).where(known, 0.0)
    hidden = None if known.all() else ~known
    x = x if hidden is None else x.masked_fill(hidden, torch.nan)
    order = from_numpy(x.numpy().argsort(-1))  # NaNs come last
    ranks = torch.empty_like(x).scatter_(-1, order, torch.arange(1.0, x.shape[-1] + 1, dtype=x.dtype).expand_as(x))
    in_order = x.gather(-1, order)
    tied = (in_order[..., 1:] == in_order[..., :-1]).any(-1)
    if tied.any():
        ranks[tied] = from_numpy(scipy.stats.rankdata(x[tied].numpy(), axis=-1, nan_policy="omit")).to(ranks)
    ranks -= (known.sum(-1, keepdim=True) + 1) / 2
    return ranks if hidden is None else ranks.masked_fill_(hidden, 0.0)
