"""Arrays to encoded chunks and back, without HDF5."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from h5traces.errors import CorruptArchiveError, HostileFileError
from h5traces.format.digests import chunk_checksum, dataset_digest, digest_header
from h5traces.format.dtypes import KERNEL_KINDS, count_not_finite
from h5traces.format.entries import ObjectEntry, carrier_dtype, digest_type
from h5traces.format.native import NATIVE
from h5traces.storage.codecs import DEFLATE, GZIP, get_codec
from h5traces.storage.kernels import PLAN, PLAN_CODECS
from h5traces.storage.memory import POOL
from h5traces.storage.plans import MAX_AXES, MOST_RAW_NBYTES, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from h5traces.format.dtypes import TypedArray
    from h5traces.format.entries import ChunkTable
    from h5traces.format.limits import ReadLimits
    from h5traces.storage.files import ByteFile


Shape = tuple[int, ...]
_TARGET_NBYTES: Final = 4 << 20


def chunk_shape(shape: Shape, itemsize: int, target_nbytes: int = _TARGET_NBYTES) -> Shape:
    """The chunk shape for an array: the whole of a small one, else tiles of nearly equal size.

    Axes of length 0 count as 1, since HDF5's chunks have no such axes. A chunk has at most
    `target_nbytes` raw bytes, unless one element is larger.
    """
    if 0 < itemsize * math.prod(shape) <= target_nbytes:
        return shape
    chunk = [max(1, length) for length in shape]
    for axis, length in enumerate(chunk):
        row_nbytes = itemsize * math.prod(chunk[axis + 1 :])
        if length * row_nbytes <= target_nbytes:
            break
        rows = max(1, target_nbytes // row_nbytes)
        num_tiles = math.ceil(length / rows)
        chunk[axis] = math.ceil(length / num_tiles)
        if chunk[axis] > 1:
            break
    return tuple(chunk)


def grid_shape(shape: Shape, chunk: Shape) -> Shape:
    """The number of chunks along every axis."""
    return tuple(math.ceil(length / size) for length, size in zip(shape, chunk, strict=True))


def num_chunks(shape: Shape, chunk: Shape) -> int:
    """The number of chunks of an array."""
    return math.prod(grid_shape(shape, chunk))


def chunk_offsets(shape: Shape, chunk: Shape) -> Iterator[Shape]:
    """Index of the first element of every chunk, in C order of the grid."""
    starts = (range(0, length, size) for length, size in zip(shape, chunk, strict=True))
    return itertools.product(*starts)


def chunk_slices(offset: Shape, shape: Shape, chunk: Shape) -> tuple[slice, ...]:
    """The part of the array that the chunk at `offset` holds."""
    return tuple(
        slice(start, min(start + size, length))
        for start, length, size in zip(offset, shape, chunk, strict=True)
    )


def cut(array: NDArray[Any], offset: Shape, chunk: Shape) -> NDArray[Any]:
    """The chunk at `offset`: C-contiguous and of full size, zeros beyond the array's edge."""
    part = array[chunk_slices(offset, array.shape, chunk)]
    if part.shape == chunk:
        return np.ascontiguousarray(part)
    full = np.zeros(chunk, dtype=array.dtype)
    full[tuple(slice(0, length) for length in part.shape)] = part
    return full


class EncodedArray(NamedTuple):
    """A dataset ready to be written: stored bytes and xxh3-64 of its chunks, in C order."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    codec: str
    chunks: tuple[bytes, ...]
    checksums: tuple[int, ...]


def encode_array(values: NDArray[Any], codec: str) -> EncodedArray:
    """`values` (of a carrier dtype, little-endian) cut into chunks and encoded."""
    chunk = chunk_shape(values.shape, values.dtype.itemsize)
    return _encoded_chunks(values, chunk, codec)


def _encoded_chunks(values: NDArray[Any], chunk: Shape, codec: str) -> EncodedArray:
    encoder, itemsize = get_codec(codec), values.dtype.itemsize
    stored = tuple(
        encoder.encode(as_bytes(cut(values, offset, chunk)), itemsize)
        for offset in chunk_offsets(values.shape, chunk)
    )
    checksums = tuple(chunk_checksum(each) for each in stored)
    return EncodedArray(values.shape, chunk, codec, stored, checksums)


class Storing(NamedTuple):
    """A dataset to write: C-contiguous values of a carrier dtype, their stored type and codec.

    Without a codec, nothing is encoded. NaN and infinite values of `counted` are counted.
    """

    values: NDArray[Any]
    dtype: str
    codec: str | None
    counted: TypedArray | None = None


class Stored(NamedTuple):
    """What a `Storing` became, and its digest; None without a codec.

    ``comes_back`` says whether the stored bytes were decoded and gave the values with their digest.
    """

    encoded: EncodedArray | None
    digest: str
    num_nan: int = 0
    num_inf: int = 0
    comes_back: bool | None = None


def store_arrays(arrays: Sequence[Storing], *, looks_back: bool = False) -> list[Stored]:
    """Encode, digest and count some arrays, in one call of the compiled kernels where they are.

    With `looks_back`, what was encoded is decoded and compared with the array.
    """
    if NATIVE is None:
        stored = [*map(_stored_plainly, arrays)]
    else:
        stored = _stored_by_kernels(arrays, looks_back=looks_back)
    return [*map(_looked_back, arrays, stored)] if looks_back else stored


def _stored_by_kernels(arrays: Sequence[Storing], *, looks_back: bool) -> list[Stored]:
    chunks, items = [], []
    for values, dtype, codec, counted in arrays:
        carrier, shape = values.dtype, values.shape
        chunk = chunk_shape(shape, carrier.itemsize)
        chunks.append(chunk)
        size = _kernel_itemsize(carrier, codec) if chunk == shape else 0
        head = b"" if carrier.kind == "S" else digest_header(dtype, shape)
        kind = -1 if counted is None else KERNEL_KINDS.get(counted.dtype, -1)
        if counted is None or counted.values is values:
            items.append((values, size, head, kind))
            continue
        items.append((values, size, head, -1))
        if kind >= 0:
            items.append((counted.values, 0, b"", kind))
    found = iter(NATIVE.store(tuple(items), looks_back))
    return [_stored(*each, found) for each in zip(arrays, chunks, strict=True)]


def _stored(array: Storing, chunk: Shape, found: Iterator[Any]) -> Stored:
    """Results of the kernels for one array; Python does the rest."""
    values, dtype, codec, counted = array
    data, checksum, digest, num_nan, num_inf, decoded = next(found)
    if counted is not None:
        if counted.dtype not in KERNEL_KINDS:
            num_nan, num_inf = count_not_finite(counted)
        elif counted.values is not values:
            *_, num_nan, num_inf, _ = next(found)
    known = dataset_digest(digest_type(dtype), values) if digest is None else digest.hex()
    encoded = None
    if data is not None and codec is not None:
        encoded = EncodedArray(values.shape, chunk, codec, (data,), (checksum,))
    elif codec is not None:
        encoded = _encoded_chunks(values, chunk, codec)
    comes_back = None if decoded < 0 else bool(decoded)
    return Stored(encoded, known, num_nan, num_inf, comes_back)


def _looked_back(array: Storing, stored: Stored) -> Stored:
    """With ``comes_back``, which the kernels know of what they encoded; the digest is made anew."""
    encoded, values = stored.encoded, array.values
    if encoded is None:
        return stored
    comes_back = stored.comes_back
    if comes_back is None:
        comes_back = all(
            _decodes_to(data, cut(values, offset, encoded.chunk), encoded.codec)
            for data, offset in zip(
                encoded.chunks, chunk_offsets(values.shape, encoded.chunk), strict=True
            )
        )
    comes_back &= dataset_digest(digest_type(array.dtype), values) == stored.digest
    return stored._replace(comes_back=comes_back)


def _decodes_to(stored: bytes, values: NDArray[Any], codec: str) -> bool:
    out = np.empty(values.nbytes, np.uint8)
    try:
        get_codec(codec).decode(memoryview(stored), out.data, values.dtype.itemsize)
    except ValueError:
        return False
    return out.data == as_bytes(values)


def _kernel_itemsize(carrier: np.dtype[Any], codec: str | None) -> int:
    """Of the elements that are shuffled; 0 for what Python encodes."""
    if codec == GZIP.name:
        return carrier.itemsize
    return 1 if codec == DEFLATE.name else 0


def _stored_plainly(array: Storing) -> Stored:
    values, codec = array.values, array.codec
    special = (0, 0) if array.counted is None else count_not_finite(array.counted)
    encoded = None if codec is None else encode_array(values, codec)
    return Stored(encoded, dataset_digest(digest_type(array.dtype), values), *special)


def as_bytes(values: NDArray[Any]) -> memoryview:
    """The bytes of a C-contiguous array, as a view."""
    return values.reshape(-1).view(np.uint8).data


def read_array(file: ByteFile, entry: ObjectEntry, limits: ReadLimits) -> NDArray[Any]:
    """The dataset's values, in its carrier dtype: a new, writable, C-contiguous array."""
    check_sizes(entry, limits, file.nbytes)
    return read_checked_array(file, entry)


def read_checked_array(file: ByteFile, entry: ObjectEntry) -> NDArray[Any]:
    """As `read_array`, for an entry that `check_sizes` has accepted."""
    if entry.chunks is None or entry.codec is None:
        message = f"{entry.path} cannot be read without the HDF5 library"
        raise CorruptArchiveError(message)
    dtype = carrier_dtype(entry.dtype)
    nbytes = math.prod(entry.shape) * dtype.itemsize
    values: NDArray[Any] = np.ndarray(entry.shape, dtype, POOL.array(nbytes).data)
    if not values.size:
        return values
    row = np.zeros(1, PLAN)
    row["raw_nbytes"], row["count"] = (
        math.prod(entry.chunk) * dtype.itemsize,
        math.prod(entry.chunk),
    )
    row["itemsize"], row["codec"] = dtype.itemsize, PLAN_CODECS.index(get_codec(entry.codec).name)
    with file.prefetched(entry.chunks.ranges):
        for number, offset in enumerate(chunk_offsets(entry.shape, entry.chunk)):
            part = values[chunk_slices(offset, entry.shape, entry.chunk)]
            in_place = part.shape == entry.chunk and part.flags.c_contiguous
            full = part if in_place else np.empty(entry.chunk, dtype=dtype)
            row["offset"] = entry.chunks.offsets[number]
            row["nbytes"] = entry.chunks.sizes[number]
            if entry.chunks.checksums is not None:
                row["checksum"], row["is_checked"] = entry.chunks.checksums[number], 1
            try:
                run(file, row, as_bytes(full))
            except ValueError as error:
                raise _damaged(entry, number, str(error)) from error
            if not in_place:
                part[...] = full[tuple(slice(0, length) for length in part.shape)]
    return values


def read_chunk(file: ByteFile, entry: ObjectEntry, number: int) -> bytes:
    """The stored bytes of one chunk, compared with their checksum where there is one."""
    table = entry.chunks
    assert table is not None
    stored = file.read_at(table.offsets[number], table.sizes[number])
    if table.checksums is not None and chunk_checksum(stored) != table.checksums[number]:
        raise _damaged(entry, number, "its checksum does not fit")
    return stored


def _damaged(entry: ObjectEntry, number: int, what: str) -> CorruptArchiveError:
    return CorruptArchiveError(
        f"chunk {number} of {entry.path} is damaged: {what}; restore the file from a copy, or run "
        "'h5traces salvage', which saves the samples that are intact"
    )


def check_sizes(entry: ObjectEntry, limits: ReadLimits, file_nbytes: int) -> None:
    """Reject an entry whose claims do not fit the file, before allocating anything for it."""
    check_shape(entry, limits)
    if entry.chunks is not None:
        check_chunks(entry.chunks, chunk_bounds(entry), file_nbytes)


def check_shape(entry: ObjectEntry, limits: ReadLimits) -> None:
    """The part of `check_sizes` that is about shapes, and how many chunks they make."""
    shape, chunk = entry.shape, entry.chunk
    # HDF5 neither chunks nor filters scalars.
    is_chunked = bool(chunk) or entry.chunks is not None
    has_wrong_axes = len(shape) > MAX_AXES or (is_chunked and not 0 < len(chunk) == len(shape))
    if has_wrong_axes or min(shape, default=0) < 0 or min(chunk, default=1) < 1:
        message = f"shape {shape} with chunks {chunk} is impossible"
        raise CorruptArchiveError(message)
    itemsize = _itemsize(entry.dtype, limits)
    # Axes of length 0 count as 1: indexes still run over the other axes.
    raw_nbytes = math.prod(max(1, length) for length in shape) * itemsize
    if raw_nbytes > limits.max_array_nbytes:
        message = f"shape {shape} takes {raw_nbytes} bytes; the limit is {limits.max_array_nbytes}"
        raise HostileFileError(message)
    if entry.chunks is None:
        return
    chunk_nbytes = math.prod(chunk) * itemsize
    if chunk_nbytes > limits.max_chunk_nbytes:
        limit = limits.max_chunk_nbytes
        message = f"chunks {chunk} take {chunk_nbytes} bytes; the limit is {limit}"
        raise HostileFileError(message)
    expected = num_chunks(shape, chunk)
    table = entry.chunks
    columns = (table.offsets, table.sizes, table.checksums)
    counts = {len(column) for column in columns if column is not None}
    if counts != {expected}:
        message = f"{min(counts)} chunks are stored, expected {expected}"
        raise CorruptArchiveError(message)


class ChunkBounds(NamedTuple):
    """Sizes of a chunk before compression, and the bounds of its stored size."""

    raw_nbytes: int
    smallest: int
    largest: int


def chunk_bounds(entry: ObjectEntry) -> ChunkBounds:
    """The bounds of the chunks of an entry for which `check_shape` holds."""
    raw_nbytes = math.prod(entry.chunk) * carrier_dtype(entry.dtype).itemsize
    most = MOST_RAW_NBYTES.get(entry.codec or "")
    smallest = max(1, raw_nbytes // most) if most else 1
    # Data that no codec can compress grow little.
    return ChunkBounds(raw_nbytes, smallest, raw_nbytes + raw_nbytes // 100 + 1024)


def _itemsize(stored_type: str, limits: ReadLimits) -> int:
    # numpy has no text types of 2 GiB and more.
    if stored_type.startswith("text:") and stored_type[5:].isdecimal():
        width = int(stored_type[5:14])
        if len(stored_type) > 14 or width > limits.max_chunk_nbytes:
            message = f"the type {stored_type[:40]} is larger than {limits.max_chunk_nbytes} bytes"
            raise HostileFileError(message)
    return carrier_dtype(stored_type).itemsize


def check_chunks(table: ChunkTable, bounds: ChunkBounds, file_nbytes: int) -> None:
    """Check that every chunk lies in the file and has a size that its codec can produce."""
    raw_nbytes, smallest, largest = bounds
    for offset, size in zip(table.offsets, table.sizes, strict=True):
        if not 0 < offset <= offset + size <= file_nbytes:
            message = f"a chunk lies at {offset} + {size}, outside the file of {file_nbytes} bytes"
            raise CorruptArchiveError(message)
        if not smallest <= size <= largest:
            message = f"a chunk of {size} stored bytes cannot hold {raw_nbytes} raw ones"
            raise HostileFileError(message)
    if sum(table.sizes) > file_nbytes:
        message = f"chunks of {sum(table.sizes)} bytes in all overlap in a file of {file_nbytes}"
        raise HostileFileError(message)
