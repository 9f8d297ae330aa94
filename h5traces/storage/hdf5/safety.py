"""What is checked of HDF5 objects before HDF5 may follow, open or allocate anything for them.

HDF5 follows links out of the file, opens other files for external and virtual storage, searches the
disk for filter plugins and believes every size in the file. Archives need none of these, so all are
rejected.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from h5py import h5a, h5d, h5g, h5l, h5o, h5pl, h5z
from h5py._objects import phil  # the lock that every call of h5py takes; it has no public name

from h5traces.errors import (
    CorruptArchiveError,
    HostileFileError,
    MissingFilterError,
    NotAnArchiveError,
)
from h5traces.format import layout
from h5traces.storage.arrays import grid_shape
from h5traces.storage.codecs import FILTER_SHUFFLE, FILTER_ZSTD, Filter, codec_of
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# deflate, shuffle, fletcher32: what HDF5 itself brings and stock tools put on numbers
_BUILT_IN_FILTERS: Final = frozenset({1, 2, 3})
# An index of chunks spends at least an address on each.
_MIN_INDEX_NBYTES: Final = 8
# signature, version, sizes of offsets and lengths, flags, base address
_SUPERBLOCK: Final = struct.Struct("<8sBBBBQ")
# In those versions, the address of the superblock's extension and the end of the file follow.
_END: Final = struct.Struct("<QQ")
_CHECKED_SUPERBLOCKS: Final = (2, 3)


@contextlib.contextmanager
def no_plugin_search(*, allowed: bool) -> Iterator[None]:
    """Keep HDF5 from searching the disk for filter plugins, unless `allowed`.

    Filters that are registered already keep working. The search path belongs to the process, so
    h5py's lock is held: no other thread sees it empty.
    """
    if allowed:
        yield
        return
    with phil:
        paths = [h5pl.get(index) for index in range(h5pl.size())]
        for _ in paths:
            h5pl.remove(0)
        try:
            yield
        finally:
            for path in paths:
                h5pl.append(path)


def require_zstd() -> None:
    """Register HDF5's Zstandard filter, without a search for it on disk."""
    # HDF5 looks through its plugin folders for a filter that is not registered, and hdf5plugin
    # asks for every filter before it registers its own.
    with no_plugin_search(allowed=False):
        try:
            import hdf5plugin  # noqa: F401  # registers its filters with HDF5
        except ImportError as error:
            message = f"HDF5 reads codec zstd with filter {FILTER_ZSTD}: pip install hdf5plugin"
            raise MissingFilterError(message) from error
        is_registered = h5z.filter_avail(FILTER_ZSTD)
    if not is_registered:
        message = f"HDF5 reads codec zstd with filter {FILTER_ZSTD}, which hdf5plugin lacks here"
        raise MissingFilterError(message)


# Of pickles of protocol 2 to 5, and of gzip.
_BATCH_BEGINNINGS: Final = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b")


def check_superblock(path: Path) -> None:
    """Reject a file before HDF5 opens it, by its first bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        block = file.read(_SUPERBLOCK.size + _END.size)
        nbytes = file.seek(0, os.SEEK_END)
    if not block.startswith(layout.HDF5_SIGNATURE):
        message = f"{path}: is not an HDF5 file; expected an archive that h5traces wrote"
        if block.startswith(_BATCH_BEGINNINGS):
            message = (
                f"{path}: is not an HDF5 file but looks like a pickled batch; convert it with "
                "h5traces.convert, or read it with h5traces.load"
            )
        raise NotAnArchiveError(message)
    if len(block) < _SUPERBLOCK.size + _END.size:
        message = f"{path}: ends within its first {len(block)} bytes; it was truncated"
        raise CorruptArchiveError(message)
    _, version, offset_nbytes, length_nbytes, _, base = _SUPERBLOCK.unpack_from(block)
    if version in _CHECKED_SUPERBLOCKS and ((offset_nbytes, length_nbytes) != (8, 8) or base):
        message = (
            f"{path}: the superblock has addresses of {offset_nbytes} bytes that count from "
            f"{base}; archives have 8 bytes from 0"
        )
        raise HostileFileError(message)
    _, end = _END.unpack_from(block, _SUPERBLOCK.size)
    if version in _CHECKED_SUPERBLOCKS and end > nbytes:
        message = (
            f"{path}: has {nbytes} bytes of {end} or more; its end is missing, and with it the "
            "names of all objects. Fetch the rest ('curl -C -' and 'rsync --append' go on with a "
            "transfer that broke off), or restore the file from a copy"
        )
        raise CorruptArchiveError(message)


def link_names(group: h5g.GroupID, most: int, what: str) -> list[str]:
    """The sorted names of a group's links, of which there may be no more than `most`."""
    names: list[str] = []

    def add(name: bytes) -> bool | None:
        names.append(name.decode("utf-8", "surrogateescape"))
        # Anything but None ends the iteration. The group's own count may be wrong.
        return True if len(names) > most else None

    if group.get_num_objs() <= most:
        group.links.iterate(add)
    if group.get_num_objs() > most or len(names) > most:
        message = f"there are {max(group.get_num_objs(), len(names))} {what}; the limit is {most}"
        raise HostileFileError(message)
    return sorted(names)


def has_link(group: h5g.GroupID, name: str) -> bool:
    """Whether a link of that name exists; it is not followed."""
    return bool(group.links.exists(name.encode("utf-8", "surrogateescape")))


def is_group(group: h5g.GroupID, name: str) -> bool:
    """Whether a hard link leads to a group."""
    encoded = name.encode("utf-8", "surrogateescape")
    if group.links.get_info(encoded).type != h5l.TYPE_HARD:
        return False
    return bool(h5o.get_info(group, encoded).type == h5o.TYPE_GROUP)


def is_encoded(group: h5g.GroupID, name: str) -> bool:
    """Whether what a link leads to states an encoding; true for what may not be followed."""
    encoded = name.encode("utf-8", "surrogateescape")
    if group.links.get_info(encoded).type != h5l.TYPE_HARD:
        return True
    return bool(h5a.exists(group, b"encoding", obj_name=encoded))


def open_child(group: h5g.GroupID, name: str) -> tuple[Any, int]:
    """The group or dataset that only this hard link leads to, and its address."""
    encoded = name.encode("utf-8", "surrogateescape")
    if group.links.get_info(encoded).type != h5l.TYPE_HARD:
        message = f"{name!r} is a soft or external link; archives hold hard links only"
        raise HostileFileError(message)
    found = h5o.open(group, encoded)
    if not isinstance(found, (h5g.GroupID, h5d.DatasetID)):
        message = f"{name!r} is neither group nor dataset"
        raise HostileFileError(message)
    info = h5o.get_info(found)
    if info.rc != 1:
        message = f"{name!r} has several hard links; archives link every object once"
        raise HostileFileError(message)
    return found, info.addr


def open_group(group: h5g.GroupID, name: str) -> h5g.GroupID:
    """The group that only this hard link leads to."""
    found, _ = open_child(group, name)
    if not isinstance(found, h5g.GroupID):
        message = f"{name!r} is a dataset, expected a group"
        raise HostileFileError(message)
    return found


def check_storage(options: Any, shape: tuple[int, ...] | None) -> None:
    """Reject datasets whose bytes lie elsewhere, and those without a shape."""
    if options.get_layout() == h5d.VIRTUAL:
        message = "a virtual dataset; archives hold their own bytes"
        raise HostileFileError(message)
    if options.get_external_count():
        message = "a dataset with external storage; archives hold their own bytes"
        raise HostileFileError(message)
    if shape is None:
        message = "a dataset without a simple shape; archives hold none"
        raise HostileFileError(message)


def filters_of(options: Any, itemsize: int) -> tuple[Filter, ...]:
    """The filters in a dataset's creation properties, in order of writing."""
    filters = tuple(
        Filter(number, tuple(parameters))
        for number, _, parameters, _ in map(options.get_filter, range(options.get_nfilters()))
    )
    for each in filters:
        # HDF5 shuffles by this number, archives' readers by the size of the element.
        if each.filter_id == FILTER_SHUFFLE and each.parameters[:1] != (itemsize,):
            message = f"the shuffle filter is for elements of {each.parameters}, not {itemsize}"
            raise HostileFileError(message)
    if codec_of(filters) is not None:
        return filters
    numbers = [each.filter_id for each in filters]
    if len(set(numbers)) != len(numbers):
        message = f"the filters {numbers} repeat one another; archives use each at most once"
        raise HostileFileError(message)
    foreign = set(numbers) - _BUILT_IN_FILTERS
    if foreign:
        message = (
            f"the filters {sorted(foreign)} are none that archives use; expected gzip (1) with or "
            "without shuffle (2); rewrite the file with h5repack -f GZIP=6 if you trust it"
        )
        raise MissingFilterError(message)
    return filters


def stored_chunks(
    dataset: h5d.DatasetID, shape: tuple[int, ...], chunk: tuple[int, ...], file_nbytes: int
) -> list[Any]:
    """h5py's description of every chunk, in C order of the grid."""
    counts = grid_shape(shape, chunk)
    expected = math.prod(counts)
    if expected * _MIN_INDEX_NBYTES > file_nbytes:
        message = f"{expected} chunks cannot be listed in a file of {file_nbytes} bytes"
        raise HostileFileError(message)
    if not expected:
        return []
    found: dict[int, Any] = {}

    def add(info: Any) -> bool | None:
        number = 0
        for start, size, count in zip(info.chunk_offset, chunk, counts, strict=True):
            number = number * count + min(start // size, count)
        found[number] = info
        return True if len(found) > expected else None

    dataset.chunk_iter(add)
    wanted = (found.get(number) for number in range(expected))
    stored = [each for each in wanted if each is not None and each.byte_offset is not None]
    if len(stored) != expected or len(found) != expected:
        message = (
            f"{len(stored)} of {expected} chunks are stored where they belong; the dataset is "
            "incomplete"
        )
        raise CorruptArchiveError(message)
    return stored
