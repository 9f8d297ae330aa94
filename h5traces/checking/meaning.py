"""Runs every check of meaning over every value of an archive, a layer at a time."""

from __future__ import annotations

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from h5traces.archive.opening import open as open_archive
from h5traces.archive.stored_sample import begin
from h5traces.errors import H5TracesError, StoredStateWarning
from h5traces.format import layout
from h5traces.format.digests import content_digest
from h5traces.format.record import IndexRow
from h5traces.meaning.sample_checks import Look, SampleChecks, sample_findings, vocabulary_of
from h5traces.storage.hdf5.reading import problem_kind
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.checking.reports import ValidationReport
    from h5traces.format.limits import ReadLimits
    from h5traces.meaning.checks import Finding

# Each holds a layer, and some of it in float32.
_MOST_WORKERS = 4
# Bytes of a sample that take less time than handing its layers to threads.
SMALL_NBYTES = 1 << 20
# Samples that are read together, and their bytes at most.
BLOCK_SAMPLES = 100
_BLOCK_NBYTES = 16 << 20


class Looked(NamedTuple):
    """What the values of one sample show, or why it cannot be read."""

    found: tuple[Finding, ...] = ()
    row: IndexRow | None = None
    content: str | None = None
    error: str | None = None
    kind: str = ""


def check_meaning(
    path: Path,
    report: ValidationReport,
    limits: ReadLimits,
    *,
    seen: Callable[[], Looked | None] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, IndexRow]:
    """Add the findings about all samples to the report; what cannot be read is a problem.

    `seen` gives what helpers saw of the next sample, None if they did not look. Returns what the
    table of samples should say of those that could be read.
    """
    rows: dict[int, IndexRow] = {}
    with looking(path, limits, workers) as (archive, look):
        checks = SampleChecks()
        blocks = (look_at_block(archive, look, each) for each in blocks_of(len(archive)))
        here = chain.from_iterable(blocks)
        # The first three parts of an absolute path are its sample's.
        known = {"/".join(each.loc.split("/")[:3]) for each in report.problems}
        for index in range(len(archive)):
            place = layout.sample_path(index)
            # Helpers answer for every sample, skipped or not.
            looked = next(here) if seen is None else seen()
            if place in known:
                checks.skip()
                continue
            looked = looked or look(index)
            if looked.row is None:
                report.add(place, looked.error or "", looked.kind)
                checks.skip()
            else:
                rows[index] = looked.row
                row, is_asked = looked.row, archive.metadata.extraction is not None
                generation = row.generation_index if is_asked else None
                checks.add_found(looked.found, row.sample_id, looked.content, generation)
            if progress is not None:
                progress(index + 1, len(archive))
    report.findings = checks.findings.summaries(report.checks)
    return rows


@contextlib.contextmanager
def looking(
    path: Path, limits: ReadLimits, workers: int | None
) -> Iterator[tuple[Archive, Callable[..., Looked]]]:
    """An open archive, and what looks at all values of one of its samples in several threads."""
    with contextlib.ExitStack() as stack:
        # The check of the structure has warned already.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", StoredStateWarning)
        archive = stack.enter_context(open_archive(path, limits=limits, labels=False))
        pool = stack.enter_context(ThreadPoolExecutor(workers or num_workers()))
        alone = replace(look_of(archive), full_mapper=map)
        in_threads = replace(alone, full_mapper=pool.map)

        def look(index: int, trace: Trace | None = None) -> Looked:
            try:
                trace = trace or archive[index]
                is_large = trace._stored.raw_nbytes > SMALL_NBYTES
                record = to_record(trace, lazy=is_large)
                found = sample_findings(record, in_threads if is_large else alone)
                row = IndexRow.of(trace.metadata, record.texts)
                return Looked(tuple(found), row, stored_content(trace))
            except H5TracesError as error:
                return Looked(error=str(error), kind=problem_kind(error))

        yield archive, look


def look_at_block(
    archive: Archive, look: Callable[..., Looked], indices: Sequence[int]
) -> Iterator[Looked]:
    """What `look` sees of some samples, whose arrays are read in one call where they are small."""
    try:
        traces = [archive[index] for index in indices]
        wanted = [(trace._stored, trace._stored.needed()) for trace in traces]
        reading = begin(wanted, 1, most_nbytes=_BLOCK_NBYTES)
    except H5TracesError:
        # Looking at a damaged sample reports what is wrong.
        yield from map(look, indices)
        return
    for number, (index, trace) in enumerate(zip(indices, traces, strict=True)):
        with trace._stored.at_hand(reading.arrays(number)):
            yield look(index, trace)


def blocks_of(num_samples: int, first: int = 0, step: int = 1) -> Iterator[range]:
    """Every `step`-th block of samples, from number `first` on."""
    for start in range(first * BLOCK_SAMPLES, num_samples, step * BLOCK_SAMPLES):
        yield range(start, min(start + BLOCK_SAMPLES, num_samples))


def num_workers() -> int:
    """How many threads or processes look at samples."""
    return min(_MOST_WORKERS, os.cpu_count() or 1)


def look_of(archive: Archive) -> Look:
    """How samples of an archive are looked at, by its model and its losses."""
    metadata = archive.metadata
    extraction = metadata.extraction
    vocabulary = None if extraction is None else vocabulary_of(extraction.config)
    return Look(vocabulary=vocabulary, losses=metadata.losses)


def stored_content(trace: Trace) -> str:
    """The digest of a stored sample's content, by those of its datasets."""
    return content_digest(trace._stored.digests)
