"""Reads a file back that was just written, and compares it with the digests of its source.

Where a writer decoded every array as it was encoded, and compared it with the source, the stored
bytes are compared with the checksums that they had then.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import repeat
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from h5traces.archive.footer_store import FooterStore
from h5traces.archive.whole_file import check_bytes
from h5traces.errors import CorruptArchiveError
from h5traces.format import layout
from h5traces.format.digests import difference, sample_difference
from h5traces.format.entries import object_place
from h5traces.format.forms import StoredObject
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.storage.arrays import read_checked_array
from h5traces.storage.files import LocalFile
from h5traces.storage.hdf5.reading import Hdf5Reader
from h5traces.storage.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.whole_file import BytesChecked
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.storage.files import ByteFile
    from h5traces.storage.plans import Reading


# Every n-th dataset is also read through stock HDF5; of the first and last sample all small
# datasets, and more of the large ones, which are alike.
_STOCK_EVERY = 64
_STOCK_EVERY_AT_ENDS = 8
_SMALL_NBYTES = 64 << 10
# Datasets per task of a thread: handing one over takes longer than hashing it. Those of a small
# sample are not handed over at all.
_GROUP = 8
_SMALL_SAMPLE_NBYTES = 1 << 20


def fingerprint(objects: Iterable[StoredObject]) -> int:
    """A hash of what datasets are said to be: their digests, and their chunks with checksums."""
    return hash(
        frozenset(
            (path, digest, form.dtype, form.shape, form.chunk, form.codec, chunks)
            for path, form, digest, chunks in objects
            if form.dtype
        )
    )


def verify_written(
    path: Path,
    digests: Sequence[str],
    *,
    workers: int | None = None,
    stock_at_ends: bool = True,
    looked_back: Mapping[int, int] = MappingProxyType({}),
) -> int:
    """Read every dataset of a file just written, and compare it with the digests of its source.

    The file is opened anew: HDF5's cache would return what was written, not what was stored. With
    `stock_at_ends`, most of the first and last sample is read through stock HDF5 too; of the rest,
    every 64th dataset. Of samples whose `fingerprint` is in `looked_back`, only checksums are
    compared, and then those of all bytes. Returns the number of datasets compared.
    """
    file = LocalFile(path)
    store = FooterStore(file, DEFAULT_LIMITS)
    if store.num_samples != len(digests):
        message = f"{path}: {store.num_samples} samples were stored, expected {len(digests)}"
        raise CorruptArchiveError(message)
    num_datasets = 0
    workers = workers or os.cpu_count() or 1
    stock = Hdf5Reader(path, DEFAULT_LIMITS, locked_by_us=True)
    with stock, ThreadPool(workers) as pool:
        scan = pool.submit(check_bytes, store, workers=workers) if looked_back else None
        readings = _readings(store, workers, looked_back)
        for index, expected in enumerate(digests):
            sample, entries, arrays = next(readings)
            if arrays is None:
                wrong = []
            elif sum(entry.raw_nbytes for entry in entries) < _SMALL_SAMPLE_NBYTES:
                wrong = _wrong_paths(file, entries, arrays)
            else:
                starts = range(0, len(entries), _GROUP)
                parts = [entries[start : start + _GROUP] for start in starts]
                found = pool.map(_wrong_paths, repeat(file), parts, repeat(arrays))
                wrong = [path for part in found for path in part]
            # The next sample is being read already: keep no more than these two.
            del arrays
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
        wrong = _wrong_paths(file, datasets, {})
        if wrong:
            message = f"{path}: /{wrong[0]} reads back with other values than were written"
            raise CorruptArchiveError(message)
        if scan is not None:
            _check_scan(path, scan.result())
    return num_datasets + len(datasets)


def _check_scan(path: Path, found: BytesChecked) -> None:
    if found.damaged or not found.rest_fits:
        place = object_place(*found.damaged[0]) if found.damaged else "/"
        message = f"{path}: {place} reads back with other bytes than were written"
        raise CorruptArchiveError(message)


def _readings(
    store: FooterStore, workers: int, looked_back: Mapping[int, int]
) -> Iterator[tuple[SampleEntry, list[ObjectEntry], dict[str, NDArray[Any]] | None]]:
    """All samples in order, their datasets, and the arrays that could be read together.

    None for those of samples that were looked back at. While one is looked at, the next one is
    being read.
    """
    waiting: list[tuple[SampleEntry, list[ObjectEntry], Reading | None]] = []
    for index in range(store.num_samples):
        stored = store.sample(index)
        # Each entry is made once.
        sample = replace(stored, objects=dict(stored.objects))
        entries = [entry for entry in sample.objects.values() if not entry.is_group]
        reading = None
        if looked_back.get(index) != fingerprint(map(StoredObject.of, entries)):
            reading = store.begin([(stored, [entry.path for entry in entries])], workers)
        waiting.append((sample, entries, reading))
        del reading
        if index:
            yield _read(*waiting.pop(0))
    for each in waiting:
        yield _read(*each)


def _read(
    sample: SampleEntry, entries: list[ObjectEntry], reading: Reading | None
) -> tuple[SampleEntry, list[ObjectEntry], dict[str, NDArray[Any]] | None]:
    return sample, entries, None if reading is None else reading.arrays()


def _stock_choice(entries: Sequence[ObjectEntry], index: int, *, at_end: bool) -> list[ObjectEntry]:
    """The datasets of a sample that are read through stock HDF5 too."""
    step = _STOCK_EVERY_AT_ENDS if at_end else _STOCK_EVERY
    return [
        entry
        for number, entry in enumerate(entries)
        if number % step == index % step or (at_end and entry.raw_nbytes < _SMALL_NBYTES)
    ]


def _wrong_paths(
    file: ByteFile, entries: Sequence[ObjectEntry], arrays: Mapping[str, NDArray[Any]]
) -> list[str]:
    """Paths of the entries whose values, of `arrays` or else the file, do not give their digest."""
    wrong = []
    for entry in entries:
        values = arrays.get(entry.path)
        if difference(entry, read_checked_array(file, entry) if values is None else values):
            wrong.append(entry.path)
    return wrong


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
