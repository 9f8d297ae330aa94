"""Estimates sizes from a few samples that are extracted and stored."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.opening import open as open_archive
from h5traces.archive.stores import StoredSize
from h5traces.arguments import checked
from h5traces.errors import ExtractionError
from h5traces.extract.estimate import Estimate, estimate
from h5traces.extract.extracting import extract_dataset
from h5traces.extract.models import model_shape
from h5traces.extract.options import DatasetChoice, ExtractOptions, ModelChoice
from h5traces.extract.sizes import STATED_RATES, ModelShape, Rates
from h5traces.format import layout
from h5traces.format.kinds import MODEL_KINDS
from h5traces.format.precision import EXACT, TIERS, Precision
from h5traces.rewriting.repack import repack
from h5traces.storage.codecs import GZIP
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.extract.running import RunProgress
    from h5traces.format.precision import Tier

_BITS_PER_BYTE = 8


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
        rates = _measured(path, shape, lengths)
        tier_rates = {}
        if storage.dtype in (None, "float16") and storage.codec in (None, GZIP.name):
            for tier in (each for each in TIERS.values() if each != EXACT):
                encoded = path.with_name(f"{tier.tier}.h5")
                repack(path, encoded, precision=tier, target=TargetOptions(verify=False))
                tier_rates[tier] = _measured(encoded, shape, lengths)
                encoded.unlink()
    return estimate(
        shape,
        lengths,
        layers=options.layers,
        kinds=[each for each in options.kinds if each in MODEL_KINDS],
        precision=storage,
        rates=rates,
        tier_rates=tier_rates,
    )


def _measured(path: Path, shape: ModelShape, lengths: list[int]) -> Rates:
    """The rates of an archive.

    An archive does not separate what an array takes beside its values from what a sample takes, so
    the former is the stated figure; their sum is measured. Scales are left out: an archive has one
    set, however many samples it holds.
    """
    with open_archive(path) as archive:
        sizes = archive._files[0].sizes()
    num_layers, num_samples = shape.num_layers, len(lengths)
    scales = sizes.pop(layout.SCALES_GROUP, StoredSize())
    nbytes = path.stat().st_size - scales.stored_nbytes
    kinds = (*MODEL_KINDS, layout.ATTENTION_MEAN)
    values = shape.num_values(lengths, [kind for kind in kinds if kind in sizes])
    stored = {kind: sizes[kind].stored_nbytes for kind in values}
    beside = (nbytes - sum(stored.values())) / num_samples
    array_nbytes = STATED_RATES["float16"].array_nbytes
    return Rates(
        bits={
            kind: stored[kind] * _BITS_PER_BYTE / (each * num_layers * num_samples)
            for kind, each in values.items()
        },
        array_nbytes=array_nbytes,
        sample_nbytes=beside - array_nbytes * num_layers * len(values),
        source=f"pilot of {num_samples} samples",
        is_measured=True,
    )
