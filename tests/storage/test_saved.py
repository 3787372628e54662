"""Folders that appear complete or not at all, and saved results."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch

import icl_dual as icl
from icl_dual.storage import NOT_SAVED, Saved, check_same_settings, from_json, load_tensors, save_tensors


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
    for name in ("limit", "class", "sha256"):
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


@dataclasses.dataclass(frozen=True)
class Options:
    method: Literal["sgd", "adam"] = "sgd"


@dataclasses.dataclass(frozen=True, eq=False)
class Typed(Saved):
    count: int
    rate: float
    flag: bool
    name: str
    limit: int | None
    sizes: tuple[int, ...]
    pair: tuple[int, str]
    orders: list[list[int]]
    options: Options
    by_name: dict[str, float]
    x: torch.Tensor

    def __post_init__(self) -> None:
        if self.count > 3:
            raise ValueError(f"expected count of at most 3, got {self.count}: count again")


def typed() -> Typed:
    named: dict[str, Any] = {"count": 3, "rate": 0.5, "flag": True, "name": "n", "limit": None, "sizes": (1, 2)}
    return Typed(
        **named, pair=(1, "a"), orders=[[0, 1]], options=Options(), by_name={"a": float("nan")}, x=torch.ones(2)
    )


WRONG: list[tuple[str, Any, str]] = [
    ("count", "3", "expected count in .* as a whole number, got text"),
    ("count", 3.0, "expected count in .* as a whole number, got a number"),
    ("count", True, "expected count in .* as a whole number, got true or false"),
    ("count", float("nan"), "expected count in .* as a whole number"),
    ("count", None, "expected count in .* as a whole number, got null"),
    ("count", 5, "values that fit each other, got .*expected count of at most 3, got 5"),
    ("rate", "0.5", "expected rate in .* as a number, got text"),
    ("flag", 1, "expected flag in .* as true or false, got a number"),
    ("name", ["n"], "expected name in .* as text, got a list"),
    ("limit", "x", "expected limit in .* as a whole number or null, got text"),
    ("sizes", 3, "expected sizes in .* as a list, got a number"),
    ("sizes", [1, "2"], "expected sizes/1 in .* as a whole number, got text"),
    ("pair", [1], "expected pair in .* as a list of 2, got a list of 1"),
    ("pair", ["a", 1], "expected pair/0 in .* as a whole number, got text"),
    ("orders", [[0], None], "expected orders/1 in .* as a list, got null"),
    ("options", None, "expected options in .* as a table, got null"),
    ("options", [], "expected options in .* as a table, got a list"),
    ("options", {"method": "lbfgs"}, "expected options/method in .* as one of 'sgd', 'adam', got text"),
    ("by_name", None, "expected by_name in .* as a table, got null"),
    ("by_name", {"a": [1]}, "expected by_name/a in .* as a number, got a list"),
    ("x", 3, "expected a saved Typed in|expected x in .* as a tensor, got a number"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=lambda value: str(value)[:20])
def test_wrong_types_and_values_are_refused_with_file_and_field(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    typed().save(tmp_path / "x")
    tensors, metadata = load_tensors(tmp_path / "x")
    if field == "x":
        del tensors["x"]
    save_tensors(tmp_path / "x", tensors, metadata | {field: value})
    with pytest.raises(icl.AssetError, match=message) as raised:
        Typed.load(tmp_path / "x")
    assert str(tmp_path / "x") in str(raised.value)


def test_right_types_come_back_as_they_were(tmp_path: Path) -> None:
    typed().save(tmp_path / "x")
    loaded = Typed.load(tmp_path / "x")
    assert loaded == typed()
    assert (loaded.sizes, loaded.pair, loaded.orders, loaded.options) == ((1, 2), (1, "a"), [[0, 1]], Options())


def test_a_tensor_in_the_place_of_a_value_is_refused(tmp_path: Path) -> None:
    typed().save(tmp_path / "x")
    tensors, metadata = load_tensors(tmp_path / "x")
    save_tensors(tmp_path / "x", tensors | {"count": torch.ones(1)}, metadata)
    with pytest.raises(icl.AssetError, match=r"expected count in .* as a whole number, got a tensor"):
        Typed.load(tmp_path / "x")
    save_tensors(tmp_path / "x", tensors | {"name/part": torch.ones(1)}, metadata)
    with pytest.raises(icl.AssetError, match=r"expected name in .* as text, got"):
        Typed.load(tmp_path / "x")


def test_settings_are_read_with_their_types() -> None:
    assert from_json(Options, {"method": "adam"}, "x/metadata.json") == Options("adam")
    for values, message in (
        ({"method": 3}, r"expected method in x/metadata\.json as one of 'sgd', 'adam', got a number"),
        (None, r"expected Options in x/metadata\.json as a table of Options, got null"),
        ({"mehtod": "sgd"}, r"expected a saved Options in x/metadata\.json, .*mehtod"),
    ):
        with pytest.raises(icl.AssetError, match=message):
            from_json(Options, values, "x/metadata.json")


def test_a_result_is_never_saved_over_one_with_more_about_it(tmp_path: Path) -> None:
    """As a comparison that is saved into the folder of a finished cell, which has settings and provenance."""
    result().save(tmp_path / "cell", {"settings": {"k": 3}})
    with pytest.raises(
        icl.AssetError, match=r"got .*cell with its settings: choose another folder, or delete this one"
    ):
        result().save(tmp_path / "cell")
    result(limit=5).save(tmp_path / "cell", {"settings": {"k": 4}})
    assert Result.load(tmp_path / "cell").limit == 5
    with pytest.raises(icl.AssetError, match=r"one with a saved Typed, got .*cell with a saved Result"):
        typed().save(tmp_path / "cell")
