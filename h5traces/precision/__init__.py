"""Encodings that give up precision for size, each with a bound on what they change."""

from h5traces.precision.decoding import decode, is_encoded, restored_type
from h5traces.precision.encoding import EncodedLayer, Encoder
from h5traces.precision.head_mean import with_head_mean
from h5traces.precision.scales import ChannelScale, ChannelStatistics, ScaleSet
from h5traces.precision.statistics import ChannelAccumulator

__all__ = [
    "ChannelAccumulator",
    "ChannelScale",
    "ChannelStatistics",
    "EncodedLayer",
    "Encoder",
    "ScaleSet",
    "decode",
    "is_encoded",
    "restored_type",
    "with_head_mean",
]
