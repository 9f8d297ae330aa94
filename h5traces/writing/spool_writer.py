"""Stores samples durably in small archives, one or some in each, and packs these into shards."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

from h5traces.archive.opening import open as open_archive
from h5traces.archive.scales import stored_scales
from h5traces.errors import (
    ArchiveError,
    ArchiveExistsError,
    CorruptArchiveError,
    StoredStateWarning,
    warn,
)
from h5traces.format.dtypes import CastCounts
from h5traces.format.precision import EXACT
from h5traces.meaning.options import ReadingOptions
from h5traces.storage.publish import make_folder, remove_abandoned_parts, sync_folder
from h5traces.writing.calibrate import measured
from h5traces.writing.options import AUTOMATIC_SAMPLES
from h5traces.writing.preparation import Observation, observe
from h5traces.writing.shards import Contents, holds, joined, sample_digests
from h5traces.writing.stored_samples import StoredSample, to_record
from h5traces.writing.trace_writer import TraceWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from h5traces.format.record import TraceRecord
    from h5traces.meaning.checks import Finding
    from h5traces.paths import Target
    from h5traces.precision.scales import Calibration
    from h5traces.writing.options import WriteOptions
    from h5traces.writing.spool_folder import RunState, SpoolFolder


class SpoolWriter(TraceWriter):
    """Stores every sample durably in the spool, and packs full shards later.

    A finished run has no spool. Scales that were not given are measured on the first samples.
    """

    def __init__(
        self,
        target: Target,
        state: RunState,
        options: WriteOptions,
        folder: SpoolFolder | None,
        *,
        calibration: Calibration | None = None,
        calibration_samples: int = AUTOMATIC_SAMPLES,
        reading: ReadingOptions = ReadingOptions(),
    ) -> None:
        super().__init__(target, state, options, reading=reading)
        self._set_up(folder, options, calibration, calibration_samples)
        self.is_finished = folder is None
        for path in target.existing():
            # From a writer that was killed right after naming its shard.
            remove_abandoned_parts(path)
        shards = [Contents.of(path) for path in target.existing()]
        self._num_shards = len(shards)
        found = shards
        if folder is not None:
            found = shards + self._read_spool(folder, shards)
        contents = joined(found)
        self._observed, self.done, self.later = contents.observed, contents.done, contents.later
        self.num_samples = len(contents.digests)
        self._checks.resume(self.num_samples, self.done)
        ends = (number + len(digests) for number, digests in self._spooled.items())
        self._next = max([target.first_sample(self._num_shards), *ends])
        if folder is not None and state.closing and shards and not self._spooled:
            self._finish(folder)

    def _set_up(
        self,
        folder: SpoolFolder | None,
        options: WriteOptions,
        calibration: Calibration | None,
        samples: int,
    ) -> None:
        self._folder = folder
        self._exact = replace(options, precision=EXACT, scales=None)
        self._calibration, self._calibration_samples = calibration, samples
        # Digests of the samples that are in no shard yet, by the number of the first in their file.
        self._spooled: dict[int, list[str]] = {}
        self._num_shards = self._next = 0
        self._observed = Observation()

    def _read_spool(self, folder: SpoolFolder, shards: list[Contents]) -> list[Contents]:
        """Read the spool, and remove samples that a shard holds: their packer was killed."""
        found: list[Contents] = []
        packed: list[int] = []
        for number in folder.samples():
            contents = Contents.of(folder.sample_path(number))
            shard = self._target.shard_of(number)
            if shard >= len(shards):
                found.append(contents)
                self._spooled[number] = contents.digests
            elif set(contents.digests) <= set(shards[shard].digests):
                packed.append(number)
            else:
                message = (
                    f"{self._target.shard(shard)} does not hold the sample of "
                    f"{folder.sample_path(number)}, so it is not a shard of this run; move it away"
                )
                raise CorruptArchiveError(message)
        first = min(self._spooled, default=0)
        if self._target.shard_of(first) > len(shards):
            message = (
                f"{self._target.shard(len(shards))} is missing, but later samples exist; put it "
                "back until the run is closed"
            )
            raise ArchiveError(message)
        if packed:
            sync_folder(self._target.folder)
            folder.remove(packed)
        self._warn_of_missing(folder, self._target.first_sample(len(shards)))
        return found

    def _warn_of_missing(self, folder: SpoolFolder, first: int) -> None:
        """Warn of gaps in the numbers: somebody removed samples."""
        numbers = range(first, max(self._spooled, default=first))
        found = {n + place for n, each in self._spooled.items() for place in range(len(each))}
        missing = [number for number in numbers if number not in found]
        if missing:
            message = (
                f"{folder.sample_path(missing[0])} is missing ({len(missing)} such); the run "
                "continues without it, and it counts as not done"
            )
            warn(message, StoredStateWarning)

    def _append(self, record: TraceRecord) -> None:
        """Write one record; when this returns, it survives even a loss of power."""
        self._write([record])

    def append_records(self, records: Sequence[TraceRecord]) -> None:
        """Write records into one file; when this returns, all survive even a loss of power.

        After an error, those before the one that could not be written are stored.
        """
        self._check_open()
        waiting = [self._placed(each) for each in records]
        while waiting:
            size = self._target.shard_samples
            room = len(waiting) if size is None else size - self._next % size
            together, waiting = waiting[:room], waiting[room:]
            try:
                self._write(together)
            except Exception:
                # One by one, to store those that can be.
                if len(together) == 1:
                    raise
                for each in together:
                    self._write([each])

    def _write(self, records: Sequence[TraceRecord]) -> None:
        """Write records of one shard into one file."""
        folder = self._spool()
        # First, because an error must mean that the samples are not stored.
        self.pack()
        self._set_closing(closing=False)
        observed = deepcopy(self._observed)
        number = self._next
        path = folder.sample_path(number)
        writer = self._new_archive(path, self._exact)
        written: list[tuple[TraceRecord, str, list[Finding]]] = []

        def note() -> None:
            self._observed, self._next = observed, number + len(records)
            self._spooled[number] = writer.digests
            self.nbytes += writer.summary.nbytes
            for kind, each in writer.summary.counts.items():
                self.counts[kind] = self.counts.get(kind, CastCounts()) + each
            for found in written:
                self._note(*found)

        try:
            for place, record in enumerate(records):
                observed.add_sample(observe(record), self.num_samples + place)
                writer.append(record)
                written.append((record, writer.content, writer.not_finite))
            self._publish(writer, note, is_spooled=True)
        except BaseException:
            writer.discard()
            if number not in self._spooled:
                path.unlink(missing_ok=True)
            raise

    def pack(self) -> list[Path]:
        """Copy the samples of every full shard into an archive, and remove them from the spool."""
        self._spool()
        packed = []
        while self._target.shard_of(self._next) > self._num_shards:
            packed.append(self._pack_next())
        return packed

    def _pack_next(self) -> Path:
        """Pack the samples of the next shard, full or not."""
        folder, shard = self._spool(), self._num_shards
        path = self._target.shard(shard)
        numbers = [each for each in self._spooled if self._target.shard_of(each) == shard]

        def note() -> None:
            self._num_shards += 1

        make_folder(path.parent)
        remove_abandoned_parts(path)
        digests = [digest for each in numbers for digest in self._spooled[each]]
        if os.path.lexists(path) and holds(path, digests, before_loss=True):
            # Its name exists but could not be made durable then.
            sync_folder(path.parent)
            note()
        else:
            self._copy(numbers, path, note)
        # Packed, whether or not their files can be removed now.
        for number in numbers:
            del self._spooled[number]
        folder.remove(numbers)
        return path

    def _copy(self, numbers: list[int], path: Path, note: Callable[[], None]) -> None:
        folder = self._spool()
        if os.path.lexists(path):
            message = f"{path} exists and is not of this run; move it away, then resume"
            raise ArchiveExistsError(message)
        writer = self._new_archive(path, self._packing_options(numbers))
        try:
            for number in numbers:
                with open_archive(folder.sample_path(number)) as archive:
                    if sample_digests(archive._files[0]) != self._spooled[number]:
                        message = f"{folder.sample_path(number)}: changed after it was written"
                        raise CorruptArchiveError(message)
                    for trace in archive:
                        if self._options.precision.is_exact:
                            writer.copy(StoredSample(trace))
                        else:
                            writer.append(to_record(trace))
            self._publish(writer, note)
        except BaseException:
            writer.discard()
            raise

    def _packing_options(self, numbers: list[int]) -> WriteOptions:
        """The options of a shard: all have the scales of the first."""
        step = self._options.precision.step
        if step is None:
            return self._options
        if self._num_shards:
            with open_archive(self._target.shard(0)) as archive:
                return replace(self._options, scales=stored_scales(archive._files[0].store))
        calibration = self._calibration
        if calibration is None:
            paths = [self._spool().sample_path(each) for each in numbers]
            with open_archive(paths[: self._calibration_samples]) as archive:
                calibration = measured(archive, self._calibration_samples)
        return replace(self._options, scales=calibration.scales(step))

    def close(self) -> None:
        """Pack the remaining samples and remove the spool; the run is finished."""
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
        """Record whether the last archive may be less than full."""
        if self._state.closing != closing:
            self._state = self._state.model_copy(update={"closing": closing})
            self._spool().save(self._state)

    def _finish(self, folder: SpoolFolder) -> None:
        if self._num_shards:
            sync_folder(self._target.folder)
        # Some could not be removed when they were packed.
        folder.remove(folder.samples())
        folder.remove_all()
        self._folder = None

    def suspend(self) -> None:
        """Release the spool and leave it unchanged."""
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
