"""The released scripts' definitions over recordings, written out slowly in plain numpy: what the fast code is held to.

Written from the definitions alone, apart from the library, of which it uses nothing.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

SETTINGS = ("zs", "icl", "ftzs", "ft")
RECORD_FILE = "record_info.jsonl"
TINY = 1e-20
MAX_EXAMPLES = 100
TOKEN_TOP_K = 100
EXAMPLE_TOP_K = 5

Records = dict[str, list[dict]]


def read(folder: str | Path) -> Records:
    """Read the four recordings under `folder`: a list of lines for each setting."""
    records: Records = {}
    for setting in SETTINGS:
        with (Path(folder) / setting / RECORD_FILE).open(encoding="utf-8") as file:
            records[setting] = [json.loads(line) for line in file if line.strip()]
    return records


def vector(values: list[float]) -> np.ndarray:
    """Turn a list of numbers into a float64 array."""
    return np.array(values, dtype=np.float64)


def norm(x: np.ndarray) -> float:
    """Return the Euclidean length of a vector."""
    return float(np.sqrt(np.sum(x * x)))


def dot(x: np.ndarray, y: np.ndarray) -> float:
    """Return the inner product of two vectors."""
    return float(np.sum(x * y))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the cosine of two vectors, kept finite for zero vectors."""
    return dot(x, y) / (norm(x) * norm(y) + TINY)


def unit(x: np.ndarray) -> np.ndarray:
    """Scale a vector to length one, leaving a zero vector at zero."""
    return x / (norm(x) + TINY)


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax of a vector, shifted by its maximum first."""
    powers = np.exp(x - np.max(x))
    return powers / np.sum(powers)


def left_padded(values: list[float], length: int) -> np.ndarray:
    """Put zeros in front of a row until it has `length` entries."""
    row = np.zeros(length, dtype=np.float64)
    row[length - len(values) :] = values
    return row


def is_right(line: dict) -> bool:
    """Tell whether a line's prediction is its own gold label."""
    return line["pred_label"] == line["gold_label"]


def recall_to_finetuning(records: Records) -> float:
    """Recall2FTP: of the examples only finetuning put right, the per cent that in-context learning gets right."""
    gained, shared = 0, 0
    for zs, icl, ftzs in zip(records["zs"], records["icl"], records["ftzs"], strict=True):
        if not is_right(zs) and is_right(ftzs):
            gained += 1
            if is_right(icl):
                shared += 1
    return 100.0 * shared / gained if gained else float("nan")


def output_update_similarity(records: Records) -> list[float]:
    """SimAOU: per layer, the mean cosine of the in-context and the finetuning update of the unit hidden vectors."""
    result = []
    for layer in range(len(records["zs"][0]["self_attn_out_hiddens"])):
        cosines = []
        for zs, icl, ftzs in zip(records["zs"], records["icl"], records["ftzs"], strict=True):
            base = unit(vector(zs["self_attn_out_hiddens"][layer]))
            update_icl = unit(vector(icl["self_attn_out_hiddens"][layer])) - base
            update_ft = unit(vector(ftzs["self_attn_out_hiddens"][layer])) - base
            cosines.append(cosine(update_icl, update_ft))
        result.append(float(np.mean(cosines)))
    return result


def attention_map_similarity(records: Records, other: str) -> list[float]:
    """Per layer, the cosine of icl's attention to the query with `other`'s, averaged over heads, then examples."""
    longest = max(len(line["attn_map"][0][0]) for line in records["icl"])
    result = []
    for layer in range(len(records["icl"][0]["attn_map"])):
        of_examples = []
        for icl_line, other_line in zip(records["icl"], records[other], strict=True):
            of_heads = []
            for icl_row, other_row in zip(icl_line["attn_map"][layer], other_line["attn_map"][layer], strict=True):
                of_heads.append(cosine(left_padded(icl_row, longest), left_padded(other_row, longest)))
            of_examples.append(np.mean(of_heads))
        result.append(float(np.mean(of_examples)))
    return result


def own_token_counts(records: Records) -> list[int]:
    """Return each demonstration's number of own tokens, its start token left out."""
    return [len(step["attn_q"][0]) - 1 for step in records["ft"]]


def context_positions(counts: list[int]) -> list[int]:
    """Return where the demonstrations' own tokens lie in icl's context, in order."""
    positions = []
    start = 1
    for count in counts:
        positions += range(start, start + count)
        start += count + 1
    return positions


def icl_token_weights(line: dict, layer: int, positions: list[int]) -> np.ndarray:
    """Return the softmax of one example's in-context scores over all demonstration tokens."""
    scores_of_context = line["attn_map_ctx"][layer]
    return softmax(vector([scores_of_context[position] for position in positions]))


def ft_token_weights(line: dict, steps: list[dict], layer: int) -> np.ndarray:
    """Return the softmax, over all training tokens, of their query vectors' dot products with one example's."""
    query = vector(line["attn_q"][layer])
    products = []
    for step in steps:
        for token in step["attn_q"][layer][1:]:
            products.append(dot(vector(token), query))
    return softmax(vector(products))


def summed_by_demonstration(weights: np.ndarray, counts: list[int]) -> np.ndarray:
    """Add up the token weights within each demonstration."""
    sums = []
    start = 0
    for count in counts:
        sums.append(np.sum(weights[start : start + count]))
        start += count
    return np.array(sums, dtype=np.float64)


def demonstration_weights(records: Records, level: str) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Return, per layer and example, the (icl, ft) weights of the tokens or, at level "example", demonstrations."""
    counts = own_token_counts(records)
    positions = context_positions(counts)
    icl_lines, ftzs_lines = records["icl"][:MAX_EXAMPLES], records["ftzs"][:MAX_EXAMPLES]
    result = []
    for layer in range(len(records["ft"][0]["attn_q"])):
        pairs = []
        for icl_line, ftzs_line in zip(icl_lines, ftzs_lines, strict=True):
            icl_row = icl_token_weights(icl_line, layer, positions)
            ft_row = ft_token_weights(ftzs_line, records["ft"], layer)
            if level == "example":
                icl_row = summed_by_demonstration(icl_row, counts)
                ft_row = summed_by_demonstration(ft_row, counts)
            pairs.append((icl_row, ft_row))
        result.append(pairs)
    return result


def tau(icl_row: np.ndarray, ft_row: np.ndarray) -> float:
    """Return Kendall's tau between two rows."""
    found: Any = kendalltau(icl_row, ft_row)
    return float(found[0])


def kendall(layers: list[list[tuple[np.ndarray, np.ndarray]]]) -> list[float]:
    """Return, per layer, the mean over examples of Kendall's tau between the two rows."""
    return [float(np.mean([tau(icl_row, ft_row) for icl_row, ft_row in pairs])) for pairs in layers]


def row_recall(icl_row: np.ndarray, ft_row: np.ndarray, k: int) -> float:
    """Return the share of one row's top k indices that are among the other's, NaN where there are too few items."""
    if len(icl_row) < k:
        return float("nan")
    icl_top = [int(index) for index in np.argsort(-icl_row)[:k]]
    ft_top = {int(index) for index in np.argsort(-ft_row)[:k]}
    return sum(index in ft_top for index in icl_top) / k


def recall_topk(layers: list[list[tuple[np.ndarray, np.ndarray]]], k: int) -> list[float]:
    """Return, per layer, the mean over examples of the share of icl's top k items among ft's top k."""
    return [float(np.mean([row_recall(icl_row, ft_row, k) for icl_row, ft_row in pairs])) for pairs in layers]


def scores(folder: str | Path) -> dict[str, float | list[float]]:
    """Compute every metric of the recordings under `folder`."""
    records = read(folder)
    tokens = demonstration_weights(records, "token")
    examples = demonstration_weights(records, "example")
    return {
        "Recall2FTP": recall_to_finetuning(records),
        "SimAOU": output_update_similarity(records),
        "ZSL SimAM": attention_map_similarity(records, "zs"),
        "SimAM": attention_map_similarity(records, "ftzs"),
        "token-level kendall": kendall(tokens),
        "example-level kendall": kendall(examples),
        "token-level recall_topk": recall_topk(tokens, TOKEN_TOP_K),
        "example-level recall_topk": recall_topk(examples, EXAMPLE_TOP_K),
    }


def random_repeats(rng: np.random.Generator, n_tokens: int) -> list[tuple[int, int]]:
    """Draw disjoint (copy, original) pairs of token indices, covering about half of the tokens."""
    shuffled = [int(index) for index in rng.permutation(n_tokens)]
    n_pairs = min(n_tokens // 2, max(1, n_tokens // 4))
    return [(shuffled[2 * pair], shuffled[2 * pair + 1]) for pair in range(n_pairs)]


def random_hiddens(rng: np.random.Generator, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Draw one example's hidden states: icl and ftzs are zs plus noise that is partly common to both."""
    base = rng.standard_normal(shape)
    common = rng.standard_normal(shape)
    hiddens = {"zs": base}
    for setting in ("icl", "ftzs"):
        hiddens[setting] = base + 0.5 * (0.8 * common + 0.6 * rng.standard_normal(shape))
    return hiddens


def write_lines(folder: Path, lines: list[dict]) -> None:
    """Write one setting's recording, a JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RECORD_FILE).open("w", encoding="utf-8") as file:
        for line in lines:
            json.dump(line, file)
            file.write("\n")


def random_steps(
    rng: np.random.Generator, counts: list[int], n_layers: int, d_model: int, repeats: list[tuple[int, int]]
) -> list[dict]:
    """Draw the training steps' query vectors, making each copied token's vector equal to its original's."""
    owns = few_bits(rng.standard_normal((n_layers, sum(counts), d_model)))
    for copy, original in repeats:
        owns[:, copy] = owns[:, original]
    steps = []
    start = 0
    for count in counts:
        first = rng.standard_normal((n_layers, 1, d_model))
        queries = np.concatenate([first, owns[:, start : start + count]], axis=1)
        steps.append({"attn_q": queries.tolist()})
        start += count
    return steps


def random_line(
    rng: np.random.Generator, hiddens: np.ndarray, n_heads: int, n_query: int, n_context: int, n_labels: int
) -> dict:
    """Draw one example's line in one setting, with the given hidden states and no gold label yet."""
    n_layers = len(hiddens)
    return {
        "self_attn_out_hiddens": hiddens.tolist(),
        "attn_map": rng.standard_normal((n_layers, n_heads, n_query)).tolist(),
        "attn_map_ctx": rng.standard_normal((n_layers, n_context)).tolist(),
        "pred_label": int(rng.integers(n_labels)),
    }


def few_bits(values: np.ndarray) -> np.ndarray:
    """Numbers with exact products and sums, so that tied tokens tie in every order of summation."""
    return np.round(values * 64) / 64


def repeat_scores(rows: list[list[float]], positions: list[int], repeats: list[tuple[int, int]]) -> None:
    """Give each copied demonstration token its original's in-context score, in every layer."""
    for row in rows:
        for copy, original in repeats:
            row[positions[copy]] = row[positions[original]]


def write_random(
    folder: str | Path,
    *,
    seed: int,
    n_examples: int,
    n_layers: int,
    n_heads: int,
    d_head: int,
    demonstration_lengths: list[int],
    query_lengths: list[int],
    n_labels: int = 2,
    repeated_tokens: bool = False,
) -> None:
    """Write random recordings in all four settings, on request with exact repeats among demonstration tokens."""
    rng = np.random.default_rng(seed)
    d_model = n_heads * d_head
    counts = list(demonstration_lengths)
    positions = context_positions(counts)
    repeats = random_repeats(rng, len(positions)) if repeated_tokens else []
    n_context = {"zs": 1, "icl": 1 + sum(count + 1 for count in counts), "ftzs": 1}
    lines: Records = {"zs": [], "icl": [], "ftzs": []}
    for _ in range(n_examples):
        gold = int(rng.integers(n_labels))
        n_query = int(rng.choice(query_lengths))
        hiddens = random_hiddens(rng, (n_layers, d_model))
        for setting in lines:
            line = random_line(rng, hiddens[setting], n_heads, n_query, n_context[setting], n_labels)
            line["gold_label"] = gold
            if setting == "icl":
                repeat_scores(line["attn_map_ctx"], positions, repeats)
            if setting == "ftzs":
                line["attn_q"] = few_bits(rng.standard_normal((n_layers, d_model))).tolist()
            lines[setting].append(line)
    lines["ft"] = random_steps(rng, counts, n_layers, d_model, repeats)
    for setting, of_setting in lines.items():
        write_lines(Path(folder) / setting, of_setting)
