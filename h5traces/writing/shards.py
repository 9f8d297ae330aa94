"""A set of shards that is read back and published together, and what stored shards hold."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

from h5traces.archive.footer_store import FooterStore
from h5traces.archive.opening import open as open_archive
from h5traces.errors import (
    ArchiveExistsError,
    CorruptArchiveError,
    H5TracesError,
    StoredStateWarning,
)
from h5traces.format import layout
from h5traces.format.digests import difference, sample_difference
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.text import and_more
from h5traces.storage.arrays import read_checked_array
from h5traces.storage.files import LocalFile
from h5traces.storage.hdf5.reading import Hdf5Reader
from h5traces.storage.processes import deferred_signals
from h5traces.storage.publish import make_folder, remove_abandoned_parts, sync_folder
from h5traces.storage.threads import ThreadPool
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.preparation import Observation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from h5traces.archive.file import ArchiveFile
    from h5traces.format.archive import SourceFile
    from h5traces.format.entries import ObjectEntry, SampleEntry
    from h5traces.paths import Target
    from h5traces.storage.files import ByteFile
    from h5traces.storage.plans import Reading
    from h5traces.storage.remote.paths import RemotePath
    from h5traces.writing.options import WriteOptions


# Every n-th dataset is also read through stock HDF5; of the first and last sample all small
# datasets, and more of the large ones, which are alike.
_STOCK_EVERY = 64
_STOCK_EVERY_AT_ENDS = 8
_SMALL_NBYTES = 64 << 10
# Datasets per task of a thread: handing one over takes longer than hashing it. Those of a small
# sample are not handed over at all.
_GROUP = 8
_SMALL_SAMPLE_NBYTES = 1 << 20


def verify_written(
    path: Path,
    digests: Sequence[str],
    *,
    workers: int | None = None,
    stock_at_ends: bool = True,
) -> int:
    """Read every dataset of a file just written, and compare it with the digests of its source.

    The file is opened anew: HDF5's cache would return what was written, not what was stored. With
    `stock_at_ends`, most of the first and last sample is read through stock HDF5 too; of the rest,
    every 64th dataset. Returns the number of datasets compared.
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
        readings = _readings(store, workers)
        for index, expected in enumerate(digests):
            sample, entries, arrays = next(readings)
            if sum(entry.raw_nbytes for entry in entries) < _SMALL_SAMPLE_NBYTES:
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
    return num_datasets + len(datasets)


def _readings(
    store: FooterStore, workers: int
) -> Iterator[tuple[SampleEntry, list[ObjectEntry], dict[str, NDArray[Any]]]]:
    """All samples in order, their datasets, and the arrays that could be read together.

    While one is looked at, the next one is being read.
    """
    waiting: list[tuple[SampleEntry, list[ObjectEntry], Reading]] = []
    for index in range(store.num_samples):
        stored = store.sample(index)
        # Each entry is made once.
        sample = replace(stored, objects=dict(stored.objects))
        entries = [entry for entry in sample.objects.values() if not entry.is_group]
        reading = store.begin([(stored, [entry.path for entry in entries])], workers)
        waiting.append((sample, entries, reading))
        del reading
        if index:
            yield _read(*waiting.pop(0))
    for each in waiting:
        yield _read(*each)


def _read(
    sample: SampleEntry, entries: list[ObjectEntry], reading: Reading
) -> tuple[SampleEntry, list[ObjectEntry], dict[str, NDArray[Any]]]:
    return sample, entries, reading.arrays()


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


def stale_warnings(target: Target, written: Iterable[str]) -> list[str]:
    """Names shards of an earlier run that lie beside the new ones and would be opened with them."""
    kept = set(written)
    stale = [place for path in target.taken() if (place := str(path)) not in kept]
    if not stale:
        return []
    return [f"{and_more(stale)}: left by an earlier run, not replaced; delete what is obsolete"]


class ShardSet:
    """The archives of one job. The first is published last: if it exists, all of them do.

    A stopped job can be run again: shards that it published are compared with the new ones. With
    ``options.verify``, every archive is read back before any gets its name. `generations` are
    generation indices that samples before it have, by sample id.
    """

    def __init__(
        self, options: WriteOptions, generations: dict[str, set[int]] | None = None
    ) -> None:
        self._options = options
        self.writers: list[ArchiveWriter] = []
        self._generations = {} if generations is None else generations
        # Shards that an earlier run of the same job published before it was stopped.
        self._published_before: set[int] = set()

    def new(self, target: Path, **metadata: Any) -> ArchiveWriter:
        """A writer for the next archive."""
        make_folder(target.parent)
        remove_abandoned_parts(target)
        options = self._options
        if self.writers and not options.overwrite and os.path.lexists(target):
            # Written nevertheless: only digests show whether it is the same shard.
            self._published_before.add(len(self.writers))
            options = replace(options, overwrite=True)
        self.writers.append(
            ArchiveWriter(target, options, generations=self._generations, **metadata)
        )
        return self.writers[-1]

    def finish(self, *, sources: tuple[SourceFile, ...] | None = None, **metadata: Any) -> None:
        """Finish and verify the newest archive."""
        writer = self.writers[-1]
        writer.finish(sources=sources, **metadata)
        if self._options.verify:
            verify_written(writer.part_path, writer.digests, workers=self._options.workers)
        target = writer.summary.path
        if len(self.writers) - 1 in self._published_before and not holds(target, writer.digests):
            message = (
                f"{target} exists and holds other samples than a stopped run of this command would "
                "have left; move it, use overwrite=True, or another name"
            )
            raise ArchiveExistsError(message)

    def publish(self) -> None:
        """Name the archives, the first one last; signals wait for all of them."""
        with deferred_signals():
            for number, writer in reversed(list(enumerate(self.writers))):
                if number in self._published_before:
                    writer.discard()
                    sync_folder(writer.summary.path.parent)
                else:
                    writer.publish()

    def discard(self) -> None:
        """Delete what was not published."""
        for writer in self.writers:
            writer.discard()


def holds(path: Path | RemotePath, digests: Sequence[str], *, before_loss: bool = False) -> bool:
    """Whether a file is an archive of just these samples; see `sample_digests`."""
    try:
        with warnings.catch_warnings(), open_archive(path) as archive:
            warnings.simplefilter("ignore", StoredStateWarning)
            return list(digests) == sample_digests(archive._files[0], before_loss=before_loss)
    except (H5TracesError, OSError):
        return False


def sample_digests(file: ArchiveFile, *, before_loss: bool = False) -> list[str]:
    """The stored digest of every sample, if `before_loss` from before a tier was applied."""
    samples = (file.sample_attrs(index) for index in range(file.num_samples))
    found = [
        attrs.get("exact_digest" if before_loss and "exact_digest" in attrs else "digest")
        for attrs in samples
    ]
    if None in found:
        message = f"{file.path}: {layout.sample_path(found.index(None))} has no digest"
        raise CorruptArchiveError(message)
    return [str(each) for each in found]


@dataclass(slots=True)
class Contents:
    """What archives or spooled samples hold.

    ``digests`` are from before a tier was applied; ``done`` counts samples by sample id, and
    ``later`` names those with a generation index above 0.
    """

    digests: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    later: set[tuple[str, int]] = field(default_factory=set)
    observed: Observation = field(default_factory=Observation)

    @classmethod
    def of(cls, path: Path) -> Contents:
        """The contents of one archive file; reads no array."""
        found = cls()
        with open_archive(path) as archive:
            (file,) = archive._files
            found.digests = sample_digests(file, before_loss=True)
            found.done.update(each for each in archive.ids if each is not None)
            found.later.update((name, n) for name, n in archive._keys if name is not None and n)
            for kind, attrs in file.store.kinds.items():
                layers = attrs.get("layers", ())
                found.observed.layers[kind] = set(layers if isinstance(layers, tuple) else ())
        return found


def joined(contents: Iterable[Contents]) -> Contents:
    """The contents of several files."""
    found = Contents()
    for each in contents:
        found.observed.add_sample(each.observed, len(found.digests))
        found.digests += each.digests
        found.done += each.done
        found.later |= each.later
    return found


def stored_keys(done: Counter[str], later: set[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    """Sample ids with generation indices, from what `Contents` and writers have of them."""
    num_later = Counter(name for name, _ in later)
    return frozenset(later | {(name, 0) for name in done if done[name] > num_later[name]})
