"""How fast we are: capture, finetuning and a whole cell against the bare arithmetic and against the other tools.

All contenders (`contenders.py` says who they are) run the same model on the same prompts in one process, in turns.
What they capture is checked equal on four queries before anything is timed (in half precision, only reported).
Machines are noisy: read the ratios of medians, not the seconds. Those that run prompt by prompt get every `--every`th
query, and their time is multiplied accordingly. Peak memory is that of a process of its own, beyond the loaded model.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contenders
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from contenders import BATCHED, FINETUNING, PROMPT_BY_PROMPT, RATES, Race
from matplotlib.ticker import LogLocator, NullLocator
from processes import run_child, sampled_memory
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import icl_dual as icl
from icl_dual import assets
from icl_dual.finetuning import REPLICAS
from icl_dual.scripts.common import (
    ScriptError,
    device,
    finish,
    model_name,
    model_title,
    output_file,
    output_folder,
    positive,
    rate,
    run_script,
    script_parser,
)
from icl_dual.scripts.outputs import markdown, markdown_text, write_text

SAME = {"W_K": 1e-2, "W_V": 1e-2}
"""Relative differences that are rounding; 1e-4 where not given. Deltas are small differences of large weights."""

RATIOS = {
    "ours/bare": "capture takes {:.2f} times the bare in-context run, which keeps nothing",
    "ours/floor": "capture takes {:.2f} times the bare arithmetic of prefix and queries, neither seeing the other",
    "ours/floor_shared": "capture takes {:.2f} times the same with the shared query tokens run once",
    "ours_decomposed/bare": "capture of keys and values, decomposed, takes {:.2f} times the bare in-context run",
    "ours_decomposed/floor": "capture of keys and values, decomposed, takes {:.2f} times the bare arithmetic",
    "ours_hooked/ours": "capture of a HookedTransformer of the same weights takes {:.2f} times what it takes here",
    "ours/tl_prefix": "capture takes {:.2f} times what is written by hand on TransformerLens, cached prefix and all",
    "tl_filtered/ours": "capture is {:.1f} times as fast as run_with_cache with a filter",
    "tl_full/ours": "capture is {:.1f} times as fast as run_with_cache",
    "hf_outputs/ours": "capture is {:.1f} times as fast as transformers' output_attentions",
    "nnsight_prompts/ours": "capture is {:.1f} times as fast as nnsight prompt by prompt",
    "nnsight_prefix/ours": "capture is {:.1f} times as fast as nnsight behind a cached prefix",
    "finetune/kv_sgd": "finetuning takes {:.2f} times the bare loop",
    "finetune/bridge_sgd": "finetuning takes {:.2f} times the same loop through TransformerLens's bridge without hooks",
    "finetune_many/kv_sgd": f"finetuning takes {{:.2f}} times the bare loop each, {RATES} learning rates side by side",
    "cell/floors": "a whole cell takes {:.2f} times its floors",
    "cell_with_replicas/cell": "with replicas of its finetuning, a cell takes {:.2f} times as long",
    "measure/cell": "metrics and decomposition take {:.0%} of a cell",
    "updates/floor_zero_shot": "comparing ΔW_ICL with ΔW_FT as matrices takes {:.1f} times a bare zero-shot run",
    "form_delta_w_icl/prefix": "forming ΔW_ICL takes {:.2%} of a bare prefix pass",
    "act_unformed/prefix": "acting on a query without forming it takes {:.2%} of a bare prefix pass",
}


RANDOM_SHAPES = {"random-1.3b": (2048, 16), "random-narrow": (64, 2)}
"""Width and heads of models with random weights and 24 layers. A pass of the narrow one takes what it takes besides
arithmetic: Python and the launches of operators. Where a GPU waits for these, a large model's pass takes that, too."""


def check_equal(race: Race, names: list[str]) -> dict[str, dict[str, float]]:
    """Return how far what contenders capture is from ours, relatively; raise where that is more than rounding."""
    race = race.subset(list(range(min(4, len(race.prompts.queries)))))
    expected = {
        **contenders.ours(race, "demo_scores"),
        **(contenders.finetune(race) if {*FINETUNING} & {*names} else {}),
    }
    expected = {what: values.cpu() for what, values in expected.items()}
    expected["demo_attention"] = expected["demo_scores"].softmax(-1)
    differences: dict[str, dict[str, float]] = {}
    for name in tqdm(names, desc="checking", leave=False):
        got = (BATCHED | PROMPT_BY_PROMPT)[name](race)
        differences[name] = {
            what: ((got[what].cpu() - expected[what]).norm() / expected[what].norm()).item()
            for what in got
            if what in expected
        }
        same = all(far <= SAME.get(what, 1e-4) for what, far in differences[name].items())
        if race.dtype.itemsize >= 4 and not same:
            raise ScriptError(f"expected {name} to capture what we do up to rounding, got {differences[name]}")
    return differences


def delta_w_steps(race: Race) -> dict[str, Callable[[], object]]:
    """Return the steps that form ΔW_ICL of all layers and heads, and those that do not, with the prefix pass."""
    run = icl.capture(race.model, race.subset([0]).prompts, fields=icl.DECOMPOSE_FIELDS, progress=False)
    assert run.keys_values is not None
    assert run.q_scored is not None
    k, v, q = run.keys_values.demo_keys, run.keys_values.demo_values, run.q_scored[0]
    formed, unformed = icl.dual.act(icl.dual.head_weights(k, v), q), icl.dual.act_unformed(q, k, v)
    if not (formed - unformed).norm() <= 1e-4 * formed.norm():
        raise ScriptError("expected ΔW_ICL q to be the same whether it is formed or not")
    return {
        "prefix": lambda: contenders.bare_prefix(race),
        "form_delta_w_icl": lambda: icl.dual.head_weights(k, v),
        "act_unformed": lambda: icl.dual.act_unformed(q, k, v),
    }


def steps(race: Race, names: list[str], every: int) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Return the timed functions by name, with the factor of each one's time."""
    queries = race.prompts.queries
    part = race.subset(list(range(0, len(queries), every)))
    scale = len(queries) / len(part.prompts.queries)
    timed: dict[str, Callable[[], object]] = {}
    for name in names:
        run, on = (BATCHED | PROMPT_BY_PROMPT)[name], part if name in PROMPT_BY_PROMPT else race
        timed[name] = lambda run=run, on=on: run(on)
    if {"floor", "floor_zero_shot", "kv_sgd", "ours"} <= {*names}:
        cell = contenders.run_cell(race)
        timed["cell"] = lambda: contenders.measure_cell(race, contenders.run_cell(race))
        timed["cell_with_replicas"] = lambda: contenders.measure_cell(
            race, contenders.run_cell(race, replicas=REPLICAS)
        )
        timed["measure"] = lambda: contenders.measure_cell(race, cell)
        if race.dtype.itemsize >= 4:  # half precision is refused
            timed["updates"] = lambda: cell.updates(seed=race.seed, progress=False)
    if "ours" in names:
        timed |= delta_w_steps(race)
    by_name = dict.fromkeys(PROMPT_BY_PROMPT, scale) | {"finetune_many": 1 / RATES}
    return timed, {name: by_name.get(name, 1.0) for name in timed}


def time_all(race: Race, timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every turn, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    with torch.no_grad(), tqdm(total=repeats * len(timed), desc="racing") as bar:
        for turn in range(repeats):
            names = list(timed)
            for name in names[turn:] + names[:turn]:  # so that none always follows the same one
                run = timed[name]
                bar.set_postfix_str(name)
                _synchronise(race)
                started = time.perf_counter()
                run()
                _synchronise(race)
                seconds[name].append(time.perf_counter() - started)
                bar.update()
    return seconds


def _synchronise(race: Race) -> None:
    if race.device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_mb(race: Race, name: str) -> float:
    """Return a contender's peak memory beyond the loaded model, in MB: of the process, or of the CUDA device."""
    run = (BATCHED | PROMPT_BY_PROMPT)[name]
    if name in PROMPT_BY_PROMPT:  # what one prompt takes is what the next takes
        race = race.subset(list(range(min(8, len(race.prompts.queries)))))
    bare = {"floor", "floor_shared", "floor_zero_shot", "bare", "kv_sgd", "hf_outputs"}
    loaded = race.hf if name in bare else race.hooked if name == "ours_hooked" else race.model
    for parameter in loaded.parameters():  # files are mapped, and read when they are touched
        parameter.sum()
    if name.startswith("nnsight"):
        _ = race.nnsight
    if name == "ours_decomposed":
        _ = race.zsl
    gc.collect()
    if race.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            run(race)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.no_grad(), sampled_memory() as memory:
        run(race)
    return (max(memory) - memory[0]) / 1e6


def peaks(args: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Return each contender's peak memory, measured in a process of its own."""
    megabytes = {}
    for name in tqdm(names, desc="memory"):
        same = ["--model", args.model, "--task", args.task, "--k", str(args.k), "--device", args.device]
        same += ["--queries", str(args.queries), "--dtype", args.dtype]
        megabytes[name] = float(run_child(__file__, *same, "--peak", name).split()[-1])
    return megabytes


def random_model(width: int, n_heads: int, folder: Path) -> str:
    """Save a Llama of 24 layers with random weights, and a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model_files("smollm2-135m", None).folder, trust_remote_code=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=24,
        num_attention_heads=n_heads,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)
    return str(folder)


def table(result: dict) -> pd.DataFrame:
    """Return seconds, multiples of ours, and peak memory by contender, the fastest first."""
    medians, ours = result["medians_s"], result["medians_s"]["ours"]
    rows = [
        {
            "contender": name,
            "what": ((BATCHED | PROMPT_BY_PROMPT)[name].__doc__ or "").split(".")[0].replace("`", ""),
            "seconds": medians[name],
            "× ours": medians[name] / ours,
            "peak MB": result["peak_mb"].get(name),
        }
        for name in sorted(BATCHED | PROMPT_BY_PROMPT, key=lambda name: medians.get(name, 0))
        if name in medians and name not in FINETUNING
    ]
    return pd.DataFrame(rows).dropna(axis=1, how="all")


LABELS = {
    "floor": "bare arithmetic: prefix and queries",
    "floor_shared": "bare arithmetic: also shared query tokens once",
    "bare": "bare in-context run, keeps nothing",
    "ours": "ours: capture",
    "ours_decomposed": "ours: capture for the decomposition",
    "ours_hooked": "ours: capture on a HookedTransformer",
    "tl_prefix": "TransformerLens by hand, cached prefix",
    "nnsight_prefix": "nnsight, cached prefix",
    "nnsight_prompts": "nnsight, prompt by prompt",
    "tl_filtered": "TransformerLens, filtered cache",
    "tl_full": "TransformerLens, full cache",
    "hf_outputs": "transformers, output_attentions",
}
"""The contenders in the figure."""

KINDS: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o"},
    "without recording": {"color": "0.4", "marker": "D", "markerfacecolor": "white"},
    "other tools": {"color": "#D55E00", "marker": "s"},
}
"""The kinds of contenders in the figure, with their looks."""


def draw(result: dict, path: Path) -> None:
    """Draw each contender's time as a dot with its range over turns, in multiples of ours."""
    names = [name for name in (*BATCHED, *PROMPT_BY_PROMPT) if name in result["medians_s"]]
    names = [name for name in names if name not in {*FINETUNING, "floor_zero_shot"}]
    names.sort(key=lambda name: result["medians_s"][name])
    fig, ax = plt.subplots(figsize=(icl.plots.PAGE_WIDTH, 1.3 + 0.17 * len(names)))
    for at, name in enumerate(names):
        kind = "ours" if name.startswith("ours") else "other tools"
        kind = "without recording" if name in {"floor", "floor_shared", "bare"} else kind
        value = result["medians_s"][name] / result["medians_s"]["ours"]
        turns = np.array(result["seconds"][name]) / statistics.median(result["seconds"][name]) * value
        ax.plot([value], [at], linestyle="none", label=kind, markersize=4.5, **KINDS[kind])
        ax.hlines([at], [turns.min()], [turns.max()], color=KINDS[kind]["color"], linewidth=1.2)
        ax.annotate(f"{value:.2f}", (turns.max(), at), xytext=(6, 0), textcoords="offset points", va="center")
    icl.plots.explain_line(ax, f"range over {len(result['seconds']['ours'])} turns", color="0.4", linewidth=1.2)
    ax.axvline(1.0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_xscale("log")
    ax.margins(x=0.1)
    ax.set_yticks(range(len(names)), [icl.plots.literal(LABELS.get(name, name)) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", color="0.93")
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("median time (× ours), logarithmic")
    setting = result["setting"]
    heading = f"{setting['queries']} {setting['task'].upper()} queries after {setting['k']} demonstrations"
    finish(fig, [ax], f"Time of a capture: {heading}\n{model_title(setting['model'])}, {setting['dtype']}", path)


def model_or_random(text: str) -> str:
    """Return the name of a model, or of a random one."""
    return text if text in RANDOM_SHAPES else model_name(text)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add, contender_names = parser.add_argument, (*BATCHED, *PROMPT_BY_PROMPT)
    add(
        "--model",
        type=model_or_random,
        default="smollm2-135m",
        help=f"packaged model, hub id, folder, {' or '.join(RANDOM_SHAPES)} (%(default)s)",
    )
    add("--task", default="sst2", choices=icl.TASKS)
    add("--k", type=positive, default=32, help="demonstrations (%(default)s)")
    add("--queries", type=positive, default=128, help="evaluation queries (%(default)s)")
    add("--repeats", type=positive, default=5, help="turns of each contender (%(default)s)")
    add("--every", type=positive, default=8, help="step between the queries of those that run prompt by prompt")
    add("--contenders", nargs="+", choices=contender_names, metavar="NAME", help="contenders to time (all)")
    add("--lr", type=rate, default=1e-4, help="finetuning's learning rate (%(default)s)")
    add("--device", type=device, default="cpu", help="(%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(%(default)s)")
    add("--out", type=output_folder, help="folder for result, table and figure")
    add("--json", type=output_file, help="file for the result")
    add("--no-memory", action="store_true", help="skip peak memory, which takes a process for each contender")
    add("--peak", choices=contender_names, help="print the peak memory of this contender in MB, and nothing else")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shape = RANDOM_SHAPES.get(args.model)
        race(args, args.model if shape is None else random_model(*shape, Path(folder)))


def race(args: argparse.Namespace, model: str) -> None:
    """Check the contenders against each other, time them, measure their memory and write the results."""
    task = icl.load_task(args.task)
    nothing = icl.Prompts(queries=(), labels=(), gold=())
    racing = Race(model, nothing, args.device, getattr(torch, args.dtype), args.lr)
    demonstrations, queries = task.demonstrations(args.k, seed=1), task.queries(args.queries)
    racing.prompts = icl.build_prompts(racing.model, task, demonstrations, queries)
    if args.peak:
        print(peak_mb(racing, args.peak))
        return
    if any(len(label) > 1 for label in racing.prompts.labels):
        raise ValueError(f"expected a --task with label words of one token, got {args.task}: choose another, as sst2")
    names = args.contenders or [*BATCHED, *PROMPT_BY_PROMPT]
    names = names if "ours" in names else ["ours", *names]
    if find_spec("nnsight") is None:
        print("nnsight is not installed (pip install 'icl-dual[benchmark]'): left out", file=sys.stderr)
        names = [name for name in names if not name.startswith("nnsight")]
    if "ours_hooked" in names and int(version("transformer-lens").split(".")[0]) >= 4:
        print("transformer-lens 4 has no HookedTransformer: ours_hooked is left out", file=sys.stderr)
        names = [name for name in names if name != "ours_hooked"]
    _ = racing.model, racing.hf, "ours_hooked" in names and racing.hooked
    _ = any(name.startswith("nnsight") for name in names) and racing.nnsight  # all loaded now
    with torch.no_grad():
        differences = check_equal(racing, names)
        timed, scale = steps(racing, names, args.every)
    seconds = time_all(racing, timed, args.repeats)
    medians = {name: scale[name] * statistics.median(turns) for name, turns in seconds.items()}
    if "cell" in medians:
        medians["floors"] = medians["kv_sgd"] + medians["floor"] + 2 * medians["floor_zero_shot"]
    ratios = {}
    for ratio in RATIOS:
        ours, theirs = ratio.split("/")
        if ours in medians and theirs in medians:
            ratios[ratio] = medians[ours] / medians[theirs]
    result = {
        "setting": {
            **{
                name: getattr(args, name)
                for name in ("model", "task", "k", "queries", "lr", "device", "dtype", "every")
            },
            "seed": 1,
            "provenance": racing.model.provenance,
            "prefix_tokens": len(racing.prompts.prefix),
            "query_tokens": sum(map(len, racing.prompts.queries)),
        },
        "medians_s": medians,
        "ratios": ratios,
        "peak_mb": {} if args.no_memory else peaks(args, names),
        "seconds": seconds,
        "relative_differences": differences,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        },
        "versions": {name: version(name) for name in ("icl-dual", "torch", "transformers", "transformer-lens")},
    }
    text = json.dumps(result, indent=1)
    if args.json:
        write_text(args.json, text + "\n")
    print(text)
    print()
    print("\n".join(sentences(result)))
    if args.out:
        write_text(args.out / "benchmark.json", text + "\n")
        write(result, args.out)
        print(f"\nTable and figure are in {args.out}/")


def sentences(result: dict) -> list[str]:
    """Return the ratios in words."""
    return [words.format(result["ratios"][ratio]) for ratio, words in RATIOS.items() if ratio in result["ratios"]]


def write(result: dict, out: Path) -> None:
    """Write the table with its setting, and the figure."""
    setting, turns = result["setting"], len(result["seconds"]["ours"])
    prompt_by_prompt = (
        f"; those that run prompt by prompt ran every {setting['every']}th query, and their time is multiplied"
        if {*PROMPT_BY_PROMPT} & {*result["seconds"]}
        else ""
    )
    head = (
        f"{markdown_text(model_title(setting['model']))} in {setting['dtype']} on {setting['device']}, "
        f"{setting['queries']} queries of {setting['task']} ({setting['query_tokens']} tokens) after "
        f"{setting['k']} demonstrations ({setting['prefix_tokens']} tokens), "
        f"{result['machine']['threads']} threads. Medians of {turns} turns in one process{prompt_by_prompt}. "
        f"{', '.join(' '.join(pair) for pair in result['versions'].items())}."
    )
    rows = markdown(table(result), floatfmt=".2f")
    floors = "A cell's floors: the bare finetuning loop, `floor`, and `floor_zero_shot` twice.\n" * (
        "cell" in result["medians_s"]
    )
    lines = "\n".join(f"- {sentence}" for sentence in sentences(result))
    write_text(out / "benchmark.md", f"{head}\n\n{rows}\n\nRatios of medians:\n\n{lines}\n\n{floors}")
    draw(result, out / "benchmark")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
