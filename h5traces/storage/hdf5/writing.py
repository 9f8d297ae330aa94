"""Writes the HDF5 part of an archive, without the HDF5 library.

A dataset consists of its chunks and an object header of some 300 bytes. The library takes 150 to
250 µs to write one, holding the interpreter's lock; a Llama-2-7B batch has 64,000 of them. Here the
headers of a sample are made together, in a fifth of the time, and stored together. The library also
crashes the process if a write fails.

Samples are written once, so nothing in the file is ever moved. The library reads, checks, copies
and changes such files as its own: ``tests/unit/test_hdf5_writing.py``.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import h5py
import numpy as np
import xxhash
from h5py import h5a, h5g, h5s, h5t

from h5traces.storage.arrays import encode_array, num_chunks
from h5traces.storage.codecs import DEFLATE
from h5traces.storage.hdf5.indexes import (
    checksums,
    with_checksum,
    write_dense_links,
    write_fixed_array,
)
from h5traces.storage.hdf5.messages import (
    ATTRIBUTE_INFO,
    UNDEFINED,
    attribute_message,
    dataset_messages,
    datatype_message,
    encoded_type,
    fixed_array_layout,
    group_messages,
    link_message,
    object_header,
    single_chunk_layout,
)
from h5traces.storage.hdf5.templates import shown_attributes, template_of
from h5traces.storage.hdf5.types import StoredValue, attribute_value, hdf5_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.format.forms import ObjectForm
    from h5traces.storage.publish import LatchedFile


# What the library may write into the file later: HDF5 1.14 and HDFView 3.3 cannot read "latest".
LIBVER: Final = ("v110", "v110")
_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_VERSION: Final = 3
_SUPERBLOCK_NBYTES: Final = 48
# Groups of more links list them in a heap with an index of names. HDF5 looks through headers from
# the beginning, and most models have fewer layers.
_MAX_LINKS_IN_HEADER: Final = 128
_CHECKSUM_NBYTES: Final = 4
_SMALL_NBYTES: Final = 32 << 10
_MOST_WAITING: Final = 64
# A link and its name must fit into 64 KiB.
_LONGEST_NAME: Final = 65_000


@dataclass(slots=True)
class _Group:
    """A group that is not in the file yet."""

    attributes: list[bytes] = field(default_factory=list)
    # By name: groups; the headers of datasets; once they are written, addresses.
    links: dict[bytes, _Group | bytes | int] = field(default_factory=dict)


class Hdf5Writer:
    """An HDF5 file under construction, empty at first; nothing else may write to the file."""

    def __init__(self, file: LatchedFile) -> None:
        self._file = file
        self._root = _Group()
        # Groups that are not in the file yet, by path.
        self._known: dict[str, _Group] = {}
        # Added by the library at the end: attributes by path; names by group and stand-in.
        self._large_attributes: dict[str, dict[str, StoredValue]] = {}
        self._long_names: dict[tuple[bytes, bytes], bytes] = {}
        # Small parts at the end, to be written in one go.
        self._waiting: list[bytes] = []
        self._nbytes = self._file.nbytes
        self._append(bytes(_SUPERBLOCK_NBYTES))

    def _append(self, data: bytes) -> int:
        address = self._nbytes
        self._waiting.append(data)
        self._nbytes += len(data)
        if len(data) > _SMALL_NBYTES or len(self._waiting) >= _MOST_WAITING:
            self._flush()
        return address

    def _flush(self) -> None:
        self._file.seek(self._file.nbytes)
        # A large part is the last one, and is not copied.
        is_large = bool(self._waiting) and len(self._waiting[-1]) > _SMALL_NBYTES
        large = [self._waiting.pop()] if is_large else []
        for data in (b"".join(self._waiting), *large):
            self._file.write(data)
        self._waiting = []

    def create_group(self, path: str, attrs: Mapping[str, StoredValue]) -> None:
        """A group with its attributes; parents are made as needed."""
        self.add_attributes(path, attrs)

    def add_attributes(self, path: str, attrs: Mapping[str, StoredValue]) -> None:
        """Further attributes of a group that is not finished."""
        self._group(path).attributes += self._attribute_messages(path, attrs)

    def _attribute_messages(self, path: str, attrs: Mapping[str, StoredValue]) -> list[bytes]:
        found = []
        for name, value in attrs.items():
            message = attribute_message(name, value)
            if message is None:
                self._large_attributes.setdefault(path, {})[name] = value
            else:
                found.append(message)
        return found

    def _group(self, path: str, wanted: str = "") -> _Group:
        found = self._known.get(path)
        if found is not None:
            return found
        parent, _, text = path.rpartition("/")
        if not text:
            return self._root
        links = self._group(parent, wanted or path).links
        child = links.setdefault(self._link_name(parent, text), _Group())
        if isinstance(child, _Group):
            self._known[path] = child
            return child
        message = f"{wanted or path} lies in a group that is written already"
        raise ValueError(message)

    def _link_name(self, parent: str, text: str) -> bytes:
        name = text.encode()
        short = _short(name)
        if short is not name:
            self._long_names[f"{parent}/".encode(), short] = name
        return short

    def write_like(
        self,
        path: str,
        form: ObjectForm,
        digest: str | None,
        chunks: Sequence[bytes],
        white: float | None = None,
        *,
        is_picture: bool,
    ) -> tuple[list[int], list[int]]:
        """A dataset of a form that others have, too: as `write_dataset`, in less time.

        `white` is the value of a picture that viewers show white.
        """
        template = template_of(form, is_picture=is_picture, has_white=white is not None)
        if template is None or len(chunks) != 1:
            return self.write_dataset(
                path,
                dtype=form.dtype,
                shape=form.shape,
                chunk=form.chunk,
                codec=form.codec or "",
                chunks=chunks,
                attrs=shown_attributes(form, digest or "", white, is_picture=is_picture),
            )
        address, nbytes = self._append(chunks[0]), len(chunks[0])
        self._link(path, template.filled(address, nbytes, digest, white))
        return [address], [nbytes]

    def _link(self, path: str, header: bytes) -> None:
        parent, _, name = path.rpartition("/")
        self._group(parent, path).links[self._link_name(parent, name)] = header

    def write_dataset(
        self,
        path: str,
        *,
        dtype: str | h5t.TypeID,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        codec: str,
        chunks: Iterable[bytes],
        attrs: Mapping[str, StoredValue],
    ) -> tuple[list[int], list[int]]:
        """A dataset from its encoded chunks, in C order of the grid; their offsets and sizes.

        Small chunks are written at the latest when their group is finished.

        `dtype` is a stored type, or any type of HDF5.
        """
        if isinstance(dtype, str):
            datatype, itemsize = datatype_message(dtype), hdf5_type(dtype).get_size()
        else:
            datatype, itemsize = encoded_type(dtype), dtype.get_size()
        described = dataset_messages(datatype, itemsize, shape, codec)
        addresses, sizes = [], []
        for stored in chunks:
            addresses.append(self._append(stored))
            sizes.append(len(stored))
        expected = 1 if shape == chunk else num_chunks(shape, chunk)
        if len(sizes) != expected:
            message = f"{path}: {len(sizes)} chunks, expected {expected}"
            raise ValueError(message)
        if shape == chunk:
            place = single_chunk_layout(itemsize, chunk, sizes[0], addresses[0])
        else:
            index = UNDEFINED
            if sizes:
                raw_nbytes = math.prod(chunk) * itemsize
                index = write_fixed_array(addresses, sizes, raw_nbytes, self._append)
            place = fixed_array_layout(itemsize, chunk, index)
        messages = self._attribute_messages(path, attrs)
        about = (ATTRIBUTE_INFO,) if messages else ()
        self._link(path, object_header((described, place, *about, *messages)))
        return addresses, sizes

    def write_table(self, path: str, columns: Mapping[str, np.ndarray]) -> None:
        """A compound table, gzip-compressed; all columns have one length.

        Text columns are arrays of dtype ``S<n>`` that hold what `h5traces.format.text.encode` made.
        """
        dtype = np.dtype([(name, values.dtype) for name, values in columns.items()])
        table = np.empty(len(next(iter(columns.values()))), dtype=dtype)
        file_type = h5t.create(h5t.COMPOUND, dtype.itemsize)
        for name, values in columns.items():
            table[name] = values
            is_text = values.dtype.kind == "S"
            stored_type = f"text:{values.dtype.itemsize}" if is_text else values.dtype.name
            _, offset = dtype.fields[name][:2]  # type: ignore[index]  # it has fields
            file_type.insert(name.encode(), offset, hdf5_type(stored_type))
        encoded = encode_array(table, DEFLATE.name)
        self.write_dataset(
            path,
            dtype=file_type,
            shape=encoded.shape,
            chunk=encoded.chunk,
            codec=encoded.codec,
            chunks=encoded.chunks,
            attrs={},
        )

    def finish_group(self, path: str) -> None:
        """Write a group and everything in it; nothing can be added afterwards."""
        parent, _, name = path.rpartition("/")
        links = self._group(parent).links
        links[_short(name.encode())] = self._write_tree(self._group(path))
        self._known.clear()
        self._flush()

    def _write_tree(self, root: _Group) -> int:
        """Write a group and what it links to; its address. All datasets go first, together."""
        levels = list(_levels(root))
        self._write_linked([group for level in levels for group in level], bytes)
        for level in reversed(levels):
            self._write_linked(level, _Group)
        return self._write_headers([self._header(root)])[0]

    def _write_linked(self, parents: list[_Group], kind: type) -> None:
        """Write the datasets or groups that groups link to, whose own links are written."""
        waiting = [
            (group.links, name, each)
            for group in parents
            for name, each in group.links.items()
            if isinstance(each, kind)
        ]
        headers = [self._header(each) for _, _, each in waiting]
        for (links, name, _), address in zip(waiting, self._write_headers(headers), strict=True):
            links[name] = address

    def _write_headers(self, headers: list[bytes]) -> list[int]:
        """Object headers side by side, in one piece."""
        address = self._nbytes
        addresses: list[int] = []
        parts: list[bytes] = []
        for header, found in zip(headers, checksums(headers), strict=True):
            addresses.append(address)
            parts += (header, found.to_bytes(_CHECKSUM_NBYTES, "little"))
            address += len(header) + _CHECKSUM_NBYTES
        if parts:
            self._append(b"".join(parts))
        return addresses

    def _header(self, of: _Group | bytes | int) -> bytes:
        """The header of a dataset, or of a group whose links are written."""
        if isinstance(of, bytes):
            return of
        assert isinstance(of, _Group)
        links = {n: each for n, each in of.links.items() if isinstance(each, int)}
        if len(links) != len(of.links):
            message = "a group can be written after what it links to"
            raise ValueError(message)
        if len(links) > _MAX_LINKS_IN_HEADER:
            messages = [group_messages(*write_dense_links(links, self._append))]
        else:
            messages = [group_messages(), *(link_message(*each) for each in links.items())]
        about = (ATTRIBUTE_INFO,) if of.attributes else ()
        return object_header((*messages, *about, *of.attributes))

    def close(self) -> None:
        """Write the rest, and the superblock last."""
        root = self._write_tree(self._root)
        self._flush()
        addresses = struct.pack("<4Q", 0, UNDEFINED, self._file.nbytes, root)
        # Version, size of offsets and of lengths, consistency flags.
        head = _SIGNATURE + bytes((_SUPERBLOCK_VERSION, 8, 8, 0))
        self._file.seek(0)
        self._file.write(with_checksum(head + addresses))
        self._file.raise_error()
        if self._large_attributes or self._long_names:
            self._finish_by_library()

    def _finish_by_library(self) -> None:
        """Add names and attributes of 64 KiB and more, which no header has room for."""
        with h5py.File(self._file, "r+", libver=LIBVER) as file:
            for (parent, short), long_name in self._long_names.items():
                group = h5g.open(file.id, parent)
                group.links.move(short, group, long_name)
            for path, attrs in self._large_attributes.items():
                for name, value in attrs.items():
                    type_id, shape, data = attribute_value(value)
                    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
                    attribute = h5a.create(file[path].id, name.encode(), type_id, space)
                    raw: NDArray[np.void] = np.ndarray(shape, f"V{type_id.get_size()}", data)
                    attribute.write(raw, mtype=type_id)


def _short(name: bytes) -> bytes:
    """The name, or a stand-in for one that no header has room for."""
    return (
        name if len(name) <= _LONGEST_NAME else b"\1" + xxhash.xxh3_128_digest(name).hex().encode()
    )


def _levels(root: _Group) -> Iterator[list[_Group]]:
    """The groups below and including `root`, by depth."""
    level = [root]
    while level:
        yield level
        level = [
            each for group in level for each in group.links.values() if isinstance(each, _Group)
        ]
