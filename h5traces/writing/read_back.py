"""Reads a finished file back from disk and compares it with the digests of its source."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from h5traces.archive.stores import FooterStore
from h5traces.errors import CorruptArchiveError
from h5traces.format import layout
from h5traces.format.digests import difference, sample_difference
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.storage.arrays import read_array
from h5traces.storage.files import LocalFile
from h5traces.storage.hdf5.reading import Hdf5Reader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.format.limits import ReadLimits
    from h5traces.storage.files import ByteFile

# Every n-th dataset is also read through stock HDF5; of the first and last sample all small
# datasets, and more of the large ones, which are alike.
STOCK_EVERY = 64
_STOCK_EVERY_AT_ENDS = 8
_SMALL_NBYTES = 64 << 10
# Datasets per task of a thread: handing one over takes longer than hashing it.
_GROUP = 8


def verify_written(
    path: Path,
    digests: Sequence[str],
    *,
    workers: int | None = None,
    stock_at_ends: bool = True,
) -> int:
    """Read every dataset of a file just written and compare it with its source.

    Parameters
    ----------
    path
        The finished file, opened anew: HDF5's cache would return what was written, not what was
        stored.
    digests
        Content digest of every sample, computed from the source.
    workers
        Threads; one per core by default.
    stock_at_ends
        Read most of the first and last sample through stock HDF5 too; else every 64th dataset.

    Returns
    -------
    int
        Number of datasets compared.
    """
    file = LocalFile(path)
    store = FooterStore(file, DEFAULT_LIMITS)
    if store.num_samples != len(digests):
        message = f"{path}: {store.num_samples} samples were stored, expected {len(digests)}"
        raise CorruptArchiveError(message)
    num_datasets = 0
    stock = Hdf5Reader(path, DEFAULT_LIMITS, locked_by_us=True)
    with stock, ThreadPoolExecutor(workers) as pool:
        for index, expected in enumerate(digests):
            sample = store.sample(index)
            entries = [entry for entry in sample.objects.values() if not entry.is_group]
            groups = [entries[start : start + _GROUP] for start in range(0, len(entries), _GROUP)]
            found = pool.map(lambda group: _wrong_paths(file, group), groups)
            wrong = [path for paths in found for path in paths]
            if wrong or sample_difference(sample, expected):
                place = f"{layout.sample_path(index)}/{wrong[0] if wrong else ''}"
                message = f"{path}: {place} reads back with other values than were written"
                raise CorruptArchiveError(message)
            at_end = stock_at_ends and index in (0, len(digests) - 1)
            _check_through_stock_hdf5(stock, sample, _stock_choice(entries, index, at_end=at_end))
            num_datasets += len(entries)
        scales = store.scales()
        datasets = (
            [] if scales is None else [each for each in scales.objects.values() if each.dtype]
        )
        wrong = _wrong_paths(file, datasets)
        if wrong:
            message = f"{path}: /{wrong[0]} reads back with other values than were written"
            raise CorruptArchiveError(message)
    return num_datasets + len(datasets)


def _stock_choice(entries: Sequence[ObjectEntry], index: int, *, at_end: bool) -> list[ObjectEntry]:
    """The datasets of a sample that are read through stock HDF5 too."""
    step = _STOCK_EVERY_AT_ENDS if at_end else STOCK_EVERY
    return [
        entry
        for number, entry in enumerate(entries)
        if number % step == index % step or (at_end and entry.raw_nbytes < _SMALL_NBYTES)
    ]


def _wrong_paths(file: ByteFile, entries: Sequence[ObjectEntry]) -> list[str]:
    found = (wrong_path(file, entry, DEFAULT_LIMITS) for entry in entries)
    return [path for path in found if path]


def wrong_path(file: ByteFile, entry: ObjectEntry, limits: ReadLimits) -> str | None:
    """The entry's path where its values do not give its digest, else None."""
    return entry.path if difference(entry, read_array(file, entry, limits)) else None


def _check_through_stock_hdf5(
    stock: Hdf5Reader, sample: SampleEntry, entries: Iterable[ObjectEntry]
) -> None:
    name = layout.sample_name(sample.ordinal)
    for entry in entries:
        if difference(entry, stock.read_values(name, entry)):
            message = (
                f"{stock.path}: {layout.sample_path(sample.ordinal)}/{entry.path}: stock HDF5 "
                "reads other values than were written"
            )
            raise CorruptArchiveError(message)
