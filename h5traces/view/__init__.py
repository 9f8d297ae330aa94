"""Shows archives in a browser: tokens, heat maps, attention; by a local server or static files.

>>> import h5traces
>>> h5traces.view.serve("archives/")                         # doctest: +SKIP
>>> h5traces.view.export_page("archives/", "page/")          # doctest: +SKIP
"""

from h5traces.lazy import lazy_names

__all__ = ["export_page", "serve"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"export_page": "h5traces.view.static", "serve": "h5traces.view.server"},
    extra="view",
)
