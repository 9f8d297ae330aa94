"""Encodings that give up precision for size, each with a bound on what they change."""

from h5traces.precision.decoding import (
    attribute_problems,
    decode,
    is_encoded,
    is_stated,
    restored_type,
)
from h5traces.precision.encoding import EncodedLayer, Encoder
from h5traces.precision.exceptions import EXCEPTION_COLUMNS, num_exceptions
from h5traces.precision.head_mean import DERIVATION, MEAN, with_head_mean
from h5traces.precision.scale_storage import (
    layers_with_scales,
    read_scale,
    read_statistics,
    scale_arrays,
    statistics_arrays,
)
from h5traces.precision.scales import Calibration, ChannelScale, ChannelStatistics, ScaleSet
from h5traces.precision.statistics import ChannelAccumulator

__all__ = [
    "DERIVATION",
    "EXCEPTION_COLUMNS",
    "MEAN",
    "Calibration",
    "ChannelAccumulator",
    "ChannelScale",
    "ChannelStatistics",
    "EncodedLayer",
    "Encoder",
    "ScaleSet",
    "attribute_problems",
    "decode",
    "is_encoded",
    "is_stated",
    "layers_with_scales",
    "num_exceptions",
    "read_scale",
    "read_statistics",
    "restored_type",
    "scale_arrays",
    "statistics_arrays",
    "with_head_mean",
]
