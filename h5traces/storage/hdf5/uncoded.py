"""Datasets of archives that have no codec of the format's: read without HDF5's filters."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from h5py import h5d, h5s

from h5traces.errors import CorruptArchiveError, HostileFileError
from h5traces.storage.arrays import chunk_offsets, chunk_slices
from h5traces.storage.deflate import unshuffle
from h5traces.storage.hdf5.safety import filters_of, stored_chunks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.format.limits import ReadLimits
    from h5traces.storage.codecs import Filter
    from h5traces.storage.files import ByteFile

_DEFLATE: Final = 1
_FLETCHER32: Final = 3
_CHECKSUM_NBYTES: Final = 4
# Stored in the object's header, where a message has at most 64 KiB.
_MAX_COMPACT_NBYTES: Final = 64 << 10


def check_uncoded(
    dataset: h5d.DatasetID, raw_nbytes: int, limits: ReadLimits, file_nbytes: int
) -> None:
    """Reject a dataset of others that is larger than its bytes in the file can hold."""
    options, stored = dataset.get_create_plist(), dataset.get_storage_size()
    kind = options.get_layout()
    if kind != h5d.CHUNKED:
        offset = dataset.get_offset()
        if not raw_nbytes:
            return
        if kind == h5d.COMPACT and stored == raw_nbytes <= _MAX_COMPACT_NBYTES:
            return
        if kind == h5d.CONTIGUOUS and offset is not None and stored == raw_nbytes:
            if offset + raw_nbytes <= file_nbytes:
                return
        message = f"{raw_nbytes} bytes are declared, and not stored in the file"
        raise HostileFileError(message)
    chunk_nbytes = math.prod(options.get_chunk()) * dataset.get_type().get_size()
    if chunk_nbytes > limits.max_chunk_nbytes:
        message = f"chunks take {chunk_nbytes} bytes; the limit is {limits.max_chunk_nbytes}"
        raise HostileFileError(message)
    if stored > file_nbytes:
        message = f"chunks of {stored} bytes in all lie in a file of {file_nbytes}"
        raise HostileFileError(message)
    stored_chunks(dataset, dataset.shape, options.get_chunk(), file_nbytes)


def read_uncoded(dataset: h5d.DatasetID, dtype: np.dtype[Any], file: ByteFile) -> NDArray[Any]:
    """The values of a dataset that `check_uncoded` accepted; `dtype` is that of its bytes."""
    options, shape = dataset.get_create_plist(), dataset.shape
    values = np.empty(shape, dtype=dtype)
    if not values.size:
        return values
    if options.get_layout() == h5d.COMPACT:
        dataset.read(h5s.ALL, h5s.ALL, values, mtype=dataset.get_type())
        return values
    if options.get_layout() == h5d.CONTIGUOUS:
        raw = file.read_at(dataset.get_offset(), values.nbytes)
        return np.frombuffer(raw, dtype=dtype).reshape(shape).copy()
    chunk, filters = options.get_chunk(), filters_of(options, dtype.itemsize)
    nbytes = math.prod(chunk) * dtype.itemsize
    chunks = stored_chunks(dataset, shape, chunk, file.nbytes)
    for offset, info in zip(chunk_offsets(shape, chunk), chunks, strict=True):
        stored = file.read_at(info.byte_offset, info.size)
        raw = _unfiltered(stored, filters, info.filter_mask, nbytes, dtype.itemsize)
        where = chunk_slices(offset, shape, chunk)
        part = np.frombuffer(raw, dtype=dtype).reshape(chunk)
        values[where] = part[tuple(slice(0, each.stop - each.start) for each in where)]
    return values


def _unfiltered(
    stored: bytes, filters: tuple[Filter, ...], mask: int, nbytes: int, itemsize: int
) -> bytes:
    """The `nbytes` raw bytes of a chunk; the mask's bits are of filters that it skipped."""
    for number, each in reversed(list(enumerate(filters))):
        if mask >> number & 1:
            continue
        if each.filter_id == _FLETCHER32:
            stored = _without_checksum(stored)
        elif each.filter_id == _DEFLATE:
            # A checksum that was made before compression is inflated with the data.
            stored = _inflated(stored, nbytes + _CHECKSUM_NBYTES)
        else:
            # Shuffle: `filters_of` lets no other pass.
            out = np.empty(len(stored), dtype=np.uint8)
            unshuffle(np.frombuffer(stored, np.uint8), out, itemsize)
            stored = out.tobytes()
    if len(stored) != nbytes:
        message = f"a chunk holds {len(stored)} bytes, expected {nbytes}"
        raise CorruptArchiveError(message)
    return stored


def _inflated(stored: bytes, most: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stored, most + 1)
    except zlib.error as error:
        message = f"a chunk is not an intact zlib stream: {error}"
        raise CorruptArchiveError(message) from error
    if len(raw) > most or not inflater.eof:
        message = f"a chunk does not inflate to {most} bytes or less"
        raise CorruptArchiveError(message)
    return raw


def _without_checksum(stored: bytes) -> bytes:
    """The bytes before HDF5's fletcher32 checksum, which must be right."""
    data, checksum = stored[:-_CHECKSUM_NBYTES], stored[-_CHECKSUM_NBYTES:]
    words = np.frombuffer(data + bytes(len(data) % 2), dtype=">u2").astype(np.int64)
    weights = np.arange(len(words), 0, -1, dtype=np.int64) % 65535
    low, high = int(words.sum()) % 65535, int((words * weights).sum()) % 65535
    found = int.from_bytes(checksum, "little")
    if (found & 0xFFFF) % 65535 != low or (found >> 16) % 65535 != high:
        message = "a chunk is damaged: its fletcher32 checksum does not fit"
        raise CorruptArchiveError(message)
    return data
