"""Writes archives sample by sample over a long run, so that no crash loses a finished sample."""

from h5traces.spooling.creating import create
from h5traces.spooling.process_writer import ProcessWriter
from h5traces.spooling.targets import DEFAULT_SHARD_SAMPLES, Target
from h5traces.spooling.trace_writer import TraceWriter

__all__ = ["DEFAULT_SHARD_SAMPLES", "ProcessWriter", "Target", "TraceWriter", "create"]
