"""Attention by source against plain loops over the attention matrices of Hugging Face models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ARCHITECTURES
from transformers import PreTrainedModel

import icl_dual as icl
from icl_dual.captures import shared_prefix
from icl_dual.models import tiny_model
from icl_dual.sourced_prompts import SourcedPrompt
from icl_dual.texts import PromptError

NAMES = ("start token", "document 1", "document 2", "question")


def prompt_of(n_tokens: int = 60, seed: int = 0, names: tuple[str, ...] = NAMES) -> SourcedPrompt:
    """Random tokens, with a start token and sources in several pieces."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 256, (n_tokens,), generator=generator).tolist()
    sources = torch.randint(1, len(names), (n_tokens,), generator=generator).tolist()
    sources = [0, *range(1, len(names)), *sources[len(names) :]]
    return SourcedPrompt(tuple(tokens), names, tuple(sources), tuple(f"<{token}>" for token in tokens))


class Reference:
    """A plain pass of a Hugging Face model with eager attention, and attention by source in loops over tokens."""

    stream: torch.Tensor

    def __init__(self, hf_model: PreTrainedModel, prompt: SourcedPrompt) -> None:
        self.prompt, self.values, self.outputs, self.written = prompt, {}, {}, []
        model: Any = hf_model
        model.config._attn_implementation = "eager"
        self.is_gpt2 = model.config.model_type == "gpt2"
        self.blocks = model.transformer.h if self.is_gpt2 else model.model.layers
        final = model.transformer.ln_f if self.is_gpt2 else model.model.norm
        hooks = [final.register_forward_pre_hook(lambda module, args: setattr(self, "stream", args[0][0]))]
        for layer, block in enumerate(self.blocks):
            attn = block.attn if self.is_gpt2 else block.self_attn
            projection, output = (attn.c_attn, attn.c_proj) if self.is_gpt2 else (attn.v_proj, attn.o_proj)
            hooks.append(projection.register_forward_hook(self._keeper(self.values, layer)))
            hooks.append(output.register_forward_hook(self._keeper(self.outputs, layer)))
        self.attentions = model(torch.tensor([prompt.tokens]), output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        self.model, self.final = model, final

    def _keeper(self, kept: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
        def keep(module: Any, args: Any, output: torch.Tensor) -> None:
            kept[layer] = output[0]

        return keep

    def value(self, layer: int, head: int, position: int) -> torch.Tensor:
        values, n_heads = self.values[layer][position], self.attentions[layer].shape[1]
        if self.is_gpt2:
            values = values.chunk(3)[2]
        d_head = 8
        kv_head = head // (n_heads // (len(values) // d_head))
        return values[kv_head * d_head : (kv_head + 1) * d_head]

    def W_O(self, layer: int, head: int) -> torch.Tensor:  # noqa: N802 - the field's name
        block = self.blocks[layer]
        W = block.attn.c_proj.weight if self.is_gpt2 else block.self_attn.o_proj.weight.T
        return W[head * 8 : (head + 1) * 8]

    def term(self, position: int, layer: int, head: int, source: int) -> tuple[float, torch.Tensor]:
        """The mass of a source and its contribution, token by token."""
        mass, contribution = 0.0, torch.zeros(32, dtype=self.stream.dtype)
        for key, of in enumerate(self.prompt.sources[: position + 1]):
            if of == source:
                weight = self.attentions[layer][0, head, position, key]
                mass += weight.item()
                contribution = contribution + weight * self.value(layer, head, key) @ self.W_O(layer, head)
        return mass, contribution

    def logit_effect(self, contribution: torch.Tensor, position: int, layer: int, token: int) -> float:
        """The token's logit that a contribution adds, through norms with their scale frozen, by their definitions."""
        block = self.blocks[layer]
        if self.model.config.model_type.startswith("gemma"):
            norm, x = block.post_attention_layernorm, self.outputs[layer][position]
            contribution = contribution * (1 + norm.weight) / (x.square().mean() + norm.eps).sqrt()
        x = self.stream[position]
        if self.is_gpt2:
            scale = (x.var(correction=0) + self.final.eps).sqrt()
            contribution = (contribution - contribution.mean()) * self.final.weight / scale
        elif self.model.config.model_type.startswith("gemma"):
            contribution = contribution * (1 + self.final.weight) / (x.square().mean() + self.final.eps).sqrt()
        else:
            contribution = contribution * self.final.weight / (x.square().mean() + self.final.variance_epsilon).sqrt()
        return float(contribution @ self.model.lm_head.weight[token])


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"),
    [
        ("gpt2", torch.float64, 1e-12),
        ("llama", torch.float32, 1e-5),
        ("gemma2-window", torch.float32, 1e-5),
        ("gemma3-window", torch.float32, 1e-5),
    ],
)
def test_every_number_equals_loops_over_the_attention_matrix(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", 23)
    prompt, tokens, positions = prompt_of(), (7, 200), (-1, 30, 2)
    got = icl.capture_sources(
        make_model(architecture, dtype), prompt, positions=positions, logits=tokens, progress=False
    )
    with torch.no_grad():
        reference = Reference(make_hf_model(architecture, dtype), prompt)
        assert got.positions == ((59, 30, 2),)
        assert got.z is not None
        assert got.logit_effect is not None
        for column, position in enumerate(got.positions[0]):
            for layer in range(3):
                terms = {(h, s): reference.term(position, layer, h, s) for h in range(4) for s in range(len(NAMES))}
                output = torch.stack([contribution for _, contribution in terms.values()]).sum(0)
                for (head, source), (mass, contribution) in terms.items():
                    cell = 0, column, layer, head, source
                    scale = output.norm()
                    vector = got.contribution(NAMES[source])[0, column, layer, head]
                    assert got.mass[cell] == pytest.approx(mass, abs=tolerance)
                    assert (vector - contribution).norm() < tolerance * scale
                    assert abs(got.norm[cell] - contribution.norm()) < tolerance * scale
                    assert abs(got.share[cell] - contribution @ output / output.square().sum()) < tolerance
                    for index, token in enumerate(tokens):
                        expected = reference.logit_effect(contribution, position, layer, token)
                        assert got.logit_effect[(*cell, index)] == pytest.approx(expected, abs=3 * tolerance)
    assert got.residual < tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_contributions_sum_to_the_attention_output_of_every_architecture(
    models_by_architecture: Callable[[str], icl.Model], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", 31)
    model, prompt = models_by_architecture(architecture), prompt_of()
    got = icl.capture_sources(model, prompt, positions=None, logits=[3], progress=False)
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        model.run(torch.tensor([prompt.tokens]), on_output=lambda layer, output: outputs.append(output[0]))
    b_O = model.output_projections()[1]
    for layer, output in enumerate(outputs):
        summed = got.contributions[0, :, layer].sum(-2) + (0 if b_O is None else b_O[layer])
        assert (summed - output).norm() < 1e-5 * output.norm()
    assert got.residual < 1e-5
    total = got.mass.sum(-1) if got.sink_mass is None else got.mass.sum(-1) + got.sink_mass
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(got.share.sum((-1, -2)), torch.ones(got.share.shape[:3]), atol=1e-4, rtol=0)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), n_sources=st.integers(3, 6))
def test_merging_two_sources_adds_their_parts(seed: int, n_sources: int) -> None:
    model = tiny_model()
    names = ("start token", *(f"part {index}" for index in range(1, n_sources)))
    prompt = prompt_of(30, seed, names)
    pair = list(names[-2:])
    apart = icl.capture_sources(model, prompt, positions=(-1, 10), logits=[4], progress=False)
    merged = icl.capture_sources(model, prompt.merged("both", pair), positions=(-1, 10), logits=[4], progress=False)
    for name in ("mass", "share", "z", "logit_effect"):
        axis = -2 if name in ("z", "logit_effect") else -1
        parts, whole = (getattr(captured, name).movedim(axis, 0) for captured in (apart, merged))
        both = whole[merged.source_index("both")]
        torch.testing.assert_close(both, parts[-2] + parts[-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.sum(0), parts.sum(0), atol=1e-5, rtol=1e-4)


def test_in_context_learning_is_one_case_of_it(task: icl.Task) -> None:
    model = tiny_model()
    prompts = icl.build_prompts(model, task, task.demonstrations(3, seed=1), task.queries(2))
    fields = icl.DECOMPOSE_FIELDS
    zero_shot = icl.capture(model, prompts.zero_shot(), fields=fields, progress=False)
    in_context = icl.capture(model, prompts, fields=fields, progress=False)
    split = icl.decompose(model, zero_shot=zero_shot, in_context=in_context)
    got = icl.capture_sources(
        model, [icl.prompt_from_query(prompts, 0), icl.prompt_from_query(prompts, 1)], progress=False
    )
    assert got.z is not None
    groups = {"start token": "start"} | {name: name for name in got.names[1:]}
    for name, group in groups.items():
        mass = split.mass[..., split.groups.index(group)]
        torch.testing.assert_close(got.mass[:, 0, ..., got.source_index(name)].double(), mass, atol=1e-5, rtol=1e-5)
    rest = 1 - split.demonstration_mass[..., None]
    for name, term in (("start token", split.from_start), ("query", split.from_query)):
        z = got.z[:, 0, :, :, got.source_index(name)].double()
        torch.testing.assert_close(z, rest * term, atol=1e-5, rtol=1e-4)
    demonstrations = got.z[:, 0, :, :, 2:].sum(-2).double()
    torch.testing.assert_close(demonstrations, split.delta_icl + (1 - rest) * split.z_0, atol=1e-5, rtol=1e-4)


def test_momentum_is_part_of_the_contributions() -> None:
    model = tiny_model()
    with icl.momentum_attention(model, 0.3):
        got = icl.capture_sources(model, prompt_of(), positions=(-1, 20), progress=False)
    assert got.residual < 1e-5
    assert got != icl.capture_sources(model, prompt_of(), positions=(-1, 20), progress=False)


def test_every_token_can_be_a_source() -> None:
    model, prompt = tiny_model(), prompt_of()
    tokens = icl.capture_sources(model, prompt.by_token(), progress=False)
    whole = icl.capture_sources(model, prompt, progress=False)
    for index, name in enumerate(NAMES):
        of_source = [at for at, source in enumerate(prompt.sources) if source == index]
        torch.testing.assert_close(tokens.mass[..., of_source].sum(-1), whole.mass[..., whole.source_index(name)])


def test_chosen_layers_and_blocks_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny_model(), prompt_of()
    whole = icl.capture_sources(model, prompt, positions=None, logits=[3], progress=False)
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", 7)
    monkeypatch.setattr("icl_dual.source_attention.WEIGHTS_AT_ONCE", 300)
    blocks = icl.capture_sources(model, prompt, positions=[-1, 5], layers=[-1], logits=[3], progress=False)
    assert blocks.layers == (1,)
    for name in ("mass", "norm", "share", "z", "logit_effect"):
        expected = getattr(whole, name)[:, [-1, 5]][:, :, [1]]
        torch.testing.assert_close(getattr(blocks, name), expected, atol=1e-5, rtol=1e-4)


def test_a_result_saves_loads_and_becomes_a_table(tmp_path: Path) -> None:
    model, prompt = tiny_model(), prompt_of()
    got = icl.capture_sources(model, [prompt, prompt_of(40, 2)], positions=(-1, -2), logits=[3, 4], progress=False)
    got.save(tmp_path / "sources")
    loaded = icl.SourceAttention.load(tmp_path / "sources")
    assert loaded == got
    assert loaded.prompts == (prompt, prompt_of(40, 2))
    frame = loaded.to_frame()
    assert list(frame.columns[:5]) == ["prompt", "position", "layer", "head", "source"]
    assert len(frame) == got.mass.numel()
    row = frame[(frame.prompt == 1) & (frame.position == 39) & (frame.layer == 1) & (frame["head"] == 2)]
    assert dict(zip(row["source"], row["mass"], strict=True)) == dict(
        zip(NAMES, got.mass[1, 0, 1, 2].tolist(), strict=True)
    )
    assert "2 prompts of 4 sources, 2 positions, 2 layers of 4 heads, 2 logits" in repr(got)


def test_half_precision_storage_is_split_as_float32_splits_the_same_weights() -> None:
    stored = tiny_model(dtype=torch.bfloat16, arithmetic=torch.float32)
    plain = tiny_model()
    state = {
        name: tensor.to(torch.bfloat16).float() for name, tensor in plain.wrapped.original_model.state_dict().items()
    }
    plain.wrapped.original_model.load_state_dict(state)
    got, expected = (
        icl.capture_sources(model, prompt_of(), logits=[3], terms=False, progress=False) for model in (stored, plain)
    )
    assert got.logit_effect is not None
    torch.testing.assert_close(got.logit_effect, expected.logit_effect, rtol=1e-5, atol=1e-6)


def test_terms_are_left_out_where_they_are_not_requested() -> None:
    got = icl.capture_sources(tiny_model(), prompt_of(), terms=False, progress=False)
    assert got.z is None
    with pytest.raises(ValueError, match="terms=True"):
        got.contribution("question")


def test_bad_arguments_are_refused() -> None:
    model, prompt = tiny_model(), prompt_of()
    renamed = prompt_of(names=("start token", "a", "b", "c"))
    with pytest.raises(IndexError, match="positions from 0 to 59, got 60"):
        icl.capture_sources(model, prompt, positions=[60], progress=False)
    with pytest.raises(IndexError, match="layers from 0 to 1, got 2"):
        icl.capture_sources(model, prompt, layers=[2], progress=False)
    with pytest.raises(ValueError, match="expected at least one position"):
        icl.capture_sources(model, prompt, positions=[], progress=False)
    with pytest.raises(ValueError, match="expected at least one layer"):
        icl.capture_sources(model, prompt, layers=[], progress=False)
    with pytest.raises(ValueError, match=r"expected layers with each layer once, got \[1, -1\]"):
        icl.capture_sources(model, prompt, layers=[1, -1], progress=False)
    with pytest.raises(ValueError, match="expected at least one token in each list of logits"):
        icl.capture_sources(model, prompt, logits=[[]], progress=False)
    with pytest.raises(PromptError, match="at most 512 tokens, the context of tiny, got one of 513"):
        icl.capture_sources(model, prompt_of(513), progress=False)
    with pytest.raises(PromptError, match="sources of the same names"):
        icl.capture_sources(model, [prompt, renamed], progress=False)
    with pytest.raises(PromptError, match="at least one prompt"):
        icl.capture_sources(model, [], progress=False)
    with pytest.raises(ValueError, match="prompts of one length for all positions, got 40 to 60"):
        icl.capture_sources(model, [prompt, prompt_of(40)], positions=None, progress=False)
    with pytest.raises(ValueError, match="token ids from 0 to 256"):
        icl.capture_sources(model, prompt, logits=[257], progress=False)
    with pytest.raises(ValueError, match="one for each of 1 prompts"):
        icl.capture_sources(model, prompt, logits=[[1], [2]], progress=False)
    with pytest.raises(PromptError, match=r"the name of a source, one of 'start token', .* got 'answer'"):
        icl.capture_sources(model, prompt, progress=False).source_index("answer")
    too_large = SourcedPrompt((1, 999), ("a",), (0, 0), ("x", "y"))
    with pytest.raises(PromptError, match=r"token ids from 0 to 256, .* got 999"):
        icl.capture_sources(model, too_large, progress=False)


def test_an_output_that_is_not_its_contributions_is_refused() -> None:
    model = tiny_model()
    output = model.backend.hook_points["blocks.1.attn.o.hook_out"]
    output.add_hook(lambda tensor, hook: tensor * 1.5)
    try:
        with pytest.raises(icl.UnsupportedModelError, match="layer 1: expected contributions that sum"):
            icl.capture_sources(model, prompt_of(), progress=False)
    finally:
        output.remove_hooks()


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("gpt", "a norm after each residual sum"), ("granite", "outputs of layers that are scaled")],
)
def test_logits_without_a_linear_direct_path_are_refused(
    make_model: Callable[..., icl.Model], architecture: str, reason: str
) -> None:
    model = make_model(architecture)
    with pytest.raises(icl.UnsupportedModelError, match=reason):
        icl.capture_sources(model, prompt_of(), logits=[3], progress=False)
    assert icl.capture_sources(model, prompt_of(), progress=False).residual < 1e-5


@pytest.fixture(scope="module")
def captured() -> icl.SourceAttention:
    return icl.capture_sources(tiny_model(), [prompt_of(), prompt_of(50, 1)], layers=[1], logits=[3], progress=False)


def test_a_view_colours_tokens_by_the_number_of_their_source(captured: icl.SourceAttention) -> None:
    view = captured.show(1, 2, prompt=1, quantity="share")
    prompt = captured.prompts[1]
    assert view.texts == prompt.texts
    assert view.sources == tuple(prompt.names[source] for source in prompt.sources)
    shares = captured.share[1, 0, 0, 2]
    assert view.values == tuple(shares[source].item() for source in prompt.sources)
    assert "at layer 1, head 2, for the token at position 49 of prompt 1" in str(view)
    deepest = max(range(50), key=lambda at: abs(view.values[at]))
    assert min(view.colours()[deepest]) == pytest.approx(0.35)
    html = view._repr_html_()
    assert html.count("<span") == 50
    assert "&lt;" in html
    assert "<1" not in html


def test_views_of_what_was_not_captured_are_refused(captured: icl.SourceAttention) -> None:
    with pytest.raises(ValueError, match=r"a layer out of those captured, \[1\], got 0"):
        captured.show(0, 0)
    with pytest.raises(IndexError, match="head from 0 to 3, got 4"):
        captured.show(1, 4)
    with pytest.raises(IndexError, match="prompt from 0 to 1, got 2"):
        captured.show(1, 0, prompt=2)
    with pytest.raises(IndexError, match="logit from 0 to 0, got 1"):
        captured.values("logit_effect", 1)
    plain = icl.capture_sources(tiny_model(), prompt_of(), progress=False)
    with pytest.raises(ValueError, match="pass logits= to capture_sources"):
        plain.values("logit_effect")
