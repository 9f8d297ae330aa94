"""The share of one rank of an extraction."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from h5traces.extract.generation import batches
from h5traces.extract.running import Run
from h5traces.storage.publish import make_folder
from h5traces.writing.process_writer import ProcessWriter
from h5traces.writing.shared_writer import Share
from h5traces.writing.spool_folder import left_out_path, spool_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from h5traces.extract.extractor import Extractor
    from h5traces.extract.generation import Job
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.running import ExtractionReport, Skipped
    from h5traces.paths import Target
    from h5traces.ranks.run import RankRun


class SharedExtraction:
    """Runs the batches of a rank, and writes down which are done.

    Batches are cut from all samples of the run, so that a sample has the same neighbours whatever
    the number of ranks.
    """

    def __init__(self, rank_run: RankRun, jobs: Sequence[Job], batch_size: int) -> None:
        self._run, self._size, self._total = rank_run, batch_size, len(jobs)
        # In the order in which a run without ranks writes them.
        jobs = [job for batch in batches(jobs, batch_size) for job in batch]
        shares = {n: jobs[n * batch_size : (n + 1) * batch_size] for n in rank_run.share}
        self._jobs = [job for batch in shares.values() for job in batch]
        self._numbers = {
            job.key: n * batch_size + place
            for n, batch in shares.items()
            for place, job in enumerate(batch)
        }
        self._left = {n: {job.key for job in batch} for n, batch in shares.items()}
        self._num_stored = dict.fromkeys(shares, 0)
        self._skipped: dict[int, list[dict[str, Any]]] = {n: [] for n in shares}
        self._batches = list(shares.values())
        self._lock = threading.Lock()

    def run(
        self,
        extractor: Extractor,
        place: Target,
        facts: dict[str, Any],
        options: ExtractOptions,
        report: ExtractionReport,
        callbacks: tuple[Any, Callable[[], bool] | None],
    ) -> None:
        """Compute and write what is left of the share."""
        report.rank, report.num_planned = self._run.rank.name, len(self._jobs)
        share = Share(self._numbers, self._total)
        self._spool = spool_path(place)
        make_folder(place.path)
        writer = ProcessWriter(f"{place.path}/", share=share, **facts)
        report.num_before = writer.num_samples
        run = Run(
            extractor,
            writer,
            self._jobs,
            options,
            report,
            precision=facts["precision"],
            progress=callbacks[0],
            should_stop=callbacks[1],
            settled=self._settled,
            cut=self._batches,
        )
        for key in run.done:
            self._settle(key, is_stored=True, status="skipped")
        run.run()
        if report.status == "stopped":
            self._run.stopped()

    def _settled(self, job: Job, skipped: Skipped | None) -> None:
        if skipped is not None:
            # Durable enough: a sample that is tried again is left out again.
            left_out_path(self._spool, self._numbers[job.key]).touch()
            self._skipped[self._numbers[job.key] // self._size].append(asdict(skipped))
        self._settle(job.key, is_stored=skipped is None, status="written")

    def _settle(self, key: tuple[str, int], *, is_stored: bool, status: str) -> None:
        """Count a sample, by whichever thread; write a line when its batch is whole."""
        with self._lock:
            batch = self._numbers[key] // self._size
            self._left[batch].discard(key)
            self._num_stored[batch] += is_stored
            if not self._left[batch]:
                facts = {"num_samples": self._num_stored[batch], "skipped": self._skipped[batch]}
                self._run.note(batch, status=status, **facts)
