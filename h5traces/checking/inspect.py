"""Describes archives and legacy batches: shapes, ranges, consistency, lengths and sizes."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from h5traces.archive.opening import open as open_archive
from h5traces.archive.shards import shared_metadata
from h5traces.arguments import checked
from h5traces.checking.meaning import SMALL_NBYTES, look_of, num_workers, stored_content
from h5traces.errors import SchemaError
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, cast_values, count_not_finite
from h5traces.format.html import Report
from h5traces.format.limits import DEFAULT_LIMITS
from h5traces.format.record import ArraySource, StepArrays, TraceRecord
from h5traces.format.text import counted
from h5traces.format.values import TorchValue
from h5traces.meaning.checks import CheckOptions, FindingSummary
from h5traces.meaning.options import ReadingOptions
from h5traces.meaning.sample_checks import Look, SampleChecks
from h5traces.sources.collecting import archives_and_sources
from h5traces.sources.opening import facts_in_name, is_read_as_archive, open_source
from h5traces.sources.runs import readings_of
from h5traces.storage.remote.paths import RemotePath
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from h5traces.format.limits import ReadLimits
    from h5traces.format.record import LayerArray
    from h5traces.meaning.array_checks import Mapper
    from h5traces.paths import Source

    ReportProgress = Callable[[int, int], None]

SampleCount = int | Literal["all"]


@dataclass(slots=True)
class ArrayStats:
    """One array.

    Attributes
    ----------
    kind, name, site
        What it is; ``name`` is ``layer_000`` and so on.
    shape
        Its shape; for generation steps, one shape per step.
    dtype
        Type of the values.
    minimum, maximum
        Range of the finite values; None if there are none.
    num_nan, num_inf
        How many values are not finite.
    kept_exact
        Why the array is stored without its archive's loss; None if it is not.
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
    """One sample.

    Attributes
    ----------
    index
        Position in the file.
    sample_id, seq_len, coverage
        As in the archive's metadata.
    fields
        Keys of the dict.
    texts
        Question and answers, if stored.
    num_tokens, num_tokens_decoded
        Lengths; None if not stored.
    arrays
        Every array, if they were read.
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
class Inspection(Report):
    """What a file holds.

    Attributes
    ----------
    path, container, nbytes
        The file, ``archive`` or the kind of source, such as ``pickle`` or ``torch``, and its size.
    metadata
        Facts about the whole: model, dataset, layers and so on.
    num_samples
        Number of samples.
    layers
        Numbers of the stored layers, or positions.
    by_position
        Whether these are positions, as nothing says which block each is.
    understood
        How a file of another program was understood.
    lengths
        Minimum, median, mean and maximum of ``seq_len``.
    coverage
        Number of samples by coverage.
    sizes
        By kind: datasets, bytes before and after compression.
    samples
        The samples whose arrays were read.
    findings
        What checks of meaning found, see ``docs/checks.md``.
    checks
        Which findings are shown, and which are a failure.
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
    findings: list[FindingSummary] = field(default_factory=list)
    checks: CheckOptions = CheckOptions()
    by_position: bool = False
    understood: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no sample contradicts itself, and no finding is a failure."""
        has_problems = any(sample.problems for sample in self.samples)
        return not has_problems and not self.checks.fails(self.findings)

    @property
    def covers(self) -> str:
        """What the findings are about, for people."""
        every, of = counted(len(self.samples), "sample"), self.num_samples - len(self.samples)
        text = f"{self.checks.num_checks} checks of meaning: every value of {every}"
        if of and self.container != "archive":
            return f"{text}, some values of {counted(of, 'other')}"
        return f"{text}; {counted(of, 'other')} not read" if of else text


@checked
def inspect(
    sources: Source | Iterable[Source],
    *,
    samples: SampleCount = 1,
    reading: ReadingOptions = ReadingOptions(),
    checks: CheckOptions = CheckOptions(),
    limits: ReadLimits = DEFAULT_LIMITS,
    progress: ReportProgress | None = None,
) -> list[Inspection]:
    """Describe archives and files of other programs.

    Parameters
    ----------
    sources
        Archives (also on servers), files of other programs, globs or folders. The latter are read
        to their end, which is how their samples are counted; nothing in them is executed.
    samples
        Number of samples per file whose arrays are read, or ``all``.
    reading
        What a batch does not say itself.
    checks
        Which findings of checks are left out, and which make an inspection not ``ok``.
    limits
        What an archive may ask of its reader.
    progress
        Called for every file with the work done and the work there is.

    Returns
    -------
    list of Inspection
        One per file.

    Raises
    ------
    FileNotFoundError
        A path does not exist, or a folder or glob holds no such file.
    H5TracesError
        A file is neither an archive nor a batch, or is damaged.
    """
    found = []
    paths = archives_and_sources(sources, reading)
    local = [path for path in paths if not isinstance(path, RemotePath)]
    files = [path for path in local if not is_read_as_archive(path, reading)]
    readings = readings_of(files, reading)
    for path in paths:
        if isinstance(path, RemotePath) or path not in readings:
            found.append(_inspect_archive(path, samples, checks, limits, progress))
        else:
            found.append(_inspect_batch(path, samples, readings[path], checks, progress))
    return found


def _inspect_archive(
    file: Path | RemotePath,
    samples: SampleCount,
    checks: CheckOptions,
    limits: ReadLimits,
    progress: ReportProgress | None,
) -> Inspection:
    with (
        open_archive(file, limits=limits) as archive,
        ThreadPoolExecutor(num_workers()) as pool,
    ):
        metadatas = list(archive._metadata())
        wanted = len(archive) if samples == "all" else min(samples, len(archive))
        looked_at = []
        look, examined = look_of(archive), SampleChecks()
        for index in range(wanted):
            trace = archive[index]
            record, kept = to_record(trace), trace._stored
            mapper = pool.map if kept.raw_nbytes > SMALL_NBYTES else map
            content = stored_content(trace)
            examined.add(record, content, look=replace(look, full_mapper=mapper))
            looked_at.append(_sample_stats(index, record, mapper=mapper))
            for each in looked_at[-1].arrays:
                reason = kept.attrs(f"{each.kind}/{each.name}").get("kept_exact")
                each.kept_exact = None if reason is None else str(reason)
            if progress is not None:
                progress(index + 1, wanted)
        (stored,) = archive._files
        metadata = archive.metadata.model_dump(mode="json", exclude_none=True)
        told = shared_metadata(archive._files)
        metadata["losses"] = [str(each) for each in told.losses]
        metadata |= {
            name: getattr(told, name) for name in ("is_lossless", "changes", "kept_layers")
        }
        metadata["has_footer"] = stored.has_footer
        return Inspection(
            path=str(file),
            container="archive",
            nbytes=stored.nbytes,
            metadata=metadata,
            num_samples=len(archive),
            layers=list(archive.layers),
            by_position=any("positions" in attrs for attrs in stored.store.kinds.values()),
            lengths=_length_stats([each.seq_len for each in metadatas]),
            coverage=dict(Counter(each.coverage for each in metadatas)),
            sizes={name: asdict(size) for name, size in stored.sizes().items()},
            samples=looked_at,
            findings=examined.findings.summaries(checks),
            checks=checks,
        )


def _inspect_batch(
    file: Path,
    samples: SampleCount,
    reading: ReadingOptions,
    checks: CheckOptions,
    progress: ReportProgress | None,
) -> Inspection:
    examined = SampleChecks()
    lengths: list[int] = []
    coverage: Counter[str] = Counter()
    looked_at: list[SampleStats] = []
    raw: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with open_source(file, reading) as source:
        for index, record in enumerate(source.records()):
            read = samples == "all" or index < samples
            stats = _sample_stats(index, record, read=read)
            examined.add(record, look=Look(full_mapper=map if read else None))
            lengths.append(stats.seq_len)
            coverage[stats.coverage] += 1
            for kind, layered in record.layered.items():
                counts[kind] += len(layered.arrays)
                for layer in layered.arrays:
                    raw[kind] += sum(part.values.nbytes for part in _parts(layer.array))
            if read:
                looked_at.append(stats)
            if progress is not None:
                progress(*source.progress)
    return Inspection(
        path=str(file),
        container=source.kind,
        nbytes=file.stat().st_size,
        metadata=facts_in_name(file),
        num_samples=len(lengths),
        layers=list(source.established.numbers),
        by_position=source.established.by_position,
        understood=list(dict.fromkeys(source.understood)),
        lengths=_length_stats(lengths),
        coverage=dict(coverage),
        sizes={
            kind: {"num_datasets": counts[kind], "raw_nbytes": raw[kind]} for kind in sorted(raw)
        },
        samples=looked_at,
        findings=examined.findings.summaries(checks),
        checks=checks,
    )


def _parts(array: ArraySource | StepArrays) -> list[TypedArray]:
    """The arrays of a layer: one, or one per generation step."""
    return list(array.steps) if isinstance(array, StepArrays) else [array.load()]


def _length_stats(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {
        "min": min(lengths),
        "median": float(np.median(lengths)),
        "mean": float(np.mean(lengths)),
        "max": max(lengths),
    }


def _sample_stats(
    index: int, record: TraceRecord, *, read: bool = True, mapper: Mapper = map
) -> SampleStats:
    problems: list[str] = []
    try:
        seq_len = record.describe().metadata.seq_len
    except SchemaError as error:
        problems = [str(each) for each in error.problems]
        seq_len = 0 if record.tokens is None else len(record.tokens)
    # Fields whose type the format has no place for are extra values.
    tokens = record.extra.get("tokens") if record.tokens is None else record.tokens
    decoded = record.tokens_decoded or record.extra.get("tokens_decoded")
    return SampleStats(
        index=index,
        sample_id=record.sample_id,
        seq_len=seq_len,
        coverage=record.coverage(),
        fields=list(record.fields),
        texts=dict(record.texts),
        num_tokens=_length(tokens),
        num_tokens_decoded=_length(decoded),
        arrays=_array_stats(record, mapper) if read else [],
        problems=problems,
    )


def _length(value: Any) -> int | None:
    """How many tokens a field has; None if it is not a sequence."""
    if isinstance(value, (list, tuple)):
        return len(value)
    array = value.data if isinstance(value, TorchValue) else value
    return len(array) if isinstance(array, np.ndarray) and array.ndim else None


def _order_of_kinds(kind: str) -> tuple[int, str]:
    known = list(layout.KINDS)
    return (known.index(kind) if kind in known else len(known), kind)


def _range(array: TypedArray, not_finite: tuple[int, int]) -> tuple[float, float] | None:
    """The smallest and the largest finite value; None without one."""
    # numpy compares halves one by one.
    is_half = array.dtype == "float16"
    values = (cast_values(array, "float32") if is_half else array).to_numpy()
    if any(not_finite):
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else None


def _array_stats(record: TraceRecord, mapper: Mapper) -> list[ArrayStats]:
    def look(found: tuple[str, LayerArray]) -> ArrayStats:
        kind, layer = found
        parts = _parts(layer.array)
        shapes = [list(part.shape) for part in parts]
        counts = [count_not_finite(part) for part in parts]
        ranges = list(filter(None, map(_range, parts, counts)))
        return ArrayStats(
            kind=kind,
            name=layer.name,
            site=layer.site,
            shape=shapes if isinstance(layer.array, StepArrays) else shapes[0],
            dtype=parts[0].dtype if parts else "none",
            minimum=min((low for low, _ in ranges), default=None),
            maximum=max((high for _, high in ranges), default=None),
            num_nan=sum(nan for nan, _ in counts),
            num_inf=sum(inf for _, inf in counts),
        )

    kinds = sorted(record.layered, key=_order_of_kinds)
    return list(
        mapper(look, [(kind, each) for kind in kinds for each in record.layered[kind].arrays])
    )
