"""Momentum attention: decoders trained with and without it, and a pretrained model that is given it.

Trains decoders that differ in η alone, from the same weights on the same sequences, by several seeds: on news, and on a
task that only its context can solve. Compares perplexity at the training length and at three validation lengths, and
accuracy as demonstrations grow. Then adds momentum to a pretrained model and asks what its in-context learning makes of
it. A stopped run goes on where it was.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import momentum_tables
import torch
from common import ERRORS
from tqdm.auto import tqdm

import icl_dual as icl
from icl_dual import pretrain

PARTS = ("news", "mapping", "tasks", "intervention")
N_PERPLEXITY = 50_000
"""Tokens of each split that perplexity is taken over, at most."""


def eta(text: str) -> float | Literal["learned"]:
    return "learned" if text == "learned" else float(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shapes = [name for name in pretrain.PRESETS if name != "label-mapping"]
    add("--preset", default="tiny", choices=shapes, help="of the decoders trained on text (%(default)s)")
    add("--corpus", default="agnews", help="agnews, a .txt file with a text a line, or a hub data set (%(default)s)")
    add("--etas", type=eta, nargs="+", default=[0.0, 0.1, "learned"], help="to train with; 0 is vanilla (%(default)s)")
    add("--curve", type=eta, nargs="*", default=[0.3, 0.5, 0.9], help="more η, for the first seeds (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of weights and order (%(default)s)")
    add("--curve-seeds", type=int, default=2, help="how many of them the curve's decoders have (%(default)s)")
    add("--steps", type=int, help="of training on text (the preset's)")
    add("--batch-size", type=int, help="sequences a step of training on text (the preset's)")
    add("--tasks", nargs="+", default=["sst2", "mr", "agnews"], choices=icl.TASKS, metavar="TASK")
    add("--ks", type=int, nargs="+", default=[0, 1, 2, 4], help="demonstrations for the decoders (%(default)s)")
    add("--queries", type=int, default=100, help="a task (%(default)s)")
    add("--model", default="smollm2-135m", help="that is given momentum (%(default)s)")
    add("--k", type=int, default=16, help="its demonstrations (%(default)s)")
    add("--draws", type=int, nargs="+", default=[1, 2, 3], help="of its demonstrations, by seed (%(default)s)")
    add("--added", type=float, nargs="+", default=[0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5], help="η (%(default)s)")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help="what to do (%(default)s)")
    add("--device", default="cpu", help="(%(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once, a thread each (%(default)s)")
    add("--out", type=Path, default=Path("figures/momentum"), help="where all of it goes (%(default)s)")
    return parser.parse_args()


@dataclass(frozen=True)
class Run:
    """One decoder to be trained."""

    data: str
    preset: pretrain.Preset
    eta: float | Literal["learned"]
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{Path(self.data).stem}_eta{self.eta}_seed{self.seed}"


def plan(args: argparse.Namespace) -> dict[str, list[Run]]:
    """The decoders to train, by part; those of the paper's comparison come first."""
    preset = pretrain.PRESETS[args.preset]
    given = {"n_steps": args.steps, "batch_size": args.batch_size}
    preset = replace(preset, **{name: value for name, value in given.items() if value is not None})
    mapping = pretrain.PRESETS["label-mapping"]
    points = [(one, seed) for seed in args.seeds for one in dict.fromkeys(args.etas)]
    points += [(one, seed) for seed in args.seeds[: args.curve_seeds] for one in args.curve if one not in args.etas]
    return {
        "news": [Run(args.corpus, preset, *point) for point in points],
        "mapping": [Run("label mapping", mapping, *point) for point in points],
    }


def kept(path: Path, compute: Callable[[], Any]) -> Any:
    """What was computed before, or is now, and stays in a file."""
    if path.exists():
        return json.loads(path.read_text())
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(found))
    scratch.replace(path)
    return found


load_task = cache(icl.load_task)


@cache
def corpus(source: str, d_vocab: int) -> pretrain.Corpus:
    """Read once in a process."""
    return pretrain.load_corpus(source, d_vocab)


def trained(run: Run, out: Path, device: str) -> dict[str, Any]:
    """Train a decoder, if it is not yet, and measure it: numbers that are kept beside it."""
    data: Any = pretrain.LabelMapping() if run.data == "label mapping" else corpus(run.data, run.preset.d_vocab)
    folder = out / "models" / run.name
    model = pretrain.train(run.preset, data, eta=run.eta, seed=run.seed, folder=folder, device=device, progress=False)
    losses = json.loads((folder / "losses.json").read_text())
    found: dict[str, Any] = {**asdict(run), "etas": model.eta.tolist(), "losses": losses, "data": repr(data)}
    if isinstance(data, pretrain.LabelMapping):
        right = pretrain.in_context_accuracy(model, data, n=2000, seed=10_000)
        return found | {"accuracy": right.double().mean(0).tolist()}
    n_ctx = run.preset.n_ctx
    lengths = {"train": ("train", n_ctx)} | {f"val {n}": ("validation", n) for n in (n_ctx // 4, n_ctx // 2, n_ctx)}
    blocks = {name: data.blocks(split, n)[: N_PERPLEXITY // n] for name, (split, n) in lengths.items()}
    return found | {"perplexity": {name: pretrain.perplexity(model, found) for name, found in blocks.items()}}


def one_thread() -> None:
    torch.set_num_threads(1)


def train_all(runs: list[Run], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run's numbers, several trained at once, each on a thread of its own."""
    paths = {run: args.out / "cells" / f"{run.name}.json" for run in runs}
    waiting = [run for run, path in paths.items() if not path.exists()]
    if args.jobs == 1 or len(waiting) < 2:
        for run in tqdm(waiting, desc="decoders", unit="decoder"):
            kept(paths[run], lambda run=run: trained(run, args.out, args.device))
    else:
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), one_thread) as pool:
            futures: dict[Future, Run] = {pool.submit(trained, run, args.out, args.device): run for run in waiting}
            for future in tqdm(as_completed(futures), total=len(waiting), desc="decoders", unit="decoder"):
                kept(paths[futures[future]], future.result)
    return [kept(path, dict) for path in paths.values()]


def classified(run: Run, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Which queries of the tasks a trained decoder answers rightly, behind as many demonstrations as fit."""
    load = cache(lambda: icl.load_model(str(args.out / "models" / run.name), device=args.device))
    for task in args.tasks:
        for k in args.ks:
            path = args.out / "cells" / f"{run.name}_{task}_k{k}_n{args.queries}.json"
            found = kept(path, lambda task=task, k=k: answers(load(), task, k, run.seed, args.queries))
            yield {"eta": run.eta, "seed": run.seed, "task": task, "k": k, **found}


def answers(model: icl.Model, name: str, k: int, seed: int, n_queries: int) -> dict[str, Any]:
    """Whether each query's label is right; empty where the prompts are longer than the model's context."""
    task = load_task(name)
    try:
        prompts = icl.build_prompts(model, task, task.demonstrations(k, seed=seed), task.queries(n_queries))
    except icl.PromptError:
        return {"right": [], "label_counts": []}
    found = icl.capture(model, prompts, fields=(), progress=False)
    counts = found.predictions.bincount(minlength=len(task.label_words))
    return {"right": (found.predictions == found.gold).int().tolist(), "label_counts": counts.tolist()}


def intervened(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The pretrained model's answers under momentum, by η, task, demonstrations and their draw."""
    cells = [
        (one, task, k, seed) for one in args.added for task in args.tasks for k in (0, args.k) for seed in args.draws
    ]
    cells = [cell for cell in cells if cell[2] or cell[3] == args.draws[0]]  # without demonstrations, no draw
    load = cache(lambda: icl.load_model(args.model, device=args.device))

    def under(eta: float, task: str, k: int, seed: int) -> dict[str, Any]:
        with icl.momentum_attention(load(), eta) as model:
            return answers(model, task, k, seed, args.queries)

    for one, task, k, seed in tqdm(cells, desc="intervention", unit="cell"):
        path = args.out / "cells" / f"{Path(args.model).stem}_added{one}_{task}_k{k}_seed{seed}_n{args.queries}.json"
        found = kept(path, lambda cell=(one, task, k, seed): under(*cell))
        yield {"eta": one, "task": task, "k": k, "seed": seed, **found}


def main() -> None:
    args = parse()
    runs = plan(args)
    found: dict[str, list[dict[str, Any]]] = {}
    for part in ("mapping", "news"):
        if part in args.parts:
            found[part] = train_all(runs[part], args)
    if "tasks" in args.parts:
        compared = [run for run in runs["news"] if run.eta in args.etas]
        found["tasks"] = [one for run in tqdm(compared, desc="tasks", unit="decoder") for one in classified(run, args)]
    if "intervention" in args.parts:
        found["intervention"] = list(intervened(args))
    momentum_tables.write(found, args)
    print(f"{args.out}/README.md")


if __name__ == "__main__":
    try:
        main()
    except ERRORS as error:
        sys.exit(f"momentum.py: {error}")
