"""GGUF files as storage formats: a model of each type has the weights that gguf's own reference makes of its bytes."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import icl_dual as icl
from icl_dual import assets
from icl_dual.models.tiny import _byte_alphabet

WIDTH, N_HEADS, N_TOKENS = 256, 4, 258
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}
"""By type without a quantiser in gguf, where a block's float16 scales begin; its other bytes may be any."""

UNREADABLE = "Q8_K"
"""A type that gguf has no dequantisation for."""

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def quantised(kind: str, rng: np.random.Generator) -> Any:
    """A square matrix in a file's type, as bytes."""
    of_type = GGMLQuantizationType[kind]
    if kind == UNREADABLE:
        return np.zeros((WIDTH, 292), dtype=np.uint8)
    if kind not in SCALES:
        return gguf.quants.quantize(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / 16, of_type)
    n_weights, n_bytes = GGML_QUANT_SIZES[of_type]
    blocks = rng.integers(256, size=(WIDTH * WIDTH // n_weights, n_bytes), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = rng.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(WIDTH, -1)


def write(file: Path, kind: str) -> dict[str, Any]:
    """Write a Llama of one layer with matrices of a type; return their numbers by gguf's reference."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", *_byte_alphabet(), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    of_type = GGMLQuantizationType[kind]
    numbers = {}
    for name in MATRICES:
        data = quantised(kind, rng)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=of_type)
        numbers[name] = None if kind == UNREADABLE else gguf.quants.dequantize(data, of_type)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", rng.standard_normal((N_TOKENS, WIDTH), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "cache")


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_a_file_of_each_type_is_dequantised_as_ggufs_reference_does(kind: str, tmp_path: Path) -> None:
    numbers = write(tmp_path / "model.gguf", kind)
    model = icl.load_model(str(tmp_path / "model.gguf"))
    values: Any = model.projections("V")[0].W.parameter
    written: Any = model.projections("O")[0].W.parameter
    keys: Any = model.projections("K")[0].W.parameter
    assert torch.equal(values, torch.from_numpy(numbers["attn_v"]))
    assert torch.equal(written, torch.from_numpy(numbers["attn_output"]))
    # GGUF keeps the two dimensions that a rotation turns side by side, transformers in two halves.
    side_by_side = torch.from_numpy(numbers["attn_k"]).view(N_HEADS, -1, 2, WIDTH)
    assert torch.equal(keys, side_by_side.transpose(1, 2).reshape(WIDTH, WIDTH))
    mlp = model.wrapped.blocks[0].mlp.submodules
    for part, name in (("gate", "ffn_gate"), ("in", "ffn_up"), ("out", "ffn_down")):
        assert torch.equal(mlp[part].original_component.weight, torch.from_numpy(numbers[name]))


def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", UNREADABLE)
    with pytest.raises(icl.AssetError, match=r"expected a complete GGUF model that transformers can read .*Q8_K"):
        icl.load_model(str(tmp_path / "model.gguf"))
    assert not list((tmp_path / "cache" / "models").glob("[!.]*"))
