"""Maps of layers by heads, and of layers by demonstrations."""

# matplotlib's methods take keyword arguments without types.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from icl_dual.arguments import Finite, checked
from icl_dual.plots.style import drawing, literal

BELOW_ZERO = "dots: below 0"
"""What the colour bar of a map with negative values says of their mark: in grey, both ends of its colours are dark."""


@checked
def heads(
    values: Float[Tensor, "query layer head"],
    *,
    label: str = "",
    limits: tuple[Finite, Finite] = (0, 1),
    ax: Axes | None = None,
) -> Axes:
    """Draw a map of layers and heads: means over queries.

    Args:
        values: for example `Decomposition.demonstration_mass` or `Relaxation.update_cosine`.
        label: the colour bar's text; no colour bar where empty.
        limits: the values at the ends of the colour scale; where the first is negative, colours diverge from 0
            and cells below 0 have a dot.
        ax: the Axes to draw on; new Axes where not given.
    """
    _check_shape(values, "query layer head")
    is_signed = limits[0] < 0
    with drawing(ax) as on:
        means = values.nanmean(0).T.cpu().numpy()
        colours = "RdBu_r" if is_signed else "viridis"
        image = on.imshow(means, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1], origin="lower")
        if is_signed:
            _mark_below_zero(on, means)
        on.set(xlabel="layer", ylabel="head")
        on.yaxis.set_major_locator(MaxNLocator(integer=True))
        on.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if label:
            on.figure.colorbar(image, ax=on, label=f"{label} ({BELOW_ZERO})" if is_signed else label)
    return on


@checked
def demonstrations(
    shares: Float[Tensor, "layer demo"], names: Sequence[str], *, label: str = "", ax: Axes | None = None
) -> Axes:
    """Draw the share of each demonstration in each layer's update: a map, demonstrations in the prompt's order.

    Args:
        shares: for example one query's `Decomposition.icl_share`, or `DeltaSummary.demonstrations_V`.
        names: the demonstrations' (or groups') names, from the top.
        label: the colour bar's text.
        ax: the Axes to draw on; new Axes where not given.

    Returns:
        The Axes drawn on.

    Raises:
        ValueError: `shares` has other axes, or there is not one name for each demonstration, at least one.
    """
    _check_shape(shares, "layer demo")
    if len(names) != shares.shape[1] or not names:
        raise ValueError(
            f"expected a name for each of {shares.shape[1]} demonstrations, at least one, got {len(names)}: pass as "
            "many names as the shares' last axis is long"
        )
    most = float(shares.abs().nan_to_num().quantile(0.99))
    with drawing(ax) as on:
        values = shares.T.cpu().numpy()
        image = on.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
        _mark_below_zero(on, values)
        on.set_yticks(range(len(names)), [literal(name) for name in names], fontsize=7)
        on.set(xlabel="layer")
        on.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        bar = on.figure.colorbar(image, ax=on, extend="both")
        bar.set_label(f"{label} ({BELOW_ZERO})" if label else BELOW_ZERO)
    return on


def _mark_below_zero(ax: Axes, means: np.ndarray) -> None:
    """Put a dot on each cell below 0."""
    row, column = (means < 0).nonzero()
    ax.plot(column, row, linestyle="none", marker=".", markersize=1.2, color="black", label="_below 0")


def _check_shape(values: Tensor, axes: str) -> None:
    if values.ndim != len(axes.split()):
        raise ValueError(
            f"expected values by [{axes}], got a tensor of shape {list(values.shape)}: pass a tensor with these axes"
        )
