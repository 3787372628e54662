"""What an interactive view shows: numbers for each token and source of one prompt, at every layer and head."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.captures.capture import Capture
from icl_dual.decomposition import GROUPS, Decomposition
from icl_dual.models import Model
from icl_dual.models.tokenization import Tokens, decoded_pieces
from icl_dual.prompts import PromptError
from icl_dual.source_attention import QUANTITY_TITLES, Quantity, SourceAttention
from icl_dual.sourced_prompts import START_TOKEN, SourcedPrompt
from icl_dual.torch_utils import checked_index, vector_norm


@dataclass(frozen=True)
class Piece:
    """Text of a prompt with numbers of its own: a token, or several that are one character together."""

    text: str
    """The text."""
    first: int
    """The position of its first token."""
    last: int
    """The position of its last token."""
    group: int
    """The index of its source in `ViewTerms.groups`."""
    unit: int
    """The index of its numbers on the axis `unit`: of the piece, or of its source where tokens have no numbers."""


@dataclass(frozen=True)
class Numbers:
    """One quantity at every layer and head, by piece of the prompt and by source."""

    title: str
    """The quantity in words."""
    note: str
    """What its numbers mean and what they sum to."""
    values: Float[Tensor, "layer head unit"]
    """The number of each piece, summed over its tokens."""
    sums: Float[Tensor, "layer head group"]
    """The number of each source: the sum over its tokens, computed before any rounding."""
    grid: tuple[int, ...]
    """The sources of which the grid shows the sum at first."""


@dataclass(frozen=True)
class Pane:
    """The query's tokens without demonstrations, with the attention weight of each at every layer and head."""

    title: str
    """What attention it is."""
    note: str
    """What its numbers mean."""
    pieces: tuple[Piece, ...]
    """The pieces of the start token and the query."""
    values: Float[Tensor, "layer head unit"]
    """The attention weight of each piece."""


@dataclass(frozen=True)
class ViewTerms:
    """All that an interactive view of one prompt shows."""

    title: str
    """What prompt it is, of which model."""
    recorded: int
    """The position that attends."""
    pieces: tuple[Piece, ...]
    """The prompt, in order."""
    groups: tuple[str, ...]
    """The names of the sources."""
    layers: tuple[int, ...]
    """The layers that have numbers."""
    by_piece: bool
    """Whether each piece has numbers, or each source only."""
    quantities: tuple[Numbers, ...]
    """The quantities to choose from."""
    head_numbers: dict[str, Float[Tensor, "layer head"]] = field(default_factory=dict[str, Tensor])
    """Numbers of each head, by what they are."""
    panes: tuple[Pane, ...] = ()
    """The query without demonstrations, to read beside the prompt."""


def decomposition_terms(
    decomposition: Decomposition, query: int, zero_shot: Capture | None, tokenizer: Any
) -> ViewTerms:
    """Return what a view of one query of a decomposition shows.

    Raises:
        IndexError: there is no such query.
        ValueError: the decomposition was loaded, and has no keys; or `zero_shot` is not its zero-shot capture.
        PromptError: there is no tokenizer.
    """
    prompts = decomposition.prompts
    query = checked_index("query", query, len(prompts.queries))
    tokenizer = _tokenizer(tokenizer, prompts.tokenizer)
    decomposition, zero_shot = decomposition.to("cpu"), None if zero_shot is None else zero_shot.to("cpu")
    n_layers, n_heads = decomposition.mass.shape[1:3]
    tables = [[decomposition.by_token(query, layer, head) for head in range(n_heads)] for layer in range(n_layers)]
    groups = decomposition.groups
    token_groups = [groups.index(name) for name in tables[0][0]["group"]]
    pieces = _pieces(tokenizer, prompts.prefix + prompts.suffixes[query], token_groups)
    weight, share = (
        torch.stack([torch.stack([torch.tensor(t[name].to_numpy()) for t in row]) for row in tables])
        for name in ("weight", "icl_share")
    )
    demonstrations = tuple(range(GROUPS.index("separators"), len(groups)))
    quantities = (
        Numbers(
            "contribution to ΔICL",
            "Share of the layer's direct update ΔICL W_O along its own direction. All tokens and heads of a layer sum "
            "to 1; tokens outside of the demonstrations have 0.",
            _by_piece(share, pieces),
            _by_group(share, token_groups, len(groups)),
            demonstrations,
        ),
        Numbers(
            "attention weight",
            "Share of the softmax, from 0 to 1. All tokens of a head sum to 1 (with the sink, where a model has one).",
            _by_piece(weight, pieces),
            decomposition.mass[query].double(),
            demonstrations,
        ),
    )
    panes = [_without_demonstrations(decomposition, query, pieces, quantities[1])]
    if zero_shot is not None:
        panes.insert(0, _zero_shot_run(decomposition, query, zero_shot, tokenizer))
    n_demonstrations = len(prompts.demonstrations)
    return ViewTerms(
        title=f"{decomposition.model}: query {query} after {n_demonstrations} demonstrations",
        recorded=len(token_groups) - 1,
        pieces=pieces,
        groups=groups,
        layers=tuple(range(n_layers)),
        by_piece=True,
        quantities=quantities,
        head_numbers=_head_numbers(decomposition, query),
        panes=tuple(panes),
    )


def source_terms(
    captured: SourceAttention, prompt: int, position: int, sources: SourcedPrompt | None, tokenizer: Any
) -> ViewTerms:
    """Return what a view of one prompt of a capture by source shows.

    Args:
        captured: the capture.
        prompt: the prompt's index.
        position: the index in `captured.positions` of the position that attends.
        sources: the prompt with named sources to sum tokens by, of a capture by token.
        tokenizer: what names the tokens of logits; `None` names them by their ids.

    Raises:
        IndexError: there is no such prompt or position.
        PromptError: `sources` is another prompt.
        ValueError: `sources` cuts through a source of the capture.
    """
    prompt = checked_index("query", prompt, len(captured.tokens))
    position = checked_index("position", position, len(captured.positions[prompt]))
    by_unit = captured.sources[prompt]
    by_piece = len(set(by_unit)) == len(by_unit)
    if sources is None:
        groups = ("prompt",) if by_piece else captured.names
        token_groups = [0] * len(by_unit) if by_piece else list(by_unit)
    else:
        if sources.tokens != captured.tokens[prompt]:
            raise PromptError(
                f"expected sources as the prompt that was captured, of {len(by_unit)} tokens, got another one of "
                f"{len(sources)}: pass the prompt on which by_token() was called"
            )
        if not by_piece:
            raise ValueError(
                "expected a capture by token with sources=, got one by source: capture prompt.by_token(), or leave "
                "out sources="
            )
        groups, token_groups = sources.names, list(sources.sources)
    pieces = _merged(
        [(text, range(at, at + 1)) for at, text in enumerate(captured.texts[prompt])], token_groups, by_piece
    )
    quantities: list[Numbers] = []
    for title, values, note in _source_quantities(captured, prompt, tokenizer):
        values = values[prompt, position].double()
        by_token = values[..., list(by_unit)] if by_piece else values
        units = by_token if not by_piece else _by_piece(by_token, pieces)
        sums = _by_group(by_token, token_groups, len(groups)) if by_piece else values
        first = tuple(at for at, name in enumerate(groups) if name.startswith("demonstration"))
        grid = first or tuple(at for at, name in enumerate(groups) if name != START_TOKEN)[:1] or (0,)
        quantities.append(Numbers(title, note, units, sums, grid))
    at = captured.positions[prompt][position]
    return ViewTerms(
        title=f"{captured.model}: prompt {prompt}, attention of the token at position {at}",
        recorded=at,
        pieces=pieces,
        groups=groups,
        layers=captured.layers,
        by_piece=by_piece,
        quantities=tuple(quantities),
    )


def _source_quantities(captured: SourceAttention, prompt: int, tokenizer: Any) -> list[tuple[str, Tensor, str]]:
    """Return the title, values and meaning of each quantity that sums over sources."""
    quantity: tuple[Quantity, ...] = ("share", "mass")
    notes = {
        "share": "Share of the layer's attention output along its own direction, without b_O. All heads and sources of "
        "a layer sum to 1.",
        "mass": "Share of the softmax, from 0 to 1. All sources of a head sum to 1 (with the sink, where a model has "
        "one).",
    }
    effects: list[tuple[str, Tensor, str]] = []
    for index in range(0 if captured.logit_effect is None else captured.logit_effect.shape[-1]):
        token = captured.logit_tokens[prompt][index]
        name = f"token {token}" if tokenizer is None else repr(_tokenizer(tokenizer, None).decode([token]))
        note = f"What each contribution adds to the logit of {name} directly, past all later layers, scales frozen."
        effects.append((f"direct effect on the logit of {name}", captured.values("logit_effect", index), note))
    return [*effects, *((QUANTITY_TITLES[name], captured.values(name), notes[name]) for name in quantity)]


def _tokenizer(given: Any, kept: Any) -> Any:
    """Return the tokenizer of a model, a given one, or that of the prompts."""
    tokenizer = given.tokenizer if isinstance(given, Model) else given
    tokenizer = kept if tokenizer is None else tokenizer
    if tokenizer is None:
        raise PromptError("expected prompts with a tokenizer, got prompts without one: pass tokenizer=model")
    return tokenizer


def _pieces(tokenizer: Any, tokens: Tokens, groups: Sequence[int]) -> tuple[Piece, ...]:
    """Return the pieces of tokens; none has tokens of two sources."""
    texts, first = list[tuple[str, range]](), 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or groups[end] != groups[first]:
            run = decoded_pieces(tokenizer, tokens[first:end])
            texts += [(text, range(first + at.start, first + at.stop)) for text, at in run]
            first = end
    return _merged(texts, groups, by_piece=True)


def _merged(texts: Sequence[tuple[str, range]], groups: Sequence[int], by_piece: bool) -> tuple[Piece, ...]:
    """Return pieces of texts and positions, each text that is empty joined to the one before it in its source."""
    pieces = list[Piece]()
    for text, at in texts:
        group = groups[at.start]
        if not text and pieces and pieces[-1].group == group:
            before = pieces.pop()
            pieces.append(Piece(before.text, before.first, at.stop - 1, group, before.unit))
        else:
            pieces.append(Piece(text, at.start, at.stop - 1, group, len(pieces) if by_piece else group))
    return tuple(pieces)


def _by_piece(values: Float[Tensor, "layer head token"], pieces: Sequence[Piece]) -> Float[Tensor, "layer head piece"]:
    """Return the sum of tokens' numbers over each piece."""
    return torch.stack([values[..., piece.first : piece.last + 1].sum(-1) for piece in pieces], dim=-1)


def _by_group(
    values: Float[Tensor, "layer head token"], groups: Sequence[int], n_groups: int
) -> Float[Tensor, "layer head group"]:
    """Return the sum of tokens' numbers over each source."""
    return values.new_zeros(*values.shape[:2], n_groups).index_add_(-1, torch.tensor(groups), values)


def _head_numbers(decomposition: Decomposition, query: int) -> dict[str, Tensor]:
    """Return the norm of what each head writes into the residual stream, by term."""
    d = decomposition
    z_0, added, z_zsl = (term[query] for term in (d.z_0, d.from_demonstrations, d.z_zsl))
    terms = {
        "zero-shot run, ‖z_ZSL W_O‖": z_zsl,
        "in context, ‖z W_O‖": z_0 + added,
        "without the demonstrations, ‖z₀ W_O‖": z_0,
        "direct, ‖ΔICL W_O‖": added,
        "inherited, ‖(z₀ − z_ZSL) W_O‖": z_0 - z_zsl,
    }
    return {name: vector_norm(torch.einsum("lhd,lhdm->lhm", term, d.W_O), dim=-1) for name, term in terms.items()}


def _without_demonstrations(
    decomposition: Decomposition, query: int, pieces: tuple[Piece, ...], weights: Numbers
) -> Pane:
    """Return the attention of z_0: the in-context weights, as shares of what the demonstrations leave."""
    remaining = [piece for piece in pieces if decomposition.groups[piece.group] in ("start", "query")]
    rest = 1 - decomposition.demonstration_mass[query].double().unsqueeze(-1)
    values = weights.values[..., [piece.unit for piece in remaining]] / rest
    return Pane(
        "Attention weight in context, without the demonstrations (z₀)",
        "Of the in-context pass: weights divided by what the demonstrations leave of the softmax.",
        tuple(Piece(p.text, p.first, p.last, p.group, at) for at, p in enumerate(remaining)),
        values,
    )


def _zero_shot_run(decomposition: Decomposition, query: int, zero_shot: Capture, tokenizer: Any) -> Pane:
    """Return the attention of the zero-shot run.

    Raises:
        ValueError: it is not the zero-shot capture of this decomposition, or has no keys.
    """
    keys_values, q_scored, z, inputs = (
        zero_shot.keys_values,
        zero_shot.q_scored,
        zero_shot.z,
        decomposition.attention_inputs,
    )
    if z is None or not torch.equal(z.double(), decomposition.z_zsl):
        raise ValueError(
            f"expected zero_shot as the capture that was decomposed, got one of {zero_shot.model!r} with other heads' "
            "outputs: pass the zero_shot that was passed to decompose"
        )
    if keys_values is None or q_scored is None or inputs is None:
        raise ValueError(
            "expected zero_shot with q_scored and keys_values, got one without: capture it with "
            "fields=icl_dual.DECOMPOSE_FIELDS"
        )
    prompts = zero_shot.prompts
    tokens = prompts.prefix + prompts.suffixes[query]
    start, query_group = decomposition.groups.index("start"), decomposition.groups.index("query")
    groups = [start] * len(prompts.prefix) + [query_group] * (len(tokens) - len(prompts.prefix))
    pieces = _pieces(tokenizer, tokens, groups)
    positions: Int[Tensor, " pos"] = torch.arange(len(tokens))
    weights = [
        rule.weights(
            q_scored[query, layer, None].double(),
            keys_values.query_keys[query, layer, : len(tokens)].double(),
            positions[-1:],
            positions,
        )[:, 0]
        for layer, rule in enumerate(inputs.rules)
    ]
    return Pane(
        "Attention weight in the zero-shot run",
        "Of the run without demonstrations, at the same layer and head.",
        pieces,
        _by_piece(torch.stack(weights), pieces),
    )
