"""What is in an archive or a legacy batch: shapes, ranges, consistency, lengths and sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from h5traces.archive.archive import shared_metadata
from h5traces.archive.opening import open_archive
from h5traces.errors import SchemaError
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, count_not_finite
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.record import StepArrays, TraceRecord
from h5traces.paths import is_archive
from h5traces.sources.opening import facts_in_name, open_source
from h5traces.storage.remote.paths import RemotePath, is_url
from h5traces.writing.transcription import to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from h5traces.format.limits import ReadLimits
    from h5traces.paths import PathLike

Samples = int | Literal["all"]


@dataclass(slots=True)
class ArrayStats:
    """One array, looked at.

    Attributes
    ----------
    kind, name, site
        What it is; ``name`` is ``layer_000`` and so on.
    shape
        Its shape; for generation steps, one shape per step.
    dtype
        Type of the values.
    minimum, maximum
        Range of the finite values; None where there are none.
    num_nan, num_inf
        How many values are not finite.
    kept_exact
        Why the array is more precise than its archive says; None where it is not.
    """

    kind: str
    name: str
    site: str | None
    shape: list[Any]
    dtype: str
    minimum: float | None
    maximum: float | None
    num_nan: int
    num_inf: int
    kept_exact: str | None = None


@dataclass(slots=True)
class SampleStats:
    """One sample, looked at.

    Attributes
    ----------
    index
        Position in the file.
    sample_id, seq_len, coverage
        As in the archive's metadata.
    fields
        Keys of the dict.
    texts
        Question and answers, where there are.
    num_tokens, num_tokens_decoded
        Lengths, None where not stored.
    arrays
        Every array.
    problems
        Contradictions between lengths, layers and heads; empty means consistent.
    """

    index: int
    sample_id: str | None
    seq_len: int
    coverage: str
    fields: list[str]
    texts: dict[str, str]
    num_tokens: int | None
    num_tokens_decoded: int | None
    arrays: list[ArrayStats] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Inspection:
    """What a file holds.

    Attributes
    ----------
    path, container, nbytes
        The file, ``archive`` or ``pickle``, and its size.
    metadata
        Facts about the whole: model, dataset, layers and so on.
    num_samples
        How many.
    layers
        Layer numbers that are stored.
    lengths
        Minimum, median, mean and maximum of ``seq_len``.
    coverage
        Number of samples by coverage.
    sizes
        By kind: datasets, bytes before and after compression.
    samples
        The samples whose arrays were looked at.
    """

    path: str
    container: str
    nbytes: int
    metadata: dict[str, Any]
    num_samples: int
    layers: list[int]
    lengths: dict[str, float]
    coverage: dict[str, int]
    sizes: dict[str, dict[str, int]]
    samples: list[SampleStats]

    def as_dict(self) -> dict[str, Any]:
        """The inspection as JSON-ready values."""
        return asdict(self)


def inspect(
    path: PathLike | RemotePath,
    *,
    samples: Samples = 1,
    limits: ReadLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look into one archive or legacy batch.

    Parameters
    ----------
    path
        An ``.h5`` archive, also on a server, or a ``.pkl`` or ``.pkl.gz`` batch (which must be
        read to its end to count its samples; nothing in it is executed).
    samples
        Of how many samples the arrays are read, or ``all``.
    limits
        What an archive may ask of its reader.
    progress
        Called with the work done and the work there is.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    H5TracesError
        It is neither, or damaged.
    """
    if isinstance(path, RemotePath) or is_url(path):
        return _inspect_archive(path, samples, limits, progress)
    file = Path(path)
    if not file.exists():
        message = f"{file}: no such file"
        raise FileNotFoundError(message)
    if is_archive(file):
        return _inspect_archive(file, samples, limits, progress)
    return _inspect_batch(file, samples, progress)


def _inspect_archive(
    file: PathLike | RemotePath,
    samples: Samples,
    limits: ReadLimits,
    progress: Callable[[int, int], None] | None,
) -> Inspection:
    with open_archive(file, limits=limits) as archive:
        metadatas = [trace.metadata for trace in archive]
        wanted = len(archive) if samples == "all" else min(samples, len(archive))
        looked_at = []
        for index in range(wanted):
            looked_at.append(_sample_stats(index, to_record(archive[index])))
            for each in looked_at[-1].arrays:
                reason = archive[index].attrs(f"{each.kind}/{each.name}").get("kept_exact")
                each.kept_exact = None if reason is None else str(reason)
            if progress is not None:
                progress(index + 1, wanted)
        (stored,) = archive.files
        sizes = {name: asdict(size) for name, size in stored.sizes().items()}
        metadata = archive.metadata.model_dump(mode="json", exclude_none=True)
        told = shared_metadata(archive.files)
        metadata["losses"] = [str(each) for each in told.losses]
        metadata |= {"is_lossless": told.is_lossless, "changes": told.changes}
        return Inspection(
            path=str(file),
            container="archive",
            nbytes=stored.nbytes,
            metadata={**metadata, "has_footer": stored.has_footer},
            num_samples=len(archive),
            layers=list(archive.layers),
            lengths=_length_stats([each.seq_len for each in metadatas]),
            coverage=dict(Counter(each.coverage for each in metadatas)),
            sizes=sizes,
            samples=looked_at,
        )


def _inspect_batch(
    file: Path, samples: Samples, progress: Callable[[int, int], None] | None
) -> Inspection:
    lengths: list[int] = []
    coverage: Counter[str] = Counter()
    looked_at: list[SampleStats] = []
    raw: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with open_source(file) as source:
        for index, record in enumerate(source.records()):
            stats = _sample_stats(index, record, read=samples == "all" or index < samples)
            lengths.append(stats.seq_len)
            coverage[stats.coverage] += 1
            for kind, nbytes in _array_sizes(record):
                raw[kind] += nbytes
                counts[kind] += 1
            if samples == "all" or index < samples:
                looked_at.append(stats)
            if progress is not None:
                progress(*source.progress)
    return Inspection(
        path=str(file),
        container="pickle",
        nbytes=file.stat().st_size,
        metadata=facts_in_name(file),
        num_samples=len(lengths),
        layers=list(range(source.num_layers)),
        lengths=_length_stats(lengths),
        coverage=dict(coverage),
        sizes={
            kind: {"num_datasets": counts[kind], "raw_nbytes": raw[kind]} for kind in sorted(raw)
        },
        samples=looked_at,
    )


def _array_sizes(record: TraceRecord) -> Iterator[tuple[str, int]]:
    for kind, layered in record.layered.items():
        for entry in layered.arrays:
            if isinstance(entry.array, StepArrays):
                yield kind, sum(step.values.nbytes for step in entry.array.steps)
            else:
                yield kind, entry.array.load().values.nbytes


def _length_stats(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {
        "min": min(lengths),
        "median": float(np.median(lengths)),
        "mean": float(np.mean(lengths)),
        "max": max(lengths),
    }


def _sample_stats(index: int, record: TraceRecord, *, read: bool = True) -> SampleStats:
    problems: list[str] = []
    try:
        seq_len = record.describe().metadata.seq_len
    except SchemaError as error:
        problems = [f"{each.loc}: {each.message}" for each in error.problems]
        seq_len = 0 if record.tokens is None else len(record.tokens)
    num_tokens = None if record.tokens is None else len(record.tokens)
    decoded = record.tokens_decoded
    return SampleStats(
        index=index,
        sample_id=record.sample_id,
        seq_len=seq_len,
        coverage=record.coverage(),
        fields=list(record.fields),
        texts=dict(record.texts),
        num_tokens=num_tokens,
        num_tokens_decoded=None if decoded is None else len(decoded),
        arrays=list(_array_stats(record)) if read else [],
        problems=problems,
    )


def _array_stats(record: TraceRecord) -> Iterator[ArrayStats]:
    for kind in sorted(record.layered, key=list(layout.KINDS).index):
        for entry in record.layered[kind].arrays:
            if isinstance(entry.array, StepArrays):
                parts = list(entry.array.steps)
                shape: list[Any] = [list(step.shape) for step in parts]
            else:
                parts = [entry.array.load()]
                shape = list(parts[0].shape)
            yield _stats(kind, entry.name, entry.site, shape, parts)


def _stats(
    kind: str, name: str, site: str | None, shape: list[Any], parts: list[TypedArray]
) -> ArrayStats:
    counts = [count_not_finite(part) for part in parts]
    lows, highs = [], []
    for part in parts:
        numbers = part.to_numpy()
        finite = numbers[np.isfinite(numbers)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    return ArrayStats(
        kind=kind,
        name=name,
        site=site,
        shape=shape,
        dtype=parts[0].dtype if parts else "none",
        minimum=min(lows, default=None),
        maximum=max(highs, default=None),
        num_nan=sum(nan for nan, _ in counts),
        num_inf=sum(inf for _, inf in counts),
    )
