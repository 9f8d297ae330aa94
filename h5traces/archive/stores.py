"""Read access to one archive file: through its index (the footer), or through HDF5."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    RemoteError,
    UnsupportedEncodingError,
)
from h5traces.format import layout
from h5traces.format.digests import DIGEST
from h5traces.format.entries import ChunkTable, ObjectEntry, SampleEntry, carrier_dtype
from h5traces.storage.arrays import check_sizes, read_array, read_checked_array
from h5traces.storage.codecs import get_codec
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import (
    COLUMNS,
    FooterError,
    FooterTables,
    attrs_from_json,
    read_directory,
    scan,
)
from h5traces.storage.hdf5.reading import Hdf5Reader
from h5traces.storage.kernels import PLAN_CODECS
from h5traces.storage.plans import (
    UNKNOWN,
    Datasets,
    NothingRead,
    Reading,
    Restoration,
    fitting,
    joined,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.limits import ReadLimits
    from h5traces.storage.files import ByteFile

    Longs = NDArray[np.int64]
    # A sample, and the paths of some of its datasets.
    Wanted = tuple[SampleEntry, Sequence[str]]


@dataclass(frozen=True, slots=True)
class StoredSize:
    """Sizes of several datasets, before and after compression."""

    num_datasets: int = 0
    raw_nbytes: int = 0
    stored_nbytes: int = 0

    def __add__(self, other: StoredSize) -> StoredSize:
        return StoredSize(
            self.num_datasets + other.num_datasets,
            self.raw_nbytes + other.raw_nbytes,
            self.stored_nbytes + other.stored_nbytes,
        )


# Of what lies in no sample.
NO_ORDINAL: Final = -1
_NO_TYPE: Final = np.dtype("V0")
_DEFLATE: Final = PLAN_CODECS.index("deflate")


def located(error: ArchiveError, file: str, ordinal: int, path: str) -> ArchiveError:
    """The error with file, sample and object in front."""
    what = str(error).removeprefix(f"{file}: ")
    return type(error)(f"{file}: {object_place(ordinal, path)}: {what}")


def object_place(ordinal: int, path: str) -> str:
    """Absolute path of an object of a sample, or of one outside of all samples."""
    return f"/{path}" if ordinal == NO_ORDINAL else f"{layout.sample_path(ordinal)}/{path}"


class FooterStore:
    """Reads through the footer: no HDF5, no lock, any number of threads.

    Samples are counted in the order of their names.
    """

    def __init__(self, file: ByteFile, limits: ReadLimits) -> None:
        self.file = file
        self._limits = limits
        self._directory = read_directory(file)
        self._tables = FooterTables(file, self._directory)
        self._known_ends: dict[str, NDArray[np.int64]] = {}

    @property
    def root_attrs(self) -> Attrs:
        return self._directory.archive

    @property
    def kinds(self) -> dict[str, Attrs]:
        """Attributes of the groups under ``/kinds``."""
        return self._directory.kinds

    @property
    def num_samples(self) -> int:
        return self._directory.num_samples

    @property
    def has_foreign(self) -> bool:
        """Whether the HDF5 part holds objects or attributes that are not the format's."""
        return self._directory.has_foreign

    def sample_place(self, index: int) -> str:
        """Absolute path of a sample's group."""
        return layout.sample_path(index)

    def sample_attrs(self, index: int) -> Attrs:
        start, stop = self._bounds(self._ends("sample_attrs_nbytes"), index)
        text = self._tables.column("sample_attrs")[start:stop].tobytes()
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            message = f"the index's sample table is not JSON: {error}"
            raise FooterError(message) from error
        return _attrs(document)

    def sample(self, index: int) -> SampleEntry:
        return SampleEntry(index, self.sample_attrs(index), self._objects(index))

    def scales(self) -> SampleEntry | None:
        """The objects of ``/scales`` by their paths below the root; None without scales."""
        if not self._directory.has_scales:
            return None
        objects = self._objects(self.num_samples)
        if layout.SCALES_GROUP not in objects:
            message = "the index says that there are scales, and lists none"
            raise FooterError(message)
        return SampleEntry(NO_ORDINAL, {}, objects)

    def _objects(self, index: int) -> FooterObjects:
        """The objects of a sample by its index; those of the scales come after the last."""
        first, stop = self._bounds(self._ends("sample_num_objects"), index)
        numbers = self._tables.column("object_name")[first:stop].tolist()
        names = self.names
        try:
            rows = {names[number]: first + row for row, number in enumerate(numbers)}
        except IndexError as error:
            message = "the index's table of names is too short"
            raise FooterError(message) from error
        if len(rows) != stop - first:
            message = "the index's table of objects does not fit its names"
            raise FooterError(message)
        return FooterObjects(self, rows)

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        """Values of one dataset in its carrier dtype; bfloat16 as bits."""
        entry = sample.objects[path]
        try:
            if entry.chunks is not None and len(entry.chunks.offsets) > 1:
                with self.file.prefetched(entry.chunks.ranges):
                    found = self.begin([(sample, [path])], 1).arrays()
                if path in found:
                    return found[path]
            return read_checked_array(self.file, entry)
        except (CorruptArchiveError, RemoteError) as error:
            raise located(error, self.file.name, sample.ordinal, path) from error

    def begin(
        self,
        wanted: Sequence[Wanted],
        workers: int,
        *,
        together: bool = False,
        most_nbytes: int | None = None,
        restorations: Sequence[Mapping[str, Restoration]] = (),
    ) -> Reading:
        """Begin to read datasets of some samples; those that do not fit are left out.

        So are those of samples whose index is damaged, and all that take more than `most_nbytes`.
        `restorations` of every sample, by path, are applied to datasets that they suit.
        """
        names, types, parts = [], [], []
        for number, (sample, paths) in enumerate(wanted):
            if isinstance(sample.objects, FooterObjects):
                rows = np.array([sample.objects.rows[path] for path in paths], np.int64)
                with contextlib.suppress(FooterError, IndexError):
                    theirs, part = self._datasets(rows)
                    names += [(number, path) for path in paths]
                    types += theirs
                    parts.append(part)
        if not names:
            return NothingRead()
        found = joined(parts)
        fits = fitting(found, self._limits, self.file.nbytes)
        if not fits.all():
            names, types = list(compress(names, fits)), list(compress(types, fits))
            found = found.chosen(fits)
        nbytes = found.nbytes.sum()
        # Chunks that overlap would inflate to any size.
        overlap = found.sizes.sum() > len(wanted) * self.file.nbytes
        if not names or overlap or (most_nbytes is not None and nbytes > most_nbytes):
            return NothingRead()
        return Reading(
            *(self.file, names, types, found, workers),
            together=together,
            restorations=_suiting(names, found, restorations),
        )

    def _datasets(self, rows: Longs) -> tuple[list[np.dtype[Any]], Datasets]:
        """The types of datasets by their rows in the object table, and what the index claims."""
        column = self._tables.column
        num_axes = column("object_ndim")[rows].astype(np.int64)
        num_chunks = column("object_num_chunks")[rows].astype(np.int64)
        first_axes = self._ends("object_ndim")[rows]
        first_chunks = self._ends("object_num_chunks")[rows]
        most = self._tables.column("chunk_nbytes").size
        if (first_chunks + num_chunks > most).any():
            raise IndexError
        # Bytes of text are an axis more, which no shuffle has taken for elements.
        axes = np.arange(int(num_axes.max(initial=0)) + 1)
        shape, chunk = np.ones((2, len(rows), len(axes)), np.int64)
        codec = self._codec_numbers[column("object_codec")[rows]]
        has_axis = axes < num_axes[:, np.newaxis]
        places = (first_axes[:, np.newaxis] + axes)[has_axis]
        shape[has_axis] = column("object_dims")[places]
        chunk[has_axis] = column("object_chunk_dims")[places]
        types = [self._types[kind] for kind in column("object_type")[rows].tolist()]
        widths = np.array([each.itemsize if each.kind == "S" else 1 for each in types], np.int64)
        itemsizes = np.array([each.itemsize for each in types], np.int64) // widths
        shape[:, -1] = chunk[:, -1] = widths
        chunks = np.repeat(first_chunks - np.cumsum(num_chunks) + num_chunks, num_chunks)
        chunks += np.arange(len(chunks))
        return types, Datasets(
            shape,
            chunk,
            num_axes,
            itemsizes,
            np.where((widths > 1) & (codec != _DEFLATE), UNKNOWN, codec),
            num_chunks,
            self._chunk_offsets[chunks],
            column("chunk_nbytes")[chunks],
            column("chunk_checksum")[chunks],
        )

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def chunk_table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """Offsets, sizes and checksums of all chunks, in the order of samples and objects."""
        column = self._tables.column
        return self._chunk_offsets, column("chunk_nbytes"), column("chunk_checksum")

    def owner_of_chunk(self, number: int) -> tuple[int, str]:
        """Index of the sample, and path below it, that a row of the chunk table belongs to.

        Scales are of no sample, `NO_ORDINAL`; their paths are below the root.
        """
        row = int(np.searchsorted(self._ends("object_num_chunks"), number, side="right")) - 1
        sample = int(np.searchsorted(self._ends("sample_num_objects"), row, side="right")) - 1
        return sample if sample < self.num_samples else NO_ORDINAL, self.entry(row).path

    def check_bytes(
        self, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[int], bool]:
        """Compare every byte of the file with the index's checksums.

        Returns the damaged rows of the chunk table, and whether all other bytes are as written.
        FooterError where a column of the index is damaged; all of them are read.
        """
        for name in COLUMNS:
            self._tables.column(name)
        table = self.chunk_table()
        if len({len(column) for column in table}) > 1:
            message = "the index's columns of chunks have several lengths"
            raise FooterError(message)
        end = self._directory.hdf5_nbytes
        # Chunks that overlap would be read again and again; floats, as the sum may be any.
        if table[1].astype(np.float64).sum() > end:
            message = f"the index's chunks overlap in {end} bytes"
            raise FooterError(message)
        found = scan(self.file, table, end, workers=workers, progress=progress)
        return found.damaged, found.metadata_checksum == self._directory.metadata_checksum

    def sizes(self) -> dict[str, StoredSize]:
        """Sizes of all datasets by the first part of their path."""
        column = self._tables.column
        ndim, dims = column("object_ndim"), column("object_dims")
        starts = self._ends("object_ndim")[:-1]
        types = self._directory.types
        itemsizes = np.array([carrier_dtype(each).itemsize if each else 0 for each in types])
        raw = itemsizes[column("object_type")] if types else np.zeros(0, dtype=np.int64)
        for axis in range(int(ndim.max(initial=0))):
            has_axis = ndim > axis
            raw[has_axis] *= dims[starts[has_axis] + axis]
        stored = np.diff(self._ends("chunk_nbytes")[self._ends("object_num_chunks")])
        sizes: dict[str, StoredSize] = {}
        for number, name in enumerate(self.names):
            rows = (column("object_name") == number) & (raw > 0)
            part = StoredSize(int(rows.sum()), int(raw[rows].sum()), int(stored[rows].sum()))
            first = name.partition("/")[0]
            sizes[first] = sizes.get(first, StoredSize()) + part
        return sizes

    @cached_property
    def _types(self) -> list[np.dtype[Any]]:
        """Types by number; of a group, and of what no archive can hold, that of no bytes."""
        return [_type_of(each) for each in self._directory.types]

    @cached_property
    def _codec_numbers(self) -> Longs:
        """Numbers in plans, by number here."""
        known = {name: number for number, name in enumerate(PLAN_CODECS)}
        return np.array([known.get(each, UNKNOWN) for each in self._directory.codecs], np.int64)

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
            message = f"the index's column {name} is not a list"
            raise FooterError(message)
        return document

    def _bounds(self, ends: NDArray[np.int64], index: int) -> tuple[int, int]:
        """Where the rows of a sample begin and end."""
        if len(ends) != self.num_samples + 1 + self._directory.has_scales:
            message = f"the index's tables are not of {self.num_samples} samples"
            raise FooterError(message)
        start, stop = ends[index : index + 2].tolist()
        return start, stop

    def _ends(self, column: str) -> NDArray[np.int64]:
        """Where runs of the lengths in a column begin and end: one entry more than there are."""
        if column not in self._known_ends:
            counts = self._tables.column(column)
            ends = np.zeros(len(counts) + 1, dtype=np.int64)
            np.cumsum(counts, out=ends[1:])
            # Only now, as other threads look for it.
            self._known_ends[column] = ends
        return self._known_ends[column]

    @cached_property
    def _chunk_offsets(self) -> NDArray[np.int64]:
        sizes = self._tables.column("chunk_nbytes")
        offsets: NDArray[np.int64] = np.cumsum(self._tables.column("chunk_gap") + sizes) - sizes
        return offsets

    def facts(self, row: int) -> tuple[str, Attrs]:
        """Type, and attributes but the digest, of the object in a row of the object table."""
        column = self._tables.column
        try:
            dtype = self._directory.types[column("object_type")[row]]
            return dtype, self._attr_sets[column("object_attrs")[row]]
        except IndexError as error:
            message = f"row {row} of the index's object table does not fit its columns: {error}"
            raise FooterError(message) from error

    def entry(self, row: int) -> ObjectEntry:
        """The object in a row of the object table."""
        column = self._tables.column
        try:
            path = self.names[int(column("object_name")[row])]
            attrs = dict(self._attr_sets[int(column("object_attrs")[row])])
            dtype = self._directory.types[int(column("object_type")[row])]
            codec = self._directory.codecs[int(column("object_codec")[row])]
            if not dtype:
                return ObjectEntry(path, attrs)
            digest = column("object_digest")[16 * row : 16 * row + 16].tobytes()
            if any(digest):
                attrs[DIGEST] = digest.hex()
            dims = slice(*self._ends("object_ndim")[row : row + 2].tolist())
            chunks = slice(*self._ends("object_num_chunks")[row : row + 2].tolist())
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
            message = f"row {row} of the index's object table does not fit its columns: {error}"
            raise FooterError(message) from error
        return entry


def _suiting(
    names: Sequence[tuple[int, str]], found: Datasets, given: Sequence[Mapping[str, Restoration]]
) -> list[Restoration | None]:
    """The restoration of every dataset that one suits."""
    if not any(given):
        return []
    facts = zip(found.shape.tolist(), found.chunk.tolist(), found.num_axes.tolist(), strict=True)
    wanted = (given[number].get(path) for number, path in names)
    return [
        each if each is not None and each.suits(*fact) else None
        for each, fact in zip(wanted, facts, strict=True)
    ]


def _type_of(stored_type: str) -> np.dtype[Any]:
    try:
        return carrier_dtype(stored_type)
    except (UnsupportedEncodingError, TypeError):
        return _NO_TYPE


class FooterObjects(Mapping[str, ObjectEntry]):
    """Objects of one sample; entries are made when asked for, since most readers want one."""

    def __init__(self, store: FooterStore, rows: dict[str, int]) -> None:
        self._store = store
        self.rows = rows
        self._last: ObjectEntry | None = None

    def __getitem__(self, path: str) -> ObjectEntry:
        # Reading an array takes its entry three times in a row.
        last = self._last
        if last is None or last.path != path:
            last = self._last = self._store.entry(self.rows[path])
        return last

    def facts(self, path: str) -> tuple[str, Attrs]:
        """Type, and attributes but the digest, of one object; much faster than its entry."""
        return self._store.facts(self.rows[path])

    def __contains__(self, path: object) -> bool:
        return path in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _attrs(document: Any) -> Attrs:
    """Attributes as the footer's JSON has them."""
    try:
        return attrs_from_json(document)
    except (ValueError, TypeError, AttributeError) as error:
        message = f"the index holds something other than attributes: {error}"
        raise FooterError(message) from error


# About as many as the threads of a reader are in at once.
_SAMPLES_KEPT = 8


class Hdf5Store:
    """Reads through HDF5: for archives whose footer is missing or does not fit."""

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self._path, self._limits = path, limits
        self.file = LocalFile(path)
        self._reader = Hdf5Reader(path, limits)
        self._pid = os.getpid()
        # Reading array by array takes the same sample again and again.
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

    @property
    def has_foreign(self) -> bool:
        """Whether there may be objects or attributes that are not the format's."""
        return True

    def sample_place(self, index: int) -> str:
        """Absolute path of a sample's group."""
        return f"/{layout.SAMPLES_GROUP}/{self._name_of(index)}"

    def sample_attrs(self, index: int) -> Attrs:
        return self._hdf5.sample_attributes(self._name_of(index))

    def sample(self, index: int) -> SampleEntry:
        walked = self._walked
        if index not in walked:
            found = self._hdf5.sample(self._name_of(index))
            # Another dict, as other threads may be looking into the full one.
            self._walked = walked = {} if len(walked) >= _SAMPLES_KEPT else walked
            walked[index] = found
            return found
        return walked[index]

    def scales(self) -> SampleEntry | None:
        return self._hdf5.scales()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self.file.close()

    def _name_of(self, index: int) -> str:
        if index >= len(self._names):
            # The number came from an index that turned out to be wrong.
            message = (
                f"{self._path}: sample {index} is missing, as there are {len(self._names)} in the "
                "HDF5 part; the index lists more, open the file again"
            )
            raise CorruptArchiveError(message)
        return self._names[index]

    def check_index(self) -> None:
        """Read the table of samples, which no reader needs; CorruptArchiveError if damaged."""
        self._hdf5.index_table()

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        entry = sample.objects[path]
        if entry.codec is None and sample.ordinal == NO_ORDINAL:
            message = (
                f"{self._path}: /{path}: is not stored in chunks with shuffle and gzip, as scales "
                "are; 'h5traces calibrate' writes such files"
            )
            raise CorruptArchiveError(message)
        if entry.codec is None:
            return self._hdf5.read_values(layout.sample_name(sample.ordinal), entry)
        # Not through HDF5's own pipeline: where a chunk inflates short, it returns memory that
        # was never written.
        try:
            return read_array(self.file, entry, self._limits)
        except CorruptArchiveError as error:
            raise located(error, str(self._path), sample.ordinal, path) from error

    def begin(self, *_: object, **__: object) -> Reading:
        """Nothing: array after array is read."""
        return NothingRead()

    def sizes(self) -> dict[str, StoredSize]:
        sizes: dict[str, StoredSize] = {}
        for index in range(self.num_samples):
            for path, entry in self.sample(index).objects.items():
                if entry.raw_nbytes:
                    first = path.partition("/")[0]
                    part = StoredSize(1, entry.raw_nbytes, entry.stored_nbytes)
                    sizes[first] = sizes.get(first, StoredSize()) + part
        return sizes


Store = FooterStore | Hdf5Store
