"""Converts legacy batches to archives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from h5traces.archive.selection import Selection, as_numbers
from h5traces.arguments import checked
from h5traces.errors import ConversionError
from h5traces.meaning.checks import CheckOptions
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import Target, check_not_a_source
from h5traces.precision.scales import ScaleSet
from h5traces.rewriting.convert_jobs import (
    ConvertOptions,
    run_in_processes,
    run_job,
    scaled_options,
)
from h5traces.rewriting.convert_plan import plan_jobs
from h5traces.rewriting.existing import recorded_options
from h5traces.rewriting.reports import ConversionReport, Progress
from h5traces.sources.runs import facts_of_runs
from h5traces.writing.calibrate import load_given
from h5traces.writing.options import PrecisionOptions, TargetOptions, WriteOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from h5traces.archive.selection import LayerChoice
    from h5traces.format.precision import Precision, Tier
    from h5traces.paths import PathLike


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
) -> ConversionReport:
    """Convert batches of traces (pickles, files of torch.save and others) to archives.

    Samples are streamed: memory stays at about twice the largest sample, however many there are.
    One unreadable batch does not stop the others; the report lists it, and every file of a folder
    that was not read.

    Parameters
    ----------
    sources
        Files, globs and folders; what a file holds is found by its content, whatever its name.
    dest
        A folder (one archive per batch), or a name ending in ``.h5`` for one archive.
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

    Returns
    -------
    ConversionReport
        What became of every file. Problems of single files do not raise, since others were
        converted: look at ``report.ok``, or call ``report.raise_for_errors()``.

    Raises
    ------
    TargetError
        `dest` is neither a folder nor an ``.h5`` name, or a source.
    ConversionError
        The plan is impossible: nothing to convert, two batches with one target, one batch twice
        (also as a copy) in a merge, or contradicting options.
    PrecisionError
        The precision does not go with the other options, or the scales are of another model.
    FileNotFoundError
        A source does not exist.
    """
    Selection(layers=layers)  # text is checked before anything is read
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
        # Each job gets the scales of its model.
        write=WriteOptions.of(given, target, scales=ScaleSet()),
        recorded=recorded_options(reading, scales, layers),
    )
    place = Target.of(dest, shard_samples=target.shard_samples)
    jobs, found = plan_jobs(sources, place, merge=merge, reading=reading)
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
    meter = _Meter([source for job in jobs for source in job.sources], progress)
    each = scaled_options(jobs, options, calibration, given.calibration_samples, meter)
    if target.workers is not None and target.workers > 1 and len(jobs) > 1:
        report.files += run_in_processes(jobs, each, target.workers, meter)
    else:
        report.files += [run_job(*job, meter) for job in zip(jobs, each, strict=True)]
    report.note_single_samples()
    return report


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
        """Note that `source` is read up to `position` and so many more samples are written."""
        self._positions[source] = position
        self._num_samples += num_samples
        if self._callback is not None:
            done = sum(self._positions.values())
            self._callback(Progress(source, done, self._total_nbytes, self._num_samples))
