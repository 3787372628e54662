"""`view()`: one prompt in the browser, its tokens coloured by what they contribute at a chosen layer and head."""

from icl_dual.views.interactive import InteractiveView, view

__all__ = ["InteractiveView", "view"]
