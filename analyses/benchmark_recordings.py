"""What recordings of the paper's size cost: time and memory of all metrics, and of writing and reading the layout.

Random recordings of 872 queries × 24 layers × 2048 dimensions (16 heads, queries of 30 tokens, 1100 demonstration
tokens) are saved as safetensors. Each step then runs in a separate process; its memory is the peak resident set of that
process, the library's import included. Exported recordings are read back and every digit is compared.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from processes import run_child

import icl_dual as icl
from icl_dual.prompts import SEPARATOR, START
from icl_dual.recordings import SETTINGS, write_recordings
from icl_dual.scripts.common import ScriptError, output_folder, positive, run_script, script_parser
from icl_dual.scripts.outputs import markdown, write_text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--queries", type=positive, default=872, help="queries (%(default)s, as SST2 has)")
    add("--layers", type=positive, default=24, help="layers (%(default)s)")
    add("--d-model", type=positive, default=2048, help="width of the residual stream (%(default)s)")
    add("--heads", type=positive, default=16, help="attention heads (%(default)s)")
    add("--query-tokens", type=positive, default=30, help="tokens of a query (%(default)s)")
    add("--demonstration-tokens", type=positive, default=1100, help="tokens of all demonstrations (%(default)s)")
    add("--k", type=positive, default=32, help="demonstrations (%(default)s)")
    add("--out", type=output_folder, default="figures/benchmark", help="folder for recordings.md (%(default)s)")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def random_recordings(args: argparse.Namespace) -> icl.Recordings:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    lengths = [len(part) for part in torch.arange(args.demonstration_tokens).tensor_split(args.k)]
    segments = [START] + [owner for i, n in enumerate(lengths) for owner in [i] * n + [SEPARATOR]]
    training = [owner for i, n in enumerate(lengths) for owner in [START] + [i] * n]
    by_query = args.queries, args.layers
    return icl.Recordings(
        gold=torch.randint(2, (args.queries,), generator=generator),
        predictions={name: torch.randint(2, (args.queries,), generator=generator) for name in SETTINGS},
        attn_out={name: normal(*by_query, args.d_model) for name in SETTINGS},
        query_scores={name: normal(*by_query, args.heads, args.query_tokens) for name in SETTINGS},
        query_lengths=torch.full((args.queries,), args.query_tokens),
        context_scores={name: normal(*by_query, len(segments) if name == "ICL" else 1) for name in SETTINGS},
        segments=torch.tensor(segments),
        q=normal(*by_query, args.d_model),
        training_q=normal(args.layers, len(training), args.d_model),
        training_segments=torch.tensor(training),
        metadata={"n_labels": 2},
    )


def metrics(work: Path) -> None:
    icl.compare_recordings(icl.load_recordings(work / "saved"))


def metrics_of_all(work: Path) -> None:
    icl.compare_recordings(icl.load_recordings(work / "saved"), kendall_queries=None)


def export(work: Path) -> None:
    write_recordings(icl.load_recordings(work / "saved"), work / "exported")


def read_back(work: Path) -> None:
    icl.load_recordings(work / "exported")


def check(work: Path) -> None:
    """Check that every digit of what was exported comes back."""
    saved, read = icl.load_recordings(work / "saved"), icl.load_recordings(work / "exported")
    for name in ("attn_out", "query_scores", "context_scores"):
        for setting in SETTINGS:
            values, expected = getattr(read, name)[setting], getattr(saved, name)[setting]
            if not torch.equal(values.float(), expected):
                raise ScriptError(f"expected {name} of {setting} as it was exported, got other digits")
    assert read.training_q is not None
    assert saved.training_q is not None
    if not (torch.equal(read.q.float(), saved.q) and torch.equal(read.training_q.float(), saved.training_q)):
        raise ScriptError("expected the queries as they were exported, got other digits")


STEPS: dict[str, Callable[[Path], None]] = {
    "metrics": metrics,
    "metrics, Kendall on all queries": metrics_of_all,
    "export": export,
    "read back": read_back,
    "every digit": check,
}


def write(args: argparse.Namespace) -> None:
    """Run every step in a process of its own, and write the table; with --step, run one."""
    if args.step:
        started = time.perf_counter()
        STEPS[args.step](args.work)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes, on Linux
        print(json.dumps({"step": args.step, "seconds": time.perf_counter() - started, "peak GB": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        work, rows = Path(folder), []
        random_recordings(args).save(work / "saved")
        for step in STEPS:
            rows.append(json.loads(run_child(__file__, "--step", step, "--work", str(work))))
            print(rows[-1])
        sizes = {
            name: sum(path.stat().st_size for path in (work / name).rglob("*") if path.is_file()) / 1e9
            for name in ("saved", "exported")
        }
    table = markdown(pd.DataFrame(rows), floatfmt=".2f")
    write_text(
        args.out / "recordings.md",
        f"{args.queries} queries × {args.layers} layers × {args.d_model} dimensions, {args.heads} heads, "
        f"{args.query_tokens} query tokens, {args.demonstration_tokens} tokens of {args.k} demonstrations, random, in "
        f"float32: {sizes['saved']:.2f} GB as safetensors, {sizes['exported']:.2f} GB in the released layout. "
        f"{torch.get_num_threads()} threads, each step in a process of its own "
        f"(`python analyses/benchmark_recordings.py`).\n\n{table}\n",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
