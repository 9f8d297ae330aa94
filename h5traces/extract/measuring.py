"""Estimates sizes from samples that are stored: of a pilot, or the first of files that exist."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from h5traces.archive.opening import open as open_archive
from h5traces.archive.whole_file import StoredSize
from h5traces.arguments import checked
from h5traces.errors import ConversionError
from h5traces.extract.estimate import estimate
from h5traces.extract.options import window_of
from h5traces.extract.sizes import STATED_RATES, ModelShape, Rates
from h5traces.format import layout
from h5traces.format.kinds import MODEL_KINDS
from h5traces.format.precision import EXACT, TIERS, Precision
from h5traces.meaning.options import ReadingOptions
from h5traces.paths import local_path
from h5traces.rewriting.repack import repack
from h5traces.sources.collecting import archives_and_sources
from h5traces.sources.opening import is_read_as_archive, open_source
from h5traces.storage.codecs import GZIP
from h5traces.writing.archive_writer import ArchiveWriter
from h5traces.writing.options import PrecisionOptions, TargetOptions, WriteOptions
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from h5traces.archive.archive import Archive
    from h5traces.archive.selection import LayerChoice
    from h5traces.extract.estimate import Estimate
    from h5traces.format.dtypes import DtypePolicy
    from h5traces.format.precision import Tier
    from h5traces.format.record import TraceRecord
    from h5traces.paths import Source

_BITS_PER_BYTE: Final = 8
_SAMPLES: Final = 16


@checked
def estimate_from_files(
    sources: Source | Sequence[Source],
    num_samples: int = _SAMPLES,
    *,
    layers: LayerChoice = None,
    precision: PrecisionOptions | Tier | Precision | None = None,
    reading: ReadingOptions = ReadingOptions(),
) -> Estimate:
    """Estimate the size of files as archives, from what their first samples take.

    Parameters
    ----------
    sources
        Files of any kind that ``convert`` reads, archives, or folders of them.
    num_samples
        How many samples are stored, in a temporary folder, to measure them.
    layers
        The subset to list beside all layers, as for `estimate`.
    precision
        How they are stored; a tier is listed beside the others.
    reading
        What files of other programs do not say themselves.

    Returns
    -------
    Estimate
        With rows ``measured`` on these samples; its shape is that of what they hold.

    Raises
    ------
    ConversionError
        There is no sample, or none with hidden states or attentions.
    FileNotFoundError
        Nothing is there.
    """
    storage = PrecisionOptions.of(precision)
    with tempfile.TemporaryDirectory(prefix="h5traces-pilot-") as folder:
        path = Path(folder) / "pilot.h5"
        options = WriteOptions(dtype=storage.dtype or "float16", codec=storage.codec or GZIP.name)
        with ArchiveWriter(path, options) as writer:
            for record in islice(_records(sources, reading), num_samples):
                writer.append(record)
        with open_archive(path, container="numpy") as archive:
            shape, lengths, kinds = _shape_of(archive, sources)
        return measured_estimate(path, shape, lengths, storage, layers=layers, kinds=kinds)


def _records(sources: Source | Sequence[Source], reading: ReadingOptions) -> Iterator[TraceRecord]:
    for each in archives_and_sources(sources, reading):
        path = local_path(each)
        if is_read_as_archive(path, reading):
            with open_archive(path) as archive:
                yield from map(to_record, archive)
        else:
            with open_source(path, reading) as source:
                yield from source.records()


def _shape_of(
    archive: Archive, sources: Source | Sequence[Source]
) -> tuple[ModelShape, list[int], tuple[str, ...]]:
    """Dimensions of what samples hold, their positions, and their kinds."""
    num_layers, hidden, heads, lengths, kinds = 1, 1, 1, [], dict[str, None]()
    for trace in archive:
        length = 0
        for kind in (layout.HIDDEN_STATES, layout.ATTENTIONS):
            arrays = [each for each in trace.get(kind) or () if hasattr(each, "shape")]
            if not arrays:
                continue
            kinds[kind] = None
            num_layers = max(num_layers, len(arrays))
            shape = arrays[0].shape
            length = max(length, shape[-2])
            if kind == layout.HIDDEN_STATES:
                hidden = shape[-1]
            else:
                heads = shape[0]
        lengths.append(length)
    if not kinds:
        message = f"{sources}: no sample holds hidden states or attentions to measure"
        raise ConversionError(message)
    return (
        ModelShape(num_layers=num_layers, hidden_size=hidden, num_heads=heads),
        lengths,
        tuple(kinds),
    )


def measured_estimate(
    path: Path,
    shape: ModelShape,
    lengths: Sequence[int],
    storage: PrecisionOptions,
    *,
    layers: LayerChoice,
    kinds: Sequence[str],
    attentions: str | None = None,
) -> Estimate:
    """An estimate by what an archive of samples of these lengths takes, also in every tier."""
    window = min(window_of(attentions), max(lengths))
    rates = _measured(path, shape, lengths, window, storage.dtype or "float16")
    tier_rates = {}
    if storage.dtype in (None, "float16") and storage.codec in (None, GZIP.name):
        for tier in (each for each in TIERS.values() if each != EXACT):
            encoded = path.with_name(f"{tier.tier}.h5")
            repack(path, encoded, precision=tier, target=TargetOptions(verify=False))
            tier_rates[tier] = _measured(encoded, shape, lengths, window)
            encoded.unlink()
    return estimate(
        shape,
        lengths,
        layers=layers,
        kinds=[each for each in kinds if each in MODEL_KINDS],
        attentions=attentions,
        precision=storage,
        rates=rates,
        tier_rates=tier_rates,
    )


def _measured(
    path: Path,
    shape: ModelShape,
    lengths: Sequence[int],
    window: int,
    dtype: DtypePolicy = "float16",
) -> Rates:
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
    values = shape.num_values(lengths, [kind for kind in MODEL_KINDS if kind in sizes], window)
    stored = {kind: sizes[kind].stored_nbytes for kind in values}
    beside = (nbytes - sum(stored.values())) / num_samples
    array_nbytes = STATED_RATES[dtype if dtype in STATED_RATES else "float32"].array_nbytes
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
