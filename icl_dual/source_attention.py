"""`SourceAttention`: attention by the named source of the keys, and `capture_sources()`, which runs the model for it.

For a head with softmax weights a_j over the keys and values v_j, every source G of a prompt has

    mass     w_G = Σ_{j∈G} a_j                 its share of the softmax
    term     z_G = Σ_{j∈G} a_j v_j             its part of the head's output, before W_O
    contribution  z_G W_O                      what it writes into the residual stream

Sources are disjoint and cover the prompt, so the terms sum to the head's output, and the contributions of all heads,
with b_O, to the attention output. The split of in-context attention (`icl_dual.decomposition`) is the case in which the
sources are start token, demonstrations, separators and query (`icl_dual.prompt_from_query`).

Prompts run in blocks of tokens, each after the ones before (`icl_dual.captures.shared_prefix`); the attention weights
of a few rows are in memory at a time. Every capture is checked: the contributions must sum to the attention output that
the model computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual import dual
from icl_dual.arguments import Index, checked
from icl_dual.captures.capture import check_pass
from icl_dual.captures.shared_prefix import BlockCallbacks, PrefixCache, run_prefix
from icl_dual.decomposition import LAYER_TOLERANCE
from icl_dual.field_docs import document_fields
from icl_dual.models import Attention, DirectPath, Model, UnsupportedModelError
from icl_dual.models.journal import exclusive
from icl_dual.models.tokenization import Tokens
from icl_dual.momentum import decay_matrix
from icl_dual.progress import progress_bar
from icl_dual.prompt_view import TokenView
from icl_dual.prompts import Prompts
from icl_dual.results import ROUNDING, check_axes, check_values
from icl_dual.sourced_prompts import SourcedPrompt, source_index
from icl_dual.storage import Saved
from icl_dual.texts import PromptError
from icl_dual.torch_utils import at_least_float32, checked_index, linalg, to_list, vector_norm

Quantity = Literal["mass", "norm", "share", "logit_effect"]
"""A field of `SourceAttention` with a number for each source."""
QUANTITY_TITLES: dict[Quantity, str] = {
    "mass": "share of the softmax",
    "norm": "norm of the contribution",
    "share": "share of the attention output",
    "logit_effect": "direct effect on the logit",
}
"""Each quantity in words, for figures."""

WEIGHTS_AT_ONCE = 1 << 24
"""How many attention weights are in memory at a time: 64 MiB in float32."""


@checked
@document_fields
@dataclass(frozen=True, repr=False, eq=False)
class SourceAttention(Saved):
    """Attention by the source of the keys, at chosen positions of one or several prompts, by layer and head.

    All tensors have the axes prompt, position, layer, head and source, in this order. Positions and layers are those in
    `positions` and `layers`; `source_index` finds a source by its name. `to_frame` is a tidy table of it all.
    """

    model: str
    """The model's name."""
    fingerprint: str
    """The dtype and a hash of the weights that ran."""
    hooks: str
    """The hooks that others had on the model during the run; empty where there were none."""
    names: tuple[str, ...]
    """The names of the sources."""
    tokens: tuple[Tokens, ...]
    """The token ids of each prompt."""
    sources: tuple[Tokens, ...]
    """The source of each token of each prompt, as an index into `names`."""
    texts: tuple[tuple[str, ...], ...]
    """The text of each token of each prompt."""
    positions: tuple[Tokens, ...]
    """The positions of the queries in each prompt, from 0."""
    layers: Tokens
    """The layers, from 0."""
    mass: Float[Tensor, "prompt position layer head source"]
    """The share of the softmax that each source takes, from 0 to 1. It sums to 1 over sources, or with `sink_mass`."""
    norm: Float[Tensor, "prompt position layer head source"]
    """The norm of each source's contribution z_G W_O."""
    share: Float[Tensor, "prompt position layer head source"]
    """The projection of each contribution on the attention output without b_O, divided by its squared norm. Sums to 1
    over heads and sources; may be negative, and is NaN where the output is 0."""
    residuals: Float[Tensor, " layer"]
    """The largest relative difference, over prompts and positions, of the sum of all contributions and b_O from the
    model's own attention output."""
    sink_mass: Float[Tensor, "prompt position layer head"] | None = None
    """The share of the softmax that the model's learned sink takes, which has no value; `None` for a model without."""
    z: Float[Tensor, "prompt position layer head source d_head"] | None = None
    """Each source's term z_G of the head's output, before W_O; `None` where it was not requested."""
    W_O: Float[Tensor, "layer head d_head d_model"] | None = None
    """The output projections; `None` without `z`."""
    logit_tokens: tuple[Tokens, ...] = ()
    """The tokens of each prompt that `logit_effect` is of; empty where none were requested."""
    logit_effect: Float[Tensor, "prompt position layer head source logit"] | None = None
    """What each contribution adds to each token's logit directly, past all later layers. Norms between attention and
    the logits have their scale frozen at its value in this run, and a cap of the logits is left out."""

    def __post_init__(self) -> None:
        check_axes(
            self,
            prompt=("tokens", len(self.tokens)),
            position=("positions", len(self.positions[0]) if self.positions else 0),
            layer=("layers", len(self.layers)),
            source=("names", len(self.names)),
            logit=("logit_tokens", len(self.logit_tokens[0]) if self.logit_tokens else 0),
        )
        check_values(self, "mass", "sink_mass", low=-ROUNDING, high=1 + ROUNDING)
        check_values(self, "norm", "residuals", low=0)
        check_values(self, "share", nan=True)
        check_values(self, "z", "W_O", "logit_effect")

    @property
    def prompts(self) -> tuple[SourcedPrompt, ...]:
        """Return the prompts."""
        by_prompt = zip(self.tokens, self.sources, self.texts, strict=True)
        return tuple(SourcedPrompt(tokens, self.names, sources, texts) for tokens, sources, texts in by_prompt)

    @property
    def residual(self) -> float:
        """Return the largest of `residuals`."""
        return self.residuals.max().item()

    @checked
    def source_index(self, name: str) -> int:
        """Return the index of a source on the tensors' axis.

        Raises:
            PromptError: there is no source of this name.
        """
        return source_index(self.names, name)

    @checked
    def contribution(self, name: str) -> Float[Tensor, "prompt position layer head d_model"]:
        """Return what a source writes into the residual stream, z_G W_O, by head.

        Raises:
            PromptError: there is no source of this name.
            ValueError: the terms were not kept.
        """
        z, W_O = self._terms()
        return torch.einsum("pqlhd,lhdm->pqlhm", z[..., self.source_index(name), :], W_O)

    @property
    def contributions(self) -> Float[Tensor, "prompt position layer source d_model"]:
        """Return what each source writes into the residual stream through all heads of a layer.

        Raises:
            ValueError: the terms were not kept.
        """
        z, W_O = self._terms()
        return torch.einsum("pqlhsd,lhdm->pqlsm", z, W_O)

    def _terms(self) -> tuple[Tensor, Tensor]:
        if self.z is None or self.W_O is None:
            raise ValueError("expected a capture with z, got one without: call capture_sources with terms=True")
        return self.z, self.W_O

    @checked
    def values(self, quantity: Quantity, logit: int = 0) -> Float[Tensor, "prompt position layer head source"]:
        """Return one of the quantities by source.

        Args:
            quantity: `mass`, `norm`, `share` or `logit_effect`.
            logit: which of `logit_tokens`, for `logit_effect`.

        Raises:
            ValueError: the capture has no effects on logits.
            IndexError: it has no such logit.
        """
        if quantity != "logit_effect":
            return getattr(self, quantity)
        if self.logit_effect is None:
            raise ValueError("expected a capture with logit_effect, got one without: pass logits= to capture_sources")
        return self.logit_effect[..., checked_index("logit", logit, self.logit_effect.shape[-1])]

    @checked
    def show(
        self,
        layer: int,
        head: int,
        *,
        prompt: int = 0,
        position: int = -1,
        quantity: Quantity = "mass",
        logit: int = 0,
    ) -> TokenView:
        """Return one prompt with its tokens coloured by the number of their source at one layer and head.

        A capture of `SourcedPrompt.by_token()` has a number for each token.

        Args:
            layer: the layer, out of `layers`.
            head: the head's index.
            prompt: the prompt's index.
            position: the index in `positions` of the position that attends.
            quantity: the number: `mass`, `norm`, `share` or `logit_effect`.
            logit: which of `logit_tokens`, for `logit_effect`.

        Returns:
            The view: `print` it, or let Jupyter display it.

        Raises:
            IndexError: an index is out of range.
            ValueError: the layer was not captured, or the capture has no effects on logits.

        Example:
            >>> import icl_dual
            >>> from icl_dual.models import tiny_model
            >>> model = tiny_model()
            >>> parts = [("document", "The box is red. "), ("question", "Is it?")]
            >>> captured = icl_dual.capture_sources(model, icl_dual.prompt_from_parts(parts, model), progress=False)
            >>> print(captured.show(1, 0, quantity="share").title)
            share of the attention output at layer 1, head 0, for the token at position 22 of prompt 0
        """
        if layer not in self.layers:
            raise ValueError(f"expected a layer out of those captured, {list(self.layers)}, got {layer}: capture it")
        values = self.values(quantity, logit)
        prompt = checked_index("prompt", prompt, len(self.tokens))
        position = checked_index("position", position, len(self.positions[prompt]))
        head = checked_index("head", head, values.shape[3])
        by_source = to_list(values[prompt, position, self.layers.index(layer), head])
        title, at = QUANTITY_TITLES[quantity], self.positions[prompt][position]
        return TokenView(
            f"{title} at layer {layer}, head {head}, for the token at position {at} of prompt {prompt}",
            self.texts[prompt],
            tuple(self.names[source] for source in self.sources[prompt]),
            tuple(by_source[source] for source in self.sources[prompt]),
        )

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: a row for each prompt, position, layer, head and source.

        Its columns are these, then `mass`, `norm`, `share`, and for each of `logit_tokens` `logit_effect 0`, ….
        """
        columns = {"mass": self.mass, "norm": self.norm, "share": self.share}
        if self.logit_effect is not None:
            columns |= {
                f"logit_effect {index}": by_token for index, by_token in enumerate(self.logit_effect.unbind(-1))
            }
        n_prompts, n_positions, n_layers, n_heads, n_sources = self.mass.shape
        prompt, position, layer, head, source = torch.meshgrid(
            *(torch.arange(n) for n in (n_prompts, n_positions, n_layers, n_heads, n_sources)), indexing="ij"
        )
        positions = torch.tensor(self.positions)[prompt.flatten(), position.flatten()]
        index = {
            "prompt": prompt.flatten(),
            "position": positions,
            "layer": torch.tensor(self.layers)[layer.flatten()],
            "head": head.flatten(),
            "source": pd.Categorical.from_codes(source.flatten().numpy(), categories=pd.Index(self.names)),
        }
        values = {name: tensor.flatten() for name, tensor in columns.items()}
        return pd.DataFrame({name: v.numpy() if isinstance(v, Tensor) else v for name, v in (index | values).items()})

    def __repr__(self) -> str:
        n_prompts, n_positions, n_layers, n_heads, n_sources = self.mass.shape
        masses = to_list(self.mass.mean((0, 1, 2, 3)))
        largest = sorted(zip(masses, self.names, strict=True), reverse=True)[:4]
        shown = ", ".join(f"{name} {mass:.3f}" for mass, name in largest) + ", …" * (n_sources > 4)
        logits = f"{self.logit_effect.shape[-1]} logits, " if self.logit_effect is not None else ""
        return (
            f"SourceAttention({self.model!r}, {n_prompts} prompts of {n_sources} sources, {n_positions} positions, "
            f"{n_layers} layers of {n_heads} heads, {logits}mean mass: {shown}, residual={self.residual:.1e})"
        )


@checked
@exclusive
@torch.inference_mode(False)  # tensors made inside of it could not be changed or differentiated later
def capture_sources(
    model: Model,
    prompts: SourcedPrompt | Sequence[SourcedPrompt],
    *,
    positions: Sequence[int] | None = (-1,),
    layers: Sequence[int] | None = None,
    logits: Sequence[Index] | Sequence[Sequence[Index]] | None = None,
    terms: bool = True,
    progress: bool = True,
) -> SourceAttention:
    """Run prompts and split attention at chosen positions by the source of the keys, at every layer and head.

    Args:
        model: the model to run; it comes back as it was.
        prompts: one prompt, or several with sources of the same names.
        positions: the positions that attend; negative ones count from each prompt's end. By default the last; `None`
            for all, of prompts of one length.
        layers: the layers, all by default; negative ones count from the end.
        logits: the ids of the tokens to compute direct effects on logits of; or such a list for each prompt, of one
            length.
        terms: whether to keep `z`, from which contributions are computed as vectors. It grows with the number of
            positions: leave it out for all positions of long prompts.
        progress: show a progress bar.

    Returns:
        Mass, contributions and direct effects by source, on the CPU, in float32 or the model's dtype where that is
        wider. The model runs prompts one by one, in blocks of tokens: no attention matrix is in memory.

    Raises:
        PromptError: there is no prompt, their sources differ, or one does not fit the model's vocabulary or context.
        IndexError: a position or layer is out of range.
        ValueError: all positions were requested of prompts of several lengths, or not as many lists of logits as
            prompts were given.
        UnsupportedModelError: the contributions do not sum to the model's attention output, or the direct path to the
            logits is not linear.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> model = tiny_model()
        >>> parts = [("document", "The box is red. "), ("question", "Is it?")]
        >>> captured = icl_dual.capture_sources(model, icl_dual.prompt_from_parts(parts, model), progress=False)
        >>> captured.mass.shape, captured.names
        (torch.Size([1, 1, 2, 4, 3]), ('start token', 'document', 'question'))
    """
    together = [prompts] if isinstance(prompts, SourcedPrompt) else list(prompts)
    _check_prompts(model, together)
    positions_by_prompt = _positions(together, positions)
    chosen = tuple(
        checked_index("layers", layer, model.n_layers)
        for layer in (range(model.n_layers) if layers is None else layers)
    )
    if not chosen:
        raise ValueError("expected at least one layer, got none: leave out layers= for all")
    if len({*chosen}) < len(chosen):
        raise ValueError(f"expected layers with each layer once, got {list(layers or ())}: leave the repeated ones out")
    logit_tokens = _logit_tokens(model, logits, len(together))
    with torch.no_grad(), progress_bar(total=len(together), show=progress, unit="prompt") as bar:
        check_pass(model, _as_prompts(max(together, key=len)))
        recorder = _Recorder(model, together[0].names, positions_by_prompt, chosen, logit_tokens, terms)
        for prompt in together:
            recorder.run(prompt)
            bar.update()
    return recorder.result(together)


def _check_prompts(model: Model, prompts: Sequence[SourcedPrompt]) -> None:
    """Raise a PromptError unless prompts have the same sources, and fit the model."""
    if not prompts:
        raise PromptError("expected at least one prompt, got none: pass what prompt_from_parts returns")
    for prompt in prompts:
        if prompt.names != prompts[0].names:
            raise PromptError(
                f"expected prompts with sources of the same names in one order, got {list(prompts[0].names)[:8]} and "
                f"{list(prompt.names)[:8]}: rename sources, or capture these prompts apart"
            )
        if len(prompt) > model.n_ctx:
            raise PromptError(
                f"expected prompts of at most {model.n_ctx} tokens, the context of {model.name}, got one of "
                f"{len(prompt)}: use fewer or shorter parts"
            )
        if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < model.d_vocab:
            raise PromptError(
                f"expected token ids from 0 to {model.d_vocab - 1}, the vocabulary of {model.name}, got "
                f"{max(prompt.tokens)}: tokenise with this model's tokenizer"
            )


def _positions(prompts: Sequence[SourcedPrompt], positions: Sequence[int] | None) -> tuple[Tokens, ...]:
    """Return the positions in each prompt, from 0."""
    if positions is None:
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError(
                f"expected prompts of one length for all positions, got {min(map(len, prompts))} to "
                f"{max(map(len, prompts))} tokens: pass positions=, or capture these prompts apart"
            )
        return tuple(tuple(range(len(prompt))) for prompt in prompts)
    if not positions:
        raise ValueError("expected at least one position, got none: pass positions=None for all")
    return tuple(tuple(checked_index("positions", at, len(prompt)) for at in positions) for prompt in prompts)


def _logit_tokens(model: Model, logits: Sequence[Any] | None, n_prompts: int) -> tuple[Tokens, ...]:
    """Return the tokens of each prompt to compute direct effects on."""
    if not logits:
        return ()
    by_prompt = [tuple(tokens) for tokens in logits] if isinstance(logits[0], Sequence) else [tuple(logits)] * n_prompts
    if not all(by_prompt):
        raise ValueError(
            "expected at least one token in each list of logits, got none: leave out logits=, or pass token ids"
        )
    if len(by_prompt) != n_prompts or len({len(tokens) for tokens in by_prompt}) > 1:
        raise ValueError(
            f"expected logits as one list of tokens, or one for each of {n_prompts} prompts with as many tokens each, "
            f"got {len(by_prompt)} lists of {sorted({len(tokens) for tokens in by_prompt})} tokens: pass token ids"
        )
    if (largest := max(map(max, by_prompt))) >= model.d_vocab:
        raise ValueError(
            f"expected logits as token ids from 0 to {model.d_vocab - 1}, the vocabulary of {model.name}, got {largest}"
            ": tokenise with this model's tokenizer"
        )
    return tuple(by_prompt)


def _as_prompts(prompt: SourcedPrompt) -> Prompts:
    """Return a prompt as a query, its last token, after all others: what the pass is checked on."""
    *before, last = prompt.tokens
    return Prompts(
        start=tuple(before[:1]),
        demonstrations=(tuple(before[1:]),) if before[1:] else (),
        demonstration_label_lengths=(0,) if before[1:] else (),
        queries=((last,),),
        labels=((last,),),
        gold=(0,),
    )


class _Recorder:
    """Splits attention by source while prompts run."""

    def __init__(
        self,
        model: Model,
        names: tuple[str, ...],
        positions: tuple[Tokens, ...],
        layers: Tokens,
        logit_tokens: tuple[Tokens, ...],
        terms: bool,
    ) -> None:
        self.model, self.names, self.positions, self.layers = model, names, positions, layers
        self.logit_tokens, self.n_run = logit_tokens, 0
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        W_O, b_O = model.output_projections()
        index = torch.tensor(layers, device=W_O.device)
        self.W_O, self.b_O = at_least_float32(W_O[index]), None if b_O is None else at_least_float32(b_O[index])
        # ‖z W_O‖ = ‖z Rᵀ‖ with the triangular factor R of each head's W_Oᵀ = Q R.
        self.R = torch.stack([linalg.qr(W.double().mT, mode="r").R.to(self.dtype) for W in self.W_O])
        self.paths = self._direct_paths()
        shape = (len(positions), len(positions[0]), len(layers), model.n_heads, len(names))
        self.fields = {name: torch.zeros(shape, dtype=self.dtype) for name in ("mass", "norm", "share")}
        if any(model.attention_rules[layer].sink is not None for layer in layers):
            self.fields["sink_mass"] = torch.zeros(shape[:-1], dtype=self.dtype)
        if terms:
            self.fields["z"] = torch.zeros((*shape, model.d_head), dtype=self.dtype)
        if logit_tokens:
            self.fields["logit_effect"] = torch.zeros((*shape, len(logit_tokens[0])), dtype=self.dtype)
        self.residuals = torch.zeros(len(layers), dtype=torch.float64)
        self.outputs: dict[int, Float[Tensor, "row d_model"]] = {}
        """By layer, the sum of contributions at the block's recorded rows, until the model's own output is there."""

    def _direct_paths(self) -> list[DirectPath]:
        """Return the direct path to the logits of each prompt's tokens."""
        by_tokens = {tokens: self.model.direct_path(tokens) for tokens in dict.fromkeys(self.logit_tokens)}
        return [by_tokens[tokens] for tokens in self.logit_tokens]

    def run(self, prompt: SourcedPrompt) -> None:
        """Run the next prompt, up to the last of its positions, and record it."""
        self.sources = torch.tensor(prompt.sources, device=self.model.device)
        self.order = torch.argsort(self.sources, stable=True)
        self.wanted = torch.tensor(self.positions[self.n_run])
        if self.paths:
            path = self.paths[self.n_run]
            directions = torch.stack([path.directions(layer) for layer in self.layers]).to(self.W_O)
            self.readers = torch.einsum("lhdm,ltm->lhdt", self.W_O, directions)
        whole = self.model.rope_scaling_threshold is not None  # rotates by the length of what runs
        tokens = prompt.tokens if whole else prompt.tokens[: int(self.wanted.max()) + 1]
        callbacks = BlockCallbacks(self.on_attention, self.on_output, self.on_residual)
        run_prefix(self.model, tokens, callbacks=callbacks)
        self.n_run += 1

    def _columns(self, first: int, n_pos: int) -> tuple[Int[Tensor, " column"], Int[Tensor, " column"]]:
        """Return which of the recorded positions are in a block, and where in it they are."""
        columns = ((self.wanted >= first) & (self.wanted < first + n_pos)).nonzero().squeeze(-1)
        return columns, self.wanted[columns] - first

    def on_attention(self, cache: PrefixCache, layer: int, attention: Attention) -> None:
        """Split the attention of a layer at the recorded positions of a block."""
        self.outputs.pop(layer, None)  # of a block that did not fit in memory
        first = cache.n_pos
        columns, rows = self._columns(first, attention.q.shape[1])
        if layer not in self.layers or not len(columns):
            return
        k = torch.cat((cache.keys[layer][0], attention.k[0]))
        v = torch.cat((cache.values[layer][0], attention.v[0]))
        n_keys = int(self.wanted[columns].max()) + 1
        keys = self.order[self.order < n_keys]
        k, v = k[keys].to(self.dtype), v[keys].to(self.dtype)
        counts = to_list(torch.bincount(self.sources[keys], minlength=len(self.names)))
        step = max(1, WEIGHTS_AT_ONCE // (self.model.n_heads * n_keys))
        outputs: list[Tensor] = []
        for at in range(0, len(columns), step):
            chosen = columns[at : at + step]
            q = attention.q[0, rows[at : at + step].to(attention.q.device)].to(self.dtype)
            outputs.append(self._split(layer, q, k, v, self.wanted[chosen].to(keys), keys, counts, chosen))
        self.outputs[layer] = torch.cat(outputs)

    def _split(
        self,
        layer: int,
        q: Float[Tensor, "row head d_head"],
        k: Float[Tensor, "key kv_head d_head"],
        v: Float[Tensor, "key kv_head d_head"],
        rows: Int[Tensor, " row"],
        keys: Int[Tensor, " key"],
        counts: list[int],
        columns: Int[Tensor, " row"],
    ) -> Float[Tensor, "row d_model"]:
        """Record the split of some rows over keys in the order of their sources; return the sum of contributions."""
        rule, eta = self.model.attention_rules[layer], self.model.eta(layer)
        weights = rule.weights(q, k, rows, keys)
        mass = torch.stack([part.sum(-1) for part in torch.split(weights, counts, dim=-1)], dim=-1).transpose(0, 1)
        factors = weights if eta is None else weights + decay_matrix(eta.to(weights), rows, keys)
        z = torch.stack(
            [
                dual.weighted_values(part, values)
                for part, values in zip(torch.split(factors, counts, dim=-1), torch.split(v, counts), strict=True)
            ],
            dim=2,
        )
        at = self.layers.index(layer)
        W_O, cell = self.W_O[at], (self.n_run, columns, at)
        heads = z.sum(2)
        output = heads.flatten(1) @ W_O.flatten(0, 1)
        along = torch.einsum("rm,hdm->rhd", output, W_O)
        size = output.square().sum(-1)[:, None, None]
        self._record("mass", cell, mass)
        self._record("norm", cell, vector_norm(torch.einsum("rhsd,hed->rhse", z, self.R[at]), dim=-1))
        self._record("share", cell, torch.einsum("rhsd,rhd->rhs", z, along) / size)
        self._record("sink_mass", cell, 1 - mass.sum(-1))
        self._record("z", cell, z)
        if self.paths:
            self._record("logit_effect", cell, torch.einsum("rhsd,hdt->rhst", z, self.readers[at]))
        return output if self.b_O is None else output + self.b_O[at]

    def _record(self, name: str, cell: tuple[int, Tensor, int], values: Tensor) -> None:
        if name in self.fields:
            self.fields[name][cell] = values.to(self.fields[name])

    def on_output(self, first: int, layer: int, output: Float[Tensor, "1 pos d_model"]) -> None:
        """Compare the sum of contributions with a layer's attention output; apply the norm that follows it."""
        columns, rows = self._columns(first, output.shape[1])
        if (computed := self.outputs.pop(layer, None)) is None:
            return
        expected = output[0, rows.to(output.device)].to(computed)
        at = self.layers.index(layer)
        errors = vector_norm(computed - expected, dim=-1) / vector_norm(expected, dim=-1).clamp_min(1e-30)
        relative = errors.max().item()
        if not relative <= (tolerance := LAYER_TOLERANCE[self.model.dtype]):
            raise UnsupportedModelError(
                f"{self.model.name} ({self.model.architecture}), layer {layer}: expected contributions that sum to "
                f"the attention output to {tolerance:.0e}, got a difference of {relative:.1e}: its attention does more "
                "than softmax over scaled scores and a linear W_O, or a hook changes it"
            )
        self.residuals[at] = max(self.residuals[at].item(), relative)
        norm = self.paths[self.n_run].after_attention[layer] if self.paths else None
        if norm is not None:
            self._scale((self.n_run, columns, at), norm.inverse_scale(expected.double()))

    def on_residual(self, first: int, layer: int, residual: Float[Tensor, "1 pos d_model"]) -> None:
        """Apply the final norm's scale to the direct effects of a block, after the last layer."""
        if layer < self.model.n_layers - 1 or not self.paths or (norm := self.paths[self.n_run].final) is None:
            return
        columns, rows = self._columns(first, residual.shape[1])
        if len(columns):
            inverse_scale = norm.inverse_scale(residual[0, rows.to(residual.device)].double().cpu())
            for at in range(len(self.layers)):
                self._scale((self.n_run, columns, at), inverse_scale)

    def _scale(self, cell: tuple[int, Tensor, int], factors: Float[Tensor, " row"]) -> None:
        effects = self.fields["logit_effect"]
        effects[cell] = effects[cell] * factors.to(effects)[:, None, None, None]

    def result(self, prompts: Sequence[SourcedPrompt]) -> SourceAttention:
        """Return what was recorded."""
        return SourceAttention(
            model=self.model.name,
            fingerprint=self.model.fingerprint(),
            hooks=self.model.foreign_hooks(),
            names=self.names,
            tokens=tuple(prompt.tokens for prompt in prompts),
            sources=tuple(prompt.sources for prompt in prompts),
            texts=tuple(prompt.texts for prompt in prompts),
            positions=self.positions,
            layers=self.layers,
            residuals=self.residuals,
            W_O=self.W_O.cpu() if "z" in self.fields else None,
            logit_tokens=self.logit_tokens,
            **self.fields,
        )
