"""Momentum attention: decoders trained with and without it, and a pretrained model that is given it.

Trains decoders that differ in η alone, from the same weights on the same sequences, by several seeds: on text, and on a
task that only its context can solve. Compares perplexity at the training length and at three validation lengths, and
accuracy as demonstrations grow. Then adds momentum to a pretrained model and asks what its in-context learning makes of
it. A stopped run goes on where it was.
"""

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import momentum_tables
import torch
from tqdm.auto import tqdm

import icl_dual as icl
from icl_dual import pretraining
from icl_dual.scripts.common import (
    command_line,
    count,
    device,
    eta,
    file_stem,
    model_name,
    output_folder,
    positive,
    run_script,
    script_parser,
)
from icl_dual.storage import check_same_settings, read_json, write_json

MAPPING = "label mapping"
PARTS = ("text", "mapping", "tasks", "intervention")
N_PERPLEXITY = 50_000
"""Tokens of each split that perplexity is taken over, at most."""


RANK, N_PROCESSES = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
"""Of `torchrun`, under which trainings only are shared: the first process does all else."""


def eta_or_learned(text: str) -> float | Literal["learned"]:
    """Return an η to train with: a number, or `learned`."""
    return "learned" if text == "learned" else eta(text)


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    shapes = [name for name in pretraining.PRESETS if name != "label-mapping"]
    add("--preset", default="tiny", choices=shapes, help="shape of the decoders trained on text (%(default)s)")
    add("--corpus", default="agnews", help="agnews, a .txt file with a text a line, or a hub data set (%(default)s)")
    add(
        "--etas",
        type=eta_or_learned,
        nargs="+",
        default=[0.0, 0.1, "learned"],
        help="η to train with; 0: none (%(default)s)",
    )
    add(
        "--curve",
        type=eta_or_learned,
        nargs="*",
        default=[0.3, 0.5, 0.9],
        help="more η, for the first seeds only; --curve without a value: none (%(default)s)",
    )
    add("--seeds", type=count, nargs="+", default=[1, 2, 3, 4, 5], help="seeds of training on text (%(default)s)")
    add(
        "--mapping-seeds",
        type=count,
        nargs="+",
        default=list(range(1, 11)),
        help="seeds of training on the label mapping (%(default)s)",
    )
    add("--curve-seeds", type=count, default=2, help="number of seeds for the η of --curve (%(default)s)")
    add("--steps", type=positive, help="training steps on text (the preset's)")
    add("--batch-size", type=positive, help="sequences a training step on text (the preset's)")
    add("--tasks", nargs="+", default=["sst2", "mr", "agnews"], choices=icl.TASKS, metavar="TASK")
    add("--ks", type=count, nargs="+", default=[0, 1, 2, 4], help="demonstrations for the decoders (%(default)s)")
    add("--queries", type=positive, default=100, help="evaluation queries a task (%(default)s)")
    add(
        "--model", type=model_name, default="smollm2-135m", help="pretrained model that is given momentum (%(default)s)"
    )
    add("--k", type=positive, default=16, help="demonstrations for the pretrained model (%(default)s)")
    add("--draws", type=count, nargs="+", default=[1, 2, 3], help="seeds of these demonstrations (%(default)s)")
    add(
        "--added",
        type=eta,
        nargs="+",
        default=[0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5],
        help="η added to the pretrained model (%(default)s)",
    )
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help="parts to run (%(default)s)")
    add("--device", type=device, default="cpu", choices=("cpu", "cuda"), help="(%(default)s)")
    add("--jobs", type=positive, help="trainings at a time, which share the cores (a core each; on a GPU, 1)")
    add("--redraw", action="store_true", help="only draw the figures again from the tables in --out")
    add("--out", type=output_folder, default="figures/momentum", help="folder for all output (%(default)s)")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def n_jobs(args: argparse.Namespace) -> int:
    """Return how many decoders are trained at a time."""
    if args.jobs is not None:
        return args.jobs
    return (os.cpu_count() or 1) if args.device == "cpu" and N_PROCESSES == 1 else 1


@dataclass(frozen=True)
class Run:
    """One decoder to be trained."""

    data: str
    preset: pretraining.Preset
    eta: float | Literal["learned"]
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run's files."""
        return f"{Path(self.data).name}_eta{self.eta}_seed{self.seed}".replace(" ", "_")


def plan(args: argparse.Namespace) -> dict[str, list[Run]]:
    """Return the decoders to train, by part; those of the paper's comparison come first."""
    preset = pretraining.PRESETS[args.preset]
    if args.steps is not None:  # the same share of them to warm up
        preset = replace(preset, n_steps=args.steps, n_warmup=preset.n_warmup * args.steps // preset.n_steps)
    if args.batch_size is not None:
        preset = replace(preset, batch_size=args.batch_size)
    etas, more = dict.fromkeys(args.etas), [one for one in args.curve if one not in args.etas]

    def runs(data: str, preset: pretraining.Preset, seeds: list[int]) -> list[Run]:
        points = [(one, seed) for seed in seeds for one in etas]
        points += [(one, seed) for seed in seeds[: args.curve_seeds] for one in more]
        return [Run(data, preset, *point) for point in points]

    return {
        "text": runs(args.corpus, preset, args.seeds),
        "mapping": runs(MAPPING, pretraining.PRESETS["label-mapping"], args.mapping_seeds),
    }


def kept(path: Path, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]] | None) -> dict[str, Any]:
    """Return a cell from its file, or compute and keep it; empty where neither is to be done.

    Raises:
        StudyError: it was computed with other settings.
    """
    if path.exists():
        cell = read_json(path)
        check_same_settings(path, settings, cell)
        return cell
    if compute is None:
        return {}
    versions = {name: version(name) for name in ("icl-dual", "torch", "transformers", "transformer-lens")}
    cell = {**settings, **compute(), "versions": versions}
    write_json(path, cell)
    return cell


load_task = cache(icl.load_task)


@cache
def corpus(source: str, d_vocab: int) -> pretraining.Corpus:
    """Read once in a process."""
    return pretraining.load_corpus(source, d_vocab)


def trained(run: Run, out: Path, device: str) -> dict[str, Any]:
    """Train a decoder, if it is not yet, and measure it."""
    data: Any = pretraining.LabelMapping() if run.data == MAPPING else corpus(run.data, run.preset.d_vocab)
    folder, n_ctx = out / "models" / run.name, run.preset.n_ctx
    lengths = {"train": ("train", n_ctx)} | {f"val {n}": ("validation", n) for n in (n_ctx // 4, n_ctx // 2, n_ctx)}
    is_text = isinstance(data, pretraining.Corpus)  # its validation split is checked here, before training
    blocks = {name: data.blocks(*of)[: N_PERPLEXITY // of[1]] for name, of in lengths.items()} if is_text else {}
    show = device == "cuda"
    model: Any = pretraining.train(
        run.preset, data, eta=run.eta, seed=run.seed, folder=folder, device=device, progress=show
    )
    if RANK:
        return {}
    model.to(torch.device(device))
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    measured: dict[str, Any] = {"etas": model.eta.tolist(), "losses": losses, "device": device}
    if is_text:
        return measured | {
            "perplexity": {name: pretraining.perplexity(model, chosen) for name, chosen in blocks.items()}
        }
    right = pretraining.in_context_accuracy(model, data, n=2000, seed=10_000)
    ceiling = [data.best_accuracy(n) for n in range(data.n_pairs)]
    return measured | {"accuracy": right.double().mean(0).tolist(), "ceiling": ceiling}


def train_all(runs: list[Run], args: argparse.Namespace, *, compute: bool) -> list[dict[str, Any]]:
    """Return every run's numbers, with several trained at once; without computing, those that are saved."""
    paths = {run: args.out / "cells" / f"{run.name}.json" for run in runs}
    waiting = [run for run in runs if compute and not kept(paths[run], asdict(run), None)]
    with tqdm(total=len(waiting), desc="decoders", unit="decoder", disable=not waiting) as bar:
        if (jobs := n_jobs(args)) == 1:
            for run in waiting:
                measured = trained(run, args.out, args.device)
                if RANK == 0:
                    kept(paths[run], asdict(run), lambda measured=measured: measured)
                bar.update()
        else:
            threads = max(1, (os.cpu_count() or 1) // jobs)
            pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
            try:
                futures: dict[Future, Run] = {pool.submit(trained, run, args.out, args.device): run for run in waiting}
                for future in as_completed(futures):
                    run = futures[future]
                    kept(paths[run], asdict(run), future.result)
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
    cells = [kept(path, asdict(run), None) for run, path in paths.items()]
    return [cell for cell in cells if cell]


def classified(run: Run, args: argparse.Namespace, *, compute: bool) -> list[dict[str, Any]]:
    """Return which queries of the tasks a trained decoder answers rightly, after as many demonstrations as fit."""
    load = cache(lambda: icl.load_model(str(args.out / "models" / run.name), device=args.device))
    cells = []
    for task in args.tasks:
        for k in args.ks:
            path = args.out / "cells" / f"{run.name}_{task}_k{k}_n{args.queries}.json"
            settings = {**asdict(run), "task": task, "k": k, "queries": args.queries}

            def ask(task: str = task, k: int = k) -> dict[str, Any]:
                if not (args.out / "models" / run.name).exists():
                    raise icl.StudyError(f"expected {run.name} to be trained before it is asked: add text to --parts")
                return answers(load(), task, k, run.seed, args.queries)

            cells.append(kept(path, settings, ask if compute else None))
    return [cell for cell in cells if cell]


def answers(model: icl.Model, name: str, k: int, seed: int, n_queries: int) -> dict[str, Any]:
    """Whether each query's label is right; empty where the prompts are longer than the model's context."""
    task = load_task(name)
    about = {"fingerprint": model.fingerprint(), "provenance": model.provenance}
    try:
        prompts = icl.build_prompts(model, task, task.demonstrations(k, seed=seed), task.queries(n_queries))
    except icl.PromptError:
        return {"right": [], "label_counts": [], **about}
    run = icl.capture(model, prompts, fields=(), progress=False)
    counts = run.predictions.bincount(minlength=len(task.label_words))
    return {"right": (run.predictions == run.gold).int().tolist(), "label_counts": counts.tolist(), **about}


def intervened(args: argparse.Namespace, *, compute: bool) -> list[dict[str, Any]]:
    """Return the pretrained model's answers under momentum, by η, task, demonstrations and their draw."""
    etas = dict.fromkeys((0.0, *args.added))  # with none to hold the others against
    points = [(one, task, k, seed) for one in etas for task in args.tasks for k in (0, args.k) for seed in args.draws]
    points = [point for point in points if point[2] or point[3] == args.draws[0]]  # without demonstrations, no draw
    load = cache(lambda: icl.load_model(args.model, device=args.device))
    cells = []
    for one, task, k, seed in tqdm(points, desc="intervention", unit="cell", disable=not compute):
        name = f"{file_stem(args.model)}_added{one}_{task}_k{k}_seed{seed}_n{args.queries}.json"
        settings = {"model": args.model, "eta": one, "task": task, "k": k, "seed": seed, "queries": args.queries}

        def ask(one: float = one, task: str = task, k: int = k, seed: int = seed) -> dict[str, Any]:
            with icl.momentum_attention(load(), one) as model:
                return answers(model, task, k, seed, args.queries)

        cells.append(kept(args.out / "cells" / name, settings, ask if compute else None))
    return [cell for cell in cells if cell]


def _check_inputs(args: argparse.Namespace, runs: list[Run]) -> None:
    """Raise an AssetError before anything is trained where a text or a model that is still to be read is missing."""
    is_needed = "text" in args.parts and not all((args.out / "cells" / f"{run.name}.json").exists() for run in runs)
    if is_needed and args.corpus.endswith(".txt") and not Path(args.corpus).is_file():
        raise icl.AssetError(f"expected --corpus as an existing text file, got {args.corpus!r}: check the path")
    if "intervention" in args.parts and not list(
        (args.out / "cells").glob(f"{glob.escape(file_stem(args.model))}_added*")
    ):
        icl.load_model(args.model, device=args.device)


def write(args: argparse.Namespace) -> None:
    """Train and measure what is not finished, and write all tables and figures."""
    if args.redraw:
        momentum_tables.redraw(args.out, args.model)
        return
    runs = plan(args)
    if RANK == 0:
        _check_inputs(args, runs["text"])
    cells = {part: train_all(runs[part], args, compute=part in args.parts) for part in ("mapping", "text")}
    if RANK:
        return
    compared = [run for run in runs["text"] if run.eta in args.etas]
    by_run = [
        classified(run, args, compute="tasks" in args.parts) for run in tqdm(compared, desc="tasks", unit="decoder")
    ]
    cells["tasks"] = [cell for of_run in by_run for cell in of_run]
    cells["intervention"] = intervened(args, compute="intervention" in args.parts)
    momentum_tables.write(cells, args, command_line(__file__, make_parser(), args))
    print(f"Tables and figures are in {args.out}/; the page that explains them is {args.out}/README.md")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        parse, write, argv, stopped="Finished decoders and cells stay in {out}; the same command goes on from them."
    )


if __name__ == "__main__":
    sys.exit(main())
