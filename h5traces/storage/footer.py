"""The footer: an index that makes an archive readable without HDF5, after the end of its HDF5 part.

It is derived from the HDF5 part and only makes reading fast. HDF5 ignores bytes after its own end
when it reads, and truncates them when it opens a file for writing, so an edited file loses its
index. A footer whose magic, checksums or sizes do not fit is not used. Users read of it as the
index. Layout, little-endian::

    columns     one compressed block each
    directory   zlib-compressed JSON: archive attributes, kinds, where the columns lie
    trailer     64 bytes: sizes, checksums, version, magic
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from h5traces.errors import CorruptArchiveError
from h5traces.format import layout
from h5traces.format.digests import DIGEST, chunk_checksum
from h5traces.format.document import Attrs, compact_json
from h5traces.format.limits import Scratch
from h5traces.storage import deflate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry
    from h5traces.storage.files import ByteFile
    from h5traces.storage.publish import LatchedFile


MAGIC: Final = b"h5tr\r\nF1"
VERSION: Final = 1
# directory offset, stored and raw size; size of the HDF5 part; directory checksum; version; zero
TRAILER: Final = struct.Struct("<QQQQQII")
TRAILER_END: Final = struct.Struct("<Q8s")
TRAILER_NBYTES: Final = TRAILER.size + TRAILER_END.size
# One read of this size gets trailer and directory of nearly every archive.
_TAIL_NBYTES: Final = 64 << 10
# The footer repeats what the HDF5 part says, so it cannot be much larger. JSON may take six bytes
# for one byte there, and every object has a digest and numbers.
_MOST_PER_HDF5_BYTE: Final = 8
_BLOCK_NBYTES: Final = 1 << 20
_SUPERBLOCK: Final = struct.Struct("<8sBBBBQQQQ")
# Column name -> dtype. "…_json" columns are documents; "sample_attrs" is all samples' JSON joined.
COLUMNS: Final = {
    "sample_num_objects": "<u4",
    "sample_attrs_nbytes": "<u4",
    "sample_attrs": "u1",
    "object_name": "<u4",
    "object_attrs": "<u4",
    "object_type": "<u2",
    "object_codec": "u1",
    "object_ndim": "u1",
    "object_dims": "<i8",
    "object_chunk_dims": "<i8",
    "object_num_chunks": "<u4",
    "object_digest": "u1",
    "chunk_gap": "<i8",
    "chunk_nbytes": "<i8",
    "chunk_checksum": "<u8",
    "names_json": "u1",
    "attrs_json": "u1",
}
_DIGEST: Final = re.compile("[0-9a-f]{32}")
# For an object without a valid digest; an invalid one is stored with the other attributes.
_NO_DIGEST: Final = bytes(16)
# Small enough to stay in a core's cache between reading and hashing.
SPAN_NBYTES: Final = 1 << 20
# Spans of one task of a thread: starting a task takes as long as hashing 300 kB.
_SPANS_PER_TASK: Final = 16
_BETWEEN: Final = -1
# For the span that a thread reads.
_SPAN: Final = Scratch()


class FooterError(CorruptArchiveError):
    """There is no footer, or one that does not fit its file; the HDF5 part may be fine."""


@dataclass(frozen=True, slots=True)
class _Column:
    """Where a column lies, relative to the start of the footer, and its checksum."""

    offset: int
    nbytes: int
    raw_nbytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class FooterDirectory:
    """What opening an archive reads of its footer."""

    # also the offset of the footer
    hdf5_nbytes: int
    # xxh3-64 of all bytes of the HDF5 part that lie in no chunk
    metadata_checksum: int
    # attributes of the root group and of the groups under /kinds
    archive: Attrs
    kinds: dict[str, Attrs]
    num_samples: int
    num_objects: int
    # The tables list the objects of /scales after those of the last sample.
    has_scales: bool
    # The HDF5 part holds objects or attributes that are not the format's, which no table lists.
    has_foreign: bool
    # by number
    types: list[str]
    codecs: list[str]
    columns: dict[str, _Column]


def read_directory(file: ByteFile) -> FooterDirectory:
    """The directory of the footer of an open file."""
    file_nbytes = file.nbytes
    tail_start = max(0, file_nbytes - _TAIL_NBYTES)
    if not file.at_hand(tail_start, file_nbytes - tail_start):
        # The trailer says how much to request.
        tail_start = max(0, file_nbytes - TRAILER_NBYTES)
    tail = file.read_at(tail_start, file_nbytes - tail_start)
    if len(tail) < TRAILER_NBYTES or tail[-len(MAGIC) :] != MAGIC:
        message = "the file has no index"
        raise FooterError(message)
    head = tail[-TRAILER_NBYTES : -TRAILER_END.size]
    (trailer_checksum, _) = TRAILER_END.unpack(tail[-TRAILER_END.size :])
    if xxhash.xxh3_64_intdigest(head) != trailer_checksum:
        message = "the index's trailer is damaged: its checksum does not fit"
        raise FooterError(message)
    offset, nbytes, raw_nbytes, hdf5_nbytes, checksum, version, _ = TRAILER.unpack(head)
    if version != VERSION:
        message = f"the index has version {version}, this release reads {VERSION}"
        raise FooterError(message)
    if hdf5_nbytes + offset + nbytes + TRAILER_NBYTES != file_nbytes:
        message = (
            f"the index describes a file of {hdf5_nbytes + offset + nbytes + TRAILER_NBYTES} "
            f"bytes, but the file has {file_nbytes}"
        )
        raise FooterError(message)
    # On a server this is left to the checksums: every byte that the footer points to has one.
    end_of_hdf5 = hdf5_end(file) if file.at_hand(0, _SUPERBLOCK.size) else hdf5_nbytes
    if end_of_hdf5 != hdf5_nbytes:
        message = f"the index belongs to {hdf5_nbytes} bytes of HDF5, the file has {end_of_hdf5}"
        raise FooterError(message)
    file.hold(hdf5_nbytes, file_nbytes - hdf5_nbytes)
    start = hdf5_nbytes + offset - tail_start
    stored = (
        tail[start : start + nbytes] if start >= 0 else file.read_at(hdf5_nbytes + offset, nbytes)
    )
    if xxhash.xxh3_64_intdigest(stored) != checksum:
        message = "the index's directory is damaged: its checksum does not fit"
        raise FooterError(message)
    return _parse_directory(_inflate(stored, raw_nbytes, hdf5_nbytes), hdf5_nbytes)


def hdf5_end(file: ByteFile) -> int:
    """End of the HDF5 part by its own superblock."""
    block = file.read_at(0, min(file.nbytes, _SUPERBLOCK.size))
    if len(block) < _SUPERBLOCK.size or not block.startswith(layout.HDF5_SIGNATURE):
        message = "the file does not begin with HDF5's signature"
        raise FooterError(message)
    _, version, offset_nbytes, length_nbytes, flags, base, _, end, _ = _SUPERBLOCK.unpack(block)
    if version not in (2, 3) or (offset_nbytes, length_nbytes) != (8, 8):
        message = (
            f"the HDF5 superblock has version {version}, archives have 2 or 3; 'h5repack -L' makes "
            "such a file"
        )
        raise FooterError(message)
    if flags:
        # HDF5 truncates at its first flush, not on opening: until then the footer is there.
        message = "the file is open for writing, or a program crashed that had it open"
        raise FooterError(message)
    return int(base + end)


def _inflate(stored: bytes, raw_nbytes: int, hdf5_nbytes: int) -> bytes:
    if raw_nbytes > _MOST_PER_HDF5_BYTE * hdf5_nbytes:
        message = f"the index's directory claims {raw_nbytes} bytes"
        raise FooterError(message)
    try:
        raw = zlib.decompressobj().decompress(stored, raw_nbytes + 1)
    except zlib.error as error:
        message = f"the index's directory cannot be inflated: {error}"
        raise FooterError(message) from error
    if len(raw) != raw_nbytes:
        message = f"the index's directory has {len(raw)} bytes, expected {raw_nbytes}"
        raise FooterError(message)
    return raw


def _parse_directory(raw: bytes, hdf5_nbytes: int) -> FooterDirectory:
    try:
        document = json.loads(raw)
        return FooterDirectory(
            hdf5_nbytes=hdf5_nbytes,
            metadata_checksum=int(document["metadata_checksum"]),
            archive=attrs_from_json(document["archive"]),
            kinds={name: attrs_from_json(each) for name, each in document["kinds"].items()},
            num_samples=_count(document["num_samples"], hdf5_nbytes),
            num_objects=_count(document["num_objects"], hdf5_nbytes),
            has_scales=bool(_count(document.get("has_scales", 0), 1)),
            has_foreign=bool(_count(document.get("has_foreign", 0), 1)),
            types=[str(each) for each in document["types"]],
            codecs=[str(each) for each in document["codecs"]],
            columns={
                name: _Column(*(int(part) for part in parts))
                for name, parts in document["columns"].items()
                if name in COLUMNS
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        message = f"the index's directory is no directory: {error!r}"
        raise FooterError(message) from error
    except RecursionError as error:
        message = "the index's directory is nested too deeply"
        raise FooterError(message) from error


def _count(value: Any, most: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        message = f"expected a number from 0 to {most}"
        raise ValueError(message)
    return value


def attrs_from_json(document: dict[str, Any]) -> Attrs:
    """The attributes that a JSON object of the footer holds; ValueError where it holds others."""
    attrs: Attrs = {}
    for name, value in document.items():
        found = tuple(value) if isinstance(value, list) else value
        parts = found if isinstance(found, tuple) else (found,)
        kinds = int if isinstance(found, tuple) else (str, int, float)
        if not all(isinstance(part, kinds) for part in parts):
            message = f"the attribute {name!r} is neither text, nor a number, nor a list of them"
            raise ValueError(message)
        attrs[name] = found
    return attrs


class FooterTables:
    """The footer's columns, each read and checked when it is first needed."""

    def __init__(self, file: ByteFile, directory: FooterDirectory) -> None:
        self._file = file
        self._directory = directory
        self._loaded: dict[str, NDArray[Any]] = {}

    def column(self, name: str) -> NDArray[Any]:
        """A column as a read-only array."""
        loaded = self._loaded.get(name)
        if loaded is None:
            loaded = self._loaded[name] = self._read(name)
        return loaded

    def document(self, name: str) -> Any:
        """A column that holds JSON."""
        try:
            return json.loads(self.column(name).tobytes())
        except (ValueError, RecursionError) as error:
            message = f"the index's column {name} is no JSON: {error}"
            raise FooterError(message) from error

    def _read(self, name: str) -> NDArray[Any]:
        where = self._directory.columns.get(name)
        dtype = np.dtype(COLUMNS[name])
        if where is None or where.raw_nbytes < 0 or where.raw_nbytes % dtype.itemsize:
            message = f"the index's column {name} is missing or of a wrong size"
            raise FooterError(message)
        # Deflate cannot do better than 1032:1: more is claimed only to make readers allocate it.
        most = min(1100 * where.nbytes + 64, _MOST_PER_HDF5_BYTE * self._directory.hdf5_nbytes)
        if where.raw_nbytes > most or min(where.offset, where.nbytes) < 0:
            message = f"the index's column {name} claims {where.raw_nbytes} bytes"
            raise FooterError(message)
        start = self._directory.hdf5_nbytes + where.offset
        if start + where.nbytes > self._file.nbytes:
            message = f"the index's column {name} lies outside of the file"
            raise FooterError(message)
        stored = self._file.read_at(start, where.nbytes)
        if xxhash.xxh3_64_intdigest(stored) != where.checksum:
            message = f"the index's column {name} is damaged: its checksum does not fit"
            raise FooterError(message)
        values = np.empty(where.raw_nbytes // dtype.itemsize, dtype=dtype)
        try:
            deflate.decode(stored, values.view(np.uint8).data, itemsize=dtype.itemsize)
        except ValueError as error:
            message = f"the index's column {name} cannot be inflated: {error}"
            raise FooterError(message) from error
        values.flags.writeable = False
        return values


class FooterBuilder:
    """Builds a footer, sample by sample, in compact columns."""

    def __init__(self) -> None:
        self.num_samples = 0
        # Numbers for values that repeat.
        self._names: dict[str, int] = {}
        self._attrs: dict[str, int] = {}
        self._types: dict[str, int] = {}
        self._codecs: dict[str, int] = {}
        self._columns: dict[str, array[int]] = {
            name: array(np.dtype(dtype).char if dtype != "<i8" else "q")
            for name, dtype in COLUMNS.items()
            if not name.endswith("_json")
        }
        self._next_offset = 0
        self._has_scales = False
        # Whether the HDF5 part holds what is not the format's.
        self.has_foreign = False

    def add_sample(self, attrs: Attrs, objects: Iterable[ObjectEntry]) -> None:
        """Append a sample; every dataset must have a chunk table with checksums."""
        self._add_group(attrs, objects)
        self.num_samples += 1

    def add_scales(self, objects: Iterable[ObjectEntry]) -> None:
        """Append the scales, after all samples; paths begin at the root group."""
        self._add_group({}, objects)
        self._has_scales = True

    def _add_group(self, attrs: Attrs, objects: Iterable[ObjectEntry]) -> None:
        columns, num_objects = self._columns, 0
        for entry in objects:
            self._add_object(entry)
            num_objects += 1
        columns["sample_num_objects"].append(num_objects)
        document = compact_json(attrs).encode("utf-8", "surrogatepass")
        columns["sample_attrs_nbytes"].append(len(document))
        columns["sample_attrs"].frombytes(document)

    def _add_object(self, entry: ObjectEntry) -> None:
        columns = self._columns
        digest = entry.attrs.get(DIGEST)
        has_digest = isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None
        others = {
            name: value for name, value in entry.attrs.items() if name != DIGEST or not has_digest
        }
        columns["object_name"].append(_number(self._names, entry.path))
        columns["object_attrs"].append(_number(self._attrs, compact_json(others)))
        columns["object_type"].append(_number(self._types, entry.dtype))
        columns["object_codec"].append(_number(self._codecs, entry.codec or ""))
        columns["object_ndim"].append(len(entry.shape))
        columns["object_dims"].extend(entry.shape)
        columns["object_chunk_dims"].extend(entry.chunk)
        columns["object_digest"].frombytes(bytes.fromhex(str(digest)) if has_digest else _NO_DIGEST)
        offsets = entry.chunks.offsets if entry.chunks else ()
        columns["object_num_chunks"].append(len(offsets))
        if entry.chunks is None or not offsets:
            return
        if entry.chunks.checksums is None:
            message = f"{entry.path}: chunks without checksums cannot enter an index"
            raise ValueError(message)
        for offset, size in zip(offsets, entry.chunks.sizes, strict=True):
            # Chunks mostly follow one another, so the gaps are mostly zero.
            columns["chunk_gap"].append(offset - self._next_offset)
            columns["chunk_nbytes"].append(size)
            self._next_offset = offset + size
        columns["chunk_checksum"].extend(entry.chunks.checksums)

    def finish(
        self, hdf5: ByteFile | LatchedFile, archive: Attrs, kinds: dict[str, Attrs]
    ) -> bytes:
        """The footer's bytes, to be appended to the finished HDF5 part."""
        sizes = np.frombuffer(self._columns["chunk_nbytes"], dtype=np.int64)
        gaps = np.frombuffer(self._columns["chunk_gap"], dtype=np.int64)
        offsets = np.cumsum(gaps + sizes) - sizes
        blocks: list[bytes] = []
        table: dict[str, tuple[int, int, int, int]] = {}
        position = 0
        for name, dtype in COLUMNS.items():
            raw = self._column_bytes(name)
            stored = deflate.encode(raw, itemsize=np.dtype(dtype).itemsize)
            table[name] = (position, len(stored), len(raw), xxhash.xxh3_64_intdigest(stored))
            blocks.append(stored)
            position += len(stored)
        directory = compact_json(
            {
                "archive": archive,
                "kinds": kinds,
                "num_samples": self.num_samples,
                "num_objects": len(self._columns["object_name"]),
                **({"has_scales": 1} if self._has_scales else {}),
                **({"has_foreign": 1} if self.has_foreign else {}),
                "types": list(self._types),
                "codecs": list(self._codecs),
                "columns": table,
                "metadata_checksum": metadata_checksum(hdf5, offsets, sizes, hdf5.nbytes),
            }
        ).encode("utf-8", "surrogatepass")
        stored = zlib.compress(directory, 6)
        checksum = xxhash.xxh3_64_intdigest(stored)
        head = TRAILER.pack(
            position, len(stored), len(directory), hdf5.nbytes, checksum, VERSION, 0
        )
        tail = TRAILER_END.pack(xxhash.xxh3_64_intdigest(head), MAGIC)
        return b"".join([*blocks, stored, head, tail])

    def _column_bytes(self, name: str) -> bytes:
        if name == "names_json":
            return compact_json(list(self._names)).encode("utf-8", "surrogatepass")
        if name == "attrs_json":
            return f"[{','.join(self._attrs)}]".encode("utf-8", "surrogatepass")
        # array() has the native byte order, which is little-endian wherever there are wheels.
        return self._columns[name].tobytes()


def _number(numbers: dict[str, int], value: str) -> int:
    return numbers.setdefault(value, len(numbers))


def metadata_checksum(
    file: ByteFile | LatchedFile, offsets: NDArray[np.int64], sizes: NDArray[np.int64], end: int
) -> int:
    """xxh3-64 of the bytes up to `end` that lie in no chunk, in the order of the file.

    With the checksums of the chunks, it covers every byte of the HDF5 part.
    """
    order = np.argsort(offsets, kind="stable")
    starts, stops = offsets[order], offsets[order] + sizes[order]
    state, position = xxhash.xxh3_64(), 0
    for start, stop in zip([*starts.tolist(), end], [*stops.tolist(), end], strict=True):
        while position < start:
            block = file.read_at(position, min(_BLOCK_NBYTES, start - position))
            state.update(block)
            position += len(block)
        position = max(position, stop)
    return state.intdigest()


@dataclass(frozen=True, slots=True)
class Scan:
    """Result of comparing all bytes of a file with checksums."""

    # rows of the chunk table whose bytes do not fit their checksum, or lie outside, ascending
    damaged: list[int]
    # xxh3-64 of the bytes that lie in no chunk
    metadata_checksum: int


def scan(
    file: ByteFile,
    table: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]],
    end: int,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Compare all bytes up to `end` with checksums.

    `table` has offset, size and xxh3-64 of every chunk. `progress` is called with the bytes read
    and the bytes there are.
    """
    offsets, sizes, checksums = table
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= end) & (offsets <= end - sizes)
    damaged = np.flatnonzero(~inside).tolist()
    rows = np.flatnonzero(inside)
    rows = rows[np.argsort(offsets[rows], kind="stable")]
    places = zip(rows.tolist(), offsets[rows].tolist(), sizes[rows].tolist(), strict=True)
    between = xxhash.xxh3_64()
    spans = list(_spans(places, end))
    starts = range(0, len(spans), _SPANS_PER_TASK)

    def check(start: int) -> list[tuple[list[int], bytes]]:
        task = spans[start : start + _SPANS_PER_TASK]
        return [_check(file, span, checksums) for span in task]

    with ThreadPoolExecutor(workers) as pool:
        for start, results in zip(starts, pool.map(check, starts), strict=True):
            for found, more in results:
                damaged += found
                between.update(more)
            if progress is not None:
                progress(spans[: start + _SPANS_PER_TASK][-1].stop, end)
    return Scan(sorted(damaged), between.intdigest())


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of the file."""

    start: int
    stop: int
    # in order: a row of the chunk table (or `_BETWEEN`), start and stop
    pieces: list[tuple[int, int, int]]


def _spans(places: Iterator[tuple[int, int, int]], end: int) -> Iterator[_Span]:
    """The file from its start to `end` in spans; a chunk is never cut."""
    pieces: list[tuple[int, int, int]] = []
    start = position = 0
    for row, offset, nbytes in (*places, (_BETWEEN, end, 0)):
        while position < offset:
            stop = min(offset, position + SPAN_NBYTES)
            pieces.append((_BETWEEN, position, stop))
            position = stop
            if position - start >= SPAN_NBYTES:
                yield _Span(start, position, pieces)
                pieces, start = [], position
        if offset < start:
            # It begins in an earlier span, in damaged or handmade files only.
            yield _Span(offset, offset + nbytes, [(row, offset, offset + nbytes)])
            continue
        pieces.append((row, offset, offset + nbytes))
        position = max(position, offset + nbytes)
        if position - start >= SPAN_NBYTES:
            yield _Span(start, position, pieces)
            pieces, start = [], position
    if pieces:
        yield _Span(start, position, pieces)


def _check(file: ByteFile, span: _Span, checksums: NDArray[np.uint64]) -> tuple[list[int], bytes]:
    """Rows of a span that are damaged, and its bytes that lie in no chunk."""
    view = _SPAN.take(span.stop - span.start).data
    file.read_into(span.start, view)
    damaged, between = [], []
    for row, start, stop in span.pieces:
        piece = view[start - span.start : stop - span.start]
        if row == _BETWEEN:
            between.append(bytes(piece))
        elif chunk_checksum(piece) != int(checksums[row]):
            damaged.append(row)
    return damaged, b"".join(between)
