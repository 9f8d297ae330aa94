"""Read access to one archive file through its index (the footer)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice, repeat
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from h5traces.archive.stored_form import (
    StoredForm,
    Terms,
    kept,
    list_of,
    misfit,
    terms_of,
    wanted_of,
)
from h5traces.errors import ArchiveError, CorruptArchiveError, RemoteError
from h5traces.format import layout
from h5traces.format.digests import DIGEST
from h5traces.format.entries import (
    NO_ORDINAL,
    ChunkTable,
    ObjectEntry,
    SampleEntry,
    located,
)
from h5traces.storage.arrays import check_chunks, read_checked_array
from h5traces.storage.footer import FooterTables, attrs_from_json, read_directory
from h5traces.storage.footer_rows import FooterError, FooterRow
from h5traces.storage.plans import Layout, NothingRead, Part, Reading, fitting, layouts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from h5traces.format.document import Attrs
    from h5traces.format.limits import ReadLimits
    from h5traces.storage.files import ByteFile
    from h5traces.storage.plans import Restoration

    # A sample, and the paths of some of its datasets.
    Wanted = tuple[SampleEntry, Sequence[str]]

# About as many as the threads of a reader are in at once.
SAMPLES_KEPT: Final = 8
# Lists of datasets, one for each length of samples.
_NEEDED_KEPT: Final = 128


class FooterStore:
    """Reads through the footer: no HDF5, no lock, any number of threads.

    Samples are counted in the order of their names.
    """

    def __init__(self, file: ByteFile, limits: ReadLimits) -> None:
        self.file = file
        self._limits = limits
        self.directory = read_directory(file)
        self._nbytes = file.nbytes
        self.tables = FooterTables(file, self.directory)
        # Reading array by array takes the same sample again and again.
        self._rows: dict[int, FooterRow] = {}
        # Datasets of a whole sample, by what chooses them.
        self.needed: dict[Any, tuple[str, ...]] = {}

    @property
    def root_attrs(self) -> Attrs:
        return self.directory.archive

    @property
    def kinds(self) -> dict[str, Attrs]:
        """Attributes of the groups under ``/kinds``."""
        return self.directory.kinds

    @property
    def num_samples(self) -> int:
        return self.directory.num_samples

    @property
    def has_foreign(self) -> bool:
        """Whether the HDF5 part holds objects or attributes that are not the format's."""
        return self.directory.has_foreign

    def sample_place(self, index: int) -> str:
        """Absolute path of a sample's group."""
        return layout.sample_path(index)

    def keys(self) -> list[tuple[str | None, int | None]]:
        """Id and generation index of every sample, None for what it lacks; decodes no sample."""
        found = self.tables.column("ids")
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
        return _attrs(self.row(index).attrs)

    def samples_attrs(self) -> Iterator[Attrs]:
        """Attributes of every sample, in order."""
        return (_attrs(row.attrs) for row in islice(self.tables.rows(), self.num_samples))

    def sample(self, index: int) -> SampleEntry:
        row = self.row(index)
        return SampleEntry(index, _attrs(row.attrs), FooterObjects(self, row))

    def scales(self) -> SampleEntry | None:
        """The objects of ``/scales`` by their paths below the root; None without scales."""
        if not self.directory.has_scales:
            return None
        objects = FooterObjects(self, self.row(self.num_samples))
        if layout.SCALES_GROUP not in objects:
            message = "the index says that there are scales, and lists none"
            raise FooterError(message)
        return SampleEntry(NO_ORDINAL, {}, objects)

    def row(self, number: int) -> FooterRow:
        """What the index says of a sample; of the scales after the last one."""
        return kept(self._rows, number, lambda: self.tables.row(number), SAMPLES_KEPT)

    @cached_property
    def terms(self) -> Terms:
        """What rows refer to by number."""
        types, codecs = self.directory.types, self.directory.codecs
        names = map(str, list_of(self.tables, "names"))
        return terms_of(tuple(types), tuple(codecs), tuple(names), self._limits)

    def form(self, row: FooterRow) -> StoredForm:
        """What the row has in common with others."""
        return self.terms.form(row)

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
            known = objects.form.layout(key)
            if known is not None:
                chunks = known.chosen(objects.row.chunks)
                if known.fits(chunks, self._nbytes):
                    parts[number] = Part(number, known, chunks)
                    continue
            new[number] = objects, key
        layouts = self._layouts(list(new.values()))
        for (number, (objects, key)), made in zip(new.items(), layouts, strict=True):
            if made.datasets:
                parts[number] = Part(number, made, made.chosen(objects.row.chunks))
            if len(made.datasets) == len(key[0]):
                objects.form.keep(key, made)
        nbytes = sum(part.layout.raw_nbytes for part in parts.values())
        # Chunks that overlap would inflate to any size.
        stored = sum(int(part.chunks[1].sum()) for part in parts.values())
        overlap = stored > len(wanted) * self._nbytes
        if not parts or overlap or (most_nbytes is not None and nbytes > most_nbytes):
            return NothingRead()
        in_order = [parts[number] for number in sorted(parts)]
        return Reading(self.file, in_order, workers, together=together)

    def _layouts(self, new: Sequence[tuple[FooterObjects, Any]]) -> list[Layout]:
        """How the datasets of some samples that fit are read; of each sample, perhaps none."""
        if not new:
            return []
        found = wanted_of([(objects.form, objects.row, *key) for objects, key in new], self.terms)
        fits = fitting(found.found, self._limits, self._nbytes)
        return layouts_of(found if fits.all() else found.chosen(fits))

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @cached_property
    def _attr_sets(self) -> list[Attrs]:
        return [_attrs(attrs) for attrs in list_of(self.tables, "attrs")]

    def facts(self, row: FooterRow, form: StoredForm, place: int) -> tuple[str, Attrs]:
        """Type, and attributes but the digest, of an object by its place in its row."""
        try:
            dtype = self.directory.types[form.types[place]]
            return dtype, self._attr_sets[row.attr_sets[place]]
        except IndexError as error:
            raise misfit(place, error) from error

    def entry(self, row: FooterRow, place: int) -> ObjectEntry:
        """An object by its place in its row."""
        form = self.form(row)
        try:
            entry, bounds, chunks = form.described(place)
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
            raise misfit(place, error) from error

    def fits(self, objects: FooterObjects) -> bool:
        """Whether no entry of a sample is an error; True says so, False may be wrong."""
        facts = objects.form.facts
        offsets, sizes, _ = objects.row.chunks
        inside = (offsets > 0) & (sizes >= facts.smallest) & (sizes <= facts.largest)
        inside &= offsets <= self._nbytes - sizes
        known = max(objects.row.attr_sets, default=0) < len(self._attr_sets)
        return known and bool(inside.all()) and int(sizes.sum()) <= self._nbytes


class FooterObjects(Mapping[str, ObjectEntry]):
    """Objects of one sample; entries are made when asked for, since most readers want one."""

    def __init__(self, store: FooterStore, row: FooterRow) -> None:
        self._store = store
        # For those who plan to read many objects at once.
        self.row, self.form = row, store.form(row)
        self._places = self.form.places
        self._made: dict[str, ObjectEntry] = {}

    def __getitem__(self, path: str) -> ObjectEntry:
        # Reading an array takes its entry three times in a row, checks take all several times.
        made = self._made.get(path)
        if made is None:
            made = self._made[path] = self._store.entry(self.row, self._places[path])
        return made

    @property
    def raw_nbytes(self) -> int:
        """Bytes of all uncompressed arrays."""
        return self.form.facts.raw_nbytes

    @cached_property
    def key(self) -> Any:
        """Alike for samples that differ in the digests and chunks of their objects alone."""
        return self.row.key, self.row.attr_sets, self.row.with_digest.tobytes()

    def needed(self, key: Any, find: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """What `find` gives, which depends on the key and on what samples that are alike share."""
        whole = self.row.key, self.row.attr_sets, key
        return kept(self._store.needed, whole, find, _NEEDED_KEPT)

    @property
    def digests(self) -> dict[str, Any]:
        """Digests of all objects by path; None of one without."""
        digests, with_digest = self.row.digests, self.row.with_digest.tolist()
        return {
            path: digests[32 * place : 32 * place + 32]
            if with_digest[place]
            else self.facts(path)[1].get(DIGEST)
            for path, place in self._places.items()
        }

    def facts(self, path: str) -> tuple[str, Attrs]:
        """Type, and attributes but the digest, of one object; much faster than its entry."""
        return self._store.facts(self.row, self.form, self._places[path])

    def unlike_facts(self, paths: Iterable[str]) -> list[tuple[str, Attrs]]:
        """The same of several objects, once of those that are alike."""
        places, types, attrs = self._places, self.form.types, self.row.attr_sets
        unlike = {(types[place], attrs[place]): place for place in map(places.__getitem__, paths)}
        return [self._store.facts(self.row, self.form, place) for place in unlike.values()]

    def __contains__(self, path: object) -> bool:
        return path in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _attrs(document: Any) -> Attrs:
    """Attributes as the footer's JSON has them."""
    try:
        return attrs_from_json(document)
    except (ValueError, TypeError, AttributeError) as error:
        message = f"the index holds something other than attributes: {error}"
        raise FooterError(message) from error
