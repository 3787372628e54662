"""How fast we are: capture against TransformerLens's run_with_cache, and ΔW_ICL against the prefix it comes from.

All run the same model on the same prompts in one process, in turns. What both captures hold, and what ΔW_ICL does with
and without being formed, is checked equal before anything is timed. Machines are noisy: read the ratios of medians, not
the seconds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import icl_dual as icl

HOOKS = ("attn.hook_out", "attn.hook_q", "attn.hook_attn_scores")


def ours(model: icl.Model, prompts: icl.Prompts, n: int) -> dict[str, torch.Tensor]:
    run = icl.capture(model, prompts, progress=False)
    assert run.attn_out is not None
    assert run.demo_scores is not None
    assert run.q is not None
    return {"attn_out": run.attn_out, "q": run.q, "scores": run.demo_scores, "log_probs": run.label_log_probs}


def tl_filtered(model: icl.Model, prompts: icl.Prompts, n: int) -> dict[str, torch.Tensor]:
    """The last position of each full prompt, with hooks only where something is kept."""
    names = [f"blocks.{layer}.{hook}" for layer in range(model.n_layers) for hook in HOOKS]
    first = [label[0] for label in prompts.labels]
    kept: dict[str, list[torch.Tensor]] = {"attn_out": [], "q": [], "scores": [], "log_probs": []}
    for query in tqdm(prompts.queries[:n], desc="run_with_cache", leave=False):
        tokens = torch.tensor([[*prompts.prefix, *query]], device=model.device)
        with torch.no_grad():
            logits, cache = model.bridge.run_with_cache(tokens, names_filter=names, pos_slice=-1)
        out, q, scores = (torch.stack([cache[f"blocks.{i}.{h}"][0] for i in range(model.n_layers)]) for h in HOOKS)
        kept["attn_out"].append(out.flatten(1))
        kept["q"].append(q.reshape(model.n_layers, model.n_heads, model.d_head))
        scores = scores.reshape(model.n_layers, model.n_heads, -1)
        kept["scores"].append(scores[..., prompts.demonstration_positions])
        kept["log_probs"].append(logits[0, -1].log_softmax(-1)[first])
    return {name: torch.stack(tensors) for name, tensors in kept.items()}


def contenders(model: icl.Model, prompts: icl.Prompts, n: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the last three are all layers and heads of one prompt."""
    run = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    assert run.keys_values is not None
    assert run.q_scored is not None
    k, v, q = run.keys_values.demo_keys, run.keys_values.demo_values, run.q_scored[0]
    formed, unformed = icl.dual.act(icl.dual.head_weights(k, v), q), icl.dual.act_unformed(k, v, q)
    if (formed - unformed).norm() > 1e-4 * formed.norm():
        raise RuntimeError("expected ΔW_ICL q to be the same whether it is formed or not")
    tokens = torch.tensor([prompts.prefix], device=model.device)
    return {
        "ours": lambda: ours(model, prompts, n),
        "tl_filtered": lambda: tl_filtered(model, prompts, n),
        "prefix": lambda: model.run(tokens, read=torch.tensor([[tokens.shape[1] - 1]])),
        "form_delta_w_icl": lambda: icl.dual.head_weights(k, v),
        "act_unformed": lambda: icl.dual.act_unformed(k, v, q),
    }


RATIOS = {
    "tl_filtered/ours": "capture is {:.1f}× as fast as run_with_cache, prompt by prompt",
    "form_delta_w_icl/prefix": "forming ΔW_ICL takes {:.2%} of a bare prefix pass",
    "act_unformed/prefix": "acting on a query without forming it takes {:.2%} of a bare prefix pass",
    "act_unformed/form_delta_w_icl": "and {:.0%} of forming it",
}


def check_equal(model: icl.Model, prompts: icl.Prompts, n: int) -> dict[str, float]:
    """Relative differences of everything captured; an error where they are more than rounding."""
    got, expected = ours(model, prompts, n), tl_filtered(model, prompts, n)
    differences = {name: ((got[name][:n] - e).norm() / e.norm()).item() for name, e in expected.items()}
    if max(differences.values()) > 1e-4:
        raise RuntimeError(f"expected both to capture the same to 1e-4, got {differences}")
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="sst2", choices=icl.TASKS)
    parser.add_argument("--k", type=int, default=32, help="demonstrations (%(default)s)")
    parser.add_argument("--queries", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns each contender gets (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()

    model, task = icl.load_model(args.model), icl.load_task(args.task)
    prompts = icl.build_prompts(model, task, task.demonstrations(args.k, seed=1), task.queries(args.queries))
    differences = check_equal(model, prompts, min(4, args.queries))
    timed = contenders(model, prompts, args.queries)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    with torch.no_grad():
        for _ in tqdm(range(args.repeats), desc="turns"):
            for name, run in timed.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {ratio: medians[ratio.split("/")[0]] / medians[ratio.split("/")[1]] for ratio in RATIOS}
    result = {
        "setting": {"model": args.model, "task": args.task, "k": args.k, "queries": args.queries},
        "prefix_tokens": len(prompts.prefix),
        "medians_s": medians,
        "ratios": ratios,
        "seconds": seconds,
        "relative_differences": differences,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    }
    text = json.dumps(result, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    print()
    for ratio, sentence in RATIOS.items():
        print(sentence.format(ratios[ratio]))


if __name__ == "__main__":
    main()
