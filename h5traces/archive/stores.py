"""Read access to one archive file: through its index (the footer), or through HDF5."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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
from h5traces.storage.arrays import (
    check_chunks,
    check_shape,
    chunk_bounds,
    read_array,
    read_checked_array,
)
from h5traces.storage.codecs import get_codec
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import (
    COLUMNS,
    GROUP_ROWS,
    FooterTables,
    attrs_from_json,
    key_of,
    read_directory,
)
from h5traces.storage.footer_rows import FooterError, FooterRow, RowForm
from h5traces.storage.hdf5.reading import Hdf5Reader
from h5traces.storage.kernels import PLAN_CODECS
from h5traces.storage.plans import (
    UNKNOWN,
    Datasets,
    Layout,
    NothingRead,
    Part,
    Reading,
    Restoration,
    fitting,
    layouts_of,
)
from h5traces.storage.plans import Wanted as WantedDatasets
from h5traces.storage.scanning import metadata_checksum, scan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.limits import ReadLimits
    from h5traces.storage.arrays import ChunkBounds
    from h5traces.storage.files import ByteFile

    Longs = NDArray[np.int64]
    Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]
    # An object without digest and chunks; of a dataset, bounds of these and places in its row.
    Described = tuple[ObjectEntry, ChunkBounds | None, slice]
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


@dataclass(frozen=True, slots=True)
class BytesChecked:
    """What comparing all bytes of a file with the checksums of its index found."""

    num_chunks: int
    # Datasets that are not empty.
    num_datasets: int
    # By chunk, the sample (or `NO_ORDINAL`) and the path below it, or below the root.
    damaged: list[tuple[int, str]]
    # Whether all bytes outside of chunks are as written.
    rest_fits: bool


# Of what lies in no sample.
NO_ORDINAL: Final = -1
_NO_TYPE: Final = np.dtype("V0")
_DEFLATE: Final = PLAN_CODECS.index("deflate")
# About as many as the threads of a reader are in at once.
_SAMPLES_KEPT: Final = 8
# Forms of rows; samples of one run have one for each length. Of each, what some readers want.
_FORMS_KEPT: Final = 128
_LAYOUTS_KEPT: Final = 2


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
        self._nbytes = file.nbytes
        self._tables = FooterTables(file, self._directory)
        # Reading array by array takes the same sample again and again.
        self._samples: dict[int, FooterRow] = {}
        # By key of a row.
        self._forms: dict[bytes, StoredForm] = {}

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

    @property
    def hdf5_nbytes(self) -> int:
        """Where the HDF5 part ends and the index begins."""
        return self._directory.hdf5_nbytes

    def sample_place(self, index: int) -> str:
        """Absolute path of a sample's group."""
        return layout.sample_path(index)

    def keys(self) -> list[tuple[str | None, int | None]]:
        """Id and generation index of every sample, None for what it lacks; decodes no sample."""
        found = self._tables.column("ids")
        try:
            ids, generations = found
            keys = list(zip(ids, generations, strict=True))
            fits = all(map(isinstance, ids, repeat((str, NoneType)))) and all(
                map(isinstance, generations, repeat((int, NoneType)))
            )
        except (ValueError, TypeError) as error:
            message = f"the index's column ids holds no ids: {error}"
            raise FooterError(message) from error
        if not fits or len(keys) != self.num_samples:
            message = f"the index's column ids holds no ids of {self.num_samples} samples"
            raise FooterError(message)
        return keys

    def sample_attrs(self, index: int) -> Attrs:
        return _attrs(self._row(index).attrs)

    def samples_attrs(self) -> Iterator[Attrs]:
        """Attributes of every sample, in order."""
        return (_attrs(row.attrs) for row in islice(self._tables.rows(), self.num_samples))

    def sample(self, index: int) -> SampleEntry:
        row = self._row(index)
        return SampleEntry(index, _attrs(row.attrs), self._objects(row))

    def samples(self) -> Iterator[SampleEntry]:
        """All samples, in order."""
        for index, row in enumerate(islice(self._tables.rows(), self.num_samples)):
            yield SampleEntry(index, _attrs(row.attrs), self._objects(row))

    def scales(self) -> SampleEntry | None:
        """The objects of ``/scales`` by their paths below the root; None without scales."""
        if not self._directory.has_scales:
            return None
        objects = self._objects(self._row(self.num_samples))
        if layout.SCALES_GROUP not in objects:
            message = "the index says that there are scales, and lists none"
            raise FooterError(message)
        return SampleEntry(NO_ORDINAL, {}, objects)

    def _row(self, number: int) -> FooterRow:
        known = self._samples
        if number not in known:
            found = self._tables.row(number)
            # Another dict, as other threads may be looking into the full one.
            self._samples = known = {} if len(known) >= _SAMPLES_KEPT else known
            known[number] = found
            return found
        return known[number]

    def _objects(self, row: FooterRow) -> FooterObjects:
        return FooterObjects(self, row, self.form(row))

    def form(self, row: FooterRow) -> StoredForm:
        """What the row has in common with others."""
        found = self._forms.get(row.key)
        if found is None:
            found = self._new_form(row.form)
            # Another dict, as other threads may be looking into the full one.
            self._forms = known = {} if len(self._forms) >= _FORMS_KEPT else self._forms
            known[row.key] = found
        return found

    def _new_form(self, columns: RowForm) -> StoredForm:
        numbers, names = columns.object_name, self.names
        try:
            places = {names[number]: place for place, number in enumerate(numbers.tolist())}
        except IndexError as error:
            message = "the index's table of names is too short"
            raise FooterError(message) from error
        if len(places) != len(numbers):
            message = "the index's table of objects does not fit its names"
            raise FooterError(message)
        return StoredForm(columns, places)

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
        parts: dict[int, Part] = {}
        new: dict[int, tuple[FooterObjects, Any]] = {}
        for number, (sample, paths) in enumerate(wanted):
            objects = sample.objects
            if not isinstance(objects, FooterObjects) or not paths:
                continue
            theirs = restorations[number] if restorations else {}
            key = tuple(paths), tuple(theirs.items())
            layout = objects.form.layouts.get(key)
            if layout is not None:
                chunks = layout.chosen(objects.row.chunks)
                if layout.fits(chunks, self._nbytes):
                    parts[number] = Part(number, layout, chunks)
                    continue
            new[number] = objects, key
        for (number, (objects, key)), layout in zip(
            new.items(), self._layouts(list(new.values())), strict=True
        ):
            if layout.datasets:
                parts[number] = Part(number, layout, layout.chosen(objects.row.chunks))
            if len(layout.datasets) == len(key[0]):
                objects.form.keep(key, layout)
        nbytes = sum(part.layout.raw_nbytes for part in parts.values())
        # Chunks that overlap would inflate to any size.
        stored = sum(int(part.chunks[1].sum()) for part in parts.values())
        overlap = stored > len(wanted) * self._nbytes
        if not parts or overlap or (most_nbytes is not None and nbytes > most_nbytes):
            return NothingRead()
        in_order = [parts[number] for number in sorted(parts)]
        return Reading(self.file, in_order, workers, together=together)

    def _layouts(self, new: Sequence[tuple[FooterObjects, Any]]) -> list[Layout]:
        """Layouts of those datasets of some samples that fit; nothing of who has none."""
        if not new:
            return []
        wanted = self._datasets(new)
        fits = fitting(wanted.found, self._limits, self._nbytes)
        return layouts_of(wanted if fits.all() else wanted.chosen(fits))

    def _datasets(self, new: Sequence[tuple[FooterObjects, Any]]) -> WantedDatasets:
        """What the index says of datasets of some samples, by their paths and restorations."""
        forms = [objects.form.columns for objects, _ in new]

        def column(name: str) -> Longs:
            return np.concatenate([getattr(form, name) for form in forms]).astype(np.int64)

        counts = [len(paths) for _, (paths, _) in new]
        paths = [path for _, (some, _) in new for path in some]
        listed = [objects.places[path] for objects, (some, _) in new for path in some]
        sizes = [(len(form.object_ndim), int(form.chunk_ends[-1])) for form in forms]
        before = np.cumsum([(0, 0), *sizes], axis=0)[:-1]
        places = listed + np.repeat(before[:, 0], counts)
        # Of all objects, then of those that are wanted.
        num_axes, num_chunks = column("object_ndim"), column("object_num_chunks")
        first_axes, first_chunks = (np.cumsum(each) - each for each in (num_axes, num_chunks))
        num_axes, num_chunks, first_axes, first_chunks = (
            each[places] for each in (num_axes, num_chunks, first_axes, first_chunks)
        )
        # Bytes of text are an axis more, which no shuffle has taken for elements.
        axes = np.arange(int(num_axes.max(initial=0)) + 1)
        shape, chunk = np.ones((2, len(places), len(axes)), np.int64)
        has_axis = axes < num_axes[:, np.newaxis]
        of_axes = (first_axes[:, np.newaxis] + axes)[has_axis]
        shape[has_axis] = column("object_dims")[of_axes]
        chunk[has_axis] = column("object_chunk_dims")[of_axes]
        codecs = np.minimum(column("object_codec")[places], len(self._codec_numbers) - 1)
        codec = self._codec_numbers[codecs]
        types = [self._types.get(kind, _NO_TYPE) for kind in column("object_type")[places].tolist()]
        widths = np.array([each.itemsize if each.kind == "S" else 1 for each in types], np.int64)
        itemsizes = np.array([each.itemsize for each in types], np.int64) // widths
        shape[:, -1] = chunk[:, -1] = widths
        chunks = np.repeat(first_chunks - np.cumsum(num_chunks) + num_chunks, num_chunks)
        chunks += np.arange(len(chunks))
        columns = zip(*(objects.row.chunks for objects, _ in new), strict=True)
        found = Datasets(
            shape,
            chunk,
            num_axes,
            itemsizes,
            np.where((widths > 1) & (codec != _DEFLATE), UNKNOWN, codec),
            num_chunks,
            *(np.concatenate(each)[chunks] for each in columns),
        )
        own = chunks - np.repeat(np.repeat(before[:, 1], counts), num_chunks)
        given = [dict(theirs) for _, (_, theirs) in new]
        suiting = [None] * len(paths) if not any(given) else _suiting(paths, counts, found, given)
        return WantedDatasets(paths, types, found, suiting, own, counts)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _chunk_table(self) -> tuple[NDArray[np.int64], Table, int]:
        """How many chunks samples up to each have; offset, size, checksum of all; num_datasets."""
        parts: list[list[NDArray[Any]]] = [[np.empty(0, dtype)] for dtype in ("i8", "i8", "u8")]
        counts: list[int] = []
        num_datasets, rows = 0, self._tables.rows()
        # Joined group by group: views would keep all of their rows.
        while batch := list(islice(rows, GROUP_ROWS)):
            chunks = [row.chunks for row in batch]
            for part, columns in zip(parts, zip(*chunks, strict=True), strict=True):
                part.append(np.concatenate(columns))
            counts += [len(sizes) for _, sizes, _ in chunks]
            numbers = np.concatenate([row.form.object_num_chunks for row in batch])
            num_datasets += int(np.count_nonzero(numbers))
        offsets, sizes, checksums = map(np.concatenate, parts)
        return np.cumsum(counts), (offsets, sizes, checksums), num_datasets

    def structures_fit(self) -> bool:
        """Whether all bytes of the HDF5 part outside of chunks are as written."""
        _, (offsets, sizes, _), _ = self._chunk_table()
        end = self._directory.hdf5_nbytes
        if ((offsets < 0) | (sizes < 0) | (offsets > end - sizes)).any():
            return False
        found = metadata_checksum(self.file, offsets, sizes, end)
        return found == self._directory.metadata_checksum

    def check_bytes(
        self, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> BytesChecked:
        """Compare every byte of the file with the index's checksums.

        FooterError where a row or a column of the index is damaged; all of them are read.
        """
        for name in COLUMNS:
            self._tables.column(name)
        ends, table, num_datasets = self._chunk_table()
        offsets, sizes, _ = table
        end = self._directory.hdf5_nbytes
        # Chunks that overlap would be read again and again; floats, as the sum may be any.
        if sizes.astype(np.float64).sum() > end:
            message = f"the index's chunks overlap in {end} bytes"
            raise FooterError(message)
        scanned = scan(self.file, table, end, workers=workers, progress=progress)
        damaged = []
        for number in scanned.damaged:
            index = int(np.searchsorted(ends, number, side="right"))
            row = self._row(index)
            within = number - (int(ends[index - 1]) if index else 0)
            place = int(np.searchsorted(row.form.chunk_ends, within, side="right")) - 1
            ordinal = index if index < self.num_samples else NO_ORDINAL
            damaged.append((ordinal, self.entry(row, place).path))
        rest_fits = scanned.metadata_checksum == self._directory.metadata_checksum
        return BytesChecked(len(offsets), num_datasets, damaged, rest_fits)

    def sizes(self) -> dict[str, StoredSize]:
        """Sizes of all datasets by the first part of their path."""
        types = self._directory.types
        itemsizes = np.array([carrier_dtype(each).itemsize if each else 0 for each in types])
        firsts = list(dict.fromkeys(name.partition("/")[0] for name in self.names))
        kinds = np.array([firsts.index(name.partition("/")[0]) for name in self.names])
        totals = np.zeros((3, len(firsts)), dtype=np.int64)
        rows = self._tables.rows()
        while batch := list(islice(rows, GROUP_ROWS)):
            forms = [row.form for row in batch]
            number, kind, ndim, dims, chunks = (
                np.concatenate([getattr(form, name) for form in forms])
                for name in (
                    *("object_type", "object_name", "object_ndim"),
                    *("object_dims", "object_num_chunks"),
                )
            )
            stored = np.concatenate([row.chunks[1] for row in batch])
            try:
                raw, kind = itemsizes[number], kinds[kind]
            except IndexError as error:
                message = f"a row of the index does not fit its columns: {error}"
                raise FooterError(message) from error
            starts = np.cumsum(ndim, dtype=np.int64) - ndim
            for axis in range(int(ndim.max(initial=0))):
                has_axis = ndim > axis
                raw[has_axis] *= dims[starts[has_axis] + axis]
            of_chunk = np.repeat(np.where(raw > 0, kind, len(firsts)), chunks)
            width = len(firsts) + 1
            for total, values in enumerate(
                (
                    np.bincount(kind[raw > 0], minlength=width),
                    np.bincount(kind, raw, minlength=width),
                    np.bincount(of_chunk, stored, minlength=width),
                )
            ):
                totals[total] += values[:-1].astype(np.int64)
        return {name: StoredSize(*totals[:, place].tolist()) for place, name in enumerate(firsts)}

    @cached_property
    def _types(self) -> dict[int, np.dtype[Any]]:
        """Types by number; of a group, and of what no archive can hold, that of no bytes."""
        return {number: _type_of(each) for number, each in enumerate(self._directory.types)}

    @cached_property
    def _codec_numbers(self) -> Longs:
        """Numbers in plans, by number here; the last one is of all that the index has not."""
        known = {name: number for number, name in enumerate(PLAN_CODECS)}
        return np.array([*(known.get(each, UNKNOWN) for each in self._directory.codecs), UNKNOWN])

    @cached_property
    def names(self) -> list[str]:
        """Paths of objects by number."""
        return [str(name) for name in self._list("names")]

    @cached_property
    def _attr_sets(self) -> list[Attrs]:
        return [_attrs(attrs) for attrs in self._list("attrs")]

    def _list(self, name: str) -> list[Any]:
        document = self._tables.column(name)
        if not isinstance(document, list):
            message = f"the index's column {name} is not a list"
            raise FooterError(message)
        return document

    def facts(self, row: FooterRow, form: StoredForm, place: int) -> tuple[str, Attrs]:
        """Type, and attributes but the digest, of an object by its place in its row."""
        try:
            dtype = self._directory.types[form.types[place]]
            return dtype, self._attr_sets[row.attr_sets[place]]
        except IndexError as error:
            raise _misfit(place, error) from error

    def entry(self, row: FooterRow, place: int) -> ObjectEntry:
        """An object by its place in its row."""
        form = self.form(row)
        try:
            entry, bounds, chunks = self._described(form, place)
            attrs = dict(self._attr_sets[row.attr_sets[place]])
            if bounds is None:
                return ObjectEntry(entry.path, attrs)
            if row.with_digest[place]:
                attrs[DIGEST] = row.digests[32 * place : 32 * place + 32]
            table = ChunkTable(*(tuple(column[chunks]) for column in row.listed_chunks))
            # Here, so that what the footer cannot mean is neither read, copied nor reported.
            check_chunks(table, bounds, self._nbytes)
            return ObjectEntry(
                *(entry.path, attrs, entry.dtype, entry.shape, entry.chunk, entry.codec, table)
            )
        except FooterError:
            raise
        except (IndexError, ValueError, TypeError, ArchiveError) as error:
            raise _misfit(place, error) from error

    def _described(self, form: StoredForm, place: int) -> Described:
        """An object without what is its row's own; the errors of `entry`."""
        if place in form.described:
            return form.described[place]
        columns = form.columns
        path = self.names[int(columns.object_name[place])]
        dtype = self._directory.types[int(columns.object_type[place])]
        codec = self._directory.codecs[int(columns.object_codec[place])]
        bounds = None
        chunks = slice(*columns.chunk_ends[place : place + 2].tolist())
        entry = ObjectEntry(path)
        if dtype:
            dims = slice(*columns.axis_ends[place : place + 2].tolist())
            shape, chunk = columns.object_dims[dims], columns.object_chunk_dims[dims]
            zeros = (0,) * (chunks.stop - chunks.start)
            table = ChunkTable(zeros, zeros, zeros)
            entry = ObjectEntry(
                path, {}, dtype, tuple(shape.tolist()), tuple(chunk.tolist()), codec, table
            )
            get_codec(codec)
            check_shape(entry, self._limits)
            bounds = chunk_bounds(entry)
        form.described[place] = entry, bounds, chunks
        return form.described[place]

    def facts_of(self, objects: FooterObjects) -> FormFacts:
        """What checks of whole samples ask of a form; FooterError where an entry would be one."""
        form = objects.form
        if form.facts is None:
            bounds: NDArray[Any] = np.zeros((2, int(form.columns.chunk_ends[-1])), np.float64)
            num_datasets = raw_nbytes = 0
            try:
                for place in range(len(form.places)):
                    entry, found, chunks = self._described(form, place)
                    if found is not None:
                        bounds[:, chunks] = [[found.smallest], [found.largest]]
                        num_datasets += 1
                        raw_nbytes += entry.raw_nbytes
            except (IndexError, ValueError, TypeError, ArchiveError) as error:
                raise _misfit(place, error) from error
            form.facts = FormFacts(num_datasets, raw_nbytes, *bounds)
        return form.facts

    def fits(self, objects: FooterObjects) -> bool:
        """Whether no entry of a sample is an error; True says so, False may be wrong."""
        facts = self.facts_of(objects)
        offsets, sizes, _ = objects.row.chunks
        inside = (offsets > 0) & (sizes >= facts.smallest) & (sizes <= facts.largest)
        inside &= offsets <= self._nbytes - sizes
        known = max(objects.row.attr_sets, default=0) < len(self._attr_sets)
        return known and bool(inside.all()) and int(sizes.sum()) <= self._nbytes


class FormFacts(NamedTuple):
    """Numbers of datasets and of their raw bytes, and bounds of the sizes of all chunks."""

    num_datasets: int
    raw_nbytes: int
    smallest: NDArray[np.float64]
    largest: NDArray[np.float64]


class StoredForm:
    """What samples whose rows are of one form have in common, made once.

    Attributes
    ----------
    columns
        The columns that they share.
    places
        Place in them of every object, by path.
    types
        Number of the type of every object.
    described
        Of objects by place, what does not differ between samples.
    layouts
        How some datasets are read, by their paths and restorations.
    facts
        Of `FooterStore.facts_of`.
    needed
        Datasets of a whole sample, by what chooses them.
    """

    def __init__(self, columns: RowForm, places: dict[str, int]) -> None:
        self.columns, self.places = columns, places
        self.types: list[int] = columns.object_type.tolist()
        self.described: dict[int, Described] = {}
        self.layouts: dict[Any, Layout] = {}
        self.facts: FormFacts | None = None
        self.needed: dict[Any, tuple[str, ...]] = {}

    def keep(self, key: Any, layout: Layout) -> None:
        """Keep a layout for the next sample."""
        # Another dict, as other threads may be looking into the full one.
        known = {} if len(self.layouts) >= _LAYOUTS_KEPT else self.layouts
        known[key] = layout
        self.layouts = known


def _misfit(place: int, error: Exception) -> FooterError:
    return FooterError(f"object {place} of a row of the index does not fit its columns: {error}")


def _suiting(
    paths: Sequence[str],
    counts: Sequence[int],
    found: Datasets,
    given: Sequence[Mapping[str, Restoration]],
) -> list[Restoration | None]:
    """The restoration of every dataset that one suits, of those given for its sample."""
    facts = zip(found.shape.tolist(), found.chunk.tolist(), found.num_axes.tolist(), strict=True)
    owners = chain.from_iterable(map(repeat, given, counts))
    wanted = (theirs.get(path) for theirs, path in zip(owners, paths, strict=True))
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

    def __init__(self, store: FooterStore, row: FooterRow, form: StoredForm) -> None:
        self._store = store
        # For who plans to read many objects at once.
        self.row, self.form, self.places = row, form, form.places
        self._made: dict[str, ObjectEntry] = {}

    def __getitem__(self, path: str) -> ObjectEntry:
        # Reading an array takes its entry three times in a row, checks take all several times.
        made = self._made.get(path)
        if made is None:
            made = self._made[path] = self._store.entry(self.row, self.places[path])
        return made

    @property
    def raw_nbytes(self) -> int:
        """Bytes of all uncompressed arrays."""
        return self._store.facts_of(self).raw_nbytes

    @cached_property
    def key(self) -> Any:
        """Alike for samples that differ in the digests and chunks of their objects alone."""
        return self.row.key, self.row.attr_sets, self.row.with_digest.tobytes()

    @property
    def digests(self) -> dict[str, Any]:
        """Digests of all objects by path; None of one without."""
        digests, with_digest = self.row.digests, self.row.with_digest.tolist()
        return {
            path: digests[32 * place : 32 * place + 32]
            if with_digest[place]
            else self.facts(path)[1].get(DIGEST)
            for path, place in self.places.items()
        }

    def facts(self, path: str) -> tuple[str, Attrs]:
        """Type, and attributes but the digest, of one object; much faster than its entry."""
        return self._store.facts(self.row, self.form, self.places[path])

    def __contains__(self, path: object) -> bool:
        return path in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _attrs(document: Any) -> Attrs:
    """Attributes as the footer's JSON has them."""
    try:
        return attrs_from_json(document)
    except (ValueError, TypeError, AttributeError) as error:
        message = f"the index holds something other than attributes: {error}"
        raise FooterError(message) from error


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

    def keys(self) -> list[tuple[str | None, int | None]]:
        """Id and generation index of every sample, None for what it lacks."""
        return [key_of(attrs) for attrs in self.samples_attrs()]

    def sample_attrs(self, index: int) -> Attrs:
        return self._hdf5.sample_attributes(self._name_of(index))

    def samples_attrs(self) -> Iterator[Attrs]:
        """Attributes of every sample, in order."""
        return (self.sample_attrs(index) for index in range(self.num_samples))

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
