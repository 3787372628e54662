"""Folders that appear complete or not at all, and saved results."""

from pathlib import Path

import pytest
import torch

import icl_dual as icl
from icl_dual.storage import atomic_folder, load_tensors, save_tensors


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(content: str, then: BaseException | None = None) -> None:
        with atomic_folder(tmp_path / "made") as scratch:
            (scratch / "file").write_text(content)
            if then:
                raise then

    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("second", KeyboardInterrupt())
    assert (tmp_path / "made" / "file").read_text() == "first"
    write("third")
    assert (tmp_path / "made" / "file").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b/c": torch.tensor([float("nan"), 1.0], dtype=torch.float64)}
    save_tensors(tmp_path / "x", tensors, {"λ": [1, None]})
    loaded, metadata = load_tensors(tmp_path / "x")
    assert metadata == {"λ": [1, None]}
    assert torch.equal(loaded["a"], tensors["a"])
    torch.testing.assert_close(loaded["b/c"], tensors["b/c"], equal_nan=True)
    (tmp_path / "x" / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(icl.AssetError, match="Delete the folder to have it made again"):
        load_tensors(tmp_path / "x")


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(icl.AssetError, match=r"got .*thesis with other files in it \('chapter\.tex'"):
        save_tensors(tmp_path / "thesis", {"a": torch.ones(1)}, {})
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
