"""Runs the jobs of a conversion side by side, in processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from h5traces.rewriting.convert_jobs import run_job
from h5traces.rewriting.reports import FileReport
from h5traces.storage.processes import blocked_signals, safe_children

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from h5traces.rewriting.convert_jobs import ConvertOptions, Report
    from h5traces.rewriting.convert_plan import Job

_POLL_SECONDS: Final = 0.1
# Set in every worker process: where it puts its progress, and whether it is to stop.
_progress_queue: Any = None
_stop: Any = None


# All of it, as queues and events start a process, too.
@safe_children()
def run_in_processes(
    jobs: Sequence[Job],
    options: Sequence[ConvertOptions],
    workers: int,
    report: Report,
    note: Callable[[int, FileReport], None],
) -> list[FileReport]:
    """Run every job, with its options, in one of `workers` processes.

    Reports come in the order of the jobs; `note` gets each with its number when it is done.

    Where a process is killed, the jobs that were not finished fail. An interrupt stops all of them
    at their next sample.
    """
    num_processes = min(workers, len(jobs))
    threads = max(1, workers // num_processes)
    shared = [replace(each, write=replace(each.write, workers=threads)) for each in options]
    context = multiprocessing.get_context("spawn")
    progress, stop = context.Queue(), context.Event()
    done = threading.Event()
    forwarder = threading.Thread(target=_forward, args=(progress, report, done), daemon=True)
    forwarder.start()
    pool = ProcessPoolExecutor(
        num_processes, context, initializer=_start, initargs=(progress, stop)
    )
    futures: list[Future[FileReport]] = []
    try:
        with blocked_signals([signal.SIGINT]):
            futures += [
                pool.submit(_run, job, each) for job, each in zip(jobs, shared, strict=True)
            ]
        numbers = {future: number for number, future in enumerate(futures)}
        found = {}
        for future in as_completed(futures):
            number = numbers[future]
            found[number] = _result(jobs[number], future)
            note(number, found[number])
        return [found[number] for number in range(len(jobs))]
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        done.set()
        forwarder.join()


def _result(job: Job, future: Future[FileReport]) -> FileReport:
    try:
        return future.result()
    except BrokenProcessPool:
        sources = [str(source) for source in job.sources]
        return FileReport(
            sources=sources,
            targets=[str(job.first_target)],
            status="failed",
            error=(
                f"{', '.join(sources)}: not converted: one of the processes was killed, as the "
                "system does when memory runs out; no unfinished file was kept; run again with "
                "skip_existing=True and fewer workers"
            ),
        )


def _start(progress: Any, stop: Any) -> None:
    global _progress_queue, _stop  # both can only be handed over at the start
    _progress_queue, _stop = progress, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Never outlive a parent that was killed: its successor may be writing the same target."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Job, options: ConvertOptions) -> FileReport:
    return run_job(job, options, _put)


def _put(source: Path, position: int, num_samples: int) -> None:
    if _stop.is_set():
        raise KeyboardInterrupt
    _progress_queue.put((source, position, num_samples))


def _forward(progress: Any, report: Report, done: threading.Event) -> None:
    """Hand progress from the processes on, until all are done and nothing is left."""
    while True:
        try:
            report(*progress.get(timeout=_POLL_SECONDS))
        except queue.Empty:
            if done.is_set():
                return
