"""Rows of the footer: all that it says of one sample, as one compressed block.

A row is read and checked by itself, so reading a sample takes the same time and memory in archives
of ten samples and of a million.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import CorruptArchiveError
from h5traces.format.digests import DIGEST
from h5traces.format.document import compact_json

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
        self._attrs_start = COUNTS.size + sum(
            width * count for width, count in zip(_WIDTHS, self._counts, strict=False)
        )
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
            message = f"the index's attributes of a sample are no JSON: {error}"
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
        offsets = np.cumsum(gaps + sizes) - sizes
        return RowColumns(*(*columns, axis_ends, chunk_ends, offsets))


def _ends(counts: NDArray[Any]) -> NDArray[np.int64]:
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ends[1:])
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

    def pack(self, attrs: Attrs, objects: Iterable[ObjectEntry]) -> bytes:
        """The raw bytes of a row; every dataset must have a chunk table with checksums."""
        columns: dict[str, array[int]] = {
            name: array("q" if dtype == "<i8" else np.dtype(dtype).char)
            for name, (dtype, _, _) in COLUMNS.items()
        }
        next_offset = 0
        for entry in objects:
            digest = entry.attrs.get(DIGEST)
            has_digest = isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None
            others = {
                name: value
                for name, value in entry.attrs.items()
                if name != DIGEST or not has_digest
            }
            columns["object_digest"].frombytes(
                bytes.fromhex(str(digest)) if has_digest else _NO_DIGEST
            )
            columns["object_name"].append(self.names[entry.path])
            columns["object_attrs"].append(self.attrs[compact_json(others)])
            columns["object_type"].append(self.types[entry.dtype])
            columns["object_codec"].append(self.codecs[entry.codec or ""])
            columns["object_ndim"].append(len(entry.shape))
            columns["object_dims"].extend(entry.shape)
            columns["object_chunk_dims"].extend(entry.chunk)
            table = entry.chunks
            columns["object_num_chunks"].append(len(table.offsets) if table else 0)
            if table is None or not table.offsets:
                continue
            if table.checksums is None:
                message = f"{entry.path}: chunks without checksums cannot enter an index"
                raise ValueError(message)
            columns["chunk_checksum"].extend(table.checksums)
            columns["chunk_nbytes"].extend(table.sizes)
            for offset, size in zip(table.offsets, table.sizes, strict=True):
                # Chunks mostly follow one another, so the gaps are mostly zero.
                columns["chunk_gap"].append(offset - next_offset)
                next_offset = offset + size
        document = encoded_json(attrs)
        counts = (len(columns[each]) for each in ("object_name", "object_dims", "chunk_nbytes"))
        # array() has the native byte order, which is little-endian wherever there are wheels.
        parts = (each.tobytes() for each in columns.values())
        return b"".join([COUNTS.pack(*counts, len(document)), *parts, document])


def encoded_json(value: Any) -> bytes:
    """One line of JSON, lone surrogates as three bytes each."""
    return compact_json(value).encode("utf-8", "surrogatepass")
