"""Measures on a few samples what many will take."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from h5traces.archive import open_archive
from h5traces.errors import ExtractionError
from h5traces.estimation import STATED_RATES, Estimate, Rates, estimate, num_values
from h5traces.extract.choices import DatasetChoice, ModelChoice, StoreOptions
from h5traces.extract.extracting import extract_dataset
from h5traces.extract.forecasting import shape_of
from h5traces.extract.models import load_config
from h5traces.extract.options import ExtractOptions
from h5traces.layer_ranges import layer_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

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
            sizes = archive.files[0].sizes()
            nbytes = output.stat().st_size
    values = num_values(shape, lengths, options.kinds)
    stored = {kind: sizes[kind].stored_nbytes for kind in values}
    rates = _measured(nbytes, stored, values, shape.num_layers, len(lengths))
    return estimate(
        shape,
        lengths,
        layers=layers,
        kinds=options.kinds,
        dtype=options.dtype,
        codec=store.codec,
        rates=rates,
    )


def _measured(
    nbytes: int,
    stored: dict[str, int],
    values: dict[str, float],
    num_layers: int,
    num_samples: int,
) -> Rates:
    """The rates of a pilot's archive.

    What one array takes beside its values is the stated figure, since the archive of a pilot does
    not tell it from what a sample takes; together they are what was measured.
    """
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
