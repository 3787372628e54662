"""What attention by source costs on long prompts, beside the plain forward pass of the same model.

Each row runs in a process of its own, on one thread: processor time, and the memory above that of the loaded model. The
plain pass is the Hugging Face model without hooks, with its fused attention, and computes the last position's logits.
"""

import argparse
import gc
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence

import pandas as pd
import psutil
import torch
from processes import run_child
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import icl_dual as icl
from icl_dual import assets
from icl_dual.scripts.common import (
    ScriptError,
    command_line,
    model_name,
    model_title,
    output_file,
    positive,
    run_script,
    script_parser,
)
from icl_dual.scripts.outputs import markdown, write_text

RUNS = ("plain pass", "last position", "all positions")
SHORTEST = 200
"""The number of tokens of the prompt that is run first."""
SYSTEM = "You are given three documents with news.\n"
DOCUMENTS = ("document 1", "document 2", "document 3")
QUESTION = "\nQuestion: which document is about sports?\nAnswer:"


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", type=model_name, default="smollm2-135m", help="packaged model, hub id or folder (%(default)s)")
    add(
        "--tokens",
        type=positive,
        nargs="+",
        default=[2048, 8000],
        help="lengths of the prompts (%(default)s)",
    )
    add("--task", default="agnews", choices=icl.TASKS, help="the task with the documents' texts (%(default)s)")
    add("--out", type=output_file, default="figures/sources/long_prompts.md", help="Markdown file (%(default)s)")
    add("--run", choices=RUNS, help="measure one run in this process, and print it; writes nothing")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def prompt_of(model: icl.Model, task: icl.Task, n_tokens: int) -> icl.SourcedPrompt:
    """Return a prompt of a system text, three documents of like lengths and a question, of a number of tokens."""
    news, document = itertools.cycle(text for example in task.queries(100) for _, text in example.fields), ""
    while len(document) < 4 * n_tokens:  # more than enough: a token has about four characters, and there are three
        document += f"{next(news)}\n"
    parts = [("system", SYSTEM), *((name, document) for name in DOCUMENTS), ("question", QUESTION)]
    prompt = icl.prompt_from_parts(parts, model)
    n_others = sum(prompt.names[source] not in DOCUMENTS for source in prompt.sources)
    if (n_documents := n_tokens - n_others) < len(DOCUMENTS):
        raise ScriptError(f"expected --tokens of at least {n_others + len(DOCUMENTS)}, got {n_tokens}: pass more")
    kept: list[int] = []
    for name, run in itertools.groupby(range(len(prompt)), key=lambda token: prompt.names[prompt.sources[token]]):
        rank = DOCUMENTS.index(name) if name in DOCUMENTS else None
        most = None if rank is None else (n_documents + rank) // len(DOCUMENTS)
        kept += list(run)[:most]
    return icl.SourcedPrompt(
        tuple(prompt.tokens[token] for token in kept),
        prompt.names,
        tuple(prompt.sources[token] for token in kept),
        tuple(prompt.texts[token] for token in kept),
    )


def plain_pass(name: str) -> Callable[[icl.SourcedPrompt], object]:
    """Return the forward pass of a model without hooks, with fused attention."""
    folder = assets.model_files(name, None).folder
    bare = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )

    def run(prompt: icl.SourcedPrompt) -> object:
        with torch.no_grad():
            return bare(torch.tensor([prompt.tokens]), logits_to_keep=1, use_cache=False)

    return run


def by_source(model: icl.Model, *, every: bool) -> Callable[[icl.SourcedPrompt], object]:
    """Return the capture of the last position, or of every position without terms."""
    options = {"positions": None, "terms": False} if every else {}

    def run(prompt: icl.SourcedPrompt) -> object:
        return icl.capture_sources(model, prompt, logits=[prompt.tokens[-1]], progress=False, **options)

    return run


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return processor seconds and peak memory above the loaded model, in MB, of a run in this process."""
    torch.set_num_threads(1)
    model, task = icl.load_model(args.model), icl.load_task(args.task)
    prompt, short = (prompt_of(model, task, n) for n in (args.tokens[0], SHORTEST))
    run = plain_pass(args.model) if args.run == "plain pass" else by_source(model, every=args.run == "all positions")
    del model
    run(short)  # a model's first run reads its weights, and a first capture checks it
    gc.collect()
    base, started = psutil.Process().memory_info().rss, time.process_time()
    run(prompt)
    seconds, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"processor s": seconds, "memory, MB": (peak - base) / 1e6}


def write(args: argparse.Namespace) -> None:
    """Measure every run of every length, or one of them in this process."""
    if args.run:
        print(json.dumps(measure(args)))
        return
    rows = []
    for n_tokens, run in tqdm([(n, run) for n in args.tokens for run in RUNS], unit="run"):
        options = ["--model", args.model, "--task", args.task, "--tokens", str(n_tokens), "--run", run]
        printed = run_child(__file__, *options, OMP_NUM_THREADS="1")
        rows.append({"tokens": n_tokens, "run": run, **json.loads(printed.splitlines()[-1])})
    frame = pd.DataFrame(rows)
    plain = frame["processor s"].where(frame["run"] == RUNS[0]).groupby(frame["tokens"]).transform("max")
    frame["of the plain pass"] = frame["processor s"] / plain
    table = markdown(frame, floatfmt=("", "", ".1f", ".0f", ".2f"))
    command = command_line(__file__, make_parser(), args, always=("model", "tokens"))
    text = f"""# Attention by source on long prompts

    {command}

{model_title(args.model)}, float32, one thread. *Plain pass* is the forward pass without hooks, with fused attention.
*Last position* and *all positions* are `capture_sources` with direct effects on one logit; *all positions* leaves out
the terms. Memory is the peak above the loaded model.

{table}
"""
    write_text(args.out, text)
    print(f"{table}\n\nIt is in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
