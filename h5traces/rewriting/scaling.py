"""Gives every job the scales that its precision needs, measured on its own model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from h5traces.errors import ConversionError, PrecisionError, SchemaError
from h5traces.precision.scales import ScaleSet
from h5traces.sources.pickle.layouts import names_in_file_name
from h5traces.writing.calibrate import Measurement, batch_states, check_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from h5traces.precision.scales import Calibration
    from h5traces.rewriting.convert_jobs import ConvertOptions, Report
    from h5traces.rewriting.convert_plan import Job


def scaled_options(
    jobs: Sequence[Job],
    options: ConvertOptions,
    calibration: Calibration | None,
    samples: int,
    report: Report,
) -> list[ConvertOptions]:
    """The options of every job, with scales where hidden states go into steps.

    Parameters
    ----------
    jobs
        What will be converted.
    options
        Of all jobs.
    calibration
        What scales are to be made from; else the first samples of each model's batches.
    samples
        How many of these.
    report
        Told of every batch that is looked at.

    Raises
    ------
    PrecisionError
        The calibration is of another model, or batches of one model have different widths.
    """
    step = options.write.precision.step
    if step is None or options.dry_run:
        return [options for _ in jobs]
    models = [_model_of(job, options) for job in jobs]
    found: dict[str | None, ScaleSet] = {}
    for model in dict.fromkeys(models):
        if calibration is not None:
            check_model(calibration, model)
            found[model] = calibration.scales(step)
            continue
        alike = [job for job, other in zip(jobs, models, strict=True) if other == model]
        found[model] = _measured(alike, options, model, samples, step, report)
    return [replace(options, write=replace(options.write, scales=found[model])) for model in models]


def _model_of(job: Job, options: ConvertOptions) -> str | None:
    return options.model_id or names_in_file_name(job.sources[0].name).get("model_id")


def _measured(
    jobs: Sequence[Job],
    options: ConvertOptions,
    model: str | None,
    samples: int,
    step: float,
    report: Report,
) -> ScaleSet:
    if options.skip_existing and all(job.first_target.exists() for job in jobs):
        return ScaleSet()
    with Measurement(options.layers) as measurement:
        for path in (source for job in jobs for source in job.sources):
            report(path, 0, 0)
            # Whoever cannot read it says so when it is converted.
            with contextlib.suppress(ConversionError, SchemaError, OSError):
                _add(measurement, path, samples)
            if measurement.num_samples >= samples:
                break
        if not measurement.has_states:
            # Nothing to encode; what turns up all the same is stored exactly, and reported.
            return ScaleSet()
        return measurement.calibration(model, partial=True).scales(step)


def _add(measurement: Measurement, path: Path, samples: int) -> None:
    try:
        with contextlib.closing(batch_states(path)) as found:
            measurement.add_first(path.name, found, samples)
    except PrecisionError as error:
        message = f"{error}; convert the batches of each model by themselves"
        raise PrecisionError(message) from error
