"""The pydantic models that are the single source of the format's metadata."""

from h5traces.schema.archive import ArchiveMetadata, KindMetadata, SourceFile
from h5traces.schema.labels import LabelSidecar
from h5traces.schema.record import (
    ArrayDescription,
    ArraySource,
    Container,
    LayerArray,
    LayeredArrays,
    StepArrays,
    TraceDescription,
    TraceRecord,
    coverage_of,
)
from h5traces.schema.trace import COVERAGE_DEFINITIONS, Coverage, SourcePosition, TraceMetadata

__all__ = [
    "COVERAGE_DEFINITIONS",
    "ArchiveMetadata",
    "ArrayDescription",
    "ArraySource",
    "Container",
    "Coverage",
    "KindMetadata",
    "LabelSidecar",
    "LayerArray",
    "LayeredArrays",
    "SourceFile",
    "SourcePosition",
    "StepArrays",
    "TraceDescription",
    "TraceMetadata",
    "TraceRecord",
    "coverage_of",
]
