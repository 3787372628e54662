"""`view`: an interactive view of one prompt, in Jupyter, as a widget, and as one page that works without a network."""

import base64
import hashlib
import html
import os
import string
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from icl_dual.arguments import checked
from icl_dual.captures.capture import Capture
from icl_dual.decomposition import Decomposition
from icl_dual.field_docs import document_fields
from icl_dual.models import Model
from icl_dual.source_attention import SourceAttention
from icl_dual.sourced_prompts import SourcedPrompt
from icl_dual.storage import atomic_file
from icl_dual.views.encoding import encoded_view, to_json
from icl_dual.views.terms import ViewTerms, decomposition_terms, source_terms

HEIGHT = "min(85vh, 900px)"
"""The height of the frame in a notebook."""
GENERATOR = b'<meta name="generator" content="icl_dual.view">'
"""What the first lines of a view's page say of its origin."""


@checked
@document_fields
@dataclass(frozen=True, repr=False)
class InteractiveView:
    """An interactive view of one prompt. Jupyter shows it; `save` writes it as a page, `widget` makes it a widget."""

    terms: ViewTerms
    """The numbers that the view shows, before they are rounded."""

    @cached_property
    def data(self) -> str:
        """Return what the view shows, as the JSON that its module reads."""
        return to_json(encoded_view(self.terms))

    @property
    def page(self) -> str:
        """Return a whole page that shows the view. It requests nothing: style, module and data are inside of it."""
        style = _file("view.css")
        script = f"{_file('view.js')}\nrenderPage(document);\n"
        return string.Template(_file("page.html")).substitute(
            title=html.escape(self.terms.title).encode("utf-8", "replace").decode(),
            style=style,
            style_hash=_content_hash(style),
            script=script,
            script_hash=_content_hash(script),
            data=self.data,
        )

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the view as one HTML file, which works from the disk without a network.

        Args:
            path: the file to write.

        Returns:
            The path of the file.

        Raises:
            AssetError: the file cannot be written. An earlier one is kept.
        """
        target = Path(path)
        with atomic_file(target) as scratch:
            scratch.write_text(self.page, encoding="utf-8", newline="\n")
        return target

    @checked
    def widget(self, *, layer: int | None = None, head: int | None = None) -> Any:
        """Return the view as an anywidget. Its traits `layer` and `head` are those chosen, and can be set.

        Args:
            layer: the layer to begin with.
            head: the head to begin with.

        Raises:
            ImportError: anywidget is not installed.
        """
        try:
            import anywidget
            import traitlets
        except ImportError as error:
            raise ImportError(
                "expected the package anywidget, which is not installed: pip install 'icl-dual[notebook]', or save the "
                "view as a page"
            ) from error

        class PromptWidget(anywidget.AnyWidget):
            _esm = _file("view.js")
            _css = _file("view.css")
            data = traitlets.Unicode().tag(sync=True)
            layer = traitlets.Int(None, allow_none=True).tag(sync=True)
            head = traitlets.Int(None, allow_none=True).tag(sync=True)

        return PromptWidget(data=self.data, layer=layer, head=head)

    def _repr_html_(self) -> str:
        page = html.escape(self.page)
        return (
            f'<iframe title="{html.escape(self.terms.title)}" sandbox="allow-scripts" srcdoc="{page}" '
            f'style="width: 100%; height: {HEIGHT}; border: 0"></iframe>'
        )

    def __repr__(self) -> str:
        t = self.terms
        return (
            f"InteractiveView({t.title!r}, {len(t.pieces)} tokens, {len(t.layers)} layers of "
            f"{t.quantities[0].values.shape[1]} heads)"
        )


@checked
def view(
    result: Decomposition | SourceAttention,
    query: int = 0,
    *,
    zero_shot: Capture | None = None,
    sources: SourcedPrompt | None = None,
    position: int = -1,
    tokenizer: Model | Any = None,
    title: str | None = None,
) -> InteractiveView:
    """Return an interactive view of one prompt: tokens coloured by what they contribute at a chosen layer and head.

    Of a decomposition, tokens are coloured by their contribution to ΔICL, or by their attention weight. Of a capture by
    source, by their share of the attention output, their attention weight, or their direct effect on each of its
    logits.

    Args:
        result: a decomposition that `decompose` returned, or a capture that `capture_sources` returned. For numbers of
            single tokens, capture `prompt.by_token()`.
        query: the index of the query; of a capture by source, that of the prompt. Negative ones count from the end.
        zero_shot: the zero-shot capture that was decomposed, to show its attention weights beside those in context.
        sources: the prompt with named sources, to sum the tokens of a capture by token over them.
        position: of a capture by source, the index in its `positions` of the position that attends.
        tokenizer: the tokenizer that made the tokens, or the model that has it; needed for decompositions where the
            prompts have none. Of a capture by source, it names the tokens of logits.
        title: the heading; by default the model's name and what prompt it is.

    Returns:
        The view. Jupyter shows it, `save("page.html")` writes it as one page that works without a network, and
        `widget()` makes it a widget.

    Raises:
        IndexError: there is no such query or position.
        ValueError: the decomposition was loaded from a folder and has no keys, or an argument belongs to the other
            kind of result.
        PromptError: there is no tokenizer, or `sources` is another prompt.

    Example:
        >>> import icl_dual
        >>> from icl_dual.models import tiny_model
        >>> model = tiny_model()
        >>> parts = [("document", "The box is red. "), ("question", "Is it?")]
        >>> prompt = icl_dual.prompt_from_parts(parts, model)
        >>> captured = icl_dual.capture_sources(model, prompt.by_token(), progress=False)
        >>> icl_dual.view(captured, sources=prompt)
        InteractiveView('tiny: prompt 0, attention of the token at position 22', 23 tokens, 2 layers of 4 heads)
    """
    if isinstance(result, Decomposition):
        if sources is not None or position != -1:
            raise ValueError(
                "expected sources and position with a SourceAttention only, got a Decomposition: leave them out"
            )
        terms = decomposition_terms(result, query, zero_shot, tokenizer)
    elif zero_shot is not None:
        raise ValueError(
            "expected zero_shot with a Decomposition only, got a SourceAttention: capture the zero-shot prompt, and "
            "view it by itself"
        )
    else:
        terms = source_terms(result, query, position, sources, tokenizer)
    return InteractiveView(terms if title is None else replace(terms, title=title))


@checked
def is_view(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a page that a view's `save` wrote.

    Args:
        path: the file, which has to be there.
    """
    with Path(path).open("rb") as file:
        return GENERATOR in file.read(200)


def _file(name: str) -> str:
    """Return a file of this package."""
    return (files(__package__ or "icl_dual.views") / name).read_text(encoding="utf-8")


def _content_hash(text: str) -> str:
    """Return what a content security policy names an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
