"""Files of torch.save, read without torch: their pickle by the machine, their tensors as views.

Since torch 1.6 such a file is a zip file: an entry ``data.pkl`` that refers to the storages of
tensors by name, and one entry ``data/NAME`` with the numbers of each, not compressed. Before, and
with ``_use_new_zipfile_serialization=False``, it is a row of pickles (a magic number, the version,
the machine, the value, the names of its storages) with the storages behind them.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.meaning.options import ReadingOptions
from h5traces.sources.engine_names import by_field, is_of_engine
from h5traces.sources.mapped import MappedFile
from h5traces.sources.opening import source_stem
from h5traces.sources.pickle.locating import INVALID, locate
from h5traces.sources.pickle.machine import Machine
from h5traces.sources.pickle.shims import (
    MAGIC,
    PROTOCOL,
    Storage,
    StorageHeader,
    parse_persistent_id,
    storage_nbytes,
)
from h5traces.sources.pickle.source import (
    FileSource,
    MalformedError,
    PickleLimits,
    TruncatedError,
    contradict,
)
from h5traces.sources.pickle.stream import BatchStream
from h5traces.sources.unpacked import mapped_file
from h5traces.sources.zip_entries import STORED, ZipDirectory, entry_content

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from h5traces.sources.pickle.cursor import Cursor
    from h5traces.sources.zip_entries import ZipEntry

_DEFAULT_LIMITS: Final = PickleLimits()
_PICKLE: Final = "data.pkl"
_BUFFER_NBYTES: Final = 1 << 16


class _EngineStream(BatchStream):
    """Takes the dicts of `engine_names` for samples."""

    def _small_dict(self, cursor: Cursor, value: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        if is_of_engine(value):
            self._is_trace = True
            yield value
            return
        yield from super()._small_dict(cursor, value)


class _TorchStream(_EngineStream):
    """What both formats have in common."""

    kind = "torch"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limits: PickleLimits = _DEFAULT_LIMITS,
        options: ReadingOptions = ReadingOptions(),
    ) -> None:
        self._mapped = mapped_file(Path(path), limits)
        super().__init__(path, limits=limits, options=options)

    def _check_kind(self) -> None:
        """Do nothing: its reader was chosen by its kind."""

    def __next__(self) -> Any:
        self._mapped.release()
        item = super().__next__()
        if not is_of_engine(item):
            return item
        item, told = by_field(item)
        self.understood += [each for each in told if each not in self.understood]
        item.setdefault(layout.QUESTION_ID, self._id_by_name(self.num_read - 1))
        return item

    def _id_by_name(self, index: int) -> str:
        """The id of a sample that has none: the file's name, of several samples with a number."""
        return source_stem(self.path.name) + (f"-{index}" if index else "")

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read so far, as far as the pickle was read, and the size of the file."""
        position, size = super().progress
        return self._mapped.nbytes * position // max(size, 1), self._mapped.nbytes


# --- zip files -----------------------------------------------------------------------------------


class TorchZipStream(_TorchStream):
    """A file of torch.save, as it writes since torch 1.6."""

    def _make_source(self) -> FileSource:
        try:
            if self._storages is None:
                directory = ZipDirectory(self._mapped.read_at, self._mapped.nbytes, str(self.path))
                prefix = _prefix_of(directory)
                self._pickle = directory.entry(prefix + _PICKLE)
                self._storages = _ZipStorages(self._mapped, directory, prefix, self._limits)
            return self._entry_source(self._pickle)
        except MalformedError as error:
            message = f"{self.path}: {error}"
            raise ConversionError(message) from error

    def _entry_source(self, entry: ZipEntry) -> FileSource:
        """The pickle inside a zip file, where it lies."""
        content = _content(self._mapped, entry, self._limits, check=True)
        if entry.method == STORED:
            return _MappedSource(self._mapped, entry.start, entry.nbytes)
        return _MappedSource(MappedFile(self.path, content.tobytes()), 0, entry.nbytes)


def _prefix_of(directory: ZipDirectory) -> str:
    """What every entry's name begins with: ``archive/``, mostly."""
    found = [name for name in directory if name.rpartition("/")[2] == _PICKLE]
    shortest = min(found, key=len)
    return shortest.removesuffix(_PICKLE)


class _ZipStorages:
    """The storages of a zip file, as views of it."""

    def __init__(
        self, mapped: MappedFile, directory: ZipDirectory, prefix: str, limits: PickleLimits
    ) -> None:
        self.nbytes = mapped.nbytes
        self._mapped = mapped
        self._directory = directory
        self._prefix = prefix
        self._limits = limits
        self._checked: set[str] = set()
        self._inflated: tuple[str, Any] = ("", None)
        order = b"little"
        if (name := f"{prefix}byteorder") in directory:
            order = self._content(directory.entry(name)).tobytes().strip()
        if order not in (b"little", b"big"):
            contradict(f"the byte order is {order[:20]!r}, expected 'little' or 'big'")
        self._is_big_endian = order == b"big"

    def find(self, persistent_id: Any) -> Storage:
        header = parse_persistent_id(
            (*persistent_id, None) if type(persistent_id) is tuple else persistent_id
        )
        name = f"{self._prefix}data/{header.key}"
        if name not in self._directory:
            contradict(f"the file has no entry {name[:80]!r}, which its pickle names")
        entry = self._directory.entry(name)
        if entry.nbytes < storage_nbytes(header):
            contradict(
                f"entry {name[:80]!r} has {entry.nbytes:,} bytes, its pickle names "
                f"{header.num_elements:,} elements of {header.dtype}"
            )
        return Storage(
            self._content(entry),
            0,
            header.num_elements,
            header.dtype,
            is_mapped=True,
            is_big_endian=self._is_big_endian,
        )

    def _content(self, entry: ZipEntry) -> Any:
        """The content of an entry, whose checksum is looked at once."""
        name, content = self._inflated
        if name != entry.name or content is None:
            content = _content(
                self._mapped, entry, self._limits, check=entry.name not in self._checked
            )
            self._checked.add(entry.name)
            if entry.method != STORED:
                # Several tensors may be views of it.
                self._inflated = entry.name, content
        return content


def _content(mapped: MappedFile, entry: ZipEntry, limits: PickleLimits, *, check: bool) -> Any:
    return entry_content(
        mapped,
        entry,
        str(mapped.path),
        max_expansion=limits.max_expansion,
        grace_nbytes=limits.expansion_grace_nbytes,
        check=check,
    )


class _MappedSource(FileSource):
    """A part of a mapped file, which is a pickle."""

    def __init__(self, mapped: MappedFile, start: int, nbytes: int) -> None:
        self.path = mapped.path
        self.compression = None
        self.compressed_size = nbytes
        self._exact_bound = True
        self._inflater = None
        self._raw = _Window(mapped, start, nbytes)  # type: ignore[assignment]
        self.file = io.BufferedReader(self._raw, _BUFFER_NBYTES)


class _Window(io.RawIOBase):
    """A part of a mapped file as a file."""

    def __init__(self, mapped: MappedFile, start: int, nbytes: int) -> None:
        self._mapped = mapped
        self._start = start
        self._nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        nbytes = max(0, min(len(buffer), self._nbytes - self._position))
        found = self._mapped.view(self._start + self._position, nbytes)
        memoryview(buffer)[:nbytes] = found.data
        self._position += nbytes
        return nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = (0, self._position, self._nbytes)[whence]
        self._position = max(0, origin + offset)
        return self._position


# --- the old format ------------------------------------------------------------------------------


class OldTorchStream(_TorchStream):
    """A file of torch.save, as it wrote before torch 1.6."""

    _start = 0

    def _make_source(self) -> FileSource:
        if self._storages is None:
            self._start, is_big_endian = _read_preamble(self._mapped, self._limits)
            with _Headers(self._mapped, self._start, self._limits) as first_pass:
                for _ in first_pass:
                    pass
            places = first_pass.places()
            self._storages = _RowStorages(self._mapped, places, is_big_endian=is_big_endian)
        return _source_at(self._mapped, self._start)

    def _ends(self, cursor: Cursor) -> bool:
        """Nothing else: the storages follow, and have been found."""
        return True


def _source_at(mapped: MappedFile, start: int) -> FileSource:
    source = _MappedSource(mapped, 0, mapped.nbytes)
    source.file.seek(start)
    return source


def _read_preamble(mapped: MappedFile, limits: PickleLimits) -> tuple[int, bool]:
    """Where the pickle of the value begins, and whether numbers are in big-endian order."""
    with _source_at(mapped, 0) as source:
        machine = Machine(source, limits)
        try:
            magic, version, system = (machine.load() for _ in range(3))
            if magic != MAGIC or version != PROTOCOL or type(system) is not dict:
                contradict(f"a file of torch.save has the version {version!r}, expected {PROTOCOL}")
        except TruncatedError as error:
            raise source.truncated_error(str(error)) from None
        except INVALID as error:
            raise locate(error, machine, str(mapped.path)) from error
        return source.inflated_bytes, system.get("little_endian") is False


class _Headers(_EngineStream):
    """Reads the pickle to its end, to know which storages follow it and how long each is."""

    def __init__(self, mapped: MappedFile, start: int, limits: PickleLimits) -> None:
        self._mapped = mapped
        self._start = start
        self._collected = _HeaderStorages(mapped.nbytes)
        self._keys: list[str] = []
        self._end = 0
        super().__init__(mapped.path, limits=limits)

    def _check_kind(self) -> None:
        """Do nothing: the pickle begins later in the file."""

    def _make_source(self) -> FileSource:
        self._storages = self._collected
        return _source_at(self._mapped, self._start)

    def _ends(self, cursor: Cursor) -> bool:
        keys = cursor.check(Machine(cursor.source, self._limits).load)
        if type(keys) is not list or any(type(each) is not str for each in keys):
            cursor.check(partial(contradict, "the names of the storages are not a list of str"))
        self._keys, self._end = keys, cursor.source.inflated_bytes
        return True

    def places(self) -> dict[str, tuple[int, StorageHeader]]:
        """Where each storage's numbers begin, by name."""
        mapped = self._mapped
        headers = self._collected.headers
        if len(set(self._keys)) != len(self._keys) or set(self._keys) != set(headers):
            message = f"{self.path}: its pickle names other storages than follow it"
            raise ConversionError(message)
        places, start = {}, self._end
        for key in self._keys:
            header = headers[key]
            declared = int.from_bytes(mapped.read_at(start, 8), "little")
            start += 8
            end = start + storage_nbytes(header)
            if end > mapped.nbytes or declared != header.num_elements:
                message = (
                    f"{self.path}: storage {key!r} has {header.num_elements:,} elements of "
                    f"{header.dtype} at byte {start:,}, found {declared:,} in a file of "
                    f"{mapped.nbytes:,} bytes; it is not complete, copy it again"
                )
                raise ConversionError(message)
            places[key] = start, header
            start = end
        if start != mapped.nbytes:
            message = (
                f"{self.path}: {mapped.nbytes - start:,} bytes follow the last storage. If several "
                "torch.save calls wrote into this file, write one file per call"
            )
            raise ConversionError(message)
        return places


class _HeaderStorages:
    """Storages without numbers: notes which there are."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.headers: dict[str, StorageHeader] = {}

    def find(self, persistent_id: Any) -> Storage:
        header = parse_persistent_id(persistent_id)
        if storage_nbytes(header) > self.nbytes:
            contradict(
                f"a storage of {header.num_elements:,} {header.dtype} elements does not fit into a "
                f"file of {self.nbytes:,} bytes; it is not complete, copy it again"
            )
        known = self.headers.setdefault(header.key, header)
        if (known.dtype, known.num_elements) != (header.dtype, header.num_elements):
            contradict(f"storage {header.key[:40]!r} is named with two types or lengths")
        return Storage(None, 0, header.num_elements, header.dtype)


class _RowStorages:
    """Storages that follow each other after the pickle, as views of the file."""

    def __init__(
        self,
        mapped: MappedFile,
        places: dict[str, tuple[int, StorageHeader]],
        *,
        is_big_endian: bool,
    ) -> None:
        self.nbytes = mapped.nbytes
        self._mapped = mapped
        self._places = places
        self._is_big_endian = is_big_endian

    def find(self, persistent_id: Any) -> Storage:
        header = parse_persistent_id(persistent_id)
        start, _ = self._places[header.key]
        return Storage(
            self._mapped.view(start, storage_nbytes(header)),
            0,
            header.num_elements,
            header.dtype,
            is_mapped=True,
            is_big_endian=self._is_big_endian,
        )
