"""Recordings in the released layout: written for the released scripts, and read back.

The released code of Dai et al. (microsoft/LMOps, `understand_icl`) records each setting in a folder, `zs`, `icl`,
`ftzs` and `ft`, as one JSON object a line in `record_info.jsonl`; its scripts compute the paper's numbers from these.
This module writes folders that those scripts read, and reads such folders, its own or those of the released code. The
layout is in `docs/recordings.md`.
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

from icl_dual.progress import progress_bar
from icl_dual.prompts import SEPARATOR, START
from icl_dual.recordings.recordings import SETTINGS, RecordingError, Recordings, label_limit
from icl_dual.storage import atomic_folder

FOLDERS = {"ZSL": "zs", "ICL": "icl", "FT": "ftzs"}
"""Where each setting is recorded. The fourth folder, `ft`, has finetuning's steps."""

FILE = "record_info.jsonl"


def write_recordings(recordings: Recordings, folder: str | PathLike[str], *, progress: bool = True) -> None:
    """Write recordings in the released layout, query by query; every digit is kept.

    Raises:
        RecordingError: there are no training queries; separators are not one token each, which the layout takes for
            granted; or a number is NaN.
        AssetError: the folder holds other files.
    """
    if recordings.training_q is None or recordings.training_segments is None:
        raise RecordingError(
            "expected recordings with finetuning's training queries, which the released layout's folder ft holds, got "
            "recordings without: make them with a delta of icl_dual.finetune"
        )
    steps = _by_step(recordings.training_segments)
    expected = _segments([_Step(len(tokens), keep=True) for tokens in steps], len(recordings.segments))
    if not torch.equal(expected, recordings.segments):
        raise RecordingError(
            "expected whole demonstrations behind one start token and each with one separator token after it, as "
            f"the released layout has them, got a context of {len(recordings.segments)} tokens that are not ordered so"
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
        (scratch / "metadata.json").write_text(json.dumps(recordings.metadata, indent=1, ensure_ascii=False))


def _query_record(recordings: Recordings, setting: str, query: int) -> dict[str, Any]:
    line = {
        "self_attn_out_hiddens": recordings.attn_out[setting][query],
        "attn_map": recordings.query_scores[setting][query, ..., : int(recordings.query_lengths[query])],
        "attn_map_ctx": recordings.context_scores[setting][query],
        "gold_label": int(recordings.gold[query]),
        "pred_label": int(recordings.predictions[setting][query]),
    }
    return line | ({"attn_q": recordings.q[query]} if setting == "FT" else {})


def load_recordings(
    folder: str | PathLike[str], *, n_labels: int | None = None, skip_bad: bool = False, progress: bool = True
) -> Recordings:
    """Read recordings in the released layout, or what `Recordings.save` wrote; no model is needed.

    Args:
        folder: has `zs`, `icl`, `ftzs` and `ft`, each with `record_info.jsonl`; or safetensors of ours.
        n_labels: how many labels there are; where not given, what the folder's own metadata say, or the paper's task
            that it is named after, or the most that a task of the paper has.
        skip_bad: leave out examples with a damaged record, in all settings, instead of refusing the folder; what was
            left out is in `skipped`. A damaged training step is left out where its demonstration's length is known.
        progress: show a progress bar.

    Raises:
        RecordingError: a setting is missing, a line is no whole record, numbers of examples, layers, heads or tokens
            differ, a number is not finite, or a label id is out of range; names file and line.
        AssetError: safetensors that are damaged.
    """
    folder = Path(folder)
    if (folder / "tensors.safetensors").exists():
        return Recordings.load(folder, n_labels)
    if not folder.is_dir():
        raise RecordingError(f"expected a folder of recordings, found no {folder}")
    for name in (*FOLDERS.values(), "ft"):
        if not (folder / name / FILE).is_file():
            raise RecordingError(
                f"expected recordings of the settings zs, icl, ftzs and ft in {folder}, found no {folder / name / FILE}"
            )
    metadata = _metadata(folder)
    reader = _Reader(folder, label_limit(folder, metadata) if n_labels is None else n_labels, skip_bad)
    examples = reader.examples(progress)
    training_q, steps = reader.steps(examples[0])
    segments = _segments(steps, examples[0]["ICL"].context.shape[1])
    # A context ends behind a demonstration's separator: the last one's, or an earlier one's where not all were shown.
    ends = list(itertools.accumulate((step.n_tokens + 1 for step in steps), initial=1))[1:]
    whole = len(segments) in ends or (reader.last_step_lost and len(segments) > ends[-1])
    if not whole or not (segments >= 0).any():
        raise RecordingError(
            f"{folder / 'icl' / FILE}, line 1: expected a context of whole demonstrations of {folder / 'ft' / FILE} "
            f"and their separators, {ends[-1]} tokens with all {len(steps)}, got {len(segments)}. Is a step missing?"
        )
    kept = [step for step, one in enumerate(steps) if one.keep]
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
            [torch.tensor([START] + [step] * steps[step].n_tokens, dtype=torch.long) for step in kept]
        ),
        metadata=metadata,
        skipped=tuple(reader.skipped),
    )


def _metadata(folder: Path) -> dict[str, Any]:
    path = folder / "metadata.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise RecordingError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(found, dict):
        raise RecordingError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


class _Record(NamedTuple):
    """One line of `zs`, `icl` or `ftzs`: the record of one query."""

    hidden: Float[np.ndarray, "layer d_model"]
    query: Float[np.ndarray, "layer head query_token"]
    context: Float[np.ndarray, "layer context_pos"]
    q: Float[np.ndarray, "layer d_q"] | None
    gold: int
    prediction: int

    @property
    def shape(self) -> dict[str, int]:
        """The lengths of axes, in which all examples agree."""
        n_layers, n_heads = self.query.shape[:2]
        return {
            "layers": n_layers,
            "heads": n_heads,
            "d_model": self.hidden.shape[1],
            "tokens in context": self.context.shape[1],
        } | ({} if self.q is None else {"dimensions of queries": self.q.shape[1]})


_Example = dict[str, _Record]


class _Step(NamedTuple):
    """One line of `ft`: its demonstration's number of tokens, without the start token, and whether it is usable."""

    n_tokens: int
    keep: bool


class _UnpairedError(RecordingError):
    """Records of one line number that are not of one query."""


def _shapes(example: _Example) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
    return tuple((setting, tuple(record.shape.items())) for setting, record in example.items())


class _Reader:
    """Reads the lines of a folder, and refuses or skips what is wrong with them."""

    def __init__(self, folder: Path, n_labels: int, skip_bad: bool) -> None:
        self.folder, self.n_labels, self.skip_bad = folder, n_labels, skip_bad
        self.skipped: list[str] = []
        self.last_step_lost = False

    def wrong(self, error: RecordingError) -> None:
        if not self.skip_bad:
            raise error
        self.skipped.append(str(error))

    def examples(self, progress: bool) -> list[_Example]:
        """Return every example's records in the three settings; examples with another shape than most are left out."""
        found: dict[int, _Example] = {}
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
                    found[number] = self._example(number, dict(zip(SETTINGS, lines, strict=True)))
                except _UnpairedError as error:
                    unpaired = unpaired or error
                    self.wrong(error)
                except RecordingError as error:
                    self.wrong(error)
                bar.update(sum(len(line or b"") for line in lines))
        if uneven and unpaired:  # what looks like a pair may be one by chance only
            raise RecordingError(
                f"{unpaired}. It cannot be skipped: the settings have other numbers of lines, too, so a line may be "
                "missing before this one and all after it belong to other queries"
            )
        shapes = {number: _shapes(example) for number, example in found.items()}
        if not shapes:
            raise RecordingError(f"expected at least one whole example in {self.folder}, got none")
        usual, _ = Counter(shapes.values()).most_common(1)[0]
        for number in [number for number, shape in shapes.items() if shape != usual]:
            setting, got, expected = next(
                (s, dict(a), dict(b)) for (s, a), (_, b) in zip(shapes[number], usual, strict=True) if a != b
            )
            self.wrong(_bad(paths[setting], number, f"the shape of most examples, {expected}", got))
            del found[number]
        return list(found.values())

    def _example(self, number: int, lines: dict[str, bytes | None]) -> _Example:
        example: _Example = {}
        for setting, line in lines.items():
            path = self.folder / FOLDERS[setting] / FILE
            if line is None:
                longer = next(FOLDERS[other] for other, found in lines.items() if found is not None)
                raise _bad(path, number, f"as many examples as in {longer}", f"the file's end after {number - 1}")
            example[setting] = self._record(_object(line, path, number), path, number, with_q=setting == "FT")
        zsl = example["ZSL"]
        for setting, record in example.items():
            path = self.folder / FOLDERS[setting] / FILE
            if record.gold != zsl.gold:
                raise _UnpairedError(_bad(path, number, f"the gold label of zs, {zsl.gold}", record.gold))
            mine, zero_shot = ([*r.query.shape, r.hidden.shape[1]] for r in (record, zsl))
            if mine != zero_shot:
                axes = "layers, heads and query tokens in attn_map, d_model in self_attn_out_hiddens"
                raise _UnpairedError(_bad(path, number, f"as many {axes} as zs has, {zero_shot}", mine))
        return example

    def _record(self, found: dict[str, Any], path: Path, number: int, *, with_q: bool) -> _Record:
        def values(key: str, axes: str) -> np.ndarray:
            return _array(found, key, axes, path, number)

        record = _Record(
            hidden=values("self_attn_out_hiddens", "layer d_model"),
            query=values("attn_map", "layer head query_token"),
            context=values("attn_map_ctx", "layer context_token"),
            q=values("attn_q", "layer d_q") if with_q else None,
            gold=self._label(found, "gold_label", path, number),
            prediction=self._label(found, "pred_label", path, number),
        )
        layers = {len(array) for array in record[:4] if isinstance(array, np.ndarray)}
        if len(layers) > 1:
            raise _bad(path, number, "the same number of layers under every key", sorted(layers))
        return record

    def _label(self, found: dict[str, Any], key: str, path: Path, number: int) -> int:
        label = _value(found, key, path, number)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < self.n_labels:
            raise _bad(path, number, f"{key} out of the {self.n_labels} labels 0 to {self.n_labels - 1}", repr(label))
        return label

    def steps(self, example: _Example) -> tuple[Float[Tensor, "layer train_token d_q"], list[_Step]]:
        """Return the attention queries of all usable training steps, and every step's length."""
        path, like = self.folder / "ft" / FILE, example["FT"].q
        assert like is not None
        kept: list[np.ndarray] = []
        steps: list[_Step] = []
        lost: RecordingError | None = None  # a step of unknown length: what follows it cannot be placed in the context
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if lost is not None:
                    raise RecordingError(f"{lost}. It cannot be skipped: steps after it could not be placed")
                try:
                    q, n_tokens = self._step(line, path, number, like.shape)
                except RecordingError as error:
                    self.wrong(error)
                    lost, self.last_step_lost = error, True
                    continue
                except _BadValuesError as error:
                    self.wrong(error.reason)
                    steps.append(_Step(error.n_tokens, keep=False))
                    continue
                kept.append(q)
                steps.append(_Step(n_tokens, keep=True))
        if not kept:
            raise RecordingError(f"expected at least one whole training step in {path}, got none")
        return torch.from_numpy(np.concatenate(kept, axis=1)), steps

    def _step(self, line: bytes, path: Path, number: int, like: tuple[int, ...]) -> tuple[np.ndarray, int]:
        found = _object(line, path, number)
        try:
            q = _array(found, "attn_q", "layer train_token d_q", path, number)
        except RecordingError as error:
            layers = found.get("attn_q")
            if not isinstance(layers, list) or not all(isinstance(layer, list) for layer in layers):
                raise
            lengths = {len(layer) for layer in layers}
            if len(lengths) != 1 or min(lengths) < 2:
                raise
            raise _BadValuesError(error, lengths.pop() - 1) from error
        if q.shape[1] < 2 or (q.shape[0], q.shape[2]) != like:
            raise _bad(path, number, f"attn_q of [{like[0]}, 2 tokens or more, {like[1]}], as in ftzs", list(q.shape))
        return q, q.shape[1] - 1


class _BadValuesError(Exception):
    """A training step whose numbers are damaged, but whose length is known."""

    def __init__(self, reason: RecordingError, n_tokens: int) -> None:
        super().__init__(str(reason))
        self.reason, self.n_tokens = reason, n_tokens


def _bad(path: Path, number: int, expected: str, got: object) -> RecordingError:
    return RecordingError(f"{path}, line {number}: expected {expected}, got {got}")


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            found = json.loads(line)  # reads NaN, too, which is to be refused by its place
        except (ValueError, RecursionError) as error:
            raise _bad(path, number, "a whole JSON object", f"{len(line)} bytes that are none ({error})") from error
    if not isinstance(found, dict):
        raise _bad(path, number, "a JSON object", type(found).__name__)
    return found


def _value(found: dict[str, Any], key: str, path: Path, number: int) -> Any:
    if key not in found:
        raise _bad(path, number, f"the key {key!r}", f"only {sorted(found)}")
    return found[key]


def _array(found: dict[str, Any], key: str, axes: str, path: Path, number: int) -> np.ndarray:
    """Return a record's numbers: in float32 where that holds them exactly, else in float64."""
    value = _value(found, key, path, number)
    wanted = f"{key} as finite numbers by [{axes}]"
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":  # strings and truth values would pass for numbers
            raise TypeError(array.dtype)
        array = array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        lengths = sorted({len(part) for part in value if isinstance(part, list)}) if isinstance(value, list) else []
        uneven = f"uneven lists: some have {lengths[0]} and some {lengths[-1]} entries" if len(lengths) > 1 else ""
        raise _bad(path, number, wanted, uneven or "uneven lists, or entries that are no numbers") from None
    if array.ndim != len(axes.split()) or 0 in array.shape:
        raise _bad(path, number, wanted, f"a list of shape {list(array.shape)}")
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0]
        raise _bad(path, number, wanted, f"{array[tuple(where)]} at {where.tolist()}")
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    return single if np.array_equal(single, array) else array


def _segments(steps: Sequence[_Step], n_tokens: int) -> Int[Tensor, " prefix_pos"]:
    """Return the source of each token of a context: a start token, then each demonstration and its separator.

    Steps after the last demonstration that fits whole were not in the context.
    """
    owners = [START]
    for index, step in enumerate(steps):
        if len(owners) + step.n_tokens > n_tokens:
            break
        owners += [index if step.keep else SEPARATOR] * step.n_tokens + [SEPARATOR]
    return torch.tensor((owners + [SEPARATOR] * n_tokens)[:n_tokens])


def _by_step(training_segments: Int[Tensor, " train_token"]) -> list[range]:
    """Return the positions of each step's demonstration among the training tokens, in order."""
    owners = training_segments.tolist()
    starts = [at for at, owner in enumerate(owners) if owner == START]
    return [range(start + 1, end) for start, end in itertools.pairwise([*starts, len(owners)])]


def _json_line(values: dict[str, Any], path: Path, number: int) -> bytes:
    """Return a record as a line of JSON, its numbers exactly, as float64."""
    plain = {key: value.double().numpy() if isinstance(value, Tensor) else value for key, value in values.items()}
    for key, value in plain.items():
        if not np.isfinite(value).all():
            raise RecordingError(f"{path}, line {number}: expected finite numbers to write, got others in {key!r}")
    contiguous = {key: np.ascontiguousarray(value) if np.ndim(value) else value for key, value in plain.items()}
    return orjson.dumps(contiguous, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _stacked(examples: Sequence[_Example], setting: str, name: str) -> Tensor:
    return torch.from_numpy(np.stack([getattr(example[setting], name) for example in examples]))


def _padded(maps: Sequence[np.ndarray]) -> Float[Tensor, "query layer head query_token"]:
    longest = max(one.shape[-1] for one in maps)
    padded = np.zeros((len(maps), *maps[0].shape[:2], longest), dtype=np.result_type(*(one.dtype for one in maps)))
    for into, one in zip(padded, maps, strict=True):
        into[..., : one.shape[-1]] = one
    return torch.from_numpy(padded)
