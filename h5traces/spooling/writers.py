"""What a long run writes with: `SpoolWriter`, and `DirectWriter` for runs that may be lost."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Self

from h5traces.archive import open_archive
from h5traces.dtypes import CastCounts
from h5traces.errors import ArchiveError, ArchiveExistsError, CorruptArchiveError
from h5traces.publishing import holds
from h5traces.schema import TraceRecord
from h5traces.spooling.records import as_record
from h5traces.spooling.targets import Contents, Target, joined
from h5traces.storage.part_file import make_folder, remove_abandoned_parts, sync_folder
from h5traces.storage.signals import deferred_signals
from h5traces.verification import verify_written
from h5traces.writer import ArchiveWriter, StoredSample, WriteOptions
from h5traces.writer.observation import observe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from h5traces.spooling.folder import RunState, SpoolFolder

Sample = TraceRecord | Mapping[str, Any]


class TraceWriter(ABC):
    """Writes samples as they come; a context manager, for one thread of one process.

    Leaving the block without an exception closes the run. After an exception everything that was
    acknowledged stays where it is, and `create` with the same arguments goes on.

    Attributes
    ----------
    done
        How many samples there are of each sample id, those of earlier runs included.
    num_samples
        Samples written, those of earlier runs included.
    is_finished
        Whether an earlier run ended here already; nothing can be appended then.
    nbytes
        Bytes that the samples appended to the spool take.
    counts
        By kind, the values of these samples that are not finite, or were changed by casts.
    """

    is_finished = False

    def __init__(
        self, target: Target, state: RunState, options: WriteOptions, *, verify: bool
    ) -> None:
        self._target, self._state, self._options = target, state, options
        self._verify = verify
        self._pid = os.getpid()
        self._closed = False
        self.done: Counter[str] = Counter()
        self.num_samples = 0
        self.nbytes = 0
        self.counts: dict[str, CastCounts] = {}

    @abstractmethod
    def append(self, sample: Sample, sample_id: str | None = None) -> None:
        """Write one sample.

        Parameters
        ----------
        sample
            A `TraceRecord`, the dict of a trace as `pickle` batches held it (arrays or torch
            tensors), or a stored trace.
        sample_id
            The sample's id, where it does not say so itself.

        Raises
        ------
        SchemaError
            Its fields contradict each other, or the samples before.
        ConversionError
            A value has no encoding, or overflows and ``on_overflow`` is ``error``.
        OSError
            The disk is full, or fails. As after every error, this sample is not stored, and all
            samples before are.
        """

    @abstractmethod
    def pack(self) -> list[Path]:
        """Make archives of all full shards now; `append` does so by itself.

        Returns
        -------
        list of Path
            The new archives.
        """

    @abstractmethod
    def close(self) -> None:
        """Make archives of all samples and end the run."""

    @abstractmethod
    def suspend(self) -> None:
        """Let go without packing the rest; `create` with the same arguments goes on."""

    def _check_open(self) -> None:
        if self._closed:
            message = f"{self._target.path}: the writer is closed; create it again to go on"
            raise ArchiveError(message)
        if self._pid != os.getpid():
            message = (
                f"{self._target.path}: the writer belongs to process {self._pid}, this is "
                f"{os.getpid()}; hand samples to that process"
            )
            raise ArchiveError(message)

    def _record(self, sample: Sample, sample_id: str | None) -> TraceRecord:
        record = as_record(sample, sample_id)
        if record.sample_id is None or record.generation_index is not None:
            return record
        # Known here only: neither a spooled sample nor a shard sees the others.
        return record.model_copy(update={"generation_index": self.done[record.sample_id]})

    def _note(self, record: TraceRecord) -> None:
        self.num_samples += 1
        if record.sample_id is not None:
            self.done[record.sample_id] += 1

    def _new_archive(self, path: Path) -> ArchiveWriter:
        return ArchiveWriter(path, self._options, **self._state.facts())

    def _publish(
        self, writer: ArchiveWriter, note: Callable[[], None], *, is_spooled: bool = False
    ) -> None:
        """Finish, verify and name an archive, and note that; signals wait for both."""
        writer.finish()
        if self._verify:
            verify_written(
                writer.part_path,
                writer.digests,
                workers=self._options.workers,
                # Its shard is; inflating everything with zlib takes longer than all the rest.
                whole_through_stock=not is_spooled,
            )
        with deferred_signals():
            writer.publish()
            note()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is None:
            self.close()
        else:
            self.suspend()


class SpoolWriter(TraceWriter):
    """Makes every sample durable as a small archive of its own and packs shards of them later.

    Parameters
    ----------
    folder
        The spool; None where the run is finished.
    """

    def __init__(
        self,
        target: Target,
        state: RunState,
        options: WriteOptions,
        folder: SpoolFolder | None,
        *,
        verify: bool,
    ) -> None:
        super().__init__(target, state, options, verify=verify)
        self._folder = folder
        self.is_finished = folder is None
        for path in target.existing():
            # Left beside a shard whose writer was killed right after naming it.
            remove_abandoned_parts(path)
        shards = [Contents.of(path) for path in target.existing()]
        self._num_shards = len(shards)
        # Digests of the samples that are in no shard yet, by number.
        self._spooled: dict[int, str] = {}
        found = shards
        if folder is not None:
            found = shards + self._read_spool(folder, shards)
        contents = joined(found)
        self._observed, self.done = contents.observed, contents.done
        self.num_samples = len(contents.digests)
        self._next = max([target.first_sample(self._num_shards), *(n + 1 for n in self._spooled)])
        if folder is not None and state.closing and shards and not self._spooled:
            self._finish(folder)

    def _read_spool(self, folder: SpoolFolder, shards: list[Contents]) -> list[Contents]:
        """Look into the spool, and remove what a shard holds: its packer was killed meanwhile."""
        found: list[Contents] = []
        packed: list[int] = []
        for number in folder.samples():
            contents = Contents.of(folder.sample_path(number))
            shard = self._target.shard_of(number)
            if shard >= len(shards):
                found.append(contents)
                (self._spooled[number],) = contents.digests
            elif contents.digests[0] in shards[shard].digests:
                packed.append(number)
            else:
                message = (
                    f"{self._target.shard(shard)} does not hold the sample of "
                    f"{folder.sample_path(number)}, as a shard of this run would; move it away"
                )
                raise CorruptArchiveError(message)
        first = min(self._spooled, default=0)
        if self._target.shard_of(first) > len(shards):
            message = (
                f"{self._target.shard(len(shards))} is missing, but the run got beyond it; put it "
                "back until the run is closed"
            )
            raise ArchiveError(message)
        if packed:
            sync_folder(self._target.folder)
            folder.remove(packed)
        return found

    def append(self, sample: Sample, sample_id: str | None = None) -> None:
        """Write one sample; it is durable when this returns, and survives a loss of power.

        See `TraceWriter.append` for parameters and errors.
        """
        folder = self._spool()
        record = self._record(sample, sample_id)
        # Before the sample is stored: an error means that it is not.
        self.pack()
        self._set_closing(closing=False)
        observed = deepcopy(self._observed)
        observed.add_sample(observe(record), self.num_samples)
        number = self._next
        path = folder.sample_path(number)
        writer = self._new_archive(path)

        def note() -> None:
            self._observed, self._next = observed, number + 1
            (self._spooled[number],) = writer.digests
            self.nbytes += writer.summary.nbytes
            for kind, each in writer.summary.counts.items():
                self.counts[kind] = self.counts.get(kind, CastCounts()) + each
            self._note(record)

        try:
            writer.append(record)
            self._publish(writer, note, is_spooled=True)
        except BaseException:
            writer.discard()
            if number not in self._spooled:
                path.unlink(missing_ok=True)
            raise

    def pack(self) -> list[Path]:
        """Copy the samples of every full shard into an archive, and delete them from the spool."""
        self._spool()
        packed = []
        while self._target.shard_of(self._next) > self._num_shards:
            packed += self._pack_next()
        return packed

    def _pack_next(self) -> list[Path]:
        """Pack the samples of the next shard, however many there are."""
        folder, shard = self._spool(), self._num_shards
        path = self._target.shard(shard)
        numbers = [each for each in self._spooled if self._target.shard_of(each) == shard]

        def note() -> None:
            self._num_shards += 1

        make_folder(path.parent)
        remove_abandoned_parts(path)
        if os.path.lexists(path) and holds(path, [self._spooled[each] for each in numbers]):
            # Named already, but its name could not be made durable then.
            sync_folder(path.parent)
            note()
        else:
            self._copy(numbers, path, note)
        folder.remove(numbers)
        for number in numbers:
            del self._spooled[number]
        return [path]

    def _copy(self, numbers: list[int], path: Path, note: Callable[[], None]) -> None:
        folder = self._spool()
        if os.path.lexists(path):
            message = f"{path} exists and is not of this run; move it away, then go on"
            raise ArchiveExistsError(message)
        writer = self._new_archive(path)
        try:
            for number in numbers:
                with open_archive(folder.sample_path(number)) as archive:
                    writer.copy(StoredSample(archive[0]))
            if list(writer.digests) != [self._spooled[number] for number in numbers]:
                message = f"{folder.path}: samples were changed since they were written"
                raise CorruptArchiveError(message)
            self._publish(writer, note)
        except BaseException:
            writer.discard()
            raise

    def close(self) -> None:
        """Pack what is left and remove the spool; the run is finished."""
        if self._closed or self._folder is None:
            self._closed = True
            return
        folder = self._spool()
        self._set_closing(closing=True)
        self.pack()
        if self._spooled:
            self._pack_next()
        self._finish(folder)
        self._closed = True

    def _set_closing(self, *, closing: bool) -> None:
        """Write down whether an archive that is not full may be the last."""
        if self._state.closing != closing:
            self._state = self._state.model_copy(update={"closing": closing})
            self._spool().save(self._state)

    def _finish(self, folder: SpoolFolder) -> None:
        if self._num_shards:
            sync_folder(self._target.folder)
        folder.remove_all()
        self._folder = None

    def suspend(self) -> None:
        """Let go of the spool, which stays as it is."""
        self._closed = True
        if self._folder is not None:
            self._folder.release()

    def _spool(self) -> SpoolFolder:
        self._check_open()
        if self._folder is None:
            message = (
                f"{self._target.shard(0)} exists and its run is finished, with {self.num_samples} "
                "samples; write to another name, 'h5traces merge' joins them"
            )
            raise ArchiveExistsError(message)
        return self._folder


class DirectWriter(TraceWriter):
    """Writes straight into the archives; samples are safe only when their shard is full."""

    def __init__(
        self, target: Target, state: RunState, options: WriteOptions, *, verify: bool
    ) -> None:
        super().__init__(target, state, options, verify=verify)
        self._writer: ArchiveWriter | None = None
        self._num_shards = 0

    def append(self, sample: Sample, sample_id: str | None = None) -> None:
        """Write one sample; it is durable when its archive has its name.

        See `TraceWriter.append` for parameters and errors. An error deletes the archive that was
        being written.
        """
        self._check_open()
        record = self._record(sample, sample_id)
        self.pack()
        if self._writer is None:
            path = self._target.shard(self._num_shards)
            make_folder(path.parent)
            remove_abandoned_parts(path)
            self._writer = self._new_archive(path)
        try:
            self._writer.append(record)
        except BaseException:
            self.suspend()
            raise
        self._note(record)

    def pack(self) -> list[Path]:
        """Name the archive being written if it is full."""
        self._check_open()
        if self._writer is None or self._writer.num_samples != self._target.shard_samples:
            return []
        return self._name()

    def _name(self) -> list[Path]:
        writer, self._writer = self._writer, None
        if writer is None:
            return []

        def note() -> None:
            self._num_shards += 1

        try:
            self._publish(writer, note)
        except BaseException:
            writer.discard()
            raise
        return [writer.summary.path]

    def close(self) -> None:
        """Name the last archive."""
        if not self._closed:
            self._check_open()
            self._name()
        self._closed = True

    def suspend(self) -> None:
        """Delete the archive that was being written; full shards stay."""
        self._closed = True
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.discard()
