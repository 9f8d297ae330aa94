"""A long run: computes batch by batch while another thread writes, and reports what it did."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import torch

from h5traces.errors import ExtractionError, NanError
from h5traces.extract.generation import batches
from h5traces.format.dtypes import TypedArray
from h5traces.format.html import Report
from h5traces.meaning.checks import CheckOptions
from h5traces.ranks.bucket import REPORT
from h5traces.ranks.plan import RANKS
from h5traces.rewriting.reports import cast_warnings
from h5traces.storage.files import read_document
from h5traces.storage.publish import PartFile, make_folder
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath, is_url
from h5traces.writing.options import WriteOptions
from h5traces.writing.shards import stored_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from h5traces.extract.extractor import Extractor
    from h5traces.extract.generation import Job
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.sizes import Forecast
    from h5traces.format.record import TraceRecord
    from h5traces.meaning.checks import FindingSummary
    from h5traces.writing.options import PrecisionOptions
    from h5traces.writing.process_writer import ProcessWriter

SkipReason = Literal["too_long", "unfit_answer", "out_of_memory", "nan"]
Status = Literal["planned", "stopped", "failed", "finished"]

# Bytes in the queue, enough to go on computing while a shard is packed; one record may exceed it.
_MAX_WAITING_NBYTES: Final = 512 * 2**20
# Records that wait are stored together, up to this many: a file costs as much as two tiny samples.
_MAX_TOGETHER, _MAX_TOGETHER_NBYTES = 32, 16 * 2**20
# What torch says on devices whose errors have no separate class.
_OUT_OF_MEMORY: Final = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out.

    Attributes
    ----------
    sample_id, row
        Id and row of its question.
    reason
        Reason, for programs.
    message
        Reason, for people.
    generation_index
        Which of the answers to its question.
    """

    sample_id: str
    row: int
    reason: SkipReason
    message: str
    generation_index: int = 0

    @classmethod
    def of(cls, job: Job, reason: SkipReason, message: str) -> Self:
        """The entry of a job."""
        return cls(job.question.sample_id, job.question.row, reason, message, job.index)

    @property
    def key(self) -> tuple[str, int]:
        """What tells the sample apart from others of the run."""
        return self.sample_id, self.generation_index


@dataclass
class ExtractionReport(Report):
    """What a run did.

    Attributes
    ----------
    output
        Archive, or folder of shards.
    status
        ``planned`` in a dry run. Runs that ``stopped`` or ``failed`` go on when started again.
    num_planned
        Requested samples.
    num_before
        Samples written by earlier starts.
    num_written
        Samples written by this start.
    skipped
        Samples that were left out, and why.
    halved
        Sample ids of batches that did not fit into memory and were halved.
    num_tokens
        Tokens of the written samples, prompts included.
    num_generated
        Tokens of their answers.
    nbytes
        Bytes written.
    seconds
        Wall-clock time, without loading the model.
    free_nbytes
        Free bytes on the disk at the start.
    needed_nbytes
        Bytes that the remaining samples need at most, while a shard is being packed.
    forecast
        What `needed_nbytes` was computed from.
    warnings
        Values that casts changed in the written samples.
    findings
        What a quick look at these samples found.
    checks
        Which findings are left out, and which are a failure.
    error
        Why the run failed.
    rank
        Which rank this is about, such as ``00003-of-00008``; None for all of a run.
    """

    output: str
    status: Status = "planned"
    num_planned: int = 0
    num_before: int = 0
    num_written: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    halved: list[list[str]] = field(default_factory=list)
    num_tokens: int = 0
    num_generated: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    free_nbytes: int = 0
    needed_nbytes: float = 0.0
    forecast: Forecast | None = None
    warnings: list[str] = field(default_factory=list)
    findings: list[FindingSummary] = field(default_factory=list)
    checks: CheckOptions = CheckOptions()
    error: str | None = None
    rank: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every requested sample is in the archive, or would be, without a failed check."""
        is_whole = self.status in ("planned", "finished") and not self.skipped
        return is_whole and not self.checks.fails(self.findings)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of samples per second of wall-clock time."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "ok": self.ok,
            "tokens_per_second": self.tokens_per_second,
            **asdict(replace(self, forecast=None)),
            "forecast": self.forecast and self.forecast.as_dict(),
        }

    def save(self) -> None:
        """Write the report beside the output, in one atomic step."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        data = text.encode("utf-8", "surrogatepass")
        if is_url(self.output):
            from h5traces.storage.remote.uploading import put

            place = RemotePath(f"{self.output}{RANKS}/{self.rank}/{REPORT}")
            return put(place, data, DEFAULT_REMOTE)
        path = report_path(Path(self.output))
        if self.rank is not None:
            path = Path(self.output) / RANKS / f"{self.rank}.{REPORT}"
        make_folder(path.parent)
        with PartFile(path) as part:
            part.append(data)
            part.publish(overwrite=True)
        return None


def report_path(output: Path) -> Path:
    """The file of a run's report, beside its archive or folder."""
    output = output.resolve() if output.name in ("", "..") else output
    return output.with_name(f"{output.name}.report.json")


def skipped_before(output: Path) -> dict[tuple[str, int], Skipped]:
    """Samples that earlier starts left out, by id and index."""
    path = report_path(output)
    try:
        data = read_document(path, ExtractionError, "the report of an extraction")
        document = json.loads(data.decode("utf-8", "surrogatepass"))
        found = [Skipped(**each) for each in document["skipped"]]
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        message = f"{path}: is not the report of an extraction ({error!r}); move it away"
        raise ExtractionError(message) from error
    return {each.key: each for each in found}


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run.

    Attributes
    ----------
    num_done, num_samples
        Written samples, those of earlier starts included, and all samples.
    tokens_per_second
        Speed of this start.
    nbytes
        Bytes written by this start.
    seconds_left
        Estimate from the speed of this start.
    """

    num_done: int
    num_samples: int
    tokens_per_second: float
    nbytes: int
    seconds_left: float


def _record_nbytes(record: TraceRecord) -> int:
    """Bytes of a record's arrays in memory."""
    return sum(
        entry.array.values.nbytes
        for layered in record.layered.values()
        for entry in layered.arrays
        if isinstance(entry.array, TypedArray)
    )


class WriterThread:
    """A thread that feeds the writer from a bounded queue while the next records are computed.

    The writer is its own until `close` returns; `written` is called with each durable record.
    """

    def __init__(self, writer: ProcessWriter, written: Callable[[TraceRecord], None]) -> None:
        self._writer, self._written = writer, written
        self._waiting: deque[TraceRecord] = deque()
        self._waiting_nbytes = 0
        self._is_closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="h5traces-write", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while records := self._next():
                self._writer.append_records(records)
                for each in records:
                    self._written(each)
                # Free the arrays before waiting for the next ones.
                records.clear()
                del each
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> list[TraceRecord]:
        """The first record that waits, and those after it that can be stored with it."""
        found: list[TraceRecord] = []
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            left = _MAX_TOGETHER_NBYTES
            while self._waiting and len(found) < _MAX_TOGETHER:
                nbytes = _record_nbytes(self._waiting[0])
                left -= nbytes
                if found and left < 0:
                    break
                found.append(self._waiting.popleft())
                self._waiting_nbytes -= nbytes
            self._changed.notify_all()
        return found

    def put(self, record: TraceRecord) -> None:
        """Add a record to the queue; waits while the queue is full."""
        nbytes = _record_nbytes(record)

        def has_room() -> bool:
            fits = self._waiting_nbytes + nbytes <= _MAX_WAITING_NBYTES
            return self._error is not None or not self._waiting or fits

        with self._changed:
            self._changed.wait_for(has_room)
            if self._error is not None:
                raise self._error
            self._waiting.append(record)
            self._waiting_nbytes += nbytes
            if self._waiting_nbytes > _MAX_TOGETHER_NBYTES:
                self._changed.notify_all()

    def flush(self) -> None:
        """Have written what waits; until then, `put` may leave small records for later ones."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until all records are written."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error


class Run:
    """One start of a run; `progress` and `should_stop` are as for `extract_dataset`.

    `settled` is called for every sample that is durable or left out; `cut` are its batches, where
    they were cut from more jobs than these.

    `jobs` are all samples of the run. Batches are cut from this list, whatever is done already, so
    that a sample has the same neighbours in every start. The writer is closed at the end, or
    suspended if the run stops or fails.
    """

    def __init__(
        self,
        extractor: Extractor,
        writer: ProcessWriter,
        jobs: Sequence[Job],
        options: ExtractOptions,
        report: ExtractionReport,
        *,
        precision: PrecisionOptions,
        progress: Callable[[RunProgress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        settled: Callable[[Job, Skipped | None], None] | None = None,
        cut: Sequence[Sequence[Job]] = (),
    ) -> None:
        self._cut = cut
        self._settled = settled
        self._by_key = {job.key: job for job in jobs}
        self._extractor, self._writer, self._jobs = extractor, writer, jobs
        self._options, self._report = options, report
        self._write_options = WriteOptions(
            dtype=precision.dtype or "float16", on_overflow=precision.on_overflow
        )
        self._progress, self._should_stop = progress, should_stop
        self.done = stored_keys(writer.done, writer.later)
        self._started = 0.0

    def run(self) -> None:
        """Compute and write the remaining samples."""
        self._started = time.perf_counter()
        thread = WriterThread(self._writer, self._note)
        try:
            is_stopped = self._compute_all(thread)
            thread.close()
            if is_stopped:
                self._report.status = "stopped"
                self._writer.suspend()
            else:
                self._writer.close()
                self._report.status = "finished"
        except BaseException as error:
            self._report.status = "failed"
            self._report.error = str(error) or type(error).__name__
            # Write what was computed; the first error is the one to raise.
            with contextlib.suppress(Exception):
                thread.close()
            self._writer.suspend()
            raise
        finally:
            self._report.seconds = time.perf_counter() - self._started
            self._report.nbytes = self._writer.nbytes
            self._report.warnings = cast_warnings(self._writer.counts, self._write_options)
            self._report.warnings += self._writer.warnings
            self._report.findings = self._writer.findings.summaries(self._report.checks)
            self._report.save()

    def _compute_all(self, thread: WriterThread) -> bool:
        """Pass all records to the writer. Returns whether the run was stopped before the end."""
        for batch in self._batches():
            if self._should_stop is not None and self._should_stop():
                return True
            for job, outcome in self._computed(batch):
                if job.key in self.done:
                    continue
                if isinstance(outcome, Skipped):
                    self._report.skipped.append(outcome)
                    self._report.save()
                    if self._settled is not None:
                        self._settled(job, outcome)
                else:
                    thread.put(outcome)
            thread.flush()
        return False

    def _batches(self) -> Iterator[Sequence[Job]]:
        """Batches with a sample that is not done."""
        for batch in self._cut or batches(self._jobs, self._options.batch_size):
            left = [each for each in batch if each.key not in self.done]
            if left:
                yield batch if self._extractor.keeps_batches else left

    def _computed(self, batch: Sequence[Job]) -> Iterator[tuple[Job, TraceRecord | Skipped]]:
        """Records of a batch, which is halved until it fits into memory."""
        outcomes = self._attempt(batch)
        if outcomes is None:
            # After the except block: its traceback holds the tensors of the attempt.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(batch) == 1:
                (job,) = batch
                message = (
                    f"{job.name}: does not fit into memory with its "
                    f"{len(job.prompt)} prompt tokens, not even alone; start again with more "
                    "memory to try it again"
                )
                yield job, Skipped.of(job, "out_of_memory", message)
                return
            self._report.halved.append([each.name for each in batch])
            middle = len(batch) // 2
            yield from self._computed(batch[:middle])
            yield from self._computed(batch[middle:])
            return
        for job, outcome in zip(batch, outcomes, strict=True):
            if not isinstance(outcome, NanError):
                yield job, outcome
            elif self._options.on_nan == "error":
                raise outcome
            else:
                yield job, Skipped.of(job, "nan", str(outcome))

    def _attempt(self, batch: Sequence[Job]) -> Iterable[TraceRecord | NanError] | None:
        """Records of the batch; None if memory is too small."""
        try:
            return self._extractor.run(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                place = ", ".join(each.name for each in batch)
                message = f"{place}: the model failed: {error}"
                raise ExtractionError(message) from error
            return None

    def _note(self, record: TraceRecord) -> None:
        """Count a durable record; called by the writing thread, which alone counts."""
        num_tokens = 0 if record.tokens is None else len(record.tokens)
        report = self._report
        report.num_written += 1
        report.num_tokens += num_tokens
        report.num_generated += num_tokens - (record.prompt_len or 0)
        if self._settled is not None:
            key = str(record.sample_id), record.generation_index or 0
            self._settled(self._by_key[key], None)
        if self._progress is None:
            return
        seconds = time.perf_counter() - self._started
        num_done = report.num_before + report.num_written
        left = len(self._jobs) - num_done
        self._progress(
            RunProgress(
                num_done=num_done,
                num_samples=len(self._jobs),
                tokens_per_second=report.num_tokens / seconds,
                nbytes=self._writer.nbytes,
                seconds_left=left * seconds / report.num_written,
            )
        )


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory was too small."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        each in str(error).lower() for each in _OUT_OF_MEMORY
    )
