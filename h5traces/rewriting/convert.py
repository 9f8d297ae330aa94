"""Converts legacy batches to archives."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from h5traces.archive.opening import open as open_archive
from h5traces.archive.selection import Selection, as_numbers
from h5traces.arguments import checked
from h5traces.errors import ConversionError
from h5traces.meaning.checks import CheckOptions
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import Target, check_not_a_source
from h5traces.precision.scales import ScaleSet
from h5traces.ranks.plan import RunPlan, deal, plain_options, planned_source
from h5traces.ranks.rank import find_rank
from h5traces.ranks.run import check_shared, run_at
from h5traces.rewriting.convert_jobs import ConvertOptions, run_job
from h5traces.rewriting.convert_plan import plan_jobs
from h5traces.rewriting.convert_processes import run_in_processes
from h5traces.rewriting.convert_scales import ScalesOfModels, SharedScales
from h5traces.rewriting.existing import recorded_options
from h5traces.rewriting.reports import ConversionReport, Progress
from h5traces.rewriting.uploads import Uploads
from h5traces.sources.responses import unused_responses
from h5traces.sources.runs import facts_of_runs
from h5traces.writing.calibrate import load_given
from h5traces.writing.options import PrecisionOptions, TargetOptions, WriteOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from h5traces.archive.selection import LayerChoice
    from h5traces.format.precision import Precision, Tier
    from h5traces.paths import PathLike
    from h5traces.ranks.bucket import BucketRun
    from h5traces.ranks.rank import Rank
    from h5traces.ranks.run import RankRun
    from h5traces.rewriting.convert_plan import Job
    from h5traces.rewriting.reports import FileReport


@checked
def convert(
    sources: PathLike | Sequence[PathLike],
    dest: PathLike,
    *,
    layers: LayerChoice = None,
    precision: PrecisionOptions | Precision | Tier | None = None,
    target: TargetOptions = TargetOptions(),
    merge: bool = False,
    reading: ReadingOptions = ReadingOptions(),
    checks: CheckOptions = CheckOptions(),
    model_id: str | None = None,
    dataset: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    rank: int | Literal["auto"] | None = None,
    world_size: int | None = None,
) -> ConversionReport:
    """Convert batches of traces (pickles, files of torch.save and others) to archives.

    Samples are streamed: memory stays at about twice the largest sample and 64 MiB, however many
    there are.
    One unreadable batch does not stop the others; the report lists it, and every file of a folder
    that was not read.

    Parameters
    ----------
    sources
        Files, globs and folders; what a file holds is found by its content, whatever its name.
    dest
        A folder (one archive per batch), or a name ending in ``.h5`` for one archive; or a folder
        of a bucket, ``s3://bucket/run/``, to which every archive is uploaded when it is verified.
    layers
        Decoder blocks to keep: 0-based numbers, or text such as ``0,5,10-12,last``; all by default.
    precision
        ``exact`` (the default), ``fine``, ``analysis``, ``compact`` or ``native``, a `Precision`,
        or `PrecisionOptions` for the stored type, scales and codec as well; `docs/precision.md`
        says what each tier gives up.
    target
        Shards, existing targets, verification and workers. With several batches, ``workers`` is
        the number of processes that convert them side by side, each in its own memory.
    merge
        Put all batches into one archive (or, with ``shard_samples``, into one set of shards).
    reading
        What the sources do not say themselves: what the first hidden state is, and whether padding
        is kept.
    checks
        Which findings about the samples are left out of the report, and which make it not ``ok``.
    model_id, dataset
        Recorded in the archives; taken from the batch's file name by default.
    progress
        Called now and then.
    rank, world_size
        Do the share of one of `world_size` processes on one folder; ``rank="auto"`` asks the
        environment. What is finished is kept, as by ``skip_existing``; see `docs/cluster.md`.

    Returns
    -------
    ConversionReport
        What became of every file. Problems of single files do not raise, since others were
        converted: look at ``report.ok``, or call ``report.raise_for_errors()``.

    Raises
    ------
    TargetError
        `dest` is neither a folder nor an ``.h5`` name, or a source; or its run was planned with
        other options or sources.
    ConversionError
        The plan is impossible: nothing to convert, two batches with one target, one batch twice
        (also as a copy) in a merge, or contradicting options.
    PrecisionError
        The precision does not go with the other options, or the scales are of another model.
    FileNotFoundError
        A source does not exist.
    """
    Selection(layers=layers)  # text is checked before anything is read
    uploads = Uploads.to(dest)
    dest = dest if uploads is None else f"{uploads.folder}/"
    place = Target.of(dest, shard_samples=target.shard_samples)
    run_folder = place.folder if uploads is None else uploads.run_folder
    chosen = find_rank(rank, world_size, run_folder)
    if chosen is not None:
        check_shared(place, target, merge=merge)
        target = replace(target, skip_existing=True)
    given = PrecisionOptions.of(precision)
    wanted = given.precision
    calibration = load_given(given.scales, wanted)
    scales = None
    if wanted.step is not None:
        measured = f"measured on {given.calibration_samples} samples"
        scales = measured if calibration is None else calibration.digest
    if layers is not None and not isinstance(layers, str):
        layers = _checked(layers)
    options = ConvertOptions(
        layers=layers,
        target=target,
        reading=reading,
        checks=checks,
        model_id=model_id,
        dataset=dataset,
        uploads=uploads,
        # Each job gets the scales of its model.
        write=WriteOptions.of(given, target, scales=ScaleSet()),
        recorded=recorded_options(reading, scales, layers),
    )
    jobs, found = plan_jobs(sources, place, merge=merge, reading=reading)
    if chosen is None or chosen.number == 0:
        found.left += unused_responses([each for job in jobs for each in job.sources], reading)
    if not target.dry_run:
        named = [source for job in jobs for source in job.sources]
        options = replace(options, runs=facts_of_runs(named, reading))
    if given.scales is not None:
        check_not_a_source([job.target for job in jobs], given.scales)
    report = ConversionReport(
        precision=str(wanted) if wanted.is_lossy else None,
        leftovers=found.left,
        unrelated=found.unrelated,
        checks=checks,
    )
    costs = [job.nbytes for job in jobs]
    run: RankRun | BucketRun | None = None
    share: Sequence[int] = range(len(jobs))
    if chosen is not None:
        share = deal(costs, chosen.size)[chosen.number]
        if not target.dry_run:
            plan = _plan(jobs, options, costs, scales, chosen)
            run = run_at(run_folder, chosen, plan)
    mine = [jobs[each] for each in share]
    meter = _Meter([source for job in mine for source in job.sources], progress)
    with uploads or contextlib.nullcontext(), run or contextlib.nullcontext():
        shared = None if run is None else SharedScales(run)
        models = ScalesOfModels(jobs, options, calibration, given.calibration_samples, shared)
        each = [models.options(job, meter) for job in mine]

        def note(number: int, one: FileReport) -> None:
            if run is not None:
                run.note(share[number], nbytes=one.archive_nbytes, **_line(one, uploads))

        if target.workers is not None and target.workers > 1 and len(mine) > 1:
            report.files += run_in_processes(mine, each, target.workers, meter, note)
        else:
            for number, (job, its) in enumerate(zip(mine, each, strict=True)):
                report.files.append(run_job(job, its, meter))
                note(number, report.files[-1])
    report.note_single_samples()
    return report


def _plan(
    jobs: Sequence[Job],
    options: ConvertOptions,
    costs: Sequence[int],
    scales: str | None,
    rank: Rank,
) -> RunPlan:
    """What all ranks must agree on."""
    write, target = options.write, options.target
    chosen = {
        "layers": options.layers,
        "precision": str(write.precision),
        "dtype": write.dtype,
        "on_overflow": write.on_overflow,
        "codec": write.codec,
        "scales": scales,
        "shard_samples": target.shard_samples,
        "compare": target.compare,
        "model_id": options.model_id,
        "dataset": options.dataset,
        **options.recorded,
    }
    return RunPlan(
        command="convert",
        world_size=rank.size,
        first_task=rank.first,
        options=plain_options(chosen),
        sources=tuple(planned_source(source) for job in jobs for source in job.sources),
        costs=tuple(costs),
    )


def _line(report: FileReport, uploads: Uploads | None) -> dict[str, Any]:
    """A rank's record of a job; `collect` makes one report of all."""
    found = report.as_dict()
    if report.status == "skipped" and uploads is None:
        # Who wrote it may have been killed before it said so.
        with open_archive(report.targets) as archive:
            found["num_samples"] = len(archive)
    return {"status": found.pop("status"), "num_samples": found.pop("num_samples"), **found}


def _checked(layers: int | Iterable[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(set(as_numbers(layers))))
    if not chosen:
        message = "layers is empty; expected at least one 0-based layer number"
        raise ConversionError(message)
    if chosen[0] < 0:
        message = f"layers names {chosen[0]}; expected 0-based layer numbers"
        raise ConversionError(message)
    return chosen


class _Meter:
    """Adds up the progress of several files."""

    def __init__(self, sources: list[Path], callback: Callable[[Progress], None] | None) -> None:
        self._total_nbytes = sum(source.stat().st_size for source in sources)
        self._callback = callback
        self._positions: dict[Path, int] = {}
        self._num_samples = 0

    def __call__(self, source: Path, position: int, num_samples: int) -> None:
        """Note that `source` is read up to `position` and this many more samples are written."""
        self._positions[source] = position
        self._num_samples += num_samples
        if self._callback is not None:
            done = sum(self._positions.values())
            self._callback(Progress(source, done, self._total_nbytes, self._num_samples))
