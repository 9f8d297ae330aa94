"""Codecs that only HDF5's filter plugins can run, through a scratch file in memory.

A chunk goes through HDF5's own pipeline, behind HDF5's lock, and comes out as the bytes that any
HDF5 with the plugin reads. Slower than a codec that needs no HDF5; the same interface.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5z

from h5traces.errors import MissingFilterError
from h5traces.storage.codecs import FILTER_SHUFFLE, Filter, register, same_filters
from h5traces.storage.hdf5.types import hdf5_type

if TYPE_CHECKING:
    from collections.abc import Iterator

FILTER_LZ4: Final = 32004
FILTER_BITSHUFFLE: Final = 32008
FILTER_BLOSC2: Final = 32026

_BITSHUFFLE_COMPRESSOR: Final = 4
_BITSHUFFLE_LZ4: Final = 2
_BITSHUFFLE_ZSTD: Final = 3
# blosc2: four reserved values, level, byte shuffle, Zstandard
_BLOSC2_PARAMETERS: Final = (0, 0, 0, 0, 3, 1, 5)


@dataclass(frozen=True, slots=True)
class PluginCodec:
    """A pipeline of HDF5 filters, the last of which comes with hdf5plugin.

    Attributes
    ----------
    name
        Name in metadata and on the command line.
    filter_id, parameters
        The plugin's filter.
    shuffle
        Whether HDF5's byte shuffle goes in front.
    """

    name: str
    filter_id: int
    parameters: tuple[int, ...]
    shuffle: bool

    def pipeline(self, itemsize: int) -> tuple[Filter, ...]:
        """The HDF5 filters."""
        steps = (Filter(FILTER_SHUFFLE, (itemsize,)),) if self.shuffle else ()
        return (*steps, Filter(self.filter_id, self.parameters))

    def accepts(self, filters: tuple[Filter, ...]) -> bool:
        """The same filters, and for bitshuffle the same compressor."""
        if not same_filters(filters, self.pipeline(1)):
            return False
        if self.filter_id != FILTER_BITSHUFFLE:
            return True
        # In a file, bitshuffle puts its version and the sizes of element and block in front.
        found, own = filters[-1].parameters, self.parameters[1]
        return len(found) > _BITSHUFFLE_COMPRESSOR and found[_BITSHUFFLE_COMPRESSOR] == own

    def encode(self, raw: memoryview, itemsize: int) -> bytes:
        """The chunk as HDF5's pipeline stores it.

        Raises
        ------
        MissingFilterError
            The plugin is not installed.
        """
        values = np.frombuffer(raw, dtype=f"<u{itemsize}")
        with self._scratch(len(values), itemsize) as dataset:
            dataset.write(h5s.ALL, h5s.ALL, values)
            dataset.flush()
            filter_mask, stored = dataset.read_direct_chunk((0,))
        if filter_mask:
            message = f"the HDF5 filter {self.filter_id} ({self.name}) refused a chunk"
            raise MissingFilterError(message)
        return bytes(stored)

    def decode(self, stored: memoryview, out: memoryview, itemsize: int) -> None:
        """Undo the pipeline into `out`; ValueError where the bytes are damaged."""
        values = np.frombuffer(out, dtype=f"<u{itemsize}")
        try:
            with self._scratch(len(values), itemsize) as dataset:
                dataset.write_direct_chunk((0,), bytes(stored))
                dataset.read(h5s.ALL, h5s.ALL, values)
        except (OSError, RuntimeError) as error:
            message = f"HDF5's {self.name} filter cannot undo the chunk: {error}"
            raise ValueError(message) from error

    def _scratch(
        self, length: int, itemsize: int
    ) -> contextlib.AbstractContextManager[h5d.DatasetID]:
        return _scratch_dataset(self.name, self.pipeline(itemsize), itemsize, (length,))


@contextlib.contextmanager
def _scratch_dataset(
    codec: str, filters: tuple[Filter, ...], itemsize: int, chunk: tuple[int, ...]
) -> Iterator[h5d.DatasetID]:
    """A dataset of one chunk in a file in memory."""
    options = h5p.create(h5p.DATASET_CREATE)
    options.set_chunk(chunk)
    for each in filters:
        require_filter(each.filter_id, codec)
        options.set_filter(each.filter_id, 0, each.parameters)
    with h5py.File(io.BytesIO(), "w") as file:
        type_id = hdf5_type(f"uint{8 * itemsize}")
        yield h5d.create(file.id, b"chunk", type_id, h5s.create_simple(chunk), options)


def applied_filters(
    codec: str, filters: tuple[Filter, ...], itemsize: int, chunk: tuple[int, ...]
) -> tuple[Filter, ...]:
    """The filters with the parameters that they give themselves for a dataset of these chunks.

    Raises
    ------
    MissingFilterError
        A plugin is not installed.
    """
    with _scratch_dataset(codec, filters, itemsize, chunk) as dataset:
        options = dataset.get_create_plist()
        found = [options.get_filter(number) for number in range(len(filters))]
    return tuple(Filter(number, tuple(parameters)) for number, _, parameters, _ in found)


def require_filter(filter_id: int, name: str) -> None:
    """Make a plugin's filter available.

    Raises
    ------
    MissingFilterError
        hdf5plugin is not installed, or built without it.
    """
    if h5z.filter_avail(filter_id):
        return
    try:
        import hdf5plugin  # noqa: F401  # registers its filters with HDF5
    except ImportError as error:
        message = f"codec {name} needs the HDF5 filter {filter_id}: pip install hdf5plugin"
        raise MissingFilterError(message) from error
    if not h5z.filter_avail(filter_id):
        message = f"codec {name} needs the HDF5 filter {filter_id}, which hdf5plugin lacks here"
        raise MissingFilterError(message)


PLUGIN_CODECS: Final = (
    PluginCodec("lz4", FILTER_LZ4, (0,), shuffle=True),
    PluginCodec("blosc2", FILTER_BLOSC2, _BLOSC2_PARAMETERS, shuffle=False),
    PluginCodec("bitshuffle-lz4", FILTER_BITSHUFFLE, (0, _BITSHUFFLE_LZ4), shuffle=False),
    PluginCodec("bitshuffle-zstd", FILTER_BITSHUFFLE, (0, _BITSHUFFLE_ZSTD, 3), shuffle=False),
)
for _codec in PLUGIN_CODECS:
    register(_codec)
