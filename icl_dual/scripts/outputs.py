"""How scripts write: files that are whole or not there, and tables in which every name is text and never markup."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageStat

from icl_dual.storage import AssetError, atomic_file, first_line


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_csv(path: Path, frame: pd.DataFrame, float_format: str | None = None) -> None:
    """Write a frame without its index as CSV, whole or not at all; no cell begins a formula of a spreadsheet."""
    with atomic_file(path) as scratch:
        with_texts(frame, csv_text).to_csv(scratch, index=False, float_format=float_format)


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """Return a CSV file as a frame; `options` are those of pandas.

    Raises:
        AssetError: it cannot be read, or is damaged.
    """
    try:
        return cast(Any, pd).read_csv(path, **options)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"expected a table in {path}, got {first_line(error)}: check the path, or delete the file and make it again"
        ) from error


def write_figure(fig: Figure, path: Path, *kinds: str, dpi: int = 150) -> None:
    """Write a figure under a path without its ending, a file for each kind, and close it."""
    try:
        for kind in kinds:
            metadata = {"CreationDate": None} if kind == "pdf" else None
            with atomic_file(path.with_name(f"{path.name}.{kind}")) as scratch:
                fig.savefig(scratch, format=kind, dpi=dpi, metadata=metadata)  # pyright: ignore[reportUnknownMemberType]
                if kind == "png":
                    _reduce_colours(scratch)
    finally:
        plt.close(fig)


LARGEST_ERROR = 0.5
"""The mean difference from what was drawn, of 255, that no eye sees."""


def _reduce_colours(path: Path) -> None:
    """Write a PNG with a palette, chosen so that no colour is far from what was drawn: a third of the size or less.

    For lines and text 64 colours are enough; maps get 256, or their colour bars would have steps.
    """
    with Image.open(path) as image:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
    drawn = opaque.convert("RGB")
    reduced = _quantised(drawn, 64)
    difference = ImageStat.Stat(ImageChops.difference(drawn, reduced.convert("RGB"))).mean
    if sum(difference) / len(difference) > LARGEST_ERROR:
        reduced = _quantised(drawn, 256)
    reduced.save(path, "PNG", optimize=True, dpi=image.info.get("dpi", (72, 72)))


def _quantised(image: Image.Image, n_colours: int) -> Image.Image:
    return image.quantize(n_colours, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)


def markdown(frame: pd.DataFrame, **options: Any) -> str:
    """Return a frame as a Markdown table; `options` are those of pandas and tabulate."""
    options.setdefault("index", False)
    return cast(Any, with_texts(frame, markdown_text)).to_markdown(**options)


def with_texts(frame: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """Return a frame with its texts changed: those of cells and column names. Numbers stay as they are."""

    def of(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    changed = frame.copy()
    for position, name in enumerate(frame.columns):
        cells = frame.iloc[:, position]
        if any(of(value) != value for value in cells if isinstance(value, str)):
            changed[name] = cells.astype(object).map(of)
    changed.columns = pd.Index([of(name) for name in frame.columns], name=of(frame.columns.name))
    return changed


def one_line(text: str) -> str:
    """Return a text without line breaks."""
    return re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text)


def markdown_text(text: str) -> str:
    """Return a name as Markdown that shows it, in a table's cell, too.

    An underscore between letters or digits, which is no markup, stays as it is.

    >>> print(markdown_text("a|b <i> $x$ Q4_1 _u_"))
    a\\|b \\<i\\> \\$x\\$ Q4_1 \\_u\\_
    """
    markup = r"[\\`*<>&$|~#]|(?<![^\W_])_|_(?![^\W_])|(?<=\])\("
    return re.sub(markup, lambda match: f"\\{match[0]}", one_line(text))


def markdown_code(text: str) -> str:
    """Return a name as a code span of Markdown, which backticks in it do not end.

    >>> print(markdown_code("Q4_1"), markdown_code("a`b"))
    `Q4_1` ``a`b``
    """
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    is_padded = text.startswith(" ") and text.endswith(" ") and not text.isspace()  # Markdown strips such a pair
    space = " " * (text.startswith("`") or text.endswith("`") or is_padded)
    return f"{fence}{space}{text}{space}{fence}"


ESTIMATE = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?%?†?( [\[(±][^=|!@]*)?", re.IGNORECASE)
"""A number as text, or an estimate with its interval, which no spreadsheet computes."""


def csv_text(text: str) -> str:
    """Return a text as a cell of a CSV file that no spreadsheet takes for a formula: one that might be begins with '.

    Line breaks become those that are quoted on writing.

    >>> csv_text("=1+1"), csv_text("-0.5 [-0.6, -0.4]"), csv_text("-x")
    ("'=1+1", '-0.5 [-0.6, -0.4]', "'-x")
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) and not ESTIMATE.fullmatch(text) else text
