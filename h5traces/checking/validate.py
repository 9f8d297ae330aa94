"""Checks the structure of archives against ``schema/SPEC.md``, and their footers against HDF5.

Every object is looked at through HDF5, and nothing is written. `h5traces.checking.meaning` reads
the arrays.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from h5traces.archive.agreement import differences
from h5traces.archive.file import check_format, check_version
from h5traces.archive.footer_store import FooterObjects, FooterStore
from h5traces.archive.foreign import error_for
from h5traces.archive.labels import label_problems
from h5traces.archive.whole_file import structures_fit
from h5traces.arguments import checked
from h5traces.checking.helpers import helping
from h5traces.checking.isolated import validate_isolated
from h5traces.checking.meaning import check_meaning
from h5traces.checking.objects import (
    encoding_problems,
    float_type,
    sample_problems,
    scale_problems,
    scale_widths,
)
from h5traces.checking.reports import Reports, ValidationReport
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    H5TracesError,
    Problem,
    SchemaError,
)
from h5traces.format import layout, text
from h5traces.format.archive import ArchiveMetadata, KindMetadata
from h5traces.format.digests import (
    DIFFERENT_SAMPLE,
    DIGEST,
    ObjectsDigest,
    sample_difference,
)
from h5traces.format.document import Attrs, from_attributes, unknown_attributes
from h5traces.format.limits import DEFAULT_LIMITS, ReadLimits
from h5traces.format.precision import CalibrationRecord
from h5traces.format.record import EXCERPTS, IndexRow, TraceMetadata, index_columns
from h5traces.meaning.checks import CheckOptions
from h5traces.paths import expand_paths
from h5traces.ranks.rank import share_of
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import key_of
from h5traces.storage.footer_rows import FooterError
from h5traces.storage.hdf5.headers import HeaderCheck
from h5traces.storage.hdf5.reading import Hdf5Reader, problem_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from h5traces.checking.isolated import IsolationLimits
    from h5traces.checking.objects import Contradiction
    from h5traces.format.document import Document
    from h5traces.format.entries import SampleEntry
    from h5traces.paths import PathLike

_ROOT_GROUPS: Final = frozenset({layout.KINDS_GROUP, layout.SAMPLES_GROUP, layout.INDEX_GROUP})
# Forms of samples whose objects need not be checked again.
_MOST_KNOWN: Final = 512


@checked
def validate(
    sources: PathLike | Iterable[PathLike],
    *,
    quick: bool = False,
    checks: CheckOptions = CheckOptions(),
    isolation: IsolationLimits | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
    rank: int | Literal["auto"] | None = None,
    world_size: int | None = None,
) -> Reports[ValidationReport]:
    """Check structure, schema and meaning of archives, and that footer and HDF5 say the same.

    Parameters
    ----------
    sources
        Archives, globs or folders.
    quick
        Read no arrays, and leave out the checks of meaning.
    checks
        Which findings of these are left out, and which make a report not ``ok``.
    isolation
        Check every archive in a child process with these limits, so that a crash, exhausted memory
        or a hang becomes a problem: for files that you do not trust.
    limits
        What a file may ask of its reader.
    progress
        Called for every archive with the samples checked and the samples there are; never called
        with `isolation`.

    rank, world_size
        Look at the share of one of `world_size` processes, divided by size; see `docs/cluster.md`.

    Returns
    -------
    list of ValidationReport
        One per archive, with every problem and its HDF5 path. A file that is not an archive is a
        problem, too.

    Raises
    ------
    FileNotFoundError
        A path does not exist, or a folder or glob holds no archive.
    """
    paths = share_of(expand_paths(sources), rank, world_size)
    if isolation is not None:
        return Reports(
            validate_isolated(path, quick=quick, checks=checks, limits=limits, isolation=isolation)
            for path in paths
        )
    return Reports(
        validate_file(
            path,
            quick=quick,
            checks=checks,
            limits=limits,
            progress=progress,
            # Ranks share a machine already.
            has_helpers=rank is None,
        )
        for path in paths
    )


def validate_file(
    path: PathLike,
    *,
    quick: bool = False,
    checks: CheckOptions = CheckOptions(),
    limits: ReadLimits = DEFAULT_LIMITS,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    has_helpers: bool = True,
) -> ValidationReport:
    """Check one archive in this process, as `validate` does, with `workers` threads.

    With `has_helpers`, other processes look at some of the samples if there are many.
    """
    file = Path(path)
    report = ValidationReport(str(file), checks=checks, is_quick=quick)
    try:
        with Hdf5Reader(file, limits) as reader:
            validation = _Validation(reader, limits, report, progress)
            count = 0 if quick else reader.root_attributes().get("num_samples")
            with helping(file, limits, count, workers if has_helpers else 1) as others:
                validation.run()
                if not quick:
                    rows = check_meaning(
                        file,
                        report,
                        limits,
                        seen=None if others is None else others.next,
                        workers=workers,
                        progress=progress,
                    )
                    validation.check_excerpts(rows)
    except ArchiveError as error:
        found = error_for(file, error)
        report.add("/", found, problem_kind(found))
    except H5TracesError as error:
        report.add("/", error, problem_kind(error))
    return report


@dataclass(frozen=True, slots=True)
class _KnownObjects:
    """Of a sample's objects: how many datasets there are, what casts changed, and their digest."""

    num_datasets: int
    casts: Sequence[tuple[tuple[object, str | None], Any]]
    # None if samples are not known by a key.
    digest: ObjectsDigest | None

    def fits_digest(self, sample: SampleEntry) -> bool:
        """Whether the digest of a sample with these objects is what it says."""
        if self.digest is None or not isinstance(sample.objects, FooterObjects):
            return sample_difference(sample) is None
        return self.digest.of(sample.attrs, sample.objects.digests) == sample.attrs.get(DIGEST)


class _Validation:
    """One check of one file."""

    def __init__(
        self,
        reader: Hdf5Reader,
        limits: ReadLimits,
        report: ValidationReport,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._reader, self._limits, self._report = reader, limits, report
        self._add, self._progress = report.add, progress
        self._footer: FooterStore | None = None
        # Objects that were checked, by the key of their samples.
        self._known: dict[Any, _KnownObjects] = {}
        # Of samples, what the index finds them by; what compares headers with it, where all bytes
        # of HDF5's structures are as written, and where the groups of samples lie.
        self._keys: list[tuple[str | None, int | None]] = []
        self._headers: HeaderCheck | None = None
        self._addresses: dict[str, int] = {}
        self._metadata: ArchiveMetadata | None = None
        self._kinds: dict[str, KindMetadata] = {}
        self._samples: list[TraceMetadata | None] = []
        # By cast and stored type, what each of the arrays says that the cast changed.
        self._casts: defaultdict[tuple[object, str | None], list[Any]] = defaultdict(list)
        # Channels of each layer's scale, by the layer's path below a sample.
        self._widths: dict[str, int] = {}
        self._is_newer = False

    def run(self) -> None:
        root = self._reader.root_attributes()
        check_format(root, Path(self._report.path))
        check_version(root, "/")
        version = layout.parse_version(str(root["format_version"]))
        self._is_newer = version is not None and version > layout.KNOWN_VERSION
        self._metadata = self._document(ArchiveMetadata, root, "/")
        if root.get("complete") != 1:
            self._add("/", "the archive was not finished: 'complete' is not 1", "incomplete")
        self._check_root_names()
        self._check_kinds()
        self._open_footer(root)
        self._check_scales()
        names = self._reader.sample_names()
        self._check_sample_names(names)
        for index, name in enumerate(names):
            self._check_sample(index, name)
            if self._progress is not None:
                self._progress(index + 1, len(names))
        self._report.num_samples = len(names)
        self._check_casts()
        self._check_index(names)
        self._check_keys()
        if self._metadata is not None:
            found = label_problems(self._reader.path, self._metadata, self._samples)
            self._report.problems += found
        self._note_foreign()

    def _add_all(self, place: str, found: Iterable[Contradiction]) -> None:
        for loc, message, kind in found:
            self._add(f"{place}/{loc}" if loc else place, message, kind)

    def _document(self, document: type[Document], attrs: Attrs, loc: str) -> Any:
        for name in unknown_attributes(document, attrs):
            if self._is_newer:
                self._report.notes.append(f"{loc}: attribute {name!r} belongs to a newer format")
                continue
            self._add(
                loc,
                f"attribute {name!r} is not of the format; names of users' attributes begin with "
                f"{layout.USER_PREFIX!r}",
                "unknown_attribute",
            )
        try:
            return from_attributes(document, attrs)
        except SchemaError as error:
            for each in error.problems:
                self._add(loc, f"attribute {each.loc!r}: {each.message}", each.kind)
            return None

    def _check_root_names(self) -> None:
        for name in sorted(_ROOT_GROUPS - set(self._reader.root_names())):
            self._add(f"/{name}", "the group is missing", "missing_group")
        self._reader.note_outer()

    def _note_foreign(self) -> None:
        """Note all that is not of the format, except what is named as users' own."""
        self._report.problems += self._reader.foreign_hazards()
        alike: defaultdict[tuple[str, bool], list[str]] = defaultdict(list)
        for each in self._reader.foreign:
            if not each.is_users:
                alike[each.name, each.is_attribute].append(each.path)
        for (name, is_attribute), places in alike.items():
            what = f"attribute {name!r}" if is_attribute else f"object {name!r}"
            self._report.notes.append(
                f"{text.and_more(sorted(places), 3)}: {what} is not of the format, and not read; "
                f"names of users' own begin with {layout.USER_PREFIX!r}"
            )

    def _check_kinds(self) -> None:
        for name, attrs in self._reader.kinds().items():
            metadata = self._document(KindMetadata, attrs, f"/{layout.KINDS_GROUP}/{name}")
            if metadata is not None:
                self._kinds[name] = metadata

    def _open_footer(self, root: Attrs) -> None:
        try:
            self._footer = FooterStore(LocalFile(self._reader.path), self._limits)
        except FooterError as error:
            self._report.notes.append(
                f"{error}; the archive is read through HDF5, which is slow; run 'h5traces seal'"
            )
            return
        if self._footer.root_attrs != root or self._footer.kinds != self._reader.kinds():
            self._add("/", "the index and HDF5 have different metadata", "footer_mismatch")
        try:
            self._keys = self._footer.keys()
            if structures_fit(self._footer):
                self._headers = HeaderCheck(self._footer.file)
                self._addresses = self._reader.sample_addresses()
        except CorruptArchiveError as error:
            self._add("/", str(error), "footer_damaged")

    def _check_scales(self) -> None:
        place = f"/{layout.SCALES_GROUP}"
        problems: list[Problem] = []
        try:
            scales = self._reader.scales(problems=problems)
        except ArchiveError as error:
            self._add(place, error, problem_kind(error))
            return
        self._add_all("", ((each.loc, each.message, each.kind) for each in problems))
        if scales is not None:
            if record := scales.objects[layout.SCALES_GROUP].attrs:
                self._document(CalibrationRecord, record, place)
            self._widths = scale_widths(scales.objects)
            self._add_all("", scale_problems(scales.objects))
        if self._footer is not None and not problems:
            self._check_same(place, self._footer.scales(), scales)

    def _check_same(
        self, place: str, listed: SampleEntry | None, stored: SampleEntry | None
    ) -> None:
        """HDFView reads HDF5 and h5traces the footer: both must show the same."""
        for loc, message in differences(place, listed, stored):
            self._add(loc, message, "footer_mismatch")

    def _check_sample_names(self, names: list[str]) -> None:
        expected = [layout.sample_name(ordinal) for ordinal in range(len(names))]
        if names != expected:
            odd = next(name for name, wanted in zip(names, expected, strict=True) if name != wanted)
            self._add(
                f"/{layout.SAMPLES_GROUP}/{odd}",
                "sample groups must be named 00000000, 00000001, … without gaps; one was removed "
                "or renamed",
                "sample_names",
            )
        if self._metadata is not None and self._metadata.num_samples != len(names):
            message = f"num_samples is {self._metadata.num_samples}, {len(names)} are stored"
            self._add("/", message, "count_mismatch")
        if self._footer is not None and self._footer.num_samples != len(names):
            message = f"the index lists {self._footer.num_samples} samples, {len(names)} are stored"
            self._add("/", message, "footer_mismatch")
            self._footer, self._keys = None, []

    def _check_sample(self, index: int, name: str) -> None:
        place = f"/{layout.SAMPLES_GROUP}/{name}"
        problems: list[Problem] = []
        sample = self._listed(index, name)
        is_listed = sample is not None
        if sample is None:
            try:
                sample = self._reader.sample(name, problems=problems)
            except ArchiveError as error:
                self._add(place, error, problem_kind(error))
                self._samples.append(None)
                return
        self._add_all(place, ((each.loc, each.message, each.kind) for each in problems))
        metadata = self._document(TraceMetadata, sample.attrs, place)
        self._samples.append(metadata)
        key = None
        if isinstance(sample.objects, FooterObjects) and metadata is not None:
            key = sample.objects.key, metadata.seq_len, metadata.coverage
        known = self._known.get(key)
        if known is None:
            known = self._check_objects(sample, metadata, place, key)
        self._report.num_datasets += known.num_datasets
        for cast, num_changed in known.casts:
            self._casts[cast].append(num_changed)
        if not problems:
            if metadata is not None and not known.fits_digest(sample):
                self._add(place, DIFFERENT_SAMPLE, "digest_mismatch")
            self._check_fields(sample, metadata, place)
            if not is_listed:
                self._check_footer_sample(index, sample, place)
            if self._keys and self._keys[index] != key_of(sample.attrs):
                message = "the index finds it by another id than it has"
                self._add(place, message, "footer_mismatch")

    def _check_objects(
        self, sample: SampleEntry, metadata: TraceMetadata | None, place: str, key: Any
    ) -> _KnownObjects:
        """Check what the objects of a sample say; nothing is wrong with others of the same key."""
        before = len(self._report.problems)
        self._add_all(place, sample_problems(sample, metadata, self._kinds))
        casts = []
        for path, entry in sample.objects.items():
            kind = self._kinds.get(path.partition("/")[0])
            is_derived = kind is not None and kind.derivation is not None
            if "cast_from" in entry.attrs and not is_derived:
                cast = entry.attrs["cast_from"], float_type(entry)
                casts.append((cast, entry.attrs.get("num_changed")))
        self._add_all(place, encoding_problems(sample.objects, self._widths, self._metadata))
        num_datasets = sum(not each.is_group for each in sample.objects.values())
        digest = None
        if key is not None:
            digest = ObjectsDigest({path: entry.attrs for path, entry in sample.objects.items()})
        found = _KnownObjects(num_datasets, casts, digest)
        if key is not None and len(self._report.problems) == before:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = found
        return found

    def _listed(self, index: int, name: str) -> SampleEntry | None:
        """The sample as the index lists it, if its HDF5 headers hold just that; None if not.

        None, too, if only the library can tell, which takes ten times as long.
        """
        if self._footer is None or self._headers is None:
            return None
        try:
            listed = self._footer.sample(index)
            objects, address = listed.objects, self._addresses.get(name, 0)
            assert isinstance(objects, FooterObjects)
            if not self._footer.fits(objects):
                return None
            shows = self._headers.shows(address, listed, objects.row, objects.key)
            return listed if shows else None
        except CorruptArchiveError:
            # `_check_footer_sample` reports it.
            return None

    def _check_fields(
        self, sample: SampleEntry, metadata: TraceMetadata | None, place: str
    ) -> None:
        if metadata is None or self._metadata is None:
            return
        slots = {
            layout.QUESTION_ID: metadata.sample_id,
            layout.PROMPT_LENGTH: metadata.prompt_len,
            layout.LABEL: metadata.label,
        }
        for key in metadata.fields or self._metadata.fields or ():
            extra = f"{layout.EXTRA_GROUP}/{text.escape(layout.escape_key(key))}"
            if key not in sample.objects and extra not in sample.objects and slots.get(key) is None:
                self._add(place, f"the field {key!r} is listed but not stored", "missing_field")

    def _check_footer_sample(self, index: int, sample: SampleEntry, place: str) -> None:
        if self._footer is None:
            return
        try:
            self._check_same(place, self._footer.sample(index), sample)
        except CorruptArchiveError as error:
            self._add("/", str(error), "footer_damaged")
            self._footer, self._keys = None, []

    def _check_casts(self) -> None:
        """The root's ``casts`` against the attributes of the arrays, where all could be read."""
        metadata = self._metadata
        if metadata is None or metadata.casts is None or None in self._samples:
            return
        stored = {
            key: (len(counts), sum(counts) if all(type(each) is int for each in counts) else None)
            for key, counts in self._casts.items()
        }
        listed: dict[tuple[object, str | None], tuple[int, int | None]] = {
            (each.cast_from, each.dtype): (each.num_arrays, each.num_changed)
            for each in metadata.casts
        }
        for key in dict.fromkeys([*listed, *stored]):
            ours, theirs = listed.get(key, (0, 0)), stored.get(key, (0, 0))
            if ours != theirs:
                message = (
                    f"'casts' lists {ours[0]} arrays cast from {key[0]} to {key[1]} and "
                    f"{_values(ours[1])}; the arrays' own attributes say {theirs[0]} and "
                    f"{_values(theirs[1])}"
                )
                self._add("/", message, "count_mismatch")

    def _check_index(self, names: list[str]) -> None:
        loc = f"/{layout.INDEX_TABLE}"
        table = self._reader.index_table()
        if table is None or table.dtype.names is None:
            self._add(loc, "the table of samples is missing", "missing_index")
            return
        if len(table) != len(names):
            self._add(loc, f"{len(table)} rows for {len(names)} samples", "count_mismatch")
            return
        rows = [IndexRow.of(each, {}) for each in self._samples if each]
        for name, expected in index_columns(rows).items():
            if name not in table.dtype.names:
                self._add(loc, f"the column {name!r} is missing", "missing_column")
            elif len(expected) == len(table):
                self._check_column(loc, name, table[name], expected)

    def check_excerpts(self, rows: dict[int, IndexRow]) -> None:
        """Compare excerpts in the table of samples with the texts; archives may have none."""
        table = self._reader.index_table()
        if table is None:
            return
        for name in (each for each in EXCERPTS if each in (table.dtype.names or ())):
            for index, row in rows.items():
                expected = text.encode(getattr(row, name))
                found = table[name][index].tolist() if index < len(table) else expected
                if found != expected:
                    message = f"row {index} has {name} {found!r}, the sample has {expected!r}"
                    self._add(f"/{layout.INDEX_TABLE}", message, "index_mismatch")

    def _check_column(self, loc: str, name: str, found: Any, expected: Any) -> None:
        for row, (listed, stored) in enumerate(zip(found.tolist(), expected.tolist(), strict=True)):
            if listed != stored:
                message = f"row {row} has {name} {listed!r}, the sample has {stored!r}"
                self._add(loc, message, "index_mismatch")

    def _check_keys(self) -> None:
        keys = ((each.sample_id, each.generation_index) for each in self._samples if each)
        counts = Counter(key for key in keys if key[0] is not None)
        for (sample_id, generation), count in counts.items():
            if count > 1:
                message = (
                    f"{count} samples have sample_id {sample_id!r} and generation_index "
                    f"{generation}; the pair must be unique"
                )
                self._add(f"/{layout.SAMPLES_GROUP}", message, "repeated_key")


def _values(num_changed: int | None) -> str:
    number = "an unknown number of" if num_changed is None else f"{num_changed:,}"
    return f"{number} changed values"
