"""Writes archives; the writer knows trace records and nothing else."""

from h5traces.writer.archive_writer import ArchiveWriter
from h5traces.writer.options import WriteOptions, WriteSummary, precision_warnings
from h5traces.writer.preparation import record_attributes
from h5traces.writer.stored_samples import StoredSample

__all__ = [
    "ArchiveWriter",
    "StoredSample",
    "WriteOptions",
    "WriteSummary",
    "precision_warnings",
    "record_attributes",
]
