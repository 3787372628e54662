"""A decoder with momentum attention: transformers' GPT-2 plus a decaying sum of past values in every head.

MoAttn(V, K, q_t) = Attn(V, K, q_t) + Σ_{i<t} η^{t−i} v_i, in every head of every layer. η is one fixed number, or each
head learns its own as the sigmoid of a parameter. With η = 0 the model is GPT-2, bit for bit.
"""

# transformers' registers have types in part.
# pyright: reportUnknownMemberType=false

import math
from typing import Any, ClassVar, cast, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.integrations.sdpa_attention import (
    sdpa_attention_forward,  # pyright: ignore[reportUnknownVariableType]
)
from transformers.masking_utils import (
    AttentionMaskInterface,
    sdpa_mask,  # pyright: ignore[reportUnknownVariableType]
)

from icl_dual.momentum import check_eta, decay_matrix, decaying_sum

LEARNED = "learned"
"""The value of `eta` with which every head learns its own η, from `INITIAL_ETA`."""
INITIAL_ETA = 0.1
"""The initial value of a learned η. The paper does not give one."""


@no_type_check  # transformers generates its __init__, which takes more arguments than it names
class MomentumConfig(GPT2Config):
    """Holds GPT-2's configuration and η.

    Args:
        eta: η, at least 0 and below 1, for all heads; or `learned`.
        **kwargs: the arguments of `GPT2Config`.

    Raises:
        ValueError: η is out of range.
    """

    model_type = "icl_dual_momentum"
    eta: float | int | str = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.eta, float | int):
            check_eta(torch.tensor([float(self.eta)]))
        elif self.eta != LEARNED:
            raise ValueError(f"expected eta as a number from 0 to below 1, or {LEARNED!r}, got {self.eta!r}")


class MomentumForCausalLM(GPT2LMHeadModel):
    """A GPT-2 with momentum attention.

    Raises:
        ValueError: η is out of range; a sequence is longer than the model's context; or the model is run in a way that
            cannot add momentum: with another attention implementation, or with a cache of fixed size.
    """

    config_class = MomentumConfig
    _no_split_modules: ClassVar[list[str]] = ["GPT2Block"]

    def __init__(self, config: MomentumConfig) -> None:
        config._attn_implementation = _implementation(config)  # pyright: ignore[reportPrivateUsage]
        super().__init__(config)
        self.register_forward_pre_hook(_check_momentum_applies, with_kwargs=True)
        for attention in self._attentions():
            if config.eta == LEARNED:
                attention.eta_logit = nn.Parameter(
                    torch.full((config.n_head,), math.log(INITIAL_ETA / (1 - INITIAL_ETA)))
                )

    def _attentions(self) -> list[Any]:
        return [block.attn for block in self.transformer.h]

    @property
    def eta(self) -> Float[Tensor, "layer head"]:
        """The current η of every head."""
        if self.config.eta != LEARNED:
            return torch.full((self.config.n_layer, self.config.n_head), float(self.config.eta), dtype=torch.float64)
        return torch.stack([_eta_of(attention) for attention in self._attentions()]).detach()

    def without_momentum(self) -> GPT2LMHeadModel:
        """Return a GPT-2 without momentum that shares these weights."""
        entries = {name: value for name, value in self.config.to_dict().items() if name not in ("eta", "model_type")}
        entries["architectures"] = ["GPT2LMHeadModel"]
        config = GPT2Config(**entries)
        with torch.device("meta"):
            gpt2 = GPT2LMHeadModel(config)
        state = {name: value for name, value in self.state_dict().items() if not name.endswith("eta_logit")}
        gpt2.load_state_dict(state, assign=True)
        gpt2.tie_weights()
        return gpt2.eval()


def _implementation(config: Any) -> str:
    return "sdpa" if config.eta == 0 else ATTENTION_IMPLEMENTATION


def _check_momentum_applies(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
    n_pos = (0 if tokens is None else tokens.shape[1]) + (0 if cache is None else cache.get_seq_length())
    if n_pos > model.config.n_positions:
        raise ValueError(
            f"expected sequences of at most {model.config.n_positions} tokens, the model's context, got {n_pos}"
        )
    if model.config.eta != 0 and cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"expected a cache that grows with the tokens (DynamicCache), got {type(cache).__name__}: momentum cannot "
            "tell which of its entries are filled"
        )
    if (current := model.config._attn_implementation) != (required := _implementation(model.config)):
        raise ValueError(
            f"expected the attention implementation {required!r}, which adds the model's momentum, got {current!r}: do "
            "not call set_attn_implementation"
        )


def momentum_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch head key d_head"],
    value: Float[Tensor, "batch head key d_head"],
    attention_mask: Bool[Tensor, "#batch 1 pos key"] | Float[Tensor, "#batch 1 pos key"] | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos head d_head"], None]:
    """Compute torch's fused attention plus momentum; transformers calls this at every layer, cached values first."""
    attention, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    eta = _eta_of(module)
    visible = attention_mask if attention_mask is None or attention_mask.dtype is torch.bool else attention_mask == 0
    if query.shape[2] != value.shape[2]:
        momentum = _momentum_with_cache(value, eta, query.shape[2], visible)
    elif eta.requires_grad and torch.is_grad_enabled():
        # Recomputed in the backward pass: to keep the copy of the values that the gradient needs costs more memory.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        momentum = cast(Any, checkpoint)(_momentum_of_sequence, value, eta, visible, **options)
    else:
        momentum = _momentum_of_sequence(value, eta, visible)
    return attention + momentum.to(attention.dtype), None


def _momentum_of_sequence(
    value: Float[Tensor, "batch head pos d_head"],
    eta: Float[Tensor, " head"],
    visible: Bool[Tensor, "#batch 1 pos pos"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    documents = None if visible is None else _document_ids(visible).expand(len(value), -1)
    return decaying_sum(value.transpose(1, 2), eta, documents=documents).z


def _momentum_with_cache(
    value: Float[Tensor, "batch head key d_head"],
    eta: Float[Tensor, " head"],
    n_new: int,
    visible: Bool[Tensor, "#batch 1 new key"] | None,
) -> Float[Tensor, "batch new head d_head"]:
    """Return the momentum of the last `n_new` positions over all values, most of them from the cache."""
    keys = torch.arange(value.shape[2], device=value.device)
    positions = keys[len(keys) - n_new :]
    weights = decay_matrix(eta, positions, keys)[None]
    if visible is not None:  # back to the last hidden key, after which the document begins
        weights = weights * (visible | (keys >= positions[:, None])).flip(-1).cumprod(-1).flip(-1)
    return (weights @ value.to(weights.dtype)).transpose(1, 2)


def _eta_of(module: Any) -> Float[Tensor, " head"]:
    """Return η in float32; it stays below 1 also where the sigmoid rounds to 1."""
    if module.config.eta == LEARNED:
        return module.eta_logit.float().sigmoid().clamp(max=1 - torch.finfo(torch.float32).eps)
    return torch.full((module.num_heads,), float(module.config.eta), device=module.c_proj.weight.device)


def _document_ids(visible: Bool[Tensor, "batch 1 pos pos"]) -> Int[Tensor, "batch pos"]:
    """Number the documents of a padded or packed batch: one ends where the mask hides the preceding token."""
    sees_previous = visible[:, 0].diagonal(offset=-1, dim1=1, dim2=2)
    return torch.nn.functional.pad((~sees_previous).cumsum(1), (1, 0))


ATTENTION_IMPLEMENTATION = "icl_dual_momentum"
"""The name under which transformers finds `momentum_attention_forward`."""
AttentionInterface.register(ATTENTION_IMPLEMENTATION, momentum_attention_forward)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, sdpa_mask)
AutoConfig.register(MomentumConfig.model_type, MomentumConfig)
AutoModelForCausalLM.register(MomentumConfig, MomentumForCausalLM)
