"""A decoder with momentum attention: transformers' GPT-2, whose heads also add a decaying sum of past values.

MoAttn(V, K, q_t) = Attn(V, K, q_t) + Σ_{i<t} η^{t−i} v_i, in every head of every layer. η is fixed, or learned: then
each head has its own, the sigmoid of a parameter. With η = 0 it is GPT-2, bit for bit.
"""

import math
from typing import Any, ClassVar, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from icl_dual.momentum import check_eta, decay_matrix, decaying_sum

LEARNED = "learned"
"""The value of `eta` by which every head learns its own, from `FIRST`."""
FIRST = 0.1
"""Where a learned η begins: the paper does not say."""


@no_type_check  # transformers writes its __init__, which takes more than it names
class MomentumConfig(GPT2Config):
    """GPT-2's configuration, and η: a number from 0 to below 1, or `learned`."""

    model_type = "icl_dual_momentum"
    eta: float | int | str = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.eta, float | int):
            check_eta(torch.tensor([float(self.eta)]))
        elif self.eta != LEARNED:
            raise ValueError(f"expected η as a number from 0 to below 1, or {LEARNED!r}, got {self.eta!r}")


class MomentumForCausalLM(GPT2LMHeadModel):
    """GPT-2 with momentum attention.

    Raises:
        ValueError: η is out of range; a sequence is longer than the model's context; or it is to run in a way that
            would leave momentum out: by another attention implementation, or with a cache of fixed size.
    """

    config_class = MomentumConfig
    _no_split_modules: ClassVar[list[str]] = ["GPT2Block"]

    def __init__(self, config: MomentumConfig) -> None:
        config._attn_implementation = _implementation(config)
        super().__init__(config)
        self.register_forward_pre_hook(_check_runs_whole, with_kwargs=True)
        for attention in self._attentions():
            if config.eta == LEARNED:
                attention.eta_logit = nn.Parameter(torch.full((config.n_head,), math.log(FIRST / (1 - FIRST))))

    def _attentions(self) -> list[Any]:
        return [block.attn for block in self.transformer.h]

    @property
    def eta(self) -> Float[Tensor, "layer head"]:
        """η of every head, as it is now."""
        if self.config.eta != LEARNED:
            return torch.full((self.config.n_layer, self.config.n_head), float(self.config.eta), dtype=torch.float64)
        return torch.stack([_eta_of(attention) for attention in self._attentions()]).detach()

    def without_momentum(self) -> GPT2LMHeadModel:
        """A GPT-2 that shares these weights, and lacks what momentum adds."""
        entries = {name: value for name, value in self.config.to_dict().items() if name not in ("eta", "model_type")}
        config = GPT2Config(**{**entries, "architectures": ["GPT2LMHeadModel"]})
        with torch.device("meta"):
            plain = GPT2LMHeadModel(config)
        state = {name: value for name, value in self.state_dict().items() if not name.endswith("eta_logit")}
        plain.load_state_dict(state, assign=True)
        plain.tie_weights()
        return plain.eval()


def _implementation(config: Any) -> str:
    return "sdpa" if config.eta == 0 else ATTENTION


def _check_runs_whole(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    tokens, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
    n_pos = (0 if tokens is None else tokens.shape[1]) + (0 if cache is None else cache.get_seq_length())
    if n_pos > model.config.n_positions:
        raise ValueError(
            f"expected sequences of at most the model's context, {model.config.n_positions} tokens, got {n_pos}"
        )
    if model.config.eta != 0 and cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"expected a cache that grows with the tokens (DynamicCache), got {type(cache).__name__}: momentum cannot "
            "tell which of its places are filled"
        )
    if (chosen := model.config._attn_implementation) != (own := _implementation(model.config)):
        raise ValueError(
            f"expected the attention implementation {own!r}, which has the model's momentum, got {chosen!r}: leave "
            "set_attn_implementation alone"
        )


def momentum_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch head key d_head"],
    value: Float[Tensor, "batch head key d_head"],
    attention_mask: Bool[Tensor, "#batch 1 pos key"] | Float[Tensor, "#batch 1 pos key"] | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos head d_head"], None]:
    """Torch's fused attention plus momentum, as transformers calls it at every layer; cached values come first."""
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    eta = _eta_of(module)
    seen = attention_mask if attention_mask is None or attention_mask.dtype is torch.bool else attention_mask == 0
    if query.shape[2] != value.shape[2]:
        added = _of_cached(value, eta, query.shape[2], seen)
    elif eta.requires_grad and torch.is_grad_enabled():
        # Summed again in the backward pass: its gradient wants another copy of the values, which is more than it adds.
        added = checkpoint(_of_all, value, eta, seen, use_reentrant=False, preserve_rng_state=False)
    else:
        added = _of_all(value, eta, seen)
    return attended + added.to(attended.dtype), None


def _of_all(
    value: Float[Tensor, "batch head pos d_head"],
    eta: Float[Tensor, " head"],
    seen: Bool[Tensor, "#batch 1 pos pos"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    documents = None if seen is None else _documents(seen).expand(len(value), -1)
    return decaying_sum(value.transpose(1, 2), eta, documents=documents).z


def _of_cached(
    value: Float[Tensor, "batch head key d_head"],
    eta: Float[Tensor, " head"],
    n_rows: int,
    seen: Bool[Tensor, "#batch 1 row key"] | None,
) -> Float[Tensor, "batch row head d_head"]:
    """Momentum of the last rows, which are new, over values of which the cache holds most."""
    keys = torch.arange(value.shape[2], device=value.device)
    rows = keys[len(keys) - n_rows :]
    weights = decay_matrix(eta, rows, keys)[None]
    if seen is not None:  # up to the next hidden key, where a text begins
        weights = weights * (seen | (keys >= rows[:, None])).flip(-1).cumprod(-1).flip(-1)
    return (weights @ value.to(weights.dtype)).transpose(1, 2)


def _eta_of(module: Any) -> Float[Tensor, " head"]:
    """In float32, and below 1 also where the sigmoid is 1 but for rounding."""
    if module.config.eta == LEARNED:
        return module.eta_logit.float().sigmoid().clamp(max=1 - torch.finfo(torch.float32).eps)
    return torch.full((module.num_heads,), float(module.config.eta), device=module.c_proj.weight.device)


def _documents(seen: Bool[Tensor, "batch 1 pos pos"]) -> Int[Tensor, "batch pos"]:
    """Runs of tokens that see the one before them: a padded or packed batch's mask ends one where a text ends."""
    sees_previous = seen[:, 0].diagonal(offset=-1, dim1=1, dim2=2)
    return torch.nn.functional.pad((~sees_previous).cumsum(1), (1, 0))


ATTENTION = "icl_dual_momentum"
AttentionInterface.register(ATTENTION, momentum_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AutoConfig.register(MomentumConfig.model_type, MomentumConfig)
AutoModelForCausalLM.register(MomentumConfig, MomentumForCausalLM)
