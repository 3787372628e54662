"""`ViewTerms` as JSON of at most 2 MB: token numbers as integers with a step for each head, sums in float32."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl_dual.views.terms import Numbers, Pane, Piece, ViewTerms

BUDGET = 1_800_000
"""How many bytes of numbers a view holds at 16 bits each; beyond it, numbers of tokens have 8 bits."""


def encoded_view(terms: ViewTerms) -> dict[str, Any]:
    """Return a view as JSON values, which `view.js` reads."""
    counts = [part.values.numel() for part in (*terms.quantities, *terms.panes)]
    sums = sum(numbers.sums.numel() for numbers in terms.quantities)
    n_bits = 16 if (2 * sum(counts) + 4 * sums) * 4 / 3 <= BUDGET else 8
    return {
        "title": terms.title,
        "recorded": terms.recorded,
        "pieces": _encoded_pieces(terms.pieces),
        "groups": list(terms.groups),
        "layers": list(terms.layers),
        "heads": terms.quantities[0].values.shape[1],
        "byPiece": terms.by_piece,
        "bits": n_bits,
        "quantities": [_encoded_numbers(numbers, n_bits) for numbers in terms.quantities],
        "headNumbers": [{"title": title, "values": _float32(values)} for title, values in terms.head_numbers.items()],
        "panes": [_encoded_pane(pane, n_bits) for pane in terms.panes],
    }


def to_json(values: Any) -> str:
    """Return JSON in ASCII that ends no element of HTML: `<` and `&` are escaped, and lone surrogates stay text."""
    escaped = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return escaped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def quantised(values: Float[Tensor, "layer head unit"], n_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values as integers, and the step of each head: the largest size there, over the largest integer.

    The least integer stands for a number that is not finite. A value differs from integer × step by half a step at
    most, apart from the rounding of the step to float32.

    Args:
        values: the numbers.
        n_bits: 8 or 16.
    """
    largest = 2 ** (n_bits - 1) - 1
    numbers = values.double().cpu().numpy()
    is_finite = np.isfinite(numbers)
    size = np.where(is_finite, np.abs(numbers), 0).max(-1, initial=0)
    step = np.where(size > 0, size / largest, 1.0).astype("<f4")
    step = np.maximum(step, np.finfo("<f4").tiny)
    counts = np.clip(np.round(np.where(is_finite, numbers, 0) / step[..., None].astype(float)), -largest, largest)
    return np.where(is_finite, counts, -largest - 1).astype(f"<i{n_bits // 8}"), step


def _encoded_numbers(numbers: Numbers, n_bits: int) -> dict[str, Any]:
    return {
        "title": numbers.title,
        "note": numbers.note,
        "signed": bool((numbers.values < 0).any() or (numbers.sums < 0).any()),
        **_encoded_values(numbers.values, n_bits),
        "sums": _float32(numbers.sums),
        "grid": list(numbers.grid),
    }


def _encoded_pane(pane: Pane, n_bits: int) -> dict[str, Any]:
    return {
        "title": pane.title,
        "note": pane.note,
        "pieces": _encoded_pieces(pane.pieces),
        **_encoded_values(pane.values, n_bits),
    }


def _encoded_values(values: Tensor, n_bits: int) -> dict[str, str]:
    counts, step = quantised(values, n_bits)
    return {"values": _base64(counts), "steps": _base64(step)}


def _encoded_pieces(pieces: Sequence[Piece]) -> dict[str, list[Any]]:
    """Return pieces field by field, which is shorter than one object for each."""
    return {name: [getattr(piece, name) for piece in pieces] for name in ("text", "first", "last", "group", "unit")}


def _float32(values: Tensor) -> str:
    return _base64(values.to("cpu", torch.float32).numpy().astype("<f4"))


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
