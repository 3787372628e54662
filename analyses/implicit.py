"""The context as one change of weights: how far a patch that serves all queries reproduces in-context learning.

For each model, task and seed, fits the shared patch to some queries and runs it on others, at every rank, beside other
changes: finetuning, a function vector, patches of other prompts and tasks. Then draws tables and figures from what is
saved. What is complete is not run again: a stopped run goes on where it was.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import implicit_tables as tables
import pandas as pd
import torch
from implicit_tables import CONTEXT, LAYER_CAUSAL, ZERO_SHOT, Effects
from torch import Tensor
from tqdm.auto import tqdm

import icl_dual as icl
from icl_dual.finetuning import Method
from icl_dual.models.stream import has_norm_after_attention
from icl_dual.scripts.common import (
    DATA,
    command_line,
    count,
    default_lr,
    file_stem,
    model_name,
    model_title,
    output_folder,
    positive,
    rate,
    run_script,
    script_parser,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_text
from icl_dual.storage import check_same_settings, load_tensors, save_tensors

EXACT_QUERIES = 2
"""How many held-out queries get an exact patch of their own, which shows what is true by construction."""

VECTOR_QUERIES, VECTOR_LAYERS = 8, 5
"""How many of the fitted queries choose the function vector's layer, and out of how many layers."""

ALWAYS = ("models", "tasks", "seeds", "k", "train_queries", "queries")
"""The options that the page's command always has."""

ANGLES = 4
"""How many leading directions are compared by their principal angles."""

RELAXED: dict[str, Literal["raw", "fitted"]] = {"relaxed update, raw": "raw", "relaxed update, rescaled": "fitted"}
"""The runs with (W_ZSL + ΔW_ICL) q in the place of softmax attention, by the scale of `run_relaxed`."""


@dataclass(frozen=True)
class Run:
    """The settings of one model, task and seed."""

    model: str
    task: str
    seed: int
    k: int
    lr: float
    lr_causal: float
    n_train: int
    n_queries: int

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return f"{file_stem(short(self.model))}_{self.task}_k{self.k}_seed{self.seed}"


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--models", type=model_name, nargs="+", default=["smollm2-135m", "gemma3-270m"], help="models (%(default)s)")
    add(
        "--tasks",
        nargs="+",
        default=["sst2", "mr"],
        choices=icl.TASKS,
        metavar="TASK",
        help=f"tasks, of {', '.join(icl.TASKS)} (%(default)s)",
    )
    add("--seeds", type=count, nargs="+", default=[1, 2, 3], help="draws of the demonstrations (%(default)s)")
    add("--k", type=positive, default=8, help="demonstrations (%(default)s)")
    add("--train-queries", type=positive, default=32, help="queries that patches are fitted to (%(default)s)")
    add("--queries", type=positive, default=24, help="held-out queries that changes are run on (%(default)s)")
    add(
        "--ranks",
        type=positive,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="ranks of the shared patch, besides the full one (%(default)s)",
    )
    add("--lr", type=rate, help="finetuning's learning rate (chosen by analyses/select_lr.py for model and task)")
    add("--out", type=output_folder, default="figures/implicit", help="folder for all output (%(default)s)")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def plan(args: argparse.Namespace) -> list[Run]:
    """Return the runs, those of a model one after another."""
    return [
        Run(
            model=model,
            task=task,
            seed=seed,
            k=args.k,
            lr=default_lr(model, task) if args.lr is None else args.lr,
            lr_causal=_causal_lr(model, task) if args.lr is None else args.lr,
            n_train=args.train_queries,
            n_queries=args.queries,
        )
        for model in dict.fromkeys(args.models)
        for seed in dict.fromkeys(args.seeds)
        for task in dict.fromkeys(args.tasks)
    ]


def _causal_lr(model: str, task: str) -> float:
    """Return the rate that was chosen for layer-causal finetuning, or else the one for plain finetuning."""
    finetuning = icl.FinetuneConfig(method="layer-causal")
    variant = icl.Cell(model=model, task=task, k=1, seed=1, lr=1.0, finetuning=finetuning)
    try:
        return default_lr(model, task, variant)
    except icl.StudyError:
        return default_lr(model, task)


@lru_cache(maxsize=1)
def load(model: str) -> icl.Model:
    return icl.load_model(model)


@lru_cache(maxsize=4)
def zero_shot_capture(model: str, task: str, n_queries: int) -> icl.Capture:
    """Capture the held-out queries alone, once for all seeds."""
    of_task = icl.load_task(task)
    prompts = icl.build_prompts(load(model), of_task, [], of_task.queries(n_queries))
    return icl.capture(load(model), prompts.zero_shot(), fields=icl.EFFECT_FIELDS, progress=False)


class Bench:
    """One run: prompts, patches and captures, each made when it is first needed, and saved where it is small."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder / run.name
        self.settings = {**asdict(run), "model": short(run.model)}

    @property
    def model(self) -> icl.Model:
        """Return the model; it is loaded when it is first needed."""
        return load(self.run.model)

    @cached_property
    def prompts(self) -> tuple[icl.Prompts, icl.Prompts]:
        """Return the prompts of the fitted queries and of the held-out ones: of two splits, and of other texts."""
        run, task = self.run, icl.load_task(self.run.task)
        held_out, demonstrations = task.queries(run.n_queries), task.demonstrations(run.k, run.seed)
        taken = {query.identity for query in held_out} | {example.identity for example in demonstrations}
        fitted = [query for query in task.queries(split="selection") if query.identity not in taken][: run.n_train]
        train, test = (icl.build_prompts(self.model, task, demonstrations, queries) for queries in (fitted, held_out))
        return train, test

    @property
    def zero_shot(self) -> icl.Capture:
        """Return the capture of the held-out queries alone."""
        return zero_shot_capture(self.run.model, self.run.task, self.run.n_queries)

    @cached_property
    def in_context(self) -> icl.Capture:
        """Return the capture of the held-out queries after the demonstrations."""
        return icl.capture(self.model, self.prompts[1], fields=icl.EFFECT_FIELDS, progress=False)

    def saved(self, name: str, cls: Any, make: Callable[[], Any]) -> Any:
        """Return a result of the library, read where it is saved and made where it is not."""
        folder = self.folder / name
        if folder.exists():
            check_same_settings(folder, {"settings": self.settings}, load_tensors(folder)[1])
            return cls.load(folder)
        result = make()
        result.save(folder, {"settings": self.settings})
        return result

    @cached_property
    def statistics(self) -> icl.SharedStatistics:
        """Return the sums over the fitted queries, from which shared patches follow."""
        return icl.sum_statistics(self.model, self.prompts[0])

    @property
    def shared(self) -> icl.SharedPatch:
        """Return the shared patch of full rank."""
        return self.saved("patch", icl.SharedPatch, lambda: self.statistics.ridge_patch())

    @property
    def mean(self) -> icl.SharedPatch:
        """Return the mean patch."""
        return self.saved("mean", icl.SharedPatch, lambda: self.statistics.mean_patch())

    @property
    def thought_matrix(self) -> icl.SharedPatch:
        """Return the thought matrix."""
        return self.saved("thought", icl.SharedPatch, lambda: self.statistics.thought_matrix())

    def finetuned(self, method: Method) -> icl.WeightDelta:
        """Return what finetuning on the demonstrations changes."""
        lr = self.run.lr_causal if method == "layer-causal" else self.run.lr
        config = icl.FinetuneConfig(method=method)

        def make() -> icl.WeightDelta:
            delta = icl.finetune(self.model, self.prompts[0], lr=lr, config=config, progress=False)
            return replace(delta, training_q=None, training_k=None)

        return self.saved(f"delta-{method}", icl.WeightDelta, make)

    @property
    def function_vector(self) -> icl.FunctionVector:
        """Return the function vector."""
        return self.saved("vector", icl.FunctionVector, self._choose_vector)

    def _choose_vector(self) -> icl.FunctionVector:
        """Return the function vector of the layer with the lowest KL divergence on some of the fitted queries."""
        prompts, fields = self.prompts[0].first(min(VECTOR_QUERIES, len(self.prompts[0].queries))), icl.EFFECT_FIELDS
        reference = icl.capture(self.model, prompts, fields=(*fields, "attn_out"), progress=False)
        alone = icl.capture(self.model, prompts.zero_shot(), fields=fields, progress=False)
        n_layers = self.model.n_layers
        layers = sorted({round(index) for index in torch.linspace(0, n_layers - 1, VECTOR_LAYERS).tolist()})
        kl = {}
        for layer in layers:
            with icl.build_function_vector(reference, layer).applied(self.model):
                changed = icl.capture(self.model, prompts.zero_shot(), fields=fields, progress=False)
            kl[layer] = icl.compare_effects(zero_shot=alone, reference=reference, changed=changed).kl.mean().item()
        return icl.build_function_vector(reference, min(kl, key=kl.__getitem__))

    @property
    def has_short_labels(self) -> bool:
        """Return whether every label word is one token."""
        return all(len(label) == 1 for label in self.prompts[1].labels)

    def exact_patches(self) -> list[icl.ExactPatch]:
        """Return the exact patch of each of the first held-out queries."""
        test = self.prompts[1]
        return [
            icl.build_exact_patch(self.model, test, query) for query in range(min(EXACT_QUERIES, len(test.queries)))
        ]

    def effect(self, change: AbstractContextManager[Any] | None) -> dict[str, Tensor]:
        """Return what a change does to the held-out queries; `None` for the context itself."""
        if change is None:
            changed = self.in_context
        else:
            with change:
                changed = icl.capture(self.model, self.zero_shot.prompts, fields=icl.EFFECT_FIELDS, progress=False)
        return self.compared(self.zero_shot, self.in_context, changed)

    def compared(self, zero_shot: icl.Capture, in_context: icl.Capture, changed: icl.Capture) -> dict[str, Tensor]:
        """Return what a change does to queries, as tensors."""
        effect = icl.compare_effects(
            zero_shot=zero_shot, reference=in_context, changed=changed, rank=ANGLES, seed=self.run.seed
        )
        return {name: values for name, values in vars(effect).items() if isinstance(values, Tensor)}

    def vector_effect(self, of: "Bench") -> dict[str, Tensor]:
        """Return what the function vector of a run of this model does; nothing where a norm follows attention, so that
        the vector has another scale than the stream."""
        if any(has_norm_after_attention(self.model, layer) for layer in range(self.model.n_layers)):
            return {}
        return self.effect(of.function_vector.applied(self.model))

    def exact_effect(self) -> dict[str, Tensor]:
        """Return what exact patches do, each to the query that it was built for; nothing where a label word has several
        tokens, of which the patch is for the first."""
        if not self.has_short_labels:
            return {}
        patches = self.exact_patches()
        pair = (captured.first(len(patches)) for captured in (self.zero_shot, self.in_context))
        zero_shot, in_context = pair
        return self.compared(zero_shot, in_context, icl.capture_each(self.model, zero_shot.prompts, patches))

    def relaxed_effect(self, scale: Literal["raw", "fitted"]) -> dict[str, Tensor]:
        """Return what the relaxed update makes the model answer; nothing where a label word has several tokens."""
        if not self.has_short_labels:
            return {}
        result = icl.run_relaxed(self.model, self.prompts[1], scale=scale)
        agreement = (result.predictions == self.in_context.predictions).double()
        return {"kl": result.kl.double(), "agreement": agreement, "correct": result.correct.double()}


class Change(NamedTuple):
    """A change of the model that is run on the held-out queries."""

    name: str
    effect: Callable[[], dict[str, Tensor]]
    """Returns what the change does."""
    other: Bench | None = None
    """The run that the change is of, where it is another one than that of the queries."""

    def settings(self, bench: Bench) -> dict[str, Any]:
        """Return what the effect was made with: the settings of the run, and of the other."""
        return bench.settings if self.other is None else {**bench.settings, "other": self.other.settings}


def changes(bench: Bench, benches: Mapping[Run, Bench], ranks: Sequence[int]) -> Iterator[Change]:
    """Yield each change of a run."""
    run = bench.run
    alone = [of for of in benches if of.model == run.model and of != run]
    prompts = [of for of in alone if of.task == run.task]
    tasks = [of for of in alone if of.seed == run.seed]

    def of(change: Callable[[], Any]) -> Callable[[], dict[str, Tensor]]:
        return lambda: bench.effect(change().applied(bench.model))

    yield Change(CONTEXT, lambda: bench.effect(None))
    yield Change(ZERO_SHOT, lambda: bench.compared(bench.zero_shot, bench.in_context, bench.zero_shot))
    full = bench.shared.rank
    for rank in [*sorted({rank for rank in ranks if rank < full}), full]:
        yield Change(tables.ranked(rank), of(lambda rank=rank: bench.shared.truncated(rank)))
    yield Change("mean patch", of(lambda: bench.mean))
    yield Change("thought matrix", of(lambda: bench.thought_matrix))
    if prompts:
        of_prompt = benches[_after(prompts, run)]
        yield Change("another prompt's patch", of(lambda: of_prompt.shared), of_prompt)
    of_task = benches[_after(tasks, run)] if tasks else None
    if of_task:
        yield Change("another task's patch", of(lambda: of_task.shared), of_task)
    yield Change("random patch", of(lambda: icl.draw_random_patch(bench.shared, seed=run.seed)))
    yield Change("FT", of(lambda: bench.finetuned("sgd")))
    yield Change(LAYER_CAUSAL, of(lambda: bench.finetuned("layer-causal")))
    yield Change("function vector", lambda: bench.vector_effect(bench))
    if of_task:
        yield Change("another task's FT", of(lambda: of_task.finetuned("sgd")), of_task)
        yield Change("another task's function vector", lambda: bench.vector_effect(of_task), of_task)
    yield Change(tables.EXACT, bench.exact_effect)
    for name, scale in RELAXED.items():
        yield Change(name, partial(bench.relaxed_effect, scale))


def _after(runs: Sequence[Run], run: Run) -> Run:
    """Return the run that comes after one, in the order of seeds or else of tasks; the first after the last."""
    key = (run.seed, run.task)
    later = [of for of in runs if (of.seed, of.task) > key]
    return min(later or runs, key=lambda of: (of.seed, of.task))


def run_all(runs: Sequence[Run], args: argparse.Namespace) -> dict[Run, Effects]:
    """Return every run's effects by the name of the change, read where they are saved."""
    benches = {run: Bench(run, args.out / "cells") for run in runs}
    effects: dict[Run, Effects] = {run: {} for run in runs}
    for run in tqdm(runs, desc="patches", unit="run"):
        bench = benches[run]
        _ = bench.shared, bench.mean, bench.thought_matrix
        bench.__dict__.pop("statistics", None)  # hundreds of MB
    for run in tqdm(runs, desc="changes", unit="run"):
        bench = benches[run]
        for change in changes(bench, benches, args.ranks):
            folder = bench.folder / "effects" / change.name.replace(" ", "-").replace("'", "")
            settings = {"settings": change.settings(bench)}
            if folder.exists():
                values, metadata = load_tensors(folder)
                check_same_settings(folder, settings, metadata)
            else:
                started = time.process_time()
                values = {name: value.contiguous() for name, value in change.effect().items()}
                seconds = time.process_time() - started
                save_tensors(folder, values, {**settings, "seconds": seconds, "about": _about(bench)})
            if values:
                effects[run][change.name] = values
        bench.__dict__.pop("in_context", None)
    return effects


def _about(bench: Bench) -> dict[str, Any]:
    """Return what identifies the model and the versions that ran."""
    return {
        "model": bench.model.provenance,
        "dtype": bench.model.precision,
        "d_model": bench.model.d_model,
        "versions": {name: version(name) for name in ("icl-dual", "torch", "transformers", "transformer-lens")},
    }


def compare_matrices(runs: Sequence[Run], args: argparse.Namespace) -> pd.DataFrame:
    """Return how similar changes of the same matrices are: a row for each model, pair and matrix."""
    benches = {run: Bench(run, args.out / "cells") for run in runs}
    rows = []
    for run, bench in tqdm(benches.items(), desc="matrices", unit="run"):
        others = [of for of in runs if of.model == run.model and of.task == run.task and of != run]
        tasks = [of for of in runs if of.model == run.model and of.seed == run.seed and of != run]
        pairs: dict[str, tuple[Any, Any]] = {
            "shared patch and thought matrix": (bench.shared, bench.thought_matrix),
            "FT and layer-causal FT": (bench.finetuned("sgd"), bench.finetuned("layer-causal")),
        }
        if others:
            pairs["shared patches of two prompts"] = bench.shared, benches[_after(others, run)].shared
        if tasks:
            pairs["shared patches of two tasks"] = bench.shared, benches[_after(tasks, run)].shared
        for name, pair in pairs.items():
            frame = icl.compare_weights(*pair, rank=ANGLES, seed=run.seed).to_frame()
            frame.insert(0, "pair", name)
            rows.append(frame.assign(model=short(run.model), task=run.task, seed=run.seed))
    return tables.matrix_table(rows)


def _effect_folders(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "effects").iterdir() if path.is_dir())


def write_page(markdown_tables: Mapping[str, pd.DataFrame], runs: Sequence[Run], args: argparse.Namespace) -> None:
    of_effects = {
        run: [load_tensors(path)[1] for path in _effect_folders(args.out / "cells" / run.name)] for run in runs
    }
    seconds = sum(metadata["seconds"] for by_run in of_effects.values() for metadata in by_run)
    origins = {run.model: by_run[0]["about"] for run, by_run in of_effects.items()}
    models = "; ".join(
        f"{markdown_text(model_title(model))} ({markdown_code(short(model))}, {origin['model']}, {origin['dtype']})"
        for model, origin in origins.items()
    )
    fill = {name: markdown(frame, disable_numparse=True) for name, frame in markdown_tables.items()}
    fill |= {
        "command": command_line(__file__, make_parser(), args, always=ALWAYS),
        "models": models,
        "versions": ", ".join(f"{name} {number}" for name, number in origins[runs[0].model]["versions"].items()),
        "minutes": f"{seconds / 60:.0f}",
        "n_angles": str(ANGLES),
        "k": str(args.k),
        "n_train": str(args.train_queries),
        "n_queries": str(args.queries),
        "seeds": ", ".join(map(str, args.seeds)),
        "tasks": ", ".join(map(tables.task_title, args.tasks)),
        "rates": "; ".join(_rates(run) for run in runs if run.seed == runs[0].seed),
        "pictures": "\n\n".join(_pictures(model) for model in dict.fromkeys(args.models)),
    }
    text = (DATA / "implicit_page.md").read_text(encoding="utf-8")
    write_text(args.out / "README.md", text.format(**fill))


def _rates(run: Run) -> str:
    return f"{markdown_code(short(run.model))} {tables.task_title(run.task)} {run.lr:g}, layer-causal {run.lr_causal:g}"


def _pictures(model: str) -> str:
    title, name = markdown_text(model_title(model)), file_stem(short(model))
    return (
        f"![accuracy and KL against the rank, {title}](rank_{name}.png)\n\n"
        f"![cosine with the in-context change by layer, {title}](stream_{name}.png)"
    )


def write(args: argparse.Namespace) -> None:
    """Run what is not finished, and write all tables, figures and the page."""
    runs = plan(args)
    effects = run_all(runs, args)
    behaviour = tables.behaviour(effects)
    markdown_tables = {metric: tables.behaviour_table(behaviour, metric) for metric in tables.METRICS}
    markdown_tables |= {"stream": tables.stream_table(effects), "matrices": compare_matrices(runs, args)}
    write_csv(args.out / "behaviour.csv", behaviour, float_format="%.5g")
    write_csv(args.out / "stream.csv", tables.stream(effects), float_format="%.5g")
    write_csv(args.out / "matrices.csv", markdown_tables["matrices"])
    for model in dict.fromkeys(args.models):
        short_name = short(model)
        name = file_stem(short_name)
        title = f"{model_title(model)}\nk = {args.k}, {args.queries} queries × {len(args.seeds)} seeds"
        of_model = {run: by_name for run, by_name in effects.items() if run.model == model}
        tables.draw_ranks(behaviour.query("model == @short_name"), title, args.out / f"rank_{name}")
        tables.draw_stream(of_model, title, args.out / f"stream_{name}")
    write_page(markdown_tables, runs, args)
    print(markdown(markdown_tables["kl"], disable_numparse=True))
    print(f"\nTables and figures are in {args.out}/; the page that explains them is {args.out}/README.md")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        parse, write, argv, stopped="What is finished stays in {out}/cells; the same command goes on from it."
    )


if __name__ == "__main__":
    sys.exit(main())
