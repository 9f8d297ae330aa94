"""Runs the jobs of a conversion: one batch, or one merge, to one archive or one set of shards."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.opening import open_archive
from h5traces.errors import ConversionError, H5TracesError, SchemaError, StoredStateWarning
from h5traces.format.archive import SourceFile
from h5traces.format.dtypes import CastCounts
from h5traces.format.precision import EXACT
from h5traces.format.trace import SourcePosition
from h5traces.rewriting.reading_ahead import ReadAhead
from h5traces.rewriting.reports import FileReport, cast_warnings, coverage_warnings
from h5traces.sources.pickle.layouts import names_in_file_name, num_layers_of, to_record
from h5traces.sources.pickle.stream import open_batch
from h5traces.storage.publish import remove_abandoned_parts, sync_folder
from h5traces.writing.options import WriteOptions, WriteSummary, precision_warnings
from h5traces.writing.shards import ShardSet

if TYPE_CHECKING:
    from h5traces.format.record import TraceRecord
    from h5traces.rewriting.convert_plan import Job

# Called with the source, how many of its bytes are read, and samples written since the last call.
Report = Callable[[Path, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How batches are converted; see `convert`."""

    layers: tuple[int, ...] | None = None
    merge: bool = False
    shard_samples: int | None = None
    skip_existing: bool = False
    verify: bool = True
    dry_run: bool = False
    model_id: str | None = None
    dataset: str | None = None
    write: WriteOptions = field(default_factory=WriteOptions)


def run_job(job: Job, options: ConvertOptions, report_progress: Report) -> FileReport:
    """Convert, skip or plan one job; its problems end in its report."""
    report = FileReport(
        sources=[str(source) for source in job.sources],
        targets=[str(job.first_target)],
        source_nbytes=sum(source.stat().st_size for source in job.sources),
    )
    exists = job.first_target.exists()
    if exists and options.skip_existing and (odd := _unlike(job.first_target, options)) is not None:
        report.status, report.error = "failed", odd
    elif exists and options.skip_existing:
        # Its writer may have been killed between naming it and making the name durable.
        sync_folder(job.first_target.parent)
        report.status, report.targets = "skipped", [str(each) for each in job.existing_targets()]
        for target in job.existing_targets():
            remove_abandoned_parts(target)
        report.archive_nbytes = sum(each.stat().st_size for each in job.existing_targets())
    elif options.dry_run:
        if exists and not options.write.overwrite:
            report.status = "failed"
            report.error = f"{job.first_target} exists; use --overwrite or --skip-existing"
    else:
        started = time.perf_counter()
        _convert_job(job, options, report_progress, report)
        report.seconds = time.perf_counter() - started
    if report.status != "converted":
        for source in job.sources:
            report_progress(source, source.stat().st_size, 0)
    return report


def _unlike(target: Path, options: ConvertOptions) -> str | None:
    """Why a target that exists is no archive that this job would write; None where it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoredStateWarning)
            with open_archive(target) as archive:
                found = archive.metadata.precision or EXACT
        if found != options.write.precision:
            return (
                f"{target} exists, of precision {found}, not {options.write.precision}; choose "
                "another output, or use --overwrite"
            )
    except (H5TracesError, OSError) as error:
        return f"{error}; it stands where an archive would go: move it, or use --overwrite"
    return None


def _convert_job(
    job: Job, options: ConvertOptions, report_progress: Report, report: FileReport
) -> None:
    """Convert a job; a source that cannot be read is left out of a merge, the others go in."""
    sources = list(job.sources)
    while sources:
        conversion = _Conversion(job, sources, options, report_progress)
        try:
            conversion.run()
        except _SourceFailedError as failed:
            report.warnings.append(f"left out of the merge: {failed.reason}")
            report.error = _joined(report.error, failed.reason)
            sources.remove(failed.source)
            continue
        except (H5TracesError, OSError) as error:
            report.error = _joined(report.error, _reason(error, job.target))
            report.status = "failed"
            return
        conversion.fill(report)
        return
    report.status = "failed"


def _joined(first: str | None, second: str) -> str:
    return second if first is None else f"{first}; {second}"


def _reason(error: Exception, target: Path) -> str:
    """The message of an error, which for the operating system's own must name the target."""
    if isinstance(error, OSError) and not isinstance(error, H5TracesError):
        return (
            f"{target}: cannot be written: {error}; nothing of it was kept, archives written "
            "before are whole; make room or choose another folder, then run again with "
            "--skip-existing"
        )
    return str(error)


class _SourceFailedError(Exception):
    """One of several sources cannot be read."""

    def __init__(self, source: Path, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason


class _Conversion:
    """One attempt at a job: writes all targets, then publishes them."""

    def __init__(
        self, job: Job, sources: list[Path], options: ConvertOptions, report_progress: Report
    ) -> None:
        self._job, self._sources, self._options = job, sources, options
        self._report_progress = report_progress
        self._shards = ShardSet(options.write, verify=options.verify)
        self._source_counts: list[int] = [0] * len(sources)
        self._num_layers = 0
        self._summaries: list[WriteSummary] = []

    def run(self) -> None:
        """Convert; on an exception nothing is left behind."""
        try:
            for number, source in enumerate(self._sources):
                self._read_source(number, source)
                self._report_progress(source, source.stat().st_size, 0)
            if not self._shards.writers:
                self._new_writer()
            self._finish_writer()
            self._shards.publish()
        except BaseException:
            self._shards.discard()
            raise

    def _read_source(self, number: int, source: Path) -> None:
        try:
            with ReadAhead(lambda: _records(source, number, self._options.layers)) as records:
                while (ready := next(records, None)) is not None:
                    self._num_layers = max(self._num_layers, ready.num_layers)
                    self._write(ready.record, source)
                    self._source_counts[number] += 1
                    self._report_progress(source, ready.position, 1)
                    # The next sample is being read already: keep no more than these two.
                    del ready
        except _SampleError as error:
            cause = error.__cause__
            if len(self._sources) > 1:
                raise _SourceFailedError(source, str(error)) from cause
            raise ConversionError(str(error)) from cause

    def _write(self, record: TraceRecord, source: Path) -> None:
        size, writers = self._options.shard_samples, self._shards.writers
        if not writers:
            self._new_writer()
        elif size is not None and writers[-1].num_samples >= size:
            self._finish_writer()
            self._new_writer()
        try:
            writers[-1].append(record)
        except (ConversionError, SchemaError) as error:
            raise _SampleError(_placed(error, source, record.source)) from error

    def _new_writer(self) -> None:
        target = self._job.shard(len(self._shards.writers))
        names = names_in_file_name(self._sources[0].name)
        facts = {
            "model_id": self._options.model_id or names.get("model_id"),
            "dataset": self._options.dataset or names.get("dataset"),
        }
        self._shards.new(target, **facts)
        self._source_counts = [0] * len(self._sources)

    def _finish_writer(self) -> None:
        sources = tuple(
            SourceFile(name=path.name, nbytes=path.stat().st_size, num_samples=count)
            for path, count in zip(self._sources, self._source_counts, strict=True)
        )
        self._shards.finish(sources=sources, num_layers=self._num_layers or None)
        self._summaries.append(self._shards.writers[-1].summary)

    def fill(self, report: FileReport) -> None:
        """Tell what was done."""
        raw, stored, coverage = Counter[str](), Counter[str](), Counter[str]()
        counts: dict[str, CastCounts] = {}
        for summary in self._summaries:
            report.warnings += precision_warnings(summary)
            raw += summary.raw_nbytes
            stored += summary.stored_nbytes
            coverage += summary.coverage
            for kind, each in summary.counts.items():
                counts[kind] = counts.get(kind, CastCounts()) + each
        report.status = "converted"
        report.targets = [str(summary.path) for summary in self._summaries]
        report.num_samples = sum(summary.num_samples for summary in self._summaries)
        report.archive_nbytes = sum(summary.nbytes for summary in self._summaries)
        report.raw_nbytes, report.stored_nbytes = dict(raw), dict(stored)
        report.warnings += coverage_warnings(coverage) + cast_warnings(counts, self._options.write)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A record, how far its file was read, and how many layers the source had."""

    record: TraceRecord
    position: int
    num_layers: int


class _SampleError(Exception):
    """A source is unreadable; the message names file, sample and field."""


def _records(source: Path, number: int, layers: tuple[int, ...] | None) -> Iterator[_Ready]:
    """The records of one batch file."""
    index = 0
    try:
        with open_batch(source) as batch:
            for item in batch:
                place = SourcePosition(file=number, position=index)
                try:
                    record = to_record(item, source=place, layers=layers)
                except (ConversionError, SchemaError) as error:
                    raise _SampleError(_placed(error, source, place)) from error
                ready = _Ready(record, batch.progress[0], num_layers_of(item))
                del item, record
                yield ready
                # Two samples exist at a time: this one, and the one that is being written.
                del ready
                index += 1
    except (ConversionError, OSError) as error:
        raise _SampleError(str(error)) from error


def _placed(error: Exception, source: Path, place: SourcePosition | None) -> str:
    position = "" if place is None else f"sample {place.position}: "
    return f"{source}: {position}{error}"
