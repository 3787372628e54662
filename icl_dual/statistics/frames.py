"""Summary frames: means and deviations over queries, one row a number."""

from collections.abc import Mapping

import pandas as pd
from jaxtyping import Float
from torch import Tensor


def summary_frame(values: Mapping[str, Float[Tensor, "query layer ..."]]) -> pd.DataFrame:
    """One row for each metric, layer and head (empty where there is none): mean and deviation over queries, and n.

    A fourth axis is averaged first; NaNs are left out.
    """
    rows = []
    for name, found in values.items():
        found = found.flatten(3).mean(-1) if found.ndim == 4 else found
        by_head = found.unsqueeze(2) if found.ndim == 2 else found
        for layer in range(found.shape[1]):
            for head, column in enumerate(by_head[:, layer].double().T):
                known = column[column.isfinite()].numpy()
                spread = known.std(ddof=1) if len(known) > 1 else None
                of_head = head if found.ndim > 2 else None
                rows.append((name, layer, of_head, known.mean() if len(known) else None, spread, len(known)))
    frame = pd.DataFrame(rows, columns=["metric", "layer", "head", "mean", "std", "n"])
    return frame.astype({"head": "Int64", "mean": float, "std": float})
