"""Lossy encodings of attention weights: levels of square roots, rounded mantissas, head means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, cast_values
from h5traces.format.native import NATIVE
from h5traces.format.record import LayerArray, LayeredArrays, SourceForm, StepArrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.format.dtypes import FloatType
    from h5traces.format.precision import Precision
    from h5traces.format.record import ArraySource, TraceRecord


# Reduction of the kind that holds it, and what it was made by.
MEAN: Final = "mean"
DERIVATION: Final = "head-mean 1"
_HEAD_AXES: Final = 3


@dataclass(frozen=True, slots=True)
class HeadMean:
    """The mean of attention weights ``(heads, query, key)`` over heads, computed when asked for."""

    attention: ArraySource

    @property
    def shape(self) -> tuple[int, ...]:
        """Queries and keys."""
        return self.attention.shape[1:]

    @property
    def dtype(self) -> FloatType:
        """Always float32."""
        return "float32"

    def load(self) -> TypedArray:
        """The mean of the weights as float16 holds them, so that it is the same of an archive."""
        stored = cast_values(self.attention.load(), "float16")
        weights = cast_values(stored, "float32").values
        mean = weights.sum(axis=0)
        mean /= np.float32(max(1, len(weights)))
        return TypedArray(mean, "float32")


def with_head_mean(record: TraceRecord, precision: Precision) -> TraceRecord:
    """The record with the mean of its attentions beside them, or in their place.

    Attentions in generation steps, and those without an axis of heads, stay as they are.
    """
    attentions = record.layered.get(layout.ATTENTIONS)
    if precision.head_mean == "none" or attentions is None or not _has_heads(attentions):
        return record
    means = tuple(
        LayerArray(name=each.name, array=HeadMean(each.array))
        for each in attentions.arrays
        if not isinstance(each.array, StepArrays)
    )
    layered = dict(record.layered)
    fields = record.fields
    known = layered.get(layout.ATTENTION_MEAN)
    # Of heads that lost precision before, the mean that was stored beside them is the better one.
    mean = known if known is not None and known.reduction == MEAN else None
    if precision.head_mean == "only":
        del layered[layout.ATTENTIONS]
        renamed = {layout.ATTENTIONS: layout.ATTENTION_MEAN}
        fields = tuple(renamed.get(each, each) for each in fields)
    form = _without_heads(attentions.form)
    layered[layout.ATTENTION_MEAN] = mean or LayeredArrays(means, form, MEAN)
    return record.model_copy(update={"layered": layered, "fields": fields})


def _without_heads(form: SourceForm) -> SourceForm:
    if form.source_axes is None:
        return form
    axes = tuple(name for name in form.source_axes if name != "head")
    return form.model_copy(update={"source_axes": axes})


def _has_heads(attentions: LayeredArrays) -> bool:
    return not attentions.in_steps and all(
        len(each.array.shape) == _HEAD_AXES
        for each in attentions.arrays
        if not isinstance(each.array, StepArrays)
    )


# What stands for the weight 1.
LEVELS: Final = 255
_BYTE_VALUES: Final = 256
# Bits of float16: weights lie from 0 to 1, and minus zero is zero.
_ONE: Final = 0x3C00
_MINUS_ZERO: Final = 0x8000


def to_levels(values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Weights as numbers of levels, and the flat indices of those that are not from 0 to 1.

    `values` are float16 or float32, of any shape, C-contiguous.
    """
    if values.dtype.itemsize == 2:
        bits = values.view(np.uint16)
        if NATIVE is None:
            stored, largest = _table().take(bits, mode="wrap"), bits.max(initial=0)
        else:
            stored = np.empty(bits.shape, np.uint8)
            largest = NATIVE.to_levels(bits, _table(), stored)
        if largest <= _ONE:
            return stored, np.empty(0, np.int64)
        return stored, np.flatnonzero((bits > _ONE) & (bits != _MINUS_ZERO))
    with np.errstate(invalid="ignore"):
        within = (values >= 0) & (values <= 1)
    safe = np.where(within, values, 0)
    return _nearest(safe), np.flatnonzero(~within)


def _nearest(values: NDArray[Any]) -> NDArray[np.uint8]:
    # Halves go down: a weight that equals a threshold does not exceed it.
    roots = np.sqrt(values.astype(np.float64)) * LEVELS
    return np.ceil(roots - 0.5).astype(np.uint8)


@cache
def _table() -> NDArray[np.uint8]:
    """The level of every float16, by its bits; 0 for what is not a weight."""
    table = np.zeros(1 << 16, np.uint8)
    weights = np.arange(_ONE + 1, dtype=np.uint16).view(np.float16)
    table[: _ONE + 1] = _nearest(weights)
    return table


def from_levels(stored: NDArray[np.uint8], levels: int, *, as_half: bool) -> NDArray[Any]:
    """The weights that numbers of levels stand for, in float16 or float32."""
    table = _weights(levels, as_half=as_half)
    if NATIVE is None:
        return table.take(stored)
    out = np.empty(stored.shape, table.dtype)
    NATIVE.take(np.ascontiguousarray(stored), table, out)
    return out


@cache
def _weights(levels: int, *, as_half: bool) -> NDArray[Any]:
    roots = np.arange(_BYTE_VALUES, dtype=np.float32) / np.float32(levels)
    return (roots * roots).astype(np.float16 if as_half else np.float32)


_MANTISSA_BITS: Final = 10
_INFINITY: Final = np.uint16(0x7C00)
_SMALLEST_NORMAL: Final = np.uint16(0x0400)
_MAGNITUDE: Final = np.uint16(0x7FFF)


def rounded(values: NDArray[Any], mantissa_bits: int) -> NDArray[Any]:
    """float16 values rounded to `mantissa_bits` of 10 stored bits, ties to even.

    The relative error is at most 2^-(mantissa_bits + 1). Subnormal and not finite values stay as
    they are; what would round up to infinity is cut off instead, within the same bound.
    """
    bits = np.ascontiguousarray(values).view(np.uint16)
    if NATIVE is None:
        return _rounded_bits(bits, mantissa_bits).view(np.float16)
    out = np.empty_like(bits)
    NATIVE.to_levels(bits, _rounding_table(mantissa_bits), out)
    return out.view(np.float16)


@cache
def _rounding_table(mantissa_bits: int) -> NDArray[np.uint16]:
    """The bits of every float16 once rounded, by its bits."""
    return _rounded_bits(np.arange(1 << 16, dtype=np.uint16), mantissa_bits)


def _rounded_bits(bits: NDArray[np.uint16], mantissa_bits: int) -> NDArray[np.uint16]:
    drop = np.uint16(_MANTISSA_BITS - mantissa_bits)
    unit = np.uint16(1 << int(drop))
    magnitude = bits & _MAGNITUDE
    kept = ~np.uint16(int(unit) - 1)
    near = magnitude >> drop
    near &= np.uint16(1)
    near += magnitude
    near += np.uint16(int(unit) // 2 - 1)
    near &= kept
    if near.size and (magnitude.min() < _SMALLEST_NORMAL or near.max() >= _INFINITY):
        np.copyto(near, magnitude & kept, where=near >= _INFINITY)
        stays = (magnitude < _SMALLEST_NORMAL) | (magnitude >= _INFINITY)
        np.copyto(near, magnitude, where=stays)
    near |= bits & ~_MAGNITUDE
    return near
