"""What a cell costs: FLOPs and bytes, counted, beside the time it takes; and how time and memory grow.

Writes figures/benchmark/growth.{png,pdf,csv} and cost.md. FLOPs are those of torch's own counter: matrix products and
attention, two for each multiply-add. The line in each panel is the FLOPs counted, at the rate of the bare prefix pass.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import contenders
import matplotlib.pyplot as plt
import pandas as pd
import torch
from contenders import Race
from processes import run_child
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import icl_dual as icl
from icl_dual import assets
from icl_dual.scripts.common import finish, model_name, model_title, output_folder, positive, run_script, script_parser
from icl_dual.scripts.outputs import markdown, write_csv, write_text

QUERIES, DEMONSTRATIONS, LAYERS = (16, 32, 64, 128, 256), (0, 4, 8, 16, 32), (6, 12, 18, 24, 30)
MEMORY_QUERIES = (64, 128, 256, 512, 1024)
DEFAULT = {"queries": 64, "demonstrations": 32}


@dataclass
class Point:
    """A capture of a size, its counted FLOPs and its time."""

    axis: str
    x: int
    flops: float
    seconds: float


def attention_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of attention, which torch counts on GPUs only; query heads that share keys each count."""
    heads = (q_shape[0], q_shape[1])
    return sdpa_flop_count(q_shape, (*heads, *k_shape[2:]), (*heads, *v_shape[2:]))


def count(run: Callable[[], object]) -> float:
    """Return the FLOPs of what `run` does."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    one_by_one = patch.object(ThreadPoolExecutor, "map", lambda pool, f, *inputs: map(f, *inputs))
    # Of several threads, torch counts its own only.
    with one_by_one, FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
        run()
    return counter.get_total_flops()


def measure(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def prompts(model: icl.Model, task: icl.Task, n_queries: int, n_demonstrations: int) -> icl.Prompts:
    demonstrations = task.demonstrations(n_demonstrations, seed=1) if n_demonstrations else []
    return icl.build_prompts(model, task, demonstrations, task.queries(n_queries))


def truncated(name: str, n_layers: int, folder: Path) -> str:
    """Save the model with its first layers only."""
    source = assets.model_files(name, None).folder
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    model.base_model.layers = model.base_model.layers[:n_layers]
    model.config.num_hidden_layers = n_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:n_layers]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
    return str(folder)


def grow(name: str, task: icl.Task, repeats: int) -> list[Point]:
    model = icl.load_model(name)

    def point(axis: str, x: int, of: icl.Model, of_size: icl.Prompts) -> Point:
        icl.capture(of, of_size, progress=False)  # a model's first capture checks it, too
        flops = count(lambda: icl.capture(of, of_size, progress=False))
        return Point(axis, x, flops, measure(lambda: icl.capture(of, of_size, progress=False), repeats))

    usual = prompts(model, task, *DEFAULT.values())
    points = []
    for n in tqdm(QUERIES, desc="queries"):
        points.append(point("queries", n, model, prompts(model, task, n, DEFAULT["demonstrations"])))
    for n in tqdm(DEMONSTRATIONS, desc="demonstrations"):
        points.append(point("demonstrations", n, model, prompts(model, task, DEFAULT["queries"], n)))
    for n in tqdm(LAYERS, desc="layers"):
        with tempfile.TemporaryDirectory() as folder:
            points.append(point("layers", n, icl.load_model(truncated(name, n, Path(folder))), usual))
    return points


def memory(name: str, task: icl.Task) -> pd.DataFrame:
    """Return a capture's peak memory beyond the loaded model and the size of its result, in MB, by queries."""
    script, model = str(Path(__file__).with_name("benchmark.py")), icl.load_model(name)
    rows = []
    for n in tqdm(MEMORY_QUERIES, desc="memory"):
        printed = run_child(script, "--model", name, "--task", task.name, "--queries", str(n), "--peak", "ours")
        kept = icl.capture(model, prompts(model, task, n, DEFAULT["demonstrations"]), progress=False)
        rows.append((n, float(printed.split()[-1]), result_mb(kept)))
    return pd.DataFrame(rows, columns=["queries", "peak_mb", "kept_mb"])


def result_mb(run: icl.Capture) -> float:
    """Return the size of a capture with the metrics' fields, in MB."""
    fields = [value for value in vars(run).values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in fields) / 1e6


def costs(name: str, task: icl.Task, n_queries: int, lr: float) -> pd.DataFrame:
    """Return a cell's stages: counted FLOPs and bytes, time, and the rate of both."""
    race = Race(name, icl.Prompts(queries=(), labels=(), gold=()), "cpu", torch.float32, lr)
    race.prompts = in_context = prompts(race.model, task, n_queries, DEFAULT["demonstrations"])
    cell = contenders.run_cell(race)
    kept_for_metrics = [icl.capture(race.model, of, progress=False) for of in (in_context, in_context.zero_shot())]
    steps: dict[str, tuple[Callable[[], object], float]] = {
        "bare prefix": (lambda: contenders.bare_prefix(race), 0.0),
        "finetuning": (lambda: contenders.finetune(race), 2 * cell.delta.W_K.numel() * 4e-6),
        "capture, in context": (lambda: contenders.ours(race), result_mb(kept_for_metrics[0])),
        "capture, zero-shot": (
            lambda: icl.capture(race.model, in_context.zero_shot(), progress=False),
            result_mb(kept_for_metrics[1]),
        ),
        "metrics and decomposition": (lambda: contenders.measure_cell(race, cell), 0.0),
    }
    rows = []
    for step, (run, kept) in steps.items():
        with torch.no_grad():
            flops, seconds = count(run), measure(run, 3)
        rows.append((step, flops / 1e9, seconds, flops / 1e9 / seconds, kept))
    square = torch.randn(2048, 2048)
    flops, seconds = 2 * 2048**3, measure(lambda: square @ square, 9)
    rows.append(("a 2048³ matrix product", flops / 1e9, seconds, flops / 1e9 / seconds, square.numel() * 4e-6))
    return pd.DataFrame(rows, columns=["step", "GFLOP", "seconds", "GFLOP/s", "kept, MB"])


def draw(points: pd.DataFrame, peak: pd.DataFrame, rate: float, model: str, path: Path) -> None:
    """Draw seconds along each axis beside those that FLOPs make expect, and memory along queries."""
    fig, axes = plt.subplots(1, 4, figsize=(icl.plots.PAGE_WIDTH, 2.6))
    measured: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "#0072B2"}
    for ax, (axis, of_axis) in zip(axes, points.groupby("axis", sort=False), strict=False):
        ax.plot(
            of_axis["x"],
            of_axis["flops"] / 1e9 / rate,
            color="0.4",
            linestyle="--",
            label="time: FLOPs at the bare prefix's rate",
        )
        ax.plot(of_axis["x"], of_axis["seconds"], label="time, measured", **measured)
        ax.set_xlabel(str(axis))
        ax.set_ylabel("time (s)" if ax is axes[0] else "")
        ax.set_ylim(0)
    ax = axes[-1]
    ax.plot(peak["queries"], peak["peak_mb"], label="memory, peak", **measured | {"marker": "s", "color": "#D55E00"})
    ax.plot(peak["queries"], peak["kept_mb"], color="0.4", linestyle=":", label="memory of the result")
    ax.set_xlabel("queries")
    ax.set_ylabel("memory (MB)")
    ax.set_ylim(0)
    fixed = ", ".join(f"{n} {what}" for what, n in DEFAULT.items())
    heading = f"What a capture costs as one of these grows, the others fixed: {fixed}, all layers"
    finish(fig, list(axes), f"{heading}\n{model_title(model)}", path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", type=model_name, default="smollm2-135m", help="packaged model, hub id or folder (%(default)s)")
    add("--task", default="sst2", choices=icl.TASKS)
    add("--queries", type=positive, default=128, help="queries of the cell whose costs are counted (%(default)s)")
    add("--repeats", type=positive, default=3, help="timed turns (%(default)s)")
    add("--out", type=output_folder, default="figures/benchmark", help="folder for tables and figure (%(default)s)")
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Count and time a cell, let captures grow, and write tables and figure."""
    task = icl.load_task(args.task)
    cost = costs(args.model, task, args.queries, lr=1e-4)
    write_text(args.out / "cost.md", markdown(cost, floatfmt=".2f") + "\n")
    points = pd.DataFrame([asdict(point) for point in grow(args.model, task, args.repeats)])
    write_csv(args.out / "growth.csv", points)
    peak = memory(args.model, task)
    write_csv(args.out / "memory.csv", peak)
    draw(points, peak, cost.loc[cost["step"] == "bare prefix", "GFLOP/s"].item(), args.model, args.out / "growth")
    print(markdown(cost, floatfmt=".2f"))
    print(markdown(points))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
