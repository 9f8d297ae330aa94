"""Compares the bytes of archives with their checksums, and contents with digests or a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.scales import stored_scales
from h5traces.archive.stores import FooterStore, Hdf5Store, object_place
from h5traces.checking.reports import FileReport, Reports
from h5traces.checking.validate import validate_file
from h5traces.errors import CorruptArchiveError, H5TracesError, LossyArchiveError, Problem
from h5traces.format import layout
from h5traces.format.archive import ArchiveMetadata
from h5traces.format.digests import difference, sample_difference, sample_digest
from h5traces.format.document import Attrs, from_attributes, to_attributes
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.precision import EXACT
from h5traces.format.trace import SourcePosition
from h5traces.paths import expand_paths
from h5traces.precision.head_mean import with_head_mean
from h5traces.sources.opening import open_source
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import FooterError
from h5traces.writing.options import WriteOptions
from h5traces.writing.preparation import record_attributes

if TYPE_CHECKING:
    from h5traces.archive.stores import Store
    from h5traces.format.entries import SampleEntry
    from h5traces.format.limits import ReadLimits
    from h5traces.paths import PathLike

ReportProgress = Callable[[int, int], None]


@dataclass(slots=True)
class VerifyReport(FileReport):
    """What `verify` found in one archive; `FileReport` describes the other attributes.

    Attributes
    ----------
    num_chunks
        Chunks that were compared with their checksums.
    nbytes
        Size of the file.
    """

    num_chunks: int = 0
    nbytes: int = 0


def verify(
    sources: PathLike | Iterable[PathLike],
    *,
    deep: bool = False,
    against: PathLike | None = None,
    workers: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
    progress: ReportProgress | None = None,
) -> Reports[VerifyReport]:
    """Check that archives are what was written.

    The quick check compares checksums of every chunk and of all bytes between them, as fast as
    the file can be read. It needs a footer; without one, everything is inflated instead.

    Parameters
    ----------
    sources
        Archives, globs or folders.
    deep
        Also inflate every array and compare the digests of its content, and validate: check
        structure, schema and the agreement of footer and HDF5.
    against
        A file that the archives were converted from: prove that they hold every sample of it, bit
        for bit after the cast that the archive records.
    workers
        Threads; one per core by default.
    limits
        What a file may ask of its reader.
    progress
        Called for every archive with the work done and the work there is.

    Returns
    -------
    list of VerifyReport
        One per archive, with every damaged sample and layer.

    Raises
    ------
    FileNotFoundError
        A path does not exist, or a folder or glob holds no archive.
    ConversionError
        `against` cannot be read.
    LossyArchiveError
        `against` cannot be compared with an archive made of one that had lost precision.
    """
    source = None if against is None else Path(against)
    return Reports(
        _verify_file(path, deep, source, workers, limits, progress)
        for path in expand_paths(sources)
    )


def _verify_file(
    file: Path,
    deep: bool,  # noqa: FBT001  # passed on
    against: Path | None,
    workers: int | None,
    limits: ReadLimits,
    progress: ReportProgress | None,
) -> VerifyReport:
    report = VerifyReport(str(file), nbytes=file.stat().st_size)
    try:
        with _opened(file, limits, report) as store:
            if isinstance(store, FooterStore):
                _check_bytes(store, report, workers, progress)
            _check_head(store, report)
            if deep or not isinstance(store, FooterStore):
                _check_contents(store, report, workers, progress)
            report.num_samples = store.num_samples
            if against is not None:
                _check_against(store, against, report, workers, progress)
    except H5TracesError as error:
        if against is not None and not isinstance(error, CorruptArchiveError):
            raise
        _add(report, "/", error)
    if deep:
        validation = validate_file(file, limits=limits)
        report.problems += validation.problems
        report.notes += validation.notes
    return report


@contextmanager
def _opened(file: Path, limits: ReadLimits, report: VerifyReport) -> Iterator[Store]:
    store: FooterStore | Hdf5Store
    try:
        store = FooterStore(LocalFile(file), limits)
    except FooterError as error:
        report.notes.append(f"{error}; checked through HDF5, by inflating everything")
        store = Hdf5Store(file, limits)
    # Closed at the end: while HDF5 has a file open, it does not read what is on disk now.
    with closing(store):
        yield store


def _add(report: VerifyReport, loc: str, error: Exception) -> None:
    message = str(error).removeprefix(f"{report.path}: ").removeprefix(f"{loc}: ")
    report.problems.append(Problem(loc, message, "damaged"))


def _check_bytes(
    store: FooterStore,
    report: VerifyReport,
    workers: int | None,
    progress: ReportProgress | None,
) -> None:
    """Every byte of the file against the checksums in its footer."""
    damaged, rest_fits = store.check_bytes(workers=workers, progress=progress)
    if not rest_fits:
        message = "bytes of HDF5's own structures changed since the archive was written"
        report.problems.append(Problem("/", message, "damaged"))
    for number in damaged:
        sample, path = store.owner_of_chunk(number)
        message = "a stored chunk is damaged: its checksum does not fit"
        report.problems.append(Problem(object_place(sample, path), message, "damaged"))
    report.num_chunks = len(store.chunk_table()[0])


def _check_head(store: Store, report: VerifyReport) -> None:
    """Attributes of the root and the kinds, scales, and the table of samples.

    No digest covers these, but reading them compares checksums of the footer or of HDF5.
    """

    def note(loc: str, step: Callable[[], object]) -> None:
        try:
            step()
        except H5TracesError as error:
            _add(report, loc, error)

    note("/", lambda: _check_root(store))
    note(f"/{layout.KINDS_GROUP}", lambda: store.kinds)
    note(f"/{layout.SCALES_GROUP}", lambda: _check_scales(store))
    if isinstance(store, Hdf5Store):
        note(f"/{layout.INDEX_TABLE}", store.check_index)


def _check_scales(store: Store) -> None:
    """Scales, without which no sample of the archive can be decoded."""
    scales = store.scales()
    if scales is None:
        return
    for path in scales.objects:
        error = None if scales.objects[path].is_group else _array_damage(store, scales, path)
        if error is not None:
            raise error
    stored_scales(store)


def _check_root(store: Store) -> None:
    if store.root_attrs.get("format") != layout.FORMAT_NAME:
        message = f"'format' is {store.root_attrs.get('format')!r}, expected {layout.FORMAT_NAME!r}"
        raise CorruptArchiveError(message)
    metadata = from_attributes(ArchiveMetadata, store.root_attrs)
    if not metadata.complete:
        message = "the archive was not finished ('complete' is not set)"
        raise CorruptArchiveError(message)
    if metadata.num_samples != store.num_samples:
        message = f"num_samples is {metadata.num_samples}, {store.num_samples} are stored"
        raise CorruptArchiveError(message)


def _check_contents(
    store: Store, report: VerifyReport, workers: int | None, progress: ReportProgress | None
) -> None:
    """Every array against its digest, and every sample's metadata against the sample's digest."""
    known = {each.loc for each in report.problems}
    with ThreadPoolExecutor(workers) as pool:
        for index in range(store.num_samples):
            for loc, error in sample_damage(store, index, pool):
                if loc not in known:
                    _add(report, loc, error)
            if progress is not None:
                progress(index + 1, store.num_samples)


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
    for path, found in zip(
        paths, pool.map(lambda path: _array_damage(store, sample, path), paths), strict=True
    ):
        if found is not None:
            yield f"{place}/{path}", found
    differs = sample_difference(sample)
    if differs is not None:
        yield place, CorruptArchiveError(differs)


def _array_damage(store: Store, sample: SampleEntry, path: str) -> Exception | None:
    try:
        values = store.read(sample, path)
        entry = sample.objects[path]
    except H5TracesError as error:
        return error
    differs = difference(entry, values)
    return None if differs is None else CorruptArchiveError(differs)


def _check_against(
    store: Store,
    batch_path: Path,
    report: VerifyReport,
    workers: int | None,
    progress: ReportProgress | None,
) -> None:
    """Every sample of a batch against the digests of its copy."""
    metadata = from_attributes(ArchiveMetadata, store.root_attrs)
    if metadata.earlier_precisions:
        message = (
            f"{report.path}: was made of an archive that had lost precision before, so it cannot "
            f"hold what {batch_path} does; 'h5traces fidelity' measures how far they are apart"
        )
        raise LossyArchiveError(message)
    options = WriteOptions(
        dtype=metadata.dtype_policy or "float16",
        on_overflow=metadata.on_overflow or "float32",
        workers=workers,
        precision=metadata.precision or EXACT,
        scales=stored_scales(store),
    )
    copies = _copies_of(store, metadata, batch_path)
    num_compared = 0
    with open_source(batch_path) as source, ThreadPoolExecutor(workers) as pool:
        for position, record in enumerate(source.records(layers=metadata.layers)):
            if position not in copies:
                message = f"sample {position} of {batch_path} is not in the archive"
                report.problems.append(Problem("/samples", message, "missing_sample"))
                continue
            index = copies[position]
            encoded = with_head_mean(record, options.precision)
            expected = record_attributes(encoded, options, pool)
            facts = to_attributes(encoded.describe().metadata)
            # This digest is of another archive's sample; the batch does not have it.
            stored = store.sample_attrs(index)
            facts |= {name: stored[name] for name in ("exact_digest",) if name in stored}
            for loc in _differences(store.sample(index), facts, expected):
                message = f"is not what sample {position} of {batch_path} holds"
                report.problems.append(Problem(loc, message, "differs_from_source"))
            for loc, error in sample_damage(store, index, pool):
                _add(report, loc, error)
            num_compared += 1
            if progress is not None:
                progress(*source.progress)
    note = f"{num_compared} samples compared with {batch_path}"
    if metadata.losses:
        note += f", encoded as {metadata.precision}: the archive is not lossless"
    report.notes.append(note)


def _differences(sample: SampleEntry, facts: Attrs, expected: dict[str, Attrs]) -> list[str]:
    """Paths of a sample whose metadata or contents are not the expected ones."""
    place = layout.sample_path(sample.ordinal)
    stored = {path: entry.attrs for path, entry in sample.objects.items()}
    found = [
        f"{place}/{path}"
        for path in sorted(set(expected) | set(stored))
        if expected.get(path) != stored.get(path)
    ]
    if not found and sample_digest(facts, expected) != sample.attrs.get("digest"):
        found.append(place)
    return found


def _copies_of(store: Store, metadata: ArchiveMetadata, batch_path: Path) -> dict[int, int]:
    """Index in the archive by position in the batch."""
    numbers = {
        number
        for number, source in enumerate(metadata.sources or ())
        if source.name == batch_path.name
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
