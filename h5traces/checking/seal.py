"""Rebuilds the footers of archives from their HDF5 parts."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from h5traces.archive.file import check_format, check_version
from h5traces.archive.footer_store import FooterStore
from h5traces.archive.foreign import error_for
from h5traces.archive.whole_file import check_bytes
from h5traces.arguments import checked
from h5traces.errors import ArchiveError, CorruptArchiveError
from h5traces.format import layout
from h5traces.format.digests import chunk_checksum, difference, sample_difference
from h5traces.format.forms import StoredObject
from h5traces.format.html import Report
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.paths import expand_paths
from h5traces.storage.arrays import read_array, read_chunk
from h5traces.storage.files import LocalFile
from h5traces.storage.footer import FooterBuilder, hdf5_end, key_of
from h5traces.storage.hdf5.reading import Hdf5Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from h5traces.format.document import Attrs
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.format.limits import ReadLimits
    from h5traces.paths import PathLike


@dataclass(slots=True)
class SealReport(Report):
    """What sealing did to one archive.

    Attributes
    ----------
    path
        The archive.
    sealed
        Whether its footer is right now.
    already_sealed
        Whether it was before, so that nothing was written.
    num_samples
        Samples in it.
    edited
        HDF5 paths whose values or metadata do not match their digests.
    foreign
        Objects and attributes that are not the format's. They stay in the file as they are;
        `h5traces.repack` with ``foreign="drop"`` leaves them out.
    """

    path: str
    sealed: bool = False
    already_sealed: bool = False
    num_samples: int = 0
    edited: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@checked
def seal(
    sources: PathLike | Iterable[PathLike],
    *,
    accept_edits: bool = False,
    dry_run: bool = False,
    limits: ReadLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> list[SealReport]:
    """Rebuild the footers of archives that another program opened for writing.

    Reads every chunk. A file whose footer is right is left alone. The HDF5 part is not changed, so
    objects of other programs stay in it; until the last byte of the new footer is written, readers
    use HDF5.

    Parameters
    ----------
    sources
        Archives, globs or folders.
    accept_edits
        Seal even if values or metadata were changed since the archive was written.
    dry_run
        Only say what would be done.
    limits
        What a file may ask of its reader.
    progress
        Called for every archive with the samples read and the samples there are.

    Returns
    -------
    list of SealReport
        One per archive.

    Raises
    ------
    FileNotFoundError
        A path does not exist, or a folder or glob holds no archive.
    CorruptArchiveError
        A chunk is damaged, or a dataset is not stored as archives store it.
    NotAnArchiveError
        A file is not an archive.
    """
    reports = []
    for path in expand_paths(sources):
        try:
            with closing(FooterBuilder(None if dry_run else path.parent)) as builder:
                sealed = _seal_file(
                    path,
                    builder,
                    accept_edits=accept_edits,
                    dry_run=dry_run,
                    limits=limits,
                    progress=progress,
                )
        except ArchiveError as error:
            raise error_for(path, error) from error
        reports.append(sealed)
    return reports


def _seal_file(
    path: Path,
    builder: FooterBuilder,
    *,
    accept_edits: bool,
    dry_run: bool,
    limits: ReadLimits,
    progress: Callable[[int, int], None] | None,
) -> SealReport:
    report = SealReport(str(path))
    file = LocalFile(path)
    with Hdf5Reader(path, limits) as reader, ThreadPoolExecutor() as pool:
        root, kinds = reader.root_attributes(), reader.kinds()
        check_format(root, path)
        check_version(root, str(path))
        names = reader.sample_names()
        footer = _footer(file, limits, root, kinds)
        if root.get("num_samples") != len(names):
            report.edited.append(f"/{layout.SAMPLES_GROUP}")
        for index, name in enumerate(names):
            sample = reader.sample(name)
            place = layout.sample_path(sample.ordinal)
            entries = list(
                pool.map(lambda entry: _sealed(file, entry, limits), sample.objects.values())
            )
            report.edited += [f"{place}/{entry.path}" for entry, fits in entries if not fits]
            if sample_difference(sample):
                report.edited.append(place)
            builder.add_sample(sample.attrs, [StoredObject.of(entry) for entry, _ in entries])
            footer = footer if _is_listed(footer, index, sample, entries) else None
            if progress is not None:
                progress(index + 1, len(names))
        scales = reader.scales()
        if scales is not None:
            entries = [_sealed(file, entry, limits) for entry in scales.objects.values()]
            report.edited += [f"/{entry.path}" for entry, fits in entries if not fits]
            builder.add_scales([StoredObject.of(entry) for entry, _ in entries])
            footer = footer if _is_listed(footer, None, scales, entries) else None
        reader.note_outer()
    builder.has_foreign = bool(reader.foreign)
    report.foreign = [str(each) for each in reader.foreign if not each.is_users]
    if footer is not None and footer.has_foreign != builder.has_foreign:
        footer = None
    report.num_samples = builder.num_samples
    report.already_sealed = footer is not None and footer.num_samples == builder.num_samples
    report.sealed = report.already_sealed
    if report.already_sealed or dry_run or (report.edited and not accept_edits):
        return report
    _append(file, builder, root, kinds)
    report.sealed = True
    return report


def _footer(
    file: LocalFile, limits: ReadLimits, root: Attrs, kinds: dict[str, Attrs]
) -> FooterStore | None:
    """The footer that a file has, if it fits the bytes of the HDF5 part and its attributes."""
    try:
        footer = FooterStore(file, limits)
        found = check_bytes(footer)
        fits = (footer.root_attrs, footer.kinds) == (root, kinds)
        fits = fits and found.rest_fits and not found.damaged
        fits = fits and footer.keys() == [key_of(attrs) for attrs in footer.samples_attrs()]
    except CorruptArchiveError:
        return None
    return footer if fits else None


def _is_listed(
    footer: FooterStore | None,
    index: int | None,
    stored: SampleEntry,
    entries: list[tuple[ObjectEntry, bool]],
) -> bool:
    """Whether the footer describes a sample, or for None the scales, as HDF5 stores it."""
    try:
        if footer is None or (index is not None and index >= footer.num_samples):
            return False
        listed = footer.scales() if index is None else footer.sample(index)
    except CorruptArchiveError:
        return False
    objects = {entry.path: entry for entry, _ in entries}
    return listed is not None and listed.attrs == stored.attrs and listed.objects == objects


def _sealed(file: LocalFile, entry: ObjectEntry, limits: ReadLimits) -> tuple[ObjectEntry, bool]:
    """The entry with checksums of its chunks, and whether its values match its digest."""
    if entry.is_group:
        return entry, True
    if entry.chunks is None:
        message = (
            f"{file.name}: {entry.path} is not stored in chunks that h5traces can read; rewrite "
            "the file with 'h5repack -L -f SHUF -f GZIP=6', then seal it"
        )
        raise CorruptArchiveError(message)
    values = read_array(file, entry, limits)
    numbers = range(len(entry.chunks.offsets))
    checksums = tuple(chunk_checksum(read_chunk(file, entry, number)) for number in numbers)
    sealed = replace(entry, chunks=replace(entry.chunks, checksums=checksums))
    return sealed, difference(entry, values) is None


def _append(file: LocalFile, builder: FooterBuilder, root: Attrs, kinds: dict[str, Attrs]) -> None:
    """Write the footer after the HDF5 part, durably."""
    end = hdf5_end(file)
    descriptor = os.open(file.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != file.identity:
            message = f"{file.name}: the file was replaced while it was read; seal it again"
            raise CorruptArchiveError(message)
        # Removes an outdated footer.
        os.ftruncate(descriptor, end)
        os.lseek(descriptor, end, os.SEEK_SET)
        with os.fdopen(descriptor, "wb", closefd=False) as out:
            out.writelines(builder.finish(file, root, kinds))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
