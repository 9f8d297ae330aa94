"""Writers of long runs: their interface, and the one that writes straight into archives."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from h5traces.arguments import checked
from h5traces.errors import ArchiveError
from h5traces.meaning.numbering import Established
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.sample_checks import Look, SampleChecks, vocabulary_of
from h5traces.storage.processes import deferred_signals
from h5traces.storage.publish import make_folder, remove_abandoned_parts
from h5traces.writing.appended import records_of
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import precision_warnings
from h5traces.writing.reading_back import verify_written

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from h5traces.format.dtypes import CastCounts
    from h5traces.format.record import TraceRecord
    from h5traces.meaning.checks import Finding
    from h5traces.paths import Target
    from h5traces.writing.appended import SampleIds
    from h5traces.writing.options import WriteOptions
    from h5traces.writing.spool_folder import RunState


class TraceWriter(ABC):
    """Writes samples as they come; a context manager, for one thread of one process.

    Leaving the block without an exception closes the run. After an exception every acknowledged
    sample stays where it is, and `create` with the same arguments resumes.

    Attributes
    ----------
    done
        Number of samples of each sample id, earlier starts included.
    num_samples
        Samples written, earlier starts included.
    is_finished
        Whether an earlier start finished the run; nothing can be appended then.
    nbytes
        Bytes in the spool of the samples appended by this start.
    counts
        By kind, the values of these samples that are not finite or were changed by casts.
    warnings
        Limits that the chosen precision met.
    findings
        What a quick look at each of these samples found, see ``docs/checks.md``.
    """

    is_finished = False

    def __init__(
        self,
        target: Target,
        state: RunState,
        options: WriteOptions,
        *,
        reading: ReadingOptions = ReadingOptions(),
    ) -> None:
        self._target, self._state, self._options = target, state, options
        self._reading = reading
        extraction = state.extraction
        vocabulary = None if extraction is None else vocabulary_of(extraction.config)
        self._checks = SampleChecks(Look(vocabulary=vocabulary))
        self.findings = self._checks.findings
        self.warnings: list[str] = []
        self._pid = os.getpid()
        self._closed = False
        self._established = Established(num_layers=state.num_layers)
        self.done: Counter[str] = Counter()
        self.later: set[tuple[str, int]] = set()
        self.num_samples = 0
        self.nbytes = 0
        self.counts: dict[str, CastCounts] = {}

    @checked
    def append(self, sample: Any, sample_id: SampleIds = None, *, inputs: Any = None) -> None:
        """Write one sample, or a batch of them.

        Parameters
        ----------
        sample
            A `TraceRecord`, the dict of a trace as `pickle` batches held it (arrays or torch
            tensors), a stored trace, or what a model returned: the output of a forward pass or of
            ``generate()`` of transformers, or an ``ActivationCache`` of TransformerLens, on any
            device. Of outputs, hidden states, attentions and ``sequences`` are stored.
        sample_id
            The sample's id, if the sample does not hold it; for a batch that a model returned, a
            list with one per sequence.
        inputs
            What that model was given: a ``BatchEncoding`` or dict with ``input_ids`` and
            ``attention_mask``, ``(batch, tokens)``, or the ids alone. Padding is cut as in
            conversions.

        Raises
        ------
        SchemaError
            Its fields contradict each other or earlier samples, or ids are not one per sequence.
        ConversionError
            A value cannot be stored, or overflows and ``on_overflow`` is ``error``.
        OptionError
            `inputs` come with something that no model returned.
        OSError
            The disk is full, or fails. As after every error, this sample is not stored, and all
            earlier samples are, of a batch those before it.
        """
        self._check_open()
        for record in records_of(sample, sample_id, inputs, self._reading, self._established):
            self._append(self._placed(record))

    def append_records(self, records: Sequence[TraceRecord]) -> None:
        """As `append` for each, in fewer writes where records can be stored together."""
        for each in records:
            self.append(each)

    @abstractmethod
    def _append(self, record: TraceRecord) -> None:
        """Write one record."""

    @abstractmethod
    def pack(self) -> list[Path]:
        """Make archives of all full shards now, as the next `append` would.

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
        """Stop without packing the rest; `create` with the same arguments resumes."""

    def _check_open(self) -> None:
        if self._closed:
            message = f"{self._target.path}: the writer is closed; create it again to resume"
            raise ArchiveError(message)
        if self._pid != os.getpid():
            message = (
                f"{self._target.path}: the writer belongs to process {self._pid}, this is "
                f"{os.getpid()}; hand samples to that process"
            )
            raise ArchiveError(message)

    def _placed(self, record: TraceRecord) -> TraceRecord:
        if record.sample_id is None or record.generation_index is not None:
            return record
        # Only the run knows: neither a spooled sample nor a shard sees the others.
        return record.model_copy(update={"generation_index": self.done[record.sample_id]})

    def _note(self, record: TraceRecord, content: str, not_finite: list[Finding]) -> None:
        self._checks.add(record, content, not_finite)
        self.num_samples += 1
        if record.sample_id is not None:
            self.done[record.sample_id] += 1
            if record.generation_index:
                self.later.add((record.sample_id, record.generation_index))

    def _new_archive(self, path: Path, options: WriteOptions | None = None) -> ArchiveWriter:
        return ArchiveWriter(path, options or self._options, **self._state.facts())

    def _publish(
        self, writer: ArchiveWriter, note: Callable[[], None], *, is_spooled: bool = False
    ) -> None:
        """Finish, verify and name an archive, then call `note`; signals wait for both."""
        writer.finish()
        if self._options.verify:
            verify_written(
                writer.part_path,
                writer.digests,
                workers=self._options.workers,
                looked_back=writer.looked_back,
                # Shards are checked so; inflating every spooled sample with zlib takes longer
                # than everything else.
                stock_at_ends=not is_spooled,
            )
        with deferred_signals():
            writer.publish()
            note()
        self.warnings += precision_warnings(writer.summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is None:
            self.close()
        else:
            self.suspend()


class DirectWriter(TraceWriter):
    """Writes straight into the archives; samples are safe only when their shard is full."""

    def __init__(
        self,
        target: Target,
        state: RunState,
        options: WriteOptions,
        *,
        reading: ReadingOptions = ReadingOptions(),
    ) -> None:
        super().__init__(target, state, options, reading=reading)
        self._writer: ArchiveWriter | None = None
        self._num_shards = 0

    def _append(self, record: TraceRecord) -> None:
        """Write one record; it is durable when its archive has its name.

        An error deletes the archive that was being written.
        """
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
        self._note(record, self._writer.content, self._writer.not_finite)

    def pack(self) -> list[Path]:
        """Name the archive being written if it is full."""
        self._check_open()
        writer = self._writer
        if writer is None or writer.summary.num_samples != self._target.shard_samples:
            return []
        self._name(writer)
        return [writer.summary.path]

    def _name(self, writer: ArchiveWriter) -> None:
        self._writer = None

        def note() -> None:
            self._num_shards += 1

        try:
            self._publish(writer, note)
        except BaseException:
            writer.discard()
            raise

    def close(self) -> None:
        """Name the last archive."""
        if not self._closed:
            self._check_open()
            if self._writer is not None:
                self._name(self._writer)
        self._closed = True

    def suspend(self) -> None:
        """Delete the archive that was being written; full shards stay."""
        self._closed = True
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.discard()
