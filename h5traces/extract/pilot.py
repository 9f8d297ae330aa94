"""Estimates sizes from a few samples that are extracted and stored."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.opening import open as open_archive
from h5traces.arguments import checked
from h5traces.errors import ExtractionError
from h5traces.extract.extracting import extract_dataset
from h5traces.extract.measuring import measured_estimate
from h5traces.extract.models import model_shape
from h5traces.extract.options import DatasetChoice, ExtractOptions, ModelChoice
from h5traces.writing.options import PrecisionOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.extract.estimate import Estimate
    from h5traces.extract.running import RunProgress
    from h5traces.format.precision import Precision, Tier


@checked
def estimate_with_pilot(
    model: ModelChoice,
    dataset: DatasetChoice,
    num_samples: int,
    options: ExtractOptions | None = None,
    *,
    precision: PrecisionOptions | Tier | Precision | None = None,
    progress: Callable[[RunProgress], None] | None = None,
) -> Estimate:
    """Extract a few samples with all layers, and estimate with the sizes measured on them.

    Parameters
    ----------
    model, dataset, options, precision
        As for `extract_dataset`; ``options.layers`` is the subset to list beside all layers.
    num_samples
        Samples of the pilot, from the start of the data set.
    progress
        Called after every written sample, in another thread.

    Returns
    -------
    Estimate
        With rows ``measured`` on the pilot.

    Raises
    ------
    ExtractionError
        As for `extract_dataset`; also if no sample could be computed.
    """
    options, storage = options or ExtractOptions(), PrecisionOptions.of(precision)
    shape = model_shape(
        model.model_id, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    with tempfile.TemporaryDirectory(prefix="h5traces-pilot-") as folder:
        path = Path(folder) / "pilot.h5"
        report = extract_dataset(
            model,
            replace(dataset, num_samples=num_samples),
            path,
            replace(options, layers=None),
            precision=replace(storage, tier=None, scales=None),
            progress=progress,
        )
        if not report.num_written:
            message = f"no sample of the pilot could be computed: {report.skipped[0].message}"
            raise ExtractionError(message)
        with open_archive(path) as archive:
            lengths = [trace.metadata.seq_len for trace in archive]
        return measured_estimate(
            path,
            shape,
            lengths,
            storage,
            layers=options.layers,
            kinds=options.kinds,
            attentions=options.attentions,
        )
