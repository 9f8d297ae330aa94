"""The archive for LLM traces: per-layer hidden states and attentions in plain HDF5.

>>> import h5traces
>>> archive = h5traces.open("batch_0000.h5")            # doctest: +SKIP
>>> archive[0]["hidden_states"][3].shape                # doctest: +SKIP
(43, 4096)
"""

from h5traces.archive.archive import Archive
from h5traces.archive.opening import open_archive as open  # as h5py.File, gzip.open do
from h5traces.archive.trace import Trace
from h5traces.checking.validate import validate
from h5traces.checking.verify import verify
from h5traces.errors import __version__
from h5traces.format.precision import Precision
from h5traces.loading import load
from h5traces.rewriting.convert import convert
from h5traces.writing.calibrate import calibrate
from h5traces.writing.create import create

__all__ = [
    "Archive",
    "Precision",
    "Trace",
    "__version__",
    "calibrate",
    "convert",
    "create",
    "load",
    "open",
    "validate",
    "verify",
]
