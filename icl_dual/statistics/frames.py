"""Frames: the mean and deviation over queries of every metric, by layer and head; and frames as HTML."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from icl_dual.arguments import checked


@checked
def html_table(frame: pd.DataFrame) -> str:
    """Return a frame as an HTML table without its index, in which every name is text: no markup and no formula.

    >>> "<td>a &lt; $b$</td>" in html_table(pd.DataFrame({"token": ["a < $b$"]}))
    True
    """
    with pd.option_context("display.html.use_mathjax", False):  # notebooks take dollar signs for formulas
        return frame.to_html(index=False)


@checked
def summary_frame(values: Mapping[str, Float[Tensor, "_query _layer ..."]]) -> pd.DataFrame:
    """Return one row for each metric, layer and head: mean and standard deviation over queries, and their number.

    Args:
        values: by metric, a tensor [query layer], [query layer head] or [query layer head _]. The last is averaged over
            its fourth axis first.

    Returns:
        The columns metric, layer, head (empty for a metric without heads), mean, std (empty for fewer than two values)
        and n, the number of finite values, which are the ones that count.

    >>> import torch
    >>> summary_frame({"cosine": torch.tensor([[0.25], [0.75], [torch.nan]])})
       metric  layer  head  mean       std  n
    0  cosine      0  <NA>   0.5  0.353553  2
    """
    rows: list[tuple[Any, ...]] = []
    for name, tensor in values.items():
        by_query = (tensor.flatten(3).mean(-1) if tensor.ndim == 4 else tensor).cpu()
        by_head = by_query.unsqueeze(2) if by_query.ndim == 2 else by_query
        for layer in range(by_query.shape[1]):
            for index, column in enumerate(by_head[:, layer].double().T):
                finite = column[column.isfinite()].numpy()
                mean = finite.mean() if len(finite) else None
                std = finite.std(ddof=1) if len(finite) > 1 else None
                rows.append((name, layer, index if by_query.ndim > 2 else None, mean, std, len(finite)))
    frame = pd.DataFrame(rows, columns=["metric", "layer", "head", "mean", "std", "n"])
    return frame.astype({"head": "Int64", "mean": float, "std": float})
