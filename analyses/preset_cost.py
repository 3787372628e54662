"""What the paper's set-up costs: FLOPs, memory and hours on one A100, counted from the tokens of a preset's cells.

    python analyses/reproduce.py --preset paper-1.3b --rehearse 2 --out figures/rehearsal
    python analyses/preset_cost.py figures/rehearsal/cells

The cells say how many tokens were run; the formulas of docs/cost.md say what these take in a model of the paper's depth
and width, for as many queries as the paper has. A rehearsal's tokens are another tokenizer's, of the packaged rows: not
the paper's validation queries, and shorter ones in SST2.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import icl_dual as icl
from icl_dual.metrics import KENDALL_QUERIES
from icl_dual.scripts.common import DATA, TITLES, output_file, run_script, script_parser
from icl_dual.scripts.outputs import markdown, write_text
from icl_dual.scripts.paper_tables import find_cells

A100_TFLOPS = {"bfloat16": 312.0, "float32": 19.5}
"""NVIDIA's data sheet, dense, without TF32."""

RATES = Path(__file__).parents[1] / "figures" / "benchmark" / "cost.md"
"""GFLOP/s of each stage of a cell, measured on two CPU cores, and of one large matrix product."""

STAGES = {
    "finetuning": "finetuning",
    "prefix": "capture, in context",
    "ICL": "capture, in context",
    "ZSL and FT": "capture, zero-shot",
    "metrics": "metrics and decomposition",
}
"""The measured stage that each stage counted here takes its rate from."""


@dataclass(frozen=True)
class Shape:
    """A decoder with as many key-value heads as heads, like the paper's."""

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    d_vocab: int

    @property
    def layer_weights(self) -> int:
        """Return the number of weights of the layers that multiply every token."""
        return self.n_layers * (4 * self.d_model**2 + 2 * self.d_model * self.d_mlp)


@dataclass(frozen=True)
class Tokens:
    """What a cell runs."""

    queries: int
    prefix: int
    """Start token, demonstrations and their separators."""
    of_queries: int
    """All queries' own tokens together."""

    @classmethod
    def of(cls, result: icl.CellResult) -> "Tokens":
        """Return the tokens that a cell's metadata give.

        Raises:
            StudyError: it does not say how many tokens it ran.
        """
        if absent := {"prefix_tokens", "query_tokens"} - result.provenance.keys():
            raise icl.StudyError(
                f"expected cells with their numbers of tokens, got {result.folder} without {sorted(absent)[0]}: run it "
                "again with analyses/reproduce.py"
            )
        return cls(len(result.comparison.gold), result.provenance["prefix_tokens"], result.provenance["query_tokens"])

    def scaled(self, queries: int) -> "Tokens":
        """Return the same with another number of queries of the same mean length."""
        return Tokens(queries, self.prefix, round(self.of_queries * queries / self.queries))


def flops(shape: Shape, tokens: Tokens) -> dict[str, float]:
    """Return FLOPs by stage, two for each multiply-add. Tokens that all queries share count for each of them."""
    width = shape.n_layers * shape.d_model
    mean_query = tokens.of_queries / tokens.queries
    # The heads' output over a row's own tokens is computed twice: by the model, and to check it.
    own_attention = 2 * 4 * width * tokens.of_queries * mean_query
    logits = 2 * tokens.queries * shape.d_model * shape.d_vocab

    def run_flops(context: int) -> float:
        return (
            2 * shape.layer_weights * tokens.of_queries
            + 4 * width * tokens.of_queries * context
            + own_attention
            + logits
        )

    trained = tokens.prefix - 1  # each demonstration has a start token in the place of its separator
    unembedded = shape.layer_weights + shape.d_model * shape.d_vocab
    return {
        "finetuning": 4 * unembedded * trained + 4 * width * shape.d_model * trained,
        "prefix": 2 * shape.layer_weights * tokens.prefix + 4 * width * tokens.prefix**2,
        "ICL": run_flops(tokens.prefix) + 2 * width * tokens.queries * tokens.prefix,
        "ZSL and FT": 2 * run_flops(1),
        "metrics": 2 * width * min(KENDALL_QUERIES, tokens.queries) * trained,
    }


def gigabytes(shape: Shape, tokens: Tokens, bytes_a_weight: int) -> dict[str, float]:
    """Return the memory of the weights with finetuning, and of what the three settings keep, in GB (float32)."""
    embedding = shape.d_model * shape.d_vocab
    projections = 2 * shape.n_layers * shape.d_model**2
    # Keys' and values' projections four times over: gradients, values to restore, the delta, what is saved of it.
    weights = (shape.layer_weights + embedding + 4 * projections) * bytes_a_weight
    longest = 2 * tokens.of_queries / tokens.queries
    kept_of_query = shape.n_layers * (3 * shape.d_model + shape.n_heads * longest)
    kept = tokens.queries * (3 * kept_of_query + shape.n_layers * tokens.prefix) * 4
    training = 2 * shape.n_layers * shape.d_model * (tokens.prefix - 1) * 4  # queries and keys
    return {"weights and finetuning, GB": weights / 1e9, "kept for the metrics, GB": (kept + training) / 1e9}


def reached() -> dict[str, float]:
    """Return each stage's rate as a share of that of one large matrix product."""
    lines = [line.split("|")[1:-1] for line in RATES.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    columns, rows = [name.strip() for name in lines[0]], lines[2:]
    rates = {row[0].strip(): float(row[columns.index("GFLOP/s")]) for row in rows}
    return {stage: rates[step] / rates["a 2048³ matrix product"] for stage, step in STAGES.items()}


def table(results: Sequence[icl.CellResult], shape: Shape, queries: Mapping[str, int]) -> pd.DataFrame:
    """Return a row for each cell, scaled to the paper's number of queries, and their sum."""
    rows, shares = [], reached()
    if other := {result.cell.task for result in results} - queries.keys():
        raise icl.StudyError(
            f"expected cells of the paper's tasks, {list(queries)}, got {sorted(other)}: leave them out"
        )
    for result in results:
        tokens = Tokens.of(result).scaled(queries[result.cell.task])
        counted = flops(shape, tokens)
        total, at_full_rate = sum(counted.values()), sum(n / shares[stage] for stage, n in counted.items())
        hours = {f"A100 {dtype}, h": at_full_rate / (peak * 1e12) / 3600 for dtype, peak in A100_TFLOPS.items()}
        rows.append(
            {
                "task": TITLES[result.cell.task],
                "queries": tokens.queries,
                "prefix tokens": tokens.prefix,
                "query tokens": tokens.of_queries,
                "TFLOP": total / 1e12,
                **hours,
                **gigabytes(shape, tokens, 4),
            }
        )
    frame = pd.DataFrame(rows)
    summed = frame[["queries", "query tokens", "TFLOP", *(f"A100 {dtype}, h" for dtype in A100_TFLOPS)]].sum()
    most = frame[[column for column in frame if str(column).endswith("GB")]].max()
    return pd.concat([frame, pd.DataFrame([{"task": "all (memory: most)", **summed, **most}])], ignore_index=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("cells", type=Path, nargs="+", help="folders with finished cells of a preset")
    parser.add_argument("--out", type=output_file, help="Markdown file for the tables")
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Print a table for each of the paper's models, and write them to a file if one is given."""
    paper, results = json.loads((DATA / "paper.json").read_text(encoding="utf-8")), find_cells(args.cells)
    parts = []
    for name, model in paper["models"].items():
        sizes = {key: model[key] for key in ("n_layers", "d_model", "n_heads", "d_mlp")}
        shape = Shape(**sizes, d_vocab=paper["d_vocab"])
        queries = dict(zip(paper["tasks"], paper["queries"], strict=True))
        counted = markdown(
            table(results, shape, queries),
            floatfmt=("", ".0f", ".0f", ".0f", ".0f", ".4f", ".4f", ".1f", ".1f"),
        )
        parts.append(
            f"{name} (`--preset {model['preset']}`), {shape.layer_weights / 1e9:.2f} G weights in layers:\n\n{counted}"
        )
    text = "\n\n".join(parts).replace("nan", "   ")
    print(text)
    if args.out:
        write_text(args.out, f"{text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv)


if __name__ == "__main__":
    sys.exit(main())
