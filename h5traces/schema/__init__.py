"""The pydantic models that are the single source of the format's metadata."""

from h5traces.schema.archive import ArchiveMetadata, KindMetadata, SourceFile
from h5traces.schema.extraction import (
    AnswerCut,
    ExtractionMetadata,
    FinishReason,
    SampleExtraction,
)
from h5traces.schema.labels import LabelSidecar
from h5traces.schema.precision import EXACT, TIERS, CalibrationRecord, Precision, Tier
from h5traces.schema.record import (
    ArrayDescription,
    ArraySource,
    Container,
    EarlierCast,
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
    "EXACT",
    "TIERS",
    "AnswerCut",
    "ArchiveMetadata",
    "ArrayDescription",
    "ArraySource",
    "CalibrationRecord",
    "Container",
    "Coverage",
    "EarlierCast",
    "ExtractionMetadata",
    "FinishReason",
    "KindMetadata",
    "LabelSidecar",
    "LayerArray",
    "LayeredArrays",
    "Precision",
    "SampleExtraction",
    "SourceFile",
    "SourcePosition",
    "StepArrays",
    "Tier",
    "TraceDescription",
    "TraceMetadata",
    "TraceRecord",
    "coverage_of",
]
