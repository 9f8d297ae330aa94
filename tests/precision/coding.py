"""Arrays through the encodings and back, as writer and reader send them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from h5traces.format.dtypes import TypedArray
from h5traces.precision.decoding import decode, is_encoded
from h5traces.precision.encoding import EncodedLayer, Encoder
from h5traces.precision.scales import (
    ChannelAccumulator,
    ChannelScale,
    ChannelStatistics,
    ScaleSet,
    channel_scale,
)

if TYPE_CHECKING:
    from h5traces.format.precision import Precision

LAYER = "layer_000"


def typed(values: np.ndarray) -> TypedArray:
    """float16 or float32 values as the writer takes them."""
    return TypedArray(np.ascontiguousarray(values), values.dtype.name)  # type: ignore[arg-type]


def scale_of(samples: list[np.ndarray], step: float) -> ChannelScale:
    """The scale that a calibration on these samples gives."""
    accumulator = ChannelAccumulator()
    for each in samples:
        accumulator.add(each)
    return channel_scale(accumulator.statistics(), step)


def scale_from(center: np.ndarray, sigma: np.ndarray, step: float) -> ChannelScale:
    """The scale of channels whose statistics are known."""
    statistics = ChannelStatistics(np.float32(center), np.float32(sigma))
    return channel_scale(statistics, step)


def encoded(
    values: np.ndarray,
    precision: Precision,
    *,
    kind: str = "hidden_states",
    scale: ChannelScale | None = None,
) -> EncodedLayer:
    """One layer's array as it is stored."""
    scales = ScaleSet({} if scale is None else {f"hidden_states/{LAYER}": scale})
    return Encoder(precision, scales).encode(kind, LAYER, typed(values))


def restored(
    layer: EncodedLayer, scale: ChannelScale | None = None, *, unrounded: bool = False
) -> np.ndarray:
    """What a reader gets."""
    if not is_encoded(layer.attrs):
        return layer.values

    def only(path: str) -> ChannelScale:
        assert path == f"/scales/hidden_states/{LAYER}"
        assert scale is not None
        return scale

    def exceptions() -> np.ndarray:
        assert layer.exceptions is not None
        return layer.exceptions

    found = decode(
        layer.values, layer.attrs, scale=only, exceptions=exceptions, unrounded=unrounded
    )
    return found.values


def bits(values: np.ndarray) -> np.ndarray:
    """The bits of floats, so that NaN and minus zero can be compared."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def assert_same_values(found: np.ndarray, values: np.ndarray) -> None:
    """Fail unless numbers and their zeros' signs are the same, in any two types of floats."""
    numbers = ~np.isnan(values)
    assert np.array_equal(found[numbers].astype("f8"), values[numbers].astype("f8"))
    assert np.array_equal(np.signbit(found), np.signbit(values))
    assert np.array_equal(np.isnan(found), ~numbers)


def assert_same_class(found: np.ndarray, values: np.ndarray) -> None:
    """Fail unless NaN is NaN, infinities are themselves, and signs of both are kept."""
    odd = ~np.isfinite(values)
    assert np.array_equal(~np.isfinite(found), odd)
    assert np.array_equal(np.isnan(found), np.isnan(values))
    assert np.array_equal(np.signbit(found[odd]), np.signbit(values[odd]))
