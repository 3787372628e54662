"""The docstrings of dataclass fields, shown by `help`.

Python drops a string below a field. `document_fields` reads it from the source and adds an "Attributes" section to the
class's docstring, with each field's type and text. The source is read when the docstring is first read, so that an
import costs nothing; without a source file the docstring stays as it was written.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from functools import cache
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

WIDTH = 116
"""The longest line of a section, as the source's own lines are."""


def document_fields(cls: Class) -> Class:
    """Add each field's docstring to the docstring of a dataclass or named tuple, for `help`.

    >>> @document_fields
    ... @dataclasses.dataclass
    ... class Point:
    ...     '''A point of the plane.'''
    ...     x: float
    ...     '''The distance from the vertical axis, in metres.'''
    >>> Point.__doc__  # no source file, no section
    'A point of the plane.'
    """
    type.__setattr__(cls, "__doc__", _ClassDocstring(cls, cls.__doc__))
    return cls


class _ClassDocstring:
    """A class's `__doc__`, to which the section of fields is added when it is first read."""

    def __init__(self, cls: type, summary: str | None) -> None:
        self.cls, self.summary = cls, summary
        self.text: str | None = None

    def __get__(self, instance: object, owner: type | None = None) -> str | None:
        if self.text is None:
            sections = (inspect.cleandoc(self.summary or ""), _attributes_section(self.cls))
            self.text = "\n\n".join(filter(None, sections))
        return self.text or None


def _attributes_section(cls: type) -> str:
    """Return the "Attributes" section of a class: a line of name and type for each field, and its docstring."""
    body = _class_bodies(cls.__module__).get(cls.__qualname__)
    if body is None:
        return ""
    entries: list[str] = []
    for statement, following in zip(body, (*body[1:], None), strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name = statement.target.id
        if name in _field_names(cls):
            heading = f"{name} ({ast.unparse(statement.annotation)})"
            entries.append(_entry(heading, _string(following)))
    return "\n".join(("Attributes:", *entries)) if entries else ""


def _field_names(cls: Any) -> tuple[str, ...]:
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return getattr(cls, "_fields", ())


def _entry(heading: str, text: str | None) -> str:
    if text is None:
        return f"    {heading}"
    paragraphs = inspect.cleandoc(text).split("\n\n")
    wrapped = [textwrap.fill(part, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8) for part in paragraphs]
    return "\n".join((f"    {heading}:", *wrapped))


def _string(statement: ast.stmt | None) -> str | None:
    """Return the text of a statement that is a string and nothing else."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Return the statements of every top-level class of a module by the class's name; empty without a source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    return {statement.name: statement.body for statement in tree.body if isinstance(statement, ast.ClassDef)}
