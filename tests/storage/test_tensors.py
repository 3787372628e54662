"""Saved tensors and metadata come back as they were, or are refused with the file and the reason."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.storage import load_tensors, read_json, save_tensors, to_json, write_json

TENSORS = {"a": torch.arange(60.0).view(20, 3), "b": torch.ones(7, dtype=torch.float64)}
METADATA = {"λ": [1, None, float("nan")], "losses": [0.1, 1e300], "text": "ja\ud800"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "x"
    save_tensors(folder, TENSORS, METADATA)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "x")


def test_what_was_saved_comes_back(saved: Path) -> None:
    tensors, metadata = load_tensors(saved)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in tensors.items())
    assert str(metadata) == str(METADATA), "with its NaN"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_refused(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A bit may be in a space of the metadata, or in the name of the checksums: then all values are what they were."""
    name = data.draw(st.sampled_from(["tensors.safetensors", "metadata.json"]))
    content = bytearray((saved / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("flipped") / "x")
    (folder / name).write_bytes(content)
    try:
        tensors, metadata = load_tensors(folder)
    except icl.AssetError as error:
        message = str(error)
        assert (name in message, str(folder) in message) == (True, True)
    else:
        assert name == "metadata.json"
        assert "sha256" not in json.loads(content) or str(metadata) == str(METADATA)
        assert all(torch.equal(tensor, TENSORS[key]) for key, tensor in tensors.items())


def test_a_folder_of_a_version_without_checksums_loads(folder: Path) -> None:
    metadata = read_json(folder / "metadata.json")
    checksums = metadata.pop("sha256")
    assert checksums.keys() == {"tensors.safetensors", "metadata.json"}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    assert str(load_tensors(folder)[1]) == str(METADATA)


def test_changed_metadata_are_refused(folder: Path) -> None:
    metadata = read_json(folder / "metadata.json")
    metadata["losses"][0] = 0.2
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(
        icl.AssetError, match=r"in .*x, got metadata\.json with other values than were saved .*: delete the folder"
    ):
        load_tensors(folder)


DAMAGED = {
    "binary": (b"\x00\xff\xfe binary", "codec can't decode"),
    "empty": (b"", "Expecting value"),
    "cut": (b'{"a": [1, 2', "delimiter"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "too many nested brackets"),
    "deep table": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too many nested brackets"),
    "long integer": (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
    "null": (b"null", "expected a JSON object .*, got null"),
    "list": (b"[1]", "expected a JSON object .*, got a list"),
    "text": (b'"x"', "expected a JSON object .*, got text"),
    "checksums": (b'{"sha256": null}', "sha256 that are no table"),
    "checksum": (b'{"sha256": {"tensors.safetensors": 5}}', "SHA-256 differs"),
    "latin-1": ('{"ü": 1}'.encode("latin-1"), "codec can't decode"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_json_is_refused_with_the_file(folder: Path, damage: str) -> None:
    content, reason = DAMAGED[damage]
    (folder / "metadata.json").write_bytes(content)
    with pytest.raises(icl.AssetError, match=f"expected tensors.safetensors and metadata.json in .*x, got .*{reason}"):
        load_tensors(folder)


def test_a_missing_or_unreadable_file_is_named(folder: Path) -> None:
    (folder / "metadata.json").unlink()
    (folder / "metadata.json").mkdir()
    with pytest.raises(icl.AssetError, match="Is a directory"):
        load_tensors(folder)
    with pytest.raises(icl.AssetError, match="which does not exist: check the path"):
        load_tensors(folder / "none")


def test_a_reader_gets_one_result_while_others_replace_it(tmp_path: Path) -> None:
    """Never the tensors of one and the metadata of another, and never an error."""
    stop = threading.Event()

    def save(number: int) -> None:
        save_tensors(tmp_path / "x", {"a": torch.full((3,), float(number))}, {"number": number})

    def keep_saving() -> None:
        number = 1
        while not stop.is_set():
            save(number := number + 1)

    save(1)
    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        numbers = set()
        for _ in range(100):
            tensors, metadata = load_tensors(tmp_path / "x")
            assert tensors["a"].tolist() == [metadata["number"]] * 3
            numbers.add(metadata["number"])
    finally:
        stop.set()
        writer.join()
    assert len(numbers) > 1


def test_a_folder_that_is_missing_for_an_instant_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process sets the folder aside after `recover` has looked, and has replaced it before the next look."""
    aside, is_missing = folder.with_name("aside"), iter((True, True, False))

    def recover(path: Path) -> None:
        if path == folder:
            if aside.exists():
                aside.rename(folder)
            if next(is_missing):
                folder.rename(aside)

    monkeypatch.setattr("icl_dual.storage.tensors.recover", recover)
    assert load_tensors(folder)[0].keys() == TENSORS.keys()


@pytest.mark.parametrize("is_missing", [True, False], ids=["missing", "replaced"])
def test_a_folder_that_is_replaced_while_its_file_is_opened_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_missing: bool
) -> None:
    """safetensors opens a file twice, once for its header and once, by torch, for its tensors."""
    other = folder.with_name("other")
    save_tensors(other, {"a": torch.full((20, 3), 7.0)}, {"is": "other"})
    from_file, opened = torch.UntypedStorage.from_file, []

    def replaced(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        if len(opened) > 1:
            return from_file(*arguments, **options)
        folder.rename(folder.with_name("aside"))
        if is_missing:
            try:
                return from_file(*arguments, **options)
            finally:
                other.rename(folder)
        other.rename(folder)
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced)
    tensors, metadata = load_tensors(folder)
    assert len(opened) == 2
    assert metadata == {"is": "other"}
    assert torch.equal(tensors["a"], torch.full((20, 3), 7.0))


def test_an_error_of_torchs_in_a_folder_that_stays_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[Any]()

    def broken(*arguments: Any, **options: Any) -> torch.UntypedStorage:
        opened.append(arguments)
        raise RuntimeError("broken")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", broken)
    with pytest.raises(RuntimeError, match="broken"):
        load_tensors(folder)
    assert len(opened) == 1


def test_nothing_depends_on_the_locale(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a locale of ASCII: text that is opened without an encoding is read and written as ASCII."""
    for name in ("read_text", "write_text"):
        original: Callable[..., Any] = getattr(Path, name)

        def in_ascii(*args: Any, encoding: str | None = None, original: Any = original, **kwargs: Any) -> Any:
            return original(*args, encoding=encoding or "ascii", **kwargs)

        monkeypatch.setattr(Path, name, in_ascii)
    save_tensors(tmp_path / "x", TENSORS, METADATA)
    write_json(tmp_path / "x.json", {"λ": "η"})
    assert read_json(tmp_path / "x.json") == {"λ": "η"}
    assert (tmp_path / "x" / "metadata.json").read_bytes() == (saved / "metadata.json").read_bytes()


def test_scalars_and_paths_are_saved_as_json() -> None:
    value = {"k": np.int64(3), "lr": np.float32(0.5), "t": torch.tensor(2), "p": Path("a/b"), "b": np.bool_(True)}
    assert json.loads(to_json(value)) == {"k": 3, "lr": 0.5, "t": 2, "p": "a/b", "b": True}


@pytest.mark.parametrize(
    ("part", "kind"), [({1}, "set"), (object(), "object"), (torch.ones(2), "Tensor"), (b"x", "bytes"), (1j, "complex")]
)
def test_what_json_cannot_hold_is_named_before_anything_is_written(tmp_path: Path, part: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"expected metadata/settings/1/lr as text, .*, got a {kind}: convert it"):
        save_tensors(tmp_path / "x", {}, {"settings": [1, {"lr": part}]})
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="expected metadata/x"):
        save_tensors(tmp_path / "x", {}, {"x": endless})
    assert not os.listdir(tmp_path)  # noqa: PTH208


def test_a_result_of_another_kind_is_never_replaced(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS, {"class": "Comparison", "losses": [1]})
    with pytest.raises(
        icl.AssetError, match=r"one with a saved WeightDelta, got .*x with a saved Comparison: choose another folder"
    ):
        save_tensors(tmp_path / "x", TENSORS, {"class": "WeightDelta"})
    assert load_tensors(tmp_path / "x")[1]["losses"] == [1]
    (tmp_path / "mine").mkdir()
    for name in ("tensors.safetensors", "metadata.json"):
        (tmp_path / "mine" / name).write_text("precious")
        with pytest.raises(
            icl.AssetError, match=r"one with a saved result, got .*mine: expected JSON in .*choose another"
        ):
            save_tensors(tmp_path / "mine", TENSORS, {"class": "WeightDelta"})
        assert (tmp_path / "mine" / name).read_text() == "precious"


def test_torchs_advice_to_read_files_unsafely_is_not_passed_on(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return print, ("this ran",)

    torch.save(Code(), tmp_path / "x.bin")
    with pytest.raises(Exception, match="weights_only") as raised:
        torch.load(tmp_path / "x.bin", weights_only=True)
    from icl_dual.storage import first_line

    assert first_line(raised.value) == "a file that is damaged or holds other things than tensors"
