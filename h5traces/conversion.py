"""Converts legacy batches to archives: plans the targets, streams the samples, reports."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h5traces.conversion_plan import Job, Leftover, plan_jobs
from h5traces.dtypes import CastCounts, DtypePolicy, OverflowPolicy
from h5traces.errors import (
    ConversionError,
    H5TracesError,
    SchemaError,
)
from h5traces.legacy import open_batch
from h5traces.legacy.layouts import names_in_file_name, num_layers_of, to_record
from h5traces.reading_ahead import ReadAhead
from h5traces.schema import COVERAGE_DEFINITIONS, SourceFile, SourcePosition, TraceRecord
from h5traces.storage.part_file import remove_abandoned_parts
from h5traces.verification import verify_written
from h5traces.writer import ArchiveWriter, WriteOptions, WriteSummary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from h5traces.archive.opening import PathLike


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    Attributes
    ----------
    source
        The file being read.
    done_nbytes, total_nbytes
        Bytes of all sources read so far, and to be read.
    num_samples
        Samples written so far.
    """

    source: Path
    done_nbytes: int
    total_nbytes: int
    num_samples: int


@dataclass(slots=True)
class FileReport:
    """What became of one job: one batch file, or all of them with ``merge``.

    Attributes
    ----------
    sources, targets
        Files read, and archives written (or, in a dry run, to be written).
    status
        ``converted``, ``skipped``, ``planned`` or ``failed``.
    num_samples
        Samples in the archives.
    source_nbytes, archive_nbytes
        Sizes of the files before and after.
    raw_nbytes, stored_nbytes
        Bytes of the arrays as stored before and after compression, by kind.
    seconds
        Wall-clock time.
    warnings
        What the user should know.
    error
        Why it failed, where it did.
    """

    sources: list[str]
    targets: list[str]
    status: str = "planned"
    num_samples: int = 0
    source_nbytes: int = 0
    archive_nbytes: int = 0
    raw_nbytes: dict[str, int] = field(default_factory=dict)
    stored_nbytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(slots=True)
class ConversionReport:
    """What became of every file that was named.

    Attributes
    ----------
    files
        One report per job.
    leftovers
        Files that were passed over, and why; unfinished ``.part`` files above all.
    """

    files: list[FileReport] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that was named is now an archive."""
        return not self.leftovers and all(each.error is None for each in self.files)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"ok": self.ok, **asdict(self)}


def convert(
    sources: PathLike | Sequence[PathLike],
    dest: PathLike,
    *,
    layers: Sequence[int] | None = None,
    dtype: DtypePolicy = "float16",
    on_overflow: OverflowPolicy = "float32",
    merge: bool = False,
    shard_samples: int | None = None,
    overwrite: bool = False,
    skip_existing: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    workers: int | None = None,
    codec: str = "gzip",
    model_id: str | None = None,
    dataset: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Convert legacy trace batches (``.pkl``, ``.pkl.gz``) to archives.

    Samples are streamed: memory stays at about twice the largest sample, however many there are.
    One unreadable batch does not stop the others; the report tells.

    Parameters
    ----------
    sources
        Files, globs and folders.
    dest
        A folder (one archive per batch), or a name ending in ``.h5`` for one archive.
    layers
        Decoder blocks to keep, 0-based; all by default.
    dtype
        Stored type: ``float16``, ``bfloat16``, ``float32``, or ``auto`` for the narrowest type
        that is exact for every value of an array.
    on_overflow
        Arrays with finite values beyond `dtype` are stored as ``float32``, are an ``error``, or
        are ``clip``-ped.
    merge
        Put all batches into one archive (or, with `shard_samples`, into one set of shards).
    shard_samples
        Largest number of samples in an archive; targets get ``-00000`` and so on.
    overwrite
        Replace existing targets, each in one atomic step.
    skip_existing
        Pass over batches whose target exists: finishes a stopped run.
    verify
        Read everything back from disk and compare it with the source before a file gets its name.
    dry_run
        Plan only.
    workers
        Threads that compress; one per core by default.
    codec
        Codec of hidden states and attentions.
    model_id, dataset
        Recorded in the archives; taken from the batch's file name by default.
    progress
        Called now and then.

    Raises
    ------
    ConversionError
        The plan is impossible: nothing to convert, two batches with one target, or contradicting
        options. Problems of single files are in the report instead.
    FileNotFoundError
        A source does not exist.
    """
    options = ConvertOptions(
        layers=None if layers is None else _checked_layers(layers),
        merge=merge,
        shard_samples=shard_samples,
        skip_existing=skip_existing,
        verify=verify,
        dry_run=dry_run,
        model_id=model_id,
        dataset=dataset,
        write=WriteOptions(
            dtype=dtype,
            on_overflow=on_overflow,
            codec=codec,
            workers=workers,
            overwrite=overwrite,
        ),
    )
    jobs, leftovers = plan_jobs(sources, Path(dest), merge=merge, shard_samples=shard_samples)
    report = ConversionReport(leftovers=leftovers)
    total = sum(source.stat().st_size for job in jobs for source in job.sources)
    meter = _Meter(total, progress)
    for job in jobs:
        report.files.append(_run_job(job, options, meter))
    return report


def _checked_layers(layers: Sequence[int]) -> tuple[int, ...]:
    if not layers:
        message = "layers is empty; expected at least one 0-based layer number"
        raise ConversionError(message)
    if min(layers) < 0:
        message = f"layers names {min(layers)}; expected 0-based layer numbers"
        raise ConversionError(message)
    return tuple(sorted(set(layers)))


class _Meter:
    """Adds up the progress of several files."""

    def __init__(self, total_nbytes: int, callback: Callable[[Progress], None] | None) -> None:
        self._total_nbytes = total_nbytes
        self._callback = callback
        self._before = 0
        self._num_samples = 0

    def sample(self, source: Path, position: int) -> None:
        self._num_samples += 1
        self._report(source, position)

    def end(self, source: Path) -> None:
        self._before += source.stat().st_size if source.exists() else 0
        self._report(source, 0)

    def _report(self, source: Path, position: int) -> None:
        if self._callback is not None:
            done = min(self._before + position, self._total_nbytes)
            self._callback(Progress(source, done, self._total_nbytes, self._num_samples))


def _run_job(job: Job, options: ConvertOptions, meter: _Meter) -> FileReport:
    """Convert, skip or plan one job; its problems end in its report."""
    report = FileReport(
        sources=[str(source) for source in job.sources],
        targets=[str(job.first_target)],
        source_nbytes=sum(source.stat().st_size for source in job.sources),
    )
    exists = job.first_target.exists()
    if exists and options.skip_existing:
        report.status, report.targets = "skipped", [str(each) for each in job.existing_targets()]
        report.archive_nbytes = sum(each.stat().st_size for each in job.existing_targets())
    elif options.dry_run:
        if exists and not options.write.overwrite:
            report.status = "failed"
            report.error = f"{job.first_target} exists; use --overwrite or --skip-existing"
    else:
        started = time.perf_counter()
        _convert_job(job, options, meter, report)
        report.seconds = time.perf_counter() - started
    if report.status != "converted":
        for source in job.sources:
            meter.end(source)
    return report


def _convert_job(job: Job, options: ConvertOptions, meter: _Meter, report: FileReport) -> None:
    """Convert a job; a source that cannot be read is left out of a merge, the others go in."""
    sources = list(job.sources)
    while sources:
        conversion = _Conversion(job, sources, options, meter)
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
        self, job: Job, sources: list[Path], options: ConvertOptions, meter: _Meter
    ) -> None:
        self._job, self._sources, self._options, self._meter = job, sources, options, meter
        self._writers: list[ArchiveWriter] = []
        self._source_counts: list[int] = [0] * len(sources)
        self._first_in_writer: Counter[int] = Counter()
        self._num_layers = 0
        self._summaries: list[WriteSummary] = []

    def run(self) -> None:
        """Convert; on an exception nothing is left behind."""
        self._job.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            for number, source in enumerate(self._sources):
                self._read_source(number, source)
                self._meter.end(source)
            if not self._writers:
                self._new_writer()
            self._finish_writer()
            self._publish()
        except BaseException:
            for writer in self._writers:
                writer.discard()
            raise

    def _read_source(self, number: int, source: Path) -> None:
        try:
            with ReadAhead(lambda: _records(source, number, self._options.layers)) as records:
                while (ready := next(records, None)) is not None:
                    self._num_layers = max(self._num_layers, ready.num_layers)
                    self._write(ready.record, source)
                    self._source_counts[number] += 1
                    self._meter.sample(source, ready.position)
                    # The next sample is being read already: keep no more than these two.
                    del ready
        except _SampleError as error:
            cause = error.__cause__
            if len(self._sources) > 1:
                raise _SourceFailedError(source, str(error)) from cause
            raise ConversionError(str(error)) from cause

    def _write(self, record: TraceRecord, source: Path) -> None:
        size = self._options.shard_samples
        if not self._writers:
            self._new_writer()
        elif size is not None and self._writers[-1].num_samples >= size:
            self._finish_writer()
            self._new_writer()
        try:
            self._writers[-1].append(record)
        except (ConversionError, SchemaError) as error:
            raise _SampleError(_placed(error, source, record.source)) from error

    def _new_writer(self) -> None:
        target = self._job.shard(len(self._writers))
        remove_abandoned_parts(target)
        names = names_in_file_name(self._sources[0].name)
        facts = {
            "model_id": self._options.model_id or names.get("model_id"),
            "dataset": self._options.dataset or names.get("dataset"),
        }
        self._writers.append(ArchiveWriter(target, self._options.write, **facts))

    def _finish_writer(self) -> None:
        writer = self._writers[-1]
        sources = tuple(
            SourceFile(name=path.name, nbytes=path.stat().st_size, num_samples=count)
            for path, count in zip(self._sources, self._source_counts, strict=True)
        )
        writer.finish(sources=sources, num_layers=self._num_layers or None)
        if self._options.verify:
            verify_written(writer.part_path, writer.digests, workers=self._options.write.workers)
        self._summaries.append(writer.summary)

    def _publish(self) -> None:
        # The first shard last: where it exists, all of them do.
        for writer in reversed(self._writers):
            writer.publish()

    def fill(self, report: FileReport) -> None:
        """Tell what was done."""
        raw, stored, coverage = Counter[str](), Counter[str](), Counter[str]()
        counts: dict[str, CastCounts] = {}
        for summary in self._summaries:
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
        report.warnings += _coverage_warnings(coverage) + _cast_warnings(counts, self._options)


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


def _coverage_warnings(coverage: Counter[str]) -> list[str]:
    total, found = sum(coverage.values()), []
    if coverage["last_position"]:
        found.append(
            f"{coverage['last_position']} of {total} samples hold one position instead of the "
            "sequence: the '350 MB bug' of old extractors; they are stored as they are, but "
            "re-extract the traces to get whole sequences"
        )
    if coverage["steps"]:
        found.append(
            f"{coverage['steps']} of {total} samples hold generation steps, not one sequence; "
            "they are stored as they are (coverage 'steps')"
        )
    for name in ("partial", "empty"):
        if coverage[name]:
            definition = COVERAGE_DEFINITIONS[name]
            found.append(
                f"{coverage[name]} of {total} samples: {definition[0].lower()}{definition[1:]}"
            )
    return found


def _cast_warnings(counts: dict[str, CastCounts], options: ConvertOptions) -> list[str]:
    found = []
    stored, treatment = (
        options.write.dtype,
        {
            "float32": "their arrays are stored in float32",
            "clip": "they were clipped to the largest finite value",
            "error": "",
        }[options.write.on_overflow],
    )
    for kind, each in counts.items():
        if each.num_nan or each.num_inf:
            found.append(f"{kind}: {each.num_nan} NaN and {each.num_inf} Inf values, kept")
        if each.num_overflow:
            found.append(f"{kind}: {each.num_overflow} values lie beyond {stored}; {treatment}")
        if each.num_to_zero or each.num_to_subnormal:
            found.append(
                f"{kind}: {each.num_to_zero} values became 0 and {each.num_to_subnormal} lost "
                f"precision as subnormal numbers of {stored}; --dtype auto keeps every bit"
            )
    return found
