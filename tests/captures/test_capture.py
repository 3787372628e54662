import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_rows, some_eta, with_momentum
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ARCHITECTURES

import icl_dual as icl
from icl_dual.captures import shared_prefix
from icl_dual.captures.capture import METRIC_FIELDS
from icl_dual.captures.shared_prefix import BATCH_OVERHEAD, split_into_batches
from icl_dual.prompts import Prompts

OOM = torch.OutOfMemoryError("CUDA out of memory")

ALL_FIELDS = (*METRIC_FIELDS, "demo_scores", "keys_values")


def build(model: icl.Model, task: icl.Task, k: int = 5, n: int = 7) -> Prompts:
    return icl.build_prompts(model, task, task.demonstrations(k, seed=1), task.queries(n))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


class Plain:
    """The slow reference: one plain forward pass over each full prompt, no cache, no padding, no hooks that edit."""

    def __init__(self, model: icl.Model, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts

    def attn_out(self, query: int) -> torch.Tensor:
        found: list[torch.Tensor] = []
        self.run(query, self.prompts.appended_tokens, on_output=lambda layer, output: found.append(output[0, -1]))
        return torch.stack(found)

    def attention(self, query: int) -> list:
        found: list = []

        def keep(layer, attention) -> None:
            found.append(attention)

        self.run(query, self.prompts.appended_tokens, on_attention=keep)
        return found

    def label_log_probs(self, query: int) -> torch.Tensor:
        means = []
        for label in self.prompts.labels:
            logits = self.run(query, label)[0, -len(label) - 1 : -1]
            means.append(logits.log_softmax(-1)[range(len(label)), label].mean())
        return torch.stack(means)

    def run(self, query: int, after: tuple[int, ...] = (), **callbacks) -> torch.Tensor:
        tokens = torch.tensor([[*self.prompts.prefix, *self.prompts.queries[query], *after]])
        with torch.no_grad():
            return self.model.run(tokens, **callbacks)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shared_prefix_pass_equals_plain_full_prompts(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task, architecture: str, batch_size: int
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task)
    got = icl.capture(model, prompts, batch_size=batch_size, progress=False)
    plain = Plain(model, prompts)
    assert got.attn_out is not None
    for query in range(len(prompts.queries)):
        assert relative(got.attn_out[query], plain.attn_out(query)) < 1e-5
        assert relative(got.label_log_probs[query], plain.label_log_probs(query)) < 1e-5
    assert got.residual < 1e-5


@pytest.mark.parametrize("architecture", ["mistral-window", "gemma3-window"])
def test_the_windowed_models_tested_do_lose_demonstrations_to_their_window(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    windows = [rule.window for rule in model.attention_rules if rule.window is not None]
    assert windows
    assert min(map(len, build(model, task).queries)) < max(windows) < len(build(model, task).prefix)


def test_float64_gpt2_is_exact_to_its_own_rounding(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("gpt2", torch.float64)
    prompts = build(model, task)
    got = icl.capture(model, prompts, progress=False)
    assert got.attn_out is not None
    assert relative(got.attn_out[2], Plain(model, prompts).attn_out(2)) < 1e-13
    assert got.residual < 1e-13


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_protocol_records_after_the_appended_label_and_reads_before_it(
    models_by_architecture: Callable[[str], icl.Model], reference_task: icl.Task, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    for labels in (("no", "perhaps"), ("perhaps", "no")):  # one token appended, or several
        task = icl.Task("toy", reference_task.template, labels, make_rows(), protocol="reference")
        prompts = build(model, task)
        for setting in (prompts, prompts.zero_shot()):
            got = icl.capture(model, setting, batch_size=3, progress=False)
            plain = Plain(model, setting)
            assert got.attn_out is not None
            for query in range(len(prompts.queries)):
                assert relative(got.attn_out[query], plain.attn_out(query)) < 1e-5
                assert relative(got.label_log_probs[query], plain.label_log_probs(query)) < 1e-5


@pytest.mark.parametrize("protocol", ["answer", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_queries_keys_and_values_are_those_of_the_full_prompt(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    architecture: str,
    protocol: str,
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task if protocol == "answer" else reference_task)
    got = icl.capture(model, prompts, fields=ALL_FIELDS, batch_size=3, progress=False)
    assert got.q is not None
    assert got.context_scores is not None
    assert got.demo_scores is not None
    assert got.query_scores is not None
    assert got.keys_values is not None
    group = model.n_heads // model.n_key_value_heads
    n_prefix, n_start = len(prompts.prefix), len(prompts.start)
    for query in (0, 4):
        n_query = len(prompts.suffixes[query])
        for layer, attention in enumerate(Plain(model, prompts).attention(query)):
            rule = model.attention_rules[layer]
            keys = attention.k[0].repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,phd->hp", attention.q[0, -1], keys) * rule.scale
            if rule.softcap is not None:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            demo = scores[:, prompts.demonstration_positions]
            assert relative(got.demo_scores[query, layer], demo) < 1e-5
            assert relative(got.context_scores[query, layer], scores[:, :n_prefix].sum(0)) < 1e-5
            assert relative(got.query_scores[query, layer, :, :n_query], scores[:, n_prefix:]) < 1e-5
            assert (got.query_scores[query, layer, :, n_query:] == 0).all()
            assert relative(got.q[query, layer], attention.q_pre_rotary[0, -1]) < 1e-5
            kept = got.keys_values
            assert relative(kept.demo_keys[layer], attention.k[0, n_start:n_prefix]) < 1e-5
            assert relative(kept.demo_values[layer], attention.v[0, n_start:n_prefix]) < 1e-5
            own = slice(n_start, n_start + n_query)
            assert relative(kept.query_keys[query, layer, own], attention.k[0, n_prefix:]) < 1e-5
            assert relative(kept.query_values[query, layer, own], attention.v[0, n_prefix:]) < 1e-5


@pytest.mark.parametrize("protocol", ["answer", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plain_pass_over_the_first_query_is_kept_and_serves_as_context(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    protocol: str,
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task if protocol == "answer" else reference_task)
    got = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    expected = Plain(model, prompts)
    assert got.full_prompt is not None
    assert got.full_prompt.tokens == prompts.prefix + prompts.suffixes[0]
    assert relative(got.full_prompt.attn_out, expected.attn_out(0)) < 1e-5
    for layer, attention in enumerate(expected.attention(0)):
        assert relative(got.full_prompt.q[layer], attention.q[0, -1]) < 1e-5
        assert relative(got.full_prompt.k[layer], attention.k[0]) < 1e-5
        assert relative(got.full_prompt.v[layer], attention.v[0]) < 1e-5
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", 7)
    in_blocks = icl.capture(model, prompts, fields=("z",), progress=False)
    assert in_blocks.full_prompt is None
    assert in_blocks.z is not None
    assert got.z is not None
    assert relative(in_blocks.z, got.z) < 1e-5


@pytest.mark.parametrize("protocol", ["answer", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_next_tokens_are_as_probable_as_in_the_plain_forward_pass(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    reference_task: icl.Task,
    architecture: str,
    protocol: str,
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task if protocol == "answer" else reference_task)
    for setting in (prompts, prompts.zero_shot()):
        got = icl.capture(model, setting, fields=("next_log_probs",), batch_size=3, progress=False)
        assert got.next_log_probs is not None
        assert got.next_log_probs.shape == (7, model.d_vocab)
        assert got.attn_out is got.q is got.query_scores is None
        for query in range(7):  # where the label is predicted, also where more is recorded behind it
            expected = Plain(model, setting).run(query)[0, -1].log_softmax(-1)
            torch.testing.assert_close(got.next_log_probs[query], expected, rtol=1e-4, atol=1e-4)
        one_token = [label for label, tokens in enumerate(prompts.labels) if len(tokens) == 1]
        first = [prompts.labels[label][0] for label in one_token]
        assert first
        assert torch.equal(got.next_log_probs[:, first], got.label_log_probs[:, one_token])


def test_next_tokens_are_kept_in_float32_also_at_half_precision(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama", torch.bfloat16)
    got = icl.capture(model, build(model, task), fields=("next_log_probs",), progress=False).next_log_probs
    assert got is not None
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(7), atol=1e-5, rtol=0)


def test_zero_shot_has_no_demonstrations(llama: icl.Model, prompts: Prompts) -> None:
    zsl = icl.capture(llama, prompts.zero_shot(), fields=ALL_FIELDS, progress=False)
    assert zsl.demo_scores is not None
    assert zsl.demo_scores.shape[-1] == 0
    assert zsl.context_scores is not None
    assert zsl.context_scores.shape[-1] == 1, "the start token"
    assert zsl.keys_values is not None
    assert zsl.keys_values.demo_keys.shape[1] == 0
    assert relative(zsl.label_log_probs[3], Plain(llama, prompts.zero_shot()).label_log_probs(3)) < 1e-5


def test_only_the_fields_asked_for_are_kept(llama: icl.Model, prompts: Prompts) -> None:
    got = icl.capture(llama, prompts, fields=("q",), progress=False)
    assert got.q is not None
    assert got.attn_out is got.context_scores is got.demo_scores is got.query_scores is got.keys_values is None


def test_half_precision_is_captured_in_float32(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("llama", torch.bfloat16)
    prompts = build(model, task)
    got = icl.capture(model, prompts, progress=False)
    assert got.attn_out is not None
    assert got.attn_out.dtype == torch.float32
    assert relative(got.attn_out[1], Plain(model, prompts).attn_out(1).float()) < 5e-2


def test_a_model_handed_in_comes_back_without_hooks(llama: icl.Model, prompts: Prompts) -> None:
    icl.capture(llama, prompts, progress=False)
    assert not any(point.fwd_hooks for point in llama.wrapped.hook_dict.values())


def test_attention_that_is_not_softmax_of_scores_is_refused(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    gated = make_model("llama", name="gated")
    gated.wrapped.blocks[1].attn.o.original_component.register_forward_pre_hook(lambda module, args: None)
    gated.wrapped.add_hook("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0.9)
    with pytest.raises(icl.UnsupportedModelError, match=r"gated .* layer 1: attention recomputed"):
        icl.capture(gated, prompts, progress=False)
    gated.wrapped.reset_hooks()


def test_a_model_that_ignores_positions_is_refused(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2", name="deaf")
    run = model.run
    monkeypatch.setattr(model, "run", lambda tokens, **kwargs: run(tokens, **{**kwargs, "positions": None}))
    with pytest.raises(icl.UnsupportedModelError, match=r"deaf .* layer 0: the pass of queries after"):
        icl.capture(model, prompts, progress=False)


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(), OOM])
def test_a_batch_that_does_not_fit_is_halved_and_said_once(
    llama: icl.Model,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    expected = icl.capture(llama, prompts, batch_size=7, progress=False)
    run, sizes = llama.run, []

    def fits_two(tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise error
        return run(tokens, **kwargs)

    monkeypatch.setattr(llama, "run", fits_two)
    monkeypatch.setattr(shared_prefix, "BATCH_OVERHEAD", 10_000)  # as few batches as may be
    got = icl.capture(llama, prompts, batch_size=7, progress=False)
    assert sizes[:7] == [1, 7, 4, 2, 2, 2, 1]
    assert max(sizes[7:]) <= 2  # the passes of label words of several tokens
    torch.testing.assert_close(got.label_log_probs, expected.label_log_probs, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.attn_out, expected.attn_out, rtol=1e-4, atol=1e-6)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "7 queries" in caplog.text


def test_what_does_not_fit_by_itself_is_an_error_with_its_size(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    icl.capture(llama, prompts, fields=(), progress=False)  # measures the model, once
    run, fits = llama.run, 0

    def full(tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        if kwargs["positions"][0] >= fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return run(tokens, **kwargs)

    monkeypatch.setattr(llama, "run", full)
    with pytest.raises(MemoryError, match=r"single part of the demonstrations, \d+ tokens after 0 tokens .* 8 bytes"):
        icl.capture(llama, prompts, progress=False)
    with pytest.raises(
        MemoryError, match=r"single prompt, run whole for the field 'full_prompt', \d+ tokens .* 8 bytes"
    ):
        icl.capture(llama, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    fits = len(prompts.prefix)
    with pytest.raises(MemoryError, match=r"single query, \d+ tokens after \d+ tokens in Model.* allocate 8 bytes"):
        icl.capture(llama, prompts, progress=False)


def test_a_prefix_block_that_does_not_fit_is_halved(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = icl.capture(llama, prompts, progress=False)
    run = llama.run

    def fits_nine_tokens(tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        if kwargs["positions"][0] < len(prompts.prefix) and tokens.shape[1] > 9:
            raise OOM
        return run(tokens, **kwargs)

    monkeypatch.setattr(llama, "run", fits_nine_tokens)
    got = icl.capture(llama, prompts, progress=False)
    torch.testing.assert_close(got.attn_out, expected.attn_out, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("switch", [None, 10_000])
def test_a_prefix_of_no_tokens_leaves_queries_by_themselves(
    make_model: Callable[..., icl.Model], prompts: Prompts, switch: int | None
) -> None:
    model = make_model("llama")
    alone = dataclasses.replace(prompts.zero_shot(), start=(), queries=((5, 7, 9), (6, 2), (9, 9, 1)), gold=(0, 1, 0))
    model.rope_scaling_threshold = switch
    for fields in (METRIC_FIELDS, icl.DECOMPOSE_FIELDS):
        got = icl.capture(model, alone, fields=fields, progress=False)
        assert (got.full_prompt is None) == ("full_prompt" not in fields)
        for query in range(3):
            assert got.attn_out is not None
            assert relative(got.attn_out[query], Plain(model, alone).attn_out(query)) < 1e-5


def test_dropout_that_is_put_in_later_is_off_during_a_run(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    model = make_model("llama")
    expected = icl.capture(model, prompts, progress=False).label_log_probs
    model.wrapped.original_model.model.layers[1].late = dropout = torch.nn.Dropout(0.5).train()
    seen = []
    dropout.register_forward_hook(lambda *of: seen.append(dropout.training))

    def drop(module: Any, args: Any, output: torch.Tensor) -> None:
        dropout(output)

    model.wrapped.original_model.model.layers[1].register_forward_hook(drop)
    assert torch.equal(icl.capture(model, prompts, progress=False).label_log_probs, expected)
    assert dropout.training
    assert seen
    assert not any(seen)


def test_an_empty_query_is_refused(llama: icl.Model, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="one token in each of the queries, got none in queries.6."):
        icl.capture(llama, dataclasses.replace(prompts, queries=(*prompts.queries[:6], ())), progress=False)


def test_other_errors_of_a_run_are_passed_on(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    icl.capture(llama, prompts, fields=(), progress=False)
    monkeypatch.setattr(llama, "run", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        icl.capture(llama, prompts, progress=False)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), batch_size=st.integers(1, 9))
def test_batches_cost_no_more_than_any_other_split(lengths: list[int], batch_size: int) -> None:
    """Against every split of the sorted rows into runs of at most `batch_size`."""

    def cost(split: list[list[int]]) -> int:
        return sum(len(batch) * max(batch) + BATCH_OVERHEAD for batch in split)

    def splits(rows: list[int]) -> list[list[list[int]]]:
        if not rows:
            return [[]]
        heads = range(1, min(batch_size, len(rows)) + 1)
        return [[rows[:n], *rest] for n in heads for rest in splits(rows[n:])]

    got = split_into_batches(lengths, batch_size)
    assert sorted(row for batch in got for row in batch) == list(range(len(lengths)))
    assert max(map(len, got)) <= batch_size
    assert cost([[lengths[row] for row in batch] for batch in got]) == min(map(cost, splits(sorted(lengths))))


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("architecture", ["gpt2", "mistral-window", "bloom", "gptoss-window"])
def test_the_prefix_may_run_in_blocks(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    block: int,
) -> None:
    model = models_by_architecture(architecture)
    prompts = build(model, task)
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", block)
    got = icl.capture(model, prompts, progress=False)
    assert got.attn_out is not None
    for query in (0, 3):
        assert relative(got.attn_out[query], Plain(model, prompts).attn_out(query)) < 1e-5


def test_queries_that_are_all_alike_and_one_query_keep_a_token_of_their_own(llama: icl.Model, prompts: Prompts) -> None:
    whole = icl.capture(llama, prompts, fields=ALL_FIELDS, progress=False)
    for queries in ((2,), (2, 2), (2, 5)):
        part = dataclasses.replace(
            prompts,
            queries=tuple(prompts.queries[query] for query in queries),
            gold=tuple(prompts.gold[query] for query in queries),
        )
        got = icl.capture(llama, part, fields=ALL_FIELDS, progress=False)
        assert got.query_scores is not None
        assert whole.query_scores is not None
        n_tokens = got.query_scores.shape[-1]
        for at, query in enumerate(queries):
            assert relative(got.label_log_probs[at], whole.label_log_probs[query]) < 1e-5
            assert relative(got.query_scores[at], whole.query_scores[query, ..., :n_tokens]) < 1e-5


def test_predictions_and_accuracy_follow_the_log_probabilities(llama: icl.Model, prompts: Prompts) -> None:
    got = icl.capture(llama, prompts, fields=(), progress=False)
    assert got.predictions.tolist() == [int(row[1] > row[0]) for row in got.label_log_probs]
    sure = dataclasses.replace(got, label_log_probs=torch.nn.functional.one_hot(got.gold, 2).float())
    assert sure.accuracy == 1.0


def test_captures_of_the_real_model_equal_plain_full_prompts() -> None:
    """32 real demonstrations on SmolLM2: the shared-prefix pass against the whole prompt, to 1e-4 relative."""
    model, task = icl.load_model("smollm2-135m"), icl.load_task("sst2")
    prompts = icl.build_prompts(model, task, task.demonstrations(32, seed=1), task.queries(6))
    got = icl.capture(model, prompts, progress=False)
    assert got.attn_out is not None
    plain = Plain(model, prompts)
    for query in (0, 5):
        expected = plain.attn_out(query)
        by_layer = (got.attn_out[query] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert by_layer.max() < 1e-4
        torch.testing.assert_close(got.label_log_probs[query], plain.label_log_probs(query), rtol=1e-4, atol=0)


def test_axes_are_labelled(llama: icl.Model, prompts: Prompts) -> None:
    got = icl.capture(llama, prompts, fields=ALL_FIELDS, progress=False)
    n_tokens = len(prompts.demonstration_positions)
    assert got.axes("demo_scores") == {"query": 7, "layer": 3, "head": 4, "demo_token": n_tokens}
    assert list(got.axes("q")) == ["query", "layer", "head", "d_head"]
    assert f"demo_scores[query=7 layer=3 head=4 demo_token={n_tokens}]" in repr(got)
    assert icl.capture(llama, prompts, fields=(), progress=False).axes("q") == {}


def test_long_context_rotation_is_refused_where_it_would_switch_between_prefix_and_query(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama")
    prompts = build(model, task)
    prefix = len(prompts.prefix)
    for switch in (prefix - 1, prefix + 200):
        model.rope_scaling_threshold = switch
        icl.capture(model, prompts, fields=(), progress=False)
    model.rope_scaling_threshold = prefix + 3
    with pytest.raises(icl.UnsupportedModelError, match=rf"past {prefix + 3} tokens: .* got [0-9]+ tokens"):
        icl.capture(model, prompts, progress=False)


WITH_MOMENTUM = ("gpt2", "neox", "xglm", "llama", "gemma2-window", "gptoss-window", "bloom")
"""Fused projections, grouped queries, windows, sinks and ALiBi among them."""


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name.removeprefix("hooked-") in WITH_MOMENTUM]
)
def test_captures_with_momentum_are_those_of_a_plain_model_that_has_it(
    models_by_architecture: Callable[[str], icl.Model],
    make_hf_model: Callable[..., Any],
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
) -> None:
    """Queries of several lengths behind a prefix of several blocks, against whole prompts through the bare model."""
    model, twin, eta = models_by_architecture(architecture), make_hf_model(architecture), some_eta()
    outputs = with_momentum(twin, architecture, eta)
    prompts = build(model, task)
    assert len(set(map(len, prompts.queries))) > 1
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", len(prompts.prefix) // 3)
    with icl.momentum_attention(model, eta):
        got, zsl = (icl.capture(model, one, batch_size=3, progress=False) for one in (prompts, prompts.zero_shot()))
        assert model.pass_residual is not None
        assert 0 < model.pass_residual < 1e-5
    assert got.residual < 1e-5
    assert [len(word) > 1 for word in prompts.labels] == [False, True]
    for run, prefix, query in ((got, prompts.prefix, 0), (got, prompts.prefix, 4), (zsl, prompts.start, 1)):
        assert run.attn_out is not None
        for label, word in enumerate(prompts.labels):
            outputs.clear()
            with torch.no_grad():
                logits = twin(torch.tensor([[*prefix, *prompts.queries[query], *word]])).logits[0]
            of_word = logits[-len(word) - 1 : -1].log_softmax(-1)[range(len(word)), word].mean()
            assert relative(run.label_log_probs[query, label], of_word) < 1e-5
            assert relative(run.attn_out[query], torch.stack(outputs)[:, 0, -1 - len(word)]) < 1e-5


def test_captures_with_momentum_are_exact_in_float64(
    make_model: Callable[..., icl.Model], make_hf_model: Callable[..., Any], task: icl.Task
) -> None:
    model, twin, eta = make_model("gpt2", torch.float64), make_hf_model("gpt2", torch.float64), some_eta()
    outputs = with_momentum(twin, "gpt2", eta)
    prompts = build(model, task)
    with icl.momentum_attention(model, eta):
        got = icl.capture(model, prompts, progress=False)
    with torch.no_grad():
        twin(torch.tensor([[*prompts.prefix, *prompts.suffixes[2]]]))
    assert got.attn_out is not None
    assert relative(got.attn_out[2], torch.stack(outputs)[:, 0, -1]) < 1e-12


def test_half_precision_sums_momentum_in_float32(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("llama", torch.bfloat16)
    prompts = build(model, task)
    with icl.momentum_attention(model, 0.9):
        got = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
        plain = Plain(model, prompts).attention(2)[0]  # the first layer, which no rounding comes before
    assert got.z is not None
    assert plain.momentum.z.dtype == got.z.dtype == torch.float32
    assert relative(got.z[2, 0], plain.output[0, -1]) < 1e-2


def test_captures_with_and_without_momentum_are_not_paired(llama: icl.Model, prompts: Prompts) -> None:
    fields = icl.DECOMPOSE_FIELDS
    zsl = icl.capture(llama, prompts.zero_shot(), fields=fields, progress=False)
    with icl.momentum_attention(llama, 0.1):
        got = icl.capture(llama, prompts, fields=fields, progress=False)
        with pytest.raises(ValueError, match=r"captures of the model given, got .*'zero_shot': 'llama'}"):
            icl.decompose(llama, zero_shot=zsl, in_context=got)
        renamed = dataclasses.replace(zsl, model=llama.name)
        with pytest.raises(ValueError, match=r"other weights .* `with momentum_attention\(model, eta\):` and the same"):
            icl.decompose(llama, zero_shot=renamed, in_context=got)
    with pytest.raises(ValueError, match=r"captures of the model given, got .*'in_context': 'llama \+ momentum η=0.1'"):
        icl.decompose(llama, zero_shot=zsl, in_context=got)
