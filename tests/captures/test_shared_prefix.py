"""The shared-prefix pass against plain forward passes over full prompts."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import FullPrompts, relative_error, some_eta, with_momentum
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ARCHITECTURES

import icl_dual as icl
from icl_dual.captures import capture as capture_module
from icl_dual.captures import shared_prefix
from icl_dual.captures.capture import METRIC_FIELDS
from icl_dual.captures.shared_prefix import BATCH_OVERHEAD, split_into_batches
from icl_dual.prompts import Prompts

OOM = torch.OutOfMemoryError("CUDA out of memory")


def build_prompts(model: icl.Model, task: icl.Task, k: int = 5, n: int = 7) -> Prompts:
    return icl.build_prompts(model, task, task.demonstrations(k, seed=1), task.queries(n))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shared_prefix_pass_equals_plain_full_prompts(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task, architecture: str
) -> None:
    """In batches of one query, of some and of all, with several lengths in a batch."""
    model = models_by_architecture(architecture)
    prompts = build_prompts(model, task, n=5)
    plain = FullPrompts(model, prompts)
    expected = [(plain.attn_out(query), plain.label_log_probs(query)) for query in range(5)]
    for batch_size in (1, 3, 16):
        got = icl.capture(model, prompts, batch_size=batch_size, progress=False)
        assert got.attn_out is not None
        for query, (attn_out, label_log_probs) in enumerate(expected):
            assert relative_error(got.attn_out[query], attn_out) < 1e-5
            assert relative_error(got.label_log_probs[query], label_log_probs) < 1e-5
        assert got.residual < 1e-5


@pytest.mark.parametrize("architecture", ["mistral-window", "gemma3-window"])
def test_the_windowed_models_tested_do_lose_demonstrations_to_their_window(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    windows = [rule.window for rule in model.attention_rules if rule.window is not None]
    assert windows
    assert min(map(len, build_prompts(model, task).queries)) < max(windows) < len(build_prompts(model, task).prefix)


def test_float64_gpt2_is_exact_to_its_own_rounding(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("gpt2", torch.float64)
    prompts = build_prompts(model, task)
    got = icl.capture(model, prompts, progress=False)
    assert got.attn_out is not None
    assert relative_error(got.attn_out[2], FullPrompts(model, prompts).attn_out(2)) < 1e-13
    assert got.residual < 1e-13


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
    prompts = build_prompts(model, task if protocol == "answer" else reference_task)
    got = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    expected = FullPrompts(model, prompts)
    assert got.full_prompt is not None
    assert got.full_prompt.tokens == prompts.prefix + prompts.suffixes[0]
    assert relative_error(got.full_prompt.attn_out, expected.attn_out(0)) < 1e-5
    for layer, attention in enumerate(expected.attention(0)):
        assert relative_error(got.full_prompt.q[layer], attention.q[0, -1]) < 1e-5
        assert relative_error(got.full_prompt.k[layer], attention.k[0]) < 1e-5
        assert relative_error(got.full_prompt.v[layer], attention.v[0]) < 1e-5
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", 7)
    in_blocks = icl.capture(model, prompts, fields=("z",), progress=False)
    assert in_blocks.full_prompt is None
    assert in_blocks.z is not None
    assert got.z is not None
    assert relative_error(in_blocks.z, got.z) < 1e-5


def test_attention_that_is_not_softmax_of_scores_is_refused(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    gated = make_model("llama", name="gated")
    gated.wrapped.blocks[1].attn.o.original_component.register_forward_pre_hook(lambda module, args: None)
    gated.wrapped.add_hook("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0.9)
    with pytest.raises(
        icl.UnsupportedModelError, match=r"gated .* layer 1: expected attention recomputed .*, got .*: remove hooks"
    ):
        icl.capture(gated, prompts, progress=False)
    gated.wrapped.reset_hooks()


def test_a_model_that_ignores_positions_is_refused(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2", name="deaf")
    run = model.run
    monkeypatch.setattr(model, "run", lambda tokens, **kwargs: run(tokens, **{**kwargs, "positions": None}))
    with pytest.raises(
        icl.UnsupportedModelError,
        match=r"deaf .* layer 0: expected the pass of queries after .*, got .*: use another model",
    ):
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


def test_a_batch_whose_results_do_not_fit_is_halved(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = icl.capture(llama, prompts, fields=icl.DECOMPOSE_FIELDS, batch_size=7, progress=False)
    record, sizes = capture_module._Recorder.on_batch, list[int]()

    def fits_two(recorder: Any, rows: Any) -> None:
        sizes.append(len(rows.indices))
        if len(rows.indices) > 2:
            raise OOM
        record(recorder, rows)

    monkeypatch.setattr(capture_module._Recorder, "on_batch", fits_two)
    monkeypatch.setattr(shared_prefix, "BATCH_OVERHEAD", 10_000)  # as few batches as may be
    got = icl.capture(llama, prompts, fields=icl.DECOMPOSE_FIELDS, batch_size=7, progress=False)
    assert sizes == [7, 4, 2, 2, 2, 1]
    for name in ("attn_out", "z", "q_scored"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


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


def test_a_capture_has_the_largest_residual_of_its_batches(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shared_prefix.run_queries

    def run_with_residuals(*args: Any, **options: Any) -> Iterator[shared_prefix.QueryBatch]:
        for batch, residual in zip(run(*args, **options), (0.25, 0.5, 0.125, 0.0), strict=False):
            yield batch._replace(residual=residual)

    monkeypatch.setattr(capture_module, "run_queries", run_with_residuals)
    monkeypatch.setattr(shared_prefix, "BATCH_OVERHEAD", 10_000)  # as few batches as may be
    got = icl.capture(llama, prompts, fields=(), batch_size=2, progress=False)
    assert got.residual == 0.5


def test_a_capture_has_the_largest_residual_of_its_prefix_blocks(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    icl.capture(llama, prompts, fields=(), progress=False)  # a model's first capture checks it, too
    run_after, residuals = shared_prefix._run_after, iter((0.25, 0.5, 0.125))

    def run_with_residuals(*args: Any, **options: Any) -> tuple[torch.Tensor, float]:
        logits, _ = run_after(*args, **options)
        return logits, next(residuals, 0.0)

    monkeypatch.setattr(shared_prefix, "_run_after", run_with_residuals)
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", len(prompts.prefix) // 3)
    assert icl.capture(llama, prompts, fields=(), progress=False).residual == 0.5


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
            assert relative_error(got.attn_out[query], FullPrompts(model, alone).attn_out(query)) < 1e-5


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


@pytest.mark.parametrize("architecture", ["gpt2", "mistral-window", "bloom", "gptoss-window"])
def test_the_prefix_may_run_in_blocks(
    models_by_architecture: Callable[[str], icl.Model],
    task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
) -> None:
    """Token by token as well, where a short prefix will do: that of the windowed models is longer than the window."""
    model = models_by_architecture(architecture)
    for k, blocks in ((2, (1,)), (5, (7, 1000))):
        prompts = build_prompts(model, task, k=k, n=4)
        windows = [rule.window for rule in model.attention_rules if rule.window is not None]
        assert all(window < len(prompts.prefix) for window in windows)
        expected = {query: FullPrompts(model, prompts).attn_out(query) for query in (0, 3)}
        for block in blocks:
            monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", block)
            got = icl.capture(model, prompts, progress=False)
            assert got.attn_out is not None
            for query, attn_out in expected.items():
                assert relative_error(got.attn_out[query], attn_out) < 1e-5


def test_captures_of_the_real_model_equal_plain_full_prompts() -> None:
    """32 real demonstrations on SmolLM2: the shared-prefix pass against the whole prompt, to 1e-4 relative."""
    model, task = icl.load_model("smollm2-135m"), icl.load_task("sst2")
    prompts = icl.build_prompts(model, task, task.demonstrations(32, seed=1), task.queries(6))
    got = icl.capture(model, prompts, progress=False)
    assert got.attn_out is not None
    plain = FullPrompts(model, prompts)
    for query in (0, 5):
        expected = plain.attn_out(query)
        by_layer = (got.attn_out[query] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert by_layer.max() < 1e-4
        torch.testing.assert_close(got.label_log_probs[query], plain.label_log_probs(query), rtol=1e-4, atol=0)


def test_long_context_rotation_is_refused_where_it_would_switch_between_prefix_and_query(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama")
    prompts = build_prompts(model, task)
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
    prompts = build_prompts(model, task)
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
            assert relative_error(run.label_log_probs[query, label], of_word) < 1e-5
            assert relative_error(run.attn_out[query], torch.stack(outputs)[:, 0, -1 - len(word)]) < 1e-5


def test_captures_with_momentum_are_exact_in_float64(
    make_model: Callable[..., icl.Model], make_hf_model: Callable[..., Any], task: icl.Task
) -> None:
    model, twin, eta = make_model("gpt2", torch.float64), make_hf_model("gpt2", torch.float64), some_eta()
    outputs = with_momentum(twin, "gpt2", eta)
    prompts = build_prompts(model, task)
    with icl.momentum_attention(model, eta):
        got = icl.capture(model, prompts, progress=False)
    with torch.no_grad():
        twin(torch.tensor([[*prompts.prefix, *prompts.suffixes[2]]]))
    assert got.attn_out is not None
    assert relative_error(got.attn_out[2], torch.stack(outputs)[:, 0, -1]) < 1e-12


def test_half_precision_sums_momentum_in_float32(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("llama", torch.bfloat16)
    prompts = build_prompts(model, task)
    with icl.momentum_attention(model, 0.9):
        got = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
        plain = FullPrompts(model, prompts).attention(2)[0]  # the first layer, which no rounding comes before
    assert got.z is not None
    assert plain.momentum.z.dtype == got.z.dtype == torch.float32
    assert relative_error(got.z[2, 0], plain.output[0, -1]) < 1e-2


@pytest.mark.parametrize("position", [-1, 3])
@pytest.mark.parametrize("is_first", [True, False], ids=["first capture", "later capture"])
def test_a_hook_that_counts_positions_is_refused_by_name(
    make_model: Callable[..., icl.Model], prompts: Prompts, position: int, is_first: bool
) -> None:
    model = make_model("llama")
    if not is_first:
        icl.capture(model, prompts, fields=(), progress=False)

    def add_at(residual: torch.Tensor, hook: object) -> torch.Tensor:
        if residual.shape[1] <= position:
            return residual
        residual = residual.clone()
        residual[:, position] += torch.linspace(-2, 2, residual.shape[-1])
        return residual

    with (
        model.wrapped.hooks(fwd_hooks=[("blocks.1.hook_out", add_at)]),
        pytest.raises(
            icl.UnsupportedModelError, match=r"remove the hooks that count positions, of blocks\.1\..*add_at"
        ),
    ):
        icl.capture(model, prompts, fields=(), progress=False)
    assert icl.capture(model, prompts, fields=(), progress=False).residual < 1e-5, "without the hook, all is as before"


def test_a_hook_that_treats_all_tokens_alike_is_a_part_of_the_model(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    model = make_model("llama")
    plain = icl.capture(model, prompts, fields=("next_log_probs",), progress=False)
    with model.wrapped.hooks(fwd_hooks=[("blocks.1.hook_out", lambda residual, hook: residual * 0.5)]):
        hooked = icl.capture(model, prompts, fields=("next_log_probs",), progress=False)
        assert plain.next_log_probs is not None
        assert hooked.next_log_probs is not None
        assert model.pass_residual is not None
        assert model.pass_residual < 1e-5
        for query in range(len(prompts.queries)):
            expected = FullPrompts(model, prompts).run(query)[0, -1].log_softmax(-1)
            torch.testing.assert_close(hooked.next_log_probs[query], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain.next_log_probs, hooked.next_log_probs, atol=1e-2)


def test_the_pass_is_measured_again_where_hooks_change(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lengths = make_model("llama"), []

    def measured(model: icl.Model, prefix: tuple[int, ...], rows: list[tuple[int, ...]]) -> float:
        lengths.append([len(prefix) + len(row) for row in rows])
        return 1e-7

    monkeypatch.setattr("icl_dual.captures.capture.measure_pass", measured)
    for hooks in ([], [], [("blocks.1.hook_out", lambda residual, hook: residual)], [], []):
        with model.wrapped.hooks(fwd_hooks=hooks):
            icl.capture(model, prompts, fields=(), progress=False)
    of_prompts = sorted(len(prompts.prefix) + len(query) for query in prompts.queries)
    assert len(lengths) == 3, "at first, with the hook, and without it again"
    assert lengths[1] == [of_prompts[0], of_prompts[-1]]
    assert all(shortest != longest for shortest, longest in lengths)


def adding(where: Any) -> Callable[..., torch.Tensor]:
    """Return a hook that adds a vector to some of the tokens."""

    def add(residual: torch.Tensor, hook: object) -> torch.Tensor:
        residual = residual.clone()
        residual[where] += torch.linspace(-2, 2, residual.shape[-1])
        return residual

    return add


QUERIES = {
    "one query": ((5, 7, 9, 11, 6),),
    "equal lengths": ((5, 7, 9, 11, 6), (5, 7, 8, 3, 2)),
    "a gap above 100 tokens": ((5, 7, 9, 11, 6), (5, 7, *range(10, 130))),
}


@pytest.mark.parametrize("place", ["blocks.0.hook_out", "blocks.2.hook_out"])
@pytest.mark.parametrize("queries", QUERIES.values(), ids=QUERIES)
def test_hooks_are_checked_on_what_runs(
    make_model: Callable[..., icl.Model], queries: tuple[tuple[int, ...], ...], place: str
) -> None:
    """Zero-shot without a start token: a hook after the last layer's attention changes the logits alone."""
    model = make_model("llama")
    assert model.n_layers == 3
    alone = Prompts(queries=queries, labels=((8,), (9,)), gold=(0,) * len(queries))
    fixed = [(slice(None), 2)] * (place == "blocks.0.hook_out")  # later, it does not change the last token's logits
    for where in ((slice(None), -1), *fixed):
        with (
            model.wrapped.hooks(fwd_hooks=[(place, adding(where))]),
            pytest.raises(icl.UnsupportedModelError, match=rf"remove the hooks that count positions, of {place}"),
        ):
            icl.capture(model, alone, fields=(), progress=False)
    with model.wrapped.hooks(fwd_hooks=[(place, adding(...))]):
        got = icl.capture(model, alone, fields=("next_log_probs",), progress=False)
        assert got.next_log_probs is not None
        for query in range(len(queries)):
            expected = FullPrompts(model, alone).run(query)[0, -1].log_softmax(-1)
            torch.testing.assert_close(got.next_log_probs[query], expected, atol=1e-5, rtol=1e-5)


def test_a_row_that_fills_the_context_is_checked_without_padding(make_model: Callable[..., icl.Model]) -> None:
    model = make_model("gpt2")
    query = tuple(3 + position % 200 for position in range(model.n_ctx))
    full = Prompts(queries=(query,), labels=((8,), (9,)), gold=(0,))
    with model.wrapped.hooks(fwd_hooks=[("blocks.0.hook_out", adding(...))]):
        assert icl.capture(model, full, fields=(), progress=False).residual < 1e-5
