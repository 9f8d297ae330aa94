"""Scales of a conversion: given, or measured on the first samples of each model's batches.

Ranks share the scales that one of them measured: their own would give other numbers.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import xxhash

from h5traces.errors import ConversionError, PrecisionError, SchemaError
from h5traces.precision.scales import Calibration, ScaleSet
from h5traces.ranks.plan import RANKS
from h5traces.ranks.run import RankRun
from h5traces.storage.publish import locked
from h5traces.storage.remote.paths import DEFAULT_REMOTE, RemotePath
from h5traces.writing.calibrate import (
    Measurement,
    batch_states,
    check_model,
    load_calibration,
    save_calibration,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from h5traces.meaning.options import ReadingOptions
    from h5traces.ranks.bucket import BucketRun
    from h5traces.rewriting.convert_jobs import ConvertOptions, Report
    from h5traces.rewriting.convert_plan import Job

_POLL_SECONDS: Final = 0.2


class ScalesOfModels:
    """The options of jobs, with scales of their model where hidden states are quantised.

    Parameters
    ----------
    jobs
        All that will be converted, by any rank.
    options
        Of all jobs.
    calibration
        What scales are to be made from; else the first samples of each model's batches.
    samples
        How many of these.
    shared
        How the ranks of a run share what one of them measured.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        options: ConvertOptions,
        calibration: Calibration | None,
        samples: int,
        shared: SharedScales | None,
    ) -> None:
        self._jobs, self._options = jobs, options
        self._calibration, self._samples, self._shared = calibration, samples, shared
        self._found: dict[str | None, ScaleSet] = {}

    def options(self, job: Job, report: Report) -> ConvertOptions:
        """The options of a job; `report` is called for every batch that is measured for it."""
        step, options = self._options.write.precision.step, self._options
        if step is None or options.target.dry_run:
            return options
        model = _model_of(job, options)
        if model not in self._found:
            self._found[model] = self._scales(model, report).scales(step)
        return replace(options, write=replace(options.write, scales=self._found[model]))

    def _scales(self, model: str | None, report: Report) -> Calibration:
        if self._calibration is not None:
            check_model(self._calibration, model)
            return self._calibration
        alike = [job for job in self._jobs if _model_of(job, self._options) == model]
        if self._shared is None:
            return _measured(alike, self._options, model, self._samples, report)
        return self._shared.of(
            str(model),
            lambda: _measured(
                alike, self._options, model, self._samples, lambda *_: None, keep=False
            ),
        )


def _model_of(job: Job, options: ConvertOptions) -> str | None:
    return options.facts(job.sources[0])["model_id"]


def _measured(
    jobs: Sequence[Job],
    options: ConvertOptions,
    model: str | None,
    samples: int,
    report: Report,
    *,
    keep: bool = True,
) -> Calibration:
    """The statistics of a model's first samples; none if, with `keep`, every target exists."""
    if keep and options.target.skip_existing and all(job.first_target.exists() for job in jobs):
        return Calibration()
    with Measurement(options.layers) as measurement:
        for path in (source for job in jobs for source in job.sources):
            report(path, 0, 0)
            # A damaged batch is reported when it is converted.
            with contextlib.suppress(ConversionError, SchemaError, OSError):
                _add(measurement, path, samples, options.reading_of(path))
            if measurement.num_samples >= samples:
                break
        if not measurement.has_states:
            # No states were found; any that follow are stored in float16, and reported.
            return Calibration()
        return measurement.calibration(model, partial=True)


def _add(measurement: Measurement, path: Path, samples: int, reading: ReadingOptions) -> None:
    try:
        with contextlib.closing(batch_states(path, reading)) as found:
            measurement.add_first(path.name, found, samples)
    except PrecisionError as error:
        message = f"{error}; convert the batches of each model by themselves"
        raise PrecisionError(message) from error


class SharedScales:
    """The scales of a run: those of the rank that had them first.

    In a folder, the others wait for it. A bucket has no locks: there, ranks that come before it is
    done measure, too, and take what was put first.
    """

    def __init__(self, run: RankRun | BucketRun) -> None:
        self._run = run

    def of(self, name: str, measure: Callable[[], Calibration]) -> Calibration:
        """The scales of a model, measured now if no rank has done it."""
        # Not an .h5: whoever reads the folder of archives would find it.
        file = f"{xxhash.xxh3_64_hexdigest(name.encode())}.scales"
        if isinstance(self._run, RankRun):
            path = self._run.folder / RANKS / file
            while not path.exists():
                # Not a lock that is waited for: it could not be interrupted.
                with locked(path.with_suffix(".lock")) as is_ours:
                    if is_ours and not path.exists():
                        save_calibration(measure(), path)
                if not is_ours:
                    time.sleep(_POLL_SECONDS)
            # Also by who measured: it holds what the others read.
            return load_calibration(path, may_be_empty=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            path.write_bytes(_put(RemotePath(f"{self._run.url}{RANKS}/{file}"), path, measure))
            return load_calibration(path, may_be_empty=True)


def _put(place: RemotePath, path: Path, measure: Callable[[], Calibration]) -> bytes:
    """The scales in a bucket, measured and put there if there are none."""
    from h5traces.storage.remote.uploading import put_new, read_document_at

    try:
        return read_document_at(place, DEFAULT_REMOTE)
    except FileNotFoundError:
        save_calibration(measure(), path)
    data = path.read_bytes()
    return data if put_new(place, data, DEFAULT_REMOTE) else read_document_at(place, DEFAULT_REMOTE)
