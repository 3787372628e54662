"""Every configuration of docs/architectures.md, against a plain transformers model with eager attention.

Nothing of TransformerLens and of this library is in the reference `Plain`: only a transformers model and torch.
"""

import copy
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import EXACT, REFUSED
from helpers import relative_error
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import icl_dual as icl
from icl_dual.models.bridge import boot

pytestmark = pytest.mark.skipif(version("transformer-lens") < "4", reason="the page is of transformer-lens 4.3")

LR = 0.05
LOGITS, OUTPUT, UPDATE, DELTA = 2e-6, 5e-6, 5e-6, 1e-4
"""The largest relative errors: of logits, attention output, direct and inherited update, and ΔW. What a sink takes is
not in a pattern, and known to rounding only."""

_IDS = torch.randint(2, 300, (80,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = icl.Prompts(
    start=(2,),
    demonstrations=tuple(tuple(_IDS[17 * at : 17 * at + 17]) for at in range(3)),
    demonstration_label_lengths=(1, 1, 1),
    queries=(tuple(_IDS[51:58]), tuple(_IDS[58:68])),
    labels=((5,), (7,)),
    gold=(0, 1),
)
"""Demonstrations that no window covers, and two queries of unequal length."""


class Plain:
    """A transformers model, and what a forward pass of it holds at the last position."""

    def __init__(self, hf_model: Any) -> None:
        self.model, self.name = hf_model, type(hf_model).__name__
        self.has_sinks = any(name.endswith("sinks") for name, _ in hf_model.named_parameters())
        modules = dict(hf_model.named_modules())
        self.output = [m for name, m in modules.items() if re.search(r"att\w*\.(o_proj|out_proj|c_proj|dense)$", name)]
        self.separate = {
            kind: [m for name, m in modules.items() if re.search(rf"att\w*\.{kind}_proj$", name)] for kind in "kv"
        }
        self.fused = [
            m
            for name, m in modules.items()
            if re.search(r"att\w*\.(c_attn|Wqkv|qkv_proj|query_key_value)$|attn\.Wqkv$", name)
        ]

    def keys_and_values(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of keys and values of a fused projection, whose features are the last axis."""
        n_heads = self.model.config.num_attention_heads
        d_head = self.model.config.hidden_size // n_heads
        width, d_model = fused.shape[-1], n_heads * d_head
        if self.name == "CodeGenForCausalLM":  # four partitions of queries, values and keys
            by_partition = fused.unflatten(-1, (4, 3, -1))
            return by_partition[..., 2, :].flatten(-2), by_partition[..., 1, :].flatten(-2)
        if self.name in ("GPTNeoXForCausalLM", "BloomForCausalLM") or (
            self.name == "FalconForCausalLM" and width == 3 * d_model
        ):
            by_head = fused.unflatten(-1, (n_heads, 3, d_head))
            return by_head[..., 1, :].flatten(-2), by_head[..., 2, :].flatten(-2)
        _, k, v = fused.split((d_model, (width - d_model) // 2, (width - d_model) // 2), dim=-1)
        return k, v

    def run(self, tokens: tuple[int, ...], demonstrations: range) -> dict[str, Any]:
        """Return logits, and by layer the attention output and the direct update of the demonstrations."""
        values: list[Tensor] = []
        outputs: list[Tensor] = []
        handles = [m.register_forward_hook(lambda m, a, out: outputs.append(out[0, -1])) for m in self.output]
        handles += [m.register_forward_hook(lambda m, a, out: values.append(out[0])) for m in self.separate["v"]]
        handles += [
            m.register_forward_hook(lambda m, a, out: values.append(self.keys_and_values(out)[1][0]))
            for m in self.fused
        ]
        with torch.no_grad():
            result = self.model(torch.tensor([tokens]), output_attentions=True)
            for handle in handles:
                handle.remove()
            direct = []
            for module, pattern, v in zip(self.output, result.attentions, values, strict=True):
                weights = pattern[0, :, -1].double()
                by_head = v.double().unflatten(-1, (-1, module_width(module) // len(weights))).transpose(0, 1)
                by_head = by_head.repeat_interleave(len(weights) // len(by_head), dim=0)
                others = weights.clone()
                others[:, demonstrations] = 0
                sink = 1 - weights.sum(-1) if self.has_sinks else 0
                z_0 = torch.einsum("hk,hkd->hd", others, by_head) / (others.sum(-1) + sink)[:, None]
                change = (torch.einsum("hk,hkd->hd", weights, by_head) - z_0).float().flatten()[None]
                direct.append(module(change)[0] - module(torch.zeros_like(change))[0])
        return {"logits": result.logits[0, -1], "attn_out": torch.stack(outputs), "direct": torch.stack(direct)}

    def updates(self, tokens: tuple[int, ...], lr: float) -> tuple[Tensor, Tensor]:
        """Return ΔW_K and ΔW_V of a step of SGD on the cross-entropy of all tokens but the first, by layer."""
        ids = torch.tensor([tokens])
        loss = nn.functional.cross_entropy(self.model(ids).logits[0, :-1], ids[0, 1:])
        modules = self.fused or self.separate["k"] + self.separate["v"]
        gradients = torch.autograd.grad(loss, [module.weight for module in modules])
        if not self.fused:
            n = len(self.separate["k"])
            return torch.stack(gradients[:n]) * -lr, torch.stack(gradients[n:]) * -lr
        # Features last: Linear has them first, Conv1D last.
        features = [g.T if isinstance(m, nn.Linear) else g for m, g in zip(modules, gradients, strict=True)]
        k, v = zip(*map(self.keys_and_values, features), strict=True)
        return torch.stack(k).mT * -lr, torch.stack(v).mT * -lr


def module_width(output: nn.Module) -> int:
    """The number of features that an output projection reads."""
    weight: Any = output.weight
    return weight.shape[1] if isinstance(output, nn.Linear) else weight.shape[0]


@pytest.fixture
def make_pair(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], tuple[Plain, icl.Model]]:
    """A plain model, and the same weights behind a bridge."""

    def make(name: str) -> tuple[Plain, icl.Model]:
        hf_model = make_hf_model(name)
        hf_model.config._attn_implementation = "eager"
        plain = Plain(copy.deepcopy(hf_model))
        return plain, icl.Model(boot("tiny", hf_model, tokenizer, "cpu", torch.float32), name=name)

    return make


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_configuration_is_the_plain_model(
    make_pair: Callable[[str], tuple[Plain, icl.Model]], name: str
) -> None:
    plain, model = make_pair(name)
    assert model.architecture == EXACT[name].architecture
    captures = [
        icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
        for prompts in (PROMPTS.zero_shot(), PROMPTS)
    ]
    zero_shot, in_context = captures
    split = icl.decompose(model, zero_shot=zero_shot, in_context=in_context)
    assert split.residual < 2e-6
    by_setting = []
    for prompts, capture in zip((PROMPTS.zero_shot(), PROMPTS), captures, strict=True):
        expected = [plain.run((*prompts.prefix, *query), range(1, len(prompts.prefix))) for query in prompts.queries]
        by_setting.append({key: torch.stack([run[key] for run in expected]) for key in expected[0]})
        with torch.no_grad():
            for query, run in zip(prompts.queries, expected, strict=True):
                logits = model.run(torch.tensor([[*prompts.prefix, *query]]))[0, -1]
                assert relative_error(logits, run["logits"]) < LOGITS
        log_probs = by_setting[-1]["logits"].log_softmax(-1)[:, [5, 7]]
        torch.testing.assert_close(capture.label_log_probs.float(), log_probs, atol=1e-5, rtol=1e-5)
        assert capture.attn_out is not None
        assert relative_error(capture.attn_out, by_setting[-1]["attn_out"]) < OUTPUT
    realised = by_setting[1]["attn_out"] - by_setting[0]["attn_out"]
    direct = by_setting[1]["direct"]
    assert relative_error(split.direct.float(), direct) < UPDATE * (4 if plain.has_sinks else 1)
    assert relative_error(split.inherited.float(), realised - direct) < UPDATE * (4 if plain.has_sinks else 1)
    one = icl.Prompts(
        start=PROMPTS.start,
        demonstrations=PROMPTS.demonstrations[:1],
        demonstration_label_lengths=(1,),
        queries=PROMPTS.queries,
        labels=PROMPTS.labels,
        gold=PROMPTS.gold,
    )
    delta = icl.finetune(model, one, lr=LR, progress=False)
    for got, expected in zip((delta.W_K, delta.W_V), plain.updates(one.prefix, LR), strict=True):
        assert relative_error(got, expected) < DELTA
    by_layer = icl.finetune(model, one, lr=LR, config=icl.FinetuneConfig(method="layer-causal"), progress=False)
    torch.testing.assert_close(by_layer.W_V[-1], delta.W_V[-1], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_configuration_is_refused_by_its_cause(
    make_pair: Callable[[str], tuple[Plain, icl.Model]], name: str
) -> None:
    reason = REFUSED[name].refusal
    assert reason is not None
    with pytest.raises((icl.UnsupportedModelError, icl.PromptError), match=re.escape(reason)):
        icl.capture(make_pair(name)[1], PROMPTS, progress=False)


def test_the_pages_have_the_table_and_the_number_of_configurations(pytestconfig: pytest.Config) -> None:
    root = Path(__file__).parents[2]
    page, table = root / "docs" / "architectures.md", architectures.table()
    text = page.read_text(encoding="utf-8")
    head = text[: text.index("| architecture |")]
    if pytestconfig.getoption("--write-docs"):
        text = f"{head}{table}\n"
        page.write_text(text, encoding="utf-8")
    assert text == f"{head}{table}\n"
    counts = f"{len(EXACT)} configurations of {len({c.architecture for c in EXACT.values()})} architectures"
    assert counts in head
    assert counts in " ".join((root / "README.md").read_text(encoding="utf-8").split())
