"""Attention weights on a square-root scale: fine where they are small, coarse where they are large.

``restored = (stored / levels) ** 2``. Square roots err by at most half a level. With 255 levels
0.01 is the boundary of two cells, so that no weight changes sides of that threshold.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        stored = _table().take(bits, mode="wrap")
        if bits.max(initial=0) <= _ONE:
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
    """The level of every float16, by its bits; 0 for what is no weight."""
    table = np.zeros(1 << 16, np.uint8)
    weights = np.arange(_ONE + 1, dtype=np.uint16).view(np.float16)
    table[: _ONE + 1] = _nearest(weights)
    return table


def from_levels(stored: NDArray[np.uint8], levels: int, *, as_half: bool) -> NDArray[Any]:
    """The weights that numbers of levels stand for, in float16 or float32."""
    return _weights(levels, as_half=as_half).take(stored)


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
    drop = np.uint16(_MANTISSA_BITS - mantissa_bits)
    unit = np.uint16(1 << int(drop))
    bits = values.view(np.uint16)
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
    return near.view(np.float16)
