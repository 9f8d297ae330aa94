"""Rows of the footer: all that it says of one sample, as one compressed block.

A row is read and checked by itself, so reading a sample takes the same time and memory in archives
of ten samples and of a million.
"""

from __future__ import annotations

import json
import operator
import struct
import zlib
from array import array
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from h5traces.errors import CorruptArchiveError
from h5traces.format.document import compact_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.forms import ObjectForm, StoredObject

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
# For an object without a valid digest; an invalid one is stored with the other attributes.
_NO_DIGEST: Final = "0" * 32
_MOST_KNOWN: Final = 4096


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


class _FormNumbers(NamedTuple):
    """What the row of an object has of its form, as numbers or in the columns' bytes."""

    dims: bytes
    chunk_dims: bytes
    attrs: int
    type: int
    codec: int
    num_axes: int


class RowPacker:
    """Packs rows; names, attributes, types and codecs get numbers that all rows share."""

    def __init__(self) -> None:
        self.names, self.attrs = Numbers(), Numbers()
        self.types, self.codecs = Numbers(), Numbers()
        self._known: dict[ObjectForm, _FormNumbers] = {}

    def _numbers(self, form: ObjectForm) -> _FormNumbers:
        found = self._known.get(form)
        if found is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            # Without a digest that has its own column.
            attrs = {name: each for name, each in form.attrs.items() if each is not None}
            found = self._known[form] = _FormNumbers(
                array("q", form.shape).tobytes(),
                array("q", form.chunk).tobytes(),
                self.attrs[compact_json(attrs)],
                self.types[form.dtype],
                self.codecs[form.codec or ""],
                len(form.shape),
            )
        return found

    def pack(self, attrs: Attrs, objects: Sequence[StoredObject]) -> bytes:
        """The raw bytes of a row; every dataset must have a chunk table with checksums."""
        tables = [each.chunks for each in objects]
        for each, table in zip(objects, tables, strict=True):
            if table.offsets and table.checksums is None:
                message = f"{each.path}: chunks without checksums cannot enter an index"
                raise ValueError(message)
        offsets = [offset for table in tables for offset in table.offsets]
        sizes = [size for table in tables for size in table.sizes]
        # Chunks mostly follow one another, so the gaps are mostly zero.
        gaps = map(operator.sub, offsets, [0, *map(operator.add, offsets, sizes)])
        checksums = chain.from_iterable(table.checksums or () for table in tables)
        forms = [self._numbers(each.form) for each in objects]
        columns = list(zip(*forms, strict=True)) or [()] * len(_FormNumbers._fields)
        dims, chunk_dims, *numbers = columns
        # In the order of `COLUMNS`; array() has the native byte order, which is little-endian
        # wherever there are wheels.
        parts = (
            bytes.fromhex("".join([each.digest or _NO_DIGEST for each in objects])),
            array("Q", checksums),
            array("q", gaps),
            array("q", sizes),
            *dims,
            *chunk_dims,
            array("I", [self.names[each.path] for each in objects]),
            array("I", numbers[0]),
            array("I", [len(table.offsets) for table in tables]),
            array("H", numbers[1]),
            bytes(numbers[2]),
            bytes(numbers[3]),
        )
        document = encoded_json(attrs)
        counts = len(objects), sum(numbers[3]), len(sizes), len(document)
        return b"".join([COUNTS.pack(*counts), *parts, document])


def encoded_json(value: Any) -> bytes:
    """One line of JSON, lone surrogates as three bytes each."""
    return compact_json(value).encode("utf-8", "surrogatepass")
