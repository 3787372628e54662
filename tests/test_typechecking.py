"""The type checker of the tests: it checks functions within functions as if each were new."""

from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor
from typechecking import typechecker


def make_inner(whole: bool) -> Callable[..., object]:
    """A new function at each call; two of one name and with other annotations."""
    if whole:

        @jaxtyped(typechecker=typechecker)
        def inner(x: int, y: int) -> int:  # pyright: ignore[reportRedeclaration]
            return x if y else str(x)  # pyright: ignore[reportReturnType]

        return inner

    @jaxtyped(typechecker=typechecker)
    def inner(x: Float[Tensor, "a b"], y: Float[Tensor, "b"]) -> Float[Tensor, "a"]:
        return x @ y if len(y) > 1 else x

    return inner


def test_functions_within_functions_are_checked_each_time_and_by_their_own_annotations() -> None:
    for _ in range(2):
        numbers, tensors = make_inner(whole=True), make_inner(whole=False)
        assert numbers(1, 1) == 1
        assert tensors(torch.ones(3, 2), torch.ones(2)) is not None
        for inner, wrong, message in (
            (numbers, ("1", 1), "parameters of .*inner"),
            (numbers, (1, 0), "return value of .*inner"),
            (tensors, (1, 1), "parameters of .*inner"),
            (tensors, (torch.ones(3, 2), torch.ones(3)), "parameters of .*inner"),
            (tensors, (torch.ones(3, 1), torch.ones(1)), "return value of .*inner"),
        ):
            with pytest.raises(TypeCheckError, match=message):
                inner(*wrong)


def test_beartype_reads_the_annotations_of_a_function_within_a_function_once(monkeypatch: pytest.MonkeyPatch) -> None:
    make_inner(whole=True)
    decorated = []
    monkeypatch.setattr("typechecking.beartype", lambda function: decorated.append(function) or beartype(function))
    make_inner(whole=True)
    assert decorated == []
