"""The exact patch: against the in-context pass, and against a plain Hugging Face model with it in its weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import boot, relative_error, seeds, snapshot
from hypothesis import given, settings
from toys import ARCHITECTURES
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

import icl_dual as icl
from icl_dual.models import momentum_attention, tiny_model

FAMILIES = {
    "gpt2": {"in": "mlp.c_fc", "bias": "mlp.c_proj"},
    "opt": {"in": "fc1", "bias": "fc2"},
    "xglm": {"in": "fc1", "bias": "fc2"},
    "gptneo-window": {"in": "mlp.c_fc", "bias": "mlp.c_proj"},
    "bloom": {"in": "mlp.dense_h_to_4h", "bias": "mlp.dense_4h_to_h"},
    "llama": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"},
    "qwen2": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"},
    "qwen3": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"},
    "mistral-window": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"},
    "gemma2-window": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "scale": "post_feedforward_layernorm"},
    "gemma3-window": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "scale": "post_feedforward_layernorm"},
    "olmo2": {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "scale": "post_feedforward_layernorm"},
    "neox": {"in": "mlp.dense_h_to_4h", "bias": "mlp.dense_4h_to_h"},
    "phi": {"in": "mlp.fc1", "bias": "mlp.fc2"},
    "gptj": {"in": "mlp.fc_in", "bias": "mlp.fc_out"},
    "falcon": {"in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"},
}
"""What changes in each architecture, and the module of the Hugging Face model that has the weight."""
BEFORE_4 = version("transformer-lens") < "4"
if BEFORE_4:  # which has no hooks on the norms after OLMo 2's attention and MLP
    del FAMILIES["olmo2"]

PARALLEL = ("neox", "phi", "gptj", "falcon")
QUERY = 2

ToyModel = Callable[..., icl.Model]


def dtype_of(architecture: str) -> torch.dtype:
    return torch.float32 if architecture == "xglm" else torch.float64  # its mask overflows in float64


def last_logits(model: icl.Model, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model.run(torch.tensor([tokens]))[0, -1]


def last_streams(model: icl.Model, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    streams: list[torch.Tensor] = []
    with torch.no_grad():
        model.run(torch.tensor([tokens]), on_residual=lambda layer, stream: streams.append(stream[0, -1]))
    return streams


def apply(patch: icl.ExactPatch, model: icl.Model) -> None:
    with patch.applied(model):
        pass


def write_into_weights(patch: icl.ExactPatch, hf_model: Any, modules: dict[str, str]) -> None:
    """Add a patch to a plain model's parameters, as matrices and vectors."""
    for change, path in modules.items():
        layers = [module for name, module in hf_model.named_modules() if name.endswith(f".{path}")]
        for layer, module in enumerate(layers):
            if change in patch.factors:
                left, right = (factor[layer].squeeze(-1) for factor in patch.factors[change])
                delta = torch.outer(left, right)
                module.weight.data += delta.mT if isinstance(module, Conv1D) else delta
            else:
                parameter = module.bias if change == "bias" else module.weight
                vectors = patch.bias if change == "bias" else patch.scale
                assert vectors is not None
                parameter.data += vectors[layer]


cached_model = cache(partial(tiny_model, dtype=torch.float64))


@pytest.fixture(scope="module")
def family(make_model: ToyModel) -> ToyModel:
    """One model an architecture, in float64: tests leave it as it was."""
    return cache(lambda architecture: make_model(architecture, dtype_of(architecture)))


@pytest.fixture(scope="module")
def hand_made() -> icl.Prompts:
    """Prompts of token ids, with one token for each label word."""
    return icl.Prompts(
        start=(0,),
        demonstrations=((5, 6, 7, 20), (8, 9, 21)),
        demonstration_label_lengths=(1, 1),
        queries=((10, 11, 12), (13, 14)),
        labels=((20,), (21,)),
        gold=(0, 1),
    )


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_query_alone_gives_the_in_context_stream_and_logits(
    family: ToyModel, prompts: icl.Prompts, architecture: str
) -> None:
    model = family(architecture)
    tolerance = 1e-6 if architecture == "xglm" else 1e-12
    patch = icl.build_exact_patch(model, prompts, QUERY)
    assert set(patch.norms) == set(FAMILIES[architecture])
    in_context, zero_shot = last_logits(model, patch.prompt), last_logits(model, patch.query)
    assert relative_error(zero_shot, in_context) > 0.1
    expected = last_streams(model, patch.prompt)
    with patch.applied(model):
        assert relative_error(last_logits(model, patch.query), in_context) < tolerance
        streams = last_streams(model, patch.query)
    assert all(relative_error(*pair) < tolerance for pair in zip(streams, expected, strict=True))
    assert patch.residual < tolerance
    torch.testing.assert_close(last_logits(model, patch.query), zero_shot, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_it_is_a_change_of_weights(
    family: ToyModel,
    make_hf_model: Callable[..., PreTrainedModel],
    prompts: icl.Prompts,
    architecture: str,
) -> None:
    """A plain model with the patch in its weights gives, on the query alone, its own in-context logits."""
    plain: Any = make_hf_model(architecture, dtype_of(architecture))
    patch = icl.build_exact_patch(family(architecture), prompts, QUERY)
    with torch.no_grad():
        in_context = plain(torch.tensor([patch.prompt])).logits[0, -1]
        write_into_weights(patch, plain, FAMILIES[architecture])
        patched = plain(torch.tensor([patch.query])).logits[0, -1]
    # Norms and softmax of the others compute in float32 in every precision, and scales change by a factor of 100.
    in_float64 = architecture in ("gpt2", "gptneo-window", "gptj", "bloom")
    tolerance = 1e-10 if in_float64 else 1e-3 if "scale" in FAMILIES[architecture] else 1e-5
    assert relative_error(patched, in_context) < tolerance


@pytest.mark.parametrize("architecture", PARALLEL)
def test_where_the_mlp_reads_what_attention_reads_only_what_it_writes_changes(
    family: ToyModel, prompts: icl.Prompts, architecture: str
) -> None:
    patch = icl.build_exact_patch(family(architecture), prompts)
    norms = patch.norms
    assert norms.pop("in").max() < 1e-12
    (shift,) = norms.values()
    assert shift.min() > 0.1


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_it_is_exact_for_any_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return tuple(torch.randint(0, 257, (length,), generator=generator).tolist())

    model = cached_model(seed % 3)
    prompts = icl.Prompts(
        start=(0,) * (seed % 2),
        demonstrations=(tokens(9), tokens(9)),
        demonstration_label_lengths=(1, 1),
        queries=(tokens(6),),
        zero_shot_queries=(tokens(6),) if seed % 5 == 0 else (),  # the texts may have other tokens without a context
        labels=((1,), (2,)),
        gold=(0,),
    )
    patch = icl.build_exact_patch(model, prompts)
    with patch.applied(model):
        patched = last_logits(model, patch.query)
    assert relative_error(patched, last_logits(model, patch.prompt)) < 1e-10


def test_a_change_has_rank_one_and_the_norm_of_its_matrix(hand_made: icl.Prompts) -> None:
    patch = icl.build_exact_patch(tiny_model(), hand_made)
    dense = {part: (left @ right.mT).double() for part, (left, right) in patch.factors.items()}
    assert all((torch.linalg.matrix_rank(matrices, rtol=1e-5) == 1).all() for matrices in dense.values())
    assert patch.rank == 1
    for part, matrices in dense.items():
        torch.testing.assert_close(patch.norms[part], matrices.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    total = sum(matrices.square().sum() for matrices in dense.values())
    assert patch.norm == pytest.approx(float(total) ** 0.5, rel=1e-6)


def test_no_demonstrations_are_no_change(hand_made: icl.Prompts) -> None:
    patch = icl.build_exact_patch(tiny_model(), hand_made.zero_shot())
    assert patch.rank == 0
    assert patch.norm == 0


def test_it_costs_two_passes(hand_made: icl.Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = tiny_model(), list[int]()
    forward = model.backend.forward

    def counted(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return forward(tokens, positions)

    monkeypatch.setattr(model.backend, "forward", counted)
    patch = icl.build_exact_patch(model, hand_made)
    assert lengths == [len(patch.prompt), len(patch.query)]


@pytest.mark.parametrize("arithmetic", [None, torch.float32])
def test_half_precision_weights_stay_as_they_are(hand_made: icl.Prompts, arithmetic: torch.dtype | None) -> None:
    model = tiny_model(dtype=torch.bfloat16, arithmetic=arithmetic)
    before = snapshot(model)
    patch = icl.build_exact_patch(model, hand_made)
    assert {factor.dtype for low_rank in patch.factors.values() for factor in low_rank} == {torch.float32}
    assert patch.precision == model.precision
    in_context = last_logits(model, patch.prompt)
    with patch.applied(model):
        assert all(torch.equal(*pair) for pair in zip(snapshot(model), before, strict=True))
        error = relative_error(last_logits(model, patch.query).float(), in_context.float())
    assert error < (0.05 if arithmetic is None else 1e-5)
    assert relative_error(last_logits(model, patch.query).float(), in_context.float()) > 0.2


def test_the_model_is_as_it_was_also_after_an_error(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    before, fingerprint = snapshot(model), model.fingerprint()
    patch = icl.build_exact_patch(model, hand_made)
    with patch.applied(model):
        assert model.fingerprint() != fingerprint
    with pytest.raises(KeyError), patch.applied(model):
        raise KeyError
    assert model.fingerprint() == fingerprint
    assert model.mlp_changes == ()
    assert all(torch.equal(*pair) for pair in zip(snapshot(model), before, strict=True))


def test_it_saves_and_loads(hand_made: icl.Prompts, tmp_path: Path) -> None:
    model = tiny_model()
    patch = icl.build_exact_patch(model, hand_made, -1)
    patch.save(tmp_path / "patch")
    loaded = icl.ExactPatch.load(tmp_path / "patch")
    assert loaded == patch
    assert (loaded.query, loaded.position, loaded.residual) == ((0, 13, 14), 2, patch.residual)
    with patch.applied(model):
        expected = last_logits(model, patch.query)
    with loaded.applied(model):
        assert torch.equal(last_logits(model, patch.query), expected)


def test_a_capture_of_the_query_alone_has_the_in_context_label_scores(hand_made: icl.Prompts) -> None:
    """Captures run the start token before the rest: a part of the query at its own positions fits the patch."""
    model = tiny_model(dtype=torch.float64)
    prompts = hand_made.first(1)
    patch = icl.build_exact_patch(model, prompts)
    in_context = icl.capture(model, prompts)
    with patch.applied(model):
        patched = icl.capture(model, prompts.zero_shot())
    torch.testing.assert_close(patched.label_log_probs, in_context.label_log_probs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        ([[0, 10, 11, 13]], None),
        ([[0, 10, 11, 12], [0, 13, 14, 12]], None),
        ([[0, 10, 11, 12, 20]], None),
        ([[0, 10, 11, 12]], [0, 2, 3, 4]),
        ([[10, 11, 12]], None),
        ([[11, 12]], [2, 3]),
        ([[0, 12]], [0, 3]),
    ],
    ids=[
        "another query",
        "another row",
        "a longer one",
        "another position",
        "without the start token",
        "without the tokens before it",
        "with a gap",
    ],
)
def test_other_queries_and_positions_are_refused(
    hand_made: icl.Prompts, tokens: list[list[int]], positions: list[int] | None
) -> None:
    model = tiny_model()
    patch = icl.build_exact_patch(model, hand_made)
    at = None if positions is None else torch.tensor(positions)
    with (
        patch.applied(model),
        pytest.raises(ValueError, match=r"expected the query that the patch was built for, .*got"),
    ):
        model.run(torch.tensor(tokens), positions=at)


def test_other_models_weights_and_precisions_are_refused(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    patch = icl.build_exact_patch(model, hand_made)
    with pytest.raises(ValueError, match="expected a patch of 'other', got one of 'tiny'"):
        apply(patch, icl.Model(model.wrapped, name="other"))
    with pytest.raises(
        ValueError, match=r"expected a patch of 'tiny' in the model's precision, float64, got .* float32"
    ):
        apply(patch, tiny_model(dtype=torch.float64))
    with pytest.raises(ValueError, match="expected a patch of these weights of 'tiny'"):
        apply(patch, tiny_model(seed=1))
    with patch.applied(model), pytest.raises(ValueError, match="is a delta or another patch applied"):
        apply(patch, model)


def test_a_zero_input_of_an_mlp_is_refused(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    model.wrapped.blocks[1].ln2.original_component.weight.data.zero_()
    with pytest.raises(ValueError, match="layer 1: expected an input of the MLP other than zero, got one of norm 0"):
        icl.build_exact_patch(model, hand_made)


def test_a_zero_hidden_activation_is_refused_where_the_down_projection_changes(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    model.wrapped.blocks[0].mlp.gate.original_component.weight.data.zero_()
    with pytest.raises(ValueError, match="layer 0: expected an input of the down projection other than zero"):
        icl.build_exact_patch(model, hand_made)


def test_an_mlp_that_writes_zeros_is_refused_where_a_norm_follows(make_model: ToyModel, prompts: icl.Prompts) -> None:
    model = make_model("gemma3-window")
    model.wrapped.blocks[2].mlp.out.original_component.weight.data[5] = 0
    with pytest.raises(ValueError, match="layer 2: expected what the MLP writes to be other than zero in every dim"):
        icl.build_exact_patch(model, prompts)


def test_a_run_in_parts_is_refused_where_a_scale_changes(make_model: ToyModel, prompts: icl.Prompts) -> None:
    model = make_model("gemma3-window")
    patch, alone = icl.build_exact_patch(model, prompts), prompts.zero_shot()
    tokens = torch.tensor([patch.query])
    with patch.applied(model):
        model.run(tokens)
        with pytest.raises(ValueError, match=r"expected all \d+ tokens of the query in one run of one row, got 1 at"):
            model.run(tokens[:, :-1])
        with pytest.raises(ValueError, match=r"expected all \d+ tokens of the query in one run of one row, got 2 at"):
            model.run(tokens.repeat(2, 1))
        with pytest.raises(ValueError, match=r"expected (all \d+ tokens of )?the query"):
            icl.capture(model, alone, progress=False)


def test_mixtures_of_experts_are_refused(models_by_architecture: ToyModel, prompts: icl.Prompts) -> None:
    with pytest.raises(
        icl.UnsupportedModelError, match=r"GptOss.*layer 0: .*got a mixture of experts: the query alone may"
    ):
        icl.build_exact_patch(models_by_architecture("gptoss-window"), prompts)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith("hooked-")])
def test_a_hooked_transformer_is_refused(
    models_by_architecture: ToyModel, prompts: icl.Prompts, architecture: str
) -> None:
    with pytest.raises(icl.UnsupportedModelError, match=r"expected a TransformerBridge.*got a HookedTransformer"):
        icl.build_exact_patch(models_by_architecture(architecture), prompts)


NO_SUMS: dict[str, Callable[[], PreTrainedModel]] = {
    "Bloom": lambda: BloomForCausalLM(  # its norms' outputs are what the blocks add to
        BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True)
    ),
    "Granite": lambda: GraniteForCausalLM(  # it scales what is added
        GraniteConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            residual_multiplier=0.5,
        )
    ),
}


@pytest.mark.parametrize("architecture", NO_SUMS)
def test_blocks_that_are_no_sums_are_refused(
    tokenizer: PreTrainedTokenizerFast, prompts: icl.Prompts, architecture: str
) -> None:
    model = icl.Model(boot(NO_SUMS[architecture]().eval(), tokenizer))
    with pytest.raises(icl.UnsupportedModelError, match="layer 0: expected a block that adds what attention and MLP"):
        icl.build_exact_patch(model, prompts)


@pytest.mark.skipif(not BEFORE_4, reason="transformer-lens 4 has hooks on the norms after the block's parts")
def test_olmo2_is_refused_where_its_norms_have_no_hooks(family: ToyModel, prompts: icl.Prompts) -> None:
    with pytest.raises(icl.UnsupportedModelError, match="layer 0: expected a block that adds what attention and MLP"):
        icl.build_exact_patch(family("olmo2"), prompts)


def test_layers_with_mlps_of_different_forms_are_refused(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    model.wrapped.blocks[1].mlp.out.original_component.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(
        icl.UnsupportedModelError, match=r"expected MLPs of one form, got .* in layer 0 and .* in layer 1"
    ):
        icl.build_exact_patch(model, hand_made)


def test_queries_that_are_not_there_and_prompts_that_do_not_fit_are_refused(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    with pytest.raises(IndexError, match="expected query from 0 to 1, got 2"):
        icl.build_exact_patch(model, hand_made, 2)
    with pytest.raises(
        icl.PromptError, match="expected prompts of at most 512 tokens, the context of tiny, got one of"
    ):
        icl.build_exact_patch(model, replace(hand_made, queries=((7,) * 603, (8,))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_that_is_not_exact_where_it_is_applied_is_refused(hand_made: icl.Prompts, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    patch = icl.build_exact_patch(model, hand_made)
    apply(patch, model)
    fingerprint = model.fingerprint()
    for stream in (patch.stream * 1.5, patch.stream.index_fill(0, torch.tensor([1]), 0)):
        with pytest.raises(ValueError, match=r"expected a patch that gives the in-context residual stream, got rel"):
            apply(replace(patch, stream=stream), model)
    assert model.fingerprint() == fingerprint
    assert model.mlp_changes == ()


def test_a_patch_is_refused_in_a_model_with_other_hooks(hand_made: icl.Prompts) -> None:
    model = tiny_model()
    patch = icl.build_exact_patch(model, hand_made)
    model.wrapped.add_hook("blocks.0.attn.hook_out", lambda output, hook: output * 0.5)
    with pytest.raises(ValueError, match=r"expected a patch that gives the in-context .*: the model has other hooks"):
        apply(patch, model)


def test_momentum_inside_the_block_is_refused(hand_made: icl.Prompts) -> None:
    model = tiny_model(dtype=torch.float64)
    patch = icl.build_exact_patch(model, hand_made)
    with (
        patch.applied(model),
        momentum_attention(model, 0.5),
        pytest.raises(
            ValueError, match=r"expected a run of 'tiny', which the patch was built for, got one of 'tiny [+]"
        ),
    ):
        model.run(torch.tensor([patch.query]))
    with momentum_attention(model, 0.5):
        patch = icl.build_exact_patch(model, hand_made)
        in_context = last_logits(model, patch.prompt)
        with patch.applied(model):
            assert relative_error(last_logits(model, patch.query), in_context) < 1e-12


def test_the_first_capture_may_be_inside_the_block(hand_made: icl.Prompts) -> None:
    """The check of the pass, which runs other prompts, comes with the first capture."""
    model = tiny_model(dtype=torch.float64)
    prompts = hand_made.first(1)
    patch = icl.build_exact_patch(model, prompts)
    with patch.applied(model):
        assert model.pass_residual is None
        patched = icl.capture(model, prompts.zero_shot())
        assert model.mlp_changes
        with pytest.raises(ValueError, match="expected the query that the patch was built for"):
            model.run(torch.tensor([[0, 13, 14]]))
    expected = icl.capture(model, prompts).label_log_probs
    torch.testing.assert_close(patched.label_log_probs, expected, atol=1e-6, rtol=1e-6)


def test_another_change_of_weights_stays_below_the_patch(hand_made: icl.Prompts) -> None:
    """A delta in half precision runs beside the weights, too: a patch that was built on it is exact on it."""
    model = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32)
    delta = icl.finetune(model, hand_made, lr=0.1, progress=False)
    with delta.applied(model):
        patch = icl.build_exact_patch(model, hand_made)
        in_context = last_logits(model, patch.prompt)
        with patch.applied(model):
            assert relative_error(last_logits(model, patch.query), in_context) < 1e-5
    with pytest.raises(ValueError, match="expected a patch of these weights"):
        apply(patch, model)
