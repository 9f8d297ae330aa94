"""One archive file behind one interface, whether its footer or its HDF5 part is read."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from h5traces import layout
from h5traces.archive.labels import read_sidecar, sidecar_path
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    NotAnArchiveError,
    RemoteError,
    SchemaError,
    StoredStateWarning,
    UnsupportedVersionError,
)
from h5traces.schema import ArchiveMetadata
from h5traces.schema.attributes import Attrs, from_attributes
from h5traces.storage.arrays import check_sizes, read_array, read_checked_array
from h5traces.storage.codecs import get_codec
from h5traces.storage.digests import dataset_digest
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import (
    COLUMNS,
    DIGEST,
    FooterError,
    FooterTables,
    attrs_from_json,
    read_directory,
)
from h5traces.storage.hdf5 import Hdf5Reader
from h5traces.storage.objects import (
    ChunkTable,
    ObjectEntry,
    SampleEntry,
    carrier_dtype,
    digest_type,
)
from h5traces.storage.remote import DEFAULT_REMOTE, RemoteFile, RemotePath
from h5traces.storage.scanning import scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.labels import FileLabels
    from h5traces.limits import ReadLimits
    from h5traces.storage.files import ByteFile
    from h5traces.storage.remote import RemoteOptions

_GROUP_TYPE = ""
_MOST_FEATURES_NAMED = 10
# By a reader through HDF5; about as many as its threads are in at once.
_SAMPLES_KEPT = 8


class Store(Protocol):
    """Read access to one archive file; samples are counted in the order of their names."""

    @property
    def file(self) -> ByteFile:
        """The bytes that chunk tables point into."""

    @property
    def root_attrs(self) -> Attrs:
        """Attributes of the root group."""

    @property
    def kinds(self) -> dict[str, Attrs]:
        """Attributes of the groups under ``/kinds``."""

    @property
    def num_samples(self) -> int:
        """Number of samples."""

    def sample(self, index: int) -> SampleEntry:
        """One sample and its objects."""

    def sample_attrs(self, index: int) -> Attrs:
        """Attributes of one sample."""

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        """Values of one dataset in its carrier dtype; bfloat16 as bits."""

    def sizes(self) -> dict[str, StoredSize]:
        """Sizes of all datasets by the first part of their path."""


@dataclass(frozen=True, slots=True)
class StoredSize:
    """Sizes of several datasets.

    Attributes
    ----------
    num_datasets
        How many.
    raw_nbytes, stored_nbytes
        Bytes before and after compression.
    """

    num_datasets: int = 0
    raw_nbytes: int = 0
    stored_nbytes: int = 0

    def __add__(self, other: StoredSize) -> StoredSize:
        return StoredSize(
            self.num_datasets + other.num_datasets,
            self.raw_nbytes + other.raw_nbytes,
            self.stored_nbytes + other.stored_nbytes,
        )


class FooterStore:
    """Reads through the footer: no HDF5, no lock, any number of threads."""

    def __init__(self, file: ByteFile, limits: ReadLimits) -> None:
        self.file = file
        self._limits = limits
        self._directory = read_directory(file)
        self._tables = FooterTables(file, self._directory)

    @property
    def root_attrs(self) -> Attrs:
        return self._directory.archive

    @property
    def kinds(self) -> dict[str, Attrs]:
        return self._directory.kinds

    @property
    def num_samples(self) -> int:
        return self._directory.num_samples

    def sample_attrs(self, index: int) -> Attrs:
        start, stop = self._bounds(self._attrs_ends, index)
        document = _parse(self._tables.column("sample_attrs")[start:stop].tobytes())
        return _attrs(document)

    def sample(self, index: int) -> SampleEntry:
        first, stop = self._bounds(self._object_ends, index)
        numbers = self._tables.column("object_name")[first:stop].tolist()
        names = self.names
        try:
            rows = {names[number]: first + row for row, number in enumerate(numbers)}
        except IndexError as error:
            message = "the footer's table of names is too short"
            raise FooterError(message) from error
        if len(rows) != stop - first:
            message = "the footer's table of objects does not fit its names"
            raise FooterError(message)
        return SampleEntry(index, self.sample_attrs(index), _FooterObjects(self, rows))

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        entry = sample.objects[path]
        try:
            return read_checked_array(self.file, entry)
        except (CorruptArchiveError, RemoteError) as error:
            raise _located(error, self.file.name, sample.ordinal, path) from error

    def close(self) -> None:
        """Close the file; for whoever opened it alone."""
        self.file.close()

    def chunk_table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """Offsets, sizes and checksums of all chunks, in the order of samples and objects."""
        column = self._tables.column
        return self._chunk_offsets, column("chunk_nbytes"), column("chunk_checksum")

    def owner_of_chunk(self, number: int) -> tuple[int, str]:
        """Index of the sample, and path below it, that a row of the chunk table belongs to."""
        row = int(np.searchsorted(self._chunk_ends, number, side="right")) - 1
        sample = int(np.searchsorted(self._object_ends, row, side="right")) - 1
        return sample, self.entry(row).path

    def check_bytes(
        self, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[int], bool]:
        """Compare every byte of the file with the footer's checksums.

        Returns
        -------
        list of int, bool
            Rows of the chunk table that are damaged; whether all other bytes are as written.

        Raises
        ------
        FooterError
            A column of the footer is damaged; all of them are read.
        """
        for name in COLUMNS:
            self._tables.column(name)
        table = self.chunk_table()
        if len({len(column) for column in table}) > 1:
            message = "the footer's columns of chunks have several lengths"
            raise FooterError(message)
        end = self._directory.hdf5_nbytes
        # Chunks that overlap would be read again and again; floats, as the sum may be any.
        if table[1].astype(np.float64).sum() > end:
            message = f"the footer's chunks overlap in {end} bytes"
            raise FooterError(message)
        found = scan(self.file, table, end, workers=workers, progress=progress)
        return found.damaged, found.metadata_checksum == self._directory.metadata_checksum

    def sizes(self) -> dict[str, StoredSize]:
        column = self._tables.column
        ndim, dims, starts = column("object_ndim"), column("object_dims"), self._dims_ends[:-1]
        types = self._directory.types
        itemsizes = np.array([carrier_dtype(each).itemsize if each else 0 for each in types])
        raw = itemsizes[column("object_type")] if types else np.zeros(0, dtype=np.int64)
        for axis in range(int(ndim.max(initial=0))):
            has_axis = ndim > axis
            raw[has_axis] *= dims[starts[has_axis] + axis]
        stored = np.diff(_ends(column("chunk_nbytes"))[self._chunk_ends])
        sizes: dict[str, StoredSize] = {}
        for number, name in enumerate(self.names):
            rows = (column("object_name") == number) & (raw > 0)
            part = StoredSize(int(rows.sum()), int(raw[rows].sum()), int(stored[rows].sum()))
            first = name.partition("/")[0]
            sizes[first] = sizes.get(first, StoredSize()) + part
        return sizes

    @cached_property
    def names(self) -> list[str]:
        """Paths of objects by number."""
        return [str(name) for name in self._list("names_json")]

    @cached_property
    def _attr_sets(self) -> list[Attrs]:
        return [_attrs(attrs) for attrs in self._list("attrs_json")]

    def _list(self, name: str) -> list[Any]:
        document = self._tables.document(name)
        if not isinstance(document, list):
            message = f"the footer's column {name} is no list"
            raise FooterError(message)
        return document

    def _bounds(self, ends: NDArray[np.int64], index: int) -> tuple[int, int]:
        """Where the rows of a sample begin and end."""
        if len(ends) != self.num_samples + 1:
            message = f"the footer's tables are not of {self.num_samples} samples"
            raise FooterError(message)
        start, stop = ends[index : index + 2].tolist()
        return start, stop

    @cached_property
    def _attrs_ends(self) -> NDArray[np.int64]:
        return _ends(self._tables.column("sample_attrs_nbytes"))

    @cached_property
    def _object_ends(self) -> NDArray[np.int64]:
        return _ends(self._tables.column("sample_num_objects"))

    @cached_property
    def _dims_ends(self) -> NDArray[np.int64]:
        return _ends(self._tables.column("object_ndim"))

    @cached_property
    def _chunk_ends(self) -> NDArray[np.int64]:
        return _ends(self._tables.column("object_num_chunks"))

    @cached_property
    def _chunk_offsets(self) -> NDArray[np.int64]:
        sizes = self._tables.column("chunk_nbytes")
        offsets: NDArray[np.int64] = np.cumsum(self._tables.column("chunk_gap") + sizes) - sizes
        return offsets

    def entry(self, row: int) -> ObjectEntry:
        """The object in a row of the object table."""
        column = self._tables.column
        try:
            path = self.names[int(column("object_name")[row])]
            attrs = dict(self._attr_sets[int(column("object_attrs")[row])])
            dtype = self._directory.types[int(column("object_type")[row])]
            codec = self._directory.codecs[int(column("object_codec")[row])]
            if dtype == _GROUP_TYPE:
                return ObjectEntry(path, attrs)
            digest = column("object_digest")[16 * row : 16 * row + 16].tobytes()
            if any(digest):
                attrs[DIGEST] = digest.hex()
            dims = slice(*self._dims_ends[row : row + 2].tolist())
            chunks = slice(*self._chunk_ends[row : row + 2].tolist())
            entry = ObjectEntry(
                path,
                attrs,
                dtype,
                tuple(column("object_dims")[dims].tolist()),
                tuple(column("object_chunk_dims")[dims].tolist()),
                codec,
                ChunkTable(
                    tuple(self._chunk_offsets[chunks].tolist()),
                    tuple(column("chunk_nbytes")[chunks].tolist()),
                    tuple(column("chunk_checksum")[chunks].tolist()),
                ),
            )
            # Here, so that what the footer cannot mean is neither read, copied nor reported.
            get_codec(codec)
            check_sizes(entry, self._limits, self.file.nbytes)
        except FooterError:
            raise
        except (IndexError, ValueError, TypeError, ArchiveError) as error:
            message = f"row {row} of the footer's object table does not fit its columns: {error}"
            raise FooterError(message) from error
        return entry


class _FooterObjects(Mapping[str, ObjectEntry]):
    """Objects of one sample; entries are made when asked for, since most readers want one."""

    def __init__(self, store: FooterStore, rows: dict[str, int]) -> None:
        self._store = store
        self._rows = rows
        self._last: ObjectEntry | None = None

    def __getitem__(self, path: str) -> ObjectEntry:
        # Whoever reads an array asks for its entry three times in a row.
        last = self._last
        if last is None or last.path != path:
            last = self._last = self._store.entry(self._rows[path])
        return last

    def __contains__(self, path: object) -> bool:
        return path in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class Hdf5Store:
    """Reads through HDF5: for archives whose footer is missing or does not fit."""

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self._path, self._limits = path, limits
        self.file = LocalFile(path)
        self._reader = Hdf5Reader(path, limits)
        self._pid = os.getpid()
        # Whoever reads array by array asks for the same sample again and again.
        self._walked: dict[int, SampleEntry] = {}

    @property
    def _hdf5(self) -> Hdf5Reader:
        # HDF5's state does not survive a fork.
        if self._pid != os.getpid():
            self._reader = Hdf5Reader(self._path, self._limits)
            self._pid = os.getpid()
        return self._reader

    @cached_property
    def root_attrs(self) -> Attrs:
        return self._hdf5.root_attributes()

    @cached_property
    def kinds(self) -> dict[str, Attrs]:
        return self._hdf5.kinds()

    @cached_property
    def _names(self) -> list[str]:
        return self._hdf5.sample_names()

    @property
    def num_samples(self) -> int:
        return len(self._names)

    def sample_attrs(self, index: int) -> Attrs:
        return self._hdf5.sample_attributes(self._names[index])

    def sample(self, index: int) -> SampleEntry:
        walked = self._walked
        if index not in walked:
            found = self._hdf5.sample(self._names[index])
            # Another dict, as other threads may be looking into the full one.
            self._walked = walked = {} if len(walked) >= _SAMPLES_KEPT else walked
            walked[index] = found
            return found
        return walked[index]

    def close(self) -> None:
        """Close the file; for whoever opened it alone."""
        self._reader.close()
        self.file.close()

    def check_index(self) -> None:
        """Read the table of samples, which no reader needs.

        Raises
        ------
        CorruptArchiveError
            It is damaged.
        """
        self._hdf5.index_table()

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        entry = sample.objects[path]
        if entry.codec is None:
            return self._hdf5.read_values(layout.sample_name(sample.ordinal), entry)
        # Not through HDF5's own pipeline: where a chunk inflates short, it returns memory that
        # was never written.
        try:
            return read_array(self.file, entry, self._limits)
        except CorruptArchiveError as error:
            raise _located(error, str(self._path), sample.ordinal, path) from error

    def sizes(self) -> dict[str, StoredSize]:
        sizes: dict[str, StoredSize] = {}
        for index in range(self.num_samples):
            for path, entry in self.sample(index).objects.items():
                if entry.raw_nbytes:
                    first = path.partition("/")[0]
                    part = StoredSize(1, entry.raw_nbytes, entry.stored_nbytes)
                    sizes[first] = sizes.get(first, StoredSize()) + part
        return sizes


def _attrs(document: Any) -> Attrs:
    """Attributes as the footer's JSON has them."""
    try:
        return attrs_from_json(document)
    except (ValueError, TypeError, AttributeError) as error:
        message = f"the footer holds something else than attributes: {error}"
        raise FooterError(message) from error


def _ends(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Where runs of these lengths begin and end: one entry more than there are runs."""
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ends[1:])
    return ends


def _parse(document: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(document)
    except (ValueError, RecursionError) as error:
        message = f"the footer's sample table is no JSON: {error}"
        raise FooterError(message) from error
    if not isinstance(parsed, dict):
        message = "the footer's sample table holds something else than attributes"
        raise FooterError(message)
    return parsed


def _located(error: ArchiveError, file: str, ordinal: int, path: str) -> ArchiveError:
    what = str(error).removeprefix(f"{file}: ")
    return type(error)(f"{file}: {layout.sample_path(ordinal)}/{path}: {what}")


class ArchiveFile:
    """One archive file: opens when needed, survives pickling and fork, falls back to HDF5.

    Parameters
    ----------
    path
        The file, or the address of one.
    limits
        What it may ask of its reader.
    opened
        Called whenever the file was opened, so that others can be closed.
    remote
        How to read it where it is an address; then it must have a footer.
    label_folder
        Where its labels lie, if not beside it; False to read none.

    Raises
    ------
    NotAnArchiveError
        The file is no archive.
    RemoteError
        The server cannot be reached, or refuses.
    UnsupportedVersionError
        It was written in a newer format.
    """

    def __init__(
        self,
        path: Path | RemotePath,
        limits: ReadLimits,
        *,
        opened: Callable[[ArchiveFile], None] | None = None,
        remote: RemoteOptions = DEFAULT_REMOTE,
        label_folder: Path | Literal[False] | None = None,
    ) -> None:
        self.path = path
        self._limits = limits
        self._remote = remote
        self._opened = opened
        self._store: Store | None = None
        self._without_footer = False
        self.metadata = self._read_metadata(self.store)
        self.num_samples = self.store.num_samples
        self.labels = self._read_labels(label_folder)
        if self.num_samples != self.metadata.num_samples:
            self._warn(
                f"holds {self.num_samples} samples, its metadata says {self.metadata.num_samples}; "
                "it was edited"
            )

    @property
    def store(self) -> Store:
        """The store in use; opened on first use in a process, and again after `close`."""
        # Local, so that a `close` in another thread cannot take it away in between.
        store = self._store
        if store is None:
            store = self._open()
            if hasattr(self, "metadata"):
                self._check_same(store)
            self._store = store
            if self._opened is not None:
                self._opened(self)
        return store

    @property
    def metadata_kinds(self) -> tuple[str, ...]:
        """Names of the kinds of arrays that the archive declares."""
        return tuple(self.store.kinds)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers that are stored, of the first kind that has layers."""
        for kind in (layout.HIDDEN_STATES, layout.ATTENTIONS, *self.store.kinds):
            layers = self.store.kinds.get(kind, {}).get("layers", ())
            if isinstance(layers, tuple) and layers:
                return layers
        return ()

    @property
    def has_footer(self) -> bool:
        """Whether the archive is read through its footer."""
        return isinstance(self.store, FooterStore)

    def sample(self, index: int) -> SampleEntry:
        """One sample and its objects."""
        try:
            return self.store.sample(index)
        except FooterError as error:
            return self._fall_back(error).sample(index)

    def sample_attrs(self, index: int) -> Attrs:
        """Attributes of one sample."""
        try:
            return self.store.sample_attrs(index)
        except FooterError as error:
            return self._fall_back(error).sample_attrs(index)

    def entry(self, sample: SampleEntry, path: str) -> ObjectEntry:
        """One object of a sample; KeyError where there is none."""
        try:
            return sample.objects[path]
        except FooterError as error:
            return self._fall_back(error).sample(sample.ordinal).objects[path]

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        """Values of one dataset in its carrier dtype; bfloat16 as bits."""
        try:
            store = self.store
            values = store.read(sample, path)
        except FooterError as error:
            store = self._fall_back(error)
            sample = store.sample(sample.ordinal)
            values = store.read(sample, path)
        if isinstance(store, Hdf5Store):
            self._warn_of_edit(sample, sample.objects[path], values)
        return values

    def _warn_of_edit(self, sample: SampleEntry, entry: ObjectEntry, values: NDArray[Any]) -> None:
        """No checksum of HDF5's shows that two chunks were exchanged; the digest does."""
        expected = entry.attrs.get(DIGEST)
        if entry.codec is None or expected is None:
            return
        if dataset_digest(digest_type(entry.dtype), values) != expected:
            self._warn(
                f"{layout.sample_path(sample.ordinal)}/{entry.path}: the values do not fit their "
                "digest; they were edited, or exchanged by damage"
            )

    def sizes(self) -> dict[str, StoredSize]:
        """Sizes of all datasets by the first part of their path."""
        try:
            return self.store.sizes()
        except FooterError as error:
            return self._fall_back(error).sizes()

    @contextlib.contextmanager
    def prefetched(
        self, ranges: Iterable[tuple[int, int]], samples: Iterable[int]
    ) -> Iterator[None]:
        """Inside the block, these ranges of some samples are read from memory; on servers only.

        Raises
        ------
        RemoteError, CorruptArchiveError
            They cannot be fetched; the message names the samples.
        """
        with contextlib.ExitStack() as fetched:
            file = self.store.file
            try:
                fetched.enter_context(file.prefetched(ranges))
            except (CorruptArchiveError, RemoteError) as error:
                places = ", ".join(layout.sample_path(each) for each in sorted(set(samples)))
                what = str(error).removeprefix(f"{file.name}: ")
                message = f"{file.name}: {places}: {what}"
                raise type(error)(message) from error
            yield

    def close(self) -> None:
        """Let go of the open file; the next use opens it again."""
        store, self._store = self._store, None
        if store is not None:
            store.file.close()

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.store.file.nbytes

    def _open(self) -> Store:
        if isinstance(self.path, RemotePath):
            return self._open_remote(self.path)
        if not self._without_footer:
            try:
                return FooterStore(LocalFile(self.path), self._limits)
            except FooterError as error:
                store = Hdf5Store(self.path, self._limits)
                if store.root_attrs.get("format") != layout.FORMAT_NAME:
                    raise self._not_an_archive() from None
                self._without_footer = True
                self._warn_without_footer(error)
                return store
        return Hdf5Store(self.path, self._limits)

    def _open_remote(self, path: RemotePath) -> Store:
        file = RemoteFile(path, self._remote)
        try:
            return FooterStore(file, self._limits)
        except FooterError as error:
            if file.read_at(0, min(8, file.nbytes)) != layout.HDF5_SIGNATURE:
                message = f"{path}: is no HDF5 file, so no h5traces archive"
                raise NotAnArchiveError(message) from None
            raise self._needs_footer(error) from error

    def _needs_footer(self, error: FooterError) -> CorruptArchiveError:
        return CorruptArchiveError(
            f"{self.path}: {error}; without a footer, HDF5 would read an archive on a server piece "
            "by tiny piece; download it, run 'h5traces seal' on it, and upload it again"
        )

    def _fall_back(self, error: FooterError) -> Store:
        """Switch to HDF5 for good; the footer turned out to be damaged while reading."""
        if isinstance(self.path, RemotePath):
            raise self._needs_footer(error) from error
        if not self._without_footer:
            self._without_footer = True
            self._warn_without_footer(error)
            self._store = None
        return self.store

    def _warn_without_footer(self, error: FooterError) -> None:
        self._warn(f"{error}; reading through HDF5, run 'h5traces seal {self.path}' for speed")

    def _warn(self, message: str) -> None:
        warnings.warn(f"{self.path}: {message}", StoredStateWarning, stacklevel=2)

    def _not_an_archive(self) -> NotAnArchiveError:
        return NotAnArchiveError(
            f"{self.path}: is HDF5, but no h5traces archive: the root attribute 'format' is not "
            "'h5traces'; expected a file that 'h5traces convert' or 'h5traces.create' wrote"
        )

    def _read_metadata(self, store: Store) -> ArchiveMetadata:
        attrs = store.root_attrs
        if attrs.get("format") != layout.FORMAT_NAME:
            raise self._not_an_archive()
        check_version(attrs, str(self.path))
        try:
            metadata = from_attributes(ArchiveMetadata, attrs)
        except SchemaError as error:
            message = f"{self.path}: /: {error}"
            raise SchemaError(message, error.problems) from error
        if not metadata.complete:
            message = (
                f"{self.path}: the archive was not finished ('complete' is not set); run the "
                "command that wrote it again"
            )
            raise CorruptArchiveError(message)
        return metadata

    def _read_labels(self, folder: Path | Literal[False] | None) -> FileLabels | None:
        place = None if folder is False else sidecar_path(self.path, folder)
        labels = None if place is None else read_sidecar(place)
        if labels is not None:
            labels.check(self.path, self.metadata.archive_id)
        return labels

    def _check_same(self, store: Store) -> None:
        found = store.root_attrs.get("archive_id")
        if found != self.metadata.archive_id:
            message = (
                f"{self.path}: the file was replaced since it was opened (archive_id {found}, "
                f"expected {self.metadata.archive_id}); open it again"
            )
            raise CorruptArchiveError(message)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}


def _name(value: object) -> str:
    if not isinstance(value, str):
        message = f"{value!r} is no name"
        raise TypeError(message)
    return value


def check_version(attrs: Attrs, place: str) -> None:
    """Refuse an archive that this release cannot read rightly.

    Raises
    ------
    UnsupportedVersionError
        Its major version is newer, or it requires a feature that is unknown here.
    """
    version = str(attrs.get("format_version", ""))
    found = layout.parse_version(version)
    if found is None or found[0] != layout.FORMAT_MAJOR:
        message = (
            f"{place}: format version is {version!r}, this release reads major version "
            f"{layout.FORMAT_MAJOR}; upgrade h5traces, or use the release that wrote the archive"
        )
        raise UnsupportedVersionError(message)
    features = attrs.get("required_features", "[]")
    try:
        required = {_name(each) for each in json.loads(str(features))}
    except (ValueError, TypeError, RecursionError) as error:
        message = f"{place}: required_features {str(features)[:80]!r} is no list of names"
        raise CorruptArchiveError(message) from error
    unknown = sorted(required - layout.KNOWN_FEATURES)
    if unknown:
        names = ", ".join(unknown[:_MOST_FEATURES_NAMED])[:1000]
        message = f"{place}: the archive requires {names}; upgrade h5traces"
        raise UnsupportedVersionError(message)
