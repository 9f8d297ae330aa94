"""The HDF5 part of an archive; the only package that imports h5py."""

from h5traces.storage.hdf5.plugin_codecs import PLUGIN_CODECS
from h5traces.storage.hdf5.reading import Hdf5Reader, problem_kind
from h5traces.storage.hdf5.writing import Hdf5Writer, text_column

__all__ = ["PLUGIN_CODECS", "Hdf5Reader", "Hdf5Writer", "problem_kind", "text_column"]
