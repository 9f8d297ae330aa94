"""Jobs side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from h5traces.conversion.jobs import ConvertOptions, Report, run_job

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from h5traces.conversion.plan import Job
    from h5traces.conversion.reports import FileReport

_POLL_SECONDS = 0.1
# Set in every worker process: where it puts its progress.
_progress_queue: Any = None


def run_in_processes(
    jobs: Sequence[Job], options: ConvertOptions, workers: int, report: Report
) -> list[FileReport]:
    """Run every job in one of `workers` processes; reports come in the order of the jobs.

    Raises
    ------
    concurrent.futures.process.BrokenProcessPool
        A process was killed.
    """
    num_processes = min(workers, len(jobs))
    threads = max(1, workers // num_processes)
    each = replace(options, write=replace(options.write, workers=threads))
    context = multiprocessing.get_context("spawn")
    progress = context.Queue()
    done = threading.Event()
    forwarder = threading.Thread(target=_forward, args=(progress, report, done), daemon=True)
    forwarder.start()
    pool = ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(progress,))
    futures: list[Future[FileReport]] = []
    try:
        futures += [pool.submit(_run, job, each) for job in jobs]
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
        done.set()
        forwarder.join()


def _start(progress: Any) -> None:
    global _progress_queue  # a queue can only be handed over at the start
    _progress_queue = progress


def _run(job: Job, options: ConvertOptions) -> FileReport:
    return run_job(job, options, _put)


def _put(source: Path, position: int, num_samples: int) -> None:
    _progress_queue.put((source, position, num_samples))


def _forward(progress: Any, report: Report, done: threading.Event) -> None:
    """Hand progress from the processes on, until all are done and nothing is left."""
    while True:
        try:
            report(*progress.get(timeout=_POLL_SECONDS))
        except queue.Empty:
            if done.is_set():
                return
