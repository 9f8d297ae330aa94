"""Compares the bytes of archives with their checksums, and contents with digests or a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from h5traces.archive.agreement import Agreement
from h5traces.archive.file import check_format
from h5traces.archive.footer_store import FooterStore
from h5traces.archive.foreign import error_for
from h5traces.archive.hdf5_store import Hdf5Store
from h5traces.archive.scales import stored_scales
from h5traces.archive.stored_sample import MOST_AHEAD_NBYTES
from h5traces.archive.whole_file import check_bytes
from h5traces.arguments import checked
from h5traces.checking.reports import FileReport, Reports
from h5traces.checking.validate import validate_file
from h5traces.errors import (
    ArchiveError,
    CorruptArchiveError,
    H5TracesError,
    LossyArchiveError,
    NotAnArchiveError,
    OptionError,
)
from h5traces.format import layout
from h5traces.format.archive import ArchiveMetadata
from h5traces.format.digests import difference, sample_difference, sample_digest
from h5traces.format.document import Attrs, from_attributes, to_attributes
from h5traces.format.entries import object_place
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.precision import EXACT
from h5traces.format.record import SourcePosition
from h5traces.format.text import and_more, counted
from h5traces.meaning.options import FIRST_STATES, ReadingOptions, RunFacts
from h5traces.meaning.padding import num_cut
from h5traces.paths import expand_paths
from h5traces.precision.attention import with_head_mean
from h5traces.ranks.rank import share_of
from h5traces.sources.opening import open_source, recognise
from h5traces.storage.files import LocalFile
from h5traces.storage.footer_rows import FooterError
from h5traces.writing.options import WriteOptions
from h5traces.writing.preparation import record_attributes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.archive.hdf5_store import Store
    from h5traces.format.archive import Cast
    from h5traces.format.entries import SampleEntry
    from h5traces.format.limits import ReadLimits
    from h5traces.paths import PathLike

ReportProgress = Callable[[int, int], None]

# Attributes about the containers and places of values, not about the values.
_FORMS: Final = frozenset({"container", "sequence", "source_axes", "keys", "site"})
# The same for samples, whose digests cover these, too.
_FORMS_OF_SAMPLES: Final = frozenset({"fields", "source", "digest", "generation_index"})


@dataclass(slots=True)
class VerifyReport(FileReport):
    """What `verify` found in one archive; `FileReport` describes the other attributes.

    Attributes
    ----------
    num_chunks
        Chunks that were compared with their checksums.
    num_objects
        Groups and datasets that the index was compared with HDF5 on.
    not_compared
        What was not compared, with counts, and what compares it.
    nbytes
        Size of the file.
    """

    num_chunks: int = 0
    num_objects: int = 0
    not_compared: list[str] = field(default_factory=list)
    nbytes: int = 0


@checked
def verify(
    sources: PathLike | Iterable[PathLike],
    *,
    deep: bool = False,
    against: PathLike | None = None,
    reading: ReadingOptions = ReadingOptions(),
    workers: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
    progress: ReportProgress | None = None,
    rank: int | Literal["auto"] | None = None,
    world_size: int | None = None,
) -> Reports[VerifyReport]:
    """Check that archives are what was written.

    The quick check compares checksums of every chunk and of all bytes between them, as fast as
    the file can be read, and what the footer lists with what HDF5 does. It needs a footer; without
    one, everything is inflated instead.

    Parameters
    ----------
    sources
        Archives, globs or folders.
    deep
        Also inflate every array and compare the digests of its content, and validate: check
        structure and schema.
    against
        A file that the archives were converted from: prove that they hold every sample of it, bit
        for bit after the cast that the archive records.
    reading
        What `against` does not say itself; as the archive records it by default.
    workers
        Threads; one per core by default.
    limits
        What a file may ask of its reader.
    progress
        Called for every archive with the work done and the work there is.

    rank, world_size
        Look at the share of one of `world_size` processes, divided by size; see `docs/cluster.md`.

    Returns
    -------
    list of VerifyReport
        One per archive, with every damaged sample and layer.

    Raises
    ------
    FileNotFoundError
        A path does not exist, or a folder or glob holds no archive.
    OptionError
        `against` is a folder that is not a set by itself.
    ConversionError
        `against` cannot be read.
    LossyArchiveError
        `against` cannot be compared with an archive made of one that had lost precision.
    """
    source = None if against is None else Path(against)
    if source is not None and source.is_dir() and not recognise(source, reading).is_readable:
        message = f"{source}: is a folder; 'against' takes one file that the archive was made from"
        raise OptionError(message)
    reports = Reports[VerifyReport]()
    for path in share_of(expand_paths(sources), rank, world_size):
        report = VerifyReport(str(path), nbytes=path.stat().st_size)
        reports.append(report)
        try:
            # Closed at the end: while HDF5 has a file open, it does not read what is on disk now.
            with closing(_open(path, limits, report)) as store:
                check_format(store.root_attrs, path)
                verification = _Verification(store, report, workers, progress)
                verification.run(source, reading, deep=deep, limits=limits)
        except H5TracesError as error:
            found = error_for(path, error) if isinstance(error, ArchiveError) else error
            if isinstance(found, NotAnArchiveError):
                report.add("/", found, "not_an_archive")
                report.notes.clear()
                continue
            if against is not None and not isinstance(error, CorruptArchiveError):
                raise
            report.add("/", error)
        if deep:
            validation = validate_file(path, quick=True, limits=limits)
            report.problems += validation.problems
            report.notes += validation.notes
    return reports


def _open(file: Path, limits: ReadLimits, report: VerifyReport) -> FooterStore | Hdf5Store:
    try:
        return FooterStore(LocalFile(file), limits)
    except FooterError as error:
        report.notes.append(f"{error}; checked through HDF5, by inflating everything")
        return Hdf5Store(file, limits)


class _Verification:
    """One check of one file."""

    def __init__(
        self,
        store: Store,
        report: VerifyReport,
        workers: int | None,
        progress: ReportProgress | None,
    ) -> None:
        self._store, self._report, self._workers = store, report, workers
        self._num_datasets = 0
        self._progress = progress or (lambda _done, _total: None)

    def run(
        self, against: Path | None, reading: ReadingOptions, *, deep: bool, limits: ReadLimits
    ) -> None:
        if isinstance(self._store, FooterStore):
            self._check_bytes(self._store)
            self._check_agreement(self._store, limits)
        self._check_head()
        if deep or not isinstance(self._store, FooterStore):
            self._check_contents()
        self._report.num_samples = self._store.num_samples
        if against is not None:
            self._check_against(against, reading)
        self._say_what_is_left(is_deep=deep, is_compared=against is not None)

    def _check_bytes(self, store: FooterStore) -> None:
        """Every byte of the file against the checksums in its footer."""
        found = check_bytes(store, workers=self._workers, progress=self._progress)
        if not found.rest_fits:
            self._report.add("/", "bytes of HDF5's own structures changed since they were written")
        for sample, path in found.damaged:
            message = "a stored chunk is damaged: its checksum does not fit"
            self._report.add(object_place(sample, path), message)
        self._report.num_chunks, self._num_datasets = found.num_chunks, found.num_datasets

    def _check_agreement(self, store: FooterStore, limits: ReadLimits) -> None:
        """Compare what the footer lists with HDF5, which stock tools read."""
        try:
            with closing(Agreement(store, Path(self._report.path), limits)) as agreement:
                samples = (agreement.of_sample(index) for index in range(store.num_samples))
                for loc, message in chain(agreement.of_head(), *samples):
                    self._report.add(loc, message, "footer_mismatch")
        except H5TracesError as error:
            self._report.add("/", error)
            self._report.not_compared.append(f"the index with HDF5: {error}")
        else:
            self._report.num_objects = agreement.num_objects

    def _say_what_is_left(self, *, is_deep: bool, is_compared: bool) -> None:
        store, left = self._store, self._report.not_compared
        if isinstance(store, Hdf5Store):
            left.append("stored bytes with checksums, which only an index has: 'h5traces seal'")
        elif not is_deep:
            datasets = counted(self._num_datasets, "dataset")
            samples = counted(store.num_samples, "sample")
            left.append(
                f"values of {datasets} and metadata of {samples} with their digests: deep=True"
            )
        if not is_compared:
            left.append("values with their source: against='batch.pkl'")
        self._report.notes += [f"not compared: {each}" for each in left]

    def _check_head(self) -> None:
        """Attributes of the root and the kinds, scales, and the table of samples.

        No digest covers these, but reading them compares checksums of the footer or of HDF5.
        """
        store = self._store
        steps: dict[str, Callable[[], object]] = {
            "/": self._check_root,
            f"/{layout.KINDS_GROUP}": lambda: store.kinds,
            f"/{layout.SCALES_GROUP}": self._check_scales,
        }
        if isinstance(store, Hdf5Store):
            steps[f"/{layout.INDEX_TABLE}"] = store.check_index
        for loc, step in steps.items():
            try:
                step()
            except H5TracesError as error:
                self._report.add(loc, error)

    def _check_root(self) -> None:
        attrs, num_samples = self._store.root_attrs, self._store.num_samples
        if attrs.get("format") != layout.FORMAT_NAME:
            message = f"'format' is {attrs.get('format')!r}, expected {layout.FORMAT_NAME!r}"
            raise CorruptArchiveError(message)
        metadata = from_attributes(ArchiveMetadata, attrs)
        if not metadata.complete:
            message = "the archive was not finished ('complete' is not set)"
            raise CorruptArchiveError(message)
        if metadata.num_samples != num_samples:
            message = f"num_samples is {metadata.num_samples}, {num_samples} are stored"
            raise CorruptArchiveError(message)

    def _check_scales(self) -> None:
        """Scales, without which no sample of the archive can be decoded."""
        scales = self._store.scales()
        if scales is None:
            return
        for path in scales.objects:
            damage = None if scales.objects[path].is_group else _damage(self._store, scales, path)
            if damage is not None:
                raise damage
        stored_scales(self._store)

    def _check_contents(self) -> None:
        """Every array against its digest, every sample's metadata against the sample's digest."""
        known = {each.loc for each in self._report.problems}
        num_samples = self._store.num_samples
        with ThreadPoolExecutor(self._workers) as pool:
            for index in range(num_samples):
                for loc, error in sample_damage(self._store, index, pool):
                    if loc not in known:
                        self._report.add(loc, error)
                self._progress(index + 1, num_samples)

    def _check_against(self, path: Path, reading: ReadingOptions) -> None:
        """Every sample of a source against the digests of its copy."""
        store, report = self._store, self._report
        metadata = from_attributes(ArchiveMetadata, store.root_attrs)
        if metadata.earlier_precisions:
            message = (
                f"{report.path}: was made of an archive that had lost precision before, so it "
                f"cannot hold what {path} does; 'h5traces fidelity' measures how far they are apart"
            )
            raise LossyArchiveError(message)
        options = WriteOptions(
            dtype=metadata.dtype_policy or "float16",
            on_overflow=metadata.on_overflow or "float32",
            workers=self._workers,
            precision=metadata.precision or EXACT,
            scales=stored_scales(store),
        )
        copies = _copies_of(store, metadata, path)
        is_recorded = any(each.name == path.name for each in metadata.sources or ())
        num_compared = num_in_others = padding = 0
        with (
            open_source(path, _as_converted(reading, metadata)) as source,
            ThreadPoolExecutor(self._workers) as pool,
        ):
            for position, record in enumerate(source.records(layers=_layers_kept(store, metadata))):
                if position not in copies:
                    message = f"sample {position} of {path} is not in the archive"
                    report.add(f"/{layout.SAMPLES_GROUP}", message, "missing_sample")
                    continue
                index = copies[position]
                padding += num_cut(record)
                encoded = with_head_mean(record, options.precision)
                expected = record_attributes(encoded, options, pool)
                facts = to_attributes(encoded.describe().metadata)
                # This digest is of another archive's sample; the source does not have it.
                stored = store.sample_attrs(index)
                facts |= {name: stored[name] for name in ("exact_digest",) if name in stored}
                found = _differences(store.sample(index), facts, expected)
                if found and not is_recorded:
                    found = _differences_of_values(store.sample(index), facts, expected)
                    num_in_others += not found
                for loc in found:
                    message = f"is not what sample {position} of {path} holds"
                    report.add(loc, message, "differs_from_source")
                for loc, error in sample_damage(store, index, pool):
                    report.add(loc, error)
                num_compared += 1
                self._progress(*source.progress)
        note = f"{counted(num_compared, 'sample')} compared with {path}"
        if metadata.losses:
            note += f", encoded as {metadata.precision}: the archive is not lossless"
        elif num_in_others and not report.problems:
            note += (
                f", which is not a recorded source: values are the same, containers of "
                f"{counted(num_in_others, 'sample')} are not"
            )
        elif metadata.is_lossless and not metadata.kept_layers and not report.problems:
            note += ": the archive is lossless"
        report.notes.append(note)
        if padding:
            note = f"without {counted(padding, 'padded position')} of the source, which were cut"
            report.notes.append(note)
        report.notes += [_cast_note(each) for each in metadata.casts or () if each.num_changed != 0]
        if metadata.casts is None:
            report.notes.append("the archive does not say what was cast: keep the source")
        if metadata.kept_layers:
            missing = metadata.missing_layers
            named = "layer {} is" if len(missing) == 1 else "layers {} are"
            listed = f": {named.format(and_more(missing, 20))} not stored" if missing else ""
            report.notes.append(f"holds {metadata.kept_layers}{listed}; keep the source")


def _layers_kept(store: Store, metadata: ArchiveMetadata) -> tuple[int, ...] | None:
    """Layers or positions that a conversion was told to keep; None for all, some perhaps absent."""
    recorded = metadata.conversion
    if recorded is not None and "layers" not in recorded:
        return None
    positions: Any = store.kinds.get(layout.HIDDEN_STATES, {}).get("positions")
    return metadata.layers or positions


def _as_converted(given: ReadingOptions, metadata: ArchiveMetadata) -> ReadingOptions:
    """The given options for the source, else those that the archive records."""
    recorded = metadata.conversion if isinstance(metadata.conversion, dict) else {}
    first = next((each for each in FIRST_STATES if each == recorded.get("first_state")), None)
    return replace(
        given,
        first_state=given.first_state or first,
        keep_padding=given.keep_padding or recorded.get("keep_padding") is True,
        layer_ids=given.layer_ids or _ids(recorded.get("layer_ids")),
        run=given.run or RunFacts.from_dict(recorded.get("run")),
    )


def _ids(found: Any) -> tuple[int, ...] | None:
    is_list = isinstance(found, list) and found and all(type(each) is int for each in found)
    return tuple(found) if is_list and min(found) >= 0 and len(set(found)) == len(found) else None


def _cast_note(cast: Cast) -> str:
    changed = "an unknown number of" if cast.num_changed is None else f"{cast.num_changed:,}"
    return f"compared after the cast to {cast.dtype} ({changed} values changed); keep the source"


# Datasets that a thread reads in one call.
_READ_TOGETHER: Final = 8


def sample_damage(
    store: Store, index: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[str, Exception]]:
    """Yield HDF5 path and error of everything in a sample that is not as it was written."""
    place = layout.sample_path(index)
    try:
        sample = store.sample(index)
    except H5TracesError as error:
        yield place, error
        return
    paths = [path for path in sample.objects if not sample.objects[path].is_group]
    starts = range(0, len(paths), _READ_TOGETHER)
    parts = [paths[start : start + _READ_TOGETHER] for start in starts]
    for part, damages in zip(
        parts, pool.map(lambda part: _damages(store, sample, part), parts), strict=True
    ):
        for path, found in zip(part, damages, strict=True):
            if found is not None:
                yield f"{place}/{path}", found
    differs = sample_difference(sample)
    if differs is not None:
        yield place, CorruptArchiveError(differs)


def _damages(store: Store, sample: SampleEntry, paths: list[str]) -> list[Exception | None]:
    """What is wrong with some datasets of a sample; those that take little are read together."""
    ahead = store.begin([(sample, paths)], 1, most_nbytes=MOST_AHEAD_NBYTES).arrays()
    return [_damage(store, sample, path, ahead.pop(path, None)) for path in paths]


def _damage(
    store: Store, sample: SampleEntry, path: str, ahead: NDArray[Any] | None = None
) -> Exception | None:
    try:
        values = store.read(sample, path) if ahead is None else ahead
        entry = sample.objects[path]
    except H5TracesError as error:
        return error
    differs = difference(entry, values)
    return None if differs is None else CorruptArchiveError(differs)


def _differences(sample: SampleEntry, facts: Attrs, expected: dict[str, Attrs]) -> list[str]:
    """Paths of a sample whose metadata or contents are not the expected ones."""
    place = layout.sample_path(sample.ordinal)
    stored = {path: entry.attrs for path, entry in sample.objects.items()}
    # An archive whose positions got names later does not say where in a block they lie.
    expected = {
        path: attrs if "site" in stored.get(path, attrs) else _without(frozenset({"site"}), attrs)
        for path, attrs in expected.items()
    }
    found = [
        f"{place}/{path}"
        for path in sorted(set(expected) | set(stored))
        if expected.get(path) != stored.get(path)
    ]
    if not found and sample_digest(facts, expected) != sample.attrs.get("digest"):
        found.append(place)
    return found


def _differences_of_values(
    sample: SampleEntry, facts: Attrs, expected: dict[str, Attrs]
) -> list[str]:
    """The same without containers of values, which exports to other formats change."""
    place = layout.sample_path(sample.ordinal)
    stored = {path: _without(_FORMS, entry.attrs) for path, entry in sample.objects.items()}
    found = [
        f"{place}/{path}"
        for path in sorted(set(expected) | set(stored))
        if path not in expected or _without(_FORMS, expected[path]) != stored.get(path)
    ]
    if _without(_FORMS_OF_SAMPLES, facts) != _without(_FORMS_OF_SAMPLES, sample.attrs):
        found.append(place)
    return found


def _without(names: frozenset[str], attrs: Attrs) -> Attrs:
    return {key: value for key, value in attrs.items() if key not in names}


def _copies_of(store: Store, metadata: ArchiveMetadata, path: Path) -> dict[int, int]:
    """Index in the archive by position in the batch."""
    numbers = {
        number for number, source in enumerate(metadata.sources or ()) if source.name == path.name
    }
    copies: dict[int, int] = {}
    for index in range(store.num_samples):
        source = store.sample_attrs(index).get("source")
        place = None if source is None else SourcePosition.model_validate_json(str(source))
        if place is None or (numbers and place.file not in numbers):
            continue
        copies[place.position] = index
    if not copies:
        # The archive does not record where its samples come from: assume the same order.
        copies = {index: index for index in range(store.num_samples)}
    return copies
