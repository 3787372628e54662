"""What several tests of views share: both captures of prompts, and made-up terms of any size."""

import torch

import icl_dual as icl
from icl_dual.views.terms import Numbers, Piece, ViewTerms


def captured_pair(model: icl.Model, prompts: icl.Prompts) -> dict[str, icl.Capture]:
    return {
        name: icl.capture(model, these, fields=icl.DECOMPOSE_FIELDS, progress=False)
        for name, these in {"zero_shot": prompts.zero_shot(), "in_context": prompts}.items()
    }


def random_terms(n_layers: int, n_heads: int, n_pieces: int, n_quantities: int = 2) -> ViewTerms:
    """Made-up terms of a size: tokens of eight sources."""
    generator = torch.Generator().manual_seed(0)
    pieces = tuple(Piece(f" word{at}", at, at, at * 8 // n_pieces, at) for at in range(n_pieces))
    groups = ("start", *(f"demonstration {n}" for n in range(1, 8)))
    quantities = []
    for n in range(n_quantities):
        values = torch.randn(n_layers, n_heads, n_pieces, generator=generator, dtype=torch.float64)
        sums = values.unflatten(-1, (8, -1)).sum(-1)
        quantities.append(Numbers(f"quantity {n}", "Made up.", values, sums, (1, 2)))
    return ViewTerms("made up", n_pieces - 1, pieces, groups, tuple(range(n_layers)), True, tuple(quantities))
