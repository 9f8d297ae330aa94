"""float16 with fewer mantissa bits, which is float16 to every reader and compresses better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MANTISSA_BITS: Final = 10
_INFINITY: Final = np.uint16(0x7C00)
_SMALLEST_NORMAL: Final = np.uint16(0x0400)
_MAGNITUDE: Final = np.uint16(0x7FFF)


def rounded(values: NDArray[Any], mantissa_bits: int) -> NDArray[Any]:
    """Values rounded to `mantissa_bits` stored bits, ties to even.

    The relative error is at most 2^-(mantissa_bits + 1). Subnormal and not finite values stay as
    they are; what would round up to infinity is cut off instead, within the same bound.

    Parameters
    ----------
    values
        float16, any shape, C-contiguous.
    mantissa_bits
        Of 10.
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
