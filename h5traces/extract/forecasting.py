"""Whether the disk is large enough, before a run begins."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from h5traces.archive.opening import open_archive
from h5traces.errors import ExtractionError
from h5traces.extract.estimate import ModelShape, Rates, estimate, stated_rates
from h5traces.format.precision import EXACT, Precision
from h5traces.storage.codecs import GZIP
from h5traces.writing.targets import DEFAULT_SHARD_SAMPLES, Target

if TYPE_CHECKING:
    from pathlib import Path

    from h5traces.extract.choices import StoreOptions
    from h5traces.extract.estimate import Estimate
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.planning import Job
    from h5traces.extract.reports import ExtractionReport
    from h5traces.format.dtypes import DtypePolicy


def shape_of(config: Any) -> ModelShape:
    """What of a configuration decides the size of traces."""
    text = config.get_text_config()
    return ModelShape(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=text.num_attention_heads,
    )


class Forecast:
    """Room that samples need at most: every answer as long as it may be."""

    def __init__(
        self,
        shape: ModelShape,
        jobs: list[Job],
        layers: tuple[int, ...],
        options: ExtractOptions,
        store: StoreOptions,
    ) -> None:
        self._shape, self._layers = shape, layers
        self._options, self._store = options, store
        longest = options.generation.max_new_tokens
        self._lengths = [len(each.prompt) + longest for each in jobs]

    def estimate(self) -> Estimate:
        """The table."""
        return estimate(
            self._shape,
            self._lengths,
            layers=self._layers,
            kinds=self._options.kinds,
            dtype=self._options.dtype,
            codec=self._store.codec,
            rates=_rates(self._options.dtype, self._store.codec),
            precision=Precision.of(self._store.tier),
        )

    def needed_nbytes(self, num_done: int) -> float:
        """Room for all samples but the first so many, and for one shard that waits to be packed.

        Samples wait exactly, whatever the tier.
        """
        found = self.estimate()
        precision = Precision.of(self._store.tier)
        waiting = found.sample_nbytes(EXACT, len(self._layers))
        stored = found.sample_nbytes(precision, len(self._layers))
        left = max(0, len(self._lengths) - num_done)
        shard = self._store.shard_samples or DEFAULT_SHARD_SAMPLES
        return stored * left + waiting * min(shard, len(self._lengths))


def _rates(dtype: DtypePolicy, codec: str) -> Rates:
    """Stated rates, or for types and codecs that have none those of float32, which are larger."""
    try:
        return stated_rates(dtype, codec)
    except ExtractionError:
        return stated_rates("float32", GZIP.name)


def check_space(
    output: Path,
    forecast: Forecast,
    store: StoreOptions,
    report: ExtractionReport,
    *,
    dry_run: bool,
) -> None:
    """Compare what is needed with what is there.

    Raises
    ------
    ExtractionError
        The disk is too small.
    """
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    report.free_nbytes = shutil.disk_usage(folder).free
    report.needed_nbytes = forecast.needed_nbytes(_num_written(output, store.shard_samples))
    if report.needed_nbytes > report.free_nbytes and store.check_space and not dry_run:
        message = (
            f"{output}: the samples may need {report.needed_nbytes / 1e9:,.1f} GB with the room to "
            f"pack a shard, but {report.free_nbytes / 1e9:,.1f} GB are free on that disk; choose "
            "another, fewer samples or layers, smaller shards, or --no-check-space"
        )
        raise ExtractionError(message)


def _num_written(output: Path, shard_samples: int | None) -> int:
    """Samples of earlier starts; those whose shard is being written need their room once more."""
    target = Target.of(output, shard_samples)
    num_spooled = sum(1 for _ in target.spool_path.glob("*.sample"))
    found = [str(each) for each in target.existing()]
    if not found:
        return num_spooled
    with open_archive(found) as archive:
        return num_spooled + len(archive)
