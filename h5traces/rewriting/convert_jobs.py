"""Runs the jobs of a conversion."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.archive.selection import as_numbers, choose_layers
from h5traces.errors import (
    ArchiveExistsError,
    ConversionError,
    H5TracesError,
    LayerIndexError,
    SchemaError,
)
from h5traces.format.archive import SourceFile, add_casts
from h5traces.format.dtypes import CastCounts, TypedArray
from h5traces.meaning.checks import CheckOptions
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.padding import num_cut
from h5traces.meaning.sample_checks import SampleChecks
from h5traces.paths import Target
from h5traces.rewriting.existing import Wanted, compare_existing, source_file
from h5traces.rewriting.reports import FileReport, cast_warnings
from h5traces.sources.opening import facts_in_name, open_source
from h5traces.sources.runs import Runs, merged, reading_in_run
from h5traces.storage.memory import keep_freed
from h5traces.storage.publish import remove_abandoned_parts, sync_folder
from h5traces.storage.threads import ReadAhead
from h5traces.writing.options import TargetOptions, WriteOptions, WriteSummary, precision_warnings
from h5traces.writing.shards import ShardSet, stale_warnings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from h5traces.archive.selection import LayerChoice
    from h5traces.format.record import SourcePosition, TraceRecord
    from h5traces.rewriting.convert_plan import Job
    from h5traces.rewriting.uploads import ExistingUploads, Uploads


# Samples that are read before they can be written take at most this much: while a large one is
# read, the small ones before it are written.
_AHEAD_NBYTES: Final = 64 << 20
# Of a record without arrays.
_RECORD_NBYTES: Final = 64 << 10

# Called with the source, how many of its bytes are read, and samples written since the last call.
Report = Callable[[Path, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How batches are converted; see `convert`."""

    layers: LayerChoice = None
    target: TargetOptions = TargetOptions()
    reading: ReadingOptions = ReadingOptions()
    checks: CheckOptions = CheckOptions()
    model_id: str | None = None
    dataset: str | None = None
    write: WriteOptions = field(default_factory=WriteOptions)
    # Facts that the runs of the sources establish.
    runs: Runs = field(default_factory=dict)
    # Where archives are uploaded, unless they stay where they are written.
    uploads: Uploads | None = None
    # Those that the archives record, see `recorded_options`.
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def reading_of(self, source: Path) -> ReadingOptions:
        """How to read a source."""
        return reading_in_run(source, self.reading, self.runs)

    def recorded_of(self, sources: Sequence[Path]) -> dict[str, Any]:
        """The options that an archive of these sources records."""
        found = merged([self.reading_of(each).run for each in sources])
        return {**self.recorded, "run": found.as_dict()} if found else dict(self.recorded)

    def facts(self, source: Path) -> dict[str, str | None]:
        """``model_id`` and ``dataset``: as given, else as the source's name says."""
        names = facts_in_name(source)
        return {
            "model_id": self.model_id or names.get("model_id"),
            "dataset": self.dataset or names.get("dataset"),
        }


def run_job(job: Job, options: ConvertOptions, report_progress: Report) -> FileReport:
    """Convert, skip or plan one job; its problems end in its report."""
    report = FileReport(
        sources=[str(source) for source in job.sources],
        targets=[str(job.first_target)],
        source_nbytes=job.nbytes,
    )
    uploads = options.uploads
    try:
        existing = job.target if uploads is None else uploads.existing(job)
    except (H5TracesError, OSError) as error:
        report.status, report.error = "failed", str(error)
        return report
    exists = job.first_target.exists() if uploads is None else existing is not None
    if uploads is not None:
        report.targets = [str(uploads.place(job.first_target))]
    if exists and options.target.skip_existing:
        _keep_existing(job, existing or job.target, options, report)
    elif exists and uploads is not None and not options.target.overwrite:
        report.status, report.is_usage_error = "failed", True
        report.error = (
            f"{report.targets[0]} exists; use overwrite=True to replace it, or skip_existing=True "
            "to keep it"
        )
    elif options.target.dry_run:
        if exists and not options.target.overwrite:
            report.status, report.is_usage_error = "failed", True
            report.error = (
                f"{job.first_target} exists; use overwrite=True to replace it, or "
                "skip_existing=True to keep it"
            )
    else:
        started = time.perf_counter()
        _convert_job(job, options, report_progress, report)
        if uploads is not None and report.status == "converted":
            uploads.send(report, overwrite=options.target.overwrite)
        report.seconds = time.perf_counter() - started
    if report.status != "converted":
        for source in job.sources:
            report_progress(source, source.stat().st_size, 0)
    return report


def _keep_existing(
    job: Job, existing: Target | ExistingUploads, options: ConvertOptions, report: FileReport
) -> None:
    """Keep the archives of an earlier run if they are what this job would write."""
    wanted = Wanted(
        sources=job.sources,
        write=options.write,
        layers=options.layers,
        facts=options.facts(job.sources[0]),
        options=options.recorded_of(job.sources),
        compare=options.target.compare,
    )
    try:
        compared = compare_existing(existing, wanted)
    except (H5TracesError, OSError) as error:
        report.status, report.error, report.is_usage_error = "failed", str(error), True
        return
    if compared.differs:
        report.status, report.is_usage_error = "failed", True
        report.error = compared.message(existing.existing()[0])
        return
    if compared.unknown:
        report.warnings.append(compared.warning())
    if not isinstance(existing, Target):
        report.status, report.targets = "skipped", [str(each) for each in existing.existing()]
        return
    shards = existing.existing()
    # Its writer may have been killed between naming it and making the name durable.
    sync_folder(job.first_target.parent)
    for target in shards:
        remove_abandoned_parts(target)
    report.status, report.targets = "skipped", [str(each) for each in shards]
    report.archive_nbytes = sum(each.stat().st_size for each in shards)


def _convert_job(
    job: Job, options: ConvertOptions, report_progress: Report, report: FileReport
) -> None:
    """Convert a job; a source that cannot be read is left out of a merge, the others go in."""
    sources = list(job.sources)
    report.is_usage_error = True
    while sources:
        conversion = _Conversion(job, sources, options, report_progress)
        try:
            try:
                conversion.run()
            finally:
                for left_out in conversion.left_out:
                    _leave_out(left_out, sources, report)
        except _SourceFailedError as failed:
            _leave_out(failed, sources, report)
            continue
        except (H5TracesError, OSError) as error:
            lost = isinstance(error, ArchiveExistsError) and options.target.skip_existing
            if lost and job.first_target.exists():
                # Another process was faster: its archive counts, if it is the same.
                _keep_existing(job, job.target, options, report)
                return
            report.error = _joined(report.error, _reason(error, job.first_target))
            report.status = "failed"
            report.is_usage_error &= _is_usage(error)
            return
        conversion.fill(report)
        report.warnings += stale_warnings(job.target, report.targets)
        report.is_usage_error &= report.error is not None
        return
    report.status = "failed"


def _leave_out(failed: _SourceFailedError, sources: list[Path], report: FileReport) -> None:
    report.warnings.append(f"left out of the merge: {failed.reason}")
    report.error = _joined(report.error, failed.reason)
    report.is_usage_error &= _is_usage(failed)
    sources.remove(failed.source)


def _is_usage(error: Exception) -> bool:
    return isinstance(error, ArchiveExistsError) or isinstance(error.__cause__, LayerIndexError)


def _joined(first: str | None, second: str) -> str:
    return second if first is None else f"{first}; {second}"


def _reason(error: Exception, target: Path) -> str:
    """The message of an error, which for the operating system's own must name the target."""
    if isinstance(error, OSError) and not isinstance(error, H5TracesError):
        return (
            f"{target}: cannot be written: {error}; nothing of it was kept, archives written "
            "before are whole; make room or choose another folder, then run again with "
            "skip_existing=True"
        )
    if isinstance(error, ArchiveExistsError):
        return f"{error}; skip_existing=True keeps what is finished"
    return str(error)


class _SourceFailedError(Exception):
    """One of several sources cannot be read."""

    def __init__(self, source: Path, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason
        # Whether the written archives may hold a part of it.
        self.has_traces = True


class _Conversion:
    """One attempt at a job: writes all targets, then publishes them."""

    def __init__(
        self, job: Job, sources: list[Path], options: ConvertOptions, report_progress: Report
    ) -> None:
        self._job, self._sources, self._options = job, list(sources), options
        # Sources that failed before anything of them was written.
        self.left_out: list[_SourceFailedError] = []
        self._report_progress = report_progress
        self._shards = ShardSet(options.write)
        self._recorded: list[SourceFile] = []
        self._source_counts: list[int] = [0] * len(sources)
        self._num_layers = 0
        self._summaries: list[WriteSummary] = []
        self._checks = SampleChecks()
        self._num_cut = 0
        self._understood: list[str] = []
        self._unread: list[str] = []

    def run(self) -> None:
        """Convert; an exception leaves no file."""
        try:
            # As they are before they are read; compared again when they have been.
            keep_freed()
            self._recorded = [self._as_it_is(source) for source in self._sources]
            number = 0
            for source in tuple(self._sources):
                try:
                    self._read_source(number, source)
                except _SourceFailedError as failed:
                    if failed.has_traces or self._summaries:
                        raise
                    self._go_on_without(number, failed)
                    continue
                self._report_progress(source, self._recorded[number].nbytes, 0)
                number += 1
            if not self._shards.writers:
                self._new_writer()
            self._finish_writer()
            self._shards.publish()
        except BaseException:
            self._shards.discard()
            raise

    def _read_source(self, number: int, source: Path) -> None:
        try:
            opened = _Opened()
            make = partial(_records, source, number, self._options, opened)
            with ReadAhead(
                make, nbytes=lambda ready: ready.nbytes, most_nbytes=_AHEAD_NBYTES
            ) as records:
                while (ready := next(records, None)) is not None:
                    self._num_layers = max(self._num_layers, ready.num_layers)
                    self._write(ready.record, source)
                    self._source_counts[number] += 1
                    self._report_progress(source, ready.position, 1)
                    # Others are being read already.
                    del ready
            self._check_unchanged(source, self._recorded[number])
            self._understood += opened.understood
            self._unread += [f"{source}: {each}" for each in opened.unread]
        except _SampleError as error:
            failed = self._failed(source, str(error))
            if isinstance(failed, _SourceFailedError):
                failed.has_traces = error.was_written or self._source_counts[number] > 0
            raise failed from error.__cause__

    def _go_on_without(self, number: int, failed: _SourceFailedError) -> None:
        """Leave a source out as if it had never been named."""
        for each in (self._sources, self._recorded, self._source_counts):
            del each[number]
        self.left_out.append(failed)

    def _failed(self, source: Path, message: str) -> Exception:
        """The error of a source: of several, the others are read without it."""
        several = len(self._sources) > 1
        return _SourceFailedError(source, message) if several else ConversionError(message)

    def _as_it_is(self, source: Path) -> SourceFile:
        try:
            return source_file(source, whole=self._options.target.compare == "content")
        except (H5TracesError, OSError) as error:
            raise self._failed(source, str(error)) from error

    @staticmethod
    def _check_unchanged(source: Path, before: SourceFile) -> None:
        """A source that grew while it was read is in the archive in part only."""
        now = source_file(source)
        if (now.nbytes, now.modified_ns) != (before.nbytes, before.modified_ns):
            message = (
                f"{source}: was changed while it was read ({before.nbytes:,} bytes before, "
                f"{now.nbytes:,} now); convert it again when its writer is done"
            )
            raise _SampleError(message)

    def _write(self, record: TraceRecord, source: Path) -> None:
        size, writers = self._options.target.shard_samples, self._shards.writers
        if not writers:
            self._new_writer()
        elif size is not None and writers[-1].summary.num_samples >= size:
            self._finish_writer()
            self._new_writer()
        try:
            writers[-1].append(record)
        except (ConversionError, SchemaError) as error:
            raise _SampleError(_placed(error, source, record.source), was_written=True) from error
        self._checks.add(record, writers[-1].content, writers[-1].not_finite)
        self._num_cut += num_cut(record)

    def _new_writer(self) -> None:
        target = self._job.target.shard(len(self._shards.writers))
        facts = self._options.facts(self._sources[0])
        self._shards.new(target, **facts, conversion=self._options.recorded_of(self._sources))
        self._source_counts = [0] * len(self._sources)

    def _finish_writer(self) -> None:
        sources = tuple(
            each.model_copy(update={"num_samples": count})
            for each, count in zip(self._recorded, self._source_counts, strict=True)
        )
        self._shards.finish(sources=sources, num_layers=self._num_layers or None)
        self._summaries.append(self._shards.writers[-1].summary)

    def fill(self, report: FileReport) -> None:
        """Report what was done."""
        raw, stored = Counter[str](), Counter[str]()
        counts: dict[str, CastCounts] = {}
        for summary in self._summaries:
            report.warnings += precision_warnings(summary)
            raw += summary.raw_nbytes
            stored += summary.stored_nbytes
            for kind, each in summary.counts.items():
                counts[kind] = counts.get(kind, CastCounts()) + each
        report.status = "converted"
        report.targets = [str(summary.path) for summary in self._summaries]
        report.num_samples = sum(summary.num_samples for summary in self._summaries)
        report.archive_nbytes = sum(summary.nbytes for summary in self._summaries)
        report.raw_nbytes, report.stored_nbytes = dict(raw), dict(stored)
        # As they were written: no archive is opened for it again.
        written = [writer.metadata for writer in self._shards.writers]
        casts = add_casts(cast for each in written for cast in each.casts or ())
        metadata = written[0].model_copy(update={"casts": casts})
        report.is_lossless, report.changes = metadata.is_lossless, metadata.changes
        report.kept_layers = metadata.kept_layers
        report.understood = list(dict.fromkeys(self._understood))
        report.unread = self._unread
        report.num_cut = self._num_cut
        report.findings = self._checks.findings.summaries(self._options.checks)
        report.warnings += cast_warnings(counts, self._options.write)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A record, how far its file was read, how many layers the source had, and what it takes."""

    record: TraceRecord
    position: int
    num_layers: int
    nbytes: int


def _nbytes(record: TraceRecord) -> int:
    """Bytes of a record's arrays and texts; of one that holds more, too many."""
    found = _RECORD_NBYTES + sum(map(sys.getsizeof, record.tokens_decoded or ()))
    layers = (each.array for layered in record.layered.values() for each in layered.arrays)
    others = record.tokens, record.attention_mask, *record.texts.values(), *record.extra.values()
    for value in (*layers, *others):
        if isinstance(value, TypedArray):
            found += value.values.nbytes
        elif isinstance(value, np.ndarray):
            found += value.nbytes
        elif isinstance(value, (str, int, float, type(None))):
            found += sys.getsizeof(value)
        else:
            return _AHEAD_NBYTES
    return found


@dataclass(slots=True)
class _Opened:
    """What a source states about itself after it was read."""

    understood: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


class _SampleError(Exception):
    """A source is unreadable; the message names file, sample and field.

    `was_written`: the sample was read, and a part of it may be written.
    """

    def __init__(self, message: str, *, was_written: bool = False) -> None:
        super().__init__(message)
        self.was_written = was_written


def _records(
    source: Path, number: int, options: ConvertOptions, found: _Opened
) -> Iterator[_Ready]:
    """The records of one batch file; `found` is filled when all are read."""
    try:
        chosen = _chosen(source, options)
        with open_source(source, options.reading_of(source)) as opened:
            for record in opened.records(file=number, layers=chosen):
                # Other readers have memory of their own, or map the file, which takes no time.
                nbytes = _nbytes(record) if opened.kind == "pickle" else _AHEAD_NBYTES
                ready = _Ready(record, opened.progress[0], opened.num_layers, nbytes)
                del record
                yield ready
                # Nothing but those who wait for it and who write it keep it.
                del ready
            found.understood += opened.understood
            found.unread += opened.unread
    except (ConversionError, LayerIndexError, OSError) as error:
        raise _SampleError(str(error)) from error


def _chosen(source: Path, options: ConvertOptions) -> tuple[int, ...] | None:
    """Layer numbers; text may say ``last``, which is the source's."""
    layers = options.layers
    if layers is None or not isinstance(layers, str):
        return None if layers is None else as_numbers(layers)
    with open_source(source, options.reading_of(source)) as opened:
        next(opened.records(), None)
        return choose_layers(layers, opened.established.numbers, f"{source} has")


def _placed(error: Exception, source: Path, place: SourcePosition | None) -> str:
    position = "" if place is None else f"sample {place.position}: "
    return f"{source}: {position}{error}"
