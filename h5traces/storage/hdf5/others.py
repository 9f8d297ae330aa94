"""HDF5 files of other programs, read with care: named arrays and attributes, and nothing else.

Links are followed inside the file only, no other file is opened for external or virtual storage, no
plugin is searched, and sizes are compared with those of the file before anything is allocated.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, Final, NoReturn

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5p, h5t
from h5py._objects import phil  # the lock that every call of h5py takes; it has no public name

from h5traces.errors import (
    ConversionError,
    H5TracesError,
    HostileFileError,
    MissingFilterError,
)
from h5traces.storage.files import open_regular
from h5traces.storage.hdf5.heaps import Heaps
from h5traces.storage.hdf5.reading import LIBRARY_ERRORS
from h5traces.storage.hdf5.safety import no_plugin_search, require_zstd
from h5traces.storage.trial import attempt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_MAX_OBJECTS: Final = 200_000
_MAX_ATTRIBUTES: Final = 10_000
_MAX_DEPTH: Final = 32
# deflate, shuffle, fletcher32, nbit, scaleoffset; lzf, which h5py brings.
_FILTERS: Final = frozenset({1, 2, 3, 5, 6, 32000})
_ZSTD: Final = 32015
# More than deflate can do, which is 1032.
_MAX_EXPANSION: Final = 1100
_GRACE_NBYTES: Final = 1 << 20
_MAX_CHUNK_NBYTES: Final = 256 << 20
# Rows that are read at once, as a row may be a part of a compressed chunk.
_BLOCK_NBYTES: Final = 1 << 20
_MAX_BLOCK_NBYTES: Final = 16 << 20
# Of all datasets of a file together.
_MAX_BLOCKS_NBYTES: Final = 64 << 20
_MAX_TEXT_NBYTES: Final = 64 << 20
_ATTRIBUTE: Final = "@"


class OtherHdf5:
    """The datasets and attributes of a file, by name; a context manager.

    Attributes
    ----------
    nbytes
        Size of the file.
    datasets
        By path without a leading slash.
    attributes
        By path of the object and name: ``model/@name``, ``@name`` of the root.
    links
        Paths of soft links, which are not followed.
    """

    def __init__(self, path: Path, *, is_tried: bool = False) -> None:
        self.path = path
        with open(open_regular(path, ConversionError), "rb") as file:  # noqa: PTH123
            self.nbytes = file.seek(0, 2)
        self.datasets: dict[str, Hdf5Array] = {}
        self.attributes: dict[str, Hdf5Attribute] = {}
        self.links: list[str] = []
        # Blocks that datasets hold, the oldest first.
        self._blocks: dict[Hdf5Array, int] = {}
        # What HDF5 could not read in a child; it must not try here.
        self._failed = {} if is_tried else self._tried()
        self._file = self._open()
        try:
            with self.reading():
                self._heaps = Heaps(self._file, path)
                self._walk(self._file.id, "", 0, set())
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Search no plugins, and raise errors of HDF5 as ours."""
        try:
            with no_plugin_search(allowed=False):
                yield
        except LIBRARY_ERRORS as error:
            message = (
                f"{self.path}: HDF5 cannot read it: {str(error)[:300]}; 'h5dump -H' shows what is "
                "left of it"
            )
            raise ConversionError(message) from error

    def close(self) -> None:
        """Close the file."""
        self.datasets.clear()
        self.attributes.clear()
        self._blocks.clear()
        with contextlib.suppress(*LIBRARY_ERRORS):
            self._file.close()

    def fail(self, name: str, message: str) -> NoReturn:
        """Reject an object."""
        message = f"{self.path}: {name[:200]!r} {message}"
        raise HostileFileError(message)

    def _tried(self) -> dict[str, str]:
        """Look at everything but numbers in a child process, since HDF5 trusts damaged metadata."""
        # No other thread is inside HDF5 while a child is forked.
        with phil:
            return attempt(functools.partial(_failures, self.path), self.path)

    def check_texts(self, name: str) -> None:
        """Reject text of variable length that cannot be read in bounded time and memory."""
        if name in self._failed:
            raise ConversionError(self._failed[name])
        if self._heaps.problem is not None:
            message = f"{self.path}: {self._heaps.problem}; copy the file again"
            raise ConversionError(message)

    def hold(self, array: Hdf5Array, nbytes: int) -> None:
        """Note a dataset's block, and release the oldest of others."""
        self._blocks.pop(array, None)
        self._blocks[array] = nbytes
        while len(self._blocks) > 1 and sum(self._blocks.values()) > _MAX_BLOCKS_NBYTES:
            oldest = next(iter(self._blocks))
            del self._blocks[oldest]
            oldest.forget()

    # --- names -----------------------------------------------------------------------------------

    def _open(self) -> h5py.File:
        with self.reading():
            return h5py.File(self.path, "r", locking=False)

    def _walk(self, group: h5g.GroupID, place: str, depth: int, seen: set[Any]) -> None:
        if depth > _MAX_DEPTH:
            self.fail(place, f"is nested more than {_MAX_DEPTH} levels deep")
        self._note_attributes(group, place)
        names: list[bytes] = []

        def add(name: bytes) -> bool | None:
            names.append(name)
            return True if len(names) > _MAX_OBJECTS else None

        group.links.iterate(add)
        for encoded in sorted(names):
            if len(seen) > _MAX_OBJECTS:
                self.fail(place, f"is in a file of more than {_MAX_OBJECTS:,} objects")
            name = encoded.decode("utf-8", "replace")
            path = f"{place}/{name}" if place else name
            link = group.links.get_info(encoded).type
            if link == h5l.TYPE_EXTERNAL:
                self.fail(
                    path,
                    "is a link to another file, which is not followed; copy what it "
                    "leads to into this file with h5py: file.copy",
                )
            if link != h5l.TYPE_HARD:
                self.links.append(path)
                continue
            info = h5o.get_info(group, encoded)
            key = (info.fileno, info.addr)
            if info.type == h5o.TYPE_GROUP:
                if key in seen:
                    self.links.append(path)
                    continue
                seen.add(key)
                self._walk(h5g.open(group, encoded), path, depth + 1, seen)
            elif info.type == h5o.TYPE_DATASET:
                seen.add((*key, path))
                dataset = h5d.open(group, encoded, _without_cache())
                self._note_attributes(dataset, path)
                self.datasets[path] = Hdf5Array(self, path, dataset)

    def _note_attributes(self, owner: Any, place: str) -> None:
        count = h5a.get_num_attrs(owner)
        if count + len(self.attributes) > _MAX_ATTRIBUTES:
            # Libraries put some on every dataset; they are reached by their objects only.
            return
        names: list[bytes] = []
        h5a.iterate(owner, names.append)
        for encoded in names:
            name = encoded.decode("utf-8", "replace")
            path = f"{place}/{_ATTRIBUTE}{name}" if place else f"{_ATTRIBUTE}{name}"
            self.attributes[path] = Hdf5Attribute(self, path, owner, encoded)


def _without_cache() -> h5p.PropDAID:
    """No cache of chunks, which every open dataset would fill: 1 MB; blocks hold whole chunks."""
    options = h5p.create(h5p.DATASET_ACCESS)
    options.set_chunk_cache(1, 0, 1.0)
    return options


class Hdf5Array:
    """A dataset, checked before anything of it is read."""

    def __init__(self, file: OtherHdf5, name: str, dataset: h5d.DatasetID) -> None:
        self._file, self._name, self._id = file, name, dataset
        self._type = dataset.get_type()
        self.shape = self._checked_shape()
        self._block: tuple[int, int, Any] = (0, 0, None)
        self._axis: int | None = None

    def _checked_shape(self) -> tuple[int, ...]:
        space = self._id.get_space()
        return tuple(space.shape) if space.shape is not None else ()

    @property
    def dtype(self) -> str:
        """Type of the elements, for messages."""
        if isinstance(self._type, h5t.TypeStringID):
            return "text"
        try:
            return str(self._type.dtype.name)
        except (TypeError, ValueError):
            return "unknown"

    @property
    def is_text(self) -> bool:
        """Whether it holds text."""
        return isinstance(self._type, h5t.TypeStringID)

    def probe(self) -> None:
        """Look at where the elements lie, and read texts."""
        with self._file.reading():
            self._check()
        if self.is_text:
            self.read()

    def read(self, axis: int | None = None, index: int = 0) -> Any:
        """Numbers ``(...)`` in this machine's byte order, text, or lists of text.

        ConversionError and HostileFileError where it holds anything else, or its bytes lie
        elsewhere.
        """
        with self._file.reading():
            return self._read_checked(axis, index)

    def _read_checked(self, axis: int | None, index: int) -> Any:
        self._check()
        if axis is None:
            return self._read(tuple(slice(None) for _ in self.shape))
        start, stop, values = self._block
        if self._axis != axis or not start <= index < stop:
            start, stop = self._next_block(axis, index)
            values = self._read((*(slice(None) for _ in range(axis)), slice(start, stop)))
            self._block, self._axis = (start, stop, values), axis
            self._file.hold(self, getattr(values, "nbytes", _BLOCK_NBYTES))
        if isinstance(values, list):
            return values[index - start]
        found = values[(*(slice(None) for _ in range(axis)), index - start)]
        # A copy: what is left of a block must not keep all of it.
        return np.array(found) if isinstance(found, np.ndarray) else found

    def forget(self) -> None:
        """Let the block go that was read last."""
        self._block = (0, 0, None)

    def _next_block(self, axis: int, index: int) -> tuple[int, int]:
        """The elements that are read together: whole chunks, if these are small."""
        length = self.shape[axis]
        row = max(1, math.prod(self.shape) * self._type.get_size() // max(1, length))
        step = max(1, _BLOCK_NBYTES // row)
        options = self._id.get_create_plist()
        if options.get_layout() == h5d.CHUNKED:
            chunk = int(options.get_chunk()[axis])
            step = max(step, chunk) if chunk * row <= _MAX_BLOCK_NBYTES else step
            step = max(step // chunk * chunk, 1)
        start = index // step * step
        return start, min(start + step, length)

    def _check(self) -> None:
        """Reject what lies elsewhere, what plugins would decode, and sizes that cannot be."""
        fail, name = self._file.fail, self._name
        options = self._id.get_create_plist()
        if options.get_layout() == h5d.VIRTUAL:
            fail(
                name,
                "is a virtual dataset, whose numbers lie in other files; write them into "
                "one with h5py, or with h5repack",
            )
        if options.get_external_count():
            fail(
                name,
                "has external storage: its numbers lie in another file; write them into "
                "one with h5repack",
            )
        numbers = [options.get_filter(index)[0] for index in range(options.get_nfilters())]
        if _ZSTD in numbers:
            require_zstd()
        foreign = set(numbers) - _FILTERS - {_ZSTD}
        if foreign or len(numbers) > 8:
            message = (
                f"{self._file.path}: {name!r} is compressed by filters {sorted(set(numbers))}, "
                f"expected some of {sorted(_FILTERS | {_ZSTD})}; rewrite the file with "
                "h5repack -f GZIP=6 if you trust it"
            )
            raise MissingFilterError(message)
        self._check_sizes(options, has_filters=bool(numbers))

    def _check_sizes(self, options: Any, *, has_filters: bool) -> None:
        fail, name, itemsize = self._file.fail, self._name, self._type.get_size()
        needed = math.prod(self.shape) * itemsize
        stored = min(self._id.get_storage_size(), self._file.nbytes)
        factor = _MAX_EXPANSION if has_filters else 1
        if needed > stored * factor + _GRACE_NBYTES:
            fail(
                name,
                f"of shape {self.shape} needs {needed:,} bytes, and {stored:,} are stored; it was "
                "never written, or not to its end",
            )
        if options.get_layout() == h5d.CHUNKED:
            chunk = math.prod(options.get_chunk()) * itemsize
            if chunk > max(_MAX_CHUNK_NBYTES, 2 * needed):
                fail(name, f"has chunks of {chunk:,} bytes; rewrite it with smaller ones")

    def _read(self, selection: tuple[Any, ...]) -> Any:
        dataset = h5py.Dataset(self._id)
        if self.is_text:
            return self._texts(dataset, selection)
        if not _is_plain(self._type):
            message = (
                f"{self._file.path}: {self._name!r} has elements of type {self.dtype}, expected "
                "numbers or text"
            )
            raise ConversionError(message)
        values = np.asarray(dataset[selection])
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def _texts(self, dataset: Any, selection: tuple[Any, ...]) -> Any:
        """Text, one by one where each may be as large as the file; lists of one dimension."""
        if self._type.is_variable_str():
            self._file.check_texts(self._name)
        if not self.shape:
            return _as_text(dataset[()])
        if len(self.shape) > 1:
            message = f"{self._file.path}: {self._name!r} is text of shape {self.shape}"
            raise ConversionError(message)
        places = range(self.shape[0])[selection[0]]
        most = max(1, _MAX_TEXT_NBYTES // max(1, self._file.nbytes))
        found: list[str] = []
        total = 0
        for start in range(places.start, places.stop, most):
            part = dataset[start : min(start + most, places.stop)]
            found += map(_as_text, part)
            total += sum(map(len, part))
            if total > max(_MAX_TEXT_NBYTES, 2 * self._file.nbytes):
                self._file.fail(self._name, "is text that takes more than the file")
        return found


class Hdf5Attribute:
    """An attribute of one value, or of a few."""

    def __init__(self, file: OtherHdf5, name: str, owner: Any, attribute: bytes) -> None:
        self._file, self._name, self._owner, self._attribute = file, name, owner, attribute

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its value."""
        with self._file.reading():
            return tuple(self._open().shape or ())

    @property
    def dtype(self) -> str:
        """Of its value, for messages."""
        with self._file.reading():
            kind = self._open().get_type()
            is_text = isinstance(kind, h5t.TypeStringID)
            return "text" if is_text else str(kind.dtype.name) if _is_plain(kind) else "unknown"

    def probe(self) -> None:
        """Read it."""
        self.read()

    def _open(self) -> Any:
        return h5a.open(self._owner, self._attribute)

    def read(self, axis: int | None = None, index: int = 0) -> Any:
        """Its value, or one element."""
        with self._file.reading():
            found = self._open()
            kind = found.get_type()
            is_text = isinstance(kind, h5t.TypeStringID)
            if not (is_text or _is_plain(kind)) or math.prod(found.shape or (1,)) > 4096:
                message = f"{self._file.path}: attribute {self._name!r} is not a number or text"
                raise ConversionError(message)
            if is_text and kind.is_variable_str():
                self._file.check_texts(self._name)
            value = h5py.AttributeManager(_Owner(self._owner))[self._attribute]
        if is_text:
            value = _as_text(value) if not found.shape else list(map(_as_text, value.tolist()))
        return value if axis is None else value[index]


def _failures(path: Path) -> dict[str, str]:
    """Texts and attributes that cannot be read, by name, with the reasons."""
    failed = {}
    try:
        with contextlib.closing(OtherHdf5(path, is_tried=True)) as file:
            for name, each in named(file):
                try:
                    each.probe()
                except (H5TracesError, *LIBRARY_ERRORS) as error:
                    failed[name] = str(error)
    except H5TracesError:
        # It will be met again.
        pass
    return failed


class _Owner:
    """What h5py's access to attributes needs of an object."""

    def __init__(self, identifier: Any) -> None:
        self.id = identifier


def _is_plain(kind: Any) -> bool:
    """Whether elements are numbers: integers, floats or booleans."""
    if not isinstance(kind, (h5t.TypeIntegerID, h5t.TypeFloatID, h5t.TypeEnumID)):
        return False
    try:
        return kind.dtype.kind in "biuf"
    except (TypeError, ValueError):
        return False


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def named(file: OtherHdf5) -> Iterator[tuple[str, Hdf5Array | Hdf5Attribute]]:
    """Datasets, then attributes."""
    return itertools.chain(file.datasets.items(), file.attributes.items())


def open_datasets(path: Path) -> tuple[h5py.File, dict[str, h5py.Dataset]]:
    """A file that h5traces wrote, such as one of features, and its datasets by path.

    The caller closes it; links are not followed.

    OSError where it is not an HDF5 file.
    """
    file = h5py.File(path, "r")
    found: dict[str, h5py.Dataset] = {}

    def note(name: str, each: object) -> None:
        if isinstance(each, h5py.Dataset):
            found[name] = each

    file.visititems(note)
    return file, found
