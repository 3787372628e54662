"""`HookedTransformer` against itself: against the bridge of the same weights, and against its own hooks and cache."""

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import hooked
import pytest
import torch
from hooked import construct, hand_made, hooked_transformer
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import icl_dual as icl
from icl_dual.assets import model_files
from icl_dual.models import Control, ProjectionName
from icl_dual.prompts import PromptError, Prompts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hooked_transformer.md").read_text()
LR = 0.05
TOY_LR = 1e-3
FIELDS = (*icl.DECOMPOSE_FIELDS, "q", "context_scores", "query_scores", "next_log_probs")

if hooked.HookedTransformer is None:
    pytest.skip("transformer-lens 4 has no HookedTransformer", allow_module_level=True)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


PLAIN = {
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": 128,
    "d_vocab": 40,
    "attn_only": True,
    "normalization_type": None,
}


def toy(**settings: Any) -> Any:
    """An attention-only model made by hand, with random weights and biases large enough to matter."""
    made = construct(hand_made(**(PLAIN | settings)))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in made.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "W_" in name else 0.1))
    return made.eval()


def toy_prompts(n_pairs: int = 6, queries: tuple[int, ...] = (5, 9, 11), start: tuple[int, ...] = (0,)) -> Prompts:
    """Pairs of tokens behind a start token: `x y x y … x`."""
    pairs = tuple((1 + index % 12, 30 + index % 4) for index in range(n_pairs))
    return Prompts(
        start=start,
        demonstrations=pairs,
        demonstration_label_lengths=(1,) * n_pairs,
        queries=tuple((query, 20 + query % 3)[: 1 + at % 2] for at, query in enumerate(queries)),
        labels=((30,), (31,), (32, 33)),
        gold=tuple(at % 3 for at in range(len(queries))),
    )


TOYS: dict[str, dict[str, Any]] = {
    "no norm": {},
    "LayerNorm": {"normalization_type": "LN"},
    "LayerNorm without weights": {"normalization_type": "LNPre"},
    "RMSNorm without weights": {"normalization_type": "RMSPre"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "rotary": {"positional_embedding_type": "rotary"},
    "neighbouring pairs rotated, part of them": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "rotary_adjacent_pairs": True,
    },
    "ALiBi": {"positional_embedding_type": "alibi"},
    "grouped queries": {"n_key_value_heads": 2},
    "one key-value head": {"n_key_value_heads": 1, "positional_embedding_type": "rotary"},
    "window": {"use_local_attn": True, "attn_types": ["local", "global"], "window_size": 6},
    "scores divided by the layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"use_attn_scale": False},
    "capped scores": {"attn_scores_soft_cap": 0.5},
    "sinks": {"use_attention_sinks": True},
    "normed queries and keys": {"use_qk_norm": True, "n_key_value_heads": 2, "positional_embedding_type": "rotary"},
    "normed queries and keys, no rotation": {"use_qk_norm": True},
    "norms over all heads, norms after": {
        "original_architecture": "Olmo2ForCausalLM",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
    },
    "MLP": {"attn_only": False, "d_mlp": 48, "act_fn": "gelu", "normalization_type": "LN"},
    "parallel MLP": {"attn_only": False, "d_mlp": 48, "act_fn": "gelu", "parallel_attn_mlp": True},
    "MLP behind post-norms": {
        "attn_only": False,
        "d_mlp": 48,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "use_normalization_before_and_after": True,
        "output_logits_soft_cap": 5.0,
    },
}


def its_own(wrapped: Any, tokens: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the class shows of a full prompt by its own cache, at the last position; attention's output by layer."""
    outputs: list[torch.Tensor] = []
    handles = [
        block.attn.register_forward_hook(lambda module, args, output: outputs.append(output[0, -1]))
        for block in wrapped.blocks
    ]
    with torch.no_grad():
        logits, cache = wrapped.run_with_cache(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    layers = range(wrapped.cfg.n_layers)
    kinds = {"z": "hook_z", "pattern": "hook_pattern"}
    shown = {name: [cache[f"blocks.{layer}.attn.{hook}"] for layer in layers] for name, hook in kinds.items()}
    z = torch.stack([found[0, -1] for found in shown["z"]])
    pattern = torch.stack([found[0, :, -1] for found in shown["pattern"]])
    return logits[0, -1].log_softmax(-1), {"z": z, "attn_out": torch.stack(outputs), "pattern": pattern}


@pytest.mark.parametrize("start", [(0,), ()])
@pytest.mark.parametrize("name", TOYS)
def test_captures_and_decompositions_are_what_the_class_itself_shows(name: str, start: tuple[int, ...]) -> None:
    wrapped = toy(**TOYS[name])
    model, prompts = icl.Model(wrapped, name="toy"), toy_prompts(start=start)
    in_context, zsl = (icl.capture(model, one, fields=FIELDS, progress=False) for one in (prompts, prompts.zero_shot()))
    split = icl.decompose(model, zero_shot=zsl, in_context=in_context)
    assert split.residual < 2e-6
    n_start, n_prefix = len(prompts.start), len(prompts.prefix)
    for captured in (in_context, zsl):
        prefix = captured.prompts.prefix
        for at, query in enumerate(prompts.queries):
            log_probs, expected = its_own(wrapped, [*prefix, *query])
            assert captured.next_log_probs is not None
            torch.testing.assert_close(captured.next_log_probs[at], log_probs, atol=1e-5, rtol=1e-5)
            for field in ("z", "attn_out"):
                assert relative(getattr(captured, field)[at], expected[field]) < 1e-5
            if captured is in_context:
                shares = expected["pattern"][..., n_start:n_prefix].sum(-1)
                torch.testing.assert_close(split.demonstration_mass[at].float(), shares, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", [(0,), ()])
@pytest.mark.parametrize("name", TOYS)
def test_finetuning_is_sgd_on_the_classes_own_keys_and_values(name: str, start: tuple[int, ...]) -> None:
    """One step by hand on a copy: the loss of the class itself, and the gradients where it keeps keys and values."""
    wrapped = toy(**TOYS[name], dtype=torch.float64)
    prompts = replace(toy_prompts(n_pairs=1, start=start), demonstrations=((1, 30, 2, 31),))
    model = icl.Model(wrapped, name="toy")
    before = [parameter.detach().clone() for parameter in wrapped.parameters()]
    factors = name != "shortformer"
    delta = icl.finetune(
        model, prompts, lr=TOY_LR, factors=factors, config=icl.FinetuneConfig(trained="attention"), progress=False
    )
    assert all(torch.equal(*pair) for pair in zip(before, wrapped.parameters(), strict=True))
    assert delta.factors is None or delta.factors.residual < 1e-6
    twin = copy.deepcopy(wrapped)
    ids = torch.tensor([[*prompts.start, *prompts.demonstrations[0]]])
    twin(ids, return_type="loss").backward()
    for layer, block in enumerate(twin.blocks):
        own = {kind: "_" * (kind in "KV" and hasattr(block.attn, "_W_K")) for kind in "QKVO"}
        grads = {kind: getattr(block.attn, f"{own[kind]}W_{kind}").grad for kind in own}
        expected = {f"W_{kind}": grads[kind].transpose(1, 2).flatten(0, 1) for kind in "QKV"}
        expected["W_O"] = grads["O"].flatten(0, 1).T
        expected |= {f"b_{kind}": getattr(block.attn, f"{own[kind]}b_{kind}").grad.flatten() for kind in own}
        for field, gradient in expected.items():
            torch.testing.assert_close(getattr(delta, field)[layer], -TOY_LR * gradient, atol=1e-12, rtol=1e-7)


def test_several_finetunings_go_one_by_one() -> None:
    """The class multiplies with its parameters in no module of their own, to which something could be added."""
    model, prompts, rates = icl.Model(toy()), toy_prompts(n_pairs=2), [1e-4, 2e-4]
    for found, lr in zip(icl.finetune_many(model, [prompts] * 2, rates, progress=False), rates, strict=True):
        assert isinstance(found, icl.WeightDelta)
        assert torch.equal(found.W_V, icl.finetune(model, prompts, lr=lr, progress=False).W_V)


def test_factors_of_keys_and_values_with_inputs_of_their_own_are_refused() -> None:
    """Shortformers add positions to what queries and keys are projected from, and not to what values are."""
    model = icl.Model(toy(**TOYS["shortformer"]))
    with pytest.raises(icl.UnsupportedModelError, match=r"W_V to be the sum .* keys and values have different inputs"):
        icl.finetune(model, toy_prompts(), lr=TOY_LR, factors=True, progress=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, options)
            for name in ("normed queries and keys", "grouped queries")
            for options in (
                ("ungroup_grouped_query_attention",),
                ("use_split_qkv_input",),
                ("use_split_qkv_input", "ungroup_grouped_query_attention"),
                ("use_attn_result",),
            )
        ),
        ("MLP", ("use_split_qkv_input", "use_attn_result")),
        ("MLP", ("use_attn_in", "use_hook_mlp_in")),
    ],
)
def test_what_the_hooks_are_set_to_show_changes_nothing(name: str, options: tuple[str, ...]) -> None:
    plain, optioned = (toy(**TOYS[name], dtype=torch.float64) for _ in range(2))
    prompts, same = toy_prompts(), partial(torch.testing.assert_close, atol=1e-12, rtol=1e-7)
    for option in options:
        getattr(optioned, f"set_{option}")(True)
    results = []
    for wrapped in (plain, optioned):
        model = icl.Model(wrapped, name="toy")
        captured = icl.capture(model, prompts, fields=FIELDS, progress=False)
        delta = icl.finetune(model, prompts, lr=TOY_LR, factors=True, progress=False)
        with icl.momentum_attention(model, torch.tensor([0.2, 0.8] * (model.n_heads // 2))):
            results.append((captured, delta, icl.capture(model, prompts, fields=("attn_out",), progress=False)))
    (captured, delta, pulled), (other, moved, also_pulled) = results
    same(also_pulled.attn_out, pulled.attn_out)
    assert captured.keys_values is not None
    assert other.keys_values is not None
    for field in ("z", "attn_out", "q", "q_scored", "context_scores", "query_scores"):
        same(getattr(other, field), getattr(captured, field))
    same(other.keys_values.demo_keys, captured.keys_values.demo_keys)
    for field in ("W_K", "W_V", "b_V", "training_q", "training_k"):
        same(getattr(moved, field), getattr(delta, field))
    assert all(getattr(optioned.cfg, option) for option in options)


@pytest.mark.parametrize(
    ("architecture", "dtype", "rounding"),
    [
        ("gpt2", torch.float32, 1e-5),
        ("gpt2", torch.float64, 1e-11),
        ("llama", torch.float32, 1e-5),
        ("neox", torch.float32, 1e-5),
    ],
)
def test_the_same_weights_behind_a_bridge_give_the_same_numbers(
    make_model: Callable[..., icl.Model], task: icl.Task, architecture: str, dtype: torch.dtype, rounding: float
) -> None:
    """Captures, delta, decomposition, updates and metrics, everything that is kept of them."""
    found = []
    for kind in (architecture, f"hooked-{architecture}"):
        model = make_model(kind, dtype, name=architecture)
        prompts = icl.build_prompts(model, task, task.demonstrations(6, seed=1), task.queries(7))
        in_context, zsl = (
            icl.capture(model, one, fields=FIELDS, progress=False) for one in (prompts, prompts.zero_shot())
        )
        delta = icl.finetune(model, prompts, lr=LR, progress=False)
        with delta.applied(model):
            ft = icl.capture(model, prompts.zero_shot(), progress=False)
        split, updates = (
            icl.decompose(model, zero_shot=zsl, in_context=in_context),
            icl.compare_updates(model, zero_shot=zsl, in_context=in_context, delta=delta),
        )
        results = {
            "in_context": in_context,
            "zsl": zsl,
            "delta": delta,
            "finetuned": ft,
            "split": split,
            "updates": updates,
        }
        kept = {f"{name}.{field}": value for name, one in results.items() for field, value in vars(one).items()}
        found.append(
            (prompts, kept | icl.compare(zero_shot=zsl, in_context=in_context, finetuned=ft, delta=delta).per_layer)
        )
    (prompts, numbers), (other_prompts, others) = found
    assert prompts == other_prompts
    assert {
        "SimAOU",
        "Kendall",
        "split.delta_icl",
        "updates.cosine",
        "delta.W_K",
        "in_context.attn_out",
    } <= numbers.keys()
    for name, value in numbers.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if name == "delta.b_K":  # rounding alone: a softmax does not know it
            assert (others[name] - value).norm() < rounding
            continue
        assert torch.equal(others[name].isnan(), value.isnan()), name
        # Steps of SGD amplify rounding, and so do arccosines of nearly 1.
        loose = 10 if "angles" in name else 1 if name.startswith(("in_context.", "zsl.", "split.")) else 3
        # A token that stands twice in the demonstrations has two equal scores, which rounding puts in either order.
        loose = (1000 if dtype is torch.float32 else 100) if name.startswith("Kendall") else loose
        off = (others[name] - value).nan_to_num().norm()
        assert off <= loose * rounding * value.nan_to_num().norm(), name


def test_the_real_model_converted_gives_what_its_bridge_gives() -> None:
    bridged, folder = icl.load_model("smollm2-135m"), model_files("smollm2-135m").folder
    converted = hooked_transformer(AutoModelForCausalLM.from_pretrained(folder), folder, bridged.tokenizer)
    other = icl.Model(converted, name="smollm2-135m")
    task = icl.load_task("sst2")
    prompts = icl.build_prompts(bridged, task, task.demonstrations(4, seed=1), task.queries(4))
    assert icl.build_prompts(other, task, task.demonstrations(4, seed=1), task.queries(4)) == prompts
    captures = []
    for model in (bridged, other):
        in_context, zsl = (
            icl.capture(model, one, fields=FIELDS, progress=False) for one in (prompts, prompts.zero_shot())
        )
        split = icl.decompose(model, zero_shot=zsl, in_context=in_context)
        assert split.residual < 2e-6
        captures.append((in_context, split))
    (in_context, split), (other_run, other_split) = captures
    for field in ("z", "attn_out", "q", "q_scored", "context_scores", "query_scores"):
        assert relative(getattr(other_run, field), getattr(in_context, field)) < 1e-5, field
    assert relative(other_split.delta_icl, split.delta_icl) < 1e-5
    torch.testing.assert_close(other_run.label_log_probs, in_context.label_log_probs, atol=1e-4, rtol=1e-4)


def test_an_architecture_without_biases_has_none_and_a_model_made_by_hand_has_its_own(
    make_model: Callable[..., icl.Model], prompts: Prompts
) -> None:
    converted = make_model("hooked-llama")
    assert [projection.b for kind in get_args(ProjectionName) for projection in converted.projections(kind)] == [
        None
    ] * 12
    assert icl.finetune(converted, prompts, lr=TOY_LR, progress=False).b_V is None
    fresh = icl.Model(construct(toy().cfg))  # biases start at zero, and are trained all the same
    assert fresh.value_biases() is not None
    delta = icl.finetune(fresh, toy_prompts(), lr=TOY_LR, progress=False)
    assert delta.b_V is not None
    assert delta.b_V.abs().max() > 0


def test_biases_that_are_zero_before_training_are_trained_as_the_bridge_trains_them(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    hf_model = make_hf_model("neox")
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    converted = hooked_transformer(hf_model, tmp_path, tokenizer)
    bridge = TransformerBridge.boot_transformers("neox", hf_model=hf_model, tokenizer=tokenizer, device="cpu")
    models = [icl.Model(made, name="neox") for made in (converted, bridge)]
    ours, theirs = (icl.finetune(model, toy_prompts(), lr=LR, progress=False) for model in models)
    assert ours.b_V is not None
    assert theirs.b_V is not None
    assert relative(ours.b_V, theirs.b_V) < 1e-4
    assert relative(ours.W_V, theirs.W_V) < 1e-4


@pytest.mark.parametrize("kind", ["captured", "decomposed", "finetuned", "failed"])
def test_it_comes_back_as_it_was(kind: str) -> None:
    wrapped = toy(**TOYS["normed queries and keys"])
    wrapped.train()
    wrapped.blocks[0].eval()
    before, flags = copy.deepcopy(wrapped.state_dict()), [p.requires_grad for p in wrapped.parameters()]
    settings = copy.deepcopy(vars(wrapped.cfg))
    model, prompts = icl.Model(wrapped, name="toy"), toy_prompts()
    if kind == "finetuned":
        with icl.finetune(model, prompts, lr=TOY_LR, factors=True, progress=False).applied(model):
            assert not torch.equal(wrapped.blocks[0].attn._W_K, before["blocks.0.attn._W_K"])
    elif kind == "failed":

        def fail(layer: int, attention: Any) -> None:
            raise KeyError(layer)

        with pytest.raises(KeyError):
            model.run(torch.tensor([[0, 1, 2]]), on_attention=fail, on_output=lambda layer, output: None)
    else:
        in_context, zero_shot = (
            icl.capture(model, one, fields=FIELDS, progress=False) for one in (prompts, prompts.zero_shot())
        )
        if kind == "decomposed":
            icl.decompose(model, zero_shot=zero_shot, in_context=in_context)
    after = wrapped.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert flags == [parameter.requires_grad for parameter in wrapped.parameters()]
    assert wrapped.training
    assert not wrapped.blocks[0].training
    assert wrapped.blocks[1].attn.training
    assert vars(wrapped.cfg) == settings
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in wrapped.modules())
    assert not any(point.fwd_hooks for point in wrapped.hook_dict.values())


def test_a_users_own_hook_stays_and_counts(prompts: Prompts) -> None:
    wrapped, asked = toy(), toy_prompts()
    wrapped.add_hook("blocks.0.hook_resid_pre", lambda residual, hook: residual * 1.5)
    captured = icl.capture(icl.Model(wrapped), asked, progress=False)
    assert captured.attn_out is not None
    _, expected = its_own(wrapped, [*asked.prefix, *asked.queries[1]])
    assert relative(captured.attn_out[1], expected["attn_out"]) < 1e-5
    assert len(wrapped.hook_dict["blocks.0.hook_resid_pre"].fwd_hooks) == 1


def test_a_users_hook_gets_the_copies_that_the_class_makes() -> None:
    """Passes of ours multiply with weights as they lie; what a hook changes may then be the weight itself."""
    wrapped = toy()
    before = wrapped.unembed.W_U.clone()

    def centre_a_copy(residual: torch.Tensor, hook: Any) -> None:
        copied = wrapped.unembed.W_U.T.contiguous()
        copied -= copied.mean()

    wrapped.add_hook("unembed.hook_in", centre_a_copy)
    icl.capture(icl.Model(wrapped), toy_prompts(), progress=False)
    assert torch.equal(wrapped.unembed.W_U, before)


@pytest.mark.parametrize("positional", ["standard", "rotary", "alibi"])
@pytest.mark.parametrize("n_ctx", [5, 8, 15, 31])
def test_a_context_that_the_prompts_just_fit_is_enough_and_one_less_is_refused(positional: str, n_ctx: int) -> None:
    query = (5, 7)[: 1 + (n_ctx - 2) % 2]
    fit = replace(toy_prompts(n_pairs=(n_ctx - 2) // 2), queries=(query,), gold=(0,), labels=((30,),))
    assert len(fit.prefix) + len(query) == n_ctx
    model = icl.Model(toy(n_ctx=n_ctx, positional_embedding_type=positional), name="toy")
    assert icl.capture(model, fit, progress=False).residual < 1e-5
    longer = replace(fit, queries=((*query, 9),))
    with pytest.raises(PromptError, match=rf"at most {n_ctx} tokens, the context of toy, got one of {n_ctx + 1}"):
        icl.capture(model, longer, progress=False)


def test_an_intervention_on_attention_that_hooks_do_not_show_is_refused() -> None:
    wrapped = toy()
    wrapped.add_hook("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0.9)
    with pytest.raises(
        icl.UnsupportedModelError, match=r"layer 1: expected attention recomputed from queries, keys and values"
    ):
        icl.capture(icl.Model(wrapped), toy_prompts(), progress=False)


def test_positions_past_the_table_of_angles() -> None:
    """The class makes its table for 2048 positions, and more when so many tokens run at once; ours run in parts."""
    wrapped = toy(positional_embedding_type="rotary", n_ctx=3000)
    prompts = toy_prompts(n_pairs=1100)
    captured = icl.capture(icl.Model(wrapped), prompts, progress=False)
    assert captured.attn_out is not None
    _, expected = its_own(wrapped, [*prompts.prefix, *prompts.queries[0]])
    assert relative(captured.attn_out[0], expected["attn_out"]) < 1e-5


@pytest.mark.parametrize("positions", [[3, 3, 4], [0, 2, 1], [-1, 0, 1]])
def test_positions_that_do_not_ascend_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="expected positions from 0 in strictly ascending order, got"):
        icl.Model(toy()).run(torch.tensor([[1, 2, 3]]), positions=torch.tensor(positions))


@pytest.mark.parametrize(
    ("processing", "words"),
    [
        ({"fold_ln": True}, "folded norms"),
        ({"center_writing_weights": True}, "centred writing weights"),
        ({"fold_value_biases": True}, "folded value biases"),
        ({"refactor_factored_attn_matrices": True}, "refactored attention matrices"),
        (dict.fromkeys(hooked.RAW, True), "folded norms"),
    ],
)
def test_processed_weights_are_refused(
    make_hf_model: Callable[..., PreTrainedModel], tmp_path: Path, processing: dict[str, bool], words: str
) -> None:
    wrapped = hooked_transformer(make_hf_model("gpt2"), tmp_path, None, **processing)
    with pytest.raises(
        icl.UnsupportedModelError, match=rf"expected raw weights, got .* {words}.*from_pretrained_no_processing"
    ):
        icl.Model(wrapped)


@pytest.mark.parametrize("name", ["LayerNorm", "MLP"])
def test_processing_a_model_made_by_hand_is_seen(name: str) -> None:
    wrapped = toy(**TOYS[name])
    icl.Model(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.process_weights_()
    with pytest.raises(icl.UnsupportedModelError, match=r"folded norms.* pass the model from before process_weights_"):
        icl.Model(wrapped)


@pytest.mark.parametrize("circuit", ["orthogonal outputs", "values and outputs in blocks", "queries alone have biases"])
def test_circuits_made_by_hand_are_raw(circuit: str) -> None:
    wrapped = toy()
    with torch.no_grad():
        for attn in (block.attn for block in wrapped.blocks):
            if circuit == "orthogonal outputs":
                for head in attn.W_O:
                    nn.init.orthogonal_(head)
            elif circuit == "values and outputs in blocks":
                for weight in (attn.W_O, attn.W_V.mT):
                    weight.copy_(torch.eye(32).view(4, 8, 32))
            else:
                for bias in (attn.b_K, attn.b_V, attn.b_O):
                    bias.zero_()
    assert icl.capture(icl.Model(wrapped), toy_prompts(), progress=False).residual < 1e-5


def test_a_class_that_needs_more_than_a_configuration_has_no_untrained_control() -> None:
    parent: Any = hooked.HookedTransformer

    class Larger(parent):
        def __init__(self, cfg: Any, factor: float) -> None:
            super().__init__(cfg)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = icl.Model(Larger(toy().cfg, 2.0), name="larger")
    with pytest.raises(
        icl.UnsupportedModelError, match="larger: expected Larger to be constructed from its configuration al"
    ):
        icl.control_model(model, "untrained", seed=1)


def test_a_centred_unembedding_changes_no_probability_and_is_taken(
    make_hf_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    results = []
    for options in ({}, {"center_unembed": True}):
        model = icl.Model(hooked_transformer(make_hf_model("gpt2", torch.float64), tmp_path, None, **options))
        captured = icl.capture(model, toy_prompts(), progress=False)
        results.append((captured.label_log_probs, icl.finetune(model, toy_prompts(), lr=TOY_LR, progress=False).W_V))
    for first, second in zip(*results, strict=True):
        assert relative(second, first) < 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention_dir": "bidirectional"}, "bidirectional attention"),
        ({"d_vocab_out": 7}, "different input and output vocabularies"),
        ({"clip_qkv": 1.0}, "clamped queries, keys and values"),
        ({"use_logn_attn": True}, "queries scaled by the logarithm"),
    ],
)
def test_what_cannot_be_split_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(icl.UnsupportedModelError, match=f"HookedTransformer 'custom': expected a causal .* {words}"):
        icl.Model(construct(hand_made(**(PLAIN | settings))))


def test_a_model_on_another_device_than_its_configuration_is_refused() -> None:
    wrapped = toy()
    wrapped.cfg.device = "cuda"
    with pytest.raises(
        icl.UnsupportedModelError, match=r"configuration, cuda, got weights on cpu .* model\.to\(device"
    ):
        icl.Model(wrapped)


def test_an_encoder_is_refused() -> None:
    encoder = hooked.module("HookedEncoder").HookedEncoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = encoder(
            hand_made(d_model=16, d_head=8, n_heads=2, n_layers=1, n_ctx=16, d_vocab=20, act_fn="gelu", d_mlp=8)
        )
    with pytest.raises(icl.UnsupportedModelError, match=r"expected a TransformerBridge .*, got HookedEncoder"):
        icl.Model(made)


def test_text_needs_a_tokenizer(task: icl.Task) -> None:
    with pytest.raises(
        icl.UnsupportedModelError, match=r"expected a model with a tokenizer .* build icl_dual\.Prompts from token ids"
    ):
        icl.build_prompts(icl.Model(toy()), task, task.demonstrations(2, seed=1), task.queries(2))


def test_its_tokenizer_is_used(make_model: Callable[..., icl.Model], task: icl.Task) -> None:
    bridged, own = make_model("gpt2"), make_model("hooked-gpt2")
    asked = task.demonstrations(2, seed=1), task.queries(3)
    assert icl.build_prompts(own, task, *asked) == icl.build_prompts(bridged, task, *asked)


@pytest.mark.parametrize("control", get_args(Control))
def test_controls_are_drawn_as_the_class_draws(make_model: Callable[..., icl.Model], control: Control) -> None:
    model = make_model("hooked-qwen2")
    state, before = torch.get_rng_state(), model.fingerprint()
    made = icl.control_model(model, control, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.fingerprint() == before
    again, other = (icl.control_model(model, control, seed=seed) for seed in (3, 4))
    assert made.fingerprint() == again.fingerprint() != other.fingerprint()
    trained = dict(model.wrapped.named_parameters())
    for name, parameter in made.wrapped.named_parameters():
        if control == "random-blocks" and not re.search(r"blocks\.\d\.(attn|mlp)\.", name):
            assert parameter.data_ptr() == trained[name].data_ptr(), name
        elif "W_" in name:
            deviation = model.wrapped.cfg.initializer_range
            assert parameter.std().item() == pytest.approx(deviation, rel=4.5 / parameter.numel() ** 0.5), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith(".w")))), name
    biased = {kind for kind in get_args(ProjectionName) if made.projections(kind)[0].b is not None}
    assert biased == {"Q", "K", "V"}, "biases that start at zero are biases"
    assert (made.dtype, made.device, made.tokenizer) == (model.dtype, model.device, model.tokenizer)


def test_a_cell_runs_on_a_model_that_is_handed_in(
    make_model: Callable[..., icl.Model], task: icl.Task, tmp_path: Path
) -> None:
    results = []
    for kind in ("llama", "hooked-llama"):
        model = make_model(kind, name="mine")
        cell = icl.Cell("mine", "toy", k=4, seed=1, lr=LR, n_queries=6)
        results.append(icl.run_cell(model, task, cell, tmp_path / kind, progress=False))
    first, second = (result.comparison.per_layer["SimAOU"] for result in results)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_the_page_runs_and_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(block, scope)
    models = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Model(")]
    assert [line.split("'")[1] for line in models] == ["random weights", "smollm2-135m, converted"]
    assert "n_key_value_heads=3" in models[1]
    assert scope["split"].residual < 2e-6
    assert scope["in_context"].accuracy > 0.9
    assert scope["zero_shot"].accuracy < 0.5
    assert scope["finetuned"].accuracy < 0.5
    assert scope["updates"].cosine.isfinite().all()
