"""Field docstrings show where a user asks for help."""

import dataclasses
import inspect
import pydoc
from typing import NamedTuple

import pytest

import icl_dual as icl
from icl_dual import dual
from icl_dual.captures.capture import KeysValues
from icl_dual.captures.shared_prefix import FullPromptPass
from icl_dual.decomposition import AttentionInputs, MomentumTerms, Relaxation, Residuals
from icl_dual.field_docs import document_fields
from icl_dual.updates import DemonstrationKeysValues

DOCUMENTED = (
    icl.Capture,
    KeysValues,
    FullPromptPass,
    icl.Decomposition,
    icl.DecompositionSummary,
    MomentumTerms,
    Relaxation,
    Residuals,
    AttentionInputs,
    icl.UpdateComparison,
    DemonstrationKeysValues,
    icl.DeltaSummary,
    dual.AttentionRule,
    dual.Mask,
    dual.AttentionPart,
)


@document_fields
@dataclasses.dataclass(frozen=True)
class Point:
    """A point.

    It has two coordinates.
    """

    x: float
    """The distance from the vertical axis,
    in metres."""
    y: float = 0.0
    label: str = "p"
    """The name."""

    def norm(self) -> float:
        """Return the distance from the origin."""
        return abs(self.x) + abs(self.y)


@document_fields
class Pair(NamedTuple):
    first: int
    """One."""


def test_a_section_has_each_field_its_type_and_its_docstring() -> None:
    assert Point.__doc__ == (
        "A point.\n\nIt has two coordinates.\n\nAttributes:\n"
        "    x (float):\n        The distance from the vertical axis, in metres.\n"
        "    y (float)\n"
        "    label (str):\n        The name."
    )
    assert Point(1.0).__doc__ == Point.__doc__
    assert "The distance from the vertical axis, in metres." in pydoc.render_doc(Point)


def test_a_named_tuple_is_documented() -> None:
    text = inspect.getdoc(Pair)
    assert text is not None
    assert text.endswith("Attributes:\n    first (int):\n        One.")


def test_a_class_without_a_source_keeps_its_docstring() -> None:
    namespace = {"dataclasses": dataclasses, "document_fields": document_fields, "__name__": "nowhere"}
    exec(
        "@document_fields\n@dataclasses.dataclass\nclass Loose:\n    '''A class.'''\n    x: int\n    '''A field.'''\n",
        namespace,
    )
    assert namespace["Loose"].__doc__ == "A class."


@pytest.mark.parametrize("cls", DOCUMENTED, ids=lambda cls: cls.__name__)
def test_every_field_of_a_result_says_what_it_holds(cls: type) -> None:
    text = inspect.getdoc(cls)
    assert text is not None
    fields = (
        [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else vars(cls)["_fields"]
    )
    for name in fields:
        heading = next(line for line in text.splitlines() if line.startswith(f"    {name} ("))
        assert heading.endswith("):"), f"{cls.__name__}.{name} has no docstring"
