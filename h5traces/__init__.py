"""The archive for LLM traces: per-layer hidden states and attentions in plain HDF5.

>>> import h5traces
>>> archive = h5traces.open("batch_0000.h5")            # doctest: +SKIP
>>> archive[0]["hidden_states"][3].shape                # doctest: +SKIP
(43, 4096)
"""

from h5traces.archive import Archive, Trace, load
from h5traces.archive import open_archive as open  # as h5py.File, gzip.open do
from h5traces.calibration import calibrate
from h5traces.check import validate
from h5traces.conversion import convert
from h5traces.integrity import verify
from h5traces.schema import Precision
from h5traces.spooling import create
from h5traces.version import __version__

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
