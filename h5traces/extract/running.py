"""A long run: computes batch by batch, writes meanwhile, and goes on where it was stopped."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from h5traces.errors import ExtractionError, NanError
from h5traces.extract.overlap import WriterThread
from h5traces.extract.reports import Skipped
from h5traces.rewriting.reports import cast_warnings
from h5traces.writing.options import WriteOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from h5traces.extract.extractor import Extractor
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.planning import Job
    from h5traces.extract.questions import Question
    from h5traces.extract.reports import ExtractionReport, SkipReason
    from h5traces.format.dtypes import OverflowPolicy
    from h5traces.format.record import TraceRecord
    from h5traces.writing.process_writer import ProcessWriter

# What torch says on devices whose errors have no class of their own.
_OUT_OF_MEMORY: Final = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes
    ----------
    num_done, num_samples
        Samples written, earlier starts included, and samples in all.
    tokens_per_second
        Of this start.
    nbytes
        Bytes written by this start.
    seconds_left
        At the speed of this start; None before its first sample.
    """

    num_done: int
    num_samples: int
    tokens_per_second: float
    nbytes: int
    seconds_left: float | None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        each in str(error).lower() for each in _OUT_OF_MEMORY
    )


class Run:
    """One start of a run.

    Parameters
    ----------
    extractor
        Computes.
    writer
        Writes; closed when all is done, suspended otherwise.
    jobs
        All samples of the run, in order. Batches are cut from this list, whatever is done already,
        so that a sample has the same neighbours in every start.
    options
        Of the run.
    report
        Filled.
    on_overflow
        As the writer was told.
    progress
        Called when a sample was written.
    should_stop
        Asked before every batch.
    """

    def __init__(
        self,
        extractor: Extractor,
        writer: ProcessWriter,
        jobs: Sequence[Job],
        options: ExtractOptions,
        report: ExtractionReport,
        *,
        on_overflow: OverflowPolicy = "float32",
        progress: Callable[[RunProgress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self._extractor, self._writer, self._jobs = extractor, writer, jobs
        self._options, self._report = options, report
        self._write_options = WriteOptions(dtype=options.dtype, on_overflow=on_overflow)
        self._progress, self._should_stop = progress, should_stop
        self._done = frozenset(writer.done)
        self._num_samples = len(jobs)
        self._started = 0.0
        # Counts are made in the writer's thread and read in this one.
        self._lock = threading.Lock()

    def run(self) -> None:
        """Compute and write all that is not done."""
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
            self._drain(thread)
            self._writer.suspend()
            raise
        finally:
            self._report.seconds = time.perf_counter() - self._started
            self._report.nbytes = self._writer.nbytes
            self._report.warnings = cast_warnings(self._writer.counts, self._write_options)
            self._report.warnings += self._writer.warnings
            self._report.save()

    @staticmethod
    def _drain(thread: WriterThread) -> None:
        """Let the thread write what was computed; the first error is the one to tell."""
        try:
            thread.close()
        except Exception:
            return

    def _compute_all(self, thread: WriterThread) -> bool:
        """Hand all records to the writer; whether the run was stopped before the end."""
        for batch in self._batches():
            if self._should_stop is not None and self._should_stop():
                return True
            for job, outcome in self._computed(batch):
                if job.question.sample_id in self._done:
                    continue
                if isinstance(outcome, Skipped):
                    self._skip(outcome)
                else:
                    thread.put(outcome)
        return False

    def _batches(self) -> Iterator[Sequence[Job]]:
        """Batches in which something is not done."""
        size = self._options.batch_size
        for start in range(0, len(self._jobs), size):
            batch = self._jobs[start : start + size]
            if any(each.question.sample_id not in self._done for each in batch):
                yield batch

    def _computed(self, batch: Sequence[Job]) -> Iterator[tuple[Job, TraceRecord | Skipped]]:
        """Records of a batch; one that does not fit into memory is halved until it does."""
        outcomes = self._attempt(batch)
        if outcomes is None:
            # Behind the except block: its traceback holds the tensors of the attempt.
            free_memory()
            if len(batch) == 1:
                yield batch[0], self._too_large(batch[0])
                return
            self._report.halved.append([each.question.sample_id for each in batch])
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
                yield job, skipped(job.question, "nan", str(outcome))

    def _attempt(self, batch: Sequence[Job]) -> Sequence[TraceRecord | NanError] | None:
        """What the batch gives; None where memory does not suffice."""
        try:
            return self._extractor.run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                place = ", ".join(each.question.sample_id for each in batch)
                message = f"{place}: the model failed: {error}"
                raise ExtractionError(message) from error
            return None

    @staticmethod
    def _too_large(job: Job) -> Skipped:
        message = (
            f"{job.question.sample_id}: does not fit into memory with its {len(job.prompt)} prompt "
            "tokens, not even alone; start again with more memory or fewer layers to try it anew"
        )
        return skipped(job.question, "out_of_memory", message)

    def _skip(self, sample: Skipped) -> None:
        self._report.skipped.append(sample)
        self._report.save()

    def _note(self, record: TraceRecord) -> None:
        """Count a record that is durable; called by the thread that writes."""
        num_tokens = 0 if record.tokens is None else len(record.tokens)
        report = self._report
        with self._lock:
            report.num_written += 1
            report.num_tokens += num_tokens
            report.num_generated += num_tokens - (record.prompt_len or 0)
        if self._progress is None:
            return
        seconds = time.perf_counter() - self._started
        num_done = report.num_before + report.num_written
        left = self._num_samples - num_done
        self._progress(
            RunProgress(
                num_done=num_done,
                num_samples=self._num_samples,
                tokens_per_second=report.num_tokens / seconds,
                nbytes=self._writer.nbytes,
                seconds_left=left * seconds / report.num_written,
            )
        )


def skipped(question: Question, reason: SkipReason, message: str) -> Skipped:
    """What the report says of a sample that was left out."""
    return Skipped(question.sample_id, question.row, reason, message)


def free_memory() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
