import copy
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from helpers import past_sum, some_eta
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toys import ARCHITECTURES, BRIDGED
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import icl_dual as icl
from icl_dual.models import WORKS_WITH, Control, ProjectionName, Weight
from icl_dual.models.momentum_gpt2 import MomentumConfig, MomentumForCausalLM


def boot(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.config.architectures = [type(hf_model).__name__]
    return TransformerBridge.boot_transformers("tiny/x", hf_model=hf_model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("eta", [0.0, 0.6, "learned"])
def test_a_decoder_trained_with_momentum_loads_with_it(
    eta: float | str, task: icl.Task, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained: Any = MomentumForCausalLM(
            MomentumConfig(
                vocab_size=300, n_positions=512, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, eta=eta
            )
        ).eval()
    if eta == "learned":
        for layer, block in enumerate(trained.transformer.h):
            block.attn.eta_logit.data.copy_(some_eta()[layer].clamp_min(0.01).logit())
    trained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = icl.load_model(str(tmp_path))
    assert (model.momentum is None) == (eta == 0.0)
    tokens = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.run(tokens), trained(tokens).logits, atol=1e-4, rtol=1e-4)
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(4))
    zsl, in_context = (
        icl.capture(model, one, fields=icl.DECOMPOSE_FIELDS, progress=False) for one in (prompts.zero_shot(), prompts)
    )
    assert icl.decompose(model, zero_shot=zsl, in_context=in_context).residual < 1e-5
    if eta == 0.0:
        with icl.momentum_attention(model, 0.6):
            assert (model.run(tokens) - trained(tokens).logits).abs().max() > 0.1


def test_a_local_folder_loads_with_its_hash(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    hf_model = make_hf_model("llama")
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = icl.load_model(str(tmp_path))
    assert model.provenance.startswith("sha256:")
    assert (model.n_layers, model.n_heads, model.n_key_value_heads, model.d_head) == (3, 4, 2, 8)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.run(ids), hf_model(ids).logits)
    assert icl.load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(icl.UnsupportedModelError, match="expected a folder with a decoder-only language model"):
        icl.load_model(str(tmp_path))


def test_reading_some_positions_gives_their_logits(llama: icl.Model) -> None:
    ids = torch.arange(12).view(2, 6)
    read = torch.tensor([[5, 0], [3, 3]])
    with torch.no_grad():
        whole, some = llama.run(ids), llama.run(ids, read=read)
    torch.testing.assert_close(some, whole[torch.arange(2)[:, None], read])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries_alone_are_those_of_the_whole_attention(
    models_by_architecture: Callable[[str], icl.Model], architecture: str
) -> None:
    alone: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    model = models_by_architecture(architecture)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        model.run(ids, on_query=lambda layer, q: alone.append(q))
        model.run(ids, on_attention=lambda layer, attention: whole.append(attention.q_pre_rotary))
    assert len(alone) == model.n_layers
    assert all(torch.equal(*pair) for pair in zip(alone, whole, strict=True))


def test_z_can_be_replaced_and_hooks_come_off_also_after_an_error(llama: icl.Model) -> None:
    ids = torch.arange(6)[None]
    with torch.no_grad():
        plain = llama.run(ids)
        same = llama.run(ids, on_attention=lambda layer, attention: attention.z.clone())
        zeroed = llama.run(ids, on_attention=lambda layer, attention: torch.zeros_like(attention.z))

        def fail(layer: int, attention) -> None:
            raise KeyError(layer)

        with pytest.raises(KeyError):
            llama.run(ids, on_attention=fail)
        torch.testing.assert_close(same, plain)
        assert (zeroed - plain).abs().max() > 0.1
        torch.testing.assert_close(llama.run(ids), plain)


def test_start_token_and_separator_are_the_models_own(models_by_architecture: Callable[[str], icl.Model]) -> None:
    llama, xglm = models_by_architecture("llama"), models_by_architecture("xglm")
    assert llama.start_tokens == [llama.tokenizer.bos_token_id]
    assert llama.separator == llama.encode("\n")
    assert xglm.separator == [xglm.tokenizer.eos_token_id]


def test_processed_weights_are_refused(make_model: Callable[..., icl.Model]) -> None:
    bridge = make_model("gpt2").wrapped
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(icl.UnsupportedModelError, match="expected raw weights, got a model in compatibility mode"):
        icl.Model(bridge)


def test_models_that_are_no_decoders_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bert = BertForMaskedLM(
        BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(icl.UnsupportedModelError, match="BertForMaskedLM: expected a decoder-only causal"):
        icl.Model(boot(bert, tokenizer))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(icl.UnsupportedModelError, match="T5ForConditionalGeneration: expected a decoder-only causal"):
        icl.Model(boot(t5, tokenizer))


def test_something_that_is_no_bridge_is_refused(make_hf_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(icl.UnsupportedModelError, match=r"expected a TransformerBridge .*, got Llama"):
        icl.Model(cast(Any, make_hf_model("llama")))


@pytest.mark.parametrize("damage", ["truncated", "a layer missing"])
def test_damaged_weights_are_refused_never_made_up(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str
) -> None:
    make_hf_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        kept = {name: tensor for name, tensor in load_file(weights).items() if ".layers.1." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(icl.AssetError, match=r"expected complete weights|got none for 9 of them"):
        icl.load_model(str(tmp_path))


def test_a_training_model_comes_back_training(make_model: Callable[..., icl.Model], prompts: icl.Prompts) -> None:
    bridge = make_model("llama").wrapped
    bridge.train()
    icl.capture(icl.Model(bridge, name="llama"), prompts, progress=False)
    assert bridge.training


ROOT = Path(__file__).parents[2]
NO_ROTATION = ("gpt2", "gptneo-window", "opt", "xglm", "bloom")
NORM = re.compile(r"norm|\.ln_")


def weights(model: icl.Model) -> dict[str, torch.Tensor]:
    """A model's weights, under the names that they have without a bridge."""
    named = {name.replace("._original_component", ""): p for name, p in model.wrapped.original_model.named_parameters()}
    qkv, output = ("c_attn", "c_proj") if model.architecture == "GPT2LMHeadModel" else ("query_key_value", "dense")
    found: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        *within, part, kind = name.split(".")
        if ".".join([*within, "qkv", kind]) in named:  # beside what the bridge has split out of it
            if part not in ("qkv", "o"):
                continue
            name = ".".join([*within, qkv if part == "qkv" else output, kind])
        found[name] = parameter.detach()
    return found


def plain_model(model: icl.Model, seed: int = 0) -> PreTrainedModel:
    """A model of the same class and configuration, as anyone would construct it."""
    config: Any = copy.deepcopy(model.wrapped.original_model.config)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model.wrapped.original_model)(config).eval()


def in_blocks(name: str) -> bool:
    """Whether a weight belongs to a layer's attention or MLP, by its name."""
    return bool(re.search(r"\.\d+\.", name)) and not NORM.search(name)


def snapshot(model: icl.Model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.wrapped.original_model.parameters()]


@pytest.fixture(scope="module")
def control_of(models_by_architecture: Callable[[str], icl.Model]) -> Callable[[str, Any], icl.Model]:
    """One shared control of each kind an architecture, by seed 3."""
    made: dict[tuple[str, Any], icl.Model] = {}

    def get(architecture: str, control: Any) -> icl.Model:
        if (architecture, control) not in made:
            made[architecture, control] = icl.control_model(models_by_architecture(architecture), control, seed=3)
        return made[architecture, control]

    return get


@pytest.mark.parametrize("architecture", BRIDGED)
def test_untrained_weights_are_distributed_as_a_plainly_constructed_models(
    control_of: Callable[..., icl.Model], architecture: str
) -> None:
    control = control_of(architecture, "untrained")
    expected = {name: parameter.detach() for name, parameter in plain_model(control).named_parameters()}
    got = weights(control)
    added = {name: got.pop(name) for name in got.keys() - expected.keys()}  # by the bridge of transformer-lens 3
    assert added.keys() <= {"lm_head.bias"}
    assert not any(bias.any() for bias in added.values())
    assert got.keys() == expected.keys()
    for name, plain in expected.items():
        if plain.min() == plain.max():
            assert torch.equal(got[name], plain), name
            continue
        error = 1 / math.sqrt(plain.numel())  # of the ratio of two deviations, and of the mean, for normal draws
        assert got[name].std() / plain.std() == pytest.approx(1, abs=4.5 * error), name
        assert abs((got[name].mean() - plain.mean()) / plain.std()) < 4.5 * math.sqrt(2) * error, name
        assert torch.equal(got[name] == 0, plain == 0), name  # padding's row of an embedding
        assert not torch.equal(got[name], plain), name


@pytest.mark.parametrize("control", get_args(Control))
@pytest.mark.parametrize("architecture", BRIDGED)
def test_a_control_runs_as_a_plain_model_of_its_weights(
    control_of: Callable[..., icl.Model], architecture: str, control: Control
) -> None:
    model = control_of(architecture, control)
    twin, own = plain_model(model), weights(model)
    ids = torch.arange(120).view(2, 60)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(own[name])
        expected = cast(Any, twin)(ids).logits
        torch.testing.assert_close(model.run(ids), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("architecture", BRIDGED)
def test_random_blocks_keep_embeddings_and_norms_and_draw_all_else_as_untrained(
    models_by_architecture: Callable[[str], icl.Model], control_of: Callable[..., icl.Model], architecture: str
) -> None:
    model = models_by_architecture(architecture)
    trained = weights(model)
    got, untrained = (weights(control_of(architecture, kind)) for kind in ("random-blocks", "untrained"))
    assert got.keys() == trained.keys()
    assert {in_blocks(name) for name in got} == {True, False}
    for name, tensor in got.items():
        if in_blocks(name):
            assert torch.equal(tensor, untrained[name]), name
            assert not torch.equal(tensor, trained[name]), name
        else:
            assert tensor.data_ptr() == trained[name].data_ptr(), name
            assert torch.equal(tensor, trained[name]), name
    for kind in get_args(ProjectionName):
        both = (one.projections(kind) for one in (control_of(architecture, "random-blocks"), model))
        assert not any(torch.equal(ours.matrix, others.matrix) for ours, others in zip(*both, strict=True))


@pytest.mark.parametrize("architecture", BRIDGED)
def test_controls_tie_what_the_trained_model_ties(
    models_by_architecture: Callable[[str], icl.Model], control_of: Callable[..., icl.Model], architecture: str
) -> None:
    def tied(model: icl.Model) -> bool:
        original: Any = model.wrapped.original_model
        return original.get_output_embeddings().weight is original.get_input_embeddings().weight

    trained = tied(models_by_architecture(architecture))
    assert [tied(control_of(architecture, kind)) for kind in get_args(Control)] == [trained, trained]


def test_models_tested_as_controls_are_some_tied_and_some_not(
    models_by_architecture: Callable[[str], icl.Model],
) -> None:
    configs: list[Any] = [models_by_architecture(name).wrapped.original_model.config for name in BRIDGED]
    assert {bool(config.tie_word_embeddings) for config in configs} == {True, False}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptoss-window"])
def test_a_controls_draw_is_its_seeds(
    models_by_architecture: Callable[[str], icl.Model], control_of: Callable[..., icl.Model], architecture: str
) -> None:
    first = control_of(architecture, "untrained")
    again, other = (icl.control_model(models_by_architecture(architecture), "untrained", seed=seed) for seed in (3, 4))
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(again)[name]), name
        if tensor.min() < tensor.max():
            assert not torch.equal(tensor, weights(other)[name]), name
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_drawing_a_control_touches_no_random_state_and_no_trained_weight(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    model = make_model("llama")
    before, fingerprint = snapshot(model), model.fingerprint()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    controls = [icl.control_model(model, kind, seed=1) for kind in get_args(Control)]
    assert torch.equal(torch.get_rng_state(), state)
    for control in controls:
        own = snapshot(control)
        delta = icl.finetune(control, prompts, lr=0.05, progress=False)
        assert (delta.W_V != 0).any()
        with delta.applied(control):
            assert model.fingerprint() == fingerprint
        assert all(map(torch.equal, snapshot(control), own))
    assert all(map(torch.equal, snapshot(model), before))
    assert model.fingerprint() == fingerprint


def test_a_control_says_what_it_is(control_of: Callable[..., icl.Model], llama: icl.Model) -> None:
    control = control_of("llama", "random-blocks")
    assert control.name == "llama (random-blocks, seed 3)"
    assert control.provenance == f"{llama.provenance}, random-blocks, seed 3"
    assert control.fingerprint() != llama.fingerprint()


def test_a_control_has_its_models_dtype(make_model: Callable[..., icl.Model]) -> None:
    control = icl.control_model(make_model("llama", torch.bfloat16), "random-blocks", seed=0)
    assert {parameter.dtype for parameter in control.parameters()} == {torch.bfloat16}
    assert control.fingerprint().startswith("bfloat16:")


@pytest.mark.parametrize("control", get_args(Control))
def test_a_weight_that_its_class_does_not_initialise_is_refused(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, control: Control
) -> None:
    class Gated(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.gate = torch.nn.Parameter(torch.ones(3))

    Gated.__name__ = "LlamaForCausalLM"
    gated = Gated(cast(LlamaConfig, make_hf_model("llama").config)).eval()
    with pytest.raises(
        icl.UnsupportedModelError, match=r"gated: .* initialise all its weights, got none for 'gate' \(1 in all\)"
    ):
        icl.control_model(icl.Model(boot(gated, tokenizer), name="gated"), control, seed=0)


def test_a_matrix_outside_of_attention_and_mlp_is_refused_between_random_blocks(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    class Wired(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            cast(Any, self.model.layers[1]).bypass = torch.nn.Linear(4, 4)

    Wired.__name__ = "LlamaForCausalLM"
    wired = Wired(cast(LlamaConfig, make_hf_model("llama").config)).eval()
    model = icl.Model(boot(wired, tokenizer), name="wired")
    with pytest.raises(icl.UnsupportedModelError, match=r"wired .* layer 1: expected attention and MLP .*bypass"):
        icl.control_model(model, "random-blocks", seed=0)
    assert icl.control_model(model, "untrained", seed=0).fingerprint() != model.fingerprint()


def test_a_model_that_is_not_transformers_own_has_no_untrained_control(
    make_model: Callable[..., icl.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    monkeypatch.setattr(model.backend, "original", torch.nn.Linear(2, 2))
    with pytest.raises(icl.UnsupportedModelError, match=r"expected a transformers model, .* got Linear"):
        icl.control_model(model, "untrained", seed=0)


def test_an_unknown_control_is_refused(llama: icl.Model) -> None:
    unchecked: Any = getattr(icl.control_model, "__wrapped__", icl.control_model)
    with pytest.raises(
        ValueError, match=r"expected control as one of \('untrained', 'random-blocks'\), got 'shuffled'"
    ):
        unchecked(llama, "shuffled", seed=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_residual_unembeds_to_the_logits(
    make_model: Callable[..., icl.Model], models_by_architecture: Callable[[str], icl.Model], architecture: str
) -> None:
    capped = architecture == "gemma2-window"
    model = make_model(architecture) if capped else models_by_architecture(architecture)
    residuals: list[torch.Tensor] = []
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        if capped:
            model.wrapped.original_model.get_output_embeddings().weight.mul_(30)
        model.run(ids, on_residual=lambda layer, residual: residuals.append(residual))
        logits = model.run(ids)
        assert len(residuals) == model.n_layers
        torch.testing.assert_close(model.unembed(residuals[-1]), logits)
        assert not torch.allclose(model.unembed(residuals[-2]), logits, atol=0.1)
        if capped:
            plain = model.wrapped.unembed(model.wrapped.ln_final(residuals[-1]))
            assert logits.abs().max() <= 30 < plain.abs().max()


def test_a_residual_can_be_replaced(llama: icl.Model) -> None:
    """The first layer's output of other tokens: all that follows is then the other tokens' run."""
    ids, others = torch.arange(6)[None], torch.arange(20, 26)[None]
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        expected = llama.run(others, on_residual=lambda layer, residual: kept.append(residual.clone()))
        got = llama.run(ids, on_residual=lambda layer, residual: kept[0] if layer == 0 else None)
        torch.testing.assert_close(got, expected)
        assert not torch.allclose(llama.run(ids), expected, atol=0.1)


def keys_of(model: icl.Model, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each layer's keys as `on_key` shows them, and as they are scored."""
    content: list[torch.Tensor] = []
    scored: list[torch.Tensor] = []
    with torch.no_grad():
        model.run(ids, on_key=lambda layer, k: content.append(k))
        model.run(ids, on_attention=lambda layer, attention: scored.append(attention.k))
    assert len(content) == len(scored) == model.n_layers
    return content, scored


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_alone_are_those_scored_but_for_rotation(
    models_by_architecture: Callable[[str], icl.Model], architecture: str
) -> None:
    for content, scored in zip(*keys_of(models_by_architecture(architecture), torch.arange(6)[None]), strict=True):
        assert content.shape == scored.shape
        stretch = scored.norm(dim=-1) / content.norm(dim=-1)  # YaRN's rotation makes all keys longer
        assert (stretch[0, 0, 0].item() == pytest.approx(1)) == (not architecture.endswith("gptoss-window"))
        torch.testing.assert_close(stretch, stretch[0, 0, 0].expand_as(stretch))
        torch.testing.assert_close(content[:, 0] * stretch[0, 0, 0], scored[:, 0])  # position 0 is not turned
        assert torch.allclose(content, scored, atol=1e-5) == (architecture.removeprefix("hooked-") in NO_ROTATION)


@pytest.mark.parametrize(("architecture", "module"), [("llama", "k_proj"), ("qwen3", "k_norm"), ("neox", None)])
def test_keys_alone_are_what_the_bare_model_projects_and_norms(
    models_by_architecture: Callable[[str], icl.Model],
    make_hf_model: Callable[..., PreTrainedModel],
    architecture: str,
    module: str | None,
) -> None:
    model, twin = models_by_architecture(architecture), make_hf_model(architecture)
    name = module or "query_key_value"
    found: list[torch.Tensor] = []
    for path, part in twin.named_modules():
        if path.endswith(name):
            part.register_forward_hook(lambda module, args, output: found.append(output))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        cast(Any, twin)(ids)
    content, _ = keys_of(model, ids)
    for got, expected in zip(content, found, strict=True):
        if module is None:  # a head's query, key and value lie side by side
            expected = expected.view(1, 6, model.n_heads, 3, model.d_head)[:, :, :, 1]
        torch.testing.assert_close(got, expected.reshape(got.shape))


def test_another_transformer_lens_is_refused() -> None:
    versions = ["2.16.1", "3.8.1", "5.0.0"]
    program = f"""
import importlib.metadata as metadata
installed = metadata.version
for got in {versions}:
    metadata.version = lambda name: got if name == "transformer-lens" else installed(name)
    try:
        import icl_dual
    except ImportError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        f"expected transformer-lens >=3.9,<5, got transformer-lens {version}: pip install 'transformer-lens>=3.9,<5'"
        for version in versions
    ]


def test_the_range_is_the_packages_own() -> None:
    (line,) = re.findall(r'"transformer-lens(.*?)"', (ROOT / "pyproject.toml").read_text())
    assert line == WORKS_WITH


def test_the_second_environment_is_the_first_with_another_transformer_lens() -> None:
    first, second = (
        [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("constraints.txt", "constraints-tl3.txt")
    )
    assert set(second) - set(first) == {"transformer-lens==3.9.0", "better-abc==0.0.3"}
    assert set(first) - set(second) == {"transformer-lens==4.3.0"}


LAYOUTS = [
    ("d_out d_in", "d_out d_in", 2),
    ("d_in d_out", "d_out d_in", 2),
    ("head d_in d_head", "(head d_head) d_in", 3),
    ("head d_head d_out", "d_out (head d_head)", 3),
    ("head d_head", "(head d_head)", 2),
    ("d_out", "d_out", 1),
]


@given(st.sampled_from(LAYOUTS), st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_a_matrix_is_stored_as_it_was_laid_out(layout: tuple[str, str, int], sizes: list[int]) -> None:
    axes, written, n_axes = layout
    parameter = torch.nn.Parameter(torch.randn(sizes[:n_axes]))
    weight = Weight(parameter, axes, written)
    matrix = weight.to_matrix(parameter)
    assert matrix.ndim == 2 - (axes in ("head d_head", "d_out"))
    assert torch.equal(weight.from_matrix(matrix), parameter)


def test_momentum_is_of_the_passs_own_values_and_comes_after_a_replaced_z(llama: icl.Model) -> None:
    ids, eta = torch.arange(12).view(2, 6), some_eta()
    W_O, _ = llama.output_projections()
    values: list[torch.Tensor] = []
    softmax: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def show(layer: int, attention: Any) -> torch.Tensor:
        values.append(attention.v.repeat_interleave(2, dim=2))
        softmax.append(attention.z.clone())
        return torch.ones_like(attention.z)

    with icl.momentum_attention(llama, eta, layers=[0, 1]), torch.no_grad():
        llama.run(ids, on_attention=show, on_output=lambda layer, output: outputs.append(output))
    with torch.no_grad():
        llama.run(ids, on_attention=show)
    torch.testing.assert_close(softmax[0], softmax[3])  # the first layer's, before anything is added
    for layer in range(3):
        added = past_sum(values[layer], eta[layer] if layer < 2 else torch.zeros(4))
        expected = torch.einsum("bphd,hdm->bpm", 1 + added, W_O[layer])
        torch.testing.assert_close(outputs[layer], expected)


def test_the_model_comes_back_from_momentum_as_it_was(
    make_model: Callable[..., icl.Model], prompts: icl.Prompts
) -> None:
    model = make_model("llama")
    before, ids = snapshot(model), torch.arange(6)[None]
    icl.capture(model, prompts, fields=(), progress=False)
    was = model.name, model.pass_residual, model.fingerprint()
    with torch.no_grad():
        plain = model.run(ids)
        with icl.momentum_attention(model, 0.5) as within:
            assert within is model
            assert model.pass_residual is None
            assert not torch.allclose(model.run(ids), plain, atol=0.1)
            assert model.fingerprint() != was[2]
            icl.capture(model, prompts, fields=(), progress=False)
            assert model.pass_residual not in (None, was[1])
        with pytest.raises(KeyError), icl.momentum_attention(model, 0.5):
            raise KeyError
        assert torch.equal(model.run(ids), plain)
    assert (model.name, model.pass_residual, model.fingerprint()) == was
    assert model.momentum is None
    assert all(map(torch.equal, snapshot(model), before))
    assert not any(point.fwd_hooks for point in model.wrapped.hook_dict.values())


def test_momentum_of_zero_is_the_model_itself_bit_for_bit(llama: icl.Model, prompts: icl.Prompts) -> None:
    plain = icl.capture(llama, prompts, progress=False)
    with icl.momentum_attention(llama, 0):
        got = icl.capture(llama, prompts, progress=False)
    for name in ("attn_out", "label_log_probs", "context_scores"):
        assert torch.equal(getattr(got, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("eta", "layers", "words"),
    [
        (0.3, None, "η=0.3"),
        (0, None, "η=0"),
        (torch.tensor([0.1, 0.0, 0.6, 0.2], dtype=torch.float64), None, "η=0 to 0.6"),
        (0.25, [2], "η=0.25 in layer 2"),
        (torch.tensor([[0.5] * 4, [0.5] * 4, [0.0] * 4]), None, "η=0.5 in layers 0-1"),
        (0.5, [2, 0], "η=0.5 in layers 0, 2"),
    ],
)
def test_a_model_is_named_by_its_momentum(llama: icl.Model, eta: Any, layers: Any, words: str) -> None:
    with icl.momentum_attention(llama, eta, layers=layers) as model:
        assert model.name == f"llama + momentum {words}"
        assert f"momentum {words}, dtype" in repr(model)
        named = icl.control_model(model, "untrained", seed=1) if words == "η=0.3" else None
    if named is not None:
        assert named.name == "llama + momentum η=0.3 (untrained, seed 1)"
        assert named.momentum is not None
        assert (named.momentum == 0.3).all()


@pytest.mark.parametrize(
    ("eta", "layers", "message"),
    [
        (1.0, None, "expected eta from 0 to below 1, got 1"),
        (-0.1, None, "expected eta from 0 to below 1, got -0.1"),
        (float("nan"), None, "expected eta from 0 to below 1, got nan"),
        (torch.zeros(3), None, r"\[head\] = \[4\] or \[layer head\] = \[3, 4\], got shape \[3\]"),
        (0.1, [0, 3], r"expected layers from 0 to 2, got \[0, 3\]"),
        (0.1, [-1], r"expected layers from 0 to 2, got \[-1\]"),
    ],
)
def test_momentum_that_is_none_is_refused(llama: icl.Model, eta: Any, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), icl.momentum_attention(llama, eta, layers=layers):
        pass
    if layers is None:
        with pytest.raises(ValueError, match=message):
            icl.Model(llama.backend, momentum=eta)
    assert (llama.name, llama.momentum) == ("llama", None)


def test_a_model_may_have_momentum_of_its_own_and_no_second(llama: icl.Model) -> None:
    ids, eta = torch.arange(6)[None], some_eta()
    own = icl.Model(llama.backend, name="own", momentum=eta)
    with torch.no_grad():
        with icl.momentum_attention(llama, eta):
            expected = llama.run(ids)
            assert llama.fingerprint() == own.fingerprint()
            with pytest.raises(ValueError, match=r"without momentum, got 'llama \+ momentum .* with momentum η=0"):
                icl.momentum_attention(llama, 0.1).__enter__()
        assert torch.equal(own.run(ids), expected)
    with pytest.raises(ValueError, match="expected a model without momentum, got 'own'"):
        icl.momentum_attention(own, 0.1).__enter__()
    assert (own.name, llama.momentum) == ("own", None)


def test_positions_that_jump_are_refused_under_momentum(llama: icl.Model) -> None:
    ids, positions = torch.arange(3)[None], torch.tensor([0, 4, 5])
    with torch.no_grad():
        plain = llama.run(ids, positions=positions)
        with icl.momentum_attention(llama, 0):
            assert torch.equal(llama.run(ids, positions=positions), plain)
        with icl.momentum_attention(llama, 0.1), pytest.raises(ValueError, match=r"one after another, got \[0, 4, 5\]"):
            llama.run(ids, positions=positions)
