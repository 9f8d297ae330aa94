"""Writes archives; the writer knows trace records and nothing else."""

from h5traces.writer.archive_writer import ArchiveWriter
from h5traces.writer.options import WriteOptions, WriteSummary

__all__ = ["ArchiveWriter", "WriteOptions", "WriteSummary"]
