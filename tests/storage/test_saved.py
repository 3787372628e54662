"""Folders that appear complete or not at all, and saved results."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import icl_dual as icl
from icl_dual.storage import NOT_SAVED, Saved, check_same_settings, load_tensors, save_tensors


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b/c": torch.tensor([float("nan"), 1.0], dtype=torch.float64)}
    save_tensors(tmp_path / "x", tensors, {"λ": [1, None]})
    loaded, metadata = load_tensors(tmp_path / "x")
    assert metadata == {"λ": [1, None]}
    assert torch.equal(loaded["a"], tensors["a"])
    torch.testing.assert_close(loaded["b/c"], tensors["b/c"], equal_nan=True)
    (tmp_path / "x" / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(icl.AssetError, match="delete the folder to have it made again"):
        load_tensors(tmp_path / "x")


def test_a_folder_of_results_is_not_called_damaged(tmp_path: Path) -> None:
    """The advice to delete a folder is for damaged results only: a study's folder holds all of its cells."""
    save_tensors(tmp_path / "study" / "cell", {"a": torch.ones(1)}, {})
    expected = (
        r"expected a saved result in .*study, got a folder without tensors\.safetensors and metadata\.json: pass a "
        "result's own folder; the cells of a study are its sub-folders"
    )
    for load in (load_tensors, icl.load_cell):
        with pytest.raises(icl.AssetError, match=expected) as raised:
            load(tmp_path / "study")
        assert "delete" not in str(raised.value).lower()
    for name in ("tensors.safetensors", "metadata.json"):
        save_tensors(tmp_path / name, {"a": torch.ones(1)}, {})
        (tmp_path / name / name).unlink()
        with pytest.raises(icl.AssetError, match="delete the folder to have it made again"):
            load_tensors(tmp_path / name)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Inner:
    ids: tuple[tuple[int, ...], ...]
    weights: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Result(Saved):
    name: str
    limit: int | None
    pair: Pair
    inner: Inner | None
    by_name: dict[str, torch.Tensor]
    numbers: dict[str, float]
    n: int | None = 100
    extra: torch.Tensor | None = None


def result(**changes: Any) -> Result:
    shared = torch.arange(6.0)
    values: dict[str, Any] = {
        "name": "λ",
        "limit": None,
        "pair": Pair(shared[:3], None),
        "inner": Inner(((1, 2), (), (3,)), shared[3:]),
        "by_name": {"ZSL": torch.tensor([float("nan")], dtype=torch.float64), "ICL": shared},
        "numbers": {"b": 1.5, "a": float("nan")},
        "n": None,
    }
    return Result(**values | changes)


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = result()
    saved.save(tmp_path / "x", {"settings": {"k": 3}})
    loaded = Result.load(tmp_path / "x")
    assert (loaded.name, loaded.limit, loaded.n, loaded.extra) == ("λ", None, None, None), "n is not its default, 100"
    assert loaded.inner is not None
    assert loaded.inner.ids == ((1, 2), (), (3,))
    assert torch.equal(loaded.inner.weights, torch.tensor([3.0, 4.0, 5.0]))
    assert torch.equal(loaded.pair.left, torch.tensor([0.0, 1.0, 2.0]))
    assert loaded.pair.right is None
    assert loaded.by_name.keys() == {"ZSL", "ICL"}
    torch.testing.assert_close(loaded.by_name["ZSL"], saved.by_name["ZSL"], equal_nan=True)
    assert list(loaded.numbers) == ["b", "a"]
    assert load_tensors(tmp_path / "x")[1]["settings"] == {"k": 3}


def test_what_is_none_stays_none(tmp_path: Path) -> None:
    result(inner=None, limit=7).save(tmp_path / "x")
    loaded = Result.load(tmp_path / "x")
    assert (loaded.inner, loaded.limit) == (None, 7)


def test_what_an_older_file_lacks_is_absent_but_what_is_needed_is_an_error(tmp_path: Path) -> None:
    result(extra=torch.ones(2), n=5).save(tmp_path / "x")
    tensors, metadata = load_tensors(tmp_path / "x")
    del tensors["extra"], metadata["n"], metadata["limit"]
    save_tensors(tmp_path / "x", tensors, metadata)
    loaded = Result.load(tmp_path / "x")
    assert (loaded.extra, loaded.n, loaded.limit) == (None, 100, None)
    del tensors["pair/left"]
    save_tensors(tmp_path / "x", tensors, metadata)
    with pytest.raises(
        icl.AssetError, match=r"expected a saved Result in .*KeyError\('pair/left'\)\): use the load of"
    ):
        Result.load(tmp_path / "x")


def test_another_class_is_not_loaded(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Result):
        pass

    Other(**vars(result())).save(tmp_path / "x")
    with pytest.raises(icl.AssetError, match=r"expected a saved Result in .*, got a saved Other: use Other\.load"):
        Result.load(tmp_path / "x")


def test_other_settings_are_named(tmp_path: Path) -> None:
    check_same_settings(tmp_path, {"k": 1}, {"k": 1, "more": 2})
    with pytest.raises(icl.SettingsError, match=r"made with k=2, lr=0\.1, got .*, made with k=1, lr=None: choose"):
        check_same_settings(tmp_path, {"k": 2, "lr": 0.1}, {"k": 1})


def test_names_may_have_slashes(tmp_path: Path) -> None:
    result(by_name={"ICL/FT ratio": torch.ones(2), "ICL": torch.zeros(1)}).save(tmp_path / "x")
    loaded = Result.load(tmp_path / "x").by_name
    assert loaded.keys() == {"ICL/FT ratio", "ICL"}
    assert torch.equal(loaded["ICL/FT ratio"], torch.ones(2))


def test_metadata_beside_a_result_never_take_its_own_names(tmp_path: Path) -> None:
    for name in ("limit", "class"):
        with pytest.raises(ValueError, match=rf"expected about without the result's own names, got \['{name}'\]"):
            result().save(tmp_path / "x", {name: 3})
    assert not (tmp_path / "x").exists()


def test_a_field_that_is_not_saved_comes_back_as_its_default(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class WithModel(Saved):
        name: str
        model: Any = dataclasses.field(default=None, metadata=NOT_SAVED)

    WithModel("x", model=object()).save(tmp_path / "x")
    assert WithModel.load(tmp_path / "x") == WithModel("x", None)
