"""Casts between float16 and float32: numpy's, to the bit, at two to three times its speed.

numpy casts one value at a time. Here whole arrays go through a table, or through shifts and
additions of their bits, which are vectorised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format.scratch import Scratch

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values at a time: what is computed on the way stays in the processor's cache.
_BLOCK: Final = 1 << 15
# Every float16 as float32, by its bits.
_FLOAT32: Final = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)

# Bits of float32: what is less than 2^-14 becomes a subnormal float16 or zero, what is 65520 or
# more does not become a finite one.
_SMALLEST_NORMAL: Final = np.uint32(0x38800000)
_OVERFLOW: Final = np.uint32(0x477FF000)
# From the exponent's bias of float32 to that of float16, and half a unit less one for rounding.
_REBIAS: Final = np.uint32((1 << 32) - ((127 - 15) << 23) + 0xFFF)

_HALF: Final = np.uint32(0x3F000000)

_MAGNITUDE, _ROUNDED, _OTHER = Scratch(), Scratch(), Scratch()


def to_float32(values: NDArray[np.float16], out: NDArray[np.float32] | None = None) -> Any:
    """float16 values as float32, which is exact.

    Parameters
    ----------
    values
        C-contiguous, little-endian, any shape.
    out
        Where to, of as many values and any shape; a new array by default.
    """
    bits = values.view(np.uint16)
    return _FLOAT32.take(bits if out is None else bits.reshape(out.shape), out=out, mode="wrap")


def to_float16(
    values: NDArray[np.float32], out: NDArray[np.float16] | None = None
) -> NDArray[np.float16]:
    """The nearest float16 values, ties to even: what ``astype`` gives, without its warnings.

    Parameters
    ----------
    values
        C-contiguous, little-endian, any shape.
    out
        C-contiguous, where to; a new array by default.
    """
    out = np.empty(values.shape, np.float16) if out is None else out
    source, target = values.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, _BLOCK):
        _cast_block(source[start : start + _BLOCK], target[start : start + _BLOCK])
    return out


# What exponents of float16 lie below those of float32; exact, but for what becomes subnormal.
ALIGNED: Final = np.float32(2.0**-112)


def from_aligned(values: NDArray[np.float32], out: NDArray[np.float16]) -> None:
    """Narrow values that were multiplied by `ALIGNED`; the result is that of `to_float16`.

    Half the work: only the last bits have to be rounded and the sign to be moved.

    Parameters
    ----------
    values
        C-contiguous; overwritten. Before they were multiplied, their magnitude was below 65520.
    out
        C-contiguous, of the same shape.
    """
    bits = values.view(np.uint32)
    rounded = _ROUNDED.take(values.nbytes).view(np.uint32).reshape(values.shape)
    np.right_shift(bits, np.uint32(13), out=rounded)
    np.bitwise_and(rounded, np.uint32(1), out=rounded)
    np.add(rounded, bits, out=rounded)
    np.add(rounded, np.uint32(0xFFF), out=rounded)
    np.right_shift(rounded, np.uint32(13), out=rounded)
    np.right_shift(bits, np.uint32(16), out=bits)
    np.bitwise_and(bits, np.uint32(0x8000), out=bits)
    np.bitwise_or(rounded, bits, out=bits)
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def _cast_block(source: NDArray[np.float32], target: NDArray[np.float16]) -> None:
    """Shifts and additions; what float16 cannot hold is left to numpy."""
    bits = source.view(np.uint32)
    magnitude = _MAGNITUDE.take(source.nbytes).view(np.uint32)
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=magnitude)
    rounded = _ROUNDED.take(source.nbytes).view(np.uint32)
    # The last bit that stays decides ties.
    np.right_shift(magnitude, np.uint32(13), out=rounded)
    np.bitwise_and(rounded, np.uint32(1), out=rounded)
    np.add(rounded, magnitude, out=rounded)
    np.add(rounded, _REBIAS, out=rounded)
    np.right_shift(rounded, np.uint32(13), out=rounded)
    if magnitude.min() < _SMALLEST_NORMAL:
        _round_subnormal(magnitude, rounded)
    sign = _OTHER.take(source.nbytes).view(np.uint32)
    np.right_shift(bits, np.uint32(16), out=sign)
    np.bitwise_and(sign, np.uint32(0x8000), out=sign)
    np.bitwise_or(rounded, sign, out=rounded)
    np.copyto(target.view(np.uint16), rounded, casting="unsafe")
    if magnitude.max() >= _OVERFLOW:
        beyond = magnitude >= _OVERFLOW
        with np.errstate(over="ignore", invalid="ignore"):
            target[beyond] = source[beyond].astype(np.float16)


def _round_subnormal(magnitude: NDArray[np.uint32], rounded: NDArray[np.uint32]) -> None:
    """Beside 0.5 the last bit of a float32 counts as much as that of a subnormal float16."""
    shifted = _OTHER.take(magnitude.nbytes).view(np.float32)
    with np.errstate(invalid="ignore"):
        np.add(magnitude.view(np.float32), np.float32(0.5), out=shifted)
    small = shifted.view(np.uint32)
    np.subtract(small, _HALF, out=small)
    np.copyto(rounded, small, where=magnitude < _SMALLEST_NORMAL)
