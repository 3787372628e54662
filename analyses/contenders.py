"""Who runs in `benchmark.py`: the same prompts through the bare model, TransformerLens, transformers, nnsight and us.

Every contender takes a `Race` and returns what it captured at the recorded positions. Those that run batches run the
same ones, and the bare ones use torch's fastest attention and unembed the recorded positions only. We alone run the
tokens with which all queries begin but once; `floor_shared` is the floor of that.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import icl_dual as icl
from icl_dual import assets
from icl_dual.captures.capture import Field
from icl_dual.captures.shared_prefix import batch_overhead, common_query_prefix, split_into_batches

Captured = dict[str, Tensor]
"""`log_probs` of the labels and, from those who can see them, `attn_out`, `q` and `demo_attention` (within the
demonstrations; from us `demo_scores`, of which it is the softmax): [query layer …]."""

BATCH_SIZE = 64
RATES = 4
"""Finetunings that `finetune_many` does at once; its time is counted by one of them."""


@dataclass
class Race:
    """A model, loaded only in the ways that are asked for, and the prompts to run."""

    name: str
    prompts: icl.Prompts
    device: str
    dtype: torch.dtype
    lr: float
    seed: int = 1

    @cached_property
    def model(self) -> icl.Model:
        """Return our model, which is also TransformerLens's through its bridge."""
        return icl.load_model(self.name, device=self.device, dtype=self.dtype)

    @cached_property
    def hf(self) -> Any:
        """Return the model as transformers loads it."""
        folder = assets.model_files(self.name, None).folder
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, trust_remote_code=False)
        return loaded.to(self.device).eval()

    @cached_property
    def nnsight(self) -> Any:
        """Return the same weights in nnsight."""
        load: Any = import_module("nnsight").TransformersModel  # an extra: nothing else here needs it
        return load(self.hf, task="text-generation", tokenizer=self.model.tokenizer)

    @cached_property
    def hooked(self) -> icl.Model:
        """Return the same weights as a `HookedTransformer`, where transformer-lens has it."""
        loading: Any = import_module("transformer_lens.loading_from_pretrained")
        folder, settings = str(assets.model_files(self.name, None).folder), {"dtype": self.dtype, "device": self.device}
        cfg = loading.get_pretrained_model_config(folder, self.hf.config.to_dict(), **settings)
        state = loading.get_pretrained_state_dict(folder, cfg, self.hf, dtype=self.dtype)
        hooked: Any = import_module("transformer_lens").HookedTransformer(cfg, self.model.tokenizer)
        raw = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
        hooked.load_and_process_state_dict(state, **dict.fromkeys(raw, False))
        return icl.Model(hooked.to(self.device, print_details=False).eval(), name=self.name)

    @cached_property
    def zsl(self) -> icl.Capture:
        """Return the zero-shot capture of the decomposition, which runs once."""
        return icl.capture(self.model, self.prompts.zero_shot(), fields=icl.DECOMPOSE_FIELDS, progress=False)

    @cached_property
    def prefix(self) -> Tensor:
        """Return start token and demonstrations, as a batch of one."""
        return torch.tensor([self.prompts.prefix], device=self.device)

    def rows(self, start: tuple[int, ...] = (), leave: int = 0) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield batches of queries after `start`, without its first `leave` tokens: rows, tokens and last positions.

        Tokens are padded on the right.
        """
        rows = [start + query[leave:] for query in self.prompts.queries]
        for batch in split_into_batches([len(row) for row in rows], BATCH_SIZE, batch_overhead(self.model)):
            longest = max(len(rows[row]) for row in batch)
            tokens = [[*rows[row], *[0] * (longest - len(rows[row]))] for row in batch]
            last = [len(rows[row]) - 1 for row in batch]
            yield batch, torch.tensor(tokens, device=self.device), torch.tensor(last, device=self.device)

    def full_prompts(self) -> Iterator[Tensor]:
        """Return each query after the whole prefix."""
        for query in self.prompts.queries:
            yield torch.tensor([[*self.prompts.prefix, *query]], device=self.device)

    def with_prompts(self, prompts: icl.Prompts) -> "Race":
        """Return the same race on other prompts; loaded models are shared."""
        other = copy.copy(self)
        other.prompts = prompts
        for made_of_prompts in ("zsl", "prefix"):
            other.__dict__.pop(made_of_prompts, None)
        return other

    def subset(self, queries: list[int]) -> "Race":
        """Return the same race with some of its queries."""
        prompts = self.prompts
        chosen = {name: tuple(getattr(prompts, name)[query] for query in queries) for name in ("queries", "gold")}
        return self.with_prompts(replace(prompts, **chosen))

    def label_log_probs(self, logits: Tensor) -> Tensor:
        """Return the log-probability of each label's first token: these labels have no other."""
        return logits.float().log_softmax(-1)[:, [label[0] for label in self.prompts.labels]].cpu()


def _bare(race: Race, tokens: Tensor, last: Tensor, **kwargs: Any) -> Tensor:
    race.hf.set_attn_implementation("sdpa")
    hidden = race.hf.base_model(tokens, **kwargs).last_hidden_state
    return race.hf.get_output_embeddings()(hidden[torch.arange(len(last), device=last.device), last])


def bare_prefix(race: Race, head: tuple[int, ...] = ()) -> DynamicCache:
    """Run the prefix and the tokens that follow it through the bare model, and return the cache of keys and values."""
    cache = DynamicCache(config=race.hf.config)
    race.hf.set_attn_implementation("sdpa")
    tokens = torch.tensor([race.prompts.prefix + head], device=race.device)
    race.hf.base_model(tokens, past_key_values=cache, use_cache=True)
    return cache


def _expanded(cache: DynamicCache, n: int) -> DynamicCache:
    """Return a cache for a batch with the same keys and values: passes append to the cache they are given."""
    expanded = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    expanded.layers = layers
    for layer in layers:
        layer.keys, layer.values = layer.keys.expand(n, -1, -1, -1), layer.values.expand(n, -1, -1, -1)
    return expanded


def _bare_queries(race: Race, rows: Iterator[tuple[list[int], Tensor, Tensor]], cache: DynamicCache | None) -> Tensor:
    """Return the labels' log-probabilities from batches through the bare model, after a cache or without one."""
    log_probs = torch.zeros(len(race.prompts.queries), len(race.prompts.labels))
    for batch, tokens, last in rows:
        behind = {"use_cache": False}
        if cache is not None:
            behind = {"past_key_values": _expanded(cache, len(batch)), "use_cache": True}
        log_probs[batch] = race.label_log_probs(_bare(race, tokens, last, **behind))
    return log_probs


def floor(race: Race) -> Captured:
    """Run the arithmetic floor: the prefix once and the query tokens alone, neither with the other."""
    bare_prefix(race)
    return {"floor_log_probs": _bare_queries(race, race.rows(), None)}


def floor_shared(race: Race) -> Captured:
    """Run the floor with the tokens that all queries begin with run once."""
    head = common_query_prefix(race.prompts)
    bare_prefix(race, head)
    return {"floor_log_probs": _bare_queries(race, race.rows(leave=len(head)), None)}


def floor_zero_shot(race: Race) -> Captured:
    """Run the bare model zero-shot: start token and query."""
    return {"floor_log_probs": _bare_queries(race, race.rows(race.prompts.start), None)}


def bare(race: Race) -> Captured:
    """Run the bare model in context: the prefix's cache expanded over each batch, nothing captured."""
    return {"log_probs": _bare_queries(race, race.rows(), bare_prefix(race))}


def ours(race: Race, *more: Field) -> Captured:
    """Run `capture` with everything that the paper's metrics need, and with more fields where they are named."""
    return _captured(race, race.model, *more)


def ours_hooked(race: Race) -> Captured:
    """Run `capture` on the same weights as a `HookedTransformer`."""
    return _captured(race, race.hooked)


def _captured(race: Race, model: icl.Model, *more: Field) -> Captured:
    fields: tuple[Field, ...] = (*icl.METRIC_FIELDS, *more)
    run = icl.capture(model, race.prompts, fields=fields, batch_size=BATCH_SIZE, progress=False)
    kept = {name: getattr(run, name) for name in ("attn_out", "q", *more)}
    return {**kept, "log_probs": run.label_log_probs}


def ours_decomposed(race: Race) -> Captured:
    """Run `capture` with keys and values, and decompose it."""
    fields = (*icl.METRIC_FIELDS, *icl.DECOMPOSE_FIELDS)
    run = icl.capture(race.model, race.prompts, fields=fields, batch_size=BATCH_SIZE, progress=False)
    icl.decompose(race.model, zero_shot=race.zsl, in_context=run)
    return {"log_probs": run.label_log_probs}


class _Kept:
    """What hooks or traces show, by name, of one batch after another; put together at the end."""

    def __init__(self, race: Race) -> None:
        self.race = race
        self.n = len(race.prompts.queries)
        self.kept: Captured = {}

    def keep(self, name: str, queries: list[int], values: Tensor) -> None:
        if name not in self.kept:
            self.kept[name] = torch.zeros(self.n, *values.shape[1:])
        self.kept[name][queries] = values.float().cpu()

    def keep_layers(
        self, queries: list[int], attn_out: list[Tensor], q: list[Tensor], demo_attention: list[Tensor], logits: Tensor
    ) -> None:
        model = self.race.model
        self.keep("attn_out", queries, torch.stack(attn_out, 1).reshape(len(queries), model.n_layers, -1))
        by_head = len(queries), model.n_layers, model.n_heads, model.d_head
        self.keep("q", queries, torch.stack(q, 1).reshape(by_head))
        self.keep("demo_attention", queries, torch.stack(demo_attention, 1))
        self.keep("log_probs", queries, self.race.label_log_probs(logits))

    def demonstrations(self, row: Tensor, *, scores: bool) -> Tensor:
        """Return attention within the demonstrations' tokens, from a row of scores or of weights: [… demo_token]."""
        demonstrations = row[..., self.race.prompts.demonstration_positions.to(row.device)].float()
        return demonstrations.softmax(-1) if scores else demonstrations / demonstrations.sum(-1, keepdim=True)


TL_HOOKS = ("attn.o.hook_out", "attn.hook_q", "attn.hook_attn_scores")


def tl_prefix(race: Race) -> Captured:
    """Run what a TransformerLens expert writes by hand: cached prefix, batches, hooks that keep the last position."""
    bridge, kept = race.model.wrapped, _Kept(race)
    config: Any = bridge.original_model.config
    cache = DynamicCache(config=config)
    bridge.run_with_hooks(race.prefix, fwd_hooks=[("unembed.hook_in", _last_only)], past_key_values=cache)
    for batch, tokens, last in race.rows():
        rows = torch.arange(len(batch), device=last.device)
        by_hook: dict[str, list[Tensor]] = {hook: [] for hook in TL_HOOKS}

        def keep(
            tensor: Tensor, hook: Any, name: str, rows: Tensor = rows, last: Tensor = last, into: Any = by_hook
        ) -> None:
            into[name].append(tensor[rows, :, last] if name == "attn.hook_attn_scores" else tensor[rows, last])

        def gather(tensor: Tensor, hook: Any, rows: Tensor = rows, last: Tensor = last) -> Tensor:
            return tensor[rows, last].unsqueeze(1)

        hooks: list[Any] = [
            (f"blocks.{layer}.{name}", lambda tensor, hook, name=name, keep=keep: keep(tensor, hook, name))
            for layer in range(race.model.n_layers)
            for name in TL_HOOKS
        ]
        logits = bridge.run_with_hooks(
            tokens, fwd_hooks=[*hooks, ("unembed.hook_in", gather)], past_key_values=_expanded(cache, len(batch))
        )
        out, q, scores = by_hook.values()
        kept.keep_layers(batch, out, q, [kept.demonstrations(row, scores=True) for row in scores], logits[:, 0])
    return kept.kept


def _last_only(tensor: Tensor, hook: Any) -> Tensor:
    return tensor[:, -1:]


def _tl_prompts(race: Race, names: list[str] | None) -> Captured:
    kept = _Kept(race)
    for query, tokens in enumerate(race.full_prompts()):
        at_last: dict[str, Any] = {} if names is None else {"names_filter": names, "pos_slice": -1}
        logits, cache = race.model.wrapped.run_with_cache(tokens, **at_last)
        by_hook = [[cache[f"blocks.{layer}.{hook}"][0] for layer in range(race.model.n_layers)] for hook in TL_HOOKS]
        if names is None:
            by_hook = [[t[-1] for t in by_hook[0]], [t[-1] for t in by_hook[1]], [t[:, -1] for t in by_hook[2]]]
        out, q, scores = ([tensor[None] for tensor in layers] for layers in by_hook)
        scores = [row.reshape(1, race.model.n_heads, -1) for row in scores]
        kept.keep_layers([query], out, q, [kept.demonstrations(row, scores=True) for row in scores], logits[:, -1])
    return kept.kept


def tl_filtered(race: Race) -> Captured:
    """Run TransformerLens's run_with_cache of what is needed at the last position, prompt by prompt."""
    return _tl_prompts(race, [f"blocks.{layer}.{hook}" for layer in range(race.model.n_layers) for hook in TL_HOOKS])


def tl_full(race: Race) -> Captured:
    """Run TransformerLens's run_with_cache of everything, prompt by prompt."""
    return _tl_prompts(race, None)


def hf_outputs(race: Race) -> Captured:
    """Run transformers with output_attentions and output_hidden_states, prompt by prompt, as the released code does."""
    kept = _Kept(race)
    race.hf.set_attn_implementation("eager")
    for query, tokens in enumerate(race.full_prompts()):
        out = race.hf(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
        pattern = torch.stack([layer[:, :, -1] for layer in out.attentions], 1)
        kept.keep("demo_attention", [query], kept.demonstrations(pattern, scores=False))
        kept.keep("hidden", [query], torch.stack([layer[:, -1] for layer in out.hidden_states], 1))
        kept.keep("log_probs", [query], race.label_log_probs(out.logits[:, -1]))
    return kept.kept


def _nnsight(race: Race, queries: list[int], kept: _Kept, tokens: Tensor, last: Tensor, **kwargs: Any) -> None:
    traced, rows = race.nnsight, torch.arange(len(queries), device=tokens.device)
    with traced.trace(tokens, **kwargs):
        out: Any = []
        q: Any = []
        patterns: Any = []
        out, q, patterns = out.save(), q.save(), patterns.save()  # nnsight lets every object be saved
        for layer in traced.model.layers:
            q.append(layer.self_attn.q_proj.output[rows, last])
            out.append(layer.self_attn.o_proj.output[rows, last])
            patterns.append(layer.self_attn.output[1][rows, :, last])
        logits = traced.lm_head.output[rows, last].save()
    kept.keep_layers(queries, out, q, [kept.demonstrations(row, scores=False) for row in patterns], logits)


def nnsight_prompts(race: Race) -> Captured:
    """Run nnsight's tracing of the same, prompt by prompt."""
    kept = _Kept(race)
    race.hf.set_attn_implementation("eager")
    for query, tokens in enumerate(race.full_prompts()):
        _nnsight(
            race, [query], kept, tokens, torch.tensor([tokens.shape[1] - 1], device=tokens.device), use_cache=False
        )
    return kept.kept


def nnsight_prefix(race: Race) -> Captured:
    """Run nnsight's tracing after a cached prefix, in batches."""
    kept, cache = _Kept(race), bare_prefix(race)
    race.hf.set_attn_implementation("eager")
    for batch, tokens, last in race.rows():
        _nnsight(race, batch, kept, tokens, last, past_key_values=_expanded(cache, len(batch)), use_cache=True)
    return kept.kept


def kv_sgd(race: Race) -> Captured:
    """Run the bare finetuning loop: SGD on W_K and W_V of the model as transformers has it."""
    race.hf.set_attn_implementation("sdpa")
    attention = [layer.self_attn for layer in race.hf.base_model.layers]

    def logits(ids: Tensor) -> Tensor:
        return race.hf.get_output_embeddings()(race.hf.base_model(ids, use_cache=False).last_hidden_state[0, :-1])

    return _sgd(race, race.hf, [part for layer in attention for part in (layer.k_proj, layer.v_proj)], logits)


def bridge_sgd(race: Race) -> Captured:
    """Run the same loop on the model as TransformerLens's bridge has it, without hooks."""
    bridge = race.model.wrapped
    attention = [block.attn for block in bridge.blocks]
    trained = [part.original_component for layer in attention for part in (layer.k, layer.v)]
    return _sgd(race, bridge.original_model, trained, lambda ids: bridge(ids, use_cache=False)[0, :-1])


def _sgd(race: Race, model: Any, trained: list[Any], logits: Callable[[Tensor], Tensor]) -> Captured:
    """Run SGD on the parameters of keys' and values' projections, which alternate, layer by layer."""
    parameters = [parameter for part in trained for parameter in part.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=race.lr, foreach=True)
    with torch.enable_grad():
        for demonstration in race.prompts.demonstrations:
            ids = torch.tensor([[*race.prompts.start, *demonstration]], device=race.device)
            loss = torch.nn.functional.cross_entropy(logits(ids).float(), ids[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    deltas = [after.detach() - then for after, then in zip(parameters, before, strict=True)]
    with torch.no_grad():
        for parameter, then in zip(parameters, before, strict=True):
            parameter.copy_(then)
    model.requires_grad_(True)
    return {"W_K": torch.stack(deltas[:: 2 * len(deltas) // len(trained)]).cpu()}


def finetune(race: Race) -> Captured:
    """Run `finetune`, with the queries of the training tokens."""
    delta = icl.finetune(race.model, race.prompts, lr=race.lr, progress=False)
    return {"W_K": delta.W_K, "W_V": delta.W_V}


def finetune_many(race: Race) -> Captured:
    """Run `finetune_many`, at several rates."""
    lrs = [race.lr / (1 + index) for index in range(RATES)]
    first, *_ = icl.finetune_many(race.model, [race.prompts] * RATES, lrs, progress=False)
    assert isinstance(first, icl.WeightDelta)
    return {"W_V": first.W_V}


def run_cell(race: Race, *, replicas: int = 0) -> icl.Experiment:
    """Finetune and capture the three settings, with the fields that metrics and decomposition need."""
    fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
    return icl.run_experiment(race.model, race.prompts, lr=race.lr, replicas=replicas, fields=fields, progress=False)


def measure_cell(race: Race, experiment: icl.Experiment) -> None:
    """Compute a cell's metrics and its decomposition."""
    experiment.compare(seed=race.seed)
    experiment.decompose()


BATCHED: dict[str, Callable[[Race], Captured]] = {
    "floor": floor,
    "floor_shared": floor_shared,
    "floor_zero_shot": floor_zero_shot,
    "bare": bare,
    "ours": ours,
    "ours_decomposed": ours_decomposed,
    "ours_hooked": ours_hooked,
    "tl_prefix": tl_prefix,
    "nnsight_prefix": nnsight_prefix,
    "kv_sgd": kv_sgd,
    "bridge_sgd": bridge_sgd,
    "finetune": finetune,
    "finetune_many": finetune_many,
}
FINETUNING = ("kv_sgd", "bridge_sgd", "finetune", "finetune_many")
PROMPT_BY_PROMPT: dict[str, Callable[[Race], Captured]] = {
    "tl_filtered": tl_filtered,
    "tl_full": tl_full,
    "hf_outputs": hf_outputs,
    "nnsight_prompts": nnsight_prompts,
}
