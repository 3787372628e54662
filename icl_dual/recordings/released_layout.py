"""Write recordings in the layout of the paper's released code, and read that layout.

The released code of Dai et al. (microsoft/LMOps, `understand_icl`) writes four folders: `zs`, `icl` and `ftzs` for the
three settings, and `ft` for the training steps. Each holds `record_info.jsonl`, with one JSON object a line. The
released scripts compute the paper's numbers from these files. `docs/recordings.md` describes the layout.
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_dual.arguments import Count, checked
from icl_dual.progress import progress_bar
from icl_dual.prompts import SEPARATOR, START
from icl_dual.recordings.recordings import SETTINGS, RecordingError, Recordings, label_limit
from icl_dual.storage import (
    CLASS,
    METADATA,
    TENSORS,
    AssetError,
    atomic_folder,
    check_writable,
    first_line,
    read_json,
    recover,
    to_json,
)
from icl_dual.torch_utils import from_numpy, to_list
from icl_dual.type_guards import is_dict, is_list

FOLDERS = {"ZSL": "zs", "ICL": "icl", "FT": "ftzs"}
"""The folder of each setting. A fourth folder, `ft`, holds the training steps."""

FILE = "record_info.jsonl"

LAYOUT = "released recordings"
"""What the metadata of a folder in this layout say under `class`, where `write_recordings` wrote it."""


def write_recordings(recordings: Recordings, folder: str | PathLike[str], *, progress: bool = True) -> None:
    """Write recordings in the released layout, without rounding.

    Args:
        recordings: recordings with training queries, of a context with one start token and one separator token after
            each demonstration.
        folder: a new folder, or one that this function wrote into before.
        progress: show a progress bar for each setting.

    Raises:
        RecordingError: there are no training queries, the context has other start tokens or separators, or a number
            is not finite.
        AssetError: the folder holds other files, recordings of the released code among them, or cannot be written.
    """
    _check_folder(Path(folder))
    if recordings.training_q is None or recordings.training_segments is None:
        raise RecordingError(
            "expected recordings with training queries, which the folder ft of the released layout holds, got "
            "recordings without them: pass a delta of icl_dual.finetune to Recordings.of"
        )
    steps = _by_step(recordings.training_segments)
    layout = _segments([_Step(len(tokens), keep=True) for tokens in steps], len(recordings.segments))
    if not torch.equal(layout, recordings.segments):
        raise RecordingError(
            "expected a context of one start token and whole demonstrations, each with one separator token after it, "
            f"got a context of {len(recordings.segments)} tokens in another layout: build the prompts with a separator "
            "of one token, or save with Recordings.save"
        )
    with atomic_folder(Path(folder)) as scratch:
        for setting, name in FOLDERS.items():
            (scratch / name).mkdir()
            with (scratch / name / FILE).open("wb") as lines:
                queries = range(len(recordings.gold))
                for query in progress_bar(queries, desc=name, show=progress, unit="query"):
                    lines.write(_json_line(_query_record(recordings, setting, query), Path(name) / FILE, query + 1))
        (scratch / "ft").mkdir()
        with (scratch / "ft" / FILE).open("wb") as lines:
            for step, tokens in enumerate(steps):
                q = recordings.training_q[:, tokens.start - 1 : tokens.stop]
                lines.write(_json_line({"attn_q": q}, Path("ft") / FILE, step + 1))
        metadata = to_json({**recordings.metadata, CLASS: LAYOUT}, "metadata")
        (scratch / METADATA).write_text(metadata, encoding="utf-8")


def _check_folder(folder: Path) -> None:
    """Raise an AssetError where a folder cannot be written, or holds anything that `write_recordings` did not write."""
    check_writable(folder, [METADATA, *(f"{name}/{FILE}" for name in (*FOLDERS.values(), "ft"))])
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / METADATA).exists() or read_json(folder / METADATA).get(CLASS) != LAYOUT:
        raise AssetError(
            f"expected a new folder, or one that icl_dual wrote such recordings into, got {folder} with others: choose "
            "another folder"
        )


def _query_record(recordings: Recordings, setting: str, query: int) -> dict[str, Any]:
    """Return the record of one query in one setting, by the keys of the released layout."""
    record = {
        "self_attn_out_hiddens": recordings.attn_out[setting][query],
        "attn_map": recordings.query_scores[setting][query, ..., : int(recordings.query_lengths[query])],
        "attn_map_ctx": recordings.context_scores[setting][query],
        "gold_label": int(recordings.gold[query]),
        "pred_label": int(recordings.predictions[setting][query]),
    }
    return record | ({"attn_q": recordings.q[query]} if setting == "FT" else {})


@checked
def load_recordings(
    folder: str | PathLike[str], *, n_labels: Count | None = None, skip_bad: bool = False, progress: bool = True
) -> Recordings:
    """Read recordings from a folder in the released layout, or from one that `Recordings.save` wrote.

    No model is needed.

    Args:
        folder: a folder with `zs`, `icl`, `ftzs` and `ft`, each of which holds `record_info.jsonl`; or a folder that
            `Recordings.save` wrote. For a cell that was run with `keep_recordings=True`, its folder `recordings`.
        n_labels: the number of labels. By default the number in the folder's metadata, else that of the paper's task
            with the folder's name, else the largest number of labels of the paper's tasks.
        skip_bad: leave out each example that has a damaged record, in all settings, instead of raising an error. A
            damaged training step is left out if its number of tokens is known. `Recordings.skipped` lists the reasons.
        progress: show a progress bar.

    Returns:
        The recordings, in float32 where that holds every number exactly, else in float64.

    Raises:
        RecordingError: the folder or a setting is missing; a line is not a complete JSON object; numbers of examples,
            layers, heads or tokens differ; a number is not finite; or a label index is out of range. Names file and
            line.
        AssetError: the folder was saved by another class, such as the `Comparison` in a cell's folder, or its saved
            tensors are damaged.
    """
    folder = Path(folder)
    recover(folder)
    if (folder / TENSORS).exists():
        return Recordings.load(folder, n_labels)
    if not folder.is_dir():
        raise RecordingError(
            f"expected a folder of recordings, got {folder}, which does not exist: pass a folder with zs, icl, ftzs "
            "and ft, or one that Recordings.save wrote"
        )
    for name in (*FOLDERS.values(), "ft"):
        if not (folder / name / FILE).is_file():
            raise RecordingError(
                f"expected {FILE} in each of the folders zs, icl, ftzs and ft of {folder}, got no "
                f"{folder / name / FILE}: record this setting, or pass another folder"
            )
    metadata = _metadata(folder)
    reader = _Reader(folder, label_limit(folder, metadata) if n_labels is None else n_labels, skip_bad)
    examples = reader.examples(progress)
    training_q, steps = reader.steps(examples[0])
    segments = _segments(steps, examples[0]["ICL"].context.shape[1])
    # A context ends with a separator: that of the last demonstration, or of an earlier one if not all are in context.
    ends = list(itertools.accumulate((step.n_tokens + 1 for step in steps), initial=1))[1:]
    is_whole = len(segments) in ends or (reader.last_step_unknown and len(segments) > ends[-1])
    if not is_whole or not (segments >= 0).any():
        raise RecordingError(
            f"{folder / 'icl' / FILE}, line 1: expected a context of whole demonstrations of {folder / 'ft' / FILE} "
            f"and their separators, {ends[-1]} tokens with all {len(steps)}, got {len(segments)}: check whether a "
            "training step is missing, and record the folder again"
        )
    kept_steps = [index for index, step in enumerate(steps) if step.keep]
    return Recordings(
        gold=torch.tensor([example["ZSL"].gold for example in examples]),
        predictions={name: torch.tensor([example[name].prediction for example in examples]) for name in SETTINGS},
        query_lengths=torch.tensor([example["ZSL"].query.shape[-1] for example in examples]),
        attn_out={name: _stacked(examples, name, "hidden") for name in SETTINGS},
        query_scores={name: _padded([example[name].query for example in examples]) for name in SETTINGS},
        context_scores={name: _stacked(examples, name, "context") for name in SETTINGS},
        segments=segments,
        q=_stacked(examples, "FT", "q"),
        training_q=training_q,
        training_segments=torch.cat(
            [torch.tensor([START] + [index] * steps[index].n_tokens, dtype=torch.long) for index in kept_steps]
        ),
        metadata=metadata,
        skipped=tuple(reader.skipped),
    )


def _metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    try:
        metadata = read_json(path) if path.exists() else {}
    except AssetError as error:
        raise RecordingError(str(error)) from error
    return {name: value for name, value in metadata.items() if name != CLASS}


class _Record(NamedTuple):
    """The record of one query in one setting: a line of `zs`, `icl` or `ftzs`."""

    hidden: Float[np.ndarray, "layer d_model"]
    """Attention output at the recorded position, after W_O and before the residual sum (`self_attn_out_hiddens`)."""
    query: Float[np.ndarray, "layer head query_token"]
    """Attention scores over the query's own tokens, scaled by 1/√d_head, before the softmax (`attn_map`)."""
    context: Float[np.ndarray, "layer context_pos"]
    """Attention scores over the tokens before the query, start token included, summed over heads (`attn_map_ctx`)."""
    q: Float[np.ndarray, "layer d_q"] | None
    """The attention query at the recorded position, heads concatenated, scaled by 1/√d_head (`attn_q`); in `ftzs`
    alone."""
    gold: int
    """The index of the correct label (`gold_label`)."""
    prediction: int
    """The index of the predicted label (`pred_label`)."""

    @property
    def shape(self) -> dict[str, int]:
        """The lengths of the axes that must be equal in all examples, by their names in error messages."""
        n_layers, n_heads = self.query.shape[:2]
        return {
            "layers": n_layers,
            "heads": n_heads,
            "d_model": self.hidden.shape[1],
            "tokens in context": self.context.shape[1],
        } | ({} if self.q is None else {"dimensions of queries": self.q.shape[1]})


_Example = dict[str, _Record]


class _Step(NamedTuple):
    """One training step: a line of `ft`."""

    n_tokens: int
    """The number of tokens of the step's demonstration, without the start token."""
    keep: bool
    """Whether the step's numbers are undamaged; the comparison leaves out other steps."""


class _UnpairedError(RecordingError):
    """Records in the same line of the settings' files belong to different queries."""


def _setting_shapes(example: _Example) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
    return tuple((setting, tuple(record.shape.items())) for setting, record in example.items())


class _Reader:
    """Reads the lines of a folder; raises an error for each damaged one, or skips it if `skip_bad`."""

    def __init__(self, folder: Path, n_labels: int, skip_bad: bool) -> None:
        self.folder, self.n_labels, self.skip_bad = folder, n_labels, skip_bad
        self.skipped: list[str] = []
        self.last_step_unknown = False

    def refuse_or_skip(self, error: RecordingError, unit: str) -> None:
        if not self.skip_bad:
            raise RecordingError(f"{error}: correct the record, or leave the {unit} out with skip_bad=True") from error
        self.skipped.append(str(error))

    def examples(self, progress: bool) -> list[_Example]:
        """Return the records of each example in the three settings, of the shape that most examples have."""
        examples: dict[int, _Example] = {}
        paths = {setting: self.folder / name / FILE for setting, name in FOLDERS.items()}
        size = sum(path.stat().st_size for path in paths.values())
        unpaired: RecordingError | None = None
        uneven = False
        with (
            ExitStack() as stack,
            progress_bar(total=size, desc="reading", show=progress, unit="B", unit_scale=True) as bar,
        ):
            files = [stack.enter_context(path.open("rb")) for path in paths.values()]
            for number, lines in enumerate(itertools.zip_longest(*files), start=1):
                uneven |= None in lines
                try:
                    examples[number] = self._example(number, dict(zip(SETTINGS, lines, strict=True)))
                except _UnpairedError as error:
                    unpaired = unpaired or error
                    self.refuse_or_skip(error, "example")
                except RecordingError as error:
                    self.refuse_or_skip(error, "example")
                bar.update(sum(len(line or b"") for line in lines))
        if uneven and unpaired:  # records that match in gold label and shape may do so by chance
            raise RecordingError(
                f"{unpaired}: record the folder again, as skip_bad cannot leave this example out. The settings have "
                "different numbers of lines, so a line may be missing before this one, and all later records may "
                "belong to different queries"
            )
        shapes = {number: _setting_shapes(example) for number, example in examples.items()}
        if not shapes:
            raise RecordingError(
                f"expected at least one undamaged example in {self.folder}, got none: record the folder again"
            )
        most_common_shape, _ = Counter(shapes.values()).most_common(1)[0]
        for number in [number for number, shape in shapes.items() if shape != most_common_shape]:
            setting, got, expected = next(
                (name, dict(shape), dict(common))
                for (name, shape), (_, common) in zip(shapes[number], most_common_shape, strict=True)
                if shape != common
            )
            error = _bad(paths[setting], number, f"the shape of most examples, {expected}", got)
            self.refuse_or_skip(error, "example")
            del examples[number]
        return list(examples.values())

    def _example(self, number: int, lines: dict[str, bytes | None]) -> _Example:
        example: _Example = {}
        for setting, line in lines.items():
            path = self.folder / FOLDERS[setting] / FILE
            if line is None:
                longer = next(FOLDERS[other] for other, other_line in lines.items() if other_line is not None)
                raise _bad(path, number, f"as many examples as in {longer}", f"the end of the file after {number - 1}")
            example[setting] = self._record(_object(line, path, number), path, number, with_q=setting == "FT")
        zsl = example["ZSL"]
        for setting, record in example.items():
            path = self.folder / FOLDERS[setting] / FILE
            if record.gold != zsl.gold:
                raise _UnpairedError(_bad(path, number, f"the gold label of zs, {zsl.gold}", record.gold))
            lengths, zero_shot_lengths = ([*r.query.shape, r.hidden.shape[1]] for r in (record, zsl))
            if lengths != zero_shot_lengths:
                axes = "layers, heads and query tokens in attn_map, d_model in self_attn_out_hiddens"
                raise _UnpairedError(_bad(path, number, f"as many {axes} as zs has, {zero_shot_lengths}", lengths))
        return example

    def _record(self, fields: dict[str, Any], path: Path, number: int, *, with_q: bool) -> _Record:
        def values(key: str, axes: str) -> np.ndarray:
            return _array(fields, key, axes, path, number)

        record = _Record(
            hidden=values("self_attn_out_hiddens", "layer d_model"),
            query=values("attn_map", "layer head query_token"),
            context=values("attn_map_ctx", "layer context_token"),
            q=values("attn_q", "layer d_q") if with_q else None,
            gold=self._label(fields, "gold_label", path, number),
            prediction=self._label(fields, "pred_label", path, number),
        )
        layers = {len(array) for array in record[:4] if isinstance(array, np.ndarray)}
        if len(layers) > 1:
            raise _bad(path, number, "the same number of layers under every key", sorted(layers))
        return record

    def _label(self, fields: dict[str, Any], key: str, path: Path, number: int) -> int:
        label = _value(fields, key, path, number)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < self.n_labels:
            raise _bad(path, number, f"{key} out of the {self.n_labels} labels 0 to {self.n_labels - 1}", repr(label))
        return label

    def steps(self, example: _Example) -> tuple[Float[Tensor, "layer train_token d_q"], list[_Step]]:
        """Return the attention queries of all undamaged training steps, and all steps of known length."""
        path, ft_query = self.folder / "ft" / FILE, example["FT"].q
        assert ft_query is not None
        queries: list[np.ndarray] = []
        steps: list[_Step] = []
        unplaceable: RecordingError | None = None  # for a step of unknown length: later steps have no known positions
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if unplaceable is not None:
                    raise RecordingError(
                        f"{unplaceable}: record the folder again, as skip_bad cannot leave this step out. Without its "
                        "number of tokens, the positions of later steps in the context are unknown"
                    )
                try:
                    q, n_tokens = self._step(line, path, number, ft_query.shape)
                except RecordingError as error:
                    self.refuse_or_skip(error, "training step")
                    unplaceable, self.last_step_unknown = error, True
                    continue
                except _BadValuesError as error:
                    self.refuse_or_skip(error.reason, "training step")
                    steps.append(_Step(error.n_tokens, keep=False))
                    continue
                queries.append(q)
                steps.append(_Step(n_tokens, keep=True))
        if not queries:
            raise RecordingError(
                f"expected at least one undamaged training step in {path}, got none: record the folder again"
            )
        return from_numpy(np.concatenate(queries, axis=1)), steps

    def _step(self, line: bytes, path: Path, number: int, ft_shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
        """Return the attention queries `[layer, train_token, d_q]` of a training step, and its number of tokens."""
        fields = _object(line, path, number)
        try:
            q = _array(fields, "attn_q", "layer train_token d_q", path, number)
        except RecordingError as error:
            layers = fields.get("attn_q")
            if not is_list(layers) or not all(isinstance(layer, list) for layer in layers):
                raise
            lengths = {len(layer) for layer in layers}
            if len(lengths) != 1 or min(lengths) < 2:
                raise
            raise _BadValuesError(error, lengths.pop() - 1) from error
        if q.shape[1] < 2 or (q.shape[0], q.shape[2]) != ft_shape:
            shape = f"[{ft_shape[0]}, 2 tokens or more, {ft_shape[1]}]"
            raise _bad(path, number, f"attn_q of shape {shape}, as in ftzs", list(q.shape))
        return q, q.shape[1] - 1


class _BadValuesError(Exception):
    """A training step has damaged numbers, but a known number of tokens."""

    def __init__(self, reason: RecordingError, n_tokens: int) -> None:
        super().__init__(str(reason))
        self.reason, self.n_tokens = reason, n_tokens


def _bad(path: Path, number: int, expected: str, got: object) -> RecordingError:
    """Return an error without the advice what to do, which `_Reader` adds."""
    return RecordingError(f"{path}, line {number}: expected {expected}, got {got}")


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            fields = json.loads(line)  # reads NaN, too, so that the error of `_array` can name its position
        except (ValueError, RecursionError) as error:
            got = f"{len(line)} bytes of invalid JSON ({first_line(error)})"
            raise _bad(path, number, "a complete JSON object", got) from error
    if not is_dict(fields):
        raise _bad(path, number, "a JSON object", type(fields).__name__)
    return fields


def _value(fields: dict[str, Any], key: str, path: Path, number: int) -> Any:
    if key not in fields:
        raise _bad(path, number, f"the key {key!r}", f"only {sorted(fields)}")
    return fields[key]


def _array(fields: dict[str, Any], key: str, axes: str, path: Path, number: int) -> np.ndarray:
    """Return the numbers of one field, in float32 where that holds them exactly, else in float64."""
    value = _value(fields, key, path, number)
    expected = f"{key} as finite numbers of shape [{axes}]"
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":  # `astype` would convert strings and booleans to numbers
            raise TypeError(array.dtype)
        array = array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        lengths = sorted({len(part) for part in value if is_list(part)}) if is_list(value) else []
        uneven = f"uneven lists: some have {lengths[0]} and some {lengths[-1]} entries" if len(lengths) > 1 else ""
        raise _bad(path, number, expected, uneven or "uneven lists, or entries that are not numbers") from None
    if array.ndim != len(axes.split()) or 0 in array.shape:
        raise _bad(path, number, expected, f"a list of shape {list(array.shape)}")
    if not np.isfinite(array).all():
        position = np.argwhere(~np.isfinite(array))[0]
        raise _bad(path, number, expected, f"{array[tuple(position)]} at {position.tolist()}")
    with np.errstate(over="ignore"):
        in_float32 = array.astype(np.float32)
    return in_float32 if np.array_equal(in_float32, array) else array


def _segments(steps: Sequence[_Step], n_tokens: int) -> Int[Tensor, " prefix_pos"]:
    """Return the source of each token of a context: a start token, then each demonstration and its separator.

    The context has the first demonstrations that fit whole into its number of tokens.
    """
    sources = [START]
    for index, step in enumerate(steps):
        if len(sources) + step.n_tokens > n_tokens:
            break
        sources += [index if step.keep else SEPARATOR] * step.n_tokens + [SEPARATOR]
    return torch.tensor((sources + [SEPARATOR] * n_tokens)[:n_tokens])


def _by_step(training_segments: Int[Tensor, " train_token"]) -> list[range]:
    """Return the positions of each step's demonstration among the training tokens, in order."""
    sources = to_list(training_segments)
    starts = [position for position, source in enumerate(sources) if source == START]
    return [range(start + 1, end) for start, end in itertools.pairwise([*starts, len(sources)])]


def _json_line(values: dict[str, Any], path: Path, number: int) -> bytes:
    """Return a record as a line of JSON, with its numbers in float64, which holds them exactly."""
    arrays = {
        key: value.double().cpu().numpy() if isinstance(value, Tensor) else value for key, value in values.items()
    }
    for key, value in arrays.items():
        if not np.isfinite(value).all():
            raise RecordingError(
                f"{path}, line {number}: expected finite numbers to write, got NaN or infinity in {key!r}: capture "
                "again in float32, or with another learning rate"
            )
    contiguous = {key: np.ascontiguousarray(value) if np.ndim(value) else value for key, value in arrays.items()}
    return orjson.dumps(contiguous, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _stacked(examples: Sequence[_Example], setting: str, name: str) -> Tensor:
    return from_numpy(np.stack([getattr(example[setting], name) for example in examples]))


def _padded(maps: Sequence[np.ndarray]) -> Float[Tensor, "query layer head query_token"]:
    """Return attention maps as one tensor, with zeros after the last token of each query."""
    longest = max(scores.shape[-1] for scores in maps)
    dtype = np.result_type(*(scores.dtype for scores in maps))
    padded = np.zeros((len(maps), *maps[0].shape[:2], longest), dtype=dtype)
    for row, scores in zip(padded, maps, strict=True):
        row[..., : scores.shape[-1]] = scores
    return from_numpy(padded)
