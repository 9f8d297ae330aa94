"""Writes samples straight into the archives, for runs that may be lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces.storage.publish import make_folder, remove_abandoned_parts
from h5traces.writing.trace_writer import TraceWriter

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.writing.archive_writer import ArchiveWriter
    from h5traces.writing.options import WriteOptions
    from h5traces.writing.spool_folder import RunState
    from h5traces.writing.targets import Target
    from h5traces.writing.trace_writer import Sample


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
