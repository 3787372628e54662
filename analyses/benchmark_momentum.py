"""What momentum attention costs: a training step and a decoded token beside the same decoder without it.

Decoders of one shape and the same weights, with no η, a fixed and a learned one, take turns. Peak memory of a training
step is measured in a process of its own, above what the process held before the decoder was made.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
import torch
from processes import run_child, sampled_memory

from icl_dual import pretraining
from icl_dual.models.momentum_gpt2 import MomentumForCausalLM
from icl_dual.momentum import decaying_sum
from icl_dual.scripts.common import at_least, output_folder, positive, run_script, script_parser
from icl_dual.scripts.outputs import markdown, write_text

ETAS: dict[str, float | str] = {"vanilla": 0.0, "η fixed": 0.5, "η learned": "learned"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", default="small", choices=pretraining.PRESETS, help="the decoders' shape (%(default)s)")
    add("--length", type=at_least(2), default=1024, help="tokens of a sequence (%(default)s)")
    add("--batch-size", type=positive, default=2, help="sequences a step (%(default)s)")
    add("--repeats", type=positive, default=7, help="timed turns (%(default)s)")
    add("--out", type=output_folder, default="figures/momentum", help="folder for cost.md and cost.json (%(default)s)")
    add("--peak", choices=ETAS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def decoder(args: argparse.Namespace, eta: float | str) -> MomentumForCausalLM:
    preset = replace(pretraining.PRESETS[args.preset], n_ctx=args.length)
    torch.manual_seed(0)
    return MomentumForCausalLM(pretraining.build_config(preset, preset.d_vocab, eta))


def training_step(args: argparse.Namespace, eta: float | str) -> Callable[[], None]:
    model = decoder(args, eta).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(model.config.vocab_size, (args.batch_size, args.length))

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding_step(args: argparse.Namespace, eta: float | str) -> Callable[[], None]:
    """Decode one token after a cache of nearly the whole context, and crop the cache again."""
    model = decoder(args, eta).eval()
    tokens = torch.randint(model.config.vocab_size, (args.batch_size, args.length))
    with torch.no_grad():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model(tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def timed(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each function, called in turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(turns) for name, turns in seconds.items()}


def peak_mb(args: argparse.Namespace) -> float:
    """Return the peak memory of two training steps, above what the process held before."""
    with sampled_memory() as memory:
        step = training_step(args, ETAS[args.peak])
        step()
        step()
    return (max(memory) - memory[0]) / 1e6


def peak_of_its_own(args: argparse.Namespace, name: str) -> float:
    shape = ["--preset", args.preset, "--length", str(args.length), "--batch-size", str(args.batch_size)]
    # Freed memory goes back at once, so that what is held is what is needed.
    return float(run_child(__file__, *shape, "--peak", name, MALLOC_TRIM_THRESHOLD_="0"))


def write(args: argparse.Namespace) -> None:
    """Time and measure all decoders, and write the table; with --peak, print one peak."""
    if args.peak:
        print(peak_mb(args))
        return
    training = timed({name: training_step(args, eta) for name, eta in ETAS.items()}, args.repeats)
    decoding = timed({name: decoding_step(args, eta) for name, eta in ETAS.items()}, 5 * args.repeats)
    memory = {name: statistics.median(peak_of_its_own(args, name) for _ in range(3)) for name in ETAS}
    model = decoder(args, 0.5)
    v = torch.randn(1, args.length, model.config.n_head, model.config.n_embd // model.config.n_head)
    state = decaying_sum(v, model.eta[0]).state
    measured = {"training step": training, "decoded token": decoding, "peak memory of training": memory}
    ratios = {what: {name: by_name[name] / by_name["vanilla"] for name in ETAS} for what, by_name in measured.items()}
    write_text(args.out / "cost.json", json.dumps({"measured": measured, "ratios": ratios}, indent=1))
    table = pd.DataFrame(ratios).T.drop(columns="vanilla")
    table.index.name = "beside vanilla"
    text = (
        f"Preset `{args.preset}`, {args.batch_size} sequences of {args.length} tokens, float32, "
        f"{torch.get_num_threads()} threads; medians of {args.repeats} turns (decoding: {5 * args.repeats}), memory "
        f"(of three runs) above what the process held before (`python analyses/benchmark_momentum.py`).\n\n"
        f"{markdown(table, index=True, floatfmt='.3f')}\n\n"
        f"`dual.momentum` goes on from {state[0, 0].numel()} numbers a head (d_head), whatever came before; a decoder "
        f"under transformers' cache keeps no state: it sums the values that the cache holds.\n"
    )
    write_text(args.out / "cost.md", text)
    print(text)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
