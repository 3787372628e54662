"""Each field of a capture against plain forward passes over full prompts."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FullPrompts, boot, make_rows, relative_error
from toys import ARCHITECTURES, BRIDGED
from transformers import PreTrainedModel

import icl_dual as icl
from icl_dual.captures import capture as capture_module
from icl_dual.captures import shared_prefix
from icl_dual.captures.capture import METRIC_FIELDS, capture_changed
from icl_dual.captures.shared_prefix import norms_of
from icl_dual.dual import AttentionRule
from icl_dual.models import NonFiniteError
from icl_dual.models.backend import ProjectionName
from icl_dual.models.changes import changed_projections
from icl_dual.models.stream import StreamChange
from icl_dual.prompts import Prompts

ALL_FIELDS = (*METRIC_FIELDS, "demo_scores", "keys_values")


def build_prompts(model: icl.Model, task: icl.Task, k: int = 5, n: int = 7) -> Prompts:
    return icl.build_prompts(model, task, task.demonstrations(k, seed=1), task.queries(n))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_protocol_records_after_the_appended_label_and_reads_before_it(
    models_by_architecture: Callable[[str], icl.Model], reference_task: icl.Task, architecture: str
) -> None:
    model = models_by_architecture(architecture)
    for labels in (("no", "perhaps"), ("perhaps", "no")):  # one token appended, or several
        task = icl.Task("toy", reference_task.template, labels, make_rows(), protocol="reference")
        prompts = build_prompts(model, task, n=4)  # a batch of three and one of one
        for setting in (prompts, prompts.zero_shot()):
            got = icl.capture(model, setting, batch_size=3, progress=False)
            plain = FullPrompts(model, setting)
            assert got.attn_out is not None
            for query in range(len(prompts.queries)):
                assert relative_error(got.attn_out[query], plain.attn_out(query)) < 1e-5
                assert relative_error(got.label_log_probs[query], plain.label_log_probs(query)) < 1e-5


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
    prompts = build_prompts(model, task if protocol == "answer" else reference_task)
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
        for layer, attention in enumerate(FullPrompts(model, prompts).attention(query)):
            rule = model.attention_rules[layer]
            keys = attention.k[0].repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,phd->hp", attention.q[0, -1], keys) * rule.scale
            if rule.softcap is not None:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            demo = scores[:, prompts.demonstration_positions]
            assert relative_error(got.demo_scores[query, layer], demo) < 1e-5
            assert relative_error(got.context_scores[query, layer], scores[:, :n_prefix].sum(0)) < 1e-5
            assert relative_error(got.query_scores[query, layer, :, :n_query], scores[:, n_prefix:]) < 1e-5
            assert (got.query_scores[query, layer, :, n_query:] == 0).all()
            assert relative_error(got.q[query, layer], attention.q_pre_rotary[0, -1]) < 1e-5
            kept = got.keys_values
            assert relative_error(kept.demo_keys[layer], attention.k[0, n_start:n_prefix]) < 1e-5
            assert relative_error(kept.demo_values[layer], attention.v[0, n_start:n_prefix]) < 1e-5
            own = slice(n_start, n_start + n_query)
            assert relative_error(kept.query_keys[query, layer, own], attention.k[0, n_prefix:]) < 1e-5
            assert relative_error(kept.query_values[query, layer, own], attention.v[0, n_prefix:]) < 1e-5


def residual_stream(hf_model: PreTrainedModel, tokens: tuple[int, ...]) -> torch.Tensor:
    """The residual stream after each layer, `[layer pos d_model]`, by a forward pass of Hugging Face's model alone.

    Its last hidden state is after the final norm, so that of the last layer is read where the layer returns it.
    """
    n_layers = hf_model.config.num_hidden_layers
    (layers,) = [m for m in hf_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]
    last: list[Any] = []
    handle = layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    with torch.no_grad():
        states = hf_model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    handle.remove()
    of_last = last[0][0] if isinstance(last[0], tuple) else last[0]
    return torch.stack([state[0] for state in (*states[1:n_layers], of_last.view_as(states[0]))])


@pytest.mark.parametrize(
    ("architecture", "protocol"), [*((name, "answer") for name in BRIDGED), ("llama", "reference")]
)
def test_residual_norms_are_those_of_a_plain_hugging_face_pass(
    make_hf_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    task: icl.Task,
    reference_task: icl.Task,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    protocol: str,
) -> None:
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", 48)
    model = icl.Model(boot(make_hf_model(architecture), tokenizer))
    plain = make_hf_model(architecture)
    prompts = build_prompts(model, task if protocol == "answer" else reference_task)
    fields = (*METRIC_FIELDS, "full_prompt")  # with it, demonstrations and the template's tokens run as one sequence
    for setting, kept in ((prompts, METRIC_FIELDS), (prompts, fields), (prompts.zero_shot(), METRIC_FIELDS)):
        got = icl.capture(model, setting, fields=kept, batch_size=3, progress=False)
        norms, scores = got.residual_norms, got.query_scores
        assert norms is not None
        assert scores is not None
        assert norms.shape == (*scores.shape[:2], scores.shape[-1]), "the tokens of the scores"
        for query, tokens in enumerate(setting.suffixes):
            expected = residual_stream(plain, setting.prefix + tokens)[:, len(setting.prefix) :].norm(dim=-1)
            torch.testing.assert_close(norms[query, :, : len(tokens)], expected, rtol=1e-4, atol=1e-5)
            assert (norms[query, :, len(tokens) :] == 0).all()


def test_residual_norms_of_hooked_transformers_are_those_of_the_full_prompt(
    models_by_architecture: Callable[[str], icl.Model], task: icl.Task
) -> None:
    for model in (models_by_architecture(name) for name in ARCHITECTURES if name not in BRIDGED):
        prompts = build_prompts(model, task)
        got = icl.capture(model, prompts, fields=("residual_norms",), batch_size=3, progress=False).residual_norms
        assert got is not None
        for query, tokens in enumerate(prompts.suffixes):
            streams: list[torch.Tensor] = []
            FullPrompts(model, prompts).run(query, on_residual=lambda layer, stream, to=streams: to.append(stream[0]))
            expected = torch.stack(streams)[:, len(prompts.prefix) :].norm(dim=-1)
            torch.testing.assert_close(got[query, :, : len(tokens)], expected, rtol=1e-4, atol=1e-5)


def test_a_norm_that_float16_cannot_hold_is_finite() -> None:
    stream = torch.full((2, 3, 64), 60000.0, dtype=torch.float16)  # the norm is 480,000, the largest float16 65,504
    torch.testing.assert_close(norms_of(stream), torch.full((2, 3), 480_000.0), rtol=1e-3, atol=0)


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
    prompts = build_prompts(model, task if protocol == "answer" else reference_task, n=4)
    for setting in (prompts, prompts.zero_shot()):
        got = icl.capture(model, setting, fields=("next_log_probs",), batch_size=3, progress=False)
        assert got.next_log_probs is not None
        assert got.next_log_probs.shape == (4, model.d_vocab)
        assert got.attn_out is got.q is got.query_scores is None
        for query in range(4):  # where the label is predicted, also where more is recorded behind it
            expected = FullPrompts(model, setting).run(query)[0, -1].log_softmax(-1)
            torch.testing.assert_close(got.next_log_probs[query], expected, rtol=1e-4, atol=1e-4)
        one_token = [label for label, tokens in enumerate(prompts.labels) if len(tokens) == 1]
        first = [prompts.labels[label][0] for label in one_token]
        assert first
        assert torch.equal(got.next_log_probs[:, first], got.label_log_probs[:, one_token])


def test_next_tokens_are_kept_in_float32_also_at_half_precision(
    make_model: Callable[..., icl.Model], task: icl.Task
) -> None:
    model = make_model("llama", torch.bfloat16)
    got = icl.capture(model, build_prompts(model, task), fields=("next_log_probs",), progress=False).next_log_probs
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
    assert relative_error(zsl.label_log_probs[3], FullPrompts(llama, prompts.zero_shot()).label_log_probs(3)) < 1e-5


def test_only_the_fields_asked_for_are_kept(llama: icl.Model, prompts: Prompts) -> None:
    got = icl.capture(llama, prompts, fields=("q",), progress=False)
    assert got.q is not None
    assert got.attn_out is got.context_scores is got.demo_scores is got.query_scores is got.keys_values is None


def test_half_precision_is_captured_in_float32(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    model = make_model("llama", torch.bfloat16)
    prompts = build_prompts(model, task)
    got = icl.capture(model, prompts, progress=False)
    assert got.attn_out is not None
    assert got.attn_out.dtype == torch.float32
    assert relative_error(got.attn_out[1], FullPrompts(model, prompts).attn_out(1).float()) < 5e-2


def test_a_model_handed_in_comes_back_without_hooks(llama: icl.Model, prompts: Prompts) -> None:
    icl.capture(llama, prompts, progress=False)
    assert not any(point.fwd_hooks for point in llama.wrapped.hook_dict.values())


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
    with pytest.raises(ValueError, match=r"one token in each of the queries, got none in queries.6."):
        icl.capture(llama, dataclasses.replace(prompts, queries=(*prompts.queries[:6], ())), progress=False)


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
            assert relative_error(got.label_log_probs[at], whole.label_log_probs[query]) < 1e-5
            assert relative_error(got.query_scores[at], whole.query_scores[query, ..., :n_tokens]) < 1e-5


def test_predictions_and_accuracy_follow_the_log_probabilities(llama: icl.Model, prompts: Prompts) -> None:
    got = icl.capture(llama, prompts, fields=(), progress=False)
    assert got.predictions.tolist() == [int(row[1] > row[0]) for row in got.label_log_probs]
    sure = dataclasses.replace(got, label_log_probs=torch.nn.functional.one_hot(got.gold, 2).float() - 1)
    assert sure.accuracy == 1.0


def test_axes_are_labelled(llama: icl.Model, prompts: Prompts) -> None:
    got = icl.capture(llama, prompts, fields=ALL_FIELDS, progress=False)
    n_tokens = len(prompts.demonstration_positions)
    assert got.axes("demo_scores") == {"query": 7, "layer": 3, "head": 4, "demo_token": n_tokens}
    assert list(got.axes("q")) == ["query", "layer", "head", "d_head"]
    assert f"demo_scores[query=7 layer=3 head=4 demo_token={n_tokens}]" in repr(got)
    assert icl.capture(llama, prompts, fields=(), progress=False).axes("q") == {}


def test_a_capture_is_saved_and_loaded(llama: icl.Model, prompts: Prompts, tmp_path: Path) -> None:
    fields = (*icl.DECOMPOSE_FIELDS, "demo_scores")
    got, zero_shot = (icl.capture(llama, one, fields=fields, progress=False) for one in (prompts, prompts.zero_shot()))
    got.save(tmp_path / "capture")
    loaded = icl.Capture.load(tmp_path / "capture")
    assert loaded.prompts == prompts
    assert loaded.q is None
    assert loaded.demo_scores is not None
    assert got.demo_scores is not None
    assert torch.equal(loaded.demo_scores, got.demo_scores)
    assert repr(loaded) == repr(got)
    again = icl.decompose(llama, zero_shot=zero_shot, in_context=loaded)
    assert torch.equal(again.delta_icl, icl.decompose(llama, zero_shot=zero_shot, in_context=got).delta_icl)


def test_help_shows_what_each_field_holds() -> None:
    text = inspect.getdoc(icl.Capture)
    assert text is not None
    assert "attn_out (Float[Tensor, 'query layer d_model'] | None):\n        Attention output after W_O" in text
    for field in dataclasses.fields(icl.Capture):
        assert re.search(rf"^    {field.name} \(.*\):\n        [A-Z]", text, re.MULTILINE), field.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fields": "z"}, "expected fields as a list, tuple or set, got 'z' .*: pass a list of it"),
        ({"fields": ("z", "scores")}, r"expected fields\[1\] as one of .*, got 'scores'"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(
    llama: icl.Model, prompts: Prompts, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        icl.capture(llama, prompts, progress=False, **arguments)


def random_changes(model: icl.Model, seed: int, kinds: tuple[ProjectionName, ...] = ("Q", "K", "V", "O")) -> Any:
    """A change of every weight and bias of some projections, of the size of the weights."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, torch.Tensor] = {}
    for kind in kinds:
        for name in ("matrix", "bias"):
            parts = [getattr(projection, name) for projection in model.projections(kind)]
            if parts[0] is not None:
                stacked = torch.stack(parts)
                noise = torch.randn(stacked.shape, generator=generator, dtype=stacked.dtype)
                changes[f"{'W' if name == 'matrix' else 'b'}_{kind}"] = 0.3 * stacked.std() * noise
    return changes


def assert_each_is_that_of_its_change(model: icl.Model, prompts: Prompts, changes: list[Any], batch_size: int) -> None:
    """Check captures side by side against one at a time, each within its own change."""
    together = capture_changed(model, prompts, changes, batch_size=batch_size, progress=False)
    assert len(together) == len(changes)
    for got, change in zip(together, changes, strict=True):
        with changed_projections(model, change):
            expected = icl.capture(model, prompts, progress=False)
        assert got.fingerprint == expected.fingerprint
        assert got.prompts == expected.prompts
        assert got.residual < 1e-5
        for name in (*METRIC_FIELDS, "label_log_probs"):
            assert relative_error(getattr(got, name), getattr(expected, name)) < 1e-5, name
        assert (got.label_baselines is None) == (expected.label_baselines is None)
        if got.label_baselines is not None and expected.label_baselines is not None:
            assert relative_error(got.label_baselines, expected.label_baselines) < 1e-5
    first, second = (captured.attn_out for captured in together[:2])
    assert first is not None
    assert second is not None
    assert relative_error(first, second) > 1e-2, "changes that can be told apart"


@pytest.mark.parametrize("architecture", BRIDGED)
def test_captures_of_changes_side_by_side_are_those_of_each(
    models_by_architecture: Callable[[str], icl.Model], reference_task: icl.Task, task: icl.Task, architecture: str
) -> None:
    """With queries of several lengths, label words of several tokens, and tokens after the query."""
    model = models_by_architecture(architecture)
    changes = [random_changes(model, seed) for seed in range(3)]
    words = icl.Task("toy", task.template, ("no", "perhaps"), make_rows())
    assert_each_is_that_of_its_change(model, build_prompts(model, words, k=3).zero_shot(), changes, batch_size=64)
    assert_each_is_that_of_its_change(model, build_prompts(model, reference_task, k=3), changes[:2], batch_size=5)


def test_captures_of_changes_also_share_prefix_blocks_momentum_and_baselines(
    make_model: Callable[..., icl.Model], task: icl.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", torch.float64)
    changes = [random_changes(model, seed, ("K", "V")) for seed in range(3)]
    demonstrations, queries = task.demonstrations(4, seed=1), task.queries(7)
    prompts = icl.build_prompts(model, task, demonstrations, queries, scoring="calibrated")
    monkeypatch.setattr(shared_prefix, "PREFIX_BLOCK", 16)
    with icl.momentum_attention(model, 0.4):
        for setting in (prompts, prompts.zero_shot()):
            assert_each_is_that_of_its_change(model, setting, changes, batch_size=6)


def test_a_batch_of_changes_that_does_not_fit_is_halved(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [random_changes(llama, seed) for seed in range(2)]
    expected = capture_changed(llama, prompts, changes, progress=False)
    run, sizes = llama.run, list[int]()

    def fits_four(tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tokens, **kwargs)

    monkeypatch.setattr(llama, "run", fits_four)
    monkeypatch.setattr(shared_prefix, "BATCH_OVERHEAD", 10_000)  # as few batches as may be
    got = capture_changed(llama, prompts, changes, progress=False)
    assert sizes[:7] == [2, 14, 8, 4, 4, 4, 2], "the prefix, and then rows of both changes"
    for one, other in zip(got, expected, strict=True):
        for name in (*METRIC_FIELDS, "label_log_probs"):
            assert relative_error(getattr(one, name), getattr(other, name)) < 1e-5, name


@pytest.mark.parametrize(("batch_size", "largest"), [(64, 21), (7, 6), (2, 3)])
def test_rows_of_changes_share_the_batch_size(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, batch_size: int, largest: int
) -> None:
    changes = [random_changes(llama, seed) for seed in range(3)]
    run, sizes = llama.run, list[int]()

    def counted(tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        return run(tokens, **kwargs)

    monkeypatch.setattr(llama, "run", counted)
    monkeypatch.setattr(shared_prefix, "BATCH_OVERHEAD", 10_000)
    capture_changed(llama, prompts, changes, batch_size=batch_size, progress=False)
    assert max(sizes) == largest


def test_a_norm_that_overflows_is_an_error_that_names_the_layer(llama: icl.Model, prompts: Prompts) -> None:
    """Squares overflow before the numbers themselves do."""
    changes = random_changes(llama, 0, ("V",))
    changes["W_V"][1:] *= 1e30
    overflow = r"expected finite norms of the residual stream, got infinite ones, first after layer 1: check"
    with changed_projections(llama, changes), pytest.raises(NonFiniteError, match=overflow):
        icl.capture(llama, prompts, progress=False)


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("part", ["prefix", "rows"])
def test_large_numbers_of_one_run_hide_no_residual_of_another(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, wrong: int, part: str
) -> None:
    changes = [random_changes(llama, seed, ("V",)) for seed in range(2)]
    changes[1 - wrong]["W_V"] *= 1e4
    assert capture_changed(llama, prompts, changes, progress=False)[0].residual < 1e-4
    attend = AttentionRule.attend_masked

    def spoilt(rule: AttentionRule, q: torch.Tensor, *args: Any, **options: Any) -> Any:
        attended = attend(rule, q, *args, **options)
        # Rows of both runs, which attention over the cache stacks; or the prefix's last token, of both.
        if len(q) > 2 if part == "rows" else q.shape[:2] == (2, 1):
            attended.z.chunk(2)[wrong].mul_(1.01)
        return attended

    monkeypatch.setattr(AttentionRule, "attend_masked", spoilt)
    with pytest.raises(icl.UnsupportedModelError, match="expected attention recomputed from queries, keys and values"):
        capture_changed(llama, prompts, changes, progress=False)


def test_captures_of_changes_are_checked_as_others_are(make_model: Callable[..., icl.Model], prompts: Prompts) -> None:
    model = make_model("llama")
    changes = [random_changes(model, seed) for seed in range(2)]
    with pytest.raises(icl.PromptError, match="expected"):
        capture_changed(model, dataclasses.replace(prompts, queries=((10**6,), *prompts.queries[1:])), changes)
    capture_changed(model, prompts, changes, progress=False)
    assert model.pass_residual is not None, "the pass is compared with a plain one the first time"
    assert 0 < model.pass_residual < 1e-5


def test_captures_of_changes_side_by_side_add_a_vector_to_the_rows_of_each(
    make_model: Callable[..., icl.Model], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the stream, at each row's token that predicts the label."""
    model = make_model("llama")
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model, "stream_changes", (StreamChange(1, vector),))
    changes = [random_changes(model, seed) for seed in range(2)]
    assert_each_is_that_of_its_change(model, prompts, changes, batch_size=64)


def test_captures_of_changes_side_by_side_run_long_prefixes_whole(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    """Long-context scaling rotates keys by the length of what runs."""
    model = make_model("llama")
    model.rope_scaling_threshold = 10_000
    changes = [random_changes(model, seed) for seed in range(2)]
    assert_each_is_that_of_its_change(model, prompts, changes, batch_size=64)


def test_progress_of_captures_side_by_side_counts_queries(
    llama: icl.Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars, progress_bar = list[Any](), capture_module.progress_bar

    def kept(**options: Any) -> Any:
        bars.append(progress_bar(**options))
        return bars[-1]

    monkeypatch.setattr(capture_module, "progress_bar", kept)
    capture_changed(llama, prompts, [random_changes(llama, seed) for seed in range(3)])
    assert (bars[0].n, bars[0].total) == (7, 7)
