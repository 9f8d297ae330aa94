"""Conversions and extractions as tasks of Ray, and a sink of Ray Data that writes archives.

Examples
--------
>>> import h5traces.ray                                               # doctest: +SKIP
>>> reports = h5traces.ray.convert("traces/", "archives/")            # doctest: +SKIP
>>> dataset.write_datasink(h5traces.ray.ArchiveSink("archives/"))     # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from h5traces.lazy import lazy_names

if TYPE_CHECKING:
    from h5traces.ray.sink import ArchiveSink
    from h5traces.ray.tasks import convert, extract

__all__ = ["ArchiveSink", "convert", "extract"]

_HOMES = {
    "ArchiveSink": "h5traces.ray.sink",
    "convert": "h5traces.ray.tasks",
    "extract": "h5traces.ray.tasks",
}
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES, extra="ray")
