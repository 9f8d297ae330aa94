"""The public function: plans, runs the jobs here or in processes, and reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.errors import ConversionError
from h5traces.format.precision import Precision
from h5traces.precision.scales import ScaleSet
from h5traces.rewriting.convert_jobs import (
    ConvertOptions,
    run_in_processes,
    run_job,
    scaled_options,
)
from h5traces.rewriting.convert_plan import plan_jobs
from h5traces.rewriting.reports import ConversionReport, Progress
from h5traces.writing.calibrate import load_given
from h5traces.writing.options import AUTOMATIC_SAMPLES, WriteOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from h5traces.format.dtypes import DtypePolicy, OverflowPolicy
    from h5traces.format.precision import Tier
    from h5traces.paths import PathLike


def convert(
    sources: PathLike | Sequence[PathLike],
    dest: PathLike,
    *,
    layers: Sequence[int] | None = None,
    tier: Tier | Precision = "exact",
    scales: PathLike | None = None,
    calibration_samples: int = AUTOMATIC_SAMPLES,
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
    tier
        How precisely: ``exact``, ``fine``, ``analysis``, ``compact`` or ``native``, or a
        `Precision` of your own; `docs/precision.md` tells what each gives up.
    scales
        What `calibrate` wrote, or an archive with scales, for hidden states in steps; measured on
        the first samples by default.
    calibration_samples
        How many of them.
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
        Threads that compress; one per core by default. With several batches, that many processes
        convert them side by side, each in memory of its own.
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
    PrecisionError
        The tier does not go with the other options, or the scales are of another model.
    FileNotFoundError
        A source does not exist.
    """
    precision = Precision.of(tier)
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
            precision=precision,
            # Those of its model go with each job.
            scales=ScaleSet(),
        ),
    )
    calibration = load_given(scales, precision)
    jobs, leftovers = plan_jobs(sources, Path(dest), merge=merge, shard_samples=shard_samples)
    report = ConversionReport(
        precision=str(precision) if precision.is_lossy else None, leftovers=leftovers
    )
    meter = _Meter([source for job in jobs for source in job.sources], progress)
    each = scaled_options(jobs, options, calibration, calibration_samples, meter)
    if workers is not None and workers > 1 and len(jobs) > 1:
        report.files += run_in_processes(jobs, each, workers, meter)
    else:
        report.files += [run_job(*job, meter) for job in zip(jobs, each, strict=True)]
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
