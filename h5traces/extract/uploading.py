"""An extraction into a bucket: shard by shard, each uploaded while the next is computed."""

from __future__ import annotations

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import xxhash

from h5traces.archive.opening import open as open_archive
from h5traces.errors import ArchiveExistsError, RemoteError
from h5traces.extract.generation import batches
from h5traces.extract.running import ExtractionReport, Run, skipped_before
from h5traces.ranks.bucket import BucketRun
from h5traces.ranks.plan import serialised
from h5traces.rewriting.uploads import Uploads, private_folder
from h5traces.storage.remote.paths import DEFAULT_REMOTE
from h5traces.storage.remote.uploading import exists
from h5traces.writing.process_writer import ProcessWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from h5traces.extract.extractor import Extractor
    from h5traces.extract.generation import Job
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.running import RunProgress
    from h5traces.paths import Target
    from h5traces.ranks.plan import RunPlan
    from h5traces.ranks.rank import Rank
    from h5traces.storage.remote.paths import RemotePath


@dataclass(frozen=True, slots=True)
class Shard:
    """The samples of one archive of a run.

    Attributes
    ----------
    jobs
        Its samples, in order.
    cut
        The batches that they are in, which may hold samples of the shards beside it.
    """

    jobs: Sequence[Job]
    cut: Sequence[Sequence[Job]]


def shards_of(jobs: Sequence[Job], batch_size: int, shard_samples: int) -> list[Shard]:
    """The shards of a run; every sample has the same neighbours as in a run without ranks."""
    cut = list(batches(jobs, batch_size))
    flat = [job for batch in cut for job in batch]
    found = []
    for start in range(0, len(flat), shard_samples):
        some = flat[start : start + shard_samples]
        last = math.ceil((start + len(some)) / batch_size)
        found.append(Shard(some, cut[start // batch_size : last]))
    return found


class UploadedExtraction:
    """Computes the shards of one rank. What is not uploaded waits in a folder of this machine.

    Parameters
    ----------
    url
        The folder of the bucket.
    place
        Names and size of the shards.
    facts
        Arguments of the writer.
    """

    def __init__(
        self,
        url: str,
        rank: Rank,
        plan: RunPlan,
        shards: Sequence[Shard],
        place: Target,
        facts: dict[str, Any],
    ) -> None:
        self._run, self._shards = BucketRun(url, rank, plan), shards
        # Another plan never finds what was computed for this one; another number of ranks does.
        alike = serialised(plan.model_copy(update={"world_size": 1, "first_task": 0}))
        name = xxhash.xxh3_128_hexdigest(url.encode() + alike)
        self._uploads = Uploads(private_folder(name), url)
        self._place = replace(place, path=self._uploads.folder)
        target = replace(facts["target"], shard_samples=None)
        self._facts = {**facts, "target": target}
        self._started = time.perf_counter()

    def run(
        self,
        extractor: Extractor,
        options: ExtractOptions,
        report: ExtractionReport,
        callbacks: tuple[Callable[[RunProgress], None] | None, Callable[[], bool] | None],
    ) -> None:
        """Compute and upload what is left of the share."""
        report.rank, report.output = self._run.rank.name, self._uploads.url
        report.num_planned = sum(len(self._shards[n].jobs) for n in self._run.share)
        self._report, self._progress = report, callbacks[0]
        sending: Future[None] | None = None

        def should_stop() -> bool:
            has_failed = sending is not None and sending.done() and sending.exception() is not None
            return has_failed or (callbacks[1] is not None and callbacks[1]())

        try:
            with self._run, ThreadPoolExecutor(1) as pool:
                for number in self._run.share:
                    if self._is_there(number):
                        continue
                    one = self._compute(number, extractor, options, should_stop)
                    if sending is not None:
                        sending.result()
                    if one.status == "stopped":
                        self._run.stopped()
                        report.status = "stopped"
                        break
                    sending = pool.submit(self._send, number, one)
                else:
                    report.status = "finished"
                if sending is not None:
                    sending.result()
        except BaseException as error:
            report.status, report.error = "failed", str(error) or type(error).__name__
            with contextlib.suppress(RemoteError):
                report.save()
            raise
        finally:
            report.seconds = time.perf_counter() - self._started
            with contextlib.suppress(OSError):
                self._uploads.folder.rmdir()
        report.save()

    def _is_there(self, number: int) -> bool:
        """Whether a shard is in the bucket; ArchiveExistsError where it is of something else."""
        place = self._uploads.place(self._place.shard(number))
        if not exists(place, DEFAULT_REMOTE):
            return False
        wanted = {job.key for job in self._shards[number].jobs}
        with open_archive(place.url) as archive:
            found = {(str(name), index or 0) for name, index in archive._keys}
            differences = self._facts["extraction"].differences(archive.metadata.extraction)
            nbytes = archive._files[0].nbytes
        if differences or not found <= wanted:
            message = (
                f"{place} exists, and is not of this run; move it away, or name another folder"
            )
            raise ArchiveExistsError(message)
        self._report.num_before += len(found)
        self._note(number, place, len(found), nbytes, status="skipped")
        return True

    def _note(
        self, number: int, place: RemotePath, num_samples: int, nbytes: int, **facts: Any
    ) -> None:
        targets = [place.url] if num_samples else []
        self._run.note(number, num_samples=num_samples, nbytes=nbytes, targets=targets, **facts)

    def _compute(
        self,
        number: int,
        extractor: Extractor,
        options: ExtractOptions,
        should_stop: Callable[[], bool],
    ) -> ExtractionReport:
        """Make the archive of a shard here, or go on with it."""
        shard, path = self._shards[number], self._place.shard(number)
        one = ExtractionReport(str(path), checks=self._report.checks)
        writer = ProcessWriter(path, **self._facts)
        one.num_before = writer.num_samples
        if writer.is_finished:
            # Of a start that could not upload it.
            writer.close()
            one.status, one.skipped = "finished", list(skipped_before(path).values())
        else:
            run = Run(
                extractor,
                writer,
                shard.jobs,
                options,
                one,
                precision=self._facts["precision"],
                progress=self._tell,
                should_stop=should_stop,
                cut=shard.cut,
            )
            # Samples of the shards beside it are computed in its batches, and stored there.
            run.done |= {job.key for batch in shard.cut for job in batch} - {
                job.key for job in shard.jobs
            }
            run.run()
        self._add(number, one)
        return one

    def _tell(self, progress: RunProgress) -> None:
        if self._progress is None:
            return
        report = self._report
        num_written = report.num_written + progress.num_done
        seconds = time.perf_counter() - self._started
        num_done = report.num_before + num_written
        self._progress(
            replace(
                progress,
                num_done=num_done,
                num_samples=report.num_planned,
                nbytes=report.nbytes + progress.nbytes,
                seconds_left=(report.num_planned - num_done) * seconds / num_written,
            )
        )

    def _add(self, number: int, one: ExtractionReport) -> None:
        """Add what became of a shard to the report of the rank."""
        report = self._report
        for name in ("num_before", "num_written", "num_tokens", "num_generated", "nbytes"):
            setattr(report, name, getattr(report, name) + getattr(one, name))
        report.skipped += one.skipped
        report.halved += one.halved
        report.warnings += [each for each in one.warnings if each not in report.warnings]
        first = number * (self._place.shard_samples or 0)
        report.findings += [
            replace(each, samples=[first + n for n in each.samples]) for each in one.findings
        ]

    def _send(self, number: int, one: ExtractionReport) -> None:
        """Upload a shard, say so, and delete it here."""
        path = self._place.shard(number)
        nbytes, num_samples = 0, one.num_before + one.num_written
        if num_samples:
            nbytes = path.stat().st_size
            self._uploads.upload(path)
        skipped = [asdict(each) for each in one.skipped]
        facts = {"status": "written", "skipped": skipped, "warnings": one.warnings}
        self._note(number, self._uploads.place(path), num_samples, nbytes, **facts)
        for each in self._uploads.folder.glob(f"{path.name}*"):
            each.unlink()
