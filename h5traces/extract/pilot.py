"""Measures on a few samples what many will take."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive.opening import open_archive
from h5traces.archive.store import StoredSize
from h5traces.errors import ExtractionError
from h5traces.extract.choices import DatasetChoice, ModelChoice, StoreOptions
from h5traces.extract.estimate import STATED_RATES, Estimate, Rates, estimate, num_values
from h5traces.extract.extracting import extract_dataset
from h5traces.extract.forecasting import shape_of
from h5traces.extract.layer_ranges import layer_numbers
from h5traces.extract.models import load_config
from h5traces.extract.options import ExtractOptions
from h5traces.format import layout
from h5traces.format.precision import TIERS
from h5traces.rewriting.repack import repack
from h5traces.storage.codecs import GZIP

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.extract.estimate import ModelShape
    from h5traces.extract.running import RunProgress

_BITS = 8


def estimate_with_pilot(
    model: ModelChoice,
    dataset: DatasetChoice,
    num_samples: int,
    options: ExtractOptions | None = None,
    *,
    store: StoreOptions | None = None,
    progress: Callable[[RunProgress], None] | None = None,
) -> Estimate:
    """Extract a few samples of all layers, and reckon with what they took.

    Parameters
    ----------
    model, dataset, options, store
        As for `extract_dataset`; ``options.layers`` are the subset to compare with.
    num_samples
        Samples of the pilot: the first so many.
    progress
        Called when a sample was written.

    Raises
    ------
    ExtractionError
        As `extract_dataset`; also where no sample could be computed.
    """
    options, store = options or ExtractOptions(), store or StoreOptions()
    shape = shape_of(load_config(model.model_id, revision=model.revision))
    layers = None
    if options.layers is not None:
        layers = layer_numbers(options.layers, shape.num_layers)
    with tempfile.TemporaryDirectory(prefix="h5traces-pilot-") as folder:
        output = Path(folder) / "pilot.h5"
        report = extract_dataset(
            model,
            replace(dataset, num_samples=num_samples),
            output,
            replace(options, layers=None),
            store=replace(store, shard_samples=None),
            progress=progress,
        )
        if not report.num_written:
            message = f"no sample of the pilot could be computed: {report.skipped[0].message}"
            raise ExtractionError(message)
        with open_archive(output) as archive:
            lengths = [trace.metadata.seq_len for trace in archive]
        rates = _measured(output, shape, lengths)
        tier_rates = {}
        if options.dtype == "float16" and store.codec == GZIP.name:
            for precision in (each for each in TIERS.values() if not each.is_exact):
                encoded = output.with_name(f"{precision.tier}.h5")
                repack(output, encoded, tier=precision, verify=False)
                tier_rates[precision] = _measured(encoded, shape, lengths)
                encoded.unlink()
    return estimate(
        shape,
        lengths,
        layers=layers,
        kinds=options.kinds,
        dtype=options.dtype,
        codec=store.codec,
        rates=rates,
        tier_rates=tier_rates,
    )


def _measured(path: Path, shape: ModelShape, lengths: list[int]) -> Rates:
    """The rates of a pilot's archive.

    What one array takes beside its values is the stated figure, since the archive of a pilot does
    not tell it from what a sample takes; together they are what was measured. Scales, of which an
    archive has one set however many its samples are, are left out.
    """
    with open_archive(path) as archive:
        sizes = archive.files[0].sizes()
    num_layers, num_samples = shape.num_layers, len(lengths)
    scales = sizes.pop(layout.SCALES_GROUP, StoredSize())
    nbytes = path.stat().st_size - scales.stored_nbytes
    values = num_values(shape, lengths, [kind for kind in layout.KINDS if kind in sizes])
    stored = {kind: sizes[kind].stored_nbytes for kind in values}
    beside = (nbytes - sum(stored.values())) / num_samples
    arrays = STATED_RATES["float16"].array_nbytes
    return Rates(
        bits={
            kind: stored[kind] * _BITS / (each * num_layers * num_samples)
            for kind, each in values.items()
        },
        array_nbytes=arrays,
        sample_nbytes=beside - arrays * num_layers * len(values),
        source=f"pilot of {num_samples} samples",
        is_measured=True,
    )
