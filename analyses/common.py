"""What the scripts share: how they run, their options, the tasks' titles and learning rates, and figures' layout."""

import argparse
import json
import shlex
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import icl_dual as icl
from icl_dual.assets import describe_model
from icl_dual.finetuning import REPLICAS, Loss, Method, Trained
from icl_dual.models.precision import precision_name

DATA = Path(__file__).parent / "data"
TITLES = {"sst2": "SST2", "sst5": "SST5", "mr": "MR", "subj": "Subj", "agnews": "AGNews", "cb": "CB"}
ERRORS = (ValueError, OSError, icl.AssetError, icl.DivergedError)
"""What a user can mend: every error of the library is one of these, and is shown in a line without a traceback."""


def run_script(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    body: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    *,
    stopped: str = "",
) -> int:
    """Run a script and return its exit code.

    That is 0; 1 after an error that the user can mend; 2 after arguments that the parser refuses; 130 after Ctrl-C.

    Args:
        parse: reads `argv` (by default the process's own arguments).
        body: what the script does with its arguments.
        argv: the arguments, without the script's name.
        stopped: what Ctrl-C leaves behind, with the arguments' names in braces.
    """
    try:
        args = parse(argv)
    except SystemExit as stop:  # argparse has said why, or has shown the help
        return int(stop.code or 0)
    try:
        body(args)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped. {stopped.format(**vars(args))}".rstrip(), file=sys.stderr)
        return 130
    return 0


def command_line(
    script: str, parser: argparse.ArgumentParser, args: argparse.Namespace, *, always: Collection[str] = ()
) -> str:
    """Return the command that makes `args` again.

    It has the options that differ from the parser's defaults and those named in `always`, in the parser's order. It
    names no folder of the machine: a model or a corpus given by its path is written as its name, and an absolute output
    path is left out.

    Args:
        script: the script's file.
        parser: where the defaults come from.
        args: what was parsed.
        always: names of options that are written even where they have their default.
    """
    words = ["python", f"analyses/{Path(script).name}"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or (value == action.default and action.dest not in always):
            continue
        if value is None and action.type is not count_or_all:
            continue
        if isinstance(value, Path) and value.is_absolute():
            continue
        words += [action.option_strings[-1], *_typed(value)]
    return shlex.join(words)


def _typed(value: object) -> list[str]:
    """Return an option's values as they are typed."""
    if isinstance(value, bool):
        return []
    if value is None:  # only `count_or_all` makes it of something typed
        return ["all"]
    values = value if isinstance(value, list) else [value]
    return [str(entry) if isinstance(entry, Path) else short(str(entry)) for entry in values]


def short(model: str) -> str:
    """Return a model's short name: of a folder, its last part."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def model_title(model: str) -> str:
    """Return what a model is, for tables, captions and figure titles: of a packaged one, checkpoint and format."""
    return describe_model(short(model))


def count_or_all(text: str) -> int | None:
    """A number of queries; None for all."""
    if text != "all" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number from 1, or all, got {text!r}")
    return None if text == "all" else int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


@contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """This process's resident memory in bytes, first before and then every two milliseconds."""
    import psutil  # an extra: only memory needs it

    process, done = psutil.Process(), threading.Event()
    memory = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(0.002):
            memory.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def script_parser(description: str | None, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring as it is; its first options are the parents'."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, parents=parents
    )


def cell_parser(description: str | None, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser with the options that settle a script's cells."""
    parser = script_parser(description, *parents)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="packaged model, hub id, folder or .gguf file (%(default)s)")
    add(
        "--tasks",
        nargs="+",
        default=["sst2", "sst5", "mr", "subj", "agnews"],
        choices=icl.TASKS,
        metavar="TASK",
        help=f"tasks, of {', '.join(icl.TASKS)} (%(default)s)",
    )
    add("--k", type=int, help="demonstrations (the paper's: 32; 22 for agnews, 19 for cb)")
    add("--queries", type=count_or_all, default=100, help="evaluation queries a task, or all (%(default)s)")
    add("--lr", type=float, help="finetuning's learning rate (chosen by analyses/select_lr.py for model and task)")
    add(
        "--protocol",
        choices=("answer", "reference"),
        default="answer",
        help="record at the token that predicts the label, or all as the released code does (%(default)s)",
    )
    add("--source", choices=("wheel", "hub"), help="origin of the tasks' rows (each task's default)")
    add(
        "--replicas",
        type=int,
        default=REPLICAS,
        help="repeats of the finetuning that show how stable its numbers are; 0: none (%(default)s)",
    )
    add("--device", default="cpu", help="(%(default)s)")
    add(
        "--dtype",
        default="float32",
        choices=("float64", "float32", "bfloat16", "float16"),
        help="number format of the weights (%(default)s)",
    )
    add("--arithmetic", choices=("float32",), help="number format to compute in (that of the weights)")
    return parser


def precision(args: argparse.Namespace) -> dict[str, Any]:
    """The precision that a cell parser's options say, as arguments of `load_model` and `run_study`."""
    arithmetic = None if args.arithmetic is None else getattr(torch, args.arithmetic)
    return {"dtype": getattr(torch, args.dtype), "arithmetic": arithmetic}


def precision_title(args: argparse.Namespace) -> str:
    """The precision that a cell parser's options say, in words."""
    return precision_name(getattr(torch, args.dtype), getattr(torch, args.arithmetic or args.dtype))


def variant_parser() -> argparse.ArgumentParser:
    """Return a parser with the options of finetuning, as a parent of other parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--loss", choices=get_args(Loss), default="all", help="loss over all tokens or the label word's (%(default)s)")
    add("--method", choices=get_args(Method), default="sgd", help="optimisation method (%(default)s)")
    add("--trained", choices=get_args(Trained), default="key-value", help="trained projections (%(default)s)")
    return parser


def lr_key(model: str, variant: icl.Cell | None = None) -> str:
    """What a model's learning rates are filed under: its name, and how a cell's finetuning differs from the paper's."""
    variation = {} if variant is None else variant.variation
    return ", ".join([model, *(variation[name] for name in ("loss", "method", "trained") if name in variation)])


def default_lr(model: str, task: str, variant: icl.Cell | None = None) -> float:
    """The rate chosen for a model and a task on selection queries, and for the finetuning of a cell."""
    chosen, name = json.loads((DATA / "default_lr.json").read_text()), lr_key(model, variant)
    try:
        return chosen[name][task]
    except KeyError:
        options = variant.variation.keys() & {"loss", "method", "trained"} if variant else ()
        flags = "".join(f" --{option} {getattr(variant, option)}" for option in sorted(options))
        known = "; ".join(f"{of} on {', '.join(tasks)}" for of, tasks in chosen.items())
        raise icl.StudyError(
            f"no learning rate was chosen for {name!r} on {task} (only for {known}): pass --lr, or choose one on "
            f"selection queries with python analyses/select_lr.py --model {model} --tasks {task}{flags}"
        ) from None


def panels(
    n: int, rows: int = 1, *, height: float = 2.6, sharex: bool = True, sharey: Literal["row", "all"] = "row"
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a column for each of n tasks, and its Axes by row; they share x where that is the layer."""
    size = max(7.5, 1.2 + 2.6 * n), 0.8 + height * rows
    fig, axes = plt.subplots(rows, n, figsize=size, layout="constrained", squeeze=False, sharex=sharex, sharey=sharey)
    return fig, [list(row) for row in axes]


def finish(fig: Figure, axes: list[Axes], title: str, path: Path) -> None:
    """Title, one legend for all Axes where the first has labels, and both files."""
    fig.suptitle(title, wrap=True)
    handles, labels = axes[0].get_legend_handles_labels() if axes else ([], [])
    if labels:
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    fig.savefig(path.with_suffix(".png"), dpi=150)
    fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(fig)
