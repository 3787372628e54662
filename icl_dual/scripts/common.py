"""What scripts and commands share: how they run, options, tasks' titles and learning rates, and figures' layout."""

# matplotlib's methods take keyword arguments without types.
# pyright: reportUnknownMemberType=false

import argparse
import hashlib
import io
import logging
import math
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import icl_dual as icl
from icl_dual.arguments import near_misses
from icl_dual.assets import check_model_name, describe_model
from icl_dual.finetuning import REPLICAS, Loss, Method, Trained
from icl_dual.models.precision import precision_name
from icl_dual.scripts.outputs import one_line, write_figure
from icl_dual.storage import check_writable, read_json
from icl_dual.type_guards import is_list

DATA = Path(__file__).parent / "data"
"""The folder of the paper's values, chosen learning rates, and texts of pages."""
TITLES = {"sst2": "SST2", "sst5": "SST5", "mr": "MR", "subj": "Subj", "agnews": "AGNews", "cb": "CB"}
"""The paper's names of its tasks, by their names here."""

HEADINGS = (
    "# How these were made",
    "# What is left of the paper's claims",
    "# Stability along the learning rate",
    "# Momentum attention",
    "# The context as one change of weights",
    "# Token agreement",
    "# Finetuning as people do it",
    "# Which document an answer comes from",
)
"""How the pages begin that scripts write into their folders."""


class ScriptError(RuntimeError):
    """A script cannot go on: a check failed, or a process that it started did."""


ERRORS = (ValueError, OSError, ImportError, MemoryError, icl.AssetError, icl.DivergedError, ScriptError)
"""What a user can mend: every error of the library is one of these, and is shown in a line without a traceback."""


def run_script(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    body: Callable[[argparse.Namespace], object],
    argv: Sequence[str] | None = None,
    *,
    stopped: str = "",
) -> int:
    """Run a script or command and return its exit code.

    That is 0; 1 after an error that the user can mend; 2 after arguments that the parser refuses; 130 after Ctrl-C.
    Such an error is one line, after its traceback where the arguments have `debug`. Figures need no display.

    Args:
        parse: reads `argv` (by default the process's own arguments).
        body: what the script does with its arguments.
        argv: the arguments, without the script's name.
        stopped: what Ctrl-C leaves behind, with the arguments' names in braces; an argument `stopped` comes first.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Δ is no reason to stop
    plt.switch_backend("Agg")
    try:
        args = parse(argv)
    except SystemExit as stop:  # argparse has said why, or has shown the help
        return int(stop.code or 0)
    try:
        _check_device(getattr(args, "device", "cpu"))
        body(args)
    except ERRORS as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        print(f"error: {one_line(str(error).strip()) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = getattr(args, "stopped", stopped).format(**vars(args))
        print(f"\nstopped. {left}".rstrip(), file=sys.stderr)
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
        is_default = value == (Path(action.default) if isinstance(value, Path) and action.default else action.default)
        if not action.option_strings or (is_default and action.dest not in always):
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
    values = value if is_list(value) else [value]
    return [str(entry) if isinstance(entry, Path) else short(str(entry)) for entry in values]


def short(model: str) -> str:
    """Return a model's short name: of a folder, its last part."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def model_title(model: str) -> str:
    """Return what a model is, for tables, captions and figure titles: of a packaged one, checkpoint and format."""
    return describe_model(short(model))


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number from `least` on."""

    def whole(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
        if number is None or number < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}: pass {max(least, 1)}, for example"
            )
        return number

    return whole


positive = at_least(1)
"""The type of numbers of things."""

count = at_least(0)
"""The type of seeds, and of numbers of things that there may be none of."""


def count_or_all(text: str) -> int | None:
    """Return a number of queries; None for all."""
    try:
        return None if text == "all" else positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, or all, got {text!r}: pass 100, for example"
        ) from None


def replica_count(text: str) -> int:
    """Return a number of replicas: at least 2, or 0 for none."""
    if (number := count(text)) == 1:
        raise argparse.ArgumentTypeError("expected at least 2, or 0 for none, got '1': one replica has no spread")
    return number


def rate(text: str) -> float:
    """Return a learning rate: finite and above 0."""
    if not 0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(
            f"expected a finite number above 0, got {text!r}: pass a learning rate such as 0.001"
        )
    return number


def eta(text: str) -> float:
    """Return a coefficient of momentum attention: from 0 to below 1."""
    if not 0 <= (number := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}: pass 0.1, for example")
    return number


def _number(text: str) -> float:
    """Return a text as a number; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def model_name(text: str) -> str:
    """Return the name of a model that can be loaded, as far as its spelling tells."""
    try:
        check_model_name(text)
    except icl.AssetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def device(text: str) -> str:
    """Return the name of a device that torch knows; `run_script` checks that it can be used here."""
    try:
        return str(torch.device(text))
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"expected a device that torch knows, got {text!r}: pass cpu or cuda, for example"
        ) from error


def _check_device(name: str) -> None:
    """Raise a ValueError unless torch can use a device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch asserts where it was built without
        raise ValueError(
            f"expected a device that torch can use here, got {name!r} ({error}): pass --device cpu, for example"
        ) from error


def output_folder(text: str) -> Path:
    """Return a folder that can be written into, or created; refuse one with a README.md that no script wrote."""
    _check_writable(Path(text))
    page = Path(text) / "README.md"
    if page.is_file() and not page.read_text(encoding="utf-8", errors="replace").startswith(HEADINGS):
        raise argparse.ArgumentTypeError(
            f"expected a folder for what the scripts write, got {text!r}, with a README.md of other origin: choose "
            "another folder"
        )
    return Path(text)


def output_file(text: str) -> Path:
    """Return the path of a file that can be written, or replaced."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}, which is a folder: add a file's name")
    _check_writable(path.parent)
    return path


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written."""
    try:
        check_writable(folder)
    except icl.AssetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class ScriptParser(argparse.ArgumentParser):
    """A parser that refuses arguments in one line: what was expected, what was given, what to do.

    Args:
        options: those of `argparse.ArgumentParser`.
        dependent: returns defaults that depend on the arguments, such as those of a preset.
        check: raises an `argparse.ArgumentTypeError` for arguments that contradict each other; it may change them.
    """

    def __init__(
        self,
        *,
        dependent: Callable[[argparse.Namespace], Mapping[str, Any]] | None = None,
        check: Callable[[argparse.Namespace], None] | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)
        self._dependent, self._check_arguments = dependent, check

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse arguments after defaults that depend on them are set; refuse unknown ones with the near misses."""
        if self._dependent is not None:
            self.set_defaults(**self._dependent(super().parse_known_args(args)[0]))
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = [near_misses(word.split("=")[0], self._option_string_actions) for word in unknown]
            self.error(f"unrecognized arguments: {' '.join(map(''.join, zip(unknown, near, strict=True)))}")
        if self._check_arguments is not None:
            try:
                self._check_arguments(parsed)
            except argparse.ArgumentTypeError as error:
                self.error(str(error))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """End the script with exit status 2 and one line on stderr."""
        self.exit(2, f"error: {one_line(message)}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of an option's choices."""
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            near = near_misses(str(value), known)
            message = f"expected one of {', '.join(known)}, got {value!r}{near}: check its spelling"
            raise argparse.ArgumentError(action, message)


def script_parser(description: str | None, *parents: argparse.ArgumentParser, **options: Any) -> ScriptParser:
    """Return a parser that shows a script's docstring as it is; its first options are the parents'."""
    return ScriptParser(description=description, parents=parents, **options)


def cell_parser(description: str | None, *parents: argparse.ArgumentParser) -> ScriptParser:
    """Return a parser with the options that settle a script's cells."""
    parser = script_parser(description, *parents)
    add_cell_options(parser)
    return parser


def add_cell_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that settle a script's cells."""
    add = parser.add_argument
    add(
        "--model",
        type=model_name,
        default="smollm2-135m",
        help="packaged model, hub id, folder or .gguf file (%(default)s)",
    )
    add(
        "--tasks",
        nargs="+",
        default=["sst2", "sst5", "mr", "subj", "agnews"],
        choices=icl.TASKS,
        metavar="TASK",
        help=f"tasks, of {', '.join(icl.TASKS)} (%(default)s)",
    )
    add("--k", type=positive, help="demonstrations (the paper's: 32; 22 for agnews, 19 for cb)")
    add("--queries", type=count_or_all, default=100, help="evaluation queries a task, or all (%(default)s)")
    add("--lr", type=rate, help="finetuning's learning rate (chosen by analyses/select_lr.py for model and task)")
    add(
        "--protocol",
        choices=("answer", "reference"),
        default="answer",
        help="record at the token that predicts the label, or all as the released code does (%(default)s)",
    )
    add("--source", choices=("wheel", "hub"), help="origin of the tasks' rows (each task's default)")
    add(
        "--replicas",
        type=replica_count,
        default=REPLICAS,
        help="repeats of the finetuning that show how stable its numbers are; 0: none (%(default)s)",
    )
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the device and the precision."""
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group()
    one_of.add_argument("--device", type=device, default="cpu", help="(%(default)s)")
    one_of.add_argument(
        "--device-map",
        choices=("auto",),
        help="for models larger than a GPU: MLPs fill the GPUs, then the host's memory or their file",
    )
    add(
        "--dtype",
        default="float32",
        choices=("float64", "float32", "bfloat16", "float16"),
        help="number format of the weights (%(default)s)",
    )
    add("--arithmetic", choices=("float32",), help="number format to compute in (that of the weights)")


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Return the device and the precision of a parser's options, as arguments of `load_model` and `run_study`."""
    place = {"device": args.device} if args.device_map is None else {"device_map": args.device_map}
    arithmetic = None if args.arithmetic is None else getattr(torch, args.arithmetic)
    return {**place, "dtype": getattr(torch, args.dtype), "arithmetic": arithmetic}


def precision_title(args: argparse.Namespace) -> str:
    """Return the precision of a cell parser's options, in words."""
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
    """Return the key of a model's learning rates: its name, and how a cell's finetuning differs from the paper's."""
    return ", ".join([model, *({} if variant is None else variant.finetuning.variation).values()])


def default_lr(model: str, task: str, variant: icl.Cell | None = None) -> float:
    """Return the rate chosen on selection queries for a model, a task and the finetuning of a cell."""
    chosen, name = read_json(DATA / "default_lr.json"), lr_key(model, variant)
    try:
        return chosen[name][task]
    except KeyError:
        finetuning = variant.finetuning if variant else icl.FinetuneConfig()
        options = [option for option in ("loss", "method", "trained") if option in finetuning.variation]
        flags = "".join(f" --{option} {getattr(finetuning, option)}" for option in options)
        known = "; ".join(f"{of} on {', '.join(tasks)}" for of, tasks in chosen.items())
        raise icl.StudyError(
            f"no learning rate was chosen for {name!r} on {task} (only for {known}): pass --lr, or choose one on "
            f"selection queries with python analyses/select_lr.py --model {model} --tasks {task}{flags}"
        ) from None


def file_stem(name: str) -> str:
    """Return a model's name as the beginning of a file's name: of a long one its end, after a hash of it all."""
    stem = name.strip("/").replace("/", "--")
    if len(stem.encode()) <= 150:
        return stem
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{stem.encode()[-120:].decode(errors='ignore')}"


plt.style.use(icl.plots.STYLE)  # scripts are programs: their figures have one style
logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of the dates of fonts that PDFs embed

MAX_COLUMNS = 3
"""More panels than these in a single row of a page are too narrow to be read: they go on in a second row."""


def panels(
    n: int, rows: int = 1, *, height: float = 1.7, sharex: bool = True, sharey: Literal["row", "all", "none"] = "row"
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a column for each of n tasks, and its Axes by row; they share x where that is the layer.

    A single row of many tasks is broken into several, and its free place holds the legend.

    Args:
        n: the number of columns.
        rows: the number of rows.
        height: the height of a row, in inches.
        sharex: whether Axes share x.
        sharey: which Axes share y.
    """
    columns = MAX_COLUMNS if rows == 1 and n > MAX_COLUMNS else n
    grid_rows = -(-n // columns) if rows == 1 else rows
    width = icl.plots.COLUMN_WIDTH if n == 1 else min(icl.plots.PAGE_WIDTH, 1.2 + 2.2 * columns)
    size = width, 0.9 + height * grid_rows
    share: Literal["row", "all", "none"] = "all" if grid_rows > rows else sharey
    fig, axes = plt.subplots(grid_rows, columns, figsize=size, squeeze=False, sharex=sharex, sharey=share)
    if grid_rows == rows:
        return fig, [list(row) for row in axes]
    flat = list(axes.flat)
    for spare in flat[n:]:
        spare.axis("off")
    return fig, [flat[:n]]


def label_outer(ax: Axes, *, keep_x: bool = False) -> None:
    """Remove the labels of Axes inside a grid; those with nothing below keep theirs.

    Args:
        ax: the Axes.
        keep_x: whether its x ticks keep their labels, as those that differ from panel to panel do.
    """
    spec, xlabel = ax.get_subplotspec(), ax.get_xlabel()
    assert spec is not None
    ax.label_outer()
    others = [other.get_subplotspec() for other in ax.figure.axes if other.axison]
    is_last = not any(
        other.colspan.start == spec.colspan.start and other.rowspan.start > spec.rowspan.start
        for other in others
        if other is not None and other.get_gridspec() is spec.get_gridspec()
    )
    ax.tick_params(labelbottom=is_last or keep_x)
    ax.set_xlabel(xlabel if is_last else "")


SHARED = (icl.plots.INTERVAL, icl.plots.UNSTABLE)
"""What legends say of bands and crosses, which mean the same in every panel."""


def legend_beside(ax: Axes) -> None:
    """Put the legend of the series of Axes to their right, where no data is; `finish` explains bands and crosses."""
    series = [of for of in zip(*ax.get_legend_handles_labels(), strict=True) if of[1] not in SHARED]
    ax.legend(*zip(*series, strict=True), loc="center left", bbox_to_anchor=(1.02, 0.5))


def wrapped(title: str, width: float) -> str:
    """Return a figure's title in lines that fit into a width in inches; numbers stay with the word before them."""
    kept = re.sub(r" (?=[\d=])|(?<==) ", "\N{NO-BREAK SPACE}", title)
    lines = [textwrap.fill(line, int(width * 15.5)) for line in kept.split("\n")]  # 8 pt: 15.5 characters an inch
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def finish(
    fig: Figure,
    axes: Sequence[Axes],
    title: str,
    path: Path,
    *,
    labels: Collection[str] | None = None,
    kinds: Sequence[str] = ("png", "pdf"),
) -> None:
    """Write a figure's files after adding a title, and one legend for all Axes that have labels.

    The legend is in the free place of a broken row, and else below all Axes: never over data.

    Args:
        fig: the figure.
        axes: the Axes that the legend explains.
        title: what is drawn, of which model, and how it was run; broken into lines that fit.
        path: where to, without ending.
        labels: the labels that the legend explains; all where not given.
        kinds: the endings.
    """
    width = fig.get_size_inches()[0]
    fig.suptitle(icl.plots.literal(wrapped(title, width)))
    by_label: dict[Any, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if labels is None or label in labels:
                by_label.setdefault(label, handle)
    if by_label:
        spare = next((ax for ax in fig.axes if not ax.axison and ax not in axes), None)
        if spare is not None:
            spare.legend(by_label.values(), by_label.keys(), loc="center left", bbox_to_anchor=(0, 0.5))
        else:
            spacing = {"handlelength": 2, "columnspacing": 1.2} if width < 4 else {}
            widest = (0.4 if spacing else 0.6) + 0.05 * max(map(len, by_label))  # inches: the line, and 7 pt of text
            ncols = max(1, min(len(by_label), int(width / widest)))
            fig.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=ncols, **spacing)
    write_figure(fig, path, *kinds)
