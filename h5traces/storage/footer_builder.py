"""Builds the footer of an archive while its samples are written."""

from __future__ import annotations

import re
import zlib
from array import array
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from h5traces.format.attributes import Attrs, compact_json
from h5traces.storage import deflate
from h5traces.storage.footer import (
    COLUMNS,
    DIGEST,
    MAGIC,
    TRAILER,
    TRAILER_END,
    VERSION,
    Readable,
    metadata_checksum,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h5traces.format.entries import ObjectEntry

_DIGEST: Final = re.compile("[0-9a-f]{32}")
# Stands for an object that has no digest, or one that is none and lies with the other attributes.
_NO_DIGEST: Final = bytes(16)


class _Dictionary:
    """Numbers for values that repeat."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, value: str) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def values(self) -> list[str]:
        return list(self._numbers)


class FooterBuilder:
    """Collects what a footer tells, sample by sample, in compact columns."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._names, self._attrs = _Dictionary(), _Dictionary()
        self._types, self._codecs = _Dictionary(), _Dictionary()
        self._columns: dict[str, array[int]] = {
            name: array(np.dtype(dtype).char if dtype != "<i8" else "q")
            for name, dtype in COLUMNS.items()
            if not name.endswith("_json")
        }
        self._next_offset = 0
        self._has_scales = False

    def add_sample(self, attrs: Attrs, objects: Iterable[ObjectEntry]) -> None:
        """Append a sample; every dataset must have a chunk table with checksums."""
        self._add_group(attrs, objects)
        self.num_samples += 1

    def add_scales(self, objects: Iterable[ObjectEntry]) -> None:
        """Append the scales, behind all samples; paths begin at the root group."""
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
        columns["object_name"].append(self._names.number(entry.path))
        columns["object_attrs"].append(self._attrs.number(compact_json(others)))
        columns["object_type"].append(self._types.number(entry.dtype))
        columns["object_codec"].append(self._codecs.number(entry.codec or ""))
        columns["object_ndim"].append(len(entry.shape))
        columns["object_dims"].extend(entry.shape)
        columns["object_chunk_dims"].extend(entry.chunk)
        columns["object_digest"].frombytes(bytes.fromhex(str(digest)) if has_digest else _NO_DIGEST)
        offsets = entry.chunks.offsets if entry.chunks else ()
        columns["object_num_chunks"].append(len(offsets))
        if entry.chunks is None or not offsets:
            return
        if entry.chunks.checksums is None:
            message = f"{entry.path}: chunks without checksums cannot enter a footer"
            raise ValueError(message)
        for offset, size in zip(offsets, entry.chunks.sizes, strict=True):
            # Chunks mostly follow one another, so the gaps are mostly zero.
            columns["chunk_gap"].append(offset - self._next_offset)
            columns["chunk_nbytes"].append(size)
            self._next_offset = offset + size
        columns["chunk_checksum"].extend(entry.chunks.checksums)

    def finish(self, hdf5: Readable, archive: Attrs, kinds: dict[str, Attrs]) -> bytes:
        """The footer's bytes, to be appended to the finished HDF5 part.

        Parameters
        ----------
        hdf5
            The file, which ends with its HDF5 part.
        archive, kinds
            Attributes of the root group and of the groups under ``/kinds``.
        """
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
                "types": self._types.values(),
                "codecs": self._codecs.values(),
                "columns": table,
                "metadata_checksum": self._metadata_checksum(hdf5),
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
            return compact_json(self._names.values()).encode("utf-8", "surrogatepass")
        if name == "attrs_json":
            return f"[{','.join(self._attrs.values())}]".encode("utf-8", "surrogatepass")
        # array() is in native byte order, and so are all machines that wheels are built for.
        return self._columns[name].tobytes()

    def _metadata_checksum(self, hdf5: Readable) -> int:
        sizes = np.frombuffer(self._columns["chunk_nbytes"], dtype=np.int64)
        gaps = np.frombuffer(self._columns["chunk_gap"], dtype=np.int64)
        return metadata_checksum(hdf5, np.cumsum(gaps + sizes) - sizes, sizes, hdf5.nbytes)
