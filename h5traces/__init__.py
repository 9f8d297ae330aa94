"""The archive for LLM traces: per-layer hidden states and attentions in plain HDF5.

Examples
--------
>>> import h5traces
>>> archive = h5traces.open("batch_0000.h5")            # doctest: +SKIP
>>> archive[0]["hidden_states"][3].shape                # doctest: +SKIP
(43, 4096)

Every name loads its module on first use: ``import h5traces`` itself loads next to nothing.
"""

from typing import TYPE_CHECKING

from h5traces import errors
from h5traces.errors import H5TracesError, __version__
from h5traces.lazy import lazy_names

if TYPE_CHECKING:
    from h5traces import extract, features, fidelity, graph, plotting, torch_data, view
    from h5traces.archive.archive import Archive
    from h5traces.archive.opening import open  # as h5py.File, gzip.open do
    from h5traces.archive.trace import Trace
    from h5traces.checking.collect import collect
    from h5traces.checking.inspect import inspect
    from h5traces.checking.salvage import salvage
    from h5traces.checking.seal import seal
    from h5traces.checking.validate import validate
    from h5traces.checking.verify import verify
    from h5traces.extract.estimate import estimate
    from h5traces.format.precision import Precision
    from h5traces.loading import load
    from h5traces.meaning.checks import CheckOptions
    from h5traces.meaning.options import ReadingOptions
    from h5traces.ranks.status import status
    from h5traces.rewriting.cataloguing import index
    from h5traces.rewriting.convert import convert
    from h5traces.rewriting.export import export
    from h5traces.rewriting.label import label
    from h5traces.rewriting.label_table import LabelOptions
    from h5traces.rewriting.repack import merge, repack, split
    from h5traces.sources.source import TraceSource
    from h5traces.writing.calibrate import calibrate
    from h5traces.writing.create import create
    from h5traces.writing.finish import finish
    from h5traces.writing.options import PrecisionOptions, TargetOptions

__all__ = [
    "Archive",
    "CheckOptions",
    "H5TracesError",
    "LabelOptions",
    "Precision",
    "PrecisionOptions",
    "ReadingOptions",
    "TargetOptions",
    "Trace",
    "TraceSource",
    "__version__",
    "calibrate",
    "collect",
    "convert",
    "create",
    "errors",
    "estimate",
    "export",
    "extract",
    "features",
    "fidelity",
    "finish",
    "graph",
    "index",
    "inspect",
    "label",
    "load",
    "merge",
    "open",
    "plotting",
    "repack",
    "salvage",
    "seal",
    "split",
    "status",
    "torch_data",
    "validate",
    "verify",
    "view",
]

_HOMES = {
    "Archive": "h5traces.archive.archive",
    "LabelOptions": "h5traces.rewriting.label_table",
    "CheckOptions": "h5traces.meaning.checks",
    "Precision": "h5traces.format.precision",
    "PrecisionOptions": "h5traces.writing.options",
    "ReadingOptions": "h5traces.meaning.options",
    "TargetOptions": "h5traces.writing.options",
    "Trace": "h5traces.archive.trace",
    "TraceSource": "h5traces.sources.source",
    "calibrate": "h5traces.writing.calibrate",
    "collect": "h5traces.checking.collect",
    "convert": "h5traces.rewriting.convert",
    "create": "h5traces.writing.create",
    "estimate": "h5traces.extract.estimate",
    "export": "h5traces.rewriting.export",
    "extract": "h5traces.extract",
    "features": "h5traces.features",
    "fidelity": "h5traces.fidelity",
    "finish": "h5traces.writing.finish",
    "graph": "h5traces.graph",
    "index": "h5traces.rewriting.cataloguing",
    "inspect": "h5traces.checking.inspect",
    "label": "h5traces.rewriting.label",
    "load": "h5traces.loading",
    "merge": "h5traces.rewriting.repack",
    "open": "h5traces.archive.opening",
    "plotting": "h5traces.plotting",
    "repack": "h5traces.rewriting.repack",
    "salvage": "h5traces.checking.salvage",
    "seal": "h5traces.checking.seal",
    "split": "h5traces.rewriting.repack",
    "status": "h5traces.ranks.status",
    "torch_data": "h5traces.torch_data",
    "validate": "h5traces.checking.validate",
    "verify": "h5traces.checking.verify",
    "view": "h5traces.view",
}
if not TYPE_CHECKING:  # names that do not exist stay errors of type checkers
    __getattr__, _ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
