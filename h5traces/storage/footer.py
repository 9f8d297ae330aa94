"""The footer: an index that makes an archive readable without HDF5, after the end of its HDF5 part.

It is derived from the HDF5 part and only makes reading fast. HDF5 ignores bytes after its own end
when it reads, and truncates them when it opens a file for writing, so an edited file loses its
index. A footer whose magic, checksums or sizes do not fit is not used. Users read of it as the
index. Layout, little-endian::

    groups      rows of 1,000 samples each, after a table of their sizes and checksums
    columns     zlib-compressed JSON: what all rows share, and the ids of the samples
    directory   zlib-compressed JSON: archive attributes, kinds, where groups and columns lie
    trailer     64 bytes: sizes, checksums, version, magic
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from h5traces.format import layout
from h5traces.storage.footer_rows import (
    FooterError,
    FooterRow,
    RowPacker,
    encoded_json,
    inflate,
)
from h5traces.storage.scanning import metadata_checksum

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.forms import StoredObject
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
_SMALL_NBYTES: Final = 1 << 20
# The footer repeats what the HDF5 part says, so it cannot be much larger. JSON may take six bytes
# for one byte there, and every object has a digest and numbers.
_MOST_PER_HDF5_BYTE: Final = 8
# Rows are mostly noise, which higher levels make no smaller.
_LEVEL: Final = 3
_SUPERBLOCK: Final = struct.Struct("<8sBBBBQQQQ")
# All groups but the last have this many rows.
GROUP_ROWS: Final = 1000
# Of a row: stored and raw size, xxh3-64 of the stored bytes.
ROW_PLACE: Final = np.dtype([("nbytes", "<u4"), ("raw_nbytes", "<u4"), ("checksum", "<u8")])
COLUMNS: Final = ("ids", "names", "attrs")
# Tables of groups that stay in memory, 16 kB each.
_TABLES_KEPT: Final = 64
# Rows that are read at a time where all are, and what a writer keeps of them in memory.
_READ_NBYTES: Final = 1 << 20
_KEPT_NBYTES: Final = 4 << 20


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
    # The row after that of the last sample lists the objects of /scales.
    has_scales: bool
    # The HDF5 part holds objects or attributes that are not the format's, which no row lists.
    has_foreign: bool
    # by number
    types: list[str]
    codecs: list[str]
    # Where every group begins, relative to the start of the footer, and where the last one ends.
    group_starts: list[int]
    # xxh3-64 of the tables of the groups
    group_checksums: list[int]
    columns: dict[str, _Column]

    @property
    def num_rows(self) -> int:
        """Samples, and the scales."""
        return self.num_samples + self.has_scales


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
    # On a server, requests take longer than the bytes of a small footer.
    is_small = file_nbytes - hdf5_nbytes <= _SMALL_NBYTES
    first = hdf5_nbytes if is_small else hdf5_nbytes + offset
    file.hold(first, file_nbytes - first)
    start = hdf5_nbytes + offset - tail_start
    stored = (
        tail[start : start + nbytes] if start >= 0 else file.read_at(hdf5_nbytes + offset, nbytes)
    )
    if xxhash.xxh3_64_intdigest(stored) != checksum:
        message = "the index's directory is damaged: its checksum does not fit"
        raise FooterError(message)
    if raw_nbytes > _MOST_PER_HDF5_BYTE * hdf5_nbytes:
        message = f"the index's directory claims {raw_nbytes} bytes"
        raise FooterError(message)
    return _parse_directory(inflate(stored, raw_nbytes, "directory"), hdf5_nbytes, offset)


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


def _parse_directory(raw: bytes, hdf5_nbytes: int, body_nbytes: int) -> FooterDirectory:
    try:
        document = json.loads(raw)
        groups = [(int(nbytes), int(checksum)) for nbytes, checksum in document["groups"]]
        starts = [0]
        for nbytes, _ in groups:
            starts.append(starts[-1] + _count(nbytes, body_nbytes - starts[-1]))
        found = FooterDirectory(
            hdf5_nbytes=hdf5_nbytes,
            metadata_checksum=int(document["metadata_checksum"]),
            archive=attrs_from_json(document["archive"]),
            kinds={name: attrs_from_json(each) for name, each in document["kinds"].items()},
            num_samples=_count(document["num_samples"], hdf5_nbytes),
            has_scales=bool(_count(document.get("has_scales", 0), 1)),
            has_foreign=bool(_count(document.get("has_foreign", 0), 1)),
            types=[str(each) for each in document["types"]],
            codecs=[str(each) for each in document["codecs"]],
            group_starts=starts,
            group_checksums=[checksum for _, checksum in groups],
            columns={
                name: _Column(*(int(part) for part in parts))
                for name, parts in document["columns"].items()
                if name in COLUMNS
            },
        )
        if len(groups) != -(-found.num_rows // GROUP_ROWS):
            message = f"{len(groups)} groups for {found.num_rows} rows"
            raise ValueError(message)
        return found
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        message = f"the index's directory is not a directory: {error!r}"
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
        if isinstance(value, (str, int, float)):
            attrs[name] = value
            continue
        found = tuple(value) if isinstance(value, list) else value
        parts, kinds = (
            (found, (int,)) if isinstance(found, tuple) else ((found,), (str, int, float))
        )
        for part in parts:
            if not isinstance(part, kinds):
                message = (
                    f"the attribute {name!r} is neither text, nor a number, nor a list of them"
                )
                raise TypeError(message)
        attrs[name] = found
    return attrs


class FooterTables:
    """The footer's rows and columns, each read and checked when it is needed."""

    def __init__(self, file: ByteFile, directory: FooterDirectory) -> None:
        self._file = file
        self._directory = directory
        self._places: dict[int, tuple[NDArray[Any], NDArray[np.int64]]] = {}

    def row(self, number: int) -> FooterRow:
        """The footer's row of a sample; the scales follow the last one."""
        group, within = divmod(number, GROUP_ROWS)
        places, starts = self._group(group)
        place = places[within].item()
        return self._unpacked(self._file.read_at(int(starts[within]), place[0]), *place[1:])

    def rows(self) -> Iterator[FooterRow]:
        """All rows, in order; many are read at a time."""
        for group in range(len(self._directory.group_checksums)):
            places, starts = self._group(group)
            first = 0
            while first < len(places):
                start = int(starts[first])
                stop = max(first + 1, int(np.searchsorted(starts, start + _READ_NBYTES)) - 1)
                block = self._file.read_at(start, int(starts[stop]) - start)
                ends = (starts[first : stop + 1] - start).tolist()
                wanted = places[first:stop].tolist()
                for place, begin, end in zip(wanted, ends, ends[1:], strict=False):
                    yield self._unpacked(block[begin:end], *place[1:])
                first = stop

    def column(self, name: str) -> Any:
        """What a column of JSON holds."""
        where = self._directory.columns.get(name)
        if where is None or min(where.offset, where.nbytes, where.raw_nbytes) < 0:
            message = f"the index's column {name} is missing or of a wrong size"
            raise FooterError(message)
        start = self._directory.hdf5_nbytes + where.offset
        if start + where.nbytes > self._file.nbytes:
            message = f"the index's column {name} lies outside of the file"
            raise FooterError(message)
        self._check_claim(where.nbytes, where.raw_nbytes, f"column {name}")
        stored = self._file.read_at(start, where.nbytes)
        _check_sum(stored, where.checksum, f"column {name}")
        try:
            return json.loads(inflate(stored, where.raw_nbytes, f"column {name}"))
        except (ValueError, RecursionError) as error:
            message = f"the index's column {name} is not JSON: {error}"
            raise FooterError(message) from error

    def _group(self, group: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The table of a group, and where in the file its rows begin and the last one ends."""
        if group in self._places:
            return self._places[group]
        directory = self._directory
        start, end = directory.group_starts[group : group + 2]
        num_rows = min(GROUP_ROWS, directory.num_rows - group * GROUP_ROWS)
        nbytes = num_rows * ROW_PLACE.itemsize
        if nbytes > end - start:
            message = f"group {group} of the index has {end - start} bytes for {num_rows} rows"
            raise FooterError(message)
        # On a server, a request takes longer than all rows of a group.
        self._file.hold(directory.hdf5_nbytes + start, end - start)
        stored = self._file.read_at(directory.hdf5_nbytes + start, nbytes)
        _check_sum(stored, directory.group_checksums[group], f"table of group {group}")
        places = np.frombuffer(stored, ROW_PLACE)
        starts = np.full(num_rows + 1, directory.hdf5_nbytes + start + nbytes, np.int64)
        starts[1:] += np.cumsum(places["nbytes"], dtype=np.int64)
        if starts[-1] != directory.hdf5_nbytes + end:
            message = f"the rows of group {group} of the index do not fill its {end - start} bytes"
            raise FooterError(message)
        # Another dict, as other threads may be looking into the full one.
        known = {} if len(self._places) >= _TABLES_KEPT else self._places
        known[group] = places, starts
        self._places = known
        return places, starts

    def _unpacked(self, stored: bytes, raw_nbytes: int, checksum: int) -> FooterRow:
        _check_sum(stored, checksum, "row of a sample")
        self._check_claim(len(stored), raw_nbytes, "row of a sample")
        return FooterRow(inflate(stored, raw_nbytes, "row of a sample"))

    def _check_claim(self, nbytes: int, raw_nbytes: int, what: str) -> None:
        # Deflate cannot do better than 1032:1: more is claimed only to make readers allocate it.
        most = min(1100 * nbytes + 64, _MOST_PER_HDF5_BYTE * self._directory.hdf5_nbytes)
        if raw_nbytes > most:
            message = f"the index's {what} claims {raw_nbytes} bytes"
            raise FooterError(message)


def _check_sum(stored: bytes, checksum: int, what: str) -> None:
    if xxhash.xxh3_64_intdigest(stored) != checksum:
        message = f"the index's {what} is damaged: its checksum does not fit"
        raise FooterError(message)


class FooterBuilder:
    """Builds a footer, sample by sample; rows go into a nameless file where there are many.

    `folder` is where that file lies: on the disk that the archive goes to.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.num_samples = 0
        self._packer = RowPacker()
        self._rows = tempfile.SpooledTemporaryFile(
            _KEPT_NBYTES, dir=None if folder is None else str(folder)
        )
        # Of the group that is not full.
        self._group: list[bytes] = []
        self._places: list[tuple[int, int, int]] = []
        self._groups: list[tuple[int, int]] = []
        # Pieces of JSON.
        self._ids, self._generations = bytearray(), bytearray()
        # Start and size of the runs of chunks that follow one another.
        self._starts, self._sizes = array("q"), array("q")
        self._has_scales = False
        # Whether the HDF5 part holds what is not the format's.
        self.has_foreign = False

    def __del__(self) -> None:
        # A writer was abandoned.
        self._rows.close()

    def add_sample(self, attrs: Attrs, objects: Sequence[StoredObject]) -> None:
        """Append a sample; every dataset must have a chunk table with checksums."""
        self._add_row(attrs, objects)
        self.num_samples += 1
        for known, value in zip((self._ids, self._generations), key_of(attrs), strict=True):
            known += b"," if known else b""
            known += encoded_json(value)

    def add_scales(self, objects: Sequence[StoredObject]) -> None:
        """Append the scales, after all samples; paths begin at the root group."""
        self._add_row({}, objects)
        self._has_scales = True

    def _add_row(self, attrs: Attrs, objects: Sequence[StoredObject]) -> None:
        raw = self._packer.pack(attrs, objects)
        self._note_chunks(objects)
        stored = zlib.compress(raw, _LEVEL)
        self._group.append(stored)
        self._places.append((len(stored), len(raw), xxhash.xxh3_64_intdigest(stored)))
        if len(self._group) == GROUP_ROWS:
            self._close_group()

    def _note_chunks(self, objects: Sequence[StoredObject]) -> None:
        """Add the chunks of some objects to the runs."""
        starts, sizes = self._starts, self._sizes
        end = starts[-1] + sizes[-1] if starts else -1
        for each in objects:
            for offset, size in zip(each.chunks.offsets, each.chunks.sizes, strict=True):
                if offset == end:
                    sizes[-1] += size
                else:
                    starts.append(offset)
                    sizes.append(size)
                end = offset + size

    def _close_group(self) -> None:
        table = np.array(self._places, ROW_PLACE).tobytes()
        block = b"".join([table, *self._group])
        self._rows.write(block)
        self._groups.append((len(block), xxhash.xxh3_64_intdigest(table)))
        self._group, self._places = [], []

    def close(self) -> None:
        """Release the rows of a footer that will not be written."""
        self._rows.close()

    def finish(
        self, hdf5: ByteFile | LatchedFile, archive: Attrs, kinds: dict[str, Attrs]
    ) -> Iterator[bytes]:
        """The footer in pieces, to be appended to the finished HDF5 part."""
        end = hdf5.nbytes  # before anything is appended
        if self._group:
            self._close_group()
        position = self._rows.tell()
        self._rows.seek(0)
        while block := self._rows.read(_READ_NBYTES):
            yield block
        self.close()
        packer, table = self._packer, {}
        for name, raw in zip(
            COLUMNS,
            (
                b"[[%b],[%b]]" % (bytes(self._ids), bytes(self._generations)),
                encoded_json(list(packer.names)),
                f"[{','.join(packer.attrs)}]".encode("utf-8", "surrogatepass"),
            ),
            strict=True,
        ):
            stored = zlib.compress(raw, _LEVEL)
            table[name] = (position, len(stored), len(raw), xxhash.xxh3_64_intdigest(stored))
            position += len(stored)
            yield stored
        starts, sizes = (np.frombuffer(each, np.int64) for each in (self._starts, self._sizes))
        directory = encoded_json(
            {
                "archive": archive,
                "kinds": kinds,
                "num_samples": self.num_samples,
                **({"has_scales": 1} if self._has_scales else {}),
                **({"has_foreign": 1} if self.has_foreign else {}),
                "types": list(packer.types),
                "codecs": list(packer.codecs),
                "groups": self._groups,
                "columns": table,
                "metadata_checksum": metadata_checksum(hdf5, starts, sizes, end),
            }
        )
        stored = zlib.compress(directory, 6)
        checksum = xxhash.xxh3_64_intdigest(stored)
        head = TRAILER.pack(position, len(stored), len(directory), end, checksum, VERSION, 0)
        tail = TRAILER_END.pack(xxhash.xxh3_64_intdigest(head), MAGIC)
        yield b"".join([stored, head, tail])


def key_of(attrs: Attrs) -> tuple[str | None, int | None]:
    """What a sample is found by: its id, and its number among those with the same id."""
    sample_id, generation = attrs.get("sample_id"), attrs.get("generation_index")
    return (
        sample_id if isinstance(sample_id, str) else None,
        generation if isinstance(generation, int) else None,
    )
