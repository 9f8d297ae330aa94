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
from functools import cached_property, lru_cache
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

    Chunks = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]


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
# The first ones, of digests and chunks, are the row's own, and so is that of attributes; the others
# are those of its form.
_NUM_OWN: Final = 4
_FORM: Final = tuple(name for name in COLUMNS if name not in (*list(COLUMNS)[:4], "object_attrs"))
_FORM_COUNTS: Final = struct.Struct("<III")
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


class RowForm:
    """What the rows of many samples share: all columns but those of attributes and chunks.

    Parameters
    ----------
    key
        These columns, as `COLUMNS` has them, after the numbers of objects, axes and chunks;
        FooterError where they contradict each other.

    Attributes
    ----------
    axis_ends, chunk_ends
        Where the axes and the chunks of every object begin and end: one entry more than objects.
    """

    def __init__(self, key: bytes) -> None:
        counts = _FORM_COUNTS.unpack_from(key)
        position = _FORM_COUNTS.size
        self.object_dims: NDArray[np.int64]
        self.object_chunk_dims: NDArray[np.int64]
        self.object_name: NDArray[np.uint32]
        self.object_num_chunks: NDArray[np.uint32]
        self.object_type: NDArray[np.uint16]
        self.object_codec: NDArray[np.uint8]
        self.object_ndim: NDArray[np.uint8]
        for name in _FORM:
            dtype, which, _ = COLUMNS[name]
            column: NDArray[Any] = np.frombuffer(key, dtype, counts[which], position)
            setattr(self, name, column)
            position += column.nbytes
        self.axis_ends, self.chunk_ends = _ends(self.object_ndim), _ends(self.object_num_chunks)
        if (self.axis_ends[-1], self.chunk_ends[-1]) != counts[1:]:
            message = "the objects of a row of the index have more or fewer axes or chunks than it"
            raise FooterError(message)


# Samples of one run have as many forms as lengths.
form_of: Final = lru_cache(maxsize=512)(RowForm)


class FooterRow:
    """All that the footer says of one sample; FooterError where `raw` is not as long as it says.

    Attributes
    ----------
    key
        Differs between rows of different forms.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        counts = COUNTS.unpack_from(raw) if len(raw) >= COUNTS.size else (0, 0, 0, 0)
        objects, axes, chunks, attrs_nbytes = counts
        of_object, of_axis, of_chunk = _WIDTHS
        columns_nbytes = of_object * objects + of_axis * axes + of_chunk * chunks
        self._attrs_start = start = COUNTS.size + columns_nbytes
        if start + attrs_nbytes != len(raw):
            message = (
                f"a row of the index has {len(raw)} bytes, which is not the size of {objects} "
                f"objects with {axes} axes, {chunks} chunks and {attrs_nbytes} bytes of attributes"
            )
            raise FooterError(message)
        self._num_objects, self._num_chunks = objects, chunks
        # Digests, 24 bytes of each chunk, axes and names, then numbers of attributes, and 8 bytes
        # more of each object.
        self._chunks_start = COUNTS.size + 16 * objects
        attrs_stop = start - 8 * objects
        self._attr_places = slice(attrs_stop - 4 * objects, attrs_stop)
        axes_start = self._chunks_start + 24 * chunks
        self.key = b"".join(
            (
                raw[: _FORM_COUNTS.size],
                raw[axes_start : self._attr_places.start],
                raw[attrs_stop:start],
            )
        )
        self._attr_sets: tuple[int, ...] | None = None
        self._chunks: Chunks | None = None
        self._listed: tuple[list[int], list[int], list[int]] | None = None

    @property
    def attrs(self) -> Any:
        """The attributes of the sample, as its JSON says."""
        try:
            return json.loads(self._raw[self._attrs_start :])
        except (ValueError, RecursionError) as error:
            message = f"the index's attributes of a sample are not JSON: {error}"
            raise FooterError(message) from error

    @property
    def form(self) -> RowForm:
        """Its form, which others share; FooterError if it contradicts itself."""
        return form_of(self.key)

    # Not cached properties, which take a lock.

    @property
    def attr_sets(self) -> tuple[int, ...]:
        """Numbers of the attributes of every object."""
        if self._attr_sets is None:
            self._attr_sets = struct.unpack(f"<{self._num_objects}I", self._raw[self._attr_places])
        return self._attr_sets

    @property
    def chunks(self) -> Chunks:
        """Offset in the file, stored size and checksum of every chunk."""
        if self._chunks is None:
            columns: list[Any] = []
            position = self._chunks_start
            for dtype, _, _ in _COLUMNS[1:_NUM_OWN]:
                columns.append(np.frombuffer(self._raw, dtype, self._num_chunks, position))
                position += 8 * self._num_chunks
            checksums, gaps, sizes = columns
            self._chunks = (gaps + sizes).cumsum() - sizes, sizes, checksums
        return self._chunks

    @property
    def listed_chunks(self) -> tuple[list[int], list[int], list[int]]:
        """The same as Python numbers."""
        if self._listed is None:
            offsets, sizes, checksums = self.chunks
            self._listed = offsets.tolist(), sizes.tolist(), checksums.tolist()
        return self._listed

    @cached_property
    def digests(self) -> str:
        """The digests of all objects, in hexadecimal digits; zeros for those without."""
        return self._raw[COUNTS.size : self._chunks_start].hex()

    @cached_property
    def with_digest(self) -> NDArray[np.bool_]:
        """Which objects have a digest here."""
        found = np.frombuffer(self._raw, np.uint8, 16 * self._num_objects, COUNTS.size)
        return np.asarray(found.reshape(-1, 16).any(axis=1))


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
            attrs = dict(attrs)
            del attrs[DIGEST]
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
