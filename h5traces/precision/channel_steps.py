"""Hidden states as whole numbers of steps, each channel with its own step and offset.

``restored = offset + (stored - zero_point) / spacing * step``. Steps have few significant bits and
offsets are sixteenths of a step, so float64 computes this exactly, in any order, and float32 does
unless an offset is thousands of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format.dtypes import float32_to_float16
from h5traces.format.limits import Scratch
from h5traces.format.native import NATIVE
from h5traces.storage.memory import POOL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.precision.scales import ChannelScale

# Sigmas that one byte must reach; a Gaussian has one value in 5 x 10^8 beyond.
_REACH_OF_BYTE: Final = 6.0
# In two bytes, the upper one should change by about one and a half within a sigma: Huffman codes
# waste more where it changes less. The lower one should have many values, since deflate spends one
# code of every table on the end of a block: of 32 values that takes 0.03 bits each, of 8 it takes
# 0.13.
_SPACING_OF_SIGMA: Final = 400
# Rounding to float16 changes a value by at most half its spacing: 2^-11 of it, or 2^-25.
_RELATIVE_ROUNDING: Final = np.float32(2.0**-11)
_LEAST_ROUNDING: Final = np.float32(2.0**-25)
# What does not become infinite in float16 is less.
_OVERFLOW: Final = np.float32(65520)
# The bound that is checked is less by far more than float32 rounds away in the check.
_SLACK: Final = 1 - 2.0**-20
# Differences in float32 are off by at most 2^-24 of them.
_SURE: Final = np.float32(1 - 2.0**-22)
# Tokens, the share of channels below, and the most that a value counts, in sigma, where it is asked
# whether a scale fits.
_LOOKED_AT: Final = 16
_DEVIATING: Final = 0.9
_MASSIVE: Final = np.float32(4)
# In float32, numbers from 2^23 to 2^24 are whole.
_WHOLE: Final = np.float32(3 << 22)
# Values at a time: what is computed on the way stays in the processor's cache.
_BLOCK: Final = 1 << 16
# Values that do not fit, at least, in memory for their indices.
_FEW: Final = 1024
# Scales, of which a model has one for each layer, whose tables stay in memory.
_SCALES_KEPT: Final = 64
# Fewer calls when decoding: threads wait for each other at every one.
_DECODED_BLOCK: Final = 1 << 18

_SOURCE, _STEPS, _ROUNDING = Scratch(), Scratch(), Scratch()


@dataclass(frozen=True, slots=True)
class StepFormat:
    """How numbers of steps lie in unsigned integers, ``uint8`` or ``uint16``."""

    dtype: str
    # What stands for no step.
    zero_point: int
    # Stored units per step, a power of two. In two bytes, the lower one holds the fine part of a
    # number, which is noise, and the upper one all that can be compressed.
    spacing: int
    # In either direction.
    most_steps: int

    @classmethod
    def of(cls, step: float) -> StepFormat:
        """The format for steps of this many sigma."""
        if 127 * step >= _REACH_OF_BYTE:
            return cls("uint8", 128, 1, 127)
        spacing = max(1, 2 ** round(math.log2(_SPACING_OF_SIGMA * step)))
        return cls("uint16", 32768, spacing, 32767 // spacing)


@lru_cache(maxsize=_SCALES_KEPT)
def reaches_too_far(scale: ChannelScale, dtype: str, spacing: int) -> bool:
    """Whether float32 cannot hold what some number of steps stands for."""
    with np.errstate(over="ignore"):
        reach = np.abs(scale.offset) + np.float32(np.iinfo(dtype).max / spacing) * scale.step
    return not np.isfinite(reach).all()


def to_steps(
    values: NDArray[Any], scale: ChannelScale, step: float
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values as numbers of steps, and which of them would not come back within the bound.

    The bound is half of `step`, in sigma, for values that are read in the type of the source and
    for those that are read in float32. `values` are float16 or float32 ``(tokens, hidden)``,
    C-contiguous. The second result has flat indices (C order) of exceptions: values that are not
    finite, or so far away that there is no number for them.
    """
    form = StepFormat.of(step)
    dtype = np.dtype(form.dtype).newbyteorder("<")
    stored = POOL.array(values.size * dtype.itemsize).view(dtype).reshape(values.shape)
    bound, table = _bounds_and_table(scale, step)
    compiled = _compiled_steps(values, form, table, stored)
    if compiled is not None:
        stored.reshape(-1)[compiled] = form.zero_point
        return stored, compiled
    reach = np.abs(scale.offset) + form.most_steps * scale.step
    overflows = values.dtype.itemsize == 2 and bool((reach >= _OVERFLOW).any())
    exceptions = []
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    for first in range(0, len(values), rows):
        part = slice(first, first + rows)
        found = _block_to_steps(values[part], scale, form, bound, stored[part], overflows=overflows)
        if found.size:
            exceptions.append(found + first * values.shape[1])
    beyond = np.concatenate(exceptions) if exceptions else np.empty(0, np.int64)
    stored.reshape(-1)[beyond] = form.zero_point
    return stored, beyond


def spread_of(stored: NDArray[Any], step: float) -> float:
    """Mean deviation from the middle, in sigma, of the channels that deviate most.

    About 1 where a scale fits. A tenth of the channels is taken, since some may be dead, and up to
    16 tokens from all over the array, where massive values count as 4 sigma. As in calibration, a
    first token does not count. `stored` is what `to_steps` gave, with a token and a channel at
    least.
    """
    form = StepFormat.of(step)
    others = stored[1:] if len(stored) > 1 else stored
    deviation = others[:: -(-len(others) // _LOOKED_AT)].astype(np.float32)
    deviation -= np.float32(form.zero_point)
    np.abs(deviation, out=deviation)
    sigma = np.float32(form.spacing / step)
    np.minimum(deviation, _MASSIVE * sigma, out=deviation)
    mean = deviation.mean(axis=0) / sigma
    place = _DEVIATING * (mean.size - 1)
    lower = int(place)
    upper = min(lower + 1, mean.size - 1)
    mean.partition((lower, upper))
    return float(mean[lower] + (mean[upper] - mean[lower]) * (place - lower))


def _block_to_steps(
    values: NDArray[Any],
    scale: ChannelScale,
    form: StepFormat,
    bound: NDArray[np.float32],
    stored: NDArray[Any],
    *,
    overflows: bool,
) -> NDArray[np.int64]:
    source, steps, rounding = (_float32(each, values) for each in (_SOURCE, _STEPS, _ROUNDING))
    is_half = values.dtype.itemsize == 2
    np.copyto(source, values)
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(source, scale.offset, out=steps)
        np.multiply(steps, 1 / scale.step, out=steps)
        np.clip(steps, -form.most_steps, form.most_steps, out=steps)
        # A sum with so large a number has no fraction: its last bits
        # are those of the nearest whole number.
        np.add(steps, _WHOLE, out=steps)
        np.copyto(stored, steps.view(np.uint32), casting="unsafe")
        np.subtract(steps, _WHOLE, out=steps)
        restored = np.multiply(steps, scale.step, out=steps)
        np.add(restored, scale.offset, out=restored)
        np.subtract(source, restored, out=source)
        np.abs(source, out=source)
        if is_half:
            # More than rounding can add; the few beyond are looked at one by one.
            np.abs(restored, out=rounding)
            np.multiply(rounding, _RELATIVE_ROUNDING, out=rounding)
            np.add(source, rounding, out=source)
        within = source <= bound - _LEAST_ROUNDING
        if overflows:
            within &= rounding < _OVERFLOW * _RELATIVE_ROUNDING
    if form.spacing > 1:
        np.multiply(stored, form.spacing, out=stored)
    np.add(stored, form.zero_point, out=stored)
    if within.all():
        return np.empty(0, np.int64)
    suspects = np.flatnonzero(~within)
    return suspects[~_comes_back(suspects, values, restored.reshape(-1)[suspects], bound)]


@lru_cache(maxsize=_SCALES_KEPT)
def _bounds_and_table(
    scale: ChannelScale, step: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The bound of every channel, and the scale ``(5, hidden)`` as the kernels take it."""
    bound = (scale.sigma.astype(np.float64) * (step / 2 * _SLACK)).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        columns = scale.step, 1 / scale.step, scale.offset, bound * _SURE, bound
        return bound, np.stack(columns, dtype="<f4")


def _compiled_steps(
    values: NDArray[Any], form: StepFormat, table: NDArray[np.float32], stored: NDArray[Any]
) -> NDArray[np.int64] | None:
    """`to_steps` by compiled kernels; None for an array of which too many values do not fit."""
    if NATIVE is None or not values.size:
        return None
    beyond = np.empty(values.size // 16 + _FEW, np.int64)
    kind = 0 if values.dtype.itemsize == 2 else 2
    numbers = form.most_steps, form.spacing, form.zero_point
    count = NATIVE.to_steps(values, kind, table, *numbers, stored, stored.itemsize, beyond)
    return None if count < 0 else beyond[:count].copy()


def _comes_back(
    suspects: NDArray[np.int64],
    values: NDArray[Any],
    after: NDArray[np.float32],
    bound: NDArray[np.float32],
) -> NDArray[np.bool_]:
    """Whether values, at flat indices, are within the bound in their own type and in float32."""
    before = values.reshape(-1)[suspects].astype(np.float64)
    limit = bound[suspects % values.shape[1]]
    with np.errstate(over="ignore", invalid="ignore"):
        found: NDArray[np.bool_] = np.abs(after.astype(np.float64) - before) <= limit
        rounded = after.astype(values.dtype).astype(np.float64)
        found &= np.abs(rounded - before) <= limit
    return found


def _float32(scratch: Scratch, like: NDArray[Any]) -> NDArray[np.float32]:
    return scratch.take(4 * like.size).view(np.float32).reshape(like.shape)


def from_steps(
    stored: NDArray[Any], scale: ChannelScale, zero_point: int, spacing: int, *, as_half: bool
) -> NDArray[Any]:
    """The values that numbers of steps, ``(tokens, hidden)``, stand for.

    Rounded to float16 with `as_half`; else float32, which is exact.
    """
    out = np.empty(stored.shape, np.float16 if as_half else np.float32)
    factor, offset = scale.step / np.float32(spacing), scale.offset
    if NATIVE is not None and stored.size:
        table = np.concatenate((factor, offset), dtype="<f4")
        plain = np.ascontiguousarray(stored)
        NATIVE.from_steps(plain, plain.itemsize, table, zero_point, as_half, out)
        return out
    rows = max(1, _DECODED_BLOCK // max(1, stored.shape[1]))
    for start in range(0, len(stored), rows):
        part = slice(start, start + rows)
        values = _float32(_SOURCE, stored[part]) if as_half else out[part]
        np.copyto(values, stored[part], casting="unsafe")
        np.subtract(values, np.float32(zero_point), out=values)
        np.multiply(values, factor, out=values)
        np.add(values, offset, out=values)
        if as_half:
            float32_to_float16(values, out[part])
    return out
