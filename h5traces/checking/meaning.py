"""Runs every check of meaning over every value of an archive, a layer at a time."""

from __future__ import annotations

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from h5traces.archive.opening import open as open_archive
from h5traces.errors import H5TracesError, StoredStateWarning
from h5traces.format import layout
from h5traces.format.digests import content_digest
from h5traces.format.record import IndexRow
from h5traces.meaning.sample_checks import Look, SampleChecks, vocabulary_of
from h5traces.storage.hdf5.reading import problem_kind
from h5traces.writing.stored_samples import to_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from h5traces.archive.archive import Archive
    from h5traces.archive.trace import Trace
    from h5traces.checking.reports import ValidationReport
    from h5traces.format.limits import ReadLimits

# Each holds a layer, and some of it in float32.
_MOST_WORKERS = 4
# Bytes of a sample that take less time than handing its layers to threads.
_SMALL = 1 << 20


def check_meaning(
    path: Path,
    report: ValidationReport,
    limits: ReadLimits,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, IndexRow]:
    """Add the findings about all samples to the report; what cannot be read is a problem.

    Returns what the table of samples should say of those that could be read.
    """
    rows: dict[int, IndexRow] = {}
    # What the structure's check said of the file's state need not be said again.
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", StoredStateWarning)
        archive = stack.enter_context(open_archive(path, limits=limits, labels=False))
        most = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
        pool = stack.enter_context(ThreadPoolExecutor(most))
        look = replace(look_of(archive), full_mapper=map)
        in_threads = replace(look, full_mapper=pool.map)
        checks = SampleChecks(look)
        # The first three parts of an absolute path are its sample's.
        known = {"/".join(each.loc.split("/")[:3]) for each in report.problems}
        for index in range(len(archive)):
            place = layout.sample_path(index)
            if place in known:
                checks.skip()
                continue
            try:
                trace = archive[index]
                is_large = sum(each.raw_nbytes for each in trace._stored.objects.values()) > _SMALL
                record = to_record(trace, lazy=is_large)
                rows[index] = IndexRow.of(trace.metadata, record.texts)
                checks.add(record, stored_content(trace), look=in_threads if is_large else look)
            except H5TracesError as error:
                report.add(place, error, problem_kind(error))
                checks.skip()
            if progress is not None:
                progress(index + 1, len(archive))
    report.findings = checks.findings.summaries(report.checks)
    return rows


def look_of(archive: Archive) -> Look:
    """How samples of an archive are looked at: what it says of its model and its losses."""
    metadata = archive.metadata
    extraction = metadata.extraction
    vocabulary = None if extraction is None else vocabulary_of(extraction.config)
    return Look(vocabulary=vocabulary, losses=metadata.losses)


def stored_content(trace: Trace) -> str:
    """The digest of a stored sample's content, by those of its datasets."""
    objects = trace._stored.objects
    return content_digest({path: entry.attrs for path, entry in objects.items()})
