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
from h5traces.storage.hdf5.plugin_claims import check_bitshuffle, check_blosc2, check_lz4
from h5traces.storage.hdf5.safety import BUILT_IN_FILTERS, no_plugin_search
from h5traces.storage.hdf5.types import hdf5_type

if TYPE_CHECKING:
    from collections.abc import Iterator

FILTER_LZ4: Final = 32004
FILTER_BITSHUFFLE: Final = 32008
FILTER_BLOSC2: Final = 32026

_BITSHUFFLE_COMPRESSOR: Final = 4
_BITSHUFFLE_LZ4: Final = 2
_BITSHUFFLE_ZSTD: Final = 3
# Of LZ4 behind its input, beside what it copies from there.
_MOST_OVERREAD: Final = 64
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
        self._check_claims(stored, len(out), itemsize)
        values = np.frombuffer(out, dtype=f"<u{itemsize}")
        # LZ4 as the plugins use it reads on behind damaged bytes, until it has its raw ones; behind
        # zeros it never needs more of them than that.
        behind = b"" if self.filter_id == FILTER_BLOSC2 else bytes(len(out) + _MOST_OVERREAD)
        try:
            with self._scratch(len(values), itemsize) as dataset:
                dataset.write_direct_chunk((0,), bytes(stored) + behind)
                dataset.read(h5s.ALL, h5s.ALL, values)
        except (OSError, RuntimeError) as error:
            message = f"HDF5's {self.name} filter cannot undo the chunk: {error}"
            raise ValueError(message) from error

    def _check_claims(self, stored: memoryview, raw_nbytes: int, itemsize: int) -> None:
        if self.filter_id == FILTER_LZ4:
            check_lz4(stored, raw_nbytes)
        elif self.filter_id == FILTER_BITSHUFFLE:
            check_bitshuffle(stored, raw_nbytes, itemsize)
        else:
            check_blosc2(stored, raw_nbytes)

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
    """Make a plugin's filter available, without a look for it on disk.

    Raises
    ------
    MissingFilterError
        hdf5plugin is not installed, or built without it.
    """
    if filter_id in BUILT_IN_FILTERS:
        return
    # HDF5 looks through its plugin folders for a filter that is not registered, and hdf5plugin
    # asks for every filter before it registers its own.
    with no_plugin_search(allowed=False):
        try:
            import hdf5plugin  # noqa: F401  # registers its filters with HDF5
        except ImportError as error:
            message = f"codec {name} needs the HDF5 filter {filter_id}: pip install hdf5plugin"
            raise MissingFilterError(message) from error
        is_registered = h5z.filter_avail(filter_id)
    if not is_registered:
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
