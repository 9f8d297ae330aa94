"""Rows of the footer: all that it says of one sample, as one compressed block.

A row is read and checked by itself, so reading a sample takes the same time and memory in archives
of ten samples and of a million.
"""

from __future__ import annotations

import json
import operator
import re
import struct
import zlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import CorruptArchiveError
from h5traces.format.digests import DIGEST
from h5traces.format.document import compact_json
from h5traces.format.entries import ChunkTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry


class FooterError(CorruptArchiveError):
    """There is no footer, or one that does not fit its file; the HDF5 part may be fine."""


# How many objects, axes, chunks, and bytes of attributes a row has.
COUNTS: Final = struct.Struct("<IIII")
# Column of a row -> dtype, which of the counts is its length, and times what. The attributes of
# the sample follow.
COLUMNS: Final = {
    "object_digest": ("u1", 0, 16),
    "chunk_checksum": ("<u8", 2, 1),
    "chunk_gap": ("<i8", 2, 1),
    "chunk_nbytes": ("<i8", 2, 1),
    "object_dims": ("<i8", 1, 1),
    "object_chunk_dims": ("<i8", 1, 1),
    "object_name": ("<u4", 0, 1),
    "object_attrs": ("<u4", 0, 1),
    "object_num_chunks": ("<u4", 0, 1),
    "object_type": ("<u2", 0, 1),
    "object_codec": ("u1", 0, 1),
    "object_ndim": ("u1", 0, 1),
}
_COLUMNS: Final = tuple((np.dtype(dtype), which, times) for dtype, which, times in COLUMNS.values())
# Bytes of an object, an axis and a chunk in all columns.
_WIDTHS: Final = tuple(
    sum(dtype.itemsize * times for dtype, which, times in _COLUMNS if which == each)
    for each in range(3)
)
_DIGEST: Final = re.compile("[0-9a-f]{32}")
# For an object without a valid digest; an invalid one is stored with the other attributes.
_NO_DIGEST: Final = bytes(16)
_MOST_KNOWN: Final = 4096
_NO_CHUNKS: Final = ChunkTable((), (), ())
# Of arrays, by column.
_CODES: Final = {
    name: "q" if dtype == "<i8" else np.dtype(dtype).char for name, (dtype, _, _) in COLUMNS.items()
}


@dataclass(frozen=True, slots=True, eq=False)
class RowColumns:
    """The columns of one row, as read-only views of its bytes; `COLUMNS` lists them.

    Attributes
    ----------
    axis_ends, chunk_ends
        Where the axes and the chunks of every object begin and end: one entry more than objects.
    chunk_offset
        Offset in the file of every chunk.
    """

    object_digest: NDArray[np.uint8]
    chunk_checksum: NDArray[np.uint64]
    chunk_gap: NDArray[np.int64]
    chunk_nbytes: NDArray[np.int64]
    object_dims: NDArray[np.int64]
    object_chunk_dims: NDArray[np.int64]
    object_name: NDArray[np.uint32]
    object_attrs: NDArray[np.uint32]
    object_num_chunks: NDArray[np.uint32]
    object_type: NDArray[np.uint16]
    object_codec: NDArray[np.uint8]
    object_ndim: NDArray[np.uint8]
    axis_ends: NDArray[np.int64]
    chunk_ends: NDArray[np.int64]
    chunk_offset: NDArray[np.int64]


class FooterRow:
    """All that the footer says of one sample; FooterError where `raw` is not as long as it says."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._counts = COUNTS.unpack_from(raw) if len(raw) >= COUNTS.size else (0, 0, 0, 0)
        objects, axes, chunks, attrs_nbytes = self._counts
        of_object, of_axis, of_chunk = _WIDTHS
        columns_nbytes = of_object * objects + of_axis * axes + of_chunk * chunks
        self._attrs_start = COUNTS.size + columns_nbytes
        if self._attrs_start + attrs_nbytes != len(raw):
            message = (
                f"a row of the index has {len(raw)} bytes, which is not the size of {objects} "
                f"objects with {axes} axes, {chunks} chunks and {attrs_nbytes} bytes of attributes"
            )
            raise FooterError(message)

    @property
    def attrs(self) -> Any:
        """The attributes of the sample, as its JSON says."""
        try:
            return json.loads(self._raw[self._attrs_start :])
        except (ValueError, RecursionError) as error:
            message = f"the index's attributes of a sample are not JSON: {error}"
            raise FooterError(message) from error

    @cached_property
    def columns(self) -> RowColumns:
        """The columns; FooterError where they are not as long as they say."""
        columns: list[Any] = []
        position = COUNTS.size
        for dtype, which, times in _COLUMNS:
            length = self._counts[which] * times
            columns.append(np.frombuffer(self._raw, dtype, length, position))
            position += length * dtype.itemsize
        _, _, gaps, sizes, _, _, _, _, num_chunks, _, _, ndim = columns
        axis_ends, chunk_ends = _ends(ndim), _ends(num_chunks)
        if (axis_ends[-1], chunk_ends[-1]) != self._counts[1:3]:
            message = "the objects of a row of the index have more or fewer axes or chunks than it"
            raise FooterError(message)
        offsets = (gaps + sizes).cumsum() - sizes
        return RowColumns(*(*columns, axis_ends, chunk_ends, offsets))


def _ends(counts: NDArray[Any]) -> NDArray[np.int64]:
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    counts.cumsum(out=ends[1:])
    return ends


def inflate(stored: bytes, raw_nbytes: int, what: str) -> bytes:
    """What a zlib stream holds, if it is exactly as many bytes; else FooterError."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stored, raw_nbytes + 1)
    except zlib.error as error:
        message = f"the index's {what} cannot be inflated: {error}"
        raise FooterError(message) from error
    if len(raw) != raw_nbytes or not inflater.eof or inflater.unused_data:
        message = f"the index's {what} has not the {raw_nbytes} bytes that it claims"
        raise FooterError(message)
    return raw


class Numbers(dict[str, int]):
    """Numbers of texts that repeat, from 0."""

    def __missing__(self, value: str) -> int:
        number = self[value] = len(self)
        return number


class RowPacker:
    """Packs rows; names, attributes, types and codecs get numbers that all rows share."""

    def __init__(self) -> None:
        self.names, self.attrs = Numbers(), Numbers()
        self.types, self.codecs = Numbers(), Numbers()
        # Of attributes but the digest, most of which repeat.
        self._known: dict[tuple[Any, ...], int] = {}

    def _split(self, entry: ObjectEntry) -> tuple[bytes, int]:
        """The digest of an object, and the number of its other attributes."""
        attrs = entry.attrs
        digest = attrs.get(DIGEST)
        if isinstance(digest, str) and _DIGEST.fullmatch(digest):
            attrs = {name: value for name, value in attrs.items() if name != DIGEST}
            stored = bytes.fromhex(digest)
        else:
            stored = _NO_DIGEST
        # Numbers that are equal may be of different types.
        key = (*attrs.items(), *map(type, attrs.values()))
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self.attrs[compact_json(attrs)]
        return stored, self._known[key]

    def pack(self, attrs: Attrs, objects: Iterable[ObjectEntry]) -> bytes:
        """The raw bytes of a row; every dataset must have a chunk table with checksums."""
        entries = list(objects)
        tables = [entry.chunks or _NO_CHUNKS for entry in entries]
        offsets = [offset for table in tables for offset in table.offsets]
        sizes = [size for table in tables for size in table.sizes]
        for entry, table in zip(entries, tables, strict=True):
            if table.offsets and table.checksums is None:
                message = f"{entry.path}: chunks without checksums cannot enter an index"
                raise ValueError(message)
        ends = [0, *map(operator.add, offsets, sizes)]
        digests, others = zip(*map(self._split, entries), strict=True) if entries else ((), ())
        values: dict[str, Iterable[int]] = {
            "chunk_checksum": chain.from_iterable(table.checksums or () for table in tables),
            # Chunks mostly follow one another, so the gaps are mostly zero.
            "chunk_gap": map(operator.sub, offsets, ends),
            "chunk_nbytes": sizes,
            "object_name": [self.names[entry.path] for entry in entries],
            "object_attrs": others,
            "object_num_chunks": [len(table.offsets) for table in tables],
            "object_dims": chain.from_iterable(entry.shape for entry in entries),
            "object_chunk_dims": chain.from_iterable(entry.chunk for entry in entries),
            "object_type": [self.types[entry.dtype] for entry in entries],
            "object_codec": [self.codecs[entry.codec or ""] for entry in entries],
            "object_ndim": [len(entry.shape) for entry in entries],
        }
        columns = {name: array(code, values.get(name, ())) for name, code in _CODES.items()}
        columns["object_digest"].frombytes(b"".join(digests))
        document = encoded_json(attrs)
        counts = (len(columns[each]) for each in ("object_name", "object_dims", "chunk_nbytes"))
        # array() has the native byte order, which is little-endian wherever there are wheels.
        parts = (each.tobytes() for each in columns.values())
        return b"".join([COUNTS.pack(*counts, len(document)), *parts, document])


def encoded_json(value: Any) -> bytes:
    """One line of JSON, lone surrogates as three bytes each."""
    return compact_json(value).encode("utf-8", "surrogatepass")
