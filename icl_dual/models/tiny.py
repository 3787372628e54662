"""A tiny model with random weights, for examples and for trying code without a download."""

from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icl_dual.arguments import Seed, checked
from icl_dual.models.model import Model
from icl_dual.torch_utils import fork_rng

N_CTX = 512


@checked
def tiny_model(seed: Seed = 0, *, dtype: torch.dtype = torch.float32, arithmetic: torch.dtype | None = None) -> Model:
    """Build a two-layer Llama with random weights and a byte-level tokenizer, offline and in under a second.

    Its predictions mean nothing; its attention, decompositions and finetuning work like those of any other model.

    Args:
        seed: the seed of the weights. Global random states are left unchanged.
        dtype: the dtype of the weights, which are drawn in float32.
        arithmetic: the dtype of the computation, as in `load_model`.

    Returns:
        A model with 2 layers, 4 query heads, 2 key-value heads, d_head 8 and a context of 512 tokens.

    Example:
        >>> from icl_dual.models import tiny_model
        >>> model = tiny_model()
        >>> model.encode("Hi")
        [73, 106]
        >>> model.n_layers, model.n_heads
        (2, 4)
    """
    tokenizer = cast(Any, _byte_tokenizer())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
        initializer_range=0.2,
        architectures=["LlamaForCausalLM"],
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    with fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators, too
        hf_model: Any = LlamaForCausalLM(config).eval()
    for parameter in hf_model.parameters():  # not the buffers: transformers too loads rotary frequencies in float32
        parameter.data = parameter.data.to(dtype)
    with TemporaryDirectory() as folder:  # TransformerLens reloads the tokenizer from the folder it came from
        tokenizer.save_pretrained(folder)
        saved = cast(Any, PreTrainedTokenizerFast).from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            "tiny", hf_model=hf_model, tokenizer=saved, device="cpu", dtype=dtype, trust_remote_code=False
        )
    return Model(bridge, name="tiny", provenance=f"random weights, seed {seed}", arithmetic=arithmetic)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, and the start token 0."""
    alphabet = _byte_alphabet()
    vocabulary = {"<s>": 0} | {character: 1 + byte for byte, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def _byte_alphabet() -> list[str]:
    """The character by which byte-level tokenizers write each byte, in the order of the bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
