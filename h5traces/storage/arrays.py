"""Arrays to encoded chunks and back, without HDF5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from h5traces.errors import CorruptArchiveError, HostileFileError
from h5traces.storage import chunks as grid
from h5traces.storage.codecs import get_codec
from h5traces.storage.digests import chunk_checksum
from h5traces.storage.objects import ObjectEntry, carrier_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.limits import ReadLimits
    from h5traces.storage.codecs import Codec
    from h5traces.storage.files import ByteFile


@dataclass(frozen=True, slots=True)
class EncodedArray:
    """A dataset ready to be written.

    Attributes
    ----------
    shape, chunk
        Shape of the dataset and of its chunks.
    codec
        Codec of the chunks.
    chunks
        Stored bytes, in C order of the chunk grid.
    checksums
        xxh3-64 of each chunk.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    codec: str
    chunks: tuple[bytes, ...]
    checksums: tuple[int, ...]


def encode_array(values: NDArray[Any], codec: str) -> EncodedArray:
    """`values` (of a carrier dtype, little-endian) cut into chunks and encoded."""
    encoder, itemsize = get_codec(codec), values.dtype.itemsize
    chunk = grid.chunk_shape(values.shape, itemsize)
    stored = tuple(
        encoder.encode(as_bytes(grid.cut(values, offset, chunk)), itemsize)
        for offset in grid.chunk_offsets(values.shape, chunk)
    )
    checksums = tuple(chunk_checksum(each) for each in stored)
    return EncodedArray(values.shape, chunk, codec, stored, checksums)


def as_bytes(values: NDArray[Any]) -> memoryview:
    """The bytes of a C-contiguous array, as a view."""
    return values.reshape(-1).view(np.uint8).data


def check_sizes(entry: ObjectEntry, limits: ReadLimits, file_nbytes: int) -> None:
    """Refuse an entry whose claims do not fit the file, before anything is allocated for it.

    Raises
    ------
    HostileFileError
        A size exceeds `limits`, or what deflate could have made of it.
    CorruptArchiveError
        The chunk table does not fit the shape, or points outside the file.
    """
    if any(length < 0 for length in entry.shape) or any(length < 1 for length in entry.chunk):
        message = f"shape {entry.shape} with chunks {entry.chunk} is impossible"
        raise CorruptArchiveError(message)
    if entry.raw_nbytes > limits.max_array_nbytes:
        message = f"shape {entry.shape} takes {entry.raw_nbytes} bytes; the limit is "
        msg = f"{message}{limits.max_array_nbytes}"
        raise HostileFileError(msg)
    if entry.chunks is None:
        return
    itemsize = carrier_dtype(entry.dtype).itemsize
    raw_nbytes = int(np.prod(entry.chunk, dtype=object)) * itemsize
    if raw_nbytes > limits.max_chunk_nbytes:
        message = f"chunks {entry.chunk} take {raw_nbytes} bytes; the limit is "
        msg = f"{message}{limits.max_chunk_nbytes}"
        raise HostileFileError(msg)
    expected = grid.num_chunks(entry.shape, entry.chunk)
    if len(entry.chunks.offsets) != expected:
        message = f"{len(entry.chunks.offsets)} chunks are stored, expected {expected}"
        raise CorruptArchiveError(message)
    # Deflate makes at most 1032 of one byte, and never much more of many.
    smallest, largest = raw_nbytes // 1040, raw_nbytes + raw_nbytes // 100 + 1024
    for offset, size in zip(entry.chunks.offsets, entry.chunks.sizes, strict=True):
        if not 0 < offset <= offset + size <= file_nbytes:
            message = f"a chunk lies at {offset} + {size}, outside the file of {file_nbytes} bytes"
            raise CorruptArchiveError(message)
        if not smallest <= size <= largest:
            message = f"a chunk of {size} stored bytes cannot hold {raw_nbytes} raw ones"
            raise HostileFileError(message)


def read_array(file: ByteFile, entry: ObjectEntry, limits: ReadLimits) -> NDArray[Any]:
    """The dataset's values, in its carrier dtype: a new, writable, C-contiguous array.

    Raises
    ------
    CorruptArchiveError
        Sizes, a checksum, or the inflated bytes do not fit.
    """
    check_sizes(entry, limits, file.nbytes)
    if entry.chunks is None or entry.codec is None:
        message = f"{entry.path} cannot be read without the HDF5 library"
        raise CorruptArchiveError(message)
    codec, dtype = get_codec(entry.codec), carrier_dtype(entry.dtype)
    values = np.empty(entry.shape, dtype=dtype)
    offsets = grid.chunk_offsets(entry.shape, entry.chunk)
    for number, offset in enumerate(offsets):
        stored = read_chunk(file, entry, number)
        where = grid.chunk_slices(offset, entry.shape, entry.chunk)
        part = values[where]
        if part.shape == entry.chunk and part.flags.c_contiguous:
            _decode(codec, stored, as_bytes(part), dtype.itemsize, entry.path, number)
        else:
            full = np.empty(entry.chunk, dtype=dtype)
            _decode(codec, stored, as_bytes(full), dtype.itemsize, entry.path, number)
            values[where] = full[tuple(slice(0, length) for length in part.shape)]
    return values


def read_chunk(file: ByteFile, entry: ObjectEntry, number: int) -> bytes:
    """The stored bytes of one chunk, checked against their checksum where there is one.

    Raises
    ------
    CorruptArchiveError
        The checksum does not fit, or the file ends before the chunk does.
    """
    assert entry.chunks is not None
    stored = file.read_at(entry.chunks.offsets[number], entry.chunks.sizes[number])
    expected = entry.chunks.checksums
    if expected is not None and chunk_checksum(stored) != expected[number]:
        message = (
            f"chunk {number} of {entry.path} is damaged: its checksum does not fit; "
            "restore the file from a copy"
        )
        raise CorruptArchiveError(message)
    return stored


def _decode(
    codec: Codec, stored: bytes, out: memoryview, itemsize: int, path: str, number: int
) -> None:
    try:
        codec.decode(memoryview(stored), out, itemsize)
    except ValueError as error:
        message = f"chunk {number} of {path} is damaged: {error}; restore the file from a copy"
        raise CorruptArchiveError(message) from error
